package nat

import (
	"encoding/binary"

	"sidewire/engine/frame"
)

// Offsets from an IPv4 header.
const (
	ipTTL = 8
	ipSum = 10
	ipSrc = 12
	ipDst = 16
)

// Offsets from a transport header.
const (
	portSrc = 0
	portDst = 2
	queryID = 4
)

const (
	protoDCCP    = 33
	protoUDPLite = 136
)

// sumOffset is where a transport header has a checksum that covers the
// addresses, 0 if it has none that we know.
func sumOffset(proto uint8) int {
	switch proto {
	case frame.ProtoTCP:
		return 16
	case frame.ProtoUDP, protoUDPLite, protoDCCP:
		return 6
	}
	return 0
}

// mac48 is a hardware address as a number.
func mac48(b []byte) uint64 {
	_ = b[5]
	return uint64(binary.BigEndian.Uint16(b))<<32 | uint64(binary.BigEndian.Uint32(b[2:]))
}

func putMAC(b []byte, m uint64) {
	_ = b[5]
	binary.BigEndian.PutUint16(b, uint16(m>>32))
	binary.BigEndian.PutUint32(b[2:], uint32(m))
}

const broadcastMAC = 1<<48 - 1

// diff is the change of a ones'-complement sum when a 32-bit word changes, to
// be added to an inverted checksum (RFC 1624).
func diff(old, new uint32) uint64 {
	return uint64(^old>>16) + uint64(^old&0xffff) + uint64(new>>16) + uint64(new&0xffff)
}

func diff16(old, new uint16) uint64 { return uint64(^old) + uint64(new) }

// offloadFits says whether a frame's offload agrees with its headers, so that
// whoever completes the checksum later writes it into the transport header's
// own field and not over an address or port that was translated (H070, H073).
// The frame has been parsed.
func offloadFits(f *frame.Frame) bool {
	if f.Flags&frame.NeedsCsum == 0 {
		return f.GSOType() == frame.GSONone
	}
	if f.Frag || f.MoreFrags() {
		return false
	}
	l4, start, field := int(f.L4), int(f.CsumStart), int(f.CsumStart)+int(f.CsumOffset)
	if start < l4 {
		return false
	}
	switch f.GSOType() {
	case frame.GSOTCPv4:
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
	case frame.ProtoICMP:
		return start == l4 && f.CsumOffset == 2
	}
	// A tunnel's inner checksum, or the transport's own.
	if off := sumOffset(f.Proto); start == l4 {
		return off != 0 && int(f.CsumOffset) == off
	}
	return field >= l4+8
}

// partial says whether the transport checksum is yet to be completed: its
// field holds the pseudo-header's sum only.
func partial(f *frame.Frame) bool {
	return f.Flags&frame.NeedsCsum != 0 && f.CsumStart == uint16(f.L4)
}

// translate puts addr in place of the address at offset at (ipSrc, ipDst), and
// port in place of the field at offset field of the transport header, counts
// the hop, and keeps both checksums right. Fragments behind the first have no
// transport header.
func translate(f *frame.Frame, at int, addr uint32, field int, port uint16) {
	change := translateIP(f, at, addr)
	if f.Frag {
		return
	}
	t := f.Head[f.L4:]
	switch f.Proto {
	case frame.ProtoTCP, frame.ProtoUDP:
		was := binary.BigEndian.Uint16(t[field:])
		binary.BigEndian.PutUint16(t[field:], port)
		fixSum(f, t, change, diff16(was, port))
	case frame.ProtoICMP:
		was := binary.BigEndian.Uint16(t[queryID:])
		binary.BigEndian.PutUint16(t[queryID:], port)
		if !partial(f) {
			addDiff(t[2:], diff16(was, port))
		}
	case protoUDPLite, protoDCCP:
		fixSum(f, t, change, 0)
	}
}

// translateIP is translate for the IP header alone. It returns the change of
// the addresses' sum.
func translateIP(f *frame.Frame, at int, addr uint32) uint64 {
	h := f.Head[f.L3:]
	old := binary.BigEndian.Uint32(h[at:])
	binary.BigEndian.PutUint32(h[at:], addr)
	change := diff(old, addr)
	life := binary.BigEndian.Uint16(h[ipTTL:])
	binary.BigEndian.PutUint16(h[ipTTL:], life-0x100)
	addDiff(h[ipSum:], change+diff16(life, life-0x100))
	return change
}

// addDiff applies a change to the checksum at the start of b.
func addDiff(b []byte, change uint64) {
	sum := binary.BigEndian.Uint16(b)
	binary.BigEndian.PutUint16(b, ^frame.Fold(uint64(^sum)+change))
}

// fixSum applies the change of the addresses and that of the ports to the
// checksum of a transport header.
func fixSum(f *frame.Frame, t []byte, addrs, ports uint64) {
	off := sumOffset(f.Proto)
	sum := binary.BigEndian.Uint16(t[off:])
	switch {
	case partial(f):
		sum = frame.Fold(uint64(sum) + addrs)
	case sum == 0 && f.Proto == frame.ProtoUDP:
		return // RFC 768: the sender made none
	default:
		sum = ^frame.Fold(uint64(^sum) + addrs + ports)
		if sum == 0 && f.Proto != frame.ProtoTCP {
			sum = 0xffff
		}
	}
	binary.BigEndian.PutUint16(t[off:], sum)
}
