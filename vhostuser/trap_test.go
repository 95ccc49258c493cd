package vhostuser

import (
	"encoding/json"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine"
	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// echo sends one frame through each direction of pair 0.
func (f *front) echo(d *Device, hdr int) {
	f.t.Helper()
	f.rings[1].send(frame.Offload{}, hdr, testFrame(90, 4))
	got, _ := pull(d.Pairs()[0])
	require.Equal(f.t, [][]byte{testFrame(90, 4)}, got)
	_, _, ok := f.rings[1].take()
	require.True(f.t, ok)
	f.rings[0].recv(2000)
	require.Equal(f.t, frame.ReasonNone, pushBytes(d, testFrame(90, 5))[0].Reason)
	_, got = f.rings[0].received(hdr)
	require.Equal(f.t, [][]byte{testFrame(90, 5)}, got)
}

// newDriver makes the guest's driver begin anew, as after a reset.
func (f *front) newDriver() {
	for _, r := range f.rings {
		r.reset()
	}
}

// T1, T9, T16: a reset of the guest stops the rings and ends their
// descriptors, but memory stays and is not sent again.
func TestTrapResetDevice(t *testing.T) { bothRings(t, testTrapResetDevice) }

func testTrapResetDevice(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{QueuePairs: 2})
	f := connect(t, d)
	f.bringUp(plainFeats, 4)
	fds, _ := resources(t)
	for range 3 {
		for i := range uint32(4) {
			f.ask(GetVringBase, u32s(i, 0))
		}
		left, _ := resources(t)
		require.Equal(t, fds-8, left, "kick and call descriptors")
		f.do(ResetDevice, nil)
		st := d.Status()
		require.Equal(t, 1, st.MemoryRegions)
		require.Empty(t, st.Features)
		f.newDriver()
		for i := range uint32(4) {
			f.do(SetVringEnable, u32s(i, 1))
		}
		f.do(SetFeatures, u64(plainFeats))
		for i := range 4 {
			f.start(i, 0)
		}
		f.echo(d, 12)
	}
	// The same connection with fewer queues.
	f.do(ResetDevice, nil)
	f.newDriver()
	f.do(SetVringEnable, u32s(0, 1))
	f.do(SetVringEnable, u32s(1, 1))
	f.do(SetFeatures, u64(plainFeats|featMrgRxbuf))
	f.start(0, 0)
	f.start(1, 0)
	f.echo(d, 12)
}

// T3: a ring works without a call descriptor, is looked at without a kick, and
// a call descriptor that comes is signalled once.
func TestTrapStartAtKick(t *testing.T) { bothRings(t, testTrapStartAtKick) }

func testTrapStartAtKick(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.negotiate(plainFeats)
	f.share()
	tx := f.rings[1]
	tx.send(frame.Offload{}, 12, testFrame(60, 1))
	w := &watcher{}
	d.Pairs()[0].SetWatcher(w)
	before := w.get()
	f.do(SetVringNum, u32s(1, testRing))
	f.do(SetVringBase, u32s(1, f.baseOf(0)))
	f.do(SetVringAddr, addr(1, 0, ringSpace))
	f.do(SetVringKick, u64(1), tx.kick)
	f.do(SetVringEnable, u32s(1, 1))
	require.Greater(t, w.get(), before, "worker not woken")
	got, _ := pull(d.Pairs()[0])
	require.Len(t, got, 1)
	require.False(t, tx.signalled())
	f.do(SetVringCall, u64(1), tx.call)
	require.True(t, tx.signalled())
	f.ask(GetVringBase, u32s(1, 0))
	require.Empty(t, w.fds, "kick still watched") // the reply came after
}

type watcher struct {
	mu    sync.Mutex
	fds   []int
	wakes int
}

func (w *watcher) Watch(fd int) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fds = append(w.fds, fd)
	return nil
}

func (w *watcher) Unwatch(fd int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, x := range w.fds {
		if x == fd {
			w.fds = append(w.fds[:i], w.fds[i+1:]...)
			return
		}
	}
}

func (w *watcher) Wake() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.wakes++
}

func (w *watcher) list() []int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.fds)
}

func (w *watcher) get() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.wakes
}

// T4: the frontend's base is believed, whatever we returned.
func TestTrapBase(t *testing.T) { bothRings(t, testTrapBase) }

func testTrapBase(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(plainFeats, 2)
	tx := f.rings[1]
	tx.send(frame.Offload{}, 12, testFrame(60, 1))
	require.Equal(t, u32s(1, f.baseOf(0)), f.ask(GetVringBase, u32s(1, 0)))
	tx.send(frame.Offload{}, 12, testFrame(60, 2))
	f.start(1, 1)
	got, _ := pull(d.Pairs()[0])
	require.Equal(t, [][]byte{testFrame(60, 2)}, got)
	require.Equal(t, u32s(1, f.baseOf(2)), f.ask(GetVringBase, u32s(1, 0)))
}

// T8: set_link off and on without memory or features.
func TestTrapStopAndContinue(t *testing.T) { bothRings(t, testTrapStopAndContinue) }

func testTrapStopAndContinue(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(plainFeats, 2)
	for range 3 {
		f.echo(d, 12)
		rx, tx := f.ask(GetVringBase, u32s(0, 0)), f.ask(GetVringBase, u32s(1, 0))
		require.Equal(t, Connected, d.Status().State)
		f.do(SetFeatures, u64(plainFeats))
		f.start(0, native.Uint16(rx[4:]))
		f.start(1, native.Uint16(tx[4:]))
		require.Equal(t, Up, d.Status().State)
	}
	f.echo(d, 12)
}

// T6: the source of a migration switches logging on while all runs.
func TestTrapMigration(t *testing.T) { bothRings(t, testTrapMigration) }

func testTrapMigration(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(plainFeats|featMrgRxbuf, 2)
	f.echo(d, 12)
	log := memfd(t, 64<<10)
	defer closeFD(log)
	const size = (testGPA+testMem)/4096/8 - 100 // some pages are past its end
	require.NoError(t, unix.Ftruncate(log, 64<<10))
	f.do(SetLogBase, u64s(size, 4096), log)
	f.do(SetFeatures, u64(plainFeats|featMrgRxbuf|featLogAll))
	f.do(SetVringAddr, addr(0, ringAddrLog, 0))
	f.do(SetVringAddr, addr(1, ringAddrLog, ringSpace))
	bits, err := unix.Mmap(log, 0, 64<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	require.NoError(t, err)
	defer func() { _ = unix.Munmap(bits) }()
	dirty := func(gpa uint64) bool { return bits[4096+gpa/4096/8]&(1<<(gpa/4096%8)) != 0 }
	used := uint64(testGPA + usedAt)
	if f.packed {
		used = testGPA // the descriptors
	}
	require.False(t, dirty(used+ringSpace))
	buf := f.next
	f.echo(d, 12)
	require.True(t, dirty(used), "used ring of rx")
	require.True(t, dirty(used+ringSpace), "used ring of tx")
	require.True(t, dirty(testGPA+uint64(buf)+64), "rx buffer")
	require.False(t, dirty(testGPA+uint64(buf)+64<<10), "untouched page")
	// A log address of ~0, and a buffer past the log (H037).
	a := addr(0, ringAddrLog, 0)
	copy(a[32:], u64(^uint64(0)))
	f.do(SetVringAddr, a)
	f.next = testMem - 8192
	f.echo(d, 12)
	require.NotZero(t, d.Status().Counters["missed_dirty_marks"])
	// Cancelled: logging goes off, all goes on (H123).
	f.do(SetFeatures, u64(plainFeats|featMrgRxbuf))
	clear(bits)
	f.echo(d, 12)
	require.False(t, dirty(used))
	require.Equal(t, u32s(1, f.baseOf(4)), f.ask(GetVringBase, u32s(1, 0)))
}

// T5, T6, T7, H038, H046: memory, features, addresses and queues change under
// traffic; nothing is lost but what a disabled ring loses.
func TestTrapLiveChanges(t *testing.T) { bothRings(t, testTrapLiveChanges) }

func testTrapLiveChanges(t *testing.T) {
	noLeak(t)
	e, err := engine.New(engine.Config{Workers: 2, Log: quiet})
	require.NoError(t, err)
	defer e.Close()
	d, err := NewDevice(Config{Name: "live", Path: "unused", QueuePairs: 2, Barrier: e.Barrier, Log: quiet, Packed: packedRings})
	require.NoError(t, err)
	defer d.Close()
	sink := &enginetest.MemPort{}
	in, err := e.AddPort("guest", d)
	require.NoError(t, err)
	out, err := e.AddPort("sink", sink)
	require.NoError(t, err)
	e.SetStages(in, stage(func(b *frame.Batch) {
		for i := range b.Len() {
			b.Frame(i).Out = out
		}
	}))
	for i, p := range d.Pairs() {
		p.SetWatcher(e.Worker(i))
		e.AddQueue(in, p, i)
	}
	f := connect(t, d)
	f.bringUp(plainFeats, 4)
	const total = 3000
	stop := make(chan struct{})
	var sent sync.WaitGroup
	for _, tx := range []*guestRing{f.rings[1], f.rings[3]} {
		sent.Add(1)
		buf := f.alloc(2048)
		go func() {
			defer sent.Done()
			copy(f.mem[buf+12:], testFrame(300, byte(tx.index)))
			for n := 0; n < total; {
				tx.takeAll()
				for tx.avail-tx.used < testRing/2 && n < total {
					tx.post(guestBuf{buf, 312, false})
					n++
				}
				_, _ = unix.Write(tx.kick, u64(1))
				time.Sleep(50 * time.Microsecond)
			}
			enginetest.Wait(5*time.Second, func() bool { return tx.usedIdx() == tx.avail })
		}()
	}
	go func() { sent.Wait(); close(stop) }()
	for i := 0; ; i++ {
		select {
		case <-stop:
			got := sink.Take()
			require.Len(t, got, 2*total)
			for _, p := range got {
				require.Contains(t, [][]byte{testFrame(300, 1), testFrame(300, 3)}, p.Bytes)
			}
			return
		default:
		}
		switch i % 4 {
		case 0:
			f.do(SetMemTable, table([4]uint64{testGPA, testMem, testUVA, 0}, [4]uint64{1 << 40, 4096, 1 << 40, 0}), f.memfd, f.memfd)
		case 1:
			f.do(AddMemReg, region1(1<<41, 4096, 1<<41, 0), f.memfd)
			f.do(RemMemReg, region1(1<<41, 4096, 1<<41, 0))
		case 2:
			f.do(SetFeatures, u64(plainFeats))
			f.do(SetFeatures, u64(plainFeats|featIndirectDesc))
		case 3:
			f.do(SetVringAddr, addr(1, 0, ringSpace))
			f.do(SetVringKick, u64(3), f.rings[3].kick)
			f.do(SetVringEnable, u32s(0, uint32(i/4%2)))
		}
	}
}

type stage func(*frame.Batch)

func (s stage) Process(b *frame.Batch) { s(b) }

// A session moves from one device to another under traffic: every frame
// arrives once, in order, and the frontend notices nothing.
func TestMoveSession(t *testing.T) { bothRings(t, testMoveSession) }

func testMoveSession(t *testing.T) {
	noLeak(t)
	a, b := newDevice(t, Config{QueuePairs: 2}), newDevice(t, Config{QueuePairs: 2})
	f := connect(t, a)
	f.bringUp(plainFeats|featMrgRxbuf|featLogAll, 4)
	f.do(SetLogBase, u64s(4096, 0), f.memfd)
	f.do(SetVringErr, u64(1), f.rings[8].call)
	from, to := a, b
	for round := range 20 {
		number := byte(round)
		f.echo(from, 12)
		f.rings[1].send(frame.Offload{}, 12, testFrame(60, number))
		v, fds, err := from.Export()
		require.NoError(t, err)
		require.Equal(t, Disconnected, from.Status().State)
		// Another frontend is not taken meanwhile.
		x, y := pair(t)
		require.Nil(t, from.take(y))
		x.Close()
		f.send(GetFeatures, flagVersion, nil) // asked of nobody yet
		text, err := json.Marshal(v)
		require.NoError(t, err)
		var w Session
		require.NoError(t, json.Unmarshal(text, &w))
		require.Equal(t, v, w)
		require.ErrorIs(t, to.Import(Session{Version: 99}, nil), ErrRefused)
		require.NoError(t, to.Import(w, fds))
		for _, fd := range fds {
			closeFD(fd)
		}
		_, p := f.receive()
		require.Equal(t, to.offered, native.Uint64(p))
		got, _ := pull(to.Pairs()[0])
		require.Equal(t, [][]byte{testFrame(60, number)}, got)
		f.rings[1].take()
		require.True(t, f.rings[0].signalled())
		f.echo(to, 12)
		require.Equal(t, Up, to.Status().State)
		from, to = to, from
	}
	_, _, err := to.Export()
	require.ErrorIs(t, err, ErrNoSession)
}

// Values that cannot be taken up leave the device as it was.
func TestImportRefuses(t *testing.T) { bothRings(t, testImportRefuses) }

func testImportRefuses(t *testing.T) {
	noLeak(t)
	a, b := newDevice(t, Config{QueuePairs: 2}), newDevice(t, Config{QueuePairs: 1})
	f := connect(t, a)
	f.bringUp(plainFeats, 4)
	v, fds, err := a.Export()
	require.NoError(t, err)
	defer func() {
		for _, fd := range fds {
			closeFD(fd)
		}
	}()
	require.ErrorIs(t, b.Import(v, fds), ErrRefused) // too many rings
	for name, spoil := range map[string]func(*Session){
		"version":      func(s *Session) { s.Version = 0 },
		"features":     func(s *Session) { s.Features |= 1 << 40 },
		"protocol":     func(s *Session) { s.Protocol |= 1 << 40 },
		"connection":   func(s *Session) { s.Conn = -1 },
		"index":        func(s *Session) { s.Conn = len(fds) },
		"not a socket": func(s *Session) { s.Conn = s.Regions[0].FD },
		"ring":         func(s *Session) { s.Rings[0].Index = 99 },
		"ring below":   func(s *Session) { s.Rings[0].Index = -1 },
		"memory":       func(s *Session) { s.Regions[0].Size = 1 << 30 },
		"no memory fd": func(s *Session) { s.Regions[0].FD = -1 },
		"pairs":        func(s *Session) { s.Pairs = 0 },
	} {
		var c Session
		text, err := json.Marshal(v)
		require.NoError(t, err)
		require.NoError(t, json.Unmarshal(text, &c))
		spoil(&c)
		assert.Error(t, a.Import(c, fds), name)
		assert.Equal(t, Disconnected, a.Status().State, name)
	}
	require.NoError(t, a.Import(v, fds))
	f.echo(a, 12)
}

// A frontend that shares no memory though its driver has started is told of
// loudly, once.
func TestNoSharedMemory(t *testing.T) { bothRings(t, testNoSharedMemory) }

func testNoSharedMemory(t *testing.T) {
	defer func(was time.Duration) { memoryWait = was }(memoryWait)
	memoryWait = 20 * time.Millisecond
	var log logText
	d := newDevice(t, Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
	f := connect(t, d)
	f.negotiate(plainFeats)
	f.do(SetFeatures, u64(plainFeats|featCSUM))
	enginetest.Eventually(t, 5*time.Second, func() bool { return strings.Contains(log.String(), "share=on") })
	f.do(SetFeatures, u64(plainFeats))
	f.share()
	require.Equal(t, 1, strings.Count(log.String(), "share=on"))
}

type logText struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logText) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}
