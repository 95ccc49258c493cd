package virtq

// popRunPacked is PopRun on a packed ring.
func (q *Queue) popRunPacked(dir Direction, out []Buf) (n int) {
	p := q.packed
	out = out[:min(len(out), len(p.ring)-p.out)]
	region, at, count := q.last, p.next, q.next
	p.dry = false
	for n = range out {
		d, ok := p.read(at)
		p.dry = !ok
		if !ok || d.flags&flagAll != uint16(dir) || d.len-1 >= MaxBytes || d.next >= q.cfg.Size {
			break
		}
		b, ok := region.Slice(d.addr, uint64(d.len))
		if !ok {
			if b, ok = q.slice(d.addr, d.len); !ok {
				break
			}
			region = q.last
		}
		prefetch(b, dir)
		o := &out[n]
		o.B, o.Head = b, d.next
		p.flight[count&p.mask] = flight{d.next, 1}
		at = at.forward(1, len(p.ring))
		count++
	}
	n = int(count - q.next)
	p.next, q.next = at, count
	p.out += n
	return n
}
