package vmi

import (
	"fmt"
	"path/filepath"
)

// across checks the VMIs against each other: names everywhere, ports and MAC addresses within one network namespace.
func across(docs Docs) []Fault {
	a := acrossChecker{
		names: map[string]*VMI{}, everything: map[string]*VMI{}, macs: map[string]*VMI{},
		ports: map[string]map[int64]*VMI{}, ranges: map[string][]claimed{},
	}
	for i := range docs.VMIs {
		v := &docs.VMIs[i]
		if other := a.names[v.Name]; other != nil {
			a.fail(v, "metadata.name", "%s in %s has this name too; every VMI of one run needs its own", v.Name, place(other))
		} else {
			a.names[v.Name] = v
		}
		for j := range v.Spec.Interfaces {
			a.interfaceSpec(v, j)
		}
	}
	return a.faults
}

// acrossChecker remembers who was the first to claim a thing.
type acrossChecker struct {
	names, everything, macs map[string]*VMI
	ports                   map[string]map[int64]*VMI // by namespace and protocol
	ranges                  map[string][]claimed
	faults                  []Fault
}

func (a *acrossChecker) fail(v *VMI, field, format string, args ...any) {
	if len(a.faults) < maxFaults {
		a.faults = append(a.faults, v.fault(Error, field, format, args...))
	}
}

// claim says who other than v claimed the key before.
func claim(m map[string]*VMI, key string, v *VMI) *VMI {
	if other := m[key]; other != nil {
		if other == v {
			return nil // two interfaces of one VMI are Validate's own rules' business
		}
		return other
	}
	m[key] = v
	return nil
}

func (a *acrossChecker) interfaceSpec(v *VMI, j int) {
	f, at := &v.Spec.Interfaces[j], v.interfacePath(j)
	ns := ""
	if v.NetNS != "" {
		ns = filepath.Clean(v.NetNS)
	}
	if m := parseMAC(f.MAC); m != nil {
		if other := claim(a.macs, ns+"\x00"+m.String(), v); other != nil {
			a.fail(v, at+".macAddress", "MAC address %s is that of VMI %q (%s) too; give each its own", m, other.Name, place(other))
		}
	}
	if !f.has(Masquerade) && !f.has(Slirp) {
		return
	}
	if len(f.Ports)+len(f.PortRanges) == 0 && f.has(Masquerade) {
		if other := claim(a.everything, ns, v); other != nil {
			a.fail(v, at+".ports", "no ports are listed, which means all, but VMI %q (%s) in the same network namespace has all too; list ports or use -f FILE@NETNS", other.Name, place(other))
		}
		return
	}
	for k, p := range f.Ports {
		a.port(v, fmt.Sprintf("%s.ports[%d].port", at, k), ns, protocolOr(p.Protocol), p.Port, p.Port)
	}
	for k, r := range f.PortRanges {
		a.port(v, fmt.Sprintf("%s.portRanges[%d]", at, k), ns, r.Protocol, r.Start, r.End)
	}
}

// claimed is a range of ports that a VMI has.
type claimed struct {
	first, last int64
	by          *VMI
}

// port claims the ports from first to last of a namespace. Single ones are found by their number: there may be many.
func (a *acrossChecker) port(v *VMI, field, ns, protocol string, first, last int64) {
	key := ns + "\x00" + protocol
	single := a.ports[key]
	if single == nil {
		single = map[int64]*VMI{}
		a.ports[key] = single
	}
	var other *VMI
	for _, r := range a.ranges[key] {
		if r.by != v && r.first <= last && first <= r.last {
			other = r.by
		}
	}
	text := fmt.Sprintf("port %d/%s goes", first, protocol)
	if first == last {
		if by := single[first]; by == nil {
			single[first] = v
		} else if by != v {
			other = by
		}
	} else {
		text = fmt.Sprintf("a port of %d-%d/%s goes", first, last, protocol)
		for p, by := range single {
			if by != v && first <= p && p <= last {
				other = by
			}
		}
		a.ranges[key] = append(a.ranges[key], claimed{first, last, v})
	}
	if other != nil {
		a.fail(v, field, "%s to VMI %q (%s) in the same network namespace; use another, or -f FILE@NETNS", text, other.Name, place(other))
	}
}

func place(v *VMI) string { return fmt.Sprintf("%s:%d", v.File, v.Line) }
