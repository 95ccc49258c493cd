package vhostuser

import (
	"net"
	"sync/atomic"

	"sidewire/engine/frame"
	"sidewire/vhostuser/guestmem"
	"sidewire/vhostuser/virtq"
)

// counters count what a pair did. Workers add to them once per batch, but for
// drops.
type counters struct {
	txFrames, txBytes atomic.Uint64
	rxFrames, rxBytes atomic.Uint64
	rxDirect          atomic.Uint64
	interrupts        atomic.Uint64
	drops             [frame.NumReasons]atomic.Uint64
}

func (c *counters) drop(r frame.DropReason) { c.drops[r].Add(1) }

// Status is what a device is doing, for people and for JSON.
type Status struct {
	Name             string            `json:"name"`
	Path             string            `json:"path"`
	State            State             `json:"state"`
	Features         []string          `json:"features,omitempty"`
	ProtocolFeatures []string          `json:"protocolFeatures,omitempty"`
	MAC              string            `json:"mac,omitempty"`
	Filter           Filter            `json:"filter"`
	MemoryRegions    int               `json:"memoryRegions"`
	MemoryBytes      uint64            `json:"memoryBytes"`
	Rings            []RingStatus      `json:"rings,omitempty"`
	Pairs            []PairStatus      `json:"pairs"`
	Counters         map[string]uint64 `json:"counters"`
}

// RingStatus is the state of a ring that the frontend has set up.
type RingStatus struct {
	Index   int    `json:"index"`
	Size    uint32 `json:"size"`
	Started bool   `json:"started"`
	Enabled bool   `json:"enabled"`
	Running bool   `json:"running"`
	Broken  bool   `json:"broken,omitempty"`
}

// PairStatus is what passed through a pair, counted over the device's life.
type PairStatus struct {
	TxFrames   uint64            `json:"txFrames"`
	TxBytes    uint64            `json:"txBytes"`
	RxFrames   uint64            `json:"rxFrames"`
	RxBytes    uint64            `json:"rxBytes"`
	RxDirect   uint64            `json:"rxDirect"` // of RxFrames, received straight into the guest's buffers
	Interrupts uint64            `json:"interrupts"`
	Drops      map[string]uint64 `json:"drops,omitempty"`
	// MemoryBytes is what the pair takes of our memory.
	MemoryBytes int `json:"memoryBytes"`
}

// Status returns the state of the device.
func (d *Device) Status() Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := Status{
		Name: d.cfg.Name, Path: d.cfg.Path, State: d.state,
		Features:         bitNames(d.features, featureNames),
		ProtocolFeatures: bitNames(d.proto, protocolNames),
		Filter:           d.ctrl.snapshot(),
		MemoryRegions:    len(d.regions),
		Counters:         d.counters(),
	}
	if d.mac != (frame.MAC{}) {
		s.MAC = net.HardwareAddr(d.mac[:]).String()
	}
	for _, r := range d.regions {
		s.MemoryBytes += r.Spec().Size
	}
	for _, r := range d.rings {
		if r.num != 0 || r.started || r.enabled {
			s.Rings = append(s.Rings, RingStatus{
				Index: r.index, Size: r.num, Started: r.started, Enabled: r.enabled,
				Running: r.q != nil && !r.broken.Load(), Broken: r.broken.Load(),
			})
		}
	}
	for _, p := range d.pairs {
		ps := p.status()
		ps.MemoryBytes = p.footprint()
		s.Pairs = append(s.Pairs, ps)
	}
	return s
}

func (p *Pair) status() PairStatus {
	c := &p.count
	return PairStatus{
		TxFrames: c.txFrames.Load(), TxBytes: c.txBytes.Load(),
		RxFrames: c.rxFrames.Load(), RxBytes: c.rxBytes.Load(),
		RxDirect: c.rxDirect.Load(), Interrupts: c.interrupts.Load(), Drops: dropMap(&c.drops),
	}
}

// dropMap names the reasons that occurred.
func dropMap(c *[frame.NumReasons]atomic.Uint64) map[string]uint64 {
	m := map[string]uint64{}
	for r := range frame.NumReasons {
		if n := c[r].Load(); n > 0 {
			m[r.String()] = n
		}
	}
	return m
}

// counters names the device's counters that are not zero.
func (d *Device) counters() map[string]uint64 {
	m := map[string]uint64{}
	add := func(name string, n uint64) {
		if n > 0 {
			m[name] = n
		}
	}
	add("sessions", d.sessions.Load())
	add("messages", d.messages.Load())
	add("refused_messages", d.refused.Load())
	add("protocol_errors", d.protocolErrors.Load())
	add("turned_away", d.turnedAway.Load())
	add("memory_faults", d.faults.Load())
	add("broken_rings", d.broken.Load())
	add("ring_errors", d.ringErrors.Load())
	var stalls uint64
	for _, r := range d.rings {
		stalls += r.call.stalls.Load() + r.err.stalls.Load()
	}
	add("stalled_interrupts", stalls)
	if d.ses != nil && d.ses.silent {
		add("memory_not_shared", 1)
	}
	add("bad_rarp", d.badRARP.Load())
	add("control_commands", d.ctrl.commands.Load())
	add("missed_dirty_marks", missed(d.dirty))
	for c := virtq.NoCause + 1; c < virtq.NumCauses; c++ {
		add("bad_chain: "+c.String(), d.badChains[c].Load())
	}
	for r := range frame.NumReasons {
		add("rx_drop: "+r.String(), d.rxDrops[r].Load())
	}
	return m
}

func missed(l *guestmem.Log) uint64 {
	if l == nil {
		return 0
	}
	return l.Missed()
}
