package guestmem

import (
	"math"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// pages lists the marked pages below limit.
func pages(l *Log, limit uint64) (got []uint64) {
	for p := range limit {
		if l.Dirty(p * logPage) {
			got = append(got, p)
		}
	}
	return got
}

func TestLogMark(t *testing.T) {
	for _, c := range []struct {
		name   string
		gpa, n uint64
		want   []uint64
		missed uint64
	}{
		{"a byte", 0x3000, 1, []uint64{3}, 0},
		{"nothing", 0x3000, 0, nil, 0},
		{"last of a page", 0x3fff, 1, []uint64{3}, 0},
		{"two pages", 0x3fff, 2, []uint64{3, 4}, 0},
		{"three pages", 0x3800, 0x1801, []uint64{3, 4, 5}, 0},
		{"crosses a word", 31 * logPage, 2 * logPage, []uint64{31, 32}, 0},
		{"last page", 39 * logPage, logPage, []uint64{39}, 0},
		{"H036 past the log", 40 * logPage, 1, nil, 1},
		{"H036 in the last word, past the log", 60 * logPage, 1, nil, 1},
		{"H036 reaches past the log", 38 * logPage, 5 * logPage, []uint64{38, 39}, 1},
		{"H037 address of all ones", math.MaxUint64, 1, nil, 1},
		{"H037 overflow", math.MaxUint64, 8, nil, 1},
		{"H037 overflow from inside", 39 * logPage, math.MaxUint64, []uint64{39}, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := HeapLog(5) // 40 pages, one byte of the second word
			l.Mark(c.gpa, c.n)
			assert.Equal(t, c.want, pages(l, 100))
			assert.Equal(t, c.missed, l.Missed())
		})
	}
	var none *Log
	none.Mark(0, 1)
	assert.False(t, none.Owns(1))
	assert.NoError(t, none.Unmap())
}

func TestMapLog(t *testing.T) {
	fd := memfd(t, 0x1005, 0)
	l, err := MapLog(fd, 5, 0x1000)
	require.NoError(t, err)
	l.Mark(9*logPage, 1)
	l.Mark(39*logPage, 1)
	got := make([]byte, 5)
	_, err = unix.Pread(fd, got, 0x1000)
	require.NoError(t, err)
	assert.Equal(t, []byte{0, 2, 0, 0, 0x80}, got, "bit order is that of the frontend's bitmap")

	require.NoError(t, unix.Ftruncate(fd, 0))
	addr := fault(t, func() { l.Mark(0, 1) })
	assert.True(t, l.Owns(addr))
	require.NoError(t, l.Unmap())
	require.NoError(t, l.Unmap())
}

func TestMapLogRefuses(t *testing.T) {
	fd := memfd(t, 0x2000, 0)
	for _, c := range []struct {
		name         string
		fd           int
		size, offset uint64
		err          error
	}{
		{"H036 size 0", fd, 0, 0, ErrRange},
		{"H036 overflow", fd, 0x1000, math.MaxUint64 - 0xfff, ErrRange},
		{"H036 too large", fd, MaxLogSize + 1, 0, ErrSize},
		{"H036 past the file", fd, 0x1001, 0x1000, ErrFile},
		{"H036 unaligned", fd, 8, 8, ErrAlign},
		{"H036 without fd", -1, 0x1000, 0, ErrFile},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := MapLog(c.fd, c.size, c.offset)
			require.ErrorIs(t, err, c.err)
		})
	}
}

func TestLogMarksTogether(t *testing.T) {
	l := HeapLog(8)
	var wg sync.WaitGroup
	for i := range uint64(4) {
		wg.Go(func() {
			for p := i; p < 64; p += 4 {
				l.Mark(p*logPage, 1)
			}
		})
	}
	wg.Wait()
	assert.Len(t, pages(l, 64), 64, "no mark is lost to a neighbour's")
}
