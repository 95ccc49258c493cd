package usernet

import (
	"math/bits"
	"math/rand/v2"

	"sidewire/engine/frame"
)

const (
	defaultFlows = 1 << 17
	// slabFlows is how many flows are allocated at once: 128 KiB of them.
	slabFlows = 1 << 10
	fewHeads  = 64 // hash chains at first, a power of two
	none      = int32(-1)
)

// key names a flow as the guest sees it. UDP mappings and echo sessions have
// no remote side (RFC 4787 REQ-1).
type key struct {
	remote [16]byte // IPv4 as ::ffff:a.b.c.d
	rport  uint16
	gport  uint16
	proto  uint8
	in     uint8 // a UDP forward: the mapping is a listener's
}

func tcpKey(f *frame.Frame) key {
	return key{remote: mapped(f.DstIP4()), rport: f.DstPort(), gport: f.SrcPort(), proto: frame.ProtoTCP}
}

func udpKey(f *frame.Frame) key { return key{gport: f.SrcPort(), proto: frame.ProtoUDP} }

// flow is a TCP connection, a UDP mapping or an echo session. It is a plain
// value in a slab: links are indices.
type flow struct {
	key
	queue uint16 // queue pair that the guest sent from last
	fd    int32
	gen   uint32 // which flow of this place it is, for late events
	next  int32  // in its hash chain, or in the free list

	// The wheel's.
	timerNext, timerPrev int32
	timerTick            uint32
	// In the list of flows that may have something for the guest; readyNext is
	// notReady outside.
	readyNext, readyPrev int32
	timerSlot            uint16
	batchAt              int16 // place in the worker's list of flows that this batch touched, -1 for none

	flags   flags
	mss     uint16 // of what the guest takes
	state   state
	gscale  uint8 // the guest's window scale
	oscale  uint8 // ours; both 0 if the guest does not scale
	dupAcks uint8
	backoff uint8 // of the retransmission timer
	ttl     uint8 // last set on the socket, 0 for the default
	tos     uint8
	strange uint8 // frames in a row that came to another worker than the flow's

	rcvNxt  uint32 // next byte expected from the guest
	rcvAck  uint32 // what the guest was told last
	rcvEdge uint32 // right edge of the window that it was told
	sndUna  uint32 // first byte that the guest has not acknowledged
	sndNxt  uint32 // next byte to send to the guest
	sndMax  uint32 // behind the last byte ever sent
	sndWnd  uint32 // the guest's window, in bytes
	cwnd    uint32
	base    uint32 // first byte that is still in the host's socket
	mark    uint32 // the byte whose acknowledgement is timed; in recovery, sndMax when loss was seen
	rttAt   uint32 // when it was sent, in rttUnit; 0 if none is timed
	rtxDue  uint32 // when to retransmit or probe, in ticks; 0 if nothing is to be

	srtt, rttvar uint16 // in rttUnit
	ssthresh     uint16 // in mss
	seen         uint16 // when the guest or the host was heard last, in units of seenShift
}

// flags of a TCP flow.
type flags uint16

type state uint8

const (
	stateFree       state = iota
	stateConnecting       // the host's connect is under way
	stateSynAckSent       // the host is connected, the guest has not acknowledged that
	stateSynSent          // a client of the host's waits for the guest
	stateEstablished
	stateTimeWait // both sides have closed; there is no socket
	stateMapping  // UDP and echo
)

// table is the flows of one worker.
type table struct {
	slabs [][]flow
	// heads are the hash chains, 1 + index. There are as many as there ever were
	// flows, and they grow one by one: by linear hashing, no flow but those of
	// one chain has to move for that, and an idle table is small.
	heads []int32
	mask  uint32 // one less than the largest power of two that is not more than len(heads)
	free  int32  // 1 + index
	used  int    // places ever handed out
	count int
	max   int
	seed  uint64
	gen   uint32
}

func (t *table) init(limit int) {
	t.heads, t.mask, t.max, t.seed = make([]int32, fewHeads), fewHeads-1, limit, rand.Uint64()|1
}

// at is the flow with an index, borrowed.
func (t *table) at(i int32) *flow { return &t.slabs[i/slabFlows][i%slabFlows] }

func (t *table) bucket(k *key) *int32 {
	h := t.seed
	for i := 0; i < 16; i += 8 {
		h = mix(h ^ le64(k.remote[i:]))
	}
	h = mix(h ^ uint64(k.rport)<<48 ^ uint64(k.gport)<<32 ^ uint64(k.proto)<<8 ^ uint64(k.in))
	at := uint32(h>>32) & (2*t.mask + 1)
	if int(at) >= len(t.heads) {
		at &= t.mask
	}
	return &t.heads[at]
}

// split makes one more hash chain, of what belongs there of another.
func (t *table) split() {
	from := uint32(len(t.heads)) & t.mask
	i := t.heads[from]
	t.heads[from] = 0
	if t.heads = append(t.heads, 0); uint32(len(t.heads)) == 2*(t.mask+1) {
		t.mask = 2*t.mask + 1
	}
	for i != 0 {
		f := t.at(i - 1)
		next, head := f.next, t.bucket(&f.key)
		f.next = *head
		*head, i = i, next
	}
}

// mix is a step of a hash that nobody outside can aim at: its seed is secret.
func mix(x uint64) uint64 {
	hi, lo := bits.Mul64(x, 0x9e3779b97f4a7c15)
	return hi ^ lo
}

func le64(b []byte) uint64 {
	_ = b[7]
	return uint64(b[0]) | uint64(b[1])<<8 | uint64(b[2])<<16 | uint64(b[3])<<24 |
		uint64(b[4])<<32 | uint64(b[5])<<40 | uint64(b[6])<<48 | uint64(b[7])<<56
}

// find returns the index of a flow, or none.
func (t *table) find(k key) int32 {
	for i := *t.bucket(&k); i != 0; {
		f := t.at(i - 1)
		if f.key == k {
			return i - 1
		}
		i = f.next
	}
	return none
}

// add makes a flow and returns its index, or none if the table is full. Flows
// that live are never given up for it (RFC 6888 REQ-11).
func (t *table) add(k key) int32 {
	var i int32
	switch {
	case t.count >= t.max:
		return none
	case t.free != 0:
		i = t.free - 1
		t.free = t.at(i).next
	default:
		if t.used == len(t.slabs)*slabFlows {
			t.slabs = append(t.slabs, make([]flow, slabFlows))
		}
		i = int32(t.used)
		t.used++
	}
	if t.count++; t.count > len(t.heads) {
		t.split()
	}
	t.gen++
	f, head := t.at(i), t.bucket(&k)
	*f = flow{key: k, fd: -1, gen: t.gen, next: *head, timerNext: none, timerPrev: none, timerSlot: noSlot, batchAt: -1, readyNext: notReady, readyPrev: none}
	*head = i + 1
	return i
}

// remove frees a flow's place.
func (t *table) remove(i int32) {
	f := t.at(i)
	p := t.bucket(&f.key)
	for *p != i+1 {
		p = &t.at(*p - 1).next
	}
	*p = f.next
	*f = flow{gen: f.gen, next: t.free, timerNext: none, timerPrev: none, timerSlot: noSlot, batchAt: -1, readyNext: notReady, readyPrev: none}
	t.free = i + 1
	t.count--
}
