package guestmem

import (
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// MaxRegionSize is the largest region that is mapped, in bytes (H029).
const MaxRegionSize = 512 << 30

const pageSize = 4096

// hugetlbMagic is HUGETLBFS_MAGIC of linux/magic.h.
const hugetlbMagic = 0x958458f6

// unmapOnce makes a second Unmap harmless: by then the address may belong to
// another mapping.
type unmapOnce struct {
	once sync.Once
	err  error
}

// Map maps a region of a frontend's file, shared and writable. The file must
// hold the whole region now (mmap itself would accept less and fault later),
// which does not keep the frontend from cutting it short afterwards. Map does
// not keep fd; the caller closes it.
func Map(fd int, s Spec) (*Region, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	if s.Size > MaxRegionSize {
		return nil, fmt.Errorf("%w: %#x bytes", ErrSize, s.Size)
	}
	before, mapping, err := mapFile(fd, s.MmapOffset, s.Size)
	if err != nil {
		return nil, err
	}
	start := hostAddr(mapping)
	return &Region{
		spec:    s,
		mem:     mapping[before : before+s.Size : before+s.Size],
		start:   start,
		end:     start + uintptr(len(mapping)),
		mapping: mapping,
	}, nil
}

// mapFile maps size bytes of fd at offset, rounded outwards to whole pages of
// the file, and returns how many bytes of the mapping lie before the offset.
func mapFile(fd int, offset, size uint64) (before uint64, mapping []byte, err error) {
	if offset%pageSize != 0 {
		return 0, nil, fmt.Errorf("%w: %#x", ErrAlign, offset)
	}
	page, err := checkFile(fd, offset+size)
	if err != nil {
		return 0, nil, err
	}
	// A file on hugetlbfs is mapped by whole huge pages, but regions begin
	// where the guest's address space says, for instance behind the VGA hole.
	before = offset % page
	length := (before + size + page - 1) / page * page
	mapping, err = unix.Mmap(fd, int64(offset-before), int(length),
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return 0, nil, fmt.Errorf("map %#x bytes: %w", length, err)
	}
	// A core dump of ours is no place for a guest's memory. That the kernel
	// lacks the call is no reason to refuse the guest.
	_ = unix.Madvise(mapping, unix.MADV_DONTDUMP)
	return before, mapping, nil
}

// checkFile refuses what is not a file of at least size bytes, and returns the
// unit in which it is mapped.
func checkFile(fd int, size uint64) (page uint64, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, fmt.Errorf("%w: %w", ErrFile, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0, fmt.Errorf("%w: mode %#o", ErrFile, st.Mode)
	}
	if st.Size < 0 || uint64(st.Size) < size {
		return 0, fmt.Errorf("%w: %#x bytes, need %#x", ErrFile, st.Size, size)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return 0, fmt.Errorf("%w: %w", ErrFile, err)
	}
	if uint32(fs.Type) == hugetlbMagic && fs.Bsize > pageSize {
		return uint64(fs.Bsize), nil
	}
	return uint64(unix.Getpagesize()), nil
}

// Unmap gives the region's memory back to the kernel. The caller makes sure
// that nobody uses a slice of it any more. Calling it again does nothing.
func (r *Region) Unmap() error {
	if r.mapping == nil {
		return nil
	}
	r.unmap.once.Do(func() { r.unmap.err = unix.Munmap(r.mapping) })
	return r.unmap.err
}
