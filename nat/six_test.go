package nat

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

var (
	guest6IP   = netip.MustParseAddr("fd10:0:2::2")
	gateway6IP = netip.MustParseAddr("fd10:0:2::1")
	pod6IP     = netip.MustParseAddr("2001:db8:1::5")
	host6A     = netip.MustParseAddr("2001:db8:1::1")
	host6B     = netip.MustParseAddr("2001:db8:9::7")
	routerLL   = netip.MustParseAddr("fe80::ff:fe00:0")
)

// oneHop6 routes everything to one next hop, but for the addresses in none.
type oneHop6 struct {
	hop  *frame.Hop
	none map[Addr6]bool
}

func (r *oneHop6) Route(dst Addr6) *frame.Hop {
	if r.none[dst] {
		return nil
	}
	return r.hop
}

type localSet6 map[Addr6]bool

func (s localSet6) Local(ip Addr6) bool { return s[ip] }

// world6 is a Masquerade6 with a clock set by hand and one batch.
type world6 struct {
	t      testing.TB
	m      *Masquerade6
	router *oneHop6
	now    int64
	b      *frame.Batch
	queue  uint16
}

func newWorld6(t testing.TB, change ...func(*Config6)) *world6 {
	hop := &frame.Hop{MTU: 1500, Src: podMAC}
	hop.Set(routerMAC)
	w := &world6{t: t, router: &oneHop6{hop, map[Addr6]bool{}}, now: int64(time.Hour), b: new(frame.Batch)}
	c := Config6{
		Guests: []Guest6{{Port: portGuest, LocalTap: portTap, IP: guest6IP.As16(), Gateway: gateway6IP.As16(), Prefix: 120, MAC: guestMAC, MTU: 1500}},
		Uplink: portUplink, KernelPort: portKernel, Router: w.router, External: pod6IP.As16(),
	}
	for _, f := range change {
		f(&c)
	}
	var err error
	w.m, err = New6(c)
	require.NoError(t, err)
	return w
}

func listed6(ports ...Forward) func(*Config6) { return func(c *Config6) { c.Guests[0].Ports = ports } }

func (w *world6) stage(s interface{ Process(*frame.Batch) }, in frame.PortID, off frame.Offload, ps ...[]byte) []*frame.Frame {
	w.t.Helper()
	w.b.Reset(w.now)
	for _, p := range ps {
		f := w.b.Next()
		require.NotNil(w.t, f)
		f.SetBytes(bytes.Clone(p), nil, w.b.Segs(1))
		f.Offload, f.In, f.Queue = off, in, w.queue
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

func (w *world6) out(ps ...[]byte) []*frame.Frame {
	w.t.Helper()
	return w.stage(w.m.Outbound(0), portGuest, frame.Offload{}, ps...)
}

func (w *world6) in(ps ...[]byte) []*frame.Frame {
	w.t.Helper()
	return w.stage(w.m.Inbound(), portUplink, frame.Offload{}, ps...)
}

var (
	ethOut = enginetest.Eth{Dst: GatewayMAC, Src: guestMAC}
	ethIn  = enginetest.Eth{Dst: podMAC, Src: routerMAC}
)

func pair6(src, dst netip.Addr) enginetest.IP { return enginetest.IP{Src: src, Dst: dst} }

func udp6(src, dst netip.Addr, sport, dport uint16, data string) []byte {
	e := ethIn
	if src == guest6IP {
		e = ethOut
	}
	return enginetest.UDPFrame(e, pair6(src, dst), enginetest.UDP{Src: sport, Dst: dport}, []byte(data))
}

func tcp6(src, dst netip.Addr, sport, dport uint16, flags uint8, seq uint32) []byte {
	e := ethIn
	if src == guest6IP {
		e = ethOut
	}
	return enginetest.TCPFrame(e, pair6(src, dst), enginetest.TCP{Src: sport, Dst: dport, Flags: flags, Seq: seq, Ack: 1}, []byte("payload"))
}

func echo6(src, dst netip.Addr, typ uint8, id uint16) []byte {
	e := ethIn
	if src == guest6IP {
		e = ethOut
	}
	return enginetest.ICMPFrame(e, pair6(src, dst), enginetest.ICMP{Type: typ, Rest: uint32(id)<<16 | 1}, []byte("0123456789"))
}

// seen6 is what a translated packet shows, whose checksums must hold.
type seen6 struct {
	src, dst     netip.Addr
	sport, dport uint16
	hop          uint8
}

func (w *world6) seen(f *frame.Frame) seen6 {
	w.t.Helper()
	p := f.Bytes()
	require.True(w.t, enginetest.ChecksumsOK(p), "%x", p)
	s := seen6{netip.AddrFrom16([16]byte(p[22:38])), netip.AddrFrom16([16]byte(p[38:54])), be16(p[54:]), be16(p[56:]), p[21]}
	if p[20] == frame.ProtoICMPv6 {
		s.sport, s.dport = be16(p[58:]), uint16(p[54])
	}
	return s
}

// The outside sees the pod's address and, where it is free, the guest's port;
// what it answers comes back to the guest. The mapping is the same for every
// host.
func TestRFC4787Req1Row61Mapping6(t *testing.T) {
	w := newWorld6(t)
	f := w.out(udp6(guest6IP, host6A, 5000, 53, "hello"))[0]
	require.Equal(t, portUplink, f.Out)
	assert.Equal(t, seen6{pod6IP, host6A, 5000, 53, 63}, w.seen(f))
	assert.Equal(t, routerMAC[:], f.Dst())
	f = w.out(udp6(guest6IP, host6B, 5000, 53, "odd"))[0]
	assert.Equal(t, seen6{pod6IP, host6B, 5000, 53, 63}, w.seen(f))
	f = w.in(udp6(host6B, pod6IP, 53, 5000, "answer"))[0]
	require.Equal(t, portGuest, f.Out)
	assert.Equal(t, seen6{host6B, guest6IP, 53, 5000, 63}, w.seen(f))
	assert.Equal(t, guestMAC[:], f.Dst())
	assert.Equal(t, 2, w.m.Stats().Flows)
	n := 0
	w.m.Flows(w.now, func(i FlowInfo) bool {
		n++
		assert.Equal(t, guest6IP, i.GuestAddr)
		assert.Contains(t, []netip.Addr{host6A, host6B}, i.Remote)
		return true
	})
	assert.Equal(t, 2, n)
}

// A guest without a list gets everything and sees who sent it; one with a list
// gets that, the rest is the pod's.
func TestKubeVirt11Row54Row55Inbound6(t *testing.T) {
	w := newWorld6(t)
	f := w.in(tcp6(host6A, pod6IP, 999, 80, flagSYN, 7))[0]
	require.Equal(t, portGuest, f.Out)
	assert.Equal(t, seen6{host6A, guest6IP, 999, 80, 63}, w.seen(f))
	f = w.out(tcp6(guest6IP, host6A, 80, 999, flagSYN|flagACK, 1))[0]
	assert.Equal(t, seen6{pod6IP, host6A, 80, 999, 63}, w.seen(f))
	f = w.in(echo6(host6A, pod6IP, icmp6Echo, 77))[0]
	require.Equal(t, portGuest, f.Out)
	assert.Equal(t, seen6{host6A, guest6IP, 77, icmp6Echo, 63}, w.seen(f))
	f = w.in(ethIn.Frame(frame.TypeIPv6, pair6(host6A, pod6IP).Packet(132, []byte("SCTP or what it is"))))[0]
	assert.Equal(t, portGuest, f.Out)

	w = newWorld6(t, listed6(Forward{Proto: frame.ProtoTCP, Port: 80, GuestPort: 8080}))
	f = w.in(tcp6(host6A, pod6IP, 999, 80, flagSYN, 7))[0]
	assert.Equal(t, seen6{host6A, guest6IP, 999, 8080, 63}, w.seen(f))
	f = w.in(tcp6(host6A, pod6IP, 999, 81, flagSYN, 7))[0]
	assert.Equal(t, portTap, f.Out, "the pod's")
	f = w.in(echo6(host6A, pod6IP, icmp6Echo, 77))[0]
	assert.Equal(t, frame.NoFlow, f.Reason)
}

func TestRFC5508Req1Echo6(t *testing.T) {
	w := newWorld6(t)
	f := w.out(echo6(guest6IP, host6A, icmp6Echo, 0x1234))[0]
	s := w.seen(f)
	assert.Equal(t, pod6IP, s.src)
	f = w.in(echo6(host6A, pod6IP, icmp6EchoReply, s.sport))[0]
	require.Equal(t, portGuest, f.Out)
	assert.Equal(t, seen6{host6A, guest6IP, 0x1234, icmp6EchoReply, 63}, w.seen(f))
	f = w.in(echo6(host6B, pod6IP, icmp6EchoReply, s.sport+1))[0]
	assert.Equal(t, frame.NoFlow, f.Reason)
}

// Errors about what went out come in with the guest's own packet inside, and the
// other way round; their checksums hold.
func TestRFC5508Req4Req5Errors6(t *testing.T) {
	w := newWorld6(t)
	sent := w.out(udp6(guest6IP, host6A, 5000, 53, "hello"))[0].Bytes()
	tooBig := enginetest.ICMPFrame(ethIn, pair6(host6B, pod6IP), enginetest.ICMP{Type: icmp6TooBig, Rest: 1300}, sent[14:])
	f := w.in(tooBig)[0]
	require.Equal(t, portGuest, f.Out)
	p := f.Bytes()
	require.True(t, enginetest.ChecksumsOK(p))
	assert.Equal(t, host6B.AsSlice(), p[22:38])
	inner := p[62:]
	assert.Equal(t, guest6IP.AsSlice(), inner[8:24])
	assert.Equal(t, host6A.AsSlice(), inner[24:40])
	assert.Equal(t, uint32(1300), be32(p[58:]))
	// The guest's packet as it was, but for the hop.
	want := udp6(guest6IP, host6A, 5000, 53, "hello")[14:]
	want[7] = 63
	assert.Equal(t, want, inner)

	got := w.in(udp6(host6A, pod6IP, 53, 5000, "x"))[0].Bytes()
	unreach := enginetest.ICMPFrame(ethOut, pair6(guest6IP, host6A), enginetest.ICMP{Type: icmp6Unreachable, Code: 4}, got[14:])
	f = w.out(unreach)[0]
	require.Equal(t, portUplink, f.Out)
	p = f.Bytes()
	require.True(t, enginetest.ChecksumsOK(p))
	assert.Equal(t, pod6IP.AsSlice(), p[22:38])
	assert.Equal(t, pod6IP.AsSlice(), p[62+24:62+40])
	want = udp6(host6A, pod6IP, 53, 5000, "x")[14:]
	want[7] = 63
	assert.Equal(t, want, p[62:])

	forged := enginetest.ICMPFrame(ethIn, pair6(host6B, pod6IP), enginetest.ICMP{Type: icmp6Unreachable},
		udp6(pod6IP, host6B, 1, 2, "never sent")[14:])
	assert.Equal(t, frame.NoFlow, w.in(forged)[0].Reason)
	tooBig[70] ^= 1
	assert.Equal(t, frame.BadChecksum, w.in(tooBig)[0].Reason)
}

// What is too long is not split but answered (RFC 8200, section 5), as is what
// has no hops left; both with the guest's packet in it.
func TestRFC4443Sec32Sec33Answers(t *testing.T) {
	w := newWorld6(t)
	w.router.hop.MTU = 1400
	fs := w.out(udp6(guest6IP, host6A, 5000, 53, string(make([]byte, 1400))))
	require.Len(t, fs, 2)
	assert.Equal(t, frame.FragNeeded, fs[0].Reason)
	p := fs[1].Bytes()
	require.True(t, enginetest.ChecksumsOK(p))
	assert.Equal(t, []byte{icmp6TooBig, 0}, p[54:56])
	assert.Equal(t, uint32(1400), be32(p[58:]))
	assert.Equal(t, gateway6IP.AsSlice(), p[22:38])
	assert.Equal(t, guest6IP.AsSlice(), p[62+8:62+24])
	last := udp6(guest6IP, host6A, 5000, 53, "x")
	last[21] = 1
	fs = w.out(last)
	require.Len(t, fs, 2)
	assert.Equal(t, []byte{icmp6TimeExceeded, 0}, fs[1].Bytes()[54:56])
	long := udp6(host6A, pod6IP, 53, 5000, string(make([]byte, 1490)))
	fs = w.in(long)
	require.Len(t, fs, 2, "MTU of the guest")
	assert.Equal(t, portUplink, fs[1].Out)
	assert.Equal(t, pod6IP.AsSlice(), fs[1].Bytes()[22:38])
}

// GSO frames and partial checksums stay what they are: the field holds the sum
// of the pseudo-header, with the new addresses.
func TestOffloads6(t *testing.T) {
	w := newWorld6(t)
	p := tcp6(guest6IP, host6A, 5000, 80, flagSYN, 1)
	sum := frame.Fold(frame.Sum(p[22:54], frame.ProtoTCP+uint64(len(p)-54)))
	binary.BigEndian.PutUint16(p[70:], sum)
	off := frame.Offload{Flags: frame.NeedsCsum, CsumStart: 54, CsumOffset: 16, GSO: frame.GSOTCPv6, GSOSize: 1400}
	f := w.stage(w.m.Outbound(0), portGuest, off, append(p, make([]byte, 3000)...)[:len(p)])[0]
	require.Equal(t, portUplink, f.Out)
	q := f.Bytes()
	assert.Equal(t, frame.Fold(frame.Sum(q[22:54], frame.ProtoTCP+uint64(len(q)-54))), be16(q[70:]))
	off.CsumOffset = 14
	f = w.stage(w.m.Outbound(0), portGuest, off, p)[0]
	assert.Equal(t, frame.BadOffload, f.Reason)
}

func TestNotCarried6(t *testing.T) {
	w := newWorld6(t)
	other := netip.MustParseAddr("fd10:0:2::77")
	for name, c := range map[string]struct {
		p    []byte
		want frame.DropReason
	}{
		"H079 another's source":    {enginetest.UDPFrame(ethOut, pair6(other, host6A), enginetest.UDP{Src: 1, Dst: 2}, nil), frame.Spoofed},
		"H079 the gateway's MAC":   {enginetest.UDPFrame(enginetest.Eth{Dst: GatewayMAC, Src: GatewayMAC}, pair6(guest6IP, host6A), enginetest.UDP{Src: 1, Dst: 2}, nil), frame.Spoofed},
		"H105 loopback":            {udp6(guest6IP, netip.IPv6Loopback(), 1, 2, ""), frame.Policy},
		"H105 mapped IPv4":         {udp6(guest6IP, netip.MustParseAddr("::ffff:10.0.0.1"), 1, 2, ""), frame.Policy},
		"H105 link-local":          {udp6(guest6IP, netip.MustParseAddr("fe80::9"), 1, 2, ""), frame.Policy},
		"H105 a group":             {udp6(guest6IP, netip.MustParseAddr("ff02::9"), 1, 2, ""), frame.NotCarried},
		"the guest's own network":  {udp6(guest6IP, other, 1, 2, ""), frame.NoRoute},
		"H087 port 0":              {udp6(guest6IP, host6A, 0, 2, ""), frame.BadTransport},
		"ICMP of IPv4":             {ethOut.Frame(frame.TypeIPv6, pair6(guest6IP, host6A).Packet(frame.ProtoICMP, make([]byte, 8))), frame.NotCarried},
		"neighbour advertisement":  {enginetest.ICMPFrame(ethOut, pair6(guest6IP, host6A), enginetest.ICMP{Type: 136}, make([]byte, 16)), frame.Spoofed},
		"routing header":           {ethOut.Frame(frame.TypeIPv6, pair6(guest6IP, host6A).Packet(43, []byte{17, 0, 0, 1, 0, 0, 0, 0})), frame.NotCarried},
		"reset of no connection":   {tcp6(guest6IP, host6A, 1, 2, flagRST, 1), frame.NoFlow},
		"answer that nobody asked": {echo6(guest6IP, host6A, icmp6EchoReply, 1), frame.NoFlow},
	} {
		t.Run(name, func(t *testing.T) {
			assert.Equal(t, c.want.String(), w.out(c.p)[0].Reason.String())
		})
	}
	w.router.none[host6B.As16()] = true
	fs := w.out(udp6(guest6IP, host6B, 1, 2, ""))
	require.Len(t, fs, 2)
	assert.Equal(t, []byte{icmp6Unreachable, unreach6NoRoute}, fs[1].Bytes()[54:56])
	assert.Zero(t, w.m.Stats().Flows)
	for _, src := range []netip.Addr{netip.IPv6Loopback(), netip.MustParseAddr("ff02::1"), pod6IP, netip.IPv6Unspecified(), guest6IP, gateway6IP} {
		p := enginetest.UDPFrame(ethIn, pair6(src, pod6IP), enginetest.UDP{Src: 1, Dst: 2}, nil)
		assert.Equal(t, frame.Spoofed, w.in(p)[0].Reason, "H082 %v", src)
	}
	four := w.out(enginetest.UDPFrame(ethOut, enginetest.IP{Src: netip.MustParseAddr("10.0.2.2"), Dst: netip.MustParseAddr("10.1.1.1")}, enginetest.UDP{Src: 1, Dst: 2}, nil))[0]
	assert.Equal(t, frame.Drop, four.Out)
	assert.Zero(t, four.Reason, "IPv4 is another stage's")
}

var (
	guestLL   = netip.MustParseAddr("fe80::77")
	allNodes6 = netip.MustParseAddr("ff02::1")
	ethAll    = enginetest.Eth{Dst: frame.MAC{0x33, 0x33, 0, 0, 0, 1}, Src: guestMAC}
)

// advert6 is a neighbour advertisement about target.
func advert6(e enginetest.Eth, src, dst, target netip.Addr) []byte {
	return enginetest.ICMPFrame(e, pair6(src, dst), enginetest.ICMP{Type: icmp6NeighbourSay}, target.AsSlice())
}

// behindOptions is an ICMPv6 packet with a header of destination options before it,
// which whoever looks at the first header alone passes over.
func behindOptions(p []byte) []byte {
	q := append(bytes.Clone(p[:54]), p[20], 0, 1, 4, 0, 0, 0, 0)
	q[20] = 60
	q = append(q, p[54:]...)
	binary.BigEndian.PutUint16(q[18:], uint16(len(q)-54))
	return q
}

// Of what the guest says on its link the pod's kernel hears nothing that could
// change its routes, that it has to answer to addresses made up, or that is about
// its own addresses.
func TestRFC6980H084NothingForThePodsKernel6(t *testing.T) {
	w := newWorld6(t)
	icmp := func(e enginetest.Eth, src, dst netip.Addr, typ uint8, n int) []byte {
		p := enginetest.ICMPFrame(e, pair6(src, dst), enginetest.ICMP{Type: typ}, make([]byte, n))
		p[21] = 255
		return p
	}
	for name, p := range map[string][]byte{
		"a router's word":                  icmp(ethOut, guestLL, gateway6IP, 134, 24),
		"behind options":                   behindOptions(icmp(ethOut, guestLL, gateway6IP, 134, 24)),
		"behind options, to link-local":    behindOptions(icmp(ethOut, guestLL, routerLL, 134, 24)),
		"behind options, to all":           behindOptions(icmp(ethAll, guestLL, allNodes6, 134, 24)),
		"a redirect":                       icmp(ethOut, guestLL, gateway6IP, 137, 32),
		"a question of anybody":            behindOptions(icmp(ethOut, netip.MustParseAddr("fe80::1234"), gateway6IP, icmp6NeighbourAsk, 16)),
		"a ping of anybody":                icmp(ethOut, netip.MustParseAddr("fe80::1234"), gateway6IP, icmp6Echo, 8),
		"a datagram of anybody":            enginetest.UDPFrame(ethOut, pair6(guestLL, gateway6IP), enginetest.UDP{Src: 1, Dst: 53}, nil),
		"whose gateway's address is":       advert6(ethOut, guest6IP, gateway6IP, gateway6IP),
		"the same, to all":                 advert6(ethAll, guestLL, allNodes6, gateway6IP),
		"whose the router's link-local is": advert6(ethAll, guestLL, allNodes6, routerLL),
		"whose the pod's address is":       advert6(ethOut, guest6IP, pod6IP, pod6IP),
		"a short one":                      icmp(ethOut, guest6IP, gateway6IP, icmp6NeighbourSay, 8),
		"a neighbour's question":           icmp(enginetest.Eth{Dst: frame.MAC{0x33, 0x33, 0xff, 0, 0, 9}, Src: guestMAC}, netip.IPv6Unspecified(), netip.MustParseAddr("ff02::1:ff00:9"), icmp6NeighbourAsk, 16),
	} {
		f := w.out(p)[0]
		assert.Equal(t, frame.Drop, f.Out, name)
		assert.Contains(t, []frame.DropReason{frame.NotCarried, frame.Spoofed}, f.Reason, name)
	}
}

// RFC 8200, section 5: what every link carries is never called too big, as its
// sender would send the same again.
func TestRFC8200Sec5SmallestMTU6(t *testing.T) {
	w := newWorld6(t)
	w.router.hop.MTU = 1000
	assert.Equal(t, portUplink, w.out(udp6(guest6IP, host6A, 5000, 53, string(make([]byte, 1280-48))))[0].Out)
	fs := w.out(udp6(guest6IP, host6A, 5000, 53, string(make([]byte, 1281-48))))
	require.Len(t, fs, 2)
	assert.Equal(t, uint32(1280), be32(fs[1].Bytes()[58:]))
}

// RFC 6946: a packet in one fragment is a whole one, whatever else has its
// identification.
func TestRFC6946AtomicFragments6(t *testing.T) {
	w := newWorld6(t)
	whole := udp6(guest6IP, host6A, 5000, 53, "0123456789abcdef")
	waits := fragments6(udp6(guest6IP, host6A, 6000, 53, string(make([]byte, 100))), 5, 64)
	assert.Equal(t, frame.Consumed, w.out(waits[1])[0].Out)
	fs := w.out(fragments6(whole, 5, 400)[0])
	require.Len(t, fs, 1, "what waits is another packet's")
	require.Equal(t, portUplink, fs[0].Out)
	p := fs[0].Bytes()
	assert.Equal(t, []byte{17, 0, 0, 0, 0, 0, 0, 5}, p[54:62])
	assert.Equal(t, uint16(5000), be16(p[62:]))
	plain := append(bytes.Clone(p[:54]), p[62:]...)
	plain[20] = frame.ProtoUDP
	binary.BigEndian.PutUint16(plain[18:], uint16(len(plain)-54))
	assert.True(t, enginetest.ChecksumsOK(plain))
	back := fragments6(udp6(host6A, pod6IP, 53, 5000, "answer"), 5, 400)[0]
	assert.Equal(t, portGuest, w.in(back)[0].Out)
}

// RFC 7112: a first fragment without the whole transport header passes nowhere,
// nor what would follow it; and RFC 5722: what overlaps changes no port.
func TestRFC7112TinyFragments6(t *testing.T) {
	w := newWorld6(t)
	tiny := fragments6(tcp6(guest6IP, host6A, 5000, 80, flagSYN, 1), 9, 8)
	require.Greater(t, len(tiny), 2)
	assert.Equal(t, frame.BadTransport, w.out(tiny[0])[0].Reason)
	assert.Equal(t, frame.Consumed, w.out(tiny[1])[0].Out, "it waits in vain")
	assert.Zero(t, w.m.Stats().Flows)
	fs := fragments6(udp6(guest6IP, host6A, 5000, 53, string(make([]byte, 60))), 11, 32)
	require.Equal(t, portUplink, w.out(fs[0])[0].Out)
	over := bytes.Clone(fs[1])
	binary.BigEndian.PutUint16(over[56:], 8|1) // overlaps the first one's data
	over = over[:62+24]
	binary.BigEndian.PutUint16(over[18:], uint16(len(over)-54))
	if f := w.out(over)[0]; assert.Equal(t, portUplink, f.Out) {
		assert.Equal(t, over[62:], f.Bytes()[62:], "for the other end to judge")
	}
	high := bytes.Clone(fs[1])
	binary.BigEndian.PutUint16(high[56:], 0xfff8)
	assert.Equal(t, frame.BadIPv6, w.out(high)[0].Reason, "H083: beyond the largest packet")
}

// RFC 8200, section 8.1: a datagram without a checksum is nobody's but a tunnel's;
// it stays one without. One that comes out as 0 is sent as 0xffff.
func TestRFC8200Sec81UDPChecksum6(t *testing.T) {
	w := newWorld6(t)
	none := udp6(guest6IP, host6A, 5000, 53, "x")
	none[60], none[61] = 0, 0
	assert.Equal(t, []byte{0, 0}, w.out(none)[0].Bytes()[60:62])
	for i := range 1 << 16 {
		p := udp6(guest6IP, host6A, 5000, 53, string([]byte{byte(i >> 8), byte(i)}))
		q := w.out(p)[0].Bytes()
		if be16(q[60:]) == 0xffff {
			require.True(t, enginetest.ChecksumsOK(q))
			return
		}
		require.NotZero(t, be16(q[60:]))
	}
	t.Fatal("no sum was 0")
}

// The pod's kernel is the other station of the guest's link.
func TestRow58PodAtTheGateway6(t *testing.T) {
	other := netip.MustParseAddr("2001:db8:7::1")
	w := newWorld6(t, func(c *Config6) { c.Local = localSet6{other.As16(): true} })
	last := udp6(guest6IP, other, 1, 53, "x")
	last[21] = 1
	for name, p := range map[string][]byte{
		"another of the pod's":     udp6(guest6IP, other, 1, 53, "x"),
		"the same at its last hop": last,
		"gateway":                  udp6(guest6IP, gateway6IP, 1, 53, "x"),
		"in fragments":             fragments6(udp6(guest6IP, pod6IP, 1, 80, string(make([]byte, 100))), 3, 64)[0],
		"an error about it":        enginetest.ICMPFrame(ethOut, pair6(guest6IP, pod6IP), enginetest.ICMP{Type: icmp6Unreachable}, udp6(pod6IP, guest6IP, 80, 1, "x")[14:]),
		"pod's address":            tcp6(guest6IP, pod6IP, 1, 80, flagSYN, 1),
		"its link-local":           udp6(guest6IP, routerLL, 1, 53, "x"),
		"an answer to it":          advert6(ethOut, guest6IP, gateway6IP, guest6IP),
		"to its link-local one":    advert6(ethOut, guest6IP, routerLL, guest6IP),
		"of a link-local one":      advert6(ethOut, guestLL, routerLL, guestLL),
		"to all":                   advert6(ethAll, guest6IP, allNodes6, guest6IP),
	} {
		f := w.out(p)[0]
		assert.Equal(t, portTap, f.Out, name)
		assert.Equal(t, p, f.Bytes(), "%s: as it is", name)
	}
	local := func(p []byte) *frame.Frame { return w.stage(w.m.Local(0), portTap, frame.Offload{}, p)[0] }
	back := enginetest.UDPFrame(enginetest.Eth{Dst: guestMAC, Src: GatewayMAC}, pair6(gateway6IP, guest6IP), enginetest.UDP{Src: 53, Dst: 1}, nil)
	assert.Equal(t, portGuest, local(back).Out)
	ask := enginetest.ICMPFrame(enginetest.Eth{Dst: frame.MAC{0x33, 0x33, 0xff, 0, 0, 2}, Src: GatewayMAC}, pair6(routerLL, netip.MustParseAddr("ff02::1:ff00:2")), enginetest.ICMP{Type: icmp6NeighbourAsk}, make([]byte, 16))
	assert.Equal(t, portGuest, local(ask).Out)
	mld := enginetest.ICMPFrame(enginetest.Eth{Dst: frame.MAC{0x33, 0x33, 0, 0, 0, 0x16}, Src: GatewayMAC}, pair6(routerLL, netip.MustParseAddr("ff02::16")), enginetest.ICMP{Type: 143}, nil)
	assert.Equal(t, frame.NotCarried, local(mld).Reason)
}

// A guest that has been silent is asked for its hardware address.
func TestSilentGuest6(t *testing.T) {
	w := newWorld6(t, func(c *Config6) { c.Guests[0].MAC = frame.MAC{} })
	fs := w.in(udp6(host6A, pod6IP, 1, 80, "x"))
	require.Len(t, fs, 2)
	assert.Equal(t, frame.NoNeighbour, fs[0].Reason)
	p := fs[1].Bytes()
	require.True(t, enginetest.ChecksumsOK(p))
	assert.Equal(t, portGuest, fs[1].Out)
	assert.Equal(t, []byte{0x33, 0x33, 0xff, 0, 0, 2}, p[:6])
	assert.Equal(t, guest6IP.AsSlice(), p[62:78])
	assert.Equal(t, byte(255), p[21])
	w.out(udp6(guest6IP, host6A, 1, 2, ""))
	assert.Equal(t, portGuest, w.in(udp6(host6A, pod6IP, 1, 80, "x"))[0].Out)
}

// fragments6 cuts the payload of a frame into fragments.
func fragments6(p []byte, id uint32, size int) (out [][]byte) {
	payload := p[54:]
	for at := 0; at < len(payload); at += size {
		n := min(size, len(payload)-at)
		word := uint16(at)
		if at+n < len(payload) {
			word |= 1
		}
		f := append(bytes.Clone(p[:54]), p[20], 0, byte(word>>8), byte(word))
		f = append(binary.BigEndian.AppendUint32(f, id), payload[at:at+n]...)
		f[20] = 44
		binary.BigEndian.PutUint16(f[18:], uint16(len(f)-54))
		out = append(out, f)
	}
	return out
}

// Fragments follow their first one, in any order and both ways; together they
// are the translated packet.
func TestRFC4787Req14Fragments6(t *testing.T) {
	w := newWorld6(t)
	whole := udp6(guest6IP, host6A, 5000, 53, string(bytes.Repeat([]byte("abcdefgh"), 100)))
	fs := fragments6(whole, 99, 320)
	require.Len(t, fs, 3)
	assert.Equal(t, frame.Consumed, w.out(fs[2])[0].Out, "it waits")
	var got [][]byte
	for _, f := range w.out(fs[0], fs[1]) {
		require.Equal(t, portUplink, f.Out)
		got = append(got, bytes.Clone(f.Bytes()))
	}
	require.Len(t, got, 3)
	joined := bytes.Clone(got[0][:54])
	joined[20] = frame.ProtoUDP
	for _, at := range []uint16{0, 320, 640} {
		for _, g := range got {
			if be16(g[56:])&^7 == at {
				joined = append(joined, g[62:]...)
			}
		}
	}
	binary.BigEndian.PutUint16(joined[18:], uint16(len(joined)-54))
	assert.True(t, enginetest.ChecksumsOK(joined))
	assert.Equal(t, pod6IP.AsSlice(), joined[22:38])

	in := fragments6(udp6(host6A, pod6IP, 53, 5000, string(make([]byte, 900))), 7, 400)
	assert.Equal(t, frame.Consumed, w.in(in[1])[0].Out)
	for _, f := range w.in(in[0], in[2]) {
		assert.Equal(t, portGuest, f.Out)
		assert.Equal(t, guest6IP.AsSlice(), f.Bytes()[38:54])
	}
	bad := bytes.Clone(in[0][:len(in[0])-3])
	binary.BigEndian.PutUint16(bad[18:], uint16(len(bad)-54))
	assert.NotEqual(t, frame.ReasonNone, w.in(bad)[0].Reason, "H083: not a multiple of 8")
}

// Numbers of remote addresses go with their flows.
func TestFlowsAndNumbersEnd6(t *testing.T) {
	w := newWorld6(t, func(c *Config6) { c.Limits.Table = 100 })
	refused := 0
	for i := range 200 {
		to := netip.AddrFrom16(addr6Of(i + 1))
		if w.out(udp6(guest6IP, to, 5000, 53, ""))[0].Reason == frame.TableFull {
			refused++
		}
	}
	assert.Equal(t, 100, refused)
	w.now += int64(10 * time.Minute)
	w.m.Sweep(w.now)
	assert.Zero(t, w.m.Stats().Flows)
	for i := range 100 {
		to := netip.AddrFrom16(addr6Of(i + 1000))
		require.Equal(t, portUplink, w.out(udp6(guest6IP, to, 5000, 53, ""))[0].Out)
	}
}

func TestAllocs6(t *testing.T) {
	w := newWorld6(t)
	w.out(udp6(guest6IP, host6A, 5000, 53, "x"), udp6(guest6IP, host6B, 5000, 53, "x"))
	p, q := udp6(guest6IP, host6A, 5000, 53, "x"), udp6(guest6IP, host6B, 5000, 53, "x")
	out, in := w.m.Outbound(0), w.m.Inbound()
	a, b := udp6(host6A, pod6IP, 53, 5000, "x"), udp6(host6B, pod6IP, 53, 5000, "x")
	batch := new(frame.Batch)
	run := func(s interface{ Process(*frame.Batch) }, ps ...[]byte) {
		batch.Reset(w.now)
		for _, p := range ps {
			f := batch.Next()
			f.SetBytes(p, nil, nil)
		}
		s.Process(batch)
	}
	assert.Zero(t, testing.AllocsPerRun(100, func() {
		run(out, p, q, p, q)
		run(in, a, b, a, b)
	}))
}

// Workers use the table at once while flows of other addresses come and go.
func TestConcurrent6(t *testing.T) {
	w := newWorld6(t, func(c *Config6) { c.Limits.NewPerSecond, c.Limits.NewBurst = 1e9, 1<<20 })
	var wg sync.WaitGroup
	for worker := range 4 {
		wg.Go(func() {
			b := new(frame.Batch)
			now := w.now
			for i := range 2000 {
				to := netip.AddrFrom16(addr6Of(worker*3 + i%7 + 1))
				now += 10
				b.Reset(now)
				f := b.Next()
				f.SetBytes(udp6(guest6IP, to, 5000, 53, "x"), nil, nil)
				w.m.Outbound(0).Process(b)
				if f.Out != portUplink || [16]byte(f.Head[38:54]) != to.As16() {
					t.Errorf("lost: %v", f.Reason)
					return
				}
			}
		})
	}
	wg.Go(func() {
		for i := range 500 {
			w.m.Sweep(w.now + int64(i)*int64(20*time.Second))
		}
	})
	wg.Wait()
}

func FuzzSix(f *testing.F) {
	f.Add(udp6(guest6IP, host6A, 5000, 53, "x"), true)
	f.Add(tcp6(host6A, pod6IP, 999, 80, flagSYN, 7), false)
	f.Add(echo6(guest6IP, host6A, icmp6Echo, 9), true)
	f.Add(enginetest.ICMPFrame(ethIn, pair6(host6B, pod6IP), enginetest.ICMP{Type: icmp6TooBig, Rest: 1300}, udp6(pod6IP, host6A, 5000, 53, "x")[14:]), false)
	for _, p := range fragments6(udp6(guest6IP, host6A, 5000, 53, string(make([]byte, 50))), 99, 24) {
		f.Add(p, true)
	}
	f.Fuzz(func(t *testing.T, p []byte, out bool) {
		if len(p) < 1 || len(p) > 2000 {
			return
		}
		w := newWorld6(t)
		w.out(udp6(guest6IP, host6A, 5000, 53, "x"))
		if out {
			w.out(p, p)
		} else {
			w.in(p, p)
			w.stage(w.m.Local(0), portTap, frame.Offload{}, p)
		}
	})
}

// What a frame of a known flow costs, from one flow and from many, beside
// BenchmarkKnownFlow's.
func BenchmarkKnownFlow6(b *testing.B) {
	for _, flows := range []int{1, frame.BatchSize} {
		w := newWorld6(b)
		var out, in [][]byte
		for i := range frame.BatchSize {
			port := uint16(2000 + i%flows)
			out, in = append(out, udp6(guest6IP, host6B, port, 80, "data")), append(in, udp6(host6B, pod6IP, 80, port, "data"))
		}
		for name, c := range map[string]struct {
			stage interface{ Process(*frame.Batch) }
			ps    [][]byte
		}{"out": {w.m.Outbound(0), out}, "in": {w.m.Inbound(), in}} {
			b.Run(fmt.Sprintf("%s/%d", name, flows), func(b *testing.B) {
				w.out(out...)
				b.ReportAllocs()
				for b.Loop() {
					w.b.Reset(w.now)
					for _, p := range c.ps {
						w.b.Next().SetBytes(p, nil, nil)
					}
					c.stage.Process(w.b)
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*frame.BatchSize), "ns/frame")
			})
		}
	}
}
