package engine

import (
	"encoding/binary"

	"sidewire/engine/frame"
)

// Layout of a DHCP message (RFC 2131, 2).
const (
	portDHCPServer = 67
	portDHCPClient = 68
	udpHeader      = 8

	dhcpXID     = 4
	dhcpFlags   = 10
	dhcpClient  = 12 // ciaddr
	dhcpRelay   = 24 // giaddr
	dhcpChaddr  = 28
	dhcpCookie  = 236
	dhcpOptions = 240

	optPad      = 0
	optClientID = 61
	optEnd      = 255
	clientIDLen = 9 // with its code and length
	maxDHCP     = 1500
)

const (
	natXIDCount = 16  // exchanges under way that are known of a guest
	natXIDAge   = 120 // seconds
)

// natXIDs is who has begun a guest's latest exchanges.
type natXIDs struct {
	ring [natXIDCount]natXID
	next int
}

type natXID struct {
	xid, sec uint32
	mac      uint64 // 0: none
	order    uint64 // of when it was first seen
}

// dhcpAt returns where the message of a UDP datagram to a port begins, if the
// beginning of one to its hardware address lies in Head, and is DHCP for Ethernet.
func dhcpAt(f *frame.Frame, off int, port uint16) (at int, ok bool) {
	h := f.Head[off:]
	l4 := off + int(h[0]&15)*4
	if h[9] != frame.ProtoUDP || binary.BigEndian.Uint16(h[6:])&0x3fff != 0 || l4 < off+20 {
		return 0, false
	}
	at = l4 + udpHeader
	if at+dhcpChaddr+6 > int(f.HeadLen) || binary.BigEndian.Uint16(f.Head[l4+2:]) != port {
		return 0, false
	}
	return at, f.Head[at+1] == 1 && f.Head[at+2] == 6
}

// outDHCP translates what a guest's DHCP client sends. The server is told the
// link's hardware address, because it, or a switch that looks into DHCP on the
// way, wants the one that the frame comes from; and to answer to everybody,
// because it cannot answer to an address that is no one's yet on a link that
// delivers by IP address. Servers know a client by its identifier, and by the
// hardware address if it sends none: several guests that send none would be one,
// so each is given one of its own (RFC 2132, 9.14). A relay in the guest names its
// clients, not itself, and is answered at its IP address.
func (n *MACNAT) outDHCP(f *frame.Frame, off, at int, src uint64, w *natWork) frame.DropReason {
	l4, end := at-udpHeader, at-udpHeader+int(binary.BigEndian.Uint16(f.Head[at-4:]))
	if f.Head[at] != 1 || binary.BigEndian.Uint32(f.Head[at+dhcpRelay:]) != 0 || end < at+dhcpOptions || end > int(f.Len) {
		return frame.ReasonNone
	}
	if f.Flags&frame.NeedsCsum != 0 && (int(f.CsumStart) != l4 || f.CsumOffset != 6) {
		return frame.BadOffload
	}
	if end != off+int(binary.BigEndian.Uint16(f.Head[off+2:])) {
		return frame.BadTransport
	}
	b := w.linear(f)
	if b == nil {
		return frame.BatchFull
	}
	b = b[:end]
	m := b[at:]
	if binary.BigEndian.Uint32(m[dhcpCookie:]) != 0x63825363 {
		return frame.ReasonNone
	}
	hasSum := f.Flags&frame.NeedsCsum != 0 || binary.BigEndian.Uint16(b[l4+6:]) != 0
	if f.Flags&frame.NeedsCsum == 0 && hasSum && udpSum(b, off, l4) != 0xffff {
		return frame.BadChecksum
	}
	client := getMAC(m[dhcpChaddr:])
	n.began(f.In, natXID{xid: binary.BigEndian.Uint32(m[dhcpXID:]), sec: w.sec, mac: client})
	putMAC(m[dhcpChaddr:], n.link)
	if binary.BigEndian.Uint32(m[dhcpClient:]) == 0 {
		m[dhcpFlags] |= 0x80
	}
	if !n.single {
		b = addClientID(b, off, at, client)
	}
	if binary.BigEndian.PutUint16(b[l4+6:], 0); hasSum {
		sum := ^udpSum(b, off, l4)
		if sum == 0 {
			sum = 0xffff
		}
		binary.BigEndian.PutUint16(b[l4+6:], sum)
	}
	f.Flags &^= frame.NeedsCsum
	f.CsumStart, f.CsumOffset = 0, 0
	w.setLinear(f, b)
	return frame.ReasonNone
}

// udpSum sums a UDP datagram, which ends with b, and its pseudo-header.
func udpSum(b []byte, off, l4 int) uint16 {
	return frame.Fold(frame.Sum(b[l4:], frame.Sum(b[off+12:off+20], frame.ProtoUDP+uint64(len(b)-l4))))
}

// addClientID gives a DHCP message that has no client identifier one. b is the
// frame up to its end, with room behind. The UDP checksum is left to the caller.
func addClientID(b []byte, off, at int, client uint64) []byte {
	i := at + dhcpOptions
	for ; i < len(b) && b[i] != optEnd; i++ {
		switch {
		case b[i] == optClientID:
			return b
		case b[i] == optPad:
		case i+1 < len(b):
			i += 1 + int(b[i+1])
		}
	}
	if i >= len(b) || i+clientIDLen+1-off > maxDHCP {
		return b // no end, or no room
	}
	if grow := i + clientIDLen + 1 - len(b); grow > 0 {
		b = b[:len(b)+grow]
		addLen(b[off+2:], grow)
		addLen(b[at-4:], grow)
		ip := b[off : off+int(b[off]&15)*4]
		ip[10], ip[11] = 0, 0
		binary.BigEndian.PutUint16(ip[10:], ^frame.Fold(frame.Sum(ip, 0)))
	}
	o := b[i : i+clientIDLen+1]
	o[0], o[1], o[2], o[clientIDLen] = optClientID, clientIDLen-2, 1, optEnd
	putMAC(o[3:], client)
	return b
}

// addLen adds to a length field.
func addLen(b []byte, n int) {
	binary.BigEndian.PutUint16(b, binary.BigEndian.Uint16(b)+uint16(n))
}

// inDHCP puts the client's address back into what a server answers, and returns
// it; 0 if it is no answer to a guest.
func (n *MACNAT) inDHCP(f *frame.Frame, off int, sec uint32) uint64 {
	if int(f.HeadLen) < off+20 {
		return 0
	}
	at, ok := dhcpAt(f, off, portDHCPClient)
	if !ok || f.Head[at] != 2 || getMAC(f.Head[at+dhcpChaddr:]) != n.link {
		return 0
	}
	mac := n.client(binary.BigEndian.Uint32(f.Head[at+dhcpXID:]), sec)
	if mac == 0 {
		return 0
	}
	putMAC(f.Head[at+dhcpChaddr:], mac)
	sum := f.Head[at-2 : at]
	if binary.BigEndian.Uint16(sum) != 0 && !(f.Flags&frame.NeedsCsum != 0 && int(f.CsumStart) == at-udpHeader) {
		mendSum(sum, n.link, mac)
		if binary.BigEndian.Uint16(sum) == 0 {
			binary.BigEndian.PutUint16(sum, 0xffff)
		}
	}
	return mac
}

// began notes who has begun an exchange. Each guest has room of its own.
func (n *MACNAT) began(in frame.PortID, x natXID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	o := n.xids[in]
	if o == nil {
		o = &natXIDs{}
		n.xids[in] = o
	}
	for i := range o.ring {
		if o.ring[i].xid == x.xid && o.ring[i].mac == x.mac {
			o.ring[i].sec = x.sec
			return
		}
	}
	n.exchanges++
	x.order = n.exchanges
	o.ring[o.next%natXIDCount] = x
	o.next++
}

// client returns who has begun an exchange; if several have, the one who was
// first to be seen.
func (n *MACNAT) client(xid, sec uint32) (mac uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	var first uint64
	for _, o := range n.xids {
		for i := range o.ring {
			x := &o.ring[i]
			if x.mac != 0 && x.xid == xid && int32(sec-x.sec) <= natXIDAge && (mac == 0 || x.order < first) {
				mac, first = x.mac, x.order
			}
		}
	}
	return mac
}
