package nat

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

// icmpAbout is an ICMP error about a packet, of which it holds 28 bytes more
// than the IP header where there are as many.
func icmpAbout(src, dst uint32, typ, code uint8, about packet) packet {
	q := about.data[frame.EthernetLen:]
	n := int(q[0]&15)*4 + 28
	return icmpQuoting(src, dst, typ, code, q[:min(n, len(q))])
}

func icmpQuoting(src, dst uint32, typ, code uint8, quote []byte) packet {
	return build(eth(src), ip4(src, dst, layers.IPProtocolICMPv4),
		&layers.ICMPv4{TypeCode: layers.CreateICMPv4TypeCode(typ, code), Seq: 1300}, gopacket.Payload(quote))
}

// quoted decodes the packet inside an ICMP error and checks its checksums.
func quoted(t *testing.T, s seen) (h *layers.IPv4, ports [2]uint16) {
	t.Helper()
	require.NotNil(t, s.icmp())
	q := s.icmp().Payload
	n := int(q[0]&15) * 4
	require.Equal(t, slowSum(q[:n], 10, 0), binary.BigEndian.Uint16(q[10:]), "embedded IP checksum (REQ-4a)")
	h = &layers.IPv4{}
	_ = h.DecodeFromBytes(q, gopacket.NilDecodeFeedback)
	return h, [2]uint16{binary.BigEndian.Uint16(q[n:]), binary.BigEndian.Uint16(q[n+2:])}
}

func TestRFC5508REQ1aQueryIDMapping(t *testing.T) {
	w := newWorld(t, ports80)
	ids := map[uint16]bool{}
	for i := range uint32(3) {
		ids[w.one(w.out(echo(guestIP, hostB+i, 7, 1)), portUplink).icmp().Id] = true
	}
	assert.Len(t, ids, 1)
	w = newWorld(t, ports80, twoGuests)
	a := w.one(w.out(echo(guestIP, hostB, 7, 1)), portUplink).icmp().Id
	b := w.one(w.out2(echo(guestIP2, hostB, 7, 1)), portUplink).icmp().Id
	require.NotEqual(t, a, b)
	s := w.one(w.in(echoReply(hostB, podIP, b, 1)), portGuest2)
	assert.EqualValues(t, 7, s.icmp().Id)
}

func TestRFC5508REQ2Timer(t *testing.T) {
	w := newWorld(t, ports80)
	id := w.one(w.out(echo(guestIP, hostB, 7, 1)), portUplink).icmp().Id
	w.pass(59 * time.Second)
	w.m.Sweep(w.now)
	require.Len(t, w.flows(), 1)
	w.pass(2 * time.Second)
	w.m.Sweep(w.now)
	w.dropped(w.in(echoReply(hostB, podIP, id, 1)), frame.NoFlow)
}

func TestRFC5508REQ3Malformed(t *testing.T) {
	w := newWorld(t, ports80)
	sent := w.one(w.out(udp(fromGuestTo(2000, hostB, 53), "0123456789abcdef")), portUplink)
	about := packet{data: sent.data}
	good := icmpAbout(hostA, podIP, 3, 3, about)
	w.one(w.in(good), portGuest)

	bad := packet{data: append([]byte(nil), good.data...)}
	bad.data[len(bad.data)-1] ^= 1
	w.dropped(w.in(bad), frame.BadChecksum) // REQ-3

	q := append([]byte(nil), about.data[14:]...)
	q[10] ^= 1
	w.dropped(w.in(icmpQuoting(hostA, podIP, 3, 3, q)), frame.BadChecksum) // 3a

	q = append([]byte(nil), about.data[14:]...) // 3b: options are stepped over
	q = append(q[:20:20], append([]byte{7, 7, 4, 0, 0, 0, 0, 0}, q[20:]...)...)
	q = edit(packet{data: append(make([]byte, 14), q...)}, func(ip []byte) {
		ip[0] = 0x47
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)))
	}).data[14:]
	h, ports := quoted(t, w.one(w.in(icmpQuoting(hostA, podIP, 3, 3, q)), portGuest))
	assert.Equal(t, guestIP, binary.BigEndian.Uint32(h.SrcIP.To4()))
	assert.Equal(t, [2]uint16{2000, 53}, ports)

	q = append([]byte(nil), about.data[14:]...) // 3c: the transport checksum is not looked at
	q[26] ^= 0x55
	w.one(w.in(icmpQuoting(hostA, podIP, 3, 3, q)), portGuest)

	q = append(append([]byte(nil), about.data[14:]...), make([]byte, 100)...) // 3d: padding, extensions
	w.one(w.in(icmpQuoting(hostA, podIP, 11, 0, append(q, 0x20, 0, 0xdf, 0xff))), portGuest)

	for n := range 28 { // H085: cut
		fs := w.in(icmpQuoting(hostA, podIP, 3, 3, about.data[14:14+n]))
		require.Equal(t, frame.Drop, fs[0].Out, "%d bytes", n)
	}
}

func TestRFC5508REQ4ErrorFromOutside(t *testing.T) {
	for _, typ := range []uint8{3, 11, 12} {
		for name, opts := range map[string][]option{"own port": nil, "other port": {ports80}} {
			w := newWorld(t, opts...)
			for _, p := range []packet{udp(fromGuestTo(2000, hostB, 53), "x"), tcp(fromGuestTo(2000, hostB, 80), "S", 1, 0, "")} {
				sent := w.one(w.out(p), portUplink)
				s := w.one(w.in(icmpAbout(hostA, podIP, typ, 1, packet{data: sent.data})), portGuest)
				assert.Equal(t, flow5{src: hostA, dst: guestIP}, flow5{src: s.flow().src, dst: s.flow().dst}, "4c, 4787 REQ-12a")
				assert.Equal(t, typ, s.icmp().TypeCode.Type(), "4b")
				assert.EqualValues(t, 1, s.icmp().TypeCode.Code(), "4b")
				assert.EqualValues(t, 1300, s.icmp().Seq, "next-hop MTU is kept")
				h, ports := quoted(t, s)
				assert.Equal(t, guestIP, binary.BigEndian.Uint32(h.SrcIP.To4()), "4a %s", name)
				assert.EqualValues(t, 2000, ports[0], "4a")
				// The transport checksum of what is quoted whole is right again.
				if q := s.icmp().Payload; q[9] == 17 {
					data := append(append(make([]byte, 12), 8, 0), q...)
					verify(t, &frame.Frame{}, data)
				}
			}
		}
	}
	w := newWorld(t)
	w.dropped(w.in(icmpAbout(hostA, podIP, 3, 1, udp(flow5{podIP, hostB, 2000, 53}, "x"))), frame.NoFlow)
	w.dropped(w.in(icmpAbout(hostA, podIP, 3, 1, udp(fromGuestTo(2000, hostB, 53), "x"))), frame.NoFlow)
}

func TestRFC5508REQ5ErrorFromInside(t *testing.T) {
	w := newWorld(t, listed(Forward{Proto: 17, Port: 90, GuestPort: 91}))
	s := w.one(w.in(udp(toPod(hostA, 5, 90), "hello")), portGuest)
	about := packet{data: s.data}
	s = w.one(w.out(icmpAbout(guestIP, hostA, 3, 3, about)), portUplink)
	assert.Equal(t, podIP, s.flow().src, "5c")
	assert.Equal(t, hostA, s.flow().dst)
	assert.EqualValues(t, 3<<8|3, s.icmp().TypeCode, "5b")
	h, ports := quoted(t, s)
	assert.Equal(t, podIP, binary.BigEndian.Uint32(h.DstIP.To4()), "5a")
	assert.Equal(t, [2]uint16{5, 90}, ports, "5a")

	w.dropped(w.out(icmpAbout(guestIP, hostA, 3, 3, udp(flow5{hostA, guestIP, 6, 91}, "x"))), frame.NoFlow)
	w.dropped(w.out(icmpAbout(guestIP, hostB, 3, 3, about)), frame.NoFlow)
}

func TestRFC5508ErrorAboutQuery(t *testing.T) {
	w := newWorld(t)
	sent := w.one(w.out(echo(guestIP, hostB, 7, 1)), portUplink)
	s := w.one(w.in(icmpAbout(hostA, podIP, 11, 0, packet{data: sent.data})), portGuest)
	q := s.icmp().Payload
	assert.EqualValues(t, 7, binary.BigEndian.Uint16(q[24:]))
	assert.Equal(t, slowSum(q[20:], 2, 0), binary.BigEndian.Uint16(q[22:]))
	// From inside, about the outside's query.
	got := w.one(w.in(echo(hostA, podIP, 8, 1)), portGuest)
	w.one(w.out(icmpAbout(guestIP, hostA, 3, 2, packet{data: got.data})), portUplink)
}

func TestRFC5508REQ6ErrorsRefreshNothing(t *testing.T) {
	w := newWorld(t, ports80)
	sent := w.one(w.out(echo(guestIP, hostB, 7, 1)), portUplink)
	w.pass(50 * time.Second)
	w.one(w.in(icmpAbout(hostA, podIP, 3, 1, packet{data: sent.data})), portGuest)
	require.Len(t, w.flows(), 1, "nor delete")
	w.pass(11 * time.Second)
	w.m.Sweep(w.now)
	require.Empty(t, w.flows())
}

func TestRFC5508REQ10TimeExceeded(t *testing.T) {
	w := newWorld(t)
	p := edit(udp(fromGuestTo(2000, hostB, 33434), "x"), func(ip []byte) { ip[8], ip[1] = 1, 0xb9 })
	fs := w.out(p)
	require.Len(t, fs, 2)
	assert.Equal(t, frame.TTLExpired, fs[0].Reason)
	require.Equal(t, portGuest, fs[1].Out)
	s := decode(t, fs[1])
	assert.Equal(t, gatewayIP, s.flow().src)
	assert.Equal(t, guestIP, s.flow().dst)
	assert.EqualValues(t, 11<<8, s.icmp().TypeCode)
	assert.EqualValues(t, 0xb8, s.ip.TOS, "10d")
	assert.Equal(t, p.data[14:], []byte(s.icmp().Payload))
	require.Empty(t, w.flows(), "a packet that dies here opens nothing")

	// Towards the outside, for what was meant for the guest.
	fs = w.in(edit(udp(toPod(hostA, 4, 5), "x"), func(ip []byte) { ip[8] = 1 }))
	require.Len(t, fs, 2)
	require.Equal(t, portUplink, fs[1].Out)
	s = decode(t, fs[1])
	assert.Equal(t, podIP, s.flow().src)
	assert.Equal(t, hostA, s.flow().dst)
	src, dst := s.macs()
	assert.Equal(t, [2]frame.MAC{podMAC, routerMAC}, [2]frame.MAC{src, dst})

	w.dropped(w.out(edit(p, func(ip []byte) { ip[8] = 0 })), frame.TTLExpired)
}

func TestRFC5508REQ10eNoErrorAbout(t *testing.T) {
	dying := func(ip []byte) { ip[8] = 1 }
	parts := fragments(udp(fromGuestTo(2000, hostB, 53), pattern(4000)), 1480)
	for name, p := range map[string]packet{
		"multicast":       edit(udp(fromGuestTo(1, ip("224.0.0.251"), 5353), "x"), dying),
		"broadcast":       edit(udp(fromGuestTo(1, ip("255.255.255.255"), 9), "x"), dying),
		"later fragment":  edit(parts[1], dying),
		"an ICMP error":   edit(icmpAbout(guestIP, hostB, 3, 3, udp(flow5{hostB, guestIP, 1, 2}, "x")), dying),
		"another ICMP":    edit(icmp(guestIP, hostB, 5, 0, 0, 0, ""), dying),
		"an ICMP of 2050": edit(icmp(guestIP, hostB, 200, 0, 0, 0, ""), dying),
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.dropped(w.out(p), frame.TTLExpired)
		})
	}
}

func TestRFC5508REQ10fRateLimit(t *testing.T) {
	w := newWorld(t)
	p := edit(udp(fromGuestTo(2000, hostB, 33434), "x"), func(ip []byte) { ip[8] = 1 })
	n := 0
	for range 200 {
		n += len(w.out(p)) - 1
	}
	assert.Equal(t, 50, n)
	assert.EqualValues(t, 150, w.m.Stats().ICMPLimited)
	w.pass(100 * time.Millisecond)
	n = 0
	for range 200 {
		n += len(w.out(p)) - 1
	}
	assert.Equal(t, 10, n)
}

// Each kind of complaint is limited, towards the guest and towards the outside
// apart, so that nobody can use the engine to flood another.
func TestComplaintsAreLimited(t *testing.T) {
	big := string(make([]byte, 1600))
	for name, c := range map[string]struct {
		opts []option
		in   bool
		p    packet
	}{
		"time exceeded":             {nil, false, edit(udp(fromGuestTo(2000, hostB, 9), "x"), func(ip []byte) { ip[8] = 1 })},
		"too big":                   {nil, false, udp(fromGuestTo(2000, hostB, 9), big)},
		"policy":                    {[]option{func(c *Config) { c.Deny = []Prefix{{hostB, 32}} }}, false, udp(fromGuestTo(2000, hostB, 9), "x")},
		"no route":                  {[]option{func(c *Config) { c.Router.(*oneHop).none[hostB] = true }}, false, udp(fromGuestTo(2000, hostB, 9), "x")},
		"time exceeded from inside": {nil, true, edit(udp(toPod(hostA, 4, 5), "x"), func(ip []byte) { ip[8] = 1 })},
		"too big from inside":       {nil, true, udp(toPod(hostA, 4, 5), big)},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, append(c.opts, limits(Limits{ErrorsPerSecond: 10, ErrorBurst: 4}))...)
			send, other := w.out, w.in
			op := edit(udp(toPod(hostA, 6, 7), "x"), func(ip []byte) { ip[8] = 1 })
			if c.in {
				send, other = w.in, w.out
				op = edit(udp(fromGuestTo(6, hostA, 7), "x"), func(ip []byte) { ip[8] = 1 })
			}
			complaints := func() (n int) {
				for range 100 {
					n += len(send(c.p)) - 1
				}
				return n
			}
			assert.Equal(t, 4, complaints())
			assert.EqualValues(t, 96, w.m.Stats().ICMPLimited)
			assert.Len(t, other(op), 2, "the other side has a limit of its own")
			w.pass(200 * time.Millisecond)
			assert.Equal(t, 2, complaints())
		})
	}
}

// Hairpinning is the pod's kernel's, and so are errors about what it sent.
func TestRFC5508REQ7HairpinnedErrors(t *testing.T) {
	w := newWorld(t, ports80)
	for _, dst := range []uint32{podIP, gatewayIP} {
		p := icmpAbout(guestIP, dst, 3, 3, udp(flow5{dst, guestIP, 7777, 2000}, "x"))
		fs := w.out(p)
		require.Len(t, fs, 1)
		require.Equal(t, portTap, fs[0].Out)
		assert.Equal(t, p.data, fs[0].Bytes())
	}
}

func TestRFC5508REQ10cREQ11OtherTypes(t *testing.T) {
	w := newWorld(t)
	for _, typ := range []uint8{4, 5, 9, 10, 15, 16, 17, 18, 30, 255} {
		w.dropped(w.out(icmp(guestIP, hostB, typ, 0, 7, 0, "12345678901234567890123456789")), frame.NotCarried)
		w.dropped(w.in(icmp(hostB, podIP, typ, 0, 7, 0, "12345678901234567890123456789")), frame.NotCarried)
	}
	// Timestamps are carried (10b).
	s := w.one(w.out(icmp(guestIP, hostB, 13, 0, 7, 0, "123456789012")), portUplink)
	s = w.one(w.in(icmp(hostB, podIP, 14, 0, s.icmp().Id, 0, "123456789012")), portGuest)
	assert.EqualValues(t, 7, s.icmp().Id)
}
