package engine

import (
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// maxSpin is how long a worker looks for more before it sleeps. A wake-up
// between processes takes 17 to 44 us, so a longer spin cannot gain more than
// it spends.
const maxSpin = 50 * time.Microsecond

// sleeper decides when a worker that found nothing goes to sleep.
//
// Spinning pays when the next frame comes before a wake-up would have been
// through, and costs a whole processor when it does not. So a worker spins
// only while its last sleeps were short, and not at all where somebody else
// wanted the processor meanwhile.
type sleeper struct {
	mode   PollMode
	limit  int64 // ns to spin at most; 0 where spinning would be paid for
	since  int64 // when the worker last had work, ns
	budget int64 // ns to spin this time

	offTill int64 // no spinning before this time
	last    int64 // length of the last sleep, ns
	stream  stream
}

// stream notices frames that come from one side alone, a few at a time, which
// nobody is answering: a stream of datagrams. To be woken up for each costs more
// than to carry it, so the worker closes its eyes for a moment and takes those
// that have come by then together. What is answered, as requests and TCP are,
// is never kept waiting.
type stream struct {
	in      frame.PortID // where the last turns found frames
	turns   int          // how many of them in a row
	found   int          // frames since the last nap
	napping bool
	credit  int // of naps that found nothing worth it, how many are to be left out
	length  time.Duration
}

const (
	// streamTurns in a row from one side make a stream. A request with its answer
	// has one.
	streamTurns = 32
	// A nap should find this many frames, and lasts from minNap to maxNap.
	napFrames = 16
	minNap    = 20 * time.Microsecond
	maxNap    = 80 * time.Microsecond
	// napPause is how many sleeps are ordinary ones after a nap for nothing.
	napPause = 64
)

// saw notes a turn that found n frames, all from the port in unless there were
// others.
func (s *stream) saw(in frame.PortID, others bool, n int) {
	if in != s.in || others {
		*s = stream{in: in}
	}
	s.turns++
	s.found += n
}

// nap is how long to close the eyes before the next look, 0 for not at all.
func (s *stream) nap(mode PollMode) time.Duration {
	if s.turns < streamTurns || mode != PollAdaptive {
		return 0
	}
	if s.credit > 0 {
		s.credit--
		s.napping = false
		return 0
	}
	switch {
	case !s.napping:
		s.length = minNap
	case s.found < 2:
		s.credit, s.napping, s.found = napPause, false, 0
		return 0
	case s.found < napFrames:
		s.length = min(2*s.length, maxNap)
	case s.found > 2*napFrames:
		s.length = max(s.length/2, minNap)
	}
	s.napping, s.found = true, 0
	return s.length
}

// light says whether the next sleep is likely to be short, because the last
// one was.
func (s *sleeper) light() bool { return s.last < int64(lightSleep) }

// lightSleep is shorter than what the scheduler's monitor has to know of.
const lightSleep = time.Millisecond

// worked notes that a turn found frames.
func (s *sleeper) worked(now int64) { s.since = now }

// spinning reports whether to look again before sleeping.
func (s *sleeper) spinning(now int64) bool {
	switch s.mode {
	case PollAlways:
		return true
	case PollNever:
		return false
	}
	return now-s.since < s.budget
}

// slept notes the end of a sleep and sets the budget for the next one.
func (s *sleeper) slept(from, to int64) {
	s.since, s.last = to, to-from
	switch d := to - from; {
	case to < s.offTill:
		s.budget = 0
	case d < 2*int64(maxSpin):
		s.budget = s.limit
	default:
		s.budget = 0
	}
}

// Yielding comes back in a fraction of a microsecond where nobody else waits
// for the processor.
const (
	shortYield = int64(5 * time.Microsecond)
	spinPause  = int64(100 * time.Millisecond)
)

// yield lets others have the processor in the middle of spinning. If one took
// it, there is no spinning for a while: what waits may be the very thread that
// would send us something.
func (s *sleeper) yield() {
	if s.mode == PollAlways {
		return
	}
	from := Now()
	_, _, _ = unix.Syscall(unix.SYS_SCHED_YIELD, 0, 0, 0) // never fails
	s.yielded(from, Now())
}

func (s *sleeper) yielded(from, to int64) {
	if to-from > shortYield {
		s.budget, s.offTill = 0, to+spinPause
	}
}

// spinLimit is how long workers of this configuration may spin: not at all
// where a quota or a neighbour on the same processor pays for it.
func spinLimit(c Config) time.Duration {
	var set unix.CPUSet
	if unix.SchedGetaffinity(0, &set) == nil && set.Count() <= c.Workers {
		return 0
	}
	if quota := cpuQuota(); quota > 0 && quota <= float64(c.Workers) {
		return 0
	}
	return maxSpin
}

// cpuQuota is the number of processors that the cgroup allows, 0 if it sets
// no limit.
func cpuQuota() float64 {
	b, err := os.ReadFile("/sys/fs/cgroup/cpu.max")
	if err != nil {
		return 0
	}
	quota, period, _ := strings.Cut(strings.TrimSpace(string(b)), " ")
	q, err1 := strconv.ParseFloat(quota, 64)
	p, err2 := strconv.ParseFloat(period, 64)
	if err1 != nil || err2 != nil || p <= 0 {
		return 0 // "max" means no limit
	}
	return q / p
}
