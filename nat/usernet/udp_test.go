package usernet

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

func TestUDPOutAndBack(t *testing.T) {
	w := newWorld(t)
	host, at := hostUDP(t)
	require.Empty(t, w.send(udpTo(40000, gateway(at.Port()), "ping")))
	w.consumed()
	got, from := hears(t, host)
	assert.Equal(t, "ping", got)
	assert.Equal(t, localIP, from.Addr())

	says(t, host, from, "pong")
	a := w.next()
	assert.Equal(t, "pong", string(a.payload))
	assert.Equal(t, gateway(at.Port()), a.from())
	assert.EqualValues(t, 40000, a.udp.DstPort)
	assert.EqualValues(t, 64, a.ip.TTL)
	assert.EqualValues(t, frame.NeedsCsum, a.off.Flags)
	assert.Equal(t, 1, w.net.Stats().UDPOpen)
}

func TestUDPSizes(t *testing.T) {
	w := newWorld(t, withMTU(65535))
	host, at := hostUDP(t)
	for _, n := range []int{0, 1, 2, 85, 86, 87, 88, 1472, 2047, 2048, 2049, 9000, 65507} {
		p := string(enginetest.Payload(n, byte(n)))
		w.send(udpTo(40001, gateway(at.Port()), p))
		w.consumed()
		got, from := hears(t, host)
		require.Equal(t, p, got, "%d bytes", n)
		says(t, host, from, p)
		a := w.next()
		require.Equal(t, p, string(a.payload), "%d bytes", n)
		require.EqualValues(t, 8+n, a.udp.Length)
	}
}

// TestUDPBatch sends what is like and unlike in one batch: nothing is lost, and
// what goes to one place keeps its order.
func TestUDPBatch(t *testing.T) {
	one, at := hostUDP(t)
	// Another address with the same port, and another port.
	two, _ := hostUDPAt(t, fmt.Sprintf("127.0.0.9:%d", at.Port()))
	three, at3 := hostUDP(t)
	w := newWorld(t, service("10.0.2.3:53", two.LocalAddr().String()))
	dsts := []netip.AddrPort{gateway(at.Port()), netip.AddrPortFrom(dnsIP, 53), gateway(at3.Port())}
	want := make([][]string, 3)
	var frames [][]byte
	for i := range 117 {
		p := fmt.Sprintf("%03d%s", i, strings.Repeat("x", []int{10, 10, 10, 10, 5, 300, 1400}[i/4%7]))
		port, k := uint16(21000+i%4/3), i/3%3
		if port == 21000 { // the order is that of a mapping
			want[k] = append(want[k], p)
		}
		frames = append(frames, udpTo(port, dsts[k], p))
	}
	w.send(frames...)
	w.consumed()
	for k, host := range []net.PacketConn{one, two, three} {
		var got []string
		for range 39 {
			p, from := hears(t, host)
			if from.Port() == 21000 {
				got = append(got, p)
			}
		}
		assert.Equal(t, want[k], got)
	}
	assert.Equal(t, 2, w.mappings())
}

// TestUDPRunLeavesAsOne: datagrams of one size to one place are one message
// that the kernel cuts.
func TestUDPRunLeavesAsOne(t *testing.T) {
	w := newWorld(t)
	host, at := hostUDP(t)
	var frames [][]byte
	for i := range 70 {
		frames = append(frames, udpTo(40002, gateway(at.Port()), fmt.Sprintf("%03d", i)))
	}
	w.send(frames...)
	w.consumed()
	r := w.net.workers[0].udp.tx.runs
	assert.EqualValues(t, 64, r[0].count)
	assert.EqualValues(t, 6, r[1].count)
	for i := range 70 {
		p, _ := hears(t, host)
		require.Equal(t, fmt.Sprintf("%03d", i), p)
	}
}

// TestUDPRunEndsAtShorter: only the last one of a run may be shorter.
func TestUDPRunEndsAtShorter(t *testing.T) {
	w := newWorld(t)
	host, at := hostUDP(t)
	want := []string{"0123456789", "1123456789", "21234", "3123456789", "4123456789", "", "5", "6", "7123456789"}
	var frames [][]byte
	for _, p := range want {
		frames = append(frames, udpTo(40006, gateway(at.Port()), p))
	}
	w.send(frames...)
	w.consumed()
	for _, p := range want {
		got, _ := hears(t, host)
		require.Equal(t, p, got)
	}
}

func TestUDPWithoutChecksum(t *testing.T) {
	w := newWorld(t)
	host, at := hostUDP(t)
	w.send(enginetest.UDPFrame(toRouter, to(gatewayIP), enginetest.UDP{Src: 40003, Dst: at.Port(), NoSum: true}, []byte("bare")))
	w.consumed()
	p, _ := hears(t, host)
	assert.Equal(t, "bare", p)
}

func TestUDPBadChecksum(t *testing.T) {
	w := newWorld(t)
	host, at := hostUDP(t)
	for _, n := range []int{4, 500} {
		b := udpTo(40003, gateway(at.Port()), strings.Repeat("x", n))
		b[len(b)-1] ^= 1
		w.send(b)
		w.dropped(frame.BadChecksum)
		// The checksum of a datagram in pieces of odd lengths.
		good := udpTo(40003, gateway(at.Port()), strings.Repeat("y", n))
		w.sendAll(sent{data: good, cut: []int{1, 100, 33}})
		w.consumed()
		p, _ := hears(t, host)
		assert.Len(t, p, n)
	}
	hearsNothing(t, host)
}

// TestUDPPartialChecksum: what the guest left undone is the host's to do, also
// in the payload.
func TestUDPPartialChecksum(t *testing.T) {
	w := newWorld(t)
	host, at := hostUDP(t)
	b := udpTo(40003, gateway(at.Port()), "partial")
	off := enginetest.Partial(b)
	w.sendAll(sent{data: b, off: off})
	w.consumed()
	p, _ := hears(t, host)
	assert.Equal(t, "partial", p)

	// A tunnel's inner checksum, over 8 bytes from the sixth on.
	inner := []byte("head\x00\x00\x00\x00\x11\x22\x33\x44\x00\x00")
	b = enginetest.UDPFrame(toRouter, to(gatewayIP), enginetest.UDP{Src: 40003, Dst: at.Port(), NoSum: true}, inner)
	w.sendAll(sent{data: b, off: frame.Offload{Flags: frame.NeedsCsum, CsumStart: 42 + 8, CsumOffset: 4}})
	w.consumed()
	p, _ = hears(t, host)
	require.Len(t, p, 14)
	assert.Equal(t, ^(uint16(0x1122) + 0x3344), uint16(p[12])<<8|uint16(p[13]))
}

// TestUDPShortLength: what is behind the datagram in its packet is not sent.
func TestUDPShortLength(t *testing.T) {
	w := newWorld(t)
	host, at := hostUDP(t)
	b := enginetest.UDPFrame(toRouter, to(gatewayIP), enginetest.UDP{Src: 40003, Dst: at.Port(), NoSum: true}, []byte("datagram+rest"))
	b[39] = 8 + 8
	w.send(b)
	w.consumed()
	p, _ := hears(t, host)
	assert.Equal(t, "datagram", p)
}

func TestUDPUSOFromGuest(t *testing.T) {
	w := newWorld(t)
	host, at := hostUDP(t)
	p := enginetest.Payload(3500, 9)
	b := udpTo(40004, gateway(at.Port()), string(p))
	off := enginetest.GSO(b, 1000)
	for _, fallback := range []bool{false, true} {
		w.net.workers[0].udp.noSegment = fallback
		w.sendAll(sent{data: b, off: off, cut: []int{50, 777}}, sent{data: udpTo(40004, gateway(at.Port()), "end")})
		w.consumed()
		for at := 0; at < len(p); at += 1000 {
			got, _ := hears(t, host)
			require.Equal(t, string(p[at:min(at+1000, len(p))]), got)
		}
		got, _ := hears(t, host)
		assert.Equal(t, "end", got)
	}
}

// TestUDPUSOSegmentsBeyondMTU: the kernel refuses to cut a message into
// datagrams that need fragments, so they are sent alone.
func TestUDPUSOSegmentsBeyondMTU(t *testing.T) {
	w := newWorld(t, withMTU(65535))
	host, at := hostUDP(t)
	p := enginetest.Payload(50000, 9)
	ip := to(gatewayIP)
	ip.Frag = 0 // fragments allowed
	b := enginetest.UDPFrame(toRouter, ip, enginetest.UDP{Src: 40004, Dst: at.Port()}, p)
	w.sendAll(sent{data: b, off: enginetest.GSO(b, 20000)})
	w.consumed()
	for at := 0; at < len(p); at += 20000 {
		got, _ := hears(t, host)
		require.Equal(t, string(p[at:min(at+20000, len(p))]), got)
	}
}

// TestUDPManyAtOnce: what one look does not take, the next one does.
func TestUDPManyAtOnce(t *testing.T) {
	w := newWorld(t)
	host, at := hostUDP(t)
	var froms []netip.AddrPort
	for i := range 10 {
		w.send(udpTo(uint16(42000+i), gateway(at.Port()), "x"))
		_, from := hears(t, host)
		froms = append(froms, from)
	}
	const each = 60
	for k := range each {
		for i, from := range froms {
			says(t, host, from, fmt.Sprintf("%d/%d", i, k))
		}
	}
	seen := map[uint16]int{}
	for range each * len(froms) {
		a := w.next()
		port := uint16(a.udp.DstPort)
		require.Equal(t, fmt.Sprintf("%d/%d", port-42000, seen[port]), string(a.payload))
		seen[port]++
	}
	w.nothing()
}
