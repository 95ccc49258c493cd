package uplink

import (
	"bufio"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// LinkKind is what a link does with hardware addresses that are not its own.
type LinkKind struct {
	// Name is "macvlan", "macvtap", "ipvlan" or "wireless", empty for all others.
	Name string
	// OneMAC says that frames from and to the link's own address pass alone:
	// guests' addresses have to be translated (engine.MACNAT).
	OneMAC bool
	// Shared says that other links on the wire have the same address.
	Shared bool
	// ByIP says that the kernel gives the link what is for its IP addresses only:
	// those of the guests must be among them.
	ByIP bool
}

// ErrLinkKind means that guests cannot be behind a link of that kind; the message
// says what would do.
var ErrLinkKind = errors.New("link is of no use for guests")

// KindOf looks at the link of that name in the current namespace.
func KindOf(name string) (LinkKind, error) {
	found, err := link(name)
	if err != nil {
		return LinkKind{}, err
	}
	return kindOf(found)
}

func kindOf(found netlink.Link) (LinkKind, error) {
	name := found.Attrs().Name
	switch l := found.(type) {
	case *netlink.Macvlan:
		return macvlanKind("macvlan", name, l.Mode)
	case *netlink.Macvtap:
		return macvlanKind("macvtap", name, l.Mode)
	case *netlink.IPVlan:
		if l.Mode != netlink.IPVLAN_MODE_L2 {
			return LinkKind{}, fmt.Errorf("%w: %s is an ipvlan in mode l3 or l3s, which neither ARP nor broadcasts pass; let its CNI plugin make it with \"mode\": \"l2\"", ErrLinkKind, name)
		}
		return LinkKind{Name: "ipvlan", OneMAC: true, Shared: true, ByIP: true}, nil
	}
	if wireless(name) {
		return LinkKind{Name: "wireless", OneMAC: true}, nil
	}
	return LinkKind{}, nil
}

func macvlanKind(kind, name string, mode netlink.MacvlanMode) (LinkKind, error) {
	switch mode {
	case netlink.MACVLAN_MODE_PASSTHRU:
		return LinkKind{Name: kind}, nil // it has its parent for itself, and makes it promiscuous
	case netlink.MACVLAN_MODE_SOURCE:
		return LinkKind{}, fmt.Errorf("%w: %s is a %s in mode source, which hears a list of stations only; let its CNI plugin make it with \"mode\": \"bridge\"", ErrLinkKind, name, kind)
	}
	return LinkKind{Name: kind, OneMAC: true}, nil
}

// wireless says whether the kernel lists a link of the current namespace as one of
// IEEE 802.11, where a station speaks for itself alone.
func wireless(name string) bool {
	f, err := os.Open("/proc/thread-self/net/wireless")
	if err != nil {
		return false // a kernel without any
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if n, _, ok := strings.Cut(strings.TrimSpace(s.Text()), ":"); ok && n == name {
			return true
		}
	}
	return false
}

// LinkAddrs follows the IP addresses of a link.
type LinkAddrs struct {
	sub     *nl.NetlinkSocket
	h       *netlink.Handle
	index   int
	done    sync.WaitGroup
	changed func([]netip.Addr)
}

// WatchAddrs follows the addresses of a link of the current network namespace
// until Close. It has changed called with all of them before it returns, and after
// each change.
func WatchAddrs(name string, changed func([]netip.Addr)) (w *LinkAddrs, err error) {
	w = &LinkAddrs{changed: changed}
	defer func() {
		if err != nil {
			w.closeSockets()
			w, err = nil, fmt.Errorf("watch addresses of %s: %w", name, err)
		}
	}()
	found, err := link(name)
	if err != nil {
		return w, err
	}
	w.index = found.Attrs().Index
	// Subscribe before the first look, so that no change falls between.
	if w.sub, err = nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR); err != nil {
		return w, err
	}
	if w.h, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return w, err
	}
	if err := w.look(); err != nil {
		return w, err
	}
	w.done.Go(w.listen)
	return w, nil
}

func (w *LinkAddrs) listen() {
	for {
		_, _, err := w.sub.Receive()
		switch {
		case err == nil, errors.Is(err, unix.ENOBUFS):
			_ = w.look() // the last good set stays
		case errors.Is(err, unix.EINTR):
		default:
			return
		}
	}
}

func (w *LinkAddrs) look() error {
	l := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: w.index}}
	addrs, err := w.h.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	var out []netip.Addr
	for _, a := range addrs {
		if ip, ok := netip.AddrFromSlice(a.IP); ok {
			out = append(out, ip.Unmap())
		}
	}
	w.changed(out)
	return nil
}

// Close ends the calls of changed.
func (w *LinkAddrs) Close() {
	w.sub.Close()
	w.done.Wait()
	w.closeSockets()
}

func (w *LinkAddrs) closeSockets() {
	if w.sub != nil {
		w.sub.Close()
	}
	if w.h != nil {
		w.h.Close()
	}
}
