package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"sidewire/engine/enginetest"
)

var bg = context.Background()

// server is an open port of the guest.
type server struct {
	close func() error

	mu    sync.Mutex // guards peers
	peers []string
}

// maxPeers bounds what a server remembers.
const maxPeers = 1000

func (s *server) seen(peer net.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.peers) < maxPeers {
		s.peers = append(s.peers, peer.String())
	}
}

func (a *agent) listen(c *enginetest.GuestCmd, r *enginetest.GuestReply) error {
	s := &server{}
	addr := net.JoinHostPort(c.Host, strconv.Itoa(c.Port))
	if c.Kind == "udp" {
		pc, err := net.ListenPacket("udp", addr)
		if err != nil {
			return err
		}
		s.close, r.Local = pc.Close, pc.LocalAddr().String()
		go s.echoUDP(pc)
	} else {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return err
		}
		s.close, r.Local = l.Close, l.Addr().String()
		switch c.Kind {
		case "http":
			srv := &http.Server{Handler: enginetest.Handler(), ReadHeaderTimeout: 20 * time.Second,
				ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
					s.seen(conn.RemoteAddr())
					return ctx
				}}
			s.close = srv.Close
			go func() { _ = srv.Serve(l) }() // ends with unlisten
		case "echo":
			go s.accept(l, func(conn net.Conn) { _, _ = io.Copy(conn, conn) })
		case "sink":
			go s.accept(l, func(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) })
		default:
			l.Close()
			return errors.New("no such kind of server")
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if old := a.servers[c.Port]; old != nil {
		// TCP and UDP may share a port, and those on port 0 do: the newest is
		// asked about, all are closed.
		closer := s.close
		s.close = func() error { return errors.Join(closer(), old.close()) }
	}
	a.servers[c.Port] = s
	return nil
}

func (s *server) accept(l net.Listener, serve func(net.Conn)) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return // closed by unlisten
		}
		s.seen(conn.RemoteAddr())
		go func() {
			defer conn.Close()
			serve(conn)
		}()
	}
}

func (s *server) echoUDP(pc net.PacketConn) {
	b := make([]byte, 65536)
	for {
		n, from, err := pc.ReadFrom(b)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error about an echo
		}
		s.seen(from)
		_, _ = pc.WriteTo(b[:n], from)
	}
}

func (a *agent) server(port int) (*server, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if s := a.servers[port]; s != nil {
		return s, nil
	}
	return nil, errors.New("nothing listens there")
}

func (a *agent) unlisten(c *enginetest.GuestCmd, _ *enginetest.GuestReply) error {
	s, err := a.server(c.Port)
	if err != nil {
		return err
	}
	a.mu.Lock()
	delete(a.servers, c.Port)
	a.mu.Unlock()
	return s.close()
}

func (a *agent) peers(c *enginetest.GuestCmd, r *enginetest.GuestReply) error {
	s, err := a.server(c.Port)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	r.Peers = append(r.Peers, s.peers...)
	return nil
}
