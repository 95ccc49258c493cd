package usernet

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"sidewire/engine/frame"
)

// Policy says where a guest may go. The first rule that fits decides; what none
// fits is allowed unless Deny is set. The zero value allows everything.
//
// Rules are about addresses as the guest sees them. Its own network, with the
// gateway and the services, may overlap others, so what a rule says of a larger
// network is not about it; what one says of everywhere is. Where the gateway
// stands for the host's loopback, rules about 127.0.0.1 fit it too.
type Policy struct {
	Rules []Rule
	// Deny refuses what no rule names.
	Deny bool
}

// Rule allows or denies what goes to a network, by protocol and port.
type Rule struct {
	Allow       bool
	Prefix      netip.Prefix // the zero value is everywhere
	Proto       uint8        // 0: all
	First, Last uint16       // ports, both 0: all; other protocols than TCP and UDP have none
}

// ParseRule reads a rule as a command line has it:
//
//	allow=any:53/udp  deny=10.0.0.0/8  allow=192.0.2.7:8000-8080  deny=any/icmp
//
// That is allow or deny, and where: any, an address or a network (one of IPv6
// in brackets if something follows); and what of it, if not all: a port or a
// range of them, and tcp, udp or icmp.
func ParseRule(s string) (Rule, error) {
	action, what, ok := strings.Cut(s, "=")
	if !ok || action != "allow" && action != "deny" {
		return Rule{}, fmt.Errorf("rule %q: want allow=WHERE or deny=WHERE, such as deny=10.0.0.0/8", s)
	}
	r := Rule{Allow: action == "allow"}
	if err := r.parse(what); err != nil {
		return Rule{}, fmt.Errorf("rule %q: %w", s, err)
	}
	return r, nil
}

// parse reads what is behind allow= or deny=.
func (r *Rule) parse(s string) error {
	where, ports, proto, err := cutRule(s)
	if err != nil {
		return err
	}
	if r.Prefix, err = parseWhere(where); err != nil {
		return err
	}
	switch proto {
	case "":
	case "tcp":
		r.Proto = frame.ProtoTCP
	case "udp":
		r.Proto = frame.ProtoUDP
	case "icmp":
		r.Proto = frame.ProtoICMP
	default:
		return fmt.Errorf("protocol %q: want tcp, udp or icmp", proto)
	}
	if ports == "" {
		return nil
	}
	if r.Proto == frame.ProtoICMP {
		return fmt.Errorf("icmp has no ports: leave out :%s", ports)
	}
	r.First, r.Last, err = ParsePorts(ports)
	return err
}

// cutRule takes WHERE[:PORTS][/PROTO] apart.
func cutRule(s string) (where, ports, proto string, err error) {
	rest, proto, found := cutProto(s)
	if found && proto == "" {
		return "", "", "", fmt.Errorf("%q ends in a slash: say tcp, udp or icmp behind it, or leave it out", s)
	}
	inner, bracket := strings.CutPrefix(rest, "[")
	switch {
	case bracket:
		if where, rest, found = strings.Cut(inner, "]"); !found {
			return "", "", "", fmt.Errorf("%q has no closing bracket", s)
		}
	case strings.Count(rest, ":") > 1:
		return rest, "", proto, nil // one of IPv6 without brackets
	}
	head, ports, found := strings.Cut(rest, ":")
	switch {
	case found && ports == "":
		return "", "", "", fmt.Errorf("%q has no port behind its colon: give one, or leave the colon out", s)
	case !bracket:
		where = head
	case head != "":
		return "", "", "", fmt.Errorf("%q: %q is out of place behind the bracket: put the network's length into the brackets", s, head)
	}
	return where, ports, proto, nil
}

// cutProto takes a protocol off the end, where there is a slash that no length
// follows.
func cutProto(s string) (before, proto string, ok bool) {
	i := strings.LastIndexByte(s, '/')
	if i < 0 || i+1 < len(s) && s[i+1] >= '0' && s[i+1] <= '9' {
		return s, "", false
	}
	return s[:i], s[i+1:], true
}

func isNumber(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

// parseWhere reads any, an address or a network.
func parseWhere(s string) (netip.Prefix, error) {
	if s == "any" {
		return netip.Prefix{}, nil
	}
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" {
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%q is no address or network: want any, or one such as 192.0.2.7, 10.0.0.0/8 or [2001:db8::/32]", s)
	}
	if m := p.Masked(); m != p {
		return netip.Prefix{}, fmt.Errorf("%s has bits behind its length: write %s, or %s for the one address", s, m, p.Addr())
	}
	if p.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%s: write a network of IPv4 as one of IPv4", s)
	}
	return p, nil
}

// ParsePorts reads a port or a range of ports, such as 8000-8080.
func ParsePorts(s string) (first, last uint16, err error) {
	lo, hi, isRange := strings.Cut(s, "-")
	if !isRange {
		hi = lo
	}
	a, errA := strconv.ParseUint(lo, 10, 16)
	b, errB := strconv.ParseUint(hi, 10, 16)
	switch {
	case errA != nil || errB != nil || a == 0 || !isNumber(lo) || !isNumber(hi):
		return 0, 0, fmt.Errorf("port %q: want a number from 1 to 65535, or a range such as 8000-8080", s)
	case b < a:
		return 0, 0, fmt.Errorf("ports %s: the range ends before it begins: write %d-%d", s, b, a)
	}
	return uint16(a), uint16(b), nil
}

// String is the rule as ParseRule reads it.
func (r Rule) String() string {
	var b strings.Builder
	b.WriteString("deny=")
	if r.Allow {
		b.Reset()
		b.WriteString("allow=")
	}
	p := r.Prefix
	switch {
	case !p.IsValid():
		b.WriteString("any")
	case p.Addr().Is4() && p.IsSingleIP():
		b.WriteString(p.Addr().String())
	case p.Addr().Is4():
		b.WriteString(p.String())
	default:
		b.WriteString("[" + p.String() + "]")
	}
	if r.Last != 0 {
		fmt.Fprintf(&b, ":%d", r.First)
		if r.First != r.Last {
			fmt.Fprintf(&b, "-%d", r.Last)
		}
	}
	switch r.Proto {
	case frame.ProtoTCP:
		b.WriteString("/tcp")
	case frame.ProtoUDP:
		b.WriteString("/udp")
	case frame.ProtoICMP:
		b.WriteString("/icmp")
	}
	return b.String()
}

// allows says whether the guest may send to an address. port is 0 for protocols
// that have none.
func (p *Policy) allows(proto uint8, a netip.Addr, port uint16) bool {
	for i := range p.Rules {
		if r := &p.Rules[i]; r.fits(proto, a, port) {
			return r.Allow
		}
	}
	return !p.Deny
}

func (r *Rule) fits(proto uint8, a netip.Addr, port uint16) bool {
	switch {
	case r.Proto != 0 && r.Proto != proto:
		return false
	case r.Last != 0 && (port < r.First || port > r.Last || proto != frame.ProtoTCP && proto != frame.ProtoUDP):
		return false
	}
	return !r.Prefix.IsValid() || r.Prefix.Contains(a)
}

// permits says whether the guest may send to an address that resolve knows.
func (n *Net) permits(proto uint8, addr uint32, port uint16) bool {
	p := n.policy.Load()
	if len(p.Rules) == 0 {
		return !p.Deny
	}
	if addr&n.mask != n.gateway&n.mask {
		return p.allows(proto, n.ipOf(addr), port)
	}
	own, host := n.ipOf(addr), n.ipOf(loopback)
	_, service := n.service[serviceKey{proto, addr, port}]
	for i := range p.Rules {
		r := &p.Rules[i]
		about := r.Prefix.Bits() <= 0 || r.Prefix.Bits() >= n.conf.Prefix.Bits() // everywhere, or in this network
		if about && r.fits(proto, own, port) || !service && r.Prefix.Bits() > 0 && r.fits(proto, host, port) {
			return r.Allow
		}
	}
	return !p.Deny
}
