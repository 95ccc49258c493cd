package vhostuser

import (
	"sync"
	"sync/atomic"
	"time"

	"sidewire/engine/frame"
	"sidewire/vhostuser/virtq"
)

// Watcher lets a worker sleep until something happens to a pair. Watch lets
// an event on fd end the sleep once (edge-triggered, fd is never read),
// Unwatch undoes it, Wake ends the sleep at once. All three are called from
// the control plane.
type Watcher interface {
	Watch(fd int) error
	Unwatch(fd int)
	Wake()
}

// Pair is a queue pair of a device: a source of the frames that the guest
// sends. Pull, Release, Arm and Disarm belong to one worker; SetWatcher may be
// called at any time.
type Pair struct {
	dev   *Device
	index uint16
	snap  int // how much of a frame is private at least
	tx    atomic.Pointer[txState]
	rx    rxRing

	// The worker's own: what was popped and not yet put.
	cur   *txState
	bufs  [frame.BatchSize]virtq.Buf
	n     int
	bytes int
	// heavy says that the last batch was a big one, and since when the worker
	// lets frames wait for more, 0 while it does not.
	heavy bool
	since int64

	mu      sync.Mutex // guards watcher and watched
	watcher Watcher
	watched [2]int // the kick descriptors of rx, if that has a Reserver, and tx; -1 for none

	count counters
}

// txState is what a worker needs of a tx ring. It is never changed, only
// replaced; its queue is used by the pair's worker alone.
type txState struct {
	q       *virtq.Queue
	ring    *ring
	hdr     int    // length of the virtio_net_hdr
	feats   uint64 // negotiated
	max     int    // longest frame without GSO
	enabled bool
	onEmpty bool // NOTIFY_ON_EMPTY
	poll    bool // there is no kick descriptor: the frontend leaves it to us to look
}

// Pull adds the frames that wait in the tx ring to an empty batch. Frames of a
// disabled ring are taken and lost, as the specification says.
func (p *Pair) Pull(b *frame.Batch) int {
	st := p.tx.Load()
	p.cur, p.n, p.bytes = st, 0, 0
	if st == nil || p.heavy && p.hold(st, b) {
		return 0
	}
	for p.n < len(p.bufs) {
		// Each may want a place in the batch's scatter lists, of which scattered
		// chains can have taken all.
		n := st.q.PopRun(virtq.Readable, p.bufs[p.n:p.n+min(len(p.bufs)-p.n, b.SegsLeft())])
		if n > 0 {
			p.n += n
			p.run(st, b, p.bufs[p.n-n:p.n])
		}
		if st.q.Drained() || n == 0 && !p.pop(st, b) {
			break
		}
	}
	n := b.Len()
	p.heavy = p.n >= heavyFrames
	if n > 0 {
		p.count.txFrames.Add(uint64(n))
		p.count.txBytes.Add(uint64(p.bytes))
	} else if p.n > 0 {
		p.Release(b)
	}
	return n
}

// Under load, frames are left in the ring until there are enough of them for
// the cost of a batch, ours and the guest's, to vanish among them, or for a
// moment. When load ends, one moment is lost to it.
const (
	heavyFrames = 32
	holdFrames  = 96
	holdTime    = int64(15 * time.Microsecond)
)

// hold says whether to let frames wait for more.
func (p *Pair) hold(st *txState, b *frame.Batch) bool {
	if st.q.Holds(max(1, min(holdFrames, st.q.Size()*3/4))) || p.since != 0 && b.Now-p.since >= holdTime {
		p.since = 0
		return false
	}
	if p.since == 0 {
		p.since = b.Now
	}
	b.Waiting = true
	return true
}

// pop takes one chain and reports whether to go on.
func (p *Pair) pop(st *txState, b *frame.Batch) bool {
	room := b.SegsLeft()
	segs := b.Segs(room)
	c, status := st.q.Pop(virtq.Readable, segs)
	b.TrimSegs(room - len(c.Segs))
	switch status {
	case virtq.Empty, virtq.NoRoom:
		return false
	case virtq.Broken:
		p.dev.breakRing(st.ring, st.q.Err())
		return false
	}
	p.bufs[p.n] = virtq.Buf{Head: c.Head}
	p.n++
	switch {
	case status == virtq.Bad:
		p.count.drop(frame.BadDescriptor)
		p.dev.badChains[st.q.LastCause()].Add(1)
	case !st.enabled:
		p.count.drop(frame.QueueStopped)
		b.TrimSegs(len(c.Segs))
	default:
		p.add(st, b, &c)
	}
	return true
}

// run makes frames of chains of one buffer each.
func (p *Pair) run(st *txState, b *frame.Batch, bufs []virtq.Buf) {
	if !st.enabled {
		p.count.drops[frame.QueueStopped].Add(uint64(len(bufs)))
		return
	}
	for i := range bufs {
		buf := bufs[i].B
		n := len(buf) - st.hdr
		switch {
		case n < frame.EthernetLen:
			p.count.drop(frame.ShortFrame)
			continue
		case n > frame.MaxLen:
			p.count.drop(frame.OversizeFrame)
			continue
		}
		f := b.Next()
		f.Offload.Decode(buf)
		data := buf[st.hdr:]
		f.Len, f.Queue, f.Token = int32(n), p.index, uint32(bufs[i].Head)
		snap := p.snap
		if f.Flags|f.GSO != 0 || n <= wholeMax {
			snap = frame.HeadSize
		}
		if n <= snap {
			f.HeadLen = uint16(copy(f.Head[:], data))
		} else {
			f.HeadLen = uint16(copy(f.Head[:snap], data))
			f.Tail = append(b.Segs(1), data[snap:])
		}
		if f.Flags|f.GSO != 0 || n > st.max {
			if r := st.check(f); r != frame.ReasonNone {
				p.count.drop(r)
				b.TrimSegs(min(len(f.Tail), 1))
				b.Undo()
				continue
			}
		}
		p.bytes += n
	}
}

// wholeMax is the length up to which a frame is private as a whole: to copy a
// part of it would save nothing.
const wholeMax = 64

// add makes a frame of a chain, or counts why not.
func (p *Pair) add(st *txState, b *frame.Batch, c *virtq.Chain) {
	n := c.Len - st.hdr
	switch {
	case n < frame.EthernetLen:
		p.count.drop(frame.ShortFrame)
		b.TrimSegs(len(c.Segs))
		return
	case n > frame.MaxLen:
		p.count.drop(frame.OversizeFrame)
		b.TrimSegs(len(c.Segs))
		return
	}
	f := b.Next()
	var hdr [frame.VnetHdrMrgLen]byte
	segs := take(hdr[:st.hdr], c.Segs)
	f.Offload.Decode(hdr[:])
	f.Len = int32(n)
	snap := p.snap
	if f.Flags|f.GSO != 0 || n <= wholeMax {
		snap = frame.HeadSize
	}
	f.HeadLen = uint16(min(n, snap))
	f.Tail = take(f.Head[:f.HeadLen], segs)
	f.Queue, f.Token = p.index, uint32(c.Head)
	if r := st.check(f); r != frame.ReasonNone {
		p.count.drop(r)
		b.Undo()
		b.TrimSegs(len(c.Segs))
		return
	}
	p.bytes += n
}

// take fills b from the front of segs, which hold at least as much, and
// returns the rest of them.
func take(b []byte, segs [][]byte) [][]byte {
	for len(b) > 0 {
		n := copy(b, segs[0])
		b = b[n:]
		if n == len(segs[0]) {
			segs = segs[1:]
		} else {
			segs[0] = segs[0][n:]
		}
	}
	return segs
}

// check refuses what the guest may not send (H070 to H074).
func (st *txState) check(f *frame.Frame) frame.DropReason {
	f.Flags &^= frame.DataValid // meaningless from a driver
	if !f.CheckOffload() || f.Flags&frame.NeedsCsum != 0 && st.feats&featCSUM == 0 {
		return frame.BadOffload
	}
	if f.GSO == frame.GSONone {
		if int(f.Len) > st.max {
			return frame.OversizeFrame
		}
		return frame.ReasonNone
	}
	var need uint64
	switch f.GSOType() {
	case frame.GSOTCPv4:
		need = featHostTSO4
	case frame.GSOTCPv6:
		need = featHostTSO6
	case frame.GSOUDPL4:
		need = featHostUSO
	}
	if f.GSO&frame.GSOECN != 0 {
		need |= featHostECN
	}
	if st.feats&need != need {
		return frame.BadOffload
	}
	return frame.ReasonNone
}

// Release gives the buffers of the last Pull back to the guest.
func (p *Pair) Release(*frame.Batch) {
	st, n := p.cur, p.n
	p.n = 0
	if st == nil || n == 0 {
		return
	}
	if st.q.Logged() {
		for i := range p.bufs[:n] {
			st.q.Put(p.bufs[i].Head, 0)
		}
	} else {
		st.q.PutRun(p.bufs[:n])
	}
	st.q.Publish()
	if st.q.NeedsNotify() || st.onEmpty && !st.q.Holds(1) {
		st.ring.call.signal()
		p.count.interrupts.Add(1)
	}
}

// Arm asks the guest for kicks and reports whether frames wait already.
func (p *Pair) Arm() (more bool) {
	p.rx.rest()
	st := p.tx.Load()
	return st != nil && (st.poll || st.q.EnableNotify())
}

// Disarm tells the guest that kicks are not needed.
func (p *Pair) Disarm() {
	if st := p.tx.Load(); st != nil {
		st.q.DisableNotify()
	}
}

// SetWatcher says which worker to wake for the pair; nil for none. It replaces
// the one before.
func (p *Pair) SetWatcher(w Watcher) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, fd := range p.watched {
		if p.watcher != nil && fd >= 0 {
			p.watcher.Unwatch(fd)
		}
	}
	p.watcher = w
	if w == nil {
		return
	}
	for _, fd := range p.watched {
		if fd < 0 {
			continue
		}
		if err := w.Watch(fd); err != nil {
			p.dev.log.Error("kick descriptor cannot be watched", "pair", p.index, "err", err)
		}
	}
	w.Wake()
}

// watch lets the worker be woken by the kick descriptor fd of the pair's rx (0)
// or tx (1) ring, which must be unwatched before it is closed. It replaces the
// one before.
func (p *Pair) watch(ring, fd int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	old := &p.watched[ring]
	if p.watcher != nil {
		if *old >= 0 {
			p.watcher.Unwatch(*old)
		}
		if fd >= 0 {
			if err := p.watcher.Watch(fd); err != nil {
				*old = -1
				return err
			}
		}
	}
	*old = fd
	return nil
}

// wake makes the worker look at the ring.
func (p *Pair) wake() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.watcher != nil {
		p.watcher.Wake()
	}
}
