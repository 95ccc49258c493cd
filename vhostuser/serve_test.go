package vhostuser

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
)

// serve runs Serve until the test ends, and requires that it ends well.
func serve(t *testing.T, d *Device) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- d.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		require.NoError(t, <-done)
	})
}

// dialled is a frontend without rings on a connection of its own.
func dialled(t *testing.T, path string) *front {
	t.Helper()
	var c net.Conn
	enginetest.Eventually(t, 5*time.Second, func() (ok bool) {
		var err error
		c, err = net.Dial("unix", path)
		return err == nil
	})
	t.Cleanup(func() { c.Close() })
	return &front{t: t, c: c.(*net.UnixConn)}
}

func TestServe(t *testing.T) { bothRings(t, testServe) }

func testServe(t *testing.T) {
	noLeak(t)
	old := unix.Umask(0)
	defer unix.Umask(old)
	d := newDevice(t, Config{})
	require.NoError(t, d.Listen())
	st, err := os.Stat(d.cfg.Path)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), st.Mode().Perm())
	serve(t, d)
	f := dialled(t, d.cfg.Path)
	f.ask(GetFeatures, nil)
	// H018: a second frontend is turned away, the first lives on.
	for range 300 {
		dialled(t, d.cfg.Path).expectEnd()
	}
	f.ask(GetFeatures, nil)
	require.EqualValues(t, 300, d.Status().Counters["turned_away"])
	// H117: the listener is ready again after the connection ended.
	for range 50 {
		f.c.Close()
		enginetest.Eventually(t, 5*time.Second, func() bool { return d.Status().State == Disconnected })
		f = dialled(t, d.cfg.Path)
		f.ask(GetFeatures, nil)
	}
}

func TestServeClient(t *testing.T) { bothRings(t, testServeClient) }

func testServeClient(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{Client: true})
	serve(t, d) // before there is anybody
	for range 3 {
		ln, err := net.Listen("unix", d.cfg.Path)
		require.NoError(t, err)
		for range 2 {
			c, err := ln.Accept()
			require.NoError(t, err)
			f := &front{t: t, c: c.(*net.UnixConn)}
			f.ask(GetFeatures, nil)
			c.Close()
		}
		ln.Close()
	}
}

func TestListen(t *testing.T) { bothRings(t, testListen) }

func testListen(t *testing.T) {
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
	require.NoError(t, d.Close())
	_, err = os.Lstat(path)
	require.ErrorIs(t, err, os.ErrNotExist)
	require.ErrorIs(t, d.Listen(), ErrClosed)
	require.NoError(t, d.Serve(context.Background()))

	require.NoError(t, os.WriteFile(path, nil, 0o600))
	require.ErrorContains(t, newDevice(t, Config{Path: path}).Listen(), "no socket")
	long := filepath.Join(dir, strings.Repeat("x", 100))
	require.ErrorContains(t, newDevice(t, Config{Path: long}).Listen(), "too long")
}

func TestNewDeviceRefuses(t *testing.T) { bothRings(t, testNewDeviceRefuses) }

func testNewDeviceRefuses(t *testing.T) {
	for name, c := range map[string]Config{
		"pairs":         {QueuePairs: 129},
		"no pairs":      {QueuePairs: -1},
		"MTU":           {MTU: 67},
		"long MTU":      {MTU: 65536},
		"group address": {MAC: [6]byte{1}},
	} {
		_, err := NewDevice(c)
		require.Error(t, err, name)
	}
}

// H116: frontends that come and go in the midst of things.
func TestConnectStorm(t *testing.T) { bothRings(t, testConnectStorm) }

func testConnectStorm(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{QueuePairs: 2})
	for i := range 60 {
		f := connect(t, d)
		f.negotiate(plainFeats)
		if i%2 == 0 {
			f.share()
		}
		for r := range i % 5 {
			f.start(r, 0)
		}
		f.close()
		enginetest.Eventually(t, 5*time.Second, func() bool { return d.Status().State == Disconnected })
	}
}
