package enginetest

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// NetNS is a network namespace of our own making. Its methods are safe for
// concurrent use.
type NetNS struct {
	// Name is the name that `ip netns` knows it by, if Path lies in /run/netns.
	Name string
	// Path can be given to setns, nsenter --net=PATH and sidewire's --netns. It
	// is /proc/PID/fd/N of this process where nothing may be mounted.
	Path string

	file    *os.File
	mounted bool
}

// runNetNS is where `ip netns` looks.
const runNetNS = "/run/netns"

var namespaces atomic.Uint32

// NewNetNS makes a namespace for a test, with its loopback up.
func NewNetNS(t TB) *NetNS {
	t.Helper()
	Need(t, "netns")
	ns, err := CreateNetNS(fmt.Sprintf("sw-test-%d-%d", os.Getpid(), namespaces.Add(1)))
	if err != nil {
		t.Fatalf("namespace: %v", err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// CreateNetNS makes a namespace with its loopback up. The caller closes it.
func CreateNetNS(name string) (*NetNS, error) {
	ns := &NetNS{Name: name}
	made := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends, the namespace stays
		made <- ns.create()
	}()
	if err := <-made; err != nil {
		return nil, fmt.Errorf("create network namespace %s: %w", name, err)
	}
	if err := ns.Up("lo"); err != nil {
		ns.Close()
		return nil, err
	}
	return ns, nil
}

func (ns *NetNS) create() error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return err
	}
	f, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	ns.file = f
	for _, dir := range []string{runNetNS, filepath.Join(os.TempDir(), "sidewire-netns")} {
		if ns.mount(dir) == nil {
			return nil
		}
	}
	ns.Path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())
	return nil
}

// mount gives the namespace of this thread a name in dir.
func (ns *NetNS) mount(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	path := filepath.Join(dir, ns.Name)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	if err := unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, ""); err != nil {
		os.Remove(path)
		return err
	}
	ns.Path, ns.mounted = path, true
	return nil
}

// Close takes the name away. The namespace itself ends with its last process
// and descriptor.
func (ns *NetNS) Close() error {
	if ns.mounted {
		ns.mounted = false
		err := unix.Unmount(ns.Path, unix.MNT_DETACH)
		return errors.Join(err, os.Remove(ns.Path), ns.file.Close())
	}
	return ns.file.Close()
}

// Do runs f on a thread that is in the namespace and waits for it. Goroutines
// that f starts are elsewhere. If f ends its goroutine, as FailNow does, so
// does Do.
func (ns *NetNS) Do(f func() error) (err error) {
	var done sync.WaitGroup
	returned := false
	done.Go(func() {
		err = ns.visit(f)
		returned = true
	})
	done.Wait()
	if !returned {
		runtime.Goexit()
	}
	return err
}

// visit runs f in the namespace, on a goroutine that ends soon.
func (ns *NetNS) visit(f func() error) error {
	runtime.LockOSThread()
	home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(home)
	if err := unix.Setns(int(ns.file.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter %s: %w", ns.Path, err)
	}
	defer func() {
		// In a user namespace the way home may be closed. The thread then stays
		// locked and ends with its goroutine.
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return f()
}

// Command returns a command that will run in the namespace; its process is the
// program itself.
func (ns *NetNS) Command(name string, args ...string) *exec.Cmd {
	if p, err := Program(name); err == nil {
		name = p
	}
	return exec.Command("nsenter", append([]string{"--net=" + ns.Path, "--", name}, args...)...)
}

// Run runs a command in the namespace to its end; the error holds its output.
func (ns *NetNS) Run(name string, args ...string) error {
	out, err := ns.Command(name, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// withLink runs f in the namespace with the link of that name.
func (ns *NetNS) withLink(name string, f func(netlink.Link) error) error {
	return ns.Do(func() error {
		l, err := netlink.LinkByName(name)
		if err == nil {
			err = f(l)
		}
		if err != nil {
			return fmt.Errorf("link %s in %s: %w", name, ns.Name, err)
		}
		return nil
	})
}

// Up sets a link up.
func (ns *NetNS) Up(link string) error { return ns.withLink(link, netlink.LinkSetUp) }

// Down sets a link down.
func (ns *NetNS) Down(link string) error { return ns.withLink(link, netlink.LinkSetDown) }

// SetMTU sets a link's MTU in bytes.
func (ns *NetNS) SetMTU(link string, mtu int) error {
	return ns.withLink(link, func(l netlink.Link) error { return netlink.LinkSetMTU(l, mtu) })
}

// SetMAC sets a link's hardware address.
func (ns *NetNS) SetMAC(link string, mac [6]byte) error {
	return ns.withLink(link, func(l netlink.Link) error {
		return netlink.LinkSetHardwareAddr(l, net.HardwareAddr(mac[:]))
	})
}

// MAC returns a link's hardware address.
func (ns *NetNS) MAC(link string) (mac [6]byte, err error) {
	err = ns.withLink(link, func(l netlink.Link) error {
		copy(mac[:], l.Attrs().HardwareAddr)
		return nil
	})
	return mac, err
}

// Addr adds an address such as 10.0.0.1/24 to a link. An IPv6 address is
// usable at once: there is no duplicate address detection.
func (ns *NetNS) Addr(link, cidr string) error {
	return ns.withLink(link, func(l netlink.Link) error {
		a, err := netlink.ParseAddr(cidr)
		if err != nil {
			return err
		}
		if a.IP.To4() == nil {
			a.Flags |= unix.IFA_F_NODAD
		}
		return netlink.AddrAdd(l, a)
	})
}

// Route adds a route to dst, a prefix or "default", by way of a gateway.
func (ns *NetNS) Route(dst, via string) error {
	return ns.Do(func() error {
		r := &netlink.Route{Gw: net.ParseIP(via)}
		if dst != "default" {
			_, n, err := net.ParseCIDR(dst)
			if err != nil {
				return err
			}
			r.Dst = n
		}
		if err := netlink.RouteAdd(r); err != nil {
			return fmt.Errorf("route %s via %s in %s: %w", dst, via, ns.Name, err)
		}
		return nil
	})
}

// Sysctl writes a network setting, named as in /proc/sys, for instance
// net/ipv4/ip_forward.
func (ns *NetNS) Sysctl(key, value string) error {
	return ns.Do(func() error { return os.WriteFile("/proc/sys/"+key, []byte(value), 0) })
}

// Counter reads one of the counters below a link's /sys/class/net statistics,
// such as rx_packets.
func (ns *NetNS) Counter(link, name string) (n uint64, err error) {
	err = ns.withLink(link, func(l netlink.Link) error {
		s := l.Attrs().Statistics
		if s == nil {
			return errors.New("no statistics")
		}
		v, ok := map[string]uint64{
			"rx_packets": s.RxPackets, "tx_packets": s.TxPackets, "rx_bytes": s.RxBytes, "tx_bytes": s.TxBytes,
			"rx_dropped": s.RxDropped, "tx_dropped": s.TxDropped, "rx_errors": s.RxErrors, "tx_errors": s.TxErrors,
		}[name]
		if !ok {
			return errors.New("no counter " + strconv.Quote(name))
		}
		n = v
		return nil
	})
	return n, err
}

const acceptDAD = "net/ipv6/conf/default/accept_dad"

// withoutDAD lets links to come have their IPv6 addresses at once, so that a
// test finds the namespace as it left it.
func (ns *NetNS) withoutDAD() error {
	if _, err := os.Stat("/proc/sys/" + acceptDAD); err != nil {
		return nil // a kernel without IPv6
	}
	return ns.Sysctl(acceptDAD, "0")
}

// settle waits until a link that was set up has its own IPv6 address, if there is
// IPv6, and the routes that the kernel makes for its addresses a moment later.
func (ns *NetNS) settle(link string) error {
	off := true
	err := ns.Do(func() error {
		b, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + link + "/disable_ipv6")
		off = err != nil || strings.TrimSpace(string(b)) != "0"
		return nil
	})
	if err != nil || off {
		return err
	}
	return ns.withLink(link, func(l netlink.Link) (err error) {
		var addrs []netlink.Addr
		if !Wait(5*time.Second, func() bool {
			addrs, err = netlink.AddrList(l, netlink.FAMILY_V6)
			return err != nil || len(addrs) > 0 && localRoutes(addrs)
		}) {
			return fmt.Errorf("link %s gets no IPv6 address", link)
		}
		return err
	})
}

// localRoutes says whether all addresses have their routes.
func localRoutes(addrs []netlink.Addr) bool {
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_V6, &netlink.Route{Table: unix.RT_TABLE_LOCAL}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return false
	}
	for _, a := range addrs {
		if !slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Dst != nil && r.Dst.IP.Equal(a.IP) }) {
			return false
		}
	}
	return true
}

// CreateVeth joins two namespaces by a veth pair, both ends up.
func CreateVeth(a *NetNS, nameA string, b *NetNS, nameB string) error {
	err := a.Do(func() error {
		la := netlink.NewLinkAttrs()
		la.Name = nameA
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: la, PeerName: nameB, PeerNamespace: netlink.NsFd(b.file.Fd()),
		})
	})
	if err != nil {
		return fmt.Errorf("veth %s to %s: %w", nameA, nameB, err)
	}
	return errors.Join(a.Up(nameA), b.Up(nameB))
}

// Veth is CreateVeth for a test.
func Veth(t TB, a *NetNS, nameA string, b *NetNS, nameB string) {
	t.Helper()
	if err := CreateVeth(a, nameA, b, nameB); err != nil {
		t.Fatalf("%v", err)
	}
}

// Must fails the test if one of the errors is not nil.
func Must(t TB, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatalf("%v", err)
	}
}
