package dns

import (
	"context"
	"net"
	"net/netip"
	"testing"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// zone answers A queries from a list of names, and NXDOMAIN for all others.
func zone(names map[string]string) func(query []byte) [][]byte {
	return func(query []byte) [][]byte {
		var q dns.Msg
		if q.Unpack(query) != nil {
			return nil
		}
		m := new(dns.Msg).SetReply(&q)
		m.Rcode = dns.RcodeNameError
		if a := names[q.Question[0].Name]; a != "" {
			m.Rcode = dns.RcodeSuccess
			alias := &dns.CNAME{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeCNAME, Class: dns.ClassINET}, Target: "real.example."}
			m.Answer = []dns.RR{alias, &dns.A{Hdr: dns.RR_Header{Name: "real.example.", Rrtype: dns.TypeA, Class: dns.ClassINET}, A: net.ParseIP(a)}}
		}
		b, _ := m.Pack()
		return [][]byte{b}
	}
}

func TestLookup4(t *testing.T) {
	up := newUpstream(t, zone(map[string]string{
		"tftp.example.com.": "192.0.2.1", "tftp.cluster.local.": "192.0.2.2", "a.b.cluster.local.": "192.0.2.3",
	}))
	s, err := New(Config{Resolvers: []netip.AddrPort{dead(t).addr, up.addr}, Allow: netip.MustParsePrefix("0.0.0.0/0"),
		Names: map[string][]netip.Addr{"static.example": {netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("192.0.2.9")}}})
	require.NoError(t, err)
	search := []string{"nowhere.local", "cluster.local"}
	for name, want := range map[string]string{
		"tftp.example.com": "192.0.2.1", "TFTP.example.com.": "", "tftp": "192.0.2.2", "a.b": "192.0.2.3",
		"tftp.": "", "static.example": "192.0.2.9", "Static.Example": "192.0.2.9", "..": "", "unknown.example": "",
	} {
		a, err := s.Lookup4(context.Background(), name, search)
		if want == "" {
			require.ErrorIs(t, err, ErrNoName, name)
			continue
		}
		require.NoError(t, err, name)
		assert.Equal(t, want, a.String(), name)
	}
}

// Where nobody answers, asking again later may help; an answer that cannot be
// read is none.
func TestLookup4NobodyAnswers(t *testing.T) {
	for name, up := range map[string]*upstream{
		"dead": dead(t), "declines": newUpstream(t, says(dns.RcodeServerFailure)),
	} {
		s, err := New(Config{Resolvers: []netip.AddrPort{up.addr}, Allow: netip.MustParsePrefix("0.0.0.0/0")})
		require.NoError(t, err)
		_, err = s.Lookup4(context.Background(), "tftp.example.com", nil)
		require.Error(t, err, name)
		require.NotErrorIs(t, err, ErrNoName, name)
	}
	garbage := newUpstream(t, func(q []byte) [][]byte {
		q[2] |= 0x80
		q[7] = 9 // answers that are not there
		return [][]byte{q}
	})
	s, err := New(Config{Resolvers: []netip.AddrPort{garbage.addr}, Allow: netip.MustParsePrefix("0.0.0.0/0")})
	require.NoError(t, err)
	_, err = s.Lookup4(context.Background(), "tftp.example.com", nil)
	require.ErrorIs(t, err, ErrNoName)
}
