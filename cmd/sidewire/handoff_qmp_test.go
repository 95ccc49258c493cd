package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sidewire/engine/enginetest"
	"sidewire/engine/handoff"
	"sidewire/engine/vmi"
)

// paperDevice is a device that is nothing.
type paperDevice struct{}

func (paperDevice) Up() error                      { return nil }
func (paperDevice) Open() ([]*os.File, error)      { return nil, nil }
func (paperDevice) Netdev([]string, string) string { return "" }
func (paperDevice) Properties() []string           { return []string{"vfio-pci", "host=0000:00:01.0"} }
func (paperDevice) Status() handoff.Status         { return handoff.Status{} }
func (paperDevice) Close() error                   { return nil }

// paperQEMU is a monitor that knows devices by their ids and refuses one of them.
type paperQEMU struct {
	path   string
	refuse string

	mu      sync.Mutex
	devices []string
	said    []string // what was done
}

func newPaperQEMU(t *testing.T, refuse string) *paperQEMU {
	q := &paperQEMU{path: filepath.Join(socketDir(t), "qmp.sock"), refuse: refuse}
	ln, err := net.Listen("unix", q.path)
	require.NoError(t, err)
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			q.serve(c) // one at a time, as QEMU does
		}
	}()
	return q
}

func (q *paperQEMU) serve(c net.Conn) {
	defer c.Close()
	fmt.Fprintln(c, `{"QMP": {}}`)
	for s := bufio.NewScanner(c); s.Scan(); {
		var m struct {
			Execute, ID string
			Arguments   struct{ ID string }
		}
		if json.Unmarshal(s.Bytes(), &m) != nil {
			return
		}
		answer, event := q.do(m.Execute, m.Arguments.ID)
		fmt.Fprintf(c, "{\"id\": %q, %s}\n%s", m.ID, answer, event)
	}
}

func (q *paperQEMU) do(command, id string) (answer, event string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	switch command {
	case "device_add":
		if id == q.refuse {
			return `"error": {"class": "GenericError", "desc": "no room"}`, ""
		}
		q.devices = append(q.devices, id)
	case "device_del":
		q.devices = slices.DeleteFunc(q.devices, func(d string) bool { return d == id })
		event = fmt.Sprintf("{\"event\": \"DEVICE_DELETED\", \"data\": {\"device\": %q}}\n", id)
	case "qom-list":
		list := []map[string]string{}
		for _, d := range q.devices {
			list = append(list, map[string]string{"name": d})
		}
		b, _ := json.Marshal(list)
		return `"return": ` + string(b), ""
	default:
		return `"return": {}`, ""
	}
	q.said = append(q.said, command+" "+id)
	return `"return": {}`, event
}

func (q *paperQEMU) done() []string {
	q.mu.Lock()
	defer q.mu.Unlock()
	return slices.Clone(q.said)
}

// paperServer has two devices for a QEMU.
func paperServer(q *paperQEMU) (*server, *options, vmi.VM) {
	o := &options{mode: "server"}
	o.handoff.qmp = q.path
	vm := vmi.VM{Name: "vm", Interfaces: []vmi.Interface{
		{Name: "a", Binding: vmi.SRIOV, Model: "virtio"}, {Name: "b", Binding: vmi.SRIOV, Model: "virtio"},
	}}
	s := &server{log: slog.New(slog.NewTextHandler(io.Discard, nil))}
	for _, i := range vm.Interfaces {
		s.handoffs = append(s.handoffs, &handoffNIC{nic: nic{vm: vm, iface: i}, device: paperDevice{}, way: byMonitor, state: prepared})
	}
	return s, o, vm
}

// A start that fails with the second device takes the first away from QEMU again.
func TestMonitorRefusesSecondDevice(t *testing.T) {
	_, _, vm := paperServer(&paperQEMU{})
	a, b := vm.Interfaces[0].DeviceID(), vm.Interfaces[1].DeviceID()
	q := newPaperQEMU(t, b)
	s, o, vm := paperServer(q)
	err := s.giveByMonitor(t.Context(), o, vm)
	require.ErrorContains(t, err, "no room")
	assert.ErrorAs(t, err, new(machineError))
	assert.Equal(t, []string{"device_add " + a, "device_del " + a}, q.done())
	require.NoError(t, s.stop())
}

// A later try leaves what QEMU has got already.
func TestMonitorTriesAgain(t *testing.T) {
	_, _, vm := paperServer(&paperQEMU{})
	a, b := vm.Interfaces[0].DeviceID(), vm.Interfaces[1].DeviceID()
	q := newPaperQEMU(t, b)
	s, o, vm := paperServer(q)
	for range 3 {
		_, err := s.giveOnce(t.Context(), o, vm)
		require.ErrorContains(t, err, "no room")
	}
	assert.Equal(t, []string{"device_add " + a}, q.done())
}

// A QEMU of which nobody learns when it ends, as in another container, is given its
// devices once, and loses them at the end.
func TestMonitorOfAnotherPIDNamespace(t *testing.T) {
	qemuProcess = func(*handoff.QMP) int { return -1 }
	t.Cleanup(func() { qemuProcess = (*handoff.QMP).Peer })
	q := newPaperQEMU(t, "")
	s, o, vm := paperServer(q)
	a, b := vm.Interfaces[0].DeviceID(), vm.Interfaces[1].DeviceID()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	require.NoError(t, s.giveByMonitor(ctx, o, vm))
	given := []string{"device_add " + a, "device_add " + b}
	// The old one took them away and gave them again at each look.
	assert.False(t, enginetest.Wait(3*monitorRetry, func() bool { return len(q.done()) != 2 }))
	assert.Equal(t, given, q.done())
	require.NoError(t, s.stop())
	assert.Equal(t, append(given, "device_del "+a, "device_del "+b), q.done())
}

// Of one that runs on, that it is looked at for its end is all that happens.
func TestMonitorIsFollowed(t *testing.T) {
	q := newPaperQEMU(t, "")
	s, o, vm := paperServer(q)
	require.NoError(t, s.giveByMonitor(t.Context(), o, vm))
	start := time.Now()
	require.NoError(t, s.stop())
	assert.Less(t, time.Since(start), unplugPatience)
	assert.Len(t, q.done(), 4)
}
