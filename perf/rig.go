package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
	"sidewire/vhostuser/vhosttest"
)

// rig is a guest without a hypervisor on one path to a world's outside.
type rig struct {
	world  *enginetest.World
	guest  *enginetest.NetNS
	closes []func() error

	// backend is the process between the guest's rings and the wire, 0 where
	// that is the kernel.
	backend int
}

var guestMAC = frame.MAC{0x02, 0, 0, 0, 0xaa, 0x01}

const vmiYAML = `kind: VirtualMachineInstance
metadata: {name: vm}
spec:
  domain:
    devices:
      interfaces:
      - name: red
        masquerade: {}
  networks:
  - name: red
    pod: {}
`

func (r *rig) onClose(f func() error) { r.closes = append(r.closes, f) }

func (r *rig) close() {
	for i := len(r.closes) - 1; i >= 0; i-- {
		if err := r.closes[i](); err != nil {
			fmt.Fprintln(os.Stderr, "perf: clean up:", err)
		}
	}
}

// newRig makes the world and the guest's namespace.
func newRig(mtu int) (r *rig, err error) {
	r = &rig{}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	name := fmt.Sprintf("sw-perf-%d", os.Getpid())
	if r.world, err = enginetest.CreateWorld(enginetest.WorldOptions{Name: name, MTU: mtu}); err != nil {
		return r, err
	}
	r.onClose(r.world.Close)
	if r.guest, err = enginetest.CreateNetNS(name + "-vm"); err != nil {
		return r, err
	}
	r.onClose(r.guest.Close)
	return r, r.serve()
}

// serve starts what the guest talks to outside.
func (r *rig) serve() error {
	for _, argv := range [][]string{
		{"iperf3", "-s", "-B", enginetest.OutsideIP, "-p", strconv.Itoa(iperfPort)},
		{self(), "echo", echoAddr},
	} {
		cmd := r.world.Outside.Command(argv[0], argv[1:]...)
		if err := cmd.Start(); err != nil {
			return fmt.Errorf("%s: %w", argv[0], err)
		}
		r.onClose(func() error {
			_ = cmd.Process.Kill()
			_ = cmd.Wait() // it was killed
			return nil
		})
	}
	return nil
}

// configure gives the guest's eth0 what DHCP would.
func (r *rig) configure(mtu int) error {
	return errors.Join(r.guest.SetMTU("eth0", mtu), r.guest.Up("eth0"), r.guest.Addr("eth0", "10.0.2.2/24"), r.guest.Route("default", "10.0.2.1"))
}

// openSidewire puts the guest behind a sidewire of its own.
func openSidewire(binary, flags string, mtu int) (r *rig, err error) {
	if r, err = newRig(mtu); err != nil {
		return r, err
	}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	dir, err := os.MkdirTemp("", "sw")
	if err != nil {
		return r, err
	}
	r.onClose(func() error { return os.RemoveAll(dir) })
	vmi := filepath.Join(dir, "vmi.yaml")
	if err := os.WriteFile(vmi, []byte(vmiYAML), 0o644); err != nil {
		return r, err
	}
	cmd := exec.Command(binary, "run", "-f", vmi, "--netns", r.world.Pod.Path, "--socket-dir", dir, "--resolv-conf", r.world.ResolvConf)
	cmd.Args = append(cmd.Args, strings.Fields(flags)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return r, err
	}
	if err := cmd.Start(); err != nil {
		return r, err
	}
	r.onClose(func() error {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		return cmd.Wait()
	})
	r.backend = cmd.Process.Pid
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		return r, fmt.Errorf("sidewire is not ready: %q %v", line, err)
	}
	tap, err := vhosttest.StartTapGuest(vhosttest.TapOptions{
		Options: vhosttest.Options{Path: filepath.Join(dir, "vm", "red.sock"), MAC: guestMAC}, NetNS: r.guest.Path,
	})
	if err != nil {
		return r, err
	}
	r.onClose(tap.Close)
	return r, r.configure(mtu)
}

// openKernel puts the guest behind the kernel's own masquerade, its frames
// copied from its tap into one in the pod.
func openKernel(mtu int) (r *rig, err error) {
	if r, err = newRig(mtu); err != nil {
		return r, err
	}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	pair, err := vhosttest.StartTapPair(
		vhosttest.Tap{NetNS: r.guest.Path, MTU: mtu, MAC: guestMAC},
		vhosttest.Tap{NetNS: r.world.Pod.Path, Name: enginetest.KernelTap, MTU: mtu}, 1)
	if err != nil {
		return r, err
	}
	r.onClose(pair.Close)
	if err := r.world.KernelMasquerade(); err != nil {
		return r, err
	}
	return r, r.configure(mtu)
}

// openVeth joins the guest's namespace to the outside without anybody between
// them: no other path can be faster.
func openVeth(mtu int) (r *rig, err error) {
	if r, err = newRig(mtu); err != nil {
		return r, err
	}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	if err := enginetest.CreateVeth(r.guest, "eth0", r.world.Outside, "veth1"); err != nil {
		return r, err
	}
	return r, errors.Join(r.world.Outside.SetMTU("veth1", mtu), r.world.Outside.Up("veth1"), r.world.Outside.Addr("veth1", "10.0.2.1/24"), r.configure(mtu))
}
