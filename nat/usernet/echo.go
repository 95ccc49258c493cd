package usernet

import "sidewire/engine/frame"

// icmpKnown deals with an ICMP message of the guest that belongs to a session
// of this worker, or to none at all. It reports false for an echo request of a
// session that this worker does not have.
func (w *worker) icmpKnown(b *frame.Batch, f *frame.Frame) bool { return true }

// icmpOpen begins a session for an echo request.
func (w *worker) icmpOpen(b *frame.Batch, f *frame.Frame) {}

// echoEvent is told what became possible with a session's socket.
func (w *worker) echoEvent(i int32, events uint32) {}

// echoPump brings the guest the answers to its echo requests.
func (w *worker) echoPump(b *frame.Batch, i int32) pumped { return pumpDone }
