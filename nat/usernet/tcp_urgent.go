package usernet

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// seeUrgent finds the place of urgent data in what a socket holds. Few
// connections have any, so it is kept beside the flow.
func (w *worker) seeUrgent(i int32) {
	fl := w.table.at(i)
	w.discard(fl)
	// Without SO_OOBINLINE the kernel counts what is before the mark; with it,
	// the urgent byte stays in its place in the stream.
	setInt(fl.fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 0)
	n, errno := queued(fl.fd)
	setInt(fl.fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)
	mark := fl.base + uint32(n)
	if errno != 0 || before(mark, fl.sndNxt) {
		return // the guest has it already, as data
	}
	w.mark(i, mark)
	fl.flags |= readable
	w.ready(i)
}

// mark notes the place of an urgent byte.
func (w *worker) mark(i int32, at uint32) {
	if w.marks == nil {
		w.marks = map[int32]uint32{}
	}
	w.marks[i] = at
	w.table.at(i).flags |= urgent
}

// toMark keeps a segment from reaching over an urgent byte, which goes by
// itself.
func (w *worker) toMark(i int32, limit int) int {
	n := int(w.marks[i] - w.table.at(i).sndNxt)
	if n == 0 {
		n = 1
	}
	return min(limit, n)
}

// markUrgent makes a segment with the urgent byte say so: the pointer is behind
// it (RFC 6093, 3.1).
func (w *worker) markUrgent(f *frame.Frame, i int32, seq uint32) {
	if w.marks[i] != seq {
		return
	}
	delete(w.marks, i)
	w.table.at(i).flags &^= urgent
	h := f.Head[l4:]
	h[13] |= tcpURG
	binary.BigEndian.PutUint16(h[18:], 1)
}
