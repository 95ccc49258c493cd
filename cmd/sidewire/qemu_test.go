package main

import (
	"fmt"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/vhosttest"
)

// qemuArgs is what `sidewire qemu-args` prints for a running sidewire.
func qemuArgs(t *testing.T, w *enginetest.World, p *process, flags ...string) []string {
	t.Helper()
	cmd := sidewireCommand(append([]string{"qemu-args", "-f", p.vmi, "--netns", w.Pod.Path, "--socket-dir", p.dir}, flags...)...)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && assert.ErrorAs(t, err, &exit) {
		t.Fatalf("qemu-args: %s", exit.Stderr)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

// A distribution's kernel in QEMU gets its lease, reaches the outside and is
// reached from there over both its queue pairs, and does so again after a
// reboot, with the lease of before.
func TestQEMUGuest(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	for name, flags := range map[string][]string{"split": nil, "packed": {"--packed"}} {
		t.Run(name, func(t *testing.T) { testQEMUGuest(t, flags) })
	}
}

func testQEMUGuest(t *testing.T, flags []string) {
	enginetest.Need(t, "netns", "tun", "nft", "qemu", "kernel")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{MTU: 1450})
	p := startSidewire(t, w, spec("vm", 2, "tcp:80"), flags...)
	g := enginetest.Guest(t, t.TempDir(), enginetest.GuestOptions{
		Args: qemuArgs(t, w, p, flags...), Memory: -1, CPUs: -1, Machine: "q35",
	})
	for boot := range 2 {
		if boot > 0 {
			require.NoError(t, g.Reboot(time.Minute))
		}
		r, err := g.Do(enginetest.GuestCmd{Do: "dhcp"})
		require.NoError(t, err)
		assert.Equal(t, "10.0.2.2/24", r.Lease.Addr)
		assert.Equal(t, 1450, r.Lease.MTU)
		assert.Equal(t, "vm", r.Lease.Hostname)
		r, err = g.Do(enginetest.GuestCmd{Do: "link"})
		require.NoError(t, err)
		assert.Equal(t, 2, r.Link.MaxChan, "queue pairs")
		_, err = g.Do(enginetest.GuestCmd{Do: "channels", N: 2})
		require.NoError(t, err)
		assert.Equal(t, guestMAC.String(), r.Link.MAC)
		r, err = g.Do(enginetest.GuestCmd{Do: "http_get", Timeout: time.Minute,
			URL: fmt.Sprintf("http://%s:%d/data?bytes=%d", enginetest.OutsideName, enginetest.HTTPPort, 4<<20)})
		require.NoError(t, err)
		assert.Equal(t, enginetest.DataSum(4<<20), r.Sum)
		r, err = g.Do(enginetest.GuestCmd{Do: "http_put", Timeout: time.Minute, Bytes: 4 << 20,
			URL: fmt.Sprintf("http://%s:%d/data", enginetest.OutsideIP, enginetest.HTTPPort)})
		require.NoError(t, err)
		assert.Equal(t, enginetest.DataSum(4<<20), strings.TrimSpace(r.Body))
		_, err = g.Do(enginetest.GuestCmd{Do: "listen", Kind: "http", Port: 80})
		require.NoError(t, err)
		c, err := w.Outside.Dial("tcp4", enginetest.PodIP+":80", 5*time.Second)
		require.NoError(t, err)
		require.NoError(t, c.Close())
	}
	st := p.status().Interfaces[0]
	assert.Equal(t, len(flags) > 0, slices.Contains(st.Device.Features, "RING_PACKED"))
	assert.Len(t, st.Leases, 1)
	for i, pair := range st.Device.Pairs {
		assert.NotZero(t, pair.TxFrames, "pair %d", i)
		assert.NotZero(t, pair.RxFrames, "pair %d", i)
	}
	assert.NotContains(t, p.log.String(), "share=on")
}

// iPXE is a second guest that is not ours: a legacy driver without offloads.
// It gets its lease and fetches the script that option 67 names.
func TestIPXE(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	enginetest.Need(t, "netns", "tun", "nft", "qemu", "ipxe")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	const said = "sidewire-ipxe-was-here"
	l, err := w.Outside.Listen("tcp4", enginetest.OutsideIP+":8080")
	require.NoError(t, err)
	srv := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(rw, "#!ipxe\necho %s ${net0/ip}\nshell\n", said)
	})}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })
	boot := fmt.Sprintf("        bootOrder: 1\n        dhcpOptions: {bootFileName: \"http://%s:8080/boot.ipxe\"}\n        macAddress:", enginetest.OutsideIP)
	p := startSidewire(t, w, strings.Replace(spec("vm", 1), "        macAddress:", boot, 1))
	g, err := enginetest.StartIPXE(enginetest.GuestOptions{Args: qemuArgs(t, w, p), Memory: -1, CPUs: -1, Machine: "q35"})
	require.NoError(t, err)
	t.Cleanup(g.Stop)
	if err := g.WaitConsole(said+" 10.0.2.2", 60*time.Second); err != nil {
		t.Fatalf("%v\n%s\n%s", err, g.Console(), p.dump())
	}
}

// On a switch iPXE, which has no offloads, fetches its script from another guest
// whose kernel leaves segments and checksums to others; both are leased their
// addresses.
func TestIPXEOnASwitch(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	enginetest.Need(t, "root", "netns", "tun", "ip", "qemu", "ipxe", "dhclient")
	const said = "sidewire-ipxe-was-here"
	vm := strings.Replace(onLAN("vm2", "blue", 1), "bridge: {}}", `bridge: {}, bootOrder: 1, dhcpOptions: {bootFileName: "http://10.9.0.2:8080/boot.ipxe"}}`, 1)
	nad := definition("blue", `{"type": "bridge", "macspoofchk": true, `+hostLocal+`}`)
	p := startLAN(t, onLAN("vm1", "blue", 1)+vm+nad)
	b := plugVM(t, p, "vm1", vhosttest.Options{}).withLease("10.9.0.2/24")
	l, err := b.ns.Listen("tcp4", "10.9.0.2:8080")
	require.NoError(t, err)
	srv := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(rw, "#!ipxe\n%secho %s ${net0/ip}\nshell\n", strings.Repeat("# a long way\n", 5000), said)
	})}
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { srv.Close() })
	o := sidewire(t, "qemu-args", "-f", writeFile(t, "vm2.yaml", vm+nad), "--socket-dir", p.dir)
	require.Zero(t, o.code, o.err)
	assert.Contains(t, o.out, "mac="+p.nicOf("vm2/net").MAC)
	g, err := enginetest.StartIPXE(enginetest.GuestOptions{Args: strings.Split(strings.TrimSpace(o.out), "\n"), Memory: -1, CPUs: -1, Machine: "q35"})
	require.NoError(t, err)
	t.Cleanup(g.Stop)
	if err := g.WaitConsole(said+" 10.9.0.3", 60*time.Second); err != nil {
		t.Fatalf("%v\n%s\n%s", err, g.Console(), p.dump())
	}
}

// QEMU without shared memory runs on with a dead NIC; sidewire says so loudly,
// also where the memory looks as if it were shared.
func TestQEMUWithoutSharedMemory(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	enginetest.Need(t, "netns", "tun", "nft", "qemu", "ipxe")
	for _, c := range []struct {
		name, says string
		replace    []string
	}{
		{"no file", "shares no guest memory", []string{"memory-backend-memfd", "memory-backend-ram", ",share=on", ""}},
		{"private", "share=on?", []string{"share=on", "share=off"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := enginetest.NewWorld(t, enginetest.WorldOptions{})
			p := startSidewire(t, w, strings.Replace(spec("vm", 1), "        macAddress:", "        bootOrder: 1\n        macAddress:", 1))
			args := qemuArgs(t, w, p)
			for i, a := range args {
				args[i] = strings.NewReplacer(c.replace...).Replace(a)
			}
			g, err := enginetest.StartIPXE(enginetest.GuestOptions{Args: args, Memory: -1, CPUs: -1, Machine: "q35"})
			require.NoError(t, err)
			t.Cleanup(g.Stop)
			said := func() bool {
				return strings.Contains(p.log.String(), "level=ERROR") && strings.Contains(p.log.String(), c.says)
			}
			if !enginetest.Wait(30*time.Second, said) {
				t.Fatalf("not a word\n%s\n%+v", g.Console(), p.status().Interfaces[0].Device)
			}
		})
	}
}

// QEMU listens, sidewire dials.
func TestQEMUListens(t *testing.T) {
	t.Parallel() // most of its time is QEMU's
	enginetest.Need(t, "netns", "tun", "nft", "qemu", "kernel")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startSidewire(t, w, spec("vm", 1), "--mode", "client")
	args := qemuArgs(t, w, p, "--mode", "client")
	g := enginetest.Guest(t, t.TempDir(), enginetest.GuestOptions{Args: args, Memory: -1, CPUs: -1, Machine: "q35"})
	r, err := g.Do(enginetest.GuestCmd{Do: "dhcp"})
	require.NoError(t, err)
	assert.Equal(t, "10.0.2.2/24", r.Lease.Addr)
	assert.Contains(t, strings.Join(args, " "), "server=on")
}
