package vhosttest

import (
	"net"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

func TestBelieveValid(t *testing.T) {
	const hdr = frame.VnetHdrMrgLen
	packet := func(flags byte, etherType uint16, change func(ip []byte)) []byte {
		m := make([]byte, hdr+etherLen+60)
		m[0] = flags
		m[hdr+12], m[hdr+13] = byte(etherType>>8), byte(etherType)
		change(m[hdr+etherLen:])
		return m
	}
	v4 := func(vihl, proto byte, frag ...byte) func([]byte) {
		return func(ip []byte) { ip[0], ip[9] = vihl, proto; copy(ip[6:], frag) }
	}
	v6 := func(next byte) func([]byte) { return func(ip []byte) { ip[0], ip[6] = 0x60, next } }
	for name, x := range map[string]struct {
		m    []byte
		want []byte // the first ten bytes, nil for unchanged
	}{
		"TCP":            {packet(2, 0x800, v4(0x45, 6)), []byte{1, 0, 0, 0, 0, 0, 34, 0, 16, 0}},
		"TCP, options":   {packet(2, 0x800, v4(0x46, 6)), []byte{1, 0, 0, 0, 0, 0, 38, 0, 16, 0}},
		"UDP, DF":        {packet(2, 0x800, v4(0x45, 17, 0x40)), []byte{1, 0, 0, 0, 0, 0, 34, 0, 6, 0}},
		"TCP over IPv6":  {packet(2, 0x86dd, v6(6)), []byte{1, 0, 0, 0, 0, 0, 54, 0, 16, 0}},
		"ICMP":           {packet(2, 0x800, v4(0x45, 1)), nil},
		"first fragment": {packet(2, 0x800, v4(0x45, 6, 0x20)), nil},
		"later fragment": {packet(2, 0x800, v4(0x45, 6, 0, 1)), nil},
		"ARP":            {packet(2, 0x806, v4(0x45, 6)), nil},
		"not said":       {packet(0, 0x800, v4(0x45, 6)), nil},
		"to be made":     {packet(3, 0x800, v4(0x45, 6)), nil},
		"cut":            {packet(2, 0x800, v4(0x45, 6))[:hdr+etherLen+20+17], nil},
		"short":          {packet(2, 0x800, v4(0x45, 17))[:hdr+etherLen+20+8], []byte{1, 0, 0, 0, 0, 0, 34, 0, 6, 0}},
		"IPv6 cut":       {packet(2, 0x86dd, v6(6))[:hdr+etherLen+39], nil},
	} {
		got := slices.Clone(x.m)
		believeValid(got, hdr)
		want := slices.Clone(x.m)
		copy(want, x.want)
		assert.Equal(t, want, got, name)
	}
}

// A guest takes a frame whose checksum is wrong, if the device has found it
// right.
func TestTapGuestBelievesTheDevice(t *testing.T) {
	ns, _ := mirroredGuest(t, &loopback{careless: true}, Options{Features: NoOffloads | FeatGuestCsum})
	pc, err := ns.ListenPacket("udp4", "192.0.2.1:7000")
	require.NoError(t, err)
	defer pc.Close()
	_, err = pc.WriteTo([]byte("hello"), &net.UDPAddr{IP: net.IPv4(192, 0, 2, 2), Port: 7000})
	require.NoError(t, err)
	require.NoError(t, pc.SetReadDeadline(time.Now().Add(soon)))
	var b [16]byte
	n, _, err := pc.ReadFrom(b[:])
	require.NoError(t, err)
	assert.Equal(t, "hello", string(b[:n]))
}
