package engine

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"sidewire/engine/frame"
)

// nowhere is a port that takes everything.
type nowhere struct{}

func (nowhere) Push(int, []*frame.Frame) {}

// benchSwitch is a switch of n ports that knows that many stations, spread
// over them. Station i is behind port i % n.
func benchSwitch(b *testing.B, n, stations int, c SwitchPort) (*Engine, *Switch, []Stage, []frame.PortID) {
	e, err := New(Config{Workers: 1, Poll: PollNever})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(e.Close)
	sw := e.NewSwitch(SwitchConfig{MACs: maxOwned})
	var stages []Stage
	var ids []frame.PortID
	c.Storm = -1
	for range n {
		c.Port, _ = e.AddPort("bench", nowhere{})
		st, err := sw.AddPort(c)
		if err != nil {
			b.Fatal(err)
		}
		stages, ids = append(stages, st), append(ids, c.Port)
	}
	for i := range stations {
		m := stages[i%n].(*member)
		for sec := uint32(1); sw.fdb.learn(macKey(mac(i), m.native), m.owner, sec) != learnedNew; sec++ {
			sw.fdb.sweep(1)
		}
	}
	sw.fdb.sweep(1)
	return e, sw, stages, ids
}

// fill makes the batch n frames of 60 bytes from a port, whose destinations
// dst returns.
func fill(bt *frame.Batch, n int, in frame.PortID, src frame.MAC, dst func(int) frame.MAC) {
	bt.Reset(0)
	for i := range n {
		f := bt.Next()
		f.SetBytes(eth(dst(i), src, 0), nil, nil)
		f.In = in
	}
}

// forget undoes the verdicts of a stage.
func forget(bt *frame.Batch) {
	for i := range bt.Len() {
		bt.Frame(i).Out = frame.Drop
	}
}

// BenchmarkSwitch is the stage's cost per frame for known stations, with
// frames in the first cache: bursts of 32 to one station, bursts to as many
// stations as there are, single frames.
func BenchmarkSwitch(b *testing.B) {
	for _, ports := range []int{2, 8, 64} {
		for _, stations := range []int{1, 1 << 10, 1 << 16} {
			stations = max(stations, ports)
			for _, burst := range []string{"burst", "mixed", "single"} {
				b.Run(fmt.Sprintf("ports=%d/fdb=%d/%s", ports, stations, burst), func(b *testing.B) {
					_, _, stages, ids := benchSwitch(b, ports, stations, SwitchPort{})
					var bt frame.Batch
					n := 32
					if burst == "single" {
						n = 1
					}
					// Many batches from port 0, so that the table is read all over.
					// The headers are written as a port would, by one copy: the
					// stage's loads must not wait for smaller stores.
					const sets = 1 << 11
					hdrs := make([][16]byte, sets*32)
					for i := range hdrs {
						d := rand.IntN(stations/ports)*ports + 1 + rand.IntN(ports-1)
						if burst == "burst" && i%32 != 0 {
							hdrs[i] = hdrs[i-1]
							continue
						}
						copy(hdrs[i][:], eth(mac(d), mac(0), 0))
					}
					fill(&bt, n, ids[0], mac(0), func(int) frame.MAC { return mac(1) })
					k := 0
					b.ReportAllocs()
					for b.Loop() {
						for i := range n {
							f := bt.Frame(i)
							f.Out = frame.Drop
							copy(f.Head[:16], hdrs[(k+i)%len(hdrs)][:])
						}
						k += 32
						stages[0].Process(&bt)
					}
					b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*n), "ns/frame")
				})
			}
		}
	}
}

// BenchmarkSwitchSet is what of BenchmarkSwitch is the benchmark's own.
func BenchmarkSwitchSet(b *testing.B) {
	var bt frame.Batch
	fill(&bt, 32, 1, mac(0), func(int) frame.MAC { return mac(1) })
	hdrs := make([][16]byte, 1<<16)
	k := 0
	for b.Loop() {
		for i := range 32 {
			f := bt.Frame(i)
			f.Out = frame.Drop
			copy(f.Head[:16], hdrs[(k+i)%len(hdrs)][:])
		}
		k += 32
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*32), "ns/frame")
}

// BenchmarkSwitchFlood is the cost of a broadcast per member, in bursts of 32,
// with the worker's grouping.
func BenchmarkSwitchFlood(b *testing.B) {
	for _, ports := range []int{2, 8, 64} {
		b.Run(fmt.Sprintf("ports=%d", ports), func(b *testing.B) {
			e, _, stages, ids := benchSwitch(b, ports, ports, SwitchPort{})
			var bt frame.Batch
			fill(&bt, 32, ids[0], mac(0), func(int) frame.MAC { return frame.Broadcast })
			l, w := e.layout.Load(), e.workers[0]
			b.ReportAllocs()
			for b.Loop() {
				forget(&bt)
				stages[0].Process(&bt)
				w.push(l, l.views[0], &bt)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*32*(ports-1)), "ns/frame")
		})
	}
}

// BenchmarkFDBLookup is a lookup of one of many stations at random.
func BenchmarkFDBLookup(b *testing.B) {
	for _, stations := range []int{1, 1 << 10, 1 << 16} {
		b.Run(fmt.Sprint(stations), func(b *testing.B) {
			_, sw, _, _ := benchSwitch(b, 2, stations, SwitchPort{})
			t := sw.fdb.table.Load()
			keys := make([]uint64, 1<<16)
			for i := range keys {
				keys[i] = macKey(mac(rand.IntN(stations)), 0)
			}
			i := 0
			var sum station
			for b.Loop() {
				sum += t.lookup(keys[i&0xffff])
				i++
			}
			_ = sum
		})
	}
}

// BenchmarkSwitchVLAN is the cost per frame of bursts of 32 in VLANs: between
// access ports, and from one to a trunk, where a tag is put on.
func BenchmarkSwitchVLAN(b *testing.B) {
	for name, to := range map[string]SwitchPort{"access": {Access: 10}, "trunk": {Trunk: []uint16{10}}} {
		b.Run(name, func(b *testing.B) {
			e, sw, stages, ids := benchSwitch(b, 1, 1, SwitchPort{Access: 10})
			to.Port, _ = e.AddPort("bench", nowhere{})
			st, err := sw.AddPort(to)
			if err != nil {
				b.Fatal(err)
			}
			m := st.(*member)
			sw.fdb.learn(macKey(mac(1), 10), m.owner, 1)
			var bt frame.Batch
			fill(&bt, 32, ids[0], mac(0), func(int) frame.MAC { return mac(1) })
			var saved [16]byte
			copy(saved[:], bt.Frame(0).Head[:])
			b.ReportAllocs()
			for b.Loop() {
				for i := range 32 {
					f := bt.Frame(i)
					f.Out, f.HeadLen, f.Len = frame.Drop, 18, 60
					copy(f.Head[:16], saved[:])
				}
				stages[0].Process(&bt)
			}
			if bt.Frame(0).Out != to.Port {
				b.Fatal("not forwarded")
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*32), "ns/frame")
		})
	}
}
