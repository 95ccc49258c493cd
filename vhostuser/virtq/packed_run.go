package virtq

import "sync/atomic"

// popRunPacked is PopRun on a packed ring.
func (q *Queue) popRunPacked(dir Direction, out []Buf) (n int) {
	p := q.packed
	ring, flights, mask, region := p.ring, p.flight, p.mask, q.last
	out = out[:min(len(out), len(ring)-p.out)]
	at, count := p.next, q.next
	want := uint32(at.availFlags()|uint16(dir)) << 16
	p.dry = false
	for n = range out {
		s := &ring[at.at]
		w := atomic.LoadUint32(&s.word)
		if (w^want)&((flagsOwner|flagAll)<<16) != 0 {
			p.dry = (w^want)&(flagsOwner<<16) != 0
			break
		}
		addr, size, id := s.addr, s.len, uint16(w)
		if size-1 >= MaxBytes || id >= q.cfg.Size {
			break
		}
		b, ok := region.Slice(addr, uint64(size))
		if !ok {
			if b, ok = q.slice(addr, size); !ok {
				break
			}
			region = q.last
		}
		prefetch(b, dir)
		o := &out[n]
		o.B, o.Head = b, id
		flights[count&mask] = flight{id, 1}
		count++
		if at.at++; at.at == len(ring) {
			at = cursor{0, at.lap ^ 1}
			want ^= flagsOwner << 16
		}
	}
	n = int(count - q.next)
	p.next, q.next = at, count
	p.out += n
	return n
}

// putRunPacked is PutRun on a packed ring.
func (q *Queue) putRunPacked(bufs []Buf) {
	p := q.packed
	ring := p.ring
	for i := range bufs {
		b := &bufs[i]
		if p.staged == 0 || q.put == q.next || p.flight[q.put&p.mask] != (flight{b.Head, 1}) {
			q.putPacked(b.Head, b.N)
			continue
		}
		// The oldest, and of one descriptor, like all but a few.
		word := uint32(b.Head) | uint32(p.put.usedFlags())<<16
		if b.N > 0 {
			word |= flagWrite << 16
		}
		s := &ring[p.put.at]
		s.len, s.word = b.N, word
		if p.put.at++; p.put.at == len(ring) {
			p.put = cursor{0, p.put.lap ^ 1}
		}
		p.staged++
		p.out--
		q.put++
	}
}
