package usernet

import (
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

func remotePort(c net.Conn) uint16 { return c.RemoteAddr().(*net.TCPAddr).AddrPort().Port() }

// Where the host's kernel is the one that meets a requirement, the test shows
// that nothing of ours stands in its way. See docs/rfc.md.

func TestRFC5382_REQ1_EndpointIndependentMapping(t *testing.T) {
	w := newWorld(t)
	for range 3 {
		_, c := connected(t, w, 40000)
		assert.Equal(t, uint16(40000), remotePort(c))
	}
}

func TestRFC5382_REQ2a_SimultaneousOpen(t *testing.T) {
	w := newWorld(t)
	p, c := calledFrom(t, w, func(p *peer) {
		// The guest's SYN crosses ours: it acknowledges nothing.
		ack := p.ack
		p.ack = 0
		a := p.expect(p.raw(tcpSYN, "", 2, 4, 5, 180), func(a *arrived) bool { return a.tcp.SYN && a.tcp.ACK })
		p.ack = ack
		assert.Equal(t, p.seq+1, a.tcp.Ack)
		assert.Equal(t, p.ack-1, a.tcp.Seq)
		p.seq++
		p.raw(tcpACK, "")
	})
	p.say("hello")
	assert.Equal(t, "hello", reads(t, c, 5))
}

// calledFrom is a connection of a client of the host's to the guest, up to our
// SYN, after which open brings the guest's part.
func calledFrom(t testing.TB, w *world, open func(p *peer)) (*peer, net.Conn) {
	t.Helper()
	f := Forward{Proto: frame.ProtoTCP, Addr: localIP, Port: freePort(t), Guest: 80}
	require.NoError(t, w.net.AddForward(f))
	c, err := net.Dial("tcp4", netip.AddrPortFrom(localIP, f.Port).String())
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	require.NoError(t, c.SetDeadline(time.Now().Add(patience)))
	a, ok := w.wait(patience, func(a *arrived) bool { return a.tcp != nil && a.tcp.SYN })
	require.True(t, ok)
	assert.False(t, a.tcp.ACK)
	assert.Equal(t, gatewayIP, a.src(), "a client on loopback is shown as the gateway")
	p := &peer{w: w, dst: a.from(), sport: 80, seq: guestISS, ack: a.tcp.Seq + 1, wnd: 65535}
	open(p)
	return p, c
}

func answered(p *peer) {
	p.w.backlog = append(p.w.backlog, p.raw(tcpSYN|tcpACK, "", 2, 4, 5, 180, 1, 3, 3, 7)...)
	p.seq++
	p.expect(nil, func(a *arrived) bool { return a.tcp.ACK && !a.tcp.SYN && a.tcp.Ack == p.seq })
}

func TestRFC5382_REQ2_OpenedFromOutside(t *testing.T) {
	w := newWorld(t)
	p, c := calledFrom(t, w, answered)
	writes(t, c, "question")
	assert.Equal(t, "question", p.hear(8))
	p.say("answer")
	assert.Equal(t, "answer", reads(t, c, 6))
}

func TestForwardedConnectionRefusedByGuest(t *testing.T) {
	w := newWorld(t)
	_, c := calledFrom(t, w, func(p *peer) { p.seq = 0; p.raw(tcpRST|tcpACK, "") })
	_, err := c.Read(make([]byte, 1))
	assert.Error(t, err)
	assert.NotErrorIs(t, err, io.EOF)
	assert.Zero(t, w.net.Stats().TCPOpen)
}

func TestRFC5382_REQ7_NoPortOverloading(t *testing.T) {
	a, b := newWorld(t), newWorld(t)
	l, addr := hostTCP(t)
	call(a, addr, 40000)
	call(b, addr, 40000)
	x, y := acceptTCP(t, l), acceptTCP(t, l)
	assert.NotEqual(t, remotePort(x), remotePort(y))
}

func TestRFC5382_REQ8_Hairpin(t *testing.T) {
	w := newWorld(t)
	f := Forward{Proto: frame.ProtoTCP, Addr: localIP, Port: freePort(t), Guest: 80}
	require.NoError(t, w.net.AddForward(f))
	out := call(w, gateway(f.Port), 40000)
	w.pass(1100 * time.Millisecond) // the first may have come before the answer to ours
	a, ok := w.wait(patience, func(a *arrived) bool { return a.tcp != nil && a.tcp.SYN && !a.tcp.ACK })
	require.True(t, ok)
	in := &peer{w: w, dst: a.from(), sport: 80, seq: guestISS, ack: a.tcp.Seq + 1, wnd: 65535}
	assert.NotEqual(t, guestIP, a.src(), "REQ-8a: shown with an address of the outside")
	answered(in)
	out.raw(tcpACK|tcpPSH, "to myself")
	assert.Equal(t, "to myself", in.hear(9))
}

func TestRFC5382_REQ10_ICMPEndsNothing(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	for typ := range uint8(20) {
		for code := range uint8(5) {
			w.send(icmpAbout(typ, code, p.segment(p.seq, tcpACK, "")))
		}
	}
	p.say("alive")
	assert.Equal(t, "alive", reads(t, c, 5))
}

// icmpAbout is an ICMP error of the guest's about a packet, as if it had got
// that from the host.
func icmpAbout(typ, code uint8, about []byte) []byte {
	quoted := append([]byte{}, about[l3:]...)
	copy(quoted[12:16], about[l3+16:l3+20])
	copy(quoted[16:20], about[l3+12:l3+16])
	copy(quoted[20:22], about[l4+2:l4+4])
	copy(quoted[22:24], about[l4:l4+2])
	b := echoTo(gatewayIP, 0, 0, string(quoted))
	b[l4], b[l4+1], b[l4+2], b[l4+3] = typ, code, 0, 0
	s := ^frame.Fold(frame.Sum(b[l4:], 0))
	b[l4+2], b[l4+3] = byte(s>>8), byte(s)
	return b
}

func TestRFC6888_REQ11_TableFull(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.MaxFlows = 4 })
	var peers []*peer
	var conns []net.Conn
	for i := range 4 {
		p, c := connected(t, w, uint16(40000+i))
		peers, conns = append(peers, p), append(conns, c)
	}
	_, addr := hostTCP(t)
	q := &peer{w: w, dst: addr, sport: 41000, seq: guestISS, wnd: 1000}
	as := q.raw(tcpSYN, "")
	w.dropped(frame.TableFull)
	require.Len(t, as, 1)
	require.NotNil(t, as[0].icmp, "RFC 6888 REQ-11b")
	assert.Equal(t, []byte{icmpUnreachable, codeHost}, as[0].data[l4:l4+2])
	for i, p := range peers { // REQ-11d: nobody has lost anything
		p.say("still")
		assert.Equal(t, "still", reads(t, conns[i], 5))
	}
}

func TestDescriptorsOut(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.MaxSockets = 2 })
	p, c := connected(t, w, 40000)
	connected(t, w, 40001)
	_, addr := hostTCP(t)
	q := &peer{w: w, dst: addr, sport: 41000, seq: guestISS, wnd: 1000}
	require.Len(t, q.raw(tcpSYN, ""), 1)
	w.dropped(frame.NoPort)
	p.say("still")
	assert.Equal(t, "still", reads(t, c, 5))
	p.raw(tcpRST, "")
	connected(t, w, 40002)
}

func TestPolicyOfTCP(t *testing.T) {
	deny := Policy{Rules: []Rule{{Proto: frame.ProtoTCP, Prefix: netip.MustParsePrefix("192.0.2.0/24")}}}
	w := newWorld(t, func(c *Config) { c.Policy = deny })
	p := &peer{w: w, dst: netip.MustParseAddrPort("192.0.2.1:80"), sport: 40000, seq: guestISS, wnd: 1000}
	as := p.raw(tcpSYN, "")
	w.dropped(frame.Policy)
	require.Len(t, as, 1)
	assert.Equal(t, []byte{icmpUnreachable, codeProhibited}, as[0].data[l4:l4+2], "RFC 5508 REQ-8")
	connected(t, w, 40001)
}

// The guest moves a flow to a queue pair of another worker: it goes on there at
// once, and belongs there after a while.
func TestFlowFollowsTheGuest(t *testing.T) {
	w := newWorld(t, workers(2))
	p, c := connected(t, w, 40000)
	require.Equal(t, 1, w.net.workers[0].table.count)
	w.worker, w.queue = 1, 1
	want := ""
	for range moveAfter + 4 {
		p.say("x")
		want += "x"
	}
	assert.Equal(t, want, reads(t, c, len(want)))
	assert.Equal(t, 0, w.net.workers[0].table.count)
	assert.Equal(t, 1, w.net.workers[1].table.count)
	writes(t, c, "answer")
	a := p.expect(nil, func(a *arrived) bool { return string(a.payload) == "answer" })
	assert.Equal(t, uint16(1), a.queue, "where the guest sent from last")
	// A flow that is new to all is the worker's own.
	connected(t, w, 40001)
	assert.Equal(t, 2, w.net.workers[1].table.count)
}

// One direction here, one there: no ping-pong, and nothing is lost.
func TestFlowBetweenWorkers(t *testing.T) {
	w := newWorld(t, workers(2))
	p, c := connected(t, w, 40000)
	for i := range 100 {
		w.worker = i & 1
		p.say("x")
	}
	assert.Equal(t, strings.Repeat("x", 100), reads(t, c, 100))
	assert.LessOrEqual(t, w.net.Stats().Moved, uint64(1))
}

func TestManyHangingConnectsDelayNobody(t *testing.T) {
	w := newWorld(t)
	// A listener whose queue is full does not answer: connects to it hang.
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	require.NoError(t, err)
	defer l.Close()
	setBacklog(t, l, 1)
	dst := gateway(l.Addr().(*net.TCPAddr).AddrPort().Port())
	for i := range 200 {
		p := &peer{w: w, dst: dst, sport: uint16(41000 + i), seq: guestISS, wnd: 1000}
		p.raw(tcpSYN, "")
		w.consumed()
	}
	begin := time.Now()
	p, c := connected(t, w, 40000)
	p.say("quick")
	assert.Equal(t, "quick", reads(t, c, 5))
	assert.Less(t, time.Since(begin), time.Second)
}

func setBacklog(t testing.TB, l *net.TCPListener, n int) {
	t.Helper()
	c, err := l.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, c.Control(func(fd uintptr) { require.NoError(t, listenAgain(int(fd), n)) }))
}

// Whatever a guest sends on a connection, the flow stays bounded and the rest
// goes on.
func FuzzGuestTCP(f *testing.F) {
	f.Add([]byte{0, tcpACK, 0, 0, 0, 10, 3, tcpACK | tcpFIN, 0, 0, 0, 0, 0, tcpRST, 0, 0, 0, 0})
	f.Add([]byte{0, tcpACK | tcpURG, 0, 0, 0, 255, 1, tcpSYN, 0, 1, 0, 0})
	f.Add([]byte{128, tcpACK, 255, 255, 255, 4, 2, tcpACK, 0, 0, 0, 0, 2, tcpACK, 0, 0, 0, 0, 2, tcpACK, 0, 0, 0, 0})
	f.Add([]byte{0, tcpFIN | tcpSYN | tcpRST | tcpACK, 1, 2, 3, 4})
	f.Fuzz(func(t *testing.T, steps []byte) {
		w := newWorld(t, func(c *Config) { c.MaxSockets = 50 })
		p, c := connected(t, w, 40000)
		go io.Copy(io.Discard, c)
		for len(steps) >= 6 && len(steps) < 6*200 {
			s := steps[:6]
			steps = steps[6:]
			seq := p.seq + uint32(int32(int8(s[0])))*uint32(s[4]+1)
			p.ack += uint32(int32(int8(s[2])))
			p.wnd = uint16(s[3]) << 8
			w.send(p.segment(seq, s[1], strings.Repeat("f", int(s[5]))))
			w.pass(time.Duration(s[4]) * 20 * time.Millisecond)
			w.pull(0)
			if s[1]&7 == 0 && s[0] == 0 {
				p.seq += uint32(s[5])
			}
		}
		require.LessOrEqual(t, w.net.Stats().TCPOpen, 2)
		q, d := connected(t, w, 40001)
		q.say("fine")
		require.Equal(t, "fine", reads(t, d, 4))
	})
}
