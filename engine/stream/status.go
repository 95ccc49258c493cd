package stream

import "sidewire/engine/frame"

// Status is what a device is doing, for people and for JSON. Counts are over
// the device's life.
type Status struct {
	Name      string `json:"name"`
	Path      string `json:"path"`
	Connected bool   `json:"connected"`
	TxFrames  uint64 `json:"txFrames"` // from the guest
	TxBytes   uint64 `json:"txBytes"`
	RxFrames  uint64 `json:"rxFrames"` // to the guest
	RxBytes   uint64 `json:"rxBytes"`
	// RxSplit is how many of RxFrames a full socket took in two pieces.
	RxSplit  uint64            `json:"rxSplit"`
	Drops    map[string]uint64 `json:"drops,omitempty"` // both ways, by reason
	Counters map[string]uint64 `json:"counters"`        // those that are not zero
}

// Status returns the state of the device.
func (d *Device) Status() Status {
	d.mu.Lock()
	connected := d.conn != nil
	d.mu.Unlock()
	c := &d.count
	s := Status{
		Name: d.cfg.Name, Path: d.cfg.Path, Connected: connected,
		TxFrames: c.txFrames.Load(), TxBytes: c.txBytes.Load(),
		RxFrames: c.rxFrames.Load(), RxBytes: c.rxBytes.Load(), RxSplit: c.rxSplit.Load(),
		Drops: map[string]uint64{}, Counters: map[string]uint64{},
	}
	add := func(m map[string]uint64, name string, n uint64) {
		if n > 0 {
			m[name] = n
		}
	}
	for r := range frame.NumReasons {
		add(s.Drops, r.String(), c.drops[r].Load())
	}
	add(s.Counters, "sessions", c.sessions.Load())
	add(s.Counters, "turned_away", c.turnedAway.Load())
	for why := hungUp; why < numCauses; why++ {
		add(s.Counters, causeNames[why], c.causes[why].Load())
	}
	return s
}
