package usernet

import "golang.org/x/sys/unix"

// Where a guest asks and is answered in turns, its requests are acknowledged
// with the answers: an acknowledgement of its own would be a frame and a
// wake-up more, and what the guest does with it would keep others from the
// processor. Senders that wait for an acknowledgement before they send the rest
// of a request (RFC 9293, 3.7.4: Nagle) must not be kept waiting, so it takes
// two requests in a row that came in one piece, or, for a new connection, that
// those of others did.

const (
	// waitTicks is how long an acknowledgement waits for an answer, at most: 8 to
	// 13 ms. RFC 9293, 3.8.6.3, has 500.
	waitTicks = 3
	// manyAnswers is how many requests in a row are answered in turn before new
	// connections are thought to do so, and mostAnswers how many count. One that
	// does not takes wrongGuess off.
	manyAnswers = 16
	mostAnswers = 64
	wrongGuess  = 16
)

// asks notes that the guest has sent something to a connection's socket.
func (w *worker) asks(fl *flow) {
	if fl.flags&asked == 0 {
		fl.flags |= asked
		return
	}
	if fl.flags&answers != 0 {
		w.answered = max(w.answered-wrongGuess, 0)
	}
	fl.flags &^= asked | once | answers
}

// isAnswered notes that the guest is sent something.
func (w *worker) isAnswered(fl *flow) {
	switch {
	case fl.flags&asked == 0:
		return
	case fl.flags&once != 0:
		fl.flags |= answers
	}
	fl.flags = fl.flags&^asked | once
	w.answered = min(w.answered+1, mostAnswers)
}

// guess begins a connection as those before it went.
func (w *worker) guess(fl *flow) {
	if w.answered >= manyAnswers {
		fl.flags |= answers
	}
}

// wait lets an acknowledgement wait for an answer, or the host's FIN.
func (w *worker) wait(i int32) {
	fl := w.table.at(i)
	if fl.flags&patient != 0 {
		return
	}
	fl.flags |= patient
	if len(w.waiting) == 0 {
		w.waitTill = w.tick + waitTicks
	}
	w.waiting = append(w.waiting, flowRef{i, fl.gen})
}

// fewBytes fit into a segment of any connection.
const fewBytes = 512

// sendsAtOnce has a socket send n bytes without waiting for acknowledgements of
// others, if there may be others: the guest has done Nagle's work already.
func (w *worker) sendsAtOnce(fl *flow, n int) {
	if fl.flags&spoke == 0 && n <= fewBytes {
		fl.flags |= spoke
		return
	}
	setInt(fl.fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	fl.flags |= spoke | noDelay
}

// atEnd says whether the host has sent all that it will, and all of it is under
// way to the guest or there. It asks the kernel where that costs less than to
// look.
func (w *worker) atEnd(fl *flow) bool {
	flight := fl.sndNxt - fl.base
	if fl.flags&(hangup|urgent|peekOff|hostFin) != hangup || flight == 0 {
		return false
	}
	n, errno := queued(fl.fd)
	return errno == 0 && n == int(flight)
}

// freshTicks is for how long new sockets are taken to be like one that was
// looked at.
const freshTicks = uint32(1e9 >> tickShift)

// firstWindow is openWindow for a connection's SYN: sockets that have sent
// nothing yet all take about the same.
func (w *worker) firstWindow(fl *flow) {
	if w.fresh != 0 && w.tick-w.freshAt < freshTicks && fl.rcvEdge == fl.rcvNxt {
		fl.rcvEdge += min(w.fresh, 0xffff<<fl.oscale())
		return
	}
	w.openWindow(fl)
	w.fresh, w.freshAt = fl.rcvEdge-fl.rcvNxt, w.tick
}
