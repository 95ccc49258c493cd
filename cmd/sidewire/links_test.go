package main

import (
	"context"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/uplink"
)

// linkState waits until the status shows a link in a state.
func (s *scene) linkState(link string, state uplink.LinkState) {
	s.t.Helper()
	var links []uplink.LinkStatus
	if !enginetest.Wait(soon, func() bool {
		links = s.proc.status().Interfaces[0].Links
		for _, l := range links {
			if l.Name == link {
				return l.State == state
			}
		}
		return false
	}) {
		s.t.Fatalf("%s is not %s: %v", link, state, links)
	}
}

// The pod's interface goes down under flows of all ways and comes back with
// its routes: the flows go on, and new ones start. Each change is one line in
// the log.
func TestFlowsOutliveALinkDown(t *testing.T) {
	for _, ports := range [][]string{nil, {"tcp:80"}} {
		s := sidewireScene(t, ports...)
		in := dialFrom(t, s.Outside, "10.244.1.5:80")
		out := dialFrom(t, s.guest, "10.244.1.1:9001")
		loop := dialFrom(t, s.Pod, "127.0.0.1:80")
		s.linkState("eth0", uplink.LinkUp)
		enginetest.Must(t, s.Pod.Down("eth0"))
		s.linkState("eth0", uplink.LinkDown)
		assert.True(t, echoes(t, loop, "pod to guest meanwhile"))
		s.udp(s.guest, "10.244.1.1:9001") // is lost
		enginetest.Must(t, s.Pod.Up("eth0"), s.Pod.Route("default", "10.244.1.1"))
		s.linkState("eth0", uplink.LinkUp)
		assert.True(t, echoes(t, in, "outside to guest"))
		assert.True(t, echoes(t, out, "guest to outside"))
		assert.True(t, echoes(t, loop, "pod to guest"))
		assert.Equal(t, "vm, peer 10.244.1.1", s.tcp(s.Outside, "10.244.1.5:80"))
		assert.Equal(t, "outside, peer 10.244.1.5", s.tcp(s.guest, "10.244.1.1:9001"))
		assert.Equal(t, 1, strings.Count(s.proc.log.String(), "state=down"), s.proc.log)
		assert.Equal(t, 1, strings.Count(s.proc.log.String(), "link is up again"), s.proc.log)
		s.dump()
	}
}

// Somebody deletes a link of sidewire's, or the pod's: what needs it ends, the
// rest goes on, nobody spins, log and status say so, and the pod is put back as
// ever.
func TestDeletedLinks(t *testing.T) {
	for _, link := range []string{"sw-eth0", "swin-eth0", "eth0"} {
		t.Run(link, func(t *testing.T) {
			s := newScene(t, "sidewire")
			before := footprint(t, s.Pod)
			s.proc = startSidewire(t, s.World, spec("vm", 1))
			s.plug()
			s.serve()
			out := dialFrom(t, s.guest, "10.244.1.1:9001")
			loop := dialFrom(t, s.Pod, "127.0.0.1:80")
			enginetest.Must(t, s.Pod.Run("ip", "link", "del", link))
			s.linkState(link, uplink.LinkGone)
			switch link {
			case "sw-eth0":
				assert.True(t, echoes(t, out, "guest to outside"))
				assert.Equal(t, "vm, peer 10.244.1.1", s.tcp(s.Outside, "10.244.1.5:80"))
				assert.Equal(t, "timeout", s.ping(s.guest, gatewayIP))
			case "swin-eth0":
				assert.True(t, echoes(t, loop, "pod to guest"))
				assert.Equal(t, "timeout", s.tcp(s.Outside, "10.244.1.5:80"))
			default:
				assert.True(t, echoes(t, loop, "pod to guest"))
				assert.Contains(t, s.ping(s.guest, "10.244.1.1"), "Destination Net Unreachable")
			}
			require.NoError(t, s.guest.Down("eth0")) // nobody says anything any more
			wakeups := func() (n uint64) {
				for _, w := range s.proc.status().Workers {
					n += w.Wakeups
				}
				return n
			}
			last := wakeups()
			enginetest.Eventually(t, soon, func() bool {
				was := last
				last = wakeups()
				return !enginetest.Wait(silence, func() bool { return wakeups() != was })
			})
			assert.Equal(t, 1, strings.Count(s.proc.log.String(), "link is gone"), s.proc.log)
			var text strings.Builder
			require.NoError(t, statusCommand(context.Background(), []string{"--socket-dir", s.proc.dir}, &text, &text))
			assert.Contains(t, text.String(), link+" gone")
			s.dump()
			s.proc.stop()
			if link == "eth0" {
				assert.NotContains(t, footprint(t, s.Pod)["nft list ruleset"], "sidewire")
				return
			}
			assert.Empty(t, changes(before, footprint(t, s.Pod)))
		})
	}
}
