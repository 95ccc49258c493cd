package enginetest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// needs maps the name of a need to the test whether the machine has it.
var needs = map[string]func() error{
	"root":    needRoot,
	"netns":   sync.OnceValue(needNetNS),
	"tun":     needTun,
	"macvtap": sync.OnceValue(needMacvtap),
	"uso":     sync.OnceValue(needUSO),
	"holes":   needHoles,
	// "hugepages" is a kernel that has them, not one that has some to spare.
	"hugepages": needHugePages,
	"kernel":    needKernel,
	"ipxe":      needIPXE,
	"qemu10":    func() error { _, err := Hardware(); return err },
	"qemu":      needProgram("qemu-system-x86_64"),
	"testpmd":   needProgram("dpdk-testpmd"),
	"nft":       needProgram("nft"),
}

// programs are needs that are just a program of that name.
var programs = []string{
	"dhclient", "curl", "iperf3", "ping", "dig", "tcpdump", "ethtool", "passt", "socat", "nc", "ip", "go", "setpriv",
}

func init() {
	for _, p := range programs {
		needs[p] = needProgram(p)
	}
}

// Need skips the test, with the reason, if the machine lacks one of the named
// things. It fails the test instead where the environment's TEST_REQUIRE, a
// list with commas or "all", names the thing.
func Need(t TB, names ...string) {
	t.Helper()
	for _, n := range names {
		err := Have(n)
		switch {
		case err == nil:
		case errors.Is(err, errUnknownNeed) || required(os.Getenv("TEST_REQUIRE"), n):
			t.Fatalf("test needs %s: %v", n, err)
		default:
			t.Skipf("test needs %s: %v", n, err)
		}
	}
}

var errUnknownNeed = errors.New("no such need")

// Have returns nil if the machine has the named thing, or the reason why not.
func Have(name string) error {
	f := needs[name]
	if f == nil {
		return errUnknownNeed
	}
	return f()
}

// required says whether list, the value of TEST_REQUIRE, names the need.
func required(list, name string) bool {
	for n := range strings.SplitSeq(list, ",") {
		if n = strings.TrimSpace(n); n == name || n == "all" {
			return true
		}
	}
	return false
}

func needRoot() error {
	if os.Geteuid() != 0 {
		return errors.New("not root")
	}
	return nil
}

func needNetNS() error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread dies with its namespace
		done <- unix.Unshare(unix.CLONE_NEWNET)
	}()
	if err := <-done; err != nil {
		return fmt.Errorf("cannot make a network namespace: %w", err)
	}
	return nil
}

func needTun() error {
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// needUSO looks whether a tap takes UDP segmentation offload (Linux 6.2).
func needUSO() error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread dies with its namespace, and that with the tap
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("cannot make a network namespace: %w", err)
			return
		}
		done <- tapTakes(unix.TUN_F_CSUM | unix.TUN_F_USO4 | unix.TUN_F_USO6)
	}()
	return <-done
}

// needMacvtap looks whether the kernel can make a macvtap on a veth.
func needMacvtap() error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread dies with its namespace, and that with the links
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("cannot make a network namespace: %w", err)
			return
		}
		lower := netlink.NewLinkAttrs()
		lower.Name = "a"
		err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: lower, PeerName: "b"})
		if l, lerr := netlink.LinkByName("a"); err == nil && lerr == nil {
			on := netlink.NewLinkAttrs()
			on.Name, on.ParentIndex = "c", l.Attrs().Index
			err = netlink.LinkAdd(&netlink.Macvtap{Macvlan: netlink.Macvlan{LinkAttrs: on, Mode: netlink.MACVLAN_MODE_BRIDGE}})
		}
		if err != nil {
			err = fmt.Errorf("cannot make a macvtap: %w", err)
		}
		done <- err
	}()
	return <-done
}

func tapTakes(offloads int) error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("/dev/net/tun: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("need")
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return fmt.Errorf("make a tap: %w", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloads); err != nil {
		return fmt.Errorf("taps do not take the offload: %w", err)
	}
	return nil
}

func needHugePages() error { return memfdCan(unix.MFD_HUGETLB|unix.MFD_HUGE_2MB, nil) }

func needHoles() error {
	return memfdCan(0, func(fd int) error {
		return unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096)
	})
}

// memfdCan makes a memfd with more flags and does f with it.
func memfdCan(flags int, f func(fd int) error) error {
	fd, err := unix.MemfdCreate("need", unix.MFD_CLOEXEC|flags)
	if err != nil {
		return fmt.Errorf("memfd: %w", err)
	}
	defer unix.Close(fd)
	if f == nil {
		return nil
	}
	return f(fd)
}

func needKernel() error {
	_, _, err := GuestKernel()
	return err
}

// GuestKernel returns the path of a kernel that can boot as a guest and the
// directory of its modules.
func GuestKernel() (image, modules string, err error) {
	images, _ := filepath.Glob("/boot/vmlinuz-*")
	for _, image := range images {
		modules := "/lib/modules/" + strings.TrimPrefix(filepath.Base(image), "vmlinuz-")
		f, err := os.Open(image)
		if err != nil {
			continue
		}
		f.Close()
		if _, err := os.Stat(modules + "/kernel"); err == nil {
			return image, modules, nil
		}
	}
	return "", "", errors.New("no readable /boot/vmlinuz-* with its /lib/modules")
}

func needIPXE() error {
	_, err := IPXERom()
	return err
}

// IPXERom returns the path of an iPXE option ROM for virtio-net.
func IPXERom() (string, error) {
	for _, p := range []string{
		"/usr/share/qemu/pxe-virtio.rom", "/usr/lib/ipxe/qemu/pxe-virtio.rom",
		"/usr/share/qemu/efi-virtio.rom", "/usr/lib/ipxe/qemu/efi-virtio.rom",
	} {
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	return "", errors.New("no iPXE ROM (package ipxe-qemu)")
}

func needProgram(name string) func() error {
	return func() error {
		_, err := Program(name)
		return err
	}
}

// Program finds an executable in PATH or in the sbin directories.
func Program(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/sbin", "/sbin"} {
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("no program %s", name)
}
