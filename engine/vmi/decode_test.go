package vmi

import (
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// YAML 1.1's words for booleans are texts where a text is wanted, and booleans where one is, as KubeVirt reads them.
func TestOldBooleans(t *testing.T) {
	for _, word := range []string{"y", "Yes", "on", "n", "NO", "off"} {
		docs, err := Parse("v.yaml", []byte(vmi("networkInterfaceMultiqueue: "+word+"\ninterfaces:\n"+item("name: "+word+"\nbridge: {}"),
			"networks:\n"+item("name: "+word+"\nmultus: {networkName: "+word+", default: "+word+"}"))))
		require.NoError(t, err)
		assert.Empty(t, Validate(docs, Options{}), word)
		s, want := docs.VMIs[0].Spec, word[0] == 'y' || word[0] == 'Y' || word == "on"
		assert.Equal(t, word, s.Interfaces[0].Name)
		assert.Equal(t, &MultusSpec{NetworkName: word, Default: want}, s.Networks[0].Multus)
		assert.Equal(t, want, s.Multiqueue)
	}
	docs, err := Parse("v.yaml", []byte(vmi("networkInterfaceMultiqueue: yEs\nuseVirtioTransitional: 'yes'\nautoattachPodInterface: 1", "")))
	require.NoError(t, err)
	assert.Equal(t, []string{
		`spec.domain.devices.networkInterfaceMultiqueue: must be true or false, found "yEs"`,
		`spec.domain.devices.useVirtioTransitional: must be true or false, found "yes"`,
		`spec.domain.devices.autoattachPodInterface: must be true or false, found "1"`,
	}, lines(Errors(Validate(docs, Options{}))))
}

// Numbers are whole however they are written, as far as KubeVirt reads them.
func TestNumbers(t *testing.T) {
	docs, err := Parse("v.yaml", []byte(spec(masqA+"\nports: [{port: 80.0}, {port: 1e3}, {port: 0x50, protocol: UDP}]\nacpiIndex: 1.5\nbootOrder: '1'", "")))
	require.NoError(t, err)
	assert.Equal(t, []string{
		i0 + `.acpiIndex: must be a whole number, found "1.5"`,
		i0 + `.bootOrder: must be a whole number, found the text "1"; remove the quotes`,
	}, lines(Validate(docs, Options{})))
	assert.Equal(t, []PortSpec{{"", "", 80}, {"", "", 1000}, {"", "UDP", 80}}, docs.VMIs[0].Spec.Interfaces[0].Ports)
}

// What the mutating webhook adds is planned; the documents stay as they were.
func TestDefaultInterface(t *testing.T) {
	for _, c := range []struct {
		network string
		binding Binding // empty for no interface
	}{
		{"", Bridge},
		{"defaultNetworkInterface: bridge", Bridge},
		{"defaultNetworkInterface: masquerade, permitBridgeInterfaceOnPodNetwork: false", Masquerade},
		{"defaultNetworkInterface: slirp, permitSlirpInterface: true", Slirp},
		{"permitBridgeInterfaceOnPodNetwork: false", ""},
		{"defaultNetworkInterface: slirp", ""},
	} {
		docs, err := Parse("v.yaml", []byte("kind: VMI\nmetadata: {name: v}\n---\nkind: KubeVirt\nspec: {configuration: {network: {"+c.network+"}}}"))
		require.NoError(t, err)
		faults := Errors(Validate(docs, Options{}))
		assert.Equal(t, c.binding == "", len(faults) == 1, "%s: %v", c.network, faults)
		assert.Empty(t, docs.VMIs[0].Spec.Interfaces)
		if c.binding == "" {
			continue
		}
		vm := Plan(docs)[0]
		require.Len(t, vm.Interfaces, 1)
		f := vm.Interfaces[0]
		assert.Equal(t, []any{"default", c.binding, true, "eth0"}, []any{f.Name, f.Binding, f.Network.Pod, f.Network.Link})
	}
	// An interface or a network that is named, or the wish for none, leaves it to the spec.
	for _, devices := range []string{"autoattachPodInterface: false", "interfaces: [{name: a, bridge: {}}]"} {
		docs, err := Parse("v.yaml", []byte(vmi(devices, "")))
		require.NoError(t, err)
		for _, f := range Plan(docs)[0].Interfaces {
			assert.NotEqual(t, "default", f.Name)
		}
	}
	docs, err := Parse("v.yaml", []byte("kind: VMI\nmetadata: {name: v}\n---\nkind: KubeVirt\nspec: {configuration: {network: {defaultNetworkInterface: x}}}"))
	require.NoError(t, err)
	assert.Equal(t, []string{"spec.configuration.network.defaultNetworkInterface: invalid default-network-interface in config: x"}, lines(Validate(docs, Options{})))
}
