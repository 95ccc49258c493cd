package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"time"

	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
)

// program is one that was started and not ended by us yet.
type program struct {
	cmd   *exec.Cmd
	out   *os.File // what it prints
	ended chan struct{}
	err   error // how it ended, valid then
}

func (a *agent) program(c *enginetest.GuestCmd, r *enginetest.GuestReply) error {
	ctx, cancel := context.WithTimeout(context.Background(), c.Timeout)
	defer cancel()
	b, err := exec.CommandContext(ctx, c.Path, c.Args...).CombinedOutput()
	r.Data = string(b)
	if ctx.Err() != nil {
		return fmt.Errorf("%s did not end within %v", c.Path, c.Timeout)
	}
	return exitStatus(err, r)
}

// exitStatus makes of how a program ended what is told of it.
func exitStatus(err error, r *enginetest.GuestReply) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		r.Status = exit.ExitCode()
		return nil
	}
	return err
}

func (a *agent) start(c *enginetest.GuestCmd, r *enginetest.GuestReply) error {
	out, err := os.CreateTemp("/tmp", "out")
	if err != nil {
		return err
	}
	p := &program{cmd: exec.Command(c.Path, c.Args...), out: out, ended: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = out, out
	if err := p.cmd.Start(); err != nil {
		return errors.Join(err, out.Close())
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.ended)
	}()
	r.Status, r.Data = p.cmd.Process.Pid, out.Name()
	a.mu.Lock()
	defer a.mu.Unlock()
	a.started[r.Status] = p
	return nil
}

func (a *agent) stop(c *enginetest.GuestCmd, r *enginetest.GuestReply) error {
	a.mu.Lock()
	p := a.started[c.N]
	delete(a.started, c.N)
	a.mu.Unlock()
	if p == nil {
		return fmt.Errorf("process %d was not started here", c.N)
	}
	how := unix.SIGTERM
	if c.Kind == "kill" {
		how = unix.SIGKILL
	}
	_ = p.cmd.Process.Signal(how) // it may have ended already
	select {
	case <-p.ended:
	case <-time.After(c.Timeout):
		_ = p.cmd.Process.Kill()
		return fmt.Errorf("process %d did not end within %v", c.N, c.Timeout)
	}
	defer p.out.Close()
	b, err := os.ReadFile(p.out.Name())
	if err != nil {
		return err
	}
	r.Data = string(b)
	return exitStatus(p.err, r)
}
