package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// checkStateDir refuses a state directory that others may write to: what stands
// there is believed, and given to the kernel by whoever runs us, often root. One
// that is not there is made, so that nobody else does first; where that cannot be,
// those who want to write there say so.
func (o *options) checkStateDir() error {
	dir := o.statePath()
	_ = os.MkdirAll(dir, 0o700)
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
