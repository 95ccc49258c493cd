package uplink

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

const (
	// slots is how many frames one Pull may bring. Each has a slot of
	// slotSize behind its head, of which only touched pages cost memory: at
	// most 2 MiB for a worker that receives nothing but 64 KiB frames.
	slots    = 32
	slotSize = 64 << 10
	vlanLen  = 4
	// noMembership is none of the kernel's PACKET_MR values, of which 0 is one.
	noMembership = 0xffff
	// auxSpace is CMSG_SPACE(sizeof(struct tpacket_auxdata)) on a 64-bit
	// machine, and more than that on others.
	auxSpace = 40
)

// Queue is one receiving socket of an uplink. It belongs to one worker.
type Queue struct {
	fd      int
	index   int
	hdrLen  int
	headLen int // how much of Head is filled by the kernel
	aux     bool
	// drained says that the socket was empty after the last Pull, so that the
	// next frame makes an edge for epoll.
	drained bool
	w       Watcher
	direct  *direct // nil if all is received into the arena
	rare    bool    // the frames of which there are many come by another queue
	rest    rest

	batch *frame.Batch // whose heads iovs point to
	msgs  [slots]mmsghdr
	iovs  [3 * slots]unix.Iovec
	hdrs  [slots][frame.VnetHdrMrgLen]byte
	ctl   [slots][auxSpace]byte
	arena []byte
}

func newQueue(link, index int, direct bool, membership uint16) (*Queue, error) {
	fd, err := packetSocket(link)
	if err != nil {
		return nil, err
	}
	q := &Queue{fd: fd, index: index, headLen: frame.HeadSize, arena: make([]byte, slots*slotSize)}
	if err := q.setup(link, direct, membership); err != nil {
		unix.Close(fd)
		return nil, err
	}
	for i := range q.msgs {
		iov := q.iovs[3*i : 3*i+3]
		setIov(&iov[0], q.hdrs[i][:q.hdrLen])
		setIov(&iov[2], q.slot(i))
		q.msgs[i].hdr.Iov = &iov[0]
		q.msgs[i].hdr.SetIovlen(len(iov))
		if q.aux {
			q.msgs[i].hdr.Control = &q.ctl[i][0]
		}
	}
	return q, nil
}

func (q *Queue) setup(link int, direct bool, membership uint16) (err error) {
	if q.hdrLen, err = setVnetHdr(q.fd); err != nil {
		return err
	}
	setBuf(q.fd, unix.SO_RCVBUFFORCE, unix.SO_RCVBUF, rcvBuf)
	if !direct {
		return nil
	}
	// The kernel takes VLAN tags out of what it receives. There must be room
	// in Head to put one back.
	q.aux, q.headLen = true, frame.HeadSize-vlanLen
	if err := unix.SetsockoptInt(q.fd, unix.SOL_PACKET, unix.PACKET_AUXDATA, 1); err != nil {
		return fmt.Errorf("PACKET_AUXDATA: %w", err)
	}
	if err := unix.SetsockoptInt(q.fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
		return fmt.Errorf("PACKET_IGNORE_OUTGOING: %w", err)
	}
	if membership != noMembership {
		m := unix.PacketMreq{Ifindex: int32(link), Type: membership}
		if err := unix.SetsockoptPacketMreq(q.fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &m); err != nil {
			return fmt.Errorf("packet membership: %w", err)
		}
	}
	return nil
}

func (q *Queue) slot(i int) []byte { return q.arena[i*slotSize : (i+1)*slotSize : (i+1)*slotSize] }

// SetWatcher tells the queue whom to wake.
func (q *Queue) SetWatcher(w Watcher) error {
	if err := w.Watch(q.fd); err != nil {
		return err
	}
	q.w = w
	return nil
}

func (q *Queue) close() error {
	if q.w != nil {
		q.w.Unwatch(q.fd)
	}
	return unix.Close(q.fd)
}

// Pull receives what is there. See engine.Queue.
func (q *Queue) Pull(b *frame.Batch) int {
	if b != q.batch {
		q.point(b)
	}
	if q.direct != nil && q.direct.long {
		if n, ok := q.pullDirect(b); ok {
			return n
		}
	}
	if q.rare && q.rest.due() {
		return 0
	}
	n, errno := recvmmsg(q.fd, q.msgs[:])
	if errno != 0 {
		q.drained = errno == unix.EAGAIN
		n = 0
	}
	q.rest.after(n)
	if n == 0 {
		return 0
	}
	q.drained = n < slots
	bytes := 0
	for i := range n {
		q.take(b, i)
		bytes += int(q.msgs[i].len)
	}
	if q.direct != nil {
		q.direct.long = bytes >= n*longMean
	}
	return n
}

// point lets the kernel write the heads of a batch's frames.
func (q *Queue) point(b *frame.Batch) {
	for i := range slots {
		setIov(&q.iovs[3*i+1], b.Frame(i).Head[:q.headLen])
		if q.aux {
			q.msgs[i].hdr.SetControllen(auxSpace)
		}
	}
	q.batch = b
}

// take makes the i-th message the batch's next frame, which is its i-th.
func (q *Queue) take(b *frame.Batch, i int) {
	f, m := b.Next(), &q.msgs[i]
	n := int(m.len) - q.hdrLen
	q.fill(f, i, n, m.hdr.Flags)
	if n > q.headLen && f.Reason != frame.OversizeFrame {
		f.Tail = append(b.Segs(1), q.slot(i)[:n-q.headLen])
	}
}

// fill sets what is known of a frame of n bytes whose header is the i-th.
func (q *Queue) fill(f *frame.Frame, i, n int, flags int32) {
	f.Queue = uint16(q.index)
	f.HeadLen, f.Len = uint16(max(0, min(n, q.headLen))), int32(max(n, 0))
	f.Offload.Decode(q.hdrs[i][:])
	if q.aux {
		q.retag(f, i)
	}
	switch {
	case flags&unix.MSG_TRUNC != 0:
		f.Len = int32(f.HeadLen)
		f.Drop(frame.OversizeFrame)
	case n < frame.EthernetLen:
		f.Drop(frame.ShortFrame)
	case !f.CheckOffload():
		f.Drop(frame.BadOffload)
	}
}

// retag puts back the VLAN tag that the kernel took out, and makes the
// message's control buffer ready for the next Pull.
func (q *Queue) retag(f *frame.Frame, i int) {
	m := &q.msgs[i].hdr
	m.SetControllen(auxSpace)
	if m.Flags&unix.MSG_CTRUNC != 0 || f.HeadLen < frame.EthernetLen {
		return
	}
	// struct cmsghdr ends with level and type; auxdata holds status, len,
	// snaplen (4 bytes each), mac, net, tci, tpid (2 bytes each).
	c := q.ctl[i][unix.SizeofCmsghdr:]
	status := binary.NativeEndian.Uint32(c)
	if status&unix.TP_STATUS_VLAN_VALID == 0 {
		return
	}
	tpid := uint16(0x8100)
	if status&unix.TP_STATUS_VLAN_TPID_VALID != 0 {
		tpid = binary.NativeEndian.Uint16(c[18:])
	}
	copy(f.Head[16:], f.Head[12:f.HeadLen])
	binary.BigEndian.PutUint16(f.Head[12:], tpid)
	binary.BigEndian.PutUint16(f.Head[14:], binary.NativeEndian.Uint16(c[16:]))
	f.HeadLen += vlanLen
	f.Len += vlanLen
	if f.Flags&frame.NeedsCsum != 0 {
		f.CsumStart += vlanLen
	}
}

// rest lets a worker that has much to do elsewhere ask a descriptor less often
// which rarely has anything: each question is a system call. What comes while
// it rests makes an edge, and so wakes a worker that goes to sleep; that worker
// must then ask, for there is no second edge.
type rest struct{ misses, left uint8 }

// restAfter is how many times in vain make a queue rest for one turn more, and
// restMax how many turns it rests at most.
const (
	restAfter = 16
	restMax   = 3
)

// due says whether the queue rests this time.
func (r *rest) due() bool {
	if r.left == 0 {
		return false
	}
	r.left--
	return true
}

// after notes that n frames came.
func (r *rest) after(n int) {
	if n > 0 {
		*r = rest{}
		return
	}
	r.misses = min(r.misses+1, restAfter*restMax)
	r.left = r.misses / restAfter
}

// wake ends the rest before a sleep.
func (r *rest) wake() { r.left = 0 }

// Release gives the slots back to the next Pull.
func (q *Queue) Release(*frame.Batch) {
	if q.direct != nil && q.direct.lent {
		q.direct.lent = false
		q.direct.room.Free()
	}
}

// Arm reports whether frames are waiting. Watching is edge-triggered: a socket
// that was empty after the last Pull wakes its worker by itself.
func (q *Queue) Arm() (more bool) {
	q.rest.wake()
	return !q.drained && poll(q.fd, unix.POLLIN, 0)&unix.POLLIN != 0
}

// Disarm does nothing: nobody is woken who does not sleep.
func (q *Queue) Disarm() {}
