package usernet

import "sidewire/engine/frame"

// line is a queue of flows' places: a ring that grows.
type line struct {
	ring []int32 // as long as a power of two, or nil
	head uint32
	len  int
}

const shortLine = 16

func (l *line) at(k int) *int32 { return &l.ring[(l.head+uint32(k))&uint32(len(l.ring)-1)] }

// push puts a place at the end.
func (l *line) push(i int32) {
	l.grow()
	*l.at(l.len) = i
	l.len++
}

func (l *line) first() int32 { return *l.at(0) }

// pop takes the first, of which there is one.
func (l *line) pop() {
	l.head++
	l.len--
}

// unpop puts a place before all others.
func (l *line) unpop(i int32) {
	l.grow()
	l.head--
	l.len++
	*l.at(0) = i
}

func (l *line) grow() {
	if l.len < len(l.ring) {
		return
	}
	ring := make([]int32, max(2*len(l.ring), shortLine))
	for k := range l.len {
		ring[k] = *l.at(k)
	}
	l.ring, l.head = ring, 0
}

// ready puts a flow at the end of those that may have something for the guest.
func (w *worker) ready(i int32) {
	f := w.table.at(i)
	if f.place&isReady != 0 {
		return
	}
	w.blocked = false
	f.place |= isReady
	w.eager++
	if f.place&inLine == 0 { // else one that was here before has left its place
		f.place |= inLine
		w.line.push(i)
	}
}

// unready takes a flow out of those. What it leaves in the line counts for
// nothing.
func (w *worker) unready(i int32) {
	if f := w.table.at(i); f.place&isReady != 0 {
		f.place &^= isReady
		w.eager--
	}
}

// pump lets the flows that may have something for the guest bring it, each as
// much as is fair, while the batch has room.
func (w *worker) pump(b *frame.Batch) {
	w.blocked, w.brought = false, 0
	waiting := true
	for more := true; more && w.line.len > 0; {
		if b.Len() >= frame.BatchSize || w.brought >= batchBytes {
			waiting = false
			break
		}
		i := w.line.first() // it stays there if the guest's memory ends this turn
		f := w.table.at(i)
		if f.place&isReady == 0 {
			f.place &^= inLine
			w.line.pop()
			continue
		}
		var verdict pumped
		had := b.Len()
		switch f.proto {
		case frame.ProtoTCP:
			verdict = w.tcpPump(b, i)
		case frame.ProtoUDP:
			verdict = w.udpPump(b, i)
		default:
			verdict = w.echoPump(b, i)
		}
		switch {
		case verdict == pumpLater, verdict == pumpAgain && b.Len() == had:
			more, waiting = false, false
			continue
		case verdict == pumpAgain:
			// Behind all others, so that each has its turn.
			w.line.push(i)
			waiting = false
		case verdict == pumpWait: // for the guest's buffers; it keeps its place
			w.kept = append(w.kept, i)
		case verdict == pumpGone: // the flow is no more
			f.place &^= inLine
		default:
			f.place &^= inLine
			w.unready(i)
		}
		w.line.pop()
	}
	for k := len(w.kept) - 1; k >= 0; k-- {
		w.line.unpop(w.kept[k])
	}
	w.kept = w.kept[:0]
	w.blocked = waiting
}

// pumped is what a flow's turn to bring something came to.
type pumped uint8

const (
	pumpDone  pumped = iota // there is no more for now; an event will tell
	pumpAgain               // there may be more
	pumpLater               // there is more, but the batch has no room left
	pumpWait                // there is more, but the guest has no buffers
	pumpGone                // the flow has ended
)
