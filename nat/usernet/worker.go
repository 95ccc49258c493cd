package usernet

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

const (
	// batchBytes is how much TCP makes a batch: the guest works on one while the
	// next one is received.
	batchBytes = 256 << 10
	// lookEvery is how long, in nanoseconds, a worker that has things to bring to
	// the guest does not ask for more.
	lookEvery = 50_000
	// eventsMax is how many sockets one look at the epoll set tells of.
	eventsMax = 64
	iovMax    = 1024 // UIO_MAXIOV
)

// What an event's 64 bits say: a kind, and a flow's place and generation.
const (
	eventFlow = iota
	eventListener
	eventTimer
)

func eventData(kind int, i int32, gen uint32) (fd, pad int32) {
	return int32(gen), int32(kind)<<28 | i&(1<<28-1)
}

// worker is what one of the engine's workers has of a Net.
type worker struct {
	net *Net
	id  int

	mu    sync.Mutex // see the package's comment; guards all below
	now   int64      // the batch's
	tick  uint32
	table table
	wheel wheel
	epfd  int
	timer int    // a timerfd, in epfd
	alarm uint32 // when it goes off, in ticks; 0 if it does not
	full  bool   // the last look at epfd may not have told everything
	// blocked says that all ready flows wait for buffers of the guest's.
	blocked bool
	looked  int64 // when events were asked for last
	// The worker has just slept, and what it was told then has not been taken;
	// it has had frames of the guest's since epfd was looked at; that was just
	// now.
	awoke, told, worked, justLooked bool
	brought                         int // bytes of TCP in this batch
	frags                           reassembler
	limits                          rateLimit
	stats                           Stats

	// Flows that may have something for the guest, in turn, and how many of the
	// line still do.
	line  line
	eager int
	kept  []int32 // see pump
	// Flows that the present batch touched, and what is to be told to the
	// guest of them at its end.
	touched []int32
	// Flows that are to follow their frames to another worker, and whether it is
	// another one that holds the lock.
	moving []flowRef
	guest  bool
	// What waits to be sent to one socket.
	out outgoing
	// Acknowledgements that may travel with data, and since when the oldest
	// waits.
	delayed   []flowRef
	ackSince  int64
	waiting   []flowRef // see tcp_turns.go
	waitTill  uint32    // in ticks
	answered  int
	fresh     uint32 // the window of a new socket, and when it was looked at
	freshAt   uint32
	elsewhere []*frame.Frame // the worker's own, not guarded

	// Buffers reserved in this turn, and how many hold frames, by pair.
	rooms   []roomUse
	msg     unix.Msghdr
	iovs    [iovMax]unix.Iovec
	addr    sockAddr
	udp     udpScratch
	caught  flow // see toAnyPort
	evs     [eventsMax]unix.EpollEvent
	quoted  frame.Frame      // see unreachable
	scratch []byte           // see peekBehind
	marks   map[int32]uint32 // see seeUrgent
	queue   Queue
	six     *sixWorker // nil for IPv4
}

// flowRef names a flow, which may have ended meanwhile.
type flowRef struct {
	flow int32
	gen  uint32
}

// flowEvents are what a flow's socket tells of.
const flowEvents = unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLPRI | unix.EPOLLET

type roomUse struct {
	room  Room
	bufs  [][]byte
	used  int
	short bool // it had too few buffers, and flows wait for more
}

func newWorker(n *Net, id int) (*worker, error) {
	w := &worker{net: n, id: id, epfd: -1, timer: -1, out: outgoing{flow: none}}
	w.queue.w = w
	if n.six != nil {
		w.six = new(sixWorker)
	}
	w.table.init(n.conf.MaxFlows)
	w.wheel.init(&w.table, 0)
	for _, p := range n.conf.Pairs {
		r := roomUse{}
		if p.Worker == id {
			r.room = p.Room
		}
		w.rooms = append(w.rooms, r)
	}
	var err error
	if w.epfd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("epoll: %w", err)
	}
	if w.timer, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK); err != nil {
		w.close()
		return nil, fmt.Errorf("timer: %w", err)
	}
	if err = w.watch(int32(w.timer), unix.EPOLLIN|unix.EPOLLET, eventTimer, 0, 0); err != nil {
		w.close()
		return nil, fmt.Errorf("timer: %w", err)
	}
	return w, nil
}

// watch lets events of a descriptor be told, until it is closed.
func (w *worker) watch(fd int32, events uint32, kind int, i int32, gen uint32) error {
	ev := unix.EpollEvent{Events: events}
	ev.Fd, ev.Pad = eventData(kind, i, gen)
	if errno := epollAdd(w.epfd, fd, &ev); errno != 0 {
		return errno
	}
	return nil
}

func (w *worker) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range int32(w.table.used) {
		if f := w.table.at(i); f.state != stateFree {
			w.drop(i)
		}
	}
	for _, fd := range []int{w.epfd, w.timer} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
	w.epfd, w.timer = -1, -1
	w.udp.close()
}

// seenShift makes the units in which a flow's silence is measured of ticks:
// 1.07 s. They come round after 19 hours.
const seenShift = 8

// seen is the present in these units.
func (w *worker) seen() uint16 { return uint16(w.tick >> seenShift) }

// begin is called with the lock held before anything else is done in a batch.
func (w *worker) begin(b *frame.Batch) {
	w.now, w.tick = b.Now, uint32(b.Now>>tickShift)
	if w.six != nil {
		w.six.from = b.Len()
	}
	w.out = outgoing{flow: none} // a fault may have ended the batch before
	w.udp.begin(&w.table)
}

// finish does what is done once for all frames of a batch: data goes to the
// sockets, acknowledged bytes leave them, the guest is told of both.
func (w *worker) finish(b *frame.Batch) {
	w.flush(b)
	w.udpFlush(b)
	w.settle(b)
	w.dress(b)
}

// settle does what finish does, but for the data.
func (w *worker) settle(b *frame.Batch) {
	for k := 0; k < len(w.touched); k++ {
		i := w.touched[k]
		f := w.table.at(i)
		if f.place&inTouched == 0 {
			continue // it has ended since
		}
		f.place &^= inTouched
		w.tcpSettle(b, i)
	}
	w.touched = w.touched[:0]
}

// touch puts a flow among those that the batch has touched.
func (w *worker) touch(i int32) {
	if f := w.table.at(i); f.place&inTouched == 0 {
		f.place |= inTouched
		w.touched = append(w.touched, i)
	}
}

// drop ends a flow without another word to anybody.
func (w *worker) drop(i int32) {
	f := w.table.at(i)
	if f.fd >= 0 {
		closeFD(f.fd)
		w.net.sockets.give()
	}
	if f.flags&urgent != 0 && f.proto == frame.ProtoTCP {
		delete(w.marks, i)
	}
	w.wheel.stop(i)
	w.unready(i)
	w.stats.closed(f.proto)
	w.table.remove(i)
}

// Queue is the host's side of a Net for one worker: an engine.Queue.
type Queue struct {
	w       *worker
	watcher Watcher
}

// Watcher wakes the worker. See vhostuser.Watcher.
type Watcher interface {
	Watch(fd int) error
	Unwatch(fd int)
	Wake()
	// Told says whether the worker has slept, and whether a descriptor was among
	// those that ended that.
	Told(fd int) (told, slept bool)
}

// Queue returns what a worker serves of the host's side.
func (n *Net) Queue(worker int) *Queue { return &n.workers[worker].queue }

// SetWatcher tells the queue whom to wake. It is called before a worker uses
// the queue.
func (q *Queue) SetWatcher(w Watcher) error {
	q.watcher = w
	return w.Watch(q.w.epfd)
}

// Pull looks at the host's sockets and brings what they have for the guest. See
// engine.Queue.
func (q *Queue) Pull(b *frame.Batch) int {
	w := q.w
	if w.six != nil {
		w.net.sweep()
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.begin(b)
	w.turn()
	w.events(b)
	w.timers(b)
	w.pump(b)
	w.flush(b)
	w.udpFlush(b)
	w.settle(b)
	w.sendDelayed(b)
	w.dress(b)
	for i := range w.rooms {
		r := &w.rooms[i]
		if r.bufs != nil {
			r.room.Keep(r.used)
			r.bufs = nil
		}
	}
	return b.Len()
}

// timersAtOnce bounds the timers that one turn sees to: one may take a system
// call or two, and those of flows that were opened together go off together.
const timersAtOnce = 128

// timers sees to flows whose timers have gone off.
func (w *worker) timers(b *frame.Batch) {
	for n := 0; n < timersAtOnce && b.Len() < frame.BatchSize; n++ { // there is room for what they say
		i := w.wheel.due(w.tick)
		if i == none {
			return
		}
		w.expired(b, i)
	}
	w.full = true // there may be more
}

// Release implements engine.Queue.
func (q *Queue) Release(b *frame.Batch) {
	w := q.w
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range w.rooms {
		if r := &w.rooms[i]; r.used > 0 {
			r.room.Free()
			r.used = 0
		}
	}
	for i := range b.Len() {
		if f := b.Frame(i); f.Reason == frame.NoBuffer && f.Token > 0 && f.Proto == frame.ProtoTCP {
			w.notDelivered(f)
		}
	}
}

// wake has the queue's worker look at it.
func (q *Queue) wake() {
	if q.watcher != nil {
		q.watcher.Wake()
	}
}

// events takes what the epoll set tells.
func (w *worker) events(b *frame.Batch) {
	if w.eager > 0 && !w.blocked && w.now-w.looked < lookEvery {
		w.full = true // there is enough to do
		return
	}
	if w.awoke && !w.told {
		w.looked = w.now
	}
	w.awoke = false
	if w.six != nil && w.rests() {
		return
	}
	if (w.worked || w.justLooked) && !w.told && !w.full && w.now-w.looked < lookEvery {
		// What happens meanwhile ends the next sleep before it begins.
		w.worked, w.justLooked = false, w.worked && w.justLooked
		return
	}
	w.looked, w.worked, w.told, w.justLooked = w.now, false, false, true
	n := epollReady(w.epfd, w.evs[:])
	w.full = n == len(w.evs)
	if w.six != nil && n > 0 {
		w.six.active = w.now
	}
	for k := range w.evs[:n] {
		ev := &w.evs[k]
		i, gen := ev.Pad<<4>>4, uint32(ev.Fd)
		switch int(ev.Pad>>28) & 15 {
		case eventFlow:
			if int(i) >= w.table.used {
				continue
			}
			if f := w.table.at(i); f.state == stateFree || f.gen != gen {
				continue // of a socket that is closed
			}
			w.socketEvent(b, i, ev.Events)
		case eventListener:
			w.listenerEvent(b, i, gen)
		case eventTimer:
			w.alarm = 0
		}
	}
}

// socketEvent is told what became possible with a flow's socket.
func (w *worker) socketEvent(b *frame.Batch, i int32, events uint32) {
	switch w.table.at(i).proto {
	case frame.ProtoTCP:
		w.tcpEvent(b, i, events)
	case frame.ProtoUDP:
		w.udpEvent(i, events)
	default:
		w.echoEvent(i, events)
	}
}

// expired is called when a flow's timer has gone off.
func (w *worker) expired(b *frame.Batch, i int32) {
	switch w.table.at(i).proto {
	case frame.ProtoTCP:
		w.tcpTimer(b, i)
	default:
		w.mappingTimer(b, i)
	}
}

// Arm says whether there is work already, and otherwise has the worker woken
// when there is. See engine.Queue.
func (q *Queue) Arm() (more bool) {
	w := q.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.full || len(w.delayed) > 0 {
		w.ackSince = 0 // what waits goes with the next Pull
		return true
	}
	for i := range w.rooms {
		if r := &w.rooms[i]; r.short && r.room.Arm() {
			return true
		}
	}
	if w.eager > 0 && !w.blocked {
		return true
	}
	w.setAlarm()
	return false
}

// setAlarm has the worker woken when the next timer is due, if it would not be
// before.
func (w *worker) setAlarm() {
	next, ok := w.wheel.next()
	if len(w.waiting) > 0 && (!ok || int32(w.waitTill-next) < 0) {
		next, ok = w.waitTill, true
	}
	if !ok || w.alarm != 0 && int32(w.alarm-next) <= 0 {
		return
	}
	if setTimer(w.timer, int64(next)<<tickShift-w.now) == 0 {
		w.alarm = next
	}
}

// Disarm implements engine.Queue.
func (q *Queue) Disarm() {
	w := q.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if q.watcher == nil {
		w.told = true
	} else if told, slept := q.watcher.Told(w.epfd); slept {
		w.told = w.told || told
		w.awoke, w.justLooked = true, true // if it is not told, there is nothing
	}
	for i := range w.rooms {
		if r := &w.rooms[i]; r.short {
			r.short = false
			r.room.Disarm()
		}
	}
}
