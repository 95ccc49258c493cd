package usernet

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

const (
	portGuest = frame.PortID(7)
	portHost  = frame.PortID(8)
	// patience is how long a test waits for what must come.
	patience = 5 * time.Second
	// silence is how long it waits for what must not.
	silence = 60 * time.Millisecond
)

var (
	guestMAC  = frame.MAC{2, 0, 0, 0, 0, 0xa}
	routerMAC = frame.MAC{2, 0, 0, 0, 0, 0xfe}

	guestIP   = netip.MustParseAddr("10.0.2.15")
	gatewayIP = netip.MustParseAddr("10.0.2.2")
	dnsIP     = netip.MustParseAddr("10.0.2.3")
	localIP   = netip.MustParseAddr("127.0.0.1")

	// toRouter is what the guest writes on all that leaves its network.
	toRouter = enginetest.Eth{Dst: routerMAC, Src: guestMAC}
)

type option func(*Config)

// world is a guest that consists of a test: its frames go into the real Net,
// which works on real sockets. The clock is set by hand.
type world struct {
	t     testing.TB
	net   *Net
	b     *frame.Batch
	now   int64
	queue uint16 // queue pair that the guest sends from
	// worker is whose batches the guest's frames come in.
	worker int
	// frames are those of the last batch that send made, with their verdicts.
	frames []*frame.Frame
	// backlog is what came for the guest and nobody has asked for yet.
	backlog []arrived
}

// noWatch is a worker that looks by itself.
type noWatch struct{}

func (noWatch) Watch(int) error { return nil }
func (noWatch) Unwatch(int)     {}
func (noWatch) Wake()           {}

func (noWatch) Told(int) (told, slept bool) { return true, true }

func newWorld(t testing.TB, opts ...option) *world {
	t.Helper()
	c := Config{
		Name: "test", Port: portGuest, Guest: guestIP, Gateway: gatewayIP, Prefix: netip.MustParsePrefix("10.0.2.0/24"),
		MAC: guestMAC, GatewayMAC: routerMAC, MTU: 1500, Workers: 1, Loopback: true, Ping: true, MaxSockets: 1000,
	}
	for _, o := range opts {
		o(&c)
	}
	n, err := New(c)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, n.Close()) })
	w := &world{t: t, net: n, b: new(frame.Batch), now: int64(time.Hour)}
	for i := range c.Workers {
		require.NoError(t, n.Queue(i).SetWatcher(noWatch{}))
	}
	return w
}

// inPod lets the sockets be made in a namespace.
func inPod(t testing.TB, ns *enginetest.NetNS) option {
	t.Helper()
	f, err := os.Open(ns.Path)
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	return func(c *Config) { c.NetNS = int(f.Fd()) }
}

func withMTU(mtu int) option { return func(c *Config) { c.MTU = mtu } }

func workers(n int) option { return func(c *Config) { c.Workers = n } }

// pass lets time go by, as far as the Net knows.
func (w *world) pass(d time.Duration) { w.now += int64(d) }

// sent is a frame of the guest's and what it leaves to others. cut says where
// it is split into pieces.
type sent struct {
	data []byte
	off  frame.Offload
	cut  []int
}

func plain(frames ...[]byte) (ss []sent) {
	for _, b := range frames {
		ss = append(ss, sent{data: b})
	}
	return ss
}

// send lets the guest send whole frames in one batch, and returns what came
// back in that.
func (w *world) send(frames ...[]byte) []arrived {
	w.t.Helper()
	return w.sendAll(plain(frames...)...)
}

// sendAll is send for frames with offloads.
func (w *world) sendAll(ss ...sent) []arrived {
	w.t.Helper()
	b := w.b
	b.Reset(w.now)
	b.Worker, b.In = w.worker, portGuest
	for _, s := range ss {
		f := b.Next()
		require.NotNil(w.t, f)
		data := bytes.Clone(s.data)
		f.SetBytes(data, nil, b.Segs(1+len(s.cut)))
		for _, at := range s.cut {
			if len(f.Tail) == 0 {
				break
			}
			if last := f.Tail[len(f.Tail)-1]; at > 0 && at < len(last) {
				f.Tail[len(f.Tail)-1] = last[:at:at]
				f.Tail = append(f.Tail, last[at:])
			}
		}
		f.Offload, f.Queue = s.off, w.queue
	}
	w.net.Process(b)
	w.frames = w.frames[:0]
	for i := range len(ss) {
		w.frames = append(w.frames, b.Frame(i))
	}
	return w.collect()
}

// collect copies the batch's frames for the guest.
func (w *world) collect() (as []arrived) {
	w.t.Helper()
	for i := range w.b.Len() {
		f := w.b.Frame(i)
		switch f.Out {
		case portGuest:
			as = append(as, arrive(w.t, f)...)
		case frame.Drop, frame.Consumed:
		default:
			require.Failf(w.t, "verdict", "frame %d goes to port %d", i, f.Out)
		}
	}
	return as
}

// pull lets a worker look at the sockets once.
func (w *world) pull(worker int) []arrived {
	w.t.Helper()
	b, q := w.b, w.net.Queue(worker)
	b.Reset(w.now)
	b.Worker, b.In = worker, portHost
	n := q.Pull(b)
	require.Equal(w.t, b.Len(), n)
	as := w.collect()
	if n > 0 {
		q.Release(b)
	}
	return as
}

// wait returns the next frame for the guest that fits, and forgets those
// before it. It sleeps as a worker does: only when nothing is to be done, until
// a descriptor wakes it.
func (w *world) wait(d time.Duration, fits func(*arrived) bool) (arrived, bool) {
	w.t.Helper()
	for end := time.Now().Add(d); ; {
		for len(w.backlog) > 0 {
			a := w.backlog[0]
			w.backlog = w.backlog[1:]
			if fits == nil || fits(&a) {
				return a, true
			}
		}
		left := time.Until(end)
		if left <= 0 {
			return arrived{}, false
		}
		var ready []unix.PollFd
		more := false
		for i := range w.net.workers {
			w.backlog = append(w.backlog, w.pull(i)...)
			more = w.net.Queue(i).Arm() || more
			ready = append(ready, unix.PollFd{Fd: int32(w.net.workers[i].epfd), Events: unix.POLLIN})
		}
		if len(w.backlog) == 0 && !more {
			began := time.Now()
			_, err := unix.Poll(ready, int(left.Milliseconds())+1)
			w.pass(time.Since(began))
			if err != nil {
				require.ErrorIs(w.t, err, unix.EINTR)
			}
		}
		for i := range w.net.workers {
			w.net.Queue(i).Disarm()
		}
	}
}

// next wants a frame for the guest.
func (w *world) next() arrived {
	w.t.Helper()
	a, ok := w.wait(patience, nil)
	require.True(w.t, ok, "nothing came for the guest")
	return a
}

// nothing wants no frame for the guest.
func (w *world) nothing() {
	w.t.Helper()
	a, ok := w.wait(silence, nil)
	require.False(w.t, ok, "came for the guest: %x", a.data)
}

// until lets the workers work until cond is true. Frames for the guest stay in
// the backlog.
func (w *world) until(cond func() bool) {
	w.t.Helper()
	for end := time.Now().Add(patience); !cond(); {
		require.True(w.t, time.Now().Before(end), "condition still false")
		for i := range w.net.workers {
			w.backlog = append(w.backlog, w.pull(i)...)
		}
	}
}

// dropped wants the only frame of the last batch to have ended for a reason.
func (w *world) dropped(r frame.DropReason) {
	w.t.Helper()
	require.Len(w.t, w.frames, 1)
	require.Equal(w.t, frame.Drop, w.frames[0].Out)
	require.Equal(w.t, r.String(), w.frames[0].Reason.String())
}

// consumed wants all frames of the last batch to have been taken.
func (w *world) consumed() {
	w.t.Helper()
	for i, f := range w.frames {
		require.Equal(w.t, frame.Consumed, f.Out, "frame %d: %v", i, f.Reason)
	}
}

// arrived is a frame that the guest got, decoded; all its checksums are right.
type arrived struct {
	data []byte
	off  frame.Offload // as it was given to the port
	// queue is the queue pair that it is for.
	queue uint16
	ip    layers.IPv4
	tcp   *layers.TCP
	udp   *layers.UDP
	icmp  *layers.ICMPv4
	ip6   layers.IPv6
	icmp6 *layers.ICMPv6
	frag6 *layers.IPv6Fragment
	// payload is that of the transport; of a fragment, all behind the IP header.
	payload []byte
}

func (a arrived) src() netip.Addr {
	if a.isSix() {
		return netip.AddrFrom16([16]byte(a.data[22:38]))
	}
	return netip.AddrFrom4([4]byte(a.data[26:30]))
}

func (a arrived) isSix() bool { return binary.BigEndian.Uint16(a.data[12:]) == frame.TypeIPv6 }

// from is the address and port that a frame shows as its sender.
func (a arrived) from() netip.AddrPort {
	at := l4
	if a.isSix() {
		at += sixMore
	}
	return netip.AddrPortFrom(a.src(), binary.BigEndian.Uint16(a.data[at:]))
}

// arrive checks a frame for the guest and decodes it as it is, or, of a GSO
// frame, as the segments that it stands for.
func arrive(t testing.TB, f *frame.Frame) (as []arrived) {
	t.Helper()
	off := f.Offload
	require.True(t, f.CheckOffload(), "offload %+v", off)
	off.HdrLen = f.HdrLen
	require.Equal(t, routerMAC[:], f.Src())
	if f.GSO == frame.GSONone {
		if f.Flags&frame.NeedsCsum != 0 {
			f.CompleteChecksum()
		}
		return append(as, decode(t, f.Bytes(), off, f.Queue))
	}
	s := new(frame.Segmenter)
	require.True(t, s.Start(f))
	for g := s.Next(); g != nil; g = s.Next() {
		as = append(as, decode(t, g.Bytes(), off, f.Queue))
	}
	return as
}

func decode(t testing.TB, b []byte, off frame.Offload, queue uint16) arrived {
	t.Helper()
	a := arrived{data: b, off: off, queue: queue}
	if a.isSix() {
		a.decode6(t)
		return a
	}
	require.True(t, enginetest.ChecksumsOK(b), "checksum of %x", b)
	if binary.BigEndian.Uint16(b[12:]) != frame.TypeIPv4 {
		return a
	}
	require.NoError(t, a.ip.DecodeFromBytes(b[14:], gopacket.NilDecodeFeedback))
	require.Equal(t, len(b)-14, int(a.ip.Length))
	require.True(t, a.ip.DstIP.Equal(net.IP(guestIP.AsSlice())), "to %v", a.ip.DstIP)
	require.NotZero(t, a.ip.TTL)
	a.payload = a.ip.Payload
	if a.ip.FragOffset != 0 || a.ip.Flags&layers.IPv4MoreFragments != 0 {
		return a
	}
	p := gopacket.NewPacket(b, layers.LayerTypeEthernet, gopacket.Default)
	a.tcp, _ = p.Layer(layers.LayerTypeTCP).(*layers.TCP)
	a.udp, _ = p.Layer(layers.LayerTypeUDP).(*layers.UDP)
	a.icmp, _ = p.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4)
	switch {
	case a.tcp != nil:
		a.payload = a.tcp.Payload
	case a.udp != nil:
		a.payload = a.udp.Payload
	case a.icmp != nil:
		a.payload = a.icmp.Payload
	}
	return a
}

// to is an IP header of the guest's, with DF as Linux sets it.
func to(dst netip.Addr) enginetest.IP {
	if dst.Is6() {
		return enginetest.IP{Src: guestIP6, Dst: dst}
	}
	return enginetest.IP{Src: guestIP, Dst: dst, Frag: frame.DontFragment}
}

// udpTo is a datagram of the guest's.
func udpTo(sport uint16, dst netip.AddrPort, payload string) []byte {
	return enginetest.UDPFrame(toRouter, to(dst.Addr()), enginetest.UDP{Src: sport, Dst: dst.Port()}, []byte(payload))
}

// echoTo is an echo request of the guest's.
func echoTo(dst netip.Addr, id, seq uint16, payload string) []byte {
	if dst.Is6() {
		return enginetest.ICMPFrame(toRouter, to(dst), enginetest.ICMP{Type: icmp6Echo, Rest: uint32(id)<<16 | uint32(seq)}, []byte(payload))
	}
	return enginetest.ICMPFrame(toRouter, to(dst), enginetest.Echo(id, seq), []byte(payload))
}

// tcpTo is a segment of the guest's.
func tcpTo(dst netip.AddrPort, h enginetest.TCP, payload string) []byte {
	h.Dst = dst.Port()
	return enginetest.TCPFrame(toRouter, to(dst.Addr()), h, []byte(payload))
}

// gateway is a port of the host's loopback as the guest knows it.
func gateway(port uint16) netip.AddrPort { return netip.AddrPortFrom(gatewayIP, port) }

// hostUDP is a socket of the host's on loopback, in this namespace.
func hostUDP(t testing.TB) (*net.UDPConn, netip.AddrPort) {
	t.Helper()
	return hostUDPAt(t, "127.0.0.1:0")
}

func hostUDPAt(t testing.TB, addr string) (*net.UDPConn, netip.AddrPort) {
	t.Helper()
	c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr)))
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c, c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// hears wants a datagram at a host's socket and returns its payload and sender.
func hears(t testing.TB, c net.PacketConn) (string, netip.AddrPort) {
	t.Helper()
	require.NoError(t, c.SetReadDeadline(time.Now().Add(patience)))
	b := make([]byte, 65536)
	n, from, err := c.ReadFrom(b)
	require.NoError(t, err)
	return string(b[:n]), from.(*net.UDPAddr).AddrPort()
}

// hearsNothing wants no datagram at a host's socket.
func hearsNothing(t testing.TB, c net.PacketConn) {
	t.Helper()
	require.NoError(t, c.SetReadDeadline(time.Now().Add(silence)))
	b := make([]byte, 65536)
	n, from, err := c.ReadFrom(b)
	require.Error(t, err, "%q from %v", b[:n], from)
}

// says sends a datagram from a host's socket.
func says(t testing.TB, c net.PacketConn, to netip.AddrPort, payload string) {
	t.Helper()
	_, err := c.WriteTo([]byte(payload), net.UDPAddrFromAddrPort(to))
	require.NoError(t, err)
}

// service lets an address and port of the guest's network stand for another of
// the host's.
func service(addr, to string) option {
	return func(c *Config) {
		c.Services = append(c.Services, Service{frame.ProtoUDP, netip.MustParseAddrPort(addr), netip.MustParseAddrPort(to)})
	}
}
