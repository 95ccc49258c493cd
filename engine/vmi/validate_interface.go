package vmi

import (
	"fmt"
	"net"
	"slices"
	"strings"
)

// interfaceFields is V20 to V38.
func (c *checker) interfaceFields(i int) {
	f := &c.Spec.Interfaces[i]
	at := c.interfacePath(i)
	if !interfaceName.MatchString(f.Name) {
		c.fail(at+".name", "Network interface name can only contain alphabetical characters, numbers, dashes (-) or underscores (_)")
	}
	if f.Model != "" && !slices.Contains(models, f.Model) {
		c.cause(NotSupported, at+".model", "interface %s uses model %s that is not supported.", at+".name", f.Model)
	}
	if f.MAC != "" {
		switch m, err := net.ParseMAC(f.MAC); {
		case err != nil:
			c.fail(at+".macAddress", "interface %s has malformed MAC address (%s).", at+".name", f.MAC)
		case len(m) > 6:
			c.fail(at+".macAddress", "interface %s has too long MAC address (%s).", at+".name", f.MAC)
		}
	}
	if f.PCIAddress != "" && !pciAddress.MatchString(f.PCIAddress) {
		c.fail(at+".pciAddress", "interface %s has malformed PCI address (%s).", at+".name", f.PCIAddress)
	}
	pod := c.network(f.Name).Pod != nil
	if pod && f.hasPorts {
		c.ports(f, at)
	}
	switch {
	case !f.hasRanges:
	case !c.cluster.Gate(GatePortRanges):
		c.fail(at+".name", "portRanges is specified on interface but the PortRangesSpec feature gate is not enabled")
	case pod:
		c.portRanges(f, at)
	}
	c.dhcp(f, at)
}

// ports is V25 to V29, the names first.
func (c *checker) ports(f *InterfaceSpec, at string) {
	names := map[string]bool{}
	for j, p := range f.Ports {
		if p.Name == "" {
			continue
		}
		pat := fmt.Sprintf("%s.ports[%d].name", at, j)
		if names[p.Name] {
			c.cause(Duplicate, pat, "Duplicate name of the port: %s", p.Name)
		}
		if !portName(p.Name) {
			c.fail(pat, "Invalid name of the port: %s", p.Name)
		}
		names[p.Name] = true
	}
	for j, p := range f.Ports {
		pat := fmt.Sprintf("%s.ports[%d]", at, j)
		if p.Port == 0 {
			c.cause(Required, pat+".port", "Port field is mandatory.")
		}
		if p.Port < 0 || p.Port > 65535 {
			c.fail(pat+".port", "Port field must be in range 0 < x < 65536.")
		}
		if p.Protocol != "" && p.Protocol != "TCP" && p.Protocol != "UDP" {
			c.fail(pat+".protocol", "Unknown protocol, only TCP or UDP allowed")
		}
		if len(c.faults) > maxFaults {
			return
		}
	}
}

// portRanges is V31 to V35. Of overlaps KubeVirt reports the protocols' in any order; here TCP is first.
func (c *checker) portRanges(f *InterfaceSpec, at string) {
	const most = 10
	if f.hasPorts {
		c.fail(at+".name", "Cannot define both ports and portRanges on interface")
	}
	if !f.has(Masquerade) {
		c.fail(at+".name", "portRanges are only supported on masquerade interfaces")
	}
	if len(f.PortRanges) > most {
		c.fail(at+".portRanges", "No more than 10 portRanges are allowed")
		return
	}
	sound := map[string][]PortRangeSpec{}
	for j, r := range f.PortRanges {
		pat := fmt.Sprintf("%s.portRanges[%d]", at, j)
		switch {
		case r.Protocol != "TCP" && r.Protocol != "UDP":
			c.fail(pat+".protocol", "Unknown protocol, only TCP or UDP allowed")
		case r.Start <= 0 || r.Start > 65535:
			c.fail(pat+".start", "Start must be a valid port number, 0 < x < 65536")
		case r.End <= 0 || r.End > 65535:
			c.fail(pat+".end", "End must be a valid port number, 0 < x < 65536")
		case r.Start > r.End:
			c.fail(pat+".start", "Start must be less than or equal to end")
		default:
			sound[r.Protocol] = append(sound[r.Protocol], r)
		}
	}
	for _, protocol := range []string{"TCP", "UDP"} {
		ranges := sound[protocol]
		slices.SortFunc(ranges, func(a, b PortRangeSpec) int {
			if a.Start != b.Start {
				return int(a.Start - b.Start)
			}
			return int(a.End - b.End)
		})
		for j := 1; j < len(ranges); j++ {
			if p, r := ranges[j-1], ranges[j]; r.Start <= p.End {
				c.fail(at+".portRanges", "%s portRanges [%d-%d] and [%d-%d] overlap", protocol, p.Start, p.End, r.Start, r.End)
			}
		}
	}
}

func protocolOr(p string) string {
	if p == "" {
		return "TCP"
	}
	return p
}

// portName is the IANA's rule for a service name (RFC 6335, 5.1), in lower case.
func portName(s string) bool {
	letter := false
	for _, r := range s {
		if r >= 'a' && r <= 'z' {
			letter = true
		} else if (r < '0' || r > '9') && r != '-' {
			return false
		}
	}
	return letter && len(s) <= 15 && !strings.Contains(s, "--") && s[0] != '-' && s[len(s)-1] != '-'
}

// dhcp is V37, V36 (for each option) and V38.
func (c *checker) dhcp(f *InterfaceSpec, at string) {
	d := &f.DHCP
	seen := map[int64]bool{}
	for _, p := range d.Private {
		seen[p.Option] = true
	}
	if len(seen) < len(d.Private) {
		c.fail(c.Path, "Found Duplicates: you have provided duplicate DHCPPrivateOptions")
	}
	for _, p := range d.Private {
		if p.Option < 224 || p.Option > 254 {
			c.fail(c.Path, "provided DHCPPrivateOptions are out of range, must be in range 224 to 254")
		}
	}
	for k, s := range d.NTPServers {
		if _, ok := parseNTP(s); !ok {
			c.fail(fmt.Sprintf("%s.dhcpOptions.ntpServers[%d]", at, k), "NTP servers must be a list of valid IPv4 addresses.")
		}
	}
}

// interfaceHoles is what KubeVirt does not look at in an interface's fields.
func (c *checker) interfaceHoles(i int) {
	f := &c.Spec.Interfaces[i]
	at := c.interfacePath(i)
	pod := c.network(f.Name).Pod != nil
	if f.has(SRIOV) && pod && !c.faulty(at, c.Path+".networks", c.Path+".interfaces") {
		c.fail(at+".name", "SR-IOV interface cannot be connected to the pod network; refer to a multus network")
	}
	if m := parseMAC(f.MAC); m != nil {
		switch {
		case !slices.ContainsFunc(m, func(b byte) bool { return b != 0 }):
			c.fail(at+".macAddress", "MAC address %s is all zeros; leave macAddress out to have one chosen", f.MAC)
		case m[0]&1 != 0:
			c.fail(at+".macAddress", "MAC address %s is a multicast address; its first byte must be even, as in 02:%s", f.MAC, m.String()[3:])
		case f.has(Masquerade) && m.String() == gatewayMAC && f.MAC != gatewayMAC:
			c.fail(at+".macAddress", reservedMAC)
		}
	}
	if pciAddress.MatchString(f.PCIAddress) {
		switch a := parsePCI(f.PCIAddress); {
		case a.Domain != 0:
			c.fail(at+".pciAddress", "PCI address %s: the domain must be 0000, a guest has no other", f.PCIAddress)
		case a.Slot > 31:
			c.fail(at+".pciAddress", "PCI address %s: the slot must be 00 to 1f", f.PCIAddress)
		case a.Bus == 0 && a.Slot == 0:
			c.fail(at+".pciAddress", "PCI address %s is the host bridge's; use another slot", f.PCIAddress)
		}
	}
	if x := f.ACPIIndex; x != nil && (*x < 0 || *x > 16383) {
		c.fail(at+".acpiIndex", "%d is out of range, ACPI knows indexes 1 to 16383", *x)
	}
	if f.has(PluginBound) && f.Plugin == "" {
		c.fail(at+".binding.name", "a binding plugin needs its name")
	}
	if len(f.Ports) > 0 && (!pod || !f.has(Masquerade) && !f.has(Slirp)) {
		c.warn(at+".ports", "ports mean nothing here: they are for masquerade and slirp on the pod network")
	}
	if pod {
		c.portsTwice(f, at)
	}
	c.dhcpLengths(f, at)
}

// faulty says whether there is a fault already in one of the fields or below: what has to be changed there may well
// mend the rest.
func (c *checker) faulty(fields ...string) bool {
	return slices.ContainsFunc(c.faults, func(f Fault) bool {
		return slices.ContainsFunc(fields, func(field string) bool { return strings.HasPrefix(f.Field, field) })
	})
}

func (c *checker) portsTwice(f *InterfaceSpec, at string) {
	numbers := map[string]bool{}
	for j, p := range f.Ports {
		key := fmt.Sprintf("%d/%s", p.Port, protocolOr(p.Protocol))
		if numbers[key] && p.Port != 0 {
			c.fail(fmt.Sprintf("%s.ports[%d].port", at, j), "port %s is listed twice on this interface; remove one", key)
		}
		if numbers[key] = true; len(c.faults) > maxFaults {
			return
		}
	}
}

// dhcpLengths: what does not fit an option.
func (c *checker) dhcpLengths(f *InterfaceSpec, at string) {
	d := &f.DHCP
	long := func(field, s string) {
		if len(s) > 255 {
			c.fail(at+".dhcpOptions."+field, "%d bytes, a DHCP option holds 255 at most", len(s))
		}
	}
	long("bootFileName", d.BootFile)
	long("tftpServerName", d.TFTPServer)
	for k, p := range d.Private {
		long(fmt.Sprintf("privateOptions[%d].value", k), p.Value)
	}
	if len(d.NTPServers) > 63 {
		c.fail(at+".dhcpOptions.ntpServers", "%d servers, a DHCP option holds 63 at most", len(d.NTPServers))
	}
}
