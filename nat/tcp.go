package nat

// Theory of operation.
//
// A TCP flow follows the state machine of RFC 7857, figure 1. The client is
// the side that opened it, which may be the guest or the outside. States only
// decide how long an idle flow is kept; no segment of a known flow is ever
// held back because of them, since the ends judge better (RFC 5382 REQ-2: every
// valid sequence passes, simultaneous open included).
//
//	CLOSED       -- client SYN --------------> INIT         opening timer
//	INIT         -- server SYN --------------> ESTABLISHED  established timer
//	ESTABLISHED  -- client FIN / server FIN -> C FIN / S FIN  established timer
//	C FIN, S FIN -- the other FIN -----------> both FINs    closing timer
//	any of them  -- RST that belongs --------> TRANS        closing timer
//	TRANS        -- data --------------------> ESTABLISHED
//	ESTABLISHED  -- idle --------------------> TRANS
//
// Beyond the figure: a SYN in TRANS or after both FINs opens the flow anew,
// as ends that reuse a port do; a segment in the middle of an unknown
// connection starts a flow in TRANS where a new connection would be let
// through too, so that connections survive the loss of the table where ports
// are kept; and a reset in INIT ends the opening, so that refused connections
// do not count as half-open.
//
// A reset belongs (section 2.2) if its sequence number lies in the window that
// the other side offered last, or, before that side has acknowledged anything,
// if it acknowledges that side's SYN or follows its own. Others are translated
// all the same and change nothing.
//
// The state is one word that carries the slot's generation and is changed by
// compare and swap, so a worker that was overtaken by the end of the flow
// cannot touch its successor. Acknowledgement and window are one word for each
// side, stored plainly: with segments of one side on two workers at a time the
// window may be a little old, which a check of resets can bear.

import (
	"encoding/binary"
	"sync/atomic"

	"sidewire/engine/frame"
)

type tcpState uint8

const (
	tcpClosed tcpState = iota
	tcpInit
	tcpEstablished
	tcpClientFin
	tcpServerFin
	tcpBothFin
	tcpTrans
)

var tcpNames = [...]string{"closed", "init", "established", "client_fin", "server_fin", "both_fin", "trans"}

func (s tcpState) String() string {
	if int(s) < len(tcpNames) {
		return tcpNames[s]
	}
	return "unknown"
}

// TCP header flags.
const (
	flagFIN = 1 << iota
	flagSYN
	flagRST
	_
	flagACK
)

// Sides of a flow.
const (
	guestSide = iota
	outside
)

// tcpWord is a flow's state: generation<<32 | scales | opener<<4 | state. A
// scale is a side's window scale + 1, 0 until its SYN was seen.
type tcpWord uint64

const (
	wordState      = 0xf
	wordOpener     = 1 << 4
	wordScaleShift = 8 // guest's; the outside's is 8 further
	wordScaleMask  = 0x1f
)

func (w tcpWord) state() tcpState { return tcpState(w & wordState) }

func (w tcpWord) opener() int { return int(w&wordOpener) >> 4 }

func (w tcpWord) with(s tcpState) tcpWord { return w&^wordState | tcpWord(s) }

func (w tcpWord) withOpener(side int) tcpWord { return w&^wordOpener | tcpWord(side)<<4 }

func (w tcpWord) scale(side int) int { return int(w>>(wordScaleShift+8*side)) & wordScaleMask }

func (w tcpWord) withScale(side, scale int) tcpWord {
	shift := wordScaleShift + 8*side
	return w&^(wordScaleMask<<shift) | tcpWord(scale&wordScaleMask)<<shift
}

// shift is how far a side's window is to be shifted: its own scale if both
// sides sent one (RFC 7323 section 2.2).
func (w tcpWord) shift(side int) int {
	if s := w.scale(side); s > 1 && w.scale(side^1) > 0 {
		return s - 1
	}
	return 0
}

// nextState is one step of the machine; belongs says whether a reset was
// verified.
func nextState(s tcpState, fromClient bool, flags uint8, belongs bool) tcpState {
	if flags&flagRST != 0 {
		if belongs && s != tcpBothFin && s != tcpClosed {
			return tcpTrans
		}
		return s
	}
	switch s {
	case tcpClosed:
		if flags&flagSYN != 0 {
			return tcpInit
		}
		return tcpTrans
	case tcpInit:
		if flags&flagSYN != 0 && !fromClient {
			return tcpEstablished
		}
	case tcpEstablished:
		if flags&flagFIN != 0 && fromClient {
			return tcpClientFin
		} else if flags&flagFIN != 0 {
			return tcpServerFin
		}
	case tcpClientFin:
		if flags&flagFIN != 0 && !fromClient {
			return tcpBothFin
		}
	case tcpServerFin:
		if flags&flagFIN != 0 && fromClient {
			return tcpBothFin
		}
	case tcpBothFin:
		if flags&(flagSYN|flagACK) == flagSYN {
			return tcpInit
		}
	case tcpTrans:
		if flags&(flagSYN|flagACK) == flagSYN {
			return tcpInit
		} else if flags&(flagFIN|flagSYN) == 0 {
			return tcpEstablished
		}
	}
	return s
}

// segment is what tracking wants of a TCP header.
type segment struct {
	seq, ack uint32
	window   uint16
	flags    uint8
}

// segmentOf reads the header of a frame that ParseIPv4 has passed.
func segmentOf(f *frame.Frame) segment {
	h := f.Head[f.L4 : f.L4+20]
	return segment{seq: binary.BigEndian.Uint32(h[4:]), ack: binary.BigEndian.Uint32(h[8:]),
		window: binary.BigEndian.Uint16(h[14:]), flags: h[13]}
}

// track follows one segment of side and reports whether it counts as use.
func (m *Masquerade) track(r *ref, f *frame.Frame, side int) bool {
	s := segmentOf(f)
	w := tcpWord(r.tcp.Load())
	if s.flags&(flagFIN|flagSYN|flagRST) == 0 && w.state() == tcpEstablished {
		noteAck(&r.acks[side], &s)
		return true
	}
	return m.trackSlow(r, f, &s, side)
}

// noteAck remembers what a side acknowledged last and the window that it
// offered.
func noteAck(word *atomic.Uint64, s *segment) {
	if s.flags&flagACK == 0 {
		return
	}
	now := uint64(s.ack)<<32 | uint64(s.window)<<1 | 1
	if old := word.Load(); old != now && (old == 0 || int32(s.ack-uint32(old>>32)) >= 0) {
		word.Store(now)
	}
}

func (m *Masquerade) trackSlow(r *ref, f *frame.Frame, s *segment, side int) bool {
	for {
		old := tcpWord(r.tcp.Load())
		if uint32(old>>32) != uint32(r.w1>>32) {
			return false // the flow has ended
		}
		rst := s.flags&flagRST != 0
		belongs := rst && belongs(r, old, s, side)
		w := old.with(nextState(old.state(), side == old.opener(), s.flags, belongs))
		if w.state() == tcpEstablished && old.state() == tcpTrans && side == old.opener() && r.acks[side^1].Load() == 0 {
			w = old // it takes two to be established
		}
		reopened := w.state() == tcpInit && old.state() != tcpInit
		if reopened {
			w = w.withOpener(side).withScale(guestSide, 0).withScale(outside, 0)
		}
		if s.flags&flagSYN != 0 && !rst && w.state() <= tcpEstablished {
			w = w.withScale(side, synScale(f)+1)
		}
		if w != old && !r.tcp.CompareAndSwap(uint64(old), uint64(w)) {
			continue
		}
		m.countHalfOpen(r, old, w)
		if reopened {
			r.acks[side^1].Store(0)
		}
		if s.flags&flagSYN != 0 && !rst {
			r.isn[side].Store(s.seq)
			r.acks[side].Store(0)
		}
		if !rst {
			noteAck(&r.acks[side], s)
		}
		return !rst || w.state() != old.state()
	}
}

// countHalfOpen keeps the guest's number of half-open flows.
func (m *Masquerade) countHalfOpen(r *ref, old, now tcpWord) {
	g := m.guests[uint8(r.w1>>8)]
	if old.state() == tcpInit && (now.state() != tcpInit || old.opener() != now.opener()) {
		g.half[old.opener()].Add(-1)
	}
	if now.state() == tcpInit && (old.state() != tcpInit || old.opener() != now.opener()) {
		g.half[now.opener()].Add(1)
	}
}

// belongs says whether a reset from side is one of this connection's.
func belongs(r *ref, w tcpWord, s *segment, side int) bool {
	if a := r.acks[side^1].Load(); a != 0 {
		window := uint32(a>>1&0xffff) << w.shift(side^1)
		return s.seq-uint32(a>>32) <= window
	}
	if w.scale(side^1) > 0 && s.flags&flagACK != 0 {
		// RFC 9293 section 3.10.7.3: it acknowledges the SYN, and maybe data
		// that came with it (RFC 7413).
		if d := s.ack - r.isn[side^1].Load(); d >= 1 && d <= 0xffff {
			return true
		}
	}
	// A client that gives up before it heard anything.
	return w.scale(side) > 0 && s.seq-r.isn[side].Load() <= 1
}

// synScale reads the window scale option of a SYN, 0 if there is none.
func synScale(f *frame.Frame) int {
	h := f.L4Bytes()
	end := min(int(h[12]>>4)*4, len(h))
	for i := 20; i < end; {
		switch h[i] {
		case 0:
			return 0
		case 1:
			i++
			continue
		}
		if i+2 > end || h[i+1] < 2 {
			return 0
		}
		if h[i] == 3 && h[i+1] == 3 && i+3 <= end {
			return min(int(h[i+2]), 14)
		}
		i += int(h[i+1])
	}
	return 0
}
