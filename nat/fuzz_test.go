package nat

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

// withPartial leaves the transport checksum of p to others, as a guest with
// checksum offload does.
func withPartial(p packet, gso uint8) packet {
	d := append([]byte(nil), p.data...)
	h := d[frame.EthernetLen:]
	l4 := frame.EthernetLen + int(h[0]&15)*4
	off := sumOffset(h[9])
	sum := frame.Sum(h[12:20], uint64(h[9])+uint64(len(d)-l4))
	binary.BigEndian.PutUint16(d[l4+off:], frame.Fold(sum))
	o := frame.Offload{Flags: frame.NeedsCsum, CsumStart: uint16(l4), CsumOffset: uint16(off), GSO: gso}
	if gso != frame.GSONone {
		o.GSOSize = 1000
	}
	return packet{d, o}
}

// TestChecksumsAreExact translates random packets both ways and computes every
// checksum anew: decode compares bit by bit.
func TestChecksumsAreExact(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		w := newWorld(t, ports80)
		g := fromGuestTo(uint16(1+rnd.IntN(65535)), rnd.Uint32()>>3|0x10000000, uint16(1+rnd.IntN(65535)))
		if g.dst>>24 == 0 || g.dst>>24 == 127 || g.dst == podIP || g.dst>>8 == guestIP>>8 {
			continue
		}
		payload := pattern(rnd.IntN(1300))
		isTCP := rnd.IntN(2) == 0
		make := func(f flow5, flags string) packet {
			if isTCP {
				return tcp(f, flags, rnd.Uint32(), rnd.Uint32(), payload)
			}
			return udp(f, payload)
		}
		p, q := make(g, "S"), make
		gso := uint8(frame.GSOUDPL4)
		if isTCP {
			gso = frame.GSOTCPv4
		}
		finish := func(p packet) packet {
			switch rnd.IntN(3) {
			case 0:
				return withPartial(p, frame.GSONone)
			case 1:
				if len(p.data) > 1100 {
					return withPartial(p, gso)
				}
			}
			return p
		}
		fs := w.out(finish(p))
		x := w.one(fs, portUplink).flow()
		require.Equal(t, g.dst, x.dst)
		back := w.one(w.in(finish(q(x.back(), "SA"))), portGuest)
		require.Equal(t, g.back(), back.flow())
		require.Equal(t, payload, string(back.TransportLayer().LayerPayload()))
	}
}

func TestUDPWithoutChecksum(t *testing.T) {
	w := newWorld(t)
	p := udp(fromGuestTo(33000, hostB, 53), "x")
	p.data[40], p.data[41] = 0, 0
	fs := w.out(p)
	w.one(fs, portUplink)
	require.Zero(t, binary.BigEndian.Uint16(fs[0].Head[40:]), "RFC 768: none stays none")
}

func TestUDPChecksumNeverBecomesZero(t *testing.T) {
	// Some payload among these makes the sum 0, which must be sent as 0xffff.
	w := newWorld(t)
	hit := 0
	for i := range 1 << 16 {
		p := udp(fromGuestTo(5000, hostB, 53), string([]byte{byte(i >> 8), byte(i)}))
		fs := w.out(p)
		sum := binary.BigEndian.Uint16(fs[0].Head[40:])
		require.NotZero(t, sum)
		if sum == 0xffff {
			hit++
			decode(t, fs[0])
		}
	}
	require.Positive(t, hit)
}

// offloads that would have a checksum written over what was translated, or
// that contradict their packet.
var badOffloads = map[string]frame.Offload{
	"H070 into Ethernet":      {Flags: frame.NeedsCsum, CsumStart: 0, CsumOffset: 12},
	"H070 over the address":   {Flags: frame.NeedsCsum, CsumStart: 14, CsumOffset: 12},
	"H070 over the port":      {Flags: frame.NeedsCsum, CsumStart: 34, CsumOffset: 0},
	"H070 wrong field":        {Flags: frame.NeedsCsum, CsumStart: 34, CsumOffset: 16},
	"H070 over the next port": {Flags: frame.NeedsCsum, CsumStart: 38, CsumOffset: 2},
	"H071 GSO without sum":    {GSO: frame.GSOUDPL4, GSOSize: 1000},
	"H071 TCP GSO on UDP":     {Flags: frame.NeedsCsum, CsumStart: 34, CsumOffset: 6, GSO: frame.GSOTCPv4, GSOSize: 1000},
	"H071 IPv6 GSO":           {Flags: frame.NeedsCsum, CsumStart: 34, CsumOffset: 6, GSO: frame.GSOTCPv6, GSOSize: 1000},
	"H071 UFO":                {Flags: frame.NeedsCsum, CsumStart: 34, CsumOffset: 6, GSO: frame.GSOUDP, GSOSize: 1000},
}

func TestH070H071HostileOffload(t *testing.T) {
	for name, o := range badOffloads {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			p := udp(fromGuestTo(5000, hostB, 53), pattern(1200))
			w.dropped(w.out(packet{p.data, o}), frame.BadOffload)
			require.Empty(t, w.flows())
		})
	}
	// H073: on a fragment.
	w := newWorld(t)
	p := fragments(udp(fromGuestTo(5000, hostB, 53), pattern(4000)), 1480)[0]
	p.off = frame.Offload{Flags: frame.NeedsCsum, CsumStart: 34, CsumOffset: 6}
	w.dropped(w.out(p), frame.BadOffload)
}

func TestH083HostileFragments(t *testing.T) {
	set := func(p packet, field uint16, n int) packet {
		p.data = p.data[:min(34+n, len(p.data))]
		return edit(p, func(ip []byte) {
			binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
			binary.BigEndian.PutUint16(ip[6:], field)
		})
	}
	u := udp(fromGuestTo(5000, hostB, 53), pattern(1400))
	c := tcp(fromGuestTo(5000, hostB, 53), "S", 1, 0, pattern(1400))
	for name, tc := range map[string]struct {
		p packet
		r frame.DropReason
	}{
		"tiny first":            {set(c, frame.MoreFragments, 16), frame.BadTransport},
		"tiny first, UDP":       {set(u, frame.MoreFragments, 4), frame.BadTransport},
		"overlaps flags":        {set(c, 1, 800), frame.BadTransport},
		"overlaps the sum":      {set(c, 2, 800), frame.BadTransport},
		"beyond 65535":          {set(u, 8189, 800), frame.BadIPv4},
		"odd length":            {set(u, frame.MoreFragments|100, 801), frame.BadIPv4},
		"first of odd length":   {set(u, frame.MoreFragments, 801), frame.BadIPv4},
		"empty":                 {set(u, 100, 0), frame.BadIPv4},
		"TCP first with header": {set(c, frame.MoreFragments, 24), 0},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			if tc.r == 0 {
				require.Equal(t, portUplink, w.out(tc.p)[0].Out)
				return
			}
			w.dropped(w.out(tc.p), tc.r)
			require.Zero(t, w.m.Stats().Fragments.Waiting)
		})
	}
}

// seeds are hostile and ordinary packets for both fuzz targets. Each entry is
// a script: offload bytes, length and frame, again and again.
func seeds(f *testing.F, src, dst uint32) {
	a := flow5{src, dst, 5000, 80}
	var ps []packet
	add := func(p packet) { ps = append(ps, p) }
	add(udp(a, "hello"))
	add(tcp(a, "S", 1, 0, "x"))
	add(withPartial(tcp(a, "SA", 1, 2, pattern(1200)), frame.GSOTCPv4))
	add(echo(src, dst, 7, 1))
	add(echoReply(src, dst, 7, 1))
	add(icmpAbout(src, dst, 3, 4, udp(a.back(), "quoted")))
	add(icmpAbout(src, dst, 11, 0, echo(dst, src, 7, 1)))
	for n := range 29 {
		add(icmpQuoting(src, dst, 3, 3, udp(a.back(), "quoted").data[14:14+n])) // H085
	}
	ps = append(ps, fragments(udp(a, pattern(3000)), 1480)...)
	for _, o := range badOffloads {
		add(packet{udp(a, pattern(1200)).data, o})
	}
	add(arp(1, guestMAC, frame.Broadcast, guestMAC, guestIP, gatewayIP)) // H081
	add(arp(2, guestMAC, GatewayMAC, guestMAC, gatewayIP, guestIP))
	for ihl := range byte(16) { // H082
		add(edit(udp(a, pattern(60)), func(ip []byte) { ip[0] = 0x40 | ihl }))
	}
	for _, total := range []uint16{0, 19, 20, 27, 28, 65535} {
		add(edit(udp(a, "x"), func(ip []byte) { binary.BigEndian.PutUint16(ip[2:], total) }))
	}
	for _, l := range []byte{0, 7, 8, 255} { // H087
		add(edit(udp(a, "x"), func(ip []byte) { ip[25] = l }))
		add(edit(tcp(a, "S", 1, 0, "x"), func(ip []byte) { ip[32] = l << 4 }))
	}
	for n := range 60 { // H078
		add(packet{data: udp(a, pattern(60)).data[:n]})
	}
	options := build(eth(src), ip4(src, dst, layers.IPProtocolTCP), &layers.TCP{SrcPort: 5000, DstPort: 80, SYN: true},
		gopacket.Payload(""))
	add(edit(packet{data: append(options.data, 3, 0, 3, 99)}, func(ip []byte) { // H096: option of length 0
		binary.BigEndian.PutUint16(ip[2:], 44)
		ip[32] = 6 << 4
	}))
	for _, p := range ps {
		f.Add(script(p))
	}
	f.Add(script(ps...))
}

func script(ps ...packet) (s []byte) {
	for _, p := range ps {
		var h [frame.VnetHdrLen]byte
		p.off.Encode(h[:])
		s = append(append(s, h[:]...), byte(len(p.data)>>8), byte(len(p.data)))
		s = append(s, p.data...)
	}
	return s
}

func unscript(s []byte) (ps []packet) {
	for len(s) >= frame.VnetHdrLen+2 && len(ps) < frame.BatchSize {
		var p packet
		p.off.Decode(s)
		n := min(int(binary.BigEndian.Uint16(s[frame.VnetHdrLen:])), len(s)-frame.VnetHdrLen-2)
		p.data, s = s[frame.VnetHdrLen+2:][:n], s[frame.VnetHdrLen+2+n:]
		// What a port lets through has passed this.
		f := new(frame.Frame)
		f.SetBytes(p.data, nil, make([][]byte, 1))
		f.Offload = p.off
		if f.CheckOffload() {
			p.off = f.Offload
			ps = append(ps, p)
		}
	}
	return ps
}

// sound checks what must hold of every batch that left a stage.
func sound(t *testing.T, w *world, fs []*frame.Frame, inbound bool) {
	for _, f := range fs {
		require.LessOrEqual(t, int(f.HeadLen), frame.HeadSize)
		n := int(f.HeadLen)
		for _, s := range f.Tail {
			n += len(s)
		}
		require.EqualValues(t, f.Len, n)
		if f.Out == frame.Drop || f.Out == frame.Consumed || f.Out == portTap {
			continue
		}
		ip := f.Head[14:]
		switch f.Out {
		case portUplink, portKernel:
			require.Equal(t, podIP, binary.BigEndian.Uint32(ip[ipSrc:]), "nothing leaves with another address")
		case portGuest:
			if f.EtherType() == frame.TypeIPv4 {
				require.Equal(t, guestIP, binary.BigEndian.Uint32(ip[ipDst:]))
			}
		default:
			t.Fatalf("sent to port %d", f.Out)
		}
		if f.EtherType() == frame.TypeIPv4 {
			require.Equal(t, slowSum(ip[:int(ip[0]&15)*4], 10, 0), binary.BigEndian.Uint16(ip[10:]))
		}
	}
	s := w.m.Stats()
	require.LessOrEqual(t, s.Fragments.Waiting, 2*256<<10)
	require.Equal(t, s.Flows, s.Guests[0].Flows)
}

func fuzzStage(f *testing.F, src, dst uint32, inbound bool) {
	seeds(f, src, dst)
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, opt := range []option{func(*Config) {}, ports80} {
			w := newWorld(t, opt)
			w.out(udp(fromGuestTo(5000, hostA, 80), "x")) // so that some flows are known
			w.out(tcp(fromGuestTo(5000, hostA, 80), "S", 1, 0, ""))
			w.in(tcp(toPod(hostA, 80, 80), "S", 1, 0, ""))
			ps := unscript(data)
			if inbound {
				sound(t, w, w.in(ps...), inbound)
			} else {
				sound(t, w, w.out(ps...), inbound)
			}
			w.stage(w.m.Local(0), portTap, ps...)
			for range 3 {
				w.pass(10 * time.Hour)
				w.m.Sweep(w.now)
			}
			s := w.m.Stats()
			require.Zero(t, s.Flows)
			require.Zero(t, s.Mappings)
			require.Zero(t, s.Fragments.Waiting)
		}
	})
}

func FuzzOutbound(f *testing.F) { fuzzStage(f, guestIP, hostA, false) }

func FuzzInbound(f *testing.F) { fuzzStage(f, hostA, podIP, true) }
