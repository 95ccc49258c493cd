package vhostuser

import (
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// unshare maps the guest's memory as QEMU does with share=off: the file is the
// one that the backend maps, but what the guest writes stays its own.
func (f *front) unshare() {
	f.t.Helper()
	mem, err := unix.Mmap(f.memfd, 0, testMem, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	require.NoError(f.t, err)
	require.NoError(f.t, unix.Munmap(f.mem))
	f.mem = mem
}

func kick(r *guestRing) { signal(r.kick) }

// A memfd that is mapped privately looks like any other. The device says once
// in a session that it sees nothing of the guest.
func TestPrivateMemory(t *testing.T) { bothRings(t, testPrivateMemory) }

func testPrivateMemory(t *testing.T) {
	noLeak(t)
	defer func(was time.Duration) { memoryWait = was }(memoryWait)
	memoryWait = 20 * time.Millisecond
	var log logText
	d := newDevice(t, Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
	f := connect(t, d)
	f.unshare()
	f.bringUp(plainFeats, 2)
	f.rings[0].recv(2000)
	f.do(SetVringKick, u64(0), f.rings[0].kick)
	kick(f.rings[0])
	enginetest.Eventually(t, 5*time.Second, func() bool { return strings.Contains(log.String(), "share=on?") })
	require.EqualValues(t, 1, d.Status().Counters["memory_not_shared"])
	f.do(SetVringKick, u64(0), f.rings[0].kick) // as after a reboot of the guest
	kick(f.rings[0])
	d.ses.lookForGuest()
	require.Equal(t, 1, strings.Count(log.String(), "share=on?"))
}

func TestPrivateMemoryIsNotSuspected(t *testing.T) { bothRings(t, testPrivateMemoryIsNotSuspected) }

func testPrivateMemoryIsNotSuspected(t *testing.T) {
	noLeak(t)
	for name, c := range map[string]struct {
		private bool
		rings   int
		guest   func(f *front)
		want    bool
	}{
		"private":            {true, 2, func(f *front) { f.rings[0].recv(2000); kick(f.rings[0]) }, true},
		"shared":             {false, 2, func(f *front) { f.rings[0].recv(2000); kick(f.rings[0]) }, false},
		"shared, rx not yet": {false, 2, func(f *front) { f.rings[1].post(guestBuf{bufferBase, 100, false}); kick(f.rings[1]) }, false},
		"no kick yet":        {true, 2, func(*front) {}, false},
		"QEMU's own kick": {true, 2, func(f *front) {
			kick(f.rings[0])
			f.do(SetVringKick, u64(0), f.rings[0].kick)
		}, false},
		"the guest's behind QEMU's": {true, 2, func(f *front) {
			kick(f.rings[0])
			f.do(SetVringKick, u64(0), f.rings[0].kick)
			kick(f.rings[0])
		}, true},
		"no ring runs":         {true, 0, func(f *front) { kick(f.rings[0]) }, false},
		"memory is taken away": {false, 2, func(f *front) { kick(f.rings[0]); require.NoError(f.t, unix.Ftruncate(f.memfd, 0)) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDevice(t, Config{})
			f := connect(t, d)
			if c.private {
				f.unshare()
			}
			f.bringUp(plainFeats, c.rings)
			c.guest(f)
			done := make(chan struct{})
			d.mu.Lock()
			s := d.ses
			d.mu.Unlock()
			frame.Go(func() { defer close(done); s.lookForGuest() })
			<-done
			require.Equal(t, c.want, d.Status().Counters["memory_not_shared"] == 1)
		})
	}
}
