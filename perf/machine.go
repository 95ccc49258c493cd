package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
)

// machine is where and when a report was made.
type machine struct {
	Date       string            `json:"date"`
	CPU        string            `json:"cpu"`
	Processors int               `json:"processors"`
	Memory     string            `json:"memory"`
	HugePages  bool              `json:"huge_pages"`
	Kernel     string            `json:"kernel"`
	Go         string            `json:"go"`
	Commit     string            `json:"commit"`
	Load       string            `json:"load"`                               // of the last minute, before anything was measured
	NoCalls    string            `json:"system_calls_not_counted,omitempty"` // why
	Versions   map[string]string `json:"versions"`
}

// describe finds out about the machine.
func describe() machine {
	var u unix.Utsname
	_ = unix.Uname(&u)
	m := machine{
		Date: time.Now().Format("2006-01-02"), CPU: field("/proc/cpuinfo", "model name"), Processors: runtime.NumCPU(),
		Memory: field("/proc/meminfo", "MemTotal"), HugePages: hugepages(), Kernel: unix.ByteSliceToString(u.Release[:]),
		Go: runtime.Version(), Commit: commit(), Versions: map[string]string{},
	}
	if err := callsCounted(); err != nil {
		m.NoCalls = err.Error()
	}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.Load, _, _ = strings.Cut(string(b), " ")
	}
	for name, argv := range map[string][]string{
		"testpmd": {"dpdk-testpmd", "-v", "-h"}, "ovs": {"ovs-vswitchd", "--version"}, "iperf3": {"iperf3", "--version"},
	} {
		if p, err := enginetest.Program(argv[0]); err == nil {
			m.addVersion(name, p, argv[1:]...)
		}
	}
	for name, find := range map[string]func() (string, error){"gvproxy": findGvproxy, "QEMU": findSlirpQEMU} {
		if p, err := find(); err == nil {
			m.addVersion(name, p, "--version")
		}
	}
	if v := passtVersion(); v != "" {
		m.Versions["passt"] = v
	}
	return m
}

func (m machine) addVersion(name, program string, args ...string) {
	if v := version(firstLine(program, args...)); v != "" {
		m.Versions[name] = v
	}
}

func (m machine) String() string {
	s := fmt.Sprintf("%s: %d processors (%s), memory %s, Linux %s, %s, sidewire %s, load before %s", m.Date, m.Processors, m.CPU, m.Memory,
		m.Kernel, m.Go, m.Commit, m.Load)
	if !m.HugePages {
		s += ", no huge pages for testpmd"
	}
	for _, name := range []string{"testpmd", "ovs", "iperf3", "passt", "gvproxy", "QEMU"} {
		if v := m.Versions[name]; v != "" {
			s += ", " + name + " " + v
		}
	}
	if m.NoCalls != "" {
		s += ". System calls are not counted: " + m.NoCalls
	}
	return s + ".\n"
}

// commit is what is measured, as git calls it.
func commit() string {
	out, err := exec.Command("git", "describe", "--always", "--dirty").Output()
	if err != nil {
		return "of an unknown commit"
	}
	return strings.TrimSpace(string(out))
}

// version is the first word of a line that has a digit in front of a dot.
func version(line string) string {
	for _, w := range strings.Fields(strings.ReplaceAll(line, "'", " ")) {
		if i := strings.IndexByte(w, '.'); i > 0 && w[i-1] >= '0' && w[i-1] <= '9' {
			return w
		}
	}
	return ""
}

// firstLine is the first line with a version that a program writes.
func firstLine(name string, args ...string) string {
	out, _ := exec.Command(name, args...).CombinedOutput()
	for line := range strings.Lines(string(out)) {
		if line = strings.TrimSpace(line); line != "" && !strings.HasPrefix(line, "EAL: Detected") {
			return line
		}
	}
	return ""
}

// field is the value behind a name in a file of the kernel's.
func field(path, name string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v)
		}
	}
	return ""
}
