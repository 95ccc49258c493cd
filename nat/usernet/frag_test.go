package usernet

import (
	"bytes"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// inFragments cuts an IPv4 frame into fragments of n bytes.
func inFragments(b []byte, id uint16, n int) (fs [][]byte) {
	ip := enginetest.IP{Src: guestIP, Dst: netip.AddrFrom4([4]byte(b[30:34])), ID: id}
	return cutPacket(ip, b[23], b[34:], n)
}

func cutPacket(ip enginetest.IP, proto uint8, payload []byte, n int) (fs [][]byte) {
	for off := 0; off < len(payload); off += n {
		end := min(off+n, len(payload))
		ip.Frag = uint16(off / 8)
		if end < len(payload) {
			ip.Frag |= frame.MoreFragments
		}
		fs = append(fs, toRouter.Frame(frame.TypeIPv4, ip.Packet(proto, payload[off:end])))
	}
	return fs
}

func TestRFC4787_REQ14_Fragments(t *testing.T) {
	host, at := hostUDP(t)
	data := string(enginetest.Payload(4000, 5))
	// Without a checksum, which would hide what is wrong.
	whole := enginetest.UDPFrame(toRouter, to(gatewayIP), enginetest.UDP{Src: 5012, Dst: at.Port(), NoSum: true}, []byte(data))
	other := strings.Repeat("other", 700)
	second := udpTo(5012, gateway(at.Port()), other)
	for _, c := range []struct {
		name string
		fs   func() [][]byte
		want []string
	}{
		{"in order", func() [][]byte { return inFragments(whole, 1, 1480) }, []string{data}},
		{"reversed", func() [][]byte { return reversed(inFragments(whole, 1, 1480)) }, []string{data}},
		{"many small", func() [][]byte { return reversed(inFragments(whole, 1, 48)) }, []string{data}},
		{"interleaved", func() (fs [][]byte) {
			a, b := inFragments(whole, 1, 800), inFragments(second, 2, 800)
			for i := range a {
				fs = append(fs, a[i])
				if i < len(b) {
					fs = append(fs, b[i])
				}
			}
			return fs
		}, []string{other, data}},
		{"repeated", func() [][]byte {
			fs := inFragments(whole, 1, 1480)
			return [][]byte{fs[0], fs[0], fs[2], fs[2], fs[1]}
		}, []string{data}},
		{"missing", func() [][]byte { return inFragments(whole, 1, 1480)[:2] }, nil},
		{"missing first", func() [][]byte { return inFragments(whole, 1, 1480)[1:] }, nil},
		{"overlapping", func() [][]byte {
			a, b := inFragments(whole, 1, 1480), inFragments(whole, 1, 1600)
			return [][]byte{a[0], b[1], a[1], a[2], b[2]}
		}, nil},
		{"beyond the end", func() [][]byte {
			a := inFragments(whole, 1, 1480)
			b := cutPacket(enginetest.IP{Src: guestIP, Dst: gatewayIP, ID: 1}, frame.ProtoUDP, make([]byte, 4800), 1600)
			return [][]byte{a[0], a[2], b[2], a[1]}
		}, nil},
		{"two ends", func() [][]byte {
			a := inFragments(whole, 1, 1480)
			b := inFragments(whole[:len(whole)-8], 1, 1480)
			return [][]byte{a[2], b[2], a[0], a[1]}
		}, nil},
		// Bytes that are there twice, or beyond the end, must not make up for
		// others that are missing.
		{"overlap for a hole", func() [][]byte {
			return [][]byte{piece(whole, 0, 1600, true), piece(whole, 800, 1600, true), piece(whole, 2400, 4008, false)}
		}, nil},
		{"beyond the end for a hole", func() [][]byte {
			return [][]byte{piece(whole, 0, 800, true), piece(whole, 1600, 2400, false), piece(whole, 2400, 3200, true)}
		}, nil},
		{"the end before them", func() [][]byte {
			return [][]byte{piece(whole, 0, 800, true), piece(whole, 2400, 3200, true), piece(whole, 1600, 2400, false)}
		}, nil},
		{"tiny first", func() [][]byte {
			fs := inFragments(whole, 1, 8)
			first := bytes.Clone(fs[0][:14+20+4])
			first = toRouter.Frame(frame.TypeIPv4, enginetest.IP{Src: guestIP, Dst: gatewayIP, ID: 1, Frag: frame.MoreFragments}.Packet(17, first[34:38]))
			return append([][]byte{first}, fs[1:30]...)
		}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, at := range []int{0, 1, 2} { // in one batch, one by one, in twos
				w := newWorld(t, workers(2))
				switch fs := c.fs(); at {
				case 0:
					w.send(fs...)
				default:
					for len(fs) > 0 {
						k := min(at, len(fs))
						w.send(fs[:k]...)
						fs = fs[k:]
						w.worker ^= at & 1 // a queue of another worker
					}
				}
				for _, want := range c.want {
					got, _ := hears(t, host)
					require.Equal(t, want, got)
				}
				if c.want == nil {
					hearsNothing(t, host)
				}
			}
		})
	}
}

// piece is the fragment with some bytes of a frame's packet, id 1.
func piece(b []byte, from, to int, more bool) []byte {
	ip := enginetest.IP{Src: guestIP, Dst: gatewayIP, ID: 1, Frag: uint16(from / 8)}
	if more {
		ip.Frag |= frame.MoreFragments
	}
	return toRouter.Frame(frame.TypeIPv4, ip.Packet(b[23], b[34+from:34+to]))
}

func reversed(fs [][]byte) (r [][]byte) {
	for i := len(fs) - 1; i >= 0; i-- {
		r = append(r, fs[i])
	}
	return r
}

// TestRFC4787_REQ14a_FragmentFlood: a flood of fragments that never become
// packets harms neither whole packets nor fragments in order.
func TestRFC4787_REQ14a_FragmentFlood(t *testing.T) {
	w := newWorld(t)
	host, at := hostUDP(t)
	data := string(enginetest.Payload(20000, 5))
	whole := udpTo(5013, gateway(at.Port()), data)
	id := uint16(100)
	for round := range 30 {
		var flood [][]byte
		for i := range 100 {
			id++
			ip := enginetest.IP{Src: guestIP, Dst: gatewayIP, ID: id, Frag: uint16(i*64) | frame.MoreFragments}
			flood = append(flood, toRouter.Frame(frame.TypeIPv4, ip.Packet(frame.ProtoUDP, make([]byte, 16+8*(round%2)*180))))
		}
		w.send(flood...)
		w.send(udpTo(5013, gateway(at.Port()), fmt.Sprint("whole ", round)))
		got, _ := hears(t, host)
		require.Equal(t, fmt.Sprint("whole ", round), got)
		for _, f := range inFragments(whole, uint16(round), 1480) {
			w.send(append([][]byte{f}, flood[:5]...)...)
		}
		got, _ = hears(t, host)
		require.Equal(t, data, got)
	}
	assert.LessOrEqual(t, w.net.frags.made, fragChunks)
	w.pass(31 * time.Second)
	w.pull(0)
	assert.Zero(t, w.net.frags.waiting)
	assert.Len(t, w.net.frags.unused, w.net.frags.made)
	assert.Equal(t, 1, w.net.workers[0].table.count)
}

// TestFragmentsLate: the guest is told of a packet that did not become whole in
// time, if its first fragment has come (RFC 1122, 3.3.2).
func TestFragmentsLate(t *testing.T) {
	w := newWorld(t)
	whole := udpTo(5014, gateway(9), string(make([]byte, 4000)))
	fs := inFragments(whole, 7, 1480)
	w.send(fs[0])
	w.pass(2 * time.Second)
	w.send(inFragments(whole, 8, 1480)[1:]...)
	w.consumed()
	w.pass(29 * time.Second)
	as := w.pull(0)
	require.Len(t, as, 1)
	assert.EqualValues(t, typeCode(11, 1), as[0].icmp.TypeCode)
	q := as[0].quoted(t)
	assert.EqualValues(t, 7, q.ip.Id)
	require.Equal(t, 1, w.net.frags.waiting)
	w.pass(3 * time.Second)
	assert.Empty(t, w.pull(0), "none about a packet whose first fragment is missing")
	assert.Zero(t, w.net.frags.waiting)
	w.send(fs[1:]...)
	w.nothing()
}
