package uplink

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

func u32(s string) uint32 { return binary.BigEndian.Uint32(netip.MustParseAddr(s).AsSlice()) }

func newRouter(t *testing.T, ns *enginetest.NetNS) (r *Router) {
	t.Helper()
	enginetest.Must(t, ns.Do(func() (err error) {
		r, err = NewRouter("eth0")
		return err
	}))
	t.Cleanup(r.Close)
	return r
}

// held is how many destinations and neighbours a router remembers.
func (r *Router) held() (dsts, neighs int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.dsts), len(r.neighs)
}

// resolved waits until the hop's address is known.
func resolved(t *testing.T, h *frame.Hop) frame.MAC {
	t.Helper()
	require.NotNil(t, h)
	require.Eventually(t, func() bool { _, ok := h.Addr(); return ok }, deadline, time.Millisecond)
	m, _ := h.Addr()
	return m
}

// settled asks for the route, as a flow does, until the hop's address is known.
func settled(t *testing.T, r *Router, dst uint32) (h *frame.Hop) {
	t.Helper()
	require.Eventually(t, func() bool {
		if h = r.Route(dst); h == nil {
			return false
		}
		_, ok := h.Addr()
		return ok
	}, deadline, time.Millisecond)
	return h
}

func TestRoute(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	r := newRouter(t, w.Pod)
	out, err := w.Outside.MAC("veth0")
	require.NoError(t, err)
	pod, err := w.Pod.MAC("eth0")
	require.NoError(t, err)

	gw := r.Route(u32("198.51.100.1"))
	require.Equal(t, frame.MAC(out), resolved(t, gw))
	require.Equal(t, 1500, gw.MTU)
	require.Equal(t, frame.MAC(pod), gw.Src)
	require.Same(t, gw, r.Route(u32("198.51.100.2")), "the same next hop")
	require.Same(t, gw, r.Route(u32(enginetest.OutsideIP)), "the gateway itself")

	// Nobody answers for this one.
	require.NotNil(t, r.Route(u32("10.244.1.77")))
	_, ok := r.Route(u32("10.244.1.77")).Addr()
	require.False(t, ok)
	for _, dst := range []string{enginetest.PodIP, "127.0.0.1", "10.244.1.255", "224.0.0.1", "255.255.255.255", "0.0.0.0"} {
		require.Nil(t, r.Route(u32(dst)), dst)
	}
	output(t, w.Pod, "ip", "route", "add", "unreachable", "203.0.113.0/24")
	require.Eventually(t, func() bool { return r.Route(u32("203.0.113.1")) == nil }, deadline, time.Millisecond)
	output(t, w.Pod, "ip", "route", "add", "203.0.113.128/25", "via", enginetest.OutsideIP, "mtu", "1400")
	require.Eventually(t, func() bool {
		h := r.Route(u32("203.0.113.129"))
		return h != nil && h.MTU == 1400
	}, deadline, time.Millisecond)
}

// Calico's way: the gateway is on the link by a route, not by the prefix.
func TestRouteCalico(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	for _, args := range [][]string{
		{"addr", "flush", "dev", "eth0"}, {"addr", "add", "10.244.1.5/32", "dev", "eth0"},
		{"route", "add", "169.254.1.1", "dev", "eth0", "scope", "link"}, {"route", "add", "default", "via", "169.254.1.1", "dev", "eth0"},
	} {
		output(t, w.Pod, "ip", args...)
	}
	// The host answers for every address.
	enginetest.Must(t, w.Outside.Sysctl("net/ipv4/conf/veth0/proxy_arp", "1"), w.Outside.Route("default", "10.244.1.9"),
		w.Outside.Sysctl("net/ipv4/neigh/veth0/proxy_delay", "0"), w.Outside.Sysctl("net/ipv4/ip_forward", "1"))
	output(t, w.Outside, "ip", "link", "add", "lan", "type", "bridge")
	output(t, w.Outside, "ip", "link", "set", "lan", "up")
	output(t, w.Outside, "ip", "route", "add", "169.254.1.1", "dev", "lan")
	r := newRouter(t, w.Pod)
	out, err := w.Outside.MAC("veth0")
	require.NoError(t, err)
	require.Equal(t, frame.MAC(out), resolved(t, r.Route(u32("8.8.8.8"))))
}

func TestRouteChanges(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	r := newRouter(t, w.Pod)
	dst := u32("198.51.100.1")
	retired := func(change func()) {
		t.Helper()
		h := settled(t, r, dst)
		change()
		require.Eventually(t, h.Retired, deadline, time.Millisecond)
	}
	retired(func() { output(t, w.Pod, "ip", "route", "add", "192.0.2.0/24", "via", enginetest.OutsideIP) })
	retired(func() { output(t, w.Pod, "ip", "rule", "add", "from", "192.0.2.1", "table", "7") })
	retired(func() { enginetest.Must(t, w.Pod.SetMTU("eth0", 1300)) })
	require.Eventually(t, func() bool { h := r.Route(dst); return h != nil && h.MTU == 1300 }, deadline, time.Millisecond)
	retired(func() { enginetest.Must(t, w.Pod.SetMAC("eth0", [6]byte{2, 0, 0, 0, 0, 7})) })
	require.Equal(t, frame.MAC{2, 0, 0, 0, 0, 7}, r.Route(dst).Src)
	retired(func() { enginetest.Must(t, w.Pod.Down("eth0")) })
	require.Eventually(t, func() bool { return r.Route(dst) == nil }, deadline, time.Millisecond)
	enginetest.Must(t, w.Pod.Up("eth0"), w.Pod.Route("default", enginetest.OutsideIP))

	// A neighbour that moves is followed.
	settled(t, r, dst)
	output(t, w.Pod, "ip", "neigh", "replace", enginetest.OutsideIP, "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "reachable")
	var h *frame.Hop
	require.Eventually(t, func() bool {
		h = r.Route(dst)
		m, _ := h.Addr()
		return m == frame.MAC{2, 0, 0, 0, 0, 0x99}
	}, deadline, time.Millisecond)
	output(t, w.Pod, "ip", "neigh", "del", enginetest.OutsideIP, "dev", "eth0")
	require.Eventually(t, func() bool { _, ok := h.Addr(); return !ok || h.Retired() }, deadline, time.Millisecond)
}

// A neighbour in use is probed when it goes stale; one that is not is asked for
// again by the next frame.
func TestStaleNeighbour(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	r := newRouter(t, w.Pod)
	enginetest.Must(t, w.Pod.Sysctl("net/ipv4/neigh/eth0/delay_first_probe_time", "1"))
	dst := u32("198.51.100.1")
	stale := func() {
		output(t, w.Pod, "ip", "neigh", "change", enginetest.OutsideIP, "dev", "eth0", "nud", "stale")
	}
	neigh := func() string { return output(t, w.Pod, "ip", "neigh", "show", "dev", "eth0", enginetest.OutsideIP) }
	h := r.Route(dst)
	resolved(t, h)
	for i := range int64(3) {
		h.Touch((i + 1) * 1e9)
		stale()
		require.Eventually(t, func() bool {
			out := neigh()
			return contains(out, "DELAY") || contains(out, "PROBE") || contains(out, "REACHABLE")
		}, deadline, time.Millisecond)
		_, ok := h.Addr()
		require.True(t, ok, "usable all the time")
	}
	require.Eventually(t, func() bool { return contains(neigh(), "REACHABLE") }, deadline, time.Millisecond)
	require.False(t, h.Retired())
	stale() // nothing was sent since
	require.Eventually(t, h.Retired, deadline, time.Millisecond)
	h2 := r.Route(dst)
	require.NotSame(t, h, h2)
	_, ok := h2.Addr()
	require.True(t, ok, "known at once")
	require.Eventually(t, func() bool { return !contains(neigh(), "STALE") }, deadline, time.Millisecond)
}

func contains(s, sub string) bool {
	for i := 0; i+len(sub) <= len(s); i++ {
		if s[i:i+len(sub)] == sub {
			return true
		}
	}
	return false
}

func TestLocal(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	r := newRouter(t, w.Pod)
	require.True(t, r.Local().Has(u32(enginetest.PodIP)))
	require.False(t, r.Local().Has(u32("127.0.0.1")))
	require.False(t, r.Local().Has(u32(enginetest.OutsideIP)))
	enginetest.Must(t, w.Pod.Addr("eth0", "192.0.2.9/24"))
	require.Eventually(t, func() bool { return r.Local().Has(u32("192.0.2.9")) }, deadline, time.Millisecond)
	output(t, w.Pod, "ip", "addr", "del", "192.0.2.9/24", "dev", "eth0")
	require.Eventually(t, func() bool { return !r.Local().Has(u32("192.0.2.9")) }, deadline, time.Millisecond)
	require.Zero(t, testing.AllocsPerRun(100, func() {
		r.Local().Has(1)
		r.Route(u32("198.51.100.1"))
	}))
}

func TestAddrSet(t *testing.T) {
	var none *AddrSet
	require.False(t, none.Has(1))
	for _, n := range []int{0, 1, 7, 8, 100, 5000} {
		var ips []uint32
		for i := range n {
			ips = append(ips, 0x0a000000+uint32(i)*3+1)
		}
		s := newAddrSet(append(ips, ips...))
		for _, ip := range ips {
			require.True(t, s.Has(ip))
			require.False(t, s.Has(ip+1))
		}
		require.False(t, s.Has(0))
	}
}

// A guest that scans a network does not make the router grow.
func TestRouteIsBounded(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	r := newRouter(t, w.Pod)
	for i := range uint32(3 * routeMax) {
		require.NotNil(t, r.Route(u32("100.64.0.0")+i))
	}
	dsts, neighs := r.held()
	require.LessOrEqual(t, dsts, routeMax)
	require.Equal(t, 1, neighs)
	known := r.Route(u32("100.64.0.0"))
	resolved(t, known)
	enginetest.Must(t, w.Pod.Addr("eth0", "172.16.0.1/16"))
	require.Eventually(t, known.Retired, deadline, time.Millisecond) // the address is taken in
	// One change of the namespace is several notices, and each retires what is
	// known; what is asked after the last one stays.
	require.Eventually(t, func() bool {
		known = r.Route(u32("100.64.0.0"))
		for i := range uint32(2 * neighMax) {
			require.NotNil(t, r.Route(u32("172.16.1.0")+i))
		}
		return !known.Retired()
	}, deadline, time.Millisecond, "what is known stays")
	_, neighs = r.held()
	require.LessOrEqual(t, neighs, neighMax)
}

// What cannot be reached costs one question too, until routes change.
func TestNoRouteIsRemembered(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	output(t, w.Pod, "ip", "route", "add", "unreachable", "203.0.113.0/24")
	r := newRouter(t, w.Pod)
	questions := func(dst uint32) (n uint32) {
		before := r.routes.seq
		for range 100 {
			require.Nil(t, r.Route(dst))
		}
		return r.routes.seq - before
	}
	dst := u32("203.0.113.1")
	require.EqualValues(t, 1, questions(dst))
	require.EqualValues(t, 0, questions(dst))
	for i := range uint32(2 * routeMax) {
		require.Nil(t, r.Route(u32("203.0.113.0")+i%256))
		require.Nil(t, r.Route(u32("127.0.0.0")+i))
	}
	dsts, _ := r.held()
	require.LessOrEqual(t, dsts, routeMax)
	output(t, w.Pod, "ip", "route", "add", "203.0.113.1", "via", enginetest.OutsideIP)
	settled(t, r, dst)

	enginetest.Must(t, w.Pod.Down("eth0"))
	require.Eventually(t, func() bool { r.mu.Lock(); defer r.mu.Unlock(); return !r.up }, deadline, time.Millisecond)
	require.EqualValues(t, 0, questions(u32("198.51.100.1")), "a link that is down has no way to anywhere")
	// A kernel that did not answer said nothing.
	enginetest.Must(t, w.Pod.Up("eth0"), w.Pod.Route("default", enginetest.OutsideIP))
	settled(t, r, u32("198.51.100.1"))
	r.mu.Lock()
	fd := r.routes.fd
	r.routes.fd = -1
	r.mu.Unlock()
	require.Nil(t, r.Route(u32("198.51.100.9")))
	r.mu.Lock()
	r.routes.fd = fd
	r.mu.Unlock()
	require.NotNil(t, r.Route(u32("198.51.100.9")))
}

// Questions about neighbours may wait for the RTNL, so that who asks for a
// route leaves them to the prober: not one neighbour is touched before it runs.
func TestRouteDoesNotProbe(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	output(t, w.Pod, "ip", "neigh", "flush", "all")
	neigh := func() string { return output(t, w.Pod, "ip", "neigh", "show", "dev", "eth0") }
	var r *Router
	enginetest.Must(t, w.Pod.Do(func() (err error) {
		r, err = openRouter("eth0", unix.AF_INET)
		return err
	}))
	defer r.closeSockets()
	h := r.Route(u32("198.51.100.1"))
	_, known := h.Addr()
	require.False(t, known)
	for i := range uint32(2 * neighMax) {
		require.NotNil(t, r.Route(u32("10.244.1.10")+i%200))
	}
	require.Empty(t, neigh())
	r.probeWanted()
	require.Len(t, r.probe.todo, 201)
	require.Contains(t, neigh(), "10.244.1.77 ")
	require.Contains(t, neigh(), enginetest.OutsideIP+" ")
	r.probeWanted()
	require.Empty(t, r.probe.todo, "asked once")

	// What the kernel knows already makes no notice. It is read.
	output(t, w.Pod, "ip", "neigh", "replace", enginetest.OutsideIP, "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "reachable")
	r.forget()
	h = r.Route(u32("198.51.100.1"))
	r.probeWanted()
	m, _ := h.Addr()
	require.Equal(t, frame.MAC{2, 0, 0, 0, 0, 0x99}, m)
}

// A neighbour that the kernel knows is known to the first frame: from before,
// and since. Those that nobody sends to are bounded too.
func TestKnownNeighbours(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	learn := func(ip string) {
		output(t, w.Pod, "ip", "neigh", "replace", ip, "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "reachable")
	}
	known := func(r *Router, ip string) bool {
		m, _ := r.Route(u32(ip)).Addr()
		return m == frame.MAC{2, 0, 0, 0, 0, 0x99}
	}
	learn("10.244.1.7")
	r := newRouter(t, w.Pod)
	require.True(t, known(r, "10.244.1.7"))
	learn("10.244.1.8")
	require.Eventually(t, func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.neighs[netip.MustParseAddr("10.244.1.8")] != nil
	}, deadline, time.Millisecond)
	require.True(t, known(r, "10.244.1.8"))
	r.reload()
	require.True(t, known(r, "10.244.1.7"))
	enginetest.Must(t, w.Pod.SetMTU("eth0", 1300))
	require.Eventually(t, func() bool { return r.Route(u32("10.244.1.7")).MTU == 1300 }, deadline, time.Millisecond)
	require.True(t, known(r, "10.244.1.7"), "the MTU is nothing to the neighbour")

	for i := range uint32(2 * neighMax) {
		ip := net.IP(binary.BigEndian.AppendUint32(nil, u32("100.64.0.1")+i))
		r.neighbour(&netlink.Neigh{LinkIndex: r.index, Family: unix.AF_INET, IP: ip, State: netlink.NUD_REACHABLE,
			HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 1}}, true)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	require.Len(t, r.neighs, neighMax)
}

// Two routes by one next hop may have MTUs of their own; the neighbour is one.
func TestHopsByMTU(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	output(t, w.Pod, "ip", "route", "add", "203.0.113.0/24", "via", enginetest.OutsideIP, "mtu", "1400")
	r := newRouter(t, w.Pod)
	wide, narrow := u32("198.51.100.1"), u32("203.0.113.1")
	a, b := settled(t, r, wide), settled(t, r, narrow)
	require.Equal(t, 1500, a.MTU)
	require.Equal(t, 1400, b.MTU)
	require.Same(t, a, r.Route(wide), "the other route changes nothing")
	require.Same(t, b, r.Route(narrow))
	_, neighs := r.held()
	require.Equal(t, 1, neighs)

	output(t, w.Pod, "ip", "neigh", "replace", enginetest.OutsideIP, "lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "permanent")
	for _, h := range []*frame.Hop{a, b} {
		require.Eventually(t, func() bool { m, _ := h.Addr(); return m == frame.MAC{2, 0, 0, 0, 0, 0x99} }, deadline, time.Millisecond)
	}
	require.False(t, a.Retired() || b.Retired())
	for i := range 3 * mtuMax {
		r.mu.Lock()
		require.NotNil(t, r.hop(netip.MustParseAddr(enginetest.OutsideIP), 1000+i))
		require.LessOrEqual(t, len(r.neighs[netip.MustParseAddr(enginetest.OutsideIP)].hops), mtuMax)
		r.mu.Unlock()
	}
	require.True(t, a.Retired())
}

func TestRouterCloses(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	var r *Router
	enginetest.Must(t, w.Pod.Do(func() (err error) {
		r, err = NewRouter("eth0")
		return err
	}))
	r.Close() // returns when nobody listens any more
	require.Nil(t, r.Route(u32("198.51.100.1")), "after Close nothing is found and nothing breaks")
}

func FuzzParseRoute(f *testing.F) {
	f.Add([]byte{}, uint32(1))
	msg := make([]byte, 44)
	msg[4], msg[23] = 24, 1
	msg[28], msg[30] = 8, 4
	msg[36], msg[38] = 8, 5
	f.Add(msg, uint32(1))
	long := append([]byte(nil), msg...)
	long[28] = 200 // H: an attribute longer than its message
	f.Add(long, uint32(1))
	short := append([]byte(nil), msg...)
	short[28] = 1 // shorter than its own header
	f.Add(short, uint32(1))
	f.Fuzz(func(t *testing.T, b []byte, dst uint32) {
		parseRoute(b, netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, dst))))
	})
}

// The kernel finds the neighbour for frames that come before it is known, and
// does not take them for the pod's own.
func TestKernelResolves(t *testing.T) {
	r := newRig(t)
	var k *Kernel
	enginetest.Must(t, r.Pod.Do(func() (err error) {
		k, err = OpenKernel("eth0", 1)
		return err
	}))
	defer k.Close()
	output(t, r.Pod, "ip", "neigh", "flush", "all")
	ip := enginetest.IP{Src: podIP, Dst: outsideIP, ID: 77}
	want := enginetest.UDPFrame(enginetest.Eth{}, ip, enginetest.UDP{Src: 50000, Dst: 7}, enginetest.Payload(300, 1))
	send(t, k, want)
	p := r.next(r.outside(), "datagram", udp(50000, 7))
	require.Equal(t, want[14:], p.bytes[14:])
	require.Equal(t, r.outMAC[:], p.bytes[:6])

	f := gsoFrame(want, frame.ProtoUDP, 0)
	k.Push(0, []*frame.Frame{f})
	require.Equal(t, frame.ReasonNone, f.Reason)
	p = r.next(r.outside(), "datagram", udp(50000, 7))
	require.Equal(t, want[14:], p.bytes[14:], "checksum completed")

	// The flow is the guest's: its reply goes to the sink.
	send(t, r.out, enginetest.UDPFrame(r.eth(), toPod(), enginetest.UDP{Src: 7, Dst: 50000}, nil))
	r.next(r.in(), "reply on the sink", udp(7, 50000))
	require.NotContains(t, output(t, r.Pod, "nft", "list", "set", "netdev", "sidewire-eth0", "flows"), "elements")

	for name, c := range map[string]struct {
		f    *frame.Frame
		want frame.DropReason
	}{
		"GSO": {gsoFrame(want, frame.ProtoUDP, 100), frame.NoNeighbour},
		"ARP": {gsoFrame(enginetest.ARPFrame(enginetest.Eth{}, 1, frame.MAC{}, podIP, frame.MAC{}, outsideIP), 0, 0), frame.NotCarried},
	} {
		k.Push(0, []*frame.Frame{c.f})
		require.Equal(t, c.want, c.f.Reason, name)
	}
	f = gsoFrame(want, frame.ProtoUDP, 0)
	fs := []*frame.Frame{f}
	require.Zero(t, testing.AllocsPerRun(20, func() { k.Push(0, fs) }))
}
