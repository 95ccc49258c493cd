package usernet

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// request sends a byte and returns whether it was acknowledged within a
// millisecond.
func (p *peer) request() bool {
	p.w.t.Helper()
	as := p.raw(tcpACK|tcpPSH, "q")
	p.seq++
	p.w.pass(time.Millisecond)
	for _, a := range append(as, p.w.pull(0)...) {
		if a.tcp != nil && a.tcp.Ack == p.seq {
			return true
		}
	}
	return false
}

// Who asks and is answered in turns has requests acknowledged with the answers,
// or soon without; who sends a request in two pieces has both at once (RFC 9293,
// 3.8.6.3).
func TestAnswersCarryAcknowledgements(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	answer := func() {
		reads(t, c, 1)
		writes(t, c, "a")
		a := p.expect(nil, func(a *arrived) bool { return len(a.payload) > 0 })
		require.Equal(t, p.seq, a.tcp.Ack)
		p.ack++
		p.raw(tcpACK, "")
	}
	for range 2 {
		require.True(t, p.request(), "nobody knows yet")
		answer()
	}
	for range 5 {
		require.False(t, p.request())
		answer()
	}
	require.False(t, p.request())
	w.pass(15 * time.Millisecond)
	p.expect(w.pull(0), func(a *arrived) bool { return a.tcp.Ack == p.seq })

	require.True(t, p.request(), "the second piece")
	reads(t, c, 2)
	writes(t, c, "a")
	require.Equal(t, "a", p.hear(1))
	for range 3 {
		require.True(t, p.request())
		require.True(t, p.request())
		reads(t, c, 2)
		writes(t, c, "a")
		require.Equal(t, "a", p.hear(1))
	}
}

// Connections are taken to be like those before them.
func TestAnswersOfOthers(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	for range manyAnswers {
		works(p, c)
	}
	q, d := connected(t, w, 40001)
	require.False(t, q.request())
	require.True(t, q.request(), "a wrong guess")
	reads(t, d, 2)
	q, _ = connected(t, w, 40002)
	require.True(t, q.request())
}

// The first few bytes go without TCP_NODELAY, all else has it.
func TestNoDelayWhenThereIsMore(t *testing.T) {
	w := newWorld(t)
	p, c := connected(t, w, 40000)
	fd := w.net.workers[0].table.at(0).fd
	for k := range int32(3) {
		p.say("x")
		reads(t, c, 1)
		v, errno := getInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY)
		require.Zero(t, errno)
		require.Equal(t, min(k, 1), v)
	}
}
