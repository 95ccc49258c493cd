package uplink

import (
	"fmt"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

const (
	sendMax = 64   // messages in one sendmmsg
	iovMax  = 1024 // UIO_MAXIOV: pieces of one message
	// waitMax bounds how long, in milliseconds, a worker waits for room in a
	// socket's buffer before it drops what it has.
	waitMax = 2
)

// sender is the sending socket of one worker.
type sender struct {
	fd     int
	hdrLen int
	n      int // messages staged
	niov   int // pieces staged
	msgs   [sendMax]mmsghdr
	frames [sendMax]*frame.Frame
	hdrs   [sendMax][frame.VnetHdrMrgLen]byte
	iovs   [iovMax]unix.Iovec
	flat   []byte // for a frame of too many pieces
}

func newSender(link int, mark uint32) (*sender, error) {
	fd, err := packetSocket(link)
	if err != nil {
		return nil, err
	}
	s := &sender{fd: fd}
	if s.hdrLen, err = setVnetHdr(fd); err == nil && mark != 0 {
		if err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(mark)); err != nil {
			err = fmt.Errorf("SO_MARK: %w", privilege(err, "CAP_NET_ADMIN"))
		}
	}
	if err == nil {
		// Protocol 0 receives nothing.
		err = bindPacket(fd, link, 0)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	setBuf(fd, unix.SO_SNDBUFFORCE, unix.SO_SNDBUF, sndBuf)
	return s, nil
}

func (s *sender) push(fs []*frame.Frame) {
	for _, f := range fs {
		need := 2 + len(f.Tail)
		if need > iovMax {
			s.flush()
			need = 3
		}
		if s.n == sendMax || s.niov+need > iovMax {
			s.flush()
		}
		s.stage(f)
	}
	s.flush()
}

// stage adds a frame to what flush sends, in pieces as they lie.
func (s *sender) stage(f *frame.Frame) {
	hdr := s.hdrs[s.n][:s.hdrLen]
	encode(f, hdr)
	iov := s.iovs[s.niov:]
	setIov(&iov[0], hdr)
	setIov(&iov[1], f.Head[:f.HeadLen])
	n := 2
	if 2+len(f.Tail) > iovMax {
		// There is room for one such frame at a time: push flushes before.
		if s.flat == nil {
			s.flat = make([]byte, frame.MaxLen)
		}
		setIov(&iov[n], flatten(s.flat, f))
		n++
	} else {
		for _, t := range f.Tail {
			if len(t) > 0 {
				setIov(&iov[n], t)
				n++
			}
		}
	}
	m := &s.msgs[s.n].hdr
	m.Iov = &iov[0]
	m.SetIovlen(n)
	s.frames[s.n] = f
	s.n++
	s.niov += n
}

// encode writes the header that the kernel is to see.
func encode(f *frame.Frame, hdr []byte) {
	o := f.Offload
	o.Flags &= frame.NeedsCsum
	o.HdrLen = 0
	if o.GSOType() != frame.GSONone {
		// The kernel keeps this much in one piece, and trusts no guest's hint.
		o.HdrLen = o.CsumStart + 8
		if at := int(o.CsumStart) + 12; o.GSOType() != frame.GSOUDPL4 && at < int(f.HeadLen) {
			o.HdrLen = o.CsumStart + uint16(f.Head[at]>>4)*4
		}
	}
	o.Encode(hdr)
}

// flatten copies the tail of a frame that has more pieces than one message
// may have to flat.
func flatten(flat []byte, f *frame.Frame) []byte {
	n := 0
	for _, t := range f.Tail {
		n += copy(flat[n:], t)
	}
	return flat[:n]
}

// flush sends what is staged. A frame that the kernel refuses is marked and
// passed over; the order of the others stays.
func (s *sender) flush() {
	for i, waited := 0, 0; i < s.n; {
		n, errno := sendmmsg(s.fd, s.msgs[i:s.n])
		switch errno {
		case 0:
			i += n
		case unix.EINTR:
		case unix.EAGAIN:
			if waited < waitMax {
				waited++
				poll(s.fd, unix.POLLOUT, 1)
				continue
			}
			i = s.fail(i, s.n)
		case unix.ENETDOWN, unix.ENXIO, unix.ENODEV, unix.EBADF:
			i = s.fail(i, s.n)
		default: // this frame: too long, no room in the device's queue, memory gone
			i = s.fail(i, i+1)
		}
	}
	// What was lent may be unmapped once the frames are given back.
	clear(s.iovs[:s.niov])
	clear(s.frames[:s.n])
	s.n, s.niov = 0, 0
}

// fail marks the frames from i to end as not sent and returns end.
func (s *sender) fail(i, end int) int {
	for _, f := range s.frames[i:end] {
		f.Drop(frame.SendFailed)
	}
	return end
}
