package vmi

import (
	"slices"

	"go.yaml.in/yaml/v3"
)

// Cluster is what a KubeVirt CR says of networks (spec.configuration); a nil pointer, a nil list or an empty string was
// not said.
type Cluster struct {
	DefaultInterface string   // defaultNetworkInterface: bridge, masquerade or slirp
	PermitBridge     *bool    // permitBridgeInterfaceOnPodNetwork
	PermitSlirp      *bool    // permitSlirpInterface
	FeatureGates     []string // developerConfiguration.featureGates; nil is not said, which is not the same as none
	DisabledGates    []string // developerConfiguration.disabledFeatureGates
	Plugins          []string // names of the binding plugins, in order
}

// Feature gates that concern interfaces, by KubeVirt's names. They are case sensitive.
const (
	GateMacvtap    = "Macvtap"
	GatePasst      = "Passt"
	GatePasstCore  = "PasstBinding"
	GatePortRanges = "PortRangesSpec"
	GateDRA        = "NetworkDevicesWithDRA"
	GateSEV        = "WorkloadEncryptionSEV"
	GateTDX        = "WorkloadEncryptionTDX"
)

// openGates are open unless they are disabled: KubeVirt's in beta. Macvtap is one of them only where nothing lists
// gates, see [Cluster.Gate].
var openGates = []string{GatePasstCore, GateSEV}

// Gate says whether a feature gate is open, as KubeVirt decides it. Where nothing lists gates, that of macvtap is open
// too: the binding is served here whatever became of it in KubeVirt.
func (c *Cluster) Gate(name string) bool {
	switch {
	case slices.Contains(c.FeatureGates, name):
		return true
	case slices.Contains(c.DisabledGates, name):
		return false
	case name == GateMacvtap:
		return c.FeatureGates == nil
	}
	return slices.Contains(openGates, name)
}

// SetCluster merges settings given beside the documents: what they say beats what a KubeVirt CR says.
func (docs *Docs) SetCluster(flags Cluster) {
	docs.Cluster.merge(flags)
}

func (c *Cluster) merge(over Cluster) {
	if over.DefaultInterface != "" {
		c.DefaultInterface = over.DefaultInterface
	}
	if over.PermitBridge != nil {
		c.PermitBridge = over.PermitBridge
	}
	if over.PermitSlirp != nil {
		c.PermitSlirp = over.PermitSlirp
	}
	if over.FeatureGates != nil {
		c.FeatureGates = over.FeatureGates
	}
	if over.DisabledGates != nil {
		c.DisabledGates = over.DisabledGates
	}
}

// cluster reads a KubeVirt CR, whose kind the guide spells Kubevirt too.
func (d *decoder) cluster(docs *Docs, root *yaml.Node) {
	c := &docs.Cluster
	ptr := func(dst **bool) func(*yaml.Node, string) {
		return func(n *yaml.Node, p string) { b := d.boolean(n, p); *dst = &b }
	}
	at := func(next fields) func(*yaml.Node, string) {
		return func(n *yaml.Node, p string) { d.object(n, p, false, next) }
	}
	gates := func(dst *[]string) func(*yaml.Node, string) {
		return func(n *yaml.Node, p string) {
			*dst = []string{}
			d.list(n, p, maxList, func(n *yaml.Node, p string) { *dst = append(*dst, d.text(n, p)) })
		}
	}
	d.names = true
	defer func() {
		d.names = false
		d.checkNames(root, typeKubeVirt, nil)
	}()
	d.object(root, "", false, fields{"spec": at(fields{"configuration": at(fields{
		"network": at(fields{
			"defaultNetworkInterface": func(n *yaml.Node, p string) {
				switch s := d.text(n, p); Binding(s) {
				case "", Bridge, Masquerade, Slirp:
					c.DefaultInterface = s
				default: // KubeVirt passes over the whole CR
					d.fault(n, p, "invalid default-network-interface in config: %s", s)
				}
			},
			"permitBridgeInterfaceOnPodNetwork": ptr(&c.PermitBridge),
			"permitSlirpInterface":              ptr(&c.PermitSlirp),
			"binding": func(n *yaml.Node, p string) {
				for _, plugin := range d.pairs(n, p) {
					c.Plugins = append(c.Plugins, plugin.key)
				}
				slices.Sort(c.Plugins)
			},
		}),
		"developerConfiguration": at(fields{
			"featureGates":         gates(&c.FeatureGates),
			"disabledFeatureGates": gates(&c.DisabledGates),
		}),
	})})})
}
