package engine

import (
	"encoding/binary"

	"sidewire/engine/frame"
)

// Layout of ARP (RFC 826) and of what ND needs of IPv6 (RFC 4861, RFC 8200).
const (
	typeRARP  = 0x8035
	arpSender = 8 // the sender's hardware address
	arpLen    = 28

	ip6Len       = 40
	extHopByHop  = 0
	extRouting   = 43
	extFragment  = 44
	extAuth      = 51
	protoICMP6   = 58
	extDestOpts  = 60
	extMobility  = 135
	extHIP       = 139
	extShim6     = 140
	extTest1     = 253
	extTest2     = 254
	icmp6Sum     = 2
	ndRouterSol  = 133
	ndRouterAdv  = 134
	ndNeighSol   = 135
	ndNeighAdv   = 136
	optSourceLLA = 1
	optTargetLLA = 2
	// maxND is longer than any ND message of use.
	maxND = 2048
)

// checkSender drops ARP and ND frames that name another hardware address as
// the sender's than the port's. What cannot be judged is dropped too, so that
// nothing gets by in disguise.
//
// It makes more of the frame private where it has to read further than the
// snapshot goes.
func (m *member) checkSender(f *frame.Frame, b *frame.Batch) frame.DropReason {
	off := frame.EthernetLen
	typ := f.EtherType()
	for isTag(typ) {
		widen(f, off+vlanLen)
		if off+vlanLen > int(f.HeadLen) {
			return frame.ShortFrame
		}
		typ = binary.BigEndian.Uint16(f.Head[off+2:])
		off += vlanLen
	}
	if f.Flags&frame.NeedsCsum != 0 && int(f.CsumStart) < off {
		return frame.BadOffload // it would change the type
	}
	switch typ {
	case frame.TypeARP, typeRARP:
		return m.checkARP(f, off)
	case frame.TypeIPv6:
		return m.checkIPv6(f, off, b)
	}
	return frame.ReasonNone
}

func (m *member) checkARP(f *frame.Frame, off int) frame.DropReason {
	widen(f, off+arpLen)
	if int(f.HeadLen) < off+arpLen {
		return frame.ShortFrame
	}
	if f.Flags&frame.NeedsCsum != 0 {
		return frame.BadOffload // it would change what is judged here
	}
	h := f.Head[off:]
	// Only Ethernet has this engine's addresses.
	if binary.BigEndian.Uint16(h) != 1 || h[4] != 6 || !m.isMAC(h[arpSender:]) {
		return frame.Spoofed
	}
	return frame.ReasonNone
}

// isMAC says whether b begins with the port's own address.
func (m *member) isMAC(b []byte) bool {
	return binary.BigEndian.Uint64(b)&^0xffff == m.mac
}

// checkIPv6 walks the extension headers and judges ND messages.
func (m *member) checkIPv6(f *frame.Frame, off int, b *frame.Batch) frame.DropReason {
	at := off + ip6Len
	widen(f, at)
	if int(f.HeadLen) < at {
		return frame.ShortFrame
	}
	next, fragment := f.Head[off+6], false
	end := at + int(binary.BigEndian.Uint16(f.Head[off+4:]))
	for {
		if f.Flags&frame.NeedsCsum != 0 && int(f.CsumStart) < at {
			return frame.BadOffload // it would change the headers before
		}
		switch next {
		case protoICMP6:
			return m.checkICMP6(f, at, end, fragment, b)
		case extHopByHop, extRouting, extFragment, extAuth, extDestOpts, extMobility, extHIP, extShim6, extTest1, extTest2:
		default:
			return frame.ReasonNone
		}
		widen(f, at+8)
		if int(f.HeadLen) < at+8 {
			return frame.Spoofed // nobody can say what it is (RFC 7112)
		}
		h := f.Head[at:]
		n := 8
		switch {
		case next == extAuth:
			n = (int(h[1]) + 2) * 4
		case next != extFragment:
			n = (int(h[1]) + 1) * 8
		case binary.BigEndian.Uint16(h[2:])&^7 != 0:
			if f.Flags&frame.NeedsCsum != 0 {
				return frame.BadOffload // a fragment has nothing that is to be completed
			}
			return frame.ReasonNone // the first fragment is judged
		default:
			fragment = fragment || h[3]&1 != 0
		}
		next, at = h[0], at+n
	}
}

// checkICMP6 judges the ICMPv6 message at at, whose IPv6 packet ends at end.
func (m *member) checkICMP6(f *frame.Frame, at, end int, fragment bool, b *frame.Batch) frame.DropReason {
	widen(f, at+1)
	if at >= int(f.HeadLen) {
		return frame.Spoofed
	}
	if f.Flags&frame.NeedsCsum != 0 && (int(f.CsumStart) != at || f.CsumOffset != icmp6Sum) {
		return frame.BadOffload
	}
	var opts int
	option := byte(optSourceLLA)
	switch f.Head[at] {
	case ndRouterSol:
		opts = at + 8
	case ndRouterAdv:
		opts = at + 16
	case ndNeighSol:
		opts = at + 24
	case ndNeighAdv:
		opts, option = at+24, optTargetLLA
	default:
		return frame.ReasonNone
	}
	switch {
	case fragment || end > maxND:
		return frame.Spoofed // no host may believe it (RFC 6980)
	case end > int(f.Len) || opts > end:
		return frame.BadTransport
	}
	rest, ok := private(f, end, b)
	if !ok {
		return frame.BatchFull
	}
	return m.checkOptions(f, rest, opts, end, option)
}

// checkOptions walks the options of an ND message between two offsets. rest is
// what follows Head.
func (m *member) checkOptions(f *frame.Frame, rest []byte, at, end int, option byte) frame.DropReason {
	byteAt := func(i int) byte {
		if i < int(f.HeadLen) {
			return f.Head[i]
		}
		return rest[i-int(f.HeadLen)]
	}
	for at < end {
		if at+8 > end {
			return frame.BadTransport
		}
		n := int(byteAt(at+1)) * 8
		if n == 0 || at+n > end {
			return frame.BadTransport
		}
		if byteAt(at) == option {
			var a [8]byte
			for i := range 6 {
				a[i] = byteAt(at + 2 + i)
			}
			if !m.isMAC(a[:]) {
				return frame.Spoofed
			}
		}
		at += n
	}
	return frame.ReasonNone
}

// private makes the first n bytes of a frame private, and returns what follows
// Head of them. It reports false if the batch has no room.
func private(f *frame.Frame, n int, b *frame.Batch) (rest []byte, ok bool) {
	widen(f, n)
	left := n - int(f.HeadLen)
	if left <= 0 {
		return nil, true
	}
	// Room for what Tail may hold behind these bytes, in the worst case all of
	// its pieces.
	buf, segs := b.Alloc(left), b.Segs(1+len(f.Tail))
	if buf == nil || segs == nil {
		return nil, false
	}
	segs = append(segs, buf)
	got := 0
	for _, t := range f.Tail {
		k := copy(buf[got:], t)
		got += k
		if k < len(t) {
			segs = append(segs, t[k:])
		}
	}
	f.Tail = segs
	f.RxAt, f.RxBufs = 0, 0
	return buf, true
}
