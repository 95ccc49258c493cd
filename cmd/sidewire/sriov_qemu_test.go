package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
)

// onFunction is a VMI with one sriov interface, and its network.
const onFunction = `kind: VirtualMachineInstance
metadata: {name: vm}
spec:
  domain:
    memory: {guest: 64Mi}
    devices:
      interfaces:
      - {name: blue, sriov: {}, macAddress: "02:00:00:00:00:05", pciAddress: "0000:00:05.0"}
  networks:
  - {name: blue, multus: {networkName: sriov-net}}
---
apiVersion: sriovnetwork.openshift.io/v1
kind: SriovNetworkNodePolicy
metadata: {name: policy-1, namespace: sriov-network-operator}
spec: {deviceType: vfio-pci, nicSelector: {pfNames: [eth0]}, nodeSelector: {sriov: "true"}, numVfs: 2, priority: 90, resourceName: sriov-nic}
---
apiVersion: sriovnetwork.openshift.io/v1
kind: SriovNetwork
metadata: {name: sriov-net, namespace: sriov-network-operator}
spec: {ipam: "{}", networkNamespace: default, resourceName: sriov-nic, vlan: 100, vlanQoS: 3, spoofChk: "off", trust: "on", maxTxRate: 100}
`

// The addresses in the guest: a card behind a root port, and its virtual functions.
const (
	cardAddress     = "0000:01:00.0"
	functionAddress = "0000:01:10.0"
	otherFunction   = "0000:01:10.2"
)

// hardware is a guest that has a card with virtual functions and an IOMMU, and in
// which sidewire and a QEMU run.
type hardware struct {
	t *testing.T
	*enginetest.VM
}

// startHardware boots it.
func startHardware(t *testing.T) *hardware {
	t.Helper()
	enginetest.Need(t, "qemu10", "go", "ip")
	kit, err := enginetest.Hardware()
	require.NoError(t, err)
	dir := t.TempDir()
	image := enginetest.Initramfs{Modules: kit.Modules, Drivers: []string{"igb", "igbvf", "vfio-pci", "vfio_iommu_type1"}, Files: map[string]string{}}
	image.Init, err = enginetest.BuildGuest(dir)
	require.NoError(t, err)
	program := filepath.Join(dir, "sidewire")
	build := exec.Command("go", "build", "-ldflags=-s -w", "-o", program, "sidewire/cmd/sidewire")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	require.NoError(t, err, string(out))
	ip, err := enginetest.Program("ip")
	require.NoError(t, err)
	for name, p := range map[string]string{"/qemu-system-x86_64": kit.QEMU, "/ip": ip} {
		files, err := enginetest.WithLibraries(p)
		require.NoError(t, err)
		delete(files, p)
		maps.Copy(image.Files, files)
		image.Files[name] = p
	}
	for _, f := range []string{"seabios/bios-256k.bin", "qemu/kvmvapic.bin"} {
		image.Files["/data/"+path.Base(f)] = filepath.Join(filepath.Dir(kit.QEMU), "../share", f)
	}
	image.Files["/sidewire"] = program
	image.Files["/vmi.yaml"] = writeFile(t, "vmi.yaml", onFunction)
	image.Files["/anywhere.yaml"] = writeFile(t, "anywhere.yaml", strings.Replace(onFunction, `, pciAddress: "0000:00:05.0"`, "", 1))
	initramfs := filepath.Join(dir, "initramfs.cpio")
	f, err := os.Create(initramfs)
	require.NoError(t, err)
	require.NoError(t, enginetest.BuildInitramfs(f, image))
	require.NoError(t, f.Close())
	h := &hardware{t: t, VM: enginetest.Guest(t, dir, enginetest.GuestOptions{
		Kernel: kit.Kernel, Initramfs: initramfs, QEMU: kit.QEMU, Machine: "q35", Memory: 1280, Append: "intel_iommu=on", BootTimeout: 4 * time.Minute,
		Args: append(kit.Data, "-device", "intel-iommu,intremap=on", "-device", "pcie-root-port,id=rp,chassis=1",
			"-netdev", "hubport,id=wire,hubid=0", "-device", "igb,bus=rp,netdev=wire,mac=52:54:00:00:00:01"),
	})}
	h.do(enginetest.GuestCmd{Do: "write", Path: "/sys/bus/pci/devices/" + cardAddress + "/sriov_numvfs", Data: "2"})
	up := true
	h.do(enginetest.GuestCmd{Do: "link", If: "eth0", Up: &up})
	return h
}

func (h *hardware) do(c enginetest.GuestCmd) enginetest.GuestReply {
	h.t.Helper()
	if c.Timeout == 0 {
		c.Timeout = 2 * time.Minute
	}
	r, err := h.Do(c)
	require.NoError(h.t, err, r.Data)
	return r
}

// sidewire runs it to its end.
func (h *hardware) sidewire(args ...string) (status int, out string) {
	h.t.Helper()
	r := h.do(enginetest.GuestCmd{Do: "run", Path: "/sidewire", Args: args})
	return r.Status, r.Data
}

// function is the driver that has the function, and its settings as ip knows them:
// its MAC, and the rest.
func (h *hardware) function() (driver, mac, settings string) {
	h.t.Helper()
	uevent := h.do(enginetest.GuestCmd{Do: "file", Path: "/sys/bus/pci/devices/" + functionAddress + "/uevent"}).Data
	for line := range strings.Lines(uevent) {
		if d, ok := strings.CutPrefix(line, "DRIVER="); ok {
			driver = strings.TrimSpace(d)
		}
	}
	for line := range strings.Lines(h.do(enginetest.GuestCmd{Do: "run", Path: "/ip", Args: []string{"link", "show", "eth0"}}).Data) {
		if f := strings.Fields(line); len(f) > 3 && f[0] == "vf" && f[1] == "0" {
			mac, settings = f[3], strings.Join(f[4:], " ")
		}
	}
	return driver, mac, settings
}

// start starts sidewire and, by it, a QEMU whose firmware tells a file what it finds.
func (h *hardware) start(log string) (process int, output string) {
	h.t.Helper()
	r := h.do(enginetest.GuestCmd{Do: "start", Path: "/sidewire", Args: []string{
		"run", "-f", "/vmi.yaml", "--vf", "blue=" + functionAddress, "--vfio-bind", "--socket-dir", "/tmp/sw", "--",
		"/qemu-system-x86_64", "-L", "/data", "-machine", "q35", "-nodefaults", "-display", "none",
		"-chardev", "file,id=firmware,path=" + log, "-device", "isa-debugcon,iobase=0x402,chardev=firmware",
	}})
	return r.Status, r.Data
}

// text is a file of the guest's, empty if there is none.
func (h *hardware) text(file string) string {
	r, _ := h.Do(enginetest.GuestCmd{Do: "file", Path: file})
	return r.Data
}

// waitText waits for words in a file, for as long as a process runs, and shows what
// that printed if they do not come.
func (h *hardware) waitText(file, words string, process int, output string) {
	h.t.Helper()
	enginetest.Wait(4*time.Minute, func() bool {
		return strings.Contains(h.text(file), words) || h.text(fmt.Sprintf("/proc/%d/cmdline", process)) == ""
	})
	if text := h.text(file); !strings.Contains(text, words) {
		h.t.Fatalf("no %q in %s:\n%s\nsidewire says:\n%s", words, file, text, h.text(output))
	}
}

// TestSRIOVQEMURow16Row69Row71Row72Row73Row81 has sidewire, in a machine with an emulated
// card and IOMMU, give a QEMU there a virtual function.
func TestSRIOVQEMURow16Row69Row71Row72Row73Row81(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	h := startHardware(t)
	_, _, before := h.function()
	require.Contains(t, before, "spoof checking on")
	run := func(dir, function string) (status int, out string) {
		return h.sidewire("run", "-f", "/vmi.yaml", "--vf", "blue="+function, "--socket-dir", dir)
	}

	status, out := run("/tmp/other", functionAddress)
	assert.Equal(t, 2, status)
	assert.Contains(t, out, "function "+functionAddress+": driver igbvf uses it, but QEMU takes it from vfio-pci alone")
	driver, _, settings := h.function()
	assert.Equal(t, []string{"igbvf", before}, []string{driver, settings}, "nothing is touched")

	process, output := h.start("/tmp/firmware")
	// QEMU's checks are passed, and its firmware sees an igb's virtual function where the VMI wants it.
	h.waitText("/tmp/firmware", "bdf=00:05.0 id=8086:10ca", process, output)
	driver, mac, settings := h.function()
	assert.Equal(t, []string{"vfio-pci", "02:00:00:00:00:05"}, []string{driver, mac})
	for _, want := range []string{"vlan 100, qos 3", "tx rate 100", "spoof checking off", "trust on"} {
		assert.Contains(t, settings, want)
	}
	_, out = h.sidewire("status", "--json", "--control", "/tmp/sw/control.sock")
	var st Status
	require.NoError(t, json.Unmarshal([]byte(out), &st), out)
	require.Len(t, st.Interfaces, 1)
	d := st.Interfaces[0].Handoff
	assert.Equal(t, []any{"handed over", "eth0", mac, 100}, []any{d.State, d.Link, d.MAC, d.VLAN})
	require.NotEmpty(t, h.text("/sys/kernel/iommu_groups/"+d.Group+"/devices/"+functionAddress+"/class"))
	_, out = h.sidewire("status", "--control", "/tmp/sw/control.sock")
	assert.Contains(t, out, "sriov "+functionAddress+", virtual function 0 of eth0, VLAN 100 (vfio-pci, IOMMU group "+d.Group+"), bound by sidewire; handed over (inherited)")
	assert.Less(t, h.resident(process), 48<<20, "a sidecar has 64 MB by default")
	status, out = run("/tmp/other", functionAddress)
	assert.Equal(t, 2, status)
	assert.Contains(t, out, fmt.Sprintf("another process has IOMMU group %s (/dev/vfio/%s)", d.Group, d.Group))

	end := h.do(enginetest.GuestCmd{Do: "stop", N: process})
	driver, mac, settings = h.function()
	assert.Equal(t, []string{"igbvf", before}, []string{driver, settings}, "it is given back; sidewire says:\n%s", end.Data)
	assert.NotEqual(t, "02:00:00:00:00:05", mac, "its driver gives it a random one, for it had none")

	// A crash leaves the function as it is, and the next run gives it back.
	process, output = h.start("/tmp/none")
	h.waitText("/sys/bus/pci/devices/"+functionAddress+"/uevent", "DRIVER=vfio-pci", process, output)
	h.do(enginetest.GuestCmd{Do: "stop", N: process, Kind: "kill"})
	driver, _, _ = h.function()
	require.Equal(t, "vfio-pci", driver)
	_, out = run("/tmp/sw", otherFunction)
	driver, mac, settings = h.function()
	assert.Equal(t, []string{"igbvf", before}, []string{driver, settings}, "it is given back; sidewire says:\n%s", out)
	assert.NotEqual(t, "02:00:00:00:00:05", mac)
	h.byMonitor(before)
}

// resident is how many bytes of memory a process has.
func (h *hardware) resident(process int) int {
	h.t.Helper()
	for line := range strings.Lines(h.text(fmt.Sprintf("/proc/%d/status", process))) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
			kib, err := strconv.Atoi(f[1])
			require.NoError(h.t, err)
			return kib << 10
		}
	}
	h.t.Fatalf("process %d does not say how much memory it has", process)
	return 0
}

// byMonitor gives the function to a QEMU that runs, one that was never started: it
// cannot let go of a device. So sidewire ends without it, and the run after that
// QEMU's end gives the function back.
func (h *hardware) byMonitor(before string) {
	t := h.t
	t.Helper()
	qemu := h.do(enginetest.GuestCmd{Do: "start", Path: "/qemu-system-x86_64", Args: []string{
		"-L", "/data", "-machine", "q35", "-m", "64", "-nodefaults", "-display", "none", "-S",
		"-device", "pcie-root-port,id=spare,chassis=9", "-qmp", "unix:/tmp/qmp.sock,server=on,wait=off",
	}})
	args := []string{"run", "-f", "/anywhere.yaml", "--socket-dir", "/tmp/sw", "--vf", "blue=" + functionAddress}
	r := h.do(enginetest.GuestCmd{Do: "start", Path: "/sidewire", Args: append(args, "--vfio-bind", "--qmp", "/tmp/qmp.sock")})
	h.waitText(r.Data, `msg="handed over"`, r.Status, r.Data)
	end := h.do(enginetest.GuestCmd{Do: "stop", N: r.Status})
	assert.Contains(t, end.Data, "a QEMU still has it; it is given back at the next start of sidewire after that QEMU's end")
	driver, mac, _ := h.function()
	assert.Equal(t, []string{"vfio-pci", "02:00:00:00:00:05"}, []string{driver, mac})
	h.do(enginetest.GuestCmd{Do: "stop", N: qemu.Status})
	args[len(args)-1] = "blue=" + otherFunction
	_, out := h.sidewire(args...)
	driver, _, settings := h.function()
	assert.Equal(t, []string{"igbvf", before}, []string{driver, settings}, "it is given back; sidewire says:\n%s", out)
}
