package engine

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"
	"time"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// model is a switch in the plainest words: what a frame becomes at each port.
type model struct {
	ports []SwitchPort
	gone  []bool
	known map[modelKey]modelPlace
	now   int64
}

type modelKey struct {
	mac  frame.MAC
	vlan int
}

type modelPlace struct {
	port int
	seen int64 // second
	own  bool
}

const modelAge = 5

func isPlain(c SwitchPort) bool { return c.Access == 0 && c.Trunk == nil }

func (m *model) member(port, vlan int) bool {
	c := m.ports[port]
	return isPlain(c) || c.Access != 0 && vlan == int(c.Access) || slices.Contains(c.Trunk, uint16(vlan))
}

// vlan is that of a frame from a port, or -1.
func (m *model) vlan(port int, b []byte) int {
	c := m.ports[port]
	if typ := binary.BigEndian.Uint16(b[12:]); typ == 0x8100 || typ == 0x88a8 {
		if len(b) < 18 {
			return -1
		}
		if id := int(binary.BigEndian.Uint16(b[14:]) & 0xfff); id != 0 {
			if isPlain(c) || slices.Contains(c.Trunk, uint16(id)) {
				return id
			}
			return -1
		}
	}
	if m.member(port, int(c.Access)) {
		return int(c.Access)
	}
	return -1
}

// leave is the frame as it leaves a port, nil if it cannot.
func (m *model) leave(port, vlan int, b []byte) []byte {
	c := m.ports[port]
	typ := binary.BigEndian.Uint16(b[12:])
	tagged := typ == 0x8100 || typ == 0x88a8
	switch {
	case vlan == int(c.Access) && tagged && isPlain(c):
		return b
	case vlan == int(c.Access) && tagged:
		inner := binary.BigEndian.Uint16(b[16:])
		if len(c.Trunk) > 0 && (inner == 0x8100 || inner == 0x88a8) {
			return nil
		}
		return slices.Concat(b[:12], b[16:])
	case vlan == int(c.Access):
		return b
	case !tagged:
		return slices.Concat(b[:12], []byte{0x81, 0, byte(vlan >> 8), byte(vlan)}, b[12:])
	}
	tci := binary.BigEndian.Uint16(b[14:])
	return slices.Concat(b[:14], binary.BigEndian.AppendUint16(nil, tci&0xf000|uint16(vlan)), b[16:])
}

// send says what each port gets of a frame.
func (m *model) send(in int, b []byte) [][]byte {
	out := make([][]byte, len(m.ports))
	if m.gone[in] || len(b) < 14 {
		return out
	}
	dst, src := frame.MAC(b[:6]), frame.MAC(b[6:12])
	c, vlan, sec := m.ports[in], m.vlan(in, b), m.now/1e9
	if vlan < 0 || src[0]&1 != 0 || src == (frame.MAC{}) || c.SpoofCheck && src != c.MAC {
		return out
	}
	from := modelKey{src, vlan}
	pinned := false
	for p, o := range m.ports {
		pinned = pinned || !m.gone[p] && p != in && o.SpoofCheck && o.MAC == src && m.member(p, vlan)
	}
	if !pinned && !m.known[from].own {
		m.known[from] = modelPlace{in, sec, false}
	}
	if at, ok := m.known[modelKey{dst, vlan}]; ok && (at.own || sec-at.seen <= modelAge) {
		if at.port != in {
			out[at.port] = m.leave(at.port, vlan, b)
		}
		return out
	}
	if [5]byte(dst[:5]) == [5]byte{1, 0x80, 0xc2, 0, 0} && dst[5] < 16 {
		return out
	}
	for p := range m.ports {
		if p != in && !m.gone[p] && m.member(p, vlan) {
			out[p] = m.leave(p, vlan, b)
		}
	}
	return out
}

func (m *model) remove(port int) {
	m.gone[port] = true
	for k, at := range m.known {
		if at.port == port {
			delete(m.known, k)
		}
	}
}

var fuzzPorts = []SwitchPort{
	{}, {Access: 10}, {Access: 20}, {Trunk: []uint16{10, 20}}, {Access: 10, Trunk: []uint16{20}}, {Trunk: []uint16{0, 10}},
	{Access: 10, MAC: mac(1), SpoofCheck: true}, {MAC: mac(2), SpoofCheck: true}, {Uplink: true}, {Trunk: []uint16{30}, Queues: 4},
}

var fuzzMACs = []frame.MAC{
	mac(1), mac(2), mac(3), mac(4), {}, frame.Broadcast, {1, 0, 0x5e, 0, 0, 1}, {1, 0x80, 0xc2, 0, 0, 3},
}

// FuzzSwitch plays frames from and to everywhere, the passing of time, and
// ports that go: each port gets exactly what the model says. Each five bytes
// are one step: what to do or the port, the addresses, two tags, the length.
func FuzzSwitch(f *testing.F) {
	f.Add([]byte{0, 1, 2, 3}, []byte("\x00\x01\x00\x00\x40\x01\x10\x00\x00\x40\x00\x01\x00\x00\x40"))
	f.Add([]byte{6, 1, 8}, []byte("\x00\x50\x00\x00\x40\x01\x52\x00\x00\x40\x02\x15\x01\x00\x40\xf0\x06\x00\x00\x00\x02\x50\x01\x00\x40")) // H079
	f.Add([]byte{0, 4, 3}, []byte("\x00\x50\x12\x02\x40\x02\x50\x12\x02\xff\x01\x50\x00\x00\x7d"))                                         // hopping by two tags
	f.Add([]byte{0, 1, 5}, []byte("\x00\x50\x30\x00\x0d\x00\x50\x30\x00\x11\x00\x50\x30\x00\x12\x00\x50\xf0\x00\x0e"))                     // H078
	f.Add([]byte{0, 3, 7}, []byte("\x02\x52\x00\x00\x40\x00\x23\x00\x00\x40\xe2\x00\x00\x00\x00\x00\x23\x00\x00\x40"))                     // a port that goes
	f.Add([]byte{0, 0, 0}, []byte("\x00\x50\x00\x00\x40\x01\x50\x00\x00\x40\x02\x01\x00\x00\x40\xf0\x09\x00\x00\x00\x02\x01\x00\x00\x40"))
	f.Fuzz(func(t *testing.T, kinds, steps []byte) {
		if len(kinds) > 6 || len(steps) > 5*200 {
			return
		}
		b := newBed(t, SwitchConfig{Age: modelAge * time.Second})
		m := &model{known: map[modelKey]modelPlace{}}
		for _, k := range kinds {
			c := fuzzPorts[int(k)%len(fuzzPorts)]
			if !b.tryPort(c) {
				continue // its address is another's
			}
			if c.SpoofCheck {
				m.known[modelKey{c.MAC, int(c.Access)}] = modelPlace{len(m.ports), 0, true}
			}
			m.ports, m.gone = append(m.ports, c), append(m.gone, false)
		}
		if len(m.ports) == 0 {
			return
		}
		for ; len(steps) >= 5; steps = steps[5:] {
			play(t, b, m, [5]byte(steps))
		}
		checkFDB(t, b.sw.fdb)
	})
}

// tryPort adds a port unless the switch refuses.
func (b *bed) tryPort(c SwitchPort) bool {
	p := new(enginetest.MemPort)
	id, err := b.e.AddPort("mem", p)
	if err != nil {
		b.t.Fatal(err)
	}
	c.Port = id
	st, err := b.sw.AddPort(c)
	if err != nil {
		return false
	}
	b.e.SetStages(id, st)
	b.ports, b.ids, b.stages = append(b.ports, p), append(b.ids, id), append(b.stages, st)
	return true
}

// play does one step of a fuzzed scene.
func play(t *testing.T, b *bed, m *model, s [5]byte) {
	switch {
	case s[0] >= 0xf0:
		m.now += int64(s[1]) * int64(time.Second) / 4
		b.batch.Now = m.now
		if s[0]&1 != 0 {
			b.sw.fdb.sweep(second(m.now))
		}
		return
	case s[0] >= 0xe0:
		p := int(s[0]&15) % len(m.ports)
		m.remove(p)
		b.sw.RemovePort(b.ids[p])
		return
	}
	in := int(s[0]) % len(m.ports)
	data := eth(fuzzMACs[s[1]>>4&7], fuzzMACs[s[1]&7], 0)
	vlans := []uint16{0, 10, 20, 30, 4095, 0xe000 | 10, 0x6000}
	types := []uint16{typeVLAN, typeQinQ}
	for _, tci := range []byte{s[3], s[2]} { // the inner one first
		if tci != 0 {
			data = tag(data, types[tci>>7], vlans[int(tci)%len(vlans)])
		}
	}
	if n := int(s[4]); n < len(data) {
		data = data[:n]
	} else {
		data = append(data, make([]byte, n-len(data))...)
	}
	snapshot := []int{18, frame.HeadSize}[s[0]>>6&1]
	b.batch.Reset(m.now)
	setSnapshot(b.batch, data, snapshot, b.ids[in])
	b.stages[in].Process(b.batch)
	b.deliver(in)
	want, got := m.send(in, data), b.got()
	for p := range want {
		switch {
		case want[p] == nil && len(got[p]) == 0:
		case len(got[p]) == 1 && want[p] != nil && bytes.Equal(want[p], got[p][0]):
		default:
			t.Fatalf("port %d (%+v) sends\n%x\nand port %d (%+v) gets\n%x\nwant\n%x",
				in, m.ports[in], data, p, m.ports[p], got[p], want[p])
		}
	}
}
