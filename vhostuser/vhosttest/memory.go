package vhosttest

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// pageSize is the alignment of memory regions and rings.
const pageSize = 4096

// uvaBase is added to guest addresses to make user addresses: those of a real
// frontend look like it, and they are only names for the backend.
const uvaBase = 0x7f00_0000_0000

// Memory is guest memory in one file. Allocation is not safe for concurrent
// use.
type Memory struct {
	Bytes  []byte   // the memory, mapped or on the heap
	GPA    uint64   // guest physical address of Bytes[0]
	UVA    uint64   // user address of Bytes[0], as told to the backend
	Offset uint64   // where Bytes[0] lies in the file
	File   *os.File // nil on the heap

	next uint64
}

// NewMemory makes size bytes of memory in a memfd, mapped at gpa. Like QEMU's
// it cannot change its size, unless open says so.
func NewMemory(size int, gpa uint64, open bool) (*Memory, error) {
	fd, err := unix.MemfdCreate("vhosttest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("guest memory: %w", err)
	}
	m := &Memory{GPA: gpa, UVA: uvaBase + gpa, File: os.NewFile(uintptr(fd), "vhosttest")}
	if err := m.open(size, open); err != nil {
		m.File.Close()
		return nil, fmt.Errorf("guest memory: %w", err)
	}
	return m, nil
}

func (m *Memory) open(size int, open bool) error {
	fd := int(m.File.Fd())
	size = (size + pageSize - 1) &^ (pageSize - 1)
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return err
	}
	if !open {
		const seals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW
		if _, err := unix.FcntlInt(m.File.Fd(), unix.F_ADD_SEALS, seals); err != nil {
			return err
		}
	}
	b, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	m.Bytes = b
	return err
}

// HeapMemory makes memory that has no file, for tests in which the race
// detector is to see it.
func HeapMemory(size int, gpa uint64) *Memory {
	words := make([]uint64, (size+7)/8) // aligned for the rings' atomic words
	return &Memory{Bytes: bytesOf(words), GPA: gpa, UVA: uvaBase + gpa}
}

// Close unmaps the memory and closes its file.
func (m *Memory) Close() error {
	if m.File == nil {
		return nil
	}
	err := unix.Munmap(m.Bytes)
	m.Bytes = nil
	if cerr := m.File.Close(); err == nil {
		err = cerr
	}
	return err
}

// Alloc takes n bytes at an alignment that is a power of two and returns their
// guest address.
func (m *Memory) Alloc(n, align int) (gpa uint64, err error) {
	at := (m.next + uint64(align) - 1) &^ (uint64(align) - 1)
	if at+uint64(n) > uint64(len(m.Bytes)) {
		return 0, fmt.Errorf("guest memory: %d of %d bytes used, %d more asked for", m.next, len(m.Bytes), n)
	}
	m.next = at + uint64(n)
	return m.GPA + at, nil
}

// At returns the n bytes at a guest address that lies in the memory.
func (m *Memory) At(gpa uint64, n int) []byte {
	off := gpa - m.GPA
	return m.Bytes[off : off+uint64(n) : off+uint64(n)]
}

// ToUser converts a guest address to the user address that the backend is
// told.
func (m *Memory) ToUser(gpa uint64) uint64 { return gpa - m.GPA + m.UVA }

// Region is the memory as one entry of a memory table.
func (m *Memory) Region() Region {
	r := Region{GPA: m.GPA, Size: uint64(len(m.Bytes)), UVA: m.UVA, Offset: m.Offset, FD: -1}
	if m.File != nil {
		r.FD = int(m.File.Fd())
	}
	return r
}
