// Package engine moves batches of frames between ports: Worker, Port, Stage,
// the switch and its FDB.
//
// An [Engine] owns its workers and the layout: which ports exist, which stages
// decide on what they bring, which worker serves which queue. The layout is an
// immutable value behind one atomic pointer; a [Worker] loads it once per turn.
// Each worker owns its batch, its counters and its epoll set, and shares
// nothing with the others but the ports that it pushes to. A [Switch] is a stage
// for each of its ports, and a port of its own for what goes to many; workers
// share its FDB.
package engine

import (
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"sidewire/engine/frame"
)

// PollMode says what a worker does when its queues are empty.
type PollMode uint8

// The poll modes. Adaptive spins for a short time where that has paid lately
// and then sleeps.
const (
	PollAdaptive PollMode = iota
	PollAlways
	PollNever
)

// Config is what an Engine is made of.
type Config struct {
	// Workers is the number of workers, at least 1.
	Workers int
	// CPUs are the processors that the workers are pinned to, in turn; empty
	// leaves the choice to the kernel.
	CPUs []int
	// Poll is what workers do when idle.
	Poll PollMode
	// Log receives state changes; nil is slog.Default().
	Log *slog.Logger
}

// Engine is a set of workers and what they serve. Its methods are safe for
// concurrent use, but must not be called from a stage or a port's data path.
type Engine struct {
	workers []*Worker
	layout  atomic.Pointer[layout]
	log     *slog.Logger
	done    sync.WaitGroup

	mu sync.Mutex // guards changes of the layout and next
}

// layout is what exists at one moment. It is never changed, only replaced.
type layout struct {
	ports []*portEntry // by PortID; nil where there is none
	views []*view      // by worker
}

// portEntry is one attached port.
type portEntry struct {
	id       frame.PortID
	name     string
	port     Port
	stages   []Stage
	counters []*counters // by worker
}

// view is what one worker sees of a layout, and its scratch lists for it.
type view struct {
	queues []queueEntry
	lists  [][]*frame.Frame // by egress PortID, emptied after each batch
}

type queueEntry struct {
	q  Queue
	in *portEntry
}

// New makes an engine and starts its workers.
func New(c Config) (*Engine, error) {
	if c.Workers < 1 {
		return nil, fmt.Errorf("new engine: %d workers, want at least 1", c.Workers)
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	// A worker holds its thread, and often its processor, for good; the
	// control plane and the garbage collector need one more.
	if runtime.GOMAXPROCS(0) < c.Workers+1 {
		runtime.GOMAXPROCS(c.Workers + 1)
	}
	e := &Engine{log: c.Log}
	e.layout.Store(&layout{ports: []*portEntry{nil}, views: emptyViews(c.Workers)})
	spin := spinLimit(c)
	for i := range c.Workers {
		cpu := -1
		if len(c.CPUs) > 0 {
			cpu = c.CPUs[i%len(c.CPUs)]
		}
		w, err := newWorker(e, i, cpu, c.Poll, spin)
		if err != nil {
			e.stopWorkers()
			return nil, fmt.Errorf("new engine: worker %d: %w", i, err)
		}
		e.workers = append(e.workers, w)
	}
	for _, w := range e.workers {
		e.done.Add(1)
		frame.Go(w.run)
	}
	return e, nil
}

func emptyViews(n int) []*view {
	vs := make([]*view, n)
	for i := range vs {
		vs[i] = &view{}
	}
	return vs
}

// Workers is the number of workers.
func (e *Engine) Workers() int { return len(e.workers) }

// Worker returns worker i. It is what a queue needs to be woken by.
func (e *Engine) Worker(i int) *Worker { return e.workers[i] }

// AddPort attaches p under a name and returns its ID. What its queues bring
// passes the stages in order.
func (e *Engine) AddPort(name string, p Port, stages ...Stage) (frame.PortID, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	l := e.layout.Load().clone()
	if len(l.ports) >= int(frame.Consumed) {
		return 0, fmt.Errorf("add port %s: too many ports", name)
	}
	pe := &portEntry{id: frame.PortID(len(l.ports)), name: name, port: p, stages: stages}
	for range e.workers {
		pe.counters = append(pe.counters, new(counters))
	}
	l.ports = append(l.ports, pe)
	e.publish(l)
	return pe.id, nil
}

// SetStages replaces the stages of a port, for those that need the port's ID
// to be made.
func (e *Engine) SetStages(id frame.PortID, stages ...Stage) {
	e.mu.Lock()
	defer e.mu.Unlock()
	l := e.layout.Load().clone()
	pe := *l.ports[id]
	pe.stages = stages
	l.replace(&pe)
	e.publish(l)
}

// AddQueue lets a worker serve a queue of a port. The queue must know the
// worker already, as the one to wake (see Worker.Watch and Worker.Wake).
func (e *Engine) AddQueue(id frame.PortID, q Queue, worker int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	l := e.layout.Load().clone()
	v := l.views[worker]
	v.queues = append(v.queues, queueEntry{q, l.ports[id]})
	e.publish(l)
}

// RemovePort detaches a port and its queues. When it returns, no worker uses
// them any more. The ID is not used again.
func (e *Engine) RemovePort(id frame.PortID) {
	e.mu.Lock()
	defer e.mu.Unlock()
	l := e.layout.Load().clone()
	l.ports[id] = nil
	for _, v := range l.views {
		kept := v.queues[:0]
		for _, qe := range v.queues {
			if qe.in.id != id {
				kept = append(kept, qe)
			}
		}
		v.queues = kept
	}
	e.publish(l)
	e.Barrier()
}

// publish makes l the layout that workers see from their next turn on.
func (e *Engine) publish(l *layout) {
	for _, v := range l.views {
		v.lists = make([][]*frame.Frame, len(l.ports))
		for i := range v.lists {
			v.lists[i] = make([]*frame.Frame, 0, frame.BatchMax)
		}
	}
	e.layout.Store(l)
	for _, w := range e.workers {
		w.Wake()
	}
}

func (l *layout) clone() *layout {
	n := &layout{ports: append([]*portEntry(nil), l.ports...)}
	for _, v := range l.views {
		n.views = append(n.views, &view{queues: append([]queueEntry(nil), v.queues...)})
	}
	return n
}

func (l *layout) replace(pe *portEntry) {
	l.ports[pe.id] = pe
	for _, v := range l.views {
		for i := range v.queues {
			if v.queues[i].in.id == pe.id {
				v.queues[i].in = pe
			}
		}
	}
}

// Barrier returns when every worker has passed a batch boundary: what was
// unpublished before the call is not in use any more. A worker must not call
// it.
func (e *Engine) Barrier() {
	for _, w := range e.workers {
		w.passBoundary()
	}
}

// Close stops the workers. Ports and queues are not touched; whoever made
// them closes them afterwards.
func (e *Engine) Close() {
	e.stopWorkers()
	e.done.Wait()
	for _, w := range e.workers {
		w.closeFDs()
	}
}

func (e *Engine) stopWorkers() {
	for _, w := range e.workers {
		w.stop.Store(true)
		w.Wake()
	}
}

// start is the origin of the monotonic clock that batches carry.
var start = time.Now()

// Now is the monotonic time in nanoseconds that Batch.Now is read from.
func Now() int64 { return int64(time.Since(start)) }
