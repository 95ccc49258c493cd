package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

// startGuest boots the guest in QEMU, or where that cannot be had joins one
// without a hypervisor.
func (d *demo) startGuest(kind string) error {
	missing := noQEMU()
	switch {
	case kind == "tap":
	case missing == nil:
		return d.startQEMU(d.init)
	case kind == "qemu":
		return cannot("no guest for QEMU: %s", oneLine(missing))
	default:
		fmt.Fprintf(d.out, "no guest for QEMU (%s): a network namespace joined to the virtqueues is the guest\n", oneLine(missing))
	}
	return d.startTap(d.init)
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// noQEMU says what QEMU lacks to boot a guest.
func noQEMU() error { return errors.Join(enginetest.Have("qemu"), enginetest.Have("kernel")) }

// guestProgram is the guest's init, which is built beside this program. QEMU's
// guest has no libraries.
func guestProgram(kind string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", cannot("%w", err)
	}
	p := filepath.Join(filepath.Dir(self), "sidewire-guest")
	if _, err := os.Stat(p); err != nil {
		return "", cannot("%s is missing: make build puts it beside sidewire", p)
	}
	if kind == "qemu" || kind != "tap" && noQEMU() == nil {
		if err := enginetest.CheckStatic(p); err != nil {
			return "", cannot("%w", err)
		}
	}
	return p, nil
}

// startQEMU boots a distribution's kernel with the arguments that qemu-args
// gives.
func (d *demo) startQEMU(init string) error {
	began := time.Now()
	kernel, initramfs, err := enginetest.BuildGuestImage(d.dir, init)
	if err != nil {
		return cannot("guest image: %w", err)
	}
	cmd := exec.CommandContext(d.ctx, "/proc/self/exe", append([]string{"qemu-args"}, d.flags()...)...)
	var notes bytes.Buffer
	cmd.Stderr = &notes
	args, err := cmd.Output()
	if err != nil {
		return cannot("qemu-args: %w: %s", err, notes.Bytes())
	}
	for _, l := range strings.Split(strings.TrimSpace(notes.String()), "\n") {
		if strings.Contains(l, "vectors") {
			fmt.Fprintln(d.out, "         "+l)
		}
	}
	vm, err := enginetest.StartGuest(enginetest.GuestOptions{
		Kernel: kernel, Initramfs: initramfs, Args: strings.Split(strings.TrimSpace(string(args)), "\n"),
		Memory: -1, CPUs: -1, Machine: "q35",
	})
	if err != nil {
		return cannot("%w", err)
	}
	d.onClose(vm.Stop)
	d.agent = vm.Agent
	d.say(time.Since(began), "QEMU", "guest with %s is up", filepath.Base(kernel))
	return nil
}

// startTap joins a namespace to the virtqueues and runs the guest's program in
// it.
func (d *demo) startTap(init string) error {
	began := time.Now()
	ns, err := enginetest.CreateNetNS(fmt.Sprintf("swdemo-%d-vm", os.Getpid()))
	if err != nil {
		return cannot("%w", err)
	}
	d.onClose(func() { _ = ns.Close() })
	tap, err := vhosttest.StartTapGuest(vhosttest.TapOptions{
		Options: vhosttest.Options{Path: filepath.Join(d.dir, "demo", "red.sock"), QueuePairs: 2}, NetNS: ns.Path,
	})
	if err != nil {
		return cannot("guest without a hypervisor: %w", err)
	}
	d.onClose(func() { _ = tap.Close() })
	agent, stop, err := agentIn(ns, init, d.dir)
	if err != nil {
		return cannot("guest without a hypervisor: %w", err)
	}
	d.onClose(stop)
	d.agent, d.tap = agent, true
	d.say(time.Since(began), "guest", "a namespace joined to the virtqueues is up")
	return nil
}

// agentIn runs the guest's program in a namespace, with a resolv.conf of its
// own.
func agentIn(ns *enginetest.NetNS, program, dir string) (*enginetest.Agent, func(), error) {
	resolv := filepath.Join(dir, "guest-resolv.conf")
	if err := os.WriteFile(resolv, nil, 0o644); err != nil {
		return nil, nil, err
	}
	cmd := ns.Command("unshare", "-m", "sh", "-c",
		`mount --bind "$1" "$(readlink -f /etc/resolv.conf)" && exec "$2" -stdio`, "sh", resolv, program)
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	agent := enginetest.NewAgent(struct {
		io.Reader
		io.Writer
	}{out, in})
	stop := func() {
		_ = in.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	if err := agent.WaitBoot(1, 10*time.Second); err != nil {
		stop()
		return nil, nil, err
	}
	return agent, stop, nil
}

// logBuffer keeps what a process prints.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

// String is what was printed so far.
func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
