package stream

import (
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
)

// quiet is a log for nobody.
var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

func newDevice(t testing.TB, c Config) *Device {
	t.Helper()
	if c.Log == nil {
		c.Log = quiet
	}
	if c.Path == "" {
		c.Path = filepath.Join(t.TempDir(), "s")
	}
	c.Name = "test"
	d, err := New(c)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, d.Close()) })
	return d
}

// qemu plays QEMU.
type qemu struct {
	t testing.TB
	d *Device
	c *net.UnixConn
}

// connect makes a QEMU that the device is connected to already.
func connect(t testing.TB, d *Device) *qemu {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	f := os.NewFile(uintptr(fds[0]), "")
	c, err := net.FileConn(f)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	d.mu.Lock()
	_, err = d.begin(fds[1])
	d.mu.Unlock()
	require.NoError(t, err)
	q := &qemu{t: t, d: d, c: c.(*net.UnixConn)}
	t.Cleanup(func() { q.c.Close() })
	return q
}

// dial connects to the device's socket.
func dial(t testing.TB, d *Device) *qemu {
	t.Helper()
	var c net.Conn
	enginetest.Eventually(t, 5*time.Second, func() bool {
		var err error
		c, err = net.Dial("unix", d.cfg.Path)
		return err == nil
	})
	q := &qemu{t: t, d: d, c: c.(*net.UnixConn)}
	t.Cleanup(func() { q.c.Close() })
	return q
}

// write sends bytes as they are.
func (q *qemu) write(b ...byte) {
	q.t.Helper()
	require.NoError(q.t, q.c.SetWriteDeadline(time.Now().Add(10*time.Second)))
	_, err := q.c.Write(b)
	require.NoError(q.t, err)
}

// send sends frames.
func (q *qemu) send(frames ...[]byte) {
	q.t.Helper()
	for _, f := range frames {
		q.write(framed(f)...)
	}
}

// read returns the next frame.
func (q *qemu) read() []byte {
	q.t.Helper()
	require.NoError(q.t, q.c.SetReadDeadline(time.Now().Add(10*time.Second)))
	var head [lenSize]byte
	_, err := io.ReadFull(q.c, head[:])
	require.NoError(q.t, err)
	n := binary.BigEndian.Uint32(head[:])
	require.LessOrEqual(q.t, n, uint32(frame.MaxLen))
	b := make([]byte, n)
	_, err = io.ReadFull(q.c, b)
	require.NoError(q.t, err)
	return b
}

// expectEnd requires that the device closes the connection.
func (q *qemu) expectEnd() {
	q.t.Helper()
	require.NoError(q.t, q.c.SetReadDeadline(time.Now().Add(10*time.Second)))
	_, err := io.Copy(io.Discard, q.c)
	if err != nil {
		require.ErrorIs(q.t, err, unix.ECONNRESET)
	}
}

// framed is a frame as it lies in the stream.
func framed(f []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(f))), f...)
}

// testFrame is n bytes that are like no others.
func testFrame(n int, seed byte) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7) + byte(i>>8) + seed*31
	}
	if n >= frame.EthernetLen {
		b[12], b[13] = 0x88, 0xb5 // for experiments (IEEE 802)
	}
	return b
}

// pull pulls one batch and returns copies of its frames.
func pull(d *Device) [][]byte {
	var b frame.Batch
	n := d.Pull(&b)
	if n != b.Len() {
		panic("wrong number of frames")
	}
	var out [][]byte
	for i := range n {
		out = append(out, b.Frame(i).Bytes())
	}
	d.Release(&b)
	return out
}

// pullN pulls until there are n frames.
func pullN(t testing.TB, d *Device, n int) (out [][]byte) {
	t.Helper()
	enginetest.Eventually(t, 10*time.Second, func() bool {
		out = append(out, pull(d)...)
		return len(out) >= n
	})
	require.Len(t, out, n)
	return out
}

// frames makes frames of bytes, as a port would lend them.
func frames(bs ...[]byte) []*frame.Frame {
	var fs []*frame.Frame
	for _, b := range bs {
		f := new(frame.Frame)
		f.SetBytes(b, nil, make([][]byte, 1))
		f.Out = 7
		fs = append(fs, f)
	}
	return fs
}

// disconnected waits until the device is, which its worker finds out.
func disconnected(t testing.TB, d *Device) {
	t.Helper()
	enginetest.Eventually(t, 10*time.Second, func() bool {
		pull(d)
		return !d.Status().Connected
	})
}

// serve runs Serve until the test ends, and requires that it ends well.
func serve(t *testing.T, d *Device) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- d.Serve(t.Context()) }()
	t.Cleanup(func() { require.NoError(t, <-done) })
}

// noLeak checks at the end of the test that all descriptors and goroutines are
// back. It is called before anything is made.
func noLeak(t *testing.T) {
	t.Helper()
	// The runtime's poller opens its own descriptors at the first use.
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	for _, fd := range fds {
		f := os.NewFile(uintptr(fd), "")
		c, err := net.FileConn(f)
		require.NoError(t, errors.Join(err, f.Close(), c.Close()))
	}
	count := func() (int, int) {
		es, err := os.ReadDir("/proc/self/fd")
		require.NoError(t, err)
		return len(es), runtime.NumGoroutine()
	}
	had, ran := count()
	t.Cleanup(func() {
		var has, runs int
		enginetest.Wait(5*time.Second, func() bool {
			has, runs = count()
			return has <= had && runs <= ran
		})
		assert.LessOrEqual(t, has, had, "descriptors")
		assert.LessOrEqual(t, runs, ran, "goroutines")
	})
}
