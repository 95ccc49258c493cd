package vmi

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// launchMemory is the id of the memory that a launched QEMU gets where its command line names none.
const launchMemory = "sidewire-mem"

// StableMAC is the hardware address of an interface that nobody gave one: the same whenever the VM is started.
func (vm VM) StableMAC(name string) net.HardwareAddr {
	return stableMAC(namespaceOr(vm.Namespace), vm.Name, name)
}

// QEMULaunch gives the command line of a QEMU that runs a VM on our ports, from what the user would start: program,
// arguments, and what [QEMUArgs] has. What the user gave stands, memory and processors above all; where a port of ours
// has to see the memory and could not, that is mended, and a note says so. command is not changed.
func QEMULaunch(vm VM, o QEMUOptions, command []string) (args, notes []string, err error) {
	g := scanQEMU(command)
	if g.has("daemonize") {
		return nil, nil, errors.New("-daemonize: sidewire ends when QEMU does, so leave it out and put sidewire itself in the background")
	}
	o.KVM = g.kvm()
	b := &qemuArgs{o: o, monitored: true}
	if !g.has("smp") {
		b.smp(vm)
	}
	if err := b.launchMemory(vm, g); err != nil {
		return nil, nil, err
	}
	if err := b.launchMachine(vm, g); err != nil {
		return nil, nil, err
	}
	if err := b.nics(vm); err != nil {
		return nil, nil, err
	}
	if !slices.Contains(b.args, "-netdev") && !g.has("netdev", "nic", "net") {
		b.arg("-nic", "none") // QEMU's own would be one more
	}
	return append(g.args, b.args...), b.notes, nil
}

// QEMUProgram is the element of a command that is QEMU itself: the first, unless that is a wrapper such as nsenter.
// ok is false where none looks like QEMU.
func QEMUProgram(command []string) (at int, ok bool) {
	for i, a := range command {
		if base := filepath.Base(a); strings.HasPrefix(base, "qemu-system-") || base == "qemu-kvm" || base == "kvm" || base == "qemu" {
			return i, true
		}
	}
	return 0, false
}

// shared says whether a port of ours has to see the VM's memory.
func (o *QEMUOptions) shared(vm VM) bool {
	return slices.ContainsFunc(vm.Interfaces, func(i Interface) bool {
		if o.Handoff != nil {
			if _, _, handed := o.Handoff(i); handed {
				return false
			}
		}
		return i.Model == "virtio"
	})
}

func (b *qemuArgs) launchMemory(vm VM, g *qemuCommand) error {
	shared := b.o.shared(vm)
	used := g.memoryUsed()
	switch {
	case len(used) > 0:
		if !shared {
			return nil
		}
		for _, id := range used {
			if err := b.mend(g, id); err != nil {
				return err
			}
		}
		return nil
	case !g.has("m"):
		if path, ok := g.last("mem-path"); ok {
			return fmt.Errorf("-mem-path %s without -m: say how much memory the guest has", path)
		}
		b.memory(vm)
		return nil
	case !shared:
		return nil
	}
	text, _ := g.last("m")
	size, err := memorySize(text)
	if err != nil {
		return err
	}
	object := "memory-backend-memfd,id=" + launchMemory
	if path, ok := g.last("mem-path"); ok {
		g.remove("mem-path")
		object = "memory-backend-file,id=" + launchMemory + ",mem-path=" + escape(path)
		b.note("-mem-path %s became a memory-backend-file with share=on, for sidewire has to see the guest's memory", path)
	} else if vm.Hugepage > 0 && size%vm.Hugepage == 0 {
		object += fmt.Sprintf(",hugetlb=on,hugetlbsize=%dK", vm.Hugepage>>10)
	} else if vm.Hugepage > 0 {
		b.note("-m %s is no whole number of huge pages, so the guest gets ordinary ones", text)
	}
	b.arg("-object", fmt.Sprintf("%s,size=%d,share=on", object, size), "-machine", "memory-backend="+launchMemory)
	return nil
}

// launchMachine: the buses that addresses name are those of q35.
func (b *qemuArgs) launchMachine(vm VM, g *qemuCommand) error {
	if !slices.ContainsFunc(vm.Interfaces, func(i Interface) bool { return i.PCIAddress != nil }) {
		return nil
	}
	switch m := g.machine(); {
	case m == "":
		b.arg("-machine", "q35")
	case m == "pc" || strings.HasPrefix(m, "pc-i440fx") || m == "isapc" || m == "microvm":
		return fmt.Errorf("-machine %s: an interface has a pciAddress, whose buses this machine does not have; use -machine q35", m)
	}
	return nil
}

// mend lets sidewire see a memory backend of the user's.
func (b *qemuArgs) mend(g *qemuCommand, id string) error {
	i, o := g.object(id)
	if o == nil {
		return nil // from a configuration file, or QEMU will say that there is none
	}
	kind, _ := o.get("qom-type")
	share, said := o.get("share")
	switch {
	case kind == "memory-backend-ram" || kind == "memory-backend-memfd" && said && share != "on":
		o.set("qom-type", "memory-backend-memfd")
	case kind == "memory-backend-file" && share != "on":
	case kind == "memory-backend-memfd" || kind == "memory-backend-file" || kind == "memory-backend-shm":
		return nil
	default:
		return fmt.Errorf("-object %s,id=%s: sidewire cannot see such memory; use memory-backend-memfd with share=on", kind, id)
	}
	o.set("share", "on")
	g.args[i] = o.String()
	now, _ := o.get("qom-type")
	b.note("memory %s, a %s, became a %s with share=on, for sidewire has to see the guest's memory", id, kind, now)
	return nil
}

// memorySize reads the value of -m, which is MiB unless it says otherwise, and rounds it as QEMU does.
func memorySize(m string) (uint64, error) {
	text := m
	for _, f := range strings.Split(m, ",") {
		if v, ok := strings.CutPrefix(f, "size="); ok {
			text = v
		} else if !strings.Contains(f, "=") {
			text = f
		}
	}
	unit, digits := uint64(1<<20), text
	if n := len(text); n > 0 {
		if shift := strings.IndexByte("bkmgtpe", text[n-1]|0x20); shift >= 0 {
			unit, digits = 1<<(10*shift), text[:n-1]
		}
	}
	n, err := strconv.ParseFloat(digits, 64)
	if err != nil || !(n > 0) || n*float64(unit) > math.MaxInt64/2 {
		return 0, fmt.Errorf("-m %s: %q is no size; write it like 1G", m, text)
	}
	const page = 8192
	return (uint64(n*float64(unit)) + page - 1) / page * page, nil
}

// qemuCommand is a command line of QEMU's, as far as it concerns us.
type qemuCommand struct {
	args []string // all of it, a copy
	opts []qemuOption
}

// qemuOption is an option without its dashes, and where its value is in args, 0 if it has none.
type qemuOption struct {
	name string
	at   int
}

// bare are QEMU's options that have no value.
var bare = strings.Fields(`nographic enable-kvm S s nodefaults no-user-config snapshot daemonize no-reboot no-shutdown
	no-acpi no-hpet singlestep preconfig mem-prealloc full-screen h help version only-migratable no-fd-bootchk win2k-hack portrait
	usb curses sdl no-quit alt-grab ctrl-grab old-param semihosting async-teardown enable-sync-profile perfmap jitdump nouserconfig
	no-hpet enable-fips xen-attach xen-domid-restrict show-cursor`)

func scanQEMU(command []string) *qemuCommand {
	g := &qemuCommand{args: slices.Clone(command)}
	first, _ := QEMUProgram(command)
	for i := first + 1; i < len(command); i++ {
		name, dashed := strings.CutPrefix(command[i], "-")
		if !dashed {
			continue // a disk image
		}
		name = strings.TrimPrefix(name, "-")
		if slices.Contains(bare, name) || i+1 == len(command) {
			g.opts = append(g.opts, qemuOption{name, 0})
			continue
		}
		i++
		g.opts = append(g.opts, qemuOption{name, i})
	}
	return g
}

func (g *qemuCommand) has(names ...string) bool {
	return slices.ContainsFunc(g.opts, func(o qemuOption) bool { return slices.Contains(names, o.name) })
}

// values are those of all options of these names.
func (g *qemuCommand) values(names ...string) (values []string) {
	for _, o := range g.opts {
		if o.at > 0 && slices.Contains(names, o.name) {
			values = append(values, g.args[o.at])
		}
	}
	return values
}

// last is the value that counts.
func (g *qemuCommand) last(name string) (string, bool) {
	v := g.values(name)
	if len(v) == 0 {
		return "", false
	}
	return v[len(v)-1], true
}

// remove takes an option with its value out.
func (g *qemuCommand) remove(name string) {
	for i := 0; i < len(g.opts); i++ {
		o := g.opts[i]
		if o.name != name || o.at == 0 {
			continue
		}
		g.args = slices.Delete(g.args, o.at-1, o.at+1)
		g.opts = slices.Delete(g.opts, i, i+1)
		for j := i; j < len(g.opts); j++ {
			if g.opts[j].at > 0 {
				g.opts[j].at -= 2
			}
		}
		i--
	}
}

// machine is the type of machine, empty if none was chosen.
func (g *qemuCommand) machine() (kind string) {
	for _, v := range g.values("machine", "M") {
		if m, ok := parseOption(v, "type").get("type"); ok {
			kind = m
		}
	}
	return kind
}

// kvm says whether the guest surely runs with KVM: not where something else may take its place.
func (g *qemuCommand) kvm() bool {
	if g.has("enable-kvm") {
		return true
	}
	accel := ""
	if v := g.values("accel"); len(v) > 0 {
		accel, _ = parseOption(v[0], "accel").get("accel")
	}
	for _, v := range g.values("machine", "M") {
		if a, ok := parseOption(v, "type").get("accel"); ok {
			accel = a
		}
	}
	return accel == "kvm"
}

// memoryUsed are the ids of the backends that hold the guest's memory.
func (g *qemuCommand) memoryUsed() (ids []string) {
	add := func(values []string, first, key string) {
		for _, v := range values {
			o := parseOption(v, first)
			if kind, _ := o.get("driver"); kind == "nvdimm" || strings.HasPrefix(kind, "ivshmem") {
				continue // not memory that rings are in
			}
			if id, ok := o.get(key); ok && !slices.Contains(ids, id) {
				ids = append(ids, id)
			}
		}
	}
	add(g.values("machine", "M"), "type", "memory-backend")
	add(g.values("numa"), "type", "memdev")
	add(g.values("device"), "driver", "memdev")
	return ids
}

// object finds an object by its id, and the place of its value; nil if there is none.
func (g *qemuCommand) object(id string) (at int, o *optionValue) {
	for _, x := range g.opts {
		if x.name != "object" || x.at == 0 {
			continue
		}
		o := parseOption(g.args[x.at], "qom-type")
		if v, _ := o.get("id"); v == id {
			return x.at, o
		}
	}
	return 0, nil
}

// optionValue is the value of an option: words with commas between, or JSON.
type optionValue struct {
	first string // the name of what stands first without one
	keys  []string
	words map[string]string
	json  map[string]any // nil if it is words
}

func parseOption(s, first string) *optionValue {
	o := &optionValue{first: first, words: map[string]string{}}
	if strings.HasPrefix(s, "{") && json.Unmarshal([]byte(s), &o.json) == nil {
		return o
	}
	const comma = "\x00"
	for i, f := range strings.Split(strings.ReplaceAll(s, ",,", comma), ",") {
		f = strings.ReplaceAll(f, comma, ",")
		k, v, ok := strings.Cut(f, "=")
		switch {
		case !ok && i == 0:
			k, v = first, f
		case !ok:
			v = "on"
		}
		o.set(k, v)
	}
	return o
}

func (o *optionValue) get(key string) (string, bool) {
	if o.json == nil {
		v, ok := o.words[key]
		if ok && (v == "yes" || v == "true") {
			v = "on"
		}
		return v, ok
	}
	switch v := o.json[key].(type) {
	case string:
		return v, true
	case bool:
		if v {
			return "on", true
		}
		return "off", true
	}
	return "", false
}

func (o *optionValue) set(key, value string) {
	if o.json != nil {
		o.json[key] = value
		if value == "on" {
			o.json[key] = true
		}
		return
	}
	if _, ok := o.words[key]; !ok {
		o.keys = append(o.keys, key)
	}
	o.words[key] = value
}

func (o *optionValue) String() string {
	if o.json != nil {
		b, err := json.Marshal(o.json)
		if err != nil {
			panic(err) // it came from JSON
		}
		return string(b)
	}
	var parts []string
	for _, k := range o.keys {
		if k == o.first {
			parts = append([]string{escape(o.words[k])}, parts...)
			continue
		}
		parts = append(parts, k+"="+escape(o.words[k]))
	}
	return strings.Join(parts, ",")
}
