package main

import (
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
)

// newAgent serves commands as -stdio does, on this machine.
func newAgent(t *testing.T) *enginetest.Agent {
	t.Helper()
	ours, theirs := net.Pipe()
	t.Cleanup(func() { ours.Close() })
	go serve(theirs, theirs) // ends with the pipe
	a := enginetest.NewAgent(ours)
	require.NoError(t, a.WaitBoot(1, 5*time.Second))
	return a
}

func TestCommands(t *testing.T) {
	a := newAgent(t)
	do := func(c enginetest.GuestCmd) enginetest.GuestReply {
		t.Helper()
		c.Host = "127.0.0.1"
		r, err := a.Do(c)
		require.NoError(t, err)
		return r
	}
	port := func(local string) int {
		ap, err := net.ResolveTCPAddr("tcp", local)
		require.NoError(t, err)
		return ap.Port
	}
	echo := do(enginetest.GuestCmd{Do: "listen", Kind: "echo"}).Local
	r := do(enginetest.GuestCmd{Do: "tcp", Port: port(echo), Data: "hello"})
	assert.Equal(t, "hello", r.Data)
	peers := do(enginetest.GuestCmd{Do: "peers"}).Peers
	assert.Equal(t, []string{r.Local}, peers)

	udp := do(enginetest.GuestCmd{Do: "listen", Kind: "udp"}).Local
	r = do(enginetest.GuestCmd{Do: "udp", Port: port(udp), N: 3, Bytes: 2000})
	assert.Equal(t, []int{3, 3}, []int{r.Sent, r.Received})

	url := "http://" + do(enginetest.GuestCmd{Do: "listen", Kind: "http"}).Local
	r = do(enginetest.GuestCmd{Do: "http_get", URL: url + "/data?bytes=100001"})
	assert.Equal(t, []any{200, int64(100001), enginetest.DataSum(100001), ""}, []any{r.Status, r.Bytes, r.Sum, r.Body})
	r = do(enginetest.GuestCmd{Do: "http_put", URL: url + "/data", Bytes: 5000})
	assert.Equal(t, []any{enginetest.DataSum(5000), enginetest.DataSum(5000)}, []any{r.Body, r.Sum})

	do(enginetest.GuestCmd{Do: "unlisten"})
	_, err := net.DialTimeout("tcp", echo, time.Second)
	assert.Error(t, err, "unlisten closes all that shared the port")
}

func TestCommandErrors(t *testing.T) {
	a := newAgent(t)
	for _, c := range []enginetest.GuestCmd{
		{Do: "nonsense"}, {Do: ""}, {Do: "dhcp", If: "none0", Timeout: time.Second}, {Do: "link", If: "none0"}, {Do: "renew"}, {Do: "release"},
		{Do: "channels", If: "none0"}, {Do: "offloads", If: "lo", Offload: map[string]bool{"x": true}}, {Do: "arp", If: "lo", Host: "x"},
		{Do: "lookup", Type: "X"}, {Do: "listen", Kind: "x"}, {Do: "peers", Port: 9}, {Do: "unlisten", Port: 9}, {Do: "send", Hex: "x"},
		{Do: "http_get", URL: "://"}, {Do: "file", Path: "/nonexistent"},
	} {
		_, err := a.Do(c)
		assert.Error(t, err, c.Do)
	}
	_, err := a.Do(enginetest.GuestCmd{Do: "file", Path: "/proc/version"})
	assert.NoError(t, err, "the agent lives on")
}

// TestLine: what is no JSON is answered, and does not end the agent.
func TestLine(t *testing.T) {
	ours, theirs := net.Pipe()
	defer ours.Close()
	go serve(theirs, theirs)
	require.NoError(t, ours.SetDeadline(time.Now().Add(5*time.Second)))
	b := make([]byte, 4096)
	n, err := ours.Read(b)
	require.NoError(t, err)
	assert.Contains(t, string(b[:n]), `"ready":true`)
	_, err = ours.Write([]byte("garbage\n"))
	require.NoError(t, err)
	n, err = ours.Read(b)
	require.NoError(t, err)
	assert.Contains(t, string(b[:n]), "error")
}

// TestPingAnswer: only what answers our request counts.
func TestPingAnswer(t *testing.T) {
	p := &pinger{dst: &net.IPAddr{IP: net.IPv4(192, 0, 2, 1)}, id: 0x1234}
	sent := []byte{8, 0, 0, 0, 0x12, 0x34, 0, 1, 'x'}
	reply := func(b ...byte) []byte { return b }
	unreach := append([]byte{3, 4, 0, 0, 0, 0, 0x05, 0x14}, make([]byte, 28)...)
	copy(unreach[8+16:], []byte{192, 0, 2, 1})
	copy(unreach[8+24:], []byte{0x12, 0x34})
	other := append([]byte{}, unreach...)
	other[8+24] = 0
	for _, c := range []struct {
		name string
		b    []byte
		done bool
		err  bool
	}{
		{"reply", reply(0, 0, 9, 9, 0x12, 0x34, 0, 1, 'x'), true, false},
		{"request", reply(8, 0, 9, 9, 0x12, 0x34, 0, 1, 'x'), false, false},
		{"another's", reply(0, 0, 9, 9, 0x12, 0x35, 0, 1, 'x'), false, false},
		{"another sequence number", reply(0, 0, 9, 9, 0x12, 0x34, 0, 2, 'x'), false, false},
		{"changed", reply(0, 0, 9, 9, 0x12, 0x34, 0, 1, 'y'), false, true},
		{"short", reply(0), false, false},
		{"error", unreach, false, true},
		{"error of another", other, false, false},
		{"error cut", unreach[:20], false, false},
	} {
		var r enginetest.GuestReply
		done, err := p.answer(c.b, sent, &r)
		assert.Equal(t, []bool{c.done, c.err}, []bool{done, err != nil}, c.name)
		if c.name == "error" {
			assert.Equal(t, 1300, r.MTU)
		}
	}
}
