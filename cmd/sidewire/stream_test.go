package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
)

// streamVM is a guest behind a NIC that is not virtio, and without a
// hypervisor: a namespace whose eth0 is a tap, joined to the socket by QEMU's
// framing.
func streamVM(t *testing.T, p *process) *vm {
	t.Helper()
	enginetest.Need(t, "root", "tun", "dhclient")
	v := &vm{t: t, ns: enginetest.NewNetNS(t), dir: t.TempDir()}
	var tap *os.File
	require.NoError(t, v.ns.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		ifr, err := unix.NewIfreq("eth0")
		if err != nil {
			return err
		}
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
			return err
		}
		tap = os.NewFile(uintptr(fd), "tap")
		return nil
	}))
	enginetest.Must(t, v.ns.SetMAC("eth0", guestMAC), v.ns.Up("eth0"))
	c, err := net.Dial("unix", p.socket())
	require.NoError(t, err)
	t.Cleanup(func() {
		c.Close()
		tap.Close()
	})
	go func() {
		b := make([]byte, 4+65536)
		for {
			n, err := tap.Read(b[4:])
			if err != nil {
				return
			}
			binary.BigEndian.PutUint32(b, uint32(n))
			if _, err := c.Write(b[:4+n]); err != nil {
				return
			}
		}
	}()
	go func() {
		b := make([]byte, 65536)
		for {
			if _, err := io.ReadFull(c, b[:4]); err != nil {
				return
			}
			n := binary.BigEndian.Uint32(b)
			if _, err := io.ReadFull(c, b[:n]); err != nil {
				return
			}
			_, _ = tap.Write(b[:n]) // a tap that is down takes nothing
		}
	}()
	v.dhclient("-1")
	t.Cleanup(func() { v.dhclient("-x") })
	return v
}

// A guest whose NIC is an e1000 has all that one with virtio has, on either way
// out.
func TestE1000(t *testing.T) {
	for name, c := range map[string]struct {
		vmi        string
		flags      []string
		addr, seen string
	}{
		"slirp":  {slirpSpec("vm", "e1000", 1, "tcp:8080", "udp:8080"), nil, "10.0.2.15/24", "10.0.2.2"},
		"socket": {withModel(spec("vm", 1, "tcp:8080", "udp:8080"), "e1000"), []string{"--path", "socket"}, "10.0.2.2/24", enginetest.OutsideIP},
		"packet": {withModel(spec("vm", 1, "tcp:8080", "udp:8080"), "e1000"), []string{"--path", "packet"}, "10.0.2.2/24", enginetest.OutsideIP},
	} {
		t.Run(name, func(t *testing.T) {
			enginetest.Need(t, "root", "netns", "tun", "nft", "dhclient", "curl")
			w := enginetest.NewWorld(t, enginetest.WorldOptions{})
			p := startSidewire(t, w, c.vmi, c.flags...)
			v := streamVM(t, p)
			assert.Contains(t, v.run("ip", "-4", "-o", "addr", "show", "dev", "eth0"), c.addr)
			v.reached(w, "8080", c.seen)
			transfer(t, v, 16<<20)
			i := p.status().Interfaces[0]
			assert.Equal(t, "e1000", i.Model)
			require.NotNil(t, i.Stream)
			assert.True(t, i.Stream.Connected)
			assert.Equal(t, "up", i.LinkState)
			assert.Equal(t, guestMAC.String(), i.MAC)
			assert.Contains(t, sidewire(t, "status", "--socket-dir", p.dir).out, "e1000, 1 queue pairs")
			if t.Failed() {
				t.Log(p.dump())
			}
		})
	}
}

// withModel gives a masquerade interface a model.
func withModel(vmi, model string) string {
	return strings.Replace(vmi, "masquerade: {}\n", "masquerade: {}\n        model: "+model+"\n", 1)
}

// QEMU's own models boot by every binding that leases: iPXE gets its lease, asks
// for a name, and fetches its script from there. Where QEMU ends and another one
// starts, it finds the same sidewire again.
func TestRow18Row19Row37ModelsInQEMU(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	enginetest.Need(t, "root", "netns", "tun", "nft", "qemu", "ipxe")
	for _, c := range []struct {
		model, binding, path, addr string
		boots                      int
	}{
		{"virtio", "slirp", "socket", "10.0.2.15", 1},
		{"e1000", "slirp", "socket", "10.0.2.15", 2},
		{"e1000e", "masquerade", "socket", "10.0.2.2", 1},
		{"rtl8139", "masquerade", "packet", "10.0.2.2", 1},
		{"ne2k_pci", "slirp", "socket", "10.0.2.15", 1},
		{"pcnet", "masquerade", "packet", "10.0.2.2", 2},
	} {
		t.Run(c.model, func(t *testing.T) {
			t.Parallel() // what a boot takes is mostly iPXE's waiting
			w := enginetest.NewWorld(t, enginetest.WorldOptions{})
			const said = "sidewire-ipxe-was-here"
			l, err := w.Outside.Listen("tcp4", enginetest.OutsideIP+":8080")
			require.NoError(t, err)
			srv := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
				_, _ = rw.Write(bootScript(said))
			})}
			go func() { _ = srv.Serve(l) }()
			t.Cleanup(func() { srv.Close() })
			boots := fmt.Sprintf("        bootOrder: 1\n        dhcpOptions: {bootFileName: \"http://%s:8080/boot.ipxe\"}\n        macAddress:", enginetest.OutsideName)
			vmi := strings.Replace(spec("vm", 1), "masquerade: {}\n", c.binding+": {}\n        model: "+c.model+"\n", 1)
			p := startSidewire(t, w, strings.Replace(vmi, "        macAddress:", boots, 1), "--path", c.path)
			for range c.boots {
				boot(t, p, qemuArgs(t, w, p), said+" "+c.addr).Stop()
			}
			assert.Equal(t, c.model, p.status().Interfaces[0].Model)
		})
	}
}
