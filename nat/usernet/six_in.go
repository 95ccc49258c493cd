package usernet

import (
	"encoding/binary"
	"net/netip"

	"sidewire/engine/frame"
)

// Types of ICMPv6 (RFC 4443).
const (
	icmp6Unreachable  = 1
	icmp6TooBig       = 2
	icmp6TimeExceeded = 3
	icmp6Parameter    = 4
	icmp6Echo         = 128
	icmp6EchoReply    = 129

	leastMTU6 = 1280 // RFC 8200, 5
	noNext    = 59   // the next header of a packet that ends there
	// code6 marks a code that is ICMPv6's in a message that wears ICMP's type.
	code6 = 0x80
)

// sixFragShift is where the number of the destination is in fragID6.
const sixFragShift = 33

// leastLink is the smallest MTU of a guest's link.
func leastLink(c *Config) int {
	if c.Guest.Is4() {
		return 576
	}
	return leastMTU6
}

// beSix makes a new Net one of IPv6.
func (n *Net) beSix(c *Config) {
	n.six = newSix(c)
	n.guest, n.gateway, n.mask = sixGuest, sixGate, sixMask
	n.conf.MTU -= sixMore
	n.inHead -= sixMore + sixFragment
	n.lent += sixMore
	n.echo, n.echoReply = icmp6Echo, icmp6EchoReply
}

// fromSix looks at a frame where the guest has IPv6, and gives a packet for the
// network beyond an IPv4 header, with numbers for addresses. Identification and
// checksum hold what names a fragment's packet. It reports false for a frame
// that ends here: one that is not of IPv6 stays as it is.
func (w *worker) fromSix(f *frame.Frame) bool {
	n := w.net
	if f.EtherType() != frame.TypeIPv6 {
		return false
	}
	w.six.active = w.now
	frag, reason := f.ParseIPv6()
	if reason != frame.ReasonNone {
		f.Drop(reason)
		return false
	}
	dst, number := f.DstIP6(), uint32(0)
	switch src := netip.AddrFrom16(*f.SrcIP6()); {
	case src.IsLinkLocalUnicast(), src.IsUnspecified(), mac48(f.Dst()) != n.gwMAC:
		f.Drop(frame.NotCarried) // to a group, to nobody here, or only for this link
		return false
	case src != n.conf.Guest:
		f.Drop(frame.Spoofed)
		return false
	}
	switch to := netip.AddrFrom16(*dst); {
	case to.IsMulticast(), to.IsLinkLocalUnicast(), to.IsUnspecified(), to.IsLoopback(), to.Is4In6(),
		to == n.conf.Guest, f.Proto == noNext, f.Proto == frame.ProtoICMP:
		f.Drop(frame.NotCarried)
		return false
	case n.conf.Prefix.Contains(to):
		number = n.six.own[*dst]
	}
	if number == 0 {
		if number = n.six.number(w, dst); number == 0 {
			w.stats.TableFull++
			f.Drop(frame.TableFull)
			return false
		}
	}
	off, h := int(f.L4)-l4, f.Head[l3:l4]
	total := ip4Len + int(f.Len) - int(f.L4)
	if total > packetMost || f.Flags&frame.NeedsCsum != 0 && int(f.CsumStart) < int(f.L4) {
		f.Drop(frame.BadOffload)
		return false
	}
	class, hops := h[0]<<4|h[1]>>4, f.HopLimit()
	if f.Proto == protoICMP6 {
		if !f.Frag && int(f.HeadLen) < int(f.L4)+icmpLen {
			f.Drop(frame.BadTransport)
			return false
		}
		f.Proto = frame.ProtoICMP
	}
	h[0], h[1] = 0x45, class
	binary.BigEndian.PutUint16(h[2:], uint16(total))
	field := uint16(frame.DontFragment)
	if frag.More || frag.Offset > 0 {
		field = frag.Offset / 8
		if frag.More {
			field |= frame.MoreFragments
		}
	}
	binary.BigEndian.PutUint16(h[4:], uint16(frag.ID))
	binary.BigEndian.PutUint16(h[6:], field)
	h[8], h[9] = hops, f.Proto
	binary.BigEndian.PutUint16(h[10:], uint16(frag.ID>>16))
	binary.BigEndian.PutUint32(h[12:], sixGuest)
	binary.BigEndian.PutUint32(h[16:], number)
	binary.BigEndian.PutUint16(f.Head[12:], frame.TypeIPv4)
	copy(f.Head[l4:], f.Head[f.L4:f.HeadLen])
	f.HeadLen -= uint16(off)
	f.Len -= int32(off)
	f.L4 = l4
	if f.Flags&frame.NeedsCsum != 0 {
		f.CsumStart -= uint16(off)
	}
	return true
}

// fragID6 names the packet that a fragment belongs to: by destination and
// identification (RFC 8200, 4.5).
func fragID6(f *frame.Frame) uint64 {
	id := uint64(binary.BigEndian.Uint16(f.Head[l3+10:]))<<16 | uint64(f.IPID())
	return uint64(f.DstIP4())<<sixFragShift | id<<1 | 1
}

// icmp6Known is icmpKnown for messages of ICMPv6 other than echo requests.
func (w *worker) icmp6Known(f *frame.Frame) bool {
	if t := f.Head[f.L4]; t >= icmp6Unreachable && t <= icmp6Parameter {
		return w.guestError6(f)
	}
	f.Drop(frame.NotCarried)
	return true
}

// guestError6 is guestError for ICMPv6.
func (w *worker) guestError6(f *frame.Frame) bool {
	h := f.Head[int(f.L4)+icmpLen : f.HeadLen]
	if len(h) < ip6Len+8 || h[0]>>4 != 6 {
		f.Drop(frame.BadTransport)
		return true
	}
	t, remote := h[ip6Len:], f.DstIP4()
	if addr6(h[8:]) != w.net.six.address(remote) || netip.AddrFrom16(addr6(h[24:])) != w.net.conf.Guest {
		f.Drop(frame.NoFlow)
		return true
	}
	k := key{gport: binary.BigEndian.Uint16(t[2:]), proto: h[6]}
	switch k.proto {
	case frame.ProtoTCP:
		k.remote, k.rport = hostOf(remote), binary.BigEndian.Uint16(t)
	case protoICMP6:
		k.proto, k.gport = frame.ProtoICMP, binary.BigEndian.Uint16(t[4:])
	}
	i := w.table.find(k)
	if i == none {
		return false
	}
	if k.proto == frame.ProtoTCP && f.Head[f.L4] == icmp6TooBig {
		seq := binary.BigEndian.Uint32(t[4:])
		if fl := w.table.at(i); seq-fl.sndUna < fl.sndMax-fl.sndUna { // RFC 5927, 4.1
			mtu := min(binary.BigEndian.Uint32(f.Head[f.L4+4:]), packetMost)
			w.tcpTooBig(i, max(int(mtu), leastMTU6)-sixMore)
			f.Out = frame.Consumed
			return true
		}
	}
	f.Drop(frame.NotCarried)
	return true
}
