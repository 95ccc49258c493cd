package main

import (
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser"
	"sidewire/vhostuser/vhosttest"
)

// footprint is everything in a namespace that a takeover could have changed:
// rules, links, addresses, routes and every setting below /proc/sys/net.
func footprint(t *testing.T, ns *enginetest.NetNS) map[string]string {
	t.Helper()
	out := map[string]string{}
	settled := func() bool {
		text, err := ns.Command("ip", "-o", "addr").Output()
		return err == nil && !strings.Contains(string(text), "tentative")
	}
	enginetest.Eventually(t, 10*time.Second, settled) // the kernel still asks whose an address is
	for _, cmd := range []string{"nft list ruleset", "ip -d -o link", "ip -o addr", "ip route show table all", "ip rule", "ip neigh show nud permanent"} {
		words := strings.Fields(cmd)
		text, err := ns.Command(words[0], words[1:]...).Output() // ip may complain of another namespace that has just gone
		require.NoError(t, err, cmd)
		out[cmd] = string(text)
	}
	require.NoError(t, ns.Do(func() error {
		return filepath.WalkDir("/proc/sys/net", func(p string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || strings.HasSuffix(p, "_count") {
				return nil // a link that went away, or a count that runs by itself
			}
			if b, err := os.ReadFile(p); err == nil {
				out[p] = string(b)
			}
			return nil
		})
	}))
	return out
}

// changes names what differs between two footprints.
func changes(a, b map[string]string) (out []string) {
	for _, k := range sortedKeys(a) {
		if a[k] != b[k] {
			out = append(out, fmt.Sprintf("%s: %q is now %q", k, a[k], b[k]))
		}
	}
	for _, k := range sortedKeys(b) {
		if _, was := a[k]; !was {
			out = append(out, k+" is new")
		}
	}
	return out
}

// After an orderly end the pod is as it was, also with settings of its own;
// so it is when a crash came between.
func TestPodIsPutBack(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "ip")
	for _, ports := range [][]string{nil, {"tcp:80", "udp:53"}} {
		w := enginetest.NewWorld(t, enginetest.WorldOptions{})
		enginetest.Must(t, w.Pod.Sysctl("net/ipv4/ip_local_reserved_ports", "8080,41000-41010"),
			w.Pod.Run("nft", "add table inet theirs"),
			w.Pod.Run("nft", "add chain inet theirs c { type filter hook input priority 0 ; }"))
		before := footprint(t, w.Pod)

		p := startSidewire(t, w, spec("vm", 1, ports...))
		changed := strings.Join(changes(before, footprint(t, w.Pod)), "\n")
		assert.Contains(t, changed, "nft list ruleset", "the comparison sees nothing")
		assert.Contains(t, changed, "ip_local_reserved_ports")
		p.stop()
		assert.Empty(t, changes(before, footprint(t, w.Pod)), "after an orderly end")

		p.start(w)
		p.kill()
		assert.NotEmpty(t, changes(before, footprint(t, w.Pod)), "a crash leaves nothing to put back")
		p.start(w)
		p.stop()
		assert.Empty(t, changes(before, footprint(t, w.Pod)), "after a crash and an orderly end")

		left, err := filepath.Glob(filepath.Join(p.dir, "*"))
		require.NoError(t, err)
		for _, f := range left {
			sockets, err := filepath.Glob(filepath.Join(f, "*"))
			require.NoError(t, err)
			assert.Empty(t, sockets, "sockets left behind")
		}

		p.start(w)
		assert.Contains(t, sidewire(t, "restore", "--netns", w.Pod.Path).out, "nothing to put back", "one that lives")
		p.kill()
		assert.Contains(t, sidewire(t, "restore", "--netns", w.Pod.Path).out, "eth0 put back")
		assert.Empty(t, changes(before, footprint(t, w.Pod)), "after a crash and a restore")
	}
}

// After SIGKILL and a new start the guest works again, in both directions,
// although nobody told it anything; it asks for its lease and gets the same.
func TestGuestSurvivesACrash(t *testing.T) {
	enginetest.Need(t, "dhclient")
	for _, ports := range [][]string{nil, {"tcp:80"}} {
		s := sidewireScene(t, ports...)
		require.Equal(t, "vm, peer 10.244.1.1", s.tcp(s.Outside, "10.244.1.5:80"))
		require.Equal(t, "outside, peer 10.244.1.5", s.tcp(s.guest, "10.244.1.1:9001"))
		s.proc.kill()
		s.proc.start(s.World)
		require.NoError(t, s.tap.Reconnect())
		assert.Equal(t, "vm, peer 10.244.1.1", s.tcp(s.Outside, "10.244.1.5:80"), "before the guest has said a word")
		assert.Equal(t, "vm, peer 10.0.2.1", s.tcp(s.Pod, "127.0.0.1:80"))
		assert.Equal(t, "outside, peer 10.244.1.5", s.tcp(s.guest, "10.244.1.1:9001"))
		assert.Equal(t, "pod replies", s.ping(s.guest, "10.0.2.1"))
		s.dump()
	}
}

// So it is for a guest whose hardware address the VMI leaves open and who says
// nothing by itself: it is asked.
func TestSilentGuestIsFoundAfterACrash(t *testing.T) {
	s := newScene(t, "sidewire")
	s.proc = startSidewire(t, s.World, strings.Replace(spec("vm", 1), "        macAddress: "+guestMAC.String()+"\n", "", 1))
	s.plug()
	require.NoError(t, s.guest.Sysctl("net/ipv6/conf/eth0/disable_ipv6", "1"))
	s.serveAt(s.guest, "vm", 80)
	require.Equal(t, "outside replies", s.ping(s.guest, "10.244.1.1"))
	s.proc.kill()
	s.proc.start(s.World)
	require.NoError(t, s.tap.Reconnect())
	s.udp(s.Outside, "10.244.1.5:80") // what makes sidewire ask is lost
	assert.Equal(t, "vm, peer 10.244.1.1", s.udp(s.Outside, "10.244.1.5:80"))
	s.dump()
}

// dialFrom opens a connection to one of the scene's servers and reads its
// greeting.
func dialFrom(t *testing.T, ns *enginetest.NetNS, to string) net.Conn {
	t.Helper()
	c, err := ns.Dial("tcp4", to, soon)
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	require.NoError(t, c.SetReadDeadline(time.Now().Add(soon)))
	b := make([]byte, 1)
	for b[0] != '\n' {
		_, err := c.Read(b)
		require.NoError(t, err)
	}
	return c
}

// A vhost-user connection that ends and comes again costs no flow: TCP
// connections of both directions go on.
func TestFlowsOutliveTheConnection(t *testing.T) {
	for _, ports := range [][]string{nil, {"tcp:80"}} {
		s := sidewireScene(t, ports...)
		in := dialFrom(t, s.Outside, "10.244.1.5:80")
		out := dialFrom(t, s.guest, "10.244.1.1:9001")
		loop := dialFrom(t, s.Pod, "127.0.0.1:80")
		require.NoError(t, s.tap.Pause())
		require.NoError(t, s.tap.Guest.Frontend.Close())
		enginetest.Eventually(t, soon, func() bool { return s.proc.status().Interfaces[0].Device.State == vhostuser.Disconnected })
		require.NoError(t, s.tap.Reconnect())
		assert.True(t, echoes(t, in, "outside to guest"))
		assert.True(t, echoes(t, out, "guest to outside"))
		assert.True(t, echoes(t, loop, "pod to guest"))
		s.dump()
	}
}

// A crash of sidewire's costs no flow either where ports stay what they were:
// connections from outside to a guest keep theirs.
func TestFlowsOutliveACrash(t *testing.T) {
	for _, ports := range [][]string{nil, {"tcp:80"}} {
		s := sidewireScene(t, ports...)
		in := dialFrom(t, s.Outside, "10.244.1.5:80")
		loop := dialFrom(t, s.Pod, "127.0.0.1:80")
		s.proc.kill()
		s.proc.start(s.World)
		require.NoError(t, s.tap.Reconnect())
		assert.True(t, echoes(t, in, "outside to guest"))
		assert.True(t, echoes(t, loop, "pod to guest"))
		s.dump()
	}
}

// A guest that reboots gets its address again and is reached again; what the
// old one had open is refused by the new one, as between machines.
func TestGuestReboots(t *testing.T) {
	enginetest.Need(t, "dhclient")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startSidewire(t, w, spec("vm", 1))
	s := &scene{World: w, t: t, proc: p, guest: enginetest.NewNetNS(t), far: w.Outside, dir: t.TempDir()}
	s.serveAt(s.Outside, "outside", 9001)
	boot := func() (*vm, func()) {
		v := &vm{t: t, ns: enginetest.NewNetNS(t), dir: t.TempDir()}
		var err error
		v.tap, err = vhosttest.StartTapGuest(vhosttest.TapOptions{
			Options: vhosttest.Options{Path: p.socket(), MAC: guestMAC}, NetNS: v.ns.Path})
		require.NoError(t, err)
		v.dhclient("-1")
		s.guest = v.ns
		s.serveAt(s.guest, "vm", 80)
		return v, func() { v.dhclient("-x"); v.tap.Close() }
	}
	v, off := boot()
	assert.Contains(t, v.run("ip", "-4", "-o", "addr", "show", "dev", "eth0"), "10.0.2.2/24")
	old := dialFrom(t, s.Outside, "10.244.1.5:80")
	require.True(t, echoes(t, old, "before"))
	off()
	enginetest.Eventually(t, soon, func() bool { return p.status().Interfaces[0].Device.State == vhostuser.Disconnected })

	v, off = boot()
	defer off()
	assert.Contains(t, v.run("ip", "-4", "-o", "addr", "show", "dev", "eth0"), "10.0.2.2/24")
	require.NoError(t, old.SetDeadline(time.Now().Add(soon)))
	_, err := old.Write([]byte("still there?"))
	require.NoError(t, err)
	_, err = old.Read(make([]byte, 1))
	assert.ErrorContains(t, err, "connection reset")
	assert.Equal(t, "vm, peer 10.244.1.1", s.tcp(s.Outside, "10.244.1.5:80"))
	assert.Equal(t, "outside, peer 10.244.1.5", s.tcp(s.guest, "10.244.1.1:9001"))
	s.dump()
}
