package vhostuser

import (
	"fmt"
	"slices"

	"sidewire/vhostuser/guestmem"
)

// region is a mapped region and the file behind it, which is kept so that the
// session can move to another process.
type region struct {
	*guestmem.Region
	fd int
	// again counts how often the frontend has added the same region once
	// more: it takes it away as often.
	again int
}

func (r region) close() {
	_ = r.Unmap()
	closeFD(r.fd)
}

// mapRegion maps a region and takes fd over; on error it does not.
func mapRegion(fd int, sp guestmem.Spec) (region, error) {
	r, err := guestmem.Map(fd, sp)
	if err != nil {
		return region{}, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return region{Region: r, fd: fd}, nil
}

func decodeSpec(b []byte) guestmem.Spec {
	return guestmem.Spec{
		GPA: native.Uint64(b), Size: native.Uint64(b[8:]), UserAddr: native.Uint64(b[16:]), MmapOffset: native.Uint64(b[24:]),
	}
}

// setMemTable replaces all memory, also while rings run (T5).
func (s *session) setMemTable(m *message) error {
	n := native.Uint32(m.data)
	if n == 0 || n > maxTableRegs || m.size != tableLen+n*regionLen || len(m.fds) != int(n) {
		return fmt.Errorf("%w: %d regions, %d descriptors, %d bytes", ErrRefused, n, len(m.fds), m.size)
	}
	var rs []region
	for i := range int(n) {
		r, err := mapRegion(m.fds[i], decodeSpec(m.data[tableLen+i*regionLen:]))
		if err != nil {
			unmapOnly(rs)
			return fmt.Errorf("region %d: %w", i, err)
		}
		rs = append(rs, r)
	}
	if err := s.dev.setMemory(rs, s.dev.regions); err != nil {
		unmapOnly(rs)
		return err
	}
	m.fds = m.fds[:0]
	return nil
}

// unmapOnly undoes mapRegion; the descriptors stay the message's.
func unmapOnly(rs []region) {
	for _, r := range rs {
		_ = r.Unmap()
	}
}

func (s *session) getMaxMemSlots(m *message) error {
	m.replyU64(guestmem.MaxRegions)
	return nil
}

func (s *session) addMemReg(m *message) error {
	d := s.dev
	if len(m.fds) != 1 || len(d.regions) >= guestmem.MaxRegions {
		return fmt.Errorf("%w: %d descriptors, %d regions already", ErrRefused, len(m.fds), len(d.regions))
	}
	sp := decodeSpec(m.data[8:])
	// QEMU 7.2 adds and removes every region once for each queue pair. The same
	// region again changes nothing; its descriptor is closed with the message.
	if i := d.findRegion(sp); i >= 0 {
		d.regions[i].again++
		return nil
	}
	r, err := mapRegion(m.fds[0], sp)
	if err != nil {
		return err
	}
	if err := d.setMemory(append(slices.Clone(d.regions), r), nil); err != nil {
		_ = r.Unmap()
		return err
	}
	m.fds = m.fds[:0]
	return nil
}

// remMemReg finds the region by its addresses and size, as the specification
// says; the descriptor that may come along is closed with the message.
func (s *session) remMemReg(m *message) error {
	d, sp := s.dev, decodeSpec(m.data[8:])
	i := d.findRegion(sp)
	if i < 0 {
		return fmt.Errorf("%w: no region at %#x", ErrRefused, sp.GPA)
	}
	if d.regions[i].again > 0 {
		d.regions[i].again--
		return nil
	}
	return d.setMemory(slices.Delete(slices.Clone(d.regions), i, i+1), d.regions[i:i+1])
}

// findRegion returns the index of the region with these addresses and this
// size, or -1.
func (d *Device) findRegion(sp guestmem.Spec) int {
	return slices.IndexFunc(d.regions, func(r region) bool {
		have := r.Spec()
		return have.GPA == sp.GPA && have.UserAddr == sp.UserAddr && have.Size == sp.Size
	})
}

// setMemory makes rs the guest's memory. The rings go on in it where they
// were; those that do not lie in it any more stop. The regions in gone are
// unmapped once no worker can use them.
func (d *Device) setMemory(rs, gone []region) error {
	maps := make([]*guestmem.Region, len(rs))
	for i := range rs {
		maps[i] = rs[i].Region
	}
	mem, err := guestmem.New(maps...)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	gone = slices.Clone(gone)
	d.pause(d.rings...)
	d.mem.Store(mem)
	d.regions = rs
	if len(gone) > 0 {
		// Frames that were pulled from one guest's memory are copied to
		// another's without any ring of ours.
		d.cfg.Barrier()
	}
	d.resume(d.rings...)
	for _, r := range gone {
		r.close()
	}
	d.stopExpecting()
	return nil
}

// setLogBase maps the dirty log of a migration.
func (s *session) setLogBase(m *message) error {
	d := s.dev
	if m.size != logLen || len(m.fds) != 1 {
		return fmt.Errorf("%w: %d bytes and %d descriptors", ErrRefused, m.size, len(m.fds))
	}
	l := logSpec{Size: native.Uint64(m.data), Offset: native.Uint64(m.data[8:])}
	log, err := guestmem.MapLog(m.fds[0], l.Size, l.Offset)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrRefused, err)
	}
	l.fd, _ = m.takeFD()
	d.setLog(log, l)
	return nil
}

// logSpec is what the log was mapped from.
type logSpec struct {
	Size, Offset uint64
	fd           int
}

// setLog exchanges the dirty log under running rings; nil removes it.
func (d *Device) setLog(log *guestmem.Log, l logSpec) {
	old, oldSpec := d.dirty, d.dirtySpec
	d.pause(d.rings...)
	d.dirty, d.dirtySpec = log, l
	d.dirtyNow.Store(log)
	d.resume(d.rings...)
	if old != nil {
		_ = old.Unmap()
		closeFD(oldSpec.fd)
	}
}

// setLogFD brings a descriptor that is signalled when the log is written; no
// frontend needs that.
func (s *session) setLogFD(m *message) error {
	if len(m.fds) != 1 {
		return fmt.Errorf("%w: %d descriptors, want 1", ErrRefused, len(m.fds))
	}
	return nil
}
