package handoff

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// board is a host for tests: a tree like the one of sysfs, which changes as the
// kernel would change it, a card's links, and a process.
type board struct {
	t        *testing.T
	sys, dev string
	log      []string // what was written, and set

	vfs    map[string]vfState // of "LINK N"
	up     bool
	mtuIs  int
	uses   map[string]string // of a link
	refuse map[string]error  // of a setting, or of a path's last element

	caps   map[int]bool
	noFile map[string]error // of a path's last element
	lock   uint64
}

const (
	testPF = "0000:65:00.0"
	testVF = "0000:65:00.3"
)

// newBoard makes a card ens1f0 with two virtual functions of driver iavf, each in a
// group of its own.
func newBoard(t *testing.T) *board {
	dir := t.TempDir()
	b := &board{
		t: t, sys: filepath.Join(dir, "sys"), dev: filepath.Join(dir, "dev"), up: true, mtuIs: 1500, lock: 1 << 40,
		vfs:  map[string]vfState{"ens1f0 0": {MAC: "00:00:00:00:00:00"}, "ens1f0 1": {MAC: "0a:00:00:00:00:01", SpoofCheck: true}},
		uses: map[string]string{}, refuse: map[string]error{}, caps: map[int]bool{unix.CAP_NET_ADMIN: true}, noFile: map[string]error{},
	}
	b.mkdir("class/iommu/dmar0")
	b.mkdir("bus/pci/devices")
	for _, driver := range []string{"ice", "iavf", "vfio-pci"} {
		b.mkdir("bus/pci/drivers/" + driver)
	}
	require.NoError(t, os.MkdirAll(filepath.Join(b.dev, "vfio"), 0o755))
	b.device(testPF, "20", "ice", "0x020000")
	b.link(testPF, "ens1f0")
	b.file(testPF, "sriov_numvfs", "2")
	for i, vf := range []string{"0000:65:00.2", testVF} {
		b.device(vf, fmt.Sprint(21+i), "iavf", "0x020000")
		b.link(vf, fmt.Sprintf("ens1f0v%d", i))
		b.symlink("../"+testPF, "bus/pci/devices/"+vf+"/physfn")
		b.symlink("../"+vf, fmt.Sprintf("bus/pci/devices/%s/virtfn%d", testPF, i))
	}
	return b
}

func (b *board) mkdir(path string) {
	require.NoError(b.t, os.MkdirAll(filepath.Join(b.sys, path), 0o755))
}

func (b *board) symlink(to, at string) {
	require.NoError(b.t, os.Symlink(to, filepath.Join(b.sys, at)))
}

func (b *board) file(address, name, text string) {
	require.NoError(b.t, os.WriteFile(filepath.Join(b.sys, "bus/pci/devices", address, name), []byte(text+"\n"), 0o644))
}

func (b *board) link(address, name string) { b.mkdir("bus/pci/devices/" + address + "/net/" + name) }

func (b *board) device(address, group, driver, class string) {
	b.mkdir("bus/pci/devices/" + address)
	b.file(address, "class", class)
	b.file(address, "driver_override", "(null)")
	if driver != "" {
		b.symlink("../../drivers/"+driver, "bus/pci/devices/"+address+"/driver")
	}
	if group != "" {
		b.mkdir("kernel/iommu_groups/" + group + "/devices")
		b.symlink("../../../kernel/iommu_groups/"+group, "bus/pci/devices/"+address+"/iommu_group")
		b.symlink("../../../../bus/pci/devices/"+address, "kernel/iommu_groups/"+group+"/devices/"+address)
	}
}

// bound has vfio-pci have a function, as a device plugin leaves it.
func (b *board) bound(address string) {
	at := filepath.Join(b.sys, "bus/pci/devices", address)
	require.NoError(b.t, os.Remove(filepath.Join(at, "driver")))
	require.NoError(b.t, os.RemoveAll(filepath.Join(at, "net")))
	b.symlink("../../drivers/vfio-pci", "bus/pci/devices/"+address+"/driver")
	group, err := target(filepath.Join(at, "iommu_group"))
	require.NoError(b.t, err)
	require.NoError(b.t, os.WriteFile(filepath.Join(b.dev, "vfio", group), nil, 0o600))
}

func (b *board) driver(address string) string {
	driver, err := target(filepath.Join(b.sys, "bus/pci/devices", address, "driver"))
	require.NoError(b.t, err)
	return driver
}

func (b *board) override(address string) string {
	s, err := text(filepath.Join(b.sys, "bus/pci/devices", address, "driver_override"))
	require.NoError(b.t, err)
	return s
}

// write does what the kernel does.
func (b *board) write(path, value string) error {
	rel, err := filepath.Rel(b.sys, path)
	if err != nil {
		return err
	}
	b.log = append(b.log, rel+" < "+strings.TrimSpace(value))
	if err := b.refuse[filepath.Base(path)]; err != nil {
		return err
	}
	parts := strings.Split(rel, "/")
	switch name := parts[len(parts)-1]; name {
	case "driver_override":
		if strings.TrimSpace(value) == "" {
			value = "(null)\n"
		}
		return os.WriteFile(path, []byte(value), 0o644)
	case "unbind":
		if err := os.RemoveAll(filepath.Join(b.sys, "bus/pci/devices", value, "net")); err != nil {
			return err
		}
		return os.Remove(filepath.Join(b.sys, "bus/pci/devices", value, "driver"))
	case "bind":
		driver := parts[len(parts)-2]
		if o := b.override(value); o != "(null)" && o != driver || o == "(null)" && driver == "vfio-pci" || b.driver(value) != "" {
			return unix.ENODEV
		}
		b.symlink("../../drivers/"+driver, "bus/pci/devices/"+value+"/driver")
		if driver != "vfio-pci" {
			b.link(value, "new")
			return nil
		}
		group, err := target(filepath.Join(b.sys, "bus/pci/devices", value, "iommu_group"))
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(b.dev, "vfio", group), nil, 0o600)
	}
	return fmt.Errorf("no file %s", rel)
}

func (b *board) vf(link string, n int) (vfState, error) {
	s, ok := b.vfs[fmt.Sprintf("%s %d", link, n)]
	if !ok {
		return s, fmt.Errorf("link %s has no virtual function %d", link, n)
	}
	return s, nil
}

func (b *board) set(link string, n int, c vfChange) error {
	b.log = append(b.log, c.command(link, n))
	if err := b.refuse[c.what]; err != nil {
		return err
	}
	key := fmt.Sprintf("%s %d", link, n)
	s := b.vfs[key]
	switch c.what {
	case setMAC:
		s.MAC = c.to.MAC
	case setVLAN:
		s.VLAN, s.VLANQoS, s.VLANProto = c.to.VLAN, c.to.VLANQoS, c.to.VLANProto
	case setSpoof:
		s.SpoofCheck = c.to.SpoofCheck
	case setTrust:
		s.Trust = c.to.Trust
	case setLink:
		s.LinkState = c.to.LinkState
	case setRate:
		s.MinTxRate, s.MaxTxRate = c.to.MinTxRate, c.to.MaxTxRate
	}
	b.vfs[key] = s
	return nil
}

func (b *board) open(path string) error {
	if err := b.noFile[filepath.Base(path)]; err != nil {
		return err
	}
	return openNode(path)
}

func (b *board) use(link string) (string, error)            { return b.uses[link], nil }
func (b *board) state(string) (mtu int, up bool, err error) { return b.mtuIs, b.up, nil }
func (b *board) can(capability int) bool                    { return b.caps[capability] }
func (b *board) writable(path string) error                 { return b.noFile[filepath.Base(path)] }
func (b *board) memlock() uint64                            { return b.lock }

func (b *board) config(address string) SRIOVConfig {
	return SRIOVConfig{
		Address: address, StateDir: filepath.Join(filepath.Dir(b.sys), "state"), Sys: b.sys, Dev: b.dev, Launch: true,
		write: b.write, open: b.open, links: b, process: b,
	}
}

// left is what is in the state directory.
func (b *board) left() []string {
	all, err := leftStates(filepath.Join(filepath.Dir(b.sys), "state"))
	require.NoError(b.t, err)
	return all
}

func ref[T any](v T) *T { return &v }

// TestSRIOVRow16Row71Row72Row81 gives a guest a virtual function, set and bound, and
// takes it back.
func TestSRIOVRow16Row71Row72Row81(t *testing.T) {
	b := newBoard(t)
	c := b.config(testVF)
	c.Bind, c.MTU = true, 9000
	c.VFSettings = VFSettings{
		MAC: net.HardwareAddr{2, 0, 0, 0, 0, 5}, VLAN: ref(100), VLANQoS: 3, SpoofCheck: ref(false), Trust: ref(true),
		LinkState: "enable", MinTxRate: ref(10), MaxTxRate: ref(1000),
	}
	before := b.vfs["ens1f0 1"]
	d, err := OpenSRIOV(c)
	require.NoError(t, err)
	assert.Equal(t, []string{
		"ip link set ens1f0 vf 1 trust on", "ip link set ens1f0 vf 1 mac 02:00:00:00:00:05", "ip link set ens1f0 vf 1 vlan 100 qos 3",
		"ip link set ens1f0 vf 1 spoofchk off", "ip link set ens1f0 vf 1 min_tx_rate 10 max_tx_rate 1000", "ip link set ens1f0 vf 1 state enable",
		"bus/pci/devices/0000:65:00.3/driver_override < vfio-pci", "bus/pci/drivers/iavf/unbind < 0000:65:00.3", "bus/pci/drivers/vfio-pci/bind < 0000:65:00.3",
	}, b.log)
	assert.Equal(t, []string{"vfio-pci", "host=0000:65:00.3"}, d.Properties())
	assert.Empty(t, d.Netdev(nil, "net"))
	assert.Equal(t, []string{"function 0000:65:00.3: its network's MTU is 9000, but that of link ens1f0 only 1500: longer frames are lost; ip link set ens1f0 mtu 9000"}, d.Warnings)
	s := d.Status()
	assert.Equal(t, Status{
		Kind: "sriov", MAC: "02:00:00:00:00:05", MTU: 1500, Link: "ens1f0", Address: testVF, Driver: "vfio-pci", Group: "22", PF: testPF, VF: ref(1),
		VLAN: 100, SpoofCheck: ref(false), Trust: ref(true),
	}, s)
	assert.Equal(t, []string{testVF}, b.left())
	_, err = OpenSRIOV(c)
	require.EqualError(t, err, "function 0000:65:00.3: another sidewire has it")

	require.NoError(t, d.Close())
	require.NoError(t, d.Close())
	assert.Equal(t, "iavf", b.driver(testVF))
	assert.Equal(t, "(null)", b.override(testVF))
	before.VLANProto = b.vfs["ens1f0 1"].VLANProto // there is no VLAN that it would be of
	assert.Equal(t, before, b.vfs["ens1f0 1"])
	assert.Empty(t, b.left())
}

// TestSRIOVRow16AsItIs: what a device plugin and a CNI have prepared is not touched.
func TestSRIOVRow16AsItIs(t *testing.T) {
	b := newBoard(t)
	b.bound(testVF)
	c := b.config(testVF)
	c.ByPod = true
	c.VFSettings = VFSettings{MAC: net.HardwareAddr{2, 0, 0, 0, 0, 5}, VLAN: ref(100)}
	d, err := OpenSRIOV(c)
	require.NoError(t, err)
	assert.Empty(t, d.Warnings)
	assert.True(t, d.Status().Adopted)
	require.NoError(t, d.Close())
	assert.Empty(t, b.log)
	assert.Equal(t, "vfio-pci", b.driver(testVF))

	require.NoError(t, os.RemoveAll(filepath.Join(b.sys, "bus/pci/devices", testPF, "net")), "as a pod sees it")
	d, err = OpenSRIOV(c)
	require.NoError(t, err)
	assert.Empty(t, d.Warnings)
	assert.Empty(t, d.Status().MAC)
	require.NoError(t, d.Close())
}

// TestSRIOVRow16Missing: a handoff that cannot be done says what is missing, and
// touches nothing.
func TestSRIOVRow16Missing(t *testing.T) {
	vlan := VFSettings{VLAN: ref(100)}
	for _, test := range []struct {
		name string
		set  func(b *board, c *SRIOVConfig)
		want string
	}{
		{"no device", func(_ *board, c *SRIOVConfig) { c.Address = "0000:99:00.0" }, "function 0000:99:00.0: this host has no such device ("},
		{"driver", func(_ *board, c *SRIOVConfig) { c.Bind = false },
			"driver iavf uses it, but QEMU takes it from vfio-pci alone: let sidewire bind it with --vfio-bind, or have the device plugin's policy say deviceType: vfio-pci"},
		{"no driver", func(b *board, c *SRIOVConfig) {
			c.Bind = false
			require.NoError(b.t, os.Remove(filepath.Join(b.sys, "bus/pci/devices", testVF, "driver")))
		}, "it has no driver, but QEMU takes it from vfio-pci alone"},
		{"module", func(b *board, _ *SRIOVConfig) {
			require.NoError(b.t, os.Remove(filepath.Join(b.sys, "bus/pci/drivers/vfio-pci")))
		}, "the module vfio-pci is not loaded: modprobe vfio-pci"},
		{"IOMMU off", func(b *board, _ *SRIOVConfig) {
			require.NoError(b.t, os.RemoveAll(filepath.Join(b.sys, "class/iommu")))
			require.NoError(b.t, os.Remove(filepath.Join(b.sys, "bus/pci/devices", testVF, "iommu_group")))
		}, "the IOMMU is off: switch it on in the firmware (VT-d or AMD-Vi), and boot the kernel with intel_iommu=on"},
		{"no group", func(b *board, _ *SRIOVConfig) {
			require.NoError(b.t, os.Remove(filepath.Join(b.sys, "bus/pci/devices", testVF, "iommu_group")))
		}, "it is in no IOMMU group"},
		{"neighbours", func(b *board, _ *SRIOVConfig) {
			b.mkdir("bus/pci/drivers/ahci")
			b.device("0000:65:01.0", "22", "ahci", "0x010601")
			b.device("0000:65:02.0", "22", "", "0x020000")
			b.device("0000:65:03.0", "22", "vfio-pci", "0x020000")
			b.device("0000:00:01.0", "22", "pcieport", "0x060400")
		}, "IOMMU group 22 is not viable, for the host uses others of it: 0000:65:01.0 with driver ahci; give these to vfio-pci too"},
		{"used link", func(b *board, _ *SRIOVConfig) { b.uses["ens1f0v1"] = "has the address 192.0.2.1/24" },
			"the host uses it: link ens1f0v1 has the address 192.0.2.1/24; take that away first"},
		{"a pod's link", func(b *board, _ *SRIOVConfig) {
			require.NoError(b.t, os.RemoveAll(filepath.Join(b.sys, "bus/pci/devices", testVF, "net")))
		}, "driver iavf has it, but its link is in another network namespace, whose user would lose it"},
		{"read-only sysfs", func(b *board, _ *SRIOVConfig) { b.noFile["unbind"] = unix.EROFS }, "is mounted read-only, so vfio-pci cannot be given the function"},
		{"not root", func(b *board, _ *SRIOVConfig) { b.noFile["bind"] = unix.EACCES }, "only root may bind a function to vfio-pci: "},
		{"capability", func(b *board, c *SRIOVConfig) { c.VFSettings, b.caps = vlan, nil },
			"CAP_NET_ADMIN is missing to set its VLAN: grant it, or type as root: ip link set ens1f0 vf 1 vlan 100 qos 0"},
		{"link elsewhere", func(b *board, c *SRIOVConfig) {
			c.VFSettings = vlan
			require.NoError(b.t, os.RemoveAll(filepath.Join(b.sys, "bus/pci/devices", testPF, "net")))
		}, "its physical function 0000:65:00.0 has no link in this network namespace, so that MAC, VLAN, "},
		{"memory", func(b *board, c *SRIOVConfig) { c.GuestMemory, b.lock = 4<<30, 8<<20 },
			"all of the guest's 4096 MiB has to be locked in memory, but RLIMIT_MEMLOCK is 8192 KiB: raise it (ulimit -l unlimited, or LimitMEMLOCK=infinity), or grant CAP_IPC_LOCK"},
		{"node", func(b *board, c *SRIOVConfig) {
			c.Bind = false
			b.bound(testVF)
			require.NoError(b.t, os.Remove(filepath.Join(b.dev, "vfio/22")))
		}, "vfio/22 is not there: load vfio-pci, or give the container that device"},
		{"all of a card in use", func(_ *board, c *SRIOVConfig) { c.Address = testPF }, "its 2 virtual functions would go away with it: name one of them"},
		{"settings of a whole card", func(b *board, c *SRIOVConfig) {
			c.Address, c.VFSettings = testPF, vlan
			b.file(testPF, "sriov_numvfs", "0")
		},
			"it is no virtual function, so that MAC, VLAN, spoofchk"},
		{"not a network card", func(b *board, _ *SRIOVConfig) { b.file(testVF, "class", "0x010802") }, "it is no network card's: that is not bound to vfio-pci here"},
		{"several", func(b *board, c *SRIOVConfig) { c.Bind, c.GuestMemory, b.lock = false, 4<<30, 0 }, "deviceType: vfio-pci; and all of the guest's 4096 MiB"},
		{"VLAN", func(_ *board, c *SRIOVConfig) { c.VLAN = ref(4095) }, "VLAN 4095 must be between 0 and 4094"},
		{"link state", func(_ *board, c *SRIOVConfig) { c.LinkState = "down" }, `link_state must be "auto", "enable" or "disable"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			b := newBoard(t)
			c := b.config(testVF)
			c.Bind = true
			test.set(b, &c)
			_, err := OpenSRIOV(c)
			require.ErrorContains(t, err, test.want)
			assert.NotContains(t, err.Error(), "\n")
			assert.Empty(t, b.log)
			assert.Empty(t, b.left())
		})
	}
}

// TestSRIOVRow16Node: what keeps from the group's node is an error where QEMU is ours,
// and a warning where another QEMU may have more, but for a group that is taken.
func TestSRIOVRow16Node(t *testing.T) {
	for _, test := range []struct {
		err  error
		want string
		hard bool
	}{
		{unix.EACCES, "no permission to open %s/vfio/22: give it to the user that QEMU runs as (chown, or a rule of udev)", false},
		{unix.ENOENT, "%s/vfio/22 is not there: load vfio-pci, or give the container that device", false},
		{unix.ENXIO, "open %s/vfio/22: no such device or address", false},
		{unix.EBUSY, "another process has IOMMU group 22 (%s/vfio/22): one QEMU at a time can", true},
	} {
		b := newBoard(t)
		b.bound(testVF)
		b.noFile["22"] = test.err
		want := fmt.Sprintf(test.want, b.dev)
		c := b.config(testVF)
		_, err := OpenSRIOV(c)
		require.EqualError(t, err, "function "+testVF+": "+want)
		c.Launch = false
		d, err := OpenSRIOV(c)
		if test.hard {
			require.EqualError(t, err, "function "+testVF+": "+want)
			continue
		}
		require.NoError(t, err)
		assert.Equal(t, []string{"function " + testVF + ": unless QEMU may more than this process: " + want}, d.Warnings)
		require.NoError(t, d.Close())
	}
}

// TestSRIOVRow16Kept: a function that a QEMU still has is left to it, and given back
// by a later run.
func TestSRIOVRow16Kept(t *testing.T) {
	b := newBoard(t)
	c := b.config(testVF)
	c.Bind = true
	c.VFSettings = VFSettings{Trust: ref(true)}
	d, err := OpenSRIOV(c)
	require.NoError(t, err)
	b.noFile["22"] = unix.EBUSY
	done := len(b.log)
	require.ErrorIs(t, d.Close(), errBusy)
	require.Equal(t, []string{testVF}, b.left())
	_, err = giveBackLeft(c, nil)
	require.ErrorIs(t, err, errBusy)
	d, err = OpenSRIOV(c)
	require.NoError(t, err, "it may be its guest's again")
	assert.True(t, d.Status().Kept)
	assert.Contains(t, strings.Join(d.Warnings, "\n"), "a QEMU has it already")
	require.ErrorIs(t, d.Close(), errBusy)
	assert.Len(t, b.log, done, "nothing is touched meanwhile")
	delete(b.noFile, "22")
	_, err = giveBackLeft(c, nil)
	require.NoError(t, err)
	assert.Equal(t, "iavf", b.driver(testVF))
	assert.False(t, b.vfs["ens1f0 1"].Trust)
	assert.Empty(t, b.left())
}

// TestSRIOVRow16Undone: what fails half-way is undone.
func TestSRIOVRow16Undone(t *testing.T) {
	for _, what := range []string{setLink, "unbind", "bind"} {
		t.Run(what, func(t *testing.T) {
			b := newBoard(t)
			before := b.vfs["ens1f0 1"]
			b.refuse[what] = unix.EOPNOTSUPP
			c := b.config(testVF)
			c.Bind = true
			c.VFSettings = VFSettings{Trust: ref(true), LinkState: "disable"}
			_, err := OpenSRIOV(c)
			require.Error(t, err)
			if what == setLink {
				assert.ErrorContains(t, err, "the driver of link ens1f0 cannot set link_state of a virtual function (ip link set ens1f0 vf 1 state disable): leave it out")
			}
			assert.Equal(t, before, b.vfs["ens1f0 1"])
			if what != "bind" { // which is refused on the way back, too
				assert.Equal(t, "iavf", b.driver(testVF))
				assert.Equal(t, "(null)", b.override(testVF))
				assert.Empty(t, b.left())
			}
		})
	}
}

// TestSRIOVRow16Crash: the next run gives back what one left that crashed, or takes
// it over.
func TestSRIOVRow16Crash(t *testing.T) {
	b := newBoard(t)
	c := b.config(testVF)
	c.Bind = true
	c.VFSettings = VFSettings{MAC: net.HardwareAddr{2, 0, 0, 0, 0, 5}}
	crash := func() {
		d, err := OpenSRIOV(c)
		require.NoError(t, err)
		require.NoError(t, d.file.f.Close())
	}
	crash()
	d, err := OpenSRIOV(c)
	require.NoError(t, err)
	assert.Contains(t, strings.Join(d.Warnings, "\n"), "an earlier run ended without giving it back")
	notes, err := giveBackLeft(c, nil)
	require.NoError(t, err)
	assert.Empty(t, notes, "it is ours")
	require.NoError(t, d.Close())
	assert.Equal(t, "iavf", b.driver(testVF))
	assert.Equal(t, "0a:00:00:00:00:01", b.vfs["ens1f0 1"].MAC)

	crash()
	notes, err = giveBackLeft(c, []string{testVF})
	require.NoError(t, err)
	assert.Empty(t, notes)
	assert.Equal(t, "vfio-pci", b.driver(testVF))
	notes, err = giveBackLeft(c, nil)
	require.NoError(t, err)
	assert.Equal(t, []string{"function 0000:65:00.3: given back, which an earlier run had left"}, notes)
	assert.Equal(t, "iavf", b.driver(testVF))
	assert.Equal(t, "0a:00:00:00:00:01", b.vfs["ens1f0 1"].MAC)
	assert.Empty(t, b.left())

	// A file that was not written to its end, or is of another boot, says nothing.
	crash()
	file := filepath.Join(c.StateDir, "sriov-"+testVF+".json")
	whole, err := os.ReadFile(file)
	require.NoError(t, err)
	for _, text := range []string{string(whole[:20]), strings.Replace(string(whole), bootID(), "x", 1), ""} {
		require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
		notes, err = giveBackLeft(c, nil)
		require.NoError(t, err)
		assert.Empty(t, notes)
		assert.Empty(t, b.left())
	}
	// A function that went away needs nothing.
	require.NoError(t, os.WriteFile(file, whole, 0o600))
	require.NoError(t, os.RemoveAll(filepath.Join(b.sys, "bus/pci/devices", testVF)))
	_, err = giveBackLeft(c, nil)
	require.NoError(t, err)
	assert.Empty(t, b.left())
}

// TestSRIOVRow16WholeCard: the whole of a card that has no virtual functions is given
// with a warning.
func TestSRIOVRow16WholeCard(t *testing.T) {
	b := newBoard(t)
	b.file(testPF, "sriov_numvfs", "0")
	c := b.config(testPF)
	c.Bind = true
	d, err := OpenSRIOV(c)
	require.NoError(t, err)
	require.Len(t, d.Warnings, 1)
	assert.Contains(t, d.Warnings[0], "it is no virtual function: the guest gets the whole port of the card")
	require.NoError(t, d.Close())
	assert.Equal(t, "ice", b.driver(testPF))
}

// TestSRIOVRow72Protocol: 802.1ad is asked for by its own message.
func TestSRIOVRow72Protocol(t *testing.T) {
	list := changes(vfState{VLAN: 100, VLANProto: unix.ETH_P_8021Q}, vfState{VLAN: 100, VLANProto: unix.ETH_P_8021AD})
	require.Len(t, list, 1)
	assert.Equal(t, "ip link set ens1f0 vf 0 vlan 100 qos 0 proto 802.1ad", list[0].command("ens1f0", 0))
}

// A state that is written over a longer one can be read at every moment: here
// between the two calls of save.
func TestSRIOVStateOverALongerOne(t *testing.T) {
	dir := t.TempDir()
	sf, _, _, err := openState(dir, testVF)
	require.NoError(t, err)
	short := sriovState{Address: testVF, Boot: bootID(), Driver: "d"}
	long := short
	long.Override, long.PF = strings.Repeat("x", 100), "0000:65:00.0"
	require.NoError(t, sf.save(long))
	b, err := json.Marshal(short)
	require.NoError(t, err)
	_, err = sf.f.WriteAt(append(b, '\n'), 0)
	require.NoError(t, err)
	for range 2 {
		require.NoError(t, sf.close(false))
		var s sriovState
		var ok bool
		sf, s, ok, err = openState(dir, testVF)
		require.NoError(t, err)
		assert.True(t, ok)
		assert.Equal(t, short, s)
		require.NoError(t, sf.save(short))
	}
	text, err := os.ReadFile(sf.f.Name())
	require.NoError(t, err)
	assert.Equal(t, string(b)+"\n", string(text))
	require.NoError(t, sf.close(true))
}

func FuzzSRIOVState(f *testing.F) {
	f.Add([]byte(`{"address":"` + testVF + `","boot":"` + bootID() + `","before":{"mac":"x","link_state":4294967295},"pf":"../.."} and more`))
	f.Add([]byte(`{"address":"0000:65:00.3","before":null}`))
	f.Add([]byte(`{"address":"0000:65:00.3","before":{"mac":"x","link_state":4294967295},"pf":"../.."}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		file, err := os.Create(filepath.Join(t.TempDir(), "state"))
		require.NoError(t, err)
		defer file.Close()
		_, err = file.WriteAt(text, 0)
		require.NoError(t, err)
		s, ok, err := readState(file, testVF)
		require.NoError(t, err)
		if ok && s.Before != nil {
			for _, c := range changes(vfState{}, *s.Before) {
				assert.NotEmpty(t, c.command("l", s.VF))
			}
		}
	})
}
