package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"time"
)

// The frontend has a processor of its own, as the backend has.
const (
	backendCPU  = 0
	frontendCPU = 1
)

// maxPorts is RTE_MAX_ETHPORTS of the distributions' DPDK.
const maxPorts = 32

// learning is how long a switch has for the addresses of a cell that has many.
const learning = 3 * time.Second

// settle is how long frames flow before anything is counted.
const settle = 300 * time.Millisecond

// frontends play the guests: dpdk-testpmd with a virtio-user device for each
// socket, and several of them where one cannot have so many.
type frontends []frontend

type frontend struct {
	*testpmd
	ports int // that are guests
}

// guestMACOf is the address of the guest on port i.
func guestMACOf(i int) string { return fmt.Sprintf("02:00:00:00:aa:%02x", i) }

// startFrontends connects to the sockets of a backend.
func startFrontends(ctx context.Context, c cell, sockets []string, dir string) (fs frontends, err error) {
	defer func() {
		if err != nil {
			_ = fs.close()
		}
	}()
	base := 0
	for part := range slices.Chunk(sockets, maxPorts) {
		t, err := startFrontend(ctx, c, part, base, dir)
		if err != nil {
			return fs, err
		}
		fs = append(fs, frontend{t, len(part)})
		base += len(part)
	}
	return fs, nil
}

// startFrontend starts one testpmd, whose first port is the guest of number base.
func startFrontend(ctx context.Context, c cell, sockets []string, base int, dir string) (*testpmd, error) {
	packed := 0
	if c.Packed {
		packed = 1
	}
	var vdevs, more []string
	for i, s := range sockets {
		vdev := fmt.Sprintf("net_virtio_user%d,path=%s,queues=%d,queue_size=%d,packed_vq=%d,mrg_rxbuf=1,in_order=0,vectorized=0,mac=%s",
			i, s, c.Queues, ringSize, packed, guestMACOf(base+i))
		if c.Listens {
			vdev += ",server=1"
		}
		vdevs = append(vdevs, vdev)
		more = append(more, fmt.Sprintf("--eth-peer=%d,%s", i, guestMACOf((base+i)^1)))
	}
	if c.Path == roundTrip {
		more = append(more, "--port-topology=loop")
	}
	if c.GSO {
		files, err := gsoDevices(dir)
		if err != nil {
			return nil, err
		}
		t, err := startTestpmd(ctx, frontendCPU, "frontend", c, append(vdevs, files...), append(more, "--disable-device-start"))
		if err != nil {
			return nil, err
		}
		if err := t.allowGSO(len(sockets)); err != nil {
			return nil, errors.Join(err, t.close())
		}
		return t, nil
	}
	if c.FDB > 0 {
		for i := range 2 {
			file := filepath.Join(dir, fmt.Sprint("frames", i))
			if err := writeStations(file, c.FDB/2, c.Size, byte(i)); err != nil {
				return nil, err
			}
			vdevs = append(vdevs, fmt.Sprintf("net_pcap%d,rx_pcap=%s,infinite_rx=1", i, file))
		}
	}
	return startTestpmd(ctx, frontendCPU, "frontend", c, vdevs, more)
}

func (fs frontends) close() error {
	var errs []error
	for _, f := range fs {
		errs = append(errs, f.testpmd.close())
	}
	return errors.Join(errs...)
}

// begin lets the frames of a cell flow.
func (fs frontends) begin(c cell) error {
	size := "set txpkts " + txpkts(c.Size)
	var lines []string
	switch {
	case c.Path == roundTrip:
		return fs[0].beginRoundTrip(c)
	case c.GSO:
		return fs[0].beginGSO()
	case c.Path == guestTx:
		lines = []string{size, "set fwd txonly", "start"}
	case c.Path == guestRx:
		lines = []string{"set fwd rxonly", "start"}
	case c.FDB > 0:
		// What comes from a file goes to a guest's port, what comes from that to nowhere.
		lines = []string{"set fwd io", "set portlist 0,2,1,3", "start"}
	case c.Single:
		lines = []string{size, "set fwd io", "set burst 1", "start tx_first 1"}
	default:
		lines = []string{size, "set fwd io", fmt.Sprintf("start tx_first %d", inFlight)}
	}
	for _, f := range fs {
		if _, err := f.set(lines...); err != nil {
			return err
		}
	}
	return nil
}

// beginRoundTrip lets one frame go from port 0 to port 1, where it is sent
// back, and so on.
func (f frontend) beginRoundTrip(c cell) error {
	for range 5 {
		// It is sent before anybody forwards it.
		_, err := f.set("set txpkts "+txpkts(c.Size), "set fwd macswap", "set burst 1", "set portlist 0", "start tx_first 1",
			"stop", "set burst "+strconv.Itoa(burst), "set portlist 0,1", "start")
		if err != nil {
			return err
		}
		r, err := f.rates(f.ports, settle)
		if err != nil || r.rx > 0 {
			return err
		}
		// It was lost: a switch may have dropped the first one.
		if _, err := f.set("stop"); err != nil {
			return err
		}
	}
	return errors.New("no frame comes back")
}

// rates are those of all guests together.
func (fs frontends) rates(d time.Duration) (sum portRates, err error) {
	type answer struct {
		r   portRates
		err error
	}
	answers := make(chan answer)
	for _, f := range fs {
		go func() {
			r, err := f.rates(f.ports, d)
			answers <- answer{r, err}
		}()
	}
	for range fs {
		a := <-answers
		sum.add(a.r)
		err = errors.Join(err, a.err)
	}
	return sum, err
}

// frames is the frames a second that the frontend saw.
func (c cell) frames(r portRates) float64 {
	if c.Path == guestTx {
		return r.tx
	}
	return r.rx
}
