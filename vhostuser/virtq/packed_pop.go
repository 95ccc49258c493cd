package virtq

import "fmt"

// popPacked is Pop on a packed ring.
func (q *Queue) popPacked(dir Direction, segs [][]byte) (Chain, Status) {
	d, st := q.headPacked()
	if st != OK {
		return Chain{}, st
	}
	// As on the split ring: one buffer in the region where the last one was.
	if d.flags&flagAll == uint16(dir) && d.len-1 < MaxBytes && d.next < q.cfg.Size && len(segs) < cap(segs) && q.cfg.Log == nil {
		if b, ok := q.last.Slice(d.addr, uint64(d.len)); ok {
			q.take(d.next, 1)
			return Chain{Head: d.next, Segs: append(segs, b), Len: int(d.len)}, OK
		}
	}
	w := walk{out: segs, in: segs, readable: dir == Readable, writable: dir == Writable}
	id, st := q.chainPacked(&w, d)
	if st != OK {
		return Chain{Head: id}, st
	}
	c := Chain{Head: id, Segs: w.out, Len: int(w.len)}
	if dir == Writable {
		c.Segs = w.in
	}
	return c, OK
}

// popBothPacked is PopBoth on a packed ring.
func (q *Queue) popBothPacked(out, in [][]byte) (head uint16, readable, writable [][]byte, st Status) {
	d, st := q.headPacked()
	if st != OK {
		return 0, nil, nil, st
	}
	w := walk{out: out, in: in, readable: true, writable: true}
	if head, st = q.chainPacked(&w, d); st != OK {
		return head, nil, nil, st
	}
	return head, w.out, w.in, OK
}

// headPacked reads the first descriptor of the next chain.
func (q *Queue) headPacked() (desc, Status) {
	if q.err != nil {
		return desc{}, Broken
	}
	p := q.packed
	d, ok := p.read(p.next)
	if !ok {
		return desc{}, Empty
	}
	if p.out == len(p.ring) {
		q.err = fmt.Errorf("%w: descriptor %d", ErrTaken, p.next.at)
		return desc{}, Broken
	}
	return d, OK
}

// lookPacked is look on a packed ring.
func (q *Queue) lookPacked() Status {
	_, st := q.headPacked()
	return st
}

// availPacked counts the chains that wait.
func (q *Queue) availPacked() (n int) {
	p := q.packed
	if q.err != nil {
		return 0
	}
	at := p.next
	for range len(p.ring) - p.out {
		d, ok := p.read(at)
		if !ok {
			break
		}
		if d.flags&flagNext == 0 {
			n++
		}
		at = at.forward(1, len(p.ring))
	}
	return n
}

// chainPacked follows the chain that starts with d and takes it from the ring,
// unless there is no room for it. The buffer id is in the last descriptor, so
// a chain that is found to be bad is followed to its end all the same.
func (q *Queue) chainPacked(w *walk, d desc) (id uint16, st Status) {
	p := q.packed
	w.left = q.limit
	lent := len(q.lent)
	at, room, n := p.next, len(p.ring)-p.out, 1
	for st = OK; ; n++ {
		if st == OK {
			st = q.addPacked(w, d)
		}
		if st == NoRoom {
			q.lent = q.lent[:lent]
			return 0, NoRoom
		}
		if d.flags&flagNext == 0 {
			break
		}
		ok := n < room
		if ok {
			at = at.forward(1, len(p.ring))
			d, ok = p.read(at)
		}
		if !ok {
			q.lent = q.lent[:lent]
			q.err = fmt.Errorf("%w: it begins at descriptor %d", ErrChain, p.next.at)
			return 0, Broken
		}
	}
	id = d.next
	switch {
	case st == OK && w.len == 0:
		st = w.bad(CauseLength)
	case st == OK && id >= q.cfg.Size:
		st = w.bad(CauseID)
	}
	if st == Bad {
		q.lent = q.lent[:lent]
		q.cause = w.cause
	}
	for i := lent; i < len(q.lent); i++ {
		q.lent[i].head = id
	}
	q.take(id, n)
	return id, st
}

// addPacked appends the buffer of d, or those of the indirect table that it
// stands for. The entries of a table follow each other, and of their flags
// WRITE alone counts (virtio 1.2, 2.8.7). Where a chain is only to be read, not
// even that does: DPDK's driver has it set in the first entry of what it sends.
func (q *Queue) addPacked(w *walk, d desc) Status {
	if d.flags&flagIndirect == 0 {
		if w.left == 0 {
			return w.bad(CauseLong)
		}
		w.left--
		return q.add(w, d)
	}
	if !q.cfg.Indirect || d.flags&flagNext != 0 {
		return w.bad(CauseIndirect)
	}
	table, st := q.indirect(w, d)
	for ; st == OK && len(table) > 0; table = table[descLen:] {
		if w.left == 0 {
			return w.bad(CauseLong)
		}
		w.left--
		e := descAt(table) // with id and flags in the places of flags and next
		if !w.writable {
			e.next &^= flagWrite
		}
		st = q.add(w, desc{addr: e.addr, len: e.len, flags: e.next})
	}
	return st
}
