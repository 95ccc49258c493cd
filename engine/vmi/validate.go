package vmi

import (
	"fmt"
	"regexp"
	"strings"
)

// Options is what a cluster's configuration adds to a spec. The zero value is KubeVirt's default for the seed's
// bindings, with every feature gate open.
type Options struct {
	ForbidBridge bool // permitBridgeInterfaceOnPodNetwork: false
	ForbidSlirp  bool // permitSlirpInterface: false
}

// Largest values that a frontend can have.
const (
	maxVCPUs  = 1024
	maxMemory = 1 << 46
	minMemory = 1 << 20
	maxQueues = 128
)

var (
	interfaceName = regexp.MustCompile(`^[A-Za-z0-9-_]+$`)
	pciAddress    = regexp.MustCompile(`^([\da-fA-F]{4}):([\da-fA-F]{2}):([\da-fA-F]{2})\.([0-7]{1})$`)
	dnsLabel      = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	fileName      = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,252}$`)
	models        = []string{"e1000", "e1000e", "igb", "ne2k_pci", "pcnet", "rtl8139", "virtio"}
)

// checker gathers the faults of one VMI.
type checker struct {
	*VMI
	opts     Options
	faults   []Fault
	networks map[string]*NetworkSpec
}

func (c *checker) fail(field, format string, args ...any) {
	c.faults = append(c.faults, c.fault(Error, field, format, args...))
}

func (c *checker) warn(field, format string, args ...any) {
	c.faults = append(c.faults, c.fault(Warning, field, format, args...))
}

func (v *VMI) interfacesPath() string       { return v.Path + ".domain.devices.interfaces" }
func (v *VMI) interfacePath(i int) string   { return fmt.Sprintf("%s[%d]", v.interfacesPath(), i) }
func (v *VMI) networkPath(i int) string     { return fmt.Sprintf("%s.networks[%d]", v.Path, i) }
func (v *VMI) domainPath(sub string) string { return v.Path + ".domain." + sub }

// Validate checks every VMI by KubeVirt's rules, in KubeVirt's order and words, then by rules of our own where KubeVirt
// leaves a hole, then the VMIs against each other. All faults are reported, the reader's first; a sound set gives none
// of severity Error.
func Validate(docs Docs, opts Options) []Fault {
	if p := docs.Cluster.PermitBridge; p != nil && !*p {
		opts.ForbidBridge = true
	}
	if p := docs.Cluster.PermitSlirp; p != nil && !*p {
		opts.ForbidSlirp = true
	}
	faults := append([]Fault(nil), docs.faults...)
	for i := range docs.VMIs {
		c := &checker{VMI: &docs.VMIs[i], opts: opts}
		c.check()
		faults = append(faults, c.faults...)
		if len(faults) > maxFaults {
			break
		}
	}
	faults = append(faults, across(docs)...)
	faults = append(faults, sameNADs(docs)...)
	if len(faults) > maxFaults {
		faults = faults[:maxFaults]
	}
	return faults
}

// check runs the rules in the order in which KubeVirt reports their causes.
func (c *checker) check() {
	c.networks = make(map[string]*NetworkSpec, len(c.Spec.Networks))
	for i := range c.Spec.Networks {
		if n := &c.Spec.Networks[i]; c.networks[n.Name] == nil {
			c.networks[n.Name] = n
		}
	}
	c.identity()
	c.listSizes()
	c.podNetworks()
	c.networkTypes()
	c.multusNames()
	c.states()
	for i := range c.Spec.Interfaces {
		c.binding(i)
	}
	c.pairing()
	for i := range c.Spec.Interfaces {
		c.interfaceFields(i)
	}
	c.bootOrders()
	c.podCIDRs()
	c.uniqueness()
	c.machine()
}

// identity: metadata.name becomes a directory, hostname a DHCP option.
func (c *checker) identity() {
	if c.named && !subdomainName(c.Name) {
		c.fail("metadata.name", "%q is not a Kubernetes name: lower-case letters, digits, '-' and '.' only, at most 253", c.Name)
	} else if !fileName.MatchString(c.Name) {
		c.fail("metadata.name", "there is none, and the file's name %q cannot stand for it: add metadata.name", c.Name)
	}
	if h := c.Spec.Hostname; h != "" && !dnsLabel.MatchString(h) {
		c.fail(c.Path+".hostname", "%s does not conform to the kubernetes DNS_LABEL rules : lower-case letters, digits and '-' only, at most 63", c.Path+".hostname")
	}
	if s := c.Spec.Subdomain; s != "" && !subdomainName(s) {
		c.fail(c.Path+".subdomain", "%s does not conform to the kubernetes DNS_SUBDOMAIN rules : labels of lower-case letters, digits and '-', joined by '.'", c.Path+".subdomain")
	}
}

func subdomainName(s string) bool {
	if len(s) > 253 {
		return false
	}
	for _, l := range strings.Split(s, ".") {
		if !dnsLabel.MatchString(l) {
			return false
		}
	}
	return true
}

// listSizes is V48.
func (c *checker) listSizes() {
	if c.Spec.interfacesExceed {
		c.fail(c.interfacesPath(), "%s list exceeds the %d element limit in length", c.interfacesPath(), maxList)
	}
	if c.Spec.networksExceed {
		c.fail(c.Path+".networks", "%s.networks list exceeds the %d element limit in length", c.Path, maxList)
	}
}

// podNetworks is V5 to V7.
func (c *checker) podNetworks() {
	pods, defaults := 0, 0
	for _, n := range c.Spec.Networks {
		if n.Pod != nil {
			pods++
		}
		if n.Multus != nil && n.Multus.Default {
			defaults++
		}
	}
	if pods > 1 {
		c.fail(c.Path+".interfaces", "more than one interface is connected to a pod network in %s.interfaces", c.Path)
	}
	if defaults > 1 {
		c.fail(c.Path+".networks", "Multus CNI should only have one default network")
	}
	if pods > 0 && defaults > 0 {
		c.fail(c.Path+".networks", "Pod network cannot be defined when Multus default network is defined")
	}
}

// networkTypes is V8 and V9.
func (c *checker) networkTypes() {
	for i, n := range c.Spec.Networks {
		kinds := 0
		for _, has := range []bool{n.Pod != nil, n.Multus != nil, n.Claim} {
			if has {
				kinds++
			}
		}
		switch {
		case kinds == 0:
			c.fail(c.networkPath(i), "should have a network type")
		case kinds > 1:
			c.fail(c.networkPath(i), "should have only one network type")
		}
	}
}

// multusNames is V10: only the first offender is reported.
func (c *checker) multusNames() {
	for i, n := range c.Spec.Networks {
		if n.Multus != nil && n.Multus.NetworkName == "" {
			c.fail(c.networkPath(i), "CNI delegating plugin must have a networkName")
			return
		}
	}
}

// states is V39 to V42.
func (c *checker) states() {
	for i := range c.Spec.Interfaces {
		f := &c.Spec.Interfaces[i]
		at := c.interfacePath(i) + ".state"
		switch f.State {
		case "":
		case "up", "down":
			if f.has(SRIOV) {
				c.fail(at, `"%s" interface's state "%s" is not supported for SR-IOV NICs`, f.Name, f.State)
			}
		case "absent":
			if !f.has(Bridge) {
				c.fail(at, `"%s" interface's state "absent" is supported only for bridge binding`, f.Name)
			}
			if n := c.networks[f.Name]; n != nil && (n.Pod != nil || n.Multus != nil && n.Multus.Default) {
				c.fail(at, `"%s" interface's state "absent" is not supported on default networks`, f.Name)
			}
		default:
			c.fail(at, "logical %s interface state value is unsupported: %s", f.Name, f.State)
		}
	}
}

// binding is V11, the seed's rules for the bindings that KubeVirt no longer has, and V12 to V14. An interface without
// a network is V1's business and passes here.
func (c *checker) binding(i int) {
	f := &c.Spec.Interfaces[i]
	at := c.interfacePath(i)
	if len(f.Bindings) != 1 && !(len(f.Bindings) == 0 && f.misspelt) {
		c.fail(at, "logical %s interface must have exactly one binding method or binding plugin", f.Name)
	}
	n := c.networks[f.Name]
	pod, multus := n != nil && n.Pod != nil, n != nil && n.Multus != nil
	switch {
	case f.has(Slirp) && n != nil && !pod:
		c.fail(at+".name", "Slirp interface only implemented with pod network")
	case f.has(Slirp) && pod && c.opts.ForbidSlirp:
		c.fail(at+".name", "Slirp interface is not enabled in kubevirt-config")
	}
	if f.has(Masquerade) && n != nil && !pod {
		c.fail(at+".name", "Masquerade interface only implemented with pod network")
	}
	if m := parseMAC(f.MAC); f.has(Masquerade) && m != nil && m.String() == gatewayMAC {
		c.fail(at+".macAddress", "The requested MAC address is reserved for the in-pod bridge. Please choose another one.")
	}
	if f.has(Bridge) && pod && c.opts.ForbidBridge {
		c.fail(at+".name", "Bridge on pod network configuration is not enabled under kubevirt-config")
	}
	if f.has(Macvtap) && n != nil && !multus {
		c.fail(at+".name", "Macvtap interface only implemented with Multus network")
	}
	switch {
	case f.has(Passt) && n != nil && !pod:
		c.fail(at+".name", "Passt interface only implemented with pod network")
	case f.has(Passt) && len(c.Spec.Interfaces) > 1:
		c.fail(at+".name", "Passt interface is only supported as the single interface of the VMI")
	}
	if f.has(PasstCore) && n != nil && !pod {
		c.fail(at+".name", "PasstBinding interface only implemented with pod network")
	}
	if f.has(SRIOV) && pod {
		c.fail(at+".name", "SR-IOV interface cannot be connected to the pod network; refer to a multus network")
	}
}

// pairing is V3, V2, V4 and V1, in KubeVirt's order.
func (c *checker) pairing() {
	names := map[string]bool{}
	for i, n := range c.Spec.Networks {
		if names[n.Name] {
			c.fail(c.networkPath(i)+".name", `Network with name "%s" already exists, every network must have a unique name`, n.Name)
		}
		names[n.Name] = true
	}
	interfaces := map[string]bool{}
	for _, f := range c.Spec.Interfaces {
		interfaces[f.Name] = true
	}
	for i, n := range c.Spec.Networks {
		if at := c.networkPath(i) + ".name"; !interfaces[n.Name] {
			c.fail(at, "%s '%s' not found.", at, n.Name)
		}
	}
	clear(interfaces)
	for i, f := range c.Spec.Interfaces {
		if interfaces[f.Name] {
			c.fail(c.interfacePath(i)+".name", "Only one interface can be connected to one specific network")
		}
		interfaces[f.Name] = true
	}
	for i, f := range c.Spec.Interfaces {
		if at := c.interfacePath(i) + ".name"; c.networks[f.Name] == nil {
			c.fail(at, "%s '%s' not found.", at, f.Name)
		}
	}
}

// bootOrders is V43 and V44 (and V45); interfaces share the numbers with disks, which come first.
func (c *checker) bootOrders() {
	used := map[int64]bool{}
	one := func(i int, order *int64, at string) {
		switch {
		case order == nil:
		case *order < 1:
			c.fail(fmt.Sprintf("%s[%d].bootOrder", c.Path, i), "%s[%d] must have a boot order > 0, if supplied", c.Path, i)
		case used[*order]:
			c.fail(at, "Boot order for %s already set for a different device.", at)
		default:
			used[*order] = true
		}
	}
	for i, order := range c.Spec.DiskBootOrders {
		one(i, order, c.domainPath(fmt.Sprintf("devices.disks[%d].bootOrder", i)))
	}
	for i, f := range c.Spec.Interfaces {
		one(i, f.BootOrder, c.interfacePath(i)+".bootOrder")
	}
}

// podCIDRs: KubeVirt finds these out when the VM starts.
func (c *checker) podCIDRs() {
	for i, n := range c.Spec.Networks {
		if n.Pod == nil {
			continue
		}
		if _, err := parseCIDR4(n.Pod.CIDR); err != nil {
			c.fail(c.networkPath(i)+".pod.vmNetworkCIDR", "%v", err)
		}
		if _, err := parseCIDR6(n.Pod.CIDR6); err != nil {
			c.fail(c.networkPath(i)+".pod.vmIPv6NetworkCIDR", "%v", err)
		}
	}
}

// uniqueness: what two interfaces of one machine cannot share.
func (c *checker) uniqueness() {
	macs, indexes, addresses := map[string]string{}, map[int64]string{}, map[PCIAddress]string{}
	for i, f := range c.Spec.Interfaces {
		at := c.interfacePath(i)
		if m := parseMAC(f.MAC); m != nil {
			if other, ok := macs[m.String()]; ok {
				c.fail(at+".macAddress", "MAC address %s is that of interface %q too; give each its own", m, other)
			} else {
				macs[m.String()] = f.Name
			}
		}
		if x := f.ACPIIndex; x != nil && *x != 0 {
			if other, ok := indexes[*x]; ok {
				c.fail(at+".acpiIndex", "index %d is that of interface %q too; give each its own", *x, other)
			} else {
				indexes[*x] = f.Name
			}
		}
		if pciAddress.MatchString(f.PCIAddress) {
			a := parsePCI(f.PCIAddress)
			if other, ok := addresses[a]; ok {
				c.fail(at+".pciAddress", "PCI address %s is that of interface %q too; give each its own", a, other)
			} else {
				addresses[a] = f.Name
			}
		}
	}
}

// machine checks what the frontend's size is made of.
func (c *checker) machine() {
	n, ok := c.Spec.vcpus()
	switch {
	case !ok && c.Spec.CPU == (CPU{}):
		c.fail(c.domainPath("resources"), "cpu is %v", errQuantity)
	case !ok:
		c.fail(c.domainPath("cpu"), "sockets, cores and threads must not be negative")
	case n > maxVCPUs:
		c.fail(c.domainPath("cpu"), "more than %d vCPUs", maxVCPUs)
	case n > maxQueues && c.Spec.Multiqueue:
		c.warn(c.domainPath("devices.networkInterfaceMultiqueue"), "%d vCPUs, but an interface gets %d queue pairs at most", n, maxQueues)
	}
	bytes, field, ok := c.Spec.memory()
	switch {
	case !ok:
		c.fail(c.domainPath(field), "memory is %v", errQuantity)
	case bytes < minMemory || bytes > maxMemory:
		c.fail(c.domainPath(field), "memory must be between 1Mi and 64Ti, the guest would have %d bytes", bytes)
	}
	if h := c.Spec.HugepageSize; h != "" {
		if _, ok := hugepage(h); !ok {
			c.fail(c.domainPath("memory.hugepages.pageSize"), "%q is not a size of huge pages; use 2Mi or 1Gi", h)
		}
	}
	if c.Spec.Multiqueue && len(c.Spec.Interfaces) > 0 {
		for _, f := range c.Spec.Interfaces {
			if f.Model == "" || f.Model == "virtio" {
				return
			}
		}
		c.warn(c.domainPath("devices.networkInterfaceMultiqueue"), "virtio-net multiqueue request, but there are no virtio interfaces defined")
	}
}

// hugepage reads the size of a huge page: a power of two of at least 64Ki.
func hugepage(s string) (int64, bool) {
	n, err := parseQuantity(s)
	return n, err == nil && n >= 64<<10 && n <= 16<<30 && n&(n-1) == 0
}
