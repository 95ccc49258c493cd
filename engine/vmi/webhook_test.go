package vmi

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// The files below testdata/webhook are specs and what KubeVirt's webhook answers to them, recorded by the module oracle
// (make oracle), which also asks about specs that it makes up. A line is a cause: its reason, its field, its message.
func TestWebhook(t *testing.T) {
	files, err := filepath.Glob("testdata/webhook/*.yaml")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, name := range files {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".yaml"), func(t *testing.T) {
			want, err := os.ReadFile(strings.TrimSuffix(name, ".yaml") + ".want")
			require.NoError(t, err)
			docs, err := Load(name)
			require.NoError(t, err)
			got := ""
			for _, f := range Errors(Validate(docs, Options{})) {
				got += fmt.Sprintf("%s %s: %s\n", f.Reason, f.Field, f.Message)
			}
			assert.Equal(t, string(want), got)
		})
	}
}
