package stream

import (
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

const (
	// minWire is the shortest frame on a wire (IEEE 802.3, 3.2.8), without FCS.
	// NIC models may take a shorter one for the rest of a collision.
	minWire = 60
	// maxUnits is how many frames one system call sends, and what was left over
	// of the one before.
	maxUnits = frame.BatchSize + 1
	iovMax   = 1024 // UIO_MAXIOV
	// sndBuf bounds what waits for a guest that does not take its frames, in
	// bytes: some hundred frames, so that they are not old when it does.
	sndBuf = 256 << 10
)

// rx is what goes to the guest. Any worker may use it.
type rx struct {
	count *counters
	// room is an epoll set in which the socket is while something waits for
	// room in it, so that a worker wakes up when there is some.
	room int
	// waits says that something does.
	waits atomic.Bool

	// mu guards all below; workers hold it for one batch, the control plane to
	// put a connection in or to take it out, and neither waits for anything
	// meanwhile.
	mu    sync.Mutex
	conn  *conn // nil while there is none to send to
	armed bool  // the socket is in room

	// rest is what the socket left over of the frame that it took last. It lies
	// in keep. Nothing else is sent before it.
	rest []byte
	keep []byte

	n     int // units staged
	niov  int // pieces staged
	bytes int // bytes staged
	units [maxUnits]unit
	heads [maxUnits][lenSize + frame.HeadSize]byte
	iovs  [iovMax]unix.Iovec
	msg   unix.Msghdr
	// stop is why nothing more is sent in this batch, or ReasonNone.
	stop frame.DropReason
	seg  *frame.Segmenter // made when a frame first needs it
	flat []byte           // for a frame of too many pieces
	one  [1][]byte        // flat as a scatter list

	frames, octets, split uint64 // sent and not yet counted
}

// unit is one frame of the stream: a frame, a segment of one, or the rest.
type unit struct {
	f     *frame.Frame // the frame that it is, or is a segment of; nil for the rest
	first bool         // it is the frame, or its first segment
	iov   int          // its first piece
	end   int          // staged bytes up to its end
}

func (r *rx) init(c *counters) (err error) {
	r.count, r.keep = c, make([]byte, lenSize+frame.MaxLen)
	if r.room, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return fmt.Errorf("epoll: %w", err)
	}
	return nil
}

// attach begins with a connection.
func (r *rx) attach(c *conn) {
	// A smaller buffer loses frames earlier; that is counted, not fatal.
	if unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, sndBuf) != nil {
		_ = unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, sndBuf)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.conn = c
}

// detach ends with the connection. Afterwards nobody is in its descriptor.
func (r *rx) detach() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.rest = nil
	r.await(false)
	r.conn = nil
}

// Push sends frames to the guest. See engine.Port.
func (d *Device) Push(_ int, fs []*frame.Frame) {
	if d.tx.down.Load() {
		for _, f := range fs {
			d.rx.drop(f, frame.QueueStopped)
		}
		return
	}
	d.rx.push(fs, false)
}

// resume sends what was left over of a frame. A worker woke up for it.
func (d *Device) resume() { d.rx.push(nil, true) }

func (r *rx) push(fs []*frame.Frame, again bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.conn == nil {
		for _, f := range fs {
			r.drop(f, frame.QueueStopped)
		}
		return
	}
	r.begin()
	// A fault in a sender's memory may end the batch: what is staged by then is
	// whole.
	defer r.await(again)
	defer r.flush()
	for _, f := range fs {
		r.add(f)
	}
}

// begin stages what was left over before anything else.
func (r *rx) begin() {
	r.stop = frame.ReasonNone
	if len(r.rest) == 0 {
		return
	}
	setIov(&r.iovs[0], r.rest)
	r.units[0] = unit{end: len(r.rest)}
	r.n, r.niov, r.bytes = 1, 1, len(r.rest)
}

// add stages one frame in the form that every NIC can take.
func (r *rx) add(f *frame.Frame) {
	switch {
	case r.stop != frame.ReasonNone:
		r.drop(f, r.stop)
	case f.GSO != frame.GSONone:
		r.segment(f)
	default:
		if f.Flags&frame.NeedsCsum != 0 {
			f.CompleteChecksum()
		}
		r.stage(f, f, true)
	}
}

// segment stages a GSO frame in pieces. What does not fit is lost as on any
// full link; the frame counts as dropped only if nothing of it went through.
func (r *rx) segment(f *frame.Frame) {
	if r.seg == nil {
		r.seg = new(frame.Segmenter)
	}
	if !r.seg.Start(f) {
		r.drop(f, frame.BadOffload)
		return
	}
	first := true
	for s := r.seg.Next(); s != nil; s = r.seg.Next() {
		r.stage(s, f, first)
		first = false
	}
}

// stage adds f, which is owner or a segment of it, to what flush sends: length
// and head copied, the tail in pieces as it lies.
func (r *rx) stage(f, owner *frame.Frame, first bool) {
	pieces := 1 + len(f.Tail)
	if r.n == maxUnits || r.niov+pieces > iovMax {
		r.flush()
	}
	u := unit{f: owner, first: first, iov: r.niov}
	if r.stop != frame.ReasonNone {
		r.lose(&u, r.stop)
		return
	}
	h, n := &r.heads[r.n], r.niov+1
	var size int
	if f.Len <= frame.HeadSize {
		for size = f.CopyTo(h[lenSize:]); size < minWire; size++ {
			h[lenSize+size] = 0
		}
	} else {
		size = copy(h[lenSize:], f.Head[:f.HeadLen])
	}
	setIov(&r.iovs[u.iov], h[:lenSize+size])
	if f.Len > frame.HeadSize {
		tail := f.Tail
		if pieces > iovMax {
			tail = r.flatten(f)
		}
		for _, t := range tail {
			if len(t) > 0 {
				setIov(&r.iovs[n], t)
				size += len(t)
				n++
			}
		}
	}
	if size > frame.MaxLen {
		r.lose(&u, frame.OversizeFrame)
		return
	}
	binary.BigEndian.PutUint32(h[:], uint32(size))
	r.bytes += lenSize + size
	u.end = r.bytes
	r.units[r.n] = u
	r.n++
	r.niov = n
}

// flatten makes one piece of the tail of a frame that has too many. There is
// room for one such frame at a time: stage has flushed what was before, and
// will before the next.
func (r *rx) flatten(f *frame.Frame) [][]byte {
	if r.flat == nil {
		r.flat = make([]byte, frame.MaxLen)
	}
	n := 0
	for _, t := range f.Tail {
		n += copy(r.flat[n:], t)
	}
	r.one[0] = r.flat[:n]
	return r.one[:]
}

// flush sends what is staged. What the socket takes a part of is kept to its
// end; what it does not take at all is lost.
func (r *rx) flush() {
	units, iovs := r.units[:r.n], r.iovs[:r.niov]
	r.n, r.niov, r.bytes = 0, 0, 0
	defer func() {
		// What was lent may be unmapped once the frames are given back.
		clear(iovs)
		clear(units)
	}()
	i, sent := 0, 0 // units and bytes that are done with
	for alone := false; i < len(units) && r.stop == frame.ReasonNone; {
		last, end := len(units), len(iovs)
		if alone && i+1 < last {
			last, end = i+1, units[i+1].iov
		}
		n, errno := send(r.conn.fd, &r.msg, iovs[units[i].iov:end])
		switch errno {
		case 0:
			for n += sent; i < last && units[i].end <= n; i++ {
				r.took(&units[i], units[i].end-sent)
				sent = units[i].end
			}
			if i == last {
				continue
			}
			r.stop = frame.NoBuffer
			if n > sent {
				u := &units[i]
				i++
				r.cut(u, iovs[u.iov:], n-sent, u.end-sent)
			}
		case unix.EINTR:
		case unix.EFAULT: // some sender's memory has gone away: find out whose
			if alone {
				r.lose(&units[i], frame.SendFailed)
				sent = units[i].end
				i++
			}
			alone = true
		case unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM:
			r.stop = frame.NoBuffer
		default:
			r.hangUp()
		}
	}
	for ; i < len(units); i++ {
		r.lose(&units[i], r.stop)
	}
}

// took notes that the socket has a unit of that many bytes.
func (r *rx) took(u *unit, size int) {
	if u.f == nil {
		r.rest = nil
		return
	}
	r.frames++
	r.octets += uint64(size - lenSize)
}

// cut keeps the end of a unit of which the socket took n bytes.
func (r *rx) cut(u *unit, pieces []unix.Iovec, n, size int) {
	if u.f == nil {
		r.rest = r.rest[n:]
		return
	}
	r.took(u, size)
	r.split++
	// QEMU waits for as many bytes as it was told. If a fault in the sender's
	// memory ends the copy, it gets them nevertheless, as zeros.
	r.rest = r.keep[:size-n]
	clear(r.rest)
	at := 0
	for i := 0; at < len(r.rest); i++ {
		p := bytesOf(&pieces[i])
		if n >= len(p) {
			n -= len(p)
			continue
		}
		at += copy(r.rest[at:], p[n:])
		n = 0
	}
}

// lose notes that a unit is not sent. What was left over stays.
func (r *rx) lose(u *unit, reason frame.DropReason) {
	if u.f == nil {
		return
	}
	r.count.drop(reason)
	if u.first {
		u.f.Drop(reason)
	}
}

func (r *rx) drop(f *frame.Frame, reason frame.DropReason) {
	f.Drop(reason)
	r.count.drop(reason)
}

// hangUp ends the connection after an error: no frame can be sent any more.
// What the guest sent before is still there for Pull, and then the end.
func (r *rx) hangUp() {
	r.stop, r.rest = frame.QueueStopped, nil
	_ = unix.Shutdown(r.conn.fd, unix.SHUT_RDWR) // it fails where there is no peer, and so an end, already
}

// await ends a batch. If something is left over, a worker wakes up when there
// is room for it; again asks for that anew, after one did.
func (r *rx) await(again bool) {
	if r.frames > 0 {
		r.count.rxFrames.Add(r.frames)
		r.count.rxBytes.Add(r.octets)
		r.count.rxSplit.Add(r.split)
		r.frames, r.octets, r.split = 0, 0, 0
	}
	waits := len(r.rest) > 0
	if r.armed && (again || !waits) {
		_ = unix.EpollCtl(r.room, unix.EPOLL_CTL_DEL, r.conn.fd, nil) // it is there
		r.armed = false
	}
	if waits && !r.armed {
		ev := unix.EpollEvent{Events: unix.EPOLLOUT, Fd: int32(r.conn.fd)}
		// Should the kernel have no memory for this, the next batch goes on.
		r.armed = unix.EpollCtl(r.room, unix.EPOLL_CTL_ADD, r.conn.fd, &ev) == nil
	}
	if r.waits.Load() != waits {
		r.waits.Store(waits)
	}
}
