package vhosttest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// U64 and U32s are payloads in the machine's byte order.
func U64(v ...uint64) []byte {
	var b []byte
	for _, x := range v {
		b = binary.NativeEndian.AppendUint64(b, x)
	}
	return b
}

// U32s is a payload of 32-bit words.
func U32s(v ...uint32) []byte {
	var b []byte
	for _, x := range v {
		b = binary.NativeEndian.AppendUint32(b, x)
	}
	return b
}

// GetFeatures asks for the virtio features on offer.
func (f *Frontend) GetFeatures() (uint64, error) { return f.callU64(ReqGetFeatures, nil) }

// SetFeatures chooses virtio features.
func (f *Frontend) SetFeatures(v uint64) error { return f.Do(ReqSetFeatures, U64(v)) }

// SetOwner is the first message of old frontends.
func (f *Frontend) SetOwner() error { return f.Do(ReqSetOwner, nil) }

// ResetOwner is a message that has no effect.
func (f *Frontend) ResetOwner() error { return f.Do(ReqResetOwner, nil) }

// ResetDevice stops the rings; the memory stays.
func (f *Frontend) ResetDevice() error { return f.Do(ReqResetDevice, nil) }

// GetProtocolFeatures asks for the vhost-user features on offer.
func (f *Frontend) GetProtocolFeatures() (uint64, error) {
	return f.callU64(ReqGetProtocolFeatures, nil)
}

// SetProtocolFeatures chooses vhost-user features. With REPLY_ACK among them
// later requests wait for their acknowledgement.
func (f *Frontend) SetProtocolFeatures(v uint64) error {
	if err := f.Do(ReqSetProtocolFeatures, U64(v)); err != nil {
		return err
	}
	f.SetReplyAck(v&ProtoReplyAck != 0)
	f.logReply.Store(v&ProtoLogShmfd != 0)
	return nil
}

// GetQueueNum asks how many queue pairs the backend takes.
func (f *Frontend) GetQueueNum() (uint64, error) { return f.callU64(ReqGetQueueNum, nil) }

// GetMaxMemSlots asks how many memory regions the backend takes.
func (f *Frontend) GetMaxMemSlots() (uint64, error) { return f.callU64(ReqGetMaxMemSlots, nil) }

// Region is one entry of a memory table.
type Region struct {
	GPA, Size, UVA, Offset uint64
	FD                     int // not sent if negative
}

func (r Region) payload() []byte { return U64(r.GPA, r.Size, r.UVA, r.Offset) }

// SetMemTable replaces the memory table.
func (f *Frontend) SetMemTable(rs ...Region) error {
	p := U32s(uint32(len(rs)), 0)
	var fds []int
	for _, r := range rs {
		p = append(p, r.payload()...)
		if r.FD >= 0 {
			fds = append(fds, r.FD)
		}
	}
	return f.Do(ReqSetMemTable, p, fds...)
}

// AddMemReg adds a region to the memory table.
func (f *Frontend) AddMemReg(r Region) error {
	var fds []int
	if r.FD >= 0 {
		fds = append(fds, r.FD)
	}
	return f.Do(ReqAddMemReg, append(U64(0), r.payload()...), fds...)
}

// RemMemReg takes a region from the memory table.
func (f *Frontend) RemMemReg(r Region) error {
	return f.Do(ReqRemMemReg, append(U64(0), r.payload()...))
}

// SetVringNum says how many descriptors a ring has.
func (f *Frontend) SetVringNum(ring, n int) error {
	return f.Do(ReqSetVringNum, U32s(uint32(ring), uint32(n)))
}

// Addr is where a ring's parts lie: user addresses, but for Log, a guest
// address.
type Addr struct {
	Flags                  uint32 // 1 logs the used ring
	Desc, Used, Avail, Log uint64
}

// SetVringAddr says where a ring lies.
func (f *Frontend) SetVringAddr(ring int, a Addr) error {
	return f.Do(ReqSetVringAddr, append(U32s(uint32(ring), a.Flags), U64(a.Desc, a.Used, a.Avail, a.Log)...))
}

// SetVringBase says where in the avail ring to begin.
func (f *Frontend) SetVringBase(ring int, base uint32) error {
	return f.Do(ReqSetVringBase, U32s(uint32(ring), base))
}

// GetVringBase stops a ring and returns where in the avail ring it was.
func (f *Frontend) GetVringBase(ring int) (uint32, error) {
	r, err := f.Call(ReqGetVringBase, U32s(uint32(ring), 0))
	if err != nil {
		return 0, err
	}
	if len(r.Payload) != 8 || binary.NativeEndian.Uint32(r.Payload) != uint32(ring) {
		return 0, fmt.Errorf("base of ring %d: odd reply % x", ring, r.Payload)
	}
	return binary.NativeEndian.Uint32(r.Payload[4:]), nil
}

// vringFd sends one of the messages that carry a ring's eventfd; a negative fd
// is told as "none".
func (f *Frontend) vringFd(request uint32, ring, fd int) error {
	const noFd = 1 << 8
	if fd < 0 {
		return f.Do(request, U64(uint64(ring)|noFd))
	}
	return f.Do(request, U64(uint64(ring)), fd)
}

// SetVringKick starts a ring; fd is its kick eventfd, negative for none.
func (f *Frontend) SetVringKick(ring, fd int) error { return f.vringFd(ReqSetVringKick, ring, fd) }

// SetVringCall sets the eventfd of a ring's interrupts, negative for none.
func (f *Frontend) SetVringCall(ring, fd int) error { return f.vringFd(ReqSetVringCall, ring, fd) }

// SetVringErr sets the eventfd of a ring's errors, negative for none.
func (f *Frontend) SetVringErr(ring, fd int) error { return f.vringFd(ReqSetVringErr, ring, fd) }

// SetVringEnable switches a ring on or off.
func (f *Frontend) SetVringEnable(ring int, on bool) error {
	v := uint32(0)
	if on {
		v = 1
	}
	return f.Do(ReqSetVringEnable, U32s(uint32(ring), v))
}

// SendRARP asks the backend to announce the guest's address.
func (f *Frontend) SendRARP(m frame.MAC) error {
	return f.Do(ReqSendRARP, append(m[:], 0, 0))
}

// NetSetMTU tells the guest's MTU.
func (f *Frontend) NetSetMTU(mtu uint64) error { return f.Do(ReqNetSetMTU, U64(mtu)) }

// SetStatus tells the device status.
func (f *Frontend) SetStatus(s uint64) error { return f.Do(ReqSetStatus, U64(s)) }

// GetStatus asks for the device status.
func (f *Frontend) GetStatus() (uint64, error) { return f.callU64(ReqGetStatus, nil) }

// GetConfig reads n bytes of the configuration space.
func (f *Frontend) GetConfig(offset, n int) ([]byte, error) {
	r, err := f.Call(ReqGetConfig, append(U32s(uint32(offset), uint32(n), 0), make([]byte, n)...))
	if err != nil {
		return nil, err
	}
	if len(r.Payload) != 12+n {
		return nil, fmt.Errorf("config: reply has %d bytes", len(r.Payload))
	}
	return r.Payload[12:], nil
}

// SetConfig writes to the configuration space.
func (f *Frontend) SetConfig(offset int, b []byte) error {
	return f.Do(ReqSetConfig, append(U32s(uint32(offset), uint32(len(b)), 0), b...))
}

// SetLogBase gives the backend the dirty bitmap. With LOG_SHMFD negotiated it
// answers whatever REPLY_ACK says.
func (f *Frontend) SetLogBase(size, offset uint64, fd int) error {
	if !f.logReply.Load() {
		return f.Do(ReqSetLogBase, U64(size, offset), fd)
	}
	_, err := f.callU64(ReqSetLogBase, U64(size, offset), fd)
	return err
}

// SetLogFD gives the backend an eventfd for log errors.
func (f *Frontend) SetLogFD(fd int) error { return f.Do(ReqSetLogFD, nil, fd) }

// SetDeviceStateFD begins to save (direction 0) or load (1) the backend's
// state through a pipe. It returns the reply, of which bit 8 says that the
// backend takes our descriptor.
func (f *Frontend) SetDeviceStateFD(direction uint32, fd int) (uint64, error) {
	return f.callU64(ReqSetDeviceStateFD, U32s(direction, 0), fd)
}

// CheckDeviceState asks whether saving or loading went well; 0 is yes.
func (f *Frontend) CheckDeviceState() (uint64, error) { return f.callU64(ReqCheckDeviceState, nil) }

// Inflight is the description of an inflight region.
type Inflight struct {
	Size, Offset      uint64
	Queues, QueueSize uint16
}

func (i Inflight) payload() []byte {
	b := U64(i.Size, i.Offset)
	b = binary.NativeEndian.AppendUint16(b, i.Queues)
	return binary.NativeEndian.AppendUint16(b, i.QueueSize)
}

// GetInflightFD asks the backend for an inflight region; the caller closes the
// descriptor.
func (f *Frontend) GetInflightFD(queues, size uint16) (Inflight, int, error) {
	r, err := f.Call(ReqGetInflightFD, Inflight{Queues: queues, QueueSize: size}.payload())
	if err != nil {
		return Inflight{}, -1, err
	}
	if len(r.Payload) < 20 || len(r.Fds) != 1 {
		closeFds(r.Fds)
		return Inflight{}, -1, fmt.Errorf("inflight: reply has %d bytes and %d descriptors", len(r.Payload), len(r.Fds))
	}
	p := r.Payload
	return Inflight{binary.NativeEndian.Uint64(p), binary.NativeEndian.Uint64(p[8:]),
		binary.NativeEndian.Uint16(p[16:]), binary.NativeEndian.Uint16(p[18:])}, r.Fds[0], nil
}

// SetInflightFD gives the backend the region that an earlier one made.
func (f *Frontend) SetInflightFD(i Inflight, fd int) error {
	return f.Do(ReqSetInflightFD, i.payload(), fd)
}

// BackendChannel is our end of the socket on which the backend sends requests.
type BackendChannel struct{ conn *net.UnixConn }

// OpenBackendChannel makes the socket and gives the backend its end.
func (f *Frontend) OpenBackendChannel() (*BackendChannel, error) {
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(p[1])
	file := os.NewFile(uintptr(p[0]), "backend channel")
	defer file.Close()
	c, err := net.FileConn(file)
	if err != nil {
		return nil, err
	}
	b := &BackendChannel{c.(*net.UnixConn)}
	if err := f.Do(ReqSetBackendReqFD, nil, p[1]); err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

// Next waits for the backend's next request, whose descriptors the caller
// closes. It does not answer.
func (b *BackendChannel) Next(wait time.Duration) (Message, error) { return receive(b.conn, wait) }

// Answer acknowledges a request with v.
func (b *BackendChannel) Answer(m Message, v uint64) error {
	_, err := b.conn.Write(Message{Request: m.Request, Flags: FlagVersion | FlagReply, Payload: U64(v)}.Encode())
	return closedError(err)
}

// Close ends the channel.
func (b *BackendChannel) Close() error { return b.conn.Close() }

// Sync waits until the backend has handled every message sent so far.
func (f *Frontend) Sync() error {
	_, err := f.GetFeatures()
	return err
}

// Refused reports whether err is a backend's refusal, by acknowledgement or by
// closing the connection.
func Refused(err error) bool {
	var ack *AckError
	return errors.As(err, &ack) || errors.Is(err, ErrClosed)
}
