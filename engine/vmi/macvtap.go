package vmi

import (
	"fmt"
	"maps"
	"math"
	"net"
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
	Any         bool   // nobody chose links: only physical links and bonds are exposed
}

const (
	macvtapResource = "macvtap.network.kubevirt.io/"
	macvtapMode     = "bridge"
	macvtapCapacity = 100
)

// macvtapPool is the pool that a definition's resource means, nil if it means none. Where no pool is configured every
// link is one; and the guide names a pool by its link.
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
		for i := range docs.MacvtapPools {
			if docs.MacvtapPools[i].LowerDevice == name {
				return &docs.MacvtapPools[i]
			}
		}
		return nil
	}
	return &MacvtapPool{Name: name, LowerDevice: name, Mode: macvtapMode, Capacity: macvtapCapacity, Any: true}
}

// MacvtapCNI is what a definition of type macvtap asks of its link; zero values were not said.
type MacvtapCNI struct {
	MTU      int // in bytes
	MAC      net.HardwareAddr
	Promisc  bool
	DeviceID string // name of a macvtap that is there already
}

// macvtapCNI reads the configuration of a macvtap, with what runs after its plugin.
func (d *decoder) macvtapCNI(plugins []pair) *MacvtapCNI {
	m := &MacvtapCNI{}
	f := commonKeys()
	maps.Copy(f, ignored("owner", "group", "dns"))
	maps.Copy(f, fields{
		"mtu":         func(n *yaml.Node, at string) { m.MTU = d.mtu(n, at) },
		"mac":         func(n *yaml.Node, at string) { m.MAC = d.macAddress(n, at) },
		"promiscMode": func(n *yaml.Node, at string) { m.Promisc = d.boolean(n, at) },
		"deviceID":    func(n *yaml.Node, at string) { m.DeviceID = d.text(n, at) },
		"ipam":        d.noLease,
	})
	d.object(plugins[0].val, plugins[0].key, true, f)
	for _, p := range plugins[1:] {
		d.tuned(p, &m.MTU, func(n *yaml.Node, at string) { m.MAC = d.macAddress(n, at) })
	}
	return m
}

func (d *decoder) macAddress(n *yaml.Node, path string) net.HardwareAddr {
	text := d.text(n, path)
	m := parseMAC(text)
	if m == nil && text != "" {
		d.fault(n, path, "%q is not a MAC address; write it like 02:00:00:00:00:01", text)
	}
	return m
}

// noLease says that an ipam comes to nothing where there is no port of ours to answer the guest's DHCP.
func (d *decoder) noLease(n *yaml.Node, path string) {
	if r := d.resolve(n); r != nil && len(r.Content) > 0 {
		d.warn(n, path, "not told to the guest: what is handed over has no DHCP server of ours; the network's own answers, or the guest is set up by hand")
	}
}

const macvtapConfKey = "DP_MACVTAP_CONF"

// configMap reads the one of the macvtap device plugin, which is known by its key; others do not concern us.
func (d *decoder) configMap(docs *Docs, root *yaml.Node) {
	d.object(root, "", false, fields{"data": func(n *yaml.Node, p string) {
		for _, entry := range d.pairs(n, p) {
			if entry.key == macvtapConfKey {
				d.macvtapConf(docs, entry.val, p+"."+entry.key)
			}
		}
	}})
}

// macvtapConf reads the device plugin's JSON.
func (d *decoder) macvtapConf(docs *Docs, n *yaml.Node, path string) {
	if r := d.resolve(n); r != nil && r.Kind != yaml.ScalarNode {
		d.fault(n, path, "must be a text that holds JSON, found %s; put it in single quotes", kindName(r))
		return
	}
	before := len(d.faults)
	root, _ := d.jsonNode(n, path)
	if root == nil {
		if len(d.faults) == before {
			d.fault(n, path, "is empty; write '[]' for all links, or a list of pools")
		}
		return
	}
	d.cni = true
	defer func() { d.cni = false }()
	pools := 0
	d.list(root, path, maxList, func(n *yaml.Node, at string) {
		pools++
		if p, ok := d.macvtapEntry(n, at); ok {
			docs.addMacvtapPool(d, n, at, p)
		}
	})
	docs.MacvtapAll = docs.MacvtapAll || pools == 0 && len(d.faults) == before
}

func (docs *Docs) addMacvtapPool(d *decoder, n *yaml.Node, path string, p MacvtapPool) {
	for _, other := range docs.MacvtapPools {
		if other.Name == p.Name && other != p {
			d.fault(n, path+".name", "there is another pool %q, on %s; give each its own name", p.Name, other.LowerDevice)
			return
		}
		if other == p {
			return
		}
	}
	docs.MacvtapPools = append(docs.MacvtapPools, p)
}

// macvtapEntry reads one pool. The guide calls its lowerDevice master.
func (d *decoder) macvtapEntry(n *yaml.Node, path string) (MacvtapPool, bool) {
	p := MacvtapPool{Mode: macvtapMode, Capacity: macvtapCapacity}
	before := len(Errors(d.faults))
	master, masterAt := "", (*yaml.Node)(nil)
	d.object(n, path, true, fields{
		"name":        func(n *yaml.Node, at string) { p.Name = d.text(n, at) },
		"lowerDevice": func(n *yaml.Node, at string) { p.LowerDevice = d.text(n, at) },
		"master": func(n *yaml.Node, at string) {
			master, masterAt = d.text(n, at), n
		},
		"mode": func(n *yaml.Node, at string) {
			switch mode := d.text(n, at); mode {
			case "":
			case "bridge", "private", "vepa":
				p.Mode = mode
			case "passthru":
				p.Mode = mode
				d.warn(n, at, "the device plugin of a cluster refuses it (unknown macvtap mode); sidewire gives the whole link to one guest")
			default:
				d.fault(n, at, "unknown macvtap mode %q; use bridge, private, vepa or passthru", mode)
			}
		},
		"capacity": func(n *yaml.Node, at string) {
			switch c := d.number(n, at); {
			case c < 0 || c > math.MaxInt32:
				d.fault(n, at, "%d is not a number of macvtaps; use 1 or more, or leave it out for %d", c, macvtapCapacity)
			case c > 0:
				p.Capacity = int(c)
			}
		},
	})
	switch {
	case masterAt == nil:
	case p.LowerDevice == "":
		p.LowerDevice = master
		d.warn(masterAt, path+".master", "read as \"lowerDevice\": %q, but the device plugin knows no master; rename it", master)
	default:
		d.warn(masterAt, path+".master", "not read: \"lowerDevice\" is there too; remove it")
	}
	if len(Errors(d.faults)) > before {
		return p, false
	}
	switch {
	case p.Name == "":
		d.fault(n, path+".name", "a pool needs a name; definitions refer to it as %sNAME", macvtapResource)
	case !linkable(p.LowerDevice):
		d.fault(n, path+".lowerDevice", "%q is not the name of a link; name one of the node's, like eth0", p.LowerDevice)
	default:
		return p, true
	}
	return p, false
}

// linkable says whether a link of the kernel's can have a name.
func linkable(name string) bool {
	return name != "" && len(name) <= 15 && name != "." && name != ".." && !strings.ContainsFunc(name, func(r rune) bool {
		return r == '/' || r == ':' || r <= ' ' || r == 0x7f
	})
}

// macvtapFault says why a definition cannot be the network of a macvtap, "" if it can; warning is what is served
// otherwise than it reads.
func (docs *Docs) macvtapFault(nad *NAD) (text, warning string) {
	if nad.Macvtap == nil {
		return fmt.Sprintf("NetworkAttachmentDefinition %s (%s) is of type %q; macvtap: {} needs one of type macvtap", nad.Key(), nad.place(), nad.Type), ""
	}
	name, ok := strings.CutPrefix(nad.ResourceName, macvtapResource)
	pool := docs.macvtapPool(nad)
	switch {
	case nad.ResourceName == "":
		return fmt.Sprintf("NetworkAttachmentDefinition %s (%s) names no resource; annotate it with %s: %sLINK", nad.Key(), nad.place(), resourceAnnotation, macvtapResource), ""
	case !ok || name == "":
		return fmt.Sprintf("NetworkAttachmentDefinition %s (%s) names the resource %q, which is none of macvtap's; write %sLINK", nad.Key(), nad.place(), nad.ResourceName, macvtapResource), ""
	case pool == nil:
		var names []string
		for _, p := range docs.MacvtapPools {
			names = append(names, p.Name)
		}
		return fmt.Sprintf("NetworkAttachmentDefinition %s (%s) names the resource %s, but %s exposes %s only", nad.Key(), nad.place(), nad.ResourceName, macvtapConfKey, strings.Join(names, ", ")), ""
	case !linkable(pool.LowerDevice):
		return fmt.Sprintf("NetworkAttachmentDefinition %s (%s) names the resource %s, and %q is not the name of a link", nad.Key(), nad.place(), nad.ResourceName, pool.LowerDevice), ""
	case pool.Name != name:
		return "", fmt.Sprintf("NetworkAttachmentDefinition %s (%s) names the link %s, which is exposed as %s%s: read as that, but a cluster finds no such resource", nad.Key(), nad.place(), name, macvtapResource, pool.Name)
	}
	return "", ""
}
