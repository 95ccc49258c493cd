package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"sidewire/dhcp"
	"sidewire/engine"
	"sidewire/engine/frame"
	"sidewire/engine/uplink"
	"sidewire/engine/vmi"
	"sidewire/nat"
	"sidewire/vhostuser"
)

// nic is one interface of a guest behind the address of its pod: the packet
// path of masquerade.
type nic struct {
	vm     vmi.VM
	iface  vmi.Interface
	netns  string
	link   string
	socket string

	pod    *uplink.Pod
	up     *uplink.Uplink
	kernel *uplink.Kernel
	router *uplink.Router
	links  *uplink.Links
	nat    *nat.Masquerade
	dhcp   *dhcp.Server
	dns    *resolver
	device *vhostuser.Device
	port   frame.PortID
}

// name is how users name the interface.
func (n *nic) name() string { return n.vm.Name + "/" + n.iface.Name }

// open builds the interface up. What it built is taken down with the server;
// stopEngine must have run before the ports' memory and sockets go.
func (n *nic) open(ctx context.Context, s *server, o *options, stopEngine func() error) error {
	if err := n.prepareSocket(); err != nil {
		return err
	}
	var err error
	if n.dns, err = newResolver(o, n, s.log); err != nil {
		return err
	}
	err = uplink.InNetNS(n.netns, func() error { return n.openHost(s, stopEngine) })
	if err != nil {
		return hostError(err)
	}
	for _, w := range n.pod.Warnings {
		s.log.Warn(w, "interface", n.name())
	}
	if n.device, err = n.newDevice(s, o); err != nil {
		return err
	}
	s.onStop(n.device.Close)
	if err := n.wire(s, o); err != nil {
		return err
	}
	go n.nat.Run(ctx, engine.Now)
	n.resolve(ctx, s, o)
	if err := n.device.Listen(); err != nil {
		return cannot("%w", err)
	}
	go func() {
		if err := n.device.Serve(ctx); err != nil && !errors.Is(err, vhostuser.ErrClosed) {
			s.log.Error("vhost-user socket ended", "interface", n.name(), "err", err)
		}
	}()
	return nil
}

// resolve lets the guest's names be resolved, by whom the pod's are.
func (n *nic) resolve(ctx context.Context, s *server, o *options) {
	ctx, cancel := context.WithCancel(ctx)
	wait := n.dns.run(ctx, func() {
		if err := n.dhcp.Update(n.dhcpConfig(o)); err != nil {
			s.log.Warn("the guest's lease keeps the old resolvers", "interface", n.name(), "err", err)
		}
	})
	s.onStop(func() error {
		cancel()
		wait()
		return nil
	})
}

// prepareSocket makes the directory that QEMU finds the socket in.
func (n *nic) prepareSocket() error {
	if err := os.MkdirAll(filepath.Dir(n.socket), 0o700); err != nil {
		return cannot("socket directory: %w; name another with --socket-dir", err)
	}
	return nil
}

// openHost opens what lies in the pod's namespace.
func (n *nic) openHost(s *server, stopEngine func() error) (err error) {
	net := n.iface.Network
	workers := s.engine.Workers()
	n.pod, err = uplink.Takeover(uplink.TakeoverConfig{
		Link: n.link, Guest: net.Guest, Gateway: netip.PrefixFrom(net.Gateway, net.CIDR.Bits()),
		Ports: uplinkPorts(n.iface.Ports), Workers: workers,
	})
	if err != nil {
		return err
	}
	s.onStop(func() error { return errors.Join(stopEngine(), n.pod.Restore()) })
	if n.up, err = uplink.Open(uplink.Config{Link: n.link, Sink: n.pod.Sink(), Workers: workers, Direct: true, Mark: uplink.Mark}); err != nil {
		return err
	}
	s.onStop(n.up.Close)
	if n.kernel, err = uplink.OpenKernel(n.link, workers); err != nil {
		return err
	}
	s.onStop(n.kernel.Close)
	if n.router, err = uplink.NewRouter(n.link); err != nil {
		return err
	}
	s.onStop(func() error { n.router.Close(); return nil })
	n.links, err = uplink.WatchLinks(func(l uplink.LinkStatus) { n.linkChanged(s.log, l) }, n.link, n.pod.Sink(), n.pod.Tap().Name())
	if err != nil {
		return err
	}
	s.onStop(func() error { n.links.Close(); return nil })
	return nil
}

// linkChanged says what became of a link, and what that means.
func (n *nic) linkChanged(log *slog.Logger, l uplink.LinkStatus) {
	log = log.With("interface", n.name(), "link", l.Name)
	lost := "guest and outside do not reach each other"
	if l.Name == n.pod.Tap().Name() {
		lost = "guest and pod do not reach each other"
	}
	switch l.State {
	case uplink.LinkUp:
		log.Info("link is up again")
	case uplink.LinkGone:
		log.Error("link is gone: " + lost + " until sidewire is started again")
	default:
		log.Warn("link is without use: "+lost, "state", l.State)
	}
}

func (n *nic) newDevice(s *server, o *options) (*vhostuser.Device, error) {
	d, err := vhostuser.NewDevice(vhostuser.Config{
		Name: n.name(), Path: n.socket, Client: o.mode == "client",
		QueuePairs: n.iface.QueuePairs, MTU: n.pod.MTU(), MAC: n.mac(), NoGuestTSO: !o.guestTSO,
		Barrier: s.engine.Barrier, Log: s.log.With("interface", n.name()),
		OnRARP: func(m frame.MAC) { n.nat.LearnMAC(0, m) },
	})
	if err != nil {
		return nil, cannot("%w", err)
	}
	return d, nil
}

// mac is the guest's hardware address, zero if the spec leaves it to QEMU.
func (n *nic) mac() (m frame.MAC) {
	copy(m[:], n.iface.MAC)
	return m
}

// wire joins ports, stages and workers.
func (n *nic) wire(s *server, o *options) (err error) {
	e := s.engine
	add := func(name string, p engine.Port) (id frame.PortID) {
		if err == nil {
			id, err = e.AddPort(n.name()+" "+name, p)
		}
		return id
	}
	up := add("uplink", n.up)
	kernel := add("kernel", n.kernel)
	tap := add("pod", n.pod.Tap())
	n.port = add("guest", n.device)
	if err != nil {
		return err
	}
	net := n.iface.Network
	n.nat, err = nat.New(nat.Config{
		Guests: []nat.Guest{{
			Port: n.port, LocalTap: tap, IP: ip4(net.Guest), Gateway: ip4(net.Gateway), Prefix: net.CIDR.Bits(),
			MAC: n.mac(), MTU: n.pod.MTU(), Ports: natForwards(n.iface.Ports),
		}},
		Uplink: up, KernelPort: kernel, Router: n.router, Local: podAddrs{n.router}, External: ip4(n.pod.Addr()),
		PortRange: natRange(n.pod.NAT()), KernelRange: natRange(n.pod.KernelRange()), PortFree: n.pod.PortFree,
	})
	if err != nil {
		return err
	}
	if n.dhcp, err = dhcp.New(n.dhcpConfig(o)); err != nil {
		return inputError{err}
	}
	e.SetStages(n.port, n.dhcp, n.nat.Outbound(0))
	e.SetStages(up, n.nat.Inbound())
	e.SetStages(tap, n.nat.Local(0))
	return n.serve(e, up, tap)
}

// serve gives each queue its worker.
func (n *nic) serve(e *engine.Engine, up, tap frame.PortID) error {
	if n.up.Direct() {
		n.up.Queues()[0].SetRoom(n.device.Reserver())
	}
	for i, q := range n.up.Queues() {
		w := i % e.Workers()
		if err := q.SetWatcher(e.Worker(w)); err != nil {
			return err
		}
		e.AddQueue(up, q, w)
	}
	if err := n.pod.Tap().SetWatcher(e.Worker(0)); err != nil {
		return err
	}
	e.AddQueue(tap, n.pod.Tap(), 0)
	for i, p := range n.device.Pairs() {
		w := i % e.Workers()
		p.SetWatcher(e.Worker(w))
		e.AddQueue(n.port, p, w)
	}
	return nil
}

func natRange(r uplink.PortRange) nat.PortRange { return nat.PortRange{First: r.Lo, Last: r.Hi} }

// podAddrs are the pod's own addresses.
type podAddrs struct{ r *uplink.Router }

func (p podAddrs) Local(ip uint32) bool { return p.r.Local().Has(ip) }

// dhcpConfig is what the guest is leased.
func (n *nic) dhcpConfig(o *options) dhcp.Config {
	net, resolv := n.iface.Network, n.dns.config()
	c := dhcp.Config{
		Port: n.port, Address: netip.PrefixFrom(net.Guest, net.CIDR.Bits()),
		Router: net.Gateway, ServerIP: net.Gateway, ServerMAC: uplink.GatewayMAC,
		DNS: resolv.DNS4(net.Gateway), Search: resolv.SearchDomains(n.vm.Subdomain), Hostname: n.vm.Hostname,
		MTU: n.pod.MTU(), NTPServers: n.iface.DHCP.NTPServers, TFTPServerName: n.iface.DHCP.TFTPServer,
		BootFileName: n.iface.DHCP.BootFile, KubeVirtCompat: o.compat,
		OnLease: func(m frame.MAC) { n.nat.LearnMAC(0, m) },
	}
	for _, p := range n.iface.DHCP.Private {
		c.Private = append(c.Private, dhcp.PrivateOption{Code: p.Option, Value: p.Value})
	}
	return c
}

// hostError says who has to mend what the host refused.
func hostError(err error) error {
	switch {
	case errors.Is(err, uplink.ErrNoLink):
		return inputError{fmt.Errorf("%w; name the pod network's link with --uplink NETWORK=LINK", err)}
	case errors.Is(err, uplink.ErrPrivilege):
		return machineError{fmt.Errorf("%w: run as root or grant it with: setcap cap_net_admin,cap_net_raw,cap_sys_admin+ep sidewire", err)}
	}
	return machineError{err}
}

func ip4(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

// protoNumber reads TCP or UDP.
func protoNumber(s string) (uint8, error) {
	switch strings.ToUpper(s) {
	case "TCP", "":
		return frame.ProtoTCP, nil
	case "UDP":
		return frame.ProtoUDP, nil
	}
	return 0, badInput("protocol %q: want TCP or UDP", s)
}

func protoName(p uint8) string {
	if p == frame.ProtoUDP {
		return "UDP"
	}
	return "TCP"
}

func uplinkPorts(ports []vmi.Port) []uplink.Port {
	var out []uplink.Port
	for _, p := range ports {
		proto, _ := protoNumber(p.Protocol) // validated
		out = append(out, uplink.Port{Proto: proto, Port: p.Port})
	}
	return out
}

func natForwards(ports []vmi.Port) []nat.Forward {
	var out []nat.Forward
	for _, p := range ports {
		proto, _ := protoNumber(p.Protocol) // validated
		out = append(out, nat.Forward{Proto: proto, Port: p.Port})
	}
	return out
}
