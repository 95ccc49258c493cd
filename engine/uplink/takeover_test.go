package uplink

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/miekg/dns"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

func tcpPort(n uint16) Port { return Port{Proto: frame.ProtoTCP, Port: n} }

// syn sends a SYN from the outside to the pod.
func (r *rig) syn(src, dst uint16) {
	send(r.t, r.out, enginetest.TCPFrame(r.eth(), toPod(), enginetest.TCP{Src: src, Dst: dst, Flags: enginetest.SYN, Seq: 1}, nil))
}

// quietSince fails the test if the outside gets an unwanted frame before one
// that the pod's kernel sends later: what the kernel answers it answers while
// it receives.
func (r *rig) quietSince(unwanted func(received) bool) {
	r.t.Helper()
	const fence = 9
	c, err := r.Pod.Dial("udp4", netip.AddrPortFrom(outsideIP, fence).String(), deadline)
	require.NoError(r.t, err)
	defer c.Close()
	_, err = c.Write([]byte("fence"))
	require.NoError(r.t, err)
	src := uint16(c.LocalAddr().(*net.UDPAddr).Port)
	r.next(r.outside(), "fence", func(p received) bool {
		assert.False(r.t, unwanted(p), "unwanted frame % x", p.bytes)
		return udp(src, fence)(p)
	})
}

// sinkUntil takes what the sink has got until a datagram that is the guest's,
// and fails the test if an unwanted frame is among it.
func (r *rig) sinkUntil(unwanted func(received) bool) {
	r.t.Helper()
	const fence = 45000 // in the NAT range: the guest's in either mode
	send(r.t, r.out, enginetest.UDPFrame(r.eth(), toPod(), enginetest.UDP{Src: 9, Dst: fence}, nil))
	r.next(r.in(), "fence", func(p received) bool {
		assert.False(r.t, unwanted(p), "unwanted frame % x", p.bytes)
		return udp(9, fence)(p)
	})
}

// notFence is everything on the sink but the end of sinkUntil, and errors that
// the outside sends about quietSince's.
func notFence(p received) bool { return !udp(9, 45000)(p) && !icmp(3)(p) }

func TestEverythingIsTheGuests(t *testing.T) {
	r := newRig(t)
	for _, port := range []uint16{80, 81, 4444, 33000, 50000} {
		r.syn(1234, port)
		p := r.next(r.in(), "SYN on the sink", tcp(1234, port, enginetest.SYN))
		assert.Equal(t, frame.ReasonNone, p.reason)
		r.quietSince(func(p received) bool { return tcp(port, 1234, enginetest.RST|enginetest.ACK)(p) })
	}
	send(t, r.out, enginetest.UDPFrame(r.eth(), toPod(), enginetest.UDP{Src: 5, Dst: 80}, []byte("x")))
	r.next(r.in(), "datagram", udp(5, 80))
	send(t, r.out, enginetest.ICMPFrame(r.eth(), toPod(), enginetest.Echo(7, 1), []byte("ping")))
	r.next(r.in(), "echo request", icmp(8))
	send(t, r.out, enginetest.ICMPFrame(r.eth(), toPod(), enginetest.EchoReply(7, 1), []byte("pong")))
	r.next(r.in(), "echo reply", icmp(0))
	const gre = 47
	send(t, r.out, r.eth().Frame(frame.TypeIPv4, toPod().Packet(gre, make([]byte, 40))))
	r.next(r.in(), "GRE", func(p received) bool { return p.bytes[23] == gre })
	r.quietSince(func(p received) bool { return icmp(0)(p) || icmp(3)(p) })
}

// The pod's own processes keep their flows, although everything is published.
func TestPodKeepsItsFlows(t *testing.T) {
	r := newRig(t)
	get := func() {
		c := http.Client{Timeout: deadline, Transport: &http.Transport{
			DisableKeepAlives: true,
			DialContext: func(_ context.Context, network, addr string) (net.Conn, error) {
				return r.Pod.Dial(network, addr, deadline)
			},
		}}
		resp, err := c.Get("http://" + netip.AddrPortFrom(outsideIP, enginetest.HTTPPort).String() + "/data?bytes=1000000")
		require.NoError(t, err)
		defer resp.Body.Close()
		n, err := io.Copy(io.Discard, resp.Body)
		require.NoError(t, err)
		require.EqualValues(t, 1000000, n)
	}
	get()
	conn, err := r.Pod.Dial("udp4", netip.AddrPortFrom(outsideIP, 53).String(), deadline)
	require.NoError(t, err)
	defer conn.Close()
	require.NoError(t, conn.SetDeadline(time.Now().Add(deadline)))
	q := new(dns.Msg)
	q.SetQuestion(enginetest.OutsideName+".", dns.TypeA)
	require.NoError(t, (&dns.Conn{Conn: conn}).WriteMsg(q))
	a, err := (&dns.Conn{Conn: conn}).ReadMsg()
	require.NoError(t, err)
	require.Len(t, a.Answer, 1)
	output(t, r.Pod, "ping", "-c", "1", "-W", "5", enginetest.OutsideIP)
	get()
	r.sinkUntil(notFence)
	// A connection that the outside refuses leaves nothing with the guest.
	_, err = r.Pod.Dial("tcp4", netip.AddrPortFrom(outsideIP, 4).String(), deadline)
	require.ErrorIs(t, err, syscall.ECONNREFUSED)
	r.sinkUntil(notFence)
}

// RFC 4787 REQ-6a: what arrives keeps a flow of the pod alive.
func TestRFC4787Req6PodsFlowsAreKeptByWhatArrives(t *testing.T) {
	r := newRig(t)
	const ospf = 89
	left := func(set string) (d time.Duration) {
		t.Helper()
		enginetest.Must(t, r.Pod.Do(func() error {
			c, err := nftables.New()
			if err != nil {
				return err
			}
			table := &nftables.Table{Name: tableName("eth0"), Family: nftables.TableFamilyNetdev}
			s, err := c.GetSetByName(table, set)
			if err != nil {
				return err
			}
			elems, err := c.GetSetElements(s)
			if err == nil && len(elems) != 1 {
				err = fmt.Errorf("%d elements in %s", len(elems), set)
			}
			if err == nil {
				d = elems[0].Expires
			}
			return err
		}))
		return d
	}
	pod := r.open(r.Pod, Config{Link: "eth0", Workers: 1})
	eth, ip := enginetest.Eth{Dst: r.outMAC, Src: r.podMAC}, enginetest.IP{Src: podIP, Dst: outsideIP}
	for set, f := range map[string]struct{ out, in []byte }{
		"flows": {enginetest.UDPFrame(eth, ip, enginetest.UDP{Src: 7000, Dst: 9}, nil),
			enginetest.UDPFrame(r.eth(), toPod(), enginetest.UDP{Src: 9, Dst: 7000}, nil)},
		"others": {eth.Frame(frame.TypeIPv4, ip.Packet(ospf, make([]byte, 40))), r.eth().Frame(frame.TypeIPv4, toPod().Packet(ospf, make([]byte, 40)))},
	} {
		send(t, pod, f.out)
		fresh := left(set)
		require.Positive(t, fresh)
		var old time.Duration
		require.True(t, enginetest.Wait(deadline, func() bool { old = left(set); return old < fresh-50*time.Millisecond }))
		assert.True(t, enginetest.Wait(deadline, func() bool {
			send(t, r.out, f.in)
			r.sinkUntil(notFence)
			return left(set) > old
		}), set)
	}
}

// A RST that leaves the pod does not make the flow its own, another segment
// does.
func TestResetStartsNoFlow(t *testing.T) {
	r := newRig(t)
	pod := r.open(r.Pod, Config{Link: "eth0", Workers: 1})
	leaves := func(flags byte, port uint16) {
		send(t, pod, enginetest.TCPFrame(enginetest.Eth{Dst: r.outMAC, Src: r.podMAC}, enginetest.IP{Src: podIP, Dst: outsideIP},
			enginetest.TCP{Src: port, Dst: 1234, Flags: flags}, nil))
		r.next(r.outside(), "segment of the pod", tcp(port, 1234, flags))
	}
	leaves(enginetest.RST|enginetest.ACK, 81)
	r.syn(1234, 81)
	r.next(r.in(), "SYN", tcp(1234, 81, enginetest.SYN))
	leaves(enginetest.ACK, 82)
	r.syn(1234, 82)
	r.sinkUntil(tcp(1234, 82, enginetest.SYN))
}

// What the engine sends by way of the kernel leaves no connection there, which
// would take NAT's replies for its own.
func TestMarkedFramesAreNotTracked(t *testing.T) {
	r := newRig(t)
	var k *Kernel
	enginetest.Must(t, r.Pod.Do(func() (err error) {
		k, err = OpenKernel("eth0", 1)
		return err
	}))
	defer k.Close()
	send(t, k, enginetest.UDPFrame(enginetest.Eth{Dst: r.outMAC, Src: r.podMAC}, enginetest.IP{Src: podIP, Dst: outsideIP},
		enginetest.UDP{Src: 45001, Dst: 7}, []byte("x")))
	r.next(r.outside(), "datagram", udp(45001, 7))
	var text string
	enginetest.Must(t, r.Pod.Do(func() error {
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, netlink.FAMILY_V4)
		for _, f := range flows {
			text += f.String() + "\n"
		}
		return err
	}))
	require.NotContains(t, text, "sport=45001")
}

func TestListedPorts(t *testing.T) {
	r := newRig(t, tcpPort(80))
	l, err := r.Pod.Listen("tcp4", ":81")
	require.NoError(t, err)
	defer l.Close()

	r.syn(1234, 80)
	r.next(r.in(), "SYN on the sink", tcp(1234, 80, enginetest.SYN))
	r.quietSince(tcp(80, 1234, enginetest.RST|enginetest.ACK))

	r.syn(1234, 4444)
	r.next(r.outside(), "RST of the pod", tcp(4444, 1234, enginetest.RST|enginetest.ACK))
	r.syn(1234, 81)
	r.next(r.outside(), "SYN-ACK of the pod's listener", tcp(81, 1234, enginetest.SYN|enginetest.ACK))
	send(t, r.out, enginetest.UDPFrame(r.eth(), toPod(), enginetest.UDP{Src: 5, Dst: 80}, []byte("x")))
	r.next(r.outside(), "port unreachable", icmp(3))
	send(t, r.out, enginetest.ICMPFrame(r.eth(), toPod(), enginetest.Echo(7, 1), []byte("ping")))
	r.next(r.outside(), "echo reply of the pod", icmp(0))
	r.sinkUntil(notFence)

	// Replies to the guest come to ports of the NAT range, and to echoes of its.
	r.syn(1234, 40000)
	r.next(r.in(), "segment for the NAT range", tcp(1234, 40000, enginetest.SYN))
	send(t, r.out, enginetest.ICMPFrame(r.eth(), toPod(), enginetest.EchoReply(7, 1), nil))
	r.next(r.in(), "echo reply for the guest", icmp(0))
	output(t, r.Pod, "ping", "-c", "1", "-W", "5", enginetest.OutsideIP)
	r.sinkUntil(notFence)
}

// Where ports are listed, a protocol without ports is the guest's with a peer
// that the guest has spoken to, unless the pod has.
func TestOtherProtocolsWithListedPorts(t *testing.T) {
	r := newRig(t, tcpPort(80))
	const experiment = 253
	match := func(p received) bool { return len(p.bytes) >= 34 && p.bytes[23] == experiment }
	there := r.eth()
	there.Dst, there.Src = r.outMAC, r.podMAC
	fromOutside := func() {
		send(t, r.out, r.eth().Frame(frame.TypeIPv4, toPod().Packet(experiment, []byte("answer"))))
	}
	fromOutside()
	r.sinkUntil(notFence)
	send(t, r.up, there.Frame(frame.TypeIPv4, enginetest.IP{Src: podIP, Dst: outsideIP}.Packet(experiment, []byte("question"))))
	r.next(r.outside(), "question", match)
	fromOutside()
	r.next(r.in(), "answer on the sink", match)

	require.NoError(t, r.Pod.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, experiment)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Sendto(fd, []byte("the pod's"), 0, &unix.SockaddrInet4{Addr: outsideIP.As4()})
	}))
	r.next(r.outside(), "the pod's question", match)
	fromOutside()
	r.sinkUntil(match)
}

func TestPortsChange(t *testing.T) {
	r := newRig(t, tcpPort(80))
	guests := func(port uint16) {
		t.Helper()
		r.syn(1234, port)
		r.next(r.in(), "SYN on the sink", tcp(1234, port, enginetest.SYN))
	}
	pods := func(port uint16) {
		t.Helper()
		r.syn(1234, port)
		r.next(r.outside(), "RST of the pod", tcp(port, 1234, enginetest.RST|enginetest.ACK))
	}
	guests(80)
	pods(81)
	require.NoError(t, r.pod.AddPort(0, tcpPort(81)))
	require.Equal(t, []Port{tcpPort(80), tcpPort(81)}, r.pod.Ports(0))
	guests(81)
	require.NoError(t, r.pod.RemovePort(0, tcpPort(80)))
	pods(80)
	guests(81)
	require.ErrorContains(t, r.pod.RemovePort(0, tcpPort(80)), "port 80/TCP is not published")
	require.NoError(t, r.pod.RemovePort(0, tcpPort(81)))
	pods(81)
	require.Equal(t, []Port{}, r.pod.Ports(0), "nothing, not everything")
	require.Error(t, r.pod.AddPort(0, Port{Proto: 132, Port: 1}))
	require.NoError(t, r.pod.AddPort(0, tcpPort(82)))
	guests(82)
}

func TestManyPorts(t *testing.T) {
	var many []Port
	for i := range 5000 {
		many = append(many, Port{Proto: frame.ProtoUDP, Port: uint16(i + 1)})
	}
	r := newRig(t, many...)
	require.Equal(t, many, r.pod.Ports(0))
	require.NoError(t, r.pod.RemovePort(0, Port{Proto: frame.ProtoUDP, Port: 4999}))
	for _, port := range []uint16{1, 5000} {
		send(t, r.out, enginetest.UDPFrame(r.eth(), toPod(), enginetest.UDP{Src: 5, Dst: port}, nil))
		r.next(r.in(), "datagram", udp(5, port))
	}
	send(t, r.out, enginetest.UDPFrame(r.eth(), toPod(), enginetest.UDP{Src: 5, Dst: 4999}, nil))
	r.next(r.outside(), "port unreachable", icmp(3))
}

// Where everything is published there is no list to change.
func TestEverythingHasNoList(t *testing.T) {
	r := newRig(t)
	require.Nil(t, r.pod.Ports(0))
	require.NoError(t, r.pod.AddPort(0, tcpPort(80)))
	require.Error(t, r.pod.RemovePort(0, tcpPort(80)))
	r.syn(1234, 83)
	r.next(r.in(), "SYN on the sink", tcp(1234, 83, enginetest.SYN))
}

// Only the two flow tables know whose packet an ICMP error quotes.
func TestErrorsGoBothWays(t *testing.T) {
	for name, ports := range map[string][]Port{"everything": nil, "listed": {tcpPort(80)}} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, ports...)
			c, err := r.Pod.Dial("udp4", netip.AddrPortFrom(outsideIP, 7).String(), deadline)
			require.NoError(t, err)
			defer c.Close()
			port := uint16(c.LocalAddr().(*net.UDPAddr).Port)
			ip := enginetest.IP{Src: podIP, Dst: outsideIP}
			quoted := ip.Packet(frame.ProtoUDP, enginetest.UDP{Src: port, Dst: 7}.Datagram(ip, nil))
			send(t, r.out, enginetest.ICMPFrame(r.eth(), toPod(), enginetest.ICMP{Type: 3, Code: 3}, quoted))
			r.next(r.in(), "copy of the error", icmp(3))
			require.NoError(t, c.SetDeadline(time.Now().Add(deadline)))
			_, err = c.Read(make([]byte, 10))
			require.ErrorIs(t, err, syscall.ECONNREFUSED)
		})
	}
}

// fragments cuts a UDP datagram into two IPv4 fragments.
func (r *rig) fragments(src, dst, id uint16) (first, second []byte) {
	whole := enginetest.UDP{Src: src, Dst: dst}.Datagram(toPod(), enginetest.Payload(1000, 3))
	ip := toPod()
	ip.ID, ip.Frag = id, frame.MoreFragments
	first = r.eth().Frame(frame.TypeIPv4, ip.Packet(frame.ProtoUDP, whole[:512]))
	ip.Frag = 512 / 8
	return first, r.eth().Frame(frame.TypeIPv4, ip.Packet(frame.ProtoUDP, whole[512:]))
}

func TestFragments(t *testing.T) {
	r := newRig(t, Port{Proto: frame.ProtoUDP, Port: 80})
	pc, err := r.Pod.ListenPacket("udp4", ":81")
	require.NoError(t, err)
	defer pc.Close()
	second := func(p received) bool { return be(p.bytes[20:]) == 512/8 }
	podGets := func(what string) {
		t.Helper()
		require.NoError(t, pc.SetReadDeadline(time.Now().Add(deadline)))
		n, _, err := pc.ReadFrom(make([]byte, 2000))
		require.NoError(t, err, what)
		require.Equal(t, 1000, n)
	}

	a, b := r.fragments(9, 80, 1)
	send(t, r.out, a, b)
	r.next(r.in(), "first fragment", udp(9, 80))
	r.next(r.in(), "second fragment", second)

	a, b = r.fragments(9, 81, 2)
	send(t, r.out, a, b)
	podGets("in order")
	r.sinkUntil(notFence)

	// Ahead of its first, a fragment goes both ways.
	a, b = r.fragments(9, 81, 3)
	send(t, r.out, b, a)
	podGets("out of order")
	r.next(r.in(), "copy of the second fragment", second)
	a, b = r.fragments(9, 80, 4)
	send(t, r.out, b, a)
	r.next(r.in(), "second fragment", second)
	r.next(r.in(), "first fragment", udp(9, 80))
}

// What is not for the pod's address, tagged or not unicast is not touched.
func TestForeignFramesStay(t *testing.T) {
	r := newRig(t)
	seg := enginetest.TCP{Src: 1, Dst: 2, Flags: enginetest.SYN}
	tagged := r.eth()
	tagged.VLAN = 5
	other := toPod()
	other.Dst = netip.MustParseAddr("10.244.1.6")
	foreign := r.eth()
	foreign.Dst = frame.MAC{2, 9, 9, 9, 9, 9}
	bcast := r.eth()
	bcast.Dst = frame.Broadcast
	send(t, r.out,
		enginetest.TCPFrame(tagged, toPod(), seg, nil), enginetest.TCPFrame(r.eth(), other, seg, nil),
		enginetest.TCPFrame(foreign, toPod(), seg, nil), enginetest.TCPFrame(bcast, toPod(), seg, nil),
		enginetest.ARPFrame(r.eth(), enginetest.ARPRequest, r.outMAC, outsideIP, frame.MAC{}, podIP))
	r.next(r.outside(), "ARP reply of the pod's kernel", func(p received) bool {
		return p.bytes[12] == 8 && p.bytes[13] == 6 && p.bytes[21] == enginetest.ARPReply
	})
	r.sinkUntil(notFence)
}

func TestRestore(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun")
	for name, original := range map[string]string{
		"none": "\n", "one": "8080", "long": longList(), "overlapping": "39990-40010,50000,65535",
	} {
		t.Run(name, func(t *testing.T) {
			w := enginetest.NewWorld(t, enginetest.WorldOptions{})
			enginetest.Must(t, w.Pod.Sysctl("net/ipv4/ip_local_reserved_ports", original))
			before := state(t, w.Pod)
			take := func() (p *Pod) {
				t.Helper()
				enginetest.Must(t, w.Pod.Do(func() (err error) {
					p, err = Takeover(TakeoverConfig{Link: "eth0", Guests: guests(tcpPort(80))})
					return err
				}))
				require.Equal(t, podIP, p.Addr())
				require.Empty(t, p.Warnings)
				require.NotEqual(t, before, state(t, w.Pod))
				return p
			}
			require.NoError(t, take().Restore())
			require.Equal(t, before, state(t, w.Pod))

			// A run that crashed keeps its tables; the next one cleans up.
			crash(t, take())
			require.NotEqual(t, before, state(t, w.Pod))
			enginetest.Must(t, w.Pod.Do(func() error { return Cleanup("eth0") }))
			require.Equal(t, before, state(t, w.Pod))
			enginetest.Must(t, w.Pod.Do(func() error { return Cleanup("eth0") })) // nothing to do

			// Or takes them up, and still knows what there was before.
			crash(t, take())
			p := take()
			enginetest.Must(t, w.Pod.Do(func() error {
				require.ErrorIs(t, Cleanup("eth0"), ErrInUse)
				_, err := Takeover(TakeoverConfig{Link: "eth0", Guests: guests()})
				require.ErrorIs(t, err, ErrInUse)
				return nil
			}))
			require.NoError(t, p.Restore())
			require.NoError(t, p.Restore(), "once more")
			require.Equal(t, before, state(t, w.Pod))
		})
	}
}

// longList is more than one comment can carry.
func longList() string {
	m := new(portMap)
	for p := 1000; p < 3000; p += 7 {
		m.set(p, p+p%3)
	}
	return m.String()
}

// crash ends a run as the end of its process would.
func crash(t *testing.T, p *Pod) {
	t.Helper()
	require.NoError(t, errors.Join(p.taps[0].Close(), unix.Close(p.sink), unix.Close(p.ns)))
}

// What others reserve while we run stays reserved.
func TestRestoreKeepsOthersPorts(t *testing.T) {
	r := newRig(t)
	enginetest.Must(t, r.Pod.Sysctl("net/ipv4/ip_local_reserved_ports", "7,40000-65535"))
	require.NoError(t, r.pod.Restore())
	enginetest.Must(t, r.Pod.Do(func() error {
		m, err := readPorts()
		require.NoError(t, err)
		require.Equal(t, "7", m.String())
		return nil
	}))
}

func TestTakeoverRefuses(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	good := func() TakeoverConfig { return TakeoverConfig{Link: "eth0", Guests: guests()} }
	before := state(t, w.Pod)
	for name, c := range map[string]struct {
		change func(*TakeoverConfig)
		want   string
	}{
		"no link":      {func(c *TakeoverConfig) { c.Link = "eth7" }, "no such link: eth7 (there are: "},
		"no address":   {func(c *TakeoverConfig) { c.Link = "lo" }, "not Ethernet"},
		"guest":        {func(c *TakeoverConfig) { c.Guests[0].Addr = gateway.Addr() }, "not two IPv4 addresses"},
		"other prefix": {func(c *TakeoverConfig) { c.Guests[0].Addr = podIP }, "not two IPv4 addresses"},
		"IPv6 guest":   {func(c *TakeoverConfig) { c.Guests[0].Addr = netip.IPv6LinkLocalAllNodes() }, "not two IPv4 addresses"},
		"range":        {func(c *TakeoverConfig) { c.NAT = PortRange{5, 4} }, "is empty"},
		"port 0":       {func(c *TakeoverConfig) { c.Guests[0].Ports = []Port{tcpPort(0)} }, "port 0/TCP cannot be published"},
		"protocol":     {func(c *TakeoverConfig) { c.Guests[0].Ports = []Port{{Proto: 132, Port: 80}} }, "port 80 of protocol 132 cannot be published"},
		"nobody":       {func(c *TakeoverConfig) { c.Guests = nil }, "no guest"},
		"one network":  {func(c *TakeoverConfig) { c.Guests = append(c.Guests, guests(tcpPort(80))...) }, "overlap"},
		"one port": {func(c *TakeoverConfig) {
			c.Guests = append(guests(tcpPort(80), tcpPort(81)), other(tcpPort(79), tcpPort(80)))
		}, "two guests have port 80/TCP"},
		"two with everything": {func(c *TakeoverConfig) { c.Guests = append(c.Guests, other()) }, "two guests have everything"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := good()
			c.change(&cfg)
			enginetest.Must(t, w.Pod.Do(func() error {
				_, err := Takeover(cfg)
				require.ErrorContains(t, err, c.want)
				return nil
			}))
		})
	}
	require.Equal(t, before, state(t, w.Pod))
}

// other is a second guest behind the pod.
func other(ports ...Port) Guest {
	return Guest{Addr: netip.MustParseAddr("10.0.3.2"), Gateway: netip.MustParsePrefix("10.0.3.1/24"), Ports: ports}
}

// Two guests have a tap and a list each; what either has leaves the stack.
func TestTwoGuests(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun")
	for name, first := range map[string][]Guest{"lists": guests(tcpPort(80)), "one with everything": guests()} {
		t.Run(name, func(t *testing.T) {
			r := worldRig(t)
			before := state(t, r.Pod)
			r.takeOver(append(first, other(tcpPort(81)))...)
			for _, port := range []uint16{80, 81} {
				r.syn(1000+port, port)
				r.next(r.in(), "SYN", tcp(1000+port, port, enginetest.SYN))
			}
			require.Equal(t, []Port{tcpPort(81)}, r.pod.Ports(1))
			require.NoError(t, r.pod.AddPort(1, tcpPort(82)))
			// The pod reaches each by its own port of 127.0.0.1.
			for i, port := range []uint16{80, 81, 82} {
				go r.Pod.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", port), time.Second)
				want := []netip.Addr{guestIP, other().Addr, other().Addr}[i]
				r.next(r.pod.Tap(min(i, 1)), "ARP request", func(p received) bool {
					return be(p.bytes[12:]) == frame.TypeARP && netip.AddrFrom4([4]byte(p.bytes[38:42])) == want
				})
			}
			require.NoError(t, r.pod.Restore())
			require.Equal(t, before, state(t, r.Pod))
		})
	}
}

func TestPortMap(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "\n": "", "80\n": "80", "1,2,3": "1-3", "0,65535": "0,65535", "40000-65535": "40000-65535", "5-7,6-9,1": "1,5-9",
	} {
		m, err := parsePorts(in)
		require.NoError(t, err)
		require.Equal(t, want, m.String())
	}
	for _, in := range []string{"x", "1-", "70000", "-1", "1--2"} {
		_, err := parsePorts(in)
		require.Error(t, err, in)
	}
}

func TestNames(t *testing.T) {
	require.Equal(t, "sw-eth0", TapName("eth0", 0))
	require.Equal(t, "swin-eth0", sinkName("eth0"))
	for _, n := range []string{"pod72ad293a5c9", "abcdefghijklmno"} {
		require.Less(t, len(sinkName(n)), unix.IFNAMSIZ)
	}
	require.NotEqual(t, sinkName("pod72ad293a5c9"), sinkName("pod72ad293a5c8"))
}

// Connections that were there before stay with the pod.
func TestOlderConnectionsStay(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	l, err := w.Outside.Listen("tcp4", enginetest.OutsideIP+":7")
	require.NoError(t, err)
	defer l.Close()
	c, err := w.Pod.Dial("tcp4", enginetest.OutsideIP+":7", deadline)
	require.NoError(t, err)
	defer c.Close()
	peer, err := l.Accept()
	require.NoError(t, err)
	defer peer.Close()
	var p *Pod
	enginetest.Must(t, w.Pod.Do(func() (err error) {
		p, err = Takeover(TakeoverConfig{Link: "eth0", Guests: guests()})
		return err
	}))
	defer p.Restore()
	_, err = peer.Write([]byte("hello"))
	require.NoError(t, err)
	require.NoError(t, c.SetReadDeadline(time.Now().Add(deadline)))
	b := make([]byte, 5)
	_, err = io.ReadFull(c, b)
	require.NoError(t, err)
	require.Equal(t, "hello", string(b))
}

func TestPortFree(t *testing.T) {
	r := newRig(t)
	free := func(proto uint8, port uint16, want bool) {
		t.Helper()
		require.Eventually(t, func() bool { return r.pod.PortFree(proto, port) == want }, deadline, 10*time.Millisecond)
	}
	free(frame.ProtoTCP, 50000, true)
	l, err := r.Pod.Listen("tcp", ":50000")
	require.NoError(t, err)
	free(frame.ProtoTCP, 50000, false)
	free(frame.ProtoUDP, 50000, true)
	pc, err := r.Pod.ListenPacket("udp4", enginetest.PodIP+":50000")
	require.NoError(t, err)
	defer pc.Close()
	lo, err := r.Pod.Listen("tcp4", "127.0.0.1:50001")
	require.NoError(t, err)
	defer lo.Close()
	free(frame.ProtoUDP, 50000, false)
	require.True(t, r.pod.PortFree(frame.ProtoTCP, 50001), "loopback is nobody's business")
	require.NoError(t, l.Close())
	free(frame.ProtoTCP, 50000, true)
	require.True(t, r.pod.PortFree(frame.ProtoICMP, 50000))
	require.Zero(t, testing.AllocsPerRun(10, func() { r.pod.PortFree(frame.ProtoTCP, 1) }))
}

func TestParseSocket(t *testing.T) {
	for line, want := range map[string]string{
		"0: 0100007F:0035 00000000:0000 0A 00000000:0":                                            "127.0.0.1:53 0.0.0.0:0 10",
		"1: 0501F40A:9C40 0101F40A:0050 01 0":                                                     "10.244.1.5:40000 10.244.1.1:80 1",
		"2: 00000000000000000000000000000000:1F90 00000000000000000000000000000000:0000 0A":       "[::]:8080 [::]:0 10",
		"3: 0000000000000000FFFF00000501F40A:0016 0000000000000000FFFF00000101F40A:8000 01 00000": "10.244.1.5:22 10.244.1.1:32768 1",
	} {
		s, ok := parseSocket(line)
		require.True(t, ok, line)
		require.Equal(t, want, fmt.Sprint(s.local, " ", s.remote, " ", s.state))
	}
	for _, line := range []string{"", "sl local_address rem_address st", "0: 01:0 02:0 01", "0: xx:0035 00000000:0000 0A", "1: 0100007F 00000000:0 0A"} {
		_, ok := parseSocket(line)
		require.False(t, ok, line)
	}
}

// Without the right to write /proc/sys the NAT range moves out of the kernel's
// way, and we say so.
func TestEvade(t *testing.T) {
	for kernel, want := range map[PortRange]PortRange{
		{32768, 60999}: {61000, 65535}, {32768, 65000}: {1024, 32767}, {1024, 65000}: {},
	} {
		p := &Pod{kernel: kernel}
		require.Equal(t, want != PortRange{}, p.evade(), kernel)
		require.Equal(t, want, p.c.NAT, kernel)
	}
}

func TestReadOnlySysctl(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun")
	for kernel, want := range map[string]PortRange{"32768 60999": {61000, 65535}, "20000 65535": {1024, 19999}} {
		w := enginetest.NewWorld(t, enginetest.WorldOptions{})
		enginetest.Must(t, w.Pod.Sysctl("net/ipv4/ip_local_port_range", kernel))
		before := state(t, w.Pod)
		enginetest.Must(t, w.Pod.Do(func() error {
			runtime.LockOSThread() // for good: the thread ends with its mounts
			if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
				return err
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return err
			}
			if err := unix.Mount("/proc/sys", "/proc/sys", "", unix.MS_BIND, ""); err != nil {
				return err
			}
			if err := unix.Mount("", "/proc/sys", "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
				return err
			}
			p, err := Takeover(TakeoverConfig{Link: "eth0", Guests: guests()})
			require.NoError(t, err)
			require.Equal(t, want, p.NAT())
			var lo, hi uint16
			_, err = fmt.Sscan(kernel, &lo, &hi)
			require.NoError(t, err)
			require.Equal(t, PortRange{lo, hi}, p.KernelRange(), "all of it")
			require.Len(t, p.Warnings, 1)
			require.Contains(t, p.Warnings[0], "cannot reserve ports")
			return p.Restore()
		}))
		require.Equal(t, before, state(t, w.Pod))
	}
}

// The pod's kernel has what it had, less what was reserved for NAT.
func TestKernelRange(t *testing.T) {
	for _, c := range []struct{ kernel, nat, want PortRange }{
		{PortRange{32768, 60999}, PortRange{40000, 65535}, PortRange{32768, 39999}},
		{PortRange{1024, 65535}, PortRange{40000, 65535}, PortRange{1024, 39999}},
		{PortRange{32768, 60999}, PortRange{61000, 65535}, PortRange{32768, 60999}},
		{PortRange{32768, 60999}, PortRange{1024, 32767}, PortRange{32768, 60999}},
		{PortRange{32768, 60999}, PortRange{1024, 39999}, PortRange{40000, 60999}},
		{PortRange{50000, 60999}, PortRange{40000, 65535}, PortRange{1, 0}},
		{PortRange{32768, 60999}, PortRange{40000, 50000}, PortRange{32768, 60999}},
	} {
		require.Equal(t, c.want, c.kernel.without(c.nat))
	}
	enginetest.Need(t, "root", "netns", "tun")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	enginetest.Must(t, w.Pod.Sysctl("net/ipv4/ip_local_port_range", "20000 50000"))
	enginetest.Must(t, w.Pod.Do(func() error {
		p, err := Takeover(TakeoverConfig{Link: "eth0", Guests: guests()})
		require.NoError(t, err)
		require.Equal(t, PortRange{20000, 39999}, p.KernelRange())
		require.Equal(t, DefaultNAT, p.NAT())
		return p.Restore()
	}))
}
