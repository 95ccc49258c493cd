package usernet

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// onlyService lets the guest reach nothing but one socket of the test's, so that
// what a fuzzer makes up troubles nobody.
func onlyService(t testing.TB) (option, *net.UDPConn) {
	host, at := hostUDP(t)
	return func(c *Config) {
		service("10.0.2.3:53", at.String())(c)
		c.Loopback, c.MaxFlows, c.MaxSockets, c.Workers = false, 64, 16, 2
		c.Policy = Policy{Deny: true, Rules: []Rule{{Allow: true, Prefix: netip.MustParsePrefix("10.0.2.3/32")}}}
	}, host
}

// script is a fuzzer's input, read from its start.
type script struct{ b []byte }

func (s *script) byte() (v byte) {
	if len(s.b) > 0 {
		v, s.b = s.b[0], s.b[1:]
	}
	return v
}

func (s *script) u16() uint16 { return uint16(s.byte())<<8 | uint16(s.byte()) }

func (s *script) bytes(n int) []byte {
	n = min(n, len(s.b))
	b := s.b[:n:n]
	s.b = s.b[n:]
	return b
}

// guestSays plays a script of a guest's frames of one protocol: packets whose
// IPv4 header is right but for what the script changes, with any payload and
// any offload, time that passes, and answers of the host's.
func guestSays(t *testing.T, proto uint8, data []byte) {
	opt, _ := onlyService(t)
	w := newWorld(t, opt)
	s := script{data}
	var ss []sent
	flush := func() {
		w.sendAll(ss...)
		ss = ss[:0]
	}
	for len(s.b) > 0 && len(ss) < frame.BatchSize {
		op := s.byte()
		switch op & 7 {
		case 6:
			flush()
			w.worker ^= 1
			w.pass(time.Duration(s.byte()) * time.Second)
			w.pull(0)
			w.pull(1)
			continue
		case 7:
			flush()
			continue
		}
		ip := enginetest.IP{Src: guestIP, Dst: dnsIP, ID: uint16(op), TTL: 64}
		if op&8 != 0 {
			ip.Dst = gatewayIP
		}
		if op&16 != 0 {
			ip.Frag = s.u16()
		}
		if op&32 != 0 {
			ip.Options = make([]byte, 4*int(s.byte()%11))
		}
		if op&64 != 0 {
			ip.TTL, ip.TOS = s.byte(), s.byte()
		}
		payload := s.bytes(int(s.u16() % 2000))
		if op&128 != 0 && len(payload) >= 8 { // a sum that is right, or left out
			switch proto {
			case frame.ProtoUDP:
				payload = append([]byte(nil), payload...)
				payload[6], payload[7] = 0, 0
			case frame.ProtoICMP:
				payload = enginetest.ICMP{Type: payload[0], Code: payload[1], Rest: binary.BigEndian.Uint32(payload[4:])}.Message(ip, payload[8:])
			}
		}
		f := sent{data: toRouter.Frame(frame.TypeIPv4, ip.Packet(proto, payload))}
		if op&7 > 2 {
			f.off = offloadOf(&s, f.data)
		}
		f.cut = []int{int(op & 3), int(op)}
		ss = append(ss, f)
	}
	flush()
	for range 2 {
		w.pass(time.Hour)
		w.pull(0)
		w.pull(1)
	}
	for _, k := range w.net.workers {
		require.Zero(t, k.table.count)
		require.Zero(t, k.udp.peers)
		require.Empty(t, k.frags.spent)
	}
	require.Zero(t, w.net.Stats().Sockets)
	require.Zero(t, w.net.frags.waiting)
	require.Len(t, w.net.frags.unused, w.net.frags.made)
}

// offloadOf is an offload that a port would let pass with these bytes, if the
// script's is one.
func offloadOf(s *script, b []byte) frame.Offload {
	f := new(frame.Frame)
	f.SetBytes(b, nil, make([][]byte, 1))
	f.Flags, f.GSO, f.GSOSize = s.byte()&frame.NeedsCsum, s.byte(), s.u16()
	f.CsumStart, f.CsumOffset = s.u16()%160, s.u16()%20
	if !f.CheckOffload() {
		return frame.Offload{}
	}
	return f.Offload
}

// step is one packet of a script for guestSays.
func step(op byte, payload []byte, extra ...byte) []byte {
	b := append([]byte{op}, extra...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(payload)))
	return append(b, payload...)
}

func udpBytes(sport, dport, length uint16, n int) []byte {
	b := binary.BigEndian.AppendUint16(nil, sport)
	b = binary.BigEndian.AppendUint16(b, dport)
	b = binary.BigEndian.AppendUint16(b, length)
	return append(append(b, 0, 0), make([]byte, n)...)
}

func FuzzGuestUDP(f *testing.F) {
	ok := udpBytes(1000, 53, 12, 4)
	f.Add(step(0x80, ok))
	f.Add(step(0x80, udpBytes(1000, 53, 8, 0)))
	f.Add(append(step(0x80, udpBytes(0, 53, 12, 4)), step(0x80, udpBytes(9, 0, 12, 4))...))
	f.Add(step(0x80, udpBytes(1000, 53, 7, 4)))     // H087
	f.Add(step(0x80, udpBytes(1000, 53, 65535, 4))) // H087
	f.Add(step(0x80, ok[:7]))
	f.Add(step(0x88, ok))                                               // the gateway, which is not to be reached
	f.Add(step(0xa0, ok, 10))                                           // 40 bytes of options
	f.Add(step(0xc0, ok, 0, 0xff))                                      // TTL 0
	f.Add(step(0xc0, ok, 1, 0xff))                                      // TTL 1
	f.Add(step(0x90, ok, 0x20, 0))                                      // first fragment
	f.Add(step(0x90, ok, 0x1f, 0xff))                                   // H083 beyond 64 KiB
	f.Add(step(0x90, ok, 0x3f, 0xff))                                   // H083
	f.Add(step(0x90, ok[:4], 0x20, 0))                                  // tiny first fragment
	f.Add(append(step(0x90, ok, 0x20, 0), step(0x90, ok[:8], 0, 1)...)) // overlapping
	f.Add(append(step(0x84, udpBytes(7, 53, 108, 100)), 1, frame.GSOUDPL4, 0, 10, 0, 34, 0, 6))
	f.Add(append(step(0x84, udpBytes(7, 53, 8, 1000)), 1, frame.GSOUDPL4, 0, 1, 0, 34, 0, 6))
	f.Add(append(step(0x84, udpBytes(7, 53, 108, 100)), 1, 0, 0, 0, 0, 50, 0, 2))
	var many []byte
	for i := range uint16(40) {
		many = append(many, step(0x80, udpBytes(i, 53, 12, 4))...)
	}
	f.Add(append(many, 6, 200, 7, 6, 255))
	f.Fuzz(func(t *testing.T, data []byte) { guestSays(t, frame.ProtoUDP, data) })
}

func FuzzGuestICMP(f *testing.F) {
	echo := []byte{8, 0, 0, 0, 0, 1, 0, 1, 'x'}
	f.Add(step(0x80, echo))
	f.Add(step(0x88, echo))
	f.Add(step(0x88, []byte{8, 0, 0, 0, 0, 0, 0, 0})) // whose answer is all zeros
	f.Add(step(0x80, echo[:8]))
	f.Add(step(0x80, echo[:7]))
	f.Add(step(0x80, []byte{8, 1, 0, 0, 0, 1, 0, 1, 'x'}))
	f.Add(step(0x80, []byte{0, 0, 0, 0, 0, 1, 0, 1, 'x'}))
	in := quoteUDPToGuest(netip.AddrPortFrom(dnsIP, 53), 1000)
	for _, n := range []int{0, 1, 19, 20, 27, 28, len(in)} {
		for _, typ := range []byte{3, 4, 5, 11, 12} {
			f.Add(step(0x80, append([]byte{typ, 4, 0, 0, 0, 0, 0, 68}, in[:n]...)))
		}
	}
	tcp := enginetest.IP{Src: dnsIP, Dst: guestIP}
	seg := tcp.Packet(frame.ProtoTCP, enginetest.TCP{Src: 53, Dst: 1000}.Segment(tcp, nil))
	f.Add(step(0x80, append([]byte{3, 4, 0, 0, 0, 0, 0, 0}, seg...)))
	ihl := append([]byte(nil), in...)
	ihl[0] = 0x4f
	f.Add(step(0x80, append([]byte{3, 3, 0, 0, 0, 0, 0, 0}, ihl...)))
	f.Add(step(0xa0, append([]byte{3, 3, 0, 0, 0, 0, 0, 0}, ihl...), 10))
	f.Add(step(0x90, echo[:8], 0x20, 0))
	f.Add(append(step(0x98, echo[:8], 0x20, 0), step(0x98, make([]byte, 1500), 0, 1)...))
	f.Add(append(step(0x83, echo), 1, 0, 0, 0, 0, 34, 0, 2))
	f.Fuzz(func(t *testing.T, data []byte) { guestSays(t, frame.ProtoICMP, data) })
}

// FuzzFragments sends fragments whose bytes tell their place. Whatever becomes
// whole is then the beginning of one and the same datagram.
func FuzzFragments(f *testing.F) {
	piece := func(id, off byte, n uint16, more byte) []byte {
		return []byte{id, off, byte(n >> 8), byte(n), more}
	}
	join := func(ps ...[]byte) (b []byte) {
		for _, p := range ps {
			b = append(b, p...)
		}
		return b
	}
	f.Add(join(piece(1, 0, 800, 1), piece(1, 100, 800, 1), piece(1, 200, 100, 0)))
	f.Add(join(piece(1, 200, 100, 0), piece(1, 100, 800, 1), piece(1, 0, 800, 1)))
	f.Add(join(piece(1, 0, 800, 1), piece(1, 99, 808, 0)))                                          // H083 overlap by 8
	f.Add(join(piece(1, 0, 800, 1), piece(1, 0, 400, 1), piece(1, 100, 8, 0)))                      // H083 inside
	f.Add(join(piece(1, 0, 801, 1), piece(1, 100, 8, 0)))                                           // no multiple of 8
	f.Add(join(piece(1, 100, 8, 0), piece(1, 200, 8, 0), piece(1, 0, 800, 1)))                      // two ends
	f.Add(join(piece(1, 200, 8, 1), piece(1, 100, 8, 0), piece(1, 0, 800, 1)))                      // beyond the end
	f.Add(join(piece(1, 0, 8, 1), piece(1, 1, 0, 0)))                                               // an empty last one
	f.Add(join(piece(1, 0, 800, 1), piece(1, 0, 800, 1), piece(1, 100, 8, 0), piece(1, 100, 8, 0))) // twice
	f.Add(join(piece(1, 0, 16, 1), piece(2, 2, 8, 0), piece(2, 0, 16, 1), piece(1, 2, 8, 0)))
	f.Add(join(piece(1, 0, 16, 3), piece(1, 1, 8, 1), piece(1, 3, 8, 0))) // H083 overlap for a hole
	f.Add(join(piece(1, 0, 8, 3), piece(1, 2, 8, 0), piece(1, 3, 8, 1)))  // H083 beyond the end for a hole
	f.Add(join(piece(1, 0, 8, 3), piece(1, 3, 8, 1), piece(1, 2, 8, 0)))
	var flood []byte
	for i := range byte(250) {
		flood = append(flood, piece(i, i, 8, 1)...)
	}
	f.Add(flood)
	f.Fuzz(func(t *testing.T, data []byte) {
		opt, host := onlyService(t)
		w := newWorld(t, opt)
		body := append(udpBytes(1000, 53, 0, 0), enginetest.Payload(1<<16, 3)...)
		s := script{data}
		for len(s.b) >= 5 {
			id, off, n, more := s.byte(), int(s.byte())*8, int(s.u16()%1481), s.byte()
			if off == 0 && n < 8 {
				n = 8
			}
			ip := enginetest.IP{Src: guestIP, Dst: dnsIP, ID: uint16(id), Frag: uint16(off / 8)}
			if more&1 != 0 {
				ip.Frag |= frame.MoreFragments
			}
			// The length that the first fragment claims is that of the script.
			binary.BigEndian.PutUint16(body[4:], uint16(more>>1)*16+8)
			w.send(toRouter.Frame(frame.TypeIPv4, ip.Packet(frame.ProtoUDP, body[off:off+n])))
			if more == 0xfe {
				w.pass(31 * time.Second)
				w.pull(0)
			}
		}
		got := make([]byte, 1<<16)
		require.NoError(t, host.SetReadDeadline(time.Now().Add(time.Millisecond)))
		for {
			n, err := host.Read(got)
			if err != nil {
				break
			}
			require.Equal(t, string(body[8:8+n]), string(got[:n]))
		}
		require.LessOrEqual(t, w.net.frags.made, fragChunks)
		require.LessOrEqual(t, w.net.frags.waiting, fragPackets)
		w.pass(time.Hour)
		w.pull(0)
		w.pull(0)
		require.Zero(t, w.net.frags.waiting)
		require.Len(t, w.net.frags.unused, w.net.frags.made)
		require.Zero(t, w.net.Stats().Sockets)
	})
}
