package main

import (
	"net"
	"net/netip"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// A guest to whom everything is forwarded keeps its own ports outside, but not
// those that the pod's kernel chooses from, whatever these are.
func TestGuestKeepsOffTheKernelsPorts(t *testing.T) {
	s := newScene(t, "sidewire")
	require.NoError(t, s.Pod.Sysctl("net/ipv4/ip_local_port_range", "20000 50000"))
	s.proc = startSidewire(t, s.World, spec("vm", 1))
	s.plug()
	pc, err := s.Outside.ListenPacket("udp4", "10.244.1.1:9100")
	require.NoError(t, err)
	defer pc.Close()
	seenFrom := func(port int) uint16 {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.UDPAddr{Port: port}}
		require.NoError(t, s.guest.Do(func() error {
			c, err := d.Dial("udp4", "10.244.1.1:9100")
			if err != nil {
				return err
			}
			defer c.Close()
			_, err = c.Write([]byte(strconv.Itoa(port)))
			return err
		}))
		require.NoError(t, pc.SetReadDeadline(time.Now().Add(soon)))
		b := make([]byte, 16)
		n, from, err := pc.ReadFrom(b)
		require.NoError(t, err)
		require.Equal(t, strconv.Itoa(port), string(b[:n]))
		return netip.MustParseAddrPort(from.String()).Port()
	}
	for _, port := range []int{1024, 19999, 40000, 50001, 65535} {
		assert.EqualValues(t, port, seenFrom(port))
	}
	for _, port := range []int{20000, 32767, 39999} {
		assert.GreaterOrEqual(t, seenFrom(port), uint16(40000), "seen instead of %d", port)
	}
	s.dump()
}
