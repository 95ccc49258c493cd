// Package dhcp leases addresses to guests: DHCPv4, and the IPv6 that goes with it.
//
// A [Server] is a stage of one guest's port. It owns that guest's one address
// and answers what the guest asks in the batch that brought the question; all
// other frames pass it untouched. What it answers with is an immutable value
// that [Server.Update] replaces; the lease and the counters are under one
// mutex, which only DHCP messages take. A [Server6] is the same for
// IPv6, and the router of the guest's link besides: router advertisements, neighbour
// advertisements for its own addresses, DHCPv6. [ResolvConf] reads what the host
// knows about DNS.
package dhcp

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"sidewire/engine/frame"
)

const (
	serverPort = 67
	clientPort = 68

	udpLen    = 8
	ip4Len    = 20
	headerLen = frame.EthernetLen + ip4Len + udpLen

	// maxRequest bounds a message from a guest. Real ones are below 600 bytes,
	// and none can be longer than the MTU.
	maxRequest = 2048

	// A guest may ask often while it boots from the network, but never for
	// long: 100 messages at once and 50 a second are answered.
	messageEvery = int64(20 * time.Millisecond)
	messageBurst = 100 * messageEvery
)

// Server answers the DHCP messages of one guest. It is safe for concurrent
// use: several workers may call Process, each with its own batch.
type Server struct {
	offer atomic.Pointer[offer]

	mu    sync.Mutex // guards what follows
	lease *LeaseInfo // nil while the guest holds none
	stats Stats
	rate  rate
}

// rate bounds how many messages of a guest are answered.
type rate struct {
	credit int64 // nanoseconds of messages that may still be answered
	last   int64 // b.Now of the last message
}

func newRate() rate { return rate{credit: messageBurst} }

// admit takes one message from the guest's share of the slow path.
func (r *rate) admit(now int64) bool {
	if now > r.last {
		r.credit, r.last = min(messageBurst, r.credit+min(now-r.last, messageBurst)), now
	}
	if r.credit < messageEvery {
		return false
	}
	r.credit -= messageEvery
	return true
}

// Stats counts what became of a guest's DHCP messages.
type Stats struct {
	Discover, Request, Inform, Decline, Release uint64 // received
	Offer, Ack, Nak                             uint64 // sent

	Bad         uint64 // unreadable, dropped as BadDHCP
	Panics      uint64 // of these, where the codec panicked
	RateLimited uint64 // dropped because there were too many
	FromServer  uint64 // a server's message from the guest, dropped
	OtherServer uint64 // a request that names another server, left to it
	Silent      uint64 // readable, but no answer is due
	Takeover    uint64 // leases that went to another hardware address
	Truncated   uint64 // options that found no room in an answer
	BadDomains  uint64 // search domains that cannot be sent
}

// New returns a server for the guest that c describes.
func New(c Config) (*Server, error) {
	o, err := newOffer(c)
	if err != nil {
		return nil, err
	}
	s := &Server{rate: newRate()}
	s.offer.Store(o)
	return s, nil
}

// Update makes c what the server answers with from now on. A lease of another
// address ends: its holder's next renewal is refused, and it asks anew.
func (s *Server) Update(c Config) error {
	o, err := newOffer(c)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.offer.Store(o)
	if s.lease != nil && s.lease.Addr != o.Address.Addr() {
		s.lease = nil
	}
	return nil
}

// Stats returns the counters.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.BadDomains = uint64(s.offer.Load().badDomains)
	return st
}

// Process answers the DHCP messages among the frames of a guest's port. A
// frame that it answers becomes Consumed, an unreadable one is dropped with
// its reason; one that is not for this server it leaves as it is, unless it is
// to be alone.
func (s *Server) Process(b *frame.Batch) {
	for i, n := 0, b.Len(); i < n; i++ {
		f := b.Frame(i)
		h := &f.Head
		if h[23] != frame.ProtoUDP || h[12] != frame.TypeIPv4>>8 || h[13] != frame.TypeIPv4&0xff ||
			f.HeadLen < headerLen {
			continue
		}
		if f.Out == frame.Drop && f.Reason == frame.ReasonNone {
			s.processUDP(b, f)
		}
	}
}

// processUDP looks for DHCP in an untagged IPv4 frame that claims to hold UDP.
func (s *Server) processUDP(b *frame.Batch, f *frame.Frame) {
	l4 := frame.EthernetLen + int(f.Head[14]&15)*4
	frag := binary.BigEndian.Uint16(f.Head[20:]) &^ frame.DontFragment
	if l4+udpLen > int(f.HeadLen) || frag&^frame.MoreFragments != 0 {
		return // the ports are in the first fragment
	}
	src, dst := binary.BigEndian.Uint16(f.Head[l4:]), binary.BigEndian.Uint16(f.Head[l4+2:])
	switch {
	case dst == serverPort:
		if frag == 0 && f.GSOType() == frame.GSONone { // no DHCP message is longer
			s.processRequest(b, f, l4+udpLen)
		}
		if s.offer.Load().Alone && f.Out == frame.Drop && f.Reason == frame.ReasonNone {
			f.Drop(frame.Policy)
		}
	case dst == clientPort && src == serverPort:
		// Where the engine serves DHCP, nobody else does (H091).
		s.count(func(st *Stats) { st.FromServer++ })
		f.Drop(frame.Policy)
	}
}

// processRequest handles a frame to port 67 whose BOOTP message starts at
// offset at.
func (s *Server) processRequest(b *frame.Batch, f *frame.Frame, at int) {
	o := s.offer.Load()
	if !o.addressed(f) || !o.serves(f, at) {
		return
	}
	if !s.admit(b.Now) {
		f.Drop(frame.RateLimited)
		return
	}
	if r := f.ParseIPv4(); r != frame.ReasonNone {
		s.bad(f, r, false)
		return
	}
	if int(f.Len) > at+maxRequest {
		s.bad(f, frame.BadDHCP, false)
		return
	}
	// Everything below looks at this private copy only. A fault in the
	// guest's memory happens here, where no lock is held.
	p := f.Bytes()
	if f.Flags&(frame.NeedsCsum|frame.DataValid) == 0 && !checksumOK(p, at-udpLen) {
		s.bad(f, frame.BadChecksum, false)
		return
	}
	q, panicked := readRequest(p, at)
	if q == nil {
		s.bad(f, frame.BadDHCP, panicked)
		return
	}
	f.Out = frame.Consumed
	r := s.answer(o, q)
	if r == nil {
		return
	}
	lost := o.send(b, f, q, r)
	if lost < 0 {
		f.Drop(frame.BatchFull)
		return
	}
	if lost > 0 {
		s.count(func(st *Stats) { st.Truncated += uint64(lost) })
	}
}

// addressed says whether a frame to port 67 is meant for this server: sent to
// everybody or to the server's own address. One to another server is not.
func (o *offer) addressed(f *frame.Frame) bool {
	dst := [4]byte(f.Head[30:34])
	if dst == o.server {
		return true
	}
	if dst != broadcast4 && dst != o.directed {
		return false
	}
	return f.Head[0]&1 != 0 || frame.MAC(f.Dst()) == o.ServerMAC
}

// serves says whether the client's hardware address is one that is served.
func (o *offer) serves(f *frame.Frame, at int) bool {
	if len(o.MACs) == 0 {
		return true
	}
	const chaddr = 28
	mac := frame.MAC(f.Src())
	if at+chaddr+6 <= int(f.HeadLen) {
		mac = frame.MAC(f.Head[at+chaddr : at+chaddr+6])
	}
	for _, m := range o.MACs {
		if m == mac {
			return true
		}
	}
	return false
}

// checksumOK says whether the checksum of the UDP header at offset l4 holds.
func checksumOK(p []byte, l4 int) bool {
	const addresses = frame.EthernetLen + 12
	udp := p[l4:]
	udp = udp[:binary.BigEndian.Uint16(udp[4:])]
	if binary.BigEndian.Uint16(udp[6:]) == 0 {
		return true // the sender made none
	}
	sum := frame.Sum(p[addresses:addresses+8], uint64(frame.ProtoUDP)+uint64(len(udp)))
	return frame.Fold(frame.Sum(udp, sum)) == 0xffff
}

// admit says whether one more message is answered.
func (s *Server) admit(now int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	ok := s.rate.admit(now)
	if !ok {
		s.stats.RateLimited++
	}
	return ok
}

// bad drops a frame that cannot be read and counts it.
func (s *Server) bad(f *frame.Frame, r frame.DropReason, panicked bool) {
	s.count(func(st *Stats) {
		st.Bad++
		if panicked {
			st.Panics++
		}
	})
	f.Drop(r)
}

func (s *Server) count(f func(*Stats)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.stats)
}

// as4 returns the bytes of an IPv4 address, zeros for none.
func as4(a netip.Addr) [4]byte {
	if !a.Is4() {
		return [4]byte{}
	}
	return a.As4()
}
