package engine

import (
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
	native  uint16
	plain   bool     // does not know VLANs: everything passes as it is
	trunk   bool     // some VLANs leave tagged
	tagged  *vlanSet // VLANs that may come tagged
	members *vlanSet // VLANs that the port is a member of
}

func newPortVLANs(c SwitchPort) (portVLANs, error) {
	if c.Access == 0 && c.Trunk == nil {
		return portVLANs{plain: true, trunk: true}, nil
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
	return v, nil
}
