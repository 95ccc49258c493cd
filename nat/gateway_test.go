package nat

import (
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

func arp(op uint16, src, dst frame.MAC, senderMAC frame.MAC, sender, target uint32) packet {
	b := gopacket.NewSerializeBuffer()
	err := gopacket.SerializeLayers(b, gopacket.SerializeOptions{},
		&layers.Ethernet{SrcMAC: src[:], DstMAC: dst[:], EthernetType: layers.EthernetTypeARP},
		&layers.ARP{AddrType: 1, Protocol: layers.EthernetTypeIPv4, HwAddressSize: 6, ProtAddressSize: 4, Operation: op,
			SourceHwAddress: senderMAC[:], SourceProtAddress: netIP(sender), DstHwAddress: make([]byte, 6),
			DstProtAddress: netIP(target)})
	if err != nil {
		panic(err)
	}
	return packet{data: append([]byte(nil), b.Bytes()...)}
}

func TestARPForGatewayRow58(t *testing.T) {
	for _, sender := range []uint32{guestIP, 0} {
		w := newWorld(t)
		w.queue = 3
		fs := w.out(arp(1, guestMAC, frame.Broadcast, guestMAC, sender, gatewayIP))
		require.Len(t, fs, 2)
		assert.Equal(t, frame.Consumed, fs[0].Out)
		require.Equal(t, portGuest, fs[1].Out)
		assert.EqualValues(t, 3, fs[1].Queue)
		p := gopacket.NewPacket(fs[1].Bytes(), layers.LayerTypeEthernet, gopacket.Default)
		e := p.Layer(layers.LayerTypeEthernet).(*layers.Ethernet)
		assert.EqualValues(t, GatewayMAC[:], e.SrcMAC)
		assert.EqualValues(t, guestMAC[:], e.DstMAC)
		a := p.Layer(layers.LayerTypeARP).(*layers.ARP)
		assert.EqualValues(t, 2, a.Operation)
		assert.EqualValues(t, GatewayMAC[:], a.SourceHwAddress)
		assert.EqualValues(t, netIP(gatewayIP), a.SourceProtAddress)
		assert.EqualValues(t, guestMAC[:], a.DstHwAddress)
		assert.EqualValues(t, netIP(sender), a.DstProtAddress)
	}
}

func TestH081HostileARP(t *testing.T) {
	evil := frame.MAC{0x52, 0x54, 0, 0, 0, 0x66}
	req := arp(1, guestMAC, frame.Broadcast, guestMAC, guestIP, gatewayIP)
	with := func(off int, v byte) packet {
		p := packet{data: append([]byte(nil), req.data...)}
		p.data[off] = v
		return p
	}
	for name, tc := range map[string]struct {
		p packet
		r frame.DropReason
	}{
		"short":                      {packet{data: req.data[:41]}, frame.ShortFrame},
		"hardware type":              {with(15, 6), frame.NotCarried},
		"protocol type":              {with(16, 0x86), frame.NotCarried},
		"hardware length":            {with(18, 255), frame.NotCarried},
		"protocol length":            {with(19, 16), frame.NotCarried},
		"operation":                  {with(21, 9), frame.NotCarried},
		"gratuitous for the gateway": {arp(1, guestMAC, frame.Broadcast, guestMAC, gatewayIP, gatewayIP), frame.Spoofed},
		"reply for the gateway":      {arp(2, guestMAC, GatewayMAC, guestMAC, gatewayIP, guestIP), frame.Spoofed},
		"somebody else's address":    {arp(1, guestMAC, frame.Broadcast, guestMAC, guestIP+1, gatewayIP), frame.Spoofed},
		"two hardware addresses":     {arp(1, guestMAC, frame.Broadcast, evil, guestIP, gatewayIP), frame.Spoofed},
		"the gateway's own":          {arp(1, GatewayMAC, frame.Broadcast, GatewayMAC, guestIP, gatewayIP), frame.Spoofed},
		"H079 zero":                  {arp(1, frame.MAC{}, frame.Broadcast, frame.MAC{}, guestIP, gatewayIP), frame.Spoofed},
		"H079 broadcast":             {arp(1, frame.Broadcast, frame.Broadcast, frame.Broadcast, guestIP, gatewayIP), frame.Spoofed},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.dropped(w.out(tc.p), tc.r)
			assert.Equal(t, mac48(guestMAC[:]), w.m.guests[0].mac.Load(), "nothing is learned")
		})
	}
}

func TestOtherARPIsTheKernels(t *testing.T) {
	for name, p := range map[string]packet{
		"probe for its own address": arp(1, guestMAC, frame.Broadcast, guestMAC, 0, guestIP),
		"announcement":              arp(1, guestMAC, frame.Broadcast, guestMAC, guestIP, guestIP),
		"reply":                     arp(2, guestMAC, GatewayMAC, guestMAC, guestIP, gatewayIP),
		"for somebody else":         arp(1, guestMAC, frame.Broadcast, guestMAC, guestIP, guestIP+9),
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			fs := w.out(p)
			require.Len(t, fs, 1, "unanswered")
			assert.Equal(t, portTap, fs[0].Out)
			assert.Equal(t, p.data, fs[0].Bytes())
		})
	}
	w := newWorld(t, func(c *Config) { c.Guests[0].LocalTap = 0 })
	w.dropped(w.out(arp(1, guestMAC, frame.Broadcast, guestMAC, 0, guestIP)), frame.NotCarried)
}

func TestMACIsLearned(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Guests[0].MAC = frame.MAC{} })
	// The guest is asked, but not for every packet.
	fs := w.in(udp(toPod(hostA, 1, 2), "x"), udp(toPod(hostA, 1, 3), "x"))
	require.Len(t, fs, 3)
	assert.Equal(t, frame.NoNeighbour, fs[0].Reason)
	assert.Equal(t, portGuest, fs[2].Out)
	assert.Equal(t, arp(1, GatewayMAC, frame.Broadcast, GatewayMAC, gatewayIP, guestIP).data[:arpEnd], fs[2].Bytes())
	w.dropped(w.out(edit(udp(fromGuestTo(1, hostB, 2), "x"), func(ip []byte) { ip[15]++ })), frame.Spoofed)
	w.dropped(w.in(udp(toPod(hostA, 1, 2), "x")), frame.NoNeighbour)
	w.out(arp(2, guestMAC, GatewayMAC, guestMAC, guestIP, gatewayIP))
	s := w.one(w.in(udp(toPod(hostA, 1, 2), "x")), portGuest)
	_, dst := s.macs()
	assert.Equal(t, guestMAC, dst)
}

// A packet of protocol 0 makes no flow: the table would take it for a free
// slot and never let go of it.
func TestProtocolZero(t *testing.T) {
	zero := func(f flow5) packet {
		return edit(udp(f, "x"), func(ip []byte) { ip[9] = 0 })
	}
	w := newWorld(t)
	w.dropped(w.in(zero(toPod(hostA, 1, 2))), frame.BadTransport)
	w.dropped(w.out(zero(fromGuestTo(1, hostA, 2))), frame.BadTransport)
	assert.Zero(t, w.m.Stats().Flows)
}

func TestVerdicts(t *testing.T) {
	v6 := build(eth(guestIP), ip4(guestIP, hostB, layers.IPProtocolUDP), &layers.UDP{SrcPort: 1, DstPort: 2})
	v6.data[12], v6.data[13] = 0x86, 0xdd
	otherMAC := udp(fromGuestTo(1, hostB, 2), "x")
	copy(otherMAC.data, routerMAC[:])
	for name, tc := range map[string]struct {
		p packet
		r frame.DropReason
	}{
		"H078 empty":             {packet{}, frame.ShortFrame},
		"H078 13 bytes":          {packet{data: make([]byte, 13)}, frame.ShortFrame},
		"IPv6":                   {v6, frame.NotCarried},
		"not for the gateway":    {otherMAC, frame.NotCarried},
		"foreign source":         {udp(flow5{guestIP, hostB, 1, 2}, "x"), 0},
		"another in the network": {udp(fromGuestTo(1, guestIP+5, 2), "x"), frame.NoRoute},
		"H082 LAND":              {udp(fromGuestTo(1, guestIP, 1), "x"), frame.NoRoute},
		"H105 zero":              {udp(fromGuestTo(1, ip("0.0.0.0"), 2), "x"), frame.Policy},
		"H105 loopback":          {udp(fromGuestTo(1, ip("127.0.0.1"), 2), "x"), frame.Policy},
		"multicast":              {udp(fromGuestTo(1, ip("224.0.0.251"), 2), "x"), frame.Policy},
		"broadcast":              {udp(fromGuestTo(1, ip("255.255.255.255"), 2), "x"), frame.Policy},
		"H087 source port 0":     {udp(fromGuestTo(0, hostB, 2), "x"), frame.BadTransport},
		"H087 port 0":            {udp(fromGuestTo(1, hostB, 0), "x"), frame.BadTransport},
		"H082 bad sum":           {edit(udp(fromGuestTo(1, hostB, 2), "x"), func(ip []byte) {}), 0},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			if tc.r == 0 {
				w.one(w.out(tc.p), portUplink)
				bad := packet{data: append([]byte(nil), tc.p.data...)}
				bad.data[24] ^= 1
				w.dropped(w.out(bad), frame.BadChecksum)
				return
			}
			w.dropped(w.out(tc.p), tc.r)
			require.Empty(t, w.flows())
		})
	}
	for _, src := range []string{"0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "10.244.1.5"} {
		w := newWorld(t)
		w.dropped(w.in(udp(toPod(ip(src), 1, 2), "x")), frame.Spoofed)
	}
	w := newWorld(t)
	w.dropped(w.in(udp(flow5{hostA, hostB, 1, 2}, "x")), frame.NotCarried)
	w.router.none[hostB] = true
	w.refused(w.out(udp(fromGuestTo(1, hostB, 2), "x")), frame.NoRoute, 0)
}

func TestLocalDelivery(t *testing.T) {
	w := newWorld(t)
	for _, dst := range []uint32{gatewayIP, podIP, ip("10.244.9.9")} {
		w.queue = 5
		p := edit(tcp(fromGuestTo(2000, dst, 7777), "S", 1, 0, ""), func(ip []byte) { ip[8] = 1 })
		fs := w.out(p)
		require.Equal(t, portTap, fs[0].Out)
		assert.Equal(t, p.data, fs[0].Bytes())
		// The kernel's answer comes on the same queue, unchanged.
		w.queue = 0
		back := tcp(flow5{dst, guestIP, 7777, 2000}, "SA", 1, 2, "")
		copy(back.data, guestMAC[:])
		fs = w.stage(w.m.Local(0), portTap, back)
		require.Equal(t, portGuest, fs[0].Out)
		assert.EqualValues(t, 5, fs[0].Queue)
		assert.Equal(t, back.data, fs[0].Bytes())
	}
	foreign := tcp(flow5{gatewayIP, guestIP, 1, 2}, "S", 1, 0, "")
	foreign.data[5] ^= 1
	w.dropped(w.stage(w.m.Local(0), portTap, foreign), frame.NotCarried)
	multicast := tcp(flow5{gatewayIP, guestIP, 1, 2}, "S", 1, 0, "")
	copy(multicast.data, []byte{1, 0, 0x5e, 0, 0, 1})
	w.dropped(w.stage(w.m.Local(0), portTap, multicast), frame.NotCarried)
	fs := w.stage(w.m.Local(0), portTap, arp(1, GatewayMAC, frame.Broadcast, GatewayMAC, gatewayIP, guestIP))
	require.Equal(t, portGuest, fs[0].Out)
	require.Empty(t, w.flows())
}

func TestUnresolvedHop(t *testing.T) {
	w := newWorld(t)
	w.router.hop.Invalidate()
	w.one(w.out(udp(fromGuestTo(1, hostB, 2), "x")), portKernel)
	w.router.hop.Set(routerMAC)
	w.one(w.out(udp(fromGuestTo(1, hostB, 2), "x")), portUplink)
	// A retired hop is asked for again.
	old := w.router.hop
	w.router.hop = &frame.Hop{MTU: 1500, Src: podMAC}
	w.router.hop.Set(frame.MAC{2, 9, 9, 9, 9, 9})
	old.Retire()
	s := w.one(w.out(udp(fromGuestTo(1, hostB, 2), "x")), portUplink)
	_, dst := s.macs()
	assert.Equal(t, frame.MAC{2, 9, 9, 9, 9, 9}, dst)
}

func TestQueueFollowsTheGuest(t *testing.T) {
	w := newWorld(t)
	f := fromGuestTo(1, hostB, 2)
	for q := range uint16(4) {
		w.queue = q
		x := w.one(w.out(udp(f, "x")), portUplink).flow()
		w.queue = 0
		fs := w.in(udp(x.back(), "x"))
		require.Equal(t, q, fs[0].Queue)
	}
}

func TestOtherProtocols(t *testing.T) {
	raw := func(src, dst uint32, proto layers.IPProtocol) packet {
		return build(eth(src), ip4(src, dst, proto), gopacket.Payload(pattern(40)))
	}
	for _, proto := range []layers.IPProtocol{33, 47, 50, 132, 136, 253} {
		w := newWorld(t, twoGuests)
		w.one(w.in(raw(hostA, podIP, proto)), portGuest)
		w.one(w.out(raw(guestIP, hostA, proto)), portUplink)
		w.one(w.out(raw(guestIP, hostB, proto)), portUplink)
		require.Len(t, w.flows(), 2)
		// Nothing tells two guests' packets of one remote host apart.
		fs := w.out2(raw(guestIP2, hostB, proto))
		require.Equal(t, frame.NoPort, fs[0].Reason)

		w = newWorld(t, ports80)
		w.dropped(w.in(raw(hostA, podIP, proto)), frame.NoFlow)
		w.one(w.out(raw(guestIP, hostA, proto)), portUplink)
		w.one(w.in(raw(hostA, podIP, proto)), portGuest)
	}
}

// SEND_RARP teaches the guest's address, but not the gateway's or a group's.
func TestLearnMAC(t *testing.T) {
	w := newWorld(t)
	other := frame.MAC{0x52, 0x54, 0, 0, 0, 9}
	w.m.LearnMAC(0, other)
	require.Equal(t, other.String(), w.m.Stats().Guests[0].MAC)
	for _, bad := range []frame.MAC{{}, GatewayMAC, frame.Broadcast, {1}} {
		w.m.LearnMAC(0, bad)
		require.Equal(t, other.String(), w.m.Stats().Guests[0].MAC, bad)
	}
}
