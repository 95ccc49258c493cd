package usernet

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// segmentControl is the control message that has the kernel cut what is sent
// into datagrams of size bytes.
type segmentControl struct {
	hdr  unix.Cmsghdr
	size uint16
	_    [6]byte
}

const segmentControlLen = int(unsafe.Sizeof(segmentControl{}))

func (c *segmentControl) init() {
	c.hdr = unix.Cmsghdr{Level: unix.IPPROTO_UDP, Type: unix.UDP_SEGMENT}
	c.hdr.SetLen(unix.CmsgLen(2))
}

// base is where the message begins, as a Msghdr wants it.
func (c *segmentControl) base() *byte {
	return (*byte)(unsafe.Pointer(c)) // SAFETY: the kernel reads Controllen bytes, the size of *c
}

// sourceControl is the control message that says which address of ours is to be
// the source.
type sourceControl struct {
	hdr  unix.Cmsghdr
	info unix.Inet4Pktinfo
	_    [4]byte
}

const sourceControlLen = int(unsafe.Sizeof(sourceControl{}))

func (c *sourceControl) init() {
	c.hdr = unix.Cmsghdr{Level: unix.SOL_IP, Type: unix.IP_PKTINFO}
	c.hdr.SetLen(unix.CmsgLen(unix.SizeofInet4Pktinfo))
}

// base is where the message begins, as a Msghdr wants it.
func (c *sourceControl) base() *byte {
	return (*byte)(unsafe.Pointer(c)) // SAFETY: the kernel reads Controllen bytes, at most the size of the sendControl that *c begins
}

// sendControl is both, one behind the other.
type sendControl struct {
	source  sourceControl
	segment segmentControl
}

// sourceControl6 is sourceControl for IPv6.
type sourceControl6 struct {
	hdr  unix.Cmsghdr
	info unix.Inet6Pktinfo
	_    [4]byte
}

const sourceControl6Len = int(unsafe.Sizeof(sourceControl6{}))

func (c *sourceControl6) init() {
	c.hdr = unix.Cmsghdr{Level: unix.SOL_IPV6, Type: unix.IPV6_PKTINFO}
	c.hdr.SetLen(unix.CmsgLen(unix.SizeofInet6Pktinfo))
}

// base is where the message begins, as a Msghdr wants it.
func (c *sourceControl6) base() *byte {
	return (*byte)(unsafe.Pointer(c)) // SAFETY: as for sourceControl
}

// sendControl6 is sendControl for IPv6.
type sendControl6 struct {
	source  sourceControl6
	segment segmentControl
}

// nextControl takes the first control message off b, which the kernel has
// filled. It reports false if there is none.
func nextControl(b []byte) (level, typ int32, data, rest []byte, ok bool) {
	if len(b) < unix.SizeofCmsghdr {
		return 0, 0, nil, nil, false
	}
	// SAFETY: b holds a whole header, and buffers for control messages are
	// aligned as one; it is only read.
	h := (*unix.Cmsghdr)(unsafe.Pointer(unsafe.SliceData(b)))
	n, start := int(h.Len), unix.CmsgLen(0)
	if n < start || n > len(b) {
		return 0, 0, nil, nil, false
	}
	return h.Level, h.Type, b[start:n], b[min(unix.CmsgSpace(n-start), len(b)):], true
}

// controlOf is a buffer for control messages as a Msghdr wants it.
func controlOf(c *[controlRoom / 8]uint64) *byte {
	return (*byte)(unsafe.Pointer(c)) // SAFETY: the kernel writes Controllen bytes, at most the size of *c
}

// controlBytes is the same buffer, to read.
func controlBytes(c *[controlRoom / 8]uint64) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(c)), controlRoom) // SAFETY: that is the size of *c, which is alive
}
