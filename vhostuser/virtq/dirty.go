package virtq

import "math/bits"

// lent is a writable buffer of a chain that was popped while the queue logs
// its writes.
type lent struct {
	gpa  uint64
	len  uint32
	head uint16
	at   uint16 // index of the chain's entry in the available ring
}

// markPut marks what was written to the oldest chain with this head, now that
// the writes are done. A length of 0 leaves open what was touched before the
// owner gave up, so all of it is marked.
func (q *Queue) markPut(head uint16, n uint32) {
	first := 0
	for first < len(q.lent) && q.lent[first].head != head {
		first++
	}
	if n == 0 {
		n = MaxBytes
	}
	end := first
	for end < len(q.lent) && q.lent[end].at == q.lent[first].at {
		part := min(n, q.lent[end].len)
		q.cfg.Log.Mark(q.lent[end].gpa, uint64(part))
		n -= part
		end++
	}
	q.lent = append(q.lent[:first], q.lent[end:]...)
}

// markRewound marks and forgets the buffers of chains that went back unused:
// part of a frame may have been copied to them.
func (q *Queue) markRewound(n int) {
	keep := len(q.lent)
	for keep > 0 && q.lent[keep-1].at-q.next < uint16(n) {
		keep--
		q.cfg.Log.Mark(q.lent[keep].gpa, uint64(q.lent[keep].len))
	}
	q.lent = q.lent[:keep]
}

// markUsed marks the elements that Publish shows, and the ring's header.
func (q *Queue) markUsed() {
	size := uint64(q.Size())
	from, n := uint64(q.public&q.mask), min(uint64(q.put-q.public), size)
	first := min(n, size-from)
	q.markRing(4+elemLen*from, elemLen*first)
	q.markRing(4, elemLen*(n-first))
	q.markRing(0, 4)
}

// markRing marks n bytes at an offset in the used ring. The frontend may have
// given any address for it, even one that wraps (H037).
func (q *Queue) markRing(off, n uint64) {
	gpa, carry := bits.Add64(q.cfg.UsedLog, off, 0)
	if carry != 0 {
		gpa = ^uint64(0)
	}
	q.cfg.Log.Mark(gpa, n)
}
