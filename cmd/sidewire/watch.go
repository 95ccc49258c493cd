package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// fileWatch tells when what a path leads to may have changed: the file was
// written, or another took its place, at the path itself, behind a symbolic
// link, or with a directory on the way. As long as nothing happens, nothing
// wakes up. One goroutine may call Next; Close may be called beside it.
//
// Each name of a link, of the file, and of what is missing is watched in its
// directory. A directory that is there is watched for its own end alone: on its
// way up may be /run or /tmp, where there is always something new. It cannot be
// removed before the file is; from then on, until there is a file again, all
// names are watched, for a directory that somebody has open ends later.
type fileWatch struct {
	path  string
	f     *os.File            // inotify
	names map[uint32][]string // by watch: what matters in the directory; nil is the file
	masks map[string]uint32   // by path: what its directory is watched for
}

const (
	maskFile = unix.IN_CLOSE_WRITE // once it is whole
	maskEnd  = unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
	maskName = unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_DELETE | unix.IN_MOVED_FROM | maskEnd
	maxLinks = 40 // on the way, as the kernel has it
)

// watchFile begins to watch: what changes after it has returned is told.
func watchFile(path string) (*fileWatch, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch %s: inotify: %w", path, err)
	}
	w := &fileWatch{path: path, f: os.NewFile(uintptr(fd), "inotify")}
	if err := w.arm(); err != nil {
		w.f.Close()
		return nil, err
	}
	return w, nil
}

// Close ends Next.
func (w *fileWatch) Close() error { return w.f.Close() }

// Next waits for a change. It returns an error when the watch cannot go on.
func (w *fileWatch) Next() error {
	b := make([]byte, 16<<10)
	for {
		n, err := w.f.Read(b)
		if err != nil {
			return fmt.Errorf("watch %s: %w", w.path, err)
		}
		if w.matters(b[:n]) {
			return w.arm()
		}
	}
}

// matters says whether one of these events may be a change.
func (w *fileWatch) matters(b []byte) bool {
	for len(b) >= unix.SizeofInotifyEvent {
		wd, mask := binary.NativeEndian.Uint32(b), binary.NativeEndian.Uint32(b[4:])
		end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:]))
		if end > len(b) {
			break
		}
		name, _, _ := bytes.Cut(b[unix.SizeofInotifyEvent:end], []byte{0})
		b = b[end:]
		names, known := w.names[wd]
		// IN_IGNORED is the last word of a watch: its directory is gone, or what
		// it lay on is not mounted any more.
		if mask&unix.IN_Q_OVERFLOW != 0 ||
			known && (names == nil || mask&(maskEnd|unix.IN_IGNORED) != 0 || slices.Contains(names, string(name))) {
			return true
		}
	}
	return false
}

// arm watches everything that the path depends on now, and nothing else. A
// directory is watched before it is looked into.
func (w *fileWatch) arm() error {
	for _, every := range []bool{false, true} {
		old := w.names
		w.names, w.masks = map[uint32][]string{}, map[string]uint32{}
		there, err := w.walk(every)
		if err != nil {
			return fmt.Errorf("watch %s: %w", w.path, err)
		}
		for wd := range old {
			if _, still := w.names[wd]; !still {
				_, _ = unix.InotifyRmWatch(int(w.f.Fd()), wd) // may have gone with its file
			}
		}
		if there {
			break
		}
	}
	return nil
}

// walk follows the path as the kernel does, watches what is on the way, every
// name or only those that must be, and says whether it leads to a file. A
// directory that may not be read is left out as long as the next one is there.
func (w *fileWatch) walk(every bool) (there bool, err error) {
	at, rest, links := "/", split(w.path), 0
	for len(rest) > 0 {
		name := rest[0]
		next := filepath.Join(at, name)
		rest = rest[1:]
		fi, err := os.Lstat(next)
		onTheWay := err == nil && fi.IsDir() && len(rest) > 0
		mask := uint32(maskName)
		if onTheWay && !every {
			mask, name = maskEnd, ""
		}
		if ok, err := w.add(at, mask, name); err != nil && !(onTheWay && errors.Is(err, unix.EACCES)) || err == nil && !ok {
			return false, err
		}
		if mask == maskName {
			fi, err = os.Lstat(next)
		}
		switch {
		case err != nil:
			return false, nil // it may come
		case fi.Mode()&os.ModeSymlink == 0:
			at = next
		default:
			to, err := os.Readlink(next)
			if links++; err != nil || links > maxLinks {
				return false, nil
			}
			if filepath.IsAbs(to) {
				at = "/"
			}
			rest = append(split(to), rest...)
		}
	}
	return w.add(at, maskFile, "")
}

// split takes a path apart. filepath.Join deals with "..", which is right as
// long as what is before it is no link: walk has followed those.
func split(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r == filepath.Separator })
}

// add watches a file, a directory for its end, or a name in a directory. It
// says whether there is still such a thing.
func (w *fileWatch) add(path string, mask uint32, name string) (ok bool, err error) {
	flags := uint32(0)
	if mask != maskFile { // a directory may be passed twice, and has one watch
		mask |= w.masks[path]
		w.masks[path] = mask
		flags = unix.IN_ONLYDIR | unix.IN_DONT_FOLLOW
	}
	n, err := unix.InotifyAddWatch(int(w.f.Fd()), path, mask|flags)
	if err == unix.ENOENT || err == unix.ENOTDIR {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("inotify %s: %w", path, err)
	}
	wd := uint32(n)
	switch {
	case mask == maskFile:
		w.names[wd] = nil
	case name != "":
		w.names[wd] = append(w.names[wd], name)
	case w.names[wd] == nil:
		w.names[wd] = []string{}
	}
	return true, nil
}
