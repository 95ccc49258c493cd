package main

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
)

// withState is a VMI whose interface has a state and a tag.
func withState(vmi, state string) string {
	return strings.Replace(vmi, "        macAddress:", "        state: "+state+"\n        tag: fast\n        macAddress:", 1)
}

// A guest whose link is to be down finds it so from the beginning, sees it change without a restart, and keeps the state
// over a restart of its QEMU (KubeVirt's link_state.go). The queues are as many as vCPUs.
func TestQEMULinkStateRow66Row67Row84_KubeVirtLinkState(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	enginetest.Need(t, "netns", "tun", "nft", "qemu", "kernel")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startSidewire(t, w, withState(spec("vm", 3), "down"))
	o := enginetest.GuestOptions{Args: qemuArgs(t, w, p), Memory: -1, CPUs: -1, Machine: "q35"}
	var err error
	o.Kernel, o.Initramfs, err = enginetest.BuildGuestImage(t.TempDir(), "")
	require.NoError(t, err)
	g := enginetest.Guest(t, "", o)
	carrier := func(want bool) {
		t.Helper()
		var r enginetest.GuestReply
		ok := enginetest.Wait(20*time.Second, func() (ok bool) {
			r, err = g.Do(enginetest.GuestCmd{Do: "link"})
			return err == nil && r.Link.Carrier == want
		})
		require.True(t, ok, "carrier %v: %v %v\n%s", want, r.Link, err, p.log)
		state := map[bool]string{true: "up", false: "down"}[want]
		assert.Equal(t, []MachineStatus{{Name: "vm", Interfaces: []MachineInterface{{Name: "red", MAC: guestMAC.String(), IPAddress: enginetest.PodIP,
			IPAddresses: []string{enginetest.PodIP}, PodInterfaceName: "eth0", InfoSource: "domain", QueueCount: 3, LinkState: state, Tag: "fast"}}}}, p.status().Machines)
	}
	_, err = g.Do(enginetest.GuestCmd{Do: "dhcp", Timeout: 2 * time.Second}) // takes the link up as the guest's user would
	require.Error(t, err)
	carrier(false)
	assert.Equal(t, outcome{out: "vm/red up\n"}, sidewire(t, "link", "--socket-dir", p.dir, "vm/red", "up"))
	carrier(true)
	r, err := g.Do(enginetest.GuestCmd{Do: "dhcp"})
	require.NoError(t, err)
	assert.Equal(t, "10.0.2.2/24", r.Lease.Addr)
	r, err = g.Do(enginetest.GuestCmd{Do: "channels", N: 3})
	require.NoError(t, err)
	_, err = g.Do(enginetest.GuestCmd{Do: "http_get", Timeout: time.Minute, URL: "http://" + enginetest.OutsideName + ":9000/data?bytes=1000000"})
	require.NoError(t, err)
	require.Zero(t, sidewire(t, "link", "--socket-dir", p.dir, "down").code)
	carrier(false)
	g.Stop()
	g = enginetest.Guest(t, "", o)
	_, err = g.Do(enginetest.GuestCmd{Do: "dhcp", Timeout: 2 * time.Second})
	require.Error(t, err)
	carrier(false)
	require.Zero(t, sidewire(t, "link", "--socket-dir", p.dir, "up").code)
	carrier(true)
}

func TestLinkCommandRefused(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startSidewire(t, w, spec("vm", 1))
	for _, c := range []struct{ args, words []string }{
		{[]string{"sideways"}, []string{"sideways", "want up or down"}},
		{[]string{"vm/blue", "up"}, []string{"vm/blue", "vm/red"}},
		{nil, []string{"want [VMI/INTERFACE] up or down"}},
	} {
		sidewire(t, append([]string{"link", "--socket-dir", p.dir}, c.args...)...).says(t, exitInput, "link", c.words)
	}
}
