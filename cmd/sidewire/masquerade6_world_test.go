package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
)

// A link behind the pod's router is narrower than the guest's: its router says
// so, the guest's kernel sends less from then on, and a transfer goes through
// (RFC 8201).
func TestRFC8201Row61PathMTU(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "ip")
	const near, far = "2001:db8:2::1", "2001:db8:2::2"
	w := enginetest.NewWorld(t, enginetest.WorldOptions{IPv6: true})
	beyond := enginetest.NewNetNS(t)
	require.NoError(t, enginetest.CreateVeth(w.Outside, "veth1", beyond, "eth0"))
	enginetest.Must(t, w.Outside.Sysctl("net/ipv6/conf/all/forwarding", "1"),
		w.Outside.Addr("veth1", near+"/64"), beyond.Addr("eth0", far+"/64"), w.Outside.Run("ip", "link", "set", "veth1", "mtu", "1400"),
		beyond.Route("default", near))
	p := startSidewire(t, w, spec("vm", 1))
	v := sixVM(t, p).byHand()
	carry(t, v.ns, beyond, net.JoinHostPort(far, "7000"), 2, 4<<20)
	assert.Contains(t, v.run("ip", "-6", "route", "get", far), "mtu 1400")
	if t.Failed() {
		t.Log(p.dump())
	}
}

// A pod with IPv6 alone whose one resolver is on its loopback: the guest is told
// of the gateway, which asks there.
func TestRow63Row64LoopbackResolver6(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "dhclient", "dig")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{Only: true})
	c := net.ListenConfig{Control: control(func(fd int) error { return unix.BindToDevice(fd, "lo") })}
	serveDNS(t, w.Pod, c, "6", "[::1]:53", stub)
	p := startSidewire(t, w, spec("vm", 1), "--resolv-conf", writeFile(t, "resolv.conf", "nameserver ::1\nsearch cluster.local\n"))
	v := sixVM(t, p).autoconf()
	leased, err := os.ReadFile(filepath.Join(v.dir, "resolv.conf"))
	require.NoError(t, err)
	assert.Contains(t, string(leased), "nameserver "+gatewaySix)
	assert.Contains(t, string(leased), "search cluster.local")
	for _, how := range []string{"+notcp", "+tcp"} {
		assert.Equal(t, "192.0.2.53", strings.TrimSpace(v.run("dig", "+short", "+time=3", "+tries=1", how, "@"+gatewaySix, "some.example")))
	}
	// The relay is the guest's alone.
	_, err = w.Outside.Dial("tcp6", net.JoinHostPort(enginetest.PodIP6, "53"), soon)
	assert.ErrorContains(t, err, "refused")
}

// The default route that the guest's kernel takes from us stays while the guest
// says nothing, for whatever time (RFC 4191).
func TestRFC4191Row61RouteWithoutEnd(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "dhclient", "ip")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{IPv6: true})
	p := startSidewire(t, w, spec("vm", 1))
	v := sixVM(t, p)
	if _, err := os.Stat("/proc/sys/net/ipv6/conf/lo/accept_ra_rt_info_max_plen"); err != nil {
		t.Skip("this kernel knows no route options")
	}
	v.autoconf()
	route := v.run("ip", "-6", "route", "show", "default")
	assert.NotContains(t, route, "expires", "an end of its own")
	v.run("ping", "-6", "-c", "1", "-W", "5", enginetest.OutsideIP6)
}

// With IPv6 an idle guest wakes nobody up either.
func TestRow61IdleWithSix(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "dhclient", "curl")
	if testing.Short() {
		t.Skip("takes 10 s")
	}
	w := enginetest.NewWorld(t, enginetest.WorldOptions{IPv6: true})
	p := startSidewire(t, w, spec("vm", 1))
	v := sixVM(t, p).byHand()
	carry(t, v.ns, w.Outside, net.JoinHostPort(enginetest.OutsideIP6, "7000"), 2, 4<<20)
	require.Equal(t, gatewaySix, peerOf(t, v.ns, w.Pod, "[::]:80", net.JoinHostPort(guestSix, "80")))
	p.staysQuiet(v)
	assert.Less(t, rssAnon(t, p.cmd.Process.Pid), 20<<10, "KiB of anonymous memory")
}

// A distribution's kernel in QEMU takes its route from our advertisement, reaches
// the outside and is reached from there.
func TestRow61QEMUGuest6(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	enginetest.Need(t, "netns", "tun", "nft", "qemu", "kernel")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{IPv6: true, MTU: 1450})
	p := startSidewire(t, w, spec("vm", 2, "tcp:80"))
	g := enginetest.Guest(t, t.TempDir(), enginetest.GuestOptions{Args: qemuArgs(t, w, p), Memory: -1, CPUs: -1, Machine: "q35"})
	do := func(c enginetest.GuestCmd) enginetest.GuestReply {
		t.Helper()
		r, err := g.Do(c)
		if err != nil {
			t.Fatalf("%v\n%s\n%+v", err, p.dump(), p.status().Interfaces[0].IPv6)
		}
		return r
	}
	// The address as DHCPv6 would have it set.
	do(enginetest.GuestCmd{Do: "addr", Addr: guestSix + "/128"})
	routed := func() bool {
		r := do(enginetest.GuestCmd{Do: "file", Path: "/proc/net/ipv6_route"})
		for l := range strings.Lines(r.Data) {
			if f := strings.Fields(l); len(f) == 10 && f[1] == "00" && f[4] == "fe80000000000000000000fffe000000" && f[9] == "eth0" {
				return true
			}
		}
		return false
	}
	enginetest.Eventually(t, 60*time.Second, routed)
	r := do(enginetest.GuestCmd{Do: "file", Path: "/proc/net/ipv6_route"})
	assert.Regexp(t, `fd100000000200000000000000000000 78 .* eth0`, r.Data, "the network is on the link")
	// The guest's kernel asks whether somebody has its addresses: nobody does.
	const permanent = "80"
	enginetest.Eventually(t, 60*time.Second, func() bool {
		fine := 0
		for l := range strings.Lines(do(enginetest.GuestCmd{Do: "file", Path: "/proc/net/if_inet6"}).Data) {
			if f := strings.Fields(l); len(f) == 6 && f[5] == "eth0" && f[4] == permanent {
				fine++
			}
		}
		return fine == 2
	})
	url := fmt.Sprintf("http://%s/data", net.JoinHostPort(enginetest.OutsideIP6, "9000"))
	r = do(enginetest.GuestCmd{Do: "http_get", Timeout: time.Minute, URL: url + fmt.Sprintf("?bytes=%d", 4<<20)})
	assert.Equal(t, enginetest.DataSum(4<<20), r.Sum)
	r = do(enginetest.GuestCmd{Do: "http_put", Timeout: time.Minute, Bytes: 4 << 20, URL: url})
	assert.Equal(t, enginetest.DataSum(4<<20), strings.TrimSpace(r.Body))
	do(enginetest.GuestCmd{Do: "listen", Kind: "http", Port: 80})
	c, err := w.Outside.Dial("tcp6", net.JoinHostPort(enginetest.PodIP6, "80"), soon)
	require.NoError(t, err)
	require.NoError(t, c.Close())
	assert.Equal(t, "1450", strings.TrimSpace(do(enginetest.GuestCmd{Do: "file", Path: "/proc/sys/net/ipv6/conf/eth0/mtu"}).Data))
	st := p.status().Interfaces[0]
	require.NotNil(t, st.IPv6)
	assert.NotZero(t, st.IPv6.Router.RouterSolicits)
}
