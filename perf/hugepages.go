package main

import (
	"os"
	"strconv"
	"strings"
)

const (
	hugePageFile = "/proc/sys/vm/nr_hugepages"
	// hugePagesWanted are pages of 2 MiB for two testpmd and a switch.
	hugePagesWanted = 1200
)

// hugepages says whether the machine has huge pages to spare for a testpmd.
func hugepages() bool {
	n, _ := strconv.Atoi(strings.TrimSuffix(field("/proc/meminfo", "HugePages_Free"), " kB"))
	return n >= mbufs*2304/(2<<20)+16
}

// reserveHugepages asks the kernel for huge pages if there are none, and
// returns what gives them back. Without them testpmd runs a third slower.
func reserveHugepages() (putBack func()) {
	b, err := os.ReadFile(hugePageFile)
	if err != nil || hugepages() {
		return func() {}
	}
	if os.WriteFile(hugePageFile, []byte(strconv.Itoa(hugePagesWanted)), 0) != nil {
		return func() {}
	}
	return func() { _ = os.WriteFile(hugePageFile, b, 0) }
}
