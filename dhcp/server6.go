package dhcp

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"sidewire/engine/frame"
)

// Of IPv6 and ICMPv6.
const (
	ip6Len     = 40
	l4At6      = frame.EthernetLen + ip6Len
	protoICMP6 = 58

	icmpRouterSolicit   = 133
	icmpRouterAdvert    = 134
	icmpNeighbourAsk    = 135
	icmpNeighbourAdvert = 136

	client6Port = 546
	server6Port = 547
)

var (
	allNodes   = netip.MustParseAddr("ff02::1")
	allServers = netip.MustParseAddr("ff02::1:2") // RFC 8415, section 7.1
)

// Server6 is the IPv6 router of one guest's link, as far as it speaks for
// itself: it advertises itself and the network (RFC 4861), answers for its
// addresses, and leases the guest's address by DHCPv6 (RFC 8415). Like a
// [Server] it is a stage of the guest's port and safe for concurrent use.
type Server6 struct {
	offer atomic.Pointer[offer6]
	// advertised is b.Now of the last advertisement to all, 0 before the first.
	advertised atomic.Int64

	mu    sync.Mutex // guards what follows
	lease *LeaseInfo // nil while the guest holds none
	stats Stats6
	rate  rate
}

// Stats6 counts what became of a guest's messages.
type Stats6 struct {
	RouterSolicits, NeighbourSolicits uint64 // answered
	Adverts                           uint64 // router advertisements sent, to all too
	Solicit, Request, Confirm         uint64 // received, as the following
	Renew, Rebind, Release, Decline   uint64
	Information                       uint64
	Replies                           uint64 // DHCPv6 messages sent

	Bad         uint64 // unreadable, dropped
	Panics      uint64 // of these, where the codec panicked
	RateLimited uint64 // dropped because there were too many
	FromServer  uint64 // a router's or server's message from the guest, dropped
	OtherServer uint64 // a message that names another server
	Silent      uint64 // readable, but no answer is due
	Takeover    uint64 // leases that went to another hardware address
}

// New6 returns a server for the guest that c describes.
func New6(c Config6) (*Server6, error) {
	o, err := newOffer6(c, nil)
	if err != nil {
		return nil, err
	}
	s := &Server6{rate: newRate()}
	s.offer.Store(o)
	return s, nil
}

// Update makes c what the server says from now on, and has it said to all with
// the guest's next frame.
func (s *Server6) Update(c Config6) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	o, err := newOffer6(c, s.offer.Load())
	if err != nil {
		return err
	}
	s.offer.Store(o)
	if s.lease != nil && s.lease.Addr != o.Address.Addr() {
		s.lease = nil
	}
	s.advertised.Store(0)
	return nil
}

// Stats returns the counters.
func (s *Server6) Stats() Stats6 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stats
}

// Leases returns the leases that have not expired, at most one.
func (s *Server6) Leases() []LeaseInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lease == nil || !s.offer.Load().Now().Before(s.lease.Expiry) {
		return nil
	}
	l := *s.lease
	l.ClientID = slices.Clone(l.ClientID)
	return []LeaseInfo{l}
}

// Export returns the server's state.
func (s *Server6) Export() State { return State{Version: stateVersion, Leases: s.Leases()} }

// Import takes up a state that Export returned. It refuses, without a change,
// one of another version and one with a lease that this server's configuration
// does not give. OnLease is told of the lease.
func (s *Server6) Import(st State) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	o := s.offer.Load()
	lease, err := st.leaseOf(o.Address.Addr())
	if err != nil {
		return err
	}
	s.lease = lease
	if lease != nil && o.OnLease != nil && o.Now().Before(lease.Expiry) {
		o.OnLease(lease.MAC)
	}
	return nil
}

// Process answers what the guest asks of its router among the frames of its
// port. A frame that it answers becomes Consumed, an unreadable one is dropped
// with its reason; all others it leaves as they are. With the guest's frames it
// also says again, in time, what it has advertised.
func (s *Server6) Process(b *frame.Batch) {
	six := false
	for i, n := 0, b.Len(); i < n; i++ {
		f := b.Frame(i)
		h := &f.Head
		if h[12] != frame.TypeIPv6>>8 || h[13] != frame.TypeIPv6&0xff || f.HeadLen < l4At6+4 {
			continue
		}
		six = true
		if f.Out != frame.Drop || f.Reason != frame.ReasonNone {
			continue
		}
		switch h[20] {
		case protoICMP6:
			if t := h[l4At6]; t >= icmpRouterSolicit && t <= icmpNeighbourAsk {
				s.processND(b, f)
			}
		case frame.ProtoUDP:
			if src, dst := binary.BigEndian.Uint16(h[l4At6:]), binary.BigEndian.Uint16(h[l4At6+2:]); dst == server6Port {
				s.processDHCP(b, f)
			} else if dst == client6Port && src == server6Port {
				s.foreign(f)
			}
		}
	}
	if six {
		s.advertise(b)
	}
}

// foreign drops what only a router or a server says: that is us (H091).
func (s *Server6) foreign(f *frame.Frame) {
	s.count(func(st *Stats6) { st.FromServer++ })
	f.Drop(frame.Policy)
}

// advertise says to all what a solicitation was answered with, before that
// runs out. A guest that had it from another process has it renewed by the
// first frame.
func (s *Server6) advertise(b *frame.Batch) {
	last := s.advertised.Load()
	if last != 0 && b.Now-last < advertEvery || !s.advertised.CompareAndSwap(last, max(b.Now, 1)) {
		return
	}
	o := s.offer.Load()
	if o.sendICMP(b, 0, frame.MAC{0x33, 0x33, 0, 0, 0, 1}, o.router, allNodes, o.advert) {
		s.count(func(st *Stats6) { st.Adverts++ })
	}
}

// private is the payload of the IPv6 packet in a frame, as far as its lengths
// hold and its checksum does: a private copy. nil: the frame has been dropped.
func (s *Server6) private(b *frame.Batch, f *frame.Frame, proto uint8) []byte {
	o := s.offer.Load()
	if len(o.MACs) > 0 && !slices.Contains(o.MACs, frame.MAC(f.Src())) {
		return nil
	}
	s.mu.Lock()
	ok := s.rate.admit(b.Now)
	if !ok {
		s.stats.RateLimited++
	}
	s.mu.Unlock()
	if !ok {
		f.Drop(frame.RateLimited)
		return nil
	}
	n := int(binary.BigEndian.Uint16(f.Head[18:]))
	if f.Head[14]>>4 != 6 || n < 8 || l4At6+n > int(f.Len) || n > maxRequest || f.GSOType() != frame.GSONone {
		s.bad(f, frame.BadDHCP, false)
		return nil
	}
	p := f.Bytes()[:l4At6+n]
	if f.Flags&(frame.NeedsCsum|frame.DataValid) == 0 {
		sum := frame.Sum(p[frame.EthernetLen+8:l4At6], uint64(proto)+uint64(n))
		if frame.Fold(frame.Sum(p[l4At6:], sum)) != 0xffff {
			s.bad(f, frame.BadChecksum, false)
			return nil
		}
	}
	return p
}

func (s *Server6) bad(f *frame.Frame, r frame.DropReason, panicked bool) {
	s.count(func(st *Stats6) {
		st.Bad++
		if panicked {
			st.Panics++
		}
	})
	f.Drop(r)
}

func (s *Server6) count(f func(*Stats6)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.stats)
}

// headers6 writes Ethernet and IPv6 headers in front of a payload; b has room
// for all three.
func (o *offer6) headers6(b []byte, mac frame.MAC, src, dst netip.Addr, proto uint8) {
	copy(b, mac[:])
	copy(b[6:], o.ServerMAC[:])
	binary.BigEndian.PutUint16(b[12:], frame.TypeIPv6)
	h := b[frame.EthernetLen:]
	clear(h[:ip6Len])
	h[0] = 0x60
	binary.BigEndian.PutUint16(h[4:], uint16(len(b)-l4At6))
	h[6], h[7] = proto, 255
	s, d := src.As16(), dst.As16()
	copy(h[8:], s[:])
	copy(h[24:], d[:])
}

// sum6 is the checksum of the payload behind headers6, whose field is zero.
func sum6(b []byte, proto uint8) uint16 {
	sum := frame.Sum(b[frame.EthernetLen+8:l4At6], uint64(proto)+uint64(len(b)-l4At6))
	if sum := ^frame.Fold(frame.Sum(b[l4At6:], sum)); sum != 0 {
		return sum
	}
	return 0xffff
}

// send6 adds a frame with such a payload to the batch; fill writes the payload
// and returns where its checksum is.
func (o *offer6) send6(b *frame.Batch, queue uint16, mac frame.MAC, src, dst netip.Addr, proto uint8, payload []byte, sumAt int) bool {
	bytes := b.Alloc(l4At6 + len(payload))
	if bytes == nil {
		return false
	}
	copy(bytes[l4At6:], payload)
	o.headers6(bytes, mac, src, dst, proto)
	binary.BigEndian.PutUint16(bytes[l4At6+sumAt:], 0)
	binary.BigEndian.PutUint16(bytes[l4At6+sumAt:], sum6(bytes, proto))
	out := b.Reply()
	if out == nil || !b.SetReply(out, bytes) {
		return false
	}
	out.Out, out.Queue = o.Port, queue
	return true
}

func (o *offer6) sendICMP(b *frame.Batch, queue uint16, mac frame.MAC, src, dst netip.Addr, msg []byte) bool {
	return o.send6(b, queue, mac, src, dst, protoICMP6, msg, 2)
}
