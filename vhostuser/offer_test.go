package vhostuser

import (
	"testing"

	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

// The per-device switch withholds GSO towards the guest, and nothing else.
func TestNoGuestTSOWithholdsIt(t *testing.T) { bothRings(t, testNoGuestTSOWithholdsIt) }

func testNoGuestTSOWithholdsIt(t *testing.T) {
	offered := func(c Config) uint64 {
		f := connect(t, newDevice(t, c))
		return native.Uint64(f.ask(GetFeatures, nil))
	}
	const gso = featGuestTSO4 | featGuestTSO6 | featGuestECN
	with, without := offered(Config{}), offered(Config{NoGuestTSO: true})
	require.EqualValues(t, gso, with&gso)
	require.Zero(t, without&gso)
	require.Equal(t, with&^gso, without&^gso)
}

// H071: a frame that leaves its checksum to us is lost if CSUM was not
// negotiated.
func TestPartialChecksumNeedsCSUM_H071(t *testing.T) { bothRings(t, testPartialChecksumNeedsCSUM_H071) }

func testPartialChecksumNeedsCSUM_H071(t *testing.T) {
	partial := frame.Offload{Flags: frame.NeedsCsum, CsumStart: 34, CsumOffset: 6}
	b := make([]byte, 60)
	copy(b, testFrame(14, 1))
	b[12], b[13] = 8, 0                            // IPv4
	b[14], b[17], b[23] = 0x45, 46, frame.ProtoUDP // 46 bytes
	b[39] = 26
	for _, feats := range []uint64{plainFeats, plainFeats | featCSUM} {
		d := newDevice(t, Config{})
		f := connect(t, d)
		f.bringUp(feats, 2)
		f.rings[1].send(partial, 12, b)
		got, _ := pull(d.Pairs()[0])
		require.Equal(t, feats&featCSUM != 0, len(got) == 1, "%#x", feats)
	}
}

// NOTIFY_ON_EMPTY: the guest is told that its ring is empty although it wants
// no interrupts.
func TestNotifyOnEmpty(t *testing.T) { bothRings(t, testNotifyOnEmpty) }

func testNotifyOnEmpty(t *testing.T) {
	for _, extra := range []uint64{0, featNotifyOnEmpty} {
		d := newDevice(t, Config{})
		f := connect(t, d)
		f.bringUp(plainFeats|extra, 2)
		r := f.rings[1]
		r.signalled() // the one after SET_VRING_CALL
		r.send(frame.Offload{}, 12, testFrame(100, 1))
		noInterrupts := uint32(availAt)
		if f.packed {
			noInterrupts += 2
		}
		native.PutUint16(r.at(noInterrupts), 1)
		got, _ := pull(d.Pairs()[0])
		require.Len(t, got, 1)
		require.Equal(t, extra != 0, r.signalled())
	}
}

// A legacy driver sets its address through the configuration space.
func TestLegacyDriverSetsItsMAC(t *testing.T) { bothRings(t, testLegacyDriverSetsItsMAC) }

func testLegacyDriverSetsItsMAC(t *testing.T) {
	d := newDevice(t, Config{})
	f := connect(t, d)
	f.negotiate(featProtocolFeatures)
	mac := []byte{2, 0, 0, 0, 7, 7}
	f.do(SetConfig, append(u32s(cfgMAC, 6, 0), mac...))
	got := f.ask(GetConfig, append(u32s(cfgMAC, 6, 0), make([]byte, 6)...))
	require.Equal(t, mac, got[configLen:])
	require.Equal(t, frame.MAC(mac).String(), d.Status().MAC)
}
