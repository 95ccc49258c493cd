package vhostuser

import (
	"sidewire/engine/frame"
	"sidewire/vhostuser/virtq"
)

// Receiving straight into a guest's rx buffers.
//
// A Reserver pops buffers from its pair's rx ring before anybody knows what
// will lie in them (Reserve), takes those back that nothing came for (Keep),
// puts the others when their frames come by Push (commit), and takes back what
// is left of them in the end (Free). Meanwhile others push to the ring: they
// pop and put behind the reservation.
//
// Buffers that were popped last go back into the ring as if nothing had been.
// Others have pops behind them and cannot. They become spares: whoever needs
// buffers next, be it Push or Reserve, takes the spares first, so the guest
// misses nothing that it has posted. There are never more than reserveMax, as
// nobody pops while there are spares.
//
// To return them unused would be simpler, but a Linux guest counts an error for
// each (rx_length_errors). That happens only to those that are left when the
// pair's worker goes to sleep or the ring stops, for two reasons:
//
//   - GET_VRING_BASE answers with one index, behind which everything is the
//     guest's and before which everything was used.
//   - A frontend whose backend dies begins again at the used index, which is
//     right as long as buffers are used in their order. So nothing should be
//     out of it for long.

const (
	// reserveMax bounds the buffers of a reservation, and the spares.
	reserveMax = 192
	// reserveFeatures is what a guest must take so that frames can stay as
	// they were received, in any number of buffers.
	reserveFeatures = featMrgRxbuf | featGuestCSUM | featGuestTSO4
)

// Reserver lends the rx buffers of a queue pair to receive frames into, so that
// they need not be copied. A frame lies in buffers that follow each other, from
// the start of one on, with RxAt and RxBufs to say which they are, and its
// Queue is the pair. The first frame.VnetHdrMrgLen+HeadLen bytes stay free:
// Push writes the header and the frame's Head there, and shows the guest the
// buffers. What follows is the frame's Tail. A frame of which this is not true
// any more when it is pushed, or which goes elsewhere, is copied like any other.
//
// The guest can read what is received at once. It must be known before to be
// this guest's.
//
// A Reserver belongs to one worker at a time, while others may push to the same
// ring. A reservation ends, by Keep(0) or Free, in the turn that it was made in,
// also if that turn fails.
type Reserver struct {
	r   *rxRing
	any bool // see AnyQueue

	// The owner's own.
	short bool   // see Short
	armed bool   // the guest was asked for kicks
	seen  uint64 // what the guest had posted when there was too little, as rxRing.popped counts

	// r.mu guards all below. First the reservation under way: buffers of q,
	// borrowed until it ends.
	q    *virtq.Queue // nil if there is none
	ring *ring
	bufs [reserveMax][]byte
	held [reserveMax]held
	n    int // popped
	done int // of these, up to the last that was put

	spare  [reserveMax]virtq.Buf // the oldest is the last one
	spares int
}

// held is a buffer of a reservation.
type held struct {
	nr   uint64 // rxRing.popped after its pop, 0 if it was a spare
	head uint16
	put  bool
}

// Reserver returns the one Reserver of a queue pair, and makes it at the first
// call. From then on the pair's worker is woken by kicks for the rx ring too,
// for which Arm asks, and whenever the answers of Reserve may have changed for
// another reason.
func (d *Device) Reserver(pair int) *Reserver {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := d.pairs[pair]
	if x := p.rx.reserved.Load(); x != nil {
		return x
	}
	x := &Reserver{r: &p.rx}
	p.rx.reserved.Store(x)
	if r := d.rings[2*pair]; r.q != nil && !d.isCtrl(r) {
		d.watchKick(r)
	}
	return x
}

// AnyQueue lets the frames carry any Queue. Buffers are lent only while all
// queues lead to the Reserver's ring. It is called before the first Reserve.
func (x *Reserver) AnyQueue() *Reserver {
	x.any = true
	return x
}

// Reserve adds to the reservation until there are up to most bytes behind its
// first skip buffers, and returns all its buffers. It returns nil if there are
// less than least, which Short tells from all else: that the guest cannot take
// frames as they come, that its buffers are of a kind that only Push knows how
// to fill, or that frames for the pair do not go to its ring at present.
//
// least should be as little as is of use. A guest that has some buffers posted
// need not post more before these are used.
func (x *Reserver) Reserve(skip, least, most int) [][]byte {
	x.short = false
	if !x.leads() {
		return nil
	}
	r := x.r
	r.mu.Lock()
	defer r.mu.Unlock()
	if !x.begin() {
		return nil
	}
	have := 0
	for _, b := range x.bufs[min(skip, x.n):x.n] {
		have += len(b)
	}
	for have < most {
		n := x.popRun(most - have)
		if n == 0 {
			n = x.pop()
		}
		if n == 0 {
			break
		}
		have += n
	}
	if have < least {
		return nil
	}
	x.short = false
	return x.bufs[:x.n]
}

// Short says that the last Reserve returned nil for nothing but a lack of
// buffers, so that it makes sense to wait for more with Arm.
func (x *Reserver) Short() bool { return x.short }

// leads says whether frames for the pair go to its ring.
func (x *Reserver) leads() bool {
	set := *x.r.pair.dev.rxSet.Load()
	if x.any {
		return len(set) == 1 && set[0] == x.r
	}
	return len(set) > 0 && set[int(x.r.pair.index)%len(set)] == x.r
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

// popRun takes as many buffers as are likely to hold want bytes, and returns
// their length. It stops at what is for pop to deal with.
func (x *Reserver) popRun(want int) (length int) {
	r := x.r
	if x.spares > 0 || x.n == 0 {
		return 0
	}
	size := len(x.bufs[x.n-1]) // most are of one size
	n := x.q.PopRun(virtq.Writable, r.run[:min((want+size-1)/size, reserveMax-x.n, len(r.run))])
	for i := range n {
		b := &r.run[i]
		if len(b.B) < frame.VnetHdrMrgLen {
			x.q.Rewind(n - i)
			break
		}
		r.popped++
		x.bufs[x.n], x.held[x.n] = b.B, held{nr: r.popped, head: b.Head}
		x.n++
		length += len(b.B)
	}
	return length
}

// pop takes one more buffer and returns its length, or 0 if there is none that
// serves. What is wrong with the next one is for the ordinary way to find.
func (x *Reserver) pop() int {
	r := x.r
	if x.n == reserveMax {
		x.short, x.seen = true, 0 // in the next turn there may be enough at once
		return 0
	}
	if x.spares > 0 {
		x.spares--
		s := &x.spare[x.spares]
		x.bufs[x.n], x.held[x.n] = s.B, held{head: s.Head}
		x.n++
		return len(s.B)
	}
	c, status := x.q.Pop(virtq.Writable, x.bufs[x.n:x.n:x.n+1])
	if status == virtq.Bad || status == virtq.OK && c.Len < frame.VnetHdrMrgLen {
		x.q.Rewind(1)
		return 0
	}
	if status != virtq.OK {
		if status == virtq.Empty {
			x.short, x.seen = true, r.popped
		}
		return 0
	}
	r.popped++
	x.held[x.n] = held{nr: r.popped, head: c.Head}
	x.n++
	return c.Len
}

// Keep says that frames lie in the first n buffers of the reservation, and
// takes back the others: the guest does not notice. Keep(0) ends it.
func (x *Reserver) Keep(n int) {
	x.r.mu.Lock()
	defer x.r.mu.Unlock()
	if x.q == nil {
		return
	}
	q := x.q
	if n == 0 {
		x.q = nil
	}
	x.takeBack(q, n)
}

// Free ends the reservation and takes back the buffers of frames that were not
// delivered.
func (x *Reserver) Free() {
	x.r.mu.Lock()
	defer x.r.mu.Unlock()
	if q := x.q; q != nil {
		x.q = nil
		x.takeBack(q, 0)
	}
}

// takeBack removes the buffers from the n-th on from the reservation. Those
// that were not put go back into the ring, become spares, or, if the ring stops
// just now, return to the guest unused.
func (x *Reserver) takeBack(q *virtq.Queue, n int) {
	r, back, end := x.r, 0, x.n
	for ; x.n > n; x.n-- {
		if h := &x.held[x.n-1]; h.put || h.nr != r.popped {
			break
		}
		r.popped--
		back++
	}
	if back > 0 {
		q.Rewind(back)
	}
	returned := false
	for ; x.n > n; x.n-- {
		switch h := &x.held[x.n-1]; {
		case h.put:
		case q == r.q && x.spares < reserveMax:
			x.spare[x.spares] = virtq.Buf{B: x.bufs[x.n-1], Head: h.head}
			x.spares++
		default:
			q.Put(h.head, 0)
			returned = true
		}
	}
	x.done = min(x.done, n)
	if n < end {
		clear(x.bufs[n:end])
	}
	if returned {
		x.tell(q, x.ring)
	}
}

// tell shows the guest what was put.
func (x *Reserver) tell(q *virtq.Queue, g *ring) {
	q.Publish()
	if q.NeedsNotify() {
		g.call.signal()
		x.r.pair.count.interrupts.Add(1)
	}
}

// commit delivers a frame that was received into the ring's buffers. It
// reports false, with nothing done, for one that must be copied after all.
func (r *rxRing) commit(f *frame.Frame) bool {
	x := r.reserved.Load()
	from, end := int(f.RxAt), int(f.RxAt)+int(f.RxBufs)
	if x == nil || x.q == nil || x.q != r.q || from < x.done || end > x.n || !x.lies(f, from, end) || !r.takesAsIs(f) {
		return false
	}
	// A stage may have cut off what lies behind the packet, and with it whole
	// buffers. They are taken back in the end.
	need, room, to := frame.VnetHdrMrgLen+int(f.Len), 0, from
	for ; to < end && room < need; to++ {
		room += len(x.bufs[to])
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
	for i := from; i < to; i++ {
		n := min(len(x.bufs[i]), need)
		x.q.Put(x.held[i].head, uint32(n))
		x.held[i].put = true
		need -= n
	}
	x.done = to
	r.dirty = true
	r.frames++
	r.bytes += uint64(f.Len)
	r.direct++
	return true
}

// lies says whether the frame lies in these buffers of the reservation, with
// its Tail where it will be behind header and Head. It may be another
// Reserver's.
func (x *Reserver) lies(f *frame.Frame, from, end int) bool {
	if len(f.Tail) == 0 {
		return x.any || f.Queue == x.r.pair.index
	}
	at, off := from, frame.VnetHdrMrgLen+int(f.HeadLen)
	for ; at < end && off >= len(x.bufs[at]); at++ {
		off -= len(x.bufs[at])
	}
	return at < end && len(f.Tail[0]) > 0 && &f.Tail[0][0] == &x.bufs[at][off]
}

// takeSpares moves spares to bufs, the oldest first, and returns how many.
// They stay where they are until others are added, so that spares+=k undoes
// the last k.
func (x *Reserver) takeSpares(bufs []virtq.Buf) (n int) {
	for ; n < len(bufs) && x.spares > 0; n++ {
		x.spares--
		bufs[n] = x.spare[x.spares]
	}
	return n
}

// returnSpares gives the guest the spares unused; q is where they came from.
func (x *Reserver) returnSpares(q *virtq.Queue, g *ring) {
	n := x.spares
	if n == 0 {
		return
	}
	x.spares = 0 // whatever happens
	for i := n - 1; i >= 0; i-- {
		q.Put(x.spare[i].Head, 0)
	}
	clear(x.spare[:n])
	x.tell(q, g)
}

// rest is called before the pair's worker sleeps.
func (r *rxRing) rest() {
	x := r.reserved.Load()
	if x == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.q != nil {
		x.returnSpares(r.q, r.ring)
	}
}

// handBack returns to the guest what was popped from a ring that no worker has
// in hand any more, and not put: spares, and a reservation whose turn failed.
func (r *ring) handBack() {
	if r.pair == nil || r.isTx() {
		return
	}
	x := r.pair.rx.reserved.Load()
	if x == nil || !x.has(r.q) {
		return
	}
	// Guest memory is written, and whoever stops the ring may not survive a
	// fault in it.
	done := make(chan struct{})
	frame.Go(func() {
		defer close(done)
		defer r.dev.surviveLoss()
		x.end(r.q, r)
	})
	<-done
}

// has says whether buffers of the queue are out.
func (x *Reserver) has(q *virtq.Queue) bool {
	x.r.mu.Lock()
	defer x.r.mu.Unlock()
	return x.spares > 0 || x.q == q
}

func (x *Reserver) end(q *virtq.Queue, g *ring) {
	x.r.mu.Lock()
	defer x.r.mu.Unlock()
	if x.q == q {
		x.q = nil
		x.takeBack(q, 0)
	}
	x.returnSpares(q, g)
}

// surviveLoss passes over memory that is gone when a ring stops anyway.
func (d *Device) surviveLoss() {
	if r := recover(); r != nil {
		if addr, ok := frame.FaultAddr(r); !ok || !d.owns(addr) {
			panic(r)
		}
		d.faults.Add(1)
	}
}

// Arm asks the guest for a kick when it posts more buffers, and reports whether
// it has posted some since Reserve found too few, or since the last Arm that
// reported so. The worker calls it before it sleeps, while it has something for
// the guest that found no room, by Reserve or by Push (frame.NoBuffer); if Arm
// reports more, it tries again instead. An idle guest whose ring is full makes
// it report more once at most, and kicks nobody.
func (x *Reserver) Arm() (more bool) {
	r := x.r
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.q == nil {
		return false // the worker is woken when the ring starts
	}
	if r.poll {
		return true // nobody will kick
	}
	defer r.settle()
	r.begin()
	x.armed = true
	// The guest is to kick for what comes behind all that waits. So that is
	// popped, and settle takes it back.
	more = !r.popWaiting() || r.q.EnableNotify() || r.popped != x.seen
	x.seen = r.popped
	return more
}

// popWaiting pops all that waits in the ring, for rewind to take back. It
// reports false if the ring breaks, which the next try finds stopped.
func (r *rxRing) popWaiting() bool {
	for r.n < r.q.Size() {
		_, status := r.q.Pop(virtq.Writable, r.segs[:0:len(r.segs)])
		if status != virtq.OK && status != virtq.Bad {
			return status == virtq.Empty
		}
		r.n++
		r.popped++
	}
	return true
}

// Disarm tells the guest that kicks are not needed any more.
func (x *Reserver) Disarm() {
	if !x.armed {
		return
	}
	x.armed = false
	x.r.mu.Lock()
	defer x.r.mu.Unlock()
	if x.r.q != nil {
		x.r.q.DisableNotify()
	}
}
