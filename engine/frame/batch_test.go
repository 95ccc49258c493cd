package frame

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestBatchBounds(t *testing.T) {
	b := new(Batch)
	b.Reset(5)
	for i := range BatchSize {
		f := b.Next()
		require.NotNil(t, f)
		require.Same(t, f, b.Frame(i))
	}
	assert.Nil(t, b.Next())
	b.Undo()
	assert.NotNil(t, b.Next())
	for range BatchSize {
		require.NotNil(t, b.Reply())
	}
	assert.Nil(t, b.Reply())
	assert.Equal(t, 2*BatchSize, b.Len())
	b.Reset(6)
	assert.Zero(t, b.Len())
	assert.Equal(t, int64(6), b.Now)
}

// TestBatchForgets: nothing of a frame but its Head bytes outlives a Reset.
func TestBatchForgets(t *testing.T) {
	b := new(Batch)
	f := b.Next()
	segs := append(b.Segs(1), []byte{1})
	*f = Frame{Offload: Offload{1, 2, 3, 4, 5, 6}, Len: 7, HeadLen: 8, In: 9, Out: 10, Queue: 11, Reason: BadIPv4, L3: 12,
		L4: 13, Proto: 14, Frag: true, Token: 15, Tail: segs}
	b.Reset(0)
	assert.Equal(t, Frame{}, *b.Next())
	assert.Nil(t, segs[0], "a lent slice is forgotten")
}

func TestBatchSegs(t *testing.T) {
	b := new(Batch)
	one := b.Segs(10)
	require.Equal(t, []int{0, 10}, []int{len(one), cap(one)})
	b.TrimSegs(7)
	two := b.Segs(1)
	one = append(one, []byte{1}, []byte{2}, []byte{3})
	two = append(two, []byte{4})
	assert.Equal(t, [][]byte{{1}, {2}, {3}}, one, "two begins behind what one kept")
	assert.Nil(t, b.Segs(b.SegsLeft()+1))
	assert.NotNil(t, b.Segs(b.SegsLeft()))
	assert.Nil(t, b.Segs(1))
}

func TestBatchReply(t *testing.T) {
	b := new(Batch)
	a := b.Alloc(300)
	copy(a, pattern(300))
	require.Len(t, a, 300)
	require.Equal(t, 300, cap(a))
	f := b.Reply()
	require.True(t, b.SetReply(f, a))
	assert.Equal(t, pattern(300), f.Bytes())
	assert.Equal(t, []int{HeadSize, 1}, []int{int(f.HeadLen), len(f.Tail)})

	b.Segs(b.SegsLeft())
	g := b.Reply()
	assert.False(t, b.SetReply(g, a))
	assert.Equal(t, BatchFull, g.Reason)
	assert.True(t, b.SetReply(b.Reply(), a[:HeadSize]), "a short reply needs no scatter list")
	assert.Nil(t, b.Alloc(arenaSize))
	assert.NotNil(t, b.Alloc(arenaSize-300))
	assert.Nil(t, b.Alloc(1))
}

func TestSetBytes(t *testing.T) {
	f := new(Frame)
	f.SetBytes(pattern(200), [][]byte{{1, 2}, nil, {3}}, make([][]byte, 4))
	assert.Equal(t, append(pattern(200), 1, 2, 3), f.Bytes())
	assert.True(t, f.whole())
	short := make([]byte, 100)
	assert.Equal(t, 100, f.CopyTo(short), "a short buffer gets what fits")
}

func TestBatchAllocs(t *testing.T) {
	b, bytes := new(Batch), pattern(200)
	assert.Zero(t, testing.AllocsPerRun(10, func() {
		b.Reset(0)
		for range BatchSize {
			f := b.Next()
			f.SetBytes(bytes, nil, b.Segs(1))
		}
	}))
}

func TestReasonNames(t *testing.T) {
	seen := map[string]bool{}
	for r := range NumReasons {
		n := r.String()
		assert.NotEmpty(t, n)
		assert.False(t, seen[n], n)
		seen[n] = true
	}
	assert.Equal(t, "unknown", NumReasons.String())
}

func TestHop(t *testing.T) {
	var h Hop
	_, ok := h.Addr()
	assert.False(t, ok)
	h.Set(MAC{1, 2, 3, 4, 5, 0xff})
	m, ok := h.Addr()
	assert.True(t, ok)
	assert.Equal(t, MAC{1, 2, 3, 4, 5, 0xff}, m)
	h.Invalidate()
	_, ok = h.Addr()
	assert.False(t, ok)
	assert.False(t, h.Retired())
	h.Retire()
	_, ok = h.Addr()
	assert.False(t, ok)
	assert.True(t, h.Retired())
	h.Touch(3_999_999_999)
	assert.Equal(t, int64(3), h.Used())
}
