package engine

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

// tryLearn learns for as long as the table asks for patience.
func tryLearn(t testing.TB, d *fdb, key uint64, o *owner, sec uint32) verdict {
	t.Helper()
	for range 100 {
		o.sec.Store(0) // no limit of time here
		if v := d.learn(key, o, sec); v != notLearned || d.table.Load().lookup(key).port() == o.id {
			return v
		}
		d.sweep(sec)
	}
	require.FailNow(t, "not learned")
	return notLearned
}

// checkFDB checks that the lists of the owners and the table say the same.
func checkFDB(t testing.TB, d *fdb) {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	table := d.table.Load()
	live, used := 0, 0
	for i := range table.slots {
		key, v := table.slots[i].key.Load(), station(table.slots[i].val.Load())
		if key != 0 {
			used++
			at, found := table.find(key)
			require.True(t, found)
			require.Equal(t, i, at, "a key has one slot")
		}
		if v == 0 {
			continue
		}
		require.NotZero(t, key)
		o := d.owners[v.port()]
		require.NotNil(t, o, "the station's port is there")
		if v.pinned() {
			continue
		}
		live++
		require.Less(t, v.pos(), len(o.owned))
		require.EqualValues(t, i, o.owned[v.pos()])
	}
	require.Equal(t, used, table.used)
	require.Equal(t, live, d.live)
	owned := 0
	for _, o := range d.owners {
		require.LessOrEqual(t, len(o.owned), o.limit)
		owned += len(o.owned)
	}
	require.Equal(t, live, owned)
}

func TestStation(t *testing.T) {
	v := newStation(0xfffe, 0xabcd, 0x12345678)
	assert.Equal(t, frame.PortID(0xfffe), v.port())
	assert.Equal(t, 0xabcd, v.pos())
	assert.Equal(t, uint32(0x12345678), v.sec())
	assert.False(t, v.pinned())
	m := frame.MAC{0xfe, 1, 2, 3, 4, 5}
	assert.Equal(t, m, keyMAC(macKey(m, 4095)))
	assert.Equal(t, uint16(4095), uint16(macKey(m, 4095)))

	for _, c := range []struct {
		seen, now, age uint32
		want           bool
	}{
		{100, 100, 5, false}, {100, 105, 5, false}, {100, 106, 5, true},
		{100, 99, 5, false}, // another worker's batch is a little newer
		{^uint32(0), 3, 5, false}, {^uint32(0), 6, 5, true},
	} {
		assert.Equal(t, c.want, newStation(1, 0, c.seen).expired(c.now, c.age), "%+v", c)
	}
	assert.False(t, newStation(1, pinnedPos, 0).expired(1000, 5))
}

func TestFDBGrowsAndSheds(t *testing.T) {
	d := newFDB(300)
	a, b := d.addOwner(1, 50000, nil), d.addOwner(2, 50000, nil)
	for i := range 40000 {
		o := []*owner{a, b}[i&1]
		require.Equal(t, learnedNew, tryLearn(t, d, macKey(mac(i), 0), o, 1))
	}
	checkFDB(t, d)
	for i := range 40000 {
		require.EqualValues(t, 1+i&1, d.table.Load().lookup(macKey(mac(i), 0)).port())
	}
	full := len(d.table.Load().slots)
	d.removeOwner(a)
	checkFDB(t, d)
	for i := range 40000 {
		want := frame.PortID(0)
		if i&1 == 1 {
			want = 2
		}
		require.Equal(t, want, d.table.Load().lookup(macKey(mac(i), 0)).port())
	}
	assert.Equal(t, notLearned, d.learn(macKey(mac(0), 0), a, 1), "who is gone does not learn")
	assert.False(t, d.sweep(302), "all are too old")
	checkFDB(t, d)
	assert.Less(t, len(d.table.Load().slots), full)
}

// TestFDBEvictsOwn: a port that brings ever new addresses replaces its own, and an
// address that is in use survives that (H080).
func TestFDBEvictsOwn(t *testing.T) {
	d := newFDB(1 << 20)
	bad, good := d.addOwner(1, 256, nil), d.addOwner(2, 256, nil)
	for i := range 256 {
		require.Equal(t, learnedNew, tryLearn(t, d, macKey(mac(1<<23+i), 0), good, 1))
	}
	busy := macKey(mac(1<<22), 0)
	require.Equal(t, learnedNew, tryLearn(t, d, busy, bad, 1))
	n := 300_000
	if testing.Short() {
		n = 50_000
	}
	for i := range n {
		sec := uint32(i/200 + 1)
		if st := d.table.Load().lookup(busy); st.sec() != sec {
			require.EqualValues(t, 1, st.port(), "seen every second, but evicted in second %d", sec)
			d.table.Load().refresh(busy, st, sec)
		}
		want := learnedEvict
		if i < 255 {
			want = learnedNew
		}
		require.Equal(t, want, tryLearn(t, d, macKey(mac(i), 0), bad, sec))
	}
	checkFDB(t, d)
	assert.LessOrEqual(t, len(d.table.Load().slots), 4096, "no growth")
	for i := range 256 {
		require.EqualValues(t, 2, d.table.Load().lookup(macKey(mac(1<<23+i), 0)).port())
	}
}

// TestFDBFloodIsBounded: addresses beyond the limit of a second are not even
// tried, so one port cannot fill the table before it is made anew.
func TestFDBFloodIsBounded(t *testing.T) {
	d := newFDB(300)
	bad, good := d.addOwner(1, 256, nil), d.addOwner(2, 256, nil)
	for i := range 100000 {
		d.learn(macKey(mac(i), 0), bad, 1)
	}
	assert.Equal(t, 256, d.table.Load().used)
	assert.Equal(t, learnedNew, d.learn(macKey(mac(1<<23), 0), good, 1))
	assert.Equal(t, learnedEvict, d.learn(macKey(mac(1<<22), 0), bad, 2), "the next second")
}

func TestFDBMoves(t *testing.T) {
	d := newFDB(300)
	a, b := d.addOwner(1, 4, nil), d.addOwner(2, 4, nil)
	for i := range 4 {
		require.Equal(t, learnedNew, tryLearn(t, d, macKey(mac(i), 0), a, 1))
		require.Equal(t, learnedNew, tryLearn(t, d, macKey(mac(10+i), 0), b, 1))
	}
	require.Equal(t, learnedMove, tryLearn(t, d, macKey(mac(0), 0), b, 2))
	checkFDB(t, d)
	assert.Len(t, a.owned, 3)
	assert.Len(t, b.owned, 4, "one of its own had to go")
	assert.EqualValues(t, 2, d.table.Load().lookup(macKey(mac(0), 0)).port())
	for n := range 100 { // a station between two ports
		tryLearn(t, d, macKey(mac(0), 0), []*owner{a, b}[n&1], 3)
		checkFDB(t, d)
	}
}

func TestFDBPins(t *testing.T) {
	d := newFDB(300)
	vlans := func(ids ...uint16) *vlanSet {
		s := new(vlanSet)
		for _, id := range ids {
			s.add(id)
		}
		return s
	}
	a, b, c := d.addOwner(1, 4, vlans(10, 20)), d.addOwner(2, 4, nil), d.addOwner(3, 4, vlans(30))
	tryLearn(t, d, macKey(mac(0), 10), b, 1)
	tryLearn(t, d, macKey(mac(0), 20), b, 1)
	tryLearn(t, d, macKey(mac(0), 30), b, 1)
	require.NoError(t, d.pin(a, mac(0), 10))
	checkFDB(t, d)
	lookup := func(vlan uint16) frame.PortID { return d.table.Load().lookup(macKey(mac(0), vlan)).port() }
	assert.EqualValues(t, 1, lookup(10), "known before it says a word")
	assert.EqualValues(t, 0, lookup(20), "taken away")
	assert.EqualValues(t, 2, lookup(30), "not its VLAN")
	assert.Equal(t, notAllowed, d.learn(macKey(mac(0), 10), b, 1))
	assert.Equal(t, notAllowed, d.learn(macKey(mac(0), 20), b, 1))
	assert.Equal(t, learnedNew, d.learn(macKey(mac(0), 20), a, 1))
	assert.Error(t, d.pin(b, mac(0), 0))
	assert.NoError(t, d.pin(c, mac(0), 30), "the same address in another VLAN is another station")
	assert.EqualValues(t, 3, lookup(30))
	d.sweep(1000)
	assert.EqualValues(t, 1, lookup(10), "does not age")
	assert.EqualValues(t, 0, lookup(20))
	checkFDB(t, d)
	d.removeOwner(a)
	assert.EqualValues(t, 0, lookup(10))
	assert.Equal(t, learnedNew, d.learn(macKey(mac(0), 10), b, 1))
	checkFDB(t, d)
}

// TestFDBConcurrent: while stations come, go and move, and tables are made
// anew, a reader finds a station behind a port that it was behind, or not at
// all. Station n is only ever behind the ports 1+n%4 and 5+n%4.
func TestFDBConcurrent(t *testing.T) {
	d := newFDB(2)
	var owners [9]*owner
	for i := 1; i < len(owners); i++ {
		owners[i] = d.addOwner(frame.PortID(i), 64, nil)
	}
	var sec atomic.Uint32
	sec.Store(1)
	var stop atomic.Bool
	var wg sync.WaitGroup
	var wrong, hits atomic.Int64
	for w := range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			rnd := rand.New(rand.NewPCG(1, uint64(w)))
			for !stop.Load() {
				n := rnd.IntN(512)
				key, now := macKey(mac(n), 0), sec.Load()
				if w > 1 {
					d.learn(key, owners[1+n%4+rnd.IntN(2)*4], now)
				}
				table := d.table.Load()
				st := table.lookup(key)
				if st == 0 {
					continue
				}
				hits.Add(1)
				if int(st.port()-1)%4 != n%4 {
					wrong.Add(1)
				}
				table.refresh(key, st, now)
			}
		}()
	}
	for range 2000 {
		d.sweep(sec.Add(1))
	}
	deadline := time.Now().Add(10 * time.Second)
	for hits.Load() < 1000 && time.Now().Before(deadline) {
		d.sweep(sec.Add(1))
		time.Sleep(time.Millisecond)
	}
	stop.Store(true)
	wg.Wait()
	assert.Zero(t, wrong.Load())
	assert.NotZero(t, hits.Load())
	checkFDB(t, d)
}
