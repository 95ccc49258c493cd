package nat

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"time"

	"sidewire/engine/frame"
)

// FlowInfo is one flow as it was when it was looked at. It is a plain value.
type FlowInfo struct {
	Guest        int        `json:"guest"`
	Proto        uint8      `json:"proto"`
	GuestAddr    netip.Addr `json:"guestAddr"`
	GuestPort    uint16     `json:"guestPort"`    // or query id
	ExternalPort uint16     `json:"externalPort"` // or query id
	Remote       netip.Addr `json:"remote"`
	RemotePort   uint16     `json:"remotePort"`
	Inbound      bool       `json:"inbound"` // opened from outside; known for TCP and queries
	State        string     `json:"state,omitempty"`
	// Packets and Bytes count IP packets from the guest and to it; a GSO frame
	// counts once.
	Packets [2]uint64     `json:"packets"`
	Bytes   [2]uint64     `json:"bytes"`
	Age     time.Duration `json:"age"`
	Idle    time.Duration `json:"idle"`
	Queue   uint16        `json:"queue"`
}

func addr(ip uint32) netip.Addr {
	return netip.AddrFrom4([4]byte{byte(ip >> 24), byte(ip >> 16), byte(ip >> 8), byte(ip)})
}

// Flows calls fn for every flow until it returns false. now is the batches'
// time. Flows that begin or end meanwhile may or may not be among them.
func (m *Masquerade) Flows(now int64, fn func(FlowInfo) bool) {
	m.eachFlow(func(r ref) bool { return fn(m.info(r, seconds(now))) })
}

func (m *Masquerade) eachFlow(fn func(ref) bool) {
	for slot := range m.table.top.Load() {
		f := m.table.at(slot)
		w1 := f.w1.Load()
		r := ref{f, slot, f.w0.Load(), w1}
		if uint8(w1) == 0 || !r.alive() {
			continue
		}
		if !fn(r) {
			return
		}
	}
}

func (m *Masquerade) info(r ref, now uint32) FlowInfo {
	u := tupleOf(r.w0, r.w1)
	i := FlowInfo{Guest: int(u.guest), Proto: u.proto, GuestAddr: addr(m.guests[u.guest].IP), GuestPort: u.guestPort,
		ExternalPort: u.external, Remote: addr(u.remote), RemotePort: u.remotePort, Queue: uint16(r.queue.Load()),
		Age: since(now, r.born.Load()), Idle: since(now, r.seen.Load())}
	for side := range 2 {
		i.Packets[side], i.Bytes[side] = r.packets[side].Load(), r.bytes[side].Load()
	}
	switch u.proto {
	case frame.ProtoTCP:
		w := tcpWord(r.tcp.Load())
		i.State, i.Inbound = w.state().String(), w.opener() == outside
	case frame.ProtoICMP:
		i.Inbound, i.RemotePort = asks(u.remotePort, outside), 0
	}
	return i
}

func since(now, then uint32) time.Duration {
	return time.Duration(max(int32(now-then), 0)) * time.Second
}

// Stats is what a Masquerade has done. Events count from its start.
type Stats struct {
	Flows       int           `json:"flows"`
	Mappings    int           `json:"mappings"` // external ports and query ids in use
	Guests      []GuestStats  `json:"guests"`
	Fragments   FragmentStats `json:"fragments"`
	Created     uint64        `json:"created"`
	Expired     uint64        `json:"expired"`
	TableFull   uint64        `json:"tableFull"`   // flows refused by a limit
	NoPort      uint64        `json:"noPort"`      // flows refused for want of an external port
	RateLimited uint64        `json:"rateLimited"` // flows refused by their rate
	NoRoute     uint64        `json:"noRoute"`
	ICMPErrors  uint64        `json:"icmpErrors"` // made here
	ICMPLimited uint64        `json:"icmpLimited"`
}

// GuestStats is a guest's share.
type GuestStats struct {
	MAC      string `json:"mac,omitempty"` // as given or learned
	Flows    int    `json:"flows"`
	TCP      int    `json:"tcp"`
	UDP      int    `json:"udp"`
	ICMP     int    `json:"icmp"`
	Other    int    `json:"other"`
	HalfOpen [2]int `json:"halfOpen"` // opened by the guest, from outside
}

// FragmentStats counts fragments that came before their first one.
type FragmentStats struct {
	Waiting int    `json:"waiting"` // bytes that wait now
	Held    uint64 `json:"held"`
	Expired uint64 `json:"expired"`
	Dropped uint64 `json:"dropped"` // there was no room to wait
}

// Stats returns the counters. It takes the locks of the port spaces for a
// moment.
func (m *Masquerade) Stats() Stats {
	c := &m.stats
	s := Stats{Flows: int(m.table.live.Load()), Created: c.created.Load(), Expired: c.expired.Load(),
		TableFull: c.tableFull.Load(), NoPort: c.noPort.Load(), RateLimited: c.rateLimited.Load(),
		NoRoute: c.noRoute.Load(), ICMPErrors: c.icmpErrors.Load(), ICMPLimited: c.icmpLimited.Load(),
		Fragments: FragmentStats{Waiting: m.frags.waiting(), Held: c.fragHeld.Load(), Expired: c.fragExpired.Load(),
			Dropped: c.fragDropped.Load()}}
	for i := range m.spaces {
		s.Mappings += m.spaces[i].mappings()
	}
	for _, g := range m.guests {
		s.Fragments.Waiting += g.frags.waiting()
		s.Guests = append(s.Guests, GuestStats{MAC: macString(g.mac.Load()), Flows: int(g.total.Load()),
			TCP: int(g.flows[kindTCP].Load()), UDP: int(g.flows[kindUDP].Load()), ICMP: int(g.flows[kindICMP].Load()),
			Other:    int(g.flows[kindOther].Load()),
			HalfOpen: [2]int{int(g.half[guestSide].Load()), int(g.half[outside].Load())}})
	}
	return s
}

func macString(m uint64) string {
	if m == 0 {
		return ""
	}
	var b [6]byte
	putMAC(b[:], m)
	s := hex.EncodeToString(b[:])
	return fmt.Sprintf("%s:%s:%s:%s:%s:%s", s[0:2], s[2:4], s[4:6], s[6:8], s[8:10], s[10:12])
}

// StateVersion is the version of State that Export writes.
const StateVersion = 1

// State is a Masquerade's memory as a plain value that can be written down:
// flows, forwards, and the guests' hardware addresses.
type State struct {
	Version  int          `json:"version"`
	MACs     [][]byte     `json:"macs,omitempty"` // by guest; empty is unknown
	Forwards []Forward    `json:"forwards,omitempty"`
	Flows    []FlowRecord `json:"flows,omitempty"`
}

// FlowRecord is a flow in a State. Times are in seconds before the export.
type FlowRecord struct {
	Guest      int       `json:"g"`
	Proto      uint8     `json:"p"`
	GuestPort  uint16    `json:"i"`
	External   uint16    `json:"e"`
	Remote     uint32    `json:"r"`
	RemotePort uint16    `json:"o"`
	Idle       uint32    `json:"n,omitempty"`
	Age        uint32    `json:"a,omitempty"`
	Queue      uint16    `json:"q,omitempty"`
	TCP        uint32    `json:"t,omitempty"` // state, opener and scales
	Acks       [2]uint64 `json:"k,omitempty"`
	ISN        [2]uint32 `json:"s,omitempty"`
	Packets    [2]uint64 `json:"c,omitempty"`
	Bytes      [2]uint64 `json:"b,omitempty"`
	Pinned     bool      `json:"x,omitempty"` // refers to its external port
}

// Export writes down everything that another Masquerade of the same
// configuration needs to go on. It may be called beside workers; what changes
// meanwhile may be missing.
func (m *Masquerade) Export(now int64) State {
	s := State{Version: StateVersion, Forwards: m.Forwards()}
	for _, g := range m.guests {
		mac := g.mac.Load()
		if mac == 0 {
			s.MACs = append(s.MACs, nil)
			continue
		}
		b := make([]byte, 6)
		putMAC(b, mac)
		s.MACs = append(s.MACs, b)
	}
	sec := seconds(now)
	m.eachFlow(func(r ref) bool {
		u := tupleOf(r.w0, r.w1)
		f := FlowRecord{Guest: int(u.guest), Proto: u.proto, GuestPort: u.guestPort, External: u.external,
			Remote: u.remote, RemotePort: u.remotePort, Queue: uint16(r.queue.Load()), TCP: uint32(r.tcp.Load()),
			Idle: uint32(since(sec, r.seen.Load()).Seconds()), Age: uint32(since(sec, r.born.Load()).Seconds()),
			Pinned: r.pinned.Load() != 0}
		for side := range 2 {
			f.Acks[side], f.ISN[side] = r.acks[side].Load(), r.isn[side].Load()
			f.Packets[side], f.Bytes[side] = r.packets[side].Load(), r.bytes[side].Load()
		}
		s.Flows = append(s.Flows, f)
		return true
	})
	return s
}

// Import takes up what Export wrote, before traffic flows. Flows that do not
// fit this configuration, its limits or what is there already are left out;
// the error says how many. Nothing in s can do more harm than that.
func (m *Masquerade) Import(now int64, s State) error {
	if s.Version != StateVersion {
		return fmt.Errorf("import flows: version %d, want %d", s.Version, StateVersion)
	}
	for i, b := range s.MACs {
		if i < len(m.guests) && len(b) == 6 && b[0]&1 == 0 {
			m.guests[i].mac.Store(mac48(b))
		}
	}
	left := 0
	for _, f := range s.Forwards {
		if m.AddForward(f) != nil {
			left++
		}
	}
	for i := range s.Flows {
		if !m.importFlow(now, &s.Flows[i]) {
			left++
		}
	}
	if left > 0 {
		return fmt.Errorf("import flows: %d of %d flows and forwards do not fit", left, len(s.Flows)+len(s.Forwards))
	}
	return nil
}

func (m *Masquerade) importFlow(now int64, f *FlowRecord) bool {
	w := tcpWord(f.TCP)
	space := m.space(f.Proto)
	if f.Guest < 0 || f.Guest >= len(m.guests) || f.Proto == 0 || f.Pinned && space == nil ||
		w.state() > tcpTrans || f.Proto == frame.ProtoTCP != (w.state() != tcpClosed) {
		return false
	}
	g, k := m.guests[f.Guest], kindOf(f.Proto)
	if int(g.flows[k].Load()) >= m.cfg.Limits.of(k) || int(g.total.Load()) >= m.cfg.Limits.Flows {
		return false
	}
	if f.Pinned && !space.restore(g, f.External, f.GuestPort) {
		return false
	}
	g.flows[k].Add(1)
	g.total.Add(1)
	o := opening{tuple: tuple{remote: f.Remote, remotePort: f.RemotePort, guestPort: f.GuestPort, external: f.External,
		guest: g.index, proto: f.Proto}, g: g, side: w.opener(), pinned: f.Pinned, queue: f.Queue, tcp: w}
	before := m.table.live.Load()
	r, reason := m.open(&o, now)
	if reason != frame.ReasonNone || m.table.live.Load() == before {
		return false
	}
	sec := seconds(now)
	r.seen.Store(sec - min(f.Idle, 1<<24))
	r.born.Store(sec - min(f.Age, 1<<24))
	for side := range 2 {
		r.acks[side].Store(f.Acks[side])
		r.isn[side].Store(f.ISN[side])
		r.flow.packets[side].Store(f.Packets[side])
		r.flow.bytes[side].Store(f.Bytes[side])
	}
	return true
}
