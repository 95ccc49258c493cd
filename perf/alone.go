package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// alone waits until no other harness measures on this machine, and keeps others
// from it until leave is called, or this process ends.
func alone(ctx context.Context) (leave func(), err error) {
	f, err := os.OpenFile(filepath.Join(os.TempDir(), "sidewire-perf.lock"), os.O_CREATE|os.O_RDWR, 0o666)
	if err != nil {
		return nil, err
	}
	told := false
	for unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		if !told {
			fmt.Fprintln(os.Stderr, "perf: waiting for another harness on this machine")
			told = true
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
	return func() { f.Close() }, nil
}
