package engine

import (
	"net/netip"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// dhcpFrame is what a DHCP client sends, changed by edit, made by gopacket.
func dhcpFrame(t testing.TB, client frame.MAC, edit func(*layers.DHCPv4)) []byte {
	t.Helper()
	d := &layers.DHCPv4{
		Operation: layers.DHCPOpRequest, HardwareType: layers.LinkTypeEthernet, HardwareLen: 6, Xid: 0x01020304, ClientHWAddr: hw(client),
		Options: layers.DHCPOptions{layers.NewDHCPOption(layers.DHCPOptMessageType, []byte{byte(layers.DHCPMsgTypeDiscover)})},
	}
	if edit != nil {
		edit(d)
	}
	return dhcpOver(t, enginetest.Eth{Src: client, Dst: frame.Broadcast}, enginetest.IP{Src: ip4None, Dst: ip4Limit}, enginetest.UDP{Src: 68, Dst: 67}, d)
}

func dhcpOver(t testing.TB, e enginetest.Eth, ip enginetest.IP, u enginetest.UDP, d *layers.DHCPv4) []byte {
	buf := gopacket.NewSerializeBuffer()
	require.NoError(t, d.SerializeTo(buf, gopacket.SerializeOptions{FixLengths: true}))
	return enginetest.UDPFrame(e, ip, u, buf.Bytes())
}

func dhcpOf(t testing.TB, b []byte) *layers.DHCPv4 {
	t.Helper()
	l := decodeAll(t, b).Layer(layers.LayerTypeDHCPv4)
	require.NotNil(t, l, "%x", b)
	return l.(*layers.DHCPv4)
}

func option(d *layers.DHCPv4, typ layers.DHCPOpt) []byte {
	for _, o := range d.Options {
		if o.Type == typ {
			return o.Data
		}
	}
	return nil
}

func TestMACNATDHCP(t *testing.T) {
	given := append([]byte{1}, hw(mac(8))...)
	for _, c := range []struct {
		name   string
		edit   func(*layers.DHCPv4)
		guests []SwitchPort
		flags  uint16
		id     []byte
	}{
		{"one guest", nil, []SwitchPort{{MAC: guest1}}, 0x8000, nil},
		{"two guests", nil, twoGuests(), 0x8000, append([]byte{1}, hw(guest1)...)},
		{"two guests that have identifiers", func(d *layers.DHCPv4) {
			d.Options = append(d.Options, layers.NewDHCPOption(layers.DHCPOptClientID, given))
		}, twoGuests(), 0x8000, given},
		{"renewal", func(d *layers.DHCPv4) { d.ClientIP = ip4G1.AsSlice() }, []SwitchPort{{MAC: guest1}}, 0, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newNATBed(t, MACNATConfig{}, c.guests...)
			d := dhcpOf(t, b.out(1, dhcpFrame(t, guest1, c.edit)))
			assert.Equal(t, hw(linkMAC), d.ClientHWAddr)
			assert.Equal(t, c.flags, d.Flags)
			assert.EqualValues(t, 0x01020304, d.Xid)
			assert.Equal(t, []byte{1}, option(d, layers.DHCPOptMessageType))
			assert.Equal(t, c.id, option(d, layers.DHCPOptClientID))

			reply := func(xid uint32, dst frame.MAC, to string) []byte {
				return dhcpOver(t, enginetest.Eth{Src: outMAC, Dst: dst}, enginetest.IP{Src: ip4Out, Dst: netip.MustParseAddr(to)}, enginetest.UDP{Src: 67, Dst: 68}, &layers.DHCPv4{
					Operation: layers.DHCPOpReply, HardwareType: layers.LinkTypeEthernet, HardwareLen: 6, Xid: xid, ClientHWAddr: hw(linkMAC),
					YourClientIP: ip4G1.AsSlice(), Options: layers.DHCPOptions{layers.NewDHCPOption(layers.DHCPOptMessageType, []byte{2})},
				})
			}
			for _, f := range [][]byte{reply(0x01020304, frame.Broadcast, "255.255.255.255"), reply(0x01020304, linkMAC, "10.0.0.1")} {
				got := b.in(f)
				require.NotNil(t, got[0])
				assert.Equal(t, guest1[:], got[0][:6])
				assert.Equal(t, hw(guest1), dhcpOf(t, got[0]).ClientHWAddr)
				for _, other := range got[1:] {
					assert.Nil(t, other, "it is nobody else's")
				}
			}
			f := reply(0x05060708, frame.Broadcast, "255.255.255.255")
			assert.Equal(t, f, b.in(f)[0], "an exchange that no guest has begun: the host's")
		})
	}
}

func TestMACNATDHCPLeavesAlone(t *testing.T) {
	relay := func(d *layers.DHCPv4) { d.RelayAgentIP = ip4G1.AsSlice(); d.ClientHWAddr = hw(mac(8)) }
	for name, f := range map[string][]byte{
		"a relay's":     dhcpFrame(t, guest1, relay),
		"not DHCP":      enginetest.UDPFrame(bcastEth, enginetest.IP{Src: ip4None, Dst: ip4Limit}, enginetest.UDP{Src: 68, Dst: 67}, make([]byte, 300)),
		"too short":     enginetest.UDPFrame(bcastEth, enginetest.IP{Src: ip4None, Dst: ip4Limit}, enginetest.UDP{Src: 68, Dst: 67}, append([]byte{1, 1, 6, 0}, make([]byte, 60)...)),
		"a fragment's":  enginetest.UDPFrame(bcastEth, enginetest.IP{Src: ip4None, Dst: ip4Limit, Frag: 0x2000}, enginetest.UDP{Src: 68, Dst: 67}, append([]byte{1, 1, 6, 0}, make([]byte, 300)...)),
		"a server's":    dhcpOver(t, bcastEth, enginetest.IP{Src: ip4G1, Dst: ip4Limit}, enginetest.UDP{Src: 67, Dst: 68}, &layers.DHCPv4{Operation: 2, HardwareType: 1, HardwareLen: 6, ClientHWAddr: hw(mac(8))}),
		"empty message": enginetest.UDPFrame(bcastEth, enginetest.IP{Src: ip4None, Dst: ip4Limit}, enginetest.UDP{Src: 68, Dst: 67}, nil),
	} {
		want := append([]byte(nil), f...)
		copy(want[6:], linkMAC[:])
		assert.Equal(t, want, newNATBed(t, MACNATConfig{}, twoGuests()...).out(1, f), name)
	}
}

// The checksum is right whether it was there, left to do, or none at all; a wrong
// one does not become right.
func TestMACNATDHCPChecksums(t *testing.T) {
	b := newNATBed(t, MACNATConfig{}, SwitchPort{MAC: guest1})
	f := dhcpFrame(t, guest1, nil)
	partial := append([]byte(nil), f...)
	b.decide(1, enginetest.Packet{Offload: enginetest.Partial(partial), Bytes: partial})
	b.deliver(1)
	pkt := b.ports[0].Take()
	require.Len(t, pkt, 1)
	assert.Zero(t, pkt[0].Offload)
	assert.Equal(t, hw(linkMAC), dhcpOf(t, pkt[0].Bytes).ClientHWAddr)

	none := append([]byte(nil), f...)
	none[40], none[41] = 0, 0
	got := b.out(1, none)
	assert.Equal(t, []byte{0, 0}, got[40:42])

	wrong := append([]byte(nil), f...)
	wrong[41] ^= 1
	assert.Empty(t, b.sends(1, wrong)[0])
	assert.Equal(t, frame.BadChecksum, b.reason(0))

	b.decide(1, enginetest.Packet{Bytes: f, Offload: frame.Offload{Flags: frame.NeedsCsum, CsumStart: 34, CsumOffset: 40}})
	b.deliver(1)
	assert.Equal(t, frame.BadOffload, b.reason(0))
}

// Each guest has room for its own exchanges: one that begins any number of them
// does not push out another's, nor take it over.
func TestMACNATDHCPExchangesBounded(t *testing.T) {
	b := newNATBed(t, MACNATConfig{}, twoGuests()...)
	b.sends(1, dhcpFrame(t, guest1, nil))
	for i := range 100 {
		b.sends(2, dhcpFrame(t, guest2, func(d *layers.DHCPv4) { d.Xid = uint32(1000 + i) }))
	}
	b.sends(2, dhcpFrame(t, guest2, nil)) // the same number
	sec := second(Now())
	assert.Equal(t, macKey(guest1, 0), b.nat.client(0x01020304, sec))
	assert.Zero(t, b.nat.client(1000, sec), "forgotten")
	assert.Equal(t, macKey(guest2, 0), b.nat.client(1099, sec))
	assert.Zero(t, b.nat.client(1099, sec+natXIDAge+5), "too old")
}

// Messages that are full, without an end, or with padding behind get an
// identifier where that is possible.
func TestAddClientID(t *testing.T) {
	const off, at = 14, 42
	build := func(opts ...byte) []byte {
		m := make([]byte, dhcpOptions, 1600)
		m[0] = 1
		return enginetest.UDPFrame(bcastEth, enginetest.IP{Src: ip4None, Dst: ip4Limit}, enginetest.UDP{Src: 68, Dst: 67}, append(m, opts...))
	}
	id := append([]byte{optClientID, 7, 1}, hw(guest1)...)
	for _, c := range []struct {
		name string
		opts []byte
		want []byte
	}{
		{"ends the message", []byte{53, 1, 1, 255}, cat([]byte{53, 1, 1}, id, []byte{255})},
		{"padded", cat([]byte{53, 1, 1, 255}, make([]byte, 20)), cat([]byte{53, 1, 1}, id, []byte{255}, make([]byte, 11))},
		{"a little padded", cat([]byte{53, 1, 1, 255}, make([]byte, 3)), cat([]byte{53, 1, 1}, id, []byte{255})},
		{"pads between", []byte{0, 0, 53, 1, 1, 0, 255}, cat([]byte{0, 0, 53, 1, 1, 0}, id, []byte{255})},
		{"has one", []byte{61, 1, 9, 255}, []byte{61, 1, 9, 255}},
		{"no end", []byte{53, 1, 1}, []byte{53, 1, 1}},
		{"option beyond the end", []byte{53, 200, 1, 255}, []byte{53, 200, 1, 255}},
		{"option without length", []byte{53, 1, 1, 12}, []byte{53, 1, 1, 12}},
		{"nothing", nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := build(c.opts...)
			b = append(make([]byte, 0, 2048), b...)
			got := addClientID(b, off, at, macKey(guest1, 0))
			assert.Equal(t, c.want, append([]byte(nil), got[at+dhcpOptions:]...))
			assert.Equal(t, len(got)-off, int(got[16])<<8|int(got[17]))
			assert.Equal(t, len(got)-34, int(got[38])<<8|int(got[39]))
			assert.Equal(t, uint16(0xffff), frame.Fold(frame.Sum(got[off:34], 0)))
		})
	}
	long := cat(make([]byte, 1230), []byte{255})
	b := append(make([]byte, 0, 2048), build(long...)...)
	assert.Len(t, addClientID(b, off, at, 1<<20), len(b), "it would not fit into the MTU")
}
