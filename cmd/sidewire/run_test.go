package main

import (
	"bytes"
	"io"
	"log/slog"
	"os"
	"runtime/pprof"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
)

// startHere starts a server in the test's own process.
func startHere(t *testing.T, flags ...string) *server {
	t.Helper()
	var o options
	fs := newFlags("run", io.Discard)
	o.register(fs)
	require.NoError(t, parse(fs, flags))
	require.NoError(t, o.check())
	log := slog.New(slog.DiscardHandler)
	book := newLeaseBook(&o, log)
	vms, err := load(&o, io.Discard, book)
	require.NoError(t, err)
	s, err := start(t.Context(), &o, vms, book, log)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, s.stop()) })
	return s
}

// workersRun says whether this process has any.
func workersRun(t *testing.T) bool {
	t.Helper()
	var stacks bytes.Buffer
	require.NoError(t, pprof.Lookup("goroutine").WriteTo(&stacks, 1))
	return strings.Contains(stacks.String(), "engine.(*Worker).run")
}

// Nothing that workers read from or write to is closed while they run.
func TestWorkersStopFirst(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft")
	for name, c := range map[string]struct {
		docs  string
		flags []string
	}{
		"pod":    {spec("vm", 2), nil},
		"bridge": {onPod("vm", 2, ""), nil},
		"switch": {onLAN("vm", "blue", 2) + definition("blue", `{"type": "bridge"}`), []string{"--uplink", "blue=eth0"}},
	} {
		t.Run(name, func(t *testing.T) {
			w := enginetest.NewWorld(t, enginetest.WorldOptions{})
			s := startHere(t, append(c.flags, "-f", writeFile(t, "docs.yaml", c.docs), "--netns", w.Pod.Path,
				"--socket-dir", socketDir(t), "--resolv-conf", w.ResolvConf)...)
			sockets := func() (n int) {
				require.NoError(t, w.Pod.Do(func() error {
					for _, kind := range []string{"packet", "raw"} {
						b, err := os.ReadFile("/proc/thread-self/net/" + kind)
						if err != nil {
							return err
						}
						n += bytes.Count(b, []byte("\n")) - 1 // the head
					}
					return nil
				}))
				return n
			}
			before := sockets()
			require.NotZero(t, before)
			for workersRun(t) {
				require.Equal(t, before, sockets(), "sockets of workers that run")
				last := len(s.closers) - 1
				f := s.closers[last]
				s.closers = s.closers[:last]
				require.NoError(t, f())
			}
			require.NoError(t, s.stop())
			assert.Zero(t, sockets())
		})
	}
}
