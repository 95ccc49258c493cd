package engine

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

func TestSwitchStorm(t *testing.T) {
	b := newBed(t, SwitchConfig{})
	b.storm = 1000
	b.plainPorts(2)
	b.port(SwitchPort{Storm: 2000})
	burst := make([][]byte, 64)
	for i := range burst {
		burst[i] = eth(frame.Broadcast, mac(0), 0)
	}
	send := func(in, times int) int {
		for range times {
			b.send(in, burst...)
		}
		n := b.receivers()
		return max(n[0], n[1], n[2])
	}
	b.batch.Now = int64(time.Second)
	assert.Equal(t, 100, send(0, 4), "a tenth of a second's")
	assert.Equal(t, frame.Storm, b.reason(63))
	assert.Equal(t, 0, send(0, 1))
	assert.Equal(t, 100, send(1, 4), "each port by itself")
	assert.Equal(t, 200, send(2, 4), "and by its own limit")
	b.batch.Now += int64(10 * time.Millisecond)
	assert.Equal(t, 10, send(0, 1))
	b.batch.Now += int64(time.Hour)
	assert.Equal(t, 100, send(0, 4), "and no more after long silence")

	// Known unicast is not limited.
	b.send(1, eth(frame.Broadcast, mac(1), 0))
	b.receivers()
	for i := range burst {
		burst[i] = eth(mac(1), mac(0), 0)
	}
	assert.Equal(t, 256, send(0, 4))
	st := b.sw.Stats().Ports[0]
	assert.EqualValues(t, 256+64+64+256-210, st.Drops["storm"])
	assert.EqualValues(t, 210, st.Flooded)
}

func TestSwitchStormOff(t *testing.T) {
	b := newBed(t, SwitchConfig{})
	b.plainPorts(2)
	for range 1000 {
		b.send(0, eth(frame.Broadcast, mac(0), 0))
	}
	assert.Equal(t, 1000, b.receivers()[1])
}

func TestStormDefault(t *testing.T) {
	l := newStormLimit(0)
	assert.EqualValues(t, 50*time.Microsecond, l.cost)
	assert.EqualValues(t, 100*time.Millisecond, l.burst)
	assert.EqualValues(t, 64, newStormLimit(1).burst/newStormLimit(1).cost)
}

// vandal is a port that changes what it is given, as one without GSO and
// checksum offload may, and refuses every other frame.
type vandal struct{ n int }

func (v *vandal) Push(_ int, fs []*frame.Frame) {
	for _, f := range fs {
		for i := range f.Head {
			f.Head[i] = 0xee
		}
		f.Offload = frame.Offload{Flags: 3, GSO: 9, HdrLen: 9, GSOSize: 9, CsumStart: 9, CsumOffset: 9}
		f.Len, f.HeadLen, f.Queue, f.L3, f.L4, f.Tail = 1, 1, 99, 1, 1, nil
		f.RxBufs = 7
		if v.n++; v.n&1 == 0 {
			f.Drop(frame.NoBuffer)
		}
	}
}

// TestFloodRestores: what one member does to a frame the others do not see.
func TestFloodRestores(t *testing.T) {
	b := newBed(t, SwitchConfig{})
	b.plainPorts(2)
	id, err := b.e.AddPort("vandal", new(vandal))
	require.NoError(t, err)
	_, err = b.sw.AddPort(SwitchPort{Port: id})
	require.NoError(t, err)
	b.plainPorts(1)

	off := frame.Offload{Flags: frame.NeedsCsum, GSO: frame.GSOTCPv4, HdrLen: 54, GSOSize: 1000, CsumStart: 34, CsumOffset: 16}
	var in []enginetest.Packet
	for i := range 10 {
		data := enginetest.TCPFrame(enginetest.Eth{Dst: frame.Broadcast, Src: mac(0)},
			enginetest.IP{Src: ip4A, Dst: ip4B}, enginetest.TCP{Src: uint16(i)}, make([]byte, 5000))
		in = append(in, enginetest.Packet{Bytes: data, Offload: off, Queue: 3})
	}
	b.decide(0, in...)
	b.batch.Frame(0).RxAt, b.batch.Frame(0).RxBufs = 3, 2
	b.ports[1].Refuse = func(f *frame.Frame) frame.DropReason {
		assert.Zero(t, f.RxBufs, "it is not for one alone")
		return frame.ReasonNone
	}
	b.deliver(0)
	for _, p := range []int{1, 2} {
		got := b.ports[p].Take()
		require.Len(t, got, 10, "port %d", p)
		for i := range got {
			assert.Equal(t, in[i].Bytes, got[i].Bytes, "in order")
			assert.Equal(t, off, got[i].Offload)
			assert.EqualValues(t, 3, got[i].Queue)
		}
	}
	for i := range 10 {
		assert.NotEqual(t, frame.Drop, b.batch.Frame(i).Out, "one member's loss is not the frame's")
	}
	for _, p := range b.e.PortStats() {
		switch p.ID {
		case id:
			assert.EqualValues(t, 5, p.OutFrames)
			assert.Equal(t, map[string]uint64{"no_buffer": 5}, p.Drops)
		case b.ids[0]:
			assert.Empty(t, p.Drops)
			assert.EqualValues(t, 10, p.InFrames)
		case b.ids[1], b.ids[2]:
			assert.EqualValues(t, 10, p.OutFrames)
			assert.EqualValues(t, 10*5054, p.OutBytes)
		}
	}
}

// pushes is a port that counts how often it is called.
type pushes struct{ calls, frames int }

func (p *pushes) Push(_ int, fs []*frame.Frame) { p.calls++; p.frames += len(fs) }

func TestFloodOncePerMember(t *testing.T) {
	b := newBed(t, SwitchConfig{})
	b.plainPorts(1)
	p := new(pushes)
	id, err := b.e.AddPort("pushes", p)
	require.NoError(t, err)
	_, err = b.sw.AddPort(SwitchPort{Port: id})
	require.NoError(t, err)
	many := make([][]byte, frame.BatchSize)
	for i := range many {
		many[i] = eth(frame.Broadcast, mac(i), 0)
	}
	b.send(0, many...)
	assert.Equal(t, pushes{1, frame.BatchSize}, *p)
}

// TestFloodRemovedPort: a member whose port is gone from the engine is passed
// over.
func TestFloodRemovedPort(t *testing.T) {
	b := newBed(t, SwitchConfig{})
	b.plainPorts(3)
	b.e.RemovePort(b.ids[1])
	b.send(0, eth(frame.Broadcast, mac(0), 0))
	assert.Equal(t, []int{0, 0, 1}, b.receivers())
}

func TestSwitchAlone(t *testing.T) {
	b := newBed(t, SwitchConfig{})
	b.plainPorts(1)
	b.port(SwitchPort{Access: 10})
	b.send(0, eth(frame.Broadcast, mac(0), 0))
	assert.Equal(t, frame.NoRoute, b.reason(0), "nobody else in this VLAN")
	b.send(0, eth(frame.Broadcast, mac(0), 10))
	assert.Equal(t, []int{0, 1}, b.receivers())
}

func TestSwitchClose(t *testing.T) {
	b := newBed(t, SwitchConfig{})
	b.plainPorts(2)
	b.sw.Close()
	b.sw.Close()
	b.send(0, eth(frame.Broadcast, mac(0), 0))
	assert.Equal(t, []int{0, 0}, b.receivers())
	_, err := b.sw.AddPort(SwitchPort{Port: b.ids[0]})
	assert.Error(t, err)
}
