package nat

import (
	"encoding/binary"

	"sidewire/engine/frame"
)

// Offsets from an IPv6 header.
const (
	ip6Hop = 7
	ip6Src = 8
	ip6Dst = 24
	ip6Len = 40
)

func be16(b []byte) uint16 { return binary.BigEndian.Uint16(b) }

func be32(b []byte) uint32 { return binary.BigEndian.Uint32(b) }

// diff6 is diff for an address.
func diff6(old, new *Addr6) (d uint64) {
	for i := 0; i < 16; i += 4 {
		d += diff(be32(old[i:]), be32(new[i:]))
	}
	return d
}

// offloadFits6 is offloadFits for IPv6.
func offloadFits6(f *frame.Frame, frag frame.Frag6) bool {
	if f.Flags&frame.NeedsCsum == 0 {
		return f.GSOType() == frame.GSONone
	}
	if frag.At != 0 {
		return false
	}
	l4, start, field := int(f.L4), int(f.CsumStart), int(f.CsumStart)+int(f.CsumOffset)
	if start < l4 {
		return false
	}
	switch f.GSOType() {
	case frame.GSOTCPv6:
		return f.Proto == frame.ProtoTCP && start == l4 && f.CsumOffset == 16
	case frame.GSOUDPL4:
		return f.Proto == frame.ProtoUDP && start == l4 && f.CsumOffset == 6
	case frame.GSONone:
	default:
		return false
	}
	switch f.Proto {
	case frame.ProtoTCP:
		return start == l4 && f.CsumOffset == 16
	case frame.ProtoICMPv6:
		return start == l4 && f.CsumOffset == 2
	}
	if off := sumOffset(f.Proto); start == l4 {
		return off != 0 && int(f.CsumOffset) == off
	}
	return field >= l4+8
}

// translate6 is translate for IPv6.
func translate6(f *frame.Frame, at int, addr *Addr6, field int, port uint16) {
	change := translateIP6(f, at, addr)
	if f.Frag {
		return
	}
	t := f.Head[f.L4:]
	switch f.Proto {
	case frame.ProtoTCP, frame.ProtoUDP:
		was := be16(t[field:])
		binary.BigEndian.PutUint16(t[field:], port)
		fixSum(f, t, change, diff16(was, port))
	case frame.ProtoICMPv6:
		was := be16(t[queryID:])
		binary.BigEndian.PutUint16(t[queryID:], port)
		fixICMP6(f, change, diff16(was, port))
	case protoUDPLite, protoDCCP:
		fixSum(f, t, change, 0)
	}
}

// translateIP6 is translateIP for IPv6.
func translateIP6(f *frame.Frame, at int, addr *Addr6) uint64 {
	h := f.Head[f.L3:]
	old := (*Addr6)(h[at : at+16])
	change := diff6(old, addr)
	*old = *addr
	h[ip6Hop]--
	return change
}

// fixICMP6 applies changes of the addresses and of the message to the checksum
// of ICMPv6, which covers both.
func fixICMP6(f *frame.Frame, addrs, message uint64) {
	b := f.Head[int(f.L4)+2:]
	if partial(f) {
		binary.BigEndian.PutUint16(b, frame.Fold(uint64(be16(b))+addrs))
		return
	}
	addDiff(b, addrs+message)
}

// ipLength6 is the length of the longest IP packet that a frame becomes.
func ipLength6(f *frame.Frame) int {
	if f.GSOType() == frame.GSOTCPv6 {
		return int(f.L4-f.L3) + int(f.Head[f.L4+12]>>4)*4 + int(f.GSOSize)
	}
	return ipLength(f)
}

// fits says whether a packet may go where mtu, unless it is 0, is the limit; what
// every link carries always may, as its sender would not send less (RFC 8200,
// section 5). Otherwise it has got its verdict, and its sender, guest g or the outside if
// that is nil, is told: no router fragments (RFC 8200, section 5).
func (m *Masquerade6) fits(b *frame.Batch, f *frame.Frame, g *guest6, mtu int) bool {
	if mtu <= 0 || ipLength6(f) <= max(mtu, minMTU6) {
		return true
	}
	m.replyError(b, f, g, icmp6TooBig, 0, max(mtu, minMTU6))
	f.Drop(frame.FragNeeded)
	return false
}

// minMTU6 is the smallest MTU of a link with IPv6.
const minMTU6 = 1280
