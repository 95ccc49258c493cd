package virtq

import (
	"math/rand/v2"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"sidewire/vhostuser/guestmem"
)

// TestRunIsManyPops compares PopRun with Pop over random rings: the same
// chains in the same order, and it stops where a chain is anything but one
// sound buffer.
func TestRunIsManyPops(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 7))
	for _, dir := range []Direction{Readable, Writable} {
		flag := uint16(0)
		if dir == Writable {
			flag = flagWrite
		}
		runs := 0
		for range 500 {
			c := Config{Size: 16, Base: uint16(rnd.Uint32()), Indirect: true}
			d, q := newQueue(t, c)
			other, err := New(d.mem, d.cfg)
			require.NoError(t, err)
			for i := range 16 {
				v := desc{bufA + uint64(rnd.IntN(64)), uint32(1 + rnd.IntN(200)), flag, 0}
				switch rnd.IntN(20) {
				case 0:
					v.addr = bufFar
				case 1:
					v.addr = 0x1000 // unmapped
				case 2:
					v.len = 0
				case 3:
					v.flags ^= flagWrite
				case 4:
					v.flags |= flagNext
					v.next = uint16(rnd.IntN(16))
				case 5:
					v.flags |= flagIndirect
				case 6:
					v.addr, v.len = bufB-8, 16 // crosses regions
				case 7:
					v.len = MaxBytes + 1
				}
				d.desc(i, v)
			}
			for range rnd.IntN(17) {
				d.offer(uint16(rnd.IntN(17))) // 16 is no head
			}
			for {
				var bufs [8]Buf
				n := q.PopRun(dir, bufs[:1+rnd.IntN(8)])
				runs += n
				for _, b := range bufs[:n] {
					p, st := other.Pop(dir, room())
					require.Equal(t, OK, st)
					require.Equal(t, p.Head, b.Head)
					require.Len(t, p.Segs, 1)
					require.Same(t, &p.Segs[0][0], &b.B[0])
					require.Len(t, b.B, len(p.Segs[0]))
				}
				require.Equal(t, other.Base(), q.Base())
				if n > 0 {
					continue
				}
				_, st := other.Pop(dir, room())
				_, got := q.Pop(dir, room())
				require.Equal(t, st, got)
				if st == Empty || st == Broken {
					break
				}
			}
		}
		require.Greater(t, runs, 500)
	}
}

func TestPutRun(t *testing.T) { both(t, testPutRun) }

func testPutRun(t *testing.T, packed bool) {
	d, q := newQueue(t, layout(packed, Config{Size: 16, Base: 65530}))
	for i := range 10 {
		d.desc(i, desc{bufA, 64, flagWrite, 0})
		d.offer(uint16(i))
	}
	var bufs [16]Buf
	require.Equal(t, 10, q.PopRun(Writable, bufs[:]))
	q.Rewind(3)
	require.Equal(t, 3, q.PopRun(Writable, bufs[7:]))
	for i := range 10 {
		bufs[i].N = uint32(i)
	}
	q.PutRun(bufs[:10])
	require.Empty(t, d.take(), "not before Publish")
	q.Publish()
	got := d.take()
	require.Len(t, got, 10)
	for i, e := range got {
		require.Equal(t, elem{uint32(i), uint32(i)}, e)
	}
}

// While writes are marked, chains are taken one by one.
func TestNoRunWhileLogging(t *testing.T) { both(t, testNoRunWhileLogging) }

func testNoRunWhileLogging(t *testing.T, packed bool) {
	d, q := newQueue(t, layout(packed, Config{Size: 16}))
	d.desc(0, desc{bufA, 64, flagWrite, 0})
	d.offer(0)
	setLog(q, new(guestmem.Log), 0)
	require.Zero(t, q.PopRun(Writable, make([]Buf, 4)))
	setLog(q, nil, 0)
	require.Equal(t, 1, q.PopRun(Writable, make([]Buf, 4)))
}

func BenchmarkRun(b *testing.B) {
	for _, n := range []int{1, 8, 64} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			d, q := newQueue(b, Config{Size: 256})
			for i := range 256 {
				d.desc(i, desc{bufA + uint64(i)*16, 76, 0, 0})
				d.offer(uint16(i))
			}
			d.availIx -= 256
			bufs := make([]Buf, n)
			for i := 0; i < b.N; i += n {
				d.availIx += uint16(n)
				d.storeAvail()
				if q.PopRun(Readable, bufs) != n {
					b.Fatal("no run")
				}
				q.PutRun(bufs)
				q.Publish()
			}
		})
	}
}

func TestHolds(t *testing.T) { both(t, testHolds) }

func testHolds(t *testing.T, packed bool) {
	d, q := newQueue(t, layout(packed, Config{Size: 16}))
	require.False(t, q.Holds(1))
	for i := range 5 {
		d.desc(i, desc{bufA, 64, 0, 0})
		d.offer(uint16(i))
	}
	require.True(t, q.Holds(5))
	require.False(t, q.Holds(6))
	require.Equal(t, 2, q.PopRun(Readable, make([]Buf, 2)))
	require.True(t, q.Holds(3))
	require.False(t, q.Holds(4))
}
