package frame

import (
	"encoding/binary"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// six is an IPv6 packet with these headers behind the fixed one, the first of
// type next, and a payload of n bytes behind an 8-byte UDP header.
func six(next byte, headers []byte, n int) []byte {
	p := make([]byte, EthernetLen+ip6HdrLen)
	p[12], p[13], p[14], p[20], p[21] = 0x86, 0xdd, 0x60, next, 64
	udp := []byte{0, 1, 0, 2, 0, byte(8 + n), 0, 0}
	p = append(append(append(p, headers...), udp...), make([]byte, n)...)
	binary.BigEndian.PutUint16(p[18:], uint16(len(p)-EthernetLen-ip6HdrLen))
	return p
}

func TestParseIPv6(t *testing.T) {
	hop := []byte{ProtoUDP, 0, 1, 4, 0, 0, 0, 0}
	with := func(next byte, h []byte) []byte {
		h = append([]byte(nil), h...)
		h[0] = next
		return h
	}
	long := func(n byte) []byte { return append([]byte{ProtoUDP, n}, make([]byte, 6+8*int(n))...) }
	fragment := func(word uint16) []byte { return []byte{ProtoUDP, 0, byte(word >> 8), byte(word), 0, 0, 0, 7} }
	edit := func(p []byte, at int, v ...byte) []byte { copy(p[at:], v); return p }
	for _, c := range []struct {
		name  string
		p     []byte
		want  DropReason
		proto byte
		l4    int
		frag  Frag6
	}{
		{"UDP", six(ProtoUDP, nil, 200), ReasonNone, ProtoUDP, 54, Frag6{}},
		{"padding", append(six(ProtoUDP, nil, 2), make([]byte, 9)...), ReasonNone, ProtoUDP, 54, Frag6{}},
		{"hop-by-hop and destination options", six(ip6HopByHop, append(with(ip6DestOpts, hop), hop...), 9), ReasonNone, ProtoUDP, 70, Frag6{}},
		{"first fragment", six(ip6Fragment, fragment(1), 9), ReasonNone, ProtoUDP, 62, Frag6{54, true, 0, 7}},
		{"later fragment", six(ip6Fragment, fragment(1232), 9), ReasonNone, ProtoUDP, 62, Frag6{54, false, 1232, 7}},
		{"atomic fragment (RFC 6946)", six(ip6Fragment, fragment(0), 9), ReasonNone, ProtoUDP, 62, Frag6{54, false, 0, 7}},
		{"routing header that is through", six(ip6Routing, []byte{ProtoUDP, 0, 0, 0, 0, 0, 0, 0}, 9), ReasonNone, ProtoUDP, 62, Frag6{}},
		{"routing header with segments left", six(ip6Routing, []byte{ProtoUDP, 0, 0, 1, 0, 0, 0, 0}, 9), ReasonNone, ip6Routing, 54, Frag6{}},
		{"unknown header", six(200, nil, 9), ReasonNone, 200, 54, Frag6{}},
		{"no next header", six(59, nil, 9), ReasonNone, 59, 54, Frag6{}},
		{"H082 empty", nil, ShortFrame, 0, 0, Frag6{}},
		{"H082 header cut", six(ProtoUDP, nil, 9)[:53], ShortFrame, 0, 0, Frag6{}},
		{"H082 version 4", edit(six(ProtoUDP, nil, 9), 14, 0x45), BadIPv6, 0, 0, Frag6{}},
		{"H082 length beyond frame", edit(six(ProtoUDP, nil, 9), 18, 0, 18), ShortFrame, 0, 0, Frag6{}},
		{"jumbogram (RFC 2675)", edit(six(ip6HopByHop, hop, 9), 18, 0, 0), BadIPv6, 0, 0, Frag6{}},
		{"hop-by-hop behind another", six(ip6DestOpts, append(with(ip6HopByHop, hop), hop...), 9), BadIPv6, 0, 0, Frag6{}},
		{"options beyond the packet", six(ip6DestOpts, with(ProtoUDP, append([]byte{0, 200}, make([]byte, 6)...)), 9), BadIPv6, 0, 0, Frag6{}},
		{"options beyond Head", six(ip6DestOpts, long(12), 9), NotCarried, 0, 0, Frag6{}},
		{"two fragment headers", six(ip6Fragment, append(with(ip6Fragment, fragment(1)), fragment(1)...), 9), BadIPv6, 0, 0, Frag6{}},
		{"fragment header cut", edit(six(ip6Fragment, nil, 0), 18, 0, 4), BadIPv6, 0, 0, Frag6{}},
		{"H082 ping of death", six(ip6Fragment, fragment(0xfff8), 9), BadIPv6, 0, 0, Frag6{}},
		{"H087 UDP header cut", edit(six(ProtoUDP, nil, 0), 18, 0, 7), BadTransport, 0, 0, Frag6{}},
		{"H087 UDP length beyond", edit(six(ProtoUDP, nil, 9), 59, 18), BadTransport, 0, 0, Frag6{}},
		{"H087 tiny first fragment", edit(six(ip6Fragment, fragment(1), 0), 18, 0, 12), BadTransport, 0, 0, Frag6{}},
		{"ICMPv6 of 4 bytes", edit(six(ProtoICMPv6, nil, 0), 18, 0, 4), ReasonNone, ProtoICMPv6, 54, Frag6{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var f Frame
			f.SetBytes(c.p, nil, make([][]byte, 1))
			frag, reason := f.ParseIPv6()
			require.Equal(t, c.want.String(), reason.String())
			if reason != ReasonNone {
				return
			}
			assert.Equal(t, c.proto, f.Proto)
			assert.Equal(t, c.l4, int(f.L4))
			assert.Equal(t, c.frag, frag)
			assert.Equal(t, c.frag.Offset != 0, f.Frag)
			assert.Equal(t, EthernetLen+ip6HdrLen+int(binary.BigEndian.Uint16(f.Head[18:])), int(f.Len))
			assert.Equal(t, uint8(64), f.HopLimit())
		})
	}
}

func FuzzParseIPv6(f *testing.F) {
	f.Add(six(ProtoUDP, nil, 20))
	f.Add(six(ip6Fragment, []byte{ProtoUDP, 0, 0, 1, 0, 0, 0, 7}, 9))
	f.Add(six(ip6HopByHop, []byte{ip6DestOpts, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, 9))
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) > 70000 {
			return
		}
		var fr Frame
		fr.SetBytes(p, nil, make([][]byte, 1))
		frag, reason := fr.ParseIPv6()
		if reason != ReasonNone {
			return
		}
		require.LessOrEqual(t, int(fr.L4), int(fr.HeadLen))
		require.LessOrEqual(t, int(fr.HeadLen), int(fr.Len))
		if !fr.Frag && (fr.Proto == ProtoTCP || fr.Proto == ProtoUDP) {
			_, _ = fr.SrcPort(), fr.DstPort()
		}
		require.LessOrEqual(t, int(frag.At)+8, int(fr.L4)+8)
		_, _ = fr.SrcIP6(), fr.DstIP6()
	})
}
