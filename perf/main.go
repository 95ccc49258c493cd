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

// rate is how fast a stream was, and what a gigabyte of it cost in processor
// seconds: of the whole machine, and of the backend's process.
type rate struct{ gbps, machine, backend float64 }

// sample is what one round measured of one path.
type sample struct{ up, down rate }

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
			fmt.Fprintf(os.Stderr, "round %d/%d %-32s up %6.2f down %6.2f Gbit/s\n", r+1, rounds, paths[k].name, s.up.gbps, s.down.gbps)
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
	if s.up, err = r.stream(ctx, seconds, false); err != nil {
		return s, err
	}
	s.down, err = r.stream(ctx, seconds, true)
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
	for _, way := range []struct {
		name string
		of   func(sample) rate
	}{
		{"guest to outside", func(s sample) rate { return s.up }},
		{"outside to guest", func(s sample) rate { return s.down }},
	} {
		fmt.Fprintf(w, "\n%s\tGbit/s\tratio\tCPU s/GB, machine\tratio\tCPU s/GB, backend\tratio\n", way.name)
		for i, p := range paths {
			fmt.Fprint(w, p.name)
			for _, f := range []func(rate) float64{
				func(r rate) float64 { return r.gbps }, func(r rate) float64 { return r.machine }, func(r rate) float64 { return r.backend },
			} {
				var xs, ratios []float64
				for r := range samples[i] {
					x := f(way.of(samples[i][r]))
					// Ratios are taken round by round against the first path, so
					// that what the machine did in that round cancels out.
					xs, ratios = append(xs, x), append(ratios, x/f(way.of(samples[0][r])))
				}
				fmt.Fprintf(w, "\t%s\t%s", text(xs), text(ratios))
			}
			fmt.Fprintln(w)
		}
	}
	return w.Flush()
}

func text(xs []float64) string {
	m, lo, hi := spread(xs)
	return fmt.Sprintf("%.2f (%.2f-%.2f)", m, lo, hi)
}
