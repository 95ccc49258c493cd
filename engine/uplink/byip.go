package uplink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// guestLabel marks IPv4 addresses that a link has for its guests' sake.
const guestLabel = "sidewire"

// guestFlags are how such addresses are: no route leads there, and nobody asks
// whether they are free, for they are not.
const guestFlags = unix.IFA_F_NOPREFIXROUTE | unix.IFA_F_NODAD

// GuestAddrs keeps the IP addresses that guests have among those of a link which
// the kernel gives what is for its addresses alone (LinkKind.ByIP). The kernel
// must be silent on the link (Delegate with KeepAddrs), or it answers for them.
//
// To the namespace itself they stay strangers: the kernel's local route to each is
// taken away as soon as there is one. A guest may call itself what it likes, also
// what others here talk to, such as their gateway or their resolver.
type GuestAddrs struct {
	h       *netlink.Handle
	link    netlink.Link
	guests  func(yield func(netip.Addr, frame.MAC) bool)
	refused func(error)
	added   map[netip.Addr]bool
	routes  *nl.NetlinkSocket
	routed  chan netip.Addr // the kernel leads an address to itself; not valid: any of them
	stop    chan struct{}
	done    sync.WaitGroup
}

// KeepGuestAddrs follows the addresses that guests calls its argument with,
// whenever something comes by learned, until Close. refused is told the first time
// that the kernel does not take one.
func KeepGuestAddrs(name string, learned <-chan struct{}, guests func(yield func(netip.Addr, frame.MAC) bool), refused func(error)) (*GuestAddrs, error) {
	l, err := link(name)
	if err != nil {
		return nil, err
	}
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("addresses of %s: %w", name, err)
	}
	routes, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		h.Close()
		return nil, fmt.Errorf("addresses of %s: %w", name, err)
	}
	g := &GuestAddrs{
		h: h, link: l, guests: guests, refused: refused, added: map[netip.Addr]bool{},
		routes: routes, routed: make(chan netip.Addr), stop: make(chan struct{}),
	}
	g.done.Go(g.watchRoutes)
	g.done.Go(func() {
		g.follow()
		for {
			select {
			case <-learned:
				g.follow()
			case a := <-g.routed:
				g.unroute(a)
			case <-g.stop:
				return
			}
		}
	})
	return g, nil
}

// watchRoutes tells of local routes by the link, until routes is closed.
func (g *GuestAddrs) watchRoutes() {
	tell := func(a netip.Addr) {
		select {
		case g.routed <- a:
		case <-g.stop:
		}
	}
	for {
		msgs, _, err := g.routes.Receive()
		switch {
		case err == nil:
			for _, m := range msgs {
				if a, ok := localRoute(m.Data, g.link.Attrs().Index); ok && m.Header.Type == unix.RTM_NEWROUTE {
					tell(a)
				}
			}
		case errors.Is(err, unix.ENOBUFS):
			tell(netip.Addr{})
		case errors.Is(err, unix.EINTR):
		default:
			return
		}
	}
}

// localRoute is the address that a route message leads to the namespace itself by
// a link.
func localRoute(m []byte, index int) (a netip.Addr, ok bool) {
	if len(m) < sizeofRoute || m[rtTableAt] != unix.RT_TABLE_LOCAL || m[rtTypeAt] != unix.RTN_LOCAL {
		return a, false
	}
	if oif := attr(m, sizeofRoute, unix.RTA_OIF); len(oif) != 4 || int(binary.NativeEndian.Uint32(oif)) != index {
		return a, false
	}
	return netip.AddrFromSlice(attr(m, sizeofRoute, unix.RTA_DST))
}

// unroute takes the local route to an address that we added away, or to all of
// them. There may be none yet, which the kernel tells when there is.
func (g *GuestAddrs) unroute(a netip.Addr) {
	if !a.IsValid() {
		for a := range g.added {
			g.unroute(a)
		}
	} else if g.added[a] {
		_ = g.h.RouteDel(&netlink.Route{
			LinkIndex: g.link.Attrs().Index, Dst: guestAddr(a).IPNet, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST,
		})
	}
}

// follow adds and removes what has changed.
func (g *GuestAddrs) follow() {
	now := map[netip.Addr]bool{}
	for a := range g.guests {
		now[a] = true
	}
	for a := range g.added {
		if !now[a] {
			_ = g.h.AddrDel(g.link, guestAddr(a)) // it may be gone already
			delete(g.added, a)
		}
	}
	own := g.own()
	for a := range now {
		if own[a] {
			continue // ours, or the link's, which the guest was handed
		}
		switch err := g.h.AddrAdd(g.link, guestAddr(a)); {
		case err == nil:
			g.added[a] = true
			g.unroute(a)
		case g.refused != nil:
			g.refused(fmt.Errorf("address %s of a guest on %s: %w", a, g.link.Attrs().Name, err))
			g.refused = nil
		}
	}
}

// own is what addresses the link has.
func (g *GuestAddrs) own() map[netip.Addr]bool {
	out := map[netip.Addr]bool{}
	addrs, _ := g.h.AddrList(g.link, netlink.FAMILY_ALL) // without, the kernel refuses what is there
	for _, n := range addrs {
		if a, ok := netip.AddrFromSlice(n.IP); ok {
			out[a.Unmap()] = true
		}
	}
	return out
}

// guestAddr is an address as the kernel is to have it.
func guestAddr(a netip.Addr) *netlink.Addr {
	n := &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}, Flags: guestFlags}
	if a.Is4() {
		n.Label = guestLabel
	}
	return n
}

// Close takes away what was added.
func (g *GuestAddrs) Close() {
	close(g.stop)
	g.routes.Close()
	g.done.Wait()
	g.guests = func(func(netip.Addr, frame.MAC) bool) {}
	g.follow()
	g.h.Close()
}

// DropGuestAddrs takes away what a crashed run has left of its guests' addresses
// on a link of the current namespace. It returns ErrInUse if a living one has the
// link, whose guests keep theirs.
func DropGuestAddrs(name string) error {
	l, err := link(name)
	if err != nil {
		return err
	}
	lock, err := lockLink(l.Attrs().Index)
	if err != nil {
		return fmt.Errorf("addresses of %s: %w", name, err)
	}
	defer unix.Close(lock)
	addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("addresses of %s: %w", name, err)
	}
	for _, a := range addrs {
		ones, bits := a.Mask.Size()
		if ones != bits || a.Flags&unix.IFA_F_NOPREFIXROUTE == 0 || bits == 32 && a.Label != guestLabel || bits == 128 && a.Flags&unix.IFA_F_NODAD == 0 {
			continue
		}
		if err := netlink.AddrDel(l, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("address %s of %s: %w", a.IPNet, name, privilege(err, "CAP_NET_ADMIN"))
		}
	}
	return nil
}
