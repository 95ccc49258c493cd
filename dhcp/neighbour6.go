package dhcp

import (
	"net/netip"

	"sidewire/engine/frame"
)

// The addresses in a frame with IPv6.
const (
	src6At = frame.EthernetLen + 8
	dst6At = src6At + 16
)

// processND answers a solicitation that is for the router. h[l4At6] is its type.
func (s *Server6) processND(b *frame.Batch, f *frame.Frame) {
	kind := f.Head[l4At6]
	if kind == icmpRouterAdvert {
		s.foreign(f)
		return
	}
	o := s.offer.Load()
	if kind == icmpNeighbourAsk && (f.HeadLen < l4At6+24 || !o.owns([16]byte(f.Head[l4At6+8:l4At6+24]))) {
		return // another station's business
	}
	p := s.private(b, f, protoICMP6)
	if p == nil {
		return
	}
	m := p[l4At6:]
	least := 8
	if kind == icmpNeighbourAsk {
		least = 24
	}
	src, dst := netip.AddrFrom16([16]byte(p[src6At:dst6At])), netip.AddrFrom16([16]byte(p[dst6At:l4At6]))
	link, ok := sourceLink(m, least)
	// RFC 4861, sections 6.1.1 and 7.1.1.
	if p[21] != 255 || m[1] != 0 || !ok || src.IsMulticast() || src.IsUnspecified() && (link != nil || !dst.IsMulticast()) {
		s.bad(f, frame.BadTransport, false)
		return
	}
	f.Out = frame.Consumed
	sent := false
	if kind == icmpRouterSolicit {
		sent = o.answerRouter(b, f, src, link)
	} else {
		sent = o.answerNeighbour(b, f, src, link, m[8:24])
	}
	s.count(func(st *Stats6) {
		switch {
		case !sent:
		case kind == icmpRouterSolicit:
			st.RouterSolicits++
			st.Adverts++
		default:
			st.NeighbourSolicits++
		}
	})
	if !sent {
		f.Drop(frame.BatchFull)
	} else if kind == icmpRouterSolicit {
		s.advertised.Store(max(b.Now, 1))
	}
}

// owns says whether an address is the router's.
func (o *offer6) owns(a [16]byte) bool { return a == o.Gateway.As16() || a == o.router.As16() }

// sourceLink finds the sender's hardware address among the options of a
// solicitation whose fixed part has least bytes; nil: it has none. ok is false
// if the message is malformed.
func sourceLink(m []byte, least int) (mac []byte, ok bool) {
	if len(m) < least {
		return nil, false
	}
	for opt := m[least:]; len(opt) > 0; {
		if len(opt) < 8 {
			return nil, false
		}
		n := int(opt[1]) * 8
		if n == 0 || n > len(opt) {
			return nil, false
		}
		if opt[0] == ndSourceLink {
			mac = opt[2:8]
		}
		opt = opt[n:]
	}
	return mac, true
}

// answerRouter sends the advertisement to who asked, or to all if that has no
// address yet.
func (o *offer6) answerRouter(b *frame.Batch, f *frame.Frame, src netip.Addr, link []byte) bool {
	if src.IsUnspecified() {
		return o.sendICMP(b, f.Queue, frame.MAC{0x33, 0x33, 0, 0, 0, 1}, o.router, allNodes, o.advert)
	}
	return o.sendICMP(b, f.Queue, answerTo(f, link), o.router, src, o.advert)
}

// answerNeighbour says which hardware address target has. Who asks without an
// address is about to take it: all hear that it is taken (RFC 4862, section
// 5.4.4).
func (o *offer6) answerNeighbour(b *frame.Batch, f *frame.Frame, src netip.Addr, link, target []byte) bool {
	const router, solicited, override = 0x80, 0x40, 0x20
	flags, dst, mac := byte(router|solicited|override), src, answerTo(f, link)
	if src.IsUnspecified() {
		flags, dst, mac = router|override, allNodes, frame.MAC{0x33, 0x33, 0, 0, 0, 1}
	}
	m := make([]byte, 0, 32)
	m = append(append(m, icmpNeighbourAdvert, 0, 0, 0, flags, 0, 0, 0), target...)
	m = append(append(m, ndTargetLink, 1), o.ServerMAC[:]...)
	return o.sendICMP(b, f.Queue, mac, netip.AddrFrom16([16]byte(target)), dst, m)
}

// answerTo is whom an answer goes to: what the sender says, else whom it came
// from.
func answerTo(f *frame.Frame, link []byte) frame.MAC {
	if len(link) == 6 && link[0]&1 == 0 {
		return frame.MAC(link)
	}
	return frame.MAC(f.Src())
}
