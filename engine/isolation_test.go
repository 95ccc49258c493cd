package engine

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
	"sidewire/vhostuser"
	"sidewire/vhostuser/vhosttest"
)

// The guests on the switch: a pair that talks to each other, one that abuses
// it, and one that is only there.
const (
	victimA = iota
	victimB
	abuser
	bystander
	numGuests
)

// Frames in a turn. A pair whose bursts are longer would wait for more of them.
const (
	victimBurst = 30
	abuseBurst  = frame.BatchSize
)

// lan is a switch whose ports are guests behind vhost-user, in VLAN 10, all of
// one worker, which the test plays: it decides when which queue is served, so
// that what a frame costs its own port is told apart from what others cost.
type lan struct {
	tb     testing.TB
	e      *Engine
	w      *Worker
	sw     *Switch
	guests [numGuests]lanGuest

	sent, got [2]uint32 // by victims, and by those that they are for
	victims   []int64   // nanoseconds that the victims' frames took, by turn
	others    []int64   // and those of others
	payload   []byte    // scratch
	resets    atomic.Int32
}

type lanGuest struct {
	*vhosttest.Guest
	d     *vhostuser.Device
	o     vhosttest.Options
	queue int    // of the worker
	sent  uint64 // by an abuse
	read  uint64 // by one that is only there
}

const lanVLAN, otherVLAN = 10, 20

// newLAN makes the switch and starts the guests.
func newLAN(tb testing.TB, packed bool, a abuse) *lan {
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	x := &lan{tb: tb, e: &Engine{log: quiet}}
	x.e.layout.Store(&layout{ports: []*portEntry{nil}, views: emptyViews(1)})
	var err error
	x.w, err = newWorker(x.e, 0, -1, PollNever, 0)
	require.NoError(tb, err)
	x.e.workers = []*Worker{x.w}
	tb.Cleanup(x.e.Close)
	x.sw = x.e.NewSwitch(SwitchConfig{Name: "lan"})
	for i := range x.guests {
		c := SwitchPort{MAC: mac(i), SpoofCheck: true, Access: lanVLAN, MTU: 1500}
		if i == abuser && a.port != nil {
			a.port(&c)
		}
		x.addGuest(i, c, packed, quiet)
	}
	x.w.disarm()
	return x
}

func (x *lan) addGuest(i int, c SwitchPort, packed bool, quiet *slog.Logger) {
	tb, g := x.tb, &x.guests[i]
	path := filepath.Join(tb.TempDir(), "v.sock")
	var err error
	g.d, err = vhostuser.NewDevice(vhostuser.Config{
		Name: "guest", Path: path, MTU: 1500, MAC: mac(i), Snapshot: 18, Packed: true, Barrier: x.e.Barrier, Log: quiet,
	})
	require.NoError(tb, err)
	c.Port, err = x.e.AddPort("guest", g.d)
	require.NoError(tb, err)
	stage, err := x.sw.AddPort(c)
	require.NoError(tb, err)
	x.e.SetStages(c.Port, stage)
	p := g.d.Pairs()[0]
	p.SetWatcher(x.w)
	g.queue = len(x.e.layout.Load().views[0].queues)
	x.e.AddQueue(c.Port, p, 0)
	require.NoError(tb, g.d.Listen())
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = g.d.Serve(ctx) }()
	tb.Cleanup(func() { g.d.Close(); cancel(); <-done })
	g.o = vhosttest.Options{Path: path, MAC: mac(i), Packed: packed, RxBufSize: 2048, TxBufSize: 2048}
	if i == abuser {
		g.o.TxBufSize = 0 // as long as a frame may be
	}
	g.Guest, err = vhosttest.Connect(g.o)
	require.NoError(tb, err)
	tb.Cleanup(func() { g.Close() })
}

// serve lets the worker serve a guest's queue once.
func (x *lan) serve(i int) (frames int, took int64) {
	x.w.epoch.Add(1)
	defer x.w.epoch.Add(1)
	l := x.e.layout.Load()
	now := Now()
	n := x.w.serve(l, l.views[0], &l.views[0].queues[x.guests[i].queue], now)
	return n, Now() - now
}

// serveAll serves a guest until all that it has sent was taken.
func (x *lan) serveAll(i int) (took int64) {
	r := x.guests[i].Tx(0)
	for deadline := time.Now().Add(5 * time.Second); r.UsedIdx() != r.AvailIdx(); {
		before := r.UsedIdx()
		_, t := x.serve(i)
		if r.UsedIdx() != before {
			took += t
		} else if time.Now().After(deadline) {
			require.FailNow(x.tb, "a frame is not taken")
		}
	}
	return took
}

// victimType marks the frames of the victims.
const victimType = 0x88b5

// send stages a burst of a victim for the other one.
func (x *lan) send(i int) {
	if x.payload == nil {
		x.payload = make([]byte, 46)
	}
	g := &x.guests[i]
	for range victimBurst {
		binary.BigEndian.PutUint32(x.payload, x.sent[i])
		x.sent[i]++
		require.NoError(x.tb, g.Stage(0, enginetest.Eth{Dst: mac(1 - i), Src: mac(i)}.Frame(victimType, x.payload), frame.Offload{}))
	}
	g.Tx(0).Publish()
}

// receive takes what a victim got from the other one, which is everything, once
// and in order. What others sent was pushed before.
func (x *lan) receive(i int) {
	for n := 0; n < victimBurst; {
		p, err := x.guests[i].Recv(0, time.Second)
		require.NoError(x.tb, err, "a victim's frame is lost")
		if binary.BigEndian.Uint16(p.Bytes[12:]) != victimType {
			continue
		}
		require.Equal(x.tb, x.got[i], binary.BigEndian.Uint32(p.Bytes[14:]), "a victim's frame is lost, or passed by another")
		x.got[i]++
		n++
	}
}

// read takes what a guest got. It asks nobody whether there is more: that would
// make the backend wake it.
func (x *lan) read(i int) {
	g := &x.guests[i]
	for all := x.port(i).counters[0].outFrames.Load(); g.read < all; g.read++ {
		_, err := g.Recv(0, time.Second)
		require.NoError(x.tb, err)
	}
}

// port is the engine's port of a guest.
func (x *lan) port(i int) *portEntry {
	return x.e.layout.Load().views[0].queues[x.guests[i].queue].in
}

// turn is one turn of the worker while the abuse goes on.
func (x *lan) turn(a abuse) {
	if a.act != nil {
		a.act(x)
		x.others = append(x.others, x.serveAll(abuser)+x.serveAll(bystander))
		x.read(bystander)
	} else if a.beside != nil {
		_, t := x.serve(abuser)
		x.others = append(x.others, t)
		runtime.Gosched() // where there is one processor
	}
	x.send(victimA)
	x.send(victimB)
	x.victims = append(x.victims, x.serveAll(victimA)+x.serveAll(victimB))
	x.receive(victimB)
	x.receive(victimA)
}

// abuse is what a guest does to the others.
type abuse struct {
	name string
	port func(*SwitchPort) // what is different at its port
	act  func(*lan)        // in each turn
	// beside runs in a goroutine of its own until stop is closed.
	beside func(x *lan, stop chan struct{})
	// dropped is the reason for which all frames of the guest by are, but for
	// those that pass says; "" if none is.
	dropped string
	by      int // 0: the abuser
	pass    func(x *lan) uint64
}

// abuses are those of the issue.
func abuses() []abuse {
	const foreign = 0x88b6
	to := func(dst, src frame.MAC, n int) []byte {
		return enginetest.Eth{Dst: dst, Src: src}.Frame(foreign, make([]byte, n))
	}
	short := func(dst, src frame.MAC) func(*lan, int) []byte {
		b := to(dst, src, 46)
		return func(*lan, int) []byte { return b }
	}
	// bursts sends a burst from a guest in each turn.
	bursts := func(from int, frames func(x *lan, i int) []byte, o func(i int) frame.Offload) func(*lan) {
		return func(x *lan) {
			g := &x.guests[from]
			for i := range abuseBurst {
				var offload frame.Offload
				if o != nil {
					offload = o(i)
				}
				require.NoError(x.tb, g.Stage(0, frames(x, i), offload))
				g.sent++
			}
			g.Tx(0).Publish()
		}
	}
	unchecked := func(c *SwitchPort) { c.SpoofCheck = false }
	self, nobody := mac(abuser), mac(1000)
	tagged := enginetest.Eth{Dst: mac(victimB), Src: self, VLAN: otherVLAN}.Frame(foreign, make([]byte, 46))
	tcp := enginetest.TCPFrame(enginetest.Eth{Dst: mac(bystander), Src: self}, enginetest.IP{Src: ip4A, Dst: ip4B}, enginetest.TCP{Src: 1, Dst: 2}, make([]byte, 1000))
	segment := func(*lan, int) []byte { return tcp }
	flooded := func(x *lan) uint64 { return x.sw.Stats().Ports[abuser].Flooded }
	ringful := func(x *lan) uint64 { return uint64(x.guests[abuser].Rx(0).Size) }
	lie := func(o frame.Offload) func(int) frame.Offload { return func(int) frame.Offload { return o } }

	return []abuse{
		{name: "quiet"},
		{name: "broadcasts", act: bursts(abuser, short(frame.Broadcast, self), nil), dropped: "storm", pass: flooded},
		{name: "unknown unicast", act: bursts(abuser, short(nobody, self), nil), dropped: "storm", pass: flooded},
		{name: "changing sources", port: unchecked, act: bursts(abuser, func(x *lan, i int) []byte {
			return to(mac(bystander), mac(2000+int(x.guests[abuser].sent)), 46)
		}, nil)},
		{name: "spoofing", act: bursts(abuser, short(mac(victimB), mac(victimA)), nil), dropped: "spoofed"},
		{name: "spoofing unchecked", port: unchecked, act: bursts(abuser, short(mac(victimB), mac(victimA)), nil)},
		{name: "runts", act: bursts(abuser, func(_ *lan, i int) []byte { return make([]byte, 1+i%13) }, nil), dropped: "short_frame"},
		// Most of them are little too long: the guest's own writing would push
		// the others out of the processor's cache.
		{name: "giants", act: bursts(abuser, func(_ *lan, i int) []byte {
			if i == 0 {
				return to(mac(victimB), self, 64000)
			}
			return to(mac(victimB), self, 1500+i)
		}, nil), dropped: "oversize_frame"},
		{name: "wrong VLAN", act: bursts(abuser, func(*lan, int) []byte { return tagged }, nil), dropped: "wrong_vlan"},
		{name: "gso_size 0", act: bursts(abuser, segment, lie(frame.Offload{
			Flags: frame.NeedsCsum, GSO: frame.GSOTCPv4, HdrLen: 54, CsumStart: 34, CsumOffset: 16,
		})), dropped: "bad_offload"},
		{name: "csum_start past the end", act: bursts(abuser, segment, lie(frame.Offload{
			Flags: frame.NeedsCsum, CsumStart: 2000, CsumOffset: 16,
		})), dropped: "bad_offload"},
		// It is a hint, which is computed anew.
		{name: "hdr_len past the end", act: bursts(abuser, segment, lie(frame.Offload{
			Flags: frame.NeedsCsum, GSO: frame.GSOTCPv4, GSOSize: 500, HdrLen: 60000, CsumStart: 34, CsumOffset: 16,
		}))},
		{name: "no rx buffers", act: bursts(bystander, short(self, mac(bystander)), nil), by: bystander, dropped: "no_buffer", pass: ringful},
		{name: "resets", beside: resets(func(x *lan) error { return x.guests[abuser].Reset() })},
		{name: "disconnects", beside: resets(func(x *lan) error {
			g := &x.guests[abuser]
			if err := g.Close(); err != nil {
				return err
			}
			// Until the backend has done with the connection that is gone, it
			// refuses others.
			var again *vhosttest.Guest
			var err error
			if enginetest.Wait(5*time.Second, func() bool { again, err = vhosttest.Connect(g.o); return err == nil }) {
				g.Guest = again
			}
			return err
		})},
	}
}

// resets lets a guest go away again and again, with frames in its ring of which
// the worker may have some in hand.
func resets(reset func(*lan) error) func(*lan, chan struct{}) {
	return func(x *lan, stop chan struct{}) {
		b := enginetest.Eth{Dst: mac(bystander), Src: mac(abuser)}.Frame(0x88b6, make([]byte, 46))
		g := &x.guests[abuser]
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			var err error
			for n := 0; n < 1+i*37%200 && err == nil; n++ {
				err = g.Stage(0, b, frame.Offload{})
			}
			g.Tx(0).Publish()
			if err = errors.Join(err, reset(x)); !assert.NoError(x.tb, err) {
				return
			}
			x.resets.Add(1)
		}
	}
}

// run plays turns until enough says so.
func (x *lan) run(a abuse, enough func() bool) {
	stop := make(chan struct{})
	var beside sync.WaitGroup
	if a.beside != nil {
		beside.Go(func() { a.beside(x, stop) })
	}
	defer beside.Wait()
	defer close(stop)
	for !enough() {
		x.turn(a)
	}
}

// Whatever a guest does, the others lose no frame of theirs, and get each once
// and in order; what it sends is dropped and counted, by reason.
func TestVictimsLoseNothing(t *testing.T) {
	for _, ring := range []string{"split", "packed"} {
		t.Run(ring, func(t *testing.T) {
			for _, a := range abuses() {
				t.Run(a.name, func(t *testing.T) { testAbuse(t, a, ring == "packed") })
			}
		})
	}
}

func testAbuse(t *testing.T, a abuse, packed bool) {
	port := a.port
	a.port = func(c *SwitchPort) {
		c.Storm = 1000 // which a slow machine reaches too
		if port != nil {
			port(c)
		}
	}
	x := newLAN(t, packed, a)
	turns := 0
	x.run(a, func() bool { turns++; return turns > 100 && (a.beside == nil || x.resets.Load() > 10) || t.Failed() })
	require.Equal(t, x.sent[victimA], x.got[victimB])
	require.Equal(t, x.sent[victimB], x.got[victimA])
	assert.GreaterOrEqual(t, x.sent[victimA], uint32(100*victimBurst))
	for i := range x.guests[:abuser] {
		assert.Empty(t, x.drops(i), "nothing of a victim's is dropped")
	}
	if a.act == nil {
		return
	}
	by, want := max(a.by, abuser), map[string]uint64{}
	sent := x.guests[by].sent
	if a.dropped != "" {
		want[a.dropped] = sent
	}
	if a.pass != nil {
		want[a.dropped] -= a.pass(x)
	}
	assert.Equal(t, want, x.drops(by), "of %d frames", sent)
	assert.Greater(t, sent, uint64(0))
	if a.dropped != "" {
		assert.Greater(t, want[a.dropped], sent/2)
	}
}

// drops are the frames of a guest that went no further, by reason.
func (x *lan) drops(i int) map[string]uint64 {
	out := map[string]uint64{}
	for _, p := range x.e.PortStats() {
		if p.ID == x.port(i).id {
			for r, n := range p.Drops {
				out[r] += n
			}
		}
	}
	for r, n := range x.guests[i].d.Status().Pairs[0].Drops {
		out[r] += n
	}
	return out
}

// BenchmarkVictims is what a frame of a pair that talks to each other costs
// while another guest on the same worker abuses the switch. Beside it is how
// long the frames of others take in a turn, which is how much later the pair's
// are served. Both are medians of turns: a mean would tell of other programs.
func BenchmarkVictims(b *testing.B) {
	for _, ring := range []string{"split", "packed"} {
		for _, a := range abuses() {
			b.Run(ring+"/"+a.name, func(b *testing.B) {
				x := newLAN(b, ring == "packed", a)
				for range 10 {
					x.turn(abuse{})
				}
				x.victims, x.others = nil, []int64{0}
				x.run(a, func() bool { return !b.Loop() })
				b.ReportMetric(float64(median(x.victims))/(2*victimBurst), "ns/op")
				b.ReportMetric(float64(median(x.others)), "others-ns/turn")
			})
		}
	}
}

func median(xs []int64) int64 {
	slices.Sort(xs)
	return xs[len(xs)/2]
}
