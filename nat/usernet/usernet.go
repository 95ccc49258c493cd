// Package usernet carries guest TCP, UDP and ICMP over ordinary host sockets,
// without privileges.
//
// A [Net] stands behind one guest's port. What the guest sends comes through
// [Net.Process] and ends there: its payload goes to a socket straight from the
// guest's memory. What the host's sockets have for the guest comes from the
// queues of [Net.Queue], one per worker, for which payload is received straight
// into the guest's buffers where the guest's port lends them. There is no
// buffer in between: bytes that the guest has not acknowledged stay in the
// host's socket, and bytes that the socket does not take are not acknowledged
// to the guest.
//
// Each worker owns the flows that it opened: their table, timers and sockets.
// The guest may move a flow to a queue pair of another worker; that one then
// works on it under the owner's lock, which its owner takes once per batch and
// nobody else otherwise.
package usernet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Config is what a Net is made of.
type Config struct {
	// Name is the interface's, for the log.
	Name string
	// Port is the guest's.
	Port frame.PortID
	// Guest is the guest's address, Gateway that of its gateway, both in
	// Prefix. What the guest sends from elsewhere is Spoofed. Their family is
	// that of the Net: a guest with both has two. That of IPv6 leaves frames of
	// others alone, and comes first.
	Guest, Gateway netip.Addr
	Prefix         netip.Prefix
	// MAC is the guest's hardware address, zero to learn it; GatewayMAC is the
	// gateway's.
	MAC, GatewayMAC frame.MAC
	// MTU is that of the guest's link, in bytes of IP packet.
	MTU int
	// Workers is how many there are.
	Workers int
	// Pairs are the guest's queue pairs.
	Pairs []Pair
	// Services are addresses inside the guest's network that stand for others.
	Services []Service
	// Loopback lets the gateway's address stand for the host's loopback.
	Loopback bool
	// GatewaySource shows the guest all that comes in by a forwarded port as
	// the gateway's, as QEMU's slirp does; otherwise clients keep their
	// addresses.
	GatewaySource bool
	// Ping lets ICMP echo pass beyond the gateway.
	Ping bool
	// Filter of inbound UDP (RFC 4787 REQ-8).
	Filter Filter
	// Policy says where the guest may go. The zero value allows all but the
	// host's loopback.
	Policy Policy
	// NetNS, if positive, is a network namespace's descriptor in which sockets
	// are made. The workers' threads enter it for that.
	NetNS int
	// MaxFlows bounds the flows of each worker; 0 is 131072.
	MaxFlows int
	// Beside is the guest's other family, whose descriptors this one shares;
	// nil if there is none. It is closed after this one.
	Beside *Net
	// MaxSockets bounds the descriptors of all workers together; 0 is what the
	// process may open, less some for others.
	MaxSockets int
	// Timeouts of idle flows; zero ones are the defaults.
	Timeouts Timeouts
	Log      *slog.Logger
}

// Pair is a queue pair of the guest.
type Pair struct {
	// Worker serves it.
	Worker int
	// Room lends its rx buffers; nil if they cannot be lent.
	Room Room
}

// Room lends a guest's rx buffers to receive into. A frame lies in buffers that
// follow each other, from the start of one on; their first bytes, as many as
// the virtio_net_hdr and the frame's private head take, stay free. All calls of
// a turn are one reservation.
type Room interface {
	// Reserve adds buffers until there are up to most bytes behind the first
	// skip buffers, and returns all of the reservation; nil if there are less
	// than least.
	Reserve(skip, least, most int) [][]byte
	// Keep takes back all buffers but the first n, which hold frames.
	Keep(n int)
	// Free ends the reservation.
	Free()
	// Arm asks for a wake-up when the guest gives more buffers, and reports
	// whether it has since Reserve found too few. Disarm undoes it.
	Arm() (more bool)
	Disarm()
	// Short says that Reserve found too few buffers last, rather than that the
	// guest cannot take frames in this way at all.
	Short() bool
}

// Service is an address and port of the guest's network that stand for others
// of the host.
type Service struct {
	Proto uint8
	Addr  netip.AddrPort
	To    netip.AddrPort
}

// Filter says who may answer on a UDP mapping.
type Filter uint8

const (
	// FilterNone lets everybody: endpoint-independent filtering.
	FilterNone Filter = iota
	// FilterAddress lets addresses that the guest has sent to.
	FilterAddress
	// FilterPort lets addresses and ports that the guest has sent to.
	FilterPort
)

// Net is the network of one guest's interface.
//
// Process and the queues are the workers'; all else is safe for concurrent use.
type Net struct {
	conf    Config
	log     *slog.Logger
	guest   uint32
	gateway uint32
	mask    uint32
	gwMAC   uint64
	mac     atomic.Uint64 // the guest's, 0 while it is not known
	mss     uint16        // of the guest's link
	six     *six          // nil for IPv4; see six.go
	// Of the family: how much of a frame's Head may be filled, how much of a
	// received frame is not received into the guest's buffers, and the types of
	// ICMP echo.
	inHead, lent    int
	echo, echoReply uint8
	policy          atomic.Pointer[Policy]
	service         map[serviceKey]target
	sockets         *socketBudget // of Config.Beside too
	ns              netns
	frags           fragTable
	reverse         reverse       // of service
	ids             atomic.Uint32 // of packets that go to the guest in fragments
	workers         []*worker
	forwards        forwards // see listen.go
	all             allPorts // see listen_all.go
	// saidNoPing: the log has it that there are no ping sockets.
	saidNoPing atomic.Bool
	// noPeekOff says that the kernel knows no SO_PEEK_OFF for TCP.
	noPeekOff atomic.Bool

	// opening is held while a worker that has no mapping for a datagram looks
	// for one elsewhere and opens one. It comes before the workers' locks.
	opening sync.Mutex

	mu        sync.Mutex // guards what follows
	listeners map[Forward]*listener
	closed    bool
}

type serviceKey struct {
	proto uint8
	addr  uint32
	port  uint16
}

// target is an address of the host's side.
type target struct {
	addr [16]byte // IPv4 as ::ffff:a.b.c.d
	port uint16
}

// New makes a Net. Close it after the engine's workers have stopped.
func New(c Config) (*Net, error) {
	switch {
	case !c.Prefix.Contains(c.Guest) || !c.Prefix.Contains(c.Gateway):
		return nil, fmt.Errorf("user network: guest %s and gateway %s are not both in %s", c.Guest, c.Gateway, c.Prefix)
	case c.MTU < leastLink(&c) || c.MTU > 65535:
		return nil, fmt.Errorf("user network: MTU %d is not from %d to 65535", c.MTU, leastLink(&c))
	case c.Workers < 1:
		return nil, errors.New("user network: no worker")
	}
	c.Timeouts.defaults()
	if c.MaxFlows <= 0 {
		c.MaxFlows = defaultFlows
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	n := &Net{
		conf: c, log: c.Log, gwMAC: mac48(c.GatewayMAC[:]), service: map[serviceKey]target{}, listeners: map[Forward]*listener{},
		inHead: frame.HeadSize, lent: frame.VnetHdrMrgLen + headLen, echo: icmpEcho, echoReply: icmpEchoReply,
	}
	if c.Guest.Is4() {
		n.guest, n.gateway, n.mask = ip4(c.Guest), ip4(c.Gateway), ^uint32(0)<<(32-c.Prefix.Bits())
	} else {
		n.beSix(&c)
	}
	n.mss = uint16(n.conf.MTU - ip4Len - tcpLen)
	n.mac.Store(mac48(c.MAC[:]))
	n.policy.Store(&c.Policy)
	if n.sockets = new(socketBudget); c.Beside != nil {
		n.sockets = c.Beside.sockets
	} else {
		n.sockets.init(c.MaxSockets)
	}
	for _, s := range c.Services {
		if s.Addr.Addr().Is4() != c.Guest.Is4() || s.To.Addr().Is4() != c.Guest.Is4() {
			return nil, fmt.Errorf("user network: service %s at %s: want %s addresses", s.Addr, s.To, n.familyName())
		}
		n.service[serviceKey{s.Proto, n.numberOf(s.Addr.Addr()), s.Addr.Port()}] = target{mapped(n.numberOf(s.To.Addr())), s.To.Port()}
	}
	n.reverse.init(n, c.Services)
	if err := n.ns.open(c.NetNS); err != nil {
		return nil, fmt.Errorf("user network: %w", err)
	}
	for i := range c.Workers {
		w, err := newWorker(n, i)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("user network: %w", err), n.Close())
		}
		n.workers = append(n.workers, w)
	}
	return n, nil
}

// Close ends all flows and frees all descriptors. The workers must have
// stopped.
func (n *Net) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closed = true
	n.closeAll()
	for f, l := range n.listeners {
		l.close()
		delete(n.listeners, f)
	}
	for _, w := range n.workers {
		w.close()
	}
	n.ns.close()
	return nil
}

// SetPolicy replaces the policy. Flows that are open go on.
func (n *Net) SetPolicy(p Policy) { n.policy.Store(&p) }

// Process implements engine.Stage for what the guest sends.
func (n *Net) Process(b *frame.Batch) {
	w := n.workers[b.Worker]
	if n.six != nil {
		if !anySix(b) {
			return
		}
		n.sweep()
	}
	w.elsewhere = w.process(b, w.elsewhere[:0])
	if len(w.elsewhere) > 0 {
		if n.six != nil {
			defer n.six.elsewhere.Add(-1)
		}
		n.processElsewhere(w, b, w.elsewhere)
	}
}

// process deals with a batch's frames, and returns those that belong to no flow
// of this worker, but may to one of another.
func (w *worker) process(b *frame.Batch, elsewhere []*frame.Frame) []*frame.Frame {
	w.mu.Lock()
	defer w.mu.Unlock() // also when memory of the guest's has gone away
	w.begin(b)
	w.turn()
	w.worked = true
	for i, k := 0, b.Len(); i < k; i++ {
		f := b.Frame(i)
		if f.Out != frame.Drop || f.Reason != frame.ReasonNone {
			continue
		}
		if !w.guestFrame(b, f) {
			elsewhere = append(elsewhere, f)
		}
	}
	w.finish(b)
	if len(elsewhere) > 0 && w.six != nil {
		w.net.six.elsewhere.Add(1) // their numbers are in no flow
	}
	return elsewhere
}

// moveAfter is how many batches in a row bring a flow's frames to another
// worker before the flow follows.
const moveAfter = 8

// processElsewhere takes frames that belong to no flow of their worker to
// whichever has it. If nobody has, the flow is the worker's own to open.
func (n *Net) processElsewhere(w *worker, b *frame.Batch, fs []*frame.Frame) {
	if anyDatagram(fs) {
		// Or two workers would each make a mapping for the same port, of which
		// only one could have the right external port (RFC 4787 REQ-1).
		n.opening.Lock()
		defer n.opening.Unlock()
	}
	for _, o := range n.workers {
		if o == w {
			continue
		}
		left := o.foreign(b, fs)
		if len(left) < len(fs) {
			o.queue.wake()
			n.follow(o, w)
		}
		if fs = left; len(fs) == 0 {
			return
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.begin(b)
	for _, f := range fs {
		if !w.known(b, f) {
			w.unknown(b, f)
		}
	}
	w.finish(b)
}

// anyDatagram says whether one of the frames may open a mapping.
func anyDatagram(fs []*frame.Frame) bool {
	for _, f := range fs {
		if f.Proto != frame.ProtoTCP {
			return true
		}
	}
	return false
}

// foreign deals with frames that another worker was given, and returns those
// that are not of this one's flows either. It lists in moving the flows that
// should follow their frames.
func (w *worker) foreign(b *frame.Batch, fs []*frame.Frame) (left []*frame.Frame) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.begin(b)
	w.guest = true
	defer func() { w.guest = false }()
	left = fs[:0]
	for _, f := range fs {
		if !w.known(b, f) {
			left = append(left, f)
		}
	}
	w.finish(b)
	return left
}

// follow moves flows to the worker that gets their frames.
func (n *Net) follow(from, to *worker) {
	a, z := from, to
	if a.id > z.id {
		a, z = z, a
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(from.moving) == 0 {
		return
	}
	z.mu.Lock()
	defer z.mu.Unlock()
	for _, m := range from.moving {
		if f := from.table.at(m.flow); f.gen == m.gen && f.state != stateFree && f.state != stateTimeWait {
			from.moveTo(to, m.flow)
		}
	}
	from.moving = from.moving[:0]
}

// moveTo gives a flow to another worker. Both locks are held.
func (w *worker) moveTo(to *worker, i int32) {
	f := w.table.at(i)
	j := to.table.add(f.key)
	if j == none {
		return
	}
	w.wheel.stop(i)
	w.unready(i)
	g := to.table.at(j)
	links := *g
	*g = *f
	g.gen, g.next, g.place = links.gen, links.next, links.place
	g.flags &^= strangeAll
	if g.flags&(delayed|patient) != 0 && g.proto == frame.ProtoTCP {
		g.flags &^= delayed | patient
		to.delay(j)
	}
	if mark, ok := w.marks[i]; ok {
		if to.marks == nil {
			to.marks = map[int32]uint32{}
		}
		to.marks[j] = mark
		delete(w.marks, i)
	}
	if f.fd >= 0 {
		// What the socket has to tell it tells again where it is added.
		_ = unix.EpollCtl(w.epfd, unix.EPOLL_CTL_DEL, int(f.fd), nil)
		_ = to.watch(f.fd, flowEvents, eventFlow, j, g.gen)
	}
	w.table.remove(i)
	to.wheel.set(j, to.tick+1)
	to.stats.Moved++
}

// guestFrame deals with one frame of the guest. It reports false for one that
// belongs to no flow of this worker, but may to one of another.
func (w *worker) guestFrame(b *frame.Batch, f *frame.Frame) bool {
	n := w.net
	if int(f.HeadLen) < frame.EthernetLen {
		f.Drop(frame.ShortFrame)
		return true
	}
	src := mac48(f.Src())
	if src == 0 || src>>40&1 != 0 {
		f.Drop(frame.BadSource)
		return true
	}
	if n.six != nil {
		if !w.fromSix(f) {
			return true
		}
	} else if !w.fromFour(b, f, src) {
		return true
	}
	if n.mac.Load() != src {
		n.mac.Store(src)
	}
	if r := w.martian(f); r != frame.ReasonNone {
		f.Drop(r)
		return true
	}
	if f.Frag || f.MoreFrags() {
		if f = w.reassemble(b, f); f == nil {
			return true
		}
	}
	if !w.sumOK(f) {
		f.Drop(frame.BadChecksum)
		return true
	}
	if f.TTL() <= 1 && f.DstIP4() != n.gateway {
		w.icmpError(b, f, icmpTimeExceeded, 0, 0)
		f.Drop(frame.TTLExpired)
		return true
	}
	if w.known(b, f) {
		return true
	}
	if len(n.workers) > 1 && mayMove(f) {
		return false
	}
	w.unknown(b, f)
	return true
}

// fromFour looks at a frame where the guest has IPv4. It reports false if that
// was all: it is no packet for the network beyond, and has its verdict.
func (w *worker) fromFour(b *frame.Batch, f *frame.Frame, src uint64) bool {
	switch f.EtherType() {
	case frame.TypeARP:
		w.arp(b, f, src)
		return false
	case frame.TypeIPv4:
	default:
		f.Drop(frame.NotCarried)
		return false
	}
	if r := f.ParseIPv4(); r != frame.ReasonNone {
		f.Drop(r)
		return false
	}
	if f.SrcIP4() != w.net.guest {
		f.Drop(frame.Spoofed)
		return false
	}
	if mac48(f.Dst()) != w.net.gwMAC {
		f.Drop(frame.NotCarried) // to a group, or to nobody here
		return false
	}
	return true
}

// mayMove says whether a flow of the frame's kind may be another worker's.
func mayMove(f *frame.Frame) bool {
	return f.Proto == frame.ProtoTCP || f.Proto == frame.ProtoUDP || f.Proto == frame.ProtoICMP
}

// known deals with a frame of a flow that this worker has, and reports whether
// it has it.
func (w *worker) known(b *frame.Batch, f *frame.Frame) bool {
	switch f.Proto {
	case frame.ProtoTCP:
		i := w.table.find(tcpKey(f))
		if i < 0 {
			return false
		}
		w.strange(i)
		w.tcpSegment(b, f, i)
	case frame.ProtoUDP:
		i := w.table.find(udpKey(f))
		if i < 0 {
			return false
		}
		w.strange(i)
		w.udpDatagram(b, f, i)
	case frame.ProtoICMP:
		return w.icmpKnown(b, f)
	default:
		return false
	}
	return true
}

// strange notes whether a flow's frame came to its own worker.
func (w *worker) strange(i int32) {
	f := w.table.at(i)
	if !w.guest {
		f.flags &^= strangeAll
		return
	}
	switch f.count(strangeOne, strangeAll) {
	case moveAfter:
		if f.proto != frame.ProtoUDP || w.udpMayMove(i) {
			w.moving = append(w.moving, flowRef{i, f.gen})
		}
	case int(strangeAll / strangeOne):
		f.flags &^= strangeAll // again
	}
}

// unknown deals with a frame of a flow that no worker has.
func (w *worker) unknown(b *frame.Batch, f *frame.Frame) {
	switch f.Proto {
	case frame.ProtoTCP:
		w.tcpOpen(b, f)
	case frame.ProtoUDP:
		w.udpOpen(b, f)
	case frame.ProtoICMP:
		w.icmpOpen(b, f)
	default:
		w.refuse(b, f, icmpUnreachable, codeProtocol, frame.NotCarried)
	}
}

// martian says whether a destination is one that nothing is sent to: a group,
// this host by its own name, or the guest itself.
func (w *worker) martian(f *frame.Frame) frame.DropReason {
	switch dst := f.DstIP4(); {
	case dst>>28 >= 14, dst>>24 == 127, dst>>24 == 0, dst == w.net.guest:
		return frame.NotCarried
	}
	return frame.ReasonNone
}

// resolve is where on the host what the guest sends to an address goes. It
// reports false for an address that is in the guest's own network and stands
// for nothing.
func (n *Net) resolve(proto uint8, addr uint32, port uint16) (t target, ok bool) {
	if n.outside(addr) {
		return target{mapped(addr), port}, true
	}
	if t, ok := n.service[serviceKey{proto, addr, port}]; ok {
		return t, true
	}
	if addr == n.gateway && n.conf.Loopback {
		return target{mapped(loopback), port}, true
	}
	return target{}, false
}

const loopback = 127<<24 | 1

// mapped is an IPv4 address as one of IPv6.
func mapped(a uint32) (b [16]byte) {
	b[10], b[11] = 0xff, 0xff
	binary.BigEndian.PutUint32(b[12:], a)
	return b
}

// unmapped is the IPv4 address that mapped was given.
func unmapped(b *[16]byte) uint32 { return binary.BigEndian.Uint32(b[12:]) }

func ip4(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

func mac48(b []byte) uint64 {
	return uint64(binary.BigEndian.Uint16(b))<<32 | uint64(binary.BigEndian.Uint32(b[2:]))
}

func putMAC(b []byte, m uint64) {
	binary.BigEndian.PutUint16(b, uint16(m>>32))
	binary.BigEndian.PutUint32(b[2:], uint32(m))
}
