package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/vmi"
	"sidewire/vhostuser/vhosttest"
)

// outsideURL is on the outside's HTTP server.
func outsideURL(path string) string {
	return fmt.Sprintf("http://%s:%d%s", enginetest.OutsideIP, enginetest.HTTPPort, path)
}

// QEMU may listen and sidewire dial.
func TestClientMode(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "dhclient", "curl")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startSidewire(t, w, spec("vm", 1), "--mode", "client")
	v := startVM(t, p, vhosttest.Options{Listen: true})
	assert.True(t, strings.HasPrefix(v.run("curl", "-sS", "--max-time", "10", outsideURL("/whoami")), enginetest.PodIP+":"))
}

// KubeVirt 1780: leading zeros in vmNetworkCIDR are read as decimal, and the
// guest lives in that network.
func TestOwnNetworkRow59_KubeVirt1780(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "dhclient", "curl", "ping")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startSidewire(t, w, strings.Replace(spec("vm", 1), "pod: {}", `pod: {vmNetworkCIDR: "10.10.010.0/24"}`, 1))
	v := startVM(t, p, vhosttest.Options{})
	assert.Contains(t, v.run("ip", "-4", "-o", "addr", "show", "dev", "eth0"), "10.10.10.2/24")
	v.run("ping", "-c", "1", "-W", "5", "10.10.10.1")
	assert.True(t, strings.HasPrefix(v.run("curl", "-sS", "--max-time", "10", outsideURL("/whoami")), enginetest.PodIP+":"))
}

// Two VMIs, each behind a pod of its own, in one sidewire.
func TestTwoNamespaces(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "dhclient", "curl")
	w := [2]*enginetest.World{enginetest.NewWorld(t, enginetest.WorldOptions{}), enginetest.NewWorld(t, enginetest.WorldOptions{})}
	second := writeFile(t, "second.yaml", strings.Replace(spec("other", 1), guestMAC.String(), "02:00:00:00:bb:02", 1))
	// The first one's file gets its namespace by --netns, the second its own.
	p := startSidewire(t, w[0], spec("vm", 1), "-f", second+"@"+w[1].Pod.Path)
	a := startVM(t, p, vhosttest.Options{})
	b := joinVM(t, vhosttest.Options{Path: filepath.Join(p.dir, "other", "red.sock")})
	for i, v := range []*vm{a, b} {
		before, err := w[i].Outside.Counter("veth0", "rx_packets")
		require.NoError(t, err)
		v.run("curl", "-sS", "--max-time", "10", outsideURL("/whoami"))
		after, err := w[i].Outside.Counter("veth0", "rx_packets")
		require.NoError(t, err)
		assert.Greater(t, after, before+3, "the guest's own outside was called")
	}
	assert.Len(t, p.status().Interfaces, 2)
}

// Two VMIs share the address of one namespace: one has the ports that it
// lists, the other all else. Their own networks may be the same.
func TestTwoGuestsBehindOneAddress(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "dhclient", "curl", "ping")
	for cidr, second := range map[string]struct{ guest, gateway, toPod string }{
		"10.0.3.0/24": {"10.0.3.2", "10.0.3.1", "10.0.3.2"},
		"10.0.2.0/24": {"10.0.2.2", "10.0.2.1", "169.254.64.6"},
	} {
		t.Run(cidr, func(t *testing.T) {
			w := enginetest.NewWorld(t, enginetest.WorldOptions{})
			before := footprint(t, w.Pod)
			other := strings.Replace(spec("other", 1), guestMAC.String(), "02:00:00:00:bb:02", 1)
			file := writeFile(t, "second.yaml", strings.Replace(other, "pod: {}", "pod: {vmNetworkCIDR: "+cidr+"}", 1))
			p := startSidewire(t, w, spec("vm", 1, "tcp:80"), "-f", file)
			a := startVM(t, p, vhosttest.Options{})
			b := joinVM(t, vhosttest.Options{Path: filepath.Join(p.dir, "other", "red.sock")})
			assert.Contains(t, b.run("ip", "-4", "-o", "addr", "show", "dev", "eth0"), second.guest+"/24")
			greet(t, w.Pod, 7777, "pod")
			for v, name := range map[*vm]string{a: "a", b: "b"} {
				for _, port := range []int{80, 81, 82} {
					greet(t, v.ns, port, name)
				}
				assert.True(t, strings.HasPrefix(v.run("curl", "-sS", "--max-time", "10", outsideURL("/whoami")), enginetest.PodIP+":"))
			}
			b.run("ping", "-c", "1", "-W", "5", second.gateway)
			for port, want := range map[int]string{80: "a", 81: "b"} {
				hear(t, w.Outside, fmt.Sprintf("%s:%d", enginetest.PodIP, port), want)
				hear(t, w.Pod, fmt.Sprintf("127.0.0.1:%d", port), want)
			}
			hear(t, w.Pod, "10.0.2.2:82", "a")
			hear(t, w.Pod, second.toPod+":82", "b")
			hear(t, a.ns, "10.0.2.1:7777", "pod")
			hear(t, b.ns, second.gateway+":7777", "pod")
			o := sidewire(t, "forward", "--socket-dir", p.dir, "add", "vm/red", "tcp:82")
			require.Zero(t, o.code, o.err)
			hear(t, w.Outside, enginetest.PodIP+":82", "a")
			hear(t, w.Pod, "127.0.0.1:82", "a")
			st := p.status()
			require.Len(t, st.Interfaces, 2)
			assert.Len(t, st.Interfaces[0].Forwards, 2)
			assert.Nil(t, st.Interfaces[1].Forwards)
			assert.NotEqual(t, st.Interfaces[0].MAC, st.Interfaces[1].MAC)
			p.stop()
			assert.Empty(t, changes(before, footprint(t, w.Pod)))
		})
	}
}

// hear connects and wants a word.
func hear(t *testing.T, ns *enginetest.NetNS, addr, want string) {
	t.Helper()
	c, err := ns.Dial("tcp4", addr, 5*time.Second)
	require.NoError(t, err, addr)
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	got, err := io.ReadAll(c)
	require.NoError(t, err)
	assert.Equal(t, want, string(got), addr)
}

// greet says a word to whoever connects.
func greet(t *testing.T, ns *enginetest.NetNS, port int, word string) {
	t.Helper()
	listen(t, ns, "tcp4", fmt.Sprintf(":%d", port), func(c net.Conn) { _, _ = io.WriteString(c, word) })
}

// Two queue pairs carry traffic both ways, each on a worker of its own, on the
// processors that --cpus names.
func TestQueuePairsAndWorkers(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "dhclient", "curl")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startSidewire(t, w, spec("vm", 2), "--cpus", "0-1")
	v := startVM(t, p, vhosttest.Options{QueuePairs: 2})
	var wg sync.WaitGroup
	for range 16 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			_, err := v.try("curl", "-sS", "--max-time", "20", "-o", "/dev/null", outsideURL("/data?bytes=1000000"))
			assert.NoError(t, err)
		}()
	}
	wg.Wait()
	st := p.status()
	require.Len(t, st.Workers, 2)
	for i, wk := range st.Workers {
		assert.Equal(t, i, wk.CPU)
		assert.Greater(t, wk.Turns, uint64(10), "worker %d", i)
	}
	require.Len(t, st.Interfaces[0].Device.Pairs, 2)
	for i, pair := range st.Interfaces[0].Device.Pairs {
		assert.Greater(t, pair.TxFrames, uint64(10), "pair %d", i)
		assert.Greater(t, pair.RxFrames, uint64(10), "pair %d", i)
	}
	// The workers' threads are where they were told to be.
	cpus := map[string]int{}
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", p.cmd.Process.Pid))
	require.NoError(t, err)
	for _, task := range tasks {
		if b, err := os.ReadFile(task); err == nil {
			for _, l := range strings.Split(string(b), "\n") {
				if v, ok := strings.CutPrefix(l, "Cpus_allowed_list:"); ok {
					cpus[strings.TrimSpace(v)]++
				}
			}
		}
	}
	assert.GreaterOrEqual(t, cpus["0"], 1, cpus)
	assert.GreaterOrEqual(t, cpus["1"], 1, cpus)
}

func TestWorkers(t *testing.T) {
	one := &podNIC{nic: nic{iface: vmi.Interface{QueuePairs: 1}}}
	more := &lanNIC{nic: nic{iface: vmi.Interface{QueuePairs: 1}}}
	assert.Equal(t, 1, workers([]served{one}, nil), "one queue pair, one worker")
	assert.Equal(t, 4, workers([]served{one, more}, []int{0, 1, 2, 3}), "a list fixes the number")
	more.iface.QueuePairs = 4096
	assert.LessOrEqual(t, workers([]served{one, more}, nil), 4096/2, "no more than processors")
}

// H107: another user is not heard, even where the socket's mode lets it in.
func TestControlSocketKnowsItsUser_H107(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startSidewire(t, w, spec("vm", 1))
	require.NoError(t, os.Chmod(p.dir, 0o755))
	require.NoError(t, os.Chmod(filepath.Join(p.dir, "control.sock"), 0o666))
	as := func(uid uint32) error {
		cmd := sidewireCommand("status", "--socket-dir", p.dir)
		self, err := os.Executable()
		require.NoError(t, err)
		copied := filepath.Join(p.dir, "sidewire") // the test's own place is closed to others
		if _, err := os.Stat(copied); err != nil {
			in, err := os.Open(self)
			require.NoError(t, err)
			defer in.Close()
			out, err := os.OpenFile(copied, os.O_CREATE|os.O_WRONLY, 0o755)
			require.NoError(t, err)
			_, err = io.Copy(out, in)
			require.NoError(t, err)
			require.NoError(t, out.Close())
		}
		cmd.Path = copied
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		b, err := cmd.CombinedOutput()
		t.Logf("uid %d: %.200s", uid, b)
		return err
	}
	require.NoError(t, as(0))
	var exit *exec.ExitError
	require.ErrorAs(t, as(65534), &exit)
	assert.Equal(t, exitMachine, exit.ExitCode())
}

// The demo runs to its end and leaves nothing, with the guest that needs no
// hypervisor; `make demo` is the same with QEMU.
func TestDemo(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft")
	dir := t.TempDir()
	for _, name := range []string{"sidewire", "sidewire-guest"} {
		cmd := exec.Command("go", "build", "-o", filepath.Join(dir, name), "sidewire/cmd/"+name)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	began := time.Now()
	out, err := exec.Command(filepath.Join(dir, "sidewire"), "demo", "--guest", "tap").CombinedOutput()
	require.NoError(t, err, "%s", out)
	assert.Less(t, time.Since(began), time.Minute)
	for _, step := range []string{"DHCP lease", "ping the gateway", "DNS lookup", "HTTP download", "HTTP upload",
		"inbound to port 80", "inbound to port 81", "throughput", "two queue pairs", "everything shown works"} {
		assert.Contains(t, string(out), step)
	}
	for _, pattern := range []string{"/run/netns/swdemo-*", filepath.Join(os.TempDir(), "swdemo*")} {
		left, err := filepath.Glob(pattern)
		require.NoError(t, err)
		assert.Empty(t, left)
	}
}
