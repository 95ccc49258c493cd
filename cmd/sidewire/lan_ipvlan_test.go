package main

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

// haveIPVlan says whether this kernel has ipvlans.
func haveIPVlan(t *testing.T) error {
	t.Helper()
	enginetest.Need(t, "root", "netns", "ip")
	a, b := enginetest.NewNetNS(t), enginetest.NewNetNS(t)
	enginetest.Veth(t, a, "eth0", b, "eth0")
	return a.Run("ip", "link", "add", "link", "eth0", "name", "ipv", "type", "ipvlan", "mode", "l2")
}

// KubeVirt says that a bridge on an ipvlan does not work (kubevirt#7001): all of
// one parent have one hardware address, and the kernel gives each what is for its
// IP addresses alone. Here the link gets those of its guests. A kernel that has no
// ipvlan tests it in a guest that has.
func TestIPVlanRow12(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	if err := haveIPVlan(t); err != nil {
		runInGuest(t, err, "^TestIPVlanRow12$", "ipvlan", "veth", "tun", "nf_tables")
		return
	}
	t.Run("two guests", testIPVlanGuests)
	t.Run("the pod's own link", testIPVlanPod)
	t.Run("mode l3", func(t *testing.T) {
		pod, _, _, _ := childPod(t, "ipvlan", "l3")
		docs := onLAN("vm1", "blue", 1) + definition("blue", `{"type": "ipvlan", "master": "parent"}`)
		sidewire(t, "run", "-f", writeFile(t, "docs.yaml", docs), "--socket-dir", socketDir(t), "--netns", pod.Path).says(t, exitMachine, "run",
			[]string{"vm1/net", "net1 is an ipvlan in mode l3", `"mode": "l2"`})
	})
}

func testIPVlanGuests(t *testing.T) {
	pod, outside, host, mac := childPod(t, "ipvlan", "l2")
	sibling := enginetest.NewNetNS(t)
	enginetest.Must(t,
		host.Run("ip", "link", "add", "link", "parent", "name", "ipv", "type", "ipvlan", "mode", "l2"),
		host.Run("ip", "link", "set", "ipv", "netns", sibling.Path, "name", "eth0"),
		sibling.Up("eth0"), sibling.Addr("eth0", "10.9.0.77/24"),
	)
	addrs := func() string {
		out, err := pod.Command("ip", "-o", "addr", "show", "dev", "net1").Output()
		require.NoError(t, err)
		return string(out)
	}
	before := addrs()
	docs := onLAN("vm1", "blue", 1) + onLAN("vm2", "blue", 1) + definition("blue", `{"type": "ipvlan", "master": "parent"}`)
	p := startLAN(t, docs, "--netns", pod.Path, "--state-dir", t.TempDir())
	heard := talkers(t, outside, "eth0")
	a := plugVM(t, p, "vm1", vhosttest.Options{}).withAddr("10.9.0.1/24").with6("fd09::1/64")
	b := plugVM(t, p, "vm2", vhosttest.Options{}).withAddr("10.9.0.2/24").with6("fd09::2/64")
	for _, v := range []*vm{a, b} {
		// The first answer may come before the link has the address.
		for _, ip := range []string{"10.9.0.250", "fd09::250", "10.9.0.77"} {
			enginetest.Eventually(t, soon, func() bool { return v.pings(ip) })
		}
	}
	assert.True(t, a.pings("10.9.0.2"))
	for _, ip := range []string{"10.9.0.1", "10.9.0.2", "fd09::1", "fd09::2"} {
		require.NoError(t, outside.Run("ping", "-c", "1", "-W", "5", ip))
		assert.Equal(t, mac.String(), neighbour(outside, ip))
	}
	require.NoError(t, sibling.Run("ping", "-c", "1", "-W", "5", "10.9.0.2"))
	carry(t, outside, a.ns, "10.9.0.1:7000", 1, 1<<20)
	carry(t, b.ns, outside, "10.9.0.250:7000", 1, 1<<20)
	carry(t, outside, b.ns, "[fd09::2]:7000", 1, 1<<20)
	// The kernel has the address, and says nothing: no RST for a port that is the guest's.
	_, err := outside.Dial("tcp", "10.9.0.1:9", soon)
	assert.ErrorContains(t, err, "refused", "by the guest")
	for _, name := range []string{"vm1/net", "vm2/net"} {
		assert.False(t, heard()[p.macOf(name)], "%s on the wire", name)
	}
	assert.Contains(t, addrs(), "10.9.0.1/32")
	p.stop()
	assert.Equal(t, before, addrs(), "the link has its own again")
}

// A guest takes the place of a pod's ipvlan with its address, and may have others
// beside it. The link has its own in the end, also when a run was killed.
func testIPVlanPod(t *testing.T) {
	pod, outside, _, mac := childPod(t, "ipvlan", "l2")
	enginetest.Must(t, pod.Addr("net1", "10.9.0.5/24"), pod.Run("ip", "route", "add", "default", "via", "10.9.0.250"))
	addrs := func() string {
		out, err := pod.Command("ip", "-o", "-4", "addr", "show", "dev", "net1").Output()
		require.NoError(t, err)
		return string(out)
	}
	before := addrs()
	for _, m := range []string{"", ", macAddress: 02:00:00:00:00:77"} {
		state, resolv := t.TempDir(), writeFile(t, "resolv.conf", "nameserver 10.9.0.250\n")
		p := startLAN(t, onPod("vm1", 1, m), "--netns", pod.Path, "--uplink", "net=net1", "--state-dir", state, "--resolv-conf", resolv)
		a := plugVM(t, p, "vm1", vhosttest.Options{}).withAddr("10.9.0.5/24").withAddr("10.9.0.6/24").with6("fd09::1/64")
		for _, ip := range []string{"10.9.0.250", "fd09::250"} {
			enginetest.Eventually(t, soon, func() bool { return a.pings(ip) })
		}
		require.NoError(t, outside.Run("ping", "-c", "1", "-W", "5", "10.9.0.5"))
		enginetest.Eventually(t, soon, func() bool { return a.pings("10.9.0.250", "-I", "10.9.0.6") })
		assert.Equal(t, mac.String(), neighbour(outside, "10.9.0.5"))
		carry(t, outside, a.ns, "10.9.0.5:7000", 1, 1<<20)
		carry(t, outside, a.ns, "10.9.0.6:7000", 1, 1<<20)
		assert.Contains(t, addrs(), "10.9.0.6/32")
		p.kill()
		p = startLAN(t, onPod("vm1", 1, m), "--netns", pod.Path, "--uplink", "net=net1", "--state-dir", state, "--resolv-conf", resolv)
		assert.NotContains(t, addrs(), "10.9.0.6", "what the last run left is gone")
		p.stop()
		assert.Equal(t, before, addrs())
	}
}

// runInGuest runs tests of this package in a guest whose kernel has some more
// modules than this one, since this one cannot do what why says.
func runInGuest(t *testing.T, why error, tests string, modules ...string) {
	t.Helper()
	if os.Getenv("SIDEWIRE_IN_GUEST") != "" {
		t.Fatalf("the guest's kernel cannot do it either: %v", why)
	}
	enginetest.Need(t, "qemu", "kernel", "go", "ip", "ping")
	kernel, dir, err := enginetest.GuestKernel()
	require.NoError(t, err)
	tmp := t.TempDir()
	init, err := enginetest.BuildGuest(tmp)
	require.NoError(t, err)
	program := filepath.Join(tmp, "tests")
	cmd := exec.Command("go", "test", "-c", "-ldflags=-s -w", "-o", program, "sidewire/cmd/sidewire")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	files := map[string]string{"/tests": program}
	for _, name := range []string{"ip", "ping", "env", "nft", "nsenter"} {
		found, err := enginetest.Program(name)
		require.NoError(t, err)
		found, err = filepath.EvalSymlinks(found)
		require.NoError(t, err)
		libs, err := enginetest.WithLibraries(found)
		require.NoError(t, err)
		maps.Copy(files, libs)
		files["/bin/"+name] = found
	}
	initrd := filepath.Join(tmp, "initrd")
	f, err := os.Create(initrd)
	require.NoError(t, err)
	require.NoError(t, enginetest.BuildInitramfs(f, enginetest.Initramfs{Init: init, Modules: dir, Drivers: modules, Files: files}))
	require.NoError(t, f.Close())
	g, err := enginetest.StartGuest(enginetest.GuestOptions{Kernel: kernel, Initramfs: initrd, Memory: 768, CPUs: 2, BootTimeout: 120 * time.Second})
	require.NoError(t, err)
	t.Cleanup(g.Stop)
	r, err := g.Do(enginetest.GuestCmd{Do: "run", Path: "/bin/env", Timeout: 300 * time.Second, Args: []string{
		"PATH=/bin", "HOME=/tmp", "SIDEWIRE_IN_GUEST=1", "TEST_REQUIRE=all", "/tests", "-test.v", "-test.run", tests, "-test.timeout", "280s",
	}})
	require.NoError(t, err, "%s", g.Console())
	t.Logf("in the guest:\n%s", r.Data)
	assert.Zero(t, r.Status)
	assert.Contains(t, r.Data, "PASS")
}
