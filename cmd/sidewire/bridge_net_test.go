package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
	"sidewire/engine/uplink"
	"sidewire/vhostuser/vhosttest"
)

// ear is a raw socket on a link: it sends any frame and hears all that come.
type ear struct {
	t  *testing.T
	up *uplink.Uplink
	b  *frame.Batch
}

func listenOn(t *testing.T, ns *enginetest.NetNS, link string) *ear {
	t.Helper()
	p := &ear{t: t, b: new(frame.Batch)}
	require.NoError(t, ns.Do(func() (err error) {
		p.up, err = uplink.Open(uplink.Config{Link: link, Workers: 1, Promiscuous: true})
		return err
	}))
	t.Cleanup(func() { p.up.Close() })
	return p
}

func (e *ear) send(b []byte) {
	e.t.Helper()
	batch := new(frame.Batch)
	enginetest.Fill(batch, b)
	e.up.Push(0, []*frame.Frame{batch.Frame(0)})
	require.Equal(e.t, frame.ReasonNone, batch.Frame(0).Reason)
}

// heard are the frames that have come since it was last asked.
func (e *ear) heard() (out [][]byte) {
	q := e.up.Queues()[0]
	for {
		e.b.Reset(0)
		n := q.Pull(e.b)
		if n == 0 {
			return out
		}
		for i := range n {
			out = append(out, e.b.Frame(i).Bytes())
		}
		q.Release(e.b)
	}
}

// hears waits for a frame that ends, but for padding, with what want does.
func (e *ear) hears(want []byte) bool {
	return enginetest.Wait(soon, func() bool {
		for _, f := range e.heard() {
			if len(f) >= len(want) && bytes.Equal(f[:len(want)], want) {
				return true
			}
		}
		return false
	})
}

// strangers are senders other than the guest.
func (e *ear) strangers(guest frame.MAC) (out []string) {
	for _, f := range e.heard() {
		if frame.MAC(f[6:12]) != guest {
			out = append(out, fmt.Sprintf("%x", f[:min(len(f), 42)]))
		}
	}
	return out
}

// The pod's kernel says nothing for the guest's address, nor anything else: no
// ARP, no answer to a probe for a duplicate, no RST, no port unreachable, no echo
// reply, no IPv6. So it stays when somebody gives the link the address again, and
// without the rules as long as nobody does.
func TestBridgeRow43Row44KernelIsSilent_KubeVirtDAD(t *testing.T) {
	for _, mac := range []string{"", ", macAddress: 02:00:00:00:00:77"} {
		w := enginetest.NewWorld(t, enginetest.WorldOptions{})
		greet(t, w.Pod, 80, "pod")
		p := startBridge(t, w, onPod("vm", 1, mac))
		own := p.nicOf("vm/net").Taken.LinkMAC
		ear := listenOn(t, w.Outside, "veth0")
		ask := func() {
			outsideMAC, err := w.Outside.MAC("veth0")
			require.NoError(t, err)
			taken := p.nicOf("vm/net").Taken
			out, _ := w.Outside.Command("arping", "-D", "-c", "2", "-w", "1", "-I", "veth0", enginetest.PodIP).CombinedOutput()
			assert.Contains(t, string(out), "Received 0 response", "%s", out)
			ip := enginetest.IP{Src: addrOf(enginetest.OutsideIP), Dst: addrOf(enginetest.PodIP), TTL: 64}
			for _, dst := range []frame.MAC{own, taken.NowMAC, p.macOf("vm/net"), broadcast} {
				e := enginetest.Eth{Src: outsideMAC, Dst: dst}
				ear.send(enginetest.TCPFrame(e, ip, enginetest.TCP{Src: 4000, Dst: 80, Flags: 2, Window: 1000}, nil))
				ear.send(enginetest.TCPFrame(e, ip, enginetest.TCP{Src: 4000, Dst: 81, Flags: 2, Window: 1000}, nil))
				ear.send(enginetest.UDPFrame(e, ip, enginetest.UDP{Src: 4000, Dst: 82}, []byte("x")))
				ear.send(enginetest.ICMPFrame(e, ip, enginetest.Echo(1, 1), []byte("x")))
				ear.send(enginetest.ARPFrame(e, 1, outsideMAC, addrOf(enginetest.OutsideIP), zeroMAC, addrOf(enginetest.PodIP)))
			}
			// Whatever the kernel would have said comes before an answer to this.
			enginetest.Must(t, w.Outside.Run("ping", "-c", "1", "-W", "1", enginetest.OutsideIP))
			assert.False(t, enginetest.Wait(300*time.Millisecond, func() bool {
				s := ear.strangers(outsideMAC)
				return assert.Empty(t, s) && false
			}))
		}
		ask()
		enginetest.Must(t, w.Pod.Run("nft", "delete", "table", "netdev", "sidewire-bridge-eth0"))
		ask() // by the first layer alone
		p.stop()
		p.start(w)
		enginetest.Must(t, w.Pod.Addr("eth0", enginetest.PodIP+"/24"), w.Pod.Run("ip", "link", "set", "eth0", "arp", "on"),
			w.Pod.Sysctl("net/ipv6/conf/eth0/disable_ipv6", "0"))
		ear.heard() // what was said while nobody was served
		ask()       // by the second layer
		enginetest.Must(t, w.Pod.Run("ip", "addr", "flush", "dev", "eth0"))
		p.stop()
		assert.Contains(t, footprint(t, w.Pod)["ip -o addr"], enginetest.PodIP)
	}
}

// The guest's own probe for a duplicate of its address finds none.
func TestBridgeRow44GuestProbesItsAddress(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startBridge(t, w, onPod("vm", 1, ""))
	v := plugVM(t, p, "vm", vhosttest.Options{})
	assert.Contains(t, v.run("arping", "-D", "-c", "2", "-w", "2", "-I", "eth0", enginetest.PodIP), "Received 0 response")
	out, err := v.try("arping", "-D", "-c", "2", "-w", "2", "-I", "eth0", enginetest.OutsideIP)
	assert.Error(t, err, "the probe sees those that are there: %s", out)
}

// All frames pass in both directions as they are: VLANs, one in another, groups,
// those for the next bridge only, stations that nobody knows, and any type.
func TestBridgeRow38AllFramesPass_KubeVirt1777(t *testing.T) {
	w := enginetest.NewWorld(t, enginetest.WorldOptions{})
	p := startBridge(t, w, onPod("vm", 1, ""))
	assert.Contains(t, footprint(t, w.Pod)["ip -d -o link"], "promiscuity 1", "a NIC would not let foreign stations' frames in")
	v := plugVM(t, p, "vm", vhosttest.Options{}).quiet()
	in, out := listenOn(t, v.ns, "eth0"), listenOn(t, w.Outside, "veth0")
	stranger, nested := frame.MAC{2, 9, 9, 9, 9, 9}, frame.MAC{2, 8, 8, 8, 8, 8}
	tag := func(vlan uint16, rest []byte) []byte {
		b := binary.BigEndian.AppendUint16(nil, vlan)
		return append(b, rest...)
	}
	typed := func(typ uint16, n int) []byte {
		return append(binary.BigEndian.AppendUint16(nil, typ), enginetest.Payload(n, 3)...)
	}
	for name, f := range map[string]struct {
		dst  frame.MAC
		typ  uint16
		body []byte
	}{
		"LLDP":            {frame.MAC{1, 0x80, 0xc2, 0, 0, 0x0e}, 0x88cc, enginetest.Payload(60, 1)},
		"LACP":            {frame.MAC{1, 0x80, 0xc2, 0, 0, 2}, 0x8809, enginetest.Payload(110, 1)},
		"STP":             {frame.MAC{1, 0x80, 0xc2, 0, 0, 0}, 46, enginetest.Payload(46, 1)},
		"VLAN":            {stranger, 0x8100, tag(100, typed(0x88b5, 100))},
		"VLAN and group":  {frame.MAC{1, 0, 0x5e, 1, 2, 3}, 0x8100, tag(4094, typed(0x88b5, 1400))},
		"VLAN in a VLAN":  {stranger, 0x88a8, tag(7, append([]byte{0x81, 0}, tag(8, typed(0x88b5, 64))...))},
		"priority":        {broadcast, 0x8100, tag(0xe000, typed(0x88b5, 64))},
		"unknown station": {stranger, 0x88b5, enginetest.Payload(1500, 1)},
		"IPv6 group":      {frame.MAC{0x33, 0x33, 0, 0, 0, 1}, 0x86dd, enginetest.Payload(80, 1)},
		"broadcast":       {broadcast, 0x88b5, enginetest.Payload(46, 1)},
	} {
		for _, src := range []frame.MAC{p.macOf("vm/net"), nested} {
			b := append(append(append([]byte{}, f.dst[:]...), src[:]...), binary.BigEndian.AppendUint16(nil, f.typ)...)
			b = append(b, f.body...)
			in.send(b)
			assert.True(t, out.hears(b), "%s, out", name)
			copy(b[6:], stranger[:])
			out.send(b)
			assert.True(t, in.hears(b), "%s, in", name)
		}
	}
}

// What comes and goes on VLANs of the guest's own, and by jumbo frames, is whole.
func TestBridgeRow36Row38VLANAndJumbo(t *testing.T) {
	enginetest.Need(t, "dhclient")
	w := enginetest.NewWorld(t, enginetest.WorldOptions{MTU: 9000})
	p := startBridge(t, w, onPod("vm", 1, ""))
	v := plugVM(t, p, "vm", vhosttest.Options{}).withLease(enginetest.PodIP)
	assert.Contains(t, v.run("ip", "link", "show", "eth0"), "mtu 9000")
	v.run("ping", "-c", "1", "-W", "5", "-s", "8972", "-M", "do", enginetest.OutsideIP)
	err := v.ns.Run("ip", "link", "add", "link", "eth0", "name", "eth0.100", "type", "vlan", "id", "100")
	if err != nil && strings.Contains(err.Error(), "Unknown device type") {
		t.Skip("this kernel has no VLAN links")
	}
	enginetest.Must(t, err, w.Outside.Run("ip", "link", "add", "link", "veth0", "name", "v100", "type", "vlan", "id", "100"),
		v.ns.Up("eth0.100"), w.Outside.Up("v100"), v.ns.Addr("eth0.100", "10.100.0.2/24"), w.Outside.Addr("v100", "10.100.0.1/24"))
	carry(t, v.ns, w.Outside, "10.100.0.1:7000", 2, 4<<20)
	carry(t, w.Outside, v.ns, "10.100.0.2:7000", 2, 4<<20)
}
