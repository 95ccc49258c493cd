package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine"
	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
	"sidewire/vhostuser/vhosttest"
)

// carry sends bytes over TCP connections to a port of an address, several at
// once, and checks that the other end got the same.
func carry(t *testing.T, from, to *enginetest.NetNS, addr string, conns, size int) {
	t.Helper()
	l := listen(t, to, "tcp", addr, func(c net.Conn) {
		sum := sha256.New()
		_, _ = io.Copy(sum, c)
		_, _ = c.Write(sum.Sum(nil))
	})
	defer l.Close()
	var wg sync.WaitGroup
	for i := range conns {
		wg.Go(func() {
			c, err := from.Dial("tcp", addr, soon)
			if !assert.NoError(t, err) {
				return
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(60 * time.Second))
			sum := sha256.New()
			source := rand.NewChaCha8([32]byte{byte(i)})
			if _, err := io.Copy(io.MultiWriter(c, sum), io.LimitReader(source, int64(size))); !assert.NoError(t, err) {
				return
			}
			_ = c.(*net.TCPConn).CloseWrite()
			got, err := io.ReadAll(c)
			assert.NoError(t, err)
			assert.Equal(t, sum.Sum(nil), got, "what arrived is not what was sent")
		})
	}
	wg.Wait()
}

// quiet keeps a guest from speaking on its own.
func (v *vm) quiet() *vm {
	v.t.Helper()
	require.NoError(v.t, v.ns.Sysctl("net/ipv6/conf/all/disable_ipv6", "1"))
	return v
}

// What two guests say to each other is whole, and a third does not hear it.
func TestKnownUnicastIsPrivate(t *testing.T) {
	docs := onLAN("vm1", "blue", 1) + onLAN("vm2", "blue", 1) + onLAN("vm3", "blue", 1) + definition("blue", `{"type": "cnv-bridge", "bridge": "br0"}`)
	p := startLAN(t, docs)
	a := plugVM(t, p, "vm1", vhosttest.Options{}).withAddr("10.9.0.1/24")
	b := plugVM(t, p, "vm2", vhosttest.Options{}).withAddr("10.9.0.2/24")
	c := plugVM(t, p, "vm3", vhosttest.Options{}).withAddr("10.9.0.3/24").quiet()
	require.True(t, a.pings("10.9.0.3"))
	require.True(t, b.pings("10.9.0.3"))
	before, err := c.ns.Counter("eth0", "rx_packets")
	require.NoError(t, err)
	carry(t, a.ns, b.ns, "10.9.0.2:7000", 2, 16<<20)
	carry(t, b.ns, a.ns, "10.9.0.1:7000", 2, 16<<20)
	after, err := c.ns.Counter("eth0", "rx_packets")
	require.NoError(t, err)
	assert.LessOrEqual(t, after-before, uint64(20), "ARP and neighbour discovery at most")
	for _, i := range p.status().Interfaces[:2] {
		assert.Greater(t, i.Device.Pairs[0].RxBytes, uint64(32<<20))
	}

	o := sidewire(t, "fdb", "--socket-dir", p.dir, "--json")
	require.Zero(t, o.code, o.err)
	var stations []StationStatus
	require.NoError(t, json.Unmarshal([]byte(o.out), &stations))
	ports := map[string]string{}
	for _, s := range stations {
		assert.Equal(t, "br0", s.Switch)
		ports[s.Port] = s.MAC.String()
	}
	for _, name := range []string{"vm1/net", "vm2/net", "vm3/net"} {
		assert.Equal(t, p.nicOf(name).MAC, ports[name])
	}
	o = sidewire(t, "fdb", "--socket-dir", p.dir)
	assert.Regexp(t, `(?m)^br0 +- +`+p.nicOf("vm2/net").MAC+` +vm2/net +\d+ s ago$`, o.out)
	sw := p.status().Switches
	require.Len(t, sw, 1)
	assert.Len(t, sw[0].Members, 3)
	assert.Equal(t, 3, sw[0].Addresses)
}

// Definitions that name the same bridge share a switch, and VLANs keep their
// guests apart; a trunk has its VLANs tagged.
func TestVLANsAreApart(t *testing.T) {
	for _, kind := range []string{"bridge", "ovs"} {
		t.Run(kind, func(t *testing.T) {
			trunk := map[string]string{"bridge": "vlanTrunk", "ovs": "trunk"}[kind]
			docs := onLAN("red1", "red", 1) + onLAN("red2", "red", 1) + onLAN("blue1", "blue", 1) + onLAN("none1", "none", 1) + onLAN("trunk1", "trunk", 1)
			for name, more := range map[string]string{"red": `, "vlan": 100`, "blue": `, "vlan": 200`, "none": ``, "trunk": `, "` + trunk + `": [{"minID": 150, "maxID": 250}]`} {
				docs += definition(name, `{"type": "`+kind+`", "bridge": "br0"`+more+`}`)
			}
			p := startLAN(t, docs)
			require.Len(t, p.status().Switches, 1)
			red1 := plugVM(t, p, "red1", vhosttest.Options{}).withAddr("10.9.0.1/24")
			red2 := plugVM(t, p, "red2", vhosttest.Options{}).withAddr("10.9.0.2/24")
			blue := plugVM(t, p, "blue1", vhosttest.Options{}).withAddr("10.9.0.3/24")
			none := plugVM(t, p, "none1", vhosttest.Options{}).withAddr("10.9.0.4/24")
			tagged := connectRaw(t, p, "trunk1/net")

			assert.True(t, red1.pings("10.9.0.2"), "within VLAN 100")
			carry(t, red1.ns, red2.ns, "10.9.0.2:7000", 1, 8<<20)
			var wg sync.WaitGroup
			for _, x := range []struct {
				from *vm
				to   string
			}{{red1, "10.9.0.3"}, {red1, "10.9.0.4"}, {blue, "10.9.0.1"}, {blue, "10.9.0.4"}, {none, "10.9.0.2"}, {none, "10.9.0.3"}} {
				wg.Go(func() { assert.False(t, x.from.pings(x.to), "%s is reached across VLANs", x.to) })
			}
			wg.Wait()
			// The trunk's guest asks in several VLANs who has the addresses of the
			// others. VLAN 100 is not one of its own.
			var asked []question
			for _, vlan := range []uint16{0, 100, 200} {
				for _, to := range []string{"10.9.0.1", "10.9.0.3", "10.9.0.4"} {
					asked = append(asked, question{vlan, to})
				}
			}
			assert.ElementsMatch(t, []question{{200, "10.9.0.3"}, {0, "10.9.0.4"}}, answered(t, tagged, asked))
			st := p.nicOf("red1/net").Switch
			assert.EqualValues(t, 100, st.VLAN)
			o := sidewire(t, "status", "--socket-dir", p.dir)
			assert.Contains(t, o.out, "br0 by default/trunk, tagged VLANs 150-250, spoof check off")
			o = sidewire(t, "fdb", "--socket-dir", p.dir)
			assert.Regexp(t, `(?m)^br0 +200 +\S+ +blue1/net +`, o.out)
		})
	}
}

// question is who in a VLAN has an address; 0 is an untagged question.
type question struct {
	vlan uint16
	addr string
}

// answered asks all questions by ARP and returns those that are answered, in
// the VLANs in which the answers come.
func answered(t *testing.T, g *vhosttest.Guest, asked []question) (out []question) {
	t.Helper()
	mac, ip := g.Options.MAC, addrOf("10.9.0.5")
	for _, q := range asked {
		require.NoError(t, g.Send(0, enginetest.ARPFrame(enginetest.Eth{Src: mac, Dst: broadcast, VLAN: q.vlan}, 1, mac, ip, zeroMAC, addrOf(q.addr)), frame.Offload{}))
	}
	for until := time.Now().Add(silence); time.Now().Before(until); {
		p, err := g.Recv(0, 100*time.Millisecond)
		if err != nil {
			continue // nothing so far
		}
		b, vlan := p.Bytes, uint16(0)
		if b[12] == 0x81 && b[13] == 0 {
			vlan = uint16(b[14]&15)<<8 | uint16(b[15])
			b = append(b[:12:12], b[16:]...)
		}
		if b[12] == 8 && b[13] == 6 && b[21] == 2 {
			out = append(out, question{vlan, netip.AddrFrom4([4]byte(b[28:32])).String()})
		}
	}
	return out
}

// KubeVirt's test of the MAC spoof check: a guest is heard with its own
// address, not with another, and again with its own. Off means off.
func TestSpoofCheckRow80_KubeVirtSpoofCheck(t *testing.T) {
	for _, check := range []bool{true, false} {
		t.Run(fmt.Sprint(check), func(t *testing.T) {
			docs := onLAN("vm1", "blue", 1) + onLAN("vm2", "blue", 1) +
				definition("blue", fmt.Sprintf(`{"cniVersion": "0.3.1", "type": "cnv-bridge", "bridge": "br10", "macspoofchk": %v}`, check))
			p := startLAN(t, docs)
			a := plugVM(t, p, "vm1", vhosttest.Options{}).withAddr("10.9.0.1/24")
			plugVM(t, p, "vm2", vhosttest.Options{}).withAddr("10.9.0.2/24")
			own := p.nicOf("vm1/net").MAC
			assert.True(t, a.pings("10.9.0.2"))
			assert.Zero(t, p.port("vm1/net guest").Drops["spoofed"])
			a.run("ip", "link", "set", "eth0", "address", "02:12:34:56:78:9a")
			assert.Equal(t, !check, a.pings("10.9.0.2"))
			assert.Equal(t, check, p.port("vm1/net guest").Drops["spoofed"] > 0)
			a.run("ip", "link", "set", "eth0", "address", own)
			assert.True(t, enginetest.Wait(soon, func() bool { return a.pings("10.9.0.2") }))
			assert.Equal(t, check, p.nicOf("vm1/net").Switch.SpoofCheck)
		})
	}
}

// port is what status says of a port of the engine.
func (p *process) port(name string) engine.PortStats {
	p.t.Helper()
	for _, port := range p.status().Ports {
		if port.Name == name {
			return port
		}
	}
	p.t.Fatalf("no port %s", name)
	return engine.PortStats{}
}

// Two queue pairs and frames of 9000 bytes between guests, both of what the
// definition and the VMI say.
func TestQueuePairsAndLongFrames(t *testing.T) {
	docs := onLAN("vm1", "blue", 2) + onLAN("vm2", "blue", 2) + onLAN("vm3", "blue", 1) + definition("blue", `{"type": "bridge", "mtu": 9000, `+hostLocal+`}`)
	p := startLAN(t, docs)
	o := vhosttest.Options{QueuePairs: 2, MTU: 9000}
	a := plugVM(t, p, "vm1", o).withLease("10.9.0.2/24")
	b := plugVM(t, p, "vm2", o).withLease("10.9.0.3/24")
	c := plugVM(t, p, "vm3", vhosttest.Options{MTU: 9000}).withAddr("10.9.0.4/24")
	for _, v := range []*vm{a, b} {
		assert.Contains(t, v.run("ip", "link", "show", "eth0"), "mtu 9000")
	}
	assert.True(t, a.pings("10.9.0.3", "-M", "do", "-s", "8972"))
	assert.True(t, c.pings("10.9.0.3", "-M", "do", "-s", "8972"))
	assert.False(t, a.pings("10.9.0.3", "-M", "do", "-s", "8973"))
	carry(t, a.ns, b.ns, "10.9.0.3:7000", 16, 2<<20)
	carry(t, b.ns, a.ns, "10.9.0.2:7000", 16, 2<<20)
	carry(t, c.ns, a.ns, "10.9.0.2:7000", 4, 2<<20)
	for _, name := range []string{"vm1/net", "vm2/net"} {
		i := p.nicOf(name)
		assert.Equal(t, 9000, i.MTU)
		assert.Equal(t, 2, i.QueueCount)
		require.Len(t, i.Device.Pairs, 2)
		for q, pair := range i.Device.Pairs {
			assert.Greater(t, pair.TxFrames, uint64(50), "%s pair %d", name, q)
			assert.Greater(t, pair.RxFrames, uint64(50), "%s pair %d", name, q)
		}
	}
}

// A lease says what the definition and the VMI say, and no more. Where there
// is none to be had, DHCP is like any other frame.
func TestLeaseOfADefinition(t *testing.T) {
	vmi := strings.Replace(onLAN("vm1", "blue", 1), "bridge: {}}", "bridge: {}, dhcpOptions: {bootFileName: boot.bin, ntpServers: [10.9.0.9]}}", 1)
	docs := vmi + onLAN("vm2", "blue", 1) + onLAN("vm5", "blue", 1) + onLAN("vm3", "bare", 1) + onLAN("vm4", "bare", 1) +
		definition("blue", `{"type": "bridge", "ipam": {"type": "host-local", "subnet": "10.9.0.0/24", "rangeStart": "10.9.0.100", "rangeEnd": "10.9.0.102", "gateway": "10.9.0.254",
		"routes": [{"dst": "10.20.0.0/16", "gw": "10.9.0.7"}], "dns": {"nameservers": ["10.9.0.53"], "domain": "blue.example"}}}`) +
		definition("bare", `{"type": "ovs", "bridge": "br7"}`)
	p := startLAN(t, docs)
	a := plugVM(t, p, "vm1", vhosttest.Options{}).withLease("10.9.0.100/24")
	routes := a.run("ip", "route")
	assert.Contains(t, routes, "default via 10.9.0.254")
	assert.Contains(t, routes, "10.20.0.0/16 via 10.9.0.7")
	leases := a.run("cat", a.dir+"/leases")
	for _, words := range []string{`domain-name-servers 10.9.0.53`, `domain-search "blue.example."`, `routers 10.9.0.254`, `filename "boot.bin"`, `ntp-servers 10.9.0.9`,
		`host-name "vm1"`, `interface-mtu 1500`, `dhcp-server-identifier 10.9.0.254`} {
		assert.Contains(t, leases, words)
	}
	for _, nic := range []string{"vm2/net", "vm3/net"} {
		assert.Empty(t, p.nicOf(nic).Leases, nic)
	}
	assert.False(t, p.nicOf("vm3/net").Guest.IsValid())

	// Who hears what a guest asks a DHCP server?
	f, g := connectRaw(t, p, "vm3/net"), connectRaw(t, p, "vm4/net")
	assert.True(t, hears(t, f, g, discover(f.Options.MAC, f.Options.MAC)), "without ipam a DHCP server may be anywhere")
	f, g = connectRaw(t, p, "vm2/net"), connectRaw(t, p, "vm5/net")
	assert.False(t, hears(t, f, g, discover(f.Options.MAC, f.Options.MAC)), "what we answer goes no further")
	assert.False(t, hears(t, f, g, discover(f.Options.MAC, guestMAC)), "nor does what a guest inside the guest asks")
	assert.Empty(t, p.nicOf("vm2/net").Leases, "an offer is no lease")
}

// hears says whether one guest gets a frame of another's; a plain one is sent
// behind it to tell that it does not come.
func hears(t *testing.T, from, to *vhosttest.Guest, b []byte) bool {
	t.Helper()
	mac := from.Options.MAC
	probe := enginetest.ARPFrame(enginetest.Eth{Src: mac, Dst: broadcast}, 1, mac, addrOf("10.9.0.1"), zeroMAC, addrOf("10.9.0.2"))
	require.NoError(t, from.SendAll(0, b, probe))
	heard := false
	for {
		got, err := to.Recv(0, soon)
		require.NoError(t, err)
		switch string(got.Bytes) {
		case string(b):
			heard = true
		case string(probe):
			return heard
		}
	}
}

// Annotations let LLDP pass and have the senders in ARP checked; without them
// neither is done.
func TestAnnotationsOfADefinitionRow80(t *testing.T) {
	for _, asked := range []bool{false, true} {
		annotations := map[bool]string{false: "", true: `, annotations: {sidewire/link-local: "true", sidewire/check-arp: "true"}`}[asked]
		nad := strings.Replace(definition("blue", `{"type": "bridge", "macspoofchk": true}`), "{name: blue}", "{name: blue"+annotations+"}", 1)
		p := startLAN(t, onLAN("vm1", "blue", 1)+onLAN("vm2", "blue", 1)+nad)
		a, b := connectRaw(t, p, "vm1/net"), connectRaw(t, p, "vm2/net")
		mac := a.Options.MAC
		lldp := enginetest.Eth{Src: mac, Dst: frame.MAC{1, 0x80, 0xc2, 0, 0, 0x0e}}.Frame(0x88cc, make([]byte, 46))
		pause := enginetest.Eth{Src: mac, Dst: frame.MAC{1, 0x80, 0xc2, 0, 0, 1}}.Frame(0x8808, make([]byte, 46))
		foreign := enginetest.ARPFrame(enginetest.Eth{Src: mac, Dst: broadcast}, 2, frame.MAC{2, 1, 1, 1, 1, 1}, addrOf("10.9.0.9"), zeroMAC, addrOf("10.9.0.2"))
		assert.Equal(t, asked, hears(t, a, b, lldp), "LLDP")
		assert.False(t, hears(t, a, b, pause), "PAUSE")
		assert.Equal(t, !asked, hears(t, a, b, foreign), "ARP in the name of another")
	}
}

// How much a guest may send to everybody is its own definition's to say, also
// where another one joins guests to the same bridge.
func TestStormOfADefinition(t *testing.T) {
	p := startLAN(t, onLAN("vm1", "calm", 1)+onLAN("vm2", "blue", 1)+definition("blue", `{"type": "bridge", "bridge": "br0"}`)+
		strings.Replace(definition("calm", `{"type": "bridge", "bridge": "br0"}`), "{name: calm}", `{name: calm, annotations: {sidewire/storm: "1"}}`, 1))
	require.Len(t, p.status().Switches, 1)
	const sent = 100
	for name, storm := range map[string]bool{"vm1/net": true, "vm2/net": false} {
		g := connectRaw(t, p, name)
		ask := enginetest.ARPFrame(enginetest.Eth{Src: g.Options.MAC, Dst: broadcast}, 1, g.Options.MAC, addrOf("10.9.0.1"), zeroMAC, addrOf("10.9.0.2"))
		require.NoError(t, g.SendAll(0, slices.Repeat([][]byte{ask}, sent)...))
		require.NoError(t, g.Drain(0, soon))
		var port engine.PortStats
		enginetest.Eventually(t, soon, func() bool {
			port = p.port(name + " guest")
			return port.InFrames == sent
		})
		assert.Equal(t, storm, port.Drops["storm"] > 0, "%s: %v", name, port.Drops)
	}
}
