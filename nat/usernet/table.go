package usernet

import (
	"encoding/binary"
	"math/bits"
	"math/rand/v2"

	"sidewire/engine/frame"
)

const (
	defaultFlows = 1 << 17
	// slabFlows is how many flows are allocated at once: 100 KiB of them, of
	// which those take memory that were ever used.
	slabFlows = 1 << 10
	// headsChunk is how many hash chains are made at once, and how many there are
	// at first; a power of two.
	headsChunk = 256
	none       = int32(-1)
)

// key names a flow as the guest sees it. UDP mappings and echo sessions have
// no remote side (RFC 4787 REQ-1).
type key struct {
	remote host
	rport  uint16
	gport  uint16
	proto  uint8
	in     uint8 // a UDP forward: the mapping is a listener's
}

// host is an address of IPv4 in a key, in network order. A key has no room for
// one of IPv6: where there are such, they are to be numbered.
type host [4]byte

func hostOf(a uint32) (h host) {
	binary.BigEndian.PutUint32(h[:], a)
	return h
}

func (h host) addr() uint32 { return binary.BigEndian.Uint32(h[:]) }

func tcpKey(f *frame.Frame) key {
	return key{remote: hostOf(f.DstIP4()), rport: f.DstPort(), gport: f.SrcPort(), proto: frame.ProtoTCP}
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

	flags   flags
	mss     uint16 // of what the guest takes
	state   state
	place   place
	scale   uint8  // 1 + the guest's window scale, 0 if it does not scale
	backoff uint8  // of the retransmission timer
	rttAt   uint16 // when mark was sent, in units of rttShift; 0 if nothing is timed

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
	rtxDue  uint32 // when to retransmit or probe, in ticks; 0 if nothing is to be

	srtt, rttvar uint16 // in units of rttShift
	ssthresh     uint16 // in mss
	seen         uint16 // when the guest or the host was heard last, in units of seenShift
}

// flags of a flow, and in their highest bits two small numbers.
type flags uint32

const (
	// strangeOne counts the frames in a row that came to another worker than the
	// flow's, up to 15.
	strangeOne flags = 1 << 28
	// dupAckOne counts the acknowledgements in a row that say nothing new, up to
	// 7.
	dupAckOne flags = 1 << 25

	strangeAll = 15 * strangeOne
	dupAckAll  = 7 * dupAckOne
)

// count adds one to a number of the flags', unless it is at its most, and
// returns it.
func (f *flow) count(one, all flags) int {
	if f.flags&all != all {
		f.flags += one
	}
	return int(f.flags & all / one)
}

// place says in which of a worker's lists a flow's place is.
type place uint8

const (
	// timerLevel is 1 + the level of the timer wheel, 0 if no timer runs.
	timerLevel place = 7
	// inTouched: among the flows that the batch has touched.
	inTouched place = 1 << (2 + iota)
	// isReady: it may have something for the guest.
	isReady
	// inLine: in the line of those that are, or were. It outlives the flow.
	inLine
)

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
	heads  []*[headsChunk]int32
	chains uint32
	mask   uint32 // one less than the largest power of two that is not more than chains
	free   int32  // 1 + index
	used   int    // places ever handed out
	count  int
	max    int
	seed   uint64
	gen    uint32
}

func (t *table) init(limit int) {
	t.heads = append(t.heads[:0], new([headsChunk]int32))
	t.chains, t.mask, t.max, t.seed = headsChunk, headsChunk-1, limit, rand.Uint64()|1
}

// at is the flow with an index, borrowed.
func (t *table) at(i int32) *flow { return &t.slabs[i/slabFlows][i%slabFlows] }

func (t *table) bucket(k *key) *int32 {
	h := mix(t.seed ^ uint64(k.remote.addr())<<32 ^ uint64(k.rport)<<16 ^ uint64(k.gport))
	h = mix(h ^ uint64(k.proto)<<8 ^ uint64(k.in))
	at := uint32(h>>32) & (2*t.mask + 1)
	if at >= t.chains {
		at &= t.mask
	}
	return t.head(at)
}

func (t *table) head(at uint32) *int32 { return &t.heads[at/headsChunk][at%headsChunk] }

// split makes one more hash chain, of what belongs there of another.
func (t *table) split() {
	from := t.head(t.chains & t.mask)
	i := *from
	*from = 0
	if t.chains%headsChunk == 0 {
		t.heads = append(t.heads, new([headsChunk]int32))
	}
	if t.chains++; t.chains == 2*(t.mask+1) {
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
	if t.count++; t.count > int(t.chains) {
		t.split()
	}
	t.gen++
	f, head := t.at(i), t.bucket(&k)
	*f = flow{key: k, fd: -1, gen: t.gen, next: *head, place: f.place & inLine}
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
	*f = flow{gen: f.gen, next: t.free, place: f.place & inLine}
	t.free = i + 1
	t.count--
}
