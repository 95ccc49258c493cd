package main

import (
	"context"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// calls counts the system calls of a process by the kernel's tracepoint, which
// costs the process nothing while it makes none.
type calls struct {
	cmd *exec.Cmd
	out strings.Builder
}

// startCalls begins to count. Without perf, or without the right to it, stop
// returns NaN.
func startCalls(ctx context.Context, pid int) *calls {
	c := &calls{}
	c.cmd = exec.CommandContext(ctx, "perf", "stat", "-x", ",", "-e", "raw_syscalls:sys_enter", "-p", strconv.Itoa(pid))
	c.cmd.Stderr = &c.out
	if c.cmd.Start() != nil {
		c.cmd = nil
	}
	return c
}

// stop returns how many there were.
func (c *calls) stop() float64 {
	if c.cmd == nil {
		return nan
	}
	_ = c.cmd.Process.Signal(os.Interrupt)
	_ = c.cmd.Wait()
	return parseCalls(c.out.String())
}

// parseCalls reads what "perf stat -x ," wrote.
func parseCalls(s string) float64 {
	for line := range strings.Lines(s) {
		f := strings.Split(line, ",")
		if len(f) > 2 && f[2] == "raw_syscalls:sys_enter" {
			if n, err := strconv.ParseFloat(f[0], 64); err == nil {
				return n
			}
		}
	}
	return nan
}
