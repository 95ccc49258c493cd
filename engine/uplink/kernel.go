package uplink

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Kernel is a port that hands IP packets to the kernel of the namespace, which
// finds the next hop's hardware address and sends them. It is for the
// few frames that come before the address is known; they carry Mark and leave
// by one link. Push is safe for concurrent use by different workers.
type Kernel struct {
	senders []kernelSender
}

type kernelSender struct {
	fd, fd6 int // for IPv4; for IPv6, -1 where the kernel has none
	msgs    [1]mmsghdr
	name    unix.RawSockaddrInet4
	name6   unix.RawSockaddrInet6
	iovs    [iovMax]unix.Iovec
}

// OpenKernel makes the port in the current network namespace. It needs
// CAP_NET_RAW and CAP_NET_ADMIN.
func OpenKernel(link string, workers int) (k *Kernel, err error) {
	k = &Kernel{senders: make([]kernelSender, workers)}
	for i := range k.senders {
		k.senders[i].fd, k.senders[i].fd6 = -1, -1
	}
	defer func() {
		if err != nil {
			k.Close()
			k, err = nil, fmt.Errorf("open raw socket of %s: %w", link, err)
		}
	}()
	for i := range k.senders {
		s := &k.senders[i]
		if s.fd, err = openRaw(unix.AF_INET, link); err != nil {
			return k, err
		}
		if s.fd6, err = openRaw(unix.AF_INET6, link); err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
			return k, err
		}
	}
	return k, nil
}

// openRaw makes a socket for whole packets, which receives nothing (IPPROTO_RAW
// implies IP_HDRINCL).
func openRaw(family int, link string) (int, error) {
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
	if err != nil {
		return -1, privilege(err, "CAP_NET_RAW")
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, Mark); err != nil {
		unix.Close(fd)
		return -1, privilege(err, "CAP_NET_ADMIN")
	}
	if err := unix.BindToDevice(fd, link); err != nil {
		unix.Close(fd)
		return -1, privilege(err, "CAP_NET_RAW")
	}
	return fd, nil
}

// Close closes the sockets. No worker may use the port any more.
func (k *Kernel) Close() error {
	var errs []error
	for i := range k.senders {
		for _, fd := range []*int{&k.senders[i].fd, &k.senders[i].fd6} {
			if *fd >= 0 {
				errs = append(errs, unix.Close(*fd))
				*fd = -1
			}
		}
	}
	return errors.Join(errs...)
}

// Push sends IP packets without their Ethernet header. Frames that want
// segmentation are dropped: the flow's next one finds the address known. See
// engine.Port.
func (k *Kernel) Push(worker int, fs []*frame.Frame) {
	s := &k.senders[worker]
	for _, f := range fs {
		if r := s.send(f); r != frame.ReasonNone {
			f.Drop(r)
		}
	}
}

func (s *kernelSender) send(f *frame.Frame) frame.DropReason {
	const min4, min6 = frame.EthernetLen + 20, frame.EthernetLen + 40
	four := f.HeadLen >= min4 && f.EtherType() == frame.TypeIPv4
	switch {
	case !four && (f.HeadLen < min6 || f.EtherType() != frame.TypeIPv6 || s.fd6 < 0):
		return frame.NotCarried
	case f.GSOType() != frame.GSONone || len(f.Tail)+1 > iovMax:
		return frame.NoNeighbour
	}
	if f.Flags&frame.NeedsCsum != 0 {
		f.CompleteChecksum()
	}
	setIov(&s.iovs[0], f.Head[frame.EthernetLen:f.HeadLen])
	n := 1
	for _, t := range f.Tail {
		if len(t) > 0 {
			setIov(&s.iovs[n], t)
			n++
		}
	}
	m := &s.msgs[0].hdr
	fd := s.fd
	if four {
		s.name.Family = unix.AF_INET
		copy(s.name.Addr[:], f.Head[30:34])
		m.Name, m.Namelen = nameOf(&s.name), unix.SizeofSockaddrInet4
	} else {
		fd, s.name6.Family = s.fd6, unix.AF_INET6
		copy(s.name6.Addr[:], f.Head[38:54])
		m.Name, m.Namelen = nameOf6(&s.name6), unix.SizeofSockaddrInet6
	}
	m.Iov = &s.iovs[0]
	m.SetIovlen(n)
	_, errno := sendmmsg(fd, s.msgs[:])
	clear(s.iovs[:n])
	if errno != 0 {
		return frame.SendFailed
	}
	return frame.ReasonNone
}
