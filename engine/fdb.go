package engine

import (
	"fmt"
	"math/bits"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"

	"sidewire/engine/frame"
)

// Theory of operation.
//
// The forwarding database says behind which port an address was seen last, in
// each VLAN by itself. Workers read it for every frame and write to it when a
// station is new, has moved, or was not seen in this second yet.
//
// A table is an array of slots, searched linearly from where the key's hash
// points to. A slot gets its key once and keeps it as long as the table lives:
// removal only empties the value. So whoever finds his key in a slot may read
// its value without a lock or a second look at the key: it is this station's
// or empty, never another's. The price is that slots are used up, and a new
// table is made when half of them are; the control plane does that
// (Switch.Run), never a worker.
//
// Values change by compare-and-swap, because workers set the second of last
// sight without the lock. All else is done under mu. Workers only try to take
// it: who finds it taken learns from the next frame instead.
//
// A port may own a limited number of addresses. It keeps a list of the slots
// that they are in, and the value holds the position in that list. When it is
// full, the address that was quiet for longest among the next few makes room:
// a port evicts only its own. New addresses are counted by the second, too, so
// that a flood of them cannot use up the slots before the next table is made.

const (
	minSlots = 1 << 10
	maxProbe = 32
	// maxOwned is how many addresses a port can own: positions have 16 bits.
	maxOwned = pinnedPos
	// pinnedPos is the position of an address that its port was configured
	// with. It does not age, is in no list and cannot move.
	pinnedPos = 0xffff
	// minLearn is how often a port may try to learn in a second at least; it
	// may as often as it may own addresses.
	minLearn = 256
	// samples is how many addresses are looked at to find a quiet one.
	samples = 8
)

// fdbKey makes the key of an address in the upper 48 bits of w in a VLAN.
// Address 0 is never learned, so the key 0 marks a free slot.
func fdbKey(w uint64, vlan uint16) uint64 { return w&^0xffff | uint64(vlan) }

// macKey is the key of an address in a VLAN.
func macKey(m frame.MAC, vlan uint16) uint64 {
	return uint64(m[0])<<56 | uint64(m[1])<<48 | uint64(m[2])<<40 | uint64(m[3])<<32 |
		uint64(m[4])<<24 | uint64(m[5])<<16 | uint64(vlan)
}

// noKey is no address's key.
const noKey = ^uint64(0)

// keyMAC is the address of a key.
func keyMAC(k uint64) frame.MAC {
	return frame.MAC{byte(k >> 56), byte(k >> 48), byte(k >> 40), byte(k >> 32), byte(k >> 24), byte(k >> 16)}
}

// station is a slot's value: the second of last sight, the position in the
// list of the port, the port. 0 is none.
type station uint64

func newStation(port frame.PortID, pos int, sec uint32) station {
	return station(sec)<<32 | station(pos)<<16 | station(port)
}

func (v station) port() frame.PortID { return frame.PortID(v) }
func (v station) pos() int           { return int(v >> 16 & 0xffff) }
func (v station) sec() uint32        { return uint32(v >> 32) }
func (v station) pinned() bool       { return v.pos() == pinnedPos }

// expired says whether the station was silent for longer than age seconds.
func (v station) expired(sec, age uint32) bool {
	return int32(sec-v.sec()) > int32(age) && !v.pinned()
}

// slot is one address. Its key is written once, after its value.
type slot struct {
	key, val atomic.Uint64
}

// fdbTable is a table of slots. Its length is a power of 2.
type fdbTable struct {
	slots []slot
	mul   uint64 // odd and random: nobody can choose addresses that collide
	shift uint

	// Under fdb.mu.
	used int  // slots that have a key
	bad  bool // an address found no slot near enough
}

func newTable(n int) *fdbTable {
	return &fdbTable{slots: make([]slot, n), mul: rand.Uint64() | 1, shift: uint(64 - bits.TrailingZeros(uint(n)))}
}

// lookup returns the station of a key, or 0. It is safe for concurrent use.
func (t *fdbTable) lookup(key uint64) station {
	i := key * t.mul >> t.shift
	for range maxProbe {
		s := &t.slots[i&uint64(len(t.slots)-1)]
		switch s.key.Load() {
		case key:
			return station(s.val.Load())
		case 0:
			return 0
		}
		i++
	}
	return 0
}

// find returns the slot of a key, or the free one where it belongs, or -1.
func (t *fdbTable) find(key uint64) (i int, found bool) {
	h := key * t.mul >> t.shift
	for n := range uint64(maxProbe) {
		i := (h + n) & uint64(len(t.slots)-1)
		switch t.slots[i].key.Load() {
		case key:
			return int(i), true
		case 0:
			return int(i), false
		}
	}
	return -1, false
}

// refresh notes that the station of a key, which had the value v, was seen in
// the second sec.
func (t *fdbTable) refresh(key uint64, v station, sec uint32) {
	i, ok := t.find(key)
	if !ok {
		return
	}
	// If somebody else changed it meanwhile, it is fresh or gone.
	t.slots[i].val.CompareAndSwap(uint64(v), uint64(v)&0xffffffff|uint64(sec)<<32)
}

// owner is what the FDB knows of a port.
type owner struct {
	id    frame.PortID
	limit int
	vlans *vlanSet // where the port is a member

	// Under fdb.mu.
	owned []uint32 // the slots of the port's addresses
	hand  int      // where to look for a quiet address next
	gone  bool     // the port was removed and must not learn any more

	// learned counts the attempts to learn in the second sec.
	sec     atomic.Uint32
	learned atomic.Int32
}

// mayLearn counts one more attempt to learn in this second, and says whether
// it is one too many.
func (o *owner) mayLearn(sec uint32) bool {
	if int32(sec-o.sec.Load()) > 0 {
		o.sec.Store(sec)
		o.learned.Store(0)
	}
	limit := int32(max(o.limit, minLearn))
	return o.learned.Load() < limit && o.learned.Add(1) <= limit
}

// verdict is what became of an attempt to learn an address.
type verdict uint8

const (
	learnedNew verdict = iota
	learnedMove
	learnedEvict // new, at the cost of another one of the port's
	notLearned   // the lock was taken, or there is no room just now
	notAllowed   // it is pinned to another port
)

// fdb is the forwarding database of one switch.
type fdb struct {
	table atomic.Pointer[fdbTable]
	age   uint32        // seconds
	wake  chan struct{} // tells Switch.Run that there is something to do

	mu     sync.Mutex // guards everything but the values of slots
	owners map[frame.PortID]*owner
	pins   map[uint64][]*owner // whom an address is pinned to, by macKey without VLAN
	live   int                 // stations that are not pinned
}

func newFDB(age uint32) *fdb {
	d := &fdb{
		age: age, wake: make(chan struct{}, 1),
		owners: map[frame.PortID]*owner{}, pins: map[uint64][]*owner{},
	}
	d.table.Store(newTable(minSlots))
	return d
}

// learn makes o the owner of the address of a key. A worker may call it: it
// does not wait.
func (d *fdb) learn(key uint64, o *owner, sec uint32) verdict {
	if !o.mayLearn(sec) || !d.mu.TryLock() {
		return notLearned
	}
	defer d.mu.Unlock()
	if o.gone {
		return notLearned
	}
	for _, p := range d.pins[key&^0xffff] {
		if p != o && p.vlans.has(uint16(key)) {
			return notAllowed
		}
	}
	t := d.table.Load()
	i, found := t.find(key)
	if i < 0 || !found && t.used >= len(t.slots)/4*3 {
		t.bad = true
		d.notify()
		return notLearned
	}
	s := &t.slots[i]
	old := station(s.val.Load())
	if old.port() == o.id {
		return notLearned // another worker was faster
	}
	result := learnedNew
	if old != 0 {
		result = learnedMove
		d.disown(t, old)
	}
	if len(o.owned) >= o.limit {
		d.remove(t, o.quiet(t))
		if result == learnedNew {
			result = learnedEvict
		}
	}
	if d.live == 0 {
		d.notify() // to begin with ageing
	}
	d.live++
	o.owned = append(o.owned, uint32(i))
	s.val.Store(uint64(newStation(o.id, len(o.owned)-1, sec)))
	if !found {
		s.key.Store(key)
		if t.used++; t.used == len(t.slots)/2 {
			d.notify()
		}
	}
	return result
}

// notify lets Switch.Run look at the table.
func (d *fdb) notify() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// quiet returns the slot of one of the port's addresses that was not seen for
// long.
func (o *owner) quiet(t *fdbTable) (slot int) {
	var oldest uint32
	for n := range samples {
		at := (o.hand + n) % len(o.owned)
		i := int(o.owned[at])
		if sec := station(t.slots[i].val.Load()).sec(); n == 0 || int32(sec-oldest) < 0 {
			slot, oldest = i, sec
		}
	}
	o.hand = (o.hand + 1) % len(o.owned)
	return slot
}

// remove empties a slot that holds a station which is not pinned.
func (d *fdb) remove(t *fdbTable, i int) {
	d.disown(t, station(t.slots[i].val.Swap(0)))
}

// disown takes a station that is no more out of its port's list.
func (d *fdb) disown(t *fdbTable, v station) {
	o := d.owners[v.port()]
	last := len(o.owned) - 1
	moved := o.owned[last]
	o.owned = o.owned[:last]
	d.live--
	if v.pos() == last {
		return
	}
	o.owned[v.pos()] = moved
	s := &t.slots[moved]
	for {
		old := s.val.Load()
		if s.val.CompareAndSwap(old, uint64(newStation(o.id, v.pos(), station(old).sec()))) {
			return
		}
	}
}

// addOwner lets a port learn at most limit addresses.
func (d *fdb) addOwner(id frame.PortID, limit int, vlans *vlanSet) *owner {
	d.mu.Lock()
	defer d.mu.Unlock()
	limit = min(limit, maxOwned)
	o := &owner{id: id, limit: limit, vlans: vlans, owned: make([]uint32, 0, limit)}
	d.owners[id] = o
	return o
}

// pin gives an address to a port for as long as it is there, in all its VLANs.
// Other ports that have it lose it. It is known at once in the VLAN native.
func (d *fdb) pin(o *owner, m frame.MAC, native uint16) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	any := macKey(m, 0)
	for _, p := range d.pins[any] {
		if p.vlans.meets(o.vlans) {
			return fmt.Errorf("port %d has the address %s already", p.id, m)
		}
	}
	d.pins[any] = append(d.pins[any], o)
	t := d.table.Load()
	for i := range t.slots {
		k, v := t.slots[i].key.Load(), station(t.slots[i].val.Load())
		if k&^0xffff == any && v != 0 && o.vlans.has(uint16(k)) {
			d.remove(t, i)
		}
	}
	if !o.vlans.has(native) {
		return nil
	}
	key := macKey(m, native)
	i, found := t.find(key)
	for i < 0 {
		t = d.rebuild(2 * len(t.slots))
		i, found = t.find(key)
	}
	t.slots[i].val.Store(uint64(newStation(o.id, pinnedPos, 0)))
	if !found {
		t.slots[i].key.Store(key)
		t.used++
	}
	d.tidy()
	return nil
}

// removeOwner forgets a port and its addresses.
func (d *fdb) removeOwner(o *owner) {
	d.mu.Lock()
	defer d.mu.Unlock()
	o.gone = true
	delete(d.owners, o.id)
	for any, owners := range d.pins {
		owners = slices.DeleteFunc(owners, func(p *owner) bool { return p == o })
		if d.pins[any] = owners; len(owners) == 0 {
			delete(d.pins, any)
		}
	}
	t := d.table.Load()
	for i := range t.slots {
		if s := &t.slots[i]; station(s.val.Load()).port() == o.id {
			s.val.Store(0)
		}
	}
	d.live -= len(o.owned)
	o.owned = nil
	d.tidy()
}

// sweep removes the stations that have not been seen for too long, and makes a
// new table if this one is too full or too large. It reports whether there
// are stations left that may age.
func (d *fdb) sweep(sec uint32) (more bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	t := d.table.Load()
	if d.live > 0 {
		for i := range t.slots {
			s := &t.slots[i]
			v := s.val.Load()
			if v == 0 || !station(v).expired(sec, d.age) {
				continue
			}
			if s.val.CompareAndSwap(v, 0) { // else it was seen just now
				d.disown(t, station(v))
			}
		}
	}
	d.tidy()
	return d.live > 0
}

// tidy makes a new table if that is due.
func (d *fdb) tidy() {
	t := d.table.Load()
	live := d.live + len(d.pins)
	want := minSlots
	for want < 4*live {
		want *= 2
	}
	switch {
	case t.bad && t.used < len(t.slots)/4:
		d.rebuild(len(t.slots)) // bad luck with the hash
	case t.used >= len(t.slots)/2 || t.bad:
		d.rebuild(max(want, minSlots))
	case want < len(t.slots)/4:
		d.rebuild(want)
	}
}

// rebuild puts all stations into a new table of at least n slots and
// publishes it. A sight of this second may get lost.
func (d *fdb) rebuild(n int) *fdbTable {
	from := d.table.Load()
	for ; ; n *= 2 {
		for range 4 {
			if t := newTable(n); d.copyTo(t, from) {
				d.table.Store(t)
				return t
			}
		}
	}
}

// copyTo fills an empty table, and the lists of the ports with its slots. It
// reports false if an address does not find room.
func (d *fdb) copyTo(t, from *fdbTable) bool {
	for i := range from.slots {
		v := station(from.slots[i].val.Load())
		if v == 0 {
			continue
		}
		key := from.slots[i].key.Load()
		at, _ := t.find(key)
		if at < 0 {
			return false
		}
		t.slots[at].val.Store(uint64(v))
		t.slots[at].key.Store(key)
		t.used++
		if !v.pinned() {
			d.owners[v.port()].owned[v.pos()] = uint32(at)
		}
	}
	return true
}
