package nat

import (
	"encoding/binary"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func addr6Of(i int) (a Addr6) {
	a[0] = 0x20
	binary.BigEndian.PutUint64(a[8:], uint64(i))
	return a
}

func TestAddrTable(t *testing.T) {
	var tab addrTable
	tab.init(300)
	ids := map[uint32]Addr6{}
	for i := range 300 {
		a := addr6Of(i)
		id := tab.acquire(&a)
		require.NotZero(t, id)
		require.Equal(t, id, tab.acquire(&a), "one number for one address")
		require.NotContains(t, ids, id)
		ids[id] = a
	}
	over := addr6Of(1000)
	assert.Zero(t, tab.acquire(&over), "full")
	for id, a := range ids {
		require.Equal(t, id, tab.find(&a))
		require.Equal(t, a, tab.address(id))
		tab.release(id)
		require.Equal(t, id, tab.find(&a), "another reference")
		tab.release(id)
		require.Zero(t, tab.find(&a))
		require.False(t, tab.is(id, &a))
	}
	assert.NotZero(t, tab.acquire(&over))
}

// A number that was found is its address's as long as somebody refers to it,
// whatever others do.
func TestAddrTableConcurrent(t *testing.T) {
	var tab addrTable
	tab.init(64)
	kept := addr6Of(-1)
	id := tab.acquire(&kept)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 20000 {
				a := addr6Of(w*7 + i%50)
				got := tab.acquire(&a)
				if got == 0 || !tab.is(got, &a) || tab.find(&kept) != id || !tab.is(id, &kept) {
					t.Error("lost an address")
					return
				}
				tab.release(got)
			}
		})
	}
	wg.Wait()
}
