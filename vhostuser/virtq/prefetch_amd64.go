package virtq

import "unsafe"

// prefetch asks for the first two lines of a buffer that is about to be read or
// written: header and start of a frame seldom lie in one. Touching them
// instead would wait for them.
func prefetch(b []byte, dir Direction) {
	if dir == Readable {
		prefetchRead(unsafe.SliceData(b)) // SAFETY: b is not empty; a prefetch never faults
	} else {
		prefetchWrite(unsafe.SliceData(b)) // SAFETY: as above
	}
}

//go:noescape
func prefetchRead(p *byte)

//go:noescape
func prefetchWrite(p *byte)
