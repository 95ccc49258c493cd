package vhosttest

import (
	"encoding/binary"

	"sidewire/engine/frame"
)

const (
	etherLen   = 14
	ipv4HdrLen = 20
	ipv6HdrLen = 40
)

// checksumAt is where the checksum is in the header of a protocol that has one.
var checksumAt = [256]uint16{frame.ProtoTCP: 16, frame.ProtoUDP: 6}

// believeValid makes a header that says that the checksum was found right,
// which a driver believes, into one that a tap believes as much: a tap knows
// only checksums that nobody has made yet. passt relies on it and leaves wrong
// ones in its frames. m holds the header and at least the beginning of the
// frame; what is no whole TCP or UDP packet stays as it is.
func believeValid(m []byte, hdrLen int) {
	if m[0]&(frame.NeedsCsum|frame.DataValid) != frame.DataValid || len(m) < hdrLen+etherLen+ipv4HdrLen {
		return
	}
	ip := m[hdrLen+etherLen:]
	proto, l4 := byte(0), 0
	switch binary.BigEndian.Uint16(m[hdrLen+12:]) {
	case 0x0800:
		const offsetAndMore = 0x3fff
		if binary.BigEndian.Uint16(ip[6:])&offsetAndMore == 0 {
			proto, l4 = ip[9], int(ip[0]&0xf)*4
		}
	case 0x86dd:
		proto, l4 = ip[6], ipv6HdrLen
	}
	at := int(checksumAt[proto])
	if at == 0 || len(ip) < l4+at+2 {
		return
	}
	m[0] = m[0]&^frame.DataValid | frame.NeedsCsum
	binary.LittleEndian.PutUint16(m[6:], uint16(etherLen+l4))
	binary.LittleEndian.PutUint16(m[8:], uint16(at))
}
