package main

import (
	"os"
	"runtime"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// Every system call of a thread is counted, and those of no other.
func TestCallsAreCounted(t *testing.T) {
	if err := callsCounted(); err != nil {
		t.Skipf("the kernel does not let us count system calls: %v", err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	id, err := tracepoint()
	require.NoError(t, err)
	c, err := newThreadCalls(unix.Gettid(), id)
	require.NoError(t, err)
	defer c.close()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	require.NoError(t, err)
	defer null.Close()

	require.NoError(t, c.begin())
	for range 1000 {
		unix.Getppid()
	}
	for range 10 {
		_, err := unix.Write(int(null.Fd()), []byte{0})
		require.NoError(t, err)
	}
	n, _, err := c.since()
	require.NoError(t, err)
	assert.EqualValues(t, 10, n.kicks)
	assert.GreaterOrEqual(t, n.all, uint64(1010))
	assert.Less(t, n.all, uint64(1100), "what reading the counters takes, and signals")
}

// Of a process that thread counts which has run for longest.
func TestCallsOfTheBusiestThread(t *testing.T) {
	if err := callsCounted(); err != nil {
		t.Skipf("the kernel does not let us count system calls: %v", err)
	}
	stop, running, ended := make(chan struct{}), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		runtime.LockOSThread() // the thread ends with the goroutine
		close(running)
		for {
			select {
			case <-stop:
				return
			default:
				unix.Getppid()
			}
		}
	}()
	<-running
	c, err := startCalls(os.Getpid())
	require.NoError(t, err)
	defer c.close()
	n := called{}
	for range 1000 {
		for range 1000 {
			runtime.Gosched()
		}
		n, err = c.stop()
		require.NoError(t, err)
		if n.all > 1000 && n.kicks == 0 {
			break
		}
	}
	close(stop)
	<-ended
	assert.Greater(t, n.all, uint64(1000))
	assert.Zero(t, n.kicks)
}

func TestCallsOfNobody(t *testing.T) {
	if err := callsCounted(); err != nil {
		t.Skipf("the kernel does not let us count system calls: %v", err)
	}
	_, err := startCalls(1 << 30)
	assert.ErrorContains(t, err, "no process")
}
