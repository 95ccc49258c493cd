package vmi

import (
	"fmt"
	"slices"
	"strings"
)

// Define adds the definitions of more and what goes with them, and the faults in them. VMIs in it are passed over, and
// of a cluster's settings those that docs have too.
func (docs *Docs) Define(more Docs) {
	docs.documents += more.documents
	docs.NADs = append(docs.NADs, more.NADs...)
	docs.MacvtapPools = append(docs.MacvtapPools, more.MacvtapPools...)
	docs.MacvtapAll = docs.MacvtapAll || more.MacvtapAll
	docs.SRIOVPools = append(docs.SRIOVPools, more.SRIOVPools...)
	more.Cluster.merge(docs.Cluster)
	docs.Cluster = more.Cluster
	theirs := map[string]bool{}
	for i := range more.VMIs {
		v := &more.VMIs[i]
		theirs[oneLine(v.Name)] = true
		docs.faults = append(docs.faults, v.fault(Warning, "kind", "not served: this file was given for its definitions only; name it with -f"))
	}
	for _, f := range more.faults {
		if f.VMI == "" || !theirs[f.VMI] {
			docs.faults = append(docs.faults, f)
		}
	}
}

// nadOf finds the definition that a VMI's networkName means: one in the VMI's own namespace unless it names another.
func (docs *Docs) nadOf(v *VMI, networkName string) *NAD {
	key := nadKey(v, networkName)
	for i := range docs.NADs {
		if docs.NADs[i].Key() == key {
			return &docs.NADs[i]
		}
	}
	return nil
}

func nadKey(v *VMI, networkName string) string {
	if strings.Contains(networkName, "/") {
		return networkName
	}
	return namespaceOr(v.Namespace) + "/" + networkName
}

// attachFaults says what keeps the definition of an interface's network, which is the k-th, from being served by the
// interface's binding, and what is served otherwise than it reads. A function of a card is served without a definition
// too: whoever gave it to the pod has set it up.
func (docs *Docs) attachFaults(v *VMI, f *InterfaceSpec, k int) (faults []Fault) {
	m := v.Spec.Networks[k].Multus
	if m == nil || m.NetworkName == "" || m.Default && f.has(Bridge) || !f.has(Bridge) && !f.has(Macvtap) && !f.has(SRIOV) {
		return nil
	}
	text, warning := docs.attachFault(v, f, m.NetworkName)
	at := v.networkPath(k) + ".multus.networkName"
	if text != "" {
		faults = append(faults, v.fault(Error, at, "%s", text))
	}
	if warning != "" {
		faults = append(faults, v.fault(Warning, at, "%s", warning))
	}
	return faults
}

func (docs *Docs) attachFault(v *VMI, f *InterfaceSpec, networkName string) (text, warning string) {
	nad := docs.nadOf(v, networkName)
	switch {
	case nad == nil && f.has(SRIOV):
		return "", fmt.Sprintf("NetworkAttachmentDefinition %s is not given: the function is taken as it was set up", nadKey(v, networkName))
	case nad == nil && len(docs.NADs) == 0:
		return fmt.Sprintf("NetworkAttachmentDefinition %s is not given, nor is another; add its file with --nad FILE", nadKey(v, networkName)), ""
	case nad == nil:
		return fmt.Sprintf("NetworkAttachmentDefinition %s is not given; given are %s. Add its file with --nad FILE, or name one of them",
			nadKey(v, networkName), docs.nadList()), ""
	case nad.unread:
		return "", ""
	case nad.Config == nil:
		return fmt.Sprintf("NetworkAttachmentDefinition %s (%s) has no spec.config that can be read", nad.Key(), nad.place()), ""
	case nad.Type == "":
		return fmt.Sprintf("NetworkAttachmentDefinition %s (%s) has no type in spec.config; write \"type\": \"bridge\"", nad.Key(), nad.place()), ""
	case f.has(Macvtap):
		return docs.macvtapFault(nad)
	case f.has(SRIOV):
		return docs.sriovFault(nad)
	case nad.Switch == nil:
		return fmt.Sprintf("NetworkAttachmentDefinition %s (%s) is of type %q, which leaves no link for a bridge; use %[3]s: {}", nad.Key(), nad.place(), nad.Type), ""
	}
	return "", ""
}

// nadList names the definitions that there are.
func (docs *Docs) nadList() string {
	const most = 10
	var names []string
	for i := range docs.NADs {
		if len(names) == most {
			return fmt.Sprintf("%s and %d more", strings.Join(names, ", "), len(docs.NADs)-most)
		}
		n := &docs.NADs[i]
		names = append(names, fmt.Sprintf("%s (%s)", n.Key(), n.place()))
	}
	return strings.Join(names, ", ")
}

// sameNADs finds names that two definitions have. The same one twice, as where a file is given with -f and --nad, is no
// harm.
func sameNADs(docs Docs) (faults []Fault) {
	first := map[string]*NAD{}
	for i := range docs.NADs {
		n := &docs.NADs[i]
		other := first[n.Key()]
		switch {
		case other == nil:
			first[n.Key()] = n
		case (!slices.Equal(n.Config, other.Config) || n.asked() != other.asked()) && len(faults) < maxFaults:
			faults = append(faults, Fault{Field: "metadata.name", Severity: Error, File: n.File, Line: n.Line,
				Message: oneLine(fmt.Sprintf("NetworkAttachmentDefinition %s is in %s too, with another configuration or other annotations; remove one", n.Key(), other.place()))})
		}
	}
	return faults
}

// multusOf is the Multus network of an interface and its place; nil if it has none.
func (v *VMI) multusOf(f *InterfaceSpec) (int, *MultusSpec) {
	for k := range v.Spec.Networks {
		if n := &v.Spec.Networks[k]; n.Name == f.Name {
			return k, n.Multus
		}
	}
	return 0, nil
}
