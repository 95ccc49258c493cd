package handoff

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const vfioPCI = "vfio-pci"

// process is what a process may do; tests have others than their own.
type process interface {
	can(capability int) bool
	// writable says why a path cannot be written to, nil if it can.
	writable(path string) error
	// memlock is how much memory it may lock.
	memlock() uint64
}

// thisProcess is the one that runs.
type thisProcess struct{}

func (thisProcess) can(capability int) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if unix.Capget(&header, &data[0]) != nil {
		return false
	}
	return data[capability/32].Effective&(1<<(capability%32)) != 0
}

func (thisProcess) writable(path string) error {
	return unix.Faccessat(unix.AT_FDCWD, path, unix.W_OK, unix.AT_EACCESS)
}

func (thisProcess) memlock() uint64 {
	var l unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_MEMLOCK, &l) != nil {
		return 0
	}
	return l.Cur
}

// sriovPlan is what is to be changed, and what is known of the function's link.
type sriovPlan struct {
	bind    bool
	link    string // the physical function's, empty where it is not to be seen
	mtu     int    // that link's
	seen    bool   // before and after are known
	before  vfState
	after   vfState
	changes []vfChange
}

// plan says what has to be changed for the guest to have the function. The error
// is everything that is missing, in one line.
func (d *SRIOV) plan(left bool) (p sriovPlan, err error) {
	var missing []string
	need := func(err error) {
		if err != nil {
			missing = append(missing, err.Error())
		}
	}
	p.bind = d.c.Bind && !vfioDriver.MatchString(d.f.driver)
	need(d.checkGroup())
	need(d.checkDriver(p.bind))
	if p.bind {
		need(d.checkBind())
	} else {
		need(d.checkNode(left))
	}
	need(d.checkMemory())
	need(d.planSettings(&p))
	if len(missing) > 0 {
		return p, errors.New(strings.Join(missing, "; and "))
	}
	return p, nil
}

// checkGroup: a process gets a group as a whole, since its functions can reach each
// other behind the IOMMU's back.
func (d *SRIOV) checkGroup() error {
	if d.f.group == "" {
		if d.host.iommu() {
			return errors.New("it is in no IOMMU group: the machine's IOMMU does not guard the slot that it is in")
		}
		return errors.New("the IOMMU is off: switch it on in the firmware (VT-d or AMD-Vi), and boot the kernel with intel_iommu=on where the CPU is Intel's")
	}
	others, err := d.host.neighbours(d.f)
	if err != nil {
		return fmt.Errorf("IOMMU group %s: %w", d.f.group, err)
	}
	others = slices.DeleteFunc(others, func(o function) bool {
		return o.driver == "" || o.driver == "pci-stub" || o.bridge || vfioDriver.MatchString(o.driver)
	})
	if len(others) > 0 {
		return fmt.Errorf("IOMMU group %s is not viable, for the host uses others of it: %s; give these to vfio-pci too, or put the card into a slot whose bridge has ACS",
			d.f.group, names(others))
	}
	return nil
}

// checkDriver: QEMU takes a function from a vfio driver alone.
func (d *SRIOV) checkDriver(bind bool) error {
	switch {
	case bind && d.f.bridge || bind && !d.f.network:
		return errors.New("it is no network card's: that is not bound to vfio-pci here")
	case !vfioDriver.MatchString(d.f.driver) && !d.host.has(vfioPCI):
		return errors.New("the module vfio-pci is not loaded: modprobe vfio-pci")
	case bind || vfioDriver.MatchString(d.f.driver):
		return nil
	case d.f.driver == "":
		return errors.New("it has no driver, but QEMU takes it from vfio-pci alone: let sidewire bind it with --vfio-bind")
	}
	return fmt.Errorf("driver %s uses it, but QEMU takes it from vfio-pci alone: let sidewire bind it with --vfio-bind, or have the device plugin's policy say deviceType: vfio-pci",
		d.f.driver)
}

// checkBind: whoever has the function must be able to lose it.
func (d *SRIOV) checkBind() error {
	if d.f.vfs > 0 {
		return fmt.Errorf("its %d virtual functions would go away with it: name one of them, or take them away first (echo 0 > %s)",
			d.f.vfs, filepath.Join(d.host.devicePath(d.f.address), "sriov_numvfs"))
	}
	if d.f.driver != "" && len(d.f.links) == 0 {
		return fmt.Errorf("driver %s has it, but its link is in another network namespace, whose user would lose it: name another function, or take it from there first", d.f.driver)
	}
	for _, link := range d.f.links {
		use, err := d.c.links.use(link)
		if err != nil {
			return fmt.Errorf("link %s, which is its: %w", link, err)
		}
		if use != "" {
			return fmt.Errorf("the host uses it: link %s %s; take that away first, or name another function", link, use)
		}
	}
	paths := []string{filepath.Join(d.host.devicePath(d.f.address), "driver_override")}
	if d.f.driver != "" {
		paths = append(paths, filepath.Join(d.host.driverPath(d.f.driver), "unbind"))
	}
	if d.host.has(vfioPCI) {
		paths = append(paths, filepath.Join(d.host.driverPath(vfioPCI), "bind"))
	}
	for _, path := range paths {
		switch err := d.c.process.writable(path); {
		case errors.Is(err, unix.EROFS):
			return fmt.Errorf("%s is mounted read-only, so vfio-pci cannot be given the function: bind it outside of the container", d.c.Sys)
		case errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM):
			return fmt.Errorf("only root may bind a function to vfio-pci: %s: %w", path, err)
		case err != nil:
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

// checkNode: QEMU opens the group.
func (d *SRIOV) checkNode(left bool) error {
	if d.f.group == "" || !vfioDriver.MatchString(d.f.driver) {
		return nil // said already
	}
	node := d.host.groupNode(d.f.group)
	err := d.host.open(node)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.EBUSY) && left:
		d.warn("a QEMU has it already")
		return nil
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("another process has IOMMU group %s (%s): one QEMU at a time can", d.f.group, node)
	case errors.Is(err, fs.ErrNotExist):
		return d.qemuNeeds("%s is not there: load vfio-pci, or give the container that device", node)
	case errors.Is(err, fs.ErrPermission):
		return d.qemuNeeds("no permission to open %s: give it to the user that QEMU runs as (chown, or a rule of udev)", node)
	}
	return d.qemuNeeds("open %s: %v", node, err)
}

// qemuNeeds is an error where QEMU has what we have, else a warning.
func (d *SRIOV) qemuNeeds(format string, args ...any) error {
	if d.c.Launch {
		return fmt.Errorf(format, args...)
	}
	d.warn("unless QEMU may more than this process: "+format, args...)
	return nil
}

// checkMemory: the device writes to the guest's memory whenever it likes, so none
// of it may be swapped out.
func (d *SRIOV) checkMemory() error {
	limit := d.c.process.memlock()
	if d.c.GuestMemory <= limit || d.c.process.can(unix.CAP_IPC_LOCK) {
		return nil
	}
	return d.qemuNeeds("all of the guest's %d MiB has to be locked in memory, but RLIMIT_MEMLOCK is %d KiB: raise it (ulimit -l unlimited, or LimitMEMLOCK=infinity), or grant CAP_IPC_LOCK",
		d.c.GuestMemory>>20, limit>>10)
}

// planSettings compares the settings that are asked for with those that are.
func (d *SRIOV) planSettings(p *sriovPlan) (err error) {
	if d.f.pf == "" {
		d.warn("it is no virtual function: the guest gets the whole port of the card, and nothing keeps it to a MAC or a VLAN")
		if d.c.asked() && !d.c.ByPod {
			return errors.New("it is no virtual function, so that MAC, VLAN, spoofchk, trust, link state and rates cannot be set: name a virtual function, or leave them out")
		}
		if len(d.f.links) > 0 {
			p.link = d.f.links[0]
			p.mtu, _, err = d.c.links.state(p.link)
		}
		return err
	}
	p.link, err = pfLink(d.host, d.f.pf)
	if errors.Is(err, errNoLink) {
		if d.c.asked() && !d.c.ByPod {
			return fmt.Errorf("%w, so that MAC, VLAN, spoofchk, trust, link state and rates cannot be set: start sidewire in the namespace of the host's links", err)
		}
		return nil // it may be set by its CNI
	}
	if err != nil {
		return err
	}
	up := false
	if p.mtu, up, err = d.c.links.state(p.link); err != nil {
		return fmt.Errorf("link %s: %w", p.link, err)
	}
	if !up {
		d.warn("link %s, whose virtual function it is, is down: ip link set %s up", p.link, p.link)
	}
	if d.c.MTU > p.mtu {
		d.warn("its network's MTU is %d, but that of link %s only %d: longer frames are lost; ip link set %s mtu %d", d.c.MTU, p.link, p.mtu, p.link, d.c.MTU)
	}
	if p.before, err = d.c.links.vf(p.link, d.f.vf); err != nil {
		return err
	}
	p.seen, p.after = true, p.before
	if d.c.ByPod {
		return nil
	}
	if p.after, err = d.c.apply(p.before); err != nil {
		return err
	}
	p.changes = changes(p.before, p.after)
	if len(p.changes) > 0 && !d.c.process.can(unix.CAP_NET_ADMIN) {
		return fmt.Errorf("CAP_NET_ADMIN is missing to set its %s: grant it, or type as root: %s", p.changes[0].what, p.changes[0].command(p.link, d.f.vf))
	}
	return nil
}

var errNoLink = errors.New("has no link in this network namespace")

// pfLink is the link of a physical function.
func pfLink(host pciHost, pf string) (string, error) {
	f, err := host.read(pf)
	if err != nil {
		return "", fmt.Errorf("physical function %s: %w", pf, err)
	}
	if len(f.links) == 0 {
		return "", fmt.Errorf("its physical function %s %w", pf, errNoLink)
	}
	return f.links[0], nil
}
