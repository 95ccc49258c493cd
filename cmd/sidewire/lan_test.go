package main

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
	"sidewire/vhostuser/vhosttest"
)

// definition is a NetworkAttachmentDefinition.
func definition(name, config string) string {
	return fmt.Sprintf("---\nkind: NetworkAttachmentDefinition\nmetadata: {name: %s}\nspec:\n  config: '%s'\n", name, config)
}

// hostLocal is an ipam of 10.9.0.0/24.
const hostLocal = `"ipam": {"type": "host-local", "subnet": "10.9.0.0/24"}`

// onLAN is a VMI with one interface on a Multus network.
func onLAN(name, network string, vcpus int) string {
	return fmt.Sprintf(`---
kind: VirtualMachineInstance
metadata: {name: %s}
spec:
  domain:
    cpu: {cores: %d}
    devices:
      networkInterfaceMultiqueue: %v
      interfaces:
      - {name: net, bridge: {}}
  networks:
  - {name: net, multus: {networkName: %s}}
`, name, vcpus, vcpus > 1, network)
}

// startLAN runs sidewire with these documents, in the namespace of the test if
// no other is given.
func startLAN(t *testing.T, docs string, flags ...string) *process {
	t.Helper()
	enginetest.Need(t, "root", "netns", "tun", "ip")
	p := &process{t: t, dir: socketDir(t), log: &logBuffer{}, vmi: writeFile(t, "docs.yaml", docs)}
	p.launch(sidewireCommand(append([]string{"run", "-f", p.vmi, "--socket-dir", p.dir}, flags...)...))
	t.Cleanup(func() {
		p.stop()
		if t.Failed() {
			t.Logf("sidewire's log:\n%s", p.log)
		}
	})
	return p
}

// nicOf is what status says of an interface.
func (p *process) nicOf(name string) InterfaceStatus {
	p.t.Helper()
	for _, i := range p.status().Interfaces {
		if i.Name == name {
			return i
		}
	}
	p.t.Fatalf("no interface %s", name)
	return InterfaceStatus{}
}

// plugVM joins a guest without a hypervisor to the interface net of a VMI. It
// has no address yet.
func plugVM(t *testing.T, p *process, name string, o vhosttest.Options) *vm {
	t.Helper()
	return plugNIC(t, p, name+"/net", o)
}

func plugNIC(t *testing.T, p *process, nic string, o vhosttest.Options) *vm {
	t.Helper()
	st := p.nicOf(nic)
	o.Path = st.Socket
	o.MAC = guestMAC // where the VMI leaves it open
	if st.MAC != "" {
		require.NoError(t, o.MAC.UnmarshalText([]byte(st.MAC)))
	}
	v := &vm{t: t, ns: enginetest.NewNetNS(t), dir: t.TempDir()}
	var err error
	require.NoError(t, v.ns.Sysctl("net/ipv6/conf/default/accept_dad", "0"))
	v.tap, err = vhosttest.StartTapGuest(vhosttest.TapOptions{Options: o, NetNS: v.ns.Path})
	require.NoError(t, err)
	t.Cleanup(func() { v.tap.Close() })
	require.NoError(t, v.ns.Up("eth0"))
	return v
}

// withAddr gives a guest an address by hand.
func (v *vm) withAddr(cidr string) *vm {
	v.t.Helper()
	require.NoError(v.t, v.ns.Addr("eth0", cidr))
	return v
}

// withLease lets dhclient ask for an address and says which it got.
func (v *vm) withLease(want string) *vm {
	v.t.Helper()
	enginetest.Need(v.t, "dhclient")
	v.dhclient("-1")
	v.t.Cleanup(func() { v.dhclient("-x") })
	assert.Contains(v.t, v.run("ip", "-4", "-o", "addr", "show", "dev", "eth0"), want)
	return v
}

// pings says whether an address answers within a second.
func (v *vm) pings(addr string, more ...string) bool {
	_, err := v.try("ping", append(append([]string{"-c", "1", "-W", "1"}, more...), addr)...)
	return err == nil
}

// Two guests whose interfaces name the same definition reach each other; they
// are leased addresses of its range. All this is done by a user without any
// capability.
func TestTwoGuestsOnOneNetwork(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "ip", "ping")
	docs := onLAN("vm1", "blue", 1) + onLAN("vm2", "blue", 1) + definition("blue", `{"type": "bridge", "bridge": "br0", `+hostLocal+`}`)
	p := &process{t: t, dir: socketDir(t), log: &logBuffer{}}
	p.vmi = filepath.Join(p.dir, "docs.yaml")
	require.NoError(t, os.WriteFile(p.vmi, []byte(docs), 0o644))
	p.launch(asNobody(t, p.dir, "run", "-f", p.vmi, "--socket-dir", p.dir))
	t.Cleanup(p.stop)
	assertNoCapabilities(t, p.cmd.Process.Pid)

	a := plugVM(t, p, "vm1", vhosttest.Options{}).withLease("10.9.0.2/24")
	b := plugVM(t, p, "vm2", vhosttest.Options{}).withLease("10.9.0.3/24")
	a.run("ping", "-c", "3", "-i", "0.2", "-W", "5", "10.9.0.3")
	b.run("ping", "-c", "1", "-W", "5", "10.9.0.2")
	assert.NotContains(t, a.run("ip", "route"), "default", "no gateway was given")

	st := p.status()
	require.Len(t, st.Interfaces, 2)
	i := st.Interfaces[0]
	assert.Equal(t, "vm1/net bridge 10.9.0.2 br0 default/blue [vm2/net] 1500",
		fmt.Sprint(i.Name, " ", i.Binding, " ", i.Guest, " ", i.Switch.Name, " ", i.Switch.Network, " ", i.Switch.Members, " ", i.MTU))
	require.Len(t, i.Leases, 1)
	assert.Equal(t, i.MAC, i.Leases[0].MAC.String())
	assert.Contains(t, a.run("ip", "link", "show", "eth0"), i.MAC)
	o := sidewire(t, "status", "--socket-dir", p.dir)
	require.Zero(t, o.code, o.err)
	for _, words := range []string{"br0 by default/blue, spoof check off", "10.9.0.3 by DHCP", "switch br0", "2 addresses, uplinks none"} {
		assert.Contains(t, o.out, words)
	}
}

// asNobody is the program as a user who may do nothing special, with a directory
// that is to be its own.
func asNobody(t *testing.T, dir string, args ...string) *exec.Cmd {
	t.Helper()
	const uid = 65534
	self, err := os.ReadFile("/proc/self/exe")
	require.NoError(t, err)
	copied := filepath.Join(dir, "sidewire") // the test's own place is closed to others
	require.NoError(t, os.WriteFile(copied, self, 0o755))
	require.NoError(t, os.Chown(dir, uid, uid))
	cmd := sidewireCommand(args...)
	cmd.Path = copied
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	return cmd
}

// assertNoCapabilities looks at a process.
func assertNoCapabilities(t *testing.T, pid int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	require.NoError(t, err)
	for _, set := range []string{"CapPrm", "CapEff", "CapAmb"} {
		assert.Contains(t, string(b), set+":\t0000000000000000\n")
	}
	assert.NotContains(t, string(b), "Uid:\t0\t")
}

// connectRaw plays the driver of an interface, without a kernel behind it.
func connectRaw(t *testing.T, p *process, nic string) *vhosttest.Guest {
	t.Helper()
	st := p.nicOf(nic)
	o := vhosttest.Options{Path: st.Socket}
	require.NoError(t, o.MAC.UnmarshalText([]byte(st.MAC)))
	g, err := vhosttest.Connect(o)
	require.NoError(t, err)
	t.Cleanup(func() { g.Close() })
	return g
}

var (
	broadcast = frame.Broadcast
	zeroMAC   frame.MAC
	addrOf    = netip.MustParseAddr
)

// discover is the first message of a DHCP client, which may be another than who
// sends it.
func discover(mac, client frame.MAC) []byte {
	m := make([]byte, 300)
	m[0], m[1], m[2] = 1, 1, 6
	copy(m[4:], "xid1")
	m[10] = 0x80
	copy(m[28:], client[:])
	copy(m[236:], []byte{0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255})
	return enginetest.UDPFrame(enginetest.Eth{Src: mac, Dst: broadcast}, enginetest.IP{Src: addrOf("0.0.0.0"), Dst: addrOf("255.255.255.255"), TTL: 64},
		enginetest.UDP{Src: 68, Dst: 67}, m)
}
