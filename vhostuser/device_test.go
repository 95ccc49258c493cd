package vhostuser

import (
	"testing"

	"github.com/stretchr/testify/require"

	"sidewire/engine"
	"sidewire/engine/frame"
)

var (
	_ engine.Port    = (*Device)(nil)
	_ engine.Queue   = (*Pair)(nil)
	_ engine.Faulter = (*Device)(nil)
	_ Watcher        = (*engine.Worker)(nil)
)

func TestThereAndBack(t *testing.T) { bothRings(t, testThereAndBack) }

func testThereAndBack(t *testing.T) {
	d := newDevice(t, Config{QueuePairs: 1})
	f := connect(t, d)
	f.bringUp(plainFeats|featMrgRxbuf, 2)
	rx, tx := f.rings[0], f.rings[1]

	want := [][]byte{testFrame(60, 1), testFrame(1514, 2)}
	heads := []uint16{tx.send(frame.Offload{}, 12, want[0]), tx.send(frame.Offload{}, 12, want[1])}
	got, _ := pull(d.Pairs()[0])
	require.Equal(t, want, got)
	for _, h := range heads {
		head, n, ok := tx.take()
		require.True(t, ok)
		require.Equal(t, h, head)
		require.Zero(t, n)
	}
	require.True(t, tx.signalled())

	rx.recv(1600)
	h := rx.recv(1600)
	_ = h
	fs := pushBytes(d, want...)
	require.Equal(t, frame.ReasonNone, fs[0].Reason)
	require.Equal(t, frame.ReasonNone, fs[1].Reason)
	for _, w := range want {
		head, n, ok := rx.take()
		require.True(t, ok)
		require.EqualValues(t, 12+len(w), n)
		b := rx.bytes(head, n)
		require.Equal(t, w, b[12:])
		require.EqualValues(t, 1, native.Uint16(b[10:]), "num_buffers")
	}
	require.True(t, rx.signalled())
	require.Equal(t, Up, d.Status().State)

	p := f.ask(GetVringBase, u32s(1, 0))
	require.Equal(t, u32s(1, f.baseOf(2)), p)
}
