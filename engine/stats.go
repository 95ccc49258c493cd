package engine

import (
	"sync/atomic"

	"sidewire/engine/frame"
)

// counters is what one worker counts for one port. The worker alone adds;
// anybody may read.
type counters struct {
	inFrames, inBytes   atomic.Uint64 // from the port
	outFrames, outBytes atomic.Uint64 // to the port
	drops               [frame.NumReasons]atomic.Uint64
}

// add counts where there is one writer and any number of readers. A load and a
// store are enough for that, and on arm64 they are plain instructions. On amd64
// the store is an XCHG and costs as much as a locked addition would; it is paid
// a few times for each batch, and once for each frame that is dropped.
func add(c *atomic.Uint64, n uint64) { c.Store(c.Load() + n) }

// count books a batch of which the first n frames came from port in.
func (w *Worker) count(l *layout, in *portEntry, b *frame.Batch, n int) {
	c := in.counters[w.id]
	var bytes, outFrames, outBytes uint64
	out := frame.Drop
	for i := range b.Len() {
		f := b.Frame(i)
		size := uint64(f.Len)
		if i < n {
			bytes += size
		}
		if f.Out != out {
			l.countOut(w.id, out, outFrames, outBytes)
			out, outFrames, outBytes = f.Out, 0, 0
		}
		if f.Out == frame.Drop {
			add(&c.drops[f.Reason], 1)
		}
		outFrames++
		outBytes += size
	}
	l.countOut(w.id, out, outFrames, outBytes)
	add(&c.inFrames, uint64(n))
	add(&c.inBytes, bytes)
}

// countOut books frames that went to a port.
func (l *layout) countOut(worker int, out frame.PortID, frames, bytes uint64) {
	if out == frame.Drop || out == frame.Consumed {
		return
	}
	c := l.ports[out].counters[worker]
	add(&c.outFrames, frames)
	add(&c.outBytes, bytes)
}

// PortStats is what was counted for a port, over all workers. In is from the
// port, Out is to it.
type PortStats struct {
	ID        frame.PortID      `json:"id"`
	Name      string            `json:"name"`
	InFrames  uint64            `json:"in_frames"`
	InBytes   uint64            `json:"in_bytes"`
	OutFrames uint64            `json:"out_frames"`
	OutBytes  uint64            `json:"out_bytes"`
	Drops     map[string]uint64 `json:"drops,omitempty"`
}

// WorkerStats is what a worker did.
type WorkerStats struct {
	ID      int    `json:"id"`
	CPU     int    `json:"cpu"` // -1: not pinned
	Queues  int    `json:"queues"`
	Turns   uint64 `json:"turns"`   // that found frames
	BusyNS  uint64 `json:"busy_ns"` // time that these took
	Wakeups uint64 `json:"wakeups"` // ends of a sleep
}

// PortStats returns the counters of every port.
func (e *Engine) PortStats() []PortStats {
	var out []PortStats
	for _, pe := range e.layout.Load().ports {
		if pe == nil {
			continue
		}
		s := PortStats{ID: pe.id, Name: pe.name, Drops: map[string]uint64{}}
		for _, c := range pe.counters {
			s.InFrames += c.inFrames.Load()
			s.InBytes += c.inBytes.Load()
			s.OutFrames += c.outFrames.Load()
			s.OutBytes += c.outBytes.Load()
			for r := range c.drops {
				if n := c.drops[r].Load(); n > 0 {
					s.Drops[frame.DropReason(r).String()] += n
				}
			}
		}
		out = append(out, s)
	}
	return out
}

// WorkerStats returns the counters of every worker.
func (e *Engine) WorkerStats() []WorkerStats {
	l := e.layout.Load()
	var out []WorkerStats
	for i, w := range e.workers {
		out = append(out, WorkerStats{
			ID: i, CPU: w.cpu, Queues: len(l.views[i].queues),
			Turns: w.turns.Load(), BusyNS: w.busy.Load(), Wakeups: w.wakeups.Load(),
		})
	}
	return out
}
