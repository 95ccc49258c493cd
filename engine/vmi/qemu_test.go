package vmi

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
)

func masqueradeVM() VM {
	return VM{Name: "v", VCPUs: 1, Memory: 512 << 20, Interfaces: []Interface{
		{VM: "v", Name: "red", Binding: Masquerade, Model: "virtio", QueuePairs: 1}}}
}

func TestQEMUArgs(t *testing.T) {
	args, notes, err := QEMUArgs(masqueradeVM(), QEMUOptions{SocketDir: "/run/sidewire", Version: QEMUVersion{7, 2}})
	require.NoError(t, err)
	assert.Equal(t, []string{
		"-m", "512M",
		"-object", "memory-backend-memfd,id=mem,size=512M,share=on",
		"-numa", "node,memdev=mem",
		"-smp", "1",
		"-chardev", "socket,id=char-red,path=/run/sidewire/v/red.sock,reconnect=1",
		"-netdev", "vhost-user,id=net-red,chardev=char-red",
		"-device", "virtio-net-pci,id=nic-red,netdev=net-red,vectors=0,mrg_rxbuf=on,rx_queue_size=1024,tx_queue_size=1024,disable-legacy=on,romfile=",
	}, args)
	assert.Equal(t, []string{"vectors=0: this QEMU crashes with MSI-X on vhost-user unless KVM is there; use QEMU 8 or later, or KVM"}, notes)
}

func TestQEMUArgsFull(t *testing.T) {
	vm := VM{Name: "v", VCPUs: 4, Topology: CPU{2, 2, 1}, Memory: 1024e6, Hugepage: 2 << 20, Interfaces: []Interface{
		{VM: "v", Name: "any", Model: "virtio", QueuePairs: 1},
		{VM: "v", Name: "red", Model: "virtio", QueuePairs: 4, MAC: net.HardwareAddr{0xde, 0xad, 0, 0, 0xbe, 0xaf},
			BootOrder: 1, ACPIIndex: 101, PCIAddress: &PCIAddress{0, 0x81, 0, 1}},
	}}
	args, notes, err := QEMUArgs(vm, QEMUOptions{SocketDir: "/a,b", Version: QEMUVersion{10, 0}, Packed: true,
		MTU: func(i Interface) int { return map[string]int{"red": 1450}[i.Name] }})
	require.NoError(t, err)
	assert.Equal(t, []string{
		"-m", "978M",
		"-object", "memory-backend-memfd,id=mem,size=978M,share=on,hugetlb=on,hugetlbsize=2048K",
		"-numa", "node,memdev=mem",
		"-smp", "4,sockets=2,cores=2,threads=1",
		"-device", "pcie-root-port,id=gap-81,chassis=16,bus-reserve=127,bus=pcie.0,addr=10.0",
		"-device", "pcie-root-port,id=bus-81,chassis=17,bus=pcie.0,addr=11.0",
		"-device", "pci-testdev,bus=bus-81,addr=00.0,multifunction=on",
		"-chardev", "socket,id=char-red,path=/a,,b/v/red.sock,reconnect-ms=100",
		"-netdev", "vhost-user,id=net-red,chardev=char-red,queues=4",
		"-device", "virtio-net-pci,id=nic-red,netdev=net-red,mac=de:ad:00:00:be:af,mq=on,vectors=10,mrg_rxbuf=on,rx_queue_size=1024,tx_queue_size=1024,packed=on,host_mtu=1450,disable-legacy=off,bootindex=1,acpi-index=101,bus=bus-81,addr=00.1,multifunction=on",
		"-chardev", "socket,id=char-any,path=/a,,b/v/any.sock,reconnect-ms=100",
		"-netdev", "vhost-user,id=net-any,chardev=char-any",
		"-device", "virtio-net-pci,id=nic-any,netdev=net-any,vectors=4,mrg_rxbuf=on,rx_queue_size=1024,tx_queue_size=1024,packed=on,disable-legacy=on,romfile=",
	}, args)
	assert.Equal(t, []string{"an interface has a PCI address: the machine must be q35, and its bus must not be taken by other bridges"}, notes)
}

func TestQEMUArgsRefused(t *testing.T) {
	for _, c := range []struct {
		change func(*Interface)
		dir    string
		want   string
	}{
		{func(i *Interface) {}, "/" + strings.Repeat("x", 100), `interface "red": socket path /` + strings.Repeat("x", 100) + `/v/red.sock is longer than 107 bytes; choose a shorter --socket-dir`},
		{func(i *Interface) {}, "/x\ny", `interface "red": control character in the socket's path; choose another --socket-dir`},
		{func(i *Interface) { i.PCIAddress = &PCIAddress{Domain: 1} }, "/x", `interface "red": PCI address 0001:00:00.0: no guest has it; use domain 0000 and a slot of 01 to 1f`},
	} {
		vm := masqueradeVM()
		c.change(&vm.Interfaces[0])
		_, _, err := QEMUArgs(vm, QEMUOptions{SocketDir: c.dir})
		assert.EqualError(t, err, c.want)
	}
}

// A NIC that is not virtio speaks over a stream.
func TestQEMUArgsStream(t *testing.T) {
	vm := masqueradeVM()
	i := &vm.Interfaces[0]
	i.Model, i.MAC = "e1000", net.HardwareAddr{0xde, 0xad, 0, 0, 0xbe, 0xaf}
	for netdev, o := range map[string]QEMUOptions{
		"server=off":                  {Version: QEMUVersion{7, 2}, KVM: true},
		"server=off,reconnect=1":      {Version: QEMUVersion{9, 1}},
		"server=off,reconnect-ms=100": {Version: QEMUVersion{10, 0}, MTU: func(Interface) int { return 1450 }, Packed: true},
		"server=on":                   {Version: QEMUVersion{7, 2}, Client: true},
	} {
		o.SocketDir = "/a,b"
		args, notes, err := QEMUArgs(vm, o)
		require.NoError(t, err)
		assert.Equal(t, []string{
			"-netdev", "stream,id=net-red," + netdev + ",addr.type=unix,addr.path=/a,,b/v/red.sock",
			"-device", "e1000,id=nic-red,netdev=net-red,mac=de:ad:00:00:be:af,romfile=",
		}, args[8:])
		assert.Equal(t, netdev == "server=off", len(notes) == 1, notes)
	}
	i.Model, i.MAC, i.BootOrder, i.ACPIIndex, i.PCIAddress = "rtl8139", nil, 1, 5, &PCIAddress{Slot: 7}
	args, _, err := QEMUArgs(vm, QEMUOptions{SocketDir: "/x", Version: QEMUVersion{10, 0}})
	require.NoError(t, err)
	assert.Equal(t, "rtl8139,id=nic-red,netdev=net-red,bootindex=1,acpi-index=5,bus=pcie.0,addr=07.0,multifunction=on", args[len(args)-1])
}

// What is handed over takes the place of our port, and has its own place in the guest all the same.
func TestQEMUArgsHandoff(t *testing.T) {
	mac := net.HardwareAddr{0xde, 0xad, 0, 0, 0xbe, 0xaf}
	vm := VM{Name: "v", VCPUs: 2, Memory: 512 << 20, Interfaces: []Interface{
		{VM: "v", Name: "tap", Model: "virtio", QueuePairs: 2, MAC: mac, PCIAddress: &PCIAddress{Slot: 9}},
		{VM: "v", Name: "old", Model: "e1000", QueuePairs: 1, MAC: mac},
		{VM: "v", Name: "vf", Model: "virtio", QueuePairs: 1, MAC: mac, BootOrder: 2},
	}}
	args, _, err := QEMUArgs(vm, QEMUOptions{SocketDir: "/x", MTU: func(Interface) int { return 9000 }, Handoff: func(i Interface) (string, []string, bool) {
		if i.Name == "vf" {
			return "", []string{"vfio-pci", "host=0000:65:00.2"}, true
		}
		return "tap,id=" + i.NetdevID() + ",fds=3:4", []string{"csum=on"}, true
	}})
	require.NoError(t, err)
	assert.Equal(t, []string{
		"-netdev", "tap,id=net-tap,fds=3:4",
		"-device", "virtio-net-pci,id=nic-tap,netdev=net-tap,csum=on,mq=on,vectors=6,rx_queue_size=1024,host_mtu=9000,disable-legacy=on,mac=de:ad:00:00:be:af,romfile=,bus=pcie.0,addr=09.0,multifunction=on",
		"-netdev", "tap,id=net-old,fds=3:4",
		"-device", "e1000,id=nic-old,netdev=net-old,csum=on,mac=de:ad:00:00:be:af,romfile=",
		"-device", "vfio-pci,id=nic-vf,host=0000:65:00.2,bootindex=2",
	}, args[8:])
}

// QEMU has igb from 8.0 on, and every other model has always had a stream.
func TestQEMUArgsModelsRow18Row19(t *testing.T) {
	for _, model := range []string{"virtio", "e1000", "e1000e", "rtl8139", "ne2k_pci", "pcnet", "igb"} {
		vm := masqueradeVM()
		vm.Interfaces[0].Model = model
		args, _, err := QEMUArgs(vm, QEMUOptions{SocketDir: "/x", Version: QEMUVersion{8, 0}})
		require.NoError(t, err)
		driver, _, _ := strings.Cut(args[len(args)-1], ",")
		assert.Equal(t, map[bool]string{true: "virtio-net-pci", false: model}[model == "virtio"], driver)
		_, _, err = QEMUArgs(vm, QEMUOptions{SocketDir: "/x", Version: QEMUVersion{7, 2}})
		if model == "igb" {
			assert.EqualError(t, err, `interface "red": model igb: QEMU has it from 8.0 on, and this is 7.2; use model e1000e, or name another QEMU`)
			continue
		}
		assert.NoError(t, err)
	}
}

// Multiqueue: as many pairs as vCPUs, at most 128, and two vectors for each and two more; of other models one.
func TestMultiqueueRow66Row68_KubeVirt4599(t *testing.T) {
	for _, c := range []struct {
		model   string
		cpus    int
		queues  int
		device  string
		netdev  string
		warning string
	}{
		{"virtio", 1, 1, "vectors=4", "", ""},
		{"virtio", 3, 3, "mq=on,vectors=8", "queues=3", ""},
		{"virtio", 128, 128, "mq=on,vectors=258", "queues=128", ""},
		{"virtio", 200, 128, "mq=on,vectors=258", "queues=128", "200 vCPUs, but an interface gets 128 queue pairs at most"},
		{"e1000", 3, 1, "e1000,id=nic-red,netdev=net-red,romfile=", "stream", "virtio-net multiqueue request, but there are no virtio interfaces defined"},
	} {
		docs, err := Parse("v.yaml", fmt.Appendf(nil, "kind: VM\nmetadata: {name: v}\nspec: {domain: {cpu: {cores: %d}, devices: {networkInterfaceMultiqueue: true, "+
			"interfaces: [{name: red, masquerade: {}, model: %s}]}}, networks: [{name: red, pod: {}}]}", c.cpus, c.model))
		require.NoError(t, err)
		faults := Validate(docs, Options{})
		require.Empty(t, Errors(faults))
		assert.Equal(t, c.warning != "", len(faults) == 1, faults)
		for _, f := range faults {
			assert.Equal(t, c.warning, f.Message)
		}
		vm := Plan(docs)[0]
		assert.Equal(t, c.queues, vm.Interfaces[0].QueuePairs)
		args, _, err := QEMUArgs(vm, QEMUOptions{SocketDir: "/x", Version: QEMUVersion{10, 0}})
		require.NoError(t, err)
		assert.Contains(t, args[len(args)-1], c.device)
		assert.Contains(t, args[len(args)-3], c.netdev)
		assert.Equal(t, c.queues > 1, strings.Contains(args[len(args)-1], "mq=on"))
	}
}

func TestQEMUVersion(t *testing.T) {
	for out, want := range map[string]QEMUVersion{
		"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright": {7, 2},
		"QEMU emulator version 10.0.2 (qemu-10.0.2)":                                {10, 0},
		"qemu-kvm version 9.1.0 (qemu-kvm-9.1.0-15.el9)":                            {9, 1},
	} {
		got, err := ParseQEMUVersion(out)
		require.NoError(t, err)
		assert.Equal(t, want, got)
	}
	_, err := ParseQEMUVersion("bash: qemu: not found\n")
	assert.Error(t, err)
	for v, connect := range map[QEMUVersion]string{{}: "reconnect=1", {9, 1}: "reconnect=1", {9, 2}: "reconnect-ms=100", {10, 0}: "reconnect-ms=100"} {
		args, _, err := QEMUArgs(masqueradeVM(), QEMUOptions{SocketDir: "/x", Version: v})
		require.NoError(t, err)
		assert.Equal(t, "socket,id=char-red,path=/x/v/red.sock,"+connect, args[9], v)
	}
}

// backend answers what a frontend asks before it goes on, and nothing more: 4 queue pairs, VERSION_1, MTU, MQ.
func backend(c io.ReadWriter) {
	const (
		getFeatures, getProtocol, getQueueNum = 1, 15, 17
		features                              = 1<<32 | 1<<30 | 1<<22 | 1<<15 | 1<<3
		protocol                              = 1<<0 | 1<<3 // MQ, REPLY_ACK
	)
	var head [12]byte
	for {
		if _, err := io.ReadFull(c, head[:]); err != nil {
			return
		}
		request, flags := binary.LittleEndian.Uint32(head[:]), binary.LittleEndian.Uint32(head[4:])
		if _, err := io.CopyN(io.Discard, c, int64(binary.LittleEndian.Uint32(head[8:]))); err != nil {
			return
		}
		reply, value := true, uint64(0)
		switch request {
		case getFeatures:
			value = features
		case getProtocol:
			value = protocol
		case getQueueNum:
			value = 4
		default:
			reply = flags&8 != 0
		}
		if !reply {
			continue
		}
		out := binary.LittleEndian.AppendUint32(nil, request)
		out = binary.LittleEndian.AppendUint32(out, 1|4)
		out = binary.LittleEndian.AppendUint32(out, 8)
		if _, err := c.Write(binary.LittleEndian.AppendUint64(out, value)); err != nil {
			return
		}
	}
}

// places puts the addresses and vendors of NICs into got, by identifier, those behind bridges too.
func places(devices []pciDevice, got map[string]string) {
	for _, d := range devices {
		if strings.HasPrefix(d.ID, "nic-") {
			got[d.ID] = fmt.Sprintf("%02x:%02x.%d of %04x", d.Bus, d.Slot, d.Function, d.Made.Vendor)
		}
		if d.Bridge != nil {
			places(d.Bridge.Devices, got)
		}
	}
}

// pciDevice is what QMP's query-pci tells about a device.
type pciDevice struct {
	Bus, Slot, Function int
	ID                  string                         `json:"qdev_id"`
	Made                struct{ Vendor int }           `json:"id"`
	Bridge              *struct{ Devices []pciDevice } `json:"pci_bridge"`
}

// TestQEMUTakesArgsRow19Row21Row27Row28_KubeVirt1770_KubeVirtACPIIndex gives the arguments to the QEMU of this machine, lets the firmware number the buses, and looks
// where the NICs are.
func TestQEMUTakesArgsRow19Row21Row27Row28_KubeVirt1770_KubeVirtACPIIndex(t *testing.T) {
	enginetest.Need(t, "qemu")
	const binaryName = "qemu-system-x86_64"
	version, err := AskQEMUVersion(context.Background(), binaryName)
	require.NoError(t, err)
	dir, err := os.MkdirTemp("", "vmi")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })

	docs, err := Parse("v.yaml", []byte(`
kind: VM
metadata: {name: v}
spec:
  domain:
    cpu: {cores: 2, sockets: 2}
    memory: {guest: 100M}
    devices:
      networkInterfaceMultiqueue: true
      interfaces:
      - {name: any, bridge: {}, macAddress: 02-00-00-00-00-0A}
      - {name: fn1, bridge: {}, pciAddress: '0000:06:00.1'}
      - {name: fn0, bridge: {}, pciAddress: '0000:06:00.0'}
      - {name: fn7, bridge: {}, model: e1000e, pciAddress: '0000:06:00.7'}
      - {name: far, masquerade: {}, pciAddress: '0000:81:00.1', bootOrder: 1, acpiIndex: 101}
      - {name: near, bridge: {}, pciAddress: '0000:01:00.0'}
      - {name: next, bridge: {}, pciAddress: '0000:82:00.0'}
      - {name: slot, bridge: {}, pciAddress: '0000:05:02.0'}
      - {name: root, bridge: {}, pciAddress: '0000:00:07.0'}
      - {name: old, bridge: {}, model: e1000, bootOrder: 2, pciAddress: '0000:00:08.0'}
      - {name: older, bridge: {}, model: rtl8139, macAddress: 02:00:00:00:00:0b, pciAddress: '0000:00:09.0'}
      - {name: pcnet, bridge: {}, model: pcnet, pciAddress: '0000:00:0a.0'}
      - {name: ne2k, bridge: {}, model: ne2k_pci, pciAddress: '0000:00:0b.0'}
      - {name: newer, bridge: {}, model: e1000e, pciAddress: '0000:00:0c.0'}
  networks:
  - {name: any, multus: {networkName: x}}
  - {name: fn1, multus: {networkName: x}}
  - {name: fn0, multus: {networkName: x}}
  - {name: fn7, multus: {networkName: x}}
  - {name: far, pod: {}}
  - {name: near, multus: {networkName: x}}
  - {name: next, multus: {networkName: x}}
  - {name: slot, multus: {networkName: x}}
  - {name: root, multus: {networkName: x}}
  - {name: old, multus: {networkName: x}}
  - {name: older, multus: {networkName: x}}
  - {name: pcnet, multus: {networkName: x}}
  - {name: ne2k, multus: {networkName: x}}
  - {name: newer, multus: {networkName: x}}
`))
	require.NoError(t, err)
	require.Empty(t, Validate(docs, Options{}))
	vm := Plan(docs)[0]
	require.NoError(t, os.Mkdir(filepath.Join(dir, "v"), 0o700))
	for _, i := range vm.Interfaces {
		l, err := net.Listen("unix", i.SocketPath(dir))
		require.NoError(t, err)
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { defer c.Close(); backend(c) }()
			}
		}()
	}
	args, _, err := QEMUArgs(vm, QEMUOptions{SocketDir: dir, Version: version, MTU: func(Interface) int { return 1450 }})
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, binaryName, append([]string{"-machine", "q35,accel=tcg", "-nodefaults", "-display", "none", "-qmp", "stdio"}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { cancel(); _ = cmd.Wait() })

	want := map[string]string{"nic-far": "81:00.1", "nic-near": "01:00.0", "nic-next": "82:00.0", "nic-slot": "05:02.0", "nic-root": "00:07.0",
		"nic-fn0": "06:00.0", "nic-fn1": "06:00.1", "nic-fn7": "06:00.7",
		"nic-old": "00:08.0", "nic-older": "00:09.0", "nic-pcnet": "00:0a.0", "nic-ne2k": "00:0b.0", "nic-newer": "00:0c.0"}
	vendors := map[string]string{"nic-fn7": "8086", "nic-old": "8086", "nic-newer": "8086", "nic-older": "10ec", "nic-ne2k": "10ec", "nic-pcnet": "1022"}
	for id, at := range want {
		want[id] = at + " of " + cmp.Or(vendors[id], "1af4")
	}
	got := map[string]string{}
	replies := bufio.NewScanner(out)
	replies.Buffer(nil, 1<<20)
	do := func(command, arguments string) json.RawMessage {
		fmt.Fprintf(in, `{"execute": %q, "arguments": {%s}}`+"\n", command, arguments)
		for replies.Scan() {
			var r struct{ Return, Error json.RawMessage }
			if json.Unmarshal(replies.Bytes(), &r) == nil && (r.Return != nil || r.Error != nil) {
				return r.Return
			}
		}
		_ = cmd.Wait()
		require.Fail(t, "QEMU went away", "%s", stderr.String())
		return nil
	}
	ask := func(command string) json.RawMessage { return do(command, "") }
	ask("qmp_capabilities")
	// The firmware numbers the buses behind bridges, from 0 by way of ff.
	settled := enginetest.Wait(40*time.Second, func() bool {
		var buses []struct{ Devices []pciDevice }
		require.NoError(t, json.Unmarshal(ask("query-pci"), &buses))
		clear(got)
		for _, bus := range buses {
			places(bus.Devices, got)
		}
		free := got["nic-any"]
		delete(got, "nic-any")
		return maps.Equal(got, want) && strings.HasPrefix(free, "00:")
	})
	assert.Equal(t, want, got)
	assert.True(t, settled, "a NIC without an address is on the root bus")
	for property, want := range map[string]string{
		"nic-any mac": `"02:00:00:00:00:0a"`, "nic-far bootindex": "1", "nic-far acpi-index": "101", "nic-far mq": "true", "nic-far host_mtu": "1450",
		"nic-any romfile": `""`, "nic-near romfile": `""`, "nic-newer romfile": `""`, "nic-older mac": `"02:00:00:00:00:0b"`, "nic-old bootindex": "2",
		"nic-far romfile": `"efi-virtio.rom"`, "nic-old romfile": `"efi-e1000.rom"`,
	} {
		id, name, _ := strings.Cut(property, " ")
		assert.Equal(t, want, string(do("qom-get", fmt.Sprintf(`"path": "/machine/peripheral/%s", "property": %q`, id, name))), property)
	}
	cancel()
	_ = cmd.Wait() // stderr is complete only then
	assert.Empty(t, stderr.String())
}
