package vhostuser

import (
	"sidewire/engine/frame"
	"sidewire/vhostuser/virtq"
)

const (
	// reserveMax bounds the buffers of a reservation.
	reserveMax = 192
	// reserveFeatures is what a guest must take so that frames can stay as
	// they were received, in any number of buffers.
	reserveFeatures = featMrgRxbuf | featGuestCSUM | featGuestTSO4
)

// Reserver lends a device's rx buffers to receive frames into, so that they
// need not be copied. A frame lies in buffers that follow each other, from the
// start of one on; their first frame.VnetHdrMrgLen+frame.HeadSize bytes stay
// free for what is in private memory until the frame's fate is known: Push
// writes that and shows the guest the buffers. RxAt and RxBufs of the frame
// say which they are.
//
// The guest can read what is received at once. It must be known before to be
// this guest's.
//
// A Reserver belongs to the only worker that pushes to the device, and a
// reservation ends in the turn that it was made in.
type Reserver struct {
	d *Device
	r *rxRing // of the reservation under way, if any

	// q's buffers, borrowed until the reservation ends. rx.mu guards q.
	q     *virtq.Queue
	ring  *ring
	bufs  [reserveMax][]byte
	heads [reserveMax]lent
	n     int // popped
	done  int // of these, put
}

// Reserver returns the device's.
func (d *Device) Reserver() *Reserver {
	x := &Reserver{d: d}
	for _, p := range d.pairs {
		p.rx.reserved = x
	}
	return x
}

// Reserve adds to the reservation until there are up to most bytes behind its
// first skip buffers, and returns all its buffers. It returns nil if there are
// less than least, if the guest cannot take frames as they come, or if there
// are several rings to choose from.
func (x *Reserver) Reserve(skip, least, most int) [][]byte {
	if x.r == nil {
		set := *x.d.rxSet.Load()
		if len(set) != 1 {
			return nil
		}
		x.r = set[0]
	}
	x.r.mu.Lock()
	defer x.r.mu.Unlock()
	if !x.begin() {
		return nil
	}
	have := 0
	for _, b := range x.bufs[min(skip, x.n):x.n] {
		have += len(b)
	}
	for have < most && x.n < reserveMax {
		n := x.pop()
		if n == 0 {
			break
		}
		have += n
	}
	if have < least {
		return nil
	}
	return x.bufs[:x.n]
}

// begin says whether the ring serves for the reservation.
func (x *Reserver) begin() bool {
	r := x.r
	if r.q == nil || r.feats&reserveFeatures != reserveFeatures || r.q.Logged() {
		return false
	}
	if x.q == nil {
		x.q, x.ring, x.n, x.done = r.q, r.ring, 0, 0
	}
	r.begin()
	return x.q == r.q
}

// pop takes one more buffer and returns its length, or 0 if there is none that
// serves. What is wrong with the next one is for the ordinary way to find.
func (x *Reserver) pop() int {
	c, status := x.q.Pop(virtq.Writable, x.bufs[x.n:x.n:x.n+1])
	if status == virtq.Bad || status == virtq.OK && c.Len < frame.VnetHdrMrgLen {
		x.q.Rewind(1)
		return 0
	}
	if status != virtq.OK {
		return 0
	}
	x.heads[x.n] = lent{c.Head, c.Len}
	x.n++
	return c.Len
}

// Keep says that frames lie in the first n buffers of the reservation, and
// takes back the others: the guest does not notice.
func (x *Reserver) Keep(n int) {
	if x.r == nil {
		return
	}
	x.r.mu.Lock()
	defer x.r.mu.Unlock()
	if x.q != nil && x.n > n {
		x.q.Rewind(x.n - n)
		clear(x.bufs[n:x.n])
		x.n = n
	}
	if n == 0 {
		x.q, x.r = nil, nil
	}
}

// Free ends the reservation. The buffers of frames that were not delivered go
// back to the guest unused.
func (x *Reserver) Free() {
	r, n := x.r, x.n
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	q := x.q
	x.q, x.r, x.n = nil, nil, 0
	clear(x.bufs[:n])
	if q == nil || x.done == n {
		return
	}
	x.giveBack(q, n)
	q.Publish()
	if q.NeedsNotify() {
		x.ring.call.signal()
	}
}

// giveBack returns the buffers before the n-th that were not put yet.
func (x *Reserver) giveBack(q *virtq.Queue, n int) {
	for ; x.done < n; x.done++ {
		q.Put(x.heads[x.done].head, 0)
	}
}

// commit delivers a frame that was received into the ring's buffers. It
// reports false, with nothing done, for one that must be copied after all.
func (r *rxRing) commit(f *frame.Frame) bool {
	x := r.reserved
	from, end := int(f.RxAt), int(f.RxAt)+int(f.RxBufs)
	if x == nil || x.q == nil || x.q != r.q || from < x.done || end > x.n || !r.takesAsIs(f) {
		return false
	}
	// A stage may have cut off what lies behind the packet, and with it whole
	// buffers. They go back when the next frame's go, or in Free.
	need, room, to := frame.VnetHdrMrgLen+int(f.Len), 0, from
	for ; to < end && room < need; to++ {
		room += x.heads[to].len
	}
	if need > room {
		return false
	}
	var hdr [frame.VnetHdrMrgLen]byte
	f.Offload.Encode(hdr[:])
	native.PutUint16(hdr[frame.VnetHdrLen:], uint16(to-from))
	w := writer{segs: x.bufs[from:to]}
	w.write(hdr[:])
	w.write(f.Head[:f.HeadLen])
	x.giveBack(x.q, from)
	for _, h := range x.heads[from:to] {
		n := min(h.len, need)
		x.q.Put(h.head, uint32(n))
		need -= n
	}
	x.done = to
	r.dirty = true
	r.frames++
	r.bytes += uint64(f.Len)
	r.direct++
	return true
}
