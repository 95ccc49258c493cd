package dhcp

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/insomniacslk/dhcp/iana"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine"
	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

var _ engine.Stage = (*Server6)(nil)

var (
	guest6    = netip.MustParseAddr("fd10:0:2::2")
	gateway6  = netip.MustParseAddr("fd10:0:2::1")
	guestLL   = linkLocalOf(guestMAC)
	routerLL  = netip.MustParseAddr("fe80::ff:fe00:0")
	clientID  = &dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: net.HardwareAddr(guestMAC[:])}
	routerID  = &dhcpv6.DUIDLL{HWType: iana.HWTypeEthernet, LinkLayerAddr: net.HardwareAddr(DefaultServerMAC[:])}
	anyIP6    = netip.IPv6Unspecified()
	allRouter = netip.MustParseAddr("ff02::2")
)

func masquerade6() Config6 {
	return Config6{
		Port: guestPort, Address: netip.PrefixFrom(guest6, 120), Gateway: gateway6, MTU: 1450,
		DNS: []netip.Addr{netip.MustParseAddr("2001:db8::53")}, Search: []string{"default.svc.cluster.local", "cluster.local"},
		Now: func() time.Time { return epoch },
	}
}

type bench6 struct {
	t testing.TB
	s *Server6
	b *frame.Batch
}

// newBench6 is a server that has advertised itself already.
func newBench6(t testing.TB, c Config6) *bench6 {
	t.Helper()
	s, err := New6(c)
	require.NoError(t, err)
	s.advertised.Store(1)
	return &bench6{t, s, new(frame.Batch)}
}

// process runs a frame through the server and returns the answers.
func (n *bench6) process(p []byte) (in *frame.Frame, out [][]byte) {
	n.t.Helper()
	n.b.Now += int64(time.Second)
	enginetest.Fill(n.b, p)
	n.s.Process(n.b)
	for i := 1; i < n.b.Len(); i++ {
		f := n.b.Frame(i)
		require.Equal(n.t, guestPort, f.Out)
		out = append(out, bytes.Clone(f.Bytes()))
	}
	return n.b.Frame(0), out
}

// answer is the one answer to a frame that must be consumed; nil for silence.
func (n *bench6) answer(p []byte) []byte {
	n.t.Helper()
	in, out := n.process(p)
	require.Equal(n.t, frame.Consumed, in.Out, "reason %v", in.Reason)
	require.LessOrEqual(n.t, len(out), 1)
	if len(out) == 0 {
		return nil
	}
	require.True(n.t, enginetest.ChecksumsOK(out[0]))
	return out[0]
}

// icmp6 is a frame of the guest's with an ICMPv6 message, its checksum right.
func icmp6(src, dst netip.Addr, hop byte, msg []byte) []byte {
	p := make([]byte, l4At6, l4At6+len(msg))
	copy(p, []byte{0x33, 0x33, 0, 0, 0, 2})
	copy(p[6:], guestMAC[:])
	p[12], p[13], p[14], p[20], p[21] = 0x86, 0xdd, 0x60, protoICMP6, hop
	binary.BigEndian.PutUint16(p[18:], uint16(len(msg)))
	copy(p[src6At:], src.AsSlice())
	copy(p[dst6At:], dst.AsSlice())
	p = append(p, msg...)
	p[l4At6+2], p[l4At6+3] = 0, 0
	binary.BigEndian.PutUint16(p[l4At6+2:], sum6(p, protoICMP6))
	return p
}

func routerSolicit(src netip.Addr, options ...byte) []byte {
	return icmp6(src, allRouter, 255, append([]byte{icmpRouterSolicit, 0, 0, 0, 0, 0, 0, 0}, options...))
}

func neighbourSolicit(src, target netip.Addr, options ...byte) []byte {
	m := append([]byte{icmpNeighbourAsk, 0, 0, 0, 0, 0, 0, 0}, target.AsSlice()...)
	return icmp6(src, netip.MustParseAddr("ff02::1:ff00:1"), 255, append(m, options...))
}

// What a router says of itself, read by another library: address by DHCPv6, the
// network on the link, MTU, resolvers and domains.
func TestRFC4861Sec62Row61Row63RouterAdvertisement(t *testing.T) {
	n := newBench6(t, masquerade6())
	p := n.answer(routerSolicit(guestLL, ndSourceLink, 1, 0x52, 0x54, 0, 0x12, 0x34, 0x56))
	pk := gopacket.NewPacket(p, layers.LayerTypeEthernet, gopacket.Default)
	eth, ip := pk.Layer(layers.LayerTypeEthernet).(*layers.Ethernet), pk.Layer(layers.LayerTypeIPv6).(*layers.IPv6)
	ra := pk.Layer(layers.LayerTypeICMPv6RouterAdvertisement).(*layers.ICMPv6RouterAdvertisement)
	assert.Equal(t, net.HardwareAddr(guestMAC[:]), eth.DstMAC)
	assert.Equal(t, net.HardwareAddr(DefaultServerMAC[:]), eth.SrcMAC)
	assert.Equal(t, routerLL.String(), ip.SrcIP.String(), "RFC 4861, 6.1.2: a link-local source")
	assert.Equal(t, guestLL.String(), ip.DstIP.String())
	assert.Equal(t, uint8(255), ip.HopLimit)
	assert.True(t, ra.ManagedAddressConfig())
	assert.True(t, ra.OtherConfig())
	assert.Equal(t, uint16(65535), ra.RouterLifetime, "RFC 8319, 4")
	options := map[layers.ICMPv6Opt][]byte{}
	for _, o := range ra.Options {
		options[o.Type] = o.Data
	}
	assert.Equal(t, DefaultServerMAC[:], options[layers.ICMPv6OptSourceAddress])
	assert.Equal(t, []byte{0, 0, 0, 0, 0x05, 0xaa}, options[layers.ICMPv6OptMTU])
	assert.Equal(t, []byte{0, 0, 0xff, 0xff, 0xff, 0xff}, options[ndRoute], "RFC 4191, 2.3: a default route without end")
	prefix := options[layers.ICMPv6OptPrefixInfo]
	assert.Equal(t, []byte{120, 0x80}, prefix[:2], "on the link, not for autoconfiguration")
	assert.Equal(t, netip.MustParseAddr("fd10:0:2::").AsSlice(), prefix[14:30])
	assert.Equal(t, netip.MustParseAddr("2001:db8::53").AsSlice(), options[ndRDNSS][6:22])
	assert.Equal(t, append(append([]byte("\x07default\x03svc\x07cluster\x05local\x00"), "\x07cluster\x05local\x00"...), 0, 0, 0, 0, 0, 0, 0)[:len(options[ndDNSSL])-6], options[ndDNSSL][6:])

	p = n.answer(routerSolicit(anyIP6))
	assert.Equal(t, []byte{0x33, 0x33, 0, 0, 0, 1}, p[:6], "RFC 4861, 6.2.6: to all where nobody has an address")
	assert.Equal(t, uint64(2), n.s.Stats().RouterSolicits)
}

// What was advertised is said again before it ends, with whatever the guest
// sends; also to a guest that has it from another process, and after a change.
func TestRFC4861Sec624AdvertisedAgain(t *testing.T) {
	s, err := New6(masquerade6())
	require.NoError(t, err)
	n := &bench6{t, s, new(frame.Batch)}
	plain := enginetest.UDPFrame(enginetest.Eth{Dst: DefaultServerMAC, Src: guestMAC},
		enginetest.IP{Src: guest6, Dst: netip.MustParseAddr("2001:db8::1")}, enginetest.UDP{Src: 1, Dst: 2}, nil)
	four := wrap(nil, guestIP, serverIP)
	_, out := n.process(four)
	assert.Empty(t, out, "a guest without IPv6")
	in, out := n.process(plain)
	assert.Equal(t, frame.Drop, in.Out)
	require.Len(t, out, 1, "the first frame")
	assert.Equal(t, []byte{0x33, 0x33, 0, 0, 0, 1}, out[0][:6])
	_, out = n.process(plain)
	assert.Empty(t, out)
	n.b.Now += advertEvery
	_, out = n.process(plain)
	assert.Len(t, out, 1)
	require.NoError(t, s.Update(masquerade6()))
	_, out = n.process(plain)
	assert.Len(t, out, 1)
	assert.Equal(t, uint64(3), s.Stats().Adverts)
}

// A resolver that is no more is taken back, as what is advertised has no end by
// itself (RFC 8106, section 5.1).
func TestRFC8106Sec51ResolverTakenBack(t *testing.T) {
	a, b := netip.MustParseAddr("2001:db8::53"), netip.MustParseAddr("2001:db8::54")
	c := masquerade6()
	n := newBench6(t, c)
	said := func(dns ...netip.Addr) (out map[string]uint32) {
		c.DNS = dns
		require.NoError(t, n.s.Update(c))
		out = map[string]uint32{}
		pk := gopacket.NewPacket(n.answer(routerSolicit(anyIP6)), layers.LayerTypeEthernet, gopacket.Default)
		for _, o := range pk.Layer(layers.LayerTypeICMPv6RouterAdvertisement).(*layers.ICMPv6RouterAdvertisement).Options {
			for at := 6; o.Type == ndRDNSS && at < len(o.Data); at += 16 {
				out[netip.AddrFrom16([16]byte(o.Data[at:])).String()] = binary.BigEndian.Uint32(o.Data[2:])
			}
		}
		return out
	}
	assert.Equal(t, map[string]uint32{a.String(): forever}, said(a))
	assert.Equal(t, map[string]uint32{a.String(): 0, b.String(): forever}, said(b))
	assert.Equal(t, map[string]uint32{a.String(): 0, b.String(): 0}, said())
	assert.Equal(t, map[string]uint32{a.String(): forever, b.String(): 0}, said(a))
	for i := range 100 {
		assert.LessOrEqual(t, len(said(netip.AddrFrom16([16]byte{0x20, 1, 15: byte(i)}))), 1+maxGone)
	}
}

// The router answers for its own addresses and for no other: the guest may find
// out whether somebody has its own.
func TestRFC4861Sec72NeighbourAdvertisement(t *testing.T) {
	n := newBench6(t, masquerade6())
	for _, target := range []netip.Addr{gateway6, routerLL} {
		p := n.answer(neighbourSolicit(guestLL, target, ndSourceLink, 1, 0x52, 0x54, 0, 0x99, 0x99, 0x99))
		pk := gopacket.NewPacket(p, layers.LayerTypeEthernet, gopacket.Default)
		na := pk.Layer(layers.LayerTypeICMPv6NeighborAdvertisement).(*layers.ICMPv6NeighborAdvertisement)
		assert.Equal(t, uint8(0xe0), na.Flags, "router, solicited, override")
		assert.Equal(t, target.String(), na.TargetAddress.String())
		assert.Equal(t, otherMAC[:], p[:6], "whom the option names")
		assert.Equal(t, DefaultServerMAC[:], na.Options[0].Data)
	}
	p := n.answer(neighbourSolicit(anyIP6, gateway6))
	assert.Equal(t, byte(0xa0), p[l4At6+4], "RFC 4862, 5.4.4: not solicited, to all")
	assert.Equal(t, allNodes.AsSlice(), p[dst6At:l4At6])
	for _, target := range []netip.Addr{guest6, guestLL, netip.MustParseAddr("fd10:0:2::3")} {
		in, out := n.process(neighbourSolicit(anyIP6, target))
		assert.Equal(t, frame.Drop, in.Out)
		assert.Zero(t, in.Reason, "left to others")
		assert.Empty(t, out, "%v is not the router's", target)
	}
}

// hostile6 are frames that a guest might attack the server with.
func hostile6() map[string][]byte {
	good := routerSolicit(guestLL)
	cut := func(n int) []byte {
		p := bytes.Clone(good)
		binary.BigEndian.PutUint16(p[18:], uint16(n))
		return p
	}
	flipped := bytes.Clone(good)
	flipped[len(flipped)-1] ^= 1
	return map[string][]byte{
		"RFC4861-6.1.1 hop limit":       icmp6(guestLL, allRouter, 64, []byte{icmpRouterSolicit, 0, 0, 0, 0, 0, 0, 0}),
		"RFC4861-6.1.1 code":            icmp6(guestLL, allRouter, 255, []byte{icmpRouterSolicit, 1, 0, 0, 0, 0, 0, 0}),
		"RFC4861-6.1.1 option of 0":     routerSolicit(guestLL, ndSourceLink, 0, 0, 0, 0, 0, 0, 0),
		"RFC4861-6.1.1 option too long": routerSolicit(guestLL, ndSourceLink, 2, 0, 0, 0, 0, 0, 0),
		"RFC4861-6.1.1 half an option":  routerSolicit(guestLL, ndSourceLink, 1, 0, 0),
		"RFC4861-6.1.1 source of none":  routerSolicit(anyIP6, ndSourceLink, 1, 2, 0, 0, 0, 0, 1),
		"source is a group":             routerSolicit(allNodes),
		"checksum":                      flipped,
		"length 0":                      cut(0),
		"length 4":                      cut(4),
		"length beyond the frame":       cut(100),
		"router advertisement":          icmp6(guestLL, allNodes, 255, make16(icmpRouterAdvert, 16)),
		"server's message":              wrap6(&dhcpv6.Message{MessageType: dhcpv6.MessageTypeReply}, server6Port, client6Port),
		"no DHCPv6":                     wrapRaw6([]byte{1}),
		"H089 option past the end":      wrapRaw6([]byte{1, 0, 0, 0, 0, 1, 255, 255, 0}),
		"no client identifier":          wrap6(&dhcpv6.Message{MessageType: dhcpv6.MessageTypeSolicit}, client6Port, server6Port),
	}
}

func make16(kind byte, n int) []byte { return append([]byte{kind}, make([]byte, n-1)...) }

func wrapRaw6(m []byte) []byte { return wrapPorts6(m, client6Port, server6Port) }

func wrapPorts6(m []byte, src, dst uint16) []byte {
	return enginetest.UDPFrame(enginetest.Eth{Dst: frame.MAC{0x33, 0x33, 0, 1, 0, 2}, Src: guestMAC},
		enginetest.IP{Src: guestLL, Dst: allServers}, enginetest.UDP{Src: src, Dst: dst}, m)
}

func wrap6(m *dhcpv6.Message, src, dst uint16) []byte { return wrapPorts6(m.ToBytes(), src, dst) }

func TestHostile6(t *testing.T) {
	for name, p := range hostile6() {
		t.Run(name, func(t *testing.T) {
			n := newBench6(t, masquerade6())
			in, out := n.process(p)
			assert.Equal(t, frame.Drop, in.Out)
			assert.NotEqual(t, frame.ReasonNone, in.Reason)
			assert.Empty(t, out)
		})
	}
}

// A flood is answered as far as anybody could need it.
func TestRate6(t *testing.T) {
	n := newBench6(t, masquerade6())
	for range 1000 {
		n.b.Now -= int64(time.Second) // no time passes
		n.process(routerSolicit(guestLL))
	}
	st := n.s.Stats()
	assert.Equal(t, uint64(100), st.RouterSolicits)
	assert.Equal(t, uint64(900), st.RateLimited)
}

// Nothing is allocated for frames that are not for the server.
func TestAllocs6(t *testing.T) {
	n := newBench6(t, masquerade6())
	enginetest.Fill(n.b, enginetest.UDPFrame(enginetest.Eth{Dst: DefaultServerMAC, Src: guestMAC},
		enginetest.IP{Src: guest6, Dst: netip.MustParseAddr("2001:db8::1")}, enginetest.UDP{Src: 1, Dst: 2}, nil), neighbourSolicit(guestLL, guest6))
	assert.Zero(t, testing.AllocsPerRun(100, func() { n.s.Process(n.b) }))
}

func TestConfig6IsChecked(t *testing.T) {
	for name, change := range map[string]func(*Config6){
		"no address":      func(c *Config6) { c.Address = netip.Prefix{} },
		"IPv4":            func(c *Config6) { c.Address = netip.MustParsePrefix("10.0.2.2/24") },
		"gateway outside": func(c *Config6) { c.Gateway = netip.MustParseAddr("fd10::1") },
		"gateway itself":  func(c *Config6) { c.Gateway = guest6 },
		"MTU":             func(c *Config6) { c.MTU = 1279 },
		"resolver":        func(c *Config6) { c.DNS = []netip.Addr{serverIP} },
		"URL":             func(c *Config6) { c.BootURL = "tftp://x\n" },
	} {
		c := masquerade6()
		change(&c)
		_, err := New6(c)
		assert.Error(t, err, name)
	}
}

func FuzzServer6(f *testing.F) {
	for _, p := range hostile6() {
		f.Add(p)
	}
	f.Add(routerSolicit(guestLL))
	f.Add(neighbourSolicit(anyIP6, gateway6))
	f.Add(wrap6(solicit(), client6Port, server6Port))
	f.Fuzz(func(t *testing.T, p []byte) {
		if len(p) > 4096 {
			return
		}
		n := newBench6(t, masquerade6())
		_, out := n.process(p)
		for _, o := range out {
			require.True(t, enginetest.ChecksumsOK(o))
		}
	})
}
