package dhcp

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// serveTap makes a tap named eth0 in the namespace and lets s answer what the
// namespace sends on it, as a worker would.
func serveTap(t *testing.T, ns *enginetest.NetNS, s *Server) {
	t.Helper()
	var fd int
	require.NoError(t, ns.Do(func() (err error) {
		if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0); err != nil {
			return err
		}
		ifr, err := unix.NewIfreq("eth0")
		if err != nil {
			return err
		}
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		return unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}))
	tap := os.NewFile(uintptr(fd), "tap")
	enginetest.Must(t, ns.SetMAC("eth0", guestMAC), ns.Up("eth0"))
	done := make(chan struct{})
	t.Cleanup(func() { tap.Close(); <-done })
	go func() {
		defer close(done)
		b, p, start := new(frame.Batch), make([]byte, 2048), time.Now()
		for {
			n, err := tap.Read(p)
			if err != nil {
				return
			}
			b.Now = int64(time.Since(start))
			enginetest.Fill(b, p[:n])
			s.Process(b)
			for i := range b.Len() {
				if f := b.Frame(i); f.Out == guestPort {
					tap.Write(f.Bytes())
				}
			}
		}
	}()
}

// client is a dhclient in a namespace, with its own files, resolv.conf and
// host name.
type client struct {
	t   *testing.T
	ns  *enginetest.NetNS
	dir string
}

const clientConf = `
option private-240 code 240 = text;
request subnet-mask, routers, domain-name, domain-name-servers, domain-search, host-name, interface-mtu,
	ntp-servers, tftp-server-name, bootfile-name, private-240;
send host-name "guest";
timeout 20;
`

func newClient(t *testing.T, ns *enginetest.NetNS) *client {
	c := &client{t, ns, t.TempDir()}
	require.NoError(t, os.WriteFile(c.path("conf"), []byte(clientConf), 0o644))
	require.NoError(t, os.WriteFile(c.path("resolv.conf"), nil, 0o644))
	t.Cleanup(func() { c.run("-x") })
	return c
}

func (c *client) path(name string) string { return filepath.Join(c.dir, name) }

func (c *client) read(name string) string {
	b, err := os.ReadFile(c.path(name))
	require.NoError(c.t, err)
	return string(b)
}

// run runs dhclient to the point where it goes to the background.
func (c *client) run(args ...string) (string, error) {
	program, err := enginetest.Program("dhclient")
	require.NoError(c.t, err)
	script := `mount --bind "$1/resolv.conf" "$(readlink -f /etc/resolv.conf)" && shift && exec "$@"`
	args = append([]string{"-m", "--uts", "sh", "-c", script, "sh", c.dir, program, "-v", "-cf", c.path("conf"),
		"-lf", c.path("leases"), "-pf", c.path("pid")}, append(args, "eth0")...)
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	inNS := c.ns.Command("unshare", args...)
	cmd := exec.CommandContext(ctx, inNS.Path, inNS.Args[1:]...)
	out, err := os.Create(c.path("output")) // a pipe would be held open by the daemon
	require.NoError(c.t, err)
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	err = cmd.Run()
	return c.read("output"), err
}

// The real client of many guests takes the lease, its kernel the address, its
// resolv.conf the servers; it gives up an address of another network when it
// hears NAK (#13601), renews, and releases.
func TestDhclientRow30Row31Row32Row64_KubeVirt1778(t *testing.T) {
	enginetest.Need(t, "dhclient", "netns", "tun", "ip")
	cfg := full()
	cfg.Now = nil
	cfg.Search = append(cfg.Search, strings.Repeat("long.", 20)+"example", "-bad.example")
	s, err := New(cfg)
	require.NoError(t, err)
	ns := enginetest.NewNetNS(t)
	serveTap(t, ns, s)
	c := newClient(t, ns)
	require.NoError(t, os.WriteFile(c.path("leases"), []byte(`lease {
  interface "eth0";
  fixed-address 192.168.77.5;
  option subnet-mask 255.255.255.0;
  option dhcp-server-identifier 192.168.77.1;
  renew 0 2099/01/01 00:00:00;
  rebind 0 2099/01/01 00:00:00;
  expire 0 2099/01/01 00:00:00;
}
`), 0o644))

	out, err := c.run("-1")
	require.NoError(t, err, out)
	require.Contains(t, out, "DHCPNAK")
	require.Contains(t, out, "bound to 10.0.2.2")
	show, err := ns.Command("ip", "-4", "-o", "addr", "show", "dev", "eth0").CombinedOutput()
	require.NoError(t, err)
	assert.Contains(t, string(show), "10.0.2.2/24")
	assert.NotContains(t, string(show), "192.168.77")
	link, err := ns.Command("ip", "-o", "link", "show", "dev", "eth0").CombinedOutput()
	require.NoError(t, err)
	assert.Contains(t, string(link), "mtu 1450")
	route, err := ns.Command("ip", "route").CombinedOutput()
	require.NoError(t, err)
	assert.Contains(t, string(route), "default via 10.0.2.1 dev eth0")

	resolv, err := ParseResolvConf(strings.NewReader(c.read("resolv.conf")))
	require.NoError(t, err)
	assert.Equal(t, cfg.DNS, resolv.Servers)
	assert.Equal(t, cfg.Search[:len(cfg.Search)-1], trimDots(resolv.Search))

	lease := c.read("leases")
	for _, want := range []string{
		`option tftp-server-name "tftp.example.com";`, `option bootfile-name "pxelinux.0";`,
		`option ntp-servers 127.0.0.1,127.0.0.3;`, `option private-240 "private.options.kubevirt.io";`,
		`option host-name "vm";`, `option interface-mtu 1450;`, `option dhcp-lease-time 86313600;`,
		`option dhcp-server-identifier 10.0.2.1;`,
	} {
		assert.Contains(t, lease, want)
	}

	require.Len(t, s.Leases(), 1)
	l := s.Leases()[0]
	assert.Equal(t, guestMAC, l.MAC)
	assert.Equal(t, netip.MustParseAddr("10.0.2.2"), l.Addr)
	assert.Equal(t, "guest", l.Hostname)

	out, err = c.run("-x")
	require.NoError(t, err, out)
	out, err = c.run("-1")
	require.NoError(t, err, out)
	require.Contains(t, out, "DHCPREQUEST for 10.0.2.2 on eth0 to 255.255.255.255", "from INIT-REBOOT")
	require.NotContains(t, out, "DHCPDISCOVER")

	// The engine answers ARP for the gateway in another stage.
	enginetest.Must(t, ns.Run("ip", "neigh", "replace", "10.0.2.1", "lladdr", "02:00:00:00:00:00", "dev", "eth0"))
	out, err = c.run("-r")
	require.NoError(t, err, out)
	enginetest.Eventually(t, 5*time.Second, func() bool { return len(s.Leases()) == 0 })
	st := s.Stats()
	assert.EqualValues(t, 1, st.Nak)
	assert.EqualValues(t, 1, st.Release)
	assert.Zero(t, st.Bad)
	assert.Zero(t, st.Truncated)
}

// trimDots takes away the final dots that a client writes to resolv.conf.
func trimDots(ds []string) (out []string) {
	for _, d := range ds {
		out = append(out, strings.TrimSuffix(d, "."))
	}
	return out
}
