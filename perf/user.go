package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"sidewire/engine/enginetest"
)

// The peers of user networking.
const (
	oursStream   = "sidewire, e1000"
	passtPeer    = "passt --vhost-user"
	gvproxyPeer  = "gvproxy"
	libslirpPeer = "libslirp (QEMU)"
)

// userCell is one row of user networking: a guest of native speed whose traffic
// travels over ordinary sockets of the pod.
type userCell struct {
	title  string
	mtu    int
	queues int // pairs of the guest, where the backend has as many
	// buffers is the most that a socket of the pod's sends, in bytes, and how
	// much it begins with; 0 leaves the kernel's own.
	buffers int
	// queue is how many frames wait at the guest's eth0 before one is lost; 0
	// leaves the kernel's own. A driver holds its guest's senders back when its
	// ring is full, a tap does not: it drops, and who takes frames slowly has the
	// guest wait for its timers, for which its backend is not to blame.
	queue int
	measures
}

// tcpQueue is more than a TCP stream has under way.
const tcpQueue = 1 << 14

// measures are what a cell brings.
type measures interface {
	metrics() []metric
	goals() []goal
	takes(seconds int) time.Duration
	measure(ctx context.Context, r *rig, seconds int) (values, error)
}

// userCells are all of them, the most telling ones alone if quick.
func userCells(quick bool) []userCell {
	cells := []userCell{
		{title: "1 stream, MTU 1500", mtu: 1500, queue: tcpQueue, measures: jobs{tcpUp(1).wants(3, 0.4), tcpDown(1).wants(3, 0.4)}},
	}
	if quick {
		return cells
	}
	long := jobs{tcpUp(1).wants(1.3, 0.8), tcpDown(1).wants(1.3, 0.8)}
	many := jobs{tcpUp(8).wants(4, 0), tcpDown(8).wants(4, 0)}
	return append(cells,
		userCell{title: "1 stream, MTU 65520", mtu: 65520, queue: tcpQueue, measures: long},
		// passt waits for its guest's timer whenever its socket takes only part
		// of what it was given: with more room it seldom does.
		userCell{title: "1 stream, MTU 65520, send buffers of 4 MiB", mtu: 65520, buffers: 4 << 20, queue: tcpQueue, measures: long},
		userCell{title: "8 streams, 1 queue pair, MTU 1500", mtu: 1500, queue: tcpQueue, measures: many},
		userCell{title: "8 streams, 2 queue pairs, MTU 1500", mtu: 1500, queues: 2, queue: tcpQueue, measures: many},
		userCell{title: "UDP 1472 B", mtu: 1500, measures: jobs{
			job{unitOfWork: requests[0]}.wants(1.5, 0.4), job{unitOfWork: requests[1]}.wants(1.5, 0.4),
		}},
		userCell{title: "request/response", mtu: 1500, measures: jobs{job{unitOfWork: requests[2]}.wants(0.7, 0.6)}},
		userCell{title: "connect/request/close", mtu: 1500, measures: jobs{job{unitOfWork: requests[3]}.wants(1.5, 0.6)}},
		userCell{title: "1 idle guest", mtu: 1500, measures: idleFlows(1000)},
	)
}

// The peers whose figures sidewire's is to be 3 times as good as, in every row.
const farBehind = 3

// goalsOf are the goals of one metric: against passt as said, 0 for none, and
// against the peers that are far behind.
func goalsOf(m metric, passt float64) (gs []goal) {
	add := func(peer string, times float64) {
		g := goal{Metric: m.Name, Against: peer}
		if m.Less {
			g.Most = times
		} else {
			g.Least = times
		}
		gs = append(gs, g)
	}
	if passt > 0 {
		add(passtPeer, passt)
	}
	far := float64(farBehind)
	if m.Less {
		far = 0.333
	}
	add(gvproxyPeer, far)
	add(libslirpPeer, far)
	return gs
}

// job is work whose rate and processor time are measured, and what they are to
// be by passt's.
type job struct {
	unitOfWork
	rateGoal, cpuGoal float64 // 0 for none
}

func (j job) wants(rate, cpu float64) job {
	j.rateGoal, j.cpuGoal = rate, cpu
	return j
}

func (j job) rateOf() metric { return metric{Name: j.name, Unit: j.rate, Less: j.less} }
func (j job) cpuOf() metric {
	return metric{Name: j.name + ", CPU of the backend", Unit: j.cpu, Less: true}
}
func (j job) p99Of() metric { return metric{Name: j.name + ", p99", Unit: j.rate, Less: true} }

// jobs are done one after the other by the same guest.
type jobs []job

func (js jobs) metrics() (ms []metric) {
	for _, j := range js {
		ms = append(ms, j.rateOf(), j.cpuOf())
		if j.less {
			ms = append(ms, j.p99Of())
		}
	}
	return ms
}

func (js jobs) goals() (gs []goal) {
	for _, j := range js {
		gs = append(gs, goalsOf(j.rateOf(), j.rateGoal)...)
		gs = append(gs, goalsOf(j.cpuOf(), j.cpuGoal)...)
		if j.less {
			gs = append(gs, goalsOf(j.p99Of(), j.rateGoal)...)
		}
	}
	return gs
}

func (js jobs) takes(seconds int) time.Duration {
	return time.Duration(len(js)*seconds)*time.Second + 1500*time.Millisecond
}

func (js jobs) measure(ctx context.Context, r *rig, seconds int) (values, error) {
	v := values{}
	for _, j := range js {
		before := processorSeconds(r.backend)
		got, err := j.run(ctx, r, seconds)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", j.name, err)
		}
		v[j.rateOf().Name] = got.rate
		v[j.cpuOf().Name] = (processorSeconds(r.backend) - before) / got.units
		if j.less {
			v[j.p99Of().Name] = got.p99
		}
	}
	return v, nil
}

func tcpUp(n int) job {
	return job{unitOfWork: unitOfWork{"TCP up", "Gbit/s", "s/GB", false, streamsOf(n, false)}}
}
func tcpDown(n int) job {
	return job{unitOfWork: unitOfWork{"TCP down", "Gbit/s", "s/GB", false, streamsOf(n, true)}}
}

// streamsOf is that many TCP streams at once; its unit is a gigabyte.
func streamsOf(n int, down bool) func(context.Context, *rig, int) (work, error) {
	return func(ctx context.Context, r *rig, seconds int) (work, error) {
		s, err := iperf(ctx, r.guest, seconds, down, "-C", "cubic", "-P", strconv.Itoa(n))
		gbps := s.BitsPerSecond / 1e9
		if err == nil && gbps == 0 {
			err = errors.New("nothing arrives")
		}
		return work{rate: gbps, units: gbps * s.Seconds / 8}, err
	}
}

// userTrials are the rows of user networking.
func (p *programs) userTrials(quick bool, seconds int) []*trial {
	absent := p.userMissing()
	var out []*trial
	for _, c := range userCells(quick) {
		t := &trial{
			Group: "User networking", Title: "user networking, " + c.title, Metrics: c.metrics(), goals: c.goals(), takes: c.takes(seconds),
			Subjects: []string{ours, oursAgain, passtPeer, gvproxyPeer, libslirpPeer, oursStream}, missing: map[string]error{},
		}
		if quick {
			t.Subjects = []string{ours, passtPeer}
		}
		if p.against.sidewire != "" {
			t.Subjects = append(t.Subjects, other)
		}
		for _, name := range t.Subjects {
			if err := absent[name]; err != nil {
				t.missing[name] = err
			}
		}
		t.measure = func(ctx context.Context, name string) (values, error) { return p.measureUser(ctx, name, c, seconds) }
		out = append(out, t)
	}
	return out
}

// userMissing says why subjects cannot be measured on this machine.
func (p *programs) userMissing() map[string]error {
	out := map[string]error{}
	_, out[passtPeer] = findPasst()
	_, out[gvproxyPeer] = findGvproxy()
	_, out[libslirpPeer] = findSlirpQEMU()
	if err := missingForStreams(); err != nil {
		for _, name := range []string{ours, oursAgain, oursStream, other, passtPeer, gvproxyPeer, libslirpPeer} {
			out[name] = err
		}
	}
	return out
}

func (p *programs) measureUser(ctx context.Context, name string, c userCell, seconds int) (v values, err error) {
	r, err := p.openUser(ctx, name, c)
	if err != nil {
		return nil, err
	}
	defer r.close()
	if err := r.warm(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, r.saidBackend())
	}
	if v, err = c.measure(ctx, r.rig, seconds); err != nil {
		return nil, fmt.Errorf("%w %s", err, r.saidBackend())
	}
	return v, nil
}

// idleFlows is the memory of the backend with an idle guest, and with so many
// TCP connections more that do nothing.
type idleFlows int

var (
	idleAnon = metric{Name: "RssAnon, 1 idle guest", Unit: "MiB", Less: true}
	idlePss  = metric{Name: "PSS less guest memory, 1 idle guest", Unit: "MiB", Less: true}
	flowAnon = metric{Name: "RssAnon, per 1000 idle TCP flows", Unit: "KiB", Less: true}
	flowPss  = metric{Name: "PSS less guest memory, per 1000 idle TCP flows", Unit: "KiB", Less: true}
)

func (idleFlows) metrics() []metric { return []metric{idleAnon, idlePss, flowAnon, flowPss} }

func (n idleFlows) goals() (gs []goal) {
	for _, m := range n.metrics() {
		gs = append(gs, goalsOf(m, 1)...)
	}
	return gs
}

func (n idleFlows) takes(int) time.Duration { return 2*idleFor + 3*time.Second }

// idleFor is how long nothing happens before memory is looked at.
const idleFor = time.Second

func (n idleFlows) measure(ctx context.Context, r *rig, _ int) (values, error) {
	time.Sleep(idleFor)
	idle, err := footprintOf(r.backend)
	if err != nil {
		return nil, err
	}
	h, err := startProc(ctx, procOptions{}, "perf hold", "nsenter", "--net="+r.guest.Path, "--", self(), "hold", "-flows", strconv.Itoa(int(n)))
	if err != nil {
		return nil, err
	}
	defer h.stop()
	said, err := h.expect(0, "}\n", 20*time.Second)
	if err != nil {
		return nil, err
	}
	var got holding
	if err := json.Unmarshal([]byte(said), &got); err != nil {
		return nil, fmt.Errorf("perf hold: %w", err)
	}
	time.Sleep(idleFor)
	full, err := footprintOf(r.backend)
	if err != nil {
		return nil, err
	}
	per := func(a, b uint64) float64 { return max(0, float64(b)-float64(a)) / 1024 * 1000 / float64(got.Flows) }
	return values{
		idleAnon.Name: float64(idle.anon) / (1 << 20), idlePss.Name: float64(idle.pss) / (1 << 20),
		flowAnon.Name: per(idle.anon, full.anon), flowPss.Name: per(idle.pss, full.pss),
	}, nil
}

// warm waits until the guest reaches the outside, which resolves neighbours on
// both sides too.
func (u *userRig) warm() error {
	var err error
	if !enginetest.Wait(5*time.Second, func() bool {
		c, e := u.guest.Dial("tcp4", echoAddr, time.Second)
		if err = e; e == nil {
			err = exchange(c)
			c.Close()
		}
		return err == nil
	}) {
		return fmt.Errorf("the guest does not reach the outside: %w", err)
	}
	return nil
}
