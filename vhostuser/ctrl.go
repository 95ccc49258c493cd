package vhostuser

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
	"sidewire/vhostuser/virtq"
)

// Commands of the control queue (virtio 1.2, 5.1.6.5).
const (
	ctrlRx       = 0
	ctrlMAC      = 1
	ctrlVLAN     = 2
	ctrlAnnounce = 3
	ctrlMQ       = 4
	ctrlOffloads = 5

	ctrlMACTable = 0
	ctrlMACAddr  = 1
	ctrlVLANAdd  = 0
	ctrlVLANDel  = 1

	ctrlOK  = 0
	ctrlErr = 1
)

const (
	// maxCommand is the longest command that is read: a MAC table of more
	// than a thousand entries.
	maxCommand = 8 << 10
	// maxMACs bounds each of the two lists of the MAC table.
	maxMACs = 512
	// ctrlBudget is how many commands are served before others may have the
	// device's lock.
	ctrlBudget = 32
)

// Filter is what the guest asked the device to let through. It is kept for
// those who care; nothing here filters by it.
type Filter struct {
	Promisc  bool        `json:"promisc"`
	AllMulti bool        `json:"allMulti"`
	AllUni   bool        `json:"allUni"`
	NoMulti  bool        `json:"noMulti"`
	NoUni    bool        `json:"noUni"`
	NoBcast  bool        `json:"noBcast"`
	Unicast  []frame.MAC `json:"unicast,omitempty"`
	Multi    []frame.MAC `json:"multicast,omitempty"`
	VLANs    []uint16    `json:"vlans,omitempty"`
}

// ctrl serves the control queue, where that is ours. A goroutine sleeps in an
// epoll set until the guest kicks; frontends that keep the queue for
// themselves cost nothing. Device.mu guards all but the atomic.
type ctrl struct {
	dev      *Device
	filter   Filter
	vlans    [4096 / 64]uint64
	offloads uint64 // offloadFeatures that are on
	pairs    int    // queue pairs in use
	commands atomic.Uint64

	ring    *ring // whose kick is watched
	kick    int
	epfd    int
	wakefd  int
	stop    atomic.Bool
	running sync.WaitGroup
	out, in [][]byte
	buf     []byte
}

func (c *ctrl) init(d *Device) {
	c.dev, c.kick, c.epfd, c.wakefd = d, -1, -1, -1
	c.reset()
}

// reset forgets what the driver asked for.
func (c *ctrl) reset() {
	c.filter, c.vlans = Filter{}, [len(c.vlans)]uint64{}
	c.offloads, c.pairs = offloadFeatures, 1
}

// restore takes up what another backend was asked for.
func (c *ctrl) restore(f Filter, offloads uint64, pairs int) {
	c.reset()
	for _, id := range f.VLANs {
		c.setVLAN(ctrlVLANAdd, id)
	}
	f.VLANs = nil
	c.filter, c.offloads, c.pairs = f, offloads&offloadFeatures, pairs
}

// isCtrl says whether r is the control queue. Without a configuration space a
// driver knows of one pair only, whatever GET_QUEUE_NUM said.
func (d *Device) isCtrl(r *ring) bool {
	if d.features&featCtrlVQ == 0 {
		return false
	}
	if d.features&featMQ != 0 && d.proto&protoConfig != 0 {
		return r.index == 2*len(d.pairs)
	}
	return r.index == 2
}

// watch begins to serve ring r, and looks at it once.
func (c *ctrl) watch(r *ring) {
	if r.q == nil {
		return
	}
	if err := c.start(); err != nil {
		c.dev.complain("control queue cannot be served", "err", err)
		return
	}
	if c.kick != r.kick {
		c.unwatch(c.ring)
		if r.kick >= 0 {
			ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET}
			if err := unix.EpollCtl(c.epfd, unix.EPOLL_CTL_ADD, r.kick, &ev); err != nil {
				c.dev.complain("control queue cannot be watched", "err", err)
			}
		}
		c.kick = r.kick
	}
	c.ring = r
	signal(c.wakefd)
}

// unwatch stops watching r's kick, which is about to be closed.
func (c *ctrl) unwatch(r *ring) {
	if r == nil || c.ring != r {
		return
	}
	if c.kick >= 0 {
		_ = unix.EpollCtl(c.epfd, unix.EPOLL_CTL_DEL, c.kick, nil)
	}
	c.ring, c.kick = nil, -1
}

// start makes the epoll set and the goroutine at the first use.
func (c *ctrl) start() (err error) {
	if c.epfd >= 0 {
		return nil
	}
	if c.epfd, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return err
	}
	if c.wakefd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		closeFD(c.epfd)
		c.epfd = -1
		return err
	}
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLET}
	if err = unix.EpollCtl(c.epfd, unix.EPOLL_CTL_ADD, c.wakefd, &ev); err != nil {
		closeFD(c.epfd)
		closeFD(c.wakefd)
		c.epfd, c.wakefd = -1, -1
		return err
	}
	c.out, c.in = make([][]byte, virtq.MaxSegs), make([][]byte, virtq.MaxSegs)
	c.buf = make([]byte, maxCommand)
	epfd := c.epfd
	c.running.Add(1)
	frame.Go(func() { c.run(epfd) })
	return nil
}

// close ends the goroutine. Nothing may watch any more.
func (c *ctrl) close() {
	c.dev.mu.Lock()
	c.stop.Store(true)
	if c.wakefd >= 0 {
		signal(c.wakefd)
	}
	c.dev.mu.Unlock()
	c.running.Wait()
	closeFD(c.epfd)
	closeFD(c.wakefd)
	c.epfd, c.wakefd = -1, -1
}

func (c *ctrl) run(epfd int) {
	defer c.running.Done()
	var evs [2]unix.EpollEvent
	for !c.stop.Load() {
		if _, err := unix.EpollWait(epfd, evs[:], -1); err != nil && err != unix.EINTR {
			return
		}
		for !c.stop.Load() && c.serve() {
		}
	}
}

// serve answers waiting commands and reports whether there may be more.
func (c *ctrl) serve() (more bool) {
	d := c.dev
	d.mu.Lock()
	defer d.mu.Unlock()
	defer func() {
		if r := recover(); r != nil {
			if addr, ok := frame.FaultAddr(r); !ok || !d.Fault(addr) {
				panic(r)
			}
			more = false
		}
	}()
	r := c.ring
	if r == nil || r.q == nil || r.broken.Load() || !d.isCtrl(r) {
		return false
	}
	for range ctrlBudget {
		head, out, in, st := r.q.PopBoth(c.out[:0:len(c.out)], c.in[:0:len(c.in)])
		if st == virtq.Broken || st == virtq.NoRoom {
			d.breakRing(r, r.q.Err())
			return false
		}
		if st == virtq.Empty {
			return r.q.EnableNotify()
		}
		n := uint32(0)
		if st == virtq.Bad {
			d.badChains[r.q.LastCause()].Add(1)
		} else {
			n = c.answer(out, in)
		}
		// A command may have stopped or moved the ring, but not this one.
		r.q.Put(head, n)
		r.q.Publish()
		if r.q.NeedsNotify() {
			r.call.signal()
		}
	}
	return true
}

// answer executes one command and writes its result to the last byte that the
// guest left for it. It returns how many bytes it wrote.
func (c *ctrl) answer(out, in [][]byte) uint32 {
	c.commands.Add(1)
	if len(in) == 0 {
		return 0 // nobody waits for a result
	}
	n := 0
	for _, s := range out {
		if n+len(s) > len(c.buf) {
			n = 0
			break
		}
		n += copy(c.buf[n:], s)
	}
	ack := byte(ctrlErr)
	if n >= 2 && c.execute(c.buf[0], c.buf[1], c.buf[2:n]) {
		ack = ctrlOK
	}
	in[0][0] = ack
	return 1
}

// execute carries out a command that was copied from the guest.
func (c *ctrl) execute(class, cmd byte, data []byte) bool {
	d := c.dev
	has := func(f uint64) bool { return d.features&f != 0 }
	switch class {
	case ctrlRx:
		return has(featCtrlRx) && len(data) == 1 && c.rxMode(cmd, data[0] != 0)
	case ctrlMAC:
		return c.setMACs(cmd, data)
	case ctrlVLAN:
		return has(featCtrlVLAN) && len(data) == 2 && c.setVLAN(cmd, native.Uint16(data))
	case ctrlAnnounce:
		return has(featGuestAnnounce) && cmd == 0
	case ctrlMQ:
		if !has(featMQ) || cmd != 0 || len(data) != 2 {
			return false
		}
		n := int(native.Uint16(data))
		if n < 1 || n > len(d.pairs) {
			return false
		}
		c.pairs = n
		d.publishRx()
		return true
	case ctrlOffloads:
		if !has(featCtrlGuestOffloads) || cmd != 0 || len(data) != 8 {
			return false
		}
		v := native.Uint64(data)
		if v&^(d.features&offloadFeatures) != 0 {
			return false
		}
		c.offloads = v
		for _, r := range d.rings {
			if r != c.ring && r.q != nil && !r.isTx() && r.pair != nil {
				r.publish()
			}
		}
		d.publishRx()
		return true
	}
	return false
}

func (c *ctrl) rxMode(cmd byte, on bool) bool {
	f := &c.filter
	modes := [...]*bool{&f.Promisc, &f.AllMulti, &f.AllUni, &f.NoMulti, &f.NoUni, &f.NoBcast}
	if int(cmd) >= len(modes) || cmd >= 2 && c.dev.features&featCtrlRxExtra == 0 {
		return false
	}
	*modes[cmd] = on
	return true
}

func (c *ctrl) setMACs(cmd byte, data []byte) bool {
	d := c.dev
	switch cmd {
	case ctrlMACAddr:
		if d.features&featCtrlMACAddr == 0 || len(data) != len(d.mac) || data[0]&1 != 0 {
			return false
		}
		copy(d.mac[:], data)
		return true
	case ctrlMACTable:
		if d.features&featCtrlRx == 0 {
			return false
		}
		uni, rest, ok1 := macList(data)
		multi, rest, ok2 := macList(rest)
		if !ok1 || !ok2 || len(rest) != 0 {
			return false
		}
		c.filter.Unicast, c.filter.Multi = uni, multi
		return true
	}
	return false
}

// macList decodes one list of the MAC table and returns what follows it.
func macList(b []byte) (list []frame.MAC, rest []byte, ok bool) {
	if len(b) < 4 {
		return nil, nil, false
	}
	n := native.Uint32(b)
	b = b[4:]
	if n > maxMACs || uint64(len(b)) < uint64(n)*6 {
		return nil, nil, false
	}
	for range n {
		list = append(list, frame.MAC(b[:6]))
		b = b[6:]
	}
	return list, b, true
}

func (c *ctrl) setVLAN(cmd byte, id uint16) bool {
	if id >= 4096 {
		return false
	}
	switch cmd {
	case ctrlVLANAdd:
		c.vlans[id/64] |= 1 << (id % 64)
	case ctrlVLANDel:
		c.vlans[id/64] &^= 1 << (id % 64)
	default:
		return false
	}
	return true
}

// snapshot returns a copy of the filter for others to keep.
func (c *ctrl) snapshot() Filter {
	f := c.filter
	for id := range uint16(4096) {
		if c.vlans[id/64]&(1<<(id%64)) != 0 {
			f.VLANs = append(f.VLANs, id)
		}
	}
	return f
}
