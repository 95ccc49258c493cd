package usernet

import (
	"encoding/binary"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// netns is the network namespace in which sockets are made. The zero value is
// that of whoever makes one.
type netns struct {
	inside, home int // descriptors; inside is the caller's
	on           bool
}

// open learns where sockets are to be made, and where threads are at home: the
// process's first thread may be elsewhere for good.
func (s *netns) open(inside int) error {
	if inside <= 0 {
		return nil
	}
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	s.inside, s.home, s.on = inside, home, true
	var a, b unix.Stat_t
	if unix.Fstat(inside, &a) == nil && unix.Fstat(home, &b) == nil && a.Dev == b.Dev && a.Ino == b.Ino {
		// Entering even the own one takes CAP_SYS_ADMIN.
		s.close()
	}
	return nil
}

func (s *netns) close() {
	if s.on {
		_ = unix.Close(s.home)
		s.on = false
	}
}

// enter takes the calling thread to the namespace, and leave back.
func (s *netns) enter() error {
	runtime.LockOSThread()
	if err := unix.Setns(s.inside, unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return err
	}
	return nil
}

func (s *netns) leave() {
	// A thread that cannot go back must not serve others: left locked, it ends
	// with its goroutine.
	if unix.Setns(s.home, unix.CLONE_NEWNET) == nil {
		runtime.UnlockOSThread()
	}
}

// socket makes a socket of the Net's family where the guest's are, which does not wait. The
// caller has counted it. In another namespace it takes about 4 us more: a
// socket stays in that in which it was made, so the thread goes there and
// comes back.
func (n *Net) socket(typ, proto int) (int32, error) {
	if n.ns.on {
		if err := n.ns.enter(); err != nil {
			return -1, err
		}
		defer n.ns.leave()
	}
	if n.six != nil && proto == unix.IPPROTO_ICMP {
		proto = unix.IPPROTO_ICMPV6
	}
	fd, errno := newSocket(n.family(), typ, proto)
	if errno != 0 {
		return -1, errno
	}
	if n.six != nil {
		setInt(fd, unix.SOL_IPV6, unix.IPV6_V6ONLY, 1)
	}
	return fd, nil
}

// netPort is a port in the order of bytes that a socket's address has it in,
// and the way back.
func netPort(p uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], p)
	return binary.NativeEndian.Uint16(b[:])
}
