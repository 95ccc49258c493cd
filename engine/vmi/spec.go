package vmi

import (
	"maps"
	"slices"

	"go.yaml.in/yaml/v3"
)

// The readers below name every field that the API has in a place where unknown ones are a fault (interfaces[*] and
// networks[*]); elsewhere they name only what we use.

func (d *decoder) spec(n *yaml.Node, path string, s *Spec, more fields) {
	f := fields{
		"hostname":  func(n *yaml.Node, p string) { s.Hostname = d.text(n, p) },
		"subdomain": func(n *yaml.Node, p string) { s.Subdomain = d.text(n, p) },
		"domain":    func(n *yaml.Node, p string) { d.domain(n, p, s) },
		"networks": func(n *yaml.Node, p string) {
			s.networksExceed = d.list(n, p, maxList, func(n *yaml.Node, p string) {
				s.Networks = append(s.Networks, d.network(n, p))
			})
		},
	}
	maps.Copy(f, d.admitted(&s.admitted))
	maps.Copy(f, more)
	d.object(n, path, false, f)
}

func (d *decoder) domain(n *yaml.Node, path string, s *Spec) {
	resources := func(r *Resources) func(*yaml.Node, string) {
		return func(n *yaml.Node, p string) {
			d.object(n, p, false, fields{
				"cpu":    func(n *yaml.Node, p string) { r.CPU = d.quantity(n, p) },
				"memory": func(n *yaml.Node, p string) { r.Memory = d.quantity(n, p) },
			})
		}
	}
	f := d.admittedDomain(&s.admitted)
	maps.Copy(f, fields{
		"cpu": func(n *yaml.Node, p string) {
			d.object(n, p, false, fields{
				"sockets": func(n *yaml.Node, p string) { s.CPU.Sockets = d.number(n, p) },
				"cores":   func(n *yaml.Node, p string) { s.CPU.Cores = d.number(n, p) },
				"threads": func(n *yaml.Node, p string) { s.CPU.Threads = d.number(n, p) },
			})
		},
		"memory": func(n *yaml.Node, p string) {
			d.object(n, p, false, fields{
				"guest": func(n *yaml.Node, p string) { s.GuestMemory = d.quantity(n, p) },
				"hugepages": func(n *yaml.Node, p string) {
					d.object(n, p, false, fields{
						"pageSize": func(n *yaml.Node, p string) { s.HugepageSize = d.quantity(n, p) },
					})
				},
			})
		},
		"resources": func(n *yaml.Node, p string) {
			d.object(n, p, false, fields{"requests": resources(&s.Requests), "limits": resources(&s.Limits)})
		},
		"devices": func(n *yaml.Node, p string) { d.devices(n, p, s) },
	})
	d.object(n, path, false, f)
}

func (d *decoder) devices(n *yaml.Node, path string, s *Spec) {
	d.object(n, path, false, fields{
		"networkInterfaceMultiqueue": func(n *yaml.Node, p string) { s.Multiqueue = d.boolean(n, p) },
		"autoattachPodInterface":     func(n *yaml.Node, p string) { b := d.boolean(n, p); s.AutoattachPod = &b },
		"useVirtioTransitional":      func(n *yaml.Node, p string) { s.Transitional = d.boolean(n, p) },
		"disks": func(n *yaml.Node, p string) {
			d.list(n, p, maxList, func(n *yaml.Node, p string) {
				var order *int64
				d.object(n, p, false, fields{
					"bootOrder": func(n *yaml.Node, p string) { order = d.numberPtr(n, p) },
				})
				s.DiskBootOrders = append(s.DiskBootOrders, order)
			})
		},
		"interfaces": func(n *yaml.Node, p string) {
			s.interfacesExceed = d.list(n, p, maxList, func(n *yaml.Node, p string) {
				s.Interfaces = append(s.Interfaces, d.interfaceSpec(n, p))
			})
		},
	})
}

func (d *decoder) interfaceSpec(n *yaml.Node, path string) (i InterfaceSpec) {
	empty := func(b Binding) func(*yaml.Node, string) {
		return func(n *yaml.Node, p string) {
			d.object(n, p, true, fields{})
			i.Bindings = append(i.Bindings, b)
		}
	}
	bindings := []Binding{Bridge, Slirp, SRIOV, Macvtap, Passt, PasstCore, Masquerade, PluginBound}
	meant := d.object(n, path, true, fields{
		"name":             func(n *yaml.Node, p string) { i.Name = d.text(n, p) },
		"model":            func(n *yaml.Node, p string) { i.Model = d.text(n, p) },
		string(Bridge):     empty(Bridge),
		string(Slirp):      empty(Slirp),
		string(SRIOV):      empty(SRIOV),
		string(Macvtap):    empty(Macvtap),
		string(Passt):      empty(Passt),
		string(PasstCore):  empty(PasstCore),
		string(Masquerade): empty(Masquerade),
		string(PluginBound): func(n *yaml.Node, p string) {
			i.Bindings = append(i.Bindings, PluginBound)
			d.object(n, p, true, fields{"name": func(n *yaml.Node, p string) { i.Plugin = d.text(n, p) }})
		},
		"ports": func(n *yaml.Node, p string) {
			i.hasPorts = true
			d.list(n, p, 1<<17, func(n *yaml.Node, p string) { i.Ports = append(i.Ports, d.port(n, p)) })
		},
		"portRanges": func(n *yaml.Node, p string) {
			i.hasRanges = true
			d.list(n, p, maxList, func(n *yaml.Node, p string) { i.PortRanges = append(i.PortRanges, d.portRange(n, p)) })
		},
		"macAddress":  func(n *yaml.Node, p string) { i.MAC = d.text(n, p) },
		"bootOrder":   func(n *yaml.Node, p string) { i.BootOrder = d.numberPtr(n, p) },
		"pciAddress":  func(n *yaml.Node, p string) { i.PCIAddress = d.text(n, p) },
		"dhcpOptions": func(n *yaml.Node, p string) { i.DHCP = d.dhcp(n, p) },
		"tag":         func(n *yaml.Node, p string) { i.Tag = d.text(n, p) },
		"acpiIndex":   func(n *yaml.Node, p string) { i.ACPIIndex = d.numberPtr(n, p) },
		"state":       func(n *yaml.Node, p string) { i.State = d.text(n, p) },
	})
	i.misspelt = slices.ContainsFunc(meant, func(s string) bool { return slices.Contains(bindings, Binding(s)) })
	return i
}

func (d *decoder) port(n *yaml.Node, path string) (s PortSpec) {
	d.object(n, path, true, fields{
		"name":     func(n *yaml.Node, p string) { s.Name = d.text(n, p) },
		"protocol": func(n *yaml.Node, p string) { s.Protocol = d.text(n, p) },
		"port":     func(n *yaml.Node, p string) { s.Port = d.number(n, p) },
	})
	return s
}

func (d *decoder) portRange(n *yaml.Node, path string) (s PortRangeSpec) {
	d.object(n, path, true, fields{
		"protocol": func(n *yaml.Node, p string) { s.Protocol = d.text(n, p) },
		"start":    func(n *yaml.Node, p string) { s.Start = d.number(n, p) },
		"end":      func(n *yaml.Node, p string) { s.End = d.number(n, p) },
	})
	return s
}

func (d *decoder) dhcp(n *yaml.Node, path string) (s DHCPSpec) {
	d.object(n, path, true, fields{
		"bootFileName":   func(n *yaml.Node, p string) { s.BootFile = d.text(n, p) },
		"tftpServerName": func(n *yaml.Node, p string) { s.TFTPServer = d.text(n, p) },
		"ntpServers": func(n *yaml.Node, p string) {
			d.list(n, p, maxList, func(n *yaml.Node, p string) { s.NTPServers = append(s.NTPServers, d.text(n, p)) })
		},
		"privateOptions": func(n *yaml.Node, p string) {
			d.list(n, p, maxList, func(n *yaml.Node, p string) {
				var o PrivateSpec
				d.object(n, p, true, fields{
					"option": func(n *yaml.Node, p string) { o.Option = d.number(n, p) },
					"value":  func(n *yaml.Node, p string) { o.Value = d.text(n, p) },
				})
				s.Private = append(s.Private, o)
			})
		},
	})
	return s
}

func (d *decoder) network(n *yaml.Node, path string) (s NetworkSpec) {
	d.object(n, path, true, fields{
		"name": func(n *yaml.Node, p string) { s.Name = d.text(n, p) },
		"pod": func(n *yaml.Node, p string) {
			s.Pod = &PodSpec{}
			d.object(n, p, true, fields{
				"vmNetworkCIDR":     func(n *yaml.Node, p string) { s.Pod.CIDR = d.text(n, p) },
				"vmIPv6NetworkCIDR": func(n *yaml.Node, p string) { s.Pod.CIDR6 = d.text(n, p) },
			})
		},
		"multus": func(n *yaml.Node, p string) {
			s.Multus = &MultusSpec{}
			d.object(n, p, true, fields{
				"networkName": func(n *yaml.Node, p string) { s.Multus.NetworkName = d.text(n, p) },
				"default":     func(n *yaml.Node, p string) { s.Multus.Default = d.boolean(n, p) },
			})
		},
		"resourceClaim": func(n *yaml.Node, p string) {
			s.Claim = &ClaimSpec{}
			d.object(n, p, true, fields{
				"claimName":   func(n *yaml.Node, p string) { s.Claim.ClaimName = d.text(n, p) },
				"requestName": func(n *yaml.Node, p string) { s.Claim.RequestName = d.text(n, p) },
			})
		},
	})
	return s
}
