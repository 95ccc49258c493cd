package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
)

// onMesh is a VMI that asks for Istio's proxy.
func onMesh(vmi string) string {
	return strings.Replace(vmi, "metadata:\n", "metadata:\n  annotations: {sidecar.istio.io/inject: \"true\"}\n", 1)
}

// originalDst is whom a redirected connection was for.
func originalDst(c net.Conn) (to netip.AddrPort) {
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return to
	}
	_ = raw.Control(func(fd uintptr) {
		const soOriginalDst = 80
		if m, err := unix.GetsockoptIPv6Mreq(int(fd), unix.IPPROTO_IP, soOriginalDst); err == nil {
			to = netip.AddrPortFrom(netip.AddrFrom4([4]byte(m.Multiaddr[4:8])), binary.BigEndian.Uint16(m.Multiaddr[2:4]))
		}
	})
	return to
}

// serveMesh plays Istio's proxy in a scene's pod: it gets all TCP that arrives, whatever link that is, and all that is sent to
// its port for what goes out, and says of each connection whom it was for.
func (s *scene) serveMesh(seen *names) {
	s.t.Helper()
	relay := func(c net.Conn, what, from string, to netip.AddrPort) {
		seen.add(fmt.Sprint(what, " ", to))
		d := net.Dialer{Timeout: soon, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		var on net.Conn
		if s.Pod.Do(func() (err error) { on, err = d.Dial("tcp4", to.String()); return err }) != nil {
			_ = c.(*net.TCPConn).SetLinger(0)
			return
		}
		defer on.Close()
		go func() { _, _ = io.Copy(on, c); _ = on.(*net.TCPConn).CloseWrite() }()
		_, _ = io.Copy(c, on)
	}
	listen(s.t, s.Pod, "tcp4", "0.0.0.0:15001", func(c net.Conn) { relay(c, "out", "0.0.0.0", originalDst(c)) })
	listen(s.t, s.Pod, "tcp4", "0.0.0.0:15006", func(c net.Conn) {
		relay(c, "in", "127.0.0.6", netip.AddrPortFrom(netip.MustParseAddr(enginetest.PodIP), originalDst(c).Port()))
	})
	s.serveAt(s.Pod, "proxy", 15000, 15021)
	rules := writeFile(s.t, "istio.nft", `table ip istio {
	chain prerouting {
		type nat hook prerouting priority dstnat
		tcp dport != { 15000, 15021 } ip saddr != 127.0.0.0/8 redirect to :15006
	}
}
`)
	out, err := runIn(s.Pod, s.dir, "nft", "-f", rules)
	require.NoError(s.t, err, out)
}

// A guest beside Istio's proxy (kubevirt.md 1.1): port 22 reaches it directly, all else by the proxy, which comes from 127.0.0.6;
// its own connections go to the proxy, whose ports stay its own.
func TestIstioRow83(t *testing.T) {
	for name, ports := range map[string][]string{"no ports": nil, "ports 80": {"tcp:80"}} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, "sidewire")
			var seen names
			s.serveMesh(&seen)
			before := footprint(t, s.Pod)
			s.proc = startSidewire(t, s.World, onMesh(spec("vm", 1, ports...)))
			s.plug()
			s.serve()
			s.serveAt(s.guest, "vm", 22)
			s.settle()
			kubevirt := func(all, listed string) string { return map[bool]string{true: all, false: listed}[ports == nil] }
			for what, c := range map[string]struct{ got, want string }{
				"outside to 22":          {s.tcp(s.Outside, "10.244.1.5:22"), "vm, peer 10.244.1.1"},
				"outside to 80":          {s.tcp(s.Outside, "10.244.1.5:80"), "vm, peer 10.0.2.1"},
				"outside to 81":          {s.tcp(s.Outside, "10.244.1.5:81"), kubevirt("vm, peer 10.0.2.1", "pod, peer 127.0.0.6")},
				"outside to the health":  {s.tcp(s.Outside, "10.244.1.5:15021"), "proxy, peer 10.244.1.1"},
				"outside to 80 udp":      {s.udp(s.Outside, "10.244.1.5:80"), "refused by pod"},
				"ping":                   {s.ping(s.Outside, "10.244.1.5"), "pod replies"},
				"loopback 80":            {s.tcp(s.Pod, "127.0.0.1:80"), "vm, peer 10.0.2.1"},
				"loopback 15000":         {s.tcp(s.Pod, "127.0.0.1:15000"), "proxy, peer 127.0.0.1"},
				"pod's address 80":       {s.tcp(s.Pod, "10.244.1.5:80"), "vm, peer 10.244.1.5"},
				"pod's address 15000":    {s.tcp(s.Pod, "10.244.1.5:15000"), "proxy, peer 10.244.1.5"},
				"loopback 7777":          {s.tcp(s.Pod, "127.0.0.1:7777"), kubevirt("refused by vm", "pod, peer 127.0.0.1")},
				"guest to outside":       {s.tcp(s.guest, "10.244.1.1:9001"), "outside, peer 10.244.1.5"},
				"guest to far":           {s.tcp(s.guest, farIP+":9000"), "far, peer 10.244.1.5"},
				"guest to outside udp":   {s.udp(s.guest, "10.244.1.1:9001"), "outside, peer 10.244.1.5"},
				"guest pings outside":    {s.ping(s.guest, "10.244.1.1"), "outside replies"},
				"pod to outside":         {s.tcp(s.Pod, "10.244.1.1:9001"), "outside, peer 10.244.1.5"},
				"guest to gateway 15021": {s.tcp(s.guest, "10.0.2.1:15021"), "proxy, peer 10.0.2.2"},
			} {
				assert.Equal(t, c.want, c.got, what)
			}
			for _, want := range []string{"in 10.244.1.5:80", "in 10.244.1.5:81", "out 10.244.1.1:9001", "out 192.0.2.9:9000"} {
				assert.Contains(t, seen.list(), want)
			}
			assert.NotContains(t, seen.list(), "in 10.244.1.5:22")
			carry(t, s.guest, s.far, farIP+":7000", 4, 4<<20)
			assert.Equal(t, []forwardRequest{{Protocol: "TCP", Port: 22}}, s.proc.status().Interfaces[0].Forwards)
			assert.Equal(t, "istio", s.proc.status().Interfaces[0].Proxy)
			assert.Regexp(t, `proxy +istio, for all else`, sidewire(t, "status", "--socket-dir", s.proc.dir).out)
			s.dump()
			s.proc.stop()
			assert.Empty(t, changes(before, footprint(t, s.Pod)))
		})
	}
}

// On sockets the guest's connections are a process of the pod's, so the proxy has them as it has others'; what it brings comes to
// the ports that are listed. All ports are not taken from it.
func TestIstioRow83OnSockets(t *testing.T) {
	s := newScene(t, "sockets")
	var seen names
	s.serveMesh(&seen)
	s.proc = startWith(t, s.World, ",+net_admin", onMesh(spec("vm", 1, "tcp:8080")))
	s.plug()
	s.serveAt(s.guest, "vm", 8080)
	assert.Equal(t, "vm, peer 10.0.2.1", s.tcp(s.Outside, "10.244.1.5:8080"))
	assert.Equal(t, []string{"in 10.244.1.5:8080"}, seen.list())
	assert.Equal(t, "proxy, peer 10.244.1.1", s.tcp(s.Outside, "10.244.1.5:15021"))
	s.proc.stop()
	p := startWith(t, s.World, ",+net_admin", onMesh(spec("vm", 1)))
	assert.False(t, p.status().Interfaces[0].Everything)
	assert.Contains(t, p.log.String(), "Istio's proxy has what comes from outside")
}
