package usernet

import (
	"encoding/binary"

	"sidewire/engine/frame"
)

// What ICMP errors are made, at most: errorBurst at once, one in errorEvery
// nanoseconds for long (RFC 5508 REQ-10f).
const (
	errorBurst = 64
	errorEvery = 1e6
)

// rateLimit bounds how many ICMP errors are made. It is a token bucket as the
// generic cell rate algorithm has it: its only state is when the bucket will be
// full.
type rateLimit struct {
	full int64
}

func (l *rateLimit) take(now int64) bool {
	at := max(l.full, now)
	if at-now > (errorBurst-1)*errorEvery {
		return false
	}
	l.full = at + errorEvery
	return true
}

// quoteMost is how much of a packet an error quotes, so that it has no more
// than 576 bytes itself (RFC 1812, 4.3.2.3).
const quoteMost = 576 - ip4Len - icmpLen

// icmpError tells the guest, as the gateway, what became of its packet f (RFC
// 1812, 4.3.2.7 and 8). info is what follows the checksum: the next hop's MTU
// for a packet that is too big. There is none about what must not be answered,
// and none beyond the limit.
func (w *worker) icmpError(b *frame.Batch, f *frame.Frame, typ, code uint8, info uint32) {
	if !w.answerable(f) {
		return
	}
	if !w.limits.take(w.now) {
		w.stats.ErrorsLimited++
		return
	}
	r := b.Reply()
	if r == nil {
		return
	}
	n := min(int(f.Len)-int(f.L3), quoteMost)
	w.toGuest(r, frame.ProtoICMP, w.net.gateway, ip4Len+icmpLen+n, f.Queue)
	h := r.Head[:]
	h[l3+1] = f.Head[f.L3+1] &^ 3 // RFC 5508 REQ-10d, without the ECN bits
	h[l3+10], h[l3+11] = 0, 0
	putIPSum(h[:l4])
	h[l4], h[l4+1], h[l4+2], h[l4+3] = typ, code, 0, 0
	binary.BigEndian.PutUint32(h[l4+4:], info)
	quote(b, r, l4+icmpLen, f, n)
	putICMPSum(r)
	r.In = f.In
}

// quote lets a frame whose headers take at bytes of its Head end with the first
// n bytes of f's packet.
func quote(b *frame.Batch, r *frame.Frame, at int, f *frame.Frame, n int) {
	var first [quoteMost]byte
	k := copy(first[:n], f.Head[f.L3:f.HeadLen])
	for _, t := range f.Tail {
		k += copy(first[k:n], t)
	}
	fillFrame(b, r, at, first[:k])
}

// answerable says whether an ICMP error may be sent about a packet (RFC 1812,
// 4.3.2.7).
func (w *worker) answerable(f *frame.Frame) bool {
	n := w.net
	dst := f.DstIP4()
	switch {
	case f.Frag, f.Head[0]&1 != 0, f.SrcIP4() != n.guest, dst>>28 >= 14, dst&n.mask == n.gateway&n.mask && dst|n.mask == 1<<32-1:
		return false
	case f.Proto == frame.ProtoICMP:
		return f.Head[f.L4] == n.echo
	}
	return true
}

// refuse drops a packet and tells the guest so.
func (w *worker) refuse(b *frame.Batch, f *frame.Frame, typ, code uint8, r frame.DropReason) {
	w.icmpError(b, f, typ, code, 0)
	f.Drop(r)
}

// guestError deals with an ICMP error of the guest about a packet that it got.
// A socket has no way to pass one on, and none ends a flow (RFC 4787 REQ-12,
// RFC 5382 REQ-10), so all but one sort ends here: a TCP flow's segments become
// smaller if the guest's network cannot take them. It reports false if the
// packet's flow is not one of this worker's.
func (w *worker) guestError(f *frame.Frame) bool {
	h := f.Head[int(f.L4)+icmpLen : f.HeadLen]
	if len(h) < ip4Len || h[0]>>4 != 4 {
		f.Drop(frame.BadTransport)
		return true
	}
	ihl := int(h[0]&15) * 4 // options are stepped over (RFC 5508 REQ-3b)
	switch {
	case ihl < ip4Len || len(h) < ihl+8:
		f.Drop(frame.BadTransport)
		return true
	case frame.Fold(frame.Sum(h[:ihl], 0)) != 0xffff:
		f.Drop(frame.BadChecksum) // REQ-3a
		return true
	}
	src, dst, t := binary.BigEndian.Uint32(h[12:]), binary.BigEndian.Uint32(h[16:]), h[ihl:]
	if src != f.DstIP4() || dst != w.net.guest || binary.BigEndian.Uint16(h[6:])&0x1fff != 0 {
		f.Drop(frame.NoFlow)
		return true
	}
	k := key{gport: binary.BigEndian.Uint16(t[2:]), proto: h[9]}
	switch k.proto {
	case frame.ProtoTCP:
		k.remote, k.rport = hostOf(src), binary.BigEndian.Uint16(t)
	case frame.ProtoICMP:
		k.gport = binary.BigEndian.Uint16(t[4:])
	}
	i := w.table.find(k)
	if i == none {
		return false
	}
	if k.proto == frame.ProtoTCP && f.Head[f.L4] == icmpUnreachable && f.Head[f.L4+1] == codeFragNeeded {
		seq := binary.BigEndian.Uint32(t[4:])
		if fl := w.table.at(i); seq-fl.sndUna < fl.sndMax-fl.sndUna { // RFC 5927, 4.1
			w.tcpTooBig(i, int(binary.BigEndian.Uint16(f.Head[f.L4+6:])))
			f.Out = frame.Consumed
			return true
		}
	}
	f.Drop(frame.NotCarried)
	return true
}

// leastMTU is the smallest MTU that the guest is believed about its own network.
const leastMTU = 552 // as Linux has it (net.ipv4.route.min_pmtu)

// tcpTooBig makes the segments that a flow sends to the guest fit into packets
// of mtu bytes.
func (w *worker) tcpTooBig(i int32, mtu int) {
	fl := w.table.at(i)
	fl.mss = min(fl.mss, uint16(max(mtu, leastMTU)-ip4Len-tcpLen))
}
