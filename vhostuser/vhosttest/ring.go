package vhosttest

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"time"
)

// Flags of a descriptor and of the two rings (virtio 1.2, 2.7).
const (
	DescNext     = 1
	DescWrite    = 2
	DescIndirect = 4

	noInterrupt = 1
	noNotify    = 1

	descLen = 16
)

// Buf is one buffer of a chain.
type Buf struct {
	GPA   uint64
	Len   uint32
	Write bool // for the device to write
}

// Ring is the driver's side of a virtqueue. It belongs to one goroutine at a
// time.
//
// The driver's bookkeeping is its own: nothing but used ids, lengths and
// events is read back from the memory. The methods that begin with Raw write
// to the memory without any bookkeeping.
type Ring struct {
	Index             int    // its number in messages
	Size              int    // descriptors
	Desc, Avail, Used uint64 // guest addresses of its parts; of a packed ring also its descriptors and the two event words
	Kick, Call, Err   int    // eventfds, -1 for none

	packed   *packedRing // nil for a split ring
	eventIdx bool
	mask     uint16
	mem      *Memory
	desc     []byte
	avail    []byte
	used     []byte

	availWord  *atomic.Uint32 // flags and index, ours
	usedWord   *atomic.Uint32 // flags and index, the device's
	usedEvent  *atomic.Uint32 // ours; the upper half is padding
	availEvent *atomic.Uint32 // the device's; the upper half is padding

	flags     uint16 // of the avail ring
	idx       uint16 // the next avail entry
	published uint16 // what the device was last told
	lastUsed  uint16 // the next used entry
	free      []uint16
	next      []uint16 // how chains in flight are linked
	chain     []uint16 // descriptors of the chain at this head, 0 if not in flight
}

// ringBytes is the memory that a ring takes.
func ringBytes(size int) int {
	return 3*pageSize + descLen*size + 6 + 2*size + 6 + 8*size
}

// NewRing lays a split ring out in m, without eventfds.
func NewRing(m *Memory, index, size int, eventIdx bool) (*Ring, error) {
	if size < 2 || size > 1<<15 || size&(size-1) != 0 {
		return nil, fmt.Errorf("ring of %d descriptors", size)
	}
	r := &Ring{Index: index, Size: size, Kick: -1, Call: -1, Err: -1, eventIdx: eventIdx, mask: uint16(size - 1), mem: m}
	var err error
	alloc := func(n int) (gpa uint64, b []byte) {
		// Two bytes more, so that the event fields are halves of whole words.
		if gpa, err = m.Alloc(n+2, pageSize); err != nil {
			return 0, nil
		}
		return gpa, m.At(gpa, n+2)
	}
	if r.Desc, r.desc = alloc(descLen * size); err == nil {
		r.Avail, r.avail = alloc(6 + 2*size)
	}
	if err == nil {
		r.Used, r.used = alloc(6 + 8*size)
	}
	if err != nil {
		return nil, err
	}
	r.availWord, r.usedEvent = word(r.avail, 0), word(r.avail, 4+2*size)
	r.usedWord, r.availEvent = word(r.used, 0), word(r.used, 4+8*size)
	r.free, r.next, r.chain = make([]uint16, 0, size), make([]uint16, size), make([]uint16, size)
	r.Reset()
	return r, nil
}

// Reset makes the ring as a driver that starts finds it: empty.
func (r *Ring) Reset() {
	clear(r.chain)
	if r.packed != nil {
		r.resetPacked(place{0, 1})
	} else {
		clear(r.desc)
		for i := range r.Size {
			r.RawAvail(i, 0)
		}
		r.availWord.Store(0)
		r.usedEvent.Store(0)
		r.usedWord.Store(0)
		r.availEvent.Store(0)
	}
	r.flags, r.idx, r.published, r.lastUsed = 0, 0, 0, 0
	r.free = r.free[:0]
	for i := r.Size - 1; i >= 0; i-- {
		r.free = append(r.free, uint16(i))
	}
}

// StartAt makes the indices of an empty ring begin at base, so that a test
// need not wait for them to wrap.
func (r *Ring) StartAt(base uint16) {
	r.Reset()
	r.idx, r.published, r.lastUsed = base, base, base
	if r.packed != nil {
		r.resetPacked(r.placeOf(base))
		return
	}
	r.availWord.Store(uint32(base) << 16)
	r.usedWord.Store(uint32(base) << 16)
	r.usedEvent.Store(uint32(base))
	r.availEvent.Store(uint32(base))
}

// Addr is what SetVringAddr is told.
func (r *Ring) Addr() Addr {
	return Addr{Desc: r.mem.ToUser(r.Desc), Avail: r.mem.ToUser(r.Avail), Used: r.mem.ToUser(r.Used), Log: r.Used}
}

// Free is how many descriptors are free.
func (r *Ring) Free() int {
	if r.packed != nil {
		return r.packed.room
	}
	return len(r.free)
}

// InFlight is how many descriptors the device has.
func (r *Ring) InFlight() int { return r.Size - r.Free() }

// AvailIdx is the index behind the last entry published.
func (r *Ring) AvailIdx() uint16 { return r.published }

// UsedIdx is the device's index in the used ring. Of a packed ring it is how
// many chains were used, which the owner of the ring alone may ask.
func (r *Ring) UsedIdx() uint16 {
	if r.packed != nil {
		_, idx := r.usedEnd()
		return idx
	}
	return uint16(r.usedWord.Load() >> 16)
}

// Base is what SetVringBase is told for a ring that goes on where its used
// elements end, as QEMU knows it of split rings.
func (r *Ring) Base() uint32 {
	if r.packed != nil {
		at, _ := r.usedEnd()
		return at.value() | at.value()<<16
	}
	return uint32(r.UsedIdx())
}

// RawDesc writes a descriptor. Of a packed ring it is the i-th of the chain that
// RawPost stages, at most one behind those written before; it has no next.
func (r *Ring) RawDesc(i int, gpa uint64, n uint32, flags, next uint16) {
	if p := r.packed; p != nil {
		p.raw = append(p.raw[:min(i, len(p.raw))], rawDesc{gpa, n, flags})
		return
	}
	putDesc(r.desc[i*descLen:], gpa, n, flags, next)
}

func putDesc(b []byte, gpa uint64, n uint32, flags, next uint16) {
	_ = b[descLen-1]
	binary.LittleEndian.PutUint64(b, gpa)
	binary.LittleEndian.PutUint32(b[8:], n)
	binary.LittleEndian.PutUint16(b[12:], flags)
	binary.LittleEndian.PutUint16(b[14:], next)
}

// Table writes an indirect table at a guest address and returns the length of
// it. Each of the descriptors but the last links to the next.
func (r *Ring) Table(gpa uint64, bufs ...Buf) Buf {
	n := len(bufs) * descLen
	t := r.mem.At(gpa, n)
	for i, b := range bufs {
		flags, next := b.flags(), uint16(0)
		if r.packed != nil { // without links, and with flags in the other place
			putDesc(t[i*descLen:], b.GPA, b.Len, 0, flags)
			continue
		}
		if i < len(bufs)-1 {
			flags, next = flags|DescNext, uint16(i+1)
		}
		putDesc(t[i*descLen:], b.GPA, b.Len, flags, next)
	}
	return Buf{GPA: gpa, Len: uint32(n)}
}

func (b Buf) flags() uint16 {
	if b.Write {
		return DescWrite
	}
	return 0
}

// RawAvail writes an entry of the avail ring.
func (r *Ring) RawAvail(slot int, head uint16) {
	binary.LittleEndian.PutUint16(r.avail[4+2*(slot&int(r.mask)):], head)
}

// RawAvailIdx publishes an avail index.
func (r *Ring) RawAvailIdx(idx uint16) { r.availWord.Store(uint32(r.flags) | uint32(idx)<<16) }

// RawAvailFlags writes the flags of the avail ring.
func (r *Ring) RawAvailFlags(flags uint16) {
	r.flags = flags
	r.RawAvailIdx(r.published)
}

// RawUsedEvent writes the index at which an interrupt is wanted.
func (r *Ring) RawUsedEvent(idx uint16) { r.usedEvent.Store(uint32(idx)) }

// RawUsed reads an entry of the used ring.
func (r *Ring) RawUsed(slot int) (id, n uint32) {
	e := r.used[4+8*(slot&int(r.mask)):]
	return binary.LittleEndian.Uint32(e), binary.LittleEndian.Uint32(e[4:])
}

// RawPost stages a head, whatever it is. What comes back for it is taken by
// RawReap.
func (r *Ring) RawPost(head uint16) {
	if r.packed != nil {
		r.rawPostPacked(head)
		return
	}
	r.RawAvail(int(r.idx), head)
	r.idx++
}

// RawReap takes the next used element as it is.
func (r *Ring) RawReap() (id, n uint32, ok bool) {
	if r.packed != nil {
		return r.rawReapPacked()
	}
	if r.UsedIdx() == r.lastUsed {
		return 0, 0, false
	}
	id, n = r.RawUsed(int(r.lastUsed))
	r.lastUsed++
	return id, n, true
}

// Post makes a chain of the buffers and stages it. It returns the chain's head.
func (r *Ring) Post(bufs ...Buf) (uint16, error) {
	if len(bufs) == 0 || len(bufs) > r.Free() {
		return 0, ErrRingFull
	}
	if r.packed != nil {
		id := r.takeID()
		r.postPacked(id, bufs)
		return id, nil
	}
	top := len(r.free) - len(bufs)
	ids := r.free[top:]
	head := ids[len(ids)-1]
	for i, b := range bufs {
		id, flags, next := ids[len(ids)-1-i], b.flags(), uint16(0)
		if i < len(bufs)-1 {
			next = ids[len(ids)-2-i]
			flags |= DescNext
		}
		r.next[id] = next
		r.RawDesc(int(id), b.GPA, b.Len, flags, next)
	}
	r.stage(head, len(bufs))
	r.free = r.free[:top]
	return head, nil
}

// PostIndirect is Post with the chain in an indirect table at a guest address.
func (r *Ring) PostIndirect(table uint64, bufs ...Buf) (uint16, error) {
	if r.Free() == 0 {
		return 0, ErrRingFull
	}
	head := r.takeID()
	t := r.Table(table, bufs...)
	if r.packed != nil {
		r.putSlot(head, t.GPA, t.Len, DescIndirect)
		r.chain[head] = 1
		r.idx++
		return head, nil
	}
	r.RawDesc(int(head), t.GPA, t.Len, DescIndirect, 0)
	r.stage(head, 1)
	return head, nil
}

// takeID takes a head, or a buffer id, from the free ones.
func (r *Ring) takeID() uint16 {
	id := r.free[len(r.free)-1]
	r.free = r.free[:len(r.free)-1]
	return id
}

func (r *Ring) stage(head uint16, n int) {
	r.chain[head] = uint16(n)
	r.RawAvail(int(r.idx), head)
	r.idx++
}

// Publish shows the device what was staged, and reports whether it wants a
// kick for that.
func (r *Ring) Publish() (kick bool) {
	if r.packed != nil {
		return r.publishPacked()
	}
	if r.published == r.idx {
		return false
	}
	old := r.published
	r.published = r.idx
	// The store and the loads below are sequentially consistent: a device that
	// went to sleep before it saw the index has left its event first.
	r.availWord.Store(uint32(r.flags) | uint32(r.idx)<<16)
	if r.eventIdx {
		event := uint16(r.availEvent.Load())
		return r.idx-event-1 < r.idx-old // virtio 1.2, 2.7.10.1
	}
	return uint16(r.usedWord.Load())&noNotify == 0
}

// Flush is Publish with the kick, if one is wanted.
func (r *Ring) Flush() error {
	if !r.Publish() || r.Kick < 0 {
		return nil
	}
	return signal(r.Kick)
}

// Reap takes the next chain that the device has used and frees its
// descriptors. n is the length that the device says it wrote.
func (r *Ring) Reap() (head uint16, n uint32, ok bool, err error) {
	if r.packed != nil {
		return r.reapPacked()
	}
	idx := r.UsedIdx()
	switch ready := idx - r.lastUsed; {
	case ready == 0:
		return 0, 0, false, nil
	case int(ready) > r.Size:
		return 0, 0, false, fmt.Errorf("%w: ring %d: used index %d, %d expected at most", ErrBackend, r.Index, idx, r.lastUsed+uint16(r.Size))
	}
	id, n := r.RawUsed(int(r.lastUsed))
	if id >= uint32(r.Size) || r.chain[id] == 0 {
		return 0, 0, false, fmt.Errorf("%w: ring %d: used element %d is not in flight", ErrBackend, r.Index, id)
	}
	r.lastUsed++
	head = uint16(id)
	left := r.chain[head]
	r.chain[head] = 0
	for id := head; left > 0; left-- {
		r.free = append(r.free, id)
		id = r.next[id]
	}
	return head, n, true, nil
}

// Arm asks for an interrupt when the device uses the next chain, and reports
// whether it has used one already.
func (r *Ring) Arm() (more bool) {
	if r.packed != nil {
		if r.eventIdx {
			r.setDriverEvent(eventDesc)
		} else {
			r.setDriverEvent(eventEnable)
		}
		return r.usedWaits()
	}
	if r.eventIdx {
		r.usedEvent.Store(uint32(r.lastUsed))
	} else {
		r.flags &^= noInterrupt
		r.availWord.Store(uint32(r.flags) | uint32(r.published)<<16)
	}
	return r.UsedIdx() != r.lastUsed
}

// Disarm asks for no interrupts. With EVENT_IDX there is nothing to do on a
// split ring: an event that has passed asks for none until the index has gone
// round.
func (r *Ring) Disarm() {
	if r.packed != nil {
		r.setDriverEvent(eventDisable)
		return
	}
	if !r.eventIdx {
		r.flags |= noInterrupt
		r.availWord.Store(uint32(r.flags) | uint32(r.published)<<16)
	}
}

// WaitUsed waits until the device has used a chain that was not reaped yet.
func (r *Ring) WaitUsed(d time.Duration) error {
	deadline := time.Now().Add(d)
	for {
		if r.Arm() {
			return nil
		}
		if r.Call < 0 {
			if time.Now().After(deadline) {
				return ErrTimeout
			}
			time.Sleep(20 * time.Microsecond)
			continue
		}
		if err := waitReadable(r.Call, deadline); err != nil {
			return r.missedInterrupt(err)
		}
		drainEventfd(r.Call)
	}
}

// interruptGrace is how long after a used index its interrupt may come.
const interruptGrace = 500 * time.Millisecond

// missedInterrupt is what a wait that ended in err says: that is err, unless a
// chain was used without the interrupt that was asked for.
func (r *Ring) missedInterrupt(err error) error {
	if !r.usedWaits() {
		return err
	}
	if waitReadable(r.Call, time.Now().Add(interruptGrace)) != nil {
		return fmt.Errorf("%w: ring %d was used without the interrupt that was asked for", ErrBackend, r.Index)
	}
	return nil
}

// Reaps waits until all that was published has been used, and forgets it.
func (r *Ring) Reaps(d time.Duration) error {
	for r.lastUsed != r.published {
		_, _, ok, err := r.Reap()
		if err == nil && !ok {
			err = r.WaitUsed(d)
		}
		if err != nil {
			return err
		}
	}
	return nil
}
