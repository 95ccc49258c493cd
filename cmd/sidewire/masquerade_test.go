package main

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

// A guest that is not ours in any part (Linux's stack, dhclient, ping, dig,
// curl) gets on the network.
func TestRow4Row17Row53GuestGetsOnTheNetwork(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "dhclient", "curl", "dig", "ping")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startSidewire(t, w, spec("vm", 1))
	v := startVM(t, p, vhosttest.Options{})
	assert.Contains(t, v.run("ip", "-4", "-o", "addr", "show", "dev", "eth0"), "10.0.2.2/24")
	assert.Contains(t, v.run("ip", "route"), "default via 10.0.2.1")
	v.run("ping", "-c", "1", "-W", "5", "10.0.2.1")
	v.run("ping", "-c", "1", "-W", "5", enginetest.OutsideIP)
	assert.Contains(t, v.run("dig", "+short", "@"+enginetest.OutsideIP, enginetest.OutsideName), enginetest.OutsideIP)
	url := fmt.Sprintf("http://%s:%d", enginetest.OutsideIP, enginetest.HTTPPort)
	who := v.run("curl", "-sS", "--max-time", "10", url+"/whoami")
	assert.True(t, strings.HasPrefix(who, enginetest.PodIP+":"), "outside sees %s", who)
	if t.Failed() {
		t.Log(p.dump())
	}
}

// 64 MiB each way arrive whole, whatever MTU, offloads and queues.
func TestBigTransfers(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "dhclient", "curl")
	const size = 64 << 20
	for _, mtu := range []int{1500, 9000} {
		for _, offloads := range []bool{true, false} {
			for _, pairs := range []int{1, 2} {
				t.Run(fmt.Sprintf("mtu%d/offloads=%v/pairs%d", mtu, offloads, pairs), func(t *testing.T) {
					w := enginetest.NewWorld(t, enginetest.WorldOptions{MTU: mtu})
					p := startSidewire(t, w, spec("vm", pairs))
					o := vhosttest.Options{QueuePairs: pairs}
					if !offloads {
						o.Features = vhosttest.NoOffloads
					}
					v := startVM(t, p, o)
					transfer(t, v, size)
					if t.Failed() {
						t.Log(p.dump())
					}
				})
			}
		}
	}
}

// So they do over packed virtqueues, of a size that is no power of two.
func TestPackedRings(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "dhclient", "curl")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startSidewire(t, w, spec("vm", 2), "--packed")
	v := startVM(t, p, vhosttest.Options{QueuePairs: 2, Packed: true, RingSize: 300})
	transfer(t, v, 64<<20)
	assert.Contains(t, p.status().Interfaces[0].Device.Features, "RING_PACKED")
	if t.Failed() {
		t.Log(p.dump())
	}
}

func transfer(t *testing.T, v *vm, size int64) {
	t.Helper()
	url := fmt.Sprintf("http://%s:%d/data", enginetest.OutsideIP, enginetest.HTTPPort)
	file := filepath.Join(v.dir, "data")
	v.run("curl", "-sS", "--max-time", "60", "-o", file, fmt.Sprintf("%s?bytes=%d", url, size))
	sum := v.run("sha256sum", file)
	require.True(t, strings.HasPrefix(sum, enginetest.DataSum(size)), "download: %s", sum)
	up := v.run("curl", "-sS", "--max-time", "60", "-T", file, url)
	require.Equal(t, enginetest.DataSum(size), strings.TrimSpace(up), "upload")
}
