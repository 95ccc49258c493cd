package main

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sidewire/dhcp"
	"sidewire/engine/frame"
	"sidewire/engine/uplink"
	"sidewire/engine/vmi"
	"sidewire/nat/usernet"
)

// slirpLease is how long QEMU's user networking leases its address.
const slirpLease = 24 * time.Hour

// userNIC is an interface whose guest reaches the network by ordinary sockets
// of ours: slirp, and the socket path of masquerade.
type userNIC struct {
	nic
	netns  string
	link   string     // the pod network's, which gives the MTU
	pod    netip.Addr // its address, not valid if it has none
	mtu    int
	ports  []usernet.Forward // that the VMI and the flags ask for
	ranges []uplink.Port     // that the VMI asks for
	why    string            // it is not the packet path, where that was not asked for

	net      *usernet.Net // of IPv4; nil if the guest has none, as dhcp
	six      userNIC6
	redirect *uplink.Redirect // of all ports or of ranges; nil where only those that have sockets lead to the guest
	host     frame.PortID     // what the host's sockets have for the guest
	dns      *resolver
}

// hostSide is the engine's port of the host's sockets. They bring frames; what
// goes to them ends in the guest's port's stage.
type hostSide struct{}

// Push implements engine.Port.
func (hostSide) Push(_ int, fs []*frame.Frame) {
	for _, f := range fs {
		f.Drop(frame.NoRoute)
	}
}

func newUserNIC(o *options, n nic) *userNIC {
	return &userNIC{nic: n, netns: netnsOf(o, n.vm), link: o.uplinkOf(n.iface.Name)}
}

func (p *plan) addUser(o *options, n nic) {
	g := newUserNIC(o, n)
	if !g.slirp() {
		_, g.why = masqueradePath(o)
	}
	p.all = append(p.all, g)
	p.users = append(p.users, g)
}

// slirp says whether the binding is slirp, not masquerade.
func (n *userNIC) slirp() bool { return n.iface.Binding == vmi.Slirp }

// gatewayMAC is KubeVirt's for masquerade. QEMU's user networking makes its own
// of the gateway's address.
func (n *userNIC) gatewayMAC() frame.MAC {
	if !n.slirp() {
		return uplink.GatewayMAC
	}
	a := n.iface.Network.Gateway.As4()
	return frame.MAC{0x52, 0x55, a[0], a[1], a[2], a[3]}
}

// resolverAddr is where the guest finds the relay.
func (n *userNIC) resolverAddr() netip.Addr {
	switch {
	case n.slirp():
		return n.iface.Network.DNS
	case !n.hasFour():
		return n.iface.Network.Gateway6
	}
	return n.iface.Network.Gateway
}

// open builds the interface up. What it built is taken down with the server;
// stopEngine must have run before the ports' memory and sockets go.
func (n *userNIC) open(ctx context.Context, s *server, o *options, stopEngine func() error) error {
	if err := uplink.InNetNS(n.netns, func() error { n.inspect(o); return nil }); err != nil {
		if errors.Is(err, uplink.ErrPrivilege) {
			return cannot("%w: start it in the pod's namespace and without --netns, or grant it with: setcap cap_sys_admin+ep sidewire", err)
		}
		return machineError{err}
	}
	if err := n.nic.open(s, o, n.mtu, 0, n.learn); err != nil {
		return err
	}
	var err error
	if n.dns, err = newResolver(o, n.relayPlace(), s.log.With("interface", n.name())); err != nil {
		return err
	}
	if n.hasFour() {
		if n.dhcp, err = dhcp.New(n.dhcpConfig(o)); err != nil {
			return inputError{err}
		}
	}
	if n.hasSix() {
		if n.six.router, err = dhcp.New6(n.config6()); err != nil {
			return inputError{err}
		}
	} else if n.six.pod.IsValid() && !n.slirp() {
		s.log.Warn("the guest gets no IPv6: it needs an MTU of 1280", "interface", n.name(), "mtu", n.mtu)
	}
	if n.host, err = s.engine.AddPort(n.name()+" sockets", hostSide{}); err != nil {
		return err
	}
	workers := n.assign(s)
	if err := n.openNet(ctx, s, o, workers); err != nil {
		return err
	}
	// The workers stop before anything of this is closed.
	s.onStop(stopEngine)
	if err := n.wire(s, workers); err != nil {
		return err
	}
	if err := n.publish(s); err != nil {
		return err
	}
	n.resolve(ctx, s, n.dns, func() { n.update(s, o) })
	return n.listen(ctx, s)
}

var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// inspect looks at the pod network's link, which need not be there.
func (n *userNIC) inspect(o *options) {
	if hasCapability(unix.CAP_NET_ADMIN) {
		_ = uplink.Cleanup(n.link) // of a packet path that has crashed; one that is alive stays
	}
	n.mtu = userMTU(o, "", n.link, n.slirp())
	l, err := netlink.LinkByName(n.link)
	if err != nil {
		return
	}
	n.pod, n.six.pod = podAddr(l, netlink.FAMILY_V4), podAddr(l, netlink.FAMILY_V6)
}

// userMTU is the MTU of a guest's link: what the flag says, else that of the
// pod's link, as KubeVirt has it, or QEMU's for slirp. No frame of the guest's
// leaves as it is, so it may be anything.
func userMTU(o *options, netns, link string, slirp bool) int {
	mtu := defaultMTU
	if o.mtu != 0 {
		return o.mtu
	}
	if !slirp {
		_ = uplink.InNetNS(netns, func() error {
			l, err := netlink.LinkByName(link)
			if err == nil {
				mtu = min(max(l.Attrs().MTU, 576), 65535)
			}
			return err
		})
	}
	return mtu
}

// openNet makes the guest's network.
func (n *userNIC) openNet(ctx context.Context, s *server, o *options, workers []int) error {
	udp, tcp, err := n.dns.early(ctx)
	if err != nil {
		return cannot("DNS relay: %w", err)
	}
	at := netip.AddrPortFrom(n.resolverAddr(), dnsPort)
	c := usernet.Config{
		Name: n.name(), Port: n.port, MAC: n.mac(), GatewayMAC: n.gatewayMAC(), MTU: n.mtu, Workers: s.engine.Workers(),
		Loopback: !o.noHostLoopback, GatewaySource: n.slirp(), Ping: !n.slirp() || o.slirpPing, Policy: o.policy(),
		MaxSockets: s.socketShare, Log: s.log.With("interface", n.name()),
	}
	for i, w := range workers {
		p := usernet.Pair{Worker: w}
		if n.device != nil {
			p.Room = n.device.Reserver(i)
		}
		c.Pairs = append(c.Pairs, p)
	}
	if n.netns != "" {
		f, err := os.Open(n.netns)
		if err != nil {
			return cannot("network namespace: %w; name the pod's with --netns", err)
		}
		s.onStop(f.Close)
		c.NetNS = int(f.Fd())
	}
	return n.openFamilies(s, c, []usernet.Service{{Proto: frame.ProtoUDP, Addr: at, To: udp}, {Proto: frame.ProtoTCP, Addr: at, To: tcp}})
}

// wire gives stages and workers to the ports. Only the workers of the guest's
// queue pairs look after its sockets.
func (n *userNIC) wire(s *server, workers []int) error {
	s.engine.SetStages(n.port, n.stages()...)
	workers = slices.Clone(workers)
	n.attachTo(s, workers)
	slices.Sort(workers)
	for _, w := range slices.Compact(workers) {
		for _, net := range n.nets() {
			q := net.Queue(w)
			if err := q.SetWatcher(s.engine.Worker(w)); err != nil {
				return machineError{err}
			}
			s.engine.AddQueue(n.host, q, w)
		}
	}
	return nil
}

// dhcpConfig is what the guest is leased.
func (n *userNIC) dhcpConfig(o *options) dhcp.Config {
	net, resolv := n.iface.Network, n.dns.config()
	servers, _ := n.dns.servers(resolv)
	c := dhcp.Config{
		Port: n.port, Address: netip.PrefixFrom(net.Guest, net.CIDR.Bits()),
		Router: net.Gateway, ServerIP: net.Gateway, ServerMAC: n.gatewayMAC(),
		DNS: servers, Search: resolv.SearchDomains(n.vm.Subdomain), MTU: n.mtu,
		OnLease: n.learn,
	}
	if n.slirp() {
		c.LeaseTime = slirpLease
	}
	n.leaseOptions(&c, o)
	return c
}

func (n *userNIC) status(*server) InterfaceStatus {
	st := n.nic.status()
	st.Path, st.Link, st.Pod, st.MTU = "socket", n.link, n.pod, n.mtu
	if n.net != nil {
		x := n.net.Stats()
		st.Guest, st.Gateway, st.Sockets = n.iface.Network.Guest, n.iface.Network.Gateway, &x
	}
	n.status6(&st)
	nets := n.nets()
	for _, net := range nets {
		if m := net.MAC(); m != (frame.MAC{}) {
			st.MAC = m.String()
		}
	}
	st.DNS, st.Forwards = n.dns.status(), n.forwards()
	st.Why, st.Everything = n.why, n.redirect != nil && len(n.ranges) == 0
	for _, r := range nets[0].Policy().Rules {
		st.Policy = append(st.Policy, r.String())
	}
	return st
}

func (n *userNIC) forwards() []forwardRequest {
	out := []forwardRequest{}
	for _, f := range n.forwarded() {
		if n.redirect != nil && n.inRange(f) {
			continue // of IPv6; the range itself is listed below
		}
		r := forwardRequest{Protocol: protoName(f.Proto), Address: f.Addr, Port: f.Port}
		if f.Guest != f.Port {
			r.Guest = f.Guest
		}
		out = append(out, r)
	}
	if n.redirect == nil {
		return out
	}
	for _, p := range n.ranges {
		out = append(out, forwardRequest{Protocol: protoName(p.Proto), Port: p.Port, Last: p.Last})
	}
	if len(out) == 0 {
		return nil
	}
	return out
}

func (n *userNIC) addForward(r forwardRequest, proto uint8) error {
	return n.forward(r.user(proto))
}

func (n *userNIC) removeForward(r forwardRequest, proto uint8) error {
	if r.Guest == 0 {
		// The host's port is enough to know which.
		for _, f := range n.forwarded() {
			if f.Proto == proto && f.Port == r.Port && f.Addr == r.Address {
				return n.unforward(f)
			}
		}
	}
	return n.unforward(r.user(proto))
}

// user is a forward as usernet has it.
func (r forwardRequest) user(proto uint8) usernet.Forward {
	f := usernet.Forward{Proto: proto, Addr: r.Address, Port: r.Port, Guest: r.Guest}
	if f.Guest == 0 {
		f.Guest = f.Port
	}
	return f
}
