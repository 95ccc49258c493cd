package dns

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func addrs(s ...string) (out []netip.Addr) {
	for _, a := range s {
		out = append(out, netip.MustParseAddr(a))
	}
	return out
}

var someNames = map[string][]netip.Addr{
	"db.Example":    addrs("192.0.2.5", "2001:db8::5"),
	"db.example.":   addrs("192.0.2.5", "192.0.2.6"),
	"other.example": addrs("192.0.2.6"),
	"four":          addrs("::ffff:192.0.2.4"),
}

func withNames(c *Config) { c.Names = someNames }

// short is what an answer says.
func short(t *testing.T, msg []byte) (string, *dns.Msg) {
	t.Helper()
	m := new(dns.Msg)
	require.NoError(t, m.Unpack(msg))
	s := []string{dns.RcodeToString[m.Rcode]}
	for _, rr := range m.Answer {
		assert.EqualValues(t, staticTTL, rr.Header().Ttl)
		assert.Equal(t, m.Question[0].Name, rr.Header().Name)
		s = append(s, strings.TrimPrefix(rr.String(), rr.Header().String()))
	}
	return strings.Join(s, " "), m
}

func TestStaticNames(t *testing.T) {
	class := func(c uint16) func(*dns.Msg) { return func(m *dns.Msg) { m.Question[0].Qclass = c } }
	reverse := func(a string) string { r, _ := dns.ReverseAddr(a); return r }
	for name, c := range map[string]struct {
		query []byte
		want  string
	}{
		"A":                 {query("db.example", dns.TypeA, nil), "NOERROR 192.0.2.5 192.0.2.6"},
		"AAAA":              {query("db.example", dns.TypeAAAA, nil), "NOERROR 2001:db8::5"},
		"ANY":               {query("db.example", dns.TypeANY, nil), "NOERROR 192.0.2.5 192.0.2.6 2001:db8::5"},
		"class ANY":         {query("db.example", dns.TypeA, class(dns.ClassANY)), "NOERROR 192.0.2.5 192.0.2.6"},
		"letters":           {query("dB.eXAMPLE", dns.TypeA, nil), "NOERROR 192.0.2.5 192.0.2.6"},
		"IPv4 within IPv6":  {query("four", dns.TypeA, nil), "NOERROR 192.0.2.4"},
		"PTR":               {query(reverse("192.0.2.5"), dns.TypePTR, nil), "NOERROR db.example."},
		"PTR of two":        {query(reverse("192.0.2.6"), dns.TypePTR, nil), "NOERROR db.example. other.example."},
		"PTR, IPv6":         {query(strings.ToUpper(reverse("2001:db8::5")), dns.TypePTR, nil), "NOERROR db.example."},
		"no AAAA":           {query("other.example", dns.TypeAAAA, nil), "NOERROR"},
		"no A":              {query(reverse("192.0.2.5"), dns.TypeA, nil), "NOERROR"},
		"MX":                {query("db.example", dns.TypeMX, nil), "NOERROR"},
		"type 999":          {query("db.example", 999, nil), "NOERROR"},
		"AXFR":              {query("db.example", dns.TypeAXFR, nil), "NOERROR"},
		"class CH":          {query("db.example", dns.TypeA, class(dns.ClassCHAOS)), "NOERROR"},
		"RFC 6891 BADVERS":  {query("db.example", dns.TypeA, func(m *dns.Msg) { m.SetEdns0(1232, false); m.IsEdns0().SetVersion(1) }), dns.RcodeToString[dns.RcodeBadVers]},
		"RFC 6891 two OPTs": {query("db.example", dns.TypeA, func(m *dns.Msg) { m.SetEdns0(1232, false); m.Extra = append(m.Extra, m.Extra[0]) }), "FORMERR"},
		"cut in the OPT":    {query("db.example", dns.TypeA, func(m *dns.Msg) { m.SetEdns0(1232, false) })[:33], "FORMERR"},
	} {
		for _, network := range []string{"udp4", "tcp4"} {
			t.Run(name+"/"+network, func(t *testing.T) {
				u := newUpstream(t, answers(1, nil))
				r := newRelay(t, withNames, u)
				got, m := short(t, r.ask(network, c.query))
				assert.Equal(t, c.want, got)
				assert.True(t, m.Response && m.RecursionDesired)
				assert.False(t, m.Truncated)
				assert.Equal(t, c.query[:2], []byte{byte(m.Id >> 8), byte(m.Id)})
				assert.Empty(t, u.seen, "nobody else is asked")
			})
		}
	}
}

// What is not a plain query about a static name passes as it is.
func TestStaticNamesAloneAreOurs(t *testing.T) {
	for name, q := range map[string][]byte{
		"another name":   query("a.example", dns.TypeA, nil),
		"below":          query("x.db.example", dns.TypeA, nil),
		"above":          query("example", dns.TypeA, nil),
		"another's PTR":  query("7.2.0.192.in-addr.arpa", dns.TypePTR, nil),
		"an update":      query("db.example", dns.TypeSOA, func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }),
		"4.5 TSIG":       query("db.example", dns.TypeA, func(m *dns.Msg) { m.SetTsig("key.", dns.HmacSHA256, 300, 1) }),
		"no question":    query("db.example", dns.TypeA, func(m *dns.Msg) { m.Question = nil }),
		"bytes behind":   append(query("a.example", dns.TypeA, nil), "behind"...),
		"dots in labels": query(`db\.example`, dns.TypeA, nil),
	} {
		for _, network := range []string{"udp4", "tcp4"} {
			t.Run(name+"/"+network, func(t *testing.T) {
				reply := func(q []byte) [][]byte { q = bytes.Clone(q); q[2] |= 0x80; return [][]byte{q} }
				u := newUpstream(t, reply)
				r := newRelay(t, withNames, u)
				assert.Equal(t, reply(q)[0], r.ask(network, q))
				assert.Equal(t, q, u.sees(t).data)
				assert.Zero(t, r.Stats().Static)
			})
		}
	}
}

// The answer has an OPT if the query has, with its DO bit (RFC 3225 section 3),
// and is as long as the guest takes.
func TestStaticNamesEDNS(t *testing.T) {
	many := func(c *Config) {
		c.Names = map[string][]netip.Addr{}
		for i := range 200 {
			c.Names["many.example"] = append(c.Names["many.example"], netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}))
		}
	}
	r := newRelay(t, many)
	for _, c := range []struct {
		size    uint16 // 0 is no EDNS
		do      bool
		network string
		most    int
	}{
		{0, false, "udp4", 512}, {100, true, "udp4", 512}, {1000, false, "udp4", 1000}, {4096, true, "udp4", staticSize}, {0, false, "tcp4", maxMessage}, {512, true, "tcp4", maxMessage},
	} {
		q := query("many.example", dns.TypeA, func(m *dns.Msg) {
			m.CheckingDisabled = true
			if c.size > 0 {
				m.SetEdns0(c.size, c.do)
			}
		})
		b := r.ask(c.network, q)
		_, m := short(t, b)
		assert.LessOrEqual(t, len(b), c.most, "%+v", c)
		assert.Greater(t, len(b), min(c.most, 3200)-32, "%+v", c)
		assert.Equal(t, c.network == "udp4", m.Truncated, "%+v", c)
		assert.True(t, m.CheckingDisabled && m.Authoritative && m.RecursionAvailable && !m.AuthenticatedData)
		assert.Equal(t, c.size > 0, m.IsEdns0() != nil)
		if o := m.IsEdns0(); o != nil {
			assert.Equal(t, c.do, o.Do())
		}
	}
	assert.EqualValues(t, 6, r.Stats().Static)
}

// On one connection queries of both kinds are answered, and the end of the
// questions is not the end of the answers.
func TestStaticNamesWithinAConnection(t *testing.T) {
	u := newUpstream(t, answers(280, nil))
	r := newRelay(t, withNames, dead(t), u)
	static, other := query("db.example", dns.TypeA, nil), query("a.example", dns.TypeA, nil)
	c := r.client("tcp4")
	var all []byte
	for _, q := range [][]byte{static, other, static, other, static} {
		all = append(all, prefixed(q)...)
	}
	for _, part := range [][]byte{all[:1], all[1:40], all[40:]} {
		_, err := c.Write(part)
		require.NoError(t, err)
	}
	require.NoError(t, c.(*net.TCPConn).CloseWrite())
	var ours, theirs int
	for range 5 {
		got, err := readTCP(c)
		require.NoError(t, err)
		if bytes.Equal(got, answer(other, 280, nil)) {
			theirs++
		} else if s, _ := short(t, got); s == "NOERROR 192.0.2.5 192.0.2.6" {
			ours++
		}
	}
	assert.Equal(t, [2]int{3, 2}, [2]int{ours, theirs})
	_, err := c.Read(make([]byte, 1))
	require.Error(t, err)
	r.eventually(func(s Stats) bool { return s.InFlight == 0 && s.Static == 3 && s.ConnFailures == 0 })

	// Nobody to ask is no reason not to answer.
	r = newRelay(t, withNames)
	got, _ := short(t, r.ask("tcp4", static))
	assert.Equal(t, "NOERROR 192.0.2.5 192.0.2.6", got)
	c = r.client("tcp4")
	_, err = c.Write(prefixed(other))
	require.NoError(t, err)
	_, err = readTCP(c)
	require.Error(t, err)
	r.eventually(func(s Stats) bool { return s.ConnFailures == 1 && s.InFlight == 1 }) // the first one
}

// A query on which the library fails is dropped and counted.
func TestStaticNameFault(t *testing.T) {
	s, err := New(Config{Allow: netip.MustParsePrefix("127.0.0.1/32"), Names: someNames})
	require.NoError(t, err)
	s.statics["\x04four\x00"].v4 = []netip.Addr{{}}
	q := query("four", dns.TypeA, nil)
	name, end, _ := question(q)
	a, _, done := s.here(nil, nil, q, name, end, false)
	assert.True(t, done)
	assert.Empty(t, a)
	a, _, done = s.hereTCP(nil, nil, q)
	assert.True(t, done)
	assert.Empty(t, a)
	assert.EqualValues(t, 2, s.Stats().Faults)
	assert.Zero(t, s.Stats().Static)
}

func TestParseName(t *testing.T) {
	name, as, err := ParseName("db.example.=192.0.2.5,2001:db8::5")
	require.NoError(t, err)
	assert.Equal(t, "db.example. [192.0.2.5 2001:db8::5]", fmt.Sprint(name, " ", as))
	for text, want := range map[string]string{
		"db.example":                             "want NAME=ADDR",
		"db.example=":                            `"" is no IP address`,
		"db.example=192.0.2.5,":                  `"" is no IP address`,
		"db.example=far":                         `"far" is no IP address`,
		"db.example=fe80::1%eth0":                "fe80::1%eth0",
		"=192.0.2.5":                             "no host name",
		".=192.0.2.5":                            "no host name",
		"a..b=192.0.2.5":                         "no host name",
		"a b=192.0.2.5":                          `it has a ' '`,
		`a\.b=192.0.2.5`:                         "no host name",
		"*.example=192.0.2.5":                    `it has a '*'`,
		strings.Repeat("x", 64) + "=192.0.2.5":   "1 to 63 letters",
		strings.Repeat("x.", 128) + "=192.0.2.5": "longer than 253",
	} {
		_, _, err := ParseName(text)
		assert.ErrorContains(t, err, want, text)
	}
	for _, c := range []Config{{Names: map[string][]netip.Addr{"a": nil}}, {Names: map[string][]netip.Addr{"a": {{}}}}, {Cache: -1}, {Cache: MaxCache + 1}} {
		c.Allow = netip.MustParsePrefix("127.0.0.1/32")
		_, err := New(c)
		assert.Error(t, err, "%+v", c)
	}
}

// FuzzQuery attacks what answers queries here.
func FuzzQuery(f *testing.F) {
	q := query("db.example", dns.TypeA, nil)
	f.Add(q)
	f.Add(query("DB.example", dns.TypeANY, func(m *dns.Msg) { m.SetEdns0(4096, true) }))
	f.Add(query("db.example", dns.TypeA, func(m *dns.Msg) { m.SetTsig("key.", dns.HmacSHA256, 300, 1) }))
	f.Add(query("5.2.0.192.in-addr.arpa", dns.TypePTR, nil))
	f.Add(append(bytes.Clone(q[:10]), append([]byte{0xff, 0xff}, q[12:]...)...)) // records that are not there
	f.Add(append(bytes.Clone(q), q...))
	s, err := New(Config{Allow: netip.MustParsePrefix("127.0.0.1/32"), Names: someNames, Cache: 4})
	require.NoError(f, err)
	f.Fuzz(func(t *testing.T, q []byte) {
		if !isQuery(q) {
			return
		}
		name, end, ok := question(q)
		if !ok {
			return
		}
		for _, tcp := range []bool{false, true} {
			asked := bytes.Clone(q)
			a, _, done := s.here(nil, nil, asked, name, end, tcp)
			require.Equal(t, q, asked, "it is passed on")
			require.Equal(t, done, len(a) > 0, "an answer or none")
			if done {
				require.True(t, fits(q, a, name, end), "%x", a)
				require.True(t, tcp || len(a) <= staticSize)
				require.NoError(t, new(dns.Msg).Unpack(a))
			}
		}
		require.Zero(t, s.Stats().Faults)
	})
}
