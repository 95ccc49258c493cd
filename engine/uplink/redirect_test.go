package uplink

import (
	"net/netip"
	"os/exec"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
)

// What a redirect wants and cannot have is said.
func TestRedirectFaults(t *testing.T) {
	enginetest.Need(t, "root", "nft")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	open := func(link string) (r *Redirect, err error) {
		err = w.Pod.Do(func() error { r, err = OpenRedirect(RedirectConfig{Link: link, TCP: 1, UDP: 2}); return err })
		return r, err
	}
	_, err := open("eth7")
	require.ErrorIs(t, err, ErrNoLink)
	first, err := open("eth0")
	require.NoError(t, err)
	_, err = open("eth0")
	require.ErrorIs(t, err, ErrInUse)
	text, err := w.Pod.Command("nft", "list", "ruleset").Output()
	require.NoError(t, err)
	for _, want := range []string{"table ip sidewire-sockets-eth0", `iifname != "eth0" accept`, "ip daddr != " + enginetest.PodIP + " accept",
		"tproxy to 127.0.0.1:1 accept", "tproxy to 127.0.0.1:2 accept"} {
		assert.Contains(t, string(text), want)
	}
	assert.Error(t, w.Pod.Run("nft", "delete", "table", "ip", "sidewire-sockets-eth0"), "nobody else may")
	require.NoError(t, first.Close())
	text, err = w.Pod.Command("nft", "list", "ruleset").Output()
	require.NoError(t, err)
	assert.Empty(t, string(text))
	second, err := open("eth0")
	require.NoError(t, err)
	require.NoError(t, second.Close())
}

// Without a socket behind it a redirect changes nothing: what the pod's processes
// have is reached.
func TestRedirectToNobody(t *testing.T) {
	enginetest.Need(t, "root")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	var r *Redirect
	require.NoError(t, w.Pod.Do(func() (err error) {
		r, err = OpenRedirect(RedirectConfig{Link: "eth0", Pod: netip.MustParseAddr(enginetest.PodIP), TCP: 1, UDP: 2})
		return err
	}))
	defer r.Close()
	l, err := w.Pod.Listen("tcp4", "0.0.0.0:8080")
	require.NoError(t, err)
	defer l.Close()
	c, err := w.Outside.Dial("tcp4", enginetest.PodIP+":8080", deadline)
	require.NoError(t, err)
	c.Close()
	if _, err := exec.LookPath("ping"); err == nil {
		assert.NoError(t, w.Outside.Run("ping", "-c", "1", "-W", "2", enginetest.PodIP))
	}
}
