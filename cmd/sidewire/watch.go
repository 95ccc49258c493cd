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
type fileWatch struct {
	path  string
	f     *os.File            // inotify
	names map[uint32][]string // by watch: what matters in the directory; nil is the file
}

const (
	maskFile = unix.IN_CLOSE_WRITE // once it is whole
	maskDir  = unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_ONLYDIR
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
			known && (names == nil || mask&unix.IN_IGNORED != 0 || slices.Contains(names, string(name))) {
			return true
		}
	}
	return false
}

// arm watches everything that the path depends on now, and nothing else. A
// directory is watched before it is looked into.
func (w *fileWatch) arm() error {
	old := w.names
	w.names = map[uint32][]string{}
	if err := w.walk(); err != nil {
		return fmt.Errorf("watch %s: %w", w.path, err)
	}
	for wd := range old {
		if _, still := w.names[wd]; !still {
			_, _ = unix.InotifyRmWatch(int(w.f.Fd()), wd) // may have gone with its file
		}
	}
	return nil
}

// walk follows the path as the kernel does, and watches each name on it in its
// directory. A directory that may be passed but not read is left out as long as
// the next one is there: of that one, removal is noticed then, a new name not.
func (w *fileWatch) walk() error {
	at, rest, links := "/", split(w.path), 0
	for len(rest) > 0 {
		name := rest[0]
		next := filepath.Join(at, name)
		watchErr := w.add(at, maskDir, name)
		fi, err := os.Lstat(next)
		rest = rest[1:]
		onTheWay := err == nil && fi.IsDir() && len(rest) > 0
		if watchErr != nil && !(onTheWay && errors.Is(watchErr, unix.EACCES)) {
			return watchErr
		}
		switch {
		case err != nil:
			return nil // it may come
		case fi.Mode()&os.ModeSymlink == 0:
			at = next
		default:
			to, err := os.Readlink(next)
			if links++; err != nil || links > maxLinks {
				return nil
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

// add watches a file, or a name in a directory. One that is gone by now is
// watched by its directory's.
func (w *fileWatch) add(path string, mask uint32, name string) error {
	wd, err := unix.InotifyAddWatch(int(w.f.Fd()), path, mask)
	if err == unix.ENOENT || err == unix.ENOTDIR {
		return nil
	}
	if err != nil {
		return fmt.Errorf("inotify %s: %w", path, err)
	}
	if name == "" {
		w.names[uint32(wd)] = nil
	} else {
		w.names[uint32(wd)] = append(w.names[uint32(wd)], name)
	}
	return nil
}
