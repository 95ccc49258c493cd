package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
	"sidewire/vhostuser/vhosttest"
)

// calico makes a world's pod what Calico makes it: an address of its own network
// alone, and a gateway on the link that is nobody's, for which the other end
// answers.
func calico(t *testing.T) *enginetest.World {
	t.Helper()
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	enginetest.Must(t, w.Pod.Run("ip", "addr", "flush", "dev", "eth0", "scope", "global"), w.Pod.Addr("eth0", "10.244.1.5/32"),
		w.Pod.Run("ip", "route", "add", "169.254.1.1", "dev", "eth0", "scope", "link"), w.Pod.Run("ip", "route", "add", "default", "via", "169.254.1.1"),
		w.Outside.Run("ip", "addr", "flush", "dev", "veth0", "scope", "global"), w.Outside.Addr("veth0", enginetest.OutsideIP+"/32"),
		w.Outside.Run("ip", "route", "add", "10.244.1.5", "dev", "veth0"), w.Outside.Run("ip", "route", "add", "169.254.1.1", "dev", "lo"),
		w.Outside.Sysctl("net/ipv4/conf/veth0/proxy_arp", "1"), w.Outside.Sysctl("net/ipv4/neigh/veth0/proxy_delay", "0"),
		w.Outside.Sysctl("net/ipv4/ip_forward", "1"))
	return w
}

// offered lets a client of that hardware address ask, and returns the options of
// what it is offered, nil if nothing comes.
func offered(t *testing.T, g *vhosttest.Guest, mac, client frame.MAC) map[byte][]byte {
	t.Helper()
	require.NoError(t, g.SendAll(0, discover(mac, client)))
	end := time.Now().Add(silence)
	for time.Now().Before(end) {
		p, err := g.Recv(0, time.Until(end))
		if err != nil {
			return nil
		}
		const options = 14 + 20 + 8 + 240
		if len(p.Bytes) < options || p.Bytes[23] != frame.ProtoUDP || p.Bytes[35] != 67 {
			continue
		}
		out := map[byte][]byte{0: p.Bytes[26:30], 1: nil}
		for o := p.Bytes[options:]; len(o) > 2 && o[0] != 255; o = o[2+int(o[1]):] {
			out[o[0]] = append(out[o[0]], o[2:2+int(o[1])]...)
		}
		return out
	}
	return nil
}

// With Calico's addresses the lease has KubeVirt's bytes, and a guest that has it
// reaches the outside by a gateway for which somebody answers there.
func TestBridgeRow39Row41Calico(t *testing.T) {
	w := calico(t)
	before := footprint(t, w.Pod)
	p := startBridge(t, w, onPod("vm", 1, ", dhcpOptions: {ntpServers: [192.0.2.123]}"))
	g := connectRaw(t, p, "vm/net")
	mac := p.macOf("vm/net")
	o := offered(t, g, mac, mac)
	assert.Equal(t, []byte{169, 254, 75, 10}, o[0], "the server's address")
	assert.Equal(t, []byte{169, 254, 75, 10}, o[54])
	assert.Equal(t, []byte{255, 255, 255, 255}, o[1])
	assert.Equal(t, []byte{169, 254, 1, 1}, o[3])
	assert.Equal(t, []byte{32, 169, 254, 1, 1, 0, 0, 0, 0, 0, 169, 254, 1, 1}, o[121])
	assert.Equal(t, []byte{0x05, 0xdc}, o[26])
	assert.Equal(t, []byte{192, 0, 2, 123}, o[42])
	assert.Equal(t, "vm", string(o[12]))
	assert.Equal(t, []byte{10, 244, 1, 1}, o[6])
	require.NoError(t, g.Close())

	v := plugVM(t, p, "vm", vhosttest.Options{}).withLease("10.244.1.5/32")
	assert.Regexp(t, `default via 169\.254\.1\.1 .*eth0`, v.run("ip", "route"))
	assert.True(t, v.pings(enginetest.OutsideIP))
	enginetest.Must(t, w.Outside.Run("ping", "-c", "1", "-W", "5", "10.244.1.5"))
	carry(t, v.ns, w.Outside, enginetest.OutsideIP+":7000", 2, 4<<20)
	p.stop()
	isPutBack(t, w.Pod, before)
}

// Where nobody answers for the gateway, since the pod's own neighbour table has
// its address, we do.
func TestBridgeRow41GatewaySetByHand(t *testing.T) {
	w := calico(t)
	enginetest.Must(t, w.Outside.Sysctl("net/ipv4/conf/veth0/proxy_arp", "0"),
		w.Pod.Run("ip", "neigh", "replace", "169.254.1.1", "lladdr", linkMAC(t, w.Outside, "veth0"), "dev", "eth0", "nud", "permanent"))
	before := footprint(t, w.Pod)
	p := startBridge(t, w, onPod("vm", 1, ""))
	v := plugVM(t, p, "vm", vhosttest.Options{}).withLease("10.244.1.5/32")
	assert.True(t, v.pings(enginetest.OutsideIP))
	assert.Contains(t, v.run("ip", "neigh"), linkMAC(t, w.Outside, "veth0"))
	p.stop()
	isPutBack(t, w.Pod, before)
}

// A guest that asks for nothing has the address by hand.
func TestBridgeRow40StaticAddress(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startBridge(t, w, onPod("vm", 1, ""))
	v := plugVM(t, p, "vm", vhosttest.Options{}).withAddr(enginetest.PodIP + "/24")
	assert.True(t, v.pings(enginetest.OutsideIP))
	enginetest.Must(t, w.Outside.Run("ping", "-c", "1", "-W", "5", enginetest.PodIP))
}

// Without an address on the link there is no DHCP: what the guest asks is for the
// network, where somebody may answer.
func TestBridgeRow42NoAddressNoDHCP(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	enginetest.Must(t, w.Pod.Run("ip", "addr", "flush", "dev", "eth0", "scope", "global"))
	p := startBridge(t, w, onPod("vm", 1, ""))
	g := connectRaw(t, p, "vm/net")
	mac := p.macOf("vm/net")
	ear := listenOn(t, w.Outside, "veth0")
	assert.Nil(t, offered(t, g, mac, mac))
	assert.True(t, ear.hears(discover(mac, mac)))
	st := p.nicOf("vm/net")
	assert.False(t, st.Guest.IsValid())
	require.NoError(t, g.Close())
	assert.Contains(t, sidewire(t, "status", "--socket-dir", p.dir).out, "so there is no DHCP")
	v := plugVM(t, p, "vm", vhosttest.Options{}).withAddr("10.244.1.9/24")
	assert.True(t, v.pings(enginetest.OutsideIP))
}

// The lease is the guest's alone, by the guest's own address and not the link's;
// who else asks through the guest's NIC asks the network. A MAC that the spec names is the
// guest's, and the link keeps its own.
func TestBridgeRow23Row46LeaseByTheGuestsMAC(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	own := linkMAC(t, w.Pod, "eth0")
	p := startBridge(t, w, onPod("vm", 1, ", macAddress: 02:00:00:00:00:77"))
	mac, link := frame.MAC{2, 0, 0, 0, 0, 0x77}, frame.MAC{}
	require.NoError(t, link.UnmarshalText([]byte(own)))
	assert.Equal(t, own, linkMAC(t, w.Pod, "eth0"))
	assert.Equal(t, mac.String(), p.nicOf("vm/net").MAC)
	g := connectRaw(t, p, "vm/net")
	ear := listenOn(t, w.Outside, "veth0")
	assert.Nil(t, offered(t, g, link, link))
	assert.True(t, ear.hears(discover(link, link)))
	assert.NotNil(t, offered(t, g, mac, mac))
	assert.False(t, enginetest.Wait(200*time.Millisecond, func() bool { return len(ear.heard()) > 0 }), "what was answered goes no further")
	require.NoError(t, g.Close())
	plugVM(t, p, "vm", vhosttest.Options{}).withLease(enginetest.PodIP)
	st := p.nicOf("vm/net")
	require.NotNil(t, st.Migration)
	assert.False(t, st.Migration.Possible)
	assert.Equal(t, "cannot migrate VMI which does not use masquerade or a migratable plugin to connect to the pod network", st.Migration.Why)

	o := sidewire(t, "qemu-args", "-f", p.vmi, "--netns", w.Pod.Path, "--socket-dir", p.dir, "--qemu", "/bin/true")
	assert.Contains(t, o.out, "mac=02:00:00:00:00:77")
}

// The annotation that KubeVirt asks for is heard.
func TestBridgeRow46MigrationAllowed(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	docs := strings.Replace(onPod("vm", 1, ""), "{name: vm}", `{name: vm, annotations: {kubevirt.io/allow-pod-bridge-network-live-migration: ""}}`, 1)
	p := startBridge(t, w, docs)
	assert.Equal(t, &MigrationStatus{Possible: true}, p.nicOf("vm/net").Migration)
	o := sidewire(t, "forward", "--socket-dir", p.dir, "add", "vm/net", "tcp:80")
	assert.Equal(t, exitInput, o.code)
	assert.Contains(t, o.err, "nothing is forwarded")
}

// A VMI that names no interface has a bridge on the pod network.
func TestBridgeRow33NoInterfaces(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startBridge(t, w, "kind: VirtualMachineInstance\nmetadata: {name: vm}\nspec: {domain: {devices: {}}}\n")
	st := p.nicOf("vm/default")
	assert.Equal(t, "bridge eth0 "+enginetest.PodIP, fmt.Sprint(st.Binding, " ", st.Link, " ", st.Guest))
	plugNIC(t, p, "vm/default", vhosttest.Options{}).withLease(enginetest.PodIP)
}

// Without a MAC in the spec the arguments for QEMU have the link's, before and
// while the guest has its place, with the link's MTU.
func TestBridgeRow22Row36QEMUArgs(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{MTU: 1450})
	own := linkMAC(t, w.Pod, "eth0")
	dir, file := socketDir(t), writeFile(t, "vmi.yaml", onPod("vm", 1, ""))
	args := func() string {
		o := sidewire(t, "qemu-args", "-f", file, "--netns", w.Pod.Path, "--socket-dir", dir, "--qemu", "/bin/true")
		require.Zero(t, o.code, o.err)
		return o.out
	}
	before := args()
	assert.Contains(t, before, "mac="+own)
	assert.Contains(t, before, "host_mtu=1450")
	p := &process{t: t, dir: dir, log: &logBuffer{}, vmi: file}
	p.start(w)
	defer p.stop()
	assert.Equal(t, before, args())
}

// Resolvers on the pod's loopback are of no use to the guest: they are left out,
// and said once. What the file says later is in the next lease.
func TestBridgeRow39Resolvers(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	conf := filepath.Join(t.TempDir(), "resolv.conf")
	write := func(servers ...string) {
		require.NoError(t, os.WriteFile(conf, []byte("nameserver "+strings.Join(servers, "\nnameserver ")+"\n"), 0o644))
	}
	write("127.0.0.53", "192.0.2.53")
	p := startBridge(t, w, onPod("vm", 1, ""), "--resolv-conf", conf)
	g, mac := connectRaw(t, p, "vm/net"), p.macOf("vm/net")
	assert.Equal(t, []byte{192, 0, 2, 53}, offered(t, g, mac, mac)[6])
	assert.Equal(t, 1, strings.Count(p.log.String(), "left out of the guest's lease"))
	write("192.0.2.54", "::1")
	enginetest.Eventually(t, soon, func() bool { return fmt.Sprint(offered(t, g, mac, mac)[6]) == "[192 0 2 54]" })
	write("127.0.0.53")
	enginetest.Eventually(t, soon, func() bool { return offered(t, g, mac, mac)[6] == nil })
}

// A network in the place of the pod network has the pod's link, and that must
// have an address.
func TestBridgeRow8Row10DefaultNetwork(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	docs := strings.Replace(onLAN("vm", "flannel", 1), "networkName: flannel", "networkName: flannel, default: true", 1)
	p := startBridge(t, w, docs)
	assert.Equal(t, "eth0", p.nicOf("vm/net").Link)
	assert.True(t, p.nicOf("vm/net").Migration.Possible)
	plugVM(t, p, "vm", vhosttest.Options{}).withLease(enginetest.PodIP + "/24")
	p.stop()
	enginetest.Must(t, w.Pod.Run("ip", "addr", "flush", "dev", "eth0", "scope", "global"))
	sidewire(t, "run", "-f", p.vmi, "--netns", w.Pod.Path, "--socket-dir", p.dir).says(t, exitInput, "run",
		[]string{"vm/net", "eth0 has no address", "flannel"})
}

// A link that a CNI left for another network with an address is the guest's as
// well; without one it is joined to a switch. After a crash it is found again.
func TestBridgeRow5Row39LinkOfACNI(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "ip", "ping", "nft", "dhclient")
	docs := onLAN("vm1", "blue", 1) + definition("blue", `{"type": "bridge", "bridge": "br0", "vlan": 100, "mtu": 1300, "ipam": {"type": "host-local", "subnet": "10.77.0.0/24"}}`)
	for _, link := range []string{"poda08a0fcbdea", "net1"} {
		ns, outside := enginetest.NewNetNS(t), enginetest.NewNetNS(t)
		enginetest.Must(t, ns.Sysctl("net/ipv6/conf/default/accept_dad", "0"))
		enginetest.Veth(t, ns, link, outside, "eth0")
		atRest(t, ns, link)
		enginetest.Must(t, outside.Addr("eth0", "10.9.0.250/24"), ns.SetMTU(link, 1400), ns.Addr(link, "10.9.0.9/24"),
			ns.Route("10.20.0.0/16", "10.9.0.250"))
		before := footprint(t, ns)
		p := startLAN(t, docs, "--netns", ns.Path)
		p.kill()
		p.launch(sidewireCommand("run", "-f", p.vmi, "--netns", ns.Path, "--socket-dir", p.dir))
		st := p.nicOf("vm1/net")
		assert.Equal(t, link, st.Link)
		assert.Equal(t, st.Taken.LinkMAC.String(), st.MAC)
		assert.True(t, st.Taken.Resumed)
		v := plugVM(t, p, "vm1", vhosttest.Options{}).withLease("10.9.0.9/24")
		assert.Contains(t, v.run("ip", "route"), "10.20.0.0/16 via 10.9.0.250")
		assert.True(t, v.pings("10.9.0.250"))
		p.stop()
		isPutBack(t, ns, before)
	}
}

// On a link that carries frames of its own address alone, as a macvlan, a guest
// whose spec names no MAC has the link's, and the link keeps it. One with a MAC of
// its own is translated: outside only the link's is ever seen.
func TestBridgeRow11Row12Row13LinkOfOneMAC(t *testing.T) {
	for _, mac := range []string{"", ", macAddress: 02:00:00:00:00:77"} {
		w := enginetest.NewWorld(t, enginetest.WorldOptions{})
		own := linkMAC(t, w.Pod, "eth0")
		enginetest.Must(t, w.Outside.Run("nft", "add table netdev strict"),
			w.Outside.Run("nft", "add chain netdev strict in { type filter hook ingress device veth0 priority 0 ; }"),
			w.Outside.Run("nft", "add rule netdev strict in ether saddr != "+own+" drop"),
			w.Outside.Run("nft", "add chain netdev strict out { type filter hook egress device veth0 priority 0 ; }"),
			w.Outside.Run("nft", "add rule netdev strict out ether daddr & 01:00:00:00:00:00 == 00:00:00:00:00:00 ether daddr != "+own+" drop"))
		before := footprint(t, w.Pod)
		p := startBridge(t, w, onPod("vm", 1, mac), "--mac-nat", "net")
		assert.Equal(t, own, linkMAC(t, w.Pod, "eth0"), "the link keeps it")
		ears := listenOn(t, w.Outside, "veth0")
		v := plugVM(t, p, "vm", vhosttest.Options{}).withLease(enginetest.PodIP)
		assert.True(t, v.pings(enginetest.OutsideIP))
		enginetest.Must(t, w.Outside.Run("ping", "-c", "1", "-W", "5", enginetest.PodIP))
		carry(t, v.ns, w.Outside, enginetest.OutsideIP+":7000", 2, 4<<20)
		carry(t, w.Outside, v.ns, enginetest.PodIP+":7000", 2, 4<<20)
		var m frame.MAC
		require.NoError(t, m.UnmarshalText([]byte(own)))
		assert.Empty(t, ears.strangers(m))
		st := p.nicOf("vm/net")
		assert.Equal(t, mac != "", st.Taken.MACNAT != nil)
		assert.Equal(t, mac == "", st.MAC == own)
		p.stop()
		isPutBack(t, w.Pod, before)
	}
}

// So it is on a real macvlan in the place of the pod's link (kubevirt#5483).
func TestBridgeRow8Row11Macvlan(t *testing.T) {
	enginetest.Need(t, "nft", "dhclient")
	pod, outside, mac := macvlanPod(t, "bridge")
	enginetest.Must(t, pod.Addr("net1", "10.9.0.5/24"), pod.Run("ip", "route", "add", "default", "via", "10.9.0.250"))
	before := footprint(t, pod)
	for _, own := range []string{"", ", macAddress: 02:00:00:00:00:77"} {
		docs := strings.NewReplacer("networkName: mv", "networkName: mv, default: true", "bridge: {}}", "bridge: {}"+own+"}").Replace(onLAN("vm", "mv", 1))
		p := startLAN(t, docs, "--netns", pod.Path, "--uplink", "net=net1", "--resolv-conf", writeFile(t, "resolv.conf", "nameserver 10.9.0.250\n"))
		v := plugVM(t, p, "vm", vhosttest.Options{}).withLease("10.9.0.5/24")
		assert.True(t, v.pings("10.9.0.250"))
		require.NoError(t, outside.Run("ping", "-c", "1", "-W", "5", "10.9.0.5"))
		assert.Equal(t, mac.String(), neighbour(outside, "10.9.0.5"))
		carry(t, outside, v.ns, "10.9.0.5:7000", 2, 4<<20)
		carry(t, v.ns, outside, "10.9.0.250:7000", 2, 4<<20)
		p.stop()
		isPutBack(t, pod, before)
	}
}

// What else would use the link is refused before anything is touched.
func TestBridgeRefuses(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	before := footprint(t, w.Pod)
	forbid := "---\napiVersion: kubevirt.io/v1\nkind: KubeVirt\nmetadata: {name: kubevirt}\nspec: {configuration: {network: {permitBridgeInterfaceOnPodNetwork: false}}}\n"
	for name, c := range map[string]struct {
		docs  string
		args  []string
		code  int
		words []string
	}{
		"two guests":    {onPod("vm1", 1, "") + onPod("vm2", 1, ""), nil, exitInput, []string{"vm1/net and vm2/net", "eth0", "FILE@NETNS"}},
		"masquerade":    {onPod("vm1", 1, "") + "---\n" + spec("vm2", 1), nil, exitInput, []string{"vm2/red", "vm1/net", "eth0"}},
		"sockets":       {onPod("vm1", 1, "") + "---\n" + spec("vm2", 1), []string{"--path", "socket"}, exitInput, []string{"vm2/red", "vm1/net"}},
		"uplink":        {onPod("vm1", 1, "") + onLAN("vm2", "blue", 1) + definition("blue", `{"type": "bridge"}`), []string{"--uplink", "blue=eth0"}, exitInput, []string{"eth0", "vm1/net", "cni0"}},
		"no link":       {onPod("vm1", 1, ""), []string{"--uplink", "net=eth7"}, exitInput, []string{"vm1/net", "eth7", "eth0", "--uplink"}},
		"Row45 forbids": {onPod("vm1", 1, "") + forbid, nil, exitInput, []string{"Bridge on pod network configuration is not enabled under kubevirt-config"}},
		"no directory":  {onPod("vm1", 1, ""), []string{"--state-dir", "/proc/nowhere"}, exitMachine, []string{"vm1/net", "/proc/nowhere", "--state-dir"}},
	} {
		t.Run(name, func(t *testing.T) {
			sidewire(t, append([]string{"run", "-f", writeFile(t, "docs.yaml", c.docs), "--socket-dir", socketDir(t), "--netns", w.Pod.Path,
				"--resolv-conf", w.ResolvConf}, c.args...)...).says(t, c.code, "run", c.words)
			isPutBack(t, w.Pod, before)
		})
	}
	dir := socketDir(t)
	file := filepath.Join(dir, "docs.yaml")
	require.NoError(t, os.WriteFile(file, []byte(onPod("vm", 1, "")), 0o644))
	var o outcome
	require.NoError(t, w.Pod.Do(func() error {
		o = finish(t, asNobody(t, dir, "run", "-f", file, "--socket-dir", dir))
		return nil
	}))
	assert.Equal(t, exitMachine, o.code)
	assert.Contains(t, o.err, "vm/net: delegate eth0:")
	assert.Contains(t, o.err, "CAP_NET_ADMIN is needed")
	assert.Contains(t, o.err, "masquerade: {}")
	isPutBack(t, w.Pod, before)
}
