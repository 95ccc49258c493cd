package usernet

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Forwards are sockets that clients of the host's reach the guest by.
//
// A TCP forward has a listener for each worker that serves the guest, all on
// the same port (SO_REUSEPORT): the kernel deals connections out by their
// addresses, and only the worker that gets one wakes up. One listener in all
// epoll sets would wake all workers for each connection, EPOLLEXCLUSIVE or not:
// that wakes one only of those who wait on a set itself, and a worker waits on
// a set around it.
//
// A UDP forward's socket is the mapping of the guest's port (RFC 4787 REQ-1):
// what the guest sends from there leaves by it. It is a flow of the first worker
// that serves the guest, with the flag forwarded, and has no end of its own.
//
// The control plane makes and closes sockets. Workers find listeners by their
// place in an immutable list behind one atomic pointer, under their own lock; a
// descriptor is closed under the lock of the worker that uses it, after the
// list without it was published.

// Forward is a port of the host's that leads to the guest.
type Forward struct {
	Proto uint8
	// Addr is where the host listens; the zero address is all.
	Addr netip.Addr
	// Port is the host's, Guest the guest's; 0 is the same.
	Port, Guest uint16
}

// full is the forward with the guest's port.
func (f Forward) full() Forward {
	if f.Guest == 0 {
		f.Guest = f.Port
	}
	return f
}

// String is the forward as [ADDR:]PORT[:GUEST]/PROTO.
func (f Forward) String() string {
	proto := "tcp"
	if f.Proto == frame.ProtoUDP {
		proto = "udp"
	}
	s := fmt.Sprintf("%d", f.Port)
	if f.Addr.IsValid() {
		s = netip.AddrPortFrom(f.Addr, f.Port).String()
	}
	if f.Guest != 0 && f.Guest != f.Port {
		s += fmt.Sprintf(":%d", f.Guest)
	}
	return s + "/" + proto
}

// forwarded is the flag of a UDP mapping whose socket is a forward's: it does
// not end by being idle. TCP has other flags.
const forwarded flags = 1 << 15

const (
	backlog = 4096 // the kernel makes less of it where net.core.somaxconn says so
	// acceptsAtOnce bounds the connections that one turn takes of a listener.
	acceptsAtOnce = 32
	// acceptPause is how long a worker does not ask for connections after there
	// was no descriptor for one, in ticks: 0.25 s.
	acceptPause = 60
)

// listener is a forward's sockets. It is immutable while it is published.
type listener struct {
	forward Forward
	gport   uint16
	all     bool // of all ports; see listen_all.go
	gen     uint32
	fds     []int32  // by worker, -1 where there is none
	pause   []uint32 // by worker, and its own: it takes no connection before this tick; 0 is none
}

// forwards is what a Net has for its forwards beside the map of them.
type forwards struct {
	places atomic.Pointer[[]*listener] // nil where there is none
	gen    uint32                      // of the last listener; Net.mu guards it
	hidden hidden
	only   atomic.Uint32 // the host's one address beside the loopback, 0 if there are others or none
}

type protoPort struct {
	proto uint8
	port  uint16
}

// AddForward lets clients of the host's port reach the guest.
func (n *Net) AddForward(f Forward) error {
	if err := f.check(); err != nil {
		return err
	}
	if f.Addr.IsValid() && f.Addr.Is4() != (n.six == nil) {
		return fmt.Errorf("forward %s: want an %s address", f, n.familyName())
	}
	f = f.full()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		return errors.New("the user network is closed")
	}
	l := &listener{forward: f, gport: f.Guest, fds: slices.Repeat([]int32{-1}, len(n.workers)), pause: make([]uint32, len(n.workers))}
	for other := range n.listeners {
		switch {
		case other == f:
			return fmt.Errorf("forward %s: there is one already", f)
		case f.Proto == frame.ProtoUDP && other.Proto == f.Proto && n.listeners[other].gport == l.gport:
			// The guest's answers would have two ways out.
			return fmt.Errorf("forward %s: %s leads to the guest's UDP port %d already; a UDP port has one forward", f, other, l.gport)
		}
	}
	if err := n.listen(l); err != nil {
		return fmt.Errorf("forward %s: %w", f, err)
	}
	n.listeners[f] = l
	return nil
}

func (f Forward) check() error {
	switch {
	case f.Proto != frame.ProtoTCP && f.Proto != frame.ProtoUDP:
		return fmt.Errorf("protocol %d cannot be forwarded: want TCP or UDP", f.Proto)
	case f.Port == 0:
		return errors.New("port 0 cannot be forwarded: want one from 1 to 65535")
	}
	return nil
}

// listen opens a forward's sockets and gives them to the workers.
func (n *Net) listen(l *listener) error {
	var err error
	if l.forward.Proto == frame.ProtoUDP {
		var fd int32
		if fd, err = n.bound(l, unix.SOCK_DGRAM, false); err == nil {
			err = n.giveMapping(l, fd)
		}
		return err
	}
	n.forwards.gen++
	l.gen = n.forwards.gen
	serving := n.serving()
	for k, id := range serving {
		// Only the first finds out whether somebody else has the port.
		if l.fds[id], err = n.bound(l, unix.SOCK_STREAM, k > 0); err != nil {
			break
		}
		if err = unix.Listen(int(l.fds[id]), backlog); err != nil {
			err = explain(err, l.forward)
			break
		}
		if k == 0 && len(serving) > 1 {
			setInt(l.fds[id], unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		}
	}
	if err != nil {
		n.shut(l)
		return err
	}
	i := n.publish(l)
	for _, id := range serving {
		// Level-triggered: what one turn leaves is told again to the next.
		if err := n.workers[id].watch(l.fds[id], unix.EPOLLIN, eventListener, i, l.gen); err != nil {
			n.retract(l)
			n.shut(l)
			return err
		}
	}
	return nil
}

// serving are the workers that serve the guest's queue pairs, or all if nothing
// is said of those.
func (n *Net) serving() (ids []int) {
	for _, p := range n.conf.Pairs {
		ids = append(ids, p.Worker)
	}
	if len(ids) == 0 {
		for id := range n.workers {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

var errNoDescriptor = errors.New("the guest has all the descriptors that it may have: raise the limit of open files (ulimit -n)")

// bound makes a socket that has a forward's port.
func (n *Net) bound(l *listener, typ int, share bool) (int32, error) {
	if !n.sockets.take() {
		return -1, errNoDescriptor
	}
	fd, err := n.socket(typ, 0)
	if err == nil {
		if typ == unix.SOCK_STREAM {
			setInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1) // old connections of the port are no hindrance
		}
		if share {
			setInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
		}
		sa := sockAddr{Family: uint16(n.family()), Port: netPort(l.forward.Port)}
		switch a := l.forward.Addr; {
		case a.Is4():
			sa.Addr = a.As4()
		case a.IsValid():
			sa.six = a.As16()
		}
		errno := bind(fd, &sa)
		if errno == 0 {
			if typ == unix.SOCK_STREAM {
				// Who may not mark it as ours has no need to: see uplink.Redirect.
				n.setIP(fd, unix.IP_TRANSPARENT, 1)
			}
			return fd, nil
		}
		err = errno
		_ = unix.Close(int(fd))
	}
	n.sockets.give()
	return -1, explain(err, l.forward)
}

// explain says what a failed bind means, and how to mend it.
func explain(err error, f Forward) error {
	switch {
	case errors.Is(err, unix.EADDRINUSE):
		return fmt.Errorf("%w: another process listens there; end it, or forward another port", err)
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: it takes CAP_NET_BIND_SERVICE, or the setting net.ipv4.ip_unprivileged_port_start of at most %d", err, f.Port)
	case errors.Is(err, unix.EADDRNOTAVAIL):
		return fmt.Errorf("%w: %s is no address of this host", err, f.Addr)
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return fmt.Errorf("%w: raise the limit of open files (ulimit -n)", err)
	}
	return err
}

// publish lets workers find a listener, by the place that it returns.
func (n *Net) publish(l *listener) int32 {
	var places []*listener
	if old := n.forwards.places.Load(); old != nil {
		places = slices.Clone(*old)
	}
	i := slices.Index(places, nil)
	if i < 0 {
		i = len(places)
		places = append(places, nil)
	}
	places[i] = l
	n.forwards.places.Store(&places)
	return int32(i)
}

// retract undoes publish.
func (n *Net) retract(l *listener) {
	places := slices.Clone(*n.forwards.places.Load())
	places[slices.Index(places, l)] = nil
	n.forwards.places.Store(&places)
}

// shut closes a listener's sockets. No worker finds them any more, and each has
// left those that it had found when its lock is free.
func (n *Net) shut(l *listener) {
	for id, fd := range l.fds {
		if fd < 0 {
			continue
		}
		w := n.workers[id]
		w.mu.Lock()
		_ = unix.Close(int(fd))
		w.mu.Unlock()
		n.sockets.give()
	}
}

// RemoveForward undoes AddForward. Connections that came by it stay.
func (n *Net) RemoveForward(f Forward) error {
	f = f.full()
	n.mu.Lock()
	defer n.mu.Unlock()
	l := n.listeners[f]
	if l == nil {
		return fmt.Errorf("forward %s: there is none", f)
	}
	delete(n.listeners, f)
	if f.Proto == frame.ProtoUDP {
		n.takeMapping(l.gport)
		return nil
	}
	n.retract(l)
	n.shut(l)
	return nil
}

// Forwards are those that there are, in order of protocol, port and address.
func (n *Net) Forwards() []Forward {
	n.mu.Lock()
	defer n.mu.Unlock()
	var fs []Forward
	for f := range n.listeners {
		fs = append(fs, f)
	}
	slices.SortFunc(fs, func(a, b Forward) int {
		if a.Proto != b.Proto {
			return int(a.Proto) - int(b.Proto)
		}
		if a.Port != b.Port {
			return int(a.Port) - int(b.Port)
		}
		return a.Addr.Compare(b.Addr)
	})
	return fs
}

// forwardedPorts are the host's ports that lead to the guest.
func (n *Net) forwardedPorts() map[protoPort]bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	m := map[protoPort]bool{}
	for f := range n.listeners {
		m[protoPort{f.Proto, f.Port}] = true
	}
	return m
}

// close closes a listener's sockets when the workers have stopped.
func (l *listener) close() {
	for _, fd := range l.fds {
		if fd >= 0 {
			_ = unix.Close(int(fd))
		}
	}
}

// giveMapping makes fd the socket of the guest's UDP port. If the guest has a
// mapping for that port already, it goes on with the new socket.
func (n *Net) giveMapping(l *listener, fd int32) error {
	err := n.udpOptions(fd)
	if err == nil && !l.forward.Addr.IsValid() {
		err = n.tellAddress(fd)
	}
	if err != nil {
		_ = unix.Close(int(fd))
		n.sockets.give()
		return err
	}
	n.lockAll()
	defer n.unlockAll()
	k := key{gport: l.gport, proto: frame.ProtoUDP}
	w, i := n.findAnywhere(k)
	if i == none {
		w = n.workers[n.serving()[0]]
		if i = w.table.add(k); i == none {
			_ = unix.Close(int(fd))
			n.sockets.give()
			return errors.New("the table of flows is full")
		}
		w.stats.opened(frame.ProtoUDP)
	} else {
		w.udpLetGo(i)
		_ = unix.Close(int(w.table.at(i).fd))
		n.sockets.give()
	}
	f := w.table.at(i)
	f.fd, f.state = fd, stateMapping
	f.flags |= forwarded
	if !l.forward.Addr.IsValid() {
		f.flags |= mapWild
	}
	w.wheel.stop(i)
	if err := w.watch(fd, flowEvents, eventFlow, i, f.gen); err != nil {
		w.drop(i)
		return err
	}
	return nil
}

// takeMapping ends the mapping of a UDP forward.
func (n *Net) takeMapping(gport uint16) {
	n.lockAll()
	defer n.unlockAll()
	if w, i := n.findAnywhere(key{gport: gport, proto: frame.ProtoUDP}); i != none {
		n.forwards.hidden.forget(gport)
		w.drop(i)
	}
}

// findAnywhere looks in all tables; all locks are held.
func (n *Net) findAnywhere(k key) (*worker, int32) {
	for _, w := range n.workers {
		if i := w.table.find(k); i != none {
			return w, i
		}
	}
	return nil, none
}

// lockAll takes all workers' locks, in order. Nobody else holds more than one.
func (n *Net) lockAll() {
	for _, w := range n.workers {
		w.mu.Lock()
	}
}

func (n *Net) unlockAll() {
	for _, w := range n.workers {
		w.mu.Unlock()
	}
}

// listenerEvent takes the connections that came to a listener. i and gen name
// it.
func (w *worker) listenerEvent(b *frame.Batch, i int32, gen uint32) {
	n := w.net
	places := n.forwards.places.Load()
	if places == nil || int(i) >= len(*places) || (*places)[i] == nil || (*places)[i].gen != gen {
		return // it was removed meanwhile
	}
	l := (*places)[i]
	if pause := l.pause[w.id]; pause != 0 && int32(pause-w.tick) > 0 {
		return
	}
	l.pause[w.id] = 0
	for range acceptsAtOnce {
		if b.Len() >= frame.BatchSize {
			break
		}
		if !n.sockets.takeFor(l) {
			w.acceptLater(l)
			return
		}
		fd, errno := accept(int(l.fds[w.id]), &w.addr)
		switch errno {
		case 0:
			gport, ok := l.guestPort(fd)
			if !ok {
				closeReset(fd)
				n.sockets.give()
				continue
			}
			w.stats.Accepted++
			client, port := w.show(fd, gport)
			w.tcpAccepted(b, fd, client, port, gport)
			continue
		case unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM:
			n.sockets.give()
			w.acceptLater(l)
			return
		}
		n.sockets.give()
		if errno == unix.EAGAIN {
			return
		}
		// The client has gone, or its network has: the next one, then.
	}
	w.full = true
}

// acceptLater leaves connections where they are for a while: they are told
// again by then.
func (w *worker) acceptLater(l *listener) {
	w.stats.AcceptFailed++
	at := max(w.tick+acceptPause, 1)
	l.pause[w.id] = at
	if w.alarm != 0 && int32(w.alarm-at) <= 0 {
		return
	}
	if setTimer(w.timer, int64(at)<<tickShift-w.now) == 0 {
		w.alarm = at
	}
}

// show is the address of a new connection's client, which is in w.addr, as the
// guest sees it.
func (w *worker) show(fd int32, gport uint16) (addr uint32, port uint16) {
	n := w.net
	addr, port = w.addrIn(&w.addr), netPort(w.addr.Port)
	if addr != 0 && !n.hides(addr) {
		var local sockAddr
		if sockname(fd, &local) != 0 || local.Addr != w.addr.Addr || local.six != w.addr.six {
			return addr, port
		}
		// From this host to itself.
	}
	// All clients that are shown as the gateway share its ports. Each worker has
	// its own of them.
	workers := uint16(len(n.workers))
	k := key{remote: hostOf(n.gateway), gport: gport, proto: frame.ProtoTCP}
	own := func(port uint16) uint16 { return port - port%workers + uint16(w.id) }
	k.rport = max(own(port), own(1024))
	for try := 0; w.table.find(k) != none && try < 64; try++ {
		k.rport = own(0x8000 | uint16(mix(w.table.seed+uint64(w.now)+uint64(k.rport))>>32)&0x7eff)
	}
	return n.gateway, k.rport
}

// hides says whether a client's address is not to be shown to the guest, or is
// one that it cannot answer: a loopback address, or one of its own network.
func (n *Net) hides(addr uint32) bool {
	return n.conf.GatewaySource || addr>>24 == 127 || !n.outside(addr)
}
