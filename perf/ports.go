package main

import (
	"sidewire/engine/frame"
)

// forward sends every frame to one port.
type forward frame.PortID

// Process implements engine.Stage.
func (f forward) Process(b *frame.Batch) {
	for i := range b.Len() {
		if x := b.Frame(i); x.Reason == frame.ReasonNone {
			x.Out = frame.PortID(f)
		}
	}
}

// nowhere is a port that nothing is sent to.
type nowhere struct{}

// Push implements engine.Port.
func (nowhere) Push(_ int, fs []*frame.Frame) {
	for _, f := range fs {
		f.Drop(frame.PortGone)
	}
}

// source is a queue that always has a full batch of equal frames.
type source struct {
	queue uint16
	bytes []byte
}

func newSource(queue uint16, size int, id byte) *source {
	s := &source{queue: queue, bytes: make([]byte, size)}
	copy(s.bytes, []byte{2, 0, 0, 0, 0xaa, id, 2, 0, 0, 0, 0xbb, id, 0x88, 0xb5}) // a local experimental type
	return s
}

// Pull implements engine.Queue.
func (s *source) Pull(b *frame.Batch) int {
	for range frame.BatchSize {
		f := b.Next()
		f.Queue = s.queue
		f.SetBytes(s.bytes, nil, b.Segs(1))
	}
	return frame.BatchSize
}

// Release implements engine.Queue.
func (s *source) Release(*frame.Batch) {}

// Arm implements engine.Queue.
func (s *source) Arm() (more bool) { return true }

// Disarm implements engine.Queue.
func (s *source) Disarm() {}
