package virtq

import (
	"bytes"
	"math/rand/v2"
	"os/exec"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/guestmem"
)

func TestNewRefuses(t *testing.T) {
	m, err := guestmem.New(guestmem.FromHeap(0x1000, make([]byte, 0x3000)), guestmem.FromHeap(0x4000, make([]byte, 0x1000)))
	require.NoError(t, err)
	good := Config{Size: 16, Desc: 0x1000, Avail: 0x2000, Used: 0x3000}
	for _, c := range []struct {
		name string
		set  func(*Config)
		err  error
	}{
		{"sound", func(*Config) {}, nil},
		{"H040 size 0", func(c *Config) { c.Size = 0 }, ErrSize},
		{"H040 size 1", func(c *Config) { c.Size = 1 }, nil},
		{"H040 size 3", func(c *Config) { c.Size = 3 }, ErrSize},
		{"H040 size 32769", func(c *Config) { c.Size = 32769 }, ErrSize},
		{"H040 size 32768, table too short", func(c *Config) { c.Size = 32768 }, ErrRange},
		{"H041 descriptors unmapped", func(c *Config) { c.Desc = 0 }, ErrRange},
		{"H041 available ring unmapped", func(c *Config) { c.Avail = 0x5000 }, ErrRange},
		{"H041 used ring unmapped", func(c *Config) { c.Used = 1 << 60 }, ErrRange},
		{"H041 address overflows", func(c *Config) { c.Desc = ^uint64(15) }, ErrRange},
		{"H041 descriptors over two regions", func(c *Config) { c.Desc = 0x3f10 }, ErrRange},
		{"H041 available ring over two regions", func(c *Config) { c.Avail = 0x3ff8 }, ErrRange},
		{"H041 used ring over two regions", func(c *Config) { c.Used = 0x3ff8 }, ErrRange},
		{"H041 last byte of the used ring past the region", func(c *Config) { c.Used = 0x5000 - 4 - 8*16 + 4 }, ErrRange},
		{"H041 used ring ends the region", func(c *Config) { c.Used = 0x5000 - 4 - 8*16 }, nil},
		{"H041 avail_event past the region", func(c *Config) { c.Used, c.EventIdx = 0x5000-4-8*16, true }, ErrRange},
		{"H041 descriptors misaligned", func(c *Config) { c.Desc += 8 }, ErrAlign},
		{"H041 available ring misaligned", func(c *Config) { c.Avail++ }, ErrAlign},
		{"H041 used ring misaligned", func(c *Config) { c.Used += 2 }, ErrAlign},
		{"H041 available ring at 2 modulo 4", func(c *Config) { c.Avail += 2; c.EventIdx = true }, nil},
		{"H041 all the same", func(c *Config) { c.Avail, c.Used = c.Desc, c.Desc }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := good
			c.set(&cfg)
			_, err := New(m, cfg)
			require.ErrorIs(t, err, c.err)
		})
	}
}

// A region may lie in our memory as no word can be loaded from it.
func TestNewRefusesMisalignedMemory(t *testing.T) {
	b := make([]byte, 0x1001)
	m, err := guestmem.New(guestmem.FromHeap(0x1000, b[1:]))
	require.NoError(t, err)
	_, err = New(m, Config{Size: 2, Desc: 0x1000, Avail: 0x1100, Used: 0x1200})
	require.ErrorIs(t, err, ErrAlign)
}

// TestAvailRingAligned2: the index of a ring at 2 modulo 4 lies in another
// word than its flags.
func TestAvailRingAligned2(t *testing.T) {
	for _, size := range []uint16{1, 2, 16} {
		d := newDriver(t, Config{Size: size, EventIdx: true})
		b := make([]byte, 0x1000)
		extra := guestmem.FromHeap(0x100000, b)
		m, err := guestmem.New(append([]*guestmem.Region{extra}, d.mem.Regions()...)...)
		require.NoError(t, err)
		cfg := d.cfg
		cfg.Avail = 0x100002
		q, err := New(m, cfg)
		require.NoError(t, err)
		d.desc(0, desc{bufA, 1, rd, 0})

		b[4], b[5] = 1, 0 // idx; ring[0] is 0
		c, st := q.Pop(Readable, room())
		require.Equal(t, OK, st)
		q.Put(c.Head, 0)
		q.Publish()
		assert.True(t, q.NeedsNotify(), "the first is always told")
		b[4], b[5] = 2, 0
		_, st = q.Pop(Readable, room())
		require.Equal(t, OK, st)
		q.Put(0, 0)
		q.Publish()
		event := 2 + 4 + 2*int(size)
		b[event], b[event+1] = 1, 0
		assert.True(t, q.NeedsNotify(), "size %d", size)
	}
}

// H066: all indices pass 65535 -> 0, with batches of every length.
func TestIndicesWrap(t *testing.T) { both(t, testIndicesWrap) }

func testIndicesWrap(t *testing.T, packed bool) {
	for _, size := range []uint16{1, 2, 256, 32768} {
		for _, event := range []bool{false, true} {
			d, q := newQueue(t, layout(packed, Config{Size: size, Base: 65500, EventIdx: event}))
			for i := range int(size) {
				d.desc(i, desc{bufA + uint64(i%bufSize), 1, rd, 0})
			}
			rng := rand.New(rand.NewPCG(uint64(size), 7))
			head := uint16(0)
			for done := 0; done < 70000; {
				n := 1 + rng.IntN(min(int(size), 100))
				var want []elem
				for range n {
					d.stage(head)
					want = append(want, elem{uint32(head), 0})
					head = (head + 1) % size
				}
				d.storeAvail()
				if event {
					d.setUsedEvent(d.usedIx + uint16(n) - 1)
				}
				require.Equal(t, n, q.Avail())
				segs := make([][]byte, 0, 1)
				for _, w := range want {
					c, st := q.Pop(Readable, segs)
					if st != OK || uint32(c.Head) != w.id {
						t.Fatalf("size %d: %v, head %d, want %d", size, st, c.Head, w.id)
					}
					q.Put(c.Head, 0)
				}
				_, st := q.Pop(Readable, segs)
				require.Equal(t, Empty, st)
				q.Publish()
				require.True(t, q.NeedsNotify())
				require.False(t, q.NeedsNotify())
				require.False(t, q.EnableNotify())
				switch {
				case event && packed:
					require.Equal(t, eventDesc|uint32(d.packed.next.value()), d.deviceEvent())
				case event:
					require.Equal(t, d.availIx, d.availEvent())
				}
				require.Equal(t, want, d.take())
				done += n
			}
			d.checkZones(t)
		}
	}
}

func TestPublishShowsTheBatchAtOnce(t *testing.T) { both(t, testPublishShowsTheBatchAtOnce) }

func testPublishShowsTheBatchAtOnce(t *testing.T, packed bool) {
	d, q := newQueue(t, layout(packed, Config{Size: 8}))
	for i := range 4 {
		d.desc(i, desc{bufA, 1, rd, 0})
	}
	d.offer(0, 1, 2, 3)
	for range 4 {
		c, _ := q.Pop(Readable, room())
		q.Put(c.Head, 5)
		assert.Zero(t, d.usedIndex())
	}
	q.Publish()
	assert.Equal(t, []elem{{0, 5}, {1, 5}, {2, 5}, {3, 5}}, d.take())
}

// H062: the used ring is written and never read; only the guest loses what it
// scribbles over.
func TestUsedRingIsNeverRead(t *testing.T) {
	for _, event := range []bool{false, true} {
		d, q := newQueue(t, Config{Size: 4, EventIdx: event})
		for i := range 4 {
			d.desc(i, desc{bufA, 1, rd, 0})
		}
		for i := range uint16(100) {
			ring := d.at(d.cfg.Used, 4+8*4)
			for j := range ring {
				ring[j] = byte(i * 77)
			}
			d.offer(i % 4)
			c, st := q.Pop(Readable, room())
			require.Equal(t, OK, st)
			q.Put(c.Head, 3)
			q.Publish()
			require.Equal(t, i+1, d.usedIndex())
			require.Zero(t, d.usedFlags())
			require.Equal(t, []elem{{uint32(i % 4), 3}}, d.take())
		}
	}
}

func TestHotPathDoesNotAllocate(t *testing.T) {
	for _, event := range []bool{false, true} {
		d, q := newQueue(t, Config{Size: 64, EventIdx: event, Indirect: true})
		d.desc(0, desc{bufA, 64, rd, 0})
		d.chain(1, desc{bufA, 12, rd, 0}, desc{bufB - 1, 2, rd, 0})
		d.entry(bufB-8, desc{bufA, 12, rd, 0})
		d.desc(3, desc{bufB - 8, 16, in, 0})
		d.desc(4, desc{bufA, 12, wr, 0})
		segs := room()
		allocs := testing.AllocsPerRun(100, func() {
			d.offer(0, 1, 3, 4)
			for {
				c, st := q.Pop(Readable, segs)
				if st == Empty {
					break
				}
				q.Put(c.Head, 0)
			}
			q.Publish()
			q.NeedsNotify()
			q.EnableNotify()
			q.DisableNotify()
		})
		assert.Zero(t, allocs)
	}
}

// TestInlining keeps the translation of an address a few instructions long.
func TestInlining(t *testing.T) {
	enginetest.Need(t, "go")
	out, err := exec.Command("go", "build", "-gcflags=-m", ".", "../guestmem").CombinedOutput()
	require.NoError(t, err, "%s", out)
	for _, f := range []string{
		"inlining call to guestmem.(*Region).Slice",
		"inlining call to descAt",
		"inlining call to half.load",
		"can inline (*walk).push",
	} {
		assert.True(t, bytes.Contains(out, []byte(f)), f)
	}
}

func TestNames(t *testing.T) {
	assert.Equal(t, "no room", NoRoom.String())
	assert.Equal(t, "unknown", Status(99).String())
	for c := range NumCauses {
		assert.NotEmpty(t, c.String())
	}
	assert.Equal(t, "unknown", NumCauses.String())
}
