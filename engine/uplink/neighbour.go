package uplink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// neighbour is one address on the link, and the hops that lead there. It
// follows the kernel's notices also while no hop does, so that the first frame
// finds it known if the kernel does.
type neighbour struct {
	mac   frame.MAC
	known bool
	stale bool         // known, but the kernel would like to ask again
	hops  []*frame.Hop // one for each MTU; none of them is retired
	used  int64        // newest use of the hops at the last look
	// wanted tells the prober that the neighbour is in use; news counts what
	// the kernel told meanwhile.
	wanted bool
	news   uint32
}

// learn takes in what the kernel knows.
func (n *neighbour) learn(k *netlink.Neigh) {
	n.known = usable(k.State) && len(k.HardwareAddr) == len(n.mac)
	n.stale = n.known && k.State&netlink.NUD_STALE != 0
	if !n.known {
		n.lose()
		return
	}
	copy(n.mac[:], k.HardwareAddr)
	for _, h := range n.hops {
		h.Set(n.mac)
	}
}

func (n *neighbour) lose() {
	n.known, n.stale = false, false
	for _, h := range n.hops {
		h.Invalidate()
	}
}

func (n *neighbour) retire() {
	for _, h := range n.hops {
		h.Retire()
	}
	n.hops = nil
}

// usedSince says whether frames went there since it was last asked.
func (n *neighbour) usedSince() bool {
	before := n.used
	for _, h := range n.hops {
		n.used = max(n.used, h.Used())
	}
	return n.used > before
}

// usable says whether a neighbour in that state has an address (NUD_VALID).
func usable(state int) bool {
	return state&(netlink.NUD_PERMANENT|netlink.NUD_NOARP|netlink.NUD_REACHABLE|netlink.NUD_PROBE|netlink.NUD_STALE|netlink.NUD_DELAY) != 0
}

// hop returns the Hop of a neighbour, with its address if that is known.
func (r *Router) hop(next netip.Addr, mtu int) *frame.Hop {
	if mtu == 0 || mtu > r.mtu {
		mtu = r.mtu
	}
	n := r.neighs[next]
	if n == nil {
		r.evict()
		n = &neighbour{mac: r.mac, known: r.noARP}
		r.neighs[next] = n
	}
	for _, h := range n.hops {
		if h.MTU == mtu {
			return h
		}
	}
	if len(n.hops) >= mtuMax {
		n.retire()
	}
	h := &frame.Hop{MTU: mtu, Src: r.mac}
	if n.known {
		h.Set(n.mac)
	}
	n.hops, n.used = append(n.hops, h), -1
	if !n.known || n.stale {
		r.want(n)
	}
	return h
}

// evict keeps the neighbours bounded: the unknown ones, which are those of a
// guest that scans the link, and the unused ones go first.
func (r *Router) evict() {
	if len(r.neighs) < neighMax {
		return
	}
	for ip, n := range r.neighs {
		if !n.known || len(n.hops) == 0 {
			n.retire()
			delete(r.neighs, ip)
		}
	}
	if len(r.neighs) >= neighMax {
		r.forget()
	}
}

// forget retires all hops and takes nothing for known.
func (r *Router) forget() {
	r.retireLocked()
	clear(r.neighs)
}

// neighbour takes in what became of a neighbour.
func (r *Router) neighbour(k *netlink.Neigh, there bool) {
	ip, ok := netip.AddrFromSlice(k.IP)
	ip = ip.Unmap()
	if !ok || k.LinkIndex != r.index || k.Family != r.family || ip.Is4() != (r.family == unix.AF_INET) || ip.IsMulticast() {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.noARP {
		return
	}
	if !there {
		k.State = netlink.NUD_NONE
	}
	n := r.neighs[ip]
	if n == nil {
		if !usable(k.State) || len(r.neighs) >= neighMax {
			return
		}
		n = &neighbour{}
		r.neighs[ip] = n
	}
	n.news++
	n.learn(k)
	switch {
	case !n.known && len(n.hops) == 0:
		delete(r.neighs, ip)
	case n.stale && n.usedSince():
		r.want(n)
	case n.stale:
		n.retire()
	}
}

// loadNeighbours takes in what the kernel knows of all of them.
func (r *Router) loadNeighbours() error {
	ks, err := r.h.NeighList(r.index, r.family)
	if err != nil {
		return fmt.Errorf("neighbours: %w", err)
	}
	for i := range ks {
		r.neighbour(&ks[i], true)
	}
	return nil
}

// want has the prober tell the kernel that a neighbour is in use.
func (r *Router) want(n *neighbour) {
	n.wanted, n.stale = true, false
	select {
	case r.probe.wake <- struct{}{}:
	default: // it is about to look already
	}
}

// prober asks the kernel about neighbours. What it has to do is marked in the
// neighbours themselves, so that it is bounded and nothing is left out.
type prober struct {
	h    *netlink.Handle
	asks asker
	wake chan struct{}
	stop chan struct{}
	todo []netip.Addr
}

func newProber() prober {
	return prober{asks: asker{fd: -1}, wake: make(chan struct{}, 1), stop: make(chan struct{})}
}

func (p *prober) open() (err error) {
	p.h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
	return errors.Join(err, p.asks.open())
}

func (p *prober) close() {
	if p.h != nil {
		p.h.Close()
	}
	p.asks.close()
}

// probeOnDemand runs until Close.
func (r *Router) probeOnDemand() {
	for {
		select {
		case <-r.probe.stop:
			return
		case <-r.probe.wake:
			r.probeWanted()
		}
	}
}

// probeWanted asks about the neighbours that are marked.
func (r *Router) probeWanted() {
	p := &r.probe
	p.todo = p.todo[:0]
	r.mu.Lock()
	for ip, n := range r.neighs {
		if n.wanted {
			n.wanted = false
			p.todo = append(p.todo, ip)
		}
	}
	r.mu.Unlock()
	for _, ip := range p.todo {
		r.probeOne(ip)
	}
}

// probeOne tells the kernel that a neighbour is in use: an unknown one is asked
// for, a stale one is asked again. One that the kernel knows already makes no
// notice, so it is read.
func (r *Router) probeOne(ip netip.Addr) {
	n, news := r.peek(ip)
	if n == nil {
		return
	}
	// A failure shows as a neighbour that stays unknown.
	_ = r.probe.h.NeighSet(&netlink.Neigh{LinkIndex: r.index, Family: r.family, IP: ip.AsSlice(), Flags: netlink.NTF_USE})
	k := r.probe.asks.neighbour(r.index, ip)
	r.mu.Lock()
	defer r.mu.Unlock()
	// What a notice said meanwhile is newer.
	if k != nil && r.neighs[ip] == n && n.news == news && !n.known {
		n.learn(k)
	}
}

// peek returns a neighbour, and how much the kernel has told of it.
func (r *Router) peek(ip netip.Addr) (n *neighbour, news uint32) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n = r.neighs[ip]; n != nil {
		news = n.news
	}
	return n, news
}

func addr4(ip net.IP) (uint32, bool) {
	if ip = ip.To4(); ip == nil {
		return 0, false
	}
	return binary.BigEndian.Uint32(ip), true
}
