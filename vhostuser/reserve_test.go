package vhostuser

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// land puts a frame where a socket would: what is private in Head, the rest
// into the reserved buffers from the at-th on. It returns the next free one.
func land(b *frame.Batch, bufs [][]byte, at int, data []byte) (f *frame.Frame, next int) {
	return landHead(b, bufs, at, data, frame.HeadSize)
}

// landHead is land of a frame of which head bytes are private.
func landHead(b *frame.Batch, bufs [][]byte, at int, data []byte, head int) (f *frame.Frame, next int) {
	f = b.Next()
	n := copy(f.Head[:head], data)
	f.HeadLen, f.Len, f.RxAt = uint16(n), int32(len(data)), uint16(at)
	rest, skip := data[n:], frame.VnetHdrMrgLen+head
	need := frame.VnetHdrMrgLen + len(data)
	for next = at; need > 0; next++ {
		p := bufs[next]
		need -= len(p)
		if skip >= len(p) {
			skip -= len(p)
			continue
		}
		p = p[skip:]
		skip = 0
		n := copy(p, rest)
		rest = rest[n:]
		if n > 0 {
			f.Tail = append(f.Tail, p[:n])
		}
	}
	f.RxBufs = uint16(next - at)
	return f, next
}

// TestReserveDelivers receives frames of any length straight into buffers of
// any length, drops some, cuts some, has ordinary frames among them, and wants
// every buffer back exactly once and every delivered frame whole.
func TestReserveDelivers(t *testing.T) { bothRings(t, testReserveDelivers) }

func testReserveDelivers(t *testing.T) {
	noLeak(t)
	rnd := rand.New(rand.NewPCG(1, 2))
	for _, size := range []int{60, 200, 1526, 4096} {
		d := newDevice(t, Config{})
		f := connect(t, d)
		f.bringUp(allOffloads, 2)
		rx, x := f.rings[0], d.Reserver(0)
		posted := map[uint16]bool{}
		var direct uint64
		for range 300 {
			for len(posted) < testRing {
				posted[rx.recv(size)] = true
			}
			var b frame.Batch
			b.Reset(0)
			var want [][]byte
			used := 0
			for range rnd.IntN(4) {
				data := tcpFrame(1 + rnd.IntN(20*size))
				bufs := x.Reserve(used, 12+len(data), 3*len(data))
				if bufs == nil {
					break
				}
				fr, next := landHead(&b, bufs, used, data, 14+rnd.IntN(frame.HeadSize-13))
				used = next
				switch rnd.IntN(4) {
				case 0:
					fr.Drop(frame.NoFlow)
				case 1:
					n := min(len(data), 60+rnd.IntN(len(data)))
					cut(fr, n)
					want = append(want, data[:n])
				default:
					want = append(want, data)
				}
			}
			x.Keep(used)
			if rnd.IntN(3) == 0 && testRing-used > 3 {
				own := testFrame(60, 7)
				b.SetReply(b.Reply(), own)
				want = append(want, own)
			}
			var fs []*frame.Frame
			for i := range b.Len() {
				if b.Frame(i).Reason == frame.ReasonNone {
					fs = append(fs, b.Frame(i))
					direct += uint64(min(1, b.Frame(i).RxBufs))
				}
			}
			d.Push(0, fs)
			for _, fr := range fs {
				require.Equal(t, frame.ReasonNone, fr.Reason)
			}
			x.Free()
			got, _ := reap(t, rx, posted)
			require.Equal(t, want, got)
		}
		require.Positive(t, direct)
		require.Equal(t, direct, d.Pairs()[0].status().RxDirect)
		f.stopRx(d, posted)
		f.close()
	}
}

// cut shortens a frame as TrimIP does.
func cut(f *frame.Frame, n int) {
	f.Len = int32(n)
	if n <= int(f.HeadLen) {
		f.HeadLen, f.Tail = uint16(n), nil
		return
	}
	left := n - int(f.HeadLen)
	for i, p := range f.Tail {
		if left <= len(p) {
			f.Tail[i], f.Tail = p[:left], f.Tail[:i+1]
			return
		}
		left -= len(p)
	}
}

// stopRx stops the rx ring and wants every buffer back that lies before the
// base, and no other. It returns the base and how many came back empty.
func (f *front) stopRx(d *Device, posted map[uint16]bool) (base uint16, empty int) {
	t, rx := f.t, f.rings[0]
	reply := f.ask(GetVringBase, u32s(0, 0))
	frames, empty := reap(t, rx, posted)
	require.Empty(t, frames)
	require.Equal(t, f.baseOf(rx.used), native.Uint32(reply[4:]), "what lies before the base was used")
	require.Len(t, posted, int(rx.avail-rx.used))
	require.Zero(t, d.Reserver(0).out())
	return rx.used, empty
}

// reap takes what the device used, of which each must have been posted, joins
// it to frames and counts those that come back empty.
func reap(t testing.TB, rx *guestRing, posted map[uint16]bool) (frames [][]byte, empty int) {
	more := 0
	for {
		head, n, ok := rx.take()
		if !ok {
			require.Zero(t, more, "buffers of the last frame")
			return frames, empty
		}
		require.True(t, posted[head], "buffer %d was not the device's", head)
		delete(posted, head)
		b := rx.bytes(head, n)
		switch {
		case more > 0:
			require.NotZero(t, n)
			more--
			frames[len(frames)-1] = append(frames[len(frames)-1], b...)
		case n > 0:
			more = int(native.Uint16(b[10:])) - 1
			frames = append(frames, b[12:])
		default:
			empty++
		}
	}
}

func TestReserveRefuses(t *testing.T) { bothRings(t, testReserveRefuses) }

func testReserveRefuses(t *testing.T) {
	up := func(t *testing.T, feats uint64, pairs int) (*front, *Reserver) {
		noLeak(t)
		d := newDevice(t, Config{QueuePairs: pairs})
		f := connect(t, d)
		f.bringUp(feats, 2*pairs)
		for i := range pairs {
			for range 32 {
				f.rings[2*i].recv(4096)
			}
		}
		return f, d.Reserver(0)
	}
	for name, feats := range map[string]uint64{
		"one buffer a frame": allOffloads &^ featMrgRxbuf, "no checksums": allOffloads &^ featGuestCSUM, "no TSO": allOffloads &^ featGuestTSO4,
	} {
		t.Run(name, func(t *testing.T) {
			_, x := up(t, feats, 1)
			require.False(t, x.Reserve(0, 1, 1) != nil)
			require.False(t, x.Short())
			x.Keep(0)
		})
	}
	t.Run("two rings", func(t *testing.T) {
		f, x := up(t, allOffloads|featMQ, 2)
		x.AnyQueue()
		require.False(t, x.Reserve(0, 1, 1) != nil)
		require.False(t, x.Short())
		f.do(SetVringEnable, u32s(2, 0))
		require.Len(t, x.Reserve(0, 1, 1), 1)
		x.Keep(0)
		f.do(SetVringEnable, u32s(2, 1))
		f.do(SetVringEnable, u32s(0, 0))
		require.False(t, x.Reserve(0, 1, 1) != nil, "the only ring is another")
		x.Keep(0)
	})
	t.Run("no ring", func(t *testing.T) {
		x := newDevice(t, Config{}).Reserver(0)
		require.False(t, x.Reserve(0, 1, 1) != nil)
		require.False(t, x.Short())
		x.Keep(0)
		x.Free()
		require.False(t, x.Arm())
		x.Disarm()
	})
	t.Run("too few buffers", func(t *testing.T) {
		f, x := up(t, allOffloads, 1)
		require.False(t, x.Reserve(0, 33*4096, 33*4096) != nil)
		require.True(t, x.Short())
		x.Keep(0)
		require.Len(t, x.Reserve(0, 32*4096, 33*4096), 32)
		require.False(t, x.Short())
		x.Keep(0)
		require.Zero(t, f.rings[0].usedIdx(), "the guest notices nothing")
	})
	// What is wrong with a chain is found, counted and answered by Push.
	for name, post := range map[string]func(f *front){
		"unmapped":      func(f *front) { f.rings[0].post(guestBuf{testMem, 400, true}) },
		"readable":      func(f *front) { f.rings[0].post(guestBuf{f.alloc(400), 400, false}) },
		"too short":     func(f *front) { f.rings[0].recv(11) },
		"of two pieces": func(f *front) { f.rings[0].post(guestBuf{f.alloc(400), 400, true}, guestBuf{f.alloc(400), 400, true}) },
	} {
		t.Run(name, func(t *testing.T) {
			noLeak(t)
			d := newDevice(t, Config{})
			f := connect(t, d)
			f.bringUp(allOffloads, 2)
			f.rings[0].recv(2000)
			post(f)
			f.rings[0].recv(2000)
			x := d.Reserver(0)
			require.False(t, x.Reserve(0, 2001, 4000) != nil)
			require.False(t, x.Short())
			x.Keep(0)
			fs := pushBytes(d, testFrame(1900, 1), testFrame(1900, 2), testFrame(60, 3))
			require.Equal(t, frame.ReasonNone, fs[0].Reason)
			_, got := f.rings[0].received(12)
			require.Equal(t, testFrame(1900, 1), got[0])
		})
	}
}

// What the control plane does in the middle of a reservation does not lose a
// buffer: the worker's turn ends first, or the queue stays.
func TestReserveMeetsControl(t *testing.T) { bothRings(t, testReserveMeetsControl) }

func testReserveMeetsControl(t *testing.T) {
	for name, do := range map[string]func(f *front){
		"disable":     func(f *front) { f.do(SetVringEnable, u32s(0, 0)) },
		"disable tx":  func(f *front) { f.do(SetVringEnable, u32s(1, 0)) },
		"stop":        func(f *front) { f.send(GetVringBase, flagVersion, u32s(0, 0)) },
		"features":    func(f *front) { f.send(SetFeatures, flagVersion|flagNeedReply, u64(plainFeats)) },
		"no memory":   func(f *front) { f.send(RemMemReg, flagVersion|flagNeedReply, region1(testGPA, testMem, testUVA, 0)) },
		"new address": func(f *front) { f.send(SetVringAddr, flagVersion|flagNeedReply, addr(0, 0, 0)) },
		"gone":        func(f *front) { f.c.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			noLeak(t)
			d := newDevice(t, Config{})
			f := connect(t, d)
			f.bringUp(allOffloads, 2)
			rx, x := f.rings[0], d.Reserver(0)
			for range 8 {
				rx.recv(2000)
			}
			turn.Lock()
			var b frame.Batch
			b.Reset(0)
			data := tcpFrame(3000)
			fr, used := land(&b, x.Reserve(0, 4000, 8000), 0, data)
			x.Keep(used)
			do(f)
			d.Push(0, []*frame.Frame{fr})
			x.Free()
			turn.Unlock()
			if fr.Reason == frame.ReasonNone {
				_, got := rx.received(12)
				require.Equal(t, [][]byte{data}, got)
			}
			switch name {
			case "stop":
				_, p := f.receive()
				require.Equal(t, f.baseOf(rx.usedIdx()), native.Uint32(p[4:]))
			case "features", "no memory", "new address":
				f.receive()
			case "gone":
				enginetest.Eventually(t, 5*time.Second, func() bool { return d.Status().State == Disconnected })
			}
			if name != "gone" && name != "no memory" {
				reply := f.ask(GetVringBase, u32s(0, 0))
				require.Equal(t, f.baseOf(rx.usedIdx()), native.Uint32(reply[4:]), "every buffer is back")
			}
			require.Contains(t, []int{0, used}, int(rx.usedIdx()), "the frame's or none")
		})
	}
}

// A guest that switches checksums off while a frame lies in its buffers gets it
// with its checksum.
func TestReserveMeetsOffloadsOff(t *testing.T) { bothRings(t, testReserveMeetsOffloadsOff) }

func testReserveMeetsOffloadsOff(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(allOffloads, 2)
	rx, x := f.rings[0], d.Reserver(0)
	for range 8 {
		rx.recv(2000)
	}
	var b frame.Batch
	b.Reset(0)
	data := tcpFrame(1000)
	off := enginetest.Partial(data)
	fr, used := land(&b, x.Reserve(0, 4000, 8000), 0, data)
	fr.Offload = off
	x.Keep(used)
	r := &d.Pairs()[0].rx
	r.set(r.q, r.ring, r.feats&^(featGuestCSUM|featGuestTSO4|featGuestTSO6))
	d.Push(0, []*frame.Frame{fr})
	x.Free()
	hdrs, got := rx.received(12)
	require.Len(t, got, 1)
	require.Zero(t, hdrs[0][0], "flags")
	require.True(t, enginetest.ChecksumsOK(got[0]))
}

// H008: the guest's memory goes away while frames lie in it.
func TestReserveMeetsFault(t *testing.T) { bothRings(t, testReserveMeetsFault) }

func testReserveMeetsFault(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(allOffloads, 2)
	for range 8 {
		f.rings[0].recv(2000)
	}
	x := d.Reserver(0)
	done := make(chan any)
	frame.Go(func() {
		defer close(done)
		var b frame.Batch
		b.Reset(0)
		fr, used := land(&b, x.Reserve(0, 4000, 8000), 0, tcpFrame(3000))
		x.Keep(used)
		if err := unix.Ftruncate(f.memfd, 0); err != nil {
			t.Error(err)
		}
		survive(d, func() { d.Push(0, []*frame.Frame{fr}) })
		survive(d, x.Free)
		b.Reset(0)
		if x.Reserve(0, 1, 1) != nil {
			t.Error("a ring whose memory is gone lends buffers")
		}
		x.Keep(0)
	})
	<-done
	require.NoError(t, unix.Ftruncate(f.memfd, testMem))
	require.Positive(t, d.Status().Counters["memory_faults"])
}

// survive does what a worker does about a fault.
func survive(d *Device, fn func()) {
	defer func() {
		if r := recover(); r != nil {
			if addr, ok := frame.FaultAddr(r); !ok || !d.Fault(addr) {
				panic(r)
			}
		}
	}()
	fn()
}

func TestReserveAllocatesNothing(t *testing.T) { bothRings(t, testReserveAllocatesNothing) }

func testReserveAllocatesNothing(t *testing.T) {
	needPlainSyscalls(t)
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(allOffloads, 2)
	x, rx := d.Reserver(0), f.rings[0]
	for range testRing {
		rx.recv(2000)
	}
	rx.avail -= testRing
	var b frame.Batch
	fs := make([]*frame.Frame, 1)
	tail := make([][]byte, 0, 8)
	require.Zero(t, testing.AllocsPerRun(100, func() {
		if !f.packed {
			rx.avail += 2
			native.PutUint16(rx.at(availAt+2), rx.avail)
		}
		b.Reset(0)
		bufs := x.Reserve(0, 3000, 4000)
		fs[0] = b.Next()
		fs[0].HeadLen, fs[0].Len, fs[0].RxBufs = frame.HeadSize, 3000, 2
		fs[0].Tail = append(tail[:0], bufs[0][140:], bufs[1][:1012])
		x.Keep(2)
		d.Push(0, fs)
		x.Free()
		if f.packed {
			rx.again(2, 2000)
		}
	}))
	require.EqualValues(t, 101, d.Pairs()[0].status().RxDirect)
}
