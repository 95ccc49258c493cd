package dns

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const (
	// pipeBuffer is what a connection has for each direction.
	pipeBuffer = 4 << 10
	// lengthLen is the length of a message's length before it (RFC 1035 section
	// 4.2.2).
	lengthLen = 2
)

// serveTCP accepts connections until the listener is closed.
func (s *Server) serveTCP(ctx context.Context, l *net.TCPListener, wg *sync.WaitGroup) {
	for {
		c, err := l.AcceptTCP()
		if err != nil {
			if troubled(ctx, err) {
				continue
			}
			return
		}
		if from, err := netip.ParseAddrPort(c.RemoteAddr().String()); err != nil || !s.c.Allow.Contains(from.Addr().Unmap()) {
			s.stats.refused.Add(1)
			c.Close()
			continue
		}
		select {
		case s.conns <- struct{}{}:
		default:
			s.stats.connOverflow.Add(1)
			_ = c.SetLinger(0) // a reset: the client knows at once
			c.Close()
			continue
		}
		s.stats.conns.Add(1)
		wg.Go(func() {
			defer func() { <-s.conns }()
			defer c.Close()
			defer context.AfterFunc(ctx, func() { c.Close() })()
			if s.knows() {
				s.joinByMessage(ctx, c)
			} else {
				s.join(ctx, c)
			}
		})
	}
}

// join joins a guest's connection to a resolver. Nobody is called before the
// guest has asked something.
func (s *Server) join(ctx context.Context, guest *net.TCPConn) {
	first, err := s.firstMessage(guest)
	if err != nil {
		return
	}
	up, head := s.call(ctx, first)
	if up == nil {
		s.stats.connFailures.Add(1)
		_ = guest.SetLinger(0)
		return
	}
	defer up.Close()
	defer context.AfterFunc(ctx, func() { up.Close() })()
	alive := func() {
		at := time.Now().Add(s.c.Idle)
		_ = guest.SetDeadline(at)
		_ = up.SetDeadline(at)
	}
	alive()
	if _, err := guest.Write(head); err != nil {
		return
	}
	b := make([]byte, 2*pipeBuffer)
	var wg sync.WaitGroup
	wg.Go(func() { pipe(up, guest, b[:pipeBuffer], alive) })
	pipe(guest, up, b[pipeBuffer:], alive)
	// What the resolver has ended is over for the guest too.
	guest.Close()
	up.Close()
	wg.Wait()
}

// firstMessage reads until a message is whole, with what has come behind it.
func (s *Server) firstMessage(guest net.Conn) ([]byte, error) {
	b := make([]byte, 0, pipeBuffer)
	for len(b) < lengthLen || len(b) < lengthLen+int(binary.BigEndian.Uint16(b)) {
		_ = guest.SetDeadline(time.Now().Add(s.c.Idle))
		b = slices.Grow(b, 1)
		n, err := guest.Read(b[len(b):cap(b)])
		if b = b[:len(b)+n]; err != nil {
			return nil, err
		}
	}
	return b, nil
}

// call writes a connection's first message to resolvers until one does not
// decline. It returns the connection to that one, or else to the first of the
// others, with what it has read of the answer; nil if there is none. Where only
// one is left that may answer, nothing is read.
func (s *Server) call(ctx context.Context, first []byte) (up net.Conn, head []byte) {
	s.try(ctx, func(addr string, last bool) outcome {
		ctx, cancel := context.WithTimeout(ctx, s.c.Timeout)
		defer cancel()
		c, err := s.c.Dial(ctx, "tcp", addr)
		if err != nil {
			return silent
		}
		h, how := s.send(ctx, c, first, !last || up != nil)
		switch {
		case how == silent, how == declined && up != nil:
			c.Close()
			return how
		case up != nil:
			up.Close()
		}
		up, head = c, h
		return how
	})
	return up, head
}

// send writes a first message to a resolver. If it is to look, it waits for
// the head of an answer, which it returns.
func (s *Server) send(ctx context.Context, c net.Conn, first []byte, look bool) ([]byte, outcome) {
	defer context.AfterFunc(ctx, func() { c.Close() })()
	_ = c.SetDeadline(time.Now().Add(s.c.Timeout))
	if _, err := c.Write(first); err != nil {
		return nil, silent
	}
	if !look {
		return nil, answered
	}
	head := make([]byte, lengthLen+headerLen)
	if _, err := io.ReadFull(c, head); err != nil {
		return nil, silent
	}
	// Of several queries another's answer may come first.
	if bytes.HasPrefix(first[lengthLen:], head[lengthLen:lengthLen+2]) && declines(head[lengthLen:]) {
		return head, declined
	}
	return head, answered
}

// pipe copies until the end, which it passes on.
func pipe(to, from net.Conn, b []byte, alive func()) {
	for {
		n, err := from.Read(b)
		if n > 0 {
			alive()
			if _, err := to.Write(b[:n]); err != nil {
				break
			}
		}
		if err != nil {
			break
		}
	}
	if c, ok := to.(interface{ CloseWrite() error }); ok {
		_ = c.CloseWrite()
	}
}
