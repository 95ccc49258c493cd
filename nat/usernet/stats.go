package usernet

import (
	"sync/atomic"
	"time"
)

// Stats count what happened since New. A worker has its own and guards them by
// its lock.
type Stats struct {
	TCPOpened, UDPOpened, EchoOpened  uint64
	TCPOpen, UDPOpen, EchoOpen        int
	Refused                           uint64 // by the host: RST or unreachable
	PolicyDenied, TableFull, NoSocket uint64
	Retransmits, Stalls               uint64
}

func (s *Stats) opened(proto uint8) {}
func (s *Stats) closed(proto uint8) {}

// Timeouts end flows that are idle for so long.
type Timeouts struct {
	Established, Opening, Closing, UDP, Echo time.Duration
}

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
}

// socketBudget bounds the descriptors of all workers.
type socketBudget struct {
	left atomic.Int64
}

func (s *socketBudget) init(limit int) { s.left.Store(int64(limit)) }

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
