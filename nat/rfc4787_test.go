package nat

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

// ports80 is a guest that lists a port, so that nothing else reaches it
// unasked.
var ports80 = listed(Forward{Port: 80})

func filtering(f Filtering) option { return func(c *Config) { c.Filtering = f } }

func TestRFC4787REQ1EndpointIndependentMapping(t *testing.T) {
	for _, opts := range [][]option{nil, {ports80}} {
		w := newWorld(t, opts...)
		ext := map[uint16]bool{}
		for i := range uint32(3) {
			ext[w.one(w.out(udp(fromGuestTo(33333, hostB+i, 53+uint16(i)), "x")), portUplink).flow().sport] = true
		}
		assert.Len(t, ext, 1)
		assert.Equal(t, 1, w.m.Stats().Mappings)
	}
}

func TestRFC4787REQ3NoPortOverloading(t *testing.T) {
	w := newWorld(t, ports80, twoGuests)
	a := w.one(w.out(udp(fromGuestTo(50000, hostB, 53), "x")), portUplink).flow()
	b := w.one(w.out2(udp(flow5{guestIP2, hostB, 50000, 53}, "y")), portUplink).flow()
	assert.NotEqual(t, a.sport, b.sport)
	s := w.one(w.in(udp(b.back(), "z")), portGuest2)
	assert.Equal(t, flow5{hostB, guestIP2, 53, 50000}, s.flow())
	s = w.one(w.in(udp(a.back(), "z")), portGuest)
	assert.Equal(t, flow5{hostB, guestIP, 53, 50000}, s.flow())
}

func TestRFC4787REQ3aPortClass(t *testing.T) {
	w := newWorld(t)
	assert.EqualValues(t, 600, w.one(w.out(udp(fromGuestTo(600, hostB, 53), "x")), portUplink).flow().sport)
	w = newWorld(t, ports80)
	assert.Greater(t, w.one(w.out(udp(fromGuestTo(2000, hostB, 53), "x")), portUplink).flow().sport, uint16(1023))
}

func TestRFC4787REQ5Timer(t *testing.T) {
	w := newWorld(t, ports80)
	f := w.one(w.out(udp(fromGuestTo(2000, hostB, 53), "x")), portUplink).flow()
	for _, d := range []time.Duration{119 * time.Second, 180 * time.Second} {
		w.pass(d)
		w.m.Sweep(w.now)
	}
	require.Len(t, w.flows(), 1, "5c: alive at 299 s")
	w.pass(2 * time.Second)
	w.m.Sweep(w.now)
	require.Empty(t, w.flows())
	w.dropped(w.in(udp(f.back(), "late")), frame.NoFlow)
	w.pass(120 * time.Second)
	w.inToPod(udp(f.back(), "nobody remembers"))
	assert.Zero(t, w.m.Stats().Mappings)
	assert.Zero(t, w.m.Stats().Guests[0].Flows)
}

func TestRFC4787REQ6Refresh(t *testing.T) {
	for _, dir := range []string{"outbound", "inbound (6a)"} {
		t.Run(dir, func(t *testing.T) {
			w := newWorld(t, ports80)
			g := fromGuestTo(2000, hostB, 53)
			f := w.one(w.out(udp(g, "x")), portUplink).flow()
			for range 5 {
				w.pass(200 * time.Second)
				w.m.Sweep(w.now)
				if dir == "outbound" {
					w.one(w.out(udp(g, "x")), portUplink)
				} else {
					w.one(w.in(udp(f.back(), "x")), portGuest)
				}
			}
			require.Len(t, w.flows(), 1)
		})
	}
}

func TestRFC4787REQ7SameNetworkOutside(t *testing.T) {
	// A host outside with the guest's own address: packets from it are told
	// apart by the side that they come from.
	w := newWorld(t)
	s := w.one(w.in(udp(toPod(guestIP, 700, 9), "x")), portGuest)
	assert.Equal(t, flow5{guestIP, guestIP, 700, 9}, s.flow())
	w.dropped(w.out(udp(fromGuestTo(9, ip("10.0.2.77"), 700), "x")), frame.NoRoute)
}

func TestRFC4787REQ8Filtering(t *testing.T) {
	for _, tc := range []struct {
		f                    Filtering
		samePort, other, not bool
	}{
		{EndpointIndependent, true, true, true},
		{AddressDependent, true, true, false},
		{AddressPortDependent, true, false, false},
	} {
		t.Run(fmt.Sprint(tc.f), func(t *testing.T) {
			w := newWorld(t, ports80, filtering(tc.f))
			f := w.one(w.out(udp(fromGuestTo(2000, hostB, 53), "x")), portUplink).flow()
			check := func(from flow5, pass bool) {
				t.Helper()
				p := udp(from, "y")
				fs := w.in(p)
				switch {
				case pass:
					s := w.one(fs, portGuest)
					assert.Equal(t, flow5{from.src, guestIP, from.sport, 2000}, s.flow())
				case from.dport == f.sport:
					w.dropped(fs, frame.NoFlow)
				default:
					w.podsOwn(p, fs)
				}
			}
			check(toPod(hostB, 53, f.sport), tc.samePort)
			check(toPod(hostB, 54, f.sport), tc.other)
			check(toPod(hostA, 53, f.sport), tc.not)
			check(toPod(hostA, 53, f.sport^1), false)
			// Nothing of it stays when its time is over.
			w.pass(time.Hour)
			w.m.Sweep(w.now)
			check(toPod(hostB, 53, f.sport), false)
		})
	}
}

func TestRFC4787REQ9HairpinIsThePods(t *testing.T) {
	for _, opts := range [][]option{nil, {listed(Forward{Port: 80}), twoGuests}} {
		w := newWorld(t, opts...)
		for _, dport := range []uint16{80, 2222, 7777} {
			p := tcp(fromGuestTo(2000, podIP, dport), "S", 1, 0, "")
			fs := w.out(p)
			require.Len(t, fs, 1)
			require.Equal(t, portTap, fs[0].Out)
			assert.Equal(t, p.data, fs[0].Bytes(), "unchanged")
		}
		require.Empty(t, w.flows())
	}
}

func TestRFC4787REQ11Deterministic(t *testing.T) {
	w := newWorld(t, ports80, func(c *Config) {
		c.Limits = Limits{Flows: 2000, UDP: 2000, NewPerSecond: 1e6, NewBurst: 1e6}
	})
	first := w.one(w.out(udp(fromGuestTo(2000, hostB, 53), "x")), portUplink).flow()
	for i := range 100_000 {
		w.out(udp(fromGuestTo(2000, hostB+1+uint32(i%5000), 53), "x"))
	}
	for i := range uint32(20) {
		fs := w.out(udp(fromGuestTo(2000, hostB+1+i, 53), "x"))
		assert.Equal(t, first.sport, w.one(fs, portUplink).flow().sport, "the mapping does not change with load")
	}
	w.inToPod(udp(toPod(hostA, 9, first.sport^1), "x"))
}

func TestRFC4787REQ12ICMPRemovesNothing(t *testing.T) {
	w := newWorld(t, ports80)
	g := fromGuestTo(2000, hostB, 53)
	f := w.one(w.out(udp(g, "x")), portUplink).flow()
	for typ := range 19 {
		for _, code := range []uint8{0, 1, 2, 3, 4, 9, 10, 13} {
			w.in(icmpAbout(hostA, podIP, uint8(typ), code, udp(f, "x")))
		}
	}
	require.Len(t, w.flows(), 1)
	w.one(w.in(udp(f.back(), "x")), portGuest)
}

func TestRFC4787REQ13TooBigRow36(t *testing.T) {
	w := newWorld(t)
	w.router.hop.MTU = 1400
	p := udp(fromGuestTo(2000, hostB, 53), string(make([]byte, 1400)))
	fs := w.out(p)
	require.Len(t, fs, 2)
	assert.Equal(t, frame.FragNeeded, fs[0].Reason)
	require.Equal(t, portGuest, fs[1].Out)
	s := decode(t, fs[1])
	assert.Equal(t, flow5{src: gatewayIP, dst: guestIP}, s.flow())
	require.NotNil(t, s.icmp())
	assert.EqualValues(t, 3<<8|4, s.icmp().TypeCode)
	assert.EqualValues(t, 1400, s.icmp().Seq, "next-hop MTU")
	assert.Equal(t, p.data[14:14+28], s.data[42:42+28], "the packet as the guest sent it")
	// A packet of exactly the MTU passes.
	w.one(w.out(udp(fromGuestTo(2000, hostB, 53), string(make([]byte, 1400-28)))), portUplink)
}

func TestRFC4787REQ13aFragments(t *testing.T) {
	for _, inbound := range []bool{false, true} {
		for _, n := range []int{1373, 1400, 2800, 5000} {
			w := newWorld(t, func(c *Config) { c.Guests[0].MTU = 1400 })
			w.router.hop.MTU = 1400
			payload := pattern(n)
			var fs []*frame.Frame
			out := portUplink
			if inbound {
				out = portGuest
				fs = w.in(edit(udp(toPod(hostB, 53, 2000), payload), mayFragment))
			} else {
				fs = w.out(edit(udp(fromGuestTo(2000, hostB, 53), payload), mayFragment))
			}
			want := (n + 8 + 1375) / 1376
			require.Len(t, fs, want)
			var whole []byte
			for i, f := range fs {
				require.Equal(t, out, f.Out)
				require.LessOrEqual(t, int(f.Len), 1414)
				s := decode(t, f)
				assert.EqualValues(t, 77, s.ip.Id)
				assert.EqualValues(t, 63, s.ip.TTL)
				assert.EqualValues(t, len(whole)/8, s.ip.FragOffset, "in order")
				assert.Equal(t, i < len(fs)-1, s.ip.Flags&1 != 0)
				whole = append(whole, s.ip.Payload...)
			}
			require.Equal(t, payload, string(whole[8:]))
		}
	}
}

func TestRFC4787REQ14Fragments(t *testing.T) {
	for name, order := range map[string][]int{
		"in order": {0, 1, 2}, "reversed": {2, 1, 0}, "first last": {1, 2, 0}, "duplicate": {1, 1, 0, 2, 2},
		"first in the middle": {2, 0, 1},
	} {
		for _, inbound := range []bool{false, true} {
			t.Run(fmt.Sprint(name, inbound), func(t *testing.T) {
				w := newWorld(t, ports80)
				g := fromGuestTo(2000, hostB, 53)
				f := w.one(w.out(udp(g, "x")), portUplink).flow()
				whole := udp(g, pattern(4000))
				if inbound {
					whole = udp(f.back(), pattern(4000))
				}
				parts := fragments(whole, 1480)
				require.Len(t, parts, 3)
				offsets := map[uint16]bool{}
				for _, i := range order {
					fs := w.out(parts[i])
					out, src, dst := portUplink, podIP, hostB
					if inbound {
						fs = w.in(parts[i])
						out, src, dst = portGuest, hostB, guestIP
					}
					for _, f := range fs {
						if f.Out == frame.Consumed {
							continue
						}
						require.Equal(t, out, f.Out, f.Reason.String())
						s := decode(t, f)
						assert.Equal(t, flow5{src: src, dst: dst}, flow5{src: s.flow().src, dst: s.flow().dst})
						want := parts[s.ip.FragOffset*8/1480].data[34:]
						if s.ip.FragOffset == 0 {
							want = want[8:]
							assert.Equal(t, want, s.ip.Payload[8:])
						} else {
							assert.Equal(t, want, []byte(s.ip.Payload))
						}
						offsets[s.ip.FragOffset] = true
					}
				}
				assert.Len(t, offsets, 3, "all fragments came through")
				assert.Zero(t, w.m.Stats().Fragments.Waiting)
			})
		}
	}
}

// The rest of a packet goes where its first fragment went, to the pod too.
func TestRFC4787REQ14FragmentsForThePod(t *testing.T) {
	for name, order := range map[string][]int{"in order": {0, 1, 2}, "reversed": {2, 1, 0}} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, ports80)
			parts := fragments(udp(toPod(hostA, 9, 45000), pattern(4000)), 1480)
			var got []string
			for _, i := range order {
				for _, f := range w.in(parts[i]) {
					if f.Out == frame.Consumed {
						continue
					}
					require.Equal(t, portTap, f.Out, f.Reason.String())
					got = append(got, string(f.Bytes()[6:]))
				}
			}
			var want []string
			for _, p := range parts {
				want = append(want, string(p.data[6:]))
			}
			assert.ElementsMatch(t, want, got)
			assert.Zero(t, w.m.Stats().Fragments.Waiting)

		})
	}
	w := newWorld(t, ports80, noTap)
	parts := fragments(udp(toPod(hostA, 9, 45000), pattern(2000)), 1480)
	w.in(parts[1])
	require.Positive(t, w.m.Stats().Fragments.Waiting)
	w.dropped(w.in(parts[0]), frame.NoFlow)
	assert.Zero(t, w.m.Stats().Fragments.Waiting, "nothing waits for a first one that was refused")
}

func TestRFC4787REQ14MissingFirst(t *testing.T) {
	w := newWorld(t)
	parts := fragments(udp(fromGuestTo(2000, hostB, 53), pattern(4000)), 1480)
	fs := w.out(parts[1])
	require.Equal(t, frame.Consumed, fs[0].Out)
	assert.Positive(t, w.m.Stats().Fragments.Waiting)
	next := w.m.Sweep(w.now)
	assert.Equal(t, 30*time.Second, next)
	w.pass(31 * time.Second)
	assert.Zero(t, w.m.Sweep(w.now))
	s := w.m.Stats().Fragments
	assert.Equal(t, FragmentStats{Held: 1, Expired: 1}, s)
	w.one(w.out(parts[0]), portUplink) // and nothing more
}

func TestRFC4787REQ14aFragmentFlood(t *testing.T) {
	for _, inbound := range []bool{false, true} {
		w := newWorld(t)
		send, out := w.out, portUplink
		whole := udp(fromGuestTo(2000, hostB, 53), pattern(4000))
		if inbound {
			send, out = w.in, portGuest
			whole = udp(toPod(hostB, 53, 2000), pattern(4000))
		}
		piece := fragments(whole, 1480)[1]
		for i := range 100_000 { // H083: 10^5 ids, from everywhere
			send(edit(piece, func(ip []byte) {
				ip[4], ip[5] = byte(i>>8), byte(i)
				if inbound {
					ip[13], ip[14] = byte(i>>8), byte(i)
				} else {
					ip[17], ip[18] = byte(i>>8), byte(i)
				}
			}))
		}
		s := w.m.Stats().Fragments
		assert.LessOrEqual(t, s.Waiting, 256<<10)
		assert.Positive(t, s.Dropped)
		for _, p := range fragments(edit(whole, func(ip []byte) { ip[4], ip[5] = 0xff, 0xff }), 1480) {
			w.one(send(p), out)
		}
		if inbound {
			w.one(send(udp(toPod(hostB, 53, 2000), "x")), out)
		} else {
			w.one(send(udp(fromGuestTo(2000, hostB, 53), "x")), out)
		}
	}
}

// mayFragment clears DF.
func mayFragment(ip []byte) { ip[6] &^= 0x40 }

// pattern is n bytes that differ from their neighbours.
func pattern(n int) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8)
	}
	return string(b)
}

// fragments cuts an IP packet into pieces of n bytes of payload.
func fragments(p packet, n int) (ps []packet) {
	body := p.data[34:]
	for at := 0; at < len(body); at += n {
		end := min(at+n, len(body))
		d := append(append([]byte(nil), p.data[:34]...), body[at:end]...)
		ps = append(ps, edit(packet{data: d}, func(ip []byte) {
			ip[2], ip[3] = byte(len(ip)>>8), byte(len(ip))
			v := at / 8
			if end < len(body) {
				v |= frame.MoreFragments
			}
			ip[6], ip[7] = byte(v>>8), byte(v)
		}))
	}
	return ps
}
