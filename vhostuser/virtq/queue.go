// Package virtq is the device side of a virtqueue.
//
// A [Queue] belongs to one owner at a time, a worker or the holder of the
// port's lock. The guest owns descriptors, available ring and buffers; it may
// change them at any moment, so each word is read once into private memory and
// only the copy is checked and used. The device owns the used ring and never
// reads it back.
//
// # Theory of operation
//
// The owner pops chains, works on their slices, puts each head back, and
// publishes once per batch. Pop changes nothing that the guest sees, and Put
// writes elements that the guest does not look at before Publish: a fault in
// the guest's memory half-way loses the batch and leaves the state whole.
//
// Two sleepers can miss each other, and a full barrier between a store and a
// load prevents both cases (virtio 1.2, 2.7.10 and 2.7.7):
//
//   - The device stores the used index, then loads used_event or the flags; the
//     driver stores those, then looks at the used index. [Queue.Publish] before
//     [Queue.NeedsNotify].
//   - The device stores avail_event or the flags, then looks at the available
//     index; the driver does it the other way round. [Queue.EnableNotify]
//     reports what came in between, and the owner sleeps only if nothing did.
//
// A chain that breaks the rules goes back to the guest with length 0 while the
// ring runs on ([Bad]). Only a ring that cannot be followed any further stops
// ([Broken]): an available index that is more than the ring ahead, or a head
// that is not in it.
//
// This is the split ring. What differs in the packed one stands in packed.go;
// a Queue is either, and its owner need not know which.
package virtq

import (
	"errors"
	"fmt"
	"reflect"

	"sidewire/vhostuser/guestmem"
)

// Limits of what a chain may be; a chain beyond them is [Bad].
const (
	MaxSize  = 32768   // entries of a ring (virtio 1.2, 2.7)
	MaxSegs  = 1024    // slices of a chain, and with the ring's size its descriptors
	MaxBytes = 1 << 20 // length of a chain
)

// Why a Queue cannot be made or followed.
var (
	ErrSize       = errors.New("ring size is not a power of two up to 32768, or any up to that if packed")
	ErrAlign      = errors.New("ring is not aligned")
	ErrRange      = errors.New("ring does not lie in one region of guest memory")
	ErrAvailIndex = errors.New("available index is more than the ring ahead")
	ErrHead       = errors.New("head is not in the ring")
	ErrBase       = errors.New("packed ring does not begin in the ring")
	ErrTaken      = errors.New("descriptor is available before it was used")
	ErrChain      = errors.New("chain is not available to its end")
)

// Config describes a ring as the frontend set it up.
type Config struct {
	Size     uint16 // entries, a power of two unless packed
	Packed   bool   // RING_PACKED was negotiated
	EventIdx bool   // EVENT_IDX was negotiated
	Indirect bool   // INDIRECT_DESC was negotiated

	// Guest-physical addresses. Of a packed ring Avail is the driver's event
	// suppression area and Used the device's.
	Desc, Avail, Used uint64
	// Base is the index of the first available entry not yet taken. Of a packed
	// ring it is the place of the descriptor, with the wrap counter in bit 15.
	Base uint16

	// Log takes the marks of what the device writes, or is nil. UsedLog is the
	// address under which the used ring is marked; 0 stands for Used. A packed
	// ring's descriptors are marked where they lie.
	Log     *guestmem.Log
	UsedLog uint64
}

// Queue is the device side of one virtqueue. It is not safe for concurrent
// use: a queue has one owner at a time.
type Queue struct {
	mem    *guestmem.Memory
	last   *guestmem.Region // where the last buffer was found
	packed *packed          // nil for a split ring

	desc  []byte // descriptor table
	avail []byte // the entries of the available ring
	used  []byte // the entries of the used ring

	mask  uint16
	limit uint16 // descriptors of a chain at most

	// Of a packed ring, next and put count chains, and of the others of this
	// group only limit counts.
	next     uint16 // index of the next available entry to pop
	seen     uint16 // available index as last loaded
	put      uint16 // used index with all staged elements
	public   uint16 // used index that the guest sees
	notified uint16 // used index at the last NeedsNotify
	flags    uint16 // flags of the used ring
	asked    bool   // NeedsNotify with EVENT_IDX was called since New
	cause    Cause
	err      error

	availIdx   half
	availFlags half // flags of the available ring
	usedEvent  half
	usedWord   *uint32 // flags and index of the used ring
	availEvent []byte
	fence      uint32

	lent  []lent // writable buffers of chains not yet put, while there is a log
	table []byte // room for an indirect table that crosses regions
	cfg   Config
}

// New makes a queue over rings in m. It refuses rings that are not aligned as
// virtio 1.2, 2.7 and 2.8 say or do not lie whole in one region (H040, H041),
// and writes nothing. Used and available index both start at c.Base: the device
// returns every chain before it stops.
func New(m *guestmem.Memory, c Config) (*Queue, error) {
	if c.UsedLog == 0 {
		c.UsedLog = c.Used
	}
	q := &Queue{limit: min(c.Size, MaxSegs), cfg: c}
	if c.Packed {
		var err error
		if q.packed, err = newPacked(&c); err != nil {
			return nil, err
		}
	} else {
		if c.Size == 0 || c.Size > MaxSize || c.Size&(c.Size-1) != 0 {
			return nil, fmt.Errorf("%w: %d", ErrSize, c.Size)
		}
		q.mask = c.Size - 1
		q.next, q.seen, q.put, q.public, q.notified = c.Base, c.Base, c.Base, c.Base, c.Base
	}
	find := q.translate
	if c.Packed {
		find = q.translatePacked
	}
	if err := find(m); err != nil {
		return nil, err
	}
	return q, nil
}

// translate finds the rings in m.
func (q *Queue) translate(m *guestmem.Memory) error {
	c, size := &q.cfg, uint64(q.cfg.Size)
	if c.Desc%16 != 0 || c.Avail%2 != 0 || c.Used%4 != 0 {
		return fmt.Errorf("%w: descriptors %#x, available %#x, used %#x", ErrAlign, c.Desc, c.Avail, c.Used)
	}
	event := uint64(0)
	if c.EventIdx {
		event = 2
	}
	desc, ok1 := m.Slice(c.Desc, 16*size)
	avail, ok2 := m.Slice(c.Avail, 4+2*size+event)
	used, ok3 := m.Slice(c.Used, 4+8*size+event)
	if !ok1 || !ok2 || !ok3 {
		return fmt.Errorf("%w: descriptors %#x, available %#x, used %#x", ErrRange, c.Desc, c.Avail, c.Used)
	}
	q.mem, q.last = m, m.Region(c.Desc)
	q.desc, q.avail, q.used = desc, avail[4:4+2*size], used[4:4+8*size]
	q.availEvent = used[4+8*size:]

	var err error
	if q.availFlags, err = halfAt(m, c.Avail); err != nil {
		return err
	}
	if q.availIdx, err = halfAt(m, c.Avail+2); err != nil {
		return err
	}
	if c.EventIdx {
		if q.usedEvent, err = halfAt(m, c.Avail+4+2*size); err != nil {
			return err
		}
	}
	usedWord, err := halfAt(m, c.Used)
	q.usedWord = usedWord.word
	return err
}

// Logged says whether writes are marked.
func (q *Queue) Logged() bool { return q.cfg.Log != nil }

// Size returns the number of entries.
func (q *Queue) Size() int { return int(q.cfg.Size) }

// Base returns the index of the next available entry as in [Config], the
// answer to GET_VRING_BASE once every chain was put back.
func (q *Queue) Base() uint16 {
	if q.packed != nil {
		return q.packed.next.value()
	}
	return q.next
}

// Sizes of what a queue is made of.
var (
	queueSize  = int(reflect.TypeFor[Queue]().Size())
	packedSize = int(reflect.TypeFor[packed]().Size())
	flightSize = int(reflect.TypeFor[flight]().Size())
)

// Footprint is the memory that the queue has allocated for itself, in bytes,
// without what logging adds.
func (q *Queue) Footprint() int {
	n := queueSize + len(q.table)
	if p := q.packed; p != nil {
		n += packedSize + len(p.flight)*flightSize
	}
	return n
}

// Err tells why the queue is [Broken]; it wraps ErrAvailIndex or ErrHead, of a
// packed ring ErrTaken or ErrChain.
func (q *Queue) Err() error { return q.err }

// LastCause tells why Pop last returned [Bad].
func (q *Queue) LastCause() Cause { return q.cause }
