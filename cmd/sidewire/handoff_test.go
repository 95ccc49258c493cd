package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
)

// onMacvtap is a VMI with one macvtap interface, its definition, and the pool.
func onMacvtap(vcpus int, config, conf string) string {
	return fmt.Sprintf(`kind: VirtualMachineInstance
metadata: {name: vm}
spec:
  domain:
    cpu: {cores: %d}
    memory: {guest: 256Mi}
    devices:
      networkInterfaceMultiqueue: %v
      interfaces:
      - {name: net, macvtap: {}, macAddress: %q}
  networks:
  - {name: net, multus: {networkName: blue}}
---
kind: NetworkAttachmentDefinition
metadata:
  name: blue
  annotations: {k8s.v1.cni.cncf.io/resourceName: macvtap.network.kubevirt.io/dataplane}
spec:
  config: '{"type": "macvtap"%s}'
---
kind: ConfigMap
apiVersion: v1
metadata: {name: macvtap-deviceplugin-config}
data:
  DP_MACVTAP_CONF: '%s'
`, vcpus, vcpus > 1, guestMAC, config, conf)
}

// dataplane is the pool that onMacvtap's definition names, on the world's eth0.
const dataplane = `[{"name": "dataplane", "lowerDevice": "eth0", "mode": "bridge", "capacity": 2}]`

// guestCIDR is the address that guests give themselves beside the pod's.
const (
	guestAddr = "10.244.1.9"
	guestCIDR = guestAddr + "/24"
)

// frames is what comes by a link.
type frames struct{ fd int }

// listenFrames begins to collect the frames of a link.
func listenFrames(t *testing.T, ns *enginetest.NetNS, link string) *frames {
	t.Helper()
	f := &frames{}
	require.NoError(t, ns.Do(func() (err error) {
		f.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(htons(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		l, err := netlink.LinkByName(link)
		if err != nil {
			return err
		}
		// What a bridge floods to the link comes from elsewhere.
		if err := unix.SetsockoptInt(f.fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1); err != nil {
			return err
		}
		return unix.Bind(f.fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: l.Attrs().Index})
	}))
	t.Cleanup(func() { unix.Close(f.fd) })
	return f
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

// from returns the frames so far that the address sent.
func (f *frames) from(mac net.HardwareAddr) (all [][]byte) {
	b := make([]byte, 65536)
	for {
		n, _, err := unix.Recvfrom(f.fd, b, 0)
		if err != nil {
			return all
		}
		if n >= 14 && string(b[6:12]) == string(mac) {
			all = append(all, append([]byte(nil), b[:n]...))
		}
	}
}

// works has the guest reach the outside and be reached, over IPv4 and IPv6.
func works(t *testing.T, w *enginetest.World, a *enginetest.Agent, mac net.HardwareAddr) {
	t.Helper()
	do := func(c enginetest.GuestCmd) enginetest.GuestReply {
		t.Helper()
		c.Timeout = time.Minute
		r, err := a.Do(c)
		require.NoError(t, err)
		return r
	}
	do(enginetest.GuestCmd{Do: "addr", Addr: guestCIDR})
	assert.Equal(t, mac.String(), do(enginetest.GuestCmd{Do: "link"}).Link.MAC)
	assert.Equal(t, 3, do(enginetest.GuestCmd{Do: "ping", Host: enginetest.OutsideIP, N: 3, Interval: 10 * time.Millisecond}).Received)
	url := fmt.Sprintf("http://%s:%d/data", enginetest.OutsideIP, enginetest.HTTPPort)
	r := do(enginetest.GuestCmd{Do: "http_get", URL: url + "?bytes=1048576"})
	assert.Equal(t, enginetest.DataSum(1<<20), r.Sum)
	r = do(enginetest.GuestCmd{Do: "http_put", URL: url, Bytes: 1 << 20})
	assert.Equal(t, enginetest.DataSum(1<<20), strings.TrimSpace(r.Body))
	do(enginetest.GuestCmd{Do: "listen", Kind: "http", Port: 80})
	c, err := w.Outside.Dial("tcp4", guestAddr+":80", 5*time.Second)
	require.NoError(t, err)
	require.NoError(t, c.Close())
	do(enginetest.GuestCmd{Do: "unlisten", Port: 80})
	// A neighbour that asks by multicast finds the guest.
	assert.True(t, enginetest.Wait(30*time.Second, func() bool {
		return w.Outside.Run("ping", "-c", "1", "-W", "2", linkLocal(mac)+"%veth0") == nil
	}), "ping %s", linkLocal(mac))
}

// linkLocal is the IPv6 address that a kernel makes of a MAC.
func linkLocal(mac net.HardwareAddr) string {
	return net.IP{0xfe, 0x80, 0, 0, 0, 0, 0, 0, mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]}.String()
}

// macvtaps are the names of the macvtaps in a namespace.
func macvtaps(t *testing.T, ns *enginetest.NetNS) (names []string) {
	t.Helper()
	require.NoError(t, ns.Do(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			if l.Type() == "macvtap" {
				names = append(names, l.Attrs().Name)
			}
		}
		return err
	}))
	return names
}

// needMacvtap is what these tests need.
func needMacvtap(t *testing.T, more ...string) {
	t.Helper()
	enginetest.Need(t, append([]string{"root", "netns", "macvtap"}, more...)...)
}

// QEMU is started by a shell with what qemu-args says: the guest has two queues
// on the node's network, sidewire is out of the path, says nothing for it, and
// takes the link away at the end.
func TestMacvtapRow75Row77Row78ByArguments(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	needMacvtap(t, "qemu", "kernel", "ping")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	wire := listenFrames(t, w.Outside, "veth0")
	p := startSidewire(t, w, onMacvtap(2, "", dataplane))
	assert.Empty(t, wire.from(guestMAC[:]), "silent before the handover (row 79)")
	st := p.status().Interfaces[0]
	require.NotNil(t, st.Handoff)
	assert.Equal(t, []string{st.Handoff.Link}, macvtaps(t, w.Pod))
	assert.Equal(t, "arguments bridge eth0 2 false", fmt.Sprint(st.Handoff.Way, " ", st.Handoff.Mode, " ", st.Handoff.Lower, " ", st.Handoff.Queues, " ", st.Handoff.Adopted))

	o := sidewire(t, "qemu-args", "-f", p.vmi, "--netns", w.Pod.Path, "--socket-dir", p.dir)
	require.Zero(t, o.code, o.err)
	assert.Contains(t, o.out, "tap,id=net-net,fds=3:4,vhost=off\n")
	assert.Contains(t, o.out, "mac="+guestMAC.String())
	_, opens, ok := strings.Cut(o.err, "exec ")
	require.True(t, ok, o.err)
	opens, _, _ = strings.Cut(opens, "\n")
	g := enginetest.Guest(t, t.TempDir(), enginetest.GuestOptions{
		Args: strings.Split(strings.TrimSpace(renumber(o.out, "3:4", "13:14")), "\n"), Memory: -1, CPUs: -1,
		QEMU: writeScript(t, "exec "+strings.NewReplacer("3<>", "13<>", "4<>", "14<>").Replace(opens)+"\nexec qemu-system-x86_64 \"$@\"\n"),
	})
	works(t, w, g.Agent, guestMAC[:])
	r, err := g.Do(enginetest.GuestCmd{Do: "channels", N: 2})
	require.NoError(t, err, r)
	works(t, w, g.Agent, guestMAC[:])
	g.Stop()
	p.stop()
	assert.Empty(t, macvtaps(t, w.Pod))
}

// renumber gives descriptors other numbers, where the first are the harness's own.
func renumber(args, from, to string) string { return strings.Replace(args, "fds="+from, "fds="+to, 1) }

// writeScript is a program for a shell that has two digits for a descriptor.
func writeScript(t *testing.T, script string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "start")
	require.NoError(t, os.WriteFile(p, []byte("#!/bin/bash\n"+script), 0o755))
	return p
}

// A QEMU that runs is given its NIC over its monitor, behind a port of q35 that
// is free, and so is the one after it. At the end it loses the NIC.
func TestMacvtapRow77Row78ByMonitor(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	needMacvtap(t, "qemu", "kernel", "ping")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	wire := listenFrames(t, w.Outside, "veth0")
	dir := socketDir(t)
	monitor := filepath.Join(dir, "qmp.sock")
	image := t.TempDir()
	kernel, initramfs, err := enginetest.BuildGuestImage(image, "")
	require.NoError(t, err)
	start := func() *enginetest.VM {
		g := enginetest.Guest(t, image, enginetest.GuestOptions{
			Kernel: kernel, Initramfs: initramfs, Machine: "q35", CPUs: 2,
			Args: []string{"-qmp", "unix:" + monitor + ",server=on,wait=off", "-device", "pcie-root-port,id=spare,chassis=9"},
		})
		return g
	}
	p := startSidewire(t, w, onMacvtap(2, "", dataplane), "--qmp", monitor, "--announce")
	assert.Equal(t, prepared, p.status().Interfaces[0].Handoff.State, "QEMU is not there yet")
	assert.Empty(t, wire.from(guestMAC[:]), "silent before the handover (row 79)")
	for range 2 {
		wire.from(guestMAC[:]) // the one before filled the socket
		g := start()
		require.True(t, enginetest.Wait(20*time.Second, func() bool { return p.status().Interfaces[0].Handoff.State == handed }), "%s", p.log)
		require.True(t, enginetest.Wait(10*time.Second, func() bool {
			return slices.ContainsFunc(wire.from(guestMAC[:]), func(f []byte) bool { return f[12] == 0x80 && f[13] == 0x35 })
		}), "no RARP: %s", p.log)
		works(t, w, g.Agent, guestMAC[:])
		g.Stop()
		require.True(t, enginetest.Wait(20*time.Second, func() bool { return p.status().Interfaces[0].Handoff.State == prepared }), "%s", p.log)
	}
	g := start()
	require.True(t, enginetest.Wait(20*time.Second, func() bool { return p.status().Interfaces[0].Handoff.State == handed }), "%s", p.log)
	_, err = g.Do(enginetest.GuestCmd{Do: "addr", Addr: guestCIDR})
	require.NoError(t, err)
	// A crash leaves the guest its network, and the next run takes it up.
	p.kill()
	r, err := g.Do(enginetest.GuestCmd{Do: "ping", Host: enginetest.OutsideIP})
	require.NoError(t, err)
	assert.Equal(t, 1, r.Received)
	p.start(w, "--qmp", monitor)
	assert.Equal(t, handed, p.status().Interfaces[0].Handoff.State)
	assert.True(t, p.status().Interfaces[0].Handoff.Kept)
	r, err = g.Do(enginetest.GuestCmd{Do: "ping", Host: enginetest.OutsideIP})
	require.NoError(t, err)
	assert.Equal(t, 1, r.Received)
	p.stop()
	assert.Empty(t, macvtaps(t, w.Pod))
	_, err = g.QMP.Do("device_del", map[string]string{"id": "nic-net"})
	assert.ErrorContains(t, err, "not found", "the guest has lost its NIC")
	_, err = g.QMP.Do("netdev_del", map[string]string{"id": "net-net"})
	assert.ErrorContains(t, err, "not found")
}

// A macvtap that a CNI left is taken as it is, with its own address, and is as
// it was when sidewire ends, also after a crash.
func TestMacvtapRow77Adopted(t *testing.T) {
	needMacvtap(t, "ip")
	for _, up := range []bool{false, true} {
		t.Run(fmt.Sprintf("up=%v", up), func(t *testing.T) {
			w := enginetest.NewWorld(t, enginetest.WorldOptions{})
			run := func(args ...string) {
				t.Helper()
				require.NoError(t, w.Pod.Run("ip", args...))
			}
			run("link", "add", "link", "eth0", "name", "net1", "type", "macvtap", "mode", "private")
			run("link", "set", "net1", "mtu", "1400", "alias", "of a CNI")
			if up {
				run("link", "set", "net1", "up")
			}
			// The kernel's own words about it, without what only time changes.
			look := func() (s string) {
				t.Helper()
				require.NoError(t, w.Pod.Do(func() error {
					l, err := netlink.LinkByName("net1")
					if err != nil {
						return err
					}
					a := l.Attrs()
					gen, err := os.ReadFile("/proc/sys/net/ipv6/conf/net1/addr_gen_mode")
					s = fmt.Sprint(a.HardwareAddr, a.MTU, a.Alias, a.RawFlags&(unix.IFF_UP|unix.IFF_ALLMULTI|unix.IFF_PROMISC), a.Promisc, a.Allmulti, string(gen))
					return err
				}))
				return s
			}
			before := look()
			p := startSidewire(t, w, onMacvtap(1, `, "mtu": 1300, "promiscMode": true`, dataplane))
			st := p.status().Interfaces[0]
			assert.True(t, st.Handoff.Adopted)
			assert.Equal(t, "net1 private eth0 1300", fmt.Sprint(st.Handoff.Link, " ", st.Handoff.Mode, " ", st.Handoff.Lower, " ", st.MTU))
			assert.Equal(t, guestMAC.String(), st.MAC)
			assert.NotEqual(t, before, look())
			assert.Contains(t, sidewire(t, "status", "--socket-dir", p.dir).out, "macvtap net1 (private, /dev/tap")
			p.kill()
			p.start(w)
			assert.True(t, p.status().Interfaces[0].Handoff.Kept)
			p.stop()
			assert.Equal(t, before, look())
			// Without an address in the spec the link's own is the guest's.
			doc := strings.Replace(onMacvtap(1, "", dataplane), fmt.Sprintf(", macAddress: %q", guestMAC), "", 1)
			o := sidewire(t, "qemu-args", "-f", writeFile(t, "vmi.yaml", doc), "--netns", w.Pod.Path, "--socket-dir", p.dir)
			require.Zero(t, o.code, o.err)
			mac, err := w.Pod.MAC("net1")
			require.NoError(t, err)
			assert.Contains(t, o.out, "mac="+net.HardwareAddr(mac[:]).String())
			assert.Contains(t, o.out, "host_mtu=1400")
		})
	}
}

// A link that a CNI has set up whole is handed over without CAP_NET_ADMIN, as a
// sidecar has to.
func TestMacvtapRow77WithoutNetAdmin(t *testing.T) {
	needMacvtap(t, "ip", "setpriv")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	require.NoError(t, w.Pod.Run("ip", "link", "add", "link", "eth0", "name", "net1", "address", guestMAC.String(), "type", "macvtap"))
	p := &process{t: t, dir: socketDir(t), log: &logBuffer{}, vmi: writeFile(t, "vmi.yaml", onMacvtap(2, "", dataplane))}
	bare := func() *exec.Cmd {
		return withoutNetAdmin(t, sidewireCommand("run", "-f", p.vmi, "--netns", w.Pod.Path, "--socket-dir", p.dir))
	}
	o := finish(t, bare())
	assert.Equal(t, exitMachine, o.code)
	assert.Contains(t, o.err, "CAP_NET_ADMIN", "it is down")
	require.NoError(t, w.Pod.Up("net1"))
	p.launch(bare())
	t.Cleanup(p.stop)
	st := p.status().Interfaces[0].Handoff
	assert.True(t, st.Adopted)
	assert.Contains(t, st.Limits, "multicast")
	assert.Contains(t, p.log.String(), "no multicast reaches the guest")
	p.stop()
	assert.Equal(t, []string{"net1"}, macvtaps(t, w.Pod))
}

// withoutNetAdmin runs a command without that capability.
func withoutNetAdmin(t *testing.T, cmd *exec.Cmd) *exec.Cmd {
	t.Helper()
	program, err := enginetest.Program("setpriv")
	require.NoError(t, err)
	bare := exec.Command(program, append([]string{"--bounding-set", "-net_admin", "--inh-caps", "-net_admin", "--", executable(t)}, cmd.Args[1:]...)...)
	bare.Env = cmd.Env
	return bare
}

// A handoff that cannot be done is one line with what is missing, exit 2, and
// nothing is touched.
func TestMacvtapRow75Row76Faults(t *testing.T) {
	needMacvtap(t, "ip", "setpriv")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	require.NoError(t, w.Pod.Run("ip", "link", "add", "link", "eth0", "name", "m0", "type", "macvtap"))
	pool := func(s string) string { return onMacvtap(1, "", s) }
	named := func(link string) string {
		return strings.Replace(onMacvtap(1, "", "[]"), "kubevirt.io/dataplane", "kubevirt.io/"+link, 1)
	}
	for name, c := range map[string]struct {
		doc   string
		words []string
		bare  bool
	}{
		"no link":       {pool(`[{"name": "dataplane", "lowerDevice": "bond7"}]`), []string{"vm/net", "no link bond7", "links that are exposed"}, false},
		"not exposed":   {named("eth0"), []string{"eth0 is of kind veth", "only physical links and bonds", "name it there as lowerDevice"}, false},
		"loopback":      {named("lo"), []string{"lo is of kind device", "only physical links"}, false},
		"capacity":      {pool(`[{"name": "dataplane", "lowerDevice": "eth0", "capacity": 1}]`), []string{"pool dataplane is used up", "raise capacity"}, false},
		"MTU":           {onMacvtap(1, `, "mtu": 9000`, dataplane), []string{"MTU 9000 is more than the 1500 of eth0", "ip link set eth0 mtu 9000"}, false},
		"passthru":      {pool(`[{"name": "dataplane", "lowerDevice": "eth0", "mode": "passthru"}]`), []string{"make a macvtap on eth0", "passthru", "in use"}, false},
		"no capability": {pool(dataplane), []string{"CAP_NET_ADMIN", "setcap"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := sidewireCommand("run", "-f", writeFile(t, "vmi.yaml", c.doc), "--netns", w.Pod.Path, "--socket-dir", socketDir(t))
			if c.bare {
				cmd = withoutNetAdmin(t, cmd)
			}
			before := macvtaps(t, w.Pod)
			o := finish(t, cmd)
			assert.Equal(t, exitMachine, o.code, o.err)
			lines := strings.Split(strings.TrimSpace(o.err), "\n")
			last := lines[len(lines)-1]
			for _, word := range c.words {
				assert.Contains(t, last, word)
			}
			assert.Equal(t, before, macvtaps(t, w.Pod))
		})
	}
	t.Run("veth when asked", func(t *testing.T) {
		p := startSidewire(t, w, named("eth0"), "--macvtap-veth")
		assert.Equal(t, "eth0", p.status().Interfaces[0].Handoff.Lower)
	})
	t.Run("another link by hand", func(t *testing.T) {
		p := startSidewire(t, w, pool(`[{"name": "dataplane", "lowerDevice": "bond7"}]`), "--uplink", "blue=eth0")
		assert.Equal(t, "eth0", p.status().Interfaces[0].Handoff.Lower)
	})
}

func executable(t *testing.T) string {
	t.Helper()
	p, err := os.Executable()
	require.NoError(t, err)
	return p
}
