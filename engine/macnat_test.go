package engine

import (
	"encoding/binary"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

var (
	linkMAC   = mac(0x77)
	outMAC    = mac(0x99)
	guest1    = mac(1)
	guest2    = mac(2)
	ip4Out    = netip.MustParseAddr("10.0.0.250")
	ip4G1     = netip.MustParseAddr("10.0.0.1")
	ip4G2     = netip.MustParseAddr("10.0.0.2")
	ip4None   = netip.MustParseAddr("0.0.0.0")
	ip4Limit  = netip.MustParseAddr("255.255.255.255")
	ip6Out    = netip.MustParseAddr("fe80::99")
	ip6G1     = netip.MustParseAddr("fe80::1")
	ip6G2     = netip.MustParseAddr("fe80::2")
	ip6Nodes  = netip.MustParseAddr("ff02::1")
	bcastEth  = enginetest.Eth{Src: guest1, Dst: frame.Broadcast}
	echoFrame = enginetest.ICMPFrame(enginetest.Eth{Src: guest1, Dst: outMAC}, enginetest.IP{Src: ip4G1, Dst: ip4Out}, enginetest.Echo(1, 1), []byte("hello"))
)

// natBed is a switch with guests and an uplink behind a translation: port 0 is
// the uplink.
type natBed struct {
	*bed
	nat *MACNAT
}

func newNATBed(t testing.TB, c MACNATConfig, guests ...SwitchPort) *natBed {
	b := &natBed{bed: newBed(t, SwitchConfig{})}
	c.Link = linkMAC
	if c.Guests == nil {
		for _, g := range guests {
			c.Guests = append(c.Guests, g.MAC)
		}
	}
	b.nat = NewMACNAT(c, 1)
	p := new(enginetest.MemPort)
	id, err := b.e.AddPort("uplink", b.nat.Port(p))
	require.NoError(t, err)
	st, err := b.sw.AddPort(SwitchPort{Port: id, Uplink: true, Storm: -1})
	require.NoError(t, err)
	b.e.SetStages(id, b.nat, st)
	b.ports, b.ids, b.stages = append(b.ports, p), append(b.ids, id), append(b.stages, stages{b.nat, st})
	for _, g := range guests {
		b.port(g)
	}
	return b
}

// stages is several stages as one.
type stages []Stage

func (s stages) Process(b *frame.Batch) {
	for _, st := range s {
		st.Process(b)
	}
}

// sends plays frames of a port, each in a batch of its own, and returns what the
// ports got of the last.
func (b *natBed) sends(in int, frames ...[]byte) [][][]byte {
	var got [][][]byte
	for _, f := range frames {
		b.send(in, f)
		got = b.got()
	}
	return got
}

// out is what the link gets of a frame of guest i.
func (b *natBed) out(i int, f []byte) []byte {
	b.t.Helper()
	got := b.sends(i, f)
	require.Len(b.t, got[0], 1, "frames on the link; dropped for %s", b.reason(0))
	return got[0][0]
}

// in is what a frame from the link becomes at each guest; nil for nothing.
func (b *natBed) in(f []byte) (out [][]byte) {
	for _, g := range b.sends(0, f)[1:] {
		if len(g) == 0 {
			out = append(out, nil)
		} else {
			out = append(out, g[0])
		}
	}
	return out
}

func twoGuests() []SwitchPort { return []SwitchPort{{MAC: guest1}, {MAC: guest2}} }

// decodeAll parses a frame with gopacket, which must find no fault in it, and
// checks all checksums.
func decodeAll(t testing.TB, b []byte) gopacket.Packet {
	t.Helper()
	p := gopacket.NewPacket(b, layers.LayerTypeEthernet, gopacket.Default)
	require.Nil(t, p.ErrorLayer(), "%x", b)
	if binary.BigEndian.Uint16(b[12:]) != typeVLAN {
		require.True(t, enginetest.ChecksumsOK(b), "checksums of %x", b)
	}
	return p
}

func ethOf(p gopacket.Packet) *layers.Ethernet {
	return p.Layer(layers.LayerTypeEthernet).(*layers.Ethernet)
}

func hw(m frame.MAC) net.HardwareAddr { return net.HardwareAddr(m[:]) }

func TestMACNATARP(t *testing.T) {
	zero := frame.MAC{}
	for _, c := range []struct {
		name           string
		op             uint16
		sha            frame.MAC
		spa            netip.Addr
		tha            frame.MAC
		tpa            netip.Addr
		wantTHA        frame.MAC
		learns, tagged bool
	}{
		{"request", enginetest.ARPRequest, guest1, ip4G1, zero, ip4Out, zero, true, false},
		{"reply", enginetest.ARPReply, guest1, ip4G1, outMAC, ip4Out, outMAC, true, false},
		{"tagged", enginetest.ARPReply, guest1, ip4G1, outMAC, ip4Out, outMAC, true, true},
		{"RFC 5227 probe", enginetest.ARPRequest, guest1, ip4None, zero, ip4G1, zero, false, false},
		{"RFC 5227 announcement", enginetest.ARPRequest, guest1, ip4G1, zero, ip4G1, zero, true, false},
		{"gratuitous reply", enginetest.ARPReply, guest1, ip4G1, guest1, ip4G1, linkMAC, true, false},
		{"of a station behind the guest", enginetest.ARPRequest, mac(9), ip4G1, zero, ip4Out, zero, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newNATBed(t, MACNATConfig{}, twoGuests()...)
			e := bcastEth
			if c.tagged {
				e.VLAN = 7
			}
			f := b.out(1, enginetest.ARPFrame(e, c.op, c.sha, c.spa, c.tha, c.tpa))
			p := decodeAll(t, f)
			a := p.Layer(layers.LayerTypeARP).(*layers.ARP)
			assert.Equal(t, hw(linkMAC), ethOf(p).SrcMAC)
			assert.Equal(t, linkMAC[:], a.SourceHwAddress)
			assert.Equal(t, c.wantTHA[:], a.DstHwAddress)
			assert.Equal(t, c.spa.AsSlice(), a.SourceProtAddress)

			// The answer comes to the link's address.
			back := enginetest.ARPFrame(enginetest.Eth{Src: outMAC, Dst: linkMAC, VLAN: e.VLAN}, enginetest.ARPReply, outMAC, ip4Out, linkMAC, ip4G1)
			got := b.in(back)[0]
			if !c.learns {
				assert.Nil(t, got)
				return
			}
			require.NotNil(t, got)
			p = decodeAll(t, got)
			a = p.Layer(layers.LayerTypeARP).(*layers.ARP)
			assert.Equal(t, hw(c.sha), ethOf(p).DstMAC)
			assert.Equal(t, c.sha[:], a.DstHwAddress)
			assert.Equal(t, outMAC[:], a.SourceHwAddress)
			if c.tagged {
				back := enginetest.ARPFrame(enginetest.Eth{Src: outMAC, Dst: linkMAC}, enginetest.ARPReply, outMAC, ip4Out, linkMAC, ip4G1)
				assert.Nil(t, b.in(back)[0], "another VLAN's address")
			}
		})
	}
}

func TestMACNATHostileARP(t *testing.T) {
	good := enginetest.ARPFrame(bcastEth, enginetest.ARPRequest, guest1, ip4G1, frame.MAC{}, ip4Out)
	edit := func(at int, v byte) []byte {
		b := append([]byte(nil), good...)
		b[at] = v
		return b
	}
	b := newNATBed(t, MACNATConfig{}, SwitchPort{MAC: guest1})
	for name, f := range map[string][]byte{"cut": good[:41], "hardware": edit(15, 6), "length": edit(18, 8), "address length": edit(19, 16)} {
		assert.Empty(t, b.sends(1, f)[0], name)
	}
	// A checksum that is left to do would write over what was translated.
	b.decide(1, enginetest.Packet{Bytes: good, Offload: frame.Offload{Flags: frame.NeedsCsum, CsumStart: 14, CsumOffset: 8}})
	b.deliver(1)
	assert.Equal(t, frame.BadOffload, b.reason(0))
	assert.Empty(t, b.got()[0])
	assert.Zero(t, b.nat.Stats().Addresses)

	group := enginetest.ARPFrame(bcastEth, enginetest.ARPRequest, frame.Broadcast, ip4G1, frame.MAC{}, ip4Out)
	b.sends(1, group)
	assert.Zero(t, b.nat.Stats().Addresses, "nobody has the broadcast address")
}

// nd6 is an ND message of a guest's.
func nd6(e enginetest.Eth, src, dst netip.Addr, typ byte, target netip.Addr, options ...[]byte) []byte {
	var body []byte
	switch typ {
	case ndRouterAdv:
		body = make([]byte, 8)
	case ndNeighSol, ndNeighAdv:
		body = target.AsSlice()
	case ndRedirect:
		body = append(target.AsSlice(), ip6Out.AsSlice()...)
	}
	return enginetest.ICMPFrame(e, enginetest.IP{Src: src, Dst: dst, TTL: 255}, enginetest.ICMP{Type: typ}, append(body, cat(options...)...))
}

func TestMACNATND(t *testing.T) {
	any6 := netip.IPv6Unspecified()
	for _, c := range []struct {
		name    string
		frame   []byte
		changes bool // an option names a guest
		learns  netip.Addr
	}{
		{"NS", nd6(bcastEth, ip6G1, ip6Nodes, ndNeighSol, ip6Out, lla(1, guest1)), true, ip6G1},
		{"NS without option", nd6(bcastEth, ip6G1, ip6Nodes, ndNeighSol, ip6Out), false, ip6G1},
		{"DAD", nd6(bcastEth, any6, ip6Nodes, ndNeighSol, ip6G1), false, netip.Addr{}},
		{"NA", nd6(bcastEth, ip6G1, ip6Nodes, ndNeighAdv, ip6G1, lla(2, guest1)), true, ip6G1},
		{"NA of another address", nd6(bcastEth, ip6G1, ip6Nodes, ndNeighAdv, ip6G2, lla(2, guest1)), true, ip6G2},
		{"RS", nd6(bcastEth, ip6G1, ip6Nodes, ndRouterSol, any6, lla(1, guest1)), true, ip6G1},
		{"RA", nd6(bcastEth, ip6G1, ip6Nodes, ndRouterAdv, any6, filler(4), lla(1, guest1)), true, ip6G1},
		{"RA with the option behind Head", nd6(bcastEth, ip6G1, ip6Nodes, ndRouterAdv, any6, filler(20), lla(1, guest1), filler(3)), true, ip6G1},
		{"RA with the option across Head's end", nd6(bcastEth, ip6G1, ip6Nodes, ndRouterAdv, any6, filler(6), lla(1, guest1)), true, ip6G1},
		{"redirect to oneself", nd6(bcastEth, ip6G1, ip6Out, ndRedirect, ip6G1, lla(2, guest1)), true, ip6G1},
		{"redirect to another", nd6(bcastEth, ip6G1, ip6Out, ndRedirect, ip6B, lla(2, mac(5))), false, ip6G1},
		{"echo", enginetest.ICMPFrame(bcastEth, enginetest.IP{Src: ip6G1, Dst: ip6Out}, enginetest.ICMP{Type: 128}, lla(1, guest1)), false, ip6G1},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newNATBed(t, MACNATConfig{}, twoGuests()...)
			got := b.out(1, c.frame)
			p := decodeAll(t, got)
			assert.Equal(t, hw(linkMAC), ethOf(p).SrcMAC)
			want := append([]byte(nil), c.frame...)
			copy(want[6:], linkMAC[:])
			if c.changes {
				for i := 54; i+6 <= len(want); i++ {
					if frame.MAC(want[i:i+6]) == guest1 {
						copy(want[i:], linkMAC[:])
					}
				}
				copy(want[56:58], got[56:58]) // its checksum was judged by gopacket
			}
			assert.Equal(t, want, got)
			known := map[netip.Addr]frame.MAC{}
			for a, m := range b.nat.Addresses {
				known[a] = m
			}
			if c.learns.IsValid() {
				assert.Equal(t, guest1, known[c.learns])
			} else {
				assert.Empty(t, known)
			}
		})
	}
}

// A checksum that is left to do is left, whatever the options become.
func TestMACNATNDPartialChecksum(t *testing.T) {
	f := nd6(bcastEth, ip6G1, ip6Nodes, ndNeighSol, ip6Out, lla(1, guest1))
	b := newNATBed(t, MACNATConfig{}, SwitchPort{MAC: guest1})
	sum := [2]byte(f[56:58])
	b.decide(1, enginetest.Packet{Bytes: f, Offload: frame.Offload{Flags: frame.NeedsCsum, CsumStart: 54, CsumOffset: 2}})
	b.deliver(1)
	got := b.got()[0]
	require.Len(t, got, 1)
	assert.Equal(t, sum, [2]byte(got[0][56:58]))
	assert.Equal(t, linkMAC[:], got[0][80:86])
	for _, o := range []frame.Offload{
		{Flags: frame.NeedsCsum, CsumStart: 54, CsumOffset: 26}, {Flags: frame.NeedsCsum, CsumStart: 60, CsumOffset: 2},
	} {
		b.decide(1, enginetest.Packet{Bytes: f, Offload: o})
		b.deliver(1)
		assert.Equal(t, frame.BadOffload, b.reason(0))
	}
}

func TestMACNATBadND(t *testing.T) {
	b := newNATBed(t, MACNATConfig{}, SwitchPort{MAC: guest1})
	for name, f := range map[string][]byte{
		"option of length 0": nd6(bcastEth, ip6G1, ip6Nodes, ndNeighSol, ip6Out, make([]byte, 8)),
		"option too long":    nd6(bcastEth, ip6G1, ip6Nodes, ndNeighSol, ip6Out, []byte{1, 2, 0, 0, 0, 0, 0, 0}),
		"half an option":     nd6(bcastEth, ip6G1, ip6Nodes, ndNeighSol, ip6Out, []byte{1, 1, 0, 0}),
		"cut":                nd6(bcastEth, ip6G1, ip6Nodes, ndNeighSol, ip6Out, lla(1, guest1))[:80],
		"too long":           nd6(bcastEth, ip6G1, ip6Nodes, ndNeighSol, ip6Out, filler(250), lla(1, guest1)),
		"cut in the header":  nd6(bcastEth, ip6G1, ip6Nodes, ndNeighSol, ip6Out)[:50],
	} {
		assert.Empty(t, b.sends(1, f)[0], name)
		assert.Contains(t, []frame.DropReason{frame.BadTransport, frame.ShortFrame}, b.reason(0), name)
	}
}

// Unicast from the link goes to the guest that has the IP address, whatever kind
// of frame it is in.
func TestMACNATUnicastByAddress(t *testing.T) {
	in := enginetest.Eth{Src: outMAC, Dst: linkMAC}
	udp := func(e enginetest.Eth, src, dst netip.Addr) []byte {
		return enginetest.UDPFrame(e, enginetest.IP{Src: src, Dst: dst}, enginetest.UDP{Src: 5, Dst: 6}, []byte("x"))
	}
	b := newNATBed(t, MACNATConfig{}, twoGuests()...)
	for i, g := range []struct {
		mac    frame.MAC
		v4, v6 netip.Addr
	}{{guest1, ip4G1, ip6G1}, {guest2, ip4G2, ip6G2}} {
		e := enginetest.Eth{Src: g.mac, Dst: outMAC}
		assert.Equal(t, linkMAC[:], b.out(i+1, udp(e, g.v4, ip4Out))[6:12])
		assert.Equal(t, linkMAC[:], b.out(i+1, udp(e, g.v6, ip6Out))[6:12])
		for _, f := range [][]byte{udp(in, ip4Out, g.v4), udp(in, ip6Out, g.v6), tag(udp(in, ip4Out, g.v4), typeVLAN, 0)} {
			got := b.in(f)
			require.NotNil(t, got[i])
			assert.Nil(t, got[1-i], "the other guest hears nothing")
			assert.Equal(t, g.mac[:], got[i][:6])
			assert.Equal(t, f[6:], got[i][6:])
		}
	}
	for name, c := range map[string]struct {
		frame []byte
		want  frame.DropReason
	}{
		"unknown IPv4":    {udp(in, ip4None, netip.MustParseAddr("10.0.0.9")), frame.NoRoute},
		"unknown IPv6":    {udp(in, ip6Out, netip.MustParseAddr("fe80::9")), frame.NoRoute},
		"another VLAN":    {tag(udp(in, ip6Out, ip6G1), typeVLAN, 5), frame.NoRoute},
		"not IP":          {eth(linkMAC, outMAC, 0), frame.NotCarried},
		"foreign":         {udp(enginetest.Eth{Src: outMAC, Dst: guest1}, ip4Out, ip4G1), frame.ForeignMAC},
		"own reflection":  {udp(enginetest.Eth{Src: linkMAC, Dst: frame.Broadcast}, ip4G1, ip4Limit), frame.BadSource},
		"cut IPv4 header": {udp(in, ip4Out, ip4G1)[:33], frame.ShortFrame},
		"cut IPv6 header": {udp(in, ip6Out, ip6G1)[:53], frame.ShortFrame},
		"runt":            {udp(in, ip6Out, ip6G1)[:13], frame.ShortFrame},
	} {
		assert.Equal(t, [][]byte{nil, nil}, b.in(c.frame), name)
		assert.Equal(t, c.want, b.reason(0), name)
	}
	bcast := udp(enginetest.Eth{Src: outMAC, Dst: frame.Broadcast}, ip4Out, ip4Limit)
	assert.Equal(t, [][]byte{bcast, bcast}, b.in(bcast), "what is for all is for all, as it is")
}

// After a new start others send to IPv4 addresses that no guest has shown yet: the
// guests are asked, and who answers gets the next packet.
func TestMACNATAsks(t *testing.T) {
	for _, vlan := range []uint16{0, 5} {
		b := newNATBed(t, MACNATConfig{}, twoGuests()...)
		in := enginetest.Eth{Src: outMAC, Dst: linkMAC, VLAN: vlan}
		packet := enginetest.UDPFrame(in, enginetest.IP{Src: ip4Out, Dst: ip4G2}, enginetest.UDP{Src: 5, Dst: 6}, make([]byte, 900))
		question := enginetest.ARPFrame(enginetest.Eth{Src: outMAC, Dst: frame.Broadcast, VLAN: vlan}, enginetest.ARPRequest, outMAC, ip4Out, frame.MAC{}, ip4G2)
		assert.Equal(t, [][]byte{question, question}, b.in(packet))
		decodeAll(t, question)
		b.sends(2, enginetest.ARPFrame(enginetest.Eth{Src: guest2, Dst: outMAC, VLAN: vlan}, enginetest.ARPReply, guest2, ip4G2, outMAC, ip4Out))
		got := b.in(packet)
		assert.Nil(t, got[0])
		require.NotNil(t, got[1])
		assert.Equal(t, packet[6:], got[1][6:])
		other := enginetest.UDPFrame(in, enginetest.IP{Src: ip4Out, Dst: netip.MustParseAddr("10.0.0.9")}, enginetest.UDP{Src: 5, Dst: 6}, nil)
		questions := 0
		for range 1000 {
			if b.in(other)[0] != nil {
				questions++
			}
		}
		assert.Less(t, questions, 100, "in no time")
		assert.NotZero(t, questions)
	}
}

// A packet behind so many tags that the question for its address has no room is
// dropped, as is one whose head ends anywhere on the way there.
func TestMACNATAsksBehindManyTags(t *testing.T) {
	packet := enginetest.UDPFrame(enginetest.Eth{Src: outMAC, Dst: linkMAC}, enginetest.IP{Src: ip4Out, Dst: ip4G2}, enginetest.UDP{Src: 5, Dst: 6}, make([]byte, 100))
	for tags := range 40 {
		b := newNATBed(t, MACNATConfig{}, twoGuests()...)
		f := packet
		for range tags {
			f = tag(f, typeVLAN, 5)
		}
		for _, snapshot := range []int{frame.EthernetLen, 18, frame.HeadSize} {
			b.batch.Reset(b.batch.Now)
			fr := setSnapshot(b.batch, f, snapshot, b.ids[0])
			b.stages[0].Process(b.batch)
			b.deliver(0)
			got := b.got()
			if asked := frame.EthernetLen+tags*vlanLen+arpLen <= frame.HeadSize; asked {
				assert.Len(t, got[1], 1, "%d tags", tags)
			} else {
				assert.Empty(t, got[1], "%d tags", tags)
				assert.NotEqual(t, frame.ReasonNone, fr.Reason)
			}
		}
	}
}

// With one guest all that is unicast is for it, but what is the host's.
func TestMACNATOneGuest(t *testing.T) {
	in := enginetest.Eth{Src: outMAC, Dst: linkMAC}
	to := func(ip netip.Addr) []byte {
		return enginetest.ICMPFrame(in, enginetest.IP{Src: ip4Out, Dst: ip}, enginetest.Echo(1, 1), nil)
	}
	b := newNATBed(t, MACNATConfig{Host: []netip.Addr{ip4G2}}, SwitchPort{MAC: guest1})
	assert.Equal(t, guest1[:], b.in(to(ip4G1))[0][:6], "before it has said anything")
	assert.Equal(t, guest1[:], b.in(eth(linkMAC, outMAC, 0))[0][:6], "PPPoE and the like")
	assert.Nil(t, b.in(to(ip4G2))[0], "the host's")
	assert.Equal(t, frame.Consumed, b.batch.Frame(0).Out)
	assert.Nil(t, b.in(enginetest.ARPFrame(in, enginetest.ARPReply, outMAC, ip4Out, linkMAC, ip4G2))[0], "the host's")
	b.nat.SetHost(nil)
	assert.NotNil(t, b.in(to(ip4G2))[0])

	b.sends(1, eth(outMAC, mac(5), 0))
	assert.Equal(t, []byte{2, 0, 0, 0, 0, 5}, b.in(eth(linkMAC, outMAC, 0))[0][:6], "it uses another address than it was given")
	b.sends(1, eth(outMAC, guest1, 0), eth(outMAC, mac(5), 0))
	assert.Equal(t, guest1[:], b.in(eth(linkMAC, outMAC, 0))[0][:6], "others are behind the guest")

	b = newNATBed(t, MACNATConfig{}, SwitchPort{})
	assert.Equal(t, frame.Broadcast[:], b.in(to(ip4G1))[0][:6], "its address is not known yet: it is asked")
	b.sends(1, eth(outMAC, mac(6), 0))
	assert.NotNil(t, b.in(to(ip4G1))[0])
}

// An address moves with a guest that says so; data from it does not steal it.
func TestMACNATMoves(t *testing.T) {
	b := newNATBed(t, MACNATConfig{Age: 10 * time.Second}, twoGuests()...)
	who := func() int {
		got := b.in(enginetest.ICMPFrame(enginetest.Eth{Src: outMAC, Dst: linkMAC}, enginetest.IP{Src: ip4Out, Dst: ip4G1}, enginetest.Echo(1, 1), nil))
		for i, f := range got {
			if f != nil {
				return i + 1
			}
		}
		return 0
	}
	stolen := append([]byte(nil), echoFrame...)
	copy(stolen[6:], guest2[:])
	b.sends(1, echoFrame)
	assert.Equal(t, 1, who())
	b.sends(2, stolen)
	assert.Equal(t, 1, who(), "data does not take it")
	b.sends(2, enginetest.ARPFrame(enginetest.Eth{Src: guest2, Dst: frame.Broadcast}, enginetest.ARPRequest, guest2, ip4G1, frame.MAC{}, ip4G1))
	assert.Equal(t, 2, who(), "an announcement does")
	assert.EqualValues(t, 1, b.nat.Stats().Moved)
	b.sends(1, echoFrame)
	assert.Equal(t, 2, who())
	b.nat.table.lookup(key4(ip4G1.AsSlice(), 0)).sec.Store(second(Now()) - 11)
	b.sends(1, echoFrame)
	assert.Equal(t, 1, who(), "it was silent for too long")
}

// A guest that shows addresses without end replaces its own, and is kept from
// doing so too fast.
func TestMACNATBounded(t *testing.T) {
	b := newNATBed(t, MACNATConfig{Addresses: 8}, twoGuests()...)
	b.sends(2, enginetest.ARPFrame(enginetest.Eth{Src: guest2, Dst: frame.Broadcast}, enginetest.ARPRequest, guest2, ip4G2, frame.MAC{}, ip4Out))
	for i := range 2000 {
		f := append([]byte(nil), echoFrame...)
		binary.BigEndian.PutUint32(f[26:], 0x0b000000+uint32(i))
		b.send(1, f)
	}
	assert.LessOrEqual(t, b.nat.Stats().Addresses, 9)
	assert.NotZero(t, b.nat.Stats().Refused)
	assert.NotNil(t, b.nat.table.lookup(key4(ip4G2.AsSlice(), 0)), "the other's is still there")
	n := 0
	for range b.nat.Addresses {
		n++
	}
	assert.Equal(t, b.nat.Stats().Addresses, n)
	for _, o := range b.nat.table.owners {
		for i, e := range o.list {
			assert.Equal(t, i, e.pos)
			assert.Same(t, e, b.nat.table.slots[e.slot].Load())
		}
	}
}

// What is flooded reaches the other members as it was, whatever the link's port
// made of it and however little of it was private.
func TestMACNATFloodLeavesOthersAlone(t *testing.T) {
	discover := dhcpFrame(t, guest1, nil)
	for name, f := range map[string][]byte{
		"ARP":  enginetest.ARPFrame(bcastEth, enginetest.ARPRequest, guest1, ip4G1, frame.MAC{}, ip4Out),
		"NS":   nd6(bcastEth, ip6G1, ip6Nodes, ndNeighSol, ip6Out, lla(1, guest1)),
		"RA":   nd6(bcastEth, ip6G1, ip6Nodes, ndRouterAdv, ip6G1, filler(20), lla(1, guest1)),
		"DHCP": discover,
		"UDP":  enginetest.UDPFrame(bcastEth, enginetest.IP{Src: ip4G1, Dst: ip4Limit}, enginetest.UDP{Src: 1, Dst: 2}, enginetest.Payload(900, 3)),
	} {
		for _, snapshot := range []int{14, 18, 60, frame.HeadSize} {
			b := newNATBed(t, MACNATConfig{}, append(twoGuests(), SwitchPort{MAC: mac(3)})...)
			b.batch.Reset(0)
			setSnapshot(b.batch, f, snapshot, b.ids[1])
			b.stages[1].Process(b.batch)
			b.deliver(1)
			got := b.got()
			require.Len(t, got[0], 1, name)
			assert.Equal(t, linkMAC[:], got[0][0][6:12])
			assert.NotContains(t, string(got[0][0][:min(70, len(got[0][0]))]), string(guest1[:]), name)
			for _, i := range []int{2, 3} {
				require.Len(t, got[i], 1)
				assert.Equal(t, f, got[i][0], "%s with %d bytes private, at port %d", name, snapshot, i)
			}
		}
	}
}

// Workers translate in both directions while addresses come, move and go.
func TestMACNATRace(t *testing.T) {
	n := NewMACNAT(MACNATConfig{Link: linkMAC, Guests: []frame.MAC{guest1, guest2}, Addresses: 4}, 4)
	port := n.Port(taker{})
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			b := new(frame.Batch)
			for i := range 300 {
				b.Reset(int64(i) * int64(time.Second))
				b.Worker = w
				addr := netip.AddrFrom4([4]byte{10, 0, 0, byte(i % 8)})
				guest := []frame.MAC{guest1, guest2}[(i+w)%2]
				out := setSnapshot(b, enginetest.ARPFrame(enginetest.Eth{Src: guest, Dst: outMAC}, enginetest.ARPReply, guest, addr, outMAC, ip4Out), frame.HeadSize, frame.PortID(1+(i+w)%2))
				lease := setSnapshot(b, dhcpFrame(t, guest, nil), 18, 1)
				port.Push(w, []*frame.Frame{out, lease})
				b.Reset(int64(i) * int64(time.Second))
				in := setSnapshot(b, enginetest.ICMPFrame(enginetest.Eth{Src: outMAC, Dst: linkMAC}, enginetest.IP{Src: ip4Out, Dst: addr}, enginetest.Echo(1, 1), nil), frame.HeadSize, 3)
				n.Process(b)
				if frame.MAC(in.Dst()) == linkMAC && in.Reason == frame.ReasonNone {
					t.Error("passed as it was")
				}
				n.SetHost([]netip.Addr{netip.AddrFrom4([4]byte{10, 0, 1, byte(i % 8)})}) // what is the host's passes as it is
				n.Stats()
				for range n.Addresses {
				}
			}
		})
	}
	wg.Wait()
	assert.LessOrEqual(t, n.Stats().Addresses, 8)
}

// Frames of very many pieces, and any number of long ones that have to be changed,
// all get through.
func TestMACNATRoom(t *testing.T) {
	b := newNATBed(t, MACNATConfig{}, twoGuests()...)
	p := new(enginetest.MemPort)
	port := b.nat.Port(p)
	ra := nd6(bcastEth, ip6G1, ip6Nodes, ndRouterAdv, ip6G1, filler(20), lla(1, guest1))
	udp := enginetest.UDPFrame(bcastEth, enginetest.IP{Src: ip4G1, Dst: ip4Limit}, enginetest.UDP{Src: 1, Dst: 2}, make([]byte, 1000))
	var fs []*frame.Frame
	for i := range 40 {
		f, data := new(frame.Frame), ra
		if i%2 == 0 {
			data = udp
		}
		f.SetBytes(data[:18], nil, nil)
		f.In, f.Out, f.Len = 1, 9, int32(len(data))
		for _, c := range data[18:] {
			f.Tail = append(f.Tail, []byte{c})
		}
		fs = append(fs, f)
	}
	port.Push(0, fs)
	got := p.Take()
	require.Len(t, got, 40)
	for i, g := range got {
		assert.Len(t, g.Bytes, []int{len(udp), len(ra)}[i%2])
		decodeAll(t, g.Bytes)
	}
}
