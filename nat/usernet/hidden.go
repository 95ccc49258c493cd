package usernet

import "sync"

// hiddenMax bounds the hidden clients of a Net.
const hiddenMax = 4096

// hidden are the clients of UDP forwards that the guest sees as the gateway: by
// which of its ports, and who is behind which.
type hidden struct {
	mu     sync.Mutex // guards all below; the mappings may be several workers'
	shown  map[hiddenClient]uint16
	behind map[gatewayPort]*hiddenClient
	swept  uint16 // when the table was searched for idle ones last, as worker.seen has it
}

// hiddenClient is somebody who has sent to a guest's port.
type hiddenClient struct {
	gport, port uint16
	addr        uint32
	seen        uint16
}

// gatewayPort is a port of the gateway's as a guest's port sees it.
type gatewayPort struct{ gport, port uint16 }

// hide returns the gateway's port that the guest's port sees a client as, 0 if
// there is no room for another one.
func (w *worker) hide(gport uint16, addr uint32, port uint16) uint16 {
	h := &w.net.forwards.hidden
	h.mu.Lock()
	defer h.mu.Unlock()
	k := hiddenClient{gport: gport, addr: addr, port: port}
	if p, ok := h.shown[k]; ok {
		h.behind[gatewayPort{gport, p}].seen = w.seen()
		return p
	}
	if h.shown == nil {
		h.shown, h.behind = map[hiddenClient]uint16{}, map[gatewayPort]*hiddenClient{}
	}
	if len(h.shown) >= hiddenMax && !h.sweep(w) {
		return 0
	}
	p := max(port, 1)
	for h.behind[gatewayPort{gport, p}] != nil {
		p = max(p+1, 1024)
	}
	c := k
	c.seen = w.seen()
	h.shown[k], h.behind[gatewayPort{gport, p}] = p, &c
	return p
}

// revealed is the client that the guest's port sees as a port of the gateway.
func (w *worker) revealed(gport, port uint16) (addr uint32, p uint16, ok bool) {
	h := &w.net.forwards.hidden
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.behind[gatewayPort{gport, port}]
	if c == nil {
		return 0, 0, false
	}
	c.seen = w.seen()
	return c.addr, c.port, true
}

// sweep takes out clients that were not heard for as long as a mapping
// lives, and says whether there is room. It looks once a unit of worker.seen.
func (h *hidden) sweep(w *worker) bool {
	now := w.seen()
	if h.swept == now {
		return false
	}
	h.swept = now
	idle := int64(w.net.conf.Timeouts.UDP) >> (tickShift + seenShift)
	for k, c := range h.behind {
		if int64(uint16(now-c.seen)) > idle {
			h.remove(k, c)
		}
	}
	return len(h.shown) < hiddenMax
}

// forget takes out the clients of a guest's port.
func (h *hidden) forget(gport uint16) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for k, c := range h.behind {
		if k.gport == gport {
			h.remove(k, c)
		}
	}
}

func (h *hidden) remove(k gatewayPort, c *hiddenClient) {
	delete(h.behind, k)
	delete(h.shown, hiddenClient{gport: c.gport, addr: c.addr, port: c.port})
}
