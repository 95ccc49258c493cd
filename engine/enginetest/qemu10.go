package enginetest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// HardwareKit is QEMU 10, which has network cards with virtual functions, and a
// kernel with drivers for them. `.ci/deps qemu10` brings it into a cache.
type HardwareKit struct {
	QEMU    string   // the program
	Data    []string // arguments by which it finds its data
	Kernel  string
	Modules string
}

// Hardware finds the kit.
func Hardware() (k HardwareKit, err error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return k, err
	}
	root := filepath.Join(cache, "sidewire/peers/qemu10")
	if _, err := os.Stat(filepath.Join(root, "VERSION")); err != nil {
		return k, fmt.Errorf("%w: run .ci/deps qemu10", err)
	}
	k.QEMU = filepath.Join(root, "usr/bin/qemu-system-x86_64")
	for _, dir := range []string{"usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"} {
		k.Data = append(k.Data, "-L", filepath.Join(root, dir))
	}
	kernels, _ := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	if len(kernels) != 1 {
		return k, fmt.Errorf("%d kernels in %s/boot: run .ci/deps qemu10 again without that directory", len(kernels), root)
	}
	k.Kernel = kernels[0]
	k.Modules = filepath.Join(root, "lib/modules", strings.TrimPrefix(filepath.Base(k.Kernel), "vmlinuz-"))
	return k, nil
}

// WithLibraries returns what a guest needs to run a program of the host's, by
// paths in the guest, which are those here.
func WithLibraries(program string) (map[string]string, error) {
	out, err := exec.Command("ldd", program).Output()
	if err != nil {
		return nil, fmt.Errorf("libraries of %s: %w", program, err)
	}
	files := map[string]string{program: program}
	for line := range strings.Lines(string(out)) {
		// "NAME => PATH (ADDRESS)", or "PATH (ADDRESS)" of the loader.
		for _, f := range strings.Fields(line) {
			if strings.HasPrefix(f, "/") {
				files[f] = f
			}
		}
	}
	return files, nil
}
