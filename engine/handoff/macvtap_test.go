package handoff

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
)

var testMAC = net.HardwareAddr{2, 0, 0, 0, 0, 7}

// node0 is a namespace with one end of a pair, eth0; its other end is wire.
func node0(t *testing.T) *enginetest.NetNS {
	t.Helper()
	enginetest.Need(t, "root", "netns", "macvtap")
	ns := enginetest.NewNetNS(t)
	enginetest.Veth(t, ns, "eth0", ns, "wire")
	return ns
}

// look is what a link is like.
func look(t *testing.T, ns *enginetest.NetNS, name string) (a netlink.LinkAttrs) {
	t.Helper()
	require.NoError(t, ns.Do(func() error {
		l, err := netlink.LinkByName(name)
		if err == nil {
			a = *l.Attrs()
		}
		return err
	}))
	return a
}

func links(t *testing.T, ns *enginetest.NetNS) (names []string) {
	t.Helper()
	require.NoError(t, ns.Do(func() error {
		all, err := netlink.LinkList()
		for _, l := range all {
			names = append(names, l.Attrs().Name)
		}
		return err
	}))
	return names
}

// Every mode, with its queues: each descriptor is one, with the header that QEMU
// looks for; the kernel is allowed no address; and the link goes at the end.
func TestMacvtapRow75Row77Modes(t *testing.T) {
	for _, mode := range Modes {
		t.Run(mode, func(t *testing.T) {
			ns := node0(t)
			before, lower := links(t, ns), look(t, ns, "eth0")
			require.NoError(t, ns.Do(func() error {
				m, err := OpenMacvtap(MacvtapConfig{Name: "m0", Lower: "eth0", Mode: mode, Capacity: 1, MAC: testMAC, MTU: 1400, Queues: 3})
				require.NoError(t, err)
				defer m.Close()
				a := look(t, ns, "m0")
				assert.Equal(t, testMAC, a.HardwareAddr)
				assert.Zero(t, a.RawFlags&unix.IFF_UP, "silent until it is handed over")
				assert.Equal(t, 1400, a.MTU)
				assert.Equal(t, genNone, genMode("m0"))
				assert.NotZero(t, a.RawFlags&unix.IFF_ALLMULTI)
				st := m.Status()
				assert.Equal(t, Status{Kind: "macvtap", MAC: testMAC.String(), MTU: 1400, Queues: 3, Link: "m0", Lower: "eth0", Mode: mode, Capacity: 1, Node: st.Node, Device: st.Device}, st)
				require.NoError(t, m.Up())
				files, err := m.Open()
				require.NoError(t, err)
				defer closeAll(files)
				require.Len(t, files, 3)
				for _, f := range files {
					ifr, err := unix.NewIfreq("")
					require.NoError(t, err)
					require.NoError(t, unix.IoctlIfreq(int(f.Fd()), unix.TUNGETIFF, ifr))
					assert.Equal(t, uint16(unix.IFF_TAP|unix.IFF_NO_PI|unix.IFF_VNET_HDR|unix.IFF_MULTI_QUEUE), ifr.Uint16())
					assert.Equal(t, "m0", ifr.Name())
				}
				assert.Equal(t, "tap,id=n,fds=3:4:5,vhost=off", m.Netdev([]string{"3", "4", "5"}, "n"))
				// Another one has no room, or in passthru no place.
				_, err = OpenMacvtap(MacvtapConfig{Name: "m1", Lower: "eth0", Mode: mode, Pool: "p", Capacity: 1})
				assert.ErrorContains(t, err, "macvtap pool p is used up: there are 1 macvtaps on eth0 and its capacity is 1")
				_, err = OpenMacvtap(MacvtapConfig{Name: "m0", Lower: "eth0", Mode: mode})
				assert.ErrorContains(t, err, "another sidewire has it")
				return m.Close()
			}))
			assert.Equal(t, before, links(t, ns))
			assert.Equal(t, lower.HardwareAddr, look(t, ns, "eth0").HardwareAddr)
		})
	}
}

// Without an address the guest of a link in passthru has that of the lower
// device, any other the one that its names make.
func TestMacvtapRow77DefaultMAC(t *testing.T) {
	ns := node0(t)
	lower := look(t, ns, "eth0")
	require.NoError(t, ns.Do(func() error {
		for mode, want := range map[string]net.HardwareAddr{"passthru": lower.HardwareAddr, "vepa": testMAC} {
			c := MacvtapConfig{Name: "m0", Lower: "eth0", Mode: mode, DefaultMAC: testMAC}
			found, err := FindMacvtap(c)
			require.NoError(t, err)
			assert.Equal(t, want.String(), found.Status().MAC, "told before it is there")
			assert.Empty(t, found.Status().Node)
			m, err := OpenMacvtap(c)
			require.NoError(t, err)
			assert.Equal(t, want.String(), m.Status().MAC)
			found, err = FindMacvtap(c)
			require.NoError(t, err)
			assert.Equal(t, m.Status().Node, found.Status().Node)
			require.NoError(t, m.Close())
		}
		return nil
	}))
}

// A link that a run before left stays where it is what is wanted, for a guest may
// be using it, and is made anew where it is not.
func TestMacvtapAfterACrash(t *testing.T) {
	ns := node0(t)
	require.NoError(t, ns.Do(func() error {
		c := MacvtapConfig{Name: "m0", Lower: "eth0", Mode: "bridge", MAC: testMAC}
		m, err := OpenMacvtap(c)
		require.NoError(t, err)
		assert.False(t, m.Status().Kept)
		m.lock.Close() // as the process's end does
		index := look(t, ns, "m0").Index
		m, err = OpenMacvtap(c)
		require.NoError(t, err)
		assert.True(t, m.Status().Kept)
		assert.Equal(t, index, look(t, ns, "m0").Index)
		m.lock.Close()
		c.Mode = "vepa"
		m, err = OpenMacvtap(c)
		require.NoError(t, err)
		assert.False(t, m.Status().Kept)
		assert.NotEqual(t, index, look(t, ns, "m0").Index)
		require.NoError(t, m.Close())
		return m.Close()
	}))
}

// A link goes away under us, or with its lower device: closing says nothing of it.
func TestMacvtapGoneBefore(t *testing.T) {
	ns := node0(t)
	require.NoError(t, ns.Do(func() error {
		m, err := OpenMacvtap(MacvtapConfig{Name: "m0", Lower: "eth0"})
		require.NoError(t, err)
		require.NoError(t, netlink.LinkAdd(&netlink.Macvtap{Macvlan: netlink.Macvlan{LinkAttrs: netlink.LinkAttrs{Name: "net1", TxQLen: -1, ParentIndex: look(t, ns, "eth0").Index}, Mode: netlink.MACVLAN_MODE_BRIDGE}}))
		a, err := OpenMacvtap(MacvtapConfig{Adopt: []string{"pod1234", "net1"}, Name: "m1", MAC: testMAC})
		require.NoError(t, err)
		assert.True(t, a.Status().Adopted)
		l, err := netlink.LinkByName("eth0")
		require.NoError(t, err)
		require.NoError(t, netlink.LinkDel(l))
		assert.NoError(t, a.Close())
		return m.Close()
	}))
}

// The vhost device, where there is one, takes each queue.
func TestMacvtapRow78VhostDescriptors(t *testing.T) {
	ns := node0(t)
	vhost := filepath.Join(t.TempDir(), "vhost-net")
	require.NoError(t, os.WriteFile(vhost, nil, 0o600))
	require.NoError(t, ns.Do(func() error {
		m, err := OpenMacvtap(MacvtapConfig{Name: "m0", Lower: "eth0", Queues: 2, VhostNet: vhost})
		require.NoError(t, err)
		files, err := m.Open()
		require.NoError(t, err)
		defer closeAll(files)
		require.Len(t, files, 4)
		assert.Equal(t, vhost, files[3].Name())
		assert.Equal(t, "tap,id=n,fds=3:4,vhost=on,vhostfds=5:6", m.Netdev([]string{"3", "4", "5", "6"}, "n"))
		return m.Close()
	}))
}

// The device of a link is found by its number, whatever /dev has under its name.
func TestMacvtapRow77NodeOfAnotherNamespace(t *testing.T) {
	ns := node0(t)
	require.NoError(t, ns.Do(func() error {
		m, err := OpenMacvtap(MacvtapConfig{Name: "m0", Lower: "eth0"})
		require.NoError(t, err)
		defer m.Close()
		for _, n := range []node{{"null", m.node.dev}, {"no-such-tap", m.node.dev}} {
			assert.False(t, n.inDev())
			f, err := n.open()
			require.NoError(t, err)
			ifr, err := unix.NewIfreq("")
			require.NoError(t, err)
			require.NoError(t, unix.IoctlIfreq(int(f.Fd()), unix.TUNGETIFF, ifr))
			assert.Equal(t, "m0", ifr.Name())
			f.Close()
		}
		f, err := node{"x", m.node.dev}.openIn("/dev")
		if assert.NoError(t, err) {
			f.Close()
		}
		left, _ := filepath.Glob("/dev/.sidewire-*")
		assert.Empty(t, left)
		return nil
	}))
}

// What is exposed where nobody chose: physical links and bonds, and ends of pairs
// on request.
func TestMacvtapRow76Exposed(t *testing.T) {
	attrs := func(flags net.Flags) netlink.LinkAttrs { return netlink.LinkAttrs{Name: "x", Flags: flags} }
	for _, c := range []struct {
		link       netlink.Link
		plain, all bool
	}{
		{&netlink.Device{LinkAttrs: attrs(0)}, true, true},
		{&netlink.Device{LinkAttrs: attrs(net.FlagLoopback)}, false, false},
		{&netlink.Bond{LinkAttrs: attrs(0)}, true, true},
		{&netlink.Veth{LinkAttrs: attrs(0)}, false, true},
		{&netlink.Bridge{LinkAttrs: attrs(0)}, false, false},
		{&netlink.Vlan{LinkAttrs: attrs(0)}, false, false},
	} {
		assert.Equal(t, c.plain, isExposed(c.link, false), c.link.Type())
		assert.Equal(t, c.all, isExposed(c.link, true), c.link.Type())
	}
}

// The state of an adopted link survives as its alias, also with an alias of its
// own; what others write there is not believed.
func TestLinkState(t *testing.T) {
	s := linkState{mac: testMAC, mtu: 1400, up: true, promisc: true, gen: genUnknown, alias: "a b=c alias=d"}
	got, ok := parseState(s.String())
	assert.True(t, ok)
	assert.Equal(t, s, got)
	s.alias = strings.Repeat("x", 300)
	assert.Len(t, s.String(), maxAlias)
	got, ok = parseState(s.String())
	assert.True(t, ok)
	assert.Equal(t, 1400, got.mtu)
	for _, alias := range []string{"", "of a CNI", statePrefix, statePrefix + " alias=", statePrefix + " mac=x mtu=1 up=true allmulti=true promisc=true gen=1 alias="} {
		_, ok := parseState(alias)
		assert.False(t, ok, alias)
	}
}

// Whatever stands in an alias is read or refused, and what is read says itself again.
func FuzzLinkState(f *testing.F) {
	f.Add((&linkState{mac: testMAC, alias: "x"}).String())
	f.Add(statePrefix + " mac=02:00:00:00:00:01:02:03 mtu=-1 up=true allmulti=false promisc=true gen=99999999999999999999 alias=")
	f.Fuzz(func(t *testing.T, alias string) {
		s, ok := parseState(alias)
		if !ok {
			return
		}
		again, ok := parseState(s.String())
		if len(s.alias) < 100 && (!ok || again.mtu != s.mtu || again.mac.String() != s.mac.String()) {
			t.Fatalf("%q: %+v became %+v", alias, s, again)
		}
	})
}
