package vhostuser

import (
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"sidewire/engine/frame"
)

// What is wrong with a message or a peer. Errors wrap one of these.
var (
	// ErrProtocol: the byte stream can no longer be followed; the connection
	// ends.
	ErrProtocol = errors.New("protocol violated")
	// ErrRefused: the request is refused, everything stays as it was.
	ErrRefused = errors.New("refused")
	// ErrFault: the frontend took memory away that it had shared.
	ErrFault = errors.New("shared memory is gone")
	// ErrBusy: the device has a frontend already.
	ErrBusy = errors.New("a frontend is connected")
	// ErrClosed: the device was closed.
	ErrClosed = errors.New("device closed")
)

// session is one connection of a frontend. What was negotiated on it is in the
// Device, guarded by its mu.
type session struct {
	dev  *Device
	conn *conn
	done chan struct{} // closed when run has ended
	msg  message

	silence *time.Timer // see expectBuffers; guarded by Device.mu like the next
	silent  bool        // the guest could not be seen
}

// run serves the connection until it ends or moves.
func (s *session) run() {
	defer close(s.done)
	err := s.serve()
	d := s.dev
	d.mu.Lock()
	defer d.mu.Unlock()
	if errors.Is(err, errMoved) {
		return // whoever interrupted goes on with it
	}
	_ = s.conn.uc.Close()
	d.endSession(s)
	if errors.Is(err, io.EOF) || d.link.parked && errors.Is(err, net.ErrClosed) {
		err = nil
	}
	if err != nil {
		d.protocolErrors.Add(1)
		d.complain("frontend's connection ended", "err", err)
	}
	d.goings.log(d.log.Info, "frontend disconnected")
}

// serve handles one message after the other.
func (s *session) serve() error {
	m := &s.msg
	for {
		err := s.conn.read(m)
		if err == nil {
			err = s.handle(m)
		}
		m.close()
		if err != nil {
			return err
		}
	}
}

// handle runs the handler of m and sends the one reply that m is due.
func (s *session) handle(m *message) error {
	sp := lookup(m.req)
	err := s.dispatch(sp, m)
	if err != nil && errors.Is(err, ErrProtocol) {
		return err
	}
	d := s.dev
	d.messages.Add(1)
	if err != nil {
		d.refused.Add(1)
		d.mu.Lock()
		d.complain("request refused", "request", m.req.String(), "err", err)
		d.mu.Unlock()
	}
	wantsAck := m.flags&flagNeedReply != 0 && d.proto&protoReplyAck != 0
	switch {
	case m.done:
	case sp.replies && err == nil:
		return nil // the handler knows that none is due
	case sp.replies, wantsAck:
		m.replyU64(0)
		if err != nil {
			m.replyU64(1)
		}
	default:
		return nil
	}
	return s.conn.reply(m)
}

// dispatch runs the handler with the device locked. A fault in memory that the
// frontend took away meanwhile stops the rings, as it does on a worker.
func (s *session) dispatch(sp *spec, m *message) (err error) {
	d := s.dev
	d.mu.Lock()
	defer d.mu.Unlock()
	defer d.asks()
	defer func() {
		if r := recover(); r != nil {
			if addr, ok := frame.FaultAddr(r); !ok || !d.Fault(addr) {
				panic(r)
			}
			err = fmt.Errorf("%w: %w", ErrRefused, ErrFault)
		}
	}()
	if m.size < sp.min {
		return fmt.Errorf("%w: %d bytes of payload, want %d", ErrRefused, m.size, sp.min)
	}
	return sp.handle(s, m)
}

// ignore is for requests without effect.
func (s *session) ignore(*message) error { return nil }

// refuse is for requests that are not served.
func (s *session) refuse(m *message) error {
	return fmt.Errorf("%w: not supported", ErrRefused)
}
