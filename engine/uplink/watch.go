package uplink

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// listen follows what the kernel tells until Close.
func (r *Router) listen() {
	for {
		msgs, _, err := r.sub.Receive()
		switch {
		case err == nil:
			r.handle(msgs)
		case errors.Is(err, unix.ENOBUFS):
			// Something was lost, nobody knows what.
			r.reload()
		case errors.Is(err, os.ErrClosed), errors.Is(err, unix.EBADF):
			return
		case errors.Is(err, unix.EINTR):
		default:
			return // without news, hops stay as they are
		}
	}
}

func (r *Router) handle(msgs []syscall.NetlinkMessage) {
	routes, links, addrs := false, false, false
	for _, m := range msgs {
		switch m.Header.Type {
		case unix.RTM_NEWNEIGH, unix.RTM_DELNEIGH:
			if n, err := netlink.NeighDeserialize(m.Data); err == nil {
				r.neighbour(n, m.Header.Type == unix.RTM_NEWNEIGH)
			}
		case unix.RTM_NEWLINK, unix.RTM_DELLINK:
			links = true
		case unix.RTM_NEWADDR, unix.RTM_DELADDR:
			addrs, routes = true, true
		default:
			routes = true
		}
	}
	if addrs {
		_ = r.loadAddrs() // the last good set stays
	}
	if links {
		_ = r.loadLink() // a link that is gone is down
	}
	if routes {
		r.retire()
	}
}

func (r *Router) reload() {
	_ = r.loadAddrs()
	_ = r.loadLink()
	r.mu.Lock()
	r.forget()
	r.mu.Unlock()
	_ = r.loadNeighbours() // who is not known is asked for
}

// retire makes all flows ask for their routes again.
func (r *Router) retire() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.retireLocked()
}

// retireLocked keeps what is known of neighbours.
func (r *Router) retireLocked() {
	for ip, n := range r.neighs {
		n.retire()
		if !n.known {
			delete(r.neighs, ip)
		}
	}
	clear(r.dsts)
}

// loadLink looks at the link again. A change of it changes every hop.
func (r *Router) loadLink() error {
	l, err := r.h.LinkByIndex(r.index)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.up = false
		r.forget()
		return fmt.Errorf("link: %w", err)
	}
	a := l.Attrs()
	mac, mtu, up, noARP := macOf(l), a.MTU, a.RawFlags&unix.IFF_UP != 0, a.RawFlags&unix.IFF_NOARP != 0
	if mac == r.mac && mtu == r.mtu && up == r.up && noARP == r.noARP {
		return nil
	}
	if noARP != r.noARP {
		r.forget() // what was known was not asked for, or will not be
	}
	// Neighbours that the change costs are told one by one.
	r.mac, r.mtu, r.up, r.noARP = mac, mtu, up, noARP
	r.retireLocked()
	return nil
}

func (r *Router) loadAddrs() error {
	addrs, err := r.h.AddrList(nil, r.family)
	if err != nil {
		return fmt.Errorf("addresses: %w", err)
	}
	if r.family == unix.AF_INET6 {
		own := map[[16]byte]struct{}{}
		for _, a := range addrs {
			if ip, ok := netip.AddrFromSlice(a.IP); ok && ip.Is6() && !ip.IsLoopback() && !ip.IsLinkLocalUnicast() {
				own[ip.As16()] = struct{}{}
			}
		}
		r.local6.Store(&own)
		return nil
	}
	var ips []uint32
	for _, a := range addrs {
		if ip, ok := addr4(a.IP); ok && ip>>24 != 127 {
			ips = append(ips, ip)
		}
	}
	r.local.Store(newAddrSet(ips))
	return nil
}
