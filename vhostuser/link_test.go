package vhostuser

import (
	"net"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
)

// A link that is down serves a frontend until it has asked all, and then neither it nor another; a link that goes up
// takes it back.
func TestLinkState(t *testing.T) { bothRings(t, testLinkState) }

func testLinkState(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	require.True(t, d.LinkUp())
	require.NoError(t, d.SetLink(false))
	require.NoError(t, d.SetLink(false))
	require.NoError(t, d.Listen())
	serve(t, d)
	f := dialled(t, d.cfg.Path)
	for begin := time.Now(); time.Since(begin) < 2*settleTime; {
		f.ask(GetFeatures, nil) // it has not asked all yet
	}
	f.expectEnd()
	require.NoFileExists(t, d.cfg.Path)
	enginetest.Eventually(t, 5*time.Second, func() bool { return d.Status().State == Disconnected })

	require.NoError(t, d.SetLink(true))
	f = dialled(t, d.cfg.Path)
	f.ask(GetFeatures, nil)
	require.True(t, d.LinkUp())
	require.NoError(t, d.SetLink(false))
	f.expectEnd()
	enginetest.Eventually(t, 5*time.Second, func() bool { _, err := os.Stat(d.cfg.Path); return err != nil })
	require.NoError(t, d.SetLink(true))
	require.NoError(t, d.SetLink(false), "before anybody has come")
	f = dialled(t, d.cfg.Path)
	f.ask(GetFeatures, nil)
	f.expectEnd()
}

// While the link is down no ring runs, and those that were set up meanwhile do when it goes up.
func TestLinkDownStopsRings(t *testing.T) { bothRings(t, testLinkDownStopsRings) }

func testLinkDownStopsRings(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	require.NoError(t, d.SetLink(false))
	f := connect(t, d)
	f.bringUp(featVersion1, 2)
	require.Equal(t, Connected, d.Status().State)
	require.NoError(t, d.SetLink(true))
	require.Equal(t, Up, d.Status().State)
	require.NoError(t, d.SetLink(false))
	f.expectEnd()
	require.NoError(t, d.Close())
	require.ErrorIs(t, d.SetLink(true), ErrClosed)
}

// In client mode a link that is down is not dialled for.
func TestLinkDownClient(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{Client: true})
	require.NoError(t, d.SetLink(false))
	serve(t, d)
	ln, err := net.Listen("unix", d.cfg.Path)
	require.NoError(t, err)
	defer ln.Close()
	accept := func() *front {
		c, err := ln.Accept()
		require.NoError(t, err)
		t.Cleanup(func() { c.Close() })
		return &front{t: t, c: c.(*net.UnixConn)}
	}
	f := accept()
	f.ask(GetFeatures, nil)
	f.expectEnd()
	before := d.Status().Counters["sessions"]
	require.NoError(t, d.SetLink(true))
	accept().ask(GetFeatures, nil)
	require.Equal(t, before+1, d.Status().Counters["sessions"], "nobody was dialled in between")
}
