package dns

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/miekg/dns"
)

const (
	// staticTTL is how long, in seconds, a guest may keep what is said of a
	// static name: another start may say something else.
	staticTTL = 5
	// staticSize is the longest such answer over UDP, however much the guest
	// takes: what fits a link's MTU.
	staticSize = 1232
)

// static is what is said of a name.
type static struct {
	v4, v6 []netip.Addr
	names  []string // that a PTR leads to, with their dots
}

// statics are found by their names as a message has them, in small letters.
type statics map[string]*static

// ParseName reads NAME=ADDR[,ADDR], an entry of Config.Names.
func ParseName(text string) (name string, addrs []netip.Addr, err error) {
	name, list, ok := strings.Cut(text, "=")
	if !ok {
		return "", nil, errors.New("want NAME=ADDR[,ADDR], such as db.example=192.0.2.5")
	}
	for a := range strings.SplitSeq(list, ",") {
		addr, err := netip.ParseAddr(a)
		if err != nil {
			return "", nil, fmt.Errorf("%q is no IP address", a)
		}
		addrs = append(addrs, addr)
	}
	return name, addrs, checkStatic(name, addrs)
}

// checkStatic says what is wrong with an entry of Config.Names.
func checkStatic(name string, addrs []netip.Addr) error {
	plain := strings.TrimSuffix(name, ".")
	if len(plain) > 253 {
		return fmt.Errorf("%q is no host name: longer than 253 letters", name)
	}
	for label := range strings.SplitSeq(plain, ".") {
		if label == "" || len(label) > 63 {
			return fmt.Errorf("%q is no host name: what is between two dots has 1 to 63 letters", name)
		}
		for _, c := range []byte(label) {
			if c = lower(c); (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
				return fmt.Errorf("%q is no host name: it has a %q", name, c)
			}
		}
	}
	if len(addrs) == 0 {
		return fmt.Errorf("%s has no address", name)
	}
	for _, a := range addrs {
		if !a.IsValid() || a.Zone() != "" {
			return fmt.Errorf("%s: no answer can hold the address %s", name, a)
		}
	}
	return nil
}

// newStatics checks the names and adds those that lead back to them.
func newStatics(names map[string][]netip.Addr) (statics, error) {
	all := statics{}
	at := func(name string) *static {
		var wire [256]byte
		n, err := dns.PackDomainName(name, wire[:], 0, nil, false)
		if err != nil {
			panic(err) // it has been checked
		}
		key, _ := appendLower(nil, wire[:n])
		if all[string(key)] == nil {
			all[string(key)] = new(static)
		}
		return all[string(key)]
	}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		if err := checkStatic(name, names[name]); err != nil {
			return nil, err
		}
		full := dns.Fqdn(name)
		for _, a := range names[name] {
			a = a.Unmap()
			s := at(full)
			if a.Is4() {
				s.v4 = addOnce(s.v4, a)
			} else {
				s.v6 = addOnce(s.v6, a)
			}
			reverse, err := dns.ReverseAddr(a.String())
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			back := at(reverse)
			back.names = addOnce(back.names, strings.ToLower(full))
		}
	}
	return all, nil
}

func addOnce[T comparable](list []T, v T) []T {
	if slices.Contains(list, v) {
		return list
	}
	return append(list, v)
}

// static answers a query about a static name: done says that it was one, and an
// answer no longer than buf that none can be made. Signed queries are not for
// us, who have no key.
func (s *Server) static(buf, query []byte, name, end int, tcp bool) (answer []byte, done bool) {
	if len(s.statics) == 0 || flags(query)&maskOpcode != 0 || qdcount(query) != 1 {
		return buf, false
	}
	var letters [255]byte
	key, ok := appendLower(letters[:0], query[headerLen:name])
	if !ok {
		return buf, false
	}
	st := s.statics[string(key)]
	if st == nil {
		return buf, false
	}
	defer func() {
		if recover() != nil {
			s.stats.faults.Add(1)
			answer, done = buf, true
		}
	}()
	var q dns.Msg
	if err := q.Unpack(query); err != nil || len(q.Question) != 1 {
		s.stats.malformed.Add(1)
		return append(buf, failure(slices.Clone(query), end, rcodeFormErr)...), true
	}
	if q.IsTsig() != nil {
		return buf, false
	}
	packed, err := st.answer(&q, tcp).Pack()
	if err != nil {
		s.stats.failures.Add(1)
		return append(buf, failure(slices.Clone(query), end, rcodeServFail)...), true
	}
	s.stats.static.Add(1)
	return append(buf, packed...), true
}

// answer is what is said to a query. What a name does not have is no error: the
// name exists (RFC 2308 section 2.2).
func (st *static) answer(q *dns.Msg, tcp bool) *dns.Msg {
	m := new(dns.Msg)
	m.SetReply(q)
	m.Authoritative, m.RecursionAvailable, m.Compress = true, true, true
	limit, opts := dns.MinMsgSize, 0
	for _, rr := range q.Extra {
		if opt, ok := rr.(*dns.OPT); ok {
			opts++
			limit = min(max(int(opt.UDPSize()), dns.MinMsgSize), staticSize)
			if opts == 1 {
				m.SetEdns0(staticSize, opt.Do())
			}
			if opt.Version() != 0 {
				m.Rcode = dns.RcodeBadVers
			}
		}
	}
	if opts > 1 {
		m.Rcode = dns.RcodeFormatError // RFC 6891 section 6.1.1
	}
	if m.Rcode == dns.RcodeSuccess {
		m.Answer = st.records(q.Question[0])
	}
	if tcp {
		limit = dns.MaxMsgSize
	}
	m.Truncate(limit)
	return m
}

func (st *static) records(q dns.Question) (out []dns.RR) {
	if q.Qclass != dns.ClassINET && q.Qclass != dns.ClassANY {
		return nil
	}
	head := func(t uint16) dns.RR_Header {
		return dns.RR_Header{Name: q.Name, Rrtype: t, Class: dns.ClassINET, Ttl: staticTTL}
	}
	asked := func(t uint16) bool { return q.Qtype == t || q.Qtype == dns.TypeANY }
	if asked(dns.TypeA) {
		for _, a := range st.v4 {
			b := a.As4()
			out = append(out, &dns.A{Hdr: head(dns.TypeA), A: b[:]})
		}
	}
	if asked(dns.TypeAAAA) {
		for _, a := range st.v6 {
			b := a.As16()
			out = append(out, &dns.AAAA{Hdr: head(dns.TypeAAAA), AAAA: b[:]})
		}
	}
	if asked(dns.TypePTR) {
		for _, name := range st.names {
			out = append(out, &dns.PTR{Hdr: head(dns.TypePTR), Ptr: name})
		}
	}
	return out
}
