package usernet_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine"
	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
	"sidewire/nat/usernet"
	"sidewire/vhostuser"
	"sidewire/vhostuser/vhosttest"
)

const soon = 10 * time.Second

// kernelGuest is a guest with a kernel's TCP: a namespace whose eth0 is a tap,
// joined to the real device, engine and user network. The gateway is this
// process's loopback.
type kernelGuest struct {
	*enginetest.NetNS
	net    *usernet.Net
	engine *engine.Engine
	device *vhostuser.Device
}

type guestOptions struct {
	pairs, workers, mtu int
	features            uint64
	poll                engine.PollMode
	six                 bool
}

// gateway is the host's loopback as the guest knows it, and loopback as the host
// does.
func (o guestOptions) gateway() netip.Addr {
	if o.six {
		return netip.MustParseAddr("fd10:0:2::1")
	}
	return netip.MustParseAddr("10.0.2.2")
}

func (o guestOptions) loopback() string {
	if o.six {
		return "[::1]:0"
	}
	return "127.0.0.1:0"
}

func newKernelGuest(t testing.TB, o guestOptions) kernelGuest {
	t.Helper()
	enginetest.Need(t, "netns", "tun")
	quiet := slog.New(slog.DiscardHandler)
	o.pairs, o.workers = max(o.pairs, 1), max(o.workers, 1)
	if o.mtu == 0 {
		o.mtu = 1500
	}
	if o.features == 0 {
		o.features = vhosttest.LinuxFeatures
	}
	e, err := engine.New(engine.Config{Workers: o.workers, Poll: o.poll, Log: quiet})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	path := filepath.Join(t.TempDir(), "v.sock")
	d, err := vhostuser.NewDevice(vhostuser.Config{Name: "guest", Path: path, QueuePairs: o.pairs, MTU: o.mtu, Barrier: e.Barrier, Log: quiet})
	require.NoError(t, err)
	guest, err := e.AddPort("guest", d)
	require.NoError(t, err)
	mac, gw := frame.MAC{2, 0, 0, 0, 0, 1}, frame.MAC{2, 0, 0, 0, 0, 0}
	c := usernet.Config{
		Name: "guest", Port: guest, Guest: netip.MustParseAddr("10.0.2.15"), Gateway: netip.MustParseAddr("10.0.2.2"),
		Prefix: netip.MustParsePrefix("10.0.2.0/24"), MAC: mac, GatewayMAC: gw, MTU: o.mtu, Workers: o.workers, Loopback: true, Ping: true, Log: quiet,
	}
	if o.six {
		c.Guest, c.Gateway, c.Prefix = netip.MustParseAddr("fd10:0:2::2"), o.gateway(), netip.MustParsePrefix("fd10:0:2::/120")
	}
	for i, p := range d.Pairs() {
		w := i % o.workers
		p.SetWatcher(e.Worker(w))
		c.Pairs = append(c.Pairs, usernet.Pair{Worker: w, Room: d.Reserver(i)})
	}
	n, err := usernet.New(c)
	require.NoError(t, err)
	e.SetStages(guest, n)
	for i, p := range d.Pairs() {
		e.AddQueue(guest, p, i%o.workers)
	}
	host, err := e.AddPort("host", nowhere{})
	require.NoError(t, err)
	for i := range o.workers {
		require.NoError(t, n.Queue(i).SetWatcher(e.Worker(i)))
		e.AddQueue(host, n.Queue(i), i)
	}
	done := make(chan struct{})
	go func() { defer close(done); d.Serve(ctx) }()
	ns := enginetest.NewNetNS(t)
	g, err := vhosttest.StartTapGuest(vhosttest.TapOptions{
		Options: vhosttest.Options{Path: path, Features: o.features, MAC: mac, QueuePairs: o.pairs, MTU: uint64(o.mtu)}, NetNS: ns.Path,
	})
	require.NoError(t, err)
	t.Cleanup(func() {
		assert.NoError(t, g.Close())
		cancel()
		e.Close()
		d.Close()
		<-done
		assert.NoError(t, n.Close())
	})
	if o.six {
		enginetest.Must(t, ns.SetMTU("eth0", o.mtu), ns.Addr("eth0", "fd10:0:2::2/120"),
			ns.Run("ip", "-6", "neigh", "add", o.gateway().String(), "lladdr", gw.String(), "dev", "eth0", "nud", "permanent"))
		return kernelGuest{NetNS: ns, net: n, engine: e, device: d}
	}
	enginetest.Must(t, ns.SetMTU("eth0", o.mtu), ns.Addr("eth0", "10.0.2.15/24"), ns.Route("0.0.0.0/0", "10.0.2.2"))
	return kernelGuest{NetNS: ns, net: n, engine: e, device: d}
}

func sumOf(r io.Reader) string {
	h := sha256.New()
	io.Copy(h, r)
	return hex.EncodeToString(h.Sum(nil))
}

type nowhere struct{}

func (nowhere) Push(int, []*frame.Frame) {}

// A guest of each kind sends and receives what it should, through TCP of its
// own kernel.
func TestKernelGuestTCP(t *testing.T) {
	const size = 8 << 20
	for name, o := range map[string]guestOptions{
		"linux":            {},
		"two queues":       {pairs: 2, workers: 2},
		"jumbo":            {mtu: 65520},
		"without offloads": {features: vhosttest.NoOffloads},
		"legacy":           {features: vhosttest.LegacyFeatures},

		"Row61 linux":            {six: true},
		"Row61 two queues":       {six: true, pairs: 2, workers: 2},
		"Row61 jumbo":            {six: true, mtu: 65520},
		"Row61 without offloads": {six: true, features: vhosttest.NoOffloads},
		"Row61 legacy":           {six: true, features: vhosttest.LegacyFeatures},
	} {
		t.Run(name, func(t *testing.T) {
			g := newKernelGuest(t, o)
			l, err := net.Listen("tcp", o.loopback())
			require.NoError(t, err)
			defer l.Close()
			port := l.Addr().(*net.TCPAddr).Port
			sums := make(chan string, 1)
			go func() { // gets size bytes and sends as many back
				c, err := l.Accept()
				if err != nil {
					return
				}
				defer c.Close()
				sums <- sumOf(io.LimitReader(c, size))
				io.Copy(c, enginetest.Data(size))
			}()
			c, err := g.Dial("tcp", netip.AddrPortFrom(o.gateway(), uint16(port)).String(), soon)
			require.NoError(t, err)
			defer c.Close()
			require.NoError(t, c.SetDeadline(time.Now().Add(2*soon)))
			go io.Copy(c, enginetest.Data(size))
			got := sumOf(io.LimitReader(c, size))
			assert.Equal(t, enginetest.DataSum(size), got)
			assert.Equal(t, enginetest.DataSum(size), <-sums)
		})
	}
}

// BenchmarkKernelGuest measures TCP between a guest and loopback, by iperf3.
func BenchmarkKernelGuest(b *testing.B) {
	enginetest.Need(b, "root", "netns", "tun", "iperf3")
	for _, mtu := range []int{1500, 65520} {
		for _, dir := range []string{"up", "down"} {
			b.Run(strings.Join([]string{dir, map[int]string{1500: "1500", 65520: "65520"}[mtu]}, "-"), func(b *testing.B) {
				g := newKernelGuest(b, guestOptions{mtu: mtu})
				server := exec.Command("iperf3", "-s", "-1", "-B", "127.0.0.1", "-p", "5299")
				require.NoError(b, server.Start())
				defer server.Wait()
				defer server.Process.Kill()
				args := []string{"-c", "10.0.2.2", "-p", "5299", "-J", "-t", "2"}
				if dir == "down" {
					args = append(args, "-R")
				}
				var r struct {
					End struct {
						Received struct {
							BPS   float64 `json:"bits_per_second"`
							Bytes float64 `json:"bytes"`
						} `json:"sum_received"`
					}
				}
				enginetest.Eventually(b, soon, func() bool {
					out, err := g.Command("iperf3", args...).Output()
					return err == nil && json.Unmarshal(out, &r) == nil && r.End.Received.BPS > 0
				})
				b.ReportMetric(r.End.Received.BPS/1e9, "Gbit/s")
				busy := uint64(0)
				wakeups, turns := uint64(0), uint64(0)
				for _, w := range g.engine.WorkerStats() {
					busy += w.BusyNS
					wakeups += w.Wakeups
					turns += w.Turns
				}
				p := g.device.Status().Pairs[0]
				b.ReportMetric(float64(p.RxBytes)/float64(p.RxFrames), "B/frame-rx")
				b.ReportMetric(float64(p.RxDirect)/float64(p.RxFrames), "direct")
				per64k := r.End.Received.Bytes / 65536
				b.ReportMetric(float64(wakeups)/per64k, "wakeups/64KiB")
				b.ReportMetric(float64(turns)/per64k, "turns/64KiB")
				b.ReportMetric(float64(busy)/r.End.Received.Bytes, "busy-s/GB")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}
