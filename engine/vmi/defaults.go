package vmi

import "slices"

// withDefaults gives each VMI that names neither an interface nor a network what KubeVirt's mutating webhook gives it:
// the cluster's default interface (a bridge, if nothing else is said) on the pod network, both named default, unless
// autoattachPodInterface is false. The faults are those of VMIs whose default interface the cluster does not permit
// (V50). The documents that it was called on stay as they are.
func (docs Docs) withDefaults() (Docs, []Fault) {
	var faults []Fault
	copied := false
	for i := range docs.VMIs {
		if !docs.VMIs[i].attachesDefault() {
			continue
		}
		if !copied {
			docs.VMIs, copied = slices.Clone(docs.VMIs), true
		}
		v := &docs.VMIs[i]
		f := InterfaceSpec{Name: "default"}
		refused := ""
		no := func(b *bool) bool { return b != nil && !*b }
		switch c := &docs.Cluster; c.DefaultInterface {
		default: // bridge, which is KubeVirt's own
			if f.Bindings = []Binding{Bridge}; no(c.PermitBridge) {
				refused = "bridge interface is not enabled in kubevirt-config"
			}
		case string(Masquerade):
			f.Bindings = []Binding{Masquerade}
		case string(Slirp):
			// Served where the cluster asks for it in so many words, as it was when KubeVirt had it.
			if f.Bindings = []Binding{Slirp}; c.PermitSlirp == nil || !*c.PermitSlirp {
				refused = "slirp interface is deprecated as of v1.3"
			}
		}
		if refused != "" {
			if len(faults) < maxFaults {
				faults = append(faults, v.fault(Error, v.interfacesPath(), "%s", refused))
			}
			continue
		}
		v.Spec.Interfaces = []InterfaceSpec{f}
		v.Spec.Networks = []NetworkSpec{{Name: "default", Pod: &PodSpec{}}}
	}
	return docs, faults
}

// attachesDefault says whether KubeVirt gives this VMI an interface that its spec does not name.
func (v *VMI) attachesDefault() bool {
	s := &v.Spec
	return len(s.Interfaces) == 0 && len(s.Networks) == 0 && (s.AutoattachPod == nil || *s.AutoattachPod)
}
