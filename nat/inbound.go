package nat

import (
	"sidewire/engine/frame"
)

// Inbound is the stage for what the uplink receives.
type Inbound struct{ m *Masquerade }

// Inbound returns the stage for what the uplink receives.
func (m *Masquerade) Inbound() *Inbound { return &Inbound{m} }

// Process gives every frame of the batch that has no verdict yet one.
func (in *Inbound) Process(b *frame.Batch) {
	r := run{side: outside}
	ext := in.m.external
	for i, n := 0, b.Len(); i < n; i++ { // replies are appended behind n
		f := b.Frame(i)
		if f.Out != frame.Drop || f.Reason != frame.ReasonNone {
			continue
		}
		in.frame(b, f, &r, ext)
	}
	r.flush()
}

func (in *Inbound) frame(b *frame.Batch, f *frame.Frame, r *run, ext uint32) {
	if int(f.HeadLen) < frame.EthernetLen {
		f.Drop(frame.ShortFrame)
		return
	}
	if f.EtherType() != frame.TypeIPv4 {
		f.Drop(frame.NotCarried)
		return
	}
	if reason := f.ParseIPv4(); reason != frame.ReasonNone {
		f.Drop(reason)
		return
	}
	if f.DstIP4() != ext {
		f.Drop(frame.NotCarried)
		return
	}
	if !offloadFits(f) {
		f.Drop(frame.BadOffload)
		return
	}
	if f.MoreFrags() && !f.Frag {
		if reason := checkFragment(f); reason != frame.ReasonNone {
			f.Drop(reason)
			return
		}
	}
	if f.TTL() == 0 {
		f.Drop(frame.TTLExpired)
		return
	}
	in.ip(b, f, r)
}

func (in *Inbound) ip(b *frame.Batch, f *frame.Frame, r *run) {
	m := in.m
	switch {
	case f.Frag && hasPorts(f.Proto):
		in.fragment(b, f)
		return
	case f.Proto == frame.ProtoICMP && isError(f):
		in.icmpError(b, f)
		return
	}
	u := tuple{remote: f.SrcIP4(), proto: f.Proto}
	field, reason := 0, frame.ReasonNone
	if u.external, u.remotePort, field, reason = ends(f, outside); reason != frame.ReasonNone {
		f.Drop(reason)
		return
	}
	k0 := uint64(u.remote)<<32 | uint64(u.external)<<16 | uint64(u.remotePort)
	k1 := uint64(u.proto)
	if r.k0 != k0 || r.k1 != k1 || !r.found() || !r.alive() {
		k := m.table.outsideKey(u)
		a := m.table.find(&k)
		if !a.found() {
			if a = in.open(b, f, u); !a.found() {
				if f.MoreFrags() {
					in.firstWithoutFlow(b, f)
				}
				return
			}
		}
		r.set(a, k0, k1)
	}
	g := m.guests[uint8(r.w1>>8)]
	mtu, ok := in.passes(b, f, g)
	if !ok {
		return
	}
	if f.Proto != frame.ProtoTCP || m.track(&r.ref, f, outside) {
		r.touch(b.Now)
	}
	r.count(f)
	if f.MoreFrags() && hasPorts(f.Proto) {
		in.firstFragment(b, f, &r.ref)
	}
	translate(f, ipDst, g.IP, field, uint16(r.w0>>16))
	in.deliver(b, f, g, r.queue.Load())
	if mtu != 0 {
		split(b, f, mtu)
	}
}

// passes says whether a packet may be passed on to the guest: it has hops left
// and is not too long, or is to be split, as fits says. Otherwise its sender
// is told.
func (in *Inbound) passes(b *frame.Batch, f *frame.Frame, g *guest) (mtu int, ok bool) {
	if f.TTL() <= 1 {
		in.m.replyError(b, f, nil, icmpTimeExceeded, 0, 0)
		f.Drop(frame.TTLExpired)
		return 0, false
	}
	return in.m.fits(b, f, nil, g.MTU)
}

// deliver sends a translated frame to its guest. One that has not said a word
// yet, and whose hardware address nobody gave, is asked for it; the frame is
// lost, as when a neighbour's queue overflows.
func (in *Inbound) deliver(b *frame.Batch, f *frame.Frame, g *guest, queue uint32) {
	mac := g.mac.Load()
	if mac == 0 {
		if g.asks.take(b.Now) {
			in.m.askARP(b, f.In, g)
		}
		f.Drop(frame.NoNeighbour)
		return
	}
	putMAC(f.Head[0:], mac)
	putMAC(f.Head[6:], in.m.gwMAC)
	f.Queue, f.Out = uint16(queue), g.Port
}

// toPod gives a packet that belongs to no guest to the pod's own kernel, by a
// guest's local tap: a process may listen on a port of the NAT's range, and a
// port that nobody has is refused there. What is late for a port that was a
// guest's is dropped in silence instead: the pod must not end for the guest
// what the other end may still believe in.
func (in *Inbound) toPod(f *frame.Frame) {
	tap := in.m.guests[0].LocalTap
	if tap == frame.Drop {
		f.Drop(frame.NoFlow)
		return
	}
	putMAC(f.Dst(), in.m.gwMAC)
	f.Out = tap
}

// open makes the flow of a packet that has none, if the packet may come in.
// Otherwise it is the pod's, or dropped in silence (RFC 5382 REQ-4a).
func (in *Inbound) open(b *frame.Batch, f *frame.Frame, u tuple) ref {
	m := in.m
	if src := u.remote; src>>24 == 0 || src>>24 == 127 || src>>28 >= 0xe || src == m.external {
		f.Drop(frame.Spoofed) // H082: broadcast, loopback, LAND
		return ref{}
	}
	w, ok := firstSegment(f, outside)
	if !ok || f.Proto == frame.ProtoICMP && !asks(u.remotePort, outside) {
		f.Drop(frame.NoFlow)
		return ref{}
	}
	op := opening{tuple: u, g: m.all, side: outside, tcp: w}
	s := m.space(u.proto)
	switch {
	case u.proto == frame.ProtoTCP || u.proto == frame.ProtoUDP:
		var how admission
		if op.g, op.guestPort, how = s.admit(u.external, seconds(b.Now)); how == refused || how == invited && !m.welcome(u, w) {
			switch {
			case how == invited:
				s.release(u.external, unused)
				f.Drop(frame.NoFlow)
			case s.parting(u.external, seconds(b.Now)):
				f.Drop(frame.NoFlow)
			default:
				in.toPod(f)
			}
			return ref{}
		}
		op.pinned = true
	case m.all == nil:
		f.Drop(frame.NoFlow)
		return ref{}
	default:
		op.guestPort = u.external
	}
	op.guest = op.g.index
	if reason := m.admitFlow(op.g, kindOf(u.proto), w.state() == tcpInit, outside, b.Now); reason != frame.ReasonNone {
		if op.pinned {
			s.release(u.external, unused)
		}
		f.Drop(reason)
		return ref{}
	}
	r, reason := m.open(&op, b.Now)
	if reason != frame.ReasonNone {
		f.Drop(reason)
	}
	return r
}

// welcome says whether the filter lets a packet from outside use a guest's
// mapping. A TCP connection begins with a SYN: what a guest's mapping offers
// is no published service.
func (m *Masquerade) welcome(u tuple, w tcpWord) bool {
	if u.proto == frame.ProtoTCP && w.state() != tcpInit {
		return false
	}
	switch m.cfg.Filtering {
	case EndpointIndependent:
		return true
	case AddressDependent:
		k := m.table.addressKey(u)
		r := m.table.find(&k)
		return r.found()
	}
	return false
}
