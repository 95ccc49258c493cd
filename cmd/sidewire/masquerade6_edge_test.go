package main

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
	"sidewire/vhostuser/vhosttest"
)

// byHand gives the guest what the guide has cloud-init set.
func (v *vm) byHand() *vm { return v.at(guestSix, gatewaySix) }

// at gives the guest an address and a gateway, in the place of a router that its
// kernel may have heard of already.
func (v *vm) at(addr, gateway string) *vm {
	v.t.Helper()
	enginetest.Must(v.t, v.ns.Sysctl("net/ipv6/conf/eth0/accept_ra", "0"), v.ns.Up("eth0"), v.ns.Addr("eth0", addr+"/120"),
		v.ns.Run("ip", "-6", "route", "replace", "default", "via", gateway, "dev", "eth0"))
	return v
}

// peerOf is whom a server in ns on a TCP address sees when from connects to it by
// another, "" if nobody comes.
func peerOf(t *testing.T, server, from *enginetest.NetNS, at, by string) string {
	t.Helper()
	seen := make(chan string, 1)
	l := listen(t, server, "tcp6", at, func(c net.Conn) { seen <- c.RemoteAddr().(*net.TCPAddr).IP.String() })
	defer l.Close()
	c, err := from.Dial("tcp6", by, 5*time.Second)
	if err != nil {
		return err.Error()
	}
	c.Close()
	return <-seen
}

// Guest and pod reach each other, also by addresses of the pod's that are no
// gateway's, and before they have met.
func TestRow58PodAndGuest6(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "ping")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{IPv6: true})
	p := startSidewire(t, w, spec("vm", 1))
	v := sixVM(t, p).byHand()
	assert.Equal(t, guestSix, peerOf(t, w.Pod, v.ns, "[::]:7777", net.JoinHostPort(enginetest.PodIP6, "7777")))
	assert.Equal(t, guestSix, peerOf(t, w.Pod, v.ns, "[::]:7778", net.JoinHostPort(gatewaySix, "7778")))
	assert.Equal(t, gatewaySix, peerOf(t, v.ns, w.Pod, "[::]:80", net.JoinHostPort(guestSix, "80")))
	// No hairpin, as under KubeVirt: a listener of the guest's alone is not there.
	listen(t, v.ns, "tcp6", "[::]:81", func(net.Conn) {})
	_, err := v.ns.Dial("tcp6", net.JoinHostPort(enginetest.PodIP6, "81"), 5*time.Second)
	assert.ErrorContains(t, err, "refused")
	if t.Failed() {
		t.Log(p.dump())
	}
}

// What keeps IPv6 from a guest costs it no IPv4.
func TestRow53PodsWithoutSix(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "dhclient", "curl")
	for _, c := range []struct {
		name    string
		mtu     int
		six     bool
		sysctls map[string]string
	}{
		{name: "MTU below 1280", mtu: 1200},
		{name: "IPv6 switched off", sysctls: map[string]string{"net/ipv6/conf/all/disable_ipv6": "1", "net/ipv6/conf/default/disable_ipv6": "1"}},
		{name: "IPv6 switched off for new links", six: true, sysctls: map[string]string{"net/ipv6/conf/default/disable_ipv6": "1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := enginetest.NewWorld(t, enginetest.WorldOptions{MTU: c.mtu, IPv6: c.six})
			for name, value := range c.sysctls {
				require.NoError(t, w.Pod.Sysctl(name, value))
			}
			before := footprint(t, w.Pod)
			p := startSidewire(t, w, spec("vm", 1))
			v := startVM(t, p, vhosttest.Options{})
			assert.True(t, strings.HasPrefix(v.run("curl", "-sS", "--max-time", "10", outsideURL("/whoami")), enginetest.PodIP+":"))
			st := p.status().Interfaces[0]
			assert.Equal(t, "packet", st.Path)
			assert.Equal(t, c.six, st.IPv6 != nil)
			p.stop()
			assert.Empty(t, changes(before, footprint(t, w.Pod)))
		})
	}
}

// A crash costs a guest no more than the time until the next start: it is reached
// before it has said a word, and reaches others, whatever it lists.
func TestRow61SixSurvivesACrash(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "ping")
	for _, ports := range [][]string{nil, {"tcp:80"}} {
		w := enginetest.NewWorld(t, enginetest.WorldOptions{IPv6: true})
		before := footprint(t, w.Pod)
		p := startSidewire(t, w, spec("vm", 1, ports...))
		v := sixVM(t, p).byHand()
		both := func() {
			assert.Equal(t, enginetest.OutsideIP6, peerOf(t, v.ns, w.Outside, "[::]:80", net.JoinHostPort(enginetest.PodIP6, "80")))
			assert.Equal(t, enginetest.PodIP6, peerOf(t, w.Outside, v.ns, "[::]:9001", net.JoinHostPort(enginetest.OutsideIP6, "9001")))
			assert.Equal(t, gatewaySix, peerOf(t, v.ns, w.Pod, "[::]:82", net.JoinHostPort(guestSix, "82")))
		}
		both()
		pods := listen(t, w.Outside, "tcp6", "[::]:9002", func(c net.Conn) { _, _ = io.Copy(c, c) })
		defer pods.Close()
		own, err := w.Pod.Dial("tcp6", net.JoinHostPort(enginetest.OutsideIP6, "9002"), soon)
		require.NoError(t, err)
		defer own.Close()
		require.True(t, echoes(t, own, "before"))
		p.kill()
		require.True(t, echoes(t, own, "while nobody is there"))
		p.start(w)
		require.NoError(t, v.tap.Reconnect())
		require.True(t, echoes(t, own, "the pod's own connection goes on"))
		both()
		if t.Failed() {
			t.Log(p.dump())
		}
		p.stop()
		assert.Empty(t, changes(before, footprint(t, w.Pod)))
	}
}

// Host bits of the network are masked off, as under KubeVirt.
func TestRow61OwnNetwork6(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "dhclient", "ping")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{IPv6: true})
	p := startSidewire(t, w, strings.Replace(spec("vm", 1), "pod: {}", "pod: {vmIPv6NetworkCIDR: 'fd10:10:10::2/120'}", 1))
	v := sixVM(t, p).autoconf()
	assert.Contains(t, v.run("ip", "-6", "-o", "addr", "show", "dev", "eth0"), "fd10:10:10::2/128")
	assert.Contains(t, v.run("ip", "-6", "route"), "fd10:10:10::/120 dev eth0")
	v.run("ping", "-6", "-c", "1", "-W", "5", "fd10:10:10::1")
	v.run("ping", "-6", "-c", "1", "-W", "5", enginetest.OutsideIP6)
	st := p.status().Interfaces[0].IPv6
	require.NotNil(t, st)
	assert.Equal(t, "fd10:10:10::1", st.Gateway.String())
	assert.NotContains(t, p.log.String(), "level=WARN")
}

// plugSix is sixVM for the guest of a name.
func plugSix(t *testing.T, p *process, name string, mac frame.MAC) *vm {
	t.Helper()
	v := &vm{t: t, ns: enginetest.NewNetNS(t), dir: t.TempDir()}
	require.NoError(t, v.ns.Sysctl("net/ipv6/conf/default/accept_dad", "0"))
	var err error
	v.tap, err = vhosttest.StartTapGuest(vhosttest.TapOptions{
		Options: vhosttest.Options{Path: filepath.Join(p.dir, name, "red.sock"), MAC: mac}, NetNS: v.ns.Path,
	})
	require.NoError(t, err)
	t.Cleanup(func() { v.tap.Close() })
	return v
}

// Of two guests behind one address those have IPv6 that have networks of their
// own; of two with the same it is the first, and one warning says how the other
// can.
func TestRow61TwoGuests6(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "dhclient", "curl")
	noMAC := func(doc string) string {
		return strings.Replace(doc, "        macAddress: "+guestMAC.String()+"\n", "", 1)
	}
	docs := spec("vm", 1, "tcp:80") + "---\n" + noMAC(spec("vm2", 1, "tcp:81"))
	w := enginetest.NewWorld(t, enginetest.WorldOptions{IPv6: true})
	t.Run("the same network", func(t *testing.T) {
		p := startSidewire(t, w, docs)
		a, b := plugSix(t, p, "vm", guestMAC).byHand(), plugSix(t, p, "vm2", frame.MAC{2, 0, 0, 0, 0xaa, 2}).byHand()
		assert.Equal(t, enginetest.OutsideIP6, peerOf(t, a.ns, w.Outside, "[::]:80", net.JoinHostPort(enginetest.PodIP6, "80")))
		assert.Contains(t, peerOf(t, b.ns, w.Outside, "[::]:81", net.JoinHostPort(enginetest.PodIP6, "81")), "refused", "the pod's")
		b.dhclient("-1")
		t.Cleanup(func() { b.dhclient("-x") })
		assert.True(t, strings.HasPrefix(b.run("curl", "-sS", "--max-time", "10", outsideURL("/whoami")), enginetest.PodIP+":"), "IPv4 is there")
		assert.Equal(t, 1, strings.Count(p.log.String(), "level=WARN"))
		assert.Contains(t, p.log.String(), "vmIPv6NetworkCIDR")
		assert.NotNil(t, p.status().Interfaces[0].IPv6)
		assert.Nil(t, p.status().Interfaces[1].IPv6)
	})
	t.Run("networks of their own", func(t *testing.T) {
		at := strings.LastIndex(docs, "pod: {}")
		p := startSidewire(t, w, docs[:at]+"pod: {vmIPv6NetworkCIDR: 'fd10:0:3::/120'}\n")
		a, b := plugSix(t, p, "vm", guestMAC).byHand(), plugSix(t, p, "vm2", frame.MAC{2, 0, 0, 0, 0xaa, 2})
		b.at("fd10:0:3::2", "fd10:0:3::1")
		assert.Equal(t, enginetest.OutsideIP6, peerOf(t, a.ns, w.Outside, "[::]:80", net.JoinHostPort(enginetest.PodIP6, "80")))
		assert.Equal(t, enginetest.OutsideIP6, peerOf(t, b.ns, w.Outside, "[::]:81", net.JoinHostPort(enginetest.PodIP6, "81")))
		for _, v := range []*vm{a, b} {
			assert.Equal(t, enginetest.PodIP6, peerOf(t, w.Outside, v.ns, "[::]:9001", net.JoinHostPort(enginetest.OutsideIP6, "9001")))
		}
		assert.NotContains(t, p.log.String(), "level=WARN")
	})
	// The one that has everything has no IPv6: what is no listed port's is the pod's.
	t.Run("everything without IPv6", func(t *testing.T) {
		p := startSidewire(t, w, spec("vm", 1, "tcp:80")+"---\n"+noMAC(spec("vm2", 1)))
		a := plugSix(t, p, "vm", guestMAC).byHand()
		assert.Equal(t, enginetest.OutsideIP6, peerOf(t, a.ns, w.Outside, "[::]:80", net.JoinHostPort(enginetest.PodIP6, "80")))
		assert.Equal(t, enginetest.OutsideIP6, peerOf(t, w.Pod, w.Outside, "[::]:81", net.JoinHostPort(enginetest.PodIP6, "81")))
		out, err := w.Outside.Command("ping", "-6", "-c", "1", "-W", "5", enginetest.PodIP6).CombinedOutput()
		assert.NoError(t, err, "%s", out)
	})
}

// What is forwarded at run time is so for both families, and no more when it is
// taken back.
func TestRow54Row61ForwardAtRunTime(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{IPv6: true})
	p := startSidewire(t, w, spec("vm", 1, "tcp:80"))
	v := sixVM(t, p).byHand()
	enginetest.Must(t, v.ns.Addr("eth0", "10.0.2.2/24"), v.ns.Route("default", "10.0.2.1"))
	forward := func(verb string) {
		o := sidewire(t, "forward", "--socket-dir", p.dir, verb, "vm/red", "tcp:8080")
		require.Zero(t, o.code, o.err)
	}
	listen(t, v.ns, "tcp", "[::]:8080", func(net.Conn) {})
	reached := func() (out []bool) {
		for _, at := range []string{enginetest.PodIP, enginetest.PodIP6} {
			c, err := w.Outside.Dial("tcp", net.JoinHostPort(at, "8080"), 5*time.Second)
			if err == nil {
				c.Close()
			} else {
				assert.ErrorContains(t, err, "refused")
			}
			out = append(out, err == nil)
		}
		return out
	}
	require.Equal(t, []bool{false, false}, reached())
	forward("add")
	assert.Equal(t, []bool{true, true}, reached())
	forward("remove")
	assert.Equal(t, []bool{false, false}, reached())
	forward("add")
	assert.Equal(t, []bool{true, true}, reached())
}

// A guest that plays router, openly or behind a header that hides it, changes
// nothing in its pod (RFC 6104).
func TestRFC6104Row58RogueRouter(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "ip")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{IPv6: true})
	p := startSidewire(t, w, spec("vm", 1))
	v := sixVM(t, p).byHand()
	look := func() (out string) {
		for _, what := range []string{"route", "addr", "neigh"} {
			b, err := w.Pod.Command("ip", "-6", "-o", what, "show", "dev", p.status().Interfaces[0].Links[2].Name).Output()
			require.NoError(t, err)
			if what == "neigh" { // of what the guest says
				assert.NotContains(t, string(b), "fe80::bad")
			} else {
				out += string(b)
			}
		}
		return out
	}
	before := look()
	from := netip.MustParseAddr("fe80::bad")
	prefix := append([]byte{3, 4, 64, 0xc0, 0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff, 0, 0, 0, 0}, netip.MustParseAddr("2001:db8:bad::").AsSlice()...)
	advert := append([]byte{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 0, 0, 0, 0xaa, 1}, prefix...)
	frames := func(to string, dst frame.MAC) (out [][]byte) {
		plain := enginetest.ICMPFrame(enginetest.Eth{Dst: dst, Src: guestMAC}, enginetest.IP{Src: from, Dst: netip.MustParseAddr(to)},
			enginetest.ICMP{Type: 134, Rest: 64<<24 | 0x00<<16 | 9000}, advert)
		plain[21] = 255
		hidden := slices.Concat(plain[:54], []byte{58, 0, 1, 4, 0, 0, 0, 0}, plain[54:])
		hidden[20] = 60
		binary.BigEndian.PutUint16(hidden[18:], uint16(len(hidden)-54))
		return append(out, plain, hidden)
	}
	var all [][]byte
	for to, dst := range map[string]frame.MAC{gatewaySix: {2}, "fe80::ff:fe00:0": {2}, "ff02::1": {0x33, 0x33, 0, 0, 0, 1}} {
		all = append(all, frames(to, dst)...)
	}
	require.NoError(t, v.ns.Do(func() error {
		l, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, f := range all {
			err = errors.Join(err, unix.Sendto(fd, f, 0, &unix.SockaddrLinklayer{Ifindex: l.Index, Protocol: 0xdd86}))
		}
		return err
	}))
	// What comes behind them has been heard.
	require.Equal(t, guestSix, peerOf(t, w.Pod, v.ns, "[::]:7777", net.JoinHostPort(gatewaySix, "7777")))
	assert.Equal(t, before, look())
	assert.NotZero(t, p.status().Interfaces[0].IPv6.Router.FromServer)
}
