package engine

import (
	"encoding/binary"

	"sidewire/engine/frame"
)

// Layout of ARP and of ND messages, beside what spoof.go names.
const (
	arpSenderIP = 14
	arpTarget   = 18 // the target's hardware address
	arpTargetIP = 24

	ndRedirect = 137
	ndTarget   = 8 // the target address in an NS, NA and redirect
)

// outARP translates an ARP packet of a guest's, and learns from it.
func (n *MACNAT) outARP(f *frame.Frame, off int, vlan uint16, src uint64, w *natWork) frame.DropReason {
	if int(f.HeadLen) < off+arpLen {
		return frame.ShortFrame
	}
	if f.Flags&frame.NeedsCsum != 0 {
		return frame.BadOffload // it would change what is written here
	}
	h := f.Head[off : off+arpLen]
	if binary.BigEndian.Uint16(h) != 1 || h[4] != 6 || h[5] != 4 {
		return frame.NotCarried
	}
	sender, target := getMAC(h[arpSender:]), getMAC(h[arpTarget:])
	if binary.BigEndian.Uint16(h[2:]) == frame.TypeIPv4 {
		n.learn(key4(h[arpSenderIP:], vlan), sender, f.In, true, w)
	}
	// A gratuitous reply and RARP may name the sender as the target as well.
	if target == sender || target == src {
		putMAC(h[arpTarget:], n.link)
	}
	putMAC(h[arpSender:], n.link)
	return frame.ReasonNone
}

// inARP puts a guest's address in the place of the link's.
func (n *MACNAT) inARP(f *frame.Frame, off int, mac uint64) {
	if h := f.Head[off : off+arpLen]; getMAC(h[arpTarget:]) == n.link {
		putMAC(h[arpTarget:], mac)
	}
}

// askLimit bounds the questions to guests: what is sent to the link's address may
// be for the host to forward.
var askLimit = newStormLimit(200)

// ask makes of an IPv4 packet for an address that nobody has shown the
// question who has it, from the packet's sender. The packet is lost; the answer
// teaches us for the next.
func (n *MACNAT) ask(f *frame.Frame, off int, now int64) {
	from, to := key4(f.Head[off+12:], 0), key4(f.Head[off+16:], 0)
	// Behind many tags it has no room.
	if off+arpLen > frame.HeadSize || !from.unicast() || !to.unicast() || !n.asked.take(askLimit, now) {
		f.Drop(frame.NoRoute)
		return
	}
	f.Tail, f.Offload, f.RxAt, f.RxBufs = nil, frame.Offload{}, 0, 0
	f.HeadLen, f.Len = uint16(off+arpLen), int32(off+arpLen)
	copy(f.Head[:], frame.Broadcast[:])
	binary.BigEndian.PutUint16(f.Head[off-2:], frame.TypeARP)
	h := f.Head[off : off+arpLen]
	copy(h, []byte{0, 1, 8, 0, 6, 4, 0, 1})
	copy(h[arpSender:], f.Head[6:12])
	binary.BigEndian.PutUint32(h[arpSenderIP:], uint32(from.lo))
	putMAC(h[arpTarget:], 0)
	binary.BigEndian.PutUint32(h[arpTargetIP:], uint32(to.lo))
}

// icmp6At returns where the ICMPv6 message of an IPv6 packet begins, as far as
// that lies in Head; 0 if there is none, or only a part of one.
func icmp6At(f *frame.Frame, off int) int {
	next, at := f.Head[off+6], off+ip6Len
	for {
		if next == protoICMP6 {
			if at+8 > int(f.HeadLen) {
				return 0
			}
			return at
		}
		if at+8 > int(f.HeadLen) {
			return 0
		}
		h := f.Head[at:]
		switch next {
		case extHopByHop, extRouting, extDestOpts:
			next, at = h[0], at+(int(h[1])+1)*8
		case extFragment:
			if binary.BigEndian.Uint16(h[2:])&^6 != 0 {
				return 0 // no host may believe ND in fragments (RFC 6980)
			}
			next, at = h[0], at+8
		default:
			return 0
		}
	}
}

// outND translates an ND message of a guest's, which begins at at, and learns
// from it. Other ICMPv6 messages pass.
func (n *MACNAT) outND(f *frame.Frame, off, at int, vlan uint16, src uint64, w *natWork) frame.DropReason {
	opts, option := 0, byte(optSourceLLA)
	switch f.Head[at] {
	case ndRouterSol:
		opts = at + 8
	case ndRouterAdv:
		opts = at + 16
	case ndNeighSol:
		opts = at + 24
	case ndNeighAdv:
		opts, option = at+24, optTargetLLA
	case ndRedirect:
		opts, option = at+40, optTargetLLA
	default:
		return frame.ReasonNone
	}
	end := off + ip6Len + int(binary.BigEndian.Uint16(f.Head[off+4:]))
	switch {
	case end > int(f.Len) || end > maxND || opts > end:
		return frame.BadTransport
	case f.Flags&frame.NeedsCsum != 0 && (int(f.CsumStart) != at || f.CsumOffset != icmp6Sum):
		return frame.BadOffload
	case opts > int(f.HeadLen):
		return frame.NotCarried // behind more extension headers than any host sends
	}
	b := f.Head[:f.HeadLen]
	if end > len(b) {
		if b = w.linear(f); b == nil {
			return frame.BatchFull
		}
	}
	sure, r := n.outOptions(f, b[:end], at, opts, option, vlan, src)
	if r != frame.ReasonNone {
		return r
	}
	if len(b) > int(f.HeadLen) {
		w.setLinear(f, b)
	}
	switch f.Head[at] {
	case ndNeighAdv:
		n.learn(key6(f.Head[at+ndTarget:], vlan), sure, f.In, true, w)
	case ndNeighSol, ndRouterSol, ndRouterAdv:
		n.learn(key6(f.Head[off+8:], vlan), sure, f.In, true, w)
	}
	return frame.ReasonNone
}

// outOptions translates the options of the ND message at at in b, which ends with
// it, and mends its checksum (RFC 1624) unless that is still to be made. It returns
// the address that the message names as the sender's, which is src if there is
// none.
func (n *MACNAT) outOptions(f *frame.Frame, b []byte, at, opts int, option byte, vlan uint16, src uint64) (sender uint64, r frame.DropReason) {
	sender = src
	for opts < len(b) {
		if opts+8 > len(b) {
			return 0, frame.BadTransport
		}
		size := int(b[opts+1]) * 8
		if size == 0 || opts+size > len(b) {
			return 0, frame.BadTransport
		}
		if b[opts] == option {
			mac := getMAC(b[opts+2:])
			// A redirect may name somebody out there.
			if b[at] != ndRedirect || mac == src || n.table.lookup(key6(b[at+ndTarget:], vlan)) != nil {
				putMAC(b[opts+2:], n.link)
				if f.Flags&frame.NeedsCsum == 0 {
					mendSum(b[at+icmp6Sum:], mac, n.link)
				}
			}
			sender = mac
		}
		opts += size
	}
	return sender, frame.ReasonNone
}

// mendSum changes a checksum for a MAC that was replaced, both in the upper 48
// bits and at an even offset of what is summed (RFC 1624, 3).
func mendSum(sum []byte, old, mac uint64) {
	s := uint64(^binary.BigEndian.Uint16(sum))
	for shift := 16; shift < 64; shift += 16 {
		s += uint64(^uint16(old>>shift)) + uint64(uint16(mac>>shift))
	}
	binary.BigEndian.PutUint16(sum, ^frame.Fold(s))
}

// inRedirect mends a router's redirect to one of our guests that names another of
// them as the next hop: the router knows it by the link's address.
func (n *MACNAT) inRedirect(f *frame.Frame, off int, vlan uint16) {
	at := off + ip6Len
	if f.Head[off+6] != protoICMP6 || int(f.HeadLen) < at+48 || f.Head[at] != ndRedirect {
		return
	}
	opt := f.Head[at+40:]
	if opt[0] != optTargetLLA || opt[1] != 1 || getMAC(opt[2:]) != n.link {
		return
	}
	if e := n.table.lookup(key6(f.Head[at+ndTarget:], vlan)); e != nil {
		putMAC(opt[2:], e.mac)
		if f.Flags&frame.NeedsCsum == 0 {
			mendSum(f.Head[at+icmp6Sum:], n.link, e.mac)
		}
	}
}
