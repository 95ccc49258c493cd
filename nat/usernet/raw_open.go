package usernet

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// What opens and ends a flow takes longer than what carries its data, but waits
// for nobody either. Told of each, Go's monitor would take the worker's place
// away when a connect(2) over a veth pair lasts for more than its 20 us, and
// then not rest for as long as flows are opened.

// newSocket makes a socket that does not wait.
func newSocket(family uintptr, typ, proto int) (int32, unix.Errno) {
	fd, _, errno := unix.RawSyscall(unix.SYS_SOCKET, family, uintptr(typ|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC), uintptr(proto))
	return int32(fd), errno
}

// bind gives a socket an address.
func bind(fd int32, a *sockAddr) unix.Errno {
	// SAFETY: the kernel reads the size of *a during the call.
	_, _, errno := unix.RawSyscall(unix.SYS_BIND, uintptr(fd), uintptr(unsafe.Pointer(a)), unsafe.Sizeof(*a))
	return errno
}

// connect has a socket that does not wait call an address.
func connect(fd int32, a *sockAddr) unix.Errno {
	// SAFETY: the kernel reads the size of *a during the call.
	_, _, errno := unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(a)), unsafe.Sizeof(*a))
	return errno
}

// shutdownWrite sends a FIN behind what a socket still has to send. It fails if
// the host's side has ended, which the next read tells.
func shutdownWrite(fd int32) {
	_, _, _ = unix.RawSyscall(unix.SYS_SHUTDOWN, uintptr(fd), unix.SHUT_WR, 0)
}

// closeFD closes a socket that does not linger.
func closeFD(fd int32) {
	_, _, _ = unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0)
}

// epollAdd has an epoll set tell of a descriptor.
func epollAdd(epfd int, fd int32, ev *unix.EpollEvent) unix.Errno {
	// SAFETY: the kernel reads ev during the call.
	_, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(epfd), unix.EPOLL_CTL_ADD, uintptr(fd), uintptr(unsafe.Pointer(ev)), 0, 0)
	return errno
}
