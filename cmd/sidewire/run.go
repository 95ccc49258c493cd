package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sidewire/engine"
	"sidewire/engine/vmi"
)

// memorySoftLimit keeps the collector from letting garbage pile up: what the
// engine needs is allocated at the start, and a sidecar may have 64 MiB.
const memorySoftLimit = 48 << 20

// runCommand serves every interface of the VMIs until ctx ends.
func runCommand(ctx context.Context, args []string, out, errw io.Writer) error {
	var o options
	fs := newFlags("run", errw)
	o.register(fs)
	args, command, err := cutCommand(args)
	if err != nil {
		return err
	}
	if err := parse(fs, args); err != nil {
		return err
	}
	o.handoff.command = command
	if err := o.check(); err != nil {
		return err
	}
	if err := errors.Join(o.checkCPUs(), o.checkStateDir()); err != nil {
		return err
	}
	level := slog.LevelInfo
	if o.verbose {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(errw, &slog.HandlerOptions{Level: level}))
	book := newLeaseBook(&o, log)
	vms, err := load(&o, errw, book)
	if err != nil {
		return err
	}
	if err := o.handoff.check(vms); err != nil {
		return err
	}
	debug.SetMemoryLimit(memorySoftLimit)
	s, err := start(ctx, &o, vms, book, log)
	if err != nil {
		return err
	}
	if command != nil {
		return errors.Join(s.launch(ctx, &o, vms[0], out, errw), s.stop())
	}
	if _, err := fmt.Fprintln(out, "ready"); err != nil {
		return errors.Join(err, s.stop())
	}
	<-ctx.Done()
	log.Info("stopping")
	return s.stop()
}

// server is a running sidewire.
type server struct {
	log     *slog.Logger
	started time.Time
	path    string
	engine  *engine.Engine
	book    *leaseBook
	turn    int // of the worker that gets the next queue pair
	// socketShare is how many sockets each interface may have that has its own.
	socketShare int

	mu   sync.Mutex // guards what follows, and engine while start runs
	open []served   // in the order of the files
	lans []*lan
	// handoffs are set when start begins to open them.
	handoffs   []*handoffNIC
	closers    []func() error
	linkShower func(netdev string, up bool) error // see showLinksBy
}

// start builds everything up; whatever it built is taken down again if it
// fails.
func start(ctx context.Context, o *options, vms []vmi.VM, book *leaseBook, log *slog.Logger) (s *server, err error) {
	s = &server{log: log, started: time.Now(), path: "none", book: book}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.stop())
			s = nil
		}
	}()
	p, err := planAll(o, vms)
	if err != nil {
		return s, err
	}
	s.choosePath(o, p)
	// The control socket comes first: it tells whether another sidewire is here.
	stopControl, err := serveControl(ctx, o.controlPath(), s, log)
	if err != nil {
		return s, err
	}
	s.onStop(func() error { stopControl(); return nil })
	if err := s.restoreStale(o, p); err != nil {
		return s, err
	}
	s.onStop(book.start())
	mode, err := o.pollMode()
	if err != nil {
		return s, err
	}
	cpus, err := parseCPUs(o.cpus)
	if err != nil {
		return s, err
	}
	e, err := engine.New(engine.Config{Workers: workers(p.all, cpus), CPUs: cpus, Poll: mode, Log: log})
	if err != nil {
		return s, machineError{err}
	}
	s.mu.Lock()
	s.engine = e // somebody may ask for the status already
	s.mu.Unlock()
	var once sync.Once
	stopEngine := func() error { once.Do(s.engine.Close); return nil }
	s.onStop(stopEngine)
	if err := s.openPods(ctx, o, p, stopEngine); err != nil {
		return s, err
	}
	for _, n := range p.users {
		if err := n.open(ctx, s, o, stopEngine); err != nil {
			return s, fmt.Errorf("%s: %w", n.name(), err)
		}
	}
	for _, l := range p.lans {
		if err := l.open(ctx, s, o, stopEngine); err != nil {
			return s, fmt.Errorf("%s: %w", l.guests(), err)
		}
	}
	for _, b := range p.bridges {
		if err := b.open(ctx, s, o, stopEngine); err != nil {
			return s, fmt.Errorf("%s: %w", b.name(), err)
		}
	}
	s.giveBackFunctions(o, p)
	s.handoffs = p.handoffs
	for _, n := range p.handoffs {
		if err := n.open(s, o); err != nil {
			return s, fmt.Errorf("%s: %w", n.name(), err)
		}
	}
	if o.handoff.qmp != "" {
		if err := s.giveByMonitor(ctx, o, vms[0]); err != nil {
			return s, err
		}
	}
	s.mu.Lock()
	s.open, s.lans = p.all, p.lans
	s.mu.Unlock()
	log.Info("serving", "path", s.path, "workers", s.engine.Workers(), "interfaces", len(p.all), "control", o.controlPath())
	return s, nil
}

// choosePath notes and says which way the guests take out of masquerade, and
// shares the descriptors out.
func (s *server) choosePath(o *options, p *plan) {
	s.shareSockets(p)
	switch {
	case len(p.pods) > 0:
		s.path = "packet"
	case slices.ContainsFunc(p.users, func(n *userNIC) bool { return !n.slirp() }):
		s.path = "socket"
		if _, why := masqueradePath(o); why != "" {
			s.log.Info("masquerade takes the socket path, which carries TCP, UDP and ping by ordinary sockets", "why", why)
		}
	}
}

const (
	// descriptorsForOthers is how many are kept for the control socket, guests'
	// memory and the like, descriptorsPerPair for a queue pair and its worker.
	descriptorsForOthers = 128
	descriptorsPerPair   = 16
)

// onStop has f called when the server stops, last come first.
func (s *server) onStop(f func() error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closers = append(s.closers, f)
}

// stop takes everything down.
func (s *server) stop() error { return s.undo(0) }

// nextWorker shares the queue pairs out.
func (s *server) nextWorker() int {
	w := s.turn % s.engine.Workers()
	s.turn++
	return w
}

// checkCPUs refuses processors that we may not use.
func (o *options) checkCPUs() error {
	cpus, err := parseCPUs(o.cpus)
	var set unix.CPUSet
	if err != nil || unix.SchedGetaffinity(0, &set) != nil {
		return err
	}
	for _, c := range cpus {
		if !set.IsSet(c) {
			return badInput("--cpus %s: processor %d is none of the %d that we may use; see taskset -pc $$", o.cpus, c, set.Count())
		}
	}
	return nil
}

// workers is how many the interfaces get: one per queue pair where there are
// processors for it. A list of processors fixes it.
func workers(all []served, cpus []int) int {
	if len(cpus) > 0 {
		return len(cpus)
	}
	pairs := 0
	for _, n := range all {
		pairs += n.base().iface.QueuePairs
	}
	usable := 1
	var set unix.CPUSet
	if unix.SchedGetaffinity(0, &set) == nil {
		usable = max(1, set.Count())
	}
	return max(1, min(pairs, usable))
}
