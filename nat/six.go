package nat

// Theory of operation, for IPv6.
//
// A [Masquerade6] is a [Masquerade] whose remote addresses are numbers: the
// guest's address and the pod's are one each, so that the other end's is the
// only one that the flow table holds, in 32 bits. Table, port spaces, limits,
// TCP states and timers are the same code. What differs is here: headers, the
// checksums over longer addresses, ICMPv6, fragments, and that no router
// fragments.

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"sidewire/engine/frame"
)

// Router6 is a [Router] for IPv6.
type Router6 interface {
	Route(dst Addr6) *frame.Hop
}

// LocalAddrs6 knows the pod's own IPv6 addresses. It is safe for concurrent use.
type LocalAddrs6 interface {
	Local(ip Addr6) bool
}

// Guest6 is one private side.
type Guest6 struct {
	Port        frame.PortID // the guest's NIC
	LocalTap    frame.PortID // the tap that owns Gateway in the pod; 0 if there is none
	IP, Gateway Addr6
	Prefix      int       // of the guest's network
	MAC         frame.MAC // zero until it is learned
	MTU         int       // largest IP packet that the guest takes; 0 is no limit
	// Ports are published by the pod's address. With none, everything is.
	Ports []Forward
}

// Config6 is what a Masquerade6 is made of. Its fields are those of [Config].
type Config6 struct {
	Guests      []Guest6
	Uplink      frame.PortID
	KernelPort  frame.PortID
	Router      Router6
	Local       LocalAddrs6 // may be nil
	External    Addr6       // the pod's address
	GatewayMAC  frame.MAC
	PortRange   PortRange
	KernelRange PortRange
	Filtering   Filtering
	Timeouts    Timeouts
	Limits      Limits
	Deny        []netip.Prefix // those of IPv4 are passed over
	PortFree    func(proto uint8, port uint16) bool
}

// Masquerade6 is a NAT66 with one external address. It is safe for concurrent
// use. Its stages judge frames with IPv6 alone and leave all others.
type Masquerade6 struct {
	m        *Masquerade
	addrs    addrTable
	external Addr6
	router   Addr6 // link-local address of the gateway
	local    LocalAddrs6
	deny     []netip.Prefix
	guests   []*guest6
}

// guest6 is what is known of a Guest6 at run time, beside what m.guests knows.
type guest6 struct {
	*guest
	ip, gateway Addr6
	net         netip.Prefix
}

// byNumber asks the router for the address that a number stands for.
type byNumber struct {
	addrs  *addrTable
	router Router6
}

func (r byNumber) Route(id uint32) *frame.Hop { return r.router.Route(r.addrs.address(id)) }

// New6 checks the configuration and makes a Masquerade6 with no flows.
func New6(c Config6) (*Masquerade6, error) {
	if c.Router == nil {
		return nil, errors.New("masquerade of IPv6: no router")
	}
	m := &Masquerade6{external: c.External, local: c.Local, deny: c.Deny}
	inner := Config{
		Uplink: c.Uplink, KernelPort: c.KernelPort, Router: byNumber{&m.addrs, c.Router}, External: 1, GatewayMAC: c.GatewayMAC,
		PortRange: c.PortRange, KernelRange: c.KernelRange, Filtering: c.Filtering, Timeouts: c.Timeouts, Limits: c.Limits,
		PortFree: c.PortFree,
	}
	for i, g := range c.Guests {
		if err := g.check(); err != nil {
			return nil, fmt.Errorf("masquerade of IPv6: guest %d: %w", i, err)
		}
		// The numbers in the place of addresses are never looked at.
		inner.Guests = append(inner.Guests, Guest{
			Port: g.Port, LocalTap: g.LocalTap, IP: 2, Gateway: 1, Prefix: 30, MAC: g.MAC, MTU: g.MTU, Ports: g.Ports,
		})
	}
	var err error
	if m.m, err = New(inner); err != nil {
		return nil, err
	}
	m.m.remotes = &m.addrs
	m.addrs.init(m.m.cfg.Limits.Table)
	gw := m.m.cfg.GatewayMAC
	m.router = Addr6{0xfe, 0x80, 8: gw[0] ^ 2, 9: gw[1], 10: gw[2], 11: 0xff, 12: 0xfe, 13: gw[3], 14: gw[4], 15: gw[5]}
	for i, g := range c.Guests {
		m.guests = append(m.guests, &guest6{m.m.guests[i], g.IP, g.Gateway, netip.PrefixFrom(netip.AddrFrom16(g.IP), g.Prefix).Masked()})
	}
	return m, nil
}

func (g *Guest6) check() error {
	ip, gw := netip.AddrFrom16(g.IP), netip.AddrFrom16(g.Gateway)
	net, err := ip.Prefix(g.Prefix)
	switch {
	case err != nil || g.Prefix < 1:
		return fmt.Errorf("prefix length %d", g.Prefix)
	case ip == gw || !net.Contains(gw) || !ip.IsGlobalUnicast() || ip.Is4In6():
		return errors.New("address and gateway must be two addresses of the guest's network")
	}
	return nil
}

// LearnMAC is [Masquerade.LearnMAC].
func (m *Masquerade6) LearnMAC(guest int, mac frame.MAC) { m.m.LearnMAC(guest, mac) }

// Run is [Masquerade.Run].
func (m *Masquerade6) Run(ctx context.Context, now func() int64) { m.m.Run(ctx, now) }

// Sweep is [Masquerade.Sweep].
func (m *Masquerade6) Sweep(now int64) time.Duration { return m.m.Sweep(now) }

// AddForward is [Masquerade.AddForward].
func (m *Masquerade6) AddForward(f Forward) error { return m.m.AddForward(f) }

// RemoveForward is [Masquerade.RemoveForward].
func (m *Masquerade6) RemoveForward(f Forward) error { return m.m.RemoveForward(f) }

// Forwards is [Masquerade.Forwards].
func (m *Masquerade6) Forwards() []Forward { return m.m.Forwards() }

// Stats is [Masquerade.Stats].
func (m *Masquerade6) Stats() Stats { return m.m.Stats() }

// Flows is [Masquerade.Flows].
func (m *Masquerade6) Flows(now int64, fn func(FlowInfo) bool) {
	m.m.eachFlow(func(r ref) bool {
		remote := netip.AddrFrom16(m.addrs.address(uint32(r.w0 >> 32)))
		if !r.alive() {
			return true
		}
		i := m.m.info(r, seconds(now))
		i.GuestAddr, i.Remote = netip.AddrFrom16(m.guests[i.Guest].ip), remote
		if i.Proto == frame.ProtoICMP {
			i.Proto = frame.ProtoICMPv6
		}
		return fn(i)
	})
}

// isLocal says whether an address is the pod's own.
func (m *Masquerade6) isLocal(a *Addr6) bool {
	return *a == m.external || m.local != nil && m.local.Local(*a)
}

// behind says whether an address is of a guest's network: nobody outside has one,
// least of all the gateway's, as whom guests see the pod.
func (m *Masquerade6) behind(a *Addr6) bool {
	ip := netip.AddrFrom16(*a)
	for _, g := range m.guests {
		if g.net.Contains(ip) {
			return true
		}
	}
	return false
}

// run6 is run, for the frames of a flow one after the other.
type run6 struct {
	run
	remote Addr6
}

// flow finds the flow that k leads to for a remote address, with the tuple's
// number of it set in make. The caller fills in everything else.
func (m *Masquerade6) find(remote *Addr6, key func(id uint32) key) ref {
	id := m.addrs.find(remote)
	if id == 0 {
		return ref{}
	}
	k := key(id)
	r := m.m.table.find(&k)
	if !r.found() || !m.addrs.is(id, remote) || !r.alive() {
		return ref{} // the number is another's by now: the flow has ended
	}
	return r
}

// ends6 is ends for IPv6. Queries of ICMPv6 are ICMP's to the table.
func ends6(f *frame.Frame, side int) (near, far uint16, field int, reason frame.DropReason) {
	if f.Proto != frame.ProtoICMPv6 {
		if f.Proto == frame.ProtoICMP || f.Proto == protoRouting {
			return 0, 0, 0, frame.NotCarried
		}
		return ends(f, side)
	}
	h := f.L4Bytes()
	if len(h) < 8 {
		return 0, 0, 0, frame.BadTransport
	}
	port, ok := queryPort6(h[0], side)
	if !ok {
		return 0, 0, 0, frame.NotCarried
	}
	return be16(h[queryID:]), port, queryID, frame.ReasonNone
}

// tableProto is the protocol of a flow in the table.
func tableProto(f *frame.Frame) uint8 {
	if f.Proto == frame.ProtoICMPv6 {
		return frame.ProtoICMP
	}
	return f.Proto
}

const (
	protoRouting  = 43
	protoFragment = 44
)

// soft says whether the addresses, lengths and offloads of a packet hold as far
// as its rewriting needs them.
func sound6(f *frame.Frame, frag frame.Frag6) frame.DropReason {
	switch {
	case !offloadFits6(f, frag):
		return frame.BadOffload
	case frag.At != 0 && (frag.More || frag.Offset != 0):
		return checkFragment6(f, frag)
	}
	return frame.ReasonNone
}

// martian says whether no packet may come from or go to an address beyond its
// own link: unspecified, loopback, mapped IPv4, link-local, multicast.
func martian(a *Addr6) bool {
	hi, lo := halves(a)
	return a[0] == 0xff || linkLocal(a) || hi == 0 && (lo <= 1 || lo>>32 == 0xffff)
}

func linkLocal(a *Addr6) bool { return a[0] == 0xfe && a[1]&0xc0 == 0x80 }
