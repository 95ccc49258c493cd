package vhostuser

import (
	"strconv"
	"testing"

	"sidewire/engine/frame"
)

// BenchmarkGuestToGuest measures what a frame costs from one guest's tx ring
// to another's rx ring, with batches of 32 and the cost of the driver, which
// is a few stores, included.
func BenchmarkGuestToGuest(b *testing.B) {
	for _, size := range []int{60, 1514} {
		b.Run(strconv.Itoa(size), func(b *testing.B) {
			d := newDevice(b, Config{})
			f := connect(b, d)
			f.bringUp(plainFeats|featMrgRxbuf|featEventIdx, 2)
			rx, tx := f.rings[0], f.rings[1]
			p := d.Pairs()[0]
			var batch frame.Batch
			fs := make([]*frame.Frame, 0, frame.BatchMax)
			// The buffers stay where they are; the driver only makes them
			// available again.
			for range testRing {
				tx.send(frame.Offload{}, 12, testFrame(size, 1))
				rx.recv(2048)
			}
			rx.avail -= testRing
			tx.avail -= testRing
			const n = 32
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for i := 0; i < b.N; i += n {
				tx.avail += n
				rx.avail += n
				native.PutUint16(tx.at(availAt+2), tx.avail)
				native.PutUint16(rx.at(availAt+2), rx.avail)
				batch.Reset(0)
				p.Pull(&batch)
				fs = fs[:0]
				for i := range batch.Len() {
					fs = append(fs, batch.Frame(i))
				}
				d.Push(0, fs)
				p.Release(&batch)
			}
			b.StopTimer()
			if st := p.status(); st.RxFrames < uint64(b.N) {
				b.Fatalf("%d frames of %d arrived: %v", st.RxFrames, b.N, st.Drops)
			}
		})
	}
}
