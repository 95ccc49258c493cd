package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"

	"sidewire/engine/handoff"
	"sidewire/engine/uplink"
	"sidewire/engine/vmi"
)

// handoffOptions are the flags of devices that are handed over, and of who gets
// them.
type handoffOptions struct {
	command     []string // the QEMU that run starts, nil for none
	qmp         string   // monitor of the QEMU that runs already
	announce    bool
	macvtapVeth bool
}

func (h *handoffOptions) register(fs *flag.FlagSet) {
	fs.StringVar(&h.qmp, "qmp", "", "monitor `SOCKET` of the running QEMU that gets what is handed over (macvtap, sriov)")
	fs.BoolVar(&h.announce, "announce", false, "have guests announce their addresses once they run with what was handed over, as after a migration")
	fs.BoolVar(&h.macvtapVeth, "macvtap-veth", false, "make macvtaps on veth links too where DP_MACVTAP_CONF chooses none")
}

// check says what does not go together.
func (h *handoffOptions) check(vms []vmi.VM) error {
	switch {
	case h.command != nil && len(vms) != 1:
		return badInput("%d VMIs given: -- starts one QEMU, which is one VMI's; run a sidewire for each", len(vms))
	case h.command != nil && h.qmp != "":
		return badInput("--qmp is for a QEMU that runs already; leave it out where sidewire starts one")
	case h.command != nil:
		return checkCommand(vms[0], h.command)
	case h.qmp != "" && len(vms) != 1:
		return badInput("%d VMIs given: --qmp %s is one QEMU, which is one VMI's; run a sidewire for each", len(vms), h.qmp)
	case h.qmp != "" && !slices.ContainsFunc(vms[0].Interfaces, handedOver):
		return badInput("--qmp %s: no interface of the VMI is handed over: that is for macvtap and sriov", h.qmp)
	case h.announce && h.command == nil && h.qmp == "":
		return badInput("--announce needs QEMU's monitor: name it with --qmp SOCKET, or let sidewire start QEMU (-- qemu-system-x86_64 ...)")
	}
	return nil
}

// handedOver says whether an interface's guest gets a device of the kernel's.
func handedOver(i vmi.Interface) bool { return i.Binding == vmi.Macvtap || i.Binding == vmi.SRIOV }

// HandoffStatus is a device that was handed over, and how.
type HandoffStatus struct {
	handoff.Status
	NetNS string `json:"netns,omitempty"`
	Way   string `json:"way"`   // inherited, monitor or arguments
	State string `json:"state"` // prepared, or handed over, or why not
}

// How a device gets to QEMU.
const (
	byInheritance = "inherited"
	byMonitor     = "monitor"
	byArguments   = "arguments"

	prepared = "prepared"
	handed   = "handed over"
)

// handoffNIC is an interface whose guest has a device of the kernel's: none of
// its frames come by us.
type handoffNIC struct {
	nic
	queues int // of the device; the nic has none for our workers
	netns  string
	way    string
	device handoff.Device
	// function is what an sriov interface was given.
	function handoff.Assigned

	mu    sync.Mutex // guards state
	state string
}

func (p *plan) addHandoff(o *options, n nic) {
	h := &handoffNIC{nic: n, queues: n.iface.QueuePairs, netns: netnsOf(o, n.vm), way: o.handoff.way(), state: prepared}
	h.iface.QueuePairs, h.socket = 0, ""
	if n.iface.Binding == vmi.SRIOV {
		h.netns, h.queues = "", 0 // it is the host's, and its queues are the guest's driver's
	}
	p.handoffs = append(p.handoffs, h)
	p.all = append(p.all, h)
}

func (h *handoffOptions) way() string {
	switch {
	case h.command != nil:
		return byInheritance
	case h.qmp != "":
		return byMonitor
	}
	return byArguments
}

// open prepares the device; it is given back when the server stops.
func (n *handoffNIC) open(s *server, o *options) error {
	err := uplink.InNetNS(n.netns, func() (err error) {
		switch n.iface.Binding {
		case vmi.Macvtap:
			n.device, err = handoff.OpenMacvtap(macvtapConfig(o, n.vm, n.iface, n.queues))
		case vmi.SRIOV:
			n.device, err = n.openFunction(s, o)
		}
		return err
	})
	if err != nil {
		n.device = nil
		return handoffError(err)
	}
	s.onStop(func() error { return uplink.InNetNS(n.netns, n.device.Close) })
	if n.way == byArguments {
		if err := uplink.InNetNS(n.netns, n.device.Up); err != nil {
			return handoffError(err)
		}
	}
	st := n.device.Status()
	if st.Limits != "" {
		s.log.Warn(st.Limits, "interface", n.name())
	}
	s.log.Info("device is ready to be handed over", "interface", n.name(), "kind", st.Kind, "link", st.Link, "adopted", st.Adopted, "way", n.way)
	return nil
}

// handoffError says how to mend what the host refused.
func handoffError(err error) error {
	if errors.Is(err, handoff.ErrPrivilege) || errors.Is(err, uplink.ErrPrivilege) {
		return machineError{fmt.Errorf("%w: run as root or grant it with: setcap cap_net_admin,cap_sys_admin,cap_mknod+ep sidewire", err)}
	}
	return machineError{err}
}

// macvtapConfig is the macvtap that an interface asks for.
func macvtapConfig(o *options, vm vmi.VM, i vmi.Interface, queues int) handoff.MacvtapConfig {
	w := i.Network
	c := handoff.MacvtapConfig{
		Name: macvtapName(vm, i.Name), MAC: i.MAC, DefaultMAC: vm.StableMAC(i.Name), Queues: queues, Veth: o.handoff.macvtapVeth,
	}
	if w.NAD != nil && w.NAD.Macvtap != nil {
		m := w.NAD.Macvtap
		if c.MAC == nil {
			c.MAC = m.MAC
		}
		c.MTU, c.Promisc = m.MTU, m.Promisc
		c.Adopt = append(c.Adopt, m.DeviceID)
	}
	c.Adopt = slices.DeleteFunc(append(c.Adopt, w.Link, w.Ordinal), func(s string) bool { return s == "" })
	if p := w.Macvtap; p != nil {
		c.Lower, c.Mode, c.Pool, c.Capacity, c.Exposed = p.LowerDevice, p.Mode, p.Name, p.Capacity, p.Any
	}
	if w.NAD != nil {
		if links := o.lanUplinks(i); len(links) > 0 {
			c.Lower, c.Exposed = links[0], false
		}
	}
	return c
}

// macvtapName is the name of a macvtap that we make: the same for the same
// interface, so that a run after a crash knows it.
func macvtapName(vm vmi.VM, iface string) string {
	sum := sha256.Sum256([]byte(vm.Namespace + "/" + vm.Name + "/" + iface))
	return "swt" + hex.EncodeToString(sum[:6])
}

// handOver opens the device for QEMU and lets it speak.
func (n *handoffNIC) handOver() (files []*os.File, err error) {
	err = uplink.InNetNS(n.netns, func() (err error) {
		if err := n.device.Up(); err != nil {
			return err
		}
		files, err = n.device.Open()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", n.name(), handoffError(err))
	}
	return files, nil
}

func (n *handoffNIC) setState(state string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.state = state
}

// given says whether a QEMU has the device.
func (n *handoffNIC) given() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.state == handed
}

// netdevID is the id of what QEMU has for the device beside it, empty for nothing.
func (n *handoffNIC) netdevID() string {
	if n.iface.Binding == vmi.SRIOV {
		return ""
	}
	return n.iface.NetdevID()
}

// status implements served.
func (n *handoffNIC) status(*server) InterfaceStatus {
	d := n.device.Status()
	n.mu.Lock()
	defer n.mu.Unlock()
	st := InterfaceStatus{
		Name: n.name(), Binding: string(n.iface.Binding), Path: "kernel", Model: n.iface.Model, MAC: d.MAC, MTU: d.MTU, QueueCount: n.queues,
		LinkState: "down", Handoff: &HandoffStatus{Status: d, NetNS: n.netns, Way: n.way, State: n.state},
	}
	if n.state == handed || n.way == byArguments {
		st.LinkState = "up"
	}
	return st
}

// forwards implements served: what is sent to the guest gets there.
func (n *handoffNIC) forwards() []forwardRequest { return []forwardRequest{} }

// summary is the device in one line.
func (h *HandoffStatus) summary() string {
	if h.Address != "" {
		return fmt.Sprintf("%s; %s (%s)", functionSummary(h.Status), h.State, h.Way)
	}
	var b strings.Builder
	b.WriteString(h.Kind)
	if h.Link != "" {
		fmt.Fprintf(&b, " %s (%s, %s)", h.Link, h.Mode, h.Node)
	}
	if h.Lower != "" {
		fmt.Fprintf(&b, " on %s", h.Lower)
	}
	if h.NetNS != "" {
		fmt.Fprintf(&b, " in %s", h.NetNS)
	}
	if h.Adopted {
		b.WriteString(", was there before")
	} else {
		b.WriteString(", made by sidewire")
	}
	fmt.Fprintf(&b, "; %s (%s)", h.State, h.Way)
	return b.String()
}

// handoffOf gives QEMU the devices under the names that fds has for them, and
// whatever else fds knows of an interface.
func handoffOf(nics []*handoffNIC, fds map[string][]string) func(vmi.Interface) (string, []string, bool) {
	return func(i vmi.Interface) (string, []string, bool) {
		for _, n := range nics {
			if n.iface.Name == i.Name {
				return n.device.Netdev(fds[i.Name], i.NetdevID()), n.device.Properties(), true
			}
		}
		return "", nil, false
	}
}

// handoffVM is the VM with what only the devices know.
func handoffVM(vm vmi.VM, nics []*handoffNIC) vmi.VM {
	vm.Interfaces = slices.Clone(vm.Interfaces)
	for j := range vm.Interfaces {
		for _, n := range nics {
			if i := &vm.Interfaces[j]; n.iface.Name == i.Name {
				if mac, err := net.ParseMAC(n.device.Status().MAC); err == nil {
					i.MAC = mac
				}
			}
		}
	}
	return vm
}

// handoffMTU is the MTU that a guest is told: the device's, or that of our port.
func handoffMTU(o *options, vm vmi.VM, nics []*handoffNIC) func(vmi.Interface) int {
	return func(i vmi.Interface) int {
		for _, n := range nics {
			if n.iface.Name == i.Name {
				return n.device.Status().MTU
			}
		}
		return linkMTU(o, vm, i)
	}
}
