package nat

// Theory of operation.
//
// Only the first fragment of a packet shows its ports. When it has found its
// flow, the remote address, identification and protocol are noted with the
// flow in a small cache, and the other fragments follow it (RFC 4787 REQ-14).
// A fragment that comes before its first one is copied and waits; the first
// one's batch sends it on. Memory and number of waiting fragments are bounded,
// so a flood of them costs other packets whose fragments are out of order,
// never those in order nor whole packets (REQ-14a): the cache is apart from
// what waits and replaces its oldest entries.
//
// Nothing is reassembled: the ends do that. A fragment that would overlap the
// ports that the first one showed is dropped (RFC 1858, RFC 3128), and so is
// one that reaches beyond 65535 bytes (H083). A first fragment may take over
// the identification of an older packet, as fast senders use all of them
// within seconds; it is judged by its own ports, so nothing is gained by it.

import (
	"encoding/binary"
	"math"
	"sync"
	"time"

	"sidewire/engine/frame"
)

const (
	fragWays = 4
	fragSets = 1 << fragSetBits

	fragSetBits = 8
	// fragsPerID is more fragments than a packet of 64 KiB has with the
	// smallest MTU that is met in practice.
	fragsPerID = 128
	// fragOverhead is what a waiting fragment costs beside its bytes.
	fragOverhead = 64
)

// fragEntry leads the fragments of a packet to its flow.
type fragEntry struct {
	key   uint64
	w1    uint64 // the flow's, with its generation; 0 is the pod's
	slot  uint32
	until uint32 // second
}

// waiting is the fragments of a packet that came before the first.
type waiting struct {
	frames [][]byte
	bytes  int
	until  uint32
}

// fragTable is the fragments that come from one side: from a guest, or from
// outside.
type fragTable struct {
	maxIDs, maxBytes int
	life             uint32 // seconds

	mu      sync.Mutex // guards everything below
	entries *[fragSets][fragWays]fragEntry
	ids     map[uint64]*waiting
	bytes   int
}

func (t *fragTable) init(c *Config) {
	t.maxIDs, t.maxBytes = c.Limits.FragmentIDs, c.Limits.FragmentBytes
	t.life = uint32((c.Timeouts.Fragment + time.Second - 1) / time.Second)
}

// fragKey names the packet that a fragment belongs to; the other address is
// always the same.
func fragKey(remote uint32, f *frame.Frame) uint64 {
	return uint64(remote)<<32 | uint64(f.IPID())<<16 | uint64(f.Proto)<<8 | 1
}

func (t *fragTable) set(key uint64) *[fragWays]fragEntry {
	return &t.entries[key*0x9e3779b97f4a7c15>>(64-fragSetBits)]
}

// lead notes the flow of a packet's first fragment and returns what waited for
// it.
func (t *fragTable) lead(key uint64, r *ref, now uint32) [][]byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.entries == nil {
		t.entries = new([fragSets][fragWays]fragEntry)
	}
	set := t.set(key)
	oldest := &set[0]
	for i := range set {
		e := &set[i]
		if e.key == key {
			oldest = e
			break
		}
		if e.until < oldest.until {
			oldest = e
		}
	}
	*oldest = fragEntry{key: key, w1: r.w1, slot: r.slot, until: now + t.life}
	return t.take(key)
}

func (t *fragTable) take(key uint64) [][]byte {
	w := t.ids[key]
	if w == nil {
		return nil
	}
	t.bytes -= w.bytes
	delete(t.ids, key)
	return w.frames
}

// forget drops what waits for a first fragment that was refused.
func (m *Masquerade) forget(t *fragTable, key uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	m.stats.fragDropped.Add(uint64(len(t.take(key))))
}

// follow returns the flow of the packet that a fragment belongs to, an empty
// ref if it is the pod's. If that is not known yet, the fragment is copied to wait, or dropped, and has got its
// verdict.
func (m *Masquerade) follow(t *fragTable, key uint64, f *frame.Frame, now uint32) (ref, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.entries != nil {
		set := t.set(key)
		for i := range set {
			e := &set[i]
			if e.key != key || e.until < now {
				continue
			}
			if e.w1 == 0 {
				return ref{}, true // the pod's
			}
			r := ref{flow: m.table.at(e.slot), slot: e.slot, w1: e.w1}
			if r.w0 = r.flow.w0.Load(); r.alive() {
				return r, true
			}
			f.Drop(frame.NoFlow) // it has ended since
			return ref{}, false
		}
	}
	if !t.hold(m, key, f, now) {
		m.stats.fragDropped.Add(1)
		f.Drop(frame.FragOverflow)
		return ref{}, false
	}
	m.stats.fragHeld.Add(1)
	m.rouse()
	f.Out = frame.Consumed
	return ref{}, false
}

// hold copies a fragment to wait for the first one of its packet.
func (t *fragTable) hold(m *Masquerade, key uint64, f *frame.Frame, now uint32) bool {
	cost := int(f.Len) + fragOverhead
	w := t.ids[key]
	if t.bytes+cost > t.maxBytes || w == nil && len(t.ids) >= t.maxIDs {
		t.expire(m, now)
		w = t.ids[key]
	}
	switch {
	case t.bytes+cost > t.maxBytes:
		return false
	case w == nil:
		if len(t.ids) >= t.maxIDs || !t.fair(key) {
			return false
		}
		if t.ids == nil {
			t.ids = make(map[uint64]*waiting)
		}
		w = &waiting{until: now + t.life}
		t.ids[key] = w
	case len(w.frames) >= fragsPerID:
		return false
	}
	w.frames = append(w.frames, f.Bytes())
	w.bytes += cost
	t.bytes += cost
	return true
}

// fair says whether a remote address may have one more packet wait: one
// address gets a quarter of the places.
func (t *fragTable) fair(key uint64) bool {
	n := 0
	for k := range t.ids {
		if k>>32 == key>>32 {
			n++
		}
	}
	return n < max(t.maxIDs/4, 1)
}

// expire drops what has waited too long and returns the seconds until the next
// one has.
func (t *fragTable) expire(m *Masquerade, now uint32) uint32 {
	next := uint32(math.MaxUint32)
	for key, w := range t.ids {
		if w.until <= now {
			m.stats.fragExpired.Add(uint64(len(t.take(key))))
			continue
		}
		next = min(next, w.until-now)
	}
	return next
}

func (t *fragTable) sweep(m *Masquerade, now int64) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := t.expire(m, seconds(now))
	if len(t.ids) == 0 {
		return never
	}
	return time.Duration(next) * time.Second
}

func (t *fragTable) waiting() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.bytes
}

// checkFragment gives the reason to drop a fragment, the first included.
func checkFragment(f *frame.Frame) frame.DropReason {
	start := int(f.FragField()&0x1fff) * 8
	n := int(f.Len) - int(f.L4)
	switch {
	case n == 0, f.MoreFrags() && n%8 != 0, start+n+int(f.L4-f.L3) > 0xffff:
		return frame.BadIPv4
	case f.Proto == frame.ProtoTCP && start > 0 && start < 20:
		return frame.BadTransport
	}
	return frame.ReasonNone
}

// fragment sends a fragment that is not the first one after it.
func (o *Outbound) fragment(b *frame.Batch, f *frame.Frame, ext uint32) {
	if reason := checkFragment(f); reason != frame.ReasonNone {
		f.Drop(reason)
		return
	}
	if !o.elsewhere(f) {
		return
	}
	r, ok := o.m.follow(&o.g.frags, fragKey(f.DstIP4(), f), f, seconds(b.Now))
	if ok {
		o.fragmentOf(b, f, &r, ext)
	}
}

// fragmentOf sends a fragment of a flow's packet on.
func (o *Outbound) fragmentOf(b *frame.Batch, f *frame.Frame, r *ref, ext uint32) {
	hop := o.m.hopOf(r, f.DstIP4())
	if hop == nil {
		f.Drop(frame.NoRoute)
		return
	}
	mtu, ok := o.m.fits(b, f, o.g, hop.MTU)
	if !ok {
		return
	}
	r.touch(b.Now)
	r.flow.packets[guestSide].Add(1)
	r.flow.bytes[guestSide].Add(uint64(f.Len) - frame.EthernetLen)
	translateIP(f, ipSrc, ext)
	o.m.send(f, hop, b.Now)
	split(b, f, mtu)
}

// firstFragment notes the flow of a packet whose first fragment is f, and
// sends what waited for it behind it.
func (o *Outbound) firstFragment(b *frame.Batch, f *frame.Frame, r *ref, ext uint32) {
	for _, data := range o.g.frags.lead(fragKey(f.DstIP4(), f), r, seconds(b.Now)) {
		if h := o.m.resume(b, f, data); h != nil {
			o.fragmentOf(b, h, r, ext)
		}
	}
}

// fragment sends a fragment that is not the first one after it.
func (in *Inbound) fragment(b *frame.Batch, f *frame.Frame) {
	if reason := checkFragment(f); reason != frame.ReasonNone {
		f.Drop(reason)
		return
	}
	r, ok := in.m.follow(&in.m.frags, fragKey(f.SrcIP4(), f), f, seconds(b.Now))
	switch {
	case ok && r.found():
		in.fragmentOf(b, f, &r)
	case ok:
		in.toPod(f)
	}
}

func (in *Inbound) fragmentOf(b *frame.Batch, f *frame.Frame, r *ref) {
	g := in.m.guests[uint8(r.w1>>8)]
	mtu, ok := in.passes(b, f, g)
	if !ok {
		return
	}
	r.touch(b.Now)
	r.flow.packets[outside].Add(1)
	r.flow.bytes[outside].Add(uint64(f.Len) - frame.EthernetLen)
	translateIP(f, ipDst, g.IP)
	in.deliver(b, f, g, r.queue.Load())
	split(b, f, mtu)
}

func (in *Inbound) firstFragment(b *frame.Batch, f *frame.Frame, r *ref) {
	for _, data := range in.m.frags.lead(fragKey(f.SrcIP4(), f), r, seconds(b.Now)) {
		if h := in.m.resume(b, f, data); h != nil {
			in.fragmentOf(b, h, r)
		}
	}
}

// firstWithoutFlow is firstFragment where f has become no guest's: the rest of
// the packet goes where f went.
func (in *Inbound) firstWithoutFlow(b *frame.Batch, f *frame.Frame) {
	key := fragKey(f.SrcIP4(), f)
	if f.Out == frame.Drop {
		in.m.forget(&in.m.frags, key)
		return
	}
	for _, data := range in.m.frags.lead(key, &ref{}, seconds(b.Now)) {
		if h := in.m.resume(b, f, data); h != nil {
			in.toPod(h)
		}
	}
}

// resume makes a fragment that has waited a frame of the batch again.
func (m *Masquerade) resume(b *frame.Batch, first *frame.Frame, data []byte) *frame.Frame {
	f := b.Reply()
	if f == nil {
		m.stats.fragDropped.Add(1)
		return nil
	}
	if !b.SetReply(f, data) {
		m.stats.fragDropped.Add(1)
		return nil
	}
	f.In, f.Queue = first.In, first.Queue
	if reason := f.ParseIPv4(); reason != frame.ReasonNone || !f.Frag {
		f.Drop(frame.BadIPv4) // it was checked when it came
		return nil
	}
	return f
}

// split makes the packet in f, which is on its way already, fit mtu (RFC 4787
// REQ-13a, RFC 791 section 3.2). The pieces follow as replies in order. mtu 0
// says that it fits.
func split(b *frame.Batch, f *frame.Frame, mtu int) {
	ihl := int(f.L4) - int(f.L3)
	per := (mtu - ihl) &^ 7
	if mtu == 0 || f.Out == frame.Drop {
		return
	}
	if per < 8 {
		f.Drop(frame.FragNeeded)
		return
	}
	if f.Flags&frame.NeedsCsum != 0 {
		f.CompleteChecksum()
	}
	begin, end, first := int(f.L4), int(f.Len), b.Len()
	field := f.FragField()
	for at := begin + per; at < end; at += per {
		if !piece(b, f, at, min(at+per, end), field) {
			for i := first; i < b.Len(); i++ {
				b.Frame(i).Drop(frame.BatchFull)
			}
			f.Drop(frame.BatchFull)
			return
		}
	}
	cut(f, begin+per)
	setFragment(f, field|frame.MoreFragments)
}

// piece appends the bytes from at to end of f's frame as a fragment.
func piece(b *frame.Batch, f *frame.Frame, at, end int, field uint16) bool {
	r := b.Reply()
	if r == nil {
		return false
	}
	segs := b.Segs(1 + len(f.Tail))
	if segs == nil {
		return false
	}
	n := copy(r.Head[:], f.Head[:f.L4])
	skipOptions(r.Head[int(f.L3)+20 : n])
	r.HeadLen, r.L3, r.L4, r.Proto, r.Frag = uint16(n), f.L3, f.L4, f.Proto, true
	r.In, r.Out, r.Queue = f.In, f.Out, f.Queue
	if h := int(f.HeadLen); at < h {
		segs = append(segs, f.Head[at:min(h, end):h])
	}
	off := int(f.HeadLen)
	for _, t := range f.Tail {
		if lo, hi := max(at-off, 0), min(end-off, len(t)); lo < hi {
			segs = append(segs, t[lo:hi:hi])
		}
		off += len(t)
	}
	r.Tail, r.Len = segs, int32(n+end-at)
	field += uint16(at-int(f.L4)) / 8
	if end < int(f.Len) {
		field |= frame.MoreFragments
	}
	setFragment(r, field)
	return true
}

// cut shortens a frame to n bytes.
func cut(f *frame.Frame, n int) {
	f.Len = int32(n)
	left := n - int(f.HeadLen)
	if left <= 0 {
		f.HeadLen, f.Tail = uint16(n), nil
		return
	}
	for i, t := range f.Tail {
		if len(t) >= left {
			f.Tail[i], f.Tail = t[:left:left], f.Tail[:i+1]
			return
		}
		left -= len(t)
	}
}

// setFragment writes length, fragment field and checksum of a frame's IP
// header.
func setFragment(f *frame.Frame, field uint16) {
	h := f.Head[f.L3:f.L4]
	binary.BigEndian.PutUint16(h[2:], uint16(int(f.Len)-int(f.L3)))
	binary.BigEndian.PutUint16(h[6:], field)
	h[ipSum], h[ipSum+1] = 0, 0
	binary.BigEndian.PutUint16(h[ipSum:], ^frame.Fold(frame.Sum(h, 0)))
}

// skipOptions overwrites the IP options that only the first fragment carries
// (RFC 791 section 3.1: those without the copied flag).
func skipOptions(o []byte) {
	for i := 0; i < len(o); {
		n := 1
		if o[i] > 1 {
			if i+1 >= len(o) || o[i+1] < 2 {
				return
			}
			n = min(int(o[i+1]), len(o)-i)
		}
		if o[i] == 0 {
			return
		}
		if o[i]&0x80 == 0 {
			for j := range n {
				o[i+j] = 1
			}
		}
		i += n
	}
}
