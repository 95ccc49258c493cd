package vhostuser

import (
	"fmt"
	"math"

	"sidewire/engine/frame"
)

// The handlers run with Device.mu held. A handler that returns an error has
// changed nothing.

func (s *session) getFeatures(m *message) error {
	m.replyU64(s.dev.offered)
	return nil
}

// setFeatures may come at any time, with LOG_ALL also while rings run (T6).
func (s *session) setFeatures(m *message) error {
	d, f := s.dev, m.u64()
	if extra := f &^ d.offered; extra != 0 {
		return fmt.Errorf("%w: features %v were not offered", ErrRefused, bitNames(extra, featureNames))
	}
	d.expectMemory()
	if d.featuresSet && f == d.features {
		return nil
	}
	d.pause(d.rings...)
	d.features, d.featuresSet = f, true
	if f&featProtocolFeatures == 0 {
		for _, r := range d.rings {
			r.enabled = true
		}
	}
	d.resume(d.rings...)
	return nil
}

func (s *session) getProtocolFeatures(m *message) error {
	m.replyU64(offeredProtocol)
	return nil
}

func (s *session) setProtocolFeatures(m *message) error {
	f := m.u64()
	if f&protoInband != 0 && f&(protoBackendReq|protoReplyAck) != protoBackendReq|protoReplyAck {
		return fmt.Errorf("%w: in-band notifications without what they need", ErrProtocol)
	}
	if extra := f &^ offeredProtocol; extra != 0 {
		return fmt.Errorf("%w: protocol features %v were not offered", ErrRefused, bitNames(extra, protocolNames))
	}
	d := s.dev
	if d.proto != f {
		// Which ring is the control queue depends on it.
		d.pause(d.rings...)
		d.proto = f
		d.resume(d.rings...)
	}
	return nil
}

func (s *session) getQueueNum(m *message) error {
	m.replyU64(uint64(len(s.dev.pairs)))
	return nil
}

// sendRARP needs neither memory nor rings: the first one after a migration
// comes before both (T10).
func (s *session) sendRARP(m *message) error {
	var mac macAddr
	copy(mac[:], m.data)
	if mac[0]&1 != 0 || mac == (macAddr{}) {
		s.dev.badRARP.Add(1)
		return nil
	}
	if s.dev.cfg.OnRARP != nil {
		s.dev.cfg.OnRARP(mac)
	}
	return nil
}

func (s *session) netSetMTU(m *message) error {
	d, mtu := s.dev, m.u64()
	if mtu < minMTU || mtu > maxMTU {
		return fmt.Errorf("%w: MTU %d", ErrRefused, mtu)
	}
	if d.cfg.MTU != 0 && mtu > uint64(d.cfg.MTU) {
		return fmt.Errorf("%w: MTU %d, the network has %d", ErrRefused, mtu, d.cfg.MTU)
	}
	d.frontMTU = int(mtu)
	return nil
}

// setBackendReqFD keeps the channel on which the backend could ask things.
func (s *session) setBackendReqFD(m *message) error {
	d := s.dev
	fd, err := m.takeFD()
	if err != nil {
		return err
	}
	closeFD(d.backendFD)
	d.backendFD = fd
	return nil
}

// Fields of struct virtio_net_config (virtio 1.2, 5.1.4).
const (
	cfgMAC      = 0
	cfgStatus   = 6
	cfgMaxPairs = 8
	cfgMTU      = 10

	linkUp = 1
)

// configBytes writes the configuration space to b.
func (d *Device) configBytes(b *[configSpace]byte) {
	copy(b[cfgMAC:], d.mac[:])
	native.PutUint16(b[cfgStatus:], linkUp)
	native.PutUint16(b[cfgMaxPairs:], uint16(len(d.pairs)))
	mtu := d.cfg.MTU
	if mtu == 0 {
		mtu = maxMTU
	}
	native.PutUint16(b[cfgMTU:], uint16(mtu))
}

// configRange decodes the head of a config message and checks it (H021).
func configRange(m *message) (offset, size uint64, err error) {
	offset, size = uint64(native.Uint32(m.data)), uint64(native.Uint32(m.data[4:]))
	if size == 0 || offset+size > configSpace || uint64(m.size) != configLen+size {
		return 0, 0, fmt.Errorf("%w: %d bytes at %d of the configuration, payload %d", ErrRefused, size, offset, m.size)
	}
	return offset, size, nil
}

func (s *session) getConfig(m *message) error {
	offset, size, err := configRange(m)
	if err != nil {
		m.n, m.done = 0, true // an empty reply says no
		return err
	}
	var space [configSpace]byte
	s.dev.configBytes(&space)
	copy(m.reply[:configLen], m.data)
	copy(m.reply[configLen:], space[offset:offset+size])
	m.n, m.done = configLen+int(size), true
	return nil
}

// configMigration is the flag of a write that restores another backend's
// configuration.
const configMigration = 1

func (s *session) setConfig(m *message) error {
	d := s.dev
	offset, size, err := configRange(m)
	if err != nil {
		return err
	}
	if native.Uint32(m.data[8:])&configMigration != 0 {
		return nil // ours is made from the configuration, not restored
	}
	// Only a legacy driver may write, and only the address.
	if offset != cfgMAC || size != uint64(len(d.mac)) || d.features&featVersion1 != 0 {
		return fmt.Errorf("%w: %d bytes at %d of the configuration are read-only", ErrRefused, size, offset)
	}
	copy(d.mac[:], m.data[configLen:])
	return nil
}

// resetDevice stops the rings and forgets what the driver set, but keeps
// memory: QEMU does not send it again (T1).
func (s *session) resetDevice(*message) error {
	d := s.dev
	d.stop(d.rings...)
	for _, r := range d.rings {
		r.enabled = false
	}
	d.features, d.featuresSet, d.status = 0, false, 0
	d.mac = d.cfg.MAC
	d.ctrl.reset()
	return nil
}

func (s *session) setStatus(m *message) error {
	d, v := s.dev, m.u64()
	if v > math.MaxUint8 {
		return fmt.Errorf("%w: status %#x", ErrRefused, v)
	}
	if v == 0 {
		d.stop(d.rings...)
		d.ctrl.reset()
	}
	d.status = uint8(v)
	return nil
}

func (s *session) getStatus(m *message) error {
	m.replyU64(uint64(s.dev.status))
	return nil
}

// A driver's MTU is at least what IPv4 asks of a link (RFC 791).
const (
	minMTU = 68
	maxMTU = 65535
)

// macAddr is short for the type that the configuration uses.
type macAddr = frame.MAC
