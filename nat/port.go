package nat

import (
	"crypto/rand"
	"errors"
	mrand "math/rand/v2"
	"sync"
	"sync/atomic"

	"sidewire/engine/frame"
)

// Errors of AddForward and RemoveForward.
var (
	ErrPortInUse = errors.New("the port is in use")
	ErrNoForward = errors.New("there is no such forward")
	ErrBadPort   = errors.New("not a port that can be forwarded")
)

// Spaces of external ports, one for each protocol that has ports or query ids
// (RFC 7857 sections 5 and 6: a mapping of one protocol means nothing to
// another).
const (
	spaceTCP = iota
	spaceUDP
	spaceICMP
	numSpaces
)

var spaceProto = [numSpaces]uint8{frame.ProtoTCP, frame.ProtoUDP, frame.ProtoICMP}

// mapping is one external port. It belongs to a port of a guest as long as
// flows refer to it or a forward fixes it, and for a while after.
type mapping struct {
	refs      uint32 // flows
	freed     uint32 // second in which refs became 0
	guestPort uint16
	owner     uint8 // guest's index + 1; 0 is nobody
	fixed     bool  // by a forward
}

func (p *mapping) busy() bool { return p.refs > 0 || p.fixed }

// portSpace is the external ports of one protocol. Mappings are independent of
// the other end (RFC 4787 REQ-1, RFC 5382 REQ-1, RFC 5508 REQ-1a), and no
// external port ever serves two of them (RFC 4787 REQ-3, RFC 5382 REQ-7).
type portSpace struct {
	m     *Masquerade
	proto uint8
	// busy has a bit for every port with a mapping, so that a packet that
	// nobody waits for is recognised without the lock.
	busy [1024]atomic.Uint64
	// parted has a bit for every port that lost its mapping, until somebody
	// asks for it when PortHold is over.
	parted [1024]atomic.Uint64

	mu sync.Mutex // guards everything below
	// external and inside are tables of pages, made when first needed.
	external [256]*[256]mapping
	inside   []insideTable
	share    []int // by guest: its mappings in the range
	random   *mrand.ChaCha8
	refuse   uint32 // second in which the range was found to be full
}

// insideTable is, by a guest's port, the external port + 1 of its mapping.
type insideTable [256]*[256]uint32

func (s *portSpace) init(m *Masquerade, proto uint8, guests int) {
	s.m, s.proto = m, proto
	s.inside, s.share = make([]insideTable, guests), make([]int, guests)
	var seed [32]byte
	_, _ = rand.Read(seed[:]) // never fails (crypto/rand)
	s.random = mrand.NewChaCha8(seed)
}

// space returns the space of a protocol, or nil if it has none.
func (m *Masquerade) space(proto uint8) *portSpace {
	switch proto {
	case frame.ProtoTCP:
		return &m.spaces[spaceTCP]
	case frame.ProtoUDP:
		return &m.spaces[spaceUDP]
	case frame.ProtoICMP:
		return &m.spaces[spaceICMP]
	}
	return nil
}

func (s *portSpace) mapped(port uint16) bool {
	return s.busy[port/64].Load()&(1<<(port%64)) != 0
}

func (s *portSpace) at(port uint16) *mapping {
	page := &s.external[port>>8]
	if *page == nil {
		*page = new([256]mapping)
	}
	return &(*page)[port&0xff]
}

func (s *portSpace) insideAt(g uint8, port uint16) *uint32 {
	page := &s.inside[g][port>>8]
	if *page == nil {
		*page = new([256]uint32)
	}
	return &(*page)[port&0xff]
}

// acquire returns the external port of a guest's port, with a reference that
// release gives back, and makes the mapping if there is none.
func (s *portSpace) acquire(g *guest, port uint16, now uint32) (uint16, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	in := s.insideAt(g.index, port)
	if *in != 0 {
		ext := uint16(*in - 1)
		s.at(ext).refs++
		return ext, true
	}
	ext, ok := s.choose(g, port, now)
	if !ok {
		return 0, false
	}
	s.claim(g, ext, port)
	*in = uint32(ext) + 1
	return ext, true
}

// claim gives ext to a guest's port, with one reference.
func (s *portSpace) claim(g *guest, ext, port uint16) {
	p := s.at(ext)
	if !p.busy() {
		s.busy[ext/64].Or(1 << (ext % 64))
		if s.counted(ext) {
			s.share[g.index]++
		}
	}
	p.refs++
	p.owner, p.guestPort = g.index+1, port
}

// counted says whether a port counts for a guest's share: it is one of those
// that all guests choose from.
func (s *portSpace) counted(ext uint16) bool {
	return s.proto == frame.ProtoICMP || s.m.cfg.PortRange.has(ext)
}

// choose finds an external port: the guest's own where it may have it, else a
// random one of the range (RFC 7857 section 9, RFC 6888 REQ-15).
func (s *portSpace) choose(g *guest, port uint16, now uint32) (uint16, bool) {
	c := &s.m.cfg
	r := c.PortRange
	own := r.has(port)
	if s.proto == frame.ProtoICMP {
		r, own = PortRange{1, 0xffff}, true
	} else if g.all {
		own = own || !c.KernelRange.has(port)
	}
	quota := max(r.size()/len(c.Guests), 1)
	full := s.share[g.index] >= quota
	if own && !(full && s.counted(port)) && s.usable(g, port, port, now) {
		return port, true
	}
	if full || s.refuse == now {
		return 0, false
	}
	n := uint32(r.size())
	for range 16 {
		ext := r.First + uint16(uint32(s.random.Uint64()>>32)%n)
		if s.usable(g, ext, port, now) {
			return ext, true
		}
	}
	start := uint32(s.random.Uint64()>>32) % n
	for i := range n {
		ext := r.First + uint16((start+i)%n)
		if s.usable(g, ext, port, now) {
			return ext, true
		}
	}
	s.refuse = now // the search is long; do it once a second at most
	return 0, false
}

// usable says whether ext can become the mapping of a guest's port.
func (s *portSpace) usable(g *guest, ext, port uint16, now uint32) bool {
	p := s.at(ext)
	mine := p.owner == g.index+1 && p.guestPort == port
	switch {
	case p.busy():
		// Packets from outside may have claimed a guest's own port already.
		if !mine || p.fixed {
			return false
		}
	case p.owner != 0 && !mine && s.held(p, now):
		return false
	}
	return s.proto == frame.ProtoICMP || s.m.cfg.PortFree == nil || s.m.cfg.PortFree(s.proto, ext)
}

// held says whether a freed port still waits for what is on its way to its
// last owner (RFC 6888 REQ-8, with its exceptions for TCP and for filtering
// by address).
func (s *portSpace) held(p *mapping, now uint32) bool {
	if s.proto == frame.ProtoTCP || s.proto == frame.ProtoUDP && s.m.cfg.Filtering != EndpointIndependent {
		return false
	}
	return now-p.freed < uint32(s.m.cfg.Timeouts.PortHold.Seconds())
}

// parting says whether a port without a mapping had one less than PortHold
// ago, whatever the protocol and the filter: what comes for it is late and
// meant for its last owner.
func (s *portSpace) parting(ext uint16, now uint32) bool {
	word, bit := &s.parted[ext/64], uint64(1)<<(ext%64)
	if word.Load()&bit == 0 {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if now-s.at(ext).freed < uint32(s.m.cfg.Timeouts.PortHold.Seconds()) {
		return true
	}
	word.And(^bit)
	return false
}

// unused is the time for release of a port that no flow came to use: nothing
// is on its way to it, so it is held no longer than it was.
const unused = 0

// release gives back a reference.
func (s *portSpace) release(ext uint16, now uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.at(ext)
	if p.refs--; p.busy() {
		return
	}
	if now != unused {
		p.freed = now
		s.parted[ext/64].Or(1 << (ext % 64))
	}
	s.drop(p, ext)
}

// drop ends a mapping that is not busy any more.
func (s *portSpace) drop(p *mapping, ext uint16) {
	g := p.owner - 1
	s.busy[ext/64].And(^(uint64(1) << (ext % 64)))
	if s.counted(ext) {
		s.share[g]--
	}
	if in := s.insideAt(g, p.guestPort); *in == uint32(ext)+1 {
		*in = 0
	}
}

// admission is the answer of admit.
type admission uint8

const (
	refused  admission = iota
	admitted           // by a forward, or because the guest gets every port
	invited            // by a mapping that the guest made: the filter decides
)

// admit looks whose a packet from outside to ext is when no flow is known, and
// takes a reference for the flow to come unless it is refused.
func (s *portSpace) admit(ext uint16, now uint32) (*guest, uint16, admission) {
	all := s.m.all
	if all == nil && !s.mapped(ext) {
		return nil, 0, refused
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.at(ext)
	switch {
	case p.fixed:
		p.refs++
		return s.m.guests[p.owner-1], p.guestPort, admitted
	case p.refs > 0 && (all == nil || p.owner != all.index+1 || p.guestPort != ext):
		p.refs++
		return s.m.guests[p.owner-1], p.guestPort, invited
	case all == nil, p.owner != 0 && p.owner != all.index+1 && s.held(p, now):
		return nil, 0, refused
	}
	s.claim(all, ext, ext)
	return all, ext, admitted
}

// restore gives ext to a guest's port again, with one reference, if nobody else
// has it.
func (s *portSpace) restore(g *guest, ext, port uint16) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.at(ext); p.busy() && (p.owner != g.index+1 || p.guestPort != port) {
		return false
	}
	s.claim(g, ext, port)
	// A packet from outside may have claimed a port that the guest would not
	// have got for itself.
	if in := s.insideAt(g.index, port); *in == 0 && (ext != port || !s.m.cfg.KernelRange.has(ext)) {
		*in = uint32(ext) + 1
	}
	return true
}

// each calls fn for the ports of a forward until it returns an error.
func (f *Forward) each(fn func(ext, port uint16) error) error {
	for ext := int(f.Port); ext <= int(max(f.Last, f.Port)); ext++ {
		if err := fn(uint16(ext), f.GuestPort+uint16(ext)-f.Port); err != nil {
			return err
		}
	}
	return nil
}

// normal fills in what may be left out of a Forward.
func (f *Forward) normal(m *Masquerade) (*portSpace, *guest, error) {
	orElse(&f.Proto, frame.ProtoTCP)
	orElse(&f.GuestPort, f.Port)
	orElse(&f.Last, f.Port)
	if f.Proto != frame.ProtoTCP && f.Proto != frame.ProtoUDP || f.Port == 0 || f.Last < f.Port ||
		int(f.GuestPort)+int(f.Last-f.Port) > 0xffff || f.Guest < 0 || f.Guest >= len(m.cfg.Guests) {
		return nil, nil, ErrBadPort
	}
	return m.space(f.Proto), m.guests[f.Guest], nil
}

// AddForward publishes a port of the pod's address. A forward that is there
// already is no error; one that leads elsewhere, or a flow of another guest on
// the port, is ErrPortInUse.
func (m *Masquerade) AddForward(f Forward) error {
	s, g, err := f.normal(m)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	err = f.each(func(ext, port uint16) error {
		if p := s.at(ext); p.busy() && (p.owner != g.index+1 || p.guestPort != port) {
			return ErrPortInUse
		}
		return nil
	})
	if err != nil {
		return err
	}
	return f.each(func(ext, port uint16) error {
		p := s.at(ext)
		s.claim(g, ext, port)
		p.fixed = true
		p.refs--
		// What the guest sends from the port keeps a mapping that it has.
		if in := s.insideAt(g.index, port); *in == 0 {
			*in = uint32(ext) + 1
		}
		return nil
	})
}

// RemoveForward takes back what AddForward published. Flows that came through
// it live on.
func (m *Masquerade) RemoveForward(f Forward) error {
	s, g, err := f.normal(m)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	err = f.each(func(ext, port uint16) error {
		if p := s.at(ext); !p.fixed || p.owner != g.index+1 || p.guestPort != port {
			return ErrNoForward
		}
		return nil
	})
	if err != nil {
		return err
	}
	return f.each(func(ext, _ uint16) error {
		p := s.at(ext)
		if p.fixed = false; !p.busy() {
			s.drop(p, ext)
		}
		return nil
	})
}

// Forwards lists what is published, ranges put together.
func (m *Masquerade) Forwards() []Forward {
	var fs []Forward
	for _, s := range []*portSpace{&m.spaces[spaceTCP], &m.spaces[spaceUDP]} {
		fs = s.forwards(fs)
	}
	return fs
}

func (s *portSpace) forwards(fs []Forward) []Forward {
	s.mu.Lock()
	defer s.mu.Unlock()
	first := len(fs)
	for ext := 1; ext <= 0xffff; ext++ {
		if s.external[ext>>8] == nil {
			ext |= 0xff
			continue
		}
		p := s.at(uint16(ext))
		if !p.fixed {
			continue
		}
		if n := len(fs); n > first {
			l := &fs[n-1]
			if int(l.Last)+1 == ext && l.Guest == int(p.owner-1) && p.guestPort-l.GuestPort == uint16(ext)-l.Port {
				l.Last = uint16(ext)
				continue
			}
		}
		fs = append(fs, Forward{Guest: int(p.owner - 1), Proto: s.proto, Port: uint16(ext), Last: uint16(ext),
			GuestPort: p.guestPort})
	}
	return fs
}

// mappings counts the external ports in use.
func (s *portSpace) mappings() int {
	n := 0
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, page := range s.external {
		if page == nil {
			continue
		}
		for i := range page {
			if page[i].refs > 0 {
				n++
			}
		}
	}
	return n
}
