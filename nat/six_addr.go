package nat

import (
	"crypto/rand"
	"encoding/binary"
	"math/bits"
	"sync"
	"sync/atomic"
)

// Addr6 is an IPv6 address.
type Addr6 = [16]byte

// addrTable gives remote IPv6 addresses numbers of 32 bits, which stand for them
// in the flow table. An address keeps its number as long as a flow refers to it.
//
// Readers take no lock: they follow a chain and compare both halves of the
// address. A number may pass to another address while it is looked at, so who
// has found a flow by it asks again whether it is still that address's (is): as
// long as the flow lives, so does what it refers to.
type addrTable struct {
	seed    [2]uint64
	heads   []atomic.Uint32 // number of the first, 0 is none
	mask    uint64
	chunks  []atomic.Pointer[addrChunk]
	removed atomic.Uint64

	mu    sync.Mutex // guards everything below, and all writes
	free  uint32     // first free slot + 1
	top   uint32     // slots that were ever used
	limit uint32
}

const addrChunkSize = 1 << 8

type addrChunk [addrChunkSize]addrSlot

type addrSlot struct {
	hi, lo atomic.Uint64
	next   atomic.Uint32 // number of the next in the chain, or of the next free one
	refs   uint32        // flows, guarded by mu
}

func (t *addrTable) init(limit int) {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	t.seed = [2]uint64{binary.LittleEndian.Uint64(b[:]), binary.LittleEndian.Uint64(b[8:])}
	n := 1 << bits.Len(uint(max(limit, 64)-1))
	t.heads, t.mask = make([]atomic.Uint32, n), uint64(n-1)
	t.chunks = make([]atomic.Pointer[addrChunk], (limit+addrChunkSize-1)/addrChunkSize)
	t.limit = uint32(limit)
}

// at is the slot of a number.
func (t *addrTable) at(id uint32) *addrSlot {
	return &t.chunks[(id-1)/addrChunkSize].Load()[(id-1)%addrChunkSize]
}

func halves(a *Addr6) (hi, lo uint64) {
	return binary.BigEndian.Uint64(a[:8]), binary.BigEndian.Uint64(a[8:])
}

// hash is keyed: chains cannot be made long from outside.
func (t *addrTable) hash(hi, lo uint64) uint64 {
	h, l := bits.Mul64(hi^t.seed[0], lo^t.seed[1])
	h2, l2 := bits.Mul64(h^l^t.seed[1], hi+t.seed[0]|1)
	return h2 ^ l2
}

// find returns the number of an address, 0 if it has none.
func (t *addrTable) find(a *Addr6) uint32 {
	hi, lo := halves(a)
	h := t.hash(hi, lo)
	removed := t.removed.Load()
	if id, sure := t.walk(h, hi, lo, maxWalk); id != 0 || sure && t.removed.Load() == removed {
		return id
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	id, _ := t.walk(h, hi, lo, maxFlows)
	return id
}

func (t *addrTable) walk(h, hi, lo uint64, steps int) (id uint32, sure bool) {
	for id = t.heads[h&t.mask].Load(); id != 0; steps-- {
		if steps == 0 {
			return 0, false
		}
		s := t.at(id)
		if s.lo.Load() == lo && s.hi.Load() == hi {
			return id, true
		}
		id = s.next.Load()
	}
	return 0, true
}

// is says whether a number is that of an address.
func (t *addrTable) is(id uint32, a *Addr6) bool {
	hi, lo := halves(a)
	s := t.at(id)
	return s.hi.Load() == hi && s.lo.Load() == lo
}

// address is what a number stands for.
func (t *addrTable) address(id uint32) (a Addr6) {
	s := t.at(id)
	binary.BigEndian.PutUint64(a[:8], s.hi.Load())
	binary.BigEndian.PutUint64(a[8:], s.lo.Load())
	return a
}

// acquire returns the number of an address with one more reference, 0 if the
// table is full.
func (t *addrTable) acquire(a *Addr6) uint32 {
	hi, lo := halves(a)
	h := t.hash(hi, lo)
	t.mu.Lock()
	defer t.mu.Unlock()
	if id, _ := t.walk(h, hi, lo, maxFlows); id != 0 {
		t.at(id).refs++
		return id
	}
	id := t.alloc()
	if id == 0 {
		return 0
	}
	s, head := t.at(id), &t.heads[h&t.mask]
	s.refs = 1
	s.hi.Store(hi)
	s.lo.Store(lo)
	s.next.Store(head.Load())
	head.Store(id)
	return id
}

// alloc returns a free number. The caller holds mu.
func (t *addrTable) alloc() uint32 {
	if id := t.free; id != 0 {
		t.free = t.at(id).next.Load()
		return id
	}
	if t.top >= t.limit {
		return 0
	}
	if c := &t.chunks[t.top/addrChunkSize]; c.Load() == nil {
		c.Store(new(addrChunk))
	}
	t.top++
	return t.top
}

// release gives back a reference.
func (t *addrTable) release(id uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.at(id)
	if s.refs--; s.refs > 0 {
		return
	}
	p := &t.heads[t.hash(s.hi.Load(), s.lo.Load())&t.mask]
	for p.Load() != id {
		p = &t.at(p.Load()).next
	}
	p.Store(s.next.Load())
	// The unspecified address is nobody's remote one.
	s.hi.Store(0)
	s.lo.Store(0)
	t.removed.Add(1)
	s.next.Store(t.free)
	t.free = id
}
