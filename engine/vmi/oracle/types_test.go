package oracle

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	nadv1 "github.com/k8snetworkplumbingwg/network-attachment-definition-client/pkg/apis/k8s.cni.cncf.io/v1"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	k8sv1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	netutils "k8s.io/utils/net"
	kv "kubevirt.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"sidewire/engine/vmi"
)

// asOurs writes a spec that KubeVirt read in our types.
func asOurs(s *kv.VirtualMachineInstanceSpec) vmi.Spec {
	d := &s.Domain.Devices
	out := vmi.Spec{Hostname: s.Hostname, Subdomain: s.Subdomain, AutoattachPod: d.AutoattachPodInterface,
		Multiqueue:   d.NetworkInterfaceMultiQueue != nil && *d.NetworkInterfaceMultiQueue,
		Transitional: d.UseVirtioTransitional != nil && *d.UseVirtioTransitional}
	if c := s.Domain.CPU; c != nil {
		out.CPU = vmi.CPU{Sockets: int64(c.Sockets), Cores: int64(c.Cores), Threads: int64(c.Threads)}
	}
	if m := s.Domain.Memory; m != nil {
		if m.Guest != nil {
			out.GuestMemory = m.Guest.String()
		}
		if m.Hugepages != nil {
			out.HugepageSize = m.Hugepages.PageSize
		}
	}
	out.Requests, out.Limits = resources(s.Domain.Resources.Requests), resources(s.Domain.Resources.Limits)
	for _, disk := range d.Disks {
		out.DiskBootOrders = append(out.DiskBootOrders, order(disk.BootOrder))
	}
	for i := range d.Interfaces {
		out.Interfaces = append(out.Interfaces, interfaceAsOurs(&d.Interfaces[i]))
	}
	for _, n := range s.Networks {
		w := vmi.NetworkSpec{Name: n.Name}
		if n.Pod != nil {
			w.Pod = &vmi.PodSpec{CIDR: n.Pod.VMNetworkCIDR, CIDR6: n.Pod.VMIPv6NetworkCIDR}
		}
		if n.Multus != nil {
			w.Multus = &vmi.MultusSpec{NetworkName: n.Multus.NetworkName, Default: n.Multus.Default}
		}
		if c := n.ResourceClaim; c != nil {
			w.Claim = &vmi.ClaimSpec{ClaimName: c.ClaimName, RequestName: c.RequestName}
		}
		out.Networks = append(out.Networks, w)
	}
	return out
}

func interfaceAsOurs(f *kv.Interface) vmi.InterfaceSpec {
	out := vmi.InterfaceSpec{Name: f.Name, Model: f.Model, MAC: f.MacAddress, BootOrder: order(f.BootOrder), PCIAddress: f.PciAddress,
		Tag: f.Tag, State: string(f.State)}
	for _, b := range []struct {
		has  bool
		name vmi.Binding
	}{{f.Bridge != nil, vmi.Bridge}, {f.Masquerade != nil, vmi.Masquerade}, {f.SRIOV != nil, vmi.SRIOV}, {f.DeprecatedSlirp != nil, vmi.Slirp},
		{f.DeprecatedMacvtap != nil, vmi.Macvtap}, {f.DeprecatedPasst != nil, vmi.Passt}, {f.PasstBinding != nil, vmi.PasstCore}, {f.Binding != nil, vmi.PluginBound}} {
		if b.has {
			out.Bindings = append(out.Bindings, b.name)
		}
	}
	if f.Binding != nil {
		out.Plugin = f.Binding.Name
	}
	if f.ACPIIndex != 0 {
		x := int64(f.ACPIIndex)
		out.ACPIIndex = &x
	}
	for _, p := range f.Ports {
		out.Ports = append(out.Ports, vmi.PortSpec{Name: p.Name, Protocol: p.Protocol, Port: int64(p.Port)})
	}
	for _, r := range f.PortRanges {
		out.PortRanges = append(out.PortRanges, vmi.PortRangeSpec{Protocol: r.Protocol, Start: int64(r.Start), End: int64(r.End)})
	}
	if o := f.DHCPOptions; o != nil {
		out.DHCP = vmi.DHCPSpec{BootFile: o.BootFileName, TFTPServer: o.TFTPServerName, NTPServers: o.NTPServers}
		for _, p := range o.PrivateOptions {
			out.DHCP.Private = append(out.DHCP.Private, vmi.PrivateSpec{Option: int64(p.Option), Value: p.Value})
		}
	}
	return out
}

func order(o *uint) *int64 {
	if o == nil {
		return nil
	}
	v := int64(*o)
	return &v
}

func resources(l k8sv1.ResourceList) (r vmi.Resources) {
	text := func(name k8sv1.ResourceName) string {
		q, ok := l[name]
		if !ok {
			return ""
		}
		return q.String()
	}
	return vmi.Resources{CPU: text(k8sv1.ResourceCPU), Memory: text(k8sv1.ResourceMemory)}
}

// canonical makes one text of a spec's values that mean the same: KubeVirt tidies up some of them as it reads.
func canonical(t *testing.T, s vmi.Spec) string {
	t.Helper()
	b, err := json.Marshal(s)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, &s)) // a copy
	quantity := func(q *string) {
		if v, err := resource.ParseQuantity(*q); err == nil {
			*q = v.String()
		}
	}
	for _, q := range []*string{&s.GuestMemory, &s.HugepageSize, &s.Requests.CPU, &s.Requests.Memory, &s.Limits.CPU, &s.Limits.Memory} {
		quantity(q)
	}
	for i := range s.Interfaces {
		f := &s.Interfaces[i]
		if f.ACPIIndex != nil && *f.ACPIIndex == 0 {
			f.ACPIIndex = nil
		}
		known := map[vmi.Binding]bool{}
		for _, b := range f.Bindings {
			known[b] = true
		}
		f.Bindings = nil
		for _, b := range []vmi.Binding{vmi.Bridge, vmi.Masquerade, vmi.SRIOV, vmi.Slirp, vmi.Macvtap, vmi.Passt, vmi.PasstCore, vmi.PluginBound} {
			if known[b] {
				f.Bindings = append(f.Bindings, b)
			}
		}
		for k, a := range f.DHCP.NTPServers {
			if ip := netutils.ParseIPSloppy(a); ip != nil {
				f.DHCP.NTPServers[k] = ip.String()
			}
		}
		for _, empty := range []func(){
			func() { f.Ports = append([]vmi.PortSpec{}, f.Ports...) },
			func() { f.PortRanges = append([]vmi.PortRangeSpec{}, f.PortRanges...) },
			func() { f.DHCP.NTPServers = append([]string{}, f.DHCP.NTPServers...) },
			func() { f.DHCP.Private = append([]vmi.PrivateSpec{}, f.DHCP.Private...) },
		} {
			empty()
		}
	}
	s.Interfaces = append([]vmi.InterfaceSpec{}, s.Interfaces...)
	s.Networks = append([]vmi.NetworkSpec{}, s.Networks...)
	for i := range s.Networks {
		if p := s.Networks[i].Pod; p != nil {
			if ip, net, err := netutils.ParseCIDRSloppy(p.CIDR); err == nil {
				ones, _ := net.Mask.Size()
				p.CIDR = fmt.Sprintf("%s/%d", ip, ones)
			}
		}
	}
	b, err = json.MarshalIndent(s, "", " ")
	require.NoError(t, err)
	return string(b)
}

// sameValues compares what both read in a file, and says how many machines there were.
func sameValues(t *testing.T, data []byte) int {
	t.Helper()
	f, err := read(data)
	if err != nil {
		return 0
	}
	docs, err := vmi.Parse("v.yaml", data)
	require.NoError(t, err)
	require.Len(t, docs.VMIs, len(f.machines), string(data))
	for i, m := range f.machines {
		require.Equal(t, canonical(t, asOurs(&m.vmi.Spec)), canonical(t, docs.VMIs[i].Spec), string(data))
		assert.Equal(t, m.path.String(), docs.VMIs[i].Path)
	}
	if f.cluster != nil {
		c := &f.cluster.Spec.Configuration
		want := vmi.Cluster{}
		if n := c.NetworkConfiguration; n != nil {
			want.DefaultInterface, want.PermitBridge, want.PermitSlirp = n.NetworkInterface, n.PermitBridgeInterfaceOnPodNetwork, n.DeprecatedPermitSlirpInterface
			want.Plugins = slices.Sorted(maps.Keys(n.Binding))
		}
		if d := c.DeveloperConfiguration; d != nil {
			want.FeatureGates, want.DisabledGates = d.FeatureGates, d.DisabledFeatureGates
		}
		assert.Equal(t, want, docs.Cluster, string(data))
	}
	return len(f.machines)
}

// What KubeVirt's types hold of a document is what ours hold, field by field.
func TestTypesAgree(t *testing.T) {
	machines := 0
	for _, dir := range []string{golden, service} {
		files, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
		require.NoError(t, err)
		for _, name := range files {
			data, err := os.ReadFile(name)
			require.NoError(t, err)
			machines += sameValues(t, data)
		}
	}
	for i := range *count {
		g := &generator{rand.New(rand.NewPCG(*seed, uint64(i))), []int{0, 5, 20, 50}[i%4]}
		machines += sameValues(t, []byte(g.document()))
	}
	t.Logf("%d machines", machines)
}

// The same of the guide's NetworkAttachmentDefinitions, with the client of their own.
func TestDefinitionsAgree(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(service, "*-nad.yaml"))
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, name := range files {
		data, err := os.ReadFile(name)
		require.NoError(t, err)
		var want nadv1.NetworkAttachmentDefinition
		require.NoError(t, yaml.Unmarshal(data, &want))
		docs, err := vmi.Load(name)
		require.NoError(t, err)
		require.Len(t, docs.NADs, 1)
		got := docs.NADs[0]
		assert.Equal(t, want.Name, got.Name)
		assert.Equal(t, want.Namespace, got.Namespace)
		if want.Annotations == nil {
			want.Annotations = map[string]string{}
		}
		assert.Equal(t, want.Annotations, got.Annotations)
		if json.Valid([]byte(want.Spec.Config)) {
			assert.JSONEq(t, want.Spec.Config, string(got.Config))
		} else {
			assert.True(t, json.Valid(got.Config), "the slip is mended: %s", name)
		}
	}
}
