package usernet

import (
	"net/netip"

	"sidewire/engine/frame"
)

// Forward is a port of the host's that leads to the guest.
type Forward struct {
	Proto uint8
	// Addr is where the host listens; the zero address is all.
	Addr netip.Addr
	// Port is the host's, Guest the guest's; 0 is the same.
	Port, Guest uint16
}

// listener is a forward's socket.
type listener struct {
	fd int32
}

func (l *listener) close() {}

// AddForward lets clients of the host's port reach the guest.
func (n *Net) AddForward(f Forward) error { return nil }

// RemoveForward undoes AddForward. Connections that came by it stay.
func (n *Net) RemoveForward(f Forward) error { return nil }

// listenerEvent takes what came to a listener. i and gen name it.
func (w *worker) listenerEvent(b *frame.Batch, i int32, gen uint32) {}
