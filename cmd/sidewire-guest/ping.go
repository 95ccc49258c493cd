package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
)

// ping sends N echo requests and counts the answers. An ICMP error is the
// command's error; its MTU is told.
func (a *agent) ping(c *enginetest.GuestCmd, r *enginetest.GuestReply) error {
	dst, err := net.ResolveIPAddr("ip", c.Host)
	if err != nil {
		return err
	}
	p := &pinger{dst: dst, v6: dst.IP.To4() == nil, id: rand.IntN(65536), size: int(c.Bytes)}
	if p.size == 0 {
		p.size = 56
	}
	network, listen := "ip4:icmp", "0.0.0.0"
	if p.v6 {
		network, listen = "ip6:ipv6-icmp", "::"
	}
	lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) (err error) {
		if !c.DF || p.v6 {
			return nil
		}
		return errors.Join(rc.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE)
		}), err)
	}}
	p.conn, err = lc.ListenPacket(bg, network, listen)
	if err != nil {
		return err
	}
	defer p.conn.Close()
	end := time.Now().Add(c.Timeout)
	var sum time.Duration
	for i := range c.N {
		rtt, err := p.once(i, end, r)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
		case err != nil:
			return err
		default:
			r.Received++
			sum += rtt
		}
		if i+1 < c.N && c.Interval > 0 {
			time.Sleep(c.Interval)
		}
	}
	if r.Received == 0 {
		return fmt.Errorf("no answer from %v", dst)
	}
	r.RTT = sum / time.Duration(r.Received)
	return nil
}

type pinger struct {
	conn     net.PacketConn
	dst      *net.IPAddr
	v6       bool
	id, size int
}

// once sends request number seq and waits for what becomes of it, at most a
// second.
func (p *pinger) once(seq int, end time.Time, r *enginetest.GuestReply) (time.Duration, error) {
	m := icmp.Message{Type: ipv4.ICMPTypeEcho, Body: &icmp.Echo{ID: p.id, Seq: seq & 0xffff, Data: pingData(p.size)}}
	if p.v6 {
		m.Type = ipv6.ICMPTypeEchoRequest
	}
	b, err := m.Marshal(nil)
	if err != nil {
		return 0, err
	}
	start := time.Now()
	if d := start.Add(time.Second); d.Before(end) {
		end = d
	}
	r.Sent++
	if _, err := p.conn.WriteTo(b, p.dst); err != nil {
		return 0, err
	}
	if err := p.conn.SetReadDeadline(end); err != nil {
		return 0, err
	}
	buf := make([]byte, 65536)
	for {
		n, from, err := p.conn.ReadFrom(buf)
		if err != nil {
			return 0, err
		}
		done, err := p.answer(buf[:n], b, r)
		if err != nil {
			return 0, fmt.Errorf("%v: %w", from, err)
		}
		if done {
			return time.Since(start), nil
		}
	}
}

// answer says whether an ICMP message is the reply to the request sent, or
// returns the error that it reports about it.
func (p *pinger) answer(b, sent []byte, r *enginetest.GuestReply) (bool, error) {
	if len(b) < 8 {
		return false, nil
	}
	switch {
	case !p.v6 && b[0] == 0, p.v6 && b[0] == 129:
		if len(b) != len(sent) || !bytes.Equal(b[4:8], sent[4:8]) {
			return false, nil
		}
		if !bytes.Equal(b[8:], sent[8:]) {
			return false, errors.New("the echo differs from what was sent")
		}
		return true, nil
	case !p.v6 && (b[0] == 3 || b[0] == 11 || b[0] == 12):
		if len(b) < 8+20+8 || !bytes.Equal(b[8+16:8+20], p.dst.IP.To4()) ||
			int(binary.BigEndian.Uint16(b[8+24:])) != p.id {
			return false, nil
		}
		if b[0] == 3 && b[1] == 4 {
			r.MTU = int(binary.BigEndian.Uint16(b[6:]))
		}
		return false, fmt.Errorf("icmp type %d code %d", b[0], b[1])
	case p.v6 && b[0] < 128:
		if len(b) < 8+40+8 || int(binary.BigEndian.Uint16(b[8+40+4:])) != p.id {
			return false, nil
		}
		if b[0] == 2 {
			r.MTU = int(binary.BigEndian.Uint32(b[4:]))
		}
		return false, fmt.Errorf("icmpv6 type %d code %d", b[0], b[1])
	}
	return false, nil
}

func pingData(n int) []byte { return enginetest.Payload(n, 3) }

// arp asks for a hardware address, as nobody but the asked may answer.
func (a *agent) arp(c *enginetest.GuestCmd, r *enginetest.GuestReply) error {
	ifi, err := net.InterfaceByName(c.If)
	if err != nil {
		return err
	}
	target := net.ParseIP(c.Host).To4()
	if target == nil {
		return errors.New("host: want an IPv4 address")
	}
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(swap16(unix.ETH_P_ARP)))
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: swap16(unix.ETH_P_ARP), Ifindex: ifi.Index}); err != nil {
		return err
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}); err != nil {
		return err
	}
	req := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, ifi.HardwareAddr...)
	req = append(req, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1)
	req = append(append(req, ifi.HardwareAddr...), ownIP4(ifi)...)
	req = append(append(req, make([]byte, 6)...), target...)
	buf := make([]byte, 2048)
	var next time.Time
	for end := time.Now().Add(c.Timeout); time.Now().Before(end); {
		if now := time.Now(); now.After(next) {
			next = now.Add(time.Second)
			if err := unix.Sendto(fd, req, 0, &unix.SockaddrLinklayer{Ifindex: ifi.Index}); err != nil {
				return err
			}
		}
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err == nil && n >= 42 && buf[21] == 2 && bytes.Equal(buf[28:32], target) {
			r.MAC = net.HardwareAddr(buf[22:28]).String()
			return nil
		}
	}
	return errors.New("no answer")
}

func swap16(v uint16) uint16 { return v<<8 | v>>8 }

// ownIP4 is the link's first IPv4 address, or 0.0.0.0 (an ARP probe).
func ownIP4(ifi *net.Interface) net.IP {
	addrs, _ := ifi.Addrs()
	for _, ad := range addrs {
		if n, ok := ad.(*net.IPNet); ok && n.IP.To4() != nil {
			return n.IP.To4()
		}
	}
	return net.IPv4zero.To4()
}
