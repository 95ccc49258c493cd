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
}

type counters struct {
	queries, answers, failures, retries, mismatches, malformed, refused, overflows atomic.Uint64
	conns, connFailures, connOverflow                                              atomic.Uint64
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
	if c.Dial == nil {
		c.Dial = new(net.Dialer).DialContext
	}
	orElse(&c.Timeout, 2*time.Second)
	orElse(&c.Idle, 10*time.Second)
	orElse(&c.MaxQueries, 128)
	orElse(&c.MaxConns, 32)
	s := &Server{c: c, queries: make(chan struct{}, c.MaxQueries), conns: make(chan struct{}, c.MaxConns)}
	s.exchanges.New = func() any { return new(exchange) }
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
// With none, every query fails.
func (s *Server) SetResolvers(addrs []netip.AddrPort) {
	s.resolvers.Store(&resolverList{addrs: slices.Clone(addrs)})
}

// Resolvers are those that are asked.
func (s *Server) Resolvers() []netip.AddrPort { return slices.Clone(s.resolvers.Load().addrs) }

// Stats returns the counters.
func (s *Server) Stats() Stats {
	c := &s.stats
	return Stats{
		Queries: c.queries.Load(), Answers: c.answers.Load(), Failures: c.failures.Load(), Retries: c.retries.Load(),
		Mismatches: c.mismatches.Load(), Malformed: c.malformed.Load(), Refused: c.refused.Load(),
		Overflows: c.overflows.Load(), Conns: c.conns.Load(), ConnFailures: c.connFailures.Load(),
		ConnOverflow: c.connOverflow.Load(), InFlight: len(s.queries) + len(s.conns),
	}
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
