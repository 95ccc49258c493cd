package usernet

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"runtime/debug"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/net/ipv4"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// TestServices: whoever answers is shown as whom the guest has asked, also where
// several names lead to one place.
func TestServices(t *testing.T) {
	host, at := hostUDP(t)
	other, at2 := hostUDP(t)
	w := newWorld(t, service("10.0.2.3:53", at.String()), service("10.0.2.2:53", at.String()), service("10.0.2.3:123", at2.String()))
	names := []netip.AddrPort{netip.AddrPortFrom(dnsIP, 53), gateway(53), gateway(at.Port())}
	var from netip.AddrPort
	for range 2 {
		for _, name := range names {
			from = w.external(6100, host, name)
			assert.Equal(t, name, w.answers(host, from, 6100).from())
			// While another is asked, too: the last name that led there counts.
			w.external(6100, other, netip.MustParseAddrPort("10.0.2.3:123"))
			assert.Equal(t, name, w.answers(host, from, 6100).from())
			assert.Equal(t, "10.0.2.3:123", w.answers(other, from, 6100).from().String())
		}
	}
	// Unasked it is the first name.
	from = w.external(6101, other, netip.MustParseAddrPort("10.0.2.3:123"))
	assert.Equal(t, names[0], w.answers(host, from, 6101).from())
	// Others of the host's loopback are behind the gateway.
	stranger, sat := hostUDP(t)
	assert.Equal(t, gateway(sat.Port()), w.answers(stranger, from, 6101).from())
	odd, oat := hostUDPAt(t, "127.0.0.9:0")
	assert.Equal(t, gateway(oat.Port()), w.answers(odd, from, 6101).from())

	require.Len(t, w.send(udpTo(6100, netip.MustParseAddrPort("10.0.2.3:54"), "x")), 1)
	w.dropped(frame.NoRoute)
	k := w.net.workers[0]
	assert.Equal(t, k.table.count-w.mappings(), k.udp.peers)
	w.pass(time.Hour)
	w.pull(0)
	assert.Zero(t, k.table.count)
	assert.Zero(t, k.udp.peers)
}

// TestServiceErrors: what is said of a service's target is said of the service.
func TestServiceErrors(t *testing.T) {
	host, at := hostUDP(t)
	host.Close()
	w := newWorld(t, service("10.0.2.3:53", at.String()))
	w.send(udpTo(6102, netip.AddrPortFrom(dnsIP, 53), "query"))
	a := w.next()
	q := a.isError(t, 3, 3, dnsIP, dnsIP)
	assert.EqualValues(t, 53, q.dst.Port())
}

func TestNoLoopback(t *testing.T) {
	host, at := hostUDP(t)
	w := newWorld(t, service("10.0.2.3:53", at.String()), func(c *Config) { c.Loopback = false })
	as := w.send(udpTo(6103, gateway(at.Port()), "x"))
	w.dropped(frame.NoRoute)
	require.Len(t, as, 1)
	as[0].isError(t, 3, 3, gatewayIP, gatewayIP)
	as = w.send(udpTo(6103, netip.MustParseAddrPort("127.0.0.1:53"), "x"))
	require.Empty(t, as)
	w.dropped(frame.NotCarried)
	from := w.external(6103, host, netip.AddrPortFrom(dnsIP, 53))
	w.answers(host, from, 6103)
	stranger, _ := hostUDP(t)
	says(t, stranger, from, "from loopback")
	w.nothing()
	assert.EqualValues(t, 1, w.net.Stats().Filtered)
}

// TestForwardUDP: clients reach the guest by a port of the host's, and are
// answered from there.
func TestForwardUDP(t *testing.T) {
	for _, asGateway := range []bool{false, true} {
		for _, deny := range []bool{false, true} {
			t.Run(fmt.Sprintf("as gateway %v, deny %v", asGateway, deny), func(t *testing.T) {
				p := newPod(t, enginetest.WorldOptions{}, func(c *Config) {
					c.GatewaySource, c.Policy.Deny, c.Filter, c.Loopback = asGateway, deny, FilterPort, false
				})
				require.NoError(t, p.net.AddForward(Forward{Proto: frame.ProtoUDP, Port: 8053, Guest: 53}))
				at := netip.AddrPortFrom(podIP, 8053)
				clients := []net.PacketConn{
					listen(t, p.Outside, "udp4", enginetest.OutsideIP+":5555"),
					listen(t, p.Outside, "udp4", enginetest.OutsideIP+":5556"),
					listen(t, p.Pod, "udp4", "127.0.0.1:5555"),
				}
				for round := range 2 {
					for i, c := range clients {
						dst := at
						if i == 2 {
							dst = netip.MustParseAddrPort("127.0.0.1:8053")
						}
						says(t, c, dst, "query")
						a := p.next()
						require.EqualValues(t, 53, a.udp.DstPort)
						if asGateway || i == 2 {
							assert.Equal(t, gatewayIP, a.src())
						} else {
							assert.Equal(t, c.LocalAddr().String(), a.from().String())
						}
						p.send(udpTo(53, a.from(), fmt.Sprint("answer ", round, i)))
						p.consumed()
						got, by := hears(t, c)
						assert.Equal(t, fmt.Sprint("answer ", round, i), got)
						assert.EqualValues(t, 8053, by.Port())
					}
				}
				// A policy that denies is for what nobody has asked for.
				as := p.send(udpTo(53, netip.AddrPortFrom(outsideIP, 9999), "unasked"))
				if deny {
					require.Len(t, as, 1)
					as[0].isError(t, 3, 13, gatewayIP, outsideIP)
				} else {
					p.consumed()
				}
				p.pass(time.Hour)
				p.pull(0)
				assert.Equal(t, 1, p.mappings(), "a forward does not end")
				require.NoError(t, p.net.RemoveForward(Forward{Proto: frame.ProtoUDP, Port: 8053, Guest: 53}))
				assert.Zero(t, p.mappings())
			})
		}
	}
}

// TestForwardTakesMapping: a forward of a port that the guest uses already goes
// on with the new socket, and its options are set anew.
func TestForwardTakesMapping(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	host := listen(t, p.Outside, "udp4", enginetest.OutsideIP+":0")
	dst := netip.AddrPortFrom(outsideIP, portOf(host))
	assert.EqualValues(t, 53, p.external(53, host, dst).Port())
	require.NoError(t, p.net.AddForward(Forward{Proto: frame.ProtoUDP, Port: 8053, Guest: 53}))
	from := p.external(53, host, dst)
	assert.EqualValues(t, 8053, from.Port())
	assert.EqualValues(t, 63, p.net.workers[0].table.at(0).ttl())
	ttl, errno := getInt(p.net.workers[0].table.at(0).fd, unix.SOL_IP, unix.IP_TTL)
	assert.Zero(t, errno)
	assert.EqualValues(t, 63, ttl)
	p.answers(host, from, 53)
	assert.Equal(t, 1, p.net.Stats().Sockets)
}

// TestTTLAndTOS are carried both ways, one hop less.
func TestTTLAndTOS(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	host := listen(t, p.Outside, "udp4", enginetest.OutsideIP+":0")
	c := ipv4.NewPacketConn(host)
	require.NoError(t, c.SetControlMessage(ipv4.FlagTTL, true))
	rc, err := host.(*net.UDPConn).SyscallConn()
	require.NoError(t, err)
	require.NoError(t, rc.Control(func(fd uintptr) {
		require.NoError(t, unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_RECVTOS, 1))
	}))
	hear := func() (ttl, tos uint8, from net.Addr) {
		t.Helper()
		b, oob := make([]byte, 10), make([]byte, 100)
		require.NoError(t, host.SetReadDeadline(time.Now().Add(patience)))
		_, n, _, by, err := host.(*net.UDPConn).ReadMsgUDP(b, oob)
		require.NoError(t, err)
		for rest := oob[:n]; ; {
			_, typ, d, more, ok := nextControl(rest)
			switch {
			case !ok:
				return ttl, tos, by
			case typ == unix.IP_TTL:
				ttl = d[0]
			case typ == unix.IP_TOS:
				tos = d[0]
			}
			rest = more
		}
	}
	cases := []struct{ ttl, tos uint8 }{{64, 0}, {64, 0xb8}, {64, 0xb8}, {7, 0xb9}, {255, 2}, {64, 0}}
	var frames [][]byte
	for _, x := range cases {
		ip := to(outsideIP)
		ip.TTL, ip.TOS = x.ttl, x.tos
		frames = append(frames, enginetest.UDPFrame(toRouter, ip, enginetest.UDP{Src: 6104, Dst: portOf(host)}, []byte("x")))
	}
	p.send(frames...)
	p.consumed()
	for _, x := range cases {
		ttl, tos, from := hear()
		assert.Equal(t, []uint8{x.ttl - 1, x.tos}, []uint8{ttl, tos})
		require.NoError(t, c.SetTTL(int(x.ttl)))
		require.NoError(t, c.SetTOS(int(x.tos)))
		_, err = host.WriteTo([]byte("y"), from)
		require.NoError(t, err)
		a := p.next()
		assert.Equal(t, []uint8{x.ttl - 1, x.tos}, []uint8{a.ip.TTL, a.ip.TOS})
	}
}

// TestRunsToGuest: what the kernel has put together comes as one USO frame, or
// cut where the guest's MTU does not take its datagrams.
func TestRunsToGuest(t *testing.T) {
	for _, size := range []int{100, 1000, 1472, 1473, 4000} {
		w := newWorld(t)
		host, at := hostUDP(t)
		from := w.external(6105, host, gateway(at.Port()))
		rc, err := host.SyscallConn()
		require.NoError(t, err)
		require.NoError(t, rc.Control(func(fd uintptr) {
			require.NoError(t, unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, size))
		}))
		p := string(enginetest.Payload(min(size*10+size/2, 40000), 7))
		says(t, host, from, p)
		var got []byte
		for len(got) < len(p) {
			a := w.next()
			if size+28 > 1500 {
				if a.ip.FragOffset == 0 && a.udp == nil {
					a.payload = a.payload[8:]
				}
				got = append(got, a.payload...)
				continue
			}
			assert.EqualValues(t, frame.GSOUDPL4, a.off.GSO)
			assert.EqualValues(t, size, a.off.GSOSize)
			assert.Len(t, a.payload, min(size, len(p)-len(got)))
			got = append(got, a.payload...)
		}
		assert.Equal(t, p, string(got), "size %d", size)
	}
}

// TestFragmentsOfManyDatagrams: what has no room in one batch comes in the next.
func TestFragmentsOfManyDatagrams(t *testing.T) {
	const many, size = 4, 20000 // as many as a socket holds by default, in 37 fragments each
	w := newWorld(t, withMTU(576))
	host, at := hostUDP(t)
	from := w.external(6106, host, gateway(at.Port()))
	for i := range many {
		says(t, host, from, strings.Repeat(fmt.Sprint(i), size))
	}
	first := w.pull(0)
	require.Len(t, first, 3*37)
	w.backlog = first
	for i := range many {
		var whole []byte
		for _, a := range w.fragments(size + 8) {
			whole = append(whole, a.payload...)
		}
		require.Equal(t, strings.Repeat(fmt.Sprint(i), size), string(whole[8:]))
	}
	w.nothing()
}

// TestRFC6888_REQ11_UDPAndEcho: what is beyond the limits is refused, and nothing
// is evicted.
func TestRFC6888_REQ11_UDPAndEcho(t *testing.T) {
	for _, c := range []struct {
		name   string
		limit  func(*Config)
		reason frame.DropReason
	}{
		{"table", func(c *Config) { c.MaxFlows = 3 }, frame.TableFull},
		{"sockets", func(c *Config) { c.MaxSockets = 3 }, frame.NoPort},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, c.limit)
			host, at := hostUDP(t)
			var froms []netip.AddrPort
			for i := range uint16(3) {
				froms = append(froms, w.external(6200+i, host, gateway(at.Port())))
			}
			for _, b := range [][]byte{udpTo(6203, gateway(at.Port()), "x"), echoTo(outsideIP, 1, 1, "x")} {
				as := w.send(b)
				w.dropped(c.reason)
				require.Len(t, as, 1)
				dst := gatewayIP
				if b[23] == 1 {
					dst = outsideIP
				}
				as[0].isError(t, 3, 1, gatewayIP, dst)
			}
			for i, from := range froms {
				w.answers(host, from, uint16(6200+i))
			}
			s := w.net.Stats()
			assert.EqualValues(t, 2, s.TableFull+s.NoSocket)
			w.pass(time.Hour)
			w.pull(0)
			w.external(6203, host, gateway(at.Port()))
		})
	}
}

// TestNoRoute: the host knows no way.
func TestNoRoute(t *testing.T) {
	ns := enginetest.NewNetNS(t)
	enginetest.Must(t, ns.Sysctl("net/ipv4/ping_group_range", "0 2147483647"))
	w := newWorld(t, inPod(t, ns))
	for _, b := range [][]byte{udpTo(6300, netip.AddrPortFrom(outsideIP, 9), "x"), echoTo(outsideIP, 1, 1, "x")} {
		as := w.send(b)
		w.dropped(frame.NoRoute)
		require.Len(t, as, 1)
		as[0].isError(t, 3, 0, gatewayIP, outsideIP)
	}
}

// TestUnreachableHost: the last router's word, which is the host itself.
func TestUnreachableHost(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	gone := netip.MustParseAddr("10.244.1.99")
	p.send(udpTo(6301, netip.AddrPortFrom(gone, 9), "x"))
	p.consumed()
	a := p.next()
	a.isError(t, 3, 1, podIP, gone)
}

// TestMappingOfAnotherWorker: the guest sends from another queue.
func TestMappingOfAnotherWorker(t *testing.T) {
	w := newWorld(t, workers(3))
	host, at := hostUDP(t)
	from := w.external(6400, host, gateway(at.Port()))
	for i := range 40 {
		w.worker, w.queue = i%3, uint16(i%3)
		require.Equal(t, from, w.external(6400, host, gateway(at.Port())))
		a := w.answers(host, from, 6400)
		require.EqualValues(t, w.queue, a.queue)
	}
	for range 20 {
		w.worker = 2
		require.Equal(t, from, w.external(6400, host, gateway(at.Port())))
		w.answers(host, from, 6400)
	}
	assert.Equal(t, 1, w.mappings())
	assert.Equal(t, 1, w.net.workers[2].table.count, "it has followed")
}

// TestMemoryGone: the guest takes away the memory that its datagrams lie in.
func TestMemoryGone(t *testing.T) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
	require.NoError(t, err)
	defer unix.Close(fd)
	require.NoError(t, unix.Ftruncate(fd, 4096))
	mem, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	require.NoError(t, err)
	defer func() { _ = unix.Munmap(mem) }()
	w := newWorld(t)
	host, at := hostUDP(t)
	b := udpTo(6500, gateway(at.Port()), string(make([]byte, 1000)))
	off := enginetest.Partial(b)
	require.NoError(t, unix.Ftruncate(fd, 0))
	process := func(o frame.Offload) frame.DropReason {
		w.b.Reset(w.now)
		for _, tail := range [][]byte{b[frame.HeadSize:], mem[:len(b)-frame.HeadSize]} {
			f := w.b.Next()
			f.SetBytes(b[:frame.HeadSize], [][]byte{tail}, w.b.Segs(2))
			f.Offload = o
		}
		w.net.Process(w.b)
		return w.b.Frame(1).Reason
	}
	assert.Equal(t, frame.BadDescriptor, process(off))
	hears(t, host)
	// Where we look ourselves there is a fault, which the worker recovers from.
	binaryChecksum(b)
	assert.Panics(t, func() { process(frame.Offload{}) })
	w.send(udpTo(6500, gateway(at.Port()), "alive"))
	w.consumed()
	got, _ := hears(t, host)
	assert.Equal(t, "alive", got)
	hearsNothing(t, host)
}

// binaryChecksum completes what Partial has left.
func binaryChecksum(b []byte) {
	f := new(frame.Frame)
	f.SetBytes(b, nil, make([][]byte, 1))
	f.Flags, f.CsumStart, f.CsumOffset = frame.NeedsCsum, 34, 6
	f.CompleteChecksum()
	copy(b, f.Head[:])
}

// TestTCPInFragments: a segment that came in fragments is one of the connection.
func TestTCPInFragments(t *testing.T) {
	w := newWorld(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	dst := gateway(l.Addr().(*net.TCPAddr).AddrPort().Port())
	w.send(tcpTo(dst, enginetest.TCP{Src: 6600, Seq: 99, Flags: enginetest.SYN}, ""))
	a, ok := w.wait(patience, func(a *arrived) bool { return a.tcp != nil && a.tcp.SYN })
	require.True(t, ok)
	data := strings.Repeat("fragment", 300)
	seg := tcpTo(dst, enginetest.TCP{Src: 6600, Seq: 100, Ack: a.tcp.Seq + 1, Flags: enginetest.ACK}, data)
	w.send(reversed(inFragments(seg, 5, 1480))...)
	w.consumed()
	c, err := l.Accept()
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, c.SetReadDeadline(time.Now().Add(patience)))
	got := make([]byte, len(data))
	_, err = io.ReadFull(c, got)
	require.NoError(t, err)
	assert.Equal(t, data, string(got))
}

// TestGuestErrorAboutTCP: what the guest says of its own network makes segments
// smaller, if it is about something that was sent.
func TestGuestErrorAboutTCP(t *testing.T) {
	w := newWorld(t)
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	dst := gateway(l.Addr().(*net.TCPAddr).AddrPort().Port())
	w.send(tcpTo(dst, enginetest.TCP{Src: 6601, Seq: 99, Flags: enginetest.SYN, Options: []byte{2, 4, 5, 0xb4}}, ""))
	a, ok := w.wait(patience, func(a *arrived) bool { return a.tcp != nil && a.tcp.SYN })
	require.True(t, ok)
	k := w.net.workers[0]
	fl := func() *flow {
		return k.table.at(k.table.find(key{remote: hostOf(ip4(gatewayIP)), rport: dst.Port(), gport: 6601, proto: frame.ProtoTCP}))
	}
	require.EqualValues(t, 1460, fl().mss)
	say := func(seq uint32, typ, code uint8, mtu uint32) {
		ip := enginetest.IP{Src: gatewayIP, Dst: guestIP}
		about := ip.Packet(frame.ProtoTCP, enginetest.TCP{Src: dst.Port(), Dst: 6601, Seq: seq}.Segment(ip, nil))
		require.Empty(t, w.send(enginetest.ICMPFrame(toRouter, to(gatewayIP), enginetest.ICMP{Type: typ, Code: code, Rest: mtu}, about)))
	}
	for _, c := range []struct {
		seq       uint32
		typ, code uint8
		mtu       uint32
		want      uint16
	}{
		{a.tcp.Seq + 77777, 3, 4, 1000, 1460}, // nothing that was sent (RFC 5927, 4.1)
		{a.tcp.Seq, 3, 3, 1000, 1460},         // RFC 5382 REQ-10
		{a.tcp.Seq, 3, 1, 1000, 1460},
		{a.tcp.Seq, 11, 0, 1000, 1460},
		{a.tcp.Seq, 3, 4, 1400, 1360},
		{a.tcp.Seq, 3, 4, 1450, 1360}, // never larger
		{a.tcp.Seq, 3, 4, 0, 512},     // nor too small
	} {
		say(c.seq, c.typ, c.code, c.mtu)
		assert.EqualValues(t, c.want, fl().mss, "%+v", c)
	}
}

// TestUDPLargerThanPath: datagrams that need fragments are sent alone from then
// on.
func TestUDPLargerThanPath(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{MTU: 1400}, withMTU(9000))
	host := listen(t, p.Outside, "udp4", enginetest.OutsideIP+":0")
	ip := to(outsideIP)
	ip.Frag = 0
	var frames [][]byte
	for i := range 5 {
		frames = append(frames, enginetest.UDPFrame(toRouter, ip, enginetest.UDP{Src: 6602, Dst: portOf(host)}, enginetest.Payload(4000, byte(i))))
	}
	for range 2 {
		p.send(frames...)
		p.consumed()
		for i := range 5 {
			got, _ := hears(t, host)
			require.Equal(t, string(enginetest.Payload(4000, byte(i))), got)
		}
	}
	assert.NotZero(t, p.net.workers[0].table.at(0).flags&mapAlone)
}

func TestServiceMustBeIPv4(t *testing.T) {
	c := newWorld(t).net.conf
	service("10.0.2.3:53", "[::1]:53")(&c)
	_, err := New(c)
	assert.ErrorContains(t, err, "IPv4")
}
