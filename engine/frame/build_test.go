package frame

import (
	"encoding/binary"
	"net"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/require"
)

// packet describes a frame that build makes with gopacket.
type packet struct {
	v6, udp  bool
	vlan     int // tags
	optIP    int // bytes of IPv4 options or IPv6 destination options
	optTCP   int
	flags    uint8 // TCP flags
	id       uint16
	seq      uint32
	payload  []byte
	pieces   int // how many pieces the tail is cut into
	headLen  int // bytes in Head, 0: as many as fit
	gsoSize  int // 0: no GSO
	complete bool
}

// pattern is payload whose every byte depends on its place.
func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8*13 + 1)
	}
	return b
}

var (
	macA = net.HardwareAddr{2, 0, 0, 0, 0, 0xa}
	macB = net.HardwareAddr{2, 0, 0, 0, 0, 0xb}
)

// serialize returns p's bytes, whole and with right lengths and checksums.
func (p packet) serialize(t testing.TB) []byte {
	t.Helper()
	eth := &layers.Ethernet{SrcMAC: macA, DstMAC: macB, EthernetType: layers.EthernetTypeIPv4}
	if p.v6 {
		eth.EthernetType = layers.EthernetTypeIPv6
	}
	ls := []gopacket.SerializableLayer{eth}
	for i := range p.vlan {
		q := &layers.Dot1Q{VLANIdentifier: uint16(5 + i), Priority: 3, Type: eth.EthernetType}
		if i > 0 {
			ls[len(ls)-1].(*layers.Dot1Q).Type = layers.EthernetTypeDot1Q
		}
		ls = append(ls, q)
	}
	if p.vlan > 0 {
		eth.EthernetType = layers.EthernetTypeDot1Q
	}
	proto := layers.IPProtocolTCP
	if p.udp {
		proto = layers.IPProtocolUDP
	}
	var network gopacket.NetworkLayer
	if p.v6 {
		ip := &layers.IPv6{Version: 6, TrafficClass: 0x12, FlowLabel: 0x54321, HopLimit: 63, NextHeader: proto,
			SrcIP: net.ParseIP("fd00::2"), DstIP: net.ParseIP("2001:db8::ffff:1")}
		network, ls = ip, append(ls, ip)
		if p.optIP > 0 {
			ip.NextHeader = layers.IPProtocolIPv6Destination
			opt := gopacket.Payload(make([]byte, p.optIP))
			opt[0], opt[1], opt[2], opt[3] = byte(proto), byte(p.optIP/8-1), 1, byte(p.optIP-4) // PadN
			ls = append(ls, opt)
		}
	} else {
		ip := &layers.IPv4{Version: 4, TOS: 0x10, Id: p.id, Flags: layers.IPv4DontFragment, TTL: 63, Protocol: proto,
			SrcIP: net.IP{10, 0, 2, 2}, DstIP: net.IP{192, 0, 2, 251}}
		for i := 0; i < p.optIP; i++ {
			ip.Options = append(ip.Options, layers.IPv4Option{OptionType: 1}) // no operation
		}
		network, ls = ip, append(ls, ip)
	}
	if p.udp {
		u := &layers.UDP{SrcPort: 5004, DstPort: 4433}
		require.NoError(t, u.SetNetworkLayerForChecksum(network))
		ls = append(ls, u)
	} else {
		c := &layers.TCP{SrcPort: 40000, DstPort: 443, Seq: p.seq, Ack: 77, Window: 501, Urgent: 0}
		for i := 0; i < p.optTCP; i++ {
			c.Options = append(c.Options, layers.TCPOption{OptionType: layers.TCPOptionKindNop})
		}
		require.NoError(t, c.SetNetworkLayerForChecksum(network))
		ls = append(ls, c)
	}
	ls = append(ls, gopacket.Payload(p.payload))
	buf := gopacket.NewSerializeBuffer()
	// gopacket has no field for all eight TCP flags together: they are set by
	// hand, and the checksum follows them.
	require.NoError(t, gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, ls...))
	b := buf.Bytes()
	l3, l4 := p.offsets()
	n := l4 + 8 + len(p.payload)
	if !p.udp {
		n += 12 + (p.optTCP+3)/4*4
	}
	b = b[:n] // gopacket pads short frames
	if p.optIP > 0 && p.v6 {
		binary.BigEndian.PutUint16(b[l3+4:], uint16(len(b)-l3-40))
	}
	if !p.udp {
		b[l4+13] = p.flags
	}
	slowChecksum(b, l3, l4, p.v6, p.udp)
	return b
}

func (p packet) offsets() (l3, l4 int) {
	l3 = 14 + 4*p.vlan
	if p.v6 {
		return l3, l3 + 40 + p.optIP
	}
	return l3, l3 + 20 + (p.optIP+3)/4*4
}

// frame returns p as a frame of a batch, as a guest with offloads sends it:
// with the pseudo-header's sum in the checksum field unless complete is set.
func (p packet) frame(t testing.TB) *Frame {
	t.Helper()
	b := p.serialize(t)
	_, l4 := p.offsets()
	f := new(Frame)
	if !p.complete {
		f.Flags, f.CsumStart, f.CsumOffset = NeedsCsum, uint16(l4), 16
		proto := byte(6)
		if p.udp {
			f.CsumOffset, proto = 6, 17
		}
		l3, _ := p.offsets()
		sum := slowPseudo(b, l3, l4, p.v6, proto)
		binary.BigEndian.PutUint16(b[l4+int(f.CsumOffset):], sum)
	}
	if p.gsoSize > 0 {
		f.GSOSize = uint16(p.gsoSize)
		switch {
		case p.udp:
			f.GSO = GSOUDPL4
		case p.v6:
			f.GSO = GSOTCPv6
		default:
			f.GSO = GSOTCPv4
		}
		if p.flags&0x80 != 0 {
			f.GSO |= GSOECN
		}
	}
	n := p.headLen
	if n == 0 {
		n = HeadSize
	}
	n = copy(f.Head[:n], b)
	f.HeadLen, f.Len = uint16(n), int32(len(b))
	f.Tail = cut(b[n:], p.pieces)
	return f
}

// cut splits b into n uneven pieces.
func cut(b []byte, n int) [][]byte {
	var out [][]byte
	for i := n; i > 1 && len(b) > 1; i-- {
		k := len(b)/i | 1 // odd lengths are the hard ones
		out = append(out, b[:k:k])
		b = b[k:]
	}
	if len(b) > 0 {
		out = append(out, b)
	}
	return out
}

// slowSum is the sum of RFC 1071, 16 bits at a time.
func slowSum(b []byte) uint16 {
	var sum uint32
	for i := 0; i < len(b); i++ {
		if i&1 == 0 {
			sum += uint32(b[i]) << 8
		} else {
			sum += uint32(b[i])
		}
		if sum > 0xffff {
			sum = sum&0xffff + 1
		}
	}
	return uint16(sum)
}

// slowPseudo is the sum of the pseudo-header of the whole frame b.
func slowPseudo(b []byte, l3, l4 int, v6 bool, proto byte) uint16 {
	var ps []byte
	if v6 {
		ps = append(ps, b[l3+8:l3+40]...)
	} else {
		ps = append(ps, b[l3+12:l3+20]...)
	}
	n := len(b) - l4
	return slowSum(append(ps, byte(n>>24), byte(n>>16), byte(n>>8), byte(n), 0, 0, 0, proto))
}

// slowChecksum fills in the checksums of the whole frame b.
func slowChecksum(b []byte, l3, l4 int, v6, udp bool) {
	if !v6 {
		b[l3+10], b[l3+11] = 0, 0
		ihl := int(b[l3]&15) * 4
		binary.BigEndian.PutUint16(b[l3+10:], ^slowSum(b[l3:l3+ihl]))
	}
	field, proto := l4+16, byte(6)
	if udp {
		field, proto = l4+6, 17
	}
	b[field], b[field+1] = 0, 0
	ps := slowPseudo(b, l3, l4, v6, proto)
	c := ^slowSum(append([]byte{byte(ps >> 8), byte(ps)}, b[l4:]...))
	if udp && c == 0 {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(b[field:], c)
}

// requireChecksums has gopacket verify every checksum of the frame b.
func requireChecksums(t testing.TB, b []byte) gopacket.Packet {
	t.Helper()
	pkt := gopacket.NewPacket(b, layers.LayerTypeEthernet, gopacket.Default)
	require.NotNil(t, pkt.NetworkLayer())
	require.NotNil(t, pkt.TransportLayer())
	if l, ok := pkt.TransportLayer().(interface {
		SetNetworkLayerForChecksum(gopacket.NetworkLayer) error
	}); ok {
		require.NoError(t, l.SetNetworkLayerForChecksum(pkt.NetworkLayer()))
	}
	err, bad := pkt.VerifyChecksums()
	require.NoError(t, err)
	require.Empty(t, bad)
	return pkt
}
