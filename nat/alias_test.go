package nat

import (
	"encoding/binary"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

var (
	aliasIP = ip("169.254.64.6")
	aliasGW = ip("169.254.64.5")
)

// aliased is a guest that the pod knows by other addresses.
func aliased(c *Config) { c.Guests[0].Alias = Alias{aliasIP, aliasGW} }

// fromPod sends what the pod's kernel sends by the guest's local tap.
func (w *world) fromPod(ps ...packet) []*frame.Frame {
	w.t.Helper()
	for i := range ps {
		copy(ps[i].data, guestMAC[:])
		copy(ps[i].data[6:], GatewayMAC[:])
	}
	return w.stage(w.m.Local(0), portTap, ps...)
}

// The pod sees the alias and the guest never does, whatever the protocol; the
// checksums are right on both sides.
func TestAlias(t *testing.T) {
	w := newWorld(t, aliased)
	for name, build := range map[string]func(f flow5) packet{
		"tcp":     func(f flow5) packet { return tcp(f, "SA", 1, 2, "data") },
		"udp":     func(f flow5) packet { return udp(f, "datagram") },
		"echo":    func(f flow5) packet { return echo(f.src, f.dst, 7, 1) },
		"partial": func(f flow5) packet { return partialSum(tcp(f, "A", 1, 2, "data")) },
	} {
		t.Run(name, func(t *testing.T) {
			ends := func(s seen) (src, dst uint32) {
				return binary.BigEndian.Uint32(s.ip.SrcIP), binary.BigEndian.Uint32(s.ip.DstIP)
			}
			for to, want := range map[uint32]uint32{gatewayIP: aliasGW, podIP: podIP} {
				s := w.one(w.out(build(flow5{guestIP, to, 2000, 53})), portTap)
				src, dst := ends(s)
				assert.Equal(t, aliasIP, src)
				assert.Equal(t, want, dst)
				assert.EqualValues(t, 64, s.ip.TTL, "no hop")
			}
			for from, want := range map[uint32]uint32{aliasGW: gatewayIP, podIP: podIP} {
				s := w.one(w.fromPod(build(flow5{from, aliasIP, 53, 2000})), portGuest)
				src, dst := ends(s)
				assert.Equal(t, want, src)
				assert.Equal(t, guestIP, dst)
				assert.EqualValues(t, 64, s.ip.TTL)
			}
		})
	}
	assert.Empty(t, w.flows())
}

// partialSum leaves the checksum of a TCP segment to somebody else.
func partialSum(p packet) packet {
	p.off = frame.Offload{Flags: frame.NeedsCsum, CsumStart: 34, CsumOffset: 16}
	sum := frame.Sum(p.data[26:34], 0) + 6 + uint64(len(p.data)-34)
	binary.BigEndian.PutUint16(p.data[50:], frame.Fold(sum))
	return p
}

// RFC 5508 REQ-7: what an ICMP error quotes is what its receiver sent.
func TestAliasInErrors(t *testing.T) {
	w := newWorld(t, aliased)
	quoted := func(f *frame.Frame) flow5 {
		d := f.Bytes()[frame.EthernetLen+28:]
		require.EqualValues(t, 0xffff, frame.Fold(frame.Sum(d[:20], 0)), "quoted header")
		return flow5{binary.BigEndian.Uint32(d[12:]), binary.BigEndian.Uint32(d[16:]),
			binary.BigEndian.Uint16(d[20:]), binary.BigEndian.Uint16(d[22:])}
	}
	fs := w.fromPod(icmpAbout(aliasGW, aliasIP, 3, 3, udp(flow5{aliasIP, aliasGW, 2000, 53}, "question")))
	w.one(fs, portGuest)
	assert.Equal(t, flow5{guestIP, gatewayIP, 2000, 53}, quoted(fs[0]))
	fs = w.out(icmpAbout(guestIP, gatewayIP, 3, 3, udp(flow5{gatewayIP, guestIP, 53, 2000}, "answer")))
	w.one(fs, portTap)
	assert.Equal(t, flow5{aliasGW, aliasIP, 53, 2000}, quoted(fs[0]))
}

func TestAliasInARP(t *testing.T) {
	w := newWorld(t, aliased)
	ask := arp(1, GatewayMAC, frame.Broadcast, GatewayMAC, aliasGW, aliasIP)
	fs := w.stage(w.m.Local(0), portTap, ask)
	require.Len(t, fs, 1)
	require.Equal(t, portGuest, fs[0].Out)
	assert.Equal(t, arp(1, GatewayMAC, frame.Broadcast, GatewayMAC, gatewayIP, guestIP).data, fs[0].Bytes())
	fs = w.out(arp(2, guestMAC, GatewayMAC, guestMAC, guestIP, gatewayIP))
	require.Len(t, fs, 1)
	require.Equal(t, portTap, fs[0].Out)
	assert.Equal(t, arp(2, guestMAC, GatewayMAC, guestMAC, aliasIP, aliasGW).data, fs[0].Bytes())
	// Who asks for the gateway is answered with its own addresses.
	fs = w.out(arp(1, guestMAC, frame.Broadcast, guestMAC, guestIP, gatewayIP))
	require.Len(t, fs, 2)
	assert.Equal(t, gatewayIP, binary.BigEndian.Uint32(fs[1].Bytes()[arpSenderIP:]))
}

func TestHalfAnAlias(t *testing.T) {
	c := Config{Guests: []Guest{{IP: guestIP, Gateway: gatewayIP, Prefix: 24, Alias: Alias{Guest: aliasIP}}}, Router: &oneHop{}}
	_, err := New(c)
	require.ErrorContains(t, err, "alias")
}
