package vhosttest

import (
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
	"sidewire/vhostuser"
)

// stream sends numbered frames on one queue pair, a few ahead of what has
// arrived, as long as the test lasts.
type stream struct {
	kind      byte
	sent, got atomic.Uint32
	misplaced atomic.Uint32 // arrived out of order
	tokens    chan struct{}
}

// ahead is how many frames of a stream are under way at most, so that no ring
// ever lacks a buffer.
const ahead = 32

func newStream(kind byte) *stream {
	s := &stream{kind: kind, tokens: make(chan struct{}, ahead)}
	for range ahead {
		s.tokens <- struct{}{}
	}
	return s
}

// run sends until stop. A lossy stream does not wait for what may be lost.
func (s *stream) run(t *testing.T, g *Guest, q int, lossy bool, stop chan struct{}) {
	for {
		var late <-chan time.Time
		if lossy {
			late = time.After(time.Millisecond)
		}
		select {
		case <-stop:
			return
		case <-s.tokens:
		case <-late:
		}
		n := s.sent.Load()
		b := enginetest.Payload(60, 0)
		b[14], b[15], b[16], b[17], b[18] = s.kind, byte(n>>24), byte(n>>16), byte(n>>8), byte(n)
		if !assert.NoError(t, g.Send(q, b, frame.Offload{}), "stream %c", s.kind) {
			return
		}
		s.sent.Add(1)
	}
}

// arrived notes a frame of the stream.
func (s *stream) arrived(b []byte) {
	if n := uint32(b[15])<<24 | uint32(b[16])<<16 | uint32(b[17])<<8 | uint32(b[18]); n != s.got.Load() {
		s.misplaced.Add(1)
	}
	s.got.Add(1)
	select {
	case s.tokens <- struct{}{}:
	default:
	}
}

// receiver takes what comes on a queue pair, for its streams.
type receiver struct {
	g         *Guest
	q         int
	got, idle atomic.Uint32 // frames, and how often none came for a while
}

// receiveTime is how long a receiver waits for a frame.
const receiveTime = 5 * time.Millisecond

// run receives until stop, and then what is still there.
func (r *receiver) run(t *testing.T, stop chan struct{}, streams ...*stream) {
	for {
		p, err := r.g.Recv(r.q, receiveTime)
		switch {
		case err == nil:
			for _, s := range streams {
				if s.kind == p.Bytes[14] {
					s.arrived(p.Bytes)
				}
			}
			r.got.Add(1)
		case !assert.ErrorIs(t, err, ErrTimeout):
			return
		default:
			r.idle.Add(1)
			select {
			case <-stop:
				return
			default:
			}
		}
	}
}

// drain waits until all that was in the ring before the call has been received,
// where nothing more comes: the second of two waits in vain began after it.
func (r *receiver) drain(t *testing.T) {
	t.Helper()
	from := r.idle.Load()
	enginetest.Eventually(t, slowly, func() bool { return r.idle.Load()-from >= 2 })
}

// H046: single rings of one pair are switched off and on while frames flow both
// ways on both pairs. Nothing goes to a ring that is off, what the guest sends
// on one is lost, the other pair loses nothing, and all goes on afterwards.
func TestRingsSwitchedUnderTrafficRow67_H046(t *testing.T) {
	bothRings(t, testRingsSwitchedUnderTraffic)
}

func testRingsSwitchedUnderTraffic(t *testing.T) {
	e, paths, devices := wireEngine(t, 2, 2)
	a := connect(t, Options{Path: paths[0], QueuePairs: 2, Wait: slowly})
	b := connect(t, Options{Path: paths[1], QueuePairs: 2, Wait: slowly})
	a0, a1, b0, b1 := newStream('a'), newStream('A'), newStream('b'), newStream('B')
	stopSending, stopReceiving := make(chan struct{}), make(chan struct{})
	var senders, receivers sync.WaitGroup
	var toA, toB [2]*receiver
	for q := range 2 {
		toA[q], toB[q] = &receiver{g: a, q: q}, &receiver{g: b, q: q}
		receivers.Go(func() { toB[q].run(t, stopReceiving, a0, a1) })
		receivers.Go(func() { toA[q].run(t, stopReceiving, b0, b1) })
	}
	senders.Go(func() { a0.run(t, a, 0, false, stopSending) })
	senders.Go(func() { a1.run(t, a, 1, true, stopSending) })
	senders.Go(func() { b0.run(t, b, 0, false, stopSending) })
	senders.Go(func() { b1.run(t, b, 1, true, stopSending) })
	stopSenders := sync.OnceFunc(func() { close(stopSending); senders.Wait() })
	stopReceivers := sync.OnceFunc(func() { close(stopReceiving); receivers.Wait() })
	defer stopReceivers()
	defer stopSenders()
	// more waits until n more frames of the streams have arrived.
	more := func(n uint32, streams ...*stream) {
		t.Helper()
		for _, s := range streams {
			from := s.got.Load()
			enginetest.Eventually(t, slowly, func() bool { return s.got.Load()-from >= n })
		}
	}
	more(50, a0, a1, b0, b1)
	rx, tx := b.Rx(1).Index, b.Tx(1).Index
	for round := range 40 {
		offRx, offTx := round%3 != 1, round%3 != 2
		if offRx {
			require.NoError(t, b.SetVringEnable(rx, false))
			toB[1].drain(t)
		}
		if offTx {
			require.NoError(t, b.SetVringEnable(tx, false))
			// A worker may have taken a batch from the ring before: it arrives.
			e.Barrier()
			toA[1].drain(t)
		}
		received, sent := toB[1].got.Load(), b1.got.Load()
		more(100, a0, a1, b0)
		more(100, a0, a1, b0)
		if offRx {
			require.Equal(t, received, toB[1].got.Load(), "a frame went to a ring that is off")
		} else {
			require.NotEqual(t, received, toB[1].got.Load())
		}
		if offTx {
			require.Equal(t, sent, b1.got.Load(), "a frame came from a ring that is off")
		}
		require.NoError(t, b.SetVringEnable(rx, true))
		require.NoError(t, b.SetVringEnable(tx, true))
		received = toB[1].got.Load()
		more(50, a0, a1, b0, b1)
		require.NotEqual(t, received, toB[1].got.Load(), "the ring is on again")
	}
	// As fast as the socket takes it.
	b.SetReplyAck(false)
	for i := range 5000 {
		require.NoError(t, b.SetVringEnable(2+i%2, i/2%2 == 1))
	}
	b.SetReplyAck(true)
	require.NoError(t, b.Sync())
	require.NoError(t, b.Enable(1, true))
	more(50, a0, a1, b0, b1)
	stopSenders()

	missing := func(streams ...*stream) (n uint32) {
		for _, s := range streams {
			n += s.sent.Load() - s.got.Load()
		}
		return n
	}
	enginetest.Eventually(t, slowly, func() bool { return missing(a0, b0) == 0 })
	// Every other frame that is missing was counted.
	enginetest.Eventually(t, slowly, func() bool { return uint64(missing(a1, b1)) == dropsOf(devices) })
	stopReceivers()
	assert.Zero(t, a0.misplaced.Load()+b0.misplaced.Load())
	assert.NotZero(t, missing(a1, b1), "what a ring that is off sends is lost")
	for _, d := range devices {
		assert.Empty(t, d.Status().Pairs[0].Drops)
	}
	t.Logf("sent %d %d %d %d, missing %d", a0.sent.Load(), a1.sent.Load(), b0.sent.Load(), b1.sent.Load(), missing(a1, b1))
}

// dropsOf is how many frames the devices have counted as dropped.
func dropsOf(devices [2]*vhostuser.Device) (drops uint64) {
	for _, d := range devices {
		st := d.Status()
		for _, p := range st.Pairs {
			for _, n := range p.Drops {
				drops += n
			}
		}
		for name, n := range st.Counters {
			if strings.HasPrefix(name, "rx_drop:") {
				drops += n
			}
		}
	}
	return drops
}
