package usernet

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// peer is the guest's end of a connection, driven by hand.
type peer struct {
	w     *world
	dst   netip.AddrPort // as the guest knows it
	sport uint16
	seq   uint32 // next to send
	ack   uint32 // next expected
	wnd   uint16
	scale uint8 // of the other side
}

const guestISS = 1000

// call sends a SYN with options and wants a SYN-ACK.
func call(w *world, dst netip.AddrPort, sport uint16, options ...byte) *peer {
	w.t.Helper()
	p := &peer{w: w, dst: dst, sport: sport, seq: guestISS, wnd: 65535}
	if options == nil {
		options = []byte{2, 4, 5, 180, 1, 3, 3, 0}
	}
	as := p.raw(tcpSYN, "", options...)
	p.seq++
	a := p.expect(as, func(a *arrived) bool { return a.tcp.SYN })
	require.True(w.t, a.tcp.ACK)
	require.Equal(w.t, p.seq, a.tcp.Ack)
	p.ack = a.tcp.Seq + 1
	for _, o := range a.tcp.Options {
		if o.OptionType == layers.TCPOptionKindWindowScale {
			p.scale = o.OptionData[0]
		}
	}
	require.Empty(w.t, p.raw(tcpACK, ""))
	return p
}

// raw sends a segment at the present place.
func (p *peer) raw(bits uint8, data string, options ...byte) []arrived {
	p.w.t.Helper()
	return p.at(p.seq, bits, data, options...)
}

// at sends a segment with any sequence number.
func (p *peer) at(seq uint32, bits uint8, data string, options ...byte) []arrived {
	p.w.t.Helper()
	return p.w.send(p.segment(seq, bits, data, options...))
}

func (p *peer) segment(seq uint32, bits uint8, data string, options ...byte) []byte {
	b := tcpTo(p.dst, enginetest.TCP{Src: p.sport, Seq: seq, Ack: p.ack, Flags: bits, Options: options}, data)
	patch(b, 14, p.wnd)
	return b
}

// patch writes a 16-bit field of the TCP header and keeps the checksum right.
func patch(b []byte, at int, v uint16) {
	h := b[l4:]
	six := binary.BigEndian.Uint16(b[12:]) == frame.TypeIPv6
	if six {
		h = b[l4+sixMore:]
	}
	binary.BigEndian.PutUint16(h[at:], v)
	h[16], h[17] = 0, 0
	sum := pseudoSum(binary.BigEndian.Uint32(b[26:]), binary.BigEndian.Uint32(b[30:]), frame.ProtoTCP, len(h))
	if six {
		sum = frame.Sum(b[22:54], uint64(frame.ProtoTCP+len(h)))
	}
	binary.BigEndian.PutUint16(h[16:], ^frame.Fold(frame.Sum(h, sum)))
}

// patch32 is patch for a 32-bit field.
func patch32(b []byte, at int, v uint32) {
	patch(b, at, uint16(v>>16))
	patch(b, at+2, uint16(v))
}

// expect wants a segment of this connection that fits, now or soon.
func (p *peer) expect(as []arrived, fits func(*arrived) bool) arrived {
	p.w.t.Helper()
	mine := func(a *arrived) bool {
		return a.tcp != nil && uint16(a.tcp.DstPort) == p.sport && a.from() == p.dst && fits(a)
	}
	for i := range as {
		if mine(&as[i]) {
			return as[i]
		}
	}
	a, ok := p.w.wait(patience, mine)
	require.True(p.w.t, ok, "no such segment")
	return a
}

// say sends data and wants it acknowledged.
func (p *peer) say(data string) {
	p.w.t.Helper()
	as := p.raw(tcpACK|tcpPSH, data)
	p.seq += uint32(len(data))
	p.w.pass(time.Millisecond)
	p.expect(as, func(a *arrived) bool { return a.tcp.ACK && a.tcp.Ack == p.seq })
}

// hear wants n bytes and acknowledges them.
func (p *peer) hear(n int) string {
	p.w.t.Helper()
	var got strings.Builder
	for got.Len() < n {
		a := p.expect(nil, func(a *arrived) bool { return len(a.payload) > 0 })
		require.Equal(p.w.t, p.ack, a.tcp.Seq)
		got.Write(a.payload)
		p.ack += uint32(len(a.payload))
		p.w.backlog = append(p.w.backlog, p.raw(tcpACK, "")...)
	}
	return got.String()
}

// hostTCP is a listener of the host's on loopback.
func hostTCP(t testing.TB) (*net.TCPListener, netip.AddrPort) {
	t.Helper()
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	return l, gateway(l.Addr().(*net.TCPAddr).AddrPort().Port())
}

func acceptTCP(t testing.TB, l *net.TCPListener) *net.TCPConn {
	t.Helper()
	require.NoError(t, l.SetDeadline(time.Now().Add(patience)))
	c, err := l.AcceptTCP()
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(patience)))
	return c
}

// connected is a connection of the guest to a listener of the host.
func connected(t testing.TB, w *world, sport uint16) (*peer, *net.TCPConn) {
	t.Helper()
	l, addr := hostTCP(t)
	p := call(w, addr, sport)
	return p, acceptTCP(t, l)
}

func reads(t testing.TB, c net.Conn, n int) string {
	t.Helper()
	b := make([]byte, n)
	_, err := io.ReadFull(c, b)
	require.NoError(t, err)
	return string(b)
}

func writes(t testing.TB, c net.Conn, s string) {
	t.Helper()
	_, err := c.Write([]byte(s))
	require.NoError(t, err)
}

func TestTCPBothWays(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	assert.Equal(t, uint16(40000), c.RemoteAddr().(*net.TCPAddr).AddrPort().Port(), "RFC 5382 REQ-1: the guest's port is kept")
	p.say("question")
	assert.Equal(t, "question", reads(t, c, 8))
	writes(t, c, "answer")
	assert.Equal(t, "answer", p.hear(6))
	// What the guest has acknowledged is off the socket; nothing comes twice.
	w.pass(3 * time.Second)
	w.nothing()
}

func TestTCPRefused(t *testing.T) {
	w := newWorld(t)
	l, addr := hostTCP(t)
	l.Close()
	p := &peer{w: w, dst: addr, sport: 40000, seq: guestISS, wnd: 1000}
	a := p.expect(p.raw(tcpSYN, ""), func(a *arrived) bool { return a.tcp.RST })
	assert.True(t, a.tcp.ACK)
	assert.Equal(t, uint32(guestISS+1), a.tcp.Ack)
	assert.Zero(t, w.net.Stats().TCPOpen)
}

func TestTCPUnknownConnectionIsReset(t *testing.T) {
	w := newWorld(t)
	p := &peer{w: w, dst: gateway(9), sport: 40000, seq: 77, ack: 99, wnd: 1000}
	a := p.expect(p.raw(tcpACK, "data"), func(a *arrived) bool { return a.tcp.RST })
	assert.Equal(t, uint32(99), a.tcp.Seq)
	w.dropped(frame.NoFlow)
	require.Empty(t, p.raw(tcpRST, ""))
}

func TestTCPHalfCloseByGuest(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	// FIN and data in one segment.
	as := p.raw(tcpACK|tcpFIN, "last")
	p.seq += 5
	p.expect(as, func(a *arrived) bool { return a.tcp.Ack == p.seq })
	all, err := io.ReadAll(c)
	require.NoError(t, err)
	assert.Equal(t, "last", string(all))
	writes(t, c, "still here")
	assert.Equal(t, "still here", p.hear(10))
	require.NoError(t, c.Close())
	a := p.expect(nil, func(a *arrived) bool { return a.tcp.FIN })
	assert.Equal(t, p.ack, a.tcp.Seq)
	p.ack++
	p.raw(tcpACK, "")
	assert.Zero(t, w.net.Stats().TCPOpen)
}

func TestTCPHalfCloseByHost(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	writes(t, c, "bye")
	require.NoError(t, c.CloseWrite())
	assert.Equal(t, "bye", p.hear(3))
	p.expect(nil, func(a *arrived) bool { return a.tcp.FIN && a.tcp.Seq == p.ack })
	p.ack++
	p.raw(tcpACK, "")
	p.say("more")
	assert.Equal(t, "more", reads(t, c, 4))
	as := p.raw(tcpACK|tcpFIN, "")
	p.seq++
	p.expect(as, func(a *arrived) bool { return a.tcp.Ack == p.seq })
	_, err := c.Read(make([]byte, 1))
	assert.ErrorIs(t, err, io.EOF)
	// A FIN that comes again is answered for a while, and then no more.
	p.expect(p.at(p.seq-1, tcpACK|tcpFIN, ""), func(a *arrived) bool { return a.tcp.Ack == p.seq && !a.tcp.RST })
	w.pass(3 * time.Second)
	w.until(func() bool { return w.net.Stats().TCPOpen == 0 })
}

func TestTCPPortUsedAgainInTimeWait(t *testing.T) {
	w := newWorld(t)
	l, addr := hostTCP(t)
	p := call(w, addr, 40000)
	c := acceptTCP(t, l)
	require.NoError(t, c.Close())
	p.expect(nil, func(a *arrived) bool { return a.tcp.FIN })
	p.ack++
	p.expect(p.raw(tcpACK|tcpFIN, ""), func(a *arrived) bool { return a.tcp.Ack == p.seq+1 })
	q := &peer{w: w, dst: addr, sport: 40000, seq: p.seq + 100000, wnd: 65535}
	a := q.expect(q.raw(tcpSYN, "", 2, 4, 5, 180), func(a *arrived) bool { return a.tcp.SYN })
	assert.Equal(t, q.seq+1, a.tcp.Ack)
}

func TestTCPSimultaneousClose(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	require.NoError(t, c.CloseWrite())
	p.expect(nil, func(a *arrived) bool { return a.tcp.FIN })
	// The guest's FIN crosses: it does not acknowledge ours.
	as := p.raw(tcpACK|tcpFIN, "")
	p.seq++
	p.expect(as, func(a *arrived) bool { return a.tcp.Ack == p.seq })
	p.ack++
	p.raw(tcpACK, "")
	w.pass(3 * time.Second)
	w.until(func() bool { return w.net.Stats().TCPOpen == 0 })
}

func TestTCPResetByGuest(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	// RFC 5961, 3.2: one that is merely in the window is questioned.
	p.expect(p.at(p.seq+100, tcpRST, ""), func(a *arrived) bool { return a.tcp.ACK && !a.tcp.RST })
	p.raw(tcpRST|tcpACK, "")
	_, err := c.Read(make([]byte, 1))
	assert.ErrorIs(t, err, syscall.ECONNRESET)
	assert.Zero(t, w.net.Stats().TCPOpen)
}

func TestTCPResetByHost(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	require.NoError(t, c.SetLinger(0))
	require.NoError(t, c.Close())
	a := p.expect(nil, func(a *arrived) bool { return a.tcp.RST })
	assert.Equal(t, p.ack, a.tcp.Seq)
	assert.Zero(t, w.net.Stats().TCPOpen)
}

func TestTCPSYNWithData(t *testing.T) {
	w := newWorld(t)
	l, addr := hostTCP(t)
	p := &peer{w: w, dst: addr, sport: 40000, seq: guestISS, wnd: 65535}
	a := p.expect(p.raw(tcpSYN, "early"), func(a *arrived) bool { return a.tcp.SYN })
	assert.Equal(t, uint32(guestISS+1), a.tcp.Ack, "the data is asked for again")
	p.seq, p.ack = guestISS+1, a.tcp.Seq+1
	p.say("early")
	assert.Equal(t, "early", reads(t, acceptTCP(t, l), 5))
}

func TestTCPSYNAgain(t *testing.T) {
	w := newWorld(t)
	_, addr := hostTCP(t)
	p := &peer{w: w, dst: addr, sport: 40000, seq: guestISS, wnd: 65535}
	first := p.expect(p.raw(tcpSYN, ""), func(a *arrived) bool { return a.tcp.SYN })
	again := p.expect(p.raw(tcpSYN, ""), func(a *arrived) bool { return a.tcp.SYN })
	assert.Equal(t, first.tcp.Seq, again.tcp.Seq)
	// And ours, if the guest does not answer.
	w.pass(1100 * time.Millisecond)
	late := p.expect(nil, func(a *arrived) bool { return a.tcp.SYN })
	assert.Equal(t, first.tcp.Seq, late.tcp.Seq)
}

func TestTCPReorderOverlapDuplicate(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	// The second of two comes first: it is not kept, and the guest is told.
	a := p.expect(p.at(p.seq+5, tcpACK, "world"), func(a *arrived) bool { return true })
	assert.Equal(t, p.seq, a.tcp.Ack)
	p.say("hello")
	p.say("world")
	// Half of it is known.
	p.expect(p.at(p.seq-3, tcpACK, "rld, again"), func(a *arrived) bool { return true })
	p.seq += 7
	// All of it.
	a = p.expect(p.at(p.seq-4, tcpACK, "gain"), func(a *arrived) bool { return true })
	assert.Equal(t, p.seq, a.tcp.Ack)
	assert.Equal(t, "helloworld, again", reads(t, c, 17))
}

func TestTCPKeepaliveIsAnswered(t *testing.T) {
	w := newWorld(t)
	p, _ := connected(t, w, 40000)
	for _, data := range []string{"", "x"} {
		a := p.expect(p.at(p.seq-1, tcpACK, data), func(a *arrived) bool { return true })
		assert.Equal(t, p.seq, a.tcp.Ack)
	}
}

func TestTCPManySegmentsInOneBatch(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	var frames [][]byte
	var want bytes.Buffer
	for i := range 60 {
		data := strings.Repeat(string(rune('a'+i%26)), 700)
		frames = append(frames, p.segment(p.seq, tcpACK, data))
		p.seq += uint32(len(data))
		want.WriteString(data)
	}
	as := w.send(frames...)
	w.consumed()
	p.expect(as, func(a *arrived) bool { return a.tcp.Ack == p.seq })
	assert.Len(t, as, 1, "one acknowledgement for all")
	assert.Equal(t, want.String(), reads(t, c, want.Len()))
}

func TestTCPBulkToGuest(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	want := strings.Repeat("0123456789abcdef", 1<<16)
	done := make(chan error, 1)
	go func() {
		_, err := c.Write([]byte(want))
		done <- errors.Join(err, c.CloseWrite())
	}()
	assert.Equal(t, want, p.hear(len(want)))
	require.NoError(t, <-done)
	p.expect(nil, func(a *arrived) bool { return a.tcp.FIN })
	assert.Zero(t, w.net.Stats().Retransmits)
}

func TestTCPWindowOfGuestIsKept(t *testing.T) {
	w := newWorld(t)
	l, addr := hostTCP(t)
	p := call(w, addr, 40000, 2, 4, 5, 180, 1, 3, 3, 2)
	c := acceptTCP(t, l)
	p.wnd = 500 // times 4
	p.raw(tcpACK, "")
	writes(t, c, strings.Repeat("x", 100000))
	got := 0
	for got < 2000 {
		a := p.expect(nil, func(a *arrived) bool { return len(a.payload) > 0 })
		got += len(a.payload)
	}
	require.Equal(t, 2000, got)
	w.nothing()
	// Closed, it is probed, at growing intervals; open again, all goes on.
	p.ack += 2000
	p.wnd = 0
	p.raw(tcpACK, "")
	w.nothing()
	for range 3 {
		w.pass(5 * time.Second)
		a := p.expect(nil, func(a *arrived) bool { return true })
		assert.Equal(t, p.ack-1, a.tcp.Seq)
		assert.Empty(t, a.payload)
		p.raw(tcpACK, "")
	}
	p.wnd = 500
	w.backlog = append(w.backlog, p.raw(tcpACK, "")...)
	p.hear(2000)
}

func TestTCPRetransmission(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	writes(t, c, "lost")
	isData := func(a *arrived) bool { return string(a.payload) == "lost" }
	p.expect(nil, isData)
	w.nothing()
	// RFC 6298: after a second, then two, then four.
	for _, d := range []time.Duration{time.Second, 2 * time.Second, 4 * time.Second} {
		w.pass(d - 100*time.Millisecond)
		w.nothing()
		w.pass(150 * time.Millisecond)
		a := p.expect(nil, isData)
		require.Equal(t, p.ack, a.tcp.Seq)
	}
	p.ack += 4
	p.raw(tcpACK, "")
	w.pass(time.Minute)
	w.nothing()
	writes(t, c, "next")
	assert.Equal(t, "next", p.hear(4))
}

func TestTCPFastRetransmit(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	want := strings.Repeat("0123456789", 1000)
	writes(t, c, want)
	first := p.expect(nil, func(a *arrived) bool { return len(a.payload) > 0 })
	for ok := true; ok; {
		_, ok = w.wait(silence, nil)
	}
	// The first segment got lost, the others are acknowledged in vain.
	for range 2 {
		require.Empty(t, p.raw(tcpACK, ""))
	}
	a := p.expect(p.raw(tcpACK, ""), func(a *arrived) bool { return len(a.payload) > 0 })
	assert.Equal(t, first.tcp.Seq, a.tcp.Seq)
	assert.Equal(t, want[:len(a.payload)], string(a.payload))
	p.ack += uint32(len(want))
	p.raw(tcpACK, "")
	writes(t, c, "end")
	assert.Equal(t, "end", p.hear(3))
}

func TestTCPServerThatNeverReads(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	data := strings.Repeat("z", 1000)
	sent, edge := 0, 65535
	for edge > 0 {
		n := min(edge, len(data))
		as := p.raw(tcpACK|tcpPSH, data[:n])
		p.seq += uint32(n)
		sent += n
		edge -= n
		for _, a := range as {
			require.Equal(t, p.seq, a.tcp.Ack, "nothing is refused that was allowed")
			edge = int(a.tcp.Window) << p.scale
		}
		require.Less(t, sent, 64<<20)
	}
	assert.Zero(t, w.net.Stats().Stalls)
	// Another connection is as fast as ever.
	q, d := connected(t, w, 40001)
	q.say("quick")
	assert.Equal(t, "quick", reads(t, d, 5))
	// When it reads at last, the window opens.
	go io.Copy(io.Discard, c)
	a := p.expect(nil, func(a *arrived) bool { return a.tcp.Window > 0 })
	assert.Equal(t, p.seq, a.tcp.Ack)
}

func TestTCPUrgentStaysApart(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	rc, err := c.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, rc.Control(func(fd uintptr) {
		require.NoError(t, syscall.Sendto(int(fd), []byte("ab!"), syscall.MSG_OOB, nil))
	}))
	writes(t, c, "cd")
	var got []byte
	for len(got) < 5 {
		a := p.expect(nil, func(a *arrived) bool { return len(a.payload) > 0 })
		if a.tcp.URG {
			assert.Equal(t, "!", string(a.payload))
			assert.Equal(t, uint16(1), a.tcp.Urgent)
		} else {
			assert.NotContains(t, string(a.payload), "!")
		}
		got = append(got, a.payload...)
		p.ack += uint32(len(a.payload))
		p.raw(tcpACK, "")
	}
	assert.Equal(t, "ab!cd", string(got))
	// The other way.
	f := p.segment(p.seq, tcpACK|tcpURG, "xy?z")
	patch(f, 18, 3)
	w.send(f)
	require.NoError(t, rc.Control(func(fd uintptr) {
		b := make([]byte, 8)
		n, _, err := syscall.Recvfrom(int(fd), b, syscall.MSG_OOB)
		require.NoError(t, err)
		assert.Equal(t, "?", string(b[:n]))
	}))
	assert.Equal(t, "xyz", reads(t, c, 3))
}

func TestTCPIdleTimes(t *testing.T) {
	w := newWorld(t)
	p, _ := connected(t, w, 40000)
	hour := func(n int) {
		for range n * 12 {
			w.pass(5 * time.Minute)
			w.pull(0)
		}
	}
	hour(2)
	p.raw(tcpACK, "") // RFC 5382 REQ-5: alive, and refreshed
	hour(2)
	require.Equal(t, 1, w.net.Stats().TCPOpen)
	hour(1)
	assert.Zero(t, w.net.Stats().TCPOpen)
}

func TestTCPAllocatesNothing(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	file, err := c.File()
	require.NoError(t, err)
	defer file.Close()
	fd, b, buf := int(file.Fd()), w.b, make([]byte, 8)
	data := p.segment(p.seq, tcpACK|tcpPSH, "x")
	n := testing.AllocsPerRun(500, func() {
		b.Reset(w.now)
		b.Worker, b.In = 0, portGuest
		f := b.Next()
		f.SetBytes(data, nil, nil)
		w.net.Process(b)
		n, _ := syscall.Read(fd, buf)
		syscall.Write(fd, buf[:n])
		for got := false; !got; {
			w.now += 1000
			b.Reset(w.now)
			w.net.Queue(0).Pull(b)
			for i := range b.Len() {
				got = got || b.Frame(i).Len > headLen
			}
			w.net.Queue(0).Release(b)
		}
		p.seq++
		p.ack++
		patch32(data, 4, p.seq)
		patch32(data, 8, p.ack)
	})
	assert.Zero(t, n)
}

// listenAgain changes the length of a listener's queue.
func listenAgain(fd, n int) error { return syscall.Listen(fd, n) }

func TestTCPUnreachable(t *testing.T) {
	enginetest.Need(t, "netns")
	ns := enginetest.NewNetNS(t)
	require.NoError(t, ns.Run("ip", "route", "add", "unreachable", "192.0.2.0/24"))
	require.NoError(t, ns.Run("ip", "route", "add", "prohibit", "198.51.100.0/24"))
	w := newWorld(t, inPod(t, ns))
	for dst, code := range map[string]byte{"192.0.2.1:80": codeHost, "198.51.100.1:80": codeProhibited, "203.0.113.1:80": codeNet} {
		p := &peer{w: w, dst: netip.MustParseAddrPort(dst), sport: 40000, seq: guestISS, wnd: 1000}
		as := p.raw(tcpSYN, "")
		require.Len(t, as, 1, "at once")
		require.NotNil(t, as[0].icmp)
		assert.Equal(t, []byte{icmpUnreachable, code}, as[0].data[l4:l4+2], dst)
		quoted := as[0].data[l4+8:]
		assert.Equal(t, p.dst.Addr().AsSlice(), quoted[16:20])
		assert.Equal(t, uint32(guestISS), binary.BigEndian.Uint32(quoted[ip4Len+4:]), "the SYN that it is about")
	}
	assert.Zero(t, w.net.Stats().TCPOpen)
}

func TestTCPWindowScales(t *testing.T) {
	for scale := range byte(16) {
		w := newWorld(t)
		l, addr := hostTCP(t)
		p := call(w, addr, 40000, 2, 4, 5, 180, 1, 3, 3, scale)
		c := acceptTCP(t, l)
		p.wnd = 3
		p.raw(tcpACK, "")
		// RFC 7323, 2.3: what is more than 14 counts as 14.
		want := 3 << min(scale, 14)
		writes(t, c, strings.Repeat("x", 60000))
		require.Len(t, p.hear(min(want, 1460)), min(want, 1460), "scale %d", scale)
	}
	// One that does not scale is not scaled to.
	w := newWorld(t)
	l, addr := hostTCP(t)
	p := call(w, addr, 40000, 2, 4, 5, 180)
	acceptTCP(t, l)
	assert.Zero(t, p.scale)
}

// A kernel before Linux 6.9 knows no SO_PEEK_OFF for TCP.
func TestTCPWithoutPeekOffset(t *testing.T) {
	w := newWorld(t)
	w.net.noPeekOff.Store(true)
	p, c := connected(t, w, 40000)
	want := strings.Repeat("0123456789abcdef", 1<<14)
	go func() { c.Write([]byte(want)); c.CloseWrite() }()
	// Two segments are under way before the first is acknowledged.
	var got strings.Builder
	for n := 0; got.Len() < len(want); n++ {
		a := p.expect(nil, func(a *arrived) bool { return len(a.payload) > 0 })
		require.Equal(t, p.ack+uint32(0), a.tcp.Seq)
		got.Write(a.payload)
		p.ack += uint32(len(a.payload))
		if n&1 == 1 || got.Len() == len(want) {
			w.backlog = append(w.backlog, p.raw(tcpACK, "")...)
		}
	}
	assert.Equal(t, want, got.String())
	p.expect(nil, func(a *arrived) bool { return a.tcp.FIN })
}
