package frame

import (
	"encoding/binary"
	"math/bits"
)

// Sum adds b to a ones'-complement sum that Fold ends (RFC 1071). b's first
// byte is at an even offset of the summed data.
func Sum(b []byte, sum uint64) uint64 {
	var carry uint64
	// 64 bytes a turn: the carry leaves the flags once per turn, and 1460 bytes
	// take 2/3 of the time of a loop over 32.
	for len(b) >= 64 {
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b), carry)
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b[8:]), carry)
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b[16:]), carry)
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b[24:]), carry)
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b[32:]), carry)
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b[40:]), carry)
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b[48:]), carry)
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b[56:]), carry)
		b = b[64:]
	}
	for len(b) >= 8 {
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b), carry)
		b = b[8:]
	}
	var last uint64
	if len(b) >= 4 {
		last = uint64(binary.BigEndian.Uint32(b))
		b = b[4:]
	}
	if len(b) >= 2 {
		last += uint64(binary.BigEndian.Uint16(b))
		b = b[2:]
	}
	if len(b) > 0 {
		last += uint64(b[0]) << 8
	}
	sum, carry = bits.Add64(sum, last, carry)
	sum, carry = bits.Add64(sum, 0, carry)
	return sum + carry
}

// Fold ends a sum: it returns the 16-bit ones'-complement sum, not inverted.
func Fold(sum uint64) uint16 {
	sum = sum>>32 + sum&0xffffffff
	sum = sum>>32 + sum&0xffffffff
	sum = sum>>16 + sum&0xffff
	sum = sum>>16 + sum&0xffff
	return uint16(sum>>16 + sum&0xffff)
}

// SumFrom returns the sum over the frame from offset start to end, Head and
// Tail. start must lie in Head.
func (f *Frame) SumFrom(start, end int, sum uint64) uint64 {
	n := min(int(f.HeadLen), end)
	if start < n {
		sum = Sum(f.Head[start:n], sum)
	}
	odd := (n-start)&1 == 1
	left := end - n
	for _, t := range f.Tail {
		if left <= 0 {
			break
		}
		if len(t) > left {
			t = t[:left]
		}
		left -= len(t)
		sum = sumPiece(t, sum, odd)
		odd = odd != (len(t)&1 == 1)
	}
	return sum
}

// CheckOffload says whether the frame's offload agrees with the frame (H070 to
// H073), and makes it exact: HdrLen is computed, fields without meaning are 0.
// The checksum field must lie in Head, behind the network header where that is
// known; a GSO frame must have the headers that its type names. Only frames
// that pass may go on.
func (f *Frame) CheckOffload() bool {
	f.HdrLen = 0
	if f.Flags&NeedsCsum == 0 {
		f.CsumStart, f.CsumOffset = 0, 0
	} else {
		start, field := int(f.CsumStart), int(f.CsumStart)+int(f.CsumOffset)
		if start < EthernetLen || field+2 > int(f.HeadLen) {
			return false
		}
		switch f.EtherType() {
		case TypeIPv4:
			if start < EthernetLen+int(f.Head[EthernetLen]&15)*4 {
				return false
			}
		case TypeIPv6:
			if start < EthernetLen+ip6HdrLen {
				return false
			}
		}
	}
	if f.GSO == GSONone {
		f.GSOSize = 0
		return true
	}
	return f.Flags&NeedsCsum != 0 && f.checkGSO()
}

// checkGSO is CheckOffload for a GSO frame. It asks for what Linux asks for
// (virtio_net_hdr_to_skb), so that a frame that passes can be handed to a host
// or a guest whole.
func (f *Frame) checkGSO() bool {
	l, ok := f.gsoHeaders()
	if !ok || f.CsumStart != uint16(l.l4) || !saneGSOSize(f.GSOType(), int(f.GSOSize), int(f.Len)-int(l.hdr)) {
		return false
	}
	f.HdrLen = uint16(l.hdr)
	if l.proto == ProtoUDP {
		return f.CsumOffset == udpSum
	}
	return f.CsumOffset == tcpSum
}

const (
	// minGSOSize is the smallest TCP segment that a GSO frame may ask for.
	// Linux never sends with a smaller MSS (tcp_min_snd_mss); 64 KiB in
	// segments of a byte would be an amplifier.
	minGSOSize = 48
	// maxUDPSegments is what Linux allows (UDP_MAX_SEGMENTS, 64 before 6.9).
	// Datagrams may be as small as they like.
	maxUDPSegments = 128
)

// saneGSOSize bounds the number of segments of a GSO frame (H072).
func saneGSOSize(typ uint8, size, payload int) bool {
	if typ == GSOUDPL4 {
		return size > 0 && payload <= size*maxUDPSegments
	}
	return size >= minGSOSize
}

// CompleteChecksum does what NeedsCsum left undone. The frame must have passed
// CheckOffload and must not be a GSO frame.
func (f *Frame) CompleteChecksum() {
	start := int(f.CsumStart)
	sum := ^Fold(f.SumFrom(start, int(f.Len), 0))
	if sum == 0 && f.CsumOffset == 6 {
		sum = 0xffff // 0 means "no checksum" in UDP (RFC 768)
	}
	binary.BigEndian.PutUint16(f.Head[start+int(f.CsumOffset):], sum)
	f.Flags &^= NeedsCsum
	f.CsumStart, f.CsumOffset = 0, 0
}
