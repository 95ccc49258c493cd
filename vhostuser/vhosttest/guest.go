package vhosttest

import (
	"encoding/binary"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Guest is a running guest: a frontend and the driver of its rings. Send and
// Recv of different queue pairs, and Send beside Recv, may run at once;
// everything else is for one goroutine.
type Guest struct {
	*Frontend
	Options  Options
	Features uint64 // what was negotiated
	Protocol uint64
	Mem      *Memory
	HdrLen   int             // bytes of the virtio-net header
	Ctrl     *Ring           // the control queue, nil if not negotiated
	Backend  *BackendChannel // nil if not negotiated

	rx, tx   []*buffers
	ctrlAt   uint64 // room for control commands
	attackAt uint64 // room for attacks, once there was one
	listener *Listener
	running  bool
}

// Connect connects to a backend and starts a driver, in the order in which
// QEMU does.
func Connect(o Options) (*Guest, error) {
	o.defaults()
	g := &Guest{Options: o}
	err := g.connect()
	if err == nil {
		err = g.handshake()
	}
	if err == nil {
		err = g.build()
	}
	if err == nil {
		err = g.Start()
	}
	if err != nil {
		g.Close()
		return nil, fmt.Errorf("vhosttest: %w", err)
	}
	return g, nil
}

func (g *Guest) connect() (err error) {
	if !g.Options.Listen {
		g.Frontend, err = Dial(g.Options.Path, g.Options.Wait)
		return err
	}
	if g.listener == nil {
		if g.listener, err = Listen(g.Options.Path); err != nil {
			return err
		}
	}
	g.Frontend, err = g.listener.Accept(g.Options.Wait)
	return err
}

// handshake negotiates protocol features.
func (g *Guest) handshake() error {
	offered, err := g.GetFeatures()
	if err != nil {
		return err
	}
	g.Features = offered & g.Options.Features
	if g.Features&FeatProtocol == 0 {
		return g.SetOwner()
	}
	offered, err = g.GetProtocolFeatures()
	if err != nil {
		return err
	}
	g.Protocol = offered & g.Options.ProtocolFeatures
	if err := g.SetProtocolFeatures(g.Protocol); err != nil {
		return err
	}
	if g.Protocol&ProtoMQ != 0 {
		n, err := g.GetQueueNum()
		if err != nil {
			return err
		}
		if n < uint64(g.Options.QueuePairs) {
			return fmt.Errorf("backend takes %d queue pairs, %d wanted", n, g.Options.QueuePairs)
		}
	}
	if g.Protocol&ProtoMemSlots != 0 {
		if _, err := g.GetMaxMemSlots(); err != nil {
			return err
		}
	}
	if g.Protocol&ProtoBackendReq != 0 {
		if g.Backend, err = g.OpenBackendChannel(); err != nil {
			return err
		}
	}
	if err := g.SetOwner(); err != nil {
		return err
	}
	if g.Protocol&ProtoMTU != 0 && g.Options.MTU != 0 {
		return g.NetSetMTU(g.Options.MTU)
	}
	return nil
}

// build makes memory and rings.
func (g *Guest) build() (err error) {
	o := &g.Options
	g.HdrLen = frame.VnetHdrLen
	if g.Features&(FeatVersion1|FeatMrgRxbuf) != 0 {
		g.HdrLen = frame.VnetHdrMrgLen
	}
	if o.Packed && g.Features&FeatRingPacked == 0 {
		return fmt.Errorf("backend does not offer packed rings")
	}
	if o.QueuePairs > 1 && g.Features&FeatMQ == 0 {
		return fmt.Errorf("backend does not offer several queue pairs")
	}
	size := o.MemSize
	if size == 0 {
		perPair := 2*ringBytes(o.RingSize) + o.RingSize*(stride(o.RxBufSize)+stride(o.TxBufSize)+2*g.tableLen()+64)
		size = o.QueuePairs*perPair + ringBytes(ctrlSize) + 1<<20
	}
	if g.Mem, err = NewMemory(size, o.GPA, o.NoSeal); err != nil {
		return err
	}
	for q := range o.QueuePairs {
		rx, err := g.newBuffers(2*q, o.RxBufSize, true)
		if err != nil {
			return err
		}
		g.rx = append(g.rx, rx)
		tx, err := g.newBuffers(2*q+1, o.TxBufSize, false)
		if err != nil {
			return err
		}
		g.tx = append(g.tx, tx)
	}
	if g.Features&FeatCtrlVQ != 0 {
		return g.buildCtrl()
	}
	return nil
}

// newRing lays out a ring as it was negotiated.
func (g *Guest) newRing(index, size int) (*Ring, error) {
	if g.Features&FeatRingPacked != 0 {
		return NewPackedRing(g.Mem, index, size, g.Features&FeatEventIdx != 0)
	}
	return NewRing(g.Mem, index, size, g.Features&FeatEventIdx != 0)
}

// Rx and Tx are the rings of a queue pair.
func (g *Guest) Rx(q int) *Ring { return g.rx[q].Ring }

// Tx is the transmit ring of a queue pair.
func (g *Guest) Tx(q int) *Ring { return g.tx[q].Ring }

// Rings are all rings by number, the control queue last.
func (g *Guest) Rings() []*Ring {
	var rs []*Ring
	for q := range g.rx {
		rs = append(rs, g.Rx(q), g.Tx(q))
	}
	if g.Ctrl != nil {
		rs = append(rs, g.Ctrl)
	}
	return rs
}

// Start gives features, memory and rings to the backend and fills the rx
// rings.
func (g *Guest) Start() error {
	for _, r := range g.Rings() {
		if err := g.enable(r, true); err != nil {
			return err
		}
	}
	if err := g.SetFeatures(g.Features); err != nil {
		return err
	}
	if g.Protocol&ProtoStatus != 0 {
		if err := g.SetStatus(statusFeaturesOK); err != nil {
			return err
		}
	}
	if err := g.sendMemory(); err != nil {
		return err
	}
	for _, b := range g.rx {
		if err := b.fill(); err != nil {
			return err
		}
	}
	for _, r := range g.Rings() {
		if err := g.StartRing(r); err != nil {
			return err
		}
	}
	g.running = true
	if g.Protocol&ProtoStatus != 0 {
		if err := g.SetStatus(statusDriverOK); err != nil {
			return err
		}
	}
	return g.Sync()
}

const (
	statusFeaturesOK = 0x0b
	statusDriverOK   = 0x0f
)

func (g *Guest) enable(r *Ring, on bool) error {
	if g.Features&FeatProtocol == 0 {
		return nil
	}
	return g.SetVringEnable(r.Index, on)
}

// Enable switches a queue pair on or off, as a guest does that changes the
// number of its queues.
func (g *Guest) Enable(q int, on bool) error {
	if err := g.enable(g.Rx(q), on); err != nil {
		return err
	}
	return g.enable(g.Tx(q), on)
}

func (g *Guest) sendMemory() error {
	if g.Protocol&ProtoMemSlots != 0 {
		return g.AddMemReg(g.Mem.Region())
	}
	return g.SetMemTable(g.Mem.Region())
}

// StartRing tells the backend of a ring and starts it where the used ring
// ends, as QEMU does.
func (g *Guest) StartRing(r *Ring) error {
	if err := g.SetVringNum(r.Index, r.Size); err != nil {
		return err
	}
	if err := g.SetVringBase(r.Index, r.Base()); err != nil {
		return err
	}
	if err := g.SetVringAddr(r.Index, r.Addr()); err != nil {
		return err
	}
	for _, fd := range []*int{&r.Kick, &r.Call, &r.Err} {
		if *fd < 0 {
			n, err := newEventfd()
			if err != nil {
				return err
			}
			*fd = n
		}
	}
	if err := g.SetVringKick(r.Index, r.Kick); err != nil {
		return err
	}
	if err := g.SetVringCall(r.Index, r.Call); err != nil {
		return err
	}
	return g.SetVringErr(r.Index, r.Err)
}

// Stop stops every ring, as set_link off does, and checks that the backend
// ends where its used ring says. Start goes on from there, but for memory.
func (g *Guest) Stop() error {
	g.running = false
	for _, r := range g.Rings() {
		base, err := g.GetVringBase(r.Index)
		if err != nil {
			return err
		}
		if used := r.Base(); uint16(base) != uint16(used) { // DPDK tells no more of a packed ring
			return fmt.Errorf("%w: ring %d stopped at %#x, its used elements end at %#x", ErrBackend, r.Index, base, used)
		}
	}
	return nil
}

// Resume starts the rings again after Stop.
func (g *Guest) Resume() error {
	for _, r := range g.Rings() {
		if err := g.StartRing(r); err != nil {
			return err
		}
	}
	g.running = true
	return g.Sync()
}

// Reset stops every ring, resets the device and starts a new driver on the
// memory that the backend keeps (trap T1 of real frontends).
func (g *Guest) Reset() error {
	if err := g.Stop(); err != nil {
		return err
	}
	return g.restart()
}

// HardReset is Reset of a guest that does not know any more where its rings
// are, since it has written to them what it liked.
func (g *Guest) HardReset() error {
	g.running = false
	for _, r := range g.Rings() {
		if _, err := g.GetVringBase(r.Index); err != nil {
			return err
		}
	}
	return g.restart()
}

func (g *Guest) restart() error {
	if g.Protocol&ProtoResetDevice != 0 {
		if err := g.ResetDevice(); err != nil {
			return err
		}
	}
	for _, b := range append(g.rx, g.tx...) {
		b.reset()
	}
	if g.Ctrl != nil {
		g.Ctrl.Reset()
	}
	for _, r := range g.Rings() {
		if err := g.enable(r, true); err != nil {
			return err
		}
	}
	if err := g.SetFeatures(g.Features); err != nil {
		return err
	}
	for _, b := range g.rx {
		if err := b.fill(); err != nil {
			return err
		}
	}
	return g.Resume()
}

// Reconnect replaces a connection that is gone and sends everything to the new
// backend, rings from their used index on (T14).
func (g *Guest) Reconnect() error {
	g.running = false
	features := g.Features
	g.Frontend.Close()
	if g.Backend != nil {
		g.Backend.Close()
		g.Backend = nil
	}
	if err := g.connect(); err != nil {
		return err
	}
	if err := g.handshake(); err != nil {
		return err
	}
	if g.Features != features {
		return fmt.Errorf("backend came back with features %#x instead of %#x", g.Features, features)
	}
	return g.Start()
}

// Close ends the connection and frees everything.
func (g *Guest) Close() error {
	if g.Backend != nil {
		g.Backend.Close()
	}
	if g.Frontend != nil {
		g.Frontend.Close()
	}
	if g.listener != nil {
		g.listener.Close()
	}
	for _, r := range g.Rings() {
		for _, fd := range []*int{&r.Kick, &r.Call, &r.Err} {
			if *fd >= 0 {
				unix.Close(*fd)
				*fd = -1
			}
		}
	}
	if g.Mem != nil {
		return g.Mem.Close()
	}
	return nil
}

// ctrlSize is the size of the control queue.
const ctrlSize = 64

func (g *Guest) buildCtrl() (err error) {
	index := 2
	if g.Features&FeatMQ != 0 && g.Protocol&ProtoConfig != 0 {
		c, err := g.GetConfig(0, ConfigSize)
		if err != nil {
			return err
		}
		index = 2 * int(binary.LittleEndian.Uint16(c[ConfigMaxPairs:]))
	}
	if g.Ctrl, err = g.newRing(index, ctrlSize); err != nil {
		return err
	}
	g.ctrlAt, err = g.Mem.Alloc(ctrlRoom, pageSize)
	return err
}

// ctrlRoom is the room for one control command.
const ctrlRoom = pageSize

// Control sends a command on the control queue and returns its ack, 0 for
// success.
func (g *Guest) Control(class, command uint8, data []byte, wait time.Duration) (ack uint8, err error) {
	if g.Ctrl == nil || len(data) > ctrlRoom-3 {
		return 0, fmt.Errorf("vhosttest: no room for the command or no control queue")
	}
	m := g.Mem.At(g.ctrlAt, ctrlRoom)
	m[0], m[1], m[ctrlRoom-1] = class, command, 0xff
	copy(m[2:], data)
	bufs := []Buf{{GPA: g.ctrlAt, Len: 2}}
	if len(data) > 0 {
		bufs = append(bufs, Buf{GPA: g.ctrlAt + 2, Len: uint32(len(data))})
	}
	bufs = append(bufs, Buf{GPA: g.ctrlAt + ctrlRoom - 1, Len: 1, Write: true})
	if _, err := g.Ctrl.Post(bufs...); err != nil {
		return 0, err
	}
	if err := g.Ctrl.Flush(); err != nil {
		return 0, err
	}
	if err := g.Ctrl.Reaps(wait); err != nil {
		return 0, err
	}
	return m[ctrlRoom-1], nil
}
