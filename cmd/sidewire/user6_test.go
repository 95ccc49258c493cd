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
)

// udpTurn has somebody ask a UDP echo server, which says who has asked.
func udpTurn(t *testing.T, from, at *enginetest.NetNS, listen, to string) (seen string) {
	t.Helper()
	pc, err := at.ListenPacket("udp6", listen)
	require.NoError(t, err)
	defer pc.Close()
	go func() {
		b := make([]byte, 1<<16)
		for {
			n, who, err := pc.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = pc.WriteTo(append([]byte(who.(*net.UDPAddr).IP.String()+" "), b[:n]...), who)
		}
	}()
	c, err := from.Dial("udp6", to, time.Second)
	require.NoError(t, err)
	defer c.Close()
	for _, n := range []int{0, 1, 1400, 4000, 20000} { // longer ones come in fragments
		msg := string(enginetest.Payload(n, byte(n)))
		_, err = c.Write([]byte(msg))
		require.NoError(t, err)
		require.NoError(t, c.SetReadDeadline(time.Now().Add(soon)))
		b := make([]byte, 1<<16)
		k, err := c.Read(b)
		require.NoError(t, err, "%d bytes", n)
		var got string
		seen, got, _ = strings.Cut(string(b[:k]), " ")
		require.Equal(t, msg, got, "%d bytes", n)
	}
	return seen
}

// Without any privilege a guest has IPv6 beside IPv4 by itself: the route by our
// advertisements, the address by DHCPv6.
func TestRow61DualStackOnSockets(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "dhclient", "curl", "ping")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{IPv6: true})
	pings(t, w)
	p := startNobody(t, w, spec("vm", 2, "tcp:8080", "udp:8080", "tcp:8090", "udp:8090"))
	v := sixVM(t, p).autoconf()
	v.dhclient("-1")
	t.Cleanup(func() { v.dhclient("-x") })
	assert.Contains(t, v.run("ip", "-6", "-o", "addr", "show", "dev", "eth0"), guestSix+"/128")
	assert.Contains(t, v.run("ip", "-4", "-o", "addr", "show", "dev", "eth0"), "10.0.2.2/24")
	v.bySix(w, "8080")
	outside, pod := net.JoinHostPort(enginetest.OutsideIP6, "5000"), net.JoinHostPort(enginetest.PodIP6, "8080")
	assert.Equal(t, enginetest.PodIP6, udpTurn(t, v.ns, w.Outside, outside, outside))
	assert.Equal(t, enginetest.OutsideIP6, udpTurn(t, w.Outside, v.ns, net.JoinHostPort(guestSix, "8080"), pod), "the guest sees its client")
	assert.Equal(t, gatewaySix, udpTurn(t, w.Pod, v.ns, net.JoinHostPort(guestSix, "8080"), "[::1]:8080"), "the pod's own processes are the gateway")
	seen := make(chan string, 1)
	listen(t, w.Pod, "tcp6", "[::1]:7000", func(c net.Conn) { seen <- c.RemoteAddr().(*net.TCPAddr).IP.String() })
	c, err := v.ns.Dial("tcp6", net.JoinHostPort(gatewaySix, "7000"), soon)
	require.NoError(t, err)
	c.Close()
	assert.Equal(t, "::1", <-seen, "the gateway is the pod's loopback")
	assert.True(t, strings.HasPrefix(v.run("curl", "-sS", "--max-time", "10", outsideURL("/whoami")), enginetest.PodIP+":"))
	v.reached(w, "8090", enginetest.OutsideIP)
	st := p.status().Interfaces[0]
	require.NotNil(t, st.IPv6)
	require.NotNil(t, st.IPv6.Sockets)
	assert.Equal(t, guestSix, st.IPv6.Guest.String())
	assert.Equal(t, enginetest.PodIP6, st.IPv6.Pod.String())
	assert.NotZero(t, st.IPv6.Sockets.TCPOpened)
	assert.Len(t, st.Leases, 2)
	assert.Len(t, st.Forwards, 4)
	assert.Contains(t, sidewire(t, "flows", "--socket-dir", p.dir).out, guestSix)
	assert.Contains(t, sidewire(t, "status", "--socket-dir", p.dir).out, "guest "+guestSix+", gateway "+gatewaySix+", pod "+enginetest.PodIP6)
}

// A pod with IPv6 alone: no DHCPv4, the pod's resolvers and domains by DHCPv6.
// Where the guest cannot reach a resolver itself, the gateway asks it.
func TestRow63SingleStackOnSockets(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "dhclient", "curl", "ping", "dig")
	for name, resolv := range map[string]string{"resolver of IPv6": "", "resolver of IPv4": "nameserver " + enginetest.OutsideIP + "\nsearch one.example\n"} {
		t.Run(name, func(t *testing.T) {
			w := enginetest.NewWorld(t, enginetest.WorldOptions{Only: true})
			pings(t, w)
			at, domain := enginetest.OutsideIP6, "default.svc.cluster.local"
			conf := w.ResolvConf6()
			if resolv != "" {
				at, domain = gatewaySix, "one.example"
				conf = writeFile(t, "resolv.conf", resolv)
				enginetest.Must(t, w.Pod.Addr("lo", "192.0.2.9/32"), os.Chmod(filepath.Dir(conf), 0o755))
			}
			b, err := os.ReadFile(conf)
			require.NoError(t, err)
			p := prepareNobody(t, w, spec("vm", 1, "tcp:8080"))
			require.NoError(t, os.WriteFile(filepath.Join(p.dir, "resolv.conf"), b, 0o644))
			p.launch(p.nobody(w))
			t.Cleanup(p.stop)
			v := sixVM(t, p).autoconf()
			v.bySix(w, "8080")
			leased, err := os.ReadFile(filepath.Join(v.dir, "resolv.conf"))
			require.NoError(t, err)
			assert.Contains(t, string(leased), "nameserver "+at)
			assert.Contains(t, string(leased), "search "+domain)
			if resolv == "" {
				assert.Contains(t, v.run("dig", "+short", "@"+at, enginetest.OutsideName), enginetest.OutsideIP)
			}
			st := p.status().Interfaces[0]
			assert.False(t, st.Guest.IsValid())
			assert.Nil(t, st.Sockets)
			require.NotNil(t, st.IPv6)
			assert.Len(t, st.Leases, 1)
			assert.NotContains(t, sidewire(t, "status", "--socket-dir", p.dir).out, "invalid")
		})
	}
}

// What the guide has cloud-init do: these very addresses, set by hand.
func TestRow61Row62StaticOnSockets(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "curl", "ping")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{IPv6: true})
	pings(t, w)
	p := startNobody(t, w, spec("vm", 1, "tcp:8080"))
	v := sixVM(t, p).byHand()
	v.bySix(w, "8080")
	// A port that is not listed is the pod's; one that is added is the guest's.
	_, err := w.Outside.Dial("tcp6", net.JoinHostPort(enginetest.PodIP6, "8081"), 5*time.Second)
	assert.ErrorContains(t, err, "refused")
	require.Zero(t, sidewire(t, "forward", "--socket-dir", p.dir, "add", "tcp:8081").code)
	seen := make(chan string, 1)
	listen(t, v.ns, "tcp6", net.JoinHostPort(guestSix, "8081"), func(c net.Conn) {
		seen <- c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().String()
	})
	c, err := w.Outside.Dial("tcp6", net.JoinHostPort(enginetest.PodIP6, "8081"), 5*time.Second)
	require.NoError(t, err)
	defer c.Close()
	assert.Equal(t, enginetest.OutsideIP6, <-seen)
	require.Zero(t, sidewire(t, "forward", "--socket-dir", p.dir, "remove", "tcp:8081").code)
	_, err = w.Outside.Dial("tcp6", net.JoinHostPort(enginetest.PodIP6, "8081"), 5*time.Second)
	assert.ErrorContains(t, err, "refused")
}

// A redirect leads ranges of ports by IPv4, sockets of their own do by IPv6.
func TestRow61PortRangesOnSockets(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{IPv6: true})
	p := startWith(t, w, ",+net_admin", withRanges(spec("vm", 1), "tcp:2000-2009"), rangesGate)
	v := sixVM(t, p).byHand()
	enginetest.Must(t, v.ns.Addr("eth0", "10.0.2.2/24"), v.ns.Route("default", "10.0.2.1"))
	seen := make(chan string, 1)
	listen(t, v.ns, "tcp", ":2009", func(c net.Conn) { seen <- c.RemoteAddr().(*net.TCPAddr).IP.String() })
	// The guest's frames tell who it is.
	v.try("ping", "-c", "1", "-W", "1", "10.0.2.1")
	for client, to := range map[string]string{enginetest.OutsideIP: enginetest.PodIP, enginetest.OutsideIP6: enginetest.PodIP6} {
		c, err := w.Outside.Dial("tcp", net.JoinHostPort(to, "2009"), soon)
		require.NoError(t, err)
		c.Close()
		assert.Equal(t, client, <-seen)
	}
	assert.Len(t, p.status().Interfaces[0].Forwards, 1)
}
