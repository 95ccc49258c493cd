package dns

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"
)

// pipeBuffer is what a connection has for each direction.
const pipeBuffer = 4 << 10

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
			s.join(ctx, c)
		})
	}
}

// join joins a guest's connection to a resolver. Nobody is called before the
// guest has said something.
func (s *Server) join(ctx context.Context, guest *net.TCPConn) {
	b := make([]byte, 2*pipeBuffer)
	_ = guest.SetDeadline(time.Now().Add(s.c.Idle))
	n, err := guest.Read(b[:pipeBuffer])
	if err != nil {
		return
	}
	var up net.Conn
	if !s.try(ctx, func(addr string) bool {
		ctx, cancel := context.WithTimeout(ctx, s.c.Timeout)
		defer cancel()
		up, err = s.c.Dial(ctx, "tcp", addr)
		return err == nil
	}) {
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
	if _, err := up.Write(b[:n]); err != nil {
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { pipe(up, guest, b[:pipeBuffer], alive) })
	pipe(guest, up, b[pipeBuffer:], alive)
	// What the resolver has ended is over for the guest too.
	guest.Close()
	up.Close()
	wg.Wait()
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
