package main

import (
	"encoding/binary"
	"errors"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const someSmaps = `55d0c0a00000-55d0c0a21000 r-xp 00000000 fe:00 1234                       /usr/bin/a: b
Size:                132 kB
Rss:                 132 kB
Pss:                  66 kB
Pss_Dirty:             4 kB
Anonymous:             4 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0010000000 rw-s 00000000 00:01 77                         /memfd:vhosttest (deleted)
Rss:              200000 kB
Pss:              100000 kB
Anonymous:             8 kB
7fff00000000-7fff00021000 rw-p 00000000 00:00 0
Pss:                  20 kB
Anonymous:            20 kB
`

func TestParseSmaps(t *testing.T) {
	f, err := parseSmaps(strings.NewReader(someSmaps))
	require.NoError(t, err)
	assert.Equal(t, footprint{anon: 24 << 10, pss: 86 << 10}, f)
	for _, bad := range []string{"", "Pss: x kB\n", "7f0000000000-7f0010000000 rw-s 00000000 00:01 77 /memfd:vhosttest (deleted)\nPss: 1 kB\n"} {
		_, err := parseSmaps(strings.NewReader(bad))
		assert.Error(t, err, bad)
	}
	own, err := footprintOf(os.Getpid())
	require.NoError(t, err)
	assert.Greater(t, own.anon, uint64(1<<20))
	assert.Greater(t, own.pss, own.anon)
}

func TestProcessorSeconds(t *testing.T) {
	const least = 0.002
	before := processorSeconds(os.Getpid())
	for began := time.Now(); time.Since(began) < time.Second && processorSeconds(os.Getpid())-before < least; {
	}
	assert.GreaterOrEqual(t, processorSeconds(os.Getpid())-before, least)
	const none = 1<<22 - 1 // PIDs are less
	assert.True(t, math.IsNaN(processorSeconds(none)))
}

func TestSplitStream(t *testing.T) {
	var b []byte
	want := []string{"one", "three", strings.Repeat("x", maxStreamFrame)}
	for _, f := range want {
		b = binary.BigEndian.AppendUint32(b, uint32(len(f)))
		b = append(b, f...)
	}
	// In two reads, wherever they are cut.
	for _, cut := range []int{0, 1, 3, 4, 5, 7, 8, 16, 17, len(b) - 1, len(b)} {
		var got []string
		give := func(f []byte) error { got = append(got, string(f)); return nil }
		used, err := splitStream(b[:cut], give)
		require.NoError(t, err)
		rest, err := splitStream(b[used:], give)
		require.NoError(t, err)
		assert.Equal(t, len(b), used+rest)
		assert.Equal(t, want, got, "cut at %d", cut)
	}
	for _, n := range []uint32{0, maxStreamFrame + 1, 1 << 31} {
		_, err := splitStream(binary.BigEndian.AppendUint32(nil, n), func([]byte) error { return nil })
		assert.ErrorIs(t, err, errFraming)
	}
	_, err := splitStream(b, func([]byte) error { return errors.New("no room") })
	assert.ErrorContains(t, err, "no room")
}

// Issue 4's table of goals is what the cells have.
func TestUserGoals(t *testing.T) {
	p := &programs{}
	goals := map[string]string{}
	for _, x := range p.userTrials(false, 2) {
		assert.True(t, strings.HasPrefix(x.Title, "user networking, "), x.Title)
		for _, g := range x.goals {
			assert.True(t, slices.ContainsFunc(x.Metrics, func(m metric) bool { return m.Name == g.Metric }), "%s: %v", x.Title, g)
			assert.Contains(t, x.Subjects, g.Against)
			key := strings.TrimPrefix(x.Title, "user networking, ") + ": " + g.Metric + ": " + g.Against
			assert.NotContains(t, goals, key)
			goals[key] = g.String()
		}
		for _, m := range x.Metrics {
			for _, far := range []string{gvproxyPeer, libslirpPeer} {
				want := "≥ 3"
				if m.Less {
					want = "≤ 0.333"
				}
				assert.Equal(t, want, goals[strings.TrimPrefix(x.Title, "user networking, ")+": "+m.Name+": "+far])
			}
		}
	}
	for key, want := range map[string]string{
		"1 stream, MTU 1500: TCP up": "≥ 3", "1 stream, MTU 1500: TCP down": "≥ 3",
		"1 stream, MTU 65520: TCP up": "≥ 1.3", "1 stream, MTU 65520: TCP down": "≥ 1.3",
		"1 stream, MTU 1500: TCP up, CPU of the backend": "≤ 0.4", "1 stream, MTU 1500: TCP down, CPU of the backend": "≤ 0.4",
		"1 stream, MTU 65520: TCP up, CPU of the backend": "≤ 0.8", "1 stream, MTU 65520: TCP down, CPU of the backend": "≤ 0.8",
		"UDP 1472 B: UDP 1472 B up": "≥ 1.5", "UDP 1472 B: UDP 1472 B down": "≥ 1.5",
		"UDP 1472 B: UDP 1472 B up, CPU of the backend": "≤ 0.4", "UDP 1472 B: UDP 1472 B down, CPU of the backend": "≤ 0.4",
		"request/response: request/response": "≤ 0.7", "request/response: request/response, p99": "≤ 0.7",
		"request/response: request/response, CPU of the backend":           "≤ 0.6",
		"connect/request/close: connect/request/close":                     "≥ 1.5",
		"connect/request/close: connect/request/close, CPU of the backend": "≤ 0.6",
		"8 streams, 1 queue pair, MTU 1500: TCP up":                        "≥ 4", "8 streams, 1 queue pair, MTU 1500: TCP down": "≥ 4",
		"8 streams, 2 queue pairs, MTU 1500: TCP up": "≥ 4", "8 streams, 2 queue pairs, MTU 1500: TCP down": "≥ 4",
		"1 idle guest: " + idleAnon.Name: "≤ 1", "1 idle guest: " + idlePss.Name: "≤ 1",
		"1 idle guest: " + flowAnon.Name: "≤ 1", "1 idle guest: " + flowPss.Name: "≤ 1",
	} {
		assert.Equal(t, want, goals[key+": "+passtPeer], key)
	}
}

// What -only picks, and what the quick run keeps.
func TestUserTitles(t *testing.T) {
	p := &programs{}
	all := p.userTrials(false, 2)
	only := func(s string) []*trial { return pick(all, regexp.MustCompile(s)) }
	assert.Len(t, only("user networking"), len(all))
	assert.Len(t, only("MTU 65520"), 2)
	assert.Len(t, only("8 streams"), 2)
	quick := p.userTrials(true, 1)
	require.NotEmpty(t, quick)
	for _, q := range quick {
		assert.Len(t, only(regexp.QuoteMeta(q.Title)+"$"), 1, q.Title)
		assert.Equal(t, []string{ours, passtPeer}, q.Subjects)
	}
	p.against.sidewire = "/x"
	assert.Contains(t, p.userTrials(true, 1)[0].Subjects, other)
}

func TestFindPeer(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", filepath.Join(dir, "path"))
	program := func(name, word string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte("#!/bin/sh\necho "+word+"\nexit 1\n"), 0o755))
		return path
	}
	cached := filepath.Join(dir, "cache", "thepeer")
	find := func() (string, error) { return findPeer("thepeer", cached, says("--able")) }

	_, err := find()
	assert.ErrorContains(t, err, "no thepeer; .ci/deps peers brings it")
	old := program("path/thepeer", "--unable")
	_, err = find()
	assert.Error(t, err, "that one cannot do it")
	program("cache/thepeer", "--able")
	got, err := find()
	require.NoError(t, err)
	assert.Equal(t, cached, got)
	require.NoError(t, os.Remove(old))
	system := program("path/thepeer", "--able")
	got, err = find()
	require.NoError(t, err)
	assert.Equal(t, system, got)
}

// Whatever a message says about .ci/deps, it can do.
func TestDepsKnowPeers(t *testing.T) {
	deps := string(readFile(t, "../.ci/deps"))
	assert.Contains(t, deps, "/sidewire/peers")
	assert.Regexp(t, `(?m)^all \| peers\)$`, deps)
	t.Setenv("XDG_CACHE_HOME", "/cache")
	assert.Equal(t, "/cache/sidewire/peers/passt/passt", peerCache("passt", "passt"))
}
