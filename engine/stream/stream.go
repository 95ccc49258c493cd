// Package stream is a port for NIC models that are not virtio: QEMU's
// `-netdev stream` framing, a length and then the Ethernet frame, on a Unix
// socket.
//
// A [Device] is the port, and the one queue of what its guest sends. It lives
// as long as the port: QEMUs come and go on its socket, one at a time. What the
// control plane knows of a connection is guarded by the device's mutex, which
// workers never take. They find the connection under a lock of one batch, one
// for each direction, so that it is closed when nobody is in it. What a Pull
// lends lies in a buffer of the device and stays valid whatever becomes of the
// connection.
//
// The framing is all that holds the stream together. Towards QEMU a frame goes
// whole or not at all: what a full socket leaves over of one is kept and sent
// before anything else. A length from QEMU that cannot be one means that the
// framing is lost, and ends the connection.
//
// QEMU as the one who dials comes back after we have been restarted if it has
// `reconnect` (8.0 and later); before, let it listen and us dial.
package stream

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Errors that callers may want to tell apart.
var (
	// ErrBusy: the device has a QEMU already.
	ErrBusy = errors.New("a QEMU is connected")
	// ErrClosed: the device was closed.
	ErrClosed = errors.New("device closed")
)

const (
	// minMTU and maxMTU bound the MTU as IPv4 does (RFC 791).
	minMTU = 68
	maxMTU = 65535
	// vlanLen is the length of a VLAN tag, for which every guest has room
	// beyond the MTU.
	vlanLen = 4
)

// Config says what a device is. Path is needed; the rest may be zero.
type Config struct {
	Name string // for the log
	Path string // of the Unix socket
	// Client dials the socket, on which QEMU listens (server=on), instead of
	// listening on it.
	Client bool
	// SocketMode is the mode of a socket that we make; zero is 0600.
	SocketMode os.FileMode
	// MTU is the longest IP packet that the guest may send, in bytes; zero does
	// not limit it.
	MTU int
	// Log receives state changes; nil is slog.Default().
	Log *slog.Logger
}

// Watcher lets a worker sleep until something happens to the device. Watch
// lets an event on fd end the sleep once (edge-triggered), Unwatch undoes it,
// Wake ends the sleep at once. All three are called from the control plane.
type Watcher interface {
	Watch(fd int) error
	Unwatch(fd int)
	Wake()
}

// Device is one NIC of a guest. It satisfies the engine's Port and Queue. Pull,
// Release, Arm and Disarm belong to one worker; all other methods are safe for
// concurrent use.
type Device struct {
	cfg   Config
	log   *slog.Logger
	tx    tx // from the guest
	rx    rx // to the guest
	count counters

	ends sync.WaitGroup // goroutines that wait for the end of a connection

	mu         sync.Mutex // guards all below
	conn       *conn      // nil while no QEMU is connected
	ln         *net.UnixListener
	closed     bool
	watcher    Watcher
	complaints limiter
	comings    limiter // of QEMUs
	goings     limiter
}

// New makes a device. Nothing listens before Listen or Serve. Close it in the
// end.
func New(c Config) (*Device, error) {
	if c.MTU != 0 && (c.MTU < minMTU || c.MTU > maxMTU) {
		return nil, fmt.Errorf("device %s: MTU %d, want %d to %d", c.Name, c.MTU, minMTU, maxMTU)
	}
	if c.SocketMode == 0 {
		c.SocketMode = 0o600
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	d := &Device{cfg: c, log: c.Log.With("device", c.Name)}
	d.tx.init(&d.count, c.MTU)
	if err := d.rx.init(&d.count); err != nil {
		return nil, fmt.Errorf("device %s: %w", c.Name, err)
	}
	return d, nil
}

// SetLink says whether the guest's link is up, which it is at first. QEMU's stream
// has no word for it: while the link is down frames are dropped both ways, and the
// guest sees no change.
func (d *Device) SetLink(up bool) { d.tx.down.Store(!up) }

// LinkUp says what SetLink did.
func (d *Device) LinkUp() bool { return !d.tx.down.Load() }

// SetWatcher says which worker to wake for the device; nil for none. It
// replaces the one before.
func (d *Device) SetWatcher(w Watcher) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return // nothing is watched, and our descriptors' numbers may be others' by now
	}
	if d.watcher != nil {
		d.watcher.Unwatch(d.rx.room)
		if d.conn != nil {
			d.watcher.Unwatch(d.conn.fd)
		}
	}
	d.watcher = w
	if w == nil {
		return
	}
	d.watch(d.rx.room)
	if d.conn != nil {
		d.watch(d.conn.fd)
	}
	w.Wake()
}

// watch lets fd wake the worker. d.mu is held, and there is a watcher.
func (d *Device) watch(fd int) {
	if err := d.watcher.Watch(fd); err != nil {
		d.log.Error("descriptor cannot be watched", "err", err)
	}
}

// Close ends the connection and the listener, and gives everything back. The
// device cannot be used again: it takes no frames and brings none.
func (d *Device) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	d.closed = true
	ln := d.ln
	d.ln = nil
	if d.conn != nil {
		d.conn.end(stopped)
		d.drop(d.conn)
	}
	if d.watcher != nil {
		d.watcher.Unwatch(d.rx.room)
	}
	err := unix.Close(d.rx.room)
	d.mu.Unlock()
	d.ends.Wait()
	if ln != nil {
		err = errors.Join(ln.Close(), err)
	}
	return err
}

// conn is one connection of a QEMU. It ends once, for one cause; whoever finds
// out calls end, and drop gives back what it has.
type conn struct {
	fd    int
	cause atomic.Uint32 // why it has ended
	ended chan struct{} // closed when it is to end
	done  chan struct{} // closed when all is given back
}

// cause is why a connection ended.
type cause uint32

const (
	running    cause = iota
	stopped          // by us
	hungUp           // QEMU is gone
	cutFrame         // QEMU is gone in the midst of a frame
	badLength        // the framing is lost
	failed           // the socket has an error
	replaced         // QEMU was gone already when another came
	numCauses        // how many there are
	firstError = badLength
	lastError  = failed
)

// causeNames are the names under which ends are counted.
var causeNames = [numCauses]string{"", "", "hang_ups", "cut_frames", "bad_length", "socket_errors", "replaced"}

// end says that the connection is over. The first cause counts. Any goroutine
// may call it; it waits for nothing.
func (c *conn) end(why cause) {
	if c.cause.CompareAndSwap(uint32(running), uint32(why)) {
		close(c.ended)
	}
}

// gone says whether QEMU has closed its side.
func (c *conn) gone() bool {
	p := [1]unix.PollFd{{Fd: int32(c.fd)}} // POLLHUP and POLLERR are always told
	n, err := unix.Poll(p[:], 0)
	return err == nil && n > 0
}

// begin makes a connection of fd, which it owns from then on, also if it
// returns an error. d.mu is held.
func (d *Device) begin(fd int) (*conn, error) {
	if d.conn != nil && d.conn.gone() {
		d.conn.end(replaced) // its worker would have seen that soon
		d.drop(d.conn)
	}
	if d.closed || d.conn != nil {
		unix.Close(fd)
		if d.closed {
			return nil, ErrClosed
		}
		d.count.turnedAway.Add(1)
		return nil, ErrBusy
	}
	c := &conn{fd: fd, ended: make(chan struct{}), done: make(chan struct{})}
	d.conn = c
	d.count.sessions.Add(1)
	d.tx.attach(c)
	d.rx.attach(c)
	if d.watcher != nil {
		d.watch(fd)
		d.watcher.Wake()
	}
	d.comings.log(d.log.Info, "QEMU connected")
	d.ends.Go(func() {
		<-c.ended
		d.mu.Lock()
		defer d.mu.Unlock()
		d.drop(c)
	})
	return c, nil
}

// drop gives back what a connection has that came to its end, unless somebody
// did already. d.mu is held.
func (d *Device) drop(c *conn) {
	if d.conn != c {
		return
	}
	d.conn = nil
	if d.watcher != nil {
		d.watcher.Unwatch(c.fd)
	}
	d.tx.detach(c)
	d.rx.detach()
	unix.Close(c.fd)
	close(c.done)
	why := cause(c.cause.Load())
	d.count.causes[why].Add(1)
	if why >= firstError && why <= lastError {
		d.complain("QEMU's connection ended", "why", causeNames[why])
	}
	d.goings.log(d.log.Info, "QEMU disconnected")
}

// complain logs what a peer did wrong, at most once a second. d.mu is held.
func (d *Device) complain(msg string, args ...any) {
	d.complaints.log(d.log.Warn, msg, args...)
}

// limiter lets one line a second through and says how many it kept back.
type limiter struct {
	last  time.Time
	muted int
}

func (l *limiter) log(to func(string, ...any), msg string, args ...any) {
	now := time.Now()
	if now.Sub(l.last) < time.Second {
		l.muted++
		return
	}
	if l.muted > 0 {
		args = append(args, "more", l.muted)
	}
	l.last, l.muted = now, 0
	to(msg, args...)
}

// counters count what a device did. Workers add to them once per batch, but
// for drops.
type counters struct {
	txFrames, txBytes    atomic.Uint64
	rxFrames, rxBytes    atomic.Uint64
	rxSplit              atomic.Uint64
	sessions, turnedAway atomic.Uint64
	causes               [numCauses]atomic.Uint64
	drops                [frame.NumReasons]atomic.Uint64
}

func (c *counters) drop(r frame.DropReason) { c.drops[r].Add(1) }
