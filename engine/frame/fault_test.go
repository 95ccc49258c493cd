package frame

import (
	"os"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestFault reads a mapping whose file was cut short, as a hostile peer does.
func TestFault(t *testing.T) {
	fd, err := unix.MemfdCreate("fault", unix.MFD_CLOEXEC)
	require.NoError(t, err)
	defer unix.Close(fd)
	size := 2 * os.Getpagesize()
	require.NoError(t, unix.Ftruncate(fd, int64(size)))
	m, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	require.NoError(t, err)
	defer unix.Munmap(m)
	require.NoError(t, unix.Ftruncate(fd, int64(size/2)))

	recovered := make(chan any, 1)
	Go(func() {
		defer func() { recovered <- recover() }()
		sink += Sum(m, 0)
	})
	addr, ok := FaultAddr(<-recovered)
	require.True(t, ok)
	assert.NotZero(t, addr)
	// Eight bytes are read at a time, under the race detector the last one first.
	assert.Less(t, addr%uintptr(os.Getpagesize()), uintptr(8), "the start of the page that is gone")

	_, ok = FaultAddr("another panic")
	assert.False(t, ok)
}
