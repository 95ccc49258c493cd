package vhostuser

import (
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// H061: another CPU of the guest rewrites header and payload while a frame is
// taken and worked on. What was checked stays as it was; the rest may be
// garbage.
func TestGuestRewritesFrames_H061(t *testing.T) { bothRings(t, testGuestRewritesFrames_H061) }

func testGuestRewritesFrames_H061(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{MTU: 1500})
	f := connect(t, d)
	f.bringUp(allOffloads&^featEventIdx, 2)
	tx := f.rings[1]
	payload := tcpFrame(1200)
	offloads := []frame.Offload{{}, enginetest.Partial(tcpFrame(1200)), enginetest.GSO(tcpFrame(1200), 500)}
	headers := make([][frame.VnetHdrMrgLen]byte, len(offloads))
	for i := range offloads {
		offloads[i].Encode(headers[i][:])
	}
	at := f.alloc(frame.VnetHdrMrgLen + len(payload))
	buf := f.mem[at:][:frame.VnetHdrMrgLen+len(payload)]
	copy(buf[frame.VnetHdrMrgLen:], payload)

	rng := rand.New(rand.NewPCG(6, 1))
	stop := make(chan struct{})
	var guest sync.WaitGroup
	guest.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			copy(buf, headers[rng.IntN(len(headers))][:])
			if rng.IntN(2) == 0 {
				binary.LittleEndian.PutUint16(buf[6:], uint16(rng.Uint32())) // csum_start
			}
			// The headers of the frame: lengths, protocols, offsets.
			i := rng.IntN(60)
			buf[frame.VnetHdrMrgLen+i] = payload[i] ^ byte(rng.IntN(2)*rng.IntN(256))
		}
	})
	defer guest.Wait()
	defer close(stop)

	var b frame.Batch
	var seg frame.Segmenter
	good, bad := 0, 0
	p := d.Pairs()[0]
	once := func() {
		turn.Lock()
		defer turn.Unlock()
		tx.takeAll()
		tx.post(guestBuf{at, len(buf), false})
		b.Reset(0)
		if p.Pull(&b) == 0 {
			bad++
			return
		}
		good++
		fr := b.Frame(0)
		was := fr.Offload
		n := int(fr.HeadLen)
		for _, s := range fr.Tail {
			n += len(s)
		}
		if n != int(fr.Len) || n != len(payload) {
			t.Fatalf("%d bytes, %d said", n, fr.Len)
		}
		if !fr.CheckOffload() || was != fr.Offload {
			t.Fatalf("passed as %+v, is not sound any more", was)
		}
		switch {
		case fr.GSO != frame.GSONone:
			if seg.Start(fr) {
				for s := seg.Next(); s != nil; s = seg.Next() {
				}
			}
		case fr.Flags&frame.NeedsCsum != 0:
			fr.CompleteChecksum()
		}
		_ = fr.ParseIPv4()
		p.Release(&b)
	}
	for range 100_000 {
		once()
	}
	require.NotZero(t, good)
	require.NotZero(t, bad)
	t.Logf("%d good, %d bad", good, bad)
	require.Equal(t, uint16(good+bad), tx.usedIdx(), "each buffer came back")
}
