package usernet

// Theory of operation.
//
// A guest's UDP port has one unconnected socket of the host's, whoever it talks
// to: the mapping is endpoint-independent (RFC 4787 REQ-1). The socket is bound
// to the guest's own port where that is free, and to one of the kernel's
// choosing otherwise. Who may answer is the kernel's business until a datagram
// is read; then Config.Filter decides (REQ-8).
//
// Guest to host (udp_send.go): the datagrams of a batch are gathered by mapping
// and leave by sendmmsg(2), straight from the guest's memory. Those of a run
// that go to the same place and are of one size leave as one piece that the
// kernel cuts (UDP_SEGMENT), as do the guest's own USO frames. What the kernel
// says to a datagram becomes an ICMP error to the guest.
//
// Host to guest (udp_recv.go): recvmmsg(2) brings datagrams, or runs of them
// that the kernel has put together (UDP_GRO), into an arena of the worker's,
// which the batch borrows until it is released.
//
// ICMP errors about what the guest sent wait in the socket's error queue
// (IP_RECVERR), and are told to the guest with the headers that it knows
// (errqueue.go). The kernel also reports them once as the error of the next
// send or receive, which is then done again.
//
// A mapping lives until the guest has been silent for Timeouts.UDP (REQ-5).
// What the guest sends refreshes it (REQ-6). What comes in does so if it comes
// from where the guest sent last: a datagram that belongs to no session must
// not (RFC 7857, 7), and a one-way stream that the guest asked for goes on. One
// that only asked a DNS server, and was answered, ends after 10 s (REQ-5a). No
// ICMP error ends one (REQ-12), nothing evicts one (RFC 6888 REQ-11).
//
// The guest knows some of the host's addresses by others: a service's, or the
// gateway's for 127.0.0.1. Who answers is shown as whom the guest has asked: a
// mapping remembers the last place that it sent to by both names, which nearly
// always decides. Otherwise it is the first service that leads there, and where
// the guest has asked by another name than that, a peer in the flow table tells
// (peer.go).

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Flags of a mapping. forwarded is another one.
const (
	// mapErrors: the socket's error queue has something.
	mapErrors flags = 1 << iota
	// mapFragments: the socket fragments what is too big (the guest has not set
	// DF).
	mapFragments
	// mapPeers: the flow table has peers that say how others are shown.
	mapPeers
	// mapDNS: it was used for nothing but to ask DNS servers.
	mapDNS
	// mapAnswered: something came since the guest sent last.
	mapAnswered
	// mapAlone: the guest's datagrams need fragments, so that the kernel cuts
	// none of them from a longer message.
	mapAlone
)

const (
	udpEvents   = unix.EPOLLIN | unix.EPOLLET // and EPOLLERR, always
	portDNS     = 53
	answeredDNS = 10e9 // how long a mapping stays that has its answer
	// lowPorts are those that need a privilege to be bound, as a rule.
	lowPorts = 1024
	// lowTries is how many of them are tried when the guest's own is taken.
	lowTries = 16
)

// A mapping and an echo session use fields that are TCP's in other flows. The
// place that the guest sent to last, as the guest knows it and as the host
// does:
func (f *flow) lastAddr() uint32 { return f.rcvNxt }
func (f *flow) lastPort() uint16 { return uint16(f.rcvEdge >> 16) }
func (f *flow) hostAddr() uint32 { return f.rcvAck }
func (f *flow) hostPort() uint16 { return uint16(f.rcvEdge) }

// The time to live and the type of service that its socket has, 0 for the
// default.
func (f *flow) ttl() uint8 { return uint8(f.mss >> 8) }
func (f *flow) tos() uint8 { return uint8(f.mss) }

func (f *flow) setHeader(ttl, tos uint8) { f.mss = uint16(ttl)<<8 | uint16(tos) }

func (f *flow) setLast(addr uint32, port uint16, host uint32, hport uint16) {
	f.rcvNxt, f.rcvAck, f.rcvEdge = addr, host, uint32(port)<<16|uint32(hport)
}

// udpScratch is what a worker needs to send and receive datagrams.
type udpScratch struct {
	tx        *datagramsOut // nil until the guest has sent one
	rx        *datagramsIn  // nil until one came
	errs      *errorQueue   // nil until there was an error
	whole     frame.Frame   // one that may have to be fragmented
	noSegment bool          // the kernel cannot cut what is sent here
	peers     int
}

// begin forgets what a batch has left that a fault in the guest's memory ended.
func (u *udpScratch) begin(t *table) {
	if u.tx != nil && u.tx.waiting != 0 {
		u.tx.forget(t)
	}
}

func (u *udpScratch) close() {
	if u.rx != nil {
		_ = unix.Munmap(u.rx.arena)
		u.rx = nil
	}
}

// turn is called when a worker begins a batch of its own: what its last batch
// borrowed is free.
func (w *worker) turn() {
	if rx := w.udp.rx; rx != nil {
		rx.turn()
	}
	if len(w.frags.spent) > 0 {
		w.net.frags.free(&w.frags)
	}
}

// udpDatagram sends a datagram of the guest by the mapping that it has.
func (w *worker) udpDatagram(b *frame.Batch, f *frame.Frame, i int32) {
	fl := w.table.at(i)
	if fl.lastAddr() != f.DstIP4() || fl.lastPort() != f.DstPort() {
		if !w.udpDestination(b, f, i) {
			return
		}
	}
	w.sendLater(f, i, int(f.L4)+udpLen, udpPayload(f))
}

// udpPayload is how many bytes of payload a datagram has. The header may claim
// less than the packet holds; that of a USO frame counts one segment or all.
func udpPayload(f *frame.Frame) int {
	if f.GSO != frame.GSONone {
		return int(f.Len) - int(f.L4) - udpLen
	}
	return int(binary.BigEndian.Uint16(f.Head[f.L4+4:])) - udpLen
}

// udpDestination looks where a datagram goes that does not go where the last
// one of its mapping went, and whether it may. If it may not, it has got its
// verdict.
func (w *worker) udpDestination(b *frame.Batch, f *frame.Frame, i int32) bool {
	dst, dport, fl := f.DstIP4(), f.DstPort(), w.table.at(i)
	if fl.flags&forwarded != 0 && dst == w.net.gateway {
		// An answer to a client that the guest sees as the gateway.
		if addr, port, ok := w.revealed(f.SrcPort(), dport); ok {
			fl.setLast(dst, dport, addr, port)
			w.chooseSource(i)
			return true
		}
	}
	to, ok := w.udpTarget(b, f, i)
	if !ok {
		return false
	}
	if dport != portDNS {
		fl.flags &^= mapDNS
	}
	if !w.udpAsked(i, to) || !w.udpKnownAs(i, dst, dport, to) {
		w.stats.TableFull++
		w.refuse(b, f, icmpUnreachable, codeHost, frame.TableFull)
		return false
	}
	fl.setLast(dst, dport, unmapped(&to.addr), to.port)
	w.chooseSource(i)
	return true
}

// udpTarget is where on the host's side a datagram goes. i is its mapping, or
// none. If it goes nowhere, it has got its verdict.
func (w *worker) udpTarget(b *frame.Batch, f *frame.Frame, i int32) (target, bool) {
	n := w.net
	dst, dport := f.DstIP4(), f.DstPort()
	if dport == 0 {
		f.Drop(frame.BadTransport)
		return target{}, false
	}
	to, ok := n.resolve(frame.ProtoUDP, dst, dport)
	if !ok {
		code := uint8(codeHost)
		if n.answersFor(dst) {
			code = codePort
		}
		w.refuse(b, f, icmpUnreachable, code, frame.NoRoute)
		return target{}, false
	}
	if !n.permits(frame.ProtoUDP, dst, dport) && (i == none || w.peer(peerClient, i, to) == none) {
		w.stats.PolicyDenied++
		w.refuse(b, f, icmpUnreachable, codeProhibited, frame.Policy)
		return target{}, false
	}
	return to, true
}

// udpOpen makes a mapping for the guest's port and sends its first datagram.
func (w *worker) udpOpen(b *frame.Batch, f *frame.Frame) {
	if _, ok := w.udpTarget(b, f, none); !ok {
		return
	}
	i := w.openMapping(b, f, udpKey(f))
	if i == none {
		return
	}
	fl := w.table.at(i)
	idle := int64(w.net.conf.Timeouts.UDP)
	if f.DstPort() == portDNS {
		fl.flags |= mapDNS
		idle = min(idle, answeredDNS)
	}
	w.idleUntil(i, idle)
	w.udpDatagram(b, f, i)
}

// openMapping makes a mapping or an echo session with its socket, or tells the
// guest that there can be none (RFC 6888 REQ-11), and drops f.
func (w *worker) openMapping(b *frame.Batch, f *frame.Frame, k key) int32 {
	i := w.table.add(k)
	if i == none {
		w.stats.TableFull++
		w.refuse(b, f, icmpUnreachable, codeHost, frame.TableFull)
		return none
	}
	fl := w.table.at(i)
	if err := w.openSocket(i); err != nil {
		w.table.remove(i)
		w.noSocket(b, f, k.proto, err)
		return none
	}
	fl.state, fl.queue, fl.seen = stateMapping, f.Queue, w.seen()
	w.stats.opened(k.proto)
	return i
}

// noSocket tells the guest why there is no socket for it.
func (w *worker) noSocket(b *frame.Batch, f *frame.Frame, proto uint8, err error) {
	if proto == frame.ProtoICMP && (err == unix.EACCES || err == unix.EPERM || err == unix.EPROTONOSUPPORT) {
		w.net.noPing(err)
		w.refuse(b, f, icmpUnreachable, codeProhibited, frame.Policy)
		return
	}
	w.stats.NoSocket++
	w.refuse(b, f, icmpUnreachable, codeHost, frame.NoPort)
}

// openSocket makes a mapping's socket.
func (w *worker) openSocket(i int32) error {
	n, fl := w.net, w.table.at(i)
	if !n.sockets.take() {
		return unix.EMFILE
	}
	proto := 0
	if fl.proto == frame.ProtoICMP {
		proto = unix.IPPROTO_ICMP
	}
	fd, err := n.socket(unix.SOCK_DGRAM, proto)
	if err != nil {
		n.sockets.give()
		return err
	}
	w.bindMapping(fd, fl.proto, fl.gport)
	if err = n.udpOptions(fd); err == nil {
		err = w.watch(fd, udpEvents, eventFlow, i, fl.gen)
	}
	if err != nil {
		closeFD(fd)
		n.sockets.give()
		return err
	}
	fl.fd = fd
	return nil
}

// bindMapping gives a socket the guest's own port or query id, or, if that is
// taken, one of its class (RFC 4787 REQ-3a) where we may. Without any it gets
// an unpredictable one from the kernel when it sends.
func (w *worker) bindMapping(fd int32, proto uint8, port uint16) {
	w.addr = sockAddr{}
	w.net.putAddr(&w.addr, 0, port)
	errno := bind(fd, &w.addr)
	if errno == unix.EADDRINUSE && w.net.all.on && proto == frame.ProtoUDP {
		// Who has it on the loopback alone is no hindrance: clients write to the pod's address.
		binary.BigEndian.PutUint32(w.addr.Addr[:], w.net.all.addr)
		if errno = bind(fd, &w.addr); errno != 0 {
			w.addr.Addr = [4]byte{}
		}
	}
	if errno == 0 {
		return
	}
	if port < lowPorts && errno == unix.EADDRINUSE && proto == frame.ProtoUDP {
		h := w.table.seed ^ uint64(w.now)
		for range lowTries {
			h = mix(h + uint64(port))
			w.addr.Port = netPort(lowPorts/2 + uint16(h>>32)%(lowPorts/2))
			if bind(fd, &w.addr) == 0 {
				return
			}
		}
	}
	w.addr.Port = 0
	_ = bind(fd, &w.addr) // else the first datagram does it, or fails
}

// udpOptions prepares a mapping's socket.
func (n *Net) udpOptions(fd int32) error {
	if errno := n.setIP(fd, unix.IP_RECVERR, 1); errno != 0 {
		return errno
	}
	if errno := n.setIP(fd, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO); errno != 0 {
		return errno
	}
	// Without these the guest gets single datagrams, and hop counts and
	// traffic classes of our own. The last two take about 0.25 us of the 1.2
	// that a datagram takes to arrive (BenchmarkUDPToGuest, 2 busy CPUs).
	setInt(fd, unix.IPPROTO_UDP, unix.UDP_GRO, 1)
	n.setIP(fd, unix.IP_RECVTTL, 1)
	n.setIP(fd, unix.IP_RECVTOS, 1)
	return nil
}

// udpLetGo makes a mapping forget what it knows of its socket, which the caller
// replaces.
func (w *worker) udpLetGo(i int32) {
	fl := w.table.at(i)
	fl.flags &^= mapErrors | mapFragments | mapAlone
	fl.setHeader(0, 0)
	w.unready(i)
}

// udpMayMove says whether a mapping may go to another worker: not if this one
// knows more of it than is in the flow, or has datagrams for it in hand.
func (w *worker) udpMayMove(i int32) bool {
	rx := w.udp.rx
	return w.table.at(i).flags&(forwarded|mapPeers) == 0 && w.net.conf.Filter == FilterNone &&
		(rx == nil || rx.at == rx.end || rx.flow != i)
}

// udpEvent is told what became possible with a mapping's socket.
func (w *worker) udpEvent(i int32, events uint32) {
	if events&unix.EPOLLERR != 0 {
		w.table.at(i).flags |= mapErrors
	}
	w.ready(i)
}

// udpPump brings the guest datagrams of a mapping's socket.
func (w *worker) udpPump(b *frame.Batch, i int32) pumped { return w.receive(b, i) }

// idleUntil starts a flow's timer for when it has been silent for ns, or a
// little longer. It reports false if that is so already.
func (w *worker) idleUntil(i int32, ns int64) bool {
	const unit = int64(1) << (tickShift + seenShift)
	left := (ns+unit-1)/unit + 1 - int64(w.seen()-w.table.at(i).seen)
	if left <= 0 {
		return false
	}
	w.wheel.set(i, (w.tick>>seenShift+uint32(left))<<seenShift)
	return true
}

// mappingTimer is called when a mapping, an echo session or a peer may have
// been idle for too long.
func (w *worker) mappingTimer(b *frame.Batch, i int32) {
	fl := w.table.at(i)
	t := &w.net.conf.Timeouts
	idle := int64(t.UDP)
	switch {
	case fl.state == statePeer:
		w.peerTimer(i)
		return
	case fl.state == stateFragments:
		w.fragsExpire(b, i)
		return
	case fl.flags&forwarded != 0:
		return
	case fl.proto == frame.ProtoICMP:
		idle = int64(t.Echo)
	case fl.flags&(mapDNS|mapAnswered) == mapDNS|mapAnswered:
		idle = min(idle, answeredDNS)
	}
	if !w.idleUntil(i, idle) {
		w.drop(i)
	}
}
