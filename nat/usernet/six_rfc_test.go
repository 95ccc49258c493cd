package usernet

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// isError6 wants an ICMPv6 error about a packet of the guest's, whose headers
// and first bytes it tells. It returns what the error says beside.
func (a *arrived) isError6(t testing.TB, typ, code uint8, from string, about []byte) uint32 {
	t.Helper()
	require.NotNil(t, a.icmp6, "%x", a.data)
	assert.Equal(t, layers.CreateICMPv6TypeCode(typ, code).String(), a.icmp6.TypeCode.String())
	assert.Equal(t, from, a.src().String())
	q, sent := a.payload[4:], about[14:]
	require.GreaterOrEqual(t, len(q), ip6Len+8)
	assert.Equal(t, sent[8:40], q[8:40], "addresses")
	assert.Equal(t, sent[6], q[6], "next header")
	if sent[6] == frame.ProtoUDP {
		n := min(len(q), len(sent))
		assert.Equal(t, sent[40:44], q[40:44], "ports")
		assert.Equal(t, sent[48:n], q[48:n], "payload")
	}
	return binary.BigEndian.Uint32(a.payload)
}

// beyond6 is a host behind the outside, by a link with a small MTU.
func beyond6(t *testing.T, outside *enginetest.NetNS) (far *enginetest.NetNS) {
	t.Helper()
	far = enginetest.NewNetNS(t)
	enginetest.Veth(t, outside, "eth1", far, "eth0")
	enginetest.Must(t, outside.Addr("eth1", "2001:db8:2::1/64"), far.Addr("eth0", "2001:db8:2::9/64"), far.Route("default", "2001:db8:2::1"),
		outside.SetMTU("eth1", 1300), far.SetMTU("eth0", 1300), outside.Sysctl("net/ipv6/conf/all/forwarding", "1"))
	return far
}

func TestRow61RFC4443Errors(t *testing.T) {
	pod, outside := pod6(t)
	beyond6(t, outside)
	w := newWorld(t, ofSix, inPod(t, pod))
	at := func(a string) netip.AddrPort { return netip.AddrPortFrom(netip.MustParseAddr(a), 9) }

	b := udpTo(1000, at(outsideIP6), "nobody listens")
	require.Empty(t, w.send(b))
	a := w.next()
	a.isError6(t, 1, 4, outsideIP6, b)

	b = udpTo(1001, at("2001:db8:77::1"), "no route there")
	w.send(b)
	a = w.next()
	a.isError6(t, 1, 0, outsideIP6, b)

	ip := to(netip.MustParseAddr("2001:db8:2::9"))
	ip.TTL = 1
	b = enginetest.UDPFrame(toRouter, ip, enginetest.UDP{Src: 1002, Dst: 9}, []byte("one hop"))
	as := w.send(b)
	require.Len(t, as, 1)
	as[0].isError6(t, 3, 0, gatewayIP6.String(), b)
	assert.Equal(t, b[14:], as[0].payload[4:], "all of it is quoted")

	ip.TTL = 2
	b = enginetest.UDPFrame(toRouter, ip, enginetest.UDP{Src: 1002, Dst: 9}, []byte("two hops"))
	require.Empty(t, w.send(b))
	a = w.next()
	a.isError6(t, 3, 0, outsideIP6, b)

	// RFC 8201: the first is too big for a router, the next for the host itself.
	b = udpTo(1003, at("2001:db8:2::9"), strings.Repeat("x", 1400))
	require.Empty(t, w.send(b))
	a = w.next()
	assert.EqualValues(t, 1300, a.isError6(t, 2, 0, outsideIP6, b))
	as = w.send(b)
	require.Len(t, as, 1)
	assert.EqualValues(t, 1300, as[0].isError6(t, 2, 0, gatewayIP6.String(), b))

	b = enginetest.ICMPFrame(toRouter, to(netip.MustParseAddr("2001:db8:77::1")), enginetest.ICMP{Type: 128, Rest: 5<<16 | 6}, []byte("echo"))
	require.Empty(t, w.send(b))
	a = w.next()
	a.isError6(t, 1, 0, outsideIP6, b)
	assert.Equal(t, b[58:62], a.payload[4+44:4+48], "id and sequence number are the guest's")

	b = toRouter.Frame(frame.TypeIPv6, to(gatewayIP6).Packet(132, make([]byte, 20)))
	as = w.send(b)
	require.Len(t, as, 1)
	assert.EqualValues(t, 6, as[0].isError6(t, 4, 1, gatewayIP6.String(), b), "where the next header is that is not known")

	// Errors about errors there are none.
	e := append([]byte{0, 0, 0, 0}, b[14:]...)
	require.Empty(t, w.send(enginetest.ICMPFrame(toRouter, to(netip.MustParseAddr("fd10:0:2::99")), enginetest.ICMP{Type: 1, Code: 4}, e)))
}

func TestRow61TCPUnreachable(t *testing.T) {
	pod, outside := pod6(t)
	beyond6(t, outside)
	w := newWorld(t, ofSix, inPod(t, pod))
	dst := netip.MustParseAddrPort("[2001:db8:77::1]:80")
	b := tcpTo(dst, enginetest.TCP{Src: 42000, Seq: guestISS, Flags: tcpSYN}, "")
	as := w.send(b)
	if len(as) == 0 {
		as = append(as, w.next())
	}
	as[0].isError6(t, 1, 0, gatewayIP6.String(), b)
	p := &peer{w: w, dst: netip.MustParseAddrPort("[" + outsideIP6 + "]:81"), sport: 42001, seq: guestISS, wnd: 65535}
	p.expect(p.raw(tcpSYN, ""), func(a *arrived) bool { return a.tcp.RST })
}

func TestRow61RFC5508EchoOutAndBack(t *testing.T) {
	pod, _ := pod6(t)
	w := newWorld(t, ofSix, inPod(t, pod))
	dst := netip.MustParseAddr(outsideIP6)
	for seq, payload := range []string{"", "x", strings.Repeat("y", 60), strings.Repeat("z", 1452)} {
		w.send(echoTo(dst, 77, uint16(seq), payload))
		w.consumed()
		a := w.next()
		require.NotNil(t, a.icmp6)
		require.Equal(t, layers.CreateICMPv6TypeCode(129, 0), a.icmp6.TypeCode)
		require.Equal(t, []byte{0, 77, 0, byte(seq)}, a.payload[:4])
		require.Equal(t, payload, string(a.payload[4:]))
		assert.EqualValues(t, 63, a.ip6.HopLimit)
		assert.Equal(t, dst, a.src())
	}
	m := enginetest.ICMP{Type: 128, Rest: 77<<16 | 9}.Message(to(dst), bytes.Repeat([]byte("v"), 5000))
	w.send(fragments6(to(dst), 1, protoICMP6, m, 1448)...)
	var whole []byte
	for len(whole) < 5008 {
		a := w.next()
		require.NotNil(t, a.frag6)
		whole = append(whole, a.payload...)
	}
	want := enginetest.ICMP{Type: 129, Rest: 77<<16 | 9}.Message(enginetest.IP{Src: dst, Dst: guestIP6}, bytes.Repeat([]byte("v"), 5000))
	assert.Equal(t, want, whole)
	assert.Equal(t, 1, w.net.Stats().EchoOpen)
	// Where the host has no ping sockets for us, the guest is told.
	enginetest.Must(t, pod.Sysctl("net/ipv4/ping_group_range", "1 0"))
	b := echoTo(dst, 78, 1, "no")
	as := w.send(b)
	require.Len(t, as, 1)
	as[0].isError6(t, 1, 1, gatewayIP6.String(), b)
}

func TestRow61Policy(t *testing.T) {
	rule := func(s string) Rule {
		r, err := ParseRule(s)
		require.NoError(t, err)
		return r
	}
	w := newWorld(t, ofSix, func(c *Config) {
		c.Policy.Rules = []Rule{rule("deny=[2001:db8::/32]"), rule("allow=[::1]:53"), rule("deny=[::1]"), rule("deny=[fd10:0:2::/120]/icmp"), rule("deny=0.0.0.0/0")}
	})
	for dst, denied := range map[string]bool{
		"[2001:db8::1]:80": true, "[2001:db9::1]:80": false, "[fd10:0:2::1]:53": false, "[fd10:0:2::1]:54": true,
	} {
		require.Equal(t, !denied, w.net.permits(frame.ProtoUDP, w.number(dst), netip.MustParseAddrPort(dst).Port()), dst)
	}
	b := udpTo(1000, netip.MustParseAddrPort("[2001:db8::1]:80"), "")
	as := w.send(b)
	w.dropped(frame.Policy)
	require.Len(t, as, 1)
	as[0].isError6(t, 1, 1, gatewayIP6.String(), b)
	// No loopback.
	v := newWorld(t, ofSix, func(c *Config) { c.Loopback = false })
	b = udpTo(1000, gateway6(80), "")
	as = v.send(b)
	require.Len(t, as, 1)
	as[0].isError6(t, 1, 4, gatewayIP6.String(), b)
}

// number is the number of an address.
func (w *world) number(a string) uint32 { return w.net.numberOf(netip.MustParseAddrPort(a).Addr()) }

func TestRow61Forwards(t *testing.T) {
	pod, outside := pod6(t)
	enginetest.Must(t, pod.Addr("eth0", "2001:db8:1::55/64"), outside.Addr("eth0", "2001:db8:1::77/64"))
	w := newWorld(t, ofSix, inPod(t, pod))
	require.ErrorContains(t, w.net.AddForward(Forward{Proto: frame.ProtoTCP, Addr: localIP, Port: 1}), "IPv6")
	for _, proto := range []uint8{frame.ProtoTCP, frame.ProtoUDP} {
		require.NoError(t, w.net.AddForward(Forward{Proto: proto, Port: 8080, Guest: 80}))
	}
	for _, ns := range []*enginetest.NetNS{pod, outside} {
		enginetest.Eventually(t, patience, func() bool {
			out := outputOf(t, ns, "ip", "-6", "-o", "addr", "show", "dev", "eth0", "scope", "link")
			return strings.Contains(out, "fe80::") && !strings.Contains(out, "tentative")
		})
	}
	// Its own words for the link: net remembers names, but not whose they are.
	link, _, _ := strings.Cut(outputOf(t, outside, "ip", "-o", "link", "show", "dev", "eth0"), ":")
	_, linkLocal, _ := strings.Cut(outputOf(t, pod, "ip", "-6", "-o", "addr", "show", "dev", "eth0", "scope", "link"), "inet6 ")
	linkLocal, _, _ = strings.Cut(linkLocal, "/")
	for name, c := range map[string]struct {
		from *enginetest.NetNS
		to   string
		seen netip.Addr
	}{
		"outside":          {outside, podIP6, netip.MustParseAddr(outsideIP6)},
		"pod's loopback":   {pod, "::1", gatewayIP6},
		"pod to itself":    {pod, podIP6, gatewayIP6},
		"link-local":       {outside, linkLocal + "%" + link, gatewayIP6},
		"the second one's": {outside, "2001:db8:1::55", netip.MustParseAddr(outsideIP6)},
	} {
		t.Run("TCP "+name, func(t *testing.T) {
			conn := make(chan net.Conn, 1)
			go func() {
				var k net.Conn
				_ = c.from.Do(func() (err error) {
					k, err = net.DialTimeout("tcp6", net.JoinHostPort(c.to, "8080"), patience)
					return err
				})
				conn <- k
			}()
			a, ok := w.wait(patience, func(a *arrived) bool { return a.tcp != nil && a.tcp.SYN })
			require.True(t, ok)
			if c.seen != gatewayIP6 {
				assert.True(t, strings.HasPrefix(a.src().String(), "2001:db8:1::"), "%v", a.src())
			} else {
				assert.Equal(t, c.seen, a.src())
			}
			p := &peer{w: w, dst: a.from(), sport: 80, seq: 500, ack: a.tcp.Seq + 1, wnd: 65535}
			p.raw(tcpSYN|tcpACK, "", 2, 4, 5, 160)
			p.seq++
			p.say("welcome")
			k := <-conn
			require.NotNil(t, k)
			got := make([]byte, 7)
			require.NoError(t, k.SetDeadline(time.Now().Add(patience)))
			_, err := k.Read(got)
			require.NoError(t, err)
			assert.Equal(t, "welcome", string(got))
			_, err = k.Write([]byte("thanks"))
			require.NoError(t, err)
			assert.Equal(t, "thanks", p.hear(6))
			p.raw(tcpRST, "")
			k.Close()
		})
		if name == "link-local" {
			continue // the guest is not told how it could answer
		}
		t.Run("UDP "+name, func(t *testing.T) {
			k, err := c.from.Dial("udp6", net.JoinHostPort(c.to, "8080"), patience)
			require.NoError(t, err)
			defer k.Close()
			_, err = k.Write([]byte("hello"))
			require.NoError(t, err)
			a, ok := w.wait(patience, func(a *arrived) bool { return a.udp != nil })
			require.True(t, ok)
			if c.to == "::1" {
				assert.Equal(t, c.seen, a.src())
			}
			require.EqualValues(t, 80, a.udp.DstPort)
			w.send(udpTo(80, a.from(), "answer"))
			w.consumed()
			require.NoError(t, k.SetDeadline(time.Now().Add(patience)))
			got := make([]byte, 10)
			n, err := k.Read(got) // a connected socket: from the address that it has written to
			require.NoError(t, err)
			assert.Equal(t, "answer", string(got[:n]))
		})
	}
	require.NoError(t, w.net.RemoveForward(Forward{Proto: frame.ProtoTCP, Port: 8080, Guest: 80}))
	_, err := outside.Dial("tcp6", net.JoinHostPort(podIP6, "8080"), patience)
	assert.ErrorContains(t, err, "refused")
}

func outputOf(t *testing.T, ns *enginetest.NetNS, name string, args ...string) string {
	t.Helper()
	b, err := ns.Command(name, args...).Output()
	require.NoError(t, err)
	return string(b)
}

// A guest that sprays the world with packets takes a bounded number of numbers,
// and those of its flows stay.
func TestRow61Spray(t *testing.T) {
	w := newWorld(t, ofSix, workers(2), func(c *Config) { c.Policy.Rules = []Rule{{Prefix: netip.MustParsePrefix("2001:db8::/32")}} })
	l, at := listen6(t)
	p := call(w, at, 41000)
	c, err := l.Accept()
	require.NoError(t, err)
	defer c.Close()
	host, uat := hostUDP6(t)
	w.send(udpTo(40000, gateway6(uat.Port()), "mapping"))
	_, from := hears(t, host)
	for i := range 6 * sixFew / 32 {
		var bs [][]byte
		for k := range 32 {
			a := netip.MustParseAddr("2001:db8::").As16()
			binary.BigEndian.PutUint32(a[12:], uint32(32*i+k))
			bs = append(bs, udpTo(uint16(1000+k), netip.AddrPortFrom(netip.AddrFrom16(a), 1), "x"))
		}
		w.worker = i % 2
		w.send(bs...)
	}
	w.worker = 0
	w.send(udpTo(40000, gateway6(uat.Port()), "again"))
	assert.LessOrEqual(t, len(w.net.six.numbers), sixFew+64)
	p.say("still there")
	says(t, host, from, "pong")
	a, ok := w.wait(patience, func(a *arrived) bool { return a.udp != nil })
	require.True(t, ok)
	assert.Equal(t, gateway6(uat.Port()), a.from())
}

// RFC 8200, 4.5; RFC 5722; RFC 6946.
func TestRow61RFC8200Fragments(t *testing.T) {
	w := newWorld(t, ofSix)
	host, at := hostUDP6(t)
	whole := enginetest.UDP{Src: 40001, Dst: at.Port()}.Datagram(to(gatewayIP6), enginetest.Payload(3000, 1))
	fs := func(id uint32) [][]byte { return fragments6(to(gatewayIP6), id, frame.ProtoUDP, whole, 1448) }
	a, b := fs(1), fs(1<<16|1) // two packets whose identifications differ above
	require.Len(t, a, 3)
	w.send(b[2], a[1], a[0], b[0], b[1], a[2])
	for range 2 {
		got, _ := hears(t, host)
		require.Equal(t, string(whole[8:]), got)
	}
	// An overlap ends the packet.
	c := fs(3)
	bad := bytes.Clone(c[1])
	binary.BigEndian.PutUint16(bad[14+ip6Len+2:], 1440|1)
	w.send(c[0], bad, c[1], c[2])
	hearsNothing(t, host)
	// An atomic fragment is whole, though others of its identification wait.
	w.send(fs(4)[0])
	small := enginetest.UDP{Src: 40001, Dst: at.Port()}.Datagram(to(gatewayIP6), []byte("atomic"))
	w.send(toRouter.Frame(frame.TypeIPv6, to(gatewayIP6).Packet(44, append([]byte{17, 0, 0, 0, 0, 0, 0, 4}, small...))))
	got, _ := hears(t, host)
	require.Equal(t, "atomic", got)
	// What does not become whole in time is told, if its first fragment has come.
	w.pass(2 * time.Minute)
	e, ok := w.wait(patience, func(a *arrived) bool { return a.icmp6 != nil })
	require.True(t, ok)
	require.Equal(t, layers.CreateICMPv6TypeCode(3, 1), e.icmp6.TypeCode)
	q := e.payload[4:]
	require.EqualValues(t, 44, q[6])
	require.Equal(t, []byte{17, 0, 0, 1, 0, 0, 0, 4}, q[40:48], "the fragment header is quoted")
}

// The guest's own network may be narrower than we think (RFC 8201): its segments
// become smaller, but not for a forged error.
func TestRow61GuestTooBig(t *testing.T) {
	w := newWorld(t, ofSix)
	l, at := listen6(t)
	p := call(w, at, 41000)
	c, err := l.Accept()
	require.NoError(t, err)
	defer c.Close()
	i := w.net.workers[0].table.find(key{remote: hostOf(sixGate), rport: at.Port(), gport: 41000, proto: frame.ProtoTCP})
	require.NotEqual(t, none, i)
	fl := w.net.workers[0].table.at(i)
	_, err = c.Write(bytes.Repeat([]byte("x"), 1000))
	require.NoError(t, err)
	p.expect(nil, func(a *arrived) bool { return len(a.payload) == 1000 })
	quote := func(seq uint32) []byte {
		ip := enginetest.IP{Src: gatewayIP6, Dst: guestIP6}
		m := ip.Packet(frame.ProtoTCP, enginetest.TCP{Src: at.Port(), Dst: 41000, Seq: seq}.Segment(ip, nil))
		return enginetest.ICMPFrame(toRouter, to(gatewayIP6), enginetest.ICMP{Type: 2, Rest: 1281}, m)
	}
	was := fl.mss
	w.send(quote(p.ack + 5000))
	assert.Equal(t, was, fl.mss)
	w.send(quote(p.ack))
	w.consumed()
	assert.EqualValues(t, 1281-60, fl.mss)
}

func TestRow61Allocs(t *testing.T) {
	w := newWorld(t, ofSix)
	host, at := hostUDP6(t)
	b := udpTo(40000, gateway6(at.Port()), "12345678")
	w.send(b)
	_, from := hears(t, host)
	says(t, host, from, "x")
	w.next()
	buf := make([]byte, 100)
	batch, q := new(frame.Batch), w.net.Queue(0)
	n := testing.AllocsPerRun(200, func() {
		w.now += 100e3
		batch.Reset(w.now)
		f := batch.Next()
		f.SetBytes(b, nil, batch.Segs(1))
		w.net.Process(batch)
		_, _, _ = host.ReadFromUDPAddrPort(buf)
		_, _ = host.WriteToUDPAddrPort(buf[:50], from)
		batch.Reset(w.now)
		if q.Pull(batch) > 0 {
			q.Release(batch)
		}
	})
	assert.Zero(t, n)
	p := call(w, netip.AddrPort(func() netip.AddrPort { _, a := listen6(t); return a }()), 41000)
	seg := p.segment(p.seq, tcpACK, "")
	assert.Zero(t, testing.AllocsPerRun(200, func() {
		batch.Reset(w.now)
		f := batch.Next()
		f.SetBytes(seg, nil, batch.Segs(1))
		w.net.Process(batch)
	}))
}

// Workers give numbers, and take them back, while others work with theirs.
func TestRow61ConcurrentNumbers(t *testing.T) {
	const many = 3
	w := newWorld(t, ofSix, workers(many), func(c *Config) { c.Policy.Rules = []Rule{{Prefix: netip.MustParsePrefix("2001:db8::/32")}} })
	host, at := hostUDP6(t)
	stop := make(chan struct{})
	go func() { // every answer is from whom the guest has asked
		defer close(stop)
		buf := make([]byte, 100)
		for {
			n, from, err := host.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = host.WriteTo(buf[:n], from)
		}
	}()
	var done sync.WaitGroup
	for i := range many {
		done.Go(func() {
			b, q := &frame.Batch{Worker: i}, w.net.Queue(i)
			for round := range 5 * sixFew / 32 / many {
				now := w.now + int64(round)<<20
				b.Reset(now)
				for k := range 32 {
					a := netip.MustParseAddr("2001:db8::").As16()
					a[4] = byte(i)
					binary.BigEndian.PutUint32(a[12:], uint32(32*round+k))
					b.Next().SetBytes(udpTo(uint16(1000+k), netip.AddrPortFrom(netip.AddrFrom16(a), 1), "x"), nil, nil)
				}
				b.Next().SetBytes(udpTo(uint16(46000+round%6), gateway6(at.Port()), "x"), nil, nil)
				w.net.Process(b)
				b.Reset(now)
				if q.Pull(b) > 0 {
					for k := range b.Len() {
						if f := b.Frame(k); f.Proto == frame.ProtoUDP {
							f.L3 = frame.EthernetLen
							assert.Equal(t, gatewayIP6, netip.AddrFrom16(*f.SrcIP6()))
						}
					}
					q.Release(b)
				}
			}
		})
	}
	done.Wait()
	host.Close()
	<-stop
	w.net.sweep()
	assert.LessOrEqual(t, len(w.net.six.numbers), 2*sixFew)
	assert.Zero(t, w.net.six.elsewhere.Load())
}
