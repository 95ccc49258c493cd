package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const module = "sidewire/"

// mayImport lists, for each package, the packages of ours that its code (not
// its tests) may import. It is the import graph of docs/ARCHITECTURE.md.
var mayImport = map[string][]string{
	"engine/frame":       {},
	"engine":             {"engine/frame"},
	"engine/uplink":      {"engine/frame"},
	"engine/stream":      {"engine/frame"},
	"engine/handoff":     {},
	"engine/vmi":         {},
	"engine/enginetest":  {"engine/frame", "engine"},
	"vhostuser/guestmem": {},
	"vhostuser/virtq":    {"vhostuser/guestmem"},
	"vhostuser":          {"engine/frame", "vhostuser/guestmem", "vhostuser/virtq"},
	"vhostuser/vhosttest": {
		"engine/frame", "engine/enginetest", "vhostuser", "vhostuser/guestmem", "vhostuser/virtq",
	},
	"nat":                {"engine/frame"},
	"nat/dns":            {},
	"nat/usernet":        {"engine/frame"},
	"dhcp":               {"engine/frame"},
	"cmd/sidewire-guest": {"engine/enginetest"},
	"cmd/sidewire":       {"*"},
	"perf":               {"*"},
	"fuzz":               {"*"},
}

// sentences is how each package's comment begins (design: "a package says in
// one sentence what it is").
var sentences = map[string]string{
	"engine":              "Package engine moves batches of frames between ports",
	"engine/frame":        "Package frame is the unit of work",
	"engine/uplink":       "Package uplink is the host's side",
	"engine/stream":       "Package stream is a port for NIC models that are not virtio",
	"engine/handoff":      "Package handoff gives a guest a kernel macvtap or a vfio device",
	"engine/vmi":          "Package vmi reads a KubeVirt VMI",
	"engine/enginetest":   "Package enginetest ",
	"vhostuser":           "Package vhostuser speaks the vhost-user protocol",
	"vhostuser/virtq":     "Package virtq is the device side of a virtqueue",
	"vhostuser/guestmem":  "Package guestmem maps the memory that a frontend shares",
	"vhostuser/vhosttest": "Package vhosttest plays QEMU and its guest",
	"nat":                 "Package nat rewrites flows",
	"nat/dns":             "Package dns answers guests from the host's resolvers.",
	"nat/usernet":         "Package usernet carries guest TCP, UDP and ICMP over ordinary host sockets",
	"dhcp":                "Package dhcp leases addresses to guests",
}

// mayUseUnsafe lists where unsafe is allowed: rings, guest memory, and the raw
// system calls of worker, uplink and stream.
// The driver's side in vhosttest and the guest's ethtool calls are as raw.
var mayUseUnsafe = []string{"vhostuser/virtq", "vhostuser/guestmem", "engine", "engine/uplink", "engine/stream", "nat/usernet", "vhostuser/vhosttest", "cmd/sidewire-guest"}

// testOnly are modules that the program itself must not link.
var testOnly = []string{"github.com/stretchr/testify", "github.com/gopacket/gopacket", "testing"}

type source struct {
	dir  string // package directory below the module's root
	name string
	test bool
	file *ast.File
	fset *token.FileSet
	size int
}

// sources parses every Go file of the module.
func sources(t *testing.T) []source {
	t.Helper()
	root := "../.."
	var out []source
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if _, err := os.Stat(filepath.Join(p, "go.mod")); err == nil && p != root {
				return filepath.SkipDir // a module of its own
			}
			if n := d.Name(); n == "testdata" || n == ".git" {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(p, ".go") {
			return nil
		}
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, p, b, parser.ParseComments)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, filepath.Dir(p))
		if err != nil {
			return err
		}
		out = append(out, source{
			dir: filepath.ToSlash(rel), name: filepath.Base(p),
			test: strings.HasSuffix(p, "_test.go"), file: f, fset: fset,
			size: strings.Count(string(b), "\n"),
		})
		return nil
	})
	require.NoError(t, err)
	require.NotEmpty(t, out)
	return out
}

func (s source) imports(t *testing.T) []string {
	t.Helper()
	var out []string
	for _, i := range s.file.Imports {
		p, err := strconv.Unquote(i.Path.Value)
		require.NoError(t, err)
		out = append(out, p)
	}
	return out
}

func TestImportsPointOneWay(t *testing.T) {
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		allowed, known := mayImport[s.dir]
		if !assert.True(t, known, "%s is not in the import graph: add it to mayImport and docs/ARCHITECTURE.md", s.dir) {
			continue
		}
		for _, imp := range s.imports(t) {
			for _, bad := range testOnly {
				assert.False(t, imp == bad || strings.HasPrefix(imp, bad+"/"), "%s/%s imports %s, which is for tests", s.dir, s.name, imp)
			}
			rel, ours := strings.CutPrefix(imp, module)
			if !ours || len(allowed) == 1 && allowed[0] == "*" {
				continue
			}
			assert.Contains(t, allowed, rel, "%s/%s imports %s against the import graph", s.dir, s.name, rel)
		}
	}
}

func TestPackageSentences(t *testing.T) {
	docs := map[string][]string{}
	for _, s := range sources(t) {
		if !s.test && s.file.Doc != nil {
			docs[s.dir] = append(docs[s.dir], s.file.Doc.Text())
		}
	}
	for dir := range mayImport {
		if len(docs[dir]) == 0 {
			if _, err := os.Stat(path.Join("../..", dir)); os.IsNotExist(err) {
				continue
			}
			if m, _ := filepath.Glob(path.Join("../..", dir, "*.go")); len(m) == 0 || allTests(m) {
				continue
			}
		}
		assert.Len(t, docs[dir], 1, "%s: package comments", dir)
		for _, d := range docs[dir] {
			assert.True(t, strings.HasPrefix(strings.ReplaceAll(d, "\n", " "), sentences[dir]), "%s: the package comment does not begin with %q", dir, sentences[dir])
		}
	}
}

func allTests(files []string) bool {
	for _, f := range files {
		if !strings.HasSuffix(f, "_test.go") {
			return false
		}
	}
	return true
}

func TestUnsafeIsConfined(t *testing.T) {
	for _, s := range sources(t) {
		uses := false
		for _, imp := range s.imports(t) {
			uses = uses || imp == "unsafe"
		}
		if !uses || s.test {
			continue
		}
		assert.Contains(t, mayUseUnsafe, s.dir, "%s/%s uses unsafe", s.dir, s.name)
		reasons := 0
		for _, c := range s.file.Comments {
			reasons += strings.Count(c.Text(), "SAFETY:")
		}
		assert.NotZero(t, reasons, "%s/%s: unsafe without a SAFETY: comment", s.dir, s.name)
	}
}

func TestFilesAreShort(t *testing.T) {
	for _, s := range sources(t) {
		assert.LessOrEqual(t, s.size, 800, "%s/%s is too long: split it by subject", s.dir, s.name)
	}
}

func TestMakefileIsShort(t *testing.T) {
	b, err := os.ReadFile("../../Makefile")
	require.NoError(t, err)
	assert.LessOrEqual(t, strings.Count(string(b), "\n"), 60)
}
