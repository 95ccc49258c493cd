package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"sidewire/engine/enginetest"
)

// The demo's VMI is the guide's masquerade example with two processors.
const demoVMI = `kind: VM
metadata:
  name: demo
spec:
  domain:
    cpu:
      cores: 2
    memory:
      guest: 256Mi
    devices:
      networkInterfaceMultiqueue: true
      interfaces:
        - name: red
          masquerade: {} # connect using masquerade mode
          ports:
            - port: 80 # allow incoming traffic on port 80 to get into the virtual machine
  networks:
  - name: red
    pod: {}
`

const (
	demoBytes   = 16 << 20 // of a transfer whose checksum is compared
	demoTimeout = 3 * time.Minute
)

// demoCommand builds a small world, boots a real guest in it and shows each
// thing working.
func demoCommand(ctx context.Context, args []string, out, errw io.Writer) error {
	var kind string
	fs := newFlags("demo", errw)
	fs.StringVar(&kind, "guest", "auto", "`KIND` of guest: qemu, tap (no hypervisor), or auto")
	if err := parse(fs, args); err != nil {
		return err
	}
	if kind != "auto" && kind != "qemu" && kind != "tap" {
		return badInput("--guest %s: want qemu, tap or auto", kind)
	}
	if os.Geteuid() != 0 {
		return demoInUserNS(ctx, args, out, errw)
	}
	for _, need := range []string{"netns", "tun"} {
		if err := enginetest.Have(need); err != nil {
			return cannot("the demo needs %s: %w", need, err)
		}
	}
	init, err := guestProgram(kind)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, demoTimeout)
	defer cancel()
	d := &demo{ctx: ctx, out: out, init: init, began: time.Now()}
	defer d.close()
	err = d.run(kind)
	if err != nil && d.log != nil {
		fmt.Fprintf(errw, "sidewire's log:\n%s", d.log)
	}
	return err
}

// demoInUserNS runs the demo again as root of a user namespace of its own.
func demoInUserNS(ctx context.Context, args []string, out, errw io.Writer) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", append([]string{"demo"}, args...)...)
	cmd.Stdout, cmd.Stderr = out, errw
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
	}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	err := cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &exit):
		if exit.ExitCode() == exitInput {
			return inputError{silent{}}
		}
		return machineError{silent{}}
	}
	return cannot("no user namespace can be made here (%v): run the demo as root", err)
}

// demo is the world under way.
type demo struct {
	ctx     context.Context
	out     io.Writer
	init    string // the guest's program
	began   time.Time
	dir     string
	world   *enginetest.World
	agent   *enginetest.Agent
	tap     bool // the guest is one without a hypervisor
	log     *logBuffer
	exited  chan struct{} // sidewire has ended
	closers []func()
}

func (d *demo) onClose(f func()) { d.closers = append(d.closers, f) }

func (d *demo) close() {
	for i := len(d.closers) - 1; i >= 0; i-- {
		d.closers[i]()
	}
}

// say prints one line of what was shown, with the time it took.
func (d *demo) say(took time.Duration, what, how string, args ...any) {
	fmt.Fprintf(d.out, "%7.2fs  %-22s %-44s %s\n", time.Since(d.began).Seconds(), what, fmt.Sprintf(how, args...),
		took.Round(10*time.Microsecond))
}

func (d *demo) run(kind string) error {
	if err := d.build(); err != nil {
		return err
	}
	if err := d.startSidewire(); err != nil {
		return err
	}
	if err := d.startGuest(kind); err != nil {
		return err
	}
	for _, step := range []func() error{
		d.lease, d.pingGateway, d.lookup, d.download, d.upload, d.inbound, d.refused, d.throughput, d.queues,
	} {
		if err := step(); err != nil {
			return cannot("%w", err)
		}
	}
	fmt.Fprintf(d.out, "%7.2fs  everything shown works\n", time.Since(d.began).Seconds())
	return nil
}

// build makes the two namespaces and writes the VMI.
func (d *demo) build() (err error) {
	began := time.Now()
	if d.dir, err = os.MkdirTemp("", "swdemo"); err != nil {
		return cannot("%w", err)
	}
	d.onClose(func() { _ = os.RemoveAll(d.dir) })
	d.world, err = enginetest.CreateWorld(enginetest.WorldOptions{Name: fmt.Sprintf("swdemo-%d", os.Getpid())})
	if err != nil {
		return cannot("%w", err)
	}
	d.onClose(func() { _ = d.world.Close() })
	if err := os.WriteFile(d.vmi(), []byte(demoVMI), 0o644); err != nil {
		return cannot("%w", err)
	}
	d.say(time.Since(began), "two namespaces", "pod %s, outside %s with HTTP and DNS", enginetest.PodIP, enginetest.OutsideIP)
	return nil
}

func (d *demo) vmi() string { return filepath.Join(d.dir, "vmi.yaml") }

// flags are those that run and qemu-args share.
func (d *demo) flags() []string {
	return []string{"-f", d.vmi(), "--netns", d.world.Pod.Path, "--socket-dir", d.dir, "--resolv-conf", d.world.ResolvConf}
}

func (d *demo) startSidewire() error {
	began := time.Now()
	d.log = &logBuffer{}
	cmd := exec.Command("/proc/self/exe", append([]string{"run"}, d.flags()...)...)
	cmd.Stderr = d.log
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return cannot("%w", err)
	}
	if err := cmd.Start(); err != nil {
		return cannot("start sidewire: %w", err)
	}
	d.exited = make(chan struct{})
	line, _ := bufio.NewReader(stdout).ReadString('\n')
	go func() { _ = cmd.Wait(); close(d.exited) }()
	d.onClose(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-d.exited:
		case <-time.After(10 * time.Second):
			_ = cmd.Process.Kill()
			<-d.exited
		}
	})
	if line != "ready\n" {
		return cannot("sidewire is not ready")
	}
	d.say(time.Since(began), "sidewire run", "ready")
	return nil
}

func (d *demo) lease() error {
	r, err := d.agent.Do(enginetest.GuestCmd{Do: "dhcp"})
	if err != nil {
		return err
	}
	if r.Lease == nil || r.Lease.Addr != "10.0.2.2/24" {
		return fmt.Errorf("lease is %+v, want 10.0.2.2/24", r.Lease)
	}
	d.say(r.Took, "DHCP lease", "%s, router %s, DNS %s, MTU %d", r.Lease.Addr, strings.Join(r.Lease.Routers, " "), strings.Join(r.Lease.DNS, " "), r.Lease.MTU)
	return nil
}

func (d *demo) pingGateway() error {
	r, err := d.agent.Do(enginetest.GuestCmd{Do: "ping", Host: "10.0.2.1", N: 3, Interval: 10 * time.Millisecond})
	if err == nil && r.Received != 3 {
		err = fmt.Errorf("ping: %d of 3 answered", r.Received)
	}
	if err != nil {
		return err
	}
	d.say(r.Took, "ping the gateway", "3 of 3, mean round trip %s", r.RTT.Round(time.Microsecond))
	return nil
}

func (d *demo) lookup() error {
	r, err := d.agent.Do(enginetest.GuestCmd{Do: "lookup", Host: enginetest.OutsideName})
	if err == nil && (len(r.Addrs) != 1 || r.Addrs[0] != enginetest.OutsideIP) {
		err = fmt.Errorf("lookup gave %v", r.Addrs)
	}
	if err != nil {
		return err
	}
	d.say(r.Took, "DNS lookup", "%s is %s", enginetest.OutsideName, r.Addrs[0])
	return nil
}

// url is on the outside's HTTP server.
func (d *demo) url(path string) string {
	return fmt.Sprintf("http://%s:%d%s", enginetest.OutsideName, enginetest.HTTPPort, path)
}

func (d *demo) get(n int64) (enginetest.GuestReply, error) {
	r, err := d.agent.Do(enginetest.GuestCmd{Do: "http_get", URL: d.url(fmt.Sprintf("/data?bytes=%d", n)), Timeout: time.Minute})
	if err == nil && r.Sum != enginetest.DataSum(n) {
		err = fmt.Errorf("download of %d bytes: checksum %s is wrong", n, r.Sum)
	}
	return r, err
}

func (d *demo) put(n int64) (enginetest.GuestReply, error) {
	r, err := d.agent.Do(enginetest.GuestCmd{Do: "http_put", URL: d.url("/data"), Bytes: n, Timeout: time.Minute})
	if err == nil && strings.TrimSpace(r.Body) != enginetest.DataSum(n) {
		err = fmt.Errorf("upload of %d bytes: checksum %s is wrong", n, r.Body)
	}
	return r, err
}

func (d *demo) download() error {
	r, err := d.get(demoBytes)
	if err == nil {
		d.say(r.Took, "HTTP download", "%d MiB, SHA-256 %.12s… is right", demoBytes>>20, r.Sum)
	}
	return err
}

func (d *demo) upload() error {
	r, err := d.put(demoBytes)
	if err == nil {
		d.say(r.Took, "HTTP upload", "%d MiB, SHA-256 %.12s… is right", demoBytes>>20, r.Body)
	}
	return err
}

// fromOutside is an HTTP client in the outside's namespace.
func (d *demo) fromOutside(addr string) (string, error) {
	cl := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			return d.world.Outside.Dial("tcp4", addr, 5*time.Second)
		},
	}}
	resp, err := cl.Get("http://" + addr + "/whoami")
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

func (d *demo) inbound() error {
	if _, err := d.agent.Do(enginetest.GuestCmd{Do: "listen", Kind: "http", Port: 80}); err != nil {
		return err
	}
	began := time.Now()
	who, err := d.fromOutside(enginetest.PodIP + ":80")
	if err == nil && !strings.HasPrefix(who, enginetest.OutsideIP+":") {
		err = fmt.Errorf("the guest saw the client as %s, not as %s", who, enginetest.OutsideIP)
	}
	if err != nil {
		return fmt.Errorf("inbound connection: %w", err)
	}
	d.say(time.Since(began), "inbound to port 80", "the guest sees the client as %s", who)
	return nil
}

func (d *demo) refused() error {
	if _, err := d.agent.Do(enginetest.GuestCmd{Do: "listen", Kind: "echo", Port: 81}); err != nil {
		return err
	}
	began := time.Now()
	c, err := d.world.Outside.Dial("tcp4", enginetest.PodIP+":81", 5*time.Second)
	if err == nil {
		_ = c.Close()
		return errors.New("port 81 is not listed but reached the guest")
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("unlisted port: %w", err)
	}
	d.say(time.Since(began), "inbound to port 81", "refused, as it is not listed")
	return nil
}

// throughput repeats the transfers with as much as the guest can do in a few
// seconds.
func (d *demo) throughput() error {
	for _, way := range []struct {
		name string
		do   func(int64) (enginetest.GuestReply, error)
	}{{"outside to guest", d.get}, {"guest to outside", d.put}} {
		probe, err := way.do(demoBytes)
		if err != nil {
			return err
		}
		n := min(int64(float64(demoBytes)*2/max(probe.Took.Seconds(), 0.01)), 2<<30)
		r, err := way.do(n)
		if err != nil {
			return err
		}
		d.say(r.Took, "throughput", "%s %.2f Gbit/s with its SHA-256, %d MiB", way.name, float64(n)*8/r.Took.Seconds()/1e9, n>>20)
	}
	return nil
}

// queues shows that both queue pairs carry traffic.
func (d *demo) queues() error {
	began := time.Now()
	// A tap has all its queues from the start; a virtio NIC has to be asked.
	if !d.tap {
		if _, err := d.agent.Do(enginetest.GuestCmd{Do: "channels", N: 2}); err != nil {
			return fmt.Errorf("second queue pair: %w", err)
		}
	}
	before, err := d.pairs()
	if err != nil {
		return err
	}
	for time.Since(began) < 15*time.Second {
		if err := d.parallel(8); err != nil {
			return err
		}
		after, err := d.pairs()
		if err != nil {
			return err
		}
		if a, b := after[0].minus(before[0]), after[1].minus(before[1]); a.both() && b.both() {
			d.say(time.Since(began), "two queue pairs", "frames tx %d and %d, rx %d and %d", a.tx, b.tx, a.rx, b.rx)
			return nil
		}
	}
	return errors.New("only one queue pair carries traffic")
}

// parallel runs n downloads at once.
func (d *demo) parallel(n int) error {
	errs := make(chan error, n)
	for range n {
		go func() { _, err := d.get(1 << 20); errs <- err }()
	}
	var all error
	for range n {
		all = errors.Join(all, <-errs)
	}
	return all
}

type pairFrames struct{ tx, rx uint64 }

func (p pairFrames) minus(q pairFrames) pairFrames { return pairFrames{p.tx - q.tx, p.rx - q.rx} }

func (p pairFrames) both() bool { return p.tx > 0 && p.rx > 0 }

// pairs asks the running sidewire what its two queue pairs have carried.
func (d *demo) pairs() (out [2]pairFrames, err error) {
	var st Status
	if err := ask(d.ctx, filepath.Join(d.dir, "control.sock"), "GET", "/status", nil, &st); err != nil {
		return out, err
	}
	if len(st.Interfaces) != 1 || len(st.Interfaces[0].Device.Pairs) != 2 {
		return out, errors.New("status does not show two queue pairs")
	}
	for i, p := range st.Interfaces[0].Device.Pairs {
		out[i] = pairFrames{p.TxFrames, p.RxFrames}
	}
	return out, nil
}
