package nat

import (
	"encoding/binary"
	"fmt"
	"reflect"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

// rig sends the same frames again and again without allocating.
type rig struct {
	w      *world
	stage  interface{ Process(*frame.Batch) }
	frames [frame.BatchSize]packet
	out    frame.PortID
}

func (r *rig) run() {
	b := r.w.b
	b.Reset(r.w.now)
	for i := range r.frames {
		f, p := b.Next(), &r.frames[i]
		f.SetBytes(p.data, nil, b.Segs(1))
		f.Offload = p.off
	}
	r.stage.Process(b)
}

func (r *rig) check(t testing.TB) {
	t.Helper()
	for i := range r.frames {
		require.Equal(t, r.out, r.w.b.Frame(i).Out, r.w.b.Frame(i).Reason.String())
	}
}

// rigs are the paths of known flows: one flow for all frames, or one for each.
func rigs(t testing.TB) map[string]*rig {
	rs := map[string]*rig{}
	for _, proto := range []string{"udp", "tcp"} {
		for _, flows := range []int{1, frame.BatchSize} {
			w := newWorld(t, ports80)
			out := &rig{w: w, stage: w.m.Outbound(0), out: portUplink}
			in := &rig{w: w, stage: w.m.Inbound(), out: portGuest}
			for i := range out.frames {
				g := fromGuestTo(uint16(2000+i%flows), hostB, 80)
				if proto == "tcp" {
					x := w.one(w.out(tcp(g, "S", guestISN, 0, "")), portUplink).flow()
					w.in(tcp(x.back(), "SA", hostISN, guestISN+1, ""))
					out.frames[i] = tcp(g, "A", guestISN+1, hostISN+1, "data")
					in.frames[i] = tcp(x.back(), "A", hostISN+1, guestISN+1+uint32(i), "data")
				} else {
					out.frames[i] = udp(g, "data")
					x := w.one(w.out(out.frames[i]), portUplink).flow()
					in.frames[i] = udp(x.back(), "data")
				}
			}
			rs[fmt.Sprintf("%s/out/%d", proto, flows)] = out
			rs[fmt.Sprintf("%s/in/%d", proto, flows)] = in
		}
	}
	return rs
}

func TestAllocsKnownFlows(t *testing.T) {
	for name, r := range rigs(t) {
		assert.Zero(t, testing.AllocsPerRun(50, r.run), name)
		r.check(t)
	}
}

func TestAllocsNewFlows(t *testing.T) {
	for _, proto := range []string{"udp", "tcp"} {
		for _, inbound := range []bool{false, true} {
			w := newWorld(t, limits(Limits{NewPerSecond: 1e6, NewBurst: 1e6, HalfOpen: 1 << 16}))
			r := &rig{w: w, stage: w.m.Outbound(0), out: portUplink}
			f, at := fromGuestTo(2000, hostB, 80), 14+16
			if inbound {
				f, at = toPod(hostB, 80, 2000), 14+12
				r.stage, r.out = w.m.Inbound(), portGuest
			}
			for i := range r.frames {
				r.frames[i] = udp(f, "data")
				if proto == "tcp" {
					r.frames[i] = tcp(f, "S", 1, 0, "")
				}
			}
			next := uint32(0)
			step := func() {
				for i := range r.frames {
					d := r.frames[i].data
					next++
					binary.BigEndian.PutUint32(d[at:], hostB+next)
					d[24], d[25] = 0, 0
					binary.BigEndian.PutUint16(d[24:], ^frame.Fold(frame.Sum(d[14:34], 0)))
				}
				r.run()
			}
			// The first flow makes its chunk and its mapping's pages.
			assert.Less(t, testing.AllocsPerRun(chunkSize/frame.BatchSize-2, step), 1.0, "%s inbound=%v", proto, inbound)
			r.check(t)
			require.Greater(t, len(w.flows()), 300)
		}
	}
}

func TestFlowIsTwoCacheLines(t *testing.T) {
	assert.EqualValues(t, 128, reflect.TypeFor[flow]().Size())
}

func BenchmarkKnownFlow(b *testing.B) {
	for name, r := range rigs(b) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for n := 0; n < b.N; n += len(r.frames) {
				r.run()
			}
			r.check(b)
		})
	}
}

func BenchmarkLookup(b *testing.B) {
	for _, flows := range []int{100, 10_000} {
		w := newWorld(b, limits(Limits{NewPerSecond: 1e9, NewBurst: 1e9}))
		keys := make([]key, flows)
		for i := range keys {
			u := tuple{remote: hostB + uint32(i), remotePort: 53, guestPort: 2000, external: 2000, proto: frame.ProtoUDP}
			w.m.guests[0].total.Add(1)
			_, reason := w.m.open(&opening{tuple: u, g: w.m.guests[0]}, w.now)
			require.Equal(b, frame.ReasonNone, reason)
			keys[i] = w.m.table.outsideKey(u)
		}
		b.Run(fmt.Sprint(flows), func(b *testing.B) {
			for i := range b.N {
				if r := w.m.table.find(&keys[i%flows]); !r.found() {
					b.Fatal("lost")
				}
			}
		})
	}
}

func BenchmarkSweep(b *testing.B) {
	w := newWorld(b, limits(Limits{NewPerSecond: 1e9, NewBurst: 1e9}))
	for i := range uint32(10_000) {
		w.out(udp(fromGuestTo(2000, hostB+i, 53), "x"))
	}
	w.pass(time.Second)
	b.ResetTimer()
	for range b.N {
		w.m.Sweep(w.now)
	}
}
