package usernet

import (
	"sidewire/engine/frame"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The guest sees each hidden client as a port of the gateway, and that port
// leads back to it.
func TestHiddenClients(t *testing.T) {
	n := newWorld(t).net
	w := n.workers[0]
	a := w.hide(53, 0x7f000001, 5000)
	assert.Equal(t, uint16(5000), a, "its own port")
	assert.Equal(t, a, w.hide(53, 0x7f000001, 5000), "again")
	b := w.hide(53, 0x7f000002, 5000)
	assert.NotEqual(t, a, b)
	assert.Equal(t, uint16(5000), w.hide(54, 0x7f000002, 5000), "another guest port")
	for port, want := range map[uint16]uint32{a: 0x7f000001, b: 0x7f000002} {
		addr, p, ok := w.revealed(53, port)
		assert.True(t, ok)
		assert.Equal(t, want, addr)
		assert.Equal(t, uint16(5000), p)
	}
	_, _, ok := w.revealed(53, 6000)
	assert.False(t, ok)
	assert.NotZero(t, w.hide(53, 0x7f000003, 65535))
	assert.NotZero(t, w.hide(53, 0x7f000004, 65535), "behind the last port")

	n.forwards.hidden.forget(53)
	_, _, ok = w.revealed(53, a)
	assert.False(t, ok)
	_, _, ok = w.revealed(54, 5000)
	assert.True(t, ok)
}

// They are bounded; those that are silent make room.
func TestHiddenClientsBounded(t *testing.T) {
	n := newWorld(t).net
	w := n.workers[0]
	at := func(d time.Duration) { w.begin(&frame.Batch{Now: int64(time.Hour + d)}) }
	at(0)
	for i := range hiddenMax {
		require.NotZero(t, w.hide(53, 0x0a000000+uint32(i), 5000))
	}
	assert.Zero(t, w.hide(53, 0x0b000000, 5000))
	at(4 * time.Minute)
	assert.Zero(t, w.hide(53, 0x0b000000, 5000))
	_, _, ok := w.revealed(53, 5000)
	require.True(t, ok, "which keeps it")
	at(6 * time.Minute)
	assert.NotZero(t, w.hide(53, 0x0b000000, 5000))
	_, _, ok = w.revealed(53, 5000)
	assert.True(t, ok)
	assert.Len(t, n.forwards.hidden.shown, 2)
	assert.Len(t, n.forwards.hidden.behind, 2)
	at(7 * time.Minute)
	assert.Zero(t, testing.AllocsPerRun(100, func() {
		w.hide(53, 0x0b000000, 5000)
		w.revealed(53, 5000)
	}))
}
