package engine

import (
	"encoding/binary"
	"math/bits"
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"

	"sidewire/engine/frame"
)

const (
	defaultNATAddresses = 256
	natWays             = 8
	// natRate is how many IP addresses a guest may show in a second.
	natRate = 256
)

// natKey is an IP address in a VLAN: an IPv4 address as an IPv4-mapped one.
type natKey struct {
	hi, lo uint64
	vlan   uint16
}

const mapped4 = 0xffff << 32

func key4(b []byte, vlan uint16) natKey {
	return natKey{0, mapped4 | uint64(binary.BigEndian.Uint32(b)), vlan}
}

func key6(b []byte, vlan uint16) natKey {
	return natKey{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:]), vlan}
}

// is4 says whether the key is that of an IPv4 address, or of an IPv6 address
// that cannot be on a wire.
func (k natKey) is4() bool { return k.hi == 0 && k.lo>>32 == mapped4>>32 }

// unicast says whether one station can have the address.
func (k natKey) unicast() bool {
	if k.is4() {
		a := uint32(k.lo)
		return a>>24 != 0 && a>>24 != 127 && a>>28 < 14
	}
	return k.hi>>56 != 0xff && (k.hi != 0 || k.lo > 1)
}

// addr is the key's address.
func (k natKey) addr() netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:], k.hi)
	binary.BigEndian.PutUint64(b[8:], k.lo)
	return netip.AddrFrom16(b).Unmap()
}

// natEntry says whose an IP address is. But for sec it is never changed, so that
// readers need no lock.
type natEntry struct {
	key   natKey
	mac   uint64
	owner *natOwner
	sec   atomic.Uint32 // when it was seen last
	pos   int           // in the owner's list; under natTable.mu
	slot  int
}

// natOwner is what one port of the engine has shown.
type natOwner struct {
	list  []*natEntry
	hand  int // where to look for a quiet one next
	sec   uint32
	tries int // to learn in that second
}

// natTable says which guest has which IP address. It is an array of sets, each
// of which can hold natWays of the addresses whose hash names it; there are twice
// as many places as addresses that guests may show. Workers read it without a
// lock and only try to take the one for changes: who finds it taken learns from
// the next frame.
type natTable struct {
	slots   []atomic.Pointer[natEntry]
	seed    [2]uint64 // nobody can choose addresses that collide
	shift   uint
	limit   int // addresses of each owner
	age     uint32
	changed chan struct{}

	moved, refused atomic.Uint64

	mu     sync.Mutex // guards owners and what they have
	owners map[frame.PortID]*natOwner
}

func newNATTable(guests, limit int, age uint32) *natTable {
	sets := 1 << bits.Len(uint(max(2*guests*limit/natWays, 2)-1))
	return &natTable{
		slots: make([]atomic.Pointer[natEntry], sets*natWays), seed: [2]uint64{rand.Uint64(), rand.Uint64()},
		shift: uint(64 - bits.TrailingZeros(uint(sets))), limit: limit, age: age,
		changed: make(chan struct{}, 1), owners: map[frame.PortID]*natOwner{},
	}
}

// set returns where the set of a key begins.
func (t *natTable) set(k natKey) int {
	hi, lo := bits.Mul64(k.hi^t.seed[0], k.lo^t.seed[1]^uint64(k.vlan)<<48)
	return int((hi^lo)>>t.shift) * natWays
}

// lookup returns the entry of a key, or nil. It is safe for concurrent use.
func (t *natTable) lookup(k natKey) *natEntry {
	at := t.set(k)
	set := t.slots[at : at+natWays]
	for i := range set {
		if e := set[i].Load(); e != nil && e.key == k {
			return e
		}
	}
	return nil
}

// learn notes that the station mac behind a port has the address k. It does not
// wait.
func (t *natTable) learn(k natKey, mac uint64, in frame.PortID, sec uint32) {
	if !t.mu.TryLock() {
		return
	}
	defer t.mu.Unlock()
	o := t.owner(in)
	if o.sec != sec {
		o.sec, o.tries = sec, 0
	}
	if o.tries++; o.tries > natRate {
		t.refused.Add(1)
		return
	}
	if old := t.lookup(k); old != nil {
		if old.mac == mac {
			return // another worker was faster
		}
		if old.owner != o {
			t.moved.Add(1)
		}
		t.remove(old)
	}
	if len(o.list) >= t.limit {
		t.remove(o.quiet())
	}
	slot := t.room(k, o, sec)
	if slot < 0 {
		t.refused.Add(1)
		return
	}
	e := &natEntry{key: k, mac: mac, owner: o, pos: len(o.list), slot: slot}
	e.sec.Store(sec)
	o.list = append(o.list, e)
	t.slots[slot].Store(e)
	t.notify()
}

func (t *natTable) notify() {
	select {
	case t.changed <- struct{}{}:
	default:
	}
}

func (t *natTable) owner(in frame.PortID) *natOwner {
	o := t.owners[in]
	if o == nil {
		o = &natOwner{}
		t.owners[in] = o
	}
	return o
}

// room returns a place in the set of a key: a free one, or that of an address
// which is too old, or of the owner's own. It is -1 if others have all of them.
func (t *natTable) room(k natKey, o *natOwner, sec uint32) int {
	at := t.set(k)
	var mine *natEntry
	for i := at; i < at+natWays; i++ {
		e := t.slots[i].Load()
		if e == nil {
			return i
		}
		if int32(sec-e.sec.Load()) > int32(t.age) {
			t.remove(e)
			return i
		}
		if e.owner == o && (mine == nil || int32(e.sec.Load()-mine.sec.Load()) < 0) {
			mine = e
		}
	}
	if mine == nil {
		return -1
	}
	t.remove(mine)
	return mine.slot
}

// quiet returns one of the owner's addresses that was not seen for long.
func (o *natOwner) quiet() (found *natEntry) {
	for n := range min(samples, len(o.list)) {
		e := o.list[(o.hand+n)%len(o.list)]
		if found == nil || int32(e.sec.Load()-found.sec.Load()) < 0 {
			found = e
		}
	}
	o.hand = (o.hand + 1) % len(o.list)
	return found
}

func (t *natTable) remove(e *natEntry) {
	t.slots[e.slot].Store(nil)
	o := e.owner
	last := o.list[len(o.list)-1]
	o.list[e.pos], last.pos = last, e.pos
	o.list[len(o.list)-1] = nil
	o.list = o.list[:len(o.list)-1]
	t.notify()
}

func (t *natTable) stats() MACNATStats {
	t.mu.Lock()
	defer t.mu.Unlock()
	st := MACNATStats{Moved: t.moved.Load(), Refused: t.refused.Load()}
	for _, o := range t.owners {
		st.Addresses += len(o.list)
	}
	return st
}

func (t *natTable) each(yield func(netip.Addr, frame.MAC) bool) {
	for i := range t.slots {
		if e := t.slots[i].Load(); e != nil && !yield(e.key.addr(), keyMAC(e.mac)) {
			return
		}
	}
}
