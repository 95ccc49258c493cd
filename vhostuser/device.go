// Package vhostuser speaks the vhost-user protocol with a frontend and yields
// ports.
//
// A [Device] is the backend of one virtio-net device and lives as long as the
// port: frontends come and go on its socket, one at a time. A [Pair] is one
// queue pair of it, which a worker pulls from; Push delivers to the guest from
// any worker.
//
// The goroutine of the connection is the control plane. What it and other
// callers change is guarded by the device's mutex; workers never take that
// one. They see rings as immutable values behind atomic pointers (tx) or under
// a lock of one batch (rx), and memory is unmapped only after [Config.Barrier].
package vhostuser

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"sidewire/engine/frame"
	"sidewire/vhostuser/guestmem"
	"sidewire/vhostuser/virtq"
)

const (
	// maxPairs is how many queue pairs a device has at most.
	maxPairs = 128
	// maxPairsWithCtrl leaves the control queue an index that SET_VRING_KICK
	// can name.
	maxPairsWithCtrl = 127
	// memoryTimeout is how long a frontend whose driver has started may take
	// to share memory before somebody should be told (share=on is missing).
	memoryTimeout = 5 * time.Second
)

// Config says what a device is. Path and Name are needed; the rest may be
// zero.
type Config struct {
	Name string // for the log
	Path string // of the Unix socket
	// Client dials the socket, on which the frontend listens, instead of
	// listening on it.
	Client bool
	// SocketMode is the mode of a socket that we make; zero is 0600.
	SocketMode os.FileMode
	// QueuePairs is the number of queue pairs, 1 to 128; zero is 1. There is
	// no control queue with 128.
	QueuePairs int
	// MTU is the longest IP packet that the guest may send, in bytes, unless
	// it is segmented; zero does not limit it.
	MTU int
	// Longer takes longer packets all the same, for stages that tell the guest
	// what the MTU is.
	Longer bool
	// MAC is the device's address in the configuration space; zero leaves it
	// to the frontend.
	MAC frame.MAC
	// Snapshot is how many bytes of a frame from the guest are private (see
	// frame.Frame) at least: what the port's stages read. Zero is
	// frame.HeadSize. Of short frames and those with offloads it is as much as
	// there may be.
	Snapshot int
	// Packed offers packed virtqueues. A frontend cannot find out where such a
	// ring stands after a backend has died, so the guest's network does not
	// come back from that before the guest resets the device.
	Packed bool
	// NoGuestTSO withholds GUEST_TSO4/6, for guests that cannot take long
	// frames although they say so (XDP).
	NoGuestTSO bool
	// Barrier returns when no worker uses what was unpublished before the
	// call. nil is for tests without workers.
	Barrier func()
	// Log receives state changes; nil is slog.Default().
	Log *slog.Logger
	// OnRARP is told of an address that is to be announced to the network. It
	// runs with the device locked: it must not wait, nor call the device.
	OnRARP func(mac frame.MAC)
}

// State says how far a device is.
type State uint8

// The states. Up means that the guest's driver runs: frames flow.
const (
	Disconnected State = iota
	Connected
	Up
)

var stateNames = [...]string{"disconnected", "connected", "up"}

// String returns the state in words.
func (s State) String() string { return stateNames[s] }

// MarshalText makes states readable in JSON.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (s *State) UnmarshalText(b []byte) error {
	for i, name := range stateNames {
		if name == string(b) {
			*s = State(i)
			return nil
		}
	}
	return fmt.Errorf("no device state %q", b)
}

// Device is the backend of one virtio-net device. It satisfies the engine's
// Port; its methods are safe for concurrent use.
type Device struct {
	cfg     Config
	log     *slog.Logger
	offered uint64
	pairs   []*Pair

	rxSet    atomic.Pointer[rxSet]
	takes    atomic.Uint64 // guestFeatures, 0 while no rx ring runs
	mem      atomic.Pointer[guestmem.Memory]
	dirtyNow atomic.Pointer[guestmem.Log] // the same as dirty, for Fault

	reporting                         atomic.Bool
	faults, broken, ringErrors        atomic.Uint64
	messages, refused, protocolErrors atomic.Uint64
	badRARP, sessions, turnedAway     atomic.Uint64
	badChains                         [virtq.NumCauses]atomic.Uint64
	rxDrops                           [frame.NumReasons]atomic.Uint64

	mu          sync.Mutex // guards all below
	rings       []*ring
	ses         *session // nil while no frontend is connected
	ln          *net.UnixListener
	closed      bool
	moved       bool // the session was exported: no frontend is taken
	state       State
	features    uint64
	featuresSet bool
	proto       uint64
	regions     []region
	dirty       *guestmem.Log
	dirtySpec   logSpec
	backendFD   int
	status      uint8
	frontMTU    int
	mac         frame.MAC
	ctrl        ctrl
	expecting   *time.Timer
	link        link
	complaints  limiter
	comings     limiter // of frontends
	goings      limiter
}

// NewDevice makes a device. Nothing listens before Serve.
func NewDevice(c Config) (*Device, error) {
	if c.QueuePairs == 0 {
		c.QueuePairs = 1
	}
	switch {
	case c.QueuePairs < 1 || c.QueuePairs > maxPairs:
		return nil, fmt.Errorf("device %s: %d queue pairs, want 1 to %d", c.Name, c.QueuePairs, maxPairs)
	case c.MTU != 0 && (c.MTU < minMTU || c.MTU > maxMTU):
		return nil, fmt.Errorf("device %s: MTU %d, want %d to %d", c.Name, c.MTU, minMTU, maxMTU)
	case c.MAC[0]&1 != 0:
		return nil, fmt.Errorf("device %s: %x is a group address", c.Name, c.MAC)
	}
	if c.Snapshot <= 0 || c.Snapshot > frame.HeadSize {
		c.Snapshot = frame.HeadSize
	}
	if c.SocketMode == 0 {
		c.SocketMode = 0o600
	}
	if c.Barrier == nil {
		c.Barrier = func() {}
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	d := &Device{
		cfg: c, log: c.Log.With("device", c.Name), offered: c.offered(), mac: c.MAC, backendFD: -1, dirtySpec: logSpec{fd: -1},
		link: link{changed: make(chan struct{})},
	}
	d.rxSet.Store(new(rxSet))
	for i := range c.QueuePairs {
		p := &Pair{dev: d, index: uint16(i), snap: c.Snapshot, watched: [2]int{-1, -1}}
		p.rx.pair = p
		d.pairs = append(d.pairs, p)
	}
	n := 2 * c.QueuePairs
	if d.offered&featCtrlVQ != 0 {
		n++
	}
	for i := range n {
		d.rings = append(d.rings, d.newRing(i))
	}
	d.ctrl.init(d)
	return d, nil
}

// Pairs returns the device's queue pairs. They stay the same for its life.
func (d *Device) Pairs() []*Pair { return d.pairs }

// begin makes c the device's connection and serves it on a goroutine of its
// own. d.mu is held.
func (d *Device) begin(uc *net.UnixConn) error {
	switch {
	case d.closed:
		return ErrClosed
	case d.ses != nil || d.moved || d.link.parked:
		d.turnedAway.Add(1)
		return ErrBusy
	}
	c, err := newConn(uc)
	if err != nil {
		return err
	}
	s := &session{dev: d, conn: c, done: make(chan struct{})}
	d.ses = s
	d.sessions.Add(1)
	d.comings.log(d.log.Info, "frontend connected")
	d.updateState()
	d.asks()
	frame.Go(s.run)
	return nil
}

// endSession forgets all that came over a connection: rings, memory, log and
// features. d.mu is held, the connection's goroutine is at its end.
func (d *Device) endSession(s *session) {
	if d.ses != s {
		return
	}
	d.clear()
	d.ses = nil
	d.updateState()
}

// clear brings everything back to the state of a new connection.
func (d *Device) clear() {
	d.stop(d.rings...)
	for _, r := range d.rings {
		r.reset()
	}
	d.ctrl.reset()
	d.setLog(nil, logSpec{fd: -1})
	gone := d.regions
	d.regions = nil
	d.mem.Store(nil)
	if len(gone) > 0 {
		d.cfg.Barrier()
	}
	for _, r := range gone {
		r.close()
	}
	closeFD(d.backendFD)
	d.backendFD = -1
	d.features, d.featuresSet, d.proto, d.status, d.frontMTU = 0, false, 0, 0, 0
	d.mac = d.cfg.MAC
	d.stopExpecting()
}

// Close ends the connection and the listener, and gives everything back. The
// device cannot be used again. Queues must not be in use by workers any more,
// or Barrier must still work.
func (d *Device) Close() error {
	d.mu.Lock()
	d.closed = true
	d.link.stopSettling()
	d.link.change()
	s, ln := d.ses, d.ln
	d.ln = nil
	d.mu.Unlock()
	var err error
	if ln != nil {
		err = ln.Close()
	}
	if s != nil {
		_ = s.conn.uc.Close()
		<-s.done
	}
	d.ctrl.close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	return err
}

// updateState finds the state anew.
func (d *Device) updateState() {
	switch {
	case d.ses == nil:
		d.state = Disconnected
	case len(*d.rxSet.Load()) > 0:
		d.state = Up
	default:
		d.state = Connected
	}
}

// complain logs what a peer did wrong, at most once a second.
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

// expectMemory waits for the frontend to share memory now that the driver has
// started. QEMU without share=on never does, says so only in its own log, and
// the guest's network is silently dead.
func (d *Device) expectMemory() {
	if len(d.regions) > 0 || d.expecting != nil {
		return
	}
	s := d.ses
	d.expecting = time.AfterFunc(memoryWait, func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.ses == s && len(d.regions) == 0 {
			d.log.Error("the frontend shares no guest memory, so nothing can flow: "+
				"QEMU needs a memory backend with share=on", "path", d.cfg.Path)
		}
	})
}

// memoryWait is memoryTimeout, or less in tests.
var memoryWait = memoryTimeout

func (d *Device) stopExpecting() {
	if d.expecting != nil {
		d.expecting.Stop()
		d.expecting = nil
	}
}
