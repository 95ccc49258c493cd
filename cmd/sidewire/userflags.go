package main

import (
	"net/netip"
	"slices"
	"strings"

	"sidewire/engine/uplink"
	"sidewire/engine/vmi"
	"sidewire/nat/dns"
	"sidewire/nat/usernet"
)

// rules is a flag for the rules of a policy: allow or deny, in the order given.
type rules struct {
	action string
	list   *[]usernet.Rule
}

func (r rules) String() string { return "" }

func (r rules) Set(s string) error {
	rule, err := usernet.ParseRule(r.action + "=" + s)
	if err != nil {
		return err
	}
	*r.list = append(*r.list, rule)
	return nil
}

// dnsNames is a flag for names that the relay knows itself.
type dnsNames struct{ names *map[string][]netip.Addr }

func (d dnsNames) String() string { return "" }

func (d dnsNames) Set(s string) error {
	name, addrs, err := dns.ParseName(s)
	if err != nil {
		return err
	}
	if *d.names == nil {
		*d.names = map[string][]netip.Addr{}
	}
	(*d.names)[name] = append((*d.names)[name], addrs...)
	return nil
}

// relayed says whether guests must ask the relay, because it knows what no
// resolver does.
func (o *options) relayed() bool { return len(o.dnsNames) > 0 || o.dnsCache > 0 }

// policy is what the flags say of where guests may go.
func (o *options) policy() usernet.Policy { return usernet.Policy{Rules: o.rules} }

// checkUserFlags gives the forwards that the flags ask for to their interfaces.
// It refuses flags that would mean nothing, and those that would seem to keep a
// guest from something and do not.
func checkUserFlags(o *options, p *plan) error {
	for _, f := range []struct {
		name         string
		given, keeps bool
	}{
		{"--allow and --deny", len(o.rules) > 0, true}, {"--no-host-loopback", o.noHostLoopback, true},
		{"--forward", len(o.forward) > 0, false}, {"--mtu", o.mtu != 0, false},
	} {
		switch {
		case f.given && len(p.pods) > 0 && (f.keeps || len(p.users) == 0):
			return badInput("%s: %s takes the packet path, which has nothing of the kind: it is for slirp and --path socket", f.name, p.pods[0].name())
		case f.given && len(p.users) == 0:
			return badInput("%s: no interface is for it, which is for slirp and --path socket", f.name)
		}
	}
	if o.relayed() && len(p.pods)+len(p.users) == 0 {
		return badInput("--dns-name and --dns-cache: no interface is for them, which are for masquerade and slirp")
	}
	for _, text := range o.forward {
		name, fs, err := parseUserForward(text)
		if err != nil {
			return err
		}
		n, err := p.userNamed(name)
		if err != nil {
			return badInput("--forward %s: %w", text, err)
		}
		n.ports = append(n.ports, fs...)
	}
	for _, n := range p.users {
		n.addListed()
	}
	return nil
}

// userNamed is the interface of that name, or the only one if there is none.
func (p *plan) userNamed(name string) (*userNIC, error) {
	var names []string
	for _, n := range p.users {
		if n.name() == name || name == "" && len(p.users) == 1 {
			return n, nil
		}
		names = append(names, n.name())
	}
	if name == "" {
		return nil, badInput("say for which interface, as in %s=8080: there are %s", names[0], strings.Join(names, ", "))
	}
	return nil, badInput("no interface %s that ports are forwarded to; there are: %s", name, strings.Join(names, ", "))
}

// addListed adds the ports that the VMI lists, but for those that a flag has
// another one lead to.
func (n *userNIC) addListed() {
	for _, p := range n.iface.Ports {
		proto, _ := protoNumber(p.Protocol) // validated
		if p.Last > p.Port {
			n.ranges = append(n.ranges, uplink.Port{Proto: proto, Port: p.Port, Last: p.Last})
			continue
		}
		if !slices.ContainsFunc(n.ports, func(f usernet.Forward) bool { return f.Proto == proto && f.Guest == p.Port }) {
			n.ports = append(n.ports, usernet.Forward{Proto: proto, Port: p.Port, Guest: p.Port})
		}
	}
}

// maxForwardRange bounds the ports of one --forward: each is a descriptor.
const maxForwardRange = 1 << 12

// parseUserForward reads [VMI/INTERFACE=][ADDR:]PORT[-LAST][:GUEST][/PROTO], of
// which a range leads to as many ports of the guest's from GUEST on.
func parseUserForward(text string) (name string, fs []usernet.Forward, err error) {
	bad := func(format string, args ...any) (string, []usernet.Forward, error) {
		return "", nil, badInput("--forward "+text+": "+format, args...)
	}
	rest := text
	if before, after, ok := strings.Cut(rest, "="); ok {
		name, rest = before, after
	}
	rest, protocol, _ := strings.Cut(rest, "/")
	proto, err := protoNumber(protocol)
	if err != nil {
		return bad("%w", err)
	}
	words := strings.Split(rest, ":")
	var addr netip.Addr
	if strings.Contains(words[0], ".") {
		if addr, err = netip.ParseAddr(words[0]); err != nil {
			return bad("%q is no IPv4 address", words[0])
		}
		words = words[1:]
	}
	if len(words) == 0 || len(words) > 2 {
		return bad("want [ADDR:]PORT[:GUESTPORT][/udp], such as 8080:80, 127.0.0.1:5353:53/udp or 8000-8080")
	}
	first, last, err := usernet.ParsePorts(words[0])
	if err != nil {
		return bad("%w", err)
	}
	guest := first
	if len(words) == 2 {
		g, glast, err := usernet.ParsePorts(words[1])
		if err != nil {
			return bad("%w", err)
		}
		if glast != g && glast-g != last-first {
			return bad("%d ports cannot lead to %d of the guest's", int(last)-int(first)+1, int(glast)-int(g)+1)
		}
		guest = g
	}
	n := int(last) - int(first)
	switch {
	case n >= maxForwardRange:
		return bad("%d ports in a range, at most %d", n+1, maxForwardRange)
	case int(guest)+n > 65535:
		return bad("the guest's ports would end at %d", int(guest)+n)
	}
	for i := range uint16(n + 1) {
		fs = append(fs, usernet.Forward{Proto: proto, Addr: addr, Port: first + i, Guest: guest + i})
	}
	return name, fs, nil
}

// onSockets says whether an interface's guest reaches the network by sockets of
// ours.
func onSockets(o *options, i vmi.Interface) bool {
	if i.Network.NAD != nil || i.Binding == vmi.Bridge {
		return false
	}
	path, _ := masqueradePath(o)
	return i.Binding == vmi.Slirp || path == "socket"
}
