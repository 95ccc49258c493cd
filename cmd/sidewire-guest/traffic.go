package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
)

// bodyMax is how much of a body goes back in a reply.
const bodyMax = 4096

func (a *agent) lookup(c *enginetest.GuestCmd, r *enginetest.GuestReply) (err error) {
	ctx, cancel := context.WithTimeout(context.Background(), c.Timeout)
	defer cancel()
	res := &net.Resolver{PreferGo: true}
	switch c.Type {
	case "TXT":
		r.Addrs, err = res.LookupTXT(ctx, c.Host)
	case "PTR":
		r.Addrs, err = res.LookupAddr(ctx, c.Host)
	case "", "A", "AAAA":
		network := map[string]string{"": "ip", "A": "ip4", "AAAA": "ip6"}[c.Type]
		var ips []netip.Addr
		ips, err = res.LookupNetIP(ctx, network, c.Host)
		for _, ip := range ips {
			r.Addrs = append(r.Addrs, ip.Unmap().String())
		}
	default:
		err = errors.New("no such type")
	}
	return err
}

// client makes a new connection for each request.
func client() *http.Client {
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DisableCompression: true}}
}

func (a *agent) httpGet(c *enginetest.GuestCmd, r *enginetest.GuestReply) error {
	ctx, cancel := context.WithTimeout(context.Background(), c.Timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.URL, nil)
	if err != nil {
		return err
	}
	resp, err := client().Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return readBody(resp, sha256.New(), r)
}

// readBody tells about a response; h sums up its body.
func readBody(resp *http.Response, h io.Writer, r *enginetest.GuestReply) (err error) {
	r.Status = resp.StatusCode
	var head strings.Builder
	r.Bytes, err = io.Copy(io.MultiWriter(h, &limited{&head, bodyMax}), resp.Body)
	if r.Bytes <= bodyMax {
		r.Body = head.String()
	}
	if s, ok := h.(interface{ Sum([]byte) []byte }); ok {
		r.Sum = hex.EncodeToString(s.Sum(nil))
	}
	return err
}

// limited forgets what comes after n bytes.
type limited struct {
	w io.Writer
	n int
}

func (l *limited) Write(p []byte) (int, error) {
	q := p[:min(len(p), l.n)]
	l.n -= len(q)
	_, _ = l.w.Write(q)
	return len(p), nil
}

func (a *agent) httpPut(c *enginetest.GuestCmd, r *enginetest.GuestReply) error {
	ctx, cancel := context.WithTimeout(context.Background(), c.Timeout)
	defer cancel()
	sum := sha256.New()
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, c.URL, io.TeeReader(enginetest.Data(c.Bytes), sum))
	if err != nil {
		return err
	}
	req.ContentLength = c.Bytes
	resp, err := client().Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := readBody(resp, io.Discard, r); err != nil {
		return err
	}
	r.Bytes, r.Sum = c.Bytes, hex.EncodeToString(sum.Sum(nil))
	return nil
}

func hostPort(c *enginetest.GuestCmd) string { return net.JoinHostPort(c.Host, strconv.Itoa(c.Port)) }

// tcp sends Data to an echo server.
func (a *agent) tcp(c *enginetest.GuestCmd, r *enginetest.GuestReply) error {
	conn, err := net.DialTimeout("tcp", hostPort(c), c.Timeout)
	if err != nil {
		return err
	}
	defer conn.Close()
	r.Local = conn.LocalAddr().String()
	if err := conn.SetDeadline(time.Now().Add(c.Timeout)); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, c.Data); err != nil {
		return err
	}
	b := make([]byte, len(c.Data))
	n, err := io.ReadFull(conn, b)
	r.Data = string(b[:n])
	return err
}

// udp sends datagrams one by one to an echo server and waits for each.
func (a *agent) udp(c *enginetest.GuestCmd, r *enginetest.GuestReply) error {
	conn, err := net.Dial("udp", hostPort(c))
	if err != nil {
		return err
	}
	defer conn.Close()
	r.Local = conn.LocalAddr().String()
	out, in := make([]byte, max(8, c.Bytes)), make([]byte, 65536)
	end := time.Now().Add(c.Timeout)
	for i := range c.N {
		binary.BigEndian.PutUint64(out, uint64(i))
		r.Sent++
		if _, err := conn.Write(out); err != nil {
			return err
		}
		deadline := time.Now().Add(max(time.Second, c.Interval))
		if deadline.After(end) {
			deadline = end
		}
		if err := conn.SetReadDeadline(deadline); err != nil {
			return err
		}
		n, err := conn.Read(in)
		if err == nil && string(in[:n]) == string(out) {
			r.Received++
		}
	}
	if r.Received == 0 {
		return errors.New("no echo")
	}
	return nil
}

// send sends a raw frame.
func (a *agent) send(c *enginetest.GuestCmd, r *enginetest.GuestReply) error {
	b, err := hex.DecodeString(c.Hex)
	if err != nil {
		return err
	}
	ifi, err := net.InterfaceByName(c.If)
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	for range c.N {
		if err := unix.Sendto(fd, b, 0, &unix.SockaddrLinklayer{Ifindex: ifi.Index}); err != nil {
			return fmt.Errorf("send: %w", err)
		}
		r.Sent++
	}
	return nil
}
