package engine

import (
	"testing"

	"github.com/stretchr/testify/assert"
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
