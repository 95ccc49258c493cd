package uplink

import (
	"errors"
	"fmt"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// threadNS is the network namespace of the calling thread.
const threadNS = "/proc/thread-self/ns/net"

// InNetNS runs f on this goroutine with the network namespace at path, such as
// /run/netns/pod or /proc/1234/ns/net. An empty path is the current one. What
// f opens (sockets, taps, files below /proc/sys/net) belongs to that
// namespace for good; goroutines that f starts do not run in it.
func InNetNS(path string, f func() error) error {
	if path == "" {
		return f()
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT) && !strings.Contains(path, "/"):
		return fmt.Errorf("network namespace %s: %w: want a path, such as /run/netns/%s", path, err, path)
	case err != nil:
		return fmt.Errorf("network namespace %s: %w", path, err)
	}
	defer unix.Close(fd)
	if !isNamespace(fd) {
		return fmt.Errorf("network namespace %s: the file is no namespace: want one such as /run/netns/pod or /proc/1234/ns/net", path)
	}
	return inNS(fd, f)
}

// inNS is InNetNS for an open descriptor.
func inNS(fd int, f func() error) error {
	runtime.LockOSThread()
	old, err := unix.Open(threadNS, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("current network namespace: %w", err)
	}
	defer unix.Close(old)
	// Entering a namespace needs CAP_SYS_ADMIN, even one that the thread is in.
	if sameFile(fd, old) {
		defer runtime.UnlockOSThread()
		return f()
	}
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("enter network namespace: %w", privilege(err, "CAP_SYS_ADMIN"))
	}
	defer func() {
		// A thread that cannot go back must not serve others: left locked, it
		// ends with its goroutine.
		if unix.Setns(old, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
	}()
	return f()
}

// isNamespace says whether a descriptor is of a namespace, of whatever kind, as
// far as the kernel tells.
func isNamespace(fd int) bool {
	var st unix.Statfs_t
	err := unix.Fstatfs(fd, &st)
	return err != nil || st.Type == unix.NSFS_MAGIC
}

// sameFile says whether two descriptors are of the same namespace.
func sameFile(a, b int) bool {
	var x, y unix.Stat_t
	return unix.Fstat(a, &x) == nil && unix.Fstat(b, &y) == nil && x.Dev == y.Dev && x.Ino == y.Ino
}

// openNS returns a descriptor of the current namespace.
func openNS() (int, error) {
	fd, err := unix.Open(threadNS, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("current network namespace: %w", err)
	}
	return fd, nil
}
