package usernet

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

// A wheel does what a list of times would, whatever is set, moved and stopped.
func TestWheelAgainstModel(t *testing.T) {
	for seed := range uint64(20) {
		r := rand.New(rand.NewPCG(seed, 1))
		var tab table
		tab.init(1 << 10)
		var w wheel
		now := uint32(r.Uint64())
		w.init(&tab, now)
		due := map[int32]uint32{}
		var flows []int32
		for i := range 200 {
			flows = append(flows, tab.add(key{gport: uint16(i), proto: frame.ProtoTCP}))
		}
		for range 3000 {
			i := flows[r.IntN(len(flows))]
			switch r.IntN(4) {
			case 0, 1:
				d := uint32(1) << r.IntN(28)
				tick := now + 1 + r.Uint32N(d)
				w.set(i, tick)
				due[i] = tick
			case 2:
				w.stop(i)
				delete(due, i)
			default:
				next, ok := w.next()
				require.Equal(t, len(due) > 0, ok)
				for _, d := range due {
					require.LessOrEqual(t, int32(next-d), int32(0), "a worker would sleep for too long")
				}
				now += r.Uint32N(1 << r.IntN(24))
				for i := w.due(now); i != none; i = w.due(now) {
					d, ok := due[i]
					require.True(t, ok)
					require.Equal(t, d, w.now, "in its tick, and so in order")
					delete(due, i)
				}
				for _, d := range due {
					require.Positive(t, int32(d-now))
				}
			}
		}
	}
}

// However many timers there are, a sleep that ends before the first of them
// costs the same.
func TestWheelIdleIsCheap(t *testing.T) {
	var tab table
	tab.init(1 << 17)
	var w wheel
	w.init(&tab, 0)
	for i := range 1 << 17 {
		w.set(tab.add(key{gport: uint16(i), rport: uint16(i >> 16)}), ticks(int64(time.Hour))+uint32(i))
	}
	steps := 0
	for now := uint32(1); now < 1000; now++ {
		require.Equal(t, none, w.due(now))
		steps++
	}
	next, ok := w.next()
	require.True(t, ok)
	assert.Greater(t, next, uint32(64*64), "nothing wakes up before")
}
