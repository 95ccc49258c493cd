package main

import (
	"context"
	"debug/buildinfo"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// rival is another state of this module, to see what a change brought: its
// program, and its harness for the cells of one guest. Either may be "".
type rival struct {
	sidewire, perf string
	source         string // where they are built from, or ""
}

// The programs of the module, by the paths of their packages.
const (
	sidewirePath = "sidewire/cmd/sidewire"
	perfPath     = "sidewire/perf"
)

// findRival says what a list of programs and checkouts has.
func findRival(list string) (r rival, err error) {
	for _, name := range strings.FieldsFunc(list, func(c rune) bool { return c == ',' }) {
		fi, err := os.Stat(name)
		if err != nil {
			return r, err
		}
		if fi.IsDir() {
			r.source, r.sidewire, r.perf = name, sidewirePath, perfPath // until they are built
			continue
		}
		b, err := buildinfo.ReadFile(name)
		if err != nil {
			return r, fmt.Errorf("%s: %w", name, err)
		}
		switch b.Path {
		case sidewirePath:
			r.sidewire = name
		case perfPath:
			r.perf = name
		default:
			return r, fmt.Errorf("%s is built from %s, neither %s nor %s", name, b.Path, sidewirePath, perfPath)
		}
	}
	return r, nil
}

// build makes the programs that are there as source only, in dir.
func (r *rival) build(ctx context.Context, dir string) error {
	if r.source == "" {
		return nil
	}
	var err error
	if r.sidewire == sidewirePath {
		if r.sidewire, err = build(ctx, r.source, sidewirePath, filepath.Join(dir, "other-sidewire")); err != nil {
			return err
		}
	}
	if r.perf == perfPath {
		r.perf, err = build(ctx, r.source, perfPath, filepath.Join(dir, "other-perf"))
	}
	return err
}

// build builds a package of the checkout that is around a directory.
func build(ctx context.Context, source, pkg, to string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "build", "-o", to, pkg)
	cmd.Dir = source
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w: %s", pkg, err, out)
	}
	return to, nil
}
