package main

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"sidewire/engine/handoff"
	"sidewire/engine/uplink"
	"sidewire/engine/vmi"
)

// shellHandoff is what qemu-args says of devices: descriptors that a shell
// opens, and how. It changes nothing.
type shellHandoff struct {
	o     *options
	vm    vmi.VM // with what only the devices know
	next  int    // descriptor
	notes []string
	given map[string]shellDevice // by interface
}

type shellDevice struct {
	netdev string
	device []string
	mtu    int // 0 if it is not known yet
}

func (h *shellHandoff) note(format string, args ...any) {
	h.notes = append(h.notes, fmt.Sprintf(format, args...))
}

// plan looks the devices up.
func (h *shellHandoff) plan() error {
	h.given = map[string]shellDevice{}
	h.vm.Interfaces = slices.Clone(h.vm.Interfaces)
	for j := range h.vm.Interfaces {
		i := &h.vm.Interfaces[j]
		switch {
		case !handedOver(*i):
		case h.o.handoff.qmp != "":
			h.given[i.Name] = shellDevice{}
			h.note("interface %s is not among these: QEMU gets it over --qmp %s when it runs; on q35 it needs a free port for that, such as -device pcie-root-port,id=spare,chassis=99", i.Name, h.o.handoff.qmp)
		case i.Binding == vmi.Macvtap:
			if err := h.macvtap(i); err != nil {
				return fmt.Errorf("interface %q: %w", i.Name, err)
			}
		default:
			if err := h.function(i); err != nil {
				return err
			}
		}
	}
	return nil
}

func (h *shellHandoff) macvtap(i *vmi.Interface) error {
	c := macvtapConfig(h.o, h.vm, *i, i.QueuePairs)
	var m *handoff.Macvtap
	err := uplink.InNetNS(netnsOf(h.o, h.vm), func() (err error) {
		m, err = handoff.FindMacvtap(c)
		return err
	})
	if err != nil {
		return handoffError(err)
	}
	st := m.Status()
	if i.MAC, err = net.ParseMAC(st.MAC); err != nil {
		i.MAC = nil
	}
	var fds []string
	for range i.QueuePairs {
		fds = append(fds, strconv.Itoa(h.next))
		h.next++
	}
	h.given[i.Name] = shellDevice{netdev: m.Netdev(fds, i.NetdevID()), mtu: st.MTU}
	h.explain(i.Name, st, fds)
	return nil
}

// explain says what the shell has to do.
func (h *shellHandoff) explain(name string, st handoff.Status, fds []string) {
	node := st.Node
	switch {
	case node == "":
		node = "/dev/tap$(cat /sys/class/net/" + st.Link + "/ifindex)"
		h.note("interface %s: its macvtap %s is not there yet: start sidewire run, and ask again", name, st.Link)
	case st.Device != "":
		node = "/run/" + st.Link
		h.note("interface %s: %s is not this macvtap: make a node of it with: mknod %s c %s", name, st.Node, node, strings.Replace(st.Device, ":", " ", 1))
	}
	var open []string
	for _, fd := range fds {
		open = append(open, fd+"<>"+node)
	}
	h.note("interface %s: QEMU inherits its macvtap; in the shell that starts it: exec %s", name, strings.Join(open, " "))
}

// handoff is what the arguments have in place of a port.
func (h *shellHandoff) handoff(i vmi.Interface) (netdev string, device []string, ok bool) {
	d, ok := h.given[i.Name]
	return d.netdev, d.device, ok
}

// mtu is what the guest is told.
func (h *shellHandoff) mtu(i vmi.Interface) int {
	if d, ok := h.given[i.Name]; ok {
		return d.mtu
	}
	return linkMTU(h.o, h.vm, i)
}
