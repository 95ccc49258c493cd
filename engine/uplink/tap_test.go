package uplink

import (
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

var guestMAC = frame.MAC{0x52, 0x54, 0, 1, 2, 3}

func fromGuest() enginetest.Eth { return enginetest.Eth{Dst: GatewayMAC, Src: guestMAC} }

// answerARP plays the guest's side of address resolution.
func (r *rig) answerARP() {
	r.t.Helper()
	p := r.next(r.pod.Tap(0), "ARP request for the guest", func(p received) bool { return be(p.bytes[12:]) == frame.TypeARP })
	require.Equal(r.t, guestIP.AsSlice(), p.bytes[38:42])
	require.Equal(r.t, GatewayMAC[:], p.bytes[6:12])
	send(r.t, r.pod.Tap(0), enginetest.ARPFrame(fromGuest(), enginetest.ARPReply, guestMAC, guestIP, GatewayMAC, gateway.Addr()))
}

// dial connects from the pod, and answers as a guest that has no listener. It
// reports whether the guest was asked, and how the connection ended.
func (r *rig) dial(addr string, port uint16) (asked bool, err error) {
	r.t.Helper()
	done := make(chan error, 1)
	go func() {
		c, err := r.Pod.Dial("tcp4", netip.AddrPortFrom(netip.MustParseAddr(addr), port).String(), deadline)
		if err == nil {
			c.Close()
		}
		done <- err
	}()
	for {
		select {
		case err := <-done:
			return asked, err
		default:
		}
		p, ok := r.find(r.pod.Tap(0), 10*time.Millisecond, func(p received) bool {
			return be(p.bytes[12:]) == frame.TypeARP || p.bytes[23] == frame.ProtoTCP
		})
		if !ok {
			continue
		}
		if be(p.bytes[12:]) == frame.TypeARP {
			send(r.t, r.pod.Tap(0), enginetest.ARPFrame(fromGuest(), enginetest.ARPReply, guestMAC, guestIP, GatewayMAC, gateway.Addr()))
			continue
		}
		asked = true
		src, _ := netip.AddrFromSlice(p.bytes[26:30])
		require.Equal(r.t, gateway.Addr(), src, "what the guest sees")
		require.Equal(r.t, guestIP.AsSlice(), p.bytes[30:34])
		require.Equal(r.t, port, be(p.bytes[36:]))
		seq := uint32(be(p.bytes[38:]))<<16 | uint32(be(p.bytes[40:]))
		send(r.t, r.pod.Tap(0), enginetest.TCPFrame(fromGuest(), enginetest.IP{Src: guestIP, Dst: gateway.Addr()},
			enginetest.TCP{Src: port, Dst: be(p.bytes[34:]), Ack: seq + 1, Flags: enginetest.RST | enginetest.ACK}, nil))
	}
}

func TestLoopback(t *testing.T) {
	for name, c := range map[string]struct {
		ports []Port
		pods  bool // 127.0.0.1:7777 stays in the pod
	}{"everything": {nil, false}, "listed": {[]Port{tcpPort(80)}, true}} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, c.ports...)
			l, err := r.Pod.Listen("tcp4", ":7777")
			require.NoError(t, err)
			defer l.Close()
			check := func(addr string, port uint16, guest bool, want error) {
				t.Helper()
				asked, err := r.dial(addr, port)
				require.Equal(t, guest, asked, "%s:%d", addr, port)
				require.ErrorIs(t, err, want, "%s:%d", addr, port)
			}
			check("127.0.0.1", 80, true, syscall.ECONNREFUSED)
			check("10.0.2.2", 80, true, syscall.ECONNREFUSED)
			if c.pods {
				check("127.0.0.1", 7777, false, nil)
			} else {
				check("127.0.0.1", 7777, true, syscall.ECONNREFUSED)
			}
			check(enginetest.PodIP, 80, false, syscall.ECONNREFUSED) // no hairpin
			check(enginetest.PodIP, 7777, false, nil)
		})
	}
}

// The guest's frames for the gateway and for the pod's address reach the pod's
// own listeners by the tap.
func TestGuestToPod(t *testing.T) {
	r := newRig(t, tcpPort(80))
	l, err := r.Pod.Listen("tcp4", ":7777")
	require.NoError(t, err)
	defer l.Close()
	tap := r.pod.Tap(0)
	first := true
	for _, to := range []netip.Addr{gateway.Addr(), podIP} {
		ip := enginetest.IP{Src: guestIP, Dst: to}
		answer := func(what string, match func(received) bool) {
			if first {
				r.answerARP()
				first = false
			}
			p := r.next(tap, what, match)
			require.Equal(t, guestMAC[:], p.bytes[:6])
			require.Equal(t, to.AsSlice(), p.bytes[26:30])
		}
		send(t, tap, enginetest.ICMPFrame(fromGuest(), ip, enginetest.Echo(1, 1), enginetest.Payload(56, 1)))
		answer("echo reply", icmp(0))
		send(t, tap, enginetest.TCPFrame(fromGuest(), ip, enginetest.TCP{Src: 1000, Dst: 7777, Flags: enginetest.SYN, Seq: 5}, nil))
		answer("SYN-ACK", tcp(7777, 1000, enginetest.SYN|enginetest.ACK))
		send(t, tap, enginetest.TCPFrame(fromGuest(), ip, enginetest.TCP{Src: 1000, Dst: 80, Flags: enginetest.SYN, Seq: 5}, nil))
		answer("RST", tcp(80, 1000, enginetest.RST|enginetest.ACK))
	}
}

// Big segments cross the tap whole, with the checksum left undone.
func TestTapOffload(t *testing.T) {
	r := newRig(t)
	tap := r.pod.Tap(0)
	pc, err := r.Pod.ListenPacket("udp4", ":7")
	require.NoError(t, err)
	defer pc.Close()
	ip := enginetest.IP{Src: guestIP, Dst: gateway.Addr()}
	b := enginetest.UDPFrame(fromGuest(), ip, enginetest.UDP{Src: 8, Dst: 7}, enginetest.Payload(1200, 2))
	f := gsoFrame(b, frame.ProtoUDP, 0)
	tap.Push(0, []*frame.Frame{f})
	require.Equal(t, frame.ReasonNone, f.Reason)
	require.NoError(t, pc.SetReadDeadline(time.Now().Add(deadline)))
	buf := make([]byte, 2000)
	n, from, err := pc.ReadFrom(buf)
	require.NoError(t, err)
	require.Equal(t, enginetest.Payload(1200, 2), buf[:n])
	_, err = pc.WriteTo(buf[:n], from)
	require.NoError(t, err)
	r.answerARP()
	p := r.next(tap, "datagram for the guest", udp(7, 8))
	require.EqualValues(t, frame.NeedsCsum, p.Flags&frame.NeedsCsum)
	require.EqualValues(t, 34, p.CsumStart)
	require.EqualValues(t, 6, p.CsumOffset)
	require.Equal(t, enginetest.Payload(1200, 2), p.bytes[42:])
}

// A big datagram to be cut crosses the tap whole and arrives in its parts.
func TestTapUSO(t *testing.T) {
	enginetest.Need(t, "uso")
	r := newRig(t)
	require.True(t, r.pod.Tap(0).USO)
	pc, err := r.Pod.ListenPacket("udp4", ":7")
	require.NoError(t, err)
	defer pc.Close()
	b := enginetest.UDPFrame(fromGuest(), enginetest.IP{Src: guestIP, Dst: gateway.Addr()}, enginetest.UDP{Src: 8, Dst: 7},
		enginetest.Payload(5000, 2))
	r.pod.Tap(0).Push(0, []*frame.Frame{gsoFrame(b, frame.ProtoUDP, 1000)})
	require.NoError(t, pc.SetReadDeadline(time.Now().Add(deadline)))
	for range 5 {
		n, _, err := pc.ReadFrom(make([]byte, 2000))
		require.NoError(t, err)
		require.Equal(t, 1000, n)
	}
}

// gsoFrame is a frame whose checksum, and segmentation if size is not 0, is
// left to others. The transport header must be at 34.
func gsoFrame(b []byte, proto byte, size uint16) *frame.Frame {
	b = append([]byte(nil), b...)
	f := &frame.Frame{}
	f.Flags, f.CsumStart, f.CsumOffset = frame.NeedsCsum, 34, 6
	if proto == frame.ProtoTCP {
		f.CsumOffset = 16
	}
	if size != 0 {
		f.GSO, f.GSOSize = frame.GSOUDPL4, size
		if proto == frame.ProtoTCP {
			f.GSO = frame.GSOTCPv4
		}
	}
	// The field holds the pseudo-header's sum.
	sum := frame.Sum(b[26:34], 0) + uint64(proto) + uint64(len(b)-34)
	field := 34 + int(f.CsumOffset)
	v := frame.Fold(sum)
	b[field], b[field+1] = byte(v>>8), byte(v)
	f.SetBytes(b, nil, make([][]byte, 2))
	return f
}

func TestTapAllocs(t *testing.T) {
	r := newRig(t)
	tap := r.pod.Tap(0)
	b := new(frame.Batch)
	out := gsoFrame(enginetest.UDPFrame(fromGuest(), enginetest.IP{Src: guestIP, Dst: gateway.Addr()}, enginetest.UDP{Src: 1, Dst: 2},
		make([]byte, 1000)), frame.ProtoUDP, 0)
	fs := []*frame.Frame{out}
	require.Zero(t, testing.AllocsPerRun(100, func() {
		tap.Push(0, fs)
		b.Reset(0)
		tap.Pull(b)
		tap.Release(b)
	}))
}

// A tap that has no room or is down loses frames, and says so.
func TestTapDown(t *testing.T) {
	r := newRig(t)
	enginetest.Must(t, r.Pod.Down(r.pod.Tap(0).Name()))
	f := gsoFrame(enginetest.UDPFrame(fromGuest(), enginetest.IP{Src: guestIP, Dst: gateway.Addr()}, enginetest.UDP{}, nil), frame.ProtoUDP, 0)
	f.Out = 1
	r.pod.Tap(0).Push(0, []*frame.Frame{f})
	require.Equal(t, frame.SendFailed, f.Reason)
	require.Equal(t, frame.Drop, f.Out)
}

func TestTapSettings(t *testing.T) {
	r := newRig(t)
	read := func(file, want string) {
		t.Helper()
		require.Equal(t, want+"\n", output(t, r.Pod, "ip", "netns", "exec", r.Pod.Name, "cat", "/proc/sys/net/"+file), file)
	}
	read("ipv4/conf/sw-eth0/route_localnet", "1")
	read("ipv4/conf/sw-eth0/rp_filter", "2")
	read("ipv4/conf/eth0/route_localnet", "0")
	read("ipv4/ip_local_reserved_ports", "40000-65535")
	addrs := output(t, r.Pod, "ip", "-o", "addr", "show", "dev", "sw-eth0")
	require.Contains(t, addrs, "10.0.2.1/24")
	require.NotContains(t, addrs, "inet6")
	require.Contains(t, output(t, r.Pod, "ip", "-o", "link", "show", "dev", "sw-eth0"), net.HardwareAddr(GatewayMAC[:]).String())
}
