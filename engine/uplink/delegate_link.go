package uplink

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// takeSnapshot reads what a link is.
func takeSnapshot(l netlink.Link) (*Saved, error) {
	a := l.Attrs()
	s := &Saved{
		Link: a.Name, Index: a.Index, MAC: macOf(l), MTU: a.MTU, ARP: a.RawFlags&unix.IFF_NOARP == 0,
		DisableIPv6: readConf6(a.Name, "disable_ipv6"), AddrGenMode: readConf6(a.Name, "addr_gen_mode"),
	}
	k := &s.Kernel
	var err error
	read := func(to *[][]byte, dump func(int, int) ([][]byte, error), family int) {
		list, derr := dump(a.Index, family)
		*to, err = list, errors.Join(err, derr)
	}
	read(&k.Addrs, dumpAddrs, unix.AF_INET)
	read(&k.Addrs6, dumpAddrs, unix.AF_INET6)
	read(&k.Routes, dumpRoutes, unix.AF_INET)
	read(&k.Routes6, dumpRoutes, unix.AF_INET6)
	read(&k.Neighbours, dumpNeighbours, unix.AF_UNSPEC)
	if err != nil {
		return nil, err
	}
	s.Addrs, s.Addrs6 = prefixes(k.Addrs), prefixes(k.Addrs6)
	for _, m := range k.Routes {
		if r, ok := mainRoute(m); ok {
			s.Routes = append(s.Routes, r)
		}
	}
	others, err := dumpRoutesFrom(s.Addrs, a.Index)
	if err != nil {
		return nil, err
	}
	k.Routes = append(k.Routes, others...)
	for _, m := range k.Neighbours {
		if n, ok := neighbourOf(m); ok && n.Addr.Is4() {
			s.Neighbours = append(s.Neighbours, n)
		}
	}
	return s, nil
}

func conf6(link, name string) string { return "/proc/sys/net/ipv6/conf/" + link + "/" + name }

// readConf6 reads a setting of a link, empty on a kernel without IPv6.
func readConf6(link, name string) string {
	b, _ := os.ReadFile(conf6(link, name))
	return strings.TrimSpace(string(b))
}

// The kernel's messages begin with these structures; the rest is attributes.
const (
	sizeofAddr, sizeofRoute, sizeofNeigh = unix.SizeofIfAddrmsg, unix.SizeofRtMsg, unix.SizeofNdMsg

	rtFlagsAt  = 8 // of rtmsg
	rtTypeAt   = 7
	rtTableAt  = 4
	rtProtoAt  = 5
	ndIndexAt  = 4
	ndStateAt  = 8
	addrIdxAt  = 4
	addrPfxLen = 1
)

// dump returns the messages about a link, which keep tells from those about
// others.
func dump(request, reply int, head nl.NetlinkRequestData, keep func(m []byte) bool) (out [][]byte, err error) {
	req := nl.NewNetlinkRequest(request, unix.NLM_F_DUMP)
	req.AddData(head)
	msgs, err := req.Execute(unix.NETLINK_ROUTE, uint16(reply))
	if err != nil {
		return nil, privilege(err, "CAP_NET_ADMIN")
	}
	for _, m := range msgs {
		if keep(m) {
			out = append(out, bytes.Clone(m))
		}
	}
	return out, nil
}

func dumpAddrs(index, family int) ([][]byte, error) {
	out, err := dump(unix.RTM_GETADDR, unix.RTM_NEWADDR, nl.NewIfAddrmsg(family), func(m []byte) bool {
		return len(m) >= sizeofAddr && int(binary.NativeEndian.Uint32(m[addrIdxAt:])) == index
	})
	if err != nil {
		return nil, fmt.Errorf("addresses: %w", err)
	}
	return out, nil
}

// dumpRoutes lists the routes of all tables that a link is part of.
func dumpRoutes(index, family int) ([][]byte, error) {
	head := &nl.RtMsg{RtMsg: unix.RtMsg{Family: uint8(family)}}
	out, err := dump(unix.RTM_GETROUTE, unix.RTM_NEWROUTE, head, func(m []byte) bool {
		if len(m) < sizeofRoute || binary.NativeEndian.Uint32(m[rtFlagsAt:])&unix.RTM_F_CLONED != 0 {
			return false
		}
		if oif := attr(m, sizeofRoute, unix.RTA_OIF); len(oif) == 4 {
			return int(binary.NativeEndian.Uint32(oif)) == index
		}
		return slices.Contains(nexthops(attr(m, sizeofRoute, unix.RTA_MULTIPATH)), index)
	})
	if err != nil {
		return nil, fmt.Errorf("routes: %w", err)
	}
	return out, nil
}

// dumpRoutesFrom lists the IPv4 routes by other links whose source is one of the
// addresses: the kernel takes them away with that.
func dumpRoutesFrom(addrs []netip.Prefix, index int) ([][]byte, error) {
	head := &nl.RtMsg{RtMsg: unix.RtMsg{Family: unix.AF_INET}}
	out, err := dump(unix.RTM_GETROUTE, unix.RTM_NEWROUTE, head, func(m []byte) bool {
		if len(m) < sizeofRoute || binary.NativeEndian.Uint32(m[rtFlagsAt:])&unix.RTM_F_CLONED != 0 || m[rtProtoAt] == unix.RTPROT_KERNEL {
			return false
		}
		oif, src := attr(m, sizeofRoute, unix.RTA_OIF), attr(m, sizeofRoute, unix.RTA_PREFSRC)
		return len(oif) == 4 && int(binary.NativeEndian.Uint32(oif)) != index && len(src) == 4 &&
			slices.ContainsFunc(addrs, func(p netip.Prefix) bool { return p.Addr() == netip.AddrFrom4([4]byte(src)) })
	})
	if err != nil {
		return nil, fmt.Errorf("routes: %w", err)
	}
	return out, nil
}

// nexthops are the links of a route of several ways.
func nexthops(b []byte) (index []int) {
	for len(b) >= unix.SizeofRtNexthop {
		n := int(binary.NativeEndian.Uint16(b))
		index = append(index, int(binary.NativeEndian.Uint32(b[4:])))
		if n = (n + 3) &^ 3; n < unix.SizeofRtNexthop || n > len(b) {
			break
		}
		b = b[n:]
	}
	return index
}

// dumpNeighbours lists those that somebody has set.
func dumpNeighbours(index, family int) ([][]byte, error) {
	head := &netlink.Ndmsg{Family: uint8(family)}
	out, err := dump(unix.RTM_GETNEIGH, unix.RTM_NEWNEIGH, head, func(m []byte) bool {
		return len(m) >= sizeofNeigh && int(binary.NativeEndian.Uint32(m[ndIndexAt:])) == index &&
			(m[0] == unix.AF_INET || m[0] == unix.AF_INET6) &&
			binary.NativeEndian.Uint16(m[ndStateAt:])&unix.NUD_PERMANENT != 0
	})
	if err != nil {
		return nil, fmt.Errorf("neighbours: %w", err)
	}
	return out, nil
}

// attr is an attribute of a message, nil if it has none of that type.
func attr(m []byte, head int, typ uint16) []byte {
	attrs, err := nl.ParseRouteAttr(m[head:])
	if err != nil {
		return nil
	}
	for _, a := range attrs {
		if a.Attr.Type&^uint16(unix.NLA_F_NESTED) == typ {
			return a.Value
		}
	}
	return nil
}

// prefixOf is the address that a message is about.
func prefixOf(m []byte) (netip.Prefix, bool) {
	b := attr(m, sizeofAddr, unix.IFA_LOCAL)
	if b == nil {
		b = attr(m, sizeofAddr, unix.IFA_ADDRESS)
	}
	a, ok := netip.AddrFromSlice(b)
	return netip.PrefixFrom(a, int(m[addrPfxLen])), ok
}

func prefixes(ms [][]byte) (out []netip.Prefix) {
	for _, m := range ms {
		if p, ok := prefixOf(m); ok {
			out = append(out, p)
		}
	}
	return out
}

// mainRoute is an IPv4 route of the main table with one way, as far as a guest
// can be told of it.
func mainRoute(m []byte) (r LinkRoute, ok bool) {
	if m[rtTableAt] != unix.RT_TABLE_MAIN || m[rtTypeAt] != unix.RTN_UNICAST || attr(m, sizeofRoute, unix.RTA_OIF) == nil {
		return r, false
	}
	dst := netip.IPv4Unspecified()
	if b := attr(m, sizeofRoute, unix.RTA_DST); len(b) == 4 {
		dst = netip.AddrFrom4([4]byte(b))
	}
	r.Dest = netip.PrefixFrom(dst, int(m[1]))
	if b := attr(m, sizeofRoute, unix.RTA_GATEWAY); len(b) == 4 {
		r.Via = netip.AddrFrom4([4]byte(b))
	}
	return r, attr(m, sizeofRoute, unix.RTA_VIA) == nil
}

func neighbourOf(m []byte) (n Neighbour, ok bool) {
	mac := attr(m, sizeofNeigh, unix.NDA_LLADDR)
	n.Addr, ok = netip.AddrFromSlice(attr(m, sizeofNeigh, unix.NDA_DST))
	return n, copy(n.MAC[:], mac) == len(n.MAC) && ok
}

// replay gives a message back to the kernel. What is there already is no
// error.
func replay(request, flags int, m []byte) error {
	req := nl.NewNetlinkRequest(request, unix.NLM_F_CREATE|unix.NLM_F_ACK|flags)
	req.AddRawData(m)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return privilege(err, "CAP_NET_ADMIN")
}

func deleteMessage(request int, m []byte) error {
	req := nl.NewNetlinkRequest(request, unix.NLM_F_ACK)
	req.AddRawData(m)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return privilege(err, "CAP_NET_ADMIN")
}

// deleteAddrs takes all addresses of a family from a link, the last one first,
// so that those that are left keep their order. Their routes go with them.
func deleteAddrs(index, family int) error {
	for {
		ms, err := dumpAddrs(index, family)
		if err != nil {
			return err
		}
		if len(ms) == 0 {
			return nil
		}
		m := ms[len(ms)-1]
		p, _ := prefixOf(m)
		if err := deleteMessage(unix.RTM_DELADDR, m); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("take address %s away: %w", p, err)
		}
		afterStep("address deleted")
	}
}

// withoutIPv6 ends IPv6 on a link. In a container whose /proc/sys cannot be
// written it takes the addresses away and lets none be made.
func withoutIPv6(l netlink.Link) error {
	name, index := l.Attrs().Name, l.Attrs().Index
	if now := readConf6(name, "disable_ipv6"); now == "" || now == "1" {
		return nil
	}
	if os.WriteFile(conf6(name, "disable_ipv6"), []byte("1"), 0) == nil {
		return nil
	}
	if err := setAddrGenMode(index, addrGenModeNone); err != nil {
		return err
	}
	afterStep("addr_gen_mode set")
	if err := deleteAddrs(index, unix.AF_INET6); err != nil {
		return err
	}
	left, err := dumpRoutes(index, unix.AF_INET6)
	if err != nil {
		return err
	}
	for _, m := range left {
		if m[rtTableAt] == unix.RT_TABLE_LOCAL {
			continue // of the kernel's own
		}
		if err := deleteMessage(unix.RTM_DELROUTE, presentable(m)); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("take a route away: %w", err)
		}
		afterStep("route deleted")
	}
	return nil
}

func setAddrGenMode(index int, mode uint8) error {
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req.AddData(msg)
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	spec.AddRtAttr(unix.AF_INET6, nil).AddRtAttr(iflaInet6AddrGenMode, nl.Uint8Attr(mode))
	req.AddData(spec)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return privilege(err, "CAP_NET_ADMIN")
}

// setMAC gives a link another hardware address, down and up again if its driver
// wants that.
func setMAC(l netlink.Link, mac frame.MAC) error {
	now, err := netlink.LinkByIndex(l.Attrs().Index)
	if err != nil || macOf(now) == mac {
		return err
	}
	hw := net.HardwareAddr(mac[:])
	if err = netlink.LinkSetHardwareAddr(l, hw); !errors.Is(err, unix.EBUSY) {
		return privilege(err, "CAP_NET_ADMIN")
	}
	if err := netlink.LinkSetDown(l); err != nil {
		return err
	}
	err = netlink.LinkSetHardwareAddr(l, hw)
	return errors.Join(err, netlink.LinkSetUp(l))
}

// putBack makes a link of the current namespace what it was, ends the silence,
// and removes the file. A link that is gone needs nothing.
func (f stateFile) putBack(s *Saved) error {
	l, err := netlink.LinkByIndex(s.Index)
	switch {
	case errors.As(err, new(netlink.LinkNotFoundError)), err == nil && !s.is(l):
		return errors.Join(forgetSilence(s.Link), f.remove())
	case err != nil:
		return fmt.Errorf("put back %s: %w", s.Link, privilege(err, "CAP_NET_ADMIN"))
	}
	if err := s.putBack(l); err != nil {
		return fmt.Errorf("put back %s: %w; what it was is in %s", s.Link, err, f.path)
	}
	afterStep("put back")
	if err := forgetSilence(s.Link); err != nil {
		return fmt.Errorf("put back %s: %w", s.Link, err)
	}
	afterStep("note removed")
	return f.remove()
}

// is says whether a link of the same number is the one that was written down.
func (s *Saved) is(l netlink.Link) bool {
	m := macOf(l)
	return l.Attrs().Name == s.Link || m == s.MAC || m == s.StandIn && m != (frame.MAC{})
}

func (s *Saved) putBack(l netlink.Link) error {
	if m := macOf(l); m == s.StandIn && m != (frame.MAC{}) {
		if err := setMAC(l, s.MAC); err != nil {
			return fmt.Errorf("hardware address %s: %w", s.MAC, err)
		}
		afterStep("mac put back")
	}
	if s.ARP {
		if err := netlink.LinkSetARPOn(l); err != nil {
			return fmt.Errorf("ARP on: %w", err)
		}
		afterStep("arp put back")
	}
	var errs []error
	for i, m := range s.Kernel.Addrs {
		if err := replay(unix.RTM_NEWADDR, unix.NLM_F_EXCL, m); err != nil {
			errs = append(errs, fmt.Errorf("address %s: %w", s.Addrs[i], err))
		}
		afterStep("address put back")
	}
	// From here on the kernel may speak: IPv6 asks whether its addresses are free.
	errs = append(errs, endSilence(l.Attrs().Name))
	afterStep("silence ended")
	errs = append(errs, s.putBackIPv6(l))
	afterStep("ipv6 put back")
	errs = append(errs, putBackRoutes(s.Index, unix.AF_INET, s.Kernel.Routes), putBackRoutes(s.Index, unix.AF_INET6, s.Kernel.Routes6))
	for _, m := range s.Kernel.Neighbours {
		if err := replay(unix.RTM_NEWNEIGH, unix.NLM_F_REPLACE, m); err != nil {
			errs = append(errs, fmt.Errorf("neighbour: %w", err))
		}
	}
	afterStep("neighbours put back")
	return errors.Join(errs...)
}

// putBackIPv6 lets the kernel have IPv6 again, with the addresses of before.
func (s *Saved) putBackIPv6(l netlink.Link) error {
	name := l.Attrs().Name
	if s.DisableIPv6 == "" {
		return nil
	}
	var errs []error
	if now := readConf6(name, "addr_gen_mode"); now != s.AddrGenMode && len(s.AddrGenMode) == 1 {
		errs = append(errs, setAddrGenMode(s.Index, s.AddrGenMode[0]-'0'))
	}
	if now := readConf6(name, "disable_ipv6"); now != s.DisableIPv6 {
		errs = append(errs, os.WriteFile(conf6(name, "disable_ipv6"), []byte(s.DisableIPv6), 0))
		// The kernel has made its own address, which may not have been there.
		now, err := dumpAddrs(s.Index, unix.AF_INET6)
		errs = append(errs, err)
		for _, m := range now {
			if p, ok := prefixOf(m); ok && !slices.Contains(s.Addrs6, p) {
				errs = append(errs, deleteMessage(unix.RTM_DELADDR, m))
			}
		}
	}
	for i, m := range s.Kernel.Addrs6 {
		if err := replay(unix.RTM_NEWADDR, unix.NLM_F_EXCL, m); err != nil {
			errs = append(errs, fmt.Errorf("address %s: %w", s.Addrs6[i], err))
		}
	}
	return errors.Join(errs...)
}

// putBackRoutes makes the routes by a link what they were. Those that come with
// an address come by themselves; of IPv4 they are taken away where there were
// none.
func putBackRoutes(index, family int, want [][]byte) error {
	now, err := dumpRoutes(index, family)
	if err != nil {
		return err
	}
	var todo, extra [][]byte
	for _, m := range want {
		own := m[rtProtoAt] == unix.RTPROT_KERNEL || m[rtProtoAt] == unix.RTPROT_RA
		if !containsRoute(now, m) && (family == unix.AF_INET || !own) {
			todo = append(todo, m)
		}
	}
	for _, m := range now {
		if !containsRoute(want, m) && family == unix.AF_INET && m[rtProtoAt] == unix.RTPROT_KERNEL {
			extra = append(extra, m)
		}
	}
	// One route may need another, to its gateway.
	for progress := true; progress && len(todo) > 0; {
		var left [][]byte
		var errs []error
		for _, m := range todo {
			if err := replay(unix.RTM_NEWROUTE, unix.NLM_F_APPEND, presentable(m)); err != nil {
				left = append(left, m)
				errs = append(errs, fmt.Errorf("route: %w", err))
			}
			afterStep("route put back")
		}
		progress, todo, err = len(left) < len(todo), left, errors.Join(errs...)
	}
	for _, m := range extra {
		if derr := deleteMessage(unix.RTM_DELROUTE, presentable(m)); derr != nil && !errors.Is(derr, unix.ESRCH) {
			err = errors.Join(err, fmt.Errorf("surplus route: %w", derr))
		}
	}
	return err
}

// presentable is a route as the kernel takes it: without what it says of the
// moment, which is the state of the links and how often the route was used.
func presentable(m []byte) []byte {
	out := bytes.Clone(m[:sizeofRoute])
	flags := binary.NativeEndian.Uint32(out[rtFlagsAt:]) & unix.RTNH_F_ONLINK
	binary.NativeEndian.PutUint32(out[rtFlagsAt:], flags)
	attrs, err := nl.ParseRouteAttr(m[sizeofRoute:])
	if err != nil {
		return m
	}
	for _, a := range attrs {
		if a.Attr.Type == unix.RTA_CACHEINFO {
			continue
		}
		v := a.Value
		if a.Attr.Type&^uint16(unix.NLA_F_NESTED) == unix.RTA_MULTIPATH {
			v = liveNexthops(v)
		}
		out = appendAttr(out, a.Attr, v)
	}
	return out
}

func appendAttr(b []byte, a syscall.RtAttr, v []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofRtAttr+len(v)))
	b = binary.NativeEndian.AppendUint16(b, a.Type)
	b = append(b, v...)
	return append(b, make([]byte, -len(v)&3)...)
}

// liveNexthops takes the state of the links out of a route of several ways.
func liveNexthops(v []byte) []byte {
	out := bytes.Clone(v)
	for b := out; len(b) >= unix.SizeofRtNexthop; {
		b[2] &= unix.RTNH_F_ONLINK
		n := (int(binary.NativeEndian.Uint16(b)) + 3) &^ 3
		if n < unix.SizeofRtNexthop || n > len(b) {
			break
		}
		b = b[n:]
	}
	return out
}

func containsRoute(list [][]byte, m []byte) bool {
	want := presentable(m)
	return slices.ContainsFunc(list, func(x []byte) bool { return bytes.Equal(presentable(x), want) })
}
