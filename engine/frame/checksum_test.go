package frame

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestSumRFC1071 is the example of RFC 1071, 3.
func TestSumRFC1071(t *testing.T) {
	assert.Equal(t, uint16(0xddf2), Fold(Sum([]byte{0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7}, 0)))
}

func TestSum(t *testing.T) {
	ones, rnd := make([]byte, 70000), make([]byte, 70000)
	r := rand.New(rand.NewPCG(1, 2))
	for i := range ones {
		ones[i], rnd[i] = 0xff, byte(r.Uint32())
	}
	for n := range 300 {
		for _, b := range [][]byte{ones, rnd, make([]byte, 300)} {
			// The slow sum knows no negative zero for no data.
			require.Equal(t, slowSum(b[:n]), Fold(Sum(b[:n], 0)), n)
		}
		require.Equal(t, slowSum(rnd[1:n+1]), Fold(Sum(rnd[1:n+1], 0)), n)
	}
	assert.Equal(t, slowSum(rnd), Fold(Sum(rnd, 0)))
	assert.Equal(t, slowSum(ones), Fold(Sum(ones, 0)))
}

// TestSumCarries begins with sums that overflow at every step.
func TestSumCarries(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 2000 {
		b := make([]byte, r.IntN(100))
		for i := range b {
			b[i] = byte(r.IntN(2) * 0xff)
		}
		for _, start := range []uint64{0, 1, 0xffff, 1 << 32, ^uint64(0), ^uint64(0) - 1, 0xffffffff00000000, r.Uint64()} {
			var s [8]byte
			binary.BigEndian.PutUint64(s[:], start)
			want := slowSum(append(s[:], b...))
			require.Equal(t, want%0xffff, Fold(Sum(b, start))%0xffff, "%x %x", start, b)
			for _, odd := range []bool{false, true} {
				pad := append(append([]byte{}, s[:]...), b...)
				if odd {
					pad = append(append(append([]byte{}, s[:]...), 0), b...)
				}
				require.Equal(t, slowSum(pad)%0xffff, Fold(sumPiece(b, start, odd))%0xffff, "%x %x %v", start, b, odd)
			}
		}
	}
}

func TestFold(t *testing.T) {
	for _, c := range []struct {
		sum  uint64
		want uint16
	}{
		{0, 0}, {0xffff, 0xffff}, {0x10000, 1}, {0x1ffff, 1}, {0xffffffff, 0xffff}, {1 << 48, 1},
		{^uint64(0), 0xffff}, {^uint64(0) - 1, 0xfffe}, {0xffff_ffff_0000_0001, 1}, {0xffff_ffff_ffff_0000, 0xffff},
	} {
		assert.Equal(t, c.want, Fold(c.sum), "%x", c.sum)
	}
	r := rand.New(rand.NewPCG(5, 6))
	for range 10000 {
		s := r.Uint64()
		want := s % 0xffff
		if want == 0 {
			want = 0xffff
		}
		require.Equal(t, uint16(want), Fold(s), "%x", s)
	}
}

// TestUpdate compares with a checksum made anew, the cases of RFC 1624, 4
// among them, where equation 2 of RFC 1141 goes wrong.
// TestUpdateFrame changes an address of a complete and of a partial frame and
// expects what a frame with that address from the beginning has.
// TestSumFrom tries every start, end and cut of a small frame.
func TestSumFrom(t *testing.T) {
	b := pattern(HeadSize + 60)
	r := rand.New(rand.NewPCG(9, 10))
	for range 3000 {
		f := new(Frame)
		n := 14 + r.IntN(HeadSize-14+1)
		copy(f.Head[:n], b)
		f.HeadLen, f.Len = uint16(n), int32(len(b))
		for rest := b[n:]; len(rest) > 0; {
			k := r.IntN(min(len(rest), 20) + 1) // empty pieces too
			f.Tail = append(f.Tail, rest[:k])
			rest = rest[k:]
		}
		start := r.IntN(n)
		end := start + r.IntN(len(b)-start+1)
		init := r.Uint64() | 1
		var s [8]byte
		binary.BigEndian.PutUint64(s[:], init)
		require.Equal(t, slowSum(append(s[:], b[start:end]...)), Fold(f.SumFrom(start, end, init)), "%d:%d of %d", start, end, n)
	}
}

func TestCompleteChecksum(t *testing.T) {
	for _, p := range []packet{
		{payload: pattern(1), pieces: 1}, {payload: pattern(1460), pieces: 3}, {v6: true, payload: pattern(1001), pieces: 4},
		{udp: true, payload: pattern(1000), pieces: 2}, {udp: true, v6: true, payload: pattern(33)}, {vlan: 1, payload: pattern(90), pieces: 2},
		{udp: true, payload: pattern(999), headLen: 42, pieces: 5}, {payload: pattern(999), headLen: 55, pieces: 5},
	} {
		f := p.frame(t)
		require.True(t, f.CheckOffload())
		f.CompleteChecksum()
		require.Equal(t, Offload{}, f.Offload)
		require.Equal(t, p.serialize(t), f.Bytes())
	}
}

// TestCompleteChecksumZero: a UDP checksum that comes out as 0 is sent as
// 0xffff, that of TCP as 0 (RFC 768).
func TestCompleteChecksumZero(t *testing.T) {
	for _, udp := range []bool{false, true} {
		p := packet{udp: udp, payload: []byte{0, 0}, complete: true}
		field, want := 14+20+16, uint16(0)
		if udp {
			field, want = 14+20+6, 0xffff
		}
		b := p.serialize(t)
		p.payload = b[field : field+2] // adds what is missing to 0xffff
		f := p.frame(t)
		require.Equal(t, want, binary.BigEndian.Uint16(f.Head[field:]), "the builder's")
		p.complete = false
		f = p.frame(t)
		require.True(t, f.CheckOffload())
		f.CompleteChecksum()
		require.Equal(t, want, binary.BigEndian.Uint16(f.Head[field:]))
	}
}

func TestCheckOffload(t *testing.T) {
	tcp := packet{payload: pattern(4000), pieces: 2}
	gso := packet{payload: pattern(4000), pieces: 2, gsoSize: 1448}
	udp := packet{udp: true, payload: pattern(4000), pieces: 2, gsoSize: 1000}
	for _, c := range []struct {
		name string
		p    packet
		o    func(o *Offload)
		ok   bool
	}{
		{"checksum", tcp, func(*Offload) {}, true},
		{"none", tcp, func(o *Offload) { *o = Offload{} }, true},
		{"H070 without NEEDS_CSUM offsets mean nothing", tcp, func(o *Offload) { *o = Offload{CsumStart: 65535, CsumOffset: 65535} }, true},
		{"H070 both 65535", tcp, func(o *Offload) { o.CsumStart, o.CsumOffset = 65535, 65535 }, false},
		{"H070 sum wraps", tcp, func(o *Offload) { o.CsumOffset = 65535 - 33 }, false},
		{"H070 start behind the end", tcp, func(o *Offload) { o.CsumStart = 5000 }, false},
		{"H070 field behind Head", tcp, func(o *Offload) { o.CsumOffset = HeadSize - 34 - 1 }, false},
		{"H070 last field of Head", tcp, func(o *Offload) { o.CsumOffset = HeadSize - 34 - 2 }, true},
		{"H070 in Ethernet header", tcp, func(o *Offload) { o.CsumStart = 0 }, false},
		{"H070 in IP header", tcp, func(o *Offload) { o.CsumStart = 33 }, false},
		{"H070 odd", tcp, func(o *Offload) { o.CsumStart = 35 }, true},
		{"H073 inner header of a tunnel", tcp, func(o *Offload) { o.CsumStart = 84 }, true},
		{"H073 IPv6", packet{v6: true, payload: pattern(100)}, func(*Offload) {}, true},
		{"H070 in IPv6 header", packet{v6: true, payload: pattern(100)}, func(o *Offload) { o.CsumStart = 53 }, false},
		{"H073 VLAN", packet{vlan: 1, payload: pattern(100)}, func(*Offload) {}, true},
		{"tso", gso, func(*Offload) {}, true},
		{"tso with ECN", gso, func(o *Offload) { o.GSO |= GSOECN }, true},
		{"tso without NEEDS_CSUM", gso, func(o *Offload) { o.Flags = 0 }, false},
		{"tso, wrong field", gso, func(o *Offload) { o.CsumOffset = 6 }, false},
		{"tso, wrong start", gso, func(o *Offload) { o.CsumStart = 36 }, false},
		{"H071 ECN alone", gso, func(o *Offload) { o.GSO = GSOECN }, false},
		{"H071 0x7f", gso, func(o *Offload) { o.GSO = 0x7f }, false},
		{"H071 UFO", udp, func(o *Offload) { o.GSO = GSOUDP }, false},
		{"H072 size 47", gso, func(o *Offload) { o.GSOSize = 47 }, false},
		{"H072 size 48", gso, func(o *Offload) { o.GSOSize = 48 }, true},
		{"H072 size beyond the payload", gso, func(o *Offload) { o.GSOSize = 5000 }, true},
		{"H072 hdr_len lies", gso, func(o *Offload) { o.HdrLen = 9999 }, true},
		{"uso", udp, func(*Offload) {}, true},
		{"uso, 128 segments", udp, func(o *Offload) { o.GSOSize = 32 }, true},
		{"H072 uso, 130 segments", udp, func(o *Offload) { o.GSOSize = 31 }, false},
		{"H072 uso, size 0", udp, func(o *Offload) { o.GSOSize = 0 }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := c.p.frame(t)
			c.o(&f.Offload)
			require.Equal(t, c.ok, f.CheckOffload())
			if !c.ok {
				return
			}
			want := 0
			switch f.GSOType() {
			case GSOTCPv4:
				want = 54
			case GSOUDPL4:
				want = 42
			}
			assert.Equal(t, want, int(f.HdrLen))
			if f.Flags&NeedsCsum == 0 {
				assert.Zero(t, f.Offload)
			}
			if f.GSO == GSONone && f.Flags&NeedsCsum != 0 {
				f.CompleteChecksum() // must not reach outside of the frame
			}
		})
	}
}

func TestOffloadCodec(t *testing.T) {
	b := []byte{0xff, 0x81, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9}
	var o Offload
	o.Decode(b)
	assert.Equal(t, Offload{NeedsCsum | DataValid, 0x81, 0x201, 0x403, 0x605, 0x807}, o)
	got := make([]byte, 12)
	o.Encode(got)
	assert.Equal(t, []byte{3, 0x81, 1, 2, 3, 4, 5, 6, 7, 8, 1, 0}, got, "num_buffers is 1 (H075)")
	got = make([]byte, 12)
	o.Encode(got[:10])
	assert.Equal(t, []byte{0, 0}, got[10:])
}

func BenchmarkSum(b *testing.B) {
	buf := pattern(65536)
	for _, n := range []int{20, 40, 60, 1460, 9000, 65535} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.SetBytes(int64(n))
			for b.Loop() {
				sink += Sum(buf[:n], 0)
			}
		})
	}
}

var sink uint64

func BenchmarkSumFrom(b *testing.B) {
	for _, pieces := range []int{1, 2} {
		b.Run(fmt.Sprintf("1514/pieces=%d", pieces), func(b *testing.B) {
			f := packet{payload: pattern(1460), pieces: pieces}.frame(b)
			b.SetBytes(int64(f.Len))
			b.ReportAllocs()
			for b.Loop() {
				sink += f.SumFrom(34, int(f.Len), 0)
			}
		})
	}
}
