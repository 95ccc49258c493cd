package oracle

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/vmi"
)

var (
	update  = flag.Bool("update", false, "write the webhook's answers into testdata/webhook")
	count   = flag.Int("specs", 3000, "how many specs to generate")
	seed    = flag.Uint64("seed", 1, "of the generator")
	golden  = filepath.Join("..", "testdata", "webhook")
	service = filepath.Join("..", "testdata", "guide")
)

// ours is what engine/vmi says is wrong with a file, as the golden files have it.
func ours(t *testing.T, data []byte) []string {
	t.Helper()
	docs, err := vmi.Parse("v.yaml", data)
	require.NoError(t, err, string(data))
	out := []string{}
	for _, f := range vmi.Errors(vmi.Validate(docs, vmi.Options{})) {
		out = append(out, fmt.Sprintf("%s %s: %s", f.Reason, f.Field, f.Message))
	}
	return out
}

// slirp and macvtap are served by us and refused by KubeVirt: V15, V16, and V11 for interfaces that have one of them.
var (
	refused = regexp.MustCompile(`(Slirp interface support|Macvtap network binding) has been discontinued`)
	older   = regexp.MustCompile(`: (Slirp interface (only|is not)|Macvtap (feature gate|interface only))`)
	binding = regexp.MustCompile(`^FieldValueInvalid \S+interfaces\[(\d+)\]: logical .* must have exactly one binding`)
)

// lessServed drops the lines in which the two may differ over slirp and macvtap.
func lessServed(lines []string, m machine) []string {
	var served []string
	for i, f := range m.vmi.Spec.Domain.Devices.Interfaces {
		if f.DeprecatedSlirp != nil || f.DeprecatedMacvtap != nil {
			served = append(served, fmt.Sprint(i))
		}
	}
	return slices.DeleteFunc(slices.Clone(lines), func(l string) bool {
		b := binding.FindStringSubmatch(l)
		return refused.MatchString(l) || older.MatchString(l) || b != nil && slices.Contains(served, b[1])
	})
}

// own are our faults with what KubeVirt lets pass.
var own = regexp.MustCompile(`: (SR-IOV interface cannot be connected to the pod network|MAC address |PCI address |` +
	`-?\d+ is out of range, ACPI|index -?\d+ is that of|\d+ bytes, a DHCP option|The requested MAC address is reserved|` +
	`port \d+/\S* is listed twice|port -\d+/\S* is listed twice)`)

// notAttached is V50.
var notAttached = regexp.MustCompile(`(bridge interface is not enabled|slirp interface is deprecated)`)

// compare says how the two differ about a file with one machine; our own faults may only follow.
func compare(theirs, ours []string) string {
	for i, want := range theirs {
		if i >= len(ours) || ours[i] != want {
			return fmt.Sprintf("cause %d:\nwebhook:\n  %s\nsidewire:\n  %s", i, strings.Join(theirs, "\n  "), strings.Join(ours, "\n  "))
		}
	}
	if len(theirs) > 0 && notAttached.MatchString(theirs[0]) {
		return "" // KubeVirt looks no further
	}
	for _, f := range ours[len(theirs):] {
		if !own.MatchString(f) {
			return fmt.Sprintf("more than the webhook says: %s\nwebhook:\n  %s", f, strings.Join(theirs, "\n  "))
		}
	}
	return ""
}

func TestGeneratedSpecsAgree(t *testing.T) {
	sound, unread, differ, causes := 0, 0, 0, map[string]int{}
	for i := range *count {
		g := &generator{rand.New(rand.NewPCG(*seed, uint64(i))), []int{0, 5, 20, 50}[i%4]}
		doc := g.document()
		f, err := read([]byte(doc))
		if err != nil {
			if unread++; len(ours(t, []byte(doc))) == 0 {
				t.Errorf("KubeVirt does not read this, we do: %v\n%s", err, doc)
			}
			continue
		}
		m := f.machines[0]
		theirs := lines(webhook(m, f.config()))
		if len(theirs) == 0 {
			sound++
		}
		for _, l := range theirs {
			_, text, _ := strings.Cut(l, ": ")
			causes[regexp.MustCompile(`\d+|'[^']*'|"[^"]*"`).ReplaceAllString(text, "_")]++
		}
		if d := compare(lessServed(theirs, m), lessServed(ours(t, []byte(doc)), m)); d != "" {
			if differ++; differ <= 5 {
				t.Errorf("spec %d: %s\n%s", i, d, doc)
			}
		}
	}
	t.Logf("%d specs, %d of them sound, %d that KubeVirt does not read, %d kinds of cause, %d that differ", *count, sound, unread, len(causes), differ)
	if testing.Verbose() {
		for text, n := range causes {
			t.Logf("%6d %s", n, text)
		}
	}
}

func TestGoldenFilesAreTheWebhooks(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(golden, "*.yaml"))
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, name := range files {
		t.Run(filepath.Base(name), func(t *testing.T) {
			data, err := os.ReadFile(name)
			require.NoError(t, err)
			f, err := read(data)
			require.NoError(t, err)
			var out bytes.Buffer
			for _, m := range f.machines {
				for _, l := range lines(webhook(m, f.config())) {
					fmt.Fprintln(&out, l)
				}
			}
			want := strings.TrimSuffix(name, ".yaml") + ".want"
			if *update {
				require.NoError(t, os.WriteFile(want, out.Bytes(), 0o644))
			}
			stored, err := os.ReadFile(want)
			require.NoError(t, err)
			assert.Equal(t, out.String(), string(stored))
		})
	}
}

// The guide's examples pass the webhook but for the bindings that it no longer has.
func TestGuideAgrees(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(service, "*.yaml"))
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, name := range files {
		t.Run(filepath.Base(name), func(t *testing.T) {
			data, err := os.ReadFile(name)
			require.NoError(t, err)
			f, err := read(data)
			require.NoError(t, err)
			for _, m := range f.machines {
				assert.Empty(t, compare(lessServed(lines(webhook(m, f.config())), m), lessServed(ours(t, data), m)))
			}
		})
	}
}
