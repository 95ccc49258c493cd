package vhosttest

import (
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// testpmd is DPDK's forwarder: a backend that is not ours, with two devices
// that it joins queue by queue.
type testpmd struct {
	paths [2]string
	cmd   *exec.Cmd
	stdin io.Closer
	log   *os.File
}

// slowly is how long DPDK may take to start: it maps all its memory first.
const slowly = 20 * time.Second

// startTestpmd starts it with sockets in dir and waits until it listens.
func startTestpmd(t *testing.T, dir string, pairs int) *testpmd {
	t.Helper()
	program, err := enginetest.Program("dpdk-testpmd")
	require.NoError(t, err)
	p := &testpmd{paths: [2]string{filepath.Join(dir, "a.sock"), filepath.Join(dir, "b.sock")}}
	args := []string{"--no-huge", "--no-shconf", "-m", "128", "--no-pci", "--no-telemetry", "--file-prefix", filepath.Base(dir)}
	for i, path := range p.paths {
		_ = os.Remove(path) // left by one that was killed
		args = append(args, "--vdev", fmt.Sprintf("net_vhost%d,iface=%s,queues=%d", i, path, pairs))
	}
	q := fmt.Sprint(pairs)
	args = append(args, "--", "--forward-mode=io", "--auto-start", "--rxq="+q, "--txq="+q, "--nb-cores=1", "--total-num-mbufs=4096")
	p.cmd = exec.Command(program, args...)
	p.cmd.Env = append(os.Environ(), "XDG_RUNTIME_DIR="+dir, "HOME="+dir)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p.log, err = os.Create(filepath.Join(dir, "testpmd.log"))
	require.NoError(t, err)
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	p.stdin, err = p.cmd.StdinPipe() // its end would end testpmd
	require.NoError(t, err)
	require.NoError(t, p.cmd.Start())
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			b, _ := os.ReadFile(p.log.Name())
			t.Logf("%s", b)
		}
	})
	return p
}

// kill ends it as a crash does.
func (p *testpmd) kill() {
	if p.cmd.ProcessState == nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
		_ = p.log.Close()
	}
}

// udp is a frame with sound checksums and a number in its payload.
func udp(n, payload int) []byte {
	ip := enginetest.IP{Src: netip.MustParseAddr("10.0.2.2"), Dst: netip.MustParseAddr("10.0.2.3")}
	return enginetest.UDPFrame(enginetest.Eth{Dst: otherMAC, Src: guestMAC}, ip,
		enginetest.UDP{Src: 1000, Dst: uint16(2000 + n)}, enginetest.Payload(payload, byte(n)))
}

// settle waits until frames go from a to b on queue pair q, and leaves none
// under way. A forwarder drops what comes before its other side is ready.
func settle(t *testing.T, a, b *Guest, q int) {
	t.Helper()
	sent, got := 0, -1
	enginetest.Eventually(t, slowly, func() bool {
		require.NoError(t, a.Send(q, udp(sent, 100), frame.Offload{}))
		sent++
		p, err := b.Recv(q, 50*time.Millisecond)
		if err != nil {
			require.ErrorIs(t, err, ErrTimeout)
			return false
		}
		got = numberOf(p)
		return true
	})
	for got != sent-1 {
		p, err := b.Recv(q, soon)
		require.NoError(t, err)
		require.Greater(t, numberOf(p), got)
		got = numberOf(p)
	}
}

// numberOf is the number that udp put into the destination port.
func numberOf(p Packet) int { return int(p.Bytes[36])<<8 + int(p.Bytes[37]) - 2000 }

// exchange sends bursts of frames of many lengths both ways on every pair, and
// wants each of them back whole, once and in order.
func exchange(t *testing.T, g [2]*Guest, pairs, longest int) {
	t.Helper()
	for q := range pairs {
		settle(t, g[0], g[1], q)
		settle(t, g[1], g[0], q)
	}
	for round := range 4 {
		for q := range pairs {
			burst := g[0].Options.RingSize / 8
			for i := range 2 {
				var fs [][]byte
				for k := range burst {
					fs = append(fs, udp(k, 1+(round*977+k*211)%longest))
				}
				require.NoError(t, g[i].SendAll(q, fs...))
				for k, want := range fs {
					p, err := g[1-i].Recv(q, soon)
					require.NoError(t, err, "round %d, pair %d, frame %d", round, q, k)
					require.Equal(t, want, p.Bytes)
				}
				require.NoError(t, g[i].Drain(q, soon))
			}
		}
	}
}

// vhosttest against a backend that is not ours: DPDK's.
func TestGuestsOfTestpmd(t *testing.T) { bothRings(t, testGuestsOfTestpmd) }

func testGuestsOfTestpmd(t *testing.T) {
	enginetest.Need(t, "testpmd")
	p := startTestpmd(t, t.TempDir(), 2)
	both := func(o Options) (g [2]*Guest) {
		for i := range g {
			o.Path, o.Wait = p.paths[i], slowly
			g[i] = connect(t, o)
		}
		return g
	}
	for _, c := range []struct {
		name    string
		longest int
		o       Options
	}{
		{"two pairs", 3000, Options{QueuePairs: 2}},
		{"one pair", 1400, Options{Features: NoOffloads}},
		{"scattered", 1400, Options{QueuePairs: 2, RingSize: 64, Pieces: 3, SplitHeader: true, Indirect: true}},
		{"not mergeable", 1400, Options{QueuePairs: 2, Features: NoOffloads &^ FeatMrgRxbuf}},
		{"merged", 3000, Options{QueuePairs: 2, RxBufSize: 600}},
		{"legacy", 1400, Options{Features: LegacyFeatures}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if packedGuests && c.o.Features == LegacyFeatures {
				t.Skip("a legacy device has no packed rings")
			}
			g := both(c.o)
			exchange(t, g, g[0].Options.QueuePairs, c.longest)
			for i := range g {
				require.NoError(t, g[i].Stop())
				require.NoError(t, g[i].Resume())
			}
			exchange(t, g, g[0].Options.QueuePairs, c.longest)
			// The next case connects again to the same sockets.
			require.NoError(t, g[0].Close())
			require.NoError(t, g[1].Close())
		})
	}
}

// A backend that is killed and comes back finds the rings where they were.
func TestReconnectToTestpmd(t *testing.T) {
	enginetest.Need(t, "testpmd")
	dir := t.TempDir()
	p := startTestpmd(t, dir, 2)
	var g [2]*Guest
	for i := range g {
		g[i] = connect(t, Options{Path: p.paths[i], Wait: slowly, QueuePairs: 2})
	}
	exchange(t, g, 2, 1400)
	p.kill()
	for i := range g {
		require.True(t, g[i].Closed(soon))
	}
	startTestpmd(t, dir, 2)
	for i := range g {
		require.NoError(t, g[i].Reconnect())
	}
	exchange(t, g, 2, 1400)
}
