package nat

import (
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

func TestDeny(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Deny = []Prefix{{ip("169.254.0.0"), 16}} })
	w.refused(w.out(udp(fromGuestTo(1, ip("169.254.169.254"), 80), "x")), frame.Policy, 13) // H105
	w.one(w.out(udp(fromGuestTo(1, ip("169.253.0.1"), 80), "x")), portUplink)
}
