// Package enginetest is ports in memory, frame builders, and network
// namespaces for tests.
//
// It imports no testing package, so that programs which build a small world of
// their own may use its namespaces: those functions return errors, and the
// ones that take a [TB] fail the test instead. Whatever is made for a TB is
// taken down by its Cleanup.
package enginetest

import "time"

// TB is the part of testing.TB that the helpers use.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
	Skipf(format string, args ...any)
	Logf(format string, args ...any)
	Cleanup(func())
	Name() string
}

// pollEvery is how often Eventually looks.
const pollEvery = time.Millisecond

// Eventually waits until cond is true and fails the test after d. cond runs on
// the caller's goroutine.
func Eventually(t TB, d time.Duration, cond func() bool) {
	t.Helper()
	if !Wait(d, cond) {
		t.Fatalf("condition still false after %v", d)
	}
}

// Wait waits until cond is true and reports whether it became so within d.
func Wait(d time.Duration, cond func() bool) bool {
	end := time.Now().Add(d)
	for !cond() {
		if time.Now().After(end) {
			return false
		}
		time.Sleep(pollEvery)
	}
	return true
}
