package main

import (
	"context"
	"fmt"
	"path/filepath"
)

// cost is what frames cost the backend. A figure that the backend cannot tell
// is NaN.
type cost struct {
	moved   float64 // frames
	busyNS  float64 // a frame, in turns of its loop that found some
	allocs  float64 // a frame
	dropped float64 // frames
}

// backend is the other side of the rings while one cell is measured.
type backend interface {
	// sockets are what the frontend connects to, in the order of its ports.
	sockets() []string
	// start lets the backend take part once the frontend is connected.
	start() error
	// mark begins to count, costs says what was counted since.
	mark() error
	costs() (cost, error)
	pid() int
	close() error
}

// socketNames are short names below a directory; a socket's path has little room.
func socketNames(dir string, n int) []string {
	var out []string
	for i := range n {
		out = append(out, filepath.Join(dir, fmt.Sprint("s", i)))
	}
	return out
}

// vhostPMD is dpdk-testpmd as a backend.
type vhostPMD struct {
	*testpmd
	socks []string
	mode  string
	size  int
}

// openVhostPMD starts dpdk-testpmd as the backend, forwarding in a mode of its own.
func openVhostPMD(ctx context.Context, c cell, dir, mode string) (backend, error) {
	b := &vhostPMD{socks: socketNames(dir, c.devices()), mode: mode, size: c.Size}
	switch c.Path {
	case guestTx:
		b.mode = "rxonly"
	case guestRx:
		b.mode = "txonly"
	}
	var vdevs, more []string
	long := ""
	if c.GSO {
		// The older flags are those that a sender sets, so that what was
		// received whole can be sent so.
		long = ",tso=1,legacy-ol-flags=1"
		more = append(more, "--tx-offloads="+txMultiSegs)
	}
	for i, s := range b.socks {
		vdevs = append(vdevs, fmt.Sprintf("net_vhost%d,iface=%s,queues=%d%s", i, s, c.Queues, long))
		more = append(more, fmt.Sprintf("--eth-peer=%d,%s", i, guestMACOf(i^1)))
	}
	var err error
	b.testpmd, err = startTestpmd(ctx, backendCPU, "net_vhost", c, vdevs, more)
	return b, err
}

func (b *vhostPMD) sockets() []string { return b.socks }

func (b *vhostPMD) start() error {
	_, err := b.set("set record-core-cycles on", "set txpkts "+txpkts(b.size), "set fwd "+b.mode, "start")
	return err
}

func (b *vhostPMD) mark() error {
	_, err := b.set("clear fwd stats all")
	return err
}

func (b *vhostPMD) costs() (cost, error) {
	s, err := b.set("show fwd stats all")
	if err != nil {
		return cost{}, err
	}
	f, err := parseFwdStats(s)
	return cost{moved: f.frames, busyNS: f.ns(), allocs: 0, dropped: float64(f.dropped)}, err
}
