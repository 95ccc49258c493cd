package enginetest

import (
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine"
	"sidewire/engine/frame"
)

var (
	_ engine.Port  = (*MemPort)(nil)
	_ engine.Queue = (*MemQueue)(nil)
	_ TB           = (*testing.T)(nil)
)

var (
	eth = Eth{Dst: frame.MAC{2, 0, 0, 0, 0, 1}, Src: frame.MAC{2, 0, 0, 0, 0, 2}}
	ip4 = IP{Src: netip.MustParseAddr("10.0.2.2"), Dst: netip.MustParseAddr("192.0.2.1"), ID: 7}
	ip6 = IP{Src: netip.MustParseAddr("fd00::2"), Dst: netip.MustParseAddr("2001:db8::1")}
)

// rebuilt is the frame as gopacket writes it from its own reading of it, with
// lengths and checksums of its own.
func rebuilt(t *testing.T, b []byte) []byte {
	t.Helper()
	p := gopacket.NewPacket(b, layers.LayerTypeEthernet, gopacket.Default)
	require.Nil(t, p.ErrorLayer())
	var out []gopacket.SerializableLayer
	var net gopacket.NetworkLayer
	for _, l := range p.Layers() {
		switch l := l.(type) {
		case gopacket.NetworkLayer:
			net = l
		case *layers.TCP:
			require.NoError(t, l.SetNetworkLayerForChecksum(net))
		case *layers.UDP:
			require.NoError(t, l.SetNetworkLayerForChecksum(net))
		case *layers.ICMPv6:
			require.NoError(t, l.SetNetworkLayerForChecksum(net))
		}
		out = append(out, l.(gopacket.SerializableLayer))
	}
	buf := gopacket.NewSerializeBuffer()
	require.NoError(t, gopacket.SerializeLayers(buf, gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}, out...))
	return buf.Bytes()
}

func TestBuildersAgainstGopacket(t *testing.T) {
	vlan := eth
	vlan.VLAN = 100
	for name, b := range map[string][]byte{
		"tcp4": TCPFrame(eth, ip4, TCP{Src: 1000, Dst: 80, Seq: 5, Ack: 6, Flags: ACK | PSH}, Payload(301, 3)),
		"tcp6": TCPFrame(eth, ip6, TCP{Src: 1000, Dst: 80, Flags: SYN, Options: []byte{2, 4, 5, 0xb4}}, Payload(7, 3)),
		"udp4": UDPFrame(eth, ip4, UDP{Src: 4000, Dst: 40000}, Payload(33, 1)),
		"udp6": UDPFrame(eth, ip6, UDP{Src: 4000, Dst: 40000}, Payload(32, 1)),
		"vlan": UDPFrame(vlan, ip4, UDP{Src: 1, Dst: 40000}, Payload(40, 1)),
		"icmp": ICMPFrame(eth, ip4, Echo(1, 2), Payload(41, 1)),
		"arp":  ARPFrame(eth, ARPRequest, eth.Src, ip4.Src, frame.MAC{}, ip4.Dst),
	} {
		t.Run(name, func(t *testing.T) {
			assert.Equal(t, rebuilt(t, b)[:len(b)], b)
			assert.True(t, ChecksumsOK(b))
			if b[12] != 0x81 && name != "arp" {
				b[len(b)-1] ^= 1
				assert.False(t, ChecksumsOK(b))
			}
		})
	}
}

func TestPartialIsCompletedByFrame(t *testing.T) {
	for _, ip := range []IP{ip4, ip6} {
		for _, want := range [][]byte{
			TCPFrame(eth, ip, TCP{Src: 1, Dst: 2, Flags: ACK}, Payload(500, 1)),
			UDPFrame(eth, ip, UDP{Src: 1, Dst: 2}, Payload(501, 1)),
		} {
			part := append([]byte(nil), want...)
			o := Partial(part)
			require.NotEqual(t, want, part)
			var b frame.Batch
			Fill(&b, part)
			f := b.Frame(0)
			f.Offload = o
			require.True(t, f.CheckOffload())
			f.CompleteChecksum()
			assert.Equal(t, want, f.Bytes())
		}
	}
}

func TestGSO(t *testing.T) {
	b := TCPFrame(eth, ip6, TCP{Src: 1, Dst: 2, Flags: ACK, Options: make([]byte, 12)}, Payload(5000, 1))
	o := GSO(b, 1400)
	assert.Equal(t, frame.Offload{Flags: frame.NeedsCsum, GSO: frame.GSOTCPv6, HdrLen: 14 + 40 + 32, GSOSize: 1400,
		CsumStart: 54, CsumOffset: 16}, o)
}

func TestMemQueueToMemPort(t *testing.T) {
	var q MemQueue
	var p MemPort
	woken := 0
	q.OnFeed = func() { woken++ }
	assert.False(t, q.Arm())
	for i := range frame.BatchSize + 3 {
		q.Feed(Payload(20+i*7, byte(i)))
	}
	assert.Equal(t, frame.BatchSize+3, woken)
	assert.True(t, q.Arm())
	q.Disarm()

	var b frame.Batch
	total := 0
	for q.Pull(&b) > 0 {
		fs := make([]*frame.Frame, 0, b.Len())
		for i := range b.Len() {
			b.Frame(i).Out = 5
			fs = append(fs, b.Frame(i))
		}
		p.Push(1, fs)
		q.Release(&b)
		total += b.Len()
		b.Reset(0)
	}
	assert.Equal(t, frame.BatchSize+3, total)
	assert.Equal(t, total, q.Released())
	for i, got := range p.Take() {
		assert.Equal(t, Payload(20+i*7, byte(i)), got.Bytes)
		assert.EqualValues(t, 5, got.Out)
	}
	_, ok := p.Next(0)
	assert.False(t, ok)
}

// recorder is a TB that notes how a test would have ended.
type recorder struct {
	*testing.T
	how string
}

func (r *recorder) Skipf(string, ...any)  { r.how = "skip" }
func (r *recorder) Fatalf(string, ...any) { r.how = "fail" }

func TestNeed(t *testing.T) {
	needs["nothing has this"] = func() error { return os.ErrNotExist }
	for _, c := range []struct{ require, need, want string }{
		{"", "nothing has this", "skip"},
		{"netns,qemu", "nothing has this", "skip"},
		{"netns, nothing has this", "nothing has this", "fail"},
		{"all", "nothing has this", "fail"},
		{"", "misspelt", "fail"},
	} {
		t.Setenv("TEST_REQUIRE", c.require)
		r := &recorder{T: t}
		Need(r, c.need)
		assert.Equal(t, c.want, r.how, c)
	}
}

func TestNetNS(t *testing.T) {
	Need(t, "netns", "ip")
	a, b := NewNetNS(t), NewNetNS(t)
	Veth(t, a, "eth0", b, "eth0")
	Must(t, a.Addr("eth0", "192.0.2.1/24"), b.Addr("eth0", "192.0.2.2/24"),
		a.Addr("eth0", "2001:db8::1/64"), b.Addr("eth0", "2001:db8::2/64"),
		a.Route("default", "192.0.2.2"), a.Sysctl("net/ipv4/ip_forward", "1"), a.SetMTU("eth0", 1400))

	out, err := a.Command("ip", "addr", "show", "dev", "eth0").Output()
	require.NoError(t, err)
	assert.Contains(t, string(out), "192.0.2.1/24")
	assert.Contains(t, string(out), "mtu 1400")
	outside, err := os.ReadFile("/proc/thread-self/net/dev")
	require.NoError(t, err)
	inside := ""
	require.NoError(t, a.Do(func() error {
		b, err := os.ReadFile("/proc/thread-self/net/dev")
		inside = string(b)
		return err
	}))
	assert.NotEqual(t, string(outside), inside)
	assert.True(t, strings.Contains(inside, "eth0"))

	Need(t, "ping")
	require.NoError(t, a.Run("ping", "-c1", "-W2", "192.0.2.2"))
	require.NoError(t, b.Run("ping", "-c1", "-W2", "2001:db8::1"))
	n, err := a.Counter("eth0", "rx_packets")
	require.NoError(t, err)
	assert.NotZero(t, n)
}

func TestNetNSDoEndsWithItsCaller(t *testing.T) {
	Need(t, "netns")
	ns := NewNetNS(t)
	after := false
	done := make(chan struct{})
	go func() {
		defer close(done)
		ns.Do(func() error { runtime.Goexit(); return nil })
		after = true
	}()
	<-done
	assert.False(t, after)
	assert.ErrorIs(t, ns.Do(func() error { return os.ErrInvalid }), os.ErrInvalid)
}

func TestNetNSIsTakenDown(t *testing.T) {
	Need(t, "netns")
	ns, err := CreateNetNS("sw-test-close-" + t.Name())
	require.NoError(t, err)
	require.NoError(t, ns.Close())
	_, err = os.Stat(ns.Path)
	assert.ErrorIs(t, err, os.ErrNotExist)
}

func TestWait(t *testing.T) {
	n := 0
	assert.True(t, Wait(time.Second, func() bool { n++; return n == 3 }))
	assert.False(t, Wait(0, func() bool { return false }))
}
