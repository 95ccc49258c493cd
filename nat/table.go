package nat

// Theory of operation.
//
// The table holds flows in chunks that are allocated when they are first
// needed and never freed, and finds them through an array of chain heads.
// Neither holds a pointer, so the garbage collector does not look at them.
// Every flow is in two chains, three with address-dependent filtering: under
// what the guest's packets carry, under what packets from outside carry, and
// under the outside address alone.
//
// Readers take no lock. They follow a chain and compare two words that hold
// the whole translation; the second also holds the slot's generation and is
// read again after the first, so that a match is always a flow that lived
// while it was looked at. A reader can be led into a foreign chain when the
// slot that it stands on is taken out and used again, and then miss what it
// looks for. So a miss is believed only if the count of removals did not move
// meanwhile; otherwise the reader looks once more under the chain's lock.
// Chains are read for a bounded number of steps.
//
// Writers lock the shards of all the chains that they change, in ascending
// order. A slot is unlinked, then counted as a removal, then free for use: a
// reader that has not seen the new count cannot have started on a chain
// without the slot, and one that has seen it cannot have met the slot.
//
// Limits: the number of slots is fixed, a full table refuses new flows. Hashes
// are keyed by a random seed, so chains cannot be made long from outside.

import (
	"crypto/rand"
	"encoding/binary"
	"math/bits"
	"sync"
	"sync/atomic"

	"sidewire/engine/frame"
)

const (
	chunkSize = 1 << 9 // flows
	maxFlows  = 1 << 20
	numShards = 64
	maxWalk   = 128 // steps that a reader without lock goes along a chain
)

// Chains that a flow is in.
const (
	fromGuest   = iota // guest, protocol, guest's port, remote address and port
	fromOutside        // protocol, external port, remote address and port
	byAddress          // protocol, external port, remote address
	numChains
)

// key is what a chain is searched for. w0 and w1 have the layout of the flow's
// words; m0 and m1 say which bits count.
type key struct {
	w0, w1, m0 uint64
	m1         uint32
	hash       uint64
	chain      uint32
}

// flow is one slot of the table: 128 bytes, two cache lines. What the path of
// a frame reads comes first.
type flow struct {
	// w0: remote address<<32 | guest's port<<16 | external port.
	// w1: generation<<32 | remote port<<16 | guest<<8 | protocol; a free
	// slot's protocol is 0.
	w0, w1 atomic.Uint64
	next   [numChains]atomic.Uint32
	seen   atomic.Uint32 // second of the last packet that counts as use
	queue  atomic.Uint32 // the guest's queue pair that last carried it
	free   uint32        // the next free slot, guarded by table.freeMu
	tcp    atomic.Uint64 // see tcp.go
	acks   [2]atomic.Uint64

	isn     [2]atomic.Uint32
	packets [2]atomic.Uint64
	bytes   [2]atomic.Uint64
	born    atomic.Uint32
	pinned  atomic.Uint32 // 1: holds a reference to its external port
	_       [16]byte
}

type chunk [chunkSize]flow

// hopChunk holds the next hops of a chunk's flows, apart from them because
// they are pointers.
type hopChunk [chunkSize]atomic.Pointer[frame.Hop]

type shard struct {
	mu sync.Mutex // guards the chains whose number ends in the shard's
	_  [56]byte
}

type table struct {
	seed    [2]uint64
	heads   []atomic.Uint32 // slot*4 + chain + 1 of the first, 0 is none
	mask    uint64
	chunks  []atomic.Pointer[chunk]
	hops    []atomic.Pointer[hopChunk]
	removed atomic.Uint64
	shards  [numShards]shard

	freeMu sync.Mutex // guards the fields below and chunk allocation
	free   uint32     // first free slot + 1
	limit  uint32
	top    atomic.Uint32 // slots that were ever used
	live   atomic.Int32
}

func (t *table) init(limit int) {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	t.seed = [2]uint64{binary.LittleEndian.Uint64(b[:]), binary.LittleEndian.Uint64(b[8:])}
	n := max(2*limit, numShards)
	n = 1 << bits.Len(uint(n-1))
	t.heads, t.mask = make([]atomic.Uint32, n), uint64(n-1)
	chunks := (limit + chunkSize - 1) / chunkSize
	t.chunks = make([]atomic.Pointer[chunk], chunks)
	t.hops = make([]atomic.Pointer[hopChunk], chunks)
	t.limit = uint32(limit)
}

func (t *table) at(slot uint32) *flow {
	return &t.chunks[slot/chunkSize].Load()[slot%chunkSize]
}

func (t *table) hop(slot uint32) *atomic.Pointer[frame.Hop] {
	return &t.hops[slot/chunkSize].Load()[slot%chunkSize]
}

func (t *table) mix(a, b uint64) uint64 {
	hi, lo := bits.Mul64(a^t.seed[0], b^t.seed[1])
	return hi ^ lo
}

// tuple is a flow's identity, with ports in the sense of flow.go.
type tuple struct {
	remote              uint32
	remotePort          uint16
	guestPort, external uint16
	guest, proto        uint8
}

func (u tuple) words() (w0 uint64, low uint32) {
	return uint64(u.remote)<<32 | uint64(u.guestPort)<<16 | uint64(u.external),
		uint32(u.remotePort)<<16 | uint32(u.guest)<<8 | uint32(u.proto)
}

func tupleOf(w0, w1 uint64) tuple {
	return tuple{remote: uint32(w0 >> 32), remotePort: uint16(w1 >> 16), guestPort: uint16(w0 >> 16),
		external: uint16(w0), guest: uint8(w1 >> 8), proto: uint8(w1)}
}

// guestKey is the key of what the guest sends; u.external does not matter.
func (t *table) guestKey(u tuple) key {
	w0, low := u.words()
	k := key{w0: w0 &^ 0xffff, w1: uint64(low), m0: ^uint64(0xffff), m1: ^uint32(0), chain: fromGuest}
	k.hash = t.mix(k.w0, k.w1|1<<32)
	return k
}

// outsideKey is the key of what comes from outside; guest and u.guestPort do
// not matter.
func (t *table) outsideKey(u tuple) key {
	w0, low := u.words()
	k := key{m0: ^uint64(0xffff0000), m1: 0xffff00ff, chain: fromOutside}
	k.w0, k.w1 = w0&k.m0, uint64(low&k.m1)
	k.hash = t.mix(k.w0, k.w1|2<<32)
	return k
}

// addressKey is the key of the flows that an outside address has with an
// external port.
func (t *table) addressKey(u tuple) key {
	w0, low := u.words()
	k := key{m0: ^uint64(0xffff0000), m1: 0xff, chain: byAddress}
	k.w0, k.w1 = w0&k.m0, uint64(low&k.m1)
	k.hash = t.mix(k.w0, k.w1|3<<32)
	return k
}

// ref is a flow as it was found: the slot and the words that were read. The
// flow may have ended since; the words stay what they were.
type ref struct {
	*flow
	slot   uint32
	w0, w1 uint64
}

func (r *ref) found() bool { return r.flow != nil }

// alive reports whether the flow is still the one that was found.
func (r *ref) alive() bool { return r.flow.w1.Load() == r.w1 }

func (t *table) shardOf(hash uint64) *shard { return &t.shards[hash%numShards] }

// find looks for a flow without taking a lock unless it has to.
func (t *table) find(k *key) ref {
	removed := t.removed.Load()
	r, sure := t.walk(k, maxWalk)
	if r.flow != nil || sure && t.removed.Load() == removed {
		return r
	}
	s := t.shardOf(k.hash)
	s.mu.Lock()
	defer s.mu.Unlock()
	r, _ = t.walk(k, maxFlows*numChains)
	return r
}

// walk follows the chain of k for at most steps slots and reports whether it
// came to an end.
func (t *table) walk(k *key, steps int) (ref, bool) {
	e := t.heads[k.hash&t.mask].Load()
	for ; e != 0; steps-- {
		if steps == 0 {
			return ref{}, false
		}
		slot, chain := (e-1)>>2, (e-1)&3
		f := t.at(slot)
		if chain == k.chain {
			w1 := f.w1.Load()
			if uint32(w1)&k.m1 == uint32(k.w1) {
				w0 := f.w0.Load()
				if w0&k.m0 == k.w0 && f.w1.Load() == w1 {
					return ref{f, slot, w0, w1}, true
				}
			}
		}
		e = f.next[chain].Load()
	}
	return ref{}, true
}

// lockSet locks the shards of up to three chains in ascending order.
type lockSet struct {
	t *table
	n int
	s [numChains]uint64
}

func (t *table) lock(keys []key) (l lockSet) {
	l.t = t
next:
	for i := range keys {
		s := keys[i].hash % numShards
		j := l.n
		for k := range l.n {
			if l.s[k] == s {
				continue next
			}
		}
		for ; j > 0 && l.s[j-1] > s; j-- {
			l.s[j] = l.s[j-1]
		}
		l.s[j] = s
		l.n++
	}
	for i := range l.n {
		t.shards[l.s[i]].mu.Lock()
	}
	return l
}

func (l *lockSet) unlock() {
	for i := range l.n {
		l.t.shards[l.s[i]].mu.Unlock()
	}
}

// keys are all chains that a flow is in; the third only with
// address-dependent filtering.
func (t *table) keys(u tuple, three bool) ([numChains]key, int) {
	ks := [numChains]key{t.guestKey(u), t.outsideKey(u)}
	if !three {
		return ks, 2
	}
	ks[byAddress] = t.addressKey(u)
	return ks, 3
}

// insert adds a flow that fill prepares. It returns the flow that already has
// the guest's or the outside's key instead, with made false, and no flow if
// the table is full.
func (t *table) insert(u tuple, three bool, fill func(f *flow, slot, generation uint32)) (r ref, made bool) {
	ks, n := t.keys(u, three)
	l := t.lock(ks[:n])
	defer l.unlock()
	for i := range 2 {
		if r, _ := t.walk(&ks[i], maxFlows*numChains); r.found() {
			return r, false
		}
	}
	slot, ok := t.alloc()
	if !ok {
		return ref{}, false
	}
	f := t.at(slot)
	generation := uint32(f.w1.Load()>>32) + 1
	fill(f, slot, generation)
	w0, low := u.words()
	w1 := uint64(generation)<<32 | uint64(low)
	f.w0.Store(w0)
	f.w1.Store(w1)
	for i := range ks[:n] {
		h := &t.heads[ks[i].hash&t.mask]
		f.next[i].Store(h.Load())
		h.Store(slot<<2 + uint32(i) + 1)
	}
	t.live.Add(1)
	return ref{f, slot, w0, w1}, true
}

// remove takes a flow out, if it is still there and expired agrees, which is
// asked under the locks.
func (t *table) remove(r ref, three bool, expired func(f *flow) bool) bool {
	ks, n := t.keys(tupleOf(r.w0, r.w1), three)
	l := t.lock(ks[:n])
	defer l.unlock()
	if !r.alive() || !expired(r.flow) {
		return false
	}
	r.w1 &= 0xffffffff << 32
	r.flow.w1.Store(r.w1)
	for i := range ks[:n] {
		t.unlink(&ks[i], r.slot<<2+uint32(i)+1)
	}
	t.removed.Add(1)
	t.hop(r.slot).Store(nil)
	t.live.Add(-1)
	t.freeMu.Lock()
	defer t.freeMu.Unlock()
	r.flow.free, t.free = t.free, r.slot+1
	return true
}

func (t *table) unlink(k *key, entry uint32) {
	p := &t.heads[k.hash&t.mask]
	for e := p.Load(); e != 0; e = p.Load() {
		next := &t.at((e - 1) >> 2).next[(e-1)&3]
		if e == entry {
			p.Store(next.Load())
			return
		}
		p = next
	}
}

// alloc returns a free slot, making room if there is none yet.
func (t *table) alloc() (uint32, bool) {
	t.freeMu.Lock()
	defer t.freeMu.Unlock()
	if t.free != 0 {
		slot := t.free - 1
		t.free = t.at(slot).free
		return slot, true
	}
	slot := t.top.Load()
	if slot >= t.limit {
		return 0, false
	}
	if slot%chunkSize == 0 {
		t.hops[slot/chunkSize].Store(new(hopChunk))
		t.chunks[slot/chunkSize].Store(new(chunk))
	}
	t.top.Store(slot + 1)
	return slot, true
}
