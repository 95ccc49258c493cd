package enginetest

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// guestModules are what a guest needs beside the kernel itself. Where the
// kernel has one built in, nothing is loaded.
var guestModules = []string{"virtio_pci", "virtio_net"}

// nicModules are drivers of other NIC models, taken along where the kernel has
// them; Debian's cloud kernel has none.
var nicModules = []string{"e1000", "e1000e", "8139cp", "pcnet32", "ne2k-pci"}

// Initramfs is what a guest's initramfs holds.
type Initramfs struct {
	Init    string            // the static program that is /init
	Modules string            // where the kernel's modules are: /lib/modules/VERSION
	Drivers []string          // modules beside those that every guest has
	Files   map[string]string // further files, by their paths in the guest
}

// BuildInitramfs writes an initramfs (newc cpio, not compressed: unpacking is
// what takes time in an emulated guest). The kernel modules are in it
// as /modules/NN-NAME.ko in the order to load them.
func BuildInitramfs(w io.Writer, i Initramfs) error {
	if err := CheckStatic(i.Init); err != nil {
		return err
	}
	files, err := moduleOrder(i.Modules, i.Drivers)
	if err != nil {
		return err
	}
	c := &cpio{w: bufio.NewWriter(w)}
	for _, d := range []string{"dev", "proc", "sys", "tmp", "run", "etc", "modules"} {
		c.add(d, 0o040755, nil)
	}
	c.device("dev/console", 5, 1)
	if err := c.file("init", i.Init); err != nil {
		return err
	}
	for n, f := range files {
		b, err := readModule(filepath.Join(i.Modules, f))
		if err != nil {
			return fmt.Errorf("initramfs: %w", err)
		}
		name := path.Base(f)
		name = name[:strings.Index(name, ".ko")]
		c.add(fmt.Sprintf("modules/%02d-%s.ko", n, name), 0o100644, b)
	}
	made := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(i.Files)) {
		c.parents(strings.TrimPrefix(name, "/"), made)
		if err := c.file(strings.TrimPrefix(name, "/"), i.Files[name]); err != nil {
			return err
		}
	}
	return c.close()
}

// CheckStatic refuses a program that needs an interpreter: the initramfs has
// no libraries.
func CheckStatic(program string) error {
	f, err := elf.Open(program)
	if err != nil {
		return fmt.Errorf("guest's init: %s: %w", program, err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("guest's init: %s is dynamically linked: build it with CGO_ENABLED=0", program)
		}
	}
	return nil
}

// moduleOrder returns the files of the guest's modules below dir, each behind
// those that it depends on. The kernel must have the drivers.
func moduleOrder(dir string, drivers []string) ([]string, error) {
	deps, err := readModulesDep(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return nil, fmt.Errorf("initramfs: %w", err)
	}
	builtin, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("initramfs: %w", err)
	}
	files := map[string]string{} // name to file
	for f := range deps {
		files[moduleName(f)] = f
	}
	var order []string
	seen := map[string]bool{}
	var visit func(f string)
	visit = func(f string) {
		if seen[f] {
			return
		}
		seen[f] = true
		// modules.dep lists the direct and the indirect ones, the latter last.
		for i := len(deps[f]) - 1; i >= 0; i-- {
			visit(deps[f][i])
		}
		order = append(order, f)
	}
	needed := append(guestModules[:len(guestModules):len(guestModules)], drivers...)
	for _, m := range append(needed[:len(needed):len(needed)], nicModules...) {
		if f := files[moduleName(m)]; f != "" {
			visit(f)
		}
	}
	for _, m := range needed {
		if files[moduleName(m)] == "" && !bytes.Contains(builtin, []byte("/"+m+".ko")) {
			return nil, fmt.Errorf("initramfs: the kernel of %s has no module %s", dir, m)
		}
	}
	return order, nil
}

// moduleName is a module's name as the kernel knows it.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// readModulesDep reads lines "FILE: FILE...".
func readModulesDep(file string) (map[string][]string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	deps := map[string][]string{}
	for line := range strings.Lines(string(b)) {
		f, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
		if ok {
			deps[f] = strings.Fields(rest)
		}
	}
	return deps, nil
}

// readModule reads a module, decompressed.
func readModule(file string) ([]byte, error) {
	var program string
	switch filepath.Ext(file) {
	case ".gz":
		program = "gzip"
	case ".xz":
		program = "xz"
	case ".zst":
		program = "zstd"
	default:
		return os.ReadFile(file)
	}
	if program == "gzip" {
		f, err := os.Open(file)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		z, err := gzip.NewReader(f)
		if err != nil {
			return nil, err
		}
		return io.ReadAll(z)
	}
	out, err := exec.Command(program, "-dc", file).Output()
	if errors.Is(err, exec.ErrNotFound) {
		return nil, fmt.Errorf("module %s is compressed: install %s", filepath.Base(file), program)
	}
	if err != nil {
		return nil, fmt.Errorf("%s -dc %s: %w", program, file, err)
	}
	return out, nil
}

// cpio writes the kernel's initramfs format (Documentation/driver-api/
// early-userspace/buffer-format.rst). The first error is kept for close.
type cpio struct {
	w     *bufio.Writer
	inode int
}

func (c *cpio) add(name string, mode uint32, data []byte) { c.entry(name, mode, 0, 0, data) }

// file adds a copy of a program or a library.
func (c *cpio) file(name, from string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return fmt.Errorf("initramfs: %w", err)
	}
	c.add(name, 0o100755, b)
	return nil
}

// parents adds the directories that name is in, but for those made already.
func (c *cpio) parents(name string, made map[string]bool) {
	dir := path.Dir(name)
	if dir == "." || made[dir] {
		return
	}
	c.parents(dir, made)
	made[dir] = true
	c.add(dir, 0o040755, nil)
}

// device adds a character device.
func (c *cpio) device(name string, major, minor uint32) { c.entry(name, 0o020600, major, minor, nil) }

func (c *cpio) entry(name string, mode, major, minor uint32, data []byte) {
	c.inode++
	// magic, ino, mode, uid, gid, nlink, mtime, filesize, dev, rdev, namesize, check
	fmt.Fprintf(c.w, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x", c.inode, mode, 0, 0, 1, 0,
		len(data), 0, 0, major, minor, len(name)+1, 0)
	c.w.WriteString(name)
	c.w.WriteByte(0)
	c.pad(110 + len(name) + 1)
	c.w.Write(data)
	c.pad(len(data))
}

func (c *cpio) pad(n int) {
	for ; n%4 != 0; n++ {
		c.w.WriteByte(0)
	}
}

func (c *cpio) close() error {
	c.entry("TRAILER!!!", 0, 0, 0, nil)
	return c.w.Flush() // bufio keeps the first error of them all
}
