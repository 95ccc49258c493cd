package vmi

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func ref[T any](v T) *T { return &v }

// The knobs of sriov-cni.
func TestSRIOVDefinitionRow72Row81(t *testing.T) {
	for _, c := range []struct {
		config string
		want   SRIOVCNI
		faults []string
	}{
		{`{"type": "sriov", "vlan": 100, "vlanQoS": 3, "vlanProto": "802.1AD", "spoofchk": "off", "trust": "on", "link_state": "enable",
			"min_tx_rate": 10, "max_tx_rate": 0, "deviceID": "0000:65:00.2", "mtu": 9000, "ipam": {}, "logLevel": "debug"}`,
			SRIOVCNI{VLAN: 100, VLANQoS: 3, VLANProto: "802.1ad", SpoofCheck: ref(false), Trust: ref(true), LinkState: "enable",
				MinTxRate: ref(10), MaxTxRate: ref(0), DeviceID: "0000:65:00.2", MTU: 9000}, nil},
		{`{"type": "sriov"}`, SRIOVCNI{}, nil},
		{`{"type": "sriov", "spoofchk": "yes", "trust": true, "link_state": "up", "vlan": 4095, "vlanQoS": 8, "vlanProto": "x", "min_tx_rate": -1, "deviceID": "65:00.2"}`,
			SRIOVCNI{MinTxRate: ref(0), DeviceID: "65:00.2"}, []string{
				`spec.config.spoofchk: "yes": want "on" or "off"`,
				`spec.config.trust: must be a text, found the boolean true; put it in quotes`,
				`spec.config.link_state: "up": want one of auto, enable, disable`,
				`spec.config.vlan: VLAN 4095 must be between 0 and 4094`,
				`spec.config.vlanQoS: priority 8 must be between 0 and 7`,
				`spec.config.vlanProto: "x": want one of 802.1q, 802.1ad`,
				`spec.config.min_tx_rate: a rate of -1 must be between 0 and 2147483647`,
				`spec.config.deviceID: "65:00.2" is not the PCI address of a function; write it like 0000:65:00.2`}},
		{`{"type": "sriov", "vlanQoS": 1}`, SRIOVCNI{VLANQoS: 1}, []string{`spec.config.vlanQoS: a priority is for frames of a VLAN; give vlan too`}},
		{`{"type": "sriov", "vlanProto": "802.1ad"}`, SRIOVCNI{VLANProto: "802.1ad"}, []string{`spec.config.vlanProto: 802.1ad is for frames of a VLAN; give vlan too`}},
		{`{"type": "sriov", "min_tx_rate": 9, "max_tx_rate": 8, "ipam": {"type": "host-local"}}`, SRIOVCNI{MinTxRate: ref(9), MaxTxRate: ref(8)}, []string{
			`warning spec.config.ipam: not told to the guest: what is handed over has no DHCP server of ours; the network's own answers, or the guest is set up by hand`,
			`spec.config: the least rate, 9 Mbit/s, is above the highest, 8`}},
	} {
		n, faults := parseNAD(t, c.config)
		require.NotNil(t, n.SRIOV)
		assert.Equal(t, c.want, *n.SRIOV, c.config)
		if c.faults == nil {
			c.faults = []string{}
		}
		assert.Equal(t, c.faults, faults, c.config)
	}
}

// The guide's policy, network and VMI as they stand: the operator's definition is made of them.
func TestSRIOVNetworkRow69(t *testing.T) {
	docs, err := Load("testdata/guide/15-sriov-policy.yaml", "testdata/guide/16-sriov-network.yaml", "testdata/guide/17-sriov-vmi.yaml")
	require.NoError(t, err)
	assert.Empty(t, Validate(docs, Options{}))
	w := Plan(docs)[0].Interfaces[1].Network
	require.NotNil(t, w.NAD)
	assert.Equal(t, "default/sriov-net", w.NAD.Key())
	assert.Equal(t, "openshift.io/sriov-nic", w.NAD.ResourceName)
	assert.Equal(t, &SRIOVCNI{SpoofCheck: ref(false)}, w.NAD.SRIOV)
	assert.JSONEq(t, `{"cniVersion": "1.0.0", "name": "sriov-net", "type": "sriov", "vlan": 0, "vlanQoS": 0, "spoofchk": "off", "ipam": {}}`, string(w.NAD.Config))
	assert.Equal(t, &SRIOVPool{Resource: "openshift.io/sriov-nic", PFNames: []string{"ens1f0"}, DeviceType: "vfio-pci", NumVFs: 8, MTU: 9000, Priority: 90}, w.SRIOV)
	v := &docs.VMIs[0]
	assert.Empty(t, docs.attachFaults(v, &v.Spec.Interfaces[1], 1))
}

func TestSRIOVObjects(t *testing.T) {
	network := func(spec string) string {
		return "kind: SriovNetwork\nmetadata: {name: n, namespace: op}\nspec: {" + spec + "}\n---\n"
	}
	policy := func(spec string) string { return "kind: SriovNetworkNodePolicy\nspec: {" + spec + "}\n---\n" }
	docs, err := Parse("s.yaml", []byte(network(`resourceName: r, vlan: 5, vlanQoS: 2, vlanProto: 802.1Q, trust: "on", linkState: disable, minTxRate: 1, maxTxRate: 2, capabilities: '{"mac": true}', new: x`)))
	require.NoError(t, err)
	assert.Empty(t, Validate(docs, Options{}))
	n := docs.NADs[0]
	assert.Equal(t, "op/n", n.Key(), "without networkNamespace the definition is in the network's own")
	assert.Equal(t, &SRIOVCNI{VLAN: 5, VLANQoS: 2, VLANProto: "802.1q", Trust: ref(true), LinkState: "disable", MinTxRate: ref(1), MaxTxRate: ref(2)}, n.SRIOV)
	again, faults := parseNAD(t, string(n.Config))
	assert.Empty(t, faults)
	assert.Equal(t, n.SRIOV, again.SRIOV, "the operator's definition says the same")

	docs, err = Parse("s.yaml", []byte(network(`spoofChk: on, ipam: '{"type": "dhcp",}'`)+network(`resourceName: r, vlan: -1, spoofChk: maybe, ipam: "{"`)+
		policy(`mtu: 9000`)+policy(`resourceName: r, deviceType: x, mtu: 1, numVfs: -1, priority: 100`)+
		"kind: SriovNetwork\nspec: {resourceName: r}\n"))
	require.NoError(t, err)
	got := lines(Validate(docs, Options{}))
	for i, l := range got {
		got[i] = strings.Split(l, " at line")[0]
	}
	assert.Equal(t, []string{
		"warning spec.ipam: JSON with a comma too many",
		"warning spec.ipam: not told to the guest: what is handed over has no DHCP server of ours; the network's own answers, or the guest is set up by hand",
		"spec.resourceName: a SriovNetwork needs the resourceName of its SriovNetworkNodePolicy",
		"spec.vlan: VLAN -1 must be between 0 and 4094",
		`spec.spoofChk: "maybe": want "on" or "off"`,
		"spec.ipam: not JSON",
		"spec.resourceName: a SriovNetworkNodePolicy needs a resourceName; SriovNetworks refer to it",
		`spec.deviceType: "x": want vfio-pci, which guests need, or netdevice`,
		"spec.mtu: an MTU must be between 68 and 65535 bytes; leave it out for that of the uplink, or 1500",
		"spec.numVfs: -1 must be between 0 and 65536",
		"spec.priority: 100 must be between 0 and 99",
		"metadata.name: a SriovNetwork needs a name, networks refer to it",
		"metadata.name: NetworkAttachmentDefinition op/n is in s.yaml:1 too, with another configuration or other annotations; remove one",
	}, got)

	// Of several policies the one of the lowest priority is asked, as the operator does; a guest needs vfio.
	docs, err = Parse("s.yaml", []byte(policy(`resourceName: r, priority: 5, nicSelector: {pfNames: [b], rootDevices: ["0000:65:00.0"]}`)+
		policy(`resourceName: r, deviceType: vfio-pci, nicSelector: {pfNames: [a]}`)+network(`resourceName: r`)+
		strings.Replace(guest("v", "op/n"), "bridge: {}", "sriov: {}", 1)+strings.Replace(guest("w", "none"), "bridge: {}", "sriov: {}", 1)))
	require.NoError(t, err)
	vms := Plan(docs)
	assert.Equal(t, []string{"b"}, vms[0].Interfaces[0].Network.SRIOV.PFNames)
	assert.Nil(t, vms[1].Interfaces[0].Network.NAD)
	v, w := &docs.VMIs[0], &docs.VMIs[1]
	assert.Equal(t, []string{
		"warning spec.networks[0].multus.networkName: the policy of resource openshift.io/r makes its functions of deviceType netdevice, but a guest needs vfio-pci",
		"warning spec.networks[0].multus.networkName: NetworkAttachmentDefinition default/none is not given: the function is taken as it was set up",
	}, lines(append(docs.attachFaults(v, &v.Spec.Interfaces[0], 0), docs.attachFaults(w, &w.Spec.Interfaces[0], 0)...)))
}
