package main

import (
	"encoding/binary"

	"sidewire/engine/frame"
)

// tooLong is the stage that answers a guest's packets that do not fit the link's MTU, for nobody behind it ever sees them. A
// bridge has no address, so the answer comes in the name of whom the packet was for.
type tooLong struct {
	guest frame.PortID
	mtu   int
}

// vlanTags is room that tagged frames have beside the MTU, for two tags.
const vlanTags = 8

// Process implements engine.Stage.
func (l *tooLong) Process(b *frame.Batch) {
	for i, n := 0, b.Len(); i < n; i++ {
		f := b.Frame(i)
		if f.Out != frame.Drop || f.Reason != frame.ReasonNone || f.HeadLen < frame.EthernetLen {
			continue
		}
		size, most := int(f.Len), frame.EthernetLen+l.mtu
		if f.GSO != frame.GSONone {
			size = segmentSize(f)
		}
		switch typ := f.EtherType(); {
		case size <= most:
			continue
		case typ == frame.TypeIPv4:
			l.answer4(b, f)
		case typ == frame.TypeIPv6:
			l.answer6(b, f)
		case size <= most+vlanTags:
			continue
		}
		f.Drop(frame.OversizeFrame)
	}
}

// segmentSize is the length of the frames that a long one is cut into. What the
// offload's offsets say was checked.
func segmentSize(f *frame.Frame) int {
	head := int(f.CsumStart) + 8
	if f.GSOType() != frame.GSOUDPL4 {
		head = int(f.CsumStart) + 20
		if at := int(f.CsumStart) + 12; at < int(f.HeadLen) {
			head = int(f.CsumStart) + int(f.Head[at]>>4)*4
		}
	}
	return head + int(f.GSOSize)
}

const ip4Len, ip6Len, icmpLen = 20, 40, 8

// start begins an answer to f with an IP header of hdr bytes, and returns the packet; nil where the batch has no room.
func (l *tooLong) start(b *frame.Batch, f *frame.Frame, hdr int, about []byte) []byte {
	reply := b.Reply()
	if reply == nil {
		return nil
	}
	at := frame.EthernetLen + hdr + icmpLen
	n := at + copy(reply.Head[at:], about)
	p := reply.Head[:n]
	clear(p[frame.EthernetLen:at])
	copy(p, f.Src())
	copy(p[6:], f.Dst())
	copy(p[12:], f.Head[12:14])
	reply.HeadLen, reply.Len, reply.In, reply.Out, reply.Queue = uint16(n), int32(n), f.In, l.guest, f.Queue
	return p[frame.EthernetLen:]
}

// answer4 says that fragmentation is needed (RFC 792, RFC 1191).
func (l *tooLong) answer4(b *frame.Batch, f *frame.Frame) {
	var q [frame.HeadSize]byte
	ip := q[frame.EthernetLen:f.CopyTo(q[:])]
	if f.Head[0]&1 != 0 || len(ip) <= ip4Len || ip[0]>>4 != 4 || binary.BigEndian.Uint16(ip[6:])&0x1fff != 0 ||
		ip[9] == frame.ProtoICMP && ip[ip4Len] != 8 && ip[ip4Len] != 0 {
		return // RFC 1122, 3.2.2: nothing about other fragments than the first, nor about errors
	}
	p := l.start(b, f, ip4Len, ip)
	if p == nil {
		return
	}
	p[0], p[6], p[8], p[9] = 0x45, 0x40, 64, frame.ProtoICMP
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	copy(p[12:16], ip[16:20])
	copy(p[16:20], ip[12:16])
	binary.BigEndian.PutUint16(p[10:], ^frame.Fold(frame.Sum(p[:ip4Len], 0)))
	icmp := p[ip4Len:]
	icmp[0], icmp[1] = 3, 4
	binary.BigEndian.PutUint16(icmp[6:], uint16(l.mtu))
	binary.BigEndian.PutUint16(icmp[2:], ^frame.Fold(frame.Sum(icmp, 0)))
}

// answer6 says that the packet is too big (RFC 4443, 3.2).
func (l *tooLong) answer6(b *frame.Batch, f *frame.Frame) {
	var q [frame.HeadSize]byte
	ip := q[frame.EthernetLen:f.CopyTo(q[:])]
	if f.Head[0]&1 != 0 || len(ip) <= ip6Len || ip[0]>>4 != 6 || ip[24] == 0xff || ip[6] == frame.ProtoICMPv6 && ip[ip6Len] < 128 {
		return
	}
	p := l.start(b, f, ip6Len, ip)
	if p == nil {
		return
	}
	p[0], p[6], p[7] = 0x60, frame.ProtoICMPv6, 255
	binary.BigEndian.PutUint16(p[4:], uint16(len(p)-ip6Len))
	copy(p[8:24], ip[24:40])
	copy(p[24:40], ip[8:24])
	icmp := p[ip6Len:]
	icmp[0] = 2
	binary.BigEndian.PutUint32(icmp[4:], uint32(max(l.mtu, minMTU6)))
	sum := frame.Sum(p[8:40], uint64(len(icmp))+frame.ProtoICMPv6)
	binary.BigEndian.PutUint16(icmp[2:], ^frame.Fold(frame.Sum(icmp, sum)))
}
