package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"sidewire/engine/enginetest"
)

// peerCache is where .ci/deps puts peers that no package here brings.
func peerCache(name ...string) string {
	dir, err := os.UserCacheDir()
	if err != nil {
		return ""
	}
	return filepath.Join(append([]string{dir, "sidewire", "peers"}, name...)...)
}

// findPeer is the first of the system's and the cache's program that does what
// is wanted of it.
func findPeer(name, cached string, does func(program string) bool) (string, error) {
	if p, err := enginetest.Program(name); err == nil && does(p) {
		return p, nil
	}
	if fi, err := os.Stat(cached); err == nil && fi.Mode()&0o111 != 0 && does(cached) {
		return cached, nil
	}
	return "", fmt.Errorf("no %s; .ci/deps peers brings it", name)
}

// says looks for a word in what a program says of itself.
func says(word string, args ...string) func(program string) bool {
	return func(program string) bool {
		out, _ := exec.Command(program, args...).CombinedOutput() // some exit with 1
		return strings.Contains(string(out), word)
	}
}

var findPasst = sync.OnceValues(func() (string, error) {
	p, err := findPeer("passt", peerCache("passt", "passt"), says("--vhost-user", "--help"))
	if err != nil {
		err = fmt.Errorf("%w: one with --vhost-user, as Debian 13 has it", err)
	}
	return p, err
})

// passtVersion is what .ci/deps brought: passt says its version to terminals
// alone.
func passtVersion() string {
	p, err := findPasst()
	if err != nil {
		return ""
	}
	b, _ := os.ReadFile(filepath.Join(filepath.Dir(p), "VERSION")) // not of the system's
	return version(string(b))
}

var findGvproxy = sync.OnceValues(func() (string, error) {
	return findPeer("gvproxy", peerCache("gvproxy"), says("-listen-qemu", "-help"))
})

// findSlirpQEMU finds a QEMU whose user networking can be reached without a
// machine.
var findSlirpQEMU = sync.OnceValues(func() (string, error) {
	p, err := enginetest.Program("qemu-system-x86_64")
	if err != nil {
		return "", fmt.Errorf("%w (package qemu-system-x86)", err)
	}
	out, _ := exec.Command(p, "-netdev", "help").CombinedOutput()
	kinds := strings.Fields(string(out))
	for _, kind := range []string{"user", "stream"} {
		if !slices.Contains(kinds, kind) {
			return "", errors.New(p + " has no -netdev " + kind + ": QEMU 7.2 and later with libslirp do")
		}
	}
	return p, nil
})
