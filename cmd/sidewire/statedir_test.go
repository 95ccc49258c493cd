package main

import (
	"encoding/json"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"sidewire/dhcp"
	"sidewire/engine/enginetest"
	"sidewire/engine/vmi"
)

// What others may write is not believed, least of all by root.
func TestStateDirOfOthers(t *testing.T) {
	enginetest.Need(t, "root")
	const nobody = 65534
	own := t.TempDir()
	made := func(name string, mode os.FileMode, owner int) string {
		dir := filepath.Join(own, name)
		require.NoError(t, os.Mkdir(dir, 0o700))
		require.NoError(t, os.Chmod(dir, mode))
		require.NoError(t, os.Chown(dir, owner, owner))
		return dir
	}
	check := func(dir string) error { return (&options{stateDir: dir}).checkStateDir() }
	public := made("public", 0o777|os.ModeSticky, 0)
	for _, dir := range []string{own, made("own", 0o755, 0), filepath.Join(own, "new", "one"), filepath.Join(public, "new", "one"), "/proc/none"} {
		assert.NoError(t, check(dir), dir)
	}
	st, err := os.Stat(filepath.Join(public, "new", "one"))
	require.NoError(t, err, "before others do")
	assert.Equal(t, os.FileMode(0o700), st.Mode().Perm())
	assert.NoDirExists(t, filepath.Join(own, "new"), "nobody else can")
	theirs, open := made("theirs", 0o755, nobody), made("open", 0o777, 0)
	link, foreign := filepath.Join(own, "link"), filepath.Join(own, "foreign")
	require.NoError(t, os.Symlink(theirs, link))
	require.NoError(t, os.Symlink(own, foreign))
	require.NoError(t, os.Lchown(foreign, nobody, nobody))
	for _, dir := range []string{theirs, open, link, foreign} {
		assert.ErrorAs(t, check(dir), new(inputError), dir)
	}
	sidewire(t, "run", "-f", "x.yaml", "--state-dir", theirs).says(t, exitInput, "run", []string{theirs + " belongs to user 65534", "--state-dir"})
	sidewire(t, "restore", "--state-dir", open).says(t, exitInput, "restore", []string{open + " can be written to by everybody"})
}

func bookIn(t *testing.T) *leaseBook {
	return newLeaseBook(&options{stateDir: t.TempDir()}, slog.New(slog.NewTextHandler(io.Discard, nil)))
}

// What stands in the way of the book, or of what becomes it, is not followed,
// waited for or written to.
func TestLeaseBookWritesNowhereElse(t *testing.T) {
	b := bookIn(t)
	dir := filepath.Dir(b.path)
	victim := filepath.Join(t.TempDir(), "victim")
	require.NoError(t, os.WriteFile(victim, []byte("as it was"), 0o600))
	for _, name := range []string{".leases.new", "leases.json"} {
		path := filepath.Join(dir, name)
		require.NoError(t, os.Symlink(victim, path))
		assert.Error(t, b.change(func(*bookPage) bool { return true }), name)
		_ = os.Remove(path)
		require.NoError(t, unix.Mkfifo(path, 0o600))
		assert.Error(t, b.change(func(*bookPage) bool { return true }), name)
		_ = os.Remove(path)
	}
	text, err := os.ReadFile(victim)
	require.NoError(t, err)
	assert.Equal(t, "as it was", string(text))
	require.NoError(t, b.change(func(*bookPage) bool { return true }))
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	assert.Len(t, left, 1, "nothing but the book")
}

// Somebody who was stopped with the lock keeps nobody from starting.
func TestLeaseBookLockIsAnothers(t *testing.T) {
	d, err := os.Open(t.TempDir())
	require.NoError(t, err)
	defer d.Close()
	require.NoError(t, unix.Flock(int(d.Fd()), unix.LOCK_EX))
	other, err := os.Open(d.Name())
	require.NoError(t, err)
	defer other.Close()
	assert.ErrorContains(t, lockWithin(int(other.Fd()), 30*time.Millisecond), "another process has kept it")
	require.NoError(t, unix.Flock(int(d.Fd()), unix.LOCK_UN))
	assert.NoError(t, lockWithin(int(other.Fd()), time.Second))
}

// Whatever stands in a book is refused or can be used, and written again.
func FuzzLeaseBook(f *testing.F) {
	page, err := json.Marshal(bookPage{Version: bookVersion, Addresses: []bookEntry{{Held: vmi.Held{Guest: "default/vm/net"}}},
		Guests: map[string]dhcp.State{"default/vm/net": {}, "x": {Leases: make([]dhcp.LeaseInfo, 1)}}})
	require.NoError(f, err)
	f.Add(page)
	f.Add(page[:len(page)/2])
	f.Add([]byte("null"))
	b := newLeaseBook(&options{}, slog.New(slog.DiscardHandler))
	f.Add([]byte(`{"version": 1, "addresses": [{"networks": [], "addr": "fe80::1%x", "owner": {"pid": -1, "since": "7"}}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		page, err := b.parse(data)
		if err != nil {
			return
		}
		held := b.heldIn(page)
		docs := vmi.Docs{}
		docs.Hold(held)
		docs.Holds()
		page.note(held, b.self)
		page.forget()
		_, err = json.Marshal(page)
		require.NoError(t, err)
	})
}
