package usernet

import "sidewire/engine/frame"

// A peer is an entry of the flow table beside a UDP mapping: what is to be
// remembered of somebody whom it talks to. There are none as long as nothing
// needs to be: one goes when it was not used for as long as a mapping lives,
// and counts for nothing once its mapping has ended.

// What a peer says, in its key's in field.
const (
	// peerAsked: the guest has sent there, so that it may answer where inbound
	// datagrams are filtered. Its port is 0 if those of all ports may.
	peerAsked = 0x80 + iota
	// peerShown: this one is to be shown as lastAddr and lastPort.
	peerShown
	// peerClient: this one came by a forwarded port, and may be answered though
	// the policy would not let the guest send there.
	peerClient
)

const (
	statePeer = stateMapping + 1 + iota
	// stateFragments is the timer of fragments that wait.
	stateFragments
)

// isFlow says whether a table's entry is a flow to speak of.
func (s state) isFlow() bool { return s != stateFree && s <= stateMapping }

func peerKey(kind uint8, gport uint16, t target) key {
	return key{remote: host(t.addr[12:]), rport: t.port, gport: gport, proto: frame.ProtoUDP, in: kind}
}

// peer finds a mapping's peer, or none.
func (w *worker) peer(kind uint8, i int32, t target) int32 {
	fl := w.table.at(i)
	p := w.table.find(peerKey(kind, fl.gport, t))
	if p != none && w.table.at(p).sndUna != fl.gen {
		w.removePeer(p) // of an earlier mapping of the port
		return none
	}
	return p
}

// keepPeer finds a mapping's peer or makes it, and notes that it was used. It
// returns none if there is no room.
func (w *worker) keepPeer(kind uint8, i int32, t target) int32 {
	p := w.peer(kind, i, t)
	if p == none {
		fl := w.table.at(i)
		k := peerKey(kind, fl.gport, t)
		if p = w.table.add(k); p == none {
			return none
		}
		w.udp.peers++
		e := w.table.at(p)
		e.state, e.sndUna, e.seen = statePeer, fl.gen, w.seen()
		w.idleUntil(p, int64(w.net.conf.Timeouts.UDP))
	}
	w.table.at(p).seen = w.seen()
	return p
}

func (w *worker) removePeer(p int32) {
	w.udp.peers--
	w.wheel.stop(p)
	w.table.remove(p)
}

// peerTimer is called when a peer may have been idle for too long.
func (w *worker) peerTimer(p int32) {
	e := w.table.at(p)
	i := w.table.find(key{gport: e.gport, proto: frame.ProtoUDP})
	if i != none {
		if fl := w.table.at(i); fl.gen != e.sndUna {
			i = none
		} else if fl.hostAddr() == e.remote.addr() && (e.rport == fl.hostPort() || e.rport == 0) {
			// The guest talks to this one, without a look at the peer.
			e.seen = fl.seen
		}
	}
	if i == none || !w.idleUntil(p, int64(w.net.conf.Timeouts.UDP)) {
		w.removePeer(p)
	}
}

// udpAsked notes that the guest sends somewhere, if that decides who may
// answer. It reports false if there is no room for that.
func (w *worker) udpAsked(i int32, to target) bool {
	fl := w.table.at(i)
	if w.net.conf.Filter == FilterNone || fl.flags&forwarded != 0 {
		return true
	}
	last := target{mapped(fl.hostAddr()), fl.hostPort()}
	if w.net.conf.Filter == FilterAddress {
		last.port, to.port = 0, 0
	}
	if p := w.peer(peerAsked, i, last); p != none {
		w.table.at(p).seen = fl.seen
	}
	return w.keepPeer(peerAsked, i, to) != none
}

// udpMayCome says whether somebody who is not the one that the guest sent to
// last may send to a mapping (RFC 4787 REQ-8). A forwarded port is open to all.
func (w *worker) udpMayCome(i int32, from target) bool {
	fl := w.table.at(i)
	if w.net.conf.Filter == FilterNone || fl.flags&forwarded != 0 || fl.proto != frame.ProtoUDP {
		return true
	}
	if w.net.conf.Filter == FilterAddress {
		from.port = 0
	}
	return w.peer(peerAsked, i, from) != none
}

// clientsMost is the part of the table that clients of forwarded ports may
// take.
const clientsMost = 4

// udpClient notes that somebody has sent to a forwarded port whom the policy
// would not let the guest answer.
func (w *worker) udpClient(i int32, from target, shown uint32, port uint16) {
	if w.net.permits(frame.ProtoUDP, shown, port) {
		return
	}
	if w.udp.peers < w.table.max/clientsMost || w.peer(peerClient, i, from) != none {
		w.keepPeer(peerClient, i, from)
	}
}

// udpKnownAs notes as whom the guest knows a place that it sends to, if it
// would be shown as another. It reports false if there is no room for that.
func (w *worker) udpKnownAs(i int32, addr uint32, port uint16, to target) bool {
	fl := w.table.at(i)
	if a, p, ok := w.plainName(fl, unmapped(&to.addr), to.port); ok && a == addr && p == port {
		if fl.flags&mapPeers != 0 {
			if p := w.peer(peerShown, i, to); p != none {
				w.removePeer(p)
			}
		}
		return true
	}
	p := w.keepPeer(peerShown, i, to)
	if p == none {
		return false
	}
	fl.flags |= mapPeers
	w.table.at(p).setLast(addr, port, 0, 0)
	return true
}

// udpShown is as whom the guest sees somebody who sends to its mapping, and
// whether it sees them at all. client says that one may get a port of the
// gateway's for that.
func (w *worker) udpShown(i int32, from target, client bool) (addr uint32, port uint16, ok bool) {
	fl := w.table.at(i)
	if fl.flags&mapPeers != 0 {
		if p := w.peer(peerShown, i, from); p != none {
			e := w.table.at(p)
			return e.lastAddr(), e.lastPort(), true
		}
	}
	host := unmapped(&from.addr)
	if addr, port, ok = w.plainName(fl, host, from.port); ok || !client || fl.flags&forwarded == 0 {
		return addr, port, ok
	}
	port = w.hide(fl.gport, host, from.port)
	return w.net.gateway, port, port != 0
}

// plainName is as whom the guest sees an address of the host's side of which
// nothing is noted. It reports false if there is no name for it.
func (w *worker) plainName(fl *flow, host uint32, hport uint16) (addr uint32, port uint16, ok bool) {
	n := w.net
	if s, ok := n.reverse.find(fl.proto, host, hport); ok {
		return s.addr, s.port, true
	}
	switch {
	case fl.flags&forwarded != 0 && n.hides(host):
		return 0, 0, false
	case host>>24 == 127:
		// Others of the loopback network answer for 127.0.0.1 too.
		return n.gateway, hport, n.conf.Loopback
	case !n.outside(host), host>>24 == 0, host>>28 >= 14:
		return 0, 0, false
	}
	return host, hport, true
}

// reverse finds services by what they stand for.
type reverse struct {
	services map[serviceKey]serviceKey
	hosts    uint64 // which last 6 bits these addresses have
}

// init takes services, of which the first is the name of a place that several
// stand for.
func (r *reverse) init(n *Net, ss []Service) {
	r.services = map[serviceKey]serviceKey{}
	for _, s := range ss {
		k := serviceKey{s.Proto, n.numberOf(s.To.Addr()), s.To.Port()}
		if _, ok := r.services[k]; !ok {
			r.services[k] = serviceKey{s.Proto, n.numberOf(s.Addr.Addr()), s.Addr.Port()}
			r.hosts |= 1 << (k.addr & 63)
		}
	}
}

func (r *reverse) find(proto uint8, host uint32, port uint16) (serviceKey, bool) {
	if r.hosts>>(host&63)&1 == 0 {
		return serviceKey{}, false
	}
	s, ok := r.services[serviceKey{proto, host, port}]
	return s, ok
}
