package uplink

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// heap is rx buffers on the heap: as many of one size as Reserve asks for, up
// to max.
type heap struct {
	size, max   int
	bufs        [][]byte
	kept, freed int
}

func (h *heap) Reserve(skip, least, most int) [][]byte {
	for (len(h.bufs)-skip)*h.size < most && len(h.bufs) < h.max {
		h.bufs = append(h.bufs, make([]byte, h.size))
	}
	if (len(h.bufs)-skip)*h.size < least {
		return nil
	}
	return h.bufs
}

func (h *heap) Keep(n int) { h.bufs, h.kept = h.bufs[:n], h.kept+n }

func (h *heap) Free() { h.bufs, h.freed = nil, h.freed+1 }

// directRig is a rig whose sink has a queue apart, with room to receive into.
func directRig(t *testing.T, h *heap, ports ...Port) (*rig, *Uplink) {
	r := newRig(t, ports...)
	u := r.open(r.Pod, Config{Link: "eth0", Sink: r.pod.Sink(), Workers: 1, Mark: Mark, Direct: true})
	require.True(t, u.Direct())
	require.Len(t, u.Queues(), 2)
	u.Queues()[0].SetRoom(h)
	return r, u
}

// long is a GSO frame of an established connection.
func (r *rig) long(n int) *frame.Frame {
	return gsoFrame(enginetest.TCPFrame(r.eth(), toPod(), enginetest.TCP{Src: 80, Dst: 45000, Flags: enginetest.ACK},
		enginetest.Payload(n, byte(n))), frame.ProtoTCP, 1448)
}

// pullSome waits for frames and returns how many came; they stay in r.batch.
func (r *rig) pullSome(q *Queue) (n int) {
	r.t.Helper()
	require.Eventually(r.t, func() bool {
		r.batch.Reset(0)
		n = q.Pull(r.batch)
		return n > 0
	}, deadline, time.Millisecond)
	return n
}

func TestDirectReceivesIntoTheBuffers(t *testing.T) {
	for _, size := range []int{1526, 4096, 66000, 100, 13} {
		h := &heap{size: size, max: 2 * roomFor / size}
		if size < 1000 {
			h.max = 150 // pieces for one message are bounded: such a guest is copied to
		}
		r, u := directRig(t, h)
		q := u.Queues()[0]
		r.out.Push(0, []*frame.Frame{r.long(40000)})
		require.Equal(t, 1, r.pullSome(q))
		require.Zero(t, r.batch.Frame(0).RxBufs, "the first long frame is a surprise")
		q.Release(r.batch)
		for _, n := range []int{40000, 3000, 64000, 20000, 130} {
			f := r.long(n)
			r.out.Push(0, []*frame.Frame{f})
			require.Equal(t, 1, r.pullSome(q))
			got := r.batch.Frame(0)
			require.Equal(t, frame.ReasonNone, got.Reason)
			require.Equal(t, f.Bytes(), got.Bytes())
			if n > 1448 {
				require.Equal(t, f.GSOSize, got.GSOSize)
			}
			if size >= 1000 && n > 3000 {
				require.EqualValues(t, (12+int(got.Len)+size-1)/size, got.RxBufs)
				tail := 0
				for i, p := range got.Tail {
					tail += len(p)
					at := 0
					if i == 0 {
						at = skipLen
					}
					require.Same(t, &h.bufs[int(got.RxAt)+i][at], &p[0], "it lies where it will be")
				}
				require.EqualValues(t, got.Len-frame.HeadSize, tail)
			} else if size < 1000 {
				require.Zero(t, got.RxBufs)
			}
			q.Release(r.batch)
		}
		require.Equal(t, h.freed > 0, h.kept > 0)
	}
}

func TestDirectTakesManyAtOnce(t *testing.T) {
	h := &heap{size: 4096, max: 100}
	r, u := directRig(t, h)
	q := u.Queues()[0]
	r.out.Push(0, []*frame.Frame{r.long(40000)})
	r.pullSome(q)
	q.Release(r.batch)
	var fs []*frame.Frame
	for i := range 9 {
		fs = append(fs, r.long(20000+i))
	}
	r.out.Push(0, fs)
	for got := 0; got < 9; {
		n := r.pullSome(q)
		next := 0
		for i := range n {
			f := r.batch.Frame(i)
			require.Equal(t, fs[got].Bytes(), f.Bytes())
			require.EqualValues(t, next, f.RxAt)
			require.NotZero(t, f.RxBufs)
			next += int(f.RxBufs)
			got++
		}
		q.Release(r.batch)
	}
	require.False(t, q.Arm())
	// Short ones are rather copied again.
	for range 3 {
		send(t, r.out, enginetest.TCPFrame(r.eth(), toPod(), enginetest.TCP{Src: 80, Dst: 45000, Flags: enginetest.ACK}, []byte("x")))
		r.pullSome(q)
		q.Release(r.batch)
	}
	require.False(t, q.direct.long)
	// Without room they wait for the arena, and none is lost.
	q.direct.long, h.max = true, 3
	r.out.Push(0, []*frame.Frame{r.long(50000)})
	require.Equal(t, 1, r.pullSome(q))
	require.Zero(t, r.batch.Frame(0).RxBufs)
}

// Nothing that the rules send to the sink although it may be the pod's own is
// received into a guest's buffers.
func TestDirectSetsApart(t *testing.T) {
	r, u := directRig(t, &heap{size: 4096, max: 20}, tcpPort(80))
	which := func(b []byte) int {
		t.Helper()
		send(t, r.out, b)
		found := -1
		require.Eventually(t, func() bool {
			for i, q := range u.Queues() {
				if len(pull(q, r.batch)) > 0 {
					found = i
				}
			}
			return found >= 0
		}, deadline, time.Millisecond)
		return found
	}
	for _, opt := range [][]byte{nil, {1, 1, 1, 1}} {
		ip := toPod()
		ip.Options = opt
		for flags, want := range map[byte]int{
			enginetest.ACK: 0, enginetest.ACK | enginetest.FIN: 0, enginetest.RST: 0, 0: 0,
			enginetest.SYN: 1, enginetest.SYN | enginetest.ACK: 1,
		} {
			require.Equal(t, want, which(enginetest.TCPFrame(r.eth(), ip, enginetest.TCP{Src: 9, Dst: 45000, Flags: flags}, []byte("x"))), "flags %#x", flags)
		}
	}
	require.Equal(t, 1, which(enginetest.UDPFrame(r.eth(), toPod(), enginetest.UDP{Src: 9, Dst: 45000}, []byte("x"))))
	require.Equal(t, 1, which(enginetest.ICMPFrame(r.eth(), toPod(), enginetest.ICMP{Type: 3, Code: 3},
		enginetest.UDPFrame(r.eth(), enginetest.IP{Src: podIP, Dst: outsideIP}, enginetest.UDP{Src: 45000, Dst: 9}, []byte("x"))[14:])))
	first, second := r.fragments(9, 45000, 7)
	require.Equal(t, 1, which(first))
	require.Equal(t, 1, which(second))
}

func TestDirectAllocatesNothing(t *testing.T) {
	h := &heap{size: 66000, max: 4}
	r, u := directRig(t, h)
	q := u.Queues()[0]
	fs := []*frame.Frame{r.long(40000)}
	bufs := h.Reserve(0, roomFor, 4*roomFor)
	h.bufs = nil
	q.SetRoom(fixed{bufs})
	q.direct.long = true
	n := 0
	require.Zero(t, testing.AllocsPerRun(50, func() {
		r.out.Push(0, fs)
		r.batch.Reset(0)
		n += q.Pull(r.batch)
		q.Release(r.batch)
	}))
	require.Equal(t, 51, n)
}

// fixed is room that is always the same.
type fixed struct{ bufs [][]byte }

func (f fixed) Reserve(int, int, int) [][]byte { return f.bufs }
func (f fixed) Keep(int)                       {}
func (f fixed) Free()                          {}

// A queue that had nothing for long is asked every fourth turn, and at once
// when something came.
func TestRest(t *testing.T) {
	asked := func(r *rest, turns int) (n int) {
		for range turns {
			if !r.due() {
				r.after(0)
				n++
			}
		}
		return n
	}
	var r rest
	require.Equal(t, 15, asked(&r, 15))
	asked(&r, 1000)
	require.Equal(t, 100, asked(&r, 400))
	for r.due() {
	}
	r.after(1)
	require.Equal(t, 15, asked(&r, 15))
}

// What comes while a queue rests wakes the worker once; the worker then finds
// it, before it sleeps again.
func TestRestForgetsNothing(t *testing.T) {
	r := newRig(t)
	u := r.open(r.Pod, Config{Link: "eth0", Sink: r.pod.Sink(), Workers: 1, Mark: Mark, Direct: true})
	rare, tap := u.Queues()[1], r.pod.Tap(0)
	for name, c := range map[string]struct {
		q interface {
			source
			Arm() bool
			SetWatcher(Watcher) error
		}
		come func()
	}{
		"queue": {rare, func() { r.syn(1, 80) }},
		"tap": {tap, func() {
			// The kernel asks for the guest's address.
			c, err := r.Pod.Dial("udp4", "10.0.2.2:9", deadline)
			require.NoError(t, err)
			defer c.Close()
			_, err = c.Write([]byte("x"))
			require.NoError(t, err)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEpoll(t)
			require.NoError(t, c.q.SetWatcher(e))
			for range 1 + restAfter*restMax {
				require.Empty(t, pull(c.q, r.batch))
			}
			c.come()
			require.Eventually(t, func() bool { return poll(e.fd, unix.POLLIN, 0) != 0 }, deadline, time.Millisecond)
			require.False(t, c.q.Arm())
			var evs [4]unix.EpollEvent
			n, err := unix.EpollWait(e.fd, evs[:], 0)
			require.NoError(t, err)
			require.Equal(t, 1, n)
			require.NotEmpty(t, pull(c.q, r.batch))
		})
	}
}
