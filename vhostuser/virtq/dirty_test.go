package virtq

import (
	"hash/maphash"
	"math"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/vhostuser/guestmem"
)

const page = 4096

// fill writes n bytes to the front of a chain's buffers.
func fill(c Chain, n int, v byte) {
	for _, s := range c.Segs {
		for i := range s[:min(n, len(s))] {
			s[i] = v
		}
		n -= min(n, len(s))
	}
}

// hashes returns the hash of every page of guest memory.
func (d *driver) hashes(seed maphash.Seed) map[uint64]uint64 {
	got := map[uint64]uint64{}
	for _, r := range d.mem.Regions() {
		s := r.Spec()
		for off := uint64(0); off < s.Size; off += page {
			b, _ := r.Slice(s.GPA+off, min(page, s.Size-off))
			got[s.GPA+off] = maphash.Bytes(seed, b)
		}
	}
	return got
}

// checkMarks fails if a page changed since before without a mark.
func (d *driver) checkMarks(t *testing.T, l *guestmem.Log, seed maphash.Seed, before map[uint64]uint64) {
	t.Helper()
	for gpa, h := range d.hashes(seed) {
		if h != before[gpa] {
			assert.True(t, l.Dirty(gpa), "page %#x changed without a mark", gpa)
		}
	}
}

// Every page that the device writes is marked, also those of long chains, of
// chains across regions and of chains that went back unused (invariant 11).
func TestEveryWrittenPageIsMarked(t *testing.T) { both(t, testEveryWrittenPageIsMarked) }

func testEveryWrittenPageIsMarked(t *testing.T, packed bool) {
	for _, event := range []bool{false, true} {
		d, q := newQueue(t, layout(packed, Config{Size: 1024, EventIdx: event, Indirect: true, Base: 1000}))
		long := 1024
		if packed {
			long /= 2 // two of them fit
		}
		part := bufSize / long
		for i := range long {
			d.desc(i, desc{bufFar + uint64(part*i), uint32(part), wr | nx, uint16(i + 1)})
		}
		d.desc(long-1, desc{bufFar + bufSize - uint64(part), uint32(part), wr, 0})
		l := guestmem.HeapLog(bufFar / page / 8 * 2)
		setLog(q, l, 0)
		seed := maphash.MakeSeed()
		var before map[uint64]uint64
		// offer is the driver's part of a step, whose writes are not ours.
		offer := func(heads ...uint16) {
			d.take()
			d.offer(heads...)
			before = d.hashes(seed)
		}
		for step, f := range []func(){
			func() { q.EnableNotify() },
			func() { q.DisableNotify() },
			func() { // the longest chain, all of it written
				offer(0)
				c, st := q.Pop(Writable, room())
				require.Equal(t, OK, st)
				fill(c, c.Len, 1)
				q.Put(0, uint32(c.Len))
				q.Publish()
			},
			func() { // the same, written in part and put with 0
				offer(0)
				c, _ := q.Pop(Writable, room())
				fill(c, 5000, 2)
				q.Put(0, 0)
				q.Publish()
			},
			func() { // and rewound
				offer(0, 0)
				for range 2 {
					c, _ := q.Pop(Writable, room())
					fill(c, 5000, 3)
				}
				q.Rewind(2)
			},
			func() { // and this time put, out of order with a bad one
				a, _ := q.Pop(Writable, room())
				fill(a, 5000, 4)
				b, _ := q.Pop(Writable, room())
				fill(b, 100, 5)
				q.Put(b.Head, 100)
				q.Put(a.Head, 5000)
				q.Publish()
			},
			func() { // across regions, by an indirect table
				d.entry(bufA, desc{bufB - 10, 30, wr, 0})
				d.desc(7, desc{bufA, 16, in, 0})
				offer(7)
				c, st := q.Pop(Writable, room())
				require.Equal(t, OK, st)
				fill(c, 30, 6)
				q.Put(7, 30)
				q.Publish()
			},
			func() { // a command's answer
				d.chain(8, desc{bufA, 2, rd, 0}, desc{bufB + page, 1, wr, 0})
				offer(8)
				_, _, in, st := q.PopBoth(room(), room())
				require.Equal(t, OK, st)
				in[0][0] = 9
				q.Put(8, 1)
				q.Publish()
			},
		} {
			before = d.hashes(seed)
			f()
			d.checkMarks(t, l, seed, before)
			assert.False(t, t.Failed(), "step %d", step)
			assert.False(t, l.Dirty(bufA), "what is only read is not marked")
			clearLog(q, d, &l)
		}
		assert.Empty(t, q.lent)
	}
}

// clearLog does what the frontend does between rounds.
func clearLog(q *Queue, d *driver, l **guestmem.Log) {
	if len(q.lent) > 0 {
		return // chains are out: marks come later
	}
	*l = guestmem.HeapLog(bufFar / page / 8 * 2)
	setLog(q, *l, 0)
}

// Only what was written is marked, so that a migration converges.
func TestOnlyWrittenPagesAreMarked(t *testing.T) { both(t, testOnlyWrittenPagesAreMarked) }

func testOnlyWrittenPagesAreMarked(t *testing.T, packed bool) {
	d, q := newQueue(t, layout(packed, Config{Size: 4}))
	l := guestmem.HeapLog(bufFar / page / 8 * 2)
	setLog(q, l, 0)
	d.desc(0, desc{bufFar, bufSize, wr, 0})
	d.offer(0)
	_, st := q.Pop(Writable, room())
	require.Equal(t, OK, st)
	assert.False(t, l.Dirty(bufFar), "a mark before the write may be cleared before it")
	q.Put(0, 100)
	assert.True(t, l.Dirty(bufFar))
	assert.False(t, l.Dirty(bufFar+page))
	assert.False(t, l.Dirty(ringGPA))
	q.Publish()
	assert.True(t, l.Dirty(ringGPA))
}

// The used ring is marked under its log address: elements on both sides of the
// wrap, header and event.
func TestUsedRingLogAddress(t *testing.T) {
	const at = 64 * page
	d, q := newQueue(t, Config{Size: 2048, EventIdx: true, Base: 2047})
	l := guestmem.HeapLog(bufFar / page / 8)
	setLog(q, l, at)
	d.desc(0, desc{bufA, 1, rd, 0})
	give(d, q, 2) // the last and the first element
	assert.True(t, l.Dirty(at))
	assert.False(t, l.Dirty(at+page))
	assert.False(t, l.Dirty(at+2*page))
	assert.True(t, l.Dirty(at+3*page), "2048 elements end at byte 4 of page 4")
	assert.True(t, l.Dirty(at+4*page))
	assert.False(t, l.Dirty(ringGPA+2048*18))

	setLog(q, nil, 0)
	give(d, q, 2)
	q.EnableNotify()
}

// H037: the log address is all ones, or past the log.
func TestHostileLogAddress(t *testing.T) { both(t, testHostileLogAddress) }

func testHostileLogAddress(t *testing.T, packed bool) {
	for _, at := range []uint64{math.MaxUint64, math.MaxUint64 - 3, 1 << 40} {
		d, q := newQueue(t, layout(packed, Config{Size: 4, EventIdx: true}))
		l := guestmem.HeapLog(8)
		setLog(q, l, at)
		d.desc(0, desc{bufA, 1, rd, 0})
		give(d, q, 3)
		q.EnableNotify()
		for p := range uint64(64) {
			// A packed ring's descriptors have no log address.
			assert.Equal(t, packed && p*page == ringGPA, l.Dirty(p*page))
		}
		assert.NotZero(t, l.Missed())
	}
}

// A bad chain leaves nothing behind in the list of what to mark.
func TestBadChainIsNotLent(t *testing.T) { both(t, testBadChainIsNotLent) }

func testBadChainIsNotLent(t *testing.T, packed bool) {
	d, q := newQueue(t, layout(packed, Config{Size: 4}))
	setLog(q, guestmem.HeapLog(8), 0)
	d.chain(0, desc{bufA, 1, wr, 0}, desc{0x1000, 1, wr, 0})
	for range 10 {
		d.offer(0)
		c, st := q.Pop(Writable, room())
		require.Equal(t, Bad, st)
		q.Put(c.Head, 0)
		q.Publish()
		d.take()
		assert.Empty(t, q.lent)
	}
	d.chain(0, desc{bufA, 1, wr, 0}, desc{bufA, 1, wr, 0})
	d.offer(0)
	_, st := q.Pop(Writable, make([][]byte, 0, 1))
	require.Equal(t, NoRoom, st)
	assert.Empty(t, q.lent)
}
