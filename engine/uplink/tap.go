package uplink

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// tapSlots is how many frames one Pull from a tap may bring.
const tapSlots = 16

// TapConfig describes a tap in the current network namespace.
type TapConfig struct {
	Name string
	MAC  frame.MAC
	// Addr is the kernel's address on the tap and the prefix behind it; the
	// zero value is none.
	Addr netip.Prefix
	// Addr6 is the same for IPv6, beside the link-local address that goes with MAC:
	// from there the kernel asks for neighbours. Nobody else is on the tap who could
	// have them.
	Addr6   netip.Prefix
	MTU     int // in bytes
	Workers int // how many workers push
}

// Tap is a port to the kernel of the namespace, and the one queue of what
// comes from there. Push is safe for concurrent use by different workers; the
// other methods belong to one worker.
type Tap struct {
	// USO says that the kernel takes and gives UDP segmentation offload.
	USO bool

	fd      int
	name    string
	drained bool
	rest    rest
	w       Watcher
	senders []tapSender

	hdr   [frame.VnetHdrMrgLen]byte
	iovs  [3]unix.Iovec
	arena []byte
}

// tapSender is what one worker needs to push.
type tapSender struct {
	hdr  [frame.VnetHdrMrgLen]byte
	iovs [iovMax]unix.Iovec
	flat []byte
}

// OpenTap makes a tap that lives as long as the process, and gives it its
// address. It needs CAP_NET_ADMIN.
func OpenTap(c TapConfig) (t *Tap, err error) {
	defer func() {
		if err != nil {
			if t != nil {
				t.Close()
			}
			t, err = nil, fmt.Errorf("open tap %s: %w", c.Name, err)
		}
	}()
	fd, uso, err := newTap(c.Name)
	if err != nil {
		return nil, err
	}
	t = &Tap{USO: uso, fd: fd, name: c.Name, senders: make([]tapSender, max(1, c.Workers)), arena: make([]byte, tapSlots*slotSize)}
	l, err := netlink.LinkByName(c.Name)
	if err != nil {
		return t, err
	}
	if err := netlink.LinkSetHardwareAddr(l, net.HardwareAddr(c.MAC[:])); err != nil {
		return t, fmt.Errorf("hardware address: %w", err)
	}
	if err := quiet(l, c.MTU, true); err != nil {
		return t, err
	}
	if c.Addr.IsValid() {
		if err := addAddr(l, c.Addr, 0); err != nil {
			return t, err
		}
	}
	if c.Addr6.IsValid() {
		if err := t.addIPv6(l, c); err != nil {
			return t, fmt.Errorf("%w: %w", errNoIPv6, err)
		}
	}
	return t, nil
}

// errNoIPv6 says that a tap could be had, but not its IPv6 addresses.
var errNoIPv6 = errors.New("no IPv6")

func (t *Tap) addIPv6(l netlink.Link, c TapConfig) error {
	if err := attachTapFilter(t.fd, quietIPv6); err != nil {
		return err
	}
	// What new links of the namespace begin with need not be what its others
	// have. Where it cannot be written, the addresses tell. No router is behind
	// the tap.
	conf := "/proc/sys/net/ipv6/conf/" + c.Name + "/"
	_ = os.WriteFile(conf+"accept_ra", []byte("0"), 0)
	_ = os.WriteFile(conf+"disable_ipv6", []byte("0"), 0)
	m := c.MAC
	own := netip.AddrFrom16([16]byte{0xfe, 0x80, 8: m[0] ^ 2, 9: m[1], 10: m[2], 11: 0xff, 12: 0xfe, 13: m[3], 14: m[4], 15: m[5]})
	return errors.Join(addAddr(l, netip.PrefixFrom(own, 64), unix.IFA_F_NODAD), addAddr(l, c.Addr6, unix.IFA_F_NODAD))
}

func addAddr(l netlink.Link, p netip.Prefix, flags int) error {
	n := &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
	if err := netlink.AddrAdd(l, &netlink.Addr{IPNet: n, Flags: flags}); err != nil {
		return fmt.Errorf("address %s: %w", p, err)
	}
	return nil
}

// quietIPv6 drops what the kernel says by itself to groups, such as that it looks
// for routers and listens to groups; questions for neighbours pass.
var quietIPv6 = []bpf.Instruction{
	bpf.LoadAbsolute{Off: 12, Size: 2},
	bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: frame.TypeIPv6, SkipTrue: 6},
	bpf.LoadAbsolute{Off: 0, Size: 1},
	bpf.JumpIf{Cond: bpf.JumpBitsNotSet, Val: 1, SkipTrue: 4},
	bpf.LoadAbsolute{Off: 20, Size: 1},
	bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: frame.ProtoICMPv6, SkipTrue: 3},
	bpf.LoadAbsolute{Off: 54, Size: 1},
	bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 135, SkipTrue: 1},
	bpf.RetConstant{Val: 1 << 20},
	bpf.RetConstant{Val: 0},
}

// newTap makes a tap with a virtio_net_hdr of 12 bytes, or returns ErrInUse if
// the name exists.
func newTap(name string) (fd int, uso bool, err error) {
	fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, false, &os.PathError{Op: "open", Path: "/dev/net/tun", Err: err}
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return -1, false, fmt.Errorf("name %q: %w", name, err)
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_TUN_EXCL)
	switch err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); {
	case errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST):
		return -1, false, fmt.Errorf("%w (link %s exists)", ErrInUse, name)
	case err != nil:
		return -1, false, fmt.Errorf("create: %w", privilege(err, "CAP_NET_ADMIN"))
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, frame.VnetHdrMrgLen); err != nil {
		return -1, false, fmt.Errorf("length of virtio_net_hdr: %w", err)
	}
	const tso = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN
	if unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tso|unix.TUN_F_USO4|unix.TUN_F_USO6) == nil {
		return fd, true, nil // Linux 6.2
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, tso); err != nil {
		return -1, false, fmt.Errorf("offloads: %w", err)
	}
	return fd, false, nil
}

// quiet sets a tap of ours up, in such a way that the kernel says nothing on
// it by itself. local lets addresses in 127.0.0.0/8 cross it.
func quiet(l netlink.Link, mtu int, local bool) error {
	// Settings come first: a link with an MTU below 1280 has none for IPv6.
	if err := setInetConf(l.Attrs().Index, local); err != nil {
		return fmt.Errorf("settings: %w", err)
	}
	if mtu > 0 {
		if err := netlink.LinkSetMTU(l, mtu); err != nil {
			return fmt.Errorf("MTU %d: %w", mtu, err)
		}
	}
	// Without a queueing discipline workers do not meet at its lock. Where the
	// kernel lacks it, nothing is lost but that.
	_ = netlink.QdiscReplace(&netlink.GenericQdisc{QdiscType: "noqueue", QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT,
	}})
	if err := netlink.LinkSetUp(l); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	return nil
}

// Numbers of linux/ip.h and linux/if_link.h.
const (
	devconfRPFilter      = 8
	devconfRouteLocalnet = 26
	iflaInetConf         = 1
	iflaInet6AddrGenMode = 8
	addrGenModeNone      = 1
)

// setInetConf sets the sysctls of a link by netlink, because /proc/sys is
// read-only in a container.
func setInetConf(index int, local bool) error {
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index = int32(index)
	req.AddData(msg)
	spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	conf := spec.AddRtAttr(unix.AF_INET, nil).AddRtAttr(iflaInetConf, nil)
	// Loose: the stricter of this and conf.all counts, and frames from outside
	// that are handed to the pod's kernel come in by the tap.
	conf.AddRtAttr(devconfRPFilter, nl.Uint32Attr(2))
	if local {
		conf.AddRtAttr(devconfRouteLocalnet, nl.Uint32Attr(1))
	}
	if _, err := os.Stat("/proc/net/if_inet6"); err == nil {
		spec.AddRtAttr(unix.AF_INET6, nil).AddRtAttr(iflaInet6AddrGenMode, nl.Uint8Attr(addrGenModeNone))
	}
	req.AddData(spec)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// dropAll keeps a tap's own queue empty.
var dropAll = []bpf.Instruction{bpf.RetConstant{Val: 0}}

// Name is the tap's name as a link.
func (t *Tap) Name() string { return t.name }

// SetWatcher tells the tap whom to wake.
func (t *Tap) SetWatcher(w Watcher) error {
	if err := w.Watch(t.fd); err != nil {
		return err
	}
	t.w = w
	return nil
}

// Close removes the tap. No worker may use it any more.
func (t *Tap) Close() error {
	if t.w != nil {
		t.w.Unwatch(t.fd)
	}
	return unix.Close(t.fd)
}

// Pull reads what the kernel sends to the guest. See engine.Queue.
func (t *Tap) Pull(b *frame.Batch) int {
	if t.rest.due() {
		return 0
	}
	t.drained = false
	n := 0
	for n < tapSlots {
		f := b.Frame(n)
		slot := t.arena[n*slotSize : (n+1)*slotSize : (n+1)*slotSize]
		setIov(&t.iovs[0], t.hdr[:])
		setIov(&t.iovs[1], f.Head[:])
		setIov(&t.iovs[2], slot)
		got, errno := readv(t.fd, t.iovs[:])
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			t.drained = errno == unix.EAGAIN
			break
		}
		f = b.Next()
		n++
		t.take(b, f, got-len(t.hdr), slot)
	}
	t.rest.after(n)
	return n
}

func (t *Tap) take(b *frame.Batch, f *frame.Frame, n int, slot []byte) {
	f.Offload.Decode(t.hdr[:])
	f.Len, f.HeadLen = int32(max(n, 0)), uint16(max(0, min(n, frame.HeadSize)))
	if n > frame.HeadSize {
		f.Tail = append(b.Segs(1), slot[:n-frame.HeadSize])
	}
	switch {
	case n < frame.EthernetLen:
		f.Drop(frame.ShortFrame)
	case !f.CheckOffload():
		f.Drop(frame.BadOffload)
	}
}

// Release gives the slots back to the next Pull.
func (t *Tap) Release(*frame.Batch) {}

// Arm reports whether frames are waiting; see Queue.Arm. A tap that somebody
// deleted has none, only an error that never ends.
func (t *Tap) Arm() (more bool) {
	t.rest.wake()
	return !t.drained && poll(t.fd, unix.POLLIN, 0)&unix.POLLIN != 0
}

// Disarm does nothing.
func (t *Tap) Disarm() {}

// Push gives frames to the kernel of the namespace, as they are. See
// engine.Port.
func (t *Tap) Push(worker int, fs []*frame.Frame) {
	s := &t.senders[worker]
	for _, f := range fs {
		iovs := s.gather(f)
		_, errno := writev(t.fd, iovs)
		for errno == unix.EINTR {
			_, errno = writev(t.fd, iovs)
		}
		if errno != 0 {
			f.Drop(frame.SendFailed)
		}
		clear(iovs)
	}
}

func (s *tapSender) gather(f *frame.Frame) []unix.Iovec {
	encode(f, s.hdr[:])
	setIov(&s.iovs[0], s.hdr[:])
	setIov(&s.iovs[1], f.Head[:f.HeadLen])
	n := 2
	if n+len(f.Tail) > iovMax {
		if s.flat == nil {
			s.flat = make([]byte, frame.MaxLen)
		}
		setIov(&s.iovs[n], flatten(s.flat, f))
		return s.iovs[:n+1]
	}
	for _, t := range f.Tail {
		if len(t) > 0 {
			setIov(&s.iovs[n], t)
			n++
		}
	}
	return s.iovs[:n]
}
