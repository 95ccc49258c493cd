package main

import (
	"flag"
	"strconv"
	"strings"

	"sidewire/engine/vmi"
)

// said is a flag of true or false that knows whether it was given.
type said struct{ value **bool }

func (s said) String() string {
	if s.value == nil || *s.value == nil {
		return ""
	}
	return strconv.FormatBool(**s.value)
}

func (s said) Set(text string) error {
	b, err := strconv.ParseBool(text)
	*s.value = &b
	return err
}

// IsBoolFlag lets the flag stand without a value.
func (said) IsBoolFlag() bool { return true }

// gates is a list of feature gates; the flag given once, even without a name,
// closes every other.
type gates struct{ names *[]string }

func (g gates) String() string {
	if g.names == nil {
		return ""
	}
	return strings.Join(*g.names, ",")
}

func (g gates) Set(text string) error {
	if *g.names == nil {
		*g.names = []string{}
	}
	for _, name := range strings.Split(text, ",") {
		if name = strings.TrimSpace(name); name != "" {
			*g.names = append(*g.names, name)
		}
	}
	return nil
}

// registerCluster adds the flags that stand for a KubeVirt CR's settings. They
// beat those of a CR that is among the files.
func registerCluster(fs *flag.FlagSet, c *vmi.Cluster) {
	fs.Var(said{&c.PermitBridge}, "permit-bridge-on-pod-network", "`BOOL`: whether bridge: {} may be on the pod network, permitBridgeInterfaceOnPodNetwork of the KubeVirt CR (default true)")
	fs.Var(said{&c.PermitSlirp}, "permit-slirp", "`BOOL`: whether slirp: {} may be used, permitSlirpInterface of the KubeVirt CR (default true)")
	fs.Func("default-network-interface", "`BINDING` of a VMI that lists no interface: bridge, masquerade or slirp, defaultNetworkInterface of the KubeVirt CR (default bridge)", func(text string) error {
		switch c.DefaultInterface = text; vmi.Binding(text) {
		case vmi.Bridge, vmi.Masquerade, vmi.Slirp:
			return nil
		}
		return badInput("want bridge, masquerade or slirp")
	})
	fs.Var(gates{&c.FeatureGates}, "feature-gates", "`LIST` of the open feature gates, such as Macvtap,PortRangesSpec; \"\" for none (default: those of the KubeVirt CR; without one KubeVirt's own, and Macvtap)")
}
