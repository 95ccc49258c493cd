package main

import (
	"math"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// distance is how many nanoseconds a cache line takes from the backend's
// processor to the frontend's: what a frame in a ring waits for at least. On a
// virtual machine it changes when the host moves a processor to another die,
// and most figures with it.
//
// It is the best of many short games: others that want a processor spoil most
// of them, and perhaps all, when it is NaN.
func distance() float64 {
	const games, turns = 200, 100
	deadline := time.Now().Add(distanceTime)
	var ball atomic.Uint32
	done := make(chan float64)
	turn := func(mine uint32) bool {
		for n := 1; ball.Load() != mine; n++ {
			if n%4096 == 0 && time.Now().After(deadline) {
				return false
			}
		}
		ball.Store(1 - mine)
		return true
	}
	play := func(cpu int, mine uint32) {
		runtime.LockOSThread() // the thread ends with its affinity
		var set unix.CPUSet
		set.Set(cpu)
		_ = unix.SchedSetaffinity(0, &set) // if it cannot, it is another pair that is measured
		best := math.Inf(1)
		defer func() { done <- best }()
		for range games {
			began := time.Now()
			for range turns {
				if !turn(mine) {
					return
				}
			}
			best = min(best, float64(time.Since(began).Nanoseconds())/(2*turns))
		}
	}
	go play(backendCPU, 0)
	go play(frontendCPU, 1)
	if best := min(<-done, <-done); !math.IsInf(best, 1) {
		return best
	}
	return nan
}

// distanceTime is ten times as long as it takes where nobody disturbs.
const distanceTime = 50 * time.Millisecond
