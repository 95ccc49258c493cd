package vhosttest

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// TestTxAttacksOnOurBackend plays every hostile tx input (H049 to H058); frames
// get through before and after each.
func TestTxAttacksOnOurBackend(t *testing.T) { bothRings(t, testTxAttacksOnOurBackend) }

func testTxAttacksOnOurBackend(t *testing.T) {
	for _, features := range []uint64{LinuxFeatures, NoOffloads &^ FeatEventIdx, LinuxFeatures &^ FeatMrgRxbuf} {
		paths, _ := wire(t, 1, 1)
		bad := connect(t, Options{Path: paths[0], Features: features, RingSize: 64})
		peer := connect(t, Options{Path: paths[1], Features: features})
		pass := func(name string, i int) {
			want := enginetest.Payload(60+i, byte(i))
			require.NoError(t, bad.Send(0, want, frame.Offload{}), name)
			p, err := peer.Recv(0, soon)
			require.NoError(t, err, name)
			require.Equal(t, want, p.Bytes, name)
			require.NoError(t, bad.Drain(0, soon), name)
		}
		pass("before", 0)
		for i, a := range TxAttacks() {
			if !a.Suits(bad.Features) {
				continue
			}
			require.NoError(t, bad.Attack(a, 0, enginetest.Payload(60, 9), soon))
			if a.Want == Stopped {
				require.NoError(t, bad.Revive(bad.Tx(0)), a.Name)
			}
			pass(a.Name, i)
		}
	}
}

func TestRxAttacksOnOurBackend(t *testing.T) { bothRings(t, testRxAttacksOnOurBackend) }

func testRxAttacksOnOurBackend(t *testing.T) {
	paths, _ := wire(t, 1, 1)
	bad := connect(t, Options{Path: paths[0], RingSize: 64})
	peer := connect(t, Options{Path: paths[1]})
	want := enginetest.Payload(900, 3)
	push := func() error { return peer.Send(0, want, frame.Offload{}) }
	for _, a := range RxAttacks() {
		if !a.Suits(bad.Features) {
			continue
		}
		require.NoError(t, bad.AttackRx(a, 0, want, push, soon))
		require.NoError(t, bad.Revive(bad.Rx(0)))
		require.NoError(t, push())
		p, err := bad.Recv(0, soon)
		require.NoError(t, err, a.Name)
		require.Equal(t, want, p.Bytes, a.Name)
	}
}

// An attack that the backend takes for a good chain is found: the catalogue
// can fail.
func TestAttackFindsCarelessBackend(t *testing.T) { bothRings(t, testAttackFindsCarelessBackend) }

func testAttackFindsCarelessBackend(t *testing.T) {
	b := &loopback{}
	g := connect(t, Options{Path: startLoopback(t, b)})
	harmless := Attack{No: "H000", Name: "nothing wrong", Want: Stopped, post: func(a *attacker) { a.d(0, 0, 0) }}
	assert.ErrorIs(t, g.Attack(harmless, 0, enginetest.Payload(60, 1), 100*time.Millisecond), ErrBackend)
}

func TestDirtyLogOfOurBackend(t *testing.T) { bothRings(t, testDirtyLogOfOurBackend) }

func testDirtyLogOfOurBackend(t *testing.T) {
	for _, o := range []Options{{RxBufSize: 700}, {Features: NoOffloads &^ FeatEventIdx}} {
		paths, _ := wire(t, 1, 1)
		o.Path = paths[0]
		g := connect(t, o)
		o.Path, o.RxBufSize = paths[1], 0
		peer := connect(t, o)
		exchange := func(n int) {
			for i := range n {
				require.NoError(t, peer.Send(0, enginetest.Payload(60+20*i, byte(i)), frame.Offload{}))
				_, err := g.Recv(0, soon)
				require.NoError(t, err)
				require.NoError(t, g.Send(0, enginetest.Payload(60+20*i, byte(i)), frame.Offload{}))
				_, err = peer.Recv(0, soon)
				require.NoError(t, err)
			}
		}
		exchange(20)
		l, err := g.StartLog()
		require.NoError(t, err)
		exchange(70)
		require.NoError(t, g.Sync())
		require.NoError(t, l.Check())
		require.True(t, l.Marked(g.Rx(0).Used))
		clear(l.bitmap.Bytes)
		require.ErrorIs(t, l.Check(), ErrBackend, "the check can fail")
		require.NoError(t, l.Close())
		exchange(5)
	}
}
