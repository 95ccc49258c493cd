package nat

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

// TestConcurrentWorkers lets several workers open, use and lose flows at once,
// with a sweeper beside them: a translation is always the right one, and at
// the end nothing is left or counted.
func TestConcurrentWorkers(t *testing.T) {
	for _, f := range []Filtering{EndpointIndependent, AddressDependent} {
		w := newWorld(t, filtering(f), limits(Limits{UDP: 300, NewPerSecond: 1e9, NewBurst: 1e9}),
			listed(Forward{Port: 80, Proto: 17}), twoGuests, func(c *Config) { c.Timeouts.UDP = 3 * time.Second })
		var now atomic.Int64
		now.Store(w.now)
		var wg sync.WaitGroup
		stop := make(chan struct{})
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					w.m.Sweep(now.Add(int64(200 * time.Millisecond)))
					w.m.Flows(now.Load(), func(FlowInfo) bool { return true })
				}
			}
		})
		var bad, good atomic.Int64
		var workers sync.WaitGroup
		for id := range 4 {
			workers.Go(func() { hammer(w.m, uint64(id), &now, &good, &bad) })
		}
		workers.Wait()
		close(stop)
		wg.Wait()
		require.Zero(t, bad.Load())
		require.Positive(t, good.Load())
		w.now = now.Load() + int64(time.Hour)
		w.m.Sweep(w.now)
		s := w.m.Stats()
		assert.Zero(t, s.Flows)
		assert.Zero(t, s.Mappings)
		for _, g := range s.Guests {
			g.MAC = ""
			assert.Equal(t, GuestStats{}, g)
		}
		for i := range w.m.table.heads {
			require.Zero(t, w.m.table.heads[i].Load(), "a chain still holds a flow")
		}
	}
}

func hammer(m *Masquerade, seed uint64, now, good, bad *atomic.Int64) {
	rnd := rand.New(rand.NewPCG(seed, 1))
	b := new(frame.Batch)
	stages := [2]*Outbound{m.Outbound(0), m.Outbound(1)}
	in := m.Inbound()
	one := func(s interface{ Process(*frame.Batch) }, p packet) *frame.Frame {
		b.Reset(now.Load())
		f := b.Next()
		f.SetBytes(p.data, nil, b.Segs(1))
		s.Process(b)
		return f
	}
	for range 3000 {
		g, src := rnd.IntN(2), guestIP
		if g == 1 {
			src = guestIP2
		}
		f := flow5{src, hostB + uint32(rnd.IntN(40)), uint16(50000 + 100*g + rnd.IntN(4)), 53}
		if rnd.IntN(8) == 0 {
			one(in, udp(toPod(hostA, uint16(1+rnd.IntN(9)), 80), "x"))
			continue
		}
		o := one(stages[g], udp(f, "x"))
		if o.Out == frame.Drop {
			continue
		}
		if o.SrcIP4() != podIP || o.DstIP4() != f.dst {
			bad.Add(1)
		}
		back := one(in, udp(flow5{f.dst, podIP, 53, o.SrcPort()}, "y"))
		switch {
		case back.Out == frame.Drop, back.Out == portTap: // it has expired meanwhile
		case back.SrcIP4() != f.dst, (back.DstIP4() == guestIP) != (back.DstPort() < 50100):
			// Somebody else may have got the port since, but with its own.
			bad.Add(1)
		default:
			good.Add(1)
		}
	}
}

// TestConcurrentFragments sends the fragments of packets by two workers.
func TestConcurrentFragments(t *testing.T) {
	w := newWorld(t)
	first := make(chan packet, 64)
	rest := make(chan packet, 64)
	var through atomic.Int64
	var wg sync.WaitGroup
	for _, c := range []chan packet{first, rest} {
		wg.Go(func() {
			b, s := new(frame.Batch), w.m.Outbound(0)
			for p := range c {
				b.Reset(w.now)
				b.Next().SetBytes(p.data, nil, b.Segs(1))
				s.Process(b)
				for i := range b.Len() {
					if b.Frame(i).Out == portUplink {
						through.Add(1)
					}
				}
			}
		})
	}
	const n = 500
	whole := fragments(udp(fromGuestTo(2000, hostB, 53), pattern(2000)), 1480)
	for i := range n {
		for j, c := range []chan packet{first, rest} {
			c <- edit(whole[j], func(ip []byte) { ip[4], ip[5] = byte(i>>8), byte(i) })
		}
	}
	close(first)
	close(rest)
	wg.Wait()
	s := w.m.Stats().Fragments
	assert.EqualValues(t, 2*n-s.Dropped, through.Load(), "%+v", s)
	assert.Zero(t, s.Waiting)
}
