package main

import (
	"errors"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"sidewire/engine/uplink"
	"sidewire/engine/vmi"
)

// served is an interface of a guest, whatever it is joined to.
type served interface {
	base() *nic
	status(s *server) InterfaceStatus
	forwards() []forwardRequest // nil: everything
}

// plan is what is to be served.
type plan struct {
	pods  []*pod
	lans  []*lan
	users []*userNIC
	// bridges are guests that take a link's place.
	bridges []*podBridge
	// handoffs are guests that get a device of the kernel's.
	handoffs []*handoffNIC
	all      []served // in the order of the files
}

// planAll finds for every interface what it is joined to: the address of a
// namespace, sockets of ours, or a switch.
func planAll(o *options, vms []vmi.VM) (*plan, error) {
	if err := errors.Join(checkUplinks(o, vms), checkMACNAT(o, vms)); err != nil {
		return nil, err
	}
	if err := adoptLinks(o, vms); err != nil {
		return nil, err
	}
	p := &plan{}
	pods, lans := map[string]*pod{}, map[string]*lan{}
	for _, vm := range vms {
		for _, i := range vm.Interfaces {
			n := nic{vm: vm, iface: i, socket: o.socketPath(vm.Name, i.Name), order: len(p.all)}
			if err := checkSocketPath(n.socket); err != nil {
				return nil, err
			}
			if handedOver(i) {
				p.addHandoff(o, n)
				continue
			}
			taken, err := p.addBridge(o, n)
			switch {
			case taken || err != nil:
			case i.Binding == vmi.Bridge && i.Network.NAD != nil:
				err = p.addLAN(o, n, lans)
			case onSockets(o, i):
				p.addUser(o, n)
			default:
				err = p.addPod(o, n, pods)
			}
			if err != nil {
				return nil, err
			}
		}
	}
	return p, errors.Join(checkLinks(p), checkBridges(p), checkUserFlags(o, p), p.planFunctions(o, vms))
}

func (p *plan) addPod(o *options, n nic, pods map[string]*pod) error {
	netns, link := netnsOf(o, n.vm), o.uplinkOf(n.iface.Name)
	q := pods[netns+" "+link]
	if q == nil {
		q = &pod{netns: netns, link: link}
		pods[netns+" "+link] = q
		p.pods = append(p.pods, q)
	}
	g := &podNIC{nic: n}
	p.all = append(p.all, g)
	return q.add(g)
}

// addLAN puts an interface on the switch that its definition names. Where its
// CNI has left a link for it, the node's bridge is behind that: the switch is
// then that link's.
func (p *plan) addLAN(o *options, n nic, lans map[string]*lan) error {
	netns, sw := netnsOf(o, n.vm), n.iface.Network.NAD.Switch
	links := o.lanUplinks(n.iface)
	l := &lan{netns: netns, name: sw.Bridge, ovs: sw.OVS}
	key := netns + " bridge " + sw.Bridge
	if sw.OVS {
		key = netns + " ovs " + sw.Bridge
	}
	if len(links) == 0 {
		cni, err := cniLink(netns, n.iface.Network)
		if err != nil {
			return err
		}
		switch {
		case cni != "":
			l.name, l.cni, links = cni, true, []string{cni}
			key = netns + " link " + cni
		case sw.Bridge == "":
			return noCNILink(n)
		}
	} else if sw.Bridge == "" {
		l.name = links[0]
		key = netns + " link " + links[0]
	}
	if lans[key] == nil {
		lans[key] = l
		p.lans = append(p.lans, l)
	}
	l = lans[key]
	for _, link := range links {
		if !slices.Contains(l.links, link) {
			l.links = append(l.links, link)
		}
	}
	g := &lanNIC{nic: n, lan: l}
	l.nics = append(l.nics, g)
	p.all = append(p.all, g)
	return nil
}

// noCNILink says what is missing for a network of a type that we do not stand
// in for.
func noCNILink(n nic) error {
	nad, w := n.iface.Network.NAD, n.iface.Network
	return badInput("%s: NetworkAttachmentDefinition %s (%s:%d) is of type %q, and the link that its CNI plugin leaves is not there (%s or %s); "+
		"run the plugin first, name a link with --uplink %s=LINK, or use one of the types that need none: %s",
		n.name(), nad.Key(), nad.File, nad.Line, nad.Type, w.Link, w.Ordinal, n.iface.Name, strings.Join(vmi.ServedTypes, ", "))
}

// cniLink is the link that its CNI left for a network, empty if there is none.
func cniLink(netns string, network vmi.Network) (name string, err error) {
	err = uplink.InNetNS(netns, func() error {
		for _, link := range []string{network.Link, network.Ordinal} {
			l, err := netlink.LinkByName(link)
			if err == nil && l.Attrs().EncapType == "ether" {
				name = link
				return nil
			}
			if err != nil && !errors.As(err, new(netlink.LinkNotFoundError)) {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return "", hostError(err)
	}
	return name, nil
}

// lanUplinks are the links that --uplink gives to the network of an interface,
// by the name of the VMI's network or of the definition.
func (o *options) lanUplinks(i vmi.Interface) (links []string) {
	nad := i.Network.NAD
	for _, u := range o.uplinks {
		n, l, _ := strings.Cut(u, "=")
		if n == i.Name || n == nad.Name || n == nad.Key() {
			links = append(links, l)
		}
	}
	return links
}

// checkUplinks refuses an uplink of a network that nobody has.
func checkUplinks(o *options, vms []vmi.VM) error {
	var names []string
	for _, vm := range vms {
		for _, i := range vm.Interfaces {
			names = append(names, i.Name)
			if nad := i.Network.NAD; nad != nil {
				names = append(names, nad.Name, nad.Key())
			}
		}
	}
	for _, u := range o.uplinks {
		if n, _, _ := strings.Cut(u, "="); !slices.Contains(names, n) {
			slices.Sort(names)
			return badInput("--uplink %s: no VMI has the network %s; there are: %s", u, n, strings.Join(slices.Compact(names), ", "))
		}
	}
	return nil
}

// checkLinks refuses a link that two switches would have as their uplink: each
// would get the other's frames.
func checkLinks(p *plan) error {
	owner := map[string]*lan{}
	for _, l := range p.lans {
		for _, link := range l.links {
			if other := owner[l.netns+" "+link]; other != nil {
				return badInput("--uplink: link %s would be the uplink of two switches, %s and %s; give each its own", link, other.name, l.name)
			}
			owner[l.netns+" "+link] = l
		}
	}
	return nil
}
