package nat

import (
	"sidewire/engine/frame"
)

// Outbound is the stage for what one guest sends.
type Outbound struct {
	m *Masquerade
	g *guest
}

// Outbound returns the stage for what the guest with this index sends.
func (m *Masquerade) Outbound(guest int) *Outbound { return &Outbound{m, m.guests[guest]} }

// run is the flow of the frames under way: frames of a flow tend to come
// together, so its counters are written once for all of them.
type run struct {
	ref
	k0, k1  uint64 // of the frame's own addresses and ports
	packets uint64
	bytes   uint64
	side    int
}

// count adds a frame that goes on.
func (r *run) count(f *frame.Frame) {
	r.packets++
	r.bytes += uint64(f.Len) - frame.EthernetLen
}

func (r *run) flush() {
	if r.packets != 0 {
		r.flow.packets[r.side].Add(r.packets)
		r.flow.bytes[r.side].Add(r.bytes)
		r.packets, r.bytes = 0, 0
	}
}

// set makes a the flow of the run, or ends it if a is none.
func (r *run) set(a ref, k0, k1 uint64) {
	r.flush()
	r.ref, r.k0, r.k1 = a, k0, k1
}

// Process gives every frame of the batch that has no verdict yet one.
func (o *Outbound) Process(b *frame.Batch) {
	r := run{side: guestSide}
	ext := o.m.external
	for i, n := 0, b.Len(); i < n; i++ { // replies are appended behind n
		f := b.Frame(i)
		if f.Out != frame.Drop || f.Reason != frame.ReasonNone {
			continue
		}
		o.frame(b, f, &r, ext)
	}
	r.flush()
}

func (o *Outbound) frame(b *frame.Batch, f *frame.Frame, r *run, ext uint32) {
	if int(f.HeadLen) < frame.EthernetLen {
		f.Drop(frame.ShortFrame)
		return
	}
	src, dst := mac48(f.Src()), mac48(f.Dst())
	if src == 0 || src>>40&1 != 0 || src == o.m.gwMAC {
		f.Drop(frame.Spoofed) // H079
		return
	}
	switch f.EtherType() {
	case frame.TypeIPv4:
	case frame.TypeARP:
		o.arp(b, f, src)
		return
	default:
		f.Drop(frame.NotCarried)
		return
	}
	if dst != o.m.gwMAC {
		f.Drop(frame.NotCarried)
		return
	}
	if reason := f.ParseIPv4(); reason != frame.ReasonNone {
		f.Drop(reason)
		return
	}
	if f.SrcIP4() != o.g.IP {
		f.Drop(frame.Spoofed)
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
	if o.g.mac.Load() != src {
		o.g.mac.Store(src)
	}
	if f.DstIP4() == o.g.Gateway {
		o.local(f)
		return
	}
	o.ip(b, f, r, ext)
}

// local gives a frame to the pod's kernel, as it is but for an alias.
func (o *Outbound) local(f *frame.Frame) {
	if o.g.LocalTap == frame.Drop {
		f.Drop(frame.NotCarried)
		return
	}
	o.g.Alias.toPod(f, o.g)
	o.g.rememberQueue(f)
	f.Out = o.g.LocalTap
}

// ip translates a packet to somewhere else.
func (o *Outbound) ip(b *frame.Batch, f *frame.Frame, r *run, ext uint32) {
	m := o.m
	if f.TTL() <= 1 {
		o.lastHop(b, f)
		return
	}
	switch {
	case f.Frag && hasPorts(f.Proto):
		o.fragment(b, f, ext)
		return
	case f.Proto == frame.ProtoICMP && isError(f) && m.isLocal(f.DstIP4()):
		o.local(f) // about what the pod's kernel sent (RFC 5508 REQ-7)
		return
	case f.Proto == frame.ProtoICMP && isError(f):
		o.icmpError(b, f, ext)
		return
	}
	u := tuple{remote: f.DstIP4(), guest: o.g.index, proto: f.Proto}
	field, reason := 0, frame.ReasonNone
	if u.guestPort, u.remotePort, field, reason = ends(f, guestSide); reason != frame.ReasonNone {
		f.Drop(reason)
		return
	}
	k0 := uint64(u.remote)<<32 | uint64(u.guestPort)<<16 | uint64(u.remotePort)
	k1 := uint64(u.proto)
	if r.k0 != k0 || r.k1 != k1 || !r.found() || !r.alive() {
		k := m.table.guestKey(u)
		a := m.table.find(&k)
		if !a.found() {
			if a = o.open(b, f, u); !a.found() {
				if f.MoreFrags() {
					m.forget(&o.g.frags, fragKey(u.remote, f))
				}
				return
			}
		}
		r.set(a, k0, k1)
	}
	hop := m.hopOf(&r.ref, u.remote)
	if hop == nil {
		m.refuse(b, f, o.g, unreachNet, frame.NoRoute)
		return
	}
	mtu, ok := m.fits(b, f, o.g, hop.MTU)
	if !ok {
		return
	}
	if f.Proto != frame.ProtoTCP || m.track(&r.ref, f, guestSide) {
		r.touch(b.Now)
	}
	if q := uint32(f.Queue); r.queue.Load() != q {
		r.queue.Store(q)
	}
	r.count(f)
	if f.MoreFrags() && hasPorts(f.Proto) {
		o.firstFragment(b, f, &r.ref, ext)
	}
	translate(f, ipSrc, ext, field, uint16(r.w0))
	m.send(f, hop, b.Now)
	if mtu != 0 {
		split(b, f, mtu)
	}
}

// send gives a translated frame its next hop.
func (m *Masquerade) send(f *frame.Frame, hop *frame.Hop, now int64) {
	hop.Touch(now)
	if mac, ok := hop.Addr(); ok {
		f.SetEthernet(mac, hop.Src)
		f.Out = m.cfg.Uplink
		return
	}
	// The kernel resolves the next hop on the way, so that nothing is lost. It
	// takes no GSO frames.
	if m.cfg.KernelPort == frame.Drop || f.GSOType() != frame.GSONone {
		f.Drop(frame.NoNeighbour)
		return
	}
	f.Out = m.cfg.KernelPort
}

// touch notes that a packet has used the flow.
func (r *ref) touch(now int64) {
	if s := seconds(now); r.seen.Load() != s {
		r.seen.Store(s)
	}
}

// hopOf returns the next hop of a flow, or nil if there is no way any more.
func (m *Masquerade) hopOf(r *ref, dst uint32) *frame.Hop {
	p := m.table.hop(r.slot)
	hop := p.Load()
	if hop != nil && !hop.Retired() {
		return hop
	}
	if hop = m.cfg.Router.Route(dst); hop != nil {
		p.Store(hop)
		if !r.alive() {
			p.Store(nil) // the slot's next owner asks for itself
		}
	}
	return hop
}

// lastHop answers a packet whose time to live ends here, unless it is for the
// pod itself.
func (o *Outbound) lastHop(b *frame.Batch, f *frame.Frame) {
	switch {
	case o.m.isLocal(f.DstIP4()):
		o.local(f)
	case f.TTL() == 0:
		f.Drop(frame.TTLExpired)
	default:
		o.m.replyError(b, f, o.g, icmpTimeExceeded, 0, 0)
		f.Drop(frame.TTLExpired)
	}
}

func (m *Masquerade) isLocal(ip uint32) bool {
	return ip == m.external || m.cfg.Local != nil && ip>>24 != 127 && m.cfg.Local.Local(ip)
}

// refuse drops a packet and tells its sender so.
func (m *Masquerade) refuse(b *frame.Batch, f *frame.Frame, g *guest, code uint8, reason frame.DropReason) {
	m.replyError(b, f, g, icmpUnreachable, code, 0)
	f.Drop(reason)
}

// elsewhere says whether a packet is for somebody beyond the pod and the
// guest's own network. Otherwise it has got its verdict.
func (o *Outbound) elsewhere(f *frame.Frame) bool {
	dst := f.DstIP4()
	switch {
	case o.m.isLocal(dst):
		o.local(f)
	case dst>>24 == 0, dst>>24 == 127, dst>>28 >= 0xe:
		f.Drop(frame.Policy) // H105: nowhere, loopback, multicast, reserved, broadcast
	case (dst^o.g.IP)&o.g.mask == 0:
		f.Drop(frame.NoRoute) // nobody else lives there
	case o.g.Proxied && f.Proto == frame.ProtoTCP:
		o.local(f)
	default:
		return true
	}
	return false
}

// open makes the flow of a packet that has none, or gives the packet its
// verdict.
func (o *Outbound) open(b *frame.Batch, f *frame.Frame, u tuple) ref {
	m, g, dst := o.m, o.g, u.remote
	if !o.elsewhere(f) {
		return ref{}
	}
	for _, p := range m.cfg.Deny {
		if p.has(dst) {
			m.refuse(b, f, g, unreachProhibited, frame.Policy)
			return ref{}
		}
	}
	w, ok := firstSegment(f, guestSide)
	if !ok || f.Proto == frame.ProtoICMP && !asks(u.remotePort, guestSide) {
		f.Drop(frame.NoFlow)
		return ref{}
	}
	// RFC 6888 REQ-11: no resources is a soft error. It comes before the route,
	// which may be a question to the kernel.
	if reason := m.admitFlow(g, kindOf(u.proto), w.state() == tcpInit, guestSide, b.Now); reason != frame.ReasonNone {
		m.refuse(b, f, g, unreachHost, reason)
		return ref{}
	}
	hop := m.cfg.Router.Route(dst)
	if hop == nil {
		g.forget(kindOf(u.proto))
		m.stats.noRoute.Add(1)
		m.refuse(b, f, g, unreachNet, frame.NoRoute)
		return ref{}
	}
	op := opening{tuple: u, g: g, side: guestSide, queue: f.Queue, hop: hop, tcp: w}
	if s := m.space(u.proto); s != nil {
		if op.external, op.pinned = s.acquire(g, u.guestPort, seconds(b.Now)); !op.pinned {
			g.forget(kindOf(u.proto))
			m.stats.noPort.Add(1)
			m.refuse(b, f, g, unreachHost, frame.NoPort)
			return ref{}
		}
	}
	r, reason := m.open(&op, b.Now)
	if reason != frame.ReasonNone {
		m.refuse(b, f, g, unreachHost, reason)
	}
	return r
}

// firstSegment says what state a flow starts in whose first packet is f, and
// whether f may start one at all. The first packet is then tracked like any
// other.
func firstSegment(f *frame.Frame, side int) (tcpWord, bool) {
	if f.Proto != frame.ProtoTCP {
		return 0, true
	}
	flags := segmentOf(f).flags
	if flags&flagRST != 0 || flags&(flagSYN|flagFIN) == flagSYN|flagFIN {
		return 0, false
	}
	s := nextState(tcpClosed, true, flags, false)
	return tcpWord(0).with(s).withOpener(side), true
}

// hasPorts says whether a protocol's flows are told apart by what its header
// holds, which fragments behind the first do not have.
func hasPorts(proto uint8) bool {
	return proto == frame.ProtoTCP || proto == frame.ProtoUDP || proto == frame.ProtoICMP
}

// otherFits says whether the header of another protocol is there as far as it
// is rewritten. Protocol 0, an IPv6 extension header, is none over IPv4, and in
// the table it means a free slot.
func otherFits(f *frame.Frame) bool {
	return f.Proto != 0 && (f.Frag || sumOffset(f.Proto) == 0 || len(f.L4Bytes()) >= 8)
}
