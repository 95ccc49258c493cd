package vhosttest

import (
	"encoding/binary"
	"errors"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// word returns the aligned 32-bit word at off, for atomic access. Rings are
// little endian and so are the machines that this is for.
func word(b []byte, off int) *atomic.Uint32 {
	p := unsafe.Pointer(&b[off : off+4][0])
	if uintptr(p)&3 != 0 {
		panic("vhosttest: ring word is not aligned")
	}
	// SAFETY: four bytes from off on lie in b, as just checked, and are
	// aligned. atomic.Uint32 is a plain uint32 in memory. The pointer keeps a
	// heap slice alive; a mapping outlives its rings.
	return (*atomic.Uint32)(p)
}

// bytesOf returns the bytes of w.
func bytesOf(w []uint64) []byte {
	// SAFETY: the same memory under a smaller element type.
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(w))), len(w)*8)
}

// iovec returns what readv and writev call b. The memory of b must be kept by
// somebody else and must not move, as mappings and the heap do not.
func iovec(b []byte) unix.Iovec {
	v := unix.Iovec{Base: unsafe.SliceData(b)}
	v.SetLen(len(b))
	return v
}

// writev writes the pieces to fd without allocating, which unix.Writev does.
func writev(fd int, iov []unix.Iovec) (int, error) {
	// SAFETY: iov is a heap slice that the caller keeps during the call, and
	// its bases are memory that is kept as iovec says.
	n, _, errno := unix.RawSyscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(iov))), uintptr(len(iov)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// readNow and writeNow are read and write on a descriptor that does not wait.
// Go's scheduler is not told of them, or its monitor would take the loop's
// place away and give it back thousands of times a second.
func readNow(fd int, b []byte) (int, error) {
	return now(unix.SYS_READ, fd, unsafe.Pointer(unsafe.SliceData(b)), len(b))
}

func writeNow(fd int, b []byte) (int, error) {
	return now(unix.SYS_WRITE, fd, unsafe.Pointer(unsafe.SliceData(b)), len(b))
}

func now(call uintptr, fd int, p unsafe.Pointer, n int) (int, error) {
	// SAFETY: the caller keeps the n bytes at p during the call.
	r, _, errno := unix.RawSyscall(call, uintptr(fd), uintptr(p), uintptr(n))
	if errno != 0 {
		return 0, errno
	}
	return int(r), nil
}

// napMax is how long a loop may wait without Go's scheduler knowing.
const napMax = time.Millisecond

// epollNap waits for events at most that long, unknown to the scheduler.
func epollNap(ep int, events []unix.EpollEvent) (int, error) {
	// SAFETY: events is not empty and the caller keeps it during the call.
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(ep), uintptr(unsafe.Pointer(unsafe.SliceData(events))),
		uintptr(len(events)), uintptr(napMax/time.Millisecond), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func newEventfd() (int, error) { return unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK) }

var one = binary.NativeEndian.AppendUint64(nil, 1)

// signal adds one to an eventfd. A full counter is as good as signalled.
func signal(fd int) error {
	_, err := writeNow(fd, one)
	if err == unix.EAGAIN {
		return nil
	}
	return err
}

// drainEventfd sets the counter back to 0.
func drainEventfd(fd int) {
	var b [8]byte
	unix.Read(fd, b[:])
}

// waitReadable waits until fd is readable or the deadline has passed.
func waitReadable(fd int, deadline time.Time) error {
	for {
		left := time.Until(deadline)
		if left <= 0 {
			return ErrTimeout
		}
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(left/time.Millisecond)+1)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n > 0:
			return nil
		}
	}
}
