package engine

import (
	"encoding/binary"
	"math"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"sidewire/engine/frame"
)

// Theory of operation.
//
// Some links carry frames of one hardware address only: a macvlan and an
// ipvlan, a wireless station, the virtual NICs of most clouds. What a guest
// sends there from an address of its own is lost, and so is what is sent to it.
// A MACNAT puts the link's address in the place of the guests' on the way out,
// wherever others learn from: the Ethernet source, ARP, the link-layer options
// of neighbour discovery, a DHCP client's chaddr. On the way in it finds the
// guest by the IP address, which it has learned from what guests sent, and puts
// the guest's address back. Frames for many stay as they are: guests see the
// others' true addresses, and each other's.
//
// With one guest everything unicast is for it. With several, what is neither
// IP nor ARP, and what is for an IP address that no guest has shown, is for
// nobody. Of an IPv4 address guests are asked then: others may remember it for
// hours, and send to it after we have started anew. Over IPv6 they ask by
// themselves (RFC 4861, 7.3).
//
// Limits: a signature over a neighbour discovery message (SEND, RFC 3971) does
// not survive; nor does anything that carries a hardware address in its
// payload, but for those named above. A DHCPv6 client's DUID is not translated:
// it names the client, it is not replied to.

// MACNATConfig is what a MACNAT is made of.
type MACNATConfig struct {
	// Link is the address that the link may use.
	Link frame.MAC
	// Guests are the guests' own addresses, zero for one that is not known.
	// There must be as many as there are guests.
	Guests []frame.MAC
	// Host are IP addresses that stay with the host's kernel, which receives
	// what is for them by itself.
	Host []netip.Addr
	// Shared says that others on the wire have the link's address too, as all
	// ipvlans of one parent do. Otherwise what comes from that address is a
	// reflection of our own frames, and dropped.
	Shared bool
	// Addresses is how many IP addresses are known of each guest; 0 is 256. One
	// that shows more replaces those of its own that were quiet for longest.
	Addresses int
	// Age is after how much silence an IP address may be forgotten, to the
	// second; 0 is a day. It must not be shorter than neighbours' caches last.
	Age time.Duration
}

// MACNAT translates between the hardware addresses of guests and the one that a
// link may use. It is used in two places: the link's port in the engine is what
// Port returns, and the MACNAT itself is the first stage of what the link brings,
// before the switch's (or whatever else finds a guest by its hardware address):
//
//	nat := engine.NewMACNAT(engine.MACNATConfig{Link: linkMAC, Guests: macs}, e.Workers())
//	id, err := e.AddPort("uplink eth0", nat.Port(up))
//	stage, err := sw.AddPort(engine.SwitchPort{Port: id, Uplink: true})
//	e.SetStages(id, nat, stage)
//
// Spoof checks and the FDB come before it, and see guests' own addresses. The
// ports of guests had better hold 128 bytes of a frame in Head. The link's socket
// must receive all multicast; promiscuous it need not be.
//
// All methods are safe for concurrent use.
type MACNAT struct {
	link    uint64 // as in a macKey without VLAN
	linkMAC frame.MAC
	shared  bool
	single  bool
	// only is the address of the only guest, 0 while it is not known; fixed
	// says that it is the one that was configured, and was seen.
	only  atomic.Uint64
	fixed atomic.Bool
	given uint64 // what was configured of it

	asked bucket // of questions to guests

	host    atomic.Pointer[map[netip.Addr]struct{}]
	table   *natTable
	workers []*natWork

	mu        sync.Mutex // guards what follows
	xids      map[frame.PortID]*natXIDs
	exchanges uint64 // begun so far
}

// NewMACNAT makes a translation for an engine with that many workers.
func NewMACNAT(c MACNATConfig, workers int) *MACNAT {
	if c.Addresses <= 0 {
		c.Addresses = defaultNATAddresses
	}
	if c.Age <= 0 {
		c.Age = 24 * time.Hour
	}
	guests := max(len(c.Guests), 1)
	n := &MACNAT{
		link: macKey(c.Link, 0), linkMAC: c.Link, shared: c.Shared, single: guests == 1,
		table: newNATTable(guests, c.Addresses, uint32(max(c.Age/time.Second, 1))),
		xids:  map[frame.PortID]*natXIDs{},
	}
	if n.single && len(c.Guests) == 1 {
		n.given = macKey(c.Guests[0], 0)
		n.only.Store(n.given)
	}
	n.asked.paid.Store(math.MinInt64)
	n.SetHost(c.Host)
	for range workers {
		n.workers = append(n.workers, new(natWork))
	}
	return n
}

// SetHost replaces the addresses that stay with the host's kernel.
func (n *MACNAT) SetHost(addrs []netip.Addr) {
	m := map[netip.Addr]struct{}{}
	for _, a := range addrs {
		m[a.Unmap().WithZone("")] = struct{}{}
	}
	n.host.Store(&m)
}

// MACNATStats is what a MACNAT has done and knows.
type MACNATStats struct {
	Addresses int    `json:"addresses"` // IP addresses that it knows
	Moved     uint64 `json:"moved"`     // that another guest took over
	Refused   uint64 `json:"refused"`   // that it had no room for, or that came too fast
}

// Stats returns what was counted so far.
func (n *MACNAT) Stats() MACNATStats { return n.table.stats() }

// Addresses calls yield for each IP address that a guest has shown, with the
// guest's hardware address, until it returns false. Learned says when to ask
// again.
func (n *MACNAT) Addresses(yield func(netip.Addr, frame.MAC) bool) { n.table.each(yield) }

// Learned is sent to after IP addresses have come or gone. It has one reader.
func (n *MACNAT) Learned() <-chan struct{} { return n.table.changed }

// Port returns the port that translates what is pushed to it and pushes it on
// to the link's.
func (n *MACNAT) Port(link Port) Port { return &natPort{n, link} }

type natPort struct {
	nat  *MACNAT
	link Port
}

// natWork is a worker's room to translate in.
type natWork struct {
	list [frame.BatchMax]*frame.Frame
	segs [natSegs][]byte
	bufs [natBufs][natBufLen]byte
	nseg int
	nbuf int

	sec     uint32
	lastKey natKey // what was judged last
	lastMAC uint64
}

const (
	natSegs = 2048
	// natBufs is how many frames of one group can be changed behind their heads.
	natBufs   = 8
	natBufLen = maxND + 128
)

// Push implements Port. The frames that it changes are copied as far as they
// lie in memory that is lent to others too.
func (p *natPort) Push(worker int, fs []*frame.Frame) {
	w := p.nat.workers[worker]
	w.reset()             // a fault may have ended the last call
	w.sec = second(Now()) // one reading for the group: a batch's time is not passed on to ports
	for len(fs) > 0 {
		n, list := 0, w.list[:0]
		for n < len(fs) && len(list) < len(w.list) && w.nbuf < natBufs && (n == 0 || w.nseg+len(fs[n].Tail) < natSegs) {
			f := fs[n]
			n++
			if r := p.nat.outbound(f, w); r != frame.ReasonNone {
				f.Drop(r)
				continue
			}
			list = append(list, f)
		}
		if len(list) > 0 {
			p.link.Push(worker, list)
		}
		w.reset()
		fs = fs[n:]
	}
}

// Fault implements Faulter, for a link whose memory a peer may take away.
func (p *natPort) Fault(addr uintptr) bool {
	f, ok := p.link.(Faulter)
	return ok && f.Fault(addr)
}

func (w *natWork) reset() {
	clear(w.segs[:w.nseg]) // lent memory may be unmapped once it is given back
	w.nseg, w.nbuf = 0, 0
	w.lastMAC = 0
}

// widen is the function of that name for a frame whose Tail is lent to others
// too. It reports false if there is no room.
func (w *natWork) widen(f *frame.Frame, n int) bool {
	n = min(n, int(f.Len), frame.HeadSize)
	if int(f.HeadLen) >= n || len(f.Tail) == 0 {
		return true
	}
	if len(f.Tail) > natSegs-w.nseg {
		return false
	}
	segs := append(w.segs[w.nseg:w.nseg:natSegs], f.Tail...)
	w.nseg += len(segs)
	f.Tail = segs
	widen(f, n)
	return true
}

// linear copies a short frame into a buffer of the worker's, which has room for
// more bytes. It is nil if the frame is too long. What is changed there becomes
// the frame by setLinear.
func (w *natWork) linear(f *frame.Frame) []byte {
	if int(f.Len) > natBufLen || w.nbuf == natBufs || w.nseg == natSegs {
		return nil
	}
	buf := w.bufs[w.nbuf][:f.Len]
	w.nbuf++
	f.CopyTo(buf)
	return buf
}

// setLinear makes b, which linear returned, the frame.
func (w *natWork) setLinear(f *frame.Frame, b []byte) {
	f.SetBytes(b, nil, w.segs[w.nseg:w.nseg:w.nseg+1])
	w.nseg++
	f.RxAt, f.RxBufs = 0, 0
}

// l3 finds what is behind the Ethernet header and its tags: the EtherType, the
// offset of what follows, the VLAN of the outer tag.
func l3(f *frame.Frame) (typ uint16, off int, vlan uint16) {
	typ, off = f.EtherType(), frame.EthernetLen
	for isTag(typ) && off+vlanLen <= int(f.HeadLen) {
		if off == frame.EthernetLen {
			vlan = tagID(f)
		}
		typ = binary.BigEndian.Uint16(f.Head[off+2:])
		off += vlanLen
	}
	return typ, off, vlan
}

// outbound translates a frame of a guest's.
func (n *MACNAT) outbound(f *frame.Frame, w *natWork) frame.DropReason {
	if !w.widen(f, frame.HeadSize) {
		return frame.BatchFull
	}
	if f.HeadLen < frame.EthernetLen {
		return frame.ShortFrame
	}
	src := binary.BigEndian.Uint64(f.Head[6:]) &^ 0xffff
	if n.single {
		n.seen(src)
	}
	typ, off, vlan := l3(f)
	if f.Flags&frame.NeedsCsum != 0 && int(f.CsumStart) < off {
		return frame.BadOffload // it would change what is written here
	}
	r := frame.ReasonNone
	switch typ {
	case frame.TypeIPv4:
		r = n.outIPv4(f, off, vlan, src, w)
	case frame.TypeIPv6:
		r = n.outIPv6(f, off, vlan, src, w)
	case frame.TypeARP, typeRARP:
		r = n.outARP(f, off, vlan, src, w)
	}
	copy(f.Head[6:12], n.linkMAC[:])
	return r
}

// seen notes the address of the only guest. The one that it was configured with
// stays once it was used: others are behind the guest.
func (n *MACNAT) seen(src uint64) {
	switch {
	case n.fixed.Load() || n.only.Load() == src && src != n.given || src&groupBit != 0 || src == 0:
	case src == n.given:
		n.only.Store(src)
		n.fixed.Store(true)
	default:
		n.only.Store(src)
	}
}

func (n *MACNAT) outIPv4(f *frame.Frame, off int, vlan uint16, src uint64, w *natWork) frame.DropReason {
	if int(f.HeadLen) < off+20 {
		return frame.ShortFrame
	}
	h := f.Head[off:]
	n.learn(key4(h[12:], vlan), src, f.In, false, w)
	if h[9] != frame.ProtoUDP || f.GSO != frame.GSONone {
		return frame.ReasonNone
	}
	if at, ok := dhcpAt(f, off, portDHCPServer); ok {
		return n.outDHCP(f, off, at, src, w)
	}
	return frame.ReasonNone
}

func (n *MACNAT) outIPv6(f *frame.Frame, off int, vlan uint16, src uint64, w *natWork) frame.DropReason {
	if int(f.HeadLen) < off+ip6Len {
		return frame.ShortFrame
	}
	n.learn(key6(f.Head[off+8:], vlan), src, f.In, false, w)
	if at := icmp6At(f, off); at != 0 {
		return n.outND(f, off, at, vlan, src, w)
	}
	return frame.ReasonNone
}

// learn notes that a guest has an IP address. Only what says so in so many
// words (sure) takes an address away from another.
func (n *MACNAT) learn(k natKey, mac uint64, in frame.PortID, sure bool, w *natWork) {
	if !sure && k == w.lastKey && mac == w.lastMAC {
		return
	}
	if !k.unicast() || mac&groupBit != 0 || mac == 0 {
		return
	}
	w.lastKey, w.lastMAC = k, mac
	if e := n.table.lookup(k); e != nil {
		sec := e.sec.Load()
		if e.mac == mac {
			if sec != w.sec {
				e.sec.Store(w.sec)
			}
			return
		}
		if !sure && int32(w.sec-sec) <= int32(n.table.age) {
			return
		}
	}
	n.table.learn(k, mac, in, w.sec)
}

// Process implements Stage: it gives each frame from the link the address of the
// guest that it is for.
func (n *MACNAT) Process(b *frame.Batch) {
	var last natKey
	var lastMAC uint64
	sec := second(b.Now)
	for i := range b.Len() {
		f := b.Frame(i)
		if f.Out != frame.Drop || f.Reason != frame.ReasonNone {
			continue
		}
		if f.HeadLen < frame.EthernetLen {
			f.Drop(frame.ShortFrame)
			continue
		}
		to, from := binary.BigEndian.Uint64(f.Head[:8])&^0xffff, binary.BigEndian.Uint64(f.Head[6:])&^0xffff
		switch {
		case from == n.link && !n.shared:
			f.Drop(frame.BadSource)
			continue
		case to != n.link && to&groupBit == 0:
			f.Drop(frame.ForeignMAC)
			continue
		}
		widen(f, maxTagged)
		typ, off, vlan := l3(f)
		if f.Flags&frame.NeedsCsum != 0 && int(f.CsumStart) < off {
			f.Drop(frame.BadOffload)
			continue
		}
		if to != n.link {
			n.forMany(f, typ, off, vlan, sec)
			continue
		}
		k, r := inKey(f, typ, off, vlan)
		if r != frame.ReasonNone {
			f.Drop(r)
			continue
		}
		if k != last || lastMAC == 0 {
			last, lastMAC = k, n.guest(k)
		}
		n.forOne(f, typ, off, vlan, lastMAC, b.Now)
	}
}

// inKey is the key of the IP address that a unicast frame is for; that of
// address 0 if it is for none.
func inKey(f *frame.Frame, typ uint16, off int, vlan uint16) (natKey, frame.DropReason) {
	need := off
	switch typ {
	case frame.TypeIPv4:
		need += 20
	case frame.TypeIPv6:
		need += ip6Len
	case frame.TypeARP, typeRARP:
		need += arpLen
	}
	if int(f.HeadLen) < need {
		return natKey{}, frame.ShortFrame
	}
	switch typ {
	case frame.TypeIPv4:
		return key4(f.Head[off+16:], vlan), frame.ReasonNone
	case frame.TypeIPv6:
		return key6(f.Head[off+24:], vlan), frame.ReasonNone
	case frame.TypeARP:
		return key4(f.Head[off+arpTargetIP:], vlan), frame.ReasonNone
	}
	return natKey{}, frame.ReasonNone
}

// toHost is what guest returns for what stays with the host.
const toHost = ^uint64(0)

// guest returns the hardware address of who has an IP address; 0 is nobody, or
// nobody that is known.
func (n *MACNAT) guest(k natKey) uint64 {
	if e := n.table.lookup(k); e != nil {
		return e.mac
	}
	if host := *n.host.Load(); len(host) > 0 {
		if _, ok := host[k.addr()]; ok {
			return toHost
		}
	}
	if n.single {
		return n.only.Load()
	}
	return 0
}

// forOne gives a unicast frame to the guest that has its IP address.
func (n *MACNAT) forOne(f *frame.Frame, typ uint16, off int, vlan uint16, mac uint64, now int64) {
	switch typ {
	case frame.TypeIPv4:
		if g := n.inDHCP(f, off, second(now)); g != 0 {
			mac = g
		}
	case frame.TypeIPv6:
		n.inRedirect(f, off, vlan)
	case frame.TypeARP:
		if mac != 0 && mac != toHost {
			n.inARP(f, off, mac)
		}
	}
	switch mac {
	case toHost:
		f.Out = frame.Consumed
	case 0:
		switch typ {
		case frame.TypeIPv4:
			n.ask(f, off, now)
		case frame.TypeIPv6, frame.TypeARP:
			f.Drop(frame.NoRoute)
		default:
			f.Drop(frame.NotCarried)
		}
	default:
		putMAC(f.Head[:], mac)
	}
}

// forMany translates what a frame for many says to one guest.
func (n *MACNAT) forMany(f *frame.Frame, typ uint16, off int, vlan uint16, sec uint32) {
	switch typ {
	case frame.TypeIPv4:
		if mac := n.inDHCP(f, off, sec); mac != 0 {
			putMAC(f.Head[:], mac)
		}
	case frame.TypeARP:
		if int(f.HeadLen) >= off+arpLen {
			if mac := n.guest(key4(f.Head[off+arpTargetIP:], vlan)); mac != 0 && mac != toHost {
				n.inARP(f, off, mac)
			}
		}
	}
}

// putMAC writes the address in the upper 48 bits of v.
func putMAC(b []byte, v uint64) {
	binary.BigEndian.PutUint32(b, uint32(v>>32))
	binary.BigEndian.PutUint16(b[4:], uint16(v>>16))
}

// getMAC reads an address into the upper 48 bits.
func getMAC(b []byte) uint64 {
	return uint64(binary.BigEndian.Uint32(b))<<32 | uint64(binary.BigEndian.Uint16(b[4:]))<<16
}
