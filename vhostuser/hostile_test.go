package vhostuser

import (
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// resources counts what a frontend could make us leak.
func resources(t testing.TB) (fds, maps int) {
	t.Helper()
	es, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	b, err := os.ReadFile("/proc/self/maps")
	require.NoError(t, err)
	return len(es), strings.Count(string(b), "memfd:")
}

// noLeak checks at the end of the test that all descriptors and mappings are
// back. It is called before anything is made.
func noLeak(t *testing.T) {
	t.Helper()
	// The runtime's poller opens its own descriptors at the first use.
	a, b := pair(t)
	a.Close()
	b.Close()
	fds, maps := resources(t)
	t.Cleanup(func() {
		var f, m int
		enginetest.Wait(2*time.Second, func() bool {
			f, m = resources(t)
			return f <= fds && m <= maps
		})
		assert.Equal(t, fds, f, "descriptors")
		assert.Equal(t, maps, m, "mappings")
	})
}

func devnull(t testing.TB) int {
	t.Helper()
	fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	require.NoError(t, err)
	t.Cleanup(func() { closeFD(fd) })
	return fd
}

// expectEnd requires that the device closes the connection.
func (f *front) expectEnd() {
	f.t.Helper()
	require.NoError(f.t, f.c.SetReadDeadline(time.Now().Add(5*time.Second)))
	_, err := f.c.Read(make([]byte, 1))
	if err != io.EOF {
		require.ErrorIs(f.t, err, unix.ECONNRESET)
	}
}

// The cases after which the connection must end (H001, H004, H005, H007, H015).
func TestHostileStream(t *testing.T) {
	raw := func(req, flags, size uint32, rest ...byte) []byte {
		return append(u32s(req, flags, size), rest...)
	}
	for name, b := range map[string][]byte{
		"H001 size 2^32-1":            raw(5, 1, 0xffffffff),
		"H001 size above the largest": raw(2, 1, 9),
		"H001 unknown request, huge":  raw(9999, 1, 1<<20),
		"H007 version 0":              raw(1, 0, 0),
		"H007 version 2":              raw(1, 2, 0),
		"H007 reply bit":              raw(1, 5, 0),
		"H015 in-band alone":          raw(16, 1, 8, u64(protoInband)...),
	} {
		t.Run(name, func(t *testing.T) {
			noLeak(t)
			d := newDevice(t, Config{})
			f := connect(t, d)
			_, _, err := f.c.WriteMsgUnix(b, unix.UnixRights(f.memfd, f.memfd), nil)
			require.NoError(t, err)
			f.expectEnd()
		})
	}
	t.Run("H004 end in header", func(t *testing.T) {
		noLeak(t)
		f := connect(t, newDevice(t, Config{}))
		_, _, err := f.c.WriteMsgUnix(raw(5, 1, 40)[:7], unix.UnixRights(f.memfd), nil)
		require.NoError(t, err)
		require.NoError(t, f.c.CloseWrite())
		f.expectEnd()
	})
	t.Run("H004 end in payload", func(t *testing.T) {
		noLeak(t)
		f := connect(t, newDevice(t, Config{}))
		_, _, err := f.c.WriteMsgUnix(raw(5, 1, 40, 1, 0, 0), unix.UnixRights(f.memfd), nil)
		require.NoError(t, err)
		require.NoError(t, f.c.CloseWrite())
		f.expectEnd()
	})
}

// H003: the stream may come in any pieces; H006: or two messages at once.
func TestPieces(t *testing.T) { bothRings(t, testPieces) }

func testPieces(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	f := connect(t, d)
	msg := append(u32s(uint32(GetVringBase), 1, 8), u32s(1, 0)...)
	for _, b := range msg {
		_, err := f.c.Write([]byte{b})
		require.NoError(t, err)
	}
	_, p := f.receive()
	require.Equal(t, u32s(1, 0), p)

	first := append(u32s(uint32(SetProtocolFeatures), 1, 8), u64(offeredProtocol)...)
	_, err := f.c.Write(append(first, u32s(uint32(GetFeatures), 1, 0)...))
	require.NoError(t, err)
	_, p = f.receive()
	require.Equal(t, d.offered, native.Uint64(p))

	// The descriptor belongs to the second of two messages.
	_, err = f.c.Write(u32s(uint32(SetOwner), 1, 0))
	require.NoError(t, err)
	f.do(SetVringCall, u64(0), f.rings[0].call)
}

// Requests that are refused, with the connection kept and nothing leaked. Each
// gets exactly one reply (H016).
func TestHostileMessages(t *testing.T) {
	reg := func(gpa, size, uva, off uint64) [4]uint64 { return [4]uint64{gpa, size, uva, off} }
	const page = 4096
	type msg struct {
		name    string
		req     Request
		payload []byte
		fds     int // how many of the memory's descriptor go along
	}
	cases := []msg{
		{"H002 short payload", SetFeatures, u32s(1), 0},
		{"H002 no payload", SetVringAddr, nil, 0},
		{"H010 memory without descriptor", SetMemTable, table(reg(0, page, 0, 0)), 0},
		{"H010 kick without descriptor", SetVringKick, u64(0), 0},
		{"H010 kick with two descriptors", SetVringKick, u64(0), 2},
		{"H010 none announced, one there", SetVringCall, u64(ringFDNone), 1},
		{"H010 log without descriptor", SetLogBase, u64s(page, 0), 0},
		{"H010 channel without descriptor", SetBackendReqFD, nil, 0},
		{"H011 kick is a file", SetVringKick, u64(0), 1},
		{"H011 call is a file", SetVringCall, u64(1), 1},
		{"H011 err is a file", SetVringErr, u64(1), 1},
		{"H012 features not offered", SetFeatures, u64(1 << 34), 0},
		{"H012 protocol features not offered", SetProtocolFeatures, u64(1 << 12), 0},
		{"H013 request 0", 0, nil, 0},
		{"H013 request 23", SetVringEndian, u32s(0, 1), 0},
		{"H013 request 26", 26, u64(1), 1},
		{"H013 request 41", 41, nil, 0},
		{"H013 request 44", 44, nil, 0},
		{"H013 request 9999", 9999, u64(1), 2},
		{"H019 MTU 0", NetSetMTU, u64(0), 0},
		{"H019 MTU 67", NetSetMTU, u64(67), 0},
		{"H019 MTU 65536", NetSetMTU, u64(65536), 0},
		{"H019 MTU 2^64-1", NetSetMTU, u64(1<<64 - 1), 0},
		{"H021 SET_CONFIG read-only", SetConfig, append(u32s(8, 2, 0), 1, 0), 0},
		{"H021 SET_CONFIG past the end", SetConfig, append(u32s(255, 2, 0), 1, 0), 0},
		{"H021 SET_CONFIG overflow", SetConfig, append(u32s(0xffffffff, 2, 0), 1, 0), 0},
		{"H021 SET_CONFIG size unlike payload", SetConfig, append(u32s(0, 6, 0), 1, 0), 0},
		{"H022 GET_INFLIGHT_FD", 31, make([]byte, 24), 0},
		{"H022 SET_INFLIGHT_FD", 32, make([]byte, 24), 1},
		{"H023 SET_DEVICE_STATE_FD", SetDeviceStateFD, u32s(7, 7), 1},
		{"H023 CHECK_DEVICE_STATE", CheckDeviceState, nil, 0},
		{"H024 IOTLB", IOTLBMsg, make([]byte, 32), 0},
		{"H026 no region", SetMemTable, table(), 0},
		{"H026 9 regions", SetMemTable, table(make([][4]uint64, 9)...), 9},
		{"H026 2^32-1 regions", SetMemTable, u32s(0xffffffff, 0), 0},
		{"H026 fewer descriptors", SetMemTable, table(reg(0, page, 0, 0), reg(page, page, page, 0)), 1},
		{"H026 more descriptors", SetMemTable, table(reg(0, page, 0, 0)), 2},
		{"H027 size 0", SetMemTable, table(reg(0, 0, 0, 0)), 1},
		{"H027 offset unaligned", SetMemTable, table(reg(0, page, 0, 1)), 1},
		{"H027 offset overflow", SetMemTable, table(reg(0, page, 0, 1<<64-page)), 1},
		{"H027 gpa overflow", SetMemTable, table(reg(1<<64-page, 2*page, 0, 0)), 1},
		{"H027 uva overflow", SetMemTable, table(reg(0, 2*page, 1<<64-page, 0)), 1},
		{"H028 gpa overlap", SetMemTable, table(reg(0, 2*page, 0, 0), reg(page, page, 1<<30, 0)), 2},
		{"H028 uva overlap", SetMemTable, table(reg(0, page, 0, 0), reg(1<<30, page, 0, 0)), 2},
		{"H029 larger than its file", SetMemTable, table(reg(0, testMem+page, 0, 0)), 1},
		{"H029 1 TiB", SetMemTable, table(reg(0, 1<<40, 0, 0)), 1},
		{"H035 region at the same place", AddMemReg, region1(testGPA, testMem, testUVA+1<<40, 0), 1},
		{"H035 overlapping region", AddMemReg, region1(testGPA+page, page, 1, 0), 1},
		{"H035 unknown region", RemMemReg, region1(0, page, 0, 0), 1},
		{"H036 log of size 0", SetLogBase, u64s(0, 0), 1},
		{"H036 log overflow", SetLogBase, u64s(page, 1<<64-page), 1},
		{"H036 log larger than its file", SetLogBase, u64s(2*testMem, 0), 1},
		{"H040 NUM 0", SetVringNum, u32s(0, 0), 0},
		{"H040 NUM 3", SetVringNum, u32s(0, 3), 0},
		{"H040 NUM 32769", SetVringNum, u32s(0, 32769), 0},
		{"H040 NUM 65536", SetVringNum, u32s(0, 65536), 0},
		{"H040 NUM 2^32-1", SetVringNum, u32s(0, 1<<32-1), 0},
		{"H043 BASE 65536", SetVringBase, u32s(0, 65536), 0},
	}
	for _, index := range []uint32{3, 256, 65536, 1<<32 - 1} {
		cases = append(cases,
			msg{"H039 NUM", SetVringNum, u32s(index, 64), 0},
			msg{"H039 BASE", SetVringBase, u32s(index, 0), 0},
			msg{"H039 GET_VRING_BASE", GetVringBase, u32s(index, 0), 0},
			msg{"H039 ENABLE", SetVringEnable, u32s(index, 1), 0},
			msg{"H039 ADDR", SetVringAddr, addr(index, 0, 0), 0},
			msg{"H039 KICK", SetVringKick, u64(uint64(index&0xff | 0xf0)), 1})
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			noLeak(t)
			d := newDevice(t, Config{})
			f := connect(t, d)
			f.bringUp(plainFeats, 2)
			before := d.Status()
			var fds []int
			for range c.fds {
				fds = append(fds, f.memfd)
			}
			require.NotZero(t, f.try(c.req, c.payload, fds...))
			// The state is unchanged and the device works on.
			after := d.Status()
			require.Equal(t, before.Rings, after.Rings)
			require.Equal(t, before.MemoryBytes, after.MemoryBytes)
			require.Equal(t, before.Features, after.Features)
			f.rings[1].send(frame.Offload{}, 12, testFrame(100, 7))
			got, _ := pull(d.Pairs()[0])
			require.Equal(t, [][]byte{testFrame(100, 7)}, got)
		})
	}
}

// H021: the answer to a bad GET_CONFIG is an empty one.
func TestGetConfig(t *testing.T) { bothRings(t, testGetConfig) }

func testGetConfig(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{MAC: frame.MAC{2, 1, 2, 3, 4, 5}, MTU: 1450, QueuePairs: 3})
	f := connect(t, d)
	for _, p := range [][]byte{
		append(u32s(250, 7, 0), make([]byte, 7)...),
		append(u32s(1<<32-1, 2, 0), 0, 0),
		append(u32s(0, 257, 0), make([]byte, 257)...),
		append(u32s(0, 12, 0), 1),
		u32s(0, 0, 0),
	} {
		require.Empty(t, f.ask(GetConfig, p))
	}
	got := f.ask(GetConfig, append(u32s(0, 12, 0), make([]byte, 12)...))
	require.Equal(t, []byte{2, 1, 2, 3, 4, 5, 1, 0, 3, 0, 0xaa, 5}, got[12:])
	require.Equal(t, u32s(0, 12, 0), got[:12])
}

// H008: descriptors that do not belong to a message are closed, and the
// message is processed.
func TestSurplusDescriptors(t *testing.T) { bothRings(t, testSurplusDescriptors) }

func testSurplusDescriptors(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	f := connect(t, d)
	for _, n := range []int{1, 8, 64} {
		fds := make([]int, n)
		for i := range fds {
			fds[i] = f.memfd
		}
		require.Equal(t, d.offered, native.Uint64(f.ask(GetFeatures, nil, fds...)))
	}
	// H005 cannot be provoked with fewer than 254 descriptors, which the
	// kernel does not pass; what fits is taken and closed.
	fds := make([]int, maxFDs)
	for i := range fds {
		fds[i] = f.memfd
	}
	require.Equal(t, d.offered, native.Uint64(f.ask(GetFeatures, nil, fds...)))
}

// H009: messages that hold on to something, again and again.
func TestRepeatedMessages(t *testing.T) { bothRings(t, testRepeatedMessages) }

func testRepeatedMessages(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(plainFeats|featLogAll, 2)
	n := 300
	if !testing.Short() {
		n = 3000
	}
	null := devnull(t)
	fds, maps := resources(t)
	for range n {
		f.do(SetVringKick, u64(1), f.rings[1].kick) // H047
		f.do(SetVringCall, u64(1), f.rings[1].call)
		f.do(SetVringErr, u64(1), f.rings[1].call)
		f.do(SetLogBase, u64s(4096, 0), f.memfd)
		f.do(SetLogFD, nil, f.rings[1].call)
		f.do(SetBackendReqFD, nil, null)
		f.do(SetMemTable, table([4]uint64{testGPA, testMem, testUVA, 0}), f.memfd) // H038
		f.do(SetVringEnable, u32s(0, 0))                                           // H046
		f.do(SetVringEnable, u32s(0, 1<<32-1))
	}
	f2, m2 := resources(t)
	assert.LessOrEqual(t, f2, fds+4) // err, log, channel
	assert.LessOrEqual(t, m2, maps+1)
}

// H014: any order before all else.
func TestAnyOrder(t *testing.T) { bothRings(t, testAnyOrder) }

func testAnyOrder(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.send(SetProtocolFeatures, flagVersion, u64(offeredProtocol))
	require.Equal(t, u32s(1, 0), f.ask(GetVringBase, u32s(1, 0))) // H044
	f.do(SetVringEnable, u32s(1, 1))                              // T2
	f.start(1, 0)                                                 // KICK before memory
	f.share()
	f.rings[1].send(frame.Offload{}, 12, testFrame(60, 1))
	got, _ := pull(d.Pairs()[0])
	require.Empty(t, got, "no features yet")
	f.do(SetFeatures, u64(plainFeats))
	got, _ = pull(d.Pairs()[0])
	require.Equal(t, [][]byte{testFrame(60, 1)}, got)
}

// H020: SEND_RARP needs nothing but a unicast address (T10).
func TestSendRARP(t *testing.T) { bothRings(t, testSendRARP) }

func testSendRARP(t *testing.T) {
	noLeak(t)
	var got []frame.MAC
	d := newDevice(t, Config{OnRARP: func(m frame.MAC) { got = append(got, m) }})
	f := connect(t, d)
	f.send(SetProtocolFeatures, flagVersion, u64(offeredProtocol))
	for _, mac := range []frame.MAC{{}, {1, 2, 3, 4, 5, 6}, frame.Broadcast, {2, 2, 3, 4, 5, 6}} {
		f.do(SendRARP, append(mac[:], 0, 0))
	}
	require.Equal(t, []frame.MAC{{2, 2, 3, 4, 5, 6}}, got)
	require.EqualValues(t, 3, d.Status().Counters["bad_rarp"])
}

// H017: a frontend that reads no replies loses its connection, and nobody
// else waits for it.
func TestReplyNotRead(t *testing.T) { bothRings(t, testReplyNotRead) }

func testReplyNotRead(t *testing.T) {
	noLeak(t)
	defer func(was time.Duration) { replyTimeout = was }(replyTimeout)
	replyTimeout = 100 * time.Millisecond
	d := newDevice(t, Config{})
	f := connect(t, d)
	s := d.current()
	b := make([]byte, 0, 64*headerLen)
	for range 64 {
		b = append(b, u32s(uint32(GetFeatures), 1, 0)...)
	}
	require.NoError(t, f.c.SetWriteDeadline(time.Now().Add(5*time.Second)))
	for {
		if _, err := f.c.Write(b); err != nil {
			require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
			break
		}
	}
	<-s.done
}

// H030, H034: memory that is cut short or taken away stops the rings.
func TestMemoryGone(t *testing.T) { bothRings(t, testMemoryGone) }

func testMemoryGone(t *testing.T) {
	t.Run("H030 truncated", func(t *testing.T) {
		noLeak(t)
		d := newDevice(t, Config{})
		f := connect(t, d)
		f.bringUp(plainFeats, 2)
		ev := eventfd(t)
		defer closeFD(ev)
		f.do(SetVringErr, u64(1), ev)
		f.rings[1].send(frame.Offload{}, 12, testFrame(500, 1))
		require.NoError(t, unix.Ftruncate(f.memfd, bufferBase))
		done := make(chan struct{})
		frame.Go(func() {
			defer close(done)
			survive(d, func() { pull(d.Pairs()[0]) })
			survive(d, func() { pull(d.Pairs()[0]) })
		})
		<-done
		require.EqualValues(t, 1, d.Status().Counters["memory_faults"])
		var b [8]byte
		enginetest.Eventually(t, 2*time.Second, func() bool {
			n, _ := unix.Read(ev, b[:])
			return n == 8
		})
		require.Equal(t, frame.QueueStopped, pushBytes(d, testFrame(60, 1))[0].Reason)
		// A grown file and a new start of the rings, and all is well.
		require.NoError(t, unix.Ftruncate(f.memfd, testMem))
		f.ask(GetVringBase, u32s(1, 0))
		f.rings[1].reset()
		f.start(1, 0)
		f.rings[1].send(frame.Offload{}, 12, testFrame(500, 1))
		got, _ := pull(d.Pairs()[0])
		require.Equal(t, [][]byte{testFrame(500, 1)}, got)
	})
	t.Run("H034 region removed", func(t *testing.T) {
		noLeak(t)
		d := newDevice(t, Config{})
		f := connect(t, d)
		f.bringUp(plainFeats, 2)
		f.do(RemMemReg, region1(testGPA, testMem, testUVA, 0), f.memfd)
		got, _ := pull(d.Pairs()[0])
		require.Empty(t, got)
		require.Equal(t, Connected, d.Status().State)
		f.share()
		require.Equal(t, Up, d.Status().State)
		f.rings[1].send(frame.Offload{}, 12, testFrame(60, 1))
		got, _ = pull(d.Pairs()[0])
		require.Equal(t, [][]byte{testFrame(60, 1)}, got)
	})
	t.Run("H033 read-only", func(t *testing.T) {
		noLeak(t)
		f := connect(t, newDevice(t, Config{}))
		f.negotiate(plainFeats)
		ro, err := unix.Open(procFD(f.memfd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		require.NoError(t, err)
		defer closeFD(ro)
		require.NotZero(t, f.try(AddMemReg, region1(testGPA, testMem, testUVA, 0), ro))
	})
	t.Run("H035 too many regions", func(t *testing.T) {
		noLeak(t)
		f := connect(t, newDevice(t, Config{}))
		f.negotiate(plainFeats)
		n := native.Uint64(f.ask(GetMaxMemSlots, nil))
		for i := range n {
			f.do(AddMemReg, region1(i<<20, 4096, i<<20, 0), f.memfd)
		}
		require.NotZero(t, f.try(AddMemReg, region1(n<<20, 4096, n<<20, 0), f.memfd))
	})
}

// H041: rings that cannot be are not started, and the frontend is told.
func TestBadRingAddresses(t *testing.T) { bothRings(t, testBadRingAddresses) }

func testBadRingAddresses(t *testing.T) {
	for name, a := range map[string][3]uint64{
		"unmapped":           {1, 2, 3},
		"used unmapped":      {testUVA, testUVA + availAt, 0},
		"descriptors odd":    {testUVA + 8, testUVA + availAt, testUVA + usedAt},
		"available odd":      {testUVA, testUVA + availAt + 1, testUVA + usedAt},
		"used odd":           {testUVA, testUVA + availAt, testUVA + usedAt + 2},
		"last byte past end": {testUVA, testUVA + availAt, testUVA + testMem - 4 - 8*testRing + 1},
	} {
		t.Run("H041 "+name, func(t *testing.T) {
			noLeak(t)
			d := newDevice(t, Config{})
			f := connect(t, d)
			f.negotiate(plainFeats)
			f.share()
			ev := eventfd(t)
			defer closeFD(ev)
			f.do(SetVringErr, u64(1), ev)
			f.do(SetVringNum, u32s(1, testRing))
			f.do(SetVringBase, u32s(1, f.baseOf(0)))
			f.do(SetVringAddr, append(u32s(1, 0), u64s(a[0], a[2], a[1], ^uint64(0))...))
			f.do(SetVringKick, u64(1), f.rings[1].kick)
			var b [8]byte
			n, _ := unix.Read(ev, b[:])
			require.Equal(t, 8, n, "error not signalled")
			got, _ := pull(d.Pairs()[0])
			require.Empty(t, got)
			f.do(SetVringAddr, addr(1, 0, ringSpace))
			f.do(SetVringEnable, u32s(1, 1))
			f.rings[1].send(frame.Offload{}, 12, testFrame(60, 1))
			got, _ = pull(d.Pairs()[0])
			require.Equal(t, [][]byte{testFrame(60, 1)}, got)
		})
	}
}

// H043, H049, H050: a ring that cannot be followed stops, and starts again
// with GET_VRING_BASE and KICK.
func TestBrokenRing(t *testing.T) { bothRings(t, testBrokenRing) }

func testBrokenRing(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{QueuePairs: 2})
	f := connect(t, d)
	f.bringUp(plainFeats, 4)
	f.ask(GetVringBase, u32s(1, 0))
	base := uint16(1000)
	if f.packed {
		base = 0
		f.rings[1].breakIt()
	}
	tx := f.start(1, base)
	got, _ := pull(d.Pairs()[0])
	require.Empty(t, got)
	enginetest.Eventually(t, 2*time.Second, func() bool { return d.Status().Counters["ring_errors"] == 1 })
	require.EqualValues(t, 1, d.Status().Counters["broken_rings"])
	// The other pair goes on.
	f.rings[3].send(frame.Offload{}, 12, testFrame(60, 3))
	got, _ = pull(d.Pairs()[1])
	require.Len(t, got, 1)
	require.Equal(t, u32s(1, f.baseOf(base)), f.ask(GetVringBase, u32s(1, 0)))
	tx.reset()
	f.start(1, 0)
	tx.send(frame.Offload{}, 12, testFrame(60, 1))
	got, _ = pull(d.Pairs()[0])
	require.Len(t, got, 1)
}

// H045: a call descriptor that is full never blocks us.
func TestCallFull(t *testing.T) { bothRings(t, testCallFull) }

func testCallFull(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(plainFeats, 2)
	full, err := unix.Eventfd(0, unix.EFD_CLOEXEC) // blocking
	require.NoError(t, err)
	defer closeFD(full)
	_, err = unix.Write(full, u64(1<<64-2))
	require.NoError(t, err)
	f.do(SetVringCall, u64(1), full)
	f.rings[1].send(frame.Offload{}, 12, testFrame(60, 1))
	got, _ := pull(d.Pairs()[0])
	require.Len(t, got, 1)
}

// H048: all rings that there can be, with holes.
func TestMostRings(t *testing.T) { bothRings(t, testMostRings) }

func testMostRings(t *testing.T) {
	noLeak(t)
	for _, n := range []int{127, 128} {
		d := newDevice(t, Config{QueuePairs: n})
		f := connect(t, d)
		f.negotiate(plainFeats)
		f.share()
		require.EqualValues(t, n, native.Uint64(f.ask(GetQueueNum, nil)))
		for i := range uint32(2 * n) {
			if i%6 < 3 {
				f.do(SetVringEnable, u32s(i, 1))
			}
			f.do(SetVringNum, u32s(i, 4))
			f.do(SetVringAddr, addr(i, 0, uint64(i%8)*ringSpace))
			f.do(SetVringKick, u64(uint64(i)), f.rings[0].kick)
		}
		f.close()
	}
}

func procFD(fd int) string { return "/proc/self/fd/" + itoa(fd) }

// H049 on an rx ring, in the middle of a batch.
func TestBrokenRxRing(t *testing.T) { bothRings(t, testBrokenRxRing) }

func testBrokenRxRing(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(plainFeats|featMrgRxbuf, 2)
	rx := f.rings[0]
	rx.recv(2000)
	if f.packed {
		rx.breakIt()
	} else {
		rx.post(guestBuf{f.alloc(2000), 2000, true})
		native.PutUint16(rx.at(availAt+4+2), testRing) // H050
	}
	fs := pushBytes(d, testFrame(60, 1), testFrame(60, 2), testFrame(60, 3))
	require.Equal(t, frame.ReasonNone, fs[0].Reason)
	require.Equal(t, frame.QueueStopped, fs[1].Reason)
	require.Equal(t, frame.QueueStopped, fs[2].Reason)
	_, got := rx.received(12)
	require.Equal(t, [][]byte{testFrame(60, 1)}, got)
	enginetest.Eventually(t, 2*time.Second, func() bool { return d.Status().Counters["ring_errors"] == 1 })
	require.Equal(t, Connected, d.Status().State)
}

// H035: QEMU 7.2 adds and removes every region once for each queue pair; the
// same one again is acknowledged and changes nothing, nor does the first removal.
func TestSameRegionAgain_H035(t *testing.T) { bothRings(t, testSameRegionAgain_H035) }

func testSameRegionAgain_H035(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(plainFeats, 2)
	before := d.Status()
	require.Zero(t, f.try(AddMemReg, region1(testGPA, testMem, testUVA, 0), f.memfd))
	after := d.Status()
	require.Equal(t, before.MemoryRegions, after.MemoryRegions)
	require.Equal(t, before.MemoryBytes, after.MemoryBytes)
	require.Zero(t, f.try(RemMemReg, region1(testGPA, testMem, testUVA, 0)))
	f.rings[1].send(frame.Offload{}, 12, testFrame(100, 7))
	got, _ := pull(d.Pairs()[0])
	require.Len(t, got, 1)
	require.Zero(t, f.try(RemMemReg, region1(testGPA, testMem, testUVA, 0)))
	require.Zero(t, d.Status().MemoryRegions)
	require.NotZero(t, f.try(RemMemReg, region1(testGPA, testMem, testUVA, 0)))
}
