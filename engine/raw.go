package engine

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// napMost is how long a worker that has much to do may wait without Go's
// scheduler knowing, in milliseconds. Whoever stops the world waits for it no
// longer than until the signal that asks for it ends the nap. It is longer than
// such sleeps are: a timer that is to go off within a millisecond is told to the
// hardware. With 10 a wake-up and a sleep took 3.6 us of processor time in place
// of 5.3 with 1 (two threads that wake each other, Linux 6.18 in a VM).
const napMost = 10

// epollNap waits for events like unix.EpollWait, but keeps the worker's place
// with the scheduler. When workers sleep for fractions of a millisecond and
// give it up each time, the runtime's monitor wakes up two thousand times a
// second to take it away; engine/uplink/raw.go says what that costs.
func epollNap(epfd int, evs []unix.EpollEvent) (int, unix.Errno) {
	// SAFETY: evs is not empty, on the caller's stack or heap, and alive during
	// the call.
	n, _, errno := unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(epfd), uintptr(unsafe.Pointer(&evs[0])),
		uintptr(len(evs)), napMost, 0, 0)
	return int(n), errno
}

// nanosleep sleeps for a part of a nap's time, whatever happens meanwhile. A
// signal ends it.
func nanosleep(d time.Duration) {
	t := unix.NsecToTimespec(int64(d))
	// SAFETY: the kernel reads t during the call.
	_, _, _ = unix.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&t)), 0, 0)
}
