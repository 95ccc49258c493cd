package handoff

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// node is the character device of a macvtap.
type node struct {
	name string // as in /dev, such as tap4
	dev  uint64
}

// findNode finds a link's character device. Its number is in sysfs alone, and
// each namespace has a sysfs of its own: /sys shows the namespace that it was
// mounted in, which need not be the one of this thread. Nor does the N of /dev/tapN
// have to be the link's index, once the link has moved.
func findNode(l netlink.Link) (node, error) {
	a := l.Attrs()
	sys, err := sysfs()
	if err != nil {
		return node{}, err
	}
	defer unix.Close(sys)
	dir := "class/net/" + a.Name
	index, err := readAt(sys, dir+"/ifindex")
	if err != nil || index != strconv.Itoa(a.Index) {
		return node{}, fmt.Errorf("macvtap %s: /sys shows another network namespace; mount one for this namespace, or give CAP_SYS_ADMIN", a.Name)
	}
	fd, err := unix.Openat(sys, dir+"/macvtap", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return node{}, fmt.Errorf("macvtap %s has no character device in sysfs: %w", a.Name, err)
	}
	d := os.NewFile(uintptr(fd), dir)
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil || len(names) != 1 {
		return node{}, fmt.Errorf("macvtap %s: character devices %q in sysfs: %w", a.Name, names, err)
	}
	text, err := readAt(sys, dir+"/macvtap/"+names[0]+"/dev")
	if err != nil {
		return node{}, fmt.Errorf("macvtap %s: %w", a.Name, err)
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(text, "%d:%d", &major, &minor); err != nil {
		return node{}, fmt.Errorf("macvtap %s: device number %q: %w", a.Name, text, err)
	}
	return node{names[0], unix.Mkdev(major, minor)}, nil
}

// sysfs opens the root of a sysfs of this thread's namespace: one of our own
// that is mounted nowhere, or /sys where we may not have one.
func sysfs() (fd int, err error) {
	if fd, err = detached("sysfs"); err == nil {
		return fd, nil
	}
	if fd, err = unix.Open("/sys", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return -1, fmt.Errorf("/sys: %w", err)
	}
	return fd, nil
}

// detached makes a file system that nobody else sees and that ends with its
// descriptor (Linux 5.2). It needs CAP_SYS_ADMIN.
func detached(kind string) (int, error) {
	fs, err := unix.Fsopen(kind, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, err
	}
	return unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
}

func readAt(dir int, path string) (string, error) {
	fd, err := unix.Openat(dir, path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 4096))
	return strings.TrimSpace(string(b)), err
}

// number is how mknod and the device cgroup have it.
func (n node) number() string { return fmt.Sprintf("%d:%d", unix.Major(n.dev), unix.Minor(n.dev)) }

// inDev says whether /dev has a node of it, and not of another namespace's
// macvtap of the same name.
func (n node) inDev() bool {
	var st unix.Stat_t
	return unix.Stat("/dev/"+n.name, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == n.dev
}

// open opens the device once. Where /dev has no node of it, or one that is of
// another namespace's macvtap, a private one is made.
func (n node) open() (*os.File, error) {
	if !n.inDev() {
		return n.openPrivate()
	}
	path := "/dev/" + n.name
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, n.refused(path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

func (n node) openPrivate() (*os.File, error) {
	dir, err := detached("tmpfs")
	if err != nil {
		return n.openIn("/dev")
	}
	defer unix.Close(dir)
	if err := unix.Mknodat(dir, n.name, unix.S_IFCHR|0o600, int(n.dev)); err != nil {
		return nil, n.refused("make a node of it", err)
	}
	fd, err := unix.Openat(dir, n.name, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, n.refused("open it", err)
	}
	return os.NewFile(uintptr(fd), n.name), nil
}

// openIn makes a node in a directory of ours below dir for as long as it takes
// to open it.
func (n node) openIn(dir string) (*os.File, error) {
	tmp, err := os.MkdirTemp(dir, ".sidewire-")
	if err != nil {
		return nil, n.refused("make a node of it", err)
	}
	defer os.RemoveAll(tmp)
	path := filepath.Join(tmp, n.name)
	if err := unix.Mknod(path, unix.S_IFCHR|0o600, int(n.dev)); err != nil {
		return nil, n.refused("make a node of it", err)
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, n.refused("open it", err)
	}
	return os.NewFile(uintptr(fd), n.name), nil
}

// refused says what would allow it.
func (n node) refused(what string, err error) error {
	number := n.number()
	switch {
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("/dev/%s (%s): all its queues are in use: %w", n.name, number, err)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("/dev/%s (%s): %s: %w: allow it with: chown %d /dev/%s, in a container with the device cgroup's rule c %s rwm, or give CAP_MKNOD (%w)",
			n.name, number, what, ErrPrivilege, os.Geteuid(), n.name, number, err)
	}
	return fmt.Errorf("/dev/%s (%s): %s: %w", n.name, number, what, err)
}

// Open implements [Device]: a descriptor for each queue, and one of the vhost
// device for each where there is one.
func (m *Macvtap) Open() (files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
			files = nil
		}
	}()
	flags := uint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if m.c.Queues > 1 {
		flags |= unix.IFF_MULTI_QUEUE
	}
	for range m.c.Queues {
		f, err := m.node.open()
		if err != nil {
			return files, err
		}
		files = append(files, f)
		if err := setQueue(int(f.Fd()), flags); err != nil {
			return files, fmt.Errorf("/dev/%s: %w", m.node.name, err)
		}
	}
	for range m.c.Queues {
		if !m.vhost {
			break
		}
		f, err := os.OpenFile(m.c.VhostNet, os.O_RDWR, 0)
		if err != nil {
			return files, err
		}
		files = append(files, f)
	}
	return files, nil
}

// vnetHeader is the length of the header before each frame, which QEMU changes
// when the guest's driver negotiates.
const vnetHeader = 10

// setQueue makes a queue what QEMU takes one for: it asks for the header, and
// turns on the offloads that the guest's driver takes. None are on before that,
// or a guest would get segments that it cannot take.
func setQueue(fd int, flags uint16) error {
	ifr, err := unix.NewIfreq("")
	if err != nil {
		return err
	}
	ifr.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return fmt.Errorf("set its flags: %w", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, vnetHeader); err != nil {
		return fmt.Errorf("set its header's length: %w", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, 0); err != nil {
		return fmt.Errorf("set its offloads: %w", err)
	}
	return nil
}

// Netdev implements [Device].
func (m *Macvtap) Netdev(fds []string, id string) string {
	s := "tap,id=" + id + ",fds=" + strings.Join(fds[:m.c.Queues], ":")
	if len(fds) > m.c.Queues {
		return s + ",vhost=on,vhostfds=" + strings.Join(fds[m.c.Queues:], ":")
	}
	return s + ",vhost=off"
}

// Properties implements [Device].
func (m *Macvtap) Properties() []string { return nil }

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
