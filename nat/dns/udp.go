package dns

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"
)

// maxMessage is the longest message that UDP carries.
const maxMessage = 65535

// exchange is a query over UDP and what comes back.
type exchange struct {
	query     []byte
	name, end int // of the question
	answer    [maxMessage]byte
	declined  []byte // the first answer of a resolver that declines
	// key is what the answer is kept by in the cache, of that generation; empty
	// if it is not.
	key        []byte
	generation uint64
}

// serveUDP reads queries until the socket is closed.
func (s *Server) serveUDP(ctx context.Context, pc *net.UDPConn, wg *sync.WaitGroup) {
	b := make([]byte, maxMessage)
	var known, key []byte
	for {
		n, from, err := pc.ReadFromUDPAddrPort(b)
		if err != nil {
			if troubled(ctx, err) {
				continue
			}
			return
		}
		query := b[:n]
		switch {
		case !s.c.Allow.Contains(from.Addr().Unmap()):
			s.stats.refused.Add(1)
			continue
		case !isQuery(query):
			s.stats.malformed.Add(1)
			continue
		}
		name, end, ok := question(query)
		if !ok {
			s.stats.malformed.Add(1)
			_, _ = pc.WriteToUDPAddrPort(failure(query, headerLen, rcodeFormErr), from)
			continue
		}
		s.stats.queries.Add(1)
		var done bool
		if known, key, done = s.here(known[:0], key, query, name, end, false); done {
			if len(known) > 0 {
				_, _ = pc.WriteToUDPAddrPort(known, from)
			}
			continue
		}
		select {
		case s.queries <- struct{}{}:
		default:
			s.stats.overflows.Add(1)
			continue
		}
		x := s.exchanges.Get().(*exchange)
		x.query, x.name, x.end, x.declined = append(x.query[:0], query...), name, end, x.declined[:0]
		if x.key = append(x.key[:0], key...); len(key) > 0 {
			x.generation = s.cache.current()
		}
		wg.Go(func() {
			s.relay(ctx, pc, from, x)
			s.exchanges.Put(x)
			<-s.queries
		})
	}
}

// relay gets a query answered. An answer that cannot be sent is lost, as UDP's
// are.
func (s *Server) relay(ctx context.Context, pc *net.UDPConn, to netip.AddrPort, x *exchange) {
	n := 0
	best := s.try(ctx, func(addr string, _ bool) outcome {
		n = s.ask(ctx, addr, x)
		switch {
		case n == 0:
			return silent
		case !declines(x.answer[:n]):
			return answered
		case len(x.declined) == 0:
			x.declined = append(x.declined, x.answer[:n]...)
		}
		return declined
	})
	var msg []byte
	switch best {
	case answered:
		msg = x.answer[:n]
		s.stats.answers.Add(1)
		if len(x.key) > 0 {
			s.cache.put(x.key, msg, x.name, x.end, x.generation)
		}
	case declined:
		msg = x.declined
		s.stats.answers.Add(1)
	case silent:
		msg = failure(x.query, x.end, rcodeServFail)
		s.stats.failures.Add(1)
	}
	_, _ = pc.WriteToUDPAddrPort(msg, to)
}

// ask sends a query to one resolver and returns the length of its answer, or 0
// if there is none in time.
func (s *Server) ask(ctx context.Context, addr string, x *exchange) int {
	ctx, cancel := context.WithTimeout(ctx, s.c.Timeout)
	defer cancel()
	c, err := s.c.Dial(ctx, "udp", addr)
	if err != nil {
		return 0
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })()
	if _, err := c.Write(x.query); err != nil {
		return 0
	}
	for {
		n, err := c.Read(x.answer[:])
		if err != nil {
			return 0 // the deadline, or a port that nobody listens on
		}
		if fits(x.query, x.answer[:n], x.name, x.end) {
			return n
		}
		s.stats.mismatches.Add(1)
	}
}
