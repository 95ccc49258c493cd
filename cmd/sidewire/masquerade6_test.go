package main

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

const guestSix, gatewaySix = "fd10:0:2::2", "fd10:0:2::1"

// sixVM is a guest without a hypervisor and without any address yet.
func sixVM(t *testing.T, p *process) *vm {
	t.Helper()
	enginetest.Need(t, "dhclient", "tun")
	v := &vm{t: t, ns: enginetest.NewNetNS(t), dir: t.TempDir()}
	require.NoError(t, v.ns.Sysctl("net/ipv6/conf/default/accept_dad", "0"))
	var err error
	v.tap, err = vhosttest.StartTapGuest(vhosttest.TapOptions{Options: vhosttest.Options{Path: p.socket(), MAC: guestMAC}, NetNS: v.ns.Path})
	require.NoError(t, err)
	t.Cleanup(func() { v.tap.Close() })
	return v
}

// autoconf lets the guest's kernel take the router's word for its routes, and
// dhclient for its address.
func (v *vm) autoconf() *vm {
	v.t.Helper()
	require.NoError(v.t, v.ns.Up("eth0"))
	enginetest.Eventually(v.t, soon, func() bool {
		out, _ := v.try("ip", "-6", "route", "show", "default")
		return strings.Contains(out, "default via fe80::ff:fe00:0")
	})
	v.dhclient6("-1")
	v.t.Cleanup(func() { v.dhclient6("-x") })
	return v
}

func (v *vm) dhclient6(arg string) {
	v.t.Helper()
	program, err := enginetest.Program("dhclient")
	require.NoError(v.t, err)
	resolv := filepath.Join(v.dir, "resolv.conf")
	if _, err := os.Stat(resolv); err != nil {
		require.NoError(v.t, os.WriteFile(resolv, nil, 0o644))
	}
	script := `mount --bind "$1/resolv.conf" "$(readlink -f /etc/resolv.conf)" && shift && exec "$@"`
	v.run("unshare", "-m", "--uts", "sh", "-c", script, "sh", v.dir, program, "-6", "-v",
		"-lf", filepath.Join(v.dir, "leases6"), "-pf", filepath.Join(v.dir, "pid6"), arg, "eth0")
}

// bySix checks that guest and outside reach each other by IPv6, and who sees
// whom.
func (v *vm) bySix(w *enginetest.World, port string) {
	v.t.Helper()
	t := v.t
	outside := "http://" + net.JoinHostPort(enginetest.OutsideIP6, "9000")
	assert.True(t, strings.HasPrefix(v.run("curl", "-sS", "--max-time", "10", outside+"/whoami"), "["+enginetest.PodIP6+"]:"), "the outside sees the pod")
	v.run("ping", "-6", "-c", "1", "-W", "5", enginetest.OutsideIP6)
	v.run("ping", "-6", "-c", "1", "-W", "5", gatewaySix)
	carry(t, v.ns, w.Outside, net.JoinHostPort(enginetest.OutsideIP6, "7000"), 2, 8<<20)
	seen := make(chan string, 1)
	listen(t, v.ns, "tcp6", net.JoinHostPort(guestSix, port), func(c net.Conn) {
		seen <- c.RemoteAddr().(*net.TCPAddr).IP.String()
	})
	c, err := w.Outside.Dial("tcp6", net.JoinHostPort(enginetest.PodIP6, port), 5*time.Second)
	require.NoError(t, err)
	c.Close()
	assert.Equal(t, enginetest.OutsideIP6, <-seen, "the guest sees its client")
}

// Zero configuration in a pod with both families: the guest's kernel takes the
// route from our advertisements and dhclient the address; the pod's resolvers and
// domains come along. IPv4 is there beside it.
func TestRow61DualStackByItself(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "dhclient", "curl", "ping")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{IPv6: true})
	before := footprint(t, w.Pod)
	p := startSidewire(t, w, spec("vm", 1))
	v := sixVM(t, p).autoconf()
	v.dhclient("-1")
	t.Cleanup(func() { v.dhclient("-x") })
	assert.Contains(t, v.run("ip", "-6", "-o", "addr", "show", "dev", "eth0"), guestSix+"/128")
	assert.Contains(t, v.run("ip", "-4", "-o", "addr", "show", "dev", "eth0"), "10.0.2.2/24")
	v.bySix(w, "8080")
	assert.True(t, strings.HasPrefix(v.run("curl", "-sS", "--max-time", "10", outsideURL("/whoami")), enginetest.PodIP+":"))
	st := p.status().Interfaces[0]
	require.NotNil(t, st.IPv6)
	assert.Equal(t, guestSix, st.IPv6.Guest.String())
	assert.Equal(t, enginetest.PodIP6, st.IPv6.Pod.String())
	assert.Len(t, st.Leases, 2)
	o := sidewire(t, "flows", "--socket-dir", p.dir)
	assert.Contains(t, o.out, enginetest.OutsideIP6)
	p.stop()
	assert.Empty(t, changes(before, footprint(t, w.Pod)))
}

// What the guide has cloud-init do: these very addresses, set by hand.
func TestRow61Row62GuidesStaticAddresses(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "curl", "ping")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{IPv6: true})
	p := startSidewire(t, w, spec("vm", 1, "tcp:80"))
	v := sixVM(t, p).byHand()
	v.bySix(w, "80")
	// A port that is not listed is the pod's.
	_, err := w.Outside.Dial("tcp6", net.JoinHostPort(enginetest.PodIP6, "81"), 5*time.Second)
	assert.ErrorContains(t, err, "refused")
	listen(t, w.Pod, "tcp6", net.JoinHostPort(enginetest.PodIP6, "81"), func(net.Conn) {})
	c, err := w.Outside.Dial("tcp6", net.JoinHostPort(enginetest.PodIP6, "81"), 5*time.Second)
	require.NoError(t, err)
	c.Close()
	// The pod's own connections stay its own.
	carry(t, w.Pod, w.Outside, net.JoinHostPort(enginetest.OutsideIP6, "7001"), 2, 4<<20)
}

// KubeVirt 1780, IPv6: the guest lives in the network that the spec names.
func TestRow59Row61OwnNetwork6_KubeVirt1780(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "dhclient", "ping")
	for _, path := range []string{"packet", "socket"} {
		t.Run(path, func(t *testing.T) {
			w := enginetest.NewWorld(t, enginetest.WorldOptions{IPv6: true})
			p := startSidewire(t, w, strings.Replace(spec("vm", 1, "tcp:8080"), "pod: {}", `pod: {vmIPv6NetworkCIDR: "fd10:10:10::2/120"}`, 1), "--path", path)
			v := sixVM(t, p).autoconf()
			assert.Contains(t, v.run("ip", "-6", "-o", "addr", "show", "dev", "eth0"), "fd10:10:10::2/128")
			v.run("ping", "-6", "-c", "1", "-W", "5", "fd10:10:10::1")
			seen := make(chan string, 1)
			listen(t, v.ns, "tcp6", "[fd10:10:10::2]:8080", func(c net.Conn) { seen <- c.RemoteAddr().(*net.TCPAddr).IP.String() })
			c, err := w.Outside.Dial("tcp6", net.JoinHostPort(enginetest.PodIP6, "8080"), 5*time.Second)
			require.NoError(t, err)
			c.Close()
			assert.Equal(t, enginetest.OutsideIP6, <-seen)
			_, err = w.Outside.Dial("tcp6", net.JoinHostPort(enginetest.PodIP6, "8081"), 5*time.Second)
			assert.ErrorContains(t, err, "refused")
			assert.Equal(t, "fd10:10:10::2", p.status().Interfaces[0].IPv6.Guest.String())
		})
	}
}

// A pod with IPv6 alone: no DHCPv4; names can be resolved all the same, with the
// pod's search domains.
func TestRow63SingleStack(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "dhclient", "curl", "ping", "dig")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{Only: true})
	before := footprint(t, w.Pod)
	p := startSidewire(t, w, spec("vm", 1), "--resolv-conf", w.ResolvConf6())
	v := sixVM(t, p).autoconf()
	v.bySix(w, "8080")
	leased, err := os.ReadFile(filepath.Join(v.dir, "resolv.conf"))
	require.NoError(t, err)
	assert.Contains(t, string(leased), "nameserver "+enginetest.OutsideIP6)
	assert.Contains(t, string(leased), "search default.svc.cluster.local")
	assert.Contains(t, v.run("dig", "+short", "@"+enginetest.OutsideIP6, enginetest.OutsideName), enginetest.OutsideIP)
	st := p.status().Interfaces[0]
	assert.False(t, st.Guest.IsValid())
	assert.Nil(t, st.NAT)
	p.stop()
	assert.Empty(t, changes(before, footprint(t, w.Pod)))
}

// A pod with IPv4 alone has nothing of IPv6 for the guest, as under KubeVirt.
func TestRow61NoSixWithoutThePods(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "dhclient")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startSidewire(t, w, spec("vm", 1))
	v := startVM(t, p, vhosttest.Options{})
	assert.NotContains(t, v.run("ip", "-6", "route"), "default")
	assert.Nil(t, p.status().Interfaces[0].IPv6)
}
