package usernet

import (
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

const (
	// rttShift makes the units of round-trip times of nanoseconds: 262 us, which
	// come round after 17 s. A timer that goes off ends what is timed before.
	rttShift = 18
	// The retransmission timer's bounds (RFC 6298). Its least value is the one
	// that kernels use: there is no network between the guest and us.
	minRTO     = int64(200e6)
	firstRTO   = int64(1e9)
	maxRTO     = int64(60e9)
	maxBackoff = 15 // as Linux's tcp_retries2: about 15 minutes
	maxSYN     = 6  // as tcp_syn_retries
	// mostCwnd or mostSegments, whichever is more, bound what is under way to the
	// guest. The one is enough for 40 Gbit/s at 300 us; more would make each
	// MSG_PEEK slower, for which the kernel walks over all buffers before its
	// place. Those of long segments are few: with more of them under way the
	// worker wakes up less often.
	mostCwnd     = 3 << 19
	mostSegments = 96
	// timeWaitTicks is for how long a guest's FIN that comes again is answered:
	// only a full ring can have lost the answer.
	timeWaitTicks = uint32(1e9 >> tickShift)
	// quietTicks is after how much silence the host is asked to look after its
	// side of a connection.
	quietTicks = uint32(60e9 >> tickShift)
	// probeTicks is how long a silent guest has to answer, probesMax how often.
	probeTicks = uint32(75e9 >> tickShift)
	probesMax  = 9
)

func (w *worker) rttNow() uint16 { return max(uint16(w.now>>rttShift), 1) }

// measure takes the round-trip time from an acknowledgement (RFC 6298, 2).
func (w *worker) measure(fl *flow, ack uint32) {
	if fl.rttAt == 0 || before(ack, fl.mark) || fl.flags&recovery != 0 {
		return
	}
	r := int32(min(max(w.rttNow()-fl.rttAt, 1), 0x7fff))
	fl.rttAt = 0
	if fl.srtt == 0 {
		fl.srtt, fl.rttvar = uint16(r), uint16(r/2)
		return
	}
	d := int32(fl.srtt) - r
	fl.rttvar = uint16((3*int32(fl.rttvar) + max(d, -d)) / 4)
	fl.srtt = uint16(max((7*int32(fl.srtt)+r)/8, 1))
}

// startRTO starts the retransmission timer anew.
func (w *worker) startRTO(i int32) {
	fl := w.table.at(i)
	rto := firstRTO
	if fl.srtt > 0 {
		rto = max(minRTO, (int64(fl.srtt)+4*int64(fl.rttvar))<<rttShift)
	}
	rto = min(rto<<min(fl.backoff, 10), maxRTO)
	fl.rtxDue = max(w.tick+ticks(rto), 1)
	w.timer0(i, fl.rtxDue)
}

// timer0 has the flow's timer go off at a tick or before it.
func (w *worker) timer0(i int32, tick uint32) {
	if f := w.table.at(i); f.place&timerLevel == 0 || int32(tick-f.timerTick) < 0 {
		w.wheel.set(i, tick)
	}
}

// grow opens the congestion window (RFC 5681, 3.1; RFC 6582 in recovery).
func (w *worker) grow(b *frame.Batch, i int32, acked uint32) {
	fl := w.table.at(i)
	mss := uint32(fl.mss)
	if fl.flags&recovery != 0 {
		if !before(fl.sndUna, fl.mark) {
			fl.flags &^= recovery
			fl.cwnd = max(uint32(fl.ssthresh)*mss, 2*mss)
			return
		}
		w.retransmit(b, i) // a partial acknowledgement: the next hole
		return
	}
	switch {
	case fl.cwnd >= max(mostCwnd, mostSegments*mss):
	case fl.cwnd < uint32(fl.ssthresh)*mss:
		fl.cwnd += acked
	default:
		fl.cwnd += max(uint32(uint64(mss)*uint64(acked)/uint64(fl.cwnd)), 1)
	}
}

// duplicateACK counts acknowledgements that say nothing new: the third is a
// sign of loss (RFC 5681, 3.2).
func (w *worker) duplicateACK(b *frame.Batch, i int32, s *segment, wnd uint32) {
	fl := w.table.at(i)
	if s.len > 0 || s.flags&(tcpSYN|tcpFIN) != 0 || wnd != fl.sndWnd || fl.sndUna == fl.sndNxt {
		if wnd > 0 && fl.sndWnd == 0 && fl.sndUna != fl.sndMax {
			fl.backoff = 0 // what it closed its window over may be sent again soon
			w.startRTO(i)
		}
		if wnd > fl.sndWnd && fl.flags&readable != 0 {
			fl.backoff = 0
			w.ready(i)
		}
		return
	}
	if fl.count(dupAckOne, dupAckAll) != 3 || fl.flags&recovery != 0 {
		return
	}
	w.lost(fl)
	fl.cwnd = max(uint32(fl.ssthresh)*uint32(fl.mss), 2*uint32(fl.mss))
	fl.flags |= recovery
	fl.mark = fl.sndMax
	w.retransmit(b, i)
}

// lost halves what may be under way.
func (w *worker) lost(fl *flow) {
	half := (fl.sndMax - fl.sndUna) / 2 / uint32(fl.mss)
	fl.ssthresh = uint16(min(max(half, 2), 0xffff))
	fl.rttAt = 0 // Karn: what is sent again is not timed
}

// retransmit sends the first segment that is not acknowledged again.
func (w *worker) retransmit(b *frame.Batch, i int32) {
	fl := w.table.at(i)
	w.discard(fl)
	if fl.flags&hostFin != 0 && fl.sndUna+1 == fl.sndMax {
		w.emit(b, fl, fl.sndUna, tcpFIN|tcpACK)
		w.stats.Retransmits++
		return
	}
	f := b.Reply()
	if f == nil {
		return
	}
	n := min(int(fl.sndMax-fl.sndUna), int(fl.mss), shortRead)
	buf := b.Alloc(n)
	if buf == nil {
		b.Undo()
		return
	}
	if fl.flags&peekOff != 0 {
		setInt(fl.fd, unix.SOL_SOCKET, unix.SO_PEEK_OFF, 0)
	}
	w.msg.Name, w.msg.Namelen, w.msg.Control = nil, 0, nil
	w.msg.SetControllen(0)
	w.msg.Iov = &w.iovs[0]
	w.msg.SetIovlen(1)
	setIov(&w.iovs[0], buf)
	got, errno := recvmsg(fl.fd, &w.msg, unix.MSG_PEEK)
	if errno == 0 && before(fl.sndNxt, fl.sndUna+uint32(got)) {
		fl.sndNxt = fl.sndUna + uint32(got) // it had been taken back: see notDelivered
	}
	w.seek(fl)
	if errno != 0 || got <= 0 {
		b.Undo()
		b.TrimAlloc(n)
		return
	}
	w.tcpHeader(f, fl, fl.sndUna, tcpACK|tcpPSH, 0, got)
	f.Tail = append(b.Segs(1), buf[:got])
	w.stats.Retransmits++
}

// tcpTimer is called when a connection's timer has gone off.
func (w *worker) tcpTimer(b *frame.Batch, i int32) {
	fl := w.table.at(i)
	if fl.flags&ackNow != 0 {
		w.touch(i)
	}
	if fl.flags&retry != 0 {
		fl.flags &^= retry
		w.ready(i)
	}
	if fl.state == stateEstablished && fl.sndUna == fl.sndMax {
		w.discard(fl)
	}
	quiet := uint32(w.seen()-fl.seen) << seenShift
	switch fl.state {
	case stateTimeWait:
		w.drop(i)
		return
	case stateConnecting:
		if quiet >= ticks(int64(w.net.conf.Timeouts.Opening)) {
			w.abort(i)
			return
		}
	case stateSynSent, stateSynAckSent:
		if fl.rtxDue != 0 && int32(fl.rtxDue-w.tick) <= 0 {
			if fl.backoff++; fl.backoff > maxSYN {
				w.abort(i)
				return
			}
			w.sendSYN(b, i)
		}
	case stateEstablished:
		if fl.rtxDue != 0 && int32(fl.rtxDue-w.tick) <= 0 && !w.rtxTimeout(b, i) {
			return
		}
		if !w.idle(b, i, quiet) {
			return
		}
	}
	next := w.tick + quietTicks
	if fl.rtxDue != 0 && int32(fl.rtxDue-next) < 0 {
		next = fl.rtxDue
	}
	w.wheel.set(i, next)
}

// rtxTimeout is called when the guest has not acknowledged in time. It reports
// false if that ends the connection.
func (w *worker) rtxTimeout(b *frame.Batch, i int32) bool {
	fl := w.table.at(i)
	if fl.sndUna == fl.sndMax && (fl.sndWnd != 0 || fl.flags&readable == 0) {
		fl.rtxDue = 0
		return true
	}
	if fl.backoff++; fl.backoff > maxBackoff && fl.sndUna != fl.sndMax && !w.probed(fl) {
		w.emit(b, fl, fl.sndNxt, tcpRST|tcpACK)
		w.abort(i)
		return false
	}
	if fl.sndUna == fl.sndMax {
		// The window is closed: a segment from before it makes the guest tell
		// its state.
		w.emit(b, fl, fl.sndUna-1, tcpACK)
		w.startRTO(i)
		return true
	}
	w.lost(fl)
	fl.cwnd = uint32(fl.mss)
	fl.flags = fl.flags&^dupAckAll | recovery
	fl.mark = fl.sndMax
	w.retransmit(b, i)
	w.startRTO(i)
	return true
}

// probed says whether the guest has closed its window over what is under way and
// still answers: it may do so for as long as it likes (RFC 9293, 3.8.6.1).
func (w *worker) probed(fl *flow) bool {
	if fl.sndWnd != 0 || int64(w.seen()-fl.seen)<<(tickShift+seenShift) > 3*maxRTO {
		return false
	}
	fl.backoff = maxBackoff
	return true
}

// idle looks after a connection that is silent. It reports false if that ended
// it.
func (w *worker) idle(b *frame.Batch, i int32, quiet uint32) bool {
	fl := w.table.at(i)
	limit := w.net.conf.Timeouts.Established
	if fl.flags&(guestFin|hostFin) != 0 {
		limit = w.net.conf.Timeouts.Closing
	}
	if quiet >= quietTicks/2 && fl.flags&keepalive == 0 && fl.fd >= 0 {
		// The host's kernel finds out whether its peer is still there.
		setInt(fl.fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
		fl.flags |= keepalive
	}
	end := ticks(int64(limit))
	switch {
	case quiet < end:
		return true
	case fl.flags&(guestFin|hostFin) != guestFin|hostFin && quiet < end+probesMax*probeTicks:
		w.emit(b, fl, fl.sndUna-1, tcpACK) // is it still there?
		return true
	}
	w.emit(b, fl, fl.sndNxt, tcpRST|tcpACK)
	w.abort(i)
	return false
}
