package vhosttest

import (
	"errors"
	"fmt"
	"time"

	"sidewire/engine/frame"
)

// Reaction is what a sound backend does about a hostile input.
type Reaction uint8

// The reactions. All of them leave the connection and the other rings alone.
const (
	// Returned: the chain comes back, with length 0 from a tx ring, and the
	// ring works on.
	Returned Reaction = iota
	// Stopped: the ring is not served any more until it is set up again, and
	// its error descriptor is signalled.
	Stopped
)

// Attack is one hostile input on a ring, named by its number in the list of
// them.
type Attack struct {
	No, Name string
	Want     Reaction
	Indirect bool   // makes sense only with INDIRECT_DESC
	On       Layout // the rings on which it makes sense
	// post writes the chain that begins at descriptor 0 and may stage it.
	post func(a *attacker)
}

// Layout is a kind of ring, or any.
type Layout uint8

// The layouts.
const (
	AnyRing Layout = iota
	SplitRing
	PackedRing
)

// Suits says whether an attack makes sense with these features.
func (a Attack) Suits(features uint64) bool {
	if a.Indirect && features&FeatIndirect == 0 {
		return false
	}
	packed := features&FeatRingPacked != 0
	return a.On == AnyRing || packed == (a.On == PackedRing)
}

// attacker is what a post needs. The ring has nothing in flight.
type attacker struct {
	*Ring
	n      int    // descriptors of the ring
	buf    uint64 // a buffer of 64 KiB that holds a valid frame behind its header
	len    uint32 // of header and frame
	hdr    uint32
	table  uint64 // room for an indirect table of 64 KiB
	end    uint64 // the first guest address behind memory
	posted bool
	id     uint16 // what comes back, if the chain does
}

const attackRoom = 1 << 16

// TxAttacks are hostile inputs for a tx ring.
func TxAttacks() []Attack {
	return []Attack{
		{No: "H049", On: SplitRing, Name: "avail index 5000 ahead", Want: Stopped, post: func(a *attacker) { a.jump(5000) }},
		{No: "H049", On: SplitRing, Name: "avail index 32768 ahead", Want: Stopped, post: func(a *attacker) { a.jump(1 << 15) }},
		{No: "H049", On: SplitRing, Name: "avail index one more than the ring", Want: Stopped, post: func(a *attacker) { a.jump(uint16(a.n + 1)) }},
		{No: "H049", On: SplitRing, Name: "avail index backwards", Want: Stopped, post: func(a *attacker) { a.jump(0xffff) }},
		{No: "H050", On: SplitRing, Name: "head is ring size", Want: Stopped, post: func(a *attacker) { a.head(uint16(a.n)) }},
		{No: "H050", On: SplitRing, Name: "head 65535", Want: Stopped, post: func(a *attacker) { a.head(0xffff) }},
		{No: "H051", On: SplitRing, Name: "descriptor links to itself", post: func(a *attacker) { a.d(0, DescNext, 0) }},
		{No: "H051", On: SplitRing, Name: "loop of 2", post: func(a *attacker) { a.d(0, DescNext, 1); a.d(1, DescNext, 0) }},
		{No: "H051", On: SplitRing, Name: "loop of the whole ring", post: func(a *attacker) {
			for i := range a.n {
				a.d(i, DescNext, uint16((i+1)%a.n))
			}
		}},
		{No: "H052", On: SplitRing, Name: "next is ring size", post: func(a *attacker) { a.d(0, DescNext, uint16(a.n)) }},
		{No: "H052", On: SplitRing, Name: "next 65535", post: func(a *attacker) { a.d(0, DescNext, 0xffff) }},
		{No: "H054", Name: "address 0", post: func(a *attacker) { a.RawDesc(0, 0, a.len, 0, 0) }},
		{No: "H054", Name: "address behind memory", post: func(a *attacker) { a.RawDesc(0, a.end, a.len, 0, 0) }},
		{No: "H054", Name: "address and length overflow", post: func(a *attacker) { a.RawDesc(0, ^uint64(0)-10, a.len, 0, 0) }},
		{No: "H054", Name: "crosses the end of memory", post: func(a *attacker) { a.RawDesc(0, a.end-uint64(a.len)+1, a.len, 0, 0) }},
		{No: "H054", Name: "second descriptor unmapped", post: func(a *attacker) {
			a.d(0, DescNext, 1)
			a.RawDesc(1, a.end+1<<40, 100, 0, 0)
		}},
		{No: "H055", Name: "length 0", post: func(a *attacker) { a.RawDesc(0, a.buf, 0, 0, 0) }},
		{No: "H055", Name: "shorter than a header", post: func(a *attacker) { a.RawDesc(0, a.buf, a.hdr-1, 0, 0) }},
		{No: "H055", Name: "header only", post: func(a *attacker) { a.RawDesc(0, a.buf, a.hdr, 0, 0) }},
		{No: "H055", Name: "frame of 13 bytes", post: func(a *attacker) { a.RawDesc(0, a.buf, a.hdr+13, 0, 0) }},
		{No: "H056", Name: "length 4 GiB-1", post: func(a *attacker) { a.RawDesc(0, a.buf, 0xffffffff, 0, 0) }},
		{No: "H056", Name: "64 KiB in every descriptor", post: func(a *attacker) {
			for i := range a.n {
				flags := uint16(DescNext)
				if i == a.n-1 {
					flags = 0
				}
				a.RawDesc(i, a.buf, attackRoom, flags, uint16(i+1))
			}
		}},
		{No: "H057", Name: "writable", post: func(a *attacker) { a.d(0, DescWrite, 0) }},
		{No: "H057", Name: "writable behind readable", post: func(a *attacker) { a.d(0, DescNext, 1); a.d(1, DescWrite, 0) }},
		{No: "H057", Name: "readable behind writable", post: func(a *attacker) { a.d(0, DescWrite|DescNext, 1); a.d(1, 0, 0) }},
		{No: "H058", Name: "table in table", Indirect: true, post: func(a *attacker) {
			a.t(0, a.table, descLen, DescIndirect, 0)
			a.indirect(descLen, 0)
		}},
		{No: "H058", Name: "table of 17 bytes", Indirect: true, post: func(a *attacker) { a.t(0, a.buf, a.len, 0, 0); a.indirect(descLen+1, 0) }},
		{No: "H058", Name: "table of 0 bytes", Indirect: true, post: func(a *attacker) { a.t(0, a.buf, a.len, 0, 0); a.indirect(0, 0) }},
		{No: "H058", Name: "table of 4 GiB-16", Indirect: true, post: func(a *attacker) { a.t(0, a.buf, a.len, 0, 0); a.indirect(0xfffffff0, 0) }},
		{No: "H058", Name: "table unmapped", Indirect: true, post: func(a *attacker) { a.RawDesc(0, a.end, descLen, DescIndirect, 0) }},
		{No: "H058", Name: "indirect with next", Indirect: true, post: func(a *attacker) {
			a.t(0, a.buf, a.len, 0, 0)
			a.indirect(descLen, DescNext)
			a.d(1, 0, 0)
		}},
		{No: "H058", On: SplitRing, Name: "loop in the table", Indirect: true, post: func(a *attacker) {
			a.t(0, a.buf, a.len, DescNext, 1)
			a.t(1, a.buf, a.len, DescNext, 0)
			a.indirect(2*descLen, 0)
		}},
		{No: "H058", On: SplitRing, Name: "next past the table", Indirect: true, post: func(a *attacker) {
			a.t(0, a.buf, a.len, DescNext, 1)
			a.indirect(descLen, 0)
		}},
		{No: "H068", On: PackedRing, Name: "id is ring size", post: func(a *attacker) { a.d(0, 0, 0); a.head(uint16(a.n)) }},
		{No: "H068", On: PackedRing, Name: "id 65535", post: func(a *attacker) { a.d(0, 0, 0); a.head(0xffff) }},
		{No: "H068", On: PackedRing, Name: "flags without a meaning", post: func(a *attacker) { a.RawDesc(0, a.end, a.len, 0x7f78, 0) }},
		{No: "H068", On: PackedRing, Name: "no chain behind the flag", Want: Stopped, post: func(a *attacker) { a.d(0, DescNext, 0) }},
		{No: "H068", On: PackedRing, Name: "no end behind two", Want: Stopped, post: func(a *attacker) { a.d(0, DescNext, 0); a.d(1, DescNext, 0) }},
		{No: "H068", On: PackedRing, Name: "chain without end", Want: Stopped, post: func(a *attacker) {
			for i := range a.n {
				a.d(i, DescNext, 0)
			}
		}},
		{No: "H068", On: PackedRing, Name: "bad chain without end", Want: Stopped, post: func(a *attacker) {
			for i := range a.n {
				a.RawDesc(i, a.end, a.len, DescNext, 0)
			}
		}},
	}
}

// RxAttacks are hostile inputs for an rx ring, which must be the only buffers
// there.
func RxAttacks() []Attack {
	return []Attack{
		{No: "H049", On: SplitRing, Name: "avail index 5000 ahead", Want: Stopped, post: func(a *attacker) { a.jump(5000) }},
		{No: "H050", On: SplitRing, Name: "head is ring size", Want: Stopped, post: func(a *attacker) { a.head(uint16(a.n)) }},
		{No: "H051", On: SplitRing, Name: "descriptor links to itself", post: func(a *attacker) { a.d(0, DescWrite|DescNext, 0) }},
		{No: "H052", On: SplitRing, Name: "next is ring size", post: func(a *attacker) { a.d(0, DescWrite|DescNext, uint16(a.n)) }},
		{No: "H054", Name: "address behind memory", post: func(a *attacker) { a.RawDesc(0, a.end, 2000, DescWrite, 0) }},
		{No: "H054", Name: "crosses the end of memory", post: func(a *attacker) { a.RawDesc(0, a.end-100, 2000, DescWrite, 0) }},
		{No: "H057", Name: "readable", post: func(a *attacker) { a.d(0, 0, 0) }},
		{No: "H057", Name: "readable behind writable", post: func(a *attacker) { a.d(0, DescWrite|DescNext, 1); a.d(1, 0, 0) }},
		{No: "H063", Name: "length 0", post: func(a *attacker) { a.RawDesc(0, a.buf, 0, DescWrite, 0) }},
		{No: "H063", Name: "unmapped buffer in the middle", post: func(a *attacker) {
			a.RawDesc(0, a.buf, 100, DescWrite|DescNext, 1)
			a.RawDesc(1, a.end, 2000, DescWrite|DescNext, 2)
			a.RawDesc(2, a.buf, 2000, DescWrite, 0)
		}},
		{No: "H068", On: PackedRing, Name: "id is ring size", post: func(a *attacker) {
			a.RawDesc(0, a.buf, 2000, DescWrite, 0)
			a.head(uint16(a.n))
		}},
		{No: "H068", On: PackedRing, Name: "no chain behind the flag", Want: Stopped, post: func(a *attacker) { a.d(0, DescWrite|DescNext, 0) }},
		{No: "H068", On: PackedRing, Name: "chain without end", Want: Stopped, post: func(a *attacker) {
			for i := range a.n {
				a.d(i, DescWrite|DescNext, 0)
			}
		}},
	}
}

// d writes descriptor i over the valid frame.
func (a *attacker) d(i int, flags, next uint16) { a.RawDesc(i, a.buf, a.len, flags, next) }

// t writes entry i of the indirect table.
func (a *attacker) t(i int, gpa uint64, n uint32, flags, next uint16) {
	if a.Packed() {
		flags, next = 0, flags
	}
	putDesc(a.mem.At(a.table+uint64(i*descLen), descLen), gpa, n, flags, next)
}

// indirect makes descriptor 0 name n bytes of the table.
func (a *attacker) indirect(n uint32, flags uint16) {
	a.RawDesc(0, a.table, n, DescIndirect|flags, 1)
}

// jump publishes an avail index that is n ahead.
func (a *attacker) jump(n uint16) {
	a.idx += n
	a.posted = true
}

// head stages a head other than 0.
func (a *attacker) head(h uint16) {
	a.RawPost(h)
	a.posted, a.id = true, h
}

// Attack carries out an attack on tx ring q, in which nothing may be in
// flight, and checks the backend's reaction: with Returned the chain has come
// back and the ring goes on; with Stopped its error descriptor was signalled
// and it must be set up again by Revive. valid is a frame that the backend
// would carry.
func (g *Guest) Attack(a Attack, q int, valid []byte, wait time.Duration) error {
	return g.attack(a, g.tx[q], valid, wait)
}

// AttackRx is Attack on rx ring q, which it empties first by setting it up
// again. push makes the backend deliver a frame to it.
func (g *Guest) AttackRx(a Attack, q int, valid []byte, push func() error, wait time.Duration) error {
	b := g.rx[q]
	if _, err := g.GetVringBase(b.Index); err != nil {
		return err
	}
	b.reset()
	if err := g.StartRing(b.Ring); err != nil {
		return err
	}
	x, err := g.stageAttack(a, b, valid)
	if err != nil {
		return err
	}
	if err := push(); err != nil {
		return err
	}
	return g.reaction(a, b, x.id, wait)
}

func (g *Guest) attack(a Attack, b *buffers, valid []byte, wait time.Duration) error {
	if b.InFlight() != 0 {
		return fmt.Errorf("vhosttest: ring %d has chains in flight", b.Index)
	}
	x, err := g.stageAttack(a, b, valid)
	if err != nil {
		return err
	}
	return g.reaction(a, b, x.id, wait)
}

func (g *Guest) stageAttack(a Attack, b *buffers, valid []byte) (x *attacker, err error) {
	if g.attackAt == 0 {
		if g.attackAt, err = g.Mem.Alloc(2*attackRoom, pageSize); err != nil {
			return nil, err
		}
	}
	m := g.Mem.At(g.attackAt, attackRoom)
	clear(m[:g.HdrLen])
	(&frame.Offload{}).Encode(m[:frame.VnetHdrLen])
	copy(m[g.HdrLen:], valid)
	x = &attacker{Ring: b.Ring, n: b.Size, buf: g.attackAt, len: uint32(g.HdrLen + len(valid)), hdr: uint32(g.HdrLen),
		table: g.attackAt + attackRoom, end: g.Mem.GPA + uint64(len(g.Mem.Bytes))}
	drainEventfd(b.Err)
	a.post(x)
	if !x.posted {
		b.RawPost(0)
	}
	b.Publish()
	return x, signal(b.Kick)
}

// reaction waits for what the backend does and compares.
func (g *Guest) reaction(a Attack, b *buffers, want uint16, wait time.Duration) error {
	fail := func(format string, args ...any) error {
		return fmt.Errorf("%w: %s %s: %s", ErrBackend, a.No, a.Name, fmt.Sprintf(format, args...))
	}
	if a.Want == Stopped {
		if err := waitReadable(b.Err, time.Now().Add(wait)); err != nil {
			return fail("error descriptor: %v", err)
		}
	} else {
		if err := b.WaitUsed(wait); err != nil {
			return fail("the chain did not come back: %v", err)
		}
		id, n, ok := b.RawReap()
		if !ok || id != uint32(want) || n != 0 {
			return fail("used element %d with length %d", id, n)
		}
	}
	if err := g.Sync(); err != nil {
		return fail("the connection: %v", err)
	}
	return nil
}

// Revive sets up a ring that was stopped, empty and from index 0 on.
func (g *Guest) Revive(r *Ring) error {
	if _, err := g.GetVringBase(r.Index); err != nil {
		return err
	}
	for _, b := range append(append([]*buffers(nil), g.rx...), g.tx...) {
		if b.Ring == r {
			b.reset()
			if b.write {
				if err := b.fill(); err != nil {
					return err
				}
			}
			return g.StartRing(r)
		}
	}
	return errors.New("vhosttest: not a ring of a queue pair")
}
