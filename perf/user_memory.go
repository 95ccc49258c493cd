package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// footprint is a process's memory in bytes: what only it has (RssAnon), and its
// share of all that it has but for the guest's memory.
type footprint struct{ anon, pss uint64 }

// guestMemory is what a mapping of the guest's memory is called.
const guestMemory = "/memfd:vhosttest"

func footprintOf(pid int) (f footprint, err error) {
	maps, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return f, err
	}
	defer maps.Close()
	return parseSmaps(maps)
}

// parseSmaps adds up the mappings in /proc/PID/smaps, but for the guest's
// memory. The RssAnon of /proc/PID/status lags behind what each processor has
// counted.
func parseSmaps(smaps io.Reader) (f footprint, err error) {
	guest, found := false, false
	s := bufio.NewScanner(smaps)
	for s.Scan() {
		line := s.Text()
		name, v, ok := strings.Cut(line, ":")
		// A mapping begins with its addresses, all else with a name that begins
		// with a capital letter.
		if !ok || name == "" || name[0] < 'A' || name[0] > 'Z' {
			guest = strings.Contains(line, guestMemory)
			continue
		}
		sum := map[string]*uint64{"Anonymous": &f.anon, "Pss": &f.pss}[name]
		if sum == nil || guest {
			continue
		}
		n, err := parseKB(v)
		if err != nil {
			return f, fmt.Errorf("a process's smaps: %w", err)
		}
		found = true
		*sum += n
	}
	if err := s.Err(); err != nil {
		return f, err
	}
	if !found {
		return f, errors.New("a process's smaps tell nothing")
	}
	return f, nil
}

// parseKB reads "  12 kB".
func parseKB(s string) (uint64, error) {
	n, err := strconv.ParseUint(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(s), "kB")), 10, 64)
	return n << 10, err
}

// processorSeconds is the processor time that a process has used, with the
// kernel's work in its context, also that of threads that have ended; NaN where
// there is no such process.
func processorSeconds(pid int) float64 {
	const cpuclockSched = 2 // of a process, as clock_getcpuclockid(3) makes it
	var ts unix.Timespec
	if unix.ClockGettime(int32(^pid<<3|cpuclockSched), &ts) != nil {
		return nan
	}
	return time.Duration(ts.Nano()).Seconds()
}

// holding is what "perf hold" has.
type holding struct {
	Flows int `json:"flows"`
}

// runHold is the program "perf hold": it keeps connections that do nothing
// until its standard input ends.
func runHold(args []string) error {
	fs := flag.NewFlagSet("hold", flag.ContinueOnError)
	n := fs.Int("flows", 1000, "how many")
	if err := fs.Parse(args); err != nil {
		return err
	}
	var held []net.Conn
	for len(held) < *n {
		c, err := net.DialTimeout("tcp4", echoAddr, 5*time.Second)
		if err == nil {
			err = exchange(c)
		}
		if err != nil {
			return fmt.Errorf("flow %d: %w", len(held)+1, err)
		}
		held = append(held, c)
	}
	if err := json.NewEncoder(os.Stdout).Encode(holding{len(held)}); err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, os.Stdin)
	for _, c := range held {
		err = errors.Join(err, c.Close())
	}
	return err
}
