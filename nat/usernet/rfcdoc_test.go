package usernet

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

var (
	testFunc  = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)
	inBracket = regexp.MustCompile(`\(([^()]*)\)`)
	testRows  = regexp.MustCompile(`_?(Row\d+)+$`)
	testName  = regexp.MustCompile("^(?:`((?:Test|Fuzz)\\w+)`|([A-Z]\\w{3,}))$")
)

// testsIn are the names of a directory's tests, without the rows of the list of
// features that they prove.
func testsIn(t *testing.T, dir string) (names []string) {
	t.Helper()
	files, err := filepath.Glob(dir + "/*_test.go")
	require.NoError(t, err)
	for _, f := range files {
		b, err := os.ReadFile(f)
		require.NoError(t, err)
		for _, m := range testFunc.FindAllStringSubmatch(string(b), -1) {
			names = append(names, testRows.ReplaceAllString(m[1], ""))
		}
	}
	return names
}

// TestRFCTableNamesTests: the tests that docs/rfc.md names exist, those of the
// packet path in nat, those of the socket path here. A row whose requirement is
// met names one.
func TestRFCTableNamesTests(t *testing.T) {
	b, err := os.ReadFile("../../docs/rfc.md")
	require.NoError(t, err)
	tests := [2][]string{testsIn(t, ".."), testsIn(t, ".")}
	rfc, rows := "", 0
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "## RFC "); ok {
			rfc, _, _ = strings.Cut(rest, ",")
			rfc = strings.TrimSpace(rfc)
		}
		cells := strings.Split(line, "|")
		if len(cells) != 6 || strings.HasPrefix(cells[1], "--") || strings.TrimSpace(cells[1]) == "REQ" {
			continue
		}
		rows++
		for path, cell := range cells[3:5] {
			named := 0
			for _, m := range inBracket.FindAllStringSubmatch(cell, -1) {
				for word := range strings.SplitSeq(m[1], ", ") {
					n := testName.FindStringSubmatch(word)
					if n == nil {
						named += strings.Count(word, "`") // something else that tells
						continue
					}
					named++
					assert.True(t, exists(tests[path], rfc, n[1], n[2]), "RFC %s, %s: no test %s", rfc, strings.TrimSpace(cells[1]), word)
				}
			}
			if strings.HasPrefix(strings.TrimSpace(cell), "met ") {
				assert.NotZero(t, named, "RFC %s, %s: met, but by which test?", rfc, strings.TrimSpace(cells[1]))
			}
		}
	}
	assert.Greater(t, rows, 40)
}

// exists says whether there is a test of a name, or one of the RFC whose name
// ends in some other.
func exists(tests []string, rfc, name, end string) bool {
	for _, t := range tests {
		if name != "" && t == name || name == "" && strings.HasPrefix(t, "TestRFC"+rfc) && strings.HasSuffix(t, end) {
			return true
		}
	}
	return false
}
