package handoff

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// FDNames are n names that QEMU can know descriptors by. Those of different
// devices differ.
func FDNames(device string, n int) []string {
	names := make([]string, n)
	for i := range names {
		names[i] = fmt.Sprintf("sidewire-%s-%d", device, i)
	}
	return names
}

// Attach gives a running QEMU a device: files under their names, and then what
// would be the values of -netdev, empty for none, and -device. If QEMU refuses
// one of them, what it took before is taken back.
func (q *QMP) Attach(files []*os.File, names []string, netdev, device string) (err error) {
	var undo []func()
	defer func() {
		if err == nil {
			return
		}
		for i := len(undo) - 1; i >= 0; i-- {
			undo[i]()
		}
	}()
	for i, f := range files {
		if err := q.do("getfd", map[string]any{"fdname": names[i]}, nil, f); err != nil {
			return err
		}
		undo = append(undo, func() { _ = q.do("closefd", map[string]any{"fdname": names[i]}, nil) })
	}
	if netdev != "" {
		args := typed(netdev, "type")
		if err := q.do("netdev_add", args, nil); err != nil {
			return err
		}
		// QEMU has made the descriptors its own: nothing has to be closed.
		undo = []func(){func() { _ = q.do("netdev_del", map[string]any{"id": args["id"]}, nil) }}
	}
	return q.plug(typed(device, "driver"))
}

// plug adds a NIC. Where its machine's first bus takes none while it runs
// (q35's pcie.0), it goes behind a root port that is free.
func (q *QMP) plug(device map[string]any) error {
	err := q.do("device_add", device, nil)
	if e := (*QMPError)(nil); err == nil || !errors.As(err, &e) || device["bus"] != nil || !strings.Contains(e.Desc, "hotplug") {
		return err
	}
	ports, perr := q.freePorts()
	if perr != nil {
		return errors.Join(err, perr)
	}
	for _, port := range ports {
		device["bus"] = port
		if perr = q.do("device_add", device, nil); perr == nil {
			return nil
		}
	}
	if len(ports) > 0 {
		return perr
	}
	return fmt.Errorf("%w; start QEMU with a free port for it: -device pcie-root-port,id=spare,chassis=99", err)
}

// freePorts are the identifiers of bridges with nothing behind them.
func (q *QMP) freePorts() (ports []string, err error) {
	type device struct {
		ID     string `json:"qdev_id"`
		Bridge *struct {
			Devices []any `json:"devices"`
		} `json:"pci_bridge"`
	}
	var buses []struct {
		Devices []device `json:"devices"`
	}
	if err := q.do("query-pci", nil, &buses); err != nil {
		return nil, err
	}
	for _, b := range buses {
		for _, d := range b.Devices {
			// Ports that hold a bus number are not for devices.
			if d.Bridge != nil && len(d.Bridge.Devices) == 0 && d.ID != "" && !strings.HasPrefix(d.ID, "gap-") {
				ports = append(ports, d.ID)
			}
		}
	}
	return ports, nil
}

// Detach takes a device from QEMU, and its network backend. The guest has to
// agree to the first; it gets until patience is over.
func (q *QMP) Detach(netdev, device string, patience time.Duration) error {
	q.events = q.events[:0]
	err := q.do("device_del", map[string]any{"id": device}, nil)
	if err == nil {
		err = q.wait("DEVICE_DELETED", device, patience)
	}
	if e := (*QMPError)(nil); errors.As(err, &e) && e.Class == "DeviceNotFound" {
		err = nil
	}
	if err != nil || netdev == "" {
		return err
	}
	return q.do("netdev_del", map[string]any{"id": netdev}, nil)
}

// words are properties that stay words though they look like others: addresses,
// names, and choices that can be neither on nor off.
var words = map[string]bool{
	"id": true, "netdev": true, "mac": true, "addr": true, "bus": true, "host": true, "romfile": true, "fds": true, "vhostfds": true,
	"driver": true, "type": true, "disable-legacy": true,
}

// typed makes the value of an option what the monitor takes. first is the name
// of what stands without one at the beginning.
func typed(option, first string) map[string]any {
	m := map[string]any{}
	for i, f := range splitOption(option) {
		k, v, ok := strings.Cut(f, "=")
		if !ok && i == 0 {
			k, v = first, f
		}
		n, err := strconv.Atoi(v)
		switch {
		case words[k]:
			m[k] = v
		case v == "on" || v == "off":
			m[k] = v == "on"
		case err == nil:
			m[k] = n
		default:
			m[k] = v
		}
	}
	return m
}

// splitOption splits at commas; two of them stand for one that is meant.
func splitOption(s string) (fields []string) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] != ',':
			b.WriteByte(s[i])
		case i+1 < len(s) && s[i+1] == ',':
			b.WriteByte(',')
			i++
		default:
			fields = append(fields, b.String())
			b.Reset()
		}
	}
	return append(fields, b.String())
}
