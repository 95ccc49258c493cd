package vmi

import (
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// spec makes a VMI of the lines for its first interface and its first network. An empty text keeps the default.
func spec(iface, network string) string {
	if iface == "" {
		iface = "name: a\nmasquerade: {}"
	}
	if network == "" {
		network = "name: a\npod: {}"
	}
	return vmi("interfaces:\n"+item(iface), "networks:\n"+item(network))
}

// item makes a list item of lines.
func item(lines string) string {
	return "- " + strings.ReplaceAll(strings.TrimRight(lines, "\n"), "\n", "\n  ") + "\n"
}

// vmi makes a VMI of what stands in devices and what stands in spec.
func vmi(devices, rest string) string {
	return "kind: VirtualMachineInstance\nmetadata: {name: v}\nspec:\n  domain:\n    devices:\n" +
		indent(devices, 6) + indent(rest, 2)
}

func indent(s string, n int) string {
	var b strings.Builder
	for _, l := range strings.Split(strings.TrimRight(s, "\n"), "\n") {
		fmt.Fprintf(&b, "%*s%s\n", n, "", l)
	}
	return b.String()
}

func lines(faults []Fault) []string {
	out := []string{}
	for _, f := range faults {
		s := f.String()
		if f.Severity == Warning {
			s = "warning " + s
		}
		out = append(out, s)
	}
	return out
}

const i0 = "spec.domain.devices.interfaces[0]"
const i1 = "spec.domain.devices.interfaces[1]"

// two is a VMI with two interfaces and two networks.
func two(a, b, netA, netB string) string {
	return vmi("interfaces:\n"+item(a)+item(b), "networks:\n"+item(netA)+item(netB))
}

const (
	masqA = "name: a\nmasquerade: {}"
	podA  = "name: a\npod: {}"
	mulA  = "name: a\nmultus: {networkName: n}"
	mulB  = "name: b\nmultus: {networkName: n}"
	briB  = "name: b\nbridge: {}"
)

// Each row is one rule of reference table V (KubeVirt's texts), or a hole that KubeVirt leaves (own).
func TestValidate(t *testing.T) {
	for _, c := range []struct {
		name, yaml string
		opts       Options
		want       []string
	}{
		{"sound", spec("", ""), Options{}, nil},
		{"V1 Row1", vmi("interfaces:\n"+item(masqA), "networks: []"), Options{}, []string{
			i0 + ".name: Masquerade interface only implemented with pod network",
			i0 + ".name: " + i0 + ".name 'a' not found."}},
		{"V1 template Row1", strings.ReplaceAll("kind: VirtualMachine\nmetadata: {name: v}\nspec: {running: true, template: {spec: {domain: {devices: {interfaces: [{name: a, masquerade: {}}]}}}}}", "\t", ""), Options{}, []string{
			"spec.template.spec.domain.devices.interfaces[0].name: Masquerade interface only implemented with pod network",
			"spec.template.spec.domain.devices.interfaces[0].name: spec.template.spec.domain.devices.interfaces[0].name 'a' not found."}},
		{"V2 Row1", vmi("interfaces:\n"+item(masqA), "networks:\n"+item(mulB)+item(podA)), Options{}, []string{
			"spec.networks[0].name: spec.networks[0].name 'b' not found."}},
		{"V3 Row2", two(masqA, briB, podA, "name: a\nmultus: {networkName: n}"), Options{}, []string{
			i0 + ".name: Masquerade interface only implemented with pod network",
			`spec.networks[1].name: Network with name "a" already exists, every network must have a unique name`,
			i1 + ".name: " + i1 + ".name 'b' not found."}},
		{"V4 Row2", vmi("interfaces:\n"+item(masqA)+item(masqA), "networks:\n"+item(podA)), Options{}, []string{
			i1 + ".name: Only one interface can be connected to one specific network"}},
		{"V5", two(masqA, "name: b\nmasquerade: {}", podA, "name: b\npod: {}"), Options{}, []string{
			"spec.interfaces: more than one interface is connected to a pod network in spec.interfaces"}},
		{"V6", two("name: a\nbridge: {}", briB, "name: a\nmultus: {networkName: n, default: true}", "name: b\nmultus: {networkName: n, default: true}"), Options{}, []string{
			"spec.networks: Multus CNI should only have one default network"}},
		{"V7 Row9", two(masqA, briB, podA, "name: b\nmultus: {networkName: n, default: true}"), Options{}, []string{
			"spec.networks: Pod network cannot be defined when Multus default network is defined"}},
		{"V8 Row3", spec("name: a\nbridge: {}", "name: a"), Options{}, []string{
			"spec.networks[0]: should have a network type"}},
		{"V8 null Row3", spec("name: a\nbridge: {}", "name: a\npod:"), Options{}, []string{
			"spec.networks[0]: should have a network type"}},
		{"V9 Row3", spec("", "name: a\npod: {}\nmultus: {networkName: n}"), Options{}, []string{
			"spec.networks[0]: should have only one network type"}},
		{"V10 first only", two("name: a\nbridge: {}", briB, "name: a\nmultus: {}", "name: b\nmultus: {}"), Options{}, []string{
			"spec.networks[0]: CNI delegating plugin must have a networkName"}},
		{"V11 none", spec("name: a", ""), Options{}, []string{
			i0 + ": logical a interface must have exactly one binding method or binding plugin"}},
		{"V11 two", spec("name: a\nmasquerade: {}\nbridge: {}", ""), Options{}, []string{
			i0 + ": logical a interface must have exactly one binding method or binding plugin"}},
		{"V12 Row8 Row60", spec("", mulA), Options{}, []string{
			i0 + ".name: Masquerade interface only implemented with pod network"}},
		{"V13 Row58", spec(masqA+"\nmacAddress: 02:00:00:00:00:00", ""), Options{}, []string{
			i0 + ".macAddress: The requested MAC address is reserved for the in-pod bridge. Please choose another one."}},
		{"V13 own: other spelling Row58", spec(masqA+"\nmacAddress: 0200.0000.0000", ""), Options{}, []string{
			i0 + ".macAddress: The requested MAC address is reserved for the in-pod bridge. Please choose another one."}},
		{"V14 Row45", spec("name: a\nbridge: {}", ""), Options{ForbidBridge: true}, []string{
			i0 + ".name: Bridge on pod network configuration is not enabled under kubevirt-config"}},
		{"V14 by the cluster's CR Row45", spec("name: a\nbridge: {}", "") +
			"---\nkind: KubeVirt\nspec: {configuration: {network: {permitBridgeInterfaceOnPodNetwork: false}}}", Options{}, []string{
			i0 + ".name: Bridge on pod network configuration is not enabled under kubevirt-config"}},
		{"V20", spec("name: a.b\nmasquerade: {}", "name: a.b\npod: {}"), Options{}, []string{
			i0 + ".name: Network interface name can only contain alphabetical characters, numbers, dashes (-) or underscores (_)"}},
		{"V21 Row20", spec(masqA+"\nmodel: vmxnet3", ""), Options{}, []string{
			i0 + ".model: interface " + i0 + ".name uses model vmxnet3 that is not supported."}},
		{"V22 Row21", spec(masqA+"\nmacAddress: zz:00:00:00:00:00", ""), Options{}, []string{
			i0 + ".macAddress: interface " + i0 + ".name has malformed MAC address (zz:00:00:00:00:00)."}},
		{"V22 dash Row21", spec(masqA+"\nmacAddress: DE-AD-00-00-BE-AF", ""), Options{}, nil},
		{"V23 Row21", spec(masqA+"\nmacAddress: 02:00:00:00:00:01:02:03", ""), Options{}, []string{
			i0 + ".macAddress: interface " + i0 + ".name has too long MAC address (02:00:00:00:00:01:02:03)."}},
		{"V24 Row27", spec(masqA+"\npciAddress: 81:00.1", ""), Options{}, []string{
			i0 + ".pciAddress: interface " + i0 + ".name has malformed PCI address (81:00.1)."}},
		{"V25 Row26", spec(masqA+"\nports: [{name: x}]", ""), Options{}, []string{
			i0 + ".ports[0].port: Port field is mandatory."}},
		{"V26 above Row26", spec(masqA+"\nports: [{port: 80}, {port: 65536}]", ""), Options{}, []string{
			i0 + ".ports[1].port: Port field must be in range 0 < x < 65536."}},
		{"V26 below Row26", spec(masqA+"\nports: [{port: -1}]", ""), Options{}, []string{
			i0 + ".ports[0].port: Port field must be in range 0 < x < 65536."}},
		{"V27 Row26", spec(masqA+"\nports: [{port: 80, protocol: tcp}]", ""), Options{}, []string{
			i0 + ".ports[0].protocol: Unknown protocol, only TCP or UDP allowed"}},
		{"V28 Row26", spec(masqA+"\nports: [{port: 80, name: http}, {port: 81, name: http}]", ""), Options{}, []string{
			i0 + ".ports[1].name: Duplicate name of the port: http"}},
		{"V29 Row26", spec(masqA+"\nports: [{port: 80, name: 'Bad_Name!'}]", ""), Options{}, []string{
			i0 + ".ports[0].name: Invalid name of the port: Bad_Name!"}},
		{"V36 Row32", spec(masqA+"\ndhcpOptions: {privateOptions: [{option: 223, value: x}]}", ""), Options{}, []string{
			"spec: provided DHCPPrivateOptions are out of range, must be in range 224 to 254"}},
		{"V37 Row32", spec(masqA+"\ndhcpOptions: {privateOptions: [{option: 240, value: x}, {option: 240, value: y}]}", ""), Options{}, []string{
			"spec: Found Duplicates: you have provided duplicate DHCPPrivateOptions"}},
		{"V38 Row32", spec(masqA+"\ndhcpOptions: {ntpServers: [0127.0.0.3, ntp.example.com, '::1']}", ""), Options{}, []string{
			i0 + ".dhcpOptions.ntpServers[1]: NTP servers must be a list of valid IPv4 addresses.",
			i0 + ".dhcpOptions.ntpServers[2]: NTP servers must be a list of valid IPv4 addresses."}},
		{"V39", spec(masqA+"\nstate: foo", ""), Options{}, []string{
			i0 + ".state: logical a interface state value is unsupported: foo"}},
		{"V40", spec("name: a\nsriov: {}\nstate: down", mulA), Options{}, []string{
			i0 + `.state: "a" interface's state "down" is not supported for SR-IOV NICs`}},
		{"V41 V42", spec(masqA+"\nstate: absent", ""), Options{}, []string{
			i0 + `.state: "a" interface's state "absent" is supported only for bridge binding`,
			i0 + `.state: "a" interface's state "absent" is not supported on default networks`}},
		{"V43 Row28", spec(masqA+"\nbootOrder: 0", ""), Options{}, []string{
			"spec[0].bootOrder: spec[0] must have a boot order > 0, if supplied"}},
		{"V44 Row28", two(masqA+"\nbootOrder: 1", briB+"\nbootOrder: 1", podA, mulB), Options{}, []string{
			i1 + ".bootOrder: Boot order for " + i1 + ".bootOrder already set for a different device."}},
		{"V44 disk Row28", vmi("disks: [{name: d, bootOrder: 1}]\ninterfaces:\n"+item(masqA+"\nbootOrder: 1"), "networks:\n"+item(podA)), Options{}, []string{
			i0 + ".bootOrder: Boot order for " + i0 + ".bootOrder already set for a different device."}},
		{"V48", vmi("interfaces: ["+strings.Repeat("{name: a, masquerade: {}},", 257)+"]", "networks:\n"+item(podA)), Options{}, append([]string{
			"spec.domain.devices.interfaces: spec.domain.devices.interfaces list exceeds the 256 element limit in length"},
			manyV4()...)},
		{"seed slirp 1 Row52", spec("name: a\nslirp: {}", mulA), Options{}, []string{
			i0 + ".name: Slirp interface only implemented with pod network"}},
		{"seed slirp 2 Row52", spec("name: a\nslirp: {}", ""), Options{ForbidSlirp: true}, []string{
			i0 + ".name: Slirp interface is not enabled in kubevirt-config"}},
		{"seed macvtap 7 Row74", spec("name: a\nmacvtap: {}", ""), Options{}, []string{
			i0 + ".name: Macvtap interface only implemented with Multus network"}},
		{"seed macvtap 6 Row74", spec("name: a\nmacvtap: {}", "") + "---\nkind: KubeVirt\nspec: {configuration: {developerConfiguration: {featureGates: []}}}\n", Options{}, []string{
			i0 + ".name: Macvtap feature gate is not enabled"}},
		{"seed macvtap gate open Row74", spec("name: a\nmacvtap: {}", mulA) + "---\nkind: KubeVirt\nspec: {configuration: {developerConfiguration: {featureGates: [Macvtap]}}}\n", Options{}, nil},
		{"seed slirp by the cluster's CR Row52", spec("name: a\nslirp: {}", "") + "---\nkind: KubeVirt\nspec: {configuration: {network: {permitSlirpInterface: false}}}\n", Options{}, []string{
			i0 + ".name: Slirp interface is not enabled in kubevirt-config"}},
		{"seed chain: the first only", spec("name: a\nslirp: {}\nmacvtap: {}", "") + "---\nkind: KubeVirt\nspec: {configuration: {network: {permitSlirpInterface: false}}}\n", Options{}, []string{
			i0 + ": logical a interface must have exactly one binding method or binding plugin",
			i0 + ".name: Slirp interface is not enabled in kubevirt-config"}},
		{"V50 slirp that the cluster permits", "kind: VMI\nmetadata: {name: v}\n---\nkind: KubeVirt\nspec: {configuration: {network: {defaultNetworkInterface: slirp, permitSlirpInterface: true}}}\n", Options{}, nil},
		{"V17", spec("name: a\npasst: {}", ""), Options{}, []string{
			i0 + ".passt: Passt network binding has been discontinued since v1.3",
			i0 + ": logical a interface must have exactly one binding method or binding plugin"}},
		{"seed multiqueue", vmi("networkInterfaceMultiqueue: true\ninterfaces:\n"+item(masqA+"\nmodel: e1000"), "networks:\n"+item(podA)), Options{}, []string{
			"warning spec.domain.devices.networkInterfaceMultiqueue: virtio-net multiqueue request, but there are no virtio interfaces defined"}},
		{"order", two("name: a\nmasquerade: {}\nmodel: x\nstate: y", "name: c", podA, "name: b"), Options{}, []string{
			"spec.networks[1]: should have a network type",
			i0 + ".state: logical a interface state value is unsupported: y",
			i1 + ": logical c interface must have exactly one binding method or binding plugin",
			"spec.networks[1].name: spec.networks[1].name 'b' not found.",
			i1 + ".name: " + i1 + ".name 'c' not found.",
			i0 + ".model: interface " + i0 + ".name uses model x that is not supported."}},

		{"own cidr text Row59", spec("", "name: a\npod: {vmNetworkCIDR: hello}"), Options{}, []string{
			`spec.networks[0].pod.vmNetworkCIDR: "hello" is not an IPv4 network; write it like 10.0.2.0/24`}},
		{"own cidr /31 Row59", spec("", "name: a\npod: {vmNetworkCIDR: 10.0.0.0/31}"), Options{}, []string{
			"spec.networks[0].pod.vmNetworkCIDR: VM CIDR subnet is too small, at least 2 host addresses are required: 10.0.0.0/31; use /30 or larger"}},
		{"own cidr loopback", spec("", "name: a\npod: {vmNetworkCIDR: 127.0.0.0/24}"), Options{}, []string{
			"spec.networks[0].pod.vmNetworkCIDR: 127.0.0.0/24 lies in 127.0.0.0/8, where no guest can have an address; use a private network like 10.0.2.0/24"}},
		{"own cidr6 Row59", spec("", "name: a\npod: {vmIPv6NetworkCIDR: 'fd00::/127'}"), Options{}, []string{
			"spec.networks[0].pod.vmIPv6NetworkCIDR: VM CIDR subnet is too small, at least 2 host addresses are required: fd00::/127; use /126 or larger"}},
		{"own duplicate port", spec(masqA+"\nports: [{port: 80}, {port: 80, protocol: UDP}, {port: 80, protocol: TCP}]", ""), Options{}, []string{
			i0 + ".ports[2].port: port 80/TCP is listed twice on this interface; remove one"}},
		{"own ports on multus", spec("name: a\nbridge: {}\nports: [{port: 99999}]", mulA), Options{}, []string{
			"warning " + i0 + ".ports: ports mean nothing here: they are for masquerade and slirp on the pod network"}},
		{"own multicast MAC", spec(masqA+"\nmacAddress: 03:11:22:33:44:55", ""), Options{}, []string{
			i0 + ".macAddress: MAC address 03:11:22:33:44:55 is a multicast address; its first byte must be even, as in 02:11:22:33:44:55"}},
		{"own zero MAC", spec(masqA+"\nmacAddress: 00-00-00-00-00-00", ""), Options{}, []string{
			i0 + ".macAddress: MAC address 00-00-00-00-00-00 is all zeros; leave macAddress out to have one chosen"}},
		{"own same MAC", two(masqA+"\nmacAddress: 02:00:00:00:00:0A", briB+"\nmacAddress: 02-00-00-00-00-0a", podA, mulB), Options{}, []string{
			i1 + `.macAddress: MAC address 02:00:00:00:00:0a is that of interface "a" too; give each its own`}},
		{"own same PCI", two(masqA+"\npciAddress: 0000:0A:00.0", briB+"\npciAddress: 0000:0a:00.0", podA, mulB), Options{}, []string{
			i1 + `.pciAddress: PCI address 0000:0a:00.0 is that of interface "a" too; give each its own`}},
		{"own PCI domain", spec(masqA+"\npciAddress: 0001:01:00.0", ""), Options{}, []string{
			i0 + ".pciAddress: PCI address 0001:01:00.0: the domain must be 0000, a guest has no other"}},
		{"own acpi index", two(masqA+"\nacpiIndex: 16384", briB+"\nacpiIndex: 16384", podA, mulB), Options{}, []string{
			i0 + ".acpiIndex: 16384 is out of range, ACPI knows indexes 1 to 16383",
			i1 + ".acpiIndex: 16384 is out of range, ACPI knows indexes 1 to 16383",
			i1 + `.acpiIndex: index 16384 is that of interface "a" too; give each its own`}},
		{"own sriov on pod", spec("name: a\nsriov: {}", ""), Options{}, []string{
			i0 + ".name: SR-IOV interface cannot be connected to the pod network; refer to a multus network"}},
		{"own boot file", spec(masqA+"\ndhcpOptions: {bootFileName: "+strings.Repeat("x", 256)+"}", ""), Options{}, []string{
			i0 + ".dhcpOptions.bootFileName: 256 bytes, a DHCP option holds 255 at most"}},
		{"own memory", "kind: VM\nspec: {domain: {memory: {guest: lots}}}", Options{}, []string{
			"spec.domain.memory.guest: memory is not a quantity; write it like 512Mi, 2Gi or 1500m"}},
		{"own no memory", "kind: VM\nspec: {domain: {resources: {requests: {memory: 0}}}}", Options{}, []string{
			"spec.domain.resources.requests.memory: memory must be between 1Mi and 64Ti, the guest would have 0 bytes"}},
		{"own vCPUs", "kind: VM\nspec: {domain: {cpu: {sockets: 9223372036854775807, cores: 9223372036854775807, threads: 2}}}", Options{}, []string{
			"spec.domain.cpu: more than 1024 vCPUs"}},
		{"own queues", "kind: VM\nspec: {domain: {resources: {limits: {cpu: 200}}, devices: {networkInterfaceMultiqueue: on}}}", Options{}, []string{
			"warning spec.domain.devices.networkInterfaceMultiqueue: 200 vCPUs, but an interface gets 128 queue pairs at most"}},
		{"own name", strings.Replace(spec("", ""), "name: v", "name: ../v", 1), Options{}, []string{
			`metadata.name: "../v" is not a Kubernetes name: lower-case letters, digits, '-' and '.' only, at most 253`}},
		{"own hostname", spec("", "") + "  hostname: Not_A_Host\n", Options{}, []string{
			"spec.hostname: spec.hostname does not conform to the kubernetes DNS_LABEL rules : " + strings.Join(labelFaults("Not_A_Host"), ", ")}},
	} {
		t.Run(c.name, func(t *testing.T) {
			docs, err := Parse("v.yaml", []byte(c.yaml))
			require.NoError(t, err, c.yaml)
			if c.want == nil {
				c.want = []string{}
			}
			assert.Equal(t, c.want, lines(Validate(docs, c.opts)), c.yaml)
		})
	}
}

func manyV4() (out []string) {
	for i := 1; i < 256; i++ {
		out = append(out, fmt.Sprintf("spec.domain.devices.interfaces[%d].name: Only one interface can be connected to one specific network", i))
	}
	return out
}

func TestUnknownFields(t *testing.T) {
	for _, c := range []struct{ iface, network, want string }{
		{"name: a\nmasqurade: {}\nmasquerade: {}", "", i0 + `.masqurade: unknown field "masqurade", did you mean "masquerade"?`},
		{"name: a\nMasquerade: {}\nmasquerade: {}", "", i0 + `.Masquerade: unknown field "Masquerade", did you mean "masquerade"?`},
		{masqA + "\nports: [{port: 80, protcol: UDP}]", "", i0 + `.ports[0].protcol: unknown field "protcol", did you mean "protocol"?`},
		{masqA + "\nmac: 02:00:00:00:00:01", "", i0 + `.mac: unknown field "mac", did you mean "macAddress"?`},
		{masqA + "\nqueues: 4", "", i0 + `.queues: unknown field "queues", known here are acpiIndex, binding, bootOrder, bridge, dhcpOptions, macAddress, macvtap, masquerade, model, name, passt, passtBinding, pciAddress, portRanges, ports, slirp, sriov, state, tag`},
		{"name: a\nmasquerade: {ports: []}", "", i0 + `.masquerade.ports: unknown field "ports", nothing goes in here: write {}`},
		{masqA + "\ndhcpOptions: {bootFilename: x}", "", i0 + `.dhcpOptions.bootFilename: unknown field "bootFilename", did you mean "bootFileName"?`},
		{"", "name: a\npod: {vmNetworkCidr: 10.0.0.0/24}", `spec.networks[0].pod.vmNetworkCidr: unknown field "vmNetworkCidr", did you mean "vmNetworkCIDR"?`},
		{masqA + "\nmodel: 1", "", i0 + `.model: must be a text, found the number 1; put it in quotes`},
		{masqA + "\nmodel: [virtio]", "", i0 + `.model: must be a text, found a list`},
		{masqA + "\nports: [{port: '80'}]", "", i0 + `.ports[0].port: must be a whole number, found the text "80"; remove the quotes`},
		{masqA + "\nports: [{port: http}]", "", i0 + `.ports[0].port: must be a whole number, found "http"`},
		{masqA + "\nports: [{port: 99999999999999999999}]", "", i0 + `.ports[0].port: must be a whole number, found "99999999999999999999"`},
		{masqA + "\nports: {port: 80}", "", i0 + `.ports: must be a list (lines that start with -), found a mapping`},
		{masqA + "\nmodel: virtio\nmodel: e1000", "", i0 + `: key "model" is there twice, remove one`},
	} {
		docs, err := Parse("v.yaml", []byte(spec(c.iface, c.network)))
		require.NoError(t, err)
		got := Validate(docs, Options{})
		require.NotEmpty(t, got, c.want)
		assert.Equal(t, c.want, got[0].String())
		assert.Positive(t, got[0].Line)
		assert.Equal(t, "v", got[0].VMI)
	}
}

// A binding whose name is misspelt is one fault, not also a missing binding.
func TestMisspeltBinding(t *testing.T) {
	for key, want := range map[string][]string{
		"masqurade": {i0 + `.masqurade: unknown field "masqurade", did you mean "masquerade"?`},
		"macvTap":   {i0 + `.macvTap: unknown field "macvTap", did you mean "macvtap"?`},
		"ethernet": {
			i0 + `.ethernet: unknown field "ethernet", known here are acpiIndex, binding, bootOrder, bridge, dhcpOptions, macAddress, macvtap, masquerade, model, name, passt, passtBinding, pciAddress, portRanges, ports, slirp, sriov, state, tag`,
			i0 + ": logical a interface must have exactly one binding method or binding plugin",
		},
		"modell": {
			i0 + `.modell: unknown field "modell", did you mean "model"?`,
			i0 + ": logical a interface must have exactly one binding method or binding plugin",
		},
	} {
		docs, err := Parse("v.yaml", []byte(spec("name: a\n"+key+": {}", "")))
		require.NoError(t, err)
		assert.Equal(t, want, lines(append(Validate(docs, Options{}), Unsupported(docs)...)))
	}
	docs, err := Parse("v.yaml", []byte(spec("name: a\nmasqurade: {}\nbridge: {}\nslirp: {}", "")))
	require.NoError(t, err)
	assert.Len(t, Validate(docs, Options{}), 2, "two bindings are one too many all the same")
}

// A VMI that asks for Istio's proxy gets it where masquerade can give it.
func TestIstioRow83(t *testing.T) {
	const text = "warning metadata.annotations.sidecar.istio.io/inject: the guest's traffic does not pass Istio's proxy: with a bridge the pod has no address; use masquerade: {}"
	with := func(annotation, iface string) string {
		return strings.Replace(spec(iface, ""), "{name: v}", "{name: v, annotations: {"+annotation+"}}", 1)
	}
	for _, c := range []struct {
		yaml string
		want []string
		mesh bool
	}{
		{with(`sidecar.istio.io/inject: "true"`, ""), []string{}, true},
		{with(`sidecar.istio.io/inject: "True", other: 1`, masqA+"\nports: [{port: 80}]"), []string{}, true},
		{with(`sidecar.istio.io/inject: "true"`, "name: a\nbridge: {}"), []string{text}, true},
		{with(`sidecar.istio.io/inject: "false"`, ""), []string{}, false},
		{with(`other: true`, ""), []string{}, false},
		{"kind: VirtualMachine\nmetadata: {name: v, annotations: {sidecar.istio.io/inject: 'true'}}\n" +
			"spec: {template: {spec: {domain: {devices: {interfaces: [{name: a, masquerade: {}}]}}, networks: [{name: a, pod: {}}]}}}", []string{}, false},
		{"kind: VM\nspec: {domain: {devices: {interfaces: [{name: a, masquerade: {}, ports: [{port: 22}]}]}}, networks: [{name: a, pod: {}}]}\n" +
			"metadata: {name: v, annotations: {sidecar.istio.io/inject: 'true'}}", []string{}, true},
		{"kind: VirtualMachine\nspec: {template: {spec: {domain: {devices: {interfaces: [{name: a, masquerade: {}}]}}, networks: [{name: a, pod: {}}]}}}\n" +
			"metadata: {name: v, annotations: {sidecar.istio.io/inject: 'true'}}", []string{}, false},
		{"kind: VirtualMachine\nmetadata: {name: v}\nspec: {template: {metadata: {annotations: {sidecar.istio.io/inject: 'true'}}, " +
			"spec: {domain: {devices: {interfaces: [{name: a, bridge: {}}]}}, networks: [{name: a, pod: {}}]}}}",
			[]string{strings.Replace(text, "metadata", "spec.template.metadata", 1)}, true},
	} {
		docs, err := Parse("v.yaml", []byte(c.yaml))
		require.NoError(t, err)
		assert.Empty(t, Validate(docs, Options{}), c.yaml)
		assert.Equal(t, c.want, lines(Unsupported(docs)), c.yaml)
		assert.Equal(t, c.mesh, Plan(docs)[0].Istio, c.yaml)
	}
	docs, err := Parse("v.yaml", []byte(with("sidecar.istio.io/inject: true", "")))
	require.NoError(t, err)
	assert.Equal(t, []string{`metadata.annotations.sidecar.istio.io/inject: must be a text, found the boolean true; put it in quotes`},
		lines(Validate(docs, Options{})))
}

// Outside interfaces and networks a name that KubeVirt does not know is a warning; one that it knows, wherever it is
// read, is none.
func TestUnknownFieldsElsewhere(t *testing.T) {
	for doc, want := range map[string][]string{
		"kind: VM\nspec:\n  volumes: []\n  domain: {machine: {}, devices: {rng: {}, interface: []}}\n  network: []\n": {
			`spec.domain.devices.interface: unknown field "interface", did you mean "interfaces"?`,
			`spec.network: unknown field "network", did you mean "networks"?`},
		"kind: VM\nspec: {running: true, domian: {devics: {}}}": {`spec.domian: unknown field "domian", did you mean "domain"?`},
		"kind: VirtualMachine\nspec: {runing: true, template: {spec: {domain: {devics: {}, cpu: {core: 2}}}}}": {
			`spec.runing: unknown field "runing", did you mean "running"?`,
			`spec.template.spec.domain.devics: unknown field "devics", did you mean "devices"?`,
			`spec.template.spec.domain.cpu.core: unknown field "core", did you mean "cores"?`},
		"kind: VMI\nmetadata: {labels: {a: b}, anotations: {}}\nstatus: {phase: Running, interfaces: [{mac: x, ipp: y}]}": {
			`metadata.anotations: unknown field "anotations", did you mean "annotations"?`,
			`status.interfaces[0].ipp: unknown field "ipp"`},
		"kind: VMI\nspec: {domain: {devices: {disks: [{name: d, disk: {}, bus: virtio}, {name: d, cdrom: , bus: sata}]}}}": {
			`spec.domain.devices.disks[0].bus: unknown field "bus", it belongs below "disk"`,
			`spec.domain.devices.disks[1].bus: unknown field "bus", it belongs below "cdrom"`},
		"kind: VMI\nspec: {affinity: {nodeAffinity: {x: 1}}, domain: {resources: {requests: {any/thing: 1}}}, qqqqqqqq: 1}": {
			`spec.affinity.nodeAffinity.x: unknown field "x"`,
			`spec.qqqqqqqq: unknown field "qqqqqqqq"`},
		"kind: Kubevirt\nspec: {configuration: {network: {permitBridgeInterfacesOnPodNetwork: false}}}": {
			`spec.configuration.network.permitBridgeInterfacesOnPodNetwork: unknown field "permitBridgeInterfacesOnPodNetwork", did you mean "permitBridgeInterfaceOnPodNetwork"?`},
		"networks:\n- {name: a, pd: {}}": {`networks: no kind: a part of a spec, which is passed over; a VMI starts with kind: VirtualMachineInstance`},
	} {
		docs, err := Parse("v.yaml", []byte(doc))
		require.NoError(t, err)
		var got []string
		for _, f := range Warnings(Validate(docs, Options{})) {
			got = append(got, f.String())
		}
		assert.Equal(t, want, got, doc)
	}
}

// Objects that make machines of a template are read like a VM.
func TestTemplates(t *testing.T) {
	for doc, path := range map[string]string{
		"kind: VirtualMachineInstanceReplicaSet\nmetadata: {name: v}\nspec: {replicas: 1, selector: {}, template: {spec: %s}}":       "spec.template.spec",
		"kind: VirtualMachinePool\nmetadata: {name: v}\nspec: {replicas: 1, virtualMachineTemplate: {spec: {template: {spec: %s}}}}": "spec.virtualMachineTemplate.spec.template.spec",
		"kind: VirtualMachine\nmetadata: {name: v}\nspec: {runStrategy: Always, template: {metadata: {labels: {a: b}}, spec: %s}}":   "spec.template.spec",
	} {
		docs, err := Parse("v.yaml", []byte(fmt.Sprintf(doc, "{domain: {devices: {interfaces: [{name: a, masquerade: {}, model: x}]}}, networks: [{name: a, pod: {}}]}")))
		require.NoError(t, err)
		at := path + ".domain.devices.interfaces[0]"
		assert.Equal(t, []string{at + ".model: interface " + at + ".name uses model x that is not supported."}, lines(Validate(docs, Options{})))
	}
}

func TestFaultPosition(t *testing.T) {
	docs, err := Parse("v.yaml", []byte(spec(masqA+"\nports:\n- port: 80\n- port: 0", "")))
	require.NoError(t, err)
	f := Validate(docs, Options{})
	require.Len(t, f, 1)
	assert.Equal(t, "v.yaml:11", f[0].Where())
}

func TestAcross(t *testing.T) {
	one := func(name, iface string) string {
		return strings.Replace(spec(iface, ""), "name: v", "name: "+name, 1)
	}
	for _, c := range []struct {
		name string
		docs []string
		want []string
	}{
		{"different ports", []string{one("x", masqA+"\nports: [{port: 80}]"), one("y", masqA+"\nports: [{port: 81}, {port: 80, protocol: UDP}]")}, nil},
		{"one takes the rest", []string{one("x", masqA), one("y", masqA+"\nports: [{port: 81}]")}, nil},
		{"same port", []string{one("x", masqA+"\nports: [{port: 80}]"), one("y", masqA+"\nports: [{port: 80, protocol: TCP}]")}, []string{
			i0 + `.ports[0].port: port 80/TCP goes to VMI "x" (v.yaml:1) in the same network namespace; use another, or -f FILE@NETNS`}},
		{"two empty", []string{one("x", masqA), one("y", masqA)}, []string{
			i0 + `.ports: no ports are listed, which means all, but VMI "x" (v.yaml:1) in the same network namespace has all too; list ports or use -f FILE@NETNS`}},
		{"same name", []string{one("x", masqA), one("x", masqA+"\nports: [{port: 80}]")}, []string{
			"metadata.name: x in v.yaml:1 has this name too; every VMI of one run needs its own"}},
		{"same MAC", []string{one("x", masqA+"\nmacAddress: 02:00:00:00:00:0A"), one("y", masqA+"\nports: [{port: 80}]\nmacAddress: 0200.0000.000a")}, []string{
			i0 + `.macAddress: MAC address 02:00:00:00:00:0a is that of VMI "x" (v.yaml:1) too; give each its own`}},
	} {
		t.Run(c.name, func(t *testing.T) {
			docs, err := Parse("v.yaml", []byte(strings.Join(c.docs, "---\n")))
			require.NoError(t, err)
			if c.want == nil {
				c.want = []string{}
			}
			assert.Equal(t, c.want, lines(Validate(docs, Options{})))
			docs.VMIs[1].NetNS, docs.VMIs[1].Name = "/run/netns/y", "z"
			assert.Empty(t, lines(Validate(docs, Options{})), "in namespaces of their own they may share all but the name")
		})
	}
}

func TestUnsupported(t *testing.T) {
	docs, err := Parse("v.yaml", []byte(two("name: a\npasstBinding: {}\nstate: down", "name: b\nbinding: {name: p}", podA, mulB)))
	require.NoError(t, err)
	assert.Equal(t, []string{
		i0 + ".passtBinding: not supported yet: binding passtBinding; use masquerade: {}",
		i1 + ".binding: not supported yet: binding plugin p; use masquerade: {}",
		i1 + ".binding.name: couldn't find configuration for network binding: p", // V49
	}, lines(Unsupported(docs)))

	const six = "name: a\npod: {vmIPv6NetworkCIDR: 'fd10::/120'}"
	docs, err = Parse("v.yaml", []byte(two("name: a\nmasquerade: {}", "name: b\nmasquerade: {}", six, podA)))
	require.NoError(t, err)
	assert.Empty(t, Unsupported(docs))
	docs, err = Parse("v.yaml", []byte(two("name: a\nslirp: {}", "name: b\nmasquerade: {}", six, podA)))
	require.NoError(t, err)
	faults := Unsupported(docs)
	assert.Equal(t, []string{
		"warning spec.networks[0].pod.vmIPv6NetworkCIDR: not supported yet: slirp carries no IPv6 of the guest, only its IPv4; use masquerade: {}",
	}, lines(faults))
	assert.Empty(t, Errors(faults), "it is served all the same")
}
