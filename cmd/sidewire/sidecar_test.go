package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

// confinement is a group of processes with the limits that KubeVirt gives a sidecar: 64 MiB and 200m of a processor.
type confinement struct {
	procs []string // where a process writes itself in
	peak  string   // file with the most memory that it had; empty if the kernel does not tell
	held  string   // file that says how often it waited for its share of the processor
}

const (
	sidecarMemory = 64 << 20
	sidecarQuota  = 20000 // of 100000 us
)

// confine makes a group, or returns nil where that may not be done.
func confine(t *testing.T) *confinement {
	t.Helper()
	name := fmt.Sprintf("sidewire-test-%d", os.Getpid())
	group := func(root string, values ...string) string {
		dir := filepath.Join(root, name)
		if os.Mkdir(dir, 0o755) != nil {
			return ""
		}
		t.Cleanup(func() { enginetest.Wait(soon, func() bool { return os.Remove(dir) == nil }) })
		for i := 0; i < len(values); i += 2 {
			if err := os.WriteFile(filepath.Join(dir, values[i]), []byte(values[i+1]), 0); err != nil {
				t.Log(err)
				return ""
			}
		}
		return dir
	}
	const v1 = "/sys/fs/cgroup/"
	if _, err := os.Stat(v1 + "memory"); err == nil {
		mem := group(v1+"memory", "memory.limit_in_bytes", strconv.Itoa(sidecarMemory))
		cpu := group(v1+"cpu", "cpu.cfs_period_us", "100000", "cpu.cfs_quota_us", strconv.Itoa(sidecarQuota))
		if mem == "" || cpu == "" {
			return nil
		}
		return &confinement{[]string{mem + "/cgroup.procs", cpu + "/cgroup.procs"}, mem + "/memory.max_usage_in_bytes", cpu + "/cpu.stat"}
	}
	dir := group("/sys/fs/cgroup", "memory.max", strconv.Itoa(sidecarMemory), "cpu.max", fmt.Sprint(sidecarQuota, " 100000"))
	if dir == "" {
		return nil
	}
	return &confinement{[]string{dir + "/cgroup.procs"}, dir + "/memory.peak", dir + "/cpu.stat"}
}

// A sidecar has 64 MiB and a fifth of a processor. Within that a thousand connections are opened, and stand while megabytes go
// to and fro, on either way out.
func TestSidecarsLimitsRow73(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "dhclient", "curl")
	const flows = 1000
	for _, path := range []string{"packet", "socket"} {
		t.Run(path, func(t *testing.T) {
			w := enginetest.NewWorld(t, enginetest.WorldOptions{})
			p := &process{t: t, dir: socketDir(t), log: &logBuffer{}, vmi: writeFile(t, "vmi.yaml", spec("vm", 2, "tcp:8080"))}
			cmd := sidewireCommand("run", "-f", p.vmi, "--netns", w.Pod.Path, "--socket-dir", p.dir, "--resolv-conf", w.ResolvConf, "--path", path)
			c := confine(t)
			if c == nil {
				t.Log("no group with limits can be made here: what it takes is measured alone")
			} else {
				script := strings.Repeat(`echo $$ > "$1"; shift; `, len(c.procs)) + `exec "$@"`
				self, err := os.Executable() // the shell's own is another
				require.NoError(t, err)
				cmd.Args = append(append([]string{"sh", "-ec", script, "sh"}, c.procs...), append([]string{self}, cmd.Args[1:]...)...)
				cmd.Path = "/bin/sh"
			}
			p.launch(cmd)
			t.Cleanup(p.stop)
			v := startVM(t, p, vhosttest.Options{QueuePairs: 2})
			listen(t, w.Outside, "tcp4", enginetest.OutsideIP+":9100", func(c net.Conn) { _, _ = io.Copy(c, c) })
			d := net.Dialer{Timeout: 4 * soon, KeepAlive: -1}
			var open []net.Conn
			for range flows {
				var c net.Conn
				require.NoError(t, v.ns.Do(func() (err error) { c, err = d.Dial("tcp4", enginetest.OutsideIP+":9100"); return err }))
				defer c.Close()
				open = append(open, c)
			}
			transfer(t, v, 16<<20)
			for _, c := range open {
				require.True(t, echoes(t, c, "still here"))
			}
			anon := rssAnon(t, p.cmd.Process.Pid)
			assert.Less(t, anon, 40<<10, "KiB of anonymous memory")
			t.Logf("RssAnon %d KiB", anon)
			if c != nil {
				peak, _ := os.ReadFile(c.peak) // older kernels of the second kind have none
				held, err := os.ReadFile(c.held)
				require.NoError(t, err)
				t.Logf("at most %s of %d bytes\n%s", strings.TrimSpace(string(peak)), sidecarMemory, held)
				b, err := os.ReadFile(c.procs[0])
				require.NoError(t, err)
				assert.Equal(t, strconv.Itoa(p.cmd.Process.Pid), strings.TrimSpace(string(b)), "it was within its limits all the time")
			}
			before := cpuTime(t, p.cmd.Process.Pid)
			assert.False(t, enginetest.Wait(2*time.Second, func() bool { return cpuTime(t, p.cmd.Process.Pid)-before > 200*time.Millisecond }), "a thousand flows that rest cost nothing")
		})
	}
}

// cpuTime is how long a process has run.
func cpuTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	require.NoError(t, err)
	var sum time.Duration
	for _, task := range tasks {
		if b, err := os.ReadFile(task); err == nil {
			var ns int64
			_, _ = fmt.Sscan(string(b), &ns)
			sum += time.Duration(ns)
		}
	}
	return sum
}
