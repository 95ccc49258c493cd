package main

import (
	"errors"
	"flag"
	"fmt"
	"slices"
	"strings"

	"sidewire/engine/handoff"
	"sidewire/engine/vmi"
)

// sriovOptions are the flags of functions of PCI devices.
type sriovOptions struct {
	vfs  list // NETWORK=PCIADDRESS
	bind bool
	// pod is where it is written what a pod was given; tests set it.
	pod handoff.Assignments
}

func (f *sriovOptions) register(fs *flag.FlagSet) {
	fs.Var(&f.vfs, "vf", "`[VMI/]NETWORK=PCIADDRESS`: the virtual function that an sriov network's guest gets, on hosts where no device plugin says it; may be repeated")
	fs.BoolVar(&f.bind, "vfio-bind", false, "bind sriov functions to vfio-pci while they are a guest's, and give them back afterwards (needs root)")
}

// check says what is wrong with the flags' values.
func (f *sriovOptions) check(vms []vmi.VM) error {
	var networks []string
	for _, vm := range vms {
		for _, i := range vm.Interfaces {
			if i.Binding == vmi.SRIOV {
				networks = append(networks, i.Name, vm.Name+"/"+i.Name)
			}
		}
	}
	seen := map[string]bool{}
	for _, v := range f.vfs {
		network, address, _ := strings.Cut(v, "=")
		if _, err := handoff.ParsePCIAddress(address); err != nil || network == "" {
			return badInput("--vf %s: want NETWORK=PCIADDRESS, such as blue=0000:65:00.2", v)
		}
		if !slices.Contains(networks, network) {
			return badInput("--vf %s: no VMI has an sriov interface %s", v, network)
		}
		if seen[network] {
			return badInput("--vf %s: network %s has a function already", v, network)
		}
		seen[network] = true
	}
	if f.bind && len(networks) == 0 {
		return badInput("--vfio-bind: no VMI has an sriov interface")
	}
	return nil
}

// functions finds the function of each sriov interface of the VMs, by
// VMI/INTERFACE.
func (o *options) functions(vms []vmi.VM) (map[string]handoff.Assigned, error) {
	if err := o.sriov.check(vms); err != nil {
		return nil, err
	}
	all := map[string]handoff.Assigned{}
	pod := o.sriov.pod
	for _, vm := range vms {
		pod.Given = map[string]string{}
		var networks []string
		for _, i := range vm.Interfaces {
			if i.Binding != vmi.SRIOV {
				continue
			}
			networks = append(networks, i.Name)
			for _, v := range o.sriov.vfs {
				if network, address, _ := strings.Cut(v, "="); network == i.Name || network == vm.Name+"/"+i.Name {
					pod.Given[i.Name] = address
				}
			}
		}
		if len(networks) == 0 {
			continue
		}
		found, missing, err := pod.Find(networks)
		if err != nil {
			return nil, cannot("sriov interfaces of %s: %w", vm.Name, err)
		}
		for _, i := range vm.Interfaces {
			f, ok := found[i.Name]
			if why := missing[i.Name]; why != nil {
				if f, err = byDefinition(&pod, i, why); err != nil {
					return nil, cannot("interface %q of %s: %w", i.Name, vm.Name, err)
				}
				ok = true
			}
			if ok {
				all[vm.Name+"/"+i.Name] = f
			}
		}
	}
	return all, nil
}

// byDefinition is the function that an interface's definition names, where nothing
// else does; why says that.
func byDefinition(pod *handoff.Assignments, i vmi.Interface, why error) (handoff.Assigned, error) {
	if nad := i.Network.NAD; nad != nil && nad.SRIOV != nil && nad.SRIOV.DeviceID != "" {
		return pod.Give(i.Name, nad.SRIOV.DeviceID, "deviceID of "+nad.Key(), false)
	}
	return handoff.Assigned{}, why
}

// planFunctions finds the functions of a plan's interfaces.
func (p *plan) planFunctions(o *options, vms []vmi.VM) error {
	functions, err := o.functions(vms)
	if err != nil {
		return err
	}
	for _, n := range p.handoffs {
		n.function = functions[n.vm.Name+"/"+n.iface.Name]
	}
	return nil
}

// giveBackFunctions gives back what earlier runs left, but for what this one
// has. That it cannot keeps nobody from starting.
func (s *server) giveBackFunctions(o *options, p *plan) {
	var keep []string
	for _, n := range p.handoffs {
		keep = append(keep, n.function.Address)
	}
	notes, err := handoff.GiveBackSRIOV(o.statePath(), keep)
	for _, n := range notes {
		s.log.Info(n)
	}
	if err != nil {
		s.log.Warn("sriov: " + strings.ReplaceAll(err.Error(), "\n", "; "))
	}
}

// openFunction prepares the function of an interface. It and its physical function's
// link are the host's, so this is done in our own namespace.
func (n *handoffNIC) openFunction(s *server, o *options) (handoff.Device, error) {
	c := sriovConfig(n.iface, n.function)
	c.Bind, c.StateDir = o.sriov.bind, o.statePath()
	c.GuestMemory, c.Launch = n.vm.Memory, n.way == byInheritance
	d, err := handoff.OpenSRIOV(c)
	if err != nil {
		if n.function.From != "" {
			err = fmt.Errorf("%w (named by %s)", err, n.function.From)
		}
		return nil, errors.New(strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	for _, w := range d.Warnings {
		s.log.Warn(w, "interface", n.name())
	}
	return d, nil
}

// sriovConfig is what an interface's definition and policy ask of its function.
func sriovConfig(i vmi.Interface, f handoff.Assigned) handoff.SRIOVConfig {
	c := handoff.SRIOVConfig{Address: f.Address, ByPod: f.ByPod}
	c.MAC = i.MAC
	if pool := i.Network.SRIOV; pool != nil {
		c.MTU = pool.MTU
	}
	if nad := i.Network.NAD; nad != nil && nad.SRIOV != nil {
		d := nad.SRIOV
		c.VLAN, c.VLANQoS, c.VLANProto = &d.VLAN, d.VLANQoS, d.VLANProto
		c.SpoofCheck, c.Trust, c.LinkState = d.SpoofCheck, d.Trust, d.LinkState
		c.MinTxRate, c.MaxTxRate = d.MinTxRate, d.MaxTxRate
		if d.MTU != 0 {
			c.MTU = d.MTU
		}
	}
	return c
}

// function looks up what a shell gives to QEMU: nothing but the address.
func (h *shellHandoff) function(i *vmi.Interface) error {
	functions, err := h.o.functions([]vmi.VM{h.vm})
	if err != nil {
		return err
	}
	f := functions[h.vm.Name+"/"+i.Name]
	h.given[i.Name] = shellDevice{device: handoff.VFIODevice(f.Address)}
	h.note("interface %s: function %s, named by %s; sidewire run checks it, sets it, and binds it with --vfio-bind", i.Name, f.Address, f.From)
	return nil
}

// functionSummary is a function in a few words.
func functionSummary(s handoff.Status) string {
	t := "sriov " + s.Address
	if s.VF != nil && s.Link != "" {
		t += fmt.Sprintf(", virtual function %d of %s", *s.VF, s.Link)
	}
	if s.VLAN != 0 {
		t += fmt.Sprintf(", VLAN %d", s.VLAN)
	}
	t += fmt.Sprintf(" (%s, IOMMU group %s)", s.Driver, s.Group)
	if s.Adopted {
		return t + ", was bound before"
	}
	return t + ", bound by sidewire"
}
