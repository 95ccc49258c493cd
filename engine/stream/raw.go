package stream

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls of the data path do not wait, so Go's scheduler need not know of
// them: told of each, its monitor takes the worker's place away and gives it
// back.

// recv fills b, which is not empty, with what is there, without waiting.
func recv(fd int, b []byte) (int, unix.Errno) {
	// SAFETY: b is alive during the call, and the kernel writes at most its length.
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))),
		uintptr(len(b)), unix.MSG_DONTWAIT, 0, 0)
	return int(n), errno
}

// send sends the pieces in order, without waiting, and returns how many bytes
// the kernel took. m is the caller's, for no purpose but to be in one place.
// Memory that has gone away is an EFAULT here, not a fault.
func send(fd int, m *unix.Msghdr, pieces []unix.Iovec) (int, unix.Errno) {
	m.Iov = &pieces[0]
	m.SetIovlen(len(pieces))
	// SAFETY: m is alive during the call; all that it points to is reachable
	// from it by ordinary pointers.
	n, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(m)),
		unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	m.Iov = nil
	return int(n), errno
}

// setIov makes v the non-empty slice b.
func setIov(v *unix.Iovec, b []byte) {
	v.Base = unsafe.SliceData(b) // SAFETY: no conversion; an Iovec wants the pointer
	v.SetLen(len(b))
}

// bytesOf is the slice that setIov made v of.
func bytesOf(v *unix.Iovec) []byte {
	return unsafe.Slice(v.Base, v.Len) // SAFETY: pointer and length are those of one slice
}
