package uplink

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/nftables"

	"sidewire/engine/frame"
)

// Port is a published port of the guest, or a range of them.
type Port struct {
	Proto uint8 // frame.ProtoTCP or frame.ProtoUDP
	Port  uint16
	Last  uint16 // last port of a range; 0 is Port alone
}

// last is the last port of the range, which may have one.
func (p Port) last() uint16 { return max(p.Port, p.Last) }

// String names the port as users do.
func (p Port) String() string {
	proto, ok := map[uint8]string{frame.ProtoTCP: "/TCP", frame.ProtoUDP: "/UDP"}[p.Proto]
	if !ok {
		proto = fmt.Sprintf(" of protocol %d", p.Proto)
	}
	if p.last() > p.Port {
		return fmt.Sprintf("ports %d-%d%s", p.Port, p.Last, proto)
	}
	return fmt.Sprintf("port %d%s", p.Port, proto)
}

func checkPorts(ports []Port) error {
	for _, p := range ports {
		if p.Proto != frame.ProtoTCP && p.Proto != frame.ProtoUDP || p.Port == 0 || p.Last != 0 && p.Last < p.Port {
			return fmt.Errorf("%s cannot be published", p)
		}
	}
	return nil
}

// portList is what is published of a guest: in order, and no port twice. Nil is
// everything.
type portList []Port

// place puts the ports of all protocols into one order.
func place(proto uint8, port uint16) int { return int(proto)<<16 | int(port) }

func portListOf(ports []Port) portList {
	sorted := slices.Clone(ports)
	slices.SortFunc(sorted, func(a, b Port) int {
		return place(a.Proto, a.Port) - place(b.Proto, b.Port)
	})
	l := make(portList, 0, len(sorted))
	for _, p := range sorted {
		if n := len(l); n > 0 && l[n-1].Proto == p.Proto && l[n-1].last() >= p.Port {
			if p.last() > l[n-1].last() {
				l[n-1].Last = p.last()
			}
			continue
		}
		l = append(l, p)
	}
	return l
}

// find is the place of the entry that holds a port, or that it would have.
func (l portList) find(p Port) (at int, there bool) {
	at, _ = slices.BinarySearchFunc(l, p, func(e, p Port) int {
		return place(e.Proto, e.last()) - place(p.Proto, p.Port)
	})
	return at, at < len(l) && l[at].Proto == p.Proto && l[at].Port <= p.Port
}

// without is the list less one port, of a range as of a single one.
func (l portList) without(p Port) portList {
	at, there := l.find(p)
	if !there {
		return l
	}
	var rest []Port
	if e := l[at]; e.Port < p.Port {
		rest = append(rest, Port{Proto: e.Proto, Port: e.Port, Last: p.Port - 1})
	}
	if e := l[at]; e.last() > p.Port {
		rest = append(rest, Port{Proto: e.Proto, Port: p.Port + 1, Last: e.last()})
	}
	return slices.Replace(slices.Clone(l), at, at+1, rest...)
}

// shared is a port that two lists have.
func (l portList) shared(other portList) (p Port, ok bool) {
	for i, j := 0, 0; i < len(l) && j < len(other); {
		a, b := l[i], other[j]
		switch {
		case a.Proto == b.Proto && a.Port <= b.last() && b.Port <= a.last():
			return Port{Proto: a.Proto, Port: max(a.Port, b.Port)}, true
		case place(a.Proto, a.last()) < place(b.Proto, b.last()):
			i++
		default:
			j++
		}
	}
	return p, false
}

// ranged says whether some guest has a range. The kernel finds a port faster in
// a set that has none.
func (p *Pod) ranged() bool {
	return slices.ContainsFunc(p.ports, func(l portList) bool {
		return slices.ContainsFunc(l, func(e Port) bool { return e.last() > e.Port })
	})
}

// elements are the list as a set of the kernel's has it.
func (l portList) elements(ranged bool) (elems []nftables.SetElement) {
	key := func(proto uint8, port uint16) []byte {
		return append(binary.BigEndian.AppendUint16([]byte{proto, 0, 0, 0}, port), 0, 0)
	}
	for _, p := range l {
		e := nftables.SetElement{Key: key(p.Proto, p.Port)}
		if ranged {
			e.KeyEnd = key(p.Proto, p.last())
		}
		elems = append(elems, e)
	}
	return elems
}
