// Package vhosttest plays QEMU and its guest: the frontend of a session and
// the driver of its queues.
//
// It works against any vhost-user backend and shares no code with ours. A
// [Frontend] owns the connection and sends what it is told, also nonsense. A
// [Guest] owns the memory and the [Ring]s, and is a driver that sends and
// receives frames. A [TapGuest] is a guest without a hypervisor: a tap in a
// namespace whose frames travel through the rings.
//
// The package imports no testing package and may be linked into programs.
package vhosttest

import (
	"errors"
	"time"

	"sidewire/engine/frame"
)

// Options say what guest to play. The zero value of every field is usable but
// for Path.
type Options struct {
	Path   string        // the Unix socket
	Listen bool          // the backend dials; otherwise it listens
	Wait   time.Duration // limit for connecting and for each reply; 0 means 5 s

	QueuePairs       int    // 0 means 1
	Features         uint64 // virtio features to accept if offered; 0 means LinuxFeatures
	ProtocolFeatures uint64 // the same for vhost-user; 0 means QEMUProtocol
	Packed           bool   // negotiate packed rings, and fail if they are not offered
	RingSize         int    // descriptors per ring, a power of two from 2 on, or any number of a packed ring; 0 means 256
	RxBufSize        int    // bytes of each rx buffer, header included; 0 means room for 64 KiB
	TxBufSize        int    // bytes of each tx buffer, header included; 0 means room for 64 KiB
	RxBuffers        int    // how many rx buffers are kept posted; 0 means as many as the ring takes
	MemSize          int    // bytes of guest memory; 0 means what rings and buffers need
	GPA              uint64 // where guest memory begins; 0 means 1 GiB
	NoSeal           bool   // leave the memory file open to truncation

	SplitHeader bool // the virtio-net header has a descriptor of its own
	Pieces      int  // descriptors over which a tx frame is spread; 0 means 1
	Indirect    bool // tx chains and split rx buffers are indirect, if negotiated
	MAC         frame.MAC
	MTU         uint64 // sent as NET_SET_MTU if not 0 and negotiated
}

// maxFrame is the room for the longest frame and its header.
const maxFrame = frame.MaxLen + frame.VnetHdrMrgLen

var (
	// ErrTimeout: nothing came in the time given.
	ErrTimeout = errors.New("vhosttest: timeout")
	// ErrRingFull: there is no free descriptor.
	ErrRingFull = errors.New("vhosttest: no free descriptor")
	// ErrClosed: the backend has closed the connection.
	ErrClosed = errors.New("vhosttest: connection closed")
	// ErrBackend: the backend has written something to a ring that it must not.
	ErrBackend = errors.New("vhosttest: backend broke the ring")
)

func (o *Options) defaults() {
	set := func(p *int, v int) {
		if *p == 0 {
			*p = v
		}
	}
	set(&o.QueuePairs, 1)
	set(&o.RingSize, 256)
	set(&o.RxBufSize, maxFrame)
	set(&o.TxBufSize, maxFrame)
	set(&o.Pieces, 1)
	if o.Wait == 0 {
		o.Wait = 5 * time.Second
	}
	if o.Features == 0 {
		o.Features = LinuxFeatures
	}
	if o.Packed {
		o.Features |= FeatRingPacked
	}
	if o.ProtocolFeatures == 0 {
		o.ProtocolFeatures = QEMUProtocol
	}
	if o.GPA == 0 {
		o.GPA = 1 << 30
	}
}
