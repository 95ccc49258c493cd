package vhostuser

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Interrupts that block.
//
// A write to an event counter that is full waits for its reader, and the one
// who writes is a worker, which serves others too. O_NONBLOCK forbids the wait,
// so it is set on every counter that comes; QEMU's have it already. But it is a
// flag of the open file, which the frontend shares. A frontend that means harm
// may clear it again, fill the counter, and so stop a worker within write.
// Nothing keeps it from that: pwritev2 with RWF_NOWAIT is not for event
// counters (EOPNOTSUPP, Linux 6.18), and to ask poll beforehand, or to set the
// flag each time, is a race that the frontend wins when it likes.
//
// So it is undone: whoever holds the counter can read it, which empties it and
// frees all who wait. A timer that runs only while interrupts are sent finds a
// write that makes no progress on a full counter, has it freed, and ends the
// connection of that frontend. A counter that was replaced while somebody wrote
// to it is looked at in the same way, whatever came of others since. What
// remains is that a hostile frontend can halt a worker for up to two stallTicks
// each time it connects.

// stallTick is how often interrupts are looked after while some are sent.
const stallTick = 500 * time.Millisecond

// maxOld bounds how often a counter can be replaced while somebody writes to
// it.
const maxOld = 8

// callFD is an event counter that we signal: where a ring's interrupts go, or
// its errors. Its descriptor's number stays the same while workers use it, and
// set puts another file behind the number: so nobody has to wait for a worker,
// and no worker writes to a number that was closed and given to somebody else.
type callFD struct {
	fd           atomic.Int32  // what workers signal, -1 while there is none
	begun, ended atomic.Uint64 // signals
	watched      atomic.Bool   // the timer runs
	freeing      atomic.Bool
	stalls       atomic.Uint64

	// stalled is told of a stall, on a goroutine of its own, and which session
	// brought the counter.
	stalled func(session uint64)
	every   time.Duration
	timer   *time.Timer
	// What the timer saw at its last tick.
	seenBegun, seenEnded uint64
	seenOld              bool

	mu  sync.Mutex // guards all below; workers never take it
	by  uint64     // number of the session that brought the counter
	num int        // the number, -1 before the first set
	old []int      // counters that were replaced while somebody wrote to them
}

func (c *callFD) init(stalled func(session uint64)) {
	c.num, c.stalled, c.every = -1, stalled, stallTick
	c.fd.Store(-1)
	c.timer = time.AfterFunc(time.Hour, c.tick)
	c.timer.Stop()
}

// set takes fd over, which the session of that number brought.
func (c *callFD) set(fd int, by uint64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.by = by
	if err := c.replace(fd); err != nil {
		closeFD(fd)
		return fmt.Errorf("replace event descriptor: %w", err)
	}
	c.fd.Store(int32(c.num))
	return nil
}

func (c *callFD) replace(fd int) error {
	if err := unix.SetNonblock(fd, true); err != nil {
		return err
	}
	if c.num < 0 {
		c.num = fd
		return nil
	}
	if len(c.old) == maxOld {
		return unix.EBUSY
	}
	old, err := duplicate(c.num)
	if err != nil {
		return err
	}
	if err := unix.Dup3(fd, c.num, unix.O_CLOEXEC); err != nil {
		closeFD(old)
		return err
	}
	closeFD(fd)
	if c.begun.Load() == c.ended.Load() {
		closeFD(old)
	} else {
		c.old = append(c.old, old) // the write may be to this one
	}
	return nil
}

func duplicate(fd int) (int, error) { return unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0) }

// clear stops signals; the number stays taken until close.
func (c *callFD) clear() { c.fd.Store(-1) }

// close gives the number back. No worker may use the ring any more.
func (c *callFD) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fd.Store(-1)
	closeFD(c.num)
	c.num = -1
	c.closeOld()
}

func (c *callFD) closeOld() {
	for _, fd := range c.old {
		closeFD(fd)
	}
	c.old = nil
}

// signal sends an interrupt, if somebody listens.
func (c *callFD) signal() {
	fd := c.fd.Load()
	if fd < 0 {
		return
	}
	c.begun.Add(1)
	if !c.watched.Load() {
		c.watch()
	}
	signal(int(fd))
	c.ended.Add(1)
}

// watch starts the timer if it does not run.
func (c *callFD) watch() {
	if c.watched.CompareAndSwap(false, true) {
		c.timer.Reset(c.every)
	}
}

// tick looks for a signal that was under way at the last tick already. It
// stops ticking when no signal came since then.
func (c *callFD) tick() {
	ended := c.ended.Load() // first, so that it is not the greater
	begun := c.begun.Load()
	quiet := begun == ended && begun == c.seenBegun
	c.mu.Lock()
	old := len(c.old) > 0
	c.mu.Unlock()
	stuck := c.seenBegun > c.seenEnded && ended == c.seenEnded || old && c.seenOld
	c.seenBegun, c.seenEnded, c.seenOld = begun, ended, old
	if stuck {
		c.free(ended)
	}
	if quiet {
		c.mu.Lock()
		c.closeOld()
		c.mu.Unlock()
		// signal counts first and then looks for the timer, this is the other
		// way round: one of the two sees the other.
		c.watched.Store(false)
		if c.begun.Load() != begun {
			c.watch()
		}
		return
	}
	c.timer.Reset(c.every)
}

// free empties the counters that a signal may wait for until it ends. It goes
// on beside the timer: a read from an empty counter may block in its turn, but
// then nobody waits to write.
func (c *callFD) free(ended uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var fds []int
	for _, fd := range append([]int{c.num}, c.old...) {
		if fd >= 0 && !writable(fd) {
			if fd, err := duplicate(fd); err == nil {
				fds = append(fds, fd)
			}
		}
	}
	if len(fds) == 0 || !c.freeing.CompareAndSwap(false, true) {
		for _, fd := range fds {
			closeFD(fd)
		}
		return // it is only slow, or being freed
	}
	by := c.by
	go func() {
		for c.ended.Load() == ended {
			for _, fd := range fds {
				_ = unix.SetNonblock(fd, true)
				var b [8]byte
				_, _ = unix.Read(fd, b[:])
			}
			time.Sleep(time.Millisecond)
		}
		for _, fd := range fds {
			closeFD(fd)
		}
		c.stalls.Add(1)
		c.stalled(by)
		c.freeing.Store(false)
	}()
}

func writable(fd int) bool {
	p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	n, err := unix.Poll(p[:], 0)
	return err != nil || n > 0 && p[0].Revents&unix.POLLOUT != 0
}
