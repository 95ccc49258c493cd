package vhosttest

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// TapOptions say what guest to play and where its NIC is. MAC and MTU of the
// Options are also the tap's; what the tap leaves to the device follows from
// the negotiated features.
type TapOptions struct {
	Options
	NetNS string // the guest's namespace, a path for setns; empty is the caller's own
	Name  string // of the tap; empty means eth0
}

// TapGuest is a guest without a hypervisor: a tap in a namespace each of whose
// queues is joined to a queue pair by a goroutine on a thread of its own.
//
// Frames are read straight into tx buffers and written straight from rx
// buffers; nothing is allocated for them.
type TapGuest struct {
	// Guest is the session. Its messages may be sent at any time, its rings
	// belong to the goroutines while they run.
	Guest *Guest

	taps  []int
	loops []*loop
	total Counters // of loops that have ended
}

// StartTapGuest connects to a backend, makes the tap and joins the two. The
// tap has no address yet; a DHCP client or the caller gives it one.
func StartTapGuest(o TapOptions) (*TapGuest, error) {
	g, err := Connect(o.Options)
	if err != nil {
		return nil, err
	}
	t := &TapGuest{Guest: g}
	tap := Tap{NetNS: o.NetNS, Name: o.Name, MTU: int(o.MTU), MAC: o.MAC}
	if t.taps, err = tap.open(g.Options.QueuePairs, g.HdrLen, tunOffloads(g.Features)); err == nil {
		err = t.start()
	}
	if err != nil {
		t.Close()
		return nil, fmt.Errorf("vhosttest: %w", err)
	}
	return t, nil
}

func (t *TapGuest) start() error {
	for q, fd := range t.taps {
		p := newTapQueue(t.Guest, q, fd)
		l, err := startLoop(p, fd, p.rx.Call, p.tx.Call)
		if err != nil {
			return err
		}
		t.loops = append(t.loops, l)
	}
	return nil
}

// Pause ends the goroutines; the rings stay as they are and may be used by the
// caller until Continue.
func (t *TapGuest) Pause() error {
	err := haltAll(t.loops)
	for _, l := range t.loops {
		t.total.add(l.published)
	}
	t.loops = nil
	return err
}

// Continue undoes Pause.
func (t *TapGuest) Continue() error { return t.start() }

// Reconnect waits for a backend that replaces one that is gone, and goes on
// with it.
func (t *TapGuest) Reconnect() error {
	if err := t.Pause(); err != nil {
		return err
	}
	if err := t.Guest.Reconnect(); err != nil {
		return err
	}
	return t.start()
}

// Counters are what was carried so far, up to date whenever the guest is idle.
func (t *TapGuest) Counters() Counters {
	c := t.total
	for _, l := range t.loops {
		c.add(l.stats())
	}
	return c
}

// Err returns what ended one of the goroutines, or nil while they all run.
func (t *TapGuest) Err() error {
	for _, l := range t.loops {
		select {
		case <-l.done:
			return l.err
		default:
		}
	}
	return nil
}

// Close ends the guest and removes the tap. It returns what ended one of the
// goroutines early, if anything did.
func (t *TapGuest) Close() error {
	err := t.Pause()
	closeFds(t.taps)
	t.taps = nil
	return errors.Join(err, t.Guest.Close())
}

const (
	// tapBudget is how many frames one direction carries before the other gets
	// its turn.
	tapBudget = 64
	// publishChunk is how many frames are read before the backend is shown
	// them: it works on them while the next are read.
	publishChunk = 8
	// maxMerge is the most buffers that one frame may span: the kernel takes no
	// more pieces in one call.
	maxMerge = 1024
)

// tapQueue joins one queue of a tap to a queue pair.
type tapQueue struct {
	g      *Guest
	tap    int
	rx, tx *buffers
	n      Counters

	need int  // descriptors that a tx chain may take
	full bool // the tap may have frames that there was no room for

	// The frame on its way to the tap: its buffers and what they hold, and how
	// many there are to be. It is whole when len(iov) == want.
	held []uint16
	iov  []unix.Iovec
	size int
	want int
}

func newTapQueue(g *Guest, q, tap int) *tapQueue {
	return &tapQueue{g: g, tap: tap, rx: g.rx[q], tx: g.tx[q], need: g.tx[q].perChain(),
		held: make([]uint16, 0, maxMerge), iov: make([]unix.Iovec, 0, maxMerge)}
}

func (p *tapQueue) counters() Counters { return p.n }

func (p *tapQueue) move() (busy bool, err error) {
	p.rx.Disarm()
	p.tx.Disarm()
	rx, err := p.toTap()
	if err != nil {
		return false, err
	}
	tx, err := p.fromTap()
	return rx || tx, err
}

func (p *tapQueue) arm() (more bool) {
	more = p.rx.Arm() && !p.whole() // a whole frame waits for the tap, not for the ring
	if p.full {
		more = p.tx.Arm() || more
	}
	return more
}

// fromTap reads frames into tx buffers until there are no more of either.
func (p *tapQueue) fromTap() (busy bool, err error) {
	t := p.tx
	if err := t.takeBack(); err != nil {
		return false, err
	}
	staged := 0
	for n := 0; n < tapBudget; n++ {
		if !p.room() {
			if err := t.takeBack(); err != nil {
				return busy, err
			}
		}
		if p.full = !p.room(); p.full {
			break
		}
		ok, err := p.readOne()
		if err != nil {
			return busy, err
		}
		if !ok {
			break
		}
		busy = true
		if staged++; staged == publishChunk {
			staged = 0
			if err := t.Flush(); err != nil {
				return busy, err
			}
		}
	}
	return busy, t.Flush()
}

// room says whether one more frame can be read and posted.
func (p *tapQueue) room() bool { return len(p.tx.idle) > 0 && p.tx.Free() >= p.need }

// readOne reads one frame into a buffer and stages it.
func (p *tapQueue) readOne() (ok bool, err error) {
	t := p.tx
	i := t.idle[len(t.idle)-1]
	m := p.g.Mem.At(t.gpa(i), t.size)
	n, err := readNow(p.tap, m)
	switch err {
	case nil:
	case unix.EAGAIN:
		return false, nil
	case unix.EINTR:
		return true, nil
	default:
		return false, fmt.Errorf("read from tap: %w", err)
	}
	if n <= p.g.HdrLen {
		p.n.TxDropped++
		return true, nil
	}
	if p.g.HdrLen == frame.VnetHdrMrgLen {
		m[10], m[11] = 0, 0 // num_buffers is the device's to set; the tap leaves it as it was
	}
	if err := t.post(i, n); err != nil {
		return false, err
	}
	t.idle = t.idle[:len(t.idle)-1]
	p.n.TxFrames++
	p.n.TxBytes += uint64(n - p.g.HdrLen)
	return true, nil
}

// takeBack takes the buffers that the device has used.
func (b *buffers) takeBack() error {
	for {
		i, _, ok, err := b.reap()
		if !ok || err != nil {
			return err
		}
		b.idle = append(b.idle, i)
	}
}

func (p *tapQueue) whole() bool { return p.want > 0 && len(p.iov) == p.want }

// toTap writes frames from rx buffers to the tap and posts the buffers again.
func (p *tapQueue) toTap() (busy bool, err error) {
	for n := 0; n < tapBudget; n++ {
		for !p.whole() {
			i, size, ok, err := p.rx.reap()
			if err != nil {
				return busy, err
			}
			if !ok {
				return busy, p.rx.refill()
			}
			if err := p.gather(i, int(size)); err != nil {
				return busy, err
			}
		}
		sent, err := p.writeOne()
		if err != nil {
			return busy, err
		}
		if !sent {
			break
		}
		busy = true
		if len(p.rx.idle) >= p.rx.count/4 {
			if err := p.rx.refill(); err != nil {
				return busy, err
			}
		}
	}
	return busy, p.rx.refill()
}

// gather adds a used buffer to the frame on its way.
func (p *tapQueue) gather(i uint16, n int) error {
	if n > p.rx.size || n == 0 {
		return fmt.Errorf("%w: %d bytes in a buffer of %d", ErrBackend, n, p.rx.size)
	}
	m := p.g.Mem.At(p.rx.gpa(i), n)
	if len(p.iov) == 0 {
		p.want = 1
		if n < p.g.HdrLen {
			return fmt.Errorf("%w: %d bytes are less than a header", ErrBackend, n)
		}
		if p.g.Features&FeatMrgRxbuf != 0 {
			p.want = int(binary.LittleEndian.Uint16(m[10:]))
		}
		if p.want == 0 || p.want > maxMerge {
			return fmt.Errorf("%w: num_buffers is %d", ErrBackend, p.want)
		}
		believeValid(m, p.g.HdrLen)
	}
	p.held = append(p.held, i)
	p.iov = append(p.iov, iovec(m))
	p.size += n
	return nil
}

// writeOne writes the frame on its way. It reports false if the tap takes no
// more for now.
func (p *tapQueue) writeOne() (sent bool, err error) {
	if len(p.iov) == 1 {
		_, err = writeNow(p.tap, p.g.Mem.At(p.rx.gpa(p.held[0]), p.size))
	} else {
		_, err = writev(p.tap, p.iov)
	}
	switch {
	case err == nil:
		p.n.RxFrames++
		p.n.RxBytes += uint64(p.size - p.g.HdrLen)
	case err == unix.EAGAIN:
		return false, nil
	case err == unix.EINTR:
		return true, nil
	case dropped(err):
		p.n.RxDropped++
	default:
		return false, fmt.Errorf("write to tap: %w", err)
	}
	p.rx.idle = append(p.rx.idle, p.held...)
	p.held, p.iov, p.size, p.want = p.held[:0], p.iov[:0], 0, 0
	return true, nil
}
