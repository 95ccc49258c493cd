package stream

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine"
	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

var (
	_ engine.Port  = (*Device)(nil)
	_ engine.Queue = (*Device)(nil)
	_ Watcher      = (*engine.Worker)(nil)
)

func TestThereAndBack(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	q := connect(t, d)
	want := [][]byte{testFrame(60, 1), testFrame(1514, 2), testFrame(14, 3), testFrame(128, 4), testFrame(129, 5), testFrame(frame.MaxLen, 6)}
	go q.send(want...)
	require.Equal(t, want, pullN(t, d, len(want)))

	fs := frames(want...)
	done := make(chan [][]byte)
	go func() {
		var got [][]byte
		for range want {
			got = append(got, q.read())
		}
		done <- got
	}()
	for _, f := range fs {
		d.Push(0, []*frame.Frame{f})
		require.Equal(t, frame.ReasonNone, f.Reason)
		require.Equal(t, frame.PortID(7), f.Out)
	}
	enginetest.Eventually(t, 10*time.Second, func() bool { return len(pull(d)) == 0 && !d.rx.waits.Load() })
	want[2] = append(want[2], make([]byte, 46)...) // no wire has shorter ones
	require.Equal(t, want, <-done)
	st := d.Status()
	assert.True(t, st.Connected)
	assert.EqualValues(t, 6, st.TxFrames)
	assert.EqualValues(t, 6, st.RxFrames)
	assert.EqualValues(t, 60+1514+14+128+129+frame.MaxLen, st.TxBytes)
	assert.EqualValues(t, 60+1514+60+128+129+frame.MaxLen, st.RxBytes)
	assert.Empty(t, st.Drops)
	assert.Equal(t, map[string]uint64{"sessions": 1}, st.Counters)
}

// What a frame consists of: the head private, the tail where it was received,
// and all of it as it was until Release.
func TestLent(t *testing.T) {
	d := newDevice(t, Config{})
	q := connect(t, d)
	want := testFrame(1000, 1)
	q.send(want)
	var b frame.Batch
	b.In = 3
	require.Equal(t, 1, d.Pull(&b))
	f := b.Frame(0)
	assert.Equal(t, frame.PortID(3), f.In)
	assert.EqualValues(t, 1000, f.Len)
	assert.EqualValues(t, frame.HeadSize, f.HeadLen)
	require.Len(t, f.Tail, 1)
	assert.Zero(t, f.Offload)
	assert.Same(t, &d.tx.buf[lenSize+frame.HeadSize], &f.Tail[0][0])
	// What comes meanwhile, the end of the connection and a new one change nothing.
	q.send(testFrame(1000, 2))
	q.c.Close()
	q = connect(t, d)
	q.send(testFrame(1000, 3))
	assert.Equal(t, want, f.Bytes())
	d.Release(&b)
	assert.Equal(t, [][]byte{testFrame(1000, 3)}, pullN(t, d, 1))
}

func TestLengths(t *testing.T) {
	for _, c := range []struct {
		name string
		mtu  int
		size int
		want frame.DropReason
	}{
		{"one byte", 0, 1, frame.ShortFrame},
		{"no Ethernet header", 1500, 13, frame.ShortFrame},
		{"Ethernet header", 1500, 14, frame.ReasonNone},
		{"MTU", 1500, 1514, frame.ReasonNone},
		{"MTU and tag", 1500, 1518, frame.ReasonNone},
		{"beyond the MTU", 1500, 1519, frame.OversizeFrame},
		{"jumbo", 9000, 9018, frame.ReasonNone},
		{"any", 0, frame.MaxLen, frame.ReasonNone},
		{"longest", 65535, frame.MaxLen, frame.OversizeFrame},
		{"longest but a tag", 65535, frame.MaxLen - 4, frame.ReasonNone},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := newDevice(t, Config{MTU: c.mtu})
			q := connect(t, d)
			f, after := testFrame(c.size, 1), testFrame(60, 2)
			q.send(f, after)
			want := [][]byte{f, after}
			if c.want != frame.ReasonNone {
				want = want[1:]
				defer func() {
					assert.Equal(t, map[string]uint64{c.want.String(): 1}, d.Status().Drops)
				}()
			}
			require.Equal(t, want, pullN(t, d, len(want)))
		})
	}
}

// A length that cannot be one means that the framing is lost: the connection
// ends, after what came before, and the next QEMU is served.
func TestBadLength(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	for i, n := range []uint32{0, frame.MaxLen + 1, 1 << 24, 1<<32 - 1} {
		q := connect(t, d)
		q.write(slices.Concat(framed(testFrame(60, 1)), binary.BigEndian.AppendUint32(nil, n), framed(testFrame(60, 2)))...)
		require.Equal(t, [][]byte{testFrame(60, 1)}, pull(d))
		require.Empty(t, pull(d))
		q.expectEnd()
		disconnected(t, d)
		assert.EqualValues(t, i+1, d.Status().Counters["bad_length"])
	}
	q := connect(t, d)
	q.send(testFrame(60, 3))
	require.Len(t, pullN(t, d, 1), 1)
}

// H003: a byte at a time.
func TestByteByByte(t *testing.T) {
	d := newDevice(t, Config{})
	q := connect(t, d)
	want := [][]byte{testFrame(60, 1), testFrame(14, 2), testFrame(300, 3)}
	var got [][]byte
	for _, f := range want {
		for i, b := range framed(f) {
			q.write(b)
			fs := pull(d)
			if i < lenSize+len(f)-1 {
				require.Empty(t, fs)
			}
			got = append(got, fs...)
		}
	}
	require.Equal(t, want, got)
}

// Many short frames come by one system call, in batches.
func TestManyAtOnce(t *testing.T) {
	d := newDevice(t, Config{})
	q := connect(t, d)
	const n = 3*frame.BatchSize + 5
	all := bytes.Repeat(framed(testFrame(60, 1)), n)
	q.write(all...)
	for _, want := range []int{frame.BatchSize, frame.BatchSize, frame.BatchSize} {
		require.Len(t, pull(d), want)
		require.True(t, d.Arm(), "there are more")
	}
	require.Len(t, pull(d), 5)
	require.Empty(t, pull(d))
	require.False(t, d.Arm())
	// Frames that are dropped end a turn too, and the worker comes back.
	q.write(bytes.Repeat(framed(testFrame(5, 1)), n)...)
	for range 3 {
		var b frame.Batch
		require.Zero(t, d.Pull(&b))
		require.True(t, b.Waiting)
	}
	require.Empty(t, pull(d))
	require.EqualValues(t, n, d.Status().Drops["short_frame"])
}

// QEMU goes in the midst of a frame, of a length, and between frames.
func TestHangUp(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	whole := framed(testFrame(200, 1))
	for n := range len(whole) {
		q := connect(t, d)
		q.send(testFrame(60, 2))
		if n > 0 {
			q.write(whole[:n]...)
		}
		require.NoError(t, q.c.Close())
		require.Equal(t, [][]byte{testFrame(60, 2)}, pull(d))
		disconnected(t, d)
	}
	st := d.Status()
	assert.EqualValues(t, len(whole), st.Counters["sessions"])
	assert.EqualValues(t, len(whole)-1, st.Counters["cut_frames"])
	assert.EqualValues(t, 1, st.Counters["hang_ups"])
	// Gone with frames of ours unread.
	q := connect(t, d)
	d.Push(0, frames(testFrame(60, 1)))
	require.NoError(t, q.c.Close())
	disconnected(t, d)
	assert.EqualValues(t, 2, d.Status().Counters["hang_ups"])
	// Closed one way only.
	q = connect(t, d)
	require.NoError(t, q.c.CloseWrite())
	disconnected(t, d)
	q.expectEnd()
}

// Descriptors that a peer sends along are not taken, and out-of-band bytes do
// no harm.
func TestSurplus(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	q := connect(t, d)
	for i := range 50 {
		_, _, err := q.c.WriteMsgUnix(framed(testFrame(60, byte(i))), unix.UnixRights(0, 1, 2), nil)
		require.NoError(t, err)
	}
	got := pullN(t, d, 50)
	require.Equal(t, testFrame(60, 49), got[49])
	raw, err := q.c.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) { _ = unix.Sendto(int(fd), []byte{1}, unix.MSG_OOB, nil) }))
	for range 10 {
		require.Empty(t, pull(d))
	}
	q.c.Close()
	disconnected(t, d)
}

// However often a worker has asked in vain: it finds what came before it
// sleeps, and what wakes it.
func TestAskedInVain(t *testing.T) {
	d := newDevice(t, Config{})
	q := connect(t, d)
	for n := range 70 {
		for range n {
			require.Empty(t, pull(d))
		}
		if d.Arm() {
			require.Empty(t, pull(d))
			require.False(t, d.Arm())
		}
		q.send(testFrame(60, byte(n)))
		require.Equal(t, [][]byte{testFrame(60, byte(n))}, pull(d))
	}
}

// start runs an engine with the device, whose frames go where stage says.
func start(t *testing.T, d *Device, c engine.Config, stage func(p frame.PortID) engine.Stage) *engine.Engine {
	t.Helper()
	if c.Workers == 0 {
		c.Workers = 1
	}
	c.Log = quiet
	e, err := engine.New(c)
	require.NoError(t, err)
	t.Cleanup(e.Close)
	p, err := e.AddPort("guest", d)
	require.NoError(t, err)
	e.SetStages(p, stage(p))
	d.SetWatcher(e.Worker(0))
	e.AddQueue(p, d, 0)
	t.Cleanup(func() { e.RemovePort(p) })
	return e
}

// echo sends everything back.
type echo frame.PortID

func (s echo) Process(b *frame.Batch) {
	for i := range b.Len() {
		b.Frame(i).Out = frame.PortID(s)
	}
}

// A worker that sleeps wakes up for each frame, for connections, and for the
// room in a socket that it had filled.
func TestWorkerWakes(t *testing.T) {
	for _, poll := range []engine.PollMode{engine.PollNever, engine.PollAdaptive, engine.PollAlways} {
		t.Run(fmt.Sprint(poll), func(t *testing.T) {
			noLeak(t)
			d := newDevice(t, Config{})
			start(t, d, engine.Config{Poll: poll}, func(p frame.PortID) engine.Stage { return echo(p) })
			for i := range 3 {
				q := connect(t, d)
				for j := range 50 {
					f := testFrame(60+j, byte(i))
					q.send(f)
					require.Equal(t, f, q.read())
				}
				q.c.Close()
				enginetest.Eventually(t, 10*time.Second, func() bool { return !d.Status().Connected })
			}
			// What the peer reads late is whole, up to the last frame that was taken.
			q := connect(t, d)
			sent := 0
			enginetest.Eventually(t, 10*time.Second, func() bool {
				q.send(testFrame(9000, 9))
				sent++
				return d.Status().Drops["no_buffer"] > 0
			})
			var took int
			enginetest.Eventually(t, 10*time.Second, func() bool {
				st := d.Status()
				took = int(st.RxFrames) - 150
				return took+int(st.Drops["no_buffer"]) == sent
			})
			require.Greater(t, took, 10)
			for range took {
				require.Equal(t, testFrame(9000, 9), q.read())
			}
		})
	}
}

// A batch is pulled without allocating anything.
func TestAllocsPull(t *testing.T) {
	d := newDevice(t, Config{MTU: 1500})
	q := connect(t, d)
	some := bytes.Repeat(slices.Concat(framed(testFrame(1514, 1)), framed(testFrame(60, 2))), 8)
	raw, err := q.c.SyscallConn()
	require.NoError(t, err)
	var b frame.Batch
	require.NoError(t, raw.Control(func(fd uintptr) {
		allocs := testing.AllocsPerRun(200, func() {
			if n, err := unix.Write(int(fd), some); n != len(some) || err != nil {
				panic("not written")
			}
			b.Reset(0)
			if d.Pull(&b) != 16 {
				panic("not pulled")
			}
			d.Release(&b)
			b.Reset(0)
			if d.Pull(&b) != 0 || d.Arm() {
				panic("more than was sent")
			}
			d.Disarm()
		})
		assert.Zero(t, allocs)
	}))
}

func BenchmarkPull(b *testing.B) {
	for _, size := range []int{60, 1514} {
		b.Run(fmt.Sprint(size), func(b *testing.B) {
			d := newDevice(b, Config{})
			q := connect(b, d)
			one := framed(testFrame(size, 1))
			some := bytes.Repeat(one, 64)
			raw, err := q.c.SyscallConn()
			require.NoError(b, err)
			var batch frame.Batch
			b.SetBytes(int64(size))
			require.NoError(b, raw.Control(func(fd uintptr) {
				for i := 0; i < b.N; i += 64 {
					b.StopTimer()
					_, _ = unix.Write(int(fd), some)
					b.StartTimer()
					batch.Reset(0)
					if d.Pull(&batch) != 64 {
						b.Fatal("not pulled")
					}
					d.Release(&batch)
				}
			}))
		})
	}
}
