package uplink

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Kernel is a port that hands IPv4 packets to the kernel of the namespace,
// which finds the next hop's hardware address and sends them. It is for the
// few frames that come before the address is known; they carry Mark and leave
// by one link. Push is safe for concurrent use by different workers.
type Kernel struct {
	senders []kernelSender
}

type kernelSender struct {
	fd   int
	msgs [1]mmsghdr
	name unix.RawSockaddrInet4
	iovs [iovMax]unix.Iovec
}

// OpenKernel makes the port in the current network namespace. It needs
// CAP_NET_RAW and CAP_NET_ADMIN.
func OpenKernel(link string, workers int) (k *Kernel, err error) {
	k = &Kernel{senders: make([]kernelSender, workers)}
	for i := range k.senders {
		k.senders[i].fd = -1
	}
	defer func() {
		if err != nil {
			k.Close()
			k, err = nil, fmt.Errorf("open raw socket of %s: %w", link, err)
		}
	}()
	for i := range k.senders {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
		if err != nil {
			return k, privilege(err, "CAP_NET_RAW")
		}
		k.senders[i].fd = fd // IPPROTO_RAW implies IP_HDRINCL and receives nothing
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, Mark); err != nil {
			return k, privilege(err, "CAP_NET_ADMIN")
		}
		if err := unix.BindToDevice(fd, link); err != nil {
			return k, privilege(err, "CAP_NET_RAW")
		}
	}
	return k, nil
}

// Close closes the sockets. No worker may use the port any more.
func (k *Kernel) Close() error {
	var errs []error
	for i := range k.senders {
		if k.senders[i].fd >= 0 {
			errs = append(errs, unix.Close(k.senders[i].fd))
			k.senders[i].fd = -1
		}
	}
	return errors.Join(errs...)
}

// Push sends IPv4 frames without their Ethernet header. Frames that want
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
	const minLen = frame.EthernetLen + 20
	switch {
	case f.HeadLen < minLen || f.EtherType() != frame.TypeIPv4:
		return frame.NotCarried
	case f.GSOType() != frame.GSONone || len(f.Tail)+1 > iovMax:
		return frame.NoNeighbour
	}
	if f.Flags&frame.NeedsCsum != 0 {
		f.CompleteChecksum()
	}
	s.name.Family = unix.AF_INET
	copy(s.name.Addr[:], f.Head[30:34])
	setIov(&s.iovs[0], f.Head[frame.EthernetLen:f.HeadLen])
	n := 1
	for _, t := range f.Tail {
		if len(t) > 0 {
			setIov(&s.iovs[n], t)
			n++
		}
	}
	m := &s.msgs[0].hdr
	m.Name, m.Namelen = nameOf(&s.name), unix.SizeofSockaddrInet4
	m.Iov = &s.iovs[0]
	m.SetIovlen(n)
	_, errno := sendmmsg(s.fd, s.msgs[:])
	clear(s.iovs[:n])
	if errno != 0 {
		return frame.SendFailed
	}
	return frame.ReasonNone
}
