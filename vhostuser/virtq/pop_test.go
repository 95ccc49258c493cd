package virtq

import (
	"encoding/binary"
	"math"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
	"sidewire/vhostuser/guestmem"
)

const (
	rd = 0
	wr = flagWrite
	nx = flagNext
	in = flagIndirect
)

// TestPopChains is what chains of all kinds become. Every ring has 16 entries
// and its chain starts at descriptor 3.
func TestPopChains(t *testing.T) { both(t, testPopChains) }

func testPopChains(t *testing.T, packed bool) {
	const table = bufA + 0x100
	ring := func(ds ...desc) func(*driver) {
		return func(d *driver) { d.chain(3, ds...) }
	}
	// raw writes descriptors from 3 on with their own flags and next.
	raw := func(ds ...desc) func(*driver) {
		return func(d *driver) {
			for i, v := range ds {
				d.desc(3+i, v)
			}
		}
	}
	indirect := func(at uint64, ptr desc, ds ...desc) func(*driver) {
		return func(d *driver) {
			for i, v := range ds {
				d.entry(at+16*uint64(i), v)
			}
			d.desc(3, ptr)
		}
	}
	many := func(n int, size uint32) func(*driver) {
		return func(d *driver) {
			for i := range n {
				v := desc{bufFar + uint64(i)*16, size, nx, uint16(i + 1)}
				if i == n-1 {
					v.flags = 0
				}
				d.entry(table+16*uint64(i), v)
			}
			d.desc(3, desc{table, uint32(n) * 16, in, 0})
		}
	}
	one := []span{{bufA, 64}}
	for _, c := range []struct {
		name  string
		dir   Direction
		set   func(*driver)
		spans []span
		cause Cause
	}{
		{"one", Readable, ring(desc{bufA, 64, rd, 0}), one, 0},
		{"one to write", Writable, ring(desc{bufA, 64, wr, 0}), one, 0},
		{"several", Readable, ring(desc{bufA, 12, rd, 0}, desc{bufFar, 100, rd, 0}, desc{bufB, 5, rd, 0}),
			[]span{{bufA, 12}, {bufFar, 100}, {bufB, 5}}, 0},
		{"last byte of a region", Readable, ring(desc{bufFar + bufSize - 1, 1, rd, 0}), []span{{bufFar + bufSize - 1, 1}}, 0},
		{"whole region", Readable, ring(desc{bufFar, bufSize, rd, 0}), []span{{bufFar, bufSize}}, 0},
		{"as long as the ring", Readable, func(d *driver) {
			for i := range uint16(16) {
				d.desc(int(i), desc{bufA + uint64(i), 1, nx, (i + 1) % 16})
			}
			d.desc(2, desc{bufA + 2, 1, rd, 0})
		}, []span{{bufA + 3, 1}, {bufA + 4, 1}, {bufA + 5, 1}, {bufA + 6, 1}, {bufA + 7, 1}, {bufA + 8, 1},
			{bufA + 9, 1}, {bufA + 10, 1}, {bufA + 11, 1}, {bufA + 12, 1}, {bufA + 13, 1}, {bufA + 14, 1},
			{bufA + 15, 1}, {bufA, 1}, {bufA + 1, 1}, {bufA + 2, 1}}, 0},

		{"H051 loop of one", Readable, raw(desc{bufA, 1, nx, 3}), nil, CauseLong},
		{"H051 loop of two", Readable, raw(desc{bufA, 1, nx, 4}, desc{bufA, 1, nx, 3}), nil, CauseLong},
		{"H051 loop of nothing", Readable, raw(desc{bufA, 0, nx, 3}), nil, CauseLong},
		{"H052 next is the ring's size", Readable, raw(desc{bufA, 1, nx, 16}), nil, CauseNext},
		{"H052 next is far off", Readable, raw(desc{bufA, 1, nx, 0xffff}), nil, CauseNext},
		{"H052 next without the flag", Readable, raw(desc{bufA, 64, rd, 0xffff}), one, 0},
		{"H053 longer than the ring", Readable, many(17, 1), nil, CauseIndirect},

		{"H054 unmapped", Readable, ring(desc{0x1000, 1, rd, 0}), nil, CauseUnmapped},
		{"H054 second unmapped", Readable, ring(desc{bufA, 1, rd, 0}, desc{0x1000, 1, rd, 0}), nil, CauseUnmapped},
		{"H054 address overflows", Readable, ring(desc{math.MaxUint64 - 1, 64, rd, 0}), nil, CauseUnmapped},
		{"H054 crosses the end of memory", Readable, ring(desc{bufFar + bufSize - 1, 2, rd, 0}), nil, CauseUnmapped},
		{"H054 crosses two regions and ends outside", Readable, ring(desc{bufB - 1, bufSize + 2, rd, 0}), nil, CauseUnmapped},
		{"H054 crosses two adjacent regions", Readable, ring(desc{bufB - 10, 30, rd, 0}),
			[]span{{bufB - 10, 10}, {bufB, 20}}, 0},
		{"H054 crosses to be written", Writable, ring(desc{bufFar, 1, wr, 0}, desc{bufB - 10, 30, wr, 0}),
			[]span{{bufFar, 1}, {bufB - 10, 10}, {bufB, 20}}, 0},

		{"H055 length 0 before", Readable, ring(desc{bufA, 0, rd, 0}, desc{bufA, 64, rd, 0}), one, 0},
		{"H055 length 0 after", Readable, ring(desc{bufA, 64, rd, 0}, desc{0x1000, 0, rd, 0}), one, 0},
		{"H055 total 0", Readable, ring(desc{bufA, 0, rd, 0}, desc{bufA, 0, rd, 0}), nil, CauseLength},
		{"H055 total 0 to write", Writable, ring(desc{bufA, 0, wr, 0}), nil, CauseLength},
		{"H055 split header", Readable, ring(desc{bufA, 1, rd, 0}, desc{bufA + 1, 11, rd, 0}, desc{bufA + 12, 64, rd, 0}),
			[]span{{bufA, 1}, {bufA + 1, 11}, {bufA + 12, 64}}, 0},
		{"H056 length 4 GiB-1", Readable, ring(desc{bufA, math.MaxUint32, rd, 0}), nil, CauseLength},
		{"H056 total too long", Readable, ring(desc{bufA, 1, rd, 0}, desc{bufA, MaxBytes, rd, 0}), nil, CauseLength},
		{"H056 total wraps 32 bits", Readable,
			ring(desc{bufA, 64, rd, 0}, desc{bufA, math.MaxUint32, rd, 0}, desc{bufA, 1, rd, 0}), nil, CauseLength},

		{"H057 writable in tx", Readable, ring(desc{bufA, 64, wr, 0}), nil, CauseDirection},
		{"H057 readable in rx", Writable, ring(desc{bufA, 64, rd, 0}), nil, CauseDirection},
		{"H057 mixed in tx", Readable, ring(desc{bufA, 64, rd, 0}, desc{bufA, 64, wr, 0}), nil, CauseDirection},
		{"H057 mixed in rx", Writable, ring(desc{bufA, 64, wr, 0}, desc{bufA, 64, rd, 0}), nil, CauseDirection},

		{"H058 indirect", Readable, indirect(table, desc{table, 32, in, 0}, desc{bufA, 64, nx, 1}, desc{bufFar, 7, rd, 9}),
			[]span{{bufA, 64}, {bufFar, 7}}, 0},
		{"H058 indirect of one", Readable, indirect(table, desc{table, 16, in, 0}, desc{bufA, 64, rd, 0}), one, 0},
		{"H058 table in any order", Writable,
			indirect(table, desc{table, 48, in, 0}, desc{bufA, 1, wr | nx, 2}, desc{bufA, 3, wr, 0}, desc{bufA, 2, wr | nx, 1}),
			[]span{{bufA, 1}, {bufA, 2}, {bufA, 3}}, 0},
		{"H058 table at an odd address", Readable, indirect(table+1, desc{table + 1, 16, in, 0}, desc{bufA, 64, rd, 0}), one, 0},
		{"H058 indirect after a descriptor", Readable, func(d *driver) {
			d.entry(table, desc{bufFar, 7, rd, 0})
			d.chain(3, desc{bufA, 64, rd, 0}, desc{table, 16, in, 0})
		}, []span{{bufA, 64}, {bufFar, 7}}, 0},
		{"H058 table in a table", Readable, indirect(table, desc{table, 16, in, 0}, desc{table, 16, in, 0}), nil, CauseIndirect},
		{"H058 size not a multiple of 16", Readable, indirect(table, desc{table, 17, in, 0}, desc{bufA, 64, rd, 0}), nil, CauseIndirect},
		{"H058 size 0", Readable, indirect(table, desc{table, 0, in, 0}, desc{bufA, 64, rd, 0}), nil, CauseIndirect},
		{"H058 as long as the ring", Readable, many(16, 1), []span{{bufFar, 1}, {bufFar + 16, 1}, {bufFar + 32, 1},
			{bufFar + 48, 1}, {bufFar + 64, 1}, {bufFar + 80, 1}, {bufFar + 96, 1}, {bufFar + 112, 1},
			{bufFar + 128, 1}, {bufFar + 144, 1}, {bufFar + 160, 1}, {bufFar + 176, 1}, {bufFar + 192, 1},
			{bufFar + 208, 1}, {bufFar + 224, 1}, {bufFar + 240, 1}}, 0},
		{"H058 size over 16*num", Readable, many(17, 1), nil, CauseIndirect},
		{"H058 size 4 GiB", Readable, indirect(table, desc{table, 0xfffffff0, in, 0}), nil, CauseIndirect},
		{"H058 table unmapped", Readable, raw(desc{0x1000, 16, in, 0}), nil, CauseUnmapped},
		{"H058 table ends outside memory", Readable, raw(desc{bufFar + bufSize - 8, 16, in, 0}), nil, CauseUnmapped},
		{"H058 table crosses regions", Readable,
			indirect(bufB-16, desc{bufB - 16, 48, in, 0}, desc{bufA, 64, nx, 1}, desc{bufFar, 7, nx, 2}, desc{bufFar, 8, 0, 2}),
			[]span{{bufA, 64}, {bufFar, 7}, {bufFar, 8}}, 0},
		{"H058 descriptor crosses regions", Readable,
			indirect(bufB-24, desc{bufB - 24, 32, in, 0}, desc{bufA, 64, nx, 1}, desc{bufFar, 7, rd, 0}),
			[]span{{bufA, 64}, {bufFar, 7}}, 0},
		{"H058 indirect with next", Readable, indirect(table, desc{table, 16, in | nx, 4}, desc{bufA, 64, rd, 0}), nil, CauseIndirect},
		{"H058 write flag on the table means nothing", Readable, indirect(table, desc{table, 16, in | wr, 0}, desc{bufA, 64, rd, 0}), one, 0},
		{"H058 no write flag on the table means nothing", Writable, indirect(table, desc{table, 16, in, 0}, desc{bufA, 64, wr, 0}), one, 0},
		{"H058 loop inside", Readable, indirect(table, desc{table, 32, in, 0}, desc{bufA, 1, nx, 1}, desc{bufA, 1, nx, 0}), nil, CauseLong},
		{"H058 next past the table", Readable, indirect(table, desc{table, 32, in, 0}, desc{bufA, 1, nx, 2}), nil, CauseNext},
		{"H059 unknown flags", Readable, ring(desc{bufA, 64, 0xfff8, 0}), one, 0},
		{"H059 unknown flags to write", Writable, ring(desc{bufA, 64, 0xfff8 | wr, 0}), one, 0},
	} {
		if packed && onlySplit(c.name) {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			d, q := newQueue(t, layout(packed, Config{Size: 16, Indirect: true}))
			c.set(d)
			d.offer(3)
			got, st := q.Pop(c.dir, room())
			assert.Equal(t, uint16(3), got.Head)
			if c.cause != NoCause {
				require.Equal(t, Bad, st)
				assert.Equal(t, c.cause, q.LastCause(), q.LastCause().String())
				assert.Empty(t, got.Segs)
			} else {
				require.Equal(t, OK, st, q.LastCause().String())
				assert.Equal(t, c.spans, d.spans(t, got.Segs))
				sum := 0
				for _, s := range c.spans {
					sum += s.n
				}
				assert.Equal(t, sum, got.Len)
			}

			// A good buffer posted afterwards is processed (invariant 5).
			q.Put(got.Head, 0)
			q.Publish()
			assert.Equal(t, []elem{{3, 0}}, d.take())
			d.desc(5, desc{bufFar, 10, uint16(c.dir), 0})
			d.offer(5)
			got, st = q.Pop(c.dir, room())
			require.Equal(t, OK, st)
			assert.Equal(t, []span{{bufFar, 10}}, d.spans(t, got.Segs))
			_, st = q.Pop(c.dir, room())
			assert.Equal(t, Empty, st)
			d.checkZones(t)
		})
	}
}

// onlySplit names the cases that are about links, which packed rings have not.
func onlySplit(name string) bool {
	for _, s := range []string{"H051", "H052", "table in any order", "table in a table", "loop inside", "next past the table"} {
		if strings.Contains(name, s) {
			return true
		}
	}
	return false
}

// H058: of the flags of a packed ring's table, WRITE alone means something.
func TestFlagsInPackedTable(t *testing.T) {
	d, q := newQueue(t, Config{Size: 16, Packed: true, Base: 1 << 15, Indirect: true})
	d.entry(bufA, desc{bufFar, 1, nx, 0})
	d.entry(bufA+16, desc{bufFar + 1, 2, in, 0})
	d.entry(bufA+32, desc{bufFar + 3, 3, 0xfff8 | nx | in, 0})
	d.desc(0, desc{bufA, 48, in, 0})
	d.offer(0)
	c, st := q.Pop(Readable, room())
	require.Equal(t, OK, st)
	assert.Equal(t, []span{{bufFar, 1}, {bufFar + 1, 2}, {bufFar + 3, 3}}, d.spans(t, c.Segs))
}

// H059
func TestIndirectMustBeNegotiated(t *testing.T) { both(t, testIndirectMustBeNegotiated) }

func testIndirectMustBeNegotiated(t *testing.T, packed bool) {
	d, q := newQueue(t, layout(packed, Config{Size: 16}))
	d.entry(bufA, desc{bufFar, 64, rd, 0})
	d.desc(0, desc{bufA, 16, in, 0})
	d.offer(0)
	_, st := q.Pop(Readable, room())
	assert.Equal(t, Bad, st)
	assert.Equal(t, CauseIndirect, q.LastCause())
}

// H053: a ring may be longer than the chains in it.
func TestChainBoundIs1024(t *testing.T) {
	d, q := newQueue(t, Config{Size: 4096, Indirect: true})
	for i := range 1025 {
		d.desc(i, desc{bufA + uint64(i), 1, nx, uint16(i + 1)})
	}
	d.desc(1025, desc{bufA, 1, rd, 0})
	d.offer(2, 1)
	c, st := q.Pop(Readable, room())
	require.Equal(t, OK, st)
	assert.Len(t, c.Segs, 1024)
	c, st = q.Pop(Readable, room())
	require.Equal(t, Bad, st)
	assert.Equal(t, CauseLong, q.LastCause())
	assert.Equal(t, uint16(1), c.Head)
}

// H056: 1024 buffers of 64 KiB.
func TestLengthBound(t *testing.T) {
	d := newDriver(t, Config{Size: 2048})
	big := guestmem.FromHeap(0x40000000, make([]byte, 65536))
	m, err := guestmem.New(append([]*guestmem.Region{big}, d.mem.Regions()...)...)
	require.NoError(t, err)
	q, err := New(m, d.cfg)
	require.NoError(t, err)
	for i := range 1024 {
		d.desc(i, desc{0x40000000, 65536, nx, uint16(i + 1)})
	}
	d.desc(1023, desc{0x40000000, 65536, rd, 0})
	d.offer(0, 1024-16)
	_, st := q.Pop(Readable, room())
	assert.Equal(t, Bad, st)
	assert.Equal(t, CauseLength, q.LastCause())
	c, st := q.Pop(Readable, room())
	assert.Equal(t, OK, st)
	assert.Equal(t, MaxBytes, c.Len)
}

// A chain with more slices than MaxSegs, because its buffers cross regions, is
// Bad and not NoRoom for ever.
func TestSlicesBound(t *testing.T) {
	d, q := newQueue(t, Config{Size: 1024})
	for i := range 1024 {
		d.desc(i, desc{bufB - 1, 2, nx, uint16(i + 1)})
	}
	d.desc(1023, desc{bufB - 1, 2, rd, 0})
	d.offer(0, 512)
	_, st := q.Pop(Readable, make([][]byte, 0, 1000))
	assert.Equal(t, NoRoom, st)
	_, st = q.Pop(Readable, room())
	assert.Equal(t, Bad, st)
	assert.Equal(t, CauseLong, q.LastCause())
	c, st := q.Pop(Readable, room())
	assert.Equal(t, OK, st)
	assert.Len(t, c.Segs, 1024)
}

func TestNoRoomPopsNothing(t *testing.T) { both(t, testNoRoomPopsNothing) }

func testNoRoomPopsNothing(t *testing.T, packed bool) {
	d, q := newQueue(t, layout(packed, Config{Size: 16, Indirect: true}))
	d.chain(0, desc{bufA, 1, rd, 0}, desc{bufB - 1, 2, rd, 0})
	d.offer(0)
	for size := range 3 {
		c, st := q.Pop(Readable, make([][]byte, 0, size))
		require.Equal(t, NoRoom, st)
		require.Empty(t, c.Segs)
		require.Equal(t, index(packed, 0, 16), q.Base())
	}
	c, st := q.Pop(Readable, make([][]byte, 0, 3))
	require.Equal(t, OK, st)
	assert.Len(t, c.Segs, 3)
	if packed {
		assert.Equal(t, place(2, 16), q.Base())
	} else {
		assert.Equal(t, uint16(1), q.Base())
	}
}

func TestPopBoth(t *testing.T) { both(t, testPopBoth) }

func testPopBoth(t *testing.T, packed bool) {
	for _, c := range []struct {
		name    string
		ds      []desc
		out, in []span
		bad     bool
	}{
		{"command", []desc{{bufA, 2, rd, 0}, {bufFar, 6, rd, 0}, {bufA + 99, 1, wr, 0}},
			[]span{{bufA, 2}, {bufFar, 6}}, []span{{bufA + 99, 1}}, false},
		{"only to read", []desc{{bufA, 2, rd, 0}}, []span{{bufA, 2}}, nil, false},
		{"only to write", []desc{{bufB - 1, 2, wr, 0}}, nil, []span{{bufB - 1, 1}, {bufB, 1}}, false},
		{"H057 wrong order", []desc{{bufA, 2, wr, 0}, {bufA, 2, rd, 0}}, nil, nil, true},
		{"H057 mixed", []desc{{bufA, 2, rd, 0}, {bufA, 1, wr, 0}, {bufA, 2, rd, 0}}, nil, nil, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, q := newQueue(t, layout(packed, Config{Size: 8}))
			d.chain(1, c.ds...)
			d.offer(1)
			head, out, in, st := q.PopBoth(room(), room())
			assert.Equal(t, uint16(1), head)
			require.Equal(t, c.bad, st == Bad)
			assert.Equal(t, c.out, d.spans(t, out))
			assert.Equal(t, c.in, d.spans(t, in))
			_, _, _, st = q.PopBoth(room(), room())
			assert.Equal(t, Empty, st)
		})
	}
}

func TestRingsThatCannotBeFollowed(t *testing.T) {
	for _, c := range []struct {
		name string
		base uint16
		idx  uint16
		head uint16
		err  error
	}{
		{"full", 0, 16, 0, nil},
		{"full over the wrap", 65530, 10, 0, nil},
		{"H049 one too many", 0, 17, 0, ErrAvailIndex},
		{"H049 5000", 0, 5000, 0, ErrAvailIndex},
		{"H049 32768", 0, 32768, 0, ErrAvailIndex},
		{"H049 with wrap", 65530, 11, 0, ErrAvailIndex},
		{"H049 backwards", 100, 99, 0, ErrAvailIndex},
		{"H043 base far off", 40000, 0, 0, ErrAvailIndex},
		{"H050 head is the size", 0, 1, 16, ErrHead},
		{"H050 head far off", 0, 1, 0xffff, ErrHead},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, q := newQueue(t, Config{Size: 16, Base: c.base})
			for i := range 16 {
				d.desc(i, desc{bufA, 1, rd, 0})
				binary.LittleEndian.PutUint16(d.at(d.cfg.Avail+4+2*uint64(i), 2), c.head)
			}
			d.availIx = c.idx
			d.storeAvail()
			_, st := q.Pop(Readable, room())
			require.ErrorIs(t, q.Err(), c.err)
			if c.err == nil {
				require.Equal(t, OK, st)
				assert.Equal(t, 15, q.Avail())
				return
			}
			require.Equal(t, Broken, st)
			assert.Zero(t, q.Avail())
			assert.True(t, q.EnableNotify(), "the owner must not sleep on it")

			// It stays so, whatever the guest says afterwards.
			d.availIx = c.base + 1
			d.storeAvail()
			_, st = q.Pop(Readable, room())
			assert.Equal(t, Broken, st)
			_, _, _, st = q.PopBoth(room(), room())
			assert.Equal(t, Broken, st)
			assert.Equal(t, c.base, q.Base())
			q.Publish()
			assert.Empty(t, d.take())
		})
	}
}

// H050 in the middle of what was seen already.
func TestHeadOutsideRingAfterGood(t *testing.T) {
	d, q := newQueue(t, Config{Size: 16})
	d.desc(0, desc{bufA, 1, rd, 0})
	d.offer(0, 99, 0)
	_, st := q.Pop(Readable, room())
	require.Equal(t, OK, st)
	for range 2 {
		_, st = q.Pop(Readable, room())
		require.Equal(t, Broken, st)
	}
}

// H060: the same head again while its chain is out is another chain.
func TestSameHeadTwice(t *testing.T) { both(t, testSameHeadTwice) }

func testSameHeadTwice(t *testing.T, packed bool) {
	d, q := newQueue(t, layout(packed, Config{Size: 4}))
	d.desc(2, desc{bufA, 9, rd, 0})
	d.offer(2, 2, 2, 2)
	for range 4 {
		c, st := q.Pop(Readable, room())
		require.Equal(t, OK, st)
		require.Equal(t, uint16(2), c.Head)
	}
	_, st := q.Pop(Readable, room())
	require.Equal(t, Empty, st)
	for i := range 4 {
		q.Put(2, uint32(i))
	}
	q.Publish()
	assert.Equal(t, []elem{{2, 0}, {2, 1}, {2, 2}, {2, 3}}, d.take())
}

func TestRewind(t *testing.T) { both(t, testRewind) }

func testRewind(t *testing.T, packed bool) {
	d, q := newQueue(t, layout(packed, Config{Size: 4, Base: 65535}))
	for i := range 3 {
		d.desc(i, desc{bufA + uint64(i), 1, wr, 0})
	}
	d.offer(0, 1, 2)
	for range 3 {
		q.Pop(Writable, room())
	}
	q.Put(0, 1)
	q.Rewind(2)
	assert.Equal(t, index(packed, 0, 4), q.Base())
	for i := range uint16(2) {
		c, st := q.Pop(Writable, room())
		require.Equal(t, OK, st)
		assert.Equal(t, i+1, c.Head)
	}
}

// H030: a truncated memory file faults in Pop, leaves the state as it was, and
// the fault is known to be this guest's.
func TestTruncatedMemory(t *testing.T) {
	fd, err := unix.MemfdCreate("virtq-test", unix.MFD_CLOEXEC)
	require.NoError(t, err)
	defer unix.Close(fd)
	require.NoError(t, unix.Ftruncate(fd, 0x3000))
	r, err := guestmem.Map(fd, guestmem.Spec{Size: 0x3000})
	require.NoError(t, err)
	defer r.Unmap()
	m, err := guestmem.New(r)
	require.NoError(t, err)
	q, err := New(m, Config{Size: 4, Desc: 0x2000, Avail: 0x1000, Used: 0x2800})
	require.NoError(t, err)
	b, _ := m.Slice(0x1000, 8)
	binary.LittleEndian.PutUint16(b[2:], 1)

	attempt := func(f func()) uintptr {
		got := make(chan any)
		frame.Go(func() {
			defer func() { got <- recover() }()
			f()
		})
		addr, ok := frame.FaultAddr(<-got)
		require.True(t, ok)
		return addr
	}
	require.NoError(t, unix.Ftruncate(fd, 0x2000))
	assert.True(t, m.Owns(attempt(func() { q.Pop(Readable, room()) })), "descriptor")
	assert.True(t, m.Owns(attempt(func() { q.Put(0, 0) })), "used element")
	assert.True(t, m.Owns(attempt(func() { q.EnableNotify() })), "flags")
	require.NoError(t, unix.Ftruncate(fd, 0x1000))
	assert.True(t, m.Owns(attempt(func() { q.Avail() })), "available index")
	assert.Zero(t, q.Base())
	assert.Zero(t, q.put)
}
