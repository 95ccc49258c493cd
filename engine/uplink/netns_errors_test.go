package uplink

import (
	"os"
	"testing"

	"github.com/stretchr/testify/assert"
)

// A namespace that is none is named, with what to write instead.
func TestNotANamespace(t *testing.T) {
	file := t.TempDir() + "/pod"
	assert.NoError(t, os.WriteFile(file, nil, 0o600))
	for path, want := range map[string]string{
		"no-such-pod":        "want a path, such as /run/netns/no-such-pod",
		"/does/not/exist":    "network namespace /does/not/exist: no such file",
		file:                 file + ": the file is no namespace",
		"/proc/self/ns/none": "no such file",
	} {
		err := InNetNS(path, func() error { t.Error("ran"); return nil })
		assert.ErrorContains(t, err, want)
	}
	assert.NoError(t, InNetNS("/proc/self/ns/net", func() error { return nil }))
}
