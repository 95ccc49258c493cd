package usernet

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

func TestParseRule(t *testing.T) {
	p := netip.MustParsePrefix
	for text, want := range map[string]Rule{
		"deny=10.0.0.0/8":                  {Prefix: p("10.0.0.0/8")},
		"allow=192.0.2.0/24:443/tcp":       {Allow: true, Prefix: p("192.0.2.0/24"), Proto: frame.ProtoTCP, First: 443, Last: 443},
		"allow=any:53/udp":                 {Allow: true, Proto: frame.ProtoUDP, First: 53, Last: 53},
		"allow=192.0.2.7:8000-8080":        {Allow: true, Prefix: p("192.0.2.7/32"), First: 8000, Last: 8080},
		"allow=10.0.0.0/8:443":             {Allow: true, Prefix: p("10.0.0.0/8"), First: 443, Last: 443},
		"deny=any":                         {},
		"deny=any/icmp":                    {Proto: frame.ProtoICMP},
		"deny=0.0.0.0/0":                   {Prefix: p("0.0.0.0/0")},
		"deny=192.0.2.0/24/udp":            {Prefix: p("192.0.2.0/24"), Proto: frame.ProtoUDP},
		"deny=[2001:db8::/32]:1-65535/udp": {Prefix: p("2001:db8::/32"), Proto: frame.ProtoUDP, First: 1, Last: 65535},
		"deny=2001:db8::/32":               {Prefix: p("2001:db8::/32")},
		"deny=2001:db8::/32/tcp":           {Prefix: p("2001:db8::/32"), Proto: frame.ProtoTCP},
		"deny=[::1]":                       {Prefix: p("::1/128")},
		"deny=::ffff:192.0.2.1":            {Prefix: p("192.0.2.1/32")},
	} {
		r, err := ParseRule(text)
		if assert.NoError(t, err, text) {
			assert.Equal(t, want, r, text)
		}
		again, err := ParseRule(r.String())
		assert.NoError(t, err, text)
		assert.Equal(t, r, again, text)
	}
}

// A fault is told with what is at fault and how to mend it.
func TestParseRuleFaults(t *testing.T) {
	for text, want := range map[string]string{
		"":                          "want allow=WHERE or deny=WHERE",
		"10.0.0.0/8":                "want allow=WHERE or deny=WHERE",
		"permit=any":                "want allow=WHERE or deny=WHERE",
		"allow=":                    `"" is no address or network: want any`,
		"allow=example.com":         `"example.com" is no address or network`,
		"allow=10.1.0.0/8":          "10.1.0.0/8 has bits behind its length: write 10.0.0.0/8, or 10.1.0.0 for the one address",
		"allow=10.0.0.0/33":         `"10.0.0.0/33" is no address or network`,
		"allow=any:0":               `port "0": want a number from 1 to 65535`,
		"allow=any:+5":              `port "+5": want a number`,
		"allow=any:70000/tcp":       `port "70000": want a number`,
		"allow=any:90-80":           "the range ends before it begins: write 80-90",
		"allow=any:53/sctp":         `protocol "sctp": want tcp, udp or icmp`,
		"allow=any:53/":             "ends in a slash",
		"allow=2001:db8::/32/":      "ends in a slash",
		"allow=any:":                "no port behind its colon",
		"allow=any:8/icmp":          "icmp has no ports: leave out :8",
		"allow=[::1":                "no closing bracket",
		"allow=[2001:db8::]/32:443": "put the network's length into the brackets",
		"allow=fe80::1%eth0":        "is no address or network",
		"allow=::ffff:10.0.0.0/104": "write a network of IPv4 as one of IPv4",
	} {
		_, err := ParseRule(text)
		if assert.Error(t, err, text) {
			assert.Contains(t, err.Error(), want, text)
			assert.True(t, strings.HasPrefix(err.Error(), "rule "), text)
		}
	}
}

func policyOf(t *testing.T, deny bool, rules ...string) Policy {
	t.Helper()
	p := Policy{Deny: deny}
	for _, s := range rules {
		r, err := ParseRule(s)
		require.NoError(t, err)
		p.Rules = append(p.Rules, r)
	}
	return p
}

func TestPolicy(t *testing.T) {
	const tcp, udp, icmp = frame.ProtoTCP, frame.ProtoUDP, frame.ProtoICMP
	addr := func(s string) uint32 { return ip4(netip.MustParseAddr(s)) }
	for name, c := range map[string]struct {
		policy Policy
		proto  uint8
		to     string
		port   uint16
		want   bool
	}{
		"nothing said":                     {Policy{}, tcp, "192.0.2.1", 80, true},
		"nothing said, deny":               {Policy{Deny: true}, tcp, "192.0.2.1", 80, false},
		"first decides, allowed":           {policyOf(t, false, "allow=192.0.2.1", "deny=any"), tcp, "192.0.2.1", 80, true},
		"first decides, denied":            {policyOf(t, false, "deny=any", "allow=192.0.2.1"), tcp, "192.0.2.1", 80, false},
		"beside the network":               {policyOf(t, false, "deny=192.0.2.0/25"), tcp, "192.0.2.128", 80, true},
		"in the network":                   {policyOf(t, false, "deny=192.0.2.0/25"), tcp, "192.0.2.127", 80, false},
		"other protocol":                   {policyOf(t, false, "deny=any/udp"), tcp, "192.0.2.1", 80, true},
		"first port of a range":            {policyOf(t, false, "deny=any:80-90"), udp, "192.0.2.1", 80, false},
		"last port of a range":             {policyOf(t, false, "deny=any:80-90"), udp, "192.0.2.1", 90, false},
		"behind a range":                   {policyOf(t, false, "deny=any:80-90"), udp, "192.0.2.1", 91, true},
		"ports are not about ICMP":         {policyOf(t, false, "deny=any:1-65535"), icmp, "192.0.2.1", 0, true},
		"ICMP":                             {policyOf(t, false, "deny=any/icmp"), icmp, "192.0.2.1", 0, false},
		"IPv6 rules are not about IPv4":    {policyOf(t, false, "deny=[::/0]"), tcp, "192.0.2.1", 80, true},
		"default deny":                     {policyOf(t, true, "allow=any:53/udp"), tcp, "192.0.2.1", 53, false},
		"default deny, allowed":            {policyOf(t, true, "allow=any:53/udp"), udp, "192.0.2.1", 53, true},
		"gateway, larger network":          {policyOf(t, false, "deny=10.0.0.0/8"), tcp, "10.0.2.2", 80, true},
		"beside the guest's network":       {policyOf(t, false, "deny=10.0.0.0/8"), tcp, "10.0.3.2", 80, false},
		"gateway by its name":              {policyOf(t, false, "deny=10.0.2.2"), tcp, "10.0.2.2", 80, false},
		"gateway by its network":           {policyOf(t, false, "deny=10.0.2.0/24"), tcp, "10.0.2.2", 80, false},
		"gateway by what it stands for":    {policyOf(t, false, "deny=127.0.0.0/8:5432/tcp"), tcp, "10.0.2.2", 5432, false},
		"gateway by that, other port":      {policyOf(t, false, "deny=127.0.0.0/8:5432/tcp"), tcp, "10.0.2.2", 80, true},
		"gateway is somewhere":             {policyOf(t, false, "deny=any"), tcp, "10.0.2.2", 80, false},
		"service, larger network":          {policyOf(t, false, "deny=10.0.0.0/8"), udp, "10.0.2.3", 53, true},
		"service is not loopback":          {policyOf(t, false, "deny=127.0.0.1"), udp, "10.0.2.3", 53, true},
		"service by its name":              {policyOf(t, false, "deny=10.0.2.3:53"), udp, "10.0.2.3", 53, false},
		"service is somewhere":             {policyOf(t, false, "deny=any"), udp, "10.0.2.3", 53, false},
		"service is somewhere (by length)": {policyOf(t, false, "deny=0.0.0.0/0"), udp, "10.0.2.3", 53, false},
	} {
		t.Run(name, func(t *testing.T) {
			n, err := New(Config{
				Guest: netip.MustParseAddr("10.0.2.15"), Gateway: netip.MustParseAddr("10.0.2.2"), Prefix: netip.MustParsePrefix("10.0.2.0/24"),
				MTU: 1500, Workers: 1, MaxFlows: 1, Loopback: true, Policy: c.policy,
				Services: []Service{{udp, netip.MustParseAddrPort("10.0.2.3:53"), netip.MustParseAddrPort("127.0.0.1:5353")}},
			})
			require.NoError(t, err)
			defer n.Close()
			assert.Equal(t, c.want, n.permits(c.proto, addr(c.to), c.port))
		})
	}
}

// To ask costs nothing that the collector sees.
func TestPolicyAllocs(t *testing.T) {
	p := policyOf(t, true, "deny=10.0.0.0/8", "allow=192.0.2.0/24:443/tcp", "allow=any:53/udp")
	to := netip.MustParseAddr("192.0.2.1")
	assert.Zero(t, testing.AllocsPerRun(100, func() {
		if !p.allows(frame.ProtoUDP, to, 53) {
			t.Error("denied")
		}
	}))
}

func FuzzParseRule(f *testing.F) {
	for _, s := range []string{
		"deny=10.0.0.0/8", "allow=192.0.2.0/24:443/tcp", "allow=any:53/udp", "deny=[2001:db8::/32]:1-2/udp", "deny=2001:db8::/32/tcp",
		"allow=any:", "allow=[", "allow=]", "allow=[]:1", "allow=//", "allow=:/", "deny=::ffff:1.2.3.4", "allow=1.2.3.4/032", "allow=any:1-",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseRule(s)
		if err != nil {
			return
		}
		again, err := ParseRule(r.String())
		require.NoError(t, err, r.String())
		require.Equal(t, r, again)
	})
}

// TCP and UDP heed rules about the gateway by its own address and by the one
// that it stands for.
func TestPolicyOfTheGateway(t *testing.T) {
	for _, rule := range []string{"deny=10.0.2.2", "deny=127.0.0.1", "deny=any:7000"} {
		w := newWorld(t, func(c *Config) { c.Policy = policyOf(t, false, rule) })
		for _, b := range [][]byte{
			tcpTo(gateway(7000), enginetest.TCP{Src: 40000, Seq: 1, Flags: enginetest.SYN}, ""), udpTo(40000, gateway(7000), "hello"),
		} {
			as := w.send(b)
			w.dropped(frame.Policy)
			require.Len(t, as, 1)
			assert.Equal(t, []byte{icmpUnreachable, codeProhibited}, as[0].data[l4:l4+2])
		}
		assert.Equal(t, uint64(2), w.net.Stats().PolicyDenied)
	}
}
