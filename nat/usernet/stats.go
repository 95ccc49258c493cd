package usernet

import (
	"net/netip"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Stats count what happened since New. A worker has its own and guards them by
// its lock.
type Stats struct {
	TCPOpened  uint64 `json:"tcpOpened"`
	UDPOpened  uint64 `json:"udpOpened"`
	EchoOpened uint64 `json:"echoOpened"`
	// Flows that there are now.
	TCPOpen  int `json:"tcpOpen"`
	UDPOpen  int `json:"udpOpen"`
	EchoOpen int `json:"echoOpen"`

	Accepted     uint64 `json:"accepted"`     // connections that came by a forwarded port
	AcceptFailed uint64 `json:"acceptFailed"` // times that there was no descriptor for one, which waits
	Refused      uint64 `json:"refused"`      // by the host: RST or unreachable
	PolicyDenied uint64 `json:"policyDenied"`
	TableFull    uint64 `json:"tableFull"`
	NoSocket     uint64 `json:"noSocket"` // flows refused for want of a descriptor or port

	Unasked          uint64 `json:"unasked"`          // datagrams that came for a port from which the guest has sent nothing yet
	Filtered         uint64 `json:"filtered"`         // datagrams from those who may not send to the mapping
	ErrorsLimited    uint64 `json:"errorsLimited"`    // ICMP errors not made because there were too many
	FragmentsDropped uint64 `json:"fragmentsDropped"` // of packets that contradict themselves, or never became whole

	Retransmits uint64 `json:"retransmits"`
	Stalls      uint64 `json:"stalls"`     // times that a socket took less than the guest was allowed to send
	OutOfOrder  uint64 `json:"outOfOrder"` // segments of the guest that came before their turn

	Moved uint64 `json:"moved"` // flows that followed the guest to another worker

	// Descriptors in use, and how many there may be.
	Sockets    int `json:"sockets"`
	MaxSockets int `json:"maxSockets"`
}

func (s *Stats) opened(proto uint8) {
	switch proto {
	case frame.ProtoTCP:
		s.TCPOpened++
		s.TCPOpen++
	case frame.ProtoUDP:
		s.UDPOpened++
		s.UDPOpen++
	default:
		s.EchoOpened++
		s.EchoOpen++
	}
}

func (s *Stats) closed(proto uint8) {
	switch proto {
	case frame.ProtoTCP:
		s.TCPOpen--
	case frame.ProtoUDP:
		s.UDPOpen--
	default:
		s.EchoOpen--
	}
}

func (s *Stats) add(o *Stats) {
	s.TCPOpened += o.TCPOpened
	s.UDPOpened += o.UDPOpened
	s.EchoOpened += o.EchoOpened
	s.TCPOpen += o.TCPOpen
	s.UDPOpen += o.UDPOpen
	s.EchoOpen += o.EchoOpen
	s.Accepted += o.Accepted
	s.AcceptFailed += o.AcceptFailed
	s.Refused += o.Refused
	s.PolicyDenied += o.PolicyDenied
	s.TableFull += o.TableFull
	s.NoSocket += o.NoSocket
	s.Unasked += o.Unasked
	s.Filtered += o.Filtered
	s.ErrorsLimited += o.ErrorsLimited
	s.FragmentsDropped += o.FragmentsDropped
	s.Retransmits += o.Retransmits
	s.Stalls += o.Stalls
	s.OutOfOrder += o.OutOfOrder
	s.Moved += o.Moved
}

// Stats are those of all workers.
func (n *Net) Stats() Stats {
	var s Stats
	for _, w := range n.workers {
		w.mu.Lock()
		s.add(&w.stats)
		w.mu.Unlock()
	}
	s.Sockets, s.MaxSockets = n.sockets.used()
	return s
}

// MAC is the guest's hardware address, as given or as seen; zero if neither.
func (n *Net) MAC() (m frame.MAC) {
	putMAC(m[:], n.mac.Load())
	return m
}

// LearnMAC tells the Net the guest's hardware address before the guest speaks,
// so that what comes from outside need not wait.
func (n *Net) LearnMAC(m frame.MAC) { n.mac.Store(mac48(m[:])) }

// Policy is the one in force.
func (n *Net) Policy() Policy { return *n.policy.Load() }

// FlowInfo is one flow as it was when it was looked at. It is a plain value.
type FlowInfo struct {
	Proto        uint8      `json:"proto"`
	GuestAddr    netip.Addr `json:"guestAddr"`
	GuestPort    uint16     `json:"guestPort"`    // or query id
	ExternalPort uint16     `json:"externalPort"` // of the host's socket, 0 if it has none any more
	// Remote is the other side as the guest sees it. UDP mappings and echo
	// sessions have many.
	Remote     netip.Addr `json:"remote,omitzero"`
	RemotePort uint16     `json:"remotePort,omitzero"`
	Inbound    bool       `json:"inbound"` // it came by a forwarded port
	State      string     `json:"state,omitempty"`
	// Bytes of payload from the guest and to it, known for TCP.
	Bytes  [2]uint64     `json:"bytes"`
	Idle   time.Duration `json:"idle"`
	Queue  uint16        `json:"queue"`
	Worker int           `json:"worker"`
}

var stateNames = [...]string{
	stateConnecting: "connecting", stateSynAckSent: "syn-ack-sent", stateSynSent: "syn-sent",
	stateEstablished: "established", stateTimeWait: "time-wait", stateMapping: "",
}

// flowsAtOnce is how many flows are looked at in one hold of a worker's lock:
// each takes two system calls.
const flowsAtOnce = 64

// Flows calls fn for every flow until it returns false. now is the batches'
// time. Flows that begin or end meanwhile may or may not be among them.
func (n *Net) Flows(now int64, fn func(FlowInfo) bool) {
	forwarded := n.forwardedPorts()
	var some [flowsAtOnce]FlowInfo
	for _, w := range n.workers {
		for at, more := int32(0), true; more; {
			var k int
			k, at, more = w.someFlows(some[:], at, now, forwarded)
			for i := range some[:k] {
				if !fn(some[i]) {
					return
				}
			}
		}
	}
}

// someFlows fills dst with flows from a place on and returns how many, and where
// to go on.
func (w *worker) someFlows(dst []FlowInfo, at int32, now int64, forwarded map[protoPort]bool) (k int, next int32, more bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for used := int32(w.table.used); at < used; at++ {
		if k == len(dst) {
			return k, at, true
		}
		if f := w.table.at(at); f.state.isFlow() {
			dst[k] = w.info(f, now, forwarded)
			k++
		}
	}
	return k, at, false
}

func (w *worker) info(f *flow, now int64, forwarded map[protoPort]bool) FlowInfo {
	seen := uint16(uint32(now>>tickShift) >> seenShift)
	i := FlowInfo{
		Proto: f.proto, GuestAddr: w.net.conf.Guest, GuestPort: f.gport, State: stateNames[f.state],
		Idle: time.Duration(max(int16(seen-f.seen), 0)) << (tickShift + seenShift), Queue: f.queue, Worker: w.id,
	}
	if f.proto == frame.ProtoICMP && w.six != nil {
		i.Proto = protoICMP6
	}
	if f.proto == frame.ProtoTCP {
		i.Remote, i.RemotePort = w.net.ipOf(f.remote.addr()), f.rport
	}
	if f.fd < 0 {
		return i
	}
	if sa, err := unix.Getsockname(int(f.fd)); err == nil {
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			i.ExternalPort = uint16(sa.Port)
		case *unix.SockaddrInet6:
			i.ExternalPort = uint16(sa.Port)
		}
		i.Inbound = forwarded[protoPort{f.proto, i.ExternalPort}]
	}
	if f.proto == frame.ProtoTCP {
		if t, err := unix.GetsockoptTCPInfo(int(f.fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			i.Bytes = [2]uint64{t.Bytes_acked, t.Bytes_received}
		}
	}
	return i
}

// Timeouts end flows that are idle for so long.
type Timeouts struct {
	Established, Opening, Closing, UDP, Echo time.Duration
}

// leastUDP and leastEcho are how short these may be (RFC 4787 REQ-5, RFC 5508
// REQ-2).
const (
	leastUDP  = 2 * time.Minute
	leastEcho = time.Minute
)

// defaults are those of RFC 5382 REQ-5, RFC 4787 REQ-5 and RFC 5508 REQ-2.
func (t *Timeouts) defaults() {
	for _, d := range []struct {
		v *time.Duration
		d time.Duration
	}{
		{&t.Established, 2*time.Hour + 4*time.Minute}, {&t.Opening, 4 * time.Minute}, {&t.Closing, 4 * time.Minute},
		{&t.UDP, 5 * time.Minute}, {&t.Echo, time.Minute},
	} {
		if *d.v <= 0 {
			*d.v = d.d
		}
	}
	t.UDP, t.Echo = max(t.UDP, leastUDP), max(t.Echo, leastEcho)
}

// socketBudget bounds the descriptors of all workers.
type socketBudget struct {
	left atomic.Int64
	max  int64
}

// socketsForOthers is how many descriptors are left to the rest of the process:
// rings, memory, control and log.
const socketsForOthers = 64

// init sets the bound; 0 is what the process may open, less those for others.
func (s *socketBudget) init(limit int) {
	if limit <= 0 {
		limit = max(MaxDescriptors()-socketsForOthers, 1)
	}
	s.max = int64(limit)
	s.left.Store(s.max)
}

// MaxDescriptors is how many descriptors the process may have. Go raises the
// soft limit to the hard one when a program starts.
func MaxDescriptors() int {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 1024 // what Linux gives by default
	}
	return int(min(r.Cur, 1<<30))
}

// take counts one descriptor more; it reports false if there is none to be
// had.
func (s *socketBudget) take() bool {
	if s.left.Add(-1) < 0 {
		s.left.Add(1)
		return false
	}
	return true
}

func (s *socketBudget) give() { s.left.Add(1) }

func (s *socketBudget) used() (used, most int) { return int(s.max - s.left.Load()), int(s.max) }
