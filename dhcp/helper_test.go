package dhcp

import (
	"encoding/binary"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/stretchr/testify/require"

	"sidewire/engine"
	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

var _ engine.Stage = (*Server)(nil)

const guestPort frame.PortID = 7

var (
	guestMAC = frame.MAC{0x52, 0x54, 0, 0x12, 0x34, 0x56}
	otherMAC = frame.MAC{0x52, 0x54, 0, 0x99, 0x99, 0x99}
	guestIP  = netip.MustParseAddr("10.0.2.2")
	serverIP = netip.MustParseAddr("10.0.2.1")
	allOnes  = netip.MustParseAddr("255.255.255.255")
	anyIP    = netip.IPv4Unspecified()
	epoch    = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
)

func masquerade() Config {
	return Config{
		Port: guestPort, Address: netip.PrefixFrom(guestIP, 24), Router: serverIP, ServerIP: serverIP,
		DNS: []netip.Addr{netip.MustParseAddr("10.96.0.10")}, Search: []string{"default.svc.cluster.local"},
		Hostname: "vm", MTU: 1450, Now: func() time.Time { return epoch },
	}
}

// bench is a server with a batch.
type bench struct {
	t *testing.T
	s *Server
	b *frame.Batch
}

func newBench(t *testing.T, c Config) *bench {
	t.Helper()
	s, err := New(c)
	require.NoError(t, err)
	return &bench{t, s, new(frame.Batch)}
}

// reply is an answer taken apart by gopacket and the codec.
type answered struct {
	*dhcpv4.DHCPv4
	eth layers.Ethernet
	ip  layers.IPv4
	udp layers.UDP
	raw []byte // the DHCP message
}

// process runs frames through the server and returns them and the answers.
func (n *bench) process(frames ...[]byte) (in []*frame.Frame, out []answered) {
	n.t.Helper()
	n.b.Now += int64(time.Second)
	enginetest.Fill(n.b, frames...)
	n.s.Process(n.b)
	for i := range n.b.Len() {
		if f := n.b.Frame(i); i < len(frames) {
			in = append(in, f)
		} else {
			require.Equal(n.t, guestPort, f.Out)
			out = append(out, parse(n.t, f.Bytes()))
		}
	}
	return in, out
}

// ask sends one frame that must be consumed and returns the answer, nil for
// silence.
func (n *bench) ask(p []byte) *answered {
	n.t.Helper()
	in, out := n.process(p)
	require.Equal(n.t, frame.Consumed, in[0].Out, "reason %v", in[0].Reason)
	require.LessOrEqual(n.t, len(out), 1)
	if len(out) == 0 {
		return nil
	}
	return &out[0]
}

func (n *bench) mustAnswer(p []byte, kind dhcpv4.MessageType) *answered {
	n.t.Helper()
	a := n.ask(p)
	require.NotNil(n.t, a, "no answer")
	require.Equal(n.t, kind, a.MessageType())
	return a
}

// parse checks lengths and checksums of an answer and reads it, overloaded
// fields included.
func parse(t testing.TB, p []byte) answered {
	t.Helper()
	var a answered
	pk := gopacket.NewPacket(p, layers.LayerTypeEthernet, gopacket.Default)
	a.eth = *pk.Layer(layers.LayerTypeEthernet).(*layers.Ethernet)
	a.ip = *pk.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
	a.udp = *pk.Layer(layers.LayerTypeUDP).(*layers.UDP)
	require.Len(t, p, 14+int(a.ip.Length))
	require.Equal(t, a.ip.Length-20, a.udp.Length)
	require.Equal(t, uint16(0xffff), frame.Fold(frame.Sum(p[14:34], 0)), "IPv4 checksum")
	require.NotZero(t, a.udp.Checksum)
	sum := frame.Sum(p[26:34], uint64(17)+uint64(a.udp.Length))
	require.Equal(t, uint16(0xffff), frame.Fold(frame.Sum(p[34:], sum)), "UDP checksum")
	a.raw = p[headerLen:]
	require.GreaterOrEqual(t, len(a.raw), 300)
	m, err := dhcpv4.FromBytes(a.raw)
	require.NoError(t, err)
	if v := m.Options[optOverload]; v != nil {
		require.Len(t, v, 1)
		if v[0]&overloadFile != 0 {
			require.NoError(t, m.Options.FromBytes(a.raw[offFile:offCookie]))
		}
		if v[0]&overloadSname != 0 {
			require.NoError(t, m.Options.FromBytes(a.raw[offSname:offFile]))
		}
	}
	a.DHCPv4 = m
	return a
}

// codes returns the option codes in the order in which the main field has
// them.
func codes(raw []byte) (cs []byte) {
	for o := raw[offOption:]; len(o) > 1 && o[0] != optEnd; o = o[2+int(o[1]):] {
		cs = append(cs, o[0])
	}
	return cs
}

// message builds a client's message with the codec.
func message(t testing.TB, kind dhcpv4.MessageType, mods ...dhcpv4.Modifier) *dhcpv4.DHCPv4 {
	t.Helper()
	m, err := dhcpv4.New(append([]dhcpv4.Modifier{
		dhcpv4.WithMessageType(kind), dhcpv4.WithHwAddr(net.HardwareAddr(guestMAC[:])),
	}, mods...)...)
	require.NoError(t, err)
	return m
}

// broadcastFrame wraps a message as a client without an address does.
func broadcastFrame(m *dhcpv4.DHCPv4) []byte { return wrap(m.ToBytes(), anyIP, allOnes) }

// unicastFrame wraps a message as a client with the address does.
func unicastFrame(m *dhcpv4.DHCPv4) []byte { return wrap(m.ToBytes(), guestIP, serverIP) }

func wrap(m []byte, src, dst netip.Addr) []byte {
	e := enginetest.Eth{Dst: frame.Broadcast, Src: guestMAC}
	if dst == serverIP {
		e.Dst = DefaultServerMAC
	}
	return enginetest.UDPFrame(e, enginetest.IP{Src: src, Dst: dst}, enginetest.UDP{Src: 68, Dst: 67}, m)
}

func opt(code byte, v ...byte) dhcpv4.Modifier {
	return dhcpv4.WithGeneric(dhcpv4.GenericOptionCode(code), v)
}

func ip4(a netip.Addr) []byte { return a.AsSlice() }

func selecting(t testing.TB, mods ...dhcpv4.Modifier) []byte {
	return broadcastFrame(message(t, dhcpv4.MessageTypeRequest, append([]dhcpv4.Modifier{
		opt(optRequestedIP, ip4(guestIP)...), opt(optServerID, ip4(serverIP)...)}, mods...)...))
}

func be16(b []byte) int { return int(binary.BigEndian.Uint16(b)) }
