package vhostuser

import (
	"strconv"
	"testing"

	"sidewire/engine/frame"
	"sidewire/vhostuser/virtq"
)

// guestToGuest is a guest whose tx ring is full of frames and whose rx ring is
// full of buffers, all of which stay where they are: its driver, which is a few
// stores, only makes them available again.
type guestToGuest struct {
	d      *Device
	p      *Pair
	tx, rx *guestRing
}

func newGuestToGuest(b *testing.B, size int) *guestToGuest {
	d := newDevice(b, Config{Snapshot: 18})
	f := connect(b, d)
	f.bringUp(plainFeats|featMrgRxbuf|featEventIdx, 2)
	g := &guestToGuest{d: d, p: d.Pairs()[0], rx: f.rings[0], tx: f.rings[1]}
	for range testRing {
		g.tx.send(frame.Offload{}, 12, testFrame(size, 1))
		g.rx.recv(2048)
	}
	g.rx.avail -= testRing
	g.tx.avail -= testRing
	return g
}

// offer makes n more frames and buffers available.
func (g *guestToGuest) offer(n uint16) {
	g.tx.avail += n
	g.rx.avail += n
	native.PutUint16(g.tx.at(availAt+2), g.tx.avail)
	native.PutUint16(g.rx.at(availAt+2), g.rx.avail)
}

// benchFrames is how many frames there are in a batch.
const benchFrames = 32

// BenchmarkGuestToGuest measures what a frame costs from a tx ring to an rx
// ring by way of frames and batches.
func BenchmarkGuestToGuest(b *testing.B) {
	for _, size := range []int{60, 1514} {
		b.Run(strconv.Itoa(size), func(b *testing.B) {
			g := newGuestToGuest(b, size)
			var batch frame.Batch
			fs := make([]*frame.Frame, 0, frame.BatchMax)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for i := 0; i < b.N; i += benchFrames {
				g.offer(benchFrames)
				batch.Reset(0)
				g.p.heavy = false // what is here is all that comes
				g.p.Pull(&batch)
				fs = fs[:0]
				for i := range batch.Len() {
					fs = append(fs, batch.Frame(i))
				}
				g.d.Push(0, fs)
				g.p.Release(&batch)
			}
			b.StopTimer()
			if st := g.p.status(); st.RxFrames < uint64(b.N) {
				b.Fatalf("%d frames of %d arrived: %v", st.RxFrames, b.N, st.Drops)
			}
		})
	}
}

// BenchmarkFused is the bound for the one before: a loop that copies from ring
// to ring and knows nothing of frames, offloads, counters or faults. It is kept
// to see what the structure costs.
func BenchmarkFused(b *testing.B) {
	for _, size := range []int{60, 1514} {
		b.Run(strconv.Itoa(size), func(b *testing.B) {
			g := newGuestToGuest(b, size)
			tx, rx := g.p.tx.Load().q, g.p.rx.q
			var from, to [benchFrames]virtq.Buf
			b.SetBytes(int64(size))
			for i := 0; i < b.N; i += benchFrames {
				g.offer(benchFrames)
				n := tx.PopRun(virtq.Readable, from[:])
				if rx.PopRun(virtq.Writable, to[:n]) != benchFrames {
					b.Fatal("no room")
				}
				for i := range n {
					to[i].N = uint32(copy(to[i].B, from[i].B))
					native.PutUint32(to[i].B[8:], 1<<16) // num_buffers
				}
				rx.PutRun(to[:n])
				rx.Publish()
				tx.PutRun(from[:n])
				tx.Publish()
				_, _ = rx.NeedsNotify(), tx.NeedsNotify()
			}
		})
	}
}
