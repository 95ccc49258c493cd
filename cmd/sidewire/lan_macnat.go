package main

import (
	"fmt"
	"os"
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
	s.log.Info("guests' hardware addresses are translated", "switch", l.name, "link", u.link, "kind", u.kind.Name, "mac", u.mac.String())
	if u.kind.ByIP {
		return keepGuestAddrs(s, u.link, u.nat)
	}
	if b, _ := os.ReadFile("/proc/sys/net/ipv4/conf/" + u.link + "/forwarding"); strings.TrimSpace(string(b)) == "1" {
		s.log.Warn("the kernel forwards what is for the guests a second time, since it has the hardware address too",
			"link", u.link, "mend", "sysctl -w net.ipv4.conf."+u.link+".forwarding=0")
	}
	w, err := uplink.WatchAddrs(u.link, u.nat.SetHost)
	if err != nil {
		return err
	}
	s.onStop(func() error { w.Close(); return nil })
	return nil
}

// keepGuestAddrs lets a link have the addresses of its guests.
func keepGuestAddrs(s *server, link string, nat *engine.MACNAT) error {
	g, err := uplink.KeepGuestAddrs(link, nat.Learned(), nat.Addresses, func(err error) {
		s.log.Warn("what is for this address does not reach the guest", "link", link, "err", err)
	})
	if err != nil {
		return err
	}
	s.onStop(func() error { g.Close(); return nil })
	return nil
}

// silence keeps the kernel from speaking on a link that must have the guests'
// addresses. The link is the guests' from then on.
func (l *lan) silence(s *server, o *options, u *lanUplink) error {
	if err := uplink.DropGuestAddrs(u.link); err != nil {
		return err
	}
	v, err := uplink.ViewLink(o.linkState(), u.link)
	if err != nil {
		return err
	}
	if a := v.Address(); a.IsValid() {
		return fmt.Errorf("%w: %s is an %s with the address %s; its kernel delivers by IP address, so that it cannot be the host's and guests' at once: take the address away, or name another link with --uplink",
			uplink.ErrLinkKind, u.link, u.kind.Name, a)
	}
	d, err := uplink.Delegate(uplink.DelegateConfig{Link: u.link, StateDir: o.linkState(), Owner: "switch " + l.name, KeepMAC: true, KeepAddrs: true})
	if err != nil {
		return err
	}
	s.onStop(d.Restore)
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
