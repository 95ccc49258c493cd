// Package guestmem maps the memory that a frontend shares and translates guest
// addresses in it.
//
// A [Region] is one mapping, owned by whoever mapped it; a [Memory] is an
// immutable table of regions that any number of goroutines may read. Replacing
// the table means building a new Memory, swapping it in, waiting until nobody
// uses the old one, and only then unmapping the regions that left.
//
// The frontend can cut its file short at any moment, so every access to a
// slice from here may fault: goroutines that touch guest memory are started by
// frame.Go, and Owns tells whose memory a recovered fault was in.
package guestmem

import (
	"cmp"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"unsafe"
)

// MaxRegions is how many regions a Memory holds at most; it is what QEMU's
// memory slots can use of a vhost-user backend (GET_MAX_MEM_SLOTS).
const MaxRegions = 509

// What is wrong with a frontend's memory. Errors wrap one of these.
var (
	ErrRange   = errors.New("size is zero or address range overflows")
	ErrSize    = errors.New("region is larger than allowed")
	ErrAlign   = errors.New("offset is not page-aligned")
	ErrFile    = errors.New("descriptor is not a file that holds the region")
	ErrOverlap = errors.New("regions overlap")
	ErrRegions = errors.New("too many regions")
)

// Spec describes a region as the frontend's message does. All are bytes.
type Spec struct {
	GPA        uint64 // guest-physical address of the first byte
	Size       uint64
	UserAddr   uint64 // address of the same byte in the frontend's own space
	MmapOffset uint64 // where the region starts in its file
}

// check refuses empty and wrapping ranges (H027).
func (s Spec) check() error {
	for _, start := range [...]uint64{s.GPA, s.UserAddr, s.MmapOffset} {
		if _, carry := bits.Add64(start, s.Size, 0); s.Size == 0 || carry != 0 {
			return fmt.Errorf("%w: %#x+%#x", ErrRange, start, s.Size)
		}
	}
	return nil
}

// Region is one contiguous piece of guest memory. It does not change after it
// was made; only Unmap takes its memory away.
type Region struct {
	spec    Spec
	mem     []byte  // exactly the region
	start   uintptr // the mapping, which may begin before mem and end after it
	end     uintptr
	mapping []byte // nil for memory on the heap
	unmap   unmapOnce
}

// FromHeap makes a region of memory on the Go heap, for tests: the race
// detector sees it, and its user address is gpa.
func FromHeap(gpa uint64, b []byte) *Region {
	start := hostAddr(b)
	return &Region{
		spec:  Spec{GPA: gpa, Size: uint64(len(b)), UserAddr: gpa},
		mem:   b[:len(b):len(b)],
		start: start,
		end:   start + uintptr(len(b)),
	}
}

// Spec returns what the region was made from.
func (r *Region) Spec() Spec { return r.spec }

// Slice returns n bytes of guest memory at gpa if they lie wholly in the
// region. The slice's capacity ends with the range, so that no append or
// reslice reaches further. borrowed: valid until Unmap.
func (r *Region) Slice(gpa, n uint64) ([]byte, bool) {
	// A gpa below the region wraps to an offset far beyond it.
	off := gpa - r.spec.GPA
	if size := uint64(len(r.mem)); off >= size || n > size-off {
		return nil, false
	}
	return r.mem[off : off+n : off+n], true
}

// Owns reports whether addr lies in the region's mapping. It stays true after
// Unmap, so that a late access is blamed on the right port.
func (r *Region) Owns(addr uintptr) bool { return r.start <= addr && addr < r.end }

// hostAddr returns the address of b's first byte as a number.
func hostAddr(b []byte) uintptr {
	// SAFETY: the address is only compared and printed, never dereferenced.
	return uintptr(unsafe.Pointer(unsafe.SliceData(b)))
}

// Memory is an immutable table of regions. It is safe for concurrent use.
type Memory struct {
	byGPA  []*Region
	byUser []*Region
}

// New makes a table of regions, in any order and perhaps of none. Regions that
// share a guest or a user address are refused (H028).
func New(rs ...*Region) (*Memory, error) {
	if len(rs) > MaxRegions {
		return nil, fmt.Errorf("%w: %d", ErrRegions, len(rs))
	}
	m := &Memory{byGPA: slices.Clone(rs), byUser: slices.Clone(rs)}
	slices.SortFunc(m.byGPA, func(a, b *Region) int { return cmp.Compare(a.spec.GPA, b.spec.GPA) })
	slices.SortFunc(m.byUser, func(a, b *Region) int { return cmp.Compare(a.spec.UserAddr, b.spec.UserAddr) })
	for i := 1; i < len(rs); i++ {
		if a, b := m.byGPA[i-1].spec, m.byGPA[i].spec; b.GPA-a.GPA < a.Size {
			return nil, fmt.Errorf("%w: guest addresses %#x+%#x and %#x", ErrOverlap, a.GPA, a.Size, b.GPA)
		}
		if a, b := m.byUser[i-1].spec, m.byUser[i].spec; b.UserAddr-a.UserAddr < a.Size {
			return nil, fmt.Errorf("%w: user addresses %#x+%#x and %#x", ErrOverlap, a.UserAddr, a.Size, b.UserAddr)
		}
	}
	return m, nil
}

// Regions returns the regions by guest address. borrowed: not to be changed.
func (m *Memory) Regions() []*Region { return m.byGPA }

// Region returns the region that holds the byte at gpa, or nil.
func (m *Memory) Region(gpa uint64) *Region {
	lo, hi := 0, len(m.byGPA)
	for lo < hi {
		mid := int(uint(lo+hi) / 2)
		if m.byGPA[mid].spec.GPA <= gpa {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == 0 {
		return nil
	}
	if r := m.byGPA[lo-1]; gpa-r.spec.GPA < r.spec.Size {
		return r
	}
	return nil
}

// Slice returns n bytes of guest memory at gpa if they lie wholly in one
// region. Its capacity ends with the range. borrowed: valid until the region
// is unmapped, and the guest may change it at any moment.
func (m *Memory) Slice(gpa, n uint64) ([]byte, bool) {
	r := m.Region(gpa)
	if r == nil {
		return nil, false
	}
	return r.Slice(gpa, n)
}

// Append appends the n bytes at gpa to dst, as several slices if the range
// crosses from one region into the next (H054). If a byte of the range is
// nowhere mapped, it returns dst as it was, and false. It allocates only if
// dst lacks capacity.
func (m *Memory) Append(dst [][]byte, gpa, n uint64) ([][]byte, bool) {
	out := dst
	for n > 0 {
		b := m.Prefix(gpa, n)
		if b == nil {
			return dst, false
		}
		out = append(out, b)
		gpa, n = gpa+uint64(len(b)), n-uint64(len(b))
	}
	return out, true
}

// Prefix returns as much of the n bytes at gpa as one region holds, or nil if
// that is nothing. A range that wraps around the address space ends in nil,
// since no region reaches its end.
func (m *Memory) Prefix(gpa, n uint64) []byte {
	r := m.Region(gpa)
	if r == nil {
		return nil
	}
	b, _ := r.Slice(gpa, min(n, r.spec.GPA+r.spec.Size-gpa))
	return b
}

// Read copies len(dst) bytes of guest memory at gpa, across regions if need
// be, and reports whether all of them are mapped.
func (m *Memory) Read(dst []byte, gpa uint64) bool {
	for len(dst) > 0 {
		b := m.Prefix(gpa, uint64(len(dst)))
		if b == nil {
			return false
		}
		n := copy(dst, b)
		dst, gpa = dst[n:], gpa+uint64(n)
	}
	return true
}

// UserToGuest translates a range in the frontend's address space, which is
// what ring addresses are given in. The range must lie in one region.
func (m *Memory) UserToGuest(uva, n uint64) (gpa uint64, ok bool) {
	i, found := slices.BinarySearchFunc(m.byUser, uva, func(r *Region, uva uint64) int {
		return cmp.Compare(r.spec.UserAddr, uva)
	})
	if !found {
		i--
	}
	if i < 0 {
		return 0, false
	}
	s := m.byUser[i].spec
	off := uva - s.UserAddr
	if off >= s.Size || n > s.Size-off {
		return 0, false
	}
	return s.GPA + off, true
}

// Owns reports whether a host address, for instance that of a recovered fault,
// lies in one of the mappings.
func (m *Memory) Owns(addr uintptr) bool {
	for _, r := range m.byGPA {
		if r.Owns(addr) {
			return true
		}
	}
	return false
}
