package engine

import (
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

// chatter is a queue of frames from random stations to random ones. The
// payload says in which network they were sent.
type chatter struct {
	rnd   *rand.Rand
	net   byte
	lent  bool
	turns atomic.Int64
}

func (c *chatter) Pull(b *frame.Batch) int {
	n := 1 + c.rnd.IntN(32)
	for range n {
		dst := mac(c.rnd.IntN(64))
		if c.rnd.IntN(20) == 0 {
			dst = frame.Broadcast
		}
		data := eth(dst, mac(c.rnd.IntN(64)), 0)
		data[20] = c.net
		b.Next().SetBytes(data, nil, b.Segs(1))
	}
	c.turns.Add(1)
	return n
}

func (c *chatter) Release(*frame.Batch) {}
func (c *chatter) Arm() bool            { return true }
func (c *chatter) Disarm()              {}

// listener is a port of one network that counts what is not for it.
type listener struct {
	id     atomic.Uint32
	net    byte
	wrong  *atomic.Int64
	frames atomic.Int64
}

func (l *listener) Push(_ int, fs []*frame.Frame) {
	for _, f := range fs {
		if f.Head[20] != l.net || uint32(f.In) == l.id.Load() || isTag(f.EtherType()) {
			l.wrong.Add(1)
		}
		f.Head[20] = 0xff // a port may change what it is given
	}
	l.frames.Add(int64(len(fs)))
}

// TestSwitchWorkers: several workers, two networks, stations that move all the
// time, ports that come and go, ageing, and somebody who looks on. No frame
// gets to the other network or back to where it came from.
func TestSwitchWorkers(t *testing.T) {
	e, err := New(Config{Workers: 3, Poll: PollAlways})
	require.NoError(t, err)
	defer e.Close()
	s := e.NewSwitch(SwitchConfig{MACs: 32, Age: time.Second})
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop()
	var clock atomic.Int64
	wg.Add(1)
	go func() {
		defer wg.Done()
		s.Run(ctx, clock.Load)
	}()

	var wrong atomic.Int64
	add := func(i int) (*listener, *chatter, frame.PortID) {
		l := &listener{net: byte(i & 1), wrong: &wrong}
		id, err := e.AddPort("listener", l)
		require.NoError(t, err)
		l.id.Store(uint32(id))
		st, err := s.AddPort(SwitchPort{Port: id, Access: 10 + 10*uint16(i&1), Queues: 1 + i&2, Storm: -1})
		require.NoError(t, err)
		e.SetStages(id, st)
		q := &chatter{rnd: rand.New(rand.NewPCG(7, uint64(id))), net: l.net}
		e.AddQueue(id, q, i%3)
		return l, q, id
	}
	var last *listener
	var fixed []*chatter
	for i := range 6 {
		l, q, _ := add(i)
		last, fixed = l, append(fixed, q)
	}
	deadline := time.Now().Add(20 * time.Second)
	for round := 0; round < 30; round++ {
		_, q, id := add(round)
		for q.turns.Load() < 20 || last.frames.Load() == 0 {
			require.True(t, time.Now().Before(deadline))
			time.Sleep(100 * time.Microsecond)
		}
		clock.Store(Now() + int64(round)*int64(300*time.Millisecond))
		s.fdb.notify()
		s.FDB(func(e FDBEntry) bool { return e.Port != 0 })
		_ = s.Stats()
		if round&1 == 0 {
			s.RemovePort(id)
			e.RemovePort(id)
		} else {
			e.RemovePort(id)
			s.RemovePort(id)
		}
	}
	for _, q := range fixed {
		assert.NotZero(t, q.turns.Load())
	}
	assert.Zero(t, wrong.Load())
	checkFDB(t, s.fdb)
	s.fdb.mu.Lock()
	assert.Len(t, s.fdb.owners, 6)
	s.fdb.mu.Unlock()
}

// TestSwitchRunSleeps: without stations there is nothing to wake up for, and
// the first one starts ageing.
func TestSwitchRunSleeps(t *testing.T) {
	b := newBed(t, SwitchConfig{Age: time.Second})
	b.plainPorts(2)
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{})
	var looks atomic.Int64
	var clock atomic.Int64
	go func() {
		defer close(done)
		b.sw.Run(ctx, func() int64 { looks.Add(1); return clock.Load() })
	}()
	wait := func(what string, ok func() bool) {
		t.Helper()
		require.Eventually(t, ok, 10*time.Second, time.Millisecond, what)
	}
	wait("first look", func() bool { return looks.Load() == 1 })
	b.send(0, eth(frame.Broadcast, mac(0), 0))
	wait("looks when the first station comes", func() bool { return looks.Load() == 2 })
	clock.Store(int64(time.Minute))
	wait("forgets it", func() bool { return b.sw.Stats().Addresses == 0 })
	stop()
	<-done
}

// TestSwitchAllocs: nothing is allocated for any kind of frame.
func TestSwitchAllocs(t *testing.T) {
	b := newBed(t, SwitchConfig{MACs: 16})
	checked := SwitchPort{Access: 10, Queues: 2, MAC: own, SpoofCheck: true, CheckARP: true}
	for _, c := range []SwitchPort{checked, {Trunk: []uint16{10, 20}}, {}, {Access: 10}} {
		c.Port, _ = b.e.AddPort("nowhere", nowhere{})
		st, err := b.sw.AddPort(c)
		require.NoError(t, err)
		b.ids, b.stages = append(b.ids, c.Port), append(b.stages, st)
	}
	frames := [][]byte{
		eth(frame.Broadcast, own, 0), eth(mac(5), own, 0), eth(mac(7), own, 0), eth(own, own, 0),
		eth(frame.Broadcast, mac(9), 0), eth(frame.Broadcast, frame.Broadcast, 0), eth(mac(5), own, 20),
		nd(ndNeighSol, cat(filler(20), lla(1, own))),
	}
	b.send(3, eth(own, mac(5), 0))
	b.send(1, eth(own, mac(6), 10))
	l, w, k := b.e.layout.Load(), b.e.workers[0], 0
	n := testing.AllocsPerRun(200, func() {
		b.batch.Reset(b.batch.Now + 1e8)
		for _, data := range frames {
			setSnapshot(b.batch, data, 18, b.ids[0])
		}
		// A station that is new each time: learned, or at the cost of another.
		f := b.batch.Frame(4)
		f.Head[10], f.Head[11] = byte(k>>8), byte(k)
		k++
		for in := range b.stages {
			for i := range b.batch.Len() {
				f := b.batch.Frame(i)
				f.In, f.Out, f.Reason = b.ids[in], frame.Drop, frame.ReasonNone
			}
			b.stages[in].Process(b.batch)
			w.push(l, l.views[0], b.batch)
		}
	})
	assert.Zero(t, n)
}
