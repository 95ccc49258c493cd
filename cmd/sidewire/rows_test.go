package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// rows is how many rows the table of KubeVirt's features has that the tests are named by.
const rows = 85

// rowsWithoutTest are those that no test can prove, and why. There is none: what is a note in KubeVirt's guide is a promise here (13, 35, 82)
// that can be looked at.
var rowsWithoutTest = map[int]string{}

// acceptance are the tests of KubeVirt's own that ours stand for, by their number or, without one, a word of ours: what
// is searched for is in a test's name.
var acceptance = []string{
	"KubeVirt1539", "KubeVirt1541", "KubeVirt1542", "KubeVirt1770", "KubeVirt1774", "KubeVirt1777", "KubeVirt1778", "KubeVirt1779", "KubeVirt1780", "KubeVirt4599",
	"KubeVirtACPIIndex", "KubeVirtMTU", "KubeVirtDAD", "KubeVirtSubdomain", "KubeVirtSpoofCheck", "KubeVirtLinkState",
}

var (
	testName = regexp.MustCompile(`(?m)^func (Test\w+|Fuzz\w+)\(`)
	subtest  = regexp.MustCompile(`"[^"\n]*\b(Row\d+|V\d+)\b[^"\n]*"`)
	rowOf    = regexp.MustCompile(`Row(\d+)`)
)

// testNames are the names of all tests of the repository and of their subtests that stand in a table.
func testNames(t *testing.T) (names []string) {
	t.Helper()
	root := filepath.Join("..", "..")
	require.NoError(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") || d.Name() == "rows_test.go" {
			return err
		}
		b, err := os.ReadFile(path)
		for _, m := range testName.FindAllStringSubmatch(string(b), -1) {
			names = append(names, m[1])
		}
		names = append(names, subtest.FindAllString(string(b), -1)...)
		return err
	}))
	return names
}

// Every row of the table has a test that is found by its number, or a reason why there can be none.
func TestEveryRowHasATest(t *testing.T) {
	have := map[int]bool{}
	names := testNames(t)
	for _, name := range names {
		for _, m := range rowOf.FindAllStringSubmatch(name, -1) {
			n, err := strconv.Atoi(m[1])
			require.NoError(t, err)
			assert.True(t, n >= 1 && n <= rows, "%s: there is no such row", name)
			have[n] = true
		}
	}
	for n := 1; n <= rows; n++ {
		assert.NotEqual(t, have[n], rowsWithoutTest[n] != "", "row %d: a test, or a reason why there is none", n)
	}
	for _, word := range acceptance {
		assert.True(t, slices.ContainsFunc(names, func(name string) bool { return strings.Contains(name, word) }), "%s: no test has that in its name", word)
	}
}
