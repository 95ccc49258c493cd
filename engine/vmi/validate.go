package vmi

import (
	"fmt"
	"regexp"
	"slices"
)

// Options adds to what the documents say of their cluster. The zero value adds nothing.
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
	fileName      = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._-]{0,252}$`)
	models        = []string{"e1000", "e1000e", "igb", "ne2k_pci", "pcnet", "rtl8139", "virtio"}
)

// checker gathers the faults of one VMI.
type checker struct {
	*VMI
	cluster  Cluster
	faults   []Fault
	networks map[string]*NetworkSpec // of networks with one name the last, as KubeVirt has it
}

// network is the one that an interface names; an empty one if there is none.
func (c *checker) network(name string) *NetworkSpec {
	if n := c.networks[name]; n != nil {
		return n
	}
	return &NetworkSpec{}
}

func (c *checker) fail(field, format string, args ...any) {
	c.faults = append(c.faults, c.fault(Error, field, format, args...))
}

// cause is fail for another reason than an invalid value.
func (c *checker) cause(r Reason, field, format string, args ...any) {
	c.fail(field, format, args...)
	c.faults[len(c.faults)-1].Reason = r
}

func (c *checker) warn(field, format string, args ...any) {
	c.faults = append(c.faults, c.fault(Warning, field, format, args...))
}

func (v *VMI) interfacesPath() string       { return v.Path + ".domain.devices.interfaces" }
func (v *VMI) interfacePath(i int) string   { return fmt.Sprintf("%s[%d]", v.interfacesPath(), i) }
func (v *VMI) networkPath(i int) string     { return fmt.Sprintf("%s.networks[%d]", v.Path, i) }
func (v *VMI) domainPath(sub string) string { return v.Path + ".domain." + sub }

// Validate checks every VMI by the rules of KubeVirt's webhook, in its order and words, then by rules of our own where
// KubeVirt leaves a hole, then the VMIs against each other. Of the webhook's rules it knows those about networks and the
// fields that are read; bindings that KubeVirt no longer has keep the rules that they had. All faults are reported, the
// reader's first; a sound set gives none of severity Error.
func Validate(docs Docs, opts Options) []Fault {
	no := false
	if opts.ForbidBridge {
		docs.Cluster.PermitBridge = &no
	}
	if opts.ForbidSlirp {
		docs.Cluster.PermitSlirp = &no
	}
	docs, faults := docs.withDefaults()
	faults = append(append([]Fault(nil), docs.faults...), faults...)
	for i := range docs.VMIs {
		c := &checker{VMI: &docs.VMIs[i], cluster: docs.Cluster}
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

// check runs the rules in the order in which KubeVirt reports their causes. The webhook for VMIs asks about the network
// first, that for VMs where its turn comes.
func (c *checker) check() {
	c.networks = make(map[string]*NetworkSpec, len(c.Spec.Networks))
	for i := range c.Spec.Networks {
		c.networks[c.Spec.Networks[i].Name] = &c.Spec.Networks[i]
	}
	c.discontinued()
	if c.Path == "spec" {
		c.networkRules()
		c.hostNames()
	} else {
		c.hostNames()
		c.networkRules()
	}
	c.claims()
	c.bootOrders()
	c.probes()
	c.diskBootOrders()
	c.resolvers()
	c.launchSecurity()

	c.ownRules()
}

// networkRules is V1 to V14, V18 to V42, V47 and V48.
func (c *checker) networkRules() {
	c.listSizes()
	c.podNetworks()
	c.networkTypes()
	c.multusNames()
	c.states()
	for i := range c.Spec.Interfaces {
		c.binding(i)
	}
	c.networkNames()
	c.resourceClaims()
	c.pairing()
	for i := range c.Spec.Interfaces {
		c.interfaceFields(i)
	}
}

// ownRules find what KubeVirt finds out when the machine starts, or never.
func (c *checker) ownRules() {
	c.identity()
	for i := range c.Spec.Interfaces {
		c.interfaceHoles(i)
	}
	c.podCIDRs()
	c.uniqueness()
	c.machine()
}

// identity: metadata.name becomes a directory.
func (c *checker) identity() {
	if c.named && subdomainFaults(c.Name) != nil {
		c.fail("metadata.name", "%q is not a Kubernetes name: lower-case letters, digits, '-' and '.' only, at most 253", c.Name)
	} else if !fileName.MatchString(c.Name) {
		c.fail("metadata.name", "there is none, and the file's name %q cannot stand for it: add metadata.name", c.Name)
	}
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

// discontinued is V17. The other bindings that KubeVirt no longer has (V15, V16) are served here.
func (c *checker) discontinued() {
	for i := range c.Spec.Interfaces {
		if c.Spec.Interfaces[i].has(Passt) {
			c.fail(c.interfacePath(i)+".passt", "Passt network binding has been discontinued since v1.3")
		}
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
		c.cause(Duplicate, c.Path+".interfaces", "more than one interface is connected to a pod network in %s.interfaces", c.Path)
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
		for _, has := range []bool{n.Pod != nil, n.Multus != nil, n.Claim != nil} {
			if has {
				kinds++
			}
		}
		switch {
		case kinds == 0:
			c.cause(Required, c.networkPath(i), "should have a network type")
		case kinds > 1:
			c.cause(Required, c.networkPath(i), "should have only one network type")
		}
	}
}

// multusNames is V10: only the first offender is reported.
func (c *checker) multusNames() {
	for i, n := range c.Spec.Networks {
		if n.Multus != nil && n.Multus.NetworkName == "" {
			c.cause(Required, c.networkPath(i), "CNI delegating plugin must have a networkName")
			return
		}
	}
}

// states is V39 to V42.
func (c *checker) states() {
	first := "" // the name of the default network
	for _, n := range c.Spec.Networks {
		if n.Pod != nil || n.Multus != nil && n.Multus.Default {
			first = n.Name
			break
		}
	}
	hasDefault := slices.ContainsFunc(c.Spec.Networks, func(n NetworkSpec) bool {
		return n.Pod != nil || n.Multus != nil && n.Multus.Default
	})
	for i := range c.Spec.Interfaces {
		f := &c.Spec.Interfaces[i]
		at := c.interfacePath(i) + ".state"
		switch f.State {
		case "":
		case "up", "down":
			if f.has(SRIOV) {
				c.fail(at, `%q interface's state %q is not supported for SR-IOV NICs`, f.Name, f.State)
			}
		case "absent":
			if !f.has(Bridge) {
				c.fail(at, `%q interface's state "absent" is supported only for bridge binding`, f.Name)
			}
			if hasDefault && first == f.Name {
				c.fail(at, `%q interface's state "absent" is not supported on default networks`, f.Name)
			}
		default:
			c.fail(at, "logical %s interface state value is unsupported: %s", f.Name, f.State)
		}
	}
}

// binding is V11, the older rules for slirp and macvtap, V12 to V14, V18 and V19. The older rules were one chain, of
// which the first that applies was reported. They leave an interface without a network to V1.
func (c *checker) binding(i int) {
	f := &c.Spec.Interfaces[i]
	at := c.interfacePath(i)
	count := len(f.Bindings)
	if f.has(Passt) {
		count--
	}
	if count != 1 && !(len(f.Bindings) == 0 && f.misspelt) {
		c.fail(at, "logical %s interface must have exactly one binding method or binding plugin", f.Name)
	}
	n, known := c.network(f.Name), c.networks[f.Name] != nil
	pod := n.Pod != nil
	older := false
	say := func(text string) { older = true; c.fail(at+".name", "%s", text) }
	switch {
	case !f.has(Slirp) || !known:
	case !pod:
		say("Slirp interface only implemented with pod network")
	case c.cluster.PermitSlirp != nil && !*c.cluster.PermitSlirp:
		say("Slirp interface is not enabled in kubevirt-config")
	}
	before := len(c.faults)
	c.todaysBinding(f, at, pod)
	switch older = older || len(c.faults) > before; {
	case older || !f.has(Macvtap) || !known:
	case !c.cluster.Gate(GateMacvtap):
		say("Macvtap feature gate is not enabled")
	case n.Multus == nil:
		say("Macvtap interface only implemented with Multus network")
	}
	if f.has(PasstCore) && !c.cluster.Gate(GatePasstCore) {
		c.fail(at+".name", "PasstBinding feature gate is not enabled")
	}
	if f.has(PasstCore) && !pod {
		c.fail(at+".name", "PasstBinding interface only implemented with pod network")
	}
}

// todaysBinding is V12 to V14.
func (c *checker) todaysBinding(f *InterfaceSpec, at string, pod bool) {
	if f.has(Masquerade) && !pod {
		c.fail(at+".name", "Masquerade interface only implemented with pod network")
	}
	if f.has(Masquerade) && f.MAC == gatewayMAC {
		c.fail(at+".macAddress", reservedMAC)
	}
	if permit := c.cluster.PermitBridge; f.has(Bridge) && pod && permit != nil && !*permit {
		c.fail(at+".name", "Bridge on pod network configuration is not enabled under kubevirt-config")
	}
}

const reservedMAC = "The requested MAC address is reserved for the in-pod bridge. Please choose another one."

// networkNames is V3.
func (c *checker) networkNames() {
	names := map[string]bool{}
	for i, n := range c.Spec.Networks {
		if names[n.Name] {
			c.cause(Duplicate, c.networkPath(i)+".name", "Network with name %q already exists, every network must have a unique name", n.Name)
		}
		names[n.Name] = true
	}
}

// resourceClaims is V47.
func (c *checker) resourceClaims() {
	at := c.Path + ".networks"
	isClaim := func(n NetworkSpec) bool { return n.Claim != nil }
	switch {
	case !slices.ContainsFunc(c.Spec.Networks, isClaim):
		return
	case !c.cluster.Gate(GateDRA):
		c.fail(at, "vmi.spec.networks contains DRA networks but NetworkDevicesWithDRA feature gate is not enabled")
		return
	case slices.ContainsFunc(c.Spec.Networks, func(n NetworkSpec) bool { return n.Multus != nil }):
		c.fail(at, "mixing Multus and DRA resourceClaim networks in the same VMI is not supported")
		return
	}
	pairs := map[string]bool{}
	for i, n := range c.Spec.Networks {
		if n.Claim == nil {
			continue
		}
		c.claimBinding(n.Name)
		at := c.networkPath(i)
		claim, request := n.Claim.ClaimName, n.Claim.RequestName
		if claim == "" {
			c.cause(Required, at+".resourceClaim.claimName", "claimName is required for DRA network")
		}
		if request == "" {
			c.cause(Required, at+".resourceClaim.requestName", "requestName is required for DRA network")
		}
		if claim == "" || request == "" {
			continue
		}
		if !slices.ContainsFunc(c.Spec.claims, func(s claimSource) bool { return s.name == claim }) {
			c.cause(NotFound, at+".resourceClaim.claimName", "network references resourceClaim %q which is not defined in spec.resourceClaims", claim)
		}
		if pair := claim + "/" + request; pairs[pair] {
			c.cause(Duplicate, at, "duplicate claimName/requestName combination %q", pair)
		} else {
			pairs[pair] = true
		}
	}
}

// claimBinding: what a claim yields is a device, which few bindings can take.
func (c *checker) claimBinding(network string) {
	for i := range c.Spec.Interfaces {
		if f := &c.Spec.Interfaces[i]; f.Name == network {
			if !f.has(SRIOV) && !f.has(PluginBound) {
				c.fail(c.interfacesPath(), "DRA network %q requires an SR-IOV or binding plugin interface", network)
			}
			return
		}
	}
}

// pairing is V2, V4 and V1, in KubeVirt's order.
func (c *checker) pairing() {
	interfaces := map[string]bool{}
	for _, f := range c.Spec.Interfaces {
		interfaces[f.Name] = true
	}
	for i, n := range c.Spec.Networks {
		if at := c.networkPath(i) + ".name"; !interfaces[n.Name] {
			c.cause(Required, at, "%s '%s' not found.", at, n.Name)
		}
	}
	clear(interfaces)
	for i, f := range c.Spec.Interfaces {
		if interfaces[f.Name] {
			c.cause(Duplicate, c.interfacePath(i)+".name", "Only one interface can be connected to one specific network")
		}
		interfaces[f.Name] = true
	}
	for i, f := range c.Spec.Interfaces {
		if at := c.interfacePath(i) + ".name"; c.networks[f.Name] == nil {
			c.fail(at, "%s '%s' not found.", at, f.Name)
		}
	}
}

// diskBootOrders is V43 for disks, which is asked later than for interfaces.
func (c *checker) diskBootOrders() {
	for i, order := range c.Spec.DiskBootOrders {
		if at := c.domainPath(fmt.Sprintf("devices.disks[%d]", i)); order != nil && *order < 1 {
			c.fail(at+".bootOrder", "%s must have a boot order > 0, if supplied", at)
		}
	}
}

// bootOrders is V43 and V44; interfaces share the numbers with disks, which come first.
func (c *checker) bootOrders() {
	used := map[int64]bool{}
	once := func(order int64, at string) {
		if used[order] {
			c.fail(at, "Boot order for %s already set for a different device.", at)
		}
		used[order] = true
	}
	for i, order := range c.Spec.DiskBootOrders {
		if order != nil {
			once(*order, c.domainPath(fmt.Sprintf("devices.disks[%d].bootOrder", i)))
		}
	}
	for i, f := range c.Spec.Interfaces {
		switch order := f.BootOrder; {
		case order == nil:
		case *order < 1:
			c.fail(fmt.Sprintf("%s[%d].bootOrder", c.Path, i), "%s[%d] must have a boot order > 0, if supplied", c.Path, i)
		default:
			once(*order, c.interfacePath(i)+".bootOrder")
		}
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
	names := map[string]bool{}
	for i, f := range c.Spec.Interfaces {
		if names[f.Name] {
			continue // V4 has said so: one of the two has to go
		}
		names[f.Name] = true
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
