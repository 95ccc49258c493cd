package uplink

import (
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

var (
	podIP     = netip.MustParseAddr(enginetest.PodIP)
	outsideIP = netip.MustParseAddr(enginetest.OutsideIP)
	guestIP   = netip.MustParseAddr("10.0.2.2")
	gateway   = netip.MustParsePrefix("10.0.2.1/24")
)

const deadline = 5 * time.Second

// rig is a world whose pod is taken over, with the queues of its sink.
type rig struct {
	*enginetest.World
	t      testing.TB
	pod    *Pod
	up     *Uplink
	out    *Uplink // the outside's view of its end of the veth pair
	podMAC frame.MAC
	outMAC frame.MAC
	batch  *frame.Batch
	left   map[source][]received // pulled, but not looked at yet
}

// guests is the one guest of most tests.
func guests(ports ...Port) []Guest {
	return []Guest{{Addr: guestIP, Gateway: gateway, Ports: ports}}
}

func newRig(t testing.TB, ports ...Port) *rig {
	t.Helper()
	r := worldRig(t)
	r.takeOver(guests(ports...)...)
	return r
}

// worldRig is a rig whose pod is not taken over yet.
func worldRig(t testing.TB) *rig {
	t.Helper()
	enginetest.Need(t, "root", "netns", "tun")
	return &rig{World: enginetest.NewWorld(t, enginetest.WorldOptions{}), t: t, batch: new(frame.Batch), left: map[source][]received{}}
}

func (r *rig) takeOver(guests ...Guest) {
	r.t.Helper()
	enginetest.Must(r.t, r.Pod.Do(func() (err error) {
		r.pod, err = Takeover(TakeoverConfig{Link: "eth0", Guests: guests, Workers: 1})
		return err
	}))
	r.t.Cleanup(func() {
		if err := r.pod.Restore(); err != nil {
			r.t.Errorf("restore: %v", err)
		}
	})
	r.up = r.open(r.Pod, Config{Link: "eth0", Sink: r.pod.Sink(), Workers: 1, Mark: Mark})
	r.out = r.open(r.Outside, Config{Link: "veth0", Workers: 1})
	r.podMAC, r.outMAC = macIn(r.t, r.Pod, "eth0"), macIn(r.t, r.Outside, "veth0")
}

// macIn is the hardware address of a link.
func macIn(t testing.TB, ns *enginetest.NetNS, link string) frame.MAC {
	t.Helper()
	m, err := ns.MAC(link)
	require.NoError(t, err)
	return m
}

func (r *rig) open(ns *enginetest.NetNS, c Config) (u *Uplink) {
	r.t.Helper()
	enginetest.Must(r.t, ns.Do(func() (err error) {
		u, err = Open(c)
		return err
	}))
	r.t.Cleanup(func() {
		if err := u.Close(); err != nil {
			r.t.Errorf("close uplink: %v", err)
		}
	})
	return u
}

// received is one frame that was received, with what was left undone.
type received struct {
	frame.Offload
	bytes  []byte
	reason frame.DropReason
}

// source is a queue.
type source interface {
	Pull(*frame.Batch) int
	Release(*frame.Batch)
}

// next waits for a frame that match accepts and returns it; it fails the test
// if none comes.
func (r *rig) next(q source, what string, match func(p received) bool) received {
	r.t.Helper()
	p, ok := r.find(q, deadline, match)
	require.True(r.t, ok, "no %s", what)
	return p
}

func (r *rig) find(q source, d time.Duration, match func(p received) bool) (received, bool) {
	for end := time.Now().Add(d); time.Now().Before(end); {
		got := append(r.left[q], pull(q, r.batch)...)
		r.left[q] = nil
		for i, p := range got {
			if match(p) {
				r.left[q] = got[i+1:]
				return p, true
			}
		}
		// There is nobody to wake us in a test: look again soon.
		time.Sleep(time.Millisecond)
	}
	return received{}, false
}

// pull takes one batch's worth of copies.
func pull(q source, b *frame.Batch) (out []received) {
	b.Reset(0)
	if q.Pull(b) == 0 {
		return nil
	}
	for i := range b.Len() {
		f := b.Frame(i)
		out = append(out, received{f.Offload, f.Bytes(), f.Reason})
	}
	q.Release(b)
	return out
}

// send pushes whole frames.
func send(t testing.TB, p interface {
	Push(int, []*frame.Frame)
}, frames ...[]byte) {
	t.Helper()
	b := new(frame.Batch)
	enginetest.Fill(b, frames...)
	var fs []*frame.Frame
	for i := range b.Len() {
		fs = append(fs, b.Frame(i))
	}
	p.Push(0, fs)
	for _, f := range fs {
		require.Equal(t, frame.ReasonNone, f.Reason)
	}
}

// eth is the header from the outside to the pod.
func (r *rig) eth() enginetest.Eth { return enginetest.Eth{Dst: r.podMAC, Src: r.outMAC} }

// toPod is the IP header from the outside to the pod.
func toPod() enginetest.IP { return enginetest.IP{Src: outsideIP, Dst: podIP} }

// tcp matches a TCP segment between two ports with exactly these flags.
func tcp(src, dst uint16, flags byte) func(received) bool {
	return func(p received) bool {
		b := p.bytes
		return len(b) >= 54 && b[12] == 8 && b[13] == 0 && b[23] == frame.ProtoTCP && b[47] == flags &&
			be(b[34:]) == src && be(b[36:]) == dst
	}
}

// udp matches a datagram.
func udp(src, dst uint16) func(received) bool {
	return func(p received) bool {
		b := p.bytes
		return len(b) >= 42 && b[12] == 8 && b[13] == 0 && b[23] == frame.ProtoUDP && be(b[34:]) == src && be(b[36:]) == dst
	}
}

// icmp matches a message by its type.
func icmp(typ byte) func(received) bool {
	return func(p received) bool {
		b := p.bytes
		return len(b) >= 42 && b[12] == 8 && b[13] == 0 && b[23] == frame.ProtoICMP && b[34] == typ
	}
}

func be(b []byte) uint16 { return uint16(b[0])<<8 | uint16(b[1]) }

// output runs a program in a namespace.
func output(t testing.TB, ns *enginetest.NetNS, name string, args ...string) string {
	t.Helper()
	enginetest.Need(t, name)
	out, err := ns.Command(name, args...).CombinedOutput()
	require.NoError(t, err, "%s: %s", name, out)
	return string(out)
}

// state is all that Takeover could have changed in a namespace.
func state(t testing.TB, ns *enginetest.NetNS) string {
	t.Helper()
	s := output(t, ns, "nft", "list", "ruleset") + output(t, ns, "ip", "-o", "link") + output(t, ns, "ip", "-o", "-4", "addr") +
		output(t, ns, "ip", "-4", "route", "show", "table", "all") + output(t, ns, "ip", "rule")
	enginetest.Must(t, ns.Do(func() error {
		for _, f := range []string{"ipv4/ip_local_port_range", "ipv4/ip_forward",
			"ipv4/conf/all/rp_filter", "ipv4/conf/eth0/rp_filter", "ipv4/conf/all/route_localnet", "ipv4/conf/default/route_localnet"} {
			b, err := os.ReadFile("/proc/sys/net/" + f)
			if err != nil {
				return err
			}
			s += f + " " + string(b)
		}
		m, err := readPorts()
		if err != nil {
			return err
		}
		s += m.String()
		return nil
	}))
	return s
}

// in is the queue of the sink.
func (r *rig) in() source { return r.up.Queues()[0] }

// outside is the queue of what comes out of the pod.
func (r *rig) outside() source { return r.out.Queues()[0] }
