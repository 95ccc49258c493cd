package vmi

import (
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// SRIOVCNI is what a definition of type sriov asks of its virtual function; a nil pointer, an empty string and 0 were not
// said.
type SRIOVCNI struct {
	VLAN, VLANQoS        int
	VLANProto            string // "802.1q" or "802.1ad"
	SpoofCheck, Trust    *bool
	LinkState            string // "auto", "enable" or "disable"
	MinTxRate, MaxTxRate *int   // Mbit/s, 0 for no limit
	DeviceID             string // PCI address of the function
	MTU                  int    // in bytes
}

// SRIOVPool is what a SriovNetworkNodePolicy says of the virtual functions of a resource.
type SRIOVPool struct {
	Resource    string   // openshift.io/NAME
	PFNames     []string // of physical functions: "ens1f0", or "ens1f0#0-3" for some of its functions
	RootDevices []string // their PCI addresses
	DeviceType  string   // "vfio-pci" or "netdevice"
	NumVFs      int
	MTU         int // in bytes, 0 if not said
	Priority    int // the lowest of several policies wins
}

// sriovPrefix is the operator's, unless RESOURCE_PREFIX says otherwise.
const sriovPrefix = "openshift.io/"

// pciFunction is an address as the kernel writes it; a domain may be longer than 4 digits.
var pciFunction = regexp.MustCompile(`^[\da-fA-F]{4,8}:[\da-fA-F]{2}:[\da-fA-F]{2}\.[0-7]$`)

// sriovPool is the pool of a definition's resource, nil if it is not known.
func (docs *Docs) sriovPool(nad *NAD) (pool *SRIOVPool) {
	for i := range docs.SRIOVPools {
		p := &docs.SRIOVPools[i]
		if nad.ResourceName != "" && p.Resource == nad.ResourceName && (pool == nil || p.Priority < pool.Priority) {
			pool = p
		}
	}
	return pool
}

// sriovCNI reads the configuration of a virtual function, with what runs after its plugin.
func (d *decoder) sriovCNI(plugins []pair) *SRIOVCNI {
	s := &SRIOVCNI{}
	p := plugins[0]
	f := commonKeys()
	maps.Copy(f, ignored("logLevel", "logFile", "dns", "master"))
	maps.Copy(f, d.sriovKnobs(s, map[string]string{
		"spoofchk": "spoofchk", "trust": "trust", "state": "link_state", "least": "min_tx_rate", "most": "max_tx_rate",
	}))
	maps.Copy(f, fields{
		"ipam": d.noLease,
		"mtu":  func(n *yaml.Node, at string) { s.MTU = d.mtu(n, at) },
		"deviceID": func(n *yaml.Node, at string) {
			if s.DeviceID = d.text(n, at); s.DeviceID != "" && !pciFunction.MatchString(s.DeviceID) {
				d.fault(n, at, "%q is not the PCI address of a function; write it like 0000:65:00.2", s.DeviceID)
			}
		},
	})
	before := len(Errors(d.faults))
	d.object(p.val, p.key, true, f)
	if len(Errors(d.faults)) == before {
		d.sriovSound(p.val, p.key, s)
	}
	for _, q := range plugins[1:] {
		d.tuned(q, &s.MTU, func(*yaml.Node, string) {})
	}
	return s
}

// sriovKnobs are the keys that sriov-cni and the operator's SriovNetwork have for the same things, by their names there.
func (d *decoder) sriovKnobs(s *SRIOVCNI, key map[string]string) fields {
	bounded := func(dst *int, most int64, what string) func(*yaml.Node, string) {
		return func(n *yaml.Node, at string) {
			v := d.number(n, at)
			if v < 0 || v > most {
				d.fault(n, at, "%s %d must be between 0 and %d", what, v, most)
				return
			}
			*dst = int(v)
		}
	}
	onOff := func(dst **bool) func(*yaml.Node, string) {
		return func(n *yaml.Node, at string) {
			switch v := d.text(n, at); v {
			case "on", "off":
				on := v == "on"
				*dst = &on
			case "":
			default:
				d.fault(n, at, "%q: want \"on\" or \"off\"", v)
			}
		}
	}
	rate := func(dst **int) func(*yaml.Node, string) {
		return func(n *yaml.Node, at string) {
			v := new(int)
			bounded(v, 1<<31-1, "a rate of")(n, at)
			*dst = v
		}
	}
	oneOf := func(dst *string, words ...string) func(*yaml.Node, string) {
		return func(n *yaml.Node, at string) {
			v := strings.ToLower(d.text(n, at))
			if v != "" && !slices.Contains(words, v) {
				d.fault(n, at, "%q: want one of %s", v, strings.Join(words, ", "))
				return
			}
			*dst = v
		}
	}
	return fields{
		"vlan":          bounded(&s.VLAN, maxVLAN, "VLAN"),
		"vlanQoS":       bounded(&s.VLANQoS, 7, "priority"),
		"vlanProto":     oneOf(&s.VLANProto, "802.1q", "802.1ad"),
		key["spoofchk"]: onOff(&s.SpoofCheck),
		key["trust"]:    onOff(&s.Trust),
		key["state"]:    oneOf(&s.LinkState, "auto", "enable", "disable"),
		key["least"]:    rate(&s.MinTxRate),
		key["most"]:     rate(&s.MaxTxRate),
	}
}

// sriovSound checks what only makes sense together, by sriov-cni's rules.
func (d *decoder) sriovSound(n *yaml.Node, path string, s *SRIOVCNI) {
	switch {
	case s.VLAN == 0 && s.VLANQoS != 0:
		d.fault(n, path+".vlanQoS", "a priority is for frames of a VLAN; give vlan too")
	case s.VLAN == 0 && s.VLANProto == "802.1ad":
		d.fault(n, path+".vlanProto", "802.1ad is for frames of a VLAN; give vlan too")
	case s.MinTxRate != nil && s.MaxTxRate != nil && *s.MaxTxRate != 0 && *s.MinTxRate > *s.MaxTxRate:
		d.fault(n, path, "the least rate, %d Mbit/s, is above the highest, %d", *s.MinTxRate, *s.MaxTxRate)
	}
}

// sriovNetwork reads a SriovNetwork and makes the definition of it that the operator makes.
func (d *decoder) sriovNetwork(docs *Docs, root *yaml.Node) {
	s := &SRIOVCNI{}
	nad := NAD{File: d.file, Line: root.Line, Annotations: map[string]string{}, Type: "sriov", SRIOV: s, Switch: &Switch{Native: true}}
	var own, resource string
	f := d.sriovKnobs(s, map[string]string{
		"spoofchk": "spoofChk", "trust": "trust", "state": "linkState", "least": "minTxRate", "most": "maxTxRate",
	})
	maps.Copy(f, ignored("capabilities", "metaPlugins", "logLevel", "logFile", "allMulticast"))
	maps.Copy(f, fields{
		"networkNamespace": func(n *yaml.Node, p string) { nad.Namespace = d.text(n, p) },
		"resourceName":     func(n *yaml.Node, p string) { resource = d.text(n, p) },
		"ipam": func(n *yaml.Node, p string) {
			if root, _ := d.jsonNode(n, p); root != nil {
				d.noLease(root, p)
			}
		},
	})
	d.object(root, "", false, fields{
		"metadata": func(n *yaml.Node, p string) {
			d.metadata(n, p, &nad.Name, &own, func(string, *yaml.Node, string) {})
		},
		"spec": func(n *yaml.Node, p string) {
			before := len(Errors(d.faults))
			if d.object(n, p, false, f); len(Errors(d.faults)) == before {
				d.sriovSound(n, p, s)
			}
		},
	})
	if nad.Namespace == "" {
		nad.Namespace = own
	}
	switch {
	case nad.Name == "":
		d.fault(root, "metadata.name", "a SriovNetwork needs a name, networks refer to it")
	case resource == "":
		d.fault(root, "spec.resourceName", "a SriovNetwork needs the resourceName of its SriovNetworkNodePolicy")
	}
	nad.ResourceName = sriovPrefix + resource
	nad.Annotations[resourceAnnotation] = nad.ResourceName
	nad.Config = s.config(nad.Name)
	docs.NADs = append(docs.NADs, nad)
}

// config is the configuration that the operator makes of a SriovNetwork.
func (s *SRIOVCNI) config(name string) []byte {
	word := func(b *bool) string {
		switch {
		case b == nil:
			return ""
		case *b:
			return "on"
		}
		return "off"
	}
	config, err := json.Marshal(struct {
		CNIVersion string   `json:"cniVersion"`
		Name       string   `json:"name"`
		Type       string   `json:"type"`
		VLAN       int      `json:"vlan"`
		SpoofCheck string   `json:"spoofchk,omitempty"`
		Trust      string   `json:"trust,omitempty"`
		VLANQoS    int      `json:"vlanQoS"`
		VLANProto  string   `json:"vlanProto,omitempty"`
		MinTxRate  *int     `json:"min_tx_rate,omitempty"`
		MaxTxRate  *int     `json:"max_tx_rate,omitempty"`
		LinkState  string   `json:"link_state,omitempty"`
		IPAM       struct{} `json:"ipam"`
	}{"1.0.0", name, "sriov", s.VLAN, word(s.SpoofCheck), word(s.Trust), s.VLANQoS, s.VLANProto, s.MinTxRate, s.MaxTxRate, s.LinkState, struct{}{}})
	if err != nil {
		panic(err) // texts and numbers
	}
	return config
}

// sriovPolicy reads a SriovNetworkNodePolicy.
func (d *decoder) sriovPolicy(docs *Docs, root *yaml.Node) {
	p := SRIOVPool{DeviceType: "netdevice", Priority: 99}
	texts := func(dst *[]string) func(*yaml.Node, string) {
		return func(n *yaml.Node, at string) {
			d.list(n, at, maxList, func(n *yaml.Node, at string) { *dst = append(*dst, d.text(n, at)) })
		}
	}
	count := func(dst *int, least, most int64) func(*yaml.Node, string) {
		return func(n *yaml.Node, at string) {
			v := d.number(n, at)
			if v < least || v > most {
				d.fault(n, at, "%d must be between %d and %d", v, least, most)
				return
			}
			*dst = int(v)
		}
	}
	resource := ""
	spec := ignored("eSwitchMode", "isRdma", "linkType", "needVhostNet", "vdpaType", "externallyManaged", "excludeTopology", "nodeSelector", "bridge")
	maps.Copy(spec, fields{
		"resourceName": func(n *yaml.Node, at string) { resource = d.text(n, at) },
		"mtu":          func(n *yaml.Node, at string) { p.MTU = d.mtu(n, at) },
		"numVfs":       count(&p.NumVFs, 0, 1<<16),
		"priority":     count(&p.Priority, 0, 99),
		"deviceType": func(n *yaml.Node, at string) {
			if p.DeviceType = d.text(n, at); p.DeviceType != "vfio-pci" && p.DeviceType != "netdevice" {
				d.fault(n, at, "%q: want vfio-pci, which guests need, or netdevice", p.DeviceType)
			}
		},
		"nicSelector": func(n *yaml.Node, at string) {
			f := ignored("vendor", "deviceID", "netFilter")
			f["pfNames"], f["rootDevices"] = texts(&p.PFNames), texts(&p.RootDevices)
			d.object(n, at, false, f)
		},
	})
	d.object(root, "", false, fields{"spec": func(n *yaml.Node, at string) { d.object(n, at, false, spec) }})
	if resource == "" {
		d.fault(root, "spec.resourceName", "a SriovNetworkNodePolicy needs a resourceName; SriovNetworks refer to it")
		return
	}
	p.Resource = sriovPrefix + resource
	docs.SRIOVPools = append(docs.SRIOVPools, p)
}

// sriovFault says why a definition cannot be the network of a virtual function, "" if it can; warning is what is served
// otherwise than it reads.
func (docs *Docs) sriovFault(nad *NAD) (text, warning string) {
	pool := docs.sriovPool(nad)
	switch {
	case nad.SRIOV == nil:
		return fmt.Sprintf("NetworkAttachmentDefinition %s (%s) is of type %q; sriov: {} needs one of type sriov", nad.Key(), nad.place(), nad.Type), ""
	case pool != nil && pool.DeviceType != "vfio-pci":
		return "", fmt.Sprintf("the policy of resource %s makes its functions of deviceType %s, but a guest needs vfio-pci", pool.Resource, pool.DeviceType)
	}
	return "", ""
}
