package engine

import "sidewire/engine/frame"

// NewWire joins a guest's port with the given number of queue pairs and another
// one, as a cable does: all frames pass, as they are. It returns the last stage of
// either. The frames of a flow come to the guest on the queue that it last sent
// that flow from.
func NewWire(guest, other frame.PortID, queues int) (fromGuest, fromOther Stage) {
	s := newSteering(queues)
	return &wireEnd{other, s, true}, &wireEnd{guest, s, false}
}

// wireEnd is the stage of one end of a wire.
type wireEnd struct {
	out       frame.PortID
	steer     *steering // nil: one queue pair
	fromGuest bool
}

// Process implements Stage.
func (e *wireEnd) Process(b *frame.Batch) {
	for i := range b.Len() {
		f := b.Frame(i)
		if f.Out != frame.Drop || f.Reason != frame.ReasonNone {
			continue
		}
		f.Out = e.out
		switch {
		case e.steer == nil || f.HeadLen < frame.EthernetLen:
		case e.fromGuest:
			widen(f, steerHead)
			e.steer.remember(flowHash(f), uint32(f.Queue))
		default:
			widen(f, steerHead)
			f.Queue = e.steer.queue(flowHash(f))
		}
	}
}

// WireHead is how much of a frame a wire's stage reads where the guest has
// several queue pairs.
const WireHead = steerHead
