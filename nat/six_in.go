package nat

import (
	"sidewire/engine/frame"
)

// Inbound6 is the stage for what the uplink receives.
type Inbound6 struct{ m *Masquerade6 }

// Inbound returns the stage for what the uplink receives.
func (m *Masquerade6) Inbound() *Inbound6 { return &Inbound6{m} }

// Process gives every frame with IPv6 that has no verdict yet one.
func (in *Inbound6) Process(b *frame.Batch) {
	r := run6{run: run{side: outside}}
	for i, n := 0, b.Len(); i < n; i++ { // replies are appended behind n
		f := b.Frame(i)
		if f.Out != frame.Drop || f.Reason != frame.ReasonNone || f.HeadLen < frame.EthernetLen || f.EtherType() != frame.TypeIPv6 {
			continue
		}
		in.frame(b, f, &r)
	}
	r.flush()
}

func (in *Inbound6) frame(b *frame.Batch, f *frame.Frame, r *run6) {
	frag, reason := f.ParseIPv6()
	if reason == frame.ReasonNone && *f.DstIP6() != in.m.external {
		reason = frame.NotCarried
	}
	if reason == frame.ReasonNone {
		reason = sound6(f, frag)
	}
	switch {
	case reason != frame.ReasonNone:
		f.Drop(reason)
	case f.HopLimit() == 0:
		f.Drop(frame.TTLExpired)
	case frag.Offset != 0:
		in.fragment(b, f, frag)
	case f.Proto == frame.ProtoICMPv6 && f.L4Bytes()[0] < icmp6Echo:
		in.icmpError(b, f, frag)
	default:
		in.ip(b, f, r, frag)
	}
}

func (in *Inbound6) ip(b *frame.Batch, f *frame.Frame, r *run6, frag frame.Frag6) {
	m := in.m
	u := tuple{proto: tableProto(f)}
	field, reason := 0, frame.ReasonNone
	if u.external, u.remotePort, field, reason = ends6(f, outside); reason != frame.ReasonNone {
		f.Drop(reason)
		return
	}
	from := f.SrcIP6()
	k0 := uint64(u.external)<<32 | uint64(u.remotePort)<<16 | uint64(u.proto)
	if r.k0 != k0 || r.remote != *from || !r.found() || !r.alive() {
		a := m.find(from, func(id uint32) key {
			u.remote = id
			return m.m.table.outsideKey(u)
		})
		if !a.found() {
			if a = in.open(b, f, u); !a.found() {
				if frag.More {
					in.firstWithoutFlow(b, f, frag)
				}
				return
			}
		}
		r.set(a, k0, 0)
		r.remote = *from
	}
	g := m.guests[uint8(r.w1>>8)]
	if !in.passes(b, f, g) {
		return
	}
	if f.Proto != frame.ProtoTCP || m.m.track(&r.ref, f, outside) {
		r.touch(b.Now)
	}
	r.count(f)
	if frag.More {
		in.firstFragment(b, f, &r.ref, frag)
	}
	translate6(f, ip6Dst, &g.ip, field, uint16(r.w0>>16))
	in.deliver(b, f, g, r.queue.Load())
}

// passes says whether a packet may be passed on to the guest: it has hops left
// and is not too long. Otherwise its sender is told.
func (in *Inbound6) passes(b *frame.Batch, f *frame.Frame, g *guest6) bool {
	if f.HopLimit() <= 1 {
		in.m.replyError(b, f, nil, icmp6TimeExceeded, 0, 0)
		f.Drop(frame.TTLExpired)
		return false
	}
	return in.m.fits(b, f, nil, g.MTU)
}

// deliver sends a translated frame to its guest, as [Inbound.deliver] does.
func (in *Inbound6) deliver(b *frame.Batch, f *frame.Frame, g *guest6, queue uint32) {
	mac := g.mac.Load()
	if mac == 0 {
		if g.asks.take(b.Now) {
			in.m.askGuest(b, f.In, g)
		}
		f.Drop(frame.NoNeighbour)
		return
	}
	putMAC(f.Head[0:], mac)
	putMAC(f.Head[6:], in.m.m.gwMAC)
	f.Queue, f.Out = uint16(queue), g.Port
}

// toPod gives a packet that belongs to no guest to the pod's own kernel, as
// [Inbound.toPod] does.
func (in *Inbound6) toPod(f *frame.Frame) { (&Inbound{in.m.m}).toPod(f) }

// open makes the flow of a packet that has none, if the packet may come in.
// Otherwise it is the pod's, or dropped in silence (RFC 5382 REQ-4a). u.remote
// is set here.
func (in *Inbound6) open(b *frame.Batch, f *frame.Frame, u tuple) ref {
	m, from := in.m, f.SrcIP6()
	if martian(from) || *from == m.external || m.behind(from) {
		f.Drop(frame.Spoofed) // H082
		return ref{}
	}
	w, ok := firstSegment(f, outside)
	if !ok || u.proto == frame.ProtoICMP && !asks(u.remotePort, outside) {
		f.Drop(frame.NoFlow)
		return ref{}
	}
	op := opening{tuple: u, g: m.m.all, side: outside, tcp: w}
	s, now := m.m.space(u.proto), seconds(b.Now)
	switch {
	case u.proto == frame.ProtoTCP || u.proto == frame.ProtoUDP:
		var how admission
		if op.g, op.guestPort, how = s.admit(u.external, now); how == refused || how == invited && !m.welcome(from, u, w) {
			switch {
			case how == invited:
				s.release(u.external, unused)
				f.Drop(frame.NoFlow)
			case s.parting(u.external, now):
				f.Drop(frame.NoFlow)
			default:
				in.toPod(f)
			}
			return ref{}
		}
		op.pinned = true
	case m.m.all == nil:
		f.Drop(frame.NoFlow)
		return ref{}
	default:
		op.guestPort = u.external
	}
	op.guest = op.g.index
	reason := m.m.admitFlow(op.g, kindOf(u.proto), w.state() == tcpInit, outside, b.Now)
	if reason == frame.ReasonNone {
		if op.remote = m.addrs.acquire(from); op.remote == 0 {
			op.g.forget(kindOf(u.proto))
			m.m.stats.tableFull.Add(1)
			reason = frame.TableFull
		}
	}
	if reason != frame.ReasonNone {
		if op.pinned {
			s.release(u.external, unused)
		}
		f.Drop(reason)
		return ref{}
	}
	r, reason := m.m.open(&op, b.Now)
	if reason != frame.ReasonNone {
		f.Drop(reason)
	}
	return r
}

// welcome is [Masquerade.welcome], for an address that may have no number.
func (m *Masquerade6) welcome(from *Addr6, u tuple, w tcpWord) bool {
	if m.m.cfg.Filtering != AddressDependent {
		return m.m.welcome(u, w)
	}
	r := m.find(from, func(id uint32) key {
		u.remote = id
		return m.m.table.addressKey(u)
	})
	return r.found() && (u.proto != frame.ProtoTCP || w.state() == tcpInit)
}

// Local6 is the stage for what a guest's local tap sends.
type Local6 struct {
	m *Masquerade6
	g *guest6
}

// Local returns the stage for what the local tap of the guest with this index
// sends: the pod's kernel, as the gateway.
func (m *Masquerade6) Local(guest int) *Local6 { return &Local6{m, m.guests[guest]} }

// Process passes packets for the guest and questions for its hardware address on
// to it.
func (l *Local6) Process(b *frame.Batch) {
	for i, n := 0, b.Len(); i < n; i++ {
		f := b.Frame(i)
		if f.Out != frame.Drop || f.Reason != frame.ReasonNone || f.HeadLen < frame.EthernetLen || f.EtherType() != frame.TypeIPv6 {
			continue
		}
		if _, reason := f.ParseIPv6(); reason != frame.ReasonNone {
			f.Drop(reason)
			continue
		}
		dst, mac := mac48(f.Dst()), l.g.mac.Load()
		asking := f.Proto == frame.ProtoICMPv6 && !f.Frag && f.L4Bytes()[0] == icmp6NeighbourAsk
		if dst>>40&1 != 0 && !asking || dst>>40&1 == 0 && mac != 0 && dst != mac {
			f.Drop(frame.NotCarried)
			continue
		}
		f.Queue, f.Out = uint16(l.g.localQueue[localSlot6(f)].Load()), l.g.Port
	}
}

// localSlot6 is localSlot for IPv6.
func localSlot6(f *frame.Frame) uint32 {
	s, d := f.SrcIP6(), f.DstIP6()
	x := be32(s[12:]) ^ be32(d[12:])
	if !f.Frag && (f.Proto == frame.ProtoTCP || f.Proto == frame.ProtoUDP) {
		x ^= uint32(f.SrcPort() ^ f.DstPort())
	}
	x *= 0x9e3779b1
	return x >> 26
}
