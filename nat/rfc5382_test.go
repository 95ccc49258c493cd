package nat

import (
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

// conn is a TCP connection between the guest and a host, seen by both.
type conn struct {
	w    *world
	g    flow5 // as the guest sends
	x    flow5 // as the outside receives
	seq  [2]uint32
	open int // side
}

const (
	guestISN = 1000
	hostISN  = 900_000
)

// connect opens a connection from the guest as far as the guest's SYN.
func connect(w *world, sport uint16) *conn {
	c := &conn{w: w, g: fromGuestTo(sport, hostB, 80), seq: [2]uint32{guestISN, hostISN}}
	c.x = w.one(w.out(tcp(c.g, "S", guestISN, 0, "")), portUplink).flow()
	return c
}

// establish opens a connection from the guest.
func establish(w *world, sport uint16) *conn {
	c := connect(w, sport)
	c.host("SA", hostISN, guestISN+1, "")
	c.guest("A", guestISN+1, hostISN+1, "")
	return c
}

func (c *conn) guest(flags string, seq, ack uint32, data string) {
	c.w.t.Helper()
	s := c.w.one(c.w.out(tcp(c.g, flags, seq, ack, data)), portUplink)
	require.Equal(c.w.t, c.x, s.flow())
}

func (c *conn) host(flags string, seq, ack uint32, data string) {
	c.w.t.Helper()
	s := c.w.one(c.w.in(tcp(c.x.back(), flags, seq, ack, data)), portGuest)
	require.Equal(c.w.t, c.g.back(), s.flow())
}

func (c *conn) state() string {
	c.w.t.Helper()
	fs := c.w.flows()
	require.Len(c.w.t, fs, 1)
	return fs[0].State
}

func TestRFC5382REQ1EndpointIndependentMapping(t *testing.T) {
	w := newWorld(t, ports80)
	ext := map[uint16]bool{}
	for i := range uint32(3) {
		ext[w.one(w.out(tcp(fromGuestTo(33333, hostB+i, 80), "S", 1, 0, "")), portUplink).flow().sport] = true
	}
	assert.Len(t, ext, 1)
}

func TestRFC5382REQ2aSimultaneousOpen(t *testing.T) {
	w := newWorld(t, ports80, filtering(AddressPortDependent))
	c := connect(w, 2000)
	c.host("S", hostISN, 0, "")
	assert.Equal(t, "established", c.state())
	c.guest("SA", guestISN, hostISN+1, "")
	c.host("SA", hostISN, guestISN+1, "")
	c.guest("A", guestISN+1, hostISN+1, "data")
	c.host("A", hostISN+1, guestISN+5, "data")
	assert.Equal(t, "established", c.state())
}

func TestRFC5382REQ4UnsolicitedSYN(t *testing.T) {
	// No guest's flow is involved before the guest has called: the pod's kernel
	// accepts or refuses, as with KubeVirt. Where it is out of reach nobody
	// answers (4a).
	for name, opts := range map[string][]option{"the pod answers": nil, "silence": {noTap}} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, append(opts, ports80, filtering(AddressPortDependent))...)
			f := flow5{hostB, podIP, 80, 50000}
			for range 4 {
				p := tcp(f, "S", 5, 0, "")
				if opts == nil {
					w.inToPod(p)
				} else {
					w.dropped(w.in(p), frame.NoFlow)
				}
				w.pass(2 * time.Second)
			}
			s := w.one(w.out(tcp(fromGuestTo(50000, hostB, 80), "S", 1, 0, "")), portUplink)
			require.Equal(t, f.back(), s.flow())
			w.one(w.in(tcp(f, "S", 5, 0, "")), portGuest)
		})
	}
}

func TestRFC5382REQ5Timers(t *testing.T) {
	for _, tc := range []struct {
		name       string
		do         func(c *conn)
		alive, end time.Duration
	}{
		{"opening", func(c *conn) {}, 239 * time.Second, 243 * time.Second},
		{"established", func(c *conn) {
			c.host("SA", hostISN, guestISN+1, "")
			c.guest("A", guestISN+1, hostISN+1, "")
		}, 7439 * time.Second, 7445 * time.Second},
		{"half closed", func(c *conn) {
			c.host("SA", hostISN, guestISN+1, "")
			c.guest("FA", guestISN+1, hostISN+1, "")
		}, 7439 * time.Second, 7445 * time.Second},
		{"closed", func(c *conn) {
			c.host("SA", hostISN, guestISN+1, "")
			c.guest("FA", guestISN+1, hostISN+1, "")
			c.host("FA", hostISN+1, guestISN+2, "")
			c.guest("A", guestISN+2, hostISN+2, "")
		}, 239 * time.Second, 243 * time.Second},
		{"reset", func(c *conn) {
			c.host("SA", hostISN, guestISN+1, "")
			c.guest("RA", guestISN+1, hostISN+1, "")
		}, 239 * time.Second, 243 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, ports80)
			c := connect(w, 2000)
			tc.do(c)
			w.pass(tc.alive)
			w.m.Sweep(w.now)
			require.Len(t, w.flows(), 1)
			w.pass(tc.end - tc.alive)
			w.m.Sweep(w.now)
			if tc.end > time.Hour { // the established timer leads to TRANS (RFC 7857, figure 1)
				require.Equal(t, "trans", c.state())
				w.pass(242 * time.Second)
				w.m.Sweep(w.now)
			}
			require.Empty(t, w.flows())
			assert.Zero(t, w.m.Stats().Mappings)
			assert.Equal(t, GuestStats{MAC: "52:54:00:00:00:02"}, w.m.Stats().Guests[0])
		})
	}
}

func TestRFC5382REQ5aConfigurable(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Timeouts.TCPOpening, c.Timeouts.TCPEstablished = 10*time.Second, time.Hour })
	connect(w, 2000)
	w.pass(11 * time.Second)
	w.m.Sweep(w.now)
	require.Empty(t, w.flows())
}

func TestRFC5382REQ9REQ10Errors(t *testing.T) {
	w := newWorld(t, ports80)
	c := establish(w, 2000)
	sent := packet{data: w.one(w.out(tcp(c.g, "A", guestISN+1, hostISN+1, "data")), portUplink).data}
	for code := range uint8(16) {
		s := w.one(w.in(icmpAbout(hostA, podIP, 3, code, sent)), portGuest)
		_, ports := quoted(t, s)
		assert.Equal(t, [2]uint16{2000, 80}, ports)
		assert.Equal(t, "established", c.state())
	}
	c.host("A", hostISN+1, guestISN+5, "data")
}

func TestRFC7857Figure1(t *testing.T) {
	const fin, syn, rst, ack = flagFIN, flagSYN, flagRST, flagACK
	states := []tcpState{tcpClosed, tcpInit, tcpEstablished, tcpClientFin, tcpServerFin, tcpBothFin, tcpTrans}
	type arc struct {
		from    tcpState
		client  bool
		flags   uint8
		belongs bool
		to      tcpState
	}
	arcs := []arc{
		{tcpClosed, true, syn, false, tcpInit},
		{tcpInit, true, syn, false, tcpInit},
		{tcpInit, false, syn, false, tcpEstablished},
		{tcpInit, false, syn | ack, false, tcpEstablished},
		{tcpInit, true, ack, false, tcpInit},
		{tcpInit, false, ack, false, tcpInit},
		{tcpEstablished, true, fin | ack, false, tcpClientFin},
		{tcpEstablished, false, fin | ack, false, tcpServerFin},
		{tcpEstablished, true, syn, false, tcpEstablished},
		{tcpClientFin, true, fin | ack, false, tcpClientFin},
		{tcpClientFin, false, fin | ack, false, tcpBothFin},
		{tcpClientFin, false, ack, false, tcpClientFin},
		{tcpServerFin, false, fin | ack, false, tcpServerFin},
		{tcpServerFin, true, fin | ack, false, tcpBothFin},
		{tcpBothFin, true, ack, false, tcpBothFin},
		{tcpBothFin, true, rst, true, tcpBothFin},
		{tcpBothFin, true, syn, false, tcpInit},
		{tcpTrans, true, ack, false, tcpEstablished},
		{tcpTrans, false, ack, false, tcpEstablished},
		{tcpTrans, true, syn, false, tcpInit},
		{tcpTrans, true, rst, true, tcpTrans},
		{tcpTrans, true, fin | ack, false, tcpTrans},
	}
	for _, s := range states {
		for _, client := range []bool{true, false} {
			if s != tcpClosed && s != tcpBothFin {
				arcs = append(arcs, arc{s, client, rst, true, tcpTrans}, arc{s, client, rst | ack, true, tcpTrans})
			}
			arcs = append(arcs, arc{s, client, rst, false, s})
		}
	}
	for _, a := range arcs {
		got := nextState(a.from, a.client, a.flags, a.belongs)
		assert.Equal(t, a.to, got, "%v client=%v flags=%#x belongs=%v", a.from, a.client, a.flags, a.belongs)
	}
}

func TestRFC7857Sec2StatesOnTheWire(t *testing.T) {
	w := newWorld(t, ports80)
	c := connect(w, 2000)
	assert.Equal(t, "init", c.state())
	assert.Equal(t, 1, w.m.Stats().Guests[0].HalfOpen[guestSide])
	c.host("SA", hostISN, guestISN+1, "")
	assert.Equal(t, "established", c.state())
	assert.Zero(t, w.m.Stats().Guests[0].HalfOpen[guestSide])
	c.guest("A", guestISN+1, hostISN+1, "")
	c.host("FA", hostISN+1, guestISN+1, "bye")
	assert.Equal(t, "server_fin", c.state())
	c.guest("A", guestISN+1, hostISN+5, "more data after the FIN")
	c.guest("FA", guestISN+24, hostISN+5, "")
	assert.Equal(t, "both_fin", c.state())
	c.host("A", hostISN+5, guestISN+25, "")
	// The port is used again at once.
	c.guest("S", guestISN+100_000, 0, "")
	assert.Equal(t, "init", c.state())
	assert.Equal(t, 1, w.m.Stats().Guests[0].HalfOpen[guestSide])
	c.host("SA", hostISN, guestISN+100_001, "")
	assert.Equal(t, "established", c.state())
}

func TestRFC7857Sec2Inbound(t *testing.T) {
	w := newWorld(t, ports80)
	f := toPod(hostA, 1234, 80)
	w.one(w.in(tcp(f, "S", 1, 0, "")), portGuest)
	assert.Equal(t, 1, w.m.Stats().Guests[0].HalfOpen[outside])
	back := flow5{guestIP, hostA, 80, 1234}
	w.one(w.out(tcp(back, "SA", 7, 2, "")), portUplink)
	require.True(t, w.flows()[0].Inbound)
	w.one(w.out(tcp(back, "FA", 8, 2, "")), portUplink)
	assert.Equal(t, "server_fin", w.flows()[0].State)
}

func TestRFC7857Sec22Reset(t *testing.T) {
	type step func(c *conn)
	for _, tc := range []struct {
		name  string
		do    step
		state string
	}{
		{"in the window", func(c *conn) { c.host("R", hostISN+1+999, 0, "") }, "trans"},
		{"at its left edge", func(c *conn) { c.host("RA", hostISN+1, guestISN+1, "") }, "trans"},
		{"beyond the window", func(c *conn) { c.host("R", hostISN+1+1001, 0, "") }, "established"},
		{"before the window", func(c *conn) { c.host("R", hostISN, 0, "") }, "established"},
		{"far off", func(c *conn) { c.host("RA", 12345, guestISN+1, "") }, "established"},
		{"by the guest", func(c *conn) { c.guest("R", guestISN+1, 0, "") }, "trans"},
		{"by the guest, far off", func(c *conn) { c.guest("R", 77, 0, "") }, "established"},
		{"traffic follows", func(c *conn) {
			c.host("R", hostISN+1, 0, "")
			c.guest("A", guestISN+1, hostISN+1, "data")
		}, "established"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, ports80)
			c := establish(w, 2000)
			tc.do(c) // it is translated in any case
			assert.Equal(t, tc.state, c.state())
		})
	}
	t.Run("refused connection", func(t *testing.T) {
		w := newWorld(t, ports80)
		c := connect(w, 2000)
		c.host("RA", 0, guestISN+2, "")
		c.host("RA", 0, guestISN, "")
		require.Equal(t, "trans", c.state(), "acknowledges the SYN, or data with it")
		require.Zero(t, w.m.Stats().Guests[0].HalfOpen[guestSide])
	})
	t.Run("refused by somebody else", func(t *testing.T) {
		w := newWorld(t, ports80)
		c := connect(w, 2000)
		c.host("RA", 0, guestISN, "")
		c.host("R", guestISN, 0, "")
		require.Equal(t, "init", c.state())
	})
	t.Run("given up", func(t *testing.T) {
		w := newWorld(t, ports80)
		c := connect(w, 2000)
		c.guest("R", guestISN+1, 0, "")
		require.Equal(t, "trans", c.state())
	})
	t.Run("scaled window", func(t *testing.T) {
		w := newWorld(t, ports80)
		g := fromGuestTo(2000, hostB, 80)
		syn := func(f flow5, flags func(*layers.TCP)) packet {
			l := &layers.TCP{SrcPort: layers.TCPPort(f.sport), DstPort: layers.TCPPort(f.dport), SYN: true, Window: 1000,
				Options: []layers.TCPOption{{OptionType: 1}, {OptionType: 3, OptionLength: 3, OptionData: []byte{7}}}}
			flags(l)
			return build(eth(f.src), ip4(f.src, f.dst, layers.IPProtocolTCP), l, gopacket.Payload(""))
		}
		x := w.one(w.out(syn(g, func(l *layers.TCP) { l.Seq = guestISN })), portUplink).flow()
		w.in(syn(x.back(), func(l *layers.TCP) { l.Seq, l.ACK, l.Ack = hostISN, true, guestISN+1 }))
		w.out(tcp(g, "A", guestISN+1, hostISN+1, ""))
		c := &conn{w: w, g: g, x: x}
		c.host("R", hostISN+1+1000<<7+1, 0, "")
		require.Equal(t, "established", c.state())
		c.host("R", hostISN+1+1000<<7, 0, "")
		require.Equal(t, "trans", c.state())
	})
}

func TestRFC7857Sec5Sec6PerProtocol(t *testing.T) {
	w := newWorld(t, ports80, filtering(EndpointIndependent))
	ext := w.one(w.out(tcp(fromGuestTo(2000, hostB, 80), "S", 1, 0, "")), portUplink).flow().sport
	w.inToPod(udp(toPod(hostB, 80, ext), "x"))
	w.dropped(w.in(echoReply(hostB, podIP, ext, 1)), frame.NoFlow)
	require.Len(t, w.flows(), 1)
}

func TestRFC7857Sec7InboundRefreshesOnlyItsOwn(t *testing.T) {
	w := newWorld(t, ports80, filtering(AddressPortDependent))
	f := w.one(w.out(udp(fromGuestTo(2000, hostB, 53), "x")), portUplink).flow()
	for range 10 {
		w.pass(40 * time.Second)
		w.dropped(w.in(udp(toPod(hostB, 54, f.sport), "x")), frame.NoFlow)
		w.m.Sweep(w.now)
	}
	require.Empty(t, w.flows())
	w.pass(40 * time.Second)
	w.inToPod(udp(toPod(hostB, 54, f.sport), "x"))
}

func TestRFC7857Sec71ResetsRefreshNothing(t *testing.T) {
	w := newWorld(t, ports80)
	c := establish(w, 2000)
	c.host("R", hostISN+1, 0, "")
	for range 6 {
		w.pass(50 * time.Second)
		if len(w.out(tcp(c.g, "R", guestISN+1, 0, ""))) == 0 {
			break
		}
		w.m.Sweep(w.now)
	}
	require.Empty(t, w.flows())
}

func TestRFC7857Sec9ObfuscatedPorts(t *testing.T) {
	w := newWorld(t, ports80)
	seen, ordered := map[uint16]bool{}, 0
	last := uint16(0)
	for i := range uint16(500) {
		p := w.one(w.out(udp(fromGuestTo(2000+i, hostB, 53), "x")), portUplink).flow().sport
		require.False(t, seen[p])
		require.True(t, w.m.cfg.PortRange.has(p))
		seen[p] = true
		if p > last {
			ordered++
		}
		last = p
	}
	assert.Less(t, ordered, 320, "neither counting up")
	assert.Greater(t, ordered, 180, "nor down")
	low := 0
	for p := range seen {
		if p < 40000+25536/2 {
			low++
		}
	}
	assert.InDelta(t, 250, low, 70, "spread over the range")
}

func TestTCPMidStream(t *testing.T) {
	// Connections outlive a lost table where the port is kept.
	w := newWorld(t)
	c := &conn{w: w, g: fromGuestTo(2000, hostB, 80), x: flow5{podIP, hostB, 2000, 80}}
	c.guest("A", 5, 6, "data")
	c.guest("A", 9, 6, "data")
	assert.Equal(t, "trans", c.state(), "one side alone establishes nothing")
	c.host("A", 6, 9, "")
	assert.Equal(t, "established", c.state())

	w = newWorld(t, ports80)
	w.one(w.in(tcp(toPod(hostA, 1234, 80), "A", 1, 2, "x")), portGuest)
	w.dropped(w.out(tcp(fromGuestTo(2000, hostB, 80), "R", 1, 0, "")), frame.NoFlow)
	w.dropped(w.out(tcp(fromGuestTo(2000, hostB, 80), "SF", 1, 0, "")), frame.NoFlow)
	ext := w.one(w.out(tcp(fromGuestTo(2000, hostB, 80), "S", 1, 0, "")), portUplink).flow().sport
	w.dropped(w.in(tcp(toPod(hostA, 1234, ext), "A", 1, 2, "x")), frame.NoFlow)
	w.one(w.in(tcp(toPod(hostA, 1234, ext), "S", 1, 0, "")), portGuest)
}
