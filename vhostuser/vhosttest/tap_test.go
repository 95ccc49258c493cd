package vhosttest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

var (
	guestMAC = frame.MAC{2, 0, 0, 0, 0, 0x11}
	otherMAC = frame.MAC{2, 0, 0, 0, 0, 0x22}
)

// mirror sends a frame back as if the peer had sent the same: it changes the
// addresses round, which no checksum notices.
func mirror(b []byte) {
	swap := func(i, j, n int) {
		for k := range n {
			b[i+k], b[j+k] = b[j+k], b[i+k]
		}
	}
	swap(0, 6, 6)
	if len(b) >= 34 && b[12] == 8 && b[13] == 0 {
		swap(26, 30, 4)
	}
}

// transfer sends n bytes over TCP from one namespace to a listener at addr in
// another and compares what came.
func transfer(t *testing.T, from, to *enginetest.NetNS, listen, dial string, n int) {
	t.Helper()
	var l net.Listener
	require.NoError(t, to.Do(func() (err error) { l, err = net.Listen("tcp", listen); return err }))
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	require.NoError(t, err)
	data := enginetest.Payload(n, 7)
	got := make(chan [32]byte, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			close(got)
			return
		}
		defer c.Close()
		h := sha256.New()
		io.Copy(h, c)
		got <- [32]byte(h.Sum(nil))
	}()
	var c net.Conn
	require.NoError(t, from.Do(func() (err error) {
		d := net.Dialer{Timeout: soon}
		c, err = d.Dial("tcp", net.JoinHostPort(dial, port))
		return err
	}))
	_, err = io.Copy(c, bytes.NewReader(data))
	require.NoError(t, err)
	require.NoError(t, c.Close())
	assert.Equal(t, sha256.Sum256(data), <-got)
}

// carried waits until both counters say more than n bytes: they lag a little
// behind a busy loop.
func carried(t *testing.T, n int, counters func() (tx, rx uint64)) {
	t.Helper()
	enginetest.Eventually(t, soon, func() bool {
		tx, rx := counters()
		return tx > uint64(n) && rx > uint64(n)
	})
}

func mirroredGuest(t *testing.T, b *loopback, o Options) (*enginetest.NetNS, *TapGuest) {
	t.Helper()
	enginetest.Need(t, "netns", "tun", "ip")
	ns := enginetest.NewNetNS(t)
	b.rewrite = mirror
	o.Path = startLoopback(t, b)
	o.MAC = guestMAC
	o.Packed = packedGuests
	g, err := StartTapGuest(TapOptions{Options: o, NetNS: ns.Path})
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, g.Close()) })
	enginetest.Must(t, ns.Addr("eth0", "192.0.2.1/24"),
		ns.Run("ip", "neigh", "add", "192.0.2.2", "lladdr", net.HardwareAddr(otherMAC[:]).String(), "dev", "eth0"))
	return ns, g
}

func TestTapGuest(t *testing.T) { bothRings(t, testTapGuest) }

func testTapGuest(t *testing.T) {
	for _, o := range []Options{
		{},
		{QueuePairs: 2},
		{Features: NoOffloads},
		{Features: NoOffloads &^ FeatEventIdx, MTU: 9000},
		{RxBufSize: 1500, RingSize: 256},
		{RingSize: 8, Pieces: 3, SplitHeader: true},
		{Features: LegacyFeatures, RingSize: 64},
		{RingSize: 64, Pieces: 3, SplitHeader: true, Indirect: true},
	} {
		t.Run(fmt.Sprintf("%#x/%d,%d,%d", o.Features, o.QueuePairs, o.RxBufSize, o.Pieces), func(t *testing.T) {
			ns, g := mirroredGuest(t, &loopback{}, o)
			transfer(t, ns, ns, "192.0.2.1:0", "192.0.2.2", 5<<20)
			carried(t, 5<<20, func() (tx, rx uint64) { c := g.Counters(); return c.TxBytes, c.RxBytes })
			assert.NoError(t, g.Err())
			if o.Features == 0 {
				assert.Less(t, g.Counters().TxFrames, uint64(5<<20/1448), "frames are larger than segments")
			}
		})
	}
}

func TestTapGuestPauseAndReconnect(t *testing.T) { bothRings(t, testTapGuestPauseAndReconnect) }

func testTapGuestPauseAndReconnect(t *testing.T) {
	b := &loopback{}
	ns, g := mirroredGuest(t, b, Options{})
	transfer(t, ns, ns, "192.0.2.1:0", "192.0.2.2", 1<<20)
	require.NoError(t, g.Pause())
	before := g.Counters()
	assert.NotZero(t, before.TxFrames)
	require.NoError(t, g.Guest.Stop())
	require.NoError(t, g.Guest.Resume())
	require.NoError(t, g.Continue())
	transfer(t, ns, ns, "192.0.2.1:0", "192.0.2.2", 1<<20)
	b.hangUp()
	require.True(t, g.Guest.Closed(soon))
	require.NoError(t, g.Reconnect())
	transfer(t, ns, ns, "192.0.2.1:0", "192.0.2.2", 1<<20)
	carried(t, int(before.TxBytes)+1<<20, func() (tx, rx uint64) { c := g.Counters(); return c.TxBytes, c.RxBytes })
}

func TestTapPair(t *testing.T) {
	enginetest.Need(t, "netns", "tun")
	for _, queues := range []int{1, 2} {
		a, b := enginetest.NewNetNS(t), enginetest.NewNetNS(t)
		p, err := StartTapPair(Tap{NetNS: a.Path, Name: "eth0", MAC: guestMAC, MTU: 1400},
			Tap{NetNS: b.Path, Name: "tap0", MAC: otherMAC}, queues)
		require.NoError(t, err)
		enginetest.Must(t, a.Addr("eth0", "192.0.2.1/24"), b.Addr("tap0", "192.0.2.2/24"))
		transfer(t, a, b, "192.0.2.2:0", "192.0.2.2", 8<<20)
		transfer(t, b, a, "192.0.2.1:0", "192.0.2.1", 8<<20)
		carried(t, 8<<20, func() (tx, rx uint64) { c := p.Counters(); return c.TxBytes, c.RxBytes })
		assert.NoError(t, p.Close())
		_, err = a.MAC("eth0")
		assert.Error(t, err, "the tap is gone")
	}
}

func TestTapErrors(t *testing.T) {
	enginetest.Need(t, "netns", "tun")
	_, err := StartTapPair(Tap{NetNS: "/does/not/exist"}, Tap{}, 1)
	assert.ErrorContains(t, err, "/does/not/exist")
	ns := enginetest.NewNetNS(t)
	_, err = StartTapPair(Tap{NetNS: ns.Path, Name: "a name that is too long"}, Tap{NetNS: ns.Path}, 1)
	assert.Error(t, err)
}

func TestTunOffloads(t *testing.T) {
	assert.Equal(t, tunAll, tunOffloads(LinuxFeatures))
	assert.Zero(t, tunOffloads(NoOffloads))
	assert.Zero(t, tunOffloads(LinuxFeatures&^FeatCsum), "no segments without checksums")
	assert.Equal(t, tunCsum, tunOffloads(NoOffloads|FeatCsum))
}

// Nothing is allocated for a frame on its way between tap and rings. The
// backend is played by writing used elements by hand.
func TestTapAllocs(t *testing.T) {
	ns, g := mirroredGuest(t, &loopback{}, Options{RxBufSize: 2048, RingSize: 64})
	require.NoError(t, g.Pause())
	require.NoError(t, g.Guest.Stop())
	for _, b := range []*buffers{g.Guest.tx[0], g.Guest.rx[0]} {
		b.reset()
	}
	require.NoError(t, g.Guest.rx[0].fill())
	for i := range 64 { // every frame comes in two buffers
		g.Guest.Mem.At(g.Guest.rx[0].gpa(uint16(i)), 12)[10] = 2
	}
	p := newTapQueue(g.Guest, 0, g.taps[0])
	var out net.Conn
	require.NoError(t, ns.Do(func() (err error) { out, err = net.Dial("udp", "192.0.2.2:9"); return err }))
	defer out.Close()
	msg := make([]byte, 3000)
	use := func(r *Ring, n uint32) {
		idx := r.UsedIdx()
		slot := int(idx & r.mask)
		head := binary.LittleEndian.Uint16(r.avail[4+2*slot:])
		binary.LittleEndian.PutUint32(r.used[4+8*slot:], uint32(head))
		binary.LittleEndian.PutUint32(r.used[8+8*slot:], n)
		r.usedWord.Store(uint32(idx+1) << 16)
	}
	frames := uint64(0)
	got := testing.AllocsPerRun(50, func() {
		out.Write(msg)
		use(p.rx.Ring, 2048)
		use(p.rx.Ring, 10)
		for done := p.n.TxFrames + 1; p.n.TxFrames < done; {
			if _, err := p.move(); err != nil {
				t.Error(err)
				return
			}
		}
		use(p.tx.Ring, 0)
		p.arm()
		frames++
	})
	assert.Zero(t, got)
	assert.GreaterOrEqual(t, p.n.TxFrames, frames)
	assert.Equal(t, frames, p.n.RxFrames+p.n.RxDropped)
}

// A tap queue without room leaves frames in the tap, asks for the interrupt of
// the tx ring, and goes on once the device has used a chain. What it sends has
// no num_buffers.
func TestTapQueueWithoutRoom(t *testing.T) {
	ns, g := mirroredGuest(t, &loopback{}, Options{RingSize: 2})
	require.NoError(t, g.Pause())
	require.NoError(t, g.Guest.Stop())
	tx := g.Guest.tx[0]
	tx.reset()
	for i := range uint16(2) {
		copy(g.Guest.Mem.At(tx.gpa(i), 12)[10:], []byte{0xff, 0xff})
	}
	p := newTapQueue(g.Guest, 0, g.taps[0])
	var out net.Conn
	require.NoError(t, ns.Do(func() (err error) { out, err = net.Dial("udp", "192.0.2.2:9"); return err }))
	defer out.Close()
	for range 3 {
		_, err := out.Write([]byte("hello"))
		require.NoError(t, err)
	}
	enginetest.Eventually(t, soon, func() bool {
		_, err := p.move()
		require.NoError(t, err)
		return p.full
	})
	assert.EqualValues(t, 2, p.n.TxFrames)
	for i := range uint16(2) {
		assert.Equal(t, []byte{0, 0}, g.Guest.Mem.At(tx.gpa(i), 12)[10:])
	}
	tx.usedEvent.Store(77)
	p.arm()
	assert.EqualValues(t, tx.lastUsed, tx.usedEvent.Load(), "the interrupt is asked for")

	copy(tx.used[4:], U32s(uint32(binary.LittleEndian.Uint16(tx.avail[4:])), 0))
	tx.usedWord.Store(1 << 16)
	assert.True(t, p.arm())
	_, err := p.move()
	require.NoError(t, err)
	assert.EqualValues(t, 3, p.n.TxFrames)
}
