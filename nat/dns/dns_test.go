package dns

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const soon = 5 * time.Second

// upstream is a resolver of the tests: it sees every message and says what
// goes back.
type upstream struct {
	addr netip.AddrPort
	udp  *net.UDPConn
	tcp  *net.TCPListener
	seen chan datagram
}

type datagram struct {
	data []byte
	from netip.AddrPort
}

// newUpstream listens on UDP and TCP. Datagrams go to reply, if there is one,
// whose results are sent back one after the other; TCP messages too.
func newUpstream(t *testing.T, reply func(query []byte) [][]byte) *upstream {
	t.Helper()
	u := &upstream{seen: make(chan datagram, 1000)}
	// A port that is free for both.
	for u.tcp == nil {
		var err error
		u.udp, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		require.NoError(t, err)
		u.addr = netip.MustParseAddrPort(u.udp.LocalAddr().String())
		u.tcp, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(u.addr))
		if err != nil {
			u.udp.Close()
		}
	}
	t.Cleanup(func() { u.udp.Close(); u.tcp.Close() })
	go func() {
		b := make([]byte, maxMessage)
		for {
			n, from, err := u.udp.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			u.seen <- datagram{bytes.Clone(b[:n]), from}
			if reply != nil {
				for _, a := range reply(bytes.Clone(b[:n])) {
					_, _ = u.udp.WriteToUDPAddrPort(a, from)
				}
			}
		}
	}()
	go func() {
		for {
			c, err := u.tcp.AcceptTCP()
			if err != nil {
				return
			}
			go u.stream(c, reply)
		}
	}()
	return u
}

// dead is a resolver that is not there.
func dead(t *testing.T) *upstream {
	t.Helper()
	u := newUpstream(t, nil)
	u.udp.Close()
	u.tcp.Close()
	return u
}

// hangingUp is a resolver that is silent over UDP and ends connections at once.
func hangingUp(t *testing.T) *upstream {
	t.Helper()
	u := newUpstream(t, nil)
	u.tcp.Close()
	l, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(u.addr))
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	return u
}

func (u *upstream) stream(c *net.TCPConn, reply func([]byte) [][]byte) {
	defer c.Close()
	for {
		q, err := readTCP(c)
		if err != nil {
			return
		}
		u.seen <- datagram{data: q}
		if reply != nil {
			for _, a := range reply(bytes.Clone(q)) {
				_, _ = c.Write(prefixed(a))
			}
		}
	}
}

// sees waits for the next message that a resolver got.
func (u *upstream) sees(t *testing.T) datagram {
	t.Helper()
	select {
	case d := <-u.seen:
		return d
	case <-time.After(soon):
		t.Fatal("the resolver got nothing")
	}
	return datagram{}
}

func prefixed(msg []byte) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(msg))), msg...)
}

func readTCP(c io.Reader) ([]byte, error) {
	var l [2]byte
	if _, err := io.ReadFull(c, l[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint16(l[:]))
	_, err := io.ReadFull(c, b)
	return b, err
}

// relay is a serving Server and where it is.
type relay struct {
	*Server
	t    *testing.T
	addr netip.AddrPort
	stop func() // and wait
}

func newRelay(t *testing.T, change func(*Config), ups ...*upstream) *relay {
	t.Helper()
	c := Config{Allow: netip.MustParsePrefix("127.0.0.1/32"), Timeout: soon}
	for _, u := range ups {
		c.Resolvers = append(c.Resolvers, u.addr)
	}
	if change != nil {
		change(&c)
	}
	s, err := New(c)
	require.NoError(t, err)
	l := newUpstream(t, nil) // a pair of free ports
	l.udp.Close()
	l.tcp.Close()
	udp, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(l.addr))
	require.NoError(t, err)
	tcp, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(l.addr))
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		s.Serve(ctx, udp, tcp)
		close(done)
	}()
	r := &relay{Server: s, t: t, addr: l.addr}
	r.stop = func() {
		t.Helper()
		cancel()
		select {
		case <-done:
		case <-time.After(soon):
			t.Error("Serve does not end")
		}
	}
	t.Cleanup(r.stop)
	return r
}

// client is a guest's socket.
func (r *relay) client(network string) net.Conn {
	r.t.Helper()
	c, err := net.Dial(network, r.addr.String())
	require.NoError(r.t, err)
	r.t.Cleanup(func() { c.Close() })
	require.NoError(r.t, c.SetDeadline(time.Now().Add(soon)))
	return c
}

// exchange sends a query over UDP and returns the answer.
func (r *relay) exchange(query []byte) []byte {
	r.t.Helper()
	c := r.client("udp4")
	_, err := c.Write(query)
	require.NoError(r.t, err)
	b := make([]byte, maxMessage)
	n, err := c.Read(b)
	require.NoError(r.t, err)
	return b[:n]
}

// eventually waits until the counters satisfy cond.
func (r *relay) eventually(cond func(Stats) bool) {
	r.t.Helper()
	require.Eventually(r.t, func() bool { return cond(r.Stats()) }, soon, time.Millisecond, "%+v", r.Stats())
}

// query is a packed question, changed by edit.
func query(name string, typ uint16, edit func(*dns.Msg)) []byte {
	m := new(dns.Msg)
	m.SetQuestion(dns.Fqdn(name), typ)
	if edit != nil {
		edit(m)
	}
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

// answer is a packed answer to a query with n TXT records of 200 bytes,
// changed by edit.
func answer(q []byte, n int, edit func(*dns.Msg)) []byte {
	var m dns.Msg
	if err := m.Unpack(q); err != nil {
		panic(err)
	}
	m.Response = true
	for range n {
		m.Answer = append(m.Answer, &dns.TXT{
			Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeTXT, Class: dns.ClassINET, Ttl: 5},
			Txt: []string{string(bytes.Repeat([]byte("x"), 200))},
		})
	}
	if edit != nil {
		edit(&m)
	}
	b, err := m.Pack()
	if err != nil {
		panic(err)
	}
	return b
}

// answers makes a reply of one answer.
func answers(n int, edit func(*dns.Msg)) func([]byte) [][]byte {
	return func(q []byte) [][]byte { return [][]byte{answer(q, n, edit)} }
}

// RFC 5625 section 4: whatever is asked and answered passes as it is.
func TestRFC5625Sec4Transparent(t *testing.T) {
	edns := func(m *dns.Msg) {
		m.SetEdns0(4096, true)
		m.IsEdns0().Option = append(m.IsEdns0().Option, &dns.EDNS0_LOCAL{Code: 65001, Data: []byte("anything")})
	}
	for name, c := range map[string]struct {
		query []byte
		reply func([]byte) [][]byte
	}{
		"A":                    {query("a.example", dns.TypeA, nil), answers(1, nil)},
		"4.1 flags":            {query("a.example", dns.TypeA, func(m *dns.Msg) { m.AuthenticatedData, m.CheckingDisabled, m.Zero = true, true, true }), answers(1, func(m *dns.Msg) { m.AuthenticatedData, m.Zero = true, true })},
		"4.3 type 999":         {query("a.example", 999, nil), answers(1, nil)},
		"4.3 class CH":         {query("version.bind", dns.TypeTXT, func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }), answers(1, nil)},
		"4.3 HTTPS":            {query("a.example", dns.TypeHTTPS, nil), answers(0, nil)},
		"4.4 truncated":        {query("a.example", dns.TypeTXT, nil), answers(2, func(m *dns.Msg) { m.Truncated = true })},
		"4.4 over 512":         {query("a.example", dns.TypeTXT, nil), answers(4, nil)},
		"4.4.2 EDNS0":          {query("a.example", dns.TypeA, edns), answers(1, nil)},
		"4.4.3 4096 bytes":     {query("a.example", dns.TypeTXT, edns), answers(19, nil)},
		"almost 64 KiB":        {query("a.example", dns.TypeTXT, edns), answers(290, nil)},
		"4.5 TSIG":             {query("a.example", dns.TypeA, func(m *dns.Msg) { m.SetTsig("key.", dns.HmacSHA256, 300, 1) }), answers(0, nil)},
		"SERVFAIL":             {query("a.example", dns.TypeA, nil), answers(0, func(m *dns.Msg) { m.Rcode = dns.RcodeServerFailure })},
		"NXDOMAIN":             {query("a.example", dns.TypeA, nil), answers(0, func(m *dns.Msg) { m.Rcode = dns.RcodeNameError })},
		"an update":            {query("example", dns.TypeSOA, func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }), answers(0, nil)},
		"the root":             {query(".", dns.TypeNS, nil), answers(1, nil)},
		"bytes behind the end": {append(query("a.example", dns.TypeA, nil), "behind"...), func(q []byte) [][]byte { return [][]byte{append(answer(q[:len(q)-6], 1, nil), "behind"...)} }},
		"case of the name is the resolver's": {query("MiXeD.example", dns.TypeA, nil), func(q []byte) [][]byte {
			return [][]byte{bytes.Replace(answer(q, 1, nil), []byte("MiXeD"), []byte("mixed"), 1)}
		}},
		"an error without its question": {query("a.example", dns.TypeA, nil), answers(0, func(m *dns.Msg) { m.Question, m.Rcode = nil, dns.RcodeFormatError })},
		"no question at all":            {query("a.example", dns.TypeA, func(m *dns.Msg) { m.Question = nil }), func(q []byte) [][]byte { q[2] |= 0x80; return [][]byte{q} }},
	} {
		t.Run(name, func(t *testing.T) {
			want := c.reply(bytes.Clone(c.query))[0]
			u := newUpstream(t, c.reply)
			r := newRelay(t, nil, u)
			assert.Equal(t, want, r.exchange(c.query))
			assert.Equal(t, c.query, u.sees(t).data)

			tcp := r.client("tcp4")
			_, err := tcp.Write(prefixed(c.query))
			require.NoError(t, err)
			got, err := readTCP(tcp)
			require.NoError(t, err)
			assert.Equal(t, want, got, "TCP")
			assert.Equal(t, c.query, u.sees(t).data, "TCP")
			st := r.Stats()
			assert.EqualValues(t, [3]uint64{1, 1, 1}, [3]uint64{st.Queries, st.Answers, st.Conns})
		})
	}
}

// RFC 5452: only the answer to the question that was asked is passed on.
func TestRFC5452ForgedAnswers(t *testing.T) {
	q := query("a.example", dns.TypeHTTPS, nil) // type 65, which is an A
	good := answer(q, 1, nil)
	forged := func(edit func(b []byte)) []byte {
		b := bytes.Clone(good)
		edit(b)
		return b
	}
	wrong := [][]byte{
		forged(func(b []byte) { b[0] ^= 1 }),
		forged(func(b []byte) { b[1] ^= 1 }),
		forged(func(b []byte) { b[2] &^= 0x80 }),     // a query
		forged(func(b []byte) { b[2] ^= 0x28 }),      // another opcode
		forged(func(b []byte) { b[13] = 'b' }),       // another name
		forged(func(b []byte) { b[len(q)-3] = 'a' }), // another type
		forged(func(b []byte) { b[len(q)-1] = 3 }),   // another class
		forged(func(b []byte) { b[4], b[5] = 0, 0 }), // no question, no error
		forged(func(b []byte) { b[4], b[5] = 0, 2 }), // two
		good[:len(q)-1], good[:11], {}, []byte("rot"), // cut
	}
	u := newUpstream(t, func([]byte) [][]byte { return append(wrong, good) })
	r := newRelay(t, nil, u)
	assert.Equal(t, good, r.exchange(q))
	assert.EqualValues(t, len(wrong), r.Stats().Mismatches)

	// What comes from another address is not even seen.
	var other *net.UDPConn
	u = newUpstream(t, nil)
	r = newRelay(t, nil, u)
	c := r.client("udp4")
	_, err := c.Write(q)
	require.NoError(t, err)
	from := u.sees(t).from
	other, err = net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	require.NoError(t, err)
	defer other.Close()
	_, err = other.WriteToUDPAddrPort(answer(q, 2, nil), from)
	require.NoError(t, err)
	_, err = u.udp.WriteToUDPAddrPort(good, from)
	require.NoError(t, err)
	b := make([]byte, maxMessage)
	n, err := c.Read(b)
	require.NoError(t, err)
	assert.Equal(t, good, b[:n])
	assert.Zero(t, r.Stats().Mismatches)
}

// RFC 5625 section 6.1: each query has a port of its own.
func TestRFC5625Sec61SourcePorts(t *testing.T) {
	u := newUpstream(t, answers(1, nil))
	r := newRelay(t, nil, u)
	ports := map[uint16]bool{}
	for range 20 {
		r.exchange(query("a.example", dns.TypeA, nil))
		ports[u.sees(t).from.Port()] = true
	}
	assert.Greater(t, len(ports), 15)
}

func TestNextResolver(t *testing.T) {
	silent, good := newUpstream(t, nil), newUpstream(t, answers(1, nil))
	r := newRelay(t, func(c *Config) { c.Timeout = 300 * time.Millisecond }, dead(t), silent, good)
	q := query("a.example", dns.TypeA, nil)
	assert.Equal(t, answer(q, 1, nil), r.exchange(q))
	assert.Equal(t, q, silent.sees(t).data)
	assert.EqualValues(t, 2, r.Stats().Retries)
	// The one that has answered is asked first now.
	r.exchange(q)
	assert.EqualValues(t, 2, r.Stats().Retries)
	// If it goes away, the others are tried.
	good.udp.Close()
	assert.Equal(t, dns.RcodeServerFailure, rcode(t, r.exchange(q)))
	assert.Equal(t, q, silent.sees(t).data)
	// New resolvers are asked from the first one on.
	better := newUpstream(t, answers(2, nil))
	r.SetResolvers([]netip.AddrPort{better.addr})
	assert.Equal(t, []netip.AddrPort{better.addr}, r.Resolvers())
	assert.Equal(t, answer(q, 2, nil), r.exchange(q))
}

// says makes a reply of one answer without records.
func says(rcode int) func([]byte) [][]byte {
	return answers(0, func(m *dns.Msg) { m.Rcode = rcode })
}

// ask sends a query over UDP or TCP and returns the answer.
func (r *relay) ask(network string, q []byte) []byte {
	r.t.Helper()
	if network == "udp4" {
		return r.exchange(q)
	}
	c := r.client(network)
	_, err := c.Write(prefixed(q))
	require.NoError(r.t, err)
	a, err := readTCP(c)
	require.NoError(r.t, err)
	return a
}

// A resolver that cannot help is followed by the next, and its answer holds
// only if none does better.
func TestNextResolverMayKnowBetter(t *testing.T) {
	type peer = func(*testing.T) *upstream
	replying := func(reply func([]byte) [][]byte) peer {
		return func(t *testing.T) *upstream { return newUpstream(t, reply) }
	}
	good, nxdomain, formerr := answers(1, nil), says(dns.RcodeNameError), says(dns.RcodeFormatError)
	servfail, notimp, refused := says(dns.RcodeServerFailure), says(dns.RcodeNotImplemented), says(dns.RcodeRefused)
	for name, c := range map[string]struct {
		ups  []peer
		want func([]byte) [][]byte
		asks int // how many
	}{
		"SERVFAIL":                  {[]peer{replying(servfail), replying(good)}, good, 2},
		"NOTIMP":                    {[]peer{replying(notimp), replying(good)}, good, 2},
		"REFUSED":                   {[]peer{replying(refused), replying(good)}, good, 2},
		"two of them":               {[]peer{replying(refused), replying(servfail), replying(good), replying(good)}, good, 3},
		"better is an answer":       {[]peer{replying(servfail), replying(nxdomain), replying(good)}, nxdomain, 2},
		"NXDOMAIN holds":            {[]peer{replying(nxdomain), replying(good)}, nxdomain, 1},
		"FORMERR holds":             {[]peer{replying(formerr), replying(good)}, formerr, 1},
		"the first of those alike":  {[]peer{replying(refused), replying(servfail), replying(notimp)}, refused, 3},
		"the others are dead":       {[]peer{replying(refused), dead, dead}, refused, 3},
		"the other is silent":       {[]peer{replying(refused), replying(nil)}, refused, 2},
		"the other hangs up":        {[]peer{replying(refused), hangingUp}, refused, 2},
		"behind one that hangs up":  {[]peer{hangingUp, replying(good)}, good, 2},
		"behind one that is silent": {[]peer{replying(nil), replying(servfail), replying(good)}, good, 3},
	} {
		for _, network := range []string{"udp4", "tcp4"} {
			t.Run(name+"/"+network, func(t *testing.T) {
				t.Parallel() // some wait for the time-out
				var ups []*upstream
				for _, up := range c.ups {
					ups = append(ups, up(t))
				}
				r := newRelay(t, func(c *Config) { c.Timeout = time.Second }, ups...)
				q := query("a.example", dns.TypeA, nil)
				assert.Equal(t, c.want(q)[0], r.ask(network, q))
				st := r.Stats()
				assert.EqualValues(t, c.asks-1, st.Retries)
				assert.Zero(t, st.Failures+st.ConnFailures)
				if network == "udp4" {
					assert.EqualValues(t, 1, st.Answers)
				}
			})
		}
	}
}

// One that declines a name is still the first to be asked about others; one
// that is dead is not.
func TestDecliningIsNoFailure(t *testing.T) {
	declining := func(q []byte) [][]byte {
		if bytes.Contains(q, []byte("foreign")) {
			return says(dns.RcodeRefused)(q)
		}
		return answers(1, nil)(q)
	}
	own, foreign := query("own.example", dns.TypeA, nil), query("foreign.example", dns.TypeA, nil)
	for _, network := range []string{"udp4", "tcp4"} {
		r := newRelay(t, nil, newUpstream(t, declining), newUpstream(t, answers(2, nil)))
		for range 2 {
			assert.Equal(t, answer(foreign, 2, nil), r.ask(network, foreign))
			assert.Equal(t, answer(own, 1, nil), r.ask(network, own))
		}
		assert.EqualValues(t, 2, r.Stats().Retries)
		r = newRelay(t, nil, dead(t), newUpstream(t, declining), newUpstream(t, answers(2, nil)))
		assert.Equal(t, answer(foreign, 2, nil), r.ask(network, foreign))
		assert.Equal(t, answer(own, 1, nil), r.ask(network, own))
		assert.EqualValues(t, 2, r.Stats().Retries, "all for the first query")
	}
}

// Whatever a guest has written before the first answer is not lost when
// another resolver is asked, and the connection goes on with who answers.
func TestTCPGoesOnWithTheNextResolver(t *testing.T) {
	qs := [][]byte{query("a.example", dns.TypeA, nil), query("b.example", dns.TypeA, nil), query("c.example", dns.TypeA, nil)}
	long := query("long.example", dns.TypeTXT, func(m *dns.Msg) {
		m.SetEdns0(4096, false)
		m.IsEdns0().Option = append(m.IsEdns0().Option, &dns.EDNS0_LOCAL{Code: 65001, Data: make([]byte, 3*pipeBuffer)})
	})
	for name, c := range map[string]struct {
		second func([]byte) [][]byte
		want   func([]byte) [][]byte
	}{
		"it answers":      {answers(100, nil), answers(100, nil)},
		"it declines too": {says(dns.RcodeServerFailure), says(dns.RcodeRefused)},
	} {
		t.Run(name, func(t *testing.T) {
			refusing := newUpstream(t, says(dns.RcodeRefused))
			r := newRelay(t, nil, refusing, newUpstream(t, c.second), newUpstream(t, says(dns.RcodeNotImplemented)))
			conn := r.client("tcp4")
			all := append(append(prefixed(long), prefixed(qs[0])...), prefixed(qs[1])...)
			for _, part := range [][]byte{all[:1], all[1:5000], all[5000:]} {
				_, err := conn.Write(part)
				require.NoError(t, err)
			}
			for i, q := range append([][]byte{long}, qs...) {
				if i == 3 { // another, when the first are answered
					_, err := conn.Write(prefixed(q))
					require.NoError(t, err)
				}
				got, err := readTCP(conn)
				require.NoError(t, err)
				require.True(t, bytes.Equal(c.want(q)[0], got), "query %d", i)
			}
			require.NoError(t, conn.(*net.TCPConn).CloseWrite())
			_, err := conn.Read([]byte{0})
			require.ErrorIs(t, err, io.EOF)
			r.eventually(func(s Stats) bool { return s.InFlight == 0 && s.ConnFailures == 0 })
		})
	}
}

func rcode(t *testing.T, msg []byte) int {
	t.Helper()
	var m dns.Msg
	require.NoError(t, m.Unpack(msg))
	return m.Rcode
}

// RFC 5625 section 6.3: SERVFAIL rather than silence.
func TestRFC5625Sec63NobodyAnswers(t *testing.T) {
	r := newRelay(t, nil)
	q := query("a.example", dns.TypeAAAA, func(m *dns.Msg) { m.SetEdns0(1232, true) })
	var m, want dns.Msg
	require.NoError(t, want.Unpack(q))
	require.NoError(t, m.Unpack(r.exchange(q)))
	assert.Equal(t, dns.RcodeServerFailure, m.Rcode)
	assert.True(t, m.Response && m.RecursionDesired && !m.Truncated)
	assert.Equal(t, [2]any{want.Id, want.Question}, [2]any{m.Id, m.Question})
	assert.EqualValues(t, 1, r.Stats().Failures)

	c := r.client("tcp4")
	_, err := c.Write(prefixed(q))
	require.NoError(t, err)
	_, err = readTCP(c)
	require.Error(t, err)
	require.NotErrorIs(t, err, context.DeadlineExceeded)
	r.eventually(func(s Stats) bool { return s.ConnFailures == 1 && s.InFlight == 0 })
}

func TestRFC5625Sec63Malformed(t *testing.T) {
	u := newUpstream(t, answers(1, nil))
	r := newRelay(t, nil, u)
	q := query("a.example", dns.TypeA, nil)
	for _, bad := range [][]byte{q[:len(q)-1], q[:14], append(bytes.Clone(q[:12]), bytes.Repeat([]byte{63}, 600)...), {1, 2, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0}} {
		got := r.exchange(bad)
		assert.Equal(t, dns.RcodeFormatError, rcode(t, got))
		assert.Equal(t, bad[:2], got[:2])
	}
	// What is no query, or too short to answer, is dropped.
	c := r.client("udp4")
	for _, bad := range [][]byte{answer(q, 1, nil), q[:11], {}} {
		_, err := c.Write(bad)
		require.NoError(t, err)
	}
	_, err := c.Write(q)
	require.NoError(t, err)
	b := make([]byte, maxMessage)
	n, err := c.Read(b)
	require.NoError(t, err)
	assert.Equal(t, answer(q, 1, nil), b[:n], "the first thing that comes back")
	assert.EqualValues(t, 7, r.Stats().Malformed)
	assert.Len(t, u.seen, 1)
}

// RFC 5625 section 6.2: only the guest's network is answered.
func TestRFC5625Sec62OthersAreRefused(t *testing.T) {
	u := newUpstream(t, answers(1, nil))
	r := newRelay(t, func(c *Config) { c.Allow = netip.MustParsePrefix("127.0.0.4/30") }, u)
	q := query("a.example", dns.TypeA, nil)
	udp, tcp := r.client("udp4"), r.client("tcp4")
	_, err := udp.Write(q)
	require.NoError(t, err)
	_, err = tcp.Read(make([]byte, 1))
	require.Error(t, err)
	r.eventually(func(s Stats) bool { return s.Refused == 2 })
	d := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.IPv4(127, 0, 0, 5)}}
	c, err := d.Dial("udp4", r.addr.String())
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, c.SetDeadline(time.Now().Add(soon)))
	_, err = c.Write(q)
	require.NoError(t, err)
	_, err = c.Read(make([]byte, maxMessage))
	require.NoError(t, err)
	assert.EqualValues(t, 1, r.Stats().Queries)
}

func TestBounds(t *testing.T) {
	silent := newUpstream(t, nil)
	r := newRelay(t, func(c *Config) { c.MaxQueries, c.MaxConns, c.Timeout = 3, 2, time.Hour }, silent)
	c := r.client("udp4")
	for i := range 10 {
		_, err := c.Write(query("a.example", uint16(i+1), nil))
		require.NoError(t, err)
	}
	r.eventually(func(s Stats) bool { return s.Queries == 10 && s.Overflows == 7 })
	assert.Equal(t, 3, r.Stats().InFlight)
	// An answer makes room.
	d := silent.sees(t)
	_, err := silent.udp.WriteToUDPAddrPort(answer(d.data, 1, nil), d.from)
	require.NoError(t, err)
	r.eventually(func(s Stats) bool { return s.Answers == 1 && s.InFlight == 2 })

	held := []net.Conn{r.client("tcp4"), r.client("tcp4")}
	r.eventually(func(s Stats) bool { return s.Conns == 2 })
	if c, err := net.Dial("tcp4", r.addr.String()); err == nil { // else it was reset already
		defer c.Close()
		require.NoError(t, c.SetDeadline(time.Now().Add(soon)))
		_, err = c.Read(make([]byte, 1))
		require.Error(t, err, "one too many")
	}
	r.eventually(func(s Stats) bool { return s.ConnOverflow == 1 })
	for _, c := range held {
		c.Close()
	}
	r.eventually(func(s Stats) bool { return s.InFlight == 2 })
	r.client("tcp4")
	r.eventually(func(s Stats) bool { return s.Conns == 3 })
	r.stop() // whatever is in flight
	assert.Zero(t, r.Stats().InFlight)
}

func TestTCP(t *testing.T) {
	var calls atomic.Int32
	idle := time.Hour
	counted := func(c *Config) {
		c.Idle = idle
		c.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
			calls.Add(1)
			return new(net.Dialer).DialContext(ctx, network, addr)
		}
	}
	dead := newUpstream(t, nil)
	dead.tcp.Close()
	u := newUpstream(t, answers(280, nil))
	r := newRelay(t, counted, dead, u)

	// Several queries on one connection, written together, one in pieces.
	c := r.client("tcp4")
	qs := [][]byte{query("a.example", dns.TypeA, nil), query("b.example", dns.TypeA, nil), query("c.example", dns.TypeA, nil)}
	all := append(append(prefixed(qs[0]), prefixed(qs[1])...), prefixed(qs[2])...)
	for _, part := range [][]byte{all[:1], all[1:40], all[40:]} {
		_, err := c.Write(part)
		require.NoError(t, err)
	}
	// The end of the questions is not the end of the answers.
	require.NoError(t, c.(*net.TCPConn).CloseWrite())
	for _, q := range qs {
		got, err := readTCP(c)
		require.NoError(t, err)
		require.Equal(t, answer(q, 280, nil), got)
	}
	_, err := c.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	assert.EqualValues(t, 2, calls.Load(), "the dead resolver and the next")
	r.eventually(func(s Stats) bool { return s.InFlight == 0 })

	// Who says nothing is put off, and nobody is called for him.
	idle = 300 * time.Millisecond
	r = newRelay(t, counted)
	calls.Store(0)
	_, err = r.client("tcp4").Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	assert.Zero(t, calls.Load())
	// Who goes on talking is not.
	r.SetResolvers([]netip.AddrPort{u.addr})
	c = r.client("tcp4")
	for end := time.Now().Add(3 * idle); time.Now().Before(end); {
		asked := time.Now()
		_, err = c.Write(prefixed(qs[0]))
		require.NoError(t, err)
		if _, err = readTCP(c); err != nil && time.Since(asked) >= idle {
			// The machine stood still for so long, so the relay is right.
			c, end = r.client("tcp4"), time.Now().Add(3*idle)
			continue
		}
		require.NoError(t, err)
		<-u.seen
	}
	// A resolver is put off too, also one that does not even end when the guest has.
	u = newUpstream(t, nil)
	u.tcp.Close()
	l, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(u.addr))
	require.NoError(t, err)
	defer l.Close() // and nobody accepts
	r.SetResolvers([]netip.AddrPort{u.addr})
	c = r.client("tcp4")
	_, err = c.Write(prefixed(qs[0]))
	require.NoError(t, err)
	_, err = c.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
	r.eventually(func(s Stats) bool { return s.InFlight == 0 })
}

func TestServeEnds(t *testing.T) {
	r := newRelay(t, func(c *Config) { c.Timeout, c.Idle = time.Hour, time.Hour }, newUpstream(t, nil))
	for _, network := range []string{"udp4", "tcp4"} {
		q := query("a.example", dns.TypeA, nil)
		if network == "tcp4" {
			r.client(network) // says nothing
			q = prefixed(q)
		}
		_, err := r.client(network).Write(q)
		require.NoError(t, err)
	}
	r.eventually(func(s Stats) bool { return s.InFlight == 3 })
	r.stop()
	assert.Zero(t, r.Stats().InFlight)
	_, err := net.Dial("tcp4", r.addr.String())
	require.Error(t, err)
}

func TestNewRefuses(t *testing.T) {
	_, err := New(Config{})
	require.Error(t, err)
}

// FuzzMessage attacks what reads messages of a guest and of a resolver.
func FuzzMessage(f *testing.F) {
	q := query("a.example", dns.TypeA, nil)
	f.Add(q, answer(q, 1, nil))
	f.Add(q[:13], q[:12])
	f.Add([]byte{0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0}, []byte{0, 1, 0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0})
	f.Add(append(bytes.Clone(q[:12]), bytes.Repeat([]byte{63}, 300)...), q)
	f.Fuzz(func(t *testing.T, q, a []byte) {
		if !isQuery(q) {
			return
		}
		name, end, ok := question(q)
		if !ok {
			failure(q, headerLen, rcodeFormErr)
			return
		}
		require.LessOrEqual(t, name, end)
		require.LessOrEqual(t, end, len(q))
		require.Equal(t, fits(q, a, name, end), fits(bytes.Clone(q), a, name, end))
		own := failure(bytes.Clone(q), end, rcodeServFail)
		require.True(t, fits(q, own, name, end), "what is made here passes our own check")
	})
}
