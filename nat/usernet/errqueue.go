package usernet

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

const (
	// errorsMost is how many errors of a socket one turn takes.
	errorsMost = 16
	// errorQuote is how much of a guest's datagram an error tells at most, so
	// that the packet has no more than 576 bytes (RFC 1812, 4.3.2.3).
	errorQuote = 576 - 2*ip4Len - icmpLen - udpLen
	// extErrLen is the length of a struct sock_extended_err.
	extErrLen = 16
	// unsentTTL is what an error's quotation shows as the time to live that is
	// left, which the kernel does not tell.
	unsentTTL = 1
)

// errorQueue is what it takes to read a socket's error queue.
type errorQueue struct {
	msg  unix.Msghdr
	iov  unix.Iovec
	name sockAddr
	ctl  [256]byte
	data [errorQuote]byte
}

func newErrorQueue() *errorQueue {
	q := new(errorQueue)
	setIov(&q.iov, q.data[:])
	q.msg.Name, q.msg.Iov, q.msg.Control = nameOf(&q.name), &q.iov, &q.ctl[0]
	q.msg.SetIovlen(1)
	return q
}

// sockError is an entry of an error queue (IP_RECVERR, ip(7)).
type sockError struct {
	errno     uint32
	origin    uint8
	typ, code uint8
	info      uint32
	offender  uint32
	// addr and port are where the datagram was sent, data is what is known of
	// its payload.
	addr uint32
	port uint16
	data []byte
}

// read takes the next entry off a socket's error queue.
func (q *errorQueue) read(w *worker, fd int32) (e sockError, ok bool) {
	q.msg.Namelen = sockAddrLen
	q.msg.SetControllen(len(q.ctl))
	n, errno := recvmsg(fd, &q.msg, unix.MSG_ERRQUEUE)
	if errno != 0 {
		return e, false
	}
	e.addr, e.port, e.data = w.addrIn(&q.name), netPort(q.name.Port), q.data[:n]
	ne := binary.NativeEndian
	rest := q.ctl[:min(int(q.msg.Controllen), len(q.ctl))]
	for {
		level, typ, d, more, ok := nextControl(rest)
		if !ok {
			return e, true
		}
		if level == unix.SOL_IP && typ == unix.IP_RECVERR && len(d) >= extErrLen {
			e.errno, e.origin, e.typ, e.code, e.info = ne.Uint32(d), d[4], d[5], d[6], ne.Uint32(d[8:])
			if o := d[extErrLen:]; len(o) >= 8 && ne.Uint16(o) == unix.AF_INET {
				e.offender = binary.BigEndian.Uint32(o[4:])
			}
		}
		if level == unix.SOL_IPV6 && typ == unix.IPV6_RECVERR && len(d) >= extErrLen && w.six != nil {
			e.errno, e.origin, e.typ, e.code, e.info = ne.Uint32(d), d[4], d[5], d[6], ne.Uint32(d[8:])
			if o := d[extErrLen:]; len(o) >= 24 && ne.Uint16(o) == unix.AF_INET6 {
				e.offender = w.net.six.number(w, (*addr6)(o[8:]))
			}
			e.fromSix()
		}
		rest = more
	}
}

// socketErrors tells the guest of the errors that wait at a mapping's socket.
// mtu is the last that the host itself has found, 0 if none; more says that
// there may be more. Frames that a Pull brings are from Next.
func (w *worker) socketErrors(b *frame.Batch, i int32, pull bool) (mtu uint32, more bool) {
	if w.udp.errs == nil {
		w.udp.errs = newErrorQueue()
	}
	for range errorsMost {
		if pull && b.Len() >= frame.BatchSize || b.Len() >= frame.BatchMax {
			return mtu, true
		}
		e, ok := w.udp.errs.read(w, w.table.at(i).fd)
		switch {
		case !ok:
			return mtu, false
		case e.origin == unix.SO_EE_ORIGIN_ICMP:
			w.errorToGuest(b, i, &e)
		case e.errno == uint32(unix.EMSGSIZE):
			mtu = w.mtuInside(e.info)
		}
	}
	return mtu, true
}

// pathMTU is the MTU that the host knows of the way on which a datagram that it
// has just refused was to go; 0 if it does not tell.
func (w *worker) pathMTU(b *frame.Batch, i int32) (mtu uint32) {
	for more := true; more && b.Len() < frame.BatchMax; {
		var m uint32
		if m, more = w.socketErrors(b, i, false); m != 0 {
			mtu = m
		}
	}
	return mtu
}

// errorToGuest translates an ICMP error (RFC 5508 REQ-4): type and code stay,
// the packet inside is as the guest has sent it, its destination as the guest
// knows it. It neither refreshes nor ends the mapping (REQ-6).
func (w *worker) errorToGuest(b *frame.Batch, i int32, e *sockError) {
	fl, n := w.table.at(i), w.net
	switch e.typ {
	case icmpUnreachable:
		w.stats.Refused++
	case icmpTimeExceeded, icmpParameter:
	default:
		return // RFC 5508 REQ-10c
	}
	dst, dport, ok := w.sentTo(i, target{mapped(e.addr), e.port})
	if !ok {
		return
	}
	inner := l4 + icmpLen
	t := inner + ip4Len // where the quoted transport header begins
	head, data := udpLen, e.data
	if fl.proto == frame.ProtoICMP {
		// The kernel tells of the echo request too.
		if head = icmpLen; len(data) < head {
			return
		}
		data = data[head:]
	}
	r := b.Reply()
	if r == nil {
		return
	}
	total := t - l3 + head + len(data)
	w.toGuest(r, frame.ProtoICMP, n.offender(e.offender, e.addr, dst), total, fl.queue)
	h := r.Head[:]
	clear(h[l4:])
	h[l4], h[l4+1] = e.typ, e.code
	switch {
	case e.typ == icmpUnreachable && e.code == codeFragNeeded:
		binary.BigEndian.PutUint16(h[l4+6:], uint16(min(e.info, 0xffff)))
	case e.typ == icmpParameter:
		h[l4+4] = uint8(e.info)
	}
	w.quoteHeaders(h[inner:], fl, e, dst, dport, head+len(data))
	if fl.proto == frame.ProtoICMP {
		restoreID(h[t:], e.data, fl.gport)
	}
	fillFrame(b, r, t+head, data)
	putICMPSum(r)
}

// quoteHeaders writes the IPv4 header of a packet that the guest has sent, and
// its UDP header if it is one, whose payload is unknown beyond n bytes behind
// the IP header.
func (w *worker) quoteHeaders(h []byte, fl *flow, e *sockError, dst uint32, dport uint16, n int) {
	h[0], h[1] = 0x45, fl.tos()
	binary.BigEndian.PutUint16(h[2:], uint16(ip4Len+n))
	if fl.flags&mapFragments == 0 {
		h[6] = frame.DontFragment >> 8
	}
	h[8], h[9] = fl.ttl(), fl.proto
	if e.typ == icmpTimeExceeded {
		h[8] = unsentTTL
	}
	binary.BigEndian.PutUint32(h[12:], w.net.guest)
	binary.BigEndian.PutUint32(h[16:], dst)
	binary.BigEndian.PutUint16(h[10:], ^frame.Fold(frame.Sum(h[:ip4Len], 0)))
	if fl.proto == frame.ProtoUDP {
		u := h[ip4Len:]
		binary.BigEndian.PutUint16(u, fl.gport)
		binary.BigEndian.PutUint16(u[2:], dport)
		binary.BigEndian.PutUint16(u[4:], uint16(n))
	}
}

// sentTo is as whom the guest knows a place that it has sent to.
func (w *worker) sentTo(i int32, t target) (addr uint32, port uint16, ok bool) {
	fl := w.table.at(i)
	if fl.hostAddr() == unmapped(&t.addr) && fl.hostPort() == t.port {
		return fl.lastAddr(), fl.lastPort(), true
	}
	return w.udpShown(i, t, true)
}

// offender is as whom the guest sees the one that an ICMP error comes from,
// which was about a packet to host, that the guest knows as dst.
func (n *Net) offender(a, host, dst uint32) uint32 {
	switch {
	case a == host:
		return dst
	case a>>24 == 127, a>>24 == 0, a>>28 >= 14, !n.outside(a):
		return n.gateway
	}
	return a
}

// restoreID writes the ICMP header of an echo message with the id that the
// guest knows it by, in place of that of the host's socket.
func restoreID(h, from []byte, id uint16) {
	copy(h[:icmpLen], from)
	sum := uint64(^binary.BigEndian.Uint16(h[2:])) + uint64(^binary.BigEndian.Uint16(h[4:])) + uint64(id)
	binary.BigEndian.PutUint16(h[4:], id)
	binary.BigEndian.PutUint16(h[2:], changedSum(sum))
}

// changedSum is the checksum that follows from a sum which an old checksum went
// into. Of the two zeros it is the one that is also right for a message of
// nothing but zeros (RFC 1624, 3).
func changedSum(sum uint64) uint16 {
	if s := ^frame.Fold(sum); s != 0 {
		return s
	}
	return 0xffff
}

// fillFrame lets a frame whose headers take n bytes of its Head end with a copy
// of data, or with as much of it as there is room for. The lengths in its
// headers are the caller's to write, for all of it: what is missing is missing
// in the arena only if the batch is full of other such frames.
func fillFrame(b *frame.Batch, r *frame.Frame, n int, data []byte) {
	k := copy(r.Head[n:], data)
	r.HeadLen, r.Len = uint16(n+k), int32(n+k)
	if data = data[k:]; len(data) == 0 {
		return
	}
	rest, segs := b.Alloc(len(data)), b.Segs(1)
	if rest == nil || segs == nil {
		binary.BigEndian.PutUint16(r.Head[l3+2:], uint16(n+k-l3))
		r.Head[l3+10], r.Head[l3+11] = 0, 0
		putIPSum(r.Head[:l4])
		return
	}
	copy(rest, data)
	r.Tail = append(segs, rest)
	r.Len += int32(len(rest))
}

// putICMPSum fills in the checksum of a whole ICMP message, whose field is zero.
func putICMPSum(r *frame.Frame) {
	binary.BigEndian.PutUint16(r.Head[l4+2:], ^frame.Fold(r.SumFrom(l4, int(r.Len), 0)))
}
