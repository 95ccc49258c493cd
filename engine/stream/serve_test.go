package stream

import (
	"bytes"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine"
	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

func TestServe(t *testing.T) {
	noLeak(t)
	old := unix.Umask(0)
	defer unix.Umask(old)
	d := newDevice(t, Config{})
	require.NoError(t, d.Listen())
	st, err := os.Stat(d.cfg.Path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), st.Mode().Perm())
	serve(t, d)
	q := dial(t, d)
	q.send(testFrame(60, 1))
	require.Equal(t, [][]byte{testFrame(60, 1)}, pullN(t, d, 1))
	// H018: others are turned away, the first lives on.
	for range 300 {
		dial(t, d).expectEnd()
	}
	require.EqualValues(t, 300, d.Status().Counters["turned_away"])
	d.Push(0, frames(testFrame(70, 2)))
	require.Equal(t, testFrame(70, 2), q.read())
	// H117: the listener is ready again after the connection ended.
	for i := range 50 {
		q.c.Close()
		disconnected(t, d)
		q = dial(t, d)
		q.send(testFrame(60, byte(i)))
		require.Equal(t, [][]byte{testFrame(60, byte(i))}, pullN(t, d, 1))
	}
	// A QEMU that starts again need not wait until the worker has seen that the
	// old one is dead, nor does it see what that one left.
	q.send(testFrame(60, 5))
	q.write(1, 2, 3)
	q.c.Close()
	q = dial(t, d)
	q.send(testFrame(60, 6))
	enginetest.Eventually(t, 5*time.Second, func() bool { return d.Status().Counters["replaced"] == 1 })
	require.Equal(t, [][]byte{testFrame(60, 6)}, pullN(t, d, 1))
}

// Two that connect at the same moment: one is served.
func TestTwoAtOnce(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	require.NoError(t, d.Listen())
	serve(t, d)
	var qs []*qemu
	for range 2 {
		qs = append(qs, dial(t, d))
	}
	enginetest.Eventually(t, 5*time.Second, func() bool { return d.Status().Counters["turned_away"] == 1 })
	d.Push(0, frames(testFrame(60, 1)))
	served := 0
	for _, q := range qs {
		require.NoError(t, q.c.SetReadDeadline(time.Now().Add(5*time.Second)))
		n, err := q.c.Read(make([]byte, 100))
		if err == nil {
			require.Equal(t, lenSize+60, n)
			served++
		}
	}
	require.Equal(t, 1, served)
}

// Connections that come and go in the midst of frames, while workers push.
func TestConnectStorm(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	serve(t, d)
	start(t, d, engine.Config{}, func(p frame.PortID) engine.Stage { return echo(p) })
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				d.Push(1, frames(testFrame(9000, 1), testFrame(60, 2)))
			}
		}
	})
	var some sync.WaitGroup
	for i := range 3 {
		some.Go(func() {
			for j := range 60 {
				c, err := net.Dial("unix", d.cfg.Path)
				if err != nil {
					continue
				}
				b := bytes.Repeat(framed(testFrame(100, 1)), 5)
				_, _ = c.Write(b[:(i*37+j*11)%len(b)])
				if j%3 == 0 {
					_ = c.SetReadDeadline(time.Now().Add(time.Second))
					_, _ = c.Read(make([]byte, 1000))
				}
				c.Close()
			}
		})
	}
	some.Wait()
	close(stop)
	wg.Wait()
	enginetest.Eventually(t, 10*time.Second, func() bool { return !d.Status().Connected })
	// A new one is served as if nothing had been.
	q := dial(t, d)
	q.send(testFrame(77, 7))
	require.Equal(t, testFrame(77, 7), q.read())
}

func TestServeClient(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{Client: true})
	start(t, d, engine.Config{}, func(p frame.PortID) engine.Stage { return echo(p) })
	require.NoError(t, d.Listen())
	serve(t, d) // before there is anybody
	for i := range 3 {
		ln, err := net.Listen("unix", d.cfg.Path)
		require.NoError(t, err)
		for j := range 2 {
			c, err := ln.Accept()
			require.NoError(t, err)
			q := &qemu{t: t, d: d, c: c.(*net.UnixConn)}
			f := testFrame(60+j, byte(i))
			q.send(f)
			require.Equal(t, f, q.read())
			c.Close()
		}
		ln.Close()
	}
}

func TestListen(t *testing.T) {
	noLeak(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	require.NoError(t, err)
	d := newDevice(t, Config{Path: path})
	require.ErrorContains(t, d.Listen(), "in use")
	stale.SetUnlinkOnClose(false)
	stale.Close()
	require.NoError(t, d.Listen()) // nobody answers any more
	require.NoError(t, d.Listen())
	require.NoError(t, d.Close())
	_, err = os.Lstat(path)
	require.ErrorIs(t, err, os.ErrNotExist)
	require.ErrorIs(t, d.Listen(), ErrClosed)
	require.NoError(t, d.Serve(t.Context()))
	require.NoError(t, d.Close())

	require.NoError(t, os.WriteFile(path, nil, 0o600))
	require.ErrorContains(t, newDevice(t, Config{Path: path}).Listen(), "no socket")
	long := filepath.Join(dir, strings.Repeat("x", 100))
	require.ErrorContains(t, newDevice(t, Config{Path: long}).Listen(), "too long")
	require.Error(t, newDevice(t, Config{Path: filepath.Join(dir, "no", "where")}).Serve(t.Context()))
}

// Close ends a connection, and what workers do afterwards does no harm.
func TestClose(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	start(t, d, engine.Config{}, func(p frame.PortID) engine.Stage { return echo(p) })
	q := connect(t, d)
	q.send(testFrame(60, 1))
	q.read()
	require.NoError(t, d.Close())
	q.expectEnd()
	fs := frames(testFrame(60, 1))
	d.Push(0, fs)
	require.Equal(t, frame.QueueStopped, fs[0].Reason)
	d.SetWatcher(nil)
	d.mu.Lock()
	defer d.mu.Unlock()
	_, err := d.begin(-1)
	require.ErrorIs(t, err, ErrClosed)
}

func TestNewRefuses(t *testing.T) {
	for _, mtu := range []int{-1, 67, 65536} {
		_, err := New(Config{MTU: mtu})
		require.ErrorContains(t, err, "MTU")
	}
}

// watcher notes which descriptors are watched.
type watcher struct {
	fds   map[int]bool
	wakes int
}

func (w *watcher) Watch(fd int) error { w.fds[fd] = true; return nil }
func (w *watcher) Unwatch(fd int)     { delete(w.fds, fd) }
func (w *watcher) Wake()              { w.wakes++ }

// A watcher is told of what there is when it comes, of what comes, and of what
// goes.
func TestSetWatcher(t *testing.T) {
	d := newDevice(t, Config{})
	a, b := &watcher{fds: map[int]bool{}}, &watcher{fds: map[int]bool{}}
	d.SetWatcher(a)
	assert.Len(t, a.fds, 1)
	q := connect(t, d)
	assert.Len(t, a.fds, 2)
	assert.Equal(t, 2, a.wakes)
	d.SetWatcher(b)
	assert.Empty(t, a.fds)
	assert.Len(t, b.fds, 2)
	assert.Equal(t, 1, b.wakes)
	q.c.Close()
	disconnected(t, d)
	assert.Len(t, b.fds, 1)
	d.SetWatcher(nil)
	assert.Empty(t, b.fds)
	d.SetWatcher(a)
	require.NoError(t, d.Close())
	assert.Empty(t, a.fds)
	d.SetWatcher(b) // by now other files may have the numbers
	assert.Empty(t, b.fds)
}

// A peer that misbehaves again and again is counted, not logged each time.
func TestLogIsBounded(t *testing.T) {
	var mu sync.Mutex
	var buf bytes.Buffer
	d := newDevice(t, Config{Log: slog.New(slog.NewTextHandler(&lockedWriter{mu: &mu, b: &buf}, nil))})
	for range 100 {
		q := connect(t, d)
		q.write(0, 0, 0, 0)
		disconnected(t, d)
		q.c.Close()
	}
	require.EqualValues(t, 100, d.Status().Counters["bad_length"])
	mu.Lock()
	defer mu.Unlock()
	require.Contains(t, buf.String(), "bad_length")
	require.LessOrEqual(t, strings.Count(buf.String(), "\n"), 30)
}

type lockedWriter struct {
	mu *sync.Mutex
	b  *bytes.Buffer
}

func (w *lockedWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.Write(p)
}
