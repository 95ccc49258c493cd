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
	FeatureGates     []string // developerConfiguration.featureGates; nil leaves every gate open
}

// Feature gates that concern interfaces, by KubeVirt's names. They are case sensitive.
const (
	GateMacvtap    = "Macvtap"
	GatePasst      = "Passt"
	GatePasstCore  = "PasstBinding"
	GatePortRanges = "PortRangesSpec"
)

// Gate says whether a feature gate is open. Where nothing lists gates they all are: a VMI is served as it stands.
func (c *Cluster) Gate(name string) bool {
	return c.FeatureGates == nil || slices.Contains(c.FeatureGates, name)
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
	d.object(root, "", false, fields{"spec": at(fields{"configuration": at(fields{
		"network": at(fields{
			"defaultNetworkInterface":           func(n *yaml.Node, p string) { c.DefaultInterface = d.text(n, p) },
			"permitBridgeInterfaceOnPodNetwork": ptr(&c.PermitBridge),
			"permitSlirpInterface":              ptr(&c.PermitSlirp),
		}),
		"developerConfiguration": at(fields{"featureGates": func(n *yaml.Node, p string) {
			c.FeatureGates = []string{}
			d.list(n, p, maxList, func(n *yaml.Node, p string) {
				c.FeatureGates = append(c.FeatureGates, d.text(n, p))
			})
		}}),
	})})})
}
