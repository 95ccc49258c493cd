package vhostuser

import (
	"encoding/binary"
	"fmt"
)

// The native byte order of the wire. vhost-user has no other, and the hosts
// that run it are little-endian; guests of the modern device are as well.
var native = binary.LittleEndian

// Request is the number of a message from the frontend.
type Request uint32

// The requests, under the names of the vhost-user specification.
const (
	GetFeatures         Request = 1
	SetFeatures         Request = 2
	SetOwner            Request = 3
	ResetOwner          Request = 4
	SetMemTable         Request = 5
	SetLogBase          Request = 6
	SetLogFD            Request = 7
	SetVringNum         Request = 8
	SetVringAddr        Request = 9
	SetVringBase        Request = 10
	GetVringBase        Request = 11
	SetVringKick        Request = 12
	SetVringCall        Request = 13
	SetVringErr         Request = 14
	GetProtocolFeatures Request = 15
	SetProtocolFeatures Request = 16
	GetQueueNum         Request = 17
	SetVringEnable      Request = 18
	SendRARP            Request = 19
	NetSetMTU           Request = 20
	SetBackendReqFD     Request = 21
	IOTLBMsg            Request = 22
	SetVringEndian      Request = 23
	GetConfig           Request = 24
	SetConfig           Request = 25
	ResetDevice         Request = 34
	GetMaxMemSlots      Request = 36
	AddMemReg           Request = 37
	RemMemReg           Request = 38
	SetStatus           Request = 39
	GetStatus           Request = 40
	SetDeviceStateFD    Request = 42
	CheckDeviceState    Request = 43

	numRequests = 45
)

// Flags of a message header.
const (
	flagVersion     = 1
	flagVersionMask = 3
	flagReply       = 1 << 2
	flagNeedReply   = 1 << 3
)

// Sizes of the wire, in bytes.
const (
	headerLen    = 12
	u64Len       = 8
	stateLen     = 8
	addrLen      = 40
	regionLen    = 32
	tableLen     = 8 // before the regions
	memRegLen    = 8 + regionLen
	logLen       = 16
	configLen    = 12 // before the bytes
	configSpace  = 256
	maxPayload   = 4096 // more than any request needs; the rest is refused unread
	maxTableRegs = 8
	maxFDs       = 253 // SCM_MAX_FD of the kernel
)

// spec is what is known of a request before its handler looks at it.
type spec struct {
	name string
	// min and max bound the payload. Less is refused, more ends the
	// connection, because the sender means another protocol (H001, H002).
	min, max uint32
	// replies says that the request has a reply of its own.
	replies bool
	handle  func(*session, *message) error
}

// specs is filled by init, as handlers lead back to it by way of their errors.
var specs [numRequests]spec

func init() {
	specs = [numRequests]spec{
		GetFeatures:         {"GET_FEATURES", 0, 0, true, (*session).getFeatures},
		SetFeatures:         {"SET_FEATURES", u64Len, u64Len, false, (*session).setFeatures},
		SetOwner:            {"SET_OWNER", 0, 0, false, (*session).ignore},
		ResetOwner:          {"RESET_OWNER", 0, 0, false, (*session).ignore},
		SetMemTable:         {"SET_MEM_TABLE", tableLen, maxPayload, false, (*session).setMemTable},
		SetLogBase:          {"SET_LOG_BASE", u64Len, logLen, false, (*session).setLogBase},
		SetLogFD:            {"SET_LOG_FD", 0, u64Len, false, (*session).setLogFD},
		SetVringNum:         {"SET_VRING_NUM", stateLen, stateLen, false, (*session).setVringNum},
		SetVringAddr:        {"SET_VRING_ADDR", addrLen, addrLen, false, (*session).setVringAddr},
		SetVringBase:        {"SET_VRING_BASE", stateLen, stateLen, false, (*session).setVringBase},
		GetVringBase:        {"GET_VRING_BASE", stateLen, stateLen, true, (*session).getVringBase},
		SetVringKick:        {"SET_VRING_KICK", u64Len, u64Len, false, (*session).setVringKick},
		SetVringCall:        {"SET_VRING_CALL", u64Len, u64Len, false, (*session).setVringCall},
		SetVringErr:         {"SET_VRING_ERR", u64Len, u64Len, false, (*session).setVringErr},
		GetProtocolFeatures: {"GET_PROTOCOL_FEATURES", 0, 0, true, (*session).getProtocolFeatures},
		SetProtocolFeatures: {"SET_PROTOCOL_FEATURES", u64Len, u64Len, false, (*session).setProtocolFeatures},
		GetQueueNum:         {"GET_QUEUE_NUM", 0, 0, true, (*session).getQueueNum},
		SetVringEnable:      {"SET_VRING_ENABLE", stateLen, stateLen, false, (*session).setVringEnable},
		SendRARP:            {"SEND_RARP", u64Len, u64Len, false, (*session).sendRARP},
		NetSetMTU:           {"NET_SET_MTU", u64Len, u64Len, false, (*session).netSetMTU},
		SetBackendReqFD:     {"SET_BACKEND_REQ_FD", 0, u64Len, false, (*session).setBackendReqFD},
		IOTLBMsg:            {"IOTLB_MSG", 0, maxPayload, true, (*session).refuse},
		SetVringEndian:      {"SET_VRING_ENDIAN", 0, maxPayload, false, (*session).refuse},
		GetConfig:           {"GET_CONFIG", configLen, maxPayload, true, (*session).getConfig},
		SetConfig:           {"SET_CONFIG", configLen, maxPayload, false, (*session).setConfig},
		ResetDevice:         {"RESET_DEVICE", 0, 0, false, (*session).resetDevice},
		GetMaxMemSlots:      {"GET_MAX_MEM_SLOTS", 0, 0, true, (*session).getMaxMemSlots},
		AddMemReg:           {"ADD_MEM_REG", memRegLen, memRegLen, false, (*session).addMemReg},
		RemMemReg:           {"REM_MEM_REG", memRegLen, memRegLen, false, (*session).remMemReg},
		SetStatus:           {"SET_STATUS", u64Len, u64Len, false, (*session).setStatus},
		GetStatus:           {"GET_STATUS", 0, 0, true, (*session).getStatus},
		SetDeviceStateFD:    {"SET_DEVICE_STATE_FD", 0, maxPayload, true, (*session).refuse},
		CheckDeviceState:    {"CHECK_DEVICE_STATE", 0, maxPayload, true, (*session).refuse},
	}
}

// unknown stands for every request that is not served: a frontend that tries
// one out is told no and goes on (H013).
var unknown = spec{name: "unknown", max: maxPayload, handle: (*session).refuse}

// lookup returns what is known of r.
func lookup(r Request) *spec {
	if r < numRequests && specs[r].handle != nil {
		return &specs[r]
	}
	return &unknown
}

// String returns the specification's name of the request.
func (r Request) String() string {
	if s := lookup(r); s != &unknown {
		return s.name
	}
	return fmt.Sprintf("request %d", uint32(r))
}

// message is one request, its payload and its descriptors. It owns the
// descriptors that no handler took with takeFD; close closes those. The
// payload is borrowed until the next message is read.
type message struct {
	req   Request
	flags uint32
	size  uint32
	data  []byte
	fds   []int

	reply [configLen + configSpace]byte // the reply that a handler composed
	n     int                           // and its length
	done  bool                          // a reply was composed
}

// decodeHeader reads a header and checks its flags (H007).
func (m *message) decodeHeader(b []byte) error {
	m.req = Request(native.Uint32(b[0:]))
	m.flags = native.Uint32(b[4:])
	m.size = native.Uint32(b[8:])
	if m.flags&flagVersionMask != flagVersion || m.flags&flagReply != 0 {
		return fmt.Errorf("%w: %v with flags %#x", ErrProtocol, m.req, m.flags)
	}
	if s := lookup(m.req); m.size > s.max {
		return fmt.Errorf("%w: %v with %d bytes of payload, at most %d", ErrProtocol, m.req, m.size, s.max)
	}
	return nil
}

// encodeReply writes the header of m's reply to b.
func (m *message) encodeReply(b []byte) {
	native.PutUint32(b[0:], uint32(m.req))
	native.PutUint32(b[4:], flagVersion|flagReply)
	native.PutUint32(b[8:], uint32(m.n))
}

// takeFD hands the message's only descriptor over to the caller.
func (m *message) takeFD() (int, error) {
	if len(m.fds) != 1 {
		return -1, fmt.Errorf("%w: %d descriptors, want 1", ErrRefused, len(m.fds))
	}
	fd := m.fds[0]
	m.fds = m.fds[:0]
	return fd, nil
}

// close closes the descriptors that are still the message's (H008).
func (m *message) close() {
	for _, fd := range m.fds {
		closeFD(fd)
	}
	m.fds = m.fds[:0]
}

// u64 is the payload as one number.
func (m *message) u64() uint64 { return native.Uint64(m.data) }

// state is the payload as a vring state.
func (m *message) state() (index, num uint32) {
	return native.Uint32(m.data), native.Uint32(m.data[4:])
}

// replyU64 composes a reply of one number.
func (m *message) replyU64(v uint64) {
	native.PutUint64(m.reply[:], v)
	m.n, m.done = u64Len, true
}

// replyState composes a vring state as a reply.
func (m *message) replyState(index, num uint32) {
	native.PutUint32(m.reply[0:], index)
	native.PutUint32(m.reply[4:], num)
	m.n, m.done = stateLen, true
}

// ringAddr is the payload of SET_VRING_ADDR. The addresses are the frontend's
// own, used before avail.
type ringAddr struct {
	Flags             uint32
	Desc, Used, Avail uint64
	Log               uint64 // guest address under which used ring writes are logged
}

// ringAddrLog is the flag that asks for logging of the used ring.
const ringAddrLog = 1

func decodeRingAddr(b []byte) (index uint32, a ringAddr) {
	return native.Uint32(b), ringAddr{
		Flags: native.Uint32(b[4:]),
		Desc:  native.Uint64(b[8:]),
		Used:  native.Uint64(b[16:]),
		Avail: native.Uint64(b[24:]),
		Log:   native.Uint64(b[32:]),
	}
}

// ringFD is the payload of SET_VRING_KICK, CALL and ERR.
const (
	ringFDIndex = 0xff
	ringFDNone  = 1 << 8 // no descriptor comes: the other side polls
)
