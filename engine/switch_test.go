package engine

import (
	"bytes"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// bed is a switch with ports in memory, whose worker the test plays.
type bed struct {
	storm  int // of ports that name none
	t      testing.TB
	e      *Engine
	sw     *Switch
	ports  []*enginetest.MemPort
	ids    []frame.PortID
	stages []Stage
	batch  *frame.Batch
}

func newBed(t testing.TB, c SwitchConfig) *bed {
	e, err := New(Config{Workers: 1, Poll: PollNever})
	require.NoError(t, err)
	t.Cleanup(e.Close)
	return &bed{t: t, e: e, storm: -1, sw: e.NewSwitch(c), batch: new(frame.Batch)}
}

// port adds a port and returns its number in the bed.
func (b *bed) port(c SwitchPort) int {
	p := new(enginetest.MemPort)
	id, err := b.e.AddPort("mem", p)
	require.NoError(b.t, err)
	c.Port = id
	if c.Storm == 0 {
		c.Storm = b.storm
	}
	st, err := b.sw.AddPort(c)
	require.NoError(b.t, err)
	b.e.SetStages(id, st)
	b.ports, b.ids, b.stages = append(b.ports, p), append(b.ids, id), append(b.stages, st)
	return len(b.ports) - 1
}

// plainPorts adds n ports without any settings.
func (b *bed) plainPorts(n int) {
	for range n {
		b.port(SwitchPort{})
	}
}

// decide lets the stage of a port judge frames.
func (b *bed) decide(in int, frames ...enginetest.Packet) {
	b.batch.Reset(b.batch.Now)
	for _, p := range frames {
		f := b.batch.Next()
		f.SetBytes(p.Bytes, nil, b.batch.Segs(1))
		f.Offload, f.Queue, f.In = p.Offload, p.Queue, b.ids[in]
	}
	b.stages[in].Process(b.batch)
}

// deliver pushes what was decided, as a worker would.
func (b *bed) deliver(in int) {
	l := b.e.layout.Load()
	w := b.e.workers[0]
	w.push(l, l.views[0], b.batch)
	w.count(l, l.ports[b.ids[in]], b.batch, b.batch.Len())
}

// send takes frames from a port to where they go.
func (b *bed) send(in int, frames ...[]byte) {
	ps := make([]enginetest.Packet, len(frames))
	for i, f := range frames {
		ps[i].Bytes = f
	}
	b.decide(in, ps...)
	b.deliver(in)
}

// reason is why the i-th frame of the last batch was dropped.
func (b *bed) reason(i int) frame.DropReason {
	f := b.batch.Frame(i)
	if f.Out != frame.Drop {
		return frame.ReasonNone
	}
	return f.Reason
}

// got takes what the ports got since the last call, as bytes.
func (b *bed) got() [][][]byte {
	all := make([][][]byte, len(b.ports))
	for i, p := range b.ports {
		for _, pkt := range p.Take() {
			all[i] = append(all[i], pkt.Bytes)
		}
	}
	return all
}

// receivers says which ports got how many frames since the last call.
func (b *bed) receivers() []int {
	var n []int
	for _, g := range b.got() {
		n = append(n, len(g))
	}
	return n
}

// mac is the n-th station's address.
func mac(n int) frame.MAC { return frame.MAC{2, 0, 0, byte(n >> 16), byte(n >> 8), byte(n)} }

// eth is a frame of 60 bytes, or with a tag of 64.
func eth(dst, src frame.MAC, vlan uint16) []byte {
	return enginetest.Eth{Dst: dst, Src: src, VLAN: vlan}.Frame(0x88b5, make([]byte, 46))
}

func TestSwitchLearns(t *testing.T) {
	b := newBed(t, SwitchConfig{Name: "s"})
	b.plainPorts(3)

	b.send(0, eth(mac(1), mac(0), 0))
	assert.Equal(t, []int{0, 1, 1}, b.receivers(), "unknown: to all others")
	b.send(1, eth(mac(0), mac(1), 0))
	assert.Equal(t, []int{1, 0, 0}, b.receivers(), "known: to one")
	b.send(0, eth(mac(1), mac(0), 0), eth(frame.Broadcast, mac(0), 0), eth(mac(1), mac(0), 0))
	assert.Equal(t, []int{0, 3, 1}, b.receivers())
	b.send(0, eth(mac(0), mac(9), 0))
	assert.Equal(t, []int{0, 0, 0}, b.receivers())
	assert.Equal(t, frame.SamePort, b.reason(0))

	b.send(2, eth(frame.Broadcast, mac(1), 0)) // moves
	assert.Equal(t, []int{1, 1, 0}, b.receivers())
	b.send(0, eth(mac(1), mac(0), 0))
	assert.Equal(t, []int{0, 0, 1}, b.receivers())
}

func TestSwitchDrops(t *testing.T) {
	for _, c := range []struct {
		name  string
		frame []byte
		want  frame.DropReason
	}{
		{"runt", eth(mac(1), mac(2), 0)[:13], frame.ShortFrame},
		{"empty", nil, frame.ShortFrame},
		{"header only", eth(mac(1), mac(2), 0)[:14], frame.ReasonNone},
		{"group source", eth(mac(1), frame.MAC{1, 0, 0x5e, 0, 0, 1}, 0), frame.BadSource},
		{"broadcast source", eth(mac(1), frame.Broadcast, 0), frame.BadSource},
		{"zero source", eth(mac(1), frame.MAC{}, 0), frame.BadSource},
		{"all ones", bytes.Repeat([]byte{255}, 60), frame.BadSource},
		{"all zeros", make([]byte, 60), frame.BadSource},
		{"zero destination", eth(frame.MAC{}, mac(1), 0), frame.ReasonNone},
		{"LLDP", eth(frame.MAC{1, 0x80, 0xc2, 0, 0, 0x0e}, mac(1), 0), frame.LinkLocal},
		{"behind the link-local block", eth(frame.MAC{1, 0x80, 0xc2, 0, 0, 0x10}, mac(1), 0), frame.ReasonNone},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBed(t, SwitchConfig{})
			b.plainPorts(2)
			b.send(0, c.frame, c.frame, eth(frame.Broadcast, mac(9), 0), c.frame)
			for _, i := range []int{0, 1, 3} {
				assert.Equal(t, c.want, b.reason(i))
			}
			want := 1
			if c.want == frame.ReasonNone {
				want = 4
			}
			assert.Equal(t, []int{0, want}, b.receivers())
		})
	}
}

func TestSwitchLinkLocalPasses(t *testing.T) {
	b := newBed(t, SwitchConfig{LinkLocal: true})
	b.plainPorts(2)
	b.send(0, eth(frame.MAC{1, 0x80, 0xc2, 0, 0, 0x0e}, mac(1), 0), eth(frame.MAC{1, 0x80, 0xc2, 0, 0, 1}, mac(1), 0))
	assert.Equal(t, []int{0, 1}, b.receivers(), "LLDP passes, PAUSE never")
	assert.Equal(t, frame.LinkLocal, b.reason(1))
}

func TestSwitchAges(t *testing.T) {
	b := newBed(t, SwitchConfig{Age: 10 * time.Second})
	b.plainPorts(3)
	known := func() bool {
		b.send(0, eth(mac(1), mac(0), 0))
		return b.receivers()[2] == 0
	}
	b.send(1, eth(frame.Broadcast, mac(1), 0))
	b.receivers()
	b.batch.Now = int64(10 * time.Second)
	b.sw.fdb.sweep(second(b.batch.Now))
	assert.True(t, known(), "10 seconds are not too long")
	b.batch.Now += int64(time.Second)
	assert.False(t, known(), "11 are, before any sweep")
	b.send(1, eth(frame.Broadcast, mac(1), 0))
	b.receivers()
	assert.True(t, known(), "seen again")
	b.batch.Now += int64(11 * time.Second)
	assert.False(t, b.sw.fdb.sweep(second(b.batch.Now)), "nothing left")
	assert.Zero(t, b.sw.fdb.table.Load().lookup(macKey(mac(1), 0)))
}

func TestSwitchRemovesPort(t *testing.T) {
	b := newBed(t, SwitchConfig{})
	b.plainPorts(3)
	b.send(1, eth(frame.Broadcast, mac(1), 0))
	b.receivers()
	b.sw.RemovePort(b.ids[1])
	b.send(0, eth(mac(1), mac(0), 0))
	assert.Equal(t, []int{0, 0, 1}, b.receivers(), "forgotten at once")
	b.send(1, eth(mac(0), mac(1), 0))
	assert.Equal(t, []int{0, 0, 0}, b.receivers(), "no member any more")
}

// TestSwitchBurst: frames whose addresses differ in one thing from those of
// the frame before are judged by themselves.
func TestSwitchBurst(t *testing.T) {
	b := newBed(t, SwitchConfig{})
	b.port(SwitchPort{MAC: mac(1), SpoofCheck: true})
	b.plainPorts(2)
	b.send(1, eth(frame.Broadcast, mac(11), 0), eth(frame.Broadcast, mac(11), 7))
	b.send(2, eth(frame.Broadcast, mac(12), 0))
	b.receivers()
	good := eth(mac(11), mac(1), 0)
	b.send(0, good, good, eth(mac(11), mac(2), 0), good, eth(mac(12), mac(1), 0), good, good[:13], good,
		eth(mac(11), mac(1), 7), eth(mac(11), mac(1), 8), good)
	assert.Equal(t, []int{0, 8, 2}, b.receivers())
	assert.Equal(t, frame.Spoofed, b.reason(2))
	assert.Equal(t, frame.ShortFrame, b.reason(6))

	// Each of many sources is learned, though all talk to one.
	var many [][]byte
	for i := range 20 {
		many = append(many, eth(mac(11), mac(100+i), 0))
	}
	b.send(2, many...)
	for i := range 20 {
		assert.Equal(t, b.ids[2], b.sw.fdb.table.Load().lookup(macKey(mac(100+i), 0)).port())
	}
}
