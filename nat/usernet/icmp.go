package usernet

import "sidewire/engine/frame"

// rateLimit bounds how many ICMP errors are made (RFC 5508 REQ-10f).
type rateLimit struct{}

// icmpError tells the guest, as the gateway, what became of its packet f (RFC
// 1812, 4.3.2.7 and 8). info is what follows the checksum: the next hop's MTU
// for a packet that is too big.
func (w *worker) icmpError(b *frame.Batch, f *frame.Frame, typ, code uint8, info uint32) {}

// refuse drops a packet and tells the guest so.
func (w *worker) refuse(b *frame.Batch, f *frame.Frame, typ, code uint8, r frame.DropReason) {
	w.icmpError(b, f, typ, code, 0)
	f.Drop(r)
}
