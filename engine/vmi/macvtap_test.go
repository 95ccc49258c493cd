package vmi

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// conf is a ConfigMap of the macvtap device plugin.
func conf(json string) string {
	return "kind: ConfigMap\nmetadata: {name: macvtap-deviceplugin-config}\ndata:\n  DP_MACVTAP_CONF: |\n    " + strings.ReplaceAll(json, "\n", "\n    ") + "\n"
}

// The device plugin's configuration, its defaults and its modes, and what is wrong with one.
func TestMacvtapConfRow75Row76(t *testing.T) {
	for _, c := range []struct {
		json   string
		want   []MacvtapPool
		all    bool
		faults []string
	}{
		{`[]`, nil, true, nil},
		{`[{"name": "dataplane", "lowerDevice": "eth0", "mode": "vepa", "capacity": 50}]`, []MacvtapPool{{"dataplane", "eth0", "vepa", 50, false}}, false, nil},
		{`[{"name": "a", "lowerDevice": "eth0"}, {"NAME": "b", "LowerDevice": "bond0", "mode": "private", "capacity": 0}]`,
			[]MacvtapPool{{"a", "eth0", "bridge", 100, false}, {"b", "bond0", "private", 100, false}}, false, nil},
		{`[{"name": "a", "lowerDevice": "eth0", "mode": "passthru"}]`, []MacvtapPool{{"a", "eth0", "passthru", 100, false}}, false, []string{
			`warning data.DP_MACVTAP_CONF[0].mode: the device plugin of a cluster refuses it (unknown macvtap mode); sidewire gives the whole link to one guest`}},
		{"[\n{\"name\": \"a\", \"master\": \"eth0\" \"mode\": \"bridge\"},\n]", []MacvtapPool{{"a", "eth0", "bridge", 100, false}}, false, []string{
			`warning data.DP_MACVTAP_CONF: JSON with a comma missing at line 6, column 36: read as if it were there, but a cluster refuses it; put it in`,
			`warning data.DP_MACVTAP_CONF: JSON with a comma too many at line 6, column 53: read as if it were not there, but a cluster refuses it; take it out`,
			`warning data.DP_MACVTAP_CONF[0].master: read as "lowerDevice": "eth0", but the device plugin knows no master; rename it`}},
		{`[{"name": "a", "lowerDevice": "eth0", "master": "eth1"}]`, []MacvtapPool{{"a", "eth0", "bridge", 100, false}}, false, []string{
			`warning data.DP_MACVTAP_CONF[0].master: not read: "lowerDevice" is there too; remove it`}},
		{`[{"name": "a", "lowerDevice": "eth0", "mode": "tap"}, {"name": "b", "lowerDevice": "eth0", "capacity": -1}, {"lowerDevice": "eth0"}, {"name": "d"},
{"name": "e", "lowerDevice": "a-name-that-is-long"}, {"name": "f", "lowerdevic": "eth0"}, {"name": 5}]`, nil, false, []string{
			`data.DP_MACVTAP_CONF[0].mode: unknown macvtap mode "tap"; use bridge, private, vepa or passthru`,
			`data.DP_MACVTAP_CONF[1].capacity: -1 is not a number of macvtaps; use 1 or more, or leave it out for 100`,
			`data.DP_MACVTAP_CONF[2].name: a pool needs a name; definitions refer to it as macvtap.network.kubevirt.io/NAME`,
			`data.DP_MACVTAP_CONF[3].lowerDevice: "" is not the name of a link; name one of the node's, like eth0`,
			`data.DP_MACVTAP_CONF[4].lowerDevice: "a-name-that-is-long" is not the name of a link; name one of the node's, like eth0`,
			`warning data.DP_MACVTAP_CONF[5].lowerdevic: unknown field "lowerdevic", did you mean "lowerDevice"?`,
			`data.DP_MACVTAP_CONF[5].lowerDevice: "" is not the name of a link; name one of the node's, like eth0`,
			`data.DP_MACVTAP_CONF[6].name: must be a text, found the number 5; put it in quotes`}},
		{`[{"name": "a", "lowerDevice": "eth0"}, {"name": "a", "lowerDevice": "eth1"}]`, []MacvtapPool{{"a", "eth0", "bridge", 100, false}}, false, []string{
			`data.DP_MACVTAP_CONF[1].name: there is another pool "a", on eth0; give each its own name`}},
		{`{"name": "a"}`, nil, false, []string{`data.DP_MACVTAP_CONF: must be a list (lines that start with -), found a mapping`}},
		{`[{"name" "a"}]`, nil, false, []string{`data.DP_MACVTAP_CONF: not JSON at line 5, column 14: invalid character '"' after object key`}},
		{``, nil, false, []string{`data.DP_MACVTAP_CONF: is empty; write '[]' for all links, or a list of pools`}},
	} {
		docs, err := Parse("c.yaml", []byte(conf(c.json)))
		require.NoError(t, err)
		assert.Equal(t, c.want, docs.MacvtapPools, c.json)
		assert.Equal(t, c.all, docs.MacvtapAll, c.json)
		if c.faults == nil {
			c.faults = []string{}
		}
		assert.Equal(t, c.faults, lines(Validate(docs, Options{})), c.json)
	}
	docs, err := Parse("c.yaml", []byte("kind: ConfigMap\ndata: {other: '{', DP_MACVTAP_CONF: [a]}\n"))
	require.NoError(t, err)
	assert.Equal(t, []string{`data.DP_MACVTAP_CONF: must be a text that holds JSON, found a list; put it in single quotes`}, lines(Validate(docs, Options{})))
}

// A macvtap's definition, and the pool that its resource means: by name, by the link as the guide has it, any link where
// all are exposed or nothing is said.
func TestMacvtapDefinitionRow77(t *testing.T) {
	n, faults := parseNAD(t, `{"type": "macvtap", "mtu": 1400, "mac": "02-00-00-00-00-01", "promiscMode": true, "deviceID": "mvt1", "owner": 107}`)
	assert.Empty(t, faults)
	assert.Equal(t, &MacvtapCNI{MTU: 1400, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, Promisc: true, DeviceID: "mvt1"}, n.Macvtap)
	assert.Nil(t, n.Switch)
	n, faults = parseNAD(t, `{"plugins": [{"type": "macvtap", "mac": "x", "ipam": {"type": "dhcp"}}, {"type": "tuning", "mtu": 1300, "mac": "02:00:00:00:00:02"}]}`)
	assert.Equal(t, []string{
		`spec.config.plugins[0].mac: "x" is not a MAC address; write it like 02:00:00:00:00:01`,
		`warning spec.config.plugins[0].ipam: not told to the guest: what is handed over has no DHCP server of ours; the network's own answers, or the guest is set up by hand`,
	}, faults)
	assert.Equal(t, &MacvtapCNI{MTU: 1300, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 2}}, n.Macvtap)

	const explicit = `[{"name": "dataplane", "lowerDevice": "eth0", "capacity": 50}]`
	for _, c := range []struct {
		resource, conf string
		want           *MacvtapPool
		fault          string
	}{
		{"macvtap.network.kubevirt.io/eth5", "", &MacvtapPool{"eth5", "eth5", "bridge", 100, true}, ""},
		{"macvtap.network.kubevirt.io/eth5", "[]", &MacvtapPool{"eth5", "eth5", "bridge", 100, true}, ""},
		{"macvtap.network.kubevirt.io/dataplane", explicit, &MacvtapPool{"dataplane", "eth0", "bridge", 50, false}, ""},
		{"macvtap.network.kubevirt.io/eth0", explicit, &MacvtapPool{"dataplane", "eth0", "bridge", 50, false},
			"warning NetworkAttachmentDefinition default/n (v.yaml:5) names the link eth0, which is exposed as macvtap.network.kubevirt.io/dataplane: read as that, but a cluster finds no such resource"},
		{"macvtap.network.kubevirt.io/eth5", explicit, nil, "NetworkAttachmentDefinition default/n (v.yaml:5) names the resource macvtap.network.kubevirt.io/eth5, but DP_MACVTAP_CONF exposes dataplane only"},
		{"openshift.io/x", explicit, nil, `NetworkAttachmentDefinition default/n (v.yaml:5) names the resource "openshift.io/x", which is none of macvtap's; write macvtap.network.kubevirt.io/LINK`},
		{"", "", nil, "NetworkAttachmentDefinition default/n (v.yaml:5) names no resource; annotate it with k8s.v1.cni.cncf.io/resourceName: macvtap.network.kubevirt.io/LINK"},
	} {
		text := strings.Replace(guest("v1", "n"), "bridge: {}", "macvtap: {}", 1) +
			strings.Replace(nad("n", `{"type": "macvtap"}`), "{name: n}", fmt.Sprintf("{name: n, annotations: {%s: '%s'}}", resourceAnnotation, c.resource), 1)
		if c.conf != "" {
			text += "---\n" + conf(c.conf)
		}
		docs, err := Parse("v.yaml", []byte(text))
		require.NoError(t, err)
		w := Plan(docs)[0].Interfaces[0].Network
		assert.Equal(t, c.resource, w.NAD.ResourceName)
		assert.Equal(t, c.want, w.Macvtap, "%s of %s", c.resource, c.conf)
		v := &docs.VMIs[0]
		got := lines(docs.attachFaults(v, &v.Spec.Interfaces[0], 0))
		want := []string{}
		if c.fault != "" {
			w, f := "", c.fault
			if rest, ok := strings.CutPrefix(f, "warning "); ok {
				w, f = "warning ", rest
			}
			want = append(want, w+"spec.networks[0].multus.networkName: "+f)
		}
		assert.Equal(t, want, got)
	}
}
