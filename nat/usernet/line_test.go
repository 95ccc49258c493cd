package usernet

import (
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// A line does what a slice would.
func TestLineAgainstModel(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	var l line
	var model []int32
	for n := range int32(20000) {
		switch k := r.IntN(5); {
		case k < 2:
			l.push(n)
			model = append(model, n)
		case k == 2:
			l.unpop(n)
			model = slices.Insert(model, 0, n)
		case len(model) > 0:
			require.Equal(t, model[0], l.first())
			l.pop()
			model = model[1:]
		}
		require.Equal(t, len(model), l.len)
	}
	for k := range model {
		require.Equal(t, model[k], *l.at(k))
	}
}

// A flow that ends while it is in the line, and another in its place, have one
// turn between them.
func TestLineOutlivesFlows(t *testing.T) {
	w := &worker{}
	w.table.init(8)
	for range 100 {
		i := w.table.add(key{gport: 1})
		w.ready(i)
		w.ready(i)
		require.Equal(t, 1, w.eager)
		w.unready(i)
		w.table.remove(i)
		require.Equal(t, 0, w.eager)
	}
	require.Equal(t, 1, w.line.len)
}
