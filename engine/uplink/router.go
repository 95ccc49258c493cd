package uplink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
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
// each next hop, and for each destination which of them it is, so that a
// guest that scans a network costs one question to the kernel for each
// address, and an answer from memory for the next flow. Everything that the
// kernel tells (it is asked to tell, nothing is polled, so an idle router
// makes no wake-ups) ends in one of three things: a neighbour's address is
// set, or it is invalidated, or hops are retired and the flows ask again.
//
// The engine's frames do not pass the kernel's neighbour table, so the kernel
// takes the entry for unused and lets it go stale. A stale entry that frames
// went to since it was last looked at is marked as used, which makes the
// kernel probe it. One that nobody used is retired instead: the next frame
// asks for the route, and that marks it as used.

// routeMax and hopMax bound the remembered destinations and next hops.
const (
	routeMax = 4096
	hopMax   = 1024
)

// Router finds next hops by one link. Route and Local are safe for concurrent
// use by workers.
type Router struct {
	index int
	local atomic.Pointer[AddrSet]
	sub   *nl.NetlinkSocket
	h     *netlink.Handle
	query int // descriptor of a socket of our own for RTM_GETROUTE
	done  chan struct{}

	mu    sync.Mutex // guards what follows, and query
	mac   frame.MAC
	mtu   int
	up    bool
	noARP bool
	hops  map[uint32]*hopEntry // by next hop's address
	dsts  map[uint32]*frame.Hop
	seq   uint32
	buf   [4096]byte
}

type hopEntry struct {
	hop    *frame.Hop
	probed int64 // the hop's Used at the last look
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
func NewRouter(linkName string) (r *Router, err error) {
	r = &Router{query: -1, hops: map[uint32]*hopEntry{}, dsts: map[uint32]*frame.Hop{}, done: make(chan struct{})}
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
	r.query, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return r, err
	}
	if err := errors.Join(r.loadLink(), r.loadAddrs()); err != nil {
		return r, err
	}
	go r.listen()
	return r, nil
}

// Close ends the subscription. Hops stay as they are.
func (r *Router) Close() {
	r.sub.Close()
	<-r.done
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
	if r.query >= 0 {
		unix.Close(r.query)
		r.query = -1
	}
}

// Local is the set of the namespace's own addresses on links, without those
// in 127.0.0.0/8. Load it once per batch.
func (r *Router) Local() *AddrSet { return r.local.Load() }

// Route returns the next hop to dst, or nil if there is no way by this link.
// Ask again when the Hop is retired.
func (r *Router) Route(dst uint32) *frame.Hop {
	r.mu.Lock()
	defer r.mu.Unlock()
	if h := r.dsts[dst]; h != nil && !h.Retired() {
		return h
	}
	a, ok := r.ask(dst)
	if !ok || a.link != r.index || !r.up {
		return nil
	}
	h := r.hop(a.next, a.mtu)
	if len(r.dsts) >= routeMax {
		clear(r.dsts)
	}
	r.dsts[dst] = h
	return h
}

// hop returns the Hop of a neighbour, with its address if the kernel has it.
func (r *Router) hop(next uint32, mtu int) *frame.Hop {
	if mtu == 0 || mtu > r.mtu {
		mtu = r.mtu
	}
	if e := r.hops[next]; e != nil && !e.hop.Retired() {
		if e.hop.MTU == mtu {
			return e.hop
		}
		// The same neighbour by a route with an MTU of its own.
		h := &frame.Hop{MTU: mtu, Src: r.mac}
		if m, ok := e.hop.Addr(); ok {
			h.Set(m)
		}
		e.hop.Retire()
		e.hop = h
		return h
	}
	r.evict()
	h := &frame.Hop{MTU: mtu, Src: r.mac}
	r.hops[next] = &hopEntry{hop: h, probed: -1}
	if r.noARP {
		h.Set(r.mac)
		return h
	}
	if n := r.askNeighbour(next); n != nil && usable(n.State) {
		setHop(h, n.HardwareAddr)
	}
	r.probe(next)
	return h
}

// evict keeps the hops bounded: the unknown ones go first, which are those of
// a guest that scans the link.
func (r *Router) evict() {
	if len(r.hops) < hopMax {
		return
	}
	for ip, e := range r.hops {
		if _, ok := e.hop.Addr(); !ok {
			e.hop.Retire()
			delete(r.hops, ip)
		}
	}
	if len(r.hops) >= hopMax {
		r.retireLocked()
	}
}

func setHop(h *frame.Hop, a net.HardwareAddr) {
	if m := (frame.MAC{}); len(a) == len(m) {
		copy(m[:], a)
		h.Set(m)
	}
}

// usable says whether a neighbour in that state has an address (NUD_VALID).
func usable(state int) bool {
	return state&(netlink.NUD_PERMANENT|netlink.NUD_NOARP|netlink.NUD_REACHABLE|netlink.NUD_PROBE|netlink.NUD_STALE|netlink.NUD_DELAY) != 0
}

// probe tells the kernel that a neighbour is in use: an unknown one is asked
// for, a stale one is asked again.
func (r *Router) probe(next uint32) {
	ip := binary.BigEndian.AppendUint32(nil, next)
	// A failure shows as a neighbour that stays unknown.
	_ = r.h.NeighSet(&netlink.Neigh{LinkIndex: r.index, Family: netlink.FAMILY_V4, IP: ip, Flags: netlink.NTF_USE})
}

func addr4(ip net.IP) (uint32, bool) {
	if ip = ip.To4(); ip == nil {
		return 0, false
	}
	return binary.BigEndian.Uint32(ip), true
}

// answer is what the kernel says of a destination.
type answer struct {
	link int
	next uint32
	mtu  int
}

// ask asks the kernel for the route to dst.
func (r *Router) ask(dst uint32) (answer, bool) {
	fixed := [unix.SizeofRtMsg]byte{unix.AF_INET, 32}
	b := r.transact(unix.RTM_GETROUTE, fixed[:], unix.RTA_DST, dst)
	return parseRoute(b, dst)
}

// askNeighbour asks the kernel for one neighbour; nil if it has none.
func (r *Router) askNeighbour(ip uint32) *netlink.Neigh {
	fixed := [unix.SizeofNdMsg]byte{unix.AF_INET}
	binary.NativeEndian.PutUint32(fixed[4:], uint32(r.index))
	b := r.transact(unix.RTM_GETNEIGH, fixed[:], unix.NDA_DST, ip)
	if len(b) < unix.SizeofNlMsghdr+unix.SizeofNdMsg || binary.NativeEndian.Uint16(b[4:]) != unix.RTM_NEWNEIGH {
		return nil
	}
	n, err := netlink.NeighDeserialize(b[unix.SizeofNlMsghdr:])
	if err != nil {
		return nil
	}
	return n
}

// transact sends a request of a fixed part and one address, and returns the
// answer, valid until the next one, or nil. The kernel answers while it is
// asked, so there is nothing to wait for.
func (r *Router) transact(typ uint16, fixed []byte, attr uint16, ip uint32) []byte {
	r.seq++
	ne := binary.NativeEndian
	b := r.buf[:unix.SizeofNlMsghdr]
	clear(b)
	ne.PutUint16(b[4:], typ)
	ne.PutUint16(b[6:], unix.NLM_F_REQUEST)
	ne.PutUint32(b[8:], r.seq)
	b = append(b, fixed...)
	b = ne.AppendUint16(b, unix.SizeofRtAttr+4)
	b = ne.AppendUint16(b, attr)
	b = binary.BigEndian.AppendUint32(b, ip)
	ne.PutUint32(b, uint32(len(b)))
	if err := unix.Sendto(r.query, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil
	}
	for {
		n, from, err := unix.Recvfrom(r.query, r.buf[:], 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n < unix.SizeofNlMsghdr {
			return nil
		}
		kernel, ok := from.(*unix.SockaddrNetlink)
		if ok && kernel.Pid == 0 && ne.Uint32(r.buf[8:]) == r.seq {
			// Attributes are read from the first message only.
			return r.buf[:min(n, int(ne.Uint32(r.buf[0:])))]
		}
	}
}

// parseRoute reads an RTM_NEWROUTE message. A refusal is an NLMSG_ERROR.
func parseRoute(b []byte, dst uint32) (answer, bool) {
	ne := binary.NativeEndian
	const fixed = unix.SizeofNlMsghdr + unix.SizeofRtMsg
	if len(b) < fixed || ne.Uint16(b[4:]) != unix.RTM_NEWROUTE || b[23] != unix.RTN_UNICAST {
		return answer{}, false
	}
	a := answer{next: dst}
	for b := b[fixed:]; len(b) >= unix.SizeofRtAttr; {
		n, typ := int(ne.Uint16(b)), ne.Uint16(b[2:])
		if n < unix.SizeofRtAttr || n > len(b) {
			break
		}
		v := b[unix.SizeofRtAttr:n]
		switch {
		case typ == unix.RTA_OIF && len(v) >= 4:
			a.link = int(ne.Uint32(v))
		case typ == unix.RTA_GATEWAY && len(v) >= 4:
			a.next = binary.BigEndian.Uint32(v)
		case typ == unix.RTA_VIA:
			return answer{}, false // an IPv6 neighbour for IPv4: nobody resolves it here
		case typ == unix.RTA_METRICS:
			a.mtu = metricMTU(v)
		}
		b = b[min(len(b), (n+3)&^3):]
	}
	return a, true
}

// metricMTU finds RTAX_MTU among a route's metrics.
func metricMTU(b []byte) int {
	ne := binary.NativeEndian
	for len(b) >= 8 {
		n := int(ne.Uint16(b))
		if n < 8 || n > len(b) {
			return 0
		}
		if ne.Uint16(b[2:]) == unix.RTAX_MTU {
			return int(ne.Uint32(b[4:]))
		}
		b = b[min(len(b), (n+3)&^3):]
	}
	return 0
}
