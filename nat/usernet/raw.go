package usernet

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls of the data path do not wait, so Go's scheduler need not know of
// them; see engine/uplink. They allocate nothing, as the wrappers of x/sys do.

// mmsghdr is struct mmsghdr of recvmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	len uint32
}

// sockAddr is a socket's address: a struct sockaddr_in, which ends behind Addr,
// or a struct sockaddr_in6, which has a flow label there. The kernel takes the
// whole for both.
type sockAddr struct {
	Family uint16
	Port   uint16 // in network order, as Addr is
	Addr   [4]byte
	six    addr6
	scope  uint32
}

const sockAddrLen = uint32(unsafe.Sizeof(sockAddr{}))

// setIov makes v the non-empty slice b.
func setIov(v *unix.Iovec, b []byte) {
	v.Base = unsafe.SliceData(b) // SAFETY: no conversion; an Iovec wants the pointer
	v.SetLen(len(b))
}

// nameOf is a socket address as a Msghdr wants it.
func nameOf(a *sockAddr) *byte {
	return (*byte)(unsafe.Pointer(a)) // SAFETY: the kernel uses Namelen bytes, at most the size of *a
}

// sendmsg sends without waiting. Memory that has gone away is an EFAULT here,
// not a fault.
func sendmsg(fd int32, msg *unix.Msghdr, flags int) (int, unix.Errno) {
	// SAFETY: msg is alive during the call; all that it points to is reachable
	// from it by ordinary pointers.
	n, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(msg)), uintptr(flags|unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL))
	return int(n), errno
}

// recvmsg receives without waiting.
func recvmsg(fd int32, msg *unix.Msghdr, flags int) (int, unix.Errno) {
	// SAFETY: as for sendmsg.
	n, _, errno := unix.RawSyscall(unix.SYS_RECVMSG, uintptr(fd), uintptr(unsafe.Pointer(msg)), uintptr(flags|unix.MSG_DONTWAIT))
	return int(n), errno
}

// sendmmsg sends msgs in order and returns how many the kernel took.
func sendmmsg(fd int32, msgs []mmsghdr) (int, unix.Errno) {
	// SAFETY: as for sendmsg; msgs is not empty.
	n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&msgs[0])),
		uintptr(len(msgs)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
	return int(n), errno
}

// recvmmsg fills msgs with what is there, without waiting.
func recvmmsg(fd int32, msgs []mmsghdr, flags int) (int, unix.Errno) {
	// SAFETY: as for sendmmsg.
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&msgs[0])),
		uintptr(len(msgs)), uintptr(flags|unix.MSG_DONTWAIT), 0, 0)
	return int(n), errno
}

// discard takes n bytes off a TCP socket's queue without looking at them, and
// returns how many there were.
func discard(fd int32, n int) (int, unix.Errno) {
	r, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), 0, uintptr(n), unix.MSG_TRUNC|unix.MSG_DONTWAIT, 0, 0)
	return int(r), errno
}

// epollReady returns the events that there are.
func epollReady(epfd int, evs []unix.EpollEvent) int {
	// SAFETY: evs is not empty and alive during the call.
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(epfd), uintptr(unsafe.Pointer(&evs[0])), uintptr(len(evs)), 0, 0, 0)
	if errno != 0 {
		return 0
	}
	return int(n)
}

// meminfo is what SO_MEMINFO tells of a socket (linux/sock_diag.h).
type meminfo struct {
	rmemAlloc, rcvbuf, wmemAlloc, sndbuf, fwdAlloc, wmemQueued, optmem, backlog, drops uint32
}

// memInfo reads a socket's memory, without its lock.
func memInfo(fd int32, m *meminfo) unix.Errno {
	n := uint32(unsafe.Sizeof(*m))
	// SAFETY: the kernel writes at most n bytes, the size of *m, during the call.
	_, _, errno := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(m)), uintptr(unsafe.Pointer(&n)), 0)
	return errno
}

// setInt sets an option of a socket.
func setInt(fd int32, level, opt int, v int32) unix.Errno {
	// SAFETY: the kernel reads 4 bytes during the call.
	_, _, errno := unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(opt), uintptr(unsafe.Pointer(&v)), 4, 0)
	return errno
}

// getInt reads an option of a socket.
func getInt(fd int32, level, opt int) (v int32, errno unix.Errno) {
	n := uint32(4)
	// SAFETY: the kernel writes at most 4 bytes during the call.
	_, _, errno = unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(opt),
		uintptr(unsafe.Pointer(&v)), uintptr(unsafe.Pointer(&n)), 0)
	return v, errno
}

// accept takes a connection from a listener.
func accept(fd int, a *sockAddr) (int32, unix.Errno) {
	n := uint32(unsafe.Sizeof(*a))
	// SAFETY: the kernel writes at most n bytes, the size of *a, during the call.
	r, _, errno := unix.RawSyscall6(unix.SYS_ACCEPT4, uintptr(fd), uintptr(unsafe.Pointer(a)), uintptr(unsafe.Pointer(&n)),
		unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0, 0)
	return int32(r), errno
}

// setTimer lets a timerfd become readable after some nanoseconds.
func setTimer(fd int, ns int64) unix.Errno {
	spec := unix.ItimerSpec{Value: unix.NsecToTimespec(max(ns, 1))}
	// SAFETY: the kernel reads spec during the call.
	_, _, errno := unix.RawSyscall6(unix.SYS_TIMERFD_SETTIME, uintptr(fd), 0, uintptr(unsafe.Pointer(&spec)), 0, 0, 0)
	return errno
}

// queued is how many bytes of a TCP socket's queue can be read, up to urgent
// data.
func queued(fd int32) (int, unix.Errno) {
	var v int32
	// SAFETY: the kernel writes 4 bytes during the call.
	_, _, errno := unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCINQ, uintptr(unsafe.Pointer(&v)))
	return int(v), errno
}

// setLinger has a TCP socket say RST when it is closed.
func setLinger(fd int32) {
	l := unix.Linger{Onoff: 1}
	// SAFETY: the kernel reads l during the call.
	_, _, _ = unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_LINGER, uintptr(unsafe.Pointer(&l)), unsafe.Sizeof(l), 0)
}

// writable says whether a socket takes data. One that does not tells by an event
// when it does.
func writable(fd int32) bool {
	p := unix.PollFd{Fd: fd, Events: unix.POLLOUT}
	var zero unix.Timespec
	// SAFETY: the kernel reads and writes p, and reads zero, during the call.
	n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), 1, uintptr(unsafe.Pointer(&zero)), 0, 0, 0)
	return errno == 0 && n == 1 && p.Revents&unix.POLLOUT != 0
}

// sockname reads the address that a socket is bound to.
func sockname(fd int32, a *sockAddr) unix.Errno {
	n := uint32(unsafe.Sizeof(*a))
	// SAFETY: the kernel writes at most n bytes, the size of *a, during the call.
	_, _, errno := unix.RawSyscall(unix.SYS_GETSOCKNAME, uintptr(fd), uintptr(unsafe.Pointer(a)), uintptr(unsafe.Pointer(&n)))
	return errno
}
