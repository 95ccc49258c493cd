package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sidewire/engine/handoff"
	"sidewire/engine/vmi"
)

// cutCommand splits what stands behind -- off: the program that run starts.
func cutCommand(args []string) (flags, command []string, err error) {
	for i, a := range args {
		if a != "--" {
			continue
		}
		if i+1 == len(args) {
			return nil, nil, badInput("-- without a program: write the QEMU to start behind it, such as -- qemu-system-x86_64 -m 1G")
		}
		return args[:i], args[i+1:], nil
	}
	return args, nil, nil
}

// checkCommand finds a program and says what is wrong with its arguments before
// anything is opened for it.
func checkCommand(vm vmi.VM, command []string) error {
	if _, err := exec.LookPath(command[0]); err != nil {
		return cannot("-- %s: %w; install QEMU with: apt-get install qemu-system-x86, or give its path", command[0], err)
	}
	_, _, err := vmi.QEMULaunch(vm, vmi.QEMUOptions{Handoff: func(i vmi.Interface) (string, []string, bool) {
		return "", nil, handedOver(i)
	}}, command)
	if err != nil {
		return inputError{err}
	}
	return nil
}

// qemuExit is how a launched QEMU ended; its code becomes ours.
type qemuExit struct {
	error
	code int
}

const (
	// termPatience is how long QEMU may take to end by SIGTERM, quitPatience by
	// its monitor's quit after that.
	termPatience = 10 * time.Second
	quitPatience = 3 * time.Second
	// linkPatience is how long the state of a link waits for the announcement.
	linkPatience = 5 * time.Second
	// signalled is what shells add to the number of a signal that ended a program.
	signalled = 128
)

// launched is the QEMU that we started. It ends with us, however we end.
type launched struct {
	s       *server
	cmd     *exec.Cmd
	monitor *net.UnixConn // our end
	mu      sync.Mutex    // guards qmp: one speaks after the other
	qmp     *handoff.QMP  // on the monitor, once somebody has spoken
	quiet   chan struct{} // closed when nobody announces
	exited  chan struct{}
	err     error // how it ended, valid then
}

// launch says that we are ready, starts QEMU and returns when it has ended, or ctx has and so it was
// ended. QEMU runs where we run, not in the pod's namespace: it gets all that it
// needs of that as sockets and descriptors.
func (s *server) launch(ctx context.Context, o *options, vm vmi.VM, out, errw io.Writer) error {
	restore := keepTerminal()
	defer restore()
	l := &launched{s: s, quiet: make(chan struct{}), exited: make(chan struct{})}
	if err := l.start(ctx, o, vm, out, errw); err != nil {
		return err
	}
	defer l.monitor.Close()
	go l.announce(ctx, o.handoff.announce)
	s.showLinksBy(l.showLink)
	defer s.showLinksBy(nil)
	select {
	case <-l.exited:
		return l.result(o.handoff.command[0])
	case <-ctx.Done():
		return l.end()
	}
}

// start completes the command line and starts it.
func (l *launched) start(ctx context.Context, o *options, vm vmi.VM, out, errw io.Writer) (err error) {
	nics := l.s.handoffs
	files, err := inherited()
	defer func() {
		for _, f := range files {
			if f != nil {
				f.Close()
			}
		}
	}()
	if err != nil {
		return cannot("inherited descriptors: %w", err)
	}
	fds := map[string][]string{}
	for _, n := range nics {
		more, err := n.handOver()
		if err != nil {
			return err
		}
		for _, f := range more {
			fds[n.iface.Name] = append(fds[n.iface.Name], strconv.Itoa(firstExtra+len(files)))
			files = append(files, f)
		}
	}
	theirs, err := l.socketPair()
	if err != nil {
		return cannot("monitor: %w", err)
	}
	monitor := firstExtra + len(files)
	files = append(files, theirs)
	args, notes, err := vmi.QEMULaunch(handoffVM(vm, nics), vmi.QEMUOptions{
		SocketDir: o.socketDir, MTU: handoffMTU(o, vm, nics), Version: launchVersion(ctx, o.handoff.command, errw),
		Client: o.mode == "client", Packed: o.packed, Handoff: handoffOf(nics, fds),
	}, o.handoff.command)
	if err != nil {
		return errors.Join(inputError{err}, l.monitor.Close())
	}
	for _, n := range notes {
		fmt.Fprintln(errw, "note:", n)
	}
	args = append(args, "-chardev", fmt.Sprintf("socket,id=sidewire-monitor,fd=%d", monitor), "-mon", "chardev=sidewire-monitor,mode=control")
	l.cmd = exec.Command(args[0], args[1:]...)
	l.cmd.Stdin, l.cmd.Stdout, l.cmd.Stderr, l.cmd.ExtraFiles = os.Stdin, out, errw, files
	// It must not outlive us even where we are killed.
	l.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	l.s.log.Debug("starting QEMU", "args", args)
	if _, err := fmt.Fprintln(out, "ready"); err != nil {
		return errors.Join(err, l.monitor.Close())
	}
	started := make(chan error)
	go l.run(started)
	if err := <-started; err != nil {
		return errors.Join(cannot("start QEMU: %w", err), l.monitor.Close())
	}
	for _, n := range nics {
		n.setState(handed)
	}
	return nil
}

// run starts the program and waits for its end, on a thread that stays: the
// death of that thread, not of the process, is what Pdeathsig means.
func (l *launched) run(started chan<- error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := l.cmd.Start()
	started <- err
	if err != nil {
		return
	}
	l.err = l.cmd.Wait()
	close(l.exited)
}

// firstExtra is the number of the first of exec.Cmd's ExtraFiles.
const firstExtra = 3

// inherited are the descriptors that we were started with and pass on, each at
// its own number: the user's own arguments may name them.
func inherited() (files []*os.File, err error) {
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, err
	}
	for _, e := range dir {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd < firstExtra {
			continue
		}
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil || flags&unix.FD_CLOEXEC != 0 {
			continue // our own, or the directory's, which is closed
		}
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return files, err
		}
		for len(files) <= fd-firstExtra {
			files = append(files, nil)
		}
		files[fd-firstExtra] = os.NewFile(uintptr(dup), e.Name())
	}
	return files, nil
}

// socketPair makes the monitor's connection and returns QEMU's end.
func (l *launched) socketPair() (*os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "monitor"), os.NewFile(uintptr(fds[1]), "monitor")
	defer ours.Close()
	c, err := net.FileConn(ours)
	if err != nil {
		theirs.Close()
		return nil, err
	}
	l.monitor = c.(*net.UnixConn)
	return theirs, nil
}

// launchVersion asks the QEMU that is to be started for its version.
func launchVersion(ctx context.Context, command []string, errw io.Writer) vmi.QEMUVersion {
	at, ok := vmi.QEMUProgram(command)
	if !ok {
		fmt.Fprintf(errw, "warning: %s: no qemu-system-... in the command, so its version is not known: taking it for an old one\n", command[0])
		return vmi.QEMUVersion{}
	}
	v, err := vmi.AskQEMUVersion(ctx, command[at])
	if err != nil {
		fmt.Fprintf(errw, "warning: %v: taking it for an old one\n", err)
	}
	return v
}

// announce waits until the guest runs, which after a migration is when that is
// over, and has it tell the network where it is.
func (l *launched) announce(ctx context.Context, wanted bool) {
	defer close(l.quiet)
	if !wanted {
		return
	}
	err := l.speak(func(q *handoff.QMP) error { return announceAll(ctx, q, l.s.handoffs) })
	if err != nil && ctx.Err() == nil {
		l.s.log.Error("guest is not announced", "err", err)
	}
}

// speak talks to the monitor.
func (l *launched) speak(say func(*handoff.QMP) error) (err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.qmp == nil {
		if l.qmp, err = handoff.NewQMP(l.monitor); err != nil {
			return err
		}
	}
	return say(l.qmp)
}

// showLink has QEMU show the guest the state of a link.
func (l *launched) showLink(netdev string, up bool) error {
	select {
	case <-l.quiet:
	case <-time.After(linkPatience):
		return errors.New("QEMU's monitor is in use until the guest runs")
	}
	return l.speak(func(q *handoff.QMP) error { return q.SetLink(netdev, up) })
}

// result is how QEMU ended by itself.
func (l *launched) result(program string) error {
	var exit *exec.ExitError
	switch {
	case l.err == nil:
		return nil
	case !errors.As(l.err, &exit):
		return machineError{fmt.Errorf("%s: %w", program, l.err)}
	}
	code := exit.ExitCode()
	if st, ok := exit.Sys().(syscall.WaitStatus); ok && st.Signaled() {
		code = signalled + int(st.Signal())
	}
	return qemuExit{fmt.Errorf("%s ended: %w", program, l.err), code}
}

// end has QEMU end: by SIGTERM, by its monitor, by force.
func (l *launched) end() error {
	_ = l.cmd.Process.Signal(unix.SIGTERM) // it may be gone already
	if l.waited(termPatience) {
		return l.result(l.cmd.Path)
	}
	go func() {
		<-l.quiet
		if err := l.speak((*handoff.QMP).Quit); err != nil {
			l.s.log.Debug("QEMU's monitor", "err", err)
		}
	}()
	if l.waited(quitPatience) {
		return l.result(l.cmd.Path)
	}
	_ = l.cmd.Process.Kill()
	<-l.exited
	return cannot("%s did not end within %v and was killed", l.cmd.Path, termPatience+quitPatience)
}

func (l *launched) waited(patience time.Duration) bool {
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-l.exited:
		return true
	case <-t.C:
		return false
	}
}

// keepTerminal puts the terminal back afterwards: QEMU does so itself, unless
// it is killed.
func keepTerminal() func() {
	fd := int(os.Stdin.Fd())
	was, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return func() {} // it is none
	}
	return func() { _ = unix.IoctlSetTermios(fd, unix.TCSETS, was) }
}
