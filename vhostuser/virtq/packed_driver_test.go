package virtq

import (
	"sync/atomic"
)

// packedDriver is what a driver keeps of a packed ring. Tests write chains into
// a table as if the ring were split; a chain goes from there into the ring when
// it is staged.
type packedDriver struct {
	table []desc
	ring  []slot
	next  cursor // of the next descriptor to make available
	used  cursor // of the next used element
	free  int    // descriptors

	first   uint32           // id and flags of the first staged descriptor
	firstAt int              // its place, -1 for none
	chains  map[uint16][]int // lengths of the chains in flight with an id
}

func newPackedDriver(c Config) *packedDriver {
	at := cursorOf(c.Base)
	return &packedDriver{
		table: make([]desc, c.Size), next: at, used: at, free: int(c.Size),
		firstAt: -1, chains: map[uint16][]int{},
	}
}

// eraseRing makes all descriptors used ones: before the first place in the lap
// that begins there, behind it in the one before.
func (d *driver) eraseRing() {
	at := d.packed.next
	for i := range int(d.cfg.Size) {
		word := uint32(at.usedFlags()) << 16
		if i >= at.at {
			word ^= flagsOwner << 16
		}
		*d.slot(i) = slot{word: word}
	}
}

// follow returns the chain that begins with an entry of the table, cut off
// where the free part of the ring ends.
func (d *driver) follow(head uint16) (list []desc) {
	p := d.packed
	for {
		var v desc // nothing, behind the table
		if int(head) < len(p.table) {
			v = p.table[head]
		}
		list = append(list, v)
		if v.flags&flagNext == 0 || len(list) >= p.free {
			return list
		}
		head = v.next
	}
}

// slot is the descriptor at a place of the ring.
func (d *driver) slot(at int) *slot {
	if d.packed.ring == nil {
		s, err := slotsAt(d.mem, d.cfg.Desc, int(d.cfg.Size))
		if err != nil {
			panic(err)
		}
		d.packed.ring = s
	}
	return &d.packed.ring[at]
}

// stagePacked writes a chain into the ring without showing it.
func (d *driver) stagePacked(id uint16, list ...desc) {
	p := d.packed
	if len(list) > p.free {
		panic("driver: no room in the ring")
	}
	for _, v := range list {
		s := d.slot(p.next.at)
		s.addr, s.len = v.addr, v.len
		word := uint32(id) | uint32(v.flags&^flagsOwner|p.next.availFlags())<<16
		if p.firstAt < 0 {
			p.firstAt, p.first = p.next.at, word
		} else {
			s.word = word
		}
		p.next = p.next.forward(1, int(d.cfg.Size))
	}
	p.free -= len(list)
	p.chains[id] = append(p.chains[id], len(list))
	d.availIx++
}

// storePacked shows what was staged.
func (d *driver) storePacked() {
	if p := d.packed; p.firstAt >= 0 {
		atomic.StoreUint32(&d.slot(p.firstAt).word, p.first)
		p.firstAt = -1
	}
}

// takePacked returns the elements that came back since the last call.
func (d *driver) takePacked() (got []elem) {
	p := d.packed
	for d.usedWaits() {
		s := d.slot(p.used.at)
		word := atomic.LoadUint32(&s.word)
		e := elem{id: word & 0xffff, len: s.len}
		lens := p.chains[uint16(e.id)]
		if len(lens) == 0 {
			panic("driver: the device returned what it had not")
		}
		if word>>16&flagWrite == 0 {
			e.len = 0
		}
		p.chains[uint16(e.id)] = lens[1:]
		p.free += lens[0]
		p.used = p.used.forward(lens[0], int(d.cfg.Size))
		got = append(got, e)
		d.usedIx++
	}
	return got
}

// usedWaits says whether the device has returned something.
func (d *driver) usedWaits() bool {
	if p := d.packed; p != nil {
		word := atomic.LoadUint32(&d.slot(p.used.at).word)
		return uint16(word>>16)&flagsOwner == p.used.usedFlags()
	}
	return d.usedIx != d.usedIndex()
}

// deviceEvent is the device's word about kicks.
func (d *driver) deviceEvent() uint32 { return atomic.LoadUint32(d.word(d.cfg.Used)) }
