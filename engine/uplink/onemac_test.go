package uplink

import (
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

func TestKindOfRow13(t *testing.T) {
	a := netlink.LinkAttrs{Name: "net1"}
	macvlan := func(m netlink.MacvlanMode) netlink.Link { return &netlink.Macvlan{LinkAttrs: a, Mode: m} }
	one := LinkKind{Name: "macvlan", OneMAC: true}
	for _, c := range []struct {
		link netlink.Link
		want LinkKind
		err  string
	}{
		{&netlink.Veth{LinkAttrs: a}, LinkKind{}, ""},
		{&netlink.Device{LinkAttrs: a}, LinkKind{}, ""},
		{macvlan(netlink.MACVLAN_MODE_BRIDGE), one, ""},
		{macvlan(netlink.MACVLAN_MODE_PRIVATE), one, ""},
		{macvlan(netlink.MACVLAN_MODE_VEPA), one, ""},
		{macvlan(netlink.MACVLAN_MODE_PASSTHRU), LinkKind{Name: "macvlan"}, ""},
		{macvlan(netlink.MACVLAN_MODE_SOURCE), LinkKind{}, `net1 is a macvlan in mode source, which hears a list of stations only; let its CNI plugin make it with "mode": "bridge"`},
		{&netlink.Macvtap{Macvlan: netlink.Macvlan{LinkAttrs: a, Mode: netlink.MACVLAN_MODE_BRIDGE}}, LinkKind{Name: "macvtap", OneMAC: true}, ""},
		{&netlink.IPVlan{LinkAttrs: a, Mode: netlink.IPVLAN_MODE_L2}, LinkKind{Name: "ipvlan", OneMAC: true, Shared: true, ByIP: true}, ""},
		{&netlink.IPVlan{LinkAttrs: a, Mode: netlink.IPVLAN_MODE_L3}, LinkKind{}, `net1 is an ipvlan in mode l3 or l3s`},
		{&netlink.IPVlan{LinkAttrs: a, Mode: netlink.IPVLAN_MODE_L3S}, LinkKind{}, `let its CNI plugin make it with "mode": "l2"`},
	} {
		got, err := kindOf(c.link)
		assert.Equal(t, c.want, got)
		if c.err == "" {
			assert.NoError(t, err)
		} else {
			assert.ErrorIs(t, err, ErrLinkKind)
			assert.ErrorContains(t, err, c.err)
		}
	}
}

func TestWatchAddrs(t *testing.T) {
	enginetest.Need(t, "root", "netns")
	ns := enginetest.NewNetNS(t)
	enginetest.Veth(t, ns, "eth0", enginetest.NewNetNS(t), "eth0")
	enginetest.Must(t, ns.Sysctl("net/ipv6/conf/eth0/disable_ipv6", "1"), ns.Up("eth0"), ns.Addr("eth0", "10.0.0.1/24"))
	got := make(chan []netip.Addr, 16)
	var w *LinkAddrs
	require.NoError(t, ns.Do(func() (err error) {
		w, err = WatchAddrs("eth0", func(a []netip.Addr) { got <- a })
		return err
	}))
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	assert.Equal(t, []netip.Addr{a}, <-got)
	require.NoError(t, ns.Addr("eth0", "10.0.0.2/24"))
	assert.Equal(t, []netip.Addr{a, b}, <-got)
	w.Close()
	require.NoError(t, ns.Do(func() error {
		_, err := WatchAddrs("eth7", nil)
		assert.ErrorIs(t, err, ErrNoLink)
		return nil
	}))
}

// Guests' addresses come to the link and go, its own stay; what a crash has left
// is found.
func TestKeepGuestAddrsRow12(t *testing.T) {
	enginetest.Need(t, "root", "netns")
	ns := enginetest.NewNetNS(t)
	enginetest.Veth(t, ns, "eth0", enginetest.NewNetNS(t), "eth0")
	enginetest.Must(t, ns.Sysctl("net/ipv6/conf/all/accept_dad", "0"), ns.Up("eth0"), ns.Addr("eth0", "10.0.0.1/24"), ns.Addr("eth0", "10.0.0.2/32"))
	now := func() (out []string) {
		require.NoError(t, ns.Do(func() error {
			l, err := netlink.LinkByName("eth0")
			require.NoError(t, err)
			addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
			for _, a := range addrs {
				if !a.IP.IsLinkLocalUnicast() {
					out = append(out, a.IPNet.String())
				}
			}
			return err
		}))
		return out
	}
	own := now()
	var guests atomic.Pointer[[]string]
	guests.Store(&[]string{})
	learned := make(chan struct{})
	each := func(yield func(netip.Addr, frame.MAC) bool) {
		for _, a := range *guests.Load() {
			if !yield(netip.MustParseAddr(a), frame.MAC{}) {
				return
			}
		}
	}
	var refused []error
	keep := func() (g *GuestAddrs) {
		require.NoError(t, ns.Do(func() (err error) {
			g, err = KeepGuestAddrs("eth0", learned, each, func(err error) { refused = append(refused, err) })
			return err
		}))
		return g
	}
	tell := func(as ...string) {
		guests.Store(&as)
		learned <- struct{}{}
		learned <- struct{}{} // taken when the first was followed
	}
	g := keep()
	tell("10.0.0.9", "fd00::9", "10.0.0.1")
	assert.ElementsMatch(t, append([]string{"10.0.0.9/32", "fd00::9/128"}, own...), now())
	// A guest may say that it is whom the namespace talks to: that goes out all the same.
	ours := func(to string) (local bool) {
		require.NoError(t, ns.Do(func() error {
			r, err := netlink.RouteGet(net.ParseIP(to))
			local = err == nil && len(r) > 0 && r[0].Type == unix.RTN_LOCAL
			return nil
		}))
		return local
	}
	for _, a := range []string{"10.0.0.9", "fd00::9"} {
		enginetest.Eventually(t, 5*time.Second, func() bool { return !ours(a) })
	}
	assert.True(t, ours("10.0.0.1"), "which was its own")
	enginetest.Must(t, ns.Sysctl("net/ipv6/conf/eth0/keep_addr_on_down", "1"), ns.Down("eth0"), ns.Up("eth0"))
	enginetest.Eventually(t, 5*time.Second, func() bool { return !ours("10.0.0.9") && !ours("fd00::9") })
	tell("fd00::9")
	assert.ElementsMatch(t, append([]string{"fd00::9/128"}, own...), now())
	g.Close()
	assert.Equal(t, own, now())
	assert.Empty(t, refused)

	g = keep()
	tell("10.0.0.9", "fd00::9")
	close(g.stop) // as a crash does
	g.routes.Close()
	g.done.Wait()
	left := now()
	require.NoError(t, ns.Do(func() error {
		l, err := netlink.LinkByName("eth0")
		require.NoError(t, err)
		living, err := lockLink(l.Attrs().Index)
		require.NoError(t, err)
		defer unix.Close(living)
		assert.ErrorIs(t, DropGuestAddrs("eth0"), ErrInUse)
		return nil
	}))
	assert.Equal(t, left, now(), "a living run has the link")
	require.NoError(t, ns.Do(func() error { return DropGuestAddrs("eth0") }))
	assert.Equal(t, own, now())
}
