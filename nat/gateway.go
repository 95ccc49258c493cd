package nat

import (
	"encoding/binary"

	"sidewire/engine/frame"
)

// Offsets in an ARP packet for Ethernet and IPv4 (RFC 826), from the frame's
// start.
const (
	arpStart     = frame.EthernetLen
	arpOp        = arpStart + 6
	arpSenderMAC = arpStart + 8
	arpSenderIP  = arpStart + 14
	arpTargetMAC = arpStart + 18
	arpTargetIP  = arpStart + 24
	arpEnd       = arpStart + 28

	// arpFixed is hardware type, protocol type and both lengths.
	arpFixed = 0x0001_0800_0604
)

// arp answers a guest's question for the gateway, learns the guest's hardware
// address, and leaves the rest to the pod's kernel, whose own neighbour table
// it is about. src is the frame's source address.
func (o *Outbound) arp(b *frame.Batch, f *frame.Frame, src uint64) {
	if int(f.HeadLen) < arpEnd {
		f.Drop(frame.ShortFrame)
		return
	}
	h := f.Head[:arpEnd]
	op := binary.BigEndian.Uint16(h[arpOp:])
	if binary.BigEndian.Uint64(h[arpStart-2:])&0xffff_ffff_ffff != arpFixed || op != 1 && op != 2 {
		f.Drop(frame.NotCarried) // H081
		return
	}
	sender, target := binary.BigEndian.Uint32(h[arpSenderIP:]), binary.BigEndian.Uint32(h[arpTargetIP:])
	// The gateway's entry cannot be taken over, nor anybody's spoken for.
	if mac48(h[arpSenderMAC:]) != src || sender != o.g.IP && (sender != 0 || op != 1) {
		f.Drop(frame.Spoofed)
		return
	}
	if sender == o.g.IP && o.g.mac.Load() != src {
		o.g.mac.Store(src)
	}
	if op == 1 && target == o.g.Gateway {
		o.answerARP(b, f)
		return
	}
	if dst := mac48(f.Dst()); o.g.LocalTap == frame.Drop || dst != broadcastMAC && dst != o.m.gwMAC {
		f.Drop(frame.NotCarried)
		return
	}
	// Among these are probes for the guest's own address (RFC 5227), which the
	// kernel leaves unanswered as it must.
	o.g.Alias.arpToPod(h, o.g)
	f.Out = o.g.LocalTap
}

// answerARP answers the question in f for the gateway.
func (o *Outbound) answerARP(b *frame.Batch, f *frame.Frame) {
	r := b.Reply()
	if r == nil {
		f.Drop(frame.BatchFull)
		return
	}
	h := r.Head[:arpEnd]
	copy(h, f.Head[:arpEnd])
	copy(h[0:6], f.Src())
	putMAC(h[6:], o.m.gwMAC)
	h[arpOp+1] = 2
	putMAC(h[arpSenderMAC:], o.m.gwMAC)
	copy(h[arpSenderIP:arpSenderIP+4], f.Head[arpTargetIP:])
	copy(h[arpTargetMAC:arpTargetIP], f.Head[arpSenderMAC:])
	copy(h[arpTargetIP:], f.Head[arpSenderIP:arpSenderIP+4])
	r.HeadLen, r.Len = arpEnd, arpEnd
	r.In, r.Out, r.Queue = f.In, o.g.Port, f.Queue
	f.Out = frame.Consumed
}

// asksPerSecond is how often a silent guest is asked for its hardware address.
const asksPerSecond = 10

// askARP asks a guest for its hardware address, as the gateway.
func (m *Masquerade) askARP(b *frame.Batch, in frame.PortID, g *guest) {
	r := b.Reply()
	if r == nil {
		return
	}
	h := r.Head[:arpEnd]
	clear(h)
	putMAC(h[0:], broadcastMAC)
	putMAC(h[6:], m.gwMAC)
	binary.BigEndian.PutUint64(h[arpStart-2:], frame.TypeARP<<48|arpFixed)
	h[arpOp+1] = 1
	putMAC(h[arpSenderMAC:], m.gwMAC)
	binary.BigEndian.PutUint32(h[arpSenderIP:], g.Gateway)
	binary.BigEndian.PutUint32(h[arpTargetIP:], g.IP)
	r.HeadLen, r.Len = arpEnd, arpEnd
	r.In, r.Out = in, g.Port
}

// Local is the stage for what a guest's local tap sends.
type Local struct {
	m *Masquerade
	g *guest
}

// Local returns the stage for what the local tap of the guest with this index
// sends: the pod's kernel, as the gateway.
func (m *Masquerade) Local(guest int) *Local { return &Local{m, m.guests[guest]} }

// Process passes frames for the guest on to it, unchanged but for an alias.
func (l *Local) Process(b *frame.Batch) {
	for i, n := 0, b.Len(); i < n; i++ {
		f := b.Frame(i)
		if f.Out != frame.Drop || f.Reason != frame.ReasonNone {
			continue
		}
		l.frame(f)
	}
}

func (l *Local) frame(f *frame.Frame) {
	if int(f.HeadLen) < frame.EthernetLen {
		f.Drop(frame.ShortFrame)
		return
	}
	if t := f.EtherType(); t != frame.TypeIPv4 && t != frame.TypeARP {
		f.Drop(frame.NotCarried)
		return
	}
	dst, mac := mac48(f.Dst()), l.g.mac.Load()
	if dst != broadcastMAC && (dst>>40&1 != 0 || mac != 0 && dst != mac) {
		f.Drop(frame.NotCarried)
		return
	}
	f.Queue = 0
	switch {
	case f.EtherType() == frame.TypeIPv4 && f.ParseIPv4() == frame.ReasonNone:
		f.Queue = uint16(l.g.localQueue[localSlot(f)].Load())
		l.g.Alias.toGuest(f, l.g)
	case f.EtherType() == frame.TypeARP && int(f.HeadLen) >= arpEnd:
		l.g.Alias.arpToGuest(f.Head[:arpEnd], l.g)
	}
	f.Out = l.g.Port
}

// localSlot is the same small number for both directions of a local flow.
func localSlot(f *frame.Frame) uint32 {
	x := f.SrcIP4() ^ f.DstIP4()
	if !f.Frag && (f.Proto == frame.ProtoTCP || f.Proto == frame.ProtoUDP) {
		x ^= uint32(f.SrcPort() ^ f.DstPort())
	}
	x *= 0x9e3779b1
	return x >> 26
}

// rememberQueue notes on which queue pair a guest talks to the pod, so that
// the answers come back there.
func (g *guest) rememberQueue(f *frame.Frame) {
	s := &g.localQueue[localSlot(f)]
	if q := uint32(f.Queue); s.Load() != q {
		s.Store(q)
	}
}
