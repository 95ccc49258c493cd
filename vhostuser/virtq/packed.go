package virtq

import (
	"fmt"
	"math/bits"
	"sync/atomic"

	"sidewire/vhostuser/guestmem"
)

// The packed ring (virtio 1.2, 2.8).
//
// There is one ring of descriptors, which both sides write. A descriptor is the
// device's while its flags say AVAIL and not USED, each of the two compared
// with the wrap counter of the side that looks: they change their meaning every
// time round. A chain is descriptors that follow each other; its buffer id is
// in the last of them. The device gives a chain back in one element, written
// over the ring where the last element ended, and then goes on by as many
// descriptors as the chain had.
//
// What belongs to the queue therefore differs from the split ring's in three
// things:
//
//   - Id and flags of a descriptor are one word. It is loaded first, with
//     acquire order, and the other fields after it; it is stored last. Of a
//     batch of used elements Put writes all words but the first, where the
//     driver looks; Publish stores that one.
//   - The guest could lend the device a descriptor that it has already. How
//     many are lent is counted, and more than the ring holds breaks it. So does
//     a chain that is not available to its end, since nobody knows where the
//     next one begins.
//   - Put must know how long the chain was, so each chain in flight has an
//     entry in a list of our own. Chains may be put in any order.
//
// Either side tells the other in a word of its own when it wants to be woken
// (ENABLE, DISABLE, or DESC with the place in the ring, if EVENT_IDX was
// negotiated). The barriers are those of the split ring with other words: the
// flags of a batch are stored, then the driver's word is loaded; our word is
// stored, then the next descriptor's flags are loaded.
type packed struct {
	ring   []slot
	driver *uint32 // the driver's word about interrupts
	device *uint32 // ours about kicks

	next   cursor // of the next chain to pop
	put    cursor // of the next used element to stage
	public cursor // of the next used element as the guest sees it
	first  uint32 // id and flags of the first staged element
	staged int    // descriptors of staged elements
	fresh  int    // descriptors published since the last NeedsNotify
	out    int    // descriptors of chains in flight
	dry    bool   // the last PopRun came to an end of what is available

	event uint32 // our word, once told is set
	told  bool

	// Chains in flight by the order of their pops: Queue.put is the count of
	// the oldest, Queue.next that of the next pop.
	flight []flight
	mask   uint16
}

// slot is a descriptor of the ring as it lies in memory.
type slot struct {
	addr uint64
	len  uint32
	word uint32 // buffer id, then flags
}

// flight is a chain that was popped and not put.
type flight struct{ id, n uint16 }

// Flags of a descriptor that say whose it is.
const (
	flagAvail  = 1 << 7
	flagUsed   = 1 << 15
	flagsOwner = flagAvail | flagUsed
)

// Flags of an event word, in its upper half.
const (
	eventEnable  = 0
	eventDisable = 1 << 16
	eventDesc    = 2 << 16
	eventFlags   = 3 << 16
)

// cursor is a place in a packed ring.
type cursor struct {
	at  int
	lap uint16 // the wrap counter, 1 at first
}

// cursorOf unpacks a place as messages and event words have it.
func cursorOf(v uint16) cursor { return cursor{at: int(v & 0x7fff), lap: v >> 15} }

func (c cursor) value() uint16 { return uint16(c.at) | c.lap<<15 }

// forward and back move by up to the ring's size.
func (c cursor) forward(n, size int) cursor {
	if c.at += n; c.at >= size {
		c.at -= size
		c.lap ^= 1
	}
	return c
}

func (c cursor) back(n, size int) cursor {
	if c.at -= n; c.at < 0 {
		c.at += size
		c.lap ^= 1
	}
	return c
}

// availFlags are the owner flags of a descriptor that is available in this
// lap, usedFlags those of one that was used.
func (c cursor) availFlags() uint16 { return flagUsed >> (c.lap * 8) }
func (c cursor) usedFlags() uint16  { return flagsOwner * c.lap }

// newPacked makes the state of a packed ring.
func newPacked(c *Config) (*packed, error) {
	if c.Size == 0 || c.Size > MaxSize {
		return nil, fmt.Errorf("%w: %d", ErrSize, c.Size)
	}
	base := cursorOf(c.Base)
	if base.at >= int(c.Size) {
		return nil, fmt.Errorf("%w: it begins at %d of %d", ErrBase, base.at, c.Size)
	}
	room := 1 << bits.Len16(c.Size-1)
	return &packed{
		next: base, put: base, public: base,
		flight: make([]flight, room), mask: uint16(room - 1),
	}, nil
}

// translatePacked finds the ring and the event words in m.
func (q *Queue) translatePacked(m *guestmem.Memory) error {
	c, p := &q.cfg, q.packed
	if c.Desc%descLen != 0 || c.Avail%4 != 0 || c.Used%4 != 0 {
		return fmt.Errorf("%w: descriptors %#x, driver area %#x, device area %#x", ErrAlign, c.Desc, c.Avail, c.Used)
	}
	var err error
	if p.ring, err = slotsAt(m, c.Desc, int(c.Size)); err != nil {
		return err
	}
	driver, err := halfAt(m, c.Avail)
	if err != nil {
		return err
	}
	device, err := halfAt(m, c.Used)
	if err != nil {
		return err
	}
	p.driver, p.device = driver.word, device.word
	q.mem, q.last = m, m.Region(c.Desc)
	return nil
}

// read copies the descriptor at c, whose next is the buffer id, and reports
// whether it is available.
func (p *packed) read(c cursor) (d desc, ok bool) {
	s := &p.ring[c.at]
	w := atomic.LoadUint32(&s.word)
	flags := uint16(w >> 16)
	if flags&flagsOwner != c.availFlags() {
		return desc{}, false
	}
	return desc{addr: s.addr, len: s.len, flags: flags, next: uint16(w)}, true
}

// take moves a chain of n descriptors from the ring to the list of those in
// flight.
func (q *Queue) take(id uint16, n int) {
	p := q.packed
	p.flight[q.next&p.mask] = flight{id, uint16(n)}
	p.next = p.next.forward(n, len(p.ring))
	p.out += n
	q.next++
}

// land takes a chain from the list and returns its length, 0 if none has this
// id. It is the oldest, unless a reservation delays that.
func (q *Queue) land(id uint16) int {
	p := q.packed
	at := q.put
	for at != q.next && p.flight[at&p.mask].id != id {
		at++
	}
	if at == q.next {
		return 0
	}
	n := p.flight[at&p.mask].n
	for ; at != q.put; at-- {
		p.flight[at&p.mask] = p.flight[(at-1)&p.mask]
	}
	q.put++
	p.out -= int(n)
	return int(n)
}

// rewindPacked takes back the last n pops.
func (q *Queue) rewindPacked(n int) {
	p := q.packed
	for ; n > 0 && q.next != q.put; n-- {
		q.next--
		k := int(p.flight[q.next&p.mask].n)
		p.next = p.next.back(k, len(p.ring))
		p.out -= k
	}
}
