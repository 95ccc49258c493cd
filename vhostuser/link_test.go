package vhostuser

import (
	"net"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
)

// driving gives a frontend the memory and the rings of a guest.
func driving(t *testing.T, f *front) *front {
	t.Helper()
	f.memfd, f.next, f.packed = memfd(t, testMem), bufferBase, packedRings
	var err error
	f.mem, err = unix.Mmap(f.memfd, 0, testMem, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	require.NoError(t, err)
	for i := range f.rings {
		f.rings[i] = &guestRing{f: f, index: uint32(i), kick: eventfd(t), call: eventfd(t), lap: 1, uslap: 1}
	}
	t.Cleanup(f.close)
	return f
}

// A link that is down serves a frontend until its guest's driver has started, and then neither it nor another; a link
// that goes up takes it back.
func TestLinkState(t *testing.T) { bothRings(t, testLinkState) }

func testLinkState(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	require.True(t, d.LinkUp())
	require.NoError(t, d.SetLink(false))
	require.NoError(t, d.SetLink(false))
	require.NoError(t, d.Listen())
	serve(t, d)
	f := driving(t, dialled(t, d.cfg.Path))
	f.ask(GetFeatures, nil)
	begin := time.Now()
	enginetest.Eventually(t, 5*time.Second, func() bool { return time.Since(begin) > 2*settleTime })
	f.ask(GetFeatures, nil) // there is no driver yet
	f.bringUp(featVersion1, 2)
	for begin := time.Now(); time.Since(begin) < 2*settleTime; {
		f.ask(GetFeatures, nil) // it has not asked all yet
	}
	require.Equal(t, Connected, d.Status().State, "no ring runs")
	f.expectEnd()
	require.NoFileExists(t, d.cfg.Path)
	enginetest.Eventually(t, 5*time.Second, func() bool { return d.Status().State == Disconnected })

	require.NoError(t, d.SetLink(true))
	f = driving(t, dialled(t, d.cfg.Path))
	f.bringUp(featVersion1, 2)
	require.True(t, d.LinkUp())
	require.Equal(t, Up, d.Status().State)
	require.NoError(t, d.SetLink(false))
	f.expectEnd()
	enginetest.Eventually(t, 5*time.Second, func() bool { _, err := os.Stat(d.cfg.Path); return err != nil })
}

// Rings that were set up while the link was down run when it goes up.
func TestLinkUpStartsRings(t *testing.T) { bothRings(t, testLinkUpStartsRings) }

func testLinkUpStartsRings(t *testing.T) {
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
	f := driving(t, accept())
	f.bringUp(featVersion1, 2)
	f.expectEnd()
	before := d.Status().Counters["sessions"]
	require.NoError(t, d.SetLink(true))
	accept().ask(GetFeatures, nil)
	require.Equal(t, before+1, d.Status().Counters["sessions"], "nobody was dialled in between")
}
