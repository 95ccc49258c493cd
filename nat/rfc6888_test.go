package nat

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

func limits(l Limits) option { return func(c *Config) { c.Limits = l } }

// refused wants the packet dropped for a reason, and an ICMP error with code
// for the guest.
func (w *world) refused(fs []*frame.Frame, r frame.DropReason, code uint8) {
	w.t.Helper()
	require.Len(w.t, fs, 2)
	require.Equal(w.t, r.String(), fs[0].Reason.String())
	require.Equal(w.t, portGuest, fs[1].Out)
	s := decode(w.t, fs[1])
	require.Equal(w.t, uint8(3), s.icmp().TypeCode.Type())
	require.Equal(w.t, code, s.icmp().TypeCode.Code())
}

func TestRFC6888REQ4PerGuestPorts(t *testing.T) {
	w := newWorld(t, ports80, twoGuests, func(c *Config) { c.PortRange = PortRange{60000, 60009} })
	ports := map[uint16]bool{}
	for i := range uint16(5) {
		ports[w.one(w.out(udp(fromGuestTo(100+i, hostB, 53), "x")), portUplink).flow().sport] = true
	}
	w.refused(w.out(udp(fromGuestTo(200, hostB, 53), "x")), frame.NoPort, 1) // H102, REQ-11
	for i := range uint16(5) {
		ports[w.one(w.out2(udp(flow5{guestIP2, hostB, 100 + i, 53}, "x")), portUplink).flow().sport] = true
	}
	assert.Len(t, ports, 10, "the other guest has its share")
	assert.EqualValues(t, 1, w.m.Stats().NoPort)
	w.one(w.out(udp(fromGuestTo(100, hostA, 53), "x")), portUplink) // H102: old mappings are unaffected
}

func TestRFC6888REQ4cRate(t *testing.T) {
	w := newWorld(t, limits(Limits{NewPerSecond: 100, NewBurst: 10}))
	send := func() (n int) {
		for i := range uint32(50) {
			if fs := w.out(udp(fromGuestTo(2000, hostB+uint32(w.now>>20)+i, 53), "x")); fs[0].Out == portUplink {
				n++
			}
		}
		return n
	}
	assert.Equal(t, 10, send())
	w.pass(50 * time.Millisecond)
	assert.Equal(t, 5, send())
	assert.EqualValues(t, 85, w.m.Stats().RateLimited)
	// The other direction has a rate of its own.
	w.one(w.in(udp(toPod(hostA, 1, 2), "x")), portGuest)
}

func TestRFC6888REQ5REQ11Limits(t *testing.T) {
	for _, tc := range []struct {
		name string
		l    Limits
		p    func(i uint32) packet
	}{
		{"flows", Limits{Flows: 10}, func(i uint32) packet { return udp(fromGuestTo(2000, hostB+i, 53), "x") }},
		{"table", Limits{Table: 10}, func(i uint32) packet { return udp(fromGuestTo(2000, hostB+i, 53), "x") }},
		{"udp", Limits{UDP: 10}, func(i uint32) packet { return udp(fromGuestTo(2000, hostB+i, 53), "x") }},
		{"tcp", Limits{TCP: 10}, func(i uint32) packet { return tcp(fromGuestTo(2000, hostB+i, 53), "S", 1, 0, "") }},
		{"half open", Limits{HalfOpen: 10}, func(i uint32) packet { return tcp(fromGuestTo(2000, hostB+i, 53), "S", 1, 0, "") }},
		{"icmp", Limits{ICMP: 10}, func(i uint32) packet { return echo(guestIP, hostB+i, 9, 1) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := newWorld(t, limits(tc.l))
			for i := range uint32(10) {
				w.one(w.out(tc.p(i)), portUplink)
			}
			before := w.flows()
			for i := range uint32(20) {
				w.refused(w.out(tc.p(100+i)), frame.TableFull, 1)
			}
			assert.Equal(t, before, w.flows(), "11d: nothing is evicted")
			assert.EqualValues(t, 20, w.m.Stats().TableFull, "11c")
			for i := range uint32(10) {
				w.one(w.out(tc.p(i)), portUplink)
			}
			w.pass(10 * time.Hour)
			w.m.Sweep(w.now)
			require.Empty(t, w.flows())
			w.one(w.out(tc.p(100)), portUplink)
		})
	}
}

func TestOutsideCannotUseUpLimits(t *testing.T) {
	w := newWorld(t, limits(Limits{TCP: 100, HalfOpen: 50}))
	for i := range 200 {
		w.in(tcp(toPod(hostA, uint16(i+1), 80), "S", 1, 0, ""))
	}
	assert.Equal(t, 50, w.m.Stats().Guests[0].HalfOpen[outside])
	for i := range uint16(50) {
		w.one(w.out(tcp(fromGuestTo(2000+i, hostB, 80), "S", 1, 0, "")), portUplink)
	}
	w = newWorld(t, limits(Limits{UDP: 100}))
	for i := range 200 {
		w.in(udp(toPod(hostA, uint16(i+1), 80), "x"))
	}
	assert.Len(t, w.flows(), 75)
	for i := range uint16(25) {
		w.one(w.out(udp(fromGuestTo(2000+i, hostB, 80), "x")), portUplink)
	}
}

func TestRFC6888REQ8PortHold(t *testing.T) {
	for _, tc := range []struct {
		f    Filtering
		hold bool
	}{{EndpointIndependent, true}, {AddressDependent, false}, {AddressPortDependent, false}} {
		w := newWorld(t, ports80, twoGuests, filtering(tc.f), func(c *Config) { c.PortRange = PortRange{60000, 60001} })
		w.one(w.out(udp(fromGuestTo(60000, hostB, 53), "x")), portUplink)
		w.pass(302 * time.Second)
		w.m.Sweep(w.now)
		got := w.one(w.out2(udp(flow5{guestIP2, hostB, 60000, 53}, "x")), portUplink).flow().sport
		assert.Equal(t, tc.hold, got != 60000, "%v", tc.f)
		// Its last owner has it at once.
		if tc.hold {
			assert.EqualValues(t, 60000, w.one(w.out(udp(fromGuestTo(60000, hostB, 53), "x")), portUplink).flow().sport)
			w.pass(302 * time.Second)
			w.m.Sweep(w.now)
			w.pass(121 * time.Second)
			assert.EqualValues(t, 60000, w.one(w.out2(udp(flow5{guestIP2, hostB, 60000, 53}, "x")), portUplink).flow().sport)
		}
	}
}

func TestH104ReuseReachesNoOldOwner(t *testing.T) {
	w := newWorld(t, ports80, twoGuests, filtering(AddressPortDependent), func(c *Config) { c.PortRange = PortRange{60000, 60001} })
	a := w.one(w.out(udp(fromGuestTo(60000, hostB, 53), "x")), portUplink).flow()
	w.pass(302 * time.Second)
	w.m.Sweep(w.now)
	b := w.one(w.out2(udp(flow5{guestIP2, hostB, 60000, 53}, "x")), portUplink).flow()
	require.Equal(t, a, b)
	s := w.one(w.in(udp(a.back(), "for guest 2")), portGuest2)
	assert.Equal(t, guestIP2, s.flow().dst)
}

func TestBoundPortsAreSkipped(t *testing.T) {
	asked := 0
	w := newWorld(t, ports80, func(c *Config) {
		c.PortRange = PortRange{60000, 60009}
		c.PortFree = func(proto uint8, port uint16) bool {
			asked++
			assert.EqualValues(t, 6, proto)
			return port == 60007
		}
	})
	assert.EqualValues(t, 60007, w.one(w.out(tcp(fromGuestTo(100, hostB, 80), "S", 1, 0, "")), portUplink).flow().sport)
	n := asked
	w.one(w.out(tcp(fromGuestTo(100, hostA, 80), "S", 1, 0, "")), portUplink)
	assert.Equal(t, n, asked, "once for a mapping")
	w.refused(w.out(tcp(fromGuestTo(101, hostB, 80), "S", 1, 0, "")), frame.NoPort, 1)
}

// Once a guest's mapping is gone, the pod's kernel does not speak for it to
// those who still send, and the guest that gets every other port does not get
// what was another's.
func TestHeldPortsAreSilent(t *testing.T) {
	open := map[string]func(flow5) packet{
		"tcp": func(f flow5) packet { return tcp(f, "S", 1, 0, "") },
		"udp": func(f flow5) packet { return udp(f, "x") },
	}
	for name, p := range open {
		for _, f := range []Filtering{EndpointIndependent, AddressPortDependent} {
			t.Run(fmt.Sprint(name, f), func(t *testing.T) {
				w := newWorld(t, ports80, filtering(f))
				ext := w.one(w.out(p(fromGuestTo(50000, hostB, 53))), portUplink).flow()
				w.pass(302 * time.Second)
				w.m.Sweep(w.now)
				require.Empty(t, w.flows())
				w.inToPod(p(toPod(hostB, 53, ext.sport^1)))
				w.pass(119 * time.Second)
				w.dropped(w.in(p(ext.back())), frame.NoFlow)
				w.pass(time.Second)
				w.inToPod(p(ext.back()))
				// The guest has it again, and loses it again.
				require.Equal(t, ext, w.one(w.out(p(fromGuestTo(50000, hostB, 53))), portUplink).flow())
				w.pass(302 * time.Second)
				w.m.Sweep(w.now)
				w.dropped(w.in(p(ext.back())), frame.NoFlow)
			})
		}
	}
	w := newWorld(t, twoGuests)
	ext := w.one(w.out2(udp(flow5{guestIP2, hostB, 50000, 53}, "x")), portUplink).flow()
	w.pass(302 * time.Second)
	w.m.Sweep(w.now)
	w.dropped(w.in(udp(ext.back(), "for guest 2")), frame.NoFlow)
	w.pass(120 * time.Second)
	w.one(w.in(udp(ext.back(), "for whoever has every port")), portGuest)
}

// A packet from outside that opens no flow changes nothing about its port:
// neither is a free one held afterwards, nor a held one free.
func TestRefusedPacketsHoldNoPort(t *testing.T) {
	narrow := func(last uint16) option { return func(c *Config) { c.PortRange = PortRange{60000, last} } }
	w := newWorld(t, narrow(60099), limits(Limits{UDP: 40}))
	for port := uint16(60000); port < 60100; port++ {
		w.in(udp(toPod(hostA, 9, port), "scan"))
	}
	require.Len(t, w.flows(), 30)
	for i := range uint16(10) { // the guest's own ports are not for it to have
		w.one(w.out(udp(fromGuestTo(33000+i, hostB, 53), "x")), portUplink)
	}

	w = newWorld(t, narrow(60000), limits(Limits{NewPerSecond: 1, NewBurst: 1}))
	require.EqualValues(t, 60000, w.one(w.out(udp(fromGuestTo(33000, hostB, 53), "x")), portUplink).flow().sport)
	w.pass(302 * time.Second)
	w.m.Sweep(w.now)
	w.one(w.in(udp(toPod(hostA, 9, 70), "the only one this second")), portGuest)
	w.dropped(w.in(udp(toPod(hostA, 9, 60000), "scan")), frame.RateLimited)
	w.refused(w.out(udp(fromGuestTo(33001, hostB, 53), "x")), frame.NoPort, 1)
}

// A scan of the whole range leaves the guest its ports.
func TestScanOfTheRangeLeavesPorts(t *testing.T) {
	w := newWorld(t)
	lookups := func() {
		t.Helper()
		for i := range uint16(100) {
			w.one(w.out(udp(fromGuestTo(33000+i, hostB+uint32(i), 53), "x")), portUplink)
		}
	}
	for port := 40000; port <= 65535; port++ {
		w.in(udp(toPod(hostA, 9, uint16(port)), "scan"))
	}
	require.Positive(t, w.m.Stats().RateLimited)
	lookups()
	w.pass(302 * time.Second)
	w.m.Sweep(w.now)
	require.Empty(t, w.flows())
	lookups()
}

// Destinations in the pod itself are reached without translation.
func TestRFC6888REQ6NotTranslated(t *testing.T) {
	w := newWorld(t)
	for _, dst := range []uint32{podIP, ip("10.244.9.9"), gatewayIP} {
		p := udp(fromGuestTo(2000, dst, 9), "x")
		fs := w.out(p)
		require.Len(t, fs, 1)
		require.Equal(t, portTap, fs[0].Out)
		assert.Equal(t, p.data, fs[0].Bytes())
	}
	require.Empty(t, w.flows())
}

func TestDefaultLimits(t *testing.T) {
	c := newWorld(t).m.cfg
	assert.Equal(t, Limits{
		Flows: 65536, TCP: 16384, HalfOpen: 1024, UDP: 16384, ICMP: 1024, Other: 1024, NewPerSecond: 5000, NewBurst: 10000,
		ErrorsPerSecond: 100, ErrorBurst: 50, FragmentIDs: 64, FragmentBytes: 262144, Table: 65536,
	}, c.Limits)
	assert.Equal(t, Timeouts{
		TCPEstablished: 124 * time.Minute, TCPOpening: 4 * time.Minute, TCPClosing: 4 * time.Minute, UDP: 5 * time.Minute,
		ICMP: time.Minute, Other: 10 * time.Minute, Fragment: 30 * time.Second, PortHold: 2 * time.Minute,
	}, c.Timeouts)
	assert.Equal(t, [2]PortRange{{40000, 65535}, {32768, 39999}}, [2]PortRange{c.PortRange, c.KernelRange})
	c = newWorld(t, twoGuests).m.cfg
	assert.Equal(t, 131072, c.Limits.Table)
	// What was given stays.
	c = newWorld(t, limits(Limits{Flows: 7, ErrorBurst: 3})).m.cfg
	assert.Equal(t, [4]int{7, 16384, 3, 7}, [4]int{c.Limits.Flows, c.Limits.TCP, c.Limits.ErrorBurst, c.Limits.Table})
}

func TestRFC5508REQ8Policy(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Deny = []Prefix{{ip("169.254.0.0"), 16}} })
	w.refused(w.out(udp(fromGuestTo(1, ip("169.254.169.254"), 80), "x")), frame.Policy, 13) // H105
	w.one(w.out(udp(fromGuestTo(1, ip("169.253.0.1"), 80), "x")), portUplink)
}
