package vhostuser

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
	"sidewire/vhostuser/guestmem"
)

// ErrNoSession: there is no frontend whose session could move.
var ErrNoSession = errors.New("no frontend is connected")

// sessionVersion is the version of the form that Session has.
const sessionVersion = 1

// Session is all that a frontend's session consists of, as a plain value: with
// its descriptors it can be given to another Device, also of another process,
// which goes on where this one stopped, without the frontend or the guest
// noticing. Descriptors are indexes into the list that goes with the value; -1
// is none.
type Session struct {
	Version     int             `json:"version"`
	Conn        int             `json:"conn"`
	Features    uint64          `json:"features"`
	FeaturesSet bool            `json:"featuresSet"`
	Protocol    uint64          `json:"protocol"`
	Status      uint8           `json:"status"`
	MTU         int             `json:"mtu"`
	MAC         frame.MAC       `json:"mac"`
	Backend     int             `json:"backend"` // the channel of SET_BACKEND_REQ_FD
	Regions     []SessionRegion `json:"regions"`
	Log         *SessionLog     `json:"log,omitempty"`
	Rings       []SessionRing   `json:"rings"`
	Filter      Filter          `json:"filter"`
	Offloads    uint64          `json:"offloads"` // guest offloads that are on
	Pairs       int             `json:"pairs"`    // as the control queue set it
}

// SessionRegion is a region of guest memory.
type SessionRegion struct {
	guestmem.Spec
	FD    int `json:"fd"`
	Again int `json:"again,omitempty"` // how often it was added once more
}

// SessionLog is the dirty log of a migration.
type SessionLog struct {
	Size   uint64 `json:"size"`
	Offset uint64 `json:"offset"`
	FD     int    `json:"fd"`
}

// SessionRing is one ring. The addresses are the frontend's own.
type SessionRing struct {
	Index   int    `json:"index"`
	Size    uint32 `json:"size"`
	HasAddr bool   `json:"hasAddr"`
	Flags   uint32 `json:"flags"`
	Desc    uint64 `json:"desc"`
	Avail   uint64 `json:"avail"`
	Used    uint64 `json:"used"`
	UsedLog uint64 `json:"usedLog"`
	Base    uint16 `json:"base"` // next available entry, of a packed ring with its wrap counter in bit 15
	Enabled bool   `json:"enabled"`
	Started bool   `json:"started"`
	Kick    int    `json:"kick"`
	Call    int    `json:"call"`
	Err     int    `json:"err"`
}

// Export ends the session here without the frontend noticing, and returns it
// with duplicates of its descriptors, which are the caller's. The device takes
// no frontend until a session is imported, perhaps the same one because
// nobody else could take it.
func (d *Device) Export() (Session, []int, error) {
	s, err := d.detach()
	if err != nil {
		return Session{}, nil, fmt.Errorf("export: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ses != s {
		d.moved = false
		return Session{}, nil, fmt.Errorf("export: %w", ErrNoSession)
	}
	d.pause(d.rings...)
	var x fdList
	v := d.value(s, &x)
	if x.err != nil {
		x.close()
		d.moved = false
		d.resume(d.rings...)
		d.goOn(s)
		return Session{}, nil, fmt.Errorf("export: %w", x.err)
	}
	// Closing our descriptors is no end of the connection: x holds another.
	_ = s.conn.uc.Close()
	d.endSession(s)
	d.log.Info("session given away")
	return v, x.fds, nil
}

// detach stops the goroutine of the session between two messages.
func (d *Device) detach() (*session, error) {
	d.mu.Lock()
	s := d.ses
	switch {
	case d.closed:
		d.mu.Unlock()
		return nil, ErrClosed
	case s == nil || d.moved:
		d.mu.Unlock()
		return nil, ErrNoSession
	}
	d.moved = true
	s.conn.interrupt()
	d.mu.Unlock()
	<-s.done
	return s, nil
}

// goOn serves a session again whose goroutine was stopped.
func (d *Device) goOn(s *session) {
	n := &session{dev: d, conn: s.conn, done: make(chan struct{})}
	n.conn.resume()
	d.ses = n
	frame.Go(n.run)
}

// fdList collects duplicates.
type fdList struct {
	fds []int
	err error
}

// add duplicates fd and returns its index in the list; -1 stays -1.
func (x *fdList) add(fd int) int {
	if fd < 0 || x.err != nil {
		return -1
	}
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		x.err = fmt.Errorf("duplicate descriptor: %w", err)
		return -1
	}
	x.fds = append(x.fds, n)
	return len(x.fds) - 1
}

func (x *fdList) close() {
	for _, fd := range x.fds {
		closeFD(fd)
	}
}

// value writes the paused session down.
func (d *Device) value(s *session, x *fdList) Session {
	v := Session{
		Version: sessionVersion, Conn: -1, Features: d.features, FeaturesSet: d.featuresSet, Protocol: d.proto,
		Status: d.status, MTU: d.frontMTU, MAC: d.mac, Backend: x.add(d.backendFD),
		Filter: d.ctrl.snapshot(), Offloads: d.ctrl.offloads, Pairs: d.ctrl.pairs,
	}
	if err := s.conn.raw.Control(func(fd uintptr) { v.Conn = x.add(int(fd)) }); err != nil {
		x.err = err
	}
	for _, r := range d.regions {
		v.Regions = append(v.Regions, SessionRegion{r.Spec(), x.add(r.fd), r.again})
	}
	if d.dirty != nil {
		v.Log = &SessionLog{d.dirtySpec.Size, d.dirtySpec.Offset, x.add(d.dirtySpec.fd)}
	}
	for _, r := range d.rings {
		v.Rings = append(v.Rings, SessionRing{
			Index: r.index, Size: r.num, HasAddr: r.hasAddr, Flags: r.addr.Flags,
			Desc: r.addr.Desc, Avail: r.addr.Avail, Used: r.addr.Used, UsedLog: r.addr.Log,
			Base: r.base, Enabled: r.enabled, Started: r.started,
			Kick: x.add(r.kick), Call: x.add(int(r.call.fd.Load())), Err: x.add(int(r.err.fd.Load())),
		})
	}
	return v
}

// Import takes a session up that Export wrote down, and serves it. The
// descriptors stay the caller's, who closes them afterwards. The device must
// offer what was negotiated, and have no frontend.
func (d *Device) Import(v Session, fds []int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.importable(&v, fds); err != nil {
		return fmt.Errorf("import: %w", err)
	}
	if err := d.load(&v, &fdList{}, fds); err != nil {
		d.clear()
		return fmt.Errorf("import: %w", err)
	}
	uc, err := connOf(fds[v.Conn])
	if err != nil {
		d.clear()
		return fmt.Errorf("import: %w", err)
	}
	wasMoved := d.moved
	d.moved = false
	if err := d.begin(uc); err != nil {
		d.moved = wasMoved
		_ = uc.Close()
		d.clear()
		return fmt.Errorf("import: %w", err)
	}
	d.resume(d.rings...)
	for _, r := range d.rings {
		if r.started {
			r.call.signal() // one may have been lost on the way
		}
	}
	return nil
}

// importable checks a value before anything is taken from it.
func (d *Device) importable(v *Session, fds []int) error {
	switch {
	case d.closed:
		return ErrClosed
	case d.ses != nil:
		return ErrBusy
	case v.Version != sessionVersion:
		return fmt.Errorf("%w: version %d, known is %d", ErrRefused, v.Version, sessionVersion)
	case v.Features&^d.offered != 0:
		return fmt.Errorf("%w: features %v are not ours", ErrRefused, bitNames(v.Features&^d.offered, featureNames))
	case v.Protocol&^offeredProtocol != 0:
		return fmt.Errorf("%w: protocol features %v are not ours", ErrRefused,
			bitNames(v.Protocol&^offeredProtocol, protocolNames))
	case v.Conn < 0 || v.Pairs < 1 || v.Pairs > len(d.pairs):
		return fmt.Errorf("%w: connection %d, %d pairs", ErrRefused, v.Conn, v.Pairs)
	}
	refs := []int{v.Conn, v.Backend}
	for _, r := range v.Regions {
		refs = append(refs, r.FD)
	}
	if v.Log != nil {
		refs = append(refs, v.Log.FD)
	}
	for _, r := range v.Rings {
		refs = append(refs, r.Kick, r.Call, r.Err)
		if r.Index < 0 || r.Index >= len(d.rings) {
			return fmt.Errorf("%w: no ring %d", ErrRefused, r.Index)
		}
	}
	for _, fd := range refs {
		if fd < -1 || fd >= len(fds) {
			return fmt.Errorf("%w: descriptor %d of %d", ErrRefused, fd, len(fds))
		}
	}
	return nil
}

// load fills the device from a checked value. On error the device is to be
// cleared.
func (d *Device) load(v *Session, x *fdList, fds []int) error {
	dup := func(i int) int {
		if i < 0 {
			return -1
		}
		if i = x.add(fds[i]); i < 0 {
			return -1
		}
		return x.fds[i]
	}
	d.features, d.featuresSet, d.proto = v.Features, v.FeaturesSet, v.Protocol
	d.status, d.frontMTU, d.mac = v.Status, v.MTU, v.MAC
	d.backendFD = dup(v.Backend)
	d.ctrl.restore(v.Filter, v.Offloads, v.Pairs)
	for _, sr := range v.Rings {
		r := d.rings[sr.Index]
		r.num, r.base, r.enabled, r.started, r.hasAddr = sr.Size, sr.Base, sr.Enabled, sr.Started, sr.HasAddr
		r.addr = ringAddr{sr.Flags, sr.Desc, sr.Used, sr.Avail, sr.UsedLog}
		r.kick = dup(sr.Kick)
		r.kicks = kicks(r.kick)
		for _, e := range []struct {
			to *callFD
			fd int
		}{{&r.call, sr.Call}, {&r.err, sr.Err}} {
			if fd := dup(e.fd); fd >= 0 {
				if err := e.to.set(fd, d.sessions.Load()+1); err != nil {
					return err
				}
			}
		}
	}
	if l := v.Log; l != nil && l.FD >= 0 {
		log, err := guestmem.MapLog(fds[l.FD], l.Size, l.Offset)
		if err != nil {
			return err
		}
		d.setLog(log, logSpec{l.Size, l.Offset, dup(l.FD)})
	}
	if x.err != nil || len(v.Regions) == 0 {
		return x.err
	}
	return d.loadRegions(v.Regions, dup)
}

// loadRegions maps memory from the duplicates that dup makes.
func (d *Device) loadRegions(list []SessionRegion, dup func(int) int) error {
	var rs []region
	drop := func(err error) error {
		for _, r := range rs {
			r.close()
		}
		return err
	}
	for i, sr := range list {
		fd := dup(sr.FD)
		r, err := mapRegion(fd, sr.Spec)
		if err != nil {
			closeFD(fd)
			return drop(fmt.Errorf("region %d: %w", i, err))
		}
		r.again = max(sr.Again, 0)
		rs = append(rs, r)
	}
	if err := d.setMemory(rs, nil); err != nil {
		return drop(err)
	}
	return nil
}

// connOf makes a connection of a duplicate of fd.
func connOf(fd int) (*net.UnixConn, error) {
	var x fdList
	i := x.add(fd)
	if i < 0 {
		return nil, x.err
	}
	f := os.NewFile(uintptr(x.fds[i]), "frontend")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	uc, ok := c.(*net.UnixConn)
	if !ok {
		_ = c.Close()
		return nil, fmt.Errorf("%w: descriptor is no Unix socket", ErrRefused)
	}
	return uc, nil
}
