package dhcp

import (
	"encoding/binary"

	"github.com/insomniacslk/dhcp/dhcpv4"

	"sidewire/engine/frame"
)

// Layout of a BOOTP message (RFC 2131, section 2).
const (
	offHops   = 3
	offXid    = 4
	offFlags  = 10
	offCiaddr = 12
	offYiaddr = 16
	offSiaddr = 20
	offGiaddr = 24
	offChaddr = 28
	offSname  = 44
	offFile   = 108
	offCookie = 236
	offOption = 240

	snameLen = offFile - offSname
	fileLen  = offCookie - offFile

	opRequest, opReply = 1, 2
	htypeEthernet      = 1
	cookie             = 0x63825363
	flagBroadcast      = 0x8000
)

// maxOptions bounds how many options a message may carry (H089): clients send
// about ten.
const maxOptions = 128

// maxEcho is the longest option that is sent back as it came.
const maxEcho = 255

// Message types that a client sends.
const (
	typeDiscover = byte(dhcpv4.MessageTypeDiscover)
	typeOffer    = byte(dhcpv4.MessageTypeOffer)
	typeRequest  = byte(dhcpv4.MessageTypeRequest)
	typeDecline  = byte(dhcpv4.MessageTypeDecline)
	typeAck      = byte(dhcpv4.MessageTypeAck)
	typeNak      = byte(dhcpv4.MessageTypeNak)
	typeRelease  = byte(dhcpv4.MessageTypeRelease)
	typeInform   = byte(dhcpv4.MessageTypeInform)
)

// request is a client's message, checked. Addresses that it does not give are
// zero.
type request struct {
	kind             byte
	bootp            []byte // the message itself, for what is copied from its header
	frameSrc, chaddr frame.MAC
	ipSrc            [4]byte
	portSrc          uint16
	ciaddr, giaddr   [4]byte
	requested        [4]byte // option 50
	serverID         [4]byte // option 54
	broadcast        bool
	rapid            bool
	maxSize          int    // option 57: the longest datagram, 0 if not given
	parameters       []byte // option 55
	clientID, relay  []byte // options 61 and 82
	hostname         string // option 12
}

// readRequest reads the message that starts at offset at of a frame whose
// headers are checked. It returns nil if a client cannot have meant it, and
// whether the codec panicked over it.
func readRequest(b []byte, at int) (q *request, panicked bool) {
	udp := b[at-udpLen:]
	n := int(binary.BigEndian.Uint16(udp[4:]))
	m := udp[udpLen:n:n]
	if !plausible(m) {
		return nil, false
	}
	p, panicked := decode(m, dhcpv4.FromBytes)
	if p == nil {
		return nil, panicked
	}
	q = &request{
		bootp:     m,
		frameSrc:  frame.MAC(b[6:12]),
		chaddr:    frame.MAC(m[offChaddr : offChaddr+6]),
		ipSrc:     [4]byte(b[26:30]),
		portSrc:   binary.BigEndian.Uint16(udp),
		ciaddr:    [4]byte(m[offCiaddr:offYiaddr]),
		giaddr:    [4]byte(m[offGiaddr:offChaddr]),
		broadcast: binary.BigEndian.Uint16(m[offFlags:])&flagBroadcast != 0,
	}
	if !q.readOptions(p.Options) {
		return nil, false
	}
	return q, false
}

// plausible says whether m is a BOOTREQUEST over Ethernet whose options can be
// walked to their end. The codec gets nothing else to see (H089).
func plausible(m []byte) bool {
	if len(m) < offOption || m[0] != opRequest || m[1] != htypeEthernet || m[2] != 6 ||
		binary.BigEndian.Uint32(m[offCookie:]) != cookie {
		return false
	}
	count := 0
	overload, ok := walk(m[offOption:], &count, true)
	if !ok {
		return false
	}
	if overload&overloadFile != 0 {
		if _, ok = walk(m[offFile:offCookie], &count, false); !ok {
			return false
		}
	}
	if overload&overloadSname != 0 {
		_, ok = walk(m[offSname:offFile], &count, false)
	}
	return ok
}

// The bits of option 52: which fields hold options too.
const (
	overloadFile  = 1
	overloadSname = 2
)

// walk follows the options of one area to its END and returns the value of
// option 52, which only the first area may hold.
func walk(a []byte, count *int, first bool) (overload byte, ok bool) {
	for i := 0; i < len(a); {
		code := a[i]
		i++
		switch code {
		case optPad:
			continue
		case optEnd:
			return overload, true
		}
		if i >= len(a) || i+1+int(a[i]) > len(a) {
			return 0, false
		}
		v := a[i+1 : i+1+int(a[i])]
		i += 1 + len(v)
		if *count++; *count > maxOptions {
			return 0, false
		}
		if code == optOverload {
			if !first || overload != 0 || len(v) != 1 || v[0] < 1 || v[0] > 3 {
				return 0, false
			}
			overload = v[0]
		}
	}
	return 0, false // no END
}

// decode runs the codec. A panic in it is caught: it touches private memory
// only, so the message is at fault.
func decode(m []byte, codec func([]byte) (*dhcpv4.DHCPv4, error)) (p *dhcpv4.DHCPv4, panicked bool) {
	defer func() {
		if recover() != nil {
			p, panicked = nil, true
		}
	}()
	p, err := codec(m)
	if err != nil {
		return nil, false
	}
	// The codec leaves overloaded fields alone; RFC 3396, section 5, gives the
	// order in which parts of one option are joined.
	if o := p.Options[optOverload]; len(o) == 1 {
		if o[0]&overloadFile != 0 && p.Options.FromBytes(m[offFile:offCookie]) != nil {
			return nil, false
		}
		if o[0]&overloadSname != 0 && p.Options.FromBytes(m[offSname:offFile]) != nil {
			return nil, false
		}
	}
	return p, false
}

// readOptions takes what the server needs. It reports whether the options
// that decide are of the right length.
func (q *request) readOptions(o dhcpv4.Options) bool {
	kind := o[optType]
	if len(kind) != 1 {
		return false
	}
	switch q.kind = kind[0]; q.kind {
	case typeDiscover, typeRequest, typeDecline, typeRelease, typeInform:
	default:
		return false
	}
	for code, to := range map[uint8]*[4]byte{optRequestedIP: &q.requested, optServerID: &q.serverID} {
		if v, ok := o[code]; ok {
			if len(v) != 4 {
				return false
			}
			*to = [4]byte(v)
		}
	}
	if v := o[optMaxSize]; len(v) == 2 {
		q.maxSize = int(binary.BigEndian.Uint16(v))
	}
	q.parameters, q.clientID, q.relay = o[optParameters], o[optClientID], o[optRelay]
	q.hostname = printable(o[optHostname])
	_, q.rapid = o[optRapidCommit]
	return len(q.clientID) <= maxEcho && len(q.relay) <= maxEcho
}

// maxHostname is how much of a guest's name is kept: a DNS label.
const maxHostname = 63

// printable makes a name that a guest chose fit for a terminal and a file.
func printable(v []byte) string {
	if len(v) > maxHostname {
		v = v[:maxHostname]
	}
	s := make([]byte, 0, len(v))
	for _, c := range v {
		if c == 0 {
			break
		}
		if c <= ' ' || c > '~' {
			c = '?'
		}
		s = append(s, c)
	}
	return string(s)
}
