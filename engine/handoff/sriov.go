package handoff

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync/atomic"
)

// SRIOVConfig says which function a guest gets, and how.
type SRIOVConfig struct {
	Address string // as ParsePCIAddress gives it
	VFSettings
	// ByPod is whether a CNI has set the function already, as a pod's is: where its
	// physical function's link cannot be seen, that is taken for granted.
	ByPod bool
	// MTU is what the guest will send, 0 if not said; the network has to take it.
	MTU int
	// Bind lets vfio-pci have the function while it is the guest's. It needs root.
	Bind bool
	// GuestMemory is in bytes: all of it stays in memory while the guest has a
	// function.
	GuestMemory uint64
	// Launch is whether QEMU is a child of this process, with its rights and
	// limits. What only another QEMU could lack is a warning.
	Launch bool
	// StateDir is where it is written what the function was before.
	StateDir string
	// Sys and Dev are /sys and /dev, unless said otherwise.
	Sys, Dev string

	// Tests put these into the kernel's place.
	write   func(path, text string) error
	open    func(path string) error
	links   hostLinks
	process process
}

// complete fills in what is not said.
func (c *SRIOVConfig) complete() {
	if c.Sys == "" {
		c.Sys = "/sys"
	}
	if c.Dev == "" {
		c.Dev = "/dev"
	}
	if c.write == nil {
		c.write = writeFile
	}
	if c.open == nil {
		c.open = openNode
	}
	if c.links == nil {
		c.links = kernelLinks{}
	}
	if c.process == nil {
		c.process = thisProcess{}
	}
}

func (c *SRIOVConfig) host() pciHost {
	return pciHost{sys: c.Sys, dev: c.Dev, write: c.write, open: c.open}
}

// writeFile writes to a file of sysfs, by one call.
func writeFile(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// SRIOV is a function of a PCI device that is a guest's own, by vfio: a virtual
// function of a network card, or all of one. It is a [Device].
type SRIOV struct {
	// Warnings are what the guest may miss, for people.
	Warnings []string

	c      SRIOVConfig
	host   pciHost
	f      function
	file   *stateFile // locked while we have the function
	saved  bool       // state is in the file
	kept   bool       // it was there from an earlier run
	state  sriovState
	status atomic.Pointer[Status]
}

// OpenSRIOV checks that a function can be a guest's, sets it and, if asked, binds
// it to vfio-pci. The error says what is missing; then nothing was changed. It
// works on links of the current namespace, which for a virtual function is its physical
// one's.
func OpenSRIOV(c SRIOVConfig) (*SRIOV, error) {
	c.complete()
	d := &SRIOV{c: c, host: c.host()}
	if err := d.open(); err != nil {
		return nil, fmt.Errorf("function %s: %w", c.Address, err)
	}
	return d, nil
}

func (d *SRIOV) open() (err error) {
	if err := d.c.check(); err != nil {
		return err
	}
	if d.f, err = d.find(); err != nil {
		return err
	}
	var left bool
	if d.file, d.state, left, err = openState(d.c.StateDir, d.c.Address); err != nil {
		return err
	}
	switch {
	case left && d.state.Bound && !vfioDriver.MatchString(d.f.driver):
		left = false // somebody has taken it from vfio-pci since
	case left:
		// Perhaps that run's QEMU lives. The function goes back to what it was before.
		d.warn("an earlier run ended without giving it back: it is taken over as it is")
	}
	if !left {
		d.state = sriovState{Address: d.c.Address, Boot: bootID(), Driver: d.f.driver, Override: d.f.override}
	}
	d.saved, d.kept = left, left
	p, err := d.plan(left)
	if err != nil {
		err = errors.Join(err, d.file.close(!left))
		d.file = nil
		return err
	}
	if len(p.changes) > 0 || p.bind {
		if err := d.change(p); err != nil {
			return errors.Join(err, d.Close())
		}
	}
	d.setStatus(p)
	return nil
}

// find reads the function, and says what may be meant if it is not there.
func (d *SRIOV) find() (function, error) {
	f, err := d.host.read(d.c.Address)
	if errors.Is(err, fs.ErrNotExist) {
		return f, fmt.Errorf("this host has no such device (%s); list its functions with: ls %s",
			d.host.devicePath(d.c.Address), d.host.devicePath(""))
	}
	return f, err
}

func (d *SRIOV) warn(format string, args ...any) {
	d.Warnings = append(d.Warnings, fmt.Sprintf("function %s: ", d.c.Address)+fmt.Sprintf(format, args...))
}

// change does what was planned, when it is written down how it was before.
func (d *SRIOV) change(p sriovPlan) error {
	if len(p.changes) > 0 && d.state.Before == nil {
		d.state.PF, d.state.VF, d.state.Before = d.f.pf, d.f.vf, &p.before
	}
	d.state.Bound = d.state.Bound || p.bind
	if err := d.file.save(d.state); err != nil {
		return err
	}
	d.saved = true
	for _, c := range p.changes {
		if err := d.c.links.set(p.link, d.f.vf, c); err != nil {
			return refusedSetting(p.link, d.f.vf, c, err)
		}
	}
	if !p.bind {
		return nil
	}
	if err := d.host.bind(d.c.Address, vfioPCI, vfioPCI); err != nil {
		return err
	}
	d.f.driver = vfioPCI
	if err := d.host.appears(d.host.groupNode(d.f.group)); err != nil {
		return fmt.Errorf("bound to vfio-pci, but %w: udev or the container's devices keep it away", err)
	}
	return nil
}

// Up does nothing: a function speaks when its guest's driver does.
func (d *SRIOV) Up() error { return nil }

// Open gives no files: QEMU opens what it needs below /dev/vfio.
func (d *SRIOV) Open() ([]*os.File, error) { return nil, nil }

// Netdev is empty: there is no backend.
func (d *SRIOV) Netdev([]string, string) string { return "" }

// Properties name the driver and the function.
func (d *SRIOV) Properties() []string { return VFIODevice(d.c.Address) }

// VFIODevice are the properties by which QEMU gets a function.
func VFIODevice(address string) []string { return []string{vfioPCI, "host=" + address} }

// Status tells the function's.
func (d *SRIOV) Status() Status { return *d.status.Load() }

func (d *SRIOV) setStatus(p sriovPlan) {
	s := Status{
		Kind: "sriov", Adopted: !d.state.Bound, Kept: d.kept, Address: d.c.Address, Driver: d.f.driver, Group: d.f.group,
		PF: d.f.pf, Link: p.link, MTU: p.mtu,
	}
	if d.f.pf != "" {
		s.VF = &d.f.vf
	}
	if p.seen {
		s.MAC, s.VLAN = p.after.MAC, p.after.VLAN
		s.SpoofCheck, s.Trust = &p.after.SpoofCheck, &p.after.Trust
	}
	d.status.Store(&s)
}

// Close gives the function back. One that a QEMU still has stays as it is: to take
// it away would wait for that QEMU's end. The next run gives it back then.
func (d *SRIOV) Close() error {
	if d.file == nil {
		return nil
	}
	done, err := true, error(nil)
	if d.saved {
		done, err = giveBack(d.host, d.c.links, d.state)
	}
	err = errors.Join(err, d.file.close(done))
	d.file = nil
	if err != nil {
		return fmt.Errorf("give function %s back: %w", d.c.Address, err)
	}
	return nil
}

// GiveBackSRIOV gives back what earlier runs had and could not, because they
// crashed or their QEMU went on: all functions with a state in dir that no run
// has, but for those of keep, which this run will have itself. The notes say for
// people what was done.
func GiveBackSRIOV(dir string, keep []string) (notes []string, err error) {
	return giveBackLeft(SRIOVConfig{StateDir: dir}, keep)
}

func giveBackLeft(c SRIOVConfig, keep []string) (notes []string, err error) {
	c.complete()
	addresses, err := leftStates(c.StateDir)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, address := range addresses {
		if strings.Contains(" "+strings.Join(keep, " ")+" ", " "+address+" ") {
			continue
		}
		file, state, ok, err := openState(c.StateDir, address)
		if errors.Is(err, errHeld) {
			continue
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("function %s, which an earlier run had: %w", address, err))
			continue
		}
		done, what := true, ""
		if ok {
			what = "given back, which an earlier run had left"
			done, err = giveBack(c.host(), c.links, state)
		}
		if err = errors.Join(err, file.close(done)); err != nil {
			errs = append(errs, fmt.Errorf("give function %s back, which an earlier run had: %w", address, err))
		} else if what != "" {
			notes = append(notes, "function "+address+": "+what)
		}
	}
	return notes, errors.Join(errs...)
}

// errBusy is that a function cannot be given back.
var errBusy = errors.New("a QEMU still has it; it is given back at the next start of sidewire after that QEMU's end")

// giveBack makes a function what its state says. The settings come first: a
// driver that gets it then finds its own MAC. It is done unless it has to be tried
// again.
func giveBack(host pciHost, links hostLinks, s sriovState) (done bool, err error) {
	f, err := host.read(s.Address)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil // it went away, and what it was set to with it
	}
	if err != nil {
		return false, err
	}
	if f.group != "" && vfioDriver.MatchString(f.driver) && host.busy(f.group) {
		return false, errBusy
	}
	var errs []error
	if s.Before != nil {
		errs = append(errs, settingsBack(host, links, s))
	}
	if s.Bound {
		errs = append(errs, driverBack(host, f, s))
	}
	err = errors.Join(errs...)
	return err == nil, err
}

func settingsBack(host pciHost, links hostLinks, s sriovState) error {
	link, err := pfLink(host, s.PF)
	if err != nil {
		return err
	}
	now, err := links.vf(link, s.VF)
	if err != nil {
		return err
	}
	var errs []error
	for _, c := range changes(now, *s.Before) {
		err := links.set(link, s.VF, c)
		if c.what == setMAC && isZeroMAC(c.to.MAC) {
			continue // it had none: some drivers take back what they gave, others do not
		}
		if err != nil {
			errs = append(errs, refusedSetting(link, s.VF, c, err))
		}
	}
	return errors.Join(errs...)
}

// driverBack gives a function to the driver that had it, unless somebody else has
// given it away since.
func driverBack(host pciHost, f function, s sriovState) error {
	if f.driver != vfioPCI && f.driver != "" && f.driver != s.Driver {
		return nil
	}
	driver := s.Driver
	if driver != "" && !host.has(driver) {
		driver = "" // it takes what it fits when it is loaded again
	}
	return host.bind(s.Address, driver, s.Override)
}
