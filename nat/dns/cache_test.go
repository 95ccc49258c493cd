package dns

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// handClock is a clock set by hand.
type handClock struct{ at atomic.Int64 }

func (c *handClock) now() time.Time          { return time.Unix(1000, c.at.Load()) }
func (c *handClock) advance(d time.Duration) { c.at.Add(int64(d)) }

func caching(n int) (*handClock, func(*Config)) {
	clock := new(handClock)
	return clock, func(c *Config) { c.Cache, c.Now = n, clock.now }
}

func rr(s string) dns.RR {
	r, err := dns.NewRR(s)
	if err != nil {
		panic(err)
	}
	return r
}

// with makes an answer of an rcode, records of the answer and of the authority.
func with(rcode int, answer, authority []dns.RR) func([]byte) [][]byte {
	return answers(0, func(m *dns.Msg) { m.Rcode, m.Answer, m.Ns = rcode, answer, authority })
}

// asks says how often the resolver has been asked.
func (u *upstream) asks() int { return len(u.seen) }

func TestCacheLifetime(t *testing.T) {
	a, soa := []dns.RR{rr("a.example. 60 IN A 192.0.2.1")}, []dns.RR{rr("example. 300 IN SOA ns.example. me.example. 1 2 3 4 40")}
	cname := rr("a.example. 30 IN CNAME b.example.")
	edns := func(edit func(*dns.Msg)) func([]byte) [][]byte {
		return answers(0, func(m *dns.Msg) { m.Answer = a; edit(m) })
	}
	for name, c := range map[string]struct {
		reply func([]byte) [][]byte
		life  time.Duration
	}{
		"an answer":                  {with(dns.RcodeSuccess, a, nil), 60 * time.Second},
		"the least TTL":              {with(dns.RcodeSuccess, []dns.RR{cname, rr("b.example. 60 IN A 192.0.2.1")}, nil), 30 * time.Second},
		"authority counts":           {with(dns.RcodeSuccess, a, []dns.RR{rr("example. 20 IN NS ns.example.")}), 20 * time.Second},
		"RFC 2308 NXDOMAIN":          {with(dns.RcodeNameError, nil, soa), 40 * time.Second},
		"RFC 2308 no data":           {with(dns.RcodeSuccess, nil, soa), 40 * time.Second},
		"RFC 2308 CNAME, no data":    {with(dns.RcodeSuccess, []dns.RR{cname}, soa), 30 * time.Second},
		"RFC 2308 TTL of the SOA":    {with(dns.RcodeNameError, nil, []dns.RR{rr("example. 10 IN SOA ns.example. me.example. 1 2 3 4 40")}), 10 * time.Second},
		"RFC 2308 3 hours":           {with(dns.RcodeNameError, nil, []dns.RR{rr("example. 99999 IN SOA ns.example. me.example. 1 2 3 4 99999")}), 3 * time.Hour},
		"RFC 2308 NXDOMAIN, no SOA":  {with(dns.RcodeNameError, nil, nil), 0},
		"RFC 2308 no data, no SOA":   {with(dns.RcodeSuccess, nil, []dns.RR{rr("example. 20 IN NS ns.example.")}), 0},
		"a day":                      {with(dns.RcodeSuccess, []dns.RR{rr("a.example. 9999999 IN A 192.0.2.1")}, nil), 24 * time.Hour},
		"TTL of 0":                   {with(dns.RcodeSuccess, []dns.RR{rr("a.example. 0 IN A 192.0.2.1")}, nil), 0},
		"RFC 2181 8 TTL below 0":     {with(dns.RcodeSuccess, []dns.RR{rr("a.example. 4294967295 IN A 192.0.2.1")}, nil), 0},
		"SERVFAIL":                   {with(dns.RcodeServerFailure, a, soa), 0},
		"REFUSED":                    {with(dns.RcodeRefused, nil, soa), 0},
		"FORMERR":                    {with(dns.RcodeFormatError, nil, soa), 0},
		"truncated":                  {edns(func(m *dns.Msg) { m.Truncated = true }), 0},
		"signed":                     {edns(func(m *dns.Msg) { m.SetTsig("key.", dns.HmacSHA256, 300, 1) }), 0},
		"an OPT":                     {edns(func(m *dns.Msg) { m.SetEdns0(1232, false) }), 60 * time.Second},
		"an OPT with the rcode":      {edns(func(m *dns.Msg) { m.SetEdns0(1232, false); m.Rcode = dns.RcodeBadVers }), 0},
		"bytes behind the end":       {func(q []byte) [][]byte { return [][]byte{append(with(0, a, nil)(q)[0], 0)} }, 0},
		"cut":                        {func(q []byte) [][]byte { b := with(0, a, nil)(q)[0]; return [][]byte{b[:len(b)-1]} }, 0},
		"too long":                   {answers(21, nil), 0},
		"no longer than what fits":   {answers(2, func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeA; m.Answer[0] = a[0] }), 5 * time.Second},
		"letters are the resolver's": {func(q []byte) [][]byte { b := with(0, a, nil)(q)[0]; b[13] = 'A'; return [][]byte{b} }, 60 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			clock, on := caching(10)
			u := newUpstream(t, c.reply)
			r := newRelay(t, on, u)
			q := query("a.example", dns.TypeA, nil)
			first := r.exchange(q)
			if c.life == 0 {
				assert.Equal(t, first, r.exchange(q))
				assert.Equal(t, 2, u.asks())
				assert.Zero(t, r.Stats().CacheEntries)
				return
			}
			q[0] ^= 1 // another id
			first[0] ^= 1
			first[13] = 'a'
			assert.Equal(t, first, r.exchange(q))
			clock.advance(c.life - 1)
			r.exchange(q)
			require.Equal(t, 1, u.asks())
			clock.advance(1)
			r.exchange(q)
			assert.Equal(t, 2, u.asks())
			st := r.Stats()
			assert.Equal(t, [3]uint64{2, 2, 2}, [3]uint64{st.CacheHits, st.CacheMisses, st.Answers})
		})
	}
}

// TTLs are what is left of them, over UDP and TCP, and the letters are the
// guest's.
func TestCacheCountsDown(t *testing.T) {
	clock, on := caching(10)
	u := newUpstream(t, answers(1, func(m *dns.Msg) {
		m.Authoritative = true
		m.SetEdns0(1232, true)
		m.Answer = []dns.RR{rr("a.example. 60 IN A 192.0.2.1"), rr("a.example. 90 IN RRSIG A 8 2 60 20300101000000 20200101000000 1 example. AAAA")}
	}))
	r := newRelay(t, on, u)
	r.exchange(query("a.example", dns.TypeA, func(m *dns.Msg) { m.SetEdns0(1232, true) }))
	clock.advance(20500 * time.Millisecond)
	for _, network := range []string{"udp4", "tcp4"} {
		q := query("A.eXample", dns.TypeA, func(m *dns.Msg) { m.SetEdns0(4000, true) })
		var m dns.Msg
		b := r.ask(network, q)
		require.NoError(t, m.Unpack(b))
		assert.Equal(t, q[:2], b[:2])
		assert.Equal(t, "A.eXample.", m.Question[0].Name)
		assert.Equal(t, [2]uint32{40, 70}, [2]uint32{m.Answer[0].Header().Ttl, m.Answer[1].Header().Ttl})
		assert.True(t, m.IsEdns0().Do())
		assert.False(t, m.Authoritative)
	}
	assert.Equal(t, 1, u.asks())
	assert.EqualValues(t, 2, r.Stats().CacheHits)
}

// An answer is for exactly the same question.
func TestCacheKey(t *testing.T) {
	edit := func(f func(*dns.Msg)) []byte { return query("a.example", dns.TypeA, f) }
	kinds := [][]byte{
		edit(nil),
		query("b.example", dns.TypeA, nil),
		query("a.example", dns.TypeAAAA, nil),
		edit(func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }),
		edit(func(m *dns.Msg) { m.CheckingDisabled = true }),
		edit(func(m *dns.Msg) { m.AuthenticatedData = true }),
		edit(func(m *dns.Msg) { m.RecursionDesired = false }),
		edit(func(m *dns.Msg) { m.SetEdns0(1232, false) }),
		edit(func(m *dns.Msg) { m.SetEdns0(1232, true) }),
	}
	keys := map[string]bool{}
	for _, q := range kinds {
		name, end, ok := question(q)
		require.True(t, ok)
		key, _ := cacheKey(nil, q, name, end)
		require.NotEmpty(t, key)
		keys[string(key)] = true
	}
	assert.Len(t, keys, len(kinds))
	for name, q := range map[string][]byte{
		"an update": edit(func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }),
		"ANY":       query("a.example", dns.TypeANY, nil),
		"AXFR":      query("a.example", dns.TypeAXFR, nil),
		"class ANY": edit(func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassANY }),
		"signed":    edit(func(m *dns.Msg) { m.SetTsig("key.", dns.HmacSHA256, 300, 1) }),
		"a cookie": edit(func(m *dns.Msg) {
			m.SetEdns0(1232, false)
			m.IsEdns0().Option = []dns.EDNS0{&dns.EDNS0_COOKIE{Code: 10, Cookie: "0011223344556677"}}
		}),
		"EDNS version":   edit(func(m *dns.Msg) { m.SetEdns0(1232, false); m.IsEdns0().SetVersion(1) }),
		"a record":       edit(func(m *dns.Msg) { m.Answer = []dns.RR{rr("a.example. 1 IN A 192.0.2.1")} }),
		"bytes behind":   append(edit(nil), 0),
		"no question":    edit(func(m *dns.Msg) { m.Question = nil }),
		"a pointer":      {0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 4, 0, 1, 0, 1},
		"cut in the OPT": edit(func(m *dns.Msg) { m.SetEdns0(1232, false) })[:30],
	} {
		n, end, ok := question(q)
		require.True(t, ok, name)
		key, _ := cacheKey(nil, q, n, end)
		assert.Empty(t, key, name)
	}
	// What is longer than the guest takes is the resolver's to cut.
	_, on := caching(10)
	u := newUpstream(t, answers(4, func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeTXT }))
	r := newRelay(t, on, u)
	for i, size := range []uint16{4096, 512, 700, 1232} {
		r.exchange(query("a.example", dns.TypeTXT, func(m *dns.Msg) { m.SetEdns0(size, false) }))
		assert.Equal(t, []int{1, 2, 3, 3}[i], u.asks(), size)
	}
	for i := range 2 {
		r.exchange(query("b.example", dns.TypeTXT, nil))
		assert.Equal(t, 4+i, u.asks(), "without EDNS 512 bytes are all that is sure")
	}
}

// What is kept is bounded by number and by size; what was asked for last stays.
func TestCacheBounds(t *testing.T) {
	_, on := caching(3)
	u := newUpstream(t, answers(1, func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeTXT }))
	r := newRelay(t, on, u)
	ask := func(name string) { r.exchange(query(name, dns.TypeTXT, nil)) }
	for _, name := range []string{"a", "b", "c", "a", "d", "a"} {
		ask(name)
	}
	assert.Equal(t, 4, u.asks())
	ask("b")
	assert.Equal(t, 5, u.asks())
	assert.Equal(t, 3, r.Stats().CacheEntries)

	clock := new(handClock)
	c := newCache(MaxCache, clock.now)
	for i := range 3000 {
		q := query(fmt.Sprintf("n%d.example", i), dns.TypeTXT, nil)
		name, end, _ := question(q)
		key, _ := cacheKey(nil, q, name, end)
		for range 2 { // again is not twice
			c.put(key, answer(q, 15, nil), name, end, 0)
		}
		n, size := c.length()
		require.LessOrEqual(t, size, maxCacheSize)
		require.Equal(t, n, c.used.Len())
	}
	n, size := c.length()
	assert.Greater(t, size, maxCacheSize-maxKept)
	assert.Less(t, n, 3000)
	for c.used.Len() > 0 {
		c.drop(c.used.Back())
	}
	n, size = c.length()
	assert.Zero(t, n+size, "all is accounted for")
}

// Other resolvers may say something else: nothing of the old ones stays, nor
// comes late.
func TestCacheForgetsOldResolvers(t *testing.T) {
	_, on := caching(3)
	q := query("a.example", dns.TypeTXT, nil)
	old, other := newUpstream(t, answers(1, nil)), newUpstream(t, answers(2, nil))
	r := newRelay(t, on, old)
	for range 2 {
		assert.Equal(t, answer(q, 1, nil), r.exchange(q))
	}
	r.SetResolvers([]netip.AddrPort{other.addr})
	assert.Equal(t, answer(q, 2, nil), r.exchange(q))

	silent := newUpstream(t, nil)
	r.SetResolvers([]netip.AddrPort{silent.addr})
	c := r.client("udp4")
	_, err := c.Write(q)
	require.NoError(t, err)
	d := silent.sees(t)
	r.SetResolvers([]netip.AddrPort{other.addr})
	_, err = silent.udp.WriteToUDPAddrPort(answer(q, 1, nil), d.from)
	require.NoError(t, err)
	b := make([]byte, maxMessage)
	n, err := c.Read(b)
	require.NoError(t, err)
	assert.Equal(t, answer(q, 1, nil), b[:n])
	assert.Equal(t, answer(q, 2, nil), r.exchange(q))
}

// Without the flag nothing is kept, and nothing counted.
func TestNoCache(t *testing.T) {
	u := newUpstream(t, answers(1, nil))
	r := newRelay(t, nil, u)
	for range 2 {
		r.exchange(query("a.example", dns.TypeTXT, nil))
	}
	assert.Equal(t, 2, u.asks())
	st := r.Stats()
	assert.Zero(t, st.CacheHits+st.CacheMisses+st.Static)
}

func TestCacheAllocs(t *testing.T) {
	_, on := caching(3)
	r := newRelay(t, on, newUpstream(t, answers(1, nil)))
	q := query("a.example", dns.TypeTXT, nil)
	r.exchange(q)
	name, end, _ := question(q)
	buf, key := make([]byte, 0, maxKept), make([]byte, 0, 300)
	assert.Zero(t, testing.AllocsPerRun(100, func() {
		if _, _, done := r.here(buf, key, q, name, end, false); !done {
			t.Error("it is not there")
		}
	}))
}

// FuzzAnswer attacks what reads a resolver's answer for the cache.
func FuzzAnswer(f *testing.F) {
	q := query("a.example", dns.TypeA, func(m *dns.Msg) { m.Id = 1 }) // the same in every process
	f.Add(with(dns.RcodeSuccess, []dns.RR{&dns.A{Hdr: dns.RR_Header{Name: "a.example.", Rrtype: 1, Class: 1, Ttl: 9}, A: net.IPv4(1, 2, 3, 4)}}, nil)(q)[0])
	f.Add(with(dns.RcodeNameError, nil, []dns.RR{rr("example. 300 IN SOA ns.example. me.example. 1 2 3 4 40")})(q)[0])
	f.Add(answer(q, 2, nil))
	f.Add(append(bytes.Clone(q[:6]), append([]byte{255, 255, 255, 255, 255, 255}, q[12:]...)...))
	name, end, _ := question(q)
	key, limit := cacheKey(nil, q, name, end)
	f.Fuzz(func(t *testing.T, a []byte) {
		if !fits(q, a, name, end) {
			return
		}
		clock := new(handClock)
		c := newCache(1, clock.now)
		c.put(key, a, name, end, 0)
		n, _ := c.length()
		got, ok := c.get(nil, key, q, name, limit)
		require.Equal(t, n == 1 && len(a) <= limit, ok)
		if ok {
			require.True(t, fits(q, got, name, end))
		}
	})
}
