package vmi

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// nad makes a definition of a configuration, in the quotes of the guide.
func nad(name, config string) string {
	return fmt.Sprintf("kind: NetworkAttachmentDefinition\nmetadata: {name: %s}\nspec:\n  config: '%s'\n", name, strings.ReplaceAll(config, "'", "''"))
}

func parseNAD(t *testing.T, config string) (NAD, []string) {
	t.Helper()
	docs, err := Parse("n.yaml", []byte(nad("n", config)))
	require.NoError(t, err)
	require.Len(t, docs.NADs, 1)
	return docs.NADs[0], lines(Validate(docs, Options{}))
}

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// What a configuration of a served type says.
func TestSwitch(t *testing.T) {
	for _, c := range []struct {
		config string
		want   Switch
		faults []string
	}{
		{`{"type": "bridge"}`, Switch{Bridge: "cni0", Native: true}, nil},
		{`{"cniVersion": "0.3.1", "name": "x", "type": "cnv-bridge", "bridge": "br10", "macspoofchk": true, "promiscMode": true, "ipam": {}}`,
			Switch{Bridge: "br10", Native: true, SpoofCheck: true}, nil},
		{`{"type": "bridge", "bridge": "b", "Vlan": 100, "MacSpoofChk": true, "MTU": 9000}`,
			Switch{Bridge: "b", Native: true, VLAN: 100, SpoofCheck: true, MTU: 9000}, nil},
		{`{"type": "bridge", "preserveDefaultVlan": false, "vlanTrunk": [{"id": 7}, {"minID": 3, "maxID": 5}, {"id": 4}]}`,
			Switch{Bridge: "cni0", Trunk: []uint16{3, 4, 5, 7}}, nil},
		{`{"type": "ovs", "bridge": "br1", "vlan": 100}`, Switch{Bridge: "br1", OVS: true, Native: true, VLAN: 100}, nil},
		{`{"type": "ovs", "bridge": "br1", "vlan": 1, "trunk": [{"id": 2}]}`, Switch{Bridge: "br1", OVS: true, Native: true, VLAN: 1, Trunk: []uint16{2}}, nil},
		{`{"name": "l", "plugins": [{"type": "bridge", "bridge": "b"}, {"type": "tuning", "mtu": 1400}, {"type": "portmap"}]}`,
			Switch{Bridge: "b", Native: true, MTU: 1400}, []string{
				`warning spec.config.plugins[2].type: plugin "portmap" is not run: it would change a link of the kernel's, and there is none`}},
		{`{"type": "bridge", "vlann": 5, "frob": {}, "isGateway": true, "hairpinMode": false}`, Switch{Bridge: "cni0", Native: true}, []string{
			`warning spec.config.vlann: unknown field "vlann", did you mean "vlan"?`,
			`warning spec.config.frob: unknown field "frob", known here are args, bridge, capabilities, cniVersion, cniVersions, disableCheck, ` +
				`disableContainerInterface, dns, enabledad, forceAddress, hairpinMode, ipMasq, ipMasqBackend, ipam, isDefaultGateway, isGateway, ` +
				`macspoofchk, mtu, name, plugins, portIsolation, preserveDefaultVlan, prevResult, promiscMode, runtimeConfig, type, vlan, vlanTrunk`,
			`warning spec.config.isGateway: not done: the switch has no address of its own; a gateway has to be a guest or behind the uplink`}},
		{`{"type": "ovs", "vlan": 4095}`, Switch{OVS: true, Native: true}, []string{
			`spec.config.vlan: VLAN 4095 must be between 0 and 4094`}},
		{`{"type": "ovs"}`, Switch{OVS: true, Native: true}, []string{
			`spec.config.bridge: type ovs needs the name of its bridge; add "bridge": "br1"`}},
		{`{"type": "bridge", "vlan": "100", "mtu": 20, "macspoofchk": "yes"}`, Switch{Bridge: "cni0", Native: true}, []string{
			`spec.config.vlan: must be a whole number, found the text "100"; remove the quotes`,
			`spec.config.mtu: an MTU must be between 68 and 65535 bytes; leave it out for that of the uplink, or 1500`,
			`spec.config.macspoofchk: must be true or false, found "yes"`}},
		{`{"type": "bridge", "vlan": 5, "vlanTrunk": [{"id": 6}, {}, {"minID": 9}, {"minID": 9, "maxID": 8}, {"id": 0}]}`,
			Switch{Bridge: "cni0", Native: true, VLAN: 5, Trunk: []uint16{6}}, []string{
				`spec.config.vlanTrunk[1]: no VLAN in it; write {"id": 42} or {"minID": 100, "maxID": 200}`,
				`spec.config.vlanTrunk[2]: minID and maxID belong together; give both, or id alone`,
				`spec.config.vlanTrunk[3]: minID 9 is larger than maxID 8`,
				`spec.config.vlanTrunk[4].id: VLAN 0 must be between 1 and 4094`,
				`spec.config.vlanTrunk: a port of a bridge has vlan or vlanTrunk, not both; remove one`}},
		{`{"type": "bridge", "portIsolation": true}`, Switch{Bridge: "cni0", Native: true}, []string{
			`spec.config.portIsolation: not supported yet: ports that do not reach each other; remove it`}},
	} {
		n, faults := parseNAD(t, c.config)
		require.NotNil(t, n.Switch, c.config)
		assert.Equal(t, c.want, *n.Switch, c.config)
		if c.faults == nil {
			c.faults = []string{}
		}
		assert.Equal(t, c.faults, faults, c.config)
	}
}

// A configuration of another type is nobody's fault until a VMI asks for it, nor is what is in it.
func TestOtherTypes(t *testing.T) {
	n, faults := parseNAD(t, `{"type": "macvlan", "master": "eth0", "vlan": "x", "ipam": {"type": "dhcp"}}`)
	assert.Equal(t, &Switch{Native: true}, n.Switch, "a link that its CNI left is served as it is")
	assert.Equal(t, "macvlan", n.Type)
	assert.Empty(t, faults)
}

// host-local: ranges, routes and resolvers, and who is told of them.
func TestIPAM(t *testing.T) {
	first, last := addr("10.1.1.1"), addr("10.1.1.254")
	whole := AddressRange{Subnet: prefix("10.1.1.0/24"), First: first, Last: last, Gateway: first}
	given := whole
	given.Gateway, given.Router = addr("10.1.1.254"), true
	part := AddressRange{Subnet: prefix("10.2.0.0/16"), First: addr("10.2.3.4"), Last: addr("10.2.3.5"), Gateway: addr("10.2.0.1")}
	for _, c := range []struct {
		ipam   string
		want   *IPAM
		faults []string
	}{
		{`{"type": "host-local", "subnet": "10.1.1.0/24"}`, &IPAM{Ranges: []AddressRange{whole}}, nil},
		{`{"type": "host-local", "subnet": "10.1.1.0/24", "gateway": "10.1.1.254", "dataDir": "/x", "routes": [{"dst": "0.0.0.0/0"}, {"dst": "10.9.0.0/16", "gw": "10.1.1.9"}],
			"dns": {"nameservers": ["10.1.1.3"], "domain": "a.example", "search": ["b.example"]}}`,
			&IPAM{Ranges: []AddressRange{given}, Routes: []Route{{Dest: prefix("0.0.0.0/0")}, {prefix("10.9.0.0/16"), addr("10.1.1.9")}},
				DNS: []netip.Addr{addr("10.1.1.3")}, Search: []string{"a.example", "b.example"}}, nil},
		{`{"type": "host-local", "ranges": [[{"subnet": "10.1.1.0/24"}, {"subnet": "10.2.0.0/16", "rangeStart": "10.2.3.4", "rangeEnd": "10.2.3.5"}]]}`,
			&IPAM{Ranges: []AddressRange{whole, part}}, nil},
		{`{"type": "host-local", "ranges": [[{"subnet": "fd00::/64"}], [{"subnet": "10.1.1.0/24"}], [{"subnet": "10.3.0.0/24"}]], "routes": [{"dst": "::/0"}]}`,
			&IPAM{Ranges: []AddressRange{whole}}, []string{
				"warning spec.config.ipam.ranges[0][0].subnet: not supported yet: IPv6 addresses are not leased; guests take them by router advertisement or by hand",
				"warning spec.config.ipam.ranges[2]: not served: a guest is leased one IPv4 address, of the list before",
				"warning spec.config.ipam.routes[0].dst: not supported yet: IPv6 routes are not announced"}},
		{`{"type": "whereabouts", "range": "10.0.0.0/24"}`, nil, []string{
			`spec.config.ipam.type: not supported yet: ipam of type "whereabouts"; served is host-local. Without ipam guests ask a DHCP server of the network`}},
		{`{"subnet": "10.0.0.0/24"}`, nil, []string{
			`spec.config.ipam.type: not supported yet: ipam of type ""; served is host-local. Without ipam guests ask a DHCP server of the network`}},
		{`{"type": "host-local"}`, &IPAM{}, []string{
			`spec.config.ipam.subnet: host-local needs a network; write "subnet": "10.1.1.0/24"`}},
		{`{"type": "host-local", "subnet": "10.1.1.0"}`, &IPAM{}, []string{`spec.config.ipam.subnet: "10.1.1.0" is not a network; write it like 10.1.1.0/24`}},
		{`{"type": "host-local", "subnet": "10.1.1.1/24"}`, &IPAM{}, []string{`spec.config.ipam.subnet: 10.1.1.1/24 has host bits set; the network is 10.1.1.0/24`}},
		{`{"type": "host-local", "subnet": "10.1.1.0/31"}`, &IPAM{}, []string{`spec.config.ipam.subnet: network 10.1.1.0/31 is too small to allocate from; use /30 or larger`}},
		{`{"type": "host-local", "subnet": "0.0.0.0/0"}`, &IPAM{}, []string{`spec.config.ipam.subnet: 0.0.0.0/0 is not a network for guests; use a private one like 10.1.1.0/24`}},
		{`{"type": "host-local", "subnet": "10.1.1.0/24", "rangeStart": "10.1.2.1", "rangeEnd": "10.1.1.255", "gateway": "x"}`, &IPAM{}, []string{
			`spec.config.ipam.rangeStart: "10.1.2.1" is not an address of a host in 10.1.1.0/24`,
			`spec.config.ipam.rangeEnd: "10.1.1.255" is not an address of a host in 10.1.1.0/24`,
			`spec.config.ipam.gateway: "x" is not an address of a host in 10.1.1.0/24`}},
		{`{"type": "host-local", "subnet": "10.1.1.0/24", "rangeStart": "10.1.1.9", "rangeEnd": "10.1.1.8"}`, &IPAM{}, []string{
			`spec.config.ipam.rangeEnd: the range ends at 10.1.1.8, before it starts at 10.1.1.9`}},
		{`{"type": "host-local", "subnet": "10.1.1.0/24", "routes": [{"dst": "x"}, {"dst": "10.0.0.0/8", "gw": "y"}], "dns": {"nameservers": ["z", "fd00::1"]}}`,
			&IPAM{Ranges: []AddressRange{whole}}, []string{
				`spec.config.ipam.routes[0].dst: "x" is not a network; write it like 10.2.0.0/16, or 0.0.0.0/0 for everything`,
				`spec.config.ipam.routes[1].gw: "y" is not an address`,
				`spec.config.ipam.dns.nameservers[0]: "z" is not an address`,
				`warning spec.config.ipam.dns.nameservers[1]: not announced: a lease names resolvers by IPv4 only`}},
	} {
		n, faults := parseNAD(t, `{"type": "bridge", "ipam": `+c.ipam+`}`)
		assert.Equal(t, c.want, n.Switch.IPAM, c.ipam)
		if c.faults == nil {
			c.faults = []string{}
		}
		assert.Equal(t, c.faults, faults, c.ipam)
	}
	n, faults := parseNAD(t, `{"type": "bridge", "ipam": {"type": "host-local", "subnet": "10.1.1.0/24"}, "dns": {"nameservers": ["10.1.1.2"]}}`)
	assert.Empty(t, faults)
	assert.Equal(t, []netip.Addr{addr("10.1.1.2")}, n.Switch.IPAM.DNS)
}

// Addresses go in order, pass over the gateway, and end.
func TestLease(t *testing.T) {
	n, _ := parseNAD(t, `{"type": "bridge", "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.1.1.0/30"}, {"subnet": "10.1.2.0/24", "rangeStart": "10.1.2.8", "rangeEnd": "10.1.2.10", "gateway": "10.1.2.9"}]],
		"routes": [{"dst": "10.9.0.0/16"}]}}`)
	taken := map[netip.Addr]bool{}
	var got []string
	for {
		l, ok := n.Switch.IPAM.Lease(func(a netip.Addr) bool { return taken[a] })
		if !ok {
			break
		}
		taken[l.Address.Addr()] = true
		got = append(got, fmt.Sprint(l.Address, l.Gateway, l.Router, l.Routes[0].Via))
	}
	assert.Equal(t, []string{"10.1.1.2/30 10.1.1.1 false 10.1.1.1", "10.1.2.8/24 10.1.2.9 true 10.1.2.9", "10.1.2.10/24 10.1.2.9 true 10.1.2.9"}, got)
}

// What is wrong inside the JSON is named by its line in the file, however the text is quoted.
func TestPlaceInJSON(t *testing.T) {
	const head = "kind: NetworkAttachmentDefinition\nmetadata: {name: n}\nspec:\n"
	for name, c := range map[string]struct {
		config string
		line   int
		text   string
	}{
		"single quotes": {"  config: '{\n      \"type\": \"ovs\",\n      \"bridge\": \"it''s\",\n\n      \"vlan\": 5000\n    }'\n", 8, "vlan: VLAN 5000"},
		"literal":       {"  config: |\n    {\n      \"type\": \"ovs\", \"bridge\": \"b\",\n      \"vlan\": 5000\n    }\n", 7, "vlan: VLAN 5000"},
		"folded":        {"  config: >-\n    {\n      \"type\": \"ovs\", \"bridge\": \"b\",\n      \"vlan\": 5000\n    }\n", 7, "vlan: VLAN 5000"},
		"double quotes": {"  config: \"{\n    \\\"type\\\": \\\"ovs\\\", \\n \\\"bridge\\\": \\\"\\u0062\\\",\n      \\\"vlan\\\": 5000 }\"\n", 6, "vlan: VLAN 5000"},
		"anchor":        {"  config: &c '{ \"type\": \"ovs\", \"bridge\": \"b\",\n      \"vlan\": 5000 }'\n", 5, "vlan: VLAN 5000"},
		"syntax":        {"  config: '{\n      \"type\": \"ovs\",\n      \"bridge\" \"br1\"\n    }'\n", 6, "not JSON at line 6, column 16: invalid character '\"' after object key"},
		"unfinished":    {"  config: |\n    {\n      \"type\": \"ovs\"\n", 6, "not JSON at line 6, column 20: unexpected end of JSON input"},
		"comma missing": {"  config: '{\n      \"type\": \"bridge\"\n      \"vlan\": 100\n    }'\n", 6, "JSON with a comma missing at line 6, column 7: read as if it were there, but a cluster refuses it; put it in"},
		"after a mend":  {"  config: '{\"type\": \"bridge\" \"mtu\": 1500\n      \"vlan\": 5000\n    }'\n", 5, "vlan: VLAN 5000"},
		"not a text":    {"  config: {\"type\": \"bridge\"}\n", 4, "must be a text that holds JSON, found a mapping; put it in single quotes"},
		"runes":         {"  config: '{ \"ä\": \"€𝄞\", \"type\": \"ovs\", \"bridge\": \"b\",\n \"vlan\": -1 }'\n", 5, "vlan: VLAN -1"},
	} {
		t.Run(name, func(t *testing.T) {
			docs, err := Parse("n.yaml", []byte(head+c.config))
			require.NoError(t, err)
			var got []string
			for _, f := range Validate(docs, Options{}) {
				got = append(got, fmt.Sprintf("%s %s", f.Where(), f))
			}
			require.NotEmpty(t, got)
			f := got[len(got)-1]
			assert.True(t, strings.HasPrefix(f, fmt.Sprintf("n.yaml:%d ", c.line)), f)
			assert.Contains(t, f, c.text)
		})
	}
}

// Every value of a long configuration is found where it stands, whatever has been looked for before it.
func TestPlacesInJSON(t *testing.T) {
	for name, quote := range map[string]func(string) string{
		"single quotes": func(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" },
		"double quotes": func(s string) string { return `"` + strings.ReplaceAll(s, `"`, `\"`) + `"` },
		"literal":       func(s string) string { return "|\n    " + s },
		"folded":        func(s string) string { return ">-\n    " + s },
	} {
		for _, comma := range []string{",", ""} { // mended where there is none
			var list []string
			for i := range 900 {
				list = append(list, fmt.Sprintf(`"a '€%d": {"b": %d%s "c": [] }%s`, i, 1000+i, comma, strings.Repeat("\n    ", i%3/2)))
			}
			text := "a: é\nconfig: " + quote("{"+strings.Join(list, comma+" ")+"}") + "\n"
			nodes, err := parse("n.yaml", []byte(text))
			require.NoError(t, err, name)
			d := &decoder{raw: []byte(text), budget: maxNodes}
			root, _ := d.jsonNode(nodes[0].Content[0].Content[3], "config")
			require.NotNil(t, root, name)
			require.Len(t, root.Content, 2*len(list))
			lines := strings.Split(text, "\n")
			for i := range list {
				v := root.Content[2*i+1].Content[1]
				col := 1 + utf8.RuneCountInString(lines[v.Line-1][:max(0, strings.Index(lines[v.Line-1], fmt.Sprint(1000+i)))])
				require.Equal(t, fmt.Sprint(1000+i), v.Value)
				require.Greater(t, col, 1, "%s: line of %s", name, v.Value)
				require.Equal(t, col, v.Column, "%s: column of %s", name, v.Value)
			}
		}
	}
}

// What a file costs grows with its length, however the definitions in it are written. Without that the least of these
// takes 20 s.
func TestLongDefinitions(t *testing.T) {
	const kind = `"kind": "NetworkAttachmentDefinition", "metadata": {"name": "n", "x": "`
	list := func(comma string) string {
		return `{"type": "bridge", "vlanTrunk": [` + strings.Repeat(`{"id": 7`+comma+`"id": 7},`, 256<<10/20) + `{"id": 8}]}`
	}
	for name, text := range map[string]string{
		"one long":         nad("n", list(",")),
		"one without ,":    nad("n", list(" ")),
		"many in one line": `{"kind": "List", "items": [null` + strings.Repeat(`, {`+kind+strings.Repeat("x", 3800)+`"}, "spec": {"config": "{\"type\": \"bridge\"}"}}`, maxDocs-1) + `]}`,
		"one many times": `{"kind": "List", "x": &x '{"type": "bridge", "x": "` + strings.Repeat("x", 3<<20) + `"}', "items": [null` +
			strings.Repeat(`, {`+kind+`"}, "spec": {"config": *x}}`, maxDocs-1) + `]}`,
	} {
		done := make(chan struct{})
		go func() {
			defer close(done)
			docs, err := Parse("n.yaml", []byte(text))
			if name == "one many times" {
				assert.ErrorContains(t, err, "with its aliases expanded; split the file")
				return
			}
			assert.NoError(t, err, name)
			assert.Equal(t, "bridge", docs.NADs[len(docs.NADs)-1].Type, name)
		}()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: no end after 10 s", name)
		}
	}
}

const twoNADs = "kind: NetworkAttachmentDefinition\nmetadata: {name: red, namespace: prod}\nspec: {config: '{\"type\": \"bridge\"}'}\n---\n" +
	"kind: NetworkAttachmentDefinition\nmetadata: {name: blue}\nspec: {config: '{\"type\": \"macvlan\"}'}\n---\n" +
	"kind: NetworkAttachmentDefinition\nmetadata: {name: empty}\n"

// A networkName without a namespace means a definition in the VMI's own.
func TestAttach(t *testing.T) {
	for _, c := range []struct{ namespace, network, nads, want string }{
		{"prod", "red", twoNADs, ""},
		{"", "prod/red", twoNADs, ""},
		{"", "red", twoNADs, "NetworkAttachmentDefinition default/red is not given; given are prod/red (v.yaml:10), default/blue (v.yaml:14), " +
			"default/empty (v.yaml:18). Add its file with --nad FILE, or name one of them"},
		{"prod", "blue", twoNADs, "NetworkAttachmentDefinition prod/blue is not given; given are prod/red (v.yaml:10), default/blue (v.yaml:14), " +
			"default/empty (v.yaml:18). Add its file with --nad FILE, or name one of them"},
		{"", "default/blue", twoNADs, ""},
		{"", "red", nad("red", `{"type": "macvtap"}`), `NetworkAttachmentDefinition default/red (v.yaml:10) is of type "macvtap", which leaves no link for a bridge; use macvtap: {}`},
		{"", "red", nad("red", `{"name": "x"}`), `NetworkAttachmentDefinition default/red (v.yaml:10) has no type in spec.config; write "type": "bridge"`},
		{"", "empty", twoNADs, "NetworkAttachmentDefinition default/empty (v.yaml:18) has no spec.config that can be read"},
		{"", "red", "kind: Other", "NetworkAttachmentDefinition default/red is not given, nor is another; add its file with --nad FILE"},
	} {
		v := fmt.Sprintf("kind: VirtualMachineInstance\nmetadata: {name: v, namespace: %q}\nspec:\n  domain:\n    devices:\n"+
			"      interfaces: [{name: a, bridge: {}}]\n  networks:\n  - {name: a, multus: {networkName: %s}}\n---\n", c.namespace, c.network)
		docs, err := Parse("v.yaml", []byte(v+c.nads))
		require.NoError(t, err)
		assert.Empty(t, Validate(docs, Options{}))
		faults := Unsupported(docs)
		if c.want == "" {
			assert.Empty(t, faults)
			assert.True(t, strings.HasSuffix(c.network, Plan(docs)[0].Interfaces[0].Network.NAD.Name))
			continue
		}
		require.Len(t, faults, 1)
		assert.Equal(t, "v.yaml:8 spec.networks[0].multus.networkName: "+c.want, faults[0].Where()+" "+faults[0].String())
	}
}

// A file that is given for its definitions brings them and their faults, nothing else.
func TestDefine(t *testing.T) {
	docs, err := Parse("v.yaml", []byte(guest("v1", "x")))
	require.NoError(t, err)
	more, err := Parse("n.yaml", []byte(guest("v2", "x")+"kind: VM\nmetadata: {name: bad}\nspec: {network: []}\n---\n"+nad("x", `{"type": "bridge", "vlan": -1}`)))
	require.NoError(t, err)
	docs.Define(more)
	assert.Len(t, docs.VMIs, 1)
	assert.Equal(t, []string{
		"warning kind: not served: this file was given for its definitions only; name it with -f",
		"warning kind: not served: this file was given for its definitions only; name it with -f",
		"spec.config.vlan: VLAN -1 must be between 0 and 4094",
	}, lines(append(Validate(docs, Options{}), Unsupported(docs)...)))
}

// Two definitions of one name are refused unless they say the same. What annotations ask belongs to it where a switch is
// asked, and other annotations do not.
func TestSameNADs(t *testing.T) {
	annotated := func(config, annotation string) string {
		return strings.Replace(nad("n", config), "{name: n}", "{name: n, annotations: {"+annotation+"}}", 1)
	}
	for other, same := range map[string]bool{
		nad("n", `{"type": "bridge"}`):                                 true,
		annotated(`{"type": "bridge"}`, `other: x`):                    true,
		annotated(`{"type": "bridge"}`, `sidewire/storm: "5"`):         false,
		annotated(`{"type": "bridge"}`, resourceAnnotation+`: a/b`):    false,
		annotated(`{"type": "bridge"}`, `sidewire/link-local: "true"`): false,
		nad("n", `{"type": "ovs", "bridge": "b"}`):                     false,
		nad("n", `{"type": "macvlan"}`):                                false,
	} {
		docs, err := Parse("n.yaml", []byte(nad("n", `{"type": "bridge"}`)+"---\n"+nad("n", `{"type": "bridge"}`)+"---\n"+other))
		require.NoError(t, err)
		faults := Validate(docs, Options{})
		if same {
			assert.Empty(t, faults, other)
			continue
		}
		require.Len(t, faults, 1, other)
		assert.Equal(t, "n.yaml:11 metadata.name: NetworkAttachmentDefinition default/n is in n.yaml:1 too, with another configuration or other annotations; remove one",
			faults[0].Where()+" "+faults[0].String(), other)
	}
}

// guest is a VMI with one interface on a Multus network.
func guest(name, network string) string {
	return fmt.Sprintf("kind: VirtualMachineInstance\nmetadata: {name: %s}\nspec: {domain: {devices: {interfaces: [{name: a, bridge: {}}]}}, "+
		"networks: [{name: a, multus: {networkName: %s}}]}\n---\n", name, network)
}

// Guests of one network get addresses in order; so do those of two definitions that are one network.
func TestLeases(t *testing.T) {
	subnet := func(vlan, subnet string) string {
		return `{"type": "bridge", "bridge": "b", ` + vlan + `"ipam": {"type": "host-local", "subnet": "` + subnet + `"}}`
	}
	docs, err := Parse("v.yaml", []byte(guest("v1", "x")+guest("v2", "y")+guest("v3", "x")+guest("v4", "z")+guest("v5", "none")+
		nad("x", subnet("", "10.1.1.0/29"))+"---\n"+nad("y", subnet("", "10.1.1.0/24"))+"---\n"+nad("z", subnet(`"vlan": 7, `, "10.1.1.0/24"))+"---\n"+
		nad("none", `{"type": "bridge"}`)))
	require.NoError(t, err)
	assert.Empty(t, append(Validate(docs, Options{}), Unsupported(docs)...))
	var got []string
	for _, vm := range Plan(docs) {
		if l := vm.Interfaces[0].Network.Lease; l != nil {
			got = append(got, l.Address.String())
		}
	}
	assert.Equal(t, []string{"10.1.1.2/29", "10.1.1.3/24", "10.1.1.4/29", "10.1.1.2/24"}, got)

	// Untagged is VLAN 1 to a bridge, and none to Open vSwitch.
	for kind, want := range map[string][]string{"bridge": {"10.1.1.2/24", "10.1.1.3/24"}, "ovs": {"10.1.1.2/24", "10.1.1.2/24"}} {
		var nads []string
		for name, vlan := range map[string]string{"x": "", "y": `"vlan": 1, `} {
			nads = append(nads, nad(name, strings.Replace(subnet(vlan, "10.1.1.0/24"), "bridge", kind, 1)))
		}
		docs, err = Parse("v.yaml", []byte(guest("v1", "x")+guest("v2", "y")+strings.Join(nads, "---\n")))
		require.NoError(t, err)
		assert.Empty(t, append(Validate(docs, Options{}), Unsupported(docs)...))
		vms := Plan(docs)
		assert.Equal(t, want, []string{vms[0].Interfaces[0].Network.Lease.Address.String(), vms[1].Interfaces[0].Network.Lease.Address.String()}, kind)
	}

	docs, err = Parse("v.yaml", []byte(guest("v1", "x")+guest("v2", "x")+nad("x", subnet("", "10.1.1.0/30"))))
	require.NoError(t, err)
	assert.Equal(t, []string{`spec.networks[0].multus.networkName: no address is left in NetworkAttachmentDefinition default/x (v.yaml:9) for interface "a"; enlarge its range`},
		lines(Unsupported(docs)))
}

// A bridge on a Multus network has a hardware address without saying so: the same at each start, another for each.
func TestStableMAC(t *testing.T) {
	seen := map[string]string{}
	for _, ns := range []string{"", ", namespace: default", ", namespace: prod"} {
		for _, name := range []string{"v1", "v2"} {
			docs, err := Parse("v.yaml", []byte(strings.Replace(guest(name, "default/n"), "{name: "+name+"}", "{name: "+name+ns+"}", 1)+nad("n", `{"type": "bridge"}`)))
			require.NoError(t, err)
			mac := Plan(docs)[0].Interfaces[0].MAC
			require.Len(t, mac, 6)
			assert.Equal(t, byte(2), mac[0]&3, "locally administered, of one station")
			key := name + strings.Replace(ns, ", namespace: default", "", 1)
			if old, ok := seen[key]; ok {
				assert.Equal(t, old, mac.String())
			}
			seen[key] = mac.String()
		}
	}
	macs := map[string]bool{}
	for _, m := range seen {
		macs[m] = true
	}
	assert.Len(t, macs, 4)
	assert.Equal(t, "96:03:c5", stableMAC("default", "v1", "a").String()[:8], "it must not change with a release")
}

func TestLinkNames(t *testing.T) {
	docs, err := Parse("v.yaml", []byte("kind: VM\nspec: {domain: {devices: {interfaces: [{name: p, masquerade: {}}, {name: a, bridge: {}}, {name: b, bridge: {}}]}}, "+
		"networks: [{name: a, multus: {networkName: n}}, {name: p, pod: {}}, {name: b, multus: {networkName: n}}]}"))
	require.NoError(t, err)
	i := Plan(docs)[0].Interfaces
	assert.Equal(t, []string{"eth0", "", linkName("a"), "net1", linkName("b"), "net2"},
		[]string{i[0].Network.Link, i[0].Network.Ordinal, i[1].Network.Link, i[1].Network.Ordinal, i[2].Network.Link, i[2].Network.Ordinal})
}

// The guide's VLAN 100 as it stands, the definition in its own file and the VMI in another.
func TestGuideVLAN100Row6(t *testing.T) {
	docs, err := Load("testdata/guide/03-ovs-vm.yaml", "testdata/guide/02-ovs-nad.yaml")
	require.NoError(t, err)
	assert.Empty(t, append(Validate(docs, Options{}), Unsupported(docs)...))
	i := Plan(docs)[0].Interfaces[1]
	require.NotNil(t, i.Network.NAD)
	assert.Equal(t, Switch{Bridge: "br1", OVS: true, Native: true, VLAN: 100}, *i.Network.NAD.Switch)
	assert.Equal(t, 2, i.BootOrder)
	docs, err = Load("testdata/guide/22-spoof-nad.yaml")
	require.NoError(t, err)
	assert.True(t, docs.NADs[0].Switch.SpoofCheck)
	data, err := os.ReadFile("testdata/guide/20-macvtap-nad.yaml")
	require.NoError(t, err)
	docs, err = Parse("g.yaml", data)
	require.NoError(t, err)
	f := Validate(docs, Options{})
	require.Len(t, f, 1)
	assert.Contains(t, f[0].Message, "a comma missing at line 13, column 7")
	assert.Equal(t, 13, f[0].Line)
}

// What only annotations can ask for.
func TestAnnotations(t *testing.T) {
	for _, c := range []struct {
		config, annotations string
		want                Switch
		faults              []string
	}{
		{`{"type": "bridge", "macspoofchk": true}`, `sidewire/link-local: "true", sidewire/check-arp: "true", sidewire/storm: "500", other: x`,
			Switch{Bridge: "cni0", Native: true, SpoofCheck: true, LinkLocal: true, CheckARP: true, Storm: 500}, nil},
		{`{"type": "ovs", "bridge": "b"}`, `sidewire/link-local: "false", sidewire/storm: "off"`, Switch{Bridge: "b", OVS: true, Native: true, Storm: -1}, nil},
		{`{"type": "bridge"}`, `sidewire/link-local: "yes", sidewire/check-arp: "true", sidewire/storm: "-1", sidewire/lldp: "true"`, Switch{Bridge: "cni0", Native: true, CheckARP: true}, []string{
			`metadata.annotations.sidewire/link-local: "yes": want "true" or "false"`,
			`metadata.annotations.sidewire/check-arp: ARP is checked where the MAC is; add "macspoofchk": true to spec.config`,
			`metadata.annotations.sidewire/storm: "-1": want frames a second, or "off"`,
			`warning metadata.annotations.sidewire/lldp: unknown annotation, known are sidewire/link-local, sidewire/check-arp, sidewire/storm`}},
		{`{"type": "bridge"}`, `sidewire/storm: 500`, Switch{Bridge: "cni0", Native: true}, []string{
			`metadata.annotations.sidewire/storm: must be a text, found the number 500; put it in quotes`,
			`metadata.annotations.sidewire/storm: "": want frames a second, or "off"`}},
	} {
		docs, err := Parse("n.yaml", []byte(strings.Replace(nad("n", c.config), "{name: n}", "{name: n, annotations: {"+c.annotations+"}}", 1)))
		require.NoError(t, err)
		assert.Equal(t, c.want, *docs.NADs[0].Switch)
		if c.faults == nil {
			c.faults = []string{}
		}
		assert.Equal(t, c.faults, lines(Validate(docs, Options{})))
	}
}
