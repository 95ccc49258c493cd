package usernet

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

const (
	// receiveMost is how many datagrams a worker takes from the kernel in one
	// batch, or runs of them; receiveTurn how many of one socket before others
	// have their turn.
	receiveMost = 64
	receiveTurn = 32
	// A datagram's first bytes go to a slot of smallSlot bytes, which lie close
	// together, and what is longer to one of largeSlot: so a batch of ordinary
	// datagrams touches 128 KiB, and a large one still fits.
	smallSlot = 2 << 10
	largeSlot = 64 << 10
	arenaLen  = receiveMost * (smallSlot + largeSlot)

	headUDP = l4 + udpLen
)

// datagramsIn is what came from sockets, for the batch.
type datagramsIn struct {
	arena []byte // mapped: pages that nothing was received into take no memory
	msgs  [receiveMost]mmsghdr
	iovs  [receiveMost][2]unix.Iovec
	names [receiveMost]sockAddr
	ctls  [receiveMost][controlRoom / 8]uint64

	next int // first slot that is free
	// Slots from at to end hold what the batch had no room for, of a mapping.
	at, end int
	flow    int32
	gen     uint32
}

// controlRoom is the room for a message's control data: the size of a run's
// datagrams, the hop count, the type of service and where it was sent to.
const controlRoom = 128

func newDatagramsIn() *datagramsIn {
	arena, err := unix.Mmap(-1, 0, arenaLen, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return nil
	}
	rx := &datagramsIn{arena: arena}
	for s := range rx.msgs {
		setIov(&rx.iovs[s][0], rx.small(s))
		setIov(&rx.iovs[s][1], rx.large(s))
		h := &rx.msgs[s].hdr
		h.Name, h.Iov, h.Control = nameOf(&rx.names[s]), &rx.iovs[s][0], controlOf(&rx.ctls[s])
		h.SetIovlen(2)
		rx.clean(s)
	}
	return rx
}

func (rx *datagramsIn) small(s int) []byte { return rx.arena[s*smallSlot:][:smallSlot:smallSlot] }

func (rx *datagramsIn) large(s int) []byte {
	return rx.arena[receiveMost*smallSlot+s*largeSlot:][:largeSlot:largeSlot]
}

// clean makes a slot ready to receive into.
func (rx *datagramsIn) clean(s int) {
	h := &rx.msgs[s].hdr
	h.Namelen = sockAddrLen
	h.SetControllen(controlRoom)
}

// turn frees the slots that the last batch borrowed.
func (rx *datagramsIn) turn() {
	if rx.at == rx.end {
		rx.next, rx.at, rx.end = 0, 0, 0
	}
}

// receive brings the guest what a mapping's socket has, and tells of its errors.
func (w *worker) receive(b *frame.Batch, i int32) pumped {
	rx := w.udp.rx
	if rx == nil {
		if rx = newDatagramsIn(); rx == nil {
			return pumpDone // no memory, now
		}
		w.udp.rx = rx
	}
	if !w.deliver(b) {
		return pumpLater
	}
	fl := w.table.at(i)
	if fl.flags&mapErrors != 0 {
		fl.flags &^= mapErrors
		if _, more := w.socketErrors(b, i, true); more {
			fl.flags |= mapErrors
			return w.more(b)
		}
	}
	want := min(receiveTurn, receiveMost-rx.next, frame.BatchSize-b.Len())
	if want <= 0 {
		return pumpLater
	}
	for range 3 {
		n, errno := recvmmsg(fl.fd, rx.msgs[rx.next:rx.next+want], 0)
		switch {
		case errno == 0:
			rx.at, rx.end, rx.flow, rx.gen = rx.next, rx.next+n, i, fl.gen
			rx.next = rx.end
			if !w.deliver(b) || n == want {
				return w.more(b)
			}
			// Errors that came meanwhile, or ended the call, have an event of
			// their own.
			return pumpDone
		case errno == unix.EAGAIN:
			return pumpDone
		}
		// An ICMP error that shows up here, once; the queue of errors tells it.
	}
	return pumpDone
}

// more is what a turn came to that has left something: others may have theirs,
// unless this batch takes no more of anybody.
func (w *worker) more(b *frame.Batch) pumped {
	rx := w.udp.rx
	if rx.at < rx.end || rx.next == receiveMost || b.Len() >= frame.BatchSize {
		return pumpLater
	}
	return pumpAgain
}

// deliver makes frames of what was received, and reports whether all of it
// found room.
func (w *worker) deliver(b *frame.Batch) bool {
	rx := w.udp.rx
	for ; rx.at < rx.end; rx.at++ {
		fl := w.table.at(rx.flow)
		if fl.gen == rx.gen {
			switch {
			case fl.state == stateMapping && !w.fromHost(b, rx.flow, rx.at), fl.state == stateAll && !w.toAnyPort(b, rx.at):
				return false
			}
		}
		rx.clean(rx.at)
	}
	return true
}

// ancillary is what came with a datagram.
type ancillary struct {
	segment  int // the size of the run's datagrams, 0 for a single one
	ttl, tos uint8
	// to and toPort are where it was sent to, of a socket that asks for that; a
	// port is known for one of all ports only.
	to     uint32
	toPort uint16
}

func (rx *datagramsIn) ancillary(w *worker, s int) (a ancillary) {
	a.ttl = 64
	rest := controlBytes(&rx.ctls[s])[:min(int(rx.msgs[s].hdr.Controllen), controlRoom)]
	for {
		level, typ, d, more, ok := nextControl(rest)
		switch {
		case !ok:
			return a
		case level == unix.IPPROTO_UDP && typ == unix.UDP_GRO && len(d) >= 4:
			a.segment = int(binary.NativeEndian.Uint32(d))
		case level == unix.SOL_IP && typ == unix.IP_TTL && len(d) >= 4:
			a.ttl = uint8(binary.NativeEndian.Uint32(d))
		case level == unix.SOL_IP && typ == unix.IP_TOS && len(d) >= 1:
			a.tos = d[0]
		case level == unix.SOL_IP && typ == unix.IP_PKTINFO && len(d) >= unix.SizeofInet4Pktinfo:
			a.to = binary.BigEndian.Uint32(d[8:])
		case level == unix.SOL_IPV6 && typ == unix.IPV6_HOPLIMIT && len(d) >= 4:
			a.ttl = uint8(binary.NativeEndian.Uint32(d))
		case level == unix.SOL_IPV6 && typ == unix.IPV6_TCLASS && len(d) >= 4:
			a.tos = uint8(binary.NativeEndian.Uint32(d))
		case level == unix.SOL_IPV6 && typ == unix.IPV6_PKTINFO && len(d) >= unix.SizeofInet6Pktinfo && w.six != nil:
			a.to = w.net.six.number(w, (*addr6)(d))
		case level == unix.SOL_IP && typ == unix.IP_ORIGDSTADDR && len(d) >= 8:
			a.to, a.toPort = binary.BigEndian.Uint32(d[4:]), binary.BigEndian.Uint16(d[2:])
		}
		rest = more
	}
}

// fromHost makes frames of what a slot holds. It reports false if there is no
// room for them in this batch.
func (w *worker) fromHost(b *frame.Batch, i int32, s int) bool {
	rx, fl := w.udp.rx, w.table.at(i)
	host, hport := w.addrIn(&rx.names[s]), netPort(rx.names[s].Port)
	if host == 0 {
		w.stats.Filtered++ // nobody, or one too many
		return true
	}
	var src uint32
	var sport uint16
	if fl.proto == frame.ProtoICMP {
		hport = 0
	}
	if host == fl.hostAddr() && hport == fl.hostPort() {
		src, sport = fl.lastAddr(), fl.lastPort()
		fl.seen = w.seen()
	} else {
		from, ok := target{mapped(host), hport}, false
		if !w.udpMayCome(i, from) {
			w.stats.Filtered++
			return true
		}
		if src, sport, ok = w.udpShown(i, from, true); !ok {
			w.stats.Filtered++
			return true
		}
		if fl.flags&forwarded != 0 && src == host {
			w.udpClient(i, from, src, sport)
		}
	}
	fl.flags |= mapAnswered
	a := rx.ancillary(w, s)
	if fl.flags&mapWild != 0 {
		w.wroteTo(i, target{mapped(host), hport}, a.to, host == fl.hostAddr() && hport == fl.hostPort())
	}
	return w.fromPeer(b, fl, s, src, sport, a)
}

// fromPeer makes frames for a flow of what a slot holds, which the guest sees
// come from src and sport. It reports false if there is no room for them in this
// batch.
func (w *worker) fromPeer(b *frame.Batch, fl *flow, s int, src uint32, sport uint16, a ancillary) bool {
	n := int(w.udp.rx.msgs[s].len)
	if src&w.net.mask == w.net.gateway&w.net.mask {
		a.ttl = 64 // from the gateway itself, or somebody on its link
	} else {
		a.ttl = max(a.ttl, 2) - 1
	}
	if fl.proto == frame.ProtoICMP {
		return w.echoFromHost(b, fl, s, n, src, a)
	}
	if a.segment == 0 || a.segment >= n {
		a.segment = 0
		if headUDP-l3+n <= w.net.conf.MTU {
			return w.datagram(b, fl, s, 0, n, src, sport, a)
		}
		return w.tooBig(b, fl, s, n, n, src, sport, a)
	}
	if headUDP-l3+a.segment <= w.net.conf.MTU {
		return w.datagram(b, fl, s, 0, n, src, sport, a)
	}
	return w.tooBig(b, fl, s, n, a.segment, src, sport, a)
}

// datagram makes one frame of a datagram that the guest's MTU takes, or of a
// run of such: of the n bytes of a slot from off on.
func (w *worker) datagram(b *frame.Batch, fl *flow, s, off, n int, src uint32, sport uint16, a ancillary) bool {
	f := b.Next()
	if f == nil {
		return false
	}
	if !w.fill(b, f, headUDP, s, off, n) {
		b.Undo()
		return false
	}
	w.udpHeaders(f, fl, n, src, sport, a)
	return true
}

// udpHeaders writes the headers of a datagram of n bytes for the guest. Its
// checksum is left to others.
func (w *worker) udpHeaders(f *frame.Frame, fl *flow, n int, src uint32, sport uint16, a ancillary) {
	w.toGuest(f, frame.ProtoUDP, src, headUDP-l3+n, fl.queue)
	h := f.Head[:headUDP]
	carry(h, a)
	binary.BigEndian.PutUint16(h[l4:], sport)
	binary.BigEndian.PutUint16(h[l4+2:], fl.gport)
	binary.BigEndian.PutUint16(h[l4+4:], uint16(udpLen+n))
	binary.BigEndian.PutUint16(h[l4+6:], frame.Fold(w.net.pseudo(src, frame.ProtoUDP, udpLen+n)))
	f.Flags, f.CsumStart, f.CsumOffset = frame.NeedsCsum, l4, 6
	if a.segment > 0 {
		f.GSO, f.GSOSize, f.HdrLen = frame.GSOUDPL4, uint16(a.segment), headUDP
	}
}

// carry writes the hop count and the traffic class that a packet came with.
func carry(h []byte, a ancillary) {
	if h[l3+8] == a.ttl && h[l3+1] == a.tos {
		return
	}
	h[l3+1], h[l3+8], h[l3+10], h[l3+11] = a.tos, a.ttl, 0, 0
	putIPSum(h)
}

// fill lets a frame whose headers take at bytes of its Head end with n bytes of
// a slot, from off on: what fits into Head is copied there if that is all. It
// reports false if there is no room for the pieces.
func (w *worker) fill(b *frame.Batch, f *frame.Frame, at, s, off, n int) bool {
	rx := w.udp.rx
	f.HeadLen, f.Len = uint16(at), int32(at+n)
	if n <= w.net.inHead-at && off+n <= smallSlot {
		copy(f.Head[at:], rx.small(s)[off:off+n])
		f.HeadLen += uint16(n)
		return true
	}
	segs := b.Segs(2)
	if segs == nil {
		return false
	}
	if off < smallSlot {
		k := min(n, smallSlot-off)
		segs = append(segs, rx.small(s)[off:off+k:off+k])
		off, n = smallSlot, n-k
	}
	if n > 0 {
		off -= smallSlot
		segs = append(segs, rx.large(s)[off:off+n:off+n])
	}
	f.Tail = segs
	return true
}

// tooBig brings the guest the n bytes of a slot as datagrams of size bytes each,
// which its MTU does not take, in fragments.
func (w *worker) tooBig(b *frame.Batch, fl *flow, s, n, size int, src uint32, sport uint16, a ancillary) bool {
	need := 0
	for off := 0; off < n; off += size {
		need += w.fragmentsOf(udpLen + min(size, n-off))
	}
	if have := frame.BatchSize - b.Len(); need > have || 4*need > b.SegsLeft() {
		if b.Len() > 0 {
			return false
		}
		w.stats.Filtered++ // more than a batch has room for
		return true
	}
	a.segment = 0
	for off := 0; off < n; off += size {
		r := &w.udp.whole
		*r = frame.Frame{In: b.In}
		k := min(size, n-off)
		if !w.fill(b, r, headUDP, s, off, k) {
			return true // counted above
		}
		w.udpHeaders(r, fl, k, src, sport, a)
		r.CompleteChecksum()
		w.deliverWhole(b, r, true)
	}
	return true
}

// echoFromHost brings the guest an answer to its echo request.
func (w *worker) echoFromHost(b *frame.Batch, fl *flow, s, n int, src uint32, a ancillary) bool {
	rx := w.udp.rx
	if n < icmpLen || rx.small(s)[0] != w.net.echoReply {
		return true
	}
	if need := w.fragmentsOf(n); need > frame.BatchSize-b.Len() || 4*need > b.SegsLeft() {
		return false
	}
	r := &w.udp.whole
	*r = frame.Frame{In: b.In}
	if !w.fill(b, r, l4+icmpLen, s, icmpLen, n-icmpLen) {
		return false
	}
	w.toGuest(r, frame.ProtoICMP, src, ip4Len+n, fl.queue)
	carry(r.Head[:l4], a)
	restoreID(r.Head[l4:], rx.small(s)[:icmpLen], fl.gport)
	w.deliverWhole(b, r, true)
	return true
}

// fragmentsOf is how many fragments a packet for the guest has whose payload is n
// bytes long, 1 if it fits into the MTU whole.
func (w *worker) fragmentsOf(n int) int {
	if ip4Len+n <= w.net.conf.MTU {
		return 1
	}
	per := w.perFragment()
	return (n + per - 1) / per
}

// perFragment is how many bytes of payload a fragment has for the guest.
func (w *worker) perFragment() int {
	n := w.net.conf.MTU - ip4Len
	if w.six != nil {
		n -= sixFragment
	}
	return n &^ 7
}

// deliverWhole adds a copy of a frame for the guest to the batch: as it is, or
// as fragments, in order, where the MTU does not take it. Its headers are 20
// bytes of IPv4 and it is complete. It reports false if there is no room.
func (w *worker) deliverWhole(b *frame.Batch, r *frame.Frame, pull bool) bool {
	room := frame.BatchMax - b.Len()
	if pull {
		room = frame.BatchSize - b.Len()
	}
	n := int(r.Len) - l4
	if w.six != nil && r.Proto == frame.ProtoICMP {
		w.sumEcho6(r)
	}
	count := w.fragmentsOf(n)
	if count > room || count > 1 && count+len(r.Tail) > b.SegsLeft() {
		return false
	}
	if count == 1 {
		*b.Reply() = *r
		return true
	}
	id := w.net.ids.Add(1) // RFC 6864: unique as long as the guest may wait
	per := w.perFragment()
	c := cursor{rest: r.Tail}
	for off := 0; off < n; off += per {
		k := min(per, n-off)
		f := b.Reply()
		f.Out, f.Queue, f.In = r.Out, r.Queue, r.In
		h := f.Head[:l4]
		copy(h, r.Head[:l4])
		field := uint16(off / 8)
		if off+k < n {
			field |= frame.MoreFragments
		}
		binary.BigEndian.PutUint16(h[l3+2:], uint16(ip4Len+k))
		binary.BigEndian.PutUint16(h[l3+4:], uint16(id))
		binary.BigEndian.PutUint16(h[l3+6:], field)
		if h[l3+10], h[l3+11] = 0, 0; w.six == nil {
			putIPSum(h)
		} else {
			binary.BigEndian.PutUint16(h[l3+10:], uint16(id>>16)) // see fromSix
		}
		f.L3, f.L4, f.Proto, f.Frag = l3, l4, r.Proto, off > 0
		f.HeadLen, f.Len = l4, int32(l4+k)
		if off == 0 { // what r has in its Head is less than a fragment
			f.HeadLen = r.HeadLen
			k -= copy(f.Head[l4:], r.Head[l4:r.HeadLen])
		}
		c.move(b, f, k)
	}
	return true
}

// cursor goes through pieces of memory.
type cursor struct {
	piece []byte
	rest  [][]byte
}

// move lets a frame end with the next n bytes, shared. The batch has room for
// the pieces.
func (c *cursor) move(b *frame.Batch, f *frame.Frame, n int) {
	segs := b.Segs(1 + len(c.rest))
	for n > 0 {
		for len(c.piece) == 0 {
			c.piece, c.rest = c.rest[0], c.rest[1:]
		}
		k := min(n, len(c.piece))
		segs = append(segs, c.piece[:k:k])
		c.piece = c.piece[k:]
		n -= k
	}
	b.TrimSegs(cap(segs) - len(segs))
	f.Tail = segs
}
