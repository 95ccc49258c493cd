package vhostuser

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

const ctrlFeats = plainFeats | ctrlFeatures | featMQ | featGuestAnnounce | featMrgRxbuf | featGuestCSUM | featGuestTSO4

// command executes one control command and returns its result.
func (r *guestRing) command(class, cmd byte, data ...byte) byte {
	t := r.f.t
	t.Helper()
	b := append([]byte{class, cmd}, data...)
	at, ack := r.f.alloc(len(b)), r.f.alloc(1)
	copy(r.f.mem[at:], b)
	r.f.mem[ack] = 0xee
	bufs := []guestBuf{{at, 2, false}}
	if len(data) > 0 {
		bufs = append(bufs, guestBuf{at + 2, len(data), false})
	}
	head := r.post(append(bufs, guestBuf{ack, 1, true})...)
	_, err := unix.Write(r.kick, u64(1))
	require.NoError(t, err)
	return r.answer(head, ack)
}

func (r *guestRing) answer(head uint16, ack uint32) byte {
	t := r.f.t
	t.Helper()
	enginetest.Eventually(t, 5*time.Second, func() bool { return r.usedIdx() != r.used })
	h, n, _ := r.take()
	require.Equal(t, head, h)
	require.EqualValues(t, 1, n)
	return r.f.mem[ack]
}

func TestControlQueue(t *testing.T) { bothRings(t, testControlQueue) }

func testControlQueue(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{QueuePairs: 2})
	f := connect(t, d)
	f.bringUp(ctrlFeats, 4)
	c := f.start(4, 0)
	macs := func(n uint32, more ...byte) []byte { return append(u32s(n), more...) }
	one := []byte{2, 0, 0, 0, 0, 9}
	for _, x := range []struct {
		name       string
		class, cmd byte
		data       []byte
		want       byte
	}{
		{"promiscuous", 0, 0, []byte{1}, ctrlOK},
		{"all-multicast", 0, 1, []byte{1}, ctrlOK},
		{"no broadcast", 0, 5, []byte{1}, ctrlOK},
		{"unknown mode", 0, 6, []byte{1}, ctrlErr},
		{"mode without a value", 0, 0, nil, ctrlErr},
		{"MAC table", 1, 0, append(macs(1, one...), macs(0)...), ctrlOK},
		{"MAC table, short", 1, 0, macs(2, one...), ctrlErr},
		{"MAC table, 2^32-1", 1, 0, macs(1<<32-1, one...), ctrlErr},
		{"MAC table, surplus", 1, 0, append(macs(0), append(macs(0), 1)...), ctrlErr},
		{"MAC address", 1, 1, []byte{2, 9, 9, 9, 9, 9}, ctrlOK},
		{"MAC address, group", 1, 1, []byte{1, 9, 9, 9, 9, 9}, ctrlErr},
		{"VLAN", 2, 0, []byte{100, 0}, ctrlOK},
		{"VLAN 4096", 2, 0, []byte{0, 16}, ctrlErr},
		{"announce", 3, 0, nil, ctrlOK},
		{"pairs", 4, 0, []byte{2, 0}, ctrlOK},
		{"no pairs", 4, 0, []byte{0, 0}, ctrlErr},
		{"too many pairs", 4, 0, []byte{3, 0}, ctrlErr},
		{"RSS", 4, 1, make([]byte, 40), ctrlErr},
		{"unknown offloads", 5, 0, u64(1 << 40), ctrlErr},
		{"unknown class", 99, 0, []byte{1}, ctrlErr},
		{"very long", 0, 0, make([]byte, maxCommand), ctrlErr},
	} {
		require.Equal(t, x.want, c.command(x.class, x.cmd, x.data...), x.name)
	}
	st := d.Status()
	require.Equal(t, Filter{Promisc: true, AllMulti: true, NoBcast: true, Unicast: []frame.MAC{frame.MAC(one)}, VLANs: []uint16{100}}, st.Filter)
	require.Equal(t, "02:09:09:09:09:09", st.MAC)
	require.True(t, c.signalled())

	// A command without room for its result comes back, and so does a bad
	// chain; the queue goes on.
	c.post(guestBuf{f.alloc(2), 2, false})
	c.post(guestBuf{testMem, 2, false})
	_, _ = unix.Write(c.kick, u64(1))
	enginetest.Eventually(t, 5*time.Second, func() bool { return c.usedIdx() == c.used+2 })
	c.take()
	c.take()
	require.EqualValues(t, ctrlOK, c.command(0, 0, 0))
	require.False(t, d.Status().Filter.Promisc)
}

// The guest chooses how many queues it uses and which offloads.
func TestControlSteers(t *testing.T) { bothRings(t, testControlSteers) }

func testControlSteers(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{QueuePairs: 2})
	f := connect(t, d)
	f.bringUp(ctrlFeats, 4)
	c := f.start(4, 0)
	push := func() (first, second int) {
		for range 8 {
			f.rings[0].recv(4000)
			f.rings[2].recv(4000)
		}
		gso := tcpFrame(3000)
		var b frame.Batch
		b.Reset(0)
		enginetest.Fill(&b, gso)
		b.Frame(0).Offload = enginetest.GSO(gso, 1000)
		b.Frame(0).Queue = 1
		require.Equal(t, frame.ReasonNone, pushBatch(d, &b)[0].Reason)
		_, x := f.rings[0].received(12)
		_, y := f.rings[2].received(12)
		return len(x), len(y)
	}
	a, b := push()
	require.Equal(t, []int{1, 0}, []int{a, b}, "one pair until the guest asks for more")
	require.EqualValues(t, ctrlOK, c.command(ctrlMQ, 0, 2, 0))
	a, b = push()
	require.Equal(t, []int{0, 1}, []int{a, b})
	require.EqualValues(t, ctrlOK, c.command(ctrlOffloads, 0, u64(featGuestCSUM)...))
	a, b = push()
	require.Equal(t, []int{0, 3}, []int{a, b}, "XDP: no long frames")
	require.EqualValues(t, ctrlOK, c.command(ctrlOffloads, 0, u64(featGuestCSUM|featGuestTSO4)...))
	a, b = push()
	require.Equal(t, []int{0, 1}, []int{a, b})
}

// Without a configuration space, or without MQ, ring 2 is the control queue.
func TestControlQueueIndex(t *testing.T) { bothRings(t, testControlQueueIndex) }

func testControlQueueIndex(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{QueuePairs: 3})
	f := connect(t, d)
	f.bringUp(ctrlFeats&^featMQ, 2)
	c := f.start(2, 0)
	require.EqualValues(t, ctrlOK, c.command(ctrlRx, 0, 1))
	f.echo(d, 12)
}
