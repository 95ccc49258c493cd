package virtq

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
)

// Flags of a descriptor (virtio 1.2, 2.7.5); others are ignored (H059).
const (
	flagNext     = 1
	flagWrite    = 2
	flagIndirect = 4
	flagAll      = flagNext | flagWrite | flagIndirect
)

const descLen = 16

// Chain is a descriptor chain lent to the device.
type Chain struct {
	Head uint16 // what Put takes; the buffer id of a packed ring

	// Segs are the buffers, without empty ones. borrowed: guest memory, until
	// the chain is put; the guest may change it at any moment.
	Segs [][]byte
	Len  int // bytes in Segs
}

// desc is a private copy of a descriptor.
type desc struct {
	addr  uint64
	len   uint32
	flags uint16
	next  uint16
}

// descAt copies the descriptor at the start of b.
func descAt(b []byte) desc {
	_ = b[descLen-1]
	return desc{
		addr:  binary.LittleEndian.Uint64(b),
		len:   binary.LittleEndian.Uint32(b[8:]),
		flags: binary.LittleEndian.Uint16(b[12:]),
		next:  binary.LittleEndian.Uint16(b[14:]),
	}
}

// Pop takes the next chain from the available ring. Its slices are appended to
// segs, whose length is 0 and whose capacity is the room for them; nothing is
// allocated. A chain with a buffer of the other direction is Bad.
func (q *Queue) Pop(dir Direction, segs [][]byte) (Chain, Status) {
	if q.packed != nil {
		return q.popPacked(dir, segs)
	}
	head, st := q.head()
	if st != OK {
		return Chain{}, st
	}
	d := descAt(q.desc[int(head)*descLen:])
	// Most chains are one buffer in the region where the last one was.
	if d.flags&flagAll == uint16(dir) && d.len-1 < MaxBytes && len(segs) < cap(segs) && q.cfg.Log == nil {
		if b, ok := q.last.Slice(d.addr, uint64(d.len)); ok {
			q.next++
			return Chain{Head: head, Segs: append(segs, b), Len: int(d.len)}, OK
		}
	}
	w := walk{out: segs, in: segs, readable: dir == Readable, writable: dir == Writable}
	if st := q.chain(&w, head, d); st != OK {
		return Chain{Head: head}, st
	}
	c := Chain{Head: head, Segs: w.out, Len: int(w.len)}
	if dir == Writable {
		c.Segs = w.in
	}
	return c, OK
}

// PopBoth takes a chain of device-readable buffers followed by device-writable
// ones, either possibly none: a command of the control queue. The slices of
// the two parts are appended to out and in as in Pop.
func (q *Queue) PopBoth(out, in [][]byte) (head uint16, readable, writable [][]byte, st Status) {
	if q.packed != nil {
		return q.popBothPacked(out, in)
	}
	head, st = q.head()
	if st != OK {
		return 0, nil, nil, st
	}
	w := walk{out: out, in: in, readable: true, writable: true}
	if st := q.chain(&w, head, descAt(q.desc[int(head)*descLen:])); st != OK {
		return head, nil, nil, st
	}
	return head, w.out, w.in, OK
}

// Rewind takes back the last n pops, none of which was put yet: the next Pop
// looks at the same entries again.
func (q *Queue) Rewind(n int) {
	if q.packed != nil {
		q.rewindPacked(n)
	} else {
		q.next -= uint16(n)
	}
	if len(q.lent) > 0 {
		q.markRewound(n)
	}
}

// Avail returns how many entries wait to be popped, or 0 if the queue is
// Broken. A packed ring is gone through for that.
func (q *Queue) Avail() int {
	if q.packed != nil {
		return q.availPacked()
	}
	if q.look() != OK {
		return 0
	}
	return int(q.seen - q.next)
}

// Untouched reports whether the guest seems never to have made anything
// available: its index, or the first descriptor of a packed ring, is 0. It may
// be called beside the queue's owner.
func (q *Queue) Untouched() bool {
	if q.packed != nil {
		return atomic.LoadUint32(&q.packed.ring[0].word) == 0
	}
	return q.availIdx.load() == 0
}

// look loads the available index and refuses one that is further ahead than
// the ring is long (H043, H049).
func (q *Queue) look() Status {
	if q.err != nil {
		return Broken
	}
	idx := q.availIdx.load()
	n := idx - q.next
	if n > q.mask+1 {
		q.err = fmt.Errorf("%w: %d, next is %d", ErrAvailIndex, idx, q.next)
		return Broken
	}
	q.seen = idx
	if n == 0 {
		return Empty
	}
	return OK
}

// head reads the next entry of the available ring, without taking it.
func (q *Queue) head() (uint16, Status) {
	if q.next == q.seen || q.err != nil {
		if st := q.look(); st != OK {
			return 0, st
		}
	}
	at := 2 * int(q.next&q.mask)
	head := binary.LittleEndian.Uint16(q.avail[at:])
	if head > q.mask {
		q.err = fmt.Errorf("%w: %d of %d", ErrHead, head, q.Size())
		return 0, Broken
	}
	return head, OK
}

// walk is the state of following one chain.
type walk struct {
	out, in  [][]byte // readable and writable buffers found
	readable bool     // a readable descriptor may come
	writable bool     // a writable descriptor may come
	len      uint64
	left     uint16 // descriptors that may still come
	cause    Cause
}

// bad notes why the chain is not followed further.
func (w *walk) bad(c Cause) Status {
	w.cause = c
	return Bad
}

// chain follows the chain that starts with d and takes it from the ring,
// unless there is no room for it. A fault on the way leaves it in the ring.
func (q *Queue) chain(w *walk, head uint16, d desc) Status {
	w.left = q.limit
	lent := len(q.lent)
	st := q.follow(w, d, q.desc, false)
	if st == OK && w.len == 0 {
		st = w.bad(CauseLength)
	}
	if st != OK {
		q.lent = q.lent[:lent]
	}
	if st == Bad {
		q.cause = w.cause
	}
	if st != NoRoom {
		q.next++
	}
	for i := lent; i < len(q.lent); i++ {
		q.lent[i].head = head
	}
	return st
}

// follow adds the buffers of d and of the descriptors in table that it leads
// to. A chain may end in an indirect table, which may not hold another.
func (q *Queue) follow(w *walk, d desc, table []byte, nested bool) Status {
	for {
		if d.flags&flagIndirect != 0 {
			if nested || !q.cfg.Indirect || d.flags&flagNext != 0 {
				return w.bad(CauseIndirect)
			}
			return q.followIndirect(w, d)
		}
		if w.left == 0 {
			return w.bad(CauseLong)
		}
		w.left--
		if st := q.add(w, d); st != OK {
			return st
		}
		if d.flags&flagNext == 0 {
			return OK
		}
		at := int(d.next) * descLen
		if at >= len(table) {
			return w.bad(CauseNext)
		}
		d = descAt(table[at:])
	}
}

// followIndirect follows the table that d stands for. That d is marked
// writable is no fault (H058): "the device MUST ignore the write-only flag in
// the descriptor that refers to an indirect table" (virtio 1.2, 2.7.5.3.2).
func (q *Queue) followIndirect(w *walk, d desc) Status {
	table, st := q.indirect(w, d)
	if st != OK {
		return st
	}
	return q.follow(w, descAt(table), table, true)
}

// indirect returns the table that d stands for, at least one entry long.
func (q *Queue) indirect(w *walk, d desc) ([]byte, Status) {
	n := d.len / descLen
	if n == 0 || d.len%descLen != 0 || n > uint32(q.limit) {
		return nil, w.bad(CauseIndirect)
	}
	table, ok := q.slice(d.addr, d.len)
	if !ok {
		if table, ok = q.gather(d.addr, d.len); !ok {
			return nil, w.bad(CauseUnmapped)
		}
	}
	return table, OK
}

// slice translates a range that lies in one region, and remembers the region.
func (q *Queue) slice(gpa uint64, n uint32) ([]byte, bool) {
	if b, ok := q.last.Slice(gpa, uint64(n)); ok {
		return b, true
	}
	r := q.mem.Region(gpa)
	if r == nil {
		return nil, false
	}
	q.last = r
	return r.Slice(gpa, uint64(n))
}

// gather copies an indirect table that crosses from one region into the next.
// Its room is made at the first such table, for the longest one allowed.
func (q *Queue) gather(gpa uint64, n uint32) ([]byte, bool) {
	if q.table == nil {
		q.table = make([]byte, int(q.limit)*descLen)
	}
	return q.table[:n], q.mem.Read(q.table[:n], gpa)
}

// add appends the buffer of d. Buffers of length 0 are passed over.
func (q *Queue) add(w *walk, d desc) Status {
	dst := &w.out
	if d.flags&flagWrite != 0 {
		dst = &w.in
		if !w.writable {
			return w.bad(CauseDirection)
		}
		w.readable = false
	} else if !w.readable {
		return w.bad(CauseDirection)
	}
	if w.len += uint64(d.len); w.len > MaxBytes {
		return w.bad(CauseLength)
	}
	if d.len == 0 {
		return OK
	}
	if q.cfg.Log != nil && d.flags&flagWrite != 0 {
		q.lent = append(q.lent, lent{gpa: d.addr, len: d.len, at: q.next})
	}
	b, ok := q.slice(d.addr, d.len)
	if !ok {
		return q.addCrossing(w, dst, d)
	}
	return w.push(dst, b)
}

// addCrossing appends a buffer that crosses regions, one slice for each.
func (q *Queue) addCrossing(w *walk, dst *[][]byte, d desc) Status {
	gpa, n := d.addr, uint64(d.len)
	for n > 0 {
		b := q.mem.Prefix(gpa, n)
		if b == nil {
			return w.bad(CauseUnmapped)
		}
		if st := w.push(dst, b); st != OK {
			return st
		}
		gpa, n = gpa+uint64(len(b)), n-uint64(len(b))
	}
	return OK
}

// push appends a slice to one of w's lists, if there is room.
func (w *walk) push(dst *[][]byte, b []byte) Status {
	s := *dst
	if len(s) == cap(s) {
		if cap(s) >= MaxSegs {
			return w.bad(CauseLong)
		}
		return NoRoom
	}
	*dst = append(s, b)
	return OK
}
