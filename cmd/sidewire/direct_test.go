package main

import (
	"bytes"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

// Frames for the guest are received straight into its buffers; what the pod
// talks with others about meanwhile never comes there, not even into buffers
// that the guest has not got back.
func TestUnusedBuffersHoldNothingOfThePods(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "dhclient", "curl")
	for name, ports := range map[string][]string{"ports empty": nil, "ports listed": {"tcp:80"}} {
		t.Run(name, func(t *testing.T) {
			w := enginetest.NewWorld(t, enginetest.WorldOptions{})
			p := startSidewire(t, w, spec("vm", 1, ports...))
			v := startVM(t, p, vhosttest.Options{})
			mem := v.tap.Guest.Mem.Bytes
			secret := serve(t, w.Outside, 4001, "the pod's own business; ")
			known := serve(t, w.Outside, 4002, "what the guest asked for; ")
			fetch := func(ns *enginetest.NetNS, port int) chan error {
				done := make(chan error, 1)
				go func() {
					_, err := runIn(ns, v.dir, "curl", "-sS", "--max-time", "30", "-o", "/dev/null",
						fmt.Sprintf("http://%s:%d/", enginetest.OutsideIP, port))
					done <- err
				}()
				return done
			}
			for range 3 {
				guest, pod := fetch(v.ns, 4002), fetch(w.Pod, 4001)
				for guest != nil || pod != nil {
					select {
					case err := <-guest:
						require.NoError(t, err)
						guest = nil
					case err := <-pod:
						require.NoError(t, err)
						pod = nil
					default:
						require.False(t, bytes.Contains(mem, secret), "the guest can read it")
					}
				}
			}
			require.False(t, bytes.Contains(mem, secret), "the guest can read it")
			assert.True(t, bytes.Contains(mem, known), "the test would see it")
			pair := p.status().Interfaces[0].Device.Pairs[0]
			assert.Greater(t, pair.RxDirect, pair.RxFrames/10, "of %d frames", pair.RxFrames)
		})
	}
}

// serve sends 64 MiB of the same words to whoever connects to a port in ns,
// and returns the words.
func serve(t *testing.T, ns *enginetest.NetNS, port int, words string) []byte {
	chunk := bytes.Repeat([]byte(words), 4<<20/len(words))
	listen(t, ns, "tcp4", fmt.Sprintf(":%d", port), func(c net.Conn) {
		_ = c.SetDeadline(time.Now().Add(time.Minute))
		// The request is read first, so that closing is no reset.
		_, _ = c.Read(make([]byte, 4096))
		_, _ = c.Write([]byte("HTTP/1.0 200 OK\r\n\r\n"))
		for range 16 {
			if _, err := c.Write(chunk); err != nil {
				return
			}
		}
	})
	return []byte(words)
}
