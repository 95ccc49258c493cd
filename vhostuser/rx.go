package vhostuser

import (
	"encoding/binary"
	"sync"
	"sync/atomic"

	"sidewire/engine/frame"
	"sidewire/vhostuser/virtq"
)

const (
	// rxSegs is the room for the buffers of one frame: the longest chain.
	rxSegs = virtq.MaxSegs
	// rxHeads bounds how many mergeable buffers one frame may need; 64 KiB
	// take 44 of the usual size.
	rxHeads = 256
	// legalBuffer is the smallest buffer that a driver without MRG_RXBUF may
	// post, without the header (virtio 1.2, 5.1.6.3.1).
	legalBuffer = 1514
)

// rxRing delivers to the guest. Any worker may use it.
type rxRing struct {
	pair *Pair

	// mu guards all below; workers hold it for one batch, the control plane
	// for an assignment, and neither waits for anything meanwhile.
	mu      sync.Mutex
	q       *virtq.Queue // nil while the ring is stopped, disabled or broken
	ring    *ring
	hdr     int
	feats   uint64
	onEmpty bool
	poll    bool // there is no kick descriptor

	// popped counts what was popped from the ring and not taken back, of all
	// queues that it had.
	popped        uint64
	run           [frame.BatchSize]virtq.Buf
	running       int      // how many of run are taken and not put
	runSpares     int      // how many of these, the first ones, were spares
	filled        int      // how many of these hold a frame
	segs          [][]byte // room for one frame's buffers
	used          int      // how much of it is taken
	heads         [rxHeads]lent
	n             int              // chains taken and not yet put
	nSpares       int              // of these, the first ones, which were spares
	dirty         bool             // something was put and not yet published
	fresh         bool             // the queue has not been used yet
	empty         bool             // the guest had no buffer at all in this batch
	frames, bytes uint64           // delivered and not yet counted
	direct        uint64           // of the frames, how many lay there already
	seg           *frame.Segmenter // made when a frame first needs it

	reserved atomic.Pointer[Reserver] // nil if nobody receives into the ring's buffers
}

// lent is a chain that was taken.
type lent struct {
	head uint16
	len  int
}

// rxSet is the rx rings that may be used. It is never changed, only replaced.
type rxSet []*rxRing

// pushMax is how many frames Push groups at a time: one bit each.
const pushMax = 64

// Push delivers frames to the guest, spread over the enabled queues by
// Frame.Queue. It is safe for concurrent use.
func (d *Device) Push(_ int, fs []*frame.Frame) {
	set := *d.rxSet.Load()
	if len(set) == 0 {
		for _, f := range fs {
			f.Drop(frame.QueueStopped)
		}
		d.rxDrops[frame.QueueStopped].Add(uint64(len(fs)))
		return
	}
	if len(set) == 1 {
		set[0].push(fs)
		return
	}
	for len(fs) > pushMax {
		set.push(fs[:pushMax])
		fs = fs[pushMax:]
	}
	set.push(fs)
}

// push groups frames by ring, in order, and takes each ring's lock once.
func (set rxSet) push(fs []*frame.Frame) {
	var group [pushMax]*frame.Frame
	n := uint32(len(set))
	for left := uint64(1)<<len(fs) - 1; left != 0; {
		k, which := 0, -1
		for i, f := range fs {
			if left&(1<<i) == 0 {
				continue
			}
			r := int(uint32(f.Queue) % n)
			if which < 0 {
				which = r
			}
			if r == which {
				group[k] = f
				k++
				left &^= 1 << i
			}
		}
		set[which].push(group[:k])
	}
}

// push delivers frames to this ring.
func (r *rxRing) push(fs []*frame.Frame) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.q == nil {
		for _, f := range fs {
			r.drop(f, frame.QueueStopped)
		}
		return
	}
	defer r.settle()
	r.begin()
	for len(fs) > 0 {
		if r.empty && fs[0].RxBufs == 0 {
			r.drop(fs[0], frame.NoBuffer) // to look again for each would cost more than to deliver it
			fs = fs[1:]
			continue
		}
		n := r.deliverRun(fs)
		if n < len(fs) {
			if f := fs[n]; f.RxBufs == 0 || !r.commit(f) {
				r.deliver(f)
			}
			n++
		}
		fs = fs[n:]
	}
}

// deliverRun gives the guest frames as they are, in one buffer each, until one
// wants something else. It returns how many it gave.
func (r *rxRing) deliverRun(fs []*frame.Frame) (n int) {
	for n < len(fs) && n < len(r.run) && fs[n].RxBufs == 0 && r.takesAsIs(fs[n]) {
		n++
	}
	if n == 0 {
		return 0
	}
	run := r.takeRun(n)
	hdr := r.hdr
	for i := range run {
		buf, f := &run[i], fs[i]
		need := hdr + int(f.Len)
		if need > len(buf.B) {
			break
		}
		b := buf.B[:need]
		if f.Flags|f.GSO == 0 {
			binary.LittleEndian.PutUint64(b, 0)
			if hdr == frame.VnetHdrMrgLen {
				binary.LittleEndian.PutUint32(b[8:], 1<<16) // num_buffers is 1
			} else {
				binary.LittleEndian.PutUint16(b[8:], 0)
			}
		} else {
			f.Offload.Encode(b[:hdr])
		}
		at := hdr + copy(b[hdr:], f.Head[:f.HeadLen])
		for _, t := range f.Tail {
			at += copy(b[at:], t)
		}
		buf.N = uint32(need)
		r.bytes += uint64(f.Len)
		r.filled = i + 1
	}
	return r.endRun()
}

// takeRun takes up to n buffers for a run.
func (r *rxRing) takeRun(n int) []virtq.Buf {
	k := 0
	if x := r.reserved.Load(); x != nil {
		k = x.takeSpares(r.run[:n])
	}
	r.running, r.runSpares, r.filled = k, k, 0
	m := r.q.PopRun(virtq.Writable, r.run[k:n])
	r.popped += uint64(m)
	r.running += m
	return r.run[:r.running]
}

// endRun puts the buffers of a run that hold a frame and takes the others back.
// It returns how many it put. A fault in a sender's memory may have ended the
// run.
func (r *rxRing) endRun() (n int) {
	n, running, spares := r.filled, r.running, r.runSpares
	r.running, r.runSpares, r.filled = 0, 0, 0 // a fault in the ring must not do it twice
	if n < spares {
		r.reserved.Load().spares += spares - n
	}
	if back := running - max(n, spares); back > 0 {
		r.q.Rewind(back)
		r.popped -= uint64(back)
	}
	if n > 0 {
		r.q.PutRun(r.run[:n])
		r.frames += uint64(n)
		r.dirty = true
	}
	return n
}

// takesAsIs says whether the guest takes a frame without anything being done
// to it.
func (r *rxRing) takesAsIs(f *frame.Frame) bool {
	if f.Flags|f.GSO == 0 {
		return true
	}
	return takes(r.feats, f.GSO)
}

// begin is called before the queue is used.
func (r *rxRing) begin() {
	r.empty = false
	if r.fresh {
		r.fresh = false
		r.q.DisableNotify() // buffers are looked for when frames come
	}
}

// settle ends a batch: it takes back what a fault in the sender's memory left
// half done, publishes, and interrupts the guest if it wants that.
func (r *rxRing) settle() {
	r.endRun()
	r.rewind()
	if r.dirty {
		r.publish()
	}
	if err := r.q.Err(); err != nil {
		r.pair.dev.breakRing(r.ring, err)
		r.q = nil
	}
}

// publish shows the guest what was put.
func (r *rxRing) publish() {
	r.dirty = false
	r.pair.count.rxFrames.Add(r.frames)
	r.pair.count.rxBytes.Add(r.bytes)
	r.pair.count.rxDirect.Add(r.direct)
	r.frames, r.bytes, r.direct = 0, 0, 0
	r.q.Publish()
	if r.q.NeedsNotify() || r.onEmpty && !r.q.Holds(1) {
		r.ring.call.signal()
		r.pair.count.interrupts.Add(1)
	}
}

// deliver gives the guest one frame in the form that it can take.
func (r *rxRing) deliver(f *frame.Frame) {
	if f.GSO != frame.GSONone && !takes(r.feats, f.GSO) {
		r.segment(f)
		return
	}
	if r.feats&featGuestCSUM == 0 {
		if f.Flags&frame.NeedsCsum != 0 {
			f.CompleteChecksum()
		}
		f.Flags &^= frame.DataValid
	}
	if reason := r.write(f); reason != frame.ReasonNone {
		r.drop(f, reason)
	}
}

// Takes reports whether the guest takes frames of a GSO type whole, or for
// frame.GSONone, with a partial checksum. Push mends others. It is cheap, and
// false while no rx ring runs.
func (d *Device) Takes(gso uint8) bool { return takes(d.takes.Load(), gso) }

// takes is Takes for a guest with these features.
func takes(feats uint64, gso uint8) bool {
	need := uint64(featGuestCSUM)
	switch gso &^ frame.GSOECN {
	case frame.GSONone:
	case frame.GSOTCPv4:
		need |= featGuestTSO4
	case frame.GSOTCPv6:
		need |= featGuestTSO6
	case frame.GSOUDPL4:
		need |= featGuestUSO4 | featGuestUSO6
	default:
		return false
	}
	if gso&frame.GSOECN != 0 {
		need |= featGuestECN
	}
	return feats&need == need
}

// segment delivers a GSO frame in pieces. What does not fit is lost as on any
// full link; the frame counts as dropped only if nothing of it went through.
func (r *rxRing) segment(f *frame.Frame) {
	if r.seg == nil {
		r.seg = new(frame.Segmenter)
	}
	r.seg.Partial = r.feats&featGuestCSUM != 0
	if !r.seg.Start(f) {
		r.drop(f, frame.BadOffload)
		return
	}
	sent, last := 0, frame.ReasonNone
	for s := r.seg.Next(); s != nil; s = r.seg.Next() {
		if reason := r.write(s); reason != frame.ReasonNone {
			last = reason
			r.pair.count.drop(reason)
			continue
		}
		sent++
	}
	if sent == 0 && last != frame.ReasonNone {
		f.Drop(last)
	}
}

// write copies a frame into the guest's buffers. If it returns a reason, the
// guest has got nothing of the frame.
func (r *rxRing) write(f *frame.Frame) frame.DropReason {
	if r.q.Err() != nil { // it broke in this batch
		return frame.QueueStopped
	}
	need := r.hdr + int(f.Len)
	mergeable := r.feats&featMrgRxbuf != 0
	for got := 0; got < need; {
		if got > 0 && !mergeable {
			// One buffer is all there is. A legal one waits for a frame that
			// fits; another would block the ring for ever.
			if got < r.hdr+legalBuffer {
				r.giveBack()
				return frame.NoBuffer
			}
			r.rewind()
			return frame.OversizeFrame
		}
		n, reason := r.pop()
		if reason != frame.ReasonNone {
			return reason
		}
		if got == 0 && n < r.hdr {
			r.giveBack() // the header must lie in the first buffer
			return frame.NoBuffer
		}
		got += n
	}
	r.fill(f, need)
	r.frames++
	r.bytes += uint64(f.Len)
	return frame.ReasonNone
}

// pop takes one more buffer for the frame in hand and returns its length. The
// spares come first.
func (r *rxRing) pop() (int, frame.DropReason) {
	if r.n == rxHeads {
		r.giveBack()
		return 0, frame.NoBuffer
	}
	if x := r.reserved.Load(); x != nil && x.spares > 0 {
		var buf [1]virtq.Buf
		x.takeSpares(buf[:])
		r.segs[r.used] = buf[0].B
		r.heads[r.n] = lent{buf[0].Head, len(buf[0].B)}
		r.n++
		r.nSpares++
		r.used++
		return len(buf[0].B), frame.ReasonNone
	}
	c, status := r.q.Pop(virtq.Writable, r.segs[r.used:r.used:len(r.segs)])
	switch status {
	case virtq.OK:
		r.heads[r.n] = lent{c.Head, c.Len}
		r.n++
		r.popped++
		r.used += len(c.Segs)
		return c.Len, frame.ReasonNone
	case virtq.Bad:
		r.heads[r.n] = lent{c.Head, 0}
		r.n++
		r.popped++
		r.giveBack()
		r.pair.dev.badChains[r.q.LastCause()].Add(1)
		return 0, frame.BadDescriptor
	case virtq.NoRoom:
		// A single chain always fits, so these are many scattered ones.
		r.giveBack()
		return 0, frame.NoBuffer
	case virtq.Broken:
		r.rewind()
		return 0, frame.QueueStopped // settle tells about it
	}
	r.empty = r.n == 0
	r.rewind()
	return 0, frame.NoBuffer
}

// rewind takes back all pops since the last frame.
func (r *rxRing) rewind() {
	if r.nSpares > 0 {
		r.reserved.Load().spares += r.nSpares
	}
	if back := r.n - r.nSpares; back > 0 {
		r.q.Rewind(back)
		r.popped -= uint64(back)
	}
	r.n, r.nSpares, r.used = 0, 0, 0
}

// giveBack returns all pops since the last frame unused: buffers that cannot
// be used as they are must not stay at the front of the ring (H063).
func (r *rxRing) giveBack() {
	for _, h := range r.heads[:r.n] {
		r.q.Put(h.head, 0)
	}
	r.n, r.nSpares, r.used, r.dirty = 0, 0, 0, true
}

// fill copies header and frame, need bytes together, to the popped buffers
// and puts these. Nothing is put before everything is copied.
func (r *rxRing) fill(f *frame.Frame, need int) {
	var hdr [frame.VnetHdrMrgLen]byte
	f.Offload.Encode(hdr[:r.hdr])
	if r.hdr == frame.VnetHdrMrgLen {
		native.PutUint16(hdr[frame.VnetHdrLen:], uint16(r.n))
	}
	w := writer{segs: r.segs[:r.used]}
	w.write(hdr[:r.hdr])
	w.write(f.Head[:f.HeadLen])
	for _, t := range f.Tail {
		w.write(t)
	}
	for _, h := range r.heads[:r.n] {
		n := min(h.len, need)
		r.q.Put(h.head, uint32(n))
		need -= n
	}
	r.n, r.nSpares, r.used, r.dirty = 0, 0, 0, true
}

// writer copies to a scatter list, whose end it silently stops at.
type writer struct {
	segs [][]byte
	off  int
}

func (w *writer) write(b []byte) {
	for len(b) > 0 && len(w.segs) > 0 {
		n := copy(w.segs[0][w.off:], b)
		b = b[n:]
		if w.off += n; w.off == len(w.segs[0]) {
			w.segs, w.off = w.segs[1:], 0
		}
	}
}

func (r *rxRing) drop(f *frame.Frame, reason frame.DropReason) {
	f.Drop(reason)
	r.pair.count.drop(reason)
}
