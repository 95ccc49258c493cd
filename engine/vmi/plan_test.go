package vmi

import (
	"fmt"
	"math"
	"net"
	"net/netip"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func planOne(t *testing.T, yaml string) VM {
	t.Helper()
	docs, err := Parse("dir/My_VM.yaml", []byte(yaml))
	require.NoError(t, err)
	require.Empty(t, Errors(Validate(docs, Options{})))
	vms := Plan(docs)
	require.Len(t, vms, 1)
	return vms[0]
}

func TestPlanRow4Row21Row27Row32(t *testing.T) {
	vm := planOne(t, `
kind: VirtualMachine
metadata: {name: web.shop, namespace: prod}
spec:
  template:
    metadata: {name: ignored}
    spec:
      subdomain: sub
      domain:
        cpu: {cores: 3}
        memory: {guest: 1Gi, hugepages: {pageSize: 2Mi}}
        devices:
          networkInterfaceMultiqueue: yes
          useVirtioTransitional: true
          interfaces:
          - name: y
            masquerade: {}
            macAddress: DE-AD-00-00-BE-AF
            bootOrder: 2
            pciAddress: 0000:81:1f.1
            acpiIndex: 101
            ports: [{port: 80}, {name: dns, port: 53, protocol: UDP}]
            dhcpOptions:
              ntpServers: [0127.0.0.3]
              privateOptions: [{option: 240, value: y}]
      networks:
      - name: y
        pod: {vmNetworkCIDR: 10.10.010.9/24, vmIPv6NetworkCIDR: 'fd10:10:10::2/120'}
`)
	assert.Equal(t, VM{
		Name: "web.shop", Namespace: "prod", Hostname: "web", Subdomain: "sub",
		VCPUs: 3, Topology: CPU{1, 3, 1}, Memory: 1 << 30, Hugepage: 2 << 20,
		Interfaces: []Interface{{
			VM: "web.shop", Name: "y", Binding: Masquerade, Model: "virtio", QueuePairs: 3,
			MAC: net.HardwareAddr{0xde, 0xad, 0, 0, 0xbe, 0xaf},
			Network: Network{Pod: true, Default: true, Link: "eth0",
				CIDR: netip.MustParsePrefix("10.10.10.0/24"), CIDR6: netip.MustParsePrefix("fd10:10:10::/120"),
				Gateway: netip.MustParseAddr("10.10.10.1"), Gateway6: netip.MustParseAddr("fd10:10:10::1"),
				Guest: netip.MustParseAddr("10.10.10.2"), Guest6: netip.MustParseAddr("fd10:10:10::2")},
			Ports: []Port{{Protocol: "TCP", Port: 80}, {Name: "dns", Protocol: "UDP", Port: 53}},
			DHCP: DHCPOptions{NTPServers: []netip.Addr{netip.MustParseAddr("127.0.0.3")},
				Private: []PrivateOption{{240, "y"}}},
			BootOrder: 2, PCIAddress: &PCIAddress{0, 0x81, 0x1f, 1}, ACPIIndex: 101,
			State: "up", Transitional: true,
		}},
	}, vm)
}

func TestPlanDefaults(t *testing.T) {
	vm := planOne(t, "kind: VM\nspec: {domain: {devices: {interfaces: [{name: on, masquerade: {}}]}}, networks: [{name: on, pod: {}}]}")
	assert.Equal(t, "My_VM", vm.Name)
	assert.Equal(t, "my-vm", vm.Hostname)
	assert.Equal(t, 1, vm.VCPUs)
	assert.Equal(t, uint64(512<<20), vm.Memory)
	i := vm.Interfaces[0]
	assert.Equal(t, "on", i.Name, "a bare on is a word")
	assert.Nil(t, i.MAC)
	assert.Equal(t, 1, i.QueuePairs)
	assert.Equal(t, "10.0.2.1 10.0.2.2", i.Network.Gateway.String()+" "+i.Network.Guest.String())
	assert.Equal(t, "fd10:0:2::2", i.Network.Guest6.String())
}

func TestVCPUs(t *testing.T) {
	for _, c := range []struct {
		domain string
		vcpus  int
	}{
		{"{}", 1},
		{"{cpu: {model: host}}", 1},
		{"{cpu: {sockets: 2, threads: 2}}", 4},
		{"{cpu: {cores: 2}, resources: {limits: {cpu: 8}}}", 2},
		{"{resources: {requests: {cpu: 1500m}}}", 2},
		{"{resources: {requests: {cpu: 2}, limits: {cpu: 3500m}}}", 4},
		{"{resources: {requests: {cpu: 100m}}}", 1},
		{"{resources: {requests: {cpu: 1.5}}}", 2},
	} {
		assert.Equal(t, c.vcpus, planOne(t, "kind: VM\nspec: {domain: "+c.domain+"}").VCPUs, c.domain)
	}
}

// Multiqueue is for virtio only and stops at 128 pairs.
func TestQueuePairsRow66(t *testing.T) {
	one := func(model string, cpus string) int {
		return planOne(t, "kind: VM\nspec: {domain: {cpu: {cores: "+cpus+"}, devices: {networkInterfaceMultiqueue: true, interfaces: [{name: a, masquerade: {}, model: "+model+"}]}}, networks: [{name: a, pod: {}}]}").Interfaces[0].QueuePairs
	}
	assert.Equal(t, 3, one("virtio", "3"))
	assert.Equal(t, 1, one("e1000", "3"))
	assert.Equal(t, 128, one("virtio", "200"))
}

// Slirp's addresses are those of QEMU's user networking, in any network that a guest may have.
func TestSlirpAddressesRow47(t *testing.T) {
	for cidr, want := range map[string]string{
		"":                "10.0.2.15 10.0.2.2 10.0.2.3",
		"192.168.76.0/24": "192.168.76.15 192.168.76.2 192.168.76.3",
		"10.0.0.0/8":      "10.0.2.15 10.0.2.2 10.0.2.3",
		"172.16.0.0/12":   "172.16.2.15 172.16.2.2 172.16.2.3",
		"10.1.2.128/27":   "10.1.2.143 10.1.2.130 10.1.2.131",
		"10.1.2.16/28":    "10.1.2.30 10.1.2.18 10.1.2.19",
		"10.1.2.8/29":     "10.1.2.14 10.1.2.10 10.1.2.11",
		"10.1.2.4/30":     "10.1.2.5 10.1.2.6 10.1.2.6",
	} {
		n := planOne(t, "kind: VM\nspec: {domain: {devices: {interfaces: [{name: a, slirp: {}}]}}, networks: [{name: a, pod: {vmNetworkCIDR: '"+cidr+"'}}]}").Interfaces[0].Network
		assert.Equal(t, want, fmt.Sprint(n.Guest, " ", n.Gateway, " ", n.DNS), cidr)
	}
}

// The NIC of a slirp interface is an e1000 unless the VMI says otherwise.
func TestSlirpModelRow51(t *testing.T) {
	for model, want := range map[string]string{"": "e1000", "virtio": "virtio", "rtl8139": "rtl8139"} {
		i := planOne(t, "kind: VM\nspec: {domain: {devices: {interfaces: [{name: a, slirp: {}, model: '"+model+"'}]}}, networks: [{name: a, pod: {}}]}").Interfaces[0]
		assert.Equal(t, want, i.Model)
	}
}

func TestQuantity(t *testing.T) {
	for s, want := range map[string]int64{
		"0": 0, "1": 1, "512Mi": 512 << 20, "1024M": 1024e6, "4Gi": 4 << 30, "1e3": 1000, "1E3": 1000, "1.5Gi": 3 << 29,
		"100m": 1, "1500m": 2, "1k": 1000, "2E": 2e18, "1n": 1, "9999999999999Ei": math.MaxInt64, ".5": 1, "+3": 3, "1e-1": 1,
	} {
		got, err := parseQuantity(s)
		assert.NoError(t, err, s)
		assert.Equal(t, want, got, s)
	}
	for _, s := range []string{"", "Mi", "-1", "1KB", "1ki", "1e99", "1e", "1.2.3", "0x10", ".", "+", "1 Mi", "٣"} {
		_, err := parseQuantity(s)
		assert.Error(t, err, s)
	}
}

func TestLinkNameRow5(t *testing.T) {
	assert.Equal(t, "pod72ad293a5c9", linkName("linux-bridge"), "KubeVirt's own vector")
}

func TestCIDRRow59(t *testing.T) {
	for s, want := range map[string]string{
		"": "10.0.2.1 10.0.2.2", "10.10.010.0/24": "10.10.10.1 10.10.10.2", "192.168.1.77/30": "192.168.1.77 192.168.1.78",
		"172.16.255.255/12": "172.16.0.1 172.16.0.2",
	} {
		p, err := parseCIDR4(s)
		require.NoError(t, err)
		assert.Equal(t, want, gatewayOf(p).String()+" "+guestOf(p).String(), s)
	}
	for _, s := range []string{"10.0.0.0", "10.0.0.0/", "10.0.0.0/33", "10.0.0/24", "256.0.0.0/8", "10.0.0.0/24/1", "fd00::/64", "0.0.0.0/0", "240.0.0.0/8", "255.255.255.252/30", "10.0.0.0/+8"} {
		_, err := parseCIDR4(s)
		assert.Error(t, err, s)
	}
	for _, s := range []string{"10.0.2.0/24", "::/0", "ff00::/64", "fe80::/64", "fd00::/127", "::ffff:10.0.0.0/120"} {
		_, err := parseCIDR6(s)
		assert.Error(t, err, s)
	}
}
