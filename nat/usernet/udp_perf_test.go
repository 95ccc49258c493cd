package usernet

import (
	"net"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// bare is a world without the cost of checking what comes.
type bare struct {
	*world
	frames []sent
	host   *net.UDPConn
	fd     int
	tx     *datagramsOut // the host's, to send many at once
}

// newBare is a guest that has a mapping to a host's socket, and frames to send
// there.
func newBare(t testing.TB, frames, size int, opts ...option) *bare {
	t.Helper()
	w := &bare{world: newWorld(t, opts...), tx: newDatagramsOut()}
	var at = gateway(0)
	host, addr := hostUDP(t)
	w.host = host
	at = gateway(addr.Port())
	require.NoError(t, host.SetReadBuffer(4<<20))
	from := w.external(7000, host, at)
	for range frames {
		w.frames = append(w.frames, sent{data: udpTo(7000, at, string(enginetest.Payload(size, 1)))})
	}
	rc, err := host.SyscallConn()
	require.NoError(t, err)
	require.NoError(t, rc.Control(func(fd uintptr) { w.fd = int(fd) }))
	payload := enginetest.Payload(size, 2)
	for k := range w.tx.msgs {
		w.tx.names[k].Addr, w.tx.names[k].Port = from.Addr().As4(), netPort(from.Port())
		if size > 0 {
			setIov(&w.tx.partIovs[k], payload)
			w.tx.msgs[k].hdr.Iov = &w.tx.partIovs[k]
			w.tx.msgs[k].hdr.SetIovlen(1)
		}
	}
	return w
}

// guestSends is a batch of the guest's frames, without a copy.
func (w *bare) guestSends() {
	b := w.b
	b.Reset(w.now)
	b.In = portGuest
	for i := range w.frames {
		f := b.Next()
		f.SetBytes(w.frames[i].data, nil, b.Segs(1))
		f.Offload = w.frames[i].off
	}
	w.net.Process(b)
}

// drain empties the host's socket.
func (w *bare) drain() (n int) {
	for {
		_, errno := discard(int32(w.fd), 65536)
		if errno != 0 {
			return n
		}
		n++
	}
}

// hostSends lets the host send n datagrams.
func (w *bare) hostSends(n int) {
	for n > 0 {
		k, _ := sendmmsg(int32(w.fd), w.tx.msgs[:min(n, sendMost)])
		n -= k
	}
}

// pulls brings what there is, until there is nothing.
func (w *bare) pulls() (n int) {
	q := w.net.Queue(0)
	q.Disarm()
	for {
		w.b.Reset(w.now)
		k := q.Pull(w.b)
		if k == 0 {
			return n
		}
		n += k
		q.Release(w.b)
	}
}

func TestUDPAllocs(t *testing.T) {
	w := newBare(t, 64, 1000)
	if !assert.Zero(t, testing.AllocsPerRun(10, func() {
		w.guestSends()
		w.drain()
		w.hostSends(40)
		if n := w.pulls(); n != 40 {
			t.Errorf("%d of 40", n)
		}
	})) {
		return
	}
	// Nor where it is refused.
	w.net.SetPolicy(Policy{Deny: true})
	k := w.net.workers[0]
	k.drop(k.table.find(key{gport: 7000, proto: frame.ProtoUDP}))
	assert.Zero(t, testing.AllocsPerRun(10, w.guestSends))
}

func TestEchoAllocs(t *testing.T) {
	w := newWorld(t)
	b := echoTo(gatewayIP, 1, 1, "payload")
	assert.Zero(t, testing.AllocsPerRun(10, func() {
		w.b.Reset(w.now)
		f := w.b.Next()
		f.SetBytes(b, nil, nil)
		w.net.Process(w.b)
	}))
}

// BenchmarkUDPFromGuest sends 64 datagrams a batch to a socket on loopback,
// which ends them.
func BenchmarkUDPFromGuest(b *testing.B) {
	for _, c := range []struct {
		name  string
		size  int
		alone bool
	}{{"1472", 1472, false}, {"1472/alone", 1472, true}, {"64", 64, false}, {"64/alone", 64, true}} {
		b.Run(c.name, func(b *testing.B) {
			w := newBare(b, 64, c.size)
			w.net.workers[0].udp.noSegment = c.alone
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				w.guestSends()
				n += 64
				b.StopTimer()
				w.drain()
				b.StartTimer()
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n), "ns/datagram")
		})
	}
}

// BenchmarkUDPToGuest brings 40 datagrams that wait in a socket, or as many in
// runs.
func BenchmarkUDPToGuest(b *testing.B) {
	for _, c := range []struct {
		name string
		size int
		each int
	}{{"1472", 1472, 40}, {"64", 64, 40}, {"64/one", 64, 1}} {
		for _, extra := range []string{"", "/bare"} {
			b.Run(c.name+extra, func(b *testing.B) {
				w := newBare(b, 1, c.size)
				fd := w.net.workers[0].table.at(0).fd
				if extra != "" {
					setInt(fd, unix.SOL_IP, unix.IP_RECVTTL, 0)
					setInt(fd, unix.SOL_IP, unix.IP_RECVTOS, 0)
				}
				n := 0
				for b.Loop() {
					b.StopTimer()
					w.hostSends(c.each)
					b.StartTimer()
					n += w.pulls()
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n), "ns/datagram")
			})
		}
	}
}
