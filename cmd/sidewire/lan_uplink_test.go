package main

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
	"sidewire/engine/uplink"
	"sidewire/vhostuser/vhosttest"
)

// node is a namespace whose link eth1 leads to a host.
func node(t *testing.T) (ns, host *enginetest.NetNS) {
	t.Helper()
	enginetest.Need(t, "root", "netns", "tun", "ip", "nft", "ping")
	ns, host = enginetest.NewNetNS(t), enginetest.NewNetNS(t)
	for _, n := range []*enginetest.NetNS{ns, host} {
		require.NoError(t, n.Sysctl("net/ipv6/conf/default/accept_dad", "0"))
	}
	enginetest.Veth(t, ns, "eth1", host, "eth0")
	atRest(t, ns, "eth1")
	atRest(t, host, "eth0")
	return ns, host
}

// atRest waits until the kernel has set a new link up.
func atRest(t *testing.T, ns *enginetest.NetNS, link string) {
	t.Helper()
	enginetest.Eventually(t, soon, func() bool {
		out, err := ns.Command("ip", "-6", "-o", "addr", "show", "dev", link).Output()
		return err == nil && len(out) > 0 && !strings.Contains(string(out), "tentative")
	})
}

// An uplink joins guests to what is behind a link of the host. The host keeps
// its own address on it, and its own traffic to itself; guests' traffic among
// themselves stays inside. In the end the namespace is as before.
func TestUplink(t *testing.T) {
	ns, outside := node(t)
	enginetest.Must(t, ns.Addr("eth1", "10.9.0.251/24"), outside.Addr("eth0", "10.9.0.250/24"))
	before := footprint(t, ns)
	docs := onLAN("vm1", "blue", 2) + onLAN("vm2", "blue", 1) + definition("blue", `{"type": "bridge", "bridge": "br0", "macspoofchk": true}`)
	p := startLAN(t, docs, "--netns", ns.Path, "--uplink", "blue=eth1")
	a := plugVM(t, p, "vm1", vhosttest.Options{QueuePairs: 2}).withAddr("10.9.0.1/24")
	b := plugVM(t, p, "vm2", vhosttest.Options{}).withAddr("10.9.0.2/24").quiet()
	require.True(t, a.pings("10.9.0.250"), "guest to outside")
	require.True(t, b.pings("10.9.0.250"))
	enginetest.Must(t, outside.Run("ping", "-c", "1", "-W", "2", "10.9.0.1"), outside.Run("ping", "-c", "1", "-W", "2", "10.9.0.251"))
	carry(t, a.ns, outside, "10.9.0.250:7000", 4, 8<<20)
	carry(t, outside, a.ns, "10.9.0.1:7000", 4, 8<<20)

	count := func(ns *enginetest.NetNS) uint64 {
		n, err := ns.Counter("eth0", "rx_packets")
		require.NoError(t, err)
		return n
	}
	guest, host := count(b.ns), count(outside)
	carry(t, outside, ns, "10.9.0.251:7000", 1, 4<<20)
	assert.LessOrEqual(t, count(b.ns)-guest, uint64(20), "the host's own frames are not the guests'")
	carry(t, ns, outside, "10.9.0.250:7001", 1, 1<<20)
	require.True(t, a.pings("10.9.0.2"))
	host = count(outside)
	carry(t, a.ns, b.ns, "10.9.0.2:7000", 1, 4<<20)
	assert.LessOrEqual(t, count(outside)-host, uint64(20), "guests' frames to each other stay inside")

	st := p.nicOf("vm1/net")
	assert.Equal(t, []uplink.LinkStatus{{Name: "eth1", State: uplink.LinkUp}}, st.Links)
	o := sidewire(t, "fdb", "--socket-dir", p.dir)
	assert.Regexp(t, `(?m)^br0 +- +\S+ +uplink eth1 +\d+ s ago$`, o.out)
	assert.Regexp(t, `(?m)^br0 +- +`+st.MAC+` +vm1/net +static$`, o.out)
	o = sidewire(t, "status", "--socket-dir", p.dir)
	assert.Contains(t, o.out, "uplinks eth1 up")
	p.stop()
	assert.Empty(t, changes(before, footprint(t, ns)))
}

// The guide's example as it stands: a VMI on the pod network and on VLAN 100 of
// an Open vSwitch bridge. Its frames are tagged on the uplink; behind it are
// guests of another sidewire, in VLAN 100 and in VLAN 200.
func TestGuideVLAN100Row6(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "ip", "ping", "curl", "dhclient")
	const vmFile, nadFile = "../../engine/vmi/testdata/guide/03-ovs-vm.yaml", "../../engine/vmi/testdata/guide/02-ovs-nad.yaml"
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	other := enginetest.NewNetNS(t)
	enginetest.Veth(t, w.Pod, "eth1", other, "eth0")
	atRest(t, w.Pod, "eth0")
	atRest(t, w.Pod, "eth1")
	vmi, err := filepath.Abs(vmFile)
	require.NoError(t, err)
	nad, err := filepath.Abs(nadFile)
	require.NoError(t, err)
	before := footprint(t, w.Pod)
	p := &process{t: t, dir: socketDir(t), log: &logBuffer{}, vmi: vmi}
	p.start(w, "--nad", nad, "--uplink", "ovs-net=eth1")
	t.Cleanup(p.stop)
	far := startLAN(t, onLAN("peer", "ovs-vlan-100", 1)+onLAN("stranger", "vlan-200", 1)+definition("vlan-200", `{"type": "ovs", "bridge": "br1", "vlan": 200}`),
		"--nad", nad, "--netns", other.Path, "--uplink", "ovs-vlan-100=eth0")

	pod := plugNIC(t, p, "03-ovs-vm/default", vhosttest.Options{}).withLease("10.0.2.2/24")
	a := plugNIC(t, p, "03-ovs-vm/ovs-net", vhosttest.Options{}).withAddr("10.9.0.1/24")
	b := plugVM(t, far, "peer", vhosttest.Options{}).withAddr("10.9.0.2/24")
	c := plugVM(t, far, "stranger", vhosttest.Options{}).withAddr("10.9.0.3/24")
	require.NoError(t, other.Addr("eth0", "10.9.0.4/24"))
	tags := sniff(t, other, "eth0")
	assert.True(t, a.pings("10.9.0.2"))
	assert.True(t, b.pings("10.9.0.1"))
	assert.Equal(t, map[uint16]bool{100: true}, tags([6]byte(p.macOf("03-ovs-vm/ovs-net"))), "VLANs in which the guest's frames come out")
	carry(t, a.ns, b.ns, "10.9.0.2:7000", 2, 8<<20)
	carry(t, b.ns, a.ns, "10.9.0.1:7000", 2, 8<<20)
	for _, addr := range []string{"10.9.0.3", "10.9.0.4"} {
		assert.False(t, a.pings(addr), "%s is not in VLAN 100", addr)
	}
	assert.False(t, c.pings("10.9.0.1"))
	assert.True(t, strings.HasPrefix(pod.run("curl", "-sS", "--max-time", "10", outsideURL("/whoami")), enginetest.PodIP+":"), "the pod network beside it")
	o := sidewire(t, "forward", "--socket-dir", p.dir, "add", "03-ovs-vm/ovs-net", "tcp:80")
	assert.Equal(t, exitInput, o.code)
	assert.Contains(t, o.err, "nothing is forwarded")

	o = sidewire(t, "qemu-args", "-f", vmi, "--nad", nad, "--netns", w.Pod.Path, "--uplink", "ovs-net=eth1", "--qemu", "/bin/true")
	require.Zero(t, o.code, o.err)
	assert.Contains(t, o.out, "mac="+p.nicOf("03-ovs-vm/ovs-net").MAC)
	assert.Contains(t, o.out, "host_mtu=1500")
	assert.Contains(t, o.out, "bootindex=2")
	p.stop()
	assert.Empty(t, changes(before, footprint(t, w.Pod)))
}

// macOf is the address of an interface.
func (p *process) macOf(name string) (m frame.MAC) {
	p.t.Helper()
	require.NoError(p.t, m.UnmarshalText([]byte(p.nicOf(name).MAC)))
	return m
}

// sniff listens on a link, and tells in which VLANs frames of a station came so
// far (0: untagged).
func sniff(t *testing.T, ns *enginetest.NetNS, link string) func(mac frame.MAC) map[uint16]bool {
	t.Helper()
	var up *uplink.Uplink
	require.NoError(t, ns.Do(func() (err error) {
		up, err = uplink.Open(uplink.Config{Link: link, Workers: 1, Promiscuous: true})
		return err
	}))
	t.Cleanup(func() { up.Close() })
	return func(mac frame.MAC) map[uint16]bool {
		out := map[uint16]bool{}
		b, q := new(frame.Batch), up.Queues()[0]
		for {
			b.Reset(0)
			n := q.Pull(b)
			if n == 0 {
				return out
			}
			for i := range n {
				f := b.Frame(i)
				if frame.MAC(f.Src()) != mac {
					continue
				}
				vlan := uint16(0)
				if f.EtherType() == 0x8100 {
					vlan = binary.BigEndian.Uint16(f.Head[14:]) & 0xfff
				}
				out[vlan] = true
			}
			q.Release(b)
		}
	}
}

// With a bridge that filters VLANs, as the kernel's do, what is untagged on the
// uplink is the network of the definitions without a VLAN.
func TestBridgeUplinkFiltersVLANs(t *testing.T) {
	ns, outside := node(t)
	enginetest.Must(t, outside.Addr("eth0", "10.9.0.250/24"))
	docs := onLAN("plain", "plain", 1) + onLAN("tagged", "tagged", 1) +
		definition("plain", `{"type": "bridge", "bridge": "br0"}`) + definition("tagged", `{"type": "bridge", "bridge": "br0", "vlan": 100}`)
	p := startLAN(t, docs, "--netns", ns.Path, "--uplink", "default/plain=eth1")
	a := plugVM(t, p, "plain", vhosttest.Options{}).withAddr("10.9.0.1/24")
	b := plugVM(t, p, "tagged", vhosttest.Options{}).withAddr("10.9.0.2/24")
	tags := sniff(t, outside, "eth0")
	assert.True(t, a.pings("10.9.0.250"))
	assert.False(t, b.pings("10.9.0.250"))
	assert.False(t, a.pings("10.9.0.2"))
	assert.Equal(t, map[uint16]bool{0: true}, tags(p.macOf("plain/net")))
	assert.False(t, b.pings("10.9.0.249"))
	assert.Equal(t, map[uint16]bool{100: true}, tags(p.macOf("tagged/net")))
}

// A link that a CNI left for the network is used without being named, as it is:
// the node's bridge behind it does the VLANs.
func TestLinkOfItsCNI(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "ip", "ping")
	docs := onLAN("vm1", "blue", 1) + onLAN("vm2", "blue", 1) + definition("blue", `{"type": "bridge", "bridge": "br0", "vlan": 100}`)
	for _, link := range []string{"poda08a0fcbdea", "net1"} {
		t.Run(link, func(t *testing.T) {
			ns, outside := enginetest.NewNetNS(t), enginetest.NewNetNS(t)
			enginetest.Veth(t, ns, link, outside, "eth0")
			enginetest.Must(t, outside.Addr("eth0", "10.9.0.250/24"), ns.SetMTU(link, 1400), outside.SetMTU("eth0", 1400))
			p := startLAN(t, docs, "--netns", ns.Path)
			a := plugVM(t, p, "vm1", vhosttest.Options{}).withAddr("10.9.0.1/24")
			plugVM(t, p, "vm2", vhosttest.Options{}).withAddr("10.9.0.2/24")
			assert.True(t, a.pings("10.9.0.250"))
			assert.True(t, a.pings("10.9.0.2"))
			st := p.nicOf("vm1/net")
			assert.Equal(t, link, st.Switch.Name)
			assert.Equal(t, 1400, st.MTU)
			assert.Zero(t, st.Switch.VLAN)
			p.stop()
			require.NoError(t, ns.Addr(link, "10.9.0.9/24"))
			sidewire(t, "run", "-f", p.vmi, "--socket-dir", p.dir, "--netns", ns.Path).says(t, exitInput, "run",
				[]string{"vm1/net and vm2/net", link, "10.9.0.9/24", "room for one guest"})
		})
	}
}

// What does not fit together is refused with a line that says how to mend it,
// before anything is touched.
func TestBadNetworks(t *testing.T) {
	ns, _ := node(t)
	blue := definition("blue", `{"type": "bridge"}`)
	for name, c := range map[string]struct {
		docs  string
		args  []string
		code  int
		words []string
	}{
		"no definition": {onLAN("vm1", "blue", 1) + definition("red", `{"type": "bridge"}`), nil, exitInput,
			[]string{"docs.yaml:12: spec.networks[0].multus.networkName", "default/blue is not given", "default/red (", "docs.yaml:14)", "--nad"}},
		"unknown type": {onLAN("vm1", "blue", 1) + definition("blue", `{"type": "ptp"}`), nil, exitInput,
			[]string{"vm1/net", "default/blue (", `type "ptp"`, "bridge, cnv-bridge, ovs"}},
		"broken JSON": {onLAN("vm1", "blue", 1) + definition("blue", "{\n    \"type\": \"bridge\",\n    \"vlan\": 1oo\n    }"), nil, exitInput,
			[]string{"docs.yaml:19: spec.config", "line 19, column 14: invalid character"}},
		"bad VLAN":           {onLAN("vm1", "blue", 1) + definition("blue", "{\n    \"type\": \"bridge\",\n    \"vlan\": 4095\n    }"), nil, exitInput, []string{"docs.yaml:19: spec.config.vlan", "0 and 4094"}},
		"masquerade":         {strings.Replace(onLAN("vm1", "blue", 1), "bridge: {}", "masquerade: {}", 1) + blue, nil, exitInput, []string{"interfaces[0].name", "only implemented with pod network"}},
		"pod network":        {strings.Replace(onLAN("vm1", "blue", 1), "multus: {networkName: blue}", "pod: {}", 1), nil, exitInput, []string{"vm1/net", "no such link: eth0", "eth1", "--uplink"}},
		"no such uplink":     {onLAN("vm1", "blue", 1) + blue, []string{"--uplink", "blue=eth7"}, exitInput, []string{"vm1/net", "eth7", "eth1", "--uplink"}},
		"no such network":    {onLAN("vm1", "blue", 1) + blue, []string{"--uplink", "green=eth1"}, exitInput, []string{"green=eth1", "blue, default/blue, net"}},
		"one uplink for two": {onLAN("vm1", "blue", 1) + onLAN("vm2", "red", 1) + blue + definition("red", `{"type": "bridge", "bridge": "br1"}`), []string{"--uplink", "blue=eth1", "--uplink", "red=eth1"}, exitInput, []string{"eth1", "cni0", "br1"}},
		"no address left":    {onLAN("vm1", "blue", 1) + onLAN("vm2", "blue", 1) + definition("blue", `{"type": "bridge", "ipam": {"type": "host-local", "subnet": "10.9.0.0/30"}}`), nil, exitInput, []string{"no address is left", "default/blue"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := socketDir(t)
			file := filepath.Join(dir, "docs.yaml")
			require.NoError(t, os.WriteFile(file, []byte(c.docs), 0o644))
			sidewire(t, append([]string{"run", "-f", file, "--socket-dir", filepath.Join(dir, "s"), "--netns", ns.Path}, c.args...)...).says(t, c.code, "run", c.words)
		})
	}

	dir := socketDir(t)
	file := filepath.Join(dir, "docs.yaml")
	require.NoError(t, os.WriteFile(file, []byte(onLAN("vm1", "blue", 1)), 0o644))
	nad := writeFile(t, "nad.yaml", blue)
	o := sidewire(t, "validate", "-f", file)
	assert.Zero(t, o.code, "the spec is sound")
	assert.Empty(t, o.out)
	assert.Contains(t, o.err, "spec.networks[0].multus.networkName: NetworkAttachmentDefinition default/blue is not given")
	o = sidewire(t, "validate", "-f", file, "--nad", nad)
	assert.Equal(t, outcome{}, o)
	require.NoError(t, os.WriteFile(file, []byte(onLAN("vm1", "blue", 1)+definition("blue", `{"type": "bridge", "frob": 1}`)), 0o644))
	o = sidewire(t, "validate", "-f", file)
	assert.Zero(t, o.code, "an unknown key is a warning")
	assert.Contains(t, o.err, "frob")
	require.NoError(t, ns.Do(func() error {
		o = finish(t, asNobody(t, dir, "run", "-f", file, "--socket-dir", dir, "--uplink", "net=eth1"))
		return nil
	}))
	assert.Equal(t, exitMachine, o.code)
	assert.Contains(t, o.err, "vm1/net: open uplink eth1: packet socket: missing privilege: CAP_NET_RAW is needed")
}
