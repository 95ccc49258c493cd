package handoff

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// addresses keeps what of a result is to be compared most often.
func addresses(found map[string]Assigned) map[string]string {
	out := map[string]string{}
	for n, a := range found {
		out[n] = a.Address
	}
	return out
}

// TestSRIOVRow70 reads each of the places where KubeVirt's versions say which
// function is a network's.
func TestSRIOVRow70(t *testing.T) {
	env := []string{
		"HOME=/", "KUBEVIRT_RESOURCE_NAME_a=intel.com/sriov.net", "KUBEVIRT_RESOURCE_NAME_b=intel.com/sriov.net", "KUBEVIRT_RESOURCE_NAME_c=openshift.io/other",
		"PCIDEVICE_INTEL_COM_SRIOV_NET=0000:65:00.2,0000:65:00.3", "PCIDEVICE_INTEL_COM_SRIOV_NET_INFO={}",
		"PCIDEVICE_OPENSHIFT_IO_OTHER=0000:65:00.2,0000:65:00.3,0000:65:00.4",
	}
	info := `{"interfaces":[{"network":"default","mac":"02:00:00:00:00:01"},
		{"network":"a","deviceInfo":{"type":"pci","version":"1.0.0","pci":{"pci-address":"0000:AF:00.2"}},"mac":"02:00:00:00:00:02","mtu":1500},
		{"network":"b","deviceInfo":{"type":"vhost-user","version":"1.1.0"}}]}`
	for _, test := range []struct {
		name             string
		files            map[string]string
		given            map[string]string
		networks         []string
		want             map[string]string
		missing, failing string
		from             string
		byHand           bool
	}{
		{name: "environment", networks: []string{"a", "b"}, want: map[string]string{"a": "0000:65:00.2", "b": "0000:65:00.3"}, from: "the environment's PCIDEVICE_INTEL_COM_SRIOV_NET"},
		{name: "one function in two pools is taken once", networks: []string{"a", "c", "b"}, want: map[string]string{"a": "0000:65:00.2", "c": "0000:65:00.3"},
			missing: "network b: no function of resource intel.com/sriov.net is left in the environment's PCIDEVICE_INTEL_COM_SRIOV_NET"},
		{name: "by hand goes first, and out of the pools", given: map[string]string{"c": "65:00.2"}, networks: []string{"a", "c"}, want: map[string]string{"a": "0000:65:00.3", "c": "0000:65:00.2"}},
		{name: "by hand", given: map[string]string{"a": "65:00.2"}, networks: []string{"a"}, want: map[string]string{"a": "0000:65:00.2"}, from: "--vf", byHand: true},
		{name: "network-pci-map", files: map[string]string{"network-pci-map": `{"a":"0000:ae:00.2","c":"0000:ae:00.4"}`}, networks: []string{"a", "c"}, want: map[string]string{"a": "0000:ae:00.2", "c": "0000:ae:00.4"}},
		{name: "network-pci-map names the pool alone", files: map[string]string{"network-pci-map": `{"a":"0000:ae:00.2"}`}, networks: []string{"a", "b"}, want: map[string]string{"a": "0000:ae:00.2"},
			missing: "network-pci-map names no function for network b"},
		{name: "network-info", files: map[string]string{"network-info": info, "network-pci-map": `{"a":"0000:ae:00.2"}`}, networks: []string{"a"}, want: map[string]string{"a": "0000:af:00.2"}},
		{name: "network-info without functions", files: map[string]string{"network-info": `{"interfaces":[{"network":"default"}]}`}, networks: []string{"a"}, want: map[string]string{"a": "0000:65:00.2"}},
		{name: "no source", networks: []string{"d"}, want: map[string]string{}, missing: "the environment's KUBEVIRT_RESOURCE_NAME_d; name it with --vf d=PCIADDRESS"},
		{name: "the same for two", files: map[string]string{"network-pci-map": `{"a":"0000:ae:00.2","c":"0000:AE:00.2"}`}, networks: []string{"a", "c"},
			failing: "network-pci-map gives 0000:ae:00.2 to network c, but network a has it already"},
		{name: "not an address", given: map[string]string{"a": "ens1f0"}, networks: []string{"a"}, failing: `--vf: network a: "ens1f0" is not the PCI address of a function`},
		{name: "not JSON", files: map[string]string{"network-info": "[]"}, networks: []string{"a"}, failing: "no network-info: json: cannot unmarshal array"},
		{name: "empty", files: map[string]string{"network-info": "\n"}, networks: []string{"a"}, failing: "network-info is empty after 1ms: the annotation that it shows was not written"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range test.files {
				require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
			}
			a := Assignments{Given: test.given, PodInfo: dir, Environ: env, Wait: time.Millisecond}
			found, missing, err := a.Find(test.networks)
			if test.failing != "" {
				require.ErrorContains(t, err, test.failing)
				return
			}
			require.NoError(t, err)
			if test.missing == "" {
				require.Empty(t, missing)
			} else {
				require.Len(t, missing, 1)
				require.ErrorContains(t, slices.Collect(maps.Values(missing))[0], test.missing)
			}
			assert.Equal(t, test.want, addresses(found))
			if test.from != "" {
				assert.Equal(t, test.from, found["a"].From)
				assert.Equal(t, test.byHand, !found["a"].ByPod)
			}
		})
	}
}

// TestSRIOVRow70TwoGuests: what one guest has no other one gets.
func TestSRIOVRow70TwoGuests(t *testing.T) {
	a := Assignments{PodInfo: t.TempDir(), Environ: []string{"KUBEVIRT_RESOURCE_NAME_a=r", "PCIDEVICE_R=0000:65:00.2,0000:65:00.3"}}
	for _, want := range []string{"0000:65:00.2", "0000:65:00.3"} {
		found, _, err := a.Find([]string{"a"})
		require.NoError(t, err)
		assert.Equal(t, map[string]string{"a": want}, addresses(found))
	}
	_, missing, err := a.Find([]string{"a"})
	require.NoError(t, err)
	require.ErrorContains(t, missing["a"], "no function of resource r is left")
}

// TestSRIOVRow70FilledLater: the annotation is written while the pod starts.
func TestSRIOVRow70FilledLater(t *testing.T) {
	file := filepath.Join(t.TempDir(), "network-pci-map")
	require.NoError(t, os.WriteFile(file, nil, 0o644))
	written := make(chan error, 1)
	time.AfterFunc(20*time.Millisecond, func() { written <- os.WriteFile(file, []byte(`{"a":"0000:ae:00.2"}`), 0o644) })
	a := Assignments{PodInfo: filepath.Dir(file), Environ: []string{}, Wait: 20 * time.Second}
	found, missing, err := a.Find([]string{"a"})
	require.NoError(t, <-written)
	require.NoError(t, err)
	require.Empty(t, missing)
	assert.Equal(t, map[string]string{"a": "0000:ae:00.2"}, addresses(found))
}

func FuzzPodInfo(f *testing.F) {
	f.Add([]byte(`{"interfaces":[{"network":"x","deviceInfo":{"pci":{"pci-address":"0000:65:00.2"}}}]}`))
	f.Add([]byte(`{"interfaces":[{"network":"x","deviceInfo":null},null]}`))
	f.Add([]byte(`{"x":"../../../etc"}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, read := range []func([]byte) (map[string]string, error){readNetworkInfo, readNetworkMap} {
			all, err := read(b)
			if err != nil {
				continue
			}
			for _, address := range all {
				if canonical, err := ParsePCIAddress(address); err == nil {
					assert.Regexp(t, `^[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]$`, canonical)
				}
			}
		}
	})
}
