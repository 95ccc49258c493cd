package guestmem

import (
	"fmt"
	"math/bits"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// logPage is the size of guest memory that one bit of a Log stands for.
const logPage = 4096

// MaxLogSize is the largest log that is mapped, in bytes: 4 TiB of guest.
const MaxLogSize = 128 << 20

// Log is the dirty bitmap of a live migration: the frontend reads and clears
// it while we set the bit of every page that we wrote. It is safe for
// concurrent use, and a nil Log ignores marks.
//
// A mark comes after the write that it stands for: the frontend clears the bit
// first and then copies the page.
type Log struct {
	words   []uint32 // the last one may reach past size
	size    uint64   // bytes that the frontend gave
	start   uintptr
	mapping []byte // nil for memory on the heap
	missed  atomic.Uint64
	unmap   unmapOnce
}

// MapLog maps the log of SET_LOG_BASE: size bytes at offset of fd, which stays
// the caller's. Empty, wrapping, unaligned or oversized logs and files that do
// not hold them are refused (H036).
func MapLog(fd int, size, offset uint64) (*Log, error) {
	if _, carry := bits.Add64(offset, size, 0); size == 0 || carry != 0 {
		return nil, fmt.Errorf("log: %w: %#x+%#x", ErrRange, offset, size)
	}
	if size > MaxLogSize {
		return nil, fmt.Errorf("log: %w: %#x bytes", ErrSize, size)
	}
	before, mapping, err := mapFile(fd, offset, size)
	if err != nil {
		return nil, fmt.Errorf("log: %w", err)
	}
	// SAFETY: before is a multiple of pageSize, so the first word is aligned,
	// and the mapping is whole pages, so the last word, which may reach up to
	// 3 bytes past size, is mapped.
	first := (*uint32)(unsafe.Pointer(&mapping[before]))
	return &Log{
		words:   unsafe.Slice(first, (size+3)/4),
		size:    size,
		start:   hostAddr(mapping),
		mapping: mapping,
	}, nil
}

// HeapLog makes a log of size bytes on the Go heap, for tests.
func HeapLog(size int) *Log {
	return &Log{words: make([]uint32, (size+3)/4), size: uint64(size)}
}

// Mark sets the bits of all pages that the n bytes at gpa touch. Pages past
// the log are skipped and counted (H037).
func (l *Log) Mark(gpa, n uint64) {
	if l == nil || n == 0 {
		return
	}
	last, carry := bits.Add64(gpa, n-1, 0)
	if carry != 0 {
		last = ^uint64(0)
	}
	page, end := gpa/logPage, last/logPage
	if limit := l.size * 8; end >= limit {
		l.missed.Add(1)
		if page >= limit {
			return
		}
		end = limit - 1
	}
	for ; page <= end; page++ {
		// Looking first whether the bit is set would be wrong: the look may
		// be done before our write to the page is visible.
		atomic.OrUint32(&l.words[page/32], logBit(page))
	}
}

// Dirty reports whether the page of gpa is marked.
func (l *Log) Dirty(gpa uint64) bool {
	page := gpa / logPage
	return page < l.size*8 && atomic.LoadUint32(&l.words[page/32])&logBit(page) != 0
}

// Missed returns how many marks lay past the log.
func (l *Log) Missed() uint64 { return l.missed.Load() }

// Owns reports whether a host address lies in the log's mapping; the frontend
// can cut this file short, too.
func (l *Log) Owns(addr uintptr) bool {
	return l != nil && addr >= l.start && addr-l.start < uintptr(len(l.mapping))
}

// Unmap gives the log's memory back. Nobody may be marking any more. Calling
// it again does nothing.
func (l *Log) Unmap() error {
	if l == nil || l.mapping == nil {
		return nil
	}
	l.unmap.once.Do(func() { l.unmap.err = unix.Munmap(l.mapping) })
	return l.unmap.err
}

// logBit is the bit of a page in its word. Bit 0 of byte 0 is page 0, which on
// a little-endian host is bit 0 of word 0 as well.
func logBit(page uint64) uint32 { return 1 << (page % 32) }
