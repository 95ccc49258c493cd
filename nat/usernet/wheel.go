package usernet

import "math/bits"

const (
	// tickShift makes ticks of nanoseconds: 4.2 ms each.
	tickShift  = 22
	wheelBits  = 6
	wheelSlots = 1 << wheelBits
	// wheelLevels cover 64^5 ticks: 52 days.
	wheelLevels = 5
)

// ticks is how many ticks some nanoseconds are, rounded up.
func ticks(ns int64) uint32 { return uint32((ns + 1<<tickShift - 1) >> tickShift) }

// wheel is a hierarchical timer wheel of flows: to start, to stop and to fire
// a timer costs the same however many there are.
type wheel struct {
	t     *table
	now   uint32 // the tick up to which everything has fired
	slots [wheelLevels][wheelSlots]int32
	used  [wheelLevels]uint64 // which slots hold something
}

func (w *wheel) init(t *table, now uint32) {
	w.t, w.now = t, now
	for l := range w.slots {
		for s := range w.slots[l] {
			w.slots[l][s] = none
		}
	}
}

// set starts the flow's timer, or moves it to an earlier or later tick.
func (w *wheel) set(i int32, tick uint32) {
	f := w.t.at(i)
	if int32(tick-w.now) < 1 {
		tick = w.now + 1
	}
	if f.place&timerLevel != 0 {
		if f.timerTick == tick {
			return
		}
		w.stop(i)
	}
	w.put(i, f, tick)
}

func (w *wheel) put(i int32, f *flow, tick uint32) {
	d := tick - w.now
	l := 0
	if d >= wheelSlots {
		l = min((bits.Len32(d)-1)/wheelBits, wheelLevels-1)
	}
	s := tick >> (l * wheelBits) % wheelSlots
	f.timerTick, f.place = tick, f.place|place(l+1)
	f.timerPrev, f.timerNext = none, w.slots[l][s]
	if f.timerNext != none {
		w.t.at(f.timerNext).timerPrev = i
	}
	w.slots[l][s] = i
	w.used[l] |= 1 << s
}

// stop stops the flow's timer, if it runs.
func (w *wheel) stop(i int32) {
	f := w.t.at(i)
	if f.place&timerLevel == 0 {
		return
	}
	l := int(f.place&timerLevel) - 1
	s := f.timerTick >> (l * wheelBits) % wheelSlots
	if f.timerPrev != none {
		w.t.at(f.timerPrev).timerNext = f.timerNext
	} else if w.slots[l][s] = f.timerNext; f.timerNext == none {
		w.used[l] &^= 1 << s
	}
	if f.timerNext != none {
		w.t.at(f.timerNext).timerPrev = f.timerPrev
	}
	f.place &^= timerLevel
}

// due lets time pass and returns a flow whose timer has gone off, which stops
// it, or none. It is called until there is none.
func (w *wheel) due(now uint32) int32 {
	for {
		if i := w.slots[0][w.now%wheelSlots]; i != none && int32(w.t.at(i).timerTick-w.now) <= 0 {
			w.stop(i)
			return i
		}
		if int32(now-w.now) <= 0 {
			return none
		}
		next, ok := w.next()
		if !ok || int32(next-now) > 0 {
			w.now = now
			return none
		}
		w.now = next
		// Slots whose time has come are spread over the levels below, from the
		// top, so that what is due at once ends in the lowest.
		for l := wheelLevels - 1; l > 0; l-- {
			if next&(1<<(l*wheelBits)-1) == 0 {
				w.spread(l, int(next>>(l*wheelBits)%wheelSlots))
			}
		}
	}
}

// spread moves what is in a slot to the levels below.
func (w *wheel) spread(l, s int) {
	i := w.slots[l][s]
	w.slots[l][s] = none
	w.used[l] &^= 1 << s
	for i != none {
		f := w.t.at(i)
		next := f.timerNext
		f.place &^= timerLevel
		w.put(i, f, f.timerTick)
		i = next
	}
}

// next is the tick at which there is something to do, if there is any.
func (w *wheel) next() (tick uint32, ok bool) {
	var best uint32
	for l := range wheelLevels {
		if w.used[l] == 0 {
			continue
		}
		at := w.now >> (l * wheelBits)
		// The slot of the present itself comes round last.
		turn := bits.RotateLeft64(w.used[l], -int((at+1)%wheelSlots))
		d := uint32(bits.TrailingZeros64(turn)) + 1
		if t := (at + d) << (l * wheelBits); !ok || int32(t-best) < 0 {
			best, ok = t, true
		}
	}
	return best, ok
}
