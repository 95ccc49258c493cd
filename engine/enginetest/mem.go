package enginetest

import (
	"bytes"
	"sync"
	"time"

	"sidewire/engine/frame"
)

// Packet is a private copy of a frame.
type Packet struct {
	Bytes   []byte
	Offload frame.Offload
	Queue   uint16       // queue pair of the frame
	In, Out frame.PortID // as the frame had them
	Worker  int          // who pushed it
}

// MemPort is an engine.Port that keeps copies of what is pushed to it. The
// zero value is ready. It is safe for concurrent use.
type MemPort struct {
	// Refuse, if set before use, is asked for every frame: any reason other
	// than ReasonNone drops it.
	Refuse func(*frame.Frame) frame.DropReason

	mu   sync.Mutex // guards got
	got  []Packet
	wake chan struct{}
}

// Push is the engine.Port method.
func (p *MemPort) Push(worker int, fs []*frame.Frame) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, f := range fs {
		if p.Refuse != nil {
			if r := p.Refuse(f); r != frame.ReasonNone {
				f.Drop(r)
				continue
			}
		}
		p.got = append(p.got, Packet{f.Bytes(), f.Offload, f.Queue, f.In, f.Out, worker})
	}
	if p.wake != nil {
		close(p.wake)
		p.wake = nil
	}
}

// Len is how many packets wait.
func (p *MemPort) Len() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.got)
}

// Take returns the packets that wait, and forgets them.
func (p *MemPort) Take() []Packet {
	p.mu.Lock()
	defer p.mu.Unlock()
	got := p.got
	p.got = nil
	return got
}

// Next takes the oldest packet, for which it waits up to d.
func (p *MemPort) Next(d time.Duration) (Packet, bool) {
	timeout := time.NewTimer(d)
	defer timeout.Stop()
	for {
		p.mu.Lock()
		if len(p.got) > 0 {
			first := p.got[0]
			p.got = p.got[1:]
			p.mu.Unlock()
			return first, true
		}
		if p.wake == nil {
			p.wake = make(chan struct{})
		}
		wake := p.wake
		p.mu.Unlock()
		select {
		case <-wake:
		case <-timeout.C:
			return Packet{}, false
		}
	}
}

// MemQueue is an engine.Queue that is fed with byte frames. The zero value is
// ready. Feed is safe for concurrent use; the other methods belong to the
// queue's worker, and the accessors behind them to whoever waits for it.
type MemQueue struct {
	// OnFeed, if set before use, is called after a Feed while the queue is
	// armed: the worker's wake-up.
	OnFeed func()

	mu       sync.Mutex // guards what follows
	waiting  []Packet
	lent     []Packet
	armed    bool
	released int
	dropped  [frame.NumReasons]int
}

// Feed adds copies of frames.
func (q *MemQueue) Feed(frames ...[]byte) {
	for _, b := range frames {
		q.FeedPacket(Packet{Bytes: bytes.Clone(b)})
	}
}

// FeedPacket adds a frame with its offload and queue; it keeps p.Bytes.
func (q *MemQueue) FeedPacket(p Packet) {
	q.mu.Lock()
	q.waiting = append(q.waiting, p)
	wake := q.armed && q.OnFeed != nil
	q.mu.Unlock()
	if wake {
		q.OnFeed()
	}
}

// Pull is the engine.Queue method.
func (q *MemQueue) Pull(b *frame.Batch) int {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := 0
	for n < len(q.waiting) {
		f := b.Next()
		if f == nil {
			break
		}
		p := q.waiting[n]
		segs := b.Segs(1)
		if segs == nil {
			b.Undo()
			break
		}
		f.SetBytes(p.Bytes, nil, segs)
		f.Offload, f.Queue, f.Token = p.Offload, p.Queue, uint32(n)
		n++
	}
	q.lent = append(q.lent[:0], q.waiting[:n]...)
	q.waiting = q.waiting[n:]
	return n
}

// Release is the engine.Queue method.
func (q *MemQueue) Release(b *frame.Batch) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i := range len(q.lent) {
		if f := b.Frame(i); f.Out == frame.Drop {
			q.dropped[f.Reason]++
		}
	}
	q.released += len(q.lent)
	q.lent = q.lent[:0]
}

// Arm is the engine.Queue method.
func (q *MemQueue) Arm() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.armed = true
	return len(q.waiting) > 0
}

// Disarm is the engine.Queue method.
func (q *MemQueue) Disarm() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.armed = false
}

// Released is how many frames came back.
func (q *MemQueue) Released() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.released
}

// Dropped is how many frames came back with the verdict Drop and this reason.
func (q *MemQueue) Dropped(r frame.DropReason) int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.dropped[r]
}

// Fill empties b and puts the frames into it as a Pull would, for tests of a
// stage.
func Fill(b *frame.Batch, frames ...[]byte) {
	b.Reset(b.Now)
	for _, p := range frames {
		f := b.Next()
		f.SetBytes(p, nil, b.Segs(1))
	}
}
