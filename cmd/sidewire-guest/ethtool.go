package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// errNotSupported says that the driver lacks an ethtool operation.
var errNotSupported = unix.EOPNOTSUPP

// Constants of linux/ethtool.h.
const (
	ethSSStats = 1 // ETH_SS_STATS
	gStringLen = 32
)

// offloadCmds are the get and set commands of the offloads that have one each.
var offloadCmds = map[string][2]uint32{
	"rx":  {unix.ETHTOOL_GRXCSUM, unix.ETHTOOL_SRXCSUM},
	"tx":  {unix.ETHTOOL_GTXCSUM, unix.ETHTOOL_STXCSUM},
	"sg":  {unix.ETHTOOL_GSG, unix.ETHTOOL_SSG},
	"tso": {unix.ETHTOOL_GTSO, unix.ETHTOOL_STSO},
	"gso": {unix.ETHTOOL_GGSO, unix.ETHTOOL_SGSO},
	"gro": {unix.ETHTOOL_GGRO, unix.ETHTOOL_SGRO},
}

// ethtool runs the command that b begins with; the kernel answers in b.
func ethtool(name string, b []byte) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// struct ifreq: the name, then a pointer to the command.
	var req struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}
	copy(req.name[:unix.IFNAMSIZ-1], name)
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(&b[0])
	// SAFETY: b is pinned, and large enough for what its command answers.
	req.data = unsafe.Pointer(&b[0])
	// SAFETY: req outlives the call.
	_, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req)))
	if e != 0 {
		return fmt.Errorf("ethtool %#x on %s: %w", binary.NativeEndian.Uint32(b), name, e)
	}
	return nil
}

// words returns a command of 32-bit words.
func words(w ...uint32) []byte {
	var b []byte
	for _, v := range w {
		b = binary.NativeEndian.AppendUint32(b, v)
	}
	return b
}

func word(b []byte, i int) uint32 { return binary.NativeEndian.Uint32(b[4*i:]) }

// ethChannels returns the number of queue pairs in use, and their maximum
// (struct ethtool_channels).
func ethChannels(name string) (now, most int, err error) {
	b := words(unix.ETHTOOL_GCHANNELS, 0, 0, 0, 0, 0, 0, 0, 0)
	err = ethtool(name, b)
	return int(word(b, 8)), int(word(b, 4)), err
}

func ethSetChannels(name string, n int) error {
	b := words(unix.ETHTOOL_GCHANNELS, 0, 0, 0, 0, 0, 0, 0, 0)
	if err := ethtool(name, b); err != nil {
		return err
	}
	binary.NativeEndian.PutUint32(b, unix.ETHTOOL_SCHANNELS)
	binary.NativeEndian.PutUint32(b[32:], uint32(n))
	return ethtool(name, b)
}

func ethOffloads(name string) (map[string]bool, error) {
	out := map[string]bool{}
	for n, cmd := range offloadCmds {
		b := words(cmd[0], 0)
		if err := ethtool(name, b); err != nil {
			return out, err
		}
		out[n] = word(b, 1) != 0
	}
	return out, nil
}

func ethSetOffload(name, what string, on bool) error {
	cmd, ok := offloadCmds[what]
	if !ok {
		return errors.New("no such offload: " + what)
	}
	var v uint32
	if on {
		v = 1
	}
	return ethtool(name, words(cmd[1], v))
}

// ethStats returns the driver's own counters.
func ethStats(name string) (map[string]uint64, error) {
	// struct ethtool_sset_info with one bit asked for has one answer.
	info := words(unix.ETHTOOL_GSSET_INFO, 0, 1<<ethSSStats, 0, 0)
	if err := ethtool(name, info); err != nil {
		return nil, err
	}
	n := int(word(info, 4))
	if n > 4096 {
		return nil, errors.New("implausible number of counters")
	}
	strs := append(words(unix.ETHTOOL_GSTRINGS, ethSSStats, uint32(n)), make([]byte, n*gStringLen)...)
	if err := ethtool(name, strs); err != nil {
		return nil, err
	}
	stats := append(words(unix.ETHTOOL_GSTATS, uint32(n)), make([]byte, n*8)...)
	if err := ethtool(name, stats); err != nil {
		return nil, err
	}
	out := map[string]uint64{}
	for i := range n {
		s := strs[12+i*gStringLen:][:gStringLen]
		s, _, _ = bytes.Cut(s, []byte{0})
		out[string(s)] = binary.NativeEndian.Uint64(stats[8+8*i:])
	}
	return out, nil
}
