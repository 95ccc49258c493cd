package nat

import (
	"encoding/binary"

	"sidewire/engine/frame"
)

// ICMP types (RFC 792) and codes of Destination Unreachable.
const (
	icmpEchoReply      = 0
	icmpUnreachable    = 3
	icmpEcho           = 8
	icmpTimeExceeded   = 11
	icmpParameter      = 12
	icmpTimestamp      = 13
	icmpTimestampReply = 14

	unreachNet        = 0
	unreachHost       = 1
	unreachFragNeeded = 4
	unreachProhibited = 13
)

// isError says whether an ICMP packet is an error that is carried. Redirects
// and the deprecated source quench are not (RFC 5508 REQ-10).
func isError(f *frame.Frame) bool {
	switch f.Head[f.L4] {
	case icmpUnreachable, icmpTimeExceeded, icmpParameter:
		return true
	}
	return false
}

// queryPort is what stands for the remote port of a query of this type when
// side has sent it.
func queryPort(typ uint8, side int) (uint16, bool) {
	var p uint16
	switch typ {
	case icmpEcho:
		p = echoOut
	case icmpEchoReply:
		p = echoIn
	case icmpTimestamp:
		p = timestampOut
	case icmpTimestampReply:
		p = timestampIn
	default:
		return 0, false
	}
	if side == outside {
		p = (p - 1) ^ 1 + 1
	}
	return p, true
}

// asks says whether a packet from side with this stand-in for the remote port
// is a question, so that it may open a flow.
func asks(p uint16, side int) bool { return int(p-1)&1 == side }

// query returns the id of an ICMP query and what stands for the remote port.
func query(f *frame.Frame, side int) (id, port uint16, ok bool) {
	h := f.Head[f.L4:]
	port, ok = queryPort(h[0], side)
	return binary.BigEndian.Uint16(h[queryID:]), port, ok
}

// embedded is the packet inside an ICMP error, by offsets in Head.
type embedded struct {
	ip, l4   int
	proto    uint8
	src, dst uint32
	// first and second are the ports; a query has its id and type there.
	first, second uint16
}

// parseEmbedded checks an ICMP error and finds the packet inside (RFC 5508
// REQ-3). Only Head is read, but for the sum.
func parseEmbedded(f *frame.Frame) (e embedded, reason frame.DropReason) {
	if f.MoreFrags() {
		return e, frame.NotCarried
	}
	if f.Flags&(frame.NeedsCsum|frame.DataValid) == 0 &&
		frame.Fold(f.SumFrom(int(f.L4), int(f.Len), 0)) != 0xffff {
		return e, frame.BadChecksum
	}
	e.ip = int(f.L4) + 8
	h := f.Head[e.ip:max(e.ip, int(f.HeadLen))]
	if len(h) < 20 || h[0]>>4 != 4 {
		return e, frame.BadTransport
	}
	ihl := int(h[0]&15) * 4 // options are stepped over (REQ-3b)
	if ihl < 20 || len(h) < ihl+8 {
		return e, frame.BadTransport
	}
	if frame.Fold(frame.Sum(h[:ihl], 0)) != 0xffff {
		return e, frame.BadChecksum // REQ-3a
	}
	if binary.BigEndian.Uint16(h[6:])&0x1fff != 0 {
		return e, frame.NoFlow // a fragment that shows no ports
	}
	e.l4, e.proto = e.ip+ihl, h[9]
	e.src, e.dst = binary.BigEndian.Uint32(h[ipSrc:]), binary.BigEndian.Uint32(h[ipDst:])
	t := h[ihl:]
	switch e.proto {
	case frame.ProtoTCP, frame.ProtoUDP:
		e.first, e.second = binary.BigEndian.Uint16(t), binary.BigEndian.Uint16(t[2:])
	case frame.ProtoICMP:
		e.first, e.second = binary.BigEndian.Uint16(t[queryID:]), uint16(t[0])
	}
	return e, frame.ReasonNone
}

// rewriteEmbedded puts addr and port in place of those at offsets at and field
// of the packet inside an ICMP error, and keeps the checksums of both right.
func rewriteEmbedded(f *frame.Frame, e *embedded, at int, addr uint32, field int, port uint16) {
	ip, t := f.Head[e.ip:], f.Head[e.l4:f.HeadLen]
	was := binary.BigEndian.Uint32(ip[at:])
	binary.BigEndian.PutUint32(ip[at:], addr)
	addrs := diff(was, addr)
	change := addrs + putSum(ip[ipSum:], addrs, false)
	switch e.proto {
	case frame.ProtoTCP, frame.ProtoUDP:
		ports := diff16(binary.BigEndian.Uint16(t[field:]), port)
		binary.BigEndian.PutUint16(t[field:], port)
		change += ports
		if off := sumOffset(e.proto); len(t) >= off+2 {
			change += putSum(t[off:], addrs+ports, e.proto == frame.ProtoUDP)
		}
	case frame.ProtoICMP:
		ports := diff16(binary.BigEndian.Uint16(t[queryID:]), port)
		binary.BigEndian.PutUint16(t[queryID:], port)
		change += ports + putSum(t[2:], ports, false)
	}
	if !partial(f) {
		addDiff(f.Head[int(f.L4)+2:], change)
	}
}

// putSum applies a change to the checksum at the start of b and returns what
// that changes in the sum around it. Where optional is set, 0 is no checksum.
func putSum(b []byte, change uint64, optional bool) uint64 {
	old := binary.BigEndian.Uint16(b)
	if optional && old == 0 {
		return 0
	}
	sum := ^frame.Fold(uint64(^old) + change)
	if optional && sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(b, sum)
	return diff16(old, sum)
}

// icmpError carries an error about a packet that the guest was sent (RFC 5508
// REQ-5). It neither refreshes nor ends a flow (REQ-6).
func (o *Outbound) icmpError(b *frame.Batch, f *frame.Frame, ext uint32) {
	m := o.m
	e, reason := parseEmbedded(f)
	if reason != frame.ReasonNone {
		f.Drop(reason)
		return
	}
	u := tuple{remote: e.src, remotePort: e.first, guestPort: e.second, guest: o.g.index, proto: e.proto}
	field, ok := portDst, true
	if e.proto == frame.ProtoICMP {
		u.guestPort, field = e.first, queryID
		u.remotePort, ok = queryPort(uint8(e.second), outside)
	}
	if !ok || e.dst != o.g.IP || e.src != f.DstIP4() {
		f.Drop(frame.NoFlow)
		return
	}
	k := m.table.guestKey(u)
	r := m.table.find(&k)
	if !r.found() {
		f.Drop(frame.NoFlow)
		return
	}
	hop := m.hopOf(&r, u.remote)
	if hop == nil {
		f.Drop(frame.NoRoute)
		return
	}
	rewriteEmbedded(f, &e, ipDst, ext, field, uint16(r.w0))
	translateIP(f, ipSrc, ext)
	m.send(f, hop, b.Now)
}

// icmpError carries an error about a packet that a guest has sent (RFC 5508
// REQ-4).
func (in *Inbound) icmpError(b *frame.Batch, f *frame.Frame) {
	m := in.m
	e, reason := parseEmbedded(f)
	if reason != frame.ReasonNone {
		f.Drop(reason)
		return
	}
	u := tuple{remote: e.dst, remotePort: e.second, external: e.first, proto: e.proto}
	field, ok := portSrc, true
	if e.proto == frame.ProtoICMP {
		field = queryID
		u.remotePort, ok = queryPort(uint8(e.second), guestSide)
	}
	if !ok || e.src != f.DstIP4() || f.TTL() <= 1 {
		f.Drop(frame.NoFlow)
		return
	}
	k := m.table.outsideKey(u)
	r := m.table.find(&k)
	if !r.found() {
		f.Drop(frame.NoFlow)
		return
	}
	g := m.guests[uint8(r.w1>>8)]
	rewriteEmbedded(f, &e, ipSrc, g.IP, field, uint16(r.w0>>16))
	translateIP(f, ipDst, g.IP)
	in.deliver(b, f, g, r.queue.Load())
}

// replyError appends an ICMP error about f to the batch: to guest g, or to the
// outside if g is nil. f is still as it came. There is none for what must not
// be answered (RFC 1812 section 4.3.2.7) and none beyond the limit (section
// 4.3.2.8).
func (m *Masquerade) replyError(b *frame.Batch, f *frame.Frame, g *guest, typ, code uint8, mtu int) {
	if !answerable(f) {
		return
	}
	limit := &m.hopErrs
	if g != nil {
		limit = &g.errs
	}
	if !limit.take(b.Now) {
		m.stats.icmpLimited.Add(1)
		return
	}
	reply := b.Reply()
	if reply == nil {
		return
	}
	const l3, l4, quote = frame.EthernetLen, frame.EthernetLen + 20, frame.EthernetLen + 28
	n := copy(reply.Head[quote:], f.Head[f.L3:f.HeadLen])
	h := reply.Head[:quote+n]
	copy(h[0:6], f.Src())
	copy(h[6:12], f.Dst())
	h[12], h[13] = frame.TypeIPv4>>8, frame.TypeIPv4&0xff
	from := m.external
	reply.Out = m.cfg.Uplink
	if g != nil {
		from, reply.Out, reply.Queue = g.Gateway, g.Port, f.Queue
		putMAC(h[6:12], m.gwMAC)
	}
	ip := h[l3:l4]
	clear(ip)
	ip[0], ip[1] = 0x45, f.Head[f.L3+1]&^3 // RFC 5508 REQ-10d, without the ECN bits
	binary.BigEndian.PutUint16(ip[2:], uint16(len(h)-l3))
	ip[6] = 0x40 // an atomic datagram needs no identification (RFC 6864)
	ip[ipTTL], ip[9] = 64, frame.ProtoICMP
	binary.BigEndian.PutUint32(ip[ipSrc:], from)
	binary.BigEndian.PutUint32(ip[ipDst:], f.SrcIP4())
	binary.BigEndian.PutUint16(ip[ipSum:], ^frame.Fold(frame.Sum(ip, 0)))
	t := h[l4:]
	t[0], t[1] = typ, code
	clear(t[2:8])
	binary.BigEndian.PutUint16(t[6:], uint16(mtu))
	binary.BigEndian.PutUint16(t[2:], ^frame.Fold(frame.Sum(t, 0)))
	reply.HeadLen, reply.Len, reply.In = uint16(len(h)), int32(len(h)), f.In
	m.stats.icmpErrors.Add(1)
}

// answerable says whether an ICMP error may be sent about a packet.
func answerable(f *frame.Frame) bool {
	src, dst := f.SrcIP4(), f.DstIP4()
	switch {
	case f.Frag, f.Head[0]&1 != 0, dst>>28 >= 0xe, src>>24 == 0, src>>24 == 127, src>>28 >= 0xe:
		return false
	case f.Proto == frame.ProtoICMP:
		_, ok := queryPort(f.Head[f.L4], guestSide)
		return ok
	}
	return true
}

// ipLength is the length of the longest IP packet that a frame becomes.
func ipLength(f *frame.Frame) int {
	n := int(f.Len) - int(f.L3)
	switch f.GSOType() {
	case frame.GSOTCPv4:
		n = int(f.L4-f.L3) + int(f.Head[f.L4+12]>>4)*4 + int(f.GSOSize)
	case frame.GSOUDPL4:
		n = int(f.L4-f.L3) + 8 + int(f.GSOSize)
	}
	return n
}

// fits says whether a packet may go where mtu, unless it is 0, is the limit
// (RFC 4787 REQ-13). One that must not be fragmented has got its verdict, and
// its sender, guest g or the outside if that is nil, is told. One that is to be
// split once it is translated comes with the mtu.
func (m *Masquerade) fits(b *frame.Batch, f *frame.Frame, g *guest, mtu int) (int, bool) {
	if mtu <= 0 || ipLength(f) <= mtu {
		return 0, true
	}
	if f.FragField()&frame.DontFragment == 0 && f.GSOType() == frame.GSONone {
		return mtu, true
	}
	m.replyError(b, f, g, icmpUnreachable, unreachFragNeeded, mtu)
	f.Drop(frame.FragNeeded)
	return 0, false
}
