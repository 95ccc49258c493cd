package engine

import "sidewire/engine/frame"

// Port is where frames go: a guest's NIC, an uplink, the host's kernel.
type Port interface {
	// Push delivers frames, in order, as the worker of that number. The frames
	// are borrowed for the call. A frame that cannot be delivered gets its
	// Reason set and Out set to frame.Drop; the worker counts it. Push may
	// rewrite a frame's Head and Offload (checksum, segmentation). It is safe
	// for concurrent use by different workers.
	Push(worker int, fs []*frame.Frame)
}

// Queue is where frames come from: one queue pair of a guest's NIC, one socket
// of an uplink. It belongs to one worker at a time, which alone calls its
// methods.
type Queue interface {
	// Pull adds up to frame.BatchSize frames to an empty batch, with Queue set
	// where the port has several; the worker sets In. It returns how many it
	// added. What it lends stays valid until Release.
	Pull(b *frame.Batch) int
	// Release takes back what the last Pull lent. It is called after every
	// Pull that added a frame.
	Release(b *frame.Batch)
	// Arm asks for a wake-up through the worker's Poller when frames come, and
	// reports whether some are there already, so that the worker must not
	// sleep. Disarm says that the worker polls again.
	Arm() (more bool)
	Disarm()
}

// Stage decides what becomes of the frames of a batch: it sets Out of those
// that it is responsible for, and may append replies with Out set. A stage
// passes over frames whose Out or Reason is set already. A port's stages run
// in order on what the port's queues pulled. Process must be safe for
// concurrent use by several workers, each with a batch of its own.
type Stage interface {
	Process(b *frame.Batch)
}
