package handoff

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// sriovState is what a function was before it became a guest's, written down
// before anything is changed, so that the next run can give it back if this one
// cannot.
type sriovState struct {
	Address  string `json:"address"`
	Boot     string `json:"boot"`            // the kernel's boot_id: the next boot knows nothing of it
	Driver   string `json:"driver"`          // empty: it had none
	Override string `json:"driver_override"` // empty: any driver that fits
	Bound    bool   `json:"bound"`           // to vfio-pci by us

	// Of a virtual function whose settings are changed.
	PF     string   `json:"pf,omitempty"`
	VF     int      `json:"vf"`
	Before *vfState `json:"before,omitempty"`
}

// stateFile is the file of one function's state. It is locked for as long as a
// run has the function: a file without a lock is what a run left that could not
// give it back.
type stateFile struct{ f *os.File }

const (
	sriovStatePrefix = "sriov-"
	sriovStateSuffix = ".json"
	maxState         = 64 << 10
)

// errHeld is that another run has a function.
var errHeld = errors.New("another sidewire has it")

// openState opens the state of a function, and reads what an earlier run left
// there: ok if it left anything.
func openState(dir, address string) (sf *stateFile, s sriovState, ok bool, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, s, false, fmt.Errorf("directory for what the function was before: %w", err)
	}
	path := filepath.Join(dir, sriovStatePrefix+address+sriovStateSuffix)
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, s, false, fmt.Errorf("file for what the function was before: %w", err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				err = errHeld
			}
			return nil, s, false, err
		}
		// Who had it may have removed it before the lock was ours.
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			f.Close()
			return nil, s, false, err
		}
		if st.Nlink == 0 {
			f.Close()
			continue
		}
		s, ok, err = readState(f, address)
		if err != nil {
			f.Close()
			return nil, s, false, fmt.Errorf("%s: %w", path, err)
		}
		return &stateFile{f}, s, ok, nil
	}
}

// bootID tells one boot of the kernel from another.
func bootID() string {
	id, _ := text("/proc/sys/kernel/random/boot_id")
	return id
}

// readState reads a state. One that was not written to its end is none, for nothing
// had been changed yet, nor is one of an earlier boot. What stands behind it is of
// one before it that was longer.
func readState(f *os.File, address string) (s sriovState, ok bool, err error) {
	b, err := io.ReadAll(io.LimitReader(f, maxState))
	if err != nil {
		return s, false, err
	}
	if json.NewDecoder(bytes.NewReader(b)).Decode(&s) != nil || s.Address != address || s.Boot != bootID() {
		return sriovState{}, false, nil
	}
	return s, true, nil
}

// save writes the state down, over the one of an earlier run: at no moment, and a
// kill may come at any, is there none.
func (sf *stateFile) save(s sriovState) error {
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	b = append(b, '\n')
	if _, err := sf.f.WriteAt(b, 0); err != nil {
		return fmt.Errorf("write down what the function was: %w", err)
	}
	if err := sf.f.Truncate(int64(len(b))); err != nil {
		return fmt.Errorf("write down what the function was: %w", err)
	}
	if err := sf.f.Sync(); err != nil {
		return fmt.Errorf("write down what the function was: %w", err)
	}
	return nil
}

// close lets go of the file; where there is nothing to give back any more, it is
// removed.
func (sf *stateFile) close(done bool) (err error) {
	if done {
		err = os.Remove(sf.f.Name())
	}
	return errors.Join(err, sf.f.Close())
}

// leftStates lists the functions that have a state in dir.
func leftStates(dir string) (addresses []string, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		name, ok := strings.CutPrefix(e.Name(), sriovStatePrefix)
		name, ok2 := strings.CutSuffix(name, sriovStateSuffix)
		if a, err := ParsePCIAddress(name); ok && ok2 && err == nil && a == name {
			addresses = append(addresses, a)
		}
	}
	return addresses, nil
}
