package vmi

import (
	"fmt"
	"net"
	"slices"
	"strings"
)

// interfaceFields is V20 to V29 and V36 to V38, and what KubeVirt does not look at in the same fields.
func (c *checker) interfaceFields(i int) {
	f := &c.Spec.Interfaces[i]
	at := c.interfacePath(i)
	if !interfaceName.MatchString(f.Name) {
		c.fail(at+".name", "Network interface name can only contain alphabetical characters, numbers, dashes (-) or underscores (_)")
	}
	if f.Model != "" && !slices.Contains(models, f.Model) {
		c.fail(at+".model", "interface %s uses model %s that is not supported.", at+".name", f.Model)
	}
	c.mac(f, at)
	c.pci(f, at)
	c.ports(f, at)
	c.dhcp(f, at)
	if x := f.ACPIIndex; x != nil && (*x < 0 || *x > 16383) {
		c.fail(at+".acpiIndex", "%d is out of range, ACPI knows indexes 1 to 16383", *x)
	}
	if f.has(PluginBound) && f.Plugin == "" {
		c.fail(at+".binding.name", "a binding plugin needs its name")
	}
}

// mac is V22, V23 and addresses that no NIC can have.
func (c *checker) mac(f *InterfaceSpec, at string) {
	if f.MAC == "" {
		return
	}
	m, err := net.ParseMAC(f.MAC)
	switch {
	case err != nil:
		c.fail(at+".macAddress", "interface %s has malformed MAC address (%s).", at+".name", f.MAC)
	case len(m) > 6:
		c.fail(at+".macAddress", "interface %s has too long MAC address (%s).", at+".name", f.MAC)
	case !slices.ContainsFunc(m, func(b byte) bool { return b != 0 }):
		c.fail(at+".macAddress", "MAC address %s is all zeros; leave macAddress out to have one chosen", f.MAC)
	case m[0]&1 != 0:
		c.fail(at+".macAddress", "MAC address %s is a multicast address; its first byte must be even, as in 02:%s", f.MAC, m.String()[3:])
	}
}

// pci is V24 and addresses that no machine of ours has.
func (c *checker) pci(f *InterfaceSpec, at string) {
	if f.PCIAddress == "" {
		return
	}
	if !pciAddress.MatchString(f.PCIAddress) {
		c.fail(at+".pciAddress", "interface %s has malformed PCI address (%s).", at+".name", f.PCIAddress)
		return
	}
	switch a := parsePCI(f.PCIAddress); {
	case a.Domain != 0:
		c.fail(at+".pciAddress", "PCI address %s: the domain must be 0000, a guest has no other", f.PCIAddress)
	case a.Slot > 31:
		c.fail(at+".pciAddress", "PCI address %s: the slot must be 00 to 1f", f.PCIAddress)
	case a.Bus == 0 && a.Slot == 0:
		c.fail(at+".pciAddress", "PCI address %s is the host bridge's; use another slot", f.PCIAddress)
	}
}

// ports is V25 to V29, for the pod network; a port listed twice is refused besides.
func (c *checker) ports(f *InterfaceSpec, at string) {
	if len(f.Ports) == 0 {
		return
	}
	n := c.networks[f.Name]
	if n == nil || n.Pod == nil || f.has(Bridge) {
		c.warn(at+".ports", "ports mean nothing here: they are for masquerade and slirp on the pod network")
	}
	if n == nil || n.Pod == nil {
		return
	}
	names, numbers := map[string]bool{}, map[string]bool{}
	for j, p := range f.Ports {
		pat := fmt.Sprintf("%s.ports[%d]", at, j)
		switch {
		case p.Port == 0:
			c.fail(pat+".port", "Port field is mandatory.")
		case p.Port < 0 || p.Port > 65535:
			c.fail(pat+".port", "Port field must be in range 0 < x < 65536.")
		}
		if p.Protocol != "" && p.Protocol != "TCP" && p.Protocol != "UDP" {
			c.fail(pat+".protocol", "Unknown protocol, only TCP or UDP allowed")
		}
		if p.Name != "" {
			if names[p.Name] {
				c.fail(pat+".name", "Duplicate name of the port: %s", p.Name)
			}
			if !portName(p.Name) {
				c.fail(pat+".name", "Invalid name of the port: %s", p.Name)
			}
			names[p.Name] = true
		}
		key := fmt.Sprintf("%d/%s", p.Port, protocolOr(p.Protocol))
		if numbers[key] && p.Port != 0 {
			c.fail(pat+".port", "port %s is listed twice on this interface; remove one", key)
		}
		numbers[key] = true
		if len(c.faults) > maxFaults {
			return
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

// dhcp is V36 to V38 and lengths that do not fit an option.
func (c *checker) dhcp(f *InterfaceSpec, at string) {
	d := &f.DHCP
	outside, twice := false, false
	seen := map[int64]bool{}
	for _, p := range d.Private {
		outside = outside || p.Option < 224 || p.Option > 254
		twice = twice || seen[p.Option]
		seen[p.Option] = true
	}
	if outside {
		c.fail(c.Path, "provided DHCPPrivateOptions are out of range, must be in range 224 to 254")
	}
	if twice {
		c.fail(c.Path, "Found Duplicates: you have provided duplicate DHCPPrivateOptions")
	}
	for k, s := range d.NTPServers {
		if _, ok := parseIPv4(s); !ok {
			c.fail(fmt.Sprintf("%s.dhcpOptions.ntpServers[%d]", at, k), "NTP servers must be a list of valid IPv4 addresses.")
		}
	}
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
