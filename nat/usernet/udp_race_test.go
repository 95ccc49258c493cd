package usernet

import (
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

// TestMappingOpenedOnce: the guest begins with a port on several queues at once.
func TestMappingOpenedOnce(t *testing.T) {
	const many = 3
	w := newWorld(t, workers(many))
	host, at := hostUDP(t)
	batches := make([]*frame.Batch, many)
	for i := range batches {
		batches[i] = &frame.Batch{Worker: i}
	}
	for round := range uint16(100) {
		data := udpTo(45000+round, gateway(at.Port()), "x")
		var done sync.WaitGroup
		for _, b := range batches {
			done.Go(func() {
				b.Reset(w.now)
				b.Next().SetBytes(data, nil, nil)
				w.net.Process(b)
			})
		}
		done.Wait()
		require.Equal(t, int(round)+1, w.mappings())
		for range many {
			hears(t, host)
		}
	}
}

// TestConcurrentDatagrams: workers send and receive for each other's mappings.
func TestConcurrentDatagrams(t *testing.T) {
	const many = 3
	w := newWorld(t, workers(many))
	host, at := hostUDP(t)
	var done sync.WaitGroup
	for i := range many {
		done.Go(func() {
			b := &frame.Batch{Worker: i}
			q := w.net.Queue(i)
			for round := range 300 {
				b.Reset(w.now + int64(round)<<24)
				for k := range uint16(6) {
					b.Next().SetBytes(udpTo(46000+(k+uint16(round/50))%12, gateway(at.Port()), "x"), nil, nil)
				}
				for _, f := range inFragments(udpTo(46000, gateway(at.Port()), string(make([]byte, 100))), uint16(i), 48) {
					b.Next().SetBytes(f, nil, nil)
				}
				w.net.Process(b)
				b.Reset(w.now + int64(round)<<24)
				if q.Pull(b) > 0 {
					q.Release(b)
				}
			}
		})
	}
	stop := make(chan struct{})
	go func() {
		defer close(stop)
		buf := make([]byte, 2000)
		for {
			n, from, err := host.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = host.WriteTo(buf[:n], from)
		}
	}()
	done.Wait()
	host.Close()
	<-stop
	require.Equal(t, 11, w.mappings())
}
