package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
)

// A guest's program that cannot run in the guest is found before anything is
// built.
func TestDemoRefusesItsGuest(t *testing.T) {
	enginetest.Need(t, "root", "netns", "tun")
	dir := t.TempDir()
	copied := func(from, to string) {
		b, err := os.ReadFile(from)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(dir, to), b, 0o755))
	}
	copied("/proc/self/exe", "sidewire")
	demo := func() outcome {
		cmd := sidewireCommand("demo", "--guest", "qemu")
		cmd.Path = filepath.Join(dir, "sidewire")
		return finish(t, cmd)
	}
	demo().says(t, exitMachine, "demo", []string{"sidewire-guest is missing", "make build"})

	copied("/bin/sh", "sidewire-guest")
	demo().says(t, exitMachine, "demo", []string{"sidewire-guest is dynamically linked", "CGO_ENABLED=0"})
}
