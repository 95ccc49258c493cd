package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// The frontend has a processor of its own, as the backend has.
const (
	backendCPU  = 0
	frontendCPU = 1
)

// guestMACOf is the address of the guest on port i.
func guestMACOf(i int) string { return fmt.Sprintf("02:00:00:00:aa:%02x", i) }

// startFrontend plays the guests: dpdk-testpmd with a virtio-user device for
// each socket.
func startFrontend(ctx context.Context, c cell, sockets []string) (*testpmd, error) {
	packed := 0
	if c.Packed {
		packed = 1
	}
	var vdevs, more []string
	for i, s := range sockets {
		vdevs = append(vdevs, fmt.Sprintf("net_virtio_user%d,path=%s,queues=%d,queue_size=%d,packed_vq=%d,mrg_rxbuf=1,in_order=0,vectorized=0,mac=%s",
			i, s, c.Queues, ringSize, packed, guestMACOf(i)))
		more = append(more, fmt.Sprintf("--eth-peer=%d,%s", i, guestMACOf(i^1)))
	}
	if c.Path == roundTrip {
		more = append(more, "--port-topology=loop")
	}
	return startTestpmd(ctx, frontendCPU, "frontend", c, vdevs, more)
}

// begin lets the frames of a cell flow.
func begin(fe *testpmd, c cell) error {
	if c.Path == roundTrip {
		return beginRoundTrip(fe, c)
	}
	var lines []string
	switch c.Path {
	case guestTx:
		lines = []string{"set txpkts " + txpkts(c.Size), "set fwd txonly", "start"}
	case guestRx:
		lines = []string{"set fwd rxonly", "start"}
	default:
		lines = []string{"set txpkts " + txpkts(c.Size), "set fwd io", fmt.Sprintf("start tx_first %d", inFlight)}
		if c.Single {
			lines = append([]string{"set burst 1"}, lines[0], lines[1], "start tx_first 1")
		}
	}
	_, err := fe.set(lines...)
	return err
}

// beginRoundTrip lets one frame go from port 0 to port 1, where it is sent
// back, and so on.
func beginRoundTrip(fe *testpmd, c cell) error {
	for range 5 {
		// It is sent before anybody forwards it.
		_, err := fe.set("set txpkts "+txpkts(c.Size), "set fwd macswap", "set burst 1", "set portlist 0", "start tx_first 1",
			"stop", "set burst "+strconv.Itoa(burst), "set portlist 0,1", "start")
		if err != nil {
			return err
		}
		r, err := fe.rates(settle)
		if err != nil || r.rx > 0 {
			return err
		}
		// It was lost: a switch may have dropped the first one.
		if _, err := fe.set("stop"); err != nil {
			return err
		}
	}
	return errors.New("no frame comes back")
}

// frames is the frames a second that the frontend saw.
func (c cell) frames(r portRates) float64 {
	switch c.Path {
	case guestTx:
		return r.tx
	default:
		return r.rx
	}
}

// settle is how long frames flow before anything is counted.
const settle = 300 * time.Millisecond
