package frame

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// slowSegment cuts a whole frame as its description says, the obvious way.
func (p packet) slowSegment(t testing.TB) [][]byte {
	t.Helper()
	var out [][]byte
	for off := 0; off < len(p.payload); off += p.gsoSize {
		q := p
		q.payload = p.payload[off:min(off+p.gsoSize, len(p.payload))]
		q.id = p.id + uint16(off/p.gsoSize)
		q.seq = p.seq + uint32(off)
		if off+p.gsoSize < len(p.payload) {
			q.flags &^= 0x09 // FIN, PSH
		}
		if off > 0 {
			q.flags &^= 0x80 // CWR
		}
		out = append(out, q.serialize(t))
	}
	return out
}

var segmentCases = []struct {
	name string
	p    packet
}{
	{"tcp4", packet{payload: pattern(64000), gsoSize: 1448, pieces: 17, optTCP: 12, flags: 0x18}},
	{"tcp4 one piece", packet{payload: pattern(10000), gsoSize: 1460, pieces: 1, flags: 0x19}},
	{"tcp4 exact multiple", packet{payload: pattern(1460 * 3), gsoSize: 1460, pieces: 3, flags: 0x18}},
	{"tcp4 odd segments", packet{payload: pattern(9999), gsoSize: 777, pieces: 23, flags: 0x90}},
	{"tcp4 all flags", packet{payload: pattern(4000), gsoSize: 1000, pieces: 2, flags: 0xff}},
	{"tcp4 one segment", packet{payload: pattern(1000), gsoSize: 1448, pieces: 1, flags: 0x98}},
	{"tcp4 payload in Head only", packet{payload: pattern(70), gsoSize: 48, flags: 0x18}},
	{"tcp4 payload in Tail only", packet{payload: pattern(5000), gsoSize: 1448, headLen: 54, pieces: 2}},
	{"tcp4 options", packet{payload: pattern(5000), gsoSize: 1400, pieces: 2, optIP: 8, optTCP: 40, flags: 0x10}},
	{"tcp4 wraps", packet{payload: pattern(5000), gsoSize: 1000, pieces: 2, id: 0xfffe, seq: 0xfffffc00, flags: 0x10}},
	{"tcp4 least mss", packet{payload: pattern(65000), gsoSize: 48, pieces: 5}},
	{"tcp4 crumbs", packet{payload: pattern(3000), gsoSize: 1448, pieces: 1024}},
	{"tcp4 largest", packet{payload: pattern(65535 - 40), gsoSize: 1460, pieces: 17}},
	{"tcp4 vlan", packet{payload: pattern(5000), gsoSize: 1448, vlan: 1, pieces: 2, flags: 0x18}},
	{"tcp4 qinq", packet{payload: pattern(5000), gsoSize: 1448, vlan: 2, pieces: 2, flags: 0x18}},
	{"tcp6", packet{v6: true, payload: pattern(64000), gsoSize: 1428, pieces: 17, optTCP: 12, flags: 0x18}},
	{"tcp6 vlan", packet{v6: true, payload: pattern(6000), gsoSize: 1428, vlan: 1, pieces: 3, flags: 0x91}},
	{"udp4", packet{udp: true, payload: pattern(60000), gsoSize: 1472, pieces: 17}},
	{"udp4 tiny", packet{udp: true, payload: pattern(128), gsoSize: 1, pieces: 2}},
	{"udp4 crosses Head oddly", packet{udp: true, payload: pattern(3001), gsoSize: 333, headLen: 127, pieces: 3}},
	{"udp6", packet{v6: true, udp: true, payload: pattern(50001), gsoSize: 1452, pieces: 17}},
}

func TestSegment(t *testing.T) {
	for _, c := range segmentCases {
		t.Run(c.name, func(t *testing.T) {
			f := c.p.frame(t)
			require.True(t, f.CheckOffload())
			f.In, f.Out, f.Queue, f.Token = 3, 4, 5, 6
			before, want := f.Bytes(), c.p.slowSegment(t)

			s := new(Segmenter)
			for round := range 2 { // the second begins with what the first left
				require.True(t, s.Start(f))
				require.Equal(t, len(want), s.Segments())
				for i, w := range want {
					o := s.Next()
					require.NotNil(t, o)
					require.Equal(t, w, o.Bytes(), "segment %d of round %d", i, round)
					require.Equal(t, Offload{}, o.Offload)
					require.Equal(t, []any{PortID(3), PortID(4), uint16(5), uint32(6)}, []any{o.In, o.Out, o.Queue, o.Token})
					_, l4 := c.p.offsets()
					require.Equal(t, l4, int(o.L4))
					require.Zero(t, s.src.L4, "the original is not touched")
				}
				require.Nil(t, s.Next())
				require.Nil(t, s.Next())
				require.Zero(t, s.Segments())
			}
			require.Equal(t, before, f.Bytes(), "the original is not touched")
		})
	}
}

// TestSegmentPartial completes partial segments by the rules of NeedsCsum and
// expects what the segmenter makes itself.
func TestSegmentPartial(t *testing.T) {
	for _, c := range segmentCases {
		t.Run(c.name, func(t *testing.T) {
			f := c.p.frame(t)
			s := &Segmenter{Partial: true}
			require.True(t, s.Start(f))
			for _, w := range c.p.slowSegment(t) {
				o := s.Next()
				require.NotNil(t, o)
				require.Equal(t, uint8(NeedsCsum), o.Flags)
				require.True(t, o.CheckOffload())
				o.CompleteChecksum()
				require.Equal(t, w, o.Bytes())
			}
			require.Nil(t, s.Next())
		})
	}
}

func TestSegmentGopacket(t *testing.T) {
	for _, c := range segmentCases {
		if c.p.vlan > 1 {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			s := new(Segmenter)
			require.True(t, s.Start(c.p.frame(t)))
			var payload []byte
			for o := s.Next(); o != nil; o = s.Next() {
				pkt := requireChecksums(t, o.Bytes())
				if u, ok := pkt.Layer(layers.LayerTypeUDP).(*layers.UDP); ok {
					payload = append(payload, u.Payload...) // the application layer may be guessed
				} else {
					payload = append(payload, pkt.Layer(layers.LayerTypeTCP).(*layers.TCP).Payload...)
				}
			}
			assert.True(t, bytes.Equal(c.p.payload, payload))
		})
	}
}

// TestSegmentIPv6Options has destination options before the TCP header (H073),
// which gopacket's builder cannot checksum.
func TestSegmentIPv6Options(t *testing.T) {
	p := packet{v6: true, optIP: 16, payload: pattern(5000), gsoSize: 1200, pieces: 2, flags: 0x18}
	f := p.frame(t)
	require.True(t, f.CheckOffload())
	s := new(Segmenter)
	require.True(t, s.Start(f))
	for i, want := range p.slowSegment(t) {
		require.Equal(t, want, s.Next().Bytes(), i)
	}
	require.Nil(t, s.Next())
}

func TestSegmentRefuses(t *testing.T) {
	tcp := packet{payload: pattern(4000), gsoSize: 1448, pieces: 2}
	tcp6 := packet{v6: true, payload: pattern(4000), gsoSize: 1448, pieces: 2}
	udp := packet{udp: true, payload: pattern(4000), gsoSize: 1448, pieces: 2}
	for _, c := range []struct {
		name  string
		p     packet
		spoil func(f *Frame)
	}{
		{"no GSO", tcp, func(f *Frame) { f.GSO = GSONone }},
		{"H071 unknown type", tcp, func(f *Frame) { f.GSO = 0x7f }},
		{"H071 ECN alone", tcp, func(f *Frame) { f.GSO = GSOECN }},
		{"H071 UFO", udp, func(f *Frame) { f.GSO = GSOUDP }},
		{"H071 UDP with ECN", udp, func(f *Frame) { f.GSO |= GSOECN }},
		{"wrong family", tcp, func(f *Frame) { f.GSO = GSOTCPv6 }},
		{"wrong family 6", tcp6, func(f *Frame) { f.GSO = GSOTCPv4 }},
		{"wrong protocol", tcp, func(f *Frame) { f.GSO = GSOUDPL4 }},
		{"wrong protocol udp", udp, func(f *Frame) { f.GSO = GSOTCPv4 }},
		{"H072 size 0", tcp, func(f *Frame) { f.GSOSize = 0 }},
		{"H072 size 1", tcp, func(f *Frame) { f.GSOSize = 1 }},
		{"H072 udp size 0", udp, func(f *Frame) { f.GSOSize = 0 }},
		{"H072 udp amplifier", udp, func(f *Frame) { f.GSOSize = 31 }},
		{"H072 no payload", tcp, func(f *Frame) { f.Len, f.HeadLen, f.Tail = 54, 54, nil }},
		{"H072 headers cut", tcp, func(f *Frame) { f.Len, f.HeadLen, f.Tail = 50, 50, nil }},
		{"H073 fragment", tcp, func(f *Frame) { f.Head[14+6] |= 0x20 }},
		{"H073 later fragment", tcp, func(f *Frame) { f.Head[14+7] = 1 }},
		{"H073 not IP", tcp, func(f *Frame) { f.Head[12] = 0x09 }},
		{"H073 three tags", tcp, func(f *Frame) {
			for i := 12; i < 24; i += 4 {
				binary.BigEndian.PutUint16(f.Head[i:], vlanType)
			}
		}},
		{"H073 routing header", tcp6, func(f *Frame) { f.Head[14+6] = 43 }},
		{"H073 fragment header", tcp6, func(f *Frame) { f.Head[14+6] = 44 }},
		{"H073 endless options", tcp6, func(f *Frame) { f.Head[14+6], f.Head[54], f.Head[55] = 60, 60, 255 }},
		{"H082 IHL 4", tcp, func(f *Frame) { f.Head[14] = 0x44 }},
		{"H082 version", tcp, func(f *Frame) { f.Head[14] = 0x65 }},
		{"H087 data offset 4", tcp, func(f *Frame) { f.Head[34+12] = 0x40 }},
		{"H087 data offset past Head", packet{vlan: 2, optIP: 40, payload: pattern(4000), gsoSize: 1448, pieces: 2},
			func(f *Frame) { f.Head[82+12] = 0xf0 }},
		{"head of 18 bytes", tcp, func(f *Frame) {
			b := f.Bytes()
			f.HeadLen, f.Tail = 18, [][]byte{b[18:]}
		}},
		{"length lies", tcp, func(f *Frame) { f.Len++ }},
		{"length lies down", tcp, func(f *Frame) { f.Len-- }},
		{"too long", tcp, func(f *Frame) {
			f.Tail = append(f.Tail, make([]byte, 65536))
			f.Len += 65536
		}},
		{"too many pieces", tcp, func(f *Frame) { f.Tail = append(f.Tail, make([][]byte, 1025)...) }},
		{"H072 a segment beyond 64 KiB", tcp, func(f *Frame) {
			n := MaxLen - int(f.HeadLen)
			f.Tail, f.Len, f.GSOSize = [][]byte{make([]byte, n)}, MaxLen, 65535
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := c.p.frame(t)
			c.spoil(f)
			s := new(Segmenter)
			assert.False(t, s.Start(f))
			assert.Nil(t, s.Next())
			assert.Zero(t, s.Segments())
		})
	}
}

func TestSegmentAllocs(t *testing.T) {
	f := segmentCases[0].p.frame(t)
	s := new(Segmenter)
	assert.Zero(t, testing.AllocsPerRun(20, func() {
		if !s.Start(f) {
			t.Fatal("refused")
		}
		for s.Next() != nil {
		}
	}))
}

func BenchmarkSegment(b *testing.B) {
	f := segmentCases[0].p.frame(b)
	for _, partial := range []bool{false, true} {
		b.Run(fmt.Sprintf("64KiB/partial=%v", partial), func(b *testing.B) {
			s := &Segmenter{Partial: partial}
			b.SetBytes(int64(f.Len))
			b.ReportAllocs()
			for b.Loop() {
				s.Start(f)
				for s.Next() != nil {
				}
			}
		})
	}
}

// FuzzSegment gives the segmenter any frame with any offload: what it takes
// must come out whole, in frames that gopacket finds sound.
func FuzzSegment(f *testing.F) {
	add := func(fr *Frame, name string) {
		var h [VnetHdrLen]byte
		fr.Encode(h[:])
		f.Add(h[:], fr.Bytes(), uint8(len(name)), false)
	}
	for _, c := range segmentCases {
		c.p.payload = c.p.payload[:min(len(c.p.payload), 3000)] // large inputs make fuzzing slow
		add(c.p.frame(f), c.name)
	}
	tcp := packet{payload: pattern(300), gsoSize: 100}
	for _, o := range []struct {
		name string
		o    Offload
	}{
		{"H070", Offload{NeedsCsum, GSOTCPv4, 54, 100, 65535, 65535}},
		{"H070 in Ethernet", Offload{NeedsCsum, GSOTCPv4, 54, 100, 0, 16}},
		{"H070 in IP", Offload{NeedsCsum, GSOTCPv4, 54, 100, 20, 16}},
		{"H071", Offload{NeedsCsum, 0x7f, 54, 100, 34, 16}},
		{"H071 ECN", Offload{NeedsCsum, GSOECN, 54, 100, 34, 16}},
		{"H072 size 0", Offload{NeedsCsum, GSOTCPv4, 54, 0, 34, 16}},
		{"H072 size 1", Offload{NeedsCsum, GSOTCPv4, 54, 1, 34, 16}},
		{"H072 size 65535", Offload{NeedsCsum, GSOTCPv4, 54, 65535, 34, 16}},
		{"H072 hdr_len 0", Offload{NeedsCsum, GSOTCPv4, 0, 100, 34, 16}},
		{"H072 hdr_len past the end", Offload{NeedsCsum, GSOTCPv4, 65535, 100, 34, 16}},
	} {
		fr := tcp.frame(f)
		fr.Offload = o.o
		add(fr, o.name)
	}
	for _, at := range []struct{ off, val int }{ // H082, H087
		{14, 0x44}, {14, 0x4f}, {14, 0x65}, {16, 0}, {17, 19}, {16, 0xff}, {34 + 12, 0x40}, {34 + 12, 0xf0}, {20, 0x20},
	} {
		fr := tcp.frame(f)
		fr.Head[at.off] = byte(at.val)
		add(fr, "spoiled")
	}
	s := new(Segmenter)
	f.Fuzz(func(t *testing.T, hdr, b []byte, pieces uint8, partial bool) {
		if len(hdr) < VnetHdrLen || len(b) > MaxLen {
			return
		}
		fr := new(Frame)
		fr.Decode(hdr)
		n := copy(fr.Head[:], b)
		fr.HeadLen, fr.Len, fr.Tail = uint16(n), int32(len(b)), cut(b[n:], int(pieces))
		s.Partial = partial
		sound := n >= EthernetLen && fr.CheckOffload() && fr.GSO != GSONone
		if !s.Start(fr) {
			require.False(t, sound, "CheckOffload lets through what cannot be segmented")
			require.Nil(t, s.Next())
			return
		}
		hlen, count := int(s.lay.hdr), 0
		want, got := b[hlen:], make([]byte, 0, len(b))
		for o := s.Next(); o != nil; o = s.Next() {
			count++
			if partial {
				require.True(t, o.CheckOffload())
				o.CompleteChecksum()
			}
			ob := o.Bytes()
			require.LessOrEqual(t, len(ob)-hlen, int(fr.GSOSize))
			got = append(got, ob[hlen:]...)
			checkSegment(t, ob, s.lay)
		}
		require.True(t, bytes.Equal(want, got))
		require.LessOrEqual(t, count, 65557/minGSOSize)
	})
}

// checkSegment verifies lengths and checksums of a segment, with gopacket
// where it can follow the headers, and by the slow sums always.
func checkSegment(t *testing.T, b []byte, l gsoLayout) {
	want := bytes.Clone(b)
	slowChecksum(want, int(l.l3), int(l.l4), l.v6, l.proto == ProtoUDP)
	require.Equal(t, want, b)
	n := len(b) - int(l.l3)
	if l.v6 {
		require.Equal(t, n-40, int(binary.BigEndian.Uint16(b[l.l3+4:])))
	} else {
		require.Equal(t, n, int(binary.BigEndian.Uint16(b[l.l3+2:])))
	}
	if l.proto == ProtoUDP {
		require.Equal(t, len(b)-int(l.l4), int(binary.BigEndian.Uint16(b[l.l4+4:])))
	}
	// gopacket is stricter than any kernel about options: where it gives up
	// before the transport header, the slow sums must do.
	pkt := gopacket.NewPacket(b, layers.LayerTypeEthernet, gopacket.NoCopy)
	if (!l.v6 || l.l4-l.l3 == 40) && pkt.TransportLayer() != nil {
		requireChecksums(t, b)
	}
}

// TestSegmentUDPZero: see TestCompleteChecksumZero.
func TestSegmentUDPZero(t *testing.T) {
	p := packet{udp: true, payload: []byte{0, 0, 0, 0}, gsoSize: 2}
	q := packet{udp: true, payload: []byte{0, 0}, complete: true}
	copy(p.payload[2:], q.serialize(t)[14+20+6:]) // adds what is missing to 0xffff
	s := new(Segmenter)
	require.True(t, s.Start(p.frame(t)))
	s.Next()
	assert.Equal(t, uint16(0xffff), binary.BigEndian.Uint16(s.Next().Head[14+20+6:]))
}
