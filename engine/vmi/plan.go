package vmi

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"strings"
)

// VM is one machine with all its values resolved.
type VM struct {
	Name      string
	Namespace string // metadata.namespace, may be empty
	NetNS     string // network namespace of its own (FILE@NETNS), empty for the run's
	Hostname  string // spec.hostname, else the name
	Subdomain string
	// MigrateBridge says that the guest may be migrated although it has a bridge on the pod network.
	MigrateBridge bool
	// Istio says that Istio's proxy is to stand between the guest and the outside.
	Istio bool

	VCPUs    int
	Topology CPU    // as domain.cpu has it with 1 for what is not said; all 0 if nothing is
	Memory   uint64 // bytes
	Hugepage uint64 // bytes of one huge page, 0 for ordinary memory

	Interfaces []Interface
}

// Interface is one interface with all its values resolved: what a port needs to be opened.
type Interface struct {
	VM         string // the VM's name
	Name       string // of the interface and its network
	Binding    Binding
	Model      string           // never empty
	MAC        net.HardwareAddr // 6 bytes, or nil if none was given; a Multus network's bridge always has one
	MACMade    bool             // the spec has none: MAC is made of names
	QueuePairs int              // 1 to 128

	Network       Network
	Ports         []Port // empty means all for masquerade and none for slirp
	DHCP          DHCPOptions
	BootOrder     int         // 0 if it is not to be booted from
	PCIAddress    *PCIAddress // nil if it may be anywhere
	ACPIIndex     int         // 0 if not given
	State         string      // Up or Down: how the guest finds its link
	Tag           string
	Transitional  bool // useVirtioTransitional
	NetworkNumber int  // place of the network in spec.networks, for the ordinal names net1, net2
}

// States of an interface. One that is absent is not planned.
const (
	Up     = "up"
	Down   = "down"
	Absent = "absent"
)

// Network is what an interface is joined to. The addresses are valid for the pod network only.
type Network struct {
	Pod         bool
	Default     bool         // the pod network, or a Multus network in its place
	NetworkName string       // of a Multus network: "name" or "namespace/name"
	Link        string       // the pod's link by KubeVirt's naming: eth0, or pod and 11 digits of a hash
	Ordinal     string       // the same by the naming of older releases: net1, net2, ...; empty for eth0
	NAD         *NAD         // of a Multus network, nil if its definition is not known
	Lease       *Lease       // what the definition's ipam gives the guest, nil for nothing
	Macvtap     *MacvtapPool // what a macvtap is made on, nil for other bindings
	SRIOV       *SRIOVPool   // what is known of the function's pool, nil for other bindings or if nothing is

	CIDR, CIDR6       netip.Prefix // host bits masked
	Gateway, Gateway6 netip.Addr   // base + 1; slirp: base + 2
	Guest, Guest6     netip.Addr   // base + 2; slirp: base + 15
	DNS               netip.Addr   // slirp: base + 3
}

// Port is one port that belongs to the guest, or a range of them.
type Port struct {
	Name     string
	Protocol string // "TCP" or "UDP"
	Port     uint16
	Last     uint16 // last port of a range; 0 is Port alone
}

// DHCPOptions is what an interface's dhcpOptions add to a lease.
type DHCPOptions struct {
	BootFile   string // option 67
	TFTPServer string // option 66
	NTPServers []netip.Addr
	Private    []PrivateOption
}

// PrivateOption is one of the options 224 to 254, its value as raw bytes.
type PrivateOption struct {
	Option uint8
	Value  string
}

// Plan resolves every VMI. The docs must have passed [Validate]; values that do not parse come out as defaults.
func Plan(docs Docs) []VM {
	docs, _ = docs.withDefaults()
	vms := make([]VM, 0, len(docs.VMIs))
	leases, _ := docs.leases()
	for i := range docs.VMIs {
		v := &docs.VMIs[i]
		vm := v.plan()
		for j := range v.Spec.Interfaces {
			p := v.planInterface(&v.Spec.Interfaces[j], vm.VCPUs)
			if p.State == Absent {
				continue
			}
			p.Network.Lease = leases[[2]int{i, j}]
			docs.planNetwork(v, &p)
			vm.Interfaces = append(vm.Interfaces, p)
		}
		vms = append(vms, vm)
	}
	return vms
}

// planNetwork finds what the definition of an interface's Multus network says.
func (docs *Docs) planNetwork(v *VMI, p *Interface) {
	w := &p.Network
	if w.NetworkName == "" {
		return
	}
	w.NAD = docs.nadOf(v, w.NetworkName)
	switch {
	case p.Binding == Bridge && !w.Default && p.MAC == nil:
		p.MAC, p.MACMade = stableMAC(namespaceOr(v.Namespace), v.Name, p.Name), true
	case p.Binding == Macvtap && w.NAD != nil:
		w.Macvtap = docs.macvtapPool(w.NAD)
	case p.Binding == SRIOV && w.NAD != nil:
		w.SRIOV = docs.sriovPool(w.NAD)
	}
}

// stableMAC makes a hardware address of names: locally administered, and the same for the same names, so that a guest
// that is started again is the same to itself and to others.
func stableMAC(names ...string) net.HardwareAddr {
	sum := sha256.Sum256([]byte(strings.Join(names, "/")))
	sum[0] = sum[0]&^1 | 2
	return net.HardwareAddr(sum[:6:6])
}

func (v *VMI) plan() VM {
	s := &v.Spec
	cpus, _ := s.vcpus()
	memory, _, ok := s.memory()
	if !ok {
		memory = defaultMemory
	}
	vm := VM{
		Name: v.Name, Namespace: v.Namespace, NetNS: v.NetNS, Hostname: s.Hostname, Subdomain: s.Subdomain,
		MigrateBridge: v.migrateBridge, Istio: v.istio != "",
		VCPUs: int(min(max(cpus, 1), maxVCPUs)), Memory: uint64(max(memory, 0)),
	}
	if s.CPU != (CPU{}) {
		vm.Topology = CPU{max(s.CPU.Sockets, 1), max(s.CPU.Cores, 1), max(s.CPU.Threads, 1)}
	}
	if vm.Hostname == "" {
		vm.Hostname = hostnameOf(v.Name)
	}
	if size, ok := hugepage(s.HugepageSize); ok {
		vm.Hugepage = uint64(size)
	}
	return vm
}

func (v *VMI) planInterface(f *InterfaceSpec, vcpus int) Interface {
	s := &v.Spec
	p := Interface{
		VM: v.Name, Name: f.Name, Model: f.Model, MAC: parseMAC(f.MAC), QueuePairs: 1,
		State: f.State, Tag: f.Tag, Transitional: s.Transitional, DHCP: f.DHCP.plan(),
	}
	if len(f.Bindings) > 0 {
		p.Binding = f.Bindings[0]
	}
	if p.Model == "" {
		p.Model = "virtio"
		if p.Binding == Slirp {
			p.Model = "e1000" // KubeVirt's
		}
	}
	if p.State == "" {
		p.State = Up
	}
	if s.Multiqueue && p.Model == "virtio" {
		p.QueuePairs = min(vcpus, maxQueues)
	}
	if f.BootOrder != nil {
		p.BootOrder = int(*f.BootOrder)
	}
	if f.ACPIIndex != nil {
		p.ACPIIndex = int(*f.ACPIIndex)
	}
	if pciAddress.MatchString(f.PCIAddress) {
		a := parsePCI(f.PCIAddress)
		p.PCIAddress = &a
	}
	for _, x := range f.Ports {
		p.Ports = append(p.Ports, Port{Name: x.Name, Protocol: protocolOr(x.Protocol), Port: uint16(x.Port)})
	}
	for _, r := range f.PortRanges {
		p.Ports = append(p.Ports, Port{Protocol: r.Protocol, Port: uint16(r.Start), Last: uint16(r.End)})
	}
	ordinal := 1
	for i := range s.Networks {
		if s.Networks[i].Name == f.Name {
			p.Network, p.NetworkNumber = s.Networks[i].plan(), i
			if p.Binding == Slirp {
				p.Network.slirp()
			}
			break
		}
		if m := s.Networks[i].Multus; m != nil && !m.Default {
			ordinal++
		}
	}
	if p.Network.NetworkName != "" && !p.Network.Default {
		p.Network.Ordinal = fmt.Sprintf("net%d", ordinal)
	}
	return p
}

func (n *NetworkSpec) plan() Network {
	w := Network{Pod: n.Pod != nil, Link: linkName(n.Name)}
	if n.Multus != nil {
		w.NetworkName = n.Multus.NetworkName
		w.Default = n.Multus.Default
	}
	if w.Default = w.Default || w.Pod; w.Default {
		w.Link = "eth0"
	}
	if n.Pod == nil {
		return w
	}
	if p, err := parseCIDR4(n.Pod.CIDR); err == nil {
		w.CIDR, w.Gateway, w.Guest = p, gatewayOf(p), guestOf(p)
	}
	if p, err := parseCIDR6(n.Pod.CIDR6); err == nil {
		w.CIDR6, w.Gateway6, w.Guest6 = p, gatewayOf(p), guestOf(p)
	}
	return w
}

// slirp makes the IPv4 addresses those that QEMU's user networking has in a network: 0.0.2.2, 0.0.2.3 and 0.0.2.15 as
// far as the mask leaves room. Where the last would be the broadcast address the guest has the one before, and in a /30
// the gateway is the DNS server too.
func (w *Network) slirp() {
	if !w.CIDR.IsValid() {
		return
	}
	hosts := uint32(1)<<(32-w.CIDR.Bits()) - 1
	base := w.CIDR.Addr().As4()
	at := func(n uint32) netip.Addr {
		return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, binary.BigEndian.Uint32(base[:])|n)))
	}
	w.Gateway, w.DNS, w.Guest = at(0x0202&hosts), at(0x0203&hosts), at(min(0x020f&hosts, hosts-1))
	if hosts == 3 {
		w.Guest, w.DNS = at(1), w.Gateway
	}
}

func (d *DHCPSpec) plan() DHCPOptions {
	o := DHCPOptions{BootFile: d.BootFile, TFTPServer: d.TFTPServer}
	for _, s := range d.NTPServers {
		if a, ok := parseNTP(s); ok {
			o.NTPServers = append(o.NTPServers, a)
		}
	}
	for _, p := range d.Private {
		o.Private = append(o.Private, PrivateOption{uint8(p.Option), p.Value})
	}
	return o
}

// linkName is the name that KubeVirt has Multus give a secondary network's link in the pod.
func linkName(network string) string {
	sum := sha256.Sum256([]byte(network))
	return "pod" + hex.EncodeToString(sum[:])[:11]
}

// hostnameOf makes a host name of a VM's name as KubeVirt does: its first label. A name that came from a file may hold
// characters that no host name has.
func hostnameOf(name string) string {
	label, _, _ := strings.Cut(strings.ToLower(name), ".")
	label = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, label)
	if label = strings.Trim(label[:min(len(label), 63)], "-"); label == "" {
		return "vm"
	}
	return label
}
