package vhostuser

import (
	"fmt"
	"sync/atomic"

	"sidewire/engine/frame"
	"sidewire/vhostuser/virtq"
)

// ring is the control plane's view of one virtqueue. Device.mu guards it, but
// for the atomics.
//
// # How a ring changes while workers use it
//
// pause takes the ring away from the data path and waits until no worker has
// it in hand; then addresses, memory, features or the log may change; resume
// builds a new queue that goes on at the same index and publishes it. A
// disabled ring only gets another state published: its queue stays.
type ring struct {
	dev   *Device
	index int
	pair  *Pair // nil for the last ring, which only a control queue can be

	num     uint32
	addr    ringAddr
	hasAddr bool
	base    uint16 // of a packed ring with the wrap counter in bit 15
	enabled bool
	started bool
	kick    int
	kicks   uint64 // what its counter was when it came
	err     callFD
	call    callFD

	q        *virtq.Queue // nil while paused
	reported bool         // err was signalled since the last start
	broken   atomic.Bool  // stopped by the data path until the next start
}

func (d *Device) newRing(i int) *ring {
	r := &ring{dev: d, index: i, kick: -1}
	if i/2 < len(d.pairs) {
		r.pair = d.pairs[i/2]
	}
	r.call.init(r.hangUp)
	r.err.init(r.hangUp)
	return r
}

// isTx says whether the guest sends on this ring.
func (r *ring) isTx() bool { return r.index&1 == 1 }

// pause takes rings away from the data path. It may wait for the workers.
func (d *Device) pause(rings ...*ring) {
	barrier := false
	for _, r := range rings {
		barrier = r.unpublish() || barrier
	}
	if barrier {
		d.cfg.Barrier()
	}
	for _, r := range rings {
		if r.q != nil {
			r.handBack()
			r.base = r.q.Base()
			r.q = nil
		}
	}
	d.publishRx()
}

// unpublish hides the ring from workers that come, and reports whether one may
// have it still in hand.
func (r *ring) unpublish() bool {
	if r.q == nil || r.dev.isCtrl(r) {
		return false
	}
	if r.isTx() {
		r.pair.tx.Store(nil)
	} else {
		r.pair.rx.set(nil, nil, 0)
	}
	// The lock of an rx ring is not enough: a worker that met a fault under it
	// has let go of it and is still on its way to ask whose memory it was.
	return true
}

// resume publishes the rings that are ready for it.
func (d *Device) resume(rings ...*ring) {
	for _, r := range rings {
		if r.q == nil && r.ready() {
			if err := r.build(); err != nil {
				r.fail(err)
				continue
			}
		}
		r.publish()
	}
	d.publishRx()
	d.updateState()
}

// ready says whether the frontend has told us all about the ring.
func (r *ring) ready() bool {
	d := r.dev
	if r.pair == nil && !d.isCtrl(r) {
		return false // the last ring is nothing else
	}
	return r.started && r.hasAddr && r.num != 0 && !r.broken.Load() && d.ses != nil && !d.link.down && d.featuresSet && len(d.regions) > 0
}

// config translates the ring's addresses.
func (r *ring) config() (virtq.Config, error) {
	d, n := r.dev, uint64(r.num)
	c := virtq.Config{
		Size:     uint16(r.num),
		Base:     r.base,
		Packed:   d.features&featRingPacked != 0,
		EventIdx: d.features&featEventIdx != 0,
		Indirect: d.features&featIndirectDesc != 0,
	}
	m := d.mem.Load()
	avail, used := 4+2*n, 4+8*n
	if c.Packed {
		avail, used = 4, 4 // event suppression areas
	}
	var ok1, ok2, ok3 bool
	c.Desc, ok1 = m.UserToGuest(r.addr.Desc, 16*n)
	c.Avail, ok2 = m.UserToGuest(r.addr.Avail, avail)
	c.Used, ok3 = m.UserToGuest(r.addr.Used, used)
	if !ok1 || !ok2 || !ok3 {
		return c, fmt.Errorf("%w: ring %d is not in memory: desc %#x, avail %#x, used %#x",
			ErrRefused, r.index, r.addr.Desc, r.addr.Avail, r.addr.Used)
	}
	if d.features&featLogAll != 0 {
		c.Log = d.dirty
		c.UsedLog = c.Used
		if r.addr.Flags&ringAddrLog != 0 {
			c.UsedLog = r.addr.Log
		}
	}
	return c, nil
}

// build makes the ring's queue.
func (r *ring) build() error {
	c, err := r.config()
	if err != nil {
		return err
	}
	q, err := virtq.New(r.dev.mem.Load(), c)
	if err != nil {
		return fmt.Errorf("%w: ring %d: %w", ErrRefused, r.index, err)
	}
	r.q = q
	return nil
}

// publish gives the ring to the data path as its state says, and wakes it.
func (r *ring) publish() {
	d := r.dev
	if !d.isCtrl(r) {
		d.ctrl.unwatch(r) // it may have been one before
	}
	switch {
	case d.isCtrl(r):
		if r.pair != nil {
			_ = r.pair.watch(r.index&1, -1) // removing never fails
		}
		d.ctrl.watch(r)
	case r.pair == nil:
	case r.q == nil || r.broken.Load():
		if r.isTx() {
			r.pair.tx.Store(nil)
		} else {
			r.pair.rx.set(nil, nil, 0)
		}
	case r.isTx():
		// A queue that starts is looked at as if it had been kicked (T3).
		r.pair.tx.Store(&txState{
			q: r.q, ring: r, hdr: d.headerLen(), feats: d.features, max: d.maxFrame(),
			enabled: r.enabled, onEmpty: d.features&featNotifyOnEmpty != 0, poll: r.kick < 0,
		})
		if r.broken.Load() { // a fault came in between
			r.pair.tx.Store(nil)
		}
		d.watchKick(r)
		r.pair.wake()
	default:
		q := r.q
		if !r.enabled {
			q = nil
		}
		r.pair.rx.set(q, r, d.guestFeatures())
		if r.pair.rx.reserved.Load() != nil {
			d.watchKick(r)
		}
	}
}

// watchKick lets the pair's worker be woken by kicks for the ring.
func (d *Device) watchKick(r *ring) {
	if err := r.pair.watch(r.index&1, r.kick); err != nil {
		d.complain("kick descriptor cannot be watched", "ring", r.index, "err", err)
	}
}

// set replaces what workers deliver with; q nil stops them.
func (x *rxRing) set(q *virtq.Queue, r *ring, feats uint64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.n, x.nSpares, x.used, x.running, x.runSpares, x.filled, x.dirty = 0, 0, 0, 0, 0, 0, false
	// Guest memory is left to the workers, which survive a fault in it.
	x.fresh = q != nil && q != x.q
	x.q, x.ring, x.feats = q, r, feats
	if q == nil {
		return
	}
	x.hdr, x.onEmpty, x.poll = r.dev.headerLen(), r.dev.features&featNotifyOnEmpty != 0, r.kick < 0
	if x.segs == nil {
		x.segs = make([][]byte, rxSegs)
	}
}

// publishRx tells workers which rx rings to spread over, and what the guest
// takes. Who waits for room looks again.
func (d *Device) publishRx() {
	limit := len(d.pairs)
	if d.features&featCtrlVQ != 0 && d.features&featMQ != 0 {
		limit = d.ctrl.pairs
	}
	var set rxSet
	for i, p := range d.pairs[:limit] {
		r := d.rings[2*i]
		if r.q != nil && r.enabled && !r.broken.Load() && !d.isCtrl(r) {
			set = append(set, &p.rx)
		}
	}
	d.rxSet.Store(&set)
	feats := uint64(0)
	if len(set) > 0 {
		feats = d.guestFeatures()
	}
	d.takes.Store(feats)
	for _, p := range d.pairs {
		if p.rx.reserved.Load() != nil {
			p.wake()
		}
	}
}

// fail notes that a started ring cannot run, and tells the frontend once.
func (r *ring) fail(err error) {
	if r.reported {
		return
	}
	r.reported = true
	r.dev.ringErrors.Add(1)
	r.err.signal()
	r.dev.complain("ring stopped", "ring", r.index, "err", err)
}

// stop ends the ring as GET_VRING_BASE does: its descriptors are closed.
func (d *Device) stop(rings ...*ring) {
	d.pause(rings...)
	for _, r := range rings {
		r.started, r.reported = false, false
		r.broken.Store(false)
		r.closeKick()
		r.call.close()
	}
	d.updateState()
}

// hangUp ends the connection of a frontend that let a worker wait.
func (r *ring) hangUp(session uint64) {
	d := r.dev
	d.mu.Lock()
	defer d.mu.Unlock()
	d.complain("frontend let an interrupt wait: its event counter was full and made to block", "ring", r.index)
	if d.ses != nil && d.sessions.Load() == session { // another may be here by now
		_ = d.ses.conn.uc.Close()
	}
}

// closeKick closes the kick descriptor once nobody watches it.
func (r *ring) closeKick() {
	if r.kick < 0 {
		return
	}
	if r.pair != nil {
		_ = r.pair.watch(r.index&1, -1) // removing never fails
	}
	r.dev.ctrl.unwatch(r)
	closeFD(r.kick)
	r.kick = -1
}

// reset brings a ring back to the state of a new connection. It is stopped.
func (r *ring) reset() {
	r.err.close()
	r.num, r.addr, r.hasAddr, r.base, r.enabled = 0, ringAddr{}, false, 0, false
}

// headerLen is the length of the virtio_net_hdr.
func (d *Device) headerLen() int {
	if d.features&(featVersion1|featMrgRxbuf) != 0 {
		return frame.VnetHdrMrgLen
	}
	return frame.VnetHdrLen
}

// maxFrame is the longest frame without GSO that the guest may send.
func (d *Device) maxFrame() int {
	if d.cfg.MTU == 0 || d.cfg.Longer {
		return frame.MaxLen
	}
	return d.cfg.MTU + frame.EthernetLen + 8
}

// guestFeatures is what was negotiated, less the offloads that the guest
// switched off through the control queue.
func (d *Device) guestFeatures() uint64 {
	return d.features &^ (offloadFeatures &^ d.ctrl.offloads)
}

// breakRing stops a ring that the data path found to be broken (H049, H050).
// It is called by workers: it waits for nothing.
func (d *Device) breakRing(r *ring, err error) {
	r.broken.Store(true)
	if r.isTx() {
		r.pair.tx.Store(nil)
	}
	d.broken.Add(1)
	d.reportLater(err)
}

// Fault is told of an access to lent memory that failed. If the address is in
// this device's memory, all its rings stop until the frontend starts them
// again, and Fault returns true. Workers call it; it waits for nothing but
// batches of others that are under way.
func (d *Device) Fault(addr uintptr) bool {
	if !d.owns(addr) {
		return false
	}
	d.faults.Add(1)
	for _, r := range d.rings {
		r.broken.Store(true)
		if r.pair == nil {
			continue
		}
		if r.isTx() {
			r.pair.tx.Store(nil)
		} else {
			r.pair.rx.set(nil, nil, 0)
		}
	}
	d.reportLater(ErrFault)
	return true
}

// owns says whether the address is in memory that the frontend shares.
func (d *Device) owns(addr uintptr) bool {
	if m := d.mem.Load(); m != nil && m.Owns(addr) {
		return true
	}
	l := d.dirtyNow.Load()
	return l != nil && l.Owns(addr)
}

// reportLater lets the control plane tell frontend and log about broken rings.
func (d *Device) reportLater(err error) {
	if d.reporting.CompareAndSwap(false, true) {
		frame.Go(func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.reporting.Store(false)
			for _, r := range d.rings {
				if r.broken.Load() && r.started {
					r.fail(err)
				}
			}
			d.publishRx()
			d.updateState()
		})
	}
}
