package main

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Whatever package a message names, .ci/deps can bring.
func TestDepsBringWhatMessagesName(t *testing.T) {
	deps, err := os.ReadFile("../.ci/deps")
	require.NoError(t, err)
	found := 0
	for _, dir := range []string{".", "../engine/enginetest", "../cmd/sidewire"} {
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		require.NoError(t, err)
		for _, f := range files {
			src, err := os.ReadFile(f)
			require.NoError(t, err)
			for _, m := range regexp.MustCompile(`\(package ([a-z][a-z0-9-]+)\)`).FindAllSubmatch(src, -1) {
				found++
				assert.Regexp(t, `(?m)^\s*need \S+ `+string(m[1])+`$`, string(deps), "%s names it", f)
			}
		}
	}
	assert.GreaterOrEqual(t, found, 3)
}
