package uplink

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"sidewire/engine/frame"
)

// boundFor is how long what the pod's processes have bound is believed.
const boundFor = time.Second

// bound is which ports the pod's processes had bound at some time.
type bound struct {
	at       time.Time
	tcp, udp portMap
}

// boundPorts keeps a bound that is renewed when somebody asks and it is old.
type boundPorts struct {
	now  atomic.Pointer[bound]
	busy atomic.Bool
}

// PortFree says whether no process of the pod had bound that port of the pod's
// address a moment ago. It is safe for concurrent use, does not wait and does
// not allocate; asking makes what it knows fresh for the next one to ask.
func (p *Pod) PortFree(proto uint8, port uint16) bool {
	b := p.bound.now.Load()
	if time.Since(b.at) > boundFor && p.bound.busy.CompareAndSwap(false, true) {
		go p.refresh()
	}
	switch proto {
	case frame.ProtoTCP:
		return !b.tcp.has(int(port))
	case frame.ProtoUDP:
		return !b.udp.has(int(port))
	}
	return true
}

func (p *Pod) refresh() {
	defer p.bound.busy.Store(false)
	p.mu.Lock() // against Restore
	defer p.mu.Unlock()
	if p.ns < 0 {
		return
	}
	// Without the right namespace the last known state stays.
	_ = inNS(p.ns, func() error {
		p.bound.now.Store(readBound(readSockets()))
		return nil
	})
}

// socket is one line of /proc/net/tcp and its like.
type socket struct {
	proto         uint8
	local, remote netip.AddrPort
	state         uint8
}

// States of a TCP socket (include/net/tcp_states.h).
const (
	tcpTimeWait = 6
	tcpListen   = 10
)

// readSockets lists the sockets of the thread's namespace. A file that cannot
// be read, such as those of a kernel without IPv6, lists none.
func readSockets() (out []socket) {
	for _, f := range []struct {
		name  string
		proto uint8
	}{{"tcp", frame.ProtoTCP}, {"tcp6", frame.ProtoTCP}, {"udp", frame.ProtoUDP}, {"udp6", frame.ProtoUDP}} {
		file, err := os.Open("/proc/thread-self/net/" + f.name)
		if err != nil {
			continue
		}
		for s := bufio.NewScanner(file); s.Scan(); {
			if sock, ok := parseSocket(s.Text()); ok {
				sock.proto = f.proto
				out = append(out, sock)
			}
		}
		file.Close()
	}
	return out
}

// parseSocket reads "N: LOCAL:PORT REMOTE:PORT STATE ...", all hexadecimal.
func parseSocket(line string) (s socket, ok bool) {
	f := strings.Fields(line)
	if len(f) < 4 {
		return s, false
	}
	local, ok1 := parseProcAddr(f[1])
	remote, ok2 := parseProcAddr(f[2])
	state, err := strconv.ParseUint(f[3], 16, 8)
	return socket{local: local, remote: remote, state: uint8(state)}, ok1 && ok2 && err == nil
}

// parseProcAddr reads an address as the kernel prints it: in words of the
// machine's byte order. IPv4 in IPv6 is IPv4.
func parseProcAddr(s string) (netip.AddrPort, bool) {
	host, port, _ := strings.Cut(s, ":")
	b, err := hex.DecodeString(host)
	n, err2 := strconv.ParseUint(port, 16, 16)
	if err != nil || err2 != nil || len(b)%4 != 0 {
		return netip.AddrPort{}, false
	}
	for w := range slices.Chunk(b, 4) {
		binary.NativeEndian.PutUint32(w, binary.BigEndian.Uint32(w))
	}
	ip, ok := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(ip.Unmap(), uint16(n)), ok
}

func readBound(socks []socket) *bound {
	b := &bound{at: time.Now()}
	for _, s := range socks {
		ip := s.local.Addr()
		if ip.IsLoopback() || ip.IsLinkLocalUnicast() || s.state == tcpTimeWait && s.proto == frame.ProtoTCP {
			continue
		}
		port := int(s.local.Port())
		if s.proto == frame.ProtoTCP {
			b.tcp.set(port, port)
		} else {
			b.udp.set(port, port)
		}
	}
	return b
}
