// Package fuzz attacks whole doors: the socket of a frontend and the rings of
// a guest, with the engine, DHCP and NAT behind them as they run in sidewire.
//
// Each target has an attacker and two bystanders on one worker. Whatever the
// attacker does, the process lives, the bystanders' frame arrives, and the
// attacker's own device works again after a new start.
package fuzz

import (
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"sidewire/dhcp"
	"sidewire/engine"
	"sidewire/engine/enginetest"
	"sidewire/engine/frame"
	"sidewire/nat"
	"sidewire/vhostuser"
	"sidewire/vhostuser/vhosttest"
)

const soon = 5 * time.Second

var (
	guestMAC = frame.MAC{0x52, 0x54, 0, 0, 0, 2}
	hostMAC  = frame.MAC{2, 2, 2, 2, 2, 2}
	guestIP  = netip.MustParseAddr("10.0.2.2")
	gateway  = netip.MustParseAddr("10.0.2.1")
	podIP    = netip.MustParseAddr("10.244.1.5")
	outside  = netip.MustParseAddr("10.244.1.1")
)

// door is one engine with an attacker behind DHCP and NAT, and two bystanders
// who talk to each other.
type door struct {
	path     string // the attacker's socket
	uplink   *enginetest.MemPort
	incoming *enginetest.MemQueue // what the outside sends to the attacker
	worker   *engine.Worker
	by       [2]*vhosttest.Guest
	n        byte
}

// toPort sends everything to one port.
type toPort frame.PortID

func (p toPort) Process(b *frame.Batch) {
	for i := range b.Len() {
		if f := b.Frame(i); f.Reason == frame.ReasonNone {
			f.Out = frame.PortID(p)
		}
	}
}

// router has one resolved hop to everywhere.
type router struct{ hop frame.Hop }

func (r *router) Route(uint32) *frame.Hop { return &r.hop }

func ip4(a netip.Addr) uint32 {
	b := a.As4()
	return binary.BigEndian.Uint32(b[:])
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB) *door {
	t.Helper()
	quiet := slog.New(slog.NewTextHandler(io.Discard, nil))
	e, err := engine.New(engine.Config{Workers: 1, Log: quiet})
	must(t, err)
	t.Cleanup(e.Close)
	d := &door{uplink: &enginetest.MemPort{}, incoming: &enginetest.MemQueue{}, worker: e.Worker(0)}
	d.incoming.OnFeed = d.worker.Wake
	dir, err := os.MkdirTemp("", "swfuzz") // a path short enough for sockets
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	device := func(name string) (frame.PortID, string) {
		path := filepath.Join(dir, name)
		dev, err := vhostuser.NewDevice(vhostuser.Config{Name: name, Path: path, Barrier: e.Barrier, Log: quiet, MTU: 1500, Packed: true})
		must(t, err)
		id, err := e.AddPort(name, dev)
		must(t, err)
		for _, p := range dev.Pairs() {
			p.SetWatcher(d.worker)
			e.AddQueue(id, p, 0)
		}
		must(t, dev.Listen())
		go func() { _ = dev.Serve(context.Background()) }() // ends with Close
		t.Cleanup(func() { dev.Close() })
		return id, path
	}
	attacker, path := device("a")
	d.path = path
	d.masquerade(t, e, attacker)
	var ids [2]frame.PortID
	for i := range ids {
		var path string
		ids[i], path = device([]string{"b", "c"}[i])
		d.by[i], err = vhosttest.Connect(vhosttest.Options{Path: path, Wait: soon})
		must(t, err)
		t.Cleanup(func() { d.by[i].Close() })
	}
	e.SetStages(ids[0], toPort(ids[1]))
	e.SetStages(ids[1], toPort(ids[0]))
	return d
}

// masquerade puts the attacker behind the stages that a guest has.
func (d *door) masquerade(t testing.TB, e *engine.Engine, guest frame.PortID) {
	up, err := e.AddPort("uplink", d.uplink)
	must(t, err)
	e.AddQueue(up, d.incoming, 0)
	r := &router{frame.Hop{MTU: 1500, Src: guestMAC}}
	r.hop.Set(hostMAC)
	m, err := nat.New(nat.Config{
		Guests: []nat.Guest{{Port: guest, IP: ip4(guestIP), Gateway: ip4(gateway), Prefix: 24, MAC: guestMAC, MTU: 1500}},
		Uplink: up, Router: r, External: ip4(podIP),
	})
	must(t, err)
	s, err := dhcp.New(dhcp.Config{
		Port: guest, Address: netip.PrefixFrom(guestIP, 24), Router: gateway, ServerIP: gateway, ServerMAC: nat.GatewayMAC, MTU: 1500,
	})
	must(t, err)
	e.SetStages(guest, s, m.Outbound(0))
	e.SetStages(up, m.Inbound())
}

// attacker connects to the attacked device. A frontend is turned away while the
// end of the one before has not been noticed.
func (d *door) attacker(t testing.TB, packed bool) (g *vhosttest.Guest) {
	t.Helper()
	size := 16
	if packed {
		size = 15
	}
	var err error
	enginetest.Wait(soon, func() bool {
		g, err = vhosttest.Connect(vhosttest.Options{Path: d.path, Wait: soon, Packed: packed, RingSize: size, RxBufSize: 2048, MAC: guestMAC})
		return err == nil
	})
	must(t, err)
	return g
}

// unharmed checks that a frame between the bystanders still arrives.
func (d *door) unharmed(t *testing.T) {
	t.Helper()
	d.n++
	want := enginetest.Payload(300, d.n)
	must(t, d.by[0].Send(0, want, frame.Offload{}))
	p, err := d.by[1].Recv(0, soon)
	must(t, err)
	if string(p.Bytes) != string(want) {
		t.Fatalf("a bystander got %d other bytes", len(p.Bytes))
	}
}

// datagram is a frame of the guest's to the outside.
func datagram(port uint16) []byte {
	return enginetest.UDPFrame(enginetest.Eth{Dst: nat.GatewayMAC, Src: guestMAC},
		enginetest.IP{Src: guestIP, Dst: outside}, enginetest.UDP{Src: port, Dst: 53}, []byte("question"))
}

// works checks that what the attacker sends in order goes out.
func (d *door) works(t *testing.T, g *vhosttest.Guest) {
	t.Helper()
	d.uplink.Take()
	must(t, g.Send(0, datagram(5000), frame.Offload{}))
	if _, ok := d.uplink.Next(soon); !ok {
		t.Fatal("the attacked device does not work any more")
	}
}
