package uplink

import (
	"encoding/binary"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// asker is a socket for questions of one address. It has one user at a time.
type asker struct {
	fd  int // -1 when closed
	seq uint32
	buf [4096]byte
}

func (a *asker) open() (err error) {
	a.fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	return err
}

func (a *asker) close() {
	if a.fd >= 0 {
		unix.Close(a.fd)
		a.fd = -1
	}
}

// route asks the kernel for the route to dst. It returns the kernel's message,
// or nil if there is none.
func (a *asker) route(dst netip.Addr) []byte {
	return a.ask(unix.RTM_GETROUTE, [unix.SizeofRtMsg]byte{familyOf(dst), byte(dst.BitLen())}, unix.RTA_DST, dst)
}

func familyOf(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// neighbour asks the kernel for a neighbour; nil if it has none.
func (a *asker) neighbour(link int, ip netip.Addr) *netlink.Neigh {
	fixed := [unix.SizeofNdMsg]byte{familyOf(ip)}
	binary.NativeEndian.PutUint32(fixed[4:], uint32(link))
	b := a.ask(unix.RTM_GETNEIGH, fixed, unix.NDA_DST, ip)
	if len(b) < unix.SizeofNlMsghdr+unix.SizeofNdMsg || binary.NativeEndian.Uint16(b[4:]) != unix.RTM_NEWNEIGH {
		return nil
	}
	n, err := netlink.NeighDeserialize(b[unix.SizeofNlMsghdr:])
	if err != nil {
		return nil
	}
	return n
}

// ask sends a request of a fixed part and one address, and returns the
// answer, valid until the next one, or nil. The kernel answers while it is
// asked, so there is nothing to wait for.
func (a *asker) ask(typ uint16, fixed [12]byte, attr uint16, ip netip.Addr) []byte {
	a.seq++
	ne := binary.NativeEndian
	b := a.buf[:unix.SizeofNlMsghdr]
	clear(b)
	ne.PutUint16(b[4:], typ)
	ne.PutUint16(b[6:], unix.NLM_F_REQUEST)
	ne.PutUint32(b[8:], a.seq)
	b = append(b, fixed[:]...)
	b = ne.AppendUint16(b, uint16(unix.SizeofRtAttr+ip.BitLen()/8))
	b = ne.AppendUint16(b, attr)
	b, _ = ip.AppendBinary(b)
	ne.PutUint32(b, uint32(len(b)))
	if err := unix.Sendto(a.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil
	}
	for {
		n, from, err := unix.Recvfrom(a.fd, a.buf[:], 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n < unix.SizeofNlMsghdr {
			return nil
		}
		kernel, ok := from.(*unix.SockaddrNetlink)
		if ok && kernel.Pid == 0 && ne.Uint32(a.buf[8:]) == a.seq {
			// Attributes are read from the first message only.
			return a.buf[:min(n, int(ne.Uint32(a.buf[0:])))]
		}
	}
}

// answer is what the kernel says of a destination.
type answer struct {
	link int
	next netip.Addr
	mtu  int
}

// parseRoute reads an RTM_NEWROUTE message. A refusal is an NLMSG_ERROR.
func parseRoute(b []byte, dst netip.Addr) (answer, bool) {
	ne := binary.NativeEndian
	const fixed = unix.SizeofNlMsghdr + unix.SizeofRtMsg
	if len(b) < fixed || ne.Uint16(b[4:]) != unix.RTM_NEWROUTE || b[23] != unix.RTN_UNICAST {
		return answer{}, false
	}
	a := answer{next: dst}
	for b := b[fixed:]; len(b) >= unix.SizeofRtAttr; {
		n, typ := int(ne.Uint16(b)), ne.Uint16(b[2:])
		if n < unix.SizeofRtAttr || n > len(b) {
			break
		}
		v := b[unix.SizeofRtAttr:n]
		switch {
		case typ == unix.RTA_OIF && len(v) >= 4:
			a.link = int(ne.Uint32(v))
		case typ == unix.RTA_GATEWAY && len(v) == dst.BitLen()/8:
			a.next, _ = netip.AddrFromSlice(v)
		case typ == unix.RTA_VIA:
			return answer{}, false // an IPv6 neighbour for IPv4: nobody resolves it here
		case typ == unix.RTA_METRICS:
			a.mtu = metricMTU(v)
		}
		b = b[min(len(b), (n+3)&^3):]
	}
	return a, true
}

// metricMTU finds RTAX_MTU among a route's metrics.
func metricMTU(b []byte) int {
	ne := binary.NativeEndian
	for len(b) >= 8 {
		n := int(ne.Uint16(b))
		if n < 8 || n > len(b) {
			return 0
		}
		if ne.Uint16(b[2:]) == unix.RTAX_MTU {
			return int(ne.Uint32(b[4:]))
		}
		b = b[min(len(b), (n+3)&^3):]
	}
	return 0
}
