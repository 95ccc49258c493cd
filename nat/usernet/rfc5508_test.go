package usernet

import (
	"bytes"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

func typeCode(typ, code uint8) layers.ICMPv4TypeCode { return layers.CreateICMPv4TypeCode(typ, code) }

// isError wants an ICMP error about a packet of the guest's to dst.
func (a *arrived) isError(t testing.TB, typ, code uint8, from, dst netip.Addr) inner {
	t.Helper()
	require.NotNil(t, a.icmp, "%x", a.data)
	assert.Equal(t, typeCode(typ, code), a.icmp.TypeCode)
	assert.Equal(t, from.String(), a.src().String())
	q := a.quoted(t)
	assert.Equal(t, guestIP, q.src)
	assert.Equal(t, dst, q.dst.Addr())
	return q
}

// isReply wants an echo reply.
func (a *arrived) isReply(t testing.TB, from netip.Addr, id, seq uint16, payload string) {
	t.Helper()
	require.NotNil(t, a.icmp, "%x", a.data)
	assert.Equal(t, typeCode(0, 0), a.icmp.TypeCode)
	assert.Equal(t, from, a.src())
	assert.Equal(t, []uint16{id, seq}, []uint16{a.icmp.Id, a.icmp.Seq})
	assert.Equal(t, payload, string(a.payload))
}

func TestRFC5508_REQ1_EchoOutAndBack(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	for seq, payload := range []string{"", "x", "payload", strings.Repeat("y", 1472)} {
		p.send(echoTo(outsideIP, 77, uint16(seq), payload))
		p.consumed()
		a := p.next()
		a.isReply(t, outsideIP, 77, uint16(seq), payload)
		assert.EqualValues(t, 63, a.ip.TTL)
	}
	assert.Equal(t, 1, p.net.Stats().EchoOpen)
	// Sent in fragments, as it comes back.
	long := strings.Repeat("z", 5000)
	p.send(inFragments(echoTo(outsideIP, 77, 9, long), 3, 1480)...)
	as := p.fragments(5008)
	var whole []byte
	for _, a := range as {
		whole = append(whole, a.payload...)
	}
	assert.Equal(t, enginetest.EchoReply(77, 9).Message(enginetest.IP{Src: outsideIP}, []byte(long)), whole)
}

// TestRFC5508_REQ1a_QueryIDMapping: one id of the host's whoever is asked, and
// two guests with the same id get their own replies.
func TestRFC5508_REQ1a_QueryIDMapping(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	q := newWorld(t, inPod(t, p.Pod))
	enginetest.Must(t, p.Outside.Addr("veth0", "10.244.1.2/24"))
	second := netip.MustParseAddr("10.244.1.2")
	p.send(echoTo(outsideIP, 1, 1, "a"), echoTo(second, 1, 2, "b"))
	q.send(echoTo(outsideIP, 1, 3, "c"))
	a := p.next()
	a.isReply(t, outsideIP, 1, 1, "a")
	a = p.next()
	a.isReply(t, second, 1, 2, "b")
	a = q.next()
	a.isReply(t, outsideIP, 1, 3, "c")
	assert.Equal(t, 1, p.net.Stats().EchoOpen)
	p.nothing()
	q.nothing()
}

func TestRFC5508_REQ2_Timer(t *testing.T) {
	for _, c := range []struct {
		name          string
		set           time.Duration
		alive, beyond time.Duration
	}{
		{"default", 0, 59 * time.Second, 4 * time.Second},
		{"floor", time.Second, 59 * time.Second, 4 * time.Second},
		{"2a configured", 3 * time.Minute, 179 * time.Second, 4 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPod(t, enginetest.WorldOptions{}, func(k *Config) { k.Timeouts.Echo = c.set })
			for range 2 {
				p.send(echoTo(outsideIP, 2, 1, "x")) // refreshes it
				p.consumed()
				p.next()
				p.pass(c.alive)
				p.pull(0)
				require.Equal(t, 1, p.net.Stats().EchoOpen)
			}
			p.pass(c.beyond)
			p.pull(0)
			require.Zero(t, p.net.Stats().EchoOpen)
			require.Zero(t, p.net.Stats().Sockets)
		})
	}
}

func TestRFC5508_REQ3_Malformed(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	host := listen(t, p.Outside, "udp4", enginetest.OutsideIP+":0")
	dst := netip.AddrPortFrom(outsideIP, portOf(host))
	from := netip.AddrPortFrom(podIP, p.external(5100, host, dst).Port())
	forger := listen(t, p.Outside, "ip4:icmp", enginetest.OutsideIP)
	good := enginetest.ICMP{Type: 3, Code: 1}
	quoted := quoteUDP(from, dst, "payload")

	// From outside: the host's kernel judges the checksum.
	bad := good.Message(enginetest.IP{Src: podIP}, quoted)
	bad[len(bad)-1] ^= 1
	_, err := forger.WriteTo(bad, &net.IPAddr{IP: podIP.AsSlice()})
	require.NoError(t, err)
	p.nothing()
	// 3b: options in the packet inside.
	opt := enginetest.IP{Src: podIP, Dst: outsideIP, Options: []byte{1, 1, 1, 0}}
	forge(t, forger, podIP, good, opt.Packet(frame.ProtoUDP, enginetest.UDP{Src: from.Port(), Dst: dst.Port()}.Datagram(opt, nil)))
	a := p.next()
	a.isError(t, 3, 1, outsideIP, outsideIP)
	// 3c: its transport checksum is nobody's business.
	wrong := bytes.Clone(quoted)
	wrong[26] ^= 0x55
	forge(t, forger, podIP, good, wrong)
	a = p.next()
	a.isError(t, 3, 1, outsideIP, outsideIP)

	// From the guest.
	errorTo := func(i enginetest.ICMP, data []byte) []byte {
		return enginetest.ICMPFrame(toRouter, to(outsideIP), i, data)
	}
	own := quoteUDPToGuest(dst, 5100)
	b := errorTo(good, own)
	b[len(b)-1] ^= 1
	p.send(b)
	p.dropped(frame.BadChecksum)
	ipSum := bytes.Clone(own)
	ipSum[10] ^= 1
	p.send(errorTo(good, ipSum))
	p.dropped(frame.BadChecksum) // 3a
	for _, n := range []int{0, 19, 27} {
		p.send(errorTo(good, own[:n]))
		p.dropped(frame.BadTransport)
	}
	longIHL := bytes.Clone(own)
	longIHL[0] = 0x4f
	p.send(errorTo(good, longIHL))
	p.dropped(frame.BadTransport)
	assert.Equal(t, 1, p.mappings())
}

// TestRFC5508_REQ4_ErrorFromOutside: without a mapping nothing passes; with one
// the packet inside is as the guest has sent it.
func TestRFC5508_REQ4_ErrorFromOutside(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	host := listen(t, p.Outside, "udp4", enginetest.OutsideIP+":0")
	dst := netip.AddrPortFrom(outsideIP, portOf(host))
	taken := listen(t, p.Pod, "udp4", "0.0.0.0:0") // so that the port is another outside
	from := netip.AddrPortFrom(podIP, p.external(portOf(taken), host, dst).Port())
	require.NotEqual(t, portOf(taken), from.Port())
	forger := listen(t, p.Outside, "ip4:icmp", enginetest.OutsideIP)
	forge(t, forger, podIP, enginetest.ICMP{Type: 3, Code: 1}, quoteUDP(netip.AddrPortFrom(podIP, from.Port()+1), dst, "payload"))
	p.nothing()
	for _, c := range [][2]uint8{{3, 0}, {3, 1}, {3, 3}, {3, 10}, {11, 0}, {12, 0}} {
		forge(t, forger, podIP, enginetest.ICMP{Type: c[0], Code: c[1], Rest: 7 << 24}, quoteUDP(from, dst, "what it said"))
		a := p.next()
		q := a.isError(t, c[0], c[1], outsideIP, outsideIP) // b, c
		assert.Equal(t, portOf(taken), q.sport, "a")
		assert.Equal(t, dst, q.dst, "a")
		assert.Equal(t, "what it said", string(q.payload))
		if c[0] == 12 {
			assert.EqualValues(t, 7, a.data[38], "the pointer")
		}
	}
	// Redirects and source quench are not passed on (10c).
	forge(t, forger, podIP, enginetest.ICMP{Type: 4}, quoteUDP(from, dst, "x"))
	forge(t, forger, podIP, enginetest.ICMP{Type: 5, Code: 1}, quoteUDP(from, dst, "x"))
	p.nothing()
}

// TestRFC5508_REQ4_ErrorAboutEcho: of routers and hosts, about an id that the
// kernel has changed.
func TestRFC5508_REQ4_ErrorAboutEcho(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	q := newWorld(t, inPod(t, p.Pod))
	p.send(echoTo(outsideIP, 5, 1, "takes the id"))
	p.next()
	q.send(echoTo(nowhere, 5, 2, "lost"))
	a := q.next()
	in := a.isError(t, 3, 0, outsideIP, nowhere)
	assert.EqualValues(t, 5, in.dst.Port(), "the id")
	assert.Equal(t, "lost", string(in.payload))
	msg := a.payload[20:]
	assert.Zero(t, ^frame.Fold(frame.Sum(msg, 0)), "the checksum of the message inside")
	assert.Equal(t, 1, q.net.Stats().EchoOpen, "REQ-6")
}

// TestRFC5508_REQ5_ErrorFromInside: nothing can be sent for the guest, and
// nothing happens to what the error is about.
func TestRFC5508_REQ5_ErrorFromInside(t *testing.T) {
	w := newWorld(t)
	host, at := hostUDP(t)
	from := w.external(5101, host, gateway(at.Port()))
	e := enginetest.ICMP{Type: 3, Code: 3}
	send := func(dst netip.Addr, data []byte, want frame.DropReason) {
		t.Helper()
		require.Empty(t, w.send(enginetest.ICMPFrame(toRouter, to(dst), e, data)))
		w.dropped(want)
	}
	send(gatewayIP, quoteUDPToGuest(gateway(at.Port()), 5101), frame.NotCarried)
	send(gatewayIP, quoteUDPToGuest(gateway(at.Port()), 5999), frame.NoFlow)
	send(outsideIP, quoteUDPToGuest(gateway(at.Port()), 5101), frame.NoFlow)
	send(gatewayIP, quoteUDP(gateway(at.Port()), netip.AddrPortFrom(outsideIP, 5101), "x"), frame.NoFlow)
	w.answers(host, from, 5101)
}

func TestRFC5508_REQ6_ErrorsRefreshNothing(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	p.send(echoTo(nowhere, 6, 1, "x"))
	a := p.next()
	a.isError(t, 3, 0, outsideIP, nowhere)
	p.pass(59 * time.Second)
	p.pull(0)
	require.Equal(t, 1, p.net.Stats().EchoOpen)
	k := p.net.workers[0]
	i := k.table.find(key{gport: 6, proto: frame.ProtoICMP})
	seen := k.table.at(i).seen
	forger := listen(t, p.Outside, "ip4:icmp", enginetest.OutsideIP)
	ip := enginetest.IP{Src: podIP, Dst: nowhere}
	forge(t, forger, podIP, enginetest.ICMP{Type: 3, Code: 1}, ip.Packet(frame.ProtoICMP, enginetest.Echo(6, 1).Message(ip, nil)))
	a = p.next()
	a.isError(t, 3, 1, outsideIP, nowhere)
	assert.Equal(t, seen, k.table.at(i).seen)
	p.pass(4 * time.Second)
	p.pull(0)
	assert.Zero(t, p.net.Stats().EchoOpen)
}

// TestRFC5508_REQ7_HairpinnedError: the host answers for a port of its own that
// nobody has, by its own address.
func TestRFC5508_REQ7_HairpinnedError(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	p.send(udpTo(5102, netip.AddrPortFrom(podIP, 9), "x"))
	a := p.next()
	q := a.isError(t, 3, 3, podIP, podIP)
	assert.EqualValues(t, 5102, q.sport)
	p.send(echoTo(podIP, 8, 1, "to the pod"))
	a = p.next()
	a.isReply(t, podIP, 8, 1, "to the pod")
}

func TestRFC5508_REQ8_Policy(t *testing.T) {
	rule, err := ParseRule("deny=10.244.0.0/16")
	require.NoError(t, err)
	p := newPod(t, enginetest.WorldOptions{}, func(c *Config) { c.Policy.Rules = []Rule{rule} })
	for _, b := range [][]byte{udpTo(5103, netip.AddrPortFrom(outsideIP, 9), "x"), echoTo(outsideIP, 3, 1, "x")} {
		as := p.send(b)
		p.dropped(frame.Policy)
		require.Len(t, as, 1)
		as[0].isError(t, 3, 13, gatewayIP, outsideIP)
	}
	assert.EqualValues(t, 2, p.net.Stats().PolicyDenied)
	assert.Zero(t, p.net.Stats().Sockets)
}

// TestRFC5508_REQ8_PolicyOfOpenMappings: each new destination of a mapping is
// asked about, also those that the policy has allowed before.
func TestRFC5508_REQ8_PolicyOfOpenMappings(t *testing.T) {
	host, at := hostUDP(t)
	other, at2 := hostUDP(t)
	w := newWorld(t)
	w.external(5104, host, gateway(at.Port()))
	deny := Rule{Proto: frame.ProtoUDP, First: at2.Port(), Last: at2.Port()}
	w.net.SetPolicy(Policy{Rules: []Rule{deny}})
	require.Len(t, w.send(udpTo(5104, gateway(at2.Port()), "x")), 1)
	w.dropped(frame.Policy)
	w.external(5104, host, gateway(at.Port()))
	hearsNothing(t, other)
}

func TestRFC5508_REQ8_PolicyOfOpenSessions(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	p.send(echoTo(podIP, 4, 1, "x"))
	p.next()
	p.net.SetPolicy(Policy{Rules: []Rule{{Prefix: netip.PrefixFrom(outsideIP, 32)}}})
	require.Len(t, p.send(echoTo(outsideIP, 4, 2, "x")), 1)
	p.dropped(frame.Policy)
	p.send(echoTo(podIP, 4, 3, "x"))
	a := p.next()
	a.isReply(t, podIP, 4, 3, "x")
}

func TestRFC5508_REQ10_TimeExceeded(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	enginetest.Must(t, p.Outside.Route("198.51.100.0/24", enginetest.PodIP))
	beyond := netip.MustParseAddr("198.51.100.1")
	for _, c := range []struct {
		ttl       uint8
		dst, from netip.Addr
		typ       uint8
	}{{2, nowhere, outsideIP, 3}, {1, beyond, gatewayIP, 11}, {2, beyond, outsideIP, 11}} {
		ip := to(c.dst)
		ip.TTL = c.ttl
		for _, b := range [][]byte{
			enginetest.UDPFrame(toRouter, ip, enginetest.UDP{Src: 5105, Dst: 33434}, []byte("trace")),
			enginetest.ICMPFrame(toRouter, ip, enginetest.Echo(9, 1), []byte("trace")),
		} {
			t.Logf("protocol %d to %s, TTL %d", b[23], c.dst, c.ttl)
			as := p.send(b)
			if c.ttl > 1 {
				p.consumed()
				as = append(as, p.next())
			} else {
				p.dropped(frame.TTLExpired)
			}
			require.Len(t, as, 1)
			q := as[0].isError(t, c.typ, 0, c.from, c.dst)
			assert.Equal(t, "trace", string(q.payload))
		}
	}
}

func TestRFC5508_REQ10d_DSFieldCopied(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	ip := to(nowhere)
	ip.TTL, ip.TOS = 1, 0xbb
	as := p.send(enginetest.UDPFrame(toRouter, ip, enginetest.UDP{Src: 5106, Dst: 9}, nil))
	require.Len(t, as, 1)
	assert.EqualValues(t, 0xb8, as[0].ip.TOS)
}

func TestRFC5508_REQ10e_NoErrorAbout(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Policy.Deny = true })
	ip := to(outsideIP)
	ip.Frag = 100
	group := to(netip.MustParseAddr("224.0.0.251"))
	directed := to(netip.MustParseAddr("10.0.2.255"))
	u := enginetest.UDP{Src: 5107, Dst: 9}
	exp := to(outsideIP)
	exp.TTL = 1
	for name, b := range map[string][]byte{
		"fragment":           enginetest.UDPFrame(toRouter, ip, u, nil),
		"multicast":          enginetest.UDPFrame(toRouter, group, u, nil),
		"multicast, mDNS":    enginetest.UDPFrame(enginetest.Eth{Dst: frame.MAC{1, 0, 0x5e, 0, 0, 0xfb}, Src: guestMAC}, group, u, nil),
		"directed broadcast": enginetest.UDPFrame(toRouter, directed, u, nil),
		"broadcast":          enginetest.UDPFrame(toRouter, to(netip.MustParseAddr("255.255.255.255")), u, nil),
		"error":              enginetest.ICMPFrame(toRouter, exp, enginetest.ICMP{Type: 3, Code: 3}, quoteUDPToGuest(netip.AddrPortFrom(outsideIP, 9), 1)),
		"echo reply":         enginetest.ICMPFrame(toRouter, exp, enginetest.EchoReply(1, 1), nil),
	} {
		assert.Empty(t, w.send(b), name)
		assert.NotEqual(t, frame.ReasonNone, w.frames[0].Reason|frame.DropReason(w.frames[0].Out), name)
	}
	assert.Len(t, w.send(enginetest.UDPFrame(toRouter, to(outsideIP), u, nil)), 1)
}

func TestRFC5508_REQ10f_RateLimit(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Policy.Deny = true })
	var flood [][]byte
	for range 100 {
		flood = append(flood, udpTo(5108, netip.AddrPortFrom(outsideIP, 9), "x"))
	}
	assert.Len(t, w.send(flood...), errorBurst)
	assert.Empty(t, w.send(flood[0]))
	assert.EqualValues(t, 100-errorBurst+1, w.net.Stats().ErrorsLimited)
	w.pass(10 * time.Millisecond)
	assert.Len(t, w.send(flood...), 10)
}

// TestRFC5508_REQ11_OtherTypes: what sockets cannot carry is dropped, in
// silence; that is our choice.
func TestRFC5508_REQ11_OtherTypes(t *testing.T) {
	w := newWorld(t)
	for _, typ := range []uint8{0, 4, 5, 9, 10, 13, 14, 15, 16, 17, 18, 42, 255} {
		for _, dst := range []netip.Addr{outsideIP, gatewayIP} {
			assert.Empty(t, w.send(enginetest.ICMPFrame(toRouter, to(dst), enginetest.ICMP{Type: typ}, make([]byte, 12))))
			w.dropped(frame.NotCarried)
		}
	}
}

// TestGatewayAnswersEcho: the gateway's own address, and those of services,
// answer whatever the host allows.
func TestGatewayAnswersEcho(t *testing.T) {
	w := newWorld(t, service("10.0.2.3:53", "127.0.0.1:5353"), func(c *Config) { c.Ping, c.Policy.Deny = false, true })
	ip := to(gatewayIP)
	ip.TTL, ip.TOS = 1, 0x28
	for _, n := range []int{0, 1, 56, 94, 95, 1472} {
		p := string(enginetest.Payload(n, 1))
		for _, dst := range []netip.Addr{gatewayIP, dnsIP} {
			ip.Dst = dst
			ip.TTL = 64
			as := w.sendAll(sent{data: enginetest.ICMPFrame(toRouter, ip, enginetest.Echo(3, 4), []byte(p)), cut: []int{51}})
			w.consumed()
			require.Len(t, as, 1)
			as[0].isReply(t, dst, 3, 4, p)
			assert.EqualValues(t, 0x28, as[0].ip.TOS)
		}
	}
	for _, n := range []int{1473, 8000, 65507} {
		p := enginetest.Payload(n, 1)
		as := w.send(inFragments(echoTo(gatewayIP, 3, 4, string(p)), uint16(n), 1480)...)
		var whole []byte
		for _, a := range as {
			assert.EqualValues(t, len(whole)/8, a.ip.FragOffset)
			whole = append(whole, a.payload...)
		}
		require.Equal(t, enginetest.EchoReply(3, 4).Message(enginetest.IP{Src: gatewayIP}, p), whole, "%d bytes", n)
	}
	// Two in a batch: the memory of the first is not used again before its end.
	first := strings.Repeat("first", 2000)
	as := w.send(append(inFragments(echoTo(gatewayIP, 3, 7, first), 1, 1480), inFragments(echoTo(gatewayIP, 3, 8, strings.Repeat("second", 2000)), 2, 1480)...)...)
	var whole []byte
	for _, a := range as[:len(as)/2] {
		whole = append(whole, a.payload...)
	}
	require.Equal(t, first, string(whole[8:min(len(whole), 8+len(first))]))
	// One that has options, a longer header, and one for nobody.
	opt := to(gatewayIP)
	opt.Options = make([]byte, 40)
	as = w.send(enginetest.ICMPFrame(toRouter, opt, enginetest.Echo(3, 5), []byte("options")))
	require.Len(t, as, 1)
	as[0].isReply(t, gatewayIP, 3, 5, "options")
	as = w.send(echoTo(netip.MustParseAddr("10.0.2.77"), 3, 6, ""))
	require.Len(t, as, 1)
	as[0].isError(t, 3, 1, gatewayIP, netip.MustParseAddr("10.0.2.77"))
	assert.Zero(t, w.net.Stats().EchoOpen)
}

// TestPingOff: nothing leaves, and the guest is told.
func TestPingOff(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Ping = false })
	as := w.send(echoTo(outsideIP, 3, 1, "x"))
	require.Len(t, as, 1)
	as[0].isError(t, 3, 13, gatewayIP, outsideIP)
	w.dropped(frame.Policy)
	assert.EqualValues(t, 1, w.net.Stats().PolicyDenied)
}

// TestNoPingSockets: where the kernel refuses them the log says so, once.
func TestNoPingSockets(t *testing.T) {
	e := enginetest.NewNetNS(t)
	enginetest.Must(t, e.Sysctl("net/ipv4/ping_group_range", "1 0"))
	var log bytes.Buffer
	w := newWorld(t, inPod(t, e), func(c *Config) { c.Log = slog.New(slog.NewTextHandler(&log, nil)) })
	for range 3 {
		as := w.send(echoTo(outsideIP, 3, 1, "x"))
		require.Len(t, as, 1)
		as[0].isError(t, 3, 13, gatewayIP, outsideIP)
		w.dropped(frame.Policy)
	}
	assert.Equal(t, 1, strings.Count(log.String(), "net.ipv4.ping_group_range"), log.String())
	assert.Zero(t, w.net.Stats().Sockets)
}
