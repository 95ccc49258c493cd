package frame

import "encoding/binary"

// EtherTypes and IP protocols that the engine knows by name.
const (
	TypeIPv4 = 0x0800
	TypeARP  = 0x0806
	TypeIPv6 = 0x86dd

	ProtoICMP = 1
	ProtoTCP  = 6
	ProtoUDP  = 17
)

// Offsets in an IPv4 header.
const (
	ip4TotalLen = 2
	ip4ID       = 4
	ip4Frag     = 6
	ip4TTL      = 8
	ip4Proto    = 9
	ip4Sum      = 10
	ip4Src      = 12
	ip4Dst      = 16
	ip4MinLen   = 20
)

// MoreFragments and DontFragment are flags in FragField; the low 13 bits are
// the offset in units of 8 bytes.
const (
	DontFragment  = 0x4000
	MoreFragments = 0x2000
	fragOffset    = 0x1fff
)

// ParseIPv4 checks the IPv4 header behind an untagged Ethernet header and sets
// L3, L4, Proto and Frag. It checks version, lengths, header checksum and, for
// the transports it knows, that their fixed header lies in Head; it returns
// the reason to drop the frame, or ReasonNone (H082, H087). Padding behind the
// packet is cut off. Addresses, TTL and ports are the stages' to judge, and a
// TCP header's options may reach beyond Head.
func (f *Frame) ParseIPv4() DropReason {
	const l3 = EthernetLen
	if int(f.HeadLen) < l3+ip4MinLen {
		return ShortFrame
	}
	h := f.Head[l3:]
	ihl := int(h[0]&15) * 4
	total := int(binary.BigEndian.Uint16(h[ip4TotalLen:]))
	switch {
	case h[0]>>4 != 4 || ihl < ip4MinLen || total < ihl:
		return BadIPv4
	case int(f.HeadLen) < l3+ihl || int(f.Len) < l3+total:
		return ShortFrame
	case Fold(Sum(h[:ihl], 0)) != 0xffff:
		return BadChecksum
	}
	if int(f.Len) > l3+total {
		f.truncate(l3 + total)
		if f.GSO != GSONone || f.Flags&NeedsCsum != 0 && f.CsumStart+f.CsumOffset+2 > f.HeadLen {
			return BadOffload
		}
	}
	f.L3, f.L4, f.Proto = l3, uint8(l3+ihl), h[ip4Proto]
	frag := int(f.FragField() & fragOffset)
	f.Frag = frag != 0
	if f.Frag {
		if frag*8+total-ihl > 65535 {
			return BadIPv4 // reassembly would exceed the largest packet
		}
		return ReasonNone
	}
	return f.checkTransport(total-ihl, f.MoreFrags())
}

// checkTransport checks that the transport header fits into Head and into the
// n bytes that the IP packet leaves for it; more says that it is a first fragment.
func (f *Frame) checkTransport(n int, more bool) DropReason {
	t := f.Head[f.L4:f.HeadLen]
	need := 0
	switch f.Proto {
	case ProtoTCP:
		need = 20
	case ProtoUDP, ProtoICMP:
		need = 8
	case ProtoICMPv6:
		need = 4
	}
	if len(t) < need || n < need {
		return BadTransport
	}
	if !f.sumFieldOK(need) {
		return BadOffload
	}
	switch f.Proto {
	case ProtoTCP:
		if doff := int(t[12]>>4) * 4; doff < 20 || doff > n {
			return BadTransport
		}
	case ProtoUDP:
		// The length field of a GSO frame counts one segment or all of them,
		// that of a first fragment the whole datagram.
		if l := int(binary.BigEndian.Uint16(t[4:])); l < 8 || l > n && !more && f.GSOType() == GSONone {
			return BadTransport
		}
	}
	return ReasonNone
}

// sumFieldOK says whether a partial checksum would be written where the
// protocol has its checksum, or behind the first n bytes of the transport
// header, as an inner one of a tunnel. Anywhere else it would change ports or
// addresses after they have been judged (H070).
func (f *Frame) sumFieldOK(n int) bool {
	if f.Flags&NeedsCsum == 0 {
		return true
	}
	start, l4 := int(f.CsumStart), int(f.L4)
	if start >= l4+n {
		return true
	}
	want := uint16(tcpSum)
	switch f.Proto {
	case ProtoUDP:
		want = udpSum
	case ProtoICMP, ProtoICMPv6:
		want = 2
	}
	return start == l4 && f.CsumOffset == want
}

// PartialL4 says whether the checksum of the transport header at L4 is the
// one that NeedsCsum left undone, so that its field holds a pseudo-header's
// sum.
func (f *Frame) PartialL4() bool {
	return f.Flags&NeedsCsum != 0 && f.CsumStart == uint16(f.L4)
}

// truncate cuts the frame to n bytes.
func (f *Frame) truncate(n int) {
	f.Len = int32(n)
	if n <= int(f.HeadLen) {
		f.HeadLen, f.Tail = uint16(n), nil
		return
	}
	left := n - int(f.HeadLen)
	for i, t := range f.Tail {
		if len(t) >= left {
			f.Tail[i] = t[:left:left]
			f.Tail = f.Tail[:i+1]
			return
		}
		left -= len(t)
	}
}

// The accessors below need a parsed frame.

// SrcIP4 is the IPv4 source address.
func (f *Frame) SrcIP4() uint32 { return binary.BigEndian.Uint32(f.Head[f.L3+ip4Src:]) }

// DstIP4 is the IPv4 destination address.
func (f *Frame) DstIP4() uint32 { return binary.BigEndian.Uint32(f.Head[f.L3+ip4Dst:]) }

// TTL is the IPv4 time to live.
func (f *Frame) TTL() uint8 { return f.Head[f.L3+ip4TTL] }

// IPID is the IPv4 identification field.
func (f *Frame) IPID() uint16 { return binary.BigEndian.Uint16(f.Head[f.L3+ip4ID:]) }

// FragField is the IPv4 flags and fragment offset.
func (f *Frame) FragField() uint16 { return binary.BigEndian.Uint16(f.Head[f.L3+ip4Frag:]) }

// MoreFrags says whether the packet is a fragment that others follow.
func (f *Frame) MoreFrags() bool { return f.FragField()&MoreFragments != 0 }

// SrcPort is the first transport port of TCP or UDP.
func (f *Frame) SrcPort() uint16 { return binary.BigEndian.Uint16(f.Head[f.L4:]) }

// DstPort is the second one.
func (f *Frame) DstPort() uint16 { return binary.BigEndian.Uint16(f.Head[int(f.L4)+2:]) }

// L4Bytes is what Head holds of the transport header and its payload,
// borrowed.
func (f *Frame) L4Bytes() []byte { return f.Head[f.L4:f.HeadLen:f.HeadLen] }
