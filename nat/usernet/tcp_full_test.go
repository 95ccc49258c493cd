package usernet

import (
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

// Guests that have no room for what comes, and bytes that stay where they are.

// losing pulls once, as if the guest had no room for the frames that lost says.
func (w *world) losing(lost func(f *frame.Frame) bool) (as []arrived) {
	w.t.Helper()
	b, q := w.b, w.net.Queue(0)
	b.Reset(w.now)
	b.Worker, b.In = 0, portHost
	q.Pull(b)
	for i := range b.Len() {
		f := b.Frame(i)
		if f.Out != portGuest {
			continue
		}
		if lost(f) {
			f.Reason = frame.NoBuffer
			continue
		}
		as = append(as, arrive(w.t, f)...)
	}
	q.Release(b)
	return as
}

// A guest whose rx ring is full for a while, again and again: nothing is lost,
// nothing comes twice, and it is not taken for loss in a network.
func TestGuestWithoutBuffers(t *testing.T) {
	for name, full := range map[string]time.Duration{"briefly": 10 * time.Millisecond, "longer than the timer": 3 * time.Second} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			p, c := connected(t, w, 40000)
			want := strings.Repeat("0123456789abcdef", 40<<10/16*10)
			go func() { c.Write([]byte(want)); c.CloseWrite() }()
			var got strings.Builder
			came, fin := 0, false
			for end := time.Now().Add(patience); !fin; {
				require.True(t, time.Now().Before(end), "%d of %d bytes", got.Len(), len(want))
				// Two frames fit, the others do not.
				left := 2
				as := w.losing(func(*frame.Frame) bool { left--; return left < 0 })
				for gone := time.Duration(0); left < 0 && gone < full; gone += 50 * time.Millisecond { // and then none for a while
					w.pass(min(full, 50*time.Millisecond))
					w.losing(func(*frame.Frame) bool { return true })
				}
				if got.Len() == len(want) {
					w.pass(3 * time.Second) // a FIN that found no room is sent again by the timer
				} else {
					require.GreaterOrEqual(t, w.net.workers[0].table.at(0).cwnd, uint32(initialSegments*1460), "no network lost it")
				}
				for _, a := range as {
					if len(a.payload) > 0 {
						require.Equal(t, p.ack, a.tcp.Seq, "nothing comes twice or out of its turn")
						got.Write(a.payload)
						p.ack += uint32(len(a.payload))
						came += len(a.payload)
					}
					fin = fin || a.tcp.FIN
				}
				w.pass(5 * time.Millisecond)
				p.raw(tcpACK, "")
			}
			assert.True(t, want == got.String(), "the same bytes")
			assert.Equal(t, len(want), came)
		})
	}
}

// The last data and the FIN behind it find no room: both come as soon as there
// is some.
func TestGuestWithoutBuffersForTheEnd(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	writes(t, c, "the end")
	require.NoError(t, c.CloseWrite())
	for lost := 0; lost < 2; {
		w.losing(func(*frame.Frame) bool { lost++; return true })
	}
	w.pass(10 * time.Millisecond) // no retransmission timer is that fast
	assert.Equal(t, "the end", p.hear(7))
	w.pass(3 * time.Second)
	p.expect(nil, func(a *arrived) bool { return a.tcp.FIN && a.tcp.Seq == p.ack })
	p.ack++
	p.raw(tcpACK|tcpFIN, "")
	w.pass(3 * time.Second)
	w.until(func() bool { return w.net.Stats().TCPOpen == 0 })
}

// What is sent again finds room, what goes the ordinary way behind it does not.
func TestGuestWithoutBuffersWhileSentAgain(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	for range 2 { // the second is peeked at behind the first
		writes(t, c, "0123456789")
		p.ack += uint32(len(p.expect(nil, func(a *arrived) bool { return len(a.payload) > 0 }).payload))
	}
	p.raw(tcpACK, "")
	writes(t, c, "lost")
	for lost := 0; lost == 0; {
		w.losing(func(*frame.Frame) bool { lost++; return true })
	}
	w.pass(3 * time.Second)
	got := ""
	for _, a := range w.losing(func(f *frame.Frame) bool { return f.Token > 0 }) {
		got += string(a.payload)
		p.ack += uint32(len(a.payload))
	}
	require.Equal(t, "lost", got)
	p.raw(tcpACK, "")
	writes(t, c, "more")
	assert.Equal(t, "more", p.hear(4))
}

// A long frame finds no room, a short one behind it does: the guest has a hole,
// asks for what is missing, and gets the right bytes.
func TestGuestWithoutBuffersForOne(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	writes(t, c, strings.Repeat("x", 60000)) // so that much may be under way
	p.hear(60000)
	want := make([]byte, 36000)
	for i := range want {
		want[i] = byte(i * 7 / 5)
	}
	writes(t, c, string(want))
	w.backlog = nil
	have := make([]byte, len(want))
	got := make([]bool, len(want))
	base, lost := p.ack, false
	take := func(as []arrived) {
		for _, a := range as {
			if a.tcp == nil {
				continue
			}
			copy(have[min(len(have), int(a.tcp.Seq-base)):], a.payload)
			for i := range a.payload {
				got[int(a.tcp.Seq-base)+i] = true
			}
		}
		for int(p.ack-base) < len(got) && got[p.ack-base] {
			p.ack++
		}
	}
	for !lost {
		take(w.losing(func(f *frame.Frame) bool {
			first := !lost && f.Token > 0
			lost = lost || first
			return first
		}))
	}
	require.NotContains(t, got[:1000], true)
	for range 3 {
		take(p.raw(tcpACK, ""))
	}
	for end := time.Now().Add(patience); int(p.ack-base) < len(want); {
		require.True(t, time.Now().Before(end), "%d bytes", p.ack-base)
		take(p.raw(tcpACK, ""))
		w.pass(5 * time.Millisecond)
		take(w.pull(0))
	}
	assert.True(t, string(want) == string(have), "the same bytes")
	p.raw(tcpACK, "")
	writes(t, c, "more")
	assert.Equal(t, "more", p.hear(4))
}

// What is taken off a socket's queue may reach over an urgent byte, where the
// kernel stops.
func TestUrgentByteAmongWhatIsDiscarded(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	rc, err := c.SyscallConn()
	require.NoError(t, err)
	want := strings.Repeat("a", 600) + "!" + strings.Repeat("b", 600)
	require.NoError(t, rc.Control(func(fd uintptr) {
		require.NoError(t, syscall.Sendto(int(fd), []byte(want[:601]), syscall.MSG_OOB, nil))
	}))
	writes(t, c, want[601:])
	got := ""
	for len(got) < len(want) {
		a := p.expect(nil, func(a *arrived) bool { return len(a.payload) > 0 })
		require.Equal(t, p.ack, a.tcp.Seq)
		got += string(a.payload)
		p.ack += uint32(len(a.payload))
	}
	p.raw(tcpACK, "")
	writes(t, c, "end")
	end := p.expect(nil, func(a *arrived) bool { return len(a.payload) > 0 })
	assert.Equal(t, "end", string(end.payload))
	w.pass(3 * time.Second)
	assert.Equal(t, "end", p.hear(3), "sent again")
	assert.Equal(t, want, got)
	assert.Equal(t, p.ack, w.net.workers[0].table.at(0).sndUna)
}

// fakeRoom lends buffers while it has some.
type fakeRoom struct {
	left  int // buffers
	bufs  [][]byte
	short bool
	armed bool
}

func (r *fakeRoom) Reserve(skip, least, most int) [][]byte {
	have := 0
	for _, b := range r.bufs[min(skip, len(r.bufs)):] {
		have += len(b)
	}
	for have < most && len(r.bufs) < r.left {
		r.bufs = append(r.bufs, make([]byte, 1500))
		have += 1500
	}
	if r.short = have < least; r.short {
		return nil
	}
	return r.bufs
}

func (r *fakeRoom) Keep(n int)  { r.bufs = r.bufs[:n] }
func (r *fakeRoom) Free()       { r.left -= len(r.bufs); r.bufs = nil }
func (r *fakeRoom) Arm() bool   { r.armed = true; return false }
func (r *fakeRoom) Disarm()     { r.armed = false }
func (r *fakeRoom) Short() bool { return r.short }

// A room that lends nothing for a while keeps long streams waiting, and nobody
// else.
func TestGuestRoomThatLendsNothing(t *testing.T) {
	r := &fakeRoom{left: 1 << 20}
	w := newWorld(t, func(c *Config) { c.Pairs = []Pair{{Room: r}} })
	p, c := connected(t, w, 40000)
	q, d := connected(t, w, 40001)
	want := strings.Repeat("0123456789abcdef", 1<<16)
	go c.Write([]byte(want))
	got := p.hear(300_000)
	require.NotEqual(t, 1<<20, r.left, "its buffers are used")
	for range 5 {
		r.left = 0
		w.until(func() bool {
			for _, a := range w.backlog {
				if uint16(a.tcp.DstPort) == p.sport && len(a.payload) > 0 {
					require.Equal(t, p.ack, a.tcp.Seq)
					got += string(a.payload)
					p.ack += uint32(len(a.payload))
				}
			}
			w.backlog = p.raw(tcpACK, "")
			return r.short
		})
		w.backlog = nil
		for range 20 {
			require.Empty(t, w.pull(0))
		}
		require.False(t, w.net.Queue(0).Arm(), "there is nothing to do")
		require.True(t, r.armed)
		w.net.Queue(0).Disarm()
		works(q, d)
		r.left = 100
		w.backlog = p.raw(tcpACK, "")
		got += p.hear(20_000)
	}
	r.left = 1 << 20
	got += p.hear(len(want) - len(got))
	assert.True(t, want == got, "the same bytes")
	assert.Zero(t, w.net.Stats().Retransmits)
}

// An urgent byte comes while a worker is too busy to ask for events.
func TestUrgentByteBeforeItsEvent(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	k := w.net.workers[0]
	rc, err := c.SyscallConn()
	require.NoError(t, err)
	got, want := "", ""
	for range 3 {
		want += "ab!cd"
		require.NoError(t, rc.Control(func(fd uintptr) {
			require.NoError(t, syscall.Sendto(int(fd), []byte("ab!"), syscall.MSG_OOB, nil))
		}))
		writes(t, c, "cd")
		for range 4 {
			k.table.at(0).flags |= readable
			k.ready(0)
			k.looked = w.now
			w.backlog = append(w.backlog, w.pull(0)...)
		}
		for len(got) < len(want) {
			a := p.expect(nil, func(a *arrived) bool { return len(a.payload) > 0 })
			require.Equal(t, p.ack, a.tcp.Seq)
			got += string(a.payload)
			p.ack += uint32(len(a.payload))
		}
		p.raw(tcpACK, "")
	}
	assert.Equal(t, want, got)
	require.NoError(t, c.CloseWrite())
	p.expect(nil, func(a *arrived) bool { return a.tcp.FIN && a.tcp.Seq == p.ack })
}

// Whatever of what was sent the guest has no room for, loses or acknowledges
// late: it gets the stream as it is.
func TestGuestLosesAtRandom(t *testing.T) {
	seeds := uint64(20)
	if soaks() {
		seeds = 500
	}
	for seed := range seeds {
		r := rand.New(rand.NewPCG(seed, 7))
		room := &fakeRoom{left: 1 << 20}
		w := newWorld(t, func(c *Config) { c.Pairs = []Pair{{Room: room}} })
		w.net.noPeekOff.Store(seed%3 == 0)
		p, c := connected(t, w, 40000)
		rc, err := c.SyscallConn()
		require.NoError(t, err)
		want := make([]byte, 20_000+r.IntN(200_000))
		for i := range want {
			want[i] = byte(i>>8 ^ i*31)
		}
		at, base := 0, p.ack
		have, got := make([]byte, len(want)), make([]bool, len(want))
		fin := false
		take := func(as []arrived) {
			for _, a := range as {
				require.False(t, a.tcp.RST)
				from := int(a.tcp.Seq - base)
				for i, v := range a.payload {
					require.False(t, got[from+i] && have[from+i] != v, "seed %d: byte %d is another", seed, from+i)
					have[from+i], got[from+i] = v, true
				}
				if a.tcp.FIN {
					require.Equal(t, len(want), from, "seed %d: the end", seed)
					fin = true
				}
			}
			for int(p.ack-base) < len(want) && got[p.ack-base] {
				p.ack++
			}
		}
		for end := time.Now().Add(patience); !fin || int(p.ack-base) < len(want); {
			require.True(t, time.Now().Before(end), "seed %d: %d of %d", seed, p.ack-base, len(want))
			if n := min(1+r.IntN(30_000), len(want)-at); n > 0 {
				flags := syscall.MSG_DONTWAIT
				if r.IntN(4) == 0 {
					flags |= syscall.MSG_OOB
				}
				require.NoError(t, rc.Control(func(fd uintptr) {
					if k, err := syscall.SendmsgN(int(fd), want[at:at+n], nil, nil, flags); err == nil {
						at += k
					}
				}))
				if at == len(want) {
					require.NoError(t, c.CloseWrite())
				}
			}
			full := r.IntN(4)
			as := w.losing(func(f *frame.Frame) bool { return r.IntN(4) < full-1 })
			if r.IntN(10) > 0 { // else the guest itself drops them
				take(as)
			}
			if r.IntN(3) > 0 {
				take(p.raw(tcpACK, ""))
			}
			w.pass([]time.Duration{50 * time.Microsecond, 5 * time.Millisecond, 300 * time.Millisecond}[r.IntN(3)])
		}
		require.True(t, string(want) == string(have), "seed %d", seed)
	}
}

// A few bytes that stay in the socket keep all of the buffer that they are the
// end of, and its window closed: they do not stay for long.
func TestAcknowledgedBytesAreDiscardedSoon(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	for n := range 20 {
		writes(t, c, "some bytes"[:1+n%10])
		p.hear(1 + n%10)
		w.pass(100 * time.Millisecond)
		w.pull(0)
		q, errno := queued(w.net.workers[0].table.at(0).fd)
		require.Zero(t, errno)
		require.Zero(t, q)
	}
}
