package vhosttest

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
)

// Flags of a packed ring's descriptors and event words (virtio 1.2, 2.8).
const (
	descAvail = 1 << 7
	descUsed  = 1 << 15
	descOwner = descAvail | descUsed

	eventEnable  = 0
	eventDisable = 1
	eventDesc    = 2
)

// packedRing is what a Ring keeps besides if it is packed. The Ring's idx,
// published and lastUsed count chains then; its free list holds buffer ids.
type packedRing struct {
	words  []*atomic.Uint32 // buffer id and flags of each descriptor
	driver *atomic.Uint32   // our event word
	device *atomic.Uint32   // the device's

	next   place  // of the next descriptor
	used   place  // of the next used element
	room   int    // free descriptors
	first  uint32 // id and flags of the first staged descriptor
	at     int    // its place, -1 for none
	staged int    // descriptors since the last Publish

	raw []rawDesc // what RawDesc wrote and RawPost has not staged
}

type rawDesc struct {
	gpa   uint64
	n     uint32
	flags uint16
}

// place is where something is in a packed ring, and in which lap.
type place struct {
	at   int
	wrap uint16
}

func (p place) forward(n, size int) place {
	if p.at += n; p.at >= size {
		p.at -= size
		p.wrap ^= 1
	}
	return p
}

// value is the place as messages and event words have it.
func (p place) value() uint32 { return uint32(p.at) | uint32(p.wrap)<<15 }

// avail and used are the owner flags of descriptors in this lap.
func (p place) avail() uint16  { return descUsed >> (8 * p.wrap) }
func (p place) usedUp() uint16 { return descOwner * p.wrap }

// NewPackedRing lays a packed ring out in m, without eventfds. It may have any
// number of descriptors.
func NewPackedRing(m *Memory, index, size int, eventIdx bool) (*Ring, error) {
	if size < 1 || size > 1<<15 {
		return nil, fmt.Errorf("packed ring of %d descriptors", size)
	}
	p := &packedRing{}
	r := &Ring{Index: index, Size: size, Kick: -1, Call: -1, Err: -1, eventIdx: eventIdx, mem: m, packed: p}
	var err error
	alloc := func(n int) (gpa uint64, b []byte) {
		if err == nil {
			if gpa, err = m.Alloc(n, pageSize); err == nil {
				b = m.At(gpa, n)
			}
		}
		return gpa, b
	}
	r.Desc, r.desc = alloc(descLen * size)
	r.Avail, r.avail = alloc(4)
	r.Used, r.used = alloc(4)
	if err != nil {
		return nil, err
	}
	p.driver, p.device = word(r.avail, 0), word(r.used, 0)
	for i := range size {
		p.words = append(p.words, word(r.desc, i*descLen+12))
	}
	r.free, r.chain = make([]uint16, 0, size), make([]uint16, size)
	r.Reset()
	return r, nil
}

// Packed says whether the ring is packed.
func (r *Ring) Packed() bool { return r.packed != nil }

func (r *Ring) resetPacked(at place) {
	p := r.packed
	clear(r.desc)
	for i, w := range p.words {
		// Used ones: in front of the first place in its lap, behind it in the
		// one before.
		flags := at.usedUp()
		if i >= at.at {
			flags ^= descOwner
		}
		w.Store(uint32(flags) << 16)
	}
	p.driver.Store(0)
	p.device.Store(0)
	p.next, p.used, p.room, p.at, p.staged, p.raw = at, at, r.Size, -1, 0, p.raw[:0]
}

// placeOf turns an index of a split ring into a place in a packed one.
func (r *Ring) placeOf(i uint16) place {
	return place{int(i) % r.Size, uint16(1 ^ int(i)/r.Size&1)}
}

// postPacked stages a chain with this id.
func (r *Ring) postPacked(id uint16, bufs []Buf) {
	for i, b := range bufs {
		flags := b.flags()
		if i < len(bufs)-1 {
			flags |= DescNext
		}
		r.putSlot(id, b.GPA, b.Len, flags)
	}
	r.chain[id] = uint16(len(bufs))
	r.idx++
}

// putSlot writes the next descriptor, of which the device sees nothing before
// Publish.
func (r *Ring) putSlot(id uint16, gpa uint64, n uint32, flags uint16) {
	p := r.packed
	b := r.desc[p.next.at*descLen:]
	binary.LittleEndian.PutUint64(b, gpa)
	binary.LittleEndian.PutUint32(b[8:], n)
	w := uint32(id) | uint32(flags&^descOwner|p.next.avail())<<16
	if p.at < 0 {
		p.at, p.first = p.next.at, w
	} else {
		p.words[p.next.at].Store(w)
	}
	p.next = p.next.forward(1, r.Size)
	p.staged++
	p.room--
}

// publishPacked is Publish on a packed ring.
func (r *Ring) publishPacked() (kick bool) {
	p := r.packed
	if p.at < 0 {
		return false
	}
	n := p.staged
	p.words[p.at].Store(p.first) // the last to be stored
	p.at, p.staged, r.published = -1, 0, r.idx
	event := p.device.Load()
	switch event >> 16 & 3 {
	case eventDisable:
		return false
	case eventDesc:
		at := int(event & 0x7fff)
		if uint16(event>>15&1) != p.next.wrap {
			at -= r.Size
		}
		return !r.eventIdx || p.next.at-at > 0 && p.next.at-at <= n
	}
	return true
}

// usedAt says whether there is a used element at a place, and which.
func (r *Ring) usedAt(at place) (id uint16, n uint32, ok bool) {
	w := r.packed.words[at.at].Load()
	if uint16(w>>16)&descOwner != at.usedUp() {
		return 0, 0, false
	}
	if w>>16&DescWrite != 0 {
		n = binary.LittleEndian.Uint32(r.desc[at.at*descLen+8:])
	}
	return uint16(w), n, true
}

// usedWaits says whether the device has used a chain that was not reaped.
func (r *Ring) usedWaits() bool {
	if r.packed == nil {
		return r.UsedIdx() != r.lastUsed
	}
	_, _, ok := r.usedAt(r.packed.used)
	return ok
}

// usedEnd is where the device's used elements end, and how many chains were
// used until there.
func (r *Ring) usedEnd() (at place, idx uint16) {
	at, idx = r.packed.used, r.lastUsed
	for range r.Size {
		id, _, ok := r.usedAt(at)
		if !ok || int(id) >= r.Size || r.chain[id] == 0 {
			break
		}
		at = at.forward(int(r.chain[id]), r.Size)
		idx++
	}
	return at, idx
}

// reapPacked is Reap on a packed ring.
func (r *Ring) reapPacked() (id uint16, n uint32, ok bool, err error) {
	p := r.packed
	id, n, ok = r.usedAt(p.used)
	if !ok {
		return 0, 0, false, nil
	}
	if int(id) >= r.Size || r.chain[id] == 0 {
		return 0, 0, false, fmt.Errorf("%w: ring %d: used element %d is not in flight", ErrBackend, r.Index, id)
	}
	r.landed(int(r.chain[id]))
	r.chain[id] = 0
	r.free = append(r.free, id)
	return id, n, true, nil
}

// landed takes back n descriptors of a chain that was used.
func (r *Ring) landed(n int) {
	p := r.packed
	p.used = p.used.forward(n, r.Size)
	p.room += n
	r.lastUsed++
}

// setDriverEvent tells the device when we want an interrupt.
func (r *Ring) setDriverEvent(flags uint32) {
	w := flags << 16
	if flags == eventDesc {
		w |= r.packed.used.value()
	}
	r.packed.driver.Store(w)
}

// rawPostPacked stages what RawDesc wrote as one chain with this id, up to the
// first descriptor that links to no other.
func (r *Ring) rawPostPacked(id uint16) {
	p := r.packed
	for _, d := range p.raw {
		r.putSlot(id, d.gpa, d.n, d.flags)
		if d.flags&DescNext == 0 {
			break
		}
	}
	p.raw = p.raw[:0]
	r.idx++
}

// rawReapPacked takes the next used element as it is. Its chain is taken to be
// all that is in flight.
func (r *Ring) rawReapPacked() (id, n uint32, ok bool) {
	head, n, ok := r.usedAt(r.packed.used)
	if ok {
		r.landed(r.Size - r.packed.room)
	}
	return uint32(head), n, ok
}

// RawSlot writes a descriptor of a packed ring as it is, owner flags included.
func (r *Ring) RawSlot(i int, gpa uint64, n uint32, id, flags uint16) {
	b := r.desc[i*descLen:]
	binary.LittleEndian.PutUint64(b, gpa)
	binary.LittleEndian.PutUint32(b[8:], n)
	r.packed.words[i].Store(uint32(id) | uint32(flags)<<16)
}

// RawEvent writes a packed ring's word about interrupts.
func (r *Ring) RawEvent(w uint32) { r.packed.driver.Store(w) }
