package guestmem

import (
	"math"
	"os"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// memfd makes a file of size bytes in memory.
func memfd(t *testing.T, size int64, flags int) int {
	t.Helper()
	fd, err := unix.MemfdCreate("guestmem-test", unix.MFD_CLOEXEC|flags)
	require.NoError(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	require.NoError(t, unix.Ftruncate(fd, size))
	return fd
}

// mapped maps a region for the time of the test.
func mapped(t *testing.T, fd int, s Spec) *Region {
	t.Helper()
	r, err := Map(fd, s)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, r.Unmap()) })
	return r
}

func TestMap(t *testing.T) {
	fd := memfd(t, 0x4000, 0)
	r := mapped(t, fd, Spec{GPA: 0x100000, Size: 0x2000, UserAddr: 0x7f0000000000, MmapOffset: 0x1000})
	_, err := unix.Pwrite(fd, []byte("from the guest"), 0x1ff8)
	require.NoError(t, err)
	m, err := New(r)
	require.NoError(t, err)
	b, ok := m.Slice(0x100ff8, 14)
	require.True(t, ok)
	assert.Equal(t, "from the guest", string(b))
	copy(b, "from the host!")
	got := make([]byte, 14)
	_, err = unix.Pread(fd, got, 0x1ff8)
	require.NoError(t, err)
	assert.Equal(t, "from the host!", string(got))
	_, ok = m.Slice(0x102000, 1)
	assert.False(t, ok, "the rest of the file is not the region's")
}

func TestMapRefuses(t *testing.T) {
	fd := memfd(t, 0x4000, 0)
	var pipe [2]int
	require.NoError(t, unix.Pipe2(pipe[:], unix.O_CLOEXEC))
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	zero, err := os.OpenFile("/dev/zero", os.O_RDWR, 0)
	require.NoError(t, err)
	defer zero.Close()
	file := t.TempDir() + "/ro"
	require.NoError(t, os.WriteFile(file, make([]byte, 0x4000), 0o600))
	readOnly, err := os.Open(file)
	require.NoError(t, err)
	defer readOnly.Close()
	sparse := memfd(t, 1<<40, 0)

	for _, c := range []struct {
		name string
		fd   int
		s    Spec
		err  error
	}{
		{"H027 size 0", fd, Spec{}, ErrRange},
		{"H027 offset not page-aligned", fd, Spec{Size: 0x1000, MmapOffset: 0x10}, ErrAlign},
		{"H027 size+offset overflows", fd, Spec{Size: 0x1000, MmapOffset: math.MaxUint64 - 0xfff}, ErrRange},
		{"H027 gpa+size overflows", fd, Spec{Size: 0x1000, GPA: math.MaxUint64 - 0xfff}, ErrRange},
		{"H027 uva+size overflows", fd, Spec{Size: 0x1001, UserAddr: math.MaxUint64 - 0xfff}, ErrRange},
		{"H027 size of all", fd, Spec{Size: math.MaxUint64}, ErrSize},
		{"H029 longer than the file", fd, Spec{Size: 0x4001}, ErrFile},
		{"H029 past the end by its offset", fd, Spec{Size: 0x2000, MmapOffset: 0x3000}, ErrFile},
		{"H029 1 TiB", sparse, Spec{Size: 1 << 40}, ErrSize},
		{"H033 read-only", int(readOnly.Fd()), Spec{Size: 0x1000}, unix.EACCES},
		{"a pipe", pipe[0], Spec{Size: 0x1000}, ErrFile},
		{"a device", int(zero.Fd()), Spec{Size: 0x1000}, ErrFile},
		{"no descriptor", -1, Spec{Size: 0x1000}, ErrFile},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Map(c.fd, c.s)
			require.ErrorIs(t, err, c.err)
		})
	}
}

// A region on huge pages may begin in the middle of one. No huge page need
// exist: the mapping reserves none.
func TestMapHugetlb(t *testing.T) {
	const huge = 2 << 20
	enginetest.Need(t, "hugepages")
	fd, err := unix.MemfdCreate("guestmem-huge", unix.MFD_CLOEXEC|unix.MFD_HUGETLB|unix.MFD_HUGE_2MB)
	require.NoError(t, err)
	defer unix.Close(fd)
	require.NoError(t, unix.Ftruncate(fd, 2*huge))
	r, err := Map(fd, Spec{Size: huge, MmapOffset: 0xc0000})
	require.NoError(t, err)
	assert.Len(t, r.mapping, 2*huge)
	assert.Equal(t, hostAddr(r.mapping)+0xc0000, hostAddr(r.mem))
	require.NoError(t, r.Unmap())
}

func TestUnmapTwice(t *testing.T) {
	fd := memfd(t, 0x1000, 0)
	r, err := Map(fd, Spec{Size: 0x1000})
	require.NoError(t, err)
	require.NoError(t, r.Unmap())
	// Its place may be another's now.
	other := mapped(t, fd, Spec{Size: 0x1000})
	require.NoError(t, r.Unmap())
	other.mem[0] = 1
}

// fault runs f, which is expected to fault, and returns the address.
func fault(t *testing.T, f func()) uintptr {
	t.Helper()
	got := make(chan any)
	frame.Go(func() {
		defer func() { got <- recover() }()
		f()
	})
	v := <-got
	addr, ok := frame.FaultAddr(v)
	require.True(t, ok, "no fault: %v", v)
	return addr
}

// H030: the file is cut short while it is mapped.
func TestTruncatedFileIsARecoverableFault(t *testing.T) {
	fd := memfd(t, 0x4000, 0)
	r := mapped(t, fd, Spec{Size: 0x4000})
	m, err := New(r)
	require.NoError(t, err)
	other, err := New(mapped(t, memfd(t, 0x4000, 0), Spec{Size: 0x4000}))
	require.NoError(t, err)
	b, ok := m.Slice(0x3000, 0x1000)
	require.True(t, ok)
	require.NoError(t, unix.Ftruncate(fd, 0x1000))

	addr := fault(t, func() { b[5] = 1 })
	assert.True(t, m.Owns(addr))
	assert.False(t, other.Owns(addr))
	addr = fault(t, func() { m.Read(make([]byte, 0x4000), 0) })
	assert.True(t, m.Owns(addr))
}

// H031: a punched hole reads as zeroes.
func TestPunchedHoleReadsZero(t *testing.T) {
	enginetest.Need(t, "holes")
	fd := memfd(t, 0x2000, 0)
	r := mapped(t, fd, Spec{Size: 0x2000})
	r.mem[0x1000] = 7
	require.NoError(t, unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0x1000, 0x1000))
	assert.Zero(t, r.mem[0x1000])
}
