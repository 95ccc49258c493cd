package vmi

import (
	"maps"
	"net/netip"

	"go.yaml.in/yaml/v3"
)

// IPAM is what a definition says about the addresses of its guests, by the rules of CNI's host-local: they are given
// in order, from the first range that has one left. Only IPv4 is leased.
type IPAM struct {
	Ranges []AddressRange
	Routes []Route
	DNS    []netip.Addr
	Search []string // domains, the own one first
}

// AddressRange is a range of addresses of one network.
type AddressRange struct {
	Subnet      netip.Prefix
	First, Last netip.Addr
	Gateway     netip.Addr // as given, else the network's first address; never leased
	Router      bool       // the gateway was given: guests are to route through it
}

// Route is a route that a guest is told of. Via is not valid where the gateway is meant.
type Route struct {
	Dest netip.Prefix
	Via  netip.Addr
}

// Lease is the address of one guest's interface, and what goes with it.
type Lease struct {
	Address netip.Prefix
	Gateway netip.Addr // of the address's range
	Router  bool       // the guest is to route through the gateway
	Routes  []Route    // with Via set
	DNS     []netip.Addr
	Search  []string
}

// Lease returns the first address that is not taken, false if there is none.
func (m *IPAM) Lease(taken func(netip.Addr) bool) (Lease, bool) {
	for _, r := range m.Ranges {
		for a := r.First; r.Subnet.Contains(a) && a.Compare(r.Last) <= 0; a = a.Next() {
			if a != r.Gateway && !taken(a) {
				return m.lease(r, a), true
			}
		}
	}
	return Lease{}, false
}

// LeaseOf returns the lease of an address, false if it is not one of those that are leased.
func (m *IPAM) LeaseOf(a netip.Addr) (Lease, bool) {
	for _, r := range m.Ranges {
		if r.Subnet.Contains(a) && r.First.Compare(a) <= 0 && a.Compare(r.Last) <= 0 && a != r.Gateway {
			return m.lease(r, a), true
		}
	}
	return Lease{}, false
}

// lease makes the lease of an address of a range.
func (m *IPAM) lease(r AddressRange, a netip.Addr) Lease {
	l := Lease{Address: netip.PrefixFrom(a, r.Subnet.Bits()), Gateway: r.Gateway, Router: r.Router, DNS: m.DNS, Search: m.Search}
	for _, route := range m.Routes {
		if !route.Via.IsValid() {
			route.Via = r.Gateway
		}
		l.Routes = append(l.Routes, route)
	}
	return l
}

// resolvers is a "dns" of a configuration.
type resolvers struct {
	servers []netip.Addr
	domain  string
	search  []string
}

// add lets the resolvers of the configuration itself come after those of the ipam.
func (m *IPAM) add(r resolvers) {
	m.DNS = append(m.DNS, r.servers...)
	if r.domain != "" {
		m.Search = append(m.Search, r.domain)
	}
	m.Search = append(m.Search, r.search...)
}

// ipam reads a configuration's ipam; nil if there is none that is served.
func (d *decoder) ipam(n *yaml.Node, path string) *IPAM {
	kind := ""
	d.object(n, path, false, fields{"type": func(n *yaml.Node, at string) { kind = d.text(n, at) }})
	switch r := d.resolve(n); {
	case r == nil || len(r.Content) == 0:
		return nil
	case kind != "host-local":
		d.fault(n, path+".type", "not supported yet: ipam of type %q; served is host-local. Without ipam guests ask a DHCP server of the network", kind)
		return nil
	}
	m := &IPAM{}
	var dns resolvers
	var one rangeText
	f := ignored("type", "dataDir", "name")
	maps.Copy(f, one.fields(d))
	maps.Copy(f, fields{
		"ranges": func(n *yaml.Node, at string) { d.rangeSets(n, at, m) },
		"routes": func(n *yaml.Node, at string) { m.Routes = d.routes(n, at) },
		"dns":    func(n *yaml.Node, at string) { d.resolvers(n, at, &dns) },
		"resolvConf": func(n *yaml.Node, at string) {
			d.warn(n, at, "not read: it is a file of the node's; name the resolvers with \"dns\": {\"nameservers\": [...]}")
		},
	})
	before := len(d.faults)
	d.object(n, path, true, f)
	if one.subnet != "" {
		if r, ok := one.resolve(d, n, path); ok {
			m.Ranges = append([]AddressRange{r}, m.Ranges...)
		}
	}
	if len(m.Ranges) == 0 && len(d.faults) == before {
		d.fault(n, path+".subnet", "host-local needs a network; write \"subnet\": \"10.1.1.0/24\"")
	}
	m.add(dns)
	return m
}

// rangeSets reads "ranges": a list of lists. An interface gets an address of each list; we lease of the first with
// IPv4.
func (d *decoder) rangeSets(n *yaml.Node, path string, m *IPAM) {
	d.list(n, path, maxList, func(n *yaml.Node, at string) {
		var set []AddressRange
		d.list(n, at, maxList, func(n *yaml.Node, at string) {
			var t rangeText
			before := len(d.faults)
			d.object(n, at, true, t.fields(d))
			if len(d.faults) > before {
				return
			}
			if r, ok := t.resolve(d, n, at); ok {
				set = append(set, r)
			}
		})
		if len(set) > 0 && len(m.Ranges) > 0 {
			d.warn(n, at, "not served: a guest is leased one IPv4 address, of the list before")
			return
		}
		m.Ranges = append(m.Ranges, set...)
	})
}

// rangeText is a range as written.
type rangeText struct{ subnet, first, last, gateway string }

func (t *rangeText) fields(d *decoder) fields {
	text := func(dst *string) func(*yaml.Node, string) {
		return func(n *yaml.Node, p string) { *dst = d.text(n, p) }
	}
	return fields{"subnet": text(&t.subnet), "rangeStart": text(&t.first), "rangeEnd": text(&t.last), "gateway": text(&t.gateway)}
}

// resolve checks a range by host-local's rules.
func (t *rangeText) resolve(d *decoder, n *yaml.Node, path string) (r AddressRange, ok bool) {
	p, err := netip.ParsePrefix(t.subnet)
	switch {
	case err != nil:
		d.fault(n, path+".subnet", "%q is not a network; write it like 10.1.1.0/24", t.subnet)
		return r, false
	case !p.Addr().Is4():
		d.warn(n, path+".subnet", "not supported yet: IPv6 addresses are not leased; guests take them by router advertisement or by hand")
		return r, false
	case p != p.Masked():
		d.fault(n, path+".subnet", "%s has host bits set; the network is %s", p, p.Masked())
		return r, false
	case p.Bits() > 30:
		d.fault(n, path+".subnet", "network %s is too small to allocate from; use /30 or larger", p)
		return r, false
	case p.Addr().IsMulticast() || p.Addr().IsLoopback() || p.Bits() == 0:
		d.fault(n, path+".subnet", "%s is not a network for guests; use a private one like 10.1.1.0/24", p)
		return r, false
	}
	r = AddressRange{Subnet: p, First: p.Addr().Next(), Last: broadcastOf(p).Prev(), Gateway: p.Addr().Next()}
	inside := func(field, s string, dst *netip.Addr) bool {
		if s == "" {
			return true
		}
		a, err := netip.ParseAddr(s)
		if err != nil || !p.Contains(a) || a == p.Addr() || a == broadcastOf(p) {
			d.fault(n, path+"."+field, "%q is not an address of a host in %s", s, p)
			return false
		}
		*dst = a
		return true
	}
	ok = inside("rangeStart", t.first, &r.First)
	ok = inside("rangeEnd", t.last, &r.Last) && ok
	ok = inside("gateway", t.gateway, &r.Gateway) && ok
	if ok && r.First.Compare(r.Last) > 0 {
		d.fault(n, path+".rangeEnd", "the range ends at %s, before it starts at %s", r.Last, r.First)
		return r, false
	}
	r.Router = t.gateway != ""
	return r, ok
}

func broadcastOf(p netip.Prefix) netip.Addr {
	a := p.Addr().As4()
	for i := p.Bits(); i < 32; i++ {
		a[i/8] |= 0x80 >> (i % 8)
	}
	return netip.AddrFrom4(a)
}

func (d *decoder) routes(n *yaml.Node, path string) (out []Route) {
	d.list(n, path, maxList, func(n *yaml.Node, at string) {
		var dst, gw string
		f := ignored("mtu", "advmss", "priority", "table", "scope")
		f["dst"] = func(n *yaml.Node, p string) { dst = d.text(n, p) }
		f["gw"] = func(n *yaml.Node, p string) { gw = d.text(n, p) }
		d.object(n, at, true, f)
		p, err := netip.ParsePrefix(dst)
		if err != nil {
			d.fault(n, at+".dst", "%q is not a network; write it like 10.2.0.0/16, or 0.0.0.0/0 for everything", dst)
			return
		}
		r := Route{Dest: p.Masked()}
		if gw != "" {
			if r.Via, err = netip.ParseAddr(gw); err != nil {
				d.fault(n, at+".gw", "%q is not an address", gw)
				return
			}
		}
		if !p.Addr().Is4() || r.Via.IsValid() && !r.Via.Is4() {
			d.warn(n, at+".dst", "not supported yet: IPv6 routes are not announced")
			return
		}
		out = append(out, r)
	})
	return out
}

func (d *decoder) resolvers(n *yaml.Node, path string, r *resolvers) {
	texts := func(dst *[]string) func(*yaml.Node, string) {
		return func(n *yaml.Node, p string) {
			d.list(n, p, maxList, func(n *yaml.Node, p string) { *dst = append(*dst, d.text(n, p)) })
		}
	}
	f := ignored("options")
	f["domain"] = func(n *yaml.Node, p string) { r.domain = d.text(n, p) }
	f["search"] = texts(&r.search)
	f["nameservers"] = func(n *yaml.Node, p string) {
		d.list(n, p, maxList, func(n *yaml.Node, p string) {
			s := d.text(n, p)
			a, err := netip.ParseAddr(s)
			switch {
			case err != nil:
				d.fault(n, p, "%q is not an address", s)
			case !a.Is4():
				d.warn(n, p, "not announced: a lease names resolvers by IPv4 only")
			default:
				r.servers = append(r.servers, a)
			}
		})
	}
	d.object(n, path, true, f)
}
