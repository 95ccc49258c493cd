package vhostuser

import (
	"reflect"

	"sidewire/engine/frame"
)

// Sizes of what a pair is made of.
var (
	pairSize    = int(reflect.TypeFor[Pair]().Size())
	ringSize    = int(reflect.TypeFor[ring]().Size())
	segSize     = int(reflect.TypeFor[[]byte]().Size())
	segmentSize = int(reflect.TypeFor[frame.Segmenter]().Size())
	reserveSize = int(reflect.TypeFor[Reserver]().Size())
)

// footprint is the memory that a pair takes of ours, in bytes, without what a
// migration adds. The device's mu is held.
func (p *Pair) footprint() int {
	n := pairSize + 2*ringSize
	for _, r := range p.dev.rings[2*p.index:][:2] {
		if r.q != nil {
			n += r.q.Footprint()
		}
	}
	x := &p.rx
	x.mu.Lock()
	defer x.mu.Unlock()
	n += cap(x.segs) * segSize
	if x.seg != nil {
		n += segmentSize
	}
	if x.reserved.Load() != nil {
		n += reserveSize
	}
	return n
}
