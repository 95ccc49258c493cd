package main

import (
	"net/netip"
	"slices"

	"sidewire/engine/vmi"
)

// MachineStatus is a VMI as KubeVirt's status has it.
type MachineStatus struct {
	Name       string             `json:"name"`
	Namespace  string             `json:"namespace,omitempty"`
	Interfaces []MachineInterface `json:"interfaces"`
}

// MachineInterface has the fields of KubeVirt's status.interfaces, as far as
// they can be known without an agent in the guest, and the interface's tag.
type MachineInterface struct {
	IPAddress        string   `json:"ipAddress,omitempty"` // by which others reach the guest: masquerade's and slirp's is the pod's
	MAC              string   `json:"mac,omitempty"`
	Name             string   `json:"name"` // of the network
	IPAddresses      []string `json:"ipAddresses,omitempty"`
	PodInterfaceName string   `json:"podInterfaceName,omitempty"`
	InfoSource       string   `json:"infoSource"`
	QueueCount       int      `json:"queueCount"`
	LinkState        string   `json:"linkState"`
	Tag              string   `json:"tag,omitempty"` // for whoever makes the guest's config drive
}

// machines sorts the interfaces by their VMI.
func machines(open []served, ifaces []InterfaceStatus) []MachineStatus {
	var out []MachineStatus
	for k, n := range open {
		vm := n.base().vm
		at := slices.IndexFunc(out, func(m MachineStatus) bool { return m.Name == vm.Name })
		if at < 0 {
			at, out = len(out), append(out, MachineStatus{Name: vm.Name, Namespace: vm.Namespace})
		}
		out[at].Interfaces = append(out[at].Interfaces, machineInterface(n.base().iface, &ifaces[k]))
	}
	return out
}

func machineInterface(i vmi.Interface, st *InterfaceStatus) MachineInterface {
	m := MachineInterface{
		Name: i.Name, MAC: st.MAC, QueueCount: st.QueueCount, LinkState: st.LinkState, InfoSource: "domain", Tag: i.Tag,
		PodInterfaceName: st.Link,
	}
	if i.Network.NetworkName != "" {
		m.InfoSource = "domain, multus-status"
		if m.PodInterfaceName == "" && st.Switch != nil && len(st.Links) == 1 && st.Links[0].Name == st.Switch.Name {
			m.PodInterfaceName = st.Switch.Name // the link that its CNI left
		}
	}
	if h := st.Handoff; h != nil && m.PodInterfaceName == "" {
		m.PodInterfaceName = h.Link
	}
	addrs := []netip.Addr{st.Pod}
	if i.Binding == vmi.Bridge {
		addrs = []netip.Addr{st.Guest}
		for _, l := range st.Leases {
			addrs = append(addrs, l.Addr)
		}
	}
	for _, a := range addrs {
		if a.IsValid() && !slices.Contains(m.IPAddresses, a.String()) {
			m.IPAddresses = append(m.IPAddresses, a.String())
		}
	}
	if len(m.IPAddresses) > 0 {
		m.IPAddress = m.IPAddresses[0]
	}
	return m
}
