package vmi

import (
	"strings"

	"go.yaml.in/yaml/v3"
)

// MacvtapPool is a link of the node's that macvtaps may be made on, as the configuration of KubeVirt's macvtap device
// plugin has it.
type MacvtapPool struct {
	Name        string // of the resource, macvtap.network.kubevirt.io/NAME
	LowerDevice string // the link
	Mode        string // bridge, private, vepa, or passthru, which the device plugin does not have
	Capacity    int    // how many macvtaps there may be, at least 1
}

const (
	macvtapResource = "macvtap.network.kubevirt.io/"
	macvtapMode     = "bridge"
	macvtapCapacity = 100
)

// macvtapPool is the pool that a definition's resource means, nil if it means none. Where no pool is configured every
// link is one.
func (docs *Docs) macvtapPool(nad *NAD) *MacvtapPool {
	name, ok := strings.CutPrefix(nad.ResourceName, macvtapResource)
	if !ok || name == "" {
		return nil
	}
	for i := range docs.MacvtapPools {
		if docs.MacvtapPools[i].Name == name {
			return &docs.MacvtapPools[i]
		}
	}
	if len(docs.MacvtapPools) > 0 && !docs.MacvtapAll {
		return nil
	}
	return &MacvtapPool{Name: name, LowerDevice: name, Mode: macvtapMode, Capacity: macvtapCapacity}
}

// configMap reads the one of the macvtap device plugin; others do not concern us.
func (d *decoder) configMap(_ *Docs, _ *yaml.Node) {}
