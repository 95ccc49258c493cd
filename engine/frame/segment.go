package frame

import (
	"encoding/binary"
	"math/bits"
)

// Offsets in transport and IPv6 headers that segmentation rewrites.
const (
	tcpSeq    = 4
	tcpOff    = 12
	tcpFlags  = 13
	tcpSum    = 16
	tcpMinLen = 20
	udpLen    = 4
	udpSum    = 6
	udpHdrLen = 8

	ip6PayloadLen = 4
	ip6Next       = 6
	ip6Src        = 8
	ip6HdrLen     = 40

	tcpFIN = 0x01
	tcpPSH = 0x08
	tcpCWR = 0x80
)

// vlanType and qinqType are the EtherTypes that a VLAN tag begins with.
const (
	vlanType = 0x8100
	qinqType = 0x88a8
)

// IPv6 extension headers that a transport header may follow (RFC 8200, 4.1).
const (
	ip6HopByHop = 0
	ip6DestOpts = 60
)

// maxPieces bounds the scatter list of a frame that is segmented: a chain has
// at most 1024 descriptors, and the end of Head is one piece more.
const maxPieces = 1025

// gsoLayout is where the headers of a GSO frame lie, as offsets in Head.
type gsoLayout struct {
	l3, l4, hdr uint8 // hdr is the length of all headers
	proto       uint8
	v6          bool
}

// gsoHeaders finds the headers of a GSO frame and checks that they are what
// its GSO type says, whole, unfragmented and in Head. It reads lengths from
// the headers only, never from the offload.
func (f *Frame) gsoHeaders() (l gsoLayout, ok bool) {
	l3, n := EthernetLen, int(f.HeadLen)
	if n < l3+ip4MinLen {
		return l, false
	}
	typ := f.EtherType()
	for range 2 {
		if typ != vlanType && typ != qinqType {
			break
		}
		typ = binary.BigEndian.Uint16(f.Head[l3+2:])
		l3 += 4
	}
	var l4 int
	switch h := f.Head[l3:n]; {
	case typ == TypeIPv4 && len(h) >= ip4MinLen && h[0]>>4 == 4:
		ihl := int(h[0]&15) * 4
		if ihl < ip4MinLen || binary.BigEndian.Uint16(h[ip4Frag:])&^DontFragment != 0 {
			return l, false
		}
		l.proto, l4 = h[ip4Proto], l3+ihl
	case typ == TypeIPv6 && len(h) >= ip6HdrLen && h[0]>>4 == 6:
		var off int
		l.proto, off = ip6Transport(h)
		l.v6, l4 = true, l3+off
	default:
		return l, false
	}
	hdr := l4 + udpHdrLen
	switch {
	case l.proto == ProtoTCP && f.GSOType() == GSOTCPv4 && !l.v6, l.proto == ProtoTCP && f.GSOType() == GSOTCPv6 && l.v6:
		if l4+tcpMinLen > n {
			return l, false
		}
		doff := int(f.Head[l4+tcpOff]>>4) * 4
		if doff < tcpMinLen {
			return l, false
		}
		hdr = l4 + doff
	case l.proto == ProtoUDP && f.GSO == GSOUDPL4:
	default:
		return l, false
	}
	if hdr > n || hdr >= int(f.Len) {
		return l, false
	}
	l.l3, l.l4, l.hdr = uint8(l3), uint8(l4), uint8(hdr)
	return l, true
}

// ip6Transport walks the extension headers of an IPv6 packet and returns the
// first protocol that is none, and its offset. Routing headers end the walk:
// the checksum behind one is not over the addresses of the fixed header.
func ip6Transport(h []byte) (proto uint8, off int) {
	proto, off = h[ip6Next], ip6HdrLen
	for proto == ip6HopByHop || proto == ip6DestOpts {
		if off+8 > len(h) {
			return 0xff, off
		}
		proto, off = h[off], off+8+int(h[off+1])*8
	}
	return proto, off
}

// Segmenter cuts a GSO frame into the frames that it stands for, with the
// headers that Linux would give them (tcp_gso_segment, __udp_gso_segment): for
// ports that cannot take a GSO frame whole. The payload is not copied.
//
// The zero value is ready for use. A Segmenter is large and not safe for
// concurrent use: each worker of a port keeps one.
type Segmenter struct {
	// Partial leaves the transport checksum to the receiver (NeedsCsum)
	// instead of computing it.
	Partial bool

	src     *Frame
	lay     gsoLayout
	size    int      // payload bytes of a segment
	left    int      // payload bytes not yet in a segment
	piece   []byte   // rest of the piece of payload that comes next
	rest    [][]byte // pieces behind it
	index   uint32   // number of the next segment
	l3sum   uint64   // IPv4 header without length, ID and checksum
	pseudo  uint64   // pseudo-header without the length
	out     Frame
	scatter [maxPieces][]byte
}

// Start begins with f, which must not change until Next has returned nil. It
// reports false if f is no frame that can be segmented: drop it as
// BadOffload. What the frame's offload says of header lengths is not believed;
// a frame that fits into one segment yields one.
func (s *Segmenter) Start(f *Frame) bool {
	s.src, s.left = nil, 0
	if f.Len > MaxLen || len(f.Tail) >= maxPieces || !f.whole() {
		return false
	}
	lay, ok := f.gsoHeaders()
	if !ok {
		return false
	}
	payload := int(f.Len) - int(lay.hdr)
	if !saneGSOSize(f.GSOType(), int(f.GSOSize), payload) {
		return false
	}
	size := min(int(f.GSOSize), payload)
	if int(lay.hdr)-int(lay.l3)+size > 65535 {
		return false
	}
	s.src, s.lay, s.size, s.left, s.index = f, lay, size, payload, 0
	s.piece, s.rest = f.Head[lay.hdr:f.HeadLen], f.Tail
	s.sumHeaders()
	return true
}

// whole says whether Head and Tail hold as many bytes as Len says.
func (f *Frame) whole() bool {
	n := int(f.HeadLen)
	for _, t := range f.Tail {
		n += len(t)
	}
	return n == int(f.Len)
}

// sumHeaders sums what all segments have in common.
func (s *Segmenter) sumHeaders() {
	l := &s.lay
	h := s.src.Head[l.l3:l.l4]
	if l.v6 {
		s.pseudo = uint64(Fold(Sum(h[ip6Src:ip6HdrLen], uint64(l.proto))))
		return
	}
	s.pseudo = uint64(Fold(Sum(h[ip4Src:ip4MinLen], uint64(l.proto))))
	// Version, IHL and TOS; flags and offset, TTL and protocol; addresses and options.
	s.l3sum = uint64(Fold(Sum(h[ip4Src:], Sum(h[ip4Frag:ip4Sum], Sum(h[:ip4TotalLen], 0)))))
}

// Segments is how many frames Next has still to return.
func (s *Segmenter) Segments() int {
	if s.left == 0 {
		return 0
	}
	return (s.left + s.size - 1) / s.size
}

// Next returns the next segment, borrowed until the next call, or nil at the
// end. Its Head holds the headers, its Tail borrows the payload of the frame
// that Start was given. It has In, Out, Queue and Token of that frame.
func (s *Segmenter) Next() *Frame {
	if s.left == 0 {
		s.src, s.piece, s.rest, s.out.Tail = nil, nil, nil, nil
		return nil
	}
	f, o, l := s.src, &s.out, &s.lay
	n := min(s.size, s.left)
	first, last := s.index == 0, n == s.left

	o.Offload = Offload{}
	o.Len, o.HeadLen = int32(int(l.hdr)+n), uint16(l.hdr)
	o.In, o.Out, o.Queue, o.Token = f.In, f.Out, f.Queue, f.Token
	o.L3, o.L4, o.Proto, o.Frag, o.Reason = l.l3, l.l4, l.proto, false, ReasonNone
	copy(o.Head[:l.hdr], f.Head[:l.hdr])
	sum := s.take(n)

	s.network(o.Head[l.l3:l.l4], int(l.hdr)-int(l.l3)+n)
	s.transport(o.Head[l.l4:l.hdr], n, first, last)
	s.checksum(o, sum, int(l.hdr)-int(l.l4)+n)
	s.left -= n
	s.index++
	return o
}

// take moves n bytes of payload to the segment's Tail and returns their sum,
// which is not needed and 0 if the checksum stays partial.
func (s *Segmenter) take(n int) (sum uint64) {
	tail, odd := s.scatter[:0], false
	for n > 0 {
		for len(s.piece) == 0 {
			s.piece, s.rest = s.rest[0], s.rest[1:]
		}
		k := min(n, len(s.piece))
		p := s.piece[:k:k]
		s.piece = s.piece[k:]
		tail = append(tail, p)
		n -= k
		if !s.Partial {
			sum = sumPiece(p, sum, odd)
			odd = odd != (k&1 == 1)
		}
	}
	s.out.Tail = tail
	return sum
}

// sumPiece adds a piece that begins at an odd or even offset to a sum.
func sumPiece(p []byte, sum uint64, odd bool) uint64 {
	if odd {
		// Its bytes count in the other half of their words (RFC 1071, 2 B).
		return uint64(Fold(sum)) + uint64(bits.ReverseBytes16(Fold(Sum(p, 0))))
	}
	return Sum(p, sum)
}

// network writes the length of the IP packet and, in IPv4, ID and checksum.
func (s *Segmenter) network(h []byte, length int) {
	if s.lay.v6 {
		binary.BigEndian.PutUint16(h[ip6PayloadLen:], uint16(length-ip6HdrLen))
		return
	}
	// Linux counts the ID up also where DF makes it meaningless (RFC 6864).
	id := binary.BigEndian.Uint16(h[ip4ID:]) + uint16(s.index)
	binary.BigEndian.PutUint16(h[ip4TotalLen:], uint16(length))
	binary.BigEndian.PutUint16(h[ip4ID:], id)
	binary.BigEndian.PutUint16(h[ip4Sum:], ^Fold(s.l3sum+uint64(length)+uint64(id)))
}

// transport writes what differs between the transport headers of segments,
// but for the checksum.
func (s *Segmenter) transport(h []byte, n int, first, last bool) {
	if s.lay.proto == ProtoUDP {
		binary.BigEndian.PutUint16(h[udpLen:], uint16(udpHdrLen+n))
		return
	}
	seq := binary.BigEndian.Uint32(h[tcpSeq:]) + s.index*uint32(s.size)
	binary.BigEndian.PutUint32(h[tcpSeq:], seq)
	if !last {
		h[tcpFlags] &^= tcpFIN | tcpPSH
	}
	if !first {
		h[tcpFlags] &^= tcpCWR // it answers one ECE (RFC 3168, 6.1.2)
	}
}

// checksum completes the transport checksum of a segment whose payload sums up
// to sum, or makes it partial. length is that of transport header and payload.
func (s *Segmenter) checksum(o *Frame, sum uint64, length int) {
	l := &s.lay
	field := tcpSum
	if l.proto == ProtoUDP {
		field = udpSum
	}
	h := o.Head[l.l4:l.hdr]
	pseudo := s.pseudo + uint64(length)
	if s.Partial {
		o.Flags, o.CsumStart, o.CsumOffset = NeedsCsum, uint16(l.l4), uint16(field)
		binary.BigEndian.PutUint16(h[field:], Fold(pseudo))
		return
	}
	binary.BigEndian.PutUint16(h[field:], 0)
	c := ^Fold(Sum(h, uint64(Fold(sum))+pseudo))
	if c == 0 && field == udpSum {
		c = 0xffff // 0 means "no checksum" in UDP (RFC 768)
	}
	binary.BigEndian.PutUint16(h[field:], c)
}
