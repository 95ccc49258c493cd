package vhosttest

import (
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Counters of a TapGuest or TapPair, both directions. For a guest, tx is what
// it sends; for a pair, what goes from the first tap to the second.
type Counters struct {
	TxFrames, TxBytes, TxDropped uint64
	RxFrames, RxBytes, RxDropped uint64
}

func (c *Counters) add(o Counters) {
	c.TxFrames += o.TxFrames
	c.TxBytes += o.TxBytes
	c.TxDropped += o.TxDropped
	c.RxFrames += o.RxFrames
	c.RxBytes += o.RxBytes
	c.RxDropped += o.RxDropped
}

// mover is what a loop turns.
type mover interface {
	// move carries what there is, up to a budget, and reports whether it
	// carried anything.
	move() (busy bool, err error)
	// arm asks for wake-ups and reports whether there is something already.
	arm() (more bool)
	// counters are those of this mover, for its own goroutine.
	counters() Counters
}

// loop is a goroutine on a thread of its own that turns a mover until it is
// stopped. It sleeps in an edge-triggered epoll.
type loop struct {
	m      mover
	ep     int
	stopFd int
	stop   atomic.Bool
	done   chan struct{}
	err    error         // valid once done is closed
	slept  time.Duration // the last time

	mu        sync.Mutex // guards published
	published Counters
}

// startLoop starts a loop that wakes up for the descriptors.
func startLoop(m mover, fds ...int) (*loop, error) {
	l := &loop{m: m, ep: -1, stopFd: -1, done: make(chan struct{})}
	var err error
	if l.ep, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err == nil {
		l.stopFd, err = newEventfd()
	}
	for _, fd := range append(fds, l.stopFd) {
		if err == nil {
			ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLET&0xffffffff, Fd: int32(fd)}
			if err = unix.EpollCtl(l.ep, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
				err = fmt.Errorf("epoll: %w", err)
			}
		}
	}
	if err != nil {
		closeFds([]int{l.ep, l.stopFd})
		return nil, err
	}
	go l.run()
	return l, nil
}

// publishEvery is how many turns pass between updates of the counters that
// others see, while the loop does not sleep.
const publishEvery = 256

func (l *loop) run() {
	defer close(l.done)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	events := make([]unix.EpollEvent, 8)
	for turn := 0; !l.stop.Load(); turn++ {
		busy, err := l.m.move()
		if err != nil {
			l.err = err
			break
		}
		if turn%publishEvery == 0 {
			l.publish()
		}
		if busy || l.m.arm() {
			continue
		}
		l.publish()
		if err := l.sleep(events); err != nil && err != unix.EINTR {
			l.err = err
			break
		}
	}
	l.publish()
}

// sleep waits until something happens. While sleeps are short, Go's scheduler
// is not told.
func (l *loop) sleep(events []unix.EpollEvent) error {
	from := time.Now()
	defer func() { l.slept = time.Since(from) }()
	if l.slept < napMax {
		if n, err := epollNap(l.ep, events); n > 0 || err != nil {
			return err
		}
	}
	_, err := unix.EpollWait(l.ep, events, -1)
	return err
}

func (l *loop) publish() {
	c := l.m.counters()
	l.mu.Lock()
	l.published = c
	l.mu.Unlock()
}

func (l *loop) stats() Counters {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.published
}

// halt ends the loop and waits for it.
func (l *loop) halt() error {
	l.stop.Store(true)
	signal(l.stopFd)
	<-l.done
	closeFds([]int{l.ep, l.stopFd})
	return l.err
}

// haltAll ends loops and returns the first of their errors.
func haltAll(ls []*loop) (err error) {
	for _, l := range ls {
		if lerr := l.halt(); err == nil {
			err = lerr
		}
	}
	return err
}

// dropped says whether a write to a tap failed for that frame only: a bad
// header, a link that is down, no memory.
func dropped(err error) bool {
	switch err {
	case unix.EINVAL, unix.EIO, unix.ENOBUFS, unix.ENOMEM, unix.EMSGSIZE, unix.EFAULT, unix.E2BIG, unix.EPERM:
		return true
	}
	return false
}
