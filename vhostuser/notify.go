package vhostuser

import (
	"fmt"
	"os"
	"strconv"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// closeFD closes a descriptor that is ours; -1 is none.
func closeFD(fd int) {
	if fd >= 0 {
		_ = unix.Close(fd)
	}
}

// checkEventFD refuses descriptors that are not event counters: a file or
// /dev/zero is always readable, a socket can close, an epoll set can contain
// ours (H011).
func checkEventFD(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	if st.Mode&unix.S_IFMT != 0 {
		return fmt.Errorf("%w: not an eventfd but a file of mode %#o", ErrRefused, st.Mode)
	}
	// All anonymous inodes look alike to fstat. Where /proc is not mounted
	// the frontend is believed.
	link, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err == nil && link != "anon_inode:[eventfd]" {
		return fmt.Errorf("%w: not an eventfd but %s", ErrRefused, link)
	}
	return nil
}

// signal adds one to an event counter. It does not block on a counter that is
// full: then the other side has a signal waiting already. O_NONBLOCK would act
// on the description that the other side shares, hence the look beforehand.
func signal(fd int) {
	p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
	if n, err := unix.Poll(p[:], 0); err != nil || n == 0 || p[0].Revents&unix.POLLOUT == 0 {
		return
	}
	one := [8]byte{1}
	_, _ = unix.Write(fd, one[:])
}

// callFD is where a ring's interrupts go. Its descriptor's number stays the
// same while workers use it, and set puts another file behind the number: so
// nobody has to wait for a worker, and no worker writes to a number that was
// closed and given to somebody else.
type callFD struct {
	fd  atomic.Int32 // what workers signal, -1 while there is none
	num int          // the number, -1 before the first set; control's own
}

func (c *callFD) init() {
	c.num = -1
	c.fd.Store(-1)
}

// set takes fd over.
func (c *callFD) set(fd int) error {
	if c.num < 0 {
		c.num = fd
	} else {
		err := unix.Dup3(fd, c.num, unix.O_CLOEXEC)
		closeFD(fd)
		if err != nil {
			return fmt.Errorf("replace call descriptor: %w", err)
		}
	}
	c.fd.Store(int32(c.num))
	return nil
}

// clear stops signals; the number stays taken until close.
func (c *callFD) clear() { c.fd.Store(-1) }

// close gives the number back. No worker may use the ring any more.
func (c *callFD) close() {
	c.fd.Store(-1)
	closeFD(c.num)
	c.num = -1
}

// signal sends an interrupt, if somebody listens.
func (c *callFD) signal() {
	if fd := c.fd.Load(); fd >= 0 {
		signal(int(fd))
	}
}
