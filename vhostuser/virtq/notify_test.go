package virtq

import (
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

// give publishes n used elements. The driver of a packed ring takes them, so
// that there is room for others.
func give(d *driver, q *Queue, n int) {
	for range n {
		d.offer(0)
		c, _ := q.Pop(Readable, make([][]byte, 0, 1))
		q.Put(c.Head, 0)
	}
	q.Publish()
	if d.packed != nil {
		d.take()
	}
}

func TestNeedsNotifyByFlag(t *testing.T) { both(t, testNeedsNotifyByFlag) }

func testNeedsNotifyByFlag(t *testing.T, packed bool) {
	d, q := newQueue(t, layout(packed, Config{Size: 8}))
	d.desc(0, desc{bufA, 1, rd, 0})
	assert.False(t, q.NeedsNotify(), "nothing was published")
	give(d, q, 1)
	assert.True(t, q.NeedsNotify())
	assert.False(t, q.NeedsNotify(), "told already")
	d.setFlags(noInterrupt)
	give(d, q, 1)
	d.setFlags(noInterrupt)
	assert.False(t, q.NeedsNotify())
	d.setFlags(0xfffe)
	give(d, q, 1)
	assert.True(t, q.NeedsNotify(), "other flags mean nothing")
	q.Put(0, 0)
	assert.False(t, q.NeedsNotify(), "staged is not published")
}

// H066 and H064: used_event in front, behind, far off, and over the wrap.
func TestNeedsNotifyByEvent(t *testing.T) { both(t, testNeedsNotifyByEvent) }

func testNeedsNotifyByEvent(t *testing.T, packed bool) {
	for _, c := range []struct {
		name  string
		base  uint16 // used index before
		n     int    // elements published
		event uint16
		want  bool
	}{
		{"the one just given", 100, 1, 100, true},
		{"the next", 100, 1, 101, false},
		{"the one before", 100, 1, 99, false},
		{"first of several", 100, 5, 100, true},
		{"last of several", 100, 5, 104, true},
		{"after several", 100, 5, 105, false},
		{"before several", 100, 5, 99, false},
		{"far ahead", 100, 5, 100 + 32768, false},
		{"wrap, last before", 65534, 4, 65535, true},
		{"wrap, first after", 65534, 4, 0, true},
		{"wrap, last", 65534, 4, 1, true},
		{"wrap, after", 65534, 4, 2, false},
		{"wrap, before", 65534, 4, 65533, false},
		{"ends at the wrap", 65534, 2, 65535, true},
		{"ends at the wrap, next", 65534, 2, 0, false},
	} {
		if packed && c.event-c.base > 8 && c.base-c.event > 8 {
			continue // a packed ring has no places so far off
		}
		t.Run(c.name, func(t *testing.T) {
			d, q := newQueue(t, layout(packed, Config{Size: 8, EventIdx: true, Base: c.base - 1}))
			d.desc(0, desc{bufA, 1, rd, 0})
			d.setUsedEvent(c.base + 1000)
			give(d, q, 1)
			assert.True(t, q.NeedsNotify(), "the first after a start is told in any case")
			d.setUsedEvent(c.event)
			give(d, q, c.n)
			assert.Equal(t, c.want, q.NeedsNotify())
			d.setFlags(noInterrupt)
			d.setUsedEvent(d.usedIndex())
			give(d, q, 1)
			assert.True(t, q.NeedsNotify(), "with EVENT_IDX the flag means nothing")
		})
	}
}

// A notification that was not asked about after one publish is not lost.
func TestNeedsNotifySpansPublishes(t *testing.T) { both(t, testNeedsNotifySpansPublishes) }

func testNeedsNotifySpansPublishes(t *testing.T, packed bool) {
	d, q := newQueue(t, layout(packed, Config{Size: 8, EventIdx: true}))
	d.desc(0, desc{bufA, 1, rd, 0})
	give(d, q, 1)
	q.NeedsNotify()
	d.setUsedEvent(2)
	give(d, q, 2)
	give(d, q, 3)
	assert.True(t, q.NeedsNotify())
}

func TestEnableNotify(t *testing.T) {
	for _, event := range []bool{false, true} {
		d, q := newQueue(t, Config{Size: 8, EventIdx: event, Base: 100})
		d.desc(0, desc{bufA, 1, rd, 0})
		q.DisableNotify()
		assert.Equal(t, !event, d.usedFlags() == noNotify)
		assert.False(t, q.EnableNotify())
		assert.Zero(t, d.usedFlags())
		if event {
			assert.Equal(t, uint16(100), d.availEvent())
		}
		d.offer(0)
		assert.True(t, q.EnableNotify(), "a chain came before the notification was on")
		q.DisableNotify()
		q.DisableNotify()
		give(d, q, 1)
		assert.Equal(t, !event, d.usedFlags() == noNotify, "publishing keeps the flag")
		assert.True(t, q.EnableNotify())
		_, st := q.Pop(Readable, room())
		require.Equal(t, OK, st)
		assert.False(t, q.EnableNotify())
		if event {
			assert.Equal(t, uint16(102), d.availEvent())
		}
		assert.Equal(t, uint16(101), d.usedIndex(), "flags leave the index alone")
	}
}

// TestNobodySleepsForEver runs driver and device on two goroutines that sleep
// whenever they may. A lost notification leaves both asleep (H064).
func TestNobodySleepsForEver(t *testing.T) { both(t, testNobodySleepsForEver) }

func testNobodySleepsForEver(t *testing.T, packed bool) {
	for _, event := range []bool{false, true} {
		total := 200_000
		if testing.Short() {
			total = 20_000
		}
		d, q := newQueue(t, layout(packed, Config{Size: 4, EventIdx: event, Base: 65000}))
		for i := range 4 {
			d.desc(i, desc{bufA + uint64(i), 1, rd, 0})
		}
		kick, call := make(chan bool, 1), make(chan bool, 1)
		signal := func(c chan bool) {
			select {
			case c <- true:
			default:
			}
		}
		var moved atomic.Int64
		stop := make(chan bool)
		ended := make(chan bool, 2)
		frame.Go(func() { // the device
			defer func() { ended <- true }()
			segs := make([][]byte, 0, 1)
			for {
				c, st := q.Pop(Readable, segs)
				if st == OK {
					q.Put(c.Head, 0)
					q.Publish()
					if q.NeedsNotify() {
						signal(call)
					}
					continue
				}
				if st == Broken {
					t.Error(q.Err())
					return
				}
				if q.EnableNotify() {
					q.DisableNotify()
					continue
				}
				select {
				case <-kick:
					q.DisableNotify()
				case <-stop:
					return
				}
			}
		})
		frame.Go(func() { // the driver
			defer func() { ended <- true }()
			for seen, offered := 0, 0; seen < total; {
				for offered < total && offered-seen < 4 {
					old := d.availIx
					d.offer(uint16(offered % 4))
					offered++
					if d.wantsKick(old) {
						signal(kick)
					}
				}
				if n := len(d.take()); n > 0 {
					seen += n
					moved.Add(int64(n))
					continue
				}
				d.enableInterrupt()
				if d.usedWaits() {
					continue
				}
				select {
				case <-call:
				case <-stop:
					return
				}
			}
		})
		progress(t, &moved, int64(total))
		close(stop)
		<-ended
		<-ended
		d.checkZones(t)
	}
}

// wantsKick is the driver's decision after making one chain available.
func (d *driver) wantsKick(old uint16) bool {
	// Our side of the barrier: an atomic exchange between store and load.
	atomic.AddUint32(&fence, 1)
	if d.packed != nil {
		switch event := d.deviceEvent(); event & eventFlags {
		case eventDisable:
			return false
		case eventDesc:
			return uint16(event) == place(old, d.cfg.Size)
		}
		return true
	}
	if !d.cfg.EventIdx {
		return d.usedFlags()&noNotify == 0
	}
	return d.availEvent() == old
}

// enableInterrupt asks for an interrupt at the next used element.
func (d *driver) enableInterrupt() {
	if d.cfg.EventIdx {
		d.setUsedEvent(d.usedIx)
	}
	atomic.AddUint32(&fence, 1)
}

var fence uint32

// progress waits until n things moved, and fails if nothing moves for long.
func progress(t *testing.T, moved *atomic.Int64, n int64) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	last, since := int64(-1), time.Now()
	for range tick.C {
		now := moved.Load()
		if now >= n {
			return
		}
		if now != last {
			last, since = now, time.Now()
		}
		if time.Since(since) > 20*time.Second {
			t.Errorf("nothing moves any more after %d of %d", now, n)
			return
		}
	}
}
