package usernet

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

var (
	outsideIP = netip.MustParseAddr(enginetest.OutsideIP)
	podIP     = netip.MustParseAddr(enginetest.PodIP)
	// nowhere is an address that the outside knows no way to.
	nowhere = netip.MustParseAddr("192.0.2.1")
)

// pod is a guest in a pod with an outside, which is a router too.
type pod struct {
	*world
	*enginetest.World
}

func newPod(t testing.TB, o enginetest.WorldOptions, opts ...option) *pod {
	t.Helper()
	e := enginetest.NewWorld(t, o)
	enginetest.Must(t, e.Outside.Sysctl("net/ipv4/ip_forward", "1"),
		e.Outside.Sysctl("net/ipv4/icmp_ratelimit", "0"), e.Pod.Sysctl("net/ipv4/icmp_ratelimit", "0"),
		e.Pod.Sysctl("net/ipv4/ping_group_range", "0 2147483647"))
	return &pod{newWorld(t, append([]option{inPod(t, e.Pod)}, opts...)...), e}
}

// listen is a socket in one of the pod's namespaces.
func listen(t testing.TB, ns *enginetest.NetNS, network, addr string) net.PacketConn {
	t.Helper()
	c, err := ns.ListenPacket(network, addr)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

func portOf(c net.PacketConn) uint16 { return c.LocalAddr().(*net.UDPAddr).AddrPort().Port() }

// external lets the guest send from a port and returns as whom the host sees
// it.
func (w *world) external(sport uint16, host net.PacketConn, dst netip.AddrPort) netip.AddrPort {
	w.t.Helper()
	w.send(udpTo(sport, dst, "where am I"))
	w.consumed()
	_, from := hears(w.t, host)
	return from
}

// answers wants a datagram from the host to reach the guest's port.
func (w *world) answers(host net.PacketConn, to netip.AddrPort, sport uint16) arrived {
	w.t.Helper()
	says(w.t, host, to, "here")
	a := w.next()
	require.NotNil(w.t, a.udp)
	assert.Equal(w.t, "here", string(a.payload))
	assert.EqualValues(w.t, sport, a.udp.DstPort)
	return a
}

func (w *world) mappings() int { return w.net.Stats().UDPOpen }

func TestRFC4787_REQ1_EndpointIndependentMapping(t *testing.T) {
	w := newWorld(t)
	var ports []uint16
	for range 3 {
		host, at := hostUDP(t)
		ports = append(ports, w.external(33333, host, gateway(at.Port())).Port())
	}
	assert.Equal(t, []uint16{ports[0], ports[0], ports[0]}, ports)
	assert.Equal(t, 1, w.mappings())
}

func TestRFC4787_REQ3_NoPortOverloading(t *testing.T) {
	a, b := newWorld(t), newWorld(t)
	host, at := hostUDP(t)
	ea := a.external(33334, host, gateway(at.Port()))
	eb := b.external(33334, host, gateway(at.Port()))
	assert.NotEqual(t, ea, eb)
	says(t, host, ea, "for a")
	says(t, host, eb, "for b")
	assert.Equal(t, "for b", string(b.next().payload))
	assert.Equal(t, "for a", string(a.next().payload))
	a.nothing()
	b.nothing()
}

// TestRFC4787_REQ3a_REQ4_PortKept: the guest's own port where it is free, so
// its class and its parity too; else one of its class.
func TestRFC4787_REQ3a_REQ4_PortKept(t *testing.T) {
	w := newWorld(t)
	host, at := hostUDP(t)
	assert.EqualValues(t, 21335, w.external(21335, host, gateway(at.Port())).Port())

	taken, at2 := hostUDPAt(t, "0.0.0.0:0")
	defer taken.Close()
	assert.GreaterOrEqual(t, w.external(at2.Port(), host, gateway(at.Port())).Port(), uint16(1024))

	low, err := net.ListenPacket("udp4", "0.0.0.0:618")
	if errors.Is(err, os.ErrPermission) {
		t.Skip("may not bind low ports")
	}
	require.NoError(t, err)
	defer low.Close()
	got := w.external(618, host, gateway(at.Port())).Port()
	assert.Less(t, got, uint16(1024))
	assert.NotEqualValues(t, 618, got)
}

func TestRFC4787_REQ5_Timer(t *testing.T) {
	w := newWorld(t)
	host, at := hostUDP(t)
	from := w.external(33336, host, gateway(at.Port()))
	for _, d := range []time.Duration{119 * time.Second, 180 * time.Second} {
		w.pass(d)
		w.pull(0)
	}
	require.Equal(t, 1, w.mappings(), "5c: alive at 299 s")
	w.pass(4 * time.Second)
	w.pull(0)
	require.Zero(t, w.mappings())
	assert.Zero(t, w.net.Stats().Sockets)
	says(t, host, from, "late")
	w.nothing()
}

func TestRFC4787_REQ5_FloorOfTimer(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Timeouts.UDP = time.Second })
	host, at := hostUDP(t)
	w.external(33336, host, gateway(at.Port()))
	w.pass(119 * time.Second)
	w.pull(0)
	assert.Equal(t, 1, w.mappings())
}

func TestRFC4787_REQ5a_DNSEndsEarly(t *testing.T) {
	host, at := hostUDP(t)
	w := newWorld(t, service("10.0.2.3:53", at.String()))
	from := w.external(33337, host, netip.AddrPortFrom(dnsIP, 53))
	w.pass(30 * time.Second)
	w.pull(0)
	require.Equal(t, 1, w.mappings(), "not answered yet")
	w.answers(host, from, 33337)
	w.external(33337, host, netip.AddrPortFrom(dnsIP, 53)) // asks again
	w.answers(host, from, 33337)
	w.pass(5 * time.Second)
	w.pull(0)
	require.Equal(t, 1, w.mappings())
	w.pass(300 * time.Second)
	w.pull(0)
	require.Zero(t, w.mappings())

	from = w.external(33337, host, netip.AddrPortFrom(dnsIP, 53))
	w.answers(host, from, 33337)
	w.external(33337, host, netip.AddrPortFrom(dnsIP, 53))
	w.pass(14 * time.Second)
	w.pull(0)
	require.Equal(t, 1, w.mappings(), "the second question is not answered yet")
	w.pass(300 * time.Second)
	w.pull(0)
	require.Zero(t, w.mappings())
	from = w.external(33337, host, netip.AddrPortFrom(dnsIP, 53))
	w.answers(host, from, 33337)
	w.pass(14 * time.Second)
	w.pull(0)
	require.Zero(t, w.mappings(), "answered")

	other, oat := hostUDP(t)
	from = w.external(33337, host, netip.AddrPortFrom(dnsIP, 53))
	w.external(33337, other, gateway(oat.Port()))
	w.answers(host, from, 33337)
	w.pass(250 * time.Second)
	w.pull(0)
	require.Equal(t, 1, w.mappings(), "it is used for more than DNS")
}

func TestRFC4787_REQ5b_Configurable(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Timeouts.UDP = 10 * time.Minute })
	host, at := hostUDP(t)
	w.external(33338, host, gateway(at.Port()))
	w.pass(599 * time.Second)
	w.pull(0)
	require.Equal(t, 1, w.mappings())
	w.pass(4 * time.Second)
	w.pull(0)
	require.Zero(t, w.mappings())
}

// TestRFC4787_REQ6_Refresh: what the guest sends refreshes a mapping, and so
// does what comes from where it sent last, but nothing that comes unasked (RFC
// 7857 section 7).
func TestRFC4787_REQ6_Refresh(t *testing.T) {
	for _, c := range []struct {
		name string
		stay bool
		do   func(w *world, host, stranger net.PacketConn, at, from netip.AddrPort)
	}{
		{"outbound", true, func(w *world, host, _ net.PacketConn, at, _ netip.AddrPort) { w.external(33339, host, at) }},
		{"inbound from the last destination (6a)", true, func(w *world, host, _ net.PacketConn, _, from netip.AddrPort) {
			w.answers(host, from, 33339)
		}},
		{"inbound from a stranger", false, func(w *world, _, stranger net.PacketConn, _, from netip.AddrPort) {
			says(w.t, stranger, from, "knock")
			w.wait(silence, nil)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			host, at := hostUDP(t)
			stranger, _ := hostUDP(t)
			from := w.external(33339, host, gateway(at.Port()))
			for range 4 {
				w.pass(200 * time.Second)
				w.pull(0)
				if w.mappings() == 1 {
					c.do(w, host, stranger, gateway(at.Port()), from)
				}
			}
			if c.stay {
				assert.Equal(t, 1, w.mappings())
			} else {
				assert.Zero(t, w.mappings())
			}
		})
	}
}

// TestRFC4787_REQ7_SameNetworkOutside: the guest's network is the pod's too.
func TestRFC4787_REQ7_SameNetworkOutside(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	enginetest.Must(t, p.Pod.Addr("eth0", "10.0.2.5/24"), p.Outside.Addr("veth0", "10.0.2.77/24"), p.Outside.Addr("veth0", "10.0.2.15/24"))
	far := listen(t, p.Outside, "udp4", enginetest.OutsideIP+":7000")
	from := p.external(5000, far, netip.AddrPortFrom(outsideIP, 7000))
	assert.Equal(t, outsideIP, p.answers(far, from, 5000).src())

	// Nobody of that network is to be seen by the guest under its own address:
	// it could not answer.
	near := listen(t, p.Outside, "udp4", "10.0.2.77:7000")
	twin := listen(t, p.Outside, "udp4", "10.0.2.15:7000")
	for _, c := range []net.PacketConn{near, twin} {
		says(t, c, netip.AddrPortFrom(netip.MustParseAddr("10.0.2.5"), from.Port()), "knock")
	}
	p.nothing()
	p.send(udpTo(5000, netip.MustParseAddrPort("10.0.2.77:7000"), "x"))
	p.dropped(frame.NoRoute)

	// But a forwarded port is open to them, as the gateway.
	require.NoError(t, p.net.AddForward(Forward{Proto: frame.ProtoUDP, Port: 6000}))
	for _, c := range []net.PacketConn{near, twin} {
		says(t, c, netip.AddrPortFrom(netip.MustParseAddr("10.0.2.5"), 6000), "hello")
		a := p.next()
		assert.Equal(t, gatewayIP, a.src())
		p.send(udpTo(6000, a.from(), "answer"))
		got, by := hears(t, c)
		assert.Equal(t, "answer", got)
		assert.EqualValues(t, 6000, by.Port())
	}
}

func TestRFC4787_REQ8_Filtering(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	enginetest.Must(t, p.Outside.Addr("veth0", "10.244.1.2/24"))
	for _, c := range []struct {
		name                         string
		filter                       Filter
		samePort, otherPort, strange bool
	}{
		{"EIF", FilterNone, true, true, true},
		{"ADF", FilterAddress, true, true, false},
		{"APDF", FilterPort, true, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, inPod(t, p.Pod), func(k *Config) { k.Filter = c.filter })
			a := listen(t, p.Outside, "udp4", enginetest.OutsideIP+":0")
			a2 := listen(t, p.Outside, "udp4", enginetest.OutsideIP+":0")
			other := listen(t, p.Outside, "udp4", "10.244.1.2:0")
			later := listen(t, p.Outside, "udp4", "10.244.1.2:0")
			from := w.external(5001, a, netip.AddrPortFrom(outsideIP, portOf(a)))
			from = netip.AddrPortFrom(podIP, from.Port())
			check := func(s net.PacketConn, pass bool) {
				t.Helper()
				says(t, s, from, "x")
				if pass {
					assert.Equal(t, s.LocalAddr().String(), w.next().from().String())
				} else {
					w.nothing()
				}
			}
			check(a, c.samePort)
			check(a2, c.otherPort)
			check(other, c.strange)
			// Whoever was sent to stays known when another is sent to, and is
			// forgotten with its time.
			w.external(5001, later, netip.AddrPortFrom(netip.MustParseAddr("10.244.1.2"), portOf(later)))
			check(later, true)
			check(a, true)
			check(other, c.filter != FilterPort)
			w.pass(200 * time.Second)
			w.pull(0)
			w.external(5001, later, netip.AddrPortFrom(netip.MustParseAddr("10.244.1.2"), portOf(later)))
			w.pass(200 * time.Second)
			w.pull(0)
			check(a, c.strange)
			check(later, true)
			// Time counts from when one was sent to last, also by a guest that
			// did not look elsewhere meanwhile.
			w.external(5001, a2, netip.AddrPortFrom(outsideIP, portOf(a2)))
			w.pass(200 * time.Second)
			w.pull(0)
			w.external(5001, a2, netip.AddrPortFrom(outsideIP, portOf(a2)))
			check(later, true)
			// Nothing of it stays when the mapping has ended.
			w.pass(time.Hour)
			w.pull(0)
			assert.Zero(t, w.net.workers[0].table.count)
		})
	}
}

// TestRFC4787_REQ8_NewMappingForgets: who was allowed on a mapping is not on the
// next one of the same port.
func TestRFC4787_REQ8_NewMappingForgets(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Filter = FilterPort })
	one, at := hostUDP(t)
	two, at2 := hostUDP(t)
	w.external(5002, one, gateway(at.Port()))
	w.external(5002, two, gateway(at2.Port()))
	k := w.net.workers[0]
	k.drop(k.table.find(key{gport: 5002, proto: frame.ProtoUDP}))
	from := w.external(5002, two, gateway(at2.Port()))
	says(t, one, from, "x")
	w.nothing()
	w.answers(two, from, 5002)
}

// TestRFC4787_REQ9_Hairpin: the guest reaches its own forwarded port by the
// host's address, and both ends see external addresses.
func TestRFC4787_REQ9_Hairpin(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	require.NoError(t, p.net.AddForward(Forward{Proto: frame.ProtoUDP, Port: 8053, Guest: 53}))
	for _, dst := range []netip.Addr{podIP, gatewayIP} {
		at := netip.AddrPortFrom(dst, 8053)
		p.send(udpTo(5003, at, "to myself"))
		p.consumed()
		a := p.next()
		require.EqualValues(t, 53, a.udp.DstPort)
		assert.Equal(t, "to myself", string(a.payload))
		assert.Equal(t, netip.AddrPortFrom(dst, 5003), a.from(), "9a")
		p.send(udpTo(53, a.from(), "from myself"))
		p.consumed()
		a = p.next()
		require.EqualValues(t, 5003, a.udp.DstPort)
		assert.Equal(t, "from myself", string(a.payload))
		assert.Equal(t, at, a.from(), "9a")
	}
}

// TestRFC4787_REQ9_HairpinMappings: without a forward too, by the port of
// another mapping, of this guest or of another.
func TestRFC4787_REQ9_HairpinMappings(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	q := newWorld(t, inPod(t, p.Pod))
	host := listen(t, p.Outside, "udp4", enginetest.OutsideIP+":0")
	dst := netip.AddrPortFrom(outsideIP, portOf(host))
	for i, o := range []*world{p.world, q} {
		port := uint16(5004 + i)
		to := netip.AddrPortFrom(podIP, o.external(port, host, dst).Port())
		from := netip.AddrPortFrom(podIP, p.external(5006, host, dst).Port())
		p.send(udpTo(5006, to, "psst"))
		p.consumed()
		a := o.next()
		require.EqualValues(t, port, a.udp.DstPort)
		assert.Equal(t, from, a.from())
	}
}

// TestRFC4787_REQ10_NoALG: payloads that name addresses pass as they are.
func TestRFC4787_REQ10_NoALG(t *testing.T) {
	w := newWorld(t)
	for _, port := range []string{"5060", "69", "161"} {
		host, at := hostUDPAt(t, "127.0.0.1:0")
		w = newWorld(t, service("10.0.2.3:"+port, at.String()))
		p := "INVITE sip:x@10.0.2.15:5060 SIP/2.0\r\nVia: SIP/2.0/UDP 10.0.2.15:5060\r\n\r\n"
		dst := netip.MustParseAddrPort("10.0.2.3:" + port)
		w.send(udpTo(5060, dst, p))
		got, from := hears(t, host)
		assert.Equal(t, p, got)
		says(t, host, from, p)
		assert.Equal(t, p, string(w.next().payload))
	}
}

// TestRFC4787_REQ11_Deterministic: translation is the same at the limits, and
// what is beyond them is refused.
func TestRFC4787_REQ11_Deterministic(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.MaxSockets = 20 })
	host, at := hostUDP(t)
	from := w.external(6000, host, gateway(at.Port()))
	_, crowd := hostUDP(t)
	for i := range 40 {
		w.send(udpTo(uint16(6001+i), gateway(crowd.Port()), "x"))
	}
	assert.Equal(t, from, w.external(6000, host, gateway(at.Port())))
	other, at2 := hostUDP(t)
	assert.Equal(t, from, w.external(6000, other, gateway(at2.Port())))
	w.answers(other, from, 6000)
}

// TestRFC4787_REQ12_ICMPRemovesNothing: errors of each kind, from anybody (12a).
func TestRFC4787_REQ12_ICMPRemovesNothing(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	enginetest.Must(t, p.Outside.Addr("veth0", "10.244.1.2/24"))
	host := listen(t, p.Outside, "udp4", enginetest.OutsideIP+":0")
	dst := netip.AddrPortFrom(outsideIP, portOf(host))
	from := netip.AddrPortFrom(podIP, p.external(5007, host, dst).Port())
	forger := listen(t, p.Outside, "ip4:icmp", "10.244.1.2")
	for _, c := range [][2]uint8{{3, 0}, {3, 1}, {3, 2}, {3, 3}, {3, 4}, {3, 9}, {3, 10}, {3, 13}, {11, 0}, {12, 0}} {
		t.Log("type and code", c)
		forge(t, forger, podIP, enginetest.ICMP{Type: c[0], Code: c[1], Rest: 1300}, quoteUDP(from, dst, "abcd"))
		a := p.next()
		require.NotNil(t, a.icmp)
		assert.Equal(t, c, [2]uint8{a.icmp.TypeCode.Type(), a.icmp.TypeCode.Code()})
		assert.Equal(t, "10.244.1.2", a.src().String(), "12a")
		assert.Equal(t, from, p.external(5007, host, dst), "a pending error eats no datagram")
		p.answers(host, from, 5007)
		require.Equal(t, 1, p.mappings())
	}
	// Nor do those of the guest.
	for _, typ := range []uint8{3, 11, 12, 4, 5} {
		p.send(enginetest.ICMPFrame(toRouter, to(outsideIP), enginetest.ICMP{Type: typ, Code: 3}, quoteUDPToGuest(dst, 5007)))
	}
	p.answers(host, from, 5007)
}

// forge sends an ICMP message to the pod.
func forge(t testing.TB, c net.PacketConn, dst netip.Addr, i enginetest.ICMP, data []byte) {
	t.Helper()
	_, err := c.WriteTo(i.Message(enginetest.IP{Src: dst}, data), &net.IPAddr{IP: dst.AsSlice()})
	require.NoError(t, err)
}

// quoteUDP is what an ICMP error shows of a datagram.
func quoteUDP(from, to netip.AddrPort, payload string) []byte {
	ip := enginetest.IP{Src: from.Addr(), Dst: to.Addr(), Frag: frame.DontFragment}
	return ip.Packet(frame.ProtoUDP, enginetest.UDP{Src: from.Port(), Dst: to.Port()}.Datagram(ip, []byte(payload)))
}

func quoteUDPToGuest(from netip.AddrPort, port uint16) []byte {
	return quoteUDP(from, netip.AddrPortFrom(guestIP, port), "payload")
}

func TestRFC4787_REQ12b_PortUnreachable(t *testing.T) {
	w := newWorld(t)
	host, at := hostUDP(t)
	host.Close()
	for range 3 {
		w.send(udpTo(5008, gateway(at.Port()), "anybody?"))
		w.consumed()
		a := w.next()
		require.NotNil(t, a.icmp)
		assert.EqualValues(t, layers.CreateICMPv4TypeCode(3, 3), a.icmp.TypeCode)
		assert.Equal(t, gatewayIP, a.src())
		inner := a.quoted(t)
		assert.Equal(t, guestIP, inner.src)
		assert.Equal(t, gateway(at.Port()), inner.dst)
		assert.EqualValues(t, 5008, inner.sport)
		assert.Equal(t, "anybody?", string(inner.payload))
	}
	assert.EqualValues(t, 3, w.net.Stats().Refused)
	// An error that waits costs neither single datagrams nor runs of them.
	live, lat := hostUDP(t)
	for _, n := range []int{1, 5} {
		frames := [][]byte{udpTo(5008, gateway(at.Port()), "refused")}
		w.send(frames[0]) // and nobody looks at the error before the next batch
		for range n {
			frames = append(frames, udpTo(5008, gateway(lat.Port()), "heard"))
		}
		w.send(frames[1:]...)
		w.consumed()
		w.send(frames...)
		w.consumed()
		for range 2 * n {
			got, _ := hears(t, live)
			assert.Equal(t, "heard", got)
		}
	}
}

// inner is the packet that an ICMP error quotes.
type inner struct {
	ip      layers.IPv4
	src     netip.Addr
	dst     netip.AddrPort // or an echo's id
	sport   uint16
	payload []byte
}

func (a *arrived) quoted(t testing.TB) (q inner) {
	t.Helper()
	require.NotNil(t, a.icmp)
	// What is quoted may be cut.
	b := bytes.Clone(a.payload)
	require.GreaterOrEqual(t, len(b), 28)
	require.Zero(t, ^frame.Fold(frame.Sum(b[:20], 0)), "the quoted header's checksum")
	require.NoError(t, q.ip.DecodeFromBytes(b, nopFeedback{}))
	q.src, _ = netip.AddrFromSlice(q.ip.SrcIP)
	dst, _ := netip.AddrFromSlice(q.ip.DstIP)
	t4 := b[int(q.ip.IHL)*4:]
	if q.ip.Protocol == layers.IPProtocolICMPv4 {
		q.dst = netip.AddrPortFrom(dst, uint16(t4[4])<<8|uint16(t4[5]))
	} else {
		q.sport, q.dst = uint16(t4[0])<<8|uint16(t4[1]), netip.AddrPortFrom(dst, uint16(t4[2])<<8|uint16(t4[3]))
	}
	q.payload = t4[8:]
	return q
}

type nopFeedback struct{}

func (nopFeedback) SetTruncated() {}

// TestRFC4787_REQ13_TooBig_Row36: with DF the guest is told what fits, by the pod and
// by a router.
func TestRFC4787_REQ13_TooBig_Row36(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{MTU: 1400})
	host := listen(t, p.Outside, "udp4", enginetest.OutsideIP+":0")
	dst := netip.AddrPortFrom(outsideIP, portOf(host))
	ip := to(outsideIP)
	big := enginetest.UDPFrame(toRouter, ip, enginetest.UDP{Src: 5009, Dst: dst.Port()}, make([]byte, 1400))
	small := enginetest.UDPFrame(toRouter, ip, enginetest.UDP{Src: 5009, Dst: dst.Port()}, make([]byte, 1372))
	as := p.send(big, small)
	require.Len(t, as, 1)
	a := as[0]
	assert.EqualValues(t, layers.CreateICMPv4TypeCode(3, 4), a.icmp.TypeCode)
	assert.EqualValues(t, 1400, a.icmp.Seq, "the next hop's MTU")
	assert.Equal(t, gatewayIP, a.src())
	q := a.quoted(t)
	assert.Equal(t, dst, q.dst)
	assert.EqualValues(t, 5009, q.sport)
	got, from := hears(t, host)
	assert.Len(t, got, 1372)

	forger := listen(t, p.Outside, "ip4:icmp", enginetest.OutsideIP)
	forge(t, forger, podIP, enginetest.ICMP{Type: 3, Code: 4, Rest: 1200}, quoteUDP(netip.AddrPortFrom(podIP, from.Port()), dst, "abcd"))
	a = p.next()
	assert.EqualValues(t, layers.CreateICMPv4TypeCode(3, 4), a.icmp.TypeCode)
	assert.EqualValues(t, 1200, a.icmp.Seq)
	as = p.send(small)
	require.Len(t, as, 1, "the host has learnt it too")
	assert.EqualValues(t, 1200, as[0].icmp.Seq)

	// A run of datagrams that the kernel would cut: each is told.
	as = p.send(small, small)
	require.Len(t, as, 2)
	assert.Equal(t, frame.FragNeeded, p.frames[1].Reason)
}

func TestRFC4787_REQ13a_Fragmented(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{MTU: 1400})
	host := listen(t, p.Outside, "udp4", enginetest.OutsideIP+":0")
	ip := to(outsideIP)
	ip.Frag = 0
	data := enginetest.Payload(1472, 3)
	p.send(enginetest.UDPFrame(toRouter, ip, enginetest.UDP{Src: 5010, Dst: portOf(host)}, data))
	p.consumed()
	got, _ := hears(t, host)
	assert.Equal(t, string(data), got)
	// And back to DF on the same socket.
	ip.Frag = frame.DontFragment
	require.Len(t, p.send(enginetest.UDPFrame(toRouter, ip, enginetest.UDP{Src: 5010, Dst: portOf(host)}, data)), 1)
	ip.Frag = 0
	p.send(enginetest.UDPFrame(toRouter, ip, enginetest.UDP{Src: 5010, Dst: portOf(host)}, data))
	got, _ = hears(t, host)
	assert.Equal(t, string(data), got)
}

// TestRFC4787_REQ13a_FragmentedToGuest: what the guest's MTU does not take comes
// in fragments, in order, that belong together.
func TestRFC4787_REQ13a_FragmentedToGuest(t *testing.T) {
	w := newWorld(t)
	host, at := hostUDP(t)
	from := w.external(5011, host, gateway(at.Port()))
	ids := map[uint16]bool{}
	for _, n := range []int{1473, 4000, 65507} {
		data := enginetest.Payload(n, byte(n))
		says(t, host, from, string(data))
		got := w.fragments(n + 8)
		assert.Equal(t, gatewayIP, got[0].src())
		var whole []byte
		for i, a := range got {
			assert.Equal(t, got[0].ip.Id, a.ip.Id)
			assert.EqualValues(t, len(whole)/8, a.ip.FragOffset)
			assert.Equal(t, i < len(got)-1, a.ip.Flags == layers.IPv4MoreFragments)
			assert.LessOrEqual(t, len(a.data), 14+1500)
			whole = append(whole, a.payload...)
		}
		ids[got[0].ip.Id] = true
		assert.Equal(t, string(data), string(whole[8:]))
		ip := enginetest.IP{Src: gatewayIP, Dst: guestIP}
		assert.Equal(t, enginetest.UDP{Src: at.Port(), Dst: 5011}.Datagram(ip, data)[:8], whole[:8])
	}
	assert.Len(t, ids, 3, "RFC 6864")
}

// fragments waits for all of a packet with n bytes behind the IP header.
func (w *world) fragments(n int) (as []arrived) {
	w.t.Helper()
	for n > 0 {
		a := w.next()
		require.True(w.t, a.ip.FragOffset > 0 || a.ip.Flags&layers.IPv4MoreFragments != 0, "%x", a.data)
		n -= len(a.payload)
		as = append(as, a)
	}
	return as
}
