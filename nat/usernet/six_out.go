package usernet

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// dress gives what this worker has put into the batch for the guest the headers
// of IPv6.
func (w *worker) dress(b *frame.Batch) {
	if w.six == nil {
		return
	}
	for k := w.six.from; k < b.Len(); k++ {
		f := b.Frame(k)
		if f.Out == w.net.conf.Port && f.EtherType() == frame.TypeIPv4 && !w.dressFrame(b, f) {
			f.Drop(frame.BatchFull)
		}
	}
	w.six.from = b.Len()
}

// dressFrame is dress for one frame, whose checksums are those of IPv6 already,
// but for an error's. It reports false if the batch has no room for what does
// not fit into the frame's Head any more.
func (w *worker) dressFrame(b *frame.Batch, f *frame.Frame) bool {
	n, s, h := w.net, w.net.six, f.Head[:f.HeadLen]
	var p [frame.HeadSize + 2*(sixMore+sixFragment)]byte
	copy(p[:], h[:l3])
	binary.BigEndian.PutUint16(p[12:], frame.TypeIPv6)
	at, src := s.header(p[:], l3, h[l3:], int(f.Len)-l4), binary.BigEndian.Uint32(h[l3+12:])
	start, rest := at, h[l4:]
	isError := f.Proto == frame.ProtoICMP && !f.Frag && f.FragField()&frame.MoreFragments == 0 && h[l4] < icmp6Echo
	if isError {
		error6(p[at:], rest)
		inner := rest[icmpLen:]
		at = s.header(p[:], at+icmpLen, inner, int(binary.BigEndian.Uint16(inner[2:]))-ip4Len)
		rest = inner[ip4Len:]
	}
	at += copy(p[at:], rest)
	more := at - int(f.HeadLen)
	f.HeadLen = uint16(copy(f.Head[:], p[:at]))
	f.Len += int32(more)
	if spilt := at - int(f.HeadLen); spilt > 0 {
		bytes, segs := b.Alloc(spilt), b.Segs(1+len(f.Tail))
		if bytes == nil || segs == nil {
			return false
		}
		copy(bytes, p[f.HeadLen:at])
		f.Tail = append(append(segs, bytes), f.Tail...)
	}
	binary.BigEndian.PutUint16(f.Head[l3+4:], uint16(int(f.Len)-l3-ip6Len))
	f.L4 = uint8(start)
	if f.Proto == frame.ProtoICMP {
		f.Proto = protoICMP6
	}
	if f.Flags&frame.NeedsCsum != 0 {
		f.CsumStart += uint16(more)
		f.HdrLen += uint16(more)
	}
	if f.GSO == frame.GSOTCPv4 {
		f.GSO = frame.GSOTCPv6
	}
	if isError {
		sum := n.pseudo(src, frame.ProtoICMP, int(f.Len)-start)
		binary.BigEndian.PutUint16(f.Head[start+2:], ^frame.Fold(f.SumFrom(start, int(f.Len), sum)))
	}
	return true
}

// header writes the header of IPv6 that one of IPv4 stands for to p, from a
// place on, with the fragment header that follows it if there is one. It returns
// where what follows begins. n is the length of that.
func (s *six) header(p []byte, at int, h []byte, n int) int {
	proto := h[9]
	if proto == frame.ProtoICMP {
		proto = protoICMP6
	}
	q := p[at : at+ip6Len]
	binary.BigEndian.PutUint32(q, 6<<28|uint32(h[1])<<20)
	q[6], q[7] = proto, h[8]
	from, to := s.address(binary.BigEndian.Uint32(h[12:])), s.address(binary.BigEndian.Uint32(h[16:]))
	copy(q[8:], from[:])
	copy(q[24:], to[:])
	at += ip6Len
	if field := binary.BigEndian.Uint16(h[6:]); field&(frame.MoreFragments|0x1fff) != 0 {
		q[6] = 44
		g := p[at : at+sixFragment]
		g[0], g[1] = proto, 0
		word := field << 3
		if field&frame.MoreFragments != 0 {
			word |= 1
		}
		binary.BigEndian.PutUint16(g[2:], word)
		binary.BigEndian.PutUint16(g[4:], binary.BigEndian.Uint16(h[10:]))
		binary.BigEndian.PutUint16(g[6:], binary.BigEndian.Uint16(h[4:]))
		at += sixFragment
		n += sixFragment
	}
	binary.BigEndian.PutUint16(q[4:], uint16(n))
	return at
}

// error6 writes the first 8 bytes of the ICMPv6 error that h says in ICMP, with
// no checksum (RFC 7915, 4.2, where that has a way to say it).
func error6(p, h []byte) {
	typ, code, info := uint8(icmp6Unreachable), h[1], uint32(0)
	switch {
	case h[0] == icmpTimeExceeded:
		typ = icmp6TimeExceeded
	case h[0] == icmpParameter:
		typ, code, info = icmp6Parameter, code&^code6, uint32(h[4])
	case code&code6 != 0:
		code &^= code6
	case code == codeFragNeeded:
		typ, code, info = icmp6TooBig, 0, binary.BigEndian.Uint32(h[4:])+sixMore
	case code == codeProtocol:
		typ, code, info = icmp6Parameter, 1, 6 // the next header is not known
	case code == codeNet:
		code = 0 // no route
	case code == codeProhibited:
		code = 1
	case code == codePort:
		code = 4
	default:
		code = 3 // the address is unreachable
	}
	p[0], p[1], p[2], p[3] = typ, code, 0, 0
	binary.BigEndian.PutUint32(p[4:], info)
}

// fromSix makes an entry of an error queue of IPv6 look like one of IPv4.
func (e *sockError) fromSix() {
	if e.origin != unix.SO_EE_ORIGIN_ICMP6 {
		return
	}
	e.origin = unix.SO_EE_ORIGIN_ICMP
	switch e.typ {
	case icmp6Unreachable:
		e.typ, e.code = icmpUnreachable, e.code|code6
	case icmp6TooBig:
		e.typ, e.code, e.info = icmpUnreachable, codeFragNeeded, max(e.info, leastMTU6)-sixMore
	case icmp6TimeExceeded:
		e.typ = icmpTimeExceeded
	case icmp6Parameter:
		e.typ, e.code = icmpParameter, e.code|code6
	default:
		e.typ = icmpEcho // nothing to tell of
	}
}

// mtuInside is an MTU that the host has told as that of packets with IPv4
// headers inside.
func (w *worker) mtuInside(mtu uint32) uint32 {
	if w.six != nil && mtu > sixMore {
		return mtu - sixMore
	}
	return mtu
}

// sumEcho6 fills in the checksum of an echo reply for the guest.
func (w *worker) sumEcho6(r *frame.Frame) {
	binary.BigEndian.PutUint16(r.Head[l4+2:], 0)
	sum := w.net.pseudo(binary.BigEndian.Uint32(r.Head[l3+12:]), frame.ProtoICMP, int(r.Len)-l4)
	binary.BigEndian.PutUint16(r.Head[l4+2:], ^frame.Fold(r.SumFrom(l4, int(r.Len), sum)))
}
