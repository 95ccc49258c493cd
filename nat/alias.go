package nat

import (
	"encoding/binary"

	"sidewire/engine/frame"
)

// Alias is the addresses by which the pod's own processes know a guest and its
// gateway, where those that the guest has are another guest's too. The local
// tap owns Gateway; the guest never sees either. The zero value is none.
type Alias struct{ Guest, Gateway uint32 }

// toPod makes a packet of the guest's one that the pod's kernel can tell from
// other guests'. The frame is parsed.
func (a *Alias) toPod(f *frame.Frame, g *guest) {
	if a.Guest == 0 {
		return
	}
	readdress(f, ipSrc, g.IP, a.Guest)
	readdress(f, ipDst, g.Gateway, a.Gateway)
	requote(f, g.Gateway, a.Gateway, g.IP, a.Guest)
}

// toGuest undoes it for a packet of the pod's.
func (a *Alias) toGuest(f *frame.Frame, g *guest) {
	if a.Guest == 0 {
		return
	}
	readdress(f, ipDst, a.Guest, g.IP)
	readdress(f, ipSrc, a.Gateway, g.Gateway)
	requote(f, a.Guest, g.IP, a.Gateway, g.Gateway)
}

// arpToPod and arpToGuest do the same for ARP, whose length has been checked.
func (a *Alias) arpToPod(h []byte, g *guest) {
	if a.Guest != 0 {
		swap(h[arpSenderIP:], g.IP, a.Guest)
		swap(h[arpTargetIP:], g.Gateway, a.Gateway)
	}
}

func (a *Alias) arpToGuest(h []byte, g *guest) {
	if a.Guest != 0 {
		swap(h[arpSenderIP:], a.Gateway, g.Gateway)
		swap(h[arpTargetIP:], a.Guest, g.IP)
	}
}

// swap replaces the address at the start of b if it is old.
func swap(b []byte, old, new uint32) bool {
	if binary.BigEndian.Uint32(b) != old {
		return false
	}
	binary.BigEndian.PutUint32(b, new)
	return true
}

// readdress replaces an address of the IP header, if it is old, and keeps the
// checksums right. It is no hop.
func readdress(f *frame.Frame, at int, old, new uint32) {
	h := f.Head[f.L3:]
	if !swap(h[at:], old, new) {
		return
	}
	change := diff(old, new)
	addDiff(h[ipSum:], change)
	if !f.Frag && sumOffset(f.Proto) != 0 {
		fixSum(f, f.Head[f.L4:], change, 0)
	}
}

// requote does to the packet that an ICMP error quotes, from oldSrc to oldDst
// or either, what happened to it on its way. What is no sound error stays as
// it is, for its receiver to judge.
func requote(f *frame.Frame, oldSrc, src, oldDst, dst uint32) {
	if f.Proto != frame.ProtoICMP || f.Frag || !isError(f) {
		return
	}
	e, reason := parseEmbedded(f)
	if reason != frame.ReasonNone {
		return
	}
	if e.src == oldSrc {
		rewriteEmbedded(f, &e, ipSrc, src, portSrc, e.first)
	}
	if e.dst == oldDst {
		rewriteEmbedded(f, &e, ipDst, dst, portSrc, e.first)
	}
}
