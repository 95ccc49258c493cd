package main

import (
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The frames of a GSO cell are whole TCP segments of as many pieces as fit.
func TestGSOFrame(t *testing.T) {
	b := gsoFrame()
	p := gopacket.NewPacket(b, layers.LayerTypeEthernet, gopacket.Default)
	require.Nil(t, p.ErrorLayer())
	ip := p.Layer(layers.LayerTypeIPv4).(*layers.IPv4)
	assert.EqualValues(t, len(b)-14, ip.Length)
	assert.Greater(t, int(ip.Length)+gsoMSS, 65535, "one more would not fit")
	assert.Len(t, p.Layer(layers.LayerTypeTCP).(*layers.TCP).Payload, gsoSegments*gsoMSS)
	sum := ip.Checksum
	out := gopacket.NewSerializeBuffer()
	require.NoError(t, ip.SerializeTo(out, gopacket.SerializeOptions{ComputeChecksums: true}))
	assert.Equal(t, ip.Checksum, sum)
}

func TestGSODevices(t *testing.T) {
	dir := t.TempDir()
	vdevs, err := gsoDevices(dir)
	require.NoError(t, err)
	require.Len(t, vdevs, 2)
	assert.Equal(t, "net_pcap1,rx_pcap="+filepath.Join(dir, "frames1"), vdevs[1])
	assert.Len(t, readFile(t, dir, "frames0"), 24+gsoInFlight*(16+gsoSize))
	assert.Len(t, readFile(t, dir, "frames1"), 24+16+64)
}

func TestFindRival(t *testing.T) {
	r, err := findRival("")
	require.NoError(t, err)
	assert.Equal(t, rival{}, r)
	dir := t.TempDir()
	r, err = findRival(dir)
	require.NoError(t, err)
	assert.Equal(t, rival{sidewire: sidewirePath, perf: perfPath, source: dir}, r)
	program, err := exec.LookPath("go")
	require.NoError(t, err)
	for name, want := range map[string]string{filepath.Join(dir, "gone"): "no such file", program: "is built from cmd/go"} {
		_, err = findRival(name)
		assert.ErrorContains(t, err, want)
	}

	cells := map[string]cell{"between": {Path: guestToGuest, Queues: 1}, "alone": {Path: guestTx, Queues: 1}}
	for _, c := range []struct {
		r       rival
		between bool
		alone   bool
	}{{rival{}, false, false}, {rival{sidewire: "x"}, true, false}, {rival{perf: "x"}, false, true}} {
		p := &programs{against: c.r}
		assert.Equal(t, c.between, slices.Contains(cells["between"].subjects(p, false), other))
		assert.Equal(t, c.alone, slices.Contains(cells["alone"].subjects(p, false), other))
	}
}
