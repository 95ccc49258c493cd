package frame

import "sync/atomic"

// Hop is a next hop on the way out: its hardware address, as long as it is
// known. The one who resolves it fills it in; flows keep a pointer to it and
// read it for every frame. It is safe for concurrent use.
type Hop struct {
	// state is the address in the low 48 bits and hopValid, hopRetired above.
	state atomic.Uint64
	used  atomic.Int64 // coarse time of the last frame, in seconds
	// MTU is the largest IP packet that may go this way, in bytes. It and Src
	// are set before the Hop is shared and never change.
	MTU int
	// Src is the hardware address to send from.
	Src MAC
}

const (
	hopValid   = 1 << 48
	hopRetired = 1 << 49
)

// Set makes the address known.
func (h *Hop) Set(m MAC) {
	h.state.Store(hopValid | uint64(m[0])<<40 | uint64(m[1])<<32 | uint64(m[2])<<24 |
		uint64(m[3])<<16 | uint64(m[4])<<8 | uint64(m[5]))
}

// Invalidate says that the address is not known for now.
func (h *Hop) Invalidate() { h.state.Store(0) }

// Retire says that whoever holds the hop must ask for the route again.
func (h *Hop) Retire() { h.state.Store(hopRetired) }

// Retired reports whether Retire was called.
func (h *Hop) Retired() bool { return h.state.Load()&hopRetired != 0 }

// Addr returns the hardware address, and whether it is known.
func (h *Hop) Addr() (MAC, bool) {
	s := h.state.Load()
	return MAC{byte(s >> 40), byte(s >> 32), byte(s >> 24), byte(s >> 16), byte(s >> 8), byte(s)}, s&hopValid != 0
}

// Touch notes that a frame went this way at now, in nanoseconds, so that the
// address is kept fresh.
func (h *Hop) Touch(now int64) {
	if s := now / 1e9; h.used.Load() != s {
		h.used.Store(s)
	}
}

// Used is the time in seconds that Touch last noted.
func (h *Hop) Used() int64 { return h.used.Load() }
