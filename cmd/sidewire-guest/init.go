package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sidewire/engine/enginetest"
)

// setup makes of an initramfs a system: file systems, drivers, loopback.
func setup() error {
	for _, m := range []struct{ source, target, fs string }{
		{"proc", "/proc", "proc"}, {"sys", "/sys", "sysfs"}, {"dev", "/dev", "devtmpfs"}, {"tmp", "/tmp", "tmpfs"},
	} {
		if err := unix.Mount(m.source, m.target, m.fs, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	_ = unix.Sethostname([]byte("guest"))
	files, _ := filepath.Glob("/modules/*.ko") // in the order of their numbers
	for _, f := range files {
		if err := load(f); err != nil {
			return err
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	return err
}

func load(module string) error {
	f, err := os.Open(module)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load %s: %w", module, err)
	}
	return nil
}

// openSerial opens a serial port as a plain pipe of bytes.
func openSerial(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cflag = unix.CS8 | unix.CREAD | unix.CLOCAL | unix.B115200
	t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, t); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// power ends the guest.
func power(reboot bool) {
	unix.Sync()
	how := unix.LINUX_REBOOT_CMD_POWER_OFF
	if reboot {
		how = unix.LINUX_REBOOT_CMD_RESTART
	}
	_ = unix.Reboot(how)
}

// later gives the reply time to leave.
func later(f func()) { time.AfterFunc(200*time.Millisecond, f) }

func (a *agent) reboot(*enginetest.GuestCmd, *enginetest.GuestReply) error {
	later(func() { power(true) })
	return nil
}

func (a *agent) poweroff(*enginetest.GuestCmd, *enginetest.GuestReply) error {
	later(func() { power(false) })
	return nil
}

func (a *agent) file(c *enginetest.GuestCmd, r *enginetest.GuestReply) error {
	b, err := os.ReadFile(c.Path)
	r.Data = string(b)
	return err
}

func (a *agent) write(c *enginetest.GuestCmd, _ *enginetest.GuestReply) error {
	return os.WriteFile(c.Path, []byte(c.Data), 0o644)
}

func (a *agent) dmesg(_ *enginetest.GuestCmd, r *enginetest.GuestReply) error {
	b := make([]byte, 16<<10)
	n, err := unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, b)
	if err != nil {
		return err
	}
	r.Data = string(b[:n])
	return nil
}
