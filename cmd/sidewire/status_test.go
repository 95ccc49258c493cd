package main

import (
	"context"
	"encoding/json"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

// Status has KubeVirt's fields of an interface, and what a queue pair costs.
// The guest's address is the spec's, or the one that it was seen with.
func TestStatusOfAnInterfaceRow68Row84(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "dhclient", "ping")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startSidewire(t, w, strings.Replace(spec("vm", 2), "        macAddress: "+guestMAC.String()+"\n", "", 1))
	status := func() (iface map[string]any, text string) {
		t.Helper()
		out, err := sidewireCommand("status", "--socket-dir", p.dir, "--json").Output()
		require.NoError(t, err)
		var st struct {
			Memory     float64          `json:"memory_bytes"`
			Interfaces []map[string]any `json:"interfaces"`
		}
		require.NoError(t, json.Unmarshal(out, &st))
		assert.InDelta(t, float64(rssAnon(t, p.cmd.Process.Pid))*1024, st.Memory, 4<<20)
		out, err = sidewireCommand("status", "--socket-dir", p.dir).Output()
		require.NoError(t, err)
		return st.Interfaces[0], string(out)
	}
	i, text := status()
	assert.Equal(t, "down", i["linkState"])
	assert.NotContains(t, i, "mac")
	assert.EqualValues(t, 2, i["queueCount"])
	assert.Contains(t, text, "not seen yet, link down")

	startVM(t, p, vhosttest.Options{QueuePairs: 2})
	i, text = status()
	assert.Equal(t, "up", i["linkState"])
	assert.Equal(t, guestMAC.String(), i["mac"])
	assert.Contains(t, text, guestMAC.String()+", link up")
	for _, pair := range i["device"].(map[string]any)["pairs"].([]any) {
		n := pair.(map[string]any)["memoryBytes"].(float64)
		t.Logf("a pair takes %.1f KiB", n/1024)
		assert.Greater(t, n, 1024.)
		assert.Less(t, n, 65536.)
	}
	// What comes from outside need not wait for the guest to say more than
	// that it wants a lease.
	_, err := w.Outside.Command("ping", "-c", "1", "-W", "2", enginetest.PodIP).Output()
	require.NoError(t, err, "the first packet to a silent guest is lost")
}

// The control socket answers from the first moment on. What it says of a server
// that starts is for the race detector to look at; it sees the more the longer
// the start takes.
func TestStatusWhileStarting(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0)) // many workers raise it
	const workers = 64
	docs := writeFile(t, "docs.yaml", onLAN("vm", "blue", 1)+definition("blue", `{"type": "bridge"}`))
	for range 6 {
		dir := socketDir(t)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for ctx.Err() == nil {
					var st Status
					_ = ask(ctx, filepath.Join(dir, "control.sock"), "GET", "/status", nil, &st) // nobody may be there yet
				}
			})
		}
		s := startHere(t, "-f", docs, "--socket-dir", dir, "--poll", "never", "--cpus", "0"+strings.Repeat(",0", workers-1))
		assert.Len(t, s.Status().Workers, workers)
		cancel()
		wg.Wait()
		require.NoError(t, s.stop())
	}
}
