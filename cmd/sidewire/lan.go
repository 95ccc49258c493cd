package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"

	"github.com/vishvananda/netlink"

	"sidewire/dhcp"
	"sidewire/engine"
	"sidewire/engine/frame"
	"sidewire/engine/uplink"
	"sidewire/engine/vmi"
)

// lan is a switch and what is joined to it: guests whose interfaces name the
// same bridge, and the host's links that lead out.
type lan struct {
	netns string
	name  string // of the bridge, or of the link that a CNI left
	ovs   bool   // a bridge of Open vSwitch
	cni   bool   // the node's bridge is behind the link, and does the VLANs
	nics  []*lanNIC
	links []string // uplinks

	sw    *engine.Switch
	ups   []*lanUplink
	watch *uplink.Links // nil without uplinks
}

// lanUplink is a link of the host that leads out of a switch.
type lanUplink struct {
	link string
	mtu  int
	mac  frame.MAC
	kind uplink.LinkKind
	nat  *engine.MACNAT // nil: frames pass with the guests' own addresses
	up   *uplink.Uplink
	port frame.PortID
}

var everywhere = netip.PrefixFrom(netip.IPv4Unspecified(), 0)

// defaultMTU is that of a network which nobody says it of.
const defaultMTU = 1500

// guests names those who are joined.
func (l *lan) guests() string {
	var names []string
	for _, n := range l.nics {
		names = append(names, n.name())
	}
	return strings.Join(names, ", ")
}

// open builds the switch, its uplinks and its guests up. What it built is taken
// down with the server; stopEngine must have run before the ports' memory and
// sockets go.
func (l *lan) open(ctx context.Context, s *server, o *options, stopEngine func() error) error {
	l.sw = s.engine.NewSwitch(l.config())
	if len(l.links) > 0 {
		if err := uplink.InNetNS(l.netns, func() error { return l.openLinks(s, o) }); err != nil {
			return hostError(err)
		}
	}
	for _, n := range l.nics {
		if err := n.open(s, o); err != nil {
			return err
		}
	}
	// The workers stop before anything of this is closed.
	s.onStop(stopEngine)
	if err := l.wire(s); err != nil {
		return err
	}
	go l.sw.Run(ctx, engine.Now)
	for _, n := range l.nics {
		if n.boot != nil {
			n.followBoot(ctx, s, o, l.netns, func() { n.renew(s, n.dhcpConfig(o)) })
		}
		if err := n.listen(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

// config is what the definitions say of the switch itself: whoever asks for
// link-local frames gets them for all.
func (l *lan) config() engine.SwitchConfig {
	c := engine.SwitchConfig{Name: l.name}
	for _, n := range l.nics {
		c.LinkLocal = c.LinkLocal || n.nad().Switch.LinkLocal
	}
	return c
}

// openLinks joins the host's links.
func (l *lan) openLinks(s *server, o *options) error {
	for _, name := range l.links {
		u := &lanUplink{link: name}
		var err error
		if u.kind, err = l.kindOf(o, name); err != nil {
			return err
		}
		one := u.kind.OneMAC
		c := uplink.Config{Link: name, Workers: s.engine.Workers(), Promiscuous: !one, AllMulti: one}
		if u.kind.ByIP {
			if err := l.silence(s, o, u); err != nil {
				return err
			}
			c.Mark = uplink.Mark
		}
		u.up, err = uplink.Open(c)
		if err != nil {
			return err
		}
		s.onStop(u.up.Close)
		if err := l.inspect(u); err != nil {
			return err
		}
		var port engine.Port = u.up
		if one {
			if err := l.translate(s, u); err != nil {
				return err
			}
			port = u.nat.Port(u.up)
		}
		if u.port, err = s.engine.AddPort("uplink "+name, port); err != nil {
			return err
		}
		l.ups = append(l.ups, u)
	}
	var err error
	l.watch, err = uplink.WatchLinks(func(st uplink.LinkStatus) { l.linkChanged(s.log, st) }, l.links...)
	if err != nil {
		return err
	}
	s.onStop(func() error { l.watch.Close(); return nil })
	return nil
}

// inspect looks at a link. One that a CNI has given an address is the guest's
// in the end, which takes more than a switch.
func (l *lan) inspect(u *lanUplink) error {
	link, err := netlink.LinkByName(u.link)
	if err != nil {
		return fmt.Errorf("link %s: %w", u.link, err)
	}
	u.mtu = link.Attrs().MTU
	copy(u.mac[:], link.Attrs().HardwareAddr)
	if !l.cni {
		return nil
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("addresses of %s: %w", u.link, err)
	}
	if len(addrs) > 0 {
		return fmt.Errorf("link %s got the address %s meanwhile, which is to be the guest's: start again", u.link, addrs[0].IPNet)
	}
	return nil
}

// linkChanged says what became of an uplink, and what that means.
func (l *lan) linkChanged(log *slog.Logger, st uplink.LinkStatus) {
	log = log.With("switch", l.name, "link", st.Name)
	switch st.State {
	case uplink.LinkUp:
		log.Info("link is up again")
	case uplink.LinkGone:
		log.Error("link is gone: guests and outside do not reach each other until sidewire is started again")
	default:
		log.Warn("link is without use: guests and outside do not reach each other", "state", st.State)
	}
}

// vlans says whether some port of a bridge asks for VLANs: then it filters them
// on all, as a bridge of the kernel does.
func (l *lan) vlans() bool {
	for _, n := range l.nics {
		if sw := n.iface.Network.NAD.Switch; !l.cni && (sw.VLAN != 0 || len(sw.Trunk) > 0) {
			return true
		}
	}
	return false
}

// bridgeVLAN is the VLAN of what is untagged on a bridge that filters VLANs.
const bridgeVLAN = vmi.BridgeVLAN

// allVLANs are those that pass an uplink tagged, where untagged is bridgeVLAN.
var allVLANs = func() (ids []uint16) {
	for v := uint16(bridgeVLAN + 1); v <= 4094; v++ {
		ids = append(ids, v)
	}
	return ids
}()

// portVLANs is how a guest's port treats VLANs. A bridge of Open vSwitch lets
// all VLANs pass a port that names none.
func (l *lan) portVLANs(sw *vmi.Switch) (access uint16, trunk []uint16) {
	switch {
	case l.cni:
		return 0, nil
	case l.ovs && sw.VLAN == 0 && len(sw.Trunk) > 0:
		return 0, append([]uint16{0}, sw.Trunk...)
	case l.ovs || sw.VLAN != 0:
		return sw.VLAN, sw.Trunk
	case len(sw.Trunk) > 0:
		if sw.Native {
			return bridgeVLAN, without(sw.Trunk, bridgeVLAN)
		}
		return 0, sw.Trunk
	case l.vlans():
		return bridgeVLAN, nil
	}
	return 0, nil
}

func without(ids []uint16, id uint16) (out []uint16) {
	for _, v := range ids {
		if v != id {
			out = append(out, v)
		}
	}
	return out
}

// wire joins ports, stages and workers.
func (l *lan) wire(s *server) error {
	e := s.engine
	for _, u := range l.ups {
		c := engine.SwitchPort{Port: u.port, Uplink: true, MTU: u.mtu}
		if !l.ovs && l.vlans() {
			c.Access, c.Trunk = bridgeVLAN, allVLANs
		}
		stage, err := l.sw.AddPort(c)
		if err != nil {
			return err
		}
		switch {
		case u.nat != nil:
			e.SetStages(u.port, u.nat, stage)
		case l.guestHas(u.mac):
			e.SetStages(u.port, stage)
		default:
			e.SetStages(u.port, hostFrames(u.mac), stage)
		}
		for i, q := range u.up.Queues() {
			w := i % e.Workers()
			if err := q.SetWatcher(e.Worker(w)); err != nil {
				return err
			}
			e.AddQueue(u.port, q, w)
		}
	}
	for _, n := range l.nics {
		if err := n.wire(s); err != nil {
			return err
		}
	}
	return nil
}

// hostFrames is the stage that leaves to the host's kernel what is for its
// own address on an uplink: it has it already.
type hostFrames frame.MAC

// Process implements engine.Stage.
func (m hostFrames) Process(b *frame.Batch) {
	for i := range b.Len() {
		f := b.Frame(i)
		if f.Out == frame.Drop && f.Reason == frame.ReasonNone && f.HeadLen >= frame.EthernetLen && frame.MAC(f.Dst()) == frame.MAC(m) {
			f.Out = frame.Consumed
		}
	}
}

// lanNIC is an interface that is joined to a switch.
type lanNIC struct {
	nic
	lan *lan
}

func (n *lanNIC) nad() *vmi.NAD { return n.iface.Network.NAD }

// mtu is what the guest's NIC can send and receive.
func (n *lanNIC) mtu() int {
	if m := n.nad().Switch.MTU; m != 0 {
		return m
	}
	m := 0
	for _, u := range n.lan.ups {
		if m == 0 || u.mtu < m {
			m = u.mtu
		}
	}
	if m == 0 {
		return defaultMTU
	}
	return m
}

// What a switch reads of a frame: the Ethernet header with a tag, and to keep
// flows on their queues the addresses and ports behind it.
const (
	switchHead = frame.EthernetLen + 4
	flowHead   = switchHead + 40 + 4
)

// snapshot is how much of a frame the stages of the port read.
func (n *lanNIC) snapshot() int {
	if n.iface.Network.Lease != nil || n.nad().Switch.CheckARP || n.lan.oneMAC() {
		return 0 // DHCP, ARP and ND lie behind the headers
	}
	for _, o := range n.lan.nics {
		if o.iface.QueuePairs > 1 {
			return flowHead
		}
	}
	return switchHead
}

func (n *lanNIC) open(s *server, o *options) error {
	for _, u := range n.lan.ups {
		if n.mtu() > u.mtu {
			s.log.Warn("long frames of the guest do not pass the uplink", "interface", n.name(), "mtu", n.mtu(), "link", u.link, "linkMTU", u.mtu)
		}
	}
	if err := n.nic.open(s, o, n.mtu(), n.snapshot(), nil); err != nil {
		return err
	}
	lease := n.iface.Network.Lease
	if lease == nil {
		return nil
	}
	if n.lan.cni {
		return badInput("not supported yet: %s leases addresses, and %s has a link of its CNI's; remove ipam from the one or name another link with --uplink", n.nad().Key(), n.lan.name)
	}
	var err error
	if n.dhcp, err = dhcp.New(n.dhcpConfig(o)); err != nil {
		return inputError{err}
	}
	return nil
}

// dhcpConfig is what the guest is leased.
func (n *lanNIC) dhcpConfig(o *options) dhcp.Config {
	lease := n.iface.Network.Lease
	c := dhcp.Config{
		Port: n.port, MACs: []frame.MAC{n.mac()}, Address: lease.Address, ServerIP: lease.Gateway,
		DNS: lease.DNS, Search: lease.Search, MTU: n.mtu(), Routes: leaseRoutes(lease), Alone: true,
	}
	if lease.Router {
		c.Router = lease.Gateway
	}
	n.leaseOptions(&c, o)
	return c
}

// leaseRoutes are the routes of option 121, the default one last. Where there
// are any, a client does not look at the router (RFC 3442).
func leaseRoutes(l *vmi.Lease) (out []dhcp.Route) {
	var last []dhcp.Route
	for _, r := range l.Routes {
		route := dhcp.Route{Dest: r.Dest, Via: r.Via}
		if r.Dest.Bits() == 0 {
			last = append(last, route)
		} else {
			out = append(out, route)
		}
	}
	if len(out) > 0 && len(last) == 0 && l.Router {
		last = []dhcp.Route{{Dest: everywhere, Via: l.Gateway}}
	}
	return append(out, last...)
}

// wire gives stages and workers to the guest's port.
func (n *lanNIC) wire(s *server) error {
	sw := n.nad().Switch
	c := engine.SwitchPort{
		Port: n.port, MAC: n.mac(), MTU: n.mtu(), SpoofCheck: sw.SpoofCheck, CheckARP: sw.CheckARP, Queues: n.iface.QueuePairs,
		Storm: sw.Storm,
	}
	c.Access, c.Trunk = n.lan.portVLANs(sw)
	stage, err := n.lan.sw.AddPort(c)
	if err != nil {
		return err
	}
	if n.dhcp != nil {
		s.engine.SetStages(n.port, n.dhcp, stage)
	} else {
		s.engine.SetStages(n.port, stage)
	}
	n.attach(s)
	return nil
}
