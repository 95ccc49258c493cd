package main

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
	"sidewire/engine/uplink"
)

// What is answered is a request for a host whose address was set by hand, and
// nothing else: not a probe for the host's own address, nor what is no request,
// cut short or of another kind. Nothing is allocated.
func TestBridgeRow41AnswersForHostsSetByHand(t *testing.T) {
	gateway, guest, gw := addrOf("169.254.1.1"), addrOf("10.244.1.5"), frame.MAC{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}
	stage := newStaticARP(7, []uplink.Neighbour{{Addr: addrOf("10.244.1.9"), MAC: frame.MAC{2}}, {Addr: gateway, MAC: gw}})
	e := enginetest.Eth{Src: guestMAC, Dst: broadcast}
	request := enginetest.ARPFrame(e, 1, guestMAC, guest, zeroMAC, gateway)
	b := new(frame.Batch)
	enginetest.Fill(b, request)
	b.Frame(0).Queue = 3
	stage.Process(b)
	assert.Equal(t, frame.Consumed, b.Frame(0).Out)
	if assert.Equal(t, 2, b.Len()) {
		want := enginetest.ARPFrame(enginetest.Eth{Src: gw, Dst: guestMAC}, 2, gw, gateway, guestMAC, guest)
		assert.Equal(t, want[:42], b.Frame(1).Bytes()[:42])
		assert.Equal(t, frame.PortID(7), b.Frame(1).Out)
		assert.Equal(t, uint16(3), b.Frame(1).Queue)
	}

	change := func(at int, v byte) []byte {
		f := append([]byte{}, request...)
		f[at] = v
		return f
	}
	others := [][]byte{
		enginetest.ARPFrame(e, 1, guestMAC, gateway, zeroMAC, gateway), enginetest.ARPFrame(e, 1, guestMAC, guest, zeroMAC, addrOf("169.254.1.2")),
		enginetest.ARPFrame(e, 2, guestMAC, guest, gw, gateway), change(15, 6), change(17, 1), change(18, 8), change(19, 16), change(12, 9), request[:41], request[:14], {},
	}
	enginetest.Fill(b, others...)
	stage.Process(b)
	assert.Equal(t, len(others), b.Len())
	for i := range others {
		assert.Equal(t, frame.Drop, b.Frame(i).Out, "frame %d is for the network", i)
		assert.Equal(t, frame.ReasonNone, b.Frame(i).Reason)
	}

	// More than there is room for: some are lost, none does harm.
	var many [][]byte
	for range frame.BatchSize {
		many = append(many, request)
	}
	enginetest.Fill(b, many...)
	stage.Process(b)
	stage.Process(b)
	assert.LessOrEqual(t, b.Len(), frame.BatchMax)
	assert.Zero(t, testing.AllocsPerRun(10, func() {
		b.Reset(0)
		b.Next().SetBytes(request, nil, nil)
		stage.Process(b)
	}))
}
