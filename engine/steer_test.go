package engine

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// TestSwitchSteers: a flow's frames go to the queue that the guest last sent
// that flow from, whatever the snapshot holds.
func TestSwitchSteersRow67(t *testing.T) {
	ip6 := [2]netip.Addr{netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00::2")}
	ip4 := [2]netip.Addr{ip4A, ip4B}
	build := func(kind string, port uint16, back bool, bcast bool) []byte {
		a, b := mac(0), mac(1)
		s, d := 0, 1
		sp, dp := port, uint16(80)
		if back {
			a, b, s, d, sp, dp = b, a, 1, 0, 80, port
		}
		e := enginetest.Eth{Dst: b, Src: a}
		if bcast {
			e.Dst = frame.Broadcast
		}
		payload := make([]byte, 100)
		switch kind {
		case "tcp4":
			return enginetest.TCPFrame(e, enginetest.IP{Src: ip4[s], Dst: ip4[d]}, enginetest.TCP{Src: sp, Dst: dp}, payload)
		case "udp6":
			return enginetest.UDPFrame(e, enginetest.IP{Src: ip6[s], Dst: ip6[d]}, enginetest.UDP{Src: sp, Dst: dp}, payload)
		case "options":
			return enginetest.TCPFrame(e, enginetest.IP{Src: ip4[s], Dst: ip4[d], Options: make([]byte, 12)}, enginetest.TCP{Src: sp, Dst: dp}, payload)
		case "tagged":
			return tag(enginetest.TCPFrame(e, enginetest.IP{Src: ip4[s], Dst: ip4[d]}, enginetest.TCP{Src: sp, Dst: dp}, payload), typeVLAN, 5)
		case "fragment":
			return enginetest.UDPFrame(e, enginetest.IP{Src: ip4[s], Dst: ip4[d], Frag: frame.MoreFragments}, enginetest.UDP{Src: sp, Dst: dp}, payload)
		}
		return e.Frame(0x88b5, payload)
	}
	for _, kind := range []string{"tcp4", "udp6", "options", "tagged", "fragment", "other"} {
		for _, snapshot := range []int{18, frame.HeadSize} {
			b := newBed(t, SwitchConfig{})
			b.port(SwitchPort{Queues: 4})
			b.port(SwitchPort{})
			b.port(SwitchPort{}) // so that what is for many is flooded
			one := func(in int, data []byte, queue uint16) enginetest.Packet {
				b.batch.Reset(0)
				setSnapshot(b.batch, data, snapshot, b.ids[in]).Queue = queue
				b.stages[in].Process(b.batch)
				b.deliver(in)
				got := b.ports[1-in].Take()
				require.Len(t, got, 1)
				require.Equal(t, data, got[0].Bytes)
				return got[0]
			}
			one(1, build(kind, 1, true, true), 0)
			for _, q := range []uint16{3, 1, 0, 2} {
				one(0, build(kind, 1000, false, false), q)
				assert.Equal(t, q, one(1, build(kind, 1000, true, false), 0).Queue, "%s, snapshot %d", kind, snapshot)
				if kind == "tcp4" || kind == "udp6" {
					assert.Equal(t, q, one(1, build(kind, 1000, true, true), 0).Queue, "flooded")
				}
			}
		}
	}
}

// TestFlowHash: what makes a flow, and what does not.
func TestFlowHash(t *testing.T) {
	var bt frame.Batch
	hash := func(data []byte) uint32 {
		enginetest.Fill(&bt, data)
		return flowHash(bt.Frame(0))
	}
	udp := func(ip enginetest.IP, src, dst uint16) []byte {
		return enginetest.UDPFrame(enginetest.Eth{Dst: mac(1), Src: mac(2)}, ip, enginetest.UDP{Src: src, Dst: dst}, nil)
	}
	there, back := enginetest.IP{Src: ip4A, Dst: ip4B}, enginetest.IP{Src: ip4B, Dst: ip4A}
	frag := enginetest.IP{Src: ip4A, Dst: ip4B, Frag: frame.MoreFragments}
	noFrag := enginetest.IP{Src: ip4A, Dst: ip4B, Frag: frame.DontFragment}
	assert.Equal(t, hash(udp(there, 1, 2)), hash(udp(back, 2, 1)))
	assert.Equal(t, hash(udp(there, 1, 2)), hash(udp(noFrag, 1, 2)))
	assert.NotEqual(t, hash(udp(there, 1, 2)), hash(udp(there, 1, 4)), "another port")
	assert.Equal(t, hash(udp(frag, 1, 2)), hash(udp(frag, 77, 88)), "the other fragments have no ports")
	assert.Equal(t, hash(udp(there, 1, 2)), hash(tag(udp(there, 1, 2), typeVLAN, 5)), "a tag does not matter")
	assert.Equal(t, hash(eth(mac(1), mac(2), 0)), hash(eth(mac(2), mac(1), 0)))
	assert.NotEqual(t, hash(eth(mac(1), mac(2), 0)), hash(eth(mac(1), mac(3), 0)))
	for n := frame.EthernetLen; n < 46; n++ {
		hash(udp(there, 1, 2)[:n]) // whatever is missing
		hash(tag(udp(there, 1, 2), typeVLAN, 5)[:n])
	}
}

// TestSteerSpreads: flows that the guest has not sent yet use all queues.
func TestSteerSpreads(t *testing.T) {
	s := newSteering(4)
	var n [4]int
	var bt frame.Batch
	for i := range 1000 {
		enginetest.Fill(&bt, enginetest.UDPFrame(enginetest.Eth{}, enginetest.IP{Src: ip4A, Dst: ip4B}, enginetest.UDP{Src: uint16(i), Dst: 53}, nil))
		n[s.queue(flowHash(bt.Frame(0)))]++
	}
	for q := range n {
		assert.Greater(t, n[q], 150, "queue %d", q)
	}
	assert.Nil(t, newSteering(0))
	assert.Nil(t, newSteering(1))
}
