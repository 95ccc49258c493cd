package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxPath is the longest path that a socket address holds.
const maxPath = 107

// Dialling begins again after retryMin, and waits twice as long each time up
// to retryMax: a frontend that starts is met at once, one that is gone costs
// nothing.
const (
	retryMin = 5 * time.Millisecond
	retryMax = time.Second
)

// Listen makes the socket, so that a frontend may connect from now on. Serve
// does it if nobody did before. It does nothing in client mode.
func (d *Device) Listen() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.closed:
		return ErrClosed
	case d.cfg.Client || d.ln != nil:
		return nil
	}
	ln, err := listen(d.cfg.Path, d.cfg.SocketMode)
	if err != nil {
		return fmt.Errorf("device %s: %w", d.cfg.Name, err)
	}
	d.ln = ln
	return nil
}

// Serve takes frontends one after the other until ctx ends or the device is
// closed, and returns nil then. The connection is served by goroutines of the
// device and stays when Serve returns; Close ends it.
func (d *Device) Serve(ctx context.Context) error {
	var err error
	if d.cfg.Client {
		err = d.dialAll(ctx)
	} else {
		err = d.acceptAll(ctx)
	}
	if ctx.Err() != nil || errors.Is(err, ErrClosed) {
		return nil
	}
	return err
}

func (d *Device) acceptAll(ctx context.Context) error {
	for {
		if err := d.waitUnparked(ctx); err != nil {
			return err
		}
		if err := d.Listen(); err != nil {
			return err
		}
		d.mu.Lock()
		ln := d.ln
		d.mu.Unlock()
		if ln == nil {
			continue // parked or closed by now
		}
		if err := d.acceptFrom(ctx, ln); err != nil {
			return err
		}
	}
}

// acceptFrom takes frontends until the listener is closed or ctx ends.
func (d *Device) acceptFrom(ctx context.Context, ln *net.UnixListener) error {
	defer context.AfterFunc(ctx, func() { _ = ln.SetDeadline(time.Unix(1, 0)) })()
	for {
		uc, err := ln.AcceptUnix()
		switch {
		case err == nil:
			d.take(uc)
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, net.ErrClosed):
			return nil
		default:
			// Out of descriptors, most likely: others may give some back.
			d.mu.Lock()
			d.complain("cannot accept", "err", err)
			d.mu.Unlock()
			if !pause(ctx, retryMin) {
				return ctx.Err()
			}
		}
	}
}

// take begins a session with a frontend, or turns it away.
func (d *Device) take(uc *net.UnixConn) *session {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.begin(uc); err != nil {
		_ = uc.Close()
		d.complain("frontend turned away", "err", err)
		return nil
	}
	return d.ses
}

func (d *Device) dialAll(ctx context.Context) error {
	wait := retryMin
	for {
		if err := d.waitUnparked(ctx); err != nil {
			return err
		}
		if s := d.current(); s != nil { // ours, or one that was imported
			select {
			case <-s.done:
			case <-ctx.Done():
				return ctx.Err()
			}
			wait = retryMin
			continue
		}
		d.mu.Lock()
		closed, moved := d.closed, d.moved
		d.mu.Unlock()
		if closed {
			return ErrClosed
		}
		var dialer net.Dialer
		if !moved {
			if c, err := dialer.DialContext(ctx, "unix", d.cfg.Path); err == nil {
				d.take(c.(*net.UnixConn))
			}
		}
		if !pause(ctx, wait) {
			return ctx.Err()
		}
		wait = min(2*wait, retryMax)
	}
}

// current returns the session that is served, or nil.
func (d *Device) current() *session {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.ses
}

// pause waits, and reports false if ctx ended meanwhile.
func pause(ctx context.Context, t time.Duration) bool {
	select {
	case <-time.After(t):
		return true
	case <-ctx.Done():
		return false
	}
}

// listen makes a socket at path. A socket that is there already goes away if
// nobody answers on it; anything else there is an error.
func listen(path string, mode os.FileMode) (*net.UnixListener, error) {
	if len(path) > maxPath {
		return nil, fmt.Errorf("socket path of %d bytes is too long, at most %d: %s", len(path), maxPath, path)
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		// bind gives the file the mode of the socket's inode, so at no moment
		// is it more open than it shall be (net/unix/af_unix.c).
		var err error
		if e := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), uint32(mode.Perm())) }); e != nil {
			return e
		}
		return err
	}}
	ln, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	// The umask may have taken away what shall be there.
	if err := os.Chmod(path, mode.Perm()); err != nil {
		_ = ln.Close()
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return ln.(*net.UnixListener), nil
}

func removeStale(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("%s exists and is no socket", path)
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		_ = c.Close()
		return fmt.Errorf("%s is in use by another program", path)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("%s exists: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
