package usernet

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// FuzzGuestSix plays a script of a guest's packets of IPv6: any next header,
// payload and offload, extension headers and fragments, time that passes, and
// answers of the host's. All that the guest gets is whole, and of IPv6.
func FuzzGuestSix(f *testing.F) {
	udp := udpBytes(1000, 53, 12, 4)
	echo := []byte{128, 0, 0, 0, 0, 1, 0, 1, 'x'}
	frag := func(next uint8, off uint16, more uint16, id uint32, p []byte) []byte {
		b := binary.BigEndian.AppendUint16([]byte{next, 0}, off*8|more)
		return append(binary.BigEndian.AppendUint32(b, id), p...)
	}
	const right = 0x80
	f.Add(step(right|0, udp, 17))
	f.Add(step(0, udp, 17)) // without a checksum
	f.Add(step(right|0, echo, 58))
	f.Add(step(right|0, echo[:8], 58))
	f.Add(step(right|0, echo[:7], 58))
	f.Add(step(right|0, []byte{8, 0, 0, 0, 0, 1, 0, 1, 'x'}, 1)) // ICMP of IPv4
	f.Add(step(right|0, []byte{1, 0, 0, 0}, 58))                 // shorter than a message has to be
	f.Add(step(right|0, []byte{135, 0, 0, 0, 0, 0, 0, 0}, 58))
	f.Add(step(right|0, udp, 59))
	f.Add(step(right|0, udp, 132))
	f.Add(step(right|0x40, udp, 17, 1, 0xff))
	f.Add(step(right|0x40, udp, 17, 0, 0xff))
	f.Add(step(right|0, append([]byte{17, 0, 1, 4, 0, 0, 0, 0}, udp...), 0))                             // hop by hop
	f.Add(step(right|0, append([]byte{17, 3, 1, 28}, append(make([]byte, 28), udp...)...), 60))          // destination options
	f.Add(step(right|0, append([]byte{17, 9, 1, 76}, append(make([]byte, 76), udp...)...), 60))          // too many of them
	f.Add(step(right|0, append([]byte{17, 0, 0, 1, 0, 0, 0, 0}, udp...), 43))                            // routed on
	f.Add(step(right|0, frag(17, 0, 0, 1, udp), 44))                                                     // atomic
	f.Add(step(right|0, frag(17, 0, 1, 1, udp[:8]), 44))                                                 // a first one
	f.Add(append(step(0, frag(17, 0, 1, 1, udp[:8]), 44), step(0, frag(17, 1, 0, 1, udp[8:]), 44)...))   // H083
	f.Add(append(step(0, frag(58, 0, 1, 1, echo[:8]), 44), step(0, frag(58, 0, 0, 1, echo[:8]), 44)...)) // H083 overlap
	f.Add(step(0, frag(17, 0x1fff, 1, 1, udp), 44))                                                      // beyond 64 KiB
	f.Add(step(0, frag(6, 0, 1, 1, udp[:4]), 44))                                                        // tiny
	f.Add(step(0, frag(44, 0, 1, 1, frag(17, 0, 0, 2, udp)), 44))                                        // one in another
	f.Add(append(step(right|0x20, udp, append([]byte{17}, make([]byte, 16)...)...), 6, 255, 6, 255))
	in := enginetest.IP{Src: gatewayIP6, Dst: guestIP6}
	quoted := in.Packet(frame.ProtoTCP, enginetest.TCP{Src: 53, Dst: 1000}.Segment(in, nil))
	for _, typ := range []byte{1, 2, 3, 4, 127} {
		for _, n := range []int{0, 39, 40, 47, 60} {
			f.Add(step(right|0, append([]byte{typ, 0, 0, 0, 0, 0, 0, 68}, quoted[:n]...), 58))
		}
	}
	f.Add(append(step(right|4, udpBytes(7, 53, 108, 100), 17), 1, frame.GSOUDPL4, 0, 10, 0, 54, 0, 6))
	f.Add(append(step(right|4, udpBytes(7, 53, 108, 100), 17), 1, 0, 0, 0, 0, 70, 0, 2))
	f.Add(append(step(4, frag(17, 0, 1, 1, udp), 44), 1, 0, 0, 0, 0, 54, 0, 6))
	f.Fuzz(sixSays)
}

func sixSays(t *testing.T, data []byte) {
	host, at := hostUDP6(t)
	w := newWorld(t, ofSix, workers(2), func(c *Config) {
		c.Services = []Service{{frame.ProtoUDP, gateway6(53), at}}
		c.Loopback, c.MaxFlows, c.MaxSockets = false, 64, 16
		c.Policy = Policy{Deny: true, Rules: []Rule{{Allow: true, Prefix: netip.MustParsePrefix("fd10:0:2::/120")}}}
	})
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
			for _, k := range w.net.workers { // an answer with any payload
				if i := k.table.find(key{gport: 1000, proto: frame.ProtoUDP}); i != none {
					says(t, host, netip.AddrPortFrom(netip.IPv6Loopback(), boundPort(t, k.table.at(i).fd)), string(s.b))
				}
			}
			w.pull(0)
			w.pull(1)
			continue
		case 7:
			flush()
			continue
		}
		proto, ip := s.byte(), enginetest.IP{Src: guestIP6, Dst: gatewayIP6, TTL: 64}
		if op&32 != 0 {
			var a addr6
			copy(a[:], s.bytes(16))
			ip.Dst = netip.AddrFrom16(a)
		}
		if op&64 != 0 {
			ip.TTL, ip.TOS = s.byte(), s.byte()
		}
		payload := append([]byte(nil), s.bytes(int(s.u16()%2000))...)
		if op&128 != 0 {
			sumRight(ip, proto, payload)
		}
		f := sent{data: toRouter.Frame(frame.TypeIPv6, ip.Packet(proto, payload))}
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
	require.Zero(t, w.net.six.elsewhere.Load())
}

// sumRight makes a transport's checksum right, behind the extension headers
// that the parser knows.
func sumRight(ip enginetest.IP, proto uint8, p []byte) {
	f := new(frame.Frame)
	f.SetBytes(toRouter.Frame(frame.TypeIPv6, ip.Packet(proto, p)), nil, make([][]byte, 1))
	_, _ = f.ParseIPv6()
	at := int(f.L4) - l4 - sixMore
	sumAt, ok := map[uint8]int{frame.ProtoUDP: 6, frame.ProtoTCP: 16, protoICMP6: 2}[f.Proto]
	if f.L4 == 0 || !ok || at+sumAt+2 > len(p) {
		return
	}
	m := p[at:]
	m[sumAt], m[sumAt+1] = 0, 0
	dst := ip.Dst.As16()
	sum := ^frame.Fold(frame.Sum(m, frame.Sum(dst[:], frame.Sum(guestIP6.AsSlice(), uint64(f.Proto)+uint64(len(m))))))
	if sum == 0 {
		sum = 0xffff
	}
	binary.BigEndian.PutUint16(m[sumAt:], sum)
}

// boundPort is the port of a socket.
func boundPort(t *testing.T, fd int32) uint16 {
	t.Helper()
	var a sockAddr
	require.Zero(t, sockname(fd, &a))
	return netPort(a.Port)
}
