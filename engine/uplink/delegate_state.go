package uplink

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"sidewire/engine/frame"
)

// Saved is what a link was before a guest took its place.
type Saved struct {
	Version int    `json:"version"`
	Boot    string `json:"boot"`  // the kernel's boot_id
	NetNS   string `json:"netns"` // identity of the namespace within that boot
	Owner   string `json:"owner"` // the guest's interface
	Link    string `json:"link"`
	Index   int    `json:"index"`

	MAC     frame.MAC `json:"mac"`
	StandIn frame.MAC `json:"standIn"` // what the link has instead; zero: it keeps its own
	MTU     int       `json:"mtu"`

	Addrs      []netip.Prefix `json:"addresses"`
	Addrs6     []netip.Prefix `json:"addresses6"`
	Routes     []LinkRoute    `json:"routes"`     // IPv4, of the main table, in the kernel's order
	Neighbours []Neighbour    `json:"neighbours"` // IPv4, that somebody has set

	ARP         bool   `json:"arp"`
	DisableIPv6 string `json:"disableIPv6"` // the sysctl; empty: the kernel has no IPv6
	AddrGenMode string `json:"addrGenMode"`

	Kernel kernelState `json:"kernel"`
}

// LinkRoute is a route by a link. Via is not valid if the destination is on the
// link.
type LinkRoute struct {
	Dest netip.Prefix `json:"dest"`
	Via  netip.Addr   `json:"via,omitzero"`
}

// Neighbour is the hardware address of a host on the link.
type Neighbour struct {
	Addr netip.Addr `json:"addr"`
	MAC  frame.MAC  `json:"mac"`
}

// kernelState is the same in the kernel's own messages, which can be given back
// to it.
type kernelState struct {
	Addrs      [][]byte `json:"addresses"`
	Addrs6     [][]byte `json:"addresses6"`
	Routes     [][]byte `json:"routes"`
	Routes6    [][]byte `json:"routes6"`
	Neighbours [][]byte `json:"neighbours"`
}

const (
	savedVersion = 1
	// maxState bounds what is read; a link has a handful of addresses and routes.
	maxState = 16 << 20
)

// stateFile is where a link of a namespace is written down.
type stateFile struct {
	path        string
	boot, netns string
	index       int
}

// stateOf is the file of a link of the current namespace. A namespace that takes
// another's place has another file.
func stateOf(dir string, l netlink.Link) (f stateFile, err error) {
	if f.boot, f.netns, err = namespaceID(); err != nil {
		return f, err
	}
	f.at(dir, l.Attrs().Index)
	return f, nil
}

func (f *stateFile) at(dir string, index int) {
	f.index, f.path = index, filepath.Join(dir, fmt.Sprintf("%s-%d.json", f.netns, index))
}

// namespaceID names the current namespace. Inode numbers are used again soon;
// the cookie (Linux 5.14) is not before the next boot.
func namespaceID() (boot, id string, err error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", "", fmt.Errorf("boot id: %w", err)
	}
	boot = strings.TrimSpace(string(b))
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", "", fmt.Errorf("namespace: %w", err)
	}
	defer unix.Close(fd)
	if cookie, err := unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE); err == nil {
		return boot, fmt.Sprintf("netns%d", cookie), nil
	}
	var st unix.Stat_t
	if err := unix.Stat(threadNS, &st); err != nil {
		return "", "", fmt.Errorf("namespace: %w", err)
	}
	return boot, fmt.Sprintf("ino%d", st.Ino), nil
}

// savedHere lists the links of the current namespace that are written down, in
// files or in the rules alone.
func savedHere(dir string) (out []stateFile, err error) {
	var f stateFile
	if f.boot, f.netns, err = namespaceID(); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	for _, e := range entries {
		rest, ours := strings.CutPrefix(e.Name(), f.netns+"-")
		rest, file := strings.CutSuffix(rest, ".json")
		if index, err := strconv.Atoi(rest); ours && file && err == nil {
			f.at(dir, index)
			out = append(out, f)
		}
	}
	for _, s := range noted() {
		f.at(dir, s.Index)
		if !slices.Contains(out, f) {
			out = append(out, f)
		}
	}
	return out, nil
}

// load reads what was written down: the file, or where that is lost the note in
// the rules. It returns nil if there is neither.
func (f stateFile) load() (*Saved, error) {
	s, err := f.read()
	if s != nil || err != nil {
		return s, err
	}
	for _, s := range noted() {
		if s.Index == f.index && s.Boot == f.boot && s.NetNS == f.netns {
			return s, nil
		}
	}
	return nil, nil
}

// read is load for the file. One of another boot is removed: its namespaces are
// gone.
func (f stateFile) read() (*Saved, error) {
	file, err := os.OpenFile(f.path, unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, maxState))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrState, err)
	}
	s := &Saved{}
	if err := json.Unmarshal(b, s); err != nil {
		return nil, fmt.Errorf("state file %s cannot be read (%w): remove it, and the note in the rules is used; without one put the link back by hand", f.path, err)
	}
	switch {
	case !s.whole():
		return nil, fmt.Errorf("state file %s is damaged: remove it, and the note in the rules is used; without one put the link back by hand", f.path)
	case s.Boot != f.boot || s.NetNS != f.netns:
		return nil, f.remove()
	case s.Version != savedVersion:
		return nil, fmt.Errorf("state file %s is of version %d, not %d: put the link back with the sidewire that wrote it", f.path, s.Version, savedVersion)
	}
	return s, nil
}

// whole says whether what was read is what takeSnapshot makes: messages as the
// kernel has them, which end with padding, and IPv4 where it must be.
func (s *Saved) whole() bool {
	k := &s.Kernel
	for _, list := range []struct {
		ms   [][]byte
		head int
	}{
		{k.Addrs, sizeofAddr}, {k.Addrs6, sizeofAddr}, {k.Routes, sizeofRoute}, {k.Routes6, sizeofRoute}, {k.Neighbours, sizeofNeigh},
	} {
		if slices.ContainsFunc(list.ms, func(m []byte) bool { return len(m) < list.head || len(m)%unix.NLMSG_ALIGNTO != 0 }) {
			return false
		}
	}
	return slices.Equal(prefixes(k.Addrs), s.Addrs) && slices.Equal(prefixes(k.Addrs6), s.Addrs6) &&
		len(k.Addrs) == len(s.Addrs) && len(k.Addrs6) == len(s.Addrs6) &&
		!slices.ContainsFunc(s.Neighbours, func(n Neighbour) bool { return !n.Addr.Is4() }) &&
		!slices.ContainsFunc(s.Routes, func(r LinkRoute) bool {
			return !r.Dest.IsValid() || !r.Dest.Addr().Is4() || r.Via.IsValid() && !r.Via.Is4()
		})
}

// store writes it down so that it is there after a crash of the machine too.
func (f stateFile) store(s *Saved) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w: %w", ErrState, err)
		}
	}()
	s.Version, s.Boot, s.NetNS = savedVersion, f.boot, f.netns
	b, err := json.MarshalIndent(s, "", " ")
	if err != nil {
		return err
	}
	dir := filepath.Dir(f.path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // gone if it has got its name
	_, err = tmp.Write(append(b, '\n'))
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), f.path); err != nil {
		return err
	}
	return syncDir(dir)
}

func (f stateFile) remove() error {
	if err := os.Remove(f.path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	if err := syncDir(filepath.Dir(f.path)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %w", ErrState, err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// standIn makes a hardware address for a link whose own is the guest's now:
// locally administered, and always the same for the same link.
func standIn(own frame.MAC) (m frame.MAC) {
	sum := sha256.Sum256(append([]byte("sidewire stand-in "), own[:]...))
	copy(m[:], sum[:])
	m[0] = m[0]&^1 | 2
	return m
}
