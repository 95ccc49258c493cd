package main

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

// Guests that differ in what they negotiated reach each other over IPv4 and
// IPv6: long frames are cut for those alone that do not take them.
func TestGuestsOfAllKinds(t *testing.T) {
	kinds := []struct {
		name string
		o    vhosttest.Options
	}{
		{"linux", vhosttest.Options{}},
		{"modern", vhosttest.Options{Features: vhosttest.FeatVersion1}},
		{"merging", vhosttest.Options{Features: vhosttest.FeatVersion1 | vhosttest.FeatMrgRxbuf | vhosttest.FeatEventIdx, RxBufSize: 2048}},
		{"checksum", vhosttest.Options{Features: vhosttest.FeatVersion1 | vhosttest.FeatCsum | vhosttest.FeatGuestCsum | vhosttest.FeatIndirect, Indirect: true, Pieces: 3}},
		{"packed", vhosttest.Options{Packed: true}},
		{"legacy", vhosttest.Options{Features: vhosttest.FeatCsum | vhosttest.FeatHostTSO4 | vhosttest.FeatHostTSO6}},
	}
	docs := definition("blue", `{"type": "bridge", "macspoofchk": true}`)
	for _, k := range kinds {
		docs += onLAN(k.name, "blue", 1)
	}
	p := startLAN(t, docs, "--packed")
	addr := func(i int) string { return "10.9.0." + string(rune('1'+i)) }
	var vms []*vm
	for i, k := range kinds {
		v := plugVM(t, p, k.name, k.o).withAddr(addr(i) + "/24").withAddr("fd00:9::" + string(rune('1'+i)) + "/64")
		vms = append(vms, v)
	}
	for i, v := range vms {
		for j, to := range vms {
			if i == j {
				continue
			}
			t.Run(kinds[i].name+" to "+kinds[j].name, func(t *testing.T) {
				carry(t, v.ns, to.ns, addr(j)+":7000", 1, 2<<20)
				carry(t, v.ns, to.ns, "[fd00:9::"+string(rune('1'+j))+"]:7000", 1, 1<<20)
			})
		}
	}
	for _, port := range p.status().Ports {
		for reason, n := range port.Drops {
			assert.Contains(t, []string{"no_buffer", "storm", "queue_stopped"}, reason, "%s dropped %d", port.Name, n)
		}
	}
}

// After a crash and a new start guests reach each other again, with the
// addresses that they have; what they ask for once more is what they had.
func TestSwitchSurvivesACrash(t *testing.T) {
	docs := onLAN("vm1", "blue", 1) + onLAN("vm2", "blue", 1) + definition("blue", `{"type": "bridge", `+hostLocal+`}`)
	p := startLAN(t, docs)
	a := plugVM(t, p, "vm1", vhosttest.Options{}).withLease("10.9.0.2/24")
	b := plugVM(t, p, "vm2", vhosttest.Options{}).withLease("10.9.0.3/24")
	require.True(t, a.pings("10.9.0.3"))
	mac := p.nicOf("vm1/net").MAC
	p.kill()
	p.launch(sidewireCommand("run", "-f", p.vmi, "--socket-dir", p.dir))
	require.NoError(t, a.tap.Reconnect())
	require.NoError(t, b.tap.Reconnect())
	assert.True(t, enginetest.Wait(soon, func() bool { return a.pings("10.9.0.3") }))
	assert.Equal(t, mac, p.nicOf("vm1/net").MAC)
	a.dhclient("-x")
	a.withLease("10.9.0.2/24")
}

// A switch of guests that say nothing wakes nobody up.
func TestIdleSwitch(t *testing.T) {
	docs := onLAN("vm1", "blue", 1) + onLAN("vm2", "blue", 1) + definition("blue", `{"type": "bridge"}`)
	p := startLAN(t, docs)
	a, b := connectRaw(t, p, "vm1/net"), connectRaw(t, p, "vm2/net")
	require.True(t, hears(t, a, b, discover(a.Options.MAC, a.Options.MAC)))
	workers := func() (n uint64) {
		for _, s := range p.status().Workers {
			n += s.Wakeups
		}
		return n
	}
	const span = 3 * time.Second
	assert.True(t, enginetest.Wait(10*span, func() bool {
		worked, before := workers(), sleeps(t, p.cmd.Process.Pid)
		disturbed := enginetest.Wait(span, func() bool { return total(sleeps(t, p.cmd.Process.Pid), before) > runtimeWakeups })
		return !disturbed && workers() == worked
	}))
}

// A frame longer than a guest's MTU goes to those alone who can take it (virtio
// 1.2, 5.1.4.1).
func TestSwitchKeepsMTUs(t *testing.T) {
	docs := onLAN("vm1", "long", 1) + onLAN("vm2", "long", 1) + onLAN("vm3", "short", 1) +
		definition("long", `{"type": "bridge", "bridge": "br0", "mtu": 9000}`) +
		definition("short", `{"type": "bridge", "bridge": "br0"}`)
	p := startLAN(t, docs)
	a := plugVM(t, p, "vm1", vhosttest.Options{MTU: 9000}).withAddr("10.9.0.1/24")
	plugVM(t, p, "vm2", vhosttest.Options{MTU: 9000}).withAddr("10.9.0.2/24")
	plugVM(t, p, "vm3", vhosttest.Options{}).withAddr("10.9.0.3/24")
	assert.True(t, a.pings("10.9.0.2", "-M", "do", "-s", "8972"))
	assert.True(t, a.pings("10.9.0.3", "-M", "do", "-s", "1472"))
	assert.False(t, a.pings("10.9.0.3", "-M", "do", "-s", "1473"))
	dropped := uint64(0)
	for _, port := range p.status().Ports {
		dropped += port.Drops["oversize_frame"]
	}
	assert.NotZero(t, dropped)
}
