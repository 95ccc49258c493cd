package stream

import (
	"bytes"
	"encoding/binary"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// parsed is what a stream of bytes means, by the obvious implementation.
func parsed(b []byte, mtu int) (fs [][]byte, short, oversize, bad uint64, rest int) {
	for len(b) >= 4 {
		n := int(binary.BigEndian.Uint32(b))
		if n == 0 || n > frame.MaxLen {
			return fs, short, oversize, 1, 0
		}
		if len(b) < 4+n {
			break
		}
		switch {
		case n < 14:
			short++
		case n > mtu+18:
			oversize++
		default:
			fs = append(fs, b[4:4+n])
		}
		b = b[4+n:]
	}
	return fs, short, oversize, 0, len(b)
}

// FuzzStream is a peer that sends any bytes, cut in any pieces: the first byte
// says how long these are, and how often the worker looks.
func FuzzStream(f *testing.F) {
	const mtu = 1500
	add := func(cut byte, parts ...[]byte) { f.Add(append([]byte{cut}, slices.Concat(parts...)...)) }
	a, b, long := framed(testFrame(60, 1)), framed(testFrame(14, 2)), framed(testFrame(1518, 3))
	add(0, a, b, long)
	add(1, a, b)                                                                          // H003: a byte at a time
	add(7, a, b, long, a, a)                                                              // over odd pieces
	add(0, a, []byte{0, 0, 0, 0}, b)                                                      // H001: length 0
	add(0, a, []byte{0xff, 0xff, 0xff, 0xff}, b)                                          // H001: longest length
	add(3, binary.BigEndian.AppendUint32(nil, frame.MaxLen+1), b)                         // H001: one too long
	add(0, binary.BigEndian.AppendUint32(nil, frame.MaxLen), make([]byte, 100))           // H004: cut frame
	add(0, a, []byte{0, 0, 0})                                                            // H004: cut length
	add(0, framed(testFrame(1, 1)), framed(testFrame(13, 1)), b)                          // H055: short frames
	add(50, framed(testFrame(1519, 1)), framed(testFrame(9000, 1)), b)                    // H074: long frames
	add(200, bytes.Repeat(b, 300), bytes.Repeat(framed([]byte{1}), 300), a)               // more than a batch
	add(255, framed(testFrame(frame.MaxLen, 1)), bytes.Repeat(long, 200), []byte{1, 2})   // more than a buffer
	add(0, bytes.Repeat(framed(make([]byte, frame.MaxLen)), 5), a, []byte{0, 1, 0, 0, 9}) // the longest ones
	d := newDevice(f, Config{MTU: mtu})
	var batch frame.Batch
	f.Fuzz(func(t *testing.T, in []byte) {
		if len(in) < 1 {
			return
		}
		piece, in := int(in[0]), in[1:]
		if piece == 0 {
			piece = max(1, len(in))
		}
		before := d.Status()
		q := connect(t, d)
		defer q.c.Close()
		raw, err := q.c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		want, short, oversize, bad, rest := parsed(in, mtu)
		got := 0
		look := func() {
			batch.Reset(0)
			n := d.Pull(&batch)
			if n != batch.Len() || n > frame.BatchSize {
				t.Fatalf("%d frames, %d in the batch", n, batch.Len())
			}
			for i := range n {
				fr := batch.Frame(i)
				if got == len(want) {
					t.Fatal("more frames than were sent")
				}
				if !bytes.Equal(fr.Bytes(), want[got]) || int(fr.HeadLen) != min(frame.HeadSize, len(want[got])) || fr.Offload != (frame.Offload{}) {
					t.Fatalf("frame %d is another one", got)
				}
				got++
			}
			d.Release(&batch)
		}
		for sent := 0; sent < len(in); {
			n, err := -1, error(nil)
			if e := raw.Control(func(fd uintptr) {
				n, err = unix.SendmsgN(int(fd), in[sent:min(sent+piece, len(in))], nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
			}); e != nil {
				t.Fatal(e)
			}
			switch {
			case err == unix.EAGAIN:
				look()
			case err != nil:
				sent = len(in) // it was hung up on us
			default:
				sent += n
			}
			if piece%3 == 0 {
				look()
			}
		}
		if err := q.c.CloseWrite(); err != nil && bad == 0 {
			t.Fatal(err)
		}
		for end := time.Now().Add(10 * time.Second); d.Status().Connected; look() {
			runtime.Gosched()
			if time.Now().After(end) {
				t.Fatal("the connection does not end")
			}
		}
		after := d.Status()
		delta := func(m func(Status) uint64) uint64 { return m(after) - m(before) }
		for _, c := range []struct {
			name string
			want uint64
			of   func(Status) uint64
		}{
			{"frames", uint64(len(want)), func(s Status) uint64 { return s.TxFrames }},
			{"short", short, func(s Status) uint64 { return s.Drops["short_frame"] }},
			{"oversize", oversize, func(s Status) uint64 { return s.Drops["oversize_frame"] }},
			{"bad", bad, func(s Status) uint64 { return s.Counters["bad_length"] }},
			{"cut", uint64(min(rest, 1)), func(s Status) uint64 { return s.Counters["cut_frames"] }},
		} {
			if n := delta(c.of); n != c.want {
				t.Fatalf("%s: %d, want %d", c.name, n, c.want)
			}
		}
		if got != len(want) {
			t.Fatalf("%d frames, want %d", got, len(want))
		}
	})
}

// FuzzFraming pushes batches of frames to a peer that reads as it likes. Each
// pair of bytes is one thing that happens. Whatever does, the peer sees whole
// frames, and exactly those that were not dropped.
func FuzzFraming(f *testing.F) {
	f.Add([]byte{0, 10, 0, 20, 0x80, 5, 0, 255})
	f.Add(bytes.Repeat([]byte{63, 200}, 40))                                 // nobody reads
	f.Add(bytes.Repeat([]byte{63, 255, 0x80, 1}, 40))                        // a byte at a time
	f.Add(bytes.Repeat([]byte{63, 255, 0x81, 99, 0xc0, 0, 7, 77}, 30))       // more than goes through
	f.Add(bytes.Repeat([]byte{5, 255, 9, 250, 0xff, 255, 0xc0, 1, 1, 3}, 9)) // the longest ones
	d := newDevice(f, Config{})
	var batch frame.Batch
	f.Fuzz(func(t *testing.T, ops []byte) {
		if len(ops) > 400 {
			return
		}
		q := connect(t, d)
		defer func() {
			q.c.Close()
			for d.Status().Connected {
				batch.Reset(0)
				d.Pull(&batch)
				runtime.Gosched()
			}
		}()
		raw, err := q.c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var want, got bytes.Buffer
		read := func(n int) (more bool) {
			b := make([]byte, n)
			if e := raw.Control(func(fd uintptr) { n, _, err = unix.Recvfrom(int(fd), b, unix.MSG_DONTWAIT) }); e != nil {
				t.Fatal(e)
			}
			if err != nil {
				return false
			}
			got.Write(b[:n])
			return n > 0
		}
		for ; len(ops) >= 2; ops = ops[2:] {
			switch op, arg := ops[0], ops[1]; {
			case op < 0x80:
				var bs [][]byte
				for i := range 1 + int(op)%64 {
					bs = append(bs, testFrame(min(frame.MaxLen, 14+int(arg)*(1+int(op)%7*(i%40))), byte(i)))
				}
				fs := frames(bs...)
				d.Push(0, fs)
				for i, fr := range fs {
					switch fr.Reason {
					case frame.ReasonNone:
						b := bs[i]
						if len(b) < minWire {
							b = append(b, make([]byte, minWire-len(b))...)
						}
						want.Write(framed(b))
					case frame.NoBuffer:
					default:
						t.Fatal(fr.Reason)
					}
				}
			case op < 0xc0:
				read(1 + int(op&0x3f)*int(arg)*8)
			default:
				batch.Reset(0)
				if d.Pull(&batch) != 0 {
					t.Fatal("frames from nowhere")
				}
			}
			if len(d.rx.rest) > lenSize+frame.MaxLen || d.rx.waits.Load() != (len(d.rx.rest) > 0) {
				t.Fatal("something else waits")
			}
		}
		for end := time.Now().Add(10 * time.Second); read(1<<20) || d.rx.waits.Load(); {
			if time.Now().After(end) {
				t.Fatal("it never ends")
			}
			batch.Reset(0)
			d.Pull(&batch)
		}
		if !bytes.Equal(want.Bytes(), got.Bytes()) {
			t.Fatalf("%d bytes of the stream, want %d, or others", got.Len(), want.Len())
		}
	})
}
