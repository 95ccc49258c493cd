package vhostuser

import (
	"runtime"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// What status says of a pair's memory is what it takes, and less than the 64 KiB
// of each queue that the kernel's vhost takes.
func TestFootprint(t *testing.T) { bothRings(t, testFootprint) }

func testFootprint(t *testing.T) {
	const pairs = 100
	before := heap()
	d := newDevice(t, Config{QueuePairs: pairs})
	f := connect(t, d)
	one := heap()
	f.bringUp(plainFeats, 8)
	all := heap()
	st := d.Status()
	sum := 0
	for _, p := range st.Pairs {
		sum += p.MemoryBytes
	}
	idle, busy := st.Pairs[50].MemoryBytes, st.Pairs[0].MemoryBytes
	t.Logf("%d bytes a pair, %d when it runs; heap grew by %d and %d", idle, busy, one-before, all-one)
	assert.InDelta(t, float64(one-before), float64(pairs*idle), 0.25*float64(pairs*idle))
	assert.InDelta(t, float64(all-one), float64(4*(busy-idle)), 0.25*float64(4*(busy-idle)))
	require.Less(t, busy, 64<<10)
	require.Equal(t, sum, 96*idle+4*busy)
}
