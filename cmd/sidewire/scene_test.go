package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

// Addresses of a scene beside those of its World.
const (
	guestIP   = "10.0.2.2"
	gatewayIP = "10.0.2.1"
	otherIP   = "10.244.1.7" // a second address of the outside
	hopIP     = "192.0.2.1"  // the outside's side of the far network
	farIP     = "192.0.2.9"  // a host one hop behind the outside
	farMTU    = 1400

	soon = 5 * time.Second
	// silence is how long a probe waits before it says that nobody answers.
	silence = 1500 * time.Millisecond
)

// scene is a guest in its pod, an outside and a far host behind it, with
// servers everywhere. What joins guest and pod is sidewire, or the kernel in
// the way of KubeVirt, which is the reference.
type scene struct {
	*enginetest.World
	t     *testing.T
	kind  string
	guest *enginetest.NetNS
	far   *enginetest.NetNS
	dir   string
	proc  *process            // sidewire's
	tap   *vhosttest.TapGuest // sidewire's
}

// sidewireScene is a scene with sidewire.
func sidewireScene(t *testing.T, ports ...string) *scene {
	t.Helper()
	s := newScene(t, "sidewire")
	s.proc = startSidewire(t, s.World, spec("vm", 1, ports...))
	s.plug()
	s.serve()
	return s
}

// plug joins the guest to sidewire and configures it.
func (s *scene) plug() {
	s.t.Helper()
	tap, err := vhosttest.StartTapGuest(vhosttest.TapOptions{
		Options: vhosttest.Options{Path: s.proc.socket(), MAC: guestMAC}, NetNS: s.guest.Path,
	})
	require.NoError(s.t, err)
	s.tap = tap
	s.t.Cleanup(func() { tap.Close() })
	s.configureGuest()
}

// settle waits until sidewire knows its next hop. Until then frames leave
// through a raw socket of the pod, whose kernel counts the guest's ICMP errors
// among its own.
func (s *scene) settle() {
	s.t.Helper()
	if s.proc == nil {
		return
	}
	viaKernel := func() uint64 {
		for _, p := range s.proc.status().Ports {
			if strings.HasSuffix(p.Name, " kernel") {
				return p.OutFrames
			}
		}
		s.t.Fatal("there is no such port")
		return 0
	}
	require.True(s.t, enginetest.Wait(soon, func() bool {
		before := viaKernel()
		return s.udp(s.guest, enginetest.OutsideIP+":9001") != "timeout" && viaKernel() == before
	}))
}

// kernelScene is a scene that is KubeVirt's own: bridge, forwarding and NAT
// rules, and what QEMU with vhost-net does between the two taps.
func kernelScene(t *testing.T, ports ...string) *scene {
	t.Helper()
	s := newScene(t, "kernel")
	pair, err := vhosttest.StartTapPair(
		vhosttest.Tap{NetNS: s.guest.Path, Name: "eth0", MAC: guestMAC, MTU: 1500},
		vhosttest.Tap{NetNS: s.Pod.Path, Name: "tap0", MTU: 1500}, 1)
	require.NoError(t, err)
	t.Cleanup(func() { pair.Close() })
	enginetest.Must(t,
		s.Pod.Run("ip", "link", "add", "k6t-eth0", "address", "02:00:00:00:00:00", "mtu", "1500", "type", "bridge"),
		s.Pod.Run("ip", "link", "set", "tap0", "master", "k6t-eth0"),
		s.Pod.Run("ip", "addr", "add", gatewayIP+"/24", "dev", "k6t-eth0"),
		s.Pod.Up("k6t-eth0"),
		s.Pod.Sysctl("net/ipv4/ip_forward", "1"),
		s.Pod.Sysctl("net/ipv4/conf/k6t-eth0/route_localnet", "1"))
	out, err := runIn(s.Pod, s.dir, "nft", "-f", writeFile(t, "rules.nft", kubevirtRules(ports)))
	require.NoError(t, err, out)
	s.configureGuest()
	s.serve()
	return s
}

// kubevirtRules are those of reference/kubevirt.md, section 1.1.
func kubevirtRules(ports []string) string {
	var in, post, out strings.Builder
	if len(ports) == 0 {
		ports = []string{""}
	}
	for _, p := range ports {
		match := ""
		if proto, port, ok := strings.Cut(p, ":"); ok {
			match = proto + " dport " + port + " "
		}
		fmt.Fprintf(&in, "%sdnat to %s\n", match, guestIP)
		fmt.Fprintf(&post, "ip saddr 127.0.0.1 %ssnat to %s\n", match, gatewayIP)
		fmt.Fprintf(&out, "ip daddr 127.0.0.1 %sdnat to %s\n", match, guestIP)
	}
	return fmt.Sprintf(`table ip nat {
	chain KUBEVIRT_PREINBOUND {
		%s}
	chain KUBEVIRT_POSTINBOUND {
		%s}
	chain prerouting {
		type nat hook prerouting priority dstnat
		iifname "eth0" jump KUBEVIRT_PREINBOUND
	}
	chain output {
		type nat hook output priority -100
		%s}
	chain postrouting {
		type nat hook postrouting priority srcnat
		ip saddr %s masquerade
		oifname "k6t-eth0" jump KUBEVIRT_POSTINBOUND
	}
}
`, &in, &post, &out, guestIP)
}

func newScene(t *testing.T, kind string) *scene {
	t.Helper()
	enginetest.Need(t, "root", "netns", "tun", "nft", "ip", "ping")
	s := &scene{
		World: enginetest.NewWorld(t, enginetest.WorldOptions{}), t: t, kind: kind,
		guest: enginetest.NewNetNS(t), far: enginetest.NewNetNS(t), dir: t.TempDir(),
	}
	enginetest.Veth(t, s.Outside, "veth1", s.far, "eth0")
	enginetest.Must(t,
		s.Outside.Addr("veth0", otherIP+"/24"),
		s.Outside.Addr("veth1", hopIP+"/24"), s.far.Addr("eth0", farIP+"/24"),
		s.Outside.SetMTU("veth1", farMTU), s.far.SetMTU("eth0", farMTU),
		s.far.Route("default", hopIP),
		s.Outside.Sysctl("net/ipv4/ip_forward", "1"))
	// Pod and outside know each other: a frame that asks the kernel to find its
	// neighbour is counted there, in what refusals reads.
	enginetest.Must(t, s.Pod.Run("ping", "-c", "1", "-W", "5", "10.244.1.1"))
	return s
}

// configureGuest gives the guest its address by hand, which is quicker than a
// lease.
func (s *scene) configureGuest() {
	s.t.Helper()
	enginetest.Must(s.t, s.guest.Addr("eth0", guestIP+"/24"), s.guest.Up("eth0"), s.guest.Route("default", gatewayIP))
}

// serve starts the servers of the probes: the guest on 80 and 81, the pod on
// 81, 7777 and 45000, which is in the NAT's range, the outside on 9001 (9000 is HTTP), the far host on 9000.
func (s *scene) serve() {
	s.t.Helper()
	s.serveAt(s.guest, "vm", 80, 81)
	s.serveAt(s.Pod, "pod", 81, 7777, 45000)
	s.serveAt(s.Outside, "outside", 9001)
	s.serveAt(s.far, "far", 9000)
}

// serveAt listens on TCP and UDP ports of a namespace. Whoever comes is told
// by which address it is seen; a TCP connection then echoes.
func (s *scene) serveAt(ns *enginetest.NetNS, name string, ports ...int) {
	s.t.Helper()
	for _, port := range ports {
		addr := net.JoinHostPort("0.0.0.0", strconv.Itoa(port))
		listen(s.t, ns, "tcp4", addr, func(c net.Conn) {
			fmt.Fprintf(c, "%s, peer %s\n", name, hostOf(c.RemoteAddr()))
			_, _ = io.Copy(c, c) // until the other end has enough
		})
		pc, err := ns.ListenPacket("udp4", addr)
		require.NoError(s.t, err)
		s.t.Cleanup(func() { pc.Close() })
		go func() {
			b := make([]byte, 65536)
			for {
				n, from, err := pc.ReadFrom(b)
				if err != nil {
					return
				}
				// The answer is as long as the question.
				reply := make([]byte, n)
				copy(reply, fmt.Sprintf("%s, peer %s\n", name, hostOf(from)))
				_, _ = pc.WriteTo(reply, from)
			}
		}()
	}
}

func hostOf(a net.Addr) string {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return a.String()
	}
	return ap.Addr().Unmap().String()
}

// tcp connects from a namespace and says who answered.
func (s *scene) tcp(ns *enginetest.NetNS, to string) string { return s.ask(ns, "tcp4", "", to, 64) }

// udp sends a datagram from a namespace and says who answered.
func (s *scene) udp(ns *enginetest.NetNS, to string) string { return s.ask(ns, "udp4", "", to, 64) }

// ask connects from a namespace and, if given, a local address, sends size
// bytes and says who answered: "NAME, peer ADDRESS", "refused by NAME" or
// "timeout".
func (s *scene) ask(ns *enginetest.NetNS, network, from, to string, size int) string {
	s.t.Helper()
	before := s.refusals()
	d := net.Dialer{Timeout: silence, FallbackDelay: -1}
	if from != "" {
		local := netip.MustParseAddr(from).AsSlice()
		if network == "udp4" {
			d.LocalAddr = &net.UDPAddr{IP: local}
		} else {
			d.LocalAddr = &net.TCPAddr{IP: local}
		}
	}
	var c net.Conn
	err := ns.Do(func() (err error) { c, err = d.Dial(network, to); return err })
	if err != nil {
		return s.verdict(err, before)
	}
	defer c.Close()
	require.NoError(s.t, c.SetDeadline(time.Now().Add(silence)))
	if network == "udp4" {
		if _, err := c.Write(make([]byte, size)); err != nil {
			return s.verdict(err, before)
		}
	}
	b := make([]byte, 65536)
	n, err := c.Read(b)
	if err != nil {
		return s.verdict(err, before)
	}
	answer, _, _ := strings.Cut(string(b[:n]), "\n")
	if network == "udp4" && n != size {
		return fmt.Sprintf("%s (%d bytes of %d)", answer, n, size)
	}
	return answer
}

func (s *scene) verdict(err error, before map[string]uint64) string {
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET):
		return "refused by " + s.refusedSince(before)
	case errors.Is(err, syscall.EHOSTUNREACH):
		return "unreachable"
	case errors.Is(err, os.ErrDeadlineExceeded), os.IsTimeout(err):
		return "timeout"
	}
	return err.Error()
}

// places are the hosts of a scene by name.
func (s *scene) places() map[string]*enginetest.NetNS {
	return map[string]*enginetest.NetNS{"vm": s.guest, "pod": s.Pod, "outside": s.Outside, "far": s.far}
}

// refusals counts for each host the resets and unreachables that it sent.
func (s *scene) refusals() map[string]uint64 {
	s.t.Helper()
	out := map[string]uint64{}
	for name, ns := range s.places() {
		n := snmp(s.t, ns)
		out[name] = n["Tcp OutRsts"] + n["Icmp OutDestUnreachs"]
	}
	return out
}

// refusedSince names the hosts that refused something since.
func (s *scene) refusedSince(before map[string]uint64) string {
	s.t.Helper()
	now := s.refusals()
	var who []string
	for _, name := range sortedKeys(now) {
		if now[name] != before[name] {
			who = append(who, name)
		}
	}
	if len(who) == 0 {
		return "nobody" // an answer that no host's kernel made
	}
	return strings.Join(who, " and ")
}

// snmp reads the counters of a namespace's IP stack, "Icmp InEchos" for
// instance.
func snmp(t *testing.T, ns *enginetest.NetNS) map[string]uint64 {
	t.Helper()
	var b []byte
	require.NoError(t, ns.Do(func() (err error) { b, err = os.ReadFile("/proc/thread-self/net/snmp"); return err }))
	out := map[string]uint64{}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	for i := 0; i+1 < len(lines); i += 2 {
		names, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
		for j := 1; j < min(len(names), len(values)); j++ {
			n, _ := strconv.ParseUint(values[j], 10, 64) // negative ones are no counters
			out[strings.TrimSuffix(names[0], ":")+" "+names[j]] = n
		}
	}
	return out
}

// ping runs ping in a namespace and says what came of it: who answered the
// request, or the error that came instead.
func (s *scene) ping(ns *enginetest.NetNS, args ...string) string {
	s.t.Helper()
	before := map[string]uint64{}
	for name, place := range s.places() {
		before[name] = snmp(s.t, place)["Icmp OutEchoReps"]
	}
	out, err := runIn(ns, s.dir, "ping", append([]string{"-n", "-c", "1", "-W", "1"}, args...)...)
	if err == nil {
		for _, name := range sortedKeys(s.places()) {
			if snmp(s.t, s.places()[name])["Icmp OutEchoReps"] != before[name] {
				return name + " replies"
			}
		}
		return "somebody replies"
	}
	for _, line := range strings.Split(out, "\n") {
		if _, local, ok := strings.Cut(line, "ping: "); ok {
			return local
		}
		if line, ok := strings.CutPrefix(line, "From "); ok {
			from, _, _ := strings.Cut(line, " ")
			_, what, _ := strings.Cut(line, "icmp_seq=1 ")
			return from + ": " + what
		}
	}
	return "timeout"
}

// raw sends an IP packet of any protocol from one namespace to an address and
// says as what it is seen in another: "FROM to TO".
func (s *scene) raw(proto int, from *enginetest.NetNS, to string, at *enginetest.NetNS, payload []byte) string {
	s.t.Helper()
	recv := s.rawSocket(at, proto)
	defer unix.Close(recv)
	send := s.rawSocket(from, proto)
	defer unix.Close(send)
	require.NoError(s.t, unix.Sendto(send, payload, 0, &unix.SockaddrInet4{Addr: netip.MustParseAddr(to).As4()}))
	return rawSeen(recv, payload)
}

func (s *scene) rawSocket(ns *enginetest.NetNS, proto int) (fd int) {
	s.t.Helper()
	require.NoError(s.t, ns.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto)
		return err
	}))
	limit := unix.NsecToTimeval(silence.Nanoseconds())
	require.NoError(s.t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit))
	return fd
}

func rawSeen(fd int, payload []byte) string {
	b := make([]byte, 65536)
	for {
		n, err := unix.Read(fd, b)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n < 20 {
			return "not seen"
		}
		if string(b[20:n]) != string(payload) {
			continue
		}
		src, dst := netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		return src.String() + " to " + dst.String()
	}
}

// dump shows what sidewire counted, if the test failed.
func (s *scene) dump() {
	if s.t.Failed() && s.proc != nil && s.proc.cmd != nil {
		s.t.Log(s.proc.dump())
	}
}

// echoes asserts that an open connection to one of the servers still carries
// data both ways.
func echoes(t *testing.T, c net.Conn, msg string) bool {
	t.Helper()
	if !assert.NoError(t, c.SetDeadline(time.Now().Add(2*soon))) {
		return false
	}
	_, err := io.WriteString(c, msg)
	if !assert.NoError(t, err) {
		return false
	}
	b := make([]byte, len(msg))
	_, err = io.ReadFull(c, b)
	return assert.NoError(t, err) && assert.Equal(t, msg, string(b))
}
