package vhosttest

import (
	"fmt"
	"net"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Tap describes a tap device to make in a network namespace.
type Tap struct {
	NetNS string    // a path for setns; empty is the caller's own
	Name  string    // empty means eth0
	MTU   int       // bytes; 0 leaves 1500
	MAC   frame.MAC // zero leaves what the kernel makes up
}

// Offloads that the reader of a tap can ask for (TUNSETOFFLOAD).
const (
	tunCsum = 0x01
	tunTSO4 = 0x02
	tunTSO6 = 0x04
	tunECN  = 0x08
	tunUSO4 = 0x20
	tunUSO6 = 0x40

	tunAll = tunCsum | tunTSO4 | tunTSO6 | tunECN | tunUSO4 | tunUSO6
)

// tunOffloads is what a guest with these features leaves to its device.
func tunOffloads(features uint64) (n int) {
	if features&FeatCsum == 0 {
		return 0
	}
	n = tunCsum
	for _, f := range []struct {
		feature uint64
		flag    int
	}{{FeatHostTSO4, tunTSO4}, {FeatHostTSO6, tunTSO6}, {FeatHostECN, tunECN}, {FeatHostUSO, tunUSO4 | tunUSO6}} {
		if features&f.feature != 0 {
			n |= f.flag
		}
	}
	return n
}

// inNetNS runs f on a thread of its own in the namespace.
func inNetNS(path string, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if path != "" {
			fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				done <- fmt.Errorf("open namespace %s: %w", path, err)
				return
			}
			defer unix.Close(fd)
			if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
				done <- fmt.Errorf("enter namespace %s: %w", path, err)
				return
			}
		}
		done <- f()
	}()
	return <-done
}

// open makes the tap with a descriptor for each queue, non-blocking, that
// reads and writes frames behind a virtio-net header of hdrLen bytes, and sets
// the link up. The tap is gone when the last descriptor is closed.
func (t Tap) open(queues, hdrLen, offloads int) (fds []int, err error) {
	if t.Name == "" {
		t.Name = "eth0"
	}
	err = inNetNS(t.NetNS, func() error {
		for range queues {
			fd, err := t.openQueue(queues > 1, hdrLen, offloads)
			if err != nil {
				return err
			}
			fds = append(fds, fd)
		}
		return t.configure()
	})
	if err != nil {
		closeFds(fds)
		return nil, fmt.Errorf("tap %s: %w", t.Name, err)
	}
	return fds, nil
}

func (t Tap) openQueue(multi bool, hdrLen, offloads int) (fd int, err error) {
	fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	ifr, err := unix.NewIfreq(t.Name)
	if err != nil {
		return -1, err
	}
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if multi {
		flags |= unix.IFF_MULTI_QUEUE
	}
	ifr.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return -1, fmt.Errorf("TUNSETIFF: %w", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, hdrLen); err != nil {
		return -1, fmt.Errorf("TUNSETVNETHDRSZ: %w", err)
	}
	err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloads)
	if err == unix.EINVAL { // Linux before 6.2 knows no USO
		err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloads&^(tunUSO4|tunUSO6))
	}
	if err != nil {
		return -1, fmt.Errorf("TUNSETOFFLOAD: %w", err)
	}
	return fd, nil
}

// configure gives the link its addresses, on a thread in its namespace.
func (t Tap) configure() error {
	l, err := netlink.LinkByName(t.Name)
	if err != nil {
		return err
	}
	if t.MAC != (frame.MAC{}) {
		if err := netlink.LinkSetHardwareAddr(l, net.HardwareAddr(t.MAC[:])); err != nil {
			return err
		}
	}
	if t.MTU != 0 {
		if err := netlink.LinkSetMTU(l, t.MTU); err != nil {
			return err
		}
	}
	return netlink.LinkSetUp(l)
}
