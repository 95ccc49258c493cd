package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"strings"

	"sidewire/engine"
	"sidewire/engine/frame"
	"sidewire/vhostuser"
)

// innerStats is what the engine alone has done so far. Every figure only grows.
type innerStats struct {
	Frames  uint64            `json:"frames"`  // from guests and sources
	BusyNS  uint64            `json:"busy_ns"` // in turns that found some
	Turns   uint64            `json:"turns"`
	Wakeups uint64            `json:"wakeups"`
	Mallocs uint64            `json:"mallocs"`
	Drops   map[string]uint64 `json:"drops"`
}

// inner is sidewire's engine and devices without the program around them: what
// stands on the other side of the rings when a guest only sends or receives, or
// when frames are forwarded without a decision.
type inner struct {
	e       *engine.Engine
	devices []*vhostuser.Device
	sw      *engine.Switch // nil but for the kind that has one
}

// runInner is the program "perf inner", which the harness starts as a process
// of its own. It answers each line on its standard input with a line of JSON.
func runInner(args []string) error {
	fs := flag.NewFlagSet("inner", flag.ContinueOnError)
	kind := fs.String("kind", "forward", "forward, switch, sink or source")
	sockets := fs.String("sockets", "", "list of sockets, one for each device")
	queues := fs.Int("queues", 1, "queue pairs of a device")
	size := fs.Int("size", 64, "length of the frames of a source")
	macs := fs.Int("macs", 0, "addresses that a switch learns from a port")
	cpu := fs.Int("cpu", -1, "processor of the worker")
	poll := fs.String("poll", "always", "always, adaptive or never")
	packed := fs.Bool("packed", false, "offer packed rings")
	if err := fs.Parse(args); err != nil {
		return err
	}
	c := engine.Config{Workers: 1, Poll: pollModes[*poll], Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	if *cpu >= 0 {
		c.CPUs = []int{*cpu}
	}
	e, err := engine.New(c)
	if err != nil {
		return err
	}
	defer e.Close()
	in := &inner{e: e}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for i, path := range strings.Split(*sockets, ",") {
		if err := in.addDevice(ctx, fmt.Sprint("vm", i), path, *queues, *packed, c.Log); err != nil {
			return err
		}
	}
	if *kind == "switch" {
		in.sw = e.NewSwitch(engine.SwitchConfig{Name: "perf", MACs: *macs})
		go in.sw.Run(ctx, engine.Now)
	}
	if err := in.wire(*kind, *size); err != nil {
		return err
	}
	fmt.Println("ready")
	return in.answer(os.Stdin, os.Stdout)
}

var pollModes = map[string]engine.PollMode{"always": engine.PollAlways, "adaptive": engine.PollAdaptive, "never": engine.PollNever}

func (in *inner) addDevice(ctx context.Context, name, path string, queues int, packed bool, log *slog.Logger) error {
	d, err := vhostuser.NewDevice(vhostuser.Config{
		Name: name, Path: path, QueuePairs: queues, Packed: packed, Barrier: in.e.Barrier, Log: log,
	})
	if err != nil {
		return err
	}
	in.devices = append(in.devices, d)
	if err := d.Listen(); err != nil {
		return err
	}
	go func() {
		if err := d.Serve(ctx); err != nil {
			log.Error("socket ended", "device", name, "err", err)
		}
	}()
	return nil
}

// wire makes ports of the devices and says where their frames go.
func (in *inner) wire(kind string, size int) error {
	ids := make([]frame.PortID, len(in.devices))
	var err error
	for i, d := range in.devices {
		if ids[i], err = in.e.AddPort(fmt.Sprint("vm", i), d); err != nil {
			return err
		}
	}
	for i, d := range in.devices {
		switch kind {
		case "forward":
			in.e.SetStages(ids[i], forward(ids[i^1]))
		case "switch":
			stage, err := in.sw.AddPort(engine.SwitchPort{Port: ids[i], Queues: len(d.Pairs())})
			if err != nil {
				return err
			}
			in.e.SetStages(ids[i], stage)
		case "sink":
			in.e.SetStages(ids[i], forward(frame.Consumed))
		case "source":
			if err := in.addSource(d, ids[i], i, size); err != nil {
				return err
			}
			continue
		default:
			return fmt.Errorf("no kind %q", kind)
		}
		for _, p := range d.Pairs() {
			p.SetWatcher(in.e.Worker(0))
			in.e.AddQueue(ids[i], p, 0)
		}
	}
	return nil
}

// addSource makes a port that always has frames for the guest of d.
func (in *inner) addSource(d *vhostuser.Device, to frame.PortID, i, size int) error {
	id, err := in.e.AddPort(fmt.Sprint("source", i), nowhere{}, forward(to))
	if err != nil {
		return err
	}
	for q := range d.Pairs() {
		in.e.AddQueue(id, newSource(uint16(q), size, byte(i)), 0)
	}
	return nil
}

// answer serves the harness until it closes the input.
func (in *inner) answer(r io.Reader, w io.Writer) error {
	enc := json.NewEncoder(w)
	for s := bufio.NewScanner(r); s.Scan(); {
		if err := enc.Encode(in.stats()); err != nil {
			return err
		}
	}
	return nil
}

func (in *inner) stats() innerStats {
	s := innerStats{Drops: map[string]uint64{}}
	for _, w := range in.e.WorkerStats() {
		s.BusyNS += w.BusyNS
		s.Turns += w.Turns
		s.Wakeups += w.Wakeups
	}
	for _, p := range in.e.PortStats() {
		s.Frames += p.InFrames
		for reason, n := range p.Drops {
			s.Drops[reason] += n
		}
	}
	for _, d := range in.devices {
		for _, p := range d.Status().Pairs {
			for reason, n := range p.Drops {
				s.Drops["device: "+reason] += n
			}
		}
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	s.Mallocs = m.Mallocs
	return s
}
