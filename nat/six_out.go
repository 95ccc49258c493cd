package nat

import (
	"net/netip"

	"sidewire/engine/frame"
)

// Outbound6 is the stage for what one guest sends.
type Outbound6 struct {
	m *Masquerade6
	g *guest6
}

// Outbound returns the stage for what the guest with this index sends. Before
// it belongs one that answers as the guest's router.
func (m *Masquerade6) Outbound(guest int) *Outbound6 { return &Outbound6{m, m.guests[guest]} }

// Process gives every frame with IPv6 that has no verdict yet one.
func (o *Outbound6) Process(b *frame.Batch) {
	r := run6{run: run{side: guestSide}}
	for i, n := 0, b.Len(); i < n; i++ { // replies are appended behind n
		f := b.Frame(i)
		if f.Out != frame.Drop || f.Reason != frame.ReasonNone || f.HeadLen < frame.EthernetLen || f.EtherType() != frame.TypeIPv6 {
			continue
		}
		o.frame(b, f, &r)
	}
	r.flush()
}

func (o *Outbound6) frame(b *frame.Batch, f *frame.Frame, r *run6) {
	m := o.m
	src, dst := mac48(f.Src()), mac48(f.Dst())
	if src == 0 || src>>40&1 != 0 || src == m.m.gwMAC {
		f.Drop(frame.Spoofed) // H079
		return
	}
	frag, reason := f.ParseIPv6()
	if reason == frame.ReasonNone {
		reason = sound6(f, frag)
	}
	if reason != frame.ReasonNone {
		f.Drop(reason)
		return
	}
	from, to := f.SrcIP6(), f.DstIP6()
	if *from == o.g.ip && o.g.mac.Load() != src {
		o.g.mac.Store(src)
	}
	switch {
	case to[0] == 0xff || linkLocal(from):
		o.onLink(f, dst)
	case dst != m.m.gwMAC:
		f.Drop(frame.NotCarried)
	case *from != o.g.ip, advertises(f) && !o.owns(f):
		f.Drop(frame.Spoofed)
	case *to == o.g.gateway, *to == m.router, *to == m.external:
		o.local(f)
	default:
		o.ip(b, f, r, frag)
	}
}

// onLink passes what the guest says of its own addresses on to the pod's kernel,
// which is the other station of the link and may have asked. It hears nothing
// else there: a router's words would change its routes, also where they hide
// behind extension headers, and each address that it answers costs it a
// neighbour. What the guest asks its router is answered before this stage.
func (o *Outbound6) onLink(f *frame.Frame, dst uint64) {
	from, to := f.SrcIP6(), f.DstIP6()
	switch {
	case !linkLocal(from) && *from != o.g.ip && *from != (Addr6{}):
		f.Drop(frame.Spoofed)
	case !advertises(f) || dst != o.m.m.gwMAC && to[0] != 0xff:
		f.Drop(frame.NotCarried)
	case !o.owns(f):
		f.Drop(frame.Spoofed)
	default:
		o.local(f)
	}
}

// advertises says whether a packet is a neighbour advertisement.
func advertises(f *frame.Frame) bool {
	return f.Proto == frame.ProtoICMPv6 && !f.Frag && f.L4Bytes()[0] == icmp6NeighbourSay
}

// owns says whether a neighbour advertisement is about an address that can be
// the guest's.
func (o *Outbound6) owns(f *frame.Frame) bool {
	h := f.L4Bytes()
	if len(h) < 24 {
		return false
	}
	target := (*Addr6)(h[8:24])
	return *target == o.g.ip || linkLocal(target) && *target != o.m.router
}

// local gives a frame to the pod's kernel, as it is.
func (o *Outbound6) local(f *frame.Frame) {
	if o.g.LocalTap == frame.Drop {
		f.Drop(frame.NotCarried)
		return
	}
	s := &o.g.localQueue[localSlot6(f)]
	if q := uint32(f.Queue); s.Load() != q {
		s.Store(q)
	}
	f.Out = o.g.LocalTap
}

// ip translates a packet to somewhere else.
func (o *Outbound6) ip(b *frame.Batch, f *frame.Frame, r *run6, frag frame.Frag6) {
	m := o.m
	if f.HopLimit() <= 1 {
		o.lastHop(b, f)
		return
	}
	switch {
	case frag.Offset != 0:
		o.fragment(b, f, frag)
		return
	case f.Proto == frame.ProtoICMPv6 && f.L4Bytes()[0] < icmp6Echo && m.isLocal(f.DstIP6()):
		o.local(f) // about what the pod's kernel sent
		return
	case f.Proto == frame.ProtoICMPv6 && f.L4Bytes()[0] < icmp6Echo:
		o.icmpError(b, f, frag)
		return
	}
	u := tuple{guest: o.g.index, proto: tableProto(f)}
	field, reason := 0, frame.ReasonNone
	if u.guestPort, u.remotePort, field, reason = ends6(f, guestSide); reason != frame.ReasonNone {
		f.Drop(reason)
		return
	}
	to := f.DstIP6()
	k0 := uint64(u.guestPort)<<32 | uint64(u.remotePort)<<16 | uint64(u.proto)
	if r.k0 != k0 || r.remote != *to || !r.found() || !r.alive() {
		a := m.find(to, func(id uint32) key {
			u.remote = id
			return m.m.table.guestKey(u)
		})
		if !a.found() {
			if a = o.open(b, f, u); !a.found() {
				if frag.More {
					m.m.forget(&o.g.frags, m.fragKey(to, frag))
				}
				return
			}
		}
		r.set(a, k0, 0)
		r.remote = *to
	}
	hop := m.m.hopOf(&r.ref, uint32(r.w0>>32))
	if hop == nil {
		m.refuse(b, f, o.g, unreach6NoRoute, frame.NoRoute)
		return
	}
	if !m.fits(b, f, o.g, hop.MTU) {
		return
	}
	if f.Proto != frame.ProtoTCP || m.m.track(&r.ref, f, guestSide) {
		r.touch(b.Now)
	}
	if q := uint32(f.Queue); r.queue.Load() != q {
		r.queue.Store(q)
	}
	r.count(f)
	if frag.More {
		o.firstFragment(b, f, &r.ref, frag)
	}
	translate6(f, ip6Src, &m.external, field, uint16(r.w0))
	m.m.send(f, hop, b.Now)
}

// lastHop answers a packet whose hops end here, unless it is for the pod itself.
func (o *Outbound6) lastHop(b *frame.Batch, f *frame.Frame) {
	if o.m.isLocal(f.DstIP6()) {
		o.local(f)
		return
	}
	o.m.replyError(b, f, o.g, icmp6TimeExceeded, 0, 0)
	f.Drop(frame.TTLExpired)
}

// refuse drops a packet and tells its sender so.
func (m *Masquerade6) refuse(b *frame.Batch, f *frame.Frame, g *guest6, code uint8, reason frame.DropReason) {
	m.replyError(b, f, g, icmp6Unreachable, code, 0)
	f.Drop(reason)
}

// elsewhere says whether a packet is for somebody beyond the pod and the guest's
// own network. Otherwise it has got its verdict.
func (o *Outbound6) elsewhere(f *frame.Frame) bool {
	to := f.DstIP6()
	switch {
	case o.m.isLocal(to):
		o.local(f)
	case martian(to):
		f.Drop(frame.Policy) // H105
	case o.g.net.Contains(netip.AddrFrom16(*to)):
		f.Drop(frame.NoRoute) // nobody else lives there
	default:
		return true
	}
	return false
}

// open makes the flow of a packet that has none, or gives the packet its
// verdict. u.remote is set here.
func (o *Outbound6) open(b *frame.Batch, f *frame.Frame, u tuple) ref {
	m, g, to := o.m, o.g, f.DstIP6()
	if !o.elsewhere(f) {
		return ref{}
	}
	for _, p := range m.deny {
		if p.Contains(netip.AddrFrom16(*to)) {
			m.refuse(b, f, g, unreach6Prohibited, frame.Policy)
			return ref{}
		}
	}
	w, ok := firstSegment(f, guestSide)
	if !ok || u.proto == frame.ProtoICMP && !asks(u.remotePort, guestSide) {
		f.Drop(frame.NoFlow)
		return ref{}
	}
	kind := kindOf(u.proto)
	if reason := m.m.admitFlow(g.guest, kind, w.state() == tcpInit, guestSide, b.Now); reason != frame.ReasonNone {
		m.refuse(b, f, g, unreach6Address, reason)
		return ref{}
	}
	if u.remote = m.addrs.acquire(to); u.remote == 0 {
		g.forget(kind)
		m.m.stats.tableFull.Add(1)
		m.refuse(b, f, g, unreach6Address, frame.TableFull)
		return ref{}
	}
	hop := m.m.cfg.Router.Route(u.remote)
	if hop == nil {
		m.addrs.release(u.remote)
		g.forget(kind)
		m.m.stats.noRoute.Add(1)
		m.refuse(b, f, g, unreach6NoRoute, frame.NoRoute)
		return ref{}
	}
	op := opening{tuple: u, g: g.guest, side: guestSide, queue: f.Queue, hop: hop, tcp: w}
	if s := m.m.space(u.proto); s != nil {
		if op.external, op.pinned = s.acquire(g.guest, u.guestPort, seconds(b.Now)); !op.pinned {
			m.addrs.release(u.remote)
			g.forget(kind)
			m.m.stats.noPort.Add(1)
			m.refuse(b, f, g, unreach6Address, frame.NoPort)
			return ref{}
		}
	}
	r, reason := m.m.open(&op, b.Now)
	if reason != frame.ReasonNone {
		m.refuse(b, f, g, unreach6Address, reason)
	}
	return r
}
