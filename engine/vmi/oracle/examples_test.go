package oracle

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/vmi"
)

// files are those of a module that match a pattern.
func files(t *testing.T, module, pattern string) []string {
	t.Helper()
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", module).Output()
	require.NoError(t, err)
	names, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(dir)), pattern))
	require.NoError(t, err)
	require.NotEmpty(t, names)
	return names
}

// KubeVirt's own examples are sound to us as they are to it, hold the same values, and give nobody a warning.
func TestExamplesAgree(t *testing.T) {
	machines := 0
	for _, name := range files(t, "kubevirt.io/kubevirt", "examples/*.yaml") {
		data, err := os.ReadFile(name)
		require.NoError(t, err)
		docs, err := vmi.Load(name)
		require.NoError(t, err)
		assert.Empty(t, vmi.Validate(docs, vmi.Options{}), name)
		f, err := read(data)
		require.NoError(t, err)
		if len(f.machines) != len(docs.VMIs) {
			continue // replica sets and pools, whose templates we alone look into
		}
		machines += sameValues(t, data)
		for _, m := range f.machines {
			assert.Empty(t, lines(webhook(m, f.config())), name)
		}
	}
	assert.Greater(t, machines, 20)
}

// The API's test data fill every field that there is: each name is known.
func TestEveryNameIsKnown(t *testing.T) {
	for _, name := range files(t, "kubevirt.io/api", "apitesting/testdata/HEAD/*.yaml") {
		docs, err := vmi.Load(name)
		require.NoError(t, err)
		for _, f := range vmi.Validate(docs, vmi.Options{}) {
			assert.NotContains(t, f.Message, "unknown field", "%s: %s", name, f.Field)
		}
	}
}
