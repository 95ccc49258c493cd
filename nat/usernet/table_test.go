package usernet

import (
	"math/rand/v2"
	"reflect"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

func TestFlowSize(t *testing.T) {
	assert.LessOrEqual(t, int(reflect.TypeOf(flow{}).Size()), 100)
}

// A table does what a map would, while it grows and afterwards.
func TestTableAgainstModel(t *testing.T) {
	const limit = 5000
	var tab table
	tab.init(limit)
	model := map[key]int32{}
	var keys []key
	r := rand.New(rand.NewPCG(1, 2))
	for range 60000 {
		k := key{remote: hostOf(r.Uint32N(50)), rport: uint16(r.IntN(50)), gport: uint16(r.IntN(50)), proto: frame.ProtoTCP}
		i, ok := model[k]
		switch got := tab.find(k); {
		case ok && r.IntN(3) == 0:
			require.Equal(t, i, got)
			tab.remove(i)
			delete(model, k)
		case ok:
			require.Equal(t, i, got)
		default:
			require.Equal(t, none, got)
			i = tab.add(k)
			require.Equal(t, len(model) == limit, i == none)
			if i != none {
				model[k] = i
				keys = append(keys, k)
			}
		}
		require.Equal(t, len(model), tab.count)
	}
	longest := 0
	for c := range tab.chains {
		n := 0
		for h := *tab.head(c); h != 0; h = tab.at(h - 1).next {
			n++
		}
		longest = max(longest, n)
	}
	assert.Less(t, longest, 16)
	for _, k := range keys {
		if i, ok := model[k]; ok {
			require.Equal(t, i, tab.find(k))
		}
	}
}

func BenchmarkTableFind(b *testing.B) {
	for _, n := range []int{100, 100_000} {
		b.Run(map[int]string{100: "100", 100_000: "100k"}[n], func(b *testing.B) {
			var tab table
			tab.init(1 << 17)
			keys := make([]key, n)
			for i := range keys {
				keys[i] = key{remote: hostOf(uint32(i) * 7919), rport: 80, gport: uint16(i), proto: frame.ProtoTCP}
				tab.add(keys[i])
			}
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				if tab.find(keys[i%n]) == none {
					b.Fatal("lost")
				}
			}
		})
	}
}
