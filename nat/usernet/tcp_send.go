package usernet

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

const (
	// maxPayload is what fits into the longest IP packet.
	maxPayload = 65535 - ip4Len - tcpLen
	headLen    = l4 + tcpLen // of a segment for the guest
	// shortRead is how much is received at once while it is not known whether
	// there is much: it is copied once more.
	shortRead = 16 << 10
	// bulkMin is what a read must bring for the next to go straight into the
	// guest's buffers.
	bulkMin = 2048
	// bulkFrames is how many long frames a flow may bring in its turn, by one
	// call.
	bulkFrames = 4
	// bufferSlack is how much longer than their headers buffers are taken to be.
	bufferSlack = 2048
	// keepEdge, or 8 segments, is how much window is enough not to ask for more
	// with each small segment.
	keepEdge = 48 << 10
	// peekScratch takes what a kernel without SO_PEEK_OFF for TCP (before Linux
	// 6.9) hands out once more.
	peekScratch = 64 << 10
)

// tcpHeader makes f a segment with n bytes of payload behind its header and
// options, opts bytes of which the caller has put behind the header.
func (w *worker) tcpHeader(f *frame.Frame, fl *flow, seq uint32, bits uint8, opts, n int) {
	src, total := fl.remote.addr(), tcpLen+opts+n
	w.toGuest(f, frame.ProtoTCP, src, ip4Len+total, fl.queue)
	h := f.Head[l4 : l4+tcpLen]
	binary.BigEndian.PutUint16(h[0:], fl.rport)
	binary.BigEndian.PutUint16(h[2:], fl.gport)
	binary.BigEndian.PutUint32(h[4:], seq)
	binary.BigEndian.PutUint32(h[8:], fl.rcvNxt)
	h[12], h[13] = byte(tcpLen+opts)<<2, bits
	wnd := uint32(max(int32(fl.rcvEdge-fl.rcvNxt), 0))
	if bits&tcpSYN == 0 {
		wnd >>= fl.oscale()
	}
	binary.BigEndian.PutUint16(h[14:], uint16(min(wnd, 0xffff)))
	// The device completes the sum for guests that do not take it so.
	binary.BigEndian.PutUint16(h[16:], frame.Fold(w.net.pseudo(src, frame.ProtoTCP, total)))
	h[18], h[19] = 0, 0
	f.HeadLen, f.Len = uint16(headLen+opts), int32(headLen+opts+n)
	f.Flags, f.CsumStart, f.CsumOffset, f.HdrLen = frame.NeedsCsum, l4, 16, uint16(headLen+opts)
	fl.rcvAck = fl.rcvNxt
}

// emit sends the guest a segment without payload. It reports false if there is
// no room for it.
func (w *worker) emit(b *frame.Batch, fl *flow, seq uint32, bits uint8) bool {
	f := b.Reply()
	if f == nil {
		return false
	}
	w.tcpHeader(f, fl, seq, bits, 0, 0)
	return true
}

// emitACK tells the guest what has come and how much more may.
func (w *worker) emitACK(b *frame.Batch, i int32) {
	fl := w.table.at(i)
	w.keepWindow(fl)
	if w.emit(b, fl, fl.sndNxt, tcpACK) {
		fl.flags &^= ackNow
	} else {
		w.wheel.set(i, w.tick+1) // ackNow stays, and is looked at there
	}
}

// keepWindow opens the guest's window unless it is wide enough: to ask the
// kernel with each small segment would cost more than to send it.
func (w *worker) keepWindow(fl *flow) {
	if int32(fl.rcvEdge-fl.rcvNxt) < min(keepEdge, 8*int32(fl.mss)) || fl.rcvNxt-fl.rcvAck >= 4096 || fl.flags&stalled != 0 {
		w.openWindow(fl)
	}
}

// openWindow moves the right edge of the guest's window to what the socket is
// going to take.
func (w *worker) openWindow(fl *flow) {
	left := fl.rcvEdge - fl.rcvNxt
	switch {
	case fl.fd < 0 || fl.flags&guestFin != 0:
		return
	case fl.flags&stalled != 0:
		fl.rcvEdge = fl.rcvNxt
		return
	}
	var m meminfo
	if memInfo(fl.fd, &m) != 0 {
		return
	}
	// A buffer's bookkeeping counts too, so not all that is free is for data.
	free := (int64(m.sndbuf) - int64(m.wmemQueued)) * 3 / 4
	wnd := uint32(max(0, min(free, 0xffff<<fl.oscale())))
	if wnd < min(uint32(fl.mss), m.sndbuf/4) {
		wnd = 0 // RFC 9293, 3.8.6.2.2: silly windows; a buffer may be smaller than a segment
	}
	if int32(left) > 0 && wnd < left {
		wnd = left // it was promised
	}
	fl.rcvEdge = fl.rcvNxt + wnd
	if int64(m.wmemQueued) > int64(m.sndbuf)*2/3 && fl.flags&waitOut == 0 {
		// Only a socket that was found to be full tells when it no longer is.
		w.askForRoom(fl)
	}
}

// askForRoom has an event tell when a socket that is nearly full takes more.
func (w *worker) askForRoom(fl *flow) {
	if writable(fl.fd) {
		return
	}
	fl.flags |= waitOut
}

// roomAgain is called when a socket takes data again.
func (w *worker) roomAgain(b *frame.Batch, i int32) {
	fl := w.table.at(i)
	was := fl.flags
	fl.flags &^= waitOut | stalled
	w.openWindow(fl)
	w.emit(b, fl, fl.sndNxt, tcpACK)
	if was&stalled != 0 {
		// What it did not take has to come again: three more of the same make
		// the guest send it at once (RFC 5681, 3.2).
		for range 3 {
			w.emit(b, fl, fl.sndNxt, tcpACK)
		}
	}
}

// sendSYN sends the guest our SYN, which acknowledges its own if it has come.
func (w *worker) sendSYN(b *frame.Batch, i int32) {
	fl := w.table.at(i)
	w.startRTO(i)
	f := b.Reply()
	if f == nil {
		return // the timer does it
	}
	bits, mss := uint8(tcpSYN), w.net.mss
	o := f.Head[headLen:]
	o[0], o[1], o[2], o[3] = 2, 4, byte(mss>>8), byte(mss)
	n := 4
	if fl.oscale() > 0 || fl.state == stateSynSent {
		o[4], o[5], o[6], o[7] = 1, 3, 3, ourScale
		n = 8
	}
	if fl.state != stateSynSent {
		bits |= tcpACK
		w.firstWindow(fl)
	}
	w.tcpHeader(f, fl, fl.sndUna, bits, n, 0)
	fl.sndMax = fl.sndNxt
}

// resetUnknown answers a segment of a connection that there is not (RFC 9293,
// 3.10.7.1).
func (w *worker) resetUnknown(b *frame.Batch, f *frame.Frame, s *segment) {
	if s.flags&tcpRST != 0 {
		return
	}
	r := b.Reply()
	if r == nil {
		return
	}
	// A flow that is just for this.
	fl := flow{key: tcpKey(f), queue: f.Queue, rcvNxt: s.end(), rcvEdge: s.end()}
	seq, bits := uint32(0), uint8(tcpRST|tcpACK)
	if s.flags&tcpACK != 0 {
		seq, bits = s.ack, tcpRST
		fl.rcvNxt, fl.rcvEdge = 0, 0
	}
	w.tcpHeader(r, &fl, seq, bits, 0, 0)
}

// tcpPump brings the guest what a connection's socket holds for it.
func (w *worker) tcpPump(b *frame.Batch, i int32) pumped {
	fl := w.table.at(i)
	if fl.flags&readable == 0 || fl.state != stateEstablished {
		return pumpDone
	}
	limit := w.maySend(i)
	if limit <= 0 {
		return pumpDone // the guest's acknowledgement makes it ready again
	}
	if w.atEnd(fl) {
		return w.hostEnds(b, i)
	}
	return w.tcpReceive(b, i, limit)
}

// maySend is how many bytes the guest's window and congestion let be sent now.
func (w *worker) maySend(i int32) int {
	fl := w.table.at(i)
	flight := fl.sndNxt - fl.sndUna
	if fl.flags&hostFin != 0 && !before(fl.sndNxt, fl.sndMax-1) {
		return 0 // what is before the FIN is on its way
	}
	wnd := min(fl.sndWnd, fl.cwnd)
	if flight >= wnd {
		if fl.sndWnd == 0 && flight == 0 && fl.rtxDue == 0 {
			w.startRTO(i) // to probe
		}
		return 0
	}
	n := wnd - flight
	if fl.flags&hostFin != 0 {
		n = min(n, fl.sndMax-1-fl.sndNxt)
	} else if n < uint32(fl.mss) && flight > 0 {
		return 0 // RFC 9293, 3.8.6.2.1: more is on its way to be acknowledged
	}
	if n > maxPayload {
		n -= n % uint32(fl.mss)
	}
	return int(n)
}

// tcpReceive takes up to limit bytes from a socket's queue, where they stay, and
// makes frames of them. It says pumpAgain if it has.
func (w *worker) tcpReceive(b *frame.Batch, i int32, limit int) pumped {
	fl := w.table.at(i)
	if fl.flags&urgent != 0 {
		limit = w.toMark(i, limit)
	}
	if fl.flags&bulk != 0 {
		if v, ok := w.receiveBulk(b, i, limit); ok {
			return v
		}
	}
	return w.receiveShort(b, i, limit)
}

// receiveBulk receives several long frames at once, straight into the guest's
// buffers. It reports false if the guest does not take them in this way.
func (w *worker) receiveBulk(b *frame.Batch, i int32, limit int) (v pumped, ok bool) {
	fl := w.table.at(i)
	if int(fl.queue) >= len(w.rooms) || w.rooms[fl.queue].room == nil {
		return 0, false
	}
	r := &w.rooms[fl.queue]
	per := maxPayload / int(fl.mss) * int(fl.mss)
	frames := min((limit+per-1)/per, bulkFrames, frame.BatchSize-b.Len())
	if frames == 0 {
		return pumpLater, true
	}
	limit = min(limit, frames*per)
	// Each frame begins a buffer of its own.
	bufs := r.room.Reserve(r.used, w.net.lent+min(limit, bulkMin), limit+frames*(w.net.lent+bufferSlack))
	switch {
	case bufs == nil && r.room.Short():
		r.short = true
		return pumpWait, true
	case bufs == nil:
		return 0, false
	}
	r.bufs = bufs
	if b.SegsLeft() < len(bufs)-r.used {
		return pumpLater, true
	}
	niov, room := w.lay(bufs[r.used:], per, limit)
	n, errno := w.peek(fl, niov)
	if errno != 0 || n == 0 {
		return w.nothing(b, i, errno), true
	}
	if n < room && fl.flags&hangup == 0 {
		fl.flags &^= readable // it is empty; when it no longer is, an event tells
	}
	for n > 0 {
		size := min(n, per)
		n -= size
		f := b.Next()
		w.segmentFor(f, i, size, n == 0)
		f.RxAt, f.RxBufs = uint16(r.used), covering(bufs[r.used:], w.net.lent+size)
		f.Tail = behind(b.Segs(int(f.RxBufs)), bufs[r.used:], w.net.lent, size)
		r.used += int(f.RxBufs)
		if size < bulkMin {
			fl.flags &^= bulk
		}
	}
	return pumpAgain, true
}

// lay puts the places for limit bytes of payload, in frames of per bytes, to
// w.iovs. It returns how many they are, and how many bytes they have room for.
func (w *worker) lay(bufs [][]byte, per, limit int) (niov, room int) {
	skip, left := w.net.lent, min(per, limit)
	for _, p := range bufs {
		if left == 0 { // the next frame
			if limit -= per; limit <= 0 {
				break
			}
			skip, left = w.net.lent, min(per, limit)
		}
		if niov == iovMax {
			break
		}
		if skip >= len(p) {
			skip -= len(p)
			continue
		}
		p = p[skip:]
		skip = 0
		p = p[:min(len(p), left)]
		setIov(&w.iovs[niov], p)
		niov++
		left -= len(p)
		room += len(p)
	}
	return niov, room
}

// behind appends to tail what n bytes of payload take of a frame's buffers.
func behind(tail, bufs [][]byte, skip, n int) [][]byte {
	for _, p := range bufs {
		if skip >= len(p) {
			skip -= len(p)
			continue
		}
		p = p[skip:]
		skip = 0
		p = p[:min(len(p), n)]
		tail = append(tail, p)
		if n -= len(p); n == 0 {
			break
		}
	}
	return tail
}

// receiveShort receives one frame, which is copied to the guest by its port.
func (w *worker) receiveShort(b *frame.Batch, i int32, limit int) pumped {
	fl := w.table.at(i)
	f := b.Next()
	if f == nil {
		return pumpLater
	}
	inHead := min(limit, w.net.inHead-headLen)
	setIov(&w.iovs[0], f.Head[headLen:headLen+inHead])
	niov, room := 1, inHead
	var rest []byte
	if limit > inHead {
		n := min(limit-inHead, shortRead)
		for rest = b.Alloc(n); rest == nil && n >= bulkMin; rest = b.Alloc(n) {
			n /= 2
		}
		if rest == nil {
			b.Undo()
			return pumpLater
		}
		setIov(&w.iovs[1], rest)
		niov, room = 2, inHead+n
	}
	n, errno := w.peek(fl, niov)
	if errno != 0 || n == 0 {
		b.Undo()
		b.TrimAlloc(len(rest))
		return w.nothing(b, i, errno)
	}
	if n < room && fl.flags&hangup == 0 {
		fl.flags &^= readable // as above
	}
	w.segmentFor(f, i, n, true)
	inHead = min(n, inHead)
	f.HeadLen += uint16(inHead)
	if n > inHead {
		f.Tail = append(b.Segs(1), rest[:n-inHead])
	}
	b.TrimAlloc(len(rest) - (n - inHead))
	if n >= shortRead {
		fl.flags |= bulk
	}
	return pumpAgain
}

// nothing is what becomes of a flow whose socket has brought no data.
func (w *worker) nothing(b *frame.Batch, i int32, errno unix.Errno) pumped {
	switch errno {
	case 0:
		return w.hostEnds(b, i)
	case unix.EAGAIN:
		w.table.at(i).flags &^= readable
		return pumpDone
	case unix.EBUSY:
		return pumpDone // as when the window is full
	case unix.EFAULT:
		return pumpWait // the guest's memory is going away, and its ring with it
	}
	w.hostError(b, i)
	return pumpGone
}

// peek receives what follows the bytes that are under way, or acknowledged,
// without taking it off the socket's queue.
func (w *worker) peek(fl *flow, niov int) (int, unix.Errno) {
	m := &w.msg
	m.Name, m.Namelen, m.Control = nil, 0, nil
	m.SetControllen(0)
	flight := fl.sndNxt - fl.base
	if flight > 0 && fl.flags&peekOff == 0 && !w.net.noPeekOff.Load() {
		switch setInt(fl.fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, int32(flight)) {
		case 0:
			fl.flags |= peekOff
		default:
			w.net.noPeekOff.Store(true)
		}
	}
	if flight > 0 && fl.flags&peekOff == 0 {
		w.discard(fl)
		flight = fl.sndNxt - fl.base
	}
	m.Iov = &w.iovs[0]
	m.SetIovlen(niov)
	if flight == 0 || fl.flags&peekOff != 0 {
		return recvmsg(fl.fd, m, unix.MSG_PEEK)
	}
	return w.peekBehind(fl, niov, int(flight))
}

// peekBehind is peek for a kernel that knows no offset: the bytes before are
// received too, on top of each other.
func (w *worker) peekBehind(fl *flow, niov, flight int) (int, unix.Errno) {
	if w.scratch == nil {
		w.scratch = make([]byte, peekScratch)
	}
	before := (flight + peekScratch - 1) / peekScratch
	if before+niov > iovMax {
		return 0, unix.EAGAIN
	}
	copy(w.iovs[before:], w.iovs[:niov])
	for k, left := 0, flight; k < before; k++ {
		n := min(left, peekScratch)
		setIov(&w.iovs[k], w.scratch[:n])
		left -= n
	}
	w.msg.SetIovlen(before + niov)
	n, errno := recvmsg(fl.fd, &w.msg, unix.MSG_PEEK)
	switch {
	case errno != 0:
		return 0, errno
	case n > flight:
		return n - flight, 0
	}
	switch all, errno := queued(fl.fd); {
	case errno == 0 && all > flight:
		return 0, unix.EBUSY // the kernel stops at an urgent byte, until what is before it is discarded
	case fl.flags&hangup != 0:
		return 0, 0
	}
	return 0, unix.EAGAIN
}

// segmentFor makes f the head of a segment with n bytes that were received; last
// says that there are no more for now.
func (w *worker) segmentFor(f *frame.Frame, i int32, n int, last bool) {
	fl := w.table.at(i)
	bits := uint8(tcpACK)
	if last && fl.flags&readable == 0 {
		bits |= tcpPSH
	}
	seq := fl.sndNxt
	w.keepWindow(fl)
	w.isAnswered(fl)
	if before(seq, fl.sndMax) {
		w.stats.Retransmits++
	} else if fl.rttAt == 0 && fl.flags&recovery == 0 {
		fl.mark, fl.rttAt = seq+uint32(n), w.rttNow()
	}
	w.tcpHeader(f, fl, seq, bits, 0, n)
	if fl.flags&urgent != 0 {
		w.markUrgent(f, i, seq)
	}
	f.Token = uint32(i) + 1
	if n > int(fl.mss) {
		f.GSO, f.GSOSize = frame.GSOTCPv4, fl.mss
	}
	fl.sndNxt += uint32(n)
	if before(fl.sndMax, fl.sndNxt) {
		fl.sndMax = fl.sndNxt
	}
	w.brought += n
	if fl.rtxDue == 0 {
		w.startRTO(i)
	}
}

// notDelivered takes back a segment for which the guest had no buffers: it has
// not been sent.
func (w *worker) notDelivered(f *frame.Frame) {
	i := int32(f.Token - 1)
	fl := w.table.at(i)
	seq := binary.BigEndian.Uint32(f.Head[f.L4+4:])
	if fl.state != stateEstablished || fl.gport != f.DstPort() || fl.rport != f.SrcPort() || before(seq, fl.sndUna) || !before(seq, fl.sndNxt) {
		return
	}
	fl.sndNxt = seq
	w.seek(fl)
	if f.Head[f.L4+13]&tcpURG != 0 {
		w.mark(i, seq)
	}
	// A full ring is no loss in a network, and the time that it takes no round
	// trip.
	fl.rttAt = 0
	w.startRTO(i)
	// Nobody tells when there are buffers: it tries again soon.
	fl.flags |= readable | retry
	w.timer0(i, w.tick+1)
}

// seek has the next peek find what is to be sent next. It is called when that is
// not what follows the last peek.
func (w *worker) seek(fl *flow) {
	if fl.flags&peekOff != 0 {
		setInt(fl.fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, int32(fl.sndNxt-fl.base))
	}
}

// covering is how many of the buffers n bytes take.
func covering(bufs [][]byte, n int) (k uint16) {
	for ; n > 0 && int(k) < len(bufs); k++ {
		n -= len(bufs[k])
	}
	return k
}

// hostEnds is reached when the host's side has sent all that it will.
func (w *worker) hostEnds(b *frame.Batch, i int32) pumped {
	fl := w.table.at(i)
	if fl.flags&hostFin != 0 {
		return pumpDone
	}
	if !w.emit(b, fl, fl.sndNxt, tcpFIN|tcpACK) {
		return pumpLater
	}
	fl.flags = fl.flags&^readable | hostFin
	fl.sndNxt++
	if before(fl.sndMax, fl.sndNxt) {
		fl.sndMax = fl.sndNxt
	}
	if fl.rtxDue == 0 {
		w.startRTO(i)
	}
	return pumpDone
}
