package virtq

import (
	"encoding/binary"
)

// Buf is a chain of one buffer, which is what nearly all chains are.
type Buf struct {
	B    []byte // borrowed: guest memory, until the chain is put
	N    uint32 // bytes that the device wrote, for PutRun
	Head uint16
}

// PopRun takes up to len(out) chains of one buffer each and returns how many
// it took. It stops before whatever is anything else, or wrong: Pop deals with
// that. The buffers' first two lines are on their way into the cache when it
// returns, so that whoever goes through them afterwards does not wait for each:
// that second pass is what makes a run faster than as many Pops.
func (q *Queue) PopRun(dir Direction, out []Buf) (n int) {
	if q.err != nil || q.cfg.Log != nil {
		return 0
	}
	if q.packed != nil {
		return q.popRunPacked(dir, out)
	}
	have := int(q.seen - q.next)
	if have < len(out) {
		if q.look() != OK {
			return 0
		}
		have = int(q.seen - q.next)
	}
	out = out[:min(len(out), have)]
	avail, desc, mask, next, region := q.avail, q.desc, q.mask, q.next, q.last
	for n = range out {
		at := 2 * int(next&mask)
		head := binary.LittleEndian.Uint16(avail[at : at+2])
		if head > mask {
			break
		}
		d := desc[int(head)*descLen:][:descLen]
		addr, rest := binary.LittleEndian.Uint64(d), binary.LittleEndian.Uint64(d[8:])
		size := uint64(uint32(rest))
		if uint16(rest>>32)&flagAll != uint16(dir) || size-1 >= MaxBytes {
			break
		}
		b, ok := region.Slice(addr, size)
		if !ok {
			if b, ok = q.slice(addr, uint32(size)); !ok {
				break
			}
			region = q.last
		}
		prefetch(b, dir)
		o := &out[n]
		o.B, o.Head = b, head
		next++
	}
	n = int(next - q.next)
	q.next = next
	return n
}

// Drained says whether it is known without another look, since PopRun has just
// had one, that everything that was there was popped.
func (q *Queue) Drained() bool {
	if q.err != nil || q.cfg.Log != nil {
		return false // PopRun did not look
	}
	if q.packed != nil {
		return q.packed.dry
	}
	return q.next == q.seen
}

// Holds says whether at least n descriptors wait, n from 1 to the ring's size.
// It looks at one place only.
func (q *Queue) Holds(n int) bool {
	if p := q.packed; p != nil {
		// The driver makes descriptors available in their order.
		_, ok := p.read(p.next.forward(n-1, len(p.ring)))
		return ok && n <= len(p.ring)-p.out
	}
	return q.Avail() >= n
}

// PutRun stages the return of chains that PopRun took, each with its N.
func (q *Queue) PutRun(bufs []Buf) {
	if q.packed != nil {
		q.putRunPacked(bufs)
		return
	}
	used, mask, put := q.used, q.mask, q.put
	for i := range bufs {
		b := &bufs[i]
		at := elemLen * int(put&mask)
		binary.LittleEndian.PutUint64(used[at:at+elemLen], uint64(b.Head)|uint64(b.N)<<32)
		put++
	}
	q.put = put
}
