package vhosttest

import (
	"fmt"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// TapPair joins two taps by plain reads and writes of whole frames with their
// virtio-net headers: what the kernel's own path does between a guest and its
// pod. Each queue has a goroutine on a thread of its own.
type TapPair struct {
	taps  [2][]int
	loops []*loop
}

// StartTapPair makes two taps with that many queues and joins them.
func StartTapPair(a, b Tap, queues int) (*TapPair, error) {
	p := &TapPair{}
	for i, t := range []Tap{a, b} {
		fds, err := t.open(queues, frame.VnetHdrMrgLen, tunAll)
		if err != nil {
			p.Close()
			return nil, fmt.Errorf("vhosttest: %w", err)
		}
		p.taps[i] = fds
	}
	for q := range queues {
		a, b := p.taps[0][q], p.taps[1][q]
		l, err := startLoop(newTapCopier(a, b), a, b)
		if err != nil {
			p.Close()
			return nil, fmt.Errorf("vhosttest: %w", err)
		}
		p.loops = append(p.loops, l)
	}
	return p, nil
}

// Counters are what was carried so far, up to date whenever the pair is idle.
func (p *TapPair) Counters() (c Counters) {
	for _, l := range p.loops {
		c.add(l.stats())
	}
	return c
}

// Close ends the goroutines and removes the taps. It returns what ended one of
// them early, if anything did.
func (p *TapPair) Close() error {
	err := haltAll(p.loops)
	p.loops = nil
	for i := range p.taps {
		closeFds(p.taps[i])
		p.taps[i] = nil
	}
	return err
}

// tapCopier joins one queue of each tap.
type tapCopier struct {
	way [2]oneWay
}

// oneWay is one direction, with a frame that the other tap did not take yet.
type oneWay struct {
	from, to               int
	buf                    []byte
	held                   []byte
	frames, bytes, dropped uint64
}

func newTapCopier(a, b int) *tapCopier {
	return &tapCopier{[2]oneWay{
		{from: a, to: b, buf: make([]byte, maxFrame)},
		{from: b, to: a, buf: make([]byte, maxFrame)},
	}}
}

func (c *tapCopier) counters() Counters {
	a, b := &c.way[0], &c.way[1]
	return Counters{a.frames, a.bytes, a.dropped, b.frames, b.bytes, b.dropped}
}

func (c *tapCopier) arm() bool { return false } // the epoll's edges are enough

func (c *tapCopier) move() (busy bool, err error) {
	for i := range c.way {
		b, err := c.way[i].move()
		if err != nil {
			return busy, err
		}
		busy = busy || b
	}
	return busy, nil
}

func (w *oneWay) move() (busy bool, err error) {
	for range tapBudget {
		if w.held == nil {
			n, err := readNow(w.from, w.buf)
			if err == unix.EAGAIN {
				return busy, nil
			}
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				return busy, fmt.Errorf("read from tap: %w", err)
			}
			w.held = w.buf[:n]
		}
		_, err := writeNow(w.to, w.held)
		switch {
		case err == nil:
			w.frames++
			w.bytes += uint64(len(w.held) - frame.VnetHdrMrgLen)
		case err == unix.EAGAIN:
			return busy, nil
		case err == unix.EINTR:
			continue
		case dropped(err):
			w.dropped++
		default:
			return busy, fmt.Errorf("write to tap: %w", err)
		}
		w.held = nil
		busy = true
	}
	return busy, nil
}
