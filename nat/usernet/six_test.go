package usernet

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

var (
	guestIP6   = netip.MustParseAddr("fd10:0:2::2")
	gatewayIP6 = netip.MustParseAddr("fd10:0:2::1")
)

// ofSix makes the guest's network one of IPv6, with KubeVirt's addresses.
func ofSix(c *Config) {
	c.Guest, c.Gateway, c.Prefix = guestIP6, gatewayIP6, netip.MustParsePrefix("fd10:0:2::/120")
}

func gateway6(port uint16) netip.AddrPort { return netip.AddrPortFrom(gatewayIP6, port) }

// decode6 is decode for a frame of IPv6.
func (a *arrived) decode6(t testing.TB) {
	t.Helper()
	b := a.data
	require.NoError(t, a.ip6.DecodeFromBytes(b[14:], gopacket.NilDecodeFeedback))
	require.Equal(t, len(b)-14-ip6Len, int(a.ip6.Length))
	require.True(t, a.ip6.DstIP.Equal(net.IP(guestIP6.AsSlice())), "to %v", a.ip6.DstIP)
	require.NotZero(t, a.ip6.HopLimit)
	a.payload = a.ip6.Payload
	if a.ip6.NextHeader == layers.IPProtocolIPv6Fragment {
		p := gopacket.NewPacket(b, layers.LayerTypeEthernet, gopacket.Default)
		a.frag6 = p.Layer(layers.LayerTypeIPv6Fragment).(*layers.IPv6Fragment)
		a.payload = b[14+ip6Len+sixFragment:]
		return
	}
	require.True(t, enginetest.ChecksumsOK(b), "checksum of %x", b)
	p := gopacket.NewPacket(b, layers.LayerTypeEthernet, gopacket.Default)
	a.tcp, _ = p.Layer(layers.LayerTypeTCP).(*layers.TCP)
	a.udp, _ = p.Layer(layers.LayerTypeUDP).(*layers.UDP)
	a.icmp6, _ = p.Layer(layers.LayerTypeICMPv6).(*layers.ICMPv6)
	switch {
	case a.tcp != nil:
		a.payload = a.tcp.Payload
	case a.udp != nil:
		a.payload = a.udp.Payload
	case a.icmp6 != nil:
		a.payload = a.icmp6.Payload
	}
}

// hostUDP6 is a socket of the host's on ::1.
func hostUDP6(t testing.TB) (*net.UDPConn, netip.AddrPort) {
	t.Helper()
	c, err := net.ListenUDP("udp6", &net.UDPAddr{IP: net.IPv6loopback})
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c, c.LocalAddr().(*net.UDPAddr).AddrPort()
}

func TestRow61UDPOutAndBack(t *testing.T) {
	w := newWorld(t, ofSix)
	host, at := hostUDP6(t)
	require.Empty(t, w.send(udpTo(40000, gateway6(at.Port()), "ping")))
	w.consumed()
	got, from := hears(t, host)
	assert.Equal(t, "ping", got)
	assert.Equal(t, netip.IPv6Loopback(), from.Addr())
	assert.EqualValues(t, 40000, from.Port(), "its port is kept")

	says(t, host, from, "pong")
	a := w.next()
	assert.Equal(t, "pong", string(a.payload))
	assert.Equal(t, gateway6(at.Port()), a.from())
	assert.EqualValues(t, 40000, a.udp.DstPort)
	assert.EqualValues(t, 64, a.ip6.HopLimit)
	assert.Equal(t, 1, w.net.Stats().UDPOpen)
}

// What the guest's MTU does not take comes in fragments, what it takes does not.
func TestRow61UDPSizes(t *testing.T) {
	w := newWorld(t, ofSix)
	host, at := hostUDP6(t)
	for _, n := range []int{0, 1, 2, 37, 38, 39, 85, 86, 87, 1452, 1453, 2048, 9000, 65000} {
		p := string(enginetest.Payload(n, byte(n)))
		whole := enginetest.UDP{Src: 40001, Dst: at.Port()}.Datagram(to(gatewayIP6), []byte(p))
		w.send(fragments6(to(gatewayIP6), uint32(n), frame.ProtoUDP, whole, 1448)...)
		w.consumed()
		got, from := hears(t, host)
		require.Equal(t, p, got, "%d bytes", n)
		says(t, host, from, p)
		var back []byte
		var id uint32
		for len(back) < 8+n {
			a := w.next()
			require.LessOrEqual(t, len(a.data), 14+1500)
			if a.udp != nil {
				require.LessOrEqual(t, n, 1452, "it was to be cut")
				back = append(a.udp.Contents, a.payload...)
				break
			}
			require.Greater(t, n, 1452, "it was not to be cut")
			require.EqualValues(t, len(back), 8*int(a.frag6.FragmentOffset))
			if len(back) == 0 {
				id = a.frag6.Identification
			}
			require.Equal(t, id, a.frag6.Identification)
			require.Equal(t, layers.IPProtocolUDP, a.frag6.NextHeader)
			back = append(back, a.payload...)
			require.Equal(t, len(back) < 8+n, a.frag6.MoreFragments)
		}
		require.Equal(t, p, string(back[8:]), "%d bytes", n)
		sum := frame.Sum(gatewayIP6.AsSlice(), frame.Sum(guestIP6.AsSlice(), uint64(17+len(back))))
		require.EqualValues(t, 0xffff, frame.Fold(frame.Sum(back, sum)), "checksum of %d bytes", n)
	}
}

// fragments6 is a packet of the guest's, cut where its payload is longer than
// most.
func fragments6(ip enginetest.IP, id uint32, proto uint8, payload []byte, most int) (fs [][]byte) {
	if len(payload) <= most {
		return [][]byte{toRouter.Frame(frame.TypeIPv6, ip.Packet(proto, payload))}
	}
	for off := 0; off < len(payload); off += most {
		k := min(most, len(payload)-off)
		field := off
		if off+k < len(payload) {
			field |= 1
		}
		h := []byte{proto, 0, byte(field >> 8), byte(field), byte(id >> 24), byte(id >> 16), byte(id >> 8), byte(id)}
		fs = append(fs, toRouter.Frame(frame.TypeIPv6, ip.Packet(44, append(h, payload[off:off+k]...))))
	}
	return fs
}

func listen6(t testing.TB) (net.Listener, netip.AddrPort) {
	t.Helper()
	l, err := net.Listen("tcp6", "[::1]:0")
	require.NoError(t, err)
	t.Cleanup(func() { l.Close() })
	return l, gateway6(l.Addr().(*net.TCPAddr).AddrPort().Port())
}

func TestRow61TCP(t *testing.T) {
	w := newWorld(t, ofSix)
	l, at := listen6(t)
	p := call(w, at, 41000)
	c, err := l.Accept()
	require.NoError(t, err)
	defer c.Close()
	assert.EqualValues(t, 41000, c.RemoteAddr().(*net.TCPAddr).Port)
	p.say("hello")
	b := make([]byte, 5)
	_, err = io.ReadFull(c, b)
	require.NoError(t, err)
	assert.Equal(t, "hello", string(b))
	big := strings.Repeat("0123456789", 3000)
	for _, s := range []string{"x", big[:60], big} {
		_, err = c.Write([]byte(s))
		require.NoError(t, err)
		require.Equal(t, s, p.hear(len(s)))
	}
	require.NoError(t, c.Close())
	p.expect(nil, func(a *arrived) bool { return a.tcp.FIN })
}

func TestRow61TCPRefused(t *testing.T) {
	w := newWorld(t, ofSix)
	l, at := listen6(t)
	l.Close()
	p := &peer{w: w, dst: at, sport: 41001, seq: guestISS, wnd: 65535}
	p.expect(p.raw(tcpSYN, ""), func(a *arrived) bool { return a.tcp.RST })
}

// The SYN-ACK's MSS is what IPv6 leaves of the MTU.
func TestRow61MSS(t *testing.T) {
	w := newWorld(t, ofSix)
	_, at := listen6(t)
	p := &peer{w: w, dst: at, sport: 41002, seq: guestISS, wnd: 65535}
	a := p.expect(p.raw(tcpSYN, "", 2, 4, 5, 160), func(a *arrived) bool { return a.tcp.SYN })
	require.NotEmpty(t, a.tcp.Options)
	assert.Equal(t, []byte{5, 160}, a.tcp.Options[0].OptionData)
}

func TestRow61EchoOfGateway(t *testing.T) {
	w := newWorld(t, ofSix)
	for _, n := range []int{0, 1, 56, 90, 1452, 3000} {
		p := enginetest.Payload(n, 3)
		m := enginetest.ICMP{Type: icmp6Echo, Rest: 7<<16 | 9}.Message(to(gatewayIP6), p)
		var back []byte
		for _, a := range w.send(fragments6(to(gatewayIP6), 5, protoICMP6, m, 1448)...) {
			require.Equal(t, gatewayIP6, a.src())
			if a.frag6 == nil {
				back = append(a.icmp6.Contents, a.payload...)
			} else {
				back = append(back, a.payload...)
			}
		}
		require.Len(t, back, 8+n)
		require.Equal(t, []byte{icmp6EchoReply, 0}, back[:2])
		require.Equal(t, p, back[8:])
		sum := frame.Sum(gatewayIP6.AsSlice(), frame.Sum(guestIP6.AsSlice(), uint64(protoICMP6+len(back))))
		require.EqualValues(t, 0xffff, frame.Fold(frame.Sum(back, sum)))
	}
}

func TestRow61Refused(t *testing.T) {
	w := newWorld(t, ofSix)
	for name, b := range map[string][]byte{
		"link-local":      udpTo(1000, netip.MustParseAddrPort("[fe80::1]:5"), ""),
		"loopback":        udpTo(1000, netip.MustParseAddrPort("[::1]:5"), ""),
		"group":           udpTo(1000, netip.MustParseAddrPort("[ff02::1]:5"), ""),
		"nobody":          udpTo(1000, netip.MustParseAddrPort("[::]:5"), ""),
		"IPv4 in IPv6":    udpTo(1000, netip.AddrPortFrom(netip.AddrFrom16(localIP.As16()), 5), ""),
		"the guest":       udpTo(1000, netip.AddrPortFrom(guestIP6, 5), ""),
		"from link-local": enginetest.UDPFrame(toRouter, enginetest.IP{Src: netip.MustParseAddr("fe80::2"), Dst: gatewayIP6}, enginetest.UDP{Src: 1, Dst: 2}, nil),
	} {
		require.Empty(t, w.send(b), name)
		w.dropped(frame.NotCarried)
	}
	require.Empty(t, w.send(enginetest.UDPFrame(toRouter, enginetest.IP{Src: netip.MustParseAddr("fd10:0:2::3"), Dst: gatewayIP6}, enginetest.UDP{Src: 1, Dst: 2}, nil)))
	w.dropped(frame.Spoofed)
	require.Empty(t, w.send(enginetest.UDPFrame(toRouter, to(gatewayIP6), enginetest.UDP{Src: 1, Dst: 2, NoSum: true}, nil)))
	w.dropped(frame.BadChecksum) // RFC 8200, 8.1
	as := w.send(udpTo(1000, netip.MustParseAddrPort("[fd10:0:2::77]:5"), "lost"))
	w.dropped(frame.NoRoute)
	require.Len(t, as, 1)
	require.Equal(t, layers.CreateICMPv6TypeCode(1, 3), as[0].icmp6.TypeCode)
	require.Equal(t, gatewayIP6, as[0].src())
	// What is quoted is what the guest has sent, from its IP header on.
	require.Equal(t, udpTo(1000, netip.MustParseAddrPort("[fd10:0:2::77]:5"), "lost")[14:], as[0].payload[4:])
}

func TestRow61Numbers(t *testing.T) {
	n := newWorld(t, ofSix, workers(2)).net
	s := n.six
	a := func(i int) *addr6 {
		b := netip.MustParseAddr(fmt.Sprintf("2001:db8::%x:%x", i>>16, i&0xffff)).As16()
		return &b
	}
	w := n.workers[0]
	one := s.number(w, a(1))
	assert.Equal(t, one, s.number(w, a(1)))
	assert.Equal(t, one, s.number(n.workers[1], a(1)))
	assert.Equal(t, *a(1), s.address(one))
	w.table.add(key{remote: hostOf(one), proto: frame.ProtoTCP})
	w.table.at(0).state = stateEstablished
	defer w.table.remove(0)
	ll := netip.MustParseAddr("fe80::1").As16()
	assert.True(t, isHidden(s.number(w, &ll)))
	assert.EqualValues(t, loopback, s.number(w, &addr6{15: 1}))
	for i := range sixFew + 10 {
		s.number(w, a(i+2))
	}
	require.True(t, s.want.Load())
	n.sweep()
	require.False(t, s.want.Load())
	require.Len(t, s.numbers, 1)
	assert.Equal(t, one, s.number(w, a(1)), "a flow keeps its number")
	for i := range 10 * sixMost {
		s.number(w, a(i+2))
		n.sweep()
	}
	assert.LessOrEqual(t, len(s.numbers), sixFew+1)
}

const podIP6, outsideIP6 = "2001:db8:1::5", "2001:db8:1::9"

// pod6 is a namespace with a way out, where the Net's sockets are made, and the
// outside.
func pod6(t *testing.T) (pod, outside *enginetest.NetNS) {
	t.Helper()
	enginetest.Need(t, "netns")
	pod, outside = enginetest.NewNetNS(t), enginetest.NewNetNS(t)
	enginetest.Veth(t, pod, "eth0", outside, "eth0")
	enginetest.Must(t, pod.Addr("eth0", podIP6+"/64"), outside.Addr("eth0", outsideIP6+"/64"), pod.Route("default", outsideIP6),
		pod.Sysctl("net/ipv4/ping_group_range", "0 2147483647"))
	return pod, outside
}

func TestRow61UDPOutside(t *testing.T) {
	pod, outside := pod6(t)
	w := newWorld(t, ofSix, inPod(t, pod))
	host, err := outside.ListenPacket("udp6", "["+outsideIP6+"]:5000")
	require.NoError(t, err)
	defer host.Close()
	at := netip.MustParseAddrPort("[" + outsideIP6 + "]:5000")
	for _, n := range []int{1, 1452, 4000, 20000} {
		p := string(enginetest.Payload(n, byte(n)))
		ip := to(at.Addr())
		ip.TTL, ip.TOS = 33, 0x48
		w.send(fragments6(ip, uint32(n), frame.ProtoUDP, enginetest.UDP{Src: 40001, Dst: at.Port()}.Datagram(ip, []byte(p)), 1448)...)
		w.consumed()
		got, from := hears(t, host)
		require.Equal(t, p, got, "%d bytes", n)
		require.Equal(t, podIP6, from.Addr().String())
		says(t, host, from, "yes")
		a := w.next()
		require.Equal(t, at, a.from())
		require.Equal(t, "yes", string(a.payload))
		require.EqualValues(t, 63, a.ip6.HopLimit)
	}
}

// Where all numbers are in use, packets to other places are dropped, and what is
// open goes on.
func TestRow61NumbersRunOut(t *testing.T) {
	n := newWorld(t, ofSix).net
	s, w := n.six, n.workers[0]
	a := func(i int) *addr6 {
		return &addr6{0x20, 1, 0xd, 0xb8, 12: byte(i >> 24), 13: byte(i >> 16), 14: byte(i >> 8), 15: byte(i)}
	}
	w.table.max = 2 * sixMost
	for i := range sixMost {
		k := s.number(w, a(i))
		require.NotZero(t, k)
		j := w.table.add(key{remote: hostOf(k), proto: frame.ProtoTCP})
		w.table.at(j).state = stateTimeWait
	}
	sweeps := 0
	for i := range 3 * sixFew {
		require.Zero(t, s.number(w, a(sixMost+i)))
		if s.want.Load() {
			sweeps++
			n.sweep()
		}
	}
	assert.LessOrEqual(t, sweeps, 4)
	require.Equal(t, *a(7), s.address(s.number(w, a(7))))
	for i := range int32(w.table.used) {
		w.table.remove(i)
	}
	s.want.Store(true)
	n.sweep()
	require.Empty(t, s.numbers)
	require.NotZero(t, s.number(w, a(sixMost)))
}
