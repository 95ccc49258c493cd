// Package dns answers guests from the host's resolvers.
//
// A [Server] stands at the gateway's address for resolvers that a guest cannot
// reach itself, such as one on the host's loopback. It is a relay, not a
// resolver (RFC 5625): every message passes as it is, in both directions, so
// that types, flags and extensions which nobody here has heard of work too. A
// query over UDP goes out from a socket of its own, connected and with a port
// that the kernel chooses at random; what comes back is an answer only if it
// has the query's id and question (RFC 5452). TCP stays TCP.
//
// A resolver that is silent is followed by the next, and so is one that answers
// SERVFAIL, NOTIMP or REFUSED, as by the C library's. If no other does better
// the guest hears the first such answer, and if none has answered, SERVFAIL
// rather than nothing. Over TCP this goes by the first message of a connection,
// whose others follow it.
//
// Two things it knows itself, if it is told to. Static names ([Config.Names])
// are answered here, and nobody else is asked about them. A cache
// ([Config.Cache]) gives what a resolver has said over UDP to who asks exactly
// the same again, for as long as that holds.
//
// Guests are not trusted: what they can have in flight is bounded, everything
// has a deadline, and only their own network is answered. Resolvers are
// trusted for what they say, not for how they say it.
//
// Serve's goroutines own the sockets; a goroutine for each query or connection
// owns its buffers. Without traffic nothing wakes up.
package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Config is what a Server is made of.
type Config struct {
	// Resolvers are asked in order. SetResolvers changes them.
	Resolvers []netip.AddrPort
	// Allow is the network whose queries are answered; the zero value is
	// nobody's.
	Allow netip.Prefix
	// Dial opens a connected socket to a resolver; nil is a net.Dialer. It is
	// called by many goroutines at once.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Timeout is how long one resolver has to answer over UDP, to accept a
	// connection, and to answer its first message if another is left to ask:
	// 2 s.
	Timeout time.Duration
	// Idle is how long a TCP connection may be without a byte in either
	// direction: 10 s.
	Idle time.Duration
	// MaxQueries and MaxConns bound the UDP queries and TCP connections in
	// flight: 128, 32.
	MaxQueries, MaxConns int
	// Names are answered here: their A, AAAA, and the PTR of their addresses.
	// Whatever else is asked about them does not exist. Capital and small
	// letters are the same, and a dot at the end makes no difference.
	Names map[string][]netip.Addr
	// Cache is how many answers are kept, at most MaxCache; 0 is none. They
	// take 4 MiB at most.
	Cache int
	// Now is the clock of the cache; nil is time.Now.
	Now func() time.Time
}

// Stats count what happened since New. Rates and sums are the reader's.
type Stats struct {
	Queries      uint64 `json:"queries"`      // over UDP
	Answers      uint64 `json:"answers"`      // a resolver's, over UDP
	Failures     uint64 `json:"failures"`     // SERVFAIL made here: no resolver answered
	Retries      uint64 `json:"retries"`      // a resolver failed, or could not help, and the next one was asked
	Mismatches   uint64 `json:"mismatches"`   // answers that do not fit their query
	Malformed    uint64 `json:"malformed"`    // messages that are no query
	Refused      uint64 `json:"refused"`      // from outside the guest's network
	Overflows    uint64 `json:"overflows"`    // queries beyond MaxQueries
	Conns        uint64 `json:"conns"`        // TCP connections
	ConnFailures uint64 `json:"connFailures"` // no resolver took the first message
	ConnOverflow uint64 `json:"connOverflow"` // connections beyond MaxConns
	InFlight     int    `json:"inFlight"`     // queries and connections now
	Static       uint64 `json:"static"`       // answers about static names, over UDP and TCP
	Faults       uint64 `json:"faults"`       // queries about those that could not be handled at all
	CacheHits    uint64 `json:"cacheHits"`    // answers from the cache, over UDP and TCP
	CacheMisses  uint64 `json:"cacheMisses"`  // queries whose answer might have been there
	CacheEntries int    `json:"cacheEntries"` // answers there now
	CacheBytes   int    `json:"cacheBytes"`   // what they take
}

type counters struct {
	queries, answers, failures, retries, mismatches, malformed, refused, overflows atomic.Uint64
	conns, connFailures, connOverflow                                              atomic.Uint64
	static, faults, hits, misses                                                   atomic.Uint64
}

// retryFirst is how long a resolver that was silent is not asked first.
const retryFirst = 30 * time.Second

// Server relays. It is safe for concurrent use.
type Server struct {
	c         Config
	resolvers atomic.Pointer[resolverList]
	// queries and conns hold a token for each one in flight.
	queries, conns chan struct{}
	exchanges      sync.Pool // of *exchange
	statics        statics
	cache          *cache // nil if there is none
	stats          counters
}

// resolverList is immutable but for what is known of its members.
type resolverList struct {
	addrs []netip.AddrPort
	// first is asked first until, in nanoseconds of the clock since the epoch,
	// because those before it were silent.
	first atomic.Int32
	until atomic.Int64
}

// New makes a Server that does not listen yet.
func New(c Config) (*Server, error) {
	if !c.Allow.IsValid() {
		return nil, errors.New("dns: no network is allowed to ask")
	}
	if c.Cache < 0 || c.Cache > MaxCache {
		return nil, fmt.Errorf("dns: a cache of %d answers: at most %d", c.Cache, MaxCache)
	}
	if c.Dial == nil {
		c.Dial = new(net.Dialer).DialContext
	}
	orElse(&c.Timeout, 2*time.Second)
	orElse(&c.Idle, 10*time.Second)
	orElse(&c.MaxQueries, 128)
	orElse(&c.MaxConns, 32)
	s := &Server{c: c, queries: make(chan struct{}, c.MaxQueries), conns: make(chan struct{}, c.MaxConns)}
	s.exchanges.New = func() any { return new(exchange) }
	var err error
	if s.statics, err = newStatics(c.Names); err != nil {
		return nil, fmt.Errorf("dns: static names: %w", err)
	}
	if c.Cache > 0 {
		if c.Now == nil {
			c.Now = time.Now
		}
		s.cache = newCache(c.Cache, c.Now)
	}
	s.SetResolvers(c.Resolvers)
	return s, nil
}

func orElse[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// SetResolvers makes these the resolvers that are asked from now on, in order.
// With none, every query fails. What others have said is forgotten.
func (s *Server) SetResolvers(addrs []netip.AddrPort) {
	s.resolvers.Store(&resolverList{addrs: slices.Clone(addrs)})
	if s.cache != nil {
		s.cache.flush() // after the change, so that no old answer comes later
	}
}

// Resolvers are those that are asked.
func (s *Server) Resolvers() []netip.AddrPort { return slices.Clone(s.resolvers.Load().addrs) }

// Stats returns the counters.
func (s *Server) Stats() Stats {
	c := &s.stats
	st := Stats{
		Queries: c.queries.Load(), Answers: c.answers.Load(), Failures: c.failures.Load(), Retries: c.retries.Load(),
		Mismatches: c.mismatches.Load(), Malformed: c.malformed.Load(), Refused: c.refused.Load(),
		Overflows: c.overflows.Load(), Conns: c.conns.Load(), ConnFailures: c.connFailures.Load(),
		ConnOverflow: c.connOverflow.Load(), InFlight: len(s.queries) + len(s.conns),
		Static: c.static.Load(), Faults: c.faults.Load(), CacheHits: c.hits.Load(), CacheMisses: c.misses.Load(),
	}
	if s.cache != nil {
		st.CacheEntries, st.CacheBytes = s.cache.length()
	}
	return st
}

// knows says whether there is anything that could be answered here.
func (s *Server) knows() bool { return len(s.statics) > 0 || s.cache != nil }

// here answers a query that needs no resolver, behind what is in buf: done says
// that it did, and an answer no longer than buf that there is none. key, made in
// the memory of the last one, is what a resolver's answer is kept by, empty if
// it is not kept.
func (s *Server) here(buf, key, query []byte, name, end int, tcp bool) (answer, keyed []byte, done bool) {
	if answer, done = s.static(buf, query, name, end, tcp); done || s.cache == nil {
		return answer, key[:0], done
	}
	key, limit := cacheKey(key, query, name, end)
	if len(key) == 0 {
		return buf, key, false
	}
	if tcp {
		limit = maxMessage
	}
	if answer, done = s.cache.get(buf, key, query, name, limit); done {
		s.stats.hits.Add(1)
	} else {
		s.stats.misses.Add(1)
	}
	return answer, key, done
}

// Serve answers on both sockets until ctx ends, closes them, and returns when
// nothing is in flight any more. It may be called for several pairs.
func (s *Server) Serve(ctx context.Context, udp *net.UDPConn, tcp *net.TCPListener) {
	defer context.AfterFunc(ctx, func() {
		udp.Close()
		tcp.Close()
	})()
	var wg sync.WaitGroup
	wg.Go(func() { s.serveUDP(ctx, udp, &wg) })
	wg.Go(func() { s.serveTCP(ctx, tcp, &wg) })
	wg.Wait()
}

// troubled says whether a socket that has reported an error can be read again.
// It waits a little, so that an error that stays costs nothing.
func troubled(ctx context.Context, err error) bool {
	if errors.Is(err, net.ErrClosed) {
		return false
	}
	t := time.NewTimer(time.Second)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// outcome is what became of asking a resolver; the greater, the better.
type outcome int

const (
	silent   outcome = iota // no answer
	declined                // one that says that somebody else may know better
	answered
)

// try calls ask for one resolver after the other, until one has answered, and
// returns the best that came of it. The first of them that was not silent is
// asked first for a while; what one declines says nothing about other names.
func (s *Server) try(ctx context.Context, ask func(addr string, last bool) outcome) outcome {
	l := s.resolvers.Load()
	n := len(l.addrs)
	first := 0
	if time.Now().UnixNano() < l.until.Load() {
		first = int(l.first.Load())
	}
	best := silent
	for i := 0; i < n && best != answered && ctx.Err() == nil; i++ {
		at := (first + i) % n
		if i > 0 {
			s.stats.retries.Add(1)
		}
		how := ask(l.addrs[at].String(), i == n-1)
		if i > 0 && best == silent && how != silent {
			l.first.Store(int32(at))
			l.until.Store(time.Now().Add(retryFirst).UnixNano())
		}
		best = max(best, how)
	}
	return best
}
