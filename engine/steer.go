package engine

import (
	"encoding/binary"
	"sync/atomic"

	"sidewire/engine/frame"
)

// steering remembers on which queue pair a guest last sent each flow. Flows
// that share a slot share a queue, until one of them is sent again. It is safe
// for concurrent use.
type steering struct {
	queues uint32
	slots  [steerSlots]atomic.Uint32 // 1 more than the queue; 0 is unknown
}

const (
	steerBits  = 10
	steerSlots = 1 << steerBits
	// steerHead is how much of an untagged frame has addresses and ports.
	steerHead = frame.EthernetLen + ip6Len + 4
)

// newSteering returns nil for a port with one queue pair.
func newSteering(queues int) *steering {
	if queues < 2 {
		return nil
	}
	return &steering{queues: uint32(queues)}
}

// remember notes the queue of a flow.
func (s *steering) remember(hash, queue uint32) {
	slot := &s.slots[hash>>(32-steerBits)]
	if slot.Load() != queue+1 {
		slot.Store(queue + 1)
	}
}

// queue returns the queue for a flow.
func (s *steering) queue(hash uint32) uint16 {
	if q := s.slots[hash>>(32-steerBits)].Load(); q != 0 {
		return uint16(q - 1)
	}
	return uint16(uint64(hash) * uint64(s.queues) >> 32)
}

// flowHash returns the same number for both directions of a flow: of the
// addresses and ports as far as they lie in Head, or of the stations.
func flowHash(f *frame.Frame) uint32 {
	off, typ := frame.EthernetLen, f.EtherType()
	if isTag(typ) && int(f.HeadLen) >= off+vlanLen {
		typ = binary.BigEndian.Uint16(f.Head[off+2:])
		off += vlanLen
	}
	h := f.Head[off:f.HeadLen]
	var x uint64
	switch {
	case typ == frame.TypeIPv4 && len(h) >= 20:
		x = uint64(binary.BigEndian.Uint32(h[12:]) ^ binary.BigEndian.Uint32(h[16:]))
		if binary.BigEndian.Uint16(h[6:])&^frame.DontFragment == 0 {
			x ^= ports(h, int(h[0]&15)*4, h[9])
		}
	case typ == frame.TypeIPv6 && len(h) >= ip6Len:
		x = binary.BigEndian.Uint64(h[8:]) ^ binary.BigEndian.Uint64(h[24:])
		y := binary.BigEndian.Uint64(h[16:]) ^ binary.BigEndian.Uint64(h[32:])
		x = (x*0x9e3779b97f4a7c15 ^ y) ^ ports(h, ip6Len, h[6])
	default:
		x = (binary.BigEndian.Uint64(f.Head[:]) ^ binary.BigEndian.Uint64(f.Head[6:])) >> 16
	}
	return uint32(x * 0x9e3779b97f4a7c15 >> 32)
}

// ports mixes the ports of a transport header at off, if it has any.
func ports(h []byte, off int, proto uint8) uint64 {
	if proto != frame.ProtoTCP && proto != frame.ProtoUDP || off+4 > len(h) {
		return 0
	}
	return uint64(binary.BigEndian.Uint16(h[off:])^binary.BigEndian.Uint16(h[off+2:])) << 32
}
