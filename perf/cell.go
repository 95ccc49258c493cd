package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"time"
)

var nan = math.NaN()

// The packet paths.
const (
	guestTx      = "guest tx"
	guestRx      = "guest rx"
	guestToGuest = "guest to guest"
	roundTrip    = "round trip"
)

// cell is one point of the matrix of packet paths.
type cell struct {
	Path   string
	Size   int // of a frame, in bytes, without FCS
	Packed bool
	Queues int  // pairs of each device
	Ports  int  // of the switch
	FDB    int  // addresses, 0: one each
	Kicks  bool // the backend sleeps when it has nothing to do
	Single bool // one frame under way from each port, rather than bursts
	GSO    bool // long TCP frames, which both guests take whole, in one direction

	Listens bool // the frontend does, and the backend connects
}

// devices is how many guests take part.
func (c cell) devices() int {
	if c.Path == guestTx || c.Path == guestRx {
		return 1
	}
	return max(2, c.Ports)
}

// poll is sidewire's flag.
func (c cell) poll() string {
	if c.Kicks {
		return "never"
	}
	return "always"
}

func (c cell) String() string {
	ring := "split"
	if c.Packed {
		ring = "packed"
	}
	s := fmt.Sprintf("%s, %d B, %s", c.Path, c.Size, ring)
	if c.GSO {
		s = fmt.Sprintf("%s, 64 KiB GSO, %s", c.Path, ring)
	}
	if c.Queues > 1 {
		s += fmt.Sprintf(", %d queues", c.Queues)
	}
	if c.Ports > 2 {
		s += fmt.Sprintf(", %d ports", c.Ports)
	}
	if c.FDB > 0 {
		s += fmt.Sprintf(", %d addresses", c.FDB)
	}
	if c.Single {
		s += ", single frames"
	}
	if c.Kicks {
		s += ", with kicks"
	}
	return s
}

// subjects are who is measured in the cell; the A/A run and all peers in every
// one, unless quick.
func (c cell) subjects(p *programs, quick bool) []string {
	between := c.Path == guestToGuest || c.Path == roundTrip
	out := []string{ours}
	switch {
	case quick && c.Path == guestToGuest && c.Size == 64 && !c.Packed:
		out = append(out, oursAgain, pmdIO, ovs)
	case quick:
		out = append(out, pmdIO)
	case between:
		out = append(out, oursAgain, oursFixed, pmdIO, pmdMAC, ovs)
	default:
		out = append(out, oursAgain, pmdIO)
	}
	if between && p.against.sidewire != "" || !between && p.against.perf != "" {
		out = append(out, other)
	}
	return out
}

// goals are the issue's, for those cells that have one.
func (c cell) goals() []goal {
	if c.Queues != 1 || c.Ports > 2 || c.FDB > 0 || c.Kicks || c.GSO {
		return nil
	}
	switch {
	case c.Path == guestToGuest && c.Size == 64:
		busy := 0.55
		if c.Packed {
			busy = 0.8
		}
		return []goal{{mpps.Name, pmdIO, 1.15, 0}, {busyTime.Name, pmdIO, 0, busy}, {mpps.Name, ovs, 2, 0}}
	case c.Path == guestToGuest && c.Size == 1500:
		return []goal{{mpps.Name, pmdIO, 2, 0}, {busyTime.Name, pmdIO, 0, 0.5}}
	case (c.Path == guestTx || c.Path == guestRx) && c.Size == 64:
		return []goal{{mpps.Name, pmdIO, 1, 0}}
	case c.Path == roundTrip && c.Size == 64:
		return []goal{{tripTime.Name, pmdIO, 0, 1.2}}
	}
	return nil
}

// subject is what is measured in a cell: sidewire, or a peer.
type subject struct {
	name string
	open func(ctx context.Context, c cell, dir string) (backend, error)
}

// figures are what one round brought of one subject.
type figures struct {
	frames float64 // a second
	// calls and idle are the system calls of the backend's worker in a frame, and
	// those of them that are no kicks; counted is how many there were. They are
	// NaN where nobody can tell.
	calls, idle, counted float64
	cost
}

// measureCell starts both sides, lets frames flow for a while and ends them.
func measureCell(ctx context.Context, s subject, c cell, d time.Duration) (f figures, err error) {
	dir, err := os.MkdirTemp("", "pf")
	if err != nil {
		return f, err
	}
	defer os.RemoveAll(dir)
	be, err := s.open(ctx, c, dir)
	if err != nil {
		return f, err
	}
	defer be.close()
	if x, ok := be.(interface{ connects(cell) bool }); ok {
		c.Listens = x.connects(c)
	}
	fe, err := startFrontends(ctx, c, be.sockets(), dir)
	if err != nil {
		return f, err
	}
	defer fe.close()
	if err := be.start(); err != nil {
		return f, err
	}
	time.Sleep(settle) // the frontend does not wait until its last messages were read
	if err := fe.begin(c); err != nil {
		return f, err
	}
	time.Sleep(settle)
	if c.FDB > 0 {
		time.Sleep(learning)
	}
	return observe(be, fe, c, d)
}

// observe counts for a while what flows.
func observe(be backend, fe frontends, c cell, d time.Duration) (f figures, err error) {
	if err := be.mark(); err != nil {
		return f, err
	}
	counter, err := startCalls(be.pid())
	counts := err == nil // if not, the report says so
	if counts {
		defer counter.close()
	}
	r, err := fe.rates(d)
	if err != nil {
		return f, err
	}
	var n called
	if counts {
		if n, err = counter.stop(); err != nil {
			return f, err
		}
	}
	if f.frames = c.frames(r); f.frames == 0 {
		return f, errors.New("no frame arrives")
	}
	if c.GSO && r.rxBits/8/r.rx < gsoSize*0.99 {
		return f, fmt.Errorf("frames arrive in pieces of %.0f bytes", r.rxBits/8/r.rx)
	}
	if f.cost, err = be.costs(); err != nil {
		return f, err
	}
	f.calls, f.idle, f.counted = nan, nan, nan
	if counts {
		f.counted = float64(n.all)
		f.calls, f.idle = f.counted/f.moved, float64(n.all-n.kicks)/f.moved
	}
	return f, nil
}
