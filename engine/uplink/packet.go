package uplink

import (
	"errors"
	"fmt"
	"net"

	"github.com/mdlayher/packet"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Sizes of the sockets' buffers in bytes of kernel memory. A 64 KiB frame is
// charged at about 100 KiB, so that these hold a burst of 80; TCP's own pace
// keeps it from filling in the steady state.
const (
	rcvBuf = 8 << 20
	sndBuf = 4 << 20
)

// Config says where an Uplink receives and sends.
type Config struct {
	// Link is the Ethernet link that frames are sent to.
	Link string
	// Sink, if set, is the link on which frames are received, as the frames
	// that the kernel sends to it (see Takeover). Otherwise they are received
	// on Link, without those that left by Link.
	Sink string
	// Workers is how many workers push, and how many queues there are. The
	// kernel keeps the frames of a flow on one queue.
	Workers int
	// Direct sets a queue apart, the first, that receives nothing but frames which
	// are for the sink's only guest as far as the pod's rules know, so that these
	// may be received into its buffers (Queue.SetRoom). There must be a Sink and one worker, which then has two
	// queues.
	Direct bool
	// Promiscuous receives frames for foreign addresses too.
	Promiscuous bool
	// AllMulti receives frames for all groups, without Promiscuous.
	AllMulti bool
	// Mark is put on frames that are sent; 0 is none.
	Mark uint32
}

// Uplink is a port on a link of the host. Push is safe for concurrent use by
// different workers; each queue belongs to one worker.
type Uplink struct {
	queues  []*Queue
	senders []*sender
	index   int
}

// membership is what beside its own frames the link is to receive.
func (c Config) membership() uint16 {
	switch {
	case c.Promiscuous:
		return unix.PACKET_MR_PROMISC
	case c.AllMulti:
		return unix.PACKET_MR_ALLMULTI
	}
	return noMembership
}

// Open makes an Uplink in the current network namespace. It needs
// CAP_NET_RAW.
func Open(c Config) (u *Uplink, err error) {
	if c.Workers < 1 || c.Workers > 256 {
		return nil, fmt.Errorf("open uplink %s: %d workers, want 1 to 256", c.Link, c.Workers)
	}
	defer func() {
		if err != nil {
			if u != nil {
				u.Close()
			}
			u, err = nil, fmt.Errorf("open uplink %s: %w", c.Link, err)
		}
	}()
	l, err := link(c.Link)
	if err != nil {
		return nil, err
	}
	u = &Uplink{index: l.Attrs().Index}
	in, direct := u.index, true
	if c.Sink != "" {
		s, err := link(c.Sink)
		if err != nil {
			return u, err
		}
		in, direct = s.Attrs().Index, false
	}
	for range c.Workers {
		s, err := newSender(u.index, c.Mark)
		if err != nil {
			return u, err
		}
		u.senders = append(u.senders, s)
	}
	queues, prog := c.Workers, steer(c.Workers)
	if c.Direct && c.Workers == 1 && !direct {
		queues, prog = 2, setApart()
	}
	for i := range queues {
		q, err := newQueue(in, i, direct, c.membership())
		if err != nil {
			return u, err
		}
		q.rare = i >= c.Workers
		u.queues = append(u.queues, q)
	}
	return u, u.join(in, direct, prog)
}

// join makes the queues receive, as one fanout group steered by prog.
func (u *Uplink) join(index int, direct bool, prog []bpf.Instruction) error {
	group := unix.PACKET_FANOUT_CBPF<<16 | unix.PACKET_FANOUT_FLAG_UNIQUEID<<16
	if direct {
		// PACKET_IGNORE_OUTGOING does not hold in a fanout group.
		group |= unix.PACKET_FANOUT_FLAG_IGNORE_OUTGOING << 16
	}
	for i, q := range u.queues {
		if err := bindPacket(q.fd, index, unix.ETH_P_ALL); err != nil {
			return err
		}
		if len(u.queues) == 1 {
			return nil
		}
		if err := unix.SetsockoptInt(q.fd, unix.SOL_PACKET, unix.PACKET_FANOUT, group); err != nil {
			return fmt.Errorf("fanout: %w", err)
		}
		if i > 0 {
			continue
		}
		id, err := unix.GetsockoptInt(q.fd, unix.SOL_PACKET, unix.PACKET_FANOUT)
		if err != nil {
			return fmt.Errorf("fanout: %w", err)
		}
		group = group&^(unix.PACKET_FANOUT_FLAG_UNIQUEID<<16)&^0xffff | id&0xffff
		if err := setFanoutProgram(q.fd, prog); err != nil {
			return err
		}
	}
	return nil
}

// steer is the fanout program: it keeps each direction of a TCP or UDP flow, and
// the fragments of a packet, on one of n queues. Other frames go to queue 0, over
// IPv6 those with other extension headers too.
//
// Both ports count: of replies to the guest only the destination port varies,
// of requests to a published port only the source port. The loads count from
// the network header, because the data starts there for frames that came in
// and at the Ethernet header for those that the kernel sent to the sink.
func steer(n int) []bpf.Instruction {
	const net = 0xfff00000 // SKF_NET_OFF
	return []bpf.Instruction{
		bpf.LoadExtension{Num: bpf.ExtProto},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: frame.TypeIPv6, SkipTrue: 12},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: frame.TypeIPv4, SkipTrue: 26},
		bpf.LoadAbsolute{Off: net + 6, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpBitsNotSet, Val: 0x3fff, SkipTrue: 2},
		bpf.LoadAbsolute{Off: net + 4, Size: 2}, // a fragment: by its identification
		bpf.Jump{Skip: 20},
		bpf.LoadAbsolute{Off: net + 9, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: frame.ProtoTCP, SkipTrue: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: frame.ProtoUDP, SkipTrue: 19},
		bpf.LoadAbsolute{Off: net, Size: 1},
		bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: 15},
		bpf.ALUOpConstant{Op: bpf.ALUOpMul, Val: 4},
		bpf.Jump{Skip: 5},
		// IPv6
		bpf.LoadAbsolute{Off: net + 6, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: headerFragment, SkipTrue: 10},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: frame.ProtoTCP, SkipTrue: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: frame.ProtoUDP, SkipTrue: 11},
		bpf.LoadConstant{Dst: bpf.RegA, Val: 40},
		// The ports are behind as much as A says.
		bpf.TAX{},
		bpf.LoadIndirect{Off: net, Size: 2},
		bpf.StoreScratch{Src: bpf.RegA, N: 0},
		bpf.LoadIndirect{Off: net + 2, Size: 2},
		bpf.LoadScratch{Dst: bpf.RegX, N: 0},
		bpf.ALUOpX{Op: bpf.ALUOpAdd},
		bpf.Jump{Skip: 1},
		bpf.LoadAbsolute{Off: net + 44, Size: 4}, // the identification of a fragment
		bpf.ALUOpConstant{Op: bpf.ALUOpMod, Val: uint32(n)},
		bpf.RetA{},
		bpf.RetConstant{Val: 0},
	}
}

// Queues are the uplink's queues, one for each worker; with Config.Direct two
// for the only one.
func (u *Uplink) Queues() []*Queue { return u.queues }

// Direct says whether the first queue is set apart as Config.Direct asks.
func (u *Uplink) Direct() bool { return len(u.queues) > len(u.senders) }

// Push sends frames as they are: the kernel completes checksums and segments
// (or leaves that to the next one who can). See engine.Port.
func (u *Uplink) Push(worker int, fs []*frame.Frame) { u.senders[worker].push(fs) }

// Close closes the sockets. No worker may use the uplink any more.
func (u *Uplink) Close() error {
	var errs []error
	for _, q := range u.queues {
		errs = append(errs, q.close())
	}
	for _, s := range u.senders {
		errs = append(errs, unix.Close(s.fd))
	}
	u.queues, u.senders = nil, nil
	return errors.Join(errs...)
}

// packetSocket opens an AF_PACKET socket that receives nothing yet. The
// descriptor is ours alone: that of a packet.Conn is known to Go's poller,
// which would be woken by every frame.
func packetSocket(index int) (int, error) {
	c, err := packet.Listen(&net.Interface{Index: index}, packet.Raw, 0, nil)
	if err != nil {
		return -1, fmt.Errorf("packet socket: %w", privilege(err, "CAP_NET_RAW"))
	}
	defer c.Close()
	rc, err := c.SyscallConn()
	if err != nil {
		return -1, fmt.Errorf("packet socket: %w", err)
	}
	fd := -1
	if cerr := rc.Control(func(p uintptr) {
		fd, err = unix.FcntlInt(p, unix.F_DUPFD_CLOEXEC, 0)
	}); cerr != nil {
		err = cerr
	}
	if err != nil {
		return -1, fmt.Errorf("packet socket: %w", err)
	}
	return fd, nil
}

// setVnetHdr turns on the virtio_net_hdr and returns its length.
func setVnetHdr(fd int) (int, error) {
	// 12 bytes (Linux 6.4) keep what follows aligned as in a guest's ring.
	if unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR_SZ, frame.VnetHdrMrgLen) == nil {
		return frame.VnetHdrMrgLen, nil
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VNET_HDR, 1); err != nil {
		return 0, fmt.Errorf("PACKET_VNET_HDR: %w", err)
	}
	return frame.VnetHdrLen, nil
}

func bindPacket(fd, index int, proto uint16) error {
	err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: proto<<8 | proto>>8, Ifindex: index})
	if err != nil {
		return fmt.Errorf("bind packet socket: %w", err)
	}
	return nil
}

// setBuf sets a socket buffer, beyond the administrator's limit where we may.
func setBuf(fd, force, plain, size int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, force, size) != nil {
		// A smaller buffer loses frames earlier; that is counted, not fatal.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, plain, size)
	}
}
