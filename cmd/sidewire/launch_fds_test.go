package main

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
)

// A launched program has the user's descriptors at their numbers, its monitor, and
// nothing of ours.
func TestLaunchDescriptors(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft")
	const list = "for f in /proc/$$/fd/*; do echo fd ${f##*/} $(readlink $f); done"
	user, err := os.Open(os.DevNull)
	require.NoError(t, err)
	defer user.Close()
	has := func(cmd *exec.Cmd) map[string]string {
		cmd.ExtraFiles = []*os.File{nil, nil, nil, nil, user} // 7
		o := finish(t, cmd)
		require.Zero(t, o.code, o.err)
		fds := map[string]string{}
		for line := range strings.Lines(o.out) {
			if f := strings.Fields(line); len(f) == 3 && f[0] == "fd" {
				fds[f[1]] = f[2]
			}
		}
		require.Equal(t, os.DevNull, fds["7"])
		return fds
	}
	plain := has(exec.Command("sh", "-c", list)) // what the shell opens, and what we were started with ourselves
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	for _, path := range []string{"packet", "socket"} {
		more := has(sidewireCommand("run", "-f", writeFile(t, "vmi.yaml", spec("vm", 2)), "--netns", w.Pod.Path, "--socket-dir", socketDir(t),
			"--resolv-conf", w.ResolvConf, "--path", path, "--", "sh", "-c", list))
		for fd := range plain {
			assert.Contains(t, more, fd)
			delete(more, fd)
		}
		require.Len(t, more, 1, path)
		for _, monitor := range more {
			assert.True(t, strings.HasPrefix(monitor, "socket:"), monitor)
		}
	}
}

// Whenever it is told to end while it starts, it ends soon, leaves the pod as it was
// and no QEMU behind.
func TestEndsWhileItStarts(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	before := footprint(t, w.Pod)
	vmi := writeFile(t, "vmi.yaml", spec("vm", 1))
	dir := socketDir(t)
	for wait := time.Duration(0); wait < 400*time.Millisecond; wait += 25 * time.Millisecond {
		cmd := sidewireCommand("run", "-f", vmi, "--netns", w.Pod.Path, "--socket-dir", dir, "--resolv-conf", w.ResolvConf, "--", "sh", "-c", "exec sleep 100")
		log := &logBuffer{}
		cmd.Stderr = log
		require.NoError(t, cmd.Start())
		timer := time.AfterFunc(wait, func() { _ = cmd.Process.Signal(syscall.SIGTERM) })
		err := cmd.Wait()
		timer.Stop()
		if code := cmd.ProcessState.ExitCode(); code != 128+int(syscall.SIGTERM) { // sleep's, which has no handler
			assert.True(t, err == nil || code == -1, "after %v: %v\n%s", wait, err, log)
		}
		assert.Empty(t, changes(before, footprint(t, w.Pod)), "after %v", wait)
	}
}
