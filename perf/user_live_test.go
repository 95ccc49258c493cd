package main

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
)

// One rig of each subject, with a little of all that is measured. A peer that is
// not here is left out, as by the harness.
func TestUserCells(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "iperf3", "ip", "go")
	if testing.Short() {
		t.Skip("takes seconds for each subject")
	}
	t.Setenv(asInner, "1")
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	p := &programs{self: self()}
	var err error
	p.sidewire, err = build(ctx, "", sidewirePath, filepath.Join(t.TempDir(), "sidewire"))
	require.NoError(t, err)
	absent := p.userMissing()
	for _, x := range []struct {
		subject string
		cell    userCell
	}{
		{ours, userCell{mtu: 1500, queues: 2, measures: jobs{tcpDown(2), job{unitOfWork: requests[3]}}}},
		{ours, userCell{mtu: 65520, buffers: 1 << 20, measures: jobs{tcpUp(1)}}},
		{ours, userCell{mtu: 1500, measures: idleFlows(50)}},
		{oursStream, userCell{mtu: 1500, measures: jobs{job{unitOfWork: requests[0]}}}},
		{passtPeer, userCell{mtu: 1500, queues: 2, measures: jobs{tcpDown(1), job{unitOfWork: requests[2]}}}},
		{passtPeer, userCell{mtu: 1500, measures: idleFlows(50)}},
		{gvproxyPeer, userCell{mtu: 1500, measures: jobs{tcpUp(1)}}},
		{libslirpPeer, userCell{mtu: 1500, measures: jobs{job{unitOfWork: requests[1]}}}},
	} {
		t.Run(x.subject, func(t *testing.T) {
			if err := absent[x.subject]; err != nil {
				t.Skip(err)
			}
			v, err := p.measureUser(ctx, x.subject, x.cell, 1)
			require.NoError(t, err)
			for _, m := range x.cell.metrics() {
				require.Contains(t, v, m.Name)
				if x.cell.measures != idleFlows(50) { // so few may need nothing
					assert.Positive(t, v[m.Name], m.Name)
				}
			}
			t.Log(v)
		})
	}
}
