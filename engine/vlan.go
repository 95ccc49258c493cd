package engine

import (
	"encoding/binary"
	"fmt"

	"sidewire/engine/frame"
)

// EtherTypes that a VLAN tag begins with (IEEE 802.1Q).
const (
	typeVLAN = 0x8100
	typeQinQ = 0x88a8
)

const (
	vlanLen  = 4      // length of a tag
	vlanMask = 0x0fff // the VLAN's number in the tag control information
	// maxTagged is the longest head that has room for a tag.
	maxTagged = frame.HeadSize - vlanLen
)

// isTag says whether an EtherType is that of a VLAN tag.
func isTag(typ uint16) bool { return typ == typeVLAN || typ == typeQinQ }

// vlanSet is a set of VLANs; nil is all of them.
type vlanSet [4096 / 64]uint64

func (s *vlanSet) has(v uint16) bool { return s == nil || s[v>>6&63]&(1<<(v&63)) != 0 }
func (s *vlanSet) add(v uint16)      { s[v>>6&63] |= 1 << (v & 63) }

// meets says whether the sets have a VLAN in common.
func (s *vlanSet) meets(t *vlanSet) bool {
	if s == nil || t == nil {
		return true
	}
	for i := range s {
		if s[i]&t[i] != 0 {
			return true
		}
	}
	return false
}

// portVLANs is how a port treats tags. Untagged frames belong to the VLAN
// native, which is 0 where the port does not know VLANs, and frames of that
// VLAN leave untagged; all others leave tagged.
type portVLANs struct {
	native   uint16
	untagged bool     // untagged frames are allowed
	plain    bool     // does not know VLANs: everything passes as it is
	trunk    bool     // some VLANs leave tagged
	tagged   *vlanSet // VLANs that may come tagged
	members  *vlanSet // VLANs that the port is a member of
}

func newPortVLANs(c SwitchPort) (portVLANs, error) {
	if c.Access == 0 && c.Trunk == nil {
		return portVLANs{untagged: true, plain: true, trunk: true}, nil
	}
	v := portVLANs{native: c.Access, trunk: len(c.Trunk) > 0, tagged: new(vlanSet), members: new(vlanSet)}
	if c.Access > 4094 {
		return v, fmt.Errorf("VLAN %d, want 1 to 4094", c.Access)
	}
	if c.Access != 0 {
		v.members.add(c.Access)
	}
	for _, id := range c.Trunk {
		if id > 4094 || id == 0 && c.Access != 0 {
			return v, fmt.Errorf("trunk VLAN %d, want 1 to 4094", id)
		}
		v.members.add(id)
		v.tagged.add(id)
	}
	v.untagged = v.members.has(v.native)
	return v, nil
}

// classify returns the VLAN of a frame that came from the port, or the reason
// to drop it.
func (p *portVLANs) classify(f *frame.Frame) (vlan uint16, r frame.DropReason) {
	if isTag(f.EtherType()) {
		if f.HeadLen < frame.EthernetLen+vlanLen {
			return 0, frame.ShortFrame
		}
		// A checksum inside the tag would change it after it was judged.
		if f.Flags&frame.NeedsCsum != 0 && f.CsumStart < frame.EthernetLen+vlanLen {
			return 0, frame.BadOffload
		}
		// VLAN 0 is a priority and no VLAN.
		if id := tagID(f); id != 0 {
			if !p.tagged.has(id) {
				return 0, frame.WrongVLAN
			}
			return id, frame.ReasonNone
		}
	}
	if !p.untagged {
		return 0, frame.WrongVLAN
	}
	return p.native, frame.ReasonNone
}

// tagID is the VLAN in the outer tag of a frame that has one.
func tagID(f *frame.Frame) uint16 { return binary.BigEndian.Uint16(f.Head[14:]) & vlanMask }

// retag gives a frame of a VLAN the tag with which it leaves the port, or
// returns why it cannot. Room for a tag is taken from b, which may be nil if
// makeRoom was called before.
func (p *portVLANs) retag(f *frame.Frame, vlan uint16, b *frame.Batch) frame.DropReason {
	tagged, want := isTag(f.EtherType()), vlan != p.native
	switch {
	case tagged && want:
		if tagID(f) == 0 {
			binary.BigEndian.PutUint16(f.Head[14:], binary.BigEndian.Uint16(f.Head[14:])|vlan)
		}
	case want:
		return pushTag(f, vlan, b)
	case tagged && !p.plain:
		return p.popTag(f)
	}
	return frame.ReasonNone
}

// pushTag puts a tag before the type field.
func pushTag(f *frame.Frame, vlan uint16, b *frame.Batch) frame.DropReason {
	if f.Len > frame.MaxLen-vlanLen {
		return frame.OversizeFrame
	}
	if !makeRoom(f, b) {
		return frame.BatchFull
	}
	copy(f.Head[12+vlanLen:], f.Head[12:f.HeadLen])
	binary.BigEndian.PutUint16(f.Head[12:], typeVLAN)
	binary.BigEndian.PutUint16(f.Head[14:], vlan)
	moveHeaders(f, vlanLen)
	return frame.ReasonNone
}

// popTag takes the outer tag away. A tag behind it must not become one that
// the port's other end obeys: it was not judged.
func (p *portVLANs) popTag(f *frame.Frame) frame.DropReason {
	if p.trunk && isTag(binary.BigEndian.Uint16(f.Head[16:])) {
		return frame.WrongVLAN
	}
	copy(f.Head[12:], f.Head[12+vlanLen:f.HeadLen])
	moveHeaders(f, -vlanLen)
	return frame.ReasonNone
}

// moveHeaders books that everything behind the addresses moved by n bytes.
func moveHeaders(f *frame.Frame, n int) {
	f.Len += int32(n)
	f.HeadLen = uint16(int(f.HeadLen) + n)
	if f.Flags&frame.NeedsCsum != 0 {
		f.CsumStart = uint16(int(f.CsumStart) + n)
	}
	if f.HdrLen != 0 {
		f.HdrLen = uint16(int(f.HdrLen) + n)
	}
	if f.L3 != 0 {
		f.L3, f.L4 = uint8(int(f.L3)+n), uint8(int(f.L4)+n)
	}
	f.RxAt, f.RxBufs = 0, 0 // there it lies as it was
}

// makeRoom sees to it that Head has room for a tag: its last bytes become a
// piece of Tail. It reports false if the batch has no room for those.
func makeRoom(f *frame.Frame, b *frame.Batch) bool {
	if f.HeadLen <= maxTagged {
		return true
	}
	if b == nil {
		return false
	}
	over := int(f.HeadLen) - maxTagged
	buf, segs := b.Alloc(over), b.Segs(1+len(f.Tail))
	if buf == nil || segs == nil {
		return false
	}
	copy(buf, f.Head[maxTagged:f.HeadLen])
	f.HeadLen = maxTagged
	f.Tail = append(append(segs, buf), f.Tail...)
	return true
}

// widen copies from Tail until Head has n bytes, or the whole frame, or no
// more room. What it has copied may be decided on.
func widen(f *frame.Frame, n int) {
	n = min(n, int(f.Len), frame.HeadSize)
	for int(f.HeadLen) < n && len(f.Tail) > 0 {
		k := copy(f.Head[f.HeadLen:n], f.Tail[0])
		f.HeadLen += uint16(k)
		if k == len(f.Tail[0]) {
			f.Tail = f.Tail[1:]
		} else {
			f.Tail[0] = f.Tail[0][k:]
		}
		f.RxAt, f.RxBufs = 0, 0
	}
}
