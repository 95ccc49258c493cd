package vhostuser

import (
	"bytes"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// reserveModel is a guest, a Reserver and others that push to the same ring, in
// an order that bytes say, and what must come of it.
type reserveModel struct {
	t      testing.TB
	f      *front
	d      *Device
	x      *Reserver
	rx     *guestRing
	size   int // of all buffers
	posted map[uint16]bool
	want   [][]byte
	empty  int // buffers that may come back empty

	b    frame.Batch
	used int // buffers of the reservation that hold frames
	op   []byte
	seq  byte
}

func newReserveModel(t testing.TB, ops []byte) *reserveModel {
	d := newDevice(t, Config{})
	f := connect(t, d)
	m := &reserveModel{t: t, f: f, d: d, x: d.Reserver(0), rx: f.rings[0], posted: map[uint16]bool{}, op: ops}
	m.size = []int{60, 300, 1526, 4096}[m.byte()%4]
	feats := uint64(allOffloads)
	if m.byte()%2 == 1 {
		feats &^= featEventIdx
	}
	f.bringUp(feats, 2)
	m.b.Reset(0)
	return m
}

func (m *reserveModel) byte() int {
	if len(m.op) == 0 {
		return 0
	}
	b := m.op[0]
	m.op = m.op[1:]
	return int(b)
}

// free is how many bytes of the guest's buffers nobody has in hand.
func (m *reserveModel) free() int {
	n := len(m.posted)
	if m.x.open() {
		n -= m.x.size()
	}
	return n * m.size
}

func (m *reserveModel) data() []byte {
	m.seq++
	n := 60 + m.byte()*m.byte()%(4*m.size)
	b := testFrame(n, m.seq)
	return b
}

// reserve receives one more frame in this turn, if there is room.
func (m *reserveModel) reserve() {
	if m.used > 150 {
		return
	}
	data := m.data()
	least, free := 12+len(data), m.free()
	if m.x.open() {
		free += (m.x.size() - m.used) * m.size
	}
	bufs := m.x.Reserve(m.used, least, least+m.byte()*m.size/16)
	require.Equal(m.t, free >= least, bufs != nil, "%d bytes of %d", least, free)
	if bufs == nil {
		require.True(m.t, m.x.Short())
		return
	}
	_, m.used = landHead(&m.b, bufs, m.used, data, 14+m.byte()%(frame.HeadSize-13))
}

// others pushes a frame as another worker does.
func (m *reserveModel) others() {
	data := m.data()
	fits := m.free() >= 12+len(data)
	got := pushBytes(m.d, data)[0].Reason
	if fits {
		require.Equal(m.t, frame.ReasonNone, got)
		m.want = append(m.want, data)
	} else {
		require.Equal(m.t, frame.NoBuffer, got)
	}
}

// endTurn pushes what was received, less what a stage dropped or cut.
func (m *reserveModel) endTurn() {
	m.x.Keep(m.used)
	if m.byte()%3 == 0 {
		m.others()
	}
	var fs []*frame.Frame
	for i := range m.b.Len() {
		f := m.b.Frame(i)
		switch m.byte() % 5 {
		case 0:
			continue
		case 1:
			cut(f, min(int(f.Len), 60+m.byte()))
		}
		m.want = append(m.want, f.Bytes())
		fs = append(fs, f)
	}
	m.d.Push(0, fs)
	for _, f := range fs {
		require.Equal(m.t, frame.ReasonNone, f.Reason)
	}
	m.freeTurn()
}

func (m *reserveModel) freeTurn() {
	m.x.Free()
	m.b.Reset(0)
	m.used = 0
	require.False(m.t, m.x.open())
}

// step does what one byte says.
func (m *reserveModel) step() {
	op := m.byte() % 16
	if op >= 10 && m.x.open() {
		m.endTurn() // the control plane waits for it
		m.reap()
	}
	spares := m.x.out()
	switch op {
	case 0, 1, 2:
		for range m.byte() % testRing {
			if len(m.posted) < testRing {
				m.posted[m.rx.recv(m.size)] = true
			}
		}
	case 3, 4, 5:
		m.reserve()
	case 6, 7:
		m.others()
	case 8, 9:
		m.endTurn()
	case 10:
		m.d.Pairs()[0].Arm()
		m.empty = spares
		require.Zero(m.t, m.x.out())
	case 11:
		m.x.Arm()
		if m.byte()%2 == 0 {
			require.False(m.t, m.x.Arm(), "twice")
		}
		m.x.Disarm()
	case 12:
		m.f.do(SetVringEnable, u32s(0, 0))
		require.Equal(m.t, frame.QueueStopped, pushBytes(m.d, testFrame(60, 1))[0].Reason)
		m.f.do(SetVringEnable, u32s(0, 1))
	case 13:
		m.f.do(SetMemTable, table([4]uint64{testGPA, testMem, testUVA, 0}), m.f.memfd)
		m.empty = spares
	case 14, 15:
		if op == 15 { // a turn that failed
			m.reserve()
			if m.x.size() == 0 {
				m.x.Keep(0)
			}
			spares += m.x.size()
			m.b.Reset(0)
			m.used = 0
		}
		m.reap()
		base, empty := m.f.stopRx(m.d, m.posted)
		require.LessOrEqual(m.t, empty, spares)
		m.f.start(0, base)
	}
	require.LessOrEqual(m.t, m.x.out()+m.x.size(), reserveMax)
	m.reap()
}

func (m *reserveModel) reap() {
	got, empty := reap(m.t, m.rx, m.posted)
	require.Equal(m.t, len(m.want), len(got))
	for i := range got {
		require.True(m.t, bytes.Equal(m.want[i], got[i]), "frame %d", i)
	}
	require.Equal(m.t, m.empty, empty)
	m.want, m.empty = nil, 0
}

func (m *reserveModel) run() {
	for len(m.op) > 0 {
		m.step()
	}
	if m.x.open() {
		m.endTurn()
	}
	m.reap()
	m.f.stopRx(m.d, m.posted)
}

// TestReserveAmongOthers: whatever others do to the ring, every buffer comes
// back once, every frame whole, in order, and none empty but for those that
// could not be kept any longer.
func TestReserveAmongOthers(t *testing.T) { bothRings(t, testReserveAmongOthers) }

func testReserveAmongOthers(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	spares := 0
	for range 12 {
		ops := make([]byte, 2000)
		for i := range ops {
			ops[i] = byte(rnd.Uint32())
		}
		m := newReserveModel(t, ops)
		for len(m.op) > 0 {
			m.step()
			spares += m.x.out()
		}
		m.run()
		m.f.close()
	}
	require.Greater(t, spares, 2000, "too little happened between Reserve and Keep")
}

// FuzzReserve is TestReserveAmongOthers with bytes of the fuzzer's, which also
// choose the kind of ring.
func FuzzReserve(f *testing.F) {
	f.Add([]byte("\x00\x02\x01\x00\x00\x3f\x03\x10\x10\xff\x20\x06\x10\x10\x08\x01\x01\x0e\x00\x3f\x03\x10\x10\xff\x20"))
	f.Add([]byte("\x01\x03\x00\x00\x3f\x03\x30\x30\xff\x20\x06\x10\x10\x0f\x40\x40\xff\x01\x08"))
	f.Add([]byte("\x00\x01\x00\x00\x3f\x03\x30\x30\xff\x20\x06\x10\x10\x08\x02\x00\x0a\x0b\x00\x0d\x0c\x0e"))
	f.Fuzz(func(t *testing.T, ops []byte) {
		if len(ops) == 0 || len(ops) > 2000 {
			return
		}
		packedRings = ops[0]%2 == 1
		defer func() { packedRings = false }()
		m := newReserveModel(t, ops[1:])
		m.run()
		m.f.close()
	})
}

// open says whether there is a reservation, and size how large it is.
func (x *Reserver) open() bool {
	x.r.mu.Lock()
	defer x.r.mu.Unlock()
	return x.q != nil
}

func (x *Reserver) size() int {
	x.r.mu.Lock()
	defer x.r.mu.Unlock()
	return x.n
}

// out is how many spares there are.
func (x *Reserver) out() int {
	x.r.mu.Lock()
	defer x.r.mu.Unlock()
	return x.spares
}

// spared makes five spares, of six buffers that a reservation took and one that
// another worker took, and leaves three in the ring.
func spared(t *testing.T, d *Device, f *front) (rx *guestRing, posted map[uint16]bool) {
	rx, posted = f.rings[0], map[uint16]bool{}
	for range 10 {
		posted[rx.recv(1000)] = true
	}
	x := d.Reserver(0)
	var b frame.Batch
	b.Reset(0)
	data := tcpFrame(500)
	fr, used := land(&b, x.Reserve(0, 5001, 6000), 0, data)
	require.Equal(t, frame.ReasonNone, pushBytes(d, testFrame(60, 1))[0].Reason)
	x.Keep(used)
	d.Push(0, []*frame.Frame{fr})
	x.Free()
	require.Equal(t, 5, x.out())
	got, empty := reap(t, rx, posted)
	require.Equal(t, [][]byte{testFrame(60, 1), data}, got)
	require.Zero(t, empty)
	return rx, posted
}

// Whatever takes the ring away returns what is out of it.
func TestSparesAreReturned(t *testing.T) { bothRings(t, testSparesAreReturned) }

func testSparesAreReturned(t *testing.T) {
	regions := [4]uint64{testGPA, testMem, testUVA, 0}
	for name, do := range map[string]func(d *Device, f *front){
		"stop":          func(_ *Device, f *front) { f.ask(GetVringBase, u32s(0, 0)) },
		"memory table":  func(_ *Device, f *front) { f.do(SetMemTable, table(regions), f.memfd) },
		"no memory":     func(_ *Device, f *front) { f.do(RemMemReg, region1(testGPA, testMem, testUVA, 0)) },
		"features":      func(_ *Device, f *front) { f.do(SetFeatures, u64(allOffloads|featLogAll)) },
		"log":           func(_ *Device, f *front) { f.do(SetLogBase, u64s(4096, 0), f.memfd) },
		"address":       func(_ *Device, f *front) { f.do(SetVringAddr, addr(0, 0, 0)) },
		"device reset":  func(_ *Device, f *front) { f.do(ResetDevice, nil) },
		"status reset":  func(_ *Device, f *front) { f.do(SetStatus, u64(0)) },
		"disabled stop": func(_ *Device, f *front) { f.do(SetVringEnable, u32s(0, 0)); f.ask(GetVringBase, u32s(0, 0)) },
		"sleep":         func(d *Device, _ *front) { d.Pairs()[0].Arm() },
		"gone": func(d *Device, f *front) {
			f.c.Close()
			enginetest.Eventually(t, 5*time.Second, func() bool { return d.Status().State == Disconnected })
		},
		"moved": func(d *Device, f *front) {
			v, fds, err := d.Export()
			require.NoError(t, err)
			require.Equal(t, f.baseOf(7)&0xffff, uint32(v.Rings[0].Base))
			require.NoError(t, d.Import(v, fds))
			for _, fd := range fds {
				closeFD(fd)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			noLeak(t)
			d := newDevice(t, Config{})
			f := connect(t, d)
			f.bringUp(allOffloads, 2)
			rx, posted := spared(t, d, f)
			do(d, f)
			_, empty := reap(t, rx, posted)
			require.Equal(t, 5, empty)
			require.Zero(t, d.Reserver(0).out())
			require.Len(t, posted, 3)
			if d.Status().State == Up { // and it goes on behind them
				require.Equal(t, frame.ReasonNone, pushBytes(d, testFrame(2500, 2))[0].Reason)
				got, _ := reap(t, rx, posted)
				require.Equal(t, [][]byte{testFrame(2500, 2)}, got)
			}
		})
	}
}

// A ring that is only disabled keeps them.
func TestSparesStayWhileDisabled(t *testing.T) { bothRings(t, testSparesStayWhileDisabled) }

func testSparesStayWhileDisabled(t *testing.T) {
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(allOffloads, 2)
	rx, posted := spared(t, d, f)
	f.do(SetVringEnable, u32s(0, 0))
	require.Equal(t, 5, d.Reserver(0).out())
	f.do(SetVringEnable, u32s(0, 1))
	fs := pushBytes(d, testFrame(4800, 3), testFrame(2900, 4), testFrame(60, 5))
	require.Equal(t, frame.ReasonNone, fs[0].Reason)
	require.Equal(t, frame.ReasonNone, fs[1].Reason)
	require.Equal(t, frame.NoBuffer, fs[2].Reason, "there were eight in all")
	got, empty := reap(t, rx, posted)
	require.Equal(t, [][]byte{testFrame(4800, 3), testFrame(2900, 4)}, got)
	require.Zero(t, empty)
	require.Empty(t, posted)
}

// Spares that a frame took and did not fit in, or that a fault in the sender's
// memory kept from being filled, are spares again.
func TestSparesGoBack(t *testing.T) { bothRings(t, testSparesGoBack) }

func testSparesGoBack(t *testing.T) {
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(allOffloads, 2)
	rx, posted := spared(t, d, f)
	x := d.Reserver(0)
	require.Equal(t, frame.NoBuffer, pushBytes(d, testFrame(8000, 3))[0].Reason, "more than there is")
	require.Equal(t, 5, x.out())
	done, gone := make(chan any), missing(t)
	frame.Go(func() {
		defer func() { done <- recover() }()
		var b frame.Batch
		b.Reset(0)
		enginetest.Fill(&b, testFrame(60, 1), testFrame(600, 2), testFrame(60, 3))
		b.Frame(1).Tail[0] = gone
		pushBatch(d, &b)
	})
	_, ok := frame.FaultAddr(<-done)
	require.True(t, ok)
	require.Equal(t, 4, x.out())
	frame.Go(func() {
		defer func() { done <- recover() }()
		var b frame.Batch
		b.Reset(0)
		enginetest.Fill(&b, testFrame(2000, 2))
		b.Frame(0).Tail[0] = gone[:100]
		pushBatch(d, &b)
	})
	_, ok = frame.FaultAddr(<-done)
	require.True(t, ok)
	require.Equal(t, 4, x.out())
	require.Equal(t, frame.ReasonNone, pushBytes(d, testFrame(6900, 4))[0].Reason)
	got, empty := reap(t, rx, posted)
	require.Equal(t, [][]byte{testFrame(60, 1), testFrame(6900, 4)}, got)
	require.Zero(t, empty)
	f.stopRx(d, posted)
}

// H008: the ring's memory is gone when spares are to be returned. Neither the
// frontend's goroutine nor one that moves the session survives a fault as
// workers do.
func TestSparesMeetFault(t *testing.T) { bothRings(t, testSparesMeetFault) }

func testSparesMeetFault(t *testing.T) {
	for name, do := range map[string]func(d *Device, f *front){
		"stop": func(_ *Device, f *front) { f.ask(GetVringBase, u32s(0, 0)) },
		"gone": func(d *Device, f *front) {
			f.c.Close()
			enginetest.Eventually(t, 5*time.Second, func() bool { return d.Status().State == Disconnected })
		},
		"moved": func(d *Device, _ *front) {
			_, fds, err := d.Export()
			require.NoError(t, err)
			for _, fd := range fds {
				closeFD(fd)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			noLeak(t)
			d := newDevice(t, Config{})
			f := connect(t, d)
			f.bringUp(allOffloads, 2)
			spared(t, d, f)
			require.NoError(t, unix.Ftruncate(f.memfd, 0))
			do(d, f)
			require.NoError(t, unix.Ftruncate(f.memfd, testMem))
			require.Zero(t, d.Reserver(0).out())
			require.EqualValues(t, 1, d.faults.Load())
		})
	}
}

// A ring that breaks while buffers are out returns them when it stops.
func TestSparesOfBrokenRing(t *testing.T) { bothRings(t, testSparesOfBrokenRing) }

func testSparesOfBrokenRing(t *testing.T) {
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(allOffloads, 2)
	rx, posted := spared(t, d, f)
	x := d.Reserver(0)
	var b frame.Batch
	b.Reset(0)
	fr, used := land(&b, x.Reserve(0, 1000, 1000), 0, tcpFrame(300))
	x.Keep(used)
	rx.breakIt()
	require.Equal(t, frame.QueueStopped, pushBytes(d, testFrame(60000, 1))[0].Reason)
	d.Push(0, []*frame.Frame{fr})
	require.Equal(t, frame.QueueStopped, fr.Reason)
	x.Free()
	require.False(t, x.Reserve(0, 1, 1) != nil)
	require.False(t, x.Short())
	x.Keep(0)
	require.False(t, x.Arm())
	enginetest.Eventually(t, 5*time.Second, func() bool { return d.Status().Rings[0].Broken })
	f.ask(GetVringBase, u32s(0, 0))
	_, empty := reap(t, rx, posted)
	require.Equal(t, 5, empty)
}

// A frame that lies in the buffers of one reservation and is pushed to a ring
// of which others are reserved is copied; so is one whose Head has grown, or
// that says a place where it does not lie.
func TestReserveTakesNoOther(t *testing.T) { bothRings(t, testReserveTakesNoOther) }

func testReserveTakesNoOther(t *testing.T) {
	for name, spoil := range map[string]func(f *frame.Frame){
		"another queue": func(f *frame.Frame) { f.Queue = 1 },
		"head shorter": func(f *frame.Frame) {
			f.Len -= 4
			f.HeadLen -= 4
		},
		"elsewhere":       func(f *frame.Frame) { f.RxAt = 1 },
		"behind the rest": func(f *frame.Frame) { f.RxAt, f.RxBufs = 190, 1000 },
		"too few":         func(f *frame.Frame) { f.RxBufs = 1 },
		"tail elsewhere":  func(f *frame.Frame) { f.Tail[0] = bytes.Clone(f.Tail[0]) },
	} {
		for _, n := range []int{1500, 20} {
			if n == 20 && name != "another queue" {
				continue // it has no tail
			}
			t.Run(name, func(t *testing.T) {
				d := newDevice(t, Config{QueuePairs: 2})
				f := connect(t, d)
				f.bringUp(allOffloads, 4)
				for range 8 {
					f.rings[0].recv(1000)
					f.rings[2].recv(1000)
				}
				var b frame.Batch
				b.Reset(0)
				x, y := d.Reserver(0), d.Reserver(1)
				require.NotSame(t, x, y)
				require.Same(t, x, d.Reserver(0))
				data := tcpFrame(n)
				fr, used := land(&b, x.Reserve(0, 3000, 3000), 0, data)
				x.Keep(max(used, 2))
				mine, yused := land(&b, y.Reserve(0, 3000, 3000), 0, data)
				mine.Queue = 1
				y.Keep(yused)
				spoil(fr)
				want := fr.Bytes()
				d.Push(0, []*frame.Frame{fr, mine})
				require.Equal(t, frame.ReasonNone, fr.Reason)
				require.Equal(t, frame.ReasonNone, mine.Reason)
				require.EqualValues(t, 1, d.Pairs()[0].status().RxDirect+d.Pairs()[1].status().RxDirect)
				x.Free()
				y.Free()
				f.ask(GetVringBase, u32s(0, 0))
				f.ask(GetVringBase, u32s(2, 0))
				_, one := f.rings[0].received(12)
				_, two := f.rings[2].received(12)
				require.Contains(t, append(one, two...), want)
				require.Contains(t, two, data)
			})
		}
	}
}

// So is one that is all Head, and finds another ring in the place of its own.
func TestReserveTakesNoOtherWhole(t *testing.T) { bothRings(t, testReserveTakesNoOtherWhole) }

func testReserveTakesNoOtherWhole(t *testing.T) {
	d := newDevice(t, Config{QueuePairs: 2})
	f := connect(t, d)
	f.bringUp(allOffloads, 4)
	for range 8 {
		f.rings[0].recv(1000)
		f.rings[2].recv(1000)
	}
	var b frame.Batch
	b.Reset(0)
	x, y := d.Reserver(0), d.Reserver(1)
	fr, used := land(&b, x.Reserve(0, 3000, 3000), 0, testFrame(100, 1))
	x.Keep(used)
	mine, yused := land(&b, y.Reserve(0, 3000, 3000), 0, testFrame(600, 2))
	mine.Queue = 1
	y.Keep(yused)
	f.do(SetVringEnable, u32s(0, 0))
	d.Push(0, []*frame.Frame{fr})
	require.Zero(t, d.Pairs()[1].status().RxDirect)
	f.do(SetVringEnable, u32s(0, 1))
	d.Push(0, []*frame.Frame{mine})
	require.EqualValues(t, 1, d.Pairs()[1].status().RxDirect)
	x.Free()
	y.Free()
	_, got := f.rings[2].received(12)
	require.Equal(t, [][]byte{testFrame(100, 1), testFrame(600, 2)}, got)
}

// Others that find too few buffers behind a reservation, and take none, do not
// keep its own from going back.
func TestReserveGoesBackBehindNobody(t *testing.T) { bothRings(t, testReserveGoesBackBehindNobody) }

func testReserveGoesBackBehindNobody(t *testing.T) {
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(allOffloads, 2)
	for range 8 {
		f.rings[0].recv(1000)
	}
	x := d.Reserver(0)
	require.Len(t, x.Reserve(0, 2000, 2000), 2)
	require.Equal(t, frame.NoBuffer, pushBytes(d, testFrame(8000, 1))[0].Reason)
	x.Keep(0)
	require.Zero(t, x.out())
	require.Len(t, x.Reserve(0, 8000, 8000), 8)
	x.Keep(0)
}

// The ring that a pair's frames go to is not always its own.
func TestReserveFollowsTheSet(t *testing.T) { bothRings(t, testReserveFollowsTheSet) }

func testReserveFollowsTheSet(t *testing.T) {
	d := newDevice(t, Config{QueuePairs: 3})
	f := connect(t, d)
	f.bringUp(allOffloads, 6)
	for i := range 3 {
		f.rings[2*i].recv(2000)
	}
	lends := func() (s [3]bool) {
		for i := range 3 {
			x := d.Reserver(i)
			s[i] = x.Reserve(0, 1, 1) != nil
			x.Keep(0)
		}
		return s
	}
	require.Equal(t, [3]bool{true, true, true}, lends())
	f.do(SetVringEnable, u32s(2, 0))
	require.Equal(t, [3]bool{true, false, false}, lends(), "frames for 1 go to 2, those for 2 to 0")
	f.do(SetVringEnable, u32s(4, 0))
	require.Equal(t, [3]bool{true, false, false}, lends())
	f.do(SetVringEnable, u32s(0, 0))
	require.Equal(t, [3]bool{false, false, false}, lends())
	f.do(SetVringEnable, u32s(2, 1))
	require.Equal(t, [3]bool{false, true, false}, lends())
}

// TestReserveRaces lets one worker receive into the guest's buffers while two
// others push to the same ring, the guest takes and posts, and the frontend
// stops, starts, disables and remaps.
func TestReserveRaces(t *testing.T) { bothRings(t, testReserveRaces) }

func testReserveRaces(t *testing.T) {
	noLeak(t)
	var turns sync.RWMutex // held by workers during a turn
	d := newDevice(t, Config{Barrier: func() {
		turns.Lock()
		turns.Unlock() //nolint:staticcheck // it waits
	}})
	f := connect(t, d)
	f.bringUp(allOffloads, 2)
	rx, x := f.rings[0], d.Reserver(0)
	const size = 700
	var guest sync.Mutex // guards rx, posted and counts
	posted := map[uint16]bool{}
	var got [3]int
	take := func() { // guest is held
		frames, _ := reap(t, rx, posted)
		for _, b := range frames {
			who := int(b[5])
			got[who]++
			if !bytes.Equal(b, testFrame(len(b), byte(who))) {
				t.Errorf("frame of %d bytes of %d is spoiled", len(b), who)
			}
		}
	}
	var done atomic.Bool
	var sent [3]atomic.Int64
	var all sync.WaitGroup
	run := func(fn func(*rand.Rand)) {
		all.Add(1)
		frame.Go(func() {
			defer all.Done()
			rnd := rand.New(rand.NewPCG(1, 2))
			for !done.Load() {
				fn(rnd)
				runtime.Gosched()
			}
		})
	}
	run(func(*rand.Rand) {
		guest.Lock()
		defer guest.Unlock()
		take()
		for len(posted) < testRing {
			posted[rx.recv(size)] = true
		}
	})
	for who := range 2 {
		run(func(rnd *rand.Rand) {
			turns.RLock()
			defer turns.RUnlock()
			var fs [][]byte
			for range 1 + rnd.IntN(4) {
				fs = append(fs, testFrame(60+rnd.IntN(3*size), byte(who)))
			}
			for _, fr := range pushBytes(d, fs...) {
				if fr.Reason == frame.ReasonNone {
					sent[who].Add(1)
				}
			}
		})
	}
	var b frame.Batch
	run(func(rnd *rand.Rand) {
		turns.RLock()
		defer turns.RUnlock()
		b.Reset(0)
		used := 0
		var fs []*frame.Frame
		for range 1 + rnd.IntN(3) {
			data := testFrame(60+rnd.IntN(5*size), 2)
			bufs := x.Reserve(used, 12+len(data), 12+len(data)+rnd.IntN(20*size))
			if bufs == nil {
				break
			}
			var fr *frame.Frame
			fr, used = landHead(&b, bufs, used, data, 14+rnd.IntN(100))
			if rnd.IntN(5) > 0 {
				fs = append(fs, fr)
			}
		}
		x.Keep(used)
		d.Push(0, fs)
		x.Free()
		for _, fr := range fs {
			if fr.Reason == frame.ReasonNone {
				sent[2].Add(1)
			}
		}
		if x.Short() {
			x.Arm()
			x.Disarm()
		}
		if rnd.IntN(50) == 0 {
			d.Pairs()[0].Arm()
		}
	})
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 40 {
		switch rnd.IntN(4) {
		case 0:
			f.do(SetMemTable, table([4]uint64{testGPA, testMem, testUVA, 0}), f.memfd)
		case 1:
			f.do(SetVringEnable, u32s(0, uint32(rnd.IntN(2))))
		default:
			reply := f.ask(GetVringBase, u32s(0, 0))
			guest.Lock()
			take()
			base := rx.used
			require.Equal(t, f.baseOf(base), native.Uint32(reply[4:]))
			require.Len(t, posted, int(rx.avail-rx.used))
			guest.Unlock()
			f.start(0, base)
			f.do(SetVringEnable, u32s(0, 1))
		}
	}
	done.Store(true)
	all.Wait()
	reply := f.ask(GetVringBase, u32s(0, 0))
	take()
	require.Equal(t, f.baseOf(rx.used), native.Uint32(reply[4:]))
	for who := range sent {
		require.EqualValues(t, sent[who].Load(), got[who])
		require.Positive(t, got[who])
	}
	require.Positive(t, d.Pairs()[0].status().RxDirect)
}
