package vhostuser

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// replyTimeout is how long a frontend may leave its socket full (H017), less
// in tests.
var replyTimeout = 5 * time.Second

// bodyTimeout is how long a message may take to its end when the session is
// about to move.
const bodyTimeout = time.Second

// conn is the socket of a session. It is read by the session's goroutine
// alone; interrupt may be called by others.
type conn struct {
	uc    *net.UnixConn
	raw   syscall.RawConn
	stop  atomic.Bool // leave at the next message boundary
	grace bool        // a message was let through after stop
	head  [headerLen]byte
	body  [maxPayload]byte
	oob   [4096]byte
	fds   [maxFDs]int
	out   [headerLen + configLen + configSpace]byte
}

// oobLen is the control space for as many descriptors as one message can have.
var oobLen = unix.CmsgSpace(maxFDs * 4)

func newConn(uc *net.UnixConn) (*conn, error) {
	raw, err := uc.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("connection: %w", err)
	}
	return &conn{uc: uc, raw: raw}, nil
}

// errMoved is returned by read at the boundary where interrupt stopped it.
var errMoved = errors.New("session moves")

// interrupt lets read return errMoved before it begins with another message.
func (c *conn) interrupt() {
	c.stop.Store(true)
	_ = c.uc.SetReadDeadline(time.Unix(1, 0))
}

// resume undoes interrupt after read has returned.
func (c *conn) resume() {
	c.stop.Store(false)
	c.grace = false
	_ = c.uc.SetReadDeadline(time.Time{})
}

// wait returns when a byte or the end is there to be read. It reads nothing,
// so it can be interrupted without losing anything.
func (c *conn) wait() error {
	var peek [1]byte
	err := c.raw.Read(func(fd uintptr) bool {
		_, _, err := unix.Recvfrom(int(fd), peek[:], unix.MSG_PEEK|unix.MSG_DONTWAIT)
		return err != unix.EAGAIN && err != unix.EINTR
	})
	if c.stop.Load() {
		return errMoved
	}
	return err
}

// read reads the next message into m, in as many pieces as it comes in (H003).
// Whatever it returns, descriptors that came are in m.
func (c *conn) read(m *message) error {
	m.fds, m.n, m.done = c.fds[:0], 0, false
	if err := c.wait(); err != nil {
		return err
	}
	for n := 0; n < headerLen; {
		k, oobn, flags, _, err := c.uc.ReadMsgUnix(c.head[n:], c.oob[:oobLen])
		if oobn > 0 {
			if err := c.takeFDs(m, c.oob[:oobn]); err != nil {
				return err
			}
		}
		switch {
		case flags&unix.MSG_CTRUNC != 0:
			return fmt.Errorf("%w: more descriptors than one message can have", ErrProtocol)
		case err != nil:
			if err = c.retry(err, n); err != nil {
				return err
			}
		case k == 0:
			return io.ErrUnexpectedEOF
		}
		n += k
	}
	if err := m.decodeHeader(c.head[:]); err != nil {
		return err
	}
	// A plain read closes what descriptors come with the payload.
	for n := 0; n < int(m.size); {
		k, err := c.uc.Read(c.body[n:m.size])
		if err != nil {
			if err = c.retry(err, headerLen+n); err != nil {
				return err
			}
		}
		n += k
	}
	m.data = c.body[:m.size]
	return nil
}

// retry decides about a read error after n bytes of a message: an interrupt
// lets the message end first.
func (c *conn) retry(err error, n int) error {
	if !c.grace && c.stop.Load() && errors.Is(err, os.ErrDeadlineExceeded) {
		c.grace = true
		return c.uc.SetReadDeadline(time.Now().Add(bodyTimeout))
	}
	if n > 0 && errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// takeFDs adds the descriptors in a control message to m.
func (c *conn) takeFDs(m *message, oob []byte) error {
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return fmt.Errorf("%w: control message: %w", ErrProtocol, err)
	}
	for i := range cmsgs {
		fds, err := unix.ParseUnixRights(&cmsgs[i])
		if err != nil {
			continue // credentials or the like
		}
		for _, fd := range fds {
			if len(m.fds) == maxFDs {
				closeFD(fd)
				continue
			}
			m.fds = append(m.fds, fd)
		}
	}
	return nil
}

// reply sends the reply that was composed in m.
func (c *conn) reply(m *message) error {
	m.encodeReply(c.out[:])
	n := headerLen + copy(c.out[headerLen:], m.reply[:m.n])
	if err := c.uc.SetWriteDeadline(time.Now().Add(replyTimeout)); err != nil {
		return fmt.Errorf("reply to %v: %w", m.req, err)
	}
	if _, err := c.uc.Write(c.out[:n]); err != nil {
		return fmt.Errorf("reply to %v: %w", m.req, err)
	}
	return nil
}
