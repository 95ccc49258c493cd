package vhostuser

import (
	"bytes"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Memory that is not shared although it looks so. A memfd that QEMU maps with
// share=off comes over the socket like any other, but what the guest writes
// goes to QEMU's private copies of its pages. Nothing about the descriptor
// tells. What tells is that the guest kicks and that its rings stay as empty as
// on the first day: every driver posts rx buffers before anything else, so
// available indices of 0 on all rings for some seconds are nobody's.

// expectBuffers looks at the rings some time after the last one has started.
// d.mu is held.
func (s *session) expectBuffers() {
	switch {
	case s.silent:
	case s.silence == nil:
		s.silence = time.AfterFunc(memoryWait, func() { frame.Go(s.lookForGuest) })
	default:
		s.silence.Reset(memoryWait)
	}
}

// lookForGuest says once in a session that the guest cannot be seen.
func (s *session) lookForGuest() {
	d := s.dev
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.ses != s || s.silent || !d.ringsUntouched() {
		return
	}
	s.silent = true
	d.log.Error("the guest kicks, but its rings stay empty in the memory that the frontend shares, so nothing can flow: "+
		"is QEMU's memory backend share=on?", "path", d.cfg.Path)
}

// ringsUntouched says whether the guest has kicked and never made anything
// available on any ring, though an rx ring runs. An index that came back to 0
// on all rings at once would be taken for that.
func (d *Device) ringsUntouched() (untouched bool) {
	defer d.surviveFault(&untouched)
	rx, kicked := false, false
	for _, r := range d.rings {
		if r.q == nil || r.broken.Load() {
			continue
		}
		if !r.q.Untouched() {
			return false
		}
		rx = rx || !r.isTx() && !d.isCtrl(r)
		kicked = kicked || r.kick >= 0 && kicks(r.kick) > r.kicks
	}
	return rx && kicked
}

// surviveFault ends a look at memory that the frontend has taken away.
func (d *Device) surviveFault(result *bool) {
	if r := recover(); r != nil {
		if addr, ok := frame.FaultAddr(r); !ok || !d.Fault(addr) {
			panic(r)
		}
		*result = false
	}
}

// kicks says how often a kick descriptor was signalled, for nobody ever reads its
// counter. QEMU hands one over that it has signalled itself, which a guest whose
// link stays down never does, so only what comes after that is the guest's. Where
// /proc does not tell, once is all that can be seen.
func kicks(fd int) uint64 {
	if b, err := os.ReadFile("/proc/self/fdinfo/" + strconv.Itoa(fd)); err == nil {
		if _, b, ok := bytes.Cut(b, []byte("eventfd-count:")); ok {
			b, _, _ = bytes.Cut(b, []byte("\n"))
			if n, err := strconv.ParseUint(string(bytes.TrimSpace(b)), 16, 64); err == nil {
				return n
			}
		}
	}
	p := [1]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(p[:], 0); err == nil && n > 0 && p[0].Revents&unix.POLLIN != 0 {
		return 1
	}
	return 0
}
