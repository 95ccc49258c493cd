package virtq

import (
	"strconv"
	"testing"
)

// BenchmarkPopPut is the cost of a frame on a ring, without its bytes: batches
// of 64 on a ring of 256, one publish and one notification decision each.
func BenchmarkPopPut(b *testing.B) {
	const batch = 64
	for _, c := range []struct {
		name string
		set  func(d *driver, i int)
		dir  Direction
	}{
		{"one", func(d *driver, i int) { d.desc(i, desc{bufA + uint64(i)*8, 64, rd, 0}) }, Readable},
		{"write", func(d *driver, i int) { d.desc(i, desc{bufA + uint64(i)*8, 64, wr, 0}) }, Writable},
		{"two", func(d *driver, i int) {
			d.desc(i, desc{bufA, 12, nx, uint16(i+1) % 256})
			d.desc((i+1)%256, desc{bufB, 64, rd, 0})
		}, Readable},
		{"indirect", func(d *driver, i int) {
			t := bufFar + 32*uint64(i%64)
			d.descAt(t, desc{bufA, 12, nx, 1})
			d.descAt(t+16, desc{bufA + 12, 64, rd, 0})
			d.desc(i, desc{t, 32, in, 0})
		}, Readable},
	} {
		b.Run(c.name, func(b *testing.B) {
			d, q := newQueue(b, Config{Size: 256, EventIdx: true, Indirect: true})
			for i := range 256 {
				if c.name == "two" {
					i = i &^ 1
				}
				c.set(d, i)
				d.stage(uint16(i))
			}
			d.availIx = 0
			room := make([][]byte, 0, 4*batch)
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				if n%batch == 0 {
					d.availIx += batch
					d.storeAvail()
				}
				n++
				ch, st := q.Pop(c.dir, room)
				if st != OK {
					b.Fatal(st, q.LastCause())
				}
				q.Put(ch.Head, 0)
				if n%batch == 0 {
					q.Publish()
					q.NeedsNotify()
				}
			}
		})
	}
}

// BenchmarkPackedRun is BenchmarkRun on a packed ring, with the driver's work of
// making the same descriptors available again.
func BenchmarkPackedRun(b *testing.B) {
	for _, n := range []int{1, 8, 64} {
		b.Run(strconv.Itoa(n), func(b *testing.B) {
			d, q := newQueue(b, Config{Size: 256, Packed: true, Base: 1 << 15})
			for i := range 256 {
				d.slot(i).addr = bufA + uint64(i)*16
			}
			at := d.packed.next
			bufs := make([]Buf, n)
			b.ReportAllocs()
			for i := 0; i < b.N; i += n {
				for range n {
					s := d.slot(at.at)
					s.len, s.word = 76, uint32(at.at)|uint32(at.availFlags())<<16
					at = at.forward(1, 256)
				}
				if q.PopRun(Readable, bufs) != n {
					b.Fatal("no run")
				}
				q.PutRun(bufs)
				q.Publish()
			}
		})
	}
}
