package vhostuser

import (
	"fmt"
	"os"
	"strconv"

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

// signal adds one to an event counter. One that is full is as good as signalled.
func signal(fd int) {
	one := [8]byte{1}
	_, _ = unix.Write(fd, one[:])
}
