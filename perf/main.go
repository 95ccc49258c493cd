// Command perf measures whole paths beside their peers: packets from guest to
// guest beside DPDK and Open vSwitch, streams and requests of a guest of native
// speed through sidewire's masquerade beside the kernel's own way, and through
// its user networking beside passt, gvproxy and libslirp.
//
// A [trial] is one path through several subjects, measured in rounds; a
// [subject] is sidewire or a peer. What measures is never ours: the guests of
// the packet paths are dpdk-testpmd, those of the streams the kernel.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// options are the flags.
type options struct {
	quick   bool
	only    string
	columns string
	rounds  int
	seconds float64
	flags   string
	against string
	out     string
	list    bool
}

func main() {
	if f := inside[first(os.Args[1:])]; f != nil {
		if err := f(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "perf:", err)
			os.Exit(2)
		}
		return
	}
	var o options
	flag.BoolVar(&o.quick, "quick", false, "the cells that say most, in less than three minutes")
	flag.StringVar(&o.only, "only", "", "`REGEXP` of the titles to measure, out of all; see -list")
	flag.StringVar(&o.columns, "columns", "", "`REGEXP` of what is measured beside sidewire, out of all")
	flag.IntVar(&o.rounds, "rounds", 0, "`N` rounds, each with every subject (default 5, quick 2)")
	flag.Float64Var(&o.seconds, "seconds", 0, "`SECONDS` of each measurement (default 2, quick 0.5)")
	flag.StringVar(&o.flags, "flags", "", "further flags for sidewire run")
	flag.StringVar(&o.against, "against", "", "measure beside `OTHERS`, to see what a change brought: another checkout, or another build\n"+
		"of sidewire, of perf (whose engine stands behind a single guest), or both with a comma between")
	flag.StringVar(&o.out, "out", filepath.Join("perf", "report"), "`DIR` for the report")
	flag.BoolVar(&o.list, "list", false, "list the titles and what is missing, and measure nothing")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "perf:", err)
		os.Exit(2)
	}
}

// inside are the programs that are told from the harness by the first argument.
// Most of them it starts itself, as processes of their own.
var inside = map[string]func(args []string) error{
	"inner": runInner,
	"echo":  runEcho,
	"ask":   runAsk,
	"hold":  runHold,
	"bench": runBench,
}

// self is the path of this program.
func self() string {
	p, err := os.Executable()
	if err != nil {
		return os.Args[0]
	}
	return p
}

func first(args []string) string {
	if len(args) == 0 {
		return ""
	}
	return args[0]
}

func run(ctx context.Context, o options) error {
	o.defaults()
	only, err := regexp.Compile(o.only)
	if err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	columns, err := regexp.Compile(o.columns)
	if err != nil {
		return fmt.Errorf("-columns: %w", err)
	}
	p := &programs{self: self(), flags: o.flags}
	if p.against, err = findRival(o.against); err != nil {
		return fmt.Errorf("-against: %w", err)
	}
	trials := pick(p.trials(o), only)
	for _, t := range trials {
		t.Subjects = slices.DeleteFunc(t.Subjects, func(name string) bool { return name != t.Subjects[0] && !columns.MatchString(name) })
	}
	if len(trials) == 0 {
		return errors.New("nothing to measure: no title matches -only")
	}
	if o.list {
		return list(os.Stdout, trials)
	}
	dir, err := os.MkdirTemp("", "swperf")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if p.sidewire, err = build(ctx, "", sidewirePath, filepath.Join(dir, "sidewire")); err != nil {
		return err
	}
	if err := p.against.build(ctx, dir); err != nil {
		return fmt.Errorf("-against: %w", err)
	}
	leave, err := alone(ctx)
	if err != nil {
		return err
	}
	defer leave()
	defer reserveHugepages()()
	defer preferSelf()()
	return measureAll(ctx, o, trials)
}

// measureAll runs the trials and writes what was measured, also when it was
// ended before its time.
func measureAll(ctx context.Context, o options, trials []*trial) error {
	m := describe()
	bar := newProgress(os.Stderr, isTerminal(os.Stderr))
	r := newResult(m, o.rounds, runTrials(ctx, trials, o.rounds, bar))
	r.markdown(os.Stdout)
	if err := r.write(o.out); err != nil {
		return fmt.Errorf("report: %w", err)
	}
	bar.line("written: %s", filepath.Join(o.out, "report.{md,json,html}"))
	return ctx.Err()
}

// trials are all rows of the report.
func (p *programs) trials(o options) []*trial {
	quick := o.quick && o.only == ""
	d := time.Duration(o.seconds * float64(time.Second))
	out := p.packetTrials(packetCells(quick), quick, d)
	if !quick {
		out = append(out, p.growthTrials(d)...)
	}
	seconds := max(1, int(o.seconds))
	out = append(out, p.streamTrials(quick, seconds)...)
	return append(out, p.userTrials(quick, seconds)...)
}

func (o *options) defaults() {
	rounds, seconds := 5, 2.0
	if o.quick {
		rounds, seconds = 2, 0.5
	}
	if o.rounds == 0 {
		o.rounds = rounds
	}
	if o.seconds == 0 {
		o.seconds = seconds
	}
}

func pick(trials []*trial, only *regexp.Regexp) (out []*trial) {
	for _, t := range trials {
		if only.MatchString(t.Title) {
			out = append(out, t)
		}
	}
	return out
}

func list(w io.Writer, trials []*trial) error {
	for _, t := range trials {
		fmt.Fprintln(w, t.Title)
		for _, s := range t.Subjects {
			if err := t.missing[s]; err != nil {
				fmt.Fprintf(w, "\t%s: %v\n", s, err)
			} else {
				fmt.Fprintf(w, "\t%s\n", s)
			}
		}
	}
	return nil
}

func isTerminal(f *os.File) bool {
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
