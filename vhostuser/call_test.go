package vhostuser

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
)

// blocking is an event counter whose writers wait when it is full.
func blocking(t *testing.T) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	require.NoError(t, err)
	return fd
}

// fill makes a counter as full as it gets by writing.
func fill(t *testing.T, fd int) {
	t.Helper()
	require.NoError(t, unix.SetNonblock(fd, true))
	var err error
	for n := uint64(1) << 63; n > 0; n /= 2 {
		for err = nil; err == nil; {
			_, err = unix.Write(fd, u64(n))
		}
		require.ErrorIs(t, err, unix.EAGAIN)
	}
}

// withCall brings up a device whose rx ring 0 interrupts by way of fd.
func withCall(t *testing.T, fd int) (*Device, *front) {
	t.Helper()
	d := newDevice(t, Config{})
	for _, r := range d.rings {
		r.call.every, r.err.every = 20*time.Millisecond, 20*time.Millisecond
	}
	f := connect(t, d)
	closeFD(f.rings[0].call)
	f.rings[0].call = fd
	f.bringUp(plainFeats, 2)
	return d, f
}

// deliver pushes one frame, which interrupts the guest, on a goroutine.
func deliver(d *Device, f *front) (done chan struct{}) {
	f.rings[0].recv(2000)
	done = make(chan struct{})
	go func() {
		defer close(done)
		turn.Lock()
		defer turn.Unlock()
		pushBytes(d, testFrame(60, 1))
	}()
	return done
}

func ends(done chan struct{}) func() bool {
	return func() bool {
		select {
		case <-done:
			return true
		default:
			return false
		}
	}
}

// H045: a frontend's counter that blocks is made not to, for interrupts and
// for errors.
func TestFullBlockingCounter_H045(t *testing.T) { bothRings(t, testFullBlockingCounter_H045) }

func testFullBlockingCounter_H045(t *testing.T) {
	noLeak(t)
	call, errFD := blocking(t), blocking(t)
	defer closeFD(errFD)
	d, f := withCall(t, call)
	f.do(SetVringErr, u64(0), errFD)
	for _, fd := range []int{call, errFD} {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		require.NoError(t, err)
		require.NotZero(t, flags&unix.O_NONBLOCK)
		fill(t, fd)
	}
	enginetest.Eventually(t, 5*time.Second, ends(deliver(d, f)))
	require.EqualValues(t, 1, f.rings[0].usedIdx())
	// A ring that breaks is told by its error counter.
	f.rings[0].breakIt()
	pushBytes(d, testFrame(60, 1))
	enginetest.Eventually(t, 5*time.Second, func() bool { return d.Status().Counters["ring_errors"] == 1 })
	require.Zero(t, d.Status().Counters["stalled_interrupts"])
}

// A frontend that makes a worker wait on purpose is found out, the worker goes
// on, and the connection ends.
func TestHostileCounterIsFreed(t *testing.T) { bothRings(t, testHostileCounterIsFreed) }

func testHostileCounterIsFreed(t *testing.T) {
	for name, while := range map[string]func(d *Device, f *front){
		"held": func(*Device, *front) {},
		"replaced meanwhile": func(_ *Device, f *front) {
			fd := eventfd(f.t)
			defer closeFD(fd)
			f.send(SetVringCall, flagVersion, u64(0), fd)
		},
		"taken away meanwhile": func(_ *Device, f *front) { f.send(SetVringCall, flagVersion, u64(ringFDNone)) },
		"replaced before each look": func(d *Device, f *front) {
			call := &d.rings[0].call
			look := time.NewTicker(call.every * 4 / 5)
			defer look.Stop()
			for n := 0; call.stalls.Load() == 0; n++ {
				require.Less(f.t, n, maxOld, "nobody looks")
				fd := eventfd(f.t)
				b := append(u32s(uint32(SetVringCall), flagVersion, 8), u64(0)...)
				_, _, _ = f.c.WriteMsgUnix(b, unix.UnixRights(fd), nil) // it may be over
				closeFD(fd)
				<-look.C
			}
		},
		"disconnected": func(_ *Device, f *front) { f.c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			noLeak(t)
			fd := blocking(t)
			d, f := withCall(t, fd)
			fill(t, fd)
			require.NoError(t, unix.SetNonblock(fd, false))
			done := deliver(d, f)
			call := &d.rings[0].call
			enginetest.Eventually(t, 5*time.Second, func() bool { return call.begun.Load() > call.ended.Load() })
			while(d, f)
			enginetest.Eventually(t, 5*time.Second, ends(done))
			enginetest.Eventually(t, 5*time.Second, func() bool {
				s := d.Status()
				return s.State == Disconnected && s.Counters["stalled_interrupts"] == 1
			})
		})
	}
}

// Nothing ticks once interrupts have ceased.
func TestStallTimerEnds(t *testing.T) { bothRings(t, testStallTimerEnds) }

func testStallTimerEnds(t *testing.T) {
	noLeak(t)
	d, f := withCall(t, eventfd(t))
	<-deliver(d, f)
	call := &d.rings[0].call
	require.True(t, call.begun.Load() > 0)
	enginetest.Eventually(t, 5*time.Second, func() bool { return !call.watched.Load() })
	<-deliver(d, f)
	enginetest.Eventually(t, 5*time.Second, func() bool { return !call.watched.Load() })
	require.Equal(t, call.begun.Load(), call.ended.Load())
}
