package nat

import (
	"encoding/binary"

	"sidewire/engine/frame"
)

// ICMPv6 types (RFC 4443, RFC 4861) and codes of Destination Unreachable.
const (
	icmp6Unreachable  = 1
	icmp6TooBig       = 2
	icmp6TimeExceeded = 3
	icmp6Parameter    = 4
	icmp6Echo         = 128 // errors are below
	icmp6EchoReply    = 129
	icmp6NeighbourAsk = 135
	icmp6NeighbourSay = 136

	unreach6NoRoute    = 0
	unreach6Prohibited = 1
	unreach6Address    = 3
)

// queryPort6 is queryPort for ICMPv6.
func queryPort6(typ uint8, side int) (uint16, bool) {
	switch typ {
	case icmp6Echo:
		return queryPort(icmpEcho, side)
	case icmp6EchoReply:
		return queryPort(icmpEchoReply, side)
	}
	return 0, false
}

// embedded6 is the packet inside an ICMPv6 error, by offsets in Head.
type embedded6 struct {
	ip, l4   int
	proto    uint8
	src, dst *Addr6
	// first and second are the ports; a query has its id and type there.
	first, second uint16
}

// parseEmbedded6 checks an ICMPv6 error and finds the packet inside. Only Head is
// read, but for the sum.
func parseEmbedded6(f *frame.Frame, frag frame.Frag6) (e embedded6, reason frame.DropReason) {
	if t := f.L4Bytes()[0]; frag.At != 0 || t < icmp6Unreachable || t > icmp6Parameter {
		return e, frame.NotCarried
	}
	if f.Flags&(frame.NeedsCsum|frame.DataValid) == 0 {
		n := int(f.Len) - int(f.L4)
		sum := frame.Sum(f.Head[int(f.L3)+ip6Src:int(f.L3)+ip6Len], frame.ProtoICMPv6+uint64(n))
		if frame.Fold(f.SumFrom(int(f.L4), int(f.Len), sum)) != 0xffff {
			return e, frame.BadChecksum
		}
	}
	e.ip = int(f.L4) + 8
	h := f.Head[e.ip:max(e.ip, int(f.HeadLen))]
	if len(h) < ip6Len || h[0]>>4 != 6 {
		return e, frame.BadTransport
	}
	e.src, e.dst = (*Addr6)(h[ip6Src:ip6Dst]), (*Addr6)(h[ip6Dst:ip6Len])
	proto, at := h[6], ip6Len
	for proto == 0 || proto == 60 || proto == protoFragment {
		if len(h) < at+8 {
			return e, frame.BadTransport
		}
		if proto == protoFragment {
			if be16(h[at+2:])&^7 != 0 {
				return e, frame.NoFlow // a fragment that shows no ports
			}
			proto, at = h[at], at+8
		} else {
			proto, at = h[at], at+8+int(h[at+1])*8
		}
	}
	if len(h) < at+8 {
		return e, frame.BadTransport
	}
	e.l4, e.proto = e.ip+at, proto
	t := h[at:]
	switch proto {
	case frame.ProtoTCP, frame.ProtoUDP:
		e.first, e.second = be16(t), be16(t[2:])
	case frame.ProtoICMPv6:
		e.first, e.second, e.proto = be16(t[queryID:]), uint16(t[0]), frame.ProtoICMP
	case 0, frame.ProtoICMP, protoRouting:
		return e, frame.NotCarried
	}
	return e, frame.ReasonNone
}

// rewriteEmbedded6 puts addr and port in place of the address at offset at and
// the field of the packet inside an ICMPv6 error, with its checksum. It returns
// the change of the sum around it.
func rewriteEmbedded6(f *frame.Frame, e *embedded6, at int, addr *Addr6, field int, port uint16) (change uint64) {
	t := f.Head[e.l4:f.HeadLen]
	was := (*Addr6)(f.Head[e.ip+at : e.ip+at+16])
	addrs := diff6(was, addr)
	*was = *addr
	change = addrs
	switch e.proto {
	case frame.ProtoTCP, frame.ProtoUDP:
		ports := diff16(be16(t[field:]), port)
		binary.BigEndian.PutUint16(t[field:], port)
		change += ports
		if off := sumOffset(e.proto); len(t) >= off+2 {
			change += putSum(t[off:], addrs+ports, e.proto == frame.ProtoUDP)
		}
	case frame.ProtoICMP:
		ports := diff16(be16(t[queryID:]), port)
		binary.BigEndian.PutUint16(t[queryID:], port)
		change += ports + putSum(t[2:], addrs+ports, false)
	}
	return change
}

// icmpError carries an error about a packet that the guest was sent.
func (o *Outbound6) icmpError(b *frame.Batch, f *frame.Frame, frag frame.Frag6) {
	m := o.m
	e, reason := parseEmbedded6(f, frag)
	if reason != frame.ReasonNone {
		f.Drop(reason)
		return
	}
	u := tuple{remotePort: e.first, guestPort: e.second, guest: o.g.index, proto: e.proto}
	field, ok := portDst, true
	if e.proto == frame.ProtoICMP {
		u.guestPort, field = e.first, queryID
		u.remotePort, ok = queryPort6(uint8(e.second), outside)
	}
	if !ok || *e.dst != o.g.ip || *e.src != *f.DstIP6() {
		f.Drop(frame.NoFlow)
		return
	}
	r := m.find(e.src, func(id uint32) key {
		u.remote = id
		return m.m.table.guestKey(u)
	})
	if !r.found() {
		f.Drop(frame.NoFlow)
		return
	}
	hop := m.m.hopOf(&r, uint32(r.w0>>32))
	if hop == nil {
		f.Drop(frame.NoRoute)
		return
	}
	inside := rewriteEmbedded6(f, &e, ip6Dst, &m.external, field, uint16(r.w0))
	fixICMP6(f, translateIP6(f, ip6Src, &m.external), inside)
	m.m.send(f, hop, b.Now)
}

// icmpError carries an error about a packet that a guest has sent.
func (in *Inbound6) icmpError(b *frame.Batch, f *frame.Frame, frag frame.Frag6) {
	m := in.m
	e, reason := parseEmbedded6(f, frag)
	if reason != frame.ReasonNone {
		f.Drop(reason)
		return
	}
	u := tuple{remotePort: e.second, external: e.first, proto: e.proto}
	field, ok := portSrc, true
	if e.proto == frame.ProtoICMP {
		field = queryID
		u.remotePort, ok = queryPort6(uint8(e.second), guestSide)
	}
	if !ok || *e.src != m.external || f.HopLimit() <= 1 {
		f.Drop(frame.NoFlow)
		return
	}
	r := m.find(e.dst, func(id uint32) key {
		u.remote = id
		return m.m.table.outsideKey(u)
	})
	if !r.found() {
		f.Drop(frame.NoFlow)
		return
	}
	g := m.guests[uint8(r.w1>>8)]
	inside := rewriteEmbedded6(f, &e, ip6Src, &g.ip, field, uint16(r.w0>>16))
	fixICMP6(f, translateIP6(f, ip6Dst, &g.ip), inside)
	in.deliver(b, f, g, r.queue.Load())
}

// replyError appends an ICMPv6 error about f to the batch: to guest g, or to the
// outside if g is nil. f is still as it came. There is none for what must not be
// answered (RFC 4443 section 2.4e) and none beyond the limit (2.4f).
func (m *Masquerade6) replyError(b *frame.Batch, f *frame.Frame, g *guest6, typ, code uint8, mtu int) {
	if !answerable6(f) {
		return
	}
	limit := &m.m.hopErrs
	if g != nil {
		limit = &g.errs
	}
	if !limit.take(b.Now) {
		m.m.stats.icmpLimited.Add(1)
		return
	}
	reply := b.Reply()
	if reply == nil {
		return
	}
	const l3, l4, quote = frame.EthernetLen, frame.EthernetLen + ip6Len, frame.EthernetLen + ip6Len + 8
	n := copy(reply.Head[quote:], f.Head[f.L3:f.HeadLen])
	h := reply.Head[:quote+n]
	copy(h[0:6], f.Src())
	copy(h[6:12], f.Dst())
	h[12], h[13] = frame.TypeIPv6>>8, frame.TypeIPv6&0xff
	from := &m.external
	reply.Out = m.m.cfg.Uplink
	if g != nil {
		from, reply.Out, reply.Queue = &g.gateway, g.Port, f.Queue
		putMAC(h[6:12], m.m.gwMAC)
	}
	to := *f.SrcIP6()
	t := h[l4:]
	t[0], t[1] = typ, code
	clear(t[2:8])
	binary.BigEndian.PutUint32(t[4:], uint32(mtu))
	icmp6Headers(h, from, &to, 64)
	reply.HeadLen, reply.Len, reply.In = uint16(len(h)), int32(len(h)), f.In
	m.m.stats.icmpErrors.Add(1)
}

// icmp6Headers writes the IPv6 header of a frame with ICMPv6 and its checksum,
// whose field is zero.
func icmp6Headers(h []byte, from, to *Addr6, hops uint8) {
	ip, t := h[frame.EthernetLen:frame.EthernetLen+ip6Len], h[frame.EthernetLen+ip6Len:]
	clear(ip)
	ip[0], ip[6], ip[ip6Hop] = 0x60, frame.ProtoICMPv6, hops
	binary.BigEndian.PutUint16(ip[4:], uint16(len(t)))
	copy(ip[ip6Src:], from[:])
	copy(ip[ip6Dst:], to[:])
	sum := frame.Sum(ip[ip6Src:], frame.ProtoICMPv6+uint64(len(t)))
	binary.BigEndian.PutUint16(t[2:], ^frame.Fold(frame.Sum(t, sum)))
}

// answerable6 says whether an ICMPv6 error may be sent about a packet.
func answerable6(f *frame.Frame) bool {
	switch {
	case f.Frag, f.Head[0]&1 != 0, f.DstIP6()[0] == 0xff, martian(f.SrcIP6()):
		return false
	case f.Proto == frame.ProtoICMPv6:
		return f.L4Bytes()[0] >= icmp6Echo
	}
	return true
}

// askGuest asks a guest for its hardware address, as its router.
func (m *Masquerade6) askGuest(b *frame.Batch, in frame.PortID, g *guest6) {
	r := b.Reply()
	if r == nil {
		return
	}
	const end = frame.EthernetLen + ip6Len + 32
	h := r.Head[:end]
	clear(h)
	group := Addr6{0xff, 2, 11: 1, 12: 0xff, 13: g.ip[13], 14: g.ip[14], 15: g.ip[15]}
	h[0], h[1] = 0x33, 0x33
	copy(h[2:6], group[12:])
	putMAC(h[6:], m.m.gwMAC)
	h[12], h[13] = frame.TypeIPv6>>8, frame.TypeIPv6&0xff
	t := h[frame.EthernetLen+ip6Len:]
	t[0] = icmp6NeighbourAsk
	copy(t[8:], g.ip[:])
	t[24], t[25] = 1, 1 // the sender's hardware address
	putMAC(t[26:], m.m.gwMAC)
	icmp6Headers(h, &m.router, &group, 255)
	r.HeadLen, r.Len = end, end
	r.In, r.Out = in, g.Port
}
