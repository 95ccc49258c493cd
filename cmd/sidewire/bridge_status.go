package main

import (
	"fmt"
	"io"
	"net/netip"

	"sidewire/engine/frame"
	"sidewire/engine/uplink"
	"sidewire/engine/vmi"
)

// TakenStatus is the link whose place a guest has.
type TakenStatus struct {
	LinkMAC   frame.MAC          `json:"linkMAC"` // its own
	NowMAC    frame.MAC          `json:"nowMAC"`  // what it has meanwhile
	Addresses []netip.Prefix     `json:"addresses"`
	Routes    []uplink.LinkRoute `json:"routes"`
	Silence   uplink.Silence     `json:"silence"` // what keeps the pod's kernel from speaking on it
	StateFile string             `json:"stateFile"`
	Resumed   bool               `json:"resumed"` // after a crash
	MACNAT    *MACNATStatus      `json:"macNAT,omitempty"`
}

// MigrationStatus says whether the guest could be migrated as KubeVirt sees it.
type MigrationStatus struct {
	Possible bool   `json:"possible"`
	Why      string `json:"why,omitempty"` // not
}

// migration is KubeVirt's rule: a guest that has the pod's own address cannot
// keep it on another node.
func migration(vm vmi.VM, i vmi.Interface) *MigrationStatus {
	if i.Binding == vmi.Bridge && i.Network.Pod && !vm.MigrateBridge {
		return &MigrationStatus{Why: "cannot migrate VMI which does not use masquerade or a migratable plugin to connect to the pod network"}
	}
	return &MigrationStatus{Possible: true}
}

func (b *podBridge) forwards() []forwardRequest { return nil }

func (b *podBridge) status(*server) InterfaceStatus {
	st := b.nic.status()
	v := &b.view.Saved
	st.MAC, st.MTU, st.Link, st.Links, st.Migration = b.mac().String(), v.MTU, b.link, b.links.Status(), migration(b.vm, b.iface)
	st.Taken = &TakenStatus{
		LinkMAC: v.MAC, NowMAC: v.StandIn, Addresses: append(append([]netip.Prefix{}, v.Addrs...), v.Addrs6...),
		Routes: append([]uplink.LinkRoute{}, v.Routes...), Silence: b.host.Silence(), StateFile: b.host.StateFile(), Resumed: b.host.Resumed,
	}
	if v.StandIn == (frame.MAC{}) {
		st.Taken.NowMAC = v.MAC
	}
	if b.nat != nil {
		st.Taken.MACNAT = &MACNATStatus{b.link, v.MAC, b.kind.Name, b.nat.Stats()}
	}
	if a := v.Address(); a.IsValid() {
		// The pod's address is the guest's: KubeVirt reports it as both.
		st.Pod, st.Guest = a.Addr(), a.Addr()
		st.Gateway, _ = podRoutes(v)
	}
	return st
}

// printTaken writes what status says of a guest that has a link's place.
func printTaken(w io.Writer, i InterfaceStatus) {
	t := i.Taken
	fmt.Fprintf(w, "  link\t%s has its place: address %s now, %s before; silent by %s\n", linkList(i.Links), t.NowMAC, t.LinkMAC, t.Silence)
	switch {
	case i.Guest.IsValid() && i.Gateway.IsValid():
		fmt.Fprintf(w, "  address\t%s by DHCP, gateway %s\n", i.Guest, i.Gateway)
	case i.Guest.IsValid():
		fmt.Fprintf(w, "  address\t%s by DHCP, no gateway\n", i.Guest)
	default:
		fmt.Fprintf(w, "  address\tnone: the link had no IPv4 address, so there is no DHCP\n")
	}
	if n := t.MACNAT; n != nil {
		fmt.Fprintf(w, "  \tthe guest's hardware address is translated to %s (%s)\n", n.MAC, n.Kind)
	}
	fmt.Fprintf(w, "  state\t%s\n", t.StateFile)
	if m := i.Migration; m != nil && !m.Possible {
		fmt.Fprintf(w, "  migration\t%s\n", m.Why)
	}
	printLeases(w, i)
}
