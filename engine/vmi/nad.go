package vmi

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// NAD is a NetworkAttachmentDefinition.
type NAD struct {
	Namespace, Name string // Namespace may be empty, which is "default"
	File            string
	Line            int // where the document starts
	Annotations     map[string]string
	ResourceName    string // annotation k8s.v1.cni.cncf.io/resourceName: what the node has to spare a device of
	Config          []byte // the CNI configuration, sound JSON; nil if the definition has none
	Type            string // the CNI type, or that of the first plugin of a list; may be empty

	// Macvtap and SRIOV are set where that is the type, Switch for every type that leaves a link for a bridge in the pod.
	Macvtap *MacvtapCNI
	SRIOV   *SRIOVCNI
	Switch  *Switch // what it asks of a switch; of a type that is not one of ServedTypes nothing, nor has it a Bridge

	unread bool // there is a configuration, but it cannot be read, which has been said
}

// ServedTypes are the types of a definition that a switch of sidewire's stands in for where its CNI left no link.
var ServedTypes = []string{"bridge", "cnv-bridge", "ovs"}

// Switch is the switch that a definition names, and how its ports are to be.
type Switch struct {
	Bridge string // name of the bridge
	OVS    bool   // of Open vSwitch, whose ports without a VLAN carry all of them

	VLAN       uint16   // access VLAN, 0 for none; beside a trunk its native one
	Trunk      []uint16 // VLANs that pass tagged, ascending
	Native     bool     // untagged frames of a trunk belong to the bridge's default VLAN
	SpoofCheck bool     // frames must come from the guest's own MAC
	MTU        int      // in bytes, 0 if not said
	IPAM       *IPAM    // nil if addresses are somebody else's business

	// What a definition has no words for and annotations ask.
	CheckARP  bool // ARP and ND must name the guest's own MAC too
	LinkLocal bool // LLDP, STP and their like pass
	Storm     int  // frames a second to everybody from each port, 0 for the default, -1 for no limit
}

// BridgeVLAN is the VLAN of what is untagged on a bridge of the kernel's kind.
const BridgeVLAN = 1

// untagged is the VLAN of the port's untagged frames, where the bridge knows
// VLANs at all; 0 is none.
func (s *Switch) untagged() uint16 {
	if s.VLAN == 0 && !s.OVS {
		return BridgeVLAN
	}
	return s.VLAN
}

// Key is the definition's namespace and name, as a networkName may spell it.
func (n *NAD) Key() string { return namespaceOr(n.Namespace) + "/" + n.Name }

// place is where the definition stands.
func (n *NAD) place() string { return fmt.Sprintf("%s:%d", n.File, n.Line) }

// asked is what the definition's annotations ask.
func (n *NAD) asked() any {
	if n.Switch == nil {
		return n.ResourceName
	}
	return [...]any{n.ResourceName, n.Switch.CheckARP, n.Switch.LinkLocal, n.Switch.Storm}
}

func namespaceOr(ns string) string {
	if ns == "" {
		return "default"
	}
	return ns
}

// definition reads a NetworkAttachmentDefinition.
func (d *decoder) definition(docs *Docs, root *yaml.Node) {
	nad := NAD{File: d.file, Line: root.Line, Annotations: map[string]string{}}
	var ours []annotation
	d.object(root, "", false, fields{
		"metadata": func(n *yaml.Node, p string) {
			d.metadata(n, p, &nad.Name, &nad.Namespace, func(key string, n *yaml.Node, p string) {
				if len(nad.Annotations) < maxList {
					nad.Annotations[key] = d.text(n, p)
				}
				if strings.HasPrefix(key, annotationPrefix) && len(ours) < maxList {
					ours = append(ours, annotation{n, p, strings.TrimPrefix(key, annotationPrefix), nad.Annotations[key]})
				}
			})
		},
		"spec": func(n *yaml.Node, p string) {
			d.object(n, p, false, fields{"config": func(n *yaml.Node, p string) { d.cniConfig(n, p, &nad) }})
		},
	})
	if nad.Name == "" {
		d.fault(root, "metadata.name", "a NetworkAttachmentDefinition needs a name, networks refer to it")
	}
	nad.ResourceName = nad.Annotations[resourceAnnotation]
	for _, a := range ours {
		d.annotated(a, nad.Switch)
	}
	docs.NADs = append(docs.NADs, nad)
}

// annotation is one that is meant for us.
type annotation struct {
	n           *yaml.Node
	path        string
	name, value string
}

const (
	annotationPrefix   = "sidewire/"
	resourceAnnotation = "k8s.v1.cni.cncf.io/resourceName"
)

// annotated reads what an annotation asks of a switch, nil for one that is not ours.
func (d *decoder) annotated(a annotation, s *Switch) {
	if s == nil {
		s = new(Switch) // it is checked all the same
	}
	yes := func(dst *bool) {
		if *dst = a.value == "true"; !*dst && a.value != "false" {
			d.fault(a.n, a.path, "%q: want \"true\" or \"false\"", a.value)
		}
	}
	switch a.name {
	case "link-local":
		yes(&s.LinkLocal)
	case "check-arp":
		if yes(&s.CheckARP); s.CheckARP && !s.SpoofCheck {
			d.fault(a.n, a.path, "ARP is checked where the MAC is; add \"macspoofchk\": true to spec.config")
		}
	case "storm":
		n, err := strconv.Atoi(a.value)
		switch {
		case a.value == "off":
			s.Storm = -1
		case err != nil || n < 1 || n > 100_000_000:
			d.fault(a.n, a.path, "%q: want frames a second, or \"off\"", a.value)
		default:
			s.Storm = n
		}
	default:
		d.warn(a.n, a.path, "unknown annotation, known are %[1]slink-local, %[1]scheck-arp, %[1]sstorm", annotationPrefix)
	}
}

// cniConfig reads spec.config: one plugin's configuration, or a list of plugins of which the first makes the interface.
func (d *decoder) cniConfig(n *yaml.Node, path string, nad *NAD) {
	if r := d.resolve(n); r != nil && r.Kind == yaml.MappingNode {
		d.fault(n, path, "must be a text that holds JSON, found a mapping; put it in single quotes")
		nad.unread = true
		return
	}
	before := len(d.faults)
	root, config := d.jsonNode(n, path)
	if root == nil {
		nad.unread = len(d.faults) > before
		return
	}
	nad.Config = config
	d.cni = true
	defer func() { d.cni = false }()
	var plugins []pair // path and node of each
	for _, p := range d.pairs(root, path) {
		if !strings.EqualFold(p.key, "plugins") {
			continue
		}
		d.list(p.val, path+".plugins", maxList, func(n *yaml.Node, at string) {
			plugins = append(plugins, pair{at, n.Line, n})
		})
	}
	if len(plugins) == 0 {
		plugins = []pair{{path, root.Line, root}}
	}
	nad.Type = d.pluginType(plugins[0])
	switch {
	case nad.Type == "":
		return // whoever refers to it is told
	case nad.Type == "macvtap":
		nad.Macvtap = d.macvtapCNI(plugins)
		return
	case nad.Type == "sriov":
		nad.SRIOV = d.sriovCNI(plugins)
		nad.Switch = &Switch{Native: true} // a function's link may be bridged too
		return
	case !slices.Contains(ServedTypes, nad.Type):
		nad.Switch = &Switch{Native: true}
		return // its keys are the business of its plugin, which has read them
	}
	nad.Switch = d.plugin(plugins[0], nad.Type)
	for _, p := range plugins[1:] {
		d.chained(p, nad.Switch)
	}
}

func (d *decoder) pluginType(p pair) (name string) {
	d.object(p.val, p.key, false, fields{"type": func(n *yaml.Node, at string) { name = d.text(n, at) }})
	return name
}

// ignored are keys that mean nothing here.
func ignored(keys ...string) fields {
	f := fields{}
	for _, k := range keys {
		f[k] = func(*yaml.Node, string) {}
	}
	return f
}

// commonKeys are those of every configuration, none of which says anything of a link.
func commonKeys() fields {
	return ignored("cniVersion", "cniVersions", "name", "type", "plugins", "capabilities", "args", "runtimeConfig", "prevResult", "disableCheck")
}

// plugin reads the configuration of a served type.
func (d *decoder) plugin(p pair, kind string) *Switch {
	s := &Switch{OVS: kind == "ovs", Native: true}
	before := len(d.faults)
	var dns resolvers
	f := commonKeys()
	maps.Copy(f, fields{
		"bridge": func(n *yaml.Node, at string) { s.Bridge = d.text(n, at) },
		"vlan":   func(n *yaml.Node, at string) { s.VLAN = d.vlan(n, at, 0) },
		"mtu":    func(n *yaml.Node, at string) { s.MTU = d.mtu(n, at) },
		"dns":    func(n *yaml.Node, at string) { d.resolvers(n, at, &dns) },
		"ipam":   func(n *yaml.Node, at string) { s.IPAM = d.ipam(n, at) },
	})
	trunk := func(n *yaml.Node, at string) { s.Trunk = d.trunk(n, at) }
	if s.OVS {
		maps.Copy(f, ignored("ovn_port", "interface_type", "deviceID", "ofport_request", "configuration_path", "socket_file",
			"link_state_check_retries", "link_state_check_interval"))
		f["trunk"] = trunk
	} else {
		maps.Copy(f, d.bridgeFields(s))
		f["vlanTrunk"] = trunk
	}
	d.object(p.val, p.key, true, f)
	if s.IPAM != nil {
		s.IPAM.add(dns)
	}
	faulty := len(d.faults) > before
	switch {
	case s.Bridge == "" && s.OVS && !faulty:
		d.fault(&yaml.Node{Line: p.line}, p.key+".bridge", "type ovs needs the name of its bridge; add \"bridge\": \"br1\"")
	case s.Bridge == "" && !s.OVS:
		s.Bridge = "cni0" // the plugin's own default
	}
	if s.VLAN != 0 && len(s.Trunk) > 0 && !s.OVS {
		d.fault(&yaml.Node{Line: p.line}, p.key+".vlanTrunk", "a port of a bridge has vlan or vlanTrunk, not both; remove one")
	}
	return s
}

// bridgeFields are the keys of the bridge plugins alone.
func (d *decoder) bridgeFields(s *Switch) fields {
	// A switch of sidewire's has no address and no kernel behind it: what makes the node a router is not there.
	without := func(what string) func(*yaml.Node, string) {
		return func(n *yaml.Node, at string) {
			if d.boolean(n, at) {
				d.warn(n, at, "not done: %s", what)
			}
		}
	}
	f := ignored("promiscMode", "forceAddress", "enabledad", "disableContainerInterface", "ipMasqBackend")
	maps.Copy(f, fields{
		"macspoofchk":         func(n *yaml.Node, at string) { s.SpoofCheck = d.boolean(n, at) },
		"preserveDefaultVlan": func(n *yaml.Node, at string) { s.Native = d.boolean(n, at) },
		"isGateway":           without("the switch has no address of its own; a gateway has to be a guest or behind the uplink"),
		"isDefaultGateway":    without("the switch has no address of its own; a gateway has to be a guest or behind the uplink"),
		"ipMasq":              without("the switch does not translate addresses; use masquerade: {} on the pod network"),
		"hairpinMode":         without("no frame goes back to the port that it came from"),
		"portIsolation": func(n *yaml.Node, at string) {
			if d.boolean(n, at) {
				d.fault(n, at, "not supported yet: ports that do not reach each other; remove it")
			}
		},
	})
	return f
}

// chained reads a plugin that runs after the one that makes a switch's link.
func (d *decoder) chained(p pair, s *Switch) { d.tuned(p, &s.MTU, func(*yaml.Node, string) {}) }

// tuned reads a plugin that runs after the one that makes the link: an MTU that it sets, and what mac reads.
func (d *decoder) tuned(p pair, mtu *int, mac func(n *yaml.Node, path string)) {
	kind := d.pluginType(p)
	if kind != "tuning" {
		d.warn(&yaml.Node{Line: p.line}, p.key+".type", "plugin %q is not run: it would change a link of the kernel's, and there is none", kind)
		return
	}
	d.object(p.val, p.key, false, fields{
		"mtu": func(n *yaml.Node, at string) {
			if m := d.mtu(n, at); m != 0 {
				*mtu = m
			}
		},
		"mac": mac,
	})
}

func (d *decoder) mtu(n *yaml.Node, path string) int {
	v := d.number(n, path)
	if v != 0 && (v < minMTU || v > maxMTU) {
		d.fault(n, path, "an MTU must be between %d and %d bytes; leave it out for that of the uplink, or 1500", minMTU, maxMTU)
		return 0
	}
	return int(v)
}

// MTUs that a guest's NIC can have.
const (
	minMTU = 68
	maxMTU = 65535
	// maxVLAN is the last VLAN that frames can be tagged with.
	maxVLAN = 4094
)

func (d *decoder) vlan(n *yaml.Node, path string, least int64) uint16 {
	v := d.number(n, path)
	if v < least || v > maxVLAN {
		d.fault(n, path, "VLAN %d must be between %d and %d", v, least, maxVLAN)
		return 0
	}
	return uint16(v)
}

// trunk reads VLANs: {"id": 42} or {"minID": 100, "maxID": 200} each.
func (d *decoder) trunk(n *yaml.Node, path string) (vlans []uint16) {
	set := map[uint16]bool{}
	d.list(n, path, maxVLAN, func(n *yaml.Node, at string) {
		var id, first, last uint16
		before := len(d.faults)
		d.object(n, at, true, fields{
			"id":    func(n *yaml.Node, at string) { id = d.vlan(n, at, 1) },
			"minID": func(n *yaml.Node, at string) { first = d.vlan(n, at, 1) },
			"maxID": func(n *yaml.Node, at string) { last = d.vlan(n, at, 1) },
		})
		switch {
		case len(d.faults) > before:
		case (first == 0) != (last == 0):
			d.fault(n, at, "minID and maxID belong together; give both, or id alone")
		case first > last:
			d.fault(n, at, "minID %d is larger than maxID %d", first, last)
		case id == 0 && first == 0:
			d.fault(n, at, "no VLAN in it; write {\"id\": 42} or {\"minID\": 100, \"maxID\": 200}")
		}
		if id != 0 {
			set[id] = true
		}
		for v := first; v != 0 && v <= last; v++ {
			set[v] = true
		}
	})
	return slices.Sorted(maps.Keys(set))
}
