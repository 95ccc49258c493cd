package uplink

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Delegation, the theory of it.
//
// Goal: a guest takes a link's place on its network, with the link's address
// and, unless it has one of its own, the link's hardware address, as if it were
// plugged in there. The kernel says nothing on the link any more: no ARP, no
// answer to a guest that probes for its own address, no RST, no ICMP, no IPv6.
// Everything is put back in the end, also if we are killed between any two
// steps.
//
// Silence has two layers. In the first the kernel has nothing to say: the link
// has no address, no IPv6, no ARP, and a hardware address that nobody knows. The
// second is an nftables table that drops all that comes in by the link and all
// that goes out without [Mark]; packet sockets get frames before it and send
// with Mark. It holds even when somebody gives the link an address again, and
// where the link must keep its hardware address, or its addresses. Without nftables the first is
// enough as long as nobody meddles.
//
// What there was is written down first, and the file is there until all is as
// before: each step may find itself done already, in both directions. A run that
// finds the file of its own guest goes on from it without a gap; any other puts
// the link back first. Routes, addresses and neighbours are kept as the kernel's
// own messages, so that nothing is lost which we do not know.

// DelegateConfig says which link is delegated to whom.
type DelegateConfig struct {
	Link     string
	StateDir string // where what there was is written down
	// Owner names the guest's interface: what a crashed run left for the same
	// one is taken up, else put back.
	Owner string
	// Guest is the guest's hardware address, zero for the link's own. In that
	// case the link gets another one, unless KeepMAC is set.
	Guest   frame.MAC
	KeepMAC bool
	// KeepAddrs leaves the link its addresses, because its driver gives it what
	// is for these only. It takes nftables.
	KeepAddrs bool
}

// Delegation is a link whose place a guest has taken. Restore may be called
// from any namespace.
type Delegation struct {
	// Warnings are what could not be done, with what that means.
	Warnings []string
	// Resumed says that a crashed run's delegation was taken up.
	Resumed bool

	c     DelegateConfig
	ns    int // descriptor of the namespace
	lock  int // descriptor
	saved *Saved
	file  stateFile
	quiet Silence
}

// Silence is what keeps the kernel from speaking on a link.
type Silence string

// Kinds of silence, the surest first.
const (
	SilenceBoth    Silence = "nftables"                     // in both directions
	SilenceIngress Silence = "nftables, incoming only"      // Linux before 5.16
	SilenceAddress Silence = "absence of addresses and ARP" // without nftables
)

// ErrState means that the state directory, or a file in it, cannot be used.
var ErrState = errors.New("state directory")

// silenceLink is silence, for tests.
var silenceLink = silence

// afterStep is called between any two steps, for tests.
var afterStep = func(string) {}

// Delegate lets a guest take the place of a link of the current network
// namespace. It needs CAP_NET_ADMIN.
func Delegate(c DelegateConfig) (d *Delegation, err error) {
	d = &Delegation{c: c, ns: -1, lock: -1}
	defer func() {
		if err != nil {
			err = fmt.Errorf("delegate %s: %w", c.Link, errors.Join(err, d.Restore()))
			d = nil
		}
	}()
	l, err := link(c.Link)
	if err != nil {
		return d, err
	}
	if _, err := netlink.LinkByName(sinkName(c.Link)); err == nil {
		return d, ErrInUse
	}
	if d.lock, err = lockLink(l.Attrs().Index); err != nil {
		return d, err
	}
	if d.ns, err = openNS(); err != nil {
		return d, err
	}
	if d.file, err = stateOf(c.StateDir, l); err != nil {
		return d, err
	}
	if err := mayChange(l); err != nil {
		return d, err
	}
	if err := d.remember(l); err != nil {
		return d, err
	}
	return d, d.take()
}

// mayChange tells whether links may be changed here at all, before anything is.
func mayChange(l netlink.Link) error {
	set := netlink.LinkSetARPOn
	if l.Attrs().RawFlags&unix.IFF_NOARP != 0 {
		set = netlink.LinkSetARPOff
	}
	return privilege(set(l), "CAP_NET_ADMIN") // as it is
}

// remember finds what a crashed run wrote down of the same guest, or writes down
// what there is.
func (d *Delegation) remember(l netlink.Link) error {
	old, err := d.file.load()
	if err != nil {
		return err
	}
	if old != nil {
		same, err := d.continues(old)
		if err != nil {
			return err
		}
		if same {
			d.saved, d.Resumed = old, true
			return d.file.store(old) // it may have been lost
		}
		if err := d.file.putBack(old); err != nil {
			return err
		}
		if l, err = link(d.c.Link); err != nil {
			return err
		}
	}
	s, err := takeSnapshot(l)
	if err != nil {
		return err
	}
	s.Owner = d.c.Owner
	if d.wantsStandIn(s) {
		s.StandIn = standIn(s.MAC)
	}
	if err := d.file.store(s); err != nil {
		return err
	}
	d.saved = s
	afterStep("state written")
	return nil
}

// wantsStandIn says whether the link needs another hardware address.
func (d *Delegation) wantsStandIn(s *Saved) bool {
	return !d.c.KeepMAC && (d.c.Guest == s.MAC || d.c.Guest == frame.MAC{})
}

// continues says whether what was written down is of this guest, and nobody has
// given the link other addresses since.
func (d *Delegation) continues(s *Saved) (bool, error) {
	if s.Owner != d.c.Owner || d.wantsStandIn(s) != (s.StandIn != frame.MAC{}) {
		return false, nil
	}
	now, err := dumpAddrs(s.Index, unix.AF_INET)
	if err != nil {
		return false, err
	}
	foreign := func(p netip.Prefix) bool { return !slices.Contains(s.Addrs, p) }
	return !slices.ContainsFunc(prefixes(now), foreign), nil
}

// take brings the link into the state that the guest needs.
func (d *Delegation) take() error {
	s := d.saved
	l, err := netlink.LinkByIndex(s.Index)
	if err != nil {
		return fmt.Errorf("link: %w", err)
	}
	name := l.Attrs().Name
	d.quiet, err = silenceLink(name, s)
	switch {
	case err != nil && d.c.KeepAddrs:
		return fmt.Errorf("a link of this kind keeps its addresses, so that it takes rules to silence the kernel: %w", err)
	case err != nil:
		d.Warnings = append(d.Warnings, fmt.Sprintf(
			"the kernel is silent on %s for want of addresses alone, and speaks again if somebody gives it one: %v", name, err))
	}
	afterStep("silenced")
	if err := netlink.LinkSetARPOff(l); err != nil {
		return fmt.Errorf("ARP off: %w", privilege(err, "CAP_NET_ADMIN"))
	}
	afterStep("ARP off")
	if !d.c.KeepAddrs {
		if err := d.takeAddrs(l); err != nil {
			return err
		}
	}
	if s.StandIn == (frame.MAC{}) {
		return nil
	}
	if err := setMAC(l, s.StandIn); err != nil {
		if d.quiet == SilenceAddress {
			return fmt.Errorf("hardware address %s: %w", s.StandIn, err)
		}
		d.Warnings = append(d.Warnings, fmt.Sprintf("link %s keeps its hardware address, which is the guest's too: %v", name, err))
	}
	afterStep("hardware address set")
	return nil
}

// takeAddrs takes all addresses away.
func (d *Delegation) takeAddrs(l netlink.Link) error {
	if err := withoutIPv6(l); err != nil {
		return fmt.Errorf("IPv6 off: %w", err)
	}
	afterStep("IPv6 off")
	return deleteAddrs(d.saved.Index, unix.AF_INET)
}

// Saved is what the link was. It must not be changed.
func (d *Delegation) Saved() *Saved { return d.saved }

// Silence is what keeps the kernel quiet.
func (d *Delegation) Silence() Silence { return d.quiet }

// StateFile is the path of what was written down.
func (d *Delegation) StateFile() string { return d.file.path }

// Restore puts the link back as it was. What cannot be put back stays written
// down, for another try.
func (d *Delegation) Restore() error {
	var errs []error
	if d.saved != nil {
		s := d.saved
		errs = append(errs, inNS(d.ns, func() error { return d.file.putBack(s) }))
		d.saved = nil
	}
	for _, fd := range []*int{&d.ns, &d.lock} {
		if *fd >= 0 {
			errs = append(errs, unix.Close(*fd))
			*fd = -1
		}
	}
	return errors.Join(errs...)
}

// RestoreSaved puts back what crashed runs have left in the current namespace,
// but for what keep, if it is not nil, wants as it is. It returns what it has
// put back. What a living run serves stays; that is an ErrInUse.
func RestoreSaved(dir string, keep func(*Saved) bool) (done []*Saved, err error) {
	files, err := savedHere(dir)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, f := range files {
		s, err := f.load()
		if err != nil || s == nil || keep != nil && keep(s) {
			errs = append(errs, err)
			continue
		}
		lock, err := lockLink(s.Index)
		if err != nil {
			errs = append(errs, fmt.Errorf("put back %s, which %s has: %w", s.Link, s.Owner, err))
			continue
		}
		// Whoever had the lock may have put it back, or changed it, meanwhile.
		if s, err = f.load(); err == nil && s != nil {
			if err = f.putBack(s); err == nil {
				done = append(done, s)
			}
		}
		errs = append(errs, err, unix.Close(lock))
	}
	return done, errors.Join(errs...)
}

// lockLink makes a link ours as long as the descriptor is open. The name belongs
// to the namespace, and nothing of it stays when we are killed.
func lockLink(index int) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("lock: %w", err)
	}
	err = unix.Bind(fd, &unix.SockaddrUnix{Name: fmt.Sprintf("@sidewire/link/%d", index)})
	if err == nil {
		return fd, nil
	}
	unix.Close(fd)
	if errors.Is(err, unix.EADDRINUSE) {
		return -1, ErrInUse
	}
	return -1, fmt.Errorf("lock: %w", err)
}

// LinkView is how a link is by itself, also while a guest has its place.
type LinkView struct {
	Saved
	Kind      string // of the link, as the kernel names it: veth, macvlan, ...
	Delegated bool   // it is written down as somebody's
}

// ViewLink looks at a link of the current namespace, and at what is written down
// of it.
func ViewLink(dir, name string) (*LinkView, error) {
	l, err := link(name)
	if err != nil {
		return nil, err
	}
	f, err := stateOf(dir, l)
	if err != nil {
		return nil, err
	}
	s, err := f.load()
	if err != nil {
		return nil, err
	}
	if s != nil {
		return &LinkView{*s, l.Type(), true}, nil
	}
	if s, err = takeSnapshot(l); err != nil {
		return nil, err
	}
	return &LinkView{*s, l.Type(), false}, nil
}

// HasAddress says whether the link has an address that others can reach.
func (s *Saved) HasAddress() bool {
	return slices.ContainsFunc(slices.Concat(s.Addrs, s.Addrs6), func(p netip.Prefix) bool { return p.Addr().IsGlobalUnicast() })
}

// Address is the link's first IPv4 address that others can reach, not valid if
// there is none.
func (s *Saved) Address() netip.Prefix {
	for _, p := range s.Addrs {
		if p.Addr().IsGlobalUnicast() {
			return p
		}
	}
	return netip.Prefix{}
}
