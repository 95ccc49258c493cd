package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/vishvananda/netlink"

	"sidewire/engine/uplink"
	"sidewire/engine/vmi"
)

// qemuArgsCommand prints the arguments that a QEMU needs to use our ports.
func qemuArgsCommand(ctx context.Context, args []string, out, errw io.Writer) error {
	var o options
	fs := newFlags("qemu-args", errw)
	o.register(fs)
	fs.StringVar(&o.qemu, "qemu", "qemu-system-x86_64", "QEMU `BINARY` to ask for its version")
	fs.BoolVar(&o.kvm, "kvm", false, "QEMU will run with KVM")
	if err := parse(fs, args); err != nil {
		return err
	}
	if err := o.check(); err != nil {
		return err
	}
	vms, err := load(&o, errw, nil)
	if err != nil {
		return err
	}
	if len(vms) != 1 {
		return badInput("%d VMIs given: the arguments are those of one QEMU, so name one", len(vms))
	}
	if ns := netnsOf(&o, vms[0]); ns != "" {
		if _, err := os.Stat(ns); err != nil {
			return cannot("network namespace: %w; name the pod's with --netns", err)
		}
	}
	if err := adoptLinks(&o, vms); err != nil {
		return err
	}
	version, err := vmi.AskQEMUVersion(ctx, o.qemu)
	if err != nil {
		fmt.Fprintf(errw, "warning: %v: taking it for an old one; name yours with --qemu\n", err)
	}
	shell := shellHandoff{o: &o, vm: vms[0], next: firstExtra}
	if err := shell.plan(); err != nil {
		return err
	}
	for _, n := range shell.notes {
		fmt.Fprintln(errw, "note:", n)
	}
	lines, notes, err := vmi.QEMUArgs(shell.vm, vmi.QEMUOptions{
		SocketDir: o.socketDir,
		MTU:       shell.mtu,
		Version:   version,
		KVM:       o.kvm,
		Client:    o.mode == "client",
		Packed:    o.packed,
		Handoff:   shell.handoff,
	})
	if err != nil {
		return inputError{err}
	}
	for _, n := range notes {
		fmt.Fprintln(errw, "note:", n)
	}
	for _, l := range lines {
		fmt.Fprintln(out, l)
	}
	return nil
}

// linkMTU is the MTU of an interface's network, 0 if it cannot be seen from
// here.
func linkMTU(o *options, vm vmi.VM, i vmi.Interface) (mtu int) {
	if onSockets(o, i) {
		return userMTU(o, netnsOf(o, vm), o.uplinkOf(i.Name), i.Binding == vmi.Slirp)
	}
	if name, v, err := podLink(o, vm, i); err != nil || name != "" {
		if err != nil {
			return 0
		}
		return v.MTU
	}
	names := []string{o.uplinkOf(i.Name)}
	if nad := i.Network.NAD; nad != nil && nad.Switch != nil {
		if nad.Switch.MTU != 0 {
			return nad.Switch.MTU
		}
		if names = o.lanUplinks(i); len(names) == 0 {
			cni, err := cniLink(netnsOf(o, vm), i.Network)
			if err != nil {
				return 0
			}
			if cni == "" {
				return defaultMTU
			}
			names = []string{cni}
		}
	}
	_ = uplink.InNetNS(netnsOf(o, vm), func() error {
		for _, name := range names {
			if l, err := netlink.LinkByName(name); err == nil && (mtu == 0 || l.Attrs().MTU < mtu) {
				mtu = l.Attrs().MTU
			}
		}
		return nil
	})
	return mtu
}

// netnsOf is the namespace of a VM: its own (FILE@NETNS) or the run's.
func netnsOf(o *options, vm vmi.VM) string {
	if vm.NetNS != "" {
		return vm.NetNS
	}
	return o.netns
}
