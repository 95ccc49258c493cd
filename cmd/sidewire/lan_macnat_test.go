package main

import (
	"bytes"
	"encoding/hex"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
	"sidewire/engine/uplink"
	"sidewire/vhostuser/vhosttest"
)

// macvlanPod is a pod to which its CNI has given a macvlan on a node's link that
// leads outside, and left it without an address.
func macvlanPod(t *testing.T, mode string) (pod, outside *enginetest.NetNS, mac frame.MAC) {
	t.Helper()
	pod, outside, _, mac = childPod(t, "macvlan", mode)
	return pod, outside, mac
}

// childPod is a pod with a link of a kind as net1, on a node's link "parent" that
// leads outside.
func childPod(t *testing.T, kind, mode string) (pod, outside, host *enginetest.NetNS, mac frame.MAC) {
	t.Helper()
	enginetest.Need(t, "root", "netns", "tun", "ip", "ping")
	pod, outside = enginetest.NewNetNS(t), enginetest.NewNetNS(t)
	host = enginetest.NewNetNS(t)
	for _, n := range []*enginetest.NetNS{pod, outside, host} {
		require.NoError(t, n.Sysctl("net/ipv6/conf/default/accept_dad", "0"))
	}
	enginetest.Veth(t, host, "parent", outside, "eth0")
	enginetest.Must(t,
		host.Run("ip", "link", "add", "link", "parent", "name", "mv", "type", kind, "mode", mode),
		host.Run("ip", "link", "set", "mv", "netns", pod.Path, "name", "net1"),
		pod.Up("net1"), outside.Addr("eth0", "10.9.0.250/24"), outside.Run("ip", "addr", "add", "fd09::250/64", "dev", "eth0", "nodad"),
	)
	atRest(t, pod, "net1")
	mac, err := pod.MAC("net1")
	require.NoError(t, err)
	return pod, outside, host, mac
}

// talkers listens on a link for who sends there, until it is asked.
func talkers(t *testing.T, ns *enginetest.NetNS, link string) func() map[frame.MAC]bool {
	t.Helper()
	var up *uplink.Uplink
	require.NoError(t, ns.Do(func() (err error) {
		up, err = uplink.Open(uplink.Config{Link: link, Workers: 1, Promiscuous: true})
		return err
	}))
	t.Cleanup(func() { up.Close() })
	return func() map[frame.MAC]bool {
		out := map[frame.MAC]bool{}
		b, q := new(frame.Batch), up.Queues()[0]
		for {
			b.Reset(0)
			n := q.Pull(b)
			if n == 0 {
				return out
			}
			for i := range n {
				f := b.Frame(i)
				out[frame.MAC(f.Src())] = true
				if f.EtherType() == frame.TypeARP {
					out[frame.MAC(f.Head[22:28])] = true
				}
			}
			q.Release(b)
		}
	}
}

// neighbour is the hardware address that a namespace knows of an IP address.
func neighbour(ns *enginetest.NetNS, ip string) string {
	out, _ := ns.Command("ip", "neigh", "show", "to", ip).Output()
	f := strings.Fields(string(out))
	for i := range f {
		if f[i] == "lladdr" && i+1 < len(f) {
			return f[i+1]
		}
	}
	return ""
}

// with6 gives a guest an IPv6 address too.
func (v *vm) with6(cidr string) *vm {
	v.t.Helper()
	v.run("ip", "addr", "add", cidr, "dev", "eth0", "nodad")
	return v
}

// KubeVirt says that a bridge on a macvlan does not work (kubevirt#5483): what the
// guest sends from its own hardware address is lost. Here the link's is on the
// wire, in frames, ARP and neighbour discovery, and nothing is missing.
func TestMacvlanRow11Row13(t *testing.T) {
	for _, mode := range []string{"bridge", "private", "vepa", "passthru"} {
		t.Run(mode, func(t *testing.T) {
			pod, outside, mac := macvlanPod(t, mode)
			before := footprint(t, pod)
			p := startLAN(t, onLAN("vm1", "blue", 2)+definition("blue", `{"type": "macvlan", "master": "parent", "mode": "`+mode+`"}`), "--netns", pod.Path)
			heard := talkers(t, outside, "eth0")
			a := plugVM(t, p, "vm1", vhosttest.Options{QueuePairs: 2}).withAddr("10.9.0.1/24").with6("fd09::1/64")
			guest := p.macOf("vm1/net")
			require.NotEqual(t, mac, guest)
			require.True(t, a.pings("10.9.0.250"), "guest to outside")
			require.True(t, a.pings("fd09::250"))
			enginetest.Must(t, outside.Run("ping", "-c", "1", "-W", "2", "10.9.0.1"), outside.Run("ping", "-c", "1", "-W", "2", "fd09::1"))
			carry(t, a.ns, outside, "10.9.0.250:7000", 2, 8<<20)
			carry(t, outside, a.ns, "10.9.0.1:7000", 2, 8<<20)
			carry(t, a.ns, outside, "[fd09::250]:7000", 1, 4<<20)
			carry(t, outside, a.ns, "[fd09::1]:7000", 1, 4<<20)

			on := mac
			if mode == "passthru" {
				on = guest
			}
			got := heard()
			assert.True(t, got[on])
			assert.Equal(t, mode == "passthru", got[guest], "the guest's own address on the wire")
			assert.Equal(t, on.String(), neighbour(outside, "10.9.0.1"))
			assert.Equal(t, on.String(), neighbour(outside, "fd09::1"))
			assert.Equal(t, macOfLink(t, outside, "eth0"), neighbour(a.ns, "10.9.0.250"), "the guest sees who is there")

			o := sidewire(t, "status", "--socket-dir", p.dir)
			if mode == "passthru" {
				assert.NotContains(t, o.out, "translated")
			} else {
				assert.Contains(t, o.out, "on net1")
				assert.Contains(t, o.out, "hardware addresses translated to "+mac.String()+" (macvlan), ")
			}
			p.stop()
			assert.Empty(t, changes(before, footprint(t, pod)))
		})
	}
}

func macOfLink(t *testing.T, ns *enginetest.NetNS, link string) string {
	t.Helper()
	m, err := ns.MAC(link)
	require.NoError(t, err)
	return frame.MAC(m).String()
}

// Two guests share a macvlan: each gets what is for it, from outside and from the
// other, and what the one says to the other does not go out.
func TestMacvlanTwoGuestsRow11(t *testing.T) {
	pod, outside, mac := macvlanPod(t, "bridge")
	docs := onLAN("vm1", "blue", 1) + onLAN("vm2", "blue", 1) + definition("blue", `{"type": "macvlan", "master": "parent"}`)
	p := startLAN(t, docs, "--netns", pod.Path)
	heard := talkers(t, outside, "eth0")
	a := plugVM(t, p, "vm1", vhosttest.Options{}).withAddr("10.9.0.1/24").with6("fd09::1/64")
	b := plugVM(t, p, "vm2", vhosttest.Options{}).withAddr("10.9.0.2/24").with6("fd09::2/64")
	for _, v := range []*vm{a, b} {
		require.True(t, v.pings("10.9.0.250"))
		require.True(t, v.pings("fd09::250"))
	}
	require.True(t, a.pings("10.9.0.2"))
	assert.Equal(t, p.nicOf("vm2/net").MAC, neighbour(a.ns, "10.9.0.2"), "among themselves they have their own addresses")
	for _, ip := range []string{"10.9.0.1", "10.9.0.2", "fd09::1", "fd09::2"} {
		require.NoError(t, outside.Run("ping", "-c", "1", "-W", "2", ip))
		assert.Equal(t, mac.String(), neighbour(outside, ip))
	}
	var wg sync.WaitGroup
	wg.Go(func() { carry(t, outside, a.ns, "10.9.0.1:7000", 2, 4<<20) })
	wg.Go(func() { carry(t, outside, b.ns, "10.9.0.2:7000", 2, 4<<20) })
	wg.Go(func() { carry(t, a.ns, b.ns, "10.9.0.2:7001", 1, 4<<20) })
	wg.Wait()
	got := heard()
	for _, name := range []string{"vm1/net", "vm2/net"} {
		assert.False(t, got[p.macOf(name)], "%s on the wire", name)
	}

	// An address that moves to the other guest is found there as soon as that one
	// speaks of it: answers who asks, at the latest.
	a.run("ip", "addr", "del", "10.9.0.1/24", "dev", "eth0")
	b.withAddr("10.9.0.1/24")
	enginetest.Eventually(t, soon, func() bool {
		_ = outside.Run("ip", "neigh", "flush", "all")
		return outside.Run("ping", "-c", "1", "-W", "1", "10.9.0.1") == nil
	})
	assert.True(t, b.pings("10.9.0.250", "-I", "10.9.0.1"))
}

// dhcpServer leases addresses outside, in the order in which clients come. It
// knows them by their identifier, or their hardware address if they have none.
type dhcpServer struct {
	mu      sync.Mutex // guards what follows
	clients map[string]netip.Addr
	chaddrs map[string]bool
}

func startDHCPServer(t *testing.T, ns *enginetest.NetNS) *dhcpServer {
	t.Helper()
	d := &dhcpServer{clients: map[string]netip.Addr{}, chaddrs: map[string]bool{}}
	var s *server4.Server
	require.NoError(t, ns.Do(func() (err error) {
		s, err = server4.NewServer("eth0", &net.UDPAddr{IP: net.IPv4zero, Port: 67}, d.answer)
		return err
	}))
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve() }()
	t.Cleanup(func() { s.Close(); <-done })
	return d
}

func (d *dhcpServer) answer(conn net.PacketConn, peer net.Addr, m *dhcpv4.DHCPv4) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.chaddrs[m.ClientHWAddr.String()] = true
	id := m.ClientHWAddr.String()
	if c := m.Options.Get(dhcpv4.OptionClientIdentifier); c != nil {
		id = hex.EncodeToString(c)
	}
	if !d.clients[id].IsValid() {
		d.clients[id] = netip.AddrFrom4([4]byte{10, 9, 0, byte(100 + len(d.clients))})
	}
	typ := dhcpv4.MessageTypeOffer
	if m.MessageType() == dhcpv4.MessageTypeRequest {
		typ = dhcpv4.MessageTypeAck
	}
	r, err := dhcpv4.NewReplyFromRequest(m, dhcpv4.WithMessageType(typ), dhcpv4.WithYourIP(d.clients[id].AsSlice()),
		dhcpv4.WithServerIP(net.IP{10, 9, 0, 250}), dhcpv4.WithOption(dhcpv4.OptServerIdentifier(net.IP{10, 9, 0, 250})),
		dhcpv4.WithNetmask(net.CIDRMask(24, 32)), dhcpv4.WithLeaseTime(3600))
	if err != nil {
		return
	}
	switch {
	case m.ClientIPAddr != nil && !m.ClientIPAddr.IsUnspecified():
		_, _ = conn.WriteTo(r.ToBytes(), &net.UDPAddr{IP: m.ClientIPAddr, Port: 68})
	case m.IsBroadcast():
		_, _ = conn.WriteTo(r.ToBytes(), &net.UDPAddr{IP: net.IPv4bcast, Port: 68})
	}
	// Otherwise it would have to write the frame itself: nobody has the address yet.
}

// Guests are leased addresses by a server outside that gets to see one hardware
// address: the link's. Two of them are two to it.
func TestMacvlanDHCPRow11(t *testing.T) {
	for _, names := range [][]string{{"vm1"}, {"vm1", "vm2"}} {
		t.Run(strings.Join(names, "+"), func(t *testing.T) {
			enginetest.Need(t, "dhclient")
			pod, outside, mac := macvlanPod(t, "bridge")
			d := startDHCPServer(t, outside)
			docs := definition("blue", `{"type": "macvlan", "master": "parent"}`)
			for _, n := range names {
				docs += onLAN(n, "blue", 1)
			}
			p := startLAN(t, docs, "--netns", pod.Path)
			for i, n := range names {
				addr := netip.AddrFrom4([4]byte{10, 9, 0, byte(100 + i)}).String()
				v := plugVM(t, p, n, vhosttest.Options{}).withLease(addr + "/24")
				assert.True(t, v.pings("10.9.0.250"))
				assert.NoError(t, outside.Run("ping", "-c", "1", "-W", "2", addr))
			}
			d.mu.Lock()
			defer d.mu.Unlock()
			assert.Equal(t, map[string]bool{mac.String(): true}, d.chaddrs)
			assert.Len(t, d.clients, len(names))
			if len(names) == 1 {
				assert.Contains(t, d.clients, mac.String(), "one guest is known by the link's address, as the pod would be")
			}
		})
	}
}

// strictLink is a pod's link to an outside that lets one hardware address pass, as
// ipvlan, clouds and wireless networks do: frames from another one are lost on
// their way, and so are those to another one.
func strictLink(t *testing.T) (pod, outside *enginetest.NetNS, mac frame.MAC) {
	t.Helper()
	enginetest.Need(t, "nft", "ping")
	pod, outside = node(t)
	enginetest.Must(t, outside.Addr("eth0", "10.9.0.250/24"), outside.Run("ip", "addr", "add", "fd09::250/64", "dev", "eth0", "nodad"))
	mac, err := pod.MAC("eth1")
	require.NoError(t, err)
	rules := `table netdev strict {
	chain from { type filter hook ingress device eth0 priority 0; policy drop;
		ether saddr ` + mac.String() + ` arp saddr ether ` + mac.String() + ` accept
		ether saddr ` + mac.String() + ` ether type != arp accept
	}
	chain to { type filter hook egress device eth0 priority 0; policy drop;
		ether daddr { ` + mac.String() + `, ff:ff:ff:ff:ff:ff } accept
		ether daddr & 01:00:00:00:00:00 == 01:00:00:00:00:00 accept
	}
}`
	cmd := outside.Command("nft", "-f", "-")
	cmd.Stdin = bytes.NewReader([]byte(rules))
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	return pod, outside, mac
}

// On a link of any kind that lets its own hardware address pass alone, a flag asks
// for the translation. The host keeps its own address on it.
func TestOneAddressLinkRow12Row23(t *testing.T) {
	pod, outside, mac := strictLink(t)
	enginetest.Must(t, pod.Addr("eth1", "10.9.0.251/24"))
	docs := onLAN("vm1", "blue", 2) + onLAN("vm2", "blue", 1) + definition("blue", `{"type": "bridge", "bridge": "br0", "macspoofchk": true}`)
	p := startLAN(t, docs, "--netns", pod.Path, "--uplink", "blue=eth1")
	a := plugVM(t, p, "vm1", vhosttest.Options{QueuePairs: 2}).withAddr("10.9.0.1/24")
	assert.False(t, a.pings("10.9.0.250"), "this link lets one address pass alone")
	p.stop()

	p = startLAN(t, docs, "--netns", pod.Path, "--uplink", "blue=eth1", "--mac-nat", "blue")
	a = plugVM(t, p, "vm1", vhosttest.Options{QueuePairs: 2}).withAddr("10.9.0.1/24").with6("fd09::1/64")
	b := plugVM(t, p, "vm2", vhosttest.Options{}).withAddr("10.9.0.2/24").with6("fd09::2/64")
	for _, v := range []*vm{a, b} {
		assert.True(t, v.pings("10.9.0.250"))
		assert.True(t, v.pings("fd09::250"))
	}
	carry(t, a.ns, outside, "10.9.0.250:7000", 2, 8<<20)
	carry(t, outside, b.ns, "10.9.0.2:7000", 2, 8<<20)
	carry(t, outside, a.ns, "[fd09::1]:7000", 2, 8<<20)
	assert.Equal(t, mac.String(), neighbour(outside, "10.9.0.2"))
	enginetest.Must(t, outside.Run("ping", "-c", "1", "-W", "2", "10.9.0.251"))
	carry(t, outside, pod, "10.9.0.251:7000", 1, 1<<20)
	carry(t, pod, outside, "10.9.0.250:7001", 1, 1<<20)
	assert.Contains(t, sidewire(t, "status", "--socket-dir", p.dir).out, "translated to "+mac.String()+" (--mac-nat)")
}

// A guest whose hardware address its CNI has given to the link needs no
// translation, and the host does not keep its frames.
func TestLinkWithTheGuestsMACRow23(t *testing.T) {
	for _, kind := range []string{"veth", "macvlan"} {
		t.Run(kind, func(t *testing.T) {
			const mac = "02:00:00:00:23:01"
			hw, err := net.ParseMAC(mac)
			require.NoError(t, err)
			var pod, outside *enginetest.NetNS
			if kind == "veth" {
				enginetest.Need(t, "root", "netns", "tun", "ip", "ping")
				pod, outside = enginetest.NewNetNS(t), enginetest.NewNetNS(t)
				enginetest.Veth(t, pod, "net1", outside, "eth0")
				require.NoError(t, outside.Addr("eth0", "10.9.0.250/24"))
			} else {
				pod, outside, _ = macvlanPod(t, "bridge")
			}
			enginetest.Must(t, pod.Down("net1"), pod.SetMAC("net1", [6]byte(hw)), pod.Up("net1"))
			doc := strings.Replace(onLAN("vm1", "blue", 1), "{name: net, bridge: {}}", "{name: net, bridge: {}, macAddress: '"+mac+"'}", 1)
			p := startLAN(t, doc+definition("blue", `{"type": "macvlan", "master": "parent"}`), "--netns", pod.Path)
			a := plugVM(t, p, "vm1", vhosttest.Options{}).withAddr("10.9.0.1/24")
			assert.True(t, a.pings("10.9.0.250"))
			assert.NoError(t, outside.Run("ping", "-c", "1", "-W", "2", "10.9.0.1"))
			assert.Equal(t, mac, neighbour(outside, "10.9.0.1"))
			carry(t, outside, a.ns, "10.9.0.1:7000", 1, 4<<20)
		})
	}
}

// What cannot be is refused, with what to do about it.
func TestLinkKindRefusedRow13(t *testing.T) {
	pod, _, _ := macvlanPod(t, "source")
	dir := socketDir(t)
	docs := onLAN("vm1", "blue", 1) + definition("blue", `{"type": "macvlan", "master": "parent"}`)
	file := writeFile(t, "docs.yaml", docs)
	sidewire(t, "run", "-f", file, "--socket-dir", dir, "--netns", pod.Path).says(t, exitMachine, "run", []string{"vm1/net", "net1", "macvlan in mode source", `"mode": "bridge"`})
	sidewire(t, "run", "-f", file, "--socket-dir", dir, "--netns", pod.Path, "--mac-nat", "green").says(t, exitInput, "run", []string{"--mac-nat green", "blue, default/blue, net"})
}
