package enginetest

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestCPIO reads the archive back by the rules of the kernel's unpacker.
func TestCPIO(t *testing.T) {
	var b bytes.Buffer
	c := &cpio{w: bufio.NewWriter(&b)}
	c.add("dir", 0o040755, nil)
	c.device("dir/console", 5, 1)
	c.add("a", 0o100644, []byte("12345"))
	require.NoError(t, c.close())
	var got []string
	for raw := b.Bytes(); ; {
		require.Equal(t, "070701", string(raw[:6]))
		field := func(i int) int {
			n, err := strconv.ParseUint(string(raw[6+8*i:14+8*i]), 16, 32)
			require.NoError(t, err)
			return int(n)
		}
		mode, size, major, minor, namesize := field(1), field(6), field(9), field(10), field(11)
		name := string(raw[110 : 110+namesize-1])
		require.Zero(t, raw[110+namesize-1])
		body := (110 + namesize + 3) &^ 3
		got = append(got, fmt.Sprintf("%s %o %d:%d %q", name, mode, major, minor, raw[body:body+size]))
		if name == "TRAILER!!!" {
			break
		}
		raw = raw[(body+size+3)&^3:]
	}
	assert.Equal(t, []string{`dir 40755 0:0 ""`, `dir/console 20600 5:1 ""`, `a 100644 0:0 "12345"`, `TRAILER!!! 0 0:0 ""`}, got)
}

// TestModuleOrder: a module comes behind all that it needs.
func TestModuleOrder(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
	}
	write("modules.dep", "k/virtio.ko:\nk/ring.ko: k/virtio.ko\nk/virtio_pci.ko: k/ring.ko k/virtio.ko\n"+
		"k/net-failover.ko: k/failover.ko\nk/failover.ko:\nk/virtio_net.ko: k/net-failover.ko k/failover.ko k/ring.ko k/virtio.ko\nk/other.ko:\n")
	write("modules.builtin", "k/e1000.ko\n")
	got, err := moduleOrder(dir, nil)
	require.NoError(t, err)
	assert.Equal(t, "k/virtio.ko k/ring.ko k/virtio_pci.ko k/failover.ko k/net-failover.ko k/virtio_net.ko", strings.Join(got, " "))

	write("modules.dep", "k/virtio_pci.ko:\n")
	_, err = moduleOrder(dir, nil)
	assert.ErrorContains(t, err, "no module virtio_net")
	write("modules.builtin", "k/virtio_net.ko\n")
	got, err = moduleOrder(dir, nil)
	require.NoError(t, err)
	assert.Equal(t, []string{"k/virtio_pci.ko"}, got, "what is built in need not be loaded")

	write("modules.dep", "k/virtio_pci.ko:\nk/core.ko:\nk/vfio-pci.ko: k/core.ko\n")
	got, err = moduleOrder(dir, []string{"vfio-pci"})
	require.NoError(t, err)
	assert.Equal(t, []string{"k/virtio_pci.ko", "k/core.ko", "k/vfio-pci.ko"}, got)
	_, err = moduleOrder(dir, []string{"igb"})
	assert.ErrorContains(t, err, "no module igb")
}

func TestInitramfsRefusesDynamicInit(t *testing.T) {
	var b bytes.Buffer
	assert.ErrorContains(t, BuildInitramfs(&b, Initramfs{Init: "/bin/sh", Modules: t.TempDir()}), "dynamically linked")
	assert.Error(t, BuildInitramfs(&b, Initramfs{Init: os.DevNull, Modules: t.TempDir()}))
}

// TestGuestBoots has QEMU's own user network, so it tests the guest and the
// launcher, and nothing else of sidewire.
func TestGuestBoots(t *testing.T) {
	Need(t, "qemu", "kernel")
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	srv := &http.Server{Handler: Handler()}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })
	forward, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	forward.Close()

	start := time.Now()
	vm := Guest(t, t.TempDir(), GuestOptions{Args: []string{
		"-netdev", "user,id=n0,hostfwd=tcp:" + forward.Addr().String() + "-:80",
		"-device", "virtio-net-pci,netdev=n0,mac=02:00:00:00:00:07,host_mtu=1400,romfile=",
	}})
	t.Logf("ready after %v", time.Since(start))

	r, err := vm.Do(GuestCmd{Do: "dhcp"})
	require.NoError(t, err)
	assert.Equal(t, []string{"10.0.2.15/24", "10.0.2.2"}, []string{r.Lease.Addr, r.Lease.Server})
	assert.Equal(t, []string{"10.0.2.2"}, r.Lease.Routers)

	r, err = vm.Do(GuestCmd{Do: "link"})
	require.NoError(t, err)
	assert.Equal(t, []any{"02:00:00:00:00:07", 1400, true, "virtio_net"}, []any{r.Link.MAC, r.Link.MTU, r.Link.Carrier, r.Link.Driver})
	assert.Contains(t, r.Link.Addrs, "10.0.2.15/24")
	assert.NotZero(t, r.Stats["rx_queue_0_packets"], "%v", r.Stats)

	r, err = vm.Do(GuestCmd{Do: "arp", Host: "10.0.2.2"})
	require.NoError(t, err)
	assert.Equal(t, "52:55:0a:00:02:02", r.MAC)
	r, err = vm.Do(GuestCmd{Do: "ping", Host: "10.0.2.2", N: 3, Bytes: 1000})
	require.NoError(t, err)
	assert.Equal(t, []int{3, 3}, []int{r.Sent, r.Received})
	_, err = vm.Do(GuestCmd{Do: "ping", Host: "10.0.2.77", Timeout: 2 * time.Second})
	assert.ErrorContains(t, err, "no answer")

	testGuestHTTP(t, vm, l.Addr().(*net.TCPAddr).Port, forward.Addr().String())
	testGuestSettings(t, vm)

	require.NoError(t, vm.Reboot(60*time.Second))
	_, err = vm.Do(GuestCmd{Do: "dhcp"})
	require.NoError(t, err)
	_, err = vm.Do(GuestCmd{Do: "poweroff"})
	require.NoError(t, err)
	select {
	case <-vm.Exited():
	case <-time.After(20 * time.Second):
		t.Error("poweroff did not end QEMU")
	}
	_, err = vm.Do(GuestCmd{Do: "link"})
	assert.ErrorIs(t, err, errAgentGone)
}

func testGuestHTTP(t *testing.T, vm *VM, port int, forwarded string) {
	url := fmt.Sprintf("http://10.0.2.2:%d/data", port)
	r, err := vm.Do(GuestCmd{Do: "http_get", URL: url + "?bytes=300000"})
	require.NoError(t, err)
	assert.Equal(t, []any{200, int64(300000), DataSum(300000)}, []any{r.Status, r.Bytes, r.Sum})
	r, err = vm.Do(GuestCmd{Do: "http_put", URL: url, Bytes: 300001})
	require.NoError(t, err)
	assert.Equal(t, []any{200, DataSum(300001), DataSum(300001)}, []any{r.Status, r.Body, r.Sum})
	sum := sha256.Sum256([]byte(r.Body))
	assert.NotEqual(t, hex.EncodeToString(sum[:]), r.Sum)

	_, err = vm.Do(GuestCmd{Do: "listen", Kind: "http", Port: 80})
	require.NoError(t, err)
	resp, err := http.Get("http://" + forwarded + "/whoami")
	require.NoError(t, err)
	defer resp.Body.Close()
	r, err = vm.Do(GuestCmd{Do: "peers", Port: 80})
	require.NoError(t, err)
	require.Len(t, r.Peers, 1)
	assert.True(t, strings.HasPrefix(r.Peers[0], "10.0.2.2:"), r.Peers[0])
	_, err = vm.Do(GuestCmd{Do: "unlisten", Port: 80})
	require.NoError(t, err)
}

func testGuestSettings(t *testing.T, vm *VM) {
	_, err := vm.Do(GuestCmd{Do: "listen", Kind: "udp", Port: 7})
	require.NoError(t, err)
	r, err := vm.Do(GuestCmd{Do: "udp", Host: "127.0.0.1", Port: 7, N: 5, Bytes: 5000})
	require.NoError(t, err)
	assert.Equal(t, []int{5, 5}, []int{r.Sent, r.Received})
	_, err = vm.Do(GuestCmd{Do: "listen", Kind: "echo", Port: 8})
	require.NoError(t, err)
	r, err = vm.Do(GuestCmd{Do: "tcp", Host: "127.0.0.1", Port: 8, Data: "hello"})
	require.NoError(t, err)
	assert.Equal(t, "hello", r.Data)

	r, err = vm.Do(GuestCmd{Do: "offloads", Offload: map[string]bool{"gro": false}})
	require.NoError(t, err)
	assert.False(t, r.Link.Offload["gro"])
	_, err = vm.Do(GuestCmd{Do: "channels", N: 2})
	assert.Error(t, err, "there is one queue pair")
	r, err = vm.Do(GuestCmd{Do: "file", Path: "/proc/cmdline"})
	require.NoError(t, err)
	assert.Contains(t, r.Data, "console=ttyS0")
	r, err = vm.Do(GuestCmd{Do: "dmesg"})
	require.NoError(t, err)
	assert.Contains(t, r.Data, "Run /init")
	_, err = vm.Do(GuestCmd{Do: "nonsense"})
	assert.ErrorContains(t, err, "no such command")

	off := map[string]any{"name": "n0", "up": false}
	_, err = vm.QMP.Do("set_link", off)
	require.NoError(t, err)
	carrier := func(want bool) {
		Eventually(t, 10*time.Second, func() bool {
			r, err := vm.Do(GuestCmd{Do: "link"})
			return err == nil && r.Link.Carrier == want
		})
	}
	carrier(false)
	off["up"] = true
	_, err = vm.QMP.Do("set_link", off)
	require.NoError(t, err)
	carrier(true)
	_, err = vm.QMP.Do("nonsense", nil)
	assert.Error(t, err)
}

// TestGuestExplains: a guest that cannot boot says why.
func TestGuestExplains(t *testing.T) {
	Need(t, "qemu", "kernel")
	kernel, _, err := GuestKernel()
	require.NoError(t, err)
	empty := filepath.Join(t.TempDir(), "empty.cpio")
	f, err := os.Create(empty)
	require.NoError(t, err)
	c := &cpio{w: bufio.NewWriter(f)}
	require.NoError(t, c.close())
	require.NoError(t, f.Close())
	_, err = StartGuest(GuestOptions{Kernel: kernel, Initramfs: empty, NoReboot: true})
	require.Error(t, err)
	assert.Contains(t, err.Error(), "not syncing")

	_, err = StartGuest(GuestOptions{Kernel: kernel, Initramfs: empty, Args: []string{"-nonsense"}})
	require.Error(t, err)
	assert.Contains(t, err.Error(), "invalid option")
}

// TestIPXE boots from a script that QEMU's own DHCP server names.
func TestIPXE(t *testing.T) {
	Need(t, "qemu", "ipxe")
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	require.NoError(t, err)
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "#!ipxe\necho script of ${net0/ip} says hello\npoweroff\n")
	})}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })
	url := fmt.Sprintf("http://10.0.2.2:%d/boot.ipxe", l.Addr().(*net.TCPAddr).Port)
	vm, err := StartIPXE(GuestOptions{Args: []string{
		"-netdev", "user,id=n0,bootfile=" + url,
		"-device", "virtio-net-pci,netdev=n0,bootindex=1",
	}})
	require.NoError(t, err)
	t.Cleanup(vm.Stop)
	require.NoError(t, vm.WaitConsole("script of 10.0.2.15 says hello", 60*time.Second))
}
