package nat

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/frame"
)

func TestExportImport(t *testing.T) {
	opts := []option{ports80, twoGuests}
	w := newWorld(t, opts...)
	c := establish(w, 2000)
	u := w.one(w.out(udp(fromGuestTo(2001, hostB, 53), "x")), portUplink).flow()
	e := w.one(w.out(echo(guestIP, hostB, 7, 1)), portUplink).icmp().Id
	w.one(w.in(tcp(toPod(hostA, 1234, 80), "S", 1, 0, "")), portGuest)
	require.NoError(t, w.m.AddForward(Forward{Port: 8080, Last: 8085, Proto: frame.ProtoUDP}))
	w.pass(10 * time.Second)
	data, err := json.Marshal(w.m.Export(w.now))
	require.NoError(t, err)

	n := newWorld(t, opts...)
	n.now = int64(5 * time.Second) // another boot, another clock
	var s State
	require.NoError(t, json.Unmarshal(data, &s))
	require.NoError(t, n.m.Import(n.now, s))
	assert.ElementsMatch(t, w.flows(), n.flows())
	assert.Equal(t, w.m.Forwards(), n.m.Forwards())
	want, got := w.m.Stats(), n.m.Stats()
	assert.Equal(t, want.Guests, got.Guests)
	assert.Equal(t, want.Mappings, got.Mappings)

	c.w = n
	c.host("A", hostISN+1, guestISN+1, "data")
	c.guest("A", guestISN+1, hostISN+5, "")
	n.one(n.in(udp(u.back(), "x")), portGuest)
	n.one(n.in(echoReply(hostB, podIP, e, 1)), portGuest)
	n.one(n.in(udp(toPod(hostA, 9, 8083), "x")), portGuest)
	// Mappings are the old ones, and everything still ends.
	assert.Equal(t, u.sport, n.one(n.out(udp(fromGuestTo(2001, hostA, 53), "x")), portUplink).flow().sport)
	n.pass(10 * time.Hour)
	n.m.Sweep(n.now)
	n.pass(time.Hour)
	n.m.Sweep(n.now)
	assert.Empty(t, n.flows())
	assert.Zero(t, n.m.Stats().Mappings)

	require.Error(t, n.m.Import(n.now, State{Version: 99, Flows: s.Flows}), "H126")
	require.Empty(t, n.flows())
}

func FuzzImport(f *testing.F) {
	w := newWorld(f, ports80)
	establish(w, 2000)
	w.out(echo(guestIP, hostB, 7, 1))
	good, _ := json.Marshal(w.m.Export(w.now))
	f.Add(good)
	f.Add([]byte(`{"version":1,"macs":["AQ=="],"flows":[{"g":9,"p":6},{"g":-1,"p":17},{"p":0},{"p":17,"x":true,"t":7}]}`))
	f.Add([]byte(`{"version":1,"forwards":[{"Guest":7},{"Port":1,"Last":65535,"GuestPort":9}],"flows":[{"p":6,"t":4294967295,"n":4294967295}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var s State
		if json.Unmarshal(data, &s) != nil {
			return
		}
		w := newWorld(t)
		_ = w.m.Import(w.now, s)
		w.out(udp(fromGuestTo(2000, hostB, 53), "x"))
		for range 3 {
			w.pass(1 << 20 * time.Second)
			w.m.Sweep(w.now)
		}
		require.Empty(t, w.flows())
	})
}

func TestForwards(t *testing.T) {
	w := newWorld(t, ports80, twoGuests)
	m := w.m
	require.NoError(t, m.AddForward(Forward{Port: 90, Last: 95, GuestPort: 1090}))
	require.NoError(t, m.AddForward(Forward{Port: 90, Last: 95, GuestPort: 1090}), "twice is harmless")
	require.ErrorIs(t, m.AddForward(Forward{Guest: 1, Port: 93}), ErrPortInUse)
	require.ErrorIs(t, m.AddForward(Forward{Port: 93, Proto: 132}), ErrBadPort)
	require.ErrorIs(t, m.AddForward(Forward{Port: 0}), ErrBadPort)
	require.ErrorIs(t, m.AddForward(Forward{Port: 9, Last: 3}), ErrBadPort)
	require.ErrorIs(t, m.AddForward(Forward{Guest: 2, Port: 9}), ErrBadPort)
	require.ErrorIs(t, m.AddForward(Forward{Port: 1, Last: 9, GuestPort: 65530}), ErrBadPort)
	assert.Equal(t, []Forward{
		{Proto: 6, Port: 80, Last: 80, GuestPort: 80},
		{Proto: 6, Port: 90, Last: 95, GuestPort: 1090},
		{Guest: 1, Proto: 6, Port: 2222, Last: 2222, GuestPort: 2222},
	}, m.Forwards())

	f := toPod(hostA, 1234, 93)
	assert.EqualValues(t, 1093, w.one(w.in(tcp(f, "S", 1, 0, "")), portGuest).flow().dport)
	require.ErrorIs(t, m.RemoveForward(Forward{Port: 90, Last: 96, GuestPort: 1090}), ErrNoForward)
	require.NoError(t, m.RemoveForward(Forward{Port: 90, Last: 95, GuestPort: 1090}))
	w.one(w.in(tcp(f, "A", 2, 1, "lives on")), portGuest)
	w.inToPod(tcp(toPod(hostA, 1234, 94), "S", 1, 0, ""))
	require.ErrorIs(t, m.AddForward(Forward{Guest: 1, Port: 93}), ErrPortInUse, "its flow lives")
}

func TestSweepSleepsWhenIdle(t *testing.T) {
	w := newWorld(t)
	assert.Zero(t, w.m.Sweep(w.now))
	w.out(udp(fromGuestTo(1, hostB, 2), "x"))
	select {
	case <-w.m.wake:
	default:
		t.Fatal("a first flow rouses the sweeper")
	}
	next := w.m.Sweep(w.now)
	assert.LessOrEqual(t, next, time.Minute)
	assert.Greater(t, next, 20*time.Second)
	w.out(udp(fromGuestTo(2, hostB, 2), "x"))
	select {
	case <-w.m.wake:
		t.Fatal("it has a time to wake up already")
	default:
	}
}

func TestNewRefuses(t *testing.T) {
	good := func() Config {
		return Config{Router: &oneHop{}, Guests: []Guest{{IP: guestIP, Gateway: gatewayIP, Prefix: 24}}}
	}
	_, err := New(good())
	require.NoError(t, err)
	for name, change := range map[string]func(*Config){
		"no router":    func(c *Config) { c.Router = nil },
		"no guest":     func(c *Config) { c.Guests = nil },
		"no address":   func(c *Config) { c.Guests[0].IP = 0 },
		"prefix":       func(c *Config) { c.Guests[0].Prefix = 33 },
		"gateway":      func(c *Config) { c.Guests[0].Gateway = hostB },
		"two of all":   func(c *Config) { c.Guests = append(c.Guests, c.Guests[0]) },
		"port range":   func(c *Config) { c.PortRange = PortRange{9, 8} },
		"table":        func(c *Config) { c.Limits.Table = -1 },
		"forward of 0": func(c *Config) { c.Guests[0].Ports = []Forward{{}} },
	} {
		c := good()
		change(&c)
		_, err := New(c)
		assert.Error(t, err, name)
	}
}
