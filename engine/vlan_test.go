package engine

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// tag puts a VLAN tag before the type of a frame.
func tag(b []byte, typ, tci uint16) []byte {
	out := append([]byte(nil), b[:12]...)
	out = binary.BigEndian.AppendUint16(out, typ)
	out = binary.BigEndian.AppendUint16(out, tci)
	return append(out, b[12:]...)
}

// TestSwitchVLANs: what every kind of port makes of a frame. The first port
// brings it, and each of the others gets want[i] of it, nil for nothing.
func TestSwitchVLANs(t *testing.T) {
	plain, access, trunk := SwitchPort{}, SwitchPort{Access: 10}, SwitchPort{Trunk: []uint16{10, 20}}
	other := SwitchPort{Access: 20}
	native := SwitchPort{Access: 10, Trunk: []uint16{20}}
	zero := SwitchPort{Trunk: []uint16{0, 10}}
	base := eth(frame.Broadcast, mac(1), 0)
	q := func(tci uint16) []byte { return tag(base, typeVLAN, tci) }
	others := []SwitchPort{plain, access, other, trunk, native, zero}
	for _, c := range []struct {
		name   string
		in     SwitchPort
		frame  []byte
		reason frame.DropReason
		want   [6][]byte
	}{
		{name: "untagged into plain", in: plain, frame: base,
			want: [6][]byte{base, nil, nil, nil, nil, base}},
		{name: "tagged into plain", in: plain, frame: q(10),
			want: [6][]byte{q(10), base, nil, q(10), base, q(10)}},
		{name: "unknown VLAN into plain", in: plain, frame: q(30),
			want: [6][]byte{q(30)}},
		{name: "VLAN 4095 into plain (H078)", in: plain, frame: q(4095),
			want: [6][]byte{q(4095)}},
		{name: "priority into plain", in: plain, frame: q(0xe000),
			want: [6][]byte{q(0xe000), nil, nil, nil, nil, base}},
		{name: "untagged into access", in: access, frame: base,
			want: [6][]byte{q(10), base, nil, q(10), base, q(10)}},
		{name: "priority into access", in: access, frame: q(0xe000),
			want: [6][]byte{q(0xe00a), base, nil, q(0xe00a), base, q(0xe00a)}},
		{name: "tagged into access", in: access, frame: q(10), reason: frame.WrongVLAN},
		{name: "other VLAN into access", in: access, frame: q(20), reason: frame.WrongVLAN},
		{name: "tagged into trunk", in: trunk, frame: q(0xa014),
			want: [6][]byte{q(0xa014), nil, base, q(0xa014), q(0xa014), nil}},
		{name: "untagged into trunk", in: trunk, frame: base, reason: frame.WrongVLAN},
		{name: "priority into trunk", in: trunk, frame: q(0), reason: frame.WrongVLAN},
		{name: "wrong VLAN into trunk", in: trunk, frame: q(30), reason: frame.WrongVLAN},
		{name: "VLAN 4095 into trunk (H078)", in: trunk, frame: q(4095), reason: frame.WrongVLAN},
		{name: "untagged into native", in: native, frame: base,
			want: [6][]byte{q(10), base, nil, q(10), base, q(10)}},
		{name: "tagged into native", in: native, frame: q(20),
			want: [6][]byte{q(20), nil, base, q(20), q(20), nil}},
		{name: "native VLAN tagged", in: native, frame: q(10), reason: frame.WrongVLAN},
		{name: "untagged into zero", in: zero, frame: base,
			want: [6][]byte{base, nil, nil, nil, nil, base}},
		{name: "two tags: the outer counts", in: plain, frame: tag(q(20), typeVLAN, 10),
			want: [6][]byte{tag(q(20), typeVLAN, 10), q(20), nil, tag(q(20), typeVLAN, 10), nil /* would hop */, tag(q(20), typeVLAN, 10)}},
		{name: "service tag", in: plain, frame: tag(base, typeQinQ, 10),
			want: [6][]byte{tag(base, typeQinQ, 10), base, nil, tag(base, typeQinQ, 10), base, tag(base, typeQinQ, 10)}},
		{name: "cut tag", in: plain, frame: q(10)[:17], reason: frame.ShortFrame},
		{name: "tag and nothing else", in: plain, frame: q(10)[:18],
			want: [6][]byte{q(10)[:18], base[:14], nil, q(10)[:18], base[:14], q(10)[:18]}},
		{name: "10 tags (H078)", in: access, frame: tag(tag(tag(tag(tag(tag(tag(tag(tag(q(1), typeVLAN, 2), typeVLAN, 3),
			typeVLAN, 4), typeVLAN, 5), typeVLAN, 6), typeVLAN, 7), typeVLAN, 8), typeVLAN, 9), typeVLAN, 10), reason: frame.WrongVLAN},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, known := range []bool{false, true} {
				b := newBed(t, SwitchConfig{})
				b.port(c.in)
				for _, o := range others {
					b.port(o)
				}
				data := append([]byte(nil), c.frame...)
				if !known {
					b.send(0, data)
					require.Equal(t, c.reason, b.reason(0))
					got := b.got()
					for i, want := range c.want {
						if want == nil {
							assert.Empty(t, got[i+1], "port %d", i)
							continue
						}
						require.Len(t, got[i+1], 1, "port %d", i)
						assert.Equal(t, want, got[i+1][0], "port %d", i)
					}
					continue
				}
				// The same frame as known unicast to each of those that got it.
				for i, want := range c.want {
					if want == nil {
						continue
					}
					reply, to, from := append([]byte(nil), want...), mac(1), mac(2)
					copy(reply, to[:])
					copy(reply[6:], from[:])
					b.send(i+1, reply)
					b.got()
					if b.reason(0) == frame.WrongVLAN {
						continue // with two tags the answer is another VLAN's
					}
					copy(data, from[:])
					b.send(0, data)
					got := b.got()
					require.Len(t, got[i+1], 1, "port %d", i)
					assert.Equal(t, want[6:], got[i+1][0][6:], "port %d", i)
					for j := range got {
						if j != i+1 {
							assert.Empty(t, got[j], "known unicast to %d went to %d", i+1, j)
						}
					}
				}
			}
		})
	}
}

func TestSwitchVLANConfig(t *testing.T) {
	b := newBed(t, SwitchConfig{})
	p, err := b.e.AddPort("x", new(enginetest.MemPort))
	require.NoError(t, err)
	for _, c := range []SwitchPort{
		{Access: 4095}, {Access: 5000}, {Trunk: []uint16{4095}}, {Access: 1, Trunk: []uint16{0}},
		{SpoofCheck: true}, {SpoofCheck: true, MAC: frame.Broadcast},
	} {
		c.Port = p
		_, err := b.sw.AddPort(c)
		assert.Error(t, err, "%+v", c)
	}
	_, err = b.sw.AddPort(SwitchPort{Port: p + 1})
	assert.Error(t, err, "no such port")
	_, err = b.sw.AddPort(SwitchPort{Port: p, SpoofCheck: true, MAC: mac(1)})
	require.NoError(t, err)
	_, err = b.sw.AddPort(SwitchPort{Port: p})
	assert.Error(t, err, "twice")
	checkFDB(t, b.sw.fdb)
}

// TestSwitchTagOffload: offsets of an offload move with the headers, and
// nothing is lost where Head is full.
func TestSwitchTagOffload(t *testing.T) {
	for _, size := range []int{0, 40, 60, 70, 74, 100, 1400, 9000} {
		for _, known := range []bool{false, true} {
			b := newBed(t, SwitchConfig{})
			b.port(SwitchPort{Access: 10})
			b.port(SwitchPort{Trunk: []uint16{10}})
			b.port(SwitchPort{Access: 10})
			dst := frame.Broadcast
			if known {
				dst = mac(2)
				b.send(1, eth(mac(1), mac(2), 10))
				b.got()
			}
			data := enginetest.TCPFrame(enginetest.Eth{Dst: dst, Src: mac(1)},
				enginetest.IP{Src: netip.MustParseAddr("10.0.0.1"), Dst: netip.MustParseAddr("10.0.0.2")},
				enginetest.TCP{Src: 1, Dst: 2}, bytes.Repeat([]byte("payload"), size/7+1))
			off := frame.Offload{Flags: frame.NeedsCsum, CsumStart: 34, CsumOffset: 16, HdrLen: 54, GSO: frame.GSOTCPv4, GSOSize: 1000}
			b.decide(0, enginetest.Packet{Bytes: data, Offload: off})
			b.deliver(0)
			got := b.ports[1].Take()
			require.Len(t, got, 1)
			assert.Equal(t, tag(data, typeVLAN, 10), got[0].Bytes)
			moved := off
			moved.CsumStart, moved.HdrLen = 38, 58
			assert.Equal(t, moved, got[0].Offload)
			if !known {
				got = b.ports[2].Take()
				require.Len(t, got, 1)
				assert.Equal(t, data, got[0].Bytes)
				assert.Equal(t, off, got[0].Offload, "as it was, whatever the other got")
			}
			// And back.
			to, from := mac(1), mac(2)
			copy(data, to[:])
			copy(data[6:], from[:])
			b.send(0, eth(frame.Broadcast, mac(1), 0))
			b.got()
			b.decide(1, enginetest.Packet{Bytes: tag(data, typeVLAN, 10), Offload: moved})
			b.deliver(1)
			got = b.ports[0].Take()
			require.Len(t, got, 1)
			assert.Equal(t, data, got[0].Bytes)
			assert.Equal(t, off, got[0].Offload)
		}
	}
}

// TestSwitchChecksumInTag: a checksum that would be written into the tag would
// change the VLAN after it was judged (H073).
func TestSwitchChecksumInTag(t *testing.T) {
	b := newBed(t, SwitchConfig{})
	b.port(SwitchPort{Trunk: []uint16{10}})
	b.port(SwitchPort{Trunk: []uint16{10, 20}})
	b.decide(0, enginetest.Packet{
		Bytes:   eth(frame.Broadcast, mac(1), 10),
		Offload: frame.Offload{Flags: frame.NeedsCsum, CsumStart: 14, CsumOffset: 0},
	})
	b.deliver(0)
	assert.Equal(t, frame.BadOffload, b.reason(0))
	assert.Equal(t, []int{0, 0}, b.receivers())
}

// TestSwitchGiant: a frame of the greatest length gets no tag.
func TestSwitchGiant(t *testing.T) {
	b := newBed(t, SwitchConfig{})
	b.port(SwitchPort{Access: 10})
	b.port(SwitchPort{Trunk: []uint16{10}})
	b.port(SwitchPort{Access: 10})
	big := enginetest.Eth{Dst: frame.Broadcast, Src: mac(1)}.Frame(0x88b5, make([]byte, frame.MaxLen-14))
	b.send(0, big)
	assert.Equal(t, []int{0, 0, 1}, b.receivers(), "lost for those that need the tag only")
}

// TestSwitchMTU: what is too long for one port does not go there, and a tag
// does not count.
func TestSwitchMTU(t *testing.T) {
	b := newBed(t, SwitchConfig{})
	b.port(SwitchPort{Access: 10})
	b.port(SwitchPort{Trunk: []uint16{10}, MTU: 100})
	b.port(SwitchPort{Access: 10, MTU: 100})
	b.port(SwitchPort{Access: 10, MTU: 101})
	packet := func(dst frame.MAC, n int) []byte {
		return enginetest.Eth{Dst: dst, Src: mac(1)}.Frame(0x88b5, make([]byte, n))
	}
	b.send(0, packet(frame.Broadcast, 100), packet(frame.Broadcast, 101), packet(frame.Broadcast, 102))
	assert.Equal(t, []int{0, 1, 1, 2}, b.receivers())
	for p, vlan := range []uint16{0, 10, 0, 0} {
		b.send(p, eth(frame.Broadcast, mac(10+p), vlan))
	}
	b.receivers()
	for p := 1; p < 4; p++ {
		b.send(0, packet(mac(10+p), 100), packet(mac(10+p), 101), packet(mac(10+p), 102), packet(mac(10+p), 100))
		assert.Equal(t, frame.OversizeFrame, b.reason(2))
	}
	assert.Equal(t, []int{0, 2, 2, 3}, b.receivers())
	b.decide(0, enginetest.Packet{Bytes: packet(mac(12), 5000), Offload: frame.Offload{GSO: frame.GSOTCPv4}})
	b.deliver(0)
	assert.Equal(t, []int{0, 0, 1, 0}, b.receivers(), "GSO frames are for the port to cut")

	plain := newBed(t, SwitchConfig{})
	plain.port(SwitchPort{})
	plain.port(SwitchPort{MTU: 100})
	plain.send(1, eth(frame.Broadcast, mac(10), 0))
	plain.receivers()
	plain.send(0, packet(mac(10), 100), packet(mac(10), 101), packet(mac(10), 100), packet(mac(10), 101))
	assert.Equal(t, []int{0, 2}, plain.receivers())
	assert.Equal(t, frame.OversizeFrame, plain.reason(3))
}
