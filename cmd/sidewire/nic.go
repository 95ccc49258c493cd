package main

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"

	"sidewire/dhcp"
	"sidewire/engine"
	"sidewire/engine/frame"
	"sidewire/engine/uplink"
	"sidewire/engine/vmi"
	"sidewire/nat"
	"sidewire/vhostuser"
)

// nic is one interface of a guest, behind the address of a pod.
type nic struct {
	vm     vmi.VM
	iface  vmi.Interface
	socket string
	pod    *pod
	index  int // among the pod's guests
	// guestIP and gateway are the guest's addresses as the pod's processes see
	// them: its own, or others where another guest of the pod has those.
	guestIP netip.Addr
	gateway netip.Prefix
	aliased bool

	dhcp   *dhcp.Server
	dns    *resolver
	device *vhostuser.Device
	port   frame.PortID // to the guest
	tap    frame.PortID // from the guest to the pod's own processes
}

// name is how users name the interface.
func (n *nic) name() string { return n.vm.Name + "/" + n.iface.Name }

// open makes the interface's device and its place in the engine. The pod's
// host side is open; nothing is connected yet.
func (n *nic) open(s *server, o *options) error {
	var err error
	if n.dns, err = newResolver(o, n, s.log); err != nil {
		return err
	}
	if n.device, err = n.newDevice(s, o); err != nil {
		return err
	}
	s.onStop(n.device.Close)
	if n.tap, err = s.engine.AddPort(n.name()+" pod", n.localTap()); err != nil {
		return err
	}
	if n.port, err = s.engine.AddPort(n.name()+" guest", n.device); err != nil {
		return err
	}
	if n.dhcp, err = dhcp.New(n.dhcpConfig(o)); err != nil {
		return inputError{err}
	}
	return nil
}

// localTap is the guest's way to the pod's own processes, and theirs to it.
func (n *nic) localTap() *uplink.Tap { return n.pod.host.Tap(n.index) }

// wire gives stages and workers to the guest's ports.
func (n *nic) wire(e *engine.Engine) error {
	e.SetStages(n.port, n.dhcp, n.pod.nat.Outbound(n.index))
	e.SetStages(n.tap, n.pod.nat.Local(n.index))
	if err := n.localTap().SetWatcher(e.Worker(0)); err != nil {
		return err
	}
	e.AddQueue(n.tap, n.localTap(), 0)
	for i, p := range n.device.Pairs() {
		w := i % e.Workers()
		p.SetWatcher(e.Worker(w))
		e.AddQueue(n.port, p, w)
	}
	return nil
}

// serve lets the frontend connect.
func (n *nic) serve(ctx context.Context, s *server, o *options) error {
	n.resolve(ctx, s, o)
	if err := os.MkdirAll(filepath.Dir(n.socket), 0o700); err != nil {
		return cannot("socket directory: %w; name another with --socket-dir", err)
	}
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

// guest is the interface as the NAT sees it.
func (n *nic) guest() nat.Guest {
	net := n.iface.Network
	g := nat.Guest{
		Port: n.port, LocalTap: n.tap, IP: ip4(net.Guest), Gateway: ip4(net.Gateway), Prefix: net.CIDR.Bits(),
		MAC: n.mac(), MTU: n.pod.host.MTU(), Ports: natForwards(n.iface.Ports),
	}
	if n.aliased {
		g.Alias = nat.Alias{Guest: ip4(n.guestIP), Gateway: ip4(n.gateway.Addr())}
	}
	return g
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

func (n *nic) newDevice(s *server, o *options) (*vhostuser.Device, error) {
	d, err := vhostuser.NewDevice(vhostuser.Config{
		Name: n.name(), Path: n.socket, Client: o.mode == "client",
		QueuePairs: n.iface.QueuePairs, MTU: n.pod.host.MTU(), MAC: n.mac(), NoGuestTSO: !o.guestTSO,
		Barrier: s.engine.Barrier, Log: s.log.With("interface", n.name()),
		OnRARP: func(m frame.MAC) { n.pod.nat.LearnMAC(n.index, m) },
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

// dhcpConfig is what the guest is leased.
func (n *nic) dhcpConfig(o *options) dhcp.Config {
	net, resolv := n.iface.Network, n.dns.config()
	c := dhcp.Config{
		Port: n.port, Address: netip.PrefixFrom(net.Guest, net.CIDR.Bits()),
		Router: net.Gateway, ServerIP: net.Gateway, ServerMAC: uplink.GatewayMAC,
		DNS: resolv.DNS4(net.Gateway), Search: resolv.SearchDomains(n.vm.Subdomain), Hostname: n.vm.Hostname,
		MTU: n.pod.host.MTU(), NTPServers: n.iface.DHCP.NTPServers, TFTPServerName: n.iface.DHCP.TFTPServer,
		BootFileName: n.iface.DHCP.BootFile, KubeVirtCompat: o.compat,
		OnLease: func(m frame.MAC) { n.pod.nat.LearnMAC(n.index, m) },
	}
	for _, p := range n.iface.DHCP.Private {
		c.Private = append(c.Private, dhcp.PrivateOption{Code: p.Option, Value: p.Value})
	}
	return c
}
