package frame

const (
	// BatchSize is how many frames one Pull may bring.
	BatchSize = 128
	// BatchMax is the room of a Batch: as much again for the engine's own replies.
	BatchMax = 2 * BatchSize
	// segMax bounds the scatter lists of a batch: 64 KiB frames of a Linux
	// guest have about 18 pieces, the longest legal chain 1024.
	segMax = 2048
	// arenaSize is the room for the engine's own frames beyond their heads.
	arenaSize = 64 << 10
)

// Batch is the frames that a worker has in hand. It belongs to one worker,
// which uses it again and again; nothing in it outlives the next Reset.
type Batch struct {
	// Now is the monotonic time in nanoseconds, read once per batch.
	Now int64
	// Worker is the number of the worker whose batch this is.
	Worker int
	// In is the port that Next's frames come from.
	In PortID
	// Waiting is set by a Pull that left frames where they are for more to
	// come: the worker asks again soon instead of sleeping.
	Waiting bool

	n      int
	nseg   int
	used   int
	frames [BatchMax]Frame
	segs   [segMax][]byte
	arena  [arenaSize]byte
}

// Reset empties the batch.
func (b *Batch) Reset(now int64) {
	b.Now, b.n, b.used, b.Waiting = now, 0, 0, false
	clear(b.segs[:b.nseg]) // lent memory may be unmapped once it is given back
	b.nseg = 0
}

// Len is the number of frames in the batch.
func (b *Batch) Len() int { return b.n }

// Frame returns the i-th frame, borrowed until the next Reset.
func (b *Batch) Frame(i int) *Frame { return &b.frames[i] }

// Next adds a frame for a port's Pull and returns it with everything but Head
// cleared, or nil if the batch holds BatchSize frames.
func (b *Batch) Next() *Frame {
	if b.n >= BatchSize {
		return nil
	}
	return b.add()
}

// Reply adds a frame of the engine's own, or returns nil if there is no room.
func (b *Batch) Reply() *Frame {
	if b.n >= BatchMax {
		return nil
	}
	return b.add()
}

func (b *Batch) add() *Frame {
	f := &b.frames[b.n]
	b.n++
	f.Offload = Offload{}
	f.Len, f.HeadLen, f.In, f.Out, f.Queue, f.Reason = 0, 0, b.In, Drop, 0, ReasonNone
	f.L3, f.L4, f.Proto, f.Frag, f.Token, f.Tail = 0, 0, 0, false, 0, nil
	f.RxAt, f.RxBufs = 0, 0
	return f
}

// Undo takes back the frame that Next added last.
func (b *Batch) Undo() { b.n-- }

// Segs lends room for a scatter list of at most n pieces, of length 0, or nil
// if the batch has no more. Return what was not needed with TrimSegs before
// asking again.
func (b *Batch) Segs(n int) [][]byte {
	if b.nseg+n > segMax {
		return nil
	}
	s := b.segs[b.nseg : b.nseg : b.nseg+n]
	b.nseg += n
	return s
}

// TrimSegs gives back the last n pieces of the list that Segs lent last.
func (b *Batch) TrimSegs(n int) { b.nseg -= n }

// SegsLeft is how many pieces Segs can still lend.
func (b *Batch) SegsLeft() int { return segMax - b.nseg }

// Alloc lends n bytes of the batch's arena, or returns nil if it has no more.
// The bytes are not cleared.
func (b *Batch) Alloc(n int) []byte {
	if b.used+n > arenaSize {
		return nil
	}
	s := b.arena[b.used : b.used+n : b.used+n]
	b.used += n
	return s
}

// TrimAlloc gives back the last n bytes of what Alloc lent last.
func (b *Batch) TrimAlloc(n int) { b.used -= n }

// SetReply makes f the frame whose bytes are b, a slice that Alloc lent or
// that is otherwise kept until the batch is reset.
func (b *Batch) SetReply(f *Frame, bytes []byte) bool {
	if len(bytes) <= HeadSize {
		f.SetBytes(bytes, nil, nil)
		return true
	}
	segs := b.Segs(1)
	if segs == nil {
		f.Drop(BatchFull)
		return false
	}
	f.SetBytes(bytes, nil, segs)
	return true
}
