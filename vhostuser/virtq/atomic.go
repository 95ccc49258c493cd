package virtq

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"unsafe"

	"sidewire/vhostuser/guestmem"
)

// half is a 16-bit field that the guest writes while we read it. Go has no
// 16-bit atomics, so it is a half of the aligned word around it; an available
// ring that is aligned to 2 only has its index in another word than its flags.
// The word of used_event may reach 2 bytes past the ring: it is only read.
// Like the rest of the data path this is for little-endian hosts.
type half struct {
	word  *uint32
	shift uint8
}

// halfAt finds the field at an even guest address.
func halfAt(m *guestmem.Memory, gpa uint64) (half, error) {
	b, ok := m.Slice(gpa&^3, 4)
	if !ok {
		return half{}, fmt.Errorf("%w: %#x", ErrRange, gpa)
	}
	// SAFETY: b is 4 bytes of mapped memory, and a misaligned address is
	// refused below, before it is ever dereferenced.
	p := unsafe.Pointer(unsafe.SliceData(b))
	if uintptr(p)%4 != 0 {
		return half{}, fmt.Errorf("%w: %#x lies at host address %p", ErrAlign, gpa, p)
	}
	return half{word: (*uint32)(p), shift: uint8(gpa&2) * 8}, nil
}

// slotsAt finds the descriptors of a packed ring. What the guest writes of them
// is loaded word by word, id and flags atomically.
func slotsAt(m *guestmem.Memory, gpa uint64, size int) ([]slot, error) {
	b, ok := m.Slice(gpa, uint64(size)*descLen)
	if !ok {
		return nil, fmt.Errorf("%w: descriptors %#x", ErrRange, gpa)
	}
	// SAFETY: b is size descriptors of mapped memory, and a misaligned address
	// is refused below, before it is ever dereferenced.
	p := unsafe.Pointer(unsafe.SliceData(b))
	if uintptr(p)%8 != 0 {
		return nil, fmt.Errorf("%w: %#x lies at host address %p", ErrAlign, gpa, p)
	}
	return unsafe.Slice((*slot)(p), size), nil
}

// load reads the field with acquire order: what the guest wrote before it is
// visible afterwards.
func (h half) load() uint16 {
	return uint16(atomic.LoadUint32(h.word) >> (h.shift & 31))
}

// usedHeader is the used ring's first word: flags, then index.
func usedHeader(flags, idx uint16) uint32 {
	return uint32(flags) | uint32(idx)<<16
}

// storeEvent writes avail_event. It ends the used ring, so a word would reach
// past it; the compiler makes one 16-bit store of this. Ordering is the
// caller's. The race detector, which knows no such thing, is kept out.
//
//go:norace
//go:noinline
func storeEvent(b []byte, v uint16) {
	binary.LittleEndian.PutUint16(b[:2], v)
}
