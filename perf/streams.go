package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"sidewire/engine/enginetest"
)

const iperfPort = 5201

// The subjects of masquerade.
const (
	kernelWay = "kernel (tap, bridge, nftables)"
	vethBound = "veth, no copy (bound)"
)

// unitOfWork is what a measurement counts, and what the processor time of it is
// given for.
type unitOfWork struct {
	name, rate, cpu string
	less            bool // of the rate
	run             func(ctx context.Context, r *rig, seconds int) (work, error)
}

// work is what was done: a figure for its rate and how many units of work the
// processors' time is shared out to.
type work struct{ rate, units, p99 float64 }

// The work of masquerade, in the order of the report. Those with long frames
// alone make sense at any MTU.
var (
	streams = []unitOfWork{
		{"TCP up", "Gbit/s", "s/GB", false, stream(false)},
		{"TCP down", "Gbit/s", "s/GB", false, stream(true)},
	}
	requests = []unitOfWork{
		{"UDP 1472 B up", "kpps", "us/packet", false, datagrams(false)},
		{"UDP 1472 B down", "kpps", "us/packet", false, datagrams(true)},
		{"request/response", "us", "us/request", true, questions(false)},
		{"connect/request/close", "per second", "us/connection", false, questions(true)},
	}
)

// streamTrials are the rows of masquerade: a guest of native speed and a
// namespace outside.
func (p *programs) streamTrials(quick bool, seconds int) []*trial {
	var out []*trial
	for _, mtu := range []int{1500, 65520} {
		all := streams
		if mtu == 1500 && !quick {
			all = append(append([]unitOfWork(nil), streams...), requests...)
		}
		t := &trial{
			Group: "Masquerade", Title: fmt.Sprintf("masquerade, MTU %d", mtu), Subjects: []string{ours, oursAgain, kernelWay, vethBound},
			missing: map[string]error{}, takes: time.Duration(len(all)*seconds+2) * time.Second,
		}
		if quick {
			t.Subjects = []string{ours, kernelWay}
		}
		if p.against.sidewire != "" {
			t.Subjects = append(t.Subjects, other)
		}
		for _, w := range all {
			t.Metrics = append(t.Metrics, w.metrics()...)
		}
		for _, w := range streams {
			t.goals = append(t.goals, goal{Metric: w.name, Against: kernelWay, Least: 1.2}, goal{Metric: w.name + ", CPU of the machine", Against: kernelWay, Most: 1})
		}
		for _, name := range t.Subjects {
			if err := missingForStreams(); err != nil {
				t.missing[name] = err
			}
		}
		t.measure = func(ctx context.Context, name string) (values, error) {
			return p.measureStreams(ctx, name, all, mtu, seconds)
		}
		out = append(out, t)
	}
	return out
}

func (w unitOfWork) metrics() []metric {
	ms := []metric{
		{Name: w.name, Unit: w.rate, Less: w.less},
		{Name: w.name + ", CPU of the backend", Unit: w.cpu, Less: true},
		{Name: w.name + ", CPU of the machine", Unit: w.cpu, Less: true},
	}
	if w.less {
		ms = append(ms, metric{Name: w.name + ", p99", Unit: w.rate, Less: true})
	}
	return ms
}

func missingForStreams() error {
	for _, need := range []string{"root", "netns", "tun", "iperf3", "nft", "ip"} {
		if err := enginetest.Have(need); err != nil {
			return fmt.Errorf("%s: %w", need, err)
		}
	}
	return nil
}

func (p *programs) measureStreams(ctx context.Context, name string, all []unitOfWork, mtu, seconds int) (values, error) {
	open := map[string]func() (*rig, error){
		ours:      func() (*rig, error) { return openSidewire(p.sidewire, p.flags, mtu) },
		oursAgain: func() (*rig, error) { return openSidewire(p.sidewire, p.flags, mtu) },
		other:     func() (*rig, error) { return openSidewire(p.against.sidewire, p.flags, mtu) },
		kernelWay: func() (*rig, error) { return openKernel(mtu) },
		vethBound: func() (*rig, error) { return openVeth(mtu) },
	}[name]
	r, err := open()
	if err != nil {
		return nil, err
	}
	defer r.close()
	// The first packets resolve neighbours on both sides.
	_ = r.guest.Run("ping", "-c", "1", "-W", "2", enginetest.OutsideIP)
	v := values{}
	for _, w := range all {
		machine, backend := busy(), processTime(r.backend)
		got, err := w.run(ctx, r, seconds)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", w.name, err)
		}
		v[w.name], v[w.name+", p99"] = got.rate, got.p99
		v[w.name+", CPU of the machine"] = (busy() - machine) / got.units
		v[w.name+", CPU of the backend"] = (processTime(r.backend) - backend) / got.units
	}
	return v, nil
}

// stream is one TCP stream; its unit is a gigabyte.
func stream(down bool) func(context.Context, *rig, int) (work, error) {
	return func(ctx context.Context, r *rig, seconds int) (work, error) {
		// A host's default may be one that paces, whose estimates of the path
		// move the result more than the path does.
		s, err := iperf(ctx, r.guest, seconds, down, "-C", "cubic")
		gbps := s.BitsPerSecond / 1e9
		return work{rate: gbps, units: gbps * s.Seconds / 8}, err
	}
}

// datagrams is as many as the sender can make; its unit is a million of those
// that arrive, so that seconds become microseconds for each.
func datagrams(down bool) func(context.Context, *rig, int) (work, error) {
	return func(ctx context.Context, r *rig, seconds int) (work, error) {
		s, err := iperf(ctx, r.guest, seconds, down, "-u", "-b", "0", "-l", "1472")
		arrived := float64(s.Packets - s.Lost)
		if err == nil && arrived <= 0 {
			err = errors.New("no datagram arrives")
		}
		return work{rate: arrived / s.Seconds / 1e3, units: arrived / 1e6}, err
	}
}

// questions are requests of one byte; its unit is a million of them.
func questions(connect bool) func(context.Context, *rig, int) (work, error) {
	return func(ctx context.Context, r *rig, seconds int) (work, error) {
		out, err := output(ctx, r.guest, seconds, self(), "ask", "-seconds", strconv.Itoa(seconds), fmt.Sprintf("-connect=%v", connect))
		if err != nil {
			return work{}, err
		}
		var a asked
		if err := json.Unmarshal(out, &a); err != nil {
			return work{}, err
		}
		w := work{rate: a.P50, p99: a.P99, units: float64(a.Ops) / 1e6}
		if connect {
			w.rate = float64(a.Ops) / a.Seconds
		}
		return w, nil
	}
}

// iperfSum is what the receiving side of iperf3 counted.
type iperfSum struct {
	BitsPerSecond float64 `json:"bits_per_second"`
	Seconds       float64 `json:"seconds"`
	Packets       int     `json:"packets"`
	Lost          int     `json:"lost_packets"`
}

// iperf runs iperf3 from ns to the outside; down lets the outside send.
func iperf(ctx context.Context, ns *enginetest.NetNS, seconds int, down bool, args ...string) (iperfSum, error) {
	args = append(args, "-c", enginetest.OutsideIP, "-p", strconv.Itoa(iperfPort), "-t", strconv.Itoa(seconds), "-J", "--connect-timeout", "3000")
	if down {
		args = append(args, "-R")
	}
	out, err := output(ctx, ns, seconds, "iperf3", args...)
	s, perr := parseIperf(out)
	if err != nil && perr == nil {
		perr = err
	}
	return s, perr
}

// parseIperf reads iperf3's JSON.
func parseIperf(out []byte) (iperfSum, error) {
	var r struct {
		Error string `json:"error"`
		End   struct {
			Received iperfSum `json:"sum_received"`
			Sum      iperfSum `json:"sum"`
		} `json:"end"`
	}
	if err := json.Unmarshal(out, &r); err != nil || r.Error != "" {
		return iperfSum{}, fmt.Errorf("iperf3: %v %s %s", err, r.Error, strings.TrimSpace(string(out[:min(len(out), 200)])))
	}
	// Of datagrams "sum_received" knows only what arrived, "sum" what was lost.
	if r.End.Sum.Packets > 0 {
		return r.End.Sum, nil
	}
	return r.End.Received, nil
}

// output runs a program in ns that ends by itself after seconds.
func output(ctx context.Context, ns *enginetest.NetNS, seconds int, name string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(seconds+15)*time.Second)
	defer cancel()
	base := ns.Command(name, args...)
	return exec.CommandContext(ctx, base.Path, base.Args[1:]...).Output()
}
