package vhostuser

import (
	"context"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Theory of operation: vhost-user has no word for the state of the guest's link.
// QEMU shows the guest a link that is down as long as it has no backend, so a link
// that is to be down is a connection that is not there: the device ends it and
// takes its socket away, and QEMU, which tries again without end, takes the link
// up when it finds the socket back.
//
// But QEMU does not start without a backend, and what a guest's driver negotiates
// while there is none never gets to the next one (QEMU keeps the features of the
// connection that ended, net/vhost-user.c). The connection of a frontend that
// comes while the link is down is therefore served, with rings that do not run,
// until the driver has set its queues up and nothing is asked any more; only then
// it ends. That is when the driver starts, before anybody in the guest uses the
// link. A driver that starts again while the link is down has to be the same one:
// a boot ROM or firmware that drives the NIC before the guest's own does is in the
// way of that. It is known who the frontend was; when its process ends, the next
// may come.

// settleTime is how long a frontend asks nothing when it has asked all that the
// start of a driver takes. QEMU asks all of it within a few milliseconds.
const settleTime = 250 * time.Millisecond

// link is the state that the guest's link is to have. Device.mu guards it.
type link struct {
	down    bool
	parked  bool          // the connection was ended, and none is taken
	changed chan struct{} // closed and replaced when the above change
	settle  *time.Timer   // of the connection that is to end
	asked   time.Time     // when the frontend asked for something last
}

// SetLink says whether the guest's link is up, which it is at first. It may be
// called at any time, before Listen too. A guest sees the change when its frontend
// has noticed it; to go up that is as often as it tries to connect.
func (d *Device) SetLink(up bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := &d.link
	switch {
	case d.closed:
		return ErrClosed
	case l.down == !up:
		return nil
	}
	l.down = !up
	if up {
		l.stopSettling()
		d.unpark()
		if d.ses != nil {
			d.resume(d.rings...) // they may have been set up meanwhile
		}
		return nil
	}
	if d.ses != nil {
		d.awaitSettled()
	}
	return nil
}

// LinkUp says whether the guest's link is to be up.
func (d *Device) LinkUp() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return !d.link.down
}

// change tells those who wait for it. d.mu is held.
func (l *link) change() {
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *link) stopSettling() {
	if l.settle != nil {
		l.settle.Stop()
		l.settle = nil
	}
}

// unpark lets a frontend connect. d.mu is held.
func (d *Device) unpark() {
	if d.link.parked {
		d.link.parked = false
		d.link.change()
	}
}

// awaitSettled ends the session when its frontend asks nothing any more. d.mu is
// held, and there is a session.
func (d *Device) awaitSettled() {
	l, s := &d.link, d.ses
	l.stopSettling()
	l.settle = nil
	if !d.driven() {
		return // what it asks next comes here again
	}
	l.settle = time.AfterFunc(max(settleTime-time.Since(l.asked), 0), func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		switch {
		case !l.down || d.ses != s || d.closed || d.moved:
		case time.Since(l.asked) < settleTime || !d.driven():
			d.awaitSettled()
		default:
			d.park(s)
		}
	})
}

// driven says whether the guest's driver has set a queue up. d.mu is held.
func (d *Device) driven() bool {
	return d.featuresSet && slices.ContainsFunc(d.rings, func(r *ring) bool { return r.started && r.hasAddr })
}

// asks notes that the frontend asked for something. d.mu is held.
func (d *Device) asks() {
	l := &d.link
	if l.asked = time.Now(); l.down && l.settle == nil && d.ses != nil {
		d.awaitSettled()
	}
}

// park ends the session and the socket. d.mu is held.
func (d *Device) park(s *session) {
	l := &d.link
	l.settle, l.parked = nil, true
	if d.ln != nil {
		_ = d.ln.Close()
		d.ln = nil
	}
	l.change()
	d.watchPeer(s)
	_ = s.conn.uc.Close()
	d.log.Info("link down: the frontend is turned away until it is up again")
}

// watchPeer lets another frontend connect when the process of this one has ended.
// Where the kernel does not tell which that is, as between PID namespaces, only
// the link's going up does. d.mu is held.
func (d *Device) watchPeer(s *session) {
	raw, err := s.conn.uc.SyscallConn()
	if err != nil {
		return
	}
	pid := 0
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	if pid <= 0 || pid == os.Getpid() {
		return
	}
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return
	}
	f := os.NewFile(uintptr(fd), "peer")
	changed, gone := d.link.changed, make(chan struct{})
	go func() {
		defer close(gone)
		if raw, err := f.SyscallConn(); err == nil {
			_ = raw.Read(func(fd uintptr) bool {
				p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
				n, _ := unix.Poll(p[:], 0)
				return n > 0
			})
		}
	}()
	go func() {
		defer f.Close() // ends the wait above too
		select {
		case <-changed:
		case <-gone:
			d.mu.Lock()
			defer d.mu.Unlock()
			if d.link.changed == changed {
				d.unpark()
			}
		}
	}()
}

// waitUnparked waits while no frontend is taken.
func (d *Device) waitUnparked(ctx context.Context) error {
	for {
		d.mu.Lock()
		closed, parked, changed := d.closed, d.link.parked, d.link.changed
		d.mu.Unlock()
		switch {
		case closed:
			return ErrClosed
		case !parked:
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
