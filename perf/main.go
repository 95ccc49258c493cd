// Command perf measures whole paths beside their peers: one TCP stream of a
// native-speed guest through sidewire's masquerade and through the kernel's
// own way for the same guest, interleaved round by round.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"sort"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"
)

// path is one way from the guest to the outside.
type path struct {
	name string
	// open builds it up; the guest has its address when it returns.
	open func(mtu int) (*rig, error)
}

// sample is what one round measured of one path.
type sample struct {
	up, down float64 // Gbit/s
	cpuUp    float64 // processor seconds of the whole machine per GB
	cpuDown  float64
}

func main() {
	rounds := flag.Int("rounds", 5, "rounds; each measures every path, both ways")
	seconds := flag.Int("seconds", 3, "seconds of each stream")
	mtu := flag.Int("mtu", 1500, "MTU of the pod's link")
	flags := flag.String("flags", "", "further flags for sidewire run")
	against := flag.String("against", "", "another sidewire program to measure beside, to see what a change brought")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *rounds, *seconds, *mtu, *flags, *against); err != nil {
		fmt.Fprintln(os.Stderr, "perf:", err)
		os.Exit(2)
	}
}

func run(ctx context.Context, rounds, seconds, mtu int, flags, against string) error {
	binary, cleanup, err := buildSidewire(ctx)
	if err != nil {
		return err
	}
	defer cleanup()
	paths := []path{
		{"sidewire", func(mtu int) (*rig, error) { return openSidewire(binary, flags, mtu) }},
		{"kernel (tap, bridge, nftables)", openKernel},
		{"sidewire again (A/A)", func(mtu int) (*rig, error) { return openSidewire(binary, flags, mtu) }},
	}
	if against != "" {
		paths = append(paths, path{against, func(mtu int) (*rig, error) { return openSidewire(against, flags, mtu) }})
	}
	samples := make([][]sample, len(paths))
	for r := range rounds {
		for i := range paths {
			k := (i + r) % len(paths) // nobody is always first
			s, err := measure(ctx, paths[k], seconds, mtu)
			if err != nil {
				return fmt.Errorf("%s: %w", paths[k].name, err)
			}
			samples[k] = append(samples[k], s)
			fmt.Fprintf(os.Stderr, "round %d/%d %-32s up %6.2f down %6.2f Gbit/s\n", r+1, rounds, paths[k].name, s.up, s.down)
		}
	}
	return report(paths, samples, mtu)
}

func measure(ctx context.Context, p path, seconds, mtu int) (s sample, err error) {
	r, err := p.open(mtu)
	if err != nil {
		return s, err
	}
	defer r.close()
	if s.up, s.cpuUp, err = r.stream(ctx, seconds, false); err != nil {
		return s, err
	}
	s.down, s.cpuDown, err = r.stream(ctx, seconds, true)
	return s, err
}

// spread is the median and the range of a figure.
func spread(xs []float64) (med, lo, hi float64) {
	xs = append([]float64(nil), xs...)
	sort.Float64s(xs)
	return xs[len(xs)/2], xs[0], xs[len(xs)-1]
}

func report(paths []path, samples [][]sample, mtu int) error {
	var u unix.Utsname
	_ = unix.Uname(&u)
	fmt.Printf("One TCP stream, MTU %d, %d processors, Linux %s, %s, %s\n", mtu, runtime.NumCPU(),
		unix.ByteSliceToString(u.Release[:]), runtime.Version(), time.Now().Format("2006-01-02"))
	w := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "path\tguest to outside, Gbit/s\toutside to guest, Gbit/s\tCPU s/GB up\tCPU s/GB down\tratio up\tratio down")
	for i, p := range paths {
		col := func(f func(sample) float64) string {
			m, lo, hi := spread(each(samples[i], f))
			return fmt.Sprintf("%.2f (%.2f-%.2f)", m, lo, hi)
		}
		// Ratios are taken round by round against the first path, so that what
		// the machine did in that round cancels out.
		ratio := func(f func(sample) float64) string {
			var rs []float64
			for r := range samples[i] {
				rs = append(rs, f(samples[i][r])/f(samples[0][r]))
			}
			m, lo, hi := spread(rs)
			return fmt.Sprintf("%.2f (%.2f-%.2f)", m, lo, hi)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", p.name, col(up), col(down), col(cpuUp), col(cpuDown), ratio(up), ratio(down))
	}
	return w.Flush()
}

func up(s sample) float64      { return s.up }
func down(s sample) float64    { return s.down }
func cpuUp(s sample) float64   { return s.cpuUp }
func cpuDown(s sample) float64 { return s.cpuDown }

func each(ss []sample, f func(sample) float64) []float64 {
	var out []float64
	for _, s := range ss {
		out = append(out, f(s))
	}
	return out
}
