package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// proc is a program that is driven by lines on its standard input.
type proc struct {
	name string
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *transcript
	done chan struct{}
}

// transcript is what a program has written so far.
type transcript struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	more chan struct{} // closed, and made anew, when something was added
}

func (t *transcript) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf.Write(p)
	close(t.more)
	t.more = make(chan struct{})
	return len(p), nil
}

// from returns what was written from offset on and a channel that tells of more.
func (t *transcript) from(offset int) (string, <-chan struct{}) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.buf.Bytes()[offset:]), t.more
}

func (t *transcript) len() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.buf.Len()
}

// procOptions say where a program runs.
type procOptions struct {
	env []string
	// undisturbed asks for as much of the processor as others leave alone at
	// most; it is for programs that poll.
	undisturbed bool
	netns       string // name of it, "" for the own one
}

// startProc starts a program in a session of its own.
func startProc(ctx context.Context, o procOptions, name string, argv ...string) (*proc, error) {
	if o.netns != "" {
		argv = append([]string{"ip", "netns", "exec", o.netns}, argv...)
	}
	p := &proc{name: name, cmd: exec.CommandContext(ctx, argv[0], argv[1:]...), out: &transcript{more: make(chan struct{})}, done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), o.env...)
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	p.cmd.WaitDelay = 2 * time.Second
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	var err error
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	go func() {
		_ = p.cmd.Wait()
		close(p.done)
	}()
	if o.undisturbed {
		p.prefer()
	}
	return p, nil
}

// prefer asks the scheduler to let the process have its processor. It is in a
// session of its own, so that its niceness counts only within its autogroup,
// which has a niceness too. Without the right to it, it runs as it is.
func (p *proc) prefer() { _ = setNice(p.pid(), mostPreferred) }

const mostPreferred = -20

func setNice(pid, nice int) error {
	return errors.Join(unix.Setpriority(unix.PRIO_PROCESS, pid, nice),
		os.WriteFile(fmt.Sprintf("/proc/%d/autogroup", pid), []byte(strconv.Itoa(nice)), 0))
}

// preferSelf does the same for the harness, which plays the guests of the
// streams, and for its session. It returns what puts it back.
func preferSelf() (putBack func()) {
	if setNice(os.Getpid(), mostPreferred) != nil {
		return func() {}
	}
	return func() { _ = setNice(os.Getpid(), 0) }
}

func (p *proc) pid() int { return p.cmd.Process.Pid }

// say writes a line to the program.
func (p *proc) say(format string, args ...any) error {
	_, err := fmt.Fprintf(p.in, format+"\n", args...)
	if err != nil {
		return fmt.Errorf("%s: %w: %s", p.name, err, p.tail())
	}
	return nil
}

// expect waits until the program has written what, looking from offset on, and
// returns what it wrote from there.
func (p *proc) expect(offset int, what string, timeout time.Duration) (string, error) {
	deadline := time.NewTimer(timeout)
	defer deadline.Stop()
	for {
		s, more := p.out.from(offset)
		if strings.Contains(s, what) {
			return s, nil
		}
		select {
		case <-more:
		case <-p.done:
			return s, fmt.Errorf("%s ended while %q was expected: %s", p.name, what, p.tail())
		case <-deadline.C:
			return s, fmt.Errorf("%s did not say %q in %v: %s", p.name, what, timeout, p.tail())
		}
	}
}

// ask writes a line and waits for what, which the answer ends with.
func (p *proc) ask(line, what string) (string, error) {
	at := p.out.len()
	if err := p.say("%s", line); err != nil {
		return "", err
	}
	return p.expect(at, what, 20*time.Second)
}

// tail is the end of what the program wrote, for messages.
func (p *proc) tail() string {
	s, _ := p.out.from(0)
	return strings.TrimSpace(s[max(0, len(s)-600):])
}

// kill ends the program at once.
func (p *proc) kill() error {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("%s: %w", p.name, err)
	}
	<-p.done
	return nil
}

// stop asks the program to end, and makes it end if it does not.
func (p *proc) stop() error {
	_ = p.in.Close()
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return nil
	case <-time.After(5 * time.Second):
		return p.kill()
	}
}
