package usernet

import (
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

type outgoing struct{}
type delayedAck struct{}

const pumpFrames = 8

func (w *worker) flush(b *frame.Batch)                               {}
func (w *worker) tcpSettle(b *frame.Batch, i int32)                  {}
func (w *worker) sendDelayed(b *frame.Batch)                         {}
func (w *worker) tcpSegment(b *frame.Batch, f *frame.Frame, i int32) {}
func (w *worker) tcpOpen(b *frame.Batch, f *frame.Frame)             {}
func (w *worker) tcpEvent(b *frame.Batch, i int32, events uint32)    {}
func (w *worker) tcpPump(b *frame.Batch, i int32) pumped             { return pumpDone }
func (w *worker) tcpTimer(b *frame.Batch, i int32)                   {}

// tcpAccepted begins a flow for a connection that a client of the host's has
// made to a forwarded port. It takes the descriptor.
func (w *worker) tcpAccepted(b *frame.Batch, fd int32, client *unix.RawSockaddrInet4, port uint16) {}
