package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
)

// withRanges is a VMI that lists ranges of ports, each PROTO:FIRST-LAST.
func withRanges(vmi string, ranges ...string) string {
	var b strings.Builder
	b.WriteString("        portRanges:\n")
	for _, r := range ranges {
		proto, ports, _ := strings.Cut(r, ":")
		first, last, _ := strings.Cut(ports, "-")
		fmt.Fprintf(&b, "        - {protocol: %s, start: %s, end: %s}\n", strings.ToUpper(proto), first, last)
	}
	return strings.Replace(vmi, "        macAddress:", b.String()+"        macAddress:", 1)
}

const rangesGate = "--feature-gates=PortRangesSpec"

// Ranges of ports lead to the guest by each way out, and no other port does.
func TestPortRanges(t *testing.T) {
	ranges := []string{"tcp:80-100", "tcp:2000-64000", "udp:1-65535"}
	forwards := []forwardRequest{{Protocol: "TCP", Port: 80, Last: 100}, {Protocol: "TCP", Port: 2000, Last: 64000}, {Protocol: "UDP", Port: 1, Last: 65535}}
	for name, start := range map[string]func(*scene) *process{
		"packet": func(s *scene) *process {
			return startSidewire(t, s.World, withRanges(spec("vm", 1), ranges...), rangesGate)
		},
		"redirect": func(s *scene) *process {
			return startWith(t, s.World, ",+net_admin", withRanges(spec("vm", 1), ranges...), rangesGate)
		},
	} {
		t.Run(name, func(t *testing.T) {
			kind := map[string]string{"packet": "sidewire", "redirect": "sockets"}[name]
			s := newScene(t, kind)
			enginetest.Must(t, s.Pod.Sysctl("net/ipv4/ip_unprivileged_port_start", "0"))
			begin := time.Now()
			s.proc = start(s)
			assert.Less(t, time.Since(begin), 10*time.Second, "however many ports")
			s.plug()
			s.serveAt(s.guest, "vm", 80, 81, 1999, 2000, 33333, 64000, 64001)
			s.serveAt(s.Pod, "pod", 79, 1999, 64001)
			for _, port := range []int{80, 81, 2000, 33333, 64000} {
				assert.Equal(t, "vm, peer 10.244.1.1", s.tcp(s.Outside, fmt.Sprint("10.244.1.5:", port)), port)
			}
			for _, port := range []int{79, 1999, 64001} {
				assert.Equal(t, "pod, peer 10.244.1.1", s.tcp(s.Outside, fmt.Sprint("10.244.1.5:", port)), port)
			}
			assert.Equal(t, "vm, peer 10.244.1.1", s.udp(s.Outside, "10.244.1.5:33333"))
			st := s.proc.status()
			assert.Less(t, st.Memory, uint64(32<<20))
			i := st.Interfaces[0]
			assert.Equal(t, forwards, i.Forwards)
			assert.False(t, i.Everything)
			assert.Equal(t, "vm/red tcp:80-100 tcp:2000-64000 udp:1-65535\n", sidewire(t, "forward", "--socket-dir", s.proc.dir).out)
			s.dump()
		})
	}
}

// Without a redirect each port takes a socket, and a line says how many have none.
func TestPortRangesOnSocketsAlone(t *testing.T) {
	s := newScene(t, "sockets")
	s.proc = startWith(t, s.World, "", withRanges(spec("vm", 1), "tcp:2000-2009", "tcp:3000-60000"), rangesGate)
	s.plug()
	s.serveAt(s.guest, "vm", 2000, 2009)
	assert.Equal(t, "vm, peer 10.244.1.1", s.tcp(s.Outside, "10.244.1.5:2000"))
	assert.Equal(t, "vm, peer 10.244.1.1", s.tcp(s.Outside, "10.244.1.5:2009"))
	assert.Regexp(t, `ports of portRanges do not reach the guest.* ports=\d+ first="each takes a socket.* redirect="CAP_NET_ADMIN missing"`, s.proc.log.String())
	require.Greater(t, len(s.proc.status().Interfaces[0].Forwards), 10)
}

func TestPortRangesOfTwoVMIs(t *testing.T) {
	a, b := writeFile(t, "a.yaml", withRanges(spec("a", 1), "tcp:100-200")), writeFile(t, "b.yaml", withRanges(strings.Replace(spec("b", 1), guestMAC.String(), "02:00:00:00:aa:02", 1), "tcp:200-300"))
	o := sidewire(t, "validate", "-f", a, "-f", b, rangesGate)
	assert.Equal(t, `spec.domain.devices.interfaces[0].portRanges[0]: a port of 200-300/TCP goes to VMI "a" (`+a+":1) in the same network namespace; use another, or -f FILE@NETNS\n", o.out)
	c := writeFile(t, "c.yaml", strings.Replace(spec("c", 1, "tcp:150"), guestMAC.String(), "02:00:00:00:aa:03", 1))
	o = sidewire(t, "validate", "-f", a, "-f", c, rangesGate)
	assert.Contains(t, o.out, `ports[0].port: port 150/TCP goes to VMI "a"`)
	o = sidewire(t, "validate", "-f", c, "-f", a, rangesGate)
	assert.Contains(t, o.out, `portRanges[0]: a port of 100-200/TCP goes to VMI "c"`)
	assert.Equal(t, outcome{}, sidewire(t, "validate", "-f", a, "-f", c+"@x", rangesGate))
}
