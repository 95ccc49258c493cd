package usernet

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

const (
	// sendMost is how many messages one sendmmsg takes.
	sendMost = 64
	// segmentsMost is how many datagrams the kernel cuts one message into
	// (UDP_MAX_SEGMENTS before Linux 6.9), segmentedMost how long that is.
	segmentsMost  = 64
	segmentedMost = 65000
	// partMost is how many pieces of memory a segment of a USO frame may
	// consist of that must be sent alone.
	partMost = 64
)

// outbound is a datagram of the batch that waits to be sent, or an echo
// request. It is the n bytes from off on of its frame.
type outbound struct {
	f    *frame.Frame
	addr uint32
	port uint16
	src  uint32 // which address of ours it leaves from, 0 for the kernel's choice
	opts sockOpts
	off  int32
	n    int32
	next int32 // 1 + place of the mapping's next one
}

// sockOpts are a guest's header fields that a socket has as options: time to
// live, type of service, and whether not to fragment, from the top.
type sockOpts uint32

func optsOf(f *frame.Frame) sockOpts {
	// The way through the host takes one hop off.
	o := sockOpts(max(f.TTL(), 2)-1)<<16 | sockOpts(f.Head[f.L3+1])<<8
	if f.FragField()&frame.DontFragment != 0 {
		o |= 1
	}
	return o
}

// datagramsOut are the datagrams of a batch, by mapping.
type datagramsOut struct {
	touched []int32 // the mappings that have some
	wait    [frame.BatchMax]outbound
	waiting int32

	msgs  [sendMost]mmsghdr
	names [sendMost]sockAddr
	ctls  [sendMost]sendControl
	runs  [sendMost]run

	part     unix.Msghdr
	partName sockAddr
	partIovs [partMost]unix.Iovec
	partCtl  sourceControl
	six      *sourcesOut // nil until a datagram of IPv6 has one
}

// run is the datagrams that one message sends.
type run struct {
	first, count int32 // 1 + place of the first
	cut          bool  // the kernel is to cut the message
}

func newDatagramsOut() *datagramsOut {
	t := &datagramsOut{touched: make([]int32, 0, frame.BatchMax)}
	t.partCtl.init()
	for k := range t.msgs {
		t.ctls[k].source.init()
		t.ctls[k].segment.init()
		h := &t.msgs[k].hdr
		h.Name, h.Namelen = nameOf(&t.names[k]), sockAddrLen
	}
	return t
}

// sourcesOut are the control messages that say which address a datagram of IPv6
// leaves from.
type sourcesOut struct {
	ctls [sendMost]sendControl6
	part sourceControl6
}

func (t *datagramsOut) sources6() *sourcesOut {
	if t.six == nil {
		t.six = new(sourcesOut)
		t.six.part.init()
		for k := range t.six.ctls {
			t.six.ctls[k].source.init()
		}
	}
	return t.six
}

// sendLater has n bytes of a frame, from off on, sent at the end of the batch
// to where its mapping sends now.
func (w *worker) sendLater(f *frame.Frame, i int32, off, n int) {
	t := w.udp.tx
	if t == nil {
		t = newDatagramsOut()
		w.udp.tx = t
	}
	if t.waiting == int32(len(t.wait)) {
		f.Drop(frame.BatchFull)
		return
	}
	fl := w.table.at(i)
	t.wait[t.waiting] = outbound{f: f, addr: fl.hostAddr(), port: fl.hostPort(), src: fl.source(), opts: optsOf(f), off: int32(off), n: int32(n)}
	t.waiting++
	if fl.sndUna == 0 {
		fl.sndUna = uint32(t.waiting)
		t.touched = append(t.touched, i)
	} else {
		t.wait[fl.sndNxt-1].next = t.waiting
	}
	fl.sndNxt = uint32(t.waiting)
	fl.queue, fl.seen = f.Queue, w.seen()
	fl.flags &^= mapAnswered
	f.Out = frame.Consumed
}

// udpFlush sends what sendLater was given in this batch.
func (w *worker) udpFlush(b *frame.Batch) {
	t := w.udp.tx
	if t == nil || t.waiting == 0 {
		return
	}
	for _, i := range t.touched {
		fl := w.table.at(i)
		next := int32(fl.sndUna)
		fl.sndUna, fl.sndNxt = 0, 0
		for next != 0 {
			next = w.sendSome(b, i, next)
		}
	}
	t.forget(&w.table)
}

// forget empties the list, also after a batch that did not come to its end.
func (t *datagramsOut) forget(table *table) {
	for _, i := range t.touched {
		if fl := table.at(i); fl.state == stateMapping {
			fl.sndUna, fl.sndNxt = 0, 0
		}
	}
	clear(t.wait[:t.waiting])
	t.touched, t.waiting = t.touched[:0], 0
}

// sendSome sends datagrams of a mapping, from one on, as many as one call
// takes, and returns the next.
func (w *worker) sendSome(b *frame.Batch, i, next int32) int32 {
	t, fl := w.udp.tx, w.table.at(i)
	first := &t.wait[next-1]
	opts := first.opts
	w.net.apply(fl, opts)
	msgs, iovs := 0, 0
	for next != 0 && msgs < sendMost && t.wait[next-1].opts == opts {
		p := &t.wait[next-1]
		k := pieces(w.iovs[iovs:], p, 0, int(p.n))
		if k < 0 {
			break
		}
		r, start, after := &t.runs[msgs], iovs, p.next
		*r = run{first: next, count: 1}
		iovs += k
		size := p.n
		if p.f.GSO != frame.GSONone {
			size = int32(p.f.GSOSize)
			r.cut = p.n > size
		} else if fl.proto == frame.ProtoUDP && !w.udp.noSegment && fl.flags&mapAlone == 0 {
			iovs, after = w.extend(r, iovs, after)
		}
		next = after
		h := &t.msgs[msgs].hdr
		w.net.putAddr(&t.names[msgs], p.addr, p.port)
		h.Iov = &w.iovs[start]
		h.SetIovlen(iovs - start)
		h.Control = nil
		h.SetControllen(0)
		if c := &t.ctls[msgs]; r.cut {
			c.segment.size = uint16(size)
			h.Control = c.segment.base()
			h.SetControllen(segmentControlLen)
		}
		if p.src != 0 && w.six != nil {
			c := &t.sources6().ctls[msgs]
			c.source.info.Addr, c.segment = w.net.six.address(p.src), t.ctls[msgs].segment
			h.Control = c.source.base()
			h.SetControllen(sourceControl6Len + int(h.Controllen))
		} else if p.src != 0 {
			c := &t.ctls[msgs].source
			binary.BigEndian.PutUint32(c.info.Spec_dst[:], p.src)
			h.Control = c.base()
			h.SetControllen(sourceControlLen + int(h.Controllen))
		}
		msgs++
	}
	if msgs == 0 { // more pieces than a message may have
		first.f.Drop(frame.BadDescriptor)
		return first.next
	}
	w.sendRuns(b, i, msgs)
	return next
}

// extend adds to a run of one datagram those that follow and that the kernel
// can cut from the same message: to the same place, of the same size but for
// the last. It returns how many pieces are used, and the first that is not of
// the run.
func (w *worker) extend(r *run, iovs int, next int32) (used int, after int32) {
	t := w.udp.tx
	p := &t.wait[r.first-1]
	total := p.n
	for next != 0 && p.n > 0 && r.count < segmentsMost {
		q := &t.wait[next-1]
		if q.addr != p.addr || q.port != p.port || q.src != p.src || q.opts != p.opts || q.f.GSO != frame.GSONone || q.n == 0 || q.n > p.n || total+q.n > segmentedMost {
			break
		}
		k := pieces(w.iovs[iovs:], q, 0, int(q.n))
		if k < 0 {
			break
		}
		iovs += k
		total += q.n
		r.count++
		r.cut = true
		next = q.next
		if q.n < p.n {
			break
		}
	}
	return iovs, next
}

// apply gives a socket the options that the guest's headers ask for.
func (n *Net) apply(f *flow, o sockOpts) {
	ttl, tos := uint8(o>>16), uint8(o>>8)
	if f.ttl() != ttl {
		n.setIP(f.fd, unix.IP_TTL, int32(ttl))
	}
	if f.tos() != tos {
		n.setIP(f.fd, unix.IP_TOS, int32(tos))
	}
	f.setHeader(ttl, tos)
	switch may := f.flags&mapFragments != 0; {
	case may && o&1 != 0:
		n.setIP(f.fd, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO)
		f.flags &^= mapFragments
	case !may && o&1 == 0:
		n.setIP(f.fd, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DONT)
		f.flags |= mapFragments
	}
}

// pieces fills iovs with the n bytes from skip on of a datagram, and returns how
// many it took, or -1 if they are too few.
func pieces(iovs []unix.Iovec, p *outbound, skip, n int) (used int) {
	b, tail := p.f.Head[p.off:max(int32(p.f.HeadLen), p.off)], p.f.Tail
	for n > 0 {
		if skip < len(b) {
			if used == len(iovs) {
				return -1
			}
			k := min(n, len(b)-skip)
			setIov(&iovs[used], b[skip:skip+k])
			used++
			n -= k
			skip = 0
		} else {
			skip -= len(b)
		}
		if len(tail) == 0 {
			break
		}
		b, tail = tail[0], tail[1:]
	}
	return used
}

// sendRuns sends the first n messages.
func (w *worker) sendRuns(b *frame.Batch, i int32, n int) {
	t, fl := w.udp.tx, w.table.at(i)
	for k, tries := 0, 0; k < n; {
		sent, errno := sendmmsg(fl.fd, t.msgs[k:n])
		if errno == 0 {
			k += sent
			tries = 0
			continue
		}
		r := &t.runs[k]
		// An ICMP error that came before shows up here, once.
		if tries++; tries <= 2 && mayBeEarlier(errno) && !(r.cut && errno == unix.EMSGSIZE) {
			continue
		}
		if r.cut {
			switch errno {
			case unix.EIO, unix.ENOPROTOOPT:
				w.udp.noSegment = true // the device cannot compute checksums
			case unix.EMSGSIZE, unix.EINVAL:
				fl.flags |= mapAlone
			}
			w.sendEach(b, i, r)
		} else {
			w.sendFailed(b, i, &t.wait[r.first-1], errno)
		}
		k++
		tries = 0
	}
}

// mayBeEarlier says whether an error of a send may be one about what was sent
// before (icmp_err_convert of Linux).
func mayBeEarlier(errno unix.Errno) bool {
	switch errno {
	case unix.ECONNREFUSED, unix.EHOSTUNREACH, unix.ENETUNREACH, unix.EHOSTDOWN, unix.ENONET, unix.EMSGSIZE,
		unix.ENOPROTOOPT, unix.EOPNOTSUPP, unix.EPROTO, unix.EACCES, unix.EINTR:
		return true
	}
	return false
}

// sendEach sends the datagrams of a run one by one, so that each is told of
// what is wrong with it. A guest's USO frame is cut here.
func (w *worker) sendEach(b *frame.Batch, i int32, r *run) {
	t := w.udp.tx
	at := r.first
	for range r.count {
		p := &t.wait[at-1]
		at = p.next
		size := p.n
		if p.f.GSO != frame.GSONone {
			size = int32(p.f.GSOSize)
		}
		for off := int32(0); off < p.n; off += size {
			if errno := w.sendPart(i, p, int(off), int(min(size, p.n-off))); errno != 0 {
				w.sendFailed(b, i, p, errno)
				break // the same would become of the rest
			}
		}
	}
}

// sendPart sends n bytes of a datagram, from skip on.
func (w *worker) sendPart(i int32, p *outbound, skip, n int) unix.Errno {
	t := w.udp.tx
	k := pieces(t.partIovs[:], p, skip, n)
	if k < 0 {
		return unix.EFAULT
	}
	name := &t.partName
	w.net.putAddr(name, p.addr, p.port)
	t.part = unix.Msghdr{Name: nameOf(name), Namelen: sockAddrLen, Iov: &t.partIovs[0]}
	t.part.SetIovlen(k)
	if p.src != 0 && w.six != nil {
		c := &t.sources6().part
		c.info.Addr = w.net.six.address(p.src)
		t.part.Control = c.base()
		t.part.SetControllen(sourceControl6Len)
	} else if p.src != 0 {
		binary.BigEndian.PutUint32(t.partCtl.info.Spec_dst[:], p.src)
		t.part.Control = t.partCtl.base()
		t.part.SetControllen(sourceControlLen)
	}
	for tries := 0; ; tries++ {
		_, errno := sendmsg(w.table.at(i).fd, &t.part, 0)
		if errno == 0 || tries == 2 || !mayBeEarlier(errno) {
			return errno
		}
	}
}

// sendFailed drops a datagram that the host did not take, and tells the guest
// where it can mend that.
func (w *worker) sendFailed(b *frame.Batch, i int32, p *outbound, errno unix.Errno) {
	f := p.f
	switch errno {
	case unix.EMSGSIZE:
		if p.opts&1 == 0 {
			f.Drop(frame.OversizeFrame)
			return
		}
		w.icmpError(b, f, icmpUnreachable, codeFragNeeded, w.pathMTU(b, i))
		f.Drop(frame.FragNeeded)
	case unix.ENETUNREACH, unix.ENETDOWN:
		w.refuse(b, f, icmpUnreachable, codeNet, frame.NoRoute)
	case unix.EHOSTUNREACH, unix.EHOSTDOWN, unix.EADDRNOTAVAIL:
		w.refuse(b, f, icmpUnreachable, codeHost, frame.NoRoute)
	case unix.EACCES, unix.EPERM:
		w.refuse(b, f, icmpUnreachable, codeProhibited, frame.Policy)
	case unix.EFAULT:
		f.Drop(frame.BadDescriptor) // the guest's memory has gone
	default:
		f.Drop(frame.SendFailed)
	}
}
