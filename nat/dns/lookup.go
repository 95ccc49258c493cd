package dns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/miekg/dns"
)

// ErrNoName says that the resolvers have answered, and know no such address.
var ErrNoName = errors.New("no such name")

// errSilent says that nobody knows whether there is one.
var errSilent = errors.New("no resolver answers")

// Lookup4 finds an IPv4 address of a host name as a process beside the server
// would: among the static names, else with the resolvers. A name with a dot is
// tried as it is first, one without behind the domains of search first, as the
// C library does. The error wraps ErrNoName if asking again is of no use before
// something changes. It is safe for concurrent use.
func (s *Server) Lookup4(ctx context.Context, name string, search []string) (netip.Addr, error) {
	err := ErrNoName
	for _, full := range candidates(name, search) {
		if _, ok := dns.IsDomainName(full); !ok {
			continue
		}
		a, how := s.lookup4(ctx, full)
		if a.IsValid() {
			return a, nil
		}
		if how != answered {
			err = errSilent
		}
	}
	return netip.Addr{}, fmt.Errorf("address of %q: %w", name, err)
}

// candidates are the full names that a name may mean, in order.
func candidates(name string, search []string) (out []string) {
	if strings.HasSuffix(name, ".") {
		return []string{name}
	}
	for _, domain := range search {
		out = append(out, dns.Fqdn(name+"."+domain))
	}
	if strings.Contains(name, ".") {
		return append([]string{dns.Fqdn(name)}, out...)
	}
	return append(out, dns.Fqdn(name))
}

// lookup4 asks for the address of one full name.
func (s *Server) lookup4(ctx context.Context, full string) (addr netip.Addr, how outcome) {
	q := new(dns.Msg).SetQuestion(full, dns.TypeA)
	query, err := q.Pack()
	if err != nil {
		return addr, answered // no such name can be
	}
	name, end, _ := question(query)
	if answer, done := s.static(nil, query, name, end, true); done {
		return address4(answer), answered
	}
	x := s.exchanges.Get().(*exchange)
	defer s.exchanges.Put(x)
	x.query, x.name, x.end = append(x.query[:0], query...), name, end
	how = s.try(ctx, func(resolver string, _ bool) outcome {
		n := s.ask(ctx, resolver, x)
		switch {
		case n == 0:
			return silent
		case declines(x.answer[:n]):
			return declined
		}
		addr = address4(x.answer[:n])
		return answered
	})
	return addr, how
}

// address4 is the first IPv4 address in an answer. The library is run behind a
// recover: what it is given came from the network.
func address4(answer []byte) (addr netip.Addr) {
	defer func() {
		if recover() != nil {
			addr = netip.Addr{}
		}
	}()
	var m dns.Msg
	if err := m.Unpack(answer); err != nil && !m.Truncated {
		return addr
	}
	for _, rr := range m.Answer {
		if a, ok := rr.(*dns.A); ok {
			if addr, ok = netip.AddrFromSlice(a.A.To4()); ok {
				return addr
			}
		}
	}
	return netip.Addr{}
}
