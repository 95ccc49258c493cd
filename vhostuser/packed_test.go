package vhostuser

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// Packed rings are offered to nobody who was not asked to.
func TestPackedIsOnRequest(t *testing.T) {
	for _, packed := range []bool{false, true} {
		d := newDevice(t, Config{Packed: packed})
		f := connect(t, d)
		f.send(SetProtocolFeatures, flagVersion, u64(offeredProtocol))
		require.Equal(t, packed, native.Uint64(f.ask(GetFeatures, nil))&featRingPacked != 0)
		require.Equal(t, packed, f.try(SetFeatures, u64(plainFeats|featRingPacked)) == 0)
	}
}

// H040: a packed ring may have any number of entries, a split one may not, and
// before features are known nobody can tell.
func TestPackedRingSizes_H040(t *testing.T) {
	d := newDevice(t, Config{Packed: true})
	f := connect(t, d)
	f.send(SetProtocolFeatures, flagVersion, u64(offeredProtocol))
	for _, n := range []uint32{1, 3, 100, 32767, 32768} {
		f.do(SetVringNum, u32s(0, n))
	}
	for _, n := range []uint32{0, 32769, 65536, 1<<32 - 1} {
		require.NotZero(t, f.try(SetVringNum, u32s(0, n)))
	}
	f.do(SetFeatures, u64(plainFeats))
	require.NotZero(t, f.try(SetVringNum, u32s(0, 100)))
	require.NotZero(t, f.try(SetVringBase, u32s(0, 1<<16)))
	f.do(SetFeatures, u64(plainFeats|featRingPacked))
	f.do(SetVringNum, u32s(0, 100))
	f = connect(t, newDevice(t, Config{}))
	f.send(SetProtocolFeatures, flagVersion, u64(offeredProtocol))
	require.NotZero(t, f.try(SetVringNum, u32s(0, 100)))
}

// H043, H068: what is told of a packed ring's beginning.
func TestPackedBase(t *testing.T) {
	packedRings = true
	defer func() { packedRings = false }()
	for name, c := range map[string]struct {
		base uint32
		runs bool
	}{
		"both places":            {1<<31 | 1<<15, true},
		"the first place only":   {1 << 15, true}, // DPDK's virtio-user and vhost
		"index behind the ring":  {1<<15 | testRing, false},
		"index far off":          {0x7fff, false},
		"another used place":     {5<<16 | 1<<15, true},
		"other lap: nobody home": {0, true},
	} {
		t.Run(name, func(t *testing.T) {
			noLeak(t)
			d := newDevice(t, Config{})
			f := connect(t, d)
			f.negotiate(plainFeats)
			f.do(SetVringEnable, u32s(1, 1))
			f.share()
			ev := eventfd(t)
			defer closeFD(ev)
			f.do(SetVringErr, u64(1), ev)
			f.do(SetVringNum, u32s(1, testRing))
			f.do(SetVringBase, u32s(1, c.base))
			f.do(SetVringAddr, addr(1, 0, ringSpace))
			f.rings[1].send(frame.Offload{}, 12, testFrame(60, 1))
			f.do(SetVringKick, u64(1), f.rings[1].kick)
			var b [8]byte
			n, _ := unix.Read(ev, b[:])
			require.Equal(t, !c.runs, n == 8, "error signalled")
			got, _ := pull(d.Pairs()[0])
			at := c.base & 0xffff
			if at == 1<<15 {
				require.Len(t, got, 1)
				at++
			} else {
				require.Empty(t, got)
			}
			require.Equal(t, u32s(1, at|at<<16), f.ask(GetVringBase, u32s(1, 0)))
			require.EqualValues(t, 0, d.Status().Counters["broken_rings"])
		})
	}
}

// H068, T13: QEMU sends a stale beginning after a crash, with the ring far
// ahead. Nothing is written where it must not be, and the guest's reset helps.
func TestPackedStaleBase_H068(t *testing.T) {
	packedRings = true
	defer func() { packedRings = false }()
	noLeak(t)
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(plainFeats|featMrgRxbuf, 2)
	for range 100 { // more than once round
		f.echo(d, 12)
	}
	f.rings[0].recv(2000)
	for i := range uint32(2) {
		f.ask(GetVringBase, u32s(i, 0))
		f.start(int(i), 0)
	}
	f.rings[1].send(frame.Offload{}, 12, testFrame(60, 1))
	got, _ := pull(d.Pairs()[0])
	require.Empty(t, got)
	require.Equal(t, frame.NoBuffer, pushBytes(d, testFrame(60, 2))[0].Reason)
	enginetest.Eventually(t, 5*time.Second, func() bool { return d.Status().State == Up })
	for i := range uint32(2) {
		f.ask(GetVringBase, u32s(i, 0))
	}
	f.newDriver()
	f.start(0, 0)
	f.start(1, 0)
	f.echo(d, 12)
}
