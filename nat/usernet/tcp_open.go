package usernet

import (
	"encoding/binary"
	"math/bits"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// tcpOpen deals with a segment of a connection that there is not: a SYN makes
// one.
func (w *worker) tcpOpen(b *frame.Batch, f *frame.Frame) {
	n := w.net
	s, ok := parseTCP(f)
	if !ok {
		f.Drop(frame.BadTransport)
		return
	}
	if s.flags&(tcpSYN|tcpACK|tcpRST|tcpFIN) != tcpSYN {
		w.resetUnknown(b, f, &s)
		f.Drop(frame.NoFlow)
		return
	}
	to, ok := n.resolve(frame.ProtoTCP, f.DstIP4(), f.DstPort())
	if !ok {
		w.refuse(b, f, icmpUnreachable, codeHost, frame.NoRoute)
		return
	}
	if !n.permits(frame.ProtoTCP, f.DstIP4(), f.DstPort()) {
		w.stats.PolicyDenied++
		w.refuse(b, f, icmpUnreachable, codeProhibited, frame.Policy)
		return
	}
	i := w.newTCP(b, f, tcpKey(f))
	if i == none {
		return
	}
	fl := w.table.at(i)
	fl.readOptions(s.options, n.mss)
	fl.queue, fl.seen, fl.state = f.Queue, w.seen(), stateConnecting
	fl.rcvNxt, fl.rcvAck, fl.rcvEdge = s.seq+1, s.seq+1, s.seq+1
	fl.cwnd, fl.ssthresh = initialSegments*uint32(fl.mss), ^uint16(0)
	fl.sndWnd = uint32(s.wnd)
	w.wheel.set(i, w.tick+quietTicks)
	errno := w.connect(i, to)
	switch errno {
	case 0:
		w.hostConnected(b, i)
	case unix.EINPROGRESS:
	default:
		w.hostRefuses(b, i, errno) // counted there
	}
	f.Out = frame.Consumed
}

// newTCP makes a flow and its socket, or tells the guest that there can be none
// (RFC 6888 REQ-11).
func (w *worker) newTCP(b *frame.Batch, f *frame.Frame, k key) int32 {
	n := w.net
	i := w.table.add(k)
	if i == none {
		w.stats.TableFull++
		w.refuse(b, f, icmpUnreachable, codeHost, frame.TableFull)
		return none
	}
	fd, errno := int32(-1), unix.EMFILE
	if n.sockets.take() {
		var err error
		if fd, err = n.socket(unix.SOCK_STREAM, 0); err != nil {
			n.sockets.give()
			fd = -1
		} else {
			errno = 0
		}
	}
	if errno != 0 {
		w.stats.NoSocket++
		w.table.remove(i)
		w.refuse(b, f, icmpUnreachable, codeHost, frame.NoPort)
		return none
	}
	fl := w.table.at(i)
	fl.fd = fd
	fl.sndUna = w.firstSeq(&fl.key)
	fl.sndNxt = fl.sndUna + 1
	fl.sndMax = fl.sndNxt
	w.guess(fl)
	w.stats.opened(frame.ProtoTCP)
	return i
}

// firstSeq is the sequence number that a connection begins with: a secret one
// for each, that moves on every 4 us (RFC 6528).
func (w *worker) firstSeq(k *key) uint32 {
	h := mix(w.table.seed ^ uint64(k.remote.addr()) ^ uint64(k.rport)<<48 ^ uint64(k.gport)<<32)
	return uint32(h>>16) + uint32(bits.RotateLeft64(w.table.seed, 32)) + uint32(w.now>>12)
}

// connect calls the host's side. The guest's port is kept where it is free, so
// that all of a port's connections are seen from the same one (RFC 5382
// REQ-1).
func (w *worker) connect(i int32, to target) unix.Errno {
	fl := w.table.at(i)
	for kept := true; ; kept = false {
		if kept {
			setInt(fl.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
			w.addr = sockAddr{}
			w.net.putAddr(&w.addr, 0, fl.gport)
			kept = bind(fl.fd, &w.addr) == 0
		}
		w.net.putAddr(&w.addr, unmapped(&to.addr), to.port)
		errno := connect(fl.fd, &w.addr)
		if errno == 0 || errno == unix.EINPROGRESS {
			if err := w.watchTCP(i); err != nil {
				return errnoOf(err)
			}
			return errno
		}
		if !kept || errno != unix.EADDRNOTAVAIL && errno != unix.EADDRINUSE {
			return errno
		}
		// Another connection has the same four numbers: from any port, then.
		fd, err := w.net.socket(unix.SOCK_STREAM, 0)
		if err != nil {
			return errnoOf(err)
		}
		closeFD(fl.fd)
		fl.fd = fd
	}
}

// watchTCP has the worker told of everything that happens to a connection's
// socket.
func (w *worker) watchTCP(i int32) error {
	fl := w.table.at(i)
	// An urgent byte that is read before its event comes stays in its place.
	setInt(fl.fd, unix.SOL_SOCKET, unix.SO_OOBINLINE, 1)
	return w.watch(fl.fd, flowEvents, eventFlow, i, fl.gen)
}

func errnoOf(err error) unix.Errno {
	if err == nil {
		return 0
	}
	if e, ok := err.(unix.Errno); ok {
		return e
	}
	return unix.EIO
}

// hostConnected tells the guest that the host's side is there.
func (w *worker) hostConnected(b *frame.Batch, i int32) {
	w.table.at(i).state = stateSynAckSent
	w.sendSYN(b, i)
}

// hostRefuses tells the guest why there is no connection, and ends the flow.
func (w *worker) hostRefuses(b *frame.Batch, i int32, errno unix.Errno) {
	fl := w.table.at(i)
	w.stats.Refused++
	code := uint8(codeHost)
	switch errno {
	case unix.ENETUNREACH:
		code = codeNet
	case unix.EHOSTUNREACH, unix.EHOSTDOWN, unix.ETIMEDOUT, unix.EADDRNOTAVAIL, unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM,
		unix.EMFILE, unix.ENFILE, unix.ENOSPC:
	case unix.EACCES, unix.EPERM:
		code = codeProhibited
	default:
		w.emit(b, fl, 0, tcpRST|tcpACK)
		w.drop(i)
		return
	}
	w.unreachable(b, fl, code)
	w.drop(i)
}

// unreachable sends the guest an ICMP error about the SYN of a flow.
func (w *worker) unreachable(b *frame.Batch, fl *flow, code uint8) {
	// The SYN itself has long been given back: one like it is quoted.
	q := &w.quoted
	q.Len, q.HeadLen = headLen, headLen
	w.toGuest(q, frame.ProtoTCP, w.net.guest, ip4Len+tcpLen, fl.queue)
	h := q.Head[:headLen]
	binary.BigEndian.PutUint32(h[l3+16:], fl.remote.addr())
	h[l3+10], h[l3+11] = 0, 0
	putIPSum(h)
	binary.BigEndian.PutUint16(h[l4:], fl.gport)
	binary.BigEndian.PutUint16(h[l4+2:], fl.rport)
	binary.BigEndian.PutUint32(h[l4+4:], fl.rcvNxt-1)
	h[l4+12], h[l4+13] = tcpLen<<2, tcpSYN
	w.icmpError(b, q, icmpUnreachable, code, 0)
}

// tcpAccepted begins a flow for a connection that a client of the host's has
// made to a forwarded port. It takes the descriptor.
func (w *worker) tcpAccepted(b *frame.Batch, fd int32, client uint32, port, gport uint16) {
	n := w.net
	k := key{
		remote: hostOf(client), rport: port, gport: gport,
		proto: frame.ProtoTCP,
	}
	// Clients that are all shown as the gateway may have the same port.
	for try := 0; w.table.find(k) != none && try < 64; try++ {
		k.rport = uint16(mix(w.table.seed+uint64(w.now)+uint64(try))>>32) | 0x8000
	}
	i := none
	if w.table.find(k) == none {
		i = w.table.add(k)
	}
	if i == none {
		w.stats.TableFull++
		n.sockets.give()
		closeReset(fd)
		return
	}
	fl := w.table.at(i)
	fl.fd, fl.seen, fl.state = fd, w.seen(), stateSynSent
	fl.mss = n.mss
	fl.sndUna = w.firstSeq(&fl.key)
	fl.sndNxt = fl.sndUna + 1
	fl.sndMax = fl.sndNxt
	w.stats.opened(frame.ProtoTCP)
	if w.watchTCP(i) != nil {
		w.abort(i)
		return
	}
	w.wheel.set(i, w.tick+quietTicks)
	w.sendSYN(b, i)
}

// tcpEvent is told what became possible with a connection's socket.
func (w *worker) tcpEvent(b *frame.Batch, i int32, events uint32) {
	fl := w.table.at(i)
	if fl.fd < 0 {
		return
	}
	if fl.state == stateConnecting {
		if events&(unix.EPOLLERR|unix.EPOLLHUP) != 0 {
			if errno, _ := getInt(fl.fd, unix.SOL_SOCKET, unix.SO_ERROR); errno != 0 {
				w.hostRefuses(b, i, unix.Errno(errno))
				return
			}
		}
		if events&unix.EPOLLOUT == 0 {
			return
		}
		w.hostConnected(b, i)
	}
	if events&unix.EPOLLERR != 0 {
		if errno, _ := getInt(fl.fd, unix.SOL_SOCKET, unix.SO_ERROR); errno != 0 {
			w.hostError(b, i)
			return
		}
	}
	if events&unix.EPOLLPRI != 0 {
		w.seeUrgent(i)
	}
	if events&(unix.EPOLLRDHUP|unix.EPOLLHUP) != 0 {
		fl.flags |= hangup
	}
	if events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP) != 0 && fl.flags&hostFin == 0 {
		fl.flags |= readable
		w.ready(i)
	}
	if events&unix.EPOLLOUT != 0 && fl.flags&(waitOut|stalled) != 0 {
		w.roomAgain(b, i)
	}
}

// hostError resets the guest's side of a connection whose host's side has
// failed.
func (w *worker) hostError(b *frame.Batch, i int32) {
	fl := w.table.at(i)
	if fl.state == stateSynSent {
		w.emit(b, fl, fl.sndNxt, tcpRST)
	} else {
		w.emit(b, fl, fl.sndNxt, tcpRST|tcpACK)
	}
	w.drop(i)
}

// abort resets the host's side of a connection, and ends the flow.
func (w *worker) abort(i int32) {
	if fl := w.table.at(i); fl.fd >= 0 {
		setLinger(fl.fd)
	}
	w.drop(i)
}

// closeReset closes a connection with a reset.
func closeReset(fd int32) {
	setLinger(fd)
	closeFD(fd)
}

// closeSocket gives a flow's descriptor back.
func (w *worker) closeSocket(fl *flow) {
	closeFD(fl.fd)
	fl.fd = -1
	w.net.sockets.give()
}
