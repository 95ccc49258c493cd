package usernet

// Theory of operation.
//
// A Net is of one family. Inside one of IPv6, an address is a number of 32 bits,
// and a packet wears an IPv4 header: what the guest sends is dressed so when it
// comes (six_in.go), what it is sent is dressed back at the end of the batch
// (six_out.go), and socket addresses are translated where they are written and
// read. In between all code is that of IPv4, whose flows stay small, and who
// has IPv4 alone pays nothing.
//
// Numbers look like addresses of IPv4, so that the same comparisons hold: the
// guest's network, with the gateway, the guest and the services, is sixNet/24,
// ::1 is 127.0.0.1, :: is 0. All others are numbered as they are met, from
// sixFirst on; link-local ones and those of the guest's network that stand for
// nothing, from sixHidden on.
// Packets that must not be sent anywhere get no number: they end in fromSix.
//
// Numbers belong to the Net, since flows move between workers. Each worker
// remembers those that it has just met. Which are still used is looked up when
// there have become twice as many as were used then: a sweep takes all workers'
// locks and goes over their flows, so that what it costs for each new address is
// constant.
//
// Headers are parameters of the link: MTU is less by the difference of both
// headers inside, so that what fits there fits outside.

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

const (
	ip6Len = 40
	// sixMore is how much longer a header of IPv6 is, sixFragment what it takes
	// to say that a packet is a fragment.
	sixMore     = ip6Len - ip4Len
	sixFragment = 8

	protoICMP6 = frame.ProtoICMPv6

	sixNet    = 10<<24 | 2<<8
	sixMask   = 0xffffff00
	sixGate   = sixNet | 1
	sixGuest  = sixNet | 2
	sixFirst  = 0x10 << 24
	sixHidden = 0x14 << 24
	// sixMost is how many addresses are numbered at once, sixFew how many before
	// the first sweep.
	sixMost  = 1 << 18
	sixFew   = 1 << 12
	sixChunk = 1 << 8
	// sixRecent is how many addresses a worker remembers, a power of two.
	sixRecent = 64
)

type addr6 = [16]byte

// six is what a Net of IPv6 has beside.
type six struct {
	prefix netip.Prefix
	fixed  map[uint32]addr6 // by number; never changes
	own    map[addr6]uint32 // the same, by address, of the guest's network
	// guestSum is the sum of the guest's address.
	guestSum uint64

	// chunks are the addresses by number. One is written under mu before its
	// number is known to anybody, and given to another only by a sweep.
	chunks [sixMost / sixChunk]*[sixChunk]addr6

	want      atomic.Bool  // a sweep is due
	elsewhere atomic.Int32 // batches with frames that are between two workers' locks

	mu      sync.Mutex // guards what follows
	numbers map[addr6]uint32
	unused  []uint32 // places
	used    uint32   // places ever handed out
	enough  int      // how many are a reason for a sweep
	refused uint     // how many found no place
}

// sixWorker is what a worker of such a Net remembers; its lock guards it.
type sixWorker struct {
	from   int   // where the batch's frames of ours begin
	active int64 // when it had something to do last
	recent [sixRecent]struct {
		addr   addr6
		number uint32
	}
}

// sixRest is after how long without anything to do, in nanoseconds, IPv6 looks
// for it less often: most guests with both families speak IPv4.
const sixRest = 1e6

// rests says whether a worker is not to look at its sockets now, since they have
// been silent and were looked at just now. They wake it when it sleeps.
func (w *worker) rests() bool {
	return !w.told && !w.full && w.now-w.six.active > sixRest && w.now-w.looked < lookEvery
}

// anySix says whether a batch has frames of IPv6.
func anySix(b *frame.Batch) bool {
	for i, k := 0, b.Len(); i < k; i++ {
		if f := b.Frame(i); f.EtherType() == frame.TypeIPv6 {
			return true
		}
	}
	return false
}

func newSix(c *Config) *six {
	s := &six{
		prefix: c.Prefix, fixed: map[uint32]addr6{}, own: map[addr6]uint32{}, numbers: map[addr6]uint32{}, enough: sixFew,
	}
	s.fix(sixGate, c.Gateway)
	s.fix(sixGuest, c.Guest)
	g := c.Guest.As16()
	s.guestSum = uint64(frame.Fold(frame.Sum(g[:], 0)))
	s.fixed[loopback] = netip.IPv6Loopback().As16()
	for k, v := range c.Services {
		if a := v.Addr.Addr().As16(); s.own[a] == 0 {
			s.fix(sixNet|uint32(16+k), v.Addr.Addr())
		}
	}
	return s
}

func (s *six) fix(number uint32, a netip.Addr) {
	s.fixed[number], s.own[a.As16()] = a.As16(), number
}

// address is the address that a number stands for.
func (s *six) address(number uint32) addr6 {
	if place := number & (sixMost - 1); isNumbered(number) {
		return s.chunks[place/sixChunk][place%sixChunk]
	}
	return s.fixed[number]
}

// number is that of an address outside. It is 0 for :: and when there is no room
// for another. w is the worker whose lock is held, nil if none is.
func (s *six) number(w *worker, a *addr6) uint32 {
	lo := binary.BigEndian.Uint64(a[8:])
	if hi := binary.BigEndian.Uint64(a[:8]); hi == 0 && lo <= 1 {
		return uint32(lo) * loopback
	}
	if w == nil {
		return s.lookUp(a)
	}
	r := &w.six.recent[mix(lo)>>32&(sixRecent-1)]
	if r.number == 0 || r.addr != *a {
		r.addr, r.number = *a, s.lookUp(a)
	}
	return r.number
}

func (s *six) lookUp(a *addr6) uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if n, ok := s.numbers[*a]; ok {
		return n
	}
	var place uint32
	switch k := len(s.unused); {
	case k > 0:
		place = s.unused[k-1]
		s.unused = s.unused[:k-1]
	case s.used < sixMost:
		place = s.used
		s.used++
	default:
		if s.refused%sixFew == 0 { // not a sweep for each, where all are in use
			s.want.Store(true)
		}
		s.refused++
		return 0
	}
	c := s.chunks[place/sixChunk]
	if c == nil {
		c = new([sixChunk]addr6)
		s.chunks[place/sixChunk] = c
	}
	c[place%sixChunk] = *a
	n := sixFirst | place
	if ip := netip.AddrFrom16(*a); ip.IsLinkLocalUnicast() || s.prefix.Contains(ip) {
		n = sixHidden | place
	}
	s.numbers[*a] = n
	if len(s.numbers) > s.enough {
		s.want.Store(true)
	}
	return n
}

// isNumbered says whether a number is not one of those that are fixed.
func isNumbered(number uint32) bool { return number>>27 == sixFirst>>27 }

// outside says whether an address is not of the guest's network.
func (n *Net) outside(addr uint32) bool {
	return addr&n.mask != n.gateway&n.mask && (n.six == nil || !isHidden(addr))
}

// isHidden says whether a number is that of somebody whom the guest could not
// answer, or of nobody in its own network.
func isHidden(number uint32) bool { return number>>26 == sixHidden>>26 }

// sweep takes numbers back that nothing uses, if it is time for that. No
// worker's lock is held.
func (n *Net) sweep() {
	s := n.six
	if !s.want.Load() {
		return
	}
	n.lockAll()
	defer n.unlockAll()
	if !s.want.Load() || s.elsewhere.Load() > 0 {
		return // by the next batch, then
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.want.Store(false)
	var used [sixMost / 64]uint64
	mark := func(number uint32) {
		if place := number & (sixMost - 1); isNumbered(number) {
			used[place/64] |= 1 << (place & 63)
		}
	}
	for _, w := range n.workers {
		clear(w.six.recent[:])
		for i := range int32(w.table.used) {
			f := w.table.at(i)
			if f.state == stateFree {
				continue
			}
			mark(f.remote.addr())
			if f.proto != frame.ProtoTCP {
				mark(f.lastAddr())
				mark(f.hostAddr())
				mark(f.source())
			}
		}
	}
	mark(n.forwards.only.Load())
	n.forwards.hidden.each(mark)
	n.frags.each(mark)
	for a, number := range s.numbers {
		if place := number & (sixMost - 1); used[place/64]>>(place&63)&1 == 0 {
			delete(s.numbers, a)
			s.unused = append(s.unused, place)
		}
	}
	s.enough = max(sixFew, min(2*len(s.numbers), sixMost-sixMost/8))
}

// each calls f for the address of every client.
func (h *hidden) each(f func(uint32)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for k := range h.shown {
		f(k.addr)
	}
}

// each calls f for the destination of every packet that waits.
func (t *fragTable) each(f func(uint32)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.waiting == 0 {
		return
	}
	for k := range t.packets {
		f(uint32(t.packets[k].key >> sixFragShift))
	}
}

// family is the address family of the Net's sockets.
func (n *Net) family() uintptr {
	if n.six != nil {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

func (n *Net) familyName() string {
	if n.six != nil {
		return "IPv6"
	}
	return "IPv4"
}

// putAddr writes a socket's address. That of nobody in particular is 0.
func (n *Net) putAddr(a *sockAddr, addr uint32, port uint16) {
	if n.six != nil {
		n.six.put(a, addr, port)
		return
	}
	a.Family, a.Port = unix.AF_INET, netPort(port)
	binary.BigEndian.PutUint32(a.Addr[:], addr)
}

// put is putAddr for IPv6.
func (s *six) put(a *sockAddr, addr uint32, port uint16) {
	*a = sockAddr{Family: unix.AF_INET6, Port: netPort(port), six: s.address(addr)}
}

// addrIn is the address in a socket's address. 0 is one that there is no number
// for.
func (w *worker) addrIn(a *sockAddr) uint32 {
	if s := w.net.six; s != nil {
		return s.number(w, &a.six)
	}
	return binary.BigEndian.Uint32(a.Addr[:])
}

// ipOf is an address as the world writes it.
func (n *Net) ipOf(addr uint32) netip.Addr {
	if n.six != nil {
		return netip.AddrFrom16(n.six.address(addr))
	}
	return netip.AddrFrom4(hostOf(addr))
}

// numberOf is the number of an address that the configuration names.
func (n *Net) numberOf(a netip.Addr) uint32 {
	if n.six == nil {
		return ip4(a)
	}
	b := a.As16()
	if k, ok := n.six.own[b]; ok {
		return k
	}
	return n.six.number(nil, &b)
}

// setIP sets an option of IP, which has the number that IPv4 gives it.
func (n *Net) setIP(fd int32, opt int, v int32) unix.Errno {
	if n.six != nil {
		return setIP6(fd, opt, v)
	}
	return setInt(fd, unix.SOL_IP, opt, v)
}

// setIP6 is setIP for IPv6.
func setIP6(fd int32, opt int, v int32) unix.Errno {
	switch opt {
	case unix.IP_TTL:
		opt = unix.IPV6_UNICAST_HOPS
	case unix.IP_TOS:
		opt = unix.IPV6_TCLASS
	case unix.IP_MTU_DISCOVER:
		opt = unix.IPV6_MTU_DISCOVER
	case unix.IP_RECVERR:
		opt = unix.IPV6_RECVERR
	case unix.IP_RECVTTL:
		opt = unix.IPV6_RECVHOPLIMIT
	case unix.IP_RECVTOS:
		opt = unix.IPV6_RECVTCLASS
	case unix.IP_PKTINFO:
		opt = unix.IPV6_RECVPKTINFO
	case unix.IP_TRANSPARENT:
		opt = unix.IPV6_TRANSPARENT
	default:
		return unix.ENOPROTOOPT
	}
	return setInt(fd, unix.SOL_IPV6, opt, v)
}

// pseudo is the sum of the pseudo-header of a packet between the guest and an
// address, whichever way it goes.
func (n *Net) pseudo(addr uint32, proto uint8, length int) uint64 {
	if n.six != nil {
		return n.six.pseudo(addr, proto, length)
	}
	return pseudoSum(addr, n.guest, proto, length)
}

// pseudo is that of IPv6.
func (s *six) pseudo(addr uint32, proto uint8, length int) uint64 {
	a := s.address(addr)
	if proto == frame.ProtoICMP {
		proto = protoICMP6
	}
	return frame.Sum(a[:], s.guestSum+uint64(proto)+uint64(length>>16)+uint64(length&0xffff))
}
