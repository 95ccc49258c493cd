package vhosttest

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

const soon = 3 * time.Second

// packedGuests lets all guests want packed rings. bothRings sets it.
var packedGuests bool

// bothRings runs a test over split and over packed rings.
func bothRings(t *testing.T, test func(t *testing.T)) {
	t.Run("split", test)
	t.Run("packed", func(t *testing.T) {
		packedGuests = true
		defer func() { packedGuests = false }()
		test(t)
	})
}

func connect(t *testing.T, o Options) *Guest {
	t.Helper()
	o.Packed = o.Packed || packedGuests
	g, err := Connect(o)
	require.NoError(t, err)
	t.Cleanup(func() { g.Close() })
	return g
}

// echo sends frames of many lengths, several times round the ring, and checks
// that they come back whole.
func echo(t *testing.T, g *Guest, q, count, maxLen int) {
	t.Helper()
	for i := range count {
		want := enginetest.Payload(14+(i*577)%(maxLen-14), byte(i))
		o := frame.Offload{Flags: frame.NeedsCsum, CsumStart: uint16(i), CsumOffset: 16}
		require.NoError(t, g.Send(q, want, o))
		p, err := g.Recv(q, soon)
		require.NoError(t, err, "frame %d", i)
		require.Equal(t, want, p.Bytes, "frame %d of %d bytes", i, len(want))
		require.Equal(t, o, p.Offload)
	}
}

func TestGuestAllLayouts(t *testing.T) { bothRings(t, testGuestAllLayouts) }

func testGuestAllLayouts(t *testing.T) {
	for _, f := range []struct {
		name     string
		features uint64
	}{
		{"linux", LinuxFeatures},
		{"no event", LinuxFeatures &^ FeatEventIdx},
		{"not mergeable", LinuxFeatures &^ FeatMrgRxbuf},
		{"legacy", LegacyFeatures},
		{"legacy mergeable", LegacyFeatures | FeatMrgRxbuf | FeatEventIdx},
	} {
		for _, o := range []Options{
			{},
			{RingSize: 4, RxBufSize: 4096, TxBufSize: 4096},
			{RingSize: 16, SplitHeader: true, Pieces: 3, Indirect: true},
			{RingSize: 16, Pieces: 4, RxBuffers: 3},
		} {
			o.Features = f.features
			t.Run(fmt.Sprintf("%s/%d,%d,%v", f.name, o.RingSize, o.Pieces, o.SplitHeader), func(t *testing.T) {
				o.Path = startLoopback(t, &loopback{features: LinuxFeatures})
				g := connect(t, o)
				longest := 3000
				if f.features&FeatMrgRxbuf != 0 {
					require.Equal(t, 12, g.HdrLen)
				}
				echo(t, g, 0, 3*g.Options.RingSize+40, longest)
				require.NoError(t, g.Stop())
			})
		}
	}
}

func TestGuestMergesBuffers(t *testing.T) { bothRings(t, testGuestMergesBuffers) }

func testGuestMergesBuffers(t *testing.T) {
	g := connect(t, Options{Path: startLoopback(t, &loopback{}), RxBufSize: 1000, RingSize: 256})
	want := enginetest.Payload(60000, 1)
	for range 20 {
		require.NoError(t, g.Send(0, want, frame.Offload{}))
		p, err := g.Recv(0, soon)
		require.NoError(t, err)
		require.Equal(t, 61, p.NumBuffers)
		require.Equal(t, want, p.Bytes)
	}
}

func TestGuestManyQueues(t *testing.T) { bothRings(t, testGuestManyQueues) }

func testGuestManyQueues(t *testing.T) {
	g := connect(t, Options{Path: startLoopback(t, &loopback{}), QueuePairs: 4, MTU: 1400})
	for q := range 4 {
		echo(t, g, q, 300, 2000)
	}
	require.NoError(t, g.Enable(3, false))
}

func TestGuestBurst(t *testing.T) { bothRings(t, testGuestBurst) }

func testGuestBurst(t *testing.T) {
	g := connect(t, Options{Path: startLoopback(t, &loopback{})})
	var frames [][]byte
	for i := range 200 {
		frames = append(frames, enginetest.Payload(60+i, byte(i)))
	}
	for range 10 {
		require.NoError(t, g.SendAll(0, frames...))
		for i := range frames {
			p, err := g.Recv(0, soon)
			require.NoError(t, err)
			require.Equal(t, frames[i], p.Bytes)
		}
		require.NoError(t, g.Drain(0, soon))
	}
}

func TestGuestStopResumeResetReconnect(t *testing.T) { bothRings(t, testGuestStopResumeResetReconnect) }

func testGuestStopResumeResetReconnect(t *testing.T) {
	b := &loopback{}
	g := connect(t, Options{Path: startLoopback(t, b), RingSize: 16})
	echo(t, g, 0, 20, 1000)
	require.NoError(t, g.Stop())
	require.NoError(t, g.Resume())
	echo(t, g, 0, 20, 1000)
	require.NoError(t, g.Reset())
	echo(t, g, 0, 20, 1000)
	b.hangUp()
	require.True(t, g.Closed(soon))
	require.NoError(t, g.Reconnect())
	echo(t, g, 0, 20, 1000)
}

// The first messages are QEMU's, in its order (reference: 6.1).
func TestGuestOrderOfMessages(t *testing.T) {
	b := &loopback{}
	connect(t, Options{Path: startLoopback(t, b)})
	seen := b.requests()
	assert.Equal(t, []uint32{ReqGetFeatures, ReqGetProtocolFeatures, ReqSetProtocolFeatures, ReqGetQueueNum,
		ReqGetMaxMemSlots, ReqSetOwner, ReqSetVringEnable, ReqSetVringEnable, ReqSetFeatures, ReqSetStatus, ReqAddMemReg,
		ReqSetVringNum, ReqSetVringBase, ReqSetVringAddr, ReqSetVringKick, ReqSetVringCall}, seen[:16])
}

func TestRingIndicesWrap(t *testing.T) { bothRings(t, testRingIndicesWrap) } // H066

func testRingIndicesWrap(t *testing.T) {
	b := &loopback{}
	g := connect(t, Options{Path: startLoopback(t, b), RingSize: 8})
	require.NoError(t, g.Stop())
	for _, r := range g.Rings() {
		r.StartAt(65530)
	}
	g.rx[0].reset()
	g.rx[0].StartAt(65530)
	g.tx[0].reset()
	g.tx[0].StartAt(65530)
	require.NoError(t, g.rx[0].fill())
	require.NoError(t, g.Resume())
	echo(t, g, 0, 50, 500)
}

func TestRefusalIsAnError(t *testing.T) {
	for _, req := range []uint32{ReqAddMemReg, ReqSetVringAddr, ReqSetFeatures} {
		_, err := Connect(Options{Path: startLoopback(t, &loopback{refuse: req})})
		var ack *AckError
		require.ErrorAs(t, err, &ack)
		assert.Equal(t, req, ack.Request)
		assert.True(t, Refused(err))
	}
}

func TestMissedInterruptIsFound(t *testing.T) { bothRings(t, testMissedInterruptIsFound) }

func testMissedInterruptIsFound(t *testing.T) {
	g := connect(t, Options{Path: startLoopback(t, &loopback{deaf: true})})
	// The backend signals when the call descriptor is set: take that away.
	require.NoError(t, g.Sync())
	drainEventfd(g.Rx(0).Call)
	require.False(t, g.Rx(0).Arm())
	require.NoError(t, g.Send(0, enginetest.Payload(60, 1), frame.Offload{}))
	enginetest.Eventually(t, soon, func() bool { return g.Rx(0).UsedIdx() == 1 })
	assert.ErrorIs(t, g.Rx(0).missedInterrupt(ErrTimeout), ErrBackend)
}

func TestListen(t *testing.T) {
	path := t.TempDir() + "/l.sock"
	l, err := Listen(path)
	require.NoError(t, err)
	defer l.Close()
	_, err = l.Accept(time.Millisecond)
	assert.Error(t, err)
}

// pattern is a device that uses chains in any order, on the Go heap.
func TestRingRefusesBrokenDevices(t *testing.T) {
	m := HeapMemory(1<<20, 1<<32)
	r, err := NewRing(m, 0, 8, true)
	require.NoError(t, err)
	head, err := r.Post(Buf{GPA: 1 << 32, Len: 10}, Buf{GPA: 1<<32 + 10, Len: 20, Write: true})
	require.NoError(t, err)
	assert.Equal(t, 6, r.Free())
	r.Publish()
	used := func(slot int, id, n uint32, idx uint16) {
		copy(r.used[4+8*slot:], U32s(id, n))
		r.usedWord.Store(uint32(idx) << 16)
	}
	for _, c := range []struct {
		id  uint32
		idx uint16
	}{{9, 1}, {uint32(head) ^ 1, 1}, {uint32(head), 9}} {
		used(0, c.id, 0, c.idx)
		_, _, _, err := r.Reap()
		assert.ErrorIs(t, err, ErrBackend, c)
	}
	used(0, uint32(head), 20, 1)
	got, n, ok, err := r.Reap()
	require.NoError(t, err)
	require.True(t, ok)
	assert.Equal(t, head, got)
	assert.EqualValues(t, 20, n)
	assert.Equal(t, 8, r.Free())
	used(1, uint32(head), 20, 2)
	_, _, _, err = r.Reap()
	assert.ErrorIs(t, err, ErrBackend, "the same head twice")
}

func TestPackedRingRefusesBrokenDevices(t *testing.T) {
	m := HeapMemory(1<<20, 1<<32)
	r, err := NewPackedRing(m, 0, 5, true)
	require.NoError(t, err)
	id, err := r.Post(Buf{GPA: 1 << 32, Len: 10}, Buf{GPA: 1<<32 + 10, Len: 20, Write: true})
	require.NoError(t, err)
	assert.Equal(t, 3, r.Free())
	r.Publish()
	_, _, ok, err := r.Reap()
	require.NoError(t, err)
	require.False(t, ok)
	for _, bad := range []uint16{9, id ^ 1} {
		r.RawSlot(0, 0, 20, bad, descOwner|DescWrite)
		_, _, _, err := r.Reap()
		assert.ErrorIs(t, err, ErrBackend, bad)
	}
	r.RawSlot(0, 0, 20, id, descOwner|DescWrite)
	got, n, ok, err := r.Reap()
	require.NoError(t, err)
	require.True(t, ok)
	assert.Equal(t, id, got)
	assert.EqualValues(t, 20, n)
	assert.Equal(t, 5, r.Free())
	r.RawSlot(2, 0, 20, id, descOwner)
	_, _, _, err = r.Reap()
	assert.ErrorIs(t, err, ErrBackend, "the same id twice")
}

func TestPackedRingKicks(t *testing.T) {
	m := HeapMemory(1<<20, 0)
	for _, event := range []bool{true, false} {
		r, err := NewPackedRing(m, 0, 5, event)
		require.NoError(t, err)
		post := func() bool {
			id, err := r.Post(Buf{Len: 1}, Buf{Len: 1})
			require.NoError(t, err)
			kick := r.Publish()
			r.RawSlot(r.packed.used.at, 0, 0, id, r.packed.used.usedUp())
			_, _, ok, err := r.Reap()
			require.NoError(t, err)
			require.True(t, ok)
			return kick
		}
		assert.True(t, post(), "the device has said nothing")
		r.packed.device.Store(eventDisable << 16)
		assert.False(t, post())
		// Now at 4 of the first lap.
		for _, c := range []struct {
			at   uint32
			want bool
		}{{1<<15 | 4, true}, {1, true}, {2, false}, {0, false}, {1<<15 | 3, true}, {3, false}} {
			r.packed.device.Store(eventDesc<<16 | c.at)
			assert.Equal(t, c.want || !event, post(), "event at %#x", c.at)
		}
		r.Disarm()
		assert.EqualValues(t, eventDisable<<16, r.packed.driver.Load())
		r.Arm()
		want := uint32(eventEnable)
		if event {
			want = eventDesc<<16 | r.packed.used.value()
		}
		assert.Equal(t, want, r.packed.driver.Load())
	}
}

func TestRingKicks(t *testing.T) {
	m := HeapMemory(1<<20, 0)
	r, err := NewRing(m, 0, 8, true)
	require.NoError(t, err)
	post := func() bool {
		_, err := r.Post(Buf{Len: 1})
		require.NoError(t, err)
		return r.Publish()
	}
	assert.True(t, post(), "event at 0")
	assert.False(t, post(), "event has passed")
	r.availEvent.Store(2)
	assert.True(t, post())
	assert.False(t, r.Publish(), "nothing new")

	r, err = NewRing(m, 0, 8, false)
	require.NoError(t, err)
	assert.True(t, post())
	r.usedWord.Store(noNotify)
	assert.False(t, post())
	r.Disarm()
	assert.EqualValues(t, noInterrupt|2<<16, r.availWord.Load())
	r.Arm()
	assert.EqualValues(t, 2<<16, r.availWord.Load())
}

func TestRawMessages(t *testing.T) {
	b := &loopback{}
	f, err := Dial(startLoopback(t, b), soon)
	require.NoError(t, err)
	defer f.Close()
	size := uint32(1 << 20)
	require.NoError(t, f.Send(Message{Request: ReqGetFeatures, Flags: FlagVersion, Size: &size, Payload: []byte{1}}))
	assert.True(t, f.Closed(soon))
	assert.False(t, slices.Contains(b.requests(), uint32(ReqGetFeatures)))
	require.ErrorIs(t, f.Do(ReqSetOwner, nil), ErrClosed)
}

func TestSentHeaderHasNoNumBuffers(t *testing.T) { // H075 is the guest's to abuse, not ours
	g := connect(t, Options{Path: startLoopback(t, &loopback{}), RingSize: 2})
	require.NoError(t, g.Stop())
	for i := range uint16(2) {
		copy(g.Mem.At(g.tx[0].gpa(i), 12)[10:], []byte{0xff, 0xff})
	}
	require.NoError(t, g.Stage(0, enginetest.Payload(60, 1), frame.Offload{}))
	at := g.tx[0].gpa(g.tx[0].byHead[g.tx[0].avail[4]])
	assert.Equal(t, []byte{0, 0}, g.Mem.At(at, 12)[10:])
}

func TestSignalOfFullEventfd(t *testing.T) { // T20
	fd, err := newEventfd()
	require.NoError(t, err)
	defer unix.Close(fd)
	_, err = unix.Write(fd, U64(1<<64-2))
	require.NoError(t, err)
	assert.NoError(t, signal(fd))
	drainEventfd(fd)
	assert.NoError(t, signal(fd))
	assert.NoError(t, waitReadable(fd, time.Now().Add(soon)))
}
