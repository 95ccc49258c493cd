package main

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"sidewire/engine/enginetest"
)

const (
	ringSize = 256
	// burst is testpmd's own, which we leave as it is.
	burst = 32
	// inFlight is how many bursts go round in each queue of a closed loop: as
	// many as a ring holds, so that nobody waits for frames for long and none
	// is lost for want of room.
	inFlight = ringSize / burst
	// mbufs is the number of testpmd's buffers.
	mbufs = 32768
	// mbufRoom is how much of a frame one buffer holds.
	mbufRoom = 2048
	// txMultiSegs is RTE_ETH_TX_OFFLOAD_MULTI_SEGS.
	txMultiSegs = "0x8000"
)

// testpmd is one dpdk-testpmd process.
type testpmd struct{ *proc }

// startTestpmd starts dpdk-testpmd on a processor with the virtual devices and
// waits for its prompt.
func startTestpmd(ctx context.Context, cpu int, name string, c cell, vdevs, more []string) (*testpmd, error) {
	prog, err := enginetest.Program("dpdk-testpmd")
	if err != nil {
		return nil, err
	}
	// Standard output is a pipe, which the C library would fill before it lets
	// anything through.
	argv := []string{"stdbuf", "-oL", prog,
		"--lcores", fmt.Sprintf("0@%d,1@%d", cpu, cpu), "--no-pci", "--no-telemetry", "--single-file-segments"}
	if hugepages() {
		argv = append(argv, "--in-memory")
	} else {
		argv = append(argv, "--no-huge", "-m", "1024", "--no-shconf")
	}
	for _, v := range vdevs {
		argv = append(argv, "--vdev="+v)
	}
	argv = append(argv, "--", "-i", "--disable-link-check", "--nb-cores=1", "--no-lsc-interrupt", "--no-flush-rx",
		fmt.Sprintf("--rxd=%d", ringSize), fmt.Sprintf("--txd=%d", ringSize),
		fmt.Sprintf("--rxq=%d", c.Queues), fmt.Sprintf("--txq=%d", c.Queues))
	buffers := mbufs + 2*c.FDB // net_pcap keeps what it read in buffers
	switch {
	case c.GSO:
		buffers = gsoMbufs
		argv = append(argv, fmt.Sprintf("--mbuf-size=%d", gsoRoom+headroom))
	case c.Size > mbufRoom:
		argv = append(argv, "--tx-offloads="+txMultiSegs)
	}
	argv = append(argv, fmt.Sprintf("--total-num-mbufs=%d", buffers))
	p, err := startProc(ctx, procOptions{undisturbed: true}, name, append(argv, more...)...)
	if err != nil {
		return nil, err
	}
	t := &testpmd{p}
	if _, err := p.expect(0, "testpmd> ", 30*time.Second); err != nil {
		_ = t.close()
		return nil, err
	}
	return t, nil
}

// close ends it. Asked to quit, it would take its time, and there is nothing to
// be put in order: its memory and its sockets go with it.
func (t *testpmd) close() error { return t.kill() }

// set gives commands and returns what testpmd wrote until the last one had been
// carried out.
func (t *testpmd) set(lines ...string) (string, error) {
	at := t.out.len()
	// It carries out one line after the other and answers the last one at once.
	for _, l := range append(lines, "done") {
		if err := t.say("%s", l); err != nil {
			return "", err
		}
	}
	return t.expect(at, "Command not found", 20*time.Second)
}

// txpkts is the frames' length as testpmd's list of segments.
func txpkts(size int) string {
	var segs []string
	for ; size > mbufRoom; size -= mbufRoom {
		segs = append(segs, strconv.Itoa(mbufRoom))
	}
	return strings.Join(append(segs, strconv.Itoa(size)), ",")
}

// portRates are testpmd's own figures of all its ports together, since it was
// asked last.
type portRates struct {
	rx, tx float64 // frames a second
	rxBits float64 // a second
}

func (r *portRates) add(o portRates) {
	r.rx, r.tx, r.rxBits = r.rx+o.rx, r.tx+o.tx, r.rxBits+o.rxBits
}

// rates asks for what passed in a while through its first ports.
func (t *testpmd) rates(ports int, d time.Duration) (portRates, error) {
	const show = "show port stats all"
	if _, err := t.set(show); err != nil {
		return portRates{}, err
	}
	time.Sleep(d)
	s, err := t.set(show)
	if err != nil {
		return portRates{}, err
	}
	return parseRates(s, ports)
}

var (
	rxPPS = regexp.MustCompile(`Rx-pps:\s+(\d+)`)
	txPPS = regexp.MustCompile(`Tx-pps:\s+(\d+)`)
	rxBPS = regexp.MustCompile(`Rx-bps:\s+(\d+)`)
)

// parseRates adds up the first ports of one "show port stats all".
func parseRates(s string, ports int) (r portRates, err error) {
	for _, f := range []struct {
		re  *regexp.Regexp
		sum *float64
	}{{rxPPS, &r.rx}, {txPPS, &r.tx}, {rxBPS, &r.rxBits}} {
		all := f.re.FindAllStringSubmatch(s, -1)
		if len(all) < ports {
			return r, fmt.Errorf("no rates of %d ports in testpmd's answer: %q", ports, s)
		}
		for _, m := range all[:ports] {
			n, err := strconv.ParseFloat(m[1], 64)
			if err != nil {
				return r, err
			}
			*f.sum += n
		}
	}
	return r, nil
}

var (
	cyclesLine = regexp.MustCompile(`CPU cycles/packet=([\d.]+) \(total cycles=(\d+) / total (\S+) packets=(\d+)\) at (\d+) MHz Clock`)
	dropLine   = regexp.MustCompile(`TX-dropped: (\d+)`)
)

// fwdStats are testpmd's figures of its own loop.
type fwdStats struct {
	frames  float64
	cycles  float64 // per frame, in turns that found some
	mhz     float64 // of those cycles
	dropped uint64  // frames for which the other side had no room
}

// ns is the busy time of a frame.
func (f fwdStats) ns() float64 { return f.cycles * 1000 / f.mhz }

// parseFwdStats reads "show fwd stats all".
func parseFwdStats(s string) (f fwdStats, err error) {
	m := cyclesLine.FindStringSubmatch(s)
	if m == nil {
		return f, fmt.Errorf("no cycles in testpmd's answer: %q", s[max(0, len(s)-300):])
	}
	if f.cycles, err = strconv.ParseFloat(m[1], 64); err != nil {
		return f, err
	}
	if f.frames, err = strconv.ParseFloat(m[4], 64); err != nil {
		return f, err
	}
	if f.mhz, err = strconv.ParseFloat(m[5], 64); err != nil {
		return f, err
	}
	// The accumulated figure comes last.
	if d := dropLine.FindAllStringSubmatch(s, -1); len(d) > 0 {
		f.dropped, err = strconv.ParseUint(d[len(d)-1][1], 10, 64)
	}
	return f, err
}
