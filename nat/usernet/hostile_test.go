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
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// What a guest or a server does to harm stays with the flow that it does it on.

// works wants a byte each way on a connection.
func works(p *peer, c net.Conn) {
	p.w.t.Helper()
	p.say("q")
	require.Equal(p.w.t, "q", reads(p.w.t, c, 1))
	writes(p.w.t, c, "a")
	require.Equal(p.w.t, "a", p.hear(1))
}

// inside is a listener on a namespace's loopback, as the guest knows it.
func inside(t testing.TB, ns *enginetest.NetNS, at string) (l *net.TCPListener, addr netip.AddrPort) {
	t.Helper()
	require.NoError(t, ns.Do(func() (err error) {
		l, err = net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(netip.MustParseAddrPort(at)))
		return err
	}))
	t.Cleanup(func() { l.Close() })
	return l, l.Addr().(*net.TCPAddr).AddrPort()
}

// blackHole lets what goes to 198.51.100.0/24 vanish.
func blackHole(t testing.TB, ns *enginetest.NetNS) {
	t.Helper()
	enginetest.Veth(t, ns, "hole", enginetest.NewNetNS(t), "end")
	enginetest.Must(t, ns.Addr("hole", "192.0.2.1/24"), ns.Up("hole"),
		ns.Run("ip", "neigh", "replace", "192.0.2.2", "lladdr", "02:00:00:00:00:99", "nud", "permanent", "dev", "hole"),
		ns.Route("198.51.100.0/24", "192.0.2.2"))
}

// A guest that opens connections to where nobody answers gets as many as it
// may have. All else is refused and counted, and what was open works.
func TestHostileFloodOfSYNs(t *testing.T) {
	enginetest.Need(t, "netns")
	total := 100_000
	if soaks() {
		total = 1_000_000
	}
	for name, most := range map[string]Config{"flows": {MaxFlows: 300, MaxSockets: 1000}, "sockets": {MaxFlows: 1000, MaxSockets: 300}} {
		t.Run(name, func(t *testing.T) {
			ns := enginetest.NewNetNS(t)
			blackHole(t, ns)
			w := newWorld(t, inPod(t, ns), func(c *Config) { c.MaxFlows, c.MaxSockets = most.MaxFlows, most.MaxSockets })
			l, at := inside(t, ns, "127.0.0.1:0")
			p := call(w, gateway(at.Port()), 40000)
			c := acceptTCP(t, l)
			works(p, c)
			syn := tcpTo(netip.MustParseAddrPort("198.51.100.1:80"), enginetest.TCP{Src: 1, Seq: guestISS, Flags: tcpSYN}, "")
			replies := 0
			for n := 0; n < total; {
				w.b.Reset(w.now)
				w.b.Worker, w.b.In = 0, portGuest
				for range 100 {
					patch(syn, 0, uint16(1024+n%60000))
					patch(syn, 2, uint16(1+n/60000))
					w.b.Next().SetBytes(syn, nil, nil)
					n++
				}
				w.net.Process(w.b)
				replies += w.b.Len() - 100
				w.pass(100 * time.Microsecond)
			}
			s := w.net.Stats()
			assert.Equal(t, min(most.MaxFlows, most.MaxSockets), s.TCPOpen)
			assert.LessOrEqual(t, s.Sockets, most.MaxSockets)
			assert.EqualValues(t, total-s.TCPOpen+1, s.TableFull+s.NoSocket, "each is counted")
			assert.Less(t, replies, total/10, "errors are limited (RFC 1812, 4.3.2.8)")
			works(p, c)
			// They end by themselves.
			for range 10 {
				w.pass(time.Minute)
				w.pull(0)
			}
			assert.Equal(t, 1, w.net.Stats().TCPOpen)
			assert.Equal(t, 1, w.net.Stats().Sockets)
			works(p, c)
		})
	}
}

// A guest that acknowledges nothing has a bounded part of the stream under way,
// is asked ever more rarely, and is given up.
func TestHostileNeverAcknowledges(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	q, d := connected(t, w, 40001)
	go c.Write(make([]byte, 8<<20))
	end, segments := uint32(0), 0
	look := func() {
		for _, a := range append(w.backlog, w.pull(0)...) {
			if a.tcp != nil && uint16(a.tcp.DstPort) == p.sport {
				end = max(end, a.tcp.Seq+uint32(len(a.payload))-p.ack)
				segments++
			}
		}
		w.backlog = nil
	}
	w.until(func() bool { look(); return end > 0 })
	for range 100 {
		look()
	}
	assert.LessOrEqual(t, end, uint32(initialSegments*1460))
	segments = 0
	for n := 0; w.net.Stats().TCPOpen == 2; n++ {
		require.Less(t, n, 3600)
		w.pass(time.Second)
		look()
		if n == 60 {
			assert.LessOrEqual(t, segments, 6, "1+2+4+8+16+32 s")
			works(q, d)
		}
	}
	assert.LessOrEqual(t, segments, maxBackoff+2)
	assert.LessOrEqual(t, end, uint32(initialSegments*1460))
	works(q, d)
}

// A window may shrink under what is under way (RFC 9293, 3.8.6): the stream
// stays whole, and ends not while the guest answers.
func TestHostileShrinkingWindow(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	want := strings.Repeat("0123456789abcdef", 4096)
	go c.Write([]byte(want))
	first := p.expect(nil, func(a *arrived) bool { return len(a.payload) > 0 })
	require.Equal(t, p.ack, first.tcp.Seq)
	p.ack += 100
	p.wnd = 0
	p.raw(tcpACK, "")
	for range 3600 { // an hour
		w.pass(time.Second)
		sent := 0
		for _, a := range w.pull(0) {
			require.False(t, a.tcp.RST, "the guest is there")
			sent += len(a.payload)
			w.backlog = append(w.backlog, p.raw(tcpACK, "")...)
		}
		require.LessOrEqual(t, sent, 1460, "no more than a probe")
	}
	w.backlog = nil
	p.wnd = 65535
	as := p.raw(tcpACK, "")
	got, begin := want[:100], w.now
	for end := time.Now().Add(patience); len(got) < len(want); {
		require.True(t, time.Now().Before(end), "%d bytes", len(got))
		for _, a := range append(as, w.pull(0)...) {
			if skip := int(p.ack - a.tcp.Seq); skip >= 0 && skip < len(a.payload) {
				got += string(a.payload[skip:])
				p.ack += uint32(len(a.payload) - skip)
			}
		}
		as = p.raw(tcpACK, "")
		w.pass(10 * time.Millisecond)
	}
	assert.Less(t, time.Duration(w.now-begin), 10*time.Second)
	assert.Equal(t, want, got)
}

// Options of all kinds and lengths, also ones that cannot be (RFC 9293,
// MUST-7).
func TestHostileOptions(t *testing.T) {
	for kind := range 256 {
		for length := range 256 {
			for _, room := range []int{1, 2, 3, 4, 12, 40} {
				o := make([]byte, room)
				for i := range o {
					o[i] = byte(i*37 + kind)
				}
				o[0] = byte(kind)
				if room > 1 {
					o[1] = byte(length)
				}
				var fl flow
				fl.readOptions(o, 1460)
				if fl.mss < minMSS || fl.mss > 1460 || fl.gscale() > 14 {
					t.Fatalf("%x: mss %d, scale %d", o, fl.mss, fl.gscale())
				}
			}
		}
	}
	w := newWorld(t)
	l, addr := hostTCP(t)
	for i, o := range [][]byte{
		{2, 0, 0, 0}, {2, 255, 5, 180}, {3, 3, 255, 0}, {0, 2, 4, 0}, {2, 4, 0, 0}, {2, 4, 255, 255},
		{8, 10, 0, 0}, {5, 255, 255, 255}, {2, 3, 1, 1}, {254, 1, 1, 1}, {1, 1, 1, 30},
	} {
		p := call(w, addr, uint16(40000+i), o...)
		c := acceptTCP(t, l)
		as := p.raw(tcpACK|tcpPSH, "with options", 19, 0, 255, byte(i))
		p.seq += 12
		w.pass(time.Millisecond)
		p.expect(as, func(a *arrived) bool { return a.tcp.Ack == p.seq })
		require.Equal(t, "with options", reads(t, c, 12))
		works(p, c)
	}
	// A header that ends behind the packet.
	p := &peer{w: w, dst: addr, sport: 50000, seq: guestISS, wnd: 1000}
	for n := range 16 {
		if n == 5 {
			continue
		}
		b := p.segment(guestISS, tcpSYN, "")
		patch(b, 12, uint16(n)<<12|tcpSYN)
		require.Empty(t, w.send(b))
		w.dropped(frame.BadTransport)
	}
}

func TestHostileAddresses(t *testing.T) {
	w := newWorld(t)
	_, addr := hostTCP(t)
	for _, src := range []string{"10.0.2.16", "10.0.2.2", "192.0.2.7", "127.0.0.1", "0.0.0.0", "255.255.255.255", "224.0.0.1"} {
		ip := enginetest.IP{Src: netip.MustParseAddr(src), Dst: gatewayIP}
		require.Empty(t, w.send(enginetest.TCPFrame(toRouter, ip, enginetest.TCP{Src: 40000, Dst: addr.Port(), Seq: 1, Flags: tcpSYN}, nil)))
		w.dropped(frame.Spoofed)
	}
	for _, dst := range []string{"224.0.0.1", "239.1.2.3", "240.0.0.1", "255.255.255.255", "127.0.0.1", "127.9.9.9", "0.0.0.0", "0.1.2.3", "10.0.2.15"} {
		require.Empty(t, w.send(tcpTo(netip.AddrPortFrom(netip.MustParseAddr(dst), addr.Port()), enginetest.TCP{Src: 40000, Seq: 1, Flags: tcpSYN}, "")))
		w.dropped(frame.NotCarried)
	}
	assert.Zero(t, w.net.Stats().TCPOpened)
	assert.Zero(t, w.net.Stats().Sockets)
}

func TestHostileServerByteByByte(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	q, d := connected(t, w, 40001)
	want := strings.Repeat("one byte at a time; ", 50)
	got := ""
	for i := range want {
		writes(t, c, want[i:i+1])
		if i%3 == 0 || i == len(want)-1 { // the guest is behind
			got += p.hear(i + 1 - len(got))
		}
		if i%99 == 0 {
			works(q, d)
		}
	}
	require.Equal(t, want, got)
	require.NoError(t, c.CloseWrite())
	p.expect(nil, func(a *arrived) bool { return a.tcp.FIN && a.tcp.Seq == p.ack })
	assert.Zero(t, w.net.Stats().Retransmits)
}

// A server resets while both directions have data queued.
func TestHostileServerResets(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	q, d := connected(t, w, 40001)
	go c.Write(make([]byte, 1<<20))
	p.expect(nil, func(a *arrived) bool { return len(a.payload) > 0 })
	for range 30 {
		p.raw(tcpACK, strings.Repeat("u", 1000))
		p.seq += 1000
	}
	require.NoError(t, c.SetLinger(0))
	require.NoError(t, c.Close())
	a := p.expect(nil, func(a *arrived) bool { return a.tcp.RST })
	assert.False(t, before(a.tcp.Seq, p.ack))
	assert.Equal(t, 1, w.net.Stats().TCPOpen)
	assert.Equal(t, 1, w.net.Stats().Sockets)
	// What the guest still sends is answered by a reset.
	p.ack = a.tcp.Seq
	p.expect(p.raw(tcpACK, "late"), func(a *arrived) bool { return a.tcp.RST })
	works(q, d)
}

// A server that reads nothing takes nothing from one that does: the same number
// of batches carry the same bytes.
func TestHostileServerNeverReadsBesideOneThatDoes(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	stuck, _ := connected(t, w, 40001)
	data := strings.Repeat("r", 1400)
	round := func() {
		var frames [][]byte
		for range 30 {
			frames = append(frames, p.segment(p.seq, tcpACK, data))
			p.seq += uint32(len(data))
		}
		as := w.send(frames...)
		p.expect(as, func(a *arrived) bool { return a.tcp.Ack == p.seq })
		reads(t, c, 30*len(data))
	}
	for range 50 {
		round()
	}
	require.Zero(t, w.net.Stats().Stalls)
	// Beyond its window, too.
	edge := uint32(0)
	for range 200 {
		var frames [][]byte
		for k := range uint32(100) {
			frames = append(frames, stuck.segment(stuck.seq+k*1400, tcpACK, data))
		}
		for _, a := range w.send(frames...) {
			if a.tcp != nil && uint16(a.tcp.DstPort) == stuck.sport {
				stuck.seq, edge = a.tcp.Ack, uint32(a.tcp.Window)
			}
		}
	}
	require.Zero(t, edge, "its window is closed")
	for range 50 {
		round()
	}
	assert.Less(t, stuck.seq-guestISS, uint32(16<<20), "bounded by the host's socket")
}

// The process itself is out of descriptors.
func TestHostileProcessWithoutDescriptors(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	_, addr := hostTCP(t)
	f := Forward{Proto: frame.ProtoTCP, Addr: localIP, Port: freePort(t), Guest: 80}
	require.NoError(t, w.net.AddForward(f))
	client, err := net.Dial("tcp4", netip.AddrPortFrom(localIP, f.Port).String())
	require.NoError(t, err)
	defer client.Close()
	var was unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	none := unix.Rlimit{Cur: 3, Max: was.Max}
	require.NoError(t, unix.Prlimit(0, unix.RLIMIT_NOFILE, &none, nil))
	q := &peer{w: w, dst: addr, sport: 41000, seq: guestISS, wnd: 1000}
	as := q.raw(tcpSYN, "")
	reason := w.frames[0].Reason
	w.until(func() bool { return w.net.Stats().AcceptFailed > 0 })
	require.NoError(t, unix.Prlimit(0, unix.RLIMIT_NOFILE, &was, nil))
	assert.Equal(t, frame.NoPort, reason)
	require.Len(t, as, 1)
	assert.Equal(t, []byte{icmpUnreachable, codeHost}, as[0].data[l4:l4+2])
	assert.EqualValues(t, 1, w.net.Stats().NoSocket)
	assert.Equal(t, 2, w.net.Stats().Sockets, "the flow and the listener")
	works(p, c)
	// The client has only waited.
	w.pass(300 * time.Millisecond)
	w.until(func() bool { return w.net.Stats().Accepted == 1 })
}

// A flow changes its worker while FINs are under way.
func TestFlowMovesWithFIN(t *testing.T) {
	for before := range moveAfter + 4 {
		for _, hostFirst := range []bool{false, true} {
			w := newWorld(t, workers(2))
			p, c := connected(t, w, 40000)
			w.worker, w.queue = 1, 1
			for range before {
				p.say("x")
			}
			reads(t, c, before)
			fin := func() {
				as := p.raw(tcpACK|tcpFIN, "bye")
				p.seq += 4
				p.expect(as, func(a *arrived) bool { return a.tcp.Ack == p.seq && !a.tcp.RST })
			}
			heard := func() {
				p.expect(nil, func(a *arrived) bool { return a.tcp.FIN && a.tcp.Seq == p.ack })
				p.ack++
			}
			if hostFirst {
				require.NoError(t, c.CloseWrite())
				heard()
				p.raw(tcpACK, "")
				fin()
			} else {
				fin()
				writes(t, c, "answer")
				require.Equal(t, "answer", p.hear(6))
				require.NoError(t, c.CloseWrite())
				heard()
				p.raw(tcpACK, "")
			}
			all, err := io.ReadAll(c)
			require.NoError(t, err)
			require.Equal(t, "bye", string(all))
			if hostFirst { // the answer to the guest's FIN got lost, often
				for range 2 * moveAfter {
					p.expect(p.at(p.seq-1, tcpACK|tcpFIN, ""), func(a *arrived) bool {
						require.False(t, a.tcp.RST)
						return a.tcp.Ack == p.seq
					})
					w.pass(5 * time.Millisecond)
					w.pull(0)
					w.pull(1)
				}
			}
			w.pass(3 * time.Second)
			w.until(func() bool { return w.net.Stats().TCPOpen == 0 })
			require.Zero(t, w.net.Stats().Sockets)
			require.Zero(t, w.net.workers[0].table.count+w.net.workers[1].table.count)
		}
	}
}

// Forged "fragmentation needed" makes no segment shorter, and an MSS of nothing
// is not believed.
func TestHostileTinyMTU(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	for _, mtu := range []uint16{0, 1, 20, 40, 68, 296, 576} {
		b := icmpAbout(icmpUnreachable, codeFragNeeded, p.segment(p.seq, tcpACK, ""))
		b[l4+2], b[l4+3], b[l4+6], b[l4+7] = 0, 0, byte(mtu>>8), byte(mtu)
		s := ^frame.Fold(frame.Sum(b[l4:], 0))
		b[l4+2], b[l4+3] = byte(s>>8), byte(s)
		w.send(b)
	}
	go c.Write(make([]byte, 50_000))
	a := p.expect(nil, func(a *arrived) bool { return len(a.payload) > 0 })
	assert.Len(t, a.payload, 1460)
	l, addr := hostTCP(t)
	for i, mss := range []byte{0, 1, minMSS - 1} {
		q := call(w, addr, uint16(41000+i), 2, 4, 0, mss)
		d := acceptTCP(t, l)
		go d.Write(make([]byte, 5000))
		a := q.expect(nil, func(a *arrived) bool { return len(a.payload) > 0 })
		assert.Len(t, a.payload, minMSS)
	}
}
