package vhostuser

import "fmt"

// ring returns the ring of an index, compared as it came (H039).
func (s *session) ring(index uint32) (*ring, error) {
	if uint64(index) >= uint64(len(s.dev.rings)) {
		return nil, fmt.Errorf("%w: no ring %d", ErrRefused, index)
	}
	return s.dev.rings[index], nil
}

// stopped returns the ring of an index if it may be set up.
func (s *session) stopped(index uint32) (*ring, error) {
	r, err := s.ring(index)
	if err == nil && r.started && r.q != nil {
		err = fmt.Errorf("%w: ring %d runs", ErrRefused, index)
	}
	return r, err
}

func (s *session) setVringNum(m *message) error {
	index, num := m.state()
	r, err := s.ring(index)
	if err != nil {
		return err
	}
	if num == r.num && num != 0 {
		return nil
	}
	if r, err = s.stopped(index); err != nil {
		return err
	}
	if num == 0 || num > 32768 || num&(num-1) != 0 && !s.dev.mayBePacked() {
		return fmt.Errorf("%w: ring %d of %d entries", ErrRefused, index, num)
	}
	r.num = num
	s.dev.resume(r)
	return nil
}

// mayBePacked says whether rings are packed, or will be for all that is known.
func (d *Device) mayBePacked() bool {
	f := d.features
	if !d.featuresSet {
		f = d.offered
	}
	return f&featRingPacked != 0
}

// setVringAddr also comes while the ring runs, with another log flag (T6).
func (s *session) setVringAddr(m *message) error {
	index, a := decodeRingAddr(m.data)
	r, err := s.ring(index)
	if err != nil {
		return err
	}
	d := s.dev
	if !r.started || r.q == nil {
		r.addr, r.hasAddr = a, true
		d.resume(r)
		return nil
	}
	d.pause(r)
	old := r.addr
	r.addr = a
	if err = r.build(); err != nil {
		r.addr = old
	}
	d.resume(r)
	return err
}

// setVringBase is always believed, whatever we answered before (T4). For a
// packed ring it tells two places, available and used, each with its wrap
// counter in bit 15. They are the same, as every chain is returned before a
// ring stops; but some frontends and backends tell the first one only.
func (s *session) setVringBase(m *message) error {
	index, base := m.state()
	r, err := s.stopped(index)
	if err != nil {
		return err
	}
	if base > 0xffff && !s.dev.mayBePacked() {
		return fmt.Errorf("%w: ring %d begins at %d", ErrRefused, index, base)
	}
	r.base = uint16(base)
	return nil
}

func (s *session) getVringBase(m *message) error {
	index, _ := m.state()
	r, err := s.ring(index)
	if err != nil {
		return err
	}
	s.dev.stop(r)
	base := uint32(r.base)
	if s.dev.features&featRingPacked != 0 {
		base |= base << 16
	}
	m.replyState(index, base)
	return nil
}

// setVringEnable comes at any time, for any ring, and again and again (T2).
func (s *session) setVringEnable(m *message) error {
	index, num := m.state()
	r, err := s.ring(index)
	if err != nil {
		return err
	}
	if on := num != 0; on != r.enabled {
		r.enabled = on
		s.dev.resume(r)
	}
	return nil
}

// ringFD decodes the message of a ring's descriptor and takes the descriptor,
// or -1 if none comes. It is the caller's.
func (s *session) ringFD(m *message) (*ring, int, error) {
	v := m.u64()
	r, err := s.ring(uint32(v & ringFDIndex))
	if err != nil {
		return nil, -1, err
	}
	if v&ringFDNone != 0 {
		if len(m.fds) != 0 {
			return nil, -1, fmt.Errorf("%w: a descriptor where none was announced", ErrRefused)
		}
		return r, -1, nil
	}
	if len(m.fds) == 1 {
		if err := checkEventFD(m.fds[0]); err != nil {
			return nil, -1, err
		}
	}
	fd, err := m.takeFD()
	return r, fd, err
}

// setVringKick starts the ring: it is looked at as if it had been kicked (T3).
func (s *session) setVringKick(m *message) error {
	r, fd, err := s.ringFD(m)
	if err != nil {
		return err
	}
	r.closeKick()
	r.kick, r.kicks = fd, kicks(fd)
	r.started, r.reported = true, false
	if r.broken.Load() {
		s.dev.pause(r)
		r.broken.Store(false)
	}
	s.dev.resume(r)
	s.expectBuffers()
	return nil
}

// setVringCall may replace a descriptor in use. The guest may have waited in
// vain for a signal to the old one, so the new one is signalled once.
func (s *session) setVringCall(m *message) error {
	r, fd, err := s.ringFD(m)
	if err != nil {
		return err
	}
	if fd < 0 {
		r.call.clear()
		return nil
	}
	if err := r.call.set(fd, s.dev.sessions.Load()); err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	if r.started {
		r.call.signal()
	}
	return nil
}

func (s *session) setVringErr(m *message) error {
	r, fd, err := s.ringFD(m)
	if err != nil {
		return err
	}
	if fd < 0 {
		r.err.clear()
		return nil
	}
	if err := r.err.set(fd, s.dev.sessions.Load()); err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return nil
}
