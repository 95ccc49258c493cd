package usernet

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// freePort is a port of the host's loopback that nobody has, for TCP and UDP.
func freePort(t testing.TB) uint16 {
	t.Helper()
	for {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		require.NoError(t, err)
		addr := l.Addr().(*net.TCPAddr).AddrPort()
		pc, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(addr))
		l.Close()
		if err == nil {
			pc.Close()
			return addr.Port()
		}
	}
}

// forward adds a TCP forward of a free port to the guest's port 80. A port that
// is free at one address may be a client's at another.
func (w *world) forward() Forward {
	w.t.Helper()
	for {
		f := Forward{Proto: frame.ProtoTCP, Port: freePort(w.t), Guest: 80}
		err := w.net.AddForward(f)
		if errors.Is(err, unix.EADDRINUSE) {
			continue
		}
		require.NoError(w.t, err)
		return f
	}
}

// clientsOfOnePort makes sockets that have one port at as many loopback
// addresses. All are bound before any is used: somebody else may have the port at
// one of them.
func clientsOfOnePort(t testing.TB, count int) (fds []int) {
	t.Helper()
	for len(fds) < count {
		port := int(freePort(t))
		for i := range count {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			require.NoError(t, err)
			fds = append(fds, fd)
			if unix.Bind(fd, &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 1, byte(i + 1)}}) != nil {
				for _, fd := range fds {
					_ = unix.Close(fd)
				}
				fds = nil
				break
			}
		}
	}
	t.Cleanup(func() {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	})
	return fds
}

// dials connects to a port of the host's loopback.
func dials(t testing.TB, port uint16) *net.TCPConn {
	t.Helper()
	d := net.Dialer{Timeout: patience}
	c, err := d.Dial("tcp4", netip.AddrPortFrom(localIP, port).String())
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// wantSYN wants a client to knock at a port of the guest's.
func (w *world) wantSYN(port uint16) arrived {
	w.t.Helper()
	a, ok := w.wait(patience, func(a *arrived) bool { return a.tcp != nil })
	require.True(w.t, ok, "no client came")
	require.True(w.t, a.tcp.SYN && !a.tcp.ACK, "%v", a.tcp)
	require.Equal(w.t, port, uint16(a.tcp.DstPort))
	return a
}

func TestForwardTCP(t *testing.T) {
	w := newWorld(t)
	f := w.forward()
	require.Equal(t, []Forward{f}, w.net.Forwards())
	c := dials(t, f.Port)
	syn := w.wantSYN(80)
	// A guest cannot answer 127.0.0.1.
	assert.Equal(t, gatewayIP, syn.src())
	assert.Equal(t, c.LocalAddr().(*net.TCPAddr).AddrPort().Port(), uint16(syn.tcp.SrcPort))
	var flows []FlowInfo
	w.net.Flows(w.now, func(i FlowInfo) bool { flows = append(flows, i); return true })
	require.Len(t, flows, 1)
	assert.Equal(t, FlowInfo{
		Proto: frame.ProtoTCP, GuestAddr: guestIP, GuestPort: 80, ExternalPort: f.Port, Remote: gatewayIP,
		RemotePort: uint16(syn.tcp.SrcPort), Inbound: true, State: "syn-sent", Bytes: flows[0].Bytes,
	}, flows[0])
	st := w.net.Stats()
	assert.Equal(t, uint64(1), st.Accepted)
	assert.Equal(t, 1, st.TCPOpen)
	assert.Equal(t, 2, st.Sockets, "listener and connection")

	// When the forward is gone, its connections are not.
	require.NoError(t, w.net.RemoveForward(f))
	assert.Empty(t, w.net.Forwards())
	assert.Equal(t, 1, w.net.Stats().Sockets)
	_, err := net.Dial("tcp4", netip.AddrPortFrom(localIP, f.Port).String())
	require.ErrorIs(t, err, unix.ECONNREFUSED)
	assert.Equal(t, 1, w.net.Stats().TCPOpen)
	require.ErrorContains(t, w.net.RemoveForward(f), "there is none")
}

// The guest sees clients as themselves where it can answer them.
func TestForwardClientAddress(t *testing.T) {
	pod := enginetest.NewWorld(t, enginetest.WorldOptions{})
	outside, podIP := netip.MustParseAddr(enginetest.OutsideIP), netip.MustParseAddr(enginetest.PodIP)
	enginetest.Must(t, pod.Outside.Addr("veth0", "10.0.2.200/24"), pod.Pod.Run("ip", "route", "add", "10.0.2.200/32", "dev", "eth0"))
	for name, c := range map[string]struct {
		from     *enginetest.NetNS
		as       string
		to       netip.Addr
		options  []option
		wantFrom netip.Addr
	}{
		"from outside":                    {pod.Outside, "", podIP, nil, outside},
		"from outside, as the gateway":    {pod.Outside, "", podIP, []option{func(c *Config) { c.GatewaySource = true }}, gatewayIP},
		"from the pod to its address":     {pod.Pod, "", podIP, nil, gatewayIP},
		"from the pod to its loopback":    {pod.Pod, "", localIP, nil, gatewayIP},
		"from the pod's other loopback":   {pod.Pod, "127.9.9.9:0", localIP, nil, gatewayIP},
		"from the guest's network's twin": {pod.Outside, "10.0.2.200:0", podIP, nil, gatewayIP},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, append(c.options, inPod(t, pod.Pod))...)
			require.NoError(t, w.net.AddForward(Forward{Proto: frame.ProtoTCP, Port: 8080, Guest: 80}))
			d := net.Dialer{Timeout: patience}
			if c.as != "" {
				d.LocalAddr = net.TCPAddrFromAddrPort(netip.MustParseAddrPort(c.as))
			}
			require.NoError(t, c.from.Do(func() error {
				conn, err := d.Dial("tcp4", netip.AddrPortFrom(c.to, 8080).String())
				if err == nil {
					t.Cleanup(func() { conn.Close() })
				}
				return err
			}))
			syn := w.wantSYN(80)
			assert.Equal(t, c.wantFrom, syn.src())
		})
	}
}

// Clients that are shown as the gateway may have the same port.
func TestForwardGatewayPorts(t *testing.T) {
	for _, n := range []int{1, 2, 3} {
		w := newWorld(t, workers(n))
		f := w.forward()
		seen := map[uint16]bool{}
		for _, fd := range clientsOfOnePort(t, 20) {
			require.NoError(t, unix.Connect(fd, &unix.SockaddrInet4{Port: int(f.Port), Addr: localIP.As4()}))
			a := w.wantSYN(80)
			assert.Equal(t, gatewayIP, a.src())
			assert.False(t, seen[uint16(a.tcp.SrcPort)], "port %d twice", a.tcp.SrcPort)
			seen[uint16(a.tcp.SrcPort)] = true
		}
	}
}

func TestForwardFaults(t *testing.T) {
	w := newWorld(t)
	f := w.forward()
	taken, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	defer taken.Close()
	takenUDP, _ := hostUDP(t)
	for name, c := range map[string]struct {
		f    Forward
		want string
	}{
		"twice":        {f, "forward " + f.String() + ": there is one already"},
		"port in use":  {Forward{Proto: frame.ProtoTCP, Port: taken.Addr().(*net.TCPAddr).AddrPort().Port()}, "address already in use: another process listens there; end it, or forward another port"},
		"UDP in use":   {Forward{Proto: frame.ProtoUDP, Port: takenUDP.LocalAddr().(*net.UDPAddr).AddrPort().Port()}, "address already in use"},
		"not ours":     {Forward{Proto: frame.ProtoTCP, Addr: netip.MustParseAddr("192.0.2.1"), Port: 8080}, "forward 192.0.2.1:8080/tcp: cannot assign requested address: 192.0.2.1 is no address of this host"},
		"IPv6":         {Forward{Proto: frame.ProtoTCP, Addr: netip.IPv6Loopback(), Port: 8080}, "want an IPv4 address"},
		"ICMP":         {Forward{Proto: frame.ProtoICMP, Port: 8}, "protocol 1 cannot be forwarded: want TCP or UDP"},
		"without port": {Forward{Proto: frame.ProtoTCP, Guest: 80}, "port 0 cannot be forwarded"},
	} {
		before := w.net.Stats().Sockets
		require.ErrorContains(t, w.net.AddForward(c.f), c.want, name)
		require.Equal(t, before, w.net.Stats().Sockets, "%s: descriptors", name)
	}
	assert.ErrorContains(t, explain(unix.EACCES, Forward{Port: 80}), "it takes CAP_NET_BIND_SERVICE, or the setting net.ipv4.ip_unprivileged_port_start of at most 80")
	assert.ErrorContains(t, explain(unix.EMFILE, Forward{Port: 80}), "ulimit -n")
	require.NoError(t, w.net.Close())
	require.ErrorContains(t, w.net.AddForward(Forward{Proto: frame.ProtoTCP, Port: 8080}), "closed")
}

// Two sidewires do not share a port by accident, though listeners of several
// workers do.
func TestForwardIsExclusive(t *testing.T) {
	a, b := newWorld(t, workers(2)), newWorld(t, workers(2))
	f := a.forward()
	require.ErrorIs(t, b.net.AddForward(f), unix.EADDRINUSE)
}

func TestForwardString(t *testing.T) {
	for want, f := range map[string]Forward{
		"80/tcp":              {Proto: frame.ProtoTCP, Port: 80},
		"80/udp":              {Proto: frame.ProtoUDP, Port: 80, Guest: 80},
		"8080:80/tcp":         {Proto: frame.ProtoTCP, Port: 8080, Guest: 80},
		"127.0.0.1:80:81/udp": {Proto: frame.ProtoUDP, Addr: localIP, Port: 80, Guest: 81},
	} {
		assert.Equal(t, want, f.String())
	}
}

// No connection is forgotten, however many come at once, and workers share
// them.
func TestForwardManyAtOnce(t *testing.T) {
	const clients = 3*acceptsAtOnce + 5
	for _, n := range []int{1, 2} {
		w := newWorld(t, workers(n))
		f := w.forward()
		for range clients {
			dials(t, f.Port)
		}
		w.backlog = append(w.backlog, w.pull(0)...)
		if n == 1 {
			// What waits is not told a second time: the worker must not sleep.
			require.Equal(t, uint64(acceptsAtOnce), w.net.Stats().Accepted)
			require.True(t, w.net.Queue(0).Arm())
			w.net.Queue(0).Disarm()
		}
		for range clients {
			w.wantSYN(80)
		}
		for i, k := range w.net.workers {
			assert.NotZero(t, k.stats.Accepted, "worker %d of %d", i, n)
		}
	}
}

// A client that finds no descriptor left waits until there is one. Meanwhile
// nobody turns round.
func TestForwardOutOfDescriptors(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.MaxSockets = 3 })
	f := w.forward()
	for range 3 {
		dials(t, f.Port)
	}
	first := w.wantSYN(80)
	w.wantSYN(80)
	w.nothing()
	require.Equal(t, uint64(1), w.net.Stats().AcceptFailed)
	w.pull(0)
	require.False(t, w.net.Queue(0).Arm())
	w.net.Queue(0).Disarm()
	require.Equal(t, uint64(1), w.net.Stats().AcceptFailed)

	w.send(tcpTo(first.from(), enginetest.TCP{Src: 80, Flags: enginetest.RST | enginetest.ACK, Ack: first.tcp.Seq + 1}, ""))
	require.Equal(t, 1, w.net.Stats().TCPOpen)
	w.pass(time.Second)
	w.wantSYN(80)
	require.Equal(t, 2, w.net.Stats().TCPOpen)
	_, err := net.Dial("tcp4", netip.AddrPortFrom(localIP, f.Port).String())
	require.NoError(t, err)
	w.pull(0)
	assert.Equal(t, uint64(2), w.net.Stats().AcceptFailed)
	require.ErrorContains(t, w.net.AddForward(Forward{Proto: frame.ProtoTCP, Port: freePort(t)}), "ulimit -n")
}

// Forwards come and go while workers and clients are busy.
func TestForwardsComeAndGo(t *testing.T) {
	w := newWorld(t, workers(2))
	tcp := w.forward()
	require.NoError(t, w.net.RemoveForward(tcp))
	var stop atomic.Bool
	var workers, clients sync.WaitGroup
	for i := range w.net.workers {
		workers.Go(func() {
			b := new(frame.Batch)
			b.Worker = i
			for now := w.now; !stop.Load(); now++ {
				b.Reset(now)
				if q := w.net.Queue(i); q.Pull(b) > 0 {
					q.Release(b)
				}
			}
		})
	}
	udp := Forward{Proto: frame.ProtoUDP, Port: freePort(t), Guest: 80}
	for range 2 {
		clients.Go(func() {
			for !stop.Load() {
				if c, err := net.Dial("tcp4", netip.AddrPortFrom(localIP, tcp.Port).String()); err == nil {
					_ = c.(*net.TCPConn).SetLinger(0)
					c.Close()
				}
				if c, err := net.Dial("udp4", netip.AddrPortFrom(localIP, udp.Port).String()); err == nil {
					_, _ = c.Write([]byte("hello"))
					c.Close()
				}
			}
		})
	}
	for range 100 {
		for _, f := range []Forward{tcp, udp} {
			require.NoError(t, w.net.AddForward(f))
		}
		w.net.Stats()
		w.net.Flows(w.now, func(FlowInfo) bool { return true })
		for _, f := range []Forward{tcp, udp} {
			require.NoError(t, w.net.RemoveForward(f))
		}
	}
	stop.Store(true)
	clients.Wait()
	workers.Wait()
	st := w.net.Stats()
	assert.Equal(t, st.TCPOpen, st.Sockets, "descriptors beside those of connections: %+v", st)
	assert.Zero(t, st.UDPOpen)
}
