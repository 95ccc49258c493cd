package main

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

// KubeVirt's own tests of networks, as far as no other test here is one of them.

// Two pods of one network, each with a bridge on it: the guests reach each other, and a client the workload on the pod's
// address; with the default, a MAC of its own, and more queues asked for than there are processors.
func TestTwoPods_KubeVirt1539_KubeVirt1541_KubeVirt1542(t *testing.T) {
	enginetest.Need(t, "dhclient", "ip", "ping")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	second := &enginetest.World{Pod: enginetest.NewNetNS(t), ResolvConf: w.ResolvConf}
	enginetest.Veth(t, second.Pod, "eth0", w.Outside, "veth1")
	enginetest.Must(t, second.Pod.Addr("eth0", "10.244.1.6/24"), second.Pod.Route("default", enginetest.OutsideIP),
		w.Outside.Run("ip", "addr", "flush", "dev", "veth0"), w.Outside.Run("ip", "link", "add", "br0", "type", "bridge"),
		w.Outside.Run("ip", "link", "set", "veth0", "master", "br0"), w.Outside.Run("ip", "link", "set", "veth1", "master", "br0"),
		w.Outside.Addr("br0", enginetest.OutsideIP+"/24"), w.Outside.Up("br0"))
	atRest(t, second.Pod, "eth0")
	b := plugVM(t, startBridge(t, second, onPod("peer", 1, "")), "peer", vhosttest.Options{}).withLease("10.244.1.6/24")
	for name, docs := range map[string]string{
		"1539 default": onPod("vm", 1, ""),
		"1541 MAC":     onPod("vm", 1, ", macAddress: DE-AD-00-00-BE-AF"),
		"1542 queues":  strings.Replace(onPod("vm", 1, ""), "networkInterfaceMultiqueue: false", "networkInterfaceMultiqueue: true", 1),
	} {
		t.Run(name, func(t *testing.T) {
			p := startBridge(t, w, docs)
			a := plugVM(t, p, "vm", vhosttest.Options{}).withLease(enginetest.PodIP + "/24")
			assert.True(t, a.pings("10.244.1.6"))
			assert.True(t, b.pings(enginetest.PodIP))
			carry(t, b.ns, a.ns, enginetest.PodIP+":8080", 1, 1<<20)
			greet(t, a.ns, 80, "workload")
			hear(t, w.Outside, enginetest.PodIP+":80", "workload")
			i := p.status().Machines[0].Interfaces[0]
			assert.Equal(t, 1, i.QueueCount)
			assert.Contains(t, a.run("ip", "link", "show", "eth0"), i.MAC)
			assert.Equal(t, name == "1541 MAC", i.MAC == "de:ad:00:00:be:af")
		})
	}
}

// KubeVirt's vmi_subdomain.go: what a guest is told of its own name and of the domains to search.
func TestNamesRow64_KubeVirtSubdomain(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft")
	const pods = "default.svc.cluster.local svc.cluster.local cluster.local"
	for name, c := range map[string]struct {
		vmi, search  string
		host, domain string
	}{
		"masquerade, hostname and subdomain": {spec("vm", 1) + "  hostname: web\n  subdomain: shop\n", pods, "web", "shop.default.svc.cluster.local"},
		"masquerade, subdomain":              {spec("vm", 1) + "  subdomain: shop\n", pods, "vm", "shop.default.svc.cluster.local"},
		"masquerade, neither":                {spec("vm", 1), pods, "vm", "default.svc.cluster.local"},
		"bridge, subdomain":                  {strings.Replace(spec("vm", 1), "masquerade:", "bridge:", 1) + "  subdomain: shop\n", pods, "vm", "shop.default.svc.cluster.local"},
		"bridge, neither":                    {strings.Replace(spec("vm", 1), "masquerade:", "bridge:", 1), pods, "vm", "default.svc.cluster.local"},
		"search list with the subdomain":     {spec("vm", 1) + "  subdomain: shop\n", "shop.default.svc.cluster.local a.example", "vm", "shop.default.svc.cluster.local"},
		"search list without a service":      {spec("vm", 1) + "  subdomain: shop\n", "a.example", "vm", "a.example"},
	} {
		t.Run(name, func(t *testing.T) {
			w := enginetest.NewWorld(t, enginetest.WorldOptions{})
			w.ResolvConf = writeFile(t, "resolv.conf", "nameserver "+enginetest.OutsideIP+"\nsearch "+c.search+"\n")
			p := startSidewire(t, w, c.vmi)
			o := offered(t, connectRaw(t, p, "vm/red"), guestMAC, guestMAC)
			require.NotNil(t, o)
			assert.Equal(t, c.host, string(o[12]))
			assert.Equal(t, c.domain, string(o[15]))
		})
	}
}

// A guest with a NIC on the pod network and one on another is on both, and nothing crosses from one to the other.
func TestTwoNICsRow7(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "ip", "ping")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	far := enginetest.NewNetNS(t)
	enginetest.Veth(t, w.Pod, "net1", far, "eth0")
	atRest(t, w.Pod, "net1")
	enginetest.Must(t, far.Addr("eth0", "10.9.0.250/24"))
	docs := strings.NewReplacer("  networks:", "      - {name: net, bridge: {}}\n  networks:\n  - {name: net, multus: {networkName: blue}}").
		Replace(spec("vm", 1)) + definition("blue", `{"type": "ovs", "bridge": "br1", "vlan": 100}`)
	p := startSidewire(t, w, docs)
	pod := plugNIC(t, p, "vm/red", vhosttest.Options{}).withAddr(guestIP + "/24")
	lan := plugNIC(t, p, "vm/net", vhosttest.Options{}).withAddr("10.9.0.1/24")
	enginetest.Must(t, pod.ns.Route("default", gatewayIP), lan.ns.Route("default", "10.9.0.250"))
	assert.True(t, pod.pings(enginetest.OutsideIP))
	assert.True(t, lan.pings("10.9.0.250"))
	outside, beyond := listenOn(t, w.Outside, "veth0"), listenOn(t, far, "eth0")
	from := func(e *ear, mac [6]byte) (n int) {
		for _, f := range e.heard() {
			if len(f) >= 12 && [6]byte(f[6:12]) == mac {
				n++
			}
		}
		return n
	}
	said := enginetest.Eth{Src: p.macOf("vm/net"), Dst: broadcast}.Frame(0x88b5, enginetest.Payload(60, 1))
	listenOn(t, lan.ns, "eth0").send(said)
	assert.True(t, beyond.hears(said))
	assert.False(t, lan.pings(enginetest.OutsideIP), "the other network leads nowhere")
	assert.Zero(t, from(outside, p.macOf("vm/net")), "not a frame of the second NIC's is on the pod network")
	assert.False(t, pod.pings("10.9.0.1"))
	assert.True(t, pod.pings(enginetest.OutsideIP))
	assert.Zero(t, from(beyond, guestMAC), "nor of the first one's on the other")
	for _, port := range p.status().Ports {
		assert.Zero(t, port.Drops["spoofed"], port.Name)
	}
}

// A guest knows the MTU of its network from its NIC and from its lease, fills it, and hears of what is longer.
func TestMTURow35Row36_KubeVirtMTU(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "ip", "ping", "dhclient")
	const mtu = 1400
	sized := func(v *vm, six bool, size int) string {
		args, head, to := []string{"-4"}, 28, enginetest.OutsideIP
		if six {
			args, head, to = []string{"-6"}, 48, enginetest.OutsideIP6
		}
		out, _ := v.try("ping", append(args, "-n", "-c", "1", "-W", "2", "-M", "do", "-s", fmt.Sprint(size-head), to)...)
		return out
	}
	for _, path := range []string{"packet", "socket"} {
		t.Run(path, func(t *testing.T) {
			w := enginetest.NewWorld(t, enginetest.WorldOptions{MTU: mtu, IPv6: true})
			pings(t, w)
			p := startSidewire(t, w, spec("vm", 1), "--path", path)
			assert.Contains(t, strings.Join(qemuArgs(t, w, p), " "), ",host_mtu=1400")
			v := sixVM(t, p).autoconf()
			v.dhclient("-1")
			t.Cleanup(func() { v.dhclient("-x") })
			assert.Contains(t, v.run("ip", "link", "show", "eth0"), "mtu 1400")
			for _, six := range []bool{false, true} {
				assert.Contains(t, sized(v, six, mtu), "1 received")
				assert.Contains(t, sized(v, six, mtu+1), "message too long")
			}
			// A guest that does not care is told by the gateway.
			enginetest.Must(t, v.ns.SetMTU("eth0", 1500), v.ns.Sysctl("net/ipv6/conf/eth0/mtu", "1500"))
			assert.Contains(t, sized(v, false, 1500), "From "+gatewayIP)
			assert.Regexp(t, `mtu ?= ?1400`, sized(v, false, 1500))
			assert.Regexp(t, `mtu ?= ?1400`, sized(v, true, 1500))
			if t.Failed() {
				t.Log(p.dump())
			}
		})
	}
	for model, binding := range map[string]string{"e1000": "masquerade", "rtl8139": "bridge"} {
		t.Run(model+" "+binding, func(t *testing.T) {
			w := enginetest.NewWorld(t, enginetest.WorldOptions{MTU: mtu})
			p := startSidewire(t, w, strings.Replace(spec("vm", 1), "masquerade: {}\n", binding+": {}\n        model: "+model+"\n", 1))
			assert.NotContains(t, strings.Join(qemuArgs(t, w, p), " "), "host_mtu")
			v := streamVM(t, p)
			assert.Contains(t, v.run("ip", "link", "show", "eth0"), "mtu 1400", "by the lease alone")
			if binding == "masquerade" {
				require.NoError(t, v.ns.SetMTU("eth0", 1500))
				assert.Regexp(t, `mtu ?= ?1400`, sized(v, false, 1500))
			}
		})
	}
	t.Run("bridge without an address", func(t *testing.T) {
		w := enginetest.NewWorld(t, enginetest.WorldOptions{MTU: mtu})
		enginetest.Must(t, w.Pod.Run("ip", "addr", "flush", "dev", "eth0", "scope", "global"))
		p := startBridge(t, w, onPod("vm", 1, ""))
		assert.Contains(t, strings.Join(qemuArgs(t, w, p), " "), ",host_mtu=1400")
		// Its answers are in the name of whom a packet was for, and what is tagged may be longer by the tag.
		v := plugVM(t, p, "vm", vhosttest.Options{}).withAddr("10.244.1.9/24").withAddr("2001:db8:1::9/64")
		enginetest.Must(t, w.Outside.Addr("veth0", enginetest.OutsideIP6+"/64"), v.ns.SetMTU("eth0", 1500))
		for _, six := range []bool{false, true} {
			assert.Contains(t, sized(v, six, mtu), "1 received")
			assert.Regexp(t, `mtu ?= ?1400`, sized(v, six, 1500))
			assert.Contains(t, sized(v, six, mtu+1), "message too long", "the guest has learned")
		}
		in, out := listenOn(t, v.ns, "eth0"), listenOn(t, w.Outside, "veth0")
		tagged := enginetest.Eth{Src: p.macOf("vm/net"), Dst: broadcast, VLAN: 7}.Frame(0x88b5, enginetest.Payload(mtu, 1))
		in.send(tagged)
		assert.True(t, out.hears(tagged))
		carry(t, v.ns, w.Outside, enginetest.OutsideIP+":7000", 2, 4<<20)
		assert.NotZero(t, p.port("vm/net guest").Drops["oversize_frame"])
	})
}

// `ports` without meaning for a bridge: all ports are the guest's, listed or not. None listed for slirp: none is.
func TestPortsRow24Row25(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "dhclient")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	v := plugVM(t, startBridge(t, w, onPod("vm", 1, ", ports: [{port: 80}]")), "vm", vhosttest.Options{}).withLease(enginetest.PodIP)
	for _, port := range []int{80, 81} {
		greet(t, v.ns, port, "guest")
		hear(t, w.Outside, fmt.Sprintf("%s:%d", enginetest.PodIP, port), "guest")
	}

	w = enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startNobody(t, w, slirpSpec("vm", "virtio", 1))
	v = startVM(t, p, vhosttest.Options{})
	s := &scene{World: w, t: t, guest: v.ns, far: w.Outside, dir: v.dir}
	s.serveAt(v.ns, "vm", 8080)
	assert.Equal(t, "refused by pod", s.tcp(w.Outside, enginetest.PodIP+":8080"))
	assert.Equal(t, "refused by pod", s.udp(w.Outside, enginetest.PodIP+":8080"))
	assert.Equal(t, "refused by pod", s.tcp(w.Pod, "127.0.0.1:8080"))
	assert.Empty(t, p.status().Interfaces[0].Forwards)
	assert.False(t, p.status().Interfaces[0].Everything)
	l := listen(t, w.Outside, "tcp4", enginetest.OutsideIP+":9001", func(c net.Conn) { fmt.Fprint(c, "outside") })
	hear(t, v.ns, l.Addr().String(), "outside")
}

// What checks the sources of guests needs no nftables: neither a program nor a rule of the kernel's.
func TestSpoofCheckRow80Row82(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "ip", "ping")
	ns, outside := node(t)
	enginetest.Must(t, outside.Addr("eth0", "10.9.0.250/24"))
	p := &process{t: t, dir: socketDir(t), log: &logBuffer{}}
	p.vmi = writeFile(t, "docs.yaml", onLAN("vm1", "blue", 1)+definition("blue", `{"type": "cnv-bridge", "bridge": "br10", "macspoofchk": true}`))
	cmd := sidewireCommand("run", "-f", p.vmi, "--socket-dir", p.dir, "--netns", ns.Path, "--uplink", "blue=eth1")
	cmd.Env = append(cmd.Env, "PATH=/nowhere")
	p.launch(cmd)
	t.Cleanup(p.stop)
	a := plugVM(t, p, "vm1", vhosttest.Options{}).withAddr("10.9.0.1/24")
	assert.True(t, a.pings("10.9.0.250"))
	enginetest.Must(t, a.ns.SetMAC("eth0", [6]byte{2, 0x12, 0x34, 0x56, 0x78, 0x9a}))
	assert.False(t, a.pings("10.9.0.250"))
	assert.NotZero(t, p.port("vm1/net guest").Drops["spoofed"])
	out, err := ns.Command("nft", "list", "ruleset").Output()
	require.NoError(t, err)
	assert.Empty(t, string(out))
}
