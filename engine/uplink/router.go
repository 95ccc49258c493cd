package uplink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Theory of operation.
//
// A flow asks Route once and keeps the Hop. The router remembers one Hop for
// each next hop and MTU, and for each destination which of them it is, or that
// there is none, so that a guest that scans a network costs one question to
// the kernel for each address, and an answer from memory for the next flow.
// Everything that the kernel tells (it is asked to tell, nothing is polled, so
// an idle router makes no wake-ups) ends in one of three things: a neighbour's
// address is set, or it is invalidated, or hops are retired and the flows ask
// again.
//
// The engine's frames do not pass the kernel's neighbour table, so the kernel
// takes the entry for unused and lets it go stale. A stale entry that frames
// went to since it was last looked at is marked as used, which makes the
// kernel probe it. The hops of one that nobody used are retired instead: the
// next frame asks for the route, and that marks it as used.
//
// Workers ask for routes themselves: the kernel answers that without a lock.
// Questions about neighbours take the RTNL, which anybody on the machine may
// hold for long, so a worker only marks the neighbour and a goroutine asks.

// routeMax, neighMax and mtuMax bound the remembered destinations, the next
// hops, and the MTUs of one next hop.
const (
	routeMax = 4096
	neighMax = 1024
	mtuMax   = 8
)

// Router finds next hops by one link, for IPv4. Route and Local are safe for
// concurrent use by workers. See [Router6] for IPv6.
type Router struct {
	family int // unix.AF_INET or unix.AF_INET6
	index  int
	local  atomic.Pointer[AddrSet]
	local6 atomic.Pointer[map[[16]byte]struct{}]
	sub    *nl.NetlinkSocket
	h      *netlink.Handle // the listener's
	probe  prober
	done   sync.WaitGroup // the listener and the prober

	mu     sync.Mutex // guards what follows
	routes asker
	mac    frame.MAC
	mtu    int
	up     bool
	noARP  bool
	neighs map[netip.Addr]*neighbour
	dsts   map[netip.Addr]*frame.Hop // nil is no way by this link
}

// Router6 is a Router for IPv6.
type Router6 struct{ r *Router }

// NewRouter6 makes a router for a link of the current network namespace.
func NewRouter6(linkName string) (*Router6, error) {
	r, err := startRouter(linkName, unix.AF_INET6)
	if err != nil {
		return nil, err
	}
	return &Router6{r}, nil
}

// Route is [Router.Route].
func (r *Router6) Route(dst [16]byte) *frame.Hop { return r.r.route(netip.AddrFrom16(dst)) }

// Local says whether an address is one of the namespace's own on links, but for
// loopback and link-local ones. It is safe for concurrent use.
func (r *Router6) Local(ip [16]byte) bool {
	_, ok := (*r.r.local6.Load())[ip]
	return ok
}

// Close is [Router.Close].
func (r *Router6) Close() { r.r.Close() }

// AddrSet is an immutable set of IPv4 addresses.
type AddrSet struct {
	table []uint32 // open addressing; 0 is free
	mask  uint32
}

// Has says whether the address is in the set. A nil set is empty.
func (s *AddrSet) Has(ip uint32) bool {
	if s == nil || ip == 0 {
		return false
	}
	for i := hashAddr(ip) & s.mask; s.table[i] != 0; i = (i + 1) & s.mask {
		if s.table[i] == ip {
			return true
		}
	}
	return false
}

func hashAddr(ip uint32) uint32 { return ip * 0x9e3779b1 >> 16 }

func newAddrSet(ips []uint32) *AddrSet {
	n := 8
	for n < 2*len(ips)+1 {
		n *= 2
	}
	s := &AddrSet{table: make([]uint32, n), mask: uint32(n - 1)}
	for _, ip := range ips {
		i := hashAddr(ip) & s.mask
		for s.table[i] != 0 && s.table[i] != ip {
			i = (i + 1) & s.mask
		}
		s.table[i] = ip
	}
	return s
}

// NewRouter makes a router for a link of the current network namespace.
func NewRouter(linkName string) (*Router, error) { return startRouter(linkName, unix.AF_INET) }

func startRouter(linkName string, family int) (*Router, error) {
	r, err := openRouter(linkName, family)
	if err != nil {
		return nil, err
	}
	r.done.Go(r.listen)
	r.done.Go(r.probeOnDemand)
	return r, nil
}

// openRouter is NewRouter without what runs by itself.
func openRouter(linkName string, family int) (r *Router, err error) {
	r = &Router{family: family, neighs: map[netip.Addr]*neighbour{}, dsts: map[netip.Addr]*frame.Hop{}, routes: asker{fd: -1}, probe: newProber()}
	defer func() {
		if err != nil {
			r.closeSockets()
			r, err = nil, fmt.Errorf("router of %s: %w", linkName, err)
		}
	}()
	l, err := link(linkName)
	if err != nil {
		return r, err
	}
	r.index = l.Attrs().Index
	// Subscribe before the first look, so that no change falls between.
	groups := []uint{unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE}
	if family == unix.AF_INET6 {
		groups = []uint{unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV6_RULE}
	}
	r.sub, err = nl.Subscribe(unix.NETLINK_ROUTE, groups...)
	if err != nil {
		return r, err
	}
	if r.h, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return r, err
	}
	if err := errors.Join(r.routes.open(), r.probe.open()); err != nil {
		return r, err
	}
	return r, errors.Join(r.loadLink(), r.loadAddrs(), r.loadNeighbours())
}

// Close ends the subscription. Hops stay as they are.
func (r *Router) Close() {
	r.sub.Close()
	close(r.probe.stop)
	r.done.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sub = nil
	r.closeSockets()
}

func (r *Router) closeSockets() {
	if r.sub != nil {
		r.sub.Close()
	}
	if r.h != nil {
		r.h.Close()
	}
	r.routes.close()
	r.probe.close()
}

// Local is the set of the namespace's own addresses on links, without those
// in 127.0.0.0/8. Load it once per batch.
func (r *Router) Local() *AddrSet { return r.local.Load() }

// Route returns the next hop to dst, or nil if there is no way by this link.
// Ask again when the Hop is retired.
func (r *Router) Route(dst uint32) *frame.Hop {
	return r.route(netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, dst))))
}

func (r *Router) route(dst netip.Addr) *frame.Hop {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.up {
		return nil
	}
	if h, ok := r.dsts[dst]; ok && (h == nil || !h.Retired()) {
		return h
	}
	b := r.routes.route(dst)
	if b == nil {
		return nil // the kernel did not answer, which says nothing
	}
	var h *frame.Hop
	if a, ok := parseRoute(b, dst); ok && a.link == r.index {
		h = r.hop(a.next, a.mtu)
	}
	if len(r.dsts) >= routeMax {
		clear(r.dsts)
	}
	r.dsts[dst] = h
	return h
}
