package main

import (
	"net"
	"testing"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

// stub is a resolver on the pod's loopback which, like systemd-resolved,
// refuses whoever is not on the loopback too.
func stub(w dns.ResponseWriter, q *dns.Msg) {
	m := new(dns.Msg)
	m.SetReply(q)
	host, _, err := net.SplitHostPort(w.RemoteAddr().String())
	if err != nil || !net.ParseIP(host).IsLoopback() {
		m.Rcode = dns.RcodeRefused
	} else {
		m.Answer = []dns.RR{&dns.A{
			Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 1},
			A:   net.IPv4(192, 0, 2, 53),
		}}
	}
	_ = w.WriteMsg(m)
}

// A resolver on the pod's loopback is the gateway to the guest, which forwards
// to it over UDP and TCP, whatever ports are published.
func TestLoopbackResolverIsTheGateway(t *testing.T) {
	enginetest.Need(t, "netns", "tun", "nft", "dhclient", "dig")
	for name, ports := range map[string][]string{"no ports": nil, "ports": {"tcp:80"}} {
		t.Run(name, func(t *testing.T) {
			w := enginetest.NewWorld(t, enginetest.WorldOptions{})
			pc, err := w.Pod.ListenPacket("udp4", "127.0.0.53:53")
			require.NoError(t, err)
			t.Cleanup(func() { pc.Close() })
			l, err := w.Pod.Listen("tcp4", "127.0.0.53:53")
			require.NoError(t, err)
			t.Cleanup(func() { l.Close() })
			for _, srv := range []*dns.Server{{PacketConn: pc}, {Listener: l}} {
				srv.Handler = dns.HandlerFunc(stub)
				go func() { _ = srv.ActivateAndServe() }() // ends with its socket
			}
			w.ResolvConf = writeFile(t, "resolv.conf", "nameserver 127.0.0.53\n")
			p := startSidewire(t, w, spec("vm", 1, ports...))
			v := startVM(t, p, vhosttest.Options{})
			resolv := v.run("cat", v.dir+"/resolv.conf")
			assert.Contains(t, resolv, "nameserver 10.0.2.1")
			assert.Equal(t, "192.0.2.53\n", v.run("dig", "+short", "+time=2", "@10.0.2.1", "a.example"))
			assert.Equal(t, "192.0.2.53\n", v.run("dig", "+short", "+tcp", "+time=2", "@10.0.2.1", "b.example"))
			// Other ports of the gateway are the pod's own, as before.
			_, err = v.try("dig", "+tries=1", "+time=1", "-p", "54", "@10.0.2.1", "c.example")
			assert.Error(t, err)
		})
	}
}
