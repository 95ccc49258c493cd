// Package vmi reads a KubeVirt VMI and its NetworkAttachmentDefinitions, validates them, says which ports they want.
//
// [Load] turns files into [Docs]: small types of our own that hold the network's part of a spec and
// nothing else. [Validate] answers with KubeVirt's field paths and messages, [Unsupported] with what this
// release cannot serve, [Plan] with resolved values that need no further look at the spec, and
// [QEMUArgs] with the frontend's side of a plan. Docs are values: nobody writes to them after Load, so they may be
// read by several goroutines. The package opens no sockets and changes nothing on the machine.
//
// An input is the operator's, but it is read as if it were not: sizes, counts and alias expansion are
// bounded, and every text that comes out of it is one line.
package vmi

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Limits on what is read. They are far above any real cluster's objects.
const (
	maxFile   = 4 << 20 // bytes in one file
	maxNodes  = 250_000 // YAML nodes visited in one file, aliases expanded
	maxDepth  = 64      // nesting of what we look at
	maxDocs   = 1024    // documents in one file
	maxList   = 256     // interfaces, networks (CRD MaxItems)
	maxFaults = 1000    // faults reported in one run
	maxText   = 512     // runes of one message
)

// Severity says whether a fault keeps a VMI from running.
type Severity string

// Severities of a fault.
const (
	Error   Severity = "error"
	Warning Severity = "warning" // served, but not quite as the spec reads
	// Unserved is what [Unsupported] finds, to those who asked only whether a spec is sound.
	Unserved Severity = "unserved"
)

// Reason is the type of cause that KubeVirt's webhook gives a fault (metav1.CauseType).
type Reason string

// Reasons of a fault.
const (
	Invalid      Reason = "FieldValueInvalid"
	Required     Reason = "FieldValueRequired"
	Duplicate    Reason = "FieldValueDuplicate"
	NotFound     Reason = "FieldValueNotFound"
	NotSupported Reason = "FieldValueNotSupported"
	Forbidden    Reason = "FieldValueForbidden"
)

// Fault is one thing wrong with a spec. Field is KubeVirt's path of it, Message is one line.
// File and Line say where it was read; Line is 0 where that is unknown.
type Fault struct {
	VMI      string   `json:"vmi,omitempty"`
	Field    string   `json:"field"`
	Message  string   `json:"message"`
	Reason   Reason   `json:"reason"`
	Severity Severity `json:"severity"`
	File     string   `json:"file,omitempty"`
	Line     int      `json:"line,omitempty"`
}

// String is the line that the validate command prints: "FIELD: MESSAGE".
func (f Fault) String() string { return f.Field + ": " + f.Message }

// Where is "FILE:LINE", "FILE" or nothing, as far as it is known.
func (f Fault) Where() string {
	if f.Line > 0 {
		return fmt.Sprintf("%s:%d", f.File, f.Line)
	}
	return f.File
}

// Errors returns the faults that keep a VMI from running, in their order.
func Errors(faults []Fault) []Fault { return withSeverity(faults, Error) }

// Warnings returns the faults that do not keep a VMI from running, in their order.
func Warnings(faults []Fault) []Fault { return withSeverity(faults, Warning) }

func withSeverity(faults []Fault, s Severity) []Fault {
	var out []Fault
	for _, f := range faults {
		if f.Severity == s {
			out = append(out, f)
		}
	}
	return out
}

// Docs is what a set of files holds. The zero value is empty.
type Docs struct {
	VMIs    []VMI
	NADs    []NAD
	Cluster Cluster

	MacvtapPools []MacvtapPool // of a DP_MACVTAP_CONF; nil without one, see MacvtapAll
	MacvtapAll   bool          // a DP_MACVTAP_CONF of [] is there: all links are exposed

	SRIOVPools []SRIOVPool // of SriovNetworkNodePolicies

	faults    []Fault // found while reading: unknown fields, wrong types
	documents int     // that concern us
	held      []Held  // addresses that guests have already
}

// Empty says that no document was read that concerns a VMI's network.
func (docs *Docs) Empty() bool { return docs.documents == 0 }

// VMI is a virtual machine's spec, from a VirtualMachineInstance, a VirtualMachine or the guide's VM.
type VMI struct {
	Name      string // metadata.name, else made from the file's base name
	Namespace string // metadata.namespace, may be empty
	Kind      string
	File      string // as given to Load
	NetNS     string // what followed @ in the argument to Load, may be empty
	Line      int    // where the document starts
	Path      string // KubeVirt's field prefix: "spec" or "spec.template.spec"
	Spec      Spec

	named bool // the name is metadata.name
	annotations
	lines map[string]int // field path to line
}

// Spec is the part of a VMI spec that concerns its network and the size of its frontend. Texts are as written;
// Validate says whether they parse.
type Spec struct {
	Hostname  string
	Subdomain string

	CPU              CPU
	Requests, Limits Resources
	GuestMemory      string // domain.memory.guest
	HugepageSize     string // domain.memory.hugepages.pageSize

	Multiqueue       bool  // networkInterfaceMultiqueue
	AutoattachPod    *bool // autoattachPodInterface; nil means true
	Transitional     bool  // useVirtioTransitional
	DiskBootOrders   []*int64
	Interfaces       []InterfaceSpec
	Networks         []NetworkSpec
	interfacesExceed bool // more than maxList, the rest was not read
	networksExceed   bool

	admitted // what only the webhook's rules look at
}

// CPU is domain.cpu; 0 is not said.
type CPU struct{ Sockets, Cores, Threads int64 }

// Resources is one of domain.resources.requests and .limits, as quantities.
type Resources struct{ CPU, Memory string }

// Binding is how an interface is joined to its network.
type Binding string

// Bindings, by the name of their field.
const (
	Bridge      Binding = "bridge"
	Masquerade  Binding = "masquerade"
	SRIOV       Binding = "sriov"
	Slirp       Binding = "slirp"
	Macvtap     Binding = "macvtap"
	Passt       Binding = "passt"
	PasstCore   Binding = "passtBinding"
	PluginBound Binding = "binding"
)

// InterfaceSpec is one of domain.devices.interfaces.
type InterfaceSpec struct {
	Name       string
	Model      string    // empty is virtio
	Bindings   []Binding // sound with exactly one
	Plugin     string    // name of a binding plugin
	Ports      []PortSpec
	PortRanges []PortRangeSpec
	MAC        string
	BootOrder  *int64
	PCIAddress string
	DHCP       DHCPSpec
	Tag        string
	ACPIIndex  *int64
	State      string

	misspelt            bool // a binding's name was, which has been said
	hasPorts, hasRanges bool // the list is there, if only an empty one
}

// has says whether the interface names the binding b.
func (i *InterfaceSpec) has(b Binding) bool {
	for _, x := range i.Bindings {
		if x == b {
			return true
		}
	}
	return false
}

// PortSpec is one of an interface's ports, as written.
type PortSpec struct {
	Name, Protocol string
	Port           int64
}

// PortRangeSpec is one of an interface's portRanges, as written.
type PortRangeSpec struct {
	Protocol   string
	Start, End int64
}

// DHCPSpec is an interface's dhcpOptions, as written.
type DHCPSpec struct {
	BootFile, TFTPServer string
	NTPServers           []string
	Private              []PrivateSpec
}

// PrivateSpec is one of dhcpOptions.privateOptions, as written.
type PrivateSpec struct {
	Option int64
	Value  string
}

// NetworkSpec is one of spec.networks.
type NetworkSpec struct {
	Name   string
	Pod    *PodSpec
	Multus *MultusSpec
	Claim  *ClaimSpec
}

// ClaimSpec is a network's resourceClaim.
type ClaimSpec struct{ ClaimName, RequestName string }

// PodSpec is a pod network; an empty CIDR means KubeVirt's default.
type PodSpec struct{ CIDR, CIDR6 string }

// MultusSpec is a secondary network.
type MultusSpec struct {
	NetworkName string
	Default     bool
}

// fault makes a fault of this VMI, placed at the nearest line that is known for the field.
func (v *VMI) fault(s Severity, field, format string, args ...any) Fault {
	f := Fault{VMI: oneLine(v.Name), Field: field, Message: oneLine(fmt.Sprintf(format, args...)),
		Reason: Invalid, Severity: s, File: v.File, Line: v.Line}
	for p := field; p != ""; {
		if n, ok := v.lines[p]; ok {
			f.Line = n
			break
		}
		p = p[:max(strings.LastIndexAny(p, ".["), 0)]
	}
	return f
}

// oneLine makes a text fit for one line of a terminal or a log: no control characters, no endless values.
func oneLine(s string) string {
	clean := len(s) <= maxText && utf8.ValidString(s)
	for i := 0; clean && i < len(s); i++ {
		clean = s[i] >= ' ' && s[i] < 0x7f
	}
	if clean {
		return s
	}
	var b strings.Builder
	n := 0
	for _, r := range s {
		if n++; n > maxText {
			b.WriteString("...")
			break
		}
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			r = '?'
		}
		b.WriteRune(r)
	}
	return b.String()
}
