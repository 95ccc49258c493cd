package main

import (
	"net"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

// byHand gives the guest what the guide has cloud-init set.
func (v *vm) byHand() *vm {
	v.t.Helper()
	enginetest.Must(v.t, v.ns.Sysctl("net/ipv6/conf/eth0/accept_ra", "0"), v.ns.Up("eth0"), v.ns.Addr("eth0", guestSix+"/120"), v.ns.Route("default", gatewaySix))
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
