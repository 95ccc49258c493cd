package uplink

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// richLink is a namespace whose eth0 has everything that a CNI may give it, and
// some more.
func richLink(t *testing.T) (ns, outside *enginetest.NetNS) {
	t.Helper()
	enginetest.Need(t, "root", "netns", "ip", "nft")
	ns, outside = enginetest.NewNetNS(t), enginetest.NewNetNS(t)
	for _, n := range []*enginetest.NetNS{ns, outside} {
		enginetest.Must(t, n.Sysctl("net/ipv6/conf/default/accept_dad", "0"))
	}
	enginetest.Veth(t, ns, "eth0", outside, "veth0")
	enginetest.Must(t, ns.SetMTU("eth0", 1440), outside.SetMTU("veth0", 1440))
	enginetest.Veth(t, ns, "eth1", outside, "veth1")
	enginetest.Must(t, ns.Sysctl("net/ipv6/conf/eth1/disable_ipv6", "1")) // its routes would change places with eth0's
	for _, args := range []string{
		"addr add 10.244.1.5/24 brd + dev eth0 label eth0:a",
		"addr add 10.244.1.6/24 dev eth0",
		"addr add 10.9.9.9/32 dev eth0 noprefixroute",
		"addr add 10.8.8.8/24 dev eth0 metric 77",
		"route add 169.254.1.1/32 dev eth0 scope link",
		"route add default via 169.254.1.1 dev eth0 mtu 1400",
		"route add 192.0.2.0/24 via 10.244.1.1 metric 50 src 10.244.1.6",
		"route add 192.0.2.0/24 via 10.244.1.2 metric 60",
		"route add 198.51.100.0/24 via 203.0.113.1 dev eth0 onlink",
		"route add 203.0.113.0/24 nexthop via 10.244.1.1 weight 2 nexthop via 10.244.1.2",
		"route add default via 10.244.1.1 table 100",
		"route add blackhole 100.64.0.0/10",
		"route add 172.16.0.0/12 dev eth1 src 10.244.1.5",
		"route del 10.8.8.0/24 dev eth0",
		"neigh add 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent",
		"-6 addr add fd00:10::5/64 dev eth0 nodad",
		"-6 route add fd00:20::/64 via fe80::1 dev eth0 metric 99",
		"-6 route add default via fd00:10::1",
		"-6 neigh add fd00:10::1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud permanent",
	} {
		enginetest.Must(t, ns.Run("ip", strings.Fields(args)...))
	}
	return ns, outside
}

// shape is all of a namespace that a delegation could change, once the kernel is
// at rest.
func shape(t *testing.T, ns *enginetest.NetNS) map[string]string {
	t.Helper()
	out := map[string]string{}
	enginetest.Eventually(t, 10*time.Second, func() bool {
		text, err := ns.Command("ip", "-o", "addr").Output()
		return err == nil && !strings.Contains(string(text), "tentative")
	})
	for _, cmd := range []string{
		"nft list ruleset", "ip -d -o link", "ip -d -o addr", "ip -d route show table all", "ip -d -6 route show table all",
		"ip rule", "ip neigh show nud permanent", "ip -6 neigh show nud permanent",
	} {
		words := strings.Fields(cmd)
		text, err := ns.Command(words[0], words[1:]...).Output()
		require.NoError(t, err, cmd)
		out[cmd] = string(text)
	}
	require.NoError(t, ns.Do(func() error {
		for _, dir := range []string{"/proc/sys/net/ipv4/conf/eth0", "/proc/sys/net/ipv6/conf/eth0"} {
			entries, err := os.ReadDir(dir)
			if err != nil {
				return err
			}
			for _, e := range entries {
				b, _ := os.ReadFile(filepath.Join(dir, e.Name()))
				out[filepath.Join(dir, e.Name())] = string(b)
			}
		}
		return nil
	}))
	return out
}

// asBefore waits until a namespace is what it was: of IPv6 the kernel does a part
// by and by.
func asBefore(t *testing.T, ns *enginetest.NetNS, before map[string]string, when ...string) {
	t.Helper()
	var now map[string]string
	if !enginetest.Wait(3*time.Second, func() bool { now = shape(t, ns); return maps.Equal(before, now) }) {
		for k := range before {
			assert.Equal(t, before[k], now[k], "%s %s", k, when)
		}
		t.FailNow()
	}
}

func silentNow(t *testing.T, ns *enginetest.NetNS) {
	t.Helper()
	s := shape(t, ns)
	assert.NotContains(t, s["ip -d -o addr"], "eth0")
	assert.NotContains(t, s["ip -d route show table all"], "eth0")
	assert.NotContains(t, s["ip -d -6 route show table all"], "eth0")
	assert.Contains(t, s["ip -d -o link"], "NOARP")
	assert.Contains(t, s["nft list ruleset"], "sidewire-bridge-eth0")
}

func delegate(t *testing.T, ns *enginetest.NetNS, c DelegateConfig) (d *Delegation, err error) {
	t.Helper()
	return d, ns.Do(func() error {
		d, err = Delegate(c)
		return err
	})
}

// A delegated link is silent and its hardware address another; in the end all is
// as it was, addresses, routes of all tables and kinds, neighbours and settings.
func TestDelegateRow43PutsBackWhatThereWas(t *testing.T) {
	ns, _ := richLink(t)
	own, err := ns.MAC("eth0")
	require.NoError(t, err)
	for _, c := range []DelegateConfig{
		{Owner: "vm/net"}, {Owner: "vm/net", Guest: frame.MAC(own)}, {Owner: "vm/net", Guest: frame.MAC{2, 1}}, {Owner: "vm/net", KeepMAC: true},
	} {
		c.Link, c.StateDir = "eth0", t.TempDir()
		before := shape(t, ns)
		d, err := delegate(t, ns, c)
		require.NoError(t, err)
		silentNow(t, ns)
		assert.Equal(t, SilenceBoth, d.Silence())
		assert.Empty(t, d.Warnings)
		now, err := ns.MAC("eth0")
		require.NoError(t, err)
		moved := !c.KeepMAC && c.Guest != frame.MAC{2, 1}
		assert.Equal(t, moved, now != own, "the link gives its address away only if that is the guest's")
		s := d.Saved()
		assert.Equal(t, frame.MAC(own), s.MAC)
		assert.Equal(t, 1440, s.MTU)
		assert.Equal(t, "10.244.1.5/24", s.Address().String())
		assert.Equal(t, LinkRoute{Dest: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("169.254.1.1")}, s.Routes[0])
		assert.Equal(t, []Neighbour{{netip.MustParseAddr("169.254.1.1"), frame.MAC{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}}}, s.Neighbours)
		require.NoError(t, d.Restore())
		asBefore(t, ns, before)
		assert.NoFileExists(t, d.StateFile())
	}
}

const (
	crashAfter = "SIDEWIRE_TEST_CRASH_AFTER"
	crashNS    = "SIDEWIRE_TEST_CRASH_NS"
	crashDir   = "SIDEWIRE_TEST_CRASH_DIR"
)

// TestMain is also the process that is to be killed.
func TestMain(m *testing.M) {
	if os.Getenv(crashAfter) == "" {
		os.Exit(m.Run())
	}
	left, _ := strconv.Atoi(os.Getenv(crashAfter))
	afterStep = func(name string) {
		if left--; left == 0 {
			fmt.Println("killed after:", name)
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
	}
	err := InNetNS(os.Getenv(crashNS), func() error {
		d, err := Delegate(DelegateConfig{Link: "eth0", StateDir: os.Getenv(crashDir), Owner: "vm/net"})
		if err != nil {
			return err
		}
		return d.Restore()
	})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Killed after any step, of taking over as of putting back, nothing is lost: what
// runs next puts everything back, or goes on; also where the files are gone with
// their container.
func TestDelegateRow43IsKilledAfterAnyStep(t *testing.T) {
	t.Run("files", func(t *testing.T) { testKilledAfterAnyStep(t, false) })
	t.Run("no files", func(t *testing.T) { testKilledAfterAnyStep(t, true) })
}

func testKilledAfterAnyStep(t *testing.T, lost bool) {
	ns, _ := richLink(t)
	before := shape(t, ns)
	self, err := os.Executable()
	require.NoError(t, err)
	steps := map[string]int{}
	for n := 1; ; n++ {
		dir := t.TempDir()
		child := exec.Command(self)
		child.Env = append(os.Environ(), crashAfter+"="+strconv.Itoa(n), crashNS+"="+ns.Path, crashDir+"="+dir)
		out, err := child.CombinedOutput()
		if err == nil {
			require.Greater(t, n, 20, "steps")
			break
		}
		var exit *exec.ExitError
		require.True(t, errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL, "%s", out)
		step := strings.TrimSpace(strings.TrimPrefix(string(out), "killed after:"))
		steps[step]++
		if lost {
			require.NoError(t, os.RemoveAll(dir))
		}
		if n%2 == 0 { // the same guest is served next
			d, err := delegate(t, ns, DelegateConfig{Link: "eth0", StateDir: dir, Owner: "vm/net"})
			require.NoError(t, err, step)
			silentNow(t, ns)
			require.NoError(t, d.Restore(), step)
		} else {
			require.NoError(t, ns.Do(func() error {
				_, err := RestoreSaved(dir, nil)
				return err
			}), step)
		}
		asBefore(t, ns, before, "killed after: "+step)
		files, err := filepath.Glob(filepath.Join(dir, "*.json"))
		require.NoError(t, err)
		assert.Empty(t, files)
	}
	t.Logf("killed after %v", steps)
}

// crashed leaves a link as a killed run does.
func crashed(t *testing.T, ns *enginetest.NetNS, c DelegateConfig) {
	t.Helper()
	d, err := delegate(t, ns, c)
	require.NoError(t, err)
	require.NoError(t, syscall.Close(d.lock))
	require.NoError(t, syscall.Close(d.ns))
	d.lock, d.ns, d.saved = -1, -1, nil
}

// The next run of the same guest goes on without putting anything back; one of
// another, or one that finds an address that it does not know, begins anew.
func TestDelegateRow43GoesOnAfterACrash(t *testing.T) {
	ns, _ := richLink(t)
	before := shape(t, ns)
	c := DelegateConfig{Link: "eth0", StateDir: t.TempDir(), Owner: "vm/net"}
	crashed(t, ns, c)
	v := view(t, ns, c.StateDir)
	assert.True(t, v.Delegated)
	assert.Equal(t, "vm/net", v.Owner)
	assert.Equal(t, "10.244.1.5/24", v.Address().String())

	spoke := false
	afterStep = func(s string) { spoke = spoke || s == "silence ended" }
	defer func() { afterStep = func(string) {} }()
	d, err := delegate(t, ns, c)
	require.NoError(t, err)
	assert.True(t, d.Resumed)
	assert.False(t, spoke)
	silentNow(t, ns)
	require.NoError(t, d.Restore())
	asBefore(t, ns, before)

	crashed(t, ns, c)
	other := c
	other.Owner = "other/net"
	d, err = delegate(t, ns, other)
	require.NoError(t, err)
	assert.False(t, d.Resumed)
	assert.Equal(t, v.Routes, d.Saved().Routes)
	require.NoError(t, d.Restore())
	asBefore(t, ns, before)

	crashed(t, ns, c)
	enginetest.Must(t, ns.Addr("eth0", "10.7.7.7/24"))
	d, err = delegate(t, ns, c)
	require.NoError(t, err)
	assert.False(t, d.Resumed)
	silentNow(t, ns)
	require.NoError(t, d.Restore())
	assert.Contains(t, shape(t, ns)["ip -d -o addr"], "10.7.7.7/24")
}

func view(t *testing.T, ns *enginetest.NetNS, dir string) (v *LinkView) {
	t.Helper()
	require.NoError(t, ns.Do(func() (err error) {
		v, err = ViewLink(dir, "eth0")
		return err
	}))
	return v
}

// A file of another namespace, of another boot or of a link that is gone does no
// harm, and one that cannot be read is not passed over.
func TestDelegateRow43StaleFiles(t *testing.T) {
	ns, outside := richLink(t)
	second, _ := richLink(t)
	before := shape(t, second)
	c := DelegateConfig{Link: "eth0", StateDir: t.TempDir(), Owner: "vm/net"}
	crashed(t, ns, c)
	restore := func(ns *enginetest.NetNS) (done []*Saved, err error) {
		return done, ns.Do(func() error {
			done, err = RestoreSaved(c.StateDir, nil)
			return err
		})
	}
	done, err := restore(second)
	require.NoError(t, err)
	assert.Empty(t, done)
	assert.False(t, view(t, second, c.StateDir).Delegated)
	asBefore(t, second, before)

	files, err := filepath.Glob(filepath.Join(c.StateDir, "*.json"))
	require.NoError(t, err)
	require.Len(t, files, 1)
	b, err := os.ReadFile(files[0])
	require.NoError(t, err)
	var s map[string]any
	require.NoError(t, json.Unmarshal(b, &s))
	edit := func(key string, v any) {
		s[key] = v
		b, err := json.Marshal(s)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(files[0], b, 0o600))
	}
	edit("version", 99)
	_, err = restore(ns)
	require.ErrorContains(t, err, "of version 99, not 1")
	_, err = delegate(t, ns, c)
	require.ErrorContains(t, err, "of version 99, not 1")
	require.NoError(t, os.WriteFile(files[0], []byte("{"), 0o600))
	_, err = restore(ns)
	require.ErrorContains(t, err, "cannot be read")
	require.NoError(t, os.WriteFile(files[0], bytes.Replace(b, []byte(`"routes": [
   "`), []byte(`"routes": [
   "AAAA", "`), 1), 0o600))
	_, err = restore(ns)
	require.ErrorContains(t, err, "is damaged")
	require.NoError(t, os.WriteFile(files[0], b, 0o600))

	// The link goes, another one of its name comes.
	enginetest.Must(t, outside.Run("ip", "link", "del", "veth0"))
	enginetest.Veth(t, ns, "eth0", outside, "veth0")
	enginetest.Must(t, ns.Addr("eth0", "10.1.1.1/24"))
	assert.False(t, view(t, ns, c.StateDir).Delegated)
	_, err = restore(ns)
	require.NoError(t, err)
	assert.NoFileExists(t, files[0])
	assert.Contains(t, shape(t, ns)["ip -d -o addr"], "10.1.1.1/24")
	assert.NotContains(t, shape(t, ns)["nft list ruleset"], "sidewire")

	crashed(t, ns, c)
	files, _ = filepath.Glob(filepath.Join(c.StateDir, "*.json"))
	require.Len(t, files, 1)
	b, err = os.ReadFile(files[0])
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, &s))
	edit("boot", "another")
	enginetest.Must(t, ns.Run("nft", "delete", "table", "netdev", "sidewire-bridge-eth0"))
	done, err = restore(ns)
	require.NoError(t, err)
	assert.Empty(t, done)
	assert.NoFileExists(t, files[0])
}

// One link has one guest, and who looks from aside changes nothing.
func TestDelegateRefuses(t *testing.T) {
	ns, _ := richLink(t)
	c := DelegateConfig{Link: "eth0", StateDir: t.TempDir(), Owner: "vm/net"}
	d, err := delegate(t, ns, c)
	require.NoError(t, err)
	other := c
	other.StateDir = t.TempDir()
	_, err = delegate(t, ns, other)
	require.ErrorIs(t, err, ErrInUse)
	err = ns.Do(func() error {
		_, err := RestoreSaved(c.StateDir, nil)
		return err
	})
	require.ErrorIs(t, err, ErrInUse)
	silentNow(t, ns)
	require.NoError(t, d.Restore())

	c.Link = "eth7"
	_, err = delegate(t, ns, c)
	require.ErrorIs(t, err, ErrNoLink)
	c.Link, c.StateDir = "eth0", "/proc/no/such"
	before := shape(t, ns)
	_, err = delegate(t, ns, c)
	require.ErrorIs(t, err, ErrState)
	asBefore(t, ns, before)
}

// Without nftables the link is silent for want of addresses, and that is said.
// Where it must keep them it is refused, and nothing is left.
func TestDelegateRow43WithoutNFTables(t *testing.T) {
	silenceLink = func(string, *Saved) (Silence, error) { return SilenceAddress, errors.New("none here") }
	defer func() { silenceLink = silence }()
	ns, _ := richLink(t)
	before := shape(t, ns)
	c := DelegateConfig{Link: "eth0", StateDir: t.TempDir(), Owner: "vm/net"}
	d, err := delegate(t, ns, c)
	require.NoError(t, err)
	assert.Equal(t, SilenceAddress, d.Silence())
	require.Len(t, d.Warnings, 1)
	assert.Contains(t, d.Warnings[0], "speaks again if somebody gives it one: none here")
	assert.NotContains(t, shape(t, ns)["ip -d -o addr"], "eth0")
	require.NoError(t, d.Restore())
	asBefore(t, ns, before)
	c.KeepAddrs = true
	_, err = delegate(t, ns, c)
	require.ErrorContains(t, err, "it takes rules to silence the kernel: none here")
	asBefore(t, ns, before)
}

// A link that must keep its addresses, as an ipvlan, is silent by rules alone.
func TestDelegateRow12KeepsAddresses(t *testing.T) {
	ns, _ := richLink(t)
	before := shape(t, ns)
	d, err := delegate(t, ns, DelegateConfig{Link: "eth0", StateDir: t.TempDir(), Owner: "vm/net", KeepMAC: true, KeepAddrs: true})
	require.NoError(t, err)
	now := shape(t, ns)
	assert.Equal(t, before["ip -d -o addr"], now["ip -d -o addr"])
	assert.Contains(t, now["nft list ruleset"], "sidewire-bridge-eth0")
	require.NoError(t, d.Restore())
	asBefore(t, ns, before)
}

// In a container whose /proc/sys cannot be written IPv6 goes with its addresses.
func TestDelegateRow43ReadOnlySysctl(t *testing.T) {
	ns, _ := richLink(t)
	before := shape(t, ns)
	enginetest.Must(t, ns.Do(func() error {
		if err := readOnlySysctl(); err != nil {
			return err
		}
		d, err := Delegate(DelegateConfig{Link: "eth0", StateDir: t.TempDir(), Owner: "vm/net"})
		require.NoError(t, err)
		assert.Empty(t, d.Warnings)
		now := shape(t, ns)
		assert.NotContains(t, now["ip -d -o addr"], "eth0")
		assert.NotRegexp(t, "(?m)^unicast.*eth0", now["ip -d route show table all"]+now["ip -d -6 route show table all"])
		return d.Restore()
	}))
	asBefore(t, ns, before)
}

// readOnlySysctl makes /proc/sys unwritable for this thread, which ends with it.
func readOnlySysctl() error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("/proc/sys", "/proc/sys", "", unix.MS_BIND, ""); err != nil {
		return err
	}
	return unix.Mount("", "/proc/sys", "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
}
