package usernet

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Theory of operation.
//
// Where everything that arrives for the pod is the guest's, the host leads it to
// one TCP and one UDP port of 127.0.0.1 (uplink.Redirect), with addresses and
// ports as they were. Each of the workers that serve the guest has a socket on
// both (SO_REUSEPORT).
//
// TCP: a connection that is accepted is the guest's port's by its own address.
// A part of the descriptors is not for these connections, so that the guest can
// begin its own whatever clients do.
//
// UDP: a datagram is brought to the guest's port by its original destination, and
// nothing is kept of it: who sweeps all ports costs no flow and no descriptor.
// When the guest answers, that opens a mapping as ever, whose socket is bound to
// the guest's port (openMapping), so the answer leaves from there; from then on
// the kernel gives what comes for that port to the mapping itself. Ports that a
// socket of the pod's has never come here.
//
// Not for the guest: clients whose UDP it could not answer, because their
// addresses are of its own network or the policy keeps it from them.

// stateAll is the entry of a worker's table that stands for its socket for all
// UDP ports. It is no flow, and no frame of the guest's finds it.
const stateAll = stateFragments + 1

// keyAll is that entry's key, by its field in.
const keyAll = 0x90

// allShare is the part of the descriptors that connections which came for no
// port that was asked for leave to the guest: one in so many.
const allShare = 4

// allBuffer is how much a worker's socket for all UDP ports holds, in bytes, if
// the kernel lets us.
const allBuffer = 1 << 20

// allPorts are the sockets that everything is led to.
type allPorts struct {
	on   bool // set before workers run, or with all their locks
	addr uint32
	tcp  *listener
}

// OpenAll opens the sockets for all ports of the pod's address, once, and returns
// the ports of 127.0.0.1 that what arrives is to be led to. It needs
// CAP_NET_ADMIN.
func (n *Net) OpenAll(pod [4]byte) (tcp, udp uint16, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.six != nil {
		return 0, 0, errors.New("all ports: of IPv4 only")
	}
	if n.closed || n.all.tcp != nil {
		return 0, 0, errors.New("all ports: the user network is closed, or has them already")
	}
	defer func() {
		if err != nil {
			n.closeAll()
			err = fmt.Errorf("all ports: %w", err)
		}
	}()
	n.forwards.gen++
	l := &listener{gen: n.forwards.gen, all: true, fds: slices.Repeat([]int32{-1}, len(n.workers)), pause: make([]uint32, len(n.workers))}
	n.all.tcp = l
	serving := n.serving()
	for _, id := range serving {
		if l.fds[id], err = n.boundAll(unix.SOCK_STREAM, &tcp); err != nil {
			return 0, 0, err
		}
		if err = unix.Listen(int(l.fds[id]), backlog); err != nil {
			return 0, 0, err
		}
	}
	i := n.publish(l)
	for _, id := range serving {
		w := n.workers[id]
		if err = w.watch(l.fds[id], unix.EPOLLIN, eventListener, i, l.gen); err == nil {
			err = w.openAllUDP(&udp)
		}
		if err != nil {
			return 0, 0, err
		}
	}
	n.lockAll()
	n.all.on, n.all.addr = true, binary.BigEndian.Uint32(pod[:])
	n.unlockAll()
	return tcp, udp, nil
}

// CloseAll undoes OpenAll. Connections that came stay.
func (n *Net) CloseAll() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.closeAll()
}

// closeAll undoes what OpenAll has done; n.mu is held.
func (n *Net) closeAll() {
	l := n.all.tcp
	if l == nil {
		return
	}
	if places := n.forwards.places.Load(); places != nil && slices.Contains(*places, l) {
		n.retract(l)
	}
	n.shut(l)
	for _, w := range n.workers {
		w.mu.Lock()
		if i := w.table.find(key{proto: frame.ProtoUDP, in: keyAll}); i != none {
			w.stats.UDPOpen++ // drop takes it for a mapping
			w.drop(i)
		}
		w.mu.Unlock()
	}
	n.lockAll()
	n.all = allPorts{}
	n.unlockAll()
}

// boundAll makes a socket at a port of 127.0.0.1, of the kernel's choosing while
// that is 0, which other addresses may be led to.
func (n *Net) boundAll(typ int, port *uint16) (int32, error) {
	if !n.sockets.take() {
		return -1, errNoDescriptor
	}
	fd, err := n.socket(typ, 0)
	if err == nil {
		for _, o := range []struct{ level, opt int }{{unix.SOL_IP, unix.IP_TRANSPARENT}, {unix.SOL_SOCKET, unix.SO_REUSEPORT}} {
			if errno := setInt(fd, o.level, o.opt, 1); errno != 0 && err == nil {
				err = errno
			}
		}
		a := sockAddr{Family: unix.AF_INET, Port: netPort(*port)}
		binary.BigEndian.PutUint32(a.Addr[:], loopback)
		if err == nil {
			if errno := bind(fd, &a); errno != 0 {
				err = errno
			} else if errno := sockname(fd, &a); errno != 0 {
				err = errno
			}
		}
		if err == nil {
			*port = netPort(a.Port)
			return fd, nil
		}
		_ = unix.Close(int(fd))
	}
	n.sockets.give()
	return -1, err
}

// openAllUDP opens a worker's socket for all UDP ports.
func (w *worker) openAllUDP(port *uint16) error {
	fd, err := w.net.boundAll(unix.SOCK_DGRAM, port)
	if err != nil {
		return err
	}
	setInt(fd, unix.SOL_IP, unix.IP_RECVTTL, 1)
	setInt(fd, unix.SOL_IP, unix.IP_RECVTOS, 1)
	setInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, allBuffer)
	w.mu.Lock()
	defer w.mu.Unlock()
	i := none
	if errno := setInt(fd, unix.SOL_IP, unix.IP_RECVORIGDSTADDR, 1); errno != 0 {
		err = errno
	} else if i = w.table.add(key{proto: frame.ProtoUDP, in: keyAll}); i == none {
		err = errors.New("the table of flows is full")
	} else if err = w.watch(fd, udpEvents, eventFlow, i, w.table.at(i).gen); err != nil {
		w.table.remove(i)
	}
	if err != nil {
		_ = unix.Close(int(fd))
		w.net.sockets.give()
		return err
	}
	f := w.table.at(i)
	f.fd, f.state = fd, stateAll
	w.caught = flow{key: key{proto: frame.ProtoUDP}, queue: w.ownPair()}
	return nil
}

// ownPair is a queue pair that the worker serves itself, if there is one.
func (w *worker) ownPair() uint16 {
	for i, p := range w.net.conf.Pairs {
		if p.Worker == w.id {
			return uint16(i)
		}
	}
	return 0
}

// toAnyPort makes frames of what a slot holds, which came for a port that no
// mapping has. It reports false if there is no room for them in this batch.
func (w *worker) toAnyPort(b *frame.Batch, s int) bool {
	n, rx, fl := w.net, w.udp.rx, &w.caught
	a := rx.ancillary(w, s)
	host, hport := w.addrIn(&rx.names[s]), netPort(rx.names[s].Port)
	src, sport, ok := w.plainName(fl, host, hport)
	switch {
	case !ok, a.toPort == 0, a.to>>24 == 127: // the last is somebody of the pod who has found the socket
		w.stats.Filtered++
		return true
	case !n.permits(frame.ProtoUDP, src, sport):
		w.stats.PolicyDenied++
		return true
	}
	fl.gport = a.toPort
	if !w.fromPeer(b, fl, s, src, sport, a) {
		return false
	}
	w.stats.Unasked++
	return true
}

// guestPort is the port of the guest's that a connection is for which a listener
// has accepted. It reports false for one that is for none.
func (l *listener) guestPort(fd int32) (uint16, bool) {
	if !l.all {
		return l.gport, true
	}
	var local sockAddr
	if sockname(fd, &local) != 0 || local.Addr[0] == 127 { // somebody of the pod has found the listener itself
		return 0, false
	}
	return netPort(local.Port), true
}

// takeFor is take for a connection that came to a listener.
func (s *socketBudget) takeFor(l *listener) bool {
	if l.all && s.left.Load() <= s.max/allShare {
		return false
	}
	return s.take()
}
