package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"

	"sidewire/engine"
	"sidewire/engine/frame"
	"sidewire/engine/uplink"
	"sidewire/engine/vmi"
	"sidewire/nat"
)

// pod is one address of a namespace and the guests that live behind it: the
// packet path of masquerade.
type pod struct {
	netns string
	link  string
	nics  []*podNIC

	host   *uplink.Pod
	up     *uplink.Uplink
	kernel *uplink.Kernel
	router *uplink.Router // nil without an IPv4 address, as nat
	links  *uplink.Links
	nat    *nat.Masquerade
	six    pod6
}

// name is that of its guests.
func (p *pod) name() string {
	var names []string
	for _, n := range p.nics {
		names = append(names, n.name())
	}
	return strings.Join(names, ", ")
}

// aliasBase is where the pod's addresses begin for guests whose own are another
// guest's too: four for each. Nothing outside the pod sees them.
var aliasBase = netip.MustParseAddr("169.254.64.0")

// add puts another guest behind the pod's address.
func (p *pod) add(n *podNIC) error {
	n.pod, n.index = p, len(p.nics)
	net := n.iface.Network
	n.guestIP, n.gateway = net.Guest, netip.PrefixFrom(net.Gateway, net.CIDR.Bits())
	for _, other := range p.nics {
		if net.CIDR.Overlaps(other.iface.Network.CIDR) {
			n.aliased = true
		}
	}
	if n.aliased {
		if n.index > 255 {
			return badInput("%d VMIs behind %s of one namespace: give some a namespace of their own with -f FILE@NETNS", n.index+1, p.link)
		}
		b := aliasBase.As4()
		b[2] += byte(n.index / 64)
		b[3] = byte(n.index % 64 * 4)
		b[3]++
		n.gateway = netip.PrefixFrom(netip.AddrFrom4(b), 30)
		n.guestIP = n.gateway.Addr().Next()
	}
	p.nics = append(p.nics, n)
	return nil
}

// open builds the pod's side and its guests' up. What it built is taken down
// with the server; stopEngine must have run before the ports' memory and
// sockets go.
func (p *pod) open(ctx context.Context, s *server, o *options, stopEngine func() error) error {
	err := uplink.InNetNS(p.netns, func() error { return p.openHost(s) })
	if err != nil {
		return hostRefusal{hostError(err), err}
	}
	for _, w := range p.host.Warnings {
		s.log.Warn(w, "interface", p.name())
	}
	for _, n := range p.nics {
		if err := n.open(s, o); err != nil {
			return err
		}
	}
	// The workers stop before anything of this is closed.
	s.onStop(stopEngine)
	if err := p.wire(ctx, s); err != nil {
		return err
	}
	for _, n := range p.nics {
		if err := n.serve(ctx, s, o); err != nil {
			return err
		}
	}
	return nil
}

// openHost opens what lies in the pod's namespace.
func (p *pod) openHost(s *server) (err error) {
	workers := s.engine.Workers()
	c := uplink.TakeoverConfig{Link: p.link, Workers: workers}
	for _, n := range p.nics {
		c.Guests = append(c.Guests, n.uplinkGuest())
	}
	if p.host, err = uplink.Takeover(c); err != nil {
		return err
	}
	s.onStop(p.host.Restore)
	p.up, err = uplink.Open(uplink.Config{
		Link: p.link, Sink: p.host.Sink(), Workers: workers, Direct: len(p.nics) == 1 && p.nics[0].virtio(), Mark: uplink.Mark,
	})
	if err != nil {
		return err
	}
	s.onStop(p.up.Close)
	if p.kernel, err = uplink.OpenKernel(p.link, workers); err != nil {
		return err
	}
	s.onStop(p.kernel.Close)
	if p.host.Addr().IsValid() {
		if p.router, err = uplink.NewRouter(p.link); err != nil {
			return err
		}
		s.onStop(func() error { p.router.Close(); return nil })
	}
	if err := p.open6(s); err != nil {
		return err
	}
	names := []string{p.link, p.host.Sink()}
	for i := range p.nics {
		names = append(names, p.host.Tap(i).Name())
	}
	if p.links, err = uplink.WatchLinks(func(l uplink.LinkStatus) { p.linkChanged(s.log, l) }, names...); err != nil {
		return err
	}
	s.onStop(func() error { p.links.Close(); return nil })
	return nil
}

// linkChanged says what became of a link, and what that means.
func (p *pod) linkChanged(log *slog.Logger, l uplink.LinkStatus) {
	name, lost := p.name(), "guest and outside do not reach each other"
	for _, n := range p.nics {
		if n.localTap().Name() == l.Name {
			name, lost = n.name(), "guest and pod do not reach each other"
		}
	}
	log = log.With("interface", name, "link", l.Name)
	switch l.State {
	case uplink.LinkUp:
		log.Info("link is up again")
	case uplink.LinkGone:
		log.Error("link is gone: " + lost + " until sidewire is started again")
	default:
		log.Warn("link is without use: "+lost, "state", l.State)
	}
}

// wire joins ports, stages and workers.
func (p *pod) wire(ctx context.Context, s *server) error {
	e := s.engine
	up, err := e.AddPort(p.name()+" uplink", p.up)
	if err != nil {
		return err
	}
	kernel, err := e.AddPort(p.name()+" kernel", p.kernel)
	if err != nil {
		return err
	}
	c := nat.Config{
		Uplink: up, KernelPort: kernel,
		PortRange: natRange(p.host.NAT()), KernelRange: natRange(p.host.KernelRange()), PortFree: p.host.PortFree,
	}
	if err := p.wire6(ctx, c); err != nil {
		return err
	}
	if err := p.wire4(ctx, c); err != nil {
		return err
	}
	e.SetStages(up, p.inbound()...)
	if p.up.Direct() {
		p.up.Queues()[0].SetRoom(p.nics[0].device.Reserver(0).AnyQueue())
	}
	for i, q := range p.up.Queues() {
		w := i % e.Workers()
		if err := q.SetWatcher(e.Worker(w)); err != nil {
			return err
		}
		e.AddQueue(up, q, w)
	}
	for _, n := range p.nics {
		if err := n.wire(s); err != nil {
			return err
		}
	}
	return nil
}

// wire4 makes the NAT of IPv4.
func (p *pod) wire4(ctx context.Context, c nat.Config) (err error) {
	if p.router == nil {
		return nil
	}
	c.Router, c.Local, c.External = p.router, podAddrs{p.router}, ip4(p.host.Addr())
	for _, n := range p.nics {
		c.Guests = append(c.Guests, n.guest())
	}
	if p.nat, err = nat.New(c); err != nil {
		return err
	}
	go p.nat.Run(ctx, engine.Now)
	return nil
}

func natRange(r uplink.PortRange) nat.PortRange { return nat.PortRange{First: r.Lo, Last: r.Hi} }

// podAddrs are the pod's own addresses.
type podAddrs struct{ r *uplink.Router }

func (p podAddrs) Local(ip uint32) bool { return p.r.Local().Has(ip) }

// hostError says who has to mend what the host refused.
func hostError(err error) error {
	switch {
	case errors.Is(err, uplink.ErrNoLink):
		return inputError{fmt.Errorf("%w; name the pod network's link with --uplink NETWORK=LINK", err)}
	case errors.Is(err, uplink.ErrPrivilege):
		return machineError{fmt.Errorf("%w: run as root or grant it with: setcap cap_net_admin,cap_net_raw,cap_sys_admin+ep sidewire; or use --path socket", err)}
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
		out = append(out, uplink.Port{Proto: proto, Port: p.Port, Last: p.Last})
	}
	return out
}

func natForwards(ports []vmi.Port) []nat.Forward {
	var out []nat.Forward
	for _, p := range ports {
		proto, _ := protoNumber(p.Protocol) // validated
		out = append(out, nat.Forward{Proto: proto, Port: p.Port, Last: p.Last})
	}
	return out
}
