package vmi

import (
	"fmt"
	"net"
	"regexp"
	"strings"

	"go.yaml.in/yaml/v3"
)

// admitted is the part of a spec that concerns a network only by the webhook's rules: nothing is made of it but faults.
type admitted struct {
	architecture  string
	startStrategy string
	dnsPolicy     string
	dns           *dnsSpec
	claims        []claimSource
	readiness     *probeSpec
	liveness      *probeSpec
	launch        *launchSpec
	efi           *efiSpec
	smm           *switchSpec
}

// dnsSpec is dnsConfig; options are their names.
type dnsSpec struct{ nameservers, searches, options []string }

// claimSource is one of resourceClaims.
type claimSource struct {
	name            string
	claim, template *string
}

// probeSpec says which handlers a probe has.
type probeSpec struct{ httpGet, tcpSocket, exec, agent bool }

// launchSpec is launchSecurity of a confidential VM.
type launchSpec struct{ sev, snp, tdx, attestation bool }

// efiSpec is firmware.bootloader.efi.
type efiSpec struct{ secureBoot, persistent *bool }

// switchSpec is a feature that may be switched off.
type switchSpec struct{ enabled *bool }

// admitted reads what stands in a spec.
func (d *decoder) admitted(a *admitted) fields {
	probe := func(dst **probeSpec) func(*yaml.Node, string) {
		return func(n *yaml.Node, p string) {
			*dst = &probeSpec{}
			d.object(n, p, false, fields{
				"httpGet":        present(&(*dst).httpGet),
				"tcpSocket":      present(&(*dst).tcpSocket),
				"exec":           present(&(*dst).exec),
				"guestAgentPing": present(&(*dst).agent),
			})
		}
	}
	texts := func(dst *[]string) func(*yaml.Node, string) {
		return func(n *yaml.Node, p string) {
			d.list(n, p, maxList, func(n *yaml.Node, p string) { *dst = append(*dst, d.text(n, p)) })
		}
	}
	return fields{
		"architecture":   func(n *yaml.Node, p string) { a.architecture = d.text(n, p) },
		"startStrategy":  func(n *yaml.Node, p string) { a.startStrategy = d.text(n, p) },
		"readinessProbe": probe(&a.readiness),
		"livenessProbe":  probe(&a.liveness),
		"dnsPolicy":      func(n *yaml.Node, p string) { a.dnsPolicy = d.text(n, p) },
		"dnsConfig": func(n *yaml.Node, p string) {
			a.dns = &dnsSpec{}
			d.object(n, p, false, fields{
				"nameservers": texts(&a.dns.nameservers),
				"searches":    texts(&a.dns.searches),
				"options": func(n *yaml.Node, p string) {
					d.list(n, p, maxList, func(n *yaml.Node, p string) {
						name := ""
						d.object(n, p, false, fields{"name": func(n *yaml.Node, p string) { name = d.text(n, p) }})
						a.dns.options = append(a.dns.options, name)
					})
				},
			})
		},
		"resourceClaims": func(n *yaml.Node, p string) {
			d.list(n, p, maxList, func(n *yaml.Node, p string) {
				var c claimSource
				ref := func(dst **string) func(*yaml.Node, string) {
					return func(n *yaml.Node, p string) { s := d.text(n, p); *dst = &s }
				}
				d.object(n, p, false, fields{
					"name":                      func(n *yaml.Node, p string) { c.name = d.text(n, p) },
					"resourceClaimName":         ref(&c.claim),
					"resourceClaimTemplateName": ref(&c.template),
				})
				a.claims = append(a.claims, c)
			})
		},
	}
}

// admittedDomain reads what stands in spec.domain.
func (d *decoder) admittedDomain(a *admitted) fields {
	boolean := func(dst **bool) func(*yaml.Node, string) {
		return func(n *yaml.Node, p string) { b := d.boolean(n, p); *dst = &b }
	}
	return fields{
		"launchSecurity": func(n *yaml.Node, p string) {
			a.launch = &launchSpec{}
			d.object(n, p, false, fields{
				"sev": func(n *yaml.Node, p string) {
					a.launch.sev = true
					d.object(n, p, false, fields{"attestation": present(&a.launch.attestation)})
				},
				"snp": present(&a.launch.snp),
				"tdx": present(&a.launch.tdx),
			})
		},
		"firmware": func(n *yaml.Node, p string) {
			d.object(n, p, false, fields{"bootloader": func(n *yaml.Node, p string) {
				d.object(n, p, false, fields{"efi": func(n *yaml.Node, p string) {
					a.efi = &efiSpec{}
					d.object(n, p, false, fields{"secureBoot": boolean(&a.efi.secureBoot), "persistent": boolean(&a.efi.persistent)})
				}})
			}})
		},
		"features": func(n *yaml.Node, p string) {
			d.object(n, p, false, fields{"smm": func(n *yaml.Node, p string) {
				a.smm = &switchSpec{}
				d.object(n, p, false, fields{"enabled": boolean(&a.smm.enabled)})
			}})
		},
	}
}

// present notes that a field is there, whatever is in it.
func present(dst *bool) func(*yaml.Node, string) {
	return func(*yaml.Node, string) { *dst = true }
}

const (
	labelFormat     = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
	subdomainFormat = labelFormat + `(\.` + labelFormat + ")*"
)

var (
	dnsLabel     = regexp.MustCompile("^" + labelFormat + "$")
	dnsSubdomain = regexp.MustCompile("^" + subdomainFormat + "$")
)

// labelFaults says in Kubernetes' words why a text is no label of RFC 1123.
func labelFaults(s string) (faults []string) {
	if len(s) > 63 {
		faults = append(faults, "must be no more than 63 characters")
	}
	switch {
	case dnsLabel.MatchString(s):
	case dnsSubdomain.MatchString(s):
		faults = append(faults, "must not contain dots")
	default:
		faults = append(faults, "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', "+
			"and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '"+labelFormat+"')")
	}
	return faults
}

// subdomainFaults says in Kubernetes' words why a text is no name of RFC 1123.
func subdomainFaults(s string) (faults []string) {
	if len(s) > 253 {
		faults = append(faults, "must be no more than 253 characters")
	}
	if !dnsSubdomain.MatchString(s) {
		faults = append(faults, "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', "+
			"and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '"+subdomainFormat+"')")
	}
	return faults
}

// hostNames are the rules for the names that a guest gets by DHCP.
func (c *checker) hostNames() {
	if h := c.Spec.Hostname; h != "" {
		if f := labelFaults(h); f != nil {
			c.fail(c.Path+".hostname", "%s.hostname does not conform to the kubernetes DNS_LABEL rules : %s", c.Path, strings.Join(f, ", "))
		}
	}
	if s := c.Spec.Subdomain; s != "" {
		if f := subdomainFaults(s); f != nil {
			c.fail(c.Path+".subdomain", "%s.subdomain does not conform to the kubernetes DNS_SUBDOMAIN rules : %s", c.Path, strings.Join(f, ", "))
		}
	}
}

// claims checks resourceClaims, which networks refer to.
func (c *checker) claims() {
	names := map[string]bool{}
	for i, r := range c.Spec.claims {
		at := fmt.Sprintf("%s.resourceClaims[%d]", c.Path, i)
		switch {
		case r.name == "":
			c.cause(Required, at+".name", "%s.name is a required field", at)
		case names[r.name]:
			c.cause(Duplicate, at+".name", "duplicate resourceClaims name %q", r.name)
		default:
			if f := labelFaults(r.name); f != nil {
				c.fail(at+".name", "%s.name does not conform to the kubernetes DNS_LABEL rules: %s", at, strings.Join(f, ", "))
			}
			names[r.name] = true
		}
		if r.claim != nil && r.template != nil {
			c.fail(at, "at most one of resourceClaimName or resourceClaimTemplateName may be specified")
		}
		if r.claim == nil && r.template == nil {
			c.fail(at, "must specify one of: resourceClaimName, resourceClaimTemplateName")
		}
		for _, ref := range []struct {
			field string
			name  *string
		}{{"resourceClaimName", r.claim}, {"resourceClaimTemplateName", r.template}} {
			if ref.name == nil {
				continue
			}
			for _, f := range subdomainFaults(*ref.name) {
				c.fail(at+"."+ref.field, "%s", f)
			}
		}
	}
}

// probes is V46, and what it needs to be asked: a probe has one handler.
func (c *checker) probes() {
	type probe struct {
		at string
		*probeSpec
	}
	both := []probe{{c.Path + ".readinessProbe", c.Spec.readiness}, {c.Path + ".livenessProbe", c.Spec.liveness}}
	for _, p := range both {
		if p.probeSpec == nil {
			continue
		}
		handlers := 0
		for _, has := range []bool{p.httpGet, p.tcpSocket, p.exec, p.agent} {
			if has {
				handlers++
			}
		}
		switch {
		case handlers > 1:
			c.fail(p.at, "%s must have exactly one probe type set", p.at)
		case handlers < 1:
			c.cause(Required, p.at, "either %[1]s.tcpSocket, %[1]s.exec or %[1]s.httpGet must be set if a %[1]s is specified", p.at)
		}
	}
	for _, n := range c.Spec.Networks {
		if n.Pod != nil {
			return
		}
	}
	for _, p := range both {
		if p.probeSpec == nil {
			continue
		}
		if p.httpGet {
			c.fail(p.at+".httpGet", "%s.httpGet is only allowed if the Pod Network is attached", p.at)
		}
		if p.tcpSocket {
			c.fail(p.at+".tcpSocket", "%s.tcpSocket is only allowed if the Pod Network is attached", p.at)
		}
	}
}

// resolvers checks dnsPolicy and dnsConfig, which reach a guest as its resolvers and search domains.
func (c *checker) resolvers() {
	const none = "None"
	at, dns := c.Path+".dnsConfig", c.Spec.dns
	switch p := c.Spec.dnsPolicy; p {
	case "", "ClusterFirstWithHostNet", "ClusterFirst", "Default":
	case none:
		if dns == nil {
			c.cause(Required, at, "must provide `dnsConfig` when `dnsPolicy` is None")
			return
		}
		if len(dns.nameservers) == 0 {
			c.cause(Required, "nameservers", "must provide at least one DNS nameserver when `dnsPolicy` is None")
			return
		}
	default:
		c.cause(NotSupported, c.Path+".dnsPolicy", "DNSPolicy: %s is not supported, valid values: [ClusterFirstWithHostNet ClusterFirst Default None ]", p)
	}
	if dns == nil {
		return
	}
	servers := make([]string, len(dns.nameservers)) // as they are read: without leading zeros
	for i, s := range dns.nameservers {
		servers[i] = s
		if a, ok := parseIPv4(s); ok {
			servers[i] = a.String()
		} else if a := net.ParseIP(s); a != nil {
			servers[i] = a.String()
		}
	}
	if len(servers) > 3 {
		c.fail("nameservers", "must not have more than 3 nameservers: %s", servers)
	}
	for _, s := range servers {
		if net.ParseIP(s) == nil {
			c.fail("nameservers", "must be valid IP address: %s", s)
		}
	}
	if len(dns.searches) > 6 {
		c.fail("searchDomains", "must not have more than 6 search paths")
	}
	if len(strings.Join(dns.searches, " ")) > 256 {
		c.fail("searchDomains", "must not have more than 256 characters (including spaces) in the search list")
	}
	for _, s := range dns.searches {
		for _, f := range subdomainFaults(s) {
			c.fail("searchDomains", "%s", f)
		}
	}
	for _, name := range dns.options {
		if name == "" {
			c.fail("options", "Option.Name must not be empty")
		}
	}
}

// launchSecurity is V45, and the rules before it that keep it from being asked.
func (c *checker) launchSecurity() {
	l, at := c.Spec.launch, c.Path+".launchSecurity"
	if l == nil {
		return
	}
	switch a := c.Spec.architecture; a {
	case "", "amd64":
	case "s390x":
		return
	default:
		c.fail(c.Path+".architecture", "No launchSecurity support for architecture: %s", a)
		return
	}
	kind, gate, kinds := "", GateSEV, 0
	for _, k := range []struct {
		has  bool
		name string
	}{{l.sev, "SEV"}, {l.snp, "SNP"}, {l.tdx, "TDX"}} {
		if k.has {
			kind = k.name
			kinds++
		}
	}
	if l.tdx {
		gate = GateTDX
	}
	if kinds != 1 {
		c.cause(Forbidden, at, "One and only one launchSecurity type can be set")
		return
	}
	if !c.cluster.Gate(gate) {
		c.fail(at, "%s feature gate is not enabled in kubevirt-config", gate)
		return
	}
	isOn := func(b *bool) bool { return b == nil || *b }
	if s := c.Spec.smm; l.tdx && s != nil && isOn(s.enabled) {
		c.fail(at, "TDX does not work along with SMM")
	}
	efi := c.Spec.efi
	switch {
	case efi == nil:
		c.fail(at, "%s requires OVMF (UEFI)", kind)
	default:
		if !l.tdx && isOn(efi.secureBoot) {
			c.fail(at, "%s does not work along with SecureBoot", kind)
		}
		if !l.sev && efi.persistent != nil && *efi.persistent {
			c.fail(at, "%s does not work along with Persistent EFI variables", kind)
		}
	}
	if l.attestation && c.Spec.startStrategy != "Paused" {
		c.fail(at, "SEV attestation requires VMI StartStrategy 'Paused'")
	}
	for _, f := range c.Spec.Interfaces {
		if f.BootOrder != nil {
			c.fail(at, "%s does not work with bootable NICs: %s", kind, f.Name)
		}
	}
}
