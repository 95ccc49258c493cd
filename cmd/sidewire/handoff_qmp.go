package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sidewire/engine/handoff"
	"sidewire/engine/vmi"
)

const (
	// monitorRetry is how often a monitor is looked for that is not there.
	monitorRetry = 250 * time.Millisecond
	// unplugPatience is what a guest gets to let go of its device at our end.
	unplugPatience = 5 * time.Second
)

// giveByMonitor hands the devices to the QEMU that runs already: at once if its
// monitor is there, else when it comes, and again to each QEMU that comes after it.
func (s *server) giveByMonitor(ctx context.Context, o *options, vm vmi.VM) error {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	given, err := s.giveOnce(ctx, o, vm)
	switch {
	case err == nil, errors.Is(err, errUntold):
	case noMonitor(err):
		s.log.Info("waiting for QEMU's monitor", "qmp", o.handoff.qmp)
	default:
		cancel()
		return errors.Join(machineError{fmt.Errorf("--qmp %s: %w", o.handoff.qmp, err)}, s.takeByMonitor(o, vm))
	}
	go func() {
		defer close(done)
		if !errors.Is(err, errUntold) {
			s.followMonitor(ctx, o, vm, given)
		}
	}()
	s.onStop(func() error {
		cancel()
		<-done
		return s.takeByMonitor(o, vm)
	})
	return nil
}

// noMonitor says whether an error is that no QEMU listens.
func noMonitor(err error) bool {
	return errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED)
}

// errUntold is that a QEMU has its devices, and that nobody will know when it ends.
var errUntold = errors.New("the kernel does not tell when this QEMU ends")

// qemuProcess is QMP.Peer, for tests.
var qemuProcess = (*handoff.QMP).Peer

// followMonitor gives the devices to each QEMU that appears.
func (s *server) followMonitor(ctx context.Context, o *options, vm vmi.VM, given *os.File) {
	said := ""
	for {
		if given != nil {
			if !qemuEnded(ctx, given) {
				return
			}
			s.log.Info("QEMU has ended", "qmp", o.handoff.qmp)
			for _, n := range s.handoffs {
				n.setState(prepared)
			}
		}
		t := time.NewTimer(monitorRetry)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		var err error
		given, err = s.giveOnce(ctx, o, vm)
		if errors.Is(err, errUntold) {
			return
		}
		if err != nil && !noMonitor(err) && err.Error() != said {
			said = err.Error()
			s.log.Error("not handed over", "qmp", o.handoff.qmp, "err", err)
		}
	}
}

// qemuEnded waits until QEMU has; it says no if ctx was first.
func qemuEnded(ctx context.Context, qemu *os.File) bool {
	stop := context.AfterFunc(ctx, func() { qemu.Close() })
	defer stop()
	defer qemu.Close()
	raw, err := qemu.SyscallConn()
	if err != nil {
		return false
	}
	err = raw.Read(func(fd uintptr) bool {
		n, _ := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return n > 0
	})
	return err == nil && ctx.Err() == nil
}

// giveOnce hands over what QEMU has not got, and returns its process.
func (s *server) giveOnce(ctx context.Context, o *options, vm vmi.VM) (*os.File, error) {
	q, err := handoff.DialQMP(ctx, o.handoff.qmp)
	if err != nil {
		return nil, err
	}
	done := func() { q.Close() }
	defer func() { done() }()
	for _, n := range s.handoffs {
		if err := n.giveTo(q, o, vm); err != nil {
			n.setState(err.Error())
			return nil, fmt.Errorf("%s: %w", n.name(), err)
		}
		n.setState(handed)
		s.log.Info("handed over", "interface", n.name(), "qmp", o.handoff.qmp)
	}
	qemu := qemuProcess(q)
	if o.handoff.announce {
		done = func() {} // the monitor is the announcement's from here on
		go func() {
			defer q.Close()
			if err := announceAll(ctx, q, s.handoffs); err != nil && ctx.Err() == nil {
				s.log.Error("guest is not announced", "err", err)
			}
		}()
	}
	if qemu < 0 {
		s.log.Warn("the kernel does not tell when this QEMU ends, as it is in another PID namespace: one that is started after it is not given anything", "qmp", o.handoff.qmp)
		return nil, errUntold
	}
	return os.NewFile(uintptr(qemu), "qemu"), nil
}

// giveTo hands over one device. One that QEMU has from us, or from a run of ours
// that crashed if it is the same still, is left to it.
func (n *handoffNIC) giveTo(q *handoff.QMP, o *options, vm vmi.VM) error {
	has, err := q.Has(n.iface.DeviceID())
	if err != nil {
		return err
	}
	if has && (n.device.Status().Kept || n.given()) {
		return nil
	}
	if has {
		if err := q.Detach(n.netdevID(), n.iface.DeviceID(), unplugPatience); err != nil {
			return fmt.Errorf("QEMU has a device %s already: %w", n.iface.DeviceID(), err)
		}
	}
	files, err := n.handOver()
	if err != nil {
		return err
	}
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	names := handoff.FDNames(n.iface.Name, len(files))
	netdev, device, err := n.arguments(o, vm, names)
	if err != nil {
		return err
	}
	return q.Attach(files, names, netdev, device)
}

// arguments are the values of -netdev and -device that a QEMU would have been
// started with.
func (n *handoffNIC) arguments(o *options, vm vmi.VM, names []string) (netdev, device string, err error) {
	only := []*handoffNIC{n}
	vm = handoffVM(vm, only)
	vm.Interfaces = slices.DeleteFunc(vm.Interfaces, func(i vmi.Interface) bool { return i.Name != n.iface.Name })
	args, _, err := vmi.QEMUArgs(vm, vmi.QEMUOptions{
		SocketDir: o.socketDir, MTU: handoffMTU(o, vm, only), KVM: true,
		Handoff: handoffOf(only, map[string][]string{n.iface.Name: names}),
	})
	if err != nil {
		return "", "", inputError{err}
	}
	for i := 0; i+1 < len(args); i += 2 {
		switch args[i] {
		case "-netdev":
			netdev = args[i+1]
		case "-device": // the last is the NIC; buses come before it
			device = args[i+1]
		}
	}
	return netdev, device, nil
}

// takeByMonitor takes the devices from QEMU before they go.
func (s *server) takeByMonitor(o *options, vm vmi.VM) error {
	q, err := handoff.DialQMP(context.Background(), o.handoff.qmp)
	if err != nil {
		return nil // QEMU has ended, and they are free
	}
	defer q.Close()
	for _, n := range s.handoffs {
		if !n.given() {
			continue
		}
		if err := q.Detach(n.netdevID(), n.iface.DeviceID(), unplugPatience); err != nil {
			s.log.Warn("the guest keeps a NIC whose device goes", "interface", n.name(), "err", err)
			return nil // the monitor's stream is not to be trusted any more
		}
	}
	return nil
}

// announceAll waits until the guest runs and has it tell the network where it is.
func announceAll(ctx context.Context, q *handoff.QMP, nics []*handoffNIC) error {
	t := time.NewTicker(monitorRetry)
	defer t.Stop()
	for {
		running, _, err := q.Running()
		if err != nil {
			return err
		}
		if running {
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
		}
	}
	for _, n := range nics {
		if n.iface.Binding == vmi.SRIOV {
			continue // QEMU has no part in that
		}
		if err := q.Announce(n.iface.DeviceID()); err != nil {
			return err
		}
	}
	return nil
}
