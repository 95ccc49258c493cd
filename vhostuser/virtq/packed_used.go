package virtq

import "sync/atomic"

// putPacked is Put on a packed ring.
func (q *Queue) putPacked(id uint16, n uint32) {
	p := q.packed
	chain := q.land(id)
	if chain == 0 {
		return
	}
	flags := p.put.usedFlags()
	if n > 0 {
		flags |= flagWrite // what makes the length count (virtio 1.2, 2.8.5)
	}
	word := uint32(id) | uint32(flags)<<16
	s := &p.ring[p.put.at]
	s.len = n
	if p.staged == 0 {
		p.first = word
	} else {
		s.word = word
	}
	p.staged += chain
	p.put = p.put.forward(chain, len(p.ring))
}

// publishPacked is Publish on a packed ring: the first element's word shows
// all.
func (q *Queue) publishPacked() {
	p := q.packed
	if p.staged == 0 {
		return
	}
	atomic.StoreUint32(&p.ring[p.public.at].word, p.first)
	if q.cfg.Log != nil {
		q.markUsedPacked()
	}
	p.fresh += p.staged
	p.staged, p.public = 0, p.put
	q.public = q.put
}

// markUsedPacked marks the descriptors from the first to the last element that
// Publish shows. They lie in the ring, for which there is no log address.
func (q *Queue) markUsedPacked() {
	p := q.packed
	first := min(p.staged, len(p.ring)-p.public.at)
	q.cfg.Log.Mark(q.cfg.Desc+descLen*uint64(p.public.at), descLen*uint64(first))
	q.cfg.Log.Mark(q.cfg.Desc, descLen*uint64(p.staged-first))
}

// needsNotifyPacked is NeedsNotify on a packed ring (virtio 1.2, 2.8.10).
// Publish stores the flags with sequential consistency, so the load here
// cannot pass it.
func (q *Queue) needsNotifyPacked() bool {
	p := q.packed
	n := p.fresh
	if n == 0 {
		return false
	}
	p.fresh = 0
	first := !q.asked
	q.asked = true
	word := atomic.LoadUint32(p.driver)
	switch word & eventFlags {
	case eventDisable:
		return false
	case eventDesc:
		// What the previous owner of the ring told the driver is not known.
		return first || !q.cfg.EventIdx || p.passed(cursorOf(uint16(word)), n)
	}
	return true
}

// passed says whether the last n descriptors that were published include the
// one at c. A place that is not in the ring is passed at once: so nobody waits
// for it.
func (p *packed) passed(c cursor, n int) bool {
	size := len(p.ring)
	if c.at >= size || n >= size {
		return true
	}
	ahead := p.public.at - c.at
	if c.lap != p.public.lap {
		ahead += size
	}
	return 0 < ahead && ahead <= n
}

// enableNotifyPacked is EnableNotify on a packed ring.
func (q *Queue) enableNotifyPacked() (more bool) {
	if q.err != nil {
		return true
	}
	if q.cfg.EventIdx {
		q.setEvent(eventDesc | uint32(q.packed.next.value()))
	} else {
		q.setEvent(eventEnable)
	}
	return q.lookPacked() != Empty
}

// disableNotifyPacked is DisableNotify on a packed ring.
func (q *Queue) disableNotifyPacked() {
	if p := q.packed; !p.told || p.event != eventDisable {
		q.setEvent(eventDisable)
	}
}

// setEvent stores our event word. A full barrier follows it.
func (q *Queue) setEvent(word uint32) {
	p := q.packed
	p.event, p.told = word, true
	atomic.StoreUint32(p.device, word)
	if q.cfg.Log != nil {
		q.markRing(0, 4)
	}
}
