package engine

import (
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// A wire passes everything that nobody has decided about, and nothing else.
func TestWireRow38(t *testing.T) {
	const guest, other = 3, 4
	fromGuest, fromOther := NewWire(guest, other, 1)
	b := new(frame.Batch)
	for stage, want := range map[Stage]frame.PortID{fromGuest: other, fromOther: guest} {
		enginetest.Fill(b, eth(mac(1), mac(2), 0), eth(frame.MAC{1, 0x80, 0xc2, 0, 0, 0x0e}, mac(2), 7), eth(mac(1), frame.MAC{}, 0), eth(mac(1), mac(2), 0), eth(mac(1), mac(2), 0))
		b.Frame(3).Out = frame.Consumed
		b.Frame(4).Drop(frame.BadOffload)
		stage.Process(b)
		for i, out := range []frame.PortID{want, want, want, frame.Consumed, frame.Drop} {
			assert.Equal(t, out, b.Frame(i).Out, "frame %d", i)
		}
	}
}

// Of a guest with several queue pairs each flow comes back on the one that it was
// sent from, also when the guest moves it; frames too short for a flow do no harm.
func TestWireKeepsFlowsOnTheirQueue(t *testing.T) {
	fromGuest, fromOther := NewWire(3, 4, 4)
	b := new(frame.Batch)
	a, o := enginetest.IP{Src: netip.MustParseAddr("10.0.0.1"), Dst: netip.MustParseAddr("10.0.0.2"), TTL: 64}, enginetest.IP{Src: netip.MustParseAddr("10.0.0.2"), Dst: netip.MustParseAddr("10.0.0.1"), TTL: 64}
	for queue := range uint16(4) {
		for port := range uint16(8) {
			enginetest.Fill(b, enginetest.TCPFrame(enginetest.Eth{Dst: mac(1), Src: mac(2)}, a, enginetest.TCP{Src: 1000 + port, Dst: 80}, nil))
			b.Frame(0).Queue = (queue + port) % 4
			fromGuest.Process(b)
			enginetest.Fill(b, enginetest.TCPFrame(enginetest.Eth{Dst: mac(2), Src: mac(1)}, o, enginetest.TCP{Src: 80, Dst: 1000 + port}, nil))
			fromOther.Process(b)
			assert.Equal(t, (queue+port)%4, b.Frame(0).Queue)
		}
	}
	for n := range 60 {
		enginetest.Fill(b, eth(mac(1), mac(2), 9)[:n])
		fromGuest.Process(b)
		b.Frame(0).Out = frame.Drop
		fromOther.Process(b)
		assert.Equal(t, frame.PortID(3), b.Frame(0).Out)
	}
}

func TestWireAllocatesNothing(t *testing.T) {
	for _, queues := range []int{1, 4} {
		fromGuest, fromOther := NewWire(3, 4, queues)
		b := new(frame.Batch)
		fill(b, frame.BatchSize, 3, mac(1), func(i int) frame.MAC { return mac(i) })
		assert.Zero(t, testing.AllocsPerRun(100, func() {
			fromGuest.Process(b)
			forget(b)
			fromOther.Process(b)
			forget(b)
		}))
	}
}
