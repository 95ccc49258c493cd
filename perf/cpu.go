package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// userHZ is the unit of processor times in /proc, which is the same everywhere.
const userHZ = 100

// parseProcessTime reads /proc/PID/stat: the processor seconds that a process
// has spent, in itself and in the kernel for it.
func parseProcessTime(stat string) (float64, error) {
	// The name, in parentheses, may hold spaces and parentheses; utime and
	// stime are the 12th and 13th fields behind it.
	i := strings.LastIndexByte(stat, ')')
	f := strings.Fields(stat[i+1:])
	if i < 0 || len(f) < 13 {
		return 0, fmt.Errorf("not a process's stat: %q", stat)
	}
	user, err1 := strconv.ParseFloat(f[11], 64)
	system, err2 := strconv.ParseFloat(f[12], 64)
	if err1 != nil || err2 != nil {
		return 0, fmt.Errorf("not a process's stat: %q", stat)
	}
	return (user + system) / userHZ, nil
}

// processTime is a process's processor seconds; NaN where there is no such
// process.
func processTime(pid int) float64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nan
	}
	t, err := parseProcessTime(string(b))
	if err != nil {
		return nan
	}
	return t
}

// parseBusy reads /proc/stat: the processor seconds that the machine has spent
// working.
func parseBusy(stat string) float64 {
	line, _, _ := strings.Cut(stat, "\n")
	var ticks float64
	for i, v := range strings.Fields(strings.TrimPrefix(line, "cpu")) {
		n, _ := strconv.ParseFloat(v, 64)
		if i != 3 && i != 4 && i < 8 { // idle, iowait; guests' times are in the first two
			ticks += n
		}
	}
	return ticks / userHZ
}

func busy() float64 {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return nan
	}
	return parseBusy(string(b))
}
