package main

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
)

// probe is one row of a table: what is tried in a scene, and what comes of it
// without and with `ports: [80/tcp]`. An empty answer with ports is the same
// as without.
type probe struct {
	name   string
	try    func(s *scene) string
	all    string
	listed string
}

func runProbes(t *testing.T, probes []probe) {
	for _, ports := range [][]string{nil, {"tcp:80"}} {
		config := "no ports"
		if len(ports) > 0 {
			config = "ports 80"
		}
		for _, build := range []func(*testing.T, ...string) *scene{kernelScene, sidewireScene} {
			var s *scene
			kind := "kernel"
			if s = build(t, ports...); s.kind != "" {
				kind = s.kind
			}
			s.settle()
			for _, p := range probes {
				want := p.all
				if len(ports) > 0 && p.listed != "" {
					want = p.listed
				}
				t.Run(config+"/"+p.name+"/"+kind, func(t *testing.T) {
					s.t = t
					assert.Equal(t, want, p.try(s))
				})
			}
			s.t = t
			s.dump()
		}
	}
}

// The table of kubevirt.md 1.1, row by row.
func TestKubeVirt11TableRow17Row24Row25Row54Row55Row56Row57(t *testing.T) {
	runProbes(t, []probe{
		{"outside to pod 80 tcp", func(s *scene) string { return s.tcp(s.Outside, "10.244.1.5:80") },
			"vm, peer 10.244.1.1", ""},
		{"outside to pod 80 udp", func(s *scene) string { return s.udp(s.Outside, "10.244.1.5:80") },
			"vm, peer 10.244.1.1", "refused by pod"},
		{"outside to pod 81", func(s *scene) string { return s.tcp(s.Outside, "10.244.1.5:81") },
			"vm, peer 10.244.1.1", "pod, peer 10.244.1.1"},
		{"outside to pod 4444", func(s *scene) string { return s.tcp(s.Outside, "10.244.1.5:4444") },
			"refused by vm", "refused by pod"},
		{"loopback 80", func(s *scene) string { return s.tcp(s.Pod, "127.0.0.1:80") },
			"vm, peer 10.0.2.1", ""},
		{"loopback 7777", func(s *scene) string { return s.tcp(s.Pod, "127.0.0.1:7777") },
			"refused by vm", "pod, peer 127.0.0.1"},
		{"pod to its own address 80", func(s *scene) string { return s.tcp(s.Pod, "10.244.1.5:80") },
			"refused by pod", ""},
		{"pod to guest 80", func(s *scene) string { return s.tcp(s.Pod, "10.0.2.2:80") },
			"vm, peer 10.0.2.1", ""},
		{"guest to outside 9001", func(s *scene) string { return s.tcp(s.guest, "10.244.1.1:9001") },
			"outside, peer 10.244.1.5", ""},
		{"guest to pod address 80", func(s *scene) string { return s.tcp(s.guest, "10.244.1.5:80") },
			"refused by pod", ""},
		{"guest to pod address 7777", func(s *scene) string { return s.tcp(s.guest, "10.244.1.5:7777") },
			"pod, peer 10.0.2.2", ""},
		{"guest to gateway 7777", func(s *scene) string { return s.tcp(s.guest, "10.0.2.1:7777") },
			"pod, peer 10.0.2.2", ""},
		{"ping outside to pod", func(s *scene) string { return s.ping(s.Outside, "10.244.1.5") },
			"vm replies", "pod replies"},
	})
}

// More of the same: UDP, clients, the pod's own flows.
func TestKubeVirt11FlowsRow54Row55Row56(t *testing.T) {
	runProbes(t, []probe{
		{"outside to pod 4444 udp", func(s *scene) string { return s.udp(s.Outside, "10.244.1.5:4444") },
			"refused by vm", "refused by pod"},
		{"outside to pod 7777", func(s *scene) string { return s.tcp(s.Outside, "10.244.1.5:7777") },
			"refused by vm", "pod, peer 10.244.1.1"},
		{"second client", func(s *scene) string { return s.ask(s.Outside, "tcp4", otherIP, "10.244.1.5:80", 64) },
			"vm, peer 10.244.1.7", ""},
		{"far client", func(s *scene) string { return s.tcp(s.far, "10.244.1.5:80") },
			"vm, peer 192.0.2.9", ""},
		{"far client udp", func(s *scene) string { return s.udp(s.far, "10.244.1.5:81") },
			"vm, peer 192.0.2.9", "pod, peer 192.0.2.9"},
		{"loopback 80 udp", func(s *scene) string { return s.udp(s.Pod, "127.0.0.1:80") },
			"vm, peer 10.0.2.1", "refused by pod"},
		{"loopback 4444", func(s *scene) string { return s.tcp(s.Pod, "127.0.0.1:4444") },
			"refused by vm", "refused by pod"},
		{"pod to guest 80 udp", func(s *scene) string { return s.udp(s.Pod, "10.0.2.2:80") },
			"vm, peer 10.0.2.1", ""},
		{"pod to guest 4444 udp", func(s *scene) string { return s.udp(s.Pod, "10.0.2.2:4444") },
			"refused by vm", ""},
		{"pod to outside", func(s *scene) string { return s.tcp(s.Pod, "10.244.1.1:9001") },
			"outside, peer 10.244.1.5", ""},
		{"pod to outside udp", func(s *scene) string { return s.udp(s.Pod, "10.244.1.1:9001") },
			"outside, peer 10.244.1.5", ""},
		{"pod to outside closed udp", func(s *scene) string { return s.udp(s.Pod, "10.244.1.1:4444") },
			"refused by outside", ""},
		{"guest to outside udp", func(s *scene) string { return s.udp(s.guest, "10.244.1.1:9001") },
			"outside, peer 10.244.1.5", ""},
		{"guest to far", func(s *scene) string { return s.tcp(s.guest, "192.0.2.9:9000") },
			"far, peer 10.244.1.5", ""},
		{"guest to outside closed", func(s *scene) string { return s.tcp(s.guest, "10.244.1.1:4444") },
			"refused by outside", ""},
		{"guest to outside closed udp", func(s *scene) string { return s.udp(s.guest, "10.244.1.1:4444") },
			"refused by outside", ""},
		{"guest to far closed udp", func(s *scene) string { return s.udp(s.guest, "192.0.2.9:4444") },
			"refused by far", ""},
		{"guest to gateway closed udp", func(s *scene) string { return s.udp(s.guest, "10.0.2.1:4444") },
			"refused by pod", ""},
		{"guest to gateway 7777 udp", func(s *scene) string { return s.udp(s.guest, "10.0.2.1:7777") },
			"pod, peer 10.0.2.2", ""},
		{"guest to pod address 4444 udp", func(s *scene) string { return s.udp(s.guest, "10.244.1.5:4444") },
			"refused by pod", ""},
		{"guest to nobody's address", func(s *scene) string { return s.tcp(s.guest, "10.244.1.99:80") },
			"timeout", ""},
	})
}

// The range that the guest's flows go out from is no less the pod's, where it
// is not the guest's: its processes answer there, and closed ports refuse.
func TestKubeVirt11PortsOfTheRange(t *testing.T) {
	runProbes(t, []probe{
		{"pod's listener", func(s *scene) string { return s.tcp(s.Outside, "10.244.1.5:45000") },
			"refused by vm", "pod, peer 10.244.1.1"},
		{"pod's listener udp", func(s *scene) string { return s.udp(s.Outside, "10.244.1.5:45000") },
			"refused by vm", "pod, peer 10.244.1.1"},
		{"far to pod's listener", func(s *scene) string { return s.tcp(s.far, "10.244.1.5:45000") },
			"refused by vm", "pod, peer 192.0.2.9"},
		{"datagrams of 9000 to pod's listener", func(s *scene) string { return s.ask(s.Outside, "udp4", "", "10.244.1.5:45000", 9000) },
			"refused by vm", "pod, peer 10.244.1.1"},
		{"closed", func(s *scene) string { return s.tcp(s.Outside, "10.244.1.5:45001") },
			"refused by vm", "refused by pod"},
		{"closed udp", func(s *scene) string { return s.udp(s.Outside, "10.244.1.5:45001") },
			"refused by vm", "refused by pod"},
	})
}

// What ICMP and fragments do.
func TestKubeVirt11ICMPRow36Row55(t *testing.T) {
	runProbes(t, []probe{
		{"guest to gateway", func(s *scene) string { return s.ping(s.guest, "10.0.2.1") },
			"pod replies", ""},
		{"guest to outside", func(s *scene) string { return s.ping(s.guest, "10.244.1.1") },
			"outside replies", ""},
		{"guest to far", func(s *scene) string { return s.ping(s.guest, farIP) },
			"far replies", ""},
		{"guest to pod address", func(s *scene) string { return s.ping(s.guest, "10.244.1.5") },
			"pod replies", ""},
		{"pod to guest", func(s *scene) string { return s.ping(s.Pod, "10.0.2.2") },
			"vm replies", ""},
		{"pod to outside", func(s *scene) string { return s.ping(s.Pod, "10.244.1.1") },
			"outside replies", ""},
		{"far to pod", func(s *scene) string { return s.ping(s.far, "10.244.1.5") },
			"vm replies", "pod replies"},
		{"TTL 1 from guest", func(s *scene) string { return s.ping(s.guest, "-t", "1", farIP) },
			"10.0.2.1: Time to live exceeded", ""},
		{"TTL 2 from guest", func(s *scene) string { return s.ping(s.guest, "-t", "2", farIP) },
			"10.244.1.1: Time to live exceeded", ""},
		{"TTL 3 from guest", func(s *scene) string { return s.ping(s.guest, "-t", "3", farIP) },
			"far replies", ""},
		{"TTL 1 from outside", func(s *scene) string { return s.ping(s.Outside, "-t", "1", "10.244.1.5") },
			"10.244.1.5: Time to live exceeded", "pod replies"},
		{"DF of MTU from guest", func(s *scene) string { return s.ping(s.guest, "-M", "do", "-s", "1472", "10.244.1.1") },
			"outside replies", ""},
		{"DF of MTU+1 from guest", func(s *scene) string { return s.ping(s.guest, "-M", "do", "-s", "1473", "10.244.1.1") },
			"local error: message too long, mtu=1500", ""},
		{"DF of MTU from outside", func(s *scene) string { return s.ping(s.Outside, "-M", "do", "-s", "1472", "10.244.1.5") },
			"vm replies", "pod replies"},
		{"DF over a small link", func(s *scene) string { return s.ping(s.guest, "-M", "do", "-s", "1472", farIP) },
			"10.244.1.1: Frag needed and DF set (mtu = 1400)", ""},
		{"fragments from guest", func(s *scene) string { return s.ping(s.guest, "-s", "4000", "10.244.1.1") },
			"outside replies", ""},
		{"fragments over a small link", func(s *scene) string { return s.ping(s.guest, "-s", "4000", farIP) },
			"far replies", ""},
		{"fragments from outside", func(s *scene) string { return s.ping(s.Outside, "-s", "4000", "10.244.1.5") },
			"vm replies", "pod replies"},
		{"fragments of pod", func(s *scene) string { return s.ping(s.Pod, "-s", "4000", "10.244.1.1") },
			"outside replies", ""},
		{"fragments to gateway", func(s *scene) string { return s.ping(s.guest, "-s", "4000", "10.0.2.1") },
			"pod replies", ""},
		{"fragments of pod to guest", func(s *scene) string { return s.ping(s.Pod, "-s", "4000", "10.0.2.2") },
			"vm replies", ""},
		{"datagrams of 9000 from guest", func(s *scene) string { return s.ask(s.guest, "udp4", "", "10.244.1.1:9001", 9000) },
			"outside, peer 10.244.1.5", ""},
		{"datagrams of 9000 from outside", func(s *scene) string { return s.ask(s.Outside, "udp4", "", "10.244.1.5:81", 9000) },
			"vm, peer 10.244.1.1", "pod, peer 10.244.1.1"},
		{"datagrams of 9000 from far", func(s *scene) string { return s.ask(s.far, "udp4", "", "10.244.1.5:81", 9000) },
			"vm, peer 192.0.2.9", "pod, peer 192.0.2.9"},
		{"datagrams of 9000 of pod", func(s *scene) string { return s.ask(s.Pod, "udp4", "", "10.244.1.1:9001", 9000) },
			"outside, peer 10.244.1.5", ""},
	})
}

const (
	protoExperiment = 253 // RFC 3692
	protoGRE        = unix.IPPROTO_GRE
	protoSCTP       = unix.IPPROTO_SCTP
)

var grePacket = []byte{0, 0, 0x08, 0, 'g', 'r', 'e', '!'} // version 0, EtherType IPv4

// sctpInit is a sound INIT from port 5000 to 5001 (RFC 9260, 3.3.2).
func sctpInit() []byte {
	b := make([]byte, 12, 32)
	binary.BigEndian.PutUint16(b, 5000)
	binary.BigEndian.PutUint16(b[2:], 5001)
	b = append(b, 1, 0, 0, 20, 1, 2, 3, 4, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1)
	sum := crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli))
	binary.LittleEndian.PutUint32(b[8:], sum)
	return b
}

// Every IP protocol passes, and comes back where it began.
func TestKubeVirt11OtherProtocolsRow55(t *testing.T) {
	payload := bytes.Repeat([]byte("sidewire"), 8)
	there := func(proto int, payload []byte) func(s *scene) string {
		return func(s *scene) string { return s.raw(proto, s.Outside, "10.244.1.5", s.guest, payload) }
	}
	back := func(proto int, payload []byte) func(s *scene) string {
		return func(s *scene) string {
			out := s.raw(proto, s.guest, farIP, s.far, payload)
			answer := append(bytes.Clone(payload), " answered"...)
			return out + ", " + s.raw(proto, s.far, "10.244.1.5", s.guest, answer)
		}
	}
	const in, none, roundTrip = "10.244.1.1 to 10.0.2.2", "not seen", "10.244.1.5 to 192.0.2.9, 192.0.2.9 to 10.0.2.2"
	runProbes(t, []probe{
		{"experimental to pod", there(protoExperiment, payload), in, none},
		{"GRE to pod", there(protoGRE, grePacket), in, none},
		{"SCTP to pod", there(protoSCTP, sctpInit()), in, none},
		{"experimental from guest", back(protoExperiment, payload), roundTrip, ""},
		{"GRE from guest", back(protoGRE, grePacket), roundTrip, ""},
		{"SCTP from guest", func(s *scene) string { return s.raw(protoSCTP, s.guest, farIP, s.far, sctpInit()) },
			"10.244.1.5 to 192.0.2.9", ""},
	})
}

// While everything is published, the pod's processes resolve and fetch.
func TestKubeVirt11PodResolvesAndFetches(t *testing.T) {
	enginetest.Need(t, "dig", "curl")
	runProbes(t, []probe{
		{"dig in pod", func(s *scene) string {
			out, _ := runIn(s.Pod, s.dir, "dig", "+short", "+time=1", "+tries=2", "@10.244.1.1", enginetest.OutsideName)
			return strings.TrimSpace(out)
		}, "10.244.1.1", ""},
		{"curl in pod", func(s *scene) string {
			out, _ := runIn(s.Pod, s.dir, "curl", "-sS", "--max-time", "5", "http://10.244.1.1:9000/whoami")
			who, _, _ := strings.Cut(out, ":")
			return who
		}, "10.244.1.5", ""},
	})
}
