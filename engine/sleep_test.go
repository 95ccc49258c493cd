package engine

import (
	"runtime"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// A worker spins after a short sleep, not after a long one, and not for a
// while after somebody else wanted its processor.
func TestSpinningKnowsItsPlace(t *testing.T) {
	const us = 1000
	s := sleeper{limit: int64(maxSpin)}
	assert.False(t, s.spinning(0), "nothing is known yet")
	s.slept(0, 50*us)
	assert.True(t, s.spinning(60*us))
	assert.False(t, s.spinning(50*us+int64(maxSpin)), "only for so long")
	s.worked(100 * us)
	assert.True(t, s.spinning(110*us))
	s.yielded(110*us, 111*us)
	assert.True(t, s.spinning(112*us), "nobody took it")
	s.yielded(112*us, 200*us)
	assert.False(t, s.spinning(200*us), "somebody did")
	s.slept(200*us, 250*us)
	assert.False(t, s.spinning(251*us), "the pause lasts")
	later := 200*us + spinPause
	s.slept(later, later+50*us)
	assert.True(t, s.spinning(later+60*us))
	s.slept(later, later+10*int64(maxSpin))
	assert.False(t, s.spinning(later+10*int64(maxSpin)+us), "the sleep was long")
	quota := sleeper{}
	quota.slept(0, 50*us)
	assert.False(t, quota.spinning(60*us), "where it would be paid for")
	assert.True(t, (&sleeper{mode: PollAlways}).spinning(1<<60))
	assert.False(t, (&sleeper{mode: PollNever, budget: 1 << 60}).spinning(0))
}

// A worker stays on one thread, pinned where it was told.
func TestWorkerKeepsItsThread(t *testing.T) {
	e := newEngine(t, Config{Workers: 1, CPUs: []int{0}, Poll: PollNever})
	var mu sync.Mutex
	threads, cpus := map[int]bool{}, map[int]bool{}
	turns := 0
	in, err := e.AddPort("in", &sink{}, stageFunc(func(*frame.Batch) {
		mu.Lock()
		defer mu.Unlock()
		threads[unix.Gettid()] = true
		var set unix.CPUSet
		assert.NoError(t, unix.SchedGetaffinity(0, &set))
		cpus[set.Count()] = set.IsSet(0)
		turns++
		// Whoever is not locked to a thread moves on to another one here.
		for range 3 {
			runtime.Gosched()
		}
	}))
	require.NoError(t, err)
	q := &source{}
	e.AddQueue(in, q, 0)
	stop := make(chan struct{})
	defer close(stop)
	for range 2 * runtime.GOMAXPROCS(0) { // others who want the threads
		go func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
			}
		}()
	}
	for i := 1; i <= 15; i++ {
		q.left.Store(1)
		e.Worker(0).Wake()
		eventually(t, "a turn", func() bool { mu.Lock(); defer mu.Unlock(); return turns >= i })
	}
	mu.Lock()
	defer mu.Unlock()
	assert.Len(t, threads, 1)
	assert.Equal(t, map[int]bool{1: true}, cpus)
}

func TestStreamNaps(t *testing.T) {
	var s stream
	see := func(in frame.PortID, n int) { s.saw(in, false, n) }
	for range streamTurns - 1 {
		see(1, 1)
		assert.Zero(t, s.nap(PollAdaptive))
	}
	see(1, 1)
	assert.Zero(t, s.nap(PollNever))
	assert.Zero(t, s.nap(PollAlways))
	assert.Equal(t, minNap, s.nap(PollAdaptive))
	// Each nap finds a few: it grows, to a limit.
	for range 5 {
		see(1, 5)
		s.nap(PollAdaptive)
	}
	assert.Equal(t, maxNap, s.length)
	see(1, 3*napFrames)
	assert.Equal(t, maxNap/2, s.nap(PollAdaptive), "what comes must not overflow what it waits in")
	// One finds nothing that it was worth for: ordinary sleeps follow.
	see(1, 1)
	for range napPause + 1 {
		assert.Zero(t, s.nap(PollAdaptive))
		see(1, 1)
	}
	assert.Equal(t, minNap, s.nap(PollAdaptive))
	// An answer from the other side ends it at once.
	see(2, 1)
	assert.Zero(t, s.nap(PollAdaptive))
	for range 10 * streamTurns {
		see(1, 1)
		assert.Zero(t, s.nap(PollAdaptive))
		see(2, 1)
		assert.Zero(t, s.nap(PollAdaptive))
		s.saw(1, true, 9)
		assert.Zero(t, s.nap(PollAdaptive))
	}
}
