package uplink

import (
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
)

// doWith runs f in a namespace on a thread that has only these capabilities.
// Without CAP_SYS_ADMIN it cannot leave the namespace again, so that NetNS.Do
// lets it end.
func doWith(t *testing.T, ns *enginetest.NetNS, f func(), caps ...int) {
	t.Helper()
	require.NoError(t, ns.Do(func() error {
		data := [2]unix.CapUserData{}
		for _, c := range caps {
			data[c/32].Effective |= 1 << (c % 32)
			data[c/32].Permitted |= 1 << (c % 32)
		}
		if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0]); err != nil {
			return err
		}
		f()
		return nil
	}))
}

// With the two capabilities that are asked for, and without CAP_SYS_ADMIN,
// which entering a namespace takes, everything is put back.
func TestRestoreWithoutSysAdmin(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	before := state(t, w.Pod)
	doWith(t, w.Pod, func() {
		p, err := Takeover(TakeoverConfig{Link: "eth0", Guests: guests(tcpPort(80))})
		require.NoError(t, err)
		require.NoError(t, p.AddPort(0, tcpPort(81)))
		require.NotEqual(t, before, state(t, w.Pod))
		require.NoError(t, p.Restore())
	}, unix.CAP_NET_ADMIN, unix.CAP_NET_RAW)
	require.Equal(t, before, state(t, w.Pod))
}

// Each missing capability is named.
func TestMissingCapability(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	doWith(t, w.Pod, func() {
		_, err := Takeover(TakeoverConfig{Link: "eth0", Guests: guests()})
		require.ErrorIs(t, err, ErrPrivilege)
		require.ErrorContains(t, err, "CAP_NET_ADMIN")
		_, err = Open(Config{Link: "eth0", Workers: 1})
		require.ErrorIs(t, err, ErrPrivilege)
		require.ErrorContains(t, err, "CAP_NET_RAW")
		err = InNetNS(w.Outside.Path, func() error { return nil })
		require.ErrorIs(t, err, ErrPrivilege)
		require.ErrorContains(t, err, "CAP_SYS_ADMIN")
	})
}
