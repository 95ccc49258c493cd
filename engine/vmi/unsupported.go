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
		if v.istio != "" && len(faults) < maxFaults {
			faults = append(faults, v.fault(Warning, v.istio, "%s", v.istioMissing()))
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
			if n.Pod != nil && n.Pod.CIDR6 != "" && len(faults) < maxFaults {
				faults = append(faults, v.fault(Warning, v.networkPath(j)+".pod.vmIPv6NetworkCIDR",
					"not supported yet: the guest's IPv6 is not carried, its IPv4 is"))
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

// istioMissing says what is not done for a VMI that is to be in an Istio mesh. KubeVirt gives such a guest nothing but
// port 22 directly: the rest goes through the proxy, whose own ports stay with the pod.
func (v *VMI) istioMissing() string {
	text := "not supported yet: the guest's traffic does not pass Istio's proxy, in neither direction"
	for i := range v.Spec.Interfaces {
		if f := &v.Spec.Interfaces[i]; f.has(Masquerade) && len(f.Ports)+len(f.PortRanges) == 0 {
			return text + "; as no ports are listed, the guest also takes those of the proxy (15000, 15001, 15004, 15006, " +
				"15008, 15009, 15020, 15021, 15053, 15090), from outside and on 127.0.0.1: list the guest's ports"
		}
	}
	return text
}
