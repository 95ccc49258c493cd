package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
	"sidewire/vhostuser/vhosttest"
)

// TestMain lets the test binary be the program: the processes that the tests
// start are real ones, with their own descriptors and memory.
func TestMain(m *testing.M) {
	if os.Getenv("SIDEWIRE_TEST_MAIN") != "" {
		main()
	}
	os.Exit(m.Run())
}

// guestMAC is the address of the test guests.
var guestMAC = frame.MAC{0x02, 0, 0, 0, 0xaa, 0x01}

// process is a running sidewire.
type process struct {
	t   *testing.T
	cmd *exec.Cmd
	dir string // socket directory
	log *logBuffer
	vmi string // file
}

// spec is a VMI with one masquerade interface.
func spec(name string, vcpus int, ports ...string) string {
	var b strings.Builder
	fmt.Fprintf(&b, `apiVersion: kubevirt.io/v1
kind: VirtualMachineInstance
metadata:
  name: %s
spec:
  domain:
    cpu: {cores: %d}
    memory: {guest: 256Mi}
    devices:
      networkInterfaceMultiqueue: %v
      interfaces:
      - name: red
        masquerade: {}
        macAddress: %s
`, name, vcpus, vcpus > 1, guestMAC)
	if len(ports) > 0 {
		b.WriteString("        ports:\n")
	}
	for _, p := range ports {
		proto, port, _ := strings.Cut(p, ":")
		fmt.Fprintf(&b, "        - {port: %s, protocol: %s}\n", port, strings.ToUpper(proto))
	}
	b.WriteString("  networks:\n  - name: red\n    pod: {}\n")
	return b.String()
}

// writeFile writes a file into a directory of the test.
func writeFile(t *testing.T, name, content string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), name)
	require.NoError(t, os.WriteFile(p, []byte(content), 0o644))
	return p
}

// sidewireCommand is the program with these arguments.
func sidewireCommand(args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), "SIDEWIRE_TEST_MAIN=1")
	return cmd
}

// socketDir is a directory with a name short enough for socket paths.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sw")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// startSidewire runs sidewire in a world's pod and waits until it is ready.
func startSidewire(t *testing.T, w *enginetest.World, vmi string, flags ...string) *process {
	t.Helper()
	p := &process{t: t, dir: socketDir(t), log: &logBuffer{}, vmi: writeFile(t, "vmi.yaml", vmi)}
	p.start(w, flags...)
	t.Cleanup(func() {
		p.stop()
		if t.Failed() {
			t.Logf("sidewire's log:\n%s", p.log)
		}
	})
	return p
}

func (p *process) start(w *enginetest.World, flags ...string) {
	p.t.Helper()
	p.launch(sidewireCommand(append([]string{"run", "-f", p.vmi, "--netns", w.Pod.Path, "--socket-dir", p.dir, "--resolv-conf", w.ResolvConf}, flags...)...))
}

// launch starts the program and waits until it is ready.
func (p *process) launch(cmd *exec.Cmd) {
	p.t.Helper()
	p.cmd = cmd
	p.cmd.Stderr = p.log
	out, err := p.cmd.StdoutPipe()
	require.NoError(p.t, err)
	require.NoError(p.t, p.cmd.Start())
	ready := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(out).ReadString('\n')
		ready <- line
		_, _ = io.Copy(io.Discard, out)
	}()
	select {
	case line := <-ready:
		if line != "ready\n" {
			_ = p.cmd.Wait()
			p.cmd = nil
			p.t.Fatalf("sidewire did not start: %q\n%s", line, p.log)
		}
	case <-time.After(20 * time.Second):
		p.t.Fatalf("sidewire is not ready\n%s", p.log)
	}
}

// stop ends the process in order and checks that it went well.
func (p *process) stop() {
	p.t.Helper()
	if p.cmd == nil {
		return
	}
	cmd := p.cmd
	p.cmd = nil
	_ = cmd.Process.Signal(syscall.SIGTERM)
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		if err != nil {
			p.t.Errorf("sidewire ended with %v", err)
		}
	case <-time.After(20 * time.Second):
		_ = cmd.Process.Signal(syscall.SIGQUIT)
		<-done
		p.t.Errorf("sidewire did not stop")
	}
}

// kill ends the process as a crash would.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
	p.cmd = nil
}

func (p *process) socket() string { return filepath.Join(p.dir, "vm", "red.sock") }

func (p *process) status() Status {
	p.t.Helper()
	var st Status
	require.NoError(p.t, ask(context.Background(), filepath.Join(p.dir, "control.sock"), "GET", "/status", nil, &st))
	return st
}

// dump shows what sidewire counted, for a test that failed.
func (p *process) dump() string {
	b, _ := json.Marshal(p.status().Ports)
	return string(b)
}

// vm is a guest without a hypervisor: a namespace whose eth0 is a tap joined
// to virtqueues.
type vm struct {
	t   *testing.T
	ns  *enginetest.NetNS
	tap *vhosttest.TapGuest
	dir string
}

// startVM joins a guest to sidewire and lets dhclient configure it.
func startVM(t *testing.T, p *process, o vhosttest.Options) *vm {
	t.Helper()
	o.Path, o.MAC = p.socket(), guestMAC
	return joinVM(t, o)
}

// joinVM is startVM for any socket.
func joinVM(t *testing.T, o vhosttest.Options) *vm {
	t.Helper()
	enginetest.Need(t, "dhclient", "tun")
	v := &vm{t: t, ns: enginetest.NewNetNS(t), dir: t.TempDir()}
	var err error
	v.tap, err = vhosttest.StartTapGuest(vhosttest.TapOptions{Options: o, NetNS: v.ns.Path})
	require.NoError(t, err)
	t.Cleanup(func() { v.tap.Close() })
	v.dhclient("-1")
	t.Cleanup(func() { v.dhclient("-x") })
	return v
}

// dhclient runs the client with files of its own; its resolv.conf is v.dir's.
func (v *vm) dhclient(arg string) string {
	v.t.Helper()
	program, err := enginetest.Program("dhclient")
	require.NoError(v.t, err)
	resolv := filepath.Join(v.dir, "resolv.conf")
	if _, err := os.Stat(resolv); err != nil {
		require.NoError(v.t, os.WriteFile(resolv, nil, 0o644))
	}
	script := `mount --bind "$1/resolv.conf" "$(readlink -f /etc/resolv.conf)" && shift && exec "$@"`
	out := v.run("unshare", "-m", "--uts", "sh", "-c", script, "sh", v.dir, program, "-v",
		"-lf", filepath.Join(v.dir, "leases"), "-pf", filepath.Join(v.dir, "pid"), arg, "eth0")
	return out
}

// run runs a command in the guest and returns its output.
func (v *vm) run(name string, args ...string) string {
	v.t.Helper()
	out, err := v.try(name, args...)
	require.NoError(v.t, err, out)
	return out
}

// try is run for commands that may fail.
func (v *vm) try(name string, args ...string) (string, error) {
	return runIn(v.ns, v.dir, name, args...)
}

// runIn runs a command in a namespace. Its output goes through a file, since a
// daemon that it leaves would hold a pipe open.
func runIn(ns *enginetest.NetNS, dir, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	f, err := os.CreateTemp(dir, "out")
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	base := ns.Command(name, args...)
	cmd := exec.CommandContext(ctx, base.Path, base.Args[1:]...)
	cmd.Stdout, cmd.Stderr = f, f
	err = cmd.Run()
	b, _ := os.ReadFile(f.Name())
	return string(b), err
}

// listen serves every connection to an address of a namespace on a goroutine
// of its own, until the test ends or the listener is closed.
func listen(t *testing.T, ns *enginetest.NetNS, network, addr string, serve func(net.Conn)) net.Listener {
	t.Helper()
	l, err := ns.Listen(network, addr)
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				serve(c)
			}()
		}
	}()
	return l
}
