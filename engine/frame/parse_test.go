package frame

import (
	"encoding/binary"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// set changes bytes of a frame's head and mends the IPv4 header checksum.
func set(f *Frame, at int, b ...byte) {
	copy(f.Head[at:], b)
	if ihl := int(f.Head[14]&15) * 4; ihl >= 20 && 14+ihl <= HeadSize {
		f.Head[24], f.Head[25] = 0, 0
		binary.BigEndian.PutUint16(f.Head[24:], ^slowSum(f.Head[14:14+ihl]))
	}
}

func TestParseIPv4(t *testing.T) {
	tcp := packet{complete: true, payload: pattern(200), pieces: 2}
	udp := packet{complete: true, udp: true, payload: pattern(200), pieces: 2}
	for _, c := range []struct {
		name string
		p    packet
		edit func(f *Frame)
		want DropReason
	}{
		{"tcp", tcp, func(*Frame) {}, ReasonNone},
		{"udp", udp, func(*Frame) {}, ReasonNone},
		{"IPv4 options", packet{complete: true, optIP: 40, payload: pattern(9)}, func(*Frame) {}, ReasonNone},
		{"TCP options beyond Head", packet{complete: true, optIP: 40, optTCP: 40, payload: pattern(9), pieces: 1}, func(*Frame) {}, ReasonNone},
		{"H082 empty", tcp, func(f *Frame) { f.HeadLen, f.Len, f.Tail = 0, 0, nil }, ShortFrame},
		{"H082 header cut", tcp, func(f *Frame) { f.HeadLen, f.Len, f.Tail = 33, 33, nil }, ShortFrame},
		{"H082 options cut", packet{complete: true, optIP: 40}, func(f *Frame) { f.HeadLen, f.Len = 60, 60 }, ShortFrame},
		{"H082 version 6", tcp, func(f *Frame) { set(f, 14, 0x65) }, BadIPv4},
		{"H082 IHL 0", tcp, func(f *Frame) { set(f, 14, 0x40) }, BadIPv4},
		{"H082 IHL 4", tcp, func(f *Frame) { set(f, 14, 0x44) }, BadIPv4},
		{"H082 total below header", tcp, func(f *Frame) { set(f, 16, 0, 19) }, BadIPv4},
		{"H082 total 0", tcp, func(f *Frame) { set(f, 16, 0, 0) }, BadIPv4},
		{"H082 total beyond frame", tcp, func(f *Frame) { set(f, 16, 0, 241) }, ShortFrame},
		{"H082 total beyond GSO frame", packet{gsoSize: 100, payload: pattern(300)}, func(f *Frame) { set(f, 16, 0xff, 0xff) }, ShortFrame},
		{"H082 sum", tcp, func(f *Frame) { f.Head[24] ^= 1 }, BadChecksum},
		{"H082 ping of death", tcp, func(f *Frame) { set(f, 20, 0x1f, 0xff) }, BadIPv4},
		{"last fragment there is", tcp, func(f *Frame) { set(f, 20, 0x1f, 0xe0) }, ReasonNone},
		{"H087 TCP header cut", tcp, func(f *Frame) { set(f, 16, 0, 39) }, BadTransport},
		{"H087 TCP data offset 4", tcp, func(f *Frame) { f.Head[46] = 0x40 }, BadTransport},
		{"H087 TCP data offset beyond", packet{complete: true}, func(f *Frame) { f.Head[46] = 0x60 }, BadTransport},
		{"H087 UDP header cut", udp, func(f *Frame) { set(f, 16, 0, 27) }, BadTransport},
		{"H087 UDP length 7", udp, func(f *Frame) { set(f, 38, 0, 7) }, BadTransport},
		{"H087 UDP length beyond", udp, func(f *Frame) { set(f, 38, 0, 209) }, BadTransport},
		{"UDP length short", udp, func(f *Frame) { set(f, 38, 0, 8) }, ReasonNone},
		{"first fragment of UDP", udp, func(f *Frame) { set(f, 38, 9, 0); set(f, 20, 0x20, 0) }, ReasonNone},
		{"tiny first fragment", tcp, func(f *Frame) { set(f, 16, 0, 28); set(f, 20, 0x20, 0) }, BadTransport},
		{"ICMP cut", udp, func(f *Frame) { set(f, 23, 1); set(f, 16, 0, 27) }, BadTransport},
		{"ICMP", udp, func(f *Frame) { set(f, 23, 1) }, ReasonNone},
		{"another protocol, no payload", udp, func(f *Frame) { set(f, 23, 47); set(f, 16, 0, 20) }, ReasonNone},
		{"H070 checksum field in what is cut off", packet{payload: pattern(20)}, func(f *Frame) { set(f, 23, 47); set(f, 16, 0, 30) }, BadOffload},
		{"H070 sum over the ports", packet{payload: pattern(20)}, func(f *Frame) { f.CsumOffset = 2 }, BadOffload},
		{"H070 sum over the sequence number", packet{payload: pattern(20)}, func(f *Frame) { f.CsumStart, f.CsumOffset = 36, 2 }, BadOffload},
		{"H070 UDP sum over the length", packet{udp: true, payload: pattern(20)}, func(f *Frame) { f.CsumOffset = 4 }, BadOffload},
		{"H070 sum of TCP in UDP", packet{udp: true, payload: pattern(20)}, func(f *Frame) { f.CsumOffset = 16 }, BadOffload},
		{"inner sum of a tunnel", packet{udp: true, payload: pattern(80)}, func(f *Frame) { f.CsumStart, f.CsumOffset = 84, 16 }, ReasonNone},
		{"partial", packet{payload: pattern(20)}, func(*Frame) {}, ReasonNone},
		{"partial UDP", packet{udp: true, payload: pattern(20)}, func(*Frame) {}, ReasonNone},
		{"GSO frame with padding", packet{gsoSize: 100, payload: pattern(300)}, func(f *Frame) { set(f, 16, 1, 0) }, BadOffload},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := c.p.frame(t)
			c.edit(f)
			require.Equal(t, c.want.String(), f.ParseIPv4().String())
		})
	}
}

func TestParseIPv4Fields(t *testing.T) {
	p := packet{complete: true, id: 0x1234, payload: pattern(200), pieces: 2, optIP: 4}
	f := p.frame(t)
	require.Equal(t, ReasonNone, f.ParseIPv4())
	assert.Equal(t, []any{uint8(14), uint8(38), uint8(6), false}, []any{f.L3, f.L4, f.Proto, f.Frag})
	assert.Equal(t, []any{uint32(0x0a000202), uint32(0xc00002fb)}, []any{f.SrcIP4(), f.DstIP4()})
	assert.Equal(t, []any{uint16(40000), uint16(443)}, []any{f.SrcPort(), f.DstPort()})
	assert.Equal(t, []any{uint8(63), uint16(0x1234), uint16(DontFragment)}, []any{f.TTL(), f.IPID(), f.FragField()})
	assert.False(t, f.MoreFrags())
	assert.Len(t, f.L4Bytes(), HeadSize-38)
	assert.False(t, f.PartialL4())
	p.complete = false
	f = p.frame(t)
	require.Equal(t, ReasonNone, f.ParseIPv4())
	assert.True(t, f.PartialL4())

	set(f, 20, 0x20, 1)
	require.Equal(t, ReasonNone, f.ParseIPv4())
	assert.True(t, f.Frag)
	assert.True(t, f.MoreFrags())
}

// TestParsePadding cuts what an Ethernet card added behind the packet, at
// every place where it can begin.
func TestParsePadding(t *testing.T) {
	for size := 0; size < 160; size++ {
		p := packet{complete: true, udp: true, payload: pattern(size)}
		b := p.serialize(t)
		padded := append(append([]byte{}, b...), make([]byte, 50)...)
		f := new(Frame)
		n := copy(f.Head[:], padded)
		f.HeadLen, f.Len, f.Tail = uint16(n), int32(len(padded)), cut(padded[n:], 4)
		require.Equal(t, ReasonNone, f.ParseIPv4())
		require.Equal(t, len(b), int(f.Len))
		require.True(t, f.whole())
		require.Equal(t, b, f.Bytes())
	}
}

func TestParseAllocs(t *testing.T) {
	f := packet{payload: pattern(1460), pieces: 2}.frame(t)
	o := f.Offload
	assert.Zero(t, testing.AllocsPerRun(50, func() {
		f.Offload = o
		if f.ParseIPv4() != ReasonNone || !f.CheckOffload() {
			t.Fatal("refused")
		}
		f.CompleteChecksum()
	}))
}

func BenchmarkParseIPv4(b *testing.B) {
	f := packet{payload: pattern(1460), pieces: 2}.frame(b)
	b.ReportAllocs()
	for b.Loop() {
		if f.ParseIPv4() != ReasonNone {
			b.Fatal("refused")
		}
	}
}

// FuzzParseIPv4 parses any frame: what is accepted must be consistent, and
// gopacket must see the same packet in it.
func FuzzParseIPv4(f *testing.F) {
	tcp := packet{complete: true, payload: pattern(100)}.serialize(f)
	udp := packet{complete: true, udp: true, payload: pattern(100)}.serialize(f)
	add := func(b []byte, edit func(*Frame)) {
		fr := new(Frame)
		n := copy(fr.Head[:], b)
		edit(fr)
		f.Add(append(append([]byte{}, fr.Head[:n]...), b[n:]...), uint8(2), uint16(0), uint16(0))
	}
	for _, b := range [][]byte{tcp, udp} {
		add(b, func(*Frame) {})
		for _, ihl := range []byte{0x40, 0x44, 0x4f, 0x65} { // H082
			add(b, func(fr *Frame) { set(fr, 14, ihl) })
		}
		for _, total := range []byte{0, 19, 20, 27, 39, 255} { // H082, H087
			add(b, func(fr *Frame) { set(fr, 16, 0, total) })
		}
		add(b, func(fr *Frame) { fr.Head[24] ^= 1 })        // H082
		add(b, func(fr *Frame) { set(fr, 20, 0x1f, 0xff) }) // H082
		add(b, func(fr *Frame) { set(fr, 38, 0, 7) })       // H087
		add(b, func(fr *Frame) { set(fr, 38, 0xff, 0xff) }) // H087
		add(b, func(fr *Frame) { fr.Head[46] = 0x40 })      // H087
		add(b, func(fr *Frame) { fr.Head[46] = 0xf0 })      // H087
		add(b, func(fr *Frame) { set(fr, 34, 0, 0, 0, 0) }) // H087, port 0: the stages' to judge
		add(b[:33], func(*Frame) {})
		f.Add(b, uint8(1), uint16(65535), uint16(65535)) // H070
		f.Add(b, uint8(1), uint16(34), uint16(16))
		f.Add(b, uint8(1), uint16(34), uint16(2)) // H070, over the ports
	}
	f.Fuzz(func(t *testing.T, b []byte, pieces uint8, start, off uint16) {
		if len(b) > MaxLen {
			return
		}
		fr := new(Frame)
		n := copy(fr.Head[:], b)
		fr.HeadLen, fr.Len, fr.Tail = uint16(n), int32(len(b)), cut(b[n:], int(pieces))
		if start != 0 {
			fr.Flags, fr.CsumStart, fr.CsumOffset = NeedsCsum, start, off
			if n < EthernetLen || !fr.CheckOffload() {
				return
			}
		}
		if fr.ParseIPv4() != ReasonNone {
			return
		}
		require.True(t, fr.whole())
		got := fr.Bytes()
		require.Equal(t, b[:len(got)], got)
		require.Equal(t, len(got)-14, int(binary.BigEndian.Uint16(got[16:])))
		require.LessOrEqual(t, int(fr.L4), int(fr.HeadLen))
		if fr.Flags&NeedsCsum != 0 {
			fr.CompleteChecksum() // must change nothing that was judged
			require.Equal(t, len(got), len(fr.Bytes()))
		}
		var ip layers.IPv4
		if err := ip.DecodeFromBytes(b[14:], gopacket.NilDecodeFeedback); err != nil {
			return // gopacket refuses odd options, a kernel does not
		}
		require.Equal(t, 14+int(ip.IHL)*4, int(fr.L4))
		require.Equal(t, uint8(ip.Protocol), fr.Proto)
		require.Equal(t, ip.FragOffset != 0, fr.Frag)
		require.Equal(t, binary.BigEndian.Uint32(ip.SrcIP), fr.SrcIP4())
		require.Equal(t, binary.BigEndian.Uint32(ip.DstIP), fr.DstIP4())
		if ip.Protocol == layers.IPProtocolTCP && !fr.Frag {
			var tcp layers.TCP
			if tcp.DecodeFromBytes(ip.Payload, gopacket.NilDecodeFeedback) == nil {
				require.Equal(t, uint16(tcp.SrcPort), fr.SrcPort())
				require.Equal(t, uint16(tcp.DstPort), fr.DstPort())
			}
		}
	})
}
