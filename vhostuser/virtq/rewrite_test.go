package virtq

import (
	"encoding/binary"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/vhostuser/guestmem"
)

// fenced makes a region between two pages that nobody may touch. It is a
// mapping, so the race detector does not mind that the guest writes to it.
func fenced(t *testing.T, gpa uint64, size int) *guestmem.Region {
	t.Helper()
	page := os.Getpagesize()
	b, err := unix.Mmap(-1, 0, size+2*page, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, unix.Munmap(b)) })
	in := b[page : page+size : page+size]
	require.NoError(t, unix.Mprotect(in, unix.PROT_READ|unix.PROT_WRITE))
	return guestmem.FromHeap(gpa, in)
}

// H061: another CPU of the guest rewrites descriptors and indirect tables all
// the while. What Pop returns is in memory and as long as it says, whatever
// mixture of old and new it has read.
func TestGuestRewritesChains_H061(t *testing.T) { both(t, testGuestRewritesChains_H061) }

func testGuestRewritesChains_H061(t *testing.T, packed bool) {
	const size, table, tables = 4, bufA + 64, 4
	c := Config{Size: size, Desc: ringGPA, Avail: ringGPA + 0x400, Used: ringGPA + 0x800, Indirect: true}
	m, err := guestmem.New(fenced(t, ringGPA, 0x1000), fenced(t, bufA, bufSize), fenced(t, bufB, bufSize))
	require.NoError(t, err)
	c = layout(packed, c)
	d := &driver{mem: m, cfg: c}
	if packed {
		d.packed = newPackedDriver(c)
	}
	q, err := New(m, c)
	require.NoError(t, err)

	rng := rand.New(rand.NewPCG(6, 1))
	addrs := []uint64{bufA, bufB - 16, bufB, bufB + bufSize - 64, bufB + bufSize - 1, 0, ^uint64(0) - 7}
	for i := range uint64(tables) {
		addrs = append(addrs, table+256*i)
	}
	// Lengths and flags of which most are good, so that the bad ones come in
	// between looking and using.
	lens := []uint32{16, 16, 32, 48, 64, 64, 100, bufSize, 1 << 31}
	flags := []uint16{0, 0, flagWrite, flagWrite, flagNext, flagNext | flagWrite, flagIndirect}
	ring := d.at(ringGPA, descLen*size)
	all := d.at(table, 256*tables) // each with more room than it needs
	flagsAt, nextAt := 12, 14
	if packed {
		flagsAt, nextAt = 14, 12
	}
	rewrite := func(b []byte, links bool) {
		switch n := rng.IntN(4); {
		case n == 0:
			binary.LittleEndian.PutUint64(b, addrs[rng.IntN(len(addrs))])
		case n == 1 && links:
			binary.LittleEndian.PutUint16(b[flagsAt:], flags[rng.IntN(len(flags))])
		case n == 2 && links:
			binary.LittleEndian.PutUint16(b[nextAt:], uint16(rng.IntN(20)))
		}
		binary.LittleEndian.PutUint32(b[8:], lens[rng.IntN(len(lens))])
	}
	stop := make(chan struct{})
	var guest sync.WaitGroup
	guest.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			if packed {
				// Ids and flags of the ring stay: another would break it.
				rewrite(ring[i%size*descLen:], false)
			} else {
				rewrite(ring[i%size*descLen:], true)
			}
			rewrite(all[i%tables*256+i/tables%size*descLen:], true)
		}
	})
	defer guest.Wait()
	defer close(stop)

	rng2 := rand.New(rand.NewPCG(6, 2)) // of this goroutine
	rounds := 1_000_000
	if testing.Short() {
		rounds /= 10
	}
	var seen [Broken + 1]int
	segs := room()
	for i := range rounds {
		head := uint16(i % size)
		if packed {
			d.desc(int(head), desc{addrs[rng2.IntN(len(addrs))], lens[rng2.IntN(len(lens))], flags[rng2.IntN(4)], 0})
			if rng2.IntN(2) == 0 {
				d.desc(int(head), desc{table + 256*uint64(rng2.IntN(tables)), 16 * uint32(1+rng2.IntN(size)), flagIndirect, 0})
			}
		}
		d.offer(head)
		dir := Direction(i & 2)
		got, st := q.Pop(dir, segs)
		seen[st]++
		switch st {
		case OK:
			sum := 0
			for _, s := range d.spans(t, got.Segs) {
				sum += s.n
			}
			if got.Len != sum || sum == 0 || sum > MaxBytes {
				t.Fatalf("%d bytes in slices of %d", got.Len, sum)
			}
			for _, s := range got.Segs {
				if dir == Writable {
					s[0], s[len(s)-1] = 1, 1
				}
				_, _ = s[0], s[len(s)-1]
			}
		case Bad:
			if q.LastCause() == NoCause {
				t.Fatal("bad without a cause")
			}
		default:
			t.Fatalf("%v: %v", st, q.Err())
		}
		q.Put(got.Head, 0)
		q.Publish()
		if els := d.take(); len(els) != 1 || els[0].id != uint32(head) {
			t.Fatalf("used %v, want head %d", els, got.Head)
		}
	}
	require.NotZero(t, seen[OK])
	require.NotZero(t, seen[Bad])
	t.Logf("%d good, %d bad", seen[OK], seen[Bad])
}
