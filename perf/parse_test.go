package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func readFile(t *testing.T, parts ...string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(parts...))
	require.NoError(t, err)
	return b
}

func TestParseTestpmdRates(t *testing.T) {
	s := string(readFile(t, "testdata", "port-stats.txt"))
	r, err := parseRates(s, 2)
	require.NoError(t, err)
	assert.Equal(t, portRates{rx: 4017525 + 4017573, tx: 4017557 + 4017541, rxBits: 2056973040 + 2056997528}, r)
	r, err = parseRates(s, 1)
	require.NoError(t, err)
	assert.Equal(t, portRates{rx: 4017525, tx: 4017557, rxBits: 2056973040}, r)
	_, err = parseRates(s, 3)
	assert.ErrorContains(t, err, "no rates of 3 ports")
	_, err = parseRates("", 1)
	assert.Error(t, err)
}

func TestParseTestpmdForwardStats(t *testing.T) {
	f, err := parseFwdStats(string(readFile(t, "testdata", "fwd-stats.txt")))
	require.NoError(t, err)
	assert.Equal(t, fwdStats{frames: 16082720, cycles: 298.85, mhz: 2450, dropped: 7}, f)
	assert.InDelta(t, 121.98, f.ns(), 0.01)
	_, err = parseFwdStats("testpmd> ")
	assert.Error(t, err)
}

func TestParseOVSStats(t *testing.T) {
	s := string(readFile(t, "testdata", "pmd-stats.txt"))
	frames, ns, err := parsePMDStats(s, 2*time.Second)
	require.NoError(t, err)
	assert.Equal(t, 10e6, frames)
	assert.InDelta(t, 150, ns, 0.001, "three quarters of two seconds, for ten million frames")
	_, _, err = parsePMDStats(strings.Replace(s, "received: 10000000", "received: 0", 1), time.Second)
	assert.ErrorContains(t, err, "received nothing")
	_, _, err = parsePMDStats("", time.Second)
	assert.Error(t, err)
}

func TestParseIperf(t *testing.T) {
	s, err := parseIperf([]byte(`{"end": {"sum_received": {"bits_per_second": 8e9, "seconds": 2}}}`))
	require.NoError(t, err)
	assert.Equal(t, iperfSum{BitsPerSecond: 8e9, Seconds: 2}, s)
	s, err = parseIperf([]byte(`{"end": {"sum": {"packets": 100, "lost_packets": 30, "seconds": 2}, "sum_received": {"packets": 70}}}`))
	require.NoError(t, err)
	assert.Equal(t, iperfSum{Seconds: 2, Packets: 100, Lost: 30}, s)
	_, err = parseIperf([]byte(`{"error": "unable to connect"}`))
	assert.ErrorContains(t, err, "unable to connect")
	_, err = parseIperf(nil)
	assert.Error(t, err)
}

func TestParseProcessorTimes(t *testing.T) {
	s, err := parseProcessTime("12 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20 0 1 0\n")
	require.NoError(t, err)
	assert.Equal(t, 3.0, s)
	for _, bad := range []string{"", "12 (a) S 1 2", "12 (a) S 1 2 3 4 5 6 7 8 9 10 x 50 0"} {
		_, err := parseProcessTime(bad)
		assert.Error(t, err, bad)
	}
	// user nice system idle iowait irq softirq steal guest guest_nice
	assert.Equal(t, 21.5, parseBusy("cpu  1000 100 900 5000 70 50 50 50 40 30\ncpu0 1 1 1 1 1 1 1 1 1 1\n"))
}

func TestSummaryOfRequests(t *testing.T) {
	var times []time.Duration
	for i := range 101 {
		times = append(times, time.Duration(101-i)*time.Microsecond)
	}
	assert.Equal(t, asked{Ops: 101, Seconds: 2, P50: 51, P99: 100}, summary(times, 2*time.Second))
}

func TestParseBenchmarks(t *testing.T) {
	b, err := parseBench(strings.NewReader("pkg: sidewire/nat\nBenchmarkFlow/new-2   \t 100\t  12.5 ns/op\t 0 B/op\nBenchmarkFlow/new-2 100 13.5 ns/op\nBenchmarkIPv4-6 1 1 ns/op\nPASS\n" +
		"pkg: sidewire/engine\nBenchmarkTurn \t 1\t 7 ns/op 12 MB/s\n"))
	require.NoError(t, err)
	assert.Equal(t, map[string][]float64{
		"sidewire/nat BenchmarkFlow/new": {12.5, 13.5}, "sidewire/nat BenchmarkIPv4": {1}, "sidewire/engine BenchmarkTurn": {7},
	}, b)
	var out strings.Builder
	require.NoError(t, compare(&out, map[string][]float64{"a": {10, 20, 30}}, map[string][]float64{"a": {10}, "b": {1}}))
	assert.Contains(t, out.String(), "a          20.0 (10.0-30.0)  10.0    0.50")
	assert.Contains(t, out.String(), "b                            1.00")
}

func TestTxpkts(t *testing.T) {
	for size, want := range map[int]string{64: "64", 2048: "2048", 2049: "2048,1", 9000: "2048,2048,2048,2048,808"} {
		assert.Equal(t, want, txpkts(size))
	}
}

// The lists of a pair of ports name each other's stations.
func TestStations(t *testing.T) {
	dir := t.TempDir()
	const n, size = 100, 64
	seen := map[byte]map[string]bool{}
	for port := range byte(2) {
		path := filepath.Join(dir, "f")
		require.NoError(t, writeStations(path, n, size, port))
		b := readFile(t, path)
		require.Len(t, b, 24+n*(16+size))
		for b = b[24:]; len(b) > 0; b = b[16+size:] {
			for at, p := range map[int]byte{16: 1 - port, 22: port} {
				if seen[p] == nil {
					seen[p] = map[string]bool{}
				}
				seen[p][string(b[at:at+6])] = true
			}
		}
	}
	assert.Len(t, seen[0], n)
	assert.Len(t, seen[1], n)
}

func TestMatrix(t *testing.T) {
	titles := map[string]bool{}
	for _, c := range packetCells(false) {
		assert.False(t, titles[c.String()], "%v twice", c)
		titles[c.String()] = true
	}
	for _, c := range packetCells(true) {
		assert.True(t, titles[c.String()], "%v is in the quick matrix only", c)
	}
	assert.Equal(t, "guest to guest, 64 B, packed, 2 queues", cell{Path: guestToGuest, Size: 64, Packed: true, Queues: 2}.String())
}
