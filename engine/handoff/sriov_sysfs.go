package handoff

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// pciHost is the kernel's view of its devices. Tests have a tree of their own, and
// do what the kernel would do for a write.
type pciHost struct {
	sys, dev string
	write    func(path, text string) error
	// open opens the node of a group, and closes it again.
	open func(path string) error
}

// function is a PCI function as sysfs shows it.
type function struct {
	address string
	driver  string // empty if none has it
	// override is the only driver that may have it, empty for any that fits.
	override string
	pf       string   // the physical function's address, empty unless this is a virtual one
	vf       int      // its number there
	vfs      int      // how many virtual functions this one has
	group    string   // the IOMMU group's number, empty if there is none
	bridge   bool     // it leads to other functions
	network  bool     // it is a network card's
	links    []string // of the namespace that sysfs is of
}

// vfioDriver tells the drivers by which a function is given to a process: vfio-pci
// and those that can also migrate it, such as mlx5_vfio_pci.
var vfioDriver = regexp.MustCompile(`^(\w+[-_])?vfio[-_]pci$`)

// representor tells the links that stand for a virtual function in its card's switch.
var representor = regexp.MustCompile(`[vs]f\d+$`)

func (s *pciHost) devicePath(address string) string {
	return filepath.Join(s.sys, "bus/pci/devices", address)
}

func (s *pciHost) driverPath(driver string) string {
	return filepath.Join(s.sys, "bus/pci/drivers", driver)
}

// target is the last element of where a link leads, empty if there is none.
func target(link string) (string, error) {
	to, err := os.Readlink(link)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return filepath.Base(to), nil
}

// text is a small file without the space around, empty if there is none.
func text(path string) (string, error) {
	b, err := readBounded(path, 64<<10)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return strings.TrimSpace(string(b)), err
}

// read looks at a function. The error is fs.ErrNotExist if it is not there.
func (s *pciHost) read(address string) (f function, err error) {
	dir := s.devicePath(address)
	if _, err := os.Stat(dir); err != nil {
		return f, err
	}
	f = function{address: address, vf: -1}
	for _, l := range []struct {
		name string
		to   *string
	}{{"driver", &f.driver}, {"physfn", &f.pf}, {"iommu_group", &f.group}} {
		if *l.to, err = target(filepath.Join(dir, l.name)); err != nil {
			return f, err
		}
	}
	if f.override, err = text(filepath.Join(dir, "driver_override")); err != nil {
		return f, err
	}
	if f.override == "(null)" {
		f.override = ""
	}
	class, err := text(filepath.Join(dir, "class"))
	if err != nil {
		return f, err
	}
	f.bridge, f.network = strings.HasPrefix(class, "0x06"), strings.HasPrefix(class, "0x02")
	vfs, err := text(filepath.Join(dir, "sriov_numvfs"))
	if err != nil {
		return f, err
	}
	f.vfs, _ = strconv.Atoi(vfs) // absent where it has none
	links, _ := os.ReadDir(filepath.Join(dir, "net"))
	for _, l := range links {
		// A card that is a switch has a link for each virtual function beside its own.
		if port, _ := text(filepath.Join(dir, "net", l.Name(), "phys_port_name")); !representor.MatchString(port) {
			f.links = append(f.links, l.Name())
		}
	}
	if f.pf != "" {
		f.vf, err = s.number(f.pf, address)
	}
	return f, err
}

// number is a virtual function's number: the physical one has a link to it.
func (s *pciHost) number(pf, address string) (int, error) {
	links, err := filepath.Glob(filepath.Join(s.devicePath(pf), "virtfn*"))
	if err != nil {
		return 0, err
	}
	for _, l := range links {
		if to, err := target(l); err == nil && to == address {
			return strconv.Atoi(strings.TrimPrefix(filepath.Base(l), "virtfn"))
		}
	}
	return 0, fmt.Errorf("%s is no virtual function of %s, which it says it is", address, pf)
}

// neighbours are the other functions of a group.
func (s *pciHost) neighbours(f function) (others []function, err error) {
	entries, err := os.ReadDir(filepath.Join(s.sys, "kernel/iommu_groups", f.group, "devices"))
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if e.Name() == f.address {
			continue
		}
		other, err := s.read(e.Name())
		if errors.Is(err, fs.ErrNotExist) {
			other, err = function{address: e.Name()}, nil // not of PCI
		}
		if err != nil {
			return nil, err
		}
		others = append(others, other)
	}
	return others, nil
}

// iommu is whether the machine has one that is on.
func (s *pciHost) iommu() bool {
	entries, _ := os.ReadDir(filepath.Join(s.sys, "class/iommu"))
	return len(entries) > 0
}

// has is whether a driver is loaded.
func (s *pciHost) has(driver string) bool {
	_, err := os.Stat(s.driverPath(driver))
	return err == nil
}

// groupNode is the device by which a process gets the functions of a group.
func (s *pciHost) groupNode(group string) string { return filepath.Join(s.dev, "vfio", group) }

// busy is whether a process has the group.
func (s *pciHost) busy(group string) bool {
	return errors.Is(s.open(s.groupNode(group)), unix.EBUSY)
}

// openNode is open for the kernel's own.
func openNode(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// bind gives a function to a driver, or takes it from the one that has it if the
// name is empty. From now on only the driver named override may have it, or any
// that fits if that is empty.
func (s *pciHost) bind(address, driver, override string) error {
	dir := s.devicePath(address)
	old, err := target(filepath.Join(dir, "driver"))
	if err != nil {
		return err
	}
	// A line that is empty but for its end is how the kernel is told "any".
	if err := s.write(filepath.Join(dir, "driver_override"), override+"\n"); err != nil {
		return fmt.Errorf("set driver_override of %s: %w", address, err)
	}
	if old == driver {
		return nil
	}
	if old != "" {
		if err := s.write(filepath.Join(s.driverPath(old), "unbind"), address); err != nil {
			return fmt.Errorf("take %s from its driver %s: %w", address, old, err)
		}
	}
	if driver == "" {
		return nil
	}
	if err := s.write(filepath.Join(s.driverPath(driver), "bind"), address); err != nil {
		return fmt.Errorf("driver %s did not take %s: %w; the kernel's log says why (dmesg)", driver, address, err)
	}
	return nil
}

// appears waits for a device that was just made: udev may be slow to give it away.
func (s *pciHost) appears(path string) error {
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(path); err == nil || time.Now().After(end) {
			return err
		}
	}
}

// names lists functions for people.
func names(functions []function) string {
	var out []string
	for _, f := range functions {
		driver := "no driver"
		if f.driver != "" {
			driver = "driver " + f.driver
		}
		out = append(out, f.address+" with "+driver)
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}
