package main

import (
	"context"
	"net/netip"
	"strings"

	"sidewire/dhcp"
	"sidewire/engine"
	"sidewire/engine/frame"
	"sidewire/engine/uplink"
	"sidewire/nat"
	"sidewire/nat/usernet"
)

// pod6 is the IPv6 side of a pod, which it has if its link has an address of
// that family, as under KubeVirt.
type pod6 struct {
	nics   []*podNIC // who has it too
	router *uplink.Router6
	nat    *nat.Masquerade6
}

// podNIC6 is the IPv6 side of a guest.
type podNIC6 struct {
	index  int           // among those of the pod that have one
	router *dhcp.Server6 // nil: the guest has none
}

// hasSix says whether the guest can have IPv6 beside the pod's others: the pod's
// kernel can tell guests apart by their addresses only.
func (n *podNIC) hasSix() bool {
	net := n.iface.Network
	if !net.CIDR6.IsValid() {
		return false
	}
	for _, other := range n.pod.nics {
		if other == n {
			return true
		}
		if other.iface.Network.CIDR6.Overlaps(net.CIDR6) {
			return false
		}
	}
	return true
}

// uplinkGuest is the guest as its pod's namespace is prepared for it.
func (n *podNIC) uplinkGuest() uplink.Guest {
	g := uplink.Guest{Addr: n.guestIP, Gateway: n.gateway, Ports: uplinkPorts(n.published()), Proxy: n.proxy()}
	if net := n.iface.Network; n.hasSix() {
		g.Addr6, g.Gateway6 = net.Guest6, netip.PrefixFrom(net.Gateway6, net.CIDR6.Bits())
	}
	return g
}

// minMTU6 is the smallest MTU of a link with IPv6.
const minMTU6 = 1280

// open6 says who has IPv6.
func (p *pod) open6(s *server) (err error) {
	if !p.host.Addr6().IsValid() {
		return nil
	}
	if p.host.MTU() < minMTU6 {
		s.log.Warn("guests get no IPv6: it needs an MTU of 1280", "interface", p.name(), "mtu", p.host.MTU())
		return nil
	}
	if p.six.router, err = uplink.NewRouter6(p.link); err != nil {
		return err
	}
	s.onStop(func() error { p.six.router.Close(); return nil })
	for _, n := range p.nics {
		if !n.hasSix() {
			s.log.Warn("the guest gets no IPv6: its network is that of another guest of the pod; give it another vmIPv6NetworkCIDR, or a namespace of its own", "interface", n.name())
			continue
		}
		n.six.index = len(p.six.nics)
		p.six.nics = append(p.six.nics, n)
	}
	return nil
}

// wire6 makes the NAT of IPv6.
func (p *pod) wire6(ctx context.Context, c nat.Config) (err error) {
	if len(p.six.nics) == 0 {
		return nil
	}
	c6 := nat.Config6{
		Uplink: c.Uplink, KernelPort: c.KernelPort, Router: p.six.router, Local: p.six.router, External: p.host.Addr6().As16(),
		PortRange: c.PortRange, KernelRange: c.KernelRange, PortFree: c.PortFree,
	}
	for _, n := range p.six.nics {
		net := n.iface.Network
		c6.Guests = append(c6.Guests, nat.Guest6{
			Port: n.port, LocalTap: n.tap, IP: net.Guest6.As16(), Gateway: net.Gateway6.As16(), Prefix: net.CIDR6.Bits(),
			MAC: n.mac(), MTU: p.host.MTU(), Ports: natForwards(n.published()),
		})
	}
	if p.six.nat, err = nat.New6(c6); err != nil {
		return err
	}
	go p.six.nat.Run(ctx, engine.Now)
	return nil
}

// inbound are the stages of what the uplink receives.
func (p *pod) inbound() (stages []engine.Stage) {
	if p.six.nat != nil {
		stages = append(stages, p.six.nat.Inbound())
	}
	if p.nat != nil { // the last one, which drops what it does not know
		stages = append(stages, p.nat.Inbound())
	}
	return stages
}

// learn tells whoever translates for the guest its hardware address.
func (n *podNIC) learn(m frame.MAC) {
	if n.pod.nat != nil {
		n.pod.nat.LearnMAC(n.index, m)
	}
	if n.six.router != nil && n.pod.six.nat != nil {
		n.pod.six.nat.LearnMAC(n.six.index, m)
	}
}

// stages are those of the guest's port and of its local tap. What is left of a
// frame that none of them knows is dropped.
func (n *podNIC) stages() (guest, tap []engine.Stage) {
	if n.dhcp != nil {
		guest = append(guest, n.dhcp)
	}
	if n.six.router != nil {
		guest = append(guest, n.six.router, n.pod.six.nat.Outbound(n.six.index))
		tap = append(tap, n.pod.six.nat.Local(n.six.index))
	}
	if n.pod.nat != nil { // the last one, which drops what it does not know
		guest, tap = append(guest, n.pod.nat.Outbound(n.index)), append(tap, n.pod.nat.Local(n.index))
	}
	return guest, tap
}

// config6 is what the guest is told of its IPv6 network.
func (n *podNIC) config6() dhcp.Config6 {
	net, resolv := n.iface.Network, n.dns.config()
	c := dhcp.Config6{
		Port: n.port, Address: netip.PrefixFrom(net.Guest6, net.CIDR6.Bits()), Gateway: net.Gateway6, ServerMAC: uplink.GatewayMAC,
		Search: resolv.SearchDomains(n.vm.Subdomain), MTU: n.pod.host.MTU(), DNS: servers6(resolv),
		OnLease: func(m frame.MAC) {
			n.learn(m)
			n.book.leased()
		},
	}
	if n.dns.shown.Is6() {
		c.DNS, _ = n.dns.servers(resolv)
	}
	// The file of a URL is fetched by itself; a name wants a server of IPv4.
	if url := n.iface.DHCP.BootFile; strings.Contains(url, "://") {
		c.BootURL = url
	}
	return c
}

// update6 lets the guest know what has changed.
func (n *podNIC) update6(s *server) {
	if n.six.router == nil {
		return
	}
	if err := n.six.router.Update(n.config6()); err != nil {
		s.log.Warn("the guest's IPv6 network stays as it was", "interface", n.name(), "err", err)
	}
}

// IPv6Status is the IPv6 side of an interface.
type IPv6Status struct {
	Pod     netip.Addr     `json:"pod"`
	Guest   netip.Addr     `json:"guest"` // what it is leased
	Gateway netip.Addr     `json:"gateway"`
	Router  dhcp.Stats6    `json:"router"`
	NAT     *nat.Stats     `json:"nat,omitempty"`     // of the packet path
	Sockets *usernet.Stats `json:"sockets,omitempty"` // of the socket path
}

// status6 adds the guest's IPv6 side.
func (n *podNIC) status6(st *InterfaceStatus) {
	if n.six.router == nil {
		return
	}
	x, net := n.pod.six.nat.Stats(), n.iface.Network
	st.IPv6 = &IPv6Status{Pod: n.pod.host.Addr6(), Guest: net.Guest6, Gateway: net.Gateway6, Router: n.six.router.Stats(), NAT: &x}
	st.Leases = append(st.Leases, n.six.router.Leases()...)
	if st.MAC == "" {
		st.MAC = x.Guests[n.six.index].MAC
	}
}

// servers6 are the resolvers that a guest can reach itself by IPv6. Those of a
// link or of the pod's loopback it cannot.
func servers6(conf dhcp.Resolv) (out []netip.Addr) {
	for _, a := range conf.Servers {
		if a.Is6() && a.Zone() == "" && !a.IsLoopback() && !a.IsUnspecified() && !a.IsLinkLocalUnicast() {
			out = append(out, a)
		}
	}
	return out
}
