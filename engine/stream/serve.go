package stream

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
// to retryMax: a QEMU that starts is met at once, one that is gone costs
// nothing.
const (
	retryMin = 5 * time.Millisecond
	retryMax = time.Second
)

// Listen makes the socket, so that QEMU may connect from now on. Serve does it
// if nobody did before. It does nothing in client mode.
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

// Serve takes QEMUs one after the other until ctx ends or the device is
// closed, and returns nil then. The connection stays when Serve returns; Close
// ends it.
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
	if err := d.Listen(); err != nil {
		return err
	}
	d.mu.Lock()
	ln := d.ln
	d.mu.Unlock()
	if ln == nil {
		return ErrClosed
	}
	defer context.AfterFunc(ctx, func() { _ = ln.SetDeadline(time.Unix(1, 0)) })()
	for {
		uc, err := ln.AcceptUnix()
		switch {
		case err == nil:
			d.take(uc)
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, net.ErrClosed):
			return ErrClosed
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

// take makes uc the device's connection and returns it, or turns QEMU away.
func (d *Device) take(uc *net.UnixConn) *conn {
	fd, err := detach(uc)
	d.mu.Lock()
	defer d.mu.Unlock()
	var c *conn
	if err == nil {
		c, err = d.begin(fd)
	}
	if err != nil {
		d.complain("QEMU turned away", "err", err)
	}
	return c
}

// detach closes uc and returns its socket, which Go's poller has no part in
// any more: it would wake up for every frame.
func detach(uc *net.UnixConn) (fd int, err error) {
	defer uc.Close()
	raw, err := uc.SyscallConn()
	if err != nil {
		return -1, fmt.Errorf("connection: %w", err)
	}
	if e := raw.Control(func(s uintptr) { fd, err = unix.FcntlInt(s, unix.F_DUPFD_CLOEXEC, 0) }); e != nil {
		err = e
	}
	if err != nil {
		return -1, fmt.Errorf("connection: %w", err)
	}
	return fd, nil
}

func (d *Device) dialAll(ctx context.Context) error {
	wait := retryMin
	for {
		d.mu.Lock()
		closed, c := d.closed, d.conn
		d.mu.Unlock()
		if closed {
			return ErrClosed
		}
		if c != nil {
			select {
			case <-c.done:
			case <-ctx.Done():
				return ctx.Err()
			}
			wait = retryMin
			continue
		}
		var dialer net.Dialer
		if uc, err := dialer.DialContext(ctx, "unix", d.cfg.Path); err == nil {
			d.take(uc.(*net.UnixConn))
		}
		if !pause(ctx, wait) {
			return ctx.Err()
		}
		wait = min(2*wait, retryMax)
	}
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

// removeStale removes the socket of a server that is dead.
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
