package nat

import (
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

func TestOutboundAndBack(t *testing.T) {
	for _, tc := range []struct {
		name  string
		opts  []option
		guest uint16
		ext   uint16 // 0: any of the range
	}{
		{"all ports, own port kept", nil, 5000, 5000},
		{"all ports, own port in the range", nil, 50000, 50000},
		{"all ports, own port is the kernel's", nil, 33000, 0},
		{"all ports, own port is bound", []option{func(c *Config) {
			c.PortFree = func(_ uint8, port uint16) bool { return port != 5000 }
		}}, 5000, 0},
		{"listed, own port in the range", []option{listed(Forward{Port: 80})}, 50000, 50000},
		{"listed, own port outside the range", []option{listed(Forward{Port: 80})}, 5000, 0},
		{"listed, own port published", []option{listed(Forward{Port: 80}, Forward{Port: 80, Proto: 17})}, 80, 80},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, proto := range []string{"udp", "tcp"} {
				w := newWorld(t, tc.opts...)
				f := fromGuestTo(tc.guest, hostB, 9000)
				p, reply := udp(f, "hello"), func(f flow5) packet { return udp(f, "world") }
				if proto == "tcp" {
					p, reply = tcp(f, "S", 100, 0, ""), func(f flow5) packet { return tcp(f, "SA", 700, 101, "") }
				}
				s := w.one(w.out(p), portUplink)
				got := s.flow()
				src, dst := s.macs()
				assert.Equal(t, podMAC, src)
				assert.Equal(t, routerMAC, dst)
				assert.Equal(t, flow5{podIP, hostB, got.sport, 9000}, got)
				assert.EqualValues(t, 63, s.ip.TTL)
				if tc.ext != 0 {
					assert.Equal(t, tc.ext, got.sport)
				} else {
					assert.GreaterOrEqual(t, got.sport, uint16(40000))
				}
				w.pass(time.Second)
				w.queue = 0
				s = w.one(w.in(reply(got.back())), portGuest)
				assert.Equal(t, f.back(), s.flow())
				src, dst = s.macs()
				assert.Equal(t, GatewayMAC, src)
				assert.Equal(t, guestMAC, dst)
				assert.EqualValues(t, 63, s.ip.TTL)
				require.Len(t, w.flows(), 1)
			}
		})
	}
}

func TestForwardKeepsClientRow54Row56(t *testing.T) {
	w := newWorld(t, listed(Forward{Port: 80}, Forward{Port: 8080, GuestPort: 81}))
	f := toPod(hostA, 1234, 80)
	s := w.one(w.in(tcp(f, "S", 1, 0, "")), portGuest)
	assert.Equal(t, flow5{hostA, guestIP, 1234, 80}, s.flow())
	s = w.one(w.out(tcp(flow5{guestIP, hostA, 80, 1234}, "SA", 9, 2, "")), portUplink)
	assert.Equal(t, f.back(), s.flow())

	s = w.one(w.in(tcp(toPod(hostA, 1234, 8080), "S", 1, 0, "")), portGuest)
	assert.Equal(t, flow5{hostA, guestIP, 1234, 81}, s.flow())
	s = w.one(w.out(tcp(flow5{guestIP, hostA, 81, 1234}, "SA", 9, 2, "")), portUplink)
	assert.Equal(t, flow5{podIP, hostA, 8080, 1234}, s.flow())

	w.inToPod(tcp(toPod(hostA, 1234, 81), "S", 1, 0, ""))
	w.inToPod(udp(toPod(hostA, 1234, 80), "x"))
	w.dropped(w.in(echo(hostA, podIP, 7, 1)), frame.NoFlow)
}

func TestEchoBothWays(t *testing.T) {
	w := newWorld(t)
	s := w.one(w.out(echo(guestIP, hostB, 0, 1)), portUplink)
	id := s.icmp().Id
	s = w.one(w.in(echoReply(hostB, podIP, id, 1)), portGuest)
	assert.Equal(t, uint16(0), s.icmp().Id)
	s = w.one(w.in(echo(hostA, podIP, 99, 1)), portGuest)
	assert.Equal(t, uint16(99), s.icmp().Id)
	s = w.one(w.out(echoReply(guestIP, hostA, 99, 1)), portUplink)
	assert.Equal(t, uint16(99), s.icmp().Id)
	w.dropped(w.out(echoReply(guestIP, hostA, 98, 1)), frame.NoFlow)
	w.dropped(w.in(echoReply(hostA, podIP, 98, 1)), frame.NoFlow)
}
