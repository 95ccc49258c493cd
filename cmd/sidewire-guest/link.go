package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netlink"

	"sidewire/engine/enginetest"
)

// up sets a link up, waiting for a driver that is still probing.
func up(name string) (netlink.Link, error) {
	var link netlink.Link
	var err error
	if !enginetest.Wait(5*time.Second, func() bool {
		link, err = netlink.LinkByName(name)
		return err == nil
	}) {
		return nil, fmt.Errorf("link %s: %w", name, err)
	}
	return link, netlink.LinkSetUp(link)
}

func carrier(name string) bool {
	b, _ := os.ReadFile("/sys/class/net/" + name + "/carrier")
	return strings.TrimSpace(string(b)) == "1"
}

func waitCarrier(name string, timeout time.Duration) error {
	if !enginetest.Wait(timeout, func() bool { return carrier(name) }) {
		return fmt.Errorf("link %s has no carrier", name)
	}
	return nil
}

// addr configures a link by hand.
func (a *agent) addr(c *enginetest.GuestCmd, _ *enginetest.GuestReply) error {
	link, err := up(c.If)
	if err != nil {
		return err
	}
	if c.MTU > 0 {
		if err := netlink.LinkSetMTU(link, c.MTU); err != nil {
			return fmt.Errorf("mtu: %w", err)
		}
	}
	if c.Addr != "" {
		ad, err := netlink.ParseAddr(c.Addr)
		if err != nil {
			return err
		}
		if err := netlink.AddrReplace(link, ad); err != nil {
			return fmt.Errorf("address: %w", err)
		}
	}
	if c.GW != "" {
		if err := addRoute(link, nil, net.ParseIP(c.GW)); err != nil {
			return err
		}
	}
	if len(c.DNS) == 0 {
		return nil
	}
	var servers []net.IP
	for _, s := range c.DNS {
		servers = append(servers, net.ParseIP(s))
	}
	return writeResolv(servers, nil)
}

func (a *agent) link(c *enginetest.GuestCmd, r *enginetest.GuestReply) error {
	link, err := netlink.LinkByName(c.If)
	if err != nil {
		return err
	}
	if c.MAC != "" {
		mac, err := net.ParseMAC(c.MAC)
		if err == nil {
			err = netlink.LinkSetHardwareAddr(link, mac)
		}
		if err != nil {
			return fmt.Errorf("mac: %w", err)
		}
	}
	if c.MTU > 0 {
		if err := netlink.LinkSetMTU(link, c.MTU); err != nil {
			return fmt.Errorf("mtu: %w", err)
		}
	}
	if c.Up != nil {
		set := netlink.LinkSetDown
		if *c.Up {
			set = netlink.LinkSetUp
		}
		if err := set(link); err != nil {
			return err
		}
	}
	r.Link, err = tellLink(c.If)
	if err != nil {
		return err
	}
	r.Stats, err = ethStats(c.If)
	if errors.Is(err, errNotSupported) {
		return nil
	}
	return err
}

func tellLink(name string) (*enginetest.GuestLink, error) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return nil, err
	}
	at := link.Attrs()
	dir := "/sys/class/net/" + name
	l := &enginetest.GuestLink{Name: name, MAC: at.HardwareAddr.String(), MTU: at.MTU, Carrier: carrier(name)}
	if d, err := os.Readlink(dir + "/device/driver"); err == nil {
		l.Driver = filepath.Base(d)
	}
	if b, err := os.ReadFile(dir + "/device/features"); err == nil {
		l.Features = strings.TrimSpace(string(b))
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return nil, err
	}
	for _, ad := range addrs {
		l.Addrs = append(l.Addrs, ad.IPNet.String())
	}
	rx, _ := filepath.Glob(dir + "/queues/rx-*")
	tx, _ := filepath.Glob(dir + "/queues/tx-*")
	l.RxQueues, l.TxQueues = len(rx), len(tx)
	if l.Channels, l.MaxChan, err = ethChannels(name); err != nil && !errors.Is(err, errNotSupported) {
		return nil, err
	}
	if l.Offload, err = ethOffloads(name); err != nil && !errors.Is(err, errNotSupported) {
		return nil, err
	}
	return l, nil
}

func (a *agent) channels(c *enginetest.GuestCmd, r *enginetest.GuestReply) (err error) {
	if err := ethSetChannels(c.If, c.N); err != nil {
		return err
	}
	r.Link, err = tellLink(c.If)
	return err
}

func (a *agent) offloads(c *enginetest.GuestCmd, r *enginetest.GuestReply) (err error) {
	for name, on := range c.Offload {
		if err := ethSetOffload(c.If, name, on); err != nil {
			return err
		}
	}
	r.Link, err = tellLink(c.If)
	return err
}

func (a *agent) neigh(c *enginetest.GuestCmd, r *enginetest.GuestReply) error {
	link, err := netlink.LinkByName(c.If)
	if err != nil {
		return err
	}
	list, err := netlink.NeighList(link.Attrs().Index, netlink.FAMILY_ALL)
	for _, n := range list {
		r.Peers = append(r.Peers, fmt.Sprintf("%v %v %#x", n.IP, n.HardwareAddr, n.State))
	}
	return err
}
