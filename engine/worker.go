package engine

import (
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Worker is one goroutine locked to its OS thread that serves queues: it pulls
// a batch, lets the stages decide, pushes, releases, and starts again. When
// nothing comes it spins for a while and sleeps in its epoll set.
//
// Watch, Unwatch and Wake are safe for concurrent use; the rest is the
// worker's own.
type Worker struct {
	// epoch is odd during a turn and even between turns and while asleep. It
	// is what Barrier waits on. Its store before the loads of a turn and the
	// control plane's store before its load of epoch are both sequentially
	// consistent, so one of the two sees the other.
	epoch atomic.Uint64
	stop  atomic.Bool

	e      *Engine
	id     int
	cpu    int // -1 leaves the choice to the kernel
	epfd   int
	wakefd int
	sleep  sleeper

	wakeups atomic.Uint64 // returns from epoll_wait
	turns   atomic.Uint64 // turns that found something
	busy    atomic.Uint64 // nanoseconds that these took

	waiting bool // some queue wants to be asked again soon
	// What the last turn found frames of: the first such port, and whether there
	// were others.
	first   frame.PortID
	others  bool
	touched []frame.PortID
	batch   frame.Batch

	// Whether the worker has slept since the last turn, and what it was told
	// then: see Told.
	slept bool
	told  []unix.EpollEvent
	evs   [16]unix.EpollEvent
}

func newWorker(e *Engine, id, cpu int, poll PollMode, spin time.Duration) (*Worker, error) {
	w := &Worker{e: e, id: id, cpu: cpu, epfd: -1, wakefd: -1, touched: make([]frame.PortID, 0, frame.BatchMax)}
	w.sleep = sleeper{mode: poll, limit: int64(spin)}
	w.batch.Worker = id
	var err error
	if w.epfd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	if w.wakefd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		w.closeFDs()
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	if err := w.Watch(w.wakefd); err != nil {
		w.closeFDs()
		return nil, err
	}
	return w, nil
}

// ID is the worker's number, from 0.
func (w *Worker) ID() int { return w.id }

// Watch lets readability of fd end the worker's sleep. It is edge-triggered:
// nobody has to read the descriptor for the worker to sleep again.
func (w *Worker) Watch(fd int) error {
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET, Fd: int32(fd)}
	if err := unix.EpollCtl(w.epfd, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		return fmt.Errorf("watch descriptor: %w", err)
	}
	return nil
}

// Unwatch undoes Watch. It must come before fd is closed.
func (w *Worker) Unwatch(fd int) {
	// It fails only for a descriptor that is not watched.
	_ = unix.EpollCtl(w.epfd, unix.EPOLL_CTL_DEL, fd, nil)
}

// Wake makes the worker look at all its queues soon.
func (w *Worker) Wake() {
	one := [8]byte{1}
	// It fails only when the counter is full, and then a wake-up is due anyway.
	_, _ = unix.Write(w.wakefd, one[:])
}

// Told says whether the worker has slept before this turn, and if so, whether a
// watched descriptor was among those that ended that. One that is readable and
// was not ends the next sleep. Only queues ask, in Disarm.
func (w *Worker) Told(fd int) (told, slept bool) {
	if !w.slept {
		return false, false
	}
	for i := range w.told {
		if w.told[i].Fd == int32(fd) {
			return true, true
		}
	}
	return false, true
}

// passBoundary returns when a turn that is under way has ended.
func (w *Worker) passBoundary() {
	e := w.epoch.Load()
	for i := 0; e&1 == 1 && w.epoch.Load() == e; i++ {
		if i < 100 {
			runtime.Gosched()
		} else {
			time.Sleep(20 * time.Microsecond)
		}
	}
}

func (w *Worker) run() {
	runtime.LockOSThread()
	defer w.e.done.Done()
	// A nap is to last as long as it says. It fails on no kernel that we run on,
	// and if it did, naps would be 50 us longer.
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	if w.cpu >= 0 {
		var set unix.CPUSet
		set.Set(w.cpu)
		if err := unix.SchedSetaffinity(0, &set); err != nil {
			w.e.log.Warn("worker not pinned", "worker", w.id, "cpu", w.cpu, "err", err)
		}
	}
	now := Now()
	for !w.stop.Load() {
		if n := w.turn(now); n > 0 {
			w.sleep.worked(now)
			w.sleep.stream.saw(w.first, w.others, n)
			// One reading of the clock ends this turn and begins the next.
			end := Now()
			w.turns.Store(w.turns.Load() + 1)
			w.busy.Store(w.busy.Load() + uint64(end-now))
			now = end
			continue
		}
		now = Now()
		if w.waiting {
			w.waiting = false
			continue
		}
		if w.sleep.spinning(now) {
			w.sleep.yield()
			continue
		}
		if d := w.sleep.stream.nap(w.sleep.mode); d > 0 {
			nanosleep(d)
			w.sleep.budget = 0 // a nap takes the place of spinning
			now = Now()
			continue
		}
		w.slept = false
		if w.arm() {
			w.disarm()
			continue
		}
		w.wait()
		w.disarm()
		now = Now()
	}
}

// turn serves each queue once and returns the number of frames it found.
func (w *Worker) turn(now int64) (n int) {
	w.epoch.Add(1)
	defer w.epoch.Add(1)
	l := w.e.layout.Load()
	v := l.views[w.id]
	w.first, w.others = frame.Drop, false
	for i := range v.queues {
		q := &v.queues[i]
		k := w.serve(l, v, q, now)
		if k == 0 {
			continue
		}
		n += k
		if w.first == frame.Drop {
			w.first = q.in.id
		} else if w.first != q.in.id {
			w.others = true
		}
	}
	return n
}

// serve takes one batch from a queue to where it goes. This is the life of
// every frame.
func (w *Worker) serve(l *layout, v *view, qe *queueEntry, now int64) (n int) {
	defer w.rescue(l, v, qe)
	b := &w.batch
	b.Reset(now)
	in := qe.in
	b.In = in.id
	if n = qe.q.Pull(b); n == 0 {
		if b.Waiting {
			w.waiting = true
		}
		return 0
	}
	for _, s := range in.stages {
		s.Process(b)
	}
	w.push(l, v, b)
	w.count(l, in, b, n)
	qe.q.Release(b)
	return n
}

// push groups the batch by egress port, keeping the order within each, and
// gives every port its group.
func (w *Worker) push(l *layout, v *view, b *frame.Batch) {
	// Frames for one port mostly follow each other.
	var list *[]*frame.Frame
	last := frame.Drop
	for i := range b.Len() {
		f := b.Frame(i)
		if f.Out == frame.Drop || f.Out == frame.Consumed {
			continue
		}
		if f.Out != last {
			if int(f.Out) >= len(l.ports) || l.ports[f.Out] == nil {
				f.Drop(frame.PortGone)
				continue
			}
			last, list = f.Out, &v.lists[f.Out]
			if len(*list) == 0 {
				w.touched = append(w.touched, f.Out)
			}
		}
		*list = append(*list, f)
	}
	for _, id := range w.touched {
		l.ports[id].port.Push(w.id, v.lists[id])
		v.lists[id] = v.lists[id][:0]
	}
	w.touched = w.touched[:0]
}

// rescue ends a turn that touched memory which its owner took away. The port
// whose memory it was stops itself; the lender of the batch gets it back.
func (w *Worker) rescue(l *layout, v *view, qe *queueEntry) {
	r := recover()
	if r == nil {
		return
	}
	if !w.blame(l, r) {
		panic(r)
	}
	for i := range v.lists {
		v.lists[i] = v.lists[i][:0]
	}
	w.touched = w.touched[:0]
	defer func() {
		// The lender may be the one whose memory is gone.
		if r := recover(); r != nil && !w.blame(l, r) {
			panic(r)
		}
	}()
	qe.q.Release(&w.batch)
}

// Faulter is a port that lends memory which a peer may take away.
type Faulter interface {
	// Fault is told that an access to addr failed. If the address is the
	// port's, it stops what uses it and returns true.
	Fault(addr uintptr) bool
}

// blame finds the port whose memory the recovered fault was in.
func (w *Worker) blame(l *layout, r any) bool {
	addr, ok := frame.FaultAddr(r)
	if !ok {
		return false
	}
	for _, pe := range l.ports {
		if pe == nil {
			continue
		}
		if f, ok := pe.port.(Faulter); ok && f.Fault(addr) {
			return true
		}
	}
	return false
}

// arm asks every queue for a wake-up and reports whether one has work already.
func (w *Worker) arm() (more bool) {
	w.epoch.Add(1)
	defer w.epoch.Add(1)
	l := w.e.layout.Load()
	for _, qe := range l.views[w.id].queues {
		more = w.armOne(l, qe.q) || more
	}
	return more
}

func (w *Worker) armOne(l *layout, q Queue) (more bool) {
	defer func() {
		if r := recover(); r != nil && !w.blame(l, r) {
			panic(r)
		}
	}()
	return q.Arm()
}

func (w *Worker) disarm() {
	w.epoch.Add(1)
	defer w.epoch.Add(1)
	l := w.e.layout.Load()
	for _, qe := range l.views[w.id].queues {
		w.disarmOne(l, qe.q)
	}
}

func (w *Worker) disarmOne(l *layout, q Queue) {
	defer func() {
		if r := recover(); r != nil && !w.blame(l, r) {
			panic(r)
		}
	}()
	q.Disarm()
}

// wait sleeps until a watched descriptor becomes readable.
func (w *Worker) wait() {
	before := Now()
	if w.sleep.light() {
		if n, errno := epollNap(w.epfd, w.evs[:]); n > 0 || errno != 0 {
			w.told, w.slept = w.evs[:max(n, 0)], true
			w.woke(before)
			return
		}
	}
	// unix.EpollWait enters the kernel through Syscall6, so the runtime can
	// hand this worker's P to others and collect garbage meanwhile.
	n, err := unix.EpollWait(w.epfd, w.evs[:], -1)
	w.told, w.slept = w.evs[:max(n, 0)], true
	if err != nil && err != unix.EINTR {
		w.e.log.Error("worker cannot sleep", "worker", w.id, "err", err)
		time.Sleep(time.Millisecond)
	}
	w.woke(before)
}

// woke notes the end of a sleep.
func (w *Worker) woke(before int64) {
	w.wakeups.Store(w.wakeups.Load() + 1)
	w.sleep.slept(before, Now())
}

func (w *Worker) closeFDs() {
	for _, fd := range []int{w.epfd, w.wakefd} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}
