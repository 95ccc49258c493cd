package engine

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// source is a queue that brings the frames that it was told to.
type source struct {
	left     atomic.Int64
	out      frame.PortID
	panics   atomic.Pointer[error]
	released atomic.Int64
}

func (s *source) Pull(b *frame.Batch) int {
	if e := s.panics.Swap(nil); e != nil {
		panic(*e)
	}
	n := 0
	for s.left.Load() > 0 {
		f := b.Next()
		if f == nil {
			break
		}
		f.HeadLen, f.Len = 60, 60
		s.left.Add(-1)
		n++
	}
	return n
}

func (s *source) Release(*frame.Batch) { s.released.Add(1) }
func (s *source) Arm() bool            { return s.left.Load() > 0 }
func (s *source) Disarm()              {}

// to is a stage that sends everything to one port.
type to frame.PortID

func (t to) Process(b *frame.Batch) {
	for i := range b.Len() {
		b.Frame(i).Out = frame.PortID(t)
	}
}

// sink is a port that counts, and refuses every frame when told to.
type sink struct {
	mu     sync.Mutex
	frames int
	refuse bool
	fault  uintptr
	hit    atomic.Bool
}

func (s *sink) Push(_ int, fs []*frame.Frame) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range fs {
		if s.refuse {
			f.Drop(frame.NoBuffer)
			continue
		}
		s.frames++
	}
}

func (s *sink) Fault(addr uintptr) bool {
	if s.fault == 0 || addr != s.fault {
		return false
	}
	s.hit.Store(true)
	return true
}

func (s *sink) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.frames
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); !f(); {
		if time.Now().After(end) {
			t.Fatalf("not reached: %s", what)
		}
		time.Sleep(time.Millisecond)
	}
}

func newEngine(t *testing.T, c Config) *Engine {
	t.Helper()
	e, err := New(c)
	require.NoError(t, err)
	t.Cleanup(e.Close)
	return e
}

func statsOf(e *Engine, id frame.PortID) PortStats {
	for _, s := range e.PortStats() {
		if s.ID == id {
			return s
		}
	}
	return PortStats{}
}

func TestFramesGoWhereTheStageSays(t *testing.T) {
	for _, mode := range []PollMode{PollAdaptive, PollAlways, PollNever} {
		e := newEngine(t, Config{Workers: 2, Poll: mode})
		dst := &sink{}
		out, err := e.AddPort("out", dst)
		require.NoError(t, err)
		in, err := e.AddPort("in", &sink{}, to(out))
		require.NoError(t, err)
		qs := []*source{{}, {}}
		for i, q := range qs {
			e.AddQueue(in, q, i)
		}
		for i, q := range qs {
			q.left.Store(1000)
			e.Worker(i).Wake()
		}
		eventually(t, "2000 frames", func() bool { return dst.count() == 2000 })
		eventually(t, "counted", func() bool { return statsOf(e, in).InFrames == 2000 })
		eventually(t, "counted out", func() bool { return statsOf(e, out).OutFrames == 2000 })
		assert.EqualValues(t, 2000*60, statsOf(e, out).OutBytes)
		assert.NotZero(t, qs[0].released.Load())
	}
}

func TestLostFramesAreCountedByReason(t *testing.T) {
	e := newEngine(t, Config{Workers: 1})
	full, err := e.AddPort("full", &sink{refuse: true})
	require.NoError(t, err)
	for _, c := range []struct {
		name string
		out  frame.PortID
		want frame.DropReason
	}{
		{"refused", full, frame.NoBuffer},
		{"no such port", 999, frame.PortGone},
		{"unclaimed", frame.Drop, frame.ReasonNone},
	} {
		in, err := e.AddPort(c.name, &sink{}, to(c.out))
		require.NoError(t, err)
		q := &source{}
		q.left.Store(3)
		e.AddQueue(in, q, 0)
		eventually(t, c.name, func() bool { return statsOf(e, in).Drops[c.want.String()] == 3 })
	}
	assert.Zero(t, statsOf(e, full).OutFrames)
}

func TestRemovePortEndsItsUse(t *testing.T) {
	e := newEngine(t, Config{Workers: 1, Poll: PollAlways})
	dst := &sink{}
	out, _ := e.AddPort("out", dst)
	in, _ := e.AddPort("in", &sink{}, to(out))
	q := &source{}
	q.left.Store(1 << 40)
	e.AddQueue(in, q, 0)
	eventually(t, "running", func() bool { return dst.count() > 0 })
	e.RemovePort(in)
	n := dst.count()
	e.Barrier()
	e.Barrier()
	assert.Equal(t, n, dst.count(), "frames after the port was removed")
}

// A worker that sleeps is past every boundary; one in a turn is not.
func TestBarrierWaitsForTheTurn(t *testing.T) {
	e := newEngine(t, Config{Workers: 1})
	enter, leave := make(chan struct{}), make(chan struct{})
	in, _ := e.AddPort("in", &sink{}, stageFunc(func(*frame.Batch) { close(enter); <-leave }))
	e.Barrier() // asleep: returns
	q := &source{}
	q.left.Store(1)
	e.AddQueue(in, q, 0)
	<-enter
	passed := make(chan struct{})
	go func() { e.Barrier(); close(passed) }()
	select {
	case <-passed:
		t.Fatal("barrier passed during a turn")
	case <-time.After(20 * time.Millisecond):
	}
	close(leave)
	select {
	case <-passed:
	case <-time.After(5 * time.Second):
		t.Fatal("barrier hangs")
	}
}

type stageFunc func(*frame.Batch)

func (f stageFunc) Process(b *frame.Batch) { f(b) }

type memFault struct {
	error
	addr uintptr
}

func (m memFault) Addr() uintptr { return m.addr }

// H030: a fault in lent memory stops the port whose memory it was; the worker
// goes on for the others.
func TestFaultIsThePortsOwn_H030(t *testing.T) {
	e := newEngine(t, Config{Workers: 1})
	guilty, dst := &sink{fault: 0x1000}, &sink{}
	out, _ := e.AddPort("out", dst)
	in, _ := e.AddPort("guilty", guilty, to(out))
	q := &source{}
	e.AddQueue(in, q, 0)
	var fault error = memFault{errors.New("fault"), 0x1000}
	q.panics.Store(&fault)
	e.Worker(0).Wake()
	eventually(t, "blamed", guilty.hit.Load)
	q.left.Store(5)
	e.Worker(0).Wake()
	eventually(t, "worker lives", func() bool { return dst.count() == 5 })
}

func TestIdleWorkerSleeps(t *testing.T) {
	e := newEngine(t, Config{Workers: 1})
	in, _ := e.AddPort("in", &sink{})
	e.AddQueue(in, &source{}, 0)
	w := e.Worker(0)
	last, since := uint64(0), time.Now()
	// The first sleep without work is a short one, which ends by itself.
	eventually(t, "settled", func() bool {
		if n := w.wakeups.Load(); n != last {
			last, since = n, time.Now()
		}
		return last > 0 && time.Since(since) > 50*time.Millisecond
	})
	time.Sleep(100 * time.Millisecond) // the span observed, not a wait for something
	assert.Equal(t, last, w.wakeups.Load(), "wake-ups while idle")
}

func TestWatchedDescriptorWakes(t *testing.T) {
	e := newEngine(t, Config{Workers: 1, Poll: PollNever})
	dst := &sink{}
	out, _ := e.AddPort("out", dst)
	in, _ := e.AddPort("in", &sink{}, to(out))
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	require.NoError(t, err)
	defer unix.Close(fd)
	q := &source{}
	require.NoError(t, e.Worker(0).Watch(fd))
	e.AddQueue(in, q, 0)
	for i := 1; i <= 3; i++ { // edge-triggered: no read in between
		q.left.Store(1)
		_, err = unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		require.NoError(t, err)
		eventually(t, "woken", func() bool { return dst.count() == i })
	}
	e.Worker(0).Unwatch(fd)
}

func TestAllocsPerBatch(t *testing.T) {
	e := newEngine(t, Config{Workers: 1})
	dst := &sink{}
	out, _ := e.AddPort("out", dst)
	in, _ := e.AddPort("in", &sink{}, to(out))
	q := &source{}
	w, err := newWorker(e, 0, -1, PollAlways, 0) // one that the test itself drives
	require.NoError(t, err)
	defer w.closeFDs()
	v := &view{queues: []queueEntry{{q, e.layout.Load().ports[in]}}}
	for range e.layout.Load().ports {
		v.lists = append(v.lists, make([]*frame.Frame, 0, frame.BatchMax))
	}
	assert.Zero(t, testing.AllocsPerRun(100, func() {
		q.left.Store(frame.BatchSize)
		if w.serve(e.layout.Load(), v, &v.queues[0], 1) != frame.BatchSize {
			t.Fatal("short batch")
		}
	}))
}

func BenchmarkServe(b *testing.B) {
	e, err := New(Config{Workers: 1})
	require.NoError(b, err)
	defer e.Close()
	out, _ := e.AddPort("out", &sink{})
	in, _ := e.AddPort("in", &sink{}, to(out))
	q := &source{}
	w, err := newWorker(e, 0, -1, PollAlways, 0)
	require.NoError(b, err)
	defer w.closeFDs()
	l := e.layout.Load()
	v := &view{queues: []queueEntry{{q, l.ports[in]}}}
	for range l.ports {
		v.lists = append(v.lists, make([]*frame.Frame, 0, frame.BatchMax))
	}
	b.ReportAllocs()
	for i := 0; i < b.N; i += frame.BatchSize {
		q.left.Store(frame.BatchSize)
		w.serve(l, v, &v.queues[0], 1)
	}
}
