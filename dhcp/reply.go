package dhcp

import (
	"encoding/binary"
	"slices"

	"sidewire/engine/frame"
)

const (
	minMessage  = 300  // BOOTP's length (RFC 951), below which relays drop
	minDatagram = 576  // what every client must accept (RFC 2131, section 2)
	maxDatagram = 4096 // more than all options that a configuration can sensibly hold
	defaultMTU  = 1500
)

// option is one option of an answer, as long as it likes to be.
type option struct {
	code  byte
	data  []byte
	must  bool // in the options field, and placed before all others
	asked bool // sent only to clients that ask for it
}

// size is the length of the option when encoded: pieces of at most 255 bytes,
// each with code and length (RFC 3396).
func (o *option) size() int {
	return len(o.data) + 2*max(1, (len(o.data)+254)/255)
}

func (o *option) appendTo(b []byte) []byte {
	for v := o.data; ; {
		n := min(len(v), 255)
		b = append(b, o.code, byte(n))
		b = append(b, v[:n]...)
		if v = v[n:]; len(v) == 0 {
			return b
		}
	}
}

// send adds the answer r to the batch. It returns how many options found no
// room, or -1 if the batch has none for the frame.
func (o *offer) send(b *frame.Batch, f *frame.Frame, q *request, r *reply) int {
	mac, ip, port := o.destination(q, r)
	buf := make([]byte, headerLen, headerLen+maxDatagram)
	buf, lost := r.appendMessage(buf, q, o.maxMessage(q))
	if q.giaddr != ([4]byte{}) && r.kind == typeNak {
		// The client may not be able to receive at its address any more.
		buf[headerLen+offFlags] |= flagBroadcast >> 8
	}
	o.fillHeaders(buf, mac, ip, port)
	bytes := b.Alloc(len(buf))
	if bytes == nil {
		return -1
	}
	copy(bytes, buf)
	out := b.Reply()
	if out == nil || !b.SetReply(out, bytes) {
		return -1
	}
	out.Out, out.Queue = o.Port, f.Queue
	return lost
}

// maxMessage is the longest message that the client takes and the link carries
// in one piece. Option 57 counts the datagram's headers too.
func (o *offer) maxMessage(q *request) int {
	mtu := o.MTU
	if mtu == 0 {
		mtu = defaultMTU
	}
	n := max(minDatagram, min(q.maxSize, mtu))
	if o.KubeVirtCompat {
		n = max(minDatagram, mtu)
	}
	return min(n, maxDatagram) - ip4Len - udpLen
}

// fillHeaders writes Ethernet, IPv4 and UDP headers in front of the message.
func (o *offer) fillHeaders(b []byte, mac frame.MAC, ip [4]byte, port uint16) {
	be := binary.BigEndian
	copy(b[0:], mac[:])
	copy(b[6:], o.ServerMAC[:])
	be.PutUint16(b[12:], frame.TypeIPv4)

	h := b[frame.EthernetLen:]
	h[0] = 0x45
	be.PutUint16(h[2:], uint16(len(h)))
	h[8], h[9] = 64, frame.ProtoUDP
	copy(h[12:], o.server[:])
	copy(h[16:], ip[:])
	be.PutUint16(h[10:], ^frame.Fold(frame.Sum(h[:ip4Len], 0)))

	u := h[ip4Len:]
	be.PutUint16(u[0:], serverPort)
	be.PutUint16(u[2:], port)
	be.PutUint16(u[4:], uint16(len(u)))
	sum := frame.Sum(h[12:20], uint64(frame.ProtoUDP)+uint64(len(u)))
	if sum := ^frame.Fold(frame.Sum(u, sum)); sum != 0 {
		be.PutUint16(u[6:], sum)
	} else {
		be.PutUint16(u[6:], 0xffff)
	}
}

// appendMessage appends the message to b, at most limit bytes of it, and
// returns how many options were left out.
func (r *reply) appendMessage(b []byte, q *request, limit int) ([]byte, int) {
	at := len(b)
	b = append(b, make([]byte, offOption)...)
	m := b[at:]
	m[0], m[1], m[2] = opReply, htypeEthernet, 6
	copy(m[offXid:offXid+4], q.bootp[offXid:])
	copy(m[offFlags:offFlags+2], q.bootp[offFlags:])
	copy(m[offCiaddr:], r.ciaddr[:])
	copy(m[offYiaddr:], r.yiaddr[:])
	copy(m[offSiaddr:], r.siaddr[:])
	copy(m[offGiaddr:], q.giaddr[:])
	copy(m[offChaddr:], q.chaddr[:])
	copy(m[offFile:], r.file)
	binary.BigEndian.PutUint32(m[offCookie:], cookie)

	areas, overload, lost := r.place(limit - offOption)
	if overload&overloadFile != 0 {
		clear(m[offFile:offCookie])
		copy(m[offFile:offCookie], areas[inFile])
	}
	if overload&overloadSname != 0 {
		copy(m[offSname:offFile], areas[inSname])
	}
	b = append(b, areas[inOptions]...)
	if short := minMessage - (len(b) - at); short > 0 {
		b = append(b, make([]byte, short)...)
	}
	return b, lost
}

// The three areas that may hold options, in the order in which a client joins
// the parts of one option.
const (
	inOptions = iota
	inFile
	inSname
	nAreas
	nowhere
)

// place distributes the options over the areas, of which the first has room
// for n bytes; each that is used ends with END. Where they do not fit, the
// sname field is used as well, then the file field, whose boot file name
// option 67 repeats (RFC 2131, section 4.1). What still finds no room is lost.
func (r *reply) place(n int) (areas [nAreas][]byte, overload byte, lost int) {
	for _, overload = range []byte{0, overloadSname, overloadSname | overloadFile} {
		os, room := r.options, [nAreas]int{inOptions: n - 1}
		if overload != 0 {
			os = slices.Insert(slices.Clone(os), min(3, len(os)),
				option{code: optOverload, data: []byte{overload}, must: true})
		}
		if overload&overloadSname != 0 {
			room[inSname] = snameLen - 1
		}
		if overload&overloadFile != 0 {
			room[inFile] = fileLen - 1
		}
		areas, lost = distribute(os, room)
		if lost == 0 {
			break
		}
	}
	return areas, overload, lost
}

// distribute puts each option whole into the first area with room for it:
// those that must be sent first, then those that fit into one area only, then
// the others.
func distribute(os []option, room [nAreas]int) (areas [nAreas][]byte, lost int) {
	where := make([]int, len(os))
	for pass := range 3 {
		for i := range os {
			o := &os[i]
			long := o.size() >= fileLen
			if o.must != (pass == 0) || !o.must && long != (pass == 1) {
				continue
			}
			where[i] = nowhere
			for a := inOptions; a < nAreas && where[i] == nowhere; a++ {
				if o.size() <= room[a] && (a == inOptions || !o.must) {
					where[i] = a
					room[a] -= o.size()
				}
			}
			if where[i] == nowhere {
				lost++
			}
		}
	}
	for a := range nAreas {
		for i := range os {
			if where[i] == a {
				areas[a] = os[i].appendTo(areas[a])
			}
		}
		areas[a] = append(areas[a], optEnd)
	}
	return areas, lost
}
