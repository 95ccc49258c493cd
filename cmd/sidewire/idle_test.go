package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
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

// sleeps counts, for each thread of a process, how often it went to sleep, which
// is how often something woke it up.
func sleeps(t *testing.T, pid int) map[string]int {
	t.Helper()
	counts := map[string]int{}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	require.NoError(t, err)
	for _, task := range tasks {
		b, err := os.ReadFile(task)
		if err != nil {
			continue // it has just ended
		}
		for _, l := range strings.Split(string(b), "\n") {
			if v, ok := strings.CutPrefix(l, "voluntary_ctxt_switches:"); ok {
				counts[task], err = strconv.Atoi(strings.TrimSpace(v))
				require.NoError(t, err)
			}
		}
	}
	return counts
}

// total is how often threads slept between two counts.
func total(after, before map[string]int) (n int) {
	for task, c := range after {
		n += c - before[task]
	}
	return n
}

// With one guest that is idle after some traffic, nothing wakes up for 10 s,
// no worker and no other thread of the process, and the process owns less than
// 20 MiB. A few wake-ups are the Go runtime's own: its monitor looks once a
// minute where all processors are idle, its scavenger and its collector, due
// every two minutes, wake a few threads for a moment.
func TestIdleCostsNothing(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "dhclient", "curl")
	if testing.Short() {
		t.Skip("takes 10 s")
	}
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startSidewire(t, w, spec("vm", 1))
	v := startVM(t, p, vhosttest.Options{})
	transfer(t, v, 4<<20)
	p.staysQuiet(v)
	pid := p.cmd.Process.Pid
	assert.Less(t, rssAnon(t, pid), 20<<10, "KiB of anonymous memory")
	t.Logf("RssAnon %d KiB", rssAnon(t, pid))
}

// So it is on the socket path with a thousand connections that say nothing, in
// a root that cannot be written to.
func TestIdleFlowsCostNothing(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "dhclient", "curl")
	if testing.Short() {
		t.Skip("takes 10 s")
	}
	const flows = 1000
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := prepareNobody(t, w, spec("vm", 1, "tcp:8080"))
	cmd := p.nobody(w)
	script := `mount --bind "$1" "$1" && mount -o remount,ro,bind / && ! touch /tmp/x 2>/dev/null && shift && exec "$@"`
	at := slices.Index(cmd.Args, "--") + 1 // behind nsenter's own
	cmd.Args = slices.Insert(cmd.Args, at, "unshare", "-m", "sh", "-c", script, "sh", p.dir)
	cmd.Env = append(cmd.Env, "GOMEMLIMIT=64MiB")
	p.launch(cmd)
	t.Cleanup(p.stop)
	v := startVM(t, p, vhosttest.Options{})
	transfer(t, v, 4<<20)
	listen(t, w.Outside, "tcp4", enginetest.OutsideIP+":9100", func(c net.Conn) { _, _ = io.Copy(c, c) })
	d := net.Dialer{Timeout: 2 * soon, KeepAlive: -1}
	for range flows {
		var c net.Conn
		require.NoError(t, v.ns.Do(func() (err error) { c, err = d.Dial("tcp4", enginetest.OutsideIP+":9100"); return err }))
		defer c.Close()
		require.True(t, echoes(t, c, "hello"))
	}
	require.GreaterOrEqual(t, p.status().Interfaces[0].Sockets.TCPOpen, flows)
	p.staysQuiet(v)
	pid := p.cmd.Process.Pid
	assert.Less(t, rssAnon(t, pid), 24<<10, "KiB of anonymous memory")
	t.Logf("RssAnon %d KiB", rssAnon(t, pid))
}

// staysQuiet asserts that nothing wakes up for 10 s while the guest is idle.
func (p *process) staysQuiet(v *vm) {
	t := p.t
	t.Helper()
	// A Linux namespace is never quite silent: its IPv6 would solicit routers.
	require.NoError(t, v.ns.Sysctl("net/ipv6/conf/eth0/disable_ipv6", "1"))
	pid := p.cmd.Process.Pid
	workers := func() (n uint64) {
		for _, s := range p.status().Workers {
			n += s.Wakeups
		}
		return n
	}
	// Quiet for 10 s: the kernels' neighbour probes after the traffic may
	// disturb the first spans, not all of them. Asking for the status would wake
	// the process, so it is asked before and after only.
	quiet := false
	for end := time.Now().Add(90 * time.Second); !quiet && time.Now().Before(end); {
		worked := workers()
		before := sleeps(t, pid)
		began := time.Now()
		disturbed := enginetest.Wait(10*time.Second, func() bool { return total(sleeps(t, pid), before) > runtimeWakeups })
		after := sleeps(t, pid)
		quiet = !disturbed && workers() == worked
		t.Logf("%s: %d wake-ups, of workers %d", time.Since(began).Round(time.Millisecond), total(after, before), workers()-worked)
	}
	assert.True(t, quiet, "no 10 s without a wake-up")
}

// runtimeWakeups is how many wake-ups in 10 s are the Go runtime's; 4 are usual.
const runtimeWakeups = 10
