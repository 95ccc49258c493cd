package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/vishvananda/netlink"

	"sidewire/engine/enginetest"
)

// held is a lease that a link has.
type held struct {
	lease *nclient4.Lease
	addr  *netlink.Addr
}

// asked are the options that a Linux guest asks for.
var asked = []dhcpv4.OptionCode{
	dhcpv4.OptionSubnetMask, dhcpv4.OptionRouter, dhcpv4.OptionDomainNameServer, dhcpv4.OptionHostName,
	dhcpv4.OptionDomainName, dhcpv4.OptionInterfaceMTU, dhcpv4.OptionNTPServers, dhcpv4.OptionDNSDomainSearchList,
	dhcpv4.OptionClasslessStaticRoute,
}

func (a *agent) dhcp(c *enginetest.GuestCmd, r *enginetest.GuestReply) error {
	link, err := up(c.If)
	if err != nil {
		return err
	}
	if err := waitCarrier(c.If, c.Timeout); err != nil {
		return err
	}
	client, err := nclient4.New(c.If, nclient4.WithTimeout(time.Second), nclient4.WithRetry(int(c.Timeout/time.Second)+1))
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), c.Timeout)
	defer cancel()
	lease, err := client.Request(ctx, dhcpv4.WithRequestedOptions(asked...))
	if err != nil {
		return err
	}
	r.Lease = describe(lease.ACK)
	return a.apply(link, lease)
}

// apply configures a link as the lease says (RFC 3442: classless routes
// replace the router).
func (a *agent) apply(link netlink.Link, lease *nclient4.Lease) error {
	ack := lease.ACK
	mask := ack.SubnetMask()
	if mask == nil {
		mask = ack.YourIPAddr.DefaultMask()
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: ack.YourIPAddr, Mask: mask}}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("address %v: %w", addr, err)
	}
	a.mu.Lock()
	a.leases[link.Attrs().Name] = &held{lease, addr}
	a.mu.Unlock()
	if mtu := mtuOption(ack); mtu > 0 {
		if err := netlink.LinkSetMTU(link, mtu); err != nil {
			return fmt.Errorf("mtu %d: %w", mtu, err)
		}
	}
	if routes := ack.ClasslessStaticRoute(); len(routes) > 0 {
		for _, rt := range routes {
			if err := addRoute(link, rt.Dest, rt.Router); err != nil {
				return err
			}
		}
	} else {
		for _, gw := range ack.Router() {
			if err := addRoute(link, nil, gw); err != nil {
				return err
			}
		}
	}
	var search []string
	if l := ack.DomainSearch(); l != nil {
		search = l.Labels
	} else if d := ack.DomainName(); d != "" {
		search = []string{d}
	}
	return writeResolv(ack.DNS(), search)
}

// addRoute adds a route by way of gw, which is on the link if the address does
// not say so (a /32 lease), or 0.0.0.0 for the link itself.
func addRoute(link netlink.Link, dst *net.IPNet, gw net.IP) error {
	rt := &netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst, Gw: gw, Flags: int(netlink.FLAG_ONLINK)}
	if dst != nil {
		if ones, _ := dst.Mask.Size(); ones == 0 {
			rt.Dst = nil
		}
	}
	if gw.IsUnspecified() {
		rt.Gw, rt.Flags, rt.Scope = nil, 0, netlink.SCOPE_LINK
	}
	if err := netlink.RouteReplace(rt); err != nil {
		return fmt.Errorf("route %v via %v: %w", dst, gw, err)
	}
	return nil
}

func writeResolv(servers []net.IP, search []string) error {
	var b strings.Builder
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %v\n", s)
	}
	if len(search) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(search, " "))
	}
	return os.WriteFile("/etc/resolv.conf", []byte(b.String()), 0o644)
}

func mtuOption(m *dhcpv4.DHCPv4) int {
	if b := m.Options.Get(dhcpv4.OptionInterfaceMTU); len(b) == 2 {
		return int(b[0])<<8 | int(b[1])
	}
	return 0
}

func describe(m *dhcpv4.DHCPv4) *enginetest.GuestLease {
	ones, _ := m.SubnetMask().Size()
	l := &enginetest.GuestLease{
		Addr: m.YourIPAddr.String() + "/" + strconv.Itoa(ones), Server: m.ServerIdentifier().String(),
		Domain: m.DomainName(), Hostname: m.HostName(), MTU: mtuOption(m), Time: m.IPAddressLeaseTime(0),
		Options: map[string]string{},
	}
	for _, ip := range m.Router() {
		l.Routers = append(l.Routers, ip.String())
	}
	for _, ip := range m.DNS() {
		l.DNS = append(l.DNS, ip.String())
	}
	if s := m.DomainSearch(); s != nil {
		l.Search = s.Labels
	}
	for _, rt := range m.ClasslessStaticRoute() {
		l.Routes = append(l.Routes, rt.Dest.String()+" via "+rt.Router.String())
	}
	for code, v := range m.Options {
		l.Options[strconv.Itoa(int(code))] = hex.EncodeToString(v)
	}
	return l
}

func (a *agent) renew(c *enginetest.GuestCmd, r *enginetest.GuestReply) error {
	h, err := a.held(c.If)
	if err != nil {
		return err
	}
	link, err := netlink.LinkByName(c.If)
	if err != nil {
		return err
	}
	// A renewal comes from the leased address, by unicast (RFC 2131, 4.3.2).
	client, err := nclient4.New(c.If, nclient4.WithTimeout(time.Second), nclient4.WithRetry(int(c.Timeout/time.Second)+1),
		nclient4.WithUnicast(&net.UDPAddr{IP: h.addr.IP, Port: dhcpv4.ClientPort}),
		nclient4.WithServerAddr(&net.UDPAddr{IP: h.lease.ACK.ServerIdentifier(), Port: dhcpv4.ServerPort}))
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), c.Timeout)
	defer cancel()
	lease, err := client.Renew(ctx, h.lease)
	if err != nil {
		return err
	}
	r.Lease = describe(lease.ACK)
	return a.apply(link, lease)
}

func (a *agent) release(c *enginetest.GuestCmd, _ *enginetest.GuestReply) error {
	h, err := a.held(c.If)
	if err != nil {
		return err
	}
	link, err := netlink.LinkByName(c.If)
	if err != nil {
		return err
	}
	client, err := nclient4.New(c.If, nclient4.WithUnicast(&net.UDPAddr{IP: h.addr.IP, Port: dhcpv4.ClientPort}))
	if err != nil {
		return err
	}
	defer client.Close()
	a.mu.Lock()
	delete(a.leases, c.If)
	a.mu.Unlock()
	return errors.Join(client.Release(h.lease), netlink.AddrDel(link, h.addr))
}

func (a *agent) held(name string) (*held, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if h := a.leases[name]; h != nil {
		return h, nil
	}
	return nil, errors.New("no lease")
}
