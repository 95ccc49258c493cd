package engine

import (
	"sync/atomic"
	"time"

	"sidewire/engine/frame"
)

// stormLimit bounds a rate: a frame costs cost nanoseconds, of which burst may
// be owed. A cost of 0 is no limit.
type stormLimit struct{ cost, burst int64 }

// minBurst is how many frames a port may flood at once at least.
const minBurst = 64

func newStormLimit(perSecond int) stormLimit {
	if perSecond < 0 {
		return stormLimit{}
	}
	if perSecond == 0 {
		perSecond = defaultStorm
	}
	cost := max(int64(time.Second)/int64(perSecond), 1)
	return stormLimit{cost: cost, burst: cost * int64(max(perSecond/10, minBurst))}
}

// bucket is until when what was let through is paid for, in nanoseconds. It is
// safe for concurrent use.
type bucket struct{ paid atomic.Int64 }

// take says whether one more may pass now.
func (b *bucket) take(l stormLimit, now int64) bool {
	if l.cost == 0 {
		return true
	}
	for {
		old := b.paid.Load()
		paid := max(old, now-l.burst) + l.cost
		if paid > now {
			return false
		}
		if b.paid.CompareAndSwap(old, paid) {
			return true
		}
	}
}

// flood is the port that gives each frame to all members of a switch but the
// one that it came from.
type flood struct {
	sw      *Switch
	workers []*floodWork
}

// floodWork is a worker's room to put frames aside.
type floodWork struct {
	list [frame.BatchMax]*frame.Frame
	vlan [frame.BatchMax]uint16      // noVLAN: for nobody
	kept [frame.BatchMax]frame.Frame // before a member changed it
	lent [frame.BatchMax]uint16      // which frames the member had in hand
}

// noVLAN is no VLAN's number.
const noVLAN = 0xffff

func newFlood(s *Switch, workers int) *flood {
	fl := &flood{sw: s}
	for range workers {
		fl.workers = append(fl.workers, new(floodWork))
	}
	return fl
}

// Push delivers frames to every member but the one that each came from, in
// order, in one Push for each member. What a member does to a frame is undone
// before the next one gets it, and who cannot take it does not keep it from
// the others: that loss is counted at the member, not at the sender.
func (fl *flood) Push(worker int, fs []*frame.Frame) {
	for len(fs) > frame.BatchMax {
		fl.push(worker, fs[:frame.BatchMax])
		fs = fs[frame.BatchMax:]
	}
	fl.push(worker, fs)
}

func (fl *flood) push(worker int, fs []*frame.Frame) {
	w := fl.workers[worker]
	v := fl.sw.view.Load()
	for i, f := range fs {
		f.RxAt, f.RxBufs = 0, 0 // it is not for the owner of those alone
		w.vlan[i] = noVLAN
		if in := v.member(f.In); in != nil {
			w.vlan[i], _ = in.classify(f)
		}
		w.kept[i] = *f // all that a member may change but the bytes of Tail
	}
	l := fl.sw.e.layout.Load()
	for _, m := range v.members {
		if int(m.id) >= len(l.ports) || l.ports[m.id] == nil {
			continue
		}
		list, lent := w.choose(m, l.ports[m.id].counters[worker], fs)
		if len(list) > 0 {
			l.ports[m.id].port.Push(worker, list)
			l.ports[m.id].countPush(worker, list)
		}
		for _, i := range lent {
			*fs[i] = w.kept[i]
		}
	}
}

// choose lists the frames that a member gets, in the form that it gets them,
// and the numbers of those that may be changed by now.
func (w *floodWork) choose(m *member, c *counters, fs []*frame.Frame) (list []*frame.Frame, lent []uint16) {
	list, lent = w.list[:0], w.lent[:0]
	for i, f := range fs {
		if f.In == m.id || w.vlan[i] == noVLAN || !m.members.has(w.vlan[i]) {
			continue
		}
		if !m.fits(f) {
			add(&c.drops[frame.OversizeFrame], 1)
			continue
		}
		lent = append(lent, uint16(i))
		if r := m.retag(f, w.vlan[i], nil); r != frame.ReasonNone {
			add(&c.drops[r], 1)
			continue
		}
		if m.steer != nil {
			f.Queue = m.steer.queue(flowHash(f))
		}
		list = append(list, f)
	}
	return list, lent
}

// countPush books what became of frames that were given to one port of many.
func (pe *portEntry) countPush(worker int, fs []*frame.Frame) {
	c := pe.counters[worker]
	var frames, bytes uint64
	for _, f := range fs {
		if f.Out == frame.Drop {
			add(&c.drops[f.Reason], 1)
			continue
		}
		frames++
		bytes += uint64(f.Len)
	}
	add(&c.outFrames, frames)
	add(&c.outBytes, bytes)
}
