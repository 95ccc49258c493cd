package main

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"sidewire/engine/enginetest"
)

// socketScene is a scene with sidewire on sockets, run by a user without
// privileges.
func socketScene(t *testing.T, ports ...string) *scene {
	t.Helper()
	s := newScene(t, "sockets")
	pings(t, s.World)
	enginetest.Must(t, s.Pod.Sysctl("net/ipv4/ip_unprivileged_port_start", "0"))
	s.proc = startNobody(t, s.World, spec("vm", 1, ports...))
	s.plug()
	s.serve()
	return s
}

// The rows of KubeVirt's table that sockets answer alike with `ports: [80/tcp]`,
// and those that they cannot, which docs/modes/masquerade.md lists.
func TestKubeVirt11OnSockets(t *testing.T) {
	s := socketScene(t, "tcp:80")
	for _, p := range []struct {
		name, want string
		kubevirt   string // where it is not the same
		try        func() string
	}{
		{"outside to pod 80 tcp", "vm, peer 10.244.1.1", "", func() string { return s.tcp(s.Outside, "10.244.1.5:80") }},
		{"outside to pod 80 udp", "refused by pod", "", func() string { return s.udp(s.Outside, "10.244.1.5:80") }},
		{"outside to pod 81", "pod, peer 10.244.1.1", "", func() string { return s.tcp(s.Outside, "10.244.1.5:81") }},
		{"outside to pod 4444", "refused by pod", "", func() string { return s.tcp(s.Outside, "10.244.1.5:4444") }},
		{"second client", "vm, peer 10.244.1.7", "", func() string { return s.ask(s.Outside, "tcp4", otherIP, "10.244.1.5:80", 64) }},
		{"far client", "vm, peer 192.0.2.9", "", func() string { return s.tcp(s.far, "10.244.1.5:80") }},
		{"loopback 80", "vm, peer 10.0.2.1", "", func() string { return s.tcp(s.Pod, "127.0.0.1:80") }},
		{"loopback 7777", "pod, peer 127.0.0.1", "", func() string { return s.tcp(s.Pod, "127.0.0.1:7777") }},
		{"pod to its own address 80", "vm, peer 10.0.2.1", "refused by pod", func() string { return s.tcp(s.Pod, "10.244.1.5:80") }},
		{"pod to guest 80", "dial tcp4 10.0.2.2:80: connect: network is unreachable", "vm, peer 10.0.2.1", func() string { return s.tcp(s.Pod, "10.0.2.2:80") }},
		{"guest to outside 9001", "outside, peer 10.244.1.5", "", func() string { return s.tcp(s.guest, "10.244.1.1:9001") }},
		{"guest to outside udp", "outside, peer 10.244.1.5", "", func() string { return s.udp(s.guest, "10.244.1.1:9001") }},
		{"guest to far", "far, peer 10.244.1.5", "", func() string { return s.tcp(s.guest, "192.0.2.9:9000") }},
		{"guest to outside closed", "refused by outside", "", func() string { return s.tcp(s.guest, "10.244.1.1:4444") }},
		{"guest to outside closed udp", "refused by outside", "", func() string { return s.udp(s.guest, "10.244.1.1:4444") }},
		{"guest to far closed udp", "refused by far", "", func() string { return s.udp(s.guest, "192.0.2.9:4444") }},
		{"guest to pod address 80", "vm, peer 10.0.2.1", "refused by pod", func() string { return s.tcp(s.guest, "10.244.1.5:80") }},
		{"guest to pod address 7777", "pod, peer 10.244.1.5", "pod, peer 10.0.2.2", func() string { return s.tcp(s.guest, "10.244.1.5:7777") }},
		{"guest to gateway 7777", "pod, peer 127.0.0.1", "pod, peer 10.0.2.2", func() string { return s.tcp(s.guest, "10.0.2.1:7777") }},
		{"guest to gateway 7777 udp", "pod, peer 127.0.0.1", "pod, peer 10.0.2.2", func() string { return s.udp(s.guest, "10.0.2.1:7777") }},
		{"guest to gateway closed udp", "refused by pod", "", func() string { return s.udp(s.guest, "10.0.2.1:4444") }},
		{"ping outside to pod", "pod replies", "", func() string { return s.ping(s.Outside, "10.244.1.5") }},
		{"guest to gateway", "somebody replies", "pod replies", func() string { return s.ping(s.guest, "10.0.2.1") }},
		{"guest to outside", "outside replies", "", func() string { return s.ping(s.guest, "10.244.1.1") }},
		{"guest to far", "far replies", "", func() string { return s.ping(s.guest, farIP) }},
		{"TTL 1 from guest", "10.0.2.1: Time to live exceeded", "", func() string { return s.ping(s.guest, "-t", "1", farIP) }},
		{"TTL 2 from guest", "10.244.1.1: Time to live exceeded", "", func() string { return s.ping(s.guest, "-t", "2", farIP) }},
		{"DF of MTU from guest", "outside replies", "", func() string { return s.ping(s.guest, "-M", "do", "-s", "1472", "10.244.1.1") }},
		{"DF over a small link", "10.244.1.1: Frag needed and DF set (mtu = 1400)", "", func() string { return s.ping(s.guest, "-M", "do", "-s", "1472", farIP) }},
		{"fragments from guest", "outside replies", "", func() string { return s.ping(s.guest, "-s", "4000", "10.244.1.1") }},
		{"fragments to gateway", "somebody replies", "pod replies", func() string { return s.ping(s.guest, "-s", "4000", "10.0.2.1") }},
		{"datagrams of 9000 from guest", "outside, peer 10.244.1.5", "", func() string { return s.ask(s.guest, "udp4", "", "10.244.1.1:9001", 9000) }},
	} {
		t.Run(p.name, func(t *testing.T) {
			s.t = t
			assert.NotEqual(t, p.want, p.kubevirt)
			assert.Equal(t, p.want, p.try())
		})
	}
	s.t = t
	s.dump()
}
