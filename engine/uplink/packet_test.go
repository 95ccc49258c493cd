package uplink

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// wire is a veth pair with an uplink at each end and nobody else on it.
func wire(t *testing.T, c Config) (r *rig, a, b *Uplink) {
	t.Helper()
	enginetest.Need(t, "root", "netns")
	r = &rig{t: t, batch: new(frame.Batch), left: map[source][]received{}}
	nsA, nsB := enginetest.NewNetNS(t), enginetest.NewNetNS(t)
	for _, ns := range []*enginetest.NetNS{nsA, nsB} {
		enginetest.Must(t, ns.Sysctl("net/ipv6/conf/default/disable_ipv6", "1"))
	}
	enginetest.Veth(t, nsA, "a", nsB, "b")
	enginetest.Must(t, nsA.SetMAC("a", macA), nsB.SetMAC("b", macB))
	r.World = &enginetest.World{Pod: nsA, Outside: nsB}
	a = r.open(nsA, Config{Link: "a", Workers: 1})
	c.Link = "b"
	if c.Workers == 0 {
		c.Workers = 1
	}
	return r, a, r.open(nsB, c)
}

// Hardware addresses of the wire's ends, and the header from one to the other.
var (
	macA = frame.MAC{2, 0, 0, 0, 0, 0xa}
	macB = frame.MAC{2, 0, 0, 0, 0, 0xb}
	aToB = enginetest.Eth{Dst: macB, Src: macA}
)

func TestVLANTagIsPutBack(t *testing.T) {
	r, a, b := wire(t, Config{})
	for _, size := range []int{0, 60, 104, 105, 108, 109, 110, 1000} {
		e := aToB
		e.VLAN = 0x6005
		want := enginetest.UDPFrame(e, toPod(), enginetest.UDP{Src: 1, Dst: 2}, enginetest.Payload(size, 1))
		send(t, a, want)
		p := r.next(b.Queues()[0], "tagged frame", func(received) bool { return true })
		require.Equal(t, want, p.bytes, size)
	}
	// With the checksum left undone the offsets move too.
	e := aToB
	f := gsoFrame(enginetest.UDPFrame(e, toPod(), enginetest.UDP{Src: 1, Dst: 2}, enginetest.Payload(3000, 1)), frame.ProtoUDP, 1000)
	untagged := f.Bytes()
	tagged := append(append(append([]byte(nil), untagged[:12]...), 0x81, 0, 0, 7), untagged[12:]...)
	f.SetBytes(tagged, nil, make([][]byte, 2))
	f.CsumStart += 4
	a.Push(0, []*frame.Frame{f})
	require.Equal(t, frame.ReasonNone, f.Reason)
	p := r.next(b.Queues()[0], "tagged frame", func(received) bool { return true })
	require.Equal(t, tagged, p.bytes)
	require.EqualValues(t, frame.NeedsCsum, p.Flags)
	require.EqualValues(t, 38, p.CsumStart)
	require.EqualValues(t, frame.GSOUDPL4, p.GSO)
}

// Frames of every size arrive as they were sent, from any number of pieces.
func TestSizesAndPieces(t *testing.T) {
	r, a, b := wire(t, Config{})
	payload := enginetest.Payload(1472, 9)
	for n := 18; n <= len(payload); n += 97 {
		for _, piece := range []int{1, 2, 7, 128, 4000} {
			whole := enginetest.UDPFrame(aToB, toPod(), enginetest.UDP{Src: 1, Dst: 2}, payload[:n])
			f := &frame.Frame{}
			head := whole[:min(len(whole), 60)]
			var tail [][]byte
			for rest := whole[len(head):]; len(rest) > 0; {
				k := min(piece, len(rest))
				tail = append(tail, rest[:k], nil) // empty pieces do no harm
				rest = rest[k:]
			}
			f.SetBytes(head, tail, make([][]byte, len(tail)+1))
			a.Push(0, []*frame.Frame{f})
			require.Equal(t, frame.ReasonNone, f.Reason)
			p := r.next(b.Queues()[0], "frame", func(received) bool { return true })
			require.True(t, bytes.Equal(whole, p.bytes), "%d bytes in pieces of %d", n, piece)
			require.Equal(t, frame.Offload{}, p.Offload)
		}
	}
}

// A batch of 64 frames of 64 KiB crosses without loss, in order, whole.
func TestGSOStaysWhole(t *testing.T) {
	r, a, b := wire(t, Config{})
	const size = 65000
	ip := toPod()
	var fs []*frame.Frame
	for i := range 64 {
		whole := enginetest.TCPFrame(aToB, ip, enginetest.TCP{Src: 1, Dst: 2, Flags: enginetest.ACK, Seq: uint32(i)}, enginetest.Payload(size, 5))
		fs = append(fs, gsoFrame(whole, frame.ProtoTCP, 1448))
	}
	a.Push(0, fs)
	for i, f := range fs {
		require.Equal(t, frame.ReasonNone, f.Reason)
		p := r.next(b.Queues()[0], "segment", func(received) bool { return true })
		require.Equal(t, frame.ReasonNone, p.reason)
		require.True(t, bytes.Equal(f.Bytes(), p.bytes), "frame %d", i)
		require.EqualValues(t, frame.GSOTCPv4, p.GSOType())
		require.EqualValues(t, 1448, p.GSOSize)
		require.EqualValues(t, frame.NeedsCsum, p.Flags&frame.NeedsCsum)
		require.EqualValues(t, i, binary.BigEndian.Uint32(p.bytes[38:]))
	}
}

// Where the link does not offload, the kernel segments and sums.
func TestKernelCompletesWhatTheLinkCannot(t *testing.T) {
	enginetest.Need(t, "ethtool")
	r, a, b := wire(t, Config{})
	output(t, r.Pod, "ethtool", "-K", "a", "tx", "off", "tso", "off", "gso", "off")
	payload := enginetest.Payload(5000, 4)
	f := gsoFrame(enginetest.TCPFrame(aToB, toPod(), enginetest.TCP{Src: 1, Dst: 2, Flags: enginetest.ACK}, payload), frame.ProtoTCP, 1000)
	a.Push(0, []*frame.Frame{f})
	require.Equal(t, frame.ReasonNone, f.Reason)
	var got []byte
	for range 5 {
		p := r.next(b.Queues()[0], "segment", func(received) bool { return true })
		require.Zero(t, p.Flags&frame.NeedsCsum)
		require.Len(t, p.bytes, 54+1000)
		sum := frame.Sum(p.bytes[34:], frame.Sum(p.bytes[26:34], 0)+frame.ProtoTCP+uint64(len(p.bytes)-34))
		require.EqualValues(t, 0xffff, frame.Fold(sum), "TCP checksum")
		require.EqualValues(t, 0xffff, frame.Fold(frame.Sum(p.bytes[14:34], 0)), "IP checksum")
		got = append(got, p.bytes[54:]...)
	}
	require.Equal(t, payload, got)

	f = gsoFrame(enginetest.UDPFrame(aToB, toPod(), enginetest.UDP{Src: 1, Dst: 2}, payload[:1001]), frame.ProtoUDP, 0)
	a.Push(0, []*frame.Frame{f})
	p := r.next(b.Queues()[0], "datagram", func(received) bool { return true })
	require.Equal(t, enginetest.UDPFrame(aToB, toPod(), enginetest.UDP{Src: 1, Dst: 2}, payload[:1001]), p.bytes)
}

// A flow, and the fragments of a packet, stay on one queue; flows spread; own
// frames are not seen.
func TestFanout(t *testing.T) {
	const workers = 3
	r, a, b := wire(t, Config{Workers: workers})
	where := func(f []byte) int {
		t.Helper()
		send(t, a, f)
		found := -1
		require.Eventually(t, func() bool {
			for i, q := range b.Queues() {
				b := new(frame.Batch)
				for _, p := range pull(q, b) {
					require.Equal(t, f, p.bytes)
					require.Equal(t, -1, found, "seen twice")
					found = i
				}
			}
			return found >= 0
		}, deadline, time.Millisecond)
		return found
	}
	e := aToB
	used := map[int]bool{}
	for port := uint16(100); port < 120; port++ {
		for _, opt := range [][]byte{nil, {1, 1, 1, 1}} {
			ip := toPod()
			ip.Options = opt
			want := int(port+80) % workers
			assert.Equal(t, want, where(enginetest.TCPFrame(e, ip, enginetest.TCP{Src: port, Dst: 80}, nil)))
			assert.Equal(t, want, where(enginetest.UDPFrame(e, ip, enginetest.UDP{Src: 80, Dst: port}, []byte("x"))))
			used[want] = true
		}
	}
	assert.Len(t, used, workers)
	for id := uint16(1); id < 5; id++ {
		ip := toPod()
		ip.ID, ip.Frag = id, frame.MoreFragments
		first := where(enginetest.UDPFrame(e, ip, enginetest.UDP{Src: 1, Dst: 2}, make([]byte, 16)))
		ip.Frag = 3
		assert.Equal(t, first, where(enginetest.UDPFrame(e, ip, enginetest.UDP{Src: 9, Dst: 9}, make([]byte, 16))))
		assert.Equal(t, int(id)%workers, first)
	}
	assert.Equal(t, 0, where(enginetest.ICMPFrame(e, toPod(), enginetest.Echo(1, 1), nil)))
	assert.Equal(t, 0, where(enginetest.ARPFrame(e, enginetest.ARPRequest, macA, outsideIP, frame.MAC{}, podIP)))

	six := enginetest.IP{Src: netip.MustParseAddr("2001:db8::1"), Dst: netip.MustParseAddr("2001:db8::2")}
	for port := uint16(100); port < 106; port++ {
		want := int(port+80) % workers
		assert.Equal(t, want, where(enginetest.TCPFrame(e, six, enginetest.TCP{Src: port, Dst: 80}, nil)))
		assert.Equal(t, want, where(enginetest.UDPFrame(e, six, enginetest.UDP{Src: 80, Dst: port}, []byte("x"))))
		for _, offset := range []byte{1, 24} { // the first of more, and another
			header := []byte{frame.ProtoUDP, 0, 0, offset, 0, 1, 0, byte(port)}
			assert.Equal(t, (1<<16+int(port))%workers, where(e.Frame(frame.TypeIPv6, six.Packet(headerFragment, append(header, make([]byte, 16)...)))))
		}
	}
	assert.Equal(t, 0, where(enginetest.ICMPFrame(e, six, enginetest.ICMP{Type: icmp6Echo}, make([]byte, 8))))

	// What b sends itself comes to a and to none of b's queues.
	own := enginetest.UDPFrame(enginetest.Eth{Dst: macA, Src: macB}, toPod(), enginetest.UDP{Src: 1, Dst: 2}, []byte("own"))
	for w := range workers {
		f := &frame.Frame{}
		f.SetBytes(own, nil, make([][]byte, 1))
		b.Push(w, []*frame.Frame{f})
	}
	for range workers {
		r.next(a.Queues()[0], "frame from b", func(p received) bool { return bytes.Equal(own, p.bytes) })
	}
	for _, q := range b.Queues() {
		assert.Empty(t, pull(q, r.batch))
	}
}

func TestPromiscuous(t *testing.T) {
	for _, on := range []bool{true, false} {
		t.Run(fmt.Sprint(on), func(t *testing.T) {
			r, _, _ := wire(t, Config{Promiscuous: on})
			flags := output(t, r.Outside, "ip", "-d", "-o", "link", "show", "dev", "b")
			if on {
				require.Contains(t, flags, "promiscuity 1")
			} else {
				require.Contains(t, flags, "promiscuity 0")
			}
		})
	}
}

// Frames that the kernel refuses are marked, the others of the batch arrive.
func TestRefusedFrames(t *testing.T) {
	r, a, b := wire(t, Config{})
	frameOf := func(payload int, id byte) *frame.Frame {
		f := &frame.Frame{}
		f.Out = 5
		f.SetBytes(enginetest.UDPFrame(aToB, toPod(), enginetest.UDP{Src: 1, Dst: 2}, bytes.Repeat([]byte{id}, payload)), nil, make([][]byte, 1))
		return f
	}
	bad := frameOf(1000, 9)
	bad.GSO, bad.GSOSize = 0x77, 1
	fs := []*frame.Frame{frameOf(20, 1), frameOf(2000, 2), frameOf(20, 3), bad, frameOf(20, 4)}
	a.Push(0, fs)
	for i, want := range []frame.DropReason{frame.ReasonNone, frame.SendFailed, frame.ReasonNone, frame.SendFailed, frame.ReasonNone} {
		assert.Equal(t, want, fs[i].Reason, i)
		assert.Equal(t, want == frame.SendFailed, fs[i].Out == frame.Drop, i)
	}
	for _, id := range []byte{1, 3, 4} {
		p := r.next(b.Queues()[0], "frame", func(received) bool { return true })
		assert.Equal(t, id, p.bytes[42])
	}
	enginetest.Must(t, r.Pod.Down("a"))
	f := frameOf(20, 1)
	a.Push(0, []*frame.Frame{f})
	assert.Equal(t, frame.SendFailed, f.Reason)
	enginetest.Must(t, r.Pod.Up("a"))
	require.Eventually(t, func() bool {
		f := frameOf(20, 7)
		a.Push(0, []*frame.Frame{f})
		_, ok := r.find(b.Queues()[0], 10*time.Millisecond, func(p received) bool { return p.bytes[42] == 7 })
		return ok
	}, deadline, time.Millisecond)
}

// A frame of more pieces than a message may have is sent all the same.
func TestTooManyPieces(t *testing.T) {
	r, a, b := wire(t, Config{})
	whole := enginetest.TCPFrame(aToB, toPod(), enginetest.TCP{Src: 1, Dst: 2, Flags: enginetest.ACK}, enginetest.Payload(4000, 5))
	var fs []*frame.Frame
	for range 3 {
		f := gsoFrame(whole, frame.ProtoTCP, 1000)
		rest := f.Tail[0]
		f.Tail = nil
		for len(rest) > 0 {
			f.Tail = append(f.Tail, rest[:1])
			rest = rest[1:]
		}
		require.Greater(t, len(f.Tail), iovMax)
		fs = append(fs, f)
	}
	a.Push(0, fs)
	for _, f := range fs {
		require.Equal(t, frame.ReasonNone, f.Reason)
		p := r.next(b.Queues()[0], "frame", func(received) bool { return true })
		require.True(t, bytes.Equal(f.Bytes(), p.bytes))
	}
}

// recorder is a worker that counts its descriptors.
type recorder map[int]bool

func (w recorder) Watch(fd int) error { w[fd] = true; return nil }
func (w recorder) Unwatch(fd int)     { delete(w, fd) }

func TestArm(t *testing.T) {
	r, a, b := wire(t, Config{})
	q := b.Queues()[0]
	w := recorder{}
	require.NoError(t, q.SetWatcher(w))
	require.True(t, w[q.fd])
	require.Empty(t, pull(q, r.batch))
	require.False(t, q.Arm(), "nothing came")
	q.Disarm()
	var fs [][]byte
	for range slots + 1 {
		fs = append(fs, enginetest.UDPFrame(aToB, toPod(), enginetest.UDP{Src: 1, Dst: 2}, []byte("x")))
	}
	send(t, a, fs...)
	require.Len(t, pull(q, r.batch), slots)
	require.True(t, q.Arm(), "one is left")
	require.Len(t, pull(q, r.batch), 1)
	require.False(t, q.Arm())
	require.NoError(t, b.Close())
	require.Empty(t, w)
}

func TestAllocs(t *testing.T) {
	r, a, b := wire(t, Config{})
	whole := enginetest.TCPFrame(aToB, toPod(), enginetest.TCP{Src: 1, Dst: 2, Flags: enginetest.ACK}, enginetest.Payload(3000, 5))
	var fs []*frame.Frame
	for range 8 {
		fs = append(fs, gsoFrame(whole, frame.ProtoTCP, 1000))
	}
	q := b.Queues()[0]
	n := 0
	require.Zero(t, testing.AllocsPerRun(100, func() {
		a.Push(0, fs)
		r.batch.Reset(0)
		n += q.Pull(r.batch)
		q.Release(r.batch)
		q.Arm()
		q.Disarm()
	}))
	require.Equal(t, 101*8, n)
}

func TestOpenRefuses(t *testing.T) {
	enginetest.Need(t, "root", "netns")
	ns := enginetest.NewNetNS(t)
	for name, c := range map[string]struct {
		c    Config
		want string
	}{
		"no link":  {Config{Link: "eth9", Workers: 1}, "there are: lo"},
		"loopback": {Config{Link: "lo", Workers: 1}, "not Ethernet"},
		"workers":  {Config{Link: "lo"}, "0 workers"},
	} {
		enginetest.Must(t, ns.Do(func() error {
			_, err := Open(c.c)
			require.ErrorContains(t, err, c.want, name)
			return nil
		}))
	}
}

// BenchmarkSink is the way of the guest's frames through the kernel: sent by
// the outside, forwarded to the sink, received there.
func BenchmarkSink(b *testing.B) {
	for _, c := range []struct {
		name    string
		payload int
		gso     uint16
	}{{"64B", 18, 0}, {"1500B", 1448, 0}, {"64KiB", 64000, 1448}} {
		b.Run(c.name, func(b *testing.B) {
			r := newRig(b, tcpPort(80))
			whole := enginetest.TCPFrame(r.eth(), toPod(), enginetest.TCP{Src: 1, Dst: 80, Flags: enginetest.ACK}, make([]byte, c.payload))
			var fs []*frame.Frame
			for range 32 {
				fs = append(fs, gsoFrame(whole, frame.ProtoTCP, c.gso))
			}
			q := r.up.Queues()[0]
			got := 0
			b.SetBytes(int64(len(whole)))
			for i := 0; i < b.N; i += len(fs) {
				r.out.Push(0, fs)
				r.batch.Reset(0)
				got += q.Pull(r.batch)
			}
			b.ReportMetric(float64(got)/float64((b.N+31)/32*32), "received")
		})
	}
}
