package handoff

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"
)

// Assignments is where it is written which functions a pod was given for its
// networks. The zero value is that of a pod. What it has said is taken: a function
// is not given twice. It is not safe for concurrent use.
type Assignments struct {
	// Given is by hand, network to PCI address, and goes before everything.
	Given map[string]string
	// PodInfo is the directory of the downward API's files, /etc/podinfo unless
	// said otherwise.
	PodInfo string
	// Environ is the environment, that of the process unless said otherwise.
	Environ []string
	// Wait is how long a file that is there but empty may take to be filled, a
	// second unless said otherwise: the annotation is written while the pod starts.
	Wait time.Duration

	owner map[string]string // address to network
	pool  *envPool
}

// Assigned is the function that a network has.
type Assigned struct {
	Address string // as sysfs writes it, such as 0000:65:00.2
	// From says where that is written, for people.
	From string
	// ByPod is whether the pod was given it, so that its settings are its CNI's.
	ByPod bool
}

const (
	podInfo     = "/etc/podinfo"
	networkInfo = "network-info"    // KubeVirt 1.3 and later
	networkMap  = "network-pci-map" // KubeVirt 0.59 to 1.2
	envResource = "KUBEVIRT_RESOURCE_NAME_"
	envDevices  = "PCIDEVICE_"
	// maxPodInfo bounds what is read of a file.
	maxPodInfo = 1 << 20
	// maxAddresses bounds how many addresses one variable may hold.
	maxAddresses = 4096
)

// Find says which function each of the networks has, in the order of the
// networks. The pod's sources are asked in the order in which KubeVirt's versions
// brought them, newest first; the first that names a function at all is the one
// for all networks. A network that none names is in missing, with the reason.
func (a *Assignments) Find(networks []string) (found map[string]Assigned, missing map[string]error, err error) {
	found, missing = map[string]Assigned{}, map[string]error{}
	var open []string
	for _, n := range networks {
		if address := a.Given[n]; address == "" {
			open = append(open, n)
		} else if found[n], err = a.Give(n, address, "--vf", false); err != nil {
			return nil, nil, err
		}
	}
	if len(open) == 0 {
		return found, missing, nil
	}
	for _, source := range []struct {
		file string
		read func([]byte) (map[string]string, error)
	}{{networkInfo, readNetworkInfo}, {networkMap, readNetworkMap}} {
		path := filepath.Join(a.dir(), source.file)
		b, err := a.filled(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		addresses, err := source.read(b)
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", path, err)
		}
		if len(addresses) == 0 {
			continue
		}
		for _, n := range open {
			if addresses[n] == "" {
				missing[n] = fmt.Errorf("%s names no function for network %s; name it with --vf %s=PCIADDRESS", path, n, n)
			} else if found[n], err = a.Give(n, addresses[n], path, true); err != nil {
				return nil, nil, err
			}
		}
		return found, missing, nil
	}
	if a.pool == nil {
		a.pool = a.environment()
	}
	for _, n := range open {
		address, from, err := a.pool.pop(n, a.owner)
		if err != nil {
			missing[n] = err
		} else if found[n], err = a.Give(n, address, from, true); err != nil {
			return nil, nil, err
		}
	}
	return found, missing, nil
}

// Give notes that a network has a function which is written somewhere else.
func (a *Assignments) Give(network, address, from string, byPod bool) (Assigned, error) {
	canonical, err := ParsePCIAddress(address)
	if err != nil {
		return Assigned{}, fmt.Errorf("%s: network %s: %w", from, network, err)
	}
	if other := a.owner[canonical]; other != "" {
		return Assigned{}, fmt.Errorf("%s gives %s to network %s, but network %s has it already", from, canonical, network, other)
	}
	if a.owner == nil {
		a.owner = map[string]string{}
	}
	a.owner[canonical] = network
	return Assigned{Address: canonical, From: from, ByPod: byPod}, nil
}

func (a *Assignments) dir() string {
	if a.PodInfo != "" {
		return a.PodInfo
	}
	return podInfo
}

// filled reads a file, which the kubelet may be about to write.
func (a *Assignments) filled(path string) ([]byte, error) {
	wait := a.Wait
	if wait == 0 {
		wait = time.Second
	}
	for end := time.Now().Add(wait); ; {
		b, err := readBounded(path, maxPodInfo)
		if err != nil {
			return nil, err
		}
		if len(strings.TrimSpace(string(b))) > 0 {
			return b, nil
		}
		if !time.Now().Before(end) {
			return nil, fmt.Errorf("%s is empty after %v: the annotation that it shows was not written; name the functions with --vf", path, wait)
		}
		time.Sleep(min(100*time.Millisecond, time.Until(end)))
	}
}

func readBounded(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, most+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if int64(len(b)) > most {
		return nil, fmt.Errorf("%s is longer than %d bytes", path, most)
	}
	return b, nil
}

// readNetworkInfo reads the annotation kubevirt.io/network-info: what has no
// function of PCI in it, such as a bridge, is left out.
func readNetworkInfo(b []byte) (map[string]string, error) {
	var info struct {
		Interfaces []struct {
			Network    string `json:"network"`
			DeviceInfo *struct {
				PCI *struct {
					Address string `json:"pci-address"`
				} `json:"pci"`
			} `json:"deviceInfo"`
		} `json:"interfaces"`
	}
	if err := json.Unmarshal(b, &info); err != nil {
		return nil, fmt.Errorf("no network-info: %w", err)
	}
	addresses := map[string]string{}
	for _, i := range info.Interfaces {
		if i.DeviceInfo != nil && i.DeviceInfo.PCI != nil && i.DeviceInfo.PCI.Address != "" {
			addresses[i.Network] = i.DeviceInfo.PCI.Address
		}
	}
	return addresses, nil
}

// readNetworkMap reads the annotation kubevirt.io/network-pci-map.
func readNetworkMap(b []byte) (addresses map[string]string, err error) {
	if err := json.Unmarshal(b, &addresses); err != nil {
		return nil, fmt.Errorf("no network-pci-map: %w", err)
	}
	return addresses, nil
}

// envPool is what the device plugin has put into the environment.
type envPool struct {
	resource map[string]string   // of a network
	pools    map[string][]string // of a resource's variable
}

func (a *Assignments) environment() *envPool {
	environ := a.Environ
	if environ == nil {
		environ = os.Environ()
	}
	p := &envPool{resource: map[string]string{}, pools: map[string][]string{}}
	for _, e := range environ {
		name, value, _ := strings.Cut(e, "=")
		if network, ok := strings.CutPrefix(name, envResource); ok && value != "" {
			p.resource[network] = value
		}
		if strings.HasPrefix(name, envDevices) && !strings.HasSuffix(name, "_INFO") {
			for address := range strings.SplitSeq(value, ",") {
				if address = strings.TrimSpace(address); address != "" && len(p.pools[name]) < maxAddresses {
					p.pools[name] = append(p.pools[name], address)
				}
			}
		}
	}
	return p
}

// variable is where a resource's functions are: upper case, with _ for what
// separates the name's parts.
func variable(resource string) string {
	return envDevices + strings.ToUpper(strings.NewReplacer("/", "_", ".", "_").Replace(resource))
}

// pop takes the next function of a network's resource that has no owner: one
// function may be in the pools of several resources.
func (p *envPool) pop(network string, owner map[string]string) (address, from string, err error) {
	resource := p.resource[network]
	if resource == "" {
		return "", "", fmt.Errorf("nothing says which function network %s has: neither %s nor %s in %s, nor the environment's %s%s; name it with --vf %s=PCIADDRESS",
			network, networkInfo, networkMap, podInfo, envResource, network, network)
	}
	from = variable(resource)
	for len(p.pools[from]) > 0 {
		address, p.pools[from] = p.pools[from][0], p.pools[from][1:]
		if canonical, err := ParsePCIAddress(address); err != nil || owner[canonical] == "" {
			return address, "the environment's " + from, nil
		}
	}
	return "", "", fmt.Errorf("network %s: no function of resource %s is left in the environment's %s", network, resource, from)
}

var pciAddress = regexp.MustCompile(`^(?:([[:xdigit:]]{4,8}):)?([[:xdigit:]]{2}):([01][[:xdigit:]])\.([0-7])$`)

// ParsePCIAddress gives the address of a function of the host's as sysfs writes
// it. The domain may be left out.
func ParsePCIAddress(s string) (string, error) {
	m := pciAddress.FindStringSubmatch(s)
	if m == nil {
		return "", fmt.Errorf("%q is not the PCI address of a function; write it like 0000:65:00.2", s)
	}
	if m[1] == "" {
		m[1] = "0000"
	}
	return strings.ToLower(fmt.Sprintf("%s:%s:%s.%s", m[1], m[2], m[3], m[4])), nil
}
