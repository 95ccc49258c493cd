package usernet

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
	"sidewire/engine/uplink"
)

// all leads everything that arrives for the pod to its guest, and returns the
// ports that it is led to.
func (p *pod) all() (tcp, udp uint16) {
	p.t.Helper()
	enginetest.Need(p.t, "root")
	tcp, udp, err := p.net.OpenAll(podIP.As4())
	require.NoError(p.t, err)
	require.NoError(p.t, p.Pod.Do(func() error {
		r, err := uplink.OpenRedirect(uplink.RedirectConfig{Link: "eth0", TCP: tcp, UDP: udp})
		if err == nil {
			p.t.Cleanup(func() { assert.NoError(p.t, r.Close()) })
		}
		return err
	}))
	return tcp, udp
}

// Datagrams for any port are the guest's, with all that a mapping's carry, and
// leave nothing behind; the first answer makes the mapping.
func TestAllPortsUDP(t *testing.T) {
	for _, n := range []int{1, 3} {
		p := newPod(t, enginetest.WorldOptions{MTU: 9000}, workers(n))
		p.all()
		open := p.net.Stats().Sockets
		assert.Equal(t, 2*n, open)
		c := listen(t, p.Outside, "udp4", enginetest.OutsideIP+":5555")
		for _, port := range []uint16{1, 53, 7000, 65535} {
			says(t, c, netip.AddrPortFrom(podIP, port), "hello")
			a := p.next()
			assert.Equal(t, fmt.Sprintf("%s:5555 to %d", enginetest.OutsideIP, port), fmt.Sprintf("%s to %d", a.from(), a.udp.DstPort))
		}
		assert.Equal(t, open, p.net.Stats().Sockets)
		assert.Zero(t, p.mappings())
		assert.EqualValues(t, 4, p.net.Stats().Unasked)

		says(t, c, netip.AddrPortFrom(podIP, 7000), string(enginetest.Payload(4000, 1))) // more than the guest's MTU takes
		for range 3 {
			require.NotNil(t, p.next().ip)
		}
		p.send(udpTo(7000, netip.MustParseAddrPort(enginetest.OutsideIP+":5555"), "answer"))
		p.consumed()
		got, by := hears(t, c)
		assert.Equal(t, "answer by 10.244.1.5:7000", fmt.Sprint(got, " by ", by))
		assert.Equal(t, 1, p.mappings())
		says(t, c, netip.AddrPortFrom(podIP, 7000), "again")
		assert.EqualValues(t, 7000, p.next().udp.DstPort)
		assert.EqualValues(t, 5, p.net.Stats().Unasked, "the mapping gets it")
		p.pass(time.Hour)
		for range n {
			p.pull(0)
		}
		p.net.CloseAll()
		assert.Zero(t, p.net.Stats().Sockets-p.mappings())
		says(t, c, netip.AddrPortFrom(podIP, 7001), "hello")
		p.nothing()
	}
}

// Connections to any port are the guest's. The sockets behind the redirect are
// for nobody else.
func TestAllPortsTCP(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	tcp, udp := p.all()
	for _, port := range []uint16{1, 80, 65535} {
		c, err := p.Outside.Dial("tcp4", netip.AddrPortFrom(podIP, port).String(), patience)
		require.NoError(t, err)
		syn := p.wantSYN(port)
		assert.Equal(t, c.LocalAddr().String(), syn.from().String())
		c.Close()
	}
	for _, to := range []string{"127.0.0.1", enginetest.PodIP} {
		c, err := p.Pod.Dial("tcp4", fmt.Sprint(to, ":", tcp), patience)
		if to == enginetest.PodIP {
			assert.ErrorIs(t, err, unix.ECONNREFUSED)
			continue
		}
		require.NoError(t, err)
		p.nothing()
		_, err = c.Read(make([]byte, 1))
		assert.ErrorIs(t, err, unix.ECONNRESET)
		c.Close()
	}
	says(t, listen(t, p.Pod, "udp4", "127.0.0.1:5555"), netip.AddrPortFrom(localIP, udp), "hello")
	p.nothing()
	assert.EqualValues(t, 1, p.net.Stats().Filtered)
	_, _, err := p.net.OpenAll(podIP.As4())
	assert.ErrorContains(t, err, "all ports: the user network is closed, or has them already")
}

// A flood of SYNs makes the kernel answer with cookies: what comes back has no
// socket yet, and is the guest's all the same.
func TestAllPortsTCPWithCookies(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	require.NoError(t, p.Pod.Sysctl("net/ipv4/tcp_syncookies", "2"))
	p.all()
	c, err := p.Outside.Dial("tcp4", netip.AddrPortFrom(podIP, 80).String(), patience)
	require.NoError(t, err)
	defer c.Close()
	p.wantSYN(80)
}

// A guest's TCP port from which it has called somebody is open to others (RFC
// 5382 REQ-3): their SYNs are the guest's to answer.
func TestRFC5382REQ3AllPorts(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	p.all()
	l, err := p.Outside.Listen("tcp4", enginetest.OutsideIP+":7777")
	require.NoError(t, err)
	defer l.Close()
	p.send(tcpTo(netip.MustParseAddrPort(enginetest.OutsideIP+":7777"), enginetest.TCP{Src: 40001, Flags: enginetest.SYN, Seq: 1}, ""))
	called, err := l.Accept()
	require.NoError(t, err)
	defer called.Close()
	require.Equal(t, enginetest.PodIP+":40001", called.RemoteAddr().String())
	a, ok := p.wait(patience, func(a *arrived) bool { return a.tcp != nil })
	require.True(t, ok && a.tcp.SYN && a.tcp.ACK)
	c, err := p.Outside.Dial("tcp4", enginetest.PodIP+":40001", patience)
	require.NoError(t, err)
	defer c.Close()
	p.wantSYN(40001)
}

// A port of the pod's that is forwarded by name is served by its own listener,
// and what the pod listens on by nobody but the guest.
func TestAllPortsBesideListeners(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	p.all()
	require.NoError(t, p.net.AddForward(Forward{Proto: frame.ProtoTCP, Port: 8080, Guest: 80}))
	l, err := p.Pod.Listen("tcp4", "0.0.0.0:8081")
	require.NoError(t, err)
	defer l.Close()
	for port, guest := range map[uint16]uint16{8080: 80, 8081: 8081} {
		c, err := p.Outside.Dial("tcp4", netip.AddrPortFrom(podIP, port).String(), patience)
		require.NoError(t, err)
		defer c.Close()
		p.wantSYN(guest)
	}
}

// Where the policy keeps the guest from somebody, what they send is not for it.
func TestAllPortsPolicy(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{}, func(c *Config) { c.Policy.Deny = true })
	p.all()
	says(t, listen(t, p.Outside, "udp4", enginetest.OutsideIP+":5555"), netip.AddrPortFrom(podIP, 7000), "hello")
	p.nothing()
	assert.EqualValues(t, 1, p.net.Stats().PolicyDenied)
	c, err := p.Outside.Dial("tcp4", netip.AddrPortFrom(podIP, 80).String(), patience)
	require.NoError(t, err)
	defer c.Close()
	p.wantSYN(80)
}

// Datagrams that nobody has asked for cost no allocation.
func TestAllPortsAllocs(t *testing.T) {
	p := newPod(t, enginetest.WorldOptions{})
	p.all()
	fd := p.socketTo(podIP)
	defer unix.Close(fd)
	q := p.net.Queue(0)
	got := 0
	msg := &unix.Msghdr{} // unix.Write would allocate under -race
	assert.Zero(t, testing.AllocsPerRun(20, func() {
		for range 20 {
			_, _ = sendmsg(int32(fd), msg, 0)
		}
		p.b.Reset(p.now)
		got += q.Pull(p.b)
		q.Release(p.b)
	}))
	assert.Greater(t, got, 20)
}

// socketTo is a datagram socket of the outside's that is connected to a port of
// the pod's.
func (p *pod) socketTo(to netip.Addr) (fd int) {
	p.t.Helper()
	require.NoError(p.t, p.Outside.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Connect(fd, &unix.SockaddrInet4{Port: 9999, Addr: to.As4()})
		}
		return err
	}))
	return fd
}

// BenchmarkAllPortsUDP brings datagrams to a port from which the guest has sent
// nothing; beside it, to one that has a mapping.
func BenchmarkAllPortsUDP(b *testing.B) {
	for _, mapped := range []bool{false, true} {
		b.Run(fmt.Sprintf("mapped=%v", mapped), func(b *testing.B) {
			p := newPod(b, enginetest.WorldOptions{})
			tcp, udp, err := p.net.OpenAll(podIP.As4())
			require.NoError(b, err)
			require.NoError(b, p.Pod.Do(func() error {
				_, err := uplink.OpenRedirect(uplink.RedirectConfig{Link: "eth0", TCP: tcp, UDP: udp})
				return err
			}))
			if mapped {
				p.send(udpTo(9999, netip.MustParseAddrPort(enginetest.OutsideIP+":9"), "answer"))
			}
			fd := p.socketTo(podIP)
			defer unix.Close(fd)
			q, n := p.net.Queue(0), 0
			for b.Loop() {
				b.StopTimer()
				for range 40 {
					_, _ = unix.Write(fd, make([]byte, 64))
				}
				b.StartTimer()
				for {
					p.b.Reset(p.now)
					k := q.Pull(p.b)
					if k == 0 {
						break
					}
					n += k
					q.Release(p.b)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n), "ns/datagram")
		})
	}
}
