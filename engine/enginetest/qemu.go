package enginetest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// BuildGuest builds the guest's agent into dir and returns the program's path.
// It needs the go command and this module's source.
func BuildGuest(dir string) (string, error) {
	out := filepath.Join(dir, "sidewire-guest")
	cmd := exec.Command("go", "build", "-ldflags=-s -w", "-o", out, "sidewire/cmd/sidewire-guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
	if b, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the guest's agent: %w: %s", err, bytes.TrimSpace(b))
	}
	return out, nil
}

// BuildGuestImage finds a kernel and makes an initramfs for it in dir, with
// the program init, or with the agent built from source if init is "".
func BuildGuestImage(dir, init string) (kernel, initramfs string, err error) {
	kernel, modules, err := GuestKernel()
	if err != nil {
		return "", "", err
	}
	if init == "" {
		if init, err = BuildGuest(dir); err != nil {
			return "", "", err
		}
	}
	initramfs = filepath.Join(dir, "initramfs.cpio")
	f, err := os.Create(initramfs)
	if err != nil {
		return "", "", err
	}
	err = BuildInitramfs(f, Initramfs{Init: init, Modules: modules})
	return kernel, initramfs, errors.Join(err, f.Close())
}

// GuestOptions say how QEMU is started. Zero values are sensible but for
// Kernel and Initramfs.
type GuestOptions struct {
	Kernel, Initramfs string
	// Args are further arguments of QEMU, network devices above all. QEMU
	// starts without any device of its own.
	Args []string
	// Append is added to the kernel's command line.
	Append string
	// Machine is q35, pc (the default, which boots faster) or what QEMU has.
	Machine string
	// Memory is in MiB, 256 unless said otherwise; -1: Args say it.
	Memory int
	// Shared puts the memory into a memfd that a vhost-user backend can map.
	Shared bool
	CPUs   int    // 1 unless said otherwise; -1: Args say it
	KVM    bool   // instead of TCG
	NetNS  string // path of the namespace to start QEMU in
	QEMU   string // the program, qemu-system-x86_64 unless said otherwise
	// Log gets the guest's console and QEMU's messages as they come.
	Log io.Writer
	// NoReboot makes QEMU end where the guest would reboot.
	NoReboot bool
	// BootTimeout is how long the agent may take to appear, 60 s unless said
	// otherwise; negative: do not wait for one.
	BootTimeout time.Duration
}

// VM is a running QEMU. Its methods are safe for concurrent use.
type VM struct {
	*Agent      // in the guest
	QMP    *QMP // QEMU's monitor

	cmd     *exec.Cmd
	console tail
	files   []*os.File
	readers sync.WaitGroup
	exited  chan struct{} // closed when QEMU is gone
	status  error         // how it ended, valid then
}

// StartGuest starts QEMU and waits until the agent in the guest is ready. The
// caller stops it. Where QEMU or the guest failed, the error ends with the
// last lines of the console.
func StartGuest(o GuestOptions) (*VM, error) {
	args := []string{"-kernel", o.Kernel, "-initrd", o.Initramfs, "-append",
		strings.TrimSpace("console=ttyS0 quiet panic=-1 tsc=reliable no_timer_check nokaslr mitigations=off " + o.Append)}
	vm, err := startQEMU(o, args)
	if err != nil || o.BootTimeout < 0 {
		return vm, err
	}
	if o.BootTimeout == 0 {
		o.BootTimeout = 60 * time.Second
	}
	if err := vm.WaitBoot(1, o.BootTimeout); err != nil {
		vm.Stop()
		return nil, vm.explain(err)
	}
	return vm, nil
}

// startQEMU starts QEMU with what all guests have in common: console on the
// first serial port, agent on the second, monitor on a socket of its own.
func startQEMU(o GuestOptions, args []string) (*VM, error) {
	vm := &VM{exited: make(chan struct{})}
	var theirs [3]*os.File
	defer func() {
		for _, f := range theirs {
			if f != nil {
				f.Close()
			}
		}
	}()
	for i := range theirs {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			vm.close()
			return nil, fmt.Errorf("start QEMU: %w", err)
		}
		vm.files = append(vm.files, os.NewFile(uintptr(fds[0]), "qemu"))
		theirs[i] = os.NewFile(uintptr(fds[1]), "qemu")
	}
	name, all := o.command(args)
	vm.cmd = exec.Command(name, all...)
	vm.cmd.ExtraFiles = theirs[:]
	// A group of its own, so that ^C reaches us alone; and it must not outlive us.
	vm.cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	vm.console.also = o.Log
	vm.cmd.Stdout, vm.cmd.Stderr = &vm.console, &vm.console
	started := make(chan error)
	go vm.run(started)
	if err := <-started; err != nil {
		vm.close()
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	vm.Agent = NewAgent(vm.files[1])
	vm.QMP = newQMP(vm.files[2])
	return vm, nil
}

// run starts QEMU and waits for its end, on a thread that stays: the death of
// the thread that started it, not of the process, is what Pdeathsig means.
func (vm *VM) run(started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := vm.cmd.Start(); err != nil {
		started <- err
		return
	}
	vm.readers.Go(func() { _, _ = io.Copy(&vm.console, vm.files[0]) }) // ends with QEMU
	started <- nil
	vm.status = vm.cmd.Wait()
	vm.readers.Wait()
	close(vm.exited)
}

// command returns the program to run and its arguments. The descriptors that
// it names are those of ExtraFiles.
func (o *GuestOptions) command(args []string) (string, []string) {
	def := func(s, d string) string {
		if s == "" {
			return d
		}
		return s
	}
	accel := "accel=tcg"
	if o.KVM {
		accel = "accel=kvm"
	}
	all := []string{
		"-machine", def(o.Machine, "pc") + "," + accel, "-cpu", "max",
		"-nodefaults", "-no-user-config", "-display", "none",
		"-chardev", "socket,id=console,fd=3", "-serial", "chardev:console",
		"-chardev", "socket,id=agent,fd=4", "-serial", "chardev:agent",
		"-chardev", "socket,id=qmp,fd=5", "-mon", "chardev=qmp,mode=control",
	}
	if o.Memory >= 0 {
		m := strconv.Itoa(o.Memory)
		if o.Memory == 0 {
			m = "256"
		}
		all = append(all, "-m", m)
		if o.Shared {
			all = append(all, "-object", "memory-backend-memfd,id=guestmem,share=on,size="+m+"M", "-numa", "node,memdev=guestmem")
		}
	}
	if o.CPUs > 0 {
		all = append(all, "-smp", strconv.Itoa(o.CPUs))
	}
	if o.NoReboot {
		all = append(all, "-no-reboot")
	}
	all = append(append(all, args...), o.Args...)
	name := def(o.QEMU, "qemu-system-x86_64")
	if o.NetNS != "" {
		return "nsenter", append([]string{"--net=" + o.NetNS, "--", name}, all...)
	}
	return name, all
}

// Console returns the end of what the guest's console and QEMU have printed.
func (vm *VM) Console() string { return vm.console.String() }

// WaitConsole waits until the console has printed text.
func (vm *VM) WaitConsole(text string, timeout time.Duration) error {
	if Wait(timeout, func() bool {
		select {
		case <-vm.exited:
			return true
		default:
			return strings.Contains(vm.Console(), text)
		}
	}) && strings.Contains(vm.Console(), text) {
		return nil
	}
	return vm.explain(fmt.Errorf("the console did not print %q within %v", text, timeout))
}

// PID is QEMU's process.
func (vm *VM) PID() int { return vm.cmd.Process.Pid }

// Exited is closed when QEMU has ended, however that came.
func (vm *VM) Exited() <-chan struct{} { return vm.exited }

// explain adds what is known about a failure.
func (vm *VM) explain(err error) error {
	select {
	case <-vm.exited:
		err = fmt.Errorf("%w; QEMU has ended: %v", err, vm.status)
	default:
	}
	lines := strings.Split(strings.TrimSpace(vm.Console()), "\n")
	return fmt.Errorf("%w; console:\n%s", err, strings.Join(lines[max(0, len(lines)-30):], "\n"))
}

// Stop ends QEMU and waits for its end. It may be called again.
func (vm *VM) Stop() {
	_ = vm.cmd.Process.Kill() // may be gone already
	<-vm.exited
	vm.close()
}

func (vm *VM) close() {
	for _, f := range vm.files {
		f.Close()
	}
}

// Reboot has the guest reboot and waits until its agent is ready again.
func (vm *VM) Reboot(timeout time.Duration) error {
	n := vm.Boots()
	if _, err := vm.Do(GuestCmd{Do: "reboot"}); err != nil {
		return err
	}
	if err := vm.WaitBoot(n+1, timeout); err != nil {
		return vm.explain(err)
	}
	return nil
}

// Guest starts a guest for a test, with an initramfs of its own, and shows the
// console if the test fails.
func Guest(t TB, dir string, o GuestOptions) *VM {
	t.Helper()
	Need(t, "qemu", "kernel")
	if o.Kernel == "" {
		var err error
		if o.Kernel, o.Initramfs, err = BuildGuestImage(dir, ""); err != nil {
			t.Fatalf("%v", err)
		}
	}
	vm, err := StartGuest(o)
	if err != nil {
		t.Fatalf("%v", err)
	}
	t.Cleanup(func() {
		vm.Stop()
		if f, ok := t.(interface{ Failed() bool }); ok && f.Failed() {
			t.Logf("console:\n%s", vm.Console())
		}
	})
	return vm
}

// tail keeps the end of what is written to it.
type tail struct {
	also io.Writer

	mu  sync.Mutex // guards buf
	buf []byte
}

// tailSize is how much a tail keeps.
const tailSize = 256 << 10

func (l *tail) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf = append(l.buf, p...)
	if len(l.buf) > 2*tailSize {
		l.buf = append(l.buf[:0], l.buf[len(l.buf)-tailSize:]...)
	}
	if l.also != nil {
		_, _ = l.also.Write(p) // a log that fails must not stop the guest
	}
	return len(p), nil
}

func (l *tail) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.buf)
}
