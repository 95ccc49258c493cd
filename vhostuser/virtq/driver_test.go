package virtq

import (
	"encoding/binary"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/require"

	"sidewire/vhostuser/guestmem"
)

// Where the driver's memory lies: rings, then buffers behind them in two
// regions that touch, and one region apart.
const (
	ringGPA = 0x10000
	bufA    = 0x8000000
	bufB    = bufA + bufSize
	bufFar  = 0x10000000
	bufSize = 0x2000
	redZone = 64
)

// elem is what the device returned.
type elem struct{ id, len uint32 }

// driver is the guest's side of a ring, in memory on the Go heap. Tests speak to
// it as to the driver of a split ring; see packedDriver for the other.
type driver struct {
	mem     *guestmem.Memory
	cfg     Config
	zones   [][]byte // bytes beside the regions, that nobody may touch
	availIx uint16
	usedIx  uint16
	packed  *packedDriver // nil for a split ring
}

// both runs a test over both layouts of a ring.
func both(t *testing.T, f func(t *testing.T, packed bool)) {
	t.Run("split", func(t *testing.T) { f(t, false) })
	t.Run("packed", func(t *testing.T) { f(t, true) })
}

// layout makes a configuration one of a packed ring, if packed, which begins
// where a split ring's Base would be in it.
func layout(packed bool, c Config) Config {
	if c.Packed = packed; packed {
		c.Base = place(c.Base, c.Size)
	}
	return c
}

// index is what Base returns at the index of an entry.
func index(packed bool, i, size uint16) uint16 {
	if packed {
		return place(i, size)
	}
	return i
}

// place turns the index of an entry into a place in a packed ring.
func place(i, size uint16) uint16 { return i%size | (1^i/size&1)<<15 }

// heapRegion makes a region with red zones around it.
func (d *driver) heapRegion(gpa uint64, size int) *guestmem.Region {
	// As words, since the rings need the alignment.
	b := unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(make([]uint64, size/8+2*redZone/8+1)))), size+2*redZone)
	for i := range b {
		b[i] = 0xa5
	}
	clear(b[redZone : redZone+size])
	d.zones = append(d.zones, b[:redZone], b[redZone+size:])
	return guestmem.FromHeap(gpa, b[redZone:redZone+size:redZone+size])
}

// newDriver makes memory and a ring layout for a queue of c.Size.
func newDriver(t testing.TB, c Config) *driver {
	t.Helper()
	size := uint64(c.Size)
	c.Desc = ringGPA
	c.Avail = c.Desc + 16*size
	c.Used = (c.Avail + 6 + 2*size + 3) &^ 3
	end := (c.Used + 6 + 8*size + 7) &^ 7
	if c.Packed {
		c.Used = c.Avail + 4
		end = c.Used + 4
	}
	d := &driver{cfg: c, availIx: c.Base, usedIx: c.Base}
	m, err := guestmem.New(
		d.heapRegion(ringGPA, int(end-ringGPA)),
		d.heapRegion(bufA, bufSize), d.heapRegion(bufB, bufSize), d.heapRegion(bufFar, bufSize))
	require.NoError(t, err)
	d.mem = m
	if c.Packed {
		d.packed = newPackedDriver(c)
		d.availIx = c.Base&0x7fff + (1^c.Base>>15)*c.Size // the split ring's
		d.usedIx = d.availIx
		d.eraseRing()
		return d
	}
	d.storeAvail()
	atomic.StoreUint32(d.word(c.Used), uint32(c.Base)<<16)
	return d
}

// newQueue makes a driver and the device's side of its ring.
func newQueue(t testing.TB, c Config) (*driver, *Queue) {
	t.Helper()
	d := newDriver(t, c)
	q, err := New(d.mem, d.cfg)
	require.NoError(t, err)
	return d, q
}

func (d *driver) at(gpa, n uint64) []byte {
	b, ok := d.mem.Slice(gpa, n)
	if !ok {
		panic("driver: address outside its memory")
	}
	return b
}

func (d *driver) word(gpa uint64) *uint32 {
	return (*uint32)(unsafe.Pointer(&d.at(gpa, 4)[0]))
}

// desc writes entry i of the descriptor table.
func (d *driver) desc(i int, v desc) {
	if d.packed != nil {
		d.packed.table[i] = v
		return
	}
	d.descAt(d.cfg.Desc+16*uint64(i), v)
}

// descAt writes a descriptor anywhere, byte by byte, since an indirect table
// may cross regions.
func (d *driver) descAt(gpa uint64, v desc) {
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:], v.addr)
	binary.LittleEndian.PutUint32(b[8:], v.len)
	binary.LittleEndian.PutUint16(b[12:], v.flags)
	binary.LittleEndian.PutUint16(b[14:], v.next)
	for i, x := range b {
		d.at(gpa+uint64(i), 1)[0] = x
	}
}

// entry writes an entry of an indirect table, which in packed rings has the
// flags in another place and no next.
func (d *driver) entry(gpa uint64, v desc) {
	if d.packed != nil {
		v.flags, v.next = 0, v.flags
	}
	d.descAt(gpa, v)
}

// chain writes a chain into descriptors first, first+1, ...
func (d *driver) chain(first int, ds ...desc) {
	for i, v := range ds {
		if i < len(ds)-1 {
			v.flags |= flagNext
			v.next = uint16(first + i + 1)
		}
		d.desc(first+i, v)
	}
}

// stage puts a head into the available ring without showing it.
func (d *driver) stage(head uint16) {
	if d.packed != nil {
		d.stagePacked(head, d.follow(head)...)
		return
	}
	slot := uint64(d.availIx) % uint64(d.cfg.Size)
	binary.LittleEndian.PutUint16(d.at(d.cfg.Avail+4+2*slot, 2), head)
	d.availIx++
}

func (d *driver) storeAvail() {
	if d.packed != nil {
		d.storePacked()
		return
	}
	w := d.word(d.cfg.Avail)
	atomic.StoreUint32(w, uint32(d.availIx)<<16|atomic.LoadUint32(w)&0xffff)
}

// offer makes heads available.
func (d *driver) offer(heads ...uint16) {
	for _, h := range heads {
		d.stage(h)
	}
	d.storeAvail()
}

// usedIndex and usedFlags load the used ring's header. What the driver has
// taken is all that it knows of a packed ring.
func (d *driver) usedIndex() uint16 {
	if d.packed != nil {
		return d.usedIx
	}
	return uint16(atomic.LoadUint32(d.word(d.cfg.Used)) >> 16)
}
func (d *driver) usedFlags() uint16 { return uint16(atomic.LoadUint32(d.word(d.cfg.Used))) }

// take returns the elements that came back since the last call.
func (d *driver) take() (got []elem) {
	if d.packed != nil {
		return d.takePacked()
	}
	for idx := d.usedIndex(); d.usedIx != idx; d.usedIx++ {
		slot := uint64(d.usedIx) % uint64(d.cfg.Size)
		b := d.at(d.cfg.Used+4+8*slot, 8)
		got = append(got, elem{binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])})
	}
	return got
}

// setUsedEvent asks for an interrupt after the element of that index. On a
// packed ring chains must be of one descriptor for that.
func (d *driver) setUsedEvent(idx uint16) {
	if d.packed != nil {
		atomic.StoreUint32(d.word(d.cfg.Avail), uint32(place(idx, d.cfg.Size))|eventDesc)
		return
	}
	gpa := d.cfg.Avail + 4 + 2*uint64(d.cfg.Size)
	w, shift := d.word(gpa&^3), gpa%4*8
	for {
		old := atomic.LoadUint32(w)
		if atomic.CompareAndSwapUint32(w, old, old&^(0xffff<<shift)|uint32(idx)<<shift) {
			return
		}
	}
}

// setFlags sets the available ring's flags, of which a packed ring has the same
// that counts.
func (d *driver) setFlags(flags uint16) {
	if d.packed != nil {
		atomic.StoreUint32(d.word(d.cfg.Avail), uint32(flags)<<16)
		return
	}
	atomic.StoreUint32(d.word(d.cfg.Avail), uint32(d.availIx)<<16|uint32(flags))
}

// availEvent reads what the device asked for. As on the device's side, the
// race detector is kept out of the one field that no word holds.
func (d *driver) availEvent() uint16 {
	return loadEvent(d.at(d.cfg.Used+4+8*uint64(d.cfg.Size), 2))
}

//go:norace
//go:noinline
func loadEvent(b []byte) uint16 { return uint16(b[0]) | uint16(b[1])<<8 }

// checkZones fails if a byte beside the regions was touched.
func (d *driver) checkZones(t testing.TB) {
	t.Helper()
	for _, z := range d.zones {
		for _, b := range z {
			if b != 0xa5 {
				t.Fatal("a byte beside guest memory was written")
			}
		}
	}
}

// room is enough for every chain.
func room() [][]byte { return make([][]byte, 0, MaxSegs) }

// span is a range of guest memory.
type span struct {
	gpa uint64
	n   int
}

// spans tells where slices lie.
func (d *driver) spans(t testing.TB, segs [][]byte) (got []span) {
	t.Helper()
	for _, s := range segs {
		p := uintptr(unsafe.Pointer(unsafe.SliceData(s)))
		found := false
		for _, r := range d.mem.Regions() {
			all, _ := r.Slice(r.Spec().GPA, r.Spec().Size)
			base := uintptr(unsafe.Pointer(&all[0]))
			if p >= base && p+uintptr(len(s)) <= base+uintptr(len(all)) && len(s) == cap(s) {
				got = append(got, span{r.Spec().GPA + uint64(p-base), len(s)})
				found = true
			}
		}
		if !found {
			t.Fatalf("slice of %d at %#x is not in guest memory", len(s), p)
		}
	}
	return got
}

// setLog switches marking of writes on in a queue that is in use, or off with
// nil. usedLog is as in Config.
func setLog(q *Queue, l *guestmem.Log, usedLog uint64) {
	if usedLog == 0 {
		usedLog = q.cfg.Used
	}
	q.cfg.Log, q.cfg.UsedLog = l, usedLog
	q.lent = q.lent[:0]
}
