package nat

import (
	"sidewire/engine/frame"
)

// fragKey names the packet that a fragment belongs to, by its remote address;
// the other one is always the same. Addresses are in it by a keyed hash, as
// nobody outside can make two meet.
func (m *Masquerade6) fragKey(remote *Addr6, frag frame.Frag6) uint64 {
	hi, lo := halves(remote)
	return m.addrs.hash(hi, lo)>>32<<32 | uint64(frag.ID) | 1<<32
}

// checkFragment6 gives the reason to drop a fragment, the first included.
func checkFragment6(f *frame.Frame, frag frame.Frag6) frame.DropReason {
	n := int(f.Len) - int(frag.At) - 8
	switch {
	case n <= 0, frag.More && n%8 != 0, int(frag.Offset)+n > 0xffff:
		return frame.BadIPv6
	case frag.Offset == 0 && int(f.HeadLen) < int(f.L4)+4:
		return frame.BadTransport // RFC 7112: the first one holds all headers
	}
	return frame.ReasonNone
}

// fragment sends a fragment that is not the first one after it.
func (o *Outbound6) fragment(b *frame.Batch, f *frame.Frame, frag frame.Frag6) {
	if !o.elsewhere(f) {
		return
	}
	r, ok := o.m.m.follow(&o.g.frags, o.m.fragKey(f.DstIP6(), frag), f, seconds(b.Now))
	if ok && r.found() {
		o.fragmentOf(b, f, &r)
	}
}

// fragmentOf sends a fragment of a flow's packet on.
func (o *Outbound6) fragmentOf(b *frame.Batch, f *frame.Frame, r *ref) {
	m := o.m
	hop := m.m.hopOf(r, uint32(r.w0>>32))
	if hop == nil {
		f.Drop(frame.NoRoute)
		return
	}
	if !m.fits(b, f, o.g, hop.MTU) {
		return
	}
	r.touch(b.Now)
	r.flow.packets[guestSide].Add(1)
	r.flow.bytes[guestSide].Add(uint64(f.Len) - frame.EthernetLen)
	translateIP6(f, ip6Src, &m.external)
	m.m.send(f, hop, b.Now)
}

// firstFragment notes the flow of a packet whose first fragment is f, and sends
// what waited for it behind it.
func (o *Outbound6) firstFragment(b *frame.Batch, f *frame.Frame, r *ref, frag frame.Frag6) {
	for _, data := range o.g.frags.lead(o.m.fragKey(f.DstIP6(), frag), r, seconds(b.Now)) {
		if h := o.m.resume(b, f, data); h != nil {
			o.fragmentOf(b, h, r)
		}
	}
}

// fragment sends a fragment that is not the first one after it.
func (in *Inbound6) fragment(b *frame.Batch, f *frame.Frame, frag frame.Frag6) {
	r, ok := in.m.m.follow(&in.m.m.frags, in.m.fragKey(f.SrcIP6(), frag), f, seconds(b.Now))
	switch {
	case ok && r.found():
		in.fragmentOf(b, f, &r)
	case ok:
		in.toPod(f)
	}
}

func (in *Inbound6) fragmentOf(b *frame.Batch, f *frame.Frame, r *ref) {
	g := in.m.guests[uint8(r.w1>>8)]
	if !in.passes(b, f, g) {
		return
	}
	r.touch(b.Now)
	r.flow.packets[outside].Add(1)
	r.flow.bytes[outside].Add(uint64(f.Len) - frame.EthernetLen)
	translateIP6(f, ip6Dst, &g.ip)
	in.deliver(b, f, g, r.queue.Load())
}

func (in *Inbound6) firstFragment(b *frame.Batch, f *frame.Frame, r *ref, frag frame.Frag6) {
	for _, data := range in.m.m.frags.lead(in.m.fragKey(f.SrcIP6(), frag), r, seconds(b.Now)) {
		if h := in.m.resume(b, f, data); h != nil {
			in.fragmentOf(b, h, r)
		}
	}
}

// firstWithoutFlow is firstFragment where f has become no guest's: the rest of
// the packet goes where f went.
func (in *Inbound6) firstWithoutFlow(b *frame.Batch, f *frame.Frame, frag frame.Frag6) {
	m, key := in.m.m, in.m.fragKey(f.SrcIP6(), frag)
	if f.Out == frame.Drop {
		m.forget(&m.frags, key)
		return
	}
	for _, data := range m.frags.lead(key, &ref{}, seconds(b.Now)) {
		if h := in.m.resume(b, f, data); h != nil {
			in.toPod(h)
		}
	}
}

// resume makes a fragment that has waited a frame of the batch again.
func (m *Masquerade6) resume(b *frame.Batch, first *frame.Frame, data []byte) *frame.Frame {
	f := b.Reply()
	if f == nil || !b.SetReply(f, data) {
		m.m.stats.fragDropped.Add(1)
		return nil
	}
	f.In, f.Queue = first.In, first.Queue
	if _, reason := f.ParseIPv6(); reason != frame.ReasonNone || !f.Frag {
		f.Drop(frame.BadIPv6) // it was checked when it came
		return nil
	}
	return f
}
