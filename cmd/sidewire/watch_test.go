package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// As long as the file is there, what else happens in the directories on the way
// to it wakes nobody up, unlike in the directory of the file or of a link.
func TestFileWatchSleeps(t *testing.T) {
	root := t.TempDir()
	at := func(name string) string { return filepath.Join(root, name) }
	require.NoError(t, os.MkdirAll(at("a/b"), 0o755))
	require.NoError(t, os.MkdirAll(at("c"), 0o755))
	require.NoError(t, os.WriteFile(at("a/b/f"), nil, 0o644))
	require.NoError(t, os.Symlink("../a/b/f", at("c/link")))
	for path, loud := range map[string]map[string]bool{
		"a/b/f":  {".": false, "a": false, "a/b": true, "c": false},
		"c/link": {".": false, "a": false, "a/b": true, "c": true},
	} {
		w, err := watchFile(at(path))
		require.NoError(t, err)
		defer w.Close()
		before := 0
		for dir, want := range loud {
			require.NoError(t, os.WriteFile(at(filepath.Join(dir, "noise")), nil, 0o644))
			require.NoError(t, os.Remove(at(filepath.Join(dir, "noise"))))
			n, err := unix.IoctlGetInt(int(w.f.Fd()), unix.TIOCINQ)
			require.NoError(t, err)
			assert.Equal(t, want, n > before, "%s: noise in %s", path, dir)
			before = n
		}
	}
}

// A directory that somebody has open is no obstacle: it ends when that one lets
// it go, but another is in its place before.
func TestFileWatchDirectoryHeldOpen(t *testing.T) {
	root := t.TempDir()
	path := filepath.Join(root, "a/b/f")
	write := func(content string) {
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
	}
	write("first")
	told := watched(t, path)
	for _, name := range []string{"a", "a/b"} {
		d, err := os.Open(filepath.Join(root, name))
		require.NoError(t, err)
		defer d.Close()
	}
	require.NoError(t, os.RemoveAll(filepath.Join(root, "a")))
	untilTold(t, told, "")
	write("second")
	untilTold(t, told, "second")
	write("third")
	untilTold(t, told, "third")
}
