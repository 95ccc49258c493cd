package virtq

import (
	"encoding/binary"
	"sync/atomic"
)

// noNotify is the used ring's flag that asks the driver not to kick, and
// noInterrupt the available ring's that asks us for no interrupts.
const (
	noNotify    = 1
	noInterrupt = 1
)

const elemLen = 8

// Put stages the return of a chain into which n bytes were written; 0 for one
// that was read or is Bad. The guest sees it after Publish. Chains may be put
// in any order, though the one in which they were popped is the fastest.
func (q *Queue) Put(head uint16, n uint32) {
	if len(q.lent) > 0 {
		q.markPut(head, n)
	}
	if q.packed != nil {
		q.putPacked(head, n)
		return
	}
	at := elemLen * int(q.put&q.mask)
	binary.LittleEndian.PutUint64(q.used[at:], uint64(head)|uint64(n)<<32)
	q.put++
}

// Publish shows the guest everything that was put, by one store of the used
// index.
func (q *Queue) Publish() {
	if q.packed != nil {
		q.publishPacked()
		return
	}
	if q.put == q.public {
		return
	}
	atomic.StoreUint32(q.usedWord, usedHeader(q.flags, q.put))
	if q.cfg.Log != nil {
		q.markUsed()
	}
	q.public = q.put
}

// NeedsNotify reports whether the driver wants an interrupt for what was
// published since the last call (virtio 1.2, 2.7.7.2). Publish stores the used
// index with sequential consistency, so the load here cannot pass it.
func (q *Queue) NeedsNotify() bool {
	if q.packed != nil {
		return q.needsNotifyPacked()
	}
	old, now := q.notified, q.public
	if old == now {
		return false
	}
	q.notified = now
	if !q.cfg.EventIdx {
		return q.availFlags.load()&noInterrupt == 0
	}
	event := q.usedEvent.load()
	if !q.asked {
		// What the previous owner of the ring told the driver is not known.
		q.asked = true
		return true
	}
	return now-event-1 < now-old
}

// EnableNotify asks the driver for a kick when it makes the next chain
// available, and reports whether one is there already (or the queue is
// Broken), in which case no kick may come and the owner must not sleep.
func (q *Queue) EnableNotify() (more bool) {
	if q.packed != nil {
		return q.enableNotifyPacked()
	}
	if q.err != nil {
		return true
	}
	if q.cfg.EventIdx {
		storeEvent(q.availEvent, q.next)
		// A full barrier: the plain store above comes before the load in look.
		atomic.StoreUint32(&q.fence, 0)
		if q.cfg.Log != nil {
			q.markRing(4+elemLen*uint64(q.Size()), 2)
		}
	} else {
		q.setFlags(q.flags &^ noNotify)
	}
	return q.look() != Empty
}

// DisableNotify tells the driver that kicks are not needed. With EVENT_IDX
// there is nothing to say on a split ring: the driver kicks once at the index
// asked for.
func (q *Queue) DisableNotify() {
	if q.packed != nil {
		q.disableNotifyPacked()
		return
	}
	if !q.cfg.EventIdx && q.flags&noNotify == 0 {
		q.setFlags(q.flags | noNotify)
	}
}

// setFlags stores the used ring's flags, with the index as the guest knows it.
func (q *Queue) setFlags(flags uint16) {
	q.flags = flags
	atomic.StoreUint32(q.usedWord, usedHeader(flags, q.public))
	if q.cfg.Log != nil {
		q.markRing(0, 4)
	}
}
