package fuzz

import (
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
	"sidewire/nat"
	"sidewire/vhostuser/vhosttest"
)

// program reads the operations of a target from its bytes.
type program struct{ b []byte }

func (p *program) take(n int) []byte {
	out := make([]byte, n)
	p.b = p.b[copy(out, p.b):]
	return out
}

func (p *program) u8() int     { return int(p.take(1)[0]) }
func (p *program) u16() uint16 { return binary.LittleEndian.Uint16(p.take(2)) }
func (p *program) u32() uint32 { return binary.LittleEndian.Uint32(p.take(4)) }

// Operations of FuzzRings.
const (
	opDesc  = iota // ring, index, where, length, flags, next
	opAvail        // ring, slot, head
	opIndex        // ring, avail index
	opFlags        // ring, avail flags
	opEvent        // ring, used event
	opWrite        // where, 16 bytes
	opPush         // the outside sends a frame
	numOps
)

// address makes guest addresses of which most lie in memory: the top byte
// chooses a place far away.
func address(g *vhosttest.Guest, v uint32) uint64 {
	switch v >> 24 {
	case 0xff:
		return ^uint64(0) - uint64(v&0xffff)
	case 0xfe:
		return uint64(v & 0xffffff)
	}
	return g.Mem.GPA + uint64(v&0xffffff)%uint64(len(g.Mem.Bytes)+64)
}

func desc(ring, i byte, at, n uint32, flags, next uint16) []byte {
	b := []byte{opDesc, ring, i}
	b = binary.LittleEndian.AppendUint32(b, at)
	b = binary.LittleEndian.AppendUint32(b, n)
	b = binary.LittleEndian.AppendUint16(b, flags)
	return binary.LittleEndian.AppendUint16(b, next)
}

func u16s(op, ring byte, vs ...uint16) []byte {
	b := []byte{op, ring}
	for _, v := range vs {
		b = binary.LittleEndian.AppendUint16(b, v)
	}
	return b
}

func join(parts ...[]byte) (out []byte) {
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

// FuzzRings lets a hostile guest write whatever it likes into its rings and
// memory while the worker polls them.
func FuzzRings(f *testing.F) {
	const tx, rx = 1, 0
	post := join(u16s(opAvail, tx, 0, 0), u16s(opIndex, tx, 1))
	f.Add(join(desc(tx, 0, 0x1000, 100, 0, 0), post))
	f.Add(u16s(opIndex, tx, 5000))                                                                                // H049
	f.Add(join(u16s(opAvail, tx, 0, 999), u16s(opIndex, tx, 1)))                                                  // H050
	f.Add(join(desc(tx, 0, 0x1000, 100, vhosttest.DescNext, 0), post))                                            // H051
	f.Add(join(desc(tx, 0, 0x1000, 100, vhosttest.DescNext, 999), post))                                          // H052
	f.Add(join(desc(tx, 0, 0xff000000, 100, 0, 0), post))                                                         // H054
	f.Add(join(desc(tx, 0, 0x1000, 0, 0, 0), post))                                                               // H055
	f.Add(join(desc(tx, 0, 0x1000, 1<<32-1, 0, 0), post))                                                         // H056
	f.Add(join(desc(tx, 0, 0x1000, 100, vhosttest.DescWrite, 0), post))                                           // H057
	f.Add(join(desc(tx, 0, 0x1000, 24, vhosttest.DescIndirect, 0), post))                                         // H058
	f.Add(join(desc(rx, 0, 0x1000, 1, vhosttest.DescWrite, 0), u16s(opIndex, rx, 16), []byte{opPush}))            // H063
	f.Add(join(desc(rx, 0, 0xff000000, 2048, 0, 0), u16s(opIndex, rx, 40000), []byte{opPush}))                    // H049, H063
	f.Add(join(u16s(opFlags, tx, 1), u16s(opEvent, rx, 0x8000), []byte{opPush}))                                  // H064
	f.Add(join(append([]byte{opWrite, 0, 0x10, 0, 0}, make([]byte, 16)...), desc(tx, 0, 0x1000, 13, 0, 0), post)) // H055

	fuzzRings(f, false, (*door).step)
}

// fuzzRings plays steps on an attacker's rings.
func fuzzRings(f *testing.F, packed bool, step func(*door, *vhosttest.Guest, *program)) {
	d := open(f)
	g := d.attacker(f, packed)
	f.Cleanup(func() { g.Close() })
	f.Fuzz(func(t *testing.T, b []byte) {
		p := &program{b}
		for i := 0; i < 200 && len(p.b) > 0; i++ {
			step(d, g, p)
		}
		for _, r := range []*vhosttest.Ring{g.Rx(0), g.Tx(0)} {
			kick(r)
		}
		d.unharmed(t)
		if packed {
			must(t, g.HardReset()) // its driver has lost track
		} else {
			must(t, g.Reset())
		}
		d.works(t, g)
	})
}

// Operations of FuzzPackedRings.
const (
	opSlot       = iota // ring, index, where, length, id, flags
	opDriverWord        // ring, event word
	opFill              // where, 16 bytes
	opArrive            // the outside sends a frame
	numPackedOps
)

// FuzzPackedRings is FuzzRings with packed rings.
func FuzzPackedRings(f *testing.F) {
	const (
		tx, rx = 1, 0
		mine   = 1 << 7 // available in the first lap
		next   = mine | vhosttest.DescNext
	)
	event := func(ring byte, w uint32) []byte {
		return binary.LittleEndian.AppendUint32([]byte{opDriverWord, ring}, w)
	}
	arrive := []byte{opArrive}
	f.Add(desc(tx, 0, 0x1000, 100, 3, mine))
	f.Add(desc(tx, 0, 0x1000, 100, 15, mine))                                                                    // H068 id is the size
	f.Add(desc(tx, 0, 0x1000, 100, 3, next))                                                                     // H068 no chain behind it
	f.Add(join(desc(tx, 1, 0x1000, 100, 3, next), desc(tx, 2, 0x1000, 9, 3, 1<<15), desc(tx, 0, 1, 9, 0, next))) // H068 the other lap
	f.Add(join(desc(tx, 1, 0xff000000, 100, 2, mine), desc(tx, 0, 0x1000, 100, 1, next)))                        // H054
	f.Add(desc(tx, 0, 0x1000, 1<<32-1, 0, mine))                                                                 // H056
	f.Add(desc(tx, 0, 0x1000, 100, 0, mine|vhosttest.DescWrite))                                                 // H057
	f.Add(desc(tx, 0, 0x1000, 24, 0, mine|vhosttest.DescIndirect))                                               // H058
	f.Add(join(desc(rx, 0, 0x1000, 1, 7, 1<<15|vhosttest.DescWrite), arrive))                                    // H068 lent twice
	f.Add(join(desc(rx, 0, 0xff000000, 2048, 7, mine), arrive))                                                  // H057, H063
	f.Add(join(event(rx, 0xffffffff), event(tx, 2<<16|0x7fff), arrive, desc(tx, 0, 0x1000, 100, 3, mine)))       // H068 events
	all := []byte{}
	for i := range byte(15) {
		all = append(all, desc(tx, 14-i, 0x1000, 100, 0, next)...)
	}
	f.Add(all) // H068 chain without end
	fuzzRings(f, true, (*door).stepPacked)
}

func (d *door) stepPacked(g *vhosttest.Guest, p *program) {
	op := p.u8() % numPackedOps
	switch op {
	case opArrive:
		d.arrive()
		return
	case opFill:
		at := p.u32() % uint32(len(g.Mem.Bytes)-16)
		copy(g.Mem.Bytes[at:], p.take(16))
		return
	}
	r := g.Rx(0)
	if p.u8()&1 == 1 {
		r = g.Tx(0)
	}
	switch op {
	case opSlot:
		i, at, n, id, flags := p.u8(), address(g, p.u32()), p.u32(), p.u16(), p.u16()
		r.RawSlot(i%r.Size, at, n, id, flags)
		kick(r)
	case opDriverWord:
		r.RawEvent(p.u32())
	}
}

// arrive lets the outside send a frame to the attacker.
func (d *door) arrive() {
	d.incoming.Feed(enginetest.UDPFrame(enginetest.Eth{Dst: guestMAC, Src: hostMAC},
		enginetest.IP{Src: outside, Dst: podIP}, enginetest.UDP{Src: 53, Dst: 80}, make([]byte, 1000)))
}

func (d *door) step(g *vhosttest.Guest, p *program) {
	op := p.u8() % numOps
	if op == opPush {
		d.arrive()
		return
	}
	if op == opWrite {
		at := p.u32() % uint32(len(g.Mem.Bytes)-16)
		copy(g.Mem.Bytes[at:], p.take(16))
		return
	}
	r := g.Rx(0)
	if p.u8()&1 == 1 {
		r = g.Tx(0)
	}
	switch op {
	case opDesc:
		r.RawDesc(p.u8()%r.Size, address(g, p.u32()), p.u32(), p.u16(), p.u16())
	case opAvail:
		r.RawAvail(int(p.u16()), p.u16())
	case opIndex:
		r.RawAvailIdx(p.u16())
		kick(r)
	case opFlags:
		r.RawAvailFlags(p.u16())
	case opEvent:
		r.RawUsedEvent(p.u16())
	}
}

// FuzzFrames lets a guest send any frame with any offload through DHCP and
// NAT, and the outside answer with any other.
func FuzzFrames(f *testing.F) {
	hdr := func(flags, gso byte, vs ...uint16) []byte {
		b := []byte{flags, gso}
		for i := range 4 {
			v := uint16(0)
			if i < len(vs) {
				v = vs[i]
			}
			b = binary.LittleEndian.AppendUint16(b, v)
		}
		return b
	}
	tcp := enginetest.TCPFrame(enginetest.Eth{Dst: nat.GatewayMAC, Src: guestMAC}, enginetest.IP{Src: guestIP, Dst: outside},
		enginetest.TCP{Src: 5000, Dst: 80, Flags: 2}, make([]byte, 3000))
	f.Add(join(hdr(0, 0), datagram(1)), true)
	f.Add(join(hdr(1, 1, 54, 1448, 34, 16), tcp), true)
	f.Add(join(hdr(1, 0, 0, 0, 0xffff, 0xffff), tcp), true) // H070
	f.Add(join(hdr(1, 0x7f, 54, 1448, 34, 16), tcp), true)  // H071
	f.Add(join(hdr(1, 1, 54, 0, 34, 16), tcp), true)        // H072
	f.Add(join(hdr(0, 0), datagram(1)[:20]), true)          // H078
	f.Add(join(hdr(0, 0), tcp), false)
	f.Add(join(hdr(1, 3, 54, 8, 34, 6), datagram(1)), false) // H071
	d := open(f)
	g := d.attacker(f, false)
	f.Cleanup(func() { g.Close() })
	f.Fuzz(func(t *testing.T, b []byte, fromGuest bool) {
		p := &program{b}
		var o frame.Offload
		o.Decode(p.take(frame.VnetHdrLen))
		if len(p.b) == 0 || len(p.b) > 60000 {
			return
		}
		if fromGuest {
			must(t, g.Send(0, p.b, o))
		} else {
			d.incoming.FeedPacket(enginetest.Packet{Bytes: p.b, Offload: o})
		}
		d.unharmed(t)
		d.works(t, g)
	})
}

// FuzzSocket gives the attacked device's socket any bytes, as a frontend that
// has begun in order and then goes mad.
func FuzzSocket(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{5, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff})                         // H001
	f.Add([]byte{8, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 1, 0, 0}) // H039
	f.Add([]byte{11, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{34, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{1, 0, 0})                            // H004
	f.Add([]byte{1, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0}) // H007
	d := open(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		g := d.attacker(t, false)
		_ = g.SendBytes(b) // the backend may have had enough
		d.unharmed(t)
		_ = g.Close()            // or has closed already
		g = d.attacker(t, false) // the listener is ready for the next one
		d.works(t, g)
		must(t, g.Close())
	})
}

// kick tells the device to look.
func kick(r *vhosttest.Ring) {
	_, _ = unix.Write(r.Kick, []byte{1, 0, 0, 0, 0, 0, 0, 0}) // a full counter is a kick too
}
