package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// checkStateDir refuses a state directory that others may write to: what stands
// there is believed, and given to the kernel by whoever runs us, often root. One
// that is not there is made where others could do it first; if that cannot be,
// those who want to write there say so.
func (o *options) checkStateDir() error {
	dir := o.statePath()
	if others, err := openToOthers(filepath.Dir(dir)); err == nil && others {
		_ = os.MkdirAll(dir, 0o700)
	}
	for _, path := range []string{dir, dir + "/."} { // a symbolic link, and what it leads to
		var st unix.Stat_t
		if unix.Lstat(path, &st) != nil {
			return nil
		}
		why := ""
		switch {
		case int(st.Uid) != os.Geteuid() && st.Uid != 0:
			why = fmt.Sprintf("belongs to user %d", st.Uid)
		case st.Mode&unix.S_IFMT == unix.S_IFDIR && st.Mode&unix.S_IWOTH != 0:
			why = "can be written to by everybody"
		}
		if why != "" {
			return badInput("state directory %s %s, who could change what is put back from it: name one of your own with --state-dir, such as a directory below it", dir, why)
		}
	}
	return nil
}

// openToOthers says whether others may make something below a directory, or
// below the nearest one above it that is there.
func openToOthers(dir string) (bool, error) {
	for {
		st, err := os.Stat(dir)
		switch {
		case err == nil:
			return st.Mode().Perm()&0o002 != 0, nil
		case !errors.Is(err, fs.ErrNotExist) || dir == filepath.Dir(dir):
			return false, err
		}
		dir = filepath.Dir(dir)
	}
}
