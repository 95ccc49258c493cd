package vmi

import (
	"context"
	"fmt"
	"os/exec"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
)

// cr is a KubeVirt CR of a configuration.
func cr(kind, configuration string) string {
	return fmt.Sprintf("kind: %s\nspec: {configuration: {%s}}\n---\n", kind, configuration)
}

// A KubeVirt CR's settings, and flags that beat them one by one.
func TestClusterRow85(t *testing.T) {
	docs, err := Parse("c.yaml", []byte(cr("Kubevirt", "network: {defaultNetworkInterface: masquerade, permitBridgeInterfaceOnPodNetwork: false, permitSlirpInterface: true, binding: {x: {}}}, "+
		"developerConfiguration: {featureGates: [Macvtap, LiveMigration], useEmulation: true}")))
	require.NoError(t, err)
	assert.Empty(t, Validate(docs, Options{}))
	c := docs.Cluster
	assert.Equal(t, Cluster{DefaultInterface: "masquerade", PermitBridge: ref(false), PermitSlirp: ref(true), FeatureGates: []string{"Macvtap", "LiveMigration"}, Plugins: []string{"x"}}, c)
	assert.True(t, c.Gate(GateMacvtap))
	assert.False(t, c.Gate(GatePortRanges))
	assert.False(t, c.Gate("macvtap"), "gates are case sensitive")

	docs.SetCluster(Cluster{})
	assert.Equal(t, c, docs.Cluster, "a flag that was not given changes nothing")
	docs.SetCluster(Cluster{PermitBridge: ref(true), FeatureGates: []string{}})
	assert.Equal(t, Cluster{DefaultInterface: "masquerade", PermitBridge: ref(true), PermitSlirp: ref(true), FeatureGates: []string{}, Plugins: []string{"x"}}, docs.Cluster)
	assert.False(t, docs.Cluster.Gate(GateMacvtap))
	assert.True(t, new(Cluster).Gate(GateMacvtap), "nothing said")

	docs, err = Parse("c.yaml", []byte(cr("KubeVirt", "network: {permitSlirpInterface: false}")))
	require.NoError(t, err)
	assert.True(t, docs.Cluster.Gate(GateMacvtap), "a CR without gates lists none")
	docs.Define(Docs{Cluster: Cluster{DefaultInterface: "slirp", PermitSlirp: ref(true)}})
	assert.Equal(t, Cluster{DefaultInterface: "slirp", PermitSlirp: ref(false)}, docs.Cluster, "a file of definitions may have a CR too")
}

// A VMI that names no interface gets the cluster's default, if that is permitted.
func TestDefaultInterfaceRow33(t *testing.T) {
	const vmi = "kind: VM\nmetadata: {name: v}\nspec: {domain: {cpu: {cores: 4}, devices: {networkInterfaceMultiqueue: true}}}\n---\n"
	for _, c := range []struct {
		cluster Cluster
		want    Binding
		fault   string
	}{
		{Cluster{}, Bridge, ""},
		{Cluster{DefaultInterface: "masquerade"}, Masquerade, ""},
		{Cluster{DefaultInterface: "slirp", PermitSlirp: ref(true)}, Slirp, ""},
		{Cluster{PermitBridge: ref(false)}, "", "bridge interface is not enabled in kubevirt-config"},
		{Cluster{PermitBridge: ref(false), DefaultInterface: "masquerade"}, Masquerade, ""},
		{Cluster{PermitSlirp: ref(false), DefaultInterface: "slirp"}, "", "slirp interface is deprecated as of v1.3"},
	} {
		docs, err := Parse("v.yaml", []byte(vmi))
		require.NoError(t, err)
		docs.SetCluster(c.cluster)
		faults := Errors(append(Validate(docs, Options{}), Unsupported(docs)...))
		assert.Empty(t, docs.VMIs[0].Spec.Interfaces, "docs are not written to")
		if c.fault != "" {
			assert.Equal(t, []string{"spec.domain.devices.interfaces: " + c.fault}, lines(faults))
			continue
		}
		assert.Empty(t, faults)
		vm := Plan(docs)[0]
		require.Len(t, vm.Interfaces, 1)
		i := vm.Interfaces[0]
		assert.Equal(t, "default", i.Name)
		assert.Equal(t, c.want, i.Binding)
		assert.Equal(t, "eth0", i.Network.Link)
		assert.True(t, i.Network.Pod)
	}
}

// Who asks for no interface gets none, from QEMU neither.
func TestNoInterfaceRow34_KubeVirt1774(t *testing.T) {
	docs, err := Load("testdata/guide/08-no-autoattach.yaml")
	require.NoError(t, err)
	assert.Empty(t, append(Validate(docs, Options{}), Unsupported(docs)...))
	vm := Plan(docs)[0]
	assert.Empty(t, vm.Interfaces)
	args, _, err := QEMUArgs(vm, QEMUOptions{SocketDir: "/x"})
	require.NoError(t, err)
	assert.Equal(t, []string{"-nic", "none"}, args[8:])

	enginetest.Need(t, "qemu")
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", append(args, "-S", "-display", "none", "-monitor", "stdio")...)
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	_, err = in.Write([]byte("info network\ninfo pci\nquit\n"))
	require.NoError(t, err)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	assert.Contains(t, string(out), "VGA")
	assert.NotContains(t, string(out), "Ethernet")
}

// An interface that is absent is none.
func TestAbsent(t *testing.T) {
	docs, err := Parse("v.yaml", []byte("kind: VM\nmetadata: {name: v}\nspec: {domain: {devices: {interfaces: [{name: a, bridge: {}, state: absent}, {name: b, bridge: {}, state: up}]}}, "+
		"networks: [{name: a, multus: {networkName: n}}, {name: b, multus: {networkName: n}}]}\n---\n"+
		nad("n", `{"type": "bridge", "ipam": {"type": "host-local", "subnet": "10.1.1.0/29"}}`)))
	require.NoError(t, err)
	assert.Empty(t, append(Validate(docs, Options{}), Unsupported(docs)...))
	i := Plan(docs)[0].Interfaces
	require.Len(t, i, 1)
	assert.Equal(t, "b net2 10.1.1.2/29 up", fmt.Sprint(i[0].Name, " ", i[0].Network.Ordinal, " ", i[0].Network.Lease.Address, " ", i[0].State))
}
