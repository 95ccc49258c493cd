package usernet

// Theory of operation.
//
// A socket sends whole datagrams, so what the guest sends in fragments is put
// together first (RFC 4787 REQ-14): in any order, from any of its queues.
// Fragments are copied to chunks of 4 KiB by their place in the packet; the
// last that was missing becomes the whole packet, whose Tail is these chunks
// until the worker's next batch. In all there is 1 MiB of chunks and room for
// 64 packets. When either is used up the packet goes that has waited longest
// for another fragment: those of a flood that never become packets, rather than
// one whose fragments still arrive (REQ-14a).
//
// A fragment that overlaps another, that contradicts another about the
// packet's length, or reaches beyond 65535 bytes, ends its packet: what else
// comes of it is dropped for as long as a packet may take, 30 s (H083). An exact
// repetition is dropped alone. A first fragment that does not hold the
// transport's header is never taken (RFC 1858).

import (
	"encoding/binary"
	"sync"

	"sidewire/engine/frame"
)

const (
	fragPackets = 64
	chunkSize   = 4 << 10
	fragChunks  = 1 << 20 / chunkSize
	// fragRanges is how many fragments a packet may have: 64 KiB in pieces of
	// 512 bytes.
	fragRanges = 128
	fragLife   = 30e9 // nanoseconds (RFC 791)
	packetMost = 65535
)

type chunk [chunkSize]byte

// fragTable is the fragments that wait for the rest of their packets.
type fragTable struct {
	mu      sync.Mutex // guards all below; a worker may hold its own lock
	packets *[fragPackets]partial
	unused  []*chunk
	made    int // how many chunks there are
	waiting int // how many packets
	clock   uint64
}

// partial is a packet of which fragments have come. Its key is 0 if it is
// nobody's.
type partial struct {
	key    uint64
	until  int64
	heard  uint64 // when a fragment came last, by the table's clock
	total  int    // bytes behind the IP header, -1 while it is not known
	have   int
	refuse bool // nothing more of it is taken
	queue  uint16
	in     frame.PortID
	n      int
	ranges [fragRanges]fragRange // in order
	chunks [packetMost/chunkSize + 1]*chunk
	// head is the first fragment's, once it has come: all that an ICMP error
	// quotes.
	head    [frame.HeadSize]byte
	headLen int
	ipLen   int
}

type fragRange struct{ from, to uint16 }

// reassembler is what a worker has lent to its batch.
type reassembler struct {
	spent []*chunk
	timer int32 // 1 + place in the flow table of the timer of waiting packets
	quote frame.Frame
}

// fragID names the packet that a fragment belongs to.
func fragID(f *frame.Frame) uint64 {
	return uint64(f.DstIP4())<<32 | uint64(f.IPID())<<16 | uint64(f.Proto)<<8 | 1
}

// reassemble keeps a fragment of the guest. When it is the last that was
// missing it returns the whole packet, which takes the fragment's place in the
// batch; otherwise nil, and f has its verdict.
func (w *worker) reassemble(b *frame.Batch, f *frame.Frame) *frame.Frame {
	if f.Flags&frame.NeedsCsum != 0 || f.GSO != frame.GSONone {
		f.Drop(frame.BadOffload)
		return nil
	}
	t := &w.net.frags
	t.mu.Lock()
	defer t.mu.Unlock()
	id := fragID(f)
	if w.six != nil {
		id = fragID6(f)
	}
	p := t.find(id, w.now)
	if p == nil {
		p = t.begin(id, w.now)
		p.queue, p.in = f.Queue, f.In
	}
	w.fragAlarm()
	if r := t.keep(p, f); r != frame.ReasonNone {
		w.stats.FragmentsDropped++
		f.Drop(r)
		return nil
	}
	if p.have != p.total || p.headLen == 0 {
		f.Out = frame.Consumed
		return nil
	}
	return w.whole(b, f, p)
}

// find returns the packet of a fragment, if others of it wait.
func (t *fragTable) find(id uint64, now int64) *partial {
	if t.waiting == 0 {
		return nil
	}
	for k := range t.packets {
		if p := &t.packets[k]; p.key == id {
			if now < p.until {
				return p
			}
			t.end(p)
		}
	}
	return nil
}

// begin makes room for a packet.
func (t *fragTable) begin(id uint64, now int64) *partial {
	if t.packets == nil {
		t.packets = new([fragPackets]partial)
	}
	var p *partial
	for k := range t.packets {
		if t.packets[k].key == 0 {
			p = &t.packets[k]
			break
		}
	}
	if p == nil {
		p = t.stalest(nil)
		t.end(p)
	}
	t.waiting++
	p.key, p.until, p.total = id, now+fragLife, -1
	p.have, p.n, p.headLen, p.refuse = 0, 0, 0, false
	return p
}

// stalest is the packet that has waited longest for a fragment, but for one.
func (t *fragTable) stalest(but *partial) (p *partial) {
	for k := range t.packets {
		if q := &t.packets[k]; q.key != 0 && q != but && (p == nil || q.heard < p.heard) {
			p = q
		}
	}
	return p
}

// end forgets a packet.
func (t *fragTable) end(p *partial) {
	t.clear(p)
	p.key = 0
	t.waiting--
}

func (t *fragTable) clear(p *partial) {
	for k, c := range p.chunks {
		if c != nil {
			t.unused = append(t.unused, c)
			p.chunks[k] = nil
		}
	}
}

// free takes back what a worker's batch has borrowed.
func (t *fragTable) free(r *reassembler) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.unused = append(t.unused, r.spent...)
	clear(r.spent)
	r.spent = r.spent[:0]
}

// keep copies a fragment to its place, or says why not.
func (t *fragTable) keep(p *partial, f *frame.Frame) frame.DropReason {
	from := int(f.FragField()&0x1fff) * 8
	n := int(f.Len) - int(f.L4)
	to, more := from+n, f.MoreFrags()
	if p.refuse {
		return frame.BadIPv4 // and it is not kept alive
	}
	t.clock++
	p.heard = t.clock
	r := p.check(from, to, more, int(f.L4)-int(f.L3))
	if r == frame.FragPending {
		return frame.FragOverflow // a repetition: there is one already
	}
	if r != frame.ReasonNone {
		t.clear(p)
		p.refuse = true
		return r
	}
	if !t.makeRoom(p, from, to) {
		return frame.FragOverflow
	}
	p.put(from, f.Head[f.L4:f.HeadLen])
	at := from + int(f.HeadLen) - int(f.L4)
	for _, b := range f.Tail {
		p.put(at, b)
		at += len(b)
	}
	p.insert(from, to)
	if !more {
		p.total = to
	}
	if from == 0 {
		p.headLen, p.ipLen = copy(p.head[:], f.Head[:f.HeadLen]), int(f.L4)-int(f.L3)
	}
	return frame.ReasonNone
}

// check says what is wrong with a fragment beside those that have come;
// FragPending if it is the same as one of them.
func (p *partial) check(from, to int, more bool, ipLen int) frame.DropReason {
	switch {
	case to == from, more && (to-from)%8 != 0, to+ipLen > packetMost, from > 0 && p.headLen > 0 && to+p.ipLen > packetMost:
		return frame.BadIPv4
	case p.total >= 0 && (to > p.total || !more && to != p.total):
		return frame.BadIPv4
	case !more && p.n > 0 && int(p.ranges[p.n-1].to) > to:
		return frame.BadIPv4
	}
	for _, r := range p.ranges[:p.n] {
		switch {
		case int(r.from) == from && int(r.to) == to:
			return frame.FragPending
		case int(r.from) < to && from < int(r.to):
			return frame.BadIPv4
		}
	}
	if p.n == fragRanges {
		return frame.FragOverflow
	}
	return frame.ReasonNone
}

func (p *partial) insert(from, to int) {
	k := p.n
	for ; k > 0 && int(p.ranges[k-1].from) > from; k-- {
		p.ranges[k] = p.ranges[k-1]
	}
	p.ranges[k] = fragRange{uint16(from), uint16(to)}
	p.n++
	p.have += to - from
}

// makeRoom gives a packet the chunks for some bytes, if need be those of the
// packet that has waited longest.
func (t *fragTable) makeRoom(p *partial, from, to int) bool {
	for k := from / chunkSize; k <= (to-1)/chunkSize; k++ {
		for p.chunks[k] == nil {
			if n := len(t.unused); n > 0 {
				p.chunks[k] = t.unused[n-1]
				t.unused = t.unused[:n-1]
				continue
			}
			if t.made < fragChunks {
				t.made++
				p.chunks[k] = new(chunk)
				continue
			}
			old := t.stalest(p)
			if old == nil {
				return false // the batch has all of them
			}
			t.end(old)
		}
	}
	return true
}

func (p *partial) put(at int, b []byte) {
	for len(b) > 0 {
		n := copy(p.chunks[at/chunkSize][at%chunkSize:], b)
		b = b[n:]
		at += n
	}
}

// whole makes f the packet whose fragments have all come.
func (w *worker) whole(b *frame.Batch, f *frame.Frame, p *partial) *frame.Frame {
	t := &w.net.frags
	defer t.end(p)
	if p.total+p.ipLen > packetMost {
		f.Drop(frame.BadIPv4)
		return nil
	}
	segs := b.Segs(len(p.chunks) + 1)
	if segs == nil {
		f.Drop(frame.BatchFull)
		return nil
	}
	h := l3 + p.ipLen
	copy(f.Head[:], p.head[:h])
	ip := f.Head[l3:h]
	binary.BigEndian.PutUint16(ip[2:], uint16(p.ipLen+p.total))
	ip[6], ip[7], ip[10], ip[11] = 0, 0, 0, 0
	binary.BigEndian.PutUint16(ip[10:], ^frame.Fold(frame.Sum(ip, 0)))
	f.Len, f.HeadLen, f.Offload = int32(h+p.total), uint16(h), frame.Offload{}
	for k, c := range p.chunks {
		n := min(p.total-k*chunkSize, chunkSize)
		if n <= 0 {
			break
		}
		data := c[:n:n]
		if k == 0 {
			n = copy(f.Head[h:], data)
			f.HeadLen += uint16(n)
			data = data[n:]
		}
		if len(data) > 0 {
			segs = append(segs, data)
		}
		w.frags.spent = append(w.frags.spent, c)
		p.chunks[k] = nil
	}
	b.TrimSegs(cap(segs) - len(segs))
	f.Tail = segs
	if r := f.ParseIPv4(); r != frame.ReasonNone {
		f.Drop(r)
		return nil
	}
	return f
}

// fragAlarm starts the timer of packets that wait. It is an entry of the flow
// table, without which packets are only found to be old when others come.
func (w *worker) fragAlarm() {
	r := &w.frags
	if r.timer != 0 {
		return
	}
	i := w.table.add(key{proto: frame.ProtoUDP, in: fragTimer})
	if i == none {
		return
	}
	w.table.at(i).state = stateFragments
	w.wheel.set(i, w.tick+ticks(fragLife)+1)
	r.timer = i + 1
}

// fragTimer marks the key of that entry.
const fragTimer = 0x7f

// fragsExpire is called when packets may have waited for too long. The guest is
// told of those whose first fragment has come (RFC 1122, 3.3.2).
func (w *worker) fragsExpire(b *frame.Batch, i int32) {
	t := &w.net.frags
	t.mu.Lock()
	defer t.mu.Unlock()
	next := int64(-1)
	for k := range fragPackets {
		p := &t.packets[k]
		switch {
		case p.key == 0:
		case w.now < p.until:
			if next < 0 || p.until < next {
				next = p.until
			}
		default:
			if !p.refuse {
				w.stats.FragmentsDropped += uint64(p.n)
				w.fragsLate(b, p)
			}
			t.end(p)
		}
	}
	if next >= 0 {
		w.wheel.set(i, w.tick+ticks(next-w.now)+1)
		return
	}
	w.frags.timer = 0
	w.table.remove(i)
}

// fragsLate tells the guest that a packet did not become whole in time.
func (w *worker) fragsLate(b *frame.Batch, p *partial) {
	if p.headLen == 0 || b.Len() >= frame.BatchSize {
		return
	}
	q := &w.frags.quote
	*q = frame.Frame{Len: int32(p.headLen), HeadLen: uint16(p.headLen), Queue: p.queue, In: p.in, L3: l3, L4: uint8(l3 + p.ipLen), Proto: p.head[l3+9]}
	copy(q.Head[:], p.head[:p.headLen])
	w.icmpError(b, q, icmpTimeExceeded, codeReassembly, 0)
}

// codeReassembly is the code of Time Exceeded for a packet of fragments.
const codeReassembly = 1

// sumOK checks the transport checksum of a whole packet, unless its sender has
// left that to others. A checksum that the guest left undone in the payload, as
// for a tunnel, is done here: nobody will later.
func (w *worker) sumOK(f *frame.Frame) bool {
	if f.Flags&frame.NeedsCsum != 0 {
		if f.PartialL4() && f.Proto != frame.ProtoICMP {
			return true
		}
		f.CompleteChecksum()
	}
	if f.Flags&frame.DataValid != 0 {
		return true
	}
	start, end := int(f.L4), int(f.Len)
	var sum uint64
	switch f.Proto {
	case frame.ProtoUDP:
		h := f.Head[start:]
		if h[6]|h[7] == 0 {
			return w.six == nil // RFC 8200, 8.1
		}
		n := int(binary.BigEndian.Uint16(h[4:]))
		sum, end = w.net.pseudo(f.DstIP4(), frame.ProtoUDP, n), start+n
	case frame.ProtoTCP:
		sum = w.net.pseudo(f.DstIP4(), frame.ProtoTCP, end-start)
	case frame.ProtoICMP:
		if w.six != nil {
			sum = w.net.pseudo(f.DstIP4(), frame.ProtoICMP, end-start)
		}
	default:
		return true
	}
	return frame.Fold(f.SumFrom(start, end, sum)) == 0xffff
}
