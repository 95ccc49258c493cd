package vmi

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// guide is every YAML example of the guide, by what it must give: the number of VMIs, what Validate finds and what
// this release cannot serve yet (fields; nil for nothing).
var guide = []struct {
	file        string
	vmis        int
	faults      []string
	unsupported []string
	err         string
}{
	{file: "01-pod", vmis: 1},
	{file: "02-ovs-nad"},
	{file: "03-ovs-vm", vmis: 1, unsupported: []string{"spec.networks[1].multus.networkName"}},
	{file: "04-default-nad"},
	{file: "05-default-vm", vmis: 1},
	{file: "06-e1000-ports", vmis: 1},
	{file: "07-tuning-nad"},
	{file: "08-no-autoattach", vmis: 1},
	{file: "09-bridge", vmis: 1, unsupported: []string{"spec.networks[0].multus.networkName"}},
	{file: "10-forbid-bridge"},
	{file: "11-slirp", vmis: 1},
	{file: "12-masquerade", vmis: 1},
	{file: "13-dual-stack", vmis: 1, faults: []string{"spec.domain.devices.disks[0].bus"}},
	{file: "14-multiqueue", vmis: 1},
	{file: "15-sriov-policy"},
	{file: "16-sriov-network"},
	{file: "17-sriov-vmi", vmis: 1, unsupported: []string{"spec.networks[1].multus.networkName"}},
	{file: "18-macvtap-config", faults: []string{"data.DP_MACVTAP_CONF", "data.DP_MACVTAP_CONF[0].master"}},
	{file: "19-macvtap-config-all"},
	{file: "20-macvtap-nad", faults: []string{"spec.config"}},
	{file: "21-macvtap-vmi", vmis: 1, unsupported: []string{"spec.networks[0].multus.networkName"}},
	{file: "22-spoof-nad"},
	{file: "23-spoof-fragment", faults: []string{"networks"}},
}

func TestGuide(t *testing.T) {
	files, err := filepath.Glob("testdata/guide/*.yaml")
	require.NoError(t, err)
	require.Len(t, files, len(guide), "every example has its row")
	for _, c := range guide {
		t.Run(c.file, func(t *testing.T) {
			docs, err := Load(filepath.Join("testdata/guide", c.file+".yaml"))
			if c.err != "" {
				require.ErrorIs(t, err, ErrInput)
				assert.True(t, strings.HasSuffix(err.Error(), c.err), err)
				return
			}
			require.NoError(t, err)
			assert.Len(t, docs.VMIs, c.vmis)
			assert.Equal(t, c.faults, paths(Validate(docs, Options{})))
			assert.Empty(t, Errors(Validate(docs, Options{})), "the guide's examples are sound")
			assert.Equal(t, c.unsupported, paths(Unsupported(docs)))
		})
	}
}

func paths(faults []Fault) []string {
	var out []string
	for _, f := range faults {
		out = append(out, f.Field)
	}
	return out
}

func TestGuideValues(t *testing.T) {
	load := func(name string) Docs {
		docs, err := Load("testdata/guide/" + name + ".yaml")
		require.NoError(t, err)
		return docs
	}
	vm := Plan(load("17-sriov-vmi"))[0]
	assert.Equal(t, "vmi-perf", vm.Name)
	assert.Equal(t, 2, vm.VCPUs)
	assert.Equal(t, CPU{2, 1, 1}, vm.Topology)
	assert.Equal(t, uint64(4<<30), vm.Memory)
	assert.Equal(t, Masquerade, vm.Interfaces[0].Binding)
	assert.Equal(t, "eth0", vm.Interfaces[0].Network.Link)

	vm = Plan(load("03-ovs-vm"))[0]
	assert.Equal(t, "03-ovs-vm", vm.Name, "a VMI without a name takes its file's")
	assert.Equal(t, "default_image.bin", vm.Interfaces[0].DHCP.BootFile)
	assert.Equal(t, "tftp.example.com", vm.Interfaces[0].DHCP.TFTPServer)
	assert.Equal(t, 1, vm.Interfaces[0].BootOrder)
	assert.Equal(t, "ovs-vlan-100", vm.Interfaces[1].Network.NetworkName)

	vm = Plan(load("12-masquerade"))[0]
	assert.Equal(t, []Port{{Protocol: "TCP", Port: 80}}, vm.Interfaces[0].Ports)

	red := Plan(load("11-slirp"))[0].Interfaces[0]
	assert.Equal(t, Slirp, red.Binding)
	assert.Equal(t, "e1000", red.Model)
	assert.Equal(t, "10.0.2.15 10.0.2.2 10.0.2.3", fmt.Sprint(red.Network.Guest, " ", red.Network.Gateway, " ", red.Network.DNS))
	assert.Equal(t, "e1000", Plan(load("06-e1000-ports"))[0].Interfaces[0].Model)

	nad := load("20-macvtap-nad").NADs[0]
	assert.Equal(t, "macvtap", nad.Type, "the missing comma is put in")
	assert.Equal(t, "macvtap.network.kubevirt.io/eth0", nad.Annotations["k8s.v1.cni.cncf.io/resourceName"])
	assert.Equal(t, "ptp", load("07-tuning-nad").NADs[0].Type)

	docs := load("10-forbid-bridge")
	require.NotNil(t, docs.Cluster.PermitBridge)
	assert.False(t, *docs.Cluster.PermitBridge)
}
