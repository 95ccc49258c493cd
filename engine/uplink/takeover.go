package uplink

import (
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Mark is on what the engine sends by way of the kernel's own paths, so that
// it is not taken for a flow of the pod. Set it as Config.Mark too.
const Mark = 0x51de0001

// PodMark is on what the engine asks as a process of the pod, to which
// 127.0.0.1 is the pod also where it is the guest to others.
const PodMark = 0x51de0002

// GatewayMAC is the gateway's hardware address in every pod, so that a guest's
// ARP entry survives migration.
var GatewayMAC = frame.MAC{2}

// PortRange is the ports from Lo to Hi, both included.
type PortRange struct{ Lo, Hi uint16 }

// DefaultNAT is the range that external ports of the guest's flows come from.
// What is below it, from 32768 on, is the pod kernel's.
var DefaultNAT = PortRange{40000, 65535}

// TakeoverConfig says who lives behind the address of a pod.
type TakeoverConfig struct {
	Link string // the pod's interface, such as eth0
	// Pod and Pod6 are the addresses that are shared; the zero value is the
	// link's first one of that family that others may know, if there is one.
	Pod, Pod6 netip.Addr
	// Guests live behind it, at most one of them with everything.
	Guests []Guest
	// NAT is the range of external ports; the zero value is DefaultNAT.
	NAT     PortRange
	Workers int // how many workers push to the taps
}

// Guest is a guest as the pod sees it.
type Guest struct {
	// Addr is the guest's address, Gateway the one that it sees the pod as, with
	// the prefix that both are in. Prefixes of guests do not overlap.
	Addr    netip.Addr
	Gateway netip.Prefix
	// Addr6 and Gateway6 are the same for IPv6; the zero value is none.
	Addr6    netip.Addr
	Gateway6 netip.Prefix
	// Ports are those published. None means everything that is not the pod's
	// own business, nor listed by another guest.
	Ports []Port
	// Proxy stands between the guest and the outside; nil is none.
	Proxy *Proxy
}

// Pod is a network namespace that was taken over for guests: their frames leave the kernel's stack for the sink, everything else stays. All
// methods are safe for concurrent use and may be called from any namespace.
type Pod struct {
	// Warnings are what could not be done, with what that means.
	Warnings []string

	c     TakeoverConfig
	ns    int // descriptor of the namespace
	sink  int // descriptor that keeps the sink
	index int // the sink's
	taps  []*Tap
	mtu   int
	bound boundPorts
	// kernel is where the pod's kernel chooses its ports from.
	kernel PortRange

	mu    sync.Mutex // guards ns, ports and the rules in the kernel
	ports []portList // of each guest; nil: everything
	wide  bool       // the sets in the kernel hold ranges
}

// Takeover prepares the current network namespace. It needs CAP_NET_ADMIN. If
// a run before this one crashed, what it left is taken up without a gap.
func Takeover(c TakeoverConfig) (p *Pod, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("take over %s: %w", c.Link, err)
			if p != nil {
				err = errors.Join(err, p.Restore())
			}
			p = nil
		}
	}()
	l, err := link(c.Link)
	if err != nil {
		return nil, err
	}
	if err := c.complete(l); err != nil {
		return nil, err
	}
	// The sink is made first: its name is the lock against another sidewire.
	sink, _, err := newTap(sinkName(c.Link))
	if err != nil {
		return nil, fmt.Errorf("sink: %w", err)
	}
	p = &Pod{c: c, ns: -1, sink: sink, mtu: l.Attrs().MTU}
	for _, g := range c.Guests {
		if len(g.Ports) == 0 {
			p.ports = append(p.ports, nil)
		} else {
			p.ports = append(p.ports, portListOf(g.Ports))
		}
	}
	p.wide = p.ranged()
	if p.ns, err = openNS(); err != nil {
		return p, err
	}
	p.bound.now.Store(readBound(readSockets()))
	if err := p.setupSink(); err != nil {
		return p, err
	}
	for i, g := range c.Guests {
		t := TapConfig{Name: TapName(c.Link, i), MAC: GatewayMAC, MTU: p.mtu, Workers: c.Workers}
		if p.c.Pod.IsValid() {
			t.Addr = g.Gateway
		}
		if p.c.Pod6.IsValid() {
			t.Addr6 = g.Gateway6
		}
		tap, err := OpenTap(t)
		if errors.Is(err, errNoIPv6) && p.c.Pod.IsValid() {
			p.Warnings = append(p.Warnings, fmt.Sprintf("guests get no IPv6: %v", err))
			p.c.Pod6, t.Addr6 = netip.Addr{}, netip.Prefix{}
			tap, err = OpenTap(t)
		}
		if err != nil {
			return p, err
		}
		p.taps = append(p.taps, tap)
	}
	return p, p.install()
}

// complete fills in defaults and refuses what cannot be.
func (c *TakeoverConfig) complete(l netlink.Link) error {
	if c.NAT == (PortRange{}) {
		c.NAT = DefaultNAT
	}
	if c.NAT.Lo == 0 || c.NAT.Lo > c.NAT.Hi {
		return fmt.Errorf("port range %d-%d is empty", c.NAT.Lo, c.NAT.Hi)
	}
	if err := checkGuests(c.Guests); err != nil {
		return err
	}
	for _, a := range []struct {
		addr   *netip.Addr
		family int
	}{{&c.Pod, netlink.FAMILY_V4}, {&c.Pod6, netlink.FAMILY_V6}} {
		if a.addr.IsValid() {
			continue
		}
		var err error
		if *a.addr, err = firstAddr(l, a.family); err != nil {
			return err
		}
	}
	if !slices.ContainsFunc(c.Guests, func(g Guest) bool { return g.Addr6.IsValid() }) {
		c.Pod6 = netip.Addr{}
	}
	if !c.Pod.IsValid() && !c.Pod6.IsValid() {
		return fmt.Errorf("link %s: %w", c.Link, ErrNoAddress)
	}
	return nil
}

// firstAddr is the first address of a link that others may know, the zero value
// if it has none. One that is about to go is taken only if there is no other.
func firstAddr(l netlink.Link, family int) (last netip.Addr, err error) {
	addrs, err := netlink.AddrList(l, family)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("addresses: %w", err)
	}
	for _, a := range addrs {
		ip, ok := netip.AddrFromSlice(a.IP)
		switch {
		case !ok || !ip.IsGlobalUnicast() || family == netlink.FAMILY_V6 && a.Flags&(unix.IFA_F_TEMPORARY|unix.IFA_F_DADFAILED) != 0:
		case a.Flags&unix.IFA_F_DEPRECATED == 0:
			return ip.Unmap(), nil
		case !last.IsValid():
			last = ip.Unmap()
		}
	}
	return last, nil
}

func checkGuests(guests []Guest) error {
	if len(guests) == 0 {
		return errors.New("no guest")
	}
	all := 0
	for i, g := range guests {
		if !g.Addr.Is4() || !g.Gateway.Addr().Is4() || !g.Gateway.Contains(g.Addr) || g.Gateway.Addr() == g.Addr {
			return fmt.Errorf("guest %s and gateway %s are not two IPv4 addresses of one prefix", g.Addr, g.Gateway)
		}
		if g.Addr6.IsValid() && (!g.Addr6.Is6() || !g.Gateway6.Contains(g.Addr6) || g.Gateway6.Addr() == g.Addr6) {
			return fmt.Errorf("guest %s and gateway %s are not two IPv6 addresses of one prefix", g.Addr6, g.Gateway6)
		}
		for _, other := range guests[:i] {
			if g.Addr6.IsValid() && other.Gateway6.Overlaps(g.Gateway6) {
				return fmt.Errorf("two guests are in %s and %s, which overlap", other.Gateway6.Masked(), g.Gateway6.Masked())
			}
			if other.Gateway.Overlaps(g.Gateway) {
				return fmt.Errorf("two guests are in %s and %s, which overlap", other.Gateway.Masked(), g.Gateway.Masked())
			}
		}
		if err := checkPorts(g.Ports); err != nil {
			return err
		}
		for _, other := range guests[:i] {
			if port, ok := portListOf(g.Ports).shared(portListOf(other.Ports)); ok {
				return fmt.Errorf("two guests have %s", port)
			}
		}
		if len(g.Ports) == 0 {
			all++
		}
	}
	if all > 1 {
		return errors.New("two guests have everything")
	}
	return nil
}

func (p *Pod) setupSink() error {
	if err := attachTapFilter(p.sink, dropAll); err != nil {
		return err
	}
	l, err := netlink.LinkByName(p.Sink())
	if err != nil {
		return fmt.Errorf("sink: %w", err)
	}
	p.index = l.Attrs().Index
	if err := netlink.LinkSetARPOff(l); err != nil {
		return fmt.Errorf("sink: %w", err)
	}
	if err := quiet(l, p.mtu, false); err != nil {
		return fmt.Errorf("sink: %w", err)
	}
	return nil
}

// install makes the tables and reserves the ports.
func (p *Pod) install() error {
	if err := p.makeTables(); err != nil {
		// What an older version left may be of another shape.
		if cerr := cleanup(p.c.Link); cerr != nil {
			return errors.Join(err, cerr)
		}
		if err := p.makeTables(); err != nil {
			return err
		}
	}
	if err := p.reserve(); err != nil {
		return err
	}
	if err := p.setEgress(); err != nil {
		return err
	}
	socks := readSockets()
	if p.c.Pod.IsValid() {
		if err := p.seed(socks); err != nil {
			return err
		}
	}
	if p.c.Pod6.IsValid() {
		if err := p.seed6(socks); err != nil {
			return err
		}
	}
	return p.setRules()
}

// Sink is the name of the link on which the guest's frames arrive, for
// Config.Sink.
func (p *Pod) Sink() string { return sinkName(p.c.Link) }

// Tap is the port from the i-th guest to the pod's own processes.
func (p *Pod) Tap(i int) *Tap { return p.taps[i] }

// Addr is the pod's address, which the guest shares; not valid if it has none of
// IPv4.
func (p *Pod) Addr() netip.Addr { return p.c.Pod }

// Addr6 is the pod's IPv6 address, see Addr.
func (p *Pod) Addr6() netip.Addr { return p.c.Pod6 }

// NAT is the range of external ports that the pod's kernel keeps out of.
func (p *Pod) NAT() PortRange { return p.c.NAT }

// KernelRange holds the ports that the pod's kernel chooses from by itself. It
// is {1, 0} if there are none besides NAT's.
func (p *Pod) KernelRange() PortRange { return p.kernel }

// MTU is that of the pod's interface, in bytes.
func (p *Pod) MTU() int { return p.mtu }

// Ports are the published ports of the i-th guest in order; nil means
// everything.
func (p *Pod) Ports(i int) []Port {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ports[i] == nil {
		return nil
	}
	return slices.Clone(p.ports[i])
}

// AddPort publishes a single port of the i-th guest, which no other guest has. For
// one that has everything it does nothing.
func (p *Pod) AddPort(i int, port Port) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ports[i] == nil {
		return nil
	}
	if _, there := p.ports[i].find(port); there {
		return nil
	}
	return p.publish(i, append(slices.Clone(p.ports[i]), port))
}

// RemovePort takes back a single published port of the i-th guest, which may be
// one of a range. Without the last one nothing of it is published.
func (p *Pod) RemovePort(i int, port Port) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, there := p.ports[i].find(port); !there {
		return fmt.Errorf("%s is not published", port)
	}
	return p.publish(i, p.ports[i].without(port))
}

// publish changes the list of a guest's published ports.
func (p *Pod) publish(i int, ports []Port) error {
	if err := checkPorts(ports); err != nil {
		return err
	}
	old := p.ports[i]
	p.ports[i] = portListOf(ports)
	if err := inNS(p.ns, p.fillPorts); err != nil {
		p.ports[i] = old
		return fmt.Errorf("publish ports: %w", err)
	}
	return nil
}

// all says whether everything is published.
func (p *Pod) all() bool {
	return slices.ContainsFunc(p.ports, func(l portList) bool { return l == nil })
}

// all6 is all, of the guests that have IPv6.
func (p *Pod) all6() bool {
	for i, l := range p.ports {
		if l == nil && p.c.Guests[i].Addr6.IsValid() {
			return true
		}
	}
	return false
}

// Restore puts back everything that Takeover changed. No worker may use the
// tap any more.
func (p *Pod) Restore() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	var errs []error
	if p.ns >= 0 {
		errs = append(errs, inNS(p.ns, func() error { return cleanup(p.c.Link) }), unix.Close(p.ns))
		p.ns = -1
	}
	for _, t := range p.taps {
		errs = append(errs, t.Close())
	}
	p.taps = nil
	if p.sink >= 0 {
		errs = append(errs, unix.Close(p.sink))
		p.sink = -1
	}
	return errors.Join(errs...)
}

// Cleanup removes from the current namespace what a crashed run left for a
// link. It returns ErrInUse if the run is alive.
func Cleanup(link string) error {
	if _, err := netlink.LinkByName(sinkName(link)); err == nil {
		return fmt.Errorf("clean up %s: %w", link, ErrInUse)
	}
	if err := cleanup(link); err != nil {
		return fmt.Errorf("clean up %s: %w", link, err)
	}
	return nil
}

// CleanupAll is Cleanup for every link of the current namespace that a crashed
// run of a takeover left something for. It returns their names; those of runs
// that are alive are passed over.
func CleanupAll() (links []string, err error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("nftables: %w", err)
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyNetdev)
	switch {
	case errors.Is(err, unix.EPERM):
		return nil, privilege(err, "CAP_NET_ADMIN")
	case err != nil:
		return nil, nil // a kernel without them holds none of ours
	}
	var errs []error
	for _, t := range tables {
		link, ours := strings.CutPrefix(t.Name, tableName(""))
		if !ours || strings.HasPrefix(t.Name, silencePrefix) {
			continue
		}
		switch err := Cleanup(link); {
		case err == nil:
			links = append(links, link)
		case !errors.Is(err, ErrInUse):
			errs = append(errs, err)
		}
	}
	return links, errors.Join(errs...)
}

// TapName is the name of the i-th guest's tap beside a link, and sinkName that
// of the sink.
func TapName(link string, i int) string {
	if i == 0 {
		return beside("sw-", link)
	}
	return beside(fmt.Sprintf("sw%d-", i), link)
}

func sinkName(link string) string { return beside("swin-", link) }

func beside(prefix, link string) string {
	if n := prefix + link; len(n) < unix.IFNAMSIZ {
		return n
	}
	h := fnv.New32a()
	h.Write([]byte(link))
	return fmt.Sprintf("%s%08x", prefix, h.Sum32())
}
