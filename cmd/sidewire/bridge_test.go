package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

// onPod is a VMI whose only interface, net, is a bridge on the pod network, with
// more of its fields.
func onPod(name string, vcpus int, more string) string {
	return strings.NewReplacer("multus: {networkName: x}", "pod: {}", "bridge: {}}", "bridge: {}"+more+"}").Replace(onLAN(name, "x", vcpus))
}

// startBridge runs sidewire in a world's pod with these documents.
func startBridge(t *testing.T, w *enginetest.World, docs string, flags ...string) *process {
	t.Helper()
	enginetest.Need(t, "root", "netns", "tun", "nft", "ip", "ping")
	return startSidewire(t, w, docs, flags...)
}

// linkMAC is a link's hardware address.
func linkMAC(t *testing.T, ns *enginetest.NetNS, link string) string {
	t.Helper()
	m, err := ns.MAC(link)
	require.NoError(t, err)
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5])
}

// isPutBack waits until a namespace is what it was: of IPv6 the kernel does a part
// by and by.
func isPutBack(t *testing.T, ns *enginetest.NetNS, before map[string]string) {
	t.Helper()
	var differ []string
	if !enginetest.Wait(soon, func() bool { differ = changes(before, footprint(t, ns)); return len(differ) == 0 }) {
		assert.Empty(t, differ)
	}
}

// The pod's address, mask, router, resolvers, MTU and hardware address are the
// guest's: dhclient gets them, and TCP with checksums crosses in both directions,
// on two queue pairs. In the end the pod has everything back.
func TestBridgeRow14Row22Row35Row36Row38Row39Row84PodAddressByDHCP(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{MTU: 1450})
	before := footprint(t, w.Pod)
	own := linkMAC(t, w.Pod, "eth0")
	p := startBridge(t, w, onPod("vm", 2, ""))
	st := p.nicOf("vm/net")
	assert.Equal(t, own, st.MAC, "the link's own address goes to the guest")
	assert.NotEqual(t, own, linkMAC(t, w.Pod, "eth0"))
	v := plugVM(t, p, "vm", vhosttest.Options{QueuePairs: 2}).withLease(enginetest.PodIP + "/24")
	assert.Contains(t, v.run("ip", "route"), "default via "+enginetest.OutsideIP)
	assert.Contains(t, v.run("ip", "link", "show", "eth0"), "mtu 1450")
	resolv, err := os.ReadFile(filepath.Join(v.dir, "resolv.conf"))
	require.NoError(t, err)
	assert.Contains(t, string(resolv), "nameserver "+enginetest.OutsideIP)
	v.run("ping", "-c", "2", "-i", "0.2", "-W", "5", "-s", "1422", "-M", "do", enginetest.OutsideIP)
	enginetest.Must(t, w.Outside.Run("ping", "-c", "1", "-W", "5", enginetest.PodIP))
	carry(t, v.ns, w.Outside, enginetest.OutsideIP+":7000", 4, 8<<20)
	carry(t, w.Outside, v.ns, enginetest.PodIP+":7000", 4, 8<<20)

	st = p.nicOf("vm/net")
	assert.Equal(t, "bridge "+enginetest.PodIP+" "+enginetest.PodIP+" "+enginetest.OutsideIP+" eth0 up 2 1450",
		fmt.Sprint(st.Binding, " ", st.Guest, " ", st.Pod, " ", st.Gateway, " ", st.Link, " ", st.LinkState, " ", st.QueueCount, " ", st.MTU))
	require.NotNil(t, st.Taken)
	assert.Equal(t, own, st.Taken.LinkMAC.String())
	assert.Equal(t, "nftables", string(st.Taken.Silence))
	for i, pair := range st.Device.Pairs {
		assert.NotZero(t, pair.RxFrames, "pair %d", i)
		assert.NotZero(t, pair.TxFrames, "pair %d", i)
	}
	o := sidewire(t, "status", "--socket-dir", p.dir)
	for _, words := range []string{"eth0 up has its place", enginetest.PodIP + " by DHCP, gateway " + enginetest.OutsideIP, "cannot migrate VMI"} {
		assert.Contains(t, o.out, words)
	}
	p.stop()
	isPutBack(t, w.Pod, before)
	enginetest.Must(t, w.Pod.Run("ping", "-c", "1", "-W", "5", enginetest.OutsideIP))
}

// greeter greets whoever connects, and says back what it is told.
func greeter(t *testing.T, ns *enginetest.NetNS, port int) {
	t.Helper()
	listen(t, ns, "tcp4", fmt.Sprintf(":%d", port), func(c net.Conn) {
		fmt.Fprintln(c, "hello")
		_, _ = io.Copy(c, c)
	})
}

// After SIGKILL the next run of the same guest goes on without a word of the
// kernel's in between; connections live. Any other run puts the link back first,
// and so does the command.
func TestBridgeRow43Crash(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	before := footprint(t, w.Pod)
	p := startBridge(t, w, onPod("vm", 1, ""))
	v := plugVM(t, p, "vm", vhosttest.Options{}).withLease(enginetest.PodIP + "/24")
	greeter(t, v.ns, 80)
	c := dialFrom(t, w.Outside, enginetest.PodIP+":80")
	require.True(t, echoes(t, c, "before"))
	p.kill()
	refused := func() bool { // nobody answers for the guest while nobody serves it
		_, err := w.Outside.Dial("tcp4", enginetest.PodIP+":81", 300*time.Millisecond)
		return err != nil && strings.Contains(err.Error(), "refused")
	}
	assert.False(t, refused())
	p.start(w)
	require.NoError(t, v.tap.Reconnect())
	assert.True(t, p.nicOf("vm/net").Taken.Resumed)
	assert.True(t, echoes(t, c, "after"))
	p.kill()

	o := sidewire(t, "restore", "--netns", w.Pod.Path, "--socket-dir", p.dir)
	assert.Equal(t, outcome{out: "eth0 put back as it was before vm/net had its place\n"}, o)
	isPutBack(t, w.Pod, before)
	o = sidewire(t, "restore", "--netns", w.Pod.Path, "--socket-dir", p.dir)
	assert.Equal(t, outcome{out: "nothing to put back in " + w.Pod.Path + "\n"}, o)

	p.start(w)
	o = sidewire(t, "restore", "--netns", w.Pod.Path, "--socket-dir", p.dir)
	o.says(t, exitMachine, "restore", []string{"eth0, which vm/net has", "another sidewire serves this link"})
	p.kill()
	other := &process{t: t, dir: p.dir, log: &logBuffer{}, vmi: writeFile(t, "vmi.yaml", spec("vm", 1))}
	other.start(w)
	assert.Contains(t, other.log.String(), "link is put back as it was before a crash")
	assert.Equal(t, enginetest.PodIP, other.status().Interfaces[0].Pod.String(), "masquerade finds the address")
	other.stop()
	isPutBack(t, w.Pod, before)
}

// A distribution's kernel in QEMU takes the pod's place, over two queue pairs,
// and again after a reboot.
func TestBridgeRow36Row38Row39QEMU(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	enginetest.Need(t, "qemu", "kernel")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{MTU: 1450})
	own := linkMAC(t, w.Pod, "eth0")
	p := startBridge(t, w, onPod("vm", 2, ""))
	g := enginetest.Guest(t, t.TempDir(), enginetest.GuestOptions{Args: qemuArgs(t, w, p), Memory: -1, CPUs: -1, Machine: "q35"})
	for boot := range 2 {
		if boot > 0 {
			require.NoError(t, g.Reboot(time.Minute))
		}
		r, err := g.Do(enginetest.GuestCmd{Do: "dhcp"})
		require.NoError(t, err)
		assert.Equal(t, enginetest.PodIP+"/24", r.Lease.Addr)
		assert.Equal(t, "169.254.75.10", r.Lease.Server)
		assert.Equal(t, []string{"0.0.0.0/0 via " + enginetest.OutsideIP}, r.Lease.Routes)
		assert.Equal(t, 1450, r.Lease.MTU)
		r, err = g.Do(enginetest.GuestCmd{Do: "link"})
		require.NoError(t, err)
		assert.Equal(t, own, r.Link.MAC)
		assert.Equal(t, 1450, r.Link.MTU)
		_, err = g.Do(enginetest.GuestCmd{Do: "channels", N: 2})
		require.NoError(t, err)
		r, err = g.Do(enginetest.GuestCmd{Do: "http_get", Timeout: time.Minute,
			URL: fmt.Sprintf("http://%s:%d/data?bytes=%d", enginetest.OutsideName, enginetest.HTTPPort, 4<<20)})
		require.NoError(t, err)
		assert.Equal(t, enginetest.DataSum(4<<20), r.Sum)
		_, err = g.Do(enginetest.GuestCmd{Do: "listen", Kind: "http", Port: 80})
		require.NoError(t, err)
		c, err := w.Outside.Dial("tcp4", enginetest.PodIP+":80", 5*time.Second)
		require.NoError(t, err)
		require.NoError(t, c.Close())
	}
}

// A run that takes the place of another link puts back the one of before, and the
// same guest under another name begins anew.
func TestBridgeRow43CrashAndAnotherGuest(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	enginetest.Veth(t, w.Pod, "net1", w.Outside, "veth1")
	atRest(t, w.Pod, "net1")
	enginetest.Must(t, w.Pod.Addr("net1", "10.9.0.9/24"))
	before := footprint(t, w.Pod)
	p := startBridge(t, w, onPod("vm", 1, ""))
	p.kill()
	docs := onLAN("vm", "blue", 1) + definition("blue", `{"type": "macvlan", "master": "eth1"}`)
	other := &process{t: t, dir: p.dir, log: &logBuffer{}, vmi: writeFile(t, "vmi.yaml", docs)}
	other.start(w)
	assert.Equal(t, "net1", other.nicOf("vm/net").Link)
	enginetest.Must(t, w.Pod.Run("ping", "-c", "1", "-W", "5", enginetest.OutsideIP))
	other.kill()
	other.vmi = writeFile(t, "vmi.yaml", strings.Replace(docs, "name: vm}", "name: vm2}", 1))
	other.start(w)
	assert.False(t, other.nicOf("vm2/net").Taken.Resumed)
	other.stop()
	isPutBack(t, w.Pod, before)
}
