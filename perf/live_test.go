package main

import (
	"context"
	"math"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
)

// asInner lets the test's program be the harness's own backend.
const asInner = "SIDEWIRE_PERF_INNER"

func TestMain(m *testing.M) {
	if os.Getenv(asInner) != "" && len(os.Args) > 1 && inside[os.Args[1]] != nil {
		if err := inside[os.Args[1]](os.Args[2:]); err != nil {
			os.Exit(2)
		}
		return
	}
	os.Exit(m.Run())
}

// One cell of each path, with dpdk-testpmd on the guests' side, and itself as
// a peer.
func TestCells(t *testing.T) {
	enginetest.Need(t, "testpmd")
	if testing.Short() {
		t.Skip("takes seconds for each cell")
	}
	t.Setenv(asInner, "1")
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	p := &programs{self: self()}
	for _, x := range []struct {
		subject string
		cell    cell
	}{
		{oursFixed, cell{Path: guestToGuest, Size: 64, Queues: 1}},
		{oursFixed, cell{Path: roundTrip, Size: 64, Queues: 1, Kicks: true}},
		{ours, cell{Path: guestTx, Size: 1500, Queues: 2}},
		{ours, cell{Path: guestRx, Size: 9000, Queues: 1, Packed: true}},
		{ours, cell{Path: guestToGuest, Size: 64, Queues: 1, FDB: 100}},
		{oursFixed, cell{Path: guestToGuest, Size: gsoSize, Queues: 1, GSO: true, Packed: true}},
		{pmdIO, cell{Path: guestToGuest, Size: 64, Queues: 1}},
	} {
		t.Run(x.subject+", "+x.cell.String(), func(t *testing.T) {
			f, err := measureCell(ctx, p.subjects()[x.subject], x.cell, 100*time.Millisecond)
			require.NoError(t, err)
			assert.Greater(t, f.frames, 1000.0)
			assert.Greater(t, f.busyNS, 1.0)
			assert.Less(t, f.busyNS, 1e6)
			if x.cell.Path == roundTrip {
				assert.InDelta(t, 2e6/f.frames, f.values(x.cell)[tripTime.Name], 1e-6)
			}
			assert.False(t, math.IsNaN(f.allocs))
		})
	}
}

func TestMissingPeersAreNamed(t *testing.T) {
	p := &programs{}
	if enginetest.Have("testpmd") != nil {
		assert.ErrorContains(t, p.missing(ours, cell{Path: guestToGuest}), "package dpdk-dev")
		return
	}
	if _, err := ovsProgram(); err != nil {
		assert.ErrorContains(t, p.missing(ovs, cell{Path: guestToGuest}), "package openvswitch-switch-dpdk")
	}
	assert.NoError(t, p.missing(ours, cell{Path: guestToGuest, Ports: 64}))
	assert.ErrorContains(t, p.missing(pmdIO, cell{Path: guestToGuest, Ports: 64}), "32 ports")
	assert.ErrorContains(t, p.missing(pmdIO, cell{Path: roundTrip, Kicks: true}), "always polls")
}
