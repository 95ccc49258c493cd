package main

import (
	"net/netip"
	"slices"
	"strings"

	"sidewire/engine"
	"sidewire/engine/frame"
	"sidewire/engine/uplink"
	"sidewire/engine/vmi"
)

// MACNATStatus is the translation of guests' hardware addresses on a link.
type MACNATStatus struct {
	Link string    `json:"link"`
	MAC  frame.MAC `json:"mac"`  // that the link's frames have
	Kind string    `json:"kind"` // of the link, or why else
	engine.MACNATStats
}

// forcesMACNAT says whether a flag asks for the translation on the uplinks of an
// interface's network.
func (o *options) forcesMACNAT(i vmi.Interface) bool {
	nad := i.Network.NAD
	return slices.ContainsFunc(o.macNAT, func(n string) bool {
		return n == i.Name || nad != nil && (n == nad.Name || n == nad.Key())
	})
}

// checkMACNAT refuses --mac-nat for a network that nobody has.
func checkMACNAT(o *options, vms []vmi.VM) error {
	var names []string
	for _, vm := range vms {
		for _, i := range vm.Interfaces {
			names = append(names, i.Name)
			if nad := i.Network.NAD; nad != nil {
				names = append(names, nad.Name, nad.Key())
			}
		}
	}
	for _, n := range o.macNAT {
		if !slices.Contains(names, n) {
			slices.Sort(names)
			return badInput("--mac-nat %s: no VMI has that network; there are: %s", n, strings.Join(slices.Compact(names), ", "))
		}
	}
	return nil
}

// forced is the kind of a link on which a flag asks for the translation.
const forced = "--mac-nat"

// kindOf says how hardware addresses pass a link.
func (l *lan) kindOf(o *options, link string) (uplink.LinkKind, error) {
	k, err := uplink.KindOf(link)
	if err != nil || k.OneMAC {
		return k, err
	}
	for _, n := range l.nics {
		if o.forcesMACNAT(n.iface) {
			return uplink.LinkKind{Name: forced, OneMAC: true}, nil
		}
	}
	return k, nil
}

// translate puts a translation on an uplink. What is for the link's own IP
// addresses stays with the host.
func (l *lan) translate(s *server, u *lanUplink) error {
	var macs []frame.MAC
	for _, n := range l.nics {
		macs = append(macs, n.mac())
	}
	u.nat = engine.NewMACNAT(engine.MACNATConfig{Link: u.mac, Guests: macs, Shared: u.kind.Shared}, s.engine.Workers())
	w, err := uplink.WatchAddrs(u.link, func(addrs []netip.Addr) { u.nat.SetHost(addrs) })
	if err != nil {
		return err
	}
	s.onStop(func() error { w.Close(); return nil })
	s.log.Info("guests' hardware addresses are translated", "switch", l.name, "link", u.link, "kind", u.kind.Name, "mac", u.mac.String())
	return nil
}

// oneMAC says whether some uplink translates.
func (l *lan) oneMAC() bool {
	return slices.ContainsFunc(l.ups, func(u *lanUplink) bool { return u.nat != nil })
}

// guestHas says whether a guest has the hardware address of a link, as one that
// its CNI was told.
func (l *lan) guestHas(m frame.MAC) bool {
	return slices.ContainsFunc(l.nics, func(n *lanNIC) bool { return n.mac() == m })
}

func (l *lan) macNATStatus() (out []MACNATStatus) {
	for _, u := range l.ups {
		if u.nat != nil {
			out = append(out, MACNATStatus{u.link, u.mac, u.kind.Name, u.nat.Stats()})
		}
	}
	return out
}
