package dhcp

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

const (
	msgDiscover = dhcpv4.MessageTypeDiscover
	msgRequest  = dhcpv4.MessageTypeRequest
)

func addr(a netip.Addr) net.IP { return net.IP(a.AsSlice()) }

// The whole exchange with messages that the codec's own client would send.
func TestExchange(t *testing.T) {
	var leased []frame.MAC
	c := masquerade()
	c.OnLease = func(m frame.MAC) { leased = append(leased, m) }
	n := newBench(t, c)
	d, err := dhcpv4.NewDiscovery(net.HardwareAddr(guestMAC[:]))
	require.NoError(t, err)
	o := n.mustAnswer(broadcastFrame(d), dhcpv4.MessageTypeOffer)
	assert.Equal(t, d.TransactionID, o.TransactionID)
	assert.Equal(t, addr(guestIP), o.YourIPAddr.To4())
	assert.Empty(t, n.s.Leases(), "an offer is no lease")
	assert.Empty(t, leased)

	r, err := dhcpv4.NewRequestFromOffer(o.DHCPv4)
	require.NoError(t, err)
	a := n.mustAnswer(broadcastFrame(r), dhcpv4.MessageTypeAck)
	assert.Equal(t, addr(guestIP), a.YourIPAddr.To4())
	require.Len(t, n.s.Leases(), 1)

	renew, err := dhcpv4.NewRenewFromAck(a.DHCPv4)
	require.NoError(t, err)
	a = n.mustAnswer(unicastFrame(renew), dhcpv4.MessageTypeAck)
	assert.Equal(t, addr(guestIP), a.ClientIPAddr.To4())
	assert.Equal(t, guestIP.AsSlice(), []byte(a.ip.DstIP.To4()))

	release, err := dhcpv4.NewReleaseFromACK(a.DHCPv4)
	require.NoError(t, err)
	assert.Nil(t, n.ask(unicastFrame(release)))
	assert.Empty(t, n.s.Leases())
	assert.Equal(t, Stats{Discover: 1, Request: 2, Release: 1, Offer: 1, Ack: 2}, n.s.Stats())
	assert.Equal(t, []frame.MAC{guestMAC, guestMAC}, leased, "for each ACK to a REQUEST")
}

// RFC 2131, section 4.3.2: what a REQUEST gets in each of the client's states.
func TestRequestStatesRow65(t *testing.T) {
	foreign := []byte{192, 168, 1, 50}
	otherServer := opt(optServerID, 10, 0, 2, 254)
	ours := opt(optServerID, ip4(serverIP)...)
	good, bad := opt(optRequestedIP, ip4(guestIP)...), opt(optRequestedIP, foreign...)
	from := func(ip []byte) dhcpv4.Modifier { return dhcpv4.WithClientIP(ip) }
	const silence = dhcpv4.MessageTypeNone
	for _, c := range []struct {
		name     string
		mods     []dhcpv4.Modifier
		want     dhcpv4.MessageType
		kubevirt dhcpv4.MessageType
	}{
		{"selecting", []dhcpv4.Modifier{ours, good}, dhcpv4.MessageTypeAck, dhcpv4.MessageTypeAck},
		{"selecting, foreign address", []dhcpv4.Modifier{ours, bad}, dhcpv4.MessageTypeNak, dhcpv4.MessageTypeAck},
		{"selecting, same network", []dhcpv4.Modifier{ours, opt(optRequestedIP, 10, 0, 2, 9)}, dhcpv4.MessageTypeNak, dhcpv4.MessageTypeAck},
		{"selecting, no address", []dhcpv4.Modifier{ours}, dhcpv4.MessageTypeAck, dhcpv4.MessageTypeAck},
		{"another server", []dhcpv4.Modifier{otherServer, good}, silence, dhcpv4.MessageTypeAck},
		{"another server and address", []dhcpv4.Modifier{otherServer, bad}, silence, dhcpv4.MessageTypeAck},
		{"init-reboot", []dhcpv4.Modifier{good}, dhcpv4.MessageTypeAck, dhcpv4.MessageTypeAck},
		{"init-reboot, foreign address (#13601)", []dhcpv4.Modifier{bad}, dhcpv4.MessageTypeNak, dhcpv4.MessageTypeAck},
		{"renewing", []dhcpv4.Modifier{from(guestIP.AsSlice())}, dhcpv4.MessageTypeAck, dhcpv4.MessageTypeAck},
		{"renewing, foreign address", []dhcpv4.Modifier{from(foreign)}, dhcpv4.MessageTypeNak, dhcpv4.MessageTypeAck},
		{"no address at all", nil, silence, dhcpv4.MessageTypeAck},
	} {
		t.Run(c.name, func(t *testing.T) {
			for _, compat := range []bool{false, true} {
				cfg := masquerade()
				cfg.KubeVirtCompat = compat
				n := newBench(t, cfg)
				a := n.ask(broadcastFrame(message(t, msgRequest, c.mods...)))
				want := c.want
				if compat {
					want = c.kubevirt
				}
				if want == silence {
					assert.Nil(t, a)
					assert.EqualValues(t, 1, n.s.Stats().Silent)
					continue
				}
				require.NotNil(t, a)
				assert.Equal(t, want, a.MessageType())
				assert.Len(t, n.s.Leases(), map[bool]int{true: 1}[want == dhcpv4.MessageTypeAck])
			}
		})
	}
}

// RFC 2131, table 3: a NAK has no addresses and only what it must have.
func TestNakRow65(t *testing.T) {
	n := newBench(t, masquerade())
	m := message(t, msgRequest, opt(optRequestedIP, 1, 2, 3, 4), opt(optClientID, 1, 2, 3))
	a := n.mustAnswer(unicastFrame(m), dhcpv4.MessageTypeNak)
	assert.Equal(t, []byte{optType, optServerID, optMessage, optClientID}, codes(a.raw))
	assert.True(t, a.YourIPAddr.IsUnspecified())
	assert.True(t, a.ClientIPAddr.IsUnspecified())
	assert.True(t, a.ServerIPAddr.IsUnspecified())
	assert.Equal(t, addr(allOnes), a.ip.DstIP.To4(), "always broadcast")
	assert.Equal(t, net.HardwareAddr(frame.Broadcast[:]), a.eth.DstMAC)

	renew := message(t, msgRequest, dhcpv4.WithClientIP(net.IP{10, 0, 2, 9}))
	a = n.mustAnswer(unicastFrame(renew), dhcpv4.MessageTypeNak)
	assert.Equal(t, addr(allOnes), a.ip.DstIP.To4(), "also where ciaddr is given")

	m.GatewayIPAddr = net.IP{10, 0, 2, 9}
	a = n.mustAnswer(broadcastFrame(m), dhcpv4.MessageTypeNak)
	assert.True(t, a.IsBroadcast(), "the relay must broadcast it")
	assert.Equal(t, net.IP{10, 0, 2, 9}, a.ip.DstIP.To4())
}

// RFC 2131, section 4.1: where answers go.
func TestDestination(t *testing.T) {
	gw := net.IP{10, 0, 2, 77}
	for _, c := range []struct {
		name     string
		p        []byte
		mac      frame.MAC
		ip       net.IP
		port     uint16
		kubevirt net.IP
	}{
		{"unicast", broadcastFrame(message(t, msgDiscover)), guestMAC, addr(guestIP), 68, addr(allOnes)},
		{"broadcast flag", broadcastFrame(message(t, msgDiscover, dhcpv4.WithBroadcast(true))), frame.Broadcast, addr(allOnes), 68, addr(allOnes)},
		{"ciaddr", unicastFrame(message(t, msgRequest, dhcpv4.WithClientIP(addr(guestIP)))), guestMAC, addr(guestIP), 68, addr(guestIP)},
		{"ciaddr wins over the flag", unicastFrame(message(t, msgRequest, dhcpv4.WithClientIP(addr(guestIP)), dhcpv4.WithBroadcast(true))), guestMAC, addr(guestIP), 68, addr(allOnes)},
		{"giaddr", broadcastFrame(message(t, msgDiscover, dhcpv4.WithRelay(gw))), guestMAC, gw, 67, addr(allOnes)},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := newBench(t, masquerade()).ask(c.p)
			require.NotNil(t, a)
			assert.Equal(t, net.HardwareAddr(c.mac[:]), a.eth.DstMAC)
			assert.Equal(t, net.HardwareAddr(DefaultServerMAC[:]), a.eth.SrcMAC)
			assert.Equal(t, c.ip, a.ip.DstIP.To4())
			assert.Equal(t, addr(serverIP), a.ip.SrcIP.To4())
			assert.EqualValues(t, 67, a.udp.SrcPort)
			assert.EqualValues(t, c.port, a.udp.DstPort)

			cfg := masquerade()
			cfg.KubeVirtCompat = true
			a = newBench(t, cfg).ask(c.p)
			require.NotNil(t, a)
			assert.Equal(t, c.kubevirt, a.ip.DstIP.To4())
		})
	}
}

// RFC 2131, section 4.3.5.
func TestInform(t *testing.T) {
	n := newBench(t, masquerade())
	m := message(t, dhcpv4.MessageTypeInform, dhcpv4.WithClientIP(net.IP{10, 0, 2, 40}))
	a := n.mustAnswer(wrap(m.ToBytes(), netip.MustParseAddr("10.0.2.40"), allOnes), dhcpv4.MessageTypeAck)
	assert.True(t, a.YourIPAddr.IsUnspecified())
	assert.NotContains(t, codes(a.raw), byte(optLeaseTime))
	assert.Contains(t, codes(a.raw), byte(optDNS))
	assert.Equal(t, net.IP{10, 0, 2, 40}, a.ip.DstIP.To4())
	assert.Empty(t, n.s.Leases())

	m = message(t, dhcpv4.MessageTypeInform, dhcpv4.WithClientIP(net.IP{192, 168, 7, 7}))
	assert.Nil(t, n.ask(broadcastFrame(m)), "another network")

	m = message(t, dhcpv4.MessageTypeInform)
	a = n.mustAnswer(wrap(m.ToBytes(), guestIP, allOnes), dhcpv4.MessageTypeAck)
	assert.Equal(t, addr(guestIP), a.ip.DstIP.To4(), "Windows leaves ciaddr empty")

	c := masquerade()
	c.KubeVirtCompat = true
	assert.Nil(t, newBench(t, c).ask(broadcastFrame(m)))
}

func TestReleaseAndDecline(t *testing.T) {
	release := func(ip net.IP, mods ...dhcpv4.Modifier) []byte {
		return unicastFrame(message(t, dhcpv4.MessageTypeRelease, append(mods, dhcpv4.WithClientIP(ip))...))
	}
	decline := func(mods ...dhcpv4.Modifier) []byte {
		return broadcastFrame(message(t, dhcpv4.MessageTypeDecline, mods...))
	}
	good := opt(optRequestedIP, ip4(guestIP)...)
	other := opt(optServerID, 10, 0, 2, 200)
	for _, c := range []struct {
		name   string
		p      []byte
		leases int
	}{
		{"release", release(addr(guestIP)), 0},
		{"release of another address", release(net.IP{10, 0, 2, 9}), 1},
		{"release to another server", release(addr(guestIP), other), 1},
		{"release by another client", release(addr(guestIP), dhcpv4.WithHwAddr(otherMAC[:])), 1},
		{"decline", decline(good, opt(optServerID, ip4(serverIP)...)), 0},
		{"decline of nothing", decline(), 1},
		{"decline to another server", decline(good, other), 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newBench(t, masquerade())
			n.mustAnswer(selecting(t), dhcpv4.MessageTypeAck)
			assert.Nil(t, n.ask(c.p))
			assert.Len(t, n.s.Leases(), c.leases)
			// There is only one address, so it is offered again.
			n.mustAnswer(broadcastFrame(message(t, msgDiscover)), dhcpv4.MessageTypeOffer)
		})
	}
	c := masquerade()
	c.KubeVirtCompat = true
	n := newBench(t, c)
	n.mustAnswer(selecting(t), dhcpv4.MessageTypeAck)
	assert.Nil(t, n.ask(release(addr(guestIP))))
	assert.Len(t, n.s.Leases(), 1, "KubeVirt ignores RELEASE")
}

// RFC 4039.
func TestRapidCommit(t *testing.T) {
	n := newBench(t, masquerade())
	m := message(t, msgDiscover, opt(optRapidCommit))
	a := n.mustAnswer(broadcastFrame(m), dhcpv4.MessageTypeAck)
	assert.Contains(t, codes(a.raw), byte(optRapidCommit))
	assert.Len(t, n.s.Leases(), 1)
	a = n.mustAnswer(selecting(t, opt(optRapidCommit)), dhcpv4.MessageTypeAck)
	assert.NotContains(t, codes(a.raw), byte(optRapidCommit), "only in answer to DISCOVER")
}

// RFC 6842 and RFC 3046, section 2.2.
func TestEcho(t *testing.T) {
	id, relay := []byte{255, 1, 2, 3, 4, 0, 1}, []byte{1, 4, 'p', 'o', 'r', 't'}
	m := message(t, msgDiscover, opt(optClientID, id...), opt(optRelay, relay...))
	a := newBench(t, masquerade()).mustAnswer(broadcastFrame(m), dhcpv4.MessageTypeOffer)
	assert.Equal(t, id, a.Options[optClientID])
	assert.Equal(t, relay, a.Options[optRelay])
	cs := codes(a.raw)
	assert.Equal(t, byte(optRelay), cs[len(cs)-1], "last")

	c := masquerade()
	c.KubeVirtCompat = true
	a = newBench(t, c).mustAnswer(broadcastFrame(m), dhcpv4.MessageTypeOffer)
	assert.NotContains(t, a.Options, uint8(optClientID))
	assert.NotContains(t, a.Options, uint8(optRelay))
}

// One lease to a port: a guest that boots from the network changes its client
// identifier, and 10^6 hardware addresses get the same one (H091).
func TestH091OneLease(t *testing.T) {
	n := newBench(t, masquerade())
	for i := range 10000 {
		mac := frame.MAC{2, 0, byte(i >> 16), byte(i >> 8), byte(i), 1}
		a := n.mustAnswer(selecting(t, dhcpv4.WithHwAddr(mac[:]), opt(optClientID, mac[:]...)), dhcpv4.MessageTypeAck)
		require.Equal(t, addr(guestIP), a.YourIPAddr.To4())
		require.Len(t, n.s.Leases(), 1)
	}
	assert.EqualValues(t, 9999, n.s.Stats().Takeover)
}

// A server's message from the guest goes nowhere (H091).
func TestH091ServerFromGuest(t *testing.T) {
	n := newBench(t, masquerade())
	offer := message(t, dhcpv4.MessageTypeOffer)
	offer.OpCode = dhcpv4.OpcodeBootReply
	e, ip := enginetest.Eth{Dst: frame.Broadcast, Src: guestMAC}, enginetest.IP{Src: guestIP, Dst: allOnes}
	in, out := n.process(
		enginetest.UDPFrame(e, ip, enginetest.UDP{Src: 67, Dst: 68}, offer.ToBytes()),
		enginetest.UDPFrame(e, ip, enginetest.UDP{Src: 67, Dst: 67}, offer.ToBytes()))
	assert.Empty(t, out)
	assert.Equal(t, frame.Policy, in[0].Reason)
	assert.Equal(t, frame.BadDHCP, in[1].Reason)
	assert.EqualValues(t, 1, n.s.Stats().FromServer)
}

func TestRateLimit(t *testing.T) {
	n := newBench(t, masquerade())
	p := broadcastFrame(message(t, msgDiscover))
	count := func(now int64) (answered int) {
		for range 4 {
			enginetest.Fill(n.b, bytes.Split(bytes.Repeat(append(p, "--split--"...), 50), []byte("--split--"))[:50]...)
			n.b.Now = now
			n.s.Process(n.b)
			for i := range 50 {
				if f := n.b.Frame(i); f.Out == frame.Consumed {
					answered++
				} else {
					require.Equal(t, frame.RateLimited, f.Reason)
				}
			}
		}
		return answered
	}
	assert.Equal(t, 100, count(1))
	assert.Equal(t, 50, count(1+int64(time.Second)), "50 a second")
	assert.Equal(t, 100, count(int64(time.Hour)))
	assert.Equal(t, 0, count(1), "a clock that stands still gives nothing")
	assert.EqualValues(t, 100+150+100+200, n.s.Stats().RateLimited)
}

// A server that is to be alone answers as any other. What it leaves to others
// goes no further, however it is sent; it knows nothing of what is no DHCP.
func TestAlone(t *testing.T) {
	m, other := message(t, msgDiscover), message(t, msgDiscover, dhcpv4.WithHwAddr(otherMAC[:]))
	e := enginetest.Eth{Dst: frame.Broadcast, Src: guestMAC}
	ip := enginetest.IP{Src: guestIP, Dst: netip.MustParseAddr("10.9.9.9")}
	toServer := enginetest.UDP{Src: 68, Dst: 67}
	first, last := ip, ip
	first.Frag, last.Frag = frame.MoreFragments, 1
	for name, c := range map[string]struct {
		p   []byte
		gso uint8
		ask bool
	}{
		"another MAC":    {broadcastFrame(other), 0, true},
		"another server": {enginetest.UDPFrame(e, ip, toServer, m.ToBytes()), 0, true},
		"first fragment": {enginetest.UDPFrame(e, first, toServer, m.ToBytes()), 0, true},
		"GSO":            {broadcastFrame(m), frame.GSOUDPL4, true},
		"last fragment":  {enginetest.UDPFrame(e, last, toServer, m.ToBytes()), 0, false},
		"other port":     {enginetest.UDPFrame(e, ip, enginetest.UDP{Src: 68, Dst: 68}, m.ToBytes()), 0, false},
		"TCP":            {enginetest.TCPFrame(e, ip, enginetest.TCP{Src: 68, Dst: 67}, m.ToBytes()), 0, false},
	} {
		for _, alone := range []bool{true, false} {
			cfg := masquerade()
			cfg.MACs, cfg.Alone = []frame.MAC{guestMAC}, alone
			n := newBench(t, cfg)
			enginetest.Fill(n.b, c.p)
			f := n.b.Frame(0)
			f.GSO = c.gso
			n.s.Process(n.b)
			want := frame.ReasonNone
			if c.ask && alone {
				want = frame.Policy
			}
			assert.Equal(t, 1, n.b.Len(), "%s: answered", name)
			assert.Equal(t, frame.Drop, f.Out, name)
			assert.Equal(t, want, f.Reason, "%s, alone %v", name, alone)
			n.mustAnswer(broadcastFrame(m), dhcpv4.MessageTypeOffer)
		}
	}
}

// What is not for this server passes as it came.
func TestPassesOver(t *testing.T) {
	m := message(t, msgDiscover).ToBytes()
	e := enginetest.Eth{Dst: frame.Broadcast, Src: guestMAC}
	any4 := enginetest.IP{Src: anyIP, Dst: allOnes}
	toServer := enginetest.UDP{Src: 68, Dst: 67}
	vlan, unicast := e, e
	vlan.VLAN = 5
	unicast.Dst = otherMAC
	frag, last := any4, any4
	frag.Frag, last.Frag = frame.MoreFragments, 1
	elsewhere := enginetest.IP{Src: guestIP, Dst: netip.MustParseAddr("10.9.9.9")}
	v6 := enginetest.IP{Src: netip.MustParseAddr("fe80::1"), Dst: netip.MustParseAddr("ff02::1")}
	for name, p := range map[string][]byte{
		"VLAN":               enginetest.UDPFrame(vlan, any4, toServer, m),
		"unicast to another": enginetest.UDPFrame(unicast, any4, toServer, m),
		"another server":     enginetest.UDPFrame(e, elsewhere, toServer, m),
		"first fragment":     enginetest.UDPFrame(e, frag, toServer, m),
		"last fragment":      enginetest.UDPFrame(e, last, toServer, m),
		"other port":         enginetest.UDPFrame(e, any4, enginetest.UDP{Src: 68, Dst: 6767}, m),
		"client's reply":     enginetest.UDPFrame(e, any4, enginetest.UDP{Src: 5353, Dst: 68}, m),
		"TCP":                enginetest.TCPFrame(e, elsewhere, enginetest.TCP{Src: 68, Dst: 67}, m),
		"IPv6":               enginetest.UDPFrame(e, v6, toServer, m),
		"ARP":                enginetest.ARPFrame(e, 1, guestMAC, guestIP, frame.MAC{}, serverIP),
		"short":              {1, 2, 3},
		"empty":              {},
	} {
		t.Run(name, func(t *testing.T) {
			in, out := newBench(t, masquerade()).process(p)
			assert.Empty(t, out)
			assert.Equal(t, frame.Drop, in[0].Out)
			assert.Equal(t, frame.ReasonNone, in[0].Reason)
			assert.Equal(t, p, in[0].Bytes())
		})
	}
	t.Run("decided", func(t *testing.T) {
		n := newBench(t, masquerade())
		enginetest.Fill(n.b, broadcastFrame(message(t, msgDiscover)), broadcastFrame(message(t, msgDiscover)))
		n.b.Frame(0).Out = 3
		n.b.Frame(1).Drop(frame.Spoofed)
		n.s.Process(n.b)
		assert.Equal(t, 2, n.b.Len())
		assert.EqualValues(t, 3, n.b.Frame(0).Out)
		assert.Equal(t, frame.Spoofed, n.b.Frame(1).Reason)
	})
	t.Run("GSO", func(t *testing.T) {
		n := newBench(t, masquerade())
		enginetest.Fill(n.b, broadcastFrame(message(t, msgDiscover)))
		n.b.Frame(0).GSO = frame.GSOUDPL4
		n.s.Process(n.b)
		assert.Equal(t, 1, n.b.Len())
		assert.Equal(t, frame.ReasonNone, n.b.Frame(0).Reason)
	})
	t.Run("another MAC", func(t *testing.T) {
		c := masquerade()
		c.MACs = []frame.MAC{guestMAC}
		n := newBench(t, c)
		in, out := n.process(broadcastFrame(message(t, msgDiscover, dhcpv4.WithHwAddr(otherMAC[:]))))
		assert.Empty(t, out)
		assert.Equal(t, frame.Drop, in[0].Out)
		assert.Equal(t, frame.ReasonNone, in[0].Reason)
		n.mustAnswer(broadcastFrame(message(t, msgDiscover)), dhcpv4.MessageTypeOffer)
	})
}

// A message may be sent to the broadcast address of the network, where it has
// one (RFC 919, RFC 3021).
func TestDirectedBroadcast(t *testing.T) {
	for prefix, to := range map[string]string{"10.0.2.2/24": "10.0.2.255", "10.0.2.2/30": "10.0.2.3"} {
		c := masquerade()
		c.Address = netip.MustParsePrefix(prefix)
		m := message(t, msgDiscover).ToBytes()
		newBench(t, c).mustAnswer(wrap(m, guestIP, netip.MustParseAddr(to)), dhcpv4.MessageTypeOffer)
	}
	c := masquerade()
	c.Address = netip.MustParsePrefix("10.0.2.2/31")
	in, out := newBench(t, c).process(wrap(message(t, msgDiscover).ToBytes(), guestIP, netip.MustParseAddr("10.0.2.3")))
	assert.Empty(t, out)
	assert.Equal(t, frame.Drop, in[0].Out)
}

// A guest's driver leaves the checksum to the device; a wrong one is refused.
func TestChecksum(t *testing.T) {
	good := broadcastFrame(message(t, msgDiscover))
	for _, c := range []struct {
		name  string
		sum   uint16
		flags uint8
		want  frame.DropReason
	}{
		{"wrong", 0x1234, 0, frame.BadChecksum},
		{"none", 0, 0, frame.ReasonNone},
		{"partial", 0x1234, frame.NeedsCsum, frame.ReasonNone},
		{"valid", 0x1234, frame.DataValid, frame.ReasonNone},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newBench(t, masquerade())
			p := bytes.Clone(good)
			binary.BigEndian.PutUint16(p[40:], c.sum)
			enginetest.Fill(n.b, p)
			n.b.Frame(0).Offload = frame.Offload{Flags: c.flags, CsumStart: 34, CsumOffset: 6}
			n.s.Process(n.b)
			assert.Equal(t, c.want, n.b.Frame(0).Reason)
			assert.Equal(t, c.want == frame.ReasonNone, n.b.Len() == 2)
		})
	}
}

// The answer goes to the queue pair that asked; Ethernet padding is no part of
// the message.
func TestQueueAndPadding(t *testing.T) {
	n := newBench(t, masquerade())
	enginetest.Fill(n.b, append(broadcastFrame(message(t, msgDiscover)), make([]byte, 60)...))
	n.b.Frame(0).Queue = 5
	n.s.Process(n.b)
	require.Equal(t, 2, n.b.Len())
	assert.EqualValues(t, 5, n.b.Frame(1).Queue)
}

// Where the batch has no room, the question is lost and counted, not half
// answered.
func TestBatchFull(t *testing.T) {
	n := newBench(t, masquerade())
	enginetest.Fill(n.b, broadcastFrame(message(t, msgDiscover)))
	for n.b.Alloc(256) != nil {
	}
	n.s.Process(n.b)
	assert.Equal(t, frame.BatchFull, n.b.Frame(0).Reason)
	assert.Equal(t, 1, n.b.Len())
}

func TestAllocs(t *testing.T) {
	n := newBench(t, masquerade())
	e := enginetest.Eth{Dst: DefaultServerMAC, Src: guestMAC}
	ip := enginetest.IP{Src: guestIP, Dst: netip.MustParseAddr("1.1.1.1")}
	enginetest.Fill(n.b,
		enginetest.TCPFrame(e, ip, enginetest.TCP{Src: 4000, Dst: 80}, make([]byte, 1000)),
		enginetest.UDPFrame(e, ip, enginetest.UDP{Src: 4000, Dst: 53}, make([]byte, 30)),
		enginetest.UDPFrame(e, ip, enginetest.UDP{Src: 68, Dst: 67}, make([]byte, 300)),
		enginetest.ARPFrame(e, 1, guestMAC, guestIP, frame.MAC{}, serverIP))
	assert.Zero(t, testing.AllocsPerRun(100, func() { n.s.Process(n.b) }))
}

// Several workers with a batch each, and updates between.
func TestConcurrent(t *testing.T) {
	n := newBench(t, masquerade())
	p, q := broadcastFrame(message(t, msgDiscover)), selecting(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			b := new(frame.Batch)
			for i := range 50 {
				b.Now = int64(i) * int64(time.Second)
				enginetest.Fill(b, p, q)
				n.s.Process(b)
			}
		})
	}
	for range 50 {
		require.NoError(t, n.s.Update(masquerade()))
		n.s.Leases()
		require.NoError(t, n.s.Import(n.s.Export()))
		n.s.Stats()
	}
	wg.Wait()
}

func BenchmarkPass(b *testing.B) {
	s, err := New(masquerade())
	require.NoError(b, err)
	e := enginetest.Eth{Dst: DefaultServerMAC, Src: guestMAC}
	ip := enginetest.IP{Src: guestIP, Dst: netip.MustParseAddr("1.1.1.1")}
	p := enginetest.TCPFrame(e, ip, enginetest.TCP{Src: 4000, Dst: 80}, make([]byte, 1000))
	batch := new(frame.Batch)
	var ps [][]byte
	for range frame.BatchSize {
		ps = append(ps, p)
	}
	enginetest.Fill(batch, ps...)
	for b.Loop() {
		s.Process(batch)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/frame.BatchSize, "ns/frame")
}
