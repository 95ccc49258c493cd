package vmi

import "slices"

// Unsupported lists what is right by [Validate] but cannot be served: not by this release, or not with the
// definitions that are given. It shrinks as bindings are added; every entry is one `if`.
func Unsupported(docs Docs) []Fault {
	var faults []Fault
	docs, _ = docs.withDefaults()
	for i := range docs.VMIs {
		v := &docs.VMIs[i]
		say := func(field, format string, args ...any) {
			if len(faults) < maxFaults {
				faults = append(faults, v.fault(Error, field, "not supported yet: "+format, args...))
			}
		}
		if v.istio != "" && v.bridgesPod() && len(faults) < maxFaults {
			faults = append(faults, v.fault(Warning, v.istio, "the guest's traffic does not pass Istio's proxy: with a bridge the pod has no address; use masquerade: {}"))
		}
		if !v.domain() && len(faults) < maxFaults {
			// The API's schema refuses it. It would get the default interface, which takes the pod's place.
			faults = append(faults, v.fault(Error, v.Path+".domain", "is not there: this is no machine that could run"))
		}
		for j := range v.Spec.Interfaces {
			f := &v.Spec.Interfaces[j]
			unsupportedInterface(f, v.interfacePath(j), say)
			if f.has(PluginBound) && !slices.Contains(docs.Cluster.Plugins, f.Plugin) && len(faults) < maxFaults {
				// V49, which KubeVirt says when it makes the pod.
				faults = append(faults, v.fault(Error, v.interfacePath(j)+".binding.name", "couldn't find configuration for network binding: %s", f.Plugin))
			}
			if k, multus := v.multusOf(f); multus != nil && len(faults) < maxFaults {
				faults = append(faults, docs.attachFaults(v, f, k)...)
			}
		}
		for j, n := range v.Spec.Networks {
			if n.Pod != nil && n.Pod.CIDR6 != "" && v.slirpsBy(n.Name) && len(faults) < maxFaults {
				faults = append(faults, v.fault(Warning, v.networkPath(j)+".pod.vmIPv6NetworkCIDR",
					"not supported yet: slirp carries no IPv6 of the guest, only its IPv4; use masquerade: {}"))
			}
			if n.Claim != nil {
				say(v.networkPath(j)+".resourceClaim", "a network by resource claim; use pod: {}")
			}
		}
	}
	_, full := docs.leases()
	return append(faults, full...)
}

func unsupportedInterface(f *InterfaceSpec, at string, say func(field, format string, args ...any)) {
	for _, b := range f.Bindings {
		switch b {
		case Masquerade, Slirp, Bridge, Macvtap, SRIOV, Passt: // the last is refused by Validate
		case PluginBound:
			say(at+".binding", "binding plugin %s; use masquerade: {}", f.Plugin)
		default:
			say(at+"."+string(b), "binding %s; use masquerade: {}", b)
		}
	}
	if f.State == Down && f.has(Macvtap) {
		say(at+".state", "state down of a macvtap; use up, and QEMU's set_link")
	}
}

// domain says whether the spec has one.
func (v *VMI) domain() bool {
	_, ok := v.lines[v.Path+".domain"]
	return ok
}

// slirpsBy says whether an interface with slirp is on the network.
func (v *VMI) slirpsBy(network string) bool {
	return slices.ContainsFunc(v.Spec.Interfaces, func(f InterfaceSpec) bool { return f.Name == network && f.has(Slirp) })
}

// bridgesPod says whether the VMI has a bridge on the pod network.
func (v *VMI) bridgesPod() bool {
	return slices.ContainsFunc(v.Spec.Interfaces, func(f InterfaceSpec) bool {
		return f.has(Bridge) && slices.ContainsFunc(v.Spec.Networks, func(n NetworkSpec) bool { return n.Name == f.Name && n.Pod != nil })
	})
}
