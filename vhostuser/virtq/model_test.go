package virtq

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"sidewire/vhostuser/guestmem"
)

// reference follows a chain as plainly as the specification tells it: first
// all descriptors, then every rule, byte by byte. It returns false for a chain
// that breaks one.
func (d *driver) reference(c offered, dir Direction) ([]span, bool) {
	var list []desc
	var ok bool
	if d.packed != nil {
		list, ok = d.followPacked(c, dir)
	} else {
		list, ok = d.followSplit(c)
	}
	if !ok || len(list) > min(int(d.cfg.Size), 1024) {
		return nil, false
	}

	var got []span
	total := uint64(0)
	for _, v := range list {
		if v.flags&2 != uint16(dir) {
			return nil, false
		}
		total += uint64(v.len)
	}
	if total == 0 || total > 1<<20 {
		return nil, false
	}
	for _, v := range list {
		start := true
		for off := range uint64(v.len) {
			gpa := v.addr + off
			if gpa < v.addr || !d.mapped(gpa) {
				return nil, false
			}
			if start || d.starts(gpa) {
				got = append(got, span{gpa, 0})
				start = false
			}
			got[len(got)-1].n++
		}
	}
	return got, len(got) <= 1024
}

// tableFits says whether an indirect table is one, and lies in memory.
func (d *driver) tableFits(v desc) bool {
	if !d.cfg.Indirect || v.flags&1 != 0 || v.len == 0 || v.len%16 != 0 || v.len/16 > min(uint32(d.cfg.Size), 1024) {
		return false
	}
	for off := range uint64(v.len) {
		if !d.mapped(v.addr + off) {
			return false
		}
	}
	return true
}

// followPacked lists the descriptors of a chain in a packed ring, whose tables
// are gone through from front to back and say only of what is received that it
// is not to be read.
func (d *driver) followPacked(c offered, dir Direction) (list []desc, ok bool) {
	for _, v := range c.list {
		if v.flags&4 == 0 {
			list = append(list, v)
			continue
		}
		if !d.tableFits(v) {
			return nil, false
		}
		for i := range uint64(v.len / 16) {
			e, _ := d.readDesc(v.addr + 16*i)
			list = append(list, desc{e.addr, e.len, e.next & 2 & uint16(dir), 0})
		}
	}
	return list, c.head < d.cfg.Size
}

// followSplit lists the descriptors of a chain in a split ring.
func (d *driver) followSplit(c offered) (list []desc, ok bool) {
	limit, head := min(int(d.cfg.Size), 1024), c.head
	i, table, entries, nested := head, d.cfg.Desc, uint32(d.cfg.Size), false
	for {
		if uint32(i) >= entries {
			return nil, false
		}
		v, ok := d.readDesc(table + 16*uint64(i))
		if !ok {
			return nil, false
		}
		if v.flags&4 != 0 {
			if nested || !d.tableFits(v) {
				return nil, false
			}
			i, table, entries, nested = 0, v.addr, v.len/16, true
			continue
		}
		if list = append(list, v); len(list) > limit {
			return nil, false
		}
		if v.flags&1 == 0 {
			return list, true
		}
		i = v.next
	}
}

// mapped and starts look at the regions one by one: is this byte in one, is it
// the first of one.
func (d *driver) mapped(gpa uint64) bool {
	for _, r := range d.mem.Regions() {
		if s := r.Spec(); gpa >= s.GPA && gpa < s.GPA+s.Size {
			return true
		}
	}
	return false
}

func (d *driver) starts(gpa uint64) bool {
	for _, r := range d.mem.Regions() {
		if r.Spec().GPA == gpa {
			return true
		}
	}
	return false
}

// readDesc reads a descriptor byte by byte, as it may cross regions.
func (d *driver) readDesc(gpa uint64) (desc, bool) {
	var b [16]byte
	for i := range b {
		p, ok := d.mem.Slice(gpa+uint64(i), 1)
		if !ok {
			return desc{}, false
		}
		b[i] = p[0]
	}
	return desc{
		binary.LittleEndian.Uint64(b[:]), binary.LittleEndian.Uint32(b[8:]),
		binary.LittleEndian.Uint16(b[12:]), binary.LittleEndian.Uint16(b[14:]),
	}, true
}

// script turns bytes into numbers; when it is used up it yields zeroes.
type script []byte

func (s *script) byte() byte {
	if len(*s) == 0 {
		return 0
	}
	b := (*s)[0]
	*s = (*s)[1:]
	return b
}

func (s *script) u16() uint16 { return uint16(s.byte()) | uint16(s.byte())<<8 }
func (s *script) u64() uint64 {
	return uint64(s.u16()) | uint64(s.u16())<<16 | uint64(s.u16())<<32 | uint64(s.u16())<<48
}

// addr yields an address that is often in memory, often near an edge.
func (s *script) addr() uint64 {
	k := s.byte()
	bases := [...]uint64{bufA, bufB, bufFar, bufB - 8, bufB - 24, bufA - 4, bufFar + bufSize - 16, ringGPA, 0, ^uint64(0) - 15}
	if k&0x0f >= 10 {
		return s.u64()
	}
	return bases[k&0x0f] + uint64(k>>4)*8
}

func (s *script) length() uint32 {
	k := s.byte()
	lens := [...]uint32{0, 1, 12, 16, 32, 64, 100, 160, bufSize, bufSize + 1, 65536, 1 << 20, 0xffffffff, 0x80000000}
	if k&0x0f < byte(len(lens)) {
		return lens[k&0x0f]
	}
	return uint32(s.u16())
}

func (s *script) desc(size uint16) desc {
	k := s.byte()
	v := desc{addr: s.addr(), len: s.length(), flags: uint16(k & 7), next: uint16(s.byte()) % size}
	if k&0xf0 == 0xf0 {
		v.flags, v.next = s.u16(), s.u16()
	}
	return v
}

// offered is a chain that the driver made available. list is what it has in a
// packed ring; a split ring's is looked at when it is popped.
type offered struct {
	head uint16
	list []desc
}

// offerable says whether a chain with this head can be offered now, and
// stages it.
func (d *driver) offerable(s *script, head uint16, inFlight int) (c offered, ok bool) {
	c.head = head
	if d.packed == nil {
		if ok = inFlight < int(d.cfg.Size); ok {
			d.stage(head)
		}
		return c, ok
	}
	if d.packed.free == 0 {
		return c, false
	}
	c.list = d.follow(head)
	// Only an end makes it a chain that can be followed.
	c.list[len(c.list)-1].flags &^= flagNext
	if s.byte() == 0x55 {
		c.head += d.cfg.Size // a bad id
	}
	d.stagePacked(c.head, c.list...)
	return c, true
}

// play runs a script of a guest's and the device's doings and compares every
// Pop with the reference.
func play(t testing.TB, data []byte, packed bool) {
	s := script(data)
	k := s.byte()
	size := [...]uint16{1, 2, 16, 256}[k&3]
	if packed && k&0x80 != 0 {
		size = [...]uint16{3, 5, 15, 250}[k&3]
	}
	c := layout(packed, Config{Size: size, EventIdx: k&4 != 0, Indirect: k&8 != 0, Base: []uint16{0, 65530, 65535, 7}[k>>4&3]})
	d, q := newQueue(t, c)
	if k&0x40 != 0 {
		setLog(q, guestmem.HeapLog(64), 0)
	}
	var (
		waiting []offered // and not popped
		lent    []offered // popped and not put
		want    []elem
		segs    = room()
	)
	for steps := 0; len(s) > 0 && steps < 2000; steps++ {
		switch op := s.byte(); op % 12 {
		case 0, 1: // write a descriptor
			d.desc(int(s.u16()%size), s.desc(size))
		case 2: // write a table of a few entries
			gpa := bufA + uint64(s.byte())*8
			if op&0x80 != 0 {
				gpa = bufB - uint64(s.byte()%64)
			}
			for i := range 1 + int(s.byte()%4) {
				d.entry(gpa+16*uint64(i), s.desc(size))
			}
		case 3, 4: // offer chains
			for range 1 + int(s.byte()%4) {
				if c, ok := d.offerable(&s, s.u16()%size, len(waiting)+len(lent)+len(want)); ok {
					waiting = append(waiting, c)
				}
			}
			d.storeAvail()
		case 5, 6, 7: // pop one
			dir := Direction(s.byte() & 2)
			for i, b := range segs[:cap(segs)] {
				if b != nil {
					segs[:cap(segs)][i] = nil
				}
			}
			use := segs
			if op&0x80 != 0 {
				use = segs[: 0 : s.byte()%4]
			}
			var wantSpans []span
			wantOK := false
			if len(waiting) > 0 {
				wantSpans, wantOK = d.reference(waiting[0], dir)
			}
			got, st := q.Pop(dir, use)
			switch {
			case st == NoRoom:
				if len(waiting) == 0 || cap(use) >= MaxSegs || wantOK && len(wantSpans) <= cap(use) {
					t.Fatalf("no room in %d for %d", cap(use), len(wantSpans))
				}
				continue
			case len(waiting) == 0:
				if st != Empty {
					t.Fatalf("%v on an empty ring", st)
				}
				continue
			case wantOK != (st == OK) || st != OK && st != Bad || got.Head != waiting[0].head:
				t.Fatalf("%v (%v), head %d; want ok %v, head %d", st, q.LastCause(), got.Head, wantOK, waiting[0].head)
			}
			lent = append(lent, waiting[0])
			waiting = waiting[1:]
			if st == Bad {
				if len(got.Segs) != 0 {
					t.Fatal("slices of a bad chain")
				}
				continue
			}
			compare(t, d, got, wantSpans)
		case 8: // put some, in order
			for range min(int(s.byte()), len(lent)) {
				n := uint32(s.u16())
				q.Put(lent[0].head, n)
				want = append(want, elem{uint32(lent[0].head), n})
				lent = lent[1:]
			}
		case 9: // publish
			q.Publish()
			if got := d.take(); len(got) != len(want) {
				t.Fatalf("%d used elements, want %d", len(got), len(want))
			} else {
				for i := range got {
					if got[i] != want[i] {
						t.Fatalf("used %v, want %v", got[i], want[i])
					}
				}
			}
			want = nil
			q.NeedsNotify()
			if q.NeedsNotify() {
				t.Fatal("notified twice for the same")
			}
		case 10: // sleep
			if more := q.EnableNotify(); more != (len(waiting) > 0) {
				t.Fatalf("more is %v, %d wait", more, len(waiting))
			}
			q.DisableNotify()
			if n := q.Avail(); n != len(waiting) {
				t.Fatalf("%d available, want %d", n, len(waiting))
			}
		case 11: // take back
			n := min(int(s.byte()%4), len(lent))
			q.Rewind(n)
			for range n {
				last := lent[len(lent)-1]
				lent = lent[:len(lent)-1]
				waiting = append([]offered{last}, waiting...)
			}
		}
	}
	hostileEnd(t, d, q, &s)
	d.checkZones(t)
}

// compare fails unless the chain lies where the reference says.
func compare(t testing.TB, d *driver, got Chain, want []span) {
	spans := d.spans(t, got.Segs)
	sum := 0
	for i := range spans {
		if i >= len(want) || spans[i] != want[i] {
			t.Fatalf("slices %v, want %v", spans, want)
		}
		sum += spans[i].n
	}
	if len(spans) != len(want) || got.Len != sum {
		t.Fatalf("%d slices of %d bytes, want %v", len(spans), got.Len, want)
	}
}

// hostileEnd lets the guest write anything to its rings, and pops what comes:
// never more than the ring holds without looking again.
func hostileEnd(t testing.TB, d *driver, q *Queue, s *script) {
	if len(*s) == 0 {
		return
	}
	size := uint64(d.cfg.Size)
	if d.packed != nil {
		ring := d.at(d.cfg.Desc, 16*size)
		for i := range ring {
			ring[i] = s.byte()
		}
	} else {
		ring := d.at(d.cfg.Avail+4, 2*size)
		for i := range ring {
			ring[i] = s.byte()
		}
		d.availIx = s.u16()
		d.storeAvail()
	}
	for n := 0; ; n++ {
		c, st := q.Pop(Readable, make([][]byte, 0, MaxSegs))
		if st == Empty || st == Broken {
			return
		}
		if n > int(size) {
			t.Fatal("more chains than the ring holds")
		}
		if c.Head >= d.cfg.Size && (d.packed == nil || st == OK) {
			t.Fatal("head outside the ring")
		}
		d.spans(t, c.Segs)
	}
}

func TestModel(t *testing.T) {
	runs := 3000
	if testing.Short() {
		runs = 300
	}
	rng := rand.New(rand.NewPCG(11, 12))
	data := make([]byte, 600)
	for range runs {
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		play(t, data, false)
		play(t, data, true)
	}
}

// FuzzPop plays a script on split rings, FuzzPopPacked on packed ones.
func FuzzPop(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, data []byte) { play(t, data, false) })
}

func FuzzPopPacked(f *testing.F) {
	addSeeds(f)
	ones := bytes.Repeat([]byte{0xff}, 100)
	f.Add(append([]byte{2}, bytes.Repeat([]byte{0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0x81, 0}, 20)...))       // H068 a ring of NEXT
	f.Add(append([]byte{2}, bytes.Repeat([]byte{0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0x77, 0, 0x80, 0}, 20)...))    // H068 ids outside
	f.Add(append([]byte{2}, bytes.Repeat([]byte{0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0x80, 0x80, 5}, 20)...)) // H068 wrap flips
	f.Add([]byte{2, 0, 3, 0, 0, 0, 5, 0, 3, 0, 3, 0, 0x55, 5, 0, 8, 1, 0, 0, 9})                                   // H068 id is 3 + 16
	f.Add(append([]byte{0x80 | 2 | 8}, ones...))
	f.Fuzz(func(t *testing.T, data []byte) { play(t, data, true) })
}

// addSeeds adds the hostile cases.
func addSeeds(f *testing.F) {
	const (
		size16 = 2 | 8 // with indirect descriptors
		pop    = 5
	)
	near := func(base, off byte) byte { return base | off<<4 }
	// d3 writes descriptor 3 with flags, address, length and next.
	d3 := func(flags, addr, length, next byte) []byte { return []byte{0, 3, 0, flags, addr, length, next} }
	tail := []byte{3, 0, 3, 0, pop, 0, 8, 1, 0, 0, 9, 10}
	seed := func(parts ...[]byte) {
		data := []byte{size16}
		for _, p := range parts {
			data = append(data, p...)
		}
		f.Add(append(data, tail...))
	}
	seed(d3(0, near(0, 0), 5, 0))                                                                               // sound
	seed(d3(1, near(0, 0), 1, 3))                                                                               // H051 loop of one
	seed(d3(1, near(0, 0), 0, 3))                                                                               // H051 loop of nothing
	seed([]byte{0, 3, 0, 0xf1, near(0, 0), 1, 0, 1, 0, 16, 0})                                                  // H052
	seed(d3(0, near(8, 0), 1, 0))                                                                               // H054 unmapped
	seed(d3(0, near(9, 0), 5, 0))                                                                               // H054 overflow
	seed(d3(0, near(6, 0), 4, 0))                                                                               // H054 past the end
	seed(d3(0, near(3, 0), 5, 0))                                                                               // H054 adjacent regions
	seed(d3(0, near(0, 0), 0, 0))                                                                               // H055
	seed(d3(0, near(0, 0), 12, 0))                                                                              // H056
	seed(d3(2, near(0, 0), 5, 0))                                                                               // H057
	seed([]byte{2, 8, 0, 0, near(2, 0), 5, 0}, d3(4, near(0, 8), 3, 0))                                         // H058 indirect
	seed([]byte{2, 8, 0, 4, near(0, 8), 3, 0}, d3(4, near(0, 8), 3, 0))                                         // H058 table in table
	seed(d3(4, near(0, 0), 1, 0))                                                                               // H058 odd size
	seed(d3(4, near(0, 0), 0, 0))                                                                               // H058 size 0
	seed(d3(4, near(8, 0), 3, 0))                                                                               // H058 unmapped
	seed([]byte{0x82, 0, 8, 1, near(2, 0), 5, 1}, d3(4, near(3, 0), 4, 0))                                      // H058 crossing regions
	seed(d3(5, near(0, 0), 3, 0))                                                                               // H058 with NEXT
	seed([]byte{0, 3, 0, 0xf0, near(0, 0), 5, 0, 0xf8, 0xff, 0, 0})                                             // H059
	f.Add([]byte{2, 0, 3, 0, 0, near(0, 0), 5, 0, 3, 3, 3, 0, 3, 0, 3, 0, 3, 0, pop, 0, pop, 0, 11, 2, pop, 0}) // H060
	f.Add([]byte{2 | 0x20, 3, 0, 3, 0, 10, 9})                                                                  // H066
	f.Add([]byte{0, 3, 0, 0, 0, pop, 0, 255, 255, 255, 255})                                                    // H049, H050
}
