package vhostuser

import (
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// The memory that the frontend of these tests shares: rings first, buffers
// behind them.
const (
	testGPA    = 0x4000_0000
	testUVA    = 0x7f12_3400_0000
	testMem    = 8 << 20
	ringSpace  = 0x4000
	availAt    = 0x1000
	usedAt     = 0x2000
	bufferBase = 4 << 20
	testRing   = 64 // entries
	plainFeats = featVersion1 | featProtocolFeatures
)

// front plays the frontend and the guest's driver.
type front struct {
	t     testing.TB
	c     *net.UnixConn
	memfd int
	mem   []byte
	rings [9]*guestRing
	next  uint32 // free buffer memory, as offset

	packed bool // the rings are packed
}

// packedRings lets frontends negotiate packed rings wherever they say nothing
// else. bothRings sets it.
var packedRings bool

// bothRings runs a test over split and over packed rings.
func bothRings(t *testing.T, test func(t *testing.T)) {
	t.Run("split", test)
	t.Run("packed", func(t *testing.T) {
		packedRings = true
		defer func() { packedRings = false }()
		test(t)
	})
}

// guestRing is the driver's side of one ring.
type guestRing struct {
	f          *front
	index      uint32
	kick, call int
	avail      uint16
	used       uint16
	free       uint16
	out        [testRing]bool   // heads that the device has
	addrs      [testRing]uint64 // of their first buffers
	lens       [testRing]uint16 // of the chains of a packed ring
	usedAt     uint16           // where its next used element comes
	lap, uslap uint16           // wrap counters at free and usedAt
}

func memfd(t testing.TB, size int64) int {
	t.Helper()
	fd, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	require.NoError(t, err)
	require.NoError(t, unix.Ftruncate(fd, size))
	return fd
}

func eventfd(t testing.TB) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	require.NoError(t, err)
	return fd
}

// quiet is a log for nobody.
var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// turn is held where a worker would be in a turn, by tests that are the worker.
var turn sync.Mutex

func newDevice(t testing.TB, c Config) *Device {
	t.Helper()
	if c.Barrier == nil {
		c.Barrier = func() {
			turn.Lock()
			defer turn.Unlock()
		}
	}
	if c.Log == nil {
		c.Log = quiet
	}
	if c.Path == "" {
		c.Path = filepath.Join(t.TempDir(), "s")
	}
	c.Name = "test"
	c.Packed = c.Packed || packedRings
	d, err := NewDevice(c)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.Close()) })
	return d
}

func pair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	var out [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "")
		c, err := net.FileConn(f)
		require.NoError(t, err)
		require.NoError(t, f.Close())
		out[i] = c.(*net.UnixConn)
	}
	return out[0], out[1]
}

// connect makes a frontend whose connection the device serves already.
func connect(t testing.TB, d *Device) *front {
	t.Helper()
	a, b := pair(t)
	require.NotNil(t, d.take(b))
	f := &front{t: t, c: a, memfd: memfd(t, testMem), next: bufferBase}
	var err error
	f.mem, err = unix.Mmap(f.memfd, 0, testMem, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	require.NoError(t, err)
	for i := range f.rings {
		f.rings[i] = &guestRing{f: f, index: uint32(i), kick: eventfd(t), call: eventfd(t), lap: 1, uslap: 1}
	}
	f.packed = packedRings
	t.Cleanup(f.close)
	return f
}

func (f *front) close() {
	if f.c == nil {
		return
	}
	f.c.Close()
	f.c = nil
	_ = unix.Munmap(f.mem)
	closeFD(f.memfd)
	for _, r := range f.rings {
		closeFD(r.kick)
		closeFD(r.call)
	}
}

// send writes one message.
func (f *front) send(req Request, flags uint32, payload []byte, fds ...int) {
	f.t.Helper()
	if f.packed && req == SetFeatures && len(payload) == 8 {
		payload = u64(native.Uint64(payload) | featRingPacked)
	}
	b := make([]byte, headerLen, headerLen+len(payload))
	native.PutUint32(b, uint32(req))
	native.PutUint32(b[4:], flags)
	native.PutUint32(b[8:], uint32(len(payload)))
	_, _, err := f.c.WriteMsgUnix(append(b, payload...), unix.UnixRights(fds...), nil)
	require.NoError(f.t, err)
}

// receive reads one reply.
func (f *front) receive() (Request, []byte) {
	f.t.Helper()
	var h [headerLen]byte
	require.NoError(f.t, f.c.SetReadDeadline(time.Now().Add(5*time.Second)))
	_, err := io.ReadFull(f.c, h[:])
	require.NoError(f.t, err)
	require.Equal(f.t, uint32(flagVersion|flagReply), native.Uint32(h[4:]))
	p := make([]byte, native.Uint32(h[8:]))
	_, err = io.ReadFull(f.c, p)
	require.NoError(f.t, err)
	return Request(native.Uint32(h[:])), p
}

// ask sends a request that has a reply of its own.
func (f *front) ask(req Request, payload []byte, fds ...int) []byte {
	f.t.Helper()
	f.send(req, flagVersion, payload, fds...)
	got, p := f.receive()
	require.Equal(f.t, req, got)
	return p
}

// try sends a request with need_reply and returns the answer; 0 is success.
func (f *front) try(req Request, payload []byte, fds ...int) uint64 {
	f.t.Helper()
	f.send(req, flagVersion|flagNeedReply, payload, fds...)
	got, p := f.receive()
	require.Equal(f.t, req, got)
	require.Len(f.t, p, 8)
	return native.Uint64(p)
}

// do is try for requests that must succeed.
func (f *front) do(req Request, payload []byte, fds ...int) {
	f.t.Helper()
	require.Zero(f.t, f.try(req, payload, fds...), "%v refused", req)
}

func u64(v uint64) []byte { return native.AppendUint64(nil, v) }

func u32s(v ...uint32) (b []byte) {
	for _, x := range v {
		b = native.AppendUint32(b, x)
	}
	return b
}

func u64s(v ...uint64) (b []byte) {
	for _, x := range v {
		b = native.AppendUint64(b, x)
	}
	return b
}

func region1(gpa, size, uva, offset uint64) []byte { return u64s(0, gpa, size, uva, offset) }

func table(regions ...[4]uint64) []byte {
	b := u32s(uint32(len(regions)), 0)
	for _, r := range regions {
		b = append(b, u64s(r[:]...)...)
	}
	return b
}

func addr(index, flags uint32, ringOffset uint64) []byte {
	a := testUVA + ringOffset
	return append(u32s(index, flags), u64s(a, a+usedAt, a+availAt, ringOffset+testGPA+usedAt)...)
}

// negotiate does what comes first on every connection.
func (f *front) negotiate(features uint64) {
	f.t.Helper()
	f.ask(GetFeatures, nil)
	f.ask(GetProtocolFeatures, nil)
	f.send(SetProtocolFeatures, flagVersion, u64(offeredProtocol))
	f.do(SetFeatures, u64(features))
}

// share sends the memory.
func (f *front) share() {
	f.t.Helper()
	f.do(AddMemReg, region1(testGPA, testMem, testUVA, 0), f.memfd)
}

// start starts a ring as QEMU does: the base, then KICK before CALL.
func (f *front) start(index int, base uint16) *guestRing {
	f.t.Helper()
	i, r := uint32(index), f.rings[index]
	f.do(SetVringNum, u32s(i, testRing))
	f.do(SetVringBase, u32s(i, f.baseOf(base)))
	f.do(SetVringAddr, addr(i, 0, uint64(i)*ringSpace))
	f.do(SetVringKick, u64(uint64(i)), r.kick)
	f.do(SetVringCall, u64(uint64(i)), r.call)
	return r
}

// baseOf is what SET_VRING_BASE is told for an index of a split ring.
func (f *front) baseOf(i uint16) uint32 {
	if f.packed {
		at := uint32(i%testRing | (1^i/testRing&1)<<15)
		return at | at<<16
	}
	return uint32(i)
}

// bringUp starts rings 0 to n-1 with the given features.
func (f *front) bringUp(features uint64, n int) {
	f.t.Helper()
	f.negotiate(features)
	for i := range n {
		f.do(SetVringEnable, u32s(uint32(i), 1))
	}
	f.share()
	for i := range n {
		f.start(i, 0)
	}
}

// alloc reserves n bytes of guest memory.
func (f *front) alloc(n int) uint32 {
	if int(f.next)+n > len(f.mem) {
		f.next = bufferBase
	}
	at := f.next
	f.next += uint32(n+63) &^ 63
	return at
}

type guestBuf struct {
	at    uint32
	len   int
	write bool
}

func (r *guestRing) at(off uint32) []byte { return r.f.mem[r.index*ringSpace+off:] }

func (r *guestRing) word(off uint32) *uint32 {
	return (*uint32)(unsafe.Pointer(&r.at(off)[0]))
}

// post makes a chain available and returns its head. The device may give
// chains of one buffer back in any order, longer ones in theirs.
func (r *guestRing) post(bufs ...guestBuf) uint16 {
	head := r.free
	for range testRing {
		if !r.out[head] {
			break
		}
		head = (head + 1) % testRing
	}
	r.out[head], r.addrs[head] = true, testGPA+uint64(bufs[0].at)
	if r.f.packed {
		r.postPacked(head, bufs)
		return head
	}
	r.free = head
	for i, b := range bufs {
		d := r.at(uint32(r.free) * 16)
		native.PutUint64(d, testGPA+uint64(b.at))
		native.PutUint32(d[8:], uint32(b.len))
		r.free = (r.free + 1) % testRing
		flags := uint16(0)
		if b.write {
			flags |= 2
		}
		if i < len(bufs)-1 {
			flags |= 1
		}
		native.PutUint16(d[12:], flags)
		native.PutUint16(d[14:], r.free)
	}
	native.PutUint16(r.at(availAt+4+2*uint32(r.avail%testRing)), head)
	r.avail++
	atomic.StoreUint32(r.word(availAt), uint32(r.avail)<<16)
	return head
}

// postPacked is post on a packed ring. The buffer id is the place of the first
// descriptor, if it is free.
func (r *guestRing) postPacked(head uint16, bufs []guestBuf) {
	at := r.free
	r.lens[head] = uint16(len(bufs))
	r.avail++
	var first uint32
	for i, b := range bufs {
		off := uint32(r.free) * 16
		d := r.at(off)
		native.PutUint64(d, testGPA+uint64(b.at))
		native.PutUint32(d[8:], uint32(b.len))
		flags := uint32(0x8000) >> (8 * r.lap)
		if b.write {
			flags |= 2
		}
		if i < len(bufs)-1 {
			flags |= 1
		}
		word := uint32(head) | flags<<16
		if i == 0 {
			first = word
		} else {
			native.PutUint32(d[12:], word)
		}
		if r.free++; r.free == testRing {
			r.free, r.lap = 0, r.lap^1
		}
	}
	atomic.StoreUint32(r.word(uint32(at)*16+12), first)
}

// reset makes the ring what a driver that starts finds.
func (r *guestRing) reset() {
	clear(r.at(0)[:ringSpace])
	r.avail, r.used, r.free, r.usedAt, r.lap, r.uslap = 0, 0, 0, 0, 1, 1
	r.out = [testRing]bool{}
}

// again lends the device the next n descriptors of a packed ring once more, as
// buffers of size bytes.
func (r *guestRing) again(n int, size uint32) {
	for range n {
		off := uint32(r.free) * 16
		native.PutUint32(r.at(off)[8:], size)
		atomic.StoreUint32(r.word(off+12), uint32(r.free)|(0x8000>>(8*uint32(r.lap))|2)<<16)
		if r.free++; r.free == testRing {
			r.free, r.lap = 0, r.lap^1
		}
	}
}

// breakIt makes the ring one that cannot be followed: an index that jumps, or a
// chain without an end (H049, H068).
func (r *guestRing) breakIt() {
	if r.f.packed {
		atomic.StoreUint32(r.word(uint32(r.free)*16+12), (0x8000>>(8*uint32(r.lap))|1)<<16)
		return
	}
	r.avail += 5000
	r.recv(10)
}

// takePacked is take on a packed ring.
func (r *guestRing) takePacked() (head uint16, n uint32, ok bool) {
	off := uint32(r.usedAt) * 16
	word := atomic.LoadUint32(r.word(off + 12))
	if word>>16&0x8080 != uint32(r.uslap)*0x8080 {
		return 0, 0, false
	}
	head = uint16(word)
	if word>>16&2 != 0 {
		n = native.Uint32(r.at(off)[8:])
	}
	r.used++
	r.out[head%testRing] = false
	if r.usedAt += r.lens[head%testRing]; r.usedAt >= testRing {
		r.usedAt, r.uslap = r.usedAt-testRing, r.uslap^1
	}
	return head, n, true
}

// send posts a frame with its header, in one buffer.
func (r *guestRing) send(o frame.Offload, hdr int, b []byte) uint16 {
	at := r.f.alloc(hdr + len(b))
	o.Encode(r.f.mem[at : at+uint32(hdr)])
	copy(r.f.mem[at+uint32(hdr):], b)
	return r.post(guestBuf{at, hdr + len(b), false})
}

// recv posts an empty buffer.
func (r *guestRing) recv(n int) uint16 { return r.post(guestBuf{r.f.alloc(n), n, true}) }

// usedIdx is the used index; of a packed ring, what it would be.
func (r *guestRing) usedIdx() uint16 {
	if r.f.packed {
		ahead := *r
		for _, _, ok := ahead.take(); ok; _, _, ok = ahead.take() {
		}
		return ahead.used
	}
	return uint16(atomic.LoadUint32(r.word(usedAt)) >> 16)
}

// take returns the next used element, if there is one.
func (r *guestRing) take() (head uint16, n uint32, ok bool) {
	if r.f.packed {
		return r.takePacked()
	}
	if r.usedIdx() == r.used {
		return 0, 0, false
	}
	e := r.at(usedAt + 4 + 8*uint32(r.used%testRing))
	r.used++
	head = uint16(native.Uint32(e))
	r.out[head%testRing] = false
	return head, native.Uint32(e[4:]), true
}

// takeAll takes the used elements that there are.
func (r *guestRing) takeAll() {
	for _, _, ok := r.take(); ok; _, _, ok = r.take() {
	}
}

// bytes returns what lies in the buffer of a head's first descriptor.
func (r *guestRing) bytes(head uint16, n uint32) []byte {
	at := r.addrs[head] - testGPA
	return append([]byte(nil), r.f.mem[at:at+uint64(n)]...)
}

// signalled drains the call descriptor and reports whether it was signalled.
func (r *guestRing) signalled() bool {
	var b [8]byte
	n, err := unix.Read(r.call, b[:])
	return err == nil && n == 8
}

// testFrame is a frame of n bytes with its number in it.
func testFrame(n int, number byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i) ^ number
	}
	copy(b, []byte{2, 0, 0, 0, 0, number, 2, 0, 0, 0, 1, 1, 0x88, 0xb5})
	return b
}

// pushBytes gives the device frames as a worker would.
func pushBytes(d *Device, frames ...[]byte) []frame.Frame {
	var b frame.Batch
	b.Reset(0)
	enginetest.Fill(&b, frames...)
	return pushBatch(d, &b)
}

func pushBatch(d *Device, b *frame.Batch) []frame.Frame {
	var fs []*frame.Frame
	for i := range b.Len() {
		fs = append(fs, b.Frame(i))
	}
	d.Push(0, fs)
	var out []frame.Frame
	for _, f := range fs {
		out = append(out, *f)
	}
	return out
}

// pull takes one batch from a pair and returns copies of its frames.
func pull(p *Pair) (out [][]byte, offloads []frame.Offload) {
	turn.Lock()
	defer turn.Unlock()
	var b frame.Batch
	b.Reset(0)
	if p.Pull(&b) == 0 {
		return nil, nil
	}
	for i := range b.Len() {
		out = append(out, b.Frame(i).Bytes())
		offloads = append(offloads, b.Frame(i).Offload)
	}
	p.Release(&b)
	return out, offloads
}

func itoa(n int) string { return strconv.Itoa(n) }
