package nat

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

const (
	portGuest = frame.PortID(1 + iota)
	portGuest2
	portUplink
	portKernel
	portTap
	portTap2
)

var (
	guestMAC  = frame.MAC{0x52, 0x54, 0, 0, 0, 2}
	guestMAC2 = frame.MAC{0x52, 0x54, 0, 0, 0, 3}
	routerMAC = frame.MAC{2, 2, 2, 2, 2, 2}
	podMAC    = frame.MAC{2, 1, 1, 1, 1, 1}
)

// Addresses of the world: two guests behind a pod, hosts outside.
var (
	guestIP   = ip("10.0.2.2")
	gatewayIP = ip("10.0.2.1")
	guestIP2  = ip("10.0.3.2")
	gateway2  = ip("10.0.3.1")
	podIP     = ip("10.244.1.5")
	hostA     = ip("10.244.1.1")
	hostB     = ip("192.0.2.7")
)

func ip(s string) uint32 {
	a := netip.MustParseAddr(s).As4()
	return binary.BigEndian.Uint32(a[:])
}

func netIP(ip uint32) net.IP { return binary.BigEndian.AppendUint32(nil, ip) }

// oneHop routes everything to one next hop, but for the addresses in none.
type oneHop struct {
	hop  *frame.Hop
	none map[uint32]bool
}

func (r *oneHop) Route(dst uint32) *frame.Hop {
	if r.none[dst] {
		return nil
	}
	return r.hop
}

type localSet map[uint32]bool

func (s localSet) Local(ip uint32) bool { return s[ip] }

// world is a Masquerade with a clock set by hand and one batch.
type world struct {
	t      testing.TB
	m      *Masquerade
	router *oneHop
	now    int64
	b      *frame.Batch
	queue  uint16
}

type option func(*Config)

func listed(ports ...Forward) option {
	return func(c *Config) { c.Guests[0].Ports = ports }
}

// twoGuests adds a guest that lists a port.
func twoGuests(c *Config) {
	c.Guests = append(c.Guests, Guest{Port: portGuest2, LocalTap: portTap2, IP: guestIP2, Gateway: gateway2, Prefix: 24,
		MAC: guestMAC2, Ports: []Forward{{Port: 2222}}})
}

func newWorld(t testing.TB, opts ...option) *world {
	hop := &frame.Hop{MTU: 1500, Src: podMAC}
	hop.Set(routerMAC)
	w := &world{t: t, router: &oneHop{hop: hop, none: map[uint32]bool{}}, now: int64(time.Hour), b: new(frame.Batch)}
	c := Config{
		Guests: []Guest{{Port: portGuest, LocalTap: portTap, IP: guestIP, Gateway: gatewayIP, Prefix: 24,
			MAC: guestMAC, MTU: 1500}},
		Uplink: portUplink, KernelPort: portKernel, Router: w.router, External: podIP,
		Local: localSet{podIP: true, ip("10.244.9.9"): true},
	}
	for _, o := range opts {
		o(&c)
	}
	m, err := New(c)
	require.NoError(t, err)
	w.m = m
	return w
}

func (w *world) pass(d time.Duration) { w.now += int64(d) }

func (w *world) sec() uint32 { return seconds(w.now) }

// packet is one frame to send through a stage.
type packet struct {
	data []byte
	off  frame.Offload
}

// stage sends packets through one stage and returns the whole batch.
func (w *world) stage(s interface{ Process(*frame.Batch) }, in frame.PortID, ps ...packet) []*frame.Frame {
	w.t.Helper()
	w.b.Reset(w.now)
	for _, p := range ps {
		f := w.b.Next()
		require.NotNil(w.t, f)
		f.SetBytes(append([]byte(nil), p.data...), nil, w.b.Segs(1))
		f.Offload, f.In, f.Queue = p.off, in, w.queue
	}
	s.Process(w.b)
	var fs []*frame.Frame
	for i := range w.b.Len() {
		f := w.b.Frame(i)
		require.Falsef(w.t, f.Out != frame.Drop && f.Reason != frame.ReasonNone, "verdict and reason: %v", f.Reason)
		fs = append(fs, f)
	}
	return fs
}

func (w *world) out(ps ...packet) []*frame.Frame {
	w.t.Helper()
	return w.stage(w.m.Outbound(0), portGuest, ps...)
}

func (w *world) out2(ps ...packet) []*frame.Frame {
	w.t.Helper()
	return w.stage(w.m.Outbound(1), portGuest2, ps...)
}

func (w *world) in(ps ...packet) []*frame.Frame {
	w.t.Helper()
	return w.stage(w.m.Inbound(), portUplink, ps...)
}

// flow describes one direction of a connection.
type flow5 struct {
	src, dst     uint32
	sport, dport uint16
}

func (f flow5) back() flow5 { return flow5{f.dst, f.src, f.dport, f.sport} }

func fromGuestTo(sport uint16, dst uint32, dport uint16) flow5 {
	return flow5{guestIP, dst, sport, dport}
}

func toPod(src uint32, sport, dport uint16) flow5 { return flow5{src, podIP, sport, dport} }

// eth is the Ethernet header that a sender of src uses.
func eth(src uint32) *layers.Ethernet {
	e := &layers.Ethernet{SrcMAC: routerMAC[:], DstMAC: podMAC[:], EthernetType: layers.EthernetTypeIPv4}
	switch src {
	case guestIP:
		e.SrcMAC, e.DstMAC = guestMAC[:], GatewayMAC[:]
	case guestIP2:
		e.SrcMAC, e.DstMAC = guestMAC2[:], GatewayMAC[:]
	case gatewayIP:
		e.SrcMAC, e.DstMAC = GatewayMAC[:], guestMAC[:]
	}
	return e
}

func ip4(src, dst uint32, proto layers.IPProtocol) *layers.IPv4 {
	return &layers.IPv4{Version: 4, TTL: 64, Id: 77, Protocol: proto, SrcIP: netIP(src), DstIP: netIP(dst),
		Flags: layers.IPv4DontFragment}
}

func build(ls ...gopacket.SerializableLayer) packet {
	var nl gopacket.NetworkLayer
	for _, l := range ls {
		switch l := l.(type) {
		case *layers.IPv4:
			if nl == nil {
				nl = l
			}
		case *layers.TCP:
			_ = l.SetNetworkLayerForChecksum(nl)
		case *layers.UDP:
			_ = l.SetNetworkLayerForChecksum(nl)
		}
	}
	b := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ls...)
	if err != nil {
		panic(err)
	}
	d := b.Bytes() // gopacket pads to 60 bytes
	return packet{data: append([]byte(nil), d[:frame.EthernetLen+int(binary.BigEndian.Uint16(d[16:]))]...)}
}

func udp(f flow5, payload string) packet {
	return build(eth(f.src), ip4(f.src, f.dst, layers.IPProtocolUDP),
		&layers.UDP{SrcPort: layers.UDPPort(f.sport), DstPort: layers.UDPPort(f.dport)}, gopacket.Payload(payload))
}

func tcp(f flow5, flags string, seq, ack uint32, payload string) packet {
	t := &layers.TCP{SrcPort: layers.TCPPort(f.sport), DstPort: layers.TCPPort(f.dport), Seq: seq, Ack: ack, Window: 1000}
	for _, c := range flags {
		switch c {
		case 'S':
			t.SYN = true
		case 'A':
			t.ACK = true
		case 'F':
			t.FIN = true
		case 'R':
			t.RST = true
		}
	}
	return build(eth(f.src), ip4(f.src, f.dst, layers.IPProtocolTCP), t, gopacket.Payload(payload))
}

func icmp(src, dst uint32, typ, code uint8, id, seq uint16, payload string) packet {
	return build(eth(src), ip4(src, dst, layers.IPProtocolICMPv4),
		&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(typ, code), Id: id, Seq: seq}, gopacket.Payload(payload))
}

func echo(src, dst uint32, id, seq uint16) packet { return icmp(src, dst, 8, 0, id, seq, "payload") }

func echoReply(src, dst uint32, id, seq uint16) packet {
	return icmp(src, dst, 0, 0, id, seq, "payload")
}

// edit applies fn to the IP packet of p and corrects the IP header's checksum.
func edit(p packet, fn func(ip []byte)) packet {
	d := append([]byte(nil), p.data...)
	h := d[frame.EthernetLen:]
	fn(h)
	n := min(int(h[0]&15)*4, len(h))
	if n >= 20 {
		h[10], h[11] = 0, 0
		binary.BigEndian.PutUint16(h[10:], ^frame.Fold(frame.Sum(h[:n], 0)))
	}
	return packet{d, p.off}
}

// seen is what a frame shows when gopacket decodes it.
type seen struct {
	gopacket.Packet
	ip   *layers.IPv4
	data []byte
}

// decode checks every checksum of a frame by computing it anew, and decodes it.
func decode(t testing.TB, f *frame.Frame) seen {
	t.Helper()
	data := f.Bytes()
	p := gopacket.NewPacket(data, layers.LayerTypeEthernet, gopacket.Default)
	ipl, _ := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
	require.NotNil(t, ipl, "no IPv4 layer in %x", data)
	verify(t, f, data)
	return seen{p, ipl, data}
}

// verify recomputes the checksums of an IPv4 frame from scratch and wants each
// field bit by bit.
func verify(t testing.TB, f *frame.Frame, data []byte) {
	t.Helper()
	h := data[frame.EthernetLen:]
	n := int(h[0]&15) * 4
	require.Equal(t, slowSum(h[:n], 10, 0), binary.BigEndian.Uint16(h[10:]), "IP checksum")
	if binary.BigEndian.Uint16(h[6:])&0x3fff != 0 {
		return // a fragment's transport checksum cannot be checked alone
	}
	total := int(binary.BigEndian.Uint16(h[2:]))
	if f.GSOType() != frame.GSONone {
		total = len(h)
	}
	l4 := h[n:total]
	pseudo := uint32(0)
	for i := 12; i < 20; i += 2 {
		pseudo += uint32(binary.BigEndian.Uint16(h[i:]))
	}
	pseudo += uint32(h[9]) + uint32(len(l4))
	off, zero := 0, false
	switch h[9] {
	case 6:
		off = 16
	case 17:
		off, zero = 6, true
	case 1:
		off, pseudo = 2, 0
	default:
		return
	}
	field := binary.BigEndian.Uint16(l4[off:])
	if f.Flags&frame.NeedsCsum != 0 {
		for pseudo > 0xffff {
			pseudo = pseudo>>16 + pseudo&0xffff
		}
		require.Equal(t, uint16(pseudo), field, "partial checksum of protocol %d", h[9])
		return
	}
	if zero && field == 0 {
		return
	}
	want := slowSum(l4, off, pseudo)
	if zero && want == 0 {
		want = 0xffff
	}
	require.Equal(t, want, field, "transport checksum of protocol %d", h[9])
}

// slowSum is the obvious checksum over b with the field at off as 0.
func slowSum(b []byte, off int, sum uint32) uint16 {
	for i := 0; i < len(b); i += 2 {
		v := uint32(b[i]) << 8
		if i+1 < len(b) {
			v |= uint32(b[i+1])
		}
		if i == off {
			v = 0
		}
		sum += v
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// one wants a batch of one frame that goes to out, and returns it decoded.
func (w *world) one(fs []*frame.Frame, out frame.PortID) seen {
	w.t.Helper()
	require.Len(w.t, fs, 1)
	require.Equal(w.t, out, fs[0].Out, "dropped for %v", fs[0].Reason)
	return decode(w.t, fs[0])
}

// dropped wants a batch of one frame, dropped for a reason.
func (w *world) dropped(fs []*frame.Frame, r frame.DropReason) {
	w.t.Helper()
	require.Len(w.t, fs, 1)
	require.Equal(w.t, frame.Drop, fs[0].Out)
	require.Equal(w.t, r.String(), fs[0].Reason.String())
}

// podsOwn wants a batch of one frame that goes to the pod's own kernel as it
// came, but for the gateway's hardware address as its destination.
func (w *world) podsOwn(p packet, fs []*frame.Frame) {
	w.t.Helper()
	require.Len(w.t, fs, 1)
	require.Equal(w.t, portTap, fs[0].Out, "dropped for %v", fs[0].Reason)
	require.Equal(w.t, append(append([]byte(nil), GatewayMAC[:]...), p.data[6:]...), fs[0].Bytes())
}

// inToPod sends a packet from outside and wants it to be the pod's own.
func (w *world) inToPod(p packet) {
	w.t.Helper()
	w.podsOwn(p, w.in(p))
}

// noTap is a pod whose kernel is out of reach.
func noTap(c *Config) { c.Guests[0].LocalTap = frame.Drop }

func (s seen) flow() flow5 {
	f := flow5{src: binary.BigEndian.Uint32(s.ip.SrcIP), dst: binary.BigEndian.Uint32(s.ip.DstIP)}
	switch l := s.TransportLayer().(type) {
	case *layers.TCP:
		f.sport, f.dport = uint16(l.SrcPort), uint16(l.DstPort)
	case *layers.UDP:
		f.sport, f.dport = uint16(l.SrcPort), uint16(l.DstPort)
	}
	return f
}

func (s seen) icmp() *layers.ICMPv4 {
	l, _ := s.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4)
	return l
}

func (s seen) macs() (src, dst frame.MAC) {
	copy(dst[:], s.data)
	copy(src[:], s.data[6:])
	return src, dst
}

// flows collects the table.
func (w *world) flows() (fs []FlowInfo) {
	w.m.Flows(w.now, func(f FlowInfo) bool {
		fs = append(fs, f)
		return true
	})
	return fs
}
