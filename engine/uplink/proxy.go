package uplink

import (
	"net/netip"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Proxy says that what a guest speaks TCP with goes by way of a proxy among the pod's processes, as Istio's does it: the guest's
// connections go to that, and what has come from outside to the proxy goes on to the guest. Guest.Ports are then those that
// need not pass it. IPv4 only, as under KubeVirt.
type Proxy struct {
	// Out is the TCP port that the guest's connections go to. The proxy asks for whom they were (SO_ORIGINAL_DST).
	Out uint16
	// Source is the loopback address that the proxy comes from, beside 127.0.0.1.
	Source netip.Addr
	// Ports lead to the guest from inside the pod, at 127.0.0.1 and at the pod's address. None means all but Own.
	Ports []Port
	// Own are TCP ports of the proxy.
	Own []uint16
}

// proxyPriority comes before that of DNAT: the proxy's own rules there are for what comes from outside.
const proxyPriority = -101

// Offsets of ports in TCP and UDP.
const dstPort = 2

// inboundProxyRules lead connections from inside the pod to the i-th guest.
func (p *Pod) inboundProxyRules(r *rules, i int) {
	g := p.c.Guests[i]
	tcp := protocol(frame.ProtoTCP)
	for _, to := range [][]byte{loopback, p.c.Pod.AsSlice()} {
		here := []any{ipField(offDst, 4, reg1), is(to...)}
		lead := nat(expr.NATTypeDestNAT, g.Addr.AsSlice())
		if len(g.Proxy.Ports) == 0 {
			for _, own := range g.Proxy.Own {
				r.add("output", here, tcp, thField(dstPort, 2, reg1), is(be16(own)...), accept())
			}
			r.add("output", here, lead)
			continue
		}
		for _, port := range g.Proxy.Ports {
			r.add("output", here, protocol(port.Proto), thField(dstPort, 2, reg1),
				cmp(expr.CmpOpGte, be16(port.Port)...), cmp(expr.CmpOpLte, be16(port.last())...), lead)
		}
	}
	for _, from := range [][]byte{loopback, g.Proxy.Source.AsSlice()} {
		r.add("postrouting", toTap(p.taps[i]), ipField(offSrc, 4, reg1), is(from...), nat(expr.NATTypeSourceNAT, g.Gateway.Addr().AsSlice()))
	}
}

// outboundProxyRules lead the guest's connections to the proxy. What is for the pod itself stays as it is.
func (p *Pod) outboundProxyRules(r *rules, i int) {
	g := p.c.Guests[i]
	tap := make([]byte, unix.IFNAMSIZ)
	copy(tap, p.taps[i].Name())
	r.add("prerouting", &expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg1}, is(tap...), ipField(offSrc, 4, reg1), is(g.Addr.AsSlice()...),
		ipField(offDst, 4, reg1), isNot(g.Gateway.Addr().AsSlice()...), isNot(p.c.Pod.AsSlice()...), protocol(frame.ProtoTCP),
		&expr.Immediate{Register: reg1, Data: be16(g.Proxy.Out)}, &expr.Redir{RegisterProtoMin: reg1})
}

// proxyRules are those of all guests with a proxy.
func (p *Pod) proxyRules(r *rules, everything bool) {
	for i, g := range p.c.Guests {
		if g.Proxy != nil && (len(g.Proxy.Ports) == 0) == everything {
			p.inboundProxyRules(r, i)
			p.outboundProxyRules(r, i)
		}
	}
}
