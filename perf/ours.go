package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"sidewire/engine"
)

// engineAlone is the program "perf inner".
type engineAlone struct {
	*proc
	socks []string
	at    innerStats
}

// openInner starts a perf program's own backend.
func openInner(ctx context.Context, program string, c cell, dir, kind string) (backend, error) {
	b := &engineAlone{socks: socketNames(dir, c.devices())}
	argv := []string{program, "inner", "-kind", kind, "-sockets", strings.Join(b.socks, ","), "-queues", strconv.Itoa(c.Queues),
		"-size", strconv.Itoa(c.Size), "-cpu", strconv.Itoa(backendCPU), "-poll", c.poll(), "-macs", strconv.Itoa(c.FDB), fmt.Sprintf("-packed=%v", c.Packed)}
	var err error
	if b.proc, err = startProc(ctx, procOptions{undisturbed: true}, "perf inner", argv...); err != nil {
		return nil, err
	}
	if _, err := b.expect(0, "ready\n", 10*time.Second); err != nil {
		_ = b.close()
		return nil, err
	}
	return b, nil
}

func (b *engineAlone) sockets() []string { return b.socks }
func (b *engineAlone) start() error      { return nil }
func (b *engineAlone) close() error      { return b.stop() }

func (b *engineAlone) stats() (s innerStats, err error) {
	answer, err := b.ask("stats", "}\n")
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal([]byte(answer[strings.Index(answer, "{"):]), &s)
}

func (b *engineAlone) mark() (err error) {
	b.at, err = b.stats()
	return err
}

func (b *engineAlone) costs() (cost, error) {
	s, err := b.stats()
	if err != nil {
		return cost{}, err
	}
	frames := float64(s.Frames - b.at.Frames)
	c := cost{moved: frames, busyNS: float64(s.BusyNS-b.at.BusyNS) / frames, allocs: float64(s.Mallocs-b.at.Mallocs) / frames}
	for reason, n := range s.Drops {
		c.dropped += float64(n - b.at.Drops[reason])
	}
	return c, nil
}

// program is "sidewire run" with guests on one switch.
type program struct {
	*proc
	socks   []string
	control http.Client
	at      programStats
}

// programStats is what we read of "sidewire status".
type programStats struct {
	Workers []engine.WorkerStats `json:"workers"`
	Ports   []engine.PortStats   `json:"ports"`
}

const (
	network = `---
kind: NetworkAttachmentDefinition
metadata: {name: lan}
spec:
  config: '{"cniVersion": "0.3.1", "name": "lan", "type": "bridge", "bridge": "br1", "mtu": %d}'
`
	guestOnNetwork = `---
kind: VirtualMachineInstance
metadata: {name: vm%d}
spec:
  domain:
    cpu: {cores: %d}
    devices:
      networkInterfaceMultiqueue: %v
      interfaces:
      - {name: net, bridge: {}, macAddress: "%s"}
  networks:
  - {name: net, multus: {networkName: lan}}
`
)

// openProgram starts sidewire as a user would, with guests on one network.
func openProgram(ctx context.Context, path, flags string, c cell, dir string) (backend, error) {
	b := &program{}
	mtu := 9000
	if c.GSO {
		mtu = gsoMTU
	}
	docs := fmt.Sprintf(network, mtu)
	for i := range c.devices() {
		docs += fmt.Sprintf(guestOnNetwork, i, c.Queues, c.Queues > 1, guestMACOf(i))
		b.socks = append(b.socks, filepath.Join(dir, fmt.Sprint("vm", i), "net.sock"))
	}
	file := filepath.Join(dir, "docs.yaml")
	if err := os.WriteFile(file, []byte(docs), 0o644); err != nil {
		return nil, err
	}
	poll := c.poll()
	argv := []string{path, "run", "-f", file, "--socket-dir", dir, "--cpus", strconv.Itoa(backendCPU), "--poll", poll}
	if c.Packed {
		argv = append(argv, "--packed")
	}
	b.control.Transport = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(dir, "control.sock"))
	}}
	var err error
	if b.proc, err = startProc(ctx, procOptions{undisturbed: true}, "sidewire run", append(argv, strings.Fields(flags)...)...); err != nil {
		return nil, err
	}
	if _, err := b.expect(0, "ready\n", 10*time.Second); err != nil {
		_ = b.close()
		return nil, err
	}
	return b, nil
}

func (b *program) sockets() []string { return b.socks }
func (b *program) start() error      { return nil }

func (b *program) close() error {
	b.control.CloseIdleConnections()
	return b.stop()
}

func (b *program) stats() (s programStats, err error) {
	r, err := b.control.Get("http://sidewire/v1/status")
	if err != nil {
		return s, err
	}
	defer r.Body.Close()
	return s, json.NewDecoder(r.Body).Decode(&s)
}

func (b *program) mark() (err error) {
	b.at, err = b.stats()
	return err
}

func (b *program) costs() (cost, error) {
	s, err := b.stats()
	if err != nil {
		return cost{}, err
	}
	busy, frames, dropped := s.sum()
	busy0, frames0, dropped0 := b.at.sum()
	c := cost{moved: float64(frames - frames0), busyNS: nan, allocs: nan, dropped: float64(dropped - dropped0)}
	if busy > busy0 {
		c.busyNS = float64(busy-busy0) / c.moved
	}
	return c, nil
}

// sum is the busy time, the frames and the drops of all workers and ports.
func (s programStats) sum() (busy, frames, dropped uint64) {
	for _, w := range s.Workers {
		busy += w.BusyNS
	}
	for _, p := range s.Ports {
		frames += p.InFrames
		for _, n := range p.Drops {
			dropped += n
		}
	}
	return busy, frames, dropped
}
