package vhosttest

import (
	"encoding/binary"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
	"sidewire/vhostuser/guestmem"
	"sidewire/vhostuser/virtq"
)

// loopback is the smallest backend: it gives every frame of a tx ring back on
// the rx ring of the same pair, and drops it if there is no room.
type loopback struct {
	features uint64
	protocol uint64
	refuse   uint32       // this request is answered with 1
	deaf     bool         // never raise an interrupt
	rewrite  func([]byte) // changes a frame on its way, behind its header
	careless bool         // spoil checksums, and say that they were found right

	mu      sync.Mutex // guards what follows and the rings' memory
	conn    *net.UnixConn
	acked   uint64
	ack     bool
	mem     *guestmem.Memory
	rings   map[int]*backRing
	seen    []uint32 // requests in order
	wake    int      // eventfd
	stop    bool
	dropped int
}

type backRing struct {
	size, base        int
	desc, avail, used uint64
	kick, call        int
	enabled           bool
	q                 *virtq.Queue
}

// startLoopback serves one connection after the other at the returned path.
func startLoopback(t *testing.T, b *loopback) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "b.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	require.NoError(t, err)
	if b.features == 0 {
		b.features = LinuxFeatures | FeatAnyLayout
	}
	b.features |= FeatRingPacked
	if b.protocol == 0 {
		b.protocol = QEMUProtocol &^ (ProtoBackendReq | ProtoDeviceState)
	}
	b.wake, err = newEventfd()
	require.NoError(t, err)
	var wg sync.WaitGroup
	wg.Add(2)
	go func() {
		defer wg.Done()
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			b.serve(c)
		}
	}()
	go func() {
		defer wg.Done()
		b.run()
	}()
	t.Cleanup(func() {
		l.Close()
		b.mu.Lock()
		b.stop = true
		if b.conn != nil {
			b.conn.Close()
		}
		b.mu.Unlock()
		signal(b.wake)
		wg.Wait()
		unix.Close(b.wake)
	})
	return path
}

// hangUp closes the connection as a crash does.
func (b *loopback) hangUp() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.conn.Close()
}

func (b *loopback) requests() []uint32 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]uint32(nil), b.seen...)
}

func (b *loopback) serve(c *net.UnixConn) {
	b.mu.Lock()
	b.conn, b.rings, b.ack = c, map[int]*backRing{}, false
	b.mu.Unlock()
	for {
		m, err := receive(c, time.Hour)
		if err != nil {
			b.reset()
			c.Close()
			return
		}
		b.mu.Lock()
		reply, hasReply := b.handle(m)
		if m.Request == b.refuse {
			reply = U64(1)
		}
		if hasReply || m.Flags&FlagNeedReply != 0 && b.ack {
			if reply == nil {
				reply = U64(0)
			}
			c.Write(Message{Request: m.Request, Flags: FlagVersion | FlagReply, Payload: reply}.Encode())
		}
		b.mu.Unlock()
		signal(b.wake)
	}
}

func (b *loopback) reset() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, r := range b.rings {
		closeFds([]int{r.kick, r.call})
	}
	b.rings = map[int]*backRing{}
}

func (b *loopback) ring(i uint32) *backRing {
	r := b.rings[int(i)]
	if r == nil {
		r = &backRing{kick: -1, call: -1}
		b.rings[int(i)] = r
	}
	return r
}

func (b *loopback) handle(m Message) (reply []byte, hasReply bool) {
	b.seen = append(b.seen, m.Request)
	u64 := func(i int) uint64 { return binary.NativeEndian.Uint64(m.Payload[8*i:]) }
	u32 := func(i int) uint32 { return binary.NativeEndian.Uint32(m.Payload[4*i:]) }
	switch m.Request {
	case ReqGetFeatures:
		return U64(b.features | FeatProtocol), true
	case ReqGetProtocolFeatures:
		return U64(b.protocol), true
	case ReqGetQueueNum, ReqGetMaxMemSlots:
		return U64(8), true
	case ReqSetFeatures:
		b.acked = u64(0)
	case ReqSetProtocolFeatures:
		b.ack = u64(0)&ProtoReplyAck != 0
	case ReqAddMemReg:
		r, err := guestmem.Map(m.Fds[0], guestmem.Spec{GPA: u64(1), Size: u64(2), UserAddr: u64(3), MmapOffset: u64(4)})
		closeFds(m.Fds)
		if err != nil {
			return U64(1), false
		}
		b.mem, _ = guestmem.New(r)
	case ReqSetVringNum:
		b.ring(u32(0)).size = int(u32(1))
	case ReqSetVringBase:
		b.ring(u32(0)).base = int(u32(1))
	case ReqSetVringAddr:
		r := b.ring(u32(0))
		r.desc, _ = b.mem.UserToGuest(u64(1), 1)
		r.used, _ = b.mem.UserToGuest(u64(2), 1)
		r.avail, _ = b.mem.UserToGuest(u64(3), 1)
	case ReqSetVringEnable:
		b.ring(u32(0)).enabled = u32(1) != 0
	case ReqSetVringCall:
		r := b.ring(u32(0))
		unix.Close(r.call)
		r.call = m.Fds[0]
		signal(r.call)
	case ReqSetVringErr:
		closeFds(m.Fds)
	case ReqSetVringKick:
		r := b.ring(u32(0))
		r.kick = m.Fds[0]
		q, err := virtq.New(b.mem, virtq.Config{Size: uint16(r.size), Desc: r.desc, Avail: r.avail, Used: r.used,
			Packed: b.acked&FeatRingPacked != 0, Base: uint16(r.base), EventIdx: b.acked&FeatEventIdx != 0, Indirect: b.acked&FeatIndirect != 0})
		if err != nil {
			return U64(1), false
		}
		r.q = q
	case ReqGetVringBase:
		r := b.ring(u32(0))
		base := uint16(r.base)
		if r.q != nil {
			base = r.q.Base()
		}
		closeFds([]int{r.kick, r.call})
		*r = backRing{kick: -1, call: -1, enabled: r.enabled}
		return U32s(u32(0), uint32(base)), true
	}
	return nil, false
}

// run is the data path.
func (b *loopback) run() {
	for {
		b.mu.Lock()
		if b.stop {
			b.mu.Unlock()
			return
		}
		fds := []unix.PollFd{{Fd: int32(b.wake), Events: unix.POLLIN}}
		more := false
		for i := 0; i < len(b.rings); i += 2 {
			rx, tx := b.rings[i], b.rings[i+1]
			if rx == nil || tx == nil || rx.q == nil || tx.q == nil {
				continue
			}
			for b.forward(rx, tx) {
			}
			more = tx.q.EnableNotify() || more
			fds = append(fds, unix.PollFd{Fd: int32(tx.kick), Events: unix.POLLIN})
		}
		b.mu.Unlock()
		if !more {
			unix.Poll(fds, -1)
		}
		for i := range fds {
			if fds[i].Revents&unix.POLLIN != 0 {
				drainEventfd(int(fds[i].Fd))
			}
		}
	}
}

// forward moves one frame.
func (b *loopback) forward(rx, tx *backRing) bool {
	c, st := tx.q.Pop(virtq.Readable, make([][]byte, 0, 64))
	if st != virtq.OK && st != virtq.Bad {
		return false
	}
	var data []byte
	for _, s := range c.Segs {
		data = append(data, s...)
	}
	if st == virtq.OK {
		b.deliver(rx, data)
	}
	tx.q.Put(c.Head, 0)
	b.publish(tx)
	return true
}

func (b *loopback) deliver(rx *backRing, data []byte) {
	hdr := frame.VnetHdrLen
	if b.acked&(FeatVersion1|FeatMrgRxbuf) != 0 {
		hdr = frame.VnetHdrMrgLen
	}
	if b.rewrite != nil {
		b.rewrite(data[hdr:])
	}
	if b.careless {
		clear(data[:frame.VnetHdrLen])
		data[0] = frame.DataValid
		if udp := hdr + etherLen + 20; len(data) >= udp+8 {
			data[udp+6] ^= 0xff
		}
	}
	var chains []virtq.Chain
	for room := 0; room < len(data); {
		c, st := rx.q.Pop(virtq.Writable, make([][]byte, 0, 64))
		if st != virtq.OK || len(chains) > 0 && b.acked&FeatMrgRxbuf == 0 {
			rx.q.Rewind(len(chains))
			b.dropped++
			return
		}
		chains = append(chains, c)
		room += c.Len
	}
	if hdr == frame.VnetHdrMrgLen {
		binary.LittleEndian.PutUint16(data[10:], uint16(len(chains)))
	}
	for _, c := range chains {
		n := 0
		for _, s := range c.Segs {
			k := copy(s, data)
			data, n = data[k:], n+k
		}
		rx.q.Put(c.Head, uint32(n))
	}
	b.publish(rx)
}

func (b *loopback) publish(r *backRing) {
	r.q.Publish()
	if r.q.NeedsNotify() && !b.deaf && r.call >= 0 {
		signal(r.call)
	}
}
