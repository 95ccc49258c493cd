package vhostuser

import (
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/vhostuser/virtq"
)

// H048: a frontend sets up the ring behind the pairs without having negotiated
// a control queue. It never runs, and taking it away again harms nobody.
func TestLastRingWithoutControlQueue_H048(t *testing.T) {
	bothRings(t, testLastRingWithoutControlQueue_H048)
}

func testLastRingWithoutControlQueue_H048(t *testing.T) {
	noLeak(t)
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(plainFeats, 2)
	f.do(SetVringEnable, u32s(2, 1))
	f.start(2, 0)
	require.Len(t, f.ask(GetVringBase, u32s(2, 0)), 8)
	f.start(2, 0)
	f.do(SetFeatures, u64(plainFeats))
	f.do(SetMemTable, table([4]uint64{testGPA, testMem, testUVA, 0}), f.memfd)
	f.close()
	enginetest.Eventually(t, 5*time.Second, func() bool { return d.Status().State == Disconnected })
}

// Which ring is the control queue depends on a protocol feature. When that
// changes under running rings none is left behind in the data path, with
// memory that is gone.
func TestProtocolFeaturesChangeTheControlQueue(t *testing.T) {
	bothRings(t, testProtocolFeaturesChangeTheControlQueue)
}

func testProtocolFeaturesChangeTheControlQueue(t *testing.T) {
	d := newDevice(t, Config{QueuePairs: 2})
	f := connect(t, d)
	f.bringUp(ctrlFeats, 4)
	with := u64(offeredProtocol)
	without := u64(offeredProtocol &^ protoConfig)
	look := func() (inPath, built *virtq.Queue, ctrl *ring) {
		d.mu.Lock()
		defer d.mu.Unlock()
		rx := &d.pairs[1].rx
		rx.mu.Lock()
		defer rx.mu.Unlock()
		return rx.q, d.rings[2].q, d.ctrl.ring
	}
	q, _, _ := look()
	require.NotNil(t, q)
	f.do(SetProtocolFeatures, without) // ring 2 is the control queue now
	q, _, _ = look()
	require.Nil(t, q)
	f.do(SetMemTable, table([4]uint64{testGPA, testMem, testUVA, 0}), f.memfd)
	f.do(SetProtocolFeatures, with)
	q, built, ctrl := look()
	require.NotNil(t, q)
	require.Same(t, built, q)
	require.Nil(t, ctrl)
}

// A tx ring without a kick descriptor is looked at all the time (message 12,
// bit 8): nobody would wake the worker.
func TestRingWithoutKickIsPolled_H010(t *testing.T) { bothRings(t, testRingWithoutKickIsPolled_H010) }

func testRingWithoutKickIsPolled_H010(t *testing.T) {
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(plainFeats, 2)
	require.False(t, d.Pairs()[0].Arm())
	f.do(SetVringKick, u64(1|ringFDNone))
	require.True(t, d.Pairs()[0].Arm())
}

// A frontend that comes and goes all the time does not fill the log.
func TestConnectStormIsNotLogged_H116(t *testing.T) {
	var log logText
	d := newDevice(t, Config{Log: slog.New(slog.NewTextHandler(&log, nil))})
	for range 200 {
		connect(t, d).close()
		enginetest.Eventually(t, 5*time.Second, func() bool { return d.Status().State == Disconnected })
	}
	require.Less(t, strings.Count(log.String(), "\n"), 20, log.String())
}

// An rx ring whose index jumps is reported, wherever that is noticed (H049).
func TestBrokenRxRingIsReported_H049(t *testing.T) {
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.bringUp(plainFeats|featNotifyOnEmpty, 2)
	r := f.rings[0]
	r.recv(2000)
	r.recv(2000)
	const noInterrupt = 1 // so that the index is looked at when the ring is empty
	atomic.StoreUint32(r.word(availAt), 2<<16|noInterrupt)
	pushBytes(d, testFrame(100, 1))
	require.False(t, d.Status().Rings[0].Broken)
	atomic.StoreUint32(r.word(availAt), 5000<<16|noInterrupt)
	pushBytes(d, testFrame(100, 2))
	enginetest.Eventually(t, 5*time.Second, func() bool { return d.Status().Rings[0].Broken })
}
