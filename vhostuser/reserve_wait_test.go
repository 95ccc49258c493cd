package vhostuser

import (
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// kicks says whether a driver that has just posted n buffers, one descriptor
// each, kicks.
func (r *guestRing) kicks(n uint16, eventIdx bool) bool {
	switch word := r.word(usedAt); {
	case r.f.packed:
		const disable, desc = 1, 2
		switch w := atomic.LoadUint32(word); w >> 16 & 3 {
		case disable:
			return false
		case desc:
			at, lap := r.free, r.lap
			for range n {
				if at == 0 {
					at, lap = testRing, lap^1
				}
				at--
				if uint16(w) == at|lap<<15 {
					return true
				}
			}
			return false
		}
		return true
	case eventIdx:
		event := native.Uint16(r.at(usedAt + 4 + 8*testRing))
		return r.avail-event-1 < n
	default:
		return atomic.LoadUint32(word)&1 == 0
	}
}

// allForms runs a test over both kinds of rings with both forms of
// notification.
func allForms(t *testing.T, test func(t *testing.T, feats uint64)) {
	bothRings(t, func(t *testing.T) {
		t.Run("event index", func(t *testing.T) { test(t, allOffloads) })
		t.Run("flags", func(t *testing.T) { test(t, allOffloads&^featEventIdx) })
	})
}

// waiting is a Reserver of an idle guest that has posted n buffers, after a
// first frame.
func waiting(t *testing.T, feats uint64, n int) (d *Device, rx *guestRing, x *Reserver, kicks func(n uint16) bool) {
	d = newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(feats, 2)
	rx, x = f.rings[0], d.Reserver(0)
	rx.recv(2000)
	require.Equal(t, frame.ReasonNone, pushBytes(d, testFrame(60, 1))[0].Reason)
	rx.takeAll()
	for range n {
		rx.recv(2000)
	}
	return d, rx, x, func(n uint16) bool { return rx.kicks(n, feats&featEventIdx != 0) }
}

// TestArm: a guest with too few buffers kicks at the next one it posts, however
// many there are; what it posted before that is told at once.
func TestArm(t *testing.T) { allForms(t, testArm) }

func testArm(t *testing.T, feats uint64) {
	for _, n := range []int{0, 1, 5} {
		_, rx, x, kicks := waiting(t, feats, n)
		require.False(t, x.Reserve(0, 2000*(n+1), 64000) != nil)
		require.True(t, x.Short())
		x.Keep(0)
		require.False(t, x.Arm())
		require.False(t, x.Arm(), "nothing has changed")
		rx.recv(2000)
		require.True(t, kicks(1))
		x.Disarm()
		rx.recv(2000)
		require.False(t, kicks(1))
		require.Len(t, x.Reserve(0, 2000*(n+2), 64000), n+2, "Arm has taken nothing")
		x.Keep(0)

		require.False(t, x.Reserve(0, 2000*(n+3), 64000) != nil)
		x.Keep(0)
		rx.recv(2000) // too late to be found, too early to kick
		require.True(t, x.Arm())
		x.Disarm()
		require.Len(t, x.Reserve(0, 2000*(n+3), 64000), n+3)
		x.Keep(0)
	}
}

// A ring that is new, and that others push to meanwhile, kicks all the same.
func TestArmNewRing(t *testing.T) { allForms(t, testArmNewRing) }

func testArmNewRing(t *testing.T, feats uint64) {
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(feats, 2)
	x := d.Reserver(0)
	require.False(t, x.Arm())
	require.Equal(t, frame.NoBuffer, pushBytes(d, testFrame(60, 1))[0].Reason)
	f.rings[0].recv(2000)
	require.True(t, f.rings[0].kicks(1, feats&featEventIdx != 0))
}

// A reservation that can grow no more says nothing about what waits.
func TestArmAfterFullReservation(t *testing.T) {
	_, _, x, _ := waiting(t, allOffloads, 3)
	require.False(t, x.Reserve(0, 64000, 64000) != nil)
	require.True(t, x.Short())
	n := x.n
	x.n, x.bufs[reserveMax-1] = reserveMax, make([]byte, 2000)
	require.False(t, x.Reserve(reserveMax, 1, 1) != nil)
	require.True(t, x.Short())
	x.n = n
	x.Keep(0)
	require.True(t, x.Arm())
}

// A worker that found no room by Push waits in the same way, and may look once
// in vain.
func TestArmAfterPush(t *testing.T) { allForms(t, testArmAfterPush) }

func testArmAfterPush(t *testing.T, feats uint64) {
	d, rx, x, kicks := waiting(t, feats&^featMrgRxbuf, 0)
	for range 3 {
		require.Equal(t, frame.NoBuffer, pushBytes(d, testFrame(600, 1))[0].Reason)
		if x.Arm() {
			require.Equal(t, frame.NoBuffer, pushBytes(d, testFrame(600, 1))[0].Reason)
			require.False(t, x.Arm())
		}
		rx.recv(2000)
		require.True(t, kicks(1))
		x.Disarm()
		require.Equal(t, frame.ReasonNone, pushBytes(d, testFrame(600, 1))[0].Reason)
		rx.takeAll()
	}
}

// An idle guest whose ring is full of buffers wakes nobody, whether it is
// waited for or not.
func TestFullRingIsQuiet(t *testing.T) { allForms(t, testFullRingIsQuiet) }

func testFullRingIsQuiet(t *testing.T, feats uint64) {
	d, rx, x, kicks := waiting(t, feats, testRing-1)
	require.False(t, kicks(testRing-1))
	require.True(t, x.Arm(), "this was not known")
	x.Disarm()
	for range 3 {
		require.False(t, x.Arm())
		x.Disarm()
	}
	// Traffic goes on, and the guest replaces what it used.
	for range 3 * testRing {
		require.Len(t, x.Reserve(0, 3000, 3000), 2)
		x.Keep(0)
		require.Equal(t, frame.ReasonNone, pushBytes(d, testFrame(60, 1))[0].Reason)
		rx.takeAll()
		rx.recv(2000)
		if feats&featEventIdx == 0 || rx.f.packed { // else once each 65536 buffers
			require.False(t, kicks(1))
		}
	}
	// A full ring, of all its entries.
	rx.recv(2000)
	require.True(t, x.Arm())
	x.Disarm()
	require.False(t, x.Arm())
	x.Disarm()
	rx.f.ask(GetVringBase, u32s(0, 0))
	require.Equal(t, rx.used, rx.usedIdx(), "nothing is lost")
}

// What waits for Push to find is not lost by Arm, nor is a ring whose index
// jumps followed.
func TestArmMeetsWhatIsWrong(t *testing.T) { allForms(t, testArmMeetsWhatIsWrong) }

func testArmMeetsWhatIsWrong(t *testing.T, feats uint64) {
	d, rx, x, kicks := waiting(t, feats, 0)
	rx.post(guestBuf{testMem, 400, true})
	rx.post(guestBuf{rx.f.alloc(400), 400, true}, guestBuf{rx.f.alloc(400), 400, true})
	require.False(t, x.Reserve(0, 700, 700) != nil)
	require.False(t, x.Short())
	x.Keep(0)
	require.True(t, x.Arm())
	require.False(t, x.Arm())
	require.Empty(t, d.Status().Counters["bad_chain: unmapped"])
	require.Equal(t, frame.BadDescriptor, pushBytes(d, testFrame(700, 1))[0].Reason)
	require.Equal(t, frame.ReasonNone, pushBytes(d, testFrame(700, 1))[0].Reason)
	rx.takeAll()
	require.False(t, x.Arm())
	rx.recv(700)
	require.True(t, kicks(1))
	rx.breakIt()
	require.True(t, x.Arm())
	require.False(t, x.Arm(), "it has stopped")
	enginetest.Eventually(t, 5*time.Second, func() bool { return d.Status().Rings[0].Broken })
}

// A fault in Arm is survived as in every turn, and costs the guest nothing but
// the ring.
func TestArmMeetsFault(t *testing.T) { bothRings(t, testArmMeetsFault) }

func testArmMeetsFault(t *testing.T) {
	d, rx, x, _ := waiting(t, allOffloads, 3)
	done := make(chan any)
	frame.Go(func() {
		defer close(done)
		if err := unix.Ftruncate(rx.f.memfd, 0); err != nil {
			t.Error(err)
		}
		survive(d, func() { x.Arm() })
		survive(d, x.Disarm)
	})
	<-done
	require.NoError(t, unix.Ftruncate(rx.f.memfd, testMem))
	require.False(t, x.Arm())
	require.Positive(t, d.faults.Load())
	base := rx.f.ask(GetVringBase, u32s(0, 0))
	require.Equal(t, rx.f.baseOf(1), native.Uint32(base[4:]))
}

// Without a kick descriptor nobody would wake the worker.
func TestArmWithoutKick_H010(t *testing.T) {
	d, rx, x, _ := waiting(t, allOffloads, 0)
	rx.f.do(SetVringKick, u64(0|ringFDNone))
	for range 3 {
		require.True(t, x.Arm())
		x.Disarm()
	}
	require.Equal(t, frame.NoBuffer, pushBytes(d, testFrame(60, 1))[0].Reason)
}

// Kicks for the rx ring wake the pair's worker while there is a Reserver, and
// so does all that may let Reserve answer differently.
func TestReserverIsWoken(t *testing.T) { bothRings(t, testReserverIsWoken) }

func testReserverIsWoken(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{QueuePairs: 2})
	f := connect(t, d)
	f.bringUp(ctrlFeats, 4)
	c := f.start(4, 0)
	require.EqualValues(t, ctrlOK, c.command(ctrlMQ, 0, 2, 0))
	w := [2]*watcher{{}, {}}
	for i, p := range d.Pairs() {
		p.SetWatcher(w[i])
		require.Len(t, w[i].list(), 1, "tx alone")
	}
	fdOf := func(ring int) int {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.rings[ring].kick
	}
	d.Reserver(1)
	require.Equal(t, []int{fdOf(3), fdOf(2)}, w[1].list())
	require.Len(t, w[0].list(), 1)
	for name, do := range map[string]func(){
		"disable":     func() { f.do(SetVringEnable, u32s(2, 0)) },
		"its queue":   func() { f.do(SetVringEnable, u32s(2, 0)); f.do(SetVringEnable, u32s(2, 1)) },
		"other queue": func() { f.do(SetVringEnable, u32s(0, 0)); f.do(SetVringEnable, u32s(0, 1)) },
		"pairs":       func() { require.EqualValues(t, ctrlOK, c.command(ctrlMQ, 0, 2, 0)) },
		"offloads":    func() { require.EqualValues(t, ctrlOK, c.command(ctrlOffloads, 0, u64(featGuestCSUM)...)) },
		"memory":      func() { f.do(SetMemTable, table([4]uint64{testGPA, testMem, testUVA, 0}), f.memfd) },
	} {
		before := w[1].get()
		do()
		require.Greater(t, w[1].get(), before, name)
	}
	f.do(SetVringKick, u64(2), f.rings[2].kick)
	require.Equal(t, []int{fdOf(3), fdOf(2)}, w[1].list(), "another descriptor")
	// The pair moves to another worker.
	to := &watcher{}
	d.Pairs()[1].SetWatcher(to)
	require.Empty(t, w[1].list())
	require.Len(t, to.list(), 2)
	d.Pairs()[1].SetWatcher(nil)
	require.Empty(t, to.list())
	d.Pairs()[1].SetWatcher(to)
	f.ask(GetVringBase, u32s(2, 0))
	require.Equal(t, []int{fdOf(3)}, to.list())
	f.start(2, 0)
	require.Len(t, to.list(), 2)
	// Its rx ring becomes the control queue.
	f.do(SetProtocolFeatures, u64(offeredProtocol&^protoConfig))
	require.Equal(t, []int{fdOf(3)}, to.list())
	f.do(SetProtocolFeatures, u64(offeredProtocol))
	require.Len(t, to.list(), 2)
	f.c.Close()
	enginetest.Eventually(t, 5*time.Second, func() bool { return d.Status().State == Disconnected })
	require.Empty(t, to.list())
}

// TestArmLosesNoKick: a guest that posts one buffer after the other and kicks
// only when asked, and a worker that sleeps whenever Arm says it may.
func TestArmLosesNoKick(t *testing.T) { allForms(t, testArmLosesNoKick) }

func testArmLosesNoKick(t *testing.T, feats uint64) {
	const total = 3000
	d, rx, x, kicks := waiting(t, feats, 0)
	got, sleeps := make(chan int, 1), 0
	frame.Go(func() {
		var b frame.Batch
		n, need := 0, 1
		for n < total {
			bufs := x.Reserve(0, 2000*min(need, total-n), 64000)
			if bufs != nil {
				b.Reset(0)
				used := 0
				var fs []*frame.Frame
				for used < len(bufs) {
					var fr *frame.Frame
					fr, used = land(&b, bufs, used, testFrame(1500, 1))
					fs = append(fs, fr)
				}
				x.Keep(used)
				d.Push(0, fs)
				x.Free()
				n, need = n+used, need%5+1
				continue
			}
			x.Keep(0)
			if !x.Short() {
				t.Error("the ring does not serve")
				break
			}
			if !x.Arm() {
				sleeps++
				p := []unix.PollFd{{Fd: int32(rx.kick), Events: unix.POLLIN}}
				for {
					k, err := unix.Poll(p, 5000)
					if k > 0 {
						break
					}
					if err != unix.EINTR {
						t.Error("a kick was lost")
						n = total
						break
					}
				}
				var c [8]byte
				_, _ = unix.Read(rx.kick, c[:])
			}
			x.Disarm()
		}
		got <- n
	})
	rnd := rand.New(rand.NewPCG(8, 9))
	for n := 0; n < total; {
		k := uint16(1 + rnd.IntN(3))
		for rx.avail-rx.used > testRing-4 {
			rx.takeAll()
			runtime.Gosched()
		}
		for range k {
			rx.recv(2000)
		}
		n += int(k)
		if kicks(k) {
			_, _ = unix.Write(rx.kick, u64(1))
		}
		for range rnd.IntN(200) {
			runtime.Gosched()
		}
	}
	require.GreaterOrEqual(t, <-got, total)
	require.Positive(t, sleeps)
}

// TestTakes asks what the guest takes whole.
func TestTakes(t *testing.T) { bothRings(t, testTakes) }

func testTakes(t *testing.T) {
	d := newDevice(t, Config{})
	all := func(d *Device) (s []uint8) {
		for _, gso := range []uint8{frame.GSONone, frame.GSOTCPv4, frame.GSOTCPv6, frame.GSOTCPv4 | frame.GSOECN, frame.GSOUDPL4, frame.GSOUDP} {
			if d.Takes(gso) {
				s = append(s, gso)
			}
		}
		return s
	}
	require.Empty(t, all(d))
	f := connect(t, d)
	f.bringUp(ctrlFeats&^featMQ, 2)
	c := f.start(2, 0)
	require.Equal(t, []uint8{frame.GSONone, frame.GSOTCPv4}, all(d))
	require.EqualValues(t, ctrlOK, c.command(ctrlOffloads, 0, u64(featGuestCSUM)...))
	require.Equal(t, []uint8{frame.GSONone}, all(d))
	require.EqualValues(t, ctrlOK, c.command(ctrlOffloads, 0, u64(0)...))
	require.Empty(t, all(d))
	require.EqualValues(t, ctrlOK, c.command(ctrlOffloads, 0, u64(featGuestCSUM|featGuestTSO4)...))
	require.Equal(t, []uint8{frame.GSONone, frame.GSOTCPv4}, all(d))
	f.ask(GetVringBase, u32s(0, 0))
	require.Empty(t, all(d))
	d = newDevice(t, Config{})
	connect(t, d).bringUp(allOffloads|featGuestECN, 2)
	require.Equal(t, []uint8{frame.GSONone, frame.GSOTCPv4, frame.GSOTCPv6, frame.GSOTCPv4 | frame.GSOECN}, all(d))
	require.True(t, takes(featGuestCSUM|featGuestUSO4|featGuestUSO6, frame.GSOUDPL4))
}

func TestArmAllocatesNothing(t *testing.T) { allForms(t, testArmAllocatesNothing) }

func testArmAllocatesNothing(t *testing.T, feats uint64) {
	d, _, x, _ := waiting(t, feats, 5)
	require.Zero(t, testing.AllocsPerRun(100, func() {
		x.Reserve(0, 64000, 64000)
		x.Keep(0)
		x.Arm()
		x.Disarm()
		d.Takes(frame.GSOTCPv4)
		d.Pairs()[0].Arm()
	}))
}

// BenchmarkReserve is what it costs to receive a frame of 64 KiB in a turn of
// its own, without receiving.
func BenchmarkReserve(b *testing.B) {
	packed := func(on bool) func(b *testing.B) {
		return func(b *testing.B) {
			packedRings = on
			defer func() { packedRings = false }()
			d := newDevice(b, Config{})
			f := connect(b, d)
			f.bringUp(allOffloads, 2)
			rx, x := f.rings[0], d.Reserver(0)
			for range testRing {
				rx.recv(1526)
			}
			rx.avail -= testRing
			var batch frame.Batch
			fs := make([]*frame.Frame, 1)
			tail := make([][]byte, 0, testRing)
			const size, n = 65000, 43
			b.ReportAllocs()
			for range b.N {
				if !f.packed {
					rx.avail += n
					native.PutUint16(rx.at(availAt+2), rx.avail)
				}
				batch.Reset(0)
				bufs := x.Reserve(0, size+12, 65600)
				fr := batch.Next()
				fr.HeadLen, fr.Len, fr.RxBufs = 66, size, n
				fr.Tail = append(tail[:0], bufs[0][78:])
				fr.Tail = append(fr.Tail, bufs[1:n]...)
				fs[0] = fr
				x.Keep(n)
				d.Push(0, fs)
				x.Free()
				if f.packed {
					rx.again(n, 1526)
				}
			}
			if st := d.Pairs()[0].status(); st.RxDirect != uint64(b.N) {
				b.Fatalf("%d of %d, %v", st.RxDirect, b.N, st.Drops)
			}
		}
	}
	b.Run("split", packed(false))
	b.Run("packed", packed(true))
}
