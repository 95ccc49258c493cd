package vmi

import (
	"fmt"
	"path/filepath"
)

// across checks the VMIs against each other: names everywhere, ports and MAC addresses within one network namespace.
func across(docs Docs) []Fault {
	a := acrossChecker{
		names: map[string]*VMI{}, everything: map[string]*VMI{}, ports: map[string]*VMI{}, macs: map[string]*VMI{},
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
	names, everything, ports, macs map[string]*VMI
	faults                         []Fault
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
	if len(f.Ports) == 0 && f.has(Masquerade) {
		if other := claim(a.everything, ns, v); other != nil {
			a.fail(v, at+".ports", "no ports are listed, which means all, but VMI %q (%s) in the same network namespace has all too; list ports or use -f FILE@NETNS", other.Name, place(other))
		}
		return
	}
	for k, p := range f.Ports {
		key := fmt.Sprintf("%d/%s", p.Port, protocolOr(p.Protocol))
		if other := claim(a.ports, ns+"\x00"+key, v); other != nil {
			a.fail(v, fmt.Sprintf("%s.ports[%d].port", at, k), "port %s goes to VMI %q (%s) in the same network namespace; use another, or -f FILE@NETNS", key, other.Name, place(other))
		}
	}
}

func place(v *VMI) string { return fmt.Sprintf("%s:%d", v.File, v.Line) }
