package stream

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"runtime/debug"
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

func TestNobodyConnected(t *testing.T) {
	d := newDevice(t, Config{})
	fs := frames(testFrame(60, 1), testFrame(1514, 2))
	d.Push(0, fs)
	for _, f := range fs {
		assert.Equal(t, frame.QueueStopped, f.Reason)
		assert.Equal(t, frame.Drop, f.Out)
	}
	assert.Equal(t, map[string]uint64{"queue_stopped": 2}, d.Status().Drops)
	assert.Zero(t, d.Pull(new(frame.Batch)))
	assert.False(t, d.Arm())
	// Nor after the end of a connection.
	q := connect(t, d)
	require.Empty(t, pull(d))
	require.False(t, d.Arm())
	q.c.Close()
	disconnected(t, d)
	d.Push(0, fs)
	assert.EqualValues(t, 4, d.Status().Drops["queue_stopped"])
	connect(t, d)
	require.True(t, d.Arm(), "nobody has looked yet")
}

// Frames of any number of pieces are sent as they are, shorter ones padded.
func TestPieces(t *testing.T) {
	d := newDevice(t, Config{})
	q := connect(t, d)
	split := func(b []byte, head int, pieces int) *frame.Frame {
		f := &frame.Frame{Len: int32(len(b)), HeadLen: uint16(copy(make([]byte, head), b))}
		copy(f.Head[:head], b)
		rest := b[head:]
		for i := range pieces {
			n := len(rest) / (pieces - i)
			f.Tail = append(f.Tail, rest[:n])
			rest = rest[n:]
		}
		return f
	}
	var fs []*frame.Frame
	var want [][]byte
	for i, c := range []struct{ size, head, pieces int }{
		{60, 60, 0}, {14, 14, 0}, {42, 18, 1}, {60, 18, 5}, {100, 18, 3}, {128, 128, 0}, {129, 128, 1}, {129, 18, 2},
		{1514, 128, 1}, {1514, 18, 1023}, {1514, 18, 1024}, {9000, 18, 1024}, {50, 18, 1024}, {1514, 128, 700}, {1514, 128, 700},
	} {
		b := testFrame(c.size, byte(i))
		f := split(b, c.head, c.pieces)
		require.Equal(t, b, f.Bytes())
		fs, want = append(fs, f), append(want, b)
	}
	d.Push(0, fs)
	for i, w := range want {
		require.Equal(t, frame.ReasonNone, fs[i].Reason, i)
		if len(w) < minWire {
			w = append(w, make([]byte, minWire-len(w))...)
		}
		require.Equal(t, w, q.read(), i)
	}
	// More bytes than a frame may have.
	f := split(testFrame(frame.MaxLen+1, 1), 128, 1)
	d.Push(0, append([]*frame.Frame{f}, frames(testFrame(60, 1))...))
	require.Equal(t, frame.OversizeFrame, f.Reason)
	require.Equal(t, testFrame(60, 1), q.read())
}

func segmentable(payload int) []byte {
	e := enginetest.Eth{Dst: frame.MAC{2, 1}, Src: frame.MAC{2, 2}}
	ip := enginetest.IP{Src: netip.MustParseAddr("10.0.0.1"), Dst: netip.MustParseAddr("10.0.0.2")}
	return enginetest.TCPFrame(e, ip, enginetest.TCP{Src: 1, Dst: 2, Seq: 1000, Flags: enginetest.ACK}, testFrame(payload, 5))
}

// withGSO makes a frame of b that is to be cut into segments.
func withGSO(b []byte, mss uint16) *frame.Frame {
	b = bytes.Clone(b)
	o := enginetest.GSO(b, mss)
	f := frames(b)[0]
	f.Offload = o
	return f
}

const (
	tcpAt  = frame.EthernetLen + 20
	tcpHdr = 20
)

// NICs that are not virtio get whole checksums and frames of their MTU.
func TestOffloads(t *testing.T) {
	d := newDevice(t, Config{})
	q := connect(t, d)
	good := segmentable(1000)
	partial := bytes.Clone(good)
	o := enginetest.Partial(partial)
	f := frames(partial)[0]
	f.Offload = o
	require.True(t, f.CheckOffload())
	require.False(t, enginetest.ChecksumsOK(partial))

	long := segmentable(40000)
	gso := withGSO(long, 1448)
	require.True(t, gso.CheckOffload())

	bad := frames(testFrame(3000, 1))[0]
	bad.Offload = frame.Offload{Flags: frame.NeedsCsum, GSO: frame.GSOTCPv4, GSOSize: 1448}
	var seg frame.Segmenter
	again := withGSO(long, 1448)
	require.True(t, seg.Start(again))
	d.Push(0, []*frame.Frame{f, bad, gso})
	require.Equal(t, frame.ReasonNone, f.Reason)
	require.Equal(t, frame.BadOffload, bad.Reason)
	require.Equal(t, frame.ReasonNone, gso.Reason)
	require.Equal(t, good, q.read())
	var payload []byte
	for want := seg.Next(); want != nil; want = seg.Next() {
		got := q.read()
		require.Equal(t, want.Bytes(), got)
		require.LessOrEqual(t, len(got), 1514)
		require.True(t, enginetest.ChecksumsOK(got))
		payload = append(payload, got[tcpAt+tcpHdr:]...)
	}
	require.Equal(t, long[tcpAt+tcpHdr:], payload)
	assert.EqualValues(t, 1+28, d.Status().RxFrames)
}

// fill pushes a frame of that size until the socket takes no more, and returns
// how many it took.
func fill(t testing.TB, d *Device, size int) (n int) {
	t.Helper()
	for {
		f := frames(testFrame(size, 9))
		d.Push(0, f)
		if f[0].Reason != frame.ReasonNone {
			require.Equal(t, frame.NoBuffer, f[0].Reason)
			return n
		}
		n++
		require.Less(t, n, 1<<20)
	}
}

// A peer that never reads gets no more than fits. What it reads in the end is
// whole frames, the last one of which a worker finishes when there is room.
func TestFullSocket(t *testing.T) {
	split := uint64(0)
	for _, size := range []int{14, 1514, 9014, 50000, 55000, 60000, 61000, 62000, 63000, 64000, frame.MaxLen} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			d := newDevice(t, Config{})
			q := connect(t, d)
			taken := fill(t, d, size)
			lost := frames(bytesN(10, testFrame(size, 1))...)
			for range 3 {
				d.Push(0, lost)
				for _, f := range lost {
					require.Equal(t, frame.NoBuffer, f.Reason)
				}
			}
			require.EqualValues(t, 31, d.Status().Drops["no_buffer"])
			require.LessOrEqual(t, len(d.rx.rest), lenSize+size)
			want := testFrame(size, 9)
			if size < minWire {
				want = append(want, make([]byte, minWire-size)...)
			}
			for range taken - 1 {
				require.Equal(t, want, q.read())
			}
			require.Empty(t, pull(d)) // it finishes what was begun
			require.Equal(t, want, q.read())
			require.False(t, d.rx.waits.Load())
			// And it goes on.
			d.Push(0, frames(testFrame(100, 2)))
			require.Equal(t, testFrame(100, 2), q.read())
			st := d.Status()
			require.EqualValues(t, taken+1, st.RxFrames)
			split += st.RxSplit
		})
	}
	require.NotZero(t, split, "no frame was cut")
}

// A worker that sleeps finishes a frame in as many pieces as the socket wants
// it in, and takes nothing else meanwhile.
func TestManyPieces(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	start(t, d, engine.Config{Poll: engine.PollNever}, func(p frame.PortID) engine.Stage { return echo(p) })
	q := connect(t, d)
	small(t, d)
	for i := range 5 {
		f := frames(testFrame(60000+i, byte(i)), testFrame(60, 9))
		d.Push(1, f)
		require.Equal(t, frame.ReasonNone, f[0].Reason)
		require.Equal(t, frame.NoBuffer, f[1].Reason)
		if i%2 == 1 {
			d.Push(1, f[1:])
			require.Equal(t, frame.NoBuffer, f[1].Reason)
		}
		require.Equal(t, testFrame(60000+i, byte(i)), q.read())
		enginetest.Eventually(t, 10*time.Second, func() bool { return !d.rx.waits.Load() })
	}
	require.EqualValues(t, 5, d.Status().RxSplit)
}

func bytesN(n int, b []byte) (out [][]byte) {
	for range n {
		out = append(out, b)
	}
	return out
}

// A batch of which the socket takes a part: frames up to there, none behind.
func TestBatchIsCut(t *testing.T) {
	d := newDevice(t, Config{})
	q := connect(t, d)
	var bs [][]byte
	for i := range 2 * frame.BatchSize {
		bs = append(bs, testFrame(9000+i, byte(i)))
	}
	fs := frames(bs...)
	d.Push(0, fs)
	cut := 0
	for cut < len(fs) && fs[cut].Reason == frame.ReasonNone {
		cut++
	}
	require.NotZero(t, cut)
	require.Less(t, cut, frame.BatchSize)
	for _, f := range fs[cut:] {
		require.Equal(t, frame.NoBuffer, f.Reason)
	}
	require.EqualValues(t, 1, d.Status().RxSplit)
	require.True(t, d.rx.waits.Load())
	done := make(chan bool)
	go func() {
		defer close(done)
		for _, b := range bs[:cut] {
			if !bytes.Equal(b, q.read()) {
				t.Error("another frame")
			}
		}
	}()
	enginetest.Eventually(t, 10*time.Second, func() bool { pull(d); return !d.rx.waits.Load() })
	<-done
	st := d.Status()
	require.EqualValues(t, cut, st.RxFrames)
	require.EqualValues(t, len(fs)-cut, st.Drops["no_buffer"])
	// The rest goes before the frames of the next batch, in one go.
	d.Push(0, fs[:cut+2])
	require.True(t, d.rx.waits.Load())
	for _, b := range bs[:cut/2] {
		require.Equal(t, b, q.read())
	}
	d.Push(0, frames(testFrame(70, 1)))
	require.False(t, d.rx.waits.Load())
	for _, b := range bs[cut/2 : cut] {
		require.Equal(t, b, q.read())
	}
	require.Equal(t, testFrame(70, 1), q.read())
}

// Of a long GSO frame only the beginning fits: the frame counts as sent, its
// lost segments as dropped.
func TestSegmentsAreCut(t *testing.T) {
	d := newDevice(t, Config{})
	q := connect(t, d)
	var fs []*frame.Frame
	for range 40 {
		fs = append(fs, withGSO(segmentable(60000), 1000))
	}
	d.Push(0, fs)
	cut := 0
	for cut < len(fs) && fs[cut].Reason == frame.ReasonNone {
		cut++
	}
	require.NotZero(t, cut)
	require.Less(t, cut, len(fs))
	for _, f := range fs[cut:] {
		require.Equal(t, frame.NoBuffer, f.Reason)
	}
	st := d.Status()
	got := int(st.RxFrames)
	require.Greater(t, got, 60*(cut-1))
	require.LessOrEqual(t, got, 60*cut)
	// Frames that were not begun count once each.
	require.LessOrEqual(t, int(st.Drops["no_buffer"]), 60*cut-got+len(fs)-cut+60)
	go finish(d)
	for i := range got {
		b := q.read()
		require.EqualValues(t, 1000+i%60*1000, binary.BigEndian.Uint32(b[tcpAt+4:]), "sequence number")
	}
}

// Workers push at the same time, the peer reads in odd pieces, QEMU comes and
// goes: whatever arrives is whole frames in each worker's order.
func TestPushAtOnce(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	const workers, batches = 3, 150
	var wg sync.WaitGroup
	for range 3 {
		q := connect(t, d)
		before := d.Status()
		for w := range workers {
			wg.Go(func() {
				for i := range batches {
					var bs [][]byte
					for j := range 20 {
						b := testFrame(60+(i*j*13)%2000, byte(w))
						binary.BigEndian.PutUint32(b[14:], uint32(i*20+j))
						b[18] = byte(w)
						bs = append(bs, b)
					}
					d.Push(w, frames(bs...))
				}
			})
		}
		stop := make(chan struct{})
		pulled := make(chan struct{})
		go func() {
			defer close(pulled)
			for {
				pull(d)
				select {
				case <-stop:
					if !d.rx.waits.Load() {
						return
					}
				default:
				}
			}
		}()
		var next [workers]int64
		got := 0
		done := make(chan struct{})
		go func() {
			defer close(done)
			wg.Wait()
			close(stop)
			<-pulled
			_ = unix.Shutdown(d.conn.fd, unix.SHUT_WR)
		}()
		for {
			var head [lenSize]byte
			if _, err := io.ReadFull(q.c, head[:]); err != nil {
				require.ErrorIs(t, err, io.EOF)
				break
			}
			b := make([]byte, binary.BigEndian.Uint32(head[:]))
			_, err := io.ReadFull(q.c, b)
			require.NoError(t, err)
			w, i := b[18], int64(binary.BigEndian.Uint32(b[14:]))
			require.Less(t, int(w), workers)
			require.GreaterOrEqual(t, i, next[w])
			next[w] = i + 1
			want := testFrame(len(b), w)
			copy(want[14:19], b[14:19])
			require.Equal(t, want, b)
			got++
		}
		<-done
		st := d.Status()
		require.EqualValues(t, got, st.RxFrames-before.RxFrames)
		require.EqualValues(t, workers*batches*20-got, st.Drops["no_buffer"]-before.Drops["no_buffer"])
		q.c.Close()
		disconnected(t, d)
	}
}

// QEMU is gone: frames are dropped, and what it sent before is still brought.
func TestPushAfterHangUp(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	q := connect(t, d)
	q.send(testFrame(60, 1), testFrame(60, 2))
	require.NoError(t, q.c.Close())
	fs := frames(testFrame(60, 1), testFrame(60, 2))
	for range 2 {
		d.Push(0, fs)
		require.Equal(t, frame.QueueStopped, fs[0].Reason)
		require.Equal(t, frame.QueueStopped, fs[1].Reason)
	}
	require.Len(t, pull(d), 2)
	disconnected(t, d)
	// A peer that only will not read any more is no QEMU.
	q = connect(t, d)
	require.NoError(t, q.c.CloseRead())
	d.Push(0, fs)
	require.Equal(t, frame.QueueStopped, fs[0].Reason)
	disconnected(t, d)
	// One that goes away while a frame is being sent.
	q = connect(t, d)
	fill(t, d, 9000)
	require.NoError(t, q.c.Close())
	disconnected(t, d)
	require.False(t, d.rx.waits.Load())
	q = connect(t, d)
	d.Push(0, frames(testFrame(60, 4)))
	require.Equal(t, testFrame(60, 4), q.read())
}

// vanished is memory that its owner has taken away.
func vanished(t *testing.T, n int) []byte {
	t.Helper()
	fd, err := unix.MemfdCreate("gone", unix.MFD_CLOEXEC)
	require.NoError(t, err)
	require.NoError(t, unix.Ftruncate(fd, int64(n)))
	m, err := unix.Mmap(fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, unix.Munmap(m)) })
	require.NoError(t, unix.Ftruncate(fd, 0))
	require.NoError(t, unix.Close(fd))
	return m
}

// H030: a sender's memory is gone. Its frames are lost, others are not, and
// the framing holds.
func TestVanishedMemory(t *testing.T) {
	d := newDevice(t, Config{})
	q := connect(t, d)
	gone := vanished(t, 64<<10)
	bad := func(n int) *frame.Frame {
		f := frames(testFrame(frame.HeadSize, 1))[0]
		f.Tail = [][]byte{gone[:n]}
		f.Len += int32(n)
		return f
	}
	fs := append(frames(testFrame(60, 1), testFrame(1514, 2)), bad(1000), bad(2000))
	fs = append(fs, frames(testFrame(300, 3))...)
	d.Push(0, fs)
	for i, want := range []frame.DropReason{0, 0, frame.SendFailed, frame.SendFailed, 0} {
		require.Equal(t, want, fs[i].Reason, i)
	}
	for i, n := range []int{60, 1514, 300} {
		require.Equal(t, testFrame(n, byte(i+1)), q.read())
	}
	// Where we read it, it is a fault, which the worker takes care of. What was
	// staged before is sent.
	f := bad(1000)
	f.Offload = frame.Offload{Flags: frame.NeedsCsum, CsumStart: 34, CsumOffset: 16}
	require.True(t, faults(func() { d.Push(0, append(frames(testFrame(80, 1)), f)) }))
	require.Equal(t, testFrame(80, 1), q.read())
	// A frame that goes away while it is being sent is sent to its end, with
	// zeros for what is gone.
	small(t, d)
	d.Push(0, frames(testFrame(30000, 3))) // and nothing of what was kept before
	go finish(d)
	require.Equal(t, testFrame(30000, 3), q.read())
	enginetest.Eventually(t, 10*time.Second, func() bool { return !d.rx.waits.Load() })
	half := bad(20000)
	half.Tail = [][]byte{testFrame(5000, 5), gone[:15000]}
	require.True(t, faults(func() { d.Push(0, []*frame.Frame{half}) }))
	require.True(t, d.rx.waits.Load(), "the worker will go on with it")
	go finish(d)
	want := append(testFrame(frame.HeadSize, 1), testFrame(5000, 5)...)
	require.Equal(t, append(want, make([]byte, 15000)...), q.read())
	d.Push(0, frames(testFrame(90, 1)))
	require.Equal(t, testFrame(90, 1), q.read())
}

// small makes the socket's buffer so small that it takes no frame whole.
func small(t *testing.T, d *Device) {
	t.Helper()
	require.NoError(t, unix.SetsockoptInt(d.conn.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 1))
}

// finish pulls until nothing waits for room in the socket.
func finish(d *Device) {
	for d.rx.waits.Load() {
		pull(d)
	}
}

// faults reports whether f ends with a fault in memory.
func faults(f func()) (fault bool) {
	done := make(chan bool)
	go func() {
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
		defer func() {
			_, ok := frame.FaultAddr(recover())
			done <- ok
		}()
		f()
	}()
	return <-done
}

// Nothing that was lent is remembered after a Push.
func TestNothingIsKept(t *testing.T) {
	d := newDevice(t, Config{})
	connect(t, d)
	gso := withGSO(segmentable(60000), 1000)
	d.Push(0, append(frames(testFrame(1514, 1), testFrame(200, 1)), gso))
	for range 3 {
		d.Push(0, frames(bytesN(frame.BatchSize, testFrame(9000, 1))...)) // until it is full
	}
	for i := range d.rx.iovs {
		require.Nil(t, d.rx.iovs[i].Base, i)
	}
	for i := range d.rx.units {
		require.Nil(t, d.rx.units[i].f, i)
	}
	require.Nil(t, d.rx.msg.Iov)
}

// A batch is pushed without allocating anything, also with offloads, and when
// the socket is full.
func TestAllocsPush(t *testing.T) {
	d := newDevice(t, Config{})
	q := connect(t, d)
	sum, gso := frames(segmentable(1000))[0], withGSO(segmentable(60000), 1448)
	offload := gso.Offload
	fs := append(frames(bytesN(90, testFrame(1514, 2))...), sum, gso)
	raw, err := q.c.SyscallConn()
	require.NoError(t, err)
	buf := make([]byte, 256<<10)
	require.NoError(t, raw.Control(func(fd uintptr) {
		push := func() {
			sum.Offload = frame.Offload{Flags: frame.NeedsCsum, CsumStart: tcpAt, CsumOffset: 16}
			gso.Offload = offload
			d.Push(0, fs)
		}
		allocs := testing.AllocsPerRun(200, func() {
			push()
			if _, err := unix.Read(int(fd), buf); err != nil || d.rx.waits.Load() {
				panic(err)
			}
		})
		assert.Zero(t, allocs)
		allocs = testing.AllocsPerRun(200, func() {
			for n := 60; n > 0 && (n > 40 || !d.rx.waits.Load()); n-- { // full, and then room again
				push()
			}
			for d.rx.waits.Load() {
				if _, err := unix.Read(int(fd), buf); err != nil {
					panic(err)
				}
				d.resume()
			}
		})
		assert.Zero(t, allocs)
	}))
	assert.NotZero(t, d.Status().RxSplit)
}

func BenchmarkPush(b *testing.B) {
	for _, size := range []int{60, 1514} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			d := newDevice(b, Config{})
			q := connect(b, d)
			fs := frames(bytesN(64, testFrame(size, 1))...)
			raw, err := q.c.SyscallConn()
			require.NoError(b, err)
			buf := make([]byte, 256<<10)
			b.SetBytes(int64(size))
			require.NoError(b, raw.Control(func(fd uintptr) {
				for i := 0; i < b.N; i += len(fs) {
					d.Push(0, fs)
					b.StopTimer()
					_, _ = unix.Read(int(fd), buf)
					b.StartTimer()
				}
			}))
			require.Empty(b, d.Status().Drops)
		})
	}
}

// A link that is down passes nothing either way, and what was sent meanwhile is gone.
func TestLinkDown(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	q := connect(t, d)
	require.True(t, d.LinkUp())
	d.SetLink(false)
	require.False(t, d.LinkUp())
	for i := range 200 {
		q.send(testFrame(60, byte(i)))
	}
	require.Empty(t, pull(d))
	require.Empty(t, pull(d))
	require.Empty(t, pull(d))
	require.Empty(t, pull(d))
	d.Push(0, frames(testFrame(60, 1)))
	d.SetLink(true)
	q.send(testFrame(61, 7))
	require.Equal(t, [][]byte{testFrame(61, 7)}, pull(d))
	d.Push(0, frames(testFrame(62, 2)))
	require.Equal(t, testFrame(62, 2), q.read())
	require.EqualValues(t, 201, d.Status().Drops["queue_stopped"])
}
