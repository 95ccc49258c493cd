package enginetest

import (
	"encoding/binary"
	"net/netip"

	"sidewire/engine/frame"
)

// Eth is the Ethernet header of a frame that is built.
type Eth struct {
	Dst, Src frame.MAC
	VLAN     uint16 // 802.1Q tag control, 0 for none
}

// Frame puts the header before a payload of that EtherType.
func (e Eth) Frame(etherType uint16, payload []byte) []byte {
	b := append([]byte(nil), e.Dst[:]...)
	b = append(b, e.Src[:]...)
	if e.VLAN != 0 {
		b = binary.BigEndian.AppendUint16(b, 0x8100)
		b = binary.BigEndian.AppendUint16(b, e.VLAN)
	}
	b = binary.BigEndian.AppendUint16(b, etherType)
	return append(b, payload...)
}

// IP is the IPv4 or IPv6 header of a packet that is built; the family is that
// of Src.
type IP struct {
	Src, Dst netip.Addr
	TTL      uint8  // 0 means 64
	TOS      uint8  // traffic class
	ID       uint16 // IPv4 only
	Frag     uint16 // IPv4 only: flags and fragment offset
	Options  []byte // IPv4 only, a multiple of 4 bytes
}

// TCP flags.
const (
	FIN = 1 << iota
	SYN
	RST
	PSH
	ACK
	URG
	ECE
	CWR
)

// TCP is the TCP header of a segment that is built.
type TCP struct {
	Src, Dst uint16
	Seq, Ack uint32
	Flags    uint8
	Window   uint16 // 0 means 65535
	Options  []byte // a multiple of 4 bytes
}

// UDP is the UDP header of a datagram that is built.
type UDP struct {
	Src, Dst uint16
	NoSum    bool // leave the checksum 0
}

// ICMP is the ICMP header of a message that is built; Rest is its second word
// (identifier and sequence number of an echo, MTU of a "fragmentation
// needed"). Over IPv6 it is ICMPv6.
type ICMP struct {
	Type, Code uint8
	Rest       uint32
}

// Echo returns the header of an ICMP echo request.
func Echo(id, seq uint16) ICMP { return ICMP{Type: 8, Rest: uint32(id)<<16 | uint32(seq)} }

// EchoReply returns the header of an ICMP echo reply.
func EchoReply(id, seq uint16) ICMP { return ICMP{Type: 0, Rest: uint32(id)<<16 | uint32(seq)} }

const protoICMPv6 = 58

// TCPFrame builds a whole frame with correct checksums.
func TCPFrame(e Eth, ip IP, t TCP, payload []byte) []byte {
	return e.Frame(ip.etherType(), ip.Packet(frame.ProtoTCP, t.Segment(ip, payload)))
}

// UDPFrame builds a whole frame with correct checksums.
func UDPFrame(e Eth, ip IP, u UDP, payload []byte) []byte {
	return e.Frame(ip.etherType(), ip.Packet(frame.ProtoUDP, u.Datagram(ip, payload)))
}

// ICMPFrame builds a whole frame with correct checksums.
func ICMPFrame(e Eth, ip IP, i ICMP, payload []byte) []byte {
	proto := uint8(frame.ProtoICMP)
	if ip.Src.Is6() {
		proto = protoICMPv6
	}
	return e.Frame(ip.etherType(), ip.Packet(proto, i.Message(ip, payload)))
}

// ARP operations.
const (
	ARPRequest = 1
	ARPReply   = 2
)

// ARPFrame builds an ARP packet for Ethernet and IPv4 in its frame.
func ARPFrame(e Eth, op uint16, senderMAC frame.MAC, sender netip.Addr, targetMAC frame.MAC, target netip.Addr) []byte {
	b := []byte{0, 1, 8, 0, 6, 4, byte(op >> 8), byte(op)}
	b = append(append(b, senderMAC[:]...), sender.AsSlice()...)
	b = append(append(b, targetMAC[:]...), target.AsSlice()...)
	return e.Frame(frame.TypeARP, b)
}

func (ip IP) etherType() uint16 {
	if ip.Src.Is6() {
		return frame.TypeIPv6
	}
	return frame.TypeIPv4
}

// Packet puts the IP header before a payload of that protocol.
func (ip IP) Packet(proto uint8, payload []byte) []byte {
	ttl := ip.TTL
	if ttl == 0 {
		ttl = 64
	}
	if ip.Src.Is6() {
		b := binary.BigEndian.AppendUint32(nil, 6<<28|uint32(ip.TOS)<<20)
		b = binary.BigEndian.AppendUint16(b, uint16(len(payload)))
		b = append(b, proto, ttl)
		b = append(append(b, ip.Src.AsSlice()...), ip.Dst.AsSlice()...)
		return append(b, payload...)
	}
	n := 20 + len(ip.Options)
	b := make([]byte, n, n+len(payload))
	b[0], b[1] = 4<<4|byte(n/4), ip.TOS
	binary.BigEndian.PutUint16(b[2:], uint16(n+len(payload)))
	binary.BigEndian.PutUint16(b[4:], ip.ID)
	binary.BigEndian.PutUint16(b[6:], ip.Frag)
	b[8], b[9] = ttl, proto
	copy(b[12:], ip.Src.AsSlice())
	copy(b[16:], ip.Dst.AsSlice())
	copy(b[20:], ip.Options)
	binary.BigEndian.PutUint16(b[10:], slowChecksum(b))
	return append(b, payload...)
}

// pseudo is the pseudo-header of the transport checksum.
func (ip IP) pseudo(proto uint8, n int) []byte {
	b := append(ip.Src.AsSlice(), ip.Dst.AsSlice()...)
	if ip.Src.Is6() {
		b = binary.BigEndian.AppendUint32(b, uint32(n))
		return append(b, 0, 0, 0, proto)
	}
	return append(b, 0, proto, byte(n>>8), byte(n))
}

// Segment builds header and payload with the checksum for ip's addresses.
func (t TCP) Segment(ip IP, payload []byte) []byte {
	n := 20 + len(t.Options)
	b := make([]byte, n, n+len(payload))
	binary.BigEndian.PutUint16(b, t.Src)
	binary.BigEndian.PutUint16(b[2:], t.Dst)
	binary.BigEndian.PutUint32(b[4:], t.Seq)
	binary.BigEndian.PutUint32(b[8:], t.Ack)
	b[12], b[13] = byte(n/4)<<4, t.Flags
	win := t.Window
	if win == 0 {
		win = 65535
	}
	binary.BigEndian.PutUint16(b[14:], win)
	copy(b[20:], t.Options)
	b = append(b, payload...)
	binary.BigEndian.PutUint16(b[16:], slowChecksum(ip.pseudo(frame.ProtoTCP, len(b)), b))
	return b
}

// Datagram builds header and payload with the checksum for ip's addresses.
func (u UDP) Datagram(ip IP, payload []byte) []byte {
	b := make([]byte, 8, 8+len(payload))
	binary.BigEndian.PutUint16(b, u.Src)
	binary.BigEndian.PutUint16(b[2:], u.Dst)
	binary.BigEndian.PutUint16(b[4:], uint16(8+len(payload)))
	b = append(b, payload...)
	if u.NoSum {
		return b
	}
	sum := slowChecksum(ip.pseudo(frame.ProtoUDP, len(b)), b)
	if sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(b[6:], sum)
	return b
}

// Message builds header and payload with the checksum.
func (i ICMP) Message(ip IP, payload []byte) []byte {
	b := []byte{i.Type, i.Code, 0, 0}
	b = binary.BigEndian.AppendUint32(b, i.Rest)
	b = append(b, payload...)
	if ip.Src.Is6() {
		binary.BigEndian.PutUint16(b[2:], slowChecksum(ip.pseudo(protoICMPv6, len(b)), b))
	} else {
		binary.BigEndian.PutUint16(b[2:], slowChecksum(b))
	}
	return b
}

// slowChecksum is the Internet checksum of the parts, of which all but the
// last have even lengths (RFC 1071). It is plain on purpose: it judges the
// fast one.
func slowChecksum(parts ...[]byte) uint16 {
	var sum uint32
	for _, b := range parts {
		for ; len(b) >= 2; b = b[2:] {
			sum += uint32(b[0])<<8 | uint32(b[1])
		}
		if len(b) == 1 {
			sum += uint32(b[0]) << 8
		}
		for sum > 0xffff {
			sum = sum>>16 + sum&0xffff
		}
	}
	return ^uint16(sum)
}

// ChecksumsOK reports whether every checksum in an untagged IPv4 or IPv6 frame
// (without extension headers) adds up; a UDP checksum of 0 counts as right
// over IPv4. Other frames are right.
func ChecksumsOK(b []byte) bool {
	if len(b) < frame.EthernetLen {
		return false
	}
	var ip IP
	var proto uint8
	p := b[frame.EthernetLen:]
	switch binary.BigEndian.Uint16(b[12:]) {
	case frame.TypeIPv4:
		if len(p) < 20 || len(p) < int(p[0]&15)*4 || len(p) < int(binary.BigEndian.Uint16(p[2:])) {
			return false
		}
		ihl := int(p[0]&15) * 4
		if slowChecksum(p[:ihl]) != 0 {
			return false
		}
		if binary.BigEndian.Uint16(p[6:])&0x3fff != 0 {
			return true // a fragment: no transport checksum of its own
		}
		ip.Src, ip.Dst = netip.AddrFrom4([4]byte(p[12:])), netip.AddrFrom4([4]byte(p[16:]))
		proto, p = p[9], p[ihl:binary.BigEndian.Uint16(p[2:])]
	case frame.TypeIPv6:
		if len(p) < 40 || len(p) < 40+int(binary.BigEndian.Uint16(p[4:])) {
			return false
		}
		ip.Src, ip.Dst = netip.AddrFrom16([16]byte(p[8:])), netip.AddrFrom16([16]byte(p[24:]))
		proto, p = p[6], p[40:40+int(binary.BigEndian.Uint16(p[4:]))]
	default:
		return true
	}
	switch proto {
	case frame.ProtoUDP:
		if len(p) >= 8 && p[6] == 0 && p[7] == 0 {
			return ip.Src.Is4()
		}
	case frame.ProtoICMP:
		return slowChecksum(p) == 0
	case frame.ProtoTCP, protoICMPv6:
	default:
		return true
	}
	return slowChecksum(ip.pseudo(proto, len(p)), p) == 0
}

// Partial makes an untagged TCP or UDP frame with correct checksums one whose
// transport checksum is left to others, in place: the field holds the
// pseudo-header's sum. It returns the offload that says so.
func Partial(b []byte) frame.Offload {
	var ip IP
	var proto uint8
	l4 := frame.EthernetLen
	if p := b[l4:]; p[0]>>4 == 6 {
		ip.Src, ip.Dst = netip.AddrFrom16([16]byte(p[8:])), netip.AddrFrom16([16]byte(p[24:]))
		proto, l4 = p[6], l4+40
	} else {
		ip.Src, ip.Dst = netip.AddrFrom4([4]byte(p[12:])), netip.AddrFrom4([4]byte(p[16:]))
		proto, l4 = p[9], l4+int(p[0]&15)*4
	}
	field := 16
	if proto == frame.ProtoUDP {
		field = 6
	}
	binary.BigEndian.PutUint16(b[l4+field:], ^slowChecksum(ip.pseudo(proto, len(b)-l4)))
	return frame.Offload{Flags: frame.NeedsCsum, CsumStart: uint16(l4), CsumOffset: uint16(field)}
}

// GSO is Partial for a frame that others are to cut into segments of at most
// mss payload bytes.
func GSO(b []byte, mss uint16) frame.Offload {
	o := Partial(b)
	v6 := b[frame.EthernetLen]>>4 == 6
	o.GSOSize = mss
	switch {
	case o.CsumOffset == 6:
		o.GSO, o.HdrLen = frame.GSOUDPL4, o.CsumStart+8
		return o
	case v6:
		o.GSO = frame.GSOTCPv6
	default:
		o.GSO = frame.GSOTCPv4
	}
	o.HdrLen = o.CsumStart + uint16(b[o.CsumStart+12]>>4)*4
	return o
}

// Payload returns n bytes of a numbered ramp that starts at seed, so that lost
// and swapped bytes show.
func Payload(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = seed + byte(i) + byte(i>>8)*7
	}
	return b
}
