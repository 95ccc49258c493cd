package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

// written waits until the book of a state directory has a text.
func written(t *testing.T, dir, text string) {
	t.Helper()
	enginetest.Eventually(t, soon, func() bool {
		b, err := os.ReadFile(filepath.Join(dir, "leases.json"))
		return err == nil && strings.Contains(string(b), text)
	})
}

// A sidewire that was killed knows afterwards who had which address: the guest
// that goes on keeps its own, and a new one gets another, although it comes
// first in the files.
func TestLeasesOutliveACrash(t *testing.T) {
	enginetest.Need(t, "dhclient")
	blue := definition("blue", `{"type": "bridge", "bridge": "br0", `+hostLocal+`}`)
	p := startLAN(t, onLAN("vm1", "blue", 1)+onLAN("vm2", "blue", 1)+blue)
	plugVM(t, p, "vm2", vhosttest.Options{}).withLease("10.9.0.3/24")
	written(t, filepath.Join(p.dir, "state"), `"default/vm2/net": {`)
	before := p.nicOf("vm2/net").Leases
	require.Len(t, before, 1)
	p.kill()
	require.NoError(t, os.WriteFile(p.vmi, []byte(onLAN("vm0", "blue", 1)+onLAN("vm2", "blue", 1)+blue), 0o644))
	p.launch(sidewireCommand("run", "-f", p.vmi, "--socket-dir", p.dir))
	after := p.nicOf("vm2/net").Leases
	require.Len(t, after, 1, "before the guest has said a word")
	assert.Equal(t, before[0].MAC, after[0].MAC)
	assert.True(t, before[0].Since.Equal(after[0].Since))
	o := sidewire(t, "leases", "--socket-dir", p.dir)
	assert.Regexp(t, `(?m)^vm2/net +10\.9\.0\.3 +`+before[0].MAC.String()+` `, o.out)
	plugVM(t, p, "vm2", vhosttest.Options{}).withLease("10.9.0.3/24")
	plugVM(t, p, "vm0", vhosttest.Options{}).withLease("10.9.0.4/24")
}

// Two sidewires that share a state directory serve one definition without giving
// an address twice; when there is no other, one whose sidewire has ended is
// given again.
func TestTwoSidewiresShareARange(t *testing.T) {
	small := definition("blue", `{"type": "bridge", "bridge": "br0", "ipam": {"type": "host-local", "subnet": "10.9.0.0/29", "rangeStart": "10.9.0.2", "rangeEnd": "10.9.0.3"}}`)
	state := t.TempDir()
	a := startLAN(t, onLAN("vm1", "blue", 1)+small, "--state-dir", state)
	b := startLAN(t, onLAN("vm2", "blue", 1)+small, "--state-dir", state)
	assert.Equal(t, "10.9.0.2", a.nicOf("vm1/net").Guest.String())
	assert.Equal(t, "10.9.0.3", b.nicOf("vm2/net").Guest.String())
	o := sidewire(t, "run", "-f", writeFile(t, "vm.yaml", onLAN("vm3", "blue", 1)+small), "--socket-dir", socketDir(t), "--state-dir", state)
	assert.Equal(t, exitInput, o.code)
	assert.Contains(t, o.err, "no address is left")
	a.stop()
	c := startLAN(t, onLAN("vm3", "blue", 1)+small, "--state-dir", state)
	assert.Equal(t, "10.9.0.2", c.nicOf("vm3/net").Guest.String())
}

// A book that cannot be read or written is named once, and guests get their
// leases all the same.
func TestLeaseBookThatCannotBeUsed(t *testing.T) {
	blue := definition("blue", `{"type": "bridge", "bridge": "br0", `+hostLocal+`}`)
	for name, content := range map[string]string{"garbage": "no JSON", "version": `{"version": 7}`} {
		state := t.TempDir()
		require.NoError(t, os.WriteFile(filepath.Join(state, "leases.json"), []byte(content), 0o644))
		p := startLAN(t, onLAN("vm1", "blue", 1)+blue, "--state-dir", state)
		assert.Equal(t, "10.9.0.2", p.nicOf("vm1/net").Guest.String(), name)
		assert.Contains(t, p.log.String(), "leases.json", name)
		assert.Equal(t, 1, strings.Count(p.log.String(), "--state-dir"), name)
		p.stop()
		b, err := os.ReadFile(filepath.Join(state, "leases.json"))
		require.NoError(t, err)
		assert.Equal(t, content, string(b), "it is not ours to throw away")
	}
	p := startLAN(t, onLAN("vm1", "blue", 1)+blue, "--state-dir", "/proc/none")
	assert.Equal(t, "10.9.0.2", p.nicOf("vm1/net").Guest.String())
	assert.Contains(t, p.log.String(), "--state-dir")
}

// A masqueraded guest has its lease again too, so that what comes for it from
// outside need not wait for it to speak.
func TestLeaseOfMasqueradeOutlivesACrash(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun", "nft", "dhclient")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startSidewire(t, w, strings.Replace(spec("vm", 1), "        macAddress: "+guestMAC.String()+"\n", "", 1))
	startVM(t, p, vhosttest.Options{})
	written(t, filepath.Join(p.dir, "state"), guestMAC.String())
	p.kill()
	p.start(w)
	st := p.status().Interfaces[0]
	require.Len(t, st.Leases, 1)
	assert.Equal(t, guestMAC, st.Leases[0].MAC)
}
