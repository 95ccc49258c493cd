package vhosttest

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine"
	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
	"sidewire/vhostuser"
)

// toPort sends every frame to one port.
type toPort frame.PortID

func (p toPort) Process(b *frame.Batch) {
	for i := range b.Len() {
		if f := b.Frame(i); f.Reason == frame.ReasonNone {
			f.Out = frame.PortID(p)
		}
	}
}

// wire is an engine with two guests' devices that are joined like by a cable.
func wire(t testing.TB, pairs, workers int) (paths [2]string, devices [2]*vhostuser.Device) {
	t.Helper()
	_, paths, devices = wireEngine(t, pairs, workers)
	return paths, devices
}

// wireEngine is wire that also tells by which engine.
func wireEngine(t testing.TB, pairs, workers int) (e *engine.Engine, paths [2]string, devices [2]*vhostuser.Device) {
	t.Helper()
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	e, err := engine.New(engine.Config{Workers: workers, Log: quiet})
	require.NoError(t, err)
	t.Cleanup(e.Close)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	var ids [2]frame.PortID
	for i := range paths {
		paths[i] = filepath.Join(t.TempDir(), "v.sock")
		d, err := vhostuser.NewDevice(vhostuser.Config{Name: "guest", Path: paths[i], QueuePairs: pairs, Barrier: e.Barrier, Log: quiet, Packed: true})
		require.NoError(t, err)
		ids[i], err = e.AddPort("guest", d)
		require.NoError(t, err)
		for q, p := range d.Pairs() {
			p.SetWatcher(e.Worker(q % workers))
			e.AddQueue(ids[i], p, q%workers)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			d.Serve(ctx)
		}()
		t.Cleanup(func() { d.Close(); <-done })
		devices[i] = d
	}
	e.SetStages(ids[0], toPort(ids[1]))
	e.SetStages(ids[1], toPort(ids[0]))
	return e, paths, devices
}

// Two guests of the real backend, in every layout.
func TestGuestsOfOurBackend(t *testing.T) { bothRings(t, testGuestsOfOurBackend) }

func testGuestsOfOurBackend(t *testing.T) {
	for _, o := range []Options{
		{},
		{Features: NoOffloads &^ FeatEventIdx, RingSize: 8},
		{Features: LegacyFeatures, RingSize: 16},
		{RingSize: 32, Pieces: 3, SplitHeader: true, Indirect: true},
		{RxBufSize: 600, QueuePairs: 2},
		{Features: NoOffloads &^ FeatMrgRxbuf},
		{Packed: true, RingSize: 100, RxBufSize: 600},
		{Packed: true, RingSize: 7, Features: NoOffloads &^ FeatEventIdx},
	} {
		paths, _ := wire(t, max(1, o.QueuePairs), 1)
		var g [2]*Guest
		for i := range g {
			o.Path = paths[i]
			g[i] = connect(t, o)
		}
		ip := enginetest.IP{Src: netip.MustParseAddr("10.0.2.2"), Dst: netip.MustParseAddr("10.0.2.3")}
		eth := enginetest.Eth{Dst: otherMAC, Src: guestMAC}
		for i := range 300 {
			want := enginetest.UDPFrame(eth, ip, enginetest.UDP{Src: 1000, Dst: 2000}, enginetest.Payload(1+i*4, byte(i)))
			require.NoError(t, g[i&1].Send(0, want, frame.Offload{}))
			p, err := g[1-i&1].Recv(0, soon)
			require.NoError(t, err, "%+v: frame %d", o, i)
			require.Equal(t, want, p.Bytes)
			require.Equal(t, p.Buffers, p.NumBuffers)
		}
		for i := range g {
			require.NoError(t, g[i].Stop())
			require.NoError(t, g[i].Resume())
			require.NoError(t, g[i].Reset())
		}
	}
}

func TestTapGuestsOfOurBackend(t *testing.T) { bothRings(t, testTapGuestsOfOurBackend) }

func testTapGuestsOfOurBackend(t *testing.T) {
	enginetest.Need(t, "netns", "tun")
	for _, features := range [][2]uint64{
		{LinuxFeatures, LinuxFeatures},
		{LinuxFeatures, NoOffloads},
		{LegacyFeatures, LinuxFeatures},
		{NoOffloads | FeatCsum | FeatGuestCsum, LinuxFeatures &^ FeatMrgRxbuf},
	} {
		a, b := tapGuests(t, 1, 1, features)
		transfer(t, a, b, "192.0.2.2:0", "192.0.2.2", 4<<20)
		transfer(t, b, a, "[2001:db8::1]:0", "2001:db8::1", 4<<20)
	}
}

// tapGuests are two namespaces joined by our backend.
func tapGuests(t testing.TB, pairs, workers int, features [2]uint64) (a, b *enginetest.NetNS) {
	paths, _ := wire(t, pairs, workers)
	var ns [2]*enginetest.NetNS
	for i := range ns {
		ns[i] = enginetest.NewNetNS(t)
		mac := frame.MAC{2, 0, 0, 0, 0, byte(i + 1)}
		g, err := StartTapGuest(TapOptions{Options: Options{Path: paths[i], Features: features[i], MAC: mac, QueuePairs: pairs, Packed: packedGuests}, NetNS: ns[i].Path})
		require.NoError(t, err)
		t.Cleanup(func() { assert.NoError(t, g.Close()) })
	}
	enginetest.Must(t, ns[0].Addr("eth0", "192.0.2.1/24"), ns[1].Addr("eth0", "192.0.2.2/24"),
		ns[0].Addr("eth0", "2001:db8::1/64"), ns[1].Addr("eth0", "2001:db8::2/64"))
	return ns[0], ns[1]
}

// iperf measures TCP from a to b in Gbit/s.
func iperf(b *testing.B, from, to *enginetest.NetNS, addr string, args ...string) float64 {
	b.Helper()
	enginetest.Need(b, "iperf3")
	server := to.Command("iperf3", "-s", "-1", "-B", addr)
	require.NoError(b, server.Start())
	defer server.Wait()
	defer server.Process.Kill()
	var r struct {
		End struct {
			Received struct {
				BPS float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		}
	}
	// The server may not listen yet, and iperf3 3.12 calls that a success.
	enginetest.Eventually(b, 10*time.Second, func() bool {
		out, err := from.Command("iperf3", append([]string{"-c", addr, "-J", "-t", "3"}, args...)...).Output()
		return err == nil && json.Unmarshal(out, &r) == nil && r.End.Received.BPS > 0
	})
	return r.End.Received.BPS / 1e9
}

// BenchmarkTap compares the engine between two taps with a plain copy between
// them, by iperf3.
func BenchmarkTap(b *testing.B) {
	enginetest.Need(b, "root", "netns", "tun")
	run := func(b *testing.B, from, to *enginetest.NetNS) {
		for range b.N {
			b.ReportMetric(iperf(b, from, to, "192.0.2.2"), "Gbit/s")
			b.ReportMetric(0, "ns/op")
		}
	}
	b.Run("pair", func(b *testing.B) {
		x, y := enginetest.NewNetNS(b), enginetest.NewNetNS(b)
		p, err := StartTapPair(Tap{NetNS: x.Path, MAC: guestMAC}, Tap{NetNS: y.Path, MAC: otherMAC}, 1)
		require.NoError(b, err)
		defer p.Close()
		enginetest.Must(b, x.Addr("eth0", "192.0.2.1/24"), y.Addr("eth0", "192.0.2.2/24"))
		run(b, x, y)
	})
	b.Run("engine", func(b *testing.B) {
		x, y := tapGuests(b, 1, 1, [2]uint64{LinuxFeatures, LinuxFeatures})
		run(b, x, y)
	})
}

// The backend dials, goes away and comes back; the guest goes on from its used
// rings (T14).
func TestListenAndReconnect(t *testing.T) { bothRings(t, testListenAndReconnect) }

func testListenAndReconnect(t *testing.T) {
	path := filepath.Join(t.TempDir(), "l.sock")
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	backend := func() (d *vhostuser.Device, stop func()) {
		d, err := vhostuser.NewDevice(vhostuser.Config{Name: "guest", Path: path, Client: true, Log: quiet, Packed: true})
		require.NoError(t, err)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); d.Serve(ctx) }()
		return d, func() { d.Close(); cancel(); <-done }
	}
	d, stop := backend()
	g := connect(t, Options{Path: path, Listen: true})
	pull := func(want []byte) {
		b := new(frame.Batch)
		enginetest.Eventually(t, soon, func() bool { b.Reset(0); return d.Pairs()[0].Pull(b) == 1 })
		require.Equal(t, want, b.Frame(0).Bytes())
		d.Push(0, []*frame.Frame{b.Frame(0)})
		d.Pairs()[0].Release(b)
		p, err := g.Recv(0, soon)
		require.NoError(t, err)
		require.Equal(t, want, p.Bytes)
	}
	require.NoError(t, g.Send(0, enginetest.Payload(60, 1), frame.Offload{}))
	pull(enginetest.Payload(60, 1))
	stop()
	require.True(t, g.Closed(soon))
	require.NoError(t, g.Send(0, enginetest.Payload(61, 2), frame.Offload{}))
	d, stop = backend()
	defer stop()
	require.NoError(t, g.Reconnect())
	pull(enginetest.Payload(61, 2))
	require.NoError(t, g.Send(0, enginetest.Payload(62, 3), frame.Offload{}))
	pull(enginetest.Payload(62, 3))
}

func TestControlQueueOfOurBackend(t *testing.T) { bothRings(t, testControlQueueOfOurBackend) }

func testControlQueueOfOurBackend(t *testing.T) {
	paths, _ := wire(t, 2, 1)
	g := connect(t, Options{Path: paths[0], QueuePairs: 2, Features: LinuxFeatures | FeatCtrlVQ | FeatCtrlRx,
		ProtocolFeatures: QEMUProtocol | ProtoConfig})
	require.NotNil(t, g.Ctrl, "our backend offers a control queue")
	for _, c := range []struct {
		class, cmd uint8
		data       []byte
		ack        uint8
	}{{4, 0, []byte{2, 0}, 0}, {4, 0, []byte{1, 0}, 0}, {4, 0, []byte{0, 0}, 1}, {99, 0, nil, 1}} {
		ack, err := g.Control(c.class, c.cmd, c.data, soon)
		require.NoError(t, err)
		assert.Equal(t, c.ack, ack, c)
	}
}
