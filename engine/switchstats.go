package engine

import (
	"time"

	"sidewire/engine/frame"
)

// FDBEntry is a station that a switch knows.
type FDBEntry struct {
	MAC  frame.MAC     `json:"mac"`
	VLAN uint16        `json:"vlan"` // 0 is none
	Port frame.PortID  `json:"port"`
	Age  time.Duration `json:"age"`    // since it was last seen, to the second
	Own  bool          `json:"static"` // the port was configured with it; it does not age
}

// FDB calls fn for every station, in no order, until it returns false.
func (s *Switch) FDB(fn func(FDBEntry) bool) {
	t, now := s.fdb.table.Load(), second(Now())
	for i := range t.slots {
		key, st := t.slots[i].key.Load(), station(t.slots[i].val.Load())
		if key == 0 || st == 0 || st.expired(now, s.fdb.age) { // the key comes last
			continue
		}
		e := FDBEntry{MAC: keyMAC(key), VLAN: uint16(key), Port: st.port(), Own: st.pinned()}
		if !e.Own {
			e.Age = time.Duration(max(int32(now-st.sec()), 0)) * time.Second
		}
		if !fn(e) {
			return
		}
	}
}

// SwitchPortStats is what was counted for a port of a switch, over all workers.
type SwitchPortStats struct {
	Port      frame.PortID      `json:"port"`
	Uplink    bool              `json:"uplink,omitempty"`
	Addresses int               `json:"addresses"` // learned and not forgotten
	Learned   uint64            `json:"learned"`
	Moved     uint64            `json:"moved"`   // learned, from another port
	Evicted   uint64            `json:"evicted"` // forgotten to make room for another one of the port
	Refused   uint64            `json:"refused"` // frames whose source is the own address of another port
	Flooded   uint64            `json:"flooded"` // frames that went to many
	Drops     map[string]uint64 `json:"drops,omitempty"`
}

// SwitchStats is what a switch counted.
type SwitchStats struct {
	Name      string            `json:"name"`
	Addresses int               `json:"addresses"` // learned, over all ports
	Slots     int               `json:"slots"`     // size of the table
	Ports     []SwitchPortStats `json:"ports"`
}

// Stats returns the counters of all members, in the order of joining. Drops
// are those of the switch alone; the engine counts them for the port as well.
func (s *Switch) Stats() SwitchStats {
	out := SwitchStats{Name: s.name}
	s.fdb.mu.Lock()
	defer s.fdb.mu.Unlock()
	out.Addresses, out.Slots = s.fdb.live, len(s.fdb.table.Load().slots)
	for _, m := range s.view.Load().members {
		p := SwitchPortStats{Port: m.id, Uplink: m.uplink, Addresses: len(m.owner.owned), Drops: map[string]uint64{}}
		for _, c := range m.counts {
			p.Learned += c.learned.Load()
			p.Moved += c.moved.Load()
			p.Evicted += c.evicted.Load()
			p.Refused += c.refused.Load()
			p.Flooded += c.flooded.Load()
			for r := range c.drops {
				if n := c.drops[r].Load(); n > 0 {
					p.Drops[frame.DropReason(r).String()] += n
				}
			}
		}
		out.Ports = append(out.Ports, p)
	}
	return out
}
