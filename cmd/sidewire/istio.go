package main

import (
	"net/netip"

	"sidewire/engine/uplink"
	"sidewire/engine/vmi"
)

// What KubeVirt and Istio have agreed upon: a guest beside Istio's proxy gets of what comes from outside port 22 alone, and all else
// from the proxy, to which its own connections go.
var (
	istioDirect = []vmi.Port{{Protocol: "TCP", Port: 22}}
	istioSource = netip.AddrFrom4([4]byte{127, 0, 0, 6})
	istioOwn    = []uint16{15000, 15001, 15004, 15006, 15008, 15009, 15020, 15021, 15053, 15090}
)

const istioOut = 15001

// published are the ports that lead from outside to the guest, none for all.
func (n *podNIC) published() []vmi.Port {
	if n.vm.Istio {
		return istioDirect
	}
	return n.iface.Ports
}

// proxy is what stands between the guest and the outside, nil if nothing does.
func (n *podNIC) proxy() *uplink.Proxy {
	if !n.vm.Istio {
		return nil
	}
	return &uplink.Proxy{Out: istioOut, Source: istioSource, Ports: uplinkPorts(n.iface.Ports), Own: istioOwn}
}
