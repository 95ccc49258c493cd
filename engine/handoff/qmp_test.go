package handoff

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// fakeQEMU is a monitor that answers as it is told; commands without an answer
// succeed.
type fakeQEMU struct {
	c       *net.UnixConn
	answers map[string]string
	got     []string // commands with their arguments
	fds     int      // that came with them
	done    chan struct{}
}

const greeting = `{"QMP": {"version": {}, "capabilities": []}}`

// monitor joins a QMP to a fake.
func monitor(t *testing.T, answers map[string]string) (*QMP, *fakeQEMU) {
	t.Helper()
	ours, theirs := pair(t)
	f := &fakeQEMU{c: theirs, answers: answers, done: make(chan struct{})}
	go f.serve()
	q, err := NewQMP(ours)
	require.NoError(t, err)
	t.Cleanup(func() {
		q.Close()
		<-f.done
	})
	return q, f
}

func pair(t *testing.T) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "monitor")
		c, err := net.FileConn(f)
		require.NoError(t, err)
		f.Close()
		conns[i] = c.(*net.UnixConn)
	}
	return conns[0], conns[1]
}

func (f *fakeQEMU) serve() {
	defer close(f.done)
	defer f.c.Close()
	fmt.Fprintln(f.c, greeting)
	buf, oob := make([]byte, 65536), make([]byte, 1024)
	for {
		n, oobn, _, _, err := f.c.ReadMsgUnix(buf, oob)
		if err != nil || n == 0 {
			return
		}
		if m, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil {
			for i := range m {
				fds, _ := unix.ParseUnixRights(&m[i])
				for _, fd := range fds {
					f.fds++
					unix.Close(fd)
				}
			}
		}
		var c struct {
			Execute   string          `json:"execute"`
			ID        string          `json:"id"`
			Arguments json.RawMessage `json:"arguments"`
		}
		if json.Unmarshal(buf[:n], &c) != nil {
			return
		}
		f.got = append(f.got, strings.TrimSpace(c.Execute+" "+string(c.Arguments)))
		answer := f.answers[c.Execute]
		if answer == "" {
			answer = `"return": {}`
		}
		before, after, _ := strings.Cut(answer, "\n")
		fmt.Fprintf(f.c, "{\"event\": \"NOISE\"}\r\n{\"id\": %q, %s}\n%s", c.ID, before, after)
	}
}

// A device goes by descriptors, network backend and NIC, with the types that the
// monitor wants.
func TestQMPAttach(t *testing.T) {
	q, f := monitor(t, nil)
	r, w, err := os.Pipe()
	require.NoError(t, err)
	defer r.Close()
	defer w.Close()
	names := FDNames("net", 2)
	require.NoError(t, q.Attach([]*os.File{r, w}, names, "tap,id=net-net,fds="+strings.Join(names, ":")+",vhost=off",
		"virtio-net-pci,id=nic-net,netdev=net-net,mq=on,vectors=6,mac=02:00:00:00:00:07,romfile=,bus=pcie.0,addr=05.0,disable-legacy=on,bootindex=1"))
	assert.Equal(t, []string{
		"qmp_capabilities",
		`getfd {"fdname":"sidewire-net-0"}`, `getfd {"fdname":"sidewire-net-1"}`,
		`netdev_add {"fds":"sidewire-net-0:sidewire-net-1","id":"net-net","type":"tap","vhost":false}`,
		`device_add {"addr":"05.0","bootindex":1,"bus":"pcie.0","disable-legacy":"on","driver":"virtio-net-pci","id":"nic-net","mac":"02:00:00:00:00:07","mq":true,"netdev":"net-net","romfile":"","vectors":6}`,
	}, f.got)
	assert.Equal(t, 2, f.fds)
}

// What QEMU refuses is told in its words, and what it took before is taken back.
func TestQMPAttachRefused(t *testing.T) {
	refuse := func(s string) string { return `"error": {"class": "GenericError", "desc": "` + s + `"}` }
	for command, want := range map[string][]string{
		"netdev_add": {`closefd {"fdname":"sidewire-n-0"}`},
		"device_add": {`netdev_del {"id":"net-n"}`},
	} {
		q, f := monitor(t, map[string]string{command: refuse("out of " + command)})
		r, w, err := os.Pipe()
		require.NoError(t, err)
		err = q.Attach([]*os.File{r}, FDNames("n", 1), "tap,id=net-n,fds=sidewire-n-0", "e1000,id=nic-n,netdev=net-n")
		assert.EqualError(t, err, "QEMU refused "+command+": out of "+command)
		assert.Equal(t, want, f.got[len(f.got)-len(want):])
		r.Close()
		w.Close()
	}
	q, f := monitor(t, map[string]string{"device_add": refuse("Bus 'pcie.0' does not support hotplugging"),
		"query-pci": `"return": [{"devices": [{"qdev_id": "", "pci_bridge": {"devices": []}}, {"qdev_id": "gap-05", "pci_bridge": {}}, {"qdev_id": "busy", "pci_bridge": {"devices": [{}]}}]}]`})
	err := q.Attach(nil, nil, "", "vfio-pci,id=nic-n,host=0000:65:00.2")
	assert.ErrorContains(t, err, "start QEMU with a free port for it: -device pcie-root-port")
	assert.Contains(t, f.got, `device_add {"driver":"vfio-pci","host":"0000:65:00.2","id":"nic-n"}`)
	q, f = monitor(t, map[string]string{"device_add": refuse("no hotplug here"), "query-pci": `"return": [{"devices": [{"qdev_id": "free", "pci_bridge": {"devices": []}}]}]`})
	_ = q.Attach(nil, nil, "", "e1000,id=nic-n")
	assert.Equal(t, `device_add {"bus":"free","driver":"e1000","id":"nic-n"}`, f.got[len(f.got)-1])
}

// A device is gone when QEMU says that it is, not when the guest was asked.
func TestQMPDetach(t *testing.T) {
	q, f := monitor(t, map[string]string{"device_del": "\"return\": {}\n{\"event\": \"DEVICE_DELETED\", \"data\": {\"path\": \"/x\"}}\n{\"event\": \"DEVICE_DELETED\", \"data\": {\"device\": \"nic-n\"}}\n"})
	require.NoError(t, q.Detach("net-n", "nic-n", 5*time.Second))
	assert.Equal(t, []string{`device_del {"id":"nic-n"}`, `netdev_del {"id":"net-n"}`}, f.got[1:])
	q, f = monitor(t, nil)
	assert.ErrorContains(t, q.Detach("net-n", "nic-n", 10*time.Millisecond), "no DEVICE_DELETED of nic-n within 10ms")
	assert.Len(t, f.got, 2)
	q, f = monitor(t, map[string]string{"device_del": `"error": {"class": "DeviceNotFound", "desc": "Device 'nic-n' not found"}`})
	require.NoError(t, q.Detach("net-n", "nic-n", time.Second))
	assert.Len(t, f.got, 3)
}

// Whoever talks there may be no QEMU: nothing hangs, grows or panics.
func TestQMPHostile(t *testing.T) {
	for name, says := range map[string]string{
		"nothing":     "",
		"another":     "SSH-2.0-x\r\n",
		"no greeting": `{"return": {}}` + "\n",
		"list":        "[]\n",
		"null":        "null\n",
		"long":        `{"x": "` + strings.Repeat("x", maxQMPLine) + "\"}\n",
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := pair(t)
			go func() {
				_, _ = theirs.Write([]byte(says))
				theirs.Close()
			}()
			_, err := NewQMP(ours)
			require.Error(t, err)
			assert.True(t, strings.HasPrefix(err.Error(), "qmp: "))
		})
	}
	q := &QMP{}
	ours, theirs := pair(t)
	go func() {
		w := bufio.NewWriter(theirs)
		for range 10 * maxQMPEvents {
			fmt.Fprintln(w, `{"event": "E"}`)
		}
		fmt.Fprintln(w, greeting)
		_ = w.Flush()
		theirs.Close()
	}()
	q.c, q.r = ours, bufio.NewScanner(ours)
	_, err := q.read(time.Now().Add(5 * time.Second))
	require.NoError(t, err)
	assert.Len(t, q.events, maxQMPEvents)
}

// Values of options become what the monitor takes.
func TestTyped(t *testing.T) {
	assert.Equal(t, map[string]any{"driver": "e1000", "id": "7", "mac": "1", "x": 7, "y": true, "z": false, "path": "a,b"}, typed("e1000,id=7,mac=1,x=7,y=on,z=off,path=a,,b", "driver"))
}
