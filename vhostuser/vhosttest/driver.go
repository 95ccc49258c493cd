package vhosttest

import (
	"encoding/binary"
	"fmt"
	"time"

	"sidewire/engine/frame"
)

// Packet is a frame as the guest's driver got it: a private copy.
type Packet struct {
	Bytes      []byte
	Offload    frame.Offload
	NumBuffers int // what the header says, believed with MRG_RXBUF only; 1 where it has no such field
	Buffers    int // over how many buffers it came
}

// buffers are a ring and the buffers that belong to it, one goroutine's.
type buffers struct {
	*Ring
	g      *Guest
	size   int // bytes of each
	count  int
	write  bool     // rx
	at     uint64   // the first one
	tables uint64   // an indirect table for each
	idle   []uint16 // buffers not in flight, LIFO
	byHead []uint16 // the buffer of each chain in flight
	pieces []Buf    // scratch
}

// stride is the distance of buffers. A distance of a multiple of 4096 would put
// all headers into the same sets of the CPU's cache.
func stride(size int) int {
	s := (size + 63) &^ 63
	if s%pageSize == 0 {
		s += 64
	}
	return s
}

// tableLen is the room for a buffer's indirect table.
func (g *Guest) tableLen() int { return (g.Options.Pieces + 1) * descLen }

// headerAlone says whether the header needs a descriptor of its own: so it is
// for legacy devices without ANY_LAYOUT (virtio 1.2, 5.1.6.6).
func (g *Guest) headerAlone() bool {
	return g.Options.SplitHeader || g.Features&(FeatVersion1|FeatAnyLayout) == 0
}

func (g *Guest) newBuffers(index, size int, write bool) (*buffers, error) {
	o := &g.Options
	r, err := g.newRing(index, o.RingSize)
	if err != nil {
		return nil, err
	}
	if size < g.HdrLen {
		return nil, fmt.Errorf("buffers of %d bytes", size)
	}
	b := &buffers{Ring: r, g: g, size: size, count: o.RingSize, write: write, byHead: make([]uint16, o.RingSize)}
	if write && o.RxBuffers > 0 {
		b.count = min(b.count, o.RxBuffers)
	}
	if b.at, err = g.Mem.Alloc(b.count*stride(size), pageSize); err != nil {
		return nil, err
	}
	if b.tables, err = g.Mem.Alloc(b.count*g.tableLen(), descLen); err != nil {
		return nil, err
	}
	b.reset()
	return b, nil
}

func (b *buffers) reset() {
	b.Ring.Reset()
	b.idle = b.idle[:0]
	for i := b.count - 1; i >= 0; i-- {
		b.idle = append(b.idle, uint16(i))
	}
}

func (b *buffers) gpa(i uint16) uint64 { return b.at + uint64(int(i)*stride(b.size)) }

// perChain is the most descriptors that post takes.
func (b *buffers) perChain() int {
	n := 1
	if !b.write {
		n = b.g.Options.Pieces
	}
	if b.g.headerAlone() {
		n++
	}
	if b.g.Options.Indirect && b.g.Features&FeatIndirect != 0 {
		n = 1
	}
	return n
}

// post stages buffer i with n bytes, header included.
func (b *buffers) post(i uint16, n int) error {
	g := b.g
	p := b.pieces[:0]
	at, left := b.gpa(i), n
	take := func(n int) {
		p = append(p, Buf{GPA: at, Len: uint32(n), Write: b.write})
		at, left = at+uint64(n), left-n
	}
	if g.headerAlone() && left > g.HdrLen {
		take(g.HdrLen)
	}
	pieces := 1
	if !b.write {
		pieces = g.Options.Pieces
	}
	for ; pieces > 1 && left >= pieces; pieces-- {
		take(left / pieces)
	}
	take(left)
	b.pieces = p

	var head uint16
	var err error
	if len(p) > 1 && g.Options.Indirect && g.Features&FeatIndirect != 0 {
		head, err = b.PostIndirect(b.tables+uint64(int(i)*g.tableLen()), p...)
	} else {
		head, err = b.Post(p...)
	}
	if err == nil {
		b.byHead[head] = i
	}
	return err
}

// fill posts as many buffers as the ring takes.
func (b *buffers) fill() error {
	for len(b.idle) > 0 {
		i := b.idle[len(b.idle)-1]
		switch err := b.post(i, b.size); err {
		case nil:
			b.idle = b.idle[:len(b.idle)-1]
		case ErrRingFull:
			b.Publish()
			return nil
		default:
			return err
		}
	}
	b.Publish()
	return nil
}

// reap takes a used buffer.
func (b *buffers) reap() (i uint16, n uint32, ok bool, err error) {
	head, n, ok, err := b.Reap()
	if ok {
		i = b.byHead[head]
	}
	return i, n, ok, err
}

// Send puts a frame on the tx ring of queue pair q and kicks if the backend
// wants it. It waits for room up to the guest's limit.
func (g *Guest) Send(q int, b []byte, o frame.Offload) error {
	if err := g.Stage(q, b, o); err != nil {
		return err
	}
	return g.tx[q].Flush()
}

// SendAll puts several frames without offload on the tx ring and publishes
// them together as far as the ring has room.
func (g *Guest) SendAll(q int, frames ...[]byte) error {
	for _, b := range frames {
		if err := g.Stage(q, b, frame.Offload{}); err != nil {
			return err
		}
	}
	return g.tx[q].Flush()
}

// Stage writes a frame to a buffer that the next Flush of the ring shows to
// the backend.
func (g *Guest) Stage(q int, b []byte, o frame.Offload) error {
	t := g.tx[q]
	if g.HdrLen+len(b) > t.size {
		return fmt.Errorf("vhosttest: frame of %d bytes", len(b))
	}
	i, err := t.takeIdle(g.Options.Wait)
	if err != nil {
		return err
	}
	m := g.Mem.At(t.gpa(i), t.size)
	o.Encode(m[:g.HdrLen])
	if g.HdrLen >= frame.VnetHdrMrgLen {
		m[10], m[11] = 0, 0 // num_buffers is the device's to set
	}
	copy(m[g.HdrLen:], b)
	for {
		err := t.post(i, g.HdrLen+len(b))
		if err != ErrRingFull {
			return err
		}
		if err := t.reclaim(g.Options.Wait); err != nil {
			t.idle = append(t.idle, i)
			return err
		}
	}
}

// takeIdle takes a buffer, for which it waits until the backend gives one
// back.
func (b *buffers) takeIdle(wait time.Duration) (uint16, error) {
	if len(b.idle) == 0 {
		if err := b.reclaim(wait); err != nil {
			return 0, err
		}
	}
	i := b.idle[len(b.idle)-1]
	b.idle = b.idle[:len(b.idle)-1]
	return i, nil
}

// reclaim takes back at least one buffer.
func (b *buffers) reclaim(wait time.Duration) error {
	for n := 0; ; n++ {
		i, _, ok, err := b.reap()
		switch {
		case err != nil:
			return err
		case ok:
			b.idle = append(b.idle, i)
			continue
		case n > 0:
			return nil
		}
		n = -1
		if err := b.Flush(); err != nil {
			return err
		}
		if err := b.WaitUsed(wait); err != nil {
			return err
		}
	}
}

// Drain waits until the backend has used everything that was sent on queue
// pair q.
func (g *Guest) Drain(q int, wait time.Duration) error {
	t := g.tx[q]
	if err := t.Flush(); err != nil {
		return err
	}
	for t.lastUsed != t.published {
		if err := t.reclaim(wait); err != nil {
			return err
		}
	}
	return nil
}

// Recv takes the next frame from the rx ring of queue pair q, for which it
// waits, and posts its buffers again.
func (g *Guest) Recv(q int, wait time.Duration) (Packet, error) {
	r := g.rx[q]
	deadline := time.Now().Add(wait)
	p := Packet{NumBuffers: 1}
	for {
		i, n, err := r.nextUsed(deadline)
		if err != nil {
			return Packet{}, err
		}
		r.idle = append(r.idle, i)
		if err := g.take(&p, r, i, int(n)); err != nil {
			return Packet{}, err
		}
		if p.Buffers == p.NumBuffers || g.Features&FeatMrgRxbuf == 0 {
			break
		}
	}
	if err := r.refill(); err != nil {
		return Packet{}, err
	}
	return p, nil
}

// take adds what came in buffer i to p.
func (g *Guest) take(p *Packet, r *buffers, i uint16, n int) error {
	if n > r.size {
		return fmt.Errorf("%w: %d bytes in a buffer of %d", ErrBackend, n, r.size)
	}
	m := g.Mem.At(r.gpa(i), n)
	p.Buffers++
	if p.Buffers > 1 {
		p.Bytes = append(p.Bytes, m...)
		return nil
	}
	if n < g.HdrLen {
		return fmt.Errorf("%w: %d bytes are less than a header", ErrBackend, n)
	}
	p.Offload.Decode(m)
	p.Bytes = append(p.Bytes, m[g.HdrLen:]...)
	if g.HdrLen == frame.VnetHdrMrgLen {
		p.NumBuffers = int(binary.LittleEndian.Uint16(m[10:]))
		// Without MRG_RXBUF it must be 1 (virtio 1.2, 5.1.6.4.1), but drivers do
		// not look, and DPDK leaves 0 there.
		if p.NumBuffers == 0 && g.Features&FeatMrgRxbuf != 0 {
			return fmt.Errorf("%w: num_buffers is %d", ErrBackend, p.NumBuffers)
		}
	}
	return nil
}

// nextUsed waits for a used buffer.
func (b *buffers) nextUsed(deadline time.Time) (uint16, uint32, error) {
	for {
		i, n, ok, err := b.reap()
		if ok || err != nil {
			return i, n, err
		}
		if err := b.WaitUsed(time.Until(deadline)); err != nil {
			return 0, 0, err
		}
	}
}

// refill posts the buffers that came back.
func (b *buffers) refill() error {
	for len(b.idle) > 0 {
		i := b.idle[len(b.idle)-1]
		if err := b.post(i, b.size); err != nil {
			if err == ErrRingFull {
				break
			}
			return err
		}
		b.idle = b.idle[:len(b.idle)-1]
	}
	return b.Flush()
}
