package main

import (
	"context"
	"log/slog"
	"net/netip"
	"slices"

	"sidewire/dhcp"
	"sidewire/engine"
	"sidewire/engine/frame"
	"sidewire/engine/uplink"
	"sidewire/engine/vmi"
)

// podBridge is an interface whose guest takes a link's place: a cable between
// the guest's port and the link, with a server of the link's address at the
// guest's end if the link had one.
type podBridge struct {
	nic
	netns string
	link  string
	view  *uplink.LinkView // the link by itself
	kind  uplink.LinkKind

	host   *uplink.Delegation
	up     *uplink.Uplink
	port   frame.PortID   // to the link
	nat    *engine.MACNAT // nil: frames pass with the guest's own address
	links  *uplink.Links
	resolv string // path of the resolv.conf
}

// open takes the link's place and builds the guest's side up. What it built is
// taken down with the server; stopEngine must have run before the ports' memory
// and sockets go.
func (b *podBridge) open(ctx context.Context, s *server, o *options, stopEngine func() error) error {
	if err := uplink.InNetNS(b.netns, func() error { return b.openLink(s, o) }); err != nil {
		return bridgeError(err)
	}
	b.said(s.log)
	b.longer = true
	if err := b.nic.open(s, o, b.view.MTU, b.snapshot(), nil); err != nil {
		return err
	}
	if b.view.Address().IsValid() {
		if err := b.lease(ctx, s, o); err != nil {
			return err
		}
	}
	// The workers stop before anything of this is closed.
	s.onStop(stopEngine)
	if err := b.wire(s); err != nil {
		return err
	}
	return b.listen(ctx, s)
}

// openLink takes the link's place.
func (b *podBridge) openLink(s *server, o *options) (err error) {
	if b.kind.ByIP {
		if err := uplink.DropGuestAddrs(b.link); err != nil {
			return err
		}
	}
	b.host, err = uplink.Delegate(uplink.DelegateConfig{
		Link: b.link, StateDir: o.linkState(), Owner: b.name(), Guest: b.mac(), KeepMAC: b.kind.OneMAC, KeepAddrs: b.kind.ByIP,
	})
	if err != nil {
		return err
	}
	s.onStop(b.host.Restore)
	b.view.Saved = *b.host.Saved()
	one := b.kind.OneMAC
	b.up, err = uplink.Open(uplink.Config{Link: b.link, Workers: s.engine.Workers(), Promiscuous: !one, AllMulti: one, Mark: uplink.Mark})
	if err != nil {
		return err
	}
	s.onStop(b.up.Close)
	// A link that delivers by IP address has to learn the guest's.
	if one && (b.mac() != b.view.MAC || b.kind.ByIP) {
		b.nat = engine.NewMACNAT(engine.MACNATConfig{Link: b.view.MAC, Guests: []frame.MAC{b.mac()}, Shared: b.kind.Shared}, s.engine.Workers())
	}
	if b.kind.ByIP {
		if err := keepGuestAddrs(s, b.link, b.nat); err != nil {
			return err
		}
	}
	if b.links, err = uplink.WatchLinks(func(l uplink.LinkStatus) { b.linkChanged(s.log, l) }, b.link); err != nil {
		return err
	}
	s.onStop(func() error { b.links.Close(); return nil })
	return nil
}

// said notes what was done to the link.
func (b *podBridge) said(log *slog.Logger) {
	log = log.With("interface", b.name(), "link", b.link)
	for _, w := range b.host.Warnings {
		log.Warn(w)
	}
	what := "the guest takes the link's place"
	if b.host.Resumed {
		what = "the guest keeps the link's place, which it had before a crash"
	}
	log.Info(what, "address", b.view.Address(), "mac", b.mac(), "state", b.host.StateFile())
	if b.view.Address().IsValid() && len(b.view.Routes) == 0 {
		log.Warn("no route leads out by the link: the guest is leased its address without a router")
	}
}

// linkChanged says what became of the link, and what that means.
func (b *podBridge) linkChanged(log *slog.Logger, l uplink.LinkStatus) {
	log = log.With("interface", b.name(), "link", l.Name)
	switch l.State {
	case uplink.LinkUp:
		log.Info("link is up again")
	case uplink.LinkGone:
		log.Error("link is gone: guest and outside do not reach each other until sidewire is started again")
	default:
		log.Warn("link is without use: guest and outside do not reach each other", "state", l.State)
	}
}

// snapshot is how much of a frame the stages of the guest's port read.
func (b *podBridge) snapshot() int {
	switch {
	case b.view.Address().IsValid() || len(b.view.Neighbours) > 0 || b.nat != nil:
		return 0 // DHCP and ARP lie behind the headers
	case b.iface.QueuePairs > 1:
		return engine.WireHead
	}
	return switchHead
}

// wire gives stages and workers to the two ports.
func (b *podBridge) wire(s *server) error {
	e := s.engine
	var port engine.Port = b.up
	if b.nat != nil {
		port = b.nat.Port(b.up)
	}
	var err error
	if b.port, err = e.AddPort(b.name()+" link", port); err != nil {
		return err
	}
	fromGuest, fromLink := engine.NewWire(b.nic.port, b.port, b.iface.QueuePairs)
	var stages []engine.Stage
	if b.dhcp != nil {
		stages = append(stages, b.dhcp)
	}
	if len(b.view.Neighbours) > 0 {
		stages = append(stages, newStaticARP(b.nic.port, b.view.Neighbours))
	}
	stages = append(stages, &tooLong{b.nic.port, b.view.MTU})
	e.SetStages(b.nic.port, append(stages, fromGuest)...)
	if b.nat != nil {
		e.SetStages(b.port, b.nat, fromLink)
	} else {
		e.SetStages(b.port, fromLink)
	}
	for i, q := range b.up.Queues() {
		w := i % e.Workers()
		if err := q.SetWatcher(e.Worker(w)); err != nil {
			return err
		}
		e.AddQueue(b.port, q, w)
	}
	b.attach(s)
	return nil
}

// lease serves the link's address to the guest, and follows the resolv.conf.
func (b *podBridge) lease(ctx context.Context, s *server, o *options) error {
	b.resolv = resolvConf(o, b.netns)
	conf, err := dhcp.ResolvConf(b.resolv)
	if err != nil {
		return badInput("resolvers: %w; name a file with --resolv-conf", err)
	}
	log := s.log.With("interface", b.name(), "file", b.resolv)
	b.warnResolvers(log, conf)
	if b.dhcp, err = dhcp.New(b.dhcpConfig(o, conf)); err != nil {
		return inputError{err}
	}
	w, err := watchFile(b.resolv)
	if err != nil {
		log.Warn("changes of the pod's resolvers are not followed", "err", err)
		return nil
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for err := error(nil); err == nil; err = w.Next() {
			// It may have changed before it was watched, too. One that names nobody is
			// being written: another event follows.
			now, rerr := dhcp.ResolvConf(b.resolv)
			if rerr != nil || len(now.Servers) == 0 || slices.Equal(now.Servers, conf.Servers) && slices.Equal(now.Search, conf.Search) {
				continue
			}
			conf = now
			if err := b.dhcp.Update(b.dhcpConfig(o, conf)); err != nil {
				log.Warn("the guest's lease keeps the old resolvers", "err", err)
			}
		}
	}()
	s.onStop(func() error {
		err := w.Close()
		<-done
		return err
	})
	return nil
}

// warnResolvers says which of the pod's resolvers are of no use to a guest that
// has left the pod.
func (b *podBridge) warnResolvers(log *slog.Logger, conf dhcp.Resolv) {
	if use := guestResolvers(conf); len(use) == 0 {
		log.Warn("no resolver of the pod's has an IPv4 address that the guest could reach: its lease names none", "resolvers", conf.Servers)
	} else if slices.ContainsFunc(conf.Servers, onlyInPod) {
		log.Warn("resolvers on the pod's loopback are left out of the guest's lease: it does not reach them", "left", use)
	}
}

func onlyInPod(a netip.Addr) bool { return a.IsLoopback() || a.IsUnspecified() }

// guestResolvers are those of the pod's that its lease can name: without any it
// is KubeVirt's own choice.
func guestResolvers(conf dhcp.Resolv) (out []netip.Addr) {
	if len(conf.Servers) == 0 {
		return conf.DNS4(netip.Addr{})
	}
	for _, a := range conf.Servers {
		if a.Is4() && !onlyInPod(a) {
			out = append(out, a)
		}
	}
	return out
}

// dhcpConfig is what the guest is leased: what the link was.
func (b *podBridge) dhcpConfig(o *options, conf dhcp.Resolv) dhcp.Config {
	c := dhcp.Config{
		Port: b.nic.port, MACs: []frame.MAC{b.mac()}, Address: b.view.Address(), ServerIP: b.serverIP(),
		DNS: guestResolvers(conf), Search: conf.SearchDomains(b.vm.Subdomain), MTU: b.view.MTU,
	}
	c.Router, c.Routes = podRoutes(&b.view.Saved)
	b.leaseOptions(&c, o)
	return c
}

// serverIP is what the server calls itself: an address that is nobody's, as
// KubeVirt has it by the interface's place in the spec.
func (b *podBridge) serverIP() netip.Addr {
	i := slices.IndexFunc(b.vm.Interfaces, func(x vmi.Interface) bool { return x.Name == b.iface.Name })
	last := 10 + i
	if i > 9 {
		last = 100 + i
	}
	return netip.AddrFrom4([4]byte{169, 254, byte(75 + last/256), byte(last)})
}

// podRoutes are the router and the classless routes of a link: the next hop of
// the first route, and all routes but that of the link's own network, the
// default one last.
func podRoutes(l *uplink.Saved) (router netip.Addr, out []dhcp.Route) {
	var last []dhcp.Route
	if len(l.Routes) > 0 {
		router = l.Routes[0].Via
	}
	seen := map[netip.Prefix]bool{}
	for _, r := range l.Routes {
		own := !r.Via.IsValid() && r.Dest == l.Address().Masked()
		if own || seen[r.Dest] { // of several to one destination the kernel takes the first
			continue
		}
		seen[r.Dest] = true
		route := dhcp.Route{Dest: r.Dest, Via: r.Via}
		if !r.Via.IsValid() {
			route.Via = netip.IPv4Unspecified()
		}
		if r.Dest.Bits() == 0 {
			last = append(last, route)
		} else {
			out = append(out, route)
		}
	}
	return router, append(out, last...)
}
