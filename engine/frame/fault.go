package frame

import "runtime/debug"

// Go starts f on a goroutine of its own that survives faults in lent memory:
// where a peer has cut short the file behind a mapping, a load or store panics
// with a runtime.Error that has an Addr method instead of ending the process.
// The setting belongs to a goroutine and is not inherited, so every goroutine
// that touches a frame's Tail or a ring is started here.
func Go(f func()) {
	go func() {
		debug.SetPanicOnFault(true)
		f()
	}()
}

// FaultAddr returns the address whose access made the recovered value v, and
// whether v is such a fault at all.
func FaultAddr(v any) (uintptr, bool) {
	if e, ok := v.(interface{ Addr() uintptr }); ok {
		return e.Addr(), true
	}
	return 0, false
}
