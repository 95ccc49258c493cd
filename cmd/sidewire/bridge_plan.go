package main

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"

	"sidewire/engine/uplink"
	"sidewire/engine/vmi"
)

// linkState is where it is written down what links were that guests have the
// place of.
func (o *options) linkState() string { return filepath.Join(o.statePath(), "links") }

// podLink is the link whose place an interface's guest takes, and how it is by
// itself; an empty name for an interface that is joined otherwise. It is the
// pod's own link, or one that a CNI left for another network with an address,
// which is to be the guest's.
func podLink(o *options, vm vmi.VM, i vmi.Interface) (name string, v *uplink.LinkView, err error) {
	if i.Binding != vmi.Bridge {
		return "", nil, nil
	}
	netns := netnsOf(o, vm)
	if i.Network.Default {
		name = o.uplinkOf(i.Name)
	} else if i.Network.NAD != nil && len(o.lanUplinks(i)) == 0 {
		if name, err = cniLink(netns, i.Network); err != nil {
			return "", nil, err
		}
	}
	if name == "" {
		return "", nil, nil
	}
	err = uplink.InNetNS(netns, func() error {
		v, err = uplink.ViewLink(o.linkState(), name)
		return err
	})
	switch {
	case err != nil:
		return "", nil, bridgeError(err)
	case !i.Network.Default && !v.Address().IsValid():
		return "", nil, nil
	}
	return name, v, nil
}

// adoptLinks gives guests that take a link's place its hardware address, unless
// the spec names another.
func adoptLinks(o *options, vms []vmi.VM) error {
	for _, vm := range vms {
		for j := range vm.Interfaces {
			i := &vm.Interfaces[j]
			if i.MAC != nil && !i.MACMade {
				continue
			}
			name, v, err := podLink(o, vm, *i)
			if err != nil {
				return fmt.Errorf("%s/%s: %w", vm.Name, i.Name, err)
			}
			if name != "" {
				i.MAC, i.MACMade = net.HardwareAddr(v.MAC[:]), false
			}
		}
	}
	return nil
}

// addBridge plans an interface that takes a link's place. It says no if the
// interface is joined otherwise.
func (p *plan) addBridge(o *options, n nic) (bool, error) {
	name, v, err := podLink(o, n.vm, n.iface)
	if err != nil {
		return false, fmt.Errorf("%s: %w", n.name(), err)
	}
	if name == "" {
		return false, nil
	}
	b := &podBridge{nic: n, netns: netnsOf(o, n.vm), link: name, view: v}
	if w := n.iface.Network; w.Default && !w.Pod && !v.HasAddress() {
		return false, badInput("%s: link %s has no address, and a network in the place of the pod network must have one: look at the ipam of %s",
			n.name(), name, w.NetworkName)
	}
	err = uplink.InNetNS(b.netns, func() error {
		b.kind, err = uplink.KindOf(name)
		return err
	})
	if err != nil {
		return false, bridgeError(err)
	}
	if o.forcesMACNAT(n.iface) && !b.kind.OneMAC {
		b.kind = uplink.LinkKind{Name: forced, OneMAC: true}
	}
	p.bridges = append(p.bridges, b)
	p.all = append(p.all, b)
	return true, nil
}

// withAddress names the address that is to be the guest's, if there is one.
func (b *podBridge) withAddress() string {
	if a := b.view.Address(); a.IsValid() {
		return fmt.Sprintf(" (%s)", a)
	}
	return ""
}

// checkBridges refuses whatever else would use a link whose place a guest takes.
func checkBridges(p *plan) error {
	owner := map[string]*podBridge{}
	for _, b := range p.bridges {
		key := b.netns + " " + b.link
		if other := owner[key]; other != nil {
			return badInput("%s and %s would both take the place of link %s%s, where is room for one guest: give one another network, or a namespace of its own with -f FILE@NETNS",
				other.name(), b.name(), b.link, b.withAddress())
		}
		owner[key] = b
	}
	for _, q := range p.pods {
		if b := owner[q.netns+" "+q.link]; b != nil {
			return badInput("%s lives behind the address of %s, which %s takes: give one a namespace of its own with -f FILE@NETNS", q.name(), b.link, b.name())
		}
	}
	for _, l := range p.lans {
		for _, link := range l.links {
			if b := owner[l.netns+" "+link]; b != nil {
				return badInput("link %s would be the uplink of %s, but %s takes its place", link, l.name, b.name())
			}
		}
	}
	for _, n := range p.users {
		for _, b := range p.bridges {
			if b.iface.Network.Default && b.netns == n.netns {
				return badInput("%s uses the sockets of a namespace whose address %s takes: give one a namespace of its own with -f FILE@NETNS", n.name(), b.name())
			}
		}
	}
	return nil
}

// bridgeError says who has to mend what the host refused.
func bridgeError(err error) error {
	switch {
	case errors.Is(err, uplink.ErrNoLink):
		return hostError(err)
	case errors.Is(err, uplink.ErrLinkKind):
		return inputError{err}
	case errors.Is(err, uplink.ErrPrivilege):
		return machineError{fmt.Errorf("%w: run as root or grant it with: setcap cap_net_admin,cap_net_raw,cap_sys_admin+ep sidewire; or use masquerade: {}", err)}
	case errors.Is(err, uplink.ErrState):
		return machineError{fmt.Errorf("%w; name another with --state-dir", err)}
	}
	return machineError{err}
}
