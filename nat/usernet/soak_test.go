package usernet

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

const (
	soakFlows  = 100_000
	fewFlows   = 4_000 // where time matters
	soakSample = 50    // flows of each destination that carry something
)

// soaks says that time does not matter: see make soak.
func soaks() bool { return os.Getenv("SOAK") != "" }

// crowd is as many flows as the test is about. Each takes a descriptor, which
// a process that may not raise its limit has not enough of for all: then it is
// as many as it has, and the others are flows without a socket.
func crowd(t testing.TB) (flows, withSocket int) {
	t.Helper()
	flows = fewFlows
	if soaks() {
		flows = soakFlows
	}
	const others = 2000
	var was unix.Rlimit
	require.NoError(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &was))
	if want := uint64(flows + others); was.Cur < want {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: want, Max: max(want, was.Max)}); err == nil {
			t.Cleanup(func() { _ = unix.Setrlimit(unix.RLIMIT_NOFILE, &was) })
		} else {
			t.Logf("%d of %d flows have a socket: the limit of open files is %d and cannot be raised: %v", was.Cur-others, flows, was.Cur, err)
		}
	}
	return flows, min(flows, MaxDescriptors()-others)
}

// manyServers are four addresses of a namespace, where others may wait in
// numbers.
func manyServers(t testing.TB) (ns *enginetest.NetNS, addrs []netip.AddrPort) {
	t.Helper()
	enginetest.Need(t, "netns", "root")
	ns = enginetest.NewNetNS(t)
	for i := range 4 {
		a := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(1 + i)}), 80)
		require.NoError(t, ns.Addr("lo", a.Addr().String()+"/32"))
		addrs = append(addrs, a)
	}
	enginetest.Must(t, ns.Sysctl("net/core/somaxconn", "65535"), ns.Sysctl("net/ipv4/tcp_max_syn_backlog", "65535"))
	return ns, addrs
}

// room is what is in use: the heap, the process's memory and descriptors.
type room struct{ heap, rss, files int }

func inUse(t testing.TB) (r room) {
	t.Helper()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	r.heap = int(m.HeapAlloc)
	b, err := os.ReadFile("/proc/self/statm")
	require.NoError(t, err)
	var size, pages int
	_, err = fmt.Sscan(string(b), &size, &pages)
	require.NoError(t, err)
	r.rss = pages * os.Getpagesize()
	fds, err := os.ReadDir("/proc/self/fd")
	require.NoError(t, err)
	r.files = len(fds)
	return r
}

// each lets the guest send n frames, which make builds, through its workers in
// turn, and gives what comes back to got.
func (w *world) each(n int, make func(i int) []byte, got func(h []byte)) {
	w.t.Helper()
	look := func() {
		for i := range w.b.Len() {
			if f := w.b.Frame(i); f.Out == portGuest && int(f.HeadLen) >= headLen {
				got(f.Head[:f.HeadLen])
			}
		}
	}
	for at := 0; at < n; {
		w.b.Reset(w.now)
		w.b.Worker, w.b.In = at/64%len(w.net.workers), portGuest
		for k := 0; k < 64 && at < n; k++ {
			f := w.b.Next()
			f.SetBytes(make(at), nil, w.b.Segs(1))
			f.Queue = uint16(w.b.Worker)
			at++
		}
		w.net.Process(w.b)
		look()
		w.pass(100 * time.Microsecond)
		w.eachPull(look)
	}
}

func (w *world) eachPull(look func()) {
	for k := range w.net.workers {
		w.b.Reset(w.now)
		w.b.Worker, w.b.In = k, portHost
		w.net.Queue(k).Pull(w.b)
		look()
		w.net.Queue(k).Release(w.b)
	}
}

// pullTime is what a look at the sockets costs when nothing is to be done, in
// the median.
func (w *world) pullTime() time.Duration {
	var took []time.Duration
	for range 3000 {
		w.pass(50 * time.Microsecond)
		begin := time.Now()
		for k := range w.net.workers {
			w.b.Reset(w.now)
			w.b.Worker = k
			w.net.Queue(k).Pull(w.b)
			w.net.Queue(k).Release(w.b)
			w.net.Queue(k).Arm()
			w.net.Queue(k).Disarm()
		}
		took = append(took, time.Since(begin))
	}
	slices.Sort(took)
	return took[len(took)/2]
}

// fill makes flows without sockets until there are n.
func (w *world) fill(n int) {
	for i, have := 0, w.flows(); have+i < n; i++ {
		k := w.net.workers[i%len(w.net.workers)]
		at := k.table.add(key{remote: hostOf(uint32(i)), rport: 9, gport: uint16(i), proto: frame.ProtoTCP})
		require.NotEqual(w.t, none, at)
		f := k.table.at(at)
		f.state, f.seen = stateEstablished, k.seen()
		k.stats.opened(frame.ProtoTCP)
		k.wheel.set(at, k.tick+quietTicks+uint32(i%1000))
	}
}

func (w *world) flows() (n int) {
	for _, k := range w.net.workers {
		n += k.table.count
	}
	return n
}

func TestScaleTCP(t *testing.T) {
	for _, n := range []int{1, 2} {
		t.Run(strconv.Itoa(n)+" workers", func(t *testing.T) { scaleTCP(t, n) })
	}
}

func scaleTCP(t *testing.T, count int) {
	flows, real := crowd(t)
	ns, addrs := manyServers(t)
	// Connections that nobody takes wait in the listeners' queues: they need no
	// descriptor.
	var ls []*net.TCPListener
	for _, a := range addrs {
		l, _ := inside(t, ns, a.String())
		setBacklog(t, l, 65535)
		ls = append(ls, l)
	}
	w := newWorld(t, inPod(t, ns), workers(count), func(c *Config) { c.MaxFlows, c.MaxSockets = flows+1000, real+1000 })
	port := func(i int) uint16 { return uint16(2000 + i/4) }
	of := func(h []byte) int {
		return int(binary.BigEndian.Uint16(h[l4+2:])-2000)*4 + int(h[l3+15]) - 1
	}
	seqs := make([]uint32, real) // of the servers, 0 while there is none
	var tmpl [4][]byte
	for d, a := range addrs {
		tmpl[d] = tcpTo(a, enginetest.TCP{Src: 1, Seq: guestISS, Flags: tcpSYN}, "")
	}
	came := 0
	take := func(h []byte) {
		if h[l4+13]&(tcpSYN|tcpACK) == tcpSYN|tcpACK && seqs[of(h)] == 0 {
			seqs[of(h)] = binary.BigEndian.Uint32(h[l4+4:]) + 1
			came++
		}
	}
	segment := func(i int, bits uint8, seq uint32) []byte {
		b := tmpl[i%4]
		patch(b, 0, port(i))
		patch32(b, 4, seq)
		patch32(b, 8, seqs[i])
		patch(b, 12, 5<<12|uint16(bits))
		patch(b, 14, 65535)
		return slices.Clone(b)
	}
	few := w.pullTime()
	before := inUse(t)
	begin := time.Now()
	w.each(real, func(i int) []byte { return segment(i, tcpSYN, guestISS) }, take)
	w.until(func() bool {
		w.each(1, func(int) []byte { return segment(0, tcpACK, guestISS+1) }, take)
		return came == real
	})
	w.each(real, func(i int) []byte { return segment(i, tcpACK, guestISS+1) }, take)
	took := time.Since(begin)
	w.fill(flows)
	after := inUse(t)
	require.Equal(t, flows, w.flows())
	require.Equal(t, real, w.net.Stats().Sockets)
	many := w.pullTime()
	t.Logf("%d flows, %d with a socket: opened in %v (%v each), %d B of heap and %d B of RSS for each, a look at them takes %v against %v for none",
		flows, real, took.Round(time.Millisecond), took/time.Duration(real), (after.heap-before.heap)/flows, (after.rss-before.rss)/flows, many, few)
	assert.Less(t, (after.heap-before.heap)/flows, 160+(1<<20)/flows)
	assert.Less(t, (after.rss-before.rss)/flows, 400+(8<<20)/flows)
	assert.Less(t, many, 3*few+5*time.Microsecond, "no work for idle flows")

	// Each destination's first take part in a conversation.
	for d, l := range ls {
		for range soakSample {
			c := acceptTCP(t, l)
			sport := remotePort(c)
			i := int(sport-2000)*4 + d
			w.worker = i / 64 % count
			w.queue = uint16(w.worker)
			p := &peer{w: w, dst: addrs[d], sport: sport, seq: guestISS + 1, ack: seqs[i], wnd: 65535}
			works(p, c)
			p.raw(tcpRST, "")
			require.NoError(t, c.Close())
		}
	}
	// The worst that timers do: all flows' at once.
	w.pass(2 * time.Minute)
	worst := time.Duration(0)
	for range 2 * flows {
		begin, fired := time.Now(), false
		for k := range w.net.workers {
			w.b.Reset(w.now)
			w.b.Worker = k
			w.net.Queue(k).Pull(w.b)
			w.net.Queue(k).Release(w.b)
			fired = w.net.Queue(k).Arm() || fired
			w.net.Queue(k).Disarm()
		}
		worst = max(worst, time.Since(begin))
		if !fired {
			break
		}
	}
	t.Logf("all timers at once: the longest turn took %v", worst)
	if soaks() { // else it is too short to tell
		assert.Less(t, worst, 50*time.Millisecond)
	}
	begin = time.Now()
	for _, k := range w.net.workers { // those without a socket
		for i := range int32(k.table.used) {
			if f := k.table.at(i); f.state != stateFree && f.fd < 0 {
				k.drop(i)
			}
		}
	}
	w.each(real, func(i int) []byte { return segment(i, tcpRST, guestISS+1) }, func([]byte) {})
	t.Logf("closed in %v", time.Since(begin).Round(time.Millisecond))
	s := w.net.Stats()
	assert.Zero(t, s.TCPOpen)
	assert.Zero(t, s.Sockets)
	assert.Zero(t, w.flows())
	assert.LessOrEqual(t, inUse(t).files, before.files+4)
}

func TestScaleUDP(t *testing.T) {
	for _, n := range []int{1, 2} {
		t.Run(strconv.Itoa(n)+" workers", func(t *testing.T) { scaleUDP(t, n) })
	}
}

// scaleUDP has each mapping talk to every server: that many flows.
func scaleUDP(t *testing.T, count int) {
	flows, real := crowd(t)
	ns, addrs := manyServers(t)
	for i := range 4 { // eight remotes in all
		addrs = append(addrs, netip.AddrPortFrom(addrs[i].Addr(), 81))
	}
	mappings := min(flows/len(addrs), real)
	var servers []*net.UDPConn
	for _, a := range addrs {
		require.NoError(t, ns.Do(func() error {
			c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(a))
			servers = append(servers, c)
			return err
		}))
		t.Cleanup(func() { servers[len(servers)-1].Close(); servers = servers[:len(servers)-1] })
	}
	w := newWorld(t, inPod(t, ns), workers(count), func(c *Config) { c.MaxFlows, c.MaxSockets = flows+1000, real+1000 })
	few := w.pullTime()
	before := inUse(t)
	begin := time.Now()
	heard := make([]int, mappings)
	buf := make([]byte, 100)
	var tmpl [8][]byte
	for d, a := range addrs {
		tmpl[d] = enginetest.UDPFrame(toRouter, to(a.Addr()), enginetest.UDP{Src: 1, Dst: a.Port(), NoSum: true}, []byte("hello"))
	}
	for d, a := range addrs {
		for first := 0; first < mappings; first += 64 {
			last := min(first+64, mappings)
			w.each(last-first, func(i int) []byte {
				binary.BigEndian.PutUint16(tmpl[d][l4:], uint16(2000+first+i))
				return slices.Clone(tmpl[d])
			}, func([]byte) {})
			for range last - first { // each is answered
				require.NoError(t, servers[d].SetReadDeadline(time.Now().Add(patience)))
				n, from, err := servers[d].ReadFromUDPAddrPort(buf)
				require.NoError(t, err, "%v", a)
				require.Equal(t, "hello", string(buf[:n]))
				_, err = servers[d].WriteToUDPAddrPort([]byte("world"), from)
				require.NoError(t, err)
			}
			for k := 0; k < 200; k++ {
				w.pass(100 * time.Microsecond)
				w.eachPull(func() {
					for i := range w.b.Len() {
						if f := w.b.Frame(i); f.Out == portGuest && f.Proto == frame.ProtoUDP {
							heard[f.DstPort()-2000]++
						}
					}
				})
				if heard[last-1] == d+1 && heard[first] == d+1 {
					break
				}
			}
		}
	}
	took := time.Since(begin)
	after := inUse(t)
	for i, n := range heard {
		require.Equal(t, len(addrs), n, "mapping %d", i)
	}
	s := w.net.Stats()
	assert.Equal(t, mappings, s.UDPOpen)
	assert.Equal(t, mappings, s.Sockets)
	many := w.pullTime()
	flows = mappings * len(addrs)
	t.Logf("%d flows of %d mappings, a datagram each way on each in %v; %d B of heap and %d B of RSS for each flow, a look takes %v against %v for none",
		flows, mappings, took.Round(time.Millisecond), (after.heap-before.heap)/flows, (after.rss-before.rss)/flows, many, few)
	assert.Less(t, (after.heap-before.heap)/flows, 160+(2<<20)/flows)
	assert.Less(t, (after.rss-before.rss)/flows, 400+(8<<20)/flows)
	assert.Less(t, many, 3*few+5*time.Microsecond, "no work for idle flows")
	for range 10 {
		w.pass(time.Minute)
		for range 2 * flows {
			w.eachPull(func() {})
			more := false
			for k := range w.net.workers {
				more = w.net.Queue(k).Arm() || more
				w.net.Queue(k).Disarm()
			}
			if !more {
				break
			}
		}
	}
	assert.Zero(t, w.flows())
	assert.Zero(t, w.net.Stats().Sockets)
	assert.LessOrEqual(t, inUse(t).files, before.files+4)
}
