package oracle

import (
	"fmt"
	"math/rand/v2"
	"strings"

	"sigs.k8s.io/yaml"
)

// generator makes specs: mostly sound ones, of which some fields were then spoilt.
type generator struct {
	*rand.Rand
	spoil int // percent of fields that get a value from the whole pool instead of a sound one
}

type object = map[string]any

// pick takes one of the first n values, or when the field is to be spoilt of all of them.
func pick[T any](g *generator, sound int, values ...T) T {
	if g.IntN(100) < g.spoil {
		return values[g.IntN(len(values))]
	}
	return values[g.IntN(sound)]
}

func (g *generator) chance(percent int) bool { return g.IntN(100) < percent }

// document is a VMI, a VM or the guide's VM, sometimes with a KubeVirt CR after it.
func (g *generator) document() string {
	spec := g.machineSpec()
	meta := object{"name": "v"}
	var doc object
	switch g.IntN(3) {
	case 0:
		doc = object{"kind": "VirtualMachineInstance", "metadata": meta, "spec": spec}
	case 1:
		doc = object{"kind": "VirtualMachine", "metadata": meta, "spec": object{"template": object{"spec": spec}}}
	default:
		doc = object{"kind": "VM", "metadata": meta, "spec": spec}
	}
	text := g.text(doc)
	if g.chance(40) {
		text += "\n---\n" + g.text(g.cluster())
	}
	return text
}

func (g *generator) text(doc object) string {
	b, err := yaml.Marshal(doc)
	if err != nil {
		panic(err)
	}
	if g.chance(20) {
		if b, err = yaml.YAMLToJSON(b); err != nil {
			panic(err)
		}
	}
	return string(b)
}

func (g *generator) cluster() object {
	gates := []any{}
	for _, name := range []string{"Macvtap", "PasstBinding", "PortRangesSpec", "NetworkDevicesWithDRA", "WorkloadEncryptionTDX", "Nonsense"} {
		if g.chance(60) {
			gates = append(gates, name)
		}
	}
	network := object{}
	if g.chance(40) {
		network["permitBridgeInterfaceOnPodNetwork"] = g.chance(50)
	}
	if g.chance(30) {
		network["permitSlirpInterface"] = g.chance(50)
	}
	if g.chance(40) {
		network["defaultNetworkInterface"] = pick(g, 2, "bridge", "masquerade", "slirp")
		if network["defaultNetworkInterface"] == "slirp" {
			delete(network, "permitSlirpInterface") // with it we serve what KubeVirt refuses
		}
	}
	if g.chance(20) {
		network["binding"] = object{"plug": object{"sidecarImage": "i"}, "other": object{}}
	}
	developer := object{}
	if g.chance(80) {
		developer["featureGates"] = gates
	}
	if g.chance(20) {
		developer["disabledFeatureGates"] = []any{pick(g, 2, "PasstBinding", "WorkloadEncryptionSEV", "PortRangesSpec")}
	}
	return object{"kind": "KubeVirt", "metadata": object{"name": "kubevirt"},
		"spec": object{"configuration": object{"network": network, "developerConfiguration": developer}}}
}

func (g *generator) machineSpec() object {
	devices := object{}
	spec := object{"domain": object{"devices": devices, "memory": object{"guest": "512Mi"}}}
	if g.chance(5) {
		return spec
	}
	names := []string{"a", "b", "c", "d"}
	g.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
	n := 1 + g.IntN(3)
	var interfaces, networks []any
	for i := range n {
		name := names[i]
		f, w := g.pair(i == 0)
		f["name"], w["name"] = g.name(name), g.name(name)
		interfaces, networks = append(interfaces, f), append(networks, w)
	}
	if g.chance(g.spoil) {
		interfaces = append(interfaces, interfaces[g.IntN(len(interfaces))])
	}
	if g.chance(g.spoil) {
		networks = append(networks, networks[g.IntN(len(networks))])
	}
	if g.chance(g.spoil / 3) {
		interfaces = interfaces[1:]
	}
	if g.chance(g.spoil / 3) {
		networks = networks[1:]
	}
	if g.chance(20) {
		g.Shuffle(len(networks), func(i, j int) { networks[i], networks[j] = networks[j], networks[i] })
	}
	devices["interfaces"], spec["networks"] = interfaces, networks
	g.beside(spec, devices)
	return spec
}

func (g *generator) name(name string) any {
	if g.chance(g.spoil / 2) {
		return pick(g, 1, "a", "", "b", "net 1", "x.y", "ü", "A_b-9", "q\"uote", strings.Repeat("n", 70))
	}
	return name
}

// pair is an interface and its network.
func (g *generator) pair(primary bool) (f, w object) {
	f, w = object{}, object{}
	if primary {
		w["pod"] = object{}
		f[pick(g, 2, "masquerade", "bridge", "sriov", "passtBinding", "binding", "slirp", "macvtap", "passt")] = object{}
		if g.chance(20) {
			w["pod"] = object{"vmNetworkCIDR": pick(g, 2, "10.10.0.0/24", "10.10.010.0/24"), "vmIPv6NetworkCIDR": "fd10:10::/120"}
		}
	} else {
		w["multus"] = object{"networkName": pick(g, 2, "n", "ns/n", "")}
		f[pick(g, 2, "bridge", "sriov", "masquerade", "passtBinding", "binding", "slirp", "macvtap", "passt")] = object{}
	}
	if g.chance(g.spoil / 2) {
		f[pick(g, 1, "bridge", "masquerade", "sriov", "binding", "slirp", "macvtap", "passtBinding", "passt")] = object{}
	}
	if g.chance(g.spoil / 3) {
		for _, b := range []string{"bridge", "masquerade", "sriov"} {
			delete(f, b)
		}
	}
	if b, ok := f["binding"]; ok {
		b.(object)["name"] = "plug"
	}
	if g.chance(g.spoil / 2) {
		switch g.IntN(5) {
		case 0:
			w["pod"] = object{}
		case 1:
			w["multus"] = object{"networkName": pick(g, 1, "m", ""), "default": g.chance(50)}
		case 2:
			w["resourceClaim"] = g.claim()
		case 3:
			delete(w, "pod")
			delete(w, "multus")
			w["resourceClaim"] = g.claim()
		default:
			delete(w, "pod")
			delete(w, "multus")
		}
	}
	g.fields(f)
	return f, w
}

func (g *generator) claim() object {
	return object{"claimName": pick(g, 2, "c1", "c2", "", "nowhere"), "requestName": pick(g, 2, "r1", "r1", "")}
}

// fields are those of an interface that stand beside its binding.
func (g *generator) fields(f object) {
	maybe := func(key string, percent int, value func() any) {
		if g.chance(percent) {
			f[key] = value()
		}
	}
	maybe("model", 40, func() any {
		return pick(g, 7, "virtio", "e1000", "e1000e", "igb", "ne2k_pci", "pcnet", "rtl8139", "", "vmxnet3", "VIRTIO")
	})
	maybe("macAddress", 40, func() any {
		return pick(g, 3, "02:00:00:00:00:0a", "DE-AD-00-00-BE-AF", "", "02:00:00:00:00:00", "02-00-00-00-00-00", "zz:00", "01:00:5e:00:00:01",
			"00:00:00:00:00:00", "02:00:00:00:00:00:00:01", "0200.0000.000a", "02:00:00:00:00", "hello")
	})
	maybe("pciAddress", 30, func() any {
		return pick(g, 2, "0000:01:02.0", "0000:81:00.1", "", "81:00.1", "0000:00:00.0", "1000:00:02.0", "0000:01:40.0", "0000:81:00.8")
	})
	maybe("bootOrder", 30, func() any { return pick(g, 3, 1, 2, 3, 0, 1, 4294967295) })
	maybe("ports", 40, func() any { return g.list(4, func() any { return g.port() }) })
	maybe("portRanges", 20, func() any { return g.list(pick(g, 1, 3, 12), func() any { return g.portRange() }) })
	maybe("state", 30, func() any { return pick(g, 2, "up", "", "down", "absent", "foo", "Up") })
	maybe("acpiIndex", 20, func() any { return pick(g, 2, 101, 0, 7, 16384, -1) })
	maybe("tag", 20, func() any { return "tag" })
	maybe("dhcpOptions", 40, func() any {
		o := object{"bootFileName": pick(g, 1, "f", strings.Repeat("x", 300)), "tftpServerName": "t"}
		if g.chance(60) {
			o["ntpServers"] = g.list(3, func() any {
				return pick(g, 2, "127.0.0.3", "0127.0.0.3", "::1", "::ffff:1.2.3.4", "ntp.example.com", "", "1.2.3", "256.1.1.1", "1.2.3.4 ", "fe80::1%eth0")
			})
		}
		if g.chance(60) {
			o["privateOptions"] = g.list(3, func() any {
				return object{"option": pick(g, 3, 224, 240, 254, 223, 255, 0, -1, 240), "value": pick(g, 1, "x", "", strings.Repeat("v", 256))}
			})
		}
		return o
	})
}

func (g *generator) list(most int, item func() any) []any {
	out := []any{}
	for range g.IntN(most + 1) {
		out = append(out, item())
	}
	return out
}

func (g *generator) port() object {
	p := object{}
	if !g.chance(g.spoil / 3) {
		p["port"] = pick(g, 4, 80, 443, 1+g.IntN(65535), 1+g.IntN(65535), 0, -1, 65536, 65535, 80)
	}
	if g.chance(50) {
		p["protocol"] = pick(g, 2, "TCP", "UDP", "", "tcp", "SCTP", "ICMP")
	}
	if g.chance(50) {
		p["name"] = pick(g, 2, fmt.Sprint("p", g.IntN(4)), "http", "", "Bad_Name!", "-x", "x--y", "1234", "abcdefghijklmnop", "http")
	}
	return p
}

func (g *generator) portRange() object {
	start := 1 + g.IntN(2000)
	r := object{"protocol": pick(g, 2, "TCP", "UDP", "", "udp"), "start": pick(g, 1, start, 0, -5, 65536, 70000), "end": pick(g, 1, start+g.IntN(300), 0, 65535, 65536, 5)}
	if g.chance(g.spoil / 3) {
		delete(r, pick(g, 3, "protocol", "start", "end"))
	}
	return r
}

// beside are the fields of a spec that the network's rules, or those about what reaches it, look at.
func (g *generator) beside(spec, devices object) {
	domain := spec["domain"].(object)
	maybe := func(in object, key string, percent int, value func() any) {
		if g.chance(percent) {
			in[key] = value()
		}
	}
	maybe(devices, "useVirtioTransitional", 10, func() any { return g.chance(50) })
	maybe(domain, "cpu", 20, func() any { return object{"sockets": 1 + g.IntN(3), "cores": 1 + g.IntN(3), "threads": 1} })
	maybe(domain, "resources", 20, func() any {
		return object{"requests": object{"memory": pick(g, 2, "512Mi", "1Gi"), "cpu": pick(g, 2, "2", "500m")}, "limits": object{"memory": "1Gi", "cpu": 2}}
	})
	maybe(domain, "memory", 10, func() any { return object{"guest": "1Gi", "hugepages": object{"pageSize": "2Mi"}} })
	maybe(devices, "networkInterfaceMultiqueue", 20, func() any { return g.chance(50) })
	maybe(devices, "autoattachPodInterface", 20, func() any { return g.chance(50) })
	maybe(devices, "disks", 30, func() any {
		disks, volumes := []any{}, []any{}
		for i := range 1 + g.IntN(3) {
			name := fmt.Sprint("disk", i)
			disk := object{"name": name, "disk": object{}}
			if g.chance(60) {
				disk["bootOrder"] = pick(g, 3, 4, 5, 6, 1, 2, 0)
			}
			disks = append(disks, disk)
			volumes = append(volumes, object{"name": name, "emptyDisk": object{"capacity": "1Gi"}})
		}
		spec["volumes"] = volumes
		return disks
	})
	host := func() any {
		return pick(g, 2, "vm", "a-b", "Not_A_Host", "a.b", "-a", strings.Repeat("x", 64), strings.Repeat("x.", 150)+"x")
	}
	maybe(spec, "hostname", 15, host)
	maybe(spec, "subdomain", 15, host)
	maybe(spec, "architecture", 10, func() any { return pick(g, 1, "amd64", "s390x", "arm64") })
	maybe(spec, "resourceClaims", 30, func() any {
		return g.list(3, func() any {
			c := object{"name": pick(g, 2, "c1", "c2", "", "Bad", "x.y")}
			if !g.chance(g.spoil / 2) {
				c[pick(g, 2, "resourceClaimName", "resourceClaimTemplateName")] = pick(g, 1, "claim", "Bad Claim")
			}
			maybe(c, "resourceClaimName", g.spoil/3, func() any { return "other" })
			return c
		})
	})
	probe := func() any {
		p := object{}
		for _, h := range []string{"httpGet", "tcpSocket", "exec", "guestAgentPing"} {
			if g.chance(20 + g.spoil/4) {
				p[h] = object{}
				if h == "httpGet" || h == "tcpSocket" {
					p[h] = object{"port": 80}
				}
			}
		}
		return p
	}
	maybe(spec, "readinessProbe", 15, probe)
	maybe(spec, "livenessProbe", 15, probe)
	maybe(spec, "dnsPolicy", 15, func() any { return pick(g, 2, "ClusterFirst", "Default", "None", "ClusterFirstWithHostNet", "Foo") })
	maybe(spec, "dnsConfig", 15, func() any {
		return object{
			"nameservers": g.list(5, func() any { return pick(g, 2, "01.1.1.1", "2001:DB8::1", "x", "1.1.1") }),
			"searches":    g.list(8, func() any { return pick(g, 2, "example.com", "svc.cluster.local", "Bad_", strings.Repeat("y", 60)) }),
			"options":     g.list(2, func() any { return object{"name": pick(g, 1, "ndots", "")} }),
		}
	})
	maybe(domain, "launchSecurity", 15, func() any {
		l := object{}
		maybe(l, "sev", 60, func() any {
			s := object{}
			maybe(s, "attestation", 30, func() any { return object{} })
			return s
		})
		maybe(l, "snp", 20, func() any { return object{} })
		maybe(l, "tdx", 30, func() any { return object{} })
		return l
	})
	maybe(spec, "startStrategy", 10, func() any { return "Paused" })
	maybe(domain, "firmware", 20, func() any {
		efi := object{}
		maybe(efi, "secureBoot", 60, func() any { return g.chance(40) })
		maybe(efi, "persistent", 40, func() any { return g.chance(50) })
		return object{"bootloader": object{"efi": efi}}
	})
	maybe(domain, "features", 20, func() any {
		smm := object{}
		maybe(smm, "enabled", 60, func() any { return g.chance(50) })
		return object{"smm": smm}
	})
}
