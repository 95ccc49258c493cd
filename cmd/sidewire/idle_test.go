package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

// rssAnon is the anonymous memory of a process in KiB: its own, without the
// guest's pages.
func rssAnon(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	require.NoError(t, err)
	for _, l := range strings.Split(string(b), "\n") {
		if v, ok := strings.CutPrefix(l, "RssAnon:"); ok {
			n, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(v), " kB"))
			require.NoError(t, err)
			return n
		}
	}
	t.Fatal("no RssAnon in status")
	return 0
}

// With one guest that is idle after some traffic, no worker wakes up for 10 s
// and the process owns less than 20 MiB.
func TestIdleCostsNothing(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "dhclient", "curl")
	if testing.Short() {
		t.Skip("takes 10 s")
	}
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startSidewire(t, w, spec("vm", 1))
	v := startVM(t, p, vhosttest.Options{})
	transfer(t, v, 4<<20)
	// A Linux namespace is never quite silent: its IPv6 would solicit routers.
	require.NoError(t, v.ns.Sysctl("net/ipv6/conf/eth0/disable_ipv6", "1"))
	wakeups := func() (n uint64) {
		for _, s := range p.status().Workers {
			n += s.Wakeups
		}
		return n
	}
	// Quiet for 10 s: the kernels' neighbour probes after the traffic may
	// shorten the first spans, not all of them.
	quiet := false
	for end := time.Now().Add(60 * time.Second); !quiet && time.Now().Before(end); {
		before := wakeups()
		began := time.Now()
		quiet = !enginetest.Wait(10*time.Second, func() bool { return wakeups() != before })
		t.Logf("silent for %s", time.Since(began).Round(time.Millisecond))
	}
	assert.True(t, quiet, "no 10 s without a wake-up")
	assert.Less(t, rssAnon(t, p.cmd.Process.Pid), 20<<10, "KiB of anonymous memory")
	t.Logf("RssAnon %d KiB", rssAnon(t, p.cmd.Process.Pid))
}
