// Package uplink is the host's side: AF_PACKET and tap ports that speak
// virtio_net_hdr.
//
// An [Uplink] owns its sockets, one to receive and one to send for every
// worker, and the receive buffers behind them. A [Pod] owns what was changed
// in the network namespace so that a guest can live behind the pod's address:
// nftables tables, a sink and a tap for each guest, a sysctl; it puts everything
// back. A [Router] owns the next hops. Nothing here logs or allocates per frame.
package uplink

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Watcher is who a queue wakes: it watches descriptors edge-triggered.
type Watcher = interface {
	Watch(fd int) error
	Unwatch(fd int)
}

// Errors that callers may want to tell apart.
var (
	// ErrInUse means that another sidewire serves the link.
	ErrInUse = errors.New("another sidewire serves this link")
	// ErrNoAddress means that a pod's link has no address to share.
	ErrNoAddress = errors.New("no IP address that others may know")
	// ErrPrivilege means that a capability is missing; the message names it.
	ErrPrivilege = errors.New("missing privilege")
	// ErrNoLink means that there is no link of that name; the message lists
	// those that there are.
	ErrNoLink = errors.New("no such link")
	// ErrKernel means that the kernel lacks a feature; the message names it.
	ErrKernel = errors.New("kernel lacks a feature")
)

// link returns the Ethernet link of that name in the current namespace.
func link(name string) (netlink.Link, error) {
	l, err := netlink.LinkByName(name)
	if err == nil {
		if l.Attrs().EncapType != "ether" {
			return nil, fmt.Errorf("link %s is of type %q, not Ethernet", name, l.Attrs().EncapType)
		}
		return l, nil
	}
	var missing netlink.LinkNotFoundError
	if !errors.As(err, &missing) {
		return nil, fmt.Errorf("link %s: %w", name, privilege(err, "CAP_NET_ADMIN"))
	}
	names := []string{}
	all, _ := netlink.LinkList() // what cannot be listed is not shown
	for _, l := range all {
		names = append(names, l.Attrs().Name)
	}
	return nil, fmt.Errorf("%w: %s (there are: %s)", ErrNoLink, name, strings.Join(names, ", "))
}

// privilege makes a refusal by the kernel say which capability it wants.
func privilege(err error, capability string) error {
	if errors.Is(err, unix.EPERM) || errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("%w: %s is needed (%w)", ErrPrivilege, capability, err)
	}
	return err
}

func macOf(l netlink.Link) (m frame.MAC) {
	copy(m[:], l.Attrs().HardwareAddr)
	return m
}
