package guestmem

import (
	"math"
	"math/rand/v2"
	"testing"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// region makes a region with a user address of its own.
func region(gpa, uva uint64, size int) *Region {
	r := FromHeap(gpa, make([]byte, size))
	r.spec.UserAddr = uva
	return r
}

func TestNewRefusesOverlap(t *testing.T) {
	for _, c := range []struct {
		name string
		rs   []*Region
		err  error
	}{
		{"none", nil, nil},
		{"apart", []*Region{region(0x3000, 0x13000, 0x1000), region(0x1000, 0x11000, 0x1000)}, nil},
		{"adjacent", []*Region{region(0x2000, 0x12000, 0x1000), region(0x1000, 0x11000, 0x1000)}, nil},
		{"H028 same gpa", []*Region{region(0x1000, 0x11000, 0x1000), region(0x1000, 0x21000, 0x1000)}, ErrOverlap},
		{"H028 gpa by a byte", []*Region{region(0x1fff, 0x11000, 0x1000), region(0x1000, 0x21000, 0x1000)}, ErrOverlap},
		{"H028 gpa inside", []*Region{region(0x1800, 0x11000, 0x100), region(0x1000, 0x21000, 0x1000)}, ErrOverlap},
		{"H028 uva by a byte", []*Region{region(0x1000, 0x11fff, 0x1000), region(0x5000, 0x11000, 0x1000)}, ErrOverlap},
		{"H035 the same twice", []*Region{region(0x1000, 0x1000, 0x1000), region(0x1000, 0x1000, 0x1000)}, ErrOverlap},
		{"H035 too many", make([]*Region, MaxRegions+1), ErrRegions},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := New(c.rs...)
			require.ErrorIs(t, err, c.err)
		})
	}
}

func TestSlice(t *testing.T) {
	a, b := region(0x1000, 0x71000, 0x1000), region(0x2000, 0x51000, 0x800)
	top := region(math.MaxUint64-0xfff, 0x90000, 0xfff)
	m, err := New(top, b, a)
	require.NoError(t, err)
	for _, c := range []struct {
		name string
		gpa  uint64
		n    uint64
		in   *Region
		off  int
	}{
		{"first byte", 0x1000, 1, a, 0},
		{"all", 0x1000, 0x1000, a, 0},
		{"last byte", 0x1fff, 1, a, 0xfff},
		{"nothing", 0x1800, 0, a, 0}, // Go points a slice without capacity at its origin
		{"second", 0x2100, 0x700, b, 0x100},
		{"end of the address space", math.MaxUint64 - 1, 1, top, 0xffe},
		{"H054 before", 0xfff, 1, nil, 0},
		{"H054 after", 0x2800, 1, nil, 0},
		{"H054 after the last", math.MaxUint64, 1, nil, 0},
		{"H054 past the end", 0x2100, 0x701, nil, 0},
		{"H054 crosses", 0x1fff, 2, nil, 0},
		{"H054 overflow", 0x1800, math.MaxUint64, nil, 0},
		{"H054 overflow to the same", 0x1800, math.MaxUint64 - 0x7ff, nil, 0},
		{"zero", 0, 1, nil, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, ok := m.Slice(c.gpa, c.n)
			require.Equal(t, c.in != nil, ok)
			if !ok {
				assert.Nil(t, got)
				return
			}
			assert.Same(t, &c.in.mem[c.off], unsafe.SliceData(got))
			assert.Len(t, got, int(c.n))
			assert.Equal(t, int(c.n), cap(got), "capacity reaches past the range")
		})
	}
}

func TestAppendCrosses(t *testing.T) {
	a, b, c := region(0x1000, 1<<20, 0x1000), region(0x2000, 2<<20, 0x10), region(0x2010, 3<<20, 0x1000)
	far := region(0x9000, 4<<20, 0x1000)
	m, err := New(c, far, a, b)
	require.NoError(t, err)

	old := []byte{1}
	got, ok := m.Append([][]byte{old}, 0x1ff0, 0x40)
	require.True(t, ok)
	require.Len(t, got, 4)
	assert.Same(t, &old[0], &got[0][0])
	assert.Same(t, &a.mem[0xff0], &got[1][0])
	assert.Same(t, &b.mem[0], &got[2][0])
	assert.Same(t, &c.mem[0], &got[3][0])
	assert.Equal(t, []int{0x10, 0x10, 0x20}, []int{len(got[1]), len(got[2]), len(got[3])})

	for _, bad := range [][2]uint64{
		{0x2fff, 0x12}, // one byte into the gap
		{0x9fff, 2},
		{0, 1},
		{0x1000, math.MaxUint64},
		{math.MaxUint64, 0x2000},
	} {
		got, ok := m.Append([][]byte{old}, bad[0], bad[1])
		assert.False(t, ok, "%#x", bad)
		assert.Len(t, got, 1)
	}
	got, ok = m.Append(nil, 0x5555, 0)
	assert.True(t, ok)
	assert.Empty(t, got)
}

func TestRead(t *testing.T) {
	a, b := region(0x1000, 1<<20, 0x1000), region(0x2000, 2<<20, 0x1000)
	copy(a.mem[0xffe:], "ab")
	copy(b.mem, "cd")
	m, err := New(a, b)
	require.NoError(t, err)
	got := make([]byte, 4)
	require.True(t, m.Read(got, 0x1ffe))
	assert.Equal(t, "abcd", string(got))
	assert.False(t, m.Read(got, 0x2ffd))
}

func TestUserAddresses(t *testing.T) {
	a, b := region(0x1000, 0x7f0000002000, 0x1000), region(0x8000, 0x7f0000001000, 0x1000)
	m, err := New(a, b)
	require.NoError(t, err)
	for _, c := range []struct {
		uva, n, gpa uint64
		ok          bool
	}{
		{0x7f0000001000, 0x1000, 0x8000, true},
		{0x7f0000001fff, 1, 0x8fff, true},
		{0x7f0000002000, 1, 0x1000, true},
		{0x7f0000002abc, 4, 0x1abc, true},
		{0x7f0000000fff, 1, 0, false},
		{0x7f0000001fff, 2, 0, false}, // neighbours there are strangers here
		{0x7f0000003000, 1, 0, false},
		{0x7f0000002000, math.MaxUint64, 0, false},
		{0, 1, 0, false},
		{math.MaxUint64, 1, 0, false},
	} {
		gpa, ok := m.UserToGuest(c.uva, c.n)
		assert.Equal(t, c.ok, ok, "%#x", c.uva)
		assert.Equal(t, c.gpa, gpa, "%#x", c.uva)
	}
}

func TestOwns(t *testing.T) {
	a, b := region(0, 0, 64), region(64, 64, 64)
	m, err := New(a)
	require.NoError(t, err)
	first := hostAddr(a.mem)
	assert.True(t, m.Owns(first))
	assert.True(t, m.Owns(first+63))
	assert.False(t, m.Owns(first+64))
	assert.False(t, m.Owns(first-1))
	assert.False(t, m.Owns(hostAddr(b.mem)))
}

// TestSliceAgainstLinear compares the search with looking at every region.
func TestSliceAgainstLinear(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var rs []*Region
		gpa := rng.Uint64N(8)
		for range rng.IntN(20) {
			size := 1 + rng.IntN(8)
			rs = append(rs, FromHeap(gpa, make([]byte, size)))
			gpa += uint64(size) + rng.Uint64N(3)
		}
		rng.Shuffle(len(rs), func(i, j int) { rs[i], rs[j] = rs[j], rs[i] })
		m, err := New(rs...)
		require.NoError(t, err)
		for at := uint64(0); at < gpa+4; at++ {
			n := 1 + rng.Uint64N(10)
			var want *byte
			for _, r := range rs {
				if r.spec.GPA <= at && at < r.spec.GPA+r.spec.Size && at+n <= r.spec.GPA+r.spec.Size {
					want = &r.mem[at-r.spec.GPA]
				}
			}
			got, ok := m.Slice(at, n)
			require.Equal(t, want != nil, ok)
			require.True(t, want == unsafe.SliceData(got))
		}
	}
}

func TestLookupDoesNotAllocate(t *testing.T) {
	m, err := New(region(0x1000, 1<<20, 0x1000), region(0x2000, 2<<20, 0x1000))
	require.NoError(t, err)
	segs := make([][]byte, 0, 4)
	allocs := testing.AllocsPerRun(100, func() {
		_, _ = m.Slice(0x1234, 5)
		_, _ = m.Append(segs, 0x1ff0, 0x20)
		_, _ = m.UserToGuest(1<<20, 5)
		_ = m.Owns(1)
	})
	assert.Zero(t, allocs)
}
