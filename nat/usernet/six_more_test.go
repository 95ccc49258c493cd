package usernet

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// Hop limit and traffic class are carried both ways, one hop less.
func TestRow61HopLimitAndClass(t *testing.T) {
	pod, outside := pod6(t)
	w := newWorld(t, ofSix, inPod(t, pod))
	pc, err := outside.ListenPacket("udp6", "["+outsideIP6+"]:5000")
	require.NoError(t, err)
	defer pc.Close()
	host := pc.(*net.UDPConn)
	rc, err := host.SyscallConn()
	require.NoError(t, err)
	set := func(opt, v int) {
		t.Helper()
		require.NoError(t, rc.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, opt, v) }))
		require.NoError(t, err)
	}
	set(unix.IPV6_RECVHOPLIMIT, 1)
	set(unix.IPV6_RECVTCLASS, 1)
	at := netip.MustParseAddrPort("[" + outsideIP6 + "]:5000")
	for _, x := range []struct{ hops, class uint8 }{{64, 0}, {64, 0xb8}, {7, 0xb9}, {255, 2}, {64, 0}} {
		ip := to(at.Addr())
		ip.TTL, ip.TOS = x.hops, x.class
		w.send(enginetest.UDPFrame(toRouter, ip, enginetest.UDP{Src: 6104, Dst: at.Port()}, []byte("x")))
		w.consumed()
		b, oob := make([]byte, 10), make([]byte, 100)
		require.NoError(t, host.SetReadDeadline(time.Now().Add(patience)))
		_, n, _, from, err := host.ReadMsgUDP(b, oob)
		require.NoError(t, err)
		got := map[int32]uint8{}
		for rest := oob[:n]; ; {
			_, typ, d, more, ok := nextControl(rest)
			if !ok {
				break
			}
			got[typ], rest = d[0], more
		}
		assert.Equal(t, map[int32]uint8{unix.IPV6_HOPLIMIT: x.hops - 1, unix.IPV6_TCLASS: x.class}, got)
		set(unix.IPV6_UNICAST_HOPS, int(x.hops))
		set(unix.IPV6_TCLASS, int(x.class))
		_, err = host.WriteTo([]byte("y"), from)
		require.NoError(t, err)
		a := w.next()
		assert.Equal(t, []uint8{x.hops - 1, x.class}, []uint8{a.ip6.HopLimit, a.ip6.TrafficClass})
	}
}

// What the kernel has put together comes as one USO frame, or cut where the
// guest's MTU does not take its datagrams.
func TestRow61RunsToGuest(t *testing.T) {
	for _, size := range []int{100, 1000, 1452, 1453, 4000} {
		w := newWorld(t, ofSix)
		host, at := hostUDP6(t)
		w.send(udpTo(6105, gateway6(at.Port()), "x"))
		_, from := hears(t, host)
		rc, err := host.SyscallConn()
		require.NoError(t, err)
		require.NoError(t, rc.Control(func(fd uintptr) {
			require.NoError(t, unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT, size))
		}))
		p := string(enginetest.Payload(min(size*10+size/2, 40000), 7))
		says(t, host, from, p)
		var got []byte
		for len(got) < len(p) {
			a := w.next()
			if a.frag6 != nil {
				require.Greater(t, size, 1452)
				if a.frag6.FragmentOffset == 0 {
					a.payload = a.payload[8:]
				}
				got = append(got, a.payload...)
				continue
			}
			if size <= 1452 {
				assert.EqualValues(t, frame.GSOUDPL4, a.off.GSO)
				assert.EqualValues(t, size, a.off.GSOSize)
			}
			assert.Len(t, a.payload, min(size, len(p)-len(got)))
			got = append(got, a.payload...)
		}
		assert.Equal(t, p, string(got), "size %d", size)
	}
}

// Nothing is lost of a batch to several places, and what goes to one place keeps
// its order.
func TestRow61UDPBatch(t *testing.T) {
	w := newWorld(t, ofSix)
	one, at := hostUDP6(t)
	two, at2 := hostUDP6(t)
	want := make([][]string, 2)
	var frames [][]byte
	for i := range 120 {
		p, k := fmt.Sprintf("%03d%s", i, strings.Repeat("x", []int{10, 10, 10, 10, 5, 300, 1400}[i/4%7])), i/5%2
		want[k] = append(want[k], p)
		frames = append(frames, udpTo(21000, gateway6([]uint16{at.Port(), at2.Port()}[k]), p))
	}
	w.send(frames...)
	w.consumed()
	for k, host := range []*net.UDPConn{one, two} {
		for _, p := range want[k] {
			got, _ := hears(t, host)
			require.Equal(t, p, got)
		}
	}
}

// A server's reset stays one, and so does the guest's; what is closed ends on both
// sides.
func TestRow61TCPEnds(t *testing.T) {
	w := newWorld(t, ofSix)
	l, at := listen6(t)
	for i, end := range []func(p *peer, c *net.TCPConn){
		func(p *peer, c *net.TCPConn) {
			require.NoError(t, c.SetLinger(0))
			c.Close()
			p.expect(nil, func(a *arrived) bool { return a.tcp.RST })
		},
		func(p *peer, c *net.TCPConn) {
			p.raw(tcpRST, "")
			require.NoError(t, c.SetReadDeadline(time.Now().Add(patience)))
			_, err := c.Read(make([]byte, 1))
			require.ErrorIs(t, err, unix.ECONNRESET)
			c.Close()
		},
		func(p *peer, c *net.TCPConn) {
			p.raw(tcpFIN|tcpACK, "")
			p.seq++
			_, err := c.Read(make([]byte, 1))
			require.Error(t, err)
			_, err = c.Write([]byte("half"))
			require.NoError(t, err)
			require.Equal(t, "half", p.hear(4))
			c.Close()
			p.expect(nil, func(a *arrived) bool { return a.tcp.FIN })
		},
	} {
		p := call(w, at, uint16(41000+i))
		c, err := l.Accept()
		require.NoError(t, err)
		end(p, c.(*net.TCPConn))
	}
}
