package main

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"sync"

	"sidewire/dhcp"
	"sidewire/engine/frame"
	"sidewire/engine/stream"
	"sidewire/engine/uplink"
	"sidewire/engine/vmi"
	"sidewire/nat"
	"sidewire/vhostuser"
)

// nic is one interface of a guest: its device, its port, and the server of its
// lease if we serve one.
type nic struct {
	vm     vmi.VM
	iface  vmi.Interface
	socket string
	order  int // among all that are served, as the files have them

	dhcp *dhcp.Server
	book *leaseBook
	boot *bootServer // nil unless the lease names a TFTP server whose address is to be found
	// One of the two is the device, by the model.
	device *vhostuser.Device
	stream *stream.Device
	port   frame.PortID // to the guest
	longer bool         // packets longer than the MTU are taken, for stages that answer them
}

// frontends are what a device has for those who connect to its socket.
type frontends interface {
	Listen() error
	Serve(context.Context) error
}

// virtio says whether the interface's model is served over vhost-user.
func (n *nic) virtio() bool { return n.iface.Model == "virtio" }

// name is how users name the interface.
func (n *nic) name() string { return n.vm.Name + "/" + n.iface.Name }

func (n *nic) base() *nic { return n }

// mac is the guest's hardware address, zero if the spec leaves it to QEMU.
func (n *nic) mac() (m frame.MAC) {
	copy(m[:], n.iface.MAC)
	return m
}

// open makes the device and its port. snapshot is how many bytes of a frame the
// port's stages read, 0 for all that they can.
func (n *nic) open(s *server, o *options, mtu, snapshot int, onRARP func(frame.MAC)) (err error) {
	n.book = s.book
	// Where we are the guest's router, packets longer than the MTU are its business: ICMP says so, or it takes them apart.
	n.longer = n.longer || n.iface.Binding == vmi.Masquerade || n.iface.Binding == vmi.Slirp
	if !n.virtio() {
		c := stream.Config{
			Name: n.name(), Path: n.socket, Client: o.mode == "client", MTU: mtu, Log: s.log.With("interface", n.name()),
		}
		if n.longer {
			c.MTU = 0
		}
		n.stream, err = stream.New(c)
		if err != nil {
			return cannot("%w", err)
		}
		n.stream.SetLink(n.iface.State != vmi.Down)
		s.onStop(n.stream.Close)
		n.port, err = s.engine.AddPort(n.name()+" guest", n.stream)
		return err
	}
	n.device, err = vhostuser.NewDevice(vhostuser.Config{
		Name: n.name(), Path: n.socket, Client: o.mode == "client",
		QueuePairs: n.iface.QueuePairs, MTU: mtu, Longer: n.longer, MAC: n.mac(), NoGuestTSO: !o.guestTSO, Packed: o.packed, Snapshot: snapshot,
		Barrier: s.engine.Barrier, Log: s.log.With("interface", n.name()), OnRARP: onRARP,
	})
	if err != nil {
		return cannot("%w", err)
	}
	if err := n.device.SetLink(n.iface.State != vmi.Down); err != nil {
		return err
	}
	s.onStop(n.device.Close)
	n.port, err = s.engine.AddPort(n.name()+" guest", n.device)
	return err
}

// assign chooses a worker for each queue pair.
func (n *nic) assign(s *server) (workers []int) {
	for range n.iface.QueuePairs {
		workers = append(workers, s.nextWorker())
	}
	return workers
}

// attach gives workers to the queue pairs.
func (n *nic) attach(s *server) { n.attachTo(s, n.assign(s)) }

// attachTo gives each queue pair the worker that was chosen for it.
func (n *nic) attachTo(s *server, workers []int) {
	if n.stream != nil {
		n.stream.SetWatcher(s.engine.Worker(workers[0]))
		s.engine.AddQueue(n.port, n.stream, workers[0])
		return
	}
	for i, p := range n.device.Pairs() {
		p.SetWatcher(s.engine.Worker(workers[i]))
		s.engine.AddQueue(n.port, p, workers[i])
	}
}

// listen lets the frontend connect.
func (n *nic) listen(ctx context.Context, s *server) error {
	if n.dhcp != nil {
		s.book.take(n)
	}
	if err := os.MkdirAll(filepath.Dir(n.socket), 0o700); err != nil {
		return cannot("socket directory: %w; name another with --socket-dir", err)
	}
	var d frontends = n.device
	if n.stream != nil {
		d = n.stream
	}
	if err := d.Listen(); err != nil {
		return cannot("%w", err)
	}
	go func() {
		if err := d.Serve(ctx); err != nil && !errors.Is(err, vhostuser.ErrClosed) {
			s.log.Error("the guest's socket ended", "interface", n.name(), "err", err)
		}
	}()
	return nil
}

// leaseOptions puts what the VMI itself says about a lease into c.
func (n *nic) leaseOptions(c *dhcp.Config, o *options) {
	d := n.iface.DHCP
	c.NTPServers, c.TFTPServerName, c.BootFileName = d.NTPServers, d.TFTPServer, d.BootFile
	c.Hostname, c.KubeVirtCompat = n.vm.Hostname, o.compat
	for _, p := range d.Private {
		c.Private = append(c.Private, dhcp.PrivateOption{Code: p.Option, Value: p.Value})
	}
	if b := newBootServer(d.TFTPServer); n.boot == nil && b != nil {
		n.boot = b // once: workers read it from then on
	}
	tell := c.OnLease
	c.OnLease = func(m frame.MAC) {
		if tell != nil {
			tell(m)
		}
		n.book.leased()
		n.boot.again() // what it boots next may be elsewhere
	}
	n.boot.lease(c)
}

// leaseKey names the interface among all guests, of other runs too.
func (n *nic) leaseKey() string {
	namespace := n.vm.Namespace
	if namespace == "" {
		namespace = "default"
	}
	return namespace + "/" + n.name()
}

// renew makes the guest's lease another one.
func (n *nic) renew(s *server, c dhcp.Config) {
	if err := n.dhcp.Update(c); err != nil {
		s.log.Warn("the guest's lease stays as it was", "interface", n.name(), "err", err)
	}
}

// resolve lets the guest's names be resolved by r, as the pod's are, and calls
// update when what its lease says of them has changed.
func (n *nic) resolve(ctx context.Context, s *server, r *resolver, update func()) {
	ctx, cancel := context.WithCancel(ctx)
	wait := r.run(ctx, func() {
		update()
		n.boot.again()
	})
	var following sync.WaitGroup
	if n.boot != nil {
		following.Go(func() { n.boot.follow(ctx, r, update) })
	}
	s.onStop(func() error {
		cancel()
		wait()
		following.Wait()
		return nil
	})
}

// podNIC is an interface behind the address of a pod.
type podNIC struct {
	nic
	pod   *pod
	index int // among the pod's guests
	// guestIP and gateway are the guest's addresses as the pod's processes see
	// them: its own, or others where another guest of the pod has those.
	guestIP netip.Addr
	gateway netip.Prefix
	aliased bool

	dns *resolver
	tap frame.PortID // from the guest to the pod's own processes
	six podNIC6
}

// open makes the interface's device and its place in the engine. The pod's
// host side is open; nothing is connected yet.
func (n *podNIC) open(s *server, o *options) error {
	var err error
	if n.dns, err = newResolver(o, n.relayPlace(), s.log.With("interface", n.name())); err != nil {
		return err
	}
	if n.tap, err = s.engine.AddPort(n.name()+" pod", n.localTap()); err != nil {
		return err
	}
	if err := n.nic.open(s, o, n.pod.host.MTU(), 0, n.learn); err != nil {
		return err
	}
	if n.pod.router != nil {
		if n.dhcp, err = dhcp.New(n.dhcpConfig(o)); err != nil {
			return inputError{err}
		}
	}
	if n.pod.six.router != nil && n.hasSix() {
		if n.six.router, err = dhcp.New6(n.config6()); err != nil {
			return inputError{err}
		}
	}
	return nil
}

// relayPlace is at the gateway: its IPv4 address, unless the pod has none.
func (n *podNIC) relayPlace() relayPlace {
	net, p := n.iface.Network, relayPlace{netns: n.pod.netns, device: n.localTap().Name()}
	if n.pod.router != nil {
		p.at, p.shown, p.allow = netip.AddrPortFrom(n.gateway.Addr(), dnsPort), net.Gateway, netip.PrefixFrom(n.guestIP, n.guestIP.BitLen())
	} else {
		p.at, p.shown, p.allow = netip.AddrPortFrom(net.Gateway6, dnsPort), net.Gateway6, netip.PrefixFrom(net.Guest6, net.Guest6.BitLen())
	}
	return p
}

// localTap is the guest's way to the pod's own processes, and theirs to it.
func (n *podNIC) localTap() *uplink.Tap { return n.pod.host.Tap(n.index) }

// wire gives stages and workers to the guest's ports.
func (n *podNIC) wire(s *server) error {
	e := s.engine
	guest, tap := n.stages()
	e.SetStages(n.port, guest...)
	e.SetStages(n.tap, tap...)
	if err := n.localTap().SetWatcher(e.Worker(0)); err != nil {
		return err
	}
	e.AddQueue(n.tap, n.localTap(), 0)
	n.attach(s)
	return nil
}

// serve lets the frontend connect.
func (n *podNIC) serve(ctx context.Context, s *server, o *options) error {
	n.resolve(ctx, s, n.dns, func() {
		if n.dhcp != nil {
			n.renew(s, n.dhcpConfig(o))
		}
		n.update6(s)
	})
	if err := n.dns.missing(); err != nil {
		return err
	}
	return n.listen(ctx, s)
}

// guest is the interface as the NAT sees it.
func (n *podNIC) guest() nat.Guest {
	net := n.iface.Network
	g := nat.Guest{
		Port: n.port, LocalTap: n.tap, IP: ip4(net.Guest), Gateway: ip4(net.Gateway), Prefix: net.CIDR.Bits(),
		MAC: n.mac(), MTU: n.pod.host.MTU(), Ports: natForwards(n.published()), Proxied: n.vm.Istio,
	}
	if n.aliased {
		g.Alias = nat.Alias{Guest: ip4(n.guestIP), Gateway: ip4(n.gateway.Addr())}
	}
	return g
}

// dhcpConfig is what the guest is leased.
func (n *podNIC) dhcpConfig(o *options) dhcp.Config {
	net, resolv := n.iface.Network, n.dns.config()
	servers, _ := n.dns.servers(resolv)
	c := dhcp.Config{
		Port: n.port, Address: netip.PrefixFrom(net.Guest, net.CIDR.Bits()),
		Router: net.Gateway, ServerIP: net.Gateway, ServerMAC: uplink.GatewayMAC,
		DNS: servers, Search: resolv.SearchDomains(n.vm.Subdomain), MTU: n.pod.host.MTU(),
		OnLease: n.learn,
	}
	n.leaseOptions(&c, o)
	return c
}
