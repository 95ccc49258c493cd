package usernet

import "sidewire/engine/frame"

// udpScratch is what a worker needs to send and receive datagrams.
type udpScratch struct{}

// udpDatagram sends a datagram of the guest by the mapping that it has.
func (w *worker) udpDatagram(b *frame.Batch, f *frame.Frame, i int32) {}

// udpOpen makes a mapping for the guest's port and sends its first datagram.
func (w *worker) udpOpen(b *frame.Batch, f *frame.Frame) {}

// udpFlush sends what udpDatagram has gathered in this batch.
func (w *worker) udpFlush(b *frame.Batch) {}

// udpEvent is told what became possible with a mapping's socket.
func (w *worker) udpEvent(i int32, events uint32) {}

// udpPump brings the guest datagrams of a mapping's socket.
func (w *worker) udpPump(b *frame.Batch, i int32) pumped { return pumpDone }

// mappingTimer is called when a mapping or an echo session may have been idle
// for too long.
func (w *worker) mappingTimer(i int32) {}
