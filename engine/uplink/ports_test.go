package uplink

import (
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

func tcpPorts(first, last uint16) Port { return Port{Proto: frame.ProtoTCP, Port: first, Last: last} }

// A list of ranges says of every port what a set of single ports says.
func TestPortList(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	port := func() Port {
		p := Port{Proto: []uint8{frame.ProtoTCP, frame.ProtoUDP}[rnd.IntN(2)], Port: uint16(1 + rnd.IntN(40))}
		if rnd.IntN(2) == 0 {
			p.Last = p.Port + uint16(rnd.IntN(8))
		}
		return p
	}
	var before map[Port]bool
	var old portList
	for range 500 {
		set := map[Port]bool{}
		var ports []Port
		for range rnd.IntN(12) {
			p := port()
			ports = append(ports, p)
			for n := p.Port; n <= p.last(); n++ {
				set[Port{Proto: p.Proto, Port: n}] = true
			}
		}
		l := portListOf(ports)
		require.NoError(t, checkPorts(l))
		if len(l) > 0 && rnd.IntN(2) == 0 {
			p := port()
			p.Last = 0
			delete(set, p)
			l = l.without(p)
		}
		both := false
		for n := range uint16(60) {
			for _, proto := range []uint8{frame.ProtoTCP, frame.ProtoUDP} {
				p := Port{Proto: proto, Port: n}
				_, there := l.find(p)
				require.Equal(t, set[p], there, "%s in %v of %v", p, l, ports)
				both = both || set[p] && before[p]
			}
		}
		_, shared := l.shared(old)
		require.Equal(t, both, shared, "%v and %v", l, old)
		before, old = set, l
	}
	require.Equal(t, "ports 80-90/TCP", tcpPorts(80, 90).String())
	require.Error(t, checkPorts([]Port{tcpPorts(90, 80)}))
	whole := portListOf([]Port{tcpPorts(1, 65535)})
	require.Equal(t, portList{tcpPorts(1, 65534)}, whole.without(tcpPort(65535)))
}

// Ranges are published as they are, however long they are, and a port may be taken out of one.
func TestPortRanges(t *testing.T) {
	r := newRig(t, tcpPorts(1000, 1999), tcpPorts(3000, 60000), Port{Proto: frame.ProtoUDP, Port: 1, Last: 65535})
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
	for _, port := range []uint16{1000, 1500, 1999, 3000, 3001, 9999, 30000, 60000} {
		guests(port)
	}
	for _, port := range []uint16{999, 2000, 2999} {
		pods(port)
	}
	for _, port := range []uint16{1, 1000, 65535} {
		send(t, r.out, enginetest.UDPFrame(r.eth(), toPod(), enginetest.UDP{Src: 5, Dst: port}, nil))
		r.next(r.in(), "datagram", udp(5, port))
	}
	require.NoError(t, r.pod.RemovePort(0, tcpPort(1500)))
	pods(1500)
	guests(1499)
	guests(1501)
	require.NoError(t, r.pod.AddPort(0, tcpPort(1500)))
	guests(1500)
	require.NoError(t, r.pod.AddPort(0, tcpPort(2500)))
	guests(2500)
	require.Equal(t, []Port{tcpPorts(1000, 1499), tcpPort(1500), tcpPorts(1501, 1999), tcpPort(2500), tcpPorts(3000, 60000), {Proto: frame.ProtoUDP, Port: 1, Last: 65535}}, r.pod.Ports(0))
}
