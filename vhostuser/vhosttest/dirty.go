package vhosttest

import (
	"bytes"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// DirtyLog is the dirty bitmap that a migrating frontend shares, and what
// memory looked like when it was turned on.
type DirtyLog struct {
	g      *Guest
	bitmap *Memory
	before []byte
}

// logPage is what one bit of the log stands for, in bytes.
const logPage = 4096

// StartLog does what the source of a migration does: it shares a dirty bitmap
// and turns on logging, first in the features, then for every ring, all while
// rings run (trap T6 of real frontends).
func (g *Guest) StartLog() (*DirtyLog, error) {
	size := int((g.Mem.GPA+uint64(len(g.Mem.Bytes)))/logPage/8) + 8
	bitmap, err := NewMemory(size, 0, false)
	if err != nil {
		return nil, err
	}
	l := &DirtyLog{g: g, bitmap: bitmap}
	l.before = bytes.Clone(g.Mem.Bytes)
	err = g.SetLogBase(uint64(len(bitmap.Bytes)), 0, int(bitmap.File.Fd()))
	if err == nil {
		g.Features |= FeatLogAll
		err = g.SetFeatures(g.Features)
	}
	for _, r := range g.Rings() {
		if err == nil {
			a := r.Addr()
			a.Flags = 1
			err = g.SetVringAddr(r.Index, a)
		}
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Marked reports whether the page of a guest address has its bit set.
func (l *DirtyLog) Marked(gpa uint64) bool {
	page := gpa / logPage
	return l.bitmap.Bytes[page/8]&(1<<(page%8)) != 0
}

// Check compares what the device may have written since StartLog, that is rx
// buffers and used rings, with the bitmap. The backend must be at rest.
func (l *DirtyLog) Check() error {
	check := func(what string, gpa uint64, n int) error {
		for at := gpa &^ (logPage - 1); at < gpa+uint64(n); at += logPage {
			lo, hi := max(at, gpa)-l.g.Mem.GPA, min(at+logPage, gpa+uint64(n))-l.g.Mem.GPA
			if !l.Marked(at) && !bytes.Equal(l.before[lo:hi], l.g.Mem.Bytes[lo:hi]) {
				return fmt.Errorf("%w: %s: page %#x was written and not marked", ErrBackend, what, at)
			}
		}
		return nil
	}
	for _, r := range l.g.Rings() {
		if err := check(fmt.Sprintf("used ring %d", r.Index), r.Used, len(r.used)); err != nil {
			return err
		}
	}
	for _, b := range l.g.rx {
		if err := check(fmt.Sprintf("buffers of ring %d", b.Index), b.at, b.count*stride(b.size)); err != nil {
			return err
		}
	}
	return nil
}

// Close turns logging off and frees the bitmap.
func (l *DirtyLog) Close() error {
	l.g.Features &^= FeatLogAll
	err := l.g.SetFeatures(l.g.Features)
	if cerr := l.bitmap.Close(); err == nil {
		err = cerr
	}
	return err
}

// OpenFDs is how many descriptors this process has, for checks that none leak.
func OpenFDs() int {
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return -1
	}
	return len(d)
}

// Truncate cuts the memory file, as a hostile frontend does; the memory must
// have been made with NoSeal. What this side still reads there faults, so only
// the backend may touch it afterwards.
func (m *Memory) Truncate(size int64) error { return unix.Ftruncate(int(m.File.Fd()), size) }
