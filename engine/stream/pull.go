package stream

import (
	"encoding/binary"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

const (
	// lenSize is the length of the length before a frame, in network order.
	lenSize = 4
	// bufSize is the room for what one system call brings: a batch of frames
	// of 1514 bytes behind a part of the longest one. Of it, only touched pages
	// cost memory.
	bufSize = 256 << 10
)

// tx is what the guest sends.
type tx struct {
	count *counters
	max   int // longest frame

	// mu guards all below; the worker holds it for one batch, the control plane
	// to put a connection in or to take it out, and neither waits for anything
	// meanwhile.
	mu   sync.Mutex
	conn *conn // nil while there is none to receive from
	// buf[r:w] is received and not yet lent. What is before r is lent until
	// Release: nothing is written there before the next Pull.
	buf  []byte
	r, w int
	// drained says that the socket was empty when it was last asked, which is
	// done when the buffer has no frame any more; so what comes makes an edge
	// for epoll.
	drained bool

	// A worker that has much to do elsewhere asks a socket less often which
	// rarely has anything: each question is a system call. What comes while it
	// rests makes an edge, and Arm ends the rest.
	misses, rest uint8

	down atomic.Bool // see Device.SetLink
}

// restAfter is how many times in vain make the socket rest for one turn more,
// and restMax how many turns it rests at most.
const (
	restAfter = 16
	restMax   = 3
)

func (t *tx) init(c *counters, mtu int) {
	t.count, t.max, t.buf = c, frame.MaxLen, make([]byte, bufSize)
	if mtu > 0 {
		t.max = min(t.max, mtu+frame.EthernetLen+vlanLen)
	}
}

// attach begins with a connection.
func (t *tx) attach(c *conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.conn, t.drained = c, false
}

// detach ends with a connection. Afterwards nobody is in its descriptor.
func (t *tx) detach(c *conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.end(c, running)
}

// end forgets a connection for a cause, if it is not forgotten yet, and what
// came over it.
func (t *tx) end(c *conn, why cause) {
	if t.conn != c || c == nil {
		return
	}
	if why != running {
		c.end(why)
	}
	t.conn = nil
	t.r, t.w = 0, 0
}

// Pull adds what the guest sent to an empty batch. See engine.Queue. It also
// ends what a Push had to leave unfinished.
func (d *Device) Pull(b *frame.Batch) int {
	if d.rx.waits.Load() {
		d.resume()
	}
	t := &d.tx
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.parse(b)
	if n == 0 && t.conn != nil && !b.Waiting && t.receive() {
		n = t.parse(b)
	}
	return n
}

// parse makes frames of what was received, until the batch is full.
func (t *tx) parse(b *frame.Batch) (n int) {
	octets := 0
	down := t.down.Load()
	// Frames that are dropped count too: a turn ends, whatever came.
	for range frame.BatchSize {
		size, whole := t.next()
		if !whole {
			break
		}
		p := t.buf[t.r+lenSize : t.r+lenSize+size : t.r+lenSize+size]
		t.r += lenSize + size
		switch {
		case down:
			t.count.drop(frame.QueueStopped)
			continue
		case size < frame.EthernetLen:
			t.count.drop(frame.ShortFrame)
			continue
		case size > t.max:
			t.count.drop(frame.OversizeFrame)
			continue
		}
		f := b.Next()
		f.Len, f.HeadLen = int32(size), uint16(copy(f.Head[:], p))
		if size > frame.HeadSize {
			f.Tail = append(b.Segs(1), p[frame.HeadSize:])
		}
		octets += size
		n++
	}
	if n > 0 {
		t.count.txFrames.Add(uint64(n))
		t.count.txBytes.Add(uint64(octets))
	} else {
		_, b.Waiting = t.next()
	}
	return n
}

// next returns the length of the frame that comes next, and whether all of it
// is there. A length that cannot be one ends the connection.
func (t *tx) next() (size int, whole bool) {
	have := t.buf[t.r:t.w]
	if len(have) < lenSize {
		return 0, false
	}
	n := binary.BigEndian.Uint32(have)
	if n == 0 || n > frame.MaxLen {
		t.end(t.conn, badLength)
		return 0, false
	}
	return int(n), len(have)-lenSize >= int(n)
}

// receive fetches what is there and reports whether there was anything. The
// buffer holds no whole frame.
func (t *tx) receive() bool {
	if t.rest > 0 {
		t.rest--
		return false
	}
	t.w = copy(t.buf, t.buf[t.r:t.w]) // less than the longest frame
	t.r = 0
	n, errno := recv(t.conn.fd, t.buf[t.w:])
	switch {
	case n > 0:
		t.w += n
		t.drained, t.misses = false, 0
		return true
	case errno == unix.EAGAIN:
		t.drained = true
		t.misses = min(t.misses+1, restAfter*restMax)
		t.rest = t.misses / restAfter
	case errno == unix.EINTR:
	case errno != 0 && errno != unix.ECONNRESET: // that is QEMU gone with frames unread
		t.end(t.conn, failed)
	case t.w > 0:
		t.end(t.conn, cutFrame)
	default:
		t.end(t.conn, hungUp)
	}
	return false
}

// Release gives the buffer back to the next Pull.
func (d *Device) Release(*frame.Batch) {}

// Arm reports whether there may be frames; see engine.Queue. Watching is
// edge-triggered: a socket that was empty wakes its worker by itself.
func (d *Device) Arm() (more bool) {
	t := &d.tx
	t.mu.Lock()
	defer t.mu.Unlock()
	t.rest = 0
	return t.conn != nil && !t.drained
}

// Disarm does nothing: nobody is woken who does not sleep.
func (d *Device) Disarm() {}
