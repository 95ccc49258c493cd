package virtq

import (
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/vhostuser/guestmem"
)

func TestNewPackedRefuses(t *testing.T) {
	m, err := guestmem.New(guestmem.FromHeap(0x1000, make([]byte, 0x3000)), guestmem.FromHeap(0x4000, make([]byte, 0x1000)))
	require.NoError(t, err)
	good := Config{Size: 16, Packed: true, Desc: 0x1000, Avail: 0x2000, Used: 0x3000, Base: 1 << 15}
	for _, c := range []struct {
		name string
		set  func(*Config)
		err  error
	}{
		{"sound", func(*Config) {}, nil},
		{"H040 size 0", func(c *Config) { c.Size = 0 }, ErrSize},
		{"H040 size 1", func(c *Config) { c.Size = 1 }, nil},
		{"H040 size 3", func(c *Config) { c.Size = 3 }, nil},
		{"H040 size 32769", func(c *Config) { c.Size = 32769 }, ErrSize},
		{"H040 size 32768, ring too short", func(c *Config) { c.Size = 32768 }, ErrRange},
		{"H041 descriptors unmapped", func(c *Config) { c.Desc = 0 }, ErrRange},
		{"H041 address overflows", func(c *Config) { c.Desc = ^uint64(15) }, ErrRange},
		{"H041 descriptors over two regions", func(c *Config) { c.Desc = 0x3f10 }, ErrRange},
		{"H041 driver area unmapped", func(c *Config) { c.Avail = 0x5000 }, ErrRange},
		{"H041 device area unmapped", func(c *Config) { c.Used = 1 << 60 }, ErrRange},
		{"H041 device area ends the region", func(c *Config) { c.Used = 0x4ffc }, nil},
		{"H041 descriptors misaligned", func(c *Config) { c.Desc += 8 }, ErrAlign},
		{"H041 driver area misaligned", func(c *Config) { c.Avail += 2 }, ErrAlign},
		{"H041 device area misaligned", func(c *Config) { c.Used += 2 }, ErrAlign},
		{"H041 all the same", func(c *Config) { c.Avail, c.Used = c.Desc, c.Desc }, nil},
		{"H043 base behind the ring", func(c *Config) { c.Base += 16 }, ErrBase},
		{"H043 last base", func(c *Config) { c.Base = 15 }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := good
			c.set(&cfg)
			_, err := New(m, cfg)
			require.ErrorIs(t, err, c.err)
		})
	}
	b := make([]byte, 0x1001)
	m, err = guestmem.New(guestmem.FromHeap(0x1000, b[1:]))
	require.NoError(t, err)
	_, err = New(m, Config{Size: 2, Packed: true, Desc: 0x1000, Avail: 0x1100, Used: 0x1200})
	require.ErrorIs(t, err, ErrAlign)
}

// Chains of all lengths go round rings of all sizes, also of no power of two,
// many times, put in order and in any other (H066).
func TestPackedRingGoesRound(t *testing.T) {
	for _, size := range []uint16{1, 2, 3, 7, 16, 100, 255, 256, 32767, 32768} {
		for _, event := range []bool{false, true} {
			d, q := newQueue(t, Config{Size: size, Packed: true, Base: 1<<15 | size - 1, EventIdx: event})
			rng := rand.New(rand.NewPCG(uint64(size), 9))
			id := uint16(0)
			for laps := 0; laps < max(6*int(size), 3000); {
				var want []uint16
				for d.packed.free > 0 && len(want) < 200 {
					n := 1 + rng.IntN(min(d.packed.free, 5))
					var list []desc
					for i := range n {
						v := desc{addr: bufA + uint64(i), len: 1}
						if i < n-1 {
							v.flags = flagNext
						}
						list = append(list, v)
					}
					d.stagePacked(id, list...)
					want = append(want, id)
					id = (id + 1) % size
					laps += n
				}
				require.Zero(t, q.Avail())
				require.Zero(t, q.EnableNotify())
				if event {
					require.Equal(t, eventDesc|uint32(q.Base()), d.deviceEvent())
				}
				d.storePacked()
				require.Equal(t, len(want), q.Avail())
				for _, w := range want {
					c, st := q.Pop(Readable, make([][]byte, 0, 8))
					require.Equal(t, OK, st)
					require.Equal(t, w, c.Head)
				}
				_, st := q.Pop(Readable, make([][]byte, 0, 8))
				require.Equal(t, Empty, st)
				require.Equal(t, d.packed.next.value(), q.Base())
				if rng.IntN(2) == 0 {
					rng.Shuffle(len(want), func(i, j int) { want[i], want[j] = want[j], want[i] })
				}
				for i, w := range want {
					q.Put(w, uint32(i))
				}
				require.Empty(t, d.take(), "not before Publish")
				q.Publish()
				require.True(t, q.NeedsNotify())
				require.False(t, q.NeedsNotify())
				got := d.take()
				require.Len(t, got, len(want))
				for i, e := range got {
					require.Equal(t, elem{uint32(want[i]), uint32(i)}, e)
				}
			}
			require.Zero(t, q.packed.out)
			d.checkZones(t)
		}
	}
}

// Rewind goes back over the ring's end, whole chains at a time.
func TestRewindOverTheWrap(t *testing.T) {
	d, q := newQueue(t, Config{Size: 7, Packed: true, Base: 5})
	long := []desc{{bufA, 1, nx, 0}, {bufA + 1, 1, nx, 0}, {bufA + 2, 1, rd, 0}}
	d.stagePacked(3, desc{bufA, 9, rd, 0})
	d.stagePacked(1, long...)
	d.stagePacked(2, long...)
	d.storePacked()
	pop := func(ids ...uint16) {
		for _, id := range ids {
			c, st := q.Pop(Readable, room())
			require.Equal(t, OK, st)
			require.Equal(t, id, c.Head)
		}
	}
	for range 3 {
		pop(3, 1, 2)
		assert.Equal(t, uint16(1<<15|5), q.Base())
		q.Rewind(3)
		assert.Equal(t, uint16(5), q.Base())
		pop(3, 1)
		q.Rewind(1)
		assert.Equal(t, uint16(6), q.Base())
		pop(1, 2)
		q.Rewind(3)
	}
	pop(3, 1, 2)
	q.Rewind(1)
	q.Put(1, 5) // before the oldest
	q.Put(3, 0)
	pop(2)
	q.Put(2, 0)
	q.Rewind(9) // nothing is in flight
	q.Publish()
	assert.Equal(t, []elem{{1, 5}, {3, 0}, {2, 0}}, d.take())
}

// What no chain in flight has as its id is not put.
func TestPutOfNothing(t *testing.T) {
	d, q := newQueue(t, Config{Size: 4, Packed: true, Base: 1 << 15})
	q.Put(0, 7)
	d.desc(2, desc{bufA, 1, rd, 0})
	d.offer(2)
	c, _ := q.Pop(Readable, room())
	q.Put(1, 0)
	q.Put(c.Head, 0)
	q.Publish()
	assert.Equal(t, []elem{{2, 0}}, d.take())
}

// H068: descriptors that no driver would write.
func TestPackedRingsThatCannotBeFollowed(t *testing.T) {
	both := uint16(flagAvail) // available in the first lap
	for _, c := range []struct {
		name  string
		flags [4]uint16
		ids   [4]uint16
		want  Status
		err   error
		cause Cause
	}{
		{name: "nothing", want: Empty},
		{name: "sound", flags: [4]uint16{both}, want: OK},
		{name: "used flag set too", flags: [4]uint16{flagAvail | flagUsed}, want: Empty},
		{name: "of the other lap", flags: [4]uint16{flagUsed}, want: Empty},
		{name: "other flags mean nothing", flags: [4]uint16{both | 0x7f78}, want: OK},
		{name: "id is the size", flags: [4]uint16{both}, ids: [4]uint16{4}, want: Bad, cause: CauseID},
		{name: "id far off", flags: [4]uint16{both}, ids: [4]uint16{0xffff}, want: Bad, cause: CauseID},
		{name: "id of the last counts", flags: [4]uint16{both | nx, both}, ids: [4]uint16{9, 1}, want: OK},
		{name: "id of the last is wrong", flags: [4]uint16{both | nx, both}, ids: [4]uint16{1, 9}, want: Bad, cause: CauseID},
		{name: "no valid chain behind it", flags: [4]uint16{both | nx}, want: Broken, err: ErrChain},
		{name: "chain goes on in the other lap's", flags: [4]uint16{both | nx, flagUsed}, want: Broken, err: ErrChain},
		{name: "chain of the whole ring", flags: [4]uint16{both | nx, both | nx, both | nx, both}, want: OK},
		{name: "chain without end", flags: [4]uint16{both | nx, both | nx, both | nx, both | nx}, want: Broken, err: ErrChain},
		{name: "bad and without end", flags: [4]uint16{both | wr | nx, both | nx, both | nx, both | nx}, want: Broken, err: ErrChain},
		{name: "wrong direction in the middle", flags: [4]uint16{both | nx, both | nx | wr, both}, ids: [4]uint16{0, 0, 2}, want: Bad, cause: CauseDirection},
		{name: "indirect with NEXT", flags: [4]uint16{both | nx | in, both}, ids: [4]uint16{0, 3}, want: Bad, cause: CauseIndirect},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, q := newQueue(t, Config{Size: 4, Packed: true, Base: 1 << 15, Indirect: true})
			last := 0
			for i := range 4 {
				*d.slot(i) = slot{bufA + uint64(i), 1, uint32(c.ids[i]) | uint32(c.flags[i])<<16}
				if i == last && c.flags[i]&nx != 0 {
					last++
				}
			}
			got, st := q.Pop(Readable, room())
			require.Equal(t, c.want, st)
			require.ErrorIs(t, q.Err(), c.err)
			switch st {
			case Bad:
				assert.Equal(t, c.cause, q.LastCause())
				fallthrough
			case OK:
				assert.Equal(t, c.ids[last], got.Head)
				assert.Equal(t, uint16(1<<15+last+1)%(1<<15+4), q.Base()%(1<<15+4))
				q.Put(got.Head, 0)
				q.Publish()
				assert.Equal(t, uint32(c.ids[last])|flagsOwner<<16, d.slot(0).word)
			case Broken:
				assert.True(t, q.EnableNotify(), "the owner must not sleep on it")
				assert.Zero(t, q.Avail())
				assert.Zero(t, q.PopRun(Readable, make([]Buf, 4)))
				d.slot(0).word = uint32(both) << 16 // it stays so
				_, _, _, st = q.PopBoth(room(), room())
				assert.Equal(t, Broken, st)
				assert.Equal(t, uint16(1<<15), q.Base())
			}
		})
	}
}

// DPDK's driver leaves WRITE in the first entry of a table, where it has the
// header of what it sends. What is received is to be written all the same.
func TestPackedTableFromDPDK(t *testing.T) {
	const table = bufA + 0x100
	for dir, want := range map[Direction]Status{Readable: OK, Writable: Bad} {
		d, q := newQueue(t, Config{Size: 4, Packed: true, Base: 1 << 15, Indirect: true})
		d.entry(table, desc{bufA, 12, wr, 0})
		d.entry(table+16, desc{bufFar, 60, flagAvail, 0})
		d.desc(2, desc{table, 32, in, 0})
		d.offer(2)
		c, st := q.Pop(dir, room())
		require.Equal(t, want, st)
		assert.EqualValues(t, 2, c.Head)
		if st == OK {
			assert.Equal(t, []int{12, 60}, []int{len(c.Segs[0]), len(c.Segs[1])})
		} else {
			assert.Equal(t, CauseDirection, q.LastCause())
		}
	}
}

// H068: the guest lends a descriptor again that it has lent already.
func TestLentTwice(t *testing.T) {
	d, q := newQueue(t, Config{Size: 3, Packed: true, Base: 1 << 15})
	for i := range uint16(3) {
		d.desc(int(i), desc{bufA, 1, rd, 0})
		d.offer(i)
	}
	for range 3 {
		_, st := q.Pop(Readable, room())
		require.Equal(t, OK, st)
	}
	_, st := q.Pop(Readable, room())
	require.Equal(t, Empty, st)
	d.slot(0).word = flagUsed << 16 // available in the second lap
	assert.Zero(t, q.PopRun(Readable, make([]Buf, 4)))
	_, st = q.Pop(Readable, room())
	require.Equal(t, Broken, st)
	require.ErrorIs(t, q.Err(), ErrTaken)

	// A chain that runs into one that is lent.
	d, q = newQueue(t, Config{Size: 3, Packed: true, Base: 1 << 15})
	d.desc(0, desc{bufA, 1, rd, 0})
	d.offer(0)
	_, st = q.Pop(Readable, room())
	require.Equal(t, OK, st)
	d.slot(1).word = (flagAvail | nx) << 16
	d.slot(2).word = (flagAvail | nx) << 16
	d.slot(0).word = flagUsed << 16
	_, st = q.Pop(Readable, room())
	require.Equal(t, Broken, st)
	require.ErrorIs(t, q.Err(), ErrChain)
}

// H068: event words that no driver would write lose no interrupt.
func TestPackedEventGarbage(t *testing.T) {
	for _, c := range []struct {
		word uint32
		want bool
	}{
		{eventEnable, true},
		{eventEnable | 0xffff, true},
		{eventDisable, false},
		{eventDisable | 0xfffc0000, false},
		{eventFlags, true}, // reserved
		{eventDesc | 0x8007, true},
		{eventDesc | 0x8000, false}, // passed long ago
		{eventDesc | 0x0007, false}, // in the next lap
		{eventDesc | 0x8008, true},  // not in the ring
		{eventDesc | 0x7fff, true},
	} {
		d, q := newQueue(t, Config{Size: 8, Packed: true, EventIdx: true, Base: 1<<15 | 6})
		d.desc(0, desc{bufA, 1, rd, 0})
		*d.word(d.cfg.Avail) = eventDesc
		give(d, q, 1)
		assert.True(t, q.NeedsNotify(), "the first after a start is told in any case")
		*d.word(d.cfg.Avail) = c.word
		give(d, q, 1)
		assert.Equal(t, c.want, q.NeedsNotify(), "%#x", c.word)
	}
}

func TestEnableNotifyPacked(t *testing.T) {
	for _, event := range []bool{false, true} {
		d, q := newQueue(t, Config{Size: 8, Packed: true, EventIdx: event, Base: 1<<15 | 7})
		d.desc(0, desc{bufA, 1, rd, 0})
		q.DisableNotify()
		assert.Equal(t, uint32(eventDisable), d.deviceEvent())
		assert.False(t, q.EnableNotify())
		want := uint32(eventEnable)
		if event {
			want = eventDesc | 0x8007
		}
		assert.Equal(t, want, d.deviceEvent())
		d.offer(0)
		assert.True(t, q.EnableNotify(), "a chain came before the notification was on")
		q.DisableNotify()
		give(d, q, 1)
		assert.Equal(t, uint32(eventDisable), d.deviceEvent())
		assert.True(t, q.EnableNotify())
		_, st := q.Pop(Readable, room())
		require.Equal(t, OK, st)
		assert.False(t, q.EnableNotify())
		if event {
			assert.Equal(t, uint32(eventDesc|1), d.deviceEvent())
		}
		*d.word(d.cfg.Used) = 77
		q.EnableNotify()
		assert.NotEqual(t, uint32(77), d.deviceEvent(), "our word is never read back")
	}
}

func TestPackedHotPathDoesNotAllocate(t *testing.T) {
	for _, event := range []bool{false, true} {
		d, q := newQueue(t, Config{Size: 63, Packed: true, EventIdx: event, Indirect: true, Base: 1 << 15})
		d.entry(bufB-8, desc{bufA, 12, rd, 0})
		at := d.packed.next
		list := []desc{{bufA, 64, rd, 0}, {bufA, 12, rd | nx, 0}, {bufB - 1, 2, rd, 0}, {bufB - 8, 16, in, 0}, {bufA, 12, wr, 0}}
		segs, run := room(), make([]Buf, 4)
		popped := 0
		allocs := testing.AllocsPerRun(1000, func() {
			for _, v := range list {
				*d.slot(at.at) = slot{v.addr, v.len, uint32(v.flags|at.availFlags()) << 16}
				at = at.forward(1, 63)
			}
			n := q.PopRun(Readable, run)
			q.PutRun(run[:n])
			popped += n
			for {
				c, st := q.Pop(Readable, segs)
				if st == Empty {
					break
				}
				q.Rewind(1)
				c, _ = q.Pop(Readable, segs)
				q.Put(c.Head, 0)
				popped++
			}
			q.Publish()
			q.NeedsNotify()
			q.EnableNotify()
			q.DisableNotify()
		})
		assert.Zero(t, allocs)
		assert.Equal(t, 4*1001, popped)
	}
}

// TestPackedRunIsManyPops is TestRunIsManyPops on a packed ring, gone round with
// what PopRun and PutRun leave behind.
func TestPackedRunIsManyPops(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 8))
	for _, dir := range []Direction{Readable, Writable} {
		runs := 0
		for range 300 {
			size := uint16(1 + rnd.IntN(16))
			d, q := newQueue(t, Config{Size: size, Packed: true, Base: uint16(rnd.IntN(int(size))) | uint16(rnd.IntN(2))<<15, Indirect: true})
			other, err := New(d.mem, d.cfg)
			require.NoError(t, err)
			for range 10 {
				for d.packed.free > 0 && rnd.IntN(8) > 0 {
					v := desc{bufA + uint64(rnd.IntN(64)), uint32(1 + rnd.IntN(200)), uint16(dir), 0}
					id := uint16(rnd.IntN(int(size)))
					switch rnd.IntN(30) {
					case 0:
						v.addr = bufFar
					case 1:
						v.addr = 0x1000 // unmapped
					case 2:
						v.len = 0
					case 3:
						v.flags ^= flagWrite
					case 4:
						v.flags |= flagIndirect
					case 5:
						v.addr, v.len = bufB-8, 16 // crosses regions
					case 6:
						v.len = MaxBytes + 1
					case 7:
						id = size
					}
					list := []desc{v}
					if d.packed.free > 1 && rnd.IntN(10) == 0 {
						list[0].flags |= flagNext
						list = append(list, v)
					}
					d.stagePacked(id, list...)
				}
				d.storePacked()
				for {
					var bufs [8]Buf
					out := bufs[:1+rnd.IntN(8)]
					n := q.PopRun(dir, out)
					runs += n
					for _, b := range bufs[:n] {
						p, st := other.Pop(dir, make([][]byte, 0, 4))
						require.Equal(t, OK, st)
						require.Equal(t, p.Head, b.Head)
						require.Len(t, p.Segs, 1)
						require.Same(t, &p.Segs[0][0], &b.B[0])
						require.Len(t, b.B, len(p.Segs[0]))
					}
					require.Equal(t, other.Base(), q.Base())
					require.Equal(t, other.packed.out, q.packed.out)
					if q.Drained() {
						require.Zero(t, q.Avail())
					}
					q.PutRun(bufs[:n])
					for _, b := range bufs[:n] {
						other.Put(b.Head, 0)
					}
					if n > 0 {
						continue
					}
					want, st := other.Pop(dir, make([][]byte, 0, 4))
					c, got := q.Pop(dir, make([][]byte, 0, 4))
					require.Equal(t, st, got)
					require.Equal(t, want.Head, c.Head)
					if st == Empty {
						break
					}
					q.Put(c.Head, 0)
					other.Put(c.Head, 0)
				}
				q.Publish()
				other.Publish() // the same once more
				d.take()
			}
			require.Equal(t, int(size), d.packed.free)
			d.checkZones(t)
		}
		require.Greater(t, runs, 1000)
	}
}
