package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// calls counts the system calls of each thread of a process by the kernel's
// tracepoint, one by one and not by samples. It costs a thread nothing while it
// makes none.
type calls struct{ threads []*threadCalls }

// threadCalls are those of one thread.
type threadCalls struct {
	tid        int
	all, kicks eventCount
	cpu        uint64 // nanoseconds that it had run when the count began
}

// eventCount is a counter of the kernel's.
type eventCount struct {
	f  *os.File
	at uint64 // when the count began
}

// called is what a thread did in a while.
type called struct {
	all   uint64
	kicks uint64 // of them, writes: nothing else writes where frames are moved
}

// tracepoint finds the tracepoint of all system calls.
var tracepoint = sync.OnceValues(func() (id uint64, err error) {
	for _, dir := range []string{"/sys/kernel/tracing", "/sys/kernel/debug/tracing"} {
		var b []byte
		if b, err = os.ReadFile(filepath.Join(dir, "events/raw_syscalls/sys_enter/id")); err == nil {
			return strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
		}
	}
	return 0, err
})

// callsCounted says why system calls cannot be counted here, or nil.
var callsCounted = sync.OnceValue(func() error {
	c, err := startCalls(os.Getpid())
	if err == nil {
		c.close()
	}
	return err
})

// startCalls begins to count. Threads that come later are not counted.
func startCalls(pid int) (c *calls, err error) {
	id, err := tracepoint()
	if err != nil {
		return nil, err
	}
	names, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil || len(names) == 0 {
		return nil, errors.Join(err, fmt.Errorf("no process %d", pid))
	}
	c = &calls{}
	for _, name := range names {
		tid, _ := strconv.Atoi(filepath.Base(name))
		t, err := newThreadCalls(tid, id)
		if errors.Is(err, unix.ESRCH) {
			continue // it has ended
		}
		if err != nil {
			c.close()
			return nil, err
		}
		c.threads = append(c.threads, t)
	}
	for _, t := range c.threads {
		if err := t.begin(); err != nil {
			c.close()
			return nil, err
		}
	}
	return c, nil
}

// stop returns what the thread did that has run for longest meanwhile, which is
// the one that moves frames.
func (c *calls) stop() (n called, err error) {
	longest := uint64(0)
	for _, t := range c.threads {
		got, ran, err := t.since()
		if err != nil {
			return n, err
		}
		if ran >= longest {
			n, longest = got, ran
		}
	}
	return n, nil
}

func (c *calls) close() {
	for _, t := range c.threads {
		t.close()
	}
}

func newThreadCalls(tid int, id uint64) (t *threadCalls, err error) {
	t = &threadCalls{tid: tid}
	if t.all, err = openCount(tid, id, ""); err != nil {
		return nil, err
	}
	if t.kicks, err = openCount(tid, id, fmt.Sprintf("id == %d", unix.SYS_WRITE)); err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

func (t *threadCalls) begin() (err error) {
	t.cpu = ranFor(t.tid)
	if t.all.at, err = t.all.read(); err == nil {
		t.kicks.at, err = t.kicks.read()
	}
	return err
}

// since returns what was counted since begin, and how many nanoseconds the
// thread ran, 0 if it has ended.
func (t *threadCalls) since() (n called, ran uint64, err error) {
	all, err := t.all.read()
	if err != nil {
		return n, 0, err
	}
	kicks, err := t.kicks.read()
	return called{all: all - t.all.at, kicks: kicks - t.kicks.at}, max(ranFor(t.tid), t.cpu) - t.cpu, err
}

func (t *threadCalls) close() {
	for _, c := range []eventCount{t.all, t.kicks} {
		if c.f != nil {
			c.f.Close()
		}
	}
}

// openCount counts the events of a tracepoint in a thread, or those of them that
// a filter lets pass.
func openCount(tid int, id uint64, filter string) (c eventCount, err error) {
	attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_TRACEPOINT, Size: unix.PERF_ATTR_SIZE_VER5, Config: id}
	fd, err := unix.PerfEventOpen(&attr, tid, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
	if err != nil {
		return c, os.NewSyscallError("perf_event_open", err)
	}
	c.f = os.NewFile(uintptr(fd), "counter")
	if filter != "" {
		if err := unix.IoctlSetString(fd, unix.PERF_EVENT_IOC_SET_FILTER, filter); err != nil {
			c.f.Close()
			return eventCount{}, os.NewSyscallError("filter of a counter", err)
		}
	}
	return c, nil
}

// read is how many there were so far.
func (c eventCount) read() (uint64, error) {
	var b [8]byte
	if _, err := io.ReadFull(c.f, b[:]); err != nil {
		return 0, fmt.Errorf("counter: %w", err)
	}
	return binary.NativeEndian.Uint64(b[:]), nil
}

// ranFor is how many nanoseconds a thread has run, 0 if there is none.
func ranFor(tid int) uint64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/schedstat", tid))
	if err != nil {
		return 0
	}
	first, _, _ := strings.Cut(string(b), " ")
	n, _ := strconv.ParseUint(first, 10, 64)
	return n
}
