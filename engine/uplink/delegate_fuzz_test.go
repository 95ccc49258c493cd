package uplink

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// addrMessage is an IPv4 address as the kernel has it.
func addrMessage(a [4]byte, bits uint8) []byte {
	m := nl.NewIfAddrmsg(unix.AF_INET)
	m.Prefixlen = bits
	return append(m.Serialize(), nl.NewRtAttr(unix.IFA_LOCAL, a[:]).Serialize()...)
}

// What a state file says is refused, or can be used without a panic: the file may
// be cut off, or somebody else's.
func FuzzSaved(f *testing.F) {
	head := make([]byte, sizeofRoute)
	good := Saved{
		Version: savedVersion, Boot: "b", NetNS: "n", Link: "eth0", Index: 2, Addrs: []netip.Prefix{netip.MustParsePrefix("10.0.0.2/24")},
		Kernel: kernelState{Addrs: [][]byte{addrMessage([4]byte{10, 0, 0, 2}, 24)}, Routes: [][]byte{append(head, 8, 0, unix.RTA_OIF, 0, 2, 0, 0, 0)}},
		Routes: []LinkRoute{{Dest: netip.MustParsePrefix("0.0.0.0/0"), Via: netip.MustParseAddr("10.0.0.1")}},
	}
	seed := func(s Saved) {
		b, err := json.Marshal(s)
		require.NoError(f, err)
		f.Add(b)
		f.Add(b[:len(b)/2])
	}
	seed(good)
	odd := good
	odd.Kernel.Routes = [][]byte{append(append([]byte{}, head...), 5, 0, unix.RTA_OIF, 0, 9)} // ends without padding
	seed(odd)
	six := good
	six.Neighbours = []Neighbour{{Addr: netip.MustParseAddr("fd00::1")}, {}}
	seed(six)
	six.Neighbours, six.Routes = nil, []LinkRoute{{Dest: netip.MustParsePrefix("::/0")}, {}}
	seed(six)
	f.Add([]byte("null"))
	f.Fuzz(func(t *testing.T, data []byte) {
		at := stateFile{boot: "b", netns: "n"}
		at.at(t.TempDir(), 2)
		require.NoError(t, os.WriteFile(at.path, data, 0o600))
		s, err := at.read()
		if s == nil || err != nil {
			return
		}
		for _, n := range s.Neighbours {
			n.Addr.As4()
		}
		for _, r := range s.Routes {
			r.Dest.Addr().As4()
		}
		for i, m := range s.Kernel.Addrs {
			p, ok := prefixOf(m)
			assert.True(t, ok && p == s.Addrs[i])
		}
		for _, m := range append(s.Kernel.Routes, s.Kernel.Routes6...) {
			containsRoute(s.Kernel.Routes, m)
		}
		s.Address()
		note, err := s.note()
		require.NoError(t, err)
		assert.NotNil(t, readNote(note))
	})
}

// A state file is not read through a link, nor waited for.
func TestStateFileIsAFile(t *testing.T) {
	f := stateFile{boot: "b", netns: "n"}
	f.at(t.TempDir(), 2)
	elsewhere := filepath.Join(t.TempDir(), "x")
	require.NoError(t, os.WriteFile(elsewhere, []byte("{}"), 0o600))
	require.NoError(t, os.Symlink(elsewhere, f.path))
	_, err := f.read()
	assert.ErrorIs(t, err, ErrState)
	require.NoError(t, os.Remove(f.path))
	require.NoError(t, unix.Mkfifo(f.path, 0o600))
	_, err = f.read()
	assert.ErrorContains(t, err, "cannot be read")
	assert.False(t, strings.Contains(err.Error(), "\n"))
}
