package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// streamGuest is a guest without a hypervisor behind QEMU's stream framing: a
// tap in a namespace joined to a Unix socket by a goroutine on a thread of its
// own. The framing knows no offloads, so the guest leaves none to it.
type streamGuest struct {
	tap, conn int
	stopFd    int
	stop      atomic.Bool
	done      chan struct{}
	err       error // valid once done is closed

	out     []byte // frames on their way to the socket, each behind its length
	in      []byte // from the socket; in[:have] has been read
	have    int
	outRoom [streamBurst * (lengthLen + maxStreamFrame)]byte
}

const (
	lengthLen      = 4
	maxStreamFrame = frame.MaxLen
	// streamBurst is how many frames are written to the socket at once.
	streamBurst = 16
	streamRead  = 1 << 18
)

var errFraming = errors.New("the framing of the stream is lost")

// startStreamGuest makes eth0 in ns and connects it to a socket.
func startStreamGuest(ns *enginetest.NetNS, sock string) (*streamGuest, error) {
	g := &streamGuest{tap: -1, conn: -1, stopFd: -1, done: make(chan struct{}), in: make([]byte, streamRead)}
	err := ns.Do(func() (err error) {
		g.tap, err = openPlainTap("eth0")
		return err
	})
	if err == nil {
		err = ns.SetMAC("eth0", [6]byte(guestMAC))
	}
	if err == nil {
		g.conn, err = dialStream(sock)
	}
	if err == nil {
		g.stopFd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	}
	if err != nil {
		g.closeAll()
		return nil, fmt.Errorf("guest behind a stream: %w", err)
	}
	go g.run()
	return g, nil
}

// openPlainTap makes a tap without offloads in the namespace of this thread.
func openPlainTap(name string) (fd int, err error) {
	if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err != nil {
		return -1, err
	}
	ifr, err := unix.NewIfreq(name)
	if err == nil {
		ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
	}
	if err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("tap %s: %w", name, err)
	}
	return fd, nil
}

// dialStream connects to a socket that may not be there yet.
func dialStream(path string) (fd int, err error) {
	var c *net.UnixConn
	enginetest.Wait(5*time.Second, func() bool {
		c, err = net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		return err == nil
	})
	if err != nil {
		return -1, err
	}
	defer c.Close()
	f, err := c.File() // a duplicate, which Go's poller does not know
	if err != nil {
		return -1, err
	}
	defer f.Close()
	if fd, err = unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0); err != nil {
		return -1, os.NewSyscallError("dup", err)
	}
	return fd, unix.SetNonblock(fd, true)
}

func (g *streamGuest) run() {
	defer close(g.done)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ep, err := g.epoll()
	if err != nil {
		g.err = err
		return
	}
	defer unix.Close(ep)
	events := make([]unix.EpollEvent, 4)
	for !g.stop.Load() {
		sent, err := g.send()
		if err != nil {
			g.err = err
			return
		}
		got, err := g.receive()
		if err != nil {
			g.err = err
			return
		}
		if sent || got {
			continue
		}
		if _, err := unix.EpollWait(ep, events, -1); err != nil && err != unix.EINTR {
			g.err = err
			return
		}
	}
}

func (g *streamGuest) epoll() (ep int, err error) {
	if ep, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return -1, err
	}
	for _, fd := range []int{g.tap, g.conn, g.stopFd} {
		ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLET&0xffffffff, Fd: int32(fd)}
		if err := unix.EpollCtl(ep, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
			unix.Close(ep)
			return -1, err
		}
	}
	return ep, nil
}

// send reads frames from the tap and writes them to the socket.
func (g *streamGuest) send() (busy bool, err error) {
	if len(g.out) == 0 {
		if err := g.gather(); err != nil {
			return false, err
		}
	}
	for len(g.out) > 0 {
		n, err := unix.Write(g.conn, g.out)
		switch err {
		case nil:
			busy = true
			g.out = g.out[n:]
		case unix.EINTR:
		case unix.EAGAIN:
			return busy, nil
		default:
			return busy, fmt.Errorf("write to the stream: %w", err)
		}
	}
	return busy, nil
}

// gather reads what the tap has, up to a burst.
func (g *streamGuest) gather() error {
	at := 0
	for range streamBurst {
		n, err := unix.Read(g.tap, g.outRoom[at+lengthLen:at+lengthLen+maxStreamFrame])
		if err == unix.EAGAIN || err == unix.EIO { // the link is not up
			break
		}
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("read from the tap: %w", err)
		}
		binary.BigEndian.PutUint32(g.outRoom[at:], uint32(n))
		at += lengthLen + n
	}
	g.out = g.outRoom[:at]
	return nil
}

// receive reads from the socket and writes whole frames to the tap.
func (g *streamGuest) receive() (busy bool, err error) {
	n, err := unix.Read(g.conn, g.in[g.have:])
	switch {
	case err == unix.EAGAIN:
		return false, nil
	case err == unix.EINTR:
		return true, nil
	case err != nil:
		return false, fmt.Errorf("read from the stream: %w", err)
	case n == 0:
		return false, errors.New("the backend has closed the stream")
	}
	g.have += n
	used, err := splitStream(g.in[:g.have], func(f []byte) error {
		_, err := unix.Write(g.tap, f)
		if err == unix.EIO || err == unix.EINVAL || err == unix.ENOBUFS { // it drops this one
			err = nil
		}
		return err
	})
	g.have = copy(g.in, g.in[used:g.have])
	return true, err
}

// splitStream gives the whole frames in b away and returns how much of it they
// were.
func splitStream(b []byte, give func(frame []byte) error) (used int, err error) {
	for len(b)-used >= lengthLen {
		n := int(binary.BigEndian.Uint32(b[used:]))
		if n == 0 || n > maxStreamFrame {
			return used, fmt.Errorf("%w: a frame of %d bytes", errFraming, n)
		}
		end := used + lengthLen + n
		if end > len(b) {
			break
		}
		if err := give(b[used+lengthLen : end]); err != nil {
			return end, fmt.Errorf("write to the tap: %w", err)
		}
		used = end
	}
	return used, nil
}

// close ends the guest. It returns what ended it early, if anything did.
func (g *streamGuest) close() error {
	g.stop.Store(true)
	_, _ = unix.Write(g.stopFd, binary.NativeEndian.AppendUint64(nil, 1)) // a full counter wakes too
	<-g.done
	g.closeAll()
	return g.err
}

func (g *streamGuest) closeAll() {
	for _, fd := range []int{g.tap, g.conn, g.stopFd} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}
