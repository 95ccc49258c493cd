package nat

import (
	"sync/atomic"
	"time"

	"sidewire/engine/frame"
)

// Ports of protocols without ports: a query has its id as the port and, in
// place of the remote port, which side asks and what. Everything else has 0,
// so there is one flow for each protocol and remote address.
const (
	echoOut      = iota + 1 // the guest asks
	echoIn                  // the outside asks
	timestampOut            // the same for timestamps
	timestampIn
)

// kind is what a flow counts as for the limits.
type kind uint8

const (
	kindTCP kind = iota
	kindUDP
	kindICMP
	kindOther
	numKinds
)

func kindOf(proto uint8) kind {
	switch proto {
	case frame.ProtoTCP:
		return kindTCP
	case frame.ProtoUDP:
		return kindUDP
	case frame.ProtoICMP:
		return kindICMP
	}
	return kindOther
}

func (l *Limits) of(k kind) int {
	return [numKinds]int{l.TCP, l.UDP, l.ICMP, l.Other}[k]
}

// class is what a flow's idle time depends on.
type class uint8

const (
	classEstablished class = iota
	classOpening
	classClosing
	classUDP
	classICMP
	classOther
	numClasses
)

func (t *Timeouts) classes() (s [numClasses]uint32) {
	for i, d := range [numClasses]time.Duration{t.TCPEstablished, t.TCPOpening, t.TCPClosing, t.UDP, t.ICMP, t.Other} {
		s[i] = uint32((d + time.Second - 1) / time.Second)
	}
	return s
}

func classOf(proto uint8, w tcpWord) class {
	switch kindOf(proto) {
	case kindUDP:
		return classUDP
	case kindICMP:
		return classICMP
	case kindOther:
		return classOther
	}
	switch w.state() {
	case tcpInit:
		return classOpening
	case tcpEstablished, tcpClientFin, tcpServerFin:
		return classEstablished
	}
	return classClosing
}

// counters are the events of the slow paths.
type counters struct {
	created, expired, tableFull, noPort, rateLimited, noRoute   atomic.Uint64
	icmpErrors, icmpLimited, fragHeld, fragExpired, fragDropped atomic.Uint64
}

// admitFlow takes a place in the limits of a guest for a flow that side opens,
// and gives the reason where there is none.
func (m *Masquerade) admitFlow(g *guest, k kind, halfOpen bool, side int, now int64) frame.DropReason {
	l := &m.cfg.Limits
	share := func(n int) int32 {
		if side == outside {
			n -= n / 4
		}
		return int32(n)
	}
	switch {
	case g.flows[k].Load() >= share(l.of(k)), g.total.Load() >= share(l.Flows),
		halfOpen && g.half[side].Load() >= int32(l.HalfOpen):
		m.stats.tableFull.Add(1)
		return frame.TableFull
	case !g.fresh[side].take(now):
		m.stats.rateLimited.Add(1)
		return frame.RateLimited
	}
	g.flows[k].Add(1)
	g.total.Add(1)
	return frame.ReasonNone
}

func (g *guest) forget(k kind) {
	g.flows[k].Add(-1)
	g.total.Add(-1)
}

// opening is a flow about to be made.
type opening struct {
	tuple
	g      *guest
	side   int // that opens
	pinned bool
	queue  uint16
	hop    *frame.Hop
	tcp    tcpWord // state and opener
}

// open enters a flow in the table. The place in the limits and the references to
// the external port and to a number in the place of the remote address, which
// the caller took, are given back if that fails.
func (m *Masquerade) open(o *opening, now int64) (ref, frame.DropReason) {
	r, made := m.table.insert(o.tuple, m.cfg.Filtering == AddressDependent, func(f *flow, slot, generation uint32) {
		f.seen.Store(seconds(now))
		f.born.Store(seconds(now))
		f.queue.Store(uint32(o.queue))
		f.tcp.Store(uint64(generation)<<32 | uint64(o.tcp))
		f.pinned.Store(0)
		if o.pinned {
			f.pinned.Store(1)
		}
		for side := range 2 {
			f.acks[side].Store(0)
			f.isn[side].Store(0)
			f.packets[side].Store(0)
			f.bytes[side].Store(0)
		}
		m.table.hop(slot).Store(o.hop)
	})
	if made {
		if o.tcp.state() == tcpInit {
			o.g.half[o.side].Add(1)
		}
		m.stats.created.Add(1)
		m.rouse()
		return r, frame.ReasonNone
	}
	if m.remotes != nil {
		m.remotes.release(o.remote)
	}
	o.g.forget(kindOf(o.proto))
	if o.pinned {
		m.space(o.proto).release(o.external, unused)
	}
	switch {
	case !r.found():
		m.stats.tableFull.Add(1)
		return ref{}, frame.TableFull
	case tupleOf(r.w0, r.w1) == o.tuple:
		return r, frame.ReasonNone // another worker was first
	}
	m.stats.noPort.Add(1)
	return ref{}, frame.NoPort
}

// end takes a flow out of the table if expired still agrees under its locks.
func (m *Masquerade) end(r ref, now int64, expired func(f *flow) bool) bool {
	var w tcpWord
	pinned := false
	if !m.table.remove(r, m.cfg.Filtering == AddressDependent, func(f *flow) bool {
		if !expired(f) {
			return false
		}
		// From here on nothing changes the state: its generation is spent.
		w = tcpWord(f.tcp.Swap(0))
		pinned = f.pinned.Load() != 0
		return true
	}) {
		return false
	}
	u := tupleOf(r.w0, r.w1)
	g := m.guests[u.guest]
	if m.remotes != nil {
		m.remotes.release(u.remote)
	}
	if w.state() == tcpInit {
		g.half[w.opener()].Add(-1)
	}
	g.forget(kindOf(u.proto))
	if pinned {
		m.space(u.proto).release(u.external, seconds(now))
	}
	return true
}

// minSweep is the shortest time between two sweeps: what expires may stay
// that much longer.
const minSweep = 2 * time.Second

// Sweep ends the flows and drops the waiting fragments whose time is over at
// now, in the batches' time. It returns how long nothing else can expire, or 0
// if nothing is left; Run is woken when that changes. One goroutine may call
// it, beside the workers.
func (m *Masquerade) Sweep(now int64) time.Duration {
	m.asleep.Store(true)
	next := m.sweepFlows(now)
	for _, g := range m.guests {
		next = min(next, g.frags.sweep(m, now))
	}
	next = min(next, m.frags.sweep(m, now))
	if next == never {
		return 0
	}
	m.asleep.Store(false)
	return max(next, minSweep)
}

const never = time.Duration(1<<63 - 1)

func (m *Masquerade) sweepFlows(now int64) time.Duration {
	sec := seconds(now)
	left, any := uint32(1<<31), false
	for _, s := range m.timeouts {
		left = min(left, s) // what is made from now on lives that long
	}
	for slot := range m.table.top.Load() {
		f := m.table.at(slot)
		w1 := f.w1.Load()
		if uint8(w1) == 0 {
			continue
		}
		r := ref{f, slot, f.w0.Load(), w1}
		l := m.left(f, uint8(w1), sec)
		if l == 0 {
			if l = m.expire(r, now); l == 0 {
				continue
			}
		}
		any, left = true, min(left, l)
	}
	if !any {
		return never
	}
	return time.Duration(left) * time.Second
}

// left is how many seconds a flow may still be idle.
func (m *Masquerade) left(f *flow, proto uint8, now uint32) uint32 {
	t := m.timeouts[classOf(proto, tcpWord(f.tcp.Load()))]
	idle := now - f.seen.Load()
	if int32(idle) < 0 {
		idle = 0 // a batch that is newer than this sweep
	}
	return t - min(idle, t)
}

// expire ends a flow that was idle for too long, or takes it from ESTABLISHED
// to TRANS, and returns the seconds that are left to it.
func (m *Masquerade) expire(r ref, now int64) uint32 {
	sec := seconds(now)
	proto := uint8(r.w1)
	if w := tcpWord(r.tcp.Load()); proto == frame.ProtoTCP && classOf(proto, w) == classEstablished {
		if r.tcp.CompareAndSwap(uint64(w), uint64(w.with(tcpTrans))) {
			r.seen.Store(sec)
		}
		return m.timeouts[classClosing]
	}
	if m.end(r, now, func(f *flow) bool { return m.left(f, proto, sec) == 0 }) {
		m.stats.expired.Add(1)
		return 0
	}
	return max(m.left(r.flow, proto, sec), 1)
}

// ends finds what tells the flows of two addresses apart in a packet from
// side: the port or query id on the guest's side, what stands for the remote
// one, and the offset in the transport header of the first. The packet is no
// ICMP error and has its transport header. It returns why to drop the packet,
// or ReasonNone.
func ends(f *frame.Frame, side int) (near, far uint16, field int, reason frame.DropReason) {
	switch f.Proto {
	case frame.ProtoTCP, frame.ProtoUDP:
		near, far, field = f.SrcPort(), f.DstPort(), portSrc
		if side == outside {
			near, far, field = far, near, portDst
		}
		if near == 0 || far == 0 {
			return 0, 0, 0, frame.BadTransport // H087
		}
	case frame.ProtoICMP:
		id, port, ok := query(f, side)
		if !ok {
			return 0, 0, 0, frame.NotCarried
		}
		near, far, field = id, port, queryID
	default:
		if !otherFits(f) {
			return 0, 0, 0, frame.BadTransport
		}
	}
	return near, far, field, frame.ReasonNone
}
