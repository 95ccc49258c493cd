package vhostuser

import (
	"net/netip"
	"runtime"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

const allOffloads = plainFeats | featCSUM | featGuestCSUM | featGuestTSO4 | featGuestTSO6 | featHostTSO4 | featHostTSO6 |
	featMrgRxbuf | featEventIdx

var (
	testEth = enginetest.Eth{Dst: frame.MAC{2, 0, 0, 0, 0, 1}, Src: frame.MAC{2, 0, 0, 0, 0, 2}}
	testIP  = enginetest.IP{Src: netip.MustParseAddr("10.0.0.1"), Dst: netip.MustParseAddr("10.0.0.2")}
)

func tcpFrame(n int) []byte {
	return enginetest.TCPFrame(testEth, testIP, enginetest.TCP{Src: 1, Dst: 2, Flags: enginetest.ACK},
		enginetest.Payload(n, 3))
}

// received drains an rx ring and joins the buffers of merged frames.
func (r *guestRing) received(hdr int) (hdrs, frames [][]byte) {
	for {
		head, n, ok := r.take()
		if !ok {
			return hdrs, frames
		}
		b := r.bytes(head, n)
		if n == 0 {
			hdrs, frames = append(hdrs, nil), append(frames, nil)
			continue
		}
		if hdr == 12 {
			for range native.Uint16(b[10:]) - 1 {
				head, n, ok := r.take()
				require.True(r.f.t, ok)
				b = append(b, r.bytes(head, n)...)
			}
		}
		hdrs, frames = append(hdrs, b[:hdr]), append(frames, b[hdr:])
	}
}

func TestPullChains(t *testing.T) { bothRings(t, testPullChains) }

func testPullChains(t *testing.T) {
	noLeak(t)
	frameOf := testFrame(700, 9)
	for _, hdr := range []int{10, 12} {
		feats := uint64(featProtocolFeatures)
		if hdr == 12 {
			feats |= featVersion1
		}
		d := newDevice(t, Config{})
		f := connect(t, d)
		f.bringUp(feats, 2)
		tx := f.rings[1]
		whole := append(make([]byte, hdr), frameOf...)
		// Headers over any number of descriptors are good (H055).
		for _, cuts := range [][]int{{}, {hdr}, {1}, {hdr - 1}, {hdr + 1}, {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, {hdr + 128}, {200, 300}} {
			var bufs []guestBuf
			from := 0
			for _, c := range append(cuts, len(whole)) {
				at := f.alloc(c - from)
				copy(f.mem[at:], whole[from:c])
				bufs = append(bufs, guestBuf{at, c - from, false})
				from = c
			}
			head := tx.post(bufs...)
			got, _ := pull(d.Pairs()[0])
			require.Equal(t, [][]byte{frameOf}, got, "cuts %v", cuts)
			h, n, ok := tx.take()
			require.True(t, ok)
			require.Equal(t, head, h)
			require.Zero(t, n)
		}
		f.close()
	}
}

// What a guest may not send comes back unused and is counted; what follows is
// not affected.
func TestPullRefuses(t *testing.T) { bothRings(t, testPullRefuses) }

func testPullRefuses(t *testing.T) {
	noLeak(t)
	partial := tcpFrame(100)
	off := enginetest.Partial(partial)
	gso := tcpFrame(3000)
	gsoOff := enginetest.GSO(gso, 1000)
	with := func(o frame.Offload, f func(*frame.Offload)) frame.Offload { f(&o); return o }
	d := newDevice(t, Config{MTU: 1500})
	f := connect(t, d)
	f.bringUp(plainFeats|featCSUM|featHostTSO4, 2)
	tx := f.rings[1]
	for name, c := range map[string]struct {
		o      frame.Offload
		b      []byte
		reason frame.DropReason
	}{
		"H055 header only":           {frame.Offload{}, nil, frame.ShortFrame},
		"H055 13 bytes":              {frame.Offload{}, make([]byte, 13), frame.ShortFrame},
		"H056 longer than 64 KiB":    {frame.Offload{}, make([]byte, frame.MaxLen+1), frame.OversizeFrame},
		"H070 csum_start behind":     {with(off, func(o *frame.Offload) { o.CsumStart = 60000 }), partial, frame.BadOffload},
		"H070 csum_start 65535":      {with(off, func(o *frame.Offload) { o.CsumStart, o.CsumOffset = 65535, 65535 }), partial, frame.BadOffload},
		"H070 csum_start in header":  {with(off, func(o *frame.Offload) { o.CsumStart = 4 }), partial, frame.BadOffload},
		"H071 unknown type":          {with(gsoOff, func(o *frame.Offload) { o.GSO = 0x7f }), gso, frame.BadOffload},
		"H071 ECN alone":             {with(gsoOff, func(o *frame.Offload) { o.GSO = frame.GSOECN }), gso, frame.BadOffload},
		"H071 ECN not negotiated":    {with(gsoOff, func(o *frame.Offload) { o.GSO |= frame.GSOECN }), gso, frame.BadOffload},
		"H071 UFO":                   {with(gsoOff, func(o *frame.Offload) { o.GSO = frame.GSOUDP }), gso, frame.BadOffload},
		"H071 TSO6 not negotiated":   {with(gsoOff, func(o *frame.Offload) { o.GSO = frame.GSOTCPv6 }), gso, frame.BadOffload},
		"H071 USO not negotiated":    {with(gsoOff, func(o *frame.Offload) { o.GSO = frame.GSOUDPL4 }), gso, frame.BadOffload},
		"H072 gso_size 0":            {with(gsoOff, func(o *frame.Offload) { o.GSOSize = 0 }), gso, frame.BadOffload},
		"H072 gso_size 1":            {with(gsoOff, func(o *frame.Offload) { o.GSOSize = 1 }), gso, frame.BadOffload},
		"H074 longer than the MTU":   {frame.Offload{}, tcpFrame(2000), frame.OversizeFrame},
		"H072 GSO without a partial": {with(gsoOff, func(o *frame.Offload) { o.Flags = 0 }), gso, frame.BadOffload},
	} {
		t.Run(name, func(t *testing.T) {
			before := d.Pairs()[0].status().Drops[c.reason.String()]
			bad := tx.send(c.o, 12, c.b)
			good := tx.send(frame.Offload{}, 12, testFrame(60, 5))
			got, _ := pull(d.Pairs()[0])
			require.Equal(t, [][]byte{testFrame(60, 5)}, got)
			for _, want := range []uint16{bad, good} {
				h, n, ok := tx.take()
				require.True(t, ok)
				require.Equal(t, want, h)
				require.Zero(t, n)
			}
			require.Equal(t, before+1, d.Pairs()[0].status().Drops[c.reason.String()])
		})
	}
	for name, post := range map[string]func() uint16{
		"H057 writable": func() uint16 { return tx.post(guestBuf{f.alloc(100), 100, true}) },
		"H054 unmapped": func() uint16 { return tx.post(guestBuf{testMem, 100, false}) },
		"H055 empty":    func() uint16 { return tx.post(guestBuf{0, 0, false}) },
	} {
		t.Run(name, func(t *testing.T) {
			before := d.Pairs()[0].status().Drops[frame.BadDescriptor.String()]
			bad := post()
			got, _ := pull(d.Pairs()[0])
			require.Empty(t, got)
			h, n, ok := tx.take()
			require.True(t, ok, "not given back")
			require.Equal(t, bad, h)
			require.Zero(t, n)
			require.Equal(t, before+1, d.Pairs()[0].status().Drops[frame.BadDescriptor.String()])
		})
	}
	// A whole GSO frame passes as it is.
	tx.send(gsoOff, 12, gso)
	got, offs := pull(d.Pairs()[0])
	require.Equal(t, [][]byte{gso}, got)
	require.Equal(t, gsoOff.GSOSize, offs[0].GSOSize)
	require.Equal(t, gsoOff.GSO, offs[0].GSO)
}

// Frames of a disabled ring are taken and lost, and rx delivers nothing (T7).
func TestDisabledRings(t *testing.T) { bothRings(t, testDisabledRings) }

func testDisabledRings(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(plainFeats, 2)
	rx, tx := f.rings[0], f.rings[1]
	f.do(SetVringEnable, u32s(0, 0))
	f.do(SetVringEnable, u32s(1, 0))
	tx.send(frame.Offload{}, 12, testFrame(60, 1))
	got, _ := pull(d.Pairs()[0])
	require.Empty(t, got)
	_, _, ok := tx.take()
	require.True(t, ok, "not consumed")
	require.EqualValues(t, 1, d.Pairs()[0].status().Drops["queue_stopped"])
	rx.recv(2000)
	require.Equal(t, frame.QueueStopped, pushBytes(d, testFrame(60, 1))[0].Reason)
	_, _, ok = rx.take()
	require.False(t, ok)
	// SET_FEATURES without bit 30 enables all rings.
	f.do(SetFeatures, u64(featVersion1))
	require.Equal(t, frame.ReasonNone, pushBytes(d, testFrame(60, 1))[0].Reason)
	_, got = rx.received(12)
	require.Equal(t, [][]byte{testFrame(60, 1)}, got)
}

func TestPushForms(t *testing.T) { bothRings(t, testPushForms) }

func testPushForms(t *testing.T) {
	small := tcpFrame(100)
	partial := tcpFrame(100)
	partialOff := enginetest.Partial(partial)
	gso := tcpFrame(3000)
	gsoOff := enginetest.GSO(gso, 1000)
	for name, c := range map[string]struct {
		feats uint64
		hdr   int
		buf   int
		whole bool // the GSO frame arrives whole
		csum  bool // checksums may be partial
	}{
		"all":             {allOffloads, 12, 2048, true, true},
		"mergeable, tiny": {allOffloads, 12, 100, true, true},
		"no TSO":          {plainFeats | featGuestCSUM | featMrgRxbuf, 12, 2048, false, true},
		"no checksums":    {plainFeats, 12, 2048, false, false},
		"one big buffer":  {allOffloads &^ featMrgRxbuf, 12, 66000, true, true},
		"legacy":          {featProtocolFeatures, 10, 2048, false, false},
		"legacy, merging": {featProtocolFeatures | featMrgRxbuf, 12, 500, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			noLeak(t)
			d := newDevice(t, Config{})
			f := connect(t, d)
			f.bringUp(c.feats, 2)
			rx := f.rings[0]
			for range testRing {
				rx.recv(c.buf)
			}
			var b frame.Batch
			b.Reset(0)
			enginetest.Fill(&b, small, partial, gso)
			b.Frame(0).Flags = frame.DataValid
			b.Frame(1).Offload, b.Frame(2).Offload = partialOff, gsoOff
			for _, f := range pushBatch(d, &b) {
				require.Equal(t, frame.ReasonNone, f.Reason)
			}
			hdrs, got := rx.received(c.hdr)
			if c.whole {
				require.Len(t, got, 3)
				require.Equal(t, gso, got[2])
				var o frame.Offload
				o.Decode(hdrs[2])
				require.Equal(t, gsoOff.GSO, o.GSO)
				require.Equal(t, gsoOff.GSOSize, o.GSOSize)
			} else {
				require.Len(t, got, 5)
				for i, p := range got[2:] {
					require.Len(t, p, 1054)
					require.Equal(t, enginetest.Payload(3000, 3)[i*1000:i*1000+1000], p[54:])
					require.Zero(t, hdrs[2+i][1], "GSO type")
				}
			}
			require.Equal(t, small, got[0])
			for i, p := range got {
				var o frame.Offload
				o.Decode(hdrs[i])
				if !c.csum {
					require.Zero(t, hdrs[i][0], "flags")
					require.True(t, enginetest.ChecksumsOK(p), "frame %d", i)
				} else if o.Flags&frame.NeedsCsum != 0 {
					require.EqualValues(t, 34, o.CsumStart)
				}
			}
		})
	}
}

// H063: buffers that cannot be used do not stay at the front of the ring, and
// a frame that finds too few takes none.
func TestPushNoRoom(t *testing.T) { bothRings(t, testPushNoRoom) }

func testPushNoRoom(t *testing.T) {
	up := func(t *testing.T, feats uint64) (*Device, *front) {
		noLeak(t)
		d := newDevice(t, Config{})
		f := connect(t, d)
		f.bringUp(feats, 2)
		return d, f
	}
	t.Run("empty ring", func(t *testing.T) {
		d, _ := up(t, plainFeats)
		require.Equal(t, frame.NoBuffer, pushBytes(d, testFrame(60, 1))[0].Reason)
	})
	t.Run("too few mergeable", func(t *testing.T) {
		d, f := up(t, plainFeats|featMrgRxbuf)
		for range 3 {
			f.rings[0].recv(400)
		}
		fs := pushBytes(d, testFrame(1400, 1), testFrame(1100, 2), testFrame(60, 3))
		require.Equal(t, frame.NoBuffer, fs[0].Reason)
		require.Equal(t, frame.ReasonNone, fs[1].Reason)
		require.Equal(t, frame.NoBuffer, fs[2].Reason)
		_, got := f.rings[0].received(12)
		require.Equal(t, [][]byte{testFrame(1100, 2)}, got)
	})
	t.Run("longer than a legal buffer", func(t *testing.T) {
		d, f := up(t, plainFeats)
		f.rings[0].recv(1526)
		fs := pushBytes(d, testFrame(1515, 1), testFrame(1514, 2))
		require.Equal(t, frame.OversizeFrame, fs[0].Reason)
		require.Equal(t, frame.ReasonNone, fs[1].Reason)
	})
	for name, n := range map[string]int{"smaller than the header": 11, "header only": 12, "too small": 500} {
		t.Run(name, func(t *testing.T) {
			d, f := up(t, plainFeats)
			f.rings[0].recv(n)
			f.rings[0].recv(2000)
			fs := pushBytes(d, testFrame(1000, 1), testFrame(1000, 2))
			require.Equal(t, frame.NoBuffer, fs[0].Reason)
			require.Equal(t, frame.ReasonNone, fs[1].Reason)
			_, got := f.rings[0].received(12)
			require.Equal(t, [][]byte{nil, testFrame(1000, 2)}, got)
		})
	}
	t.Run("unmapped in the middle", func(t *testing.T) {
		d, f := up(t, plainFeats|featMrgRxbuf)
		rx := f.rings[0]
		rx.recv(400)
		rx.post(guestBuf{testMem, 400, true})
		rx.recv(2000)
		fs := pushBytes(d, testFrame(1000, 1), testFrame(1000, 2))
		require.Equal(t, frame.BadDescriptor, fs[0].Reason)
		require.Equal(t, frame.ReasonNone, fs[1].Reason)
		_, got := rx.received(12)
		require.Equal(t, [][]byte{nil, nil, testFrame(1000, 2)}, got)
	})
	t.Run("readable", func(t *testing.T) {
		d, f := up(t, plainFeats)
		f.rings[0].post(guestBuf{f.alloc(2000), 2000, false})
		require.Equal(t, frame.BadDescriptor, pushBytes(d, testFrame(60, 1))[0].Reason)
	})
}

// H118: frames go to enabled queues only, in order for each.
func TestSpread(t *testing.T) { bothRings(t, testSpread) }

func testSpread(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{QueuePairs: 3})
	f := connect(t, d)
	f.bringUp(plainFeats|featMQ, 6)
	f.do(SetVringEnable, u32s(2, 0))
	for range 40 {
		f.rings[0].recv(2000)
		f.rings[2].recv(2000)
		f.rings[4].recv(2000)
	}
	var b frame.Batch
	b.Reset(0)
	var fs [][]byte
	for i := range 40 {
		fs = append(fs, testFrame(60, byte(i)))
	}
	enginetest.Fill(&b, fs...)
	for i := range 40 {
		b.Frame(i).Queue = uint16(i % 5)
	}
	for _, f := range pushBatch(d, &b) {
		require.Equal(t, frame.ReasonNone, f.Reason)
	}
	var want [2][][]byte
	for i := range fs {
		want[i%5%2] = append(want[i%5%2], fs[i])
	}
	_, got := f.rings[0].received(12)
	assert.Equal(t, want[0], got)
	_, got = f.rings[4].received(12)
	assert.Equal(t, want[1], got)
	_, got = f.rings[2].received(12)
	assert.Empty(t, got)
}

// A fault in the sender's memory must not cost the receiver its buffers.
func TestFaultOfOther(t *testing.T) { bothRings(t, testFaultOfOther) }

func testFaultOfOther(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(plainFeats|featMrgRxbuf, 2)
	for range 2 {
		f.rings[0].recv(2000)
	}
	done, gone := make(chan any), missing(t)
	frame.Go(func() {
		defer func() { done <- recover() }()
		var b frame.Batch
		b.Reset(0)
		enginetest.Fill(&b, testFrame(60, 1), testFrame(600, 2))
		b.Frame(1).Tail[0] = gone
		pushBatch(d, &b)
	})
	_, ok := frame.FaultAddr(<-done)
	require.True(t, ok)
	require.Equal(t, frame.ReasonNone, pushBytes(d, testFrame(60, 3))[0].Reason)
	_, got := f.rings[0].received(12)
	require.Equal(t, [][]byte{testFrame(60, 1), testFrame(60, 3)}, got)
}

// missing is memory that cannot be read.
func missing(t *testing.T) []byte {
	b, err := unix.Mmap(-1, 0, 4096, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	require.NoError(t, err)
	t.Cleanup(func() { _ = unix.Munmap(b) })
	return b[:472]
}

func TestDataPathAllocatesNothing(t *testing.T) { bothRings(t, testDataPathAllocatesNothing) }

// needPlainSyscalls skips a test that counts what interrupts allocate.
func needPlainSyscalls(t *testing.T) {
	ev := eventfd(t)
	defer closeFD(ev)
	if testing.AllocsPerRun(1, func() { _, _ = unix.Write(ev, make([]byte, 8)) }) > 0 {
		t.Skip("the race detector makes system calls allocate")
	}
}

func testDataPathAllocatesNothing(t *testing.T) {
	needPlainSyscalls(t)
	d := newDevice(t, Config{QueuePairs: 2})
	f := connect(t, d)
	f.bringUp(allOffloads&^featEventIdx, 4)
	var b frame.Batch
	fs := make([]*frame.Frame, 0, frame.BatchMax)
	gso, small := tcpFrame(3000), testFrame(200, 2)
	off := enginetest.GSO(gso, 1000)
	// A worker's turn, less what the engine does.
	turn := func(p *Pair) {
		b.Reset(0)
		p.Pull(&b)
		fs = fs[:0]
		for i := range b.Len() {
			b.Frame(i).Queue = uint16(i)
			fs = append(fs, b.Frame(i))
		}
		d.Push(0, fs)
		p.Release(&b)
		p.Arm()
		p.Disarm()
	}
	post := func(tx *guestRing) {
		tx.send(off, 12, gso)
		for range 8 {
			tx.send(frame.Offload{}, 12, small)
		}
		for _, rx := range []*guestRing{f.rings[0], f.rings[2]} {
			rx.takeAll()
			for rx.avail-rx.used < 16 {
				rx.recv(4000)
			}
		}
	}
	const rounds = 100
	turn(d.Pairs()[0])
	var before, after runtime.MemStats
	var allocs uint64
	for i := range 2 * rounds {
		q := i % 2
		post(f.rings[2*q+1])
		runtime.ReadMemStats(&before)
		turn(d.Pairs()[q])
		runtime.ReadMemStats(&after)
		allocs += after.Mallocs - before.Mallocs
	}
	// Something else in the process may allocate now and then.
	require.Less(t, allocs, uint64(rounds), "allocations in %d batches", 2*rounds)
	st := d.Status().Pairs
	require.EqualValues(t, 2*rounds*9, st[0].TxFrames+st[1].TxFrames)
	require.EqualValues(t, 2*rounds*9, st[0].RxFrames+st[1].RxFrames)
}

// Chains of many pieces take all room for scatter lists; the plain ones behind
// them then wait for the next batch, and nothing is allocated.
func TestPullOutOfLists(t *testing.T) {
	needPlainSyscalls(t)
	d := newDevice(t, Config{Snapshot: 18})
	f := connect(t, d)
	f.bringUp(plainFeats|featIndirectDesc, 2)
	tx, p := f.rings[1], d.Pairs()[0]
	const pieces = 63
	for i := range testRing {
		data := testFrame(pieces*16, byte(i))
		if i >= 2048/(1+pieces) {
			tx.send(frame.Offload{}, 12, data)
			continue
		}
		at := f.alloc(12 + len(data))
		copy(f.mem[at+12:], data)
		table := f.alloc(16 * (1 + pieces))
		for j := range 1 + pieces {
			e := f.mem[table+16*uint32(j):]
			n, off := uint32(16), at+12+16*uint32(j-1)
			if j == 0 {
				n, off = 12, at
			}
			native.PutUint64(e, testGPA+uint64(off))
			native.PutUint32(e[8:], n)
			native.PutUint16(e[12:], uint16(min(1, pieces-j)))
			native.PutUint16(e[14:], uint16(j+1))
		}
		head := tx.post(guestBuf{table, 16 * (1 + pieces), false})
		native.PutUint16(tx.at(uint32(head)*16+12), 4)
	}
	tx.avail -= testRing
	var b frame.Batch
	pulled := func(check func(f *frame.Frame, n int)) {
		turn.Lock()
		defer turn.Unlock()
		tx.avail += testRing
		native.PutUint16(tx.at(availAt+2), tx.avail)
		for n := 0; n < testRing; {
			b.Reset(0)
			p.heavy = false
			if p.Pull(&b) == 0 {
				t.Fatalf("%d frames of %d", n, testRing)
			}
			for i := range b.Len() {
				check(b.Frame(i), n)
				n++
			}
			p.Release(&b)
		}
	}
	pulled(func(f *frame.Frame, n int) { require.Equal(t, testFrame(pieces*16, byte(n)), f.Bytes(), n) })
	require.Zero(t, testing.AllocsPerRun(20, func() { pulled(func(*frame.Frame, int) {}) }))
}
