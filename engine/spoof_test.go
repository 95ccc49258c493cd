package engine

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

var (
	own    = mac(1)
	theirs = mac(2)
	ip4A   = netip.MustParseAddr("10.0.0.1")
	ip4B   = netip.MustParseAddr("10.0.0.2")
	ip6A   = netip.MustParseAddr("fe80::1")
	ip6B   = netip.MustParseAddr("ff02::1")
)

func TestSwitchSpoofCheckRow80(t *testing.T) {
	for _, on := range []bool{false, true} {
		b := newBed(t, SwitchConfig{})
		b.port(SwitchPort{MAC: own, SpoofCheck: on})
		b.port(SwitchPort{})
		b.send(0, eth(frame.Broadcast, own, 0), eth(frame.Broadcast, theirs, 0), eth(frame.Broadcast, own, 7))
		if on {
			assert.Equal(t, []int{0, 2}, b.receivers())
			assert.Equal(t, frame.Spoofed, b.reason(1))
			assert.Zero(t, b.sw.fdb.table.Load().lookup(macKey(theirs, 0)), "not learned")
			assert.EqualValues(t, 1, b.sw.Stats().Ports[0].Drops["spoofed"])
		} else {
			assert.Equal(t, []int{0, 3}, b.receivers(), "off means off")
		}

		// The address of a checked port cannot be taken (H079).
		b.send(1, eth(frame.Broadcast, own, 0), eth(frame.Broadcast, own, 7))
		b.receivers()
		b.port(SwitchPort{})
		b.send(2, eth(own, mac(9), 0), eth(own, mac(9), 7))
		want := []int{2, 0, 0}
		if !on {
			want = []int{0, 2, 0}
		}
		assert.Equal(t, want, b.receivers())
		if on {
			assert.NotZero(t, b.sw.Stats().Ports[1].Refused)
		}
	}
}

func TestSwitchSpoofCheckNotOnUplinks(t *testing.T) {
	b := newBed(t, SwitchConfig{})
	b.port(SwitchPort{MAC: own, SpoofCheck: true, Uplink: true})
	b.port(SwitchPort{})
	b.send(0, eth(frame.Broadcast, theirs, 0))
	assert.Equal(t, []int{0, 1}, b.receivers())
}

// nd builds an ND message with options from its own station.
func nd(typ byte, options []byte, ext ...byte) []byte {
	fixed := map[byte]int{ndRouterSol: 0, ndRouterAdv: 8, ndNeighSol: 16, ndNeighAdv: 16, 137: 32}[typ]
	ip := enginetest.IP{Src: ip6A, Dst: ip6B, TTL: 255}
	msg := enginetest.ICMP{Type: typ}.Message(ip, append(make([]byte, fixed), options...))
	next := byte(protoICMP6)
	if len(ext) > 0 {
		next = ext[0]
		msg = append(append([]byte(nil), ext[1:]...), msg...)
	}
	return enginetest.Eth{Dst: frame.Broadcast, Src: own}.Frame(frame.TypeIPv6, ip.Packet(next, msg))
}

// lla is a link-layer address option.
func lla(typ byte, m frame.MAC) []byte { return append([]byte{typ, 1}, m[:]...) }

// filler is an unknown option of n times 8 bytes.
func filler(n int) []byte {
	b := make([]byte, 8*n)
	b[0], b[1] = 200, byte(n)
	return b
}

func cat(bs ...[]byte) (out []byte) {
	for _, b := range bs {
		out = append(out, b...)
	}
	return out
}

func TestSwitchCheckARPRow80(t *testing.T) {
	e := enginetest.Eth{Dst: frame.Broadcast, Src: own}
	arp := enginetest.ARPFrame(e, enginetest.ARPRequest, own, ip4A, frame.MAC{}, ip4B)
	liar := enginetest.ARPFrame(e, enginetest.ARPReply, theirs, ip4B, own, ip4A)
	edit := func(b []byte, at int, v byte) []byte {
		b = append([]byte(nil), b...)
		b[at] = v
		return b
	}
	rarp := func(b []byte) []byte { b = edit(b, 12, 0x80); b[13] = 0x35; return b }
	destOpts := func(next byte) []byte { return []byte{next, 0, 1, 4, 0, 0, 0, 0} }
	frag := func(next byte, field uint16) []byte {
		return []byte{next, 0, byte(field >> 8), byte(field), 0, 0, 0, 1}
	}
	tcp6 := enginetest.TCPFrame(e, enginetest.IP{Src: ip6A, Dst: ip6B}, enginetest.TCP{}, make([]byte, 200))

	for _, c := range []struct {
		name  string
		frame []byte
		off   frame.Offload
		want  frame.DropReason
	}{
		{name: "ARP", frame: arp},
		{name: "ARP with a tag", frame: tag(arp, typeVLAN, 5)},
		{name: "ARP that lies", frame: liar, want: frame.Spoofed},
		{name: "ARP that lies behind a tag", frame: tag(liar, typeVLAN, 5), want: frame.Spoofed},
		{name: "ARP that lies behind five tags", want: frame.Spoofed,
			frame: tag(tag(tag(tag(tag(liar, typeVLAN, 5), typeQinQ, 5), typeVLAN, 0), typeVLAN, 5), typeVLAN, 5)},
		{name: "RARP", frame: rarp(arp)},
		{name: "RARP that lies", frame: rarp(liar), want: frame.Spoofed},
		{name: "ARP of other hardware", frame: edit(arp, 15, 6), want: frame.Spoofed},
		{name: "ARP of other length", frame: edit(arp, 18, 8), want: frame.Spoofed},
		{name: "ARP cut", frame: arp[:41], want: frame.ShortFrame},
		{name: "ARP with a checksum left", frame: arp, want: frame.BadOffload,
			off: frame.Offload{Flags: frame.NeedsCsum, CsumStart: 14, CsumOffset: 8}},

		{name: "NS", frame: nd(ndNeighSol, lla(1, own))},
		{name: "NS without option", frame: nd(ndNeighSol, nil)},
		{name: "NS that lies", frame: nd(ndNeighSol, lla(1, theirs)), want: frame.Spoofed},
		{name: "NS that lies later", frame: nd(ndNeighSol, cat(filler(1), lla(1, own), lla(1, theirs))), want: frame.Spoofed},
		{name: "NS that lies behind Head", frame: nd(ndNeighSol, cat(filler(20), lla(1, theirs))), want: frame.Spoofed},
		{name: "NS that is honest behind Head", frame: nd(ndNeighSol, cat(filler(20), lla(1, own)))},
		{name: "NS with an option across Head's end", frame: nd(ndNeighSol, cat(filler(5), lla(1, theirs))), want: frame.Spoofed},
		{name: "NS too long", frame: nd(ndNeighSol, cat(filler(250), lla(1, own))), want: frame.Spoofed},
		{name: "NA", frame: nd(ndNeighAdv, lla(2, own))},
		{name: "NA that lies", frame: nd(ndNeighAdv, lla(2, theirs)), want: frame.Spoofed},
		{name: "NA with a source option", frame: nd(ndNeighAdv, lla(1, theirs))},
		{name: "RS that lies", frame: nd(ndRouterSol, lla(1, theirs)), want: frame.Spoofed},
		{name: "RA", frame: nd(ndRouterAdv, cat(filler(4), filler(3), lla(1, own)))},
		{name: "RA that lies", frame: nd(ndRouterAdv, cat(filler(4), filler(3), lla(1, theirs))), want: frame.Spoofed},
		{name: "redirect names another", frame: nd(137, lla(2, theirs))},
		{name: "echo", frame: nd(128, nil)},
		{name: "option of length 0", frame: nd(ndNeighSol, make([]byte, 8)), want: frame.BadTransport},
		{name: "option too long", frame: nd(ndNeighSol, []byte{1, 2, 0, 0, 0, 0, 0, 0}), want: frame.BadTransport},
		{name: "half an option", frame: nd(ndNeighSol, []byte{1, 1, 0, 0}), want: frame.BadTransport},
		{name: "behind destination options", frame: nd(ndNeighSol, lla(1, own), cat([]byte{extDestOpts}, destOpts(protoICMP6))...)},
		{name: "lies behind destination options", want: frame.Spoofed,
			frame: nd(ndNeighSol, lla(1, theirs), cat([]byte{extDestOpts}, destOpts(extHopByHop), destOpts(extRouting), destOpts(protoICMP6))...)},
		{name: "behind headers without end", want: frame.Spoofed,
			frame: nd(ndNeighSol, lla(1, own), cat([]byte{extDestOpts, extDestOpts, 30}, make([]byte, 246), destOpts(protoICMP6))...)},
		{name: "in a first fragment", want: frame.Spoofed,
			frame: nd(ndNeighSol, lla(1, own), cat([]byte{extFragment}, frag(protoICMP6, 1))...)},
		{name: "in an atomic fragment", want: frame.ReasonNone,
			frame: nd(ndNeighSol, lla(1, own), cat([]byte{extFragment}, frag(protoICMP6, 0))...)},
		{name: "lies in an atomic fragment", want: frame.Spoofed,
			frame: nd(ndNeighSol, lla(1, theirs), cat([]byte{extFragment}, frag(protoICMP6, 0))...)},
		{name: "a later fragment",
			frame: nd(ndNeighSol, lla(1, theirs), cat([]byte{extFragment}, frag(protoICMP6, 8))...)},
		{name: "checksum into the headers of a later fragment", want: frame.BadOffload,
			frame: nd(ndNeighSol, lla(1, theirs), cat([]byte{extFragment}, frag(protoICMP6, 8))...),
			off:   frame.Offload{Flags: frame.NeedsCsum, CsumStart: 54, CsumOffset: 0}},
		{name: "cut behind the header", frame: nd(ndNeighSol, nil)[:54], want: frame.Spoofed},
		{name: "cut in the message", frame: nd(ndNeighSol, lla(1, own))[:80], want: frame.BadTransport},
		{name: "cut in the header", frame: nd(ndNeighSol, nil)[:53], want: frame.ShortFrame},
		{name: "checksum left", frame: nd(ndNeighSol, lla(1, own)),
			off: frame.Offload{Flags: frame.NeedsCsum, CsumStart: 54, CsumOffset: 2}},
		{name: "checksum into the option", frame: nd(ndNeighSol, lla(1, own)), want: frame.BadOffload,
			off: frame.Offload{Flags: frame.NeedsCsum, CsumStart: 54, CsumOffset: 26}},
		{name: "checksum into the IPv6 header", frame: tcp6, want: frame.BadOffload,
			off: frame.Offload{Flags: frame.NeedsCsum, CsumStart: 18, CsumOffset: 2}},
		{name: "TCP", frame: tcp6, off: frame.Offload{Flags: frame.NeedsCsum, CsumStart: 54, CsumOffset: 16}},
		{name: "IPv4", frame: enginetest.UDPFrame(e, enginetest.IP{Src: ip4A, Dst: ip4B}, enginetest.UDP{}, nil)},
	} {
		t.Run(c.name, func(t *testing.T) {
			// The snapshot of a plain switch port and a whole Head say the same.
			for _, snapshot := range []int{18, 19, 60, frame.HeadSize} {
				b := newBed(t, SwitchConfig{})
				b.port(SwitchPort{MAC: own, SpoofCheck: true, CheckARP: true})
				b.port(SwitchPort{})
				b.decide(0, enginetest.Packet{Bytes: c.frame, Offload: c.off})
				b.batch.Reset(0)
				setSnapshot(b.batch, c.frame, snapshot, b.ids[0]).Offload = c.off
				b.stages[0].Process(b.batch)
				require.Equal(t, c.want, b.reason(0), "snapshot %d", snapshot)
				b.deliver(0)
				got := b.got()[1]
				if c.want != frame.ReasonNone {
					assert.Empty(t, got)
					continue
				}
				require.Len(t, got, 1)
				assert.Equal(t, c.frame, got[0])
			}
		})
	}
}

// setSnapshot makes the batch one frame of which n bytes are private and the
// rest lies in pieces.
func setSnapshot(bt *frame.Batch, data []byte, n int, in frame.PortID) *frame.Frame {
	n = min(n, len(data))
	f := bt.Next()
	segs := bt.Segs(4)
	f.SetBytes(data[:n], nil, segs)
	f.Len, f.In = int32(len(data)), in
	for rest := data[n:]; len(rest) > 0; {
		k := len(rest)
		if len(f.Tail) < 2 {
			k = (k + 1) / 2
		}
		f.Tail = append(f.Tail, rest[:k:k])
		rest = rest[k:]
	}
	return f
}

// TestSwitchCheckARPOff: without it, nothing behind the addresses is looked at.
func TestSwitchCheckARPOff(t *testing.T) {
	b := newBed(t, SwitchConfig{})
	b.port(SwitchPort{MAC: own, SpoofCheck: true})
	b.port(SwitchPort{})
	b.send(0, enginetest.ARPFrame(enginetest.Eth{Dst: frame.Broadcast, Src: own}, 2, theirs, ip4B, own, ip4A))
	assert.Equal(t, []int{0, 1}, b.receivers())
}

// TestPrivateIsPrivate: what ND options are judged by cannot change afterwards.
func TestPrivateIsPrivate(t *testing.T) {
	b := newBed(t, SwitchConfig{})
	b.port(SwitchPort{MAC: own, SpoofCheck: true, CheckARP: true})
	b.port(SwitchPort{})
	data := nd(ndNeighSol, cat(filler(20), lla(1, own)))
	want := append([]byte(nil), data...)
	b.decide(0, enginetest.Packet{Bytes: data})
	binary.BigEndian.PutUint32(data[len(data)-4:], 0xdeadbeef)
	b.deliver(0)
	assert.Equal(t, want, b.got()[1][0])
}
