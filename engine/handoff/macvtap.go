package handoff

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrPrivilege is why something was refused that a capability allows.
var ErrPrivilege = errors.New("not allowed")

// Modes are those of a macvtap. The first three are what KubeVirt's device
// plugin has; in passthru one guest has the lower device for itself.
var Modes = []string{"bridge", "private", "vepa", "passthru"}

var modeOf = map[string]netlink.MacvlanMode{
	"bridge": netlink.MACVLAN_MODE_BRIDGE, "private": netlink.MACVLAN_MODE_PRIVATE,
	"vepa": netlink.MACVLAN_MODE_VEPA, "passthru": netlink.MACVLAN_MODE_PASSTHRU,
}

// MacvtapConfig says which macvtap a guest gets. Zero values are sensible but
// for Name.
type MacvtapConfig struct {
	// Adopt are names that the link of a CNI may have. The first that is there
	// is taken; if none is, one is made on Lower.
	Adopt []string

	Name     string // of a link that is made
	Lower    string // the lower device, empty: only adopt
	Mode     string // one of Modes, bridge if empty
	Pool     string // what Capacity is of, for messages
	Capacity int    // how many macvtaps there may be on Lower; 0: no limit
	// Exposed requires that Lower is a physical link or a bond, or with Veth one
	// end of a pair, as the device plugin does where nobody chose links.
	Exposed, Veth bool

	// MAC is the guest's. Without one an adopted link keeps its own, one in mode
	// passthru has the lower device's, and any other gets DefaultMAC.
	MAC, DefaultMAC net.HardwareAddr
	MTU             int // in bytes; 0: the link's own, or the lower device's
	Promisc         bool
	Queues          int // how many descriptors there are, 1 if 0
	// VhostNet is the device that takes the queues into the kernel, /dev/vhost-net
	// if empty; used if it can be opened.
	VhostNet string
}

// Macvtap is a macvtap that is ready for a guest. It lives in the namespace
// that OpenMacvtap was called in; so must the other methods be, but Status.
type Macvtap struct {
	c      MacvtapConfig
	link   netlink.Link
	before *linkState // of an adopted link, nil if we made it
	node   node
	vhost  bool
	kept   bool
	asIs   bool // we may not change it, and need not
	lock   *net.UnixListener

	mu     sync.Mutex // guards status
	status Status
}

// OpenMacvtap adopts or makes a macvtap in the current namespace and sets its
// addresses; it does not speak yet. It needs CAP_NET_ADMIN. What a run before
// this one left when it crashed is taken up. An error says what is missing, and
// then nothing is changed.
func OpenMacvtap(c MacvtapConfig) (m *Macvtap, err error) {
	if c.Mode == "" {
		c.Mode = "bridge"
	}
	if !slices.Contains(Modes, c.Mode) {
		return nil, fmt.Errorf("macvtap mode %q: want one of %s", c.Mode, strings.Join(Modes, ", "))
	}
	c.Queues = max(c.Queues, 1)
	if c.VhostNet == "" {
		c.VhostNet = "/dev/vhost-net"
	}
	m = &Macvtap{c: c}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
			m = nil
		}
	}()
	link, err := m.adoptable()
	if err != nil {
		return m, err
	}
	name := c.Name
	if link != nil {
		name = link.Attrs().Name
	}
	// The lock comes before the first change, and it dies with the process.
	m.lock, err = net.ListenUnix("unix", &net.UnixAddr{Name: "@sidewire/handoff/" + name, Net: "unix"})
	if errors.Is(err, unix.EADDRINUSE) {
		return m, fmt.Errorf("macvtap %s: another sidewire has it", name)
	} else if err != nil {
		return m, fmt.Errorf("macvtap %s: lock: %w", name, err)
	}
	if link != nil {
		err = m.adopt(link)
	} else {
		err = m.make()
	}
	if err != nil {
		return m, err
	}
	if m.node, err = findNode(m.link); err != nil {
		return m, err
	}
	if f, err := os.OpenFile(c.VhostNet, os.O_RDWR, 0); err == nil {
		m.vhost = f.Close() == nil
	}
	return m, m.refresh()
}

// FindMacvtap says what OpenMacvtap would give, as far as it can be known before,
// and changes nothing. Its status has no Node if the link is not there yet; of the methods
// only Netdev and Status may be called.
func FindMacvtap(c MacvtapConfig) (*Macvtap, error) {
	c.Queues = max(c.Queues, 1)
	m := &Macvtap{c: c}
	l, err := m.adoptable()
	if err != nil {
		return nil, err
	}
	if l == nil {
		if own, err := netlink.LinkByName(c.Name); err == nil && own.Type() == "macvtap" {
			l = own
		}
	}
	mac := c.MAC
	switch {
	case l != nil:
		m.link = l
		if m.node, err = findNode(l); err != nil {
			return nil, err
		}
		if err := m.refresh(); err != nil {
			return nil, err
		}
		if mac == nil {
			mac = m.link.Attrs().HardwareAddr
		}
	case mac == nil && c.Mode == "passthru":
		if lower, err := netlink.LinkByName(c.Lower); err == nil {
			mac = lower.Attrs().HardwareAddr
		}
	case mac == nil:
		mac = c.DefaultMAC
	}
	m.status.Kind, m.status.Link, m.status.MAC = "macvtap", orElse(m.status.Link, c.Name), mac.String()
	return m, nil
}

// adoptable is the link that a CNI left, nil if there is none.
func (m *Macvtap) adoptable() (netlink.Link, error) {
	for _, name := range m.c.Adopt {
		l, err := netlink.LinkByName(name)
		switch {
		case errors.As(err, new(netlink.LinkNotFoundError)):
			continue
		case err != nil:
			return nil, fmt.Errorf("link %s: %w", name, err)
		case l.Type() != "macvtap":
			return nil, fmt.Errorf("link %s stands where the guest's macvtap should, but it is of kind %s; remove it, or serve it with bridge: {}", name, l.Type())
		}
		return l, nil
	}
	return nil, nil
}

// adopt takes a link that was there, and remembers on the link itself how it
// was, so that a run after a crash can put it back.
func (m *Macvtap) adopt(l netlink.Link) error {
	before := stateOf(l)
	if saved, ok := parseState(l.Attrs().Alias); ok {
		before, m.kept = saved, true
	}
	if err := netlink.LinkSetAlias(l, before.String()); errors.Is(err, os.ErrPermission) && m.fits(l) {
		m.link, m.before, m.asIs = l, &before, true
		return nil
	} else if err != nil {
		return fmt.Errorf("macvtap %s: %w", l.Attrs().Name, privilege(err, "CAP_NET_ADMIN"))
	}
	m.link, m.before = l, &before
	mac := m.c.MAC
	if mac == nil {
		mac = l.Attrs().HardwareAddr
	}
	return m.configure(mac)
}

// fits says whether an adopted link can stay as it is.
func (m *Macvtap) fits(l netlink.Link) bool {
	a := l.Attrs()
	return a.RawFlags&unix.IFF_UP != 0 && (m.c.MAC == nil || bytes.Equal(m.c.MAC, a.HardwareAddr)) && (m.c.MTU == 0 || m.c.MTU == a.MTU)
}

// make makes the link. One of its name is our own, left by a crash: a guest may
// still be using it, so it stays if it is what we want.
func (m *Macvtap) make() error {
	c := &m.c
	if c.Lower == "" {
		return fmt.Errorf("no macvtap %s in the namespace, and no link to make one on: the definition's resource name gives none", strings.Join(c.Adopt, " or "))
	}
	lower, err := m.lower()
	if err != nil {
		return err
	}
	mac := c.MAC
	if mac == nil {
		mac = c.DefaultMAC
		if c.Mode == "passthru" {
			mac = lower.Attrs().HardwareAddr
		}
	}
	if l, err := netlink.LinkByName(c.Name); err == nil {
		if old, ok := l.(*netlink.Macvtap); ok && old.ParentIndex == lower.Attrs().Index && old.Mode == modeOf[c.Mode] {
			m.link, m.kept = l, true
			return m.configure(mac)
		}
		if l.Type() != "macvtap" {
			return fmt.Errorf("link %s, whose name is wanted for a macvtap, is of kind %s; remove it", c.Name, l.Type())
		}
		if err := netlink.LinkDel(l); err != nil {
			return fmt.Errorf("macvtap %s of an earlier run: %w", c.Name, privilege(err, "CAP_NET_ADMIN"))
		}
	}
	if err := m.room(lower); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.ParentIndex, attrs.HardwareAddr, attrs.MTU = c.Name, lower.Attrs().Index, mac, c.MTU
	// Its own address is what a lower device in passthru has; to give it again changes nothing.
	err = netlink.LinkAdd(&netlink.Macvtap{Macvlan: netlink.Macvlan{LinkAttrs: attrs, Mode: modeOf[c.Mode]}})
	if err != nil {
		return m.explain(lower, mac, err)
	}
	if m.link, err = netlink.LinkByName(c.Name); err != nil {
		return fmt.Errorf("macvtap %s: %w", c.Name, err)
	}
	return m.configure(mac)
}

// lower finds the lower device.
func (m *Macvtap) lower() (netlink.Link, error) {
	c := &m.c
	l, err := netlink.LinkByName(c.Lower)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil, fmt.Errorf("no link %s to make a macvtap on; links that are exposed: %s", c.Lower, exposed(c.Veth))
	} else if err != nil {
		return nil, fmt.Errorf("link %s: %w", c.Lower, err)
	}
	if c.Exposed && !isExposed(l, c.Veth) {
		return nil, fmt.Errorf("link %s is of kind %s, and without a choice in DP_MACVTAP_CONF only physical links and bonds are exposed: %s; name it there as lowerDevice",
			c.Lower, l.Type(), exposed(c.Veth))
	}
	return l, nil
}

// isExposed says whether the device plugin exposes a link that nobody chose.
func isExposed(l netlink.Link, veth bool) bool {
	switch l.Type() {
	case "device":
		return l.Attrs().Flags&net.FlagLoopback == 0
	case "veth":
		return veth
	}
	return l.Type() == "bond"
}

// exposed lists those links.
func exposed(veth bool) string {
	links, err := netlink.LinkList()
	var names []string
	for _, l := range links {
		if isExposed(l, veth) {
			names = append(names, l.Attrs().Name)
		}
	}
	if err != nil || len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// room says whether the pool has one more. Macvtaps that were moved to other
// namespaces are not seen.
func (m *Macvtap) room(lower netlink.Link) error {
	if m.c.Capacity == 0 {
		return nil
	}
	links, err := netlink.LinkList()
	if err != nil {
		return fmt.Errorf("links: %w", err)
	}
	n := 0
	for _, l := range links {
		if l.Type() == "macvtap" && l.Attrs().ParentIndex == lower.Attrs().Index {
			n++
		}
	}
	if n >= m.c.Capacity {
		return fmt.Errorf("macvtap pool %s is used up: there are %d macvtaps on %s and its capacity is %d; raise capacity in DP_MACVTAP_CONF",
			m.c.Pool, n, m.c.Lower, m.c.Capacity)
	}
	return nil
}

// explain says why a macvtap could not be made.
func (m *Macvtap) explain(lower netlink.Link, mac net.HardwareAddr, err error) error {
	c, mtu := &m.c, lower.Attrs().MTU
	on := fmt.Sprintf("make a macvtap on %s", c.Lower)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("%s: the kernel has no macvtap; load it with: modprobe macvtap (%w)", on, err)
	case c.MTU > mtu:
		return fmt.Errorf("%s: MTU %d is more than the %d of %s; lower the definition's mtu, or raise it with: ip link set %s mtu %d (%w)", on, c.MTU, mtu, c.Lower, c.Lower, c.MTU, err)
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("%s: something on %s has the address %s already (%w)", on, c.Lower, mac, err)
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%s: it is in use: a port of a bridge or bond, or it has a macvlan in mode passthru or, for this one's mode %s, any other (%w)", on, c.Mode, err)
	}
	return fmt.Errorf("%s: %w", on, privilege(err, "CAP_NET_ADMIN"))
}

// configure sets what the guest needs of the link.
func (m *Macvtap) configure(mac net.HardwareAddr) error {
	l, a := m.link, m.link.Attrs()
	say := func(what string, err error) error {
		return fmt.Errorf("macvtap %s: %s: %w", a.Name, what, privilege(err, "CAP_NET_ADMIN"))
	}
	if len(mac) > 0 && !bytes.Equal(mac, a.HardwareAddr) {
		if err := netlink.LinkSetHardwareAddr(l, mac); errors.Is(err, unix.EADDRINUSE) {
			return say("something on its lower device has the address "+mac.String()+" already", err)
		} else if err != nil {
			return say("set the address "+mac.String(), err)
		}
	}
	if m.c.MTU != 0 && m.c.MTU != a.MTU {
		if err := netlink.LinkSetMTU(l, m.c.MTU); err != nil {
			return say(fmt.Sprintf("set the MTU %d, which must not be more than that of its lower device", m.c.MTU), err)
		}
	}
	// The kernel must not speak for the guest: an address of its own on this link
	// would be the guest's too, by its MAC. Kernels without IPv6 have none.
	if genMode(a.Name) != genUnknown {
		if err := netlink.LinkSetIP6AddrGenMode(l, genNone); err != nil {
			return say("keep the kernel from having an address on it", err)
		}
	}
	// The link's filter would keep neighbour discovery from the guest, whose own
	// wishes do not come here.
	if err := netlink.LinkSetAllmulticastOn(l); err != nil {
		return say("let multicast pass", err)
	}
	if m.c.Promisc {
		if err := netlink.SetPromiscOn(l); err != nil {
			return say("let all frames pass", err)
		}
	}
	return nil
}

// Up implements [Device].
func (m *Macvtap) Up() error {
	if m.asIs {
		return nil
	}
	if err := netlink.LinkSetUp(m.link); errors.Is(err, unix.ENETDOWN) {
		return fmt.Errorf("macvtap %s: its lower device is down; set it up with: ip link set %s up (%w)", m.link.Attrs().Name, orElse(m.Status().Lower, "LINK"), err)
	} else if err != nil {
		return fmt.Errorf("macvtap %s: set it up: %w", m.link.Attrs().Name, privilege(err, "CAP_NET_ADMIN"))
	}
	return nil
}

// refresh looks at the link for the status.
func (m *Macvtap) refresh() error {
	l, err := netlink.LinkByIndex(m.link.Attrs().Index)
	if err != nil {
		return fmt.Errorf("macvtap %s: %w", m.link.Attrs().Name, err)
	}
	m.link = l
	a := l.Attrs()
	st := Status{
		Kind: "macvtap", MAC: a.HardwareAddr.String(), MTU: a.MTU, Queues: m.c.Queues, Adopted: m.before != nil,
		Kept: m.kept, Link: a.Name, Node: "/dev/" + m.node.name,
	}
	if m.asIs && a.RawFlags&(unix.IFF_ALLMULTI|unix.IFF_PROMISC) == 0 {
		st.Limits = "no multicast reaches the guest, IPv6 neighbours among it, for without CAP_NET_ADMIN the link's filter stays"
	}
	if !m.node.inDev() {
		st.Device = m.node.number()
	}
	if !st.Adopted {
		st.Lower, st.Capacity = m.c.Lower, m.c.Capacity
	} else if lower, err := netlink.LinkByIndex(a.ParentIndex); err == nil && a.NetNsID < 0 {
		st.Lower = lower.Attrs().Name
	}
	if t, ok := l.(*netlink.Macvtap); ok {
		for name, mode := range modeOf {
			if mode == t.Mode {
				st.Mode = name
			}
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.status = st
	return nil
}

// Status implements [Device].
func (m *Macvtap) Status() Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.status
}

// Close implements [Device]: a link that we made goes, one that we adopted is
// as it was.
func (m *Macvtap) Close() (err error) {
	switch {
	case m.link == nil, m.asIs:
	case m.before != nil:
		err = m.before.restore(m.link)
	default:
		if err = netlink.LinkDel(m.link); errors.Is(err, unix.ENODEV) {
			err = nil // its lower device has gone, and it with that
		}
	}
	if err != nil {
		err = fmt.Errorf("give macvtap %s back: %w", m.link.Attrs().Name, err)
	}
	m.link = nil
	if m.lock != nil {
		m.lock.Close()
		m.lock = nil
	}
	return err
}

func privilege(err error, capability string) error {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%w: %s is needed (%w)", ErrPrivilege, capability, err)
	}
	return err
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}
