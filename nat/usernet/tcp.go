package usernet

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Flags of a TCP header.
const (
	tcpFIN = 1 << iota
	tcpSYN
	tcpRST
	tcpPSH
	tcpACK
	tcpURG
	tcpECE
	tcpCWR
)

// Flags of a TCP flow.
const (
	guestFin  flags = 1 << iota // the guest's FIN was taken and passed on
	hostFin                     // our FIN was sent
	finAcked                    // and acknowledged
	readable                    // the host's socket may have something
	hangup                      // the peer has shut down: there is an end behind what is readable
	waitOut                     // an event will tell when the socket takes more
	stalled                     // it took less than the guest was allowed to send
	ackNow                      // the guest is to be told at the batch's end
	delayed                     // in the list of delayed acknowledgements
	peekOff                     // SO_PEEK_OFF is set
	bulk                        // what comes is long: receive into the guest's buffers
	recovery                    // segments up to mark are being sent again
	urgent                      // the socket has urgent data
	keepalive                   // SO_KEEPALIVE is set
	retry                       // the guest had no buffers
	patient                     // in the list of acknowledgements that wait for an answer
	asked                       // the guest sent something that was not answered yet
	once                        // its last request was answered before it sent another
	answers                     // so were the last two, or those of others were
	spoke                       // the socket has sent something
	noDelay                     // TCP_NODELAY is set
)

const (
	ourScale = 7 // windows of up to 8 MiB
	// initialSegments is the initial window (RFC 6928).
	initialSegments = 10
	minMSS          = 64  // smaller ones would make us send headers only
	defaultMSS      = 536 // where the guest names none (RFC 9293, 3.7.1)
)

// segment is the TCP header of a guest's frame.
type segment struct {
	seq, ack uint32
	wnd      uint16
	urg      uint16
	flags    uint8
	at       int // offset of the payload in the frame
	len      int // bytes of payload
	options  []byte
}

// parseTCP reads a header that ParseIPv4 found sound. It reports false if not
// all of it is in private memory.
func parseTCP(f *frame.Frame) (s segment, ok bool) {
	h := f.Head[f.L4:]
	n := int(h[12]>>4) * 4
	s = segment{
		seq: binary.BigEndian.Uint32(h[4:]), ack: binary.BigEndian.Uint32(h[8:]), flags: h[13],
		wnd: binary.BigEndian.Uint16(h[14:]), urg: binary.BigEndian.Uint16(h[18:]), at: int(f.L4) + n,
	}
	if s.at > int(f.HeadLen) {
		return s, false
	}
	s.len, s.options = int(f.Len)-s.at, h[tcpLen:n]
	return s, true
}

// end is the sequence number behind the segment.
func (s *segment) end() uint32 {
	n := s.seq + uint32(s.len)
	if s.flags&tcpSYN != 0 {
		n++
	}
	if s.flags&tcpFIN != 0 {
		n++
	}
	return n
}

// readOptions takes from the options of a SYN what we speak of.
func (f *flow) readOptions(o []byte, most uint16) {
	mss, scale := uint16(defaultMSS), -1
	for len(o) > 0 && o[0] != 0 {
		if o[0] == 1 {
			o = o[1:]
			continue
		}
		if len(o) < 2 || o[1] < 2 || int(o[1]) > len(o) {
			break // RFC 9293, MUST-7: what cannot be read ends the list
		}
		switch {
		case o[0] == 2 && o[1] == 4:
			mss = binary.BigEndian.Uint16(o[2:])
		case o[0] == 3 && o[1] == 3:
			scale = min(int(o[2]), 14) // RFC 7323, 2.3
		}
		o = o[o[1]:]
	}
	f.mss = min(max(mss, minMSS), most)
	if scale >= 0 {
		f.scale = uint8(1 + scale)
	}
}

// gscale is the guest's window scale, and oscale ours; both are 0 if the guest
// does not scale.
func (f *flow) gscale() uint8 { return max(f.scale, 1) - 1 }

func (f *flow) oscale() uint8 {
	if f.scale == 0 {
		return 0
	}
	return ourScale
}

// before and friends compare sequence numbers.
func before(a, b uint32) bool { return int32(a-b) < 0 }

// tcpSegment deals with a segment of a flow.
func (w *worker) tcpSegment(b *frame.Batch, f *frame.Frame, i int32) {
	s, ok := parseTCP(f)
	if !ok {
		f.Drop(frame.BadTransport)
		return
	}
	f.Out = frame.Consumed
	fl := w.table.at(i)
	fl.queue = f.Queue
	fl.seen = w.seen()
	switch fl.state {
	case stateConnecting:
		if s.flags&tcpRST != 0 && s.seq == fl.rcvNxt {
			w.drop(i)
		}
	case stateSynSent:
		w.synSentSegment(b, f, i, &s)
	case stateSynAckSent:
		w.synAckSegment(b, f, i, &s)
	case stateEstablished:
		w.segmentArrives(b, f, i, &s)
	case stateTimeWait:
		w.timeWaitSegment(b, f, i, &s)
	}
}

// synSentSegment waits for the guest to take a connection that came for it.
func (w *worker) synSentSegment(b *frame.Batch, f *frame.Frame, i int32, s *segment) {
	fl := w.table.at(i)
	if s.flags&tcpACK != 0 && s.ack != fl.sndNxt {
		if s.flags&tcpRST == 0 {
			w.resetUnknown(b, f, s)
		}
		return
	}
	switch {
	case s.flags&tcpRST != 0:
		if s.flags&tcpACK != 0 {
			w.abort(i) // refused
		}
		return
	case s.flags&tcpSYN == 0:
		return
	}
	fl.readOptions(s.options, w.net.mss)
	fl.rcvNxt, fl.rcvAck, fl.rcvEdge = s.seq+1, s.seq+1, s.seq+1
	fl.cwnd, fl.ssthresh = initialSegments*uint32(fl.mss), ^uint16(0)
	if s.flags&tcpACK == 0 { // both have called each other (RFC 9293, 3.5)
		fl.state = stateSynAckSent
		w.sendSYN(b, i)
		return
	}
	fl.sndWnd = uint32(s.wnd)
	w.established(i)
	fl.flags |= ackNow
	w.touch(i)
}

// synAckSegment waits for the guest to acknowledge our SYN.
func (w *worker) synAckSegment(b *frame.Batch, f *frame.Frame, i int32, s *segment) {
	fl := w.table.at(i)
	switch {
	case s.flags&tcpRST != 0:
		if s.seq == fl.rcvNxt {
			w.abort(i)
		}
	case s.flags&tcpSYN != 0 && s.seq+1 == fl.rcvNxt && s.flags&tcpACK == 0:
		w.sendSYN(b, i) // it has not seen ours
	case s.flags&tcpACK == 0:
	case s.ack != fl.sndNxt:
		w.resetUnknown(b, f, s)
	default:
		fl.sndWnd = uint32(s.wnd) << fl.gscale()
		w.established(i)
		if s.flags&tcpSYN != 0 { // the answer to a crossing SYN
			fl.flags |= ackNow
			w.touch(i)
			return
		}
		w.segmentArrives(b, f, i, s)
	}
}

// established is reached when both sides have said SYN and been heard.
func (w *worker) established(i int32) {
	fl := w.table.at(i)
	fl.state = stateEstablished
	fl.sndUna, fl.base = fl.sndNxt, fl.sndNxt
	fl.rtxDue, fl.backoff = 0, 0
	if fl.flags&readable != 0 { // an event has been and gone
		w.ready(i)
	}
}

// timeWaitSegment answers what comes late, and lets the ports be used again.
func (w *worker) timeWaitSegment(b *frame.Batch, f *frame.Frame, i int32, s *segment) {
	fl := w.table.at(i)
	switch {
	case s.flags&tcpRST != 0:
		if s.seq == fl.rcvNxt {
			w.drop(i)
		}
	case s.flags&(tcpSYN|tcpACK) == tcpSYN && before(fl.rcvNxt, s.seq):
		w.drop(i)
		f.Out = frame.Drop
		w.tcpOpen(b, f)
	case s.end() != s.seq:
		fl.flags |= ackNow
		w.touch(i)
	}
}

// segmentArrives is RFC 9293's 3.10.7.4 for a connection that is open, as far
// as it is ours: the host's kernel does the rest.
func (w *worker) segmentArrives(b *frame.Batch, f *frame.Frame, i int32, s *segment) {
	fl := w.table.at(i)
	if w.out.flow != i {
		w.flush(b)
		if fl.state != stateEstablished {
			return
		}
	}
	next := fl.rcvNxt
	if w.out.flow == i {
		next += uint32(w.out.bytes)
		if w.out.fin {
			next++
		}
	}
	switch {
	case s.flags&tcpRST != 0:
		switch { // RFC 5961, 3.2
		case s.seq == next:
			w.flush(b)
			if w.table.at(i).state == stateEstablished {
				w.abort(i)
			}
		case before(next, s.seq) && before(s.seq, fl.rcvEdge):
			w.ackSoon(i)
		}
		return
	case s.flags&tcpSYN != 0:
		w.ackSoon(i) // RFC 5961, 4.2
		return
	case s.flags&tcpACK == 0:
		return
	}
	if !w.ackArrives(b, i, s) {
		return
	}
	if s.len == 0 && s.flags&tcpFIN == 0 {
		if s.seq != next {
			w.ackSoon(i) // a keepalive, or a probe of our window
		}
		return
	}
	if before(next, s.seq) { // something is missing: nothing is kept, the guest is told at once
		w.stats.OutOfOrder++
		w.emitACK(b, i)
		return
	}
	skip := int(next - s.seq)
	if skip > s.len || skip == s.len && s.flags&tcpFIN == 0 {
		w.ackSoon(i) // all of it was here before
		return
	}
	if fl.flags&(guestFin|stalled) != 0 {
		if fl.flags&guestFin != 0 {
			w.ackSoon(i)
		}
		return // the guest will be asked for it again
	}
	w.gather(b, f, i, s, skip)
}

// outgoing is what the guest sent on one connection in a row: it leaves by one
// call.
type outgoing struct {
	flow  int32
	iovs  int
	bytes int
	fin   bool
}

// gather puts a segment's payload, but for the first skip bytes, to what is
// sent for the flow.
func (w *worker) gather(b *frame.Batch, f *frame.Frame, i int32, s *segment, skip int) {
	o := &w.out
	if o.fin || o.flow == i && o.iovs+1+len(f.Tail) > iovMax {
		w.flush(b)
		if w.table.at(i).flags&(stalled|guestFin) != 0 || w.table.at(i).state != stateEstablished {
			return
		}
	}
	if s.flags&tcpURG != 0 && int(s.urg) > skip && int(s.urg) <= s.len {
		w.gatherUrgent(b, f, i, s, skip)
		return
	}
	o.flow = i
	o.fin = w.pieces(f, s.at+skip, s.len-skip) && s.flags&tcpFIN != 0
}

// pieces adds n bytes of a frame, from an offset on, to what is sent. It reports
// whether there was room for all of them.
func (w *worker) pieces(f *frame.Frame, at, n int) bool {
	o := &w.out
	o.bytes += n
	add := func(p []byte) {
		if len(p) > n {
			p = p[:n]
		}
		if len(p) > 0 && o.iovs < iovMax {
			setIov(&w.iovs[o.iovs], p)
			o.iovs++
			n -= len(p)
		}
	}
	if at < int(f.HeadLen) {
		add(f.Head[at:f.HeadLen])
		at = 0
	} else {
		at -= int(f.HeadLen)
	}
	for _, t := range f.Tail {
		if at >= len(t) {
			at -= len(t)
			continue
		}
		add(t[at:])
		at = 0
	}
	o.bytes -= n // what did not find room is not sent
	return n == 0
}

// gatherUrgent sends a segment with an urgent byte, which stays one (RFC 6093:
// the pointer is behind it).
func (w *worker) gatherUrgent(b *frame.Batch, f *frame.Frame, i int32, s *segment, skip int) {
	mark := int(s.urg) - 1
	w.out.flow = i
	w.pieces(f, s.at+skip, mark-skip)
	for _, part := range []struct{ n, flags int }{{1, unix.MSG_OOB}, {s.len - mark - 1, 0}} {
		w.flushWith(b, 0)
		if fl := w.table.at(i); fl.state != stateEstablished || fl.flags&stalled != 0 {
			return
		}
		w.out.flow = i
		if !w.pieces(f, s.at+mark, part.n) {
			return
		}
		mark++
		if part.flags != 0 {
			w.flushWith(b, part.flags)
			if fl := w.table.at(i); fl.state != stateEstablished || fl.flags&stalled != 0 {
				return
			}
			w.out.flow = i
		}
	}
	w.out.fin = s.flags&tcpFIN != 0
}

// flush sends what gather has gathered.
func (w *worker) flush(b *frame.Batch) { w.flushWith(b, 0) }

func (w *worker) flushWith(b *frame.Batch, flags int) {
	o := w.out
	w.out = outgoing{flow: none}
	if o.flow == none {
		return
	}
	i := o.flow
	fl := w.table.at(i)
	if o.bytes > 0 {
		w.msg.Name, w.msg.Namelen, w.msg.Control = nil, 0, nil
		w.msg.SetControllen(0)
		w.msg.Iov = &w.iovs[0]
		w.msg.SetIovlen(o.iovs)
		if fl.flags&noDelay == 0 {
			w.sendsAtOnce(fl, o.bytes)
		}
		n, errno := sendmsg(fl.fd, &w.msg, flags)
		if errno != 0 {
			n = 0
			if errno != unix.EAGAIN && errno != unix.ENOBUFS && errno != unix.ENOMEM && errno != unix.EFAULT {
				w.hostError(b, i)
				return
			}
		}
		fl.rcvNxt += uint32(n)
		w.asks(fl)
		if n < o.bytes {
			w.stats.Stalls++
			fl.flags |= stalled | ackNow
			o.fin = false
		}
	}
	if o.fin {
		fl.rcvNxt++
		fl.flags |= guestFin
		// What is unread would be told again with each event that is still to
		// come.
		w.discard(fl)
		shutdownWrite(fl.fd)
	}
	w.touch(i)
}

// ackArrives takes the guest's acknowledgement and window. It reports false if
// the segment is to be ignored, or was the last.
func (w *worker) ackArrives(b *frame.Batch, i int32, s *segment) bool {
	fl := w.table.at(i)
	switch {
	case before(fl.sndMax, s.ack): // of what was never sent
		w.ackSoon(i)
		return false
	case before(s.ack, fl.sndUna):
		return true
	}
	wnd := uint32(s.wnd) << fl.gscale()
	if s.ack == fl.sndUna {
		w.duplicateACK(b, i, s, wnd)
		fl.sndWnd = wnd
		return true
	}
	w.touch(i)
	acked := s.ack - fl.sndUna
	fl.sndUna, fl.sndWnd = s.ack, wnd
	if before(fl.sndNxt, s.ack) {
		fl.sndNxt = s.ack // what was to be sent again had arrived
		w.seek(fl)
	}
	fl.backoff = 0
	fl.flags &^= dupAckAll
	w.measure(fl, s.ack)
	w.grow(b, i, acked)
	if fl.sndUna == fl.sndMax {
		fl.rtxDue = 0
		if fl.flags&hostFin != 0 {
			fl.flags |= finAcked
		}
	} else {
		w.startRTO(i)
	}
	if fl.flags&readable != 0 {
		w.ready(i)
	}
	return true
}

// ackSoon has the guest told of our state at the batch's end.
func (w *worker) ackSoon(i int32) {
	w.table.at(i).flags |= ackNow
	w.touch(i)
}

// discardMin is how many acknowledged bytes stay in a socket, while more are
// under way, before they are taken off: each time the kernel thinks about
// telling its peer. When nothing is under way, discardFew bytes or up to 16
// answers of few bytes stay, but for discardTicks at most: the kernel counts the
// whole buffer that they are the end of, and may have closed its window for it.
const (
	discardMin   = 128 << 10
	discardFew   = 512
	discardTicks = uint32(50e6 >> tickShift)
)

// discard takes bytes that the guest has acknowledged off the socket's queue.
func (w *worker) discard(fl *flow) {
	n := fl.sndUna - fl.base
	if fl.flags&hostFin != 0 && fl.sndUna == fl.sndMax {
		n-- // the FIN is in no queue
	}
	if int32(n) <= 0 {
		return
	}
	for n > 0 { // the kernel stops at an urgent byte
		k, errno := discard(fl.fd, int(n))
		if errno != 0 || k <= 0 {
			return
		}
		fl.base += uint32(k)
		n -= uint32(k)
	}
}

// tcpSettle ends a batch for a flow: bytes that the guest has acknowledged leave
// the socket, and the guest is told what was taken.
func (w *worker) tcpSettle(b *frame.Batch, i int32) {
	fl := w.table.at(i)
	if fl.fd >= 0 {
		switch lag := fl.sndUna - fl.base; {
		case lag >= discardMin || fl.sndUna == fl.sndMax && (lag >= discardFew || fl.sndUna%16 == 0):
			w.discard(fl)
		case lag > 0 && fl.sndUna == fl.sndMax:
			w.timer0(i, w.tick+discardTicks)
		}
		if fl.flags&(guestFin|finAcked) == guestFin|finAcked {
			w.finished(b, i)
			return
		}
	}
	if unacked := fl.rcvNxt - fl.rcvAck; fl.flags&ackNow != 0 || unacked >= 2*uint32(fl.mss) {
		w.emitACK(b, i)
	} else if unacked > 0 && (fl.flags&answers != 0 || fl.flags&(guestFin|hostFin) == guestFin) {
		w.wait(i)
	} else if unacked > 0 && fl.flags&delayed == 0 {
		w.delay(i)
	}
}

// delay lets an acknowledgement wait for data that it can travel with.
func (w *worker) delay(i int32) {
	fl := w.table.at(i)
	fl.flags |= delayed
	if len(w.delayed) == 0 {
		w.ackSince = w.now
	}
	w.delayed = append(w.delayed, flowRef{i, fl.gen})
}

// finished ends a connection that both sides have closed.
func (w *worker) finished(b *frame.Batch, i int32) {
	fl := w.table.at(i)
	w.discard(fl) // a socket whose FIN is on its way says RST when it is closed with something unread
	if fl.flags&ackNow == 0 && fl.rcvNxt == fl.rcvAck {
		w.drop(i) // the guest knows all
		return
	}
	w.emitACK(b, i)
	w.closeSocket(fl)
	w.unready(i)
	fl.state, fl.flags, fl.rtxDue = stateTimeWait, guestFin|finAcked, 0
	w.wheel.set(i, w.tick+timeWaitTicks)
}

// ackDelay is how long, in nanoseconds, an acknowledgement waits for data that
// it can travel with. The worker spins a little longer than that before it
// sleeps; what waits then goes at once.
const ackDelay = 30_000

// sendDelayed sends acknowledgements that have waited for long enough.
func (w *worker) sendDelayed(b *frame.Batch) {
	if len(w.delayed) > 0 && w.now-w.ackSince >= ackDelay {
		w.delayed = w.sendACKs(b, w.delayed, delayed)
	}
	if len(w.waiting) > 0 && int32(w.tick-w.waitTill) >= 0 {
		w.waiting = w.sendACKs(b, w.waiting, patient)
	}
}

// sendACKs sends the acknowledgements of a list whose flows have a flag, and
// returns those for which the batch has no room.
func (w *worker) sendACKs(b *frame.Batch, list []flowRef, in flags) (left []flowRef) {
	for k, d := range list {
		if b.Len() >= frame.BatchMax {
			return append(list[:0], list[k:]...)
		}
		fl := w.table.at(d.flow)
		if fl.gen != d.gen || fl.flags&in == 0 {
			continue
		}
		fl.flags &^= in
		if fl.rcvNxt != fl.rcvAck {
			w.emitACK(b, d.flow)
		}
	}
	return list[:0]
}
