package vhosttest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// hdrLen is the length of a message header, maxFds the kernel's limit for the
// descriptors of one message.
const (
	hdrLen     = 12
	maxFds     = 253
	maxPayload = 1 << 16
)

// Frontend is the frontend's side of a connection. Its methods may be called
// by several goroutines; each exchange is whole.
type Frontend struct {
	// Wait limits each reply and each write.
	Wait time.Duration

	conn *net.UnixConn
	mu   sync.Mutex // guards the conversation on conn and ack
	ack  bool       // REPLY_ACK was negotiated

	logReply atomic.Bool // LOG_SHMFD was negotiated
}

// NewFrontend speaks on a connected socket, which it owns from then on.
func NewFrontend(c *net.UnixConn) *Frontend { return &Frontend{conn: c, Wait: 5 * time.Second} }

// Dial connects to a backend that listens, or will within wait.
func Dial(path string, wait time.Duration) (*Frontend, error) {
	end := time.Now().Add(wait)
	for {
		c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		if err == nil {
			f := NewFrontend(c)
			f.Wait = wait
			return f, nil
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("connect to backend: %w", err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// Listener waits for backends that dial.
type Listener struct{ l *net.UnixListener }

// Listen makes the socket that a backend dials.
func Listen(path string) (*Listener, error) {
	os.Remove(path)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	return &Listener{l}, nil
}

// Accept takes the next backend, for which it waits up to wait.
func (l *Listener) Accept(wait time.Duration) (*Frontend, error) {
	l.l.SetDeadline(time.Now().Add(wait))
	c, err := l.l.AcceptUnix()
	if err != nil {
		return nil, fmt.Errorf("wait for backend: %w", err)
	}
	f := NewFrontend(c)
	f.Wait = wait
	return f, nil
}

// Close removes the socket.
func (l *Listener) Close() error { return l.l.Close() }

// Close ends the connection.
func (f *Frontend) Close() error { return f.conn.Close() }

// SetReplyAck says whether messages ask for an acknowledgement, whatever was
// negotiated.
func (f *Frontend) SetReplyAck(on bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ack = on
}

// Closed waits until the backend has closed the connection and reports whether
// it has. What the backend still had to say is lost.
func (f *Frontend) Closed(wait time.Duration) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.conn.SetReadDeadline(time.Now().Add(wait))
	_, err := io.Copy(io.Discard, f.conn)
	return err == nil || !errors.Is(err, os.ErrDeadlineExceeded)
}

// SendBytes writes arbitrary bytes, with descriptors on the first of them.
func (f *Frontend) SendBytes(b []byte, fds ...int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.write(b, fds)
}

func (f *Frontend) write(b []byte, fds []int) error {
	f.conn.SetWriteDeadline(time.Now().Add(f.Wait))
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	n, _, err := f.conn.WriteMsgUnix(b, oob, nil)
	if err == nil && n < len(b) {
		_, err = f.conn.Write(b[n:])
	}
	return closedError(err)
}

// closedError makes the errors of a connection that is gone ErrClosed.
func closedError(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		return fmt.Errorf("%w: %w", ErrClosed, err)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return ErrTimeout
	}
	return err
}

// Encode is the message as it goes over the wire.
func (m Message) Encode() []byte {
	b := binary.NativeEndian.AppendUint32(nil, m.Request)
	b = binary.NativeEndian.AppendUint32(b, m.Flags)
	size := uint32(len(m.Payload))
	if m.Size != nil {
		size = *m.Size
	}
	return append(binary.NativeEndian.AppendUint32(b, size), m.Payload...)
}

// Send writes one message and waits for nothing.
func (f *Frontend) Send(m Message) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.write(m.Encode(), m.Fds)
}

// Receive reads one message, whose descriptors the caller closes.
func (f *Frontend) Receive() (Message, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return receive(f.conn, f.Wait)
}

func receive(c *net.UnixConn, wait time.Duration) (m Message, err error) {
	c.SetReadDeadline(time.Now().Add(wait))
	var hdr [hdrLen]byte
	oob := make([]byte, unix.CmsgSpace(4*maxFds))
	n, oobn, _, _, err := c.ReadMsgUnix(hdr[:], oob)
	if err == nil && n < hdrLen {
		_, err = io.ReadFull(c, hdr[n:])
	}
	if err != nil {
		return m, closedError(err)
	}
	if msgs, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil {
		for i := range msgs {
			fds, _ := unix.ParseUnixRights(&msgs[i])
			m.Fds = append(m.Fds, fds...)
		}
	}
	m.Request = binary.NativeEndian.Uint32(hdr[0:])
	m.Flags = binary.NativeEndian.Uint32(hdr[4:])
	size := binary.NativeEndian.Uint32(hdr[8:])
	if size > maxPayload {
		closeFds(m.Fds)
		return m, fmt.Errorf("reply to request %d has %d bytes", m.Request, size)
	}
	m.Payload = make([]byte, size)
	if _, err := io.ReadFull(c, m.Payload); err != nil {
		closeFds(m.Fds)
		return m, closedError(err)
	}
	return m, nil
}

func closeFds(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// Call sends a request and returns the reply to it.
func (f *Frontend) Call(request uint32, payload []byte, fds ...int) (Message, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	m, err := f.call(Message{Request: request, Flags: FlagVersion, Payload: payload, Fds: fds})
	if err != nil {
		return m, fmt.Errorf("request %d: %w", request, err)
	}
	return m, nil
}

func (f *Frontend) call(m Message) (Message, error) {
	if err := f.write(m.Encode(), m.Fds); err != nil {
		return Message{}, err
	}
	r, err := receive(f.conn, f.Wait)
	if err != nil {
		return r, err
	}
	if r.Request != m.Request || r.Flags&FlagReply == 0 || r.Flags&3 != FlagVersion {
		closeFds(r.Fds)
		return r, fmt.Errorf("answered with request %d, flags %#x", r.Request, r.Flags)
	}
	return r, nil
}

// AckError is a request that the backend refused.
type AckError struct {
	Request uint32
	Value   uint64
}

func (e *AckError) Error() string {
	return fmt.Sprintf("backend refused request %d with %d", e.Request, e.Value)
}

// Do sends a request that has no reply of its own. If REPLY_ACK was negotiated
// it waits for the acknowledgement, and one other than 0 is an *AckError.
func (f *Frontend) Do(request uint32, payload []byte, fds ...int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := Message{Request: request, Flags: FlagVersion, Payload: payload, Fds: fds}
	if !f.ack {
		return f.write(m.Encode(), m.Fds)
	}
	m.Flags |= FlagNeedReply
	r, err := f.call(m)
	if err != nil {
		return fmt.Errorf("request %d: %w", request, err)
	}
	closeFds(r.Fds)
	v, err := r.u64()
	if err == nil && v != 0 {
		err = &AckError{request, v}
	}
	return err
}

func (m Message) u64() (uint64, error) {
	if len(m.Payload) != 8 {
		return 0, fmt.Errorf("reply to request %d has %d bytes, not 8", m.Request, len(m.Payload))
	}
	return binary.NativeEndian.Uint64(m.Payload), nil
}

func (f *Frontend) callU64(request uint32, payload []byte, fds ...int) (uint64, error) {
	r, err := f.Call(request, payload, fds...)
	if err != nil {
		return 0, err
	}
	closeFds(r.Fds)
	return r.u64()
}
