package engine

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"sidewire/engine/frame"
)

// Defaults of a SwitchConfig.
const (
	defaultMACs  = 1024
	defaultAge   = 5 * time.Minute
	defaultStorm = 20000
	uplinkFactor = 16 // an uplink may own that many times as many addresses
	maxSweep     = time.Minute
)

// SwitchConfig is what a Switch is made of.
type SwitchConfig struct {
	// Name tells switches apart.
	Name string
	// MACs is how many addresses are learned from a port; 0 is 1024. A port
	// that brings more replaces those of its own that were quiet for longest.
	MACs int
	// Age is after how much silence an address is forgotten, to the second; 0
	// is 5 minutes.
	Age time.Duration
	// LinkLocal lets frames to the group addresses 01:80:c2:00:00:00 to 0f
	// pass (LLDP, STP, LACP), which a bridge otherwise keeps. PAUSE (01) never
	// passes.
	LinkLocal bool
}

// SwitchPort is how a switch treats one of its ports.
type SwitchPort struct {
	// Port is the port's ID in the engine.
	Port frame.PortID
	// MAC is the guest's own address, zero where it is not known.
	MAC frame.MAC
	// SpoofCheck drops frames whose source is not MAC. The address is then the
	// port's alone: no other port of its VLANs can take it.
	SpoofCheck bool
	// CheckARP, with SpoofCheck, also drops ARP and ND frames that name another
	// sender than MAC, and those of which it cannot be told (ND in fragments, or
	// behind more extension headers than fit into Head). It reads up to 128
	// bytes; where the port's snapshot is shorter they are copied one by one,
	// so a pair whose guest sends much IPv6 had better hold them in Head.
	CheckARP bool
	// Access is the VLAN of untagged frames, which leave untagged; 0 is none.
	Access uint16
	// Trunk is the VLANs that pass tagged. If it has 0, which goes without
	// Access only, untagged frames pass too, as a network of their own. If
	// Trunk is nil and Access 0, everything passes as it is: tagged frames
	// belong to the VLAN that the outer tag says, all others to none.
	Trunk []uint16
	// Storm is how many frames a second the port may bring that go to many, with
	// bursts of a tenth of it (64 at least). 0 is 20000, less is no limit.
	Storm int
	// Uplink is a port that many stations are behind: it may own 16 times as
	// many addresses, and SpoofCheck is ignored.
	Uplink bool
	// MTU is the longest packet that the port takes if it is no GSO frame, in
	// bytes, without the Ethernet header and a tag; 0 is any. A switch has no
	// way to tell the sender: what is longer is dropped.
	MTU int
	// Queues is how many queue pairs the port has; 0 is 1. Where it has
	// several, frames go to the one that the guest last used for their flow.
	Queues int
}

// Switch joins ports to each other: it learns which addresses are behind which
// port, sends frames there, and to everybody what is for many or for an
// unknown one. A frame never leaves the VLAN that it came in.
//
// Each port has a stage, which takes what no stage before it has claimed.
// Frames for many go to a port of the engine that the switch makes for itself,
// which gives them to the members in turn.
//
// All methods are safe for concurrent use.
type Switch struct {
	e    *Engine
	name string
	conf SwitchConfig
	fdb  *fdb
	view atomic.Pointer[switchView]

	mu  sync.Mutex // guards changes of view
	err error      // why the switch cannot be used
}

// switchView is who is a member at one moment. It is never changed, only
// replaced.
type switchView struct {
	flood   frame.PortID
	ports   []*member // by PortID; nil where there is none
	members []*member // in the order of joining
	vlans   bool      // some member knows VLANs
	steers  bool      // some member has several queue pairs
	shared  vlanSet   // VLANs that have more than one member
}

// member returns the member that has an ID, or nil.
func (v *switchView) member(id frame.PortID) *member {
	if int(id) < len(v.ports) {
		return v.ports[id]
	}
	return nil
}

// member is a port of a switch, and the stage for what it brings.
type member struct {
	sw *Switch
	id frame.PortID
	portVLANs
	mac    uint64 // that it must use, as in a fdbKey; 0: any
	arp    bool
	slow   bool // frames need more than a look at their addresses
	uplink bool
	max    int32     // length of the longest frame without GSO and tag
	steer  *steering // nil: one queue pair
	owner  *owner
	storm  stormLimit
	bucket bucket
	counts []*memberCounts // by worker
}

// memberCounts is what one worker counts for one member.
type memberCounts struct {
	learned, moved, evicted, refused, flooded atomic.Uint64
	drops                                     [frame.NumReasons]atomic.Uint64
}

// NewSwitch makes a switch without ports.
func (e *Engine) NewSwitch(c SwitchConfig) *Switch {
	if c.MACs <= 0 {
		c.MACs = defaultMACs
	}
	if c.Age <= 0 {
		c.Age = defaultAge
	}
	s := &Switch{e: e, name: c.Name, conf: c}
	s.fdb = newFDB(uint32(max(c.Age/time.Second, 1)))
	id, err := e.AddPort(c.Name+" flood", newFlood(s, e.Workers()))
	s.err = err
	s.view.Store(&switchView{flood: id})
	return s
}

// Name is the switch's name.
func (s *Switch) Name() string { return s.name }

// AddPort makes a port of the engine a member and returns the stage for what
// it brings. Frames may be pushed to the port before AddPort returns.
func (s *Switch) AddPort(c SwitchPort) (Stage, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return nil, fmt.Errorf("switch %s: %w", s.name, s.err)
	}
	m, err := s.newMember(c)
	if err != nil {
		return nil, fmt.Errorf("switch %s: port %d: %w", s.name, c.Port, err)
	}
	old := s.view.Load()
	s.view.Store(newView(old.flood, append(old.members[:len(old.members):len(old.members)], m)))
	return m, nil
}

func (s *Switch) newMember(c SwitchPort) (*member, error) {
	l := s.e.layout.Load()
	if int(c.Port) >= len(l.ports) || l.ports[c.Port] == nil {
		return nil, errors.New("no such port")
	}
	if s.view.Load().member(c.Port) != nil {
		return nil, errors.New("is a member already")
	}
	vlans, err := newPortVLANs(c)
	if err != nil {
		return nil, err
	}
	mac := macKey(c.MAC, 0)
	m := &member{sw: s, id: c.Port, portVLANs: vlans, uplink: c.Uplink, steer: newSteering(c.Queues), storm: newStormLimit(c.Storm)}
	m.bucket.paid.Store(math.MinInt64)
	for range s.e.workers {
		m.counts = append(m.counts, new(memberCounts))
	}
	m.slow, m.max = m.steer != nil, math.MaxInt32
	if c.MTU > 0 {
		m.max = int32(c.MTU) + frame.EthernetLen
	}
	limit := s.conf.MACs
	if c.Uplink {
		limit *= uplinkFactor
	}
	m.owner = s.fdb.addOwner(c.Port, limit, vlans.members)
	if !c.SpoofCheck || c.Uplink {
		return m, nil
	}
	if mac == 0 || mac&groupBit != 0 {
		s.fdb.removeOwner(m.owner)
		return nil, fmt.Errorf("spoof check with the address %s", c.MAC)
	}
	m.mac, m.arp, m.slow = mac, c.CheckARP, m.slow || c.CheckARP
	if err := s.fdb.pin(m.owner, c.MAC, vlans.native); err != nil {
		s.fdb.removeOwner(m.owner)
		return nil, err
	}
	return m, nil
}

func newView(flood frame.PortID, members []*member) *switchView {
	v := &switchView{flood: flood, members: members}
	var seen vlanSet
	for _, m := range members {
		if n := int(m.id) + 1; n > len(v.ports) {
			v.ports = append(v.ports, make([]*member, n-len(v.ports))...)
		}
		v.ports[m.id] = m
		v.vlans = v.vlans || !m.plain
		v.steers = v.steers || m.steer != nil
		for i := range seen {
			mine := ^uint64(0)
			if m.members != nil {
				mine = m.members[i]
			}
			v.shared[i] |= seen[i] & mine
			seen[i] |= mine
		}
	}
	return v
}

// RemovePort ends a port's membership and forgets the addresses behind it. A
// batch under way may still go there.
func (s *Switch) RemovePort(id frame.PortID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.view.Load()
	m := old.member(id)
	if m == nil {
		return
	}
	var kept []*member
	for _, o := range old.members {
		if o != m {
			kept = append(kept, o)
		}
	}
	s.view.Store(newView(old.flood, kept))
	s.fdb.removeOwner(m.owner)
}

// Close takes the switch out of the engine. Its members' stages drop
// everything from then on.
func (s *Switch) Close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return
	}
	s.err = errors.New("closed")
	v := s.view.Load()
	for _, m := range v.members {
		s.fdb.removeOwner(m.owner)
	}
	s.view.Store(&switchView{flood: v.flood})
	s.e.RemovePort(v.flood)
}

// Run forgets addresses that have been silent for too long, until ctx is
// done. clock is the time that batches carry, as of Now. Without stations Run
// sleeps; otherwise it wakes up at most once a minute, or more often if
// addresses age faster than that.
func (s *Switch) Run(ctx context.Context, clock func() int64) {
	every := min(maxSweep, max(s.conf.Age/4, time.Second))
	timer := time.NewTimer(every)
	defer timer.Stop()
	for {
		more := s.fdb.sweep(second(clock()))
		timer.Stop()
		if more {
			timer.Reset(every)
		}
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		case <-s.fdb.wake:
		}
	}
}

// second is the second of a batch's time in which stations are seen; it is
// never 0.
func second(now int64) uint32 { return uint32(now/int64(time.Second)) + 1 }

// groupBit marks a group address in a key.
const groupBit = 1 << 56

// linkLocal and pause are group addresses that a bridge keeps, as in a key
// (IEEE 802.1Q, table 8-1).
const (
	linkLocal     = 0x0180c2000000 << 16
	linkLocalMask = 0xfffffffffff0 << 16
	pauseAddr     = 0x0180c2000001 << 16
)

// Process decides where the frames of a batch go.
func (m *member) Process(b *frame.Batch) {
	v := m.sw.view.Load()
	if v.member(m.id) != m {
		return // removed: nobody claims its frames
	}
	w := batchWork{
		b: b, view: v, table: m.sw.fdb.table.Load(), counts: m.counts[b.Worker], sec: second(b.Now),
		src: noKey, dst: noKey,
	}
	var src, dst uint64
	var out *member // nil: there is no such verdict
	for i := range b.Len() {
		f := b.Frame(i)
		if f.Out != frame.Drop || f.Reason != frame.ReasonNone {
			continue
		}
		// Frames come in bursts of a flow: most have the addresses and the
		// type of the one before, and need no more than its verdict. The loop
		// calls nothing for these, so that its variables stay in registers.
		to, from := binary.BigEndian.Uint64(f.Head[:8]), binary.BigEndian.Uint64(f.Head[6:14])
		if from == src && out != nil && f.HeadLen >= frame.EthernetLen {
			if to == dst && f.Len <= out.max {
				f.Out = out.id
				continue
			}
			// From the same station to another one.
			if o := m.sw.find(fdbKey(to, m.native), &w); o != nil && m.plainTo(o, m.native) && f.Len <= o.max {
				f.Out = o.id
				dst, out = to, o
				continue
			}
		}
		src, dst, out = from, to, m.decide(f, to, from, &w)
	}
}

// plainTo says whether an untagged frame of a VLAN goes from m to o as it is.
func (m *member) plainTo(o *member, vlan uint16) bool {
	return o != m && o.native == vlan && o.steer == nil
}

// batchWork is what a stage needs for all frames of a batch.
type batchWork struct {
	b      *frame.Batch
	view   *switchView
	table  *fdbTable
	counts *memberCounts
	sec    uint32

	src uint64  // the key that was judged last
	dst uint64  // the key that was looked up last
	out *member // what was found; nil for none
}

// decide is Process for one frame, of which to and from are the addresses with
// what follows them. It returns where all frames with the same addresses and
// the same type may go in this batch, or nil if that is to be decided anew.
func (m *member) decide(f *frame.Frame, to, from uint64, w *batchWork) *member {
	if f.HeadLen < frame.EthernetLen {
		m.drop(f, w, frame.ShortFrame)
		return nil
	}
	vlan, tagged := m.native, isTag(uint16(from))
	if !m.untagged || tagged {
		var r frame.DropReason
		if vlan, r = m.classify(f); r != frame.ReasonNone {
			m.drop(f, w, r)
			return nil
		}
	}
	if src := fdbKey(from, vlan); src != w.src {
		if r := m.source(src, w); r != frame.ReasonNone {
			m.drop(f, w, r)
			return nil
		}
		w.src = src
	}
	if m.slow {
		if r := m.inspect(f, w.b); r != frame.ReasonNone {
			m.drop(f, w, r)
			return nil
		}
	}
	if dst := fdbKey(to, vlan); dst != w.dst {
		w.out, w.dst = m.sw.find(dst, w), dst
	}
	switch out := w.out; {
	case out == nil:
		m.flood(f, w.dst, w)
	case out == m:
		m.drop(f, w, frame.SamePort)
	case tagged || !m.plainTo(out, vlan):
		m.forward(f, w.b, out, vlan, w)
	case !out.fits(f):
		m.drop(f, w, frame.OversizeFrame)
	default:
		f.Out = out.id
		if !m.slow {
			return out
		}
	}
	return nil
}

// find returns the member that the station of a key is behind, or nil.
func (s *Switch) find(key uint64, w *batchWork) *member {
	st := w.table.lookup(key)
	if st == 0 || st.expired(w.sec, s.fdb.age) {
		return nil
	}
	return w.view.member(st.port())
}

// fits says whether the port takes frames of that length.
func (m *member) fits(f *frame.Frame) bool {
	n := f.Len
	if isTag(f.EtherType()) {
		n -= vlanLen
	}
	return n <= m.max || f.GSO != frame.GSONone
}

// inspect does what only some ports ask for.
func (m *member) inspect(f *frame.Frame, b *frame.Batch) frame.DropReason {
	if m.arp {
		if r := m.checkSender(f, b); r != frame.ReasonNone {
			return r
		}
	}
	if m.steer != nil {
		widen(f, steerHead)
		m.steer.remember(flowHash(f), uint32(f.Queue))
	}
	return frame.ReasonNone
}

// forward sends a frame to one member in the form that it has to have there.
func (m *member) forward(f *frame.Frame, b *frame.Batch, out *member, vlan uint16, w *batchWork) {
	if !out.fits(f) {
		m.drop(f, w, frame.OversizeFrame)
		return
	}
	if out.steer != nil {
		widen(f, steerHead)
		f.Queue = out.steer.queue(flowHash(f))
	}
	if r := out.retag(f, vlan, b); r != frame.ReasonNone {
		m.drop(f, w, r)
		return
	}
	f.Out = out.id
}

// source judges a source address and learns it.
func (m *member) source(src uint64, w *batchWork) frame.DropReason {
	if src&groupBit != 0 || src&^0xffff == 0 {
		return frame.BadSource
	}
	if m.mac != 0 && src&^0xffff != m.mac {
		return frame.Spoofed
	}
	st := w.table.lookup(src)
	switch {
	case st.port() != m.id && st.pinned():
		add(&w.counts.refused, 1)
	case st.port() != m.id:
		m.learn(src, w)
	case st.sec() != w.sec && !st.pinned():
		w.table.refresh(src, st, w.sec)
	}
	return frame.ReasonNone
}

func (m *member) learn(src uint64, w *batchWork) {
	c := w.counts
	switch m.sw.fdb.learn(src, m.owner, w.sec) {
	case learnedNew:
		add(&c.learned, 1)
	case learnedMove:
		add(&c.moved, 1)
	case learnedEvict:
		add(&c.learned, 1)
		add(&c.evicted, 1)
	case notAllowed:
		add(&c.refused, 1)
	case notLearned:
	}
}

// flood sends a frame to all members of its VLAN but m, if it may.
func (m *member) flood(f *frame.Frame, dst uint64, w *batchWork) {
	dst, vlan := dst&^0xffff, uint16(dst)
	switch {
	case dst&linkLocalMask == linkLocal && (!m.sw.conf.LinkLocal || dst == pauseAddr):
		m.drop(f, w, frame.LinkLocal)
		return
	case !w.view.shared.has(vlan):
		m.drop(f, w, frame.NoRoute)
		return
	case !m.bucket.take(m.storm, w.b.Now):
		m.drop(f, w, frame.Storm)
		return
	}
	add(&w.counts.flooded, 1)
	if ms := w.view.members; len(ms) == 2 {
		out := ms[0]
		if out == m {
			out = ms[1]
		}
		m.forward(f, w.b, out, vlan, w)
		return
	}
	// What needs the batch is done here: the flood port has none.
	if w.view.steers {
		widen(f, steerHead)
	}
	if w.view.vlans && !makeRoom(f, w.b) {
		m.drop(f, w, frame.BatchFull)
		return
	}
	f.Out = w.view.flood
}

func (m *member) drop(f *frame.Frame, w *batchWork, r frame.DropReason) {
	f.Drop(r)
	add(&w.counts.drops[r], 1)
}
