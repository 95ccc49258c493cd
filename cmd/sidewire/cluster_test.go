package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/vmi"
)

// The cluster's settings are taken from a KubeVirt CR among the files, and a flag beats it.
func TestClusterFlagsRow45Row52Row85(t *testing.T) {
	bridge, slirp := writeFile(t, "bridge.yaml", strings.Replace(spec("vm", 1), "masquerade: {}", "bridge: {}", 1)), writeFile(t, "slirp.yaml", strings.Replace(spec("vm", 1), "masquerade: {}", "slirp: {}", 1))
	omitted := writeFile(t, "omitted.yaml", "kind: VM\nmetadata: {name: vm}\nspec: {domain: {}}\n")
	cr := writeFile(t, "cr.yaml", "kind: Kubevirt\nspec: {configuration: {network: {permitBridgeInterfaceOnPodNetwork: false, permitSlirpInterface: false}}}\n")
	const (
		noBridge = "spec.domain.devices.interfaces[0].name: Bridge on pod network configuration is not enabled under kubevirt-config\n"
		noSlirp  = "spec.domain.devices.interfaces[0].name: Slirp interface is not enabled in kubevirt-config\n"
	)
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"-f", bridge}, ""},
		{[]string{"-f", bridge, "-f", cr}, noBridge},
		{[]string{"-f", bridge, "-f", cr, "--permit-bridge-on-pod-network"}, ""},
		{[]string{"-f", bridge, "--permit-bridge-on-pod-network=false"}, noBridge},
		{[]string{"-f", slirp, "-f", cr}, noSlirp},
		{[]string{"-f", slirp, "-f", cr, "--permit-slirp=true"}, ""},
		{[]string{"-f", slirp, "--permit-slirp=false"}, noSlirp},
		{[]string{"-f", omitted}, ""},
		{[]string{"-f", omitted, "-f", cr}, "spec.domain.devices.interfaces: bridge interface is not enabled in kubevirt-config\n"},
		{[]string{"-f", omitted, "-f", cr, "--default-network-interface", "masquerade"}, ""},
		{[]string{"-f", omitted, "--default-network-interface=slirp", "--permit-slirp=false"},
			"spec.domain.devices.interfaces: slirp interface is deprecated as of v1.3\n"},
	} {
		o := sidewire(t, append([]string{"validate"}, c.args...)...)
		assert.Equal(t, c.want, o.out, c.args)
		assert.Equal(t, c.want != "", o.code == exitInput, c.args)
	}
	sidewire(t, "validate", "-f", bridge, "--default-network-interface", "sriov").says(t, exitInput, "validate", []string{"default-network-interface", "want bridge, masquerade or slirp"})
	sidewire(t, "run", "-f", bridge, "--permit-slirp=maybe").says(t, exitInput, "run", []string{"permit-slirp"})
	sidewire(t, "run", "-f", bridge, "--permit-bridge-on-pod-network=false").says(t, exitInput, "run", []string{"Bridge on pod network configuration is not enabled"})
}

func TestFeatureGatesFlag(t *testing.T) {
	for _, c := range []struct {
		args []string
		want []string
	}{
		{nil, nil},
		{[]string{"--feature-gates", ""}, []string{}},
		{[]string{"--feature-gates", "Macvtap, PortRangesSpec", "--feature-gates=Passt"}, []string{"Macvtap", "PortRangesSpec", "Passt"}},
	} {
		var o options
		fs := newFlags("run", new(strings.Builder))
		o.register(fs)
		require.NoError(t, parse(fs, c.args))
		assert.Equal(t, vmi.Cluster{FeatureGates: c.want}, o.cluster)
	}
}

// A VMI that wants no interface is served none, and its QEMU gets none.
func TestNoInterfaceRow34(t *testing.T) {
	enginetest.Need(t, "netns")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startSidewire(t, w, "kind: VM\nmetadata: {name: vm}\nspec: {domain: {devices: {autoattachPodInterface: false}}}\n")
	assert.Empty(t, p.status().Interfaces)
	assert.Contains(t, strings.Join(qemuArgs(t, w, p), " "), "-nic none")
	o := sidewire(t, "status", "--json", "--socket-dir", p.dir)
	var st map[string]any
	require.NoError(t, json.Unmarshal([]byte(o.out), &st))
}
