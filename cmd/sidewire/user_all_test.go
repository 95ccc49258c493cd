package main

import (
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
	"sidewire/vhostuser/vhosttest"
)

// allScene is a scene with sidewire on sockets, run by a user whose one
// capability is CAP_NET_ADMIN, for a guest that lists no ports.
func allScene(t *testing.T, vcpus int, flags ...string) *scene {
	t.Helper()
	s := newScene(t, "sockets")
	pings(t, s.World)
	enginetest.Must(t, s.Pod.Sysctl("net/ipv4/ip_unprivileged_port_start", "0"))
	s.proc = startWith(t, s.World, ",+net_admin", spec("vm", vcpus), flags...)
	s.plug()
	s.serve()
	return s
}

// The rows of KubeVirt's table that sockets answer without `ports`, and those
// that they cannot answer alike, which docs/modes/masquerade.md lists.
func TestKubeVirt11AllPortsOnSockets(t *testing.T) {
	s := allScene(t, 1)
	s.proc.logs("msg=serving")
	assert.Contains(t, s.proc.log.String(), "every TCP and UDP port leads to the guest")
	assert.NotContains(t, s.proc.log.String(), "no ports are listed")
	for _, p := range []struct {
		name, want string
		kubevirt   string // where it is not the same
		try        func() string
	}{
		{"outside to pod 80 tcp", "vm, peer 10.244.1.1", "", func() string { return s.tcp(s.Outside, "10.244.1.5:80") }},
		{"outside to pod 80 udp", "vm, peer 10.244.1.1", "", func() string { return s.udp(s.Outside, "10.244.1.5:80") }},
		{"outside to pod 81", "vm, peer 10.244.1.1", "", func() string { return s.tcp(s.Outside, "10.244.1.5:81") }},
		{"outside to pod 81 udp", "pod, peer 10.244.1.1", "vm, peer 10.244.1.1", func() string { return s.udp(s.Outside, "10.244.1.5:81") }},
		{"outside to pod 4444", "refused by pod and vm", "refused by vm", func() string { return s.tcp(s.Outside, "10.244.1.5:4444") }},
		{"outside to pod 4444 udp", "timeout", "refused by vm", func() string { return s.udp(s.Outside, "10.244.1.5:4444") }},
		{"outside to pod 7777", "refused by pod and vm", "refused by vm", func() string { return s.tcp(s.Outside, "10.244.1.5:7777") }},
		{"second client", "vm, peer 10.244.1.7", "", func() string { return s.ask(s.Outside, "tcp4", otherIP, "10.244.1.5:80", 64) }},
		{"second client udp", "vm, peer 10.244.1.7", "", func() string { return s.ask(s.Outside, "udp4", otherIP, "10.244.1.5:80", 64) }},
		{"far client", "vm, peer 192.0.2.9", "", func() string { return s.tcp(s.far, "10.244.1.5:80") }},
		{"far client udp", "vm, peer 192.0.2.9", "", func() string { return s.udp(s.far, "10.244.1.5:80") }},
		{"datagrams of 9000 from outside", "vm, peer 10.244.1.1", "", func() string { return s.ask(s.Outside, "udp4", "", "10.244.1.5:80", 9000) }},
		{"loopback 80", "refused by pod", "vm, peer 10.0.2.1", func() string { return s.tcp(s.Pod, "127.0.0.1:80") }},
		{"loopback 7777", "pod, peer 127.0.0.1", "refused by vm", func() string { return s.tcp(s.Pod, "127.0.0.1:7777") }},
		{"loopback 7777 udp", "pod, peer 127.0.0.1", "refused by vm", func() string { return s.udp(s.Pod, "127.0.0.1:7777") }},
		{"pod to its own address 80", "refused by pod", "", func() string { return s.tcp(s.Pod, "10.244.1.5:80") }},
		{"pod to its own address 7777", "pod, peer 10.244.1.5", "", func() string { return s.tcp(s.Pod, "10.244.1.5:7777") }},
		{"pod to outside", "outside, peer 10.244.1.5", "", func() string { return s.tcp(s.Pod, "10.244.1.1:9001") }},
		{"pod to outside udp", "outside, peer 10.244.1.5", "", func() string { return s.udp(s.Pod, "10.244.1.1:9001") }},
		{"pod to outside closed udp", "refused by outside", "", func() string { return s.udp(s.Pod, "10.244.1.1:4444") }},
		{"guest to outside 9001", "outside, peer 10.244.1.5", "", func() string { return s.tcp(s.guest, "10.244.1.1:9001") }},
		{"guest to outside udp", "outside, peer 10.244.1.5", "", func() string { return s.udp(s.guest, "10.244.1.1:9001") }},
		{"guest to far", "far, peer 10.244.1.5", "", func() string { return s.tcp(s.guest, "192.0.2.9:9000") }},
		{"guest to outside closed", "refused by outside", "", func() string { return s.tcp(s.guest, "10.244.1.1:4444") }},
		{"guest to outside closed udp", "refused by outside", "", func() string { return s.udp(s.guest, "10.244.1.1:4444") }},
		{"guest to pod address 80", "refused by pod", "", func() string { return s.tcp(s.guest, "10.244.1.5:80") }},
		{"guest to pod address 7777", "pod, peer 10.244.1.5", "pod, peer 10.0.2.2", func() string { return s.tcp(s.guest, "10.244.1.5:7777") }},
		{"guest to gateway 7777", "pod, peer 127.0.0.1", "pod, peer 10.0.2.2", func() string { return s.tcp(s.guest, "10.0.2.1:7777") }},
		{"guest to gateway 4444", "refused by pod", "", func() string { return s.tcp(s.guest, "10.0.2.1:4444") }},
		{"ping outside to pod", "pod replies", "vm replies", func() string { return s.ping(s.Outside, "10.244.1.5") }},
		{"ping guest to outside", "outside replies", "", func() string { return s.ping(s.guest, "10.244.1.1") }},
	} {
		t.Run(p.name, func(t *testing.T) {
			s.t = t
			assert.NotEqual(t, p.want, p.kubevirt)
			assert.Equal(t, p.want, p.try())
		})
	}
	s.t = t
	i := s.proc.status().Interfaces[0]
	assert.True(t, i.Everything)
	assert.Nil(t, i.Forwards)
	assert.Contains(t, sidewire(t, "status", "--socket-dir", s.proc.dir).out, "every TCP and UDP port")
	s.dump()
}

// What the pod's processes have begun before and what they begin while the guest
// has everything stays theirs, over TCP and over UDP without a connection.
func TestAllPortsLeaveThePodsFlows(t *testing.T) {
	s := newScene(t, "sockets")
	s.serveAt(s.Outside, "outside", 9001)
	early := dialFrom(t, s.Pod, "10.244.1.1:9001")
	waiting, err := s.Pod.ListenPacket("udp4", "0.0.0.0:5353")
	require.NoError(t, err)
	defer waiting.Close()
	s.proc = startWith(t, s.World, ",+net_admin,+net_bind_service", spec("vm", 1))
	s.plug()
	s.serveAt(s.guest, "vm", 80, 5353)
	require.Equal(t, "vm, peer 10.244.1.1", s.tcp(s.Outside, "10.244.1.5:80"))
	assert.True(t, echoes(t, early, "from before"))
	late := dialFrom(t, s.Pod, "10.244.1.1:9001")
	assert.True(t, echoes(t, late, "from now"))
	asks := func(pc net.PacketConn) string {
		_, err := pc.WriteTo(make([]byte, 64), net.UDPAddrFromAddrPort(netip.MustParseAddrPort("10.244.1.1:9001")))
		require.NoError(t, err)
		require.NoError(t, pc.SetReadDeadline(time.Now().Add(soon)))
		b := make([]byte, 64)
		n, _, err := pc.ReadFrom(b)
		require.NoError(t, err)
		answer, _, _ := strings.Cut(string(b[:n]), "\n")
		return answer
	}
	assert.Equal(t, "outside, peer 10.244.1.5", asks(waiting))
	fresh, err := s.Pod.ListenPacket("udp4", "0.0.0.0:0")
	require.NoError(t, err)
	defer fresh.Close()
	assert.Equal(t, "outside, peer 10.244.1.5", asks(fresh))
	s.dump()
}

// Everything is put back at the end, and after a crash without anybody's help.
// Nobody else can take the ports meanwhile.
func TestAllPortsArePutBack(t *testing.T) {
	enginetest.Need(t, "nft", "ip")
	s := newScene(t, "sockets")
	before := footprint(t, s.Pod)
	s.proc = startWith(t, s.World, ",+net_admin", spec("vm", 1))
	assert.Contains(t, strings.Join(changes(before, footprint(t, s.Pod)), "\n"), "sidewire-sockets-eth0", "the comparison sees nothing")
	second := startWith(t, s.World, ",+net_admin", spec("vm", 1))
	second.logs("another sidewire serves this link")
	assert.False(t, second.status().Interfaces[0].Everything)
	second.stop()
	s.proc.stop()
	assert.Empty(t, changes(before, footprint(t, s.Pod)), "after an orderly end")
	p := startWith(t, s.World, ",+net_admin", spec("vm", 1))
	assert.True(t, p.status().Interfaces[0].Everything)
	p.kill()
	enginetest.Eventually(t, soon, func() bool { return len(changes(before, footprint(t, s.Pod))) == 0 })
}

// Ports that are forwarded by name come before all others, also those of another
// guest, and also where they are added later.
func TestAllPortsBesideForwards(t *testing.T) {
	enginetest.Need(t, "dhclient")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	other := frame.MAC{0x02, 0, 0, 0, 0xaa, 0x02}
	p := startWith(t, w, ",+net_admin", spec("vm", 2)+"---\n"+strings.Replace(spec("vm2", 1, "tcp:8082", "udp:8082"), guestMAC.String(), other.String(), 1),
		"--forward", "vm/red=8080:8081", "--forward", "vm/red=8080:8081/udp")
	a := startVM(t, p, vhosttest.Options{QueuePairs: 2})
	b := joinVM(t, vhosttest.Options{Path: filepath.Join(p.dir, "vm2", "red.sock"), MAC: other})
	s := &scene{World: w, t: t, guest: a.ns, far: b.ns, dir: a.dir, proc: p}
	s.serveAt(a.ns, "vm", 8081, 8083)
	s.serveAt(b.ns, "vm2", 8082, 8084)
	for port, want := range map[int]string{8080: "vm", 8081: "vm", 8082: "vm2", 8083: "vm"} {
		for range 4 { // by whichever worker
			assert.Equal(t, want+", peer 10.244.1.1", s.tcp(w.Outside, fmt.Sprint("10.244.1.5:", port)))
		}
	}
	for port, want := range map[int]string{8080: "vm", 8082: "vm2", 8083: "vm"} {
		for range 4 {
			assert.Equal(t, want+", peer 10.244.1.1", s.udp(w.Outside, fmt.Sprint("10.244.1.5:", port)))
		}
	}
	o := sidewire(t, "forward", "--socket-dir", p.dir, "add", "vm2/red", "tcp:9084:8084")
	require.Empty(t, o.err)
	assert.Equal(t, "vm2, peer 10.244.1.1", s.tcp(w.Outside, "10.244.1.5:9084"))
	o = sidewire(t, "forward", "--socket-dir", p.dir, "del", "vm2/red", "tcp:9084")
	require.Empty(t, o.err)
	assert.Equal(t, "refused by pod and vm", s.tcp(w.Outside, "10.244.1.5:9084"))
	assert.Contains(t, sidewire(t, "status", "--socket-dir", p.dir).out, "every TCP and UDP port, and tcp:8080:8081 udp:8080:8081")
	s.dump()
}

// Who sweeps all ports, over UDP and over TCP, costs nothing that stays, and
// others are served meanwhile and afterwards.
func TestAllPortsSwept(t *testing.T) {
	s := allScene(t, 1)
	require.NoError(t, s.Outside.Sysctl("net/ipv4/ip_local_port_range", "1024 65535"))
	pc, err := s.Outside.ListenPacket("udp4", "10.244.1.1:0")
	require.NoError(t, err)
	defer pc.Close()
	require.Equal(t, "vm, peer 10.244.1.7", s.ask(s.Outside, "udp4", otherIP, "10.244.1.5:80", 64))
	before := s.proc.status()
	for port := 1; port <= 65535; port++ {
		_, err := pc.WriteTo([]byte("sweep"), &net.UDPAddr{IP: net.ParseIP("10.244.1.5"), Port: port})
		require.NoError(t, err)
		if port%8192 == 0 {
			assert.Equal(t, "vm, peer 10.244.1.7", s.ask(s.Outside, "udp4", otherIP, "10.244.1.5:80", 64))
		}
	}
	st := s.proc.status()
	n, was := st.Interfaces[0].Sockets, before.Interfaces[0].Sockets
	assert.Equal(t, 1, was.UDPOpen)
	assert.Greater(t, n.Unasked, uint64(10000), "most of it got there")
	assert.LessOrEqual(t, n.UDPOpen, was.UDPOpen+2, "mappings are for ports that the guest answers from")
	assert.LessOrEqual(t, n.Sockets, was.Sockets+2)
	assert.Less(t, st.Memory, before.Memory+8<<20)

	for port := 20000; port < 24000; port++ {
		if c, err := s.Outside.Dial("tcp4", fmt.Sprint("10.244.1.5:", port), soon); err == nil {
			c.Close()
		}
	}
	enginetest.Eventually(t, soon, func() bool { return s.proc.status().Interfaces[0].Sockets.TCPOpen == 0 })
	n = s.proc.status().Interfaces[0].Sockets
	assert.Greater(t, n.Accepted, uint64(3900))
	assert.LessOrEqual(t, n.Sockets, was.Sockets+2)
	assert.Equal(t, "vm, peer 10.244.1.1", s.tcp(s.Outside, "10.244.1.5:80"))
	s.dump()
}

// A guest that does not answer leaves descriptors for what it begins itself,
// however many clients come.
func TestAllPortsLeaveDescriptors(t *testing.T) {
	s := newScene(t, "sockets")
	p := prepareNobody(t, s.World, spec("vm", 1))
	cmd := p.with(s.World, ",+net_admin")
	cmd.Args = append([]string{"sh", "-c", `ulimit -Hn 400; ulimit -n 400; exec "$@"`, "sh"}, cmd.Args...)
	cmd.Path = "/bin/sh"
	p.launch(cmd)
	defer p.stop()
	s.proc = p
	s.plug()
	require.NoError(t, s.guest.Run("ip", "route", "add", "blackhole", "10.244.1.7/32"))
	s.serveAt(s.Outside, "outside", 9001)
	for i := range 300 { // they reach the kernel of the pod at least
		d := net.Dialer{Timeout: soon, LocalAddr: &net.TCPAddr{IP: net.ParseIP(otherIP)}}
		require.NoError(t, s.Outside.Do(func() error {
			c, err := d.Dial("tcp4", fmt.Sprint("10.244.1.5:", 20000+i))
			if err == nil {
				t.Cleanup(func() { c.Close() })
			}
			return err
		}))
	}
	enginetest.Eventually(t, soon, func() bool { return p.status().Interfaces[0].Sockets.AcceptFailed > 0 })
	n := p.status().Interfaces[0].Sockets
	assert.LessOrEqual(t, n.Sockets, n.MaxSockets*3/4+1)
	assert.Equal(t, "outside, peer 10.244.1.5", s.tcp(s.guest, "10.244.1.1:9001"))
	assert.Equal(t, "outside, peer 10.244.1.5", s.udp(s.guest, "10.244.1.1:9001"))
}

// A guest's UDP port has one external port, whoever began: clients that it has
// never heard of come by the same, and its answers leave from there (RFC 4787
// REQ-1, REQ-8), also where a process of the pod has the port on the loopback.
func TestAllPortsRFC4787Mapping(t *testing.T) {
	for _, vcpus := range []int{1, 2} {
		s := allScene(t, vcpus)
		local, err := s.Pod.ListenPacket("udp4", "127.0.0.1:6000")
		require.NoError(t, err)
		defer local.Close()
		guest, err := s.guest.ListenPacket("udp4", "0.0.0.0:6000")
		require.NoError(t, err)
		defer guest.Close()
		type client struct {
			net.PacketConn
			addr string
		}
		open := func(ns *enginetest.NetNS, addr string) client {
			pc, err := ns.ListenPacket("udp4", addr+":0")
			require.NoError(t, err)
			t.Cleanup(func() { pc.Close() })
			return client{pc, pc.LocalAddr().String()}
		}
		to := net.UDPAddrFromAddrPort(netip.MustParseAddrPort("10.244.1.5:6000"))
		b := make([]byte, 64)
		want := func(pc net.PacketConn, text, from string) {
			t.Helper()
			require.NoError(t, pc.SetReadDeadline(time.Now().Add(soon)))
			n, who, err := pc.ReadFrom(b)
			require.NoError(t, err)
			assert.Equal(t, text+" from "+from, string(b[:n])+" from "+who.String())
		}
		for i, c := range []client{open(s.Outside, "10.244.1.1"), open(s.Outside, otherIP), open(s.far, farIP)} {
			for k := range 3 { // before and after there is a mapping
				_, err := c.WriteTo(fmt.Appendf(nil, "question %d %d", i, k), to)
				require.NoError(t, err)
				want(guest, fmt.Sprintf("question %d %d", i, k), c.addr)
			}
			_, err := guest.WriteTo([]byte("answer"), c.LocalAddr())
			require.NoError(t, err)
			want(c, "answer", "10.244.1.5:6000")
		}
		assert.Equal(t, 1, s.proc.status().Interfaces[0].Sockets.UDPOpen)
		s.dump()
	}
}

// What cannot be of all ports is said with its reason.
func TestAllPortsThatCannotBe(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startWith(t, w, ",+net_admin", spec("vm", 1), "--uplink", "red=eth7")
	p.logs(`none of them reaches the guest from outside: list ports, or name some with --forward" interface=vm/red why="link eth7 has no IPv4 address"`)
	p.stop()
	require.NoError(t, w.Pod.Sysctl("net/ipv4/ip_unprivileged_port_start", "1000"))
	p = startWith(t, w, ",+net_admin", spec("vm", 1))
	p.logs("answers from low UDP ports leave from others")
	p.logs("ports=1-999")
}
