package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"time"

	"sidewire/engine/enginetest"
)

// The subjects of the packet paths.
const (
	ours      = "sidewire"
	oursAgain = "sidewire again (A/A)"
	oursFixed = "sidewire, fixed forward"
	other     = "the other sidewire"
	pmdIO     = "testpmd io"
	pmdMAC    = "testpmd mac"
	ovs       = "OVS-DPDK NORMAL"
)

// The metrics of the packet paths.
var (
	mpps     = metric{Name: "rate", Unit: "Mpps"}
	busyTime = metric{Name: "busy time", Unit: "ns/frame", Less: true}
	tripTime = metric{Name: "round trip", Unit: "us", Less: true}
	allocs   = metric{Name: "allocations", Unit: "per frame", Less: true, Plain: true}
	// Those of the thread that moves frames, counted one by one.
	syscalls = metric{Name: "system calls", Unit: "per frame", Less: true, Plain: true}
	idle     = metric{Name: "system calls that are no kicks", Unit: "per frame", Less: true, Plain: true}
	counted  = metric{Name: "system calls in all", Unit: "number in the time measured", Less: true, Plain: true}
	// processors is how near the two sides' processors were to each other,
	// which the host decides on a virtual machine.
	processors = metric{Name: "a cache line's way", Unit: "ns", Less: true, Plain: true}
	dropped    = metric{Name: "dropped", Unit: "frames", Less: true, Plain: true}
)

// programs are what is measured. They are built after the trials are drawn up.
type programs struct {
	self     string // this one
	sidewire string
	against  rival
	flags    string // further ones for sidewire run
}

// subjects are all ways through the packet paths, by name.
func (p *programs) subjects() map[string]subject {
	open := map[string]func(ctx context.Context, c cell, dir string) (backend, error){
		ours: func(ctx context.Context, c cell, dir string) (backend, error) {
			return openOurs(ctx, p.self, p.sidewire, p.flags, c, dir)
		},
		oursAgain: func(ctx context.Context, c cell, dir string) (backend, error) {
			return openOurs(ctx, p.self, p.sidewire, p.flags, c, dir)
		},
		other: func(ctx context.Context, c cell, dir string) (backend, error) {
			return openOurs(ctx, p.against.perf, p.against.sidewire, p.flags, c, dir)
		},
		oursFixed: func(ctx context.Context, c cell, dir string) (backend, error) {
			return openInner(ctx, p.self, c, dir, "forward")
		},
		pmdIO: func(ctx context.Context, c cell, dir string) (backend, error) { return openVhostPMD(ctx, c, dir, "io") },
		ovs:   openOVS,
		pmdMAC: func(ctx context.Context, c cell, dir string) (backend, error) {
			return openVhostPMD(ctx, c, dir, "mac")
		},
	}
	out := map[string]subject{}
	for name, f := range open {
		out[name] = subject{name, f}
	}
	return out
}

// openOurs opens what sidewire has for a cell: the program itself where guests
// talk to each other, its engine and device alone where there is one guest.
func openOurs(ctx context.Context, perf, sidewire, flags string, c cell, dir string) (backend, error) {
	switch {
	case c.Path == guestTx:
		return openInner(ctx, perf, c, dir, "sink")
	case c.Path == guestRx:
		return openInner(ctx, perf, c, dir, "source")
	case c.FDB > 0:
		// More than the program lets a guest have.
		return openInner(ctx, perf, c, dir, "switch")
	}
	return openProgram(ctx, sidewire, flags, c, dir)
}

// missing says why a subject cannot be measured in a cell here.
func (p *programs) missing(name string, c cell) error {
	_, errPMD := enginetest.Program("dpdk-testpmd")
	_, errOVS := ovsProgram()
	switch {
	case errPMD != nil:
		return errors.New("no dpdk-testpmd (package dpdk-dev)")
	case name == ovs && errOVS != nil:
		return errOVS
	case c.Kicks && (name == pmdIO || name == pmdMAC || name == ovs):
		return errors.New("it always polls")
	case c.Ports > maxPorts && name != ours && name != oursAgain:
		return fmt.Errorf("DPDK is built for %d ports", maxPorts)
	}
	return nil
}

// packetTrials are the rows of the packet paths.
func (p *programs) packetTrials(cells []cell, quick bool, d time.Duration) []*trial {
	subjects := p.subjects()
	var out []*trial
	for _, c := range cells {
		t := &trial{Group: "Packets", Title: c.String(), missing: map[string]error{}, takes: d + 3*time.Second}
		t.Metrics = []metric{mpps, busyTime, syscalls, idle, counted, allocs, dropped, processors}
		if c.Path == roundTrip {
			t.Metrics = []metric{tripTime, syscalls, idle, counted, processors}
		}
		for _, name := range c.subjects(p, quick) {
			t.Subjects = append(t.Subjects, name)
			if err := p.missing(name, c); err != nil {
				t.missing[name] = err
			}
		}
		t.measure = func(ctx context.Context, name string) (values, error) {
			f, err := measureCell(ctx, subjects[name], c, d)
			if err != nil {
				return nil, err
			}
			return f.values(c), nil
		}
		t.goals = c.goals()
		out = append(out, t)
	}
	return out
}

// values are the figures by metric.
func (f figures) values(c cell) values {
	v := values{
		mpps.Name: f.frames / 1e6, busyTime.Name: f.busyNS, allocs.Name: f.allocs, dropped.Name: f.dropped,
		syscalls.Name: f.calls, idle.Name: f.idle, counted.Name: f.counted,
	}
	if c.Path == roundTrip {
		// One frame is seen twice on its way, by either guest.
		v[tripTime.Name] = 2e6 / f.frames
	}
	for k, x := range v {
		if math.IsNaN(x) || math.IsInf(x, 0) {
			delete(v, k)
		}
	}
	return v
}
