package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"sidewire/dhcp"
	"sidewire/engine"
	"sidewire/engine/frame"
	"sidewire/engine/uplink"
	"sidewire/nat/usernet"
)

// userNIC6 is the IPv6 side of a guest on sockets.
type userNIC6 struct {
	pod    netip.Addr    // the pod's address, not valid if it has none
	router *dhcp.Server6 // nil: the guest has none
	net    *usernet.Net
}

// podAddr is the first address of a family that a link has for others than its
// neighbours, not valid if it has none.
func podAddr(l netlink.Link, family int) netip.Addr {
	addrs, _ := netlink.AddrList(l, family)
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.Unmap().IsGlobalUnicast() {
			return ip.Unmap()
		}
	}
	return netip.Addr{}
}

// hasSix says whether the guest has IPv6, and hasFour whether it has IPv4: what
// the pod's link has, as under KubeVirt. A pod without any address is taken for
// one with IPv4. Slirp is IPv4's.
func (n *userNIC) hasSix() bool {
	return !n.slirp() && n.six.pod.IsValid() && n.iface.Network.CIDR6.IsValid() && n.mtu >= minMTU6
}

func (n *userNIC) hasFour() bool { return n.pod.IsValid() || !n.hasSix() }

// relayPlace is on the loopback, and at the gateway as the guest sees it: by
// IPv4, unless the guest has none.
func (n *userNIC) relayPlace() relayPlace {
	net, at := n.iface.Network, netip.AddrPortFrom(loopback, 0)
	p := relayPlace{netns: n.netns, shown: n.resolverAddr(), leased: n.slirp(), inside: net.CIDR}
	if !n.hasFour() {
		at, p.inside = netip.AddrPortFrom(netip.IPv6Loopback(), 0), net.CIDR6
	}
	p.at, p.allow = at, netip.PrefixFrom(at.Addr(), at.Addr().BitLen())
	return p
}

// openFamilies fills in what differs between the guest's families in a
// configuration of its network, and opens those that it has.
func (n *userNIC) openFamilies(s *server, c usernet.Config, relay []usernet.Service) (err error) {
	net := n.iface.Network
	if n.hasFour() {
		c.Guest, c.Gateway, c.Prefix, c.Services = net.Guest, net.Gateway, net.CIDR, relay
		if n.net, err = usernet.New(c); err != nil {
			return cannot("%w", err)
		}
		s.onStop(n.net.Close)
		relay = nil
	}
	if !n.hasSix() {
		return nil
	}
	c.Guest, c.Gateway, c.Prefix, c.Services, c.Beside = net.Guest6, net.Gateway6, net.CIDR6, relay, n.net
	if n.six.net, err = usernet.New(c); err != nil {
		return cannot("%w", err)
	}
	s.onStop(n.six.net.Close)
	return nil
}

// nets are the guest's networks, by family.
func (n *userNIC) nets() (out []*usernet.Net) {
	if n.net != nil {
		out = append(out, n.net)
	}
	if n.six.net != nil {
		out = append(out, n.six.net)
	}
	return out
}

// stages are those of the guest's port. That of IPv4 drops what none of the
// others knows.
func (n *userNIC) stages() (out []engine.Stage) {
	if n.dhcp != nil {
		out = append(out, n.dhcp)
	}
	if n.six.net != nil {
		out = append(out, n.six.router, n.six.net)
	}
	if n.net != nil {
		out = append(out, n.net)
	}
	return out
}

// learn tells the guest's networks its hardware address.
func (n *userNIC) learn(m frame.MAC) {
	for _, net := range n.nets() {
		net.LearnMAC(m)
	}
}

// config6 is what the guest is told of its IPv6 network. Where the relay knows
// more than the pod's resolvers, it alone is asked, by IPv4 if there is that.
func (n *userNIC) config6() dhcp.Config6 {
	net, resolv := n.iface.Network, n.dns.config()
	c := dhcp.Config6{
		Port: n.port, Address: netip.PrefixFrom(net.Guest6, net.CIDR6.Bits()), Gateway: net.Gateway6, ServerMAC: n.gatewayMAC(),
		Search: resolv.SearchDomains(n.vm.Subdomain), MTU: n.mtu,
		OnLease: func(m frame.MAC) {
			n.learn(m)
			n.book.leased()
		},
	}
	switch {
	case n.dns.shown.Is6():
		c.DNS, _ = n.dns.servers(resolv)
	case !n.dns.leased:
		c.DNS = servers6(resolv)
	}
	// The file of a URL is fetched by itself; a name wants a server of IPv4.
	if url := n.iface.DHCP.BootFile; strings.Contains(url, "://") {
		c.BootURL = url
	}
	return c
}

// update lets the guest know what has changed of its network.
func (n *userNIC) update(s *server, o *options) {
	if n.dhcp != nil {
		n.renew(s, n.dhcpConfig(o))
	}
	if n.six.router == nil {
		return
	}
	if err := n.six.router.Update(n.config6()); err != nil {
		s.log.Warn("the guest's IPv6 network stays as it was", "interface", n.name(), "err", err)
	}
}

// status6 adds the guest's IPv6 side.
func (n *userNIC) status6(st *InterfaceStatus) {
	if n.six.net == nil {
		return
	}
	x, net := n.six.net.Stats(), n.iface.Network
	st.IPv6 = &IPv6Status{Pod: n.six.pod, Guest: net.Guest6, Gateway: net.Gateway6, Router: n.six.router.Stats(), Sockets: &x}
	st.Leases = append(st.Leases, n.six.router.Leases()...)
}

// of are the guest's networks that a forward is for: one at all addresses is for
// both families.
func (n *userNIC) of(f usernet.Forward) (out []*usernet.Net) {
	if n.net != nil && (!f.Addr.IsValid() || f.Addr.Is4()) {
		out = append(out, n.net)
	}
	if n.six.net != nil && (!f.Addr.IsValid() || f.Addr.Is6()) {
		out = append(out, n.six.net)
	}
	return out
}

// forward lets a port of the pod's lead to the guest, in all families or none.
func (n *userNIC) forward(f usernet.Forward) error {
	nets := n.of(f)
	if len(nets) == 0 {
		return fmt.Errorf("forward %s: %s has no network of that family", f, n.name())
	}
	for k, net := range nets {
		if err := net.AddForward(f); err != nil {
			for _, done := range nets[:k] {
				err = errors.Join(err, done.RemoveForward(f))
			}
			return err
		}
	}
	return nil
}

// unforward undoes forward.
func (n *userNIC) unforward(f usernet.Forward) error {
	nets := n.of(f)
	if len(nets) == 0 {
		return fmt.Errorf("forward %s: there is none", f)
	}
	var errs []error
	for _, net := range nets {
		errs = append(errs, net.RemoveForward(f))
	}
	return errors.Join(errs...)
}

// forwarded are the ports that lead to the guest by sockets of their own.
func (n *userNIC) forwarded() (out []usernet.Forward) {
	for _, net := range n.nets() {
		for _, f := range net.Forwards() {
			if !slices.Contains(out, f) {
				out = append(out, f)
			}
		}
	}
	return out
}

// sockets is what the guest has of the socket path, by family.
func (i *InterfaceStatus) sockets() (out []*usernet.Stats) {
	if i.Sockets != nil {
		out = append(out, i.Sockets)
	}
	if i.IPv6 != nil && i.IPv6.Sockets != nil {
		out = append(out, i.IPv6.Sockets)
	}
	return out
}

// inRange says whether a forward is a port of the ranges that the VMI lists.
func (n *userNIC) inRange(f usernet.Forward) bool {
	return !f.Addr.IsValid() && f.Port == f.Guest && slices.ContainsFunc(n.ranges, func(p uplink.Port) bool {
		return p.Proto == f.Proto && p.Port <= f.Port && f.Port <= p.Last
	})
}
