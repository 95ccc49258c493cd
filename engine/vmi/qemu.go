package vmi

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// QEMUVersion is a frontend's version; the zero value is an unknown one.
type QEMUVersion struct{ Major, Minor int }

// Less says whether v is older than major.minor. An unknown version is older than all.
func (v QEMUVersion) Less(major, minor int) bool {
	return v.Major < major || v.Major == major && v.Minor < minor
}

func (v QEMUVersion) String() string { return fmt.Sprintf("%d.%d", v.Major, v.Minor) }

var qemuVersion = regexp.MustCompile(`version (\d{1,3})\.(\d{1,3})`)

// ParseQEMUVersion reads the first line of `qemu-system-x86_64 --version`.
func ParseQEMUVersion(out string) (QEMUVersion, error) {
	m := qemuVersion.FindStringSubmatch(out)
	if m == nil {
		return QEMUVersion{}, fmt.Errorf("no QEMU version in %q", oneLine(out))
	}
	major, _ := strconv.Atoi(m[1])
	minor, _ := strconv.Atoi(m[2])
	return QEMUVersion{major, minor}, nil
}

// AskQEMUVersion runs a QEMU binary for its version.
func AskQEMUVersion(ctx context.Context, binary string) (QEMUVersion, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, binary, "--version").Output()
	if err != nil {
		return QEMUVersion{}, fmt.Errorf("ask %s for its version: %w", binary, err)
	}
	return ParseQEMUVersion(string(out))
}

// QEMUOptions is what the arguments depend on beside the plan.
type QEMUOptions struct {
	SocketDir string              // where the vhost-user sockets are, see Interface.SocketPath
	MTU       func(Interface) int // MTU of an interface's network, 0 if unknown; nil for unknown everywhere
	Version   QEMUVersion
	KVM       bool // the frontend runs with KVM
	Client    bool // sidewire dials: QEMU has to listen
	Packed    bool // offer packed virtqueues
	// Handoff is what QEMU is given in place of a port of ours, ok if anything: the value of -netdev, whose id has to be
	// Interface.NetdevID, and properties that its device gets besides; or, with an empty netdev, the device's driver and
	// its properties; or neither where QEMU gets it later, by its monitor. Nil is for none.
	Handoff func(Interface) (netdev string, device []string, ok bool)
}

// NetdevID is the id that QEMU knows the interface's network backend by.
func (i Interface) NetdevID() string { return "net-" + i.Name }

// DeviceID is the id that QEMU knows the interface's NIC by.
func (i Interface) DeviceID() string { return "nic-" + i.Name }

// maxSocketPath is what sun_path holds before its final NUL.
const maxSocketPath = 107

// SocketPath is the interface's socket, of vhost-user or of a stream: DIR/VMI/INTERFACE.sock.
func (i Interface) SocketPath(dir string) string {
	return filepath.Join(dir, i.VM, i.Name+".sock")
}

// QEMUArgs gives the arguments that a QEMU needs to run a VM on our ports: memory, processors, and a netdev and a
// device for each interface, with a chardev for those that are virtio. Each element is one argument. The notes are lines for a person: what was
// left out or is needed besides. Machine type and accelerator are the caller's; interfaces with a PCI address need q35.
func QEMUArgs(vm VM, o QEMUOptions) (args, notes []string, err error) {
	b := &qemuArgs{o: o}
	b.memory(vm)
	b.smp(vm)
	if len(vm.Interfaces) == 0 {
		b.arg("-nic", "none") // QEMU adds one of its own otherwise
	}
	if err := b.nics(vm); err != nil {
		return nil, nil, err
	}
	return b.args, b.notes, nil
}

// nics adds the interfaces.
func (b *qemuArgs) nics(vm VM) error {
	// Devices that have a place go first, so that none that may be anywhere takes it.
	order := slices.Clone(vm.Interfaces)
	slices.SortStableFunc(order, func(x, y Interface) int {
		return placedFirst(x) - placedFirst(y)
	})
	if err := b.buses(order); err != nil {
		return err
	}
	for _, i := range order {
		if err := b.add(i); err != nil {
			return fmt.Errorf("interface %q: %w", i.Name, err)
		}
	}
	return nil
}

func placedFirst(i Interface) int {
	if i.PCIAddress != nil {
		return 0
	}
	return 1
}

type qemuArgs struct {
	o           QEMUOptions
	monitored   bool // who starts QEMU has its monitor
	args, notes []string
}

func (b *qemuArgs) arg(words ...string) { b.args = append(b.args, words...) }

func (b *qemuArgs) note(format string, args ...any) {
	n := fmt.Sprintf(format, args...)
	if !slices.Contains(b.notes, n) {
		b.notes = append(b.notes, n)
	}
}

// memory has to be shared and backed by a file, or the engine never sees the guest's rings; QEMU only
// prints a warning about that and runs on with a dead NIC.
func (b *qemuArgs) memory(vm VM) {
	align := uint64(2 << 20)
	huge := ""
	if vm.Hugepage > 0 {
		align = max(align, vm.Hugepage)
		huge = fmt.Sprintf(",hugetlb=on,hugetlbsize=%dK", vm.Hugepage>>10)
	}
	size := fmt.Sprintf("%dM", (vm.Memory+align-1)/align*align>>20)
	b.arg("-m", size)
	b.arg("-object", "memory-backend-memfd,id=mem,size="+size+",share=on"+huge)
	b.arg("-numa", "node,memdev=mem")
}

func (b *qemuArgs) smp(vm VM) {
	smp := strconv.Itoa(vm.VCPUs)
	if t := vm.Topology; t != (CPU{}) {
		smp += fmt.Sprintf(",sockets=%d,cores=%d,threads=%d", t.Sockets, t.Cores, t.Threads)
	}
	b.arg("-smp", smp)
}

func (b *qemuArgs) add(i Interface) error {
	switch {
	case i.Model != "igb":
	case b.o.Version == (QEMUVersion{}):
		b.note("model igb: QEMU has it from 8.0 on")
	case b.o.Version.Less(8, 0):
		return fmt.Errorf("model igb: QEMU has it from 8.0 on, and this is %s; use model e1000e, or name another QEMU", b.o.Version)
	}
	if b.o.Handoff != nil {
		if netdev, device, ok := b.o.Handoff(i); ok {
			if netdev == "" && len(device) == 0 {
				return nil
			}
			b.handoff(i, netdev, device)
			return nil
		}
	}
	path := i.SocketPath(b.o.SocketDir)
	b.down(i)
	switch {
	case len(path) > maxSocketPath:
		return fmt.Errorf("socket path %s is longer than %d bytes; choose a shorter --socket-dir", path, maxSocketPath)
	case strings.ContainsFunc(path, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return errors.New("control character in the socket's path; choose another --socket-dir")
	}
	if i.Model != "virtio" {
		b.arg("-netdev", "stream,id="+i.NetdevID()+b.stream()+",addr.type=unix,addr.path="+escape(path))
		b.arg("-device", strings.Join(b.place(i, []string{i.Model, "id=" + i.DeviceID(), "netdev=" + i.NetdevID()}), ","))
		return nil
	}
	b.arg("-chardev", "socket,id=char-"+i.Name+",path="+escape(path)+b.connect())
	netdev := "vhost-user,id=" + i.NetdevID() + ",chardev=char-" + i.Name
	if i.QueuePairs > 1 {
		netdev += ",queues=" + strconv.Itoa(i.QueuePairs)
	}
	b.arg("-netdev", netdev)
	b.arg("-device", b.device(i))
	return nil
}

// handoff adds a NIC behind which there is no port of ours.
func (b *qemuArgs) handoff(i Interface, netdev string, device []string) {
	if netdev == "" {
		i.MAC = nil // the device has its own
		d := append([]string{device[0], "id=" + i.DeviceID()}, device[1:]...)
		b.arg("-device", strings.Join(b.place(i, d), ","))
		return
	}
	b.arg("-netdev", netdev)
	if i.Model != "virtio" {
		d := append([]string{i.Model, "id=" + i.DeviceID(), "netdev=" + i.NetdevID()}, device...)
		b.arg("-device", strings.Join(b.place(i, d), ","))
		return
	}
	d := append([]string{"virtio-net-pci", "id=" + i.DeviceID(), "netdev=" + i.NetdevID()}, device...)
	if i.QueuePairs > 1 {
		d = append(d, "mq=on")
	}
	d = append(d, fmt.Sprintf("vectors=%d", 2*i.QueuePairs+2), "rx_queue_size=1024")
	b.arg("-device", strings.Join(b.place(i, b.virtio(i, d)), ","))
}

// down says what a guest sees of a link that is down. Where it is ours QEMU shows it by itself.
func (b *qemuArgs) down(i Interface) {
	if i.State == Down && i.Model != "virtio" && !b.monitored {
		b.note("interface %s is down: no frame passes, but a NIC of model %s shows the guest a link; {\"execute\": \"set_link\", \"arguments\": {\"name\": %q, \"up\": false}} on QEMU's monitor takes that away",
			i.Name, i.Model, i.NetdevID())
	}
}

// stream is who dials, and whether again, for a NIC that is not virtio.
func (b *qemuArgs) stream() string {
	switch v := b.o.Version; {
	case b.o.Client:
		return ",server=on"
	case v.Less(8, 0):
		b.note("netdev stream: QEMU before 8.0 does not dial again when sidewire was restarted: use --mode client, or QEMU 8 or later")
		return ",server=off"
	case v.Less(9, 2):
		return ",server=off,reconnect=1"
	}
	return ",server=off,reconnect-ms=100"
}

// connect: sidewire may be restarted, so QEMU tries again for ever. The option's old name went away after 9.2 brought
// the new one.
func (b *qemuArgs) connect() string {
	switch {
	case b.o.Client:
		return ",server=on,wait=off"
	case b.o.Version == (QEMUVersion{}):
		b.note("the version of QEMU is not known: these arguments are for 7.2 to 9.1")
		return ",reconnect=1"
	case b.o.Version.Less(9, 2):
		return ",reconnect=1"
	}
	return ",reconnect-ms=100"
}

// device: a transitional device is what iPXE boots from.
func (b *qemuArgs) device(i Interface) string {
	d := []string{"virtio-net-pci", "id=" + i.DeviceID(), "netdev=" + i.NetdevID()}
	add := func(format string, args ...any) { d = append(d, fmt.Sprintf(format, args...)) }
	if i.MAC != nil {
		add("mac=%s", i.MAC)
	}
	if i.QueuePairs > 1 {
		add("mq=on")
	}
	if !b.o.KVM && b.o.Version.Less(8, 0) {
		// QEMU 7.2 crashes when a guest under TCG sets up MSI-X on a virtio-net over vhost-user.
		add("vectors=0")
		b.note("vectors=0: this QEMU crashes with MSI-X on vhost-user unless KVM is there; use QEMU 8 or later, or KVM")
	} else {
		add("vectors=%d", 2*i.QueuePairs+2)
	}
	add("mrg_rxbuf=on,rx_queue_size=1024,tx_queue_size=1024")
	if b.o.Packed {
		add("packed=on")
	}
	i.MAC = nil // it has its place already
	return strings.Join(b.place(i, b.virtio(i, d)), ",")
}

// virtio adds what every virtio NIC may have.
func (b *qemuArgs) virtio(i Interface, d []string) []string {
	if b.o.MTU != nil {
		if mtu := b.o.MTU(i); mtu >= minMTU && mtu <= maxMTU {
			d = append(d, fmt.Sprintf("host_mtu=%d", mtu))
		}
	}
	if i.BootOrder > 0 || i.Transitional {
		return append(d, "disable-legacy=off")
	}
	return append(d, "disable-legacy=on")
}

// place adds what every NIC may have to a device: without a boot order the ROM is off, as KubeVirt has it.
func (b *qemuArgs) place(i Interface, d []string) []string {
	add := func(format string, args ...any) { d = append(d, fmt.Sprintf(format, args...)) }
	if i.MAC != nil {
		add("mac=%s", i.MAC)
	}
	if i.BootOrder > 0 {
		add("bootindex=%d", i.BootOrder)
	} else {
		add("romfile=")
	}
	if i.ACPIIndex > 0 {
		add("acpi-index=%d", i.ACPIIndex)
	}
	if a := i.PCIAddress; a != nil {
		add("bus=%s,addr=%02x.%x", busName(a.Bus), a.Slot, a.Function)
		add("multifunction=on")
	}
	return d
}

// escape doubles the commas of a value in a QEMU option.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }
