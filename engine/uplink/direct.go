package uplink

import (
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Room lends a guest's rx buffers to receive into. A frame lies in buffers
// that follow each other, from the start of one on; their first skipLen bytes
// stay free. All calls of a turn are one reservation.
type Room interface {
	// Reserve adds buffers until there are up to most bytes behind the first
	// skip buffers, and returns all of the reservation; nil if there are less
	// than least.
	Reserve(skip, least, most int) [][]byte
	// Keep takes back all buffers but the first n, which hold frames. Keep(0)
	// ends the reservation.
	Keep(n int)
	// Free ends the reservation, and takes back those of frames that were not
	// delivered.
	Free()
}

const (
	// skipLen is what of a frame in a guest's buffers is written at the end:
	// the virtio_net_hdr and the private head.
	skipLen = frame.VnetHdrMrgLen + frame.HeadSize
	// roomFor is what the longest frame may need.
	roomFor = frame.VnetHdrMrgLen + frame.MaxLen
	// roomMore is how much is reserved at once when there are many frames.
	roomMore = 4 * roomFor
	// directMax is how many frames a Pull receives into a guest's buffers.
	directMax = 16
	// A queue receives into the guest's buffers while the frames are long: of
	// short ones many come by one call into the arena, and cost little to copy.
	longMean  = 4096
	shortMean = 2048
	// directIovs is the pieces of one message.
	directIovs = 256
)

// direct is what a queue needs to receive straight into a guest's buffers. The
// socket gets what the rules take for this guest's, see setApart.
type direct struct {
	room Room
	long bool // the last frames were
	lent bool // a reservation is under way
	msg  unix.Msghdr
	iovs [directIovs]unix.Iovec
}

// SetRoom lets the queue receive into a guest's buffers. It is called before a
// worker uses the queue, and only for the one that Config.Direct sets apart.
func (q *Queue) SetRoom(r Room) { q.direct = &direct{room: r} }

// pullDirect receives into the guest's buffers. It reports false if there are
// none to be had; the frames then wait still.
func (q *Queue) pullDirect(b *frame.Batch) (n int, ok bool) {
	d := q.direct
	used, bytes := 0, 0
	bufs := d.room.Reserve(0, roomFor, roomFor)
	ok = bufs != nil
	for ok && n < directMax {
		if n > 0 && !holds(bufs[used:], roomFor) {
			if bufs = d.room.Reserve(used, roomFor, roomMore); bufs == nil {
				break
			}
		}
		size, errno := q.receive(b, bufs[used:])
		if errno == unix.EAGAIN {
			q.drained = true
			break
		}
		if errno != 0 {
			// The memory may be gone: who copies there notices.
			d.long = false
			break
		}
		f := b.Frame(n)
		f.RxAt = uint16(used)
		used += int(f.RxBufs)
		bytes += size
		n++
	}
	d.room.Keep(used)
	d.lent = used > 0
	if n > 0 && bytes < n*shortMean {
		d.long = false
	}
	return n, ok
}

// holds says whether the buffers have room for n bytes.
func holds(bufs [][]byte, n int) bool {
	for _, b := range bufs {
		if n -= len(b); n <= 0 {
			return true
		}
	}
	return false
}

// receive takes one message from the socket and makes it the next frame.
func (q *Queue) receive(b *frame.Batch, bufs [][]byte) (size int, errno unix.Errno) {
	d, i := q.direct, b.Len()
	setIov(&d.iovs[0], q.hdrs[i][:q.hdrLen])
	setIov(&d.iovs[1], b.Frame(i).Head[:])
	niov := 2
	at, skip := behindHead(bufs)
	for room := frame.MaxLen - frame.HeadSize; at < len(bufs) && room > 0 && niov < directIovs; at++ {
		p := bufs[at][skip:]
		skip = 0
		p = p[:min(len(p), room)]
		setIov(&d.iovs[niov], p)
		niov++
		room -= len(p)
	}
	d.msg.Iov = &d.iovs[0]
	d.msg.SetIovlen(niov)
	got, errno := recvmsg(q.fd, &d.msg)
	if errno != 0 {
		return 0, errno
	}
	f := b.Next()
	n := got - q.hdrLen
	q.fill(f, i, n, d.msg.Flags)
	if n > frame.HeadSize && f.Reason != frame.OversizeFrame {
		f.RxBufs = q.lay(b, f, bufs)
	} else if n > 0 {
		f.RxBufs = covering(bufs, frame.VnetHdrMrgLen+n)
	}
	return n, 0
}

// lay makes the pieces of a frame's tail, and returns in how many buffers it lies.
func (q *Queue) lay(b *frame.Batch, f *frame.Frame, bufs [][]byte) uint16 {
	n := covering(bufs, frame.VnetHdrMrgLen+int(f.Len))
	tail := b.Segs(int(n))
	if tail == nil {
		f.Drop(frame.BatchFull)
		return n
	}
	at, skip := behindHead(bufs)
	for left := int(f.Len) - frame.HeadSize; left > 0; at++ {
		p := bufs[at][skip:]
		skip = 0
		p = p[:min(len(p), left)]
		left -= len(p)
		tail = append(tail, p)
	}
	f.Tail = tail
	return n
}

// behindHead finds the buffer, and the place in it, of a frame's first byte
// that is not in Head.
func behindHead(bufs [][]byte) (at, skip int) {
	for skip = skipLen; at < len(bufs) && skip >= len(bufs[at]); at++ {
		skip -= len(bufs[at])
	}
	return at, skip
}

// covering is how many of the buffers n bytes take.
func covering(bufs [][]byte, n int) (k uint16) {
	for ; n > 0 && int(k) < len(bufs); k++ {
		n -= len(bufs[k])
	}
	return k
}

// setApart is the fanout program of a group of two: segments of established
// TCP connections over IPv4 go to the first, all else to the second.
//
// Takeover's rules send only what is the guest's to the sink, but for a few
// packets that may also be the pod's: fragments, ICMP errors, and those that
// open a flow to a port of the NAT's range. None of these passes here.
//
// What can pass is a segment of a connection of the pod's that the rules have
// forgotten, for it was silent too long, or never noted, for the sets were full.
// With everything published, or to a published port, it is the guest's by then.
// In the NAT's range nat gives it back to the pod or drops it; but what of it is
// behind the private head was received into buffers that the guest may read.
func setApart() []bpf.Instruction {
	const net = 0xfff00000 // SKF_NET_OFF
	return []bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtProto},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: frame.TypeIPv4, SkipTrue: 11},
		bpf.LoadAbsolute{Off: net + 6, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: 0x3fff, SkipTrue: 9},
		bpf.LoadAbsolute{Off: net + 9, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: frame.ProtoTCP, SkipTrue: 7},
		bpf.LoadAbsolute{Off: net, Size: 1},
		bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: 15},
		bpf.ALUOpConstant{Op: bpf.ALUOpMul, Val: 4},
		bpf.TAX{},
		bpf.LoadIndirect{Off: net + 13, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: 2, SkipTrue: 1}, // SYN
		bpf.RetConstant{Val: 0},
		bpf.RetConstant{Val: 1},
	}
}
