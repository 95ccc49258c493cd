package usernet

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// A host with several addresses answers each client from the one that it wrote
// to, whatever the kernel's route would choose, single datagrams and many.
func TestForwardUDPAnswersFromWhereItWasAsked(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	enginetest.Must(t, p.Pod.Addr("eth0", "10.244.1.6/24"), p.Pod.Addr("eth0", "192.0.2.6/32"), p.Outside.Route("192.0.2.6/32", enginetest.PodIP))
	require.NoError(t, p.net.AddForward(Forward{Proto: frame.ProtoUDP, Port: 8053, Guest: 53}))
	type client struct {
		ns       *enginetest.NetNS
		from, to string
	}
	clients := []client{
		{p.Outside, enginetest.OutsideIP + ":5001", enginetest.PodIP + ":8053"},
		{p.Outside, enginetest.OutsideIP + ":5002", "10.244.1.6:8053"},
		{p.Outside, enginetest.OutsideIP + ":5003", "192.0.2.6:8053"},
		{p.Pod, "127.0.0.1:5004", "127.0.0.1:8053"},
		{p.Pod, "127.0.0.1:5005", "127.9.9.9:8053"},
		{p.Outside, enginetest.OutsideIP + ":5002", "192.0.2.6:8053"}, // who has come by another address before
		{p.Outside, enginetest.OutsideIP + ":5002", enginetest.PodIP + ":8053"},
	}
	sockets := map[string]net.PacketConn{}
	seen := make([]netip.AddrPort, len(clients))
	ask := func(i int) {
		c := clients[i]
		if sockets[c.from] == nil {
			sockets[c.from] = listen(t, c.ns, "udp4", c.from)
		}
		says(t, sockets[c.from], netip.MustParseAddrPort(c.to), "query")
		seen[i] = p.next().from()
	}
	answered := func(i, many int) {
		var answers [][]byte
		for k := range many {
			answers = append(answers, udpTo(53, seen[i], fmt.Sprint("answer ", k)))
		}
		p.send(answers...)
		p.consumed()
		for k := range many {
			got, by := hears(t, sockets[clients[i].from])
			assert.Equal(t, fmt.Sprint("answer ", k, " by ", clients[i].to), fmt.Sprint(got, " by ", by))
		}
	}
	for i := range 5 {
		ask(i)
		answered(i, 1)
		answered(i, 5)
	}
	for i := range 5 { // each is remembered
		answered(i, 1)
		answered(i, 3)
	}
	for i := 5; i < len(clients); i++ {
		ask(i)
		answered(i, 2)
		answered(0, 1)
		answered(i, 1)
	}
	assert.Equal(t, 4, p.net.workers[0].udp.peers, "of all but the one of 127.0.0.1")
	p.pass(time.Hour)
	for range 100 {
		p.pull(0)
	}
	assert.LessOrEqual(t, p.net.workers[0].udp.peers, 1, "they end with their clients; the last one is the guest's still")
}

// Where there is one address, nothing is kept of clients.
func TestForwardUDPKeepsNothingOfClients(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	require.NoError(t, p.net.AddForward(Forward{Proto: frame.ProtoUDP, Port: 8053, Guest: 53}))
	for i := range 20 {
		c := listen(t, p.Outside, "udp4", fmt.Sprint(enginetest.OutsideIP, ":", 6000+i))
		says(t, c, netip.AddrPortFrom(podIP, 8053), "query")
		p.send(udpTo(53, p.next().from(), "answer"))
		p.consumed()
		hears(t, c)
	}
	assert.Zero(t, p.net.workers[0].udp.peers)
	// An address that comes later is one that clients are told apart by.
	require.NoError(t, p.Pod.Addr("eth0", "10.244.1.6/24"))
	c := listen(t, p.Outside, "udp4", enginetest.OutsideIP+":5555")
	says(t, c, netip.MustParseAddrPort("10.244.1.6:8053"), "query")
	p.send(udpTo(53, p.next().from(), "answer"))
	p.consumed()
	_, by := hears(t, c)
	assert.Equal(t, "10.244.1.6:8053", by.String())
}

// Whoever comes by all addresses and ports takes no more of the table than
// clients may.
func TestForwardUDPClientsAreBounded(t *testing.T) {
	const flows = 64
	p := newPod(t, enginetest.WorldOptions{}, func(c *Config) { c.MaxFlows = flows })
	require.NoError(t, p.Pod.Addr("eth0", "10.244.1.6/24"))
	require.NoError(t, p.net.AddForward(Forward{Proto: frame.ProtoUDP, Port: 8053, Guest: 53}))
	for i := range 2 * flows {
		c := listen(t, p.Outside, "udp4", fmt.Sprint(enginetest.OutsideIP, ":", 6000+i))
		says(t, c, netip.MustParseAddrPort("10.244.1.6:8053"), "query")
		p.next()
	}
	assert.Equal(t, flows/clientsMost, p.net.workers[0].udp.peers)
	assert.EqualValues(t, 2*flows-flows/clientsMost, p.net.Stats().TableFull)
}

// A forward at one address, and a mapping that is no forward's, do not ask.
func TestOnlyForwardsAtAllAddressesAskWhereTo(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	require.NoError(t, p.net.AddForward(Forward{Proto: frame.ProtoUDP, Addr: podIP, Port: 8053, Guest: 53}))
	p.send(udpTo(54, netip.AddrPortFrom(outsideIP, 9), "hello"))
	w := p.net.workers[0]
	for _, gport := range []uint16{53, 54} {
		i := w.table.find(key{gport: gport, proto: frame.ProtoUDP})
		require.NotEqual(t, none, i)
		assert.Zero(t, w.table.at(i).flags&mapWild)
		v, errno := getInt(w.table.at(i).fd, 0, 8) // SOL_IP, IP_PKTINFO
		require.Zero(t, errno)
		assert.Zero(t, v)
	}
}
