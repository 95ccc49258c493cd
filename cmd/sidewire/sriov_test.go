package main

import (
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// nics are the -device arguments among printed ones, without the ports for buses.
func nics(out string) (devices []string) {
	lines := strings.Split(strings.TrimSpace(out), "\n")
	for i, l := range lines[:len(lines)-1] {
		if d := lines[i+1]; l == "-device" && !strings.HasPrefix(d, "pcie-root-port") {
			devices = append(devices, d)
		}
	}
	return devices
}

// TestSRIOVRow70Row71Arguments: QEMU gets the function that the pod's environment
// names, at the guest's address, in its order of booting; without one its ROM is off.
func TestSRIOVRow70Row71Arguments(t *testing.T) {
	one := "macAddress: \"02:00:00:00:00:05\", pciAddress: \"0000:00:05.0\""
	for _, test := range []struct {
		name, spec string
		args       []string
		want       string
	}{
		{name: "environment", spec: one, want: "vfio-pci,id=nic-blue,host=0000:65:00.2,romfile=,bus=pcie.0,addr=05.0,multifunction=on"},
		{name: "by hand", spec: one, args: []string{"--vf", "vm/blue=65:00.3"}, want: "vfio-pci,id=nic-blue,host=0000:65:00.3,romfile=,bus=pcie.0,addr=05.0,multifunction=on"},
		{name: "boot order", spec: "bootOrder: 1", want: "vfio-pci,id=nic-blue,host=0000:65:00.2,bootindex=1"},
		{name: "ACPI index", spec: "acpiIndex: 7", want: "vfio-pci,id=nic-blue,host=0000:65:00.2,romfile=,acpi-index=7"},
	} {
		t.Run(test.name, func(t *testing.T) {
			file := writeFile(t, "vmi.yaml", strings.Replace(onFunction, one, test.spec, 1))
			cmd := sidewireCommand(append([]string{"qemu-args", "-f", file}, test.args...)...)
			cmd.Env = append(cmd.Env, "KUBEVIRT_RESOURCE_NAME_blue=openshift.io/sriov", "PCIDEVICE_OPENSHIFT_IO_SRIOV=0000:65:00.2")
			o := finish(t, cmd)
			require.Zero(t, o.code, o.err)
			assert.Equal(t, []string{test.want}, nics(o.out))
			assert.NotContains(t, o.out, "-netdev")
			assert.Contains(t, o.err, "note: interface blue: function 0000:65:00.")
		})
	}
}

// TestSRIOVRow69Row73Guide: the guide's policy, network and VMI, with dedicated
// processors, as they stand.
func TestSRIOVRow69Row73Guide(t *testing.T) {
	args := []string{"qemu-args", "--vf", "sriov-net=0000:65:00.2"}
	for _, f := range []string{"15-sriov-policy", "16-sriov-network", "17-sriov-vmi"} {
		args = append(args, "-f", filepath.Join("../../engine/vmi/testdata/guide", f+".yaml"))
	}
	o := sidewire(t, args...)
	require.Zero(t, o.code, o.err)
	devices := nics(o.out)
	require.Len(t, devices, 2)
	assert.Contains(t, devices[0], "virtio-net-pci,id=nic-default,")
	assert.Equal(t, "vfio-pci,id=nic-sriov-net,host=0000:65:00.2,romfile=", devices[1])
}

// TestSRIOVRow72Policy: what the guide's documents ask of a function.
func TestSRIOVRow72Policy(t *testing.T) {
	var o options
	for _, f := range []string{"15-sriov-policy", "16-sriov-network", "17-sriov-vmi"} {
		o.files = append(o.files, filepath.Join("../../engine/vmi/testdata/guide", f+".yaml"))
	}
	vms, err := load(&o, io.Discard, nil)
	require.NoError(t, err)
	o.sriov.vfs = list{"sriov-net=0000:65:00.2"}
	functions, err := o.functions(vms)
	require.NoError(t, err)
	c := sriovConfig(vms[0].Interfaces[1], functions["vmi-perf/sriov-net"])
	require.NotNil(t, c.SpoofCheck)
	assert.False(t, *c.SpoofCheck)
	require.NotNil(t, c.VLAN)
	assert.Zero(t, *c.VLAN)
	assert.Nil(t, c.Trust)
	assert.Equal(t, 9000, c.MTU)
	assert.False(t, c.ByPod)
}

// TestSRIOVRow16Flags: what is wrong with a command line is said in a line.
func TestSRIOVRow16Flags(t *testing.T) {
	file := writeFile(t, "vmi.yaml", onFunction)
	twice := writeFile(t, "twice.yaml", strings.Replace(strings.Replace(onFunction, "  networks:\n", "  networks:\n  - {name: red, multus: {networkName: sriov-net}}\n", 1),
		"      interfaces:\n", "      interfaces:\n      - {name: red, sriov: {}}\n", 1))
	masquerade := writeFile(t, "masquerade.yaml", spec("vm", 1))
	for _, test := range []struct {
		name  string
		args  []string
		code  int
		words []string
	}{
		{"not an address", []string{"-f", file, "--vf", "blue=ens1f0"}, exitInput, []string{"--vf blue=ens1f0: want NETWORK=PCIADDRESS"}},
		{"no network", []string{"-f", file, "--vf", "65:00.2"}, exitInput, []string{"--vf 65:00.2: want NETWORK=PCIADDRESS"}},
		{"no such network", []string{"-f", file, "--vf", "green=65:00.2"}, exitInput, []string{"no VMI has an sriov interface green"}},
		{"network twice", []string{"-f", file, "--vf", "blue=65:00.2", "--vf", "blue=65:00.3"}, exitInput, []string{"network blue has a function already"}},
		{"function twice", []string{"-f", twice, "--vf", "blue=65:00.2", "--vf", "red=65:00.2"}, exitMachine, []string{"gives 0000:65:00.2 to network blue, but network red has it already"}},
		{"no function", []string{"-f", file}, exitMachine, []string{`interface "blue" of vm: nothing says which function network blue has`, "name it with --vf blue=PCIADDRESS"}},
		{"bind nothing", []string{"-f", masquerade, "--vfio-bind"}, exitInput, []string{"--vfio-bind: no VMI has an sriov interface"}},
		{"no device", []string{"-f", file, "--vf", "blue=ffff:ff:1f.7"}, exitMachine, []string{"function ffff:ff:1f.7: this host has no such device", "(named by --vf)"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			sidewire(t, append([]string{"run", "--path", "socket", "--socket-dir", socketDir(t)}, test.args...)...).says(t, test.code, "run", test.words)
		})
	}
}
