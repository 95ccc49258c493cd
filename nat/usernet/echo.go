package usernet

import (
	"encoding/binary"
	"log/slog"

	"sidewire/engine/frame"
)

// Echo requests leave by a ping socket of the host's (SOCK_DGRAM, IPPROTO_ICMP)
// for each query id, whoever is asked (RFC 5508 REQ-1a). The kernel puts the
// socket's own id in place of the guest's, which is the same where that was
// free, and only lets through replies with it. A session is a flow as a UDP
// mapping is, and the same code sends, receives, and tells of errors.
//
// The gateway's address and those of services answer themselves, whatever the
// host lets us do. Other queries (timestamp and the rest) are dropped: sockets
// do not carry them.

func echoKey(f *frame.Frame) key {
	return key{gport: binary.BigEndian.Uint16(f.Head[f.L4+4:]), proto: frame.ProtoICMP}
}

// icmpKnown deals with an ICMP message of the guest that belongs to a session
// of this worker, or to none at all. It reports false for one that may belong
// to a flow of another worker's.
func (w *worker) icmpKnown(b *frame.Batch, f *frame.Frame) bool {
	if w.six != nil && f.Head[f.L4] != w.net.echo {
		return w.icmp6Known(f)
	}
	switch f.Head[f.L4] {
	case w.net.echo:
		if w.net.answersFor(f.DstIP4()) {
			w.echoReply(b, f)
			return true
		}
		i := w.table.find(echoKey(f))
		if i == none {
			return false
		}
		w.echoRequest(b, f, i)
		return true
	case icmpUnreachable, icmpTimeExceeded, icmpParameter:
		return w.guestError(f)
	}
	f.Drop(frame.NotCarried) // RFC 5508 REQ-10c, REQ-11
	return true
}

// icmpOpen begins a session for an echo request.
func (w *worker) icmpOpen(b *frame.Batch, f *frame.Frame) {
	if f.Head[f.L4] != w.net.echo {
		f.Drop(frame.NoFlow) // an error about a packet that nobody has sent
		return
	}
	if !w.echoMayGo(b, f) {
		return
	}
	i := w.openMapping(b, f, echoKey(f))
	if i == none {
		return
	}
	w.idleUntil(i, int64(w.net.conf.Timeouts.Echo))
	w.echoRequest(b, f, i)
}

// echoRequest sends an echo request of the guest's.
func (w *worker) echoRequest(b *frame.Batch, f *frame.Frame, i int32) {
	dst := f.DstIP4()
	if fl := w.table.at(i); fl.lastAddr() != dst {
		if !w.echoMayGo(b, f) {
			return
		}
		fl.setLast(dst, 0, dst, 0)
	}
	w.sendLater(f, i, int(f.L4), int(f.Len)-int(f.L4))
}

// echoMayGo says whether an echo request may leave the guest's network. If it
// may not, the guest is told (RFC 5508 REQ-8).
func (w *worker) echoMayGo(b *frame.Batch, f *frame.Frame) bool {
	n, dst := w.net, f.DstIP4()
	switch {
	case !n.outside(dst):
		w.refuse(b, f, icmpUnreachable, codeHost, frame.NoRoute)
		return false
	case !n.conf.Ping || !n.permits(frame.ProtoICMP, dst, 0):
		w.stats.PolicyDenied++
		w.refuse(b, f, icmpUnreachable, codeProhibited, frame.Policy)
		return false
	}
	return true
}

// echoReply answers an echo request for one of our own addresses.
func (w *worker) echoReply(b *frame.Batch, f *frame.Frame) {
	r := &w.udp.whole
	n := int(f.Len) - int(f.L4)
	*r = frame.Frame{In: f.In, Len: int32(l4 + n), HeadLen: uint16(l4 + int(f.HeadLen) - int(f.L4)), Tail: f.Tail}
	w.toGuest(r, frame.ProtoICMP, f.DstIP4(), ip4Len+n, f.Queue)
	h := r.Head[:]
	h[l3+1] = f.Head[f.L3+1] // RFC 1122, 3.2.2.6
	h[l3+10], h[l3+11] = 0, 0
	putIPSum(h[:l4])
	copy(h[l4:], f.Head[f.L4:f.HeadLen])
	sum := uint64(^binary.BigEndian.Uint16(h[l4+2:])) + uint64(^(uint16(w.net.echo) << 8)) + uint64(w.net.echoReply)<<8
	h[l4] = w.net.echoReply
	binary.BigEndian.PutUint16(h[l4+2:], changedSum(sum))
	f.Out = frame.Consumed
	if !w.deliverWhole(b, r, false) {
		f.Drop(frame.BatchFull)
	}
}

// echoEvent is told what became possible with a session's socket.
func (w *worker) echoEvent(i int32, events uint32) { w.udpEvent(i, events) }

// echoPump brings the guest the answers to its echo requests.
func (w *worker) echoPump(b *frame.Batch, i int32) pumped { return w.receive(b, i) }

// noPing says, once, why echo requests do not leave the guest's network. The
// guest is told as of a policy.
func (n *Net) noPing(err error) {
	if n.saidNoPing.CompareAndSwap(false, true) {
		n.log.Warn("no ICMP echo beyond the gateway: the host does not let us have ping sockets; "+
			"let net.ipv4.ping_group_range of its network namespace include our group",
			slog.String("interface", n.conf.Name), slog.Any("err", err))
	}
}
