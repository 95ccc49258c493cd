package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

// userRig is a rig whose guest's backend is a process without privileges, or a
// peer, in the pod's namespace.
type userRig struct {
	*rig
	cell userCell
	dir  string // the backend's
	said *transcript
}

// nobody has no privilege at all.
const nobody = 65534

// The guest's addresses; gvproxy has a network of its own.
const (
	userGuest, userGateway     = "10.0.2.2", "10.0.2.1"
	gvproxyGuest, gvproxyRoute = "192.168.127.2", "192.168.127.1"
)

// openUser puts the guest behind a subject.
func (p *programs) openUser(ctx context.Context, name string, c userCell) (*userRig, error) {
	if c.queues == 0 {
		c.queues = 1
	}
	r, err := newRig(c.mtu)
	if err != nil {
		return nil, err
	}
	u := &userRig{rig: r, cell: c, said: &transcript{more: make(chan struct{})}}
	if err := u.open(ctx, p, name); err != nil {
		u.close()
		return nil, fmt.Errorf("%w %s", err, u.saidBackend())
	}
	return u, nil
}

func (u *userRig) open(ctx context.Context, p *programs, name string) (err error) {
	if u.dir, err = os.MkdirTemp("", "su"); err != nil {
		return err
	}
	u.onClose(func() error { return os.RemoveAll(u.dir) })
	if err := u.tune(); err != nil {
		return err
	}
	sock := filepath.Join(u.dir, "s")
	guest, gateway := userGuest, userGateway
	switch name {
	case ours, oursAgain:
		err = u.sidewire(ctx, p.sidewire, p.flags, "")
	case other:
		err = u.sidewire(ctx, p.against.sidewire, p.flags, "")
	case oursStream:
		err = u.sidewire(ctx, p.sidewire, p.flags, "e1000")
	case passtPeer:
		err = u.passt(ctx, sock)
	case gvproxyPeer:
		guest, gateway = gvproxyGuest, gvproxyRoute
		err = u.gvproxy(ctx, sock)
	case libslirpPeer:
		err = u.libslirp(ctx, sock)
	default:
		err = fmt.Errorf("no subject %q", name)
	}
	if err != nil {
		return err
	}
	return u.address(guest, gateway)
}

// tune makes the namespaces alike for all subjects: no pacing, whose estimates
// of the path move a result more than the path does. Where cubic is not for
// everybody, Reno is.
func (u *userRig) tune() error {
	var errs []error
	for _, ns := range []*enginetest.NetNS{u.guest, u.world.Pod, u.world.Outside} {
		const control = "net/ipv4/tcp_congestion_control"
		if ns.Sysctl(control, "cubic") != nil {
			errs = append(errs, ns.Sysctl(control, "reno"))
		}
	}
	if n := u.cell.buffers; n > 0 {
		errs = append(errs, u.world.Pod.Sysctl("net/ipv4/tcp_wmem", fmt.Sprintf("4096 %d %d", n, max(n, 4<<20))))
	}
	return errors.Join(errs...)
}

// address gives the guest's eth0 what DHCP would.
func (u *userRig) address(guest, gateway string) error {
	if n := u.cell.queue; n > 0 {
		if err := u.guest.Run("ip", "link", "set", "eth0", "txqueuelen", strconv.Itoa(n)); err != nil {
			return err
		}
	}
	return errors.Join(u.guest.SetMTU("eth0", u.cell.mtu), u.guest.Up("eth0"), u.guest.Addr("eth0", guest+"/24"), u.guest.Route("default", gateway))
}

// start starts the backend in the pod's namespace.
func (u *userRig) start(cmd *exec.Cmd) error {
	if cmd.Stdout == nil {
		cmd.Stdout = u.said
	}
	cmd.Stderr = u.said
	if err := u.world.Pod.Do(cmd.Start); err != nil {
		return err
	}
	u.backend = cmd.Process.Pid
	u.onClose(func() error {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		end := time.AfterFunc(3*time.Second, func() { _ = cmd.Process.Kill() })
		defer end.Stop()
		_ = cmd.Wait() // it was told to end
		return nil
	})
	// As much as sidewire and passt allow themselves.
	var lim unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &lim) == nil {
		lim.Cur = lim.Max
		_ = unix.Prlimit(u.backend, unix.RLIMIT_NOFILE, &lim, nil)
	}
	return nil
}

// saidBackend is the end of what the backend wrote, for messages.
func (u *userRig) saidBackend() string {
	s, _ := u.said.from(0)
	if s = strings.TrimSpace(s[max(0, len(s)-300):]); s != "" {
		s = "(" + s + ")"
	}
	return s
}

const userVMI = `kind: VirtualMachineInstance
metadata: {name: vm}
spec:
  domain:
    cpu: {cores: %d}
    devices:
      networkInterfaceMultiqueue: %v
      interfaces:
      - {name: red, masquerade: {}%s}
  networks:
  - {name: red, pod: {}}
`

// sidewire starts it as a sidecar without any capability would run, and joins
// the guest to it; model is a NIC that is not virtio, or "".
func (u *userRig) sidewire(ctx context.Context, binary, flags, model string) error {
	if model != "" {
		u.cell.queues = 1
		model = ", model: " + model
	}
	vmi, resolv, program := filepath.Join(u.dir, "vmi.yaml"), filepath.Join(u.dir, "resolv.conf"), filepath.Join(u.dir, "sidewire")
	err := errors.Join(
		os.Chmod(u.dir, 0o755), os.Chown(u.dir, nobody, nobody),
		os.WriteFile(vmi, fmt.Appendf(nil, userVMI, u.cell.queues, u.cell.queues > 1, model), 0o644),
		os.WriteFile(resolv, []byte("nameserver "+enginetest.OutsideIP+"\n"), 0o644),
		copyProgram(binary, program)) // where nobody can reach it
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, program, "run", "-f", vmi, "--path", "socket", "--socket-dir", u.dir, "--resolv-conf", resolv)
	cmd.Args = append(cmd.Args, strings.Fields(flags)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out := &transcript{more: make(chan struct{})}
	cmd.Stdout = out
	if err := u.start(cmd); err != nil {
		return err
	}
	if !enginetest.Wait(5*time.Second, func() bool {
		s, _ := out.from(0)
		return strings.Contains(s, "ready\n")
	}) {
		return errors.New("sidewire is not ready")
	}
	sock := filepath.Join(u.dir, "vm", "red.sock")
	if model != "" {
		return u.joinStream(sock)
	}
	return u.joinRings(sock)
}

// copyProgram copies a program so that anybody may run it.
func copyProgram(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// passt has one queue pair, whatever the guest would like.
func (u *userRig) passt(ctx context.Context, sock string) error {
	program, err := findPasst()
	if err != nil {
		return err
	}
	u.cell.queues = 1
	if err := u.start(exec.CommandContext(ctx, program, "--vhost-user", "-f", "-q", "-s", sock, "-a", userGuest, "-n", "24", "-g", userGateway,
		"-m", strconv.Itoa(u.cell.mtu), "--runas", "0")); err != nil {
		return err
	}
	return u.joinRings(sock)
}

func (u *userRig) gvproxy(ctx context.Context, sock string) error {
	program, err := findGvproxy()
	if err != nil {
		return err
	}
	if err := u.start(exec.CommandContext(ctx, program, "-listen-qemu", "unix://"+sock, "-ssh-port", "-1", "-mtu", strconv.Itoa(u.cell.mtu))); err != nil {
		return err
	}
	return u.joinStream(sock)
}

// libslirp is driven by a QEMU that has no machine. Its MTU is 1500.
func (u *userRig) libslirp(ctx context.Context, sock string) error {
	program, err := findSlirpQEMU()
	if err != nil {
		return err
	}
	if err := u.start(exec.CommandContext(ctx, program, "-machine", "none", "-nodefaults", "-nographic", "-serial", "none", "-monitor", "none",
		"-netdev", "user,id=u,net=10.0.2.0/24,host="+userGateway+",dhcpstart="+userGuest+",dns=10.0.2.3", "-netdev", "hubport,id=h0,hubid=0,netdev=u",
		"-netdev", "stream,id=s,server=on,addr.type=unix,addr.path="+sock, "-netdev", "hubport,id=h1,hubid=0,netdev=s")); err != nil {
		return err
	}
	return u.joinStream(sock)
}

func (u *userRig) joinRings(sock string) error {
	tap, err := vhosttest.StartTapGuest(vhosttest.TapOptions{
		Options: vhosttest.Options{Path: sock, MAC: guestMAC, QueuePairs: u.cell.queues}, NetNS: u.guest.Path,
	})
	if err == nil {
		u.onClose(tap.Close)
	}
	return err
}

func (u *userRig) joinStream(sock string) error {
	g, err := startStreamGuest(u.guest, sock)
	if err == nil {
		u.onClose(g.close)
	}
	return err
}
