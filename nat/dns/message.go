package dns

import "encoding/binary"

// The header of a message (RFC 1035 section 4.1.1).
const (
	headerLen = 12

	flagQR     = 0x8000 // a response
	maskOpcode = 0x7800
	flagAA     = 0x0400
	flagTC     = 0x0200
	flagRD     = 0x0100
	maskRcode  = 0x000f

	rcodeFormErr  = 1
	rcodeServFail = 2
	rcodeNXDomain = 3
	rcodeNotImp   = 4
	rcodeRefused  = 5

	typeSOA  = 6
	typeSIG  = 24
	typeOPT  = 41
	typeTSIG = 250

	minSize = 512 // of an answer over UDP that everybody takes
)

func flags(msg []byte) uint16   { return binary.BigEndian.Uint16(msg[2:]) }
func qdcount(msg []byte) uint16 { return binary.BigEndian.Uint16(msg[4:]) }

// isQuery says whether a message has a header and asks something.
func isQuery(msg []byte) bool { return len(msg) >= headerLen && flags(msg)&flagQR == 0 }

// question returns the ends of the name and of the whole of the one question
// of a message. A message without a question, or with a count that nobody
// uses, has none; ok is false if it cannot be read.
func question(msg []byte) (name, end int, ok bool) {
	if qdcount(msg) != 1 {
		return headerLen, headerLen, qdcount(msg) == 0
	}
	for at := headerLen; at < len(msg) && at < headerLen+255; {
		n := int(msg[at])
		switch {
		case n == 0:
			at++
			return at, at + 4, at+4 <= len(msg)
		case n&0xc0 == 0xc0: // a pointer ends the name (section 4.1.4)
			at += 2
			return at, at + 4, at+4 <= len(msg)
		case n&0xc0 != 0:
			return 0, 0, false
		}
		at += 1 + n
	}
	return 0, 0, false
}

// fits says whether an answer belongs to a query whose question ends where
// question has said (RFC 5452 section 9.1). The letters of the name may have
// changed their case. An error may come without the question, as from a
// server that could not read it.
func fits(query, answer []byte, name, end int) bool {
	if len(answer) < headerLen || answer[0] != query[0] || answer[1] != query[1] ||
		flags(answer)&flagQR == 0 || (flags(answer)^flags(query))&maskOpcode != 0 {
		return false
	}
	if qdcount(answer) == 0 && (qdcount(query) == 0 || flags(answer)&maskRcode != 0) {
		return true
	}
	if qdcount(answer) != qdcount(query) || len(answer) < end {
		return false
	}
	for i := headerLen; i < end; i++ {
		a, q := answer[i], query[i]
		if i < name { // lengths of labels are no letters
			a, q = lower(a), lower(q)
		}
		if a != q {
			return false
		}
	}
	return true
}

// declines says whether an answer is a resolver's word that it cannot or will
// not help, not that nobody could.
func declines(answer []byte) bool {
	switch flags(answer) & maskRcode {
	case rcodeServFail, rcodeNotImp, rcodeRefused:
		return true
	}
	return false
}

func lower(c byte) byte {
	if c >= 'A' && c <= 'Z' {
		c += 'a' - 'A'
	}
	return c
}

// appendLower appends a name in small letters; ok is false if it has a pointer.
func appendLower(dst, name []byte) (out []byte, ok bool) {
	for at := 0; at < len(name); at += 1 + int(name[at]) {
		if name[at]&0xc0 != 0 {
			return dst, false
		}
	}
	for _, c := range name {
		dst = append(dst, lower(c)) // lengths of labels are no letters
	}
	return dst, true
}

// record is what matters of a resource record (section 4.1.3).
type record struct {
	typ   uint16
	ttl   uint32
	ttlAt int // in the message
	rdlen int
}

// readRecord reads the record at at; next is behind it.
func readRecord(msg []byte, at int) (r record, next int, ok bool) {
	for {
		if at >= len(msg) {
			return r, 0, false
		}
		n := int(msg[at])
		at++
		if n&0xc0 == 0xc0 { // a pointer ends the name (section 4.1.4)
			at++
			break
		}
		if n&0xc0 != 0 {
			return r, 0, false
		}
		if n == 0 {
			break
		}
		at += n
	}
	if at+10 > len(msg) {
		return r, 0, false
	}
	r = record{
		typ: binary.BigEndian.Uint16(msg[at:]), ttl: binary.BigEndian.Uint32(msg[at+4:]), ttlAt: at + 4,
		rdlen: int(binary.BigEndian.Uint16(msg[at+8:])),
	}
	next = at + 10 + r.rdlen
	return r, next, next <= len(msg)
}

// failure makes a query, as far as its question, the answer that it failed.
func failure(query []byte, end int, rcode uint16) []byte {
	msg := query[:end]
	if end == headerLen {
		binary.BigEndian.PutUint16(msg[4:], 0)
	}
	binary.BigEndian.PutUint16(msg[2:], flags(msg)&(maskOpcode|flagRD)|flagQR|rcode)
	clear(msg[6:headerLen])
	return msg
}
