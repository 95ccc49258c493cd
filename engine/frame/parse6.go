package frame

import "encoding/binary"

// ProtoICMPv6 is the IPv6 next header of ICMPv6.
const ProtoICMPv6 = 58

const (
	ip6Hop      = 7
	ip6Dst      = 24
	ip6Routing  = 43
	ip6Fragment = 44
)

// Frag6 is what a fragment header says (RFC 8200, section 4.5). At is its offset
// in Head, 0 for a whole packet; Offset is in bytes.
type Frag6 struct {
	At     uint8
	More   bool
	Offset uint16
	ID     uint32
}

// ParseIPv6 checks the IPv6 header behind an untagged Ethernet header and sets
// L3, L4, Proto and Frag as ParseIPv4 does. It walks hop-by-hop, destination and
// fragment headers as far as they lie in Head, in any order but each kind of
// fragment and hop-by-hop header once, the latter first; a routing header that
// still has somewhere to go, and whatever it does not know, ends the walk: Proto
// is that header's number then. Padding behind the packet is cut off.
func (f *Frame) ParseIPv6() (frag Frag6, reason DropReason) {
	const l3 = EthernetLen
	if int(f.HeadLen) < l3+ip6HdrLen {
		return frag, ShortFrame
	}
	h := f.Head[l3:f.HeadLen]
	total := ip6HdrLen + int(binary.BigEndian.Uint16(h[ip6PayloadLen:]))
	switch {
	case h[0]>>4 != 6, total == ip6HdrLen && f.GSOType() == GSONone && int(f.Len) > l3+total && h[ip6Next] == ip6HopByHop:
		return frag, BadIPv6
	case int(f.Len) < l3+total:
		return frag, ShortFrame
	}
	if int(f.Len) > l3+total {
		f.truncate(l3 + total)
		if f.GSO != GSONone || f.Flags&NeedsCsum != 0 && f.CsumStart+f.CsumOffset+2 > f.HeadLen {
			return frag, BadOffload
		}
		h = f.Head[l3:f.HeadLen]
	}
	proto, at := h[ip6Next], ip6HdrLen
	for walking := true; walking; {
		switch proto {
		case ip6HopByHop, ip6DestOpts:
			if proto == ip6HopByHop && at != ip6HdrLen || at+8 > total {
				return frag, BadIPv6
			}
			if at+8 > len(h) {
				return frag, NotCarried // beyond what is private
			}
			proto, at = h[at], at+8+int(h[at+1])*8
		case ip6Fragment:
			if frag.At != 0 || at+8 > total || at+8 > len(h) {
				return frag, BadIPv6
			}
			word := binary.BigEndian.Uint16(h[at+2:])
			frag = Frag6{At: uint8(l3 + at), More: word&1 != 0, Offset: word &^ 7, ID: binary.BigEndian.Uint32(h[at+4:])}
			proto, at = h[at], at+8
			walking = frag.Offset == 0
		case ip6Routing:
			if at+8 > len(h) || h[at+3] != 0 {
				walking = false
				break
			}
			proto, at = h[at], at+8+int(h[at+1])*8
		default:
			walking = false
		}
		if at > total {
			return frag, BadIPv6
		}
		if at > len(h) {
			return frag, NotCarried
		}
	}
	f.L3, f.L4, f.Proto, f.Frag = l3, uint8(l3+at), proto, frag.Offset != 0
	if f.Frag {
		if int(frag.Offset)+total-at > 65535 {
			return frag, BadIPv6 // reassembly would exceed the largest packet
		}
		return frag, ReasonNone
	}
	return frag, f.checkTransport(total-at, frag.More)
}

// SrcIP6 and DstIP6 are the IPv6 addresses, borrowed from Head. They need a
// parsed frame.
func (f *Frame) SrcIP6() *[16]byte { return (*[16]byte)(f.Head[int(f.L3)+ip6Src:]) }

// DstIP6 is the destination address, see SrcIP6.
func (f *Frame) DstIP6() *[16]byte { return (*[16]byte)(f.Head[int(f.L3)+ip6Dst:]) }

// HopLimit is the IPv6 hop limit.
func (f *Frame) HopLimit() uint8 { return f.Head[int(f.L3)+ip6Hop] }
