package main

import (
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// tooLongBatch runs the stage on one frame and returns the batch.
func tooLongBatch(b *frame.Batch, l *tooLong, p []byte, o frame.Offload) *frame.Frame {
	b.Reset(0)
	enginetest.Fill(b, p)
	f := b.Frame(0)
	f.Offload = o
	l.Process(b)
	return f
}

// What fits goes on as it is. What does not is dropped; who may be told is told what does, in a packet that another library finds right.
func TestBridgeRow36TooLong(t *testing.T) {
	const mtu = 1400
	l, b := &tooLong{guest: 5, mtu: mtu}, new(frame.Batch)
	eth := enginetest.Eth{Src: guestMAC, Dst: frame.MAC{2, 9, 9, 9, 9, 9}}
	four := enginetest.IP{Src: addrOf("10.0.0.2"), Dst: addrOf("192.0.2.1"), TTL: 64}
	six := enginetest.IP{Src: addrOf("fd00::2"), Dst: addrOf("2001:db8::1"), TTL: 64}
	udp := func(ip enginetest.IP, n int) []byte {
		return enginetest.UDPFrame(eth, ip, enginetest.UDP{Src: 5, Dst: 7}, enginetest.Payload(n, 1))
	}
	group := udp(four, 1400)
	group[0] |= 1
	fragment := udp(four, 1400)
	fragment[21] = 9
	fault := enginetest.ICMPFrame(eth, four, enginetest.ICMP{Type: 3, Code: 3}, enginetest.Payload(1400, 1))
	fault6 := udp(six, 1400)
	fault6[20], fault6[54] = frame.ProtoICMPv6, 1
	seg := enginetest.TCPFrame(eth, four, enginetest.TCP{Src: 1, Dst: 2, Flags: 16}, enginetest.Payload(8000, 1))
	gso := func(size uint16) frame.Offload {
		return frame.Offload{Flags: frame.NeedsCsum, GSO: frame.GSOTCPv4, GSOSize: size, CsumStart: 34, CsumOffset: 16}
	}
	for name, c := range map[string]struct {
		p        []byte
		o        frame.Offload
		dropped  bool
		answered bool
	}{
		"fits":            {udp(four, 1372), frame.Offload{}, false, false},
		"a byte more":     {udp(four, 1373), frame.Offload{}, true, true},
		"IPv6 fits":       {udp(six, 1352), frame.Offload{}, false, false},
		"IPv6":            {udp(six, 1353), frame.Offload{}, true, true},
		"group":           {group, frame.Offload{}, true, false},
		"later fragment":  {fragment, frame.Offload{}, true, false},
		"ICMP error":      {fault, frame.Offload{}, true, false},
		"ICMPv6 error":    {fault6, frame.Offload{}, true, false},
		"another type":    {eth.Frame(0x88b5, make([]byte, 1500)), frame.Offload{}, true, false},
		"no IPv4 inside":  {eth.Frame(frame.TypeIPv4, make([]byte, 1500)), frame.Offload{}, true, false},
		"no IPv6 inside":  {eth.Frame(frame.TypeIPv6, make([]byte, 1500)), frame.Offload{}, true, false},
		"segments fit":    {seg, gso(1360), false, false},
		"segments do not": {seg, gso(1361), true, true},
	} {
		t.Run(name, func(t *testing.T) {
			f := tooLongBatch(b, l, c.p, c.o)
			assert.Equal(t, c.dropped, f.Reason == frame.OversizeFrame)
			if !assert.Equal(t, c.answered, b.Len() == 2) || !c.answered {
				return
			}
			r := b.Frame(1)
			assert.Equal(t, frame.PortID(5), r.Out)
			p := gopacket.NewPacket(r.Bytes(), layers.LayerTypeEthernet, gopacket.Default)
			assert.Nil(t, p.ErrorLayer())
			again := gopacket.NewSerializeBuffer()
			var told int
			if i, ok := p.Layer(layers.LayerTypeICMPv4).(*layers.ICMPv4); ok {
				assert.Equal(t, layers.CreateICMPv4TypeCode(3, 4), i.TypeCode)
				told = int(i.Seq)
				assert.NoError(t, gopacket.SerializePacket(again, gopacket.SerializeOptions{ComputeChecksums: true}, p))
			} else {
				i := p.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6)
				assert.EqualValues(t, layers.ICMPv6TypePacketTooBig, i.TypeCode.Type())
				told = int(i.Payload[2])<<8 | int(i.Payload[3])
				assert.NoError(t, i.SetNetworkLayerForChecksum(p.NetworkLayer()))
				assert.NoError(t, gopacket.SerializeLayers(again, gopacket.SerializeOptions{ComputeChecksums: true},
					p.Layer(layers.LayerTypeEthernet).(*layers.Ethernet), p.Layer(layers.LayerTypeIPv6).(*layers.IPv6), i, gopacket.Payload(i.Payload)))
			}
			assert.Equal(t, mtu, told)
			assert.Equal(t, r.Bytes(), again.Bytes(), "its sums")
			assert.Equal(t, c.p[:6], r.Bytes()[6:12], "of whom the packet was for")
		})
	}
	assert.Zero(t, testing.AllocsPerRun(100, func() { tooLongBatch(b, l, seg, gso(1361)) }))
}
