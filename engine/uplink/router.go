package uplink

import (
	"errors"
	"fmt"
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

// Router finds next hops by one link. Route and Local are safe for concurrent
// use by workers.
type Router struct {
	index int
	local atomic.Pointer[AddrSet]
	sub   *nl.NetlinkSocket
	h     *netlink.Handle // the listener's
	probe prober
	done  sync.WaitGroup // the listener and the prober

	mu     sync.Mutex // guards what follows
	routes asker
	mac    frame.MAC
	mtu    int
	up     bool
	noARP  bool
	neighs map[uint32]*neighbour
	dsts   map[uint32]*frame.Hop // nil is no way by this link
}

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
func NewRouter(linkName string) (*Router, error) {
	r, err := openRouter(linkName)
	if err != nil {
		return nil, err
	}
	r.done.Go(r.listen)
	r.done.Go(r.probeOnDemand)
	return r, nil
}

// openRouter is NewRouter without what runs by itself.
func openRouter(linkName string) (r *Router, err error) {
	r = &Router{neighs: map[uint32]*neighbour{}, dsts: map[uint32]*frame.Hop{}, routes: asker{fd: -1}, probe: newProber()}
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
	r.sub, err = nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_NEIGH,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV4_RULE)
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
