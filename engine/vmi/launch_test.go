package vmi

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func launchVM(model string) VM {
	return VM{Name: "v", VCPUs: 2, Memory: 512 << 20, Interfaces: []Interface{{VM: "v", Name: "red", Model: model, QueuePairs: 1}}}
}

// What the user gave stands; what sidewire needs of the memory is added or mended, and told.
func TestLaunchMemory(t *testing.T) {
	const own = " -object memory-backend-memfd,id=sidewire-mem,size=1073741824,share=on -machine memory-backend=sidewire-mem"
	for _, c := range []struct{ name, given, want, note string }{
		{"none", "", " -smp 2 -m 512M -object memory-backend-memfd,id=mem,size=512M,share=on -numa node,memdev=mem", ""},
		{"size", "-m 1G", "-m 1G -smp 2" + own, ""},
		{"size in MiB", "-m 1024", "-m 1024 -smp 2" + own, ""},
		{"size as a key", "-m slots=2,size=1G,maxmem=4G", "-m slots=2,size=1G,maxmem=4G -smp 2" + own, ""},
		{"processors", "-m 1G -smp 4,sockets=2", "-m 1G -smp 4,sockets=2" + own, ""},
		{"a value like an option", "-append -m -m 1G", "-append -m -m 1G -smp 2" + own, ""},
		{"an image", "disk.img -m 1G", "disk.img -m 1G -smp 2" + own, ""},
		{"a path", "-m 1G -mem-path /dev/shm -S", "-m 1G -S -smp 2 -object memory-backend-file,id=sidewire-mem,mem-path=/dev/shm,size=1073741824,share=on -machine memory-backend=sidewire-mem", "-mem-path"},
		{"shared", "-m 1G -object memory-backend-memfd,id=x,size=1G,share=on -numa node,memdev=x", "=", ""},
		{"memfd, shared unless said otherwise", "-m 1G -object memory-backend-memfd,id=x,size=1G -numa node,memdev=x", "=", ""},
		{"ram", "-m 1G -object memory-backend-ram,id=x,size=1G -machine q35,memory-backend=x",
			"-m 1G -object memory-backend-memfd,id=x,size=1G,share=on -machine q35,memory-backend=x -smp 2", "memory x, a memory-backend-ram, became a memory-backend-memfd with share=on"},
		{"private", "-m 1G -object memory-backend-file,id=x,mem-path=/a,,b,size=1G,share=off,prealloc=on -numa node,memdev=x",
			"-m 1G -object memory-backend-file,id=x,mem-path=/a,,b,size=1G,share=on,prealloc=on -numa node,memdev=x -smp 2", "share=on"},
		{"private by default", "-m 1G -object memory-backend-file,mem-path=/a,size=1G,id=x -numa node,memdev=x",
			"-m 1G -object memory-backend-file,mem-path=/a,size=1G,id=x,share=on -numa node,memdev=x -smp 2", "share=on"},
		{"JSON", `-m 1G -object {"qom-type":"memory-backend-ram","id":"x","size":1073741824} -machine memory-backend=x`,
			`-m 1G -object {"id":"x","qom-type":"memory-backend-memfd","share":true,"size":1073741824} -machine memory-backend=x -smp 2`, "became"},
		{"another's", "-m 1G -object memory-backend-ram,id=n,size=1G -device nvdimm,memdev=n", "-m 1G -object memory-backend-ram,id=n,size=1G -device nvdimm,memdev=n -smp 2" + own, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			want := c.want
			if want == "=" {
				want = c.given + " -smp 2"
			}
			given := append([]string{"qemu-system-x86_64"}, strings.Fields(c.given)...)
			before := strings.Join(given, " ")
			args, notes, err := QEMULaunch(launchVM("virtio"), QEMUOptions{SocketDir: "/x", Version: QEMUVersion{9, 2}}, given)
			require.NoError(t, err)
			got, _, _ := strings.Cut(strings.Join(args[1:], " "), " -chardev")
			assert.Equal(t, strings.TrimSpace(want), got)
			assert.Equal(t, before, strings.Join(given, " "), "the user's own")
			if c.note == "" {
				assert.Empty(t, notes)
			} else {
				assert.Contains(t, strings.Join(notes, "\n"), c.note)
			}
		})
	}
}

// What cannot be mended is one line that says how to.
func TestLaunchRefuses(t *testing.T) {
	for given, want := range map[string]string{
		"-daemonize":   "-daemonize: sidewire ends when QEMU does",
		"-m lots":      `-m lots: "lots" is no size; write it like 1G`,
		"-m -1":        "is no size",
		"-m nan":       "is no size",
		"-mem-path /x": "-mem-path /x without -m",
		"-object memory-backend-epc,id=x,size=1G -numa node,memdev=x": "sidewire cannot see such memory; use memory-backend-memfd with share=on",
		"-machine pc": "use -machine q35",
	} {
		vm := launchVM("virtio")
		vm.Interfaces[0].PCIAddress = &PCIAddress{Slot: 9}
		_, _, err := QEMULaunch(vm, QEMUOptions{SocketDir: "/x"}, append([]string{"qemu-system-x86_64"}, strings.Fields(given)...))
		require.Error(t, err, given)
		assert.Contains(t, err.Error(), want)
		assert.NotContains(t, err.Error(), "\n")
	}
}

// Where no port of ours sees the guest's memory it stays as it is; and QEMU gets no NIC that nobody asked for.
func TestLaunchWithoutPorts(t *testing.T) {
	handed := QEMUOptions{SocketDir: "/x", Version: QEMUVersion{9, 2}, Handoff: func(i Interface) (string, []string, bool) {
		return "", []string{"vfio-pci", "host=0000:65:00.2"}, true
	}}
	args, notes, err := QEMULaunch(launchVM("virtio"), handed, strings.Fields("qemu-system-x86_64 -m 1G -smp 1 -enable-kvm"))
	require.NoError(t, err)
	assert.Empty(t, notes)
	assert.Equal(t, "qemu-system-x86_64 -m 1G -smp 1 -enable-kvm -device vfio-pci,id=nic-red,host=0000:65:00.2 -nic none", strings.ReplaceAll(strings.Join(args, " "), ",romfile=", ""))
	args, _, err = QEMULaunch(launchVM("e1000"), QEMUOptions{SocketDir: "/x", Version: QEMUVersion{9, 2}}, strings.Fields("qemu-system-x86_64 -m 1G -netdev user,id=u -device e1000,netdev=u"))
	require.NoError(t, err)
	assert.Contains(t, strings.Join(args, " "), "-m 1G -netdev user,id=u -device e1000,netdev=u -smp 2 -netdev stream")
	assert.NotContains(t, strings.Join(args, " "), "memory-backend")
}

// A wrapper stands before QEMU and its own options are not QEMU's.
func TestLaunchWrapper(t *testing.T) {
	at, ok := QEMUProgram(strings.Fields("nice -n 5 /usr/bin/qemu-system-x86_64 -m 1G"))
	assert.True(t, ok)
	assert.Equal(t, 3, at)
	_, ok = QEMUProgram([]string{"./start.sh"})
	assert.False(t, ok)
	args, _, err := QEMULaunch(launchVM("e1000"), QEMUOptions{SocketDir: "/x"}, strings.Fields("env -m 5 qemu-system-x86_64"))
	require.NoError(t, err)
	assert.Contains(t, args, "512M")
}

// KVM is there only where it must be.
func TestLaunchKVM(t *testing.T) {
	for given, want := range map[string]bool{
		"": false, "-enable-kvm": true, "-accel kvm": true, "-accel kvm,kernel-irqchip=on": true, "-accel tcg": false, "-accel tcg -accel kvm": false,
		"-machine q35,accel=kvm": true, "-M pc -machine accel=kvm:tcg": false, "-machine accel=tcg": false,
	} {
		assert.Equal(t, want, scanQEMU(append([]string{"qemu"}, strings.Fields(given)...)).kvm(), given)
	}
}

// Whatever stands on a command line, it is completed or refused in one line, and what is not ours is still there.
func FuzzLaunch(f *testing.F) {
	for _, s := range []string{
		"-m 1G -object memory-backend-ram,id=x,size=1G -numa node,memdev=x", `-object {"qom-type":"memory-backend-ram","id":"x"} -machine memory-backend=x -m 1`,
		"-m", "-mem-path /x -m 1e300", "--m =,,size=", "-machine ,,= -object ,id=,, -numa memdev=", "-mem-path a -m 1 -mem-path b -S -mem-path c", "-m 0x10G", `-object {}`,
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		given := append([]string{"qemu-system-x86_64"}, strings.Fields(s)...)
		args, _, err := QEMULaunch(launchVM("virtio"), QEMUOptions{SocketDir: "/x", Version: QEMUVersion{9, 2}}, given)
		switch {
		case err != nil && strings.Contains(err.Error(), "\n"):
			t.Fatalf("%q", err)
		case err == nil && (len(args) < 5 || args[0] != given[0] || !strings.Contains(strings.Join(args, " "), "vhost-user")):
			t.Fatalf("%q", args)
		}
	})
}
