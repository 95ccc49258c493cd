// Package frame is the unit of work: a borrowed Ethernet frame, its private
// header copy, its offload meaning, its batch.
//
// A port lends its frames to a worker from Pull to Release. What a decision
// reads lies in [Frame.Head], copied once from the peer's memory; what nobody
// decides on stays in [Frame.Tail], borrowed and never written.
package frame

import (
	"encoding/binary"
	"fmt"
	"strconv"
)

// HeadSize is how many bytes of a frame are copied for inspection and
// rewriting: Ethernet, VLAN tag, IPv4 or IPv6 and transport header, and of an
// ICMP error the embedded headers.
const HeadSize = 128

// EthernetLen is the length of an Ethernet header without a VLAN tag.
const EthernetLen = 14

// MaxLen is the longest frame that is carried: 64 KiB of IP packet, an
// Ethernet header and two VLAN tags.
const MaxLen = 65535 + EthernetLen + 8

// PortID names a port of the engine, and so a verdict: where a frame goes.
type PortID uint16

const (
	// Drop is the zero verdict, so that a frame that no stage claims is lost
	// and counted rather than sent somewhere.
	Drop PortID = 0
	// Consumed is the verdict of a frame that a stage has answered or kept;
	// it is neither sent on nor counted as lost.
	Consumed PortID = 0xffff
)

// Frame is one Ethernet frame under way, without FCS. The frame's bytes are
// Head[:HeadLen] followed by the slices of Tail.
//
// A Frame lives in a [Batch] and is valid until the batch is released. It is
// not safe for concurrent use.
type Frame struct {
	Offload        // what the sender left for others to do
	Len     int32  // length in bytes, Ethernet header included
	HeadLen uint16 // bytes in Head that belong to the frame, at most HeadSize
	In, Out PortID // where it came from, where it goes
	Queue   uint16 // queue pair: where it came from, or the rx queue it should go to
	Reason  DropReason
	L3, L4  uint8 // offsets in Head, set by the Parse functions; 0 is unknown
	Proto   uint8 // IP protocol, valid if L3 is set
	Frag    bool  // an IP fragment with a non-zero offset: there is no transport header at L4

	// Token is the lending port's own: the chain's head, for instance.
	Token uint32

	// RxAt and RxBufs say that the frame was received into that many rx
	// buffers, from that one on, of the port which it is for, if it is for
	// that one in the end. 0 buffers: it lies elsewhere.
	RxAt, RxBufs uint16

	// Tail is the rest of the frame. borrowed: it may be guest memory that
	// its owner changes at any moment, so copy or send it, never decide on it.
	Tail [][]byte

	// Head is the engine's private copy of the first HeadLen bytes.
	Head [HeadSize]byte
}

// Drop ends the frame with a reason.
func (f *Frame) Drop(r DropReason) {
	f.Out, f.Reason = Drop, r
}

// EtherType returns the type field behind the source address. The frame must
// hold an Ethernet header.
func (f *Frame) EtherType() uint16 { return binary.BigEndian.Uint16(f.Head[12:14]) }

// Dst and Src return the frame's addresses, borrowed from Head.
func (f *Frame) Dst() []byte { return f.Head[0:6:6] }

// Src returns the source address, borrowed from Head.
func (f *Frame) Src() []byte { return f.Head[6:12:12] }

// SetEthernet writes both addresses.
func (f *Frame) SetEthernet(dst, src MAC) {
	copy(f.Head[0:6], dst[:])
	copy(f.Head[6:12], src[:])
}

// MAC is an Ethernet address.
type MAC [6]byte

const hexDigits = "0123456789abcdef"

// String returns the address as six pairs of digits with colons.
func (m MAC) String() string {
	b := make([]byte, 0, 17)
	for i, v := range m {
		if i > 0 {
			b = append(b, ':')
		}
		b = append(b, hexDigits[v>>4], hexDigits[v&15])
	}
	return string(b)
}

// MarshalText makes addresses readable in JSON.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (m *MAC) UnmarshalText(b []byte) error {
	if len(b) != 17 {
		return fmt.Errorf("%q is no hardware address", b)
	}
	for i := range m {
		v, err := strconv.ParseUint(string(b[3*i:3*i+2]), 16, 8)
		if err != nil || i > 0 && b[3*i-1] != ':' {
			return fmt.Errorf("%q is no hardware address", b)
		}
		m[i] = byte(v)
	}
	return nil
}

// Broadcast is the address of everybody on the link.
var Broadcast = MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// SetBytes makes the frame consist of head and tail: the first HeadSize bytes
// of head are copied to Head, the rest of it and tail become Tail, for which
// segs is the room (at least 1+len(tail) long, and kept by the frame).
func (f *Frame) SetBytes(head []byte, tail [][]byte, segs [][]byte) {
	n := copy(f.Head[:], head)
	f.HeadLen, f.Len = uint16(n), int32(len(head))
	out := segs[:0]
	if len(head) > n {
		out = append(out, head[n:])
	}
	for _, t := range tail {
		out = append(out, t)
		f.Len += int32(len(t))
	}
	f.Tail = out
}

// CopyTo copies the whole frame to dst, which must hold Len bytes, and returns
// how many it copied.
func (f *Frame) CopyTo(dst []byte) int {
	n := copy(dst, f.Head[:f.HeadLen])
	for _, t := range f.Tail {
		n += copy(dst[n:], t)
	}
	return n
}

// Bytes returns a private copy of the frame, for tests and slow paths.
func (f *Frame) Bytes() []byte {
	b := make([]byte, f.Len)
	return b[:f.CopyTo(b)]
}
