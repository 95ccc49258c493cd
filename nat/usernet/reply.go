package usernet

import (
	"encoding/binary"

	"sidewire/engine/frame"
)

const (
	ip4Len  = 20
	tcpLen  = 20
	udpLen  = 8
	icmpLen = 8
	l3      = frame.EthernetLen
	l4      = l3 + ip4Len
)

// ICMP types and codes (RFC 792, RFC 1812).
const (
	icmpEchoReply    = 0
	icmpUnreachable  = 3
	icmpEcho         = 8
	icmpTimeExceeded = 11
	icmpParameter    = 12
	codeNet          = 0
	codeHost         = 1
	codeProtocol     = 2
	codePort         = 3
	codeFragNeeded   = 4
	codeProhibited   = 13
	icmpQuoted       = 28 // what is quoted of a packet at least: its header and 8 bytes
	icmpQuotedMost   = frame.HeadSize - l4 - icmpLen
)

// Offsets in an ARP packet for Ethernet and IPv4 (RFC 826), from the frame's
// start.
const (
	arpOp        = l3 + 6
	arpSenderMAC = l3 + 8
	arpSenderIP  = l3 + 14
	arpTargetMAC = l3 + 18
	arpTargetIP  = l3 + 24
	arpEnd       = l3 + 28
	arpFixed     = 0x0001_0800_0604
)

// arp answers the guest's question for an address of its network that stands
// for something. src is the frame's source address.
func (w *worker) arp(b *frame.Batch, f *frame.Frame, src uint64) {
	n := w.net
	if int(f.HeadLen) < arpEnd {
		f.Drop(frame.ShortFrame)
		return
	}
	h := f.Head[:arpEnd]
	op := binary.BigEndian.Uint16(h[arpOp:])
	if binary.BigEndian.Uint64(h[l3-2:])&0xffff_ffff_ffff != arpFixed || op != 1 && op != 2 {
		f.Drop(frame.NotCarried) // H081
		return
	}
	sender, target := binary.BigEndian.Uint32(h[arpSenderIP:]), binary.BigEndian.Uint32(h[arpTargetIP:])
	if mac48(h[arpSenderMAC:]) != src || sender != n.guest && (sender != 0 || op != 1) {
		f.Drop(frame.Spoofed)
		return
	}
	if sender == n.guest {
		n.mac.Store(src)
	}
	if op != 1 || !n.answersFor(target) {
		f.Drop(frame.NotCarried)
		return
	}
	r := b.Reply()
	if r == nil {
		f.Drop(frame.BatchFull)
		return
	}
	a := r.Head[:arpEnd]
	copy(a, h)
	copy(a[0:6], f.Src())
	putMAC(a[6:], n.gwMAC)
	a[arpOp+1] = 2
	putMAC(a[arpSenderMAC:], n.gwMAC)
	copy(a[arpSenderIP:arpSenderIP+4], h[arpTargetIP:])
	copy(a[arpTargetMAC:arpTargetIP], h[arpSenderMAC:])
	copy(a[arpTargetIP:], h[arpSenderIP:arpSenderIP+4])
	r.HeadLen, r.Len = arpEnd, arpEnd
	r.In, r.Out, r.Queue = f.In, n.conf.Port, f.Queue
	f.Out = frame.Consumed
}

// answersFor says whether an address of the guest's network is one of ours.
func (n *Net) answersFor(a uint32) bool {
	if a == n.gateway {
		return true
	}
	for k := range n.service {
		if k.addr == a {
			return true
		}
	}
	return false
}

// toGuest makes f a frame for the guest, with an Ethernet header and an IPv4
// header without options, whose packet is n bytes long. The caller fills in
// what follows.
func (w *worker) toGuest(f *frame.Frame, proto uint8, src uint32, n int, queue uint16) {
	net := w.net
	h := f.Head[:l4]
	putMAC(h[0:], net.mac.Load())
	putMAC(h[6:], net.gwMAC)
	binary.BigEndian.PutUint16(h[12:], frame.TypeIPv4)
	h[l3], h[l3+1] = 0x45, 0
	binary.BigEndian.PutUint16(h[l3+2:], uint16(n))
	binary.BigEndian.PutUint32(h[l3+4:], 0x4000) // id 0: atomic (RFC 6864), DF
	h[l3+8], h[l3+9] = 64, proto
	h[l3+10], h[l3+11] = 0, 0
	binary.BigEndian.PutUint32(h[l3+12:], src)
	binary.BigEndian.PutUint32(h[l3+16:], net.guest)
	putIPSum(h)
	f.L3, f.L4, f.Proto = l3, l4, proto
	f.Out, f.Queue = net.conf.Port, queue
}

// putIPSum fills in the checksum of an IPv4 header without options, whose field
// is zero.
func putIPSum(h []byte) {
	s := ^frame.Fold(frame.Sum(h[l3:l4], 0))
	binary.BigEndian.PutUint16(h[l3+10:], s)
}

// pseudoSum is the sum of the pseudo-header of a packet from src to dst.
func pseudoSum(src, dst uint32, proto uint8, n int) uint64 {
	return uint64(src>>16) + uint64(src&0xffff) + uint64(dst>>16) + uint64(dst&0xffff) + uint64(proto) + uint64(n)
}
