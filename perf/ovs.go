package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"sidewire/engine/enginetest"
)

// ovsSwitch is Open vSwitch with its DPDK datapath: a bridge of vhost-user
// ports that forwards by addresses, as its default flow NORMAL has it. Its
// database and its sockets are in a directory of its own.
type ovsSwitch struct {
	*proc    // ovs-vswitchd
	dir      string
	db       *proc
	socks    []string
	marked   time.Time
	switched bool
}

const (
	ovsSchema = "/usr/share/openvswitch/vswitch.ovsschema"
	// ovsRevalidation is how long Open vSwitch takes until its flows go by the
	// addresses that it has learned.
	ovsRevalidation = 1500 * time.Millisecond
)

// ovsProgram is an ovs-vswitchd with DPDK.
func ovsProgram() (string, error) {
	for _, p := range []string{"/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk", "/usr/lib64/openvswitch-dpdk/ovs-vswitchd"} {
		if _, err := os.Stat(p); err == nil {
			if _, err := os.Stat(ovsSchema); err == nil {
				return p, nil
			}
		}
	}
	if p, err := enginetest.Program("ovs-vswitchd"); err == nil {
		if out, err := exec.Command(p, "--version").Output(); err == nil && strings.Contains(string(out), "DPDK") {
			return p, nil
		}
	}
	return "", errors.New("no Open vSwitch with DPDK (package openvswitch-switch-dpdk)")
}

func openOVS(ctx context.Context, c cell, dir string) (b backend, err error) {
	prog, err := ovsProgram()
	if err != nil {
		return nil, err
	}
	o := &ovsSwitch{dir: dir, socks: socketNames(dir, c.devices())}
	defer func() {
		if err != nil {
			_ = o.close()
		}
	}()
	at := func(name string) string { return filepath.Join(dir, name) }
	if out, err := exec.CommandContext(ctx, "ovsdb-tool", "create", at("db"), ovsSchema).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("ovsdb-tool: %w: %s", err, out)
	}
	env := []string{"OVS_RUNDIR=" + dir, "OVS_LOGDIR=" + dir, "OVS_DBDIR=" + dir, "OVS_SYSCONFDIR=" + dir}
	if o.db, err = startProc(ctx, procOptions{env: env}, "ovsdb-server", "ovsdb-server", at("db"), "--remote=punix:"+at("db.sock"), "--unixctl="+at("db.ctl")); err != nil {
		return nil, err
	}
	if err := waitForSocket(at("db.sock"), o.db); err != nil {
		return nil, err
	}
	if err := o.vsctl(ctx, "--no-wait", "init", "--", "set", "Open_vSwitch", ".", "other_config:dpdk-init=true",
		fmt.Sprintf("other_config:pmd-cpu-mask=%#x", 1<<backendCPU), fmt.Sprintf("other_config:dpdk-lcore-mask=%#x", 1<<backendCPU),
		fmt.Sprintf("other_config:userspace-tso-enable=%v", c.GSO), "other_config:dpdk-socket-mem=512", "other_config:vhost-sock-dir=.",
		"other_config:dpdk-extra="+o.memory()); err != nil {
		return nil, err
	}
	o.proc, err = startProc(ctx, procOptions{env: env, undisturbed: true}, "ovs-vswitchd", "taskset", "-c", strconv.Itoa(backendCPU),
		prog, "unix:"+at("db.sock"), "--unixctl="+at("sw.ctl"))
	if err != nil {
		return nil, err
	}
	return o, o.addPorts(ctx, c)
}

// memory are DPDK's flags.
func (o *ovsSwitch) memory() string {
	const s = "--no-pci --no-telemetry --single-file-segments"
	if hugepages() {
		return s + " --in-memory"
	}
	return s + " --no-huge --no-shconf"
}

func (o *ovsSwitch) addPorts(ctx context.Context, c cell) error {
	args := []string{"add-br", "br0", "--", "set", "bridge", "br0", "datapath_type=netdev"}
	if c.FDB > 0 {
		args = append(args, fmt.Sprintf("other_config:mac-table-size=%d", 4*c.FDB))
	}
	for _, s := range o.socks {
		// It may still write MTU into a port that is there before it is asked for.
		name := filepath.Base(s)
		args = append(args, "--", "add-port", "br0", name, "--", "set", "Interface", name)
		if c.GSO {
			args = append(args, "type=dpdkvhostuserclient", "options:vhost-server-path="+s)
		} else {
			args = append(args, "type=dpdkvhostuser")
		}
		if c.Size > 1514 && !c.GSO {
			args = append(args, "mtu_request=9000")
		}
	}
	return o.vsctl(ctx, args...)
}

func (o *ovsSwitch) vsctl(ctx context.Context, args ...string) error {
	argv := append([]string{"--timeout=20", "--db=unix:" + filepath.Join(o.dir, "db.sock")}, args...)
	if out, err := exec.CommandContext(ctx, "ovs-vsctl", argv...).CombinedOutput(); err != nil {
		return fmt.Errorf("ovs-vsctl: %w: %s", err, out)
	}
	return nil
}

func (o *ovsSwitch) appctl(args ...string) (string, error) {
	out, err := exec.Command("ovs-appctl", append([]string{"-t", filepath.Join(o.dir, "sw.ctl")}, args...)...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("ovs-appctl: %w: %s", err, out)
	}
	return string(out), nil
}

func (o *ovsSwitch) sockets() []string { return o.socks }

// connects tells that it takes long frames only of those that it connects to.
func (o *ovsSwitch) connects(c cell) bool { return c.GSO }

func (o *ovsSwitch) start() error { return nil }

func (o *ovsSwitch) mark() error {
	if !o.switched {
		time.Sleep(ovsRevalidation)
		o.switched = true
	}
	o.marked = time.Now()
	_, err := o.appctl("dpif-netdev/pmd-stats-clear")
	return err
}

func (o *ovsSwitch) costs() (cost, error) {
	s, err := o.appctl("dpif-netdev/pmd-stats-show")
	if err != nil {
		return cost{}, err
	}
	frames, busy, err := parsePMDStats(s, time.Since(o.marked))
	return cost{moved: frames, busyNS: busy, allocs: nan, dropped: nan}, err
}

func (o *ovsSwitch) close() error {
	var errs []error
	for _, p := range []*proc{o.proc, o.db} {
		if p != nil {
			errs = append(errs, p.kill())
		}
	}
	return errors.Join(errs...)
}

var (
	pmdReceived   = regexp.MustCompile(`packets received: (\d+)`)
	pmdIdle       = regexp.MustCompile(`idle cycles: (\d+)`)
	pmdProcessing = regexp.MustCompile(`processing cycles: (\d+)`)
)

// parsePMDStats reads "dpif-netdev/pmd-stats-show" and returns the frames
// that it received and the nanoseconds that each was processed. All cycles together are the time since they were
// cleared.
func parsePMDStats(s string, since time.Duration) (frames, busyNS float64, err error) {
	var v [3]float64
	for i, re := range []*regexp.Regexp{pmdReceived, pmdIdle, pmdProcessing} {
		m := re.FindStringSubmatch(s) // the first thread is the one that polls
		if m == nil {
			return 0, 0, fmt.Errorf("no %v in the switch's answer: %q", re, s)
		}
		v[i], _ = strconv.ParseFloat(m[1], 64)
	}
	if v[0] == 0 {
		return 0, 0, errors.New("the switch received nothing")
	}
	return v[0], v[2] / (v[1] + v[2]) * float64(since.Nanoseconds()) / v[0], nil
}

// waitForSocket waits until a program listens on a socket, which is there a
// little earlier.
func waitForSocket(path string, p *proc) error {
	deadline := time.After(10 * time.Second)
	for {
		if c, err := net.Dial("unix", path); err == nil {
			return c.Close()
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-p.done:
			return fmt.Errorf("%s ended: %s", p.name, p.tail())
		case <-deadline:
			return fmt.Errorf("%s does not listen on %s", p.name, path)
		}
	}
}
