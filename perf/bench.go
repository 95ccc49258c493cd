package main

import (
	"bufio"
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// benchstat is the program that compares benchmarks, which go fetches.
const benchstat = "golang.org/x/perf/cmd/benchstat@v0.0.0-20250813145418-2f7363a06fe1"

// runBench is the program "perf bench": it runs the benchmarks that lie beside
// the code and compares them with those of the stored baseline.
func runBench(args []string) error {
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	baseline := fs.String("baseline", filepath.Join("perf", "baseline.txt"), "`FILE` to compare with")
	save := fs.Bool("save", false, "make this run the baseline")
	count := fs.Int("count", 6, "runs of each benchmark")
	each := fs.String("benchtime", "100ms", "time of each run")
	only := fs.String("bench", ".", "`REGEXP` of the benchmarks")
	if err := fs.Parse(args); err != nil {
		return err
	}
	packages := fs.Args()
	if len(packages) == 0 {
		packages = []string{"./..."}
	}
	var out bytes.Buffer
	argv := append([]string{"test", "-run", "^$", "-bench", *only, "-benchmem", "-count", strconv.Itoa(*count), "-benchtime", *each, "-p", "1"}, packages...)
	cmd := exec.Command("go", argv...)
	cmd.Stdout, cmd.Stderr = io.MultiWriter(&out, os.Stderr), os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("benchmarks: %w", err)
	}
	if *save {
		return os.WriteFile(*baseline, keepResults(out.Bytes()), 0o644)
	}
	now := filepath.Join("perf", "report", "bench.txt")
	if err := os.MkdirAll(filepath.Dir(now), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(now, out.Bytes(), 0o644); err != nil {
		return err
	}
	return compareFiles(os.Stdout, *baseline, now)
}

// keepResults leaves away what is not about a benchmark.
func keepResults(out []byte) []byte {
	var b bytes.Buffer
	for line := range bytes.Lines(out) {
		for _, p := range []string{"Benchmark", "goos:", "goarch:", "pkg:", "cpu:"} {
			if bytes.HasPrefix(line, []byte(p)) {
				b.Write(line)
			}
		}
	}
	return b.Bytes()
}

// compareFiles lets benchstat compare two runs, or does so itself, more simply,
// where it cannot be had.
func compareFiles(w io.Writer, before, after string) error {
	if _, err := os.Stat(before); err != nil {
		return fmt.Errorf("no baseline: %w; make one with: go run ./perf bench -save", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if out, err := exec.CommandContext(ctx, "go", "run", benchstat, "baseline="+before, "now="+after).Output(); err == nil {
		_, err = w.Write(out)
		return err
	}
	a, err := readBench(before)
	if err != nil {
		return err
	}
	b, err := readBench(after)
	if err != nil {
		return err
	}
	return compare(w, a, b)
}

func readBench(path string) (map[string][]float64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseBench(f)
}

var benchLine = regexp.MustCompile(`^(Benchmark\S+?)(?:-\d+)?\s+\d+\s+([\d.]+) ns/op`)

// parseBench reads the nanoseconds of each benchmark's runs.
func parseBench(r io.Reader) (map[string][]float64, error) {
	out := map[string][]float64{}
	pkg := ""
	s := bufio.NewScanner(r)
	for s.Scan() {
		if p, ok := strings.CutPrefix(s.Text(), "pkg: "); ok {
			pkg = p
		}
		if m := benchLine.FindStringSubmatch(s.Text()); m != nil {
			ns, err := strconv.ParseFloat(m[2], 64)
			if err != nil {
				return nil, err
			}
			name := pkg + " " + m[1]
			out[name] = append(out[name], ns)
		}
	}
	return out, s.Err()
}

// compare writes the medians side by side.
func compare(w io.Writer, before, after map[string][]float64) error {
	tw := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(tw, "benchmark\tbaseline ns\tnow ns\tratio")
	var names []string
	for n := range after {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		now := spreadOf(after[n])
		if before[n] == nil {
			fmt.Fprintf(tw, "%s\t\t%v\t\n", n, now)
			continue
		}
		was := spreadOf(before[n])
		fmt.Fprintf(tw, "%s\t%v\t%v\t%s\n", n, was, now, short(now.Median/was.Median))
	}
	return tw.Flush()
}
