package vmi

import "go.yaml.in/yaml/v3"

// SRIOVCNI is what a definition of type sriov asks of its virtual function; a nil pointer and an empty string were not
// said.
type SRIOVCNI struct {
	VLAN, VLANQoS        int
	VLANProto            string // "802.1q" or "802.1ad"
	SpoofCheck, Trust    *bool
	LinkState            string // "auto", "enable" or "disable"
	MinTxRate, MaxTxRate *int   // Mbit/s, 0 for no limit
	DeviceID             string // PCI address of the function
	MTU                  int    // in bytes, 0 if not said
}

// sriovPolicy is what a SriovNetworkNodePolicy says of the functions of a resource.
type sriovPolicy struct {
	resource string
	mtu      int
}

// sriovNetwork reads a SriovNetwork and makes the definition of it that the operator makes.
func (d *decoder) sriovNetwork(_ *Docs, _ *yaml.Node) {}

// sriovPolicy reads a SriovNetworkNodePolicy.
func (d *decoder) sriovPolicy(_ *Docs, _ *yaml.Node) {}
