// Package nat rewrites flows: conntrack, masquerade, port forwarding.
//
// A [Masquerade] stands between guests with private addresses and the one
// address of their pod. It is three kinds of stage: [Masquerade.Outbound] for
// what a guest sends, [Masquerade.Inbound] for what the uplink receives and
// [Masquerade.Local] for what the pod's own kernel sends over a guest's local
// tap. All stages share one flow table, which workers read without locks; only
// a new flow, a new mapping and a fragment take one. Time is the batch's, so
// nothing here reads a clock.
//
// What is translated, what passes to the pod's kernel and what is refused
// follows KubeVirt's masquerade binding where it says something, and RFC 4787,
// 5382, 5508, 7857 and 6888 where it does not:
//
//   - A guest that lists no ports gets everything that reaches the pod's
//     address and belongs to nobody else, every IP protocol included. One that
//     lists ports gets these, and answers to what it started.
//   - Hairpinning (RFC 4787 REQ-9) is left to the pod's kernel, as KubeVirt
//     does: a guest that calls the pod's own address meets the pod's
//     listeners, never itself or another guest.
//   - Inbound packets of a known flow refresh it (RFC 4787 REQ-6a); ICMP
//     errors and TCP resets refresh nothing (RFC 7857 section 7).
//   - No payload is ever rewritten (RFC 4787 REQ-10), no live flow is ever
//     evicted (RFC 6888 REQ-11).
//
// A [Masquerade6] is the same for IPv6.
package nat

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"sidewire/engine/frame"
)

// GatewayMAC is the gateway's hardware address unless Config says otherwise:
// KubeVirt's, so that a guest's neighbour entry survives a migration.
var GatewayMAC = frame.MAC{0x02}

// maxGuests bounds Config.Guests: a flow names its guest in one byte.
const maxGuests = 250

// Filtering says which packets from outside may use a guest's mapping (RFC
// 4787, section 5).
type Filtering uint8

// The three kinds of filtering.
const (
	// EndpointIndependent lets everybody answer (RFC 4787 REQ-8, RFC 5382
	// REQ-3: recommended where transparency matters most).
	EndpointIndependent Filtering = iota
	// AddressDependent lets hosts answer that the guest has written to.
	AddressDependent
	// AddressPortDependent lets exactly the flow's other end answer.
	AddressPortDependent
)

// Router finds the way to a destination. Route returns nil if there is none;
// the Hop need not be resolved yet. It is asked once per flow and again when
// the hop was retired, and is safe for concurrent use.
type Router interface {
	Route(dst uint32) *frame.Hop
}

// LocalAddrs knows the pod's own addresses. It is safe for concurrent use.
type LocalAddrs interface {
	Local(ip uint32) bool
}

// PortRange is the ports First to Last.
type PortRange struct{ First, Last uint16 }

func (r PortRange) has(p uint16) bool { return p >= r.First && p <= r.Last }

func (r PortRange) size() int { return int(r.Last) - int(r.First) + 1 }

// Prefix is a range of IPv4 addresses.
type Prefix struct {
	IP   uint32
	Bits int
}

func (p Prefix) has(ip uint32) bool { return (ip^p.IP)&mask(p.Bits) == 0 }

func mask(bits int) uint32 {
	if bits <= 0 {
		return 0
	}
	return ^uint32(0) << (32 - min(bits, 32))
}

// Guest is one private side.
type Guest struct {
	Port        frame.PortID // the guest's NIC
	LocalTap    frame.PortID // the tap that owns Gateway, or its alias, in the pod; 0 if there is none
	IP, Gateway uint32
	Alias       Alias     // what they are to the pod, if not that
	Prefix      int       // of the guest's network
	MAC         frame.MAC // zero until it is learned
	MTU         int       // largest IP packet that the guest takes; 0 is no limit
	// Ports are published by the pod's address. With none, everything is.
	Ports []Forward
	// Proxied gives the guest's own TCP connections to LocalTap, beyond which a process of the pod takes them.
	Proxied bool
}

// Forward publishes the ports Port to Last of the pod's address. It is a plain
// value.
type Forward struct {
	Guest int    // index in Config.Guests; set by New for Guest.Ports
	Proto uint8  // frame.ProtoTCP or frame.ProtoUDP; 0 is TCP
	Port  uint16 // on the pod's address
	Last  uint16 // last port of a range; 0 is Port alone
	// GuestPort is the guest's port that Port leads to; 0 is the same.
	GuestPort uint16
}

// Timeouts are how long a flow may be idle. Zero values become the defaults.
type Timeouts struct {
	TCPEstablished time.Duration // 2 h 4 min (RFC 5382 REQ-5)
	TCPOpening     time.Duration // 4 min (RFC 7857 section 2.1)
	TCPClosing     time.Duration // 4 min (RFC 7857 section 2.1)
	UDP            time.Duration // 5 min (RFC 4787 REQ-5)
	ICMP           time.Duration // 60 s (RFC 5508 REQ-2)
	Other          time.Duration // 10 min, every other IP protocol
	// Fragment is how long fragments wait for their first one: 30 s.
	Fragment time.Duration
	// PortHold is how long a freed port stays with its guest where filtering
	// lets everybody in: 120 s (RFC 6888 REQ-8).
	PortHold time.Duration
}

// Limits are per guest. Zero values become the defaults. Flows that are opened
// from outside get at most three quarters of each, so that nobody outside can
// keep a guest from opening its own.
type Limits struct {
	Flows    int // 65536 in all
	TCP      int // 16384
	HalfOpen int // 1024 of TCP, for each side that opens
	UDP      int // 16384
	ICMP     int // 1024
	Other    int // 1024
	// NewPerSecond and NewBurst bound new flows, for each side: 5000, 10000.
	NewPerSecond, NewBurst int
	// ErrorsPerSecond and ErrorBurst bound the ICMP errors made here: 100, 50.
	ErrorsPerSecond, ErrorBurst int
	// FragmentIDs and FragmentBytes bound fragments that wait for their first
	// one: 64, 256 KiB.
	FragmentIDs, FragmentBytes int
	// Table bounds the flows of all guests together: 262144 or Flows times
	// guests, whichever is less.
	Table int
}

// Config is what a Masquerade is made of.
type Config struct {
	Guests     []Guest
	Uplink     frame.PortID
	KernelPort frame.PortID // takes frames whose next hop is unresolved; 0 if there is none
	Router     Router
	Local      LocalAddrs // may be nil
	External   uint32     // the pod's address
	GatewayMAC frame.MAC  // zero is the package's GatewayMAC
	// PortRange is where external ports are chosen: 40000 to 65535.
	PortRange PortRange
	// KernelRange is the pod's own ephemeral ports, which a guest without a
	// list of ports does not get even where it asks for them: 32768 to 39999.
	KernelRange PortRange
	Filtering   Filtering
	Timeouts    Timeouts
	Limits      Limits
	// Deny lists destinations that guests may not reach.
	Deny []Prefix
	// PortFree says whether no process of the pod has bound this port; nil is
	// always. It is asked once for each new mapping, under a lock.
	PortFree func(proto uint8, port uint16) bool
}

// Masquerade is a NAT44 with one external address. It is safe for concurrent
// use.
type Masquerade struct {
	cfg      Config
	timeouts [numClasses]uint32 // seconds
	gwMAC    uint64
	external uint32
	guests   []*guest
	all      *guest // the guest that gets every port, if there is one
	table    table
	spaces   [numSpaces]portSpace
	frags    fragTable // inbound
	hopErrs  bucket    // ICMP errors to the outside
	stats    counters
	remotes  *addrTable // what remote addresses are numbers of; nil: they are addresses
	asleep   atomic.Bool
	wake     chan struct{}
}

// New checks the configuration and makes a Masquerade with no flows.
func New(c Config) (*Masquerade, error) {
	c.setDefaults()
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("masquerade: %w", err)
	}
	m := &Masquerade{cfg: c, gwMAC: mac48(c.GatewayMAC[:]), wake: make(chan struct{}, 1)}
	m.external = c.External
	m.timeouts = c.Timeouts.classes()
	m.hopErrs.init(c.Limits.ErrorsPerSecond, c.Limits.ErrorBurst)
	m.frags.init(&c)
	m.table.init(c.Limits.Table)
	for i := range m.spaces {
		m.spaces[i].init(m, spaceProto[i], len(c.Guests))
	}
	for i := range c.Guests {
		g := newGuest(i, &c)
		m.guests = append(m.guests, g)
		if g.all {
			m.all = g
		}
		for _, f := range g.Ports {
			f.Guest = i
			if err := m.AddForward(f); err != nil {
				return nil, fmt.Errorf("masquerade: guest %d: %w", i, err)
			}
		}
	}
	return m, nil
}

// LearnMAC tells a guest's hardware address, as SEND_RARP does after a
// migration, before the guest itself has said anything. The gateway's own and
// group addresses are no guest's.
func (m *Masquerade) LearnMAC(guest int, mac frame.MAC) {
	if v := mac48(mac[:]); v != 0 && v>>40&1 == 0 && v != m.gwMAC {
		m.guests[guest].mac.Store(v)
	}
}

// Run sweeps the table until ctx ends. now is the clock that the batches'
// times come from. It sleeps as long as nothing can expire.
func (m *Masquerade) Run(ctx context.Context, now func() int64) {
	t := time.NewTimer(time.Hour)
	defer t.Stop()
	for {
		next := m.Sweep(now())
		var c <-chan time.Time
		if next > 0 {
			t.Reset(next)
			c = t.C
		}
		select {
		case <-ctx.Done():
			return
		case <-c:
		case <-m.wake:
		}
	}
}

// rouse wakes Run when something that can expire is made while the last Sweep
// had found nothing.
func (m *Masquerade) rouse() {
	if m.asleep.Load() && m.asleep.CompareAndSwap(true, false) {
		select {
		case m.wake <- struct{}{}:
		default:
		}
	}
}

func orElse[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

func (c *Config) setDefaults() {
	orElse(&c.GatewayMAC, GatewayMAC)
	orElse(&c.PortRange, PortRange{40000, 65535})
	orElse(&c.KernelRange, PortRange{32768, 39999})
	t := &c.Timeouts
	orElse(&t.TCPEstablished, 7440*time.Second)
	orElse(&t.TCPOpening, 4*time.Minute)
	orElse(&t.TCPClosing, 4*time.Minute)
	orElse(&t.UDP, 5*time.Minute)
	orElse(&t.ICMP, time.Minute)
	orElse(&t.Other, 10*time.Minute)
	orElse(&t.Fragment, 30*time.Second)
	orElse(&t.PortHold, 120*time.Second)
	l := &c.Limits
	orElse(&l.Flows, 64<<10)
	orElse(&l.TCP, 16<<10)
	orElse(&l.HalfOpen, 1<<10)
	orElse(&l.UDP, 16<<10)
	orElse(&l.ICMP, 1<<10)
	orElse(&l.Other, 1<<10)
	orElse(&l.NewPerSecond, 5000)
	orElse(&l.NewBurst, 10000)
	orElse(&l.ErrorsPerSecond, 100)
	orElse(&l.ErrorBurst, 50)
	orElse(&l.FragmentIDs, 64)
	orElse(&l.FragmentBytes, 256<<10)
	orElse(&l.Table, min(l.Flows*max(len(c.Guests), 1), 256<<10))
}

func (c *Config) check() error {
	switch {
	case c.Router == nil:
		return errors.New("no router")
	case len(c.Guests) == 0 || len(c.Guests) > maxGuests:
		return fmt.Errorf("%d guests, want 1 to %d", len(c.Guests), maxGuests)
	case c.PortRange.First == 0 || c.PortRange.size() < 1:
		return fmt.Errorf("port range %d-%d is empty or holds port 0", c.PortRange.First, c.PortRange.Last)
	case c.Limits.Table < 1 || c.Limits.Table > maxFlows:
		return fmt.Errorf("table of %d flows, want 1 to %d", c.Limits.Table, maxFlows)
	}
	all := 0
	for i, g := range c.Guests {
		if g.IP == 0 || g.Gateway == 0 || g.IP == g.Gateway {
			return fmt.Errorf("guest %d: address and gateway must be given and differ", i)
		}
		if g.Prefix < 1 || g.Prefix > 32 || (g.IP^g.Gateway)&mask(g.Prefix) != 0 {
			return fmt.Errorf("guest %d: the gateway is not in the guest's network", i)
		}
		if (g.Alias.Guest == 0) != (g.Alias.Gateway == 0) {
			return fmt.Errorf("guest %d: an alias is two addresses", i)
		}
		if len(g.Ports) == 0 {
			all++
		}
	}
	if all > 1 {
		return errors.New("two guests without a list of ports: only one can get every port")
	}
	return nil
}

// guest is what is known of a Guest at run time.
type guest struct {
	Guest
	index      uint8
	all        bool // gets every port
	mask       uint32
	mac        atomic.Uint64 // as mac48; 0 is unknown
	flows      [numKinds]atomic.Int32
	total      atomic.Int32
	half       [2]atomic.Int32 // TCP flows in INIT, by the side that opened
	fresh      [2]bucket       // new flows, by the side that opens
	errs       bucket          // ICMP errors to this guest
	asks       bucket          // questions for its hardware address
	frags      fragTable       // outbound
	localQueue [64]atomic.Uint32
}

func newGuest(i int, c *Config) *guest {
	g := &guest{Guest: c.Guests[i], index: uint8(i), mask: mask(c.Guests[i].Prefix)}
	g.all = len(g.Ports) == 0
	g.mac.Store(mac48(g.MAC[:]))
	for side := range g.fresh {
		g.fresh[side].init(c.Limits.NewPerSecond, c.Limits.NewBurst)
	}
	g.errs.init(c.Limits.ErrorsPerSecond, c.Limits.ErrorBurst)
	g.asks.init(asksPerSecond, 1)
	g.frags.init(c)
	return g
}

// bucket is a token bucket as the generic cell rate algorithm has it: the only
// state is the time at which it will be full again. It is safe for concurrent
// use.
type bucket struct {
	full  atomic.Int64
	cost  int64 // nanoseconds per token
	depth int64 // nanoseconds of a whole bucket
}

func (t *bucket) init(perSecond, burst int) {
	t.cost = int64(time.Second) / int64(max(perSecond, 1))
	t.depth = t.cost * int64(max(burst, 1))
}

// take takes a token if there is one.
func (t *bucket) take(now int64) bool {
	for {
		old := t.full.Load()
		full := max(old, now)
		if full-now > t.depth-t.cost {
			return false
		}
		if t.full.CompareAndSwap(old, full+t.cost) {
			return true
		}
	}
}

// seconds is the unit in which flows remember time; the offset leaves room
// for flows that were imported as older than the clock.
func seconds(now int64) uint32 { return uint32(now/int64(time.Second)) + 1<<24 }
