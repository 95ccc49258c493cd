package main

import (
	"encoding/binary"

	"sidewire/engine/frame"
	"sidewire/engine/uplink"
)

// staticARP is the stage that answers a guest's ARP for hosts whose hardware
// addresses were set by hand in the pod: some CNIs do so for the gateway, and
// then nobody else answers.
type staticARP struct {
	guest frame.PortID
	known []uplink.Neighbour
}

func newStaticARP(guest frame.PortID, known []uplink.Neighbour) *staticARP {
	return &staticARP{guest, known}
}

// Of an ARP packet for IPv4 over Ethernet, in the frame.
const (
	arpLen    = frame.EthernetLen + 28
	arpFixed  = frame.EthernetLen // hardware and protocol type, their lengths, operation
	arpSender = arpFixed + 8
	arpTarget = arpSender + 10
)

var arpRequest = [8]byte{0, 1, 8, 0, 6, 4, 0, 1}

// Process implements engine.Stage.
func (a *staticARP) Process(b *frame.Batch) {
	for i, n := 0, b.Len(); i < n; i++ {
		f := b.Frame(i)
		if f.Out != frame.Drop || f.Reason != frame.ReasonNone || f.HeadLen < arpLen || f.EtherType() != frame.TypeARP ||
			[8]byte(f.Head[arpFixed:]) != arpRequest {
			continue
		}
		for _, k := range a.known {
			if k.Addr.As4() == [4]byte(f.Head[arpTarget+6:]) {
				a.answer(b, f, k)
				break
			}
		}
	}
}

// answer replies to a request. One for the sender's own address asks whether it
// is free: that is between it and the network.
func (a *staticARP) answer(b *frame.Batch, f *frame.Frame, k uplink.Neighbour) {
	sender := f.Head[arpSender : arpSender+10]
	if k.Addr.As4() == [4]byte(sender[6:]) {
		return
	}
	out, p := b.Reply(), b.Alloc(arpLen)
	if out == nil || p == nil {
		f.Drop(frame.BatchFull)
		return
	}
	copy(p, f.Src())
	copy(p[6:], k.MAC[:])
	binary.BigEndian.PutUint16(p[12:], frame.TypeARP)
	copy(p[arpFixed:], arpRequest[:])
	p[arpFixed+7] = 2
	copy(p[arpSender:], k.MAC[:])
	addr := k.Addr.As4()
	copy(p[arpSender+6:], addr[:])
	copy(p[arpTarget:], sender)
	f.Out = frame.Consumed
	if b.SetReply(out, p) {
		out.Out, out.Queue = a.guest, f.Queue
	}
}
